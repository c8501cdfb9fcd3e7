"""TWIST's second stage, self-labelling: a pre-trained network learns from its own confident predictions.

    python selflabel.py --checkpoint weights/fashion-mnist.pth                    on CPU or GPU
    torchrun --nproc-per-node 8 selflabel.py @recipes/resnet50_selflabel.txt --checkpoint FILE

Two of the views are global crops. The network is more certain of one of them; its class there is the label of
all other views, which are harder crops than before. Only the more confident images of each batch take part.
`diff pretrain.py selflabel.py` shows the method.

The default run takes about 1 minute on two CPU cores.
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
from loss import anchors, self_label_loss
from model import bunch_layout
from optim import LARS, cosine, param_groups, warmup_cosine
from pretrained import build_ours, load_trained
from run import Run
from views import VIEWS, build_views, pick_views

LINE = "loss {loss:.3f} on {fraction:.0%} above {threshold:.3f} classes {classes} agreement {agreement:.0%}"


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    add = parser.add_argument_group("data and views").add_argument
    add("--checkpoint", required=True, help="a run's, or a released one of TWIST; it is trained further")
    add("--data", help="a data set, folder, list or shards of pictures; without it the checkpoint's")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--views", default="auto", choices=("auto", *VIEWS), help="augmentations; auto: for "
        "fashion-mnist and mnist those of that name; for others selflabel with local crops, barlow without")
    add("--min-scale", type=at_least(0, float), default=0,
        help="smallest share of the area in a global crop; 0: that of --views")
    add("--image-size", type=at_least(0), default=0,
        help="pixels of a global crop; 0: the size of the checkpoint")
    add("--local-size", type=at_least(0), default=0, help="pixels of a local crop; 0: 3/7 of a global one")
    add("--num-local", type=at_least(0), default=0, help="local crops, besides the two global ones")
    add("--local-scale", type=at_least(0, float), nargs=2, metavar=("MIN", "MAX"),
        help="shares of the area in a local crop; without it those of --views")
    folder_flags(parser, crops=True)
    add = parser.add_argument_group("network").add_argument
    add("--bunch-size", type=at_least(0), default=0,
        help="images that NBS normalises together; 0: the global batch")
    add("--ema", type=at_least(0, float, 1), default=0.0,
        help="EMA momentum of a momentum encoder, raised to 1 by a cosine schedule; 0: no such encoder")
    add = parser.add_argument_group("loss").add_argument
    add("--quantile", type=at_least(0, float, 1), default=0.5,
        help="share of the images that give labels, at the start")
    add("--quantile-end", type=at_least(0, float, 1), default=0.6,
        help="the same at the end, reached by a cosine")
    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", default="adamw", choices=("lars", "adamw", "sgd"), help="update rule")
    add("--epochs", type=at_least(1), default=1, help="passes over the data")
    add("--batch-size", type=at_least(2), default=128, help="images in a step, of all processes together")
    add("--lr", type=at_least(0, float), default=4e-4,
        help="peak learning rate for batch size 256; scaled linearly for others")
    add("--warmup-epochs", type=at_least(0, float), default=0.1, help="epochs of linear warm-up")
    add("--weight-decay", type=at_least(0, float), default=1e-4, help="of weight matrices and kernels")
    add("--weight-decay-end", type=at_least(0, float),
        help="weight decay at the end, reached by a cosine; without it --weight-decay throughout")
    add("--momentum", type=at_least(0, float, 1), default=0.9, help="of LARS and SGD, first beta of AdamW")
    add("--beta2", type=at_least(0, float, 1), default=0.99, help="second beta of AdamW")
    add("--clip-norm", type=at_least(0, float), default=0.0,
        help="largest norm of the gradient; 0: no clipping")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/selflabel", help="folder for everything that is written")
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
    if args.optimizer != "adamw" and args.beta2 != get_parser().get_default("beta2"):
        raise UserError(f"--beta2: --optimizer {args.optimizer} has no second beta; leave it out")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: not divisible by the {world_size} processes; "
                        "choose a multiple of their number")
    if args.batch_size > len(dataset):
        raise UserError(f"--batch-size {args.batch_size}: the data set has only {len(dataset)} images; "
                        "choose at most that many")
    try:
        bunch_layout(args.bunch_size or None, args.batch_size // world_size, world_size)
    except ValueError as error:
        raise UserError(f"--bunch-size: {error}") from None


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
    source = load_trained(args.checkpoint)
    size, mean, std = input_of(source["config"])         # the network keeps its input, whatever the data
    options = folder_options(args, source["config"])
    config = {**source["config"], **vars(args), **options, "data": args.data or source["config"]["data"],
              "image_size": args.image_size or size, "mean": list(mean), "std": list(std)}
    dataset = build_dataset(config["data"], "pretrain", args.seed, args.data_dir, **options)
    config["pictures"] = dataset.files
    check(args, dataset, world_size)
    size, mean, std = input_of(config)
    recipe = pick_views(args.views, config["data"], published="selflabel" if args.num_local else "barlow")
    views = build_views(recipe, mean, std, size, args.local_size, args.num_local, min_scale=args.min_scale,
                        local_scale=args.local_scale, arch=config["arch"])
    batches = Batches(dataset, args.batch_size, views, args.seed, rank, world_size, args.crop_on)
    total_steps = args.epochs * batches.steps_per_epoch
    warmup_steps = round(args.warmup_epochs * batches.steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256

    # ---------------------------------------------------------------- model
    if world_size > 1:                       # before the model: its batch norms see that there are others
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
    model = build_ours(config, source["model"], args.checkpoint, config.get("drop_path", 0.0))
    model.to(device, memory_format=torch.channels_last)
    ddp = model
    if world_size > 1:                       # buffers are equal anyway: batch norms are synchronised
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    teacher = None
    if args.ema > 0:                         # stays in training mode: its own batch statistics, as published
        teacher = build_ours(config, source.get("teacher", source["model"]), args.checkpoint)
        teacher.to(device, memory_format=torch.channels_last).requires_grad_(False)
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
    left_out = torch.zeros((), dtype=torch.long, device=device)     # steps without a confident image
    run = Run(args, "selflabel", device, total_steps, batches.steps_per_epoch, config)
    run.track(model=model, teacher=teacher, optimizer=optimizer, scaler=scaler, left_out=left_out)
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(run.start, total_steps), worker_init_fn=own_group,
        **loader_workers(args.workers, batches), pin_memory=device.type == "cuda",
        generator=torch.Generator()))        # else it draws from the generator that drop path uses

    # ---------------------------------------------------------------- train
    run.say(f"{len(dataset):,} images, {len(views)} views of each; peak learning rate {peak_lr:g}")
    model.train()
    for step in run.steps():                 # saves; ends the run on a signal or a number that is not finite
        lr = warmup_cosine(step, total_steps, warmup_steps, peak_lr, 0.001 * peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if args.weight_decay_end is not None:
            optimizer.param_groups[0]["weight_decay"] = cosine(step, total_steps, args.weight_decay,
                                                               args.weight_decay_end)
        quantile = cosine(step, total_steps, args.quantile, args.quantile_end)

        # ---- one training step: B images of this process, V views, C classes
        images, uniforms, _ = run.next(loader)
        x = views(images, uniforms, device)                                       # V × [B, 3, h, w]
        with torch.autocast(device.type, dtype=amp_dtype, enabled=args.amp != "off"):
            logits, teacher_logits = ddp(x), None                                 # [V, B, C]
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(x[:2])                               # [2, B, C]
        loss = self_label_loss(logits, quantile, teacher_logits)
        any_label = run.read_later(loss.fraction > 0)    # the same on all ranks
        optimizer.zero_grad()
        scaler.scale(loss.total).backward()
        scaler.unscale_(optimizer)           # before the norm, which fp16's scale would multiply
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)
        has_labels = any_label()             # waits for the forward pass only
        left_out += not has_labels
        if has_labels:                       # without labels nothing moves
            scaler.step(optimizer)           # leaves the step out if fp16 overflowed
        scaler.update()
        if teacher is not None and has_labels:
            keep = cosine(step, total_steps, args.ema, 1.0)
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - keep)
        run.watch(loss, norm)

        if run.logging:
            entry = describe(loss, logits, logits[:2] if teacher is None else teacher_logits, run)
            run.log(LINE, **entry, quantile=quantile, left_out=int(left_out), lr=lr)

    # ---------------------------------------------------------------- save
    run.done()


def describe(loss, logits, labelling_logits, run):
    """An entry of the log, of the global batch: the loss, which share of the images and how many classes take
    part, how often the two global views agree, and the name of a collapse.

    logits: [V, B, C]; labelling_logits: [2, B, C], of the global views, the teacher's if there is one.
    """
    C = logits.shape[-1]
    _, label, confidence = anchors(labelling_logits)
    counts = F.one_hot(label[confidence > loss.threshold], C).sum(0)              # [C], of this process
    agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
    mean = run.average(loss=loss.total, agreement=agreement, counts=counts)
    entry = dict(loss=mean["loss"].item(), fraction=loss.fraction.item(), threshold=loss.threshold.item(),
                 classes=int((mean["counts"] > 0).sum()), agreement=mean["agreement"].item())
    if entry["classes"] == 1 and entry["fraction"] * run.args.batch_size >= 10:
        entry["collapsed"] = "one-class"
    elif entry["threshold"] < 1.02 / C:      # the most confident image is hardly above chance
        entry["collapsed"] = "uniform"
    return entry


if __name__ == "__main__":
    launch(main, get_parser())
