"""TWIST pre-training (arXiv 2110.07402): a network learns, without labels, to sort images into C classes.

    python pretrain.py                                        the embedded Fashion-MNIST, on CPU or GPU
    python pretrain.py --data my/pictures --num-classes 20    your own folder
    torchrun --nproc-per-node 8 pretrain.py @recipes/resnet50_multicrop.txt --data IMAGENET

Several augmented views of each image go through one network that ends in a softmax over C classes. The loss
asks that the views of an image agree (consistency), that each image falls into one class (sharpness) and that
the batch covers all classes (diversity). Without sharpness all outputs become uniform: try --alpha 0. Without
diversity and NBS few classes stay in use: try --beta 0 --no-nbs.

The default run takes 2.5 minutes on two idle CPU cores, more on slow ones. Its classes match the true ones
for 73 % of the test images (cluster_eval.py).
"""

import argparse
import datetime
import math
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import UserError
from cli import DEVICES, HelpFormatter, at_least, launch
from data import Batches, build_dataset, folder_flags, folder_options, input_of, loader_workers, own_group
from knn import knn_images, scores_to_watch
from loss import momentum_twist_loss, twist_loss
from model import ARCHS, build_network, bunch_layout, watch_logits, zero_init_residual
from optim import LARS, cosine, param_groups, warmup_cosine
from pictures import draw_curves
from pretrained import load_init
from restarts import Restarts
from run import Run
from views import VIEWS, build_views, pick_views

LINE = ("loss {loss:.3f} consistency {consistency:.2f} sharpness {sharpness:.2f} diversity {diversity:.2f} "
        "classes {classes:.4g}")


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    add = parser.add_argument_group("data and views").add_argument
    add("--data", default="fashion-mnist",
        help="fashion-mnist, mnist, fake, cifar10, cifar100, cifar100-20, stl10, a folder, list or shards")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--views", default="auto", choices=("auto", *VIEWS), help="augmentations; auto: for "
        "fashion-mnist and mnist those of that name; for others multicrop with local crops, barlow without")
    add("--min-scale", type=at_least(0, float), default=0,
        help="smallest share of the area in a global crop; 0: that of --views")
    add("--image-size", type=at_least(0), default=0,
        help="pixels of a global crop; 0: 20 for fashion-mnist, the data set's own for others, 224 for files")
    add("--local-size", type=at_least(0), default=0, help="pixels of a local crop; 0: 3/7 of a global one")
    add("--num-local", type=at_least(0), default=0, help="local crops, besides the two global ones")
    add("--local-scale", type=at_least(0, float), nargs=2, metavar=("MIN", "MAX"),
        help="shares of the area in a local crop; without it those of --views")
    add("--mean", type=at_least(0, float), nargs="+", metavar="M",
        help="mean of the pixels (0 to 1), one number or three; without it the data set's own")
    add("--std", type=at_least(1e-6, float), nargs="+", metavar="S",
        help="standard deviation of the pixels, one number or three; without it the data set's own")
    folder_flags(parser, crops=True)
    add = parser.add_argument_group("network").add_argument
    add("--arch", default="resnet8", choices=ARCHS, help="backbone")
    add("--init", metavar="FILE", help="weights to start from, a run's or any project's; with --restarts 1")
    add("--small-images", action="store_true", help="ResNet stem for 32 pixels: 3×3, stride 1, no max-pool")
    add("--num-classes", type=at_least(2), default=10, help="C, classes to find")
    add("--hidden-dim", type=at_least(1), default=512, help="width of the projection head's hidden layers")
    add("--nbs", action=argparse.BooleanOptionalAction, default=True, help="batch norm before the softmax")
    add("--bunch-size", type=at_least(0), default=0,
        help="images that NBS normalises together; 0: the global batch")
    add("--zero-init-residual", action="store_true", help="start the residual branches of a ResNet at 0")
    add("--drop-path", type=at_least(0, float, 1), default=0.0,
        help="stochastic depth of a ViT's last block, falling to 0 at the first")
    add("--ema", type=at_least(0, float, 1), default=0.0,
        help="EMA momentum of a momentum encoder, raised to 1 by a cosine schedule; 0: no such encoder")
    add = parser.add_argument_group("loss").add_argument
    add("--alpha", type=at_least(-math.inf, float), default=1.0, help="weight of sharpness")
    add("--beta", type=at_least(-math.inf, float), default=1.0, help="weight of diversity")
    add("--eps", type=at_least(0, float), default=1e-5, help="added inside every logarithm")
    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", default="adamw", choices=("lars", "adamw", "sgd"), help="update rule")
    add("--epochs", type=at_least(1), default=4, help="passes over the data")
    add("--restarts", type=at_least(1), default=4,
        help="networks that begin; after 3/8 of its schedule the one that agrees most with the others goes "
        "on; 1: a plain run")
    add("--batch-size", type=at_least(2), default=128, help="images in a step, of all processes together")
    add("--lr", type=at_least(0, float), default=2e-3,
        help="peak learning rate for batch size 256; scaled linearly for others")
    add("--bias-lr", type=at_least(0, float), default=1.0,
        help="learning rate of biases, norms, position embeddings and class tokens, as a multiple of --lr")
    add("--warmup-epochs", type=at_least(0, float), default=0.1, help="epochs of linear warm-up")
    add("--weight-decay", type=at_least(0, float), default=1e-4, help="of weight matrices and kernels")
    add("--weight-decay-end", type=at_least(0, float),
        help="weight decay at the end, reached by a cosine; without it --weight-decay throughout")
    add("--momentum", type=at_least(0, float, 1), default=0.9, help="of LARS and SGD, first beta of AdamW")
    add("--beta2", type=at_least(0, float, 1), default=0.99, help="second beta of AdamW")
    add("--clip-norm", type=at_least(0, float), default=0.0,
        help="largest norm of the gradient; 0: no clipping")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/pretrain", help="folder for everything that is written")
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
    add("--knn-every", type=at_least(0), default=1,
        help="epochs between checks of 20-NN accuracy, ACC and NMI, which use labels; 0: none")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


def check(args, dataset, world_size):
    """Raises UserError for flags that do not go together; each by itself is checked by its type."""
    for name in ("small_images", "zero_init_residual"):
        if getattr(args, name) and not args.arch.startswith("resnet"):
            raise UserError(f"--{name.replace('_', '-')}: {args.arch} is not a ResNet; leave it out")
    if args.drop_path and not args.arch.startswith("vit"):
        raise UserError(f"--drop-path: {args.arch} is not a ViT; leave it out")
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


def image_size(args):
    """Pixels of a global crop. Clothes of 28 pixels show their classes with 20, too, in half the time."""
    return args.image_size or (20 if args.data == "fashion-mnist" else 0)


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
    options = folder_options(args)
    dataset = build_dataset(args.data, "pretrain", args.seed, args.data_dir, **options)
    config = dict(vars(args), loss="twist", image_size=image_size(args), pictures=dataset.files,
                  **options)
    check(args, dataset, world_size)
    size, mean, std = input_of(config)
    recipe = pick_views(args.views, args.data, published="multicrop" if args.num_local else "barlow")
    views = build_views(recipe, mean, std, size, args.local_size, args.num_local, min_scale=args.min_scale,
                        local_scale=args.local_scale, arch=config["arch"])
    batches = Batches(dataset, args.batch_size, views, args.seed, rank, world_size, args.crop_on)
    total_steps = args.epochs * batches.steps_per_epoch
    warmup_steps = round(args.warmup_epochs * batches.steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256

    # ---------------------------------------------------------------- model
    if world_size > 1:                       # before the model: its batch norms see that there are others
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
    model = build_network(config, args.drop_path).to(device, memory_format=torch.channels_last)
    if args.zero_init_residual:
        zero_init_residual(model.backbone)
    load_init(model, args)
    ddp = model
    if world_size > 1:                       # buffers are equal anyway: batch norms are synchronised
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    teacher = None
    if args.ema > 0:                         # stays in training mode: its own batch statistics, as published
        teacher = build_network(config)
        teacher.to(device, memory_format=torch.channels_last).requires_grad_(False)
        teacher.load_state_dict(model.state_dict())
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
    restarts = Restarts(args, config, batches, total_steps, device, model, teacher, optimizer)
    schedule_steps = restarts.schedule_steps_after(warmup_steps)
    run = Run(args, "pretrain", device, total_steps, batches.steps_per_epoch, config)
    run.track(model=model, teacher=teacher, optimizer=optimizer, scaler=scaler, restarts=restarts)
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(run.start, total_steps), worker_init_fn=own_group,
        **loader_workers(args.workers, batches), pin_memory=device.type == "cuda",
        generator=torch.Generator()))        # else it draws from the generator that drop path uses
    watched = knn_images(args, dataset) if rank == 0 and args.knn_every else None
    health = watch_logits(model.projection_heads.last_linear, run, scaler)      # filled at steps that log

    # ---------------------------------------------------------------- train
    run.say(f"{len(dataset):,} images, {len(views)} views of each; peak learning rate {peak_lr:g}")
    model.train()
    for _ in run.steps():                    # saves; ends the run on a signal or a number that is not finite
        step = restarts.begin(run)           # of the schedule; where a candidate ends, the network changes
        lr = warmup_cosine(step, schedule_steps, warmup_steps, peak_lr, 0.001 * peak_lr)
        for group, factor in zip(optimizer.param_groups, (1, args.bias_lr), strict=True):
            group["lr"] = lr * factor
        if args.weight_decay_end is not None:
            optimizer.param_groups[0]["weight_decay"] = cosine(step, schedule_steps, args.weight_decay,
                                                               args.weight_decay_end)

        # ---- one training step: B images of this process, V views, C classes
        images, uniforms, _ = run.next(loader)
        x = views(images, uniforms, device)                                       # V × [B, 3, h, w]
        with torch.autocast(device.type, dtype=amp_dtype, enabled=args.amp != "off"):
            logits = ddp(x)                                                       # [V, B, C]
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(x[:2])                               # [2, B, C]
        if teacher is None:
            loss = twist_loss(logits, args.alpha, args.beta, args.eps)
        else:
            loss = momentum_twist_loss(teacher_logits, logits, args.alpha, args.beta, args.eps)
        optimizer.zero_grad()
        scaler.scale(loss.total).backward()
        scaler.unscale_(optimizer)           # before the norm, which fp16's scale would multiply
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)
        scaler.step(optimizer)               # leaves the step out if fp16 overflowed
        scaler.update()
        if teacher is not None:
            keep = cosine(step, schedule_steps, args.ema, 1.0)
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - keep)
        run.watch(loss, norm)

        if run.logging:
            entry = describe(loss, health, most_classes=min(args.num_classes, args.batch_size))
            if watched and run.epoch_ends and run.epoch % args.knn_every == 0:
                entry |= scores_to_watch(run.parts.get("teacher", model), *watched, config, device, amp_dtype)
                run.say("epoch {0}: 20-NN accuracy {knn_monitor:.4f}; classes: ACC {acc_monitor:.4f}, NMI "
                        "{nmi_monitor:.4f} (labels: to watch, not to choose by)".format(run.epoch, **entry))
            run.log(LINE, **entry, lr=lr)
            if run.epoch_ends:
                draw_curves(run, config)

    # ---------------------------------------------------------------- save
    run.done(files=["curves.png"])


def describe(loss, health, most_classes):
    """An entry of the log: the terms of the loss, the health of the step, and the name of a collapse.

    mi is diversity - sharpness, the information in nats that the class carries about the image. It is at most
    ln(most_classes), of which mi_ratio is the share. classes is the number of classes in use.
    """
    total, consistency, sharpness, diversity = (value.item() for value in loss)
    mi = diversity - sharpness
    entry = dict(loss=total, consistency=consistency, sharpness=sharpness, diversity=diversity, mi=mi,
                 mi_ratio=mi / math.log(most_classes), classes=math.exp(diversity))
    if entry["mi_ratio"] < 0.02:             # every image has the same distribution: one class, or all alike
        entry["collapsed"] = "one-class" if entry["classes"] < 1.1 else "uniform"
    return entry | {name: value.item() for name, value in health.items()}


if __name__ == "__main__":
    launch(main, get_parser())
