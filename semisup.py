"""Semi-supervised classification: fine-tune the whole network on a few labelled images.

    python semisup.py --checkpoint weights/fashion-mnist.pth                 1 % of the labels, CPU or one GPU
    python semisup.py --checkpoint weights/fashion-mnist.pth --random-init   the same network from scratch
    torchrun --nproc-per-node 8 semisup.py @recipes/resnet50_semisup_1.txt --checkpoint FILE --data IMAGENET

The backbone and a new linear classifier are trained, each with its own learning rate. A list names the
images (--labels, SimCLR's for example), or equally many of each class are drawn by the seed. With --held-out,
some of them are scored instead of the test images: choose learning rates by these.

The last command is the published protocol: SGD with momentum 0.9 and no weight decay, batch size 256, cosine
by epoch, batch norms in training mode and per process. With 1 % of Fashion-MNIST's labels the network of
recipes/fashion_mnist_representation.txt reaches 0.826 by recipes/fashion_mnist_semisup_1.txt, in 38 seconds
of one CPU core with --amp bf16; from scratch it is 0.795.
"""

import argparse
import datetime
import hashlib
import math
import os
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import UserError, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from data import (
    Batches,
    draw_labels,
    eval_batches,
    folder_flags,
    folder_options,
    hold_out,
    input_of,
    labelled,
    loader_workers,
    own_group,
    refuse_empty_classes,
)
from model import build_backbone
from optim import cosine, milestone_factor
from predictions import UNREADABLE, accuracies, classify, gather, write_predictions
from pretrained import fingerprint, load_network, network_flags
from run import Run
from views import Views, mirrored


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    add = network_flags(parser).add_argument
    add("--random-init", action="store_true", help="train the same network from scratch, to compare with")
    group = parser.add_argument_group("data")
    add, add_either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--data", help="fashion-mnist, mnist, fake, cifar10, cifar100, cifar100-20, stl10, a folder, a "
        "list or shards of labelled pictures; without it the data of the checkpoint")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add_either("--labels", help="list of the images to train on: lines CLASS_NUMBER.JPEG, CLASS/FILE or "
               "CLASS/FILE LABEL; for in-memory sets INDEX or INDEX LABEL")
    add_either("--label-fraction", type=at_least(0, float), default=0.01,
               help="share of the training images to train on, as many of each class")
    add("--held-out", type=at_least(0, float, 1), default=0.0,
        help="share of the labelled images that is scored instead of the test images")
    add("--min-scale", type=at_least(0, float), default=0.08, help="smallest share of the area in a crop")
    add("--interpolation", default="bicubic", choices=("bicubic", "bilinear"), help="of every resizing")
    folder_flags(parser, crops=True)
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=at_least(1), default=20, help="passes over the labelled images")
    add("--batch-size", type=at_least(1), default=256, help="images in a step, of all processes together")
    add("--lr", type=at_least(0, float), default=0.04,
        help="peak learning rate of the backbone for batch size 256; scaled linearly for others")
    add("--head-lr", type=at_least(0, float), default=0.2, help="the same of the new classifier")
    add("--weight-decay", type=at_least(0, float), default=0.0, help="of all weights, biases and norms")
    add("--milestones", type=at_least(0), nargs="+",
        help="epochs at which the learning rate is divided by 10; without it a cosine")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/semisup", help="folder for everything that is written")
    add("--resume", default="auto", metavar="auto|never|FILE",
        help="auto: from the last checkpoint in --output-dir; never; or a checkpoint file")
    add("--overwrite", action="store_true", help="start anew in a used --output-dir")
    add("--seed", type=at_least(0), default=0, help="of labelled images, initial weights, order, and crops")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to compute")
    add("--amp", default="off", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--workers", type=at_least(-1), default=-1,
        help="data-loader workers; -1: one per core for image files, 0 for in-memory sets")
    add("--save-every", type=at_least(1), default=500, help="steps between checkpoints")
    add("--print-every", type=at_least(1), default=50, help="steps between lines of the log")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


def check(args, train, held, test, world_size):
    """Raises UserError for flags that do not go together; each by itself is checked by its type."""
    if not 0 < args.min_scale <= 1:
        raise UserError(f"--min-scale {args.min_scale}: must be above 0 and at most 1")
    if args.held_out > 0 and not len(held):
        raise UserError(f"--held-out {args.held_out}: holds out none of {len(train)} labelled images; "
                        "hold out more")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the {world_size} processes")
    if args.batch_size > len(train):
        raise UserError(f"--batch-size {args.batch_size}: must be at most the {len(train)} labelled images")
    if world_size > len(held or test):
        raise UserError("--data: has fewer images to evaluate than there are processes; use fewer")


# ---------------------------------------------------------------- which images have labels
def name_of(dataset, i):
    """How a list of labels names image i of a data set: its index, or CLASS/FILE."""
    if dataset.images is not None:
        return str(i)
    return f"{dataset.class_names[dataset.labels[i]]}/{os.path.basename(os.fsdecode(dataset.paths[i]))}"


def read_labels(path, dataset):
    """Indices [n], in the list's order, of the images of a data set that a list of labels names.

    Lines CLASS_NUMBER.JPEG (SimCLR's lists), CLASS/FILE or CLASS/FILE LABEL, LABEL by name or number; for
    sets in memory INDEX or INDEX LABEL. Raises UserError with the line for what is not in the set, is there
    twice or says another class, and for a class without an image.
    """
    try:
        lines = Path(path).read_text(errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"--labels {path}: cannot be read ({error.strerror}); is the path right?") from None
    indices_of, line_of = {}, {}                 # of a name, of an index
    for i in range(len(dataset)):
        indices_of.setdefault(name_of(dataset, i), []).append(i)
    for number, line in enumerate(map(str.strip, lines), 1):
        if line:
            try:
                i = find_image(line, dataset, indices_of)
                if i in line_of:
                    raise ValueError(f"'{name_of(dataset, i)}' is there already, in line {line_of[i]}")
            except ValueError as error:
                raise UserError(f"--labels {path}: line {number}: {error}; correct or remove it") from None
            line_of[i] = number
    if not line_of:
        raise UserError(f"--labels {path}: an empty list; it needs an image a line")
    indices = torch.tensor(list(line_of))
    refuse_empty_classes(dataset, indices, f"--labels {path}")
    return indices


def find_image(line, dataset, indices_of):
    """The index of the image that a line of a list names. Raises ValueError for a mistake in it."""
    names, (name, *label) = dataset.class_names, line.rsplit(None, 1)
    if line in indices_of:                       # a file's name may have spaces in it
        name, label = line, []
    if dataset.images is None and "/" not in name:
        name = f"{name.rsplit('_', 1)[0]}/{name}"
    if label and label[0] not in names and label[0].isdecimal() and int(label[0]) < len(names):
        label = [names[int(label[0])]]           # a number stands for a name
    folder = [name.rsplit("/", 1)[0]] if dataset.images is None else []
    for known in folder + label:
        if known not in names:
            raise ValueError(f"unknown class '{known}'")
    indices = indices_of.get(name, [])
    if not indices:
        raise ValueError(f"'{name}' is not among the training images")
    if len(indices) > 1:
        raise ValueError(f"'{name}' is the name of {len(indices)} training images")
    own = names[dataset.labels[indices[0]]]
    if label not in ([], [own]):
        raise ValueError(f"'{name}' is of class '{own}', not '{label[0]}'")
    return indices[0]


def label_lines(dataset, indices):
    """The text of a list that read_labels maps to the same indices."""
    lines = []
    for i in indices.tolist():
        label = int(dataset.labels[i])
        class_name = dataset.class_names[label]
        is_word = len(class_name.split()) == 1
        lines.append(f"{name_of(dataset, i)} {class_name if is_word else label}\n")
    return "".join(lines)


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

    # ---------------------------------------------------------------- data
    backbone, source = load_network(args)
    sha256 = fingerprint(backbone)
    source["interpolation"] = args.interpolation         # of eval_batches
    data, (size, mean, std) = args.data or source["data"], input_of(source)
    whole, test = labelled(args, source)
    indices = (read_labels(args.labels, whole) if args.labels else
               draw_labels(whole, args.label_fraction, args.seed))
    few = whole.subset(indices)
    train, held = map(few.subset, hold_out(few.labels, args.held_out, args.seed))
    check(args, train, held, test, world_size)
    crop = dict(scale=(args.min_scale, 1), interpolation=args.interpolation, flip=mirrored(data))
    views = Views([(size, crop)], mean, std)
    batches = Batches(train, args.batch_size, views, args.seed, rank, world_size, args.crop_on)
    total_steps = args.epochs * batches.steps_per_epoch

    # ---------------------------------------------------------------- model
    torch.manual_seed(args.seed)             # built before the process group: batch norms are per process
    if args.random_init:
        backbone = build_backbone(source["arch"], source.get("small_images", False))
    head = nn.Linear(backbone.feature_dim, len(train.class_names))
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    network = nn.Sequential(OrderedDict(backbone=backbone, head=head)).to(
        device, memory_format=torch.channels_last)
    if world_size > 1:
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
    ddp = network
    if world_size > 1:                       # buffers are those of rank 0
        ddp = DistributedDataParallel(network, gradient_as_bucket_view=True)
    torch.manual_seed(args.seed + rank)      # from here on noise (dropout) should differ between ranks

    # ---------------------------------------------------------------- optimizer
    peak_lrs = [lr * args.batch_size / 256 for lr in (args.lr, args.head_lr)]
    optimizer = torch.optim.SGD([dict(params=backbone.parameters()), dict(params=head.parameters())],
                                lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---------------------------------------------------------------- resume
    labels_sha256 = hashlib.sha256(indices.numpy()).hexdigest()
    config = vars(args) | dict(arch=source["arch"], small_images=source.get("small_images", False), data=data,
                               image_size=size, mean=mean, std=std)        # what backbone.json says
    config |= dict(folder_options(args, source), pictures=whole.files, labels_sha256=labels_sha256,
                   backbone_sha256=sha256)
    run = Run(args, "semisup", device, total_steps, batches.steps_per_epoch, config)
    run.track(model=network, optimizer=optimizer, scaler=scaler)
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(run.start, total_steps), worker_init_fn=own_group,
        **loader_workers(args.workers, batches), pin_memory=device.type == "cuda",
        generator=torch.Generator()))        # else it draws from the generator that dropout uses

    def evaluate(part):                      # classes [n, 5] of this process's images; accuracies of all [2]
        if world_size > 1:                   # batch norms of rank 0, as in the checkpoint
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
        mine = part.subset(slice(rank, None, world_size))
        classes = classify(network, eval_batches(mine, source, device, args.batch_size, args.workers))
        return classes, accuracies(classes, mine.readable().labels, world_size).tolist()

    # ---------------------------------------------------------------- train
    if rank == 0:
        write_atomically(run.out / "labels.txt", label_lines(whole, indices).encode(errors="surrogateescape"))
    run.say(f"{len(train):,} of {len(whole):,} images to train on, {len(held):,} held out, {len(test):,} to "
            f"test on; {source['arch']}, {'random weights' if args.random_init else 'pre-trained'}")
    network.train()
    for step in run.steps():                 # saves; ends the run on a signal or a number that is not finite
        epochs_done = step // batches.steps_per_epoch
        factor = cosine(epochs_done, args.epochs, 1, 0)
        if args.milestones is not None:
            factor = milestone_factor(epochs_done, args.milestones)
        for group, peak_lr in zip(optimizer.param_groups, peak_lrs, strict=True):
            group["lr"] = factor * peak_lr

        # ---- one training step: B images of this process, C classes
        images, uniforms, labels = run.next(loader)
        x = views(images, uniforms, device)[0]                                    # [B, 3, h, w]
        with torch.autocast(device.type, dtype=amp_dtype, enabled=args.amp != "off"):
            logits = ddp(x)                                                       # [B, C]
        loss = F.cross_entropy(logits.float(), labels.to(device, non_blocking=device.type == "cuda"))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)           # before the norm, which fp16's scale would multiply
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), math.inf)       # no clipping
        scaler.step(optimizer)
        scaler.update()
        run.watch(loss, norm)

        if run.logging:
            line, entry = "loss {loss:.3f}", dict(loss=run.average(loss=loss)["loss"].item())
            if run.epoch_ends and len(held):
                line += " | held-out top-1 {held_out_top1:.4f}"
                entry["held_out_top1"] = evaluate(held)[1][0]
            run.log(line, **entry)

    # ---------------------------------------------------------------- evaluate
    scored, part = ("held_out", held) if len(held) else ("test", test)   # to choose by, or once at the end
    classes, (top1, top5) = evaluate(part)
    predictions = gather(classes[:, 0], part, world_size)
    num_broken = int((predictions == UNREADABLE).sum())
    if rank == 0:
        write_predictions(run.out / "predictions.csv", part, predictions)
    metrics = dict(checkpoint=args.checkpoint, data=data, random_init=args.random_init, lr=args.lr,
                   head_lr=args.head_lr, num_train=len(train), num_held_out=len(held), num_test=len(test),
                   num_broken=num_broken)
    number = len(part) - num_broken
    metrics |= {f"num_{scored}": number, f"{scored}_top1": top1, f"{scored}_top5": top5}
    run.say(f"{number:,} {scored.replace('_', '-')} images: top-1 {top1:.4f}   top-5 {top5:.4f}")
    run.done(metrics, files=["labels.txt", "predictions.csv"])


if __name__ == "__main__":
    launch(main, get_parser())
