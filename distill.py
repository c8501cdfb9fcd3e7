"""SEED distillation (arXiv 2101.04731): a small network learns the similarities that a large one sees.

    python distill.py --teacher weights/fashion-mnist.pth                     on CPU or GPU
    torchrun --nproc-per-node 8 distill.py @recipes/seed_resnet50.txt --teacher FILE --data IMAGENET

No labels are used. Teacher and student see the same view of an image. The frozen teacher compares its
embedding with a queue of its earlier ones. The student learns, by cross-entropy, to find the same
similarities. With --num-local small crops take part, with a queue of their own. `diff pretrain.py distill.py`
shows the method.
"""

import argparse
import datetime
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from checkpoint import UserError
from cli import DEVICES, HelpFormatter, at_least, launch
from data import Batches, build_dataset, folder_flags, folder_options, input_of, loader_workers, own_group
from loss import all_gather, seed_loss, seed_target
from model import ARCHS, Embedder, build_network, patch_size
from optim import LARS, param_groups, seed_lr, warmup_cosine
from pretrained import fingerprint, load_teacher
from run import Run
from views import VIEWS, build_views, pick_views

LINE = "loss {loss:.3f} positive {positive_mass:.1%} cosine {cosine:.3f} spread {spread:.2f}"


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    add = parser.add_argument_group("data and views").add_argument
    add("--data", help="fashion-mnist, mnist, fake, cifar10, cifar100, cifar100-20, stl10, a folder, a "
        "list or shards of pictures; without it the teacher's data")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--views", default="auto", choices=("auto", *VIEWS), help="augmentations; auto: for "
        "fashion-mnist and mnist those of that name; for others seed with local crops, moco without")
    add("--min-scale", type=at_least(0, float), default=0,
        help="smallest share of the area in a global crop; 0: that of --views")
    add("--image-size", type=at_least(0), default=0,
        help="pixels of a global crop; 0: the teacher's")
    add("--local-size", type=at_least(0), default=0, help="pixels of a local crop; 0: 3/7 of a global one")
    add("--num-local", type=at_least(0), default=0, help="local crops, besides the global one")
    add("--local-scale", type=at_least(0, float), nargs=2, metavar=("MIN", "MAX"),
        help="shares of the area in a local crop; without it those of --views")
    add("--mean", type=at_least(0, float), nargs="+", metavar="M",
        help="mean of the pixels (0 to 1), one number or three; without it the teacher's")
    add("--std", type=at_least(1e-6, float), nargs="+", metavar="S",
        help="standard deviation of the pixels, one number or three; without it the teacher's")
    folder_flags(parser, crops=True)
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="resnet8", choices=ARCHS, help="the student's backbone")
    add("--small-images", action="store_true", help="ResNet stem for 32 pixels: 3×3, stride 1, no max-pool")
    add("--teacher", required=True, help="checkpoint of a run; any project's with --teacher-arch")
    add("--teacher-arch", choices=ARCHS, help="the teacher's backbone, for files that do not say it")
    add("--teacher-head", default="auto", help="projection head that makes the teacher's embedding: "
        "projection_heads.projection_head (TWIST), projection_head (SwAV), projector (Barlow Twins), fc "
        "(MoCo, SimCLR), or none, the features themselves; auto: the first of these in the file that has two "
        "linear layers or more, else none")
    add = parser.add_argument_group("loss").add_argument
    add("--queue-size", type=at_least(1), default=4096, help="K, the teacher's latest embeddings")
    add("--student-temperature", type=at_least(1e-6, float), default=0.2,
        help="of the student's similarities")
    add("--teacher-temperature", type=at_least(1e-6, float), default=0.01,
        help="of the teacher's similarities; the released code has 0.0001: the target is one-hot")
    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", default="sgd", choices=("lars", "adamw", "sgd"), help="update rule")
    add("--epochs", type=at_least(1), default=4, help="passes over the data")
    add("--batch-size", type=at_least(2), default=128, help="images in a step, of all processes together")
    add("--lr", type=at_least(0, float), default=0.03,
        help="peak learning rate for batch size 256; scaled linearly for others")
    add("--schedule", default="steps", choices=("steps", "epochs"),
        help="steps: warm-up from 0, then a cosine, step by step; epochs: SEED's, epoch by epoch, from --lr "
        "itself to its multiple for the batch size, then a cosine or --milestones")
    add("--milestones", type=at_least(0), nargs="+",
        help="epochs at which --schedule epochs divides the learning rate by 10, instead of the cosine")
    add("--warmup-epochs", type=at_least(0, float), default=0.1, help="epochs of linear warm-up")
    add("--weight-decay", type=at_least(0, float), default=1e-4, help="of weight matrices and kernels")
    add("--momentum", type=at_least(0, float, 1), default=0.9, help="of LARS and SGD, first beta of AdamW")
    add("--beta2", type=at_least(0, float, 1), default=0.99, help="second beta of AdamW")
    add("--clip-norm", type=at_least(0, float), default=0.0,
        help="largest norm of the gradient; 0: no clipping")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/distill", help="folder for everything that is written")
    add("--resume", default="auto", metavar="auto|never|FILE",
        help="auto: from the last checkpoint in --output-dir; never; or a checkpoint file")
    add("--overwrite", action="store_true", help="start anew in a used --output-dir")
    add("--seed", type=at_least(0), default=0, help="of new weights, order of the images, views")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to compute")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--workers", type=at_least(-1), default=-1,
        help="data-loader workers; -1: one per core for image files, 0 for in-memory sets")
    add("--save-every", type=at_least(1), default=500, help="steps between checkpoints")
    add("--print-every", type=at_least(1), default=50, help="steps between lines of the log")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


def check(args, dataset, world_size):
    """Raises UserError for flags that do not go together; each by itself is checked by its type."""
    if args.small_images and not args.arch.startswith("resnet"):
        raise UserError(f"--small-images: {args.arch} is not a ResNet; leave it out")
    if args.optimizer != "adamw" and args.beta2 != get_parser().get_default("beta2"):
        raise UserError(f"--beta2: --optimizer {args.optimizer} has no second beta; leave it out")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: not divisible by the {world_size} processes; "
                        "choose a multiple of their number")
    if args.batch_size > len(dataset):
        raise UserError(f"--batch-size {args.batch_size}: the data set has only {len(dataset)} images; "
                        "choose at most that many")
    if args.queue_size % args.batch_size:
        raise UserError(f"--queue-size {args.queue_size}: not divisible by --batch-size {args.batch_size}; "
                        f"{math.ceil(args.queue_size / args.batch_size) * args.batch_size} would be")
    if args.milestones and args.schedule == "steps":
        raise UserError("--milestones: --schedule steps has none; add --schedule epochs")


def main(args):
    # ---------------------------------------------------------------- ddp: torchrun sets these variables
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device(args.device), dict(backend="gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = dict(backend="nccl", device_id=device)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True        # seeks the fastest kernels once: the sizes stay the same
    amp_dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    torch.manual_seed(args.seed)

    # ---------------------------------------------------------------- data
    backbone, head_name, head, source = load_teacher(args.teacher, args.teacher_arch, args.teacher_head)
    teacher = Embedder(backbone, head).eval().requires_grad_(False)
    size, mean, std = input_of(source)       # the teacher keeps its input, whatever the data
    options = folder_options(args, source)
    config = dict(vars(args), **options, loss="seed", data=args.data or source["data"],
                  image_size=args.image_size or size, mean=args.mean or list(mean),
                  std=args.std or list(std))
    dataset = build_dataset(config["data"], "pretrain", args.seed, args.data_dir, **options)
    check(args, dataset, world_size)
    size, mean, std = input_of(config)
    with torch.no_grad():
        embedding_dim = teacher([torch.zeros(1, 3, size, size)]).shape[-1]
    config.update(pictures=dataset.files, embedding_dim=embedding_dim, teacher_head=head_name,
                  teacher_sha256=fingerprint(teacher))
    recipe = pick_views(args.views, config["data"], published="seed" if args.num_local else "moco")
    coarser = max(args.arch, source["arch"], key=patch_size)     # the network that needs the larger crops
    views = build_views(recipe, mean, std, size, args.local_size, args.num_local, num_global=1,
                        min_scale=args.min_scale, local_scale=args.local_scale, arch=coarser)
    batches = Batches(dataset, args.batch_size, views, args.seed, rank, world_size, args.crop_on)
    total_steps = args.epochs * batches.steps_per_epoch
    warmup_steps = round(args.warmup_epochs * batches.steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256

    # ---------------------------------------------------------------- model
    if world_size > 1:                       # before the model: its batch norms see that there are others
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
    teacher.to(device, memory_format=torch.channels_last)
    model = build_network(config).to(device, memory_format=torch.channels_last)
    ddp = model
    if world_size > 1:                       # buffers are equal anyway: batch norms are synchronised
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    queues = torch.randn(2 if args.num_local else 1, args.queue_size, embedding_dim)      # [Q, K, D]
    queues = F.normalize(queues, dim=-1).to(device)      # the same on all ranks, now and after every step
    torch.manual_seed(args.seed + rank)      # from here on noise (drop path) should differ between ranks

    # ---------------------------------------------------------------- optimizer
    groups = param_groups(model, args.weight_decay)
    if args.optimizer == "lars":
        optimizer = LARS(groups, lr=peak_lr, momentum=args.momentum)
    elif args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(args.momentum, args.beta2),
                                      fused=device.type == "cuda" or None)           # None: torch's default
    else:
        optimizer = torch.optim.SGD(groups, lr=peak_lr, momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---------------------------------------------------------------- resume
    run = Run(args, "distill", device, total_steps, batches.steps_per_epoch, config)
    run.track(model=model, queues=queues, optimizer=optimizer, scaler=scaler)
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(run.start, total_steps), worker_init_fn=own_group,
        **loader_workers(args.workers, batches), pin_memory=device.type == "cuda",
        generator=torch.Generator()))        # else it draws from the generator that drop path uses

    # ---------------------------------------------------------------- train
    temperatures = args.student_temperature, args.teacher_temperature
    run.say(f"{len(dataset):,} images, {len(views)} views of each; peak learning rate {peak_lr:g}; the "
            f"teacher's {'features' if head_name == 'none' else head_name} are {embedding_dim} numbers")
    model.train()
    for step in run.steps():                 # saves; ends the run on a signal or a number that is not finite
        if args.schedule == "steps":
            lr = warmup_cosine(step, total_steps, warmup_steps, peak_lr, 0.001 * peak_lr)
        else:
            lr = seed_lr(run.epoch - 1, args.epochs, args.warmup_epochs, args.lr, peak_lr, args.milestones)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ---- one training step: B images of this process, V views, the first one global
        images, uniforms, _ = run.next(loader)
        x = views(images, uniforms, device)                                       # V × [B, 3, h, w]
        with torch.autocast(device.type, dtype=amp_dtype, enabled=args.amp != "off"):
            s = ddp(x)                                                            # [V, B, D]
            with torch.no_grad():
                t = teacher(x)                                                    # [V, B, D]
        loss = seed_loss(s[0], t[0], queues[0], *temperatures)
        if args.num_local:
            loss = loss + seed_loss(s[1:].flatten(0, 1), t[1:].flatten(0, 1), queues[1], *temperatures)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)           # before the norm, which fp16's scale would multiply
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)
        scaler.step(optimizer)               # leaves the step out if fp16 overflowed
        scaler.update()
        run.watch(loss, norm)
        # the global view for queue 0; the first local one for queue 1
        embeddings = gather(F.normalize(t[:len(queues)].float(), dim=-1))         # [Q, B of all ranks, D]

        if run.logging:                      # before this step's embeddings are in the queue
            entry = describe(loss, s[0].detach(), t[0], queues[0], args.teacher_temperature, run)
            run.log(LINE, **entry, lr=lr)
        oldest = step * args.batch_size % args.queue_size
        queues[:, oldest:oldest + args.batch_size] = embeddings

    # ---------------------------------------------------------------- save
    if fingerprint(teacher) != config["teacher_sha256"]:
        raise RuntimeError("the teacher has changed, though it was frozen")
    run.done()


def gather(embeddings):
    """Embeddings [Q, B, D] of each process -> [Q, W·B, D] of all, in the order of the global batch."""
    if not dist.is_initialized():
        return embeddings
    return all_gather(embeddings).transpose(0, 1).flatten(1, 2)


def spread(embeddings):
    """Variance over a batch of the directions of embeddings [B, D], summed over D: 0 if all are alike."""
    return F.normalize(embeddings.float(), dim=-1).var(0, correction=0).sum()


def describe(loss, s, t, queue, teacher_temperature, run):
    """An entry of the log, means over the ranks: the loss; the share of the target that lies on the positive;
    the cosine between student and teacher; the student's spread over the teacher's; the name of a collapse.

    s, t: student's and teacher's embeddings [B, D] of the global view.
    """
    positive_mass = seed_target(t, queue, teacher_temperature)[:, 0].mean()
    cosine = F.cosine_similarity(s.float(), t.float()).mean()
    means = run.average(loss=loss, positive_mass=positive_mass, cosine=cosine, spread=spread(s) / spread(t))
    entry = {name: value.item() for name, value in means.items()}
    if not entry["spread"] > 0.02:           # the student says the same of all images
        entry["collapsed"] = "constant"
    return entry


if __name__ == "__main__":
    launch(main, get_parser())
