"""Transfer by fine-tuning: train the whole network on another data set, as in the paper's Table 4.

    python finetune.py --checkpoint weights/fashion-mnist.pth                  MNIST, CPU or one GPU
    python finetune.py --checkpoint weights/fashion-mnist.pth --random-init    the same network from scratch
    python finetune.py @recipes/finetune.txt --checkpoint FILE --data pets --data-dir DATA
    torchrun --nproc-per-node 8 finetune.py @recipes/finetune.txt --checkpoint FILE --data food

The backbone and a new linear classifier are trained with one learning rate. A plain run trains on training
and validation images and scores the test images. With --validate it leaves the validation images out and
scores these. With --grid it does so for each pair of --lrs and --weight-decays, each in a folder of its own.
Then it trains the best one anew on both, and tests that one alone. The same command goes on after a stop.

The last two commands are the protocol of SimCLR and BYOL: SGD with Nesterov's momentum, a cosine by step,
weight decay divided by the learning rate, random resized crops and flips. They were not run here.
"""

import argparse
import copy
import datetime
import itertools
import json
import math
import os
import shlex
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import UserError, to_stdout, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from data import (
    Batches,
    draw_labels,
    folder_flags,
    folder_options,
    hold_out,
    input_of,
    labelled,
    loader_workers,
    own_group,
)
from model import build_backbone
from optim import cosine
from predictions import UNREADABLE, predict_part, write_predictions
from pretrained import fingerprint, load_network, network_flags
from run import Run
from transfer_sets import HELD_OUT, METRICS, SETS, checksum, read_set
from views import Views, mirrored


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    add = network_flags(parser).add_argument
    add("--random-init", action="store_true", help="train the same network from scratch, to compare with")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="mnist", help=f"{', '.join(SETS)}, fashion-mnist, fake, cifar100-20, stl10, a "
        "folder, list or shards of labelled pictures")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--label-fraction", type=at_least(0, float), default=1.0,
        help="share of the training and of the validation images to take, as many of each class")
    add("--validate", action="store_true", help="train without the validation images, and score these alone")
    add("--min-scale", type=at_least(0, float), default=0.4, help="smallest share of the area in a crop")
    add("--interpolation", default="bicubic", choices=("bicubic", "bilinear"), help="of every resizing")
    add("--resize-side", type=at_least(0), default=0,
        help="side of a picture whose middle is scored; 0: that of the input, for files times 256/224")
    folder_flags(parser, crops=True)
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=at_least(1), default=1000, help="training steps")
    add("--batch-size", type=at_least(1), default=64, help="images in a step, of all processes together")
    add("--lr", type=at_least(1e-9, float), default=0.1, help="peak learning rate, whatever the batch size")
    add("--weight-decay", type=at_least(0, float), default=0.0,
        help="of all weights, biases and norms, in a step at the peak: it is divided by --lr")
    add("--bn-momentum", type=at_least(0, float, 1), default=0.0,
        help="a step's share in batch norms' running statistics; 0: 10 / steps of an epoch, at most 0.1")
    add("--grid", action="store_true", help="choose --lr and --weight-decay from the lists here")
    add("--lrs", type=at_least(1e-9, float), nargs="+", help="values of --lr; without it 0.01 0.03 0.1")
    add("--weight-decays", type=at_least(0, float), nargs="+", help="of --weight-decay; without it 0 0.0001")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/finetune", help="folder for everything that is written")
    add("--resume", default="auto", metavar="auto|never|FILE",
        help="auto: from the last checkpoint in --output-dir; never; or a checkpoint file")
    add("--overwrite", action="store_true", help="start anew in a used --output-dir")
    add("--seed", type=at_least(0), default=0, help="of the images' parts, initial weights, order, and crops")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to compute")
    add("--amp", default="off", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--workers", type=at_least(-1), default=-1,
        help="data-loader workers; -1: one per core for image files, 0 for in-memory sets")
    add("--save-every", type=at_least(1), default=500, help="steps between checkpoints")
    add("--print-every", type=at_least(1), default=50, help="steps between lines of the log")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


def check(args, size, train, scored, world_size):
    """Raises UserError for flags that do not go together; each by itself is checked by its type."""
    if not 0 < args.min_scale <= 1:
        raise UserError(f"--min-scale {args.min_scale}: must be above 0 and at most 1")
    if 0 < args.resize_side < size:
        raise UserError(f"--resize-side {args.resize_side}: must be at least the {size} pixels of the input")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the {world_size} processes")
    if args.batch_size > len(train):
        raise UserError(f"--batch-size {args.batch_size}: must be at most the {len(train)} training images")
    if world_size > len(scored):
        raise UserError(f"--data: has {len(scored)} {scored.part}, fewer than processes; use more images")


# ---------------------------------------------------------------- data
def read_parts(args, source):
    """(training, validation, test images) of --data, ImageSets; labels [N], of voc07 [N, C].

    Where a set has no validation images, HELD_OUT of each class are drawn by the seed. Raises UserError.
    """
    if args.data in SETS:
        if any(folder_options(args).values()):
            raise UserError(f"--data {args.data}: has parts and classes of its own; leave --val-share, "
                            "--group-names, --classes and --decoder out")
        train, val, test = read_set(args.data, args.data_dir, args.seed, flag="--data").values()
    else:
        whole, test = labelled(args, source)
        train, val = map(whole.subset, hold_out(whole.labels, HELD_OUT, args.seed))
    if args.label_fraction != 1 and train.labels.dim() == 2:
        raise UserError(f"--label-fraction: images of {args.data} have several classes each; leave it out")
    train, val = (part.subset(draw_labels(part, args.label_fraction, args.seed)) for part in (train, val))
    val.part = "validation images"
    return train, val, test


def join(a, b):
    """The images of two ImageSets in one, those of a first."""
    both = dict(labels=torch.cat([a.labels, b.labels]), broken=None, positions=None)
    if a.images is not None:
        return replace(a, images=torch.cat([a.images, b.images]), **both)
    return replace(a, paths=np.concatenate([a.paths, b.paths]), **both)


# ---------------------------------------------------------------- what differs from semisup.py in a step
def loss_of(logits, labels):
    """Cross-entropy of logits [B, C] with labels [B]; binary cross-entropy with labels [B, C] of 1, -1 and 0.

    0, where all objects of a class are difficult, counts as -1: the class is not there.
    """
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, (labels == 1).to(logits))


def set_bn_momentum(network, momentum, steps_per_epoch):
    """Sets PyTorch's momentum of all batch norms; 0: 1 - max(1 - 10 / s, 0.9) with s steps in an epoch."""
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.momentum = momentum or min(10 / steps_per_epoch, 0.1)


# ---------------------------------------------------------------- one training
def train_once(args, loaded, last=True):
    """Trains and scores by these flags, then ends by SystemExit, as its Run does; loaded: by load_network."""
    # ---------------------------------------------------------------- ddp: torchrun sets these variables
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device(args.device), dict(backend="gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = dict(backend="nccl", device_id=device)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True        # seeks the fastest kernels once: the sizes stay the same
    amp_dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]

    # ---------------------------------------------------------------- data
    backbone, source = copy.deepcopy(loaded)
    sha256 = fingerprint(backbone)
    source |= dict(interpolation=args.interpolation, resize_side=args.resize_side)       # of eval_batches
    size, mean, std = input_of(source)
    train, val, test = read_parts(args, source)
    if args.validate:                        # to choose by, or once at the end
        scored, part = "validation", val
    else:
        scored, part, train = "test", test, join(train, val)
    check(args, size, train, part, world_size)
    metric = SETS[args.data].metric if args.data in SETS else "top-1"
    crop = dict(scale=(args.min_scale, 1), interpolation=args.interpolation, flip=mirrored(args.data))
    views = Views([(size, crop)], mean, std)
    batches = Batches(train, args.batch_size, views, args.seed, rank, world_size, args.crop_on)

    # ---------------------------------------------------------------- model
    torch.manual_seed(args.seed)             # loaded before the process group: batch norms are per process
    if args.random_init:
        backbone = build_backbone(source["arch"], source.get("small_images", False))
    head = nn.Linear(backbone.feature_dim, len(train.class_names))
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    network = nn.Sequential(OrderedDict(backbone=backbone, head=head)).to(
        device, memory_format=torch.channels_last)
    set_bn_momentum(network, args.bn_momentum, batches.steps_per_epoch)
    if world_size > 1 and not dist.is_initialized():         # it is, in a grid after the first run
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
    ddp = network
    if world_size > 1:                       # buffers are those of rank 0
        ddp = DistributedDataParallel(network, gradient_as_bucket_view=True)
    torch.manual_seed(args.seed + rank)      # from here on noise (dropout) should differ between ranks

    # ---------------------------------------------------------------- optimizer
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, nesterov=True,
                                weight_decay=args.weight_decay / args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---------------------------------------------------------------- resume
    config = vars(args) | dict(arch=source["arch"], small_images=source.get("small_images", False),
                               image_size=size, mean=mean, std=std)        # what backbone.json says
    config |= dict(folder_options(args, source), pictures=[checksum(train), checksum(part)],
                   backbone_sha256=sha256)
    for name in ("grid", "lrs", "weight_decays"):            # so a run of a grid is one without it, too
        del config[name]
    # a small set has few steps in an epoch, of which each would be a line; so the whole run is one epoch here
    run = Run(args, "finetune", device, args.steps, args.steps, config, last)
    run.track(model=network, optimizer=optimizer, scaler=scaler)
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(run.start, args.steps), worker_init_fn=own_group,
        **loader_workers(args.workers, batches), pin_memory=device.type == "cuda",
        generator=torch.Generator()))        # else it draws from the generator that dropout uses

    # ---------------------------------------------------------------- train
    run.say(f"{len(train):,} images to train on, {len(part):,} {part.part} to score; {source['arch']}, "
            f"{'random weights' if args.random_init else 'pre-trained'}; lr {args.lr:g}, weight decay "
            f"{args.weight_decay:g}")
    network.train()
    for step in run.steps():                 # saves; ends the run on a signal or a number that is not finite
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.lr, 0)

        # ---- one training step: B images of this process, C classes
        images, uniforms, labels = run.next(loader)
        x = views(images, uniforms, device)[0]                                    # [B, 3, h, w]
        with torch.autocast(device.type, dtype=amp_dtype, enabled=args.amp != "off"):
            logits = ddp(x)                                                       # [B, C]
        loss = loss_of(logits.float(), labels.to(device, non_blocking=device.type == "cuda"))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)           # before the norm, which fp16's scale would multiply
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), math.inf)       # no clipping
        scaler.step(optimizer)
        scaler.update()
        run.watch(loss, norm)

        if run.logging:
            run.log("loss {loss:.3f}", loss=run.average(loss=loss)["loss"].item())

    # ---------------------------------------------------------------- evaluate
    if world_size > 1:                       # batch norms of rank 0, as in the checkpoint
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    scores, _ = predict_part(part, network, source, device, args.batch_size, args.workers)        # [N, C]
    readable = (scores != UNREADABLE).any(1)
    value = float(METRICS[metric](scores[readable].numpy(), part.labels[readable].numpy()))
    if rank == 0 and part.labels.dim() == 1:
        write_predictions(run.out / "predictions.csv", part, scores.argmax(1).where(readable, UNREADABLE))
    number = int(readable.sum())
    run.say(f"{number:,} {part.part}: {metric} {value:.4f}")
    metrics = dict(checkpoint=args.checkpoint, data=args.data, random_init=args.random_init, lr=args.lr,
                   weight_decay=args.weight_decay, num_train=len(train), num_broken=len(part) - number)
    run.done(metrics | {f"num_{scored}": number, "metric": metric, scored: value}, files=["predictions.csv"])


# ---------------------------------------------------------------- a grid of them
def train_cell(args, loaded, lr, weight_decay, validate):
    """What a run of its own with these flags wrote into metrics.json; None if it diverges.

    It is the run of the same command without --grid. If it is finished, it is not repeated; else it goes on.
    """
    name = f"lr{lr:g}_wd{weight_decay:g}" + "_test" * (not validate)
    cell = argparse.Namespace(**vars(args))
    cell.lr, cell.weight_decay, cell.validate = lr, weight_decay, validate
    cell.output_dir, metrics = os.path.join(args.output_dir, name), [None]
    try:
        train_once(cell, loaded, last=False)
    except SystemExit as end:
        if end.code not in (0, 3):           # it is neither done nor diverges, but was stopped
            raise
        if end.code == 0 and int(os.environ.get("RANK", 0)) == 0:
            metrics = [json.loads(Path(cell.output_dir, "metrics.json").read_text())]
    if dist.is_initialized():                # the folder may be on the first machine only
        dist.broadcast_object_list(metrics)
    return metrics[0]


def choose(cells):
    """The best of cells {(lr, weight decay): validation score, or None where it diverged}; or UserError.

    Of equals it is the one with the strongest decay, and of these the one with the lowest learning rate.
    """
    sound = [cell for cell, value in cells.items() if value is not None]
    if not sound:
        raise UserError("--lrs: all runs of the grid diverged; try lower learning rates")
    return max(sound, key=lambda cell: (cells[cell], cell[1], -cell[0]))


def table(cells):
    """Lines of the grid: a row for each learning rate, a column for each weight decay."""
    rates, decays = (sorted(set(values)) for values in zip(*cells, strict=True))
    lines = ["  weight decay" + "".join(f"{decay:>10g}" for decay in decays)]
    for lr in rates:
        lines.append(f"  lr {lr:<9g}")
        for decay in decays:
            value = cells[lr, decay]
            lines[-1] += "  diverged" if value is None else f"{value:>10.4f}"
    return lines


def main(args):
    loaded = load_network(args)
    if not args.grid:
        if args.lrs or args.weight_decays:
            raise UserError("--lrs, --weight-decays: only --grid tries them; add it, or use --lr")
        train_once(args, loaded)             # ends the process
    if args.validate:
        raise UserError("--validate: is what --grid does, before it tests; leave one of the two out")
    if args.resume not in ("auto", "never"):
        raise UserError(f"--resume {args.resume}: is one run, --grid has several; leave one of the two out")
    if Path(args.output_dir, "checkpoint.pth").exists():
        raise UserError(f"--output-dir {args.output_dir}: holds a training run; choose another")
    cells = {}
    for lr, weight_decay in itertools.product(args.lrs or [0.01, 0.03, 0.1], args.weight_decays or [0, 1e-4]):
        found = train_cell(args, loaded, lr, weight_decay, validate=True)
        cells[lr, weight_decay] = found and found["validation"]
    lr, weight_decay = choose(cells)
    found = train_cell(args, loaded, lr, weight_decay, validate=False)
    if found is None:                        # with the validation images; the Run has said so
        raise SystemExit(3)
    if int(os.environ.get("RANK", 0)) == 0:
        rows = [dict(lr=cell[0], weight_decay=cell[1], validation=value) for cell, value in cells.items()]
        metrics = found | dict(validation=cells[lr, weight_decay], grid=rows,
                               command=shlex.join(["python", *sys.argv]))
        write_atomically(Path(args.output_dir, "metrics.json"), json.dumps(metrics, indent=1).encode())
        to_stdout("\n".join([f"validation {found['metric']}:", *table(cells)]))
        to_stdout(f"chosen: lr {lr:g}, weight decay {weight_decay:g}; trained anew on {found['num_train']:,} "
                  f"training and validation images; test {found['metric']} {found['test']:.4f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    launch(main, get_parser())
