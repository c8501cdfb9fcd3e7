"""Semi-supervised classification: the whole network, fine-tuned on the labels of a few images.

A linear classifier is put on the pre-trained backbone and both are trained, each with its own learning rate,
on a list of labelled images (--labels, SimCLR's for example) or on a balanced fraction drawn by the seed.

    python semisup.py --checkpoint weights/fashion-mnist.pth                     1 %, the CPU or one GPU
    python semisup.py --checkpoint weights/fashion-mnist.pth --random-init       the same network from scratch
    torchrun --nproc-per-node 8 semisup.py --checkpoint FILE --data DATA --labels 1percent.txt --lr 0.04 \\
        --head-lr 0.2

The last is the published protocol for 1 % of ImageNet and ResNet-50: SGD with momentum 0.9 and no decay,
batch 256, cosine by epoch, batch norms in training mode and by process. To choose learning rates, hold
labelled images out (--held-out): then these are scored, and the test set is not looked at.
"""

import argparse
import datetime
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    UserError,
    load_pretrained,
    open_log,
    open_output,
    refuse_misfit,
    run,
    save_checkpoint,
    write_atomically,
)
from data import Batches, Views, eval_batches, input_of, num_workers, own_group
from lincls import accuracies, average, gather, hold_out, labelled, write_predictions
from model import ARCHS, build_backbone
from optim import BadStep, cosine

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)   # wishes to stop: save, exit with 128 + number


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint of a run; with --arch any project's backbone")
    add("--data", help="data set (fashion-mnist, fake, cifar10, cifar100, stl10), folder or list of pictures")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--output-dir", default="runs/semisup", help="folder for all that is written")
    # network
    add("--arch", choices=ARCHS, help="backbone")
    add("--small-images", action="store_true", help="3×3 stem without stride and max-pool, for 32 pixels")
    add("--random-init", action="store_true", help="of the same network: the supervised baseline")
    # labels
    add("--labels", help="list of the labelled images: CLASS_NUMBER.JPEG, or CLASS/FILE LABEL, or indices")
    add("--label-fraction", type=float, help="instead: as many images of each class; 1: all; None: 0.01")
    add("--held-out", type=float, default=0.0, help="share of the training images that chooses")
    # optimisation
    add("--min-scale", type=float, default=0.08, help="least share of the area in a random crop")
    add("--epochs", type=int, default=20, help="passes over the data")
    add("--batch-size", type=int, default=256, help="images in the GLOBAL batch")
    add("--lr", type=float, default=0.04, help="peak learning rate at batch 256, scaled linearly")
    add("--head-lr", type=float, default=0.2, help="the same of the new classifier")
    # run
    add("--seed", type=int, default=0, help="of the initial weights, the order and the views")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    add("--amp", default="off", choices=("auto", "off", "bf16", "fp16"), help="auto: bf16 on CUDA, else off")
    add("--workers", type=int, default=-1, help="processes that read ahead; -1: one a core for files, else 0")
    add("--resume", default="auto", help="auto: from the folder's last checkpoint; never; or a file")
    add("--overwrite", action="store_true", help="start anew in a used --output-dir")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--print-every", type=int, default=50, help="steps between lines of progress, 1 to 50")
    add("--timeout", type=float, default=600, help="seconds that a process waits for its peers")
    add("--local-rank", type=int, help=argparse.SUPPRESS)       # old launchers pass it; LOCAL_RANK is read
    return parser


def check(args, name, parts, world_size):
    """Refuses what cannot work, by name, before anything is written. parts: train, held out, test."""
    train, held, test = parts
    least = dict(epochs=1, batch_size=1, save_every=1, print_every=1, workers=-1, timeout=1, seed=0, lr=0,
                 head_lr=0)
    for flag, low in least.items():
        if not low <= getattr(args, flag) < math.inf:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {low}")
    if args.print_every > 50:
        raise UserError(f"--print-every {args.print_every}: at most 50; a wish to stop is heard as often")
    if not 0 < args.min_scale <= 1:
        raise UserError(f"--min-scale {args.min_scale}: must be above 0 and at most 1")
    if args.held_out > 0 and not len(held):
        raise UserError(f"--held-out {args.held_out}: holds out no image of {len(train)} labelled ones")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: not divisible by the {world_size} processes")
    if args.batch_size > len(train):
        raise UserError(f"--batch-size {args.batch_size}: --data {name} has only {len(train)} images to "
                        "train on")
    if world_size > min(len(test), len(held) or len(test)):
        raise UserError(f"--data {name}: has fewer images to evaluate than there are processes")


# ---------------------------------------------------------------- which images have labels
def key_of(dataset, i):
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
        raise UserError(f"--labels {path}: cannot be read ({error.strerror})") from None
    names, place = dataset.class_names, {}
    for i in range(len(dataset)):
        place.setdefault(key_of(dataset, i), []).append(i)
    indices = {}
    for number, line in enumerate(lines, 1):
        where, words = f"--labels {path}: line {number}", line.strip().rsplit(None, 1)
        if not words:
            continue
        known = line.strip() in place or len(words) == 1        # a file's name may have spaces in it
        key, label = (line.strip(), None) if known else words
        if dataset.images is None and "/" not in key:
            key = f"{key.rsplit('_', 1)[0]}/{key}"
        folder = key.rsplit("/", 1)[0]
        if label is not None and label not in names:            # a number stands for a name
            label = names[int(label)] if label.isdecimal() and int(label) < len(names) else label
        for name in (folder if dataset.images is None else None, label):
            if name is not None and name not in names:
                raise UserError(f"{where}: unknown class '{name}'")
        if key not in place:
            raise UserError(f"{where}: '{key}' is not among the training images")
        if len(place[key]) > 1:
            raise UserError(f"{where}: '{key}' is the name of {len(place[key])} training images")
        i, = place[key]
        if i in indices:
            raise UserError(f"{where}: '{key}' is there already, in line {indices[i]}")
        own = names[dataset.labels[i]]
        if label not in (None, own):
            raise UserError(f"{where}: '{key}' is of class '{own}', not '{label}'")
        indices[i] = number
    if not indices:
        raise UserError(f"--labels {path}: an empty list")
    indices = torch.tensor(list(indices))
    refuse_empty_classes(dataset, indices, f"--labels {path}")
    return indices


def refuse_empty_classes(dataset, indices, where):
    counts = torch.bincount(dataset.labels[indices], minlength=len(dataset.class_names))
    if 0 in counts:
        raise UserError(f"{where}: no image of class '{dataset.class_names[int(counts.argmin())]}', as of "
                        f"{int((counts == 0).sum())} of {len(counts)} classes")


def draw_labels(dataset, fraction, seed):
    """Indices of round(fraction * N) images, in order: equally many of each class (or one more), by the seed.

    Of a class that has fewer, all; fraction 1 is all images. Raises UserError if a class would have none.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--label-fraction {fraction}: must be above 0 and at most 1")
    if fraction == 1:
        return torch.arange(len(dataset))
    rng, C = np.random.default_rng([seed, 7]), len(dataset.class_names)
    each, more = divmod(round(fraction * len(dataset)), C)
    lucky, shuffled = set(rng.permutation(C)[:more].tolist()), rng.permutation(len(dataset))
    labels = dataset.labels.numpy()[shuffled]
    chosen = [shuffled[labels == c][:each + (c in lucky)] for c in range(C)]
    indices = torch.from_numpy(np.sort(np.concatenate(chosen)))
    refuse_empty_classes(dataset, indices, f"--label-fraction {fraction}")
    return indices


def label_lines(dataset, indices):
    """The text of a list that read_labels maps to the same indices."""
    lines = []
    for i in indices.tolist():
        label = int(dataset.labels[i])
        name = dataset.class_names[label]
        lines.append(f"{key_of(dataset, i)} {label if len(name.split()) != 1 else name}\n")
    return "".join(lines)


# ---------------------------------------------------------------- evaluation
@torch.no_grad()
def classify(network, batches):
    """The five likeliest classes [N, 1, 5] of images in batches, likeliest first; in evaluation mode."""
    network.eval()
    classes = [logits.topk(min(5, logits.shape[-1])).indices for logits in map(network, batches)]
    network.train()
    return torch.cat(classes)[:, None]


def main(args):
    # ---------------------------------------------------------------- ddp
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    if device.type not in (best, "cpu"):
        raise UserError(f"--device {device}: there is none here; --device auto would take {best}")
    if device.type == "cuda":                                   # this path was not run on a GPU here
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    amp = ("bf16" if device.type == "cuda" else "off") if args.amp == "auto" else args.amp
    amp_dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    # ---------------------------------------------------------------- data
    backbone, config = load_pretrained(args.checkpoint, args.arch, args.small_images)
    name, (size, mean, std) = args.data or config["data"], input_of(config)
    if name is None:
        raise UserError(f"--data: {args.checkpoint} does not say on what it was trained; name the data")
    if args.labels and args.label_fraction:
        raise UserError("--labels and --label-fraction: choose one of the two")
    whole, test = labelled(name, config.get("seed", 0), args.data_dir)
    indices = (read_labels(args.labels, whole) if args.labels else
               draw_labels(whole, 0.01 if args.label_fraction is None else args.label_fraction, args.seed))
    few = whole.subset(indices)
    train, held = map(few.subset, hold_out(few.labels, args.held_out, args.seed))
    check(args, name, (train, held, test), world_size)
    num_classes = len(train.class_names)
    views = Views([(size, dict(scale=(args.min_scale, 1)))], mean, std)
    batches = Batches(train, args.batch_size, views, args.seed, rank, world_size)
    steps_per_epoch = batches.steps_per_epoch
    total_steps = args.epochs * steps_per_epoch

    # ---------------------------------------------------------------- output folder, last checkpoint
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(seconds=args.timeout))
    out = Path(args.output_dir)
    lock, state = open_output(args, "semisup") if rank == 0 else (None, None)
    if world_size > 1:                                          # all go on from what rank 0 read
        box = [state]
        dist.broadcast_object_list(box)
        state = box[0]

    # ---------------------------------------------------------------- model
    # The backbone was built before there was a process group: batch norms stay by process, as published.
    torch.manual_seed(args.seed)
    if args.random_init:
        backbone = build_backbone(config["arch"], config.get("small_images", args.small_images))
    network = nn.Sequential(OrderedDict(backbone=backbone, head=nn.Linear(backbone.feature_dim, num_classes)))
    nn.init.normal_(network.head.weight, std=0.01)
    nn.init.zeros_(network.head.bias)
    network.to(device, memory_format=torch.channels_last)

    # ---------------------------------------------------------------- optimizer
    peaks = [lr * args.batch_size / 256 for lr in (args.lr, args.head_lr)]
    optimizer = torch.optim.SGD([dict(params=network.backbone.parameters()),
                                 dict(params=network.head.parameters())], lr=0.0, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    # ---------------------------------------------------------------- resume
    start_step = 0
    if state is not None:
        with refuse_misfit(args):
            if state.get("stage") != "semisup" or not torch.equal(state["labelled"], indices):
                raise UserError(f"--resume {args.resume}: the checkpoint is of another stage or other labels")
            start_step = int(state["step"])
            network.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            whole.load_state_dict(state.get("pictures"))
    ddp = DistributedDataParallel(network) if world_size > 1 else network   # buffers are those of rank 0
    if start_step == total_steps and (args.resume != "auto" or (out / "metrics.json").exists()):
        if rank == 0:
            print(f"{out}: this run is finished; --overwrite starts it anew")
        return finish()
    if rank == 0:
        log = open_log(out / "log.jsonl")
        write_atomically(out / "labels.txt", label_lines(whole, indices).encode(errors="surrogateescape"))
        command = shlex.join(["python", *sys.argv])
        resolved = {**vars(args), "data": name, "device": str(device), "amp": amp, "world_size": world_size,
                    "total_steps": total_steps, "peak_lrs": peaks}
        write(log, dict(resumed_from=start_step) if state else dict(command=command, config=resolved))
        print(f"{command}\n{json.dumps(resolved)}\n{len(train):,} of {len(whole):,} images to train on, "
              f"{len(held):,} held out, {len(test):,} to test on; {config['arch']}, "
              f"{'random weights' if args.random_init else 'pre-trained'}\n{total_steps} steps of "
              f"{args.batch_size}; lr at batch 256 {args.lr:g}, head {args.head_lr:g}; scaled "
              f"{peaks[0]:g}, {peaks[1]:g}; {world_size} process(es) on {device}, amp {amp}"
              + (f"; resumed from step {start_step}" if state else ""), flush=True)

    def evaluate(part):                                         # each image once, whatever the processes
        if world_size > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
        share = part.subset(slice(rank, None, world_size))
        classes = classify(network, eval_batches(share, config, device, args.batch_size, args.workers))
        top1, top5 = accuracies(classes, share.readable().labels, world_size)
        return classes, top1.item(), top5.item()

    # ---------------------------------------------------------------- train
    caught = []
    for signum in SIGNALS:
        signal.signal(signum, lambda signum, frame: caught.append(signum))
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(start_step, total_steps),
        num_workers=num_workers(args.workers, train, world_size), pin_memory=device.type == "cuda",
        worker_init_fn=own_group))
    bad = BadStep(device, scaler)
    since, last_step = time.time(), start_step
    network.train()
    for step in range(start_step, total_steps):
        epoch, place = divmod(step + 1, steps_per_epoch)
        logging = (step + 1) % args.print_every == 0 or place == 0
        saving = (step + 1) % args.save_every == 0 or step + 1 == total_steps
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = cosine(step // steps_per_epoch, args.epochs, peak, 0)
        images, uniforms = next(loader)

        # ---- one training step: B images of this process
        x, labels = views(images, uniforms, device)[0], train.labels[batches.indices(step)].to(device)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp != "off"):
            logits = ddp(x)                                                               # [B, C]
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters()])
        scaler.step(optimizer)
        scaler.update()
        bad.watch(step + 1, optimizer.param_groups[0]["lr"], loss[None], norm,
                  network.parameters() if logging or saving else ())
        if not (logging or saving):
            continue

        # ---- what all processes read alike
        whole.agree(device)
        stop = torch.tensor([float(signum in caught) for signum in SIGNALS], device=device)
        loss, bad_anywhere = loss.detach().clone(), (bad.step > 0).float()
        if world_size > 1:
            average([loss, bad_anywhere, stop])
        if bad_anywhere > 0:
            if rank == 0:
                write(log, dict(step=int(bad.step), status=f"non-finite {bad.what}"))
                print(f"semisup.py: error: {bad.message(('loss',), amp, out)}", file=sys.stderr)
            return finish(3)
        stopped = next((signum for signum, wish in zip(SIGNALS, stop, strict=True) if wish > 0), None)
        if logging:
            images_per_s = (step + 1 - last_step) * args.batch_size / (time.time() - since)
            entry = dict(epoch=step // steps_per_epoch + 1, step=step + 1, loss=loss.item(),
                         images_per_s=round(images_per_s, 1), **whole.tally())
            eta = (total_steps - step - 1) * args.batch_size / images_per_s
            line = (f"epoch {entry['epoch']} step {step + 1}/{total_steps} | loss {entry['loss']:.3f} | "
                    f"{images_per_s:.0f} images/s, ETA {eta // 60:.0f}:{eta % 60:02.0f}")
            if place == 0 and len(held):
                entry["held_out_top1"] = evaluate(held)[1]
                line += f" | held-out top-1 {entry['held_out_top1']:.4f}"
            if rank == 0:
                write(log, entry)
                print(line, flush=True)
            since, last_step = time.time(), step + 1
        if (saving or stopped) and rank == 0:
            write_atomically(out / "backbone.pth", backbone.state_dict())
            save_checkpoint(out / "checkpoint.pth", dict(
                model=network.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                step=step + 1, epoch=epoch, stage="semisup", labelled=indices,
                pictures=whole.state_dict(), config=vars(args)))
        if stopped:
            if rank == 0:
                write(log, dict(step=step + 1, status=f"stopped by {stopped.name}, saved"))
                print(f"stopped by {stopped.name} after step {step + 1}, saved; the same command goes on")
            return finish(128 + stopped)

    # ---------------------------------------------------------------- eval
    # with images held out, to choose by, the test set is left alone
    scored, part = ("held_out", held) if len(held) else ("test", test)
    classes, top1, top5 = evaluate(part)
    predictions = gather(classes, part, world_size)[:, 0, 0]
    whole.agree(device)
    read = [part.readable() for part in (train, held, test)]
    num_broken = sum(map(len, (train, held, test))) - sum(map(len, read))

    # ---------------------------------------------------------------- save
    if rank == 0:
        broken = f"; {num_broken} broken pictures left out" if num_broken else ""
        print(f"{len(part.readable()):,} {scored.replace('_', '-')} images, after the last epoch: top-1 "
              f"{top1:.4f}   top-5 {top5:.4f}{broken}")
        write_predictions(out / "predictions.csv", part.readable(), predictions.tolist())
        metrics = dict(checkpoint=args.checkpoint, data=name, random_init=args.random_init, lr=args.lr,
                       head_lr=args.head_lr, num_train=len(read[0]), num_held_out=len(read[1]),
                       num_test=len(read[2]), num_broken=num_broken)
        metrics |= {f"{scored}_top1": top1, f"{scored}_top5": top5}
        write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
        write(log, dict(step=total_steps, status="done"))
        print(f"done: checkpoint.pth, backbone.pth, labels.txt, predictions.csv, log.jsonl, metrics.json in "
              f"{out}")
    return finish()


def finish(code=0):
    """Leaves the process group together, so that no process takes another's end for a fault."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code


def write(log, entry):
    log.write(json.dumps(entry) + "\n")
    log.flush()


if __name__ == "__main__":
    run(main, get_parser())
