"""TWIST, stage 2, self-labelling: a pre-trained network goes on with its own confident predictions as labels.

    python selflabel.py --checkpoint weights/fashion-mnist.pth                    on whatever there is
    torchrun --nproc-per-node 8 selflabel.py --checkpoint FILE @recipes/FILE      8 processes of one machine

Of each image the global view that the network is more certain of labels all other views, which are harder
crops than before. Only the more certain images of each batch take part. Reads like pretrain.py: what differs
is where the network comes from, the objective, and what a line of progress tells.
"""

import argparse
import datetime
import json
import math
import os
import resource
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    UserError,
    load_checkpoint,
    open_log,
    open_output,
    read_log,
    refuse_classless,
    refuse_misfit,
    run,
    save_checkpoint,
    write_atomically,
)
from data import VIEWS, Batches, build_dataset, build_views, input_of, num_workers, own_group
from loss import anchors, self_label_loss
from model import build_twist, bunch_layout
from optim import LARS, BadStep, cosine, param_groups, warmup_cosine

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)   # wishes to stop: save, exit with 128 + number


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint of a run; with --arch any project's backbone")
    add("--data", help="data set (fashion-mnist, fake, cifar10, cifar100, stl10), folder or list of pictures")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--output-dir", default="runs/selflabel", help="folder for all that is written")
    # network: that of the checkpoint
    add("--bunch-size", type=int, default=0, help="images that share one NBS; 0: the global batch")
    add("--ema", type=float, default=0.0, help="momentum of a momentum encoder, to 1 by a cosine; 0: none")
    add("--export", default="teacher", choices=("teacher", "student"), help="whose backbone is backbone.pth")
    # loss
    add("--quantile", type=float, default=0.5, help="share of the batch that gives labels, at the start")
    add("--quantile-end", type=float, default=0.6, help="and at the end, by a cosine")
    # views
    add("--views", default="auto", choices=("auto", *VIEWS),
        help="augmentation recipe; auto: fashion-mnist for it, else the one published for the stage")
    add("--image-size", type=int, default=0, help="pixels of a global crop; 0: the data's own, 224 of files")
    add("--local-size", type=int, default=0, help="pixels of a local crop; 0: 3/7 of the global")
    add("--num-local", type=int, default=0, help="local crops beside the global ones")
    # optimisation
    add("--optimizer", default="adamw", choices=("lars", "adamw", "sgd"), help="update rule")
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--batch-size", type=int, default=128, help="images in the GLOBAL batch")
    add("--lr", type=float, default=4e-4, help="peak learning rate at batch 256, scaled linearly")
    add("--warmup-epochs", type=float, default=0.1, help="epochs of linear warm-up")
    add("--weight-decay", type=float, default=1e-4, help="of matrices and kernels, at the start")
    add("--weight-decay-end", type=float, default=None, help="at the end, by a cosine; None: constant")
    add("--momentum", type=float, default=0.9, help="of LARS and SGD, first beta of AdamW")
    add("--beta2", type=float, default=0.99, help="second beta of AdamW")
    add("--clip-norm", type=float, default=0.0, help="greatest norm of the gradient; 0: no clipping")
    # run
    add("--seed", type=int, default=0, help="of the initial weights, the order and the views")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="auto: bf16 on CUDA, else off")
    add("--workers", type=int, default=-1, help="processes that read ahead; -1: one a core for files, else 0")
    add("--resume", default="auto", help="auto: from the folder's last checkpoint; never; or a file")
    add("--overwrite", action="store_true", help="start anew in a used --output-dir")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--print-every", type=int, default=50, help="steps between lines of progress, 1 to 50")
    add("--stop-on-collapse", action="store_true", help="end with code 4 at the second line that says so")
    add("--timeout", type=float, default=600, help="seconds that a process waits for its peers")
    add("--local-rank", type=int, help=argparse.SUPPRESS)       # old launchers pass it; LOCAL_RANK is read
    return parser


def check(args, dataset, world_size):
    """Refuses what cannot work, by name, before anything is written."""
    least = dict(epochs=1, batch_size=2, save_every=1, print_every=1, workers=-1, num_local=0, bunch_size=0,
                 image_size=0, local_size=0, lr=0, quantile=0, quantile_end=0, ema=0, warmup_epochs=0,
                 weight_decay=0, momentum=0, clip_norm=0, timeout=1, seed=0, beta2=0)
    for name, low in least.items():
        if not low <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    for name in ("quantile", "quantile_end", "ema", "momentum", "beta2"):
        if getattr(args, name) >= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be below 1")
    if args.print_every > 50:
        raise UserError(f"--print-every {args.print_every}: at most 50; a wish to stop is heard as often")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: not divisible by the {world_size} processes")
    if args.batch_size > len(dataset):
        raise UserError(f"--batch-size {args.batch_size}: --data has only {len(dataset)} images")
    try:
        bunch_layout(args.bunch_size or None, args.batch_size // world_size, world_size)
    except ValueError as error:
        raise UserError(f"--bunch-size: {error}") from None


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
    source = load_checkpoint(args.checkpoint)                   # of the first stage
    refuse_classless(source["config"], args.checkpoint)
    config = {**source["config"], **vars(args)}                 # shape and input of the network stay
    config["data"] = args.data or source["config"]["data"]
    config["image_size"] = args.image_size or source["config"].get("image_size")
    try:
        build_twist(config).load_state_dict(source["model"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{args.checkpoint}: not a network of this project ({reason})") from None
    dataset = build_dataset(config["data"], "pretrain", args.seed, args.data_dir)
    check(args, dataset, world_size)
    size, mean, std = input_of(config)
    recipe = args.views
    if recipe == "auto":
        of_pictures = "selflabel" if args.num_local > 0 else "barlow"
        recipe = "fashion-mnist" if config["data"] == "fashion-mnist" else of_pictures
    views = build_views(recipe, mean, std, size, args.local_size or max(1, size * 3 // 7), args.num_local,
                        arch=config["arch"])
    batches = Batches(dataset, args.batch_size, views, args.seed, rank, world_size)
    steps_per_epoch = batches.steps_per_epoch
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256

    # ---------------------------------------------------------------- output folder, last checkpoint
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(seconds=args.timeout))
    out = Path(args.output_dir)
    lock, state = open_output(argparse.Namespace(**config), "selflabel") if rank == 0 else (None, None)
    if world_size > 1:                                          # all go on from what rank 0 read
        box = [state]
        dist.broadcast_object_list(box)
        state = box[0]

    # ---------------------------------------------------------------- model
    model = build_twist(config, config.get("drop_path", 0.0)).to(device, memory_format=torch.channels_last)
    model.load_state_dict(source["model"])
    ddp = DistributedDataParallel(model) if world_size > 1 else model
    teacher = None
    if args.ema > 0:             # the first stage's, or the network itself to begin with
        teacher = build_twist(config).to(device, memory_format=torch.channels_last)
        teacher.load_state_dict(source.get("teacher") or source["model"])
        teacher.requires_grad_(False)
    exported = teacher if teacher is not None and args.export == "teacher" else model
    torch.manual_seed(args.seed + rank)                         # noise inside the network: by process

    # ---------------------------------------------------------------- optimizer
    groups = param_groups(model, args.weight_decay)
    if args.optimizer == "lars":
        optimizer = LARS(groups, lr=0.0, momentum=args.momentum)
    elif args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(args.momentum, args.beta2))
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=args.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    # ---------------------------------------------------------------- resume
    start_step = left_out = 0
    if state is not None:
        with refuse_misfit(args):
            start_step, left_out = int(state["step"]), int(state["left_out"])
            model.load_state_dict(state["model"])
            if teacher is not None:
                teacher.load_state_dict(state["teacher"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            dataset.load_state_dict(state.get("pictures"))
            if len(state["rng"]) == world_size:
                set_rng_state(state["rng"][rank], device)
    if start_step == total_steps and (args.resume != "auto" or (out / "metrics.json").exists()):
        if rank == 0:
            print(f"{out}: this run is finished; --overwrite starts it anew")
        return finish()
    if rank == 0:
        log = open_log(out / "log.jsonl")
        resolved = {**config, "device": str(device), "amp": amp, "world_size": world_size,
                    "steps_per_epoch": steps_per_epoch, "total_steps": total_steps, "peak_lr": peak_lr}
        command = shlex.join(["python", *sys.argv])
        write(log, dict(resumed_from=start_step) if state else dict(command=command, config=resolved))
        print(f"{command}\n{json.dumps(resolved)}\n{len(dataset):,} images; {total_steps} steps of "
              f"{args.batch_size} × {len(views)} views; lr {args.lr:g} at batch 256 is {peak_lr:g}; "
              f"{world_size} process(es) on "
              f"{device}, amp {amp}" + (f"; resumed from step {start_step}" if state else ""), flush=True)

    # ---------------------------------------------------------------- train
    caught = []
    for signum in SIGNALS:
        signal.signal(signum, lambda signum, frame: caught.append(signum))
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(start_step, total_steps),
        num_workers=num_workers(args.workers, dataset, world_size), pin_memory=device.type == "cuda",
        worker_init_fn=own_group, generator=torch.Generator()))     # else it takes from the network's noise
    bad, collapsed = BadStep(device, scaler), 0
    since, waited, last_step = time.time(), 0.0, start_step
    model.train()
    for step in range(start_step, total_steps):
        epoch, place = divmod(step + 1, steps_per_epoch)
        logging = (step + 1) % args.print_every == 0 or place == 0
        saving = (step + 1) % args.save_every == 0 or step + 1 == total_steps
        lr = warmup_cosine(step, total_steps, warmup_steps, peak_lr, 0.001 * peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if args.weight_decay_end is not None:
            optimizer.param_groups[0]["weight_decay"] = cosine(step, total_steps, args.weight_decay,
                                                               args.weight_decay_end)
        quantile = cosine(step, total_steps, args.quantile, args.quantile_end)
        before = time.time()
        images, uniforms = next(loader)
        waited += time.time() - before

        # ---- one training step: B images of this process, V views, C classes
        x = views(images, uniforms, device)                                       # V × [B, 3, h, w]
        stop = torch.tensor([float(signum in caught) for signum in SIGNALS], device=device)
        teacher_logits = None
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp != "off"):
            logits = ddp(x)                                                       # [V, B, C]
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(x[:2])                               # [2, B, C]
        loss = self_label_loss(logits, quantile, teacher_logits, riders=stop)
        optimizer.zero_grad()
        scaler.scale(loss.total).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)
        if loss.fraction > 0:                                   # known to all processes alike
            scaler.step(optimizer)
            scaler.update()
            if teacher is not None:
                keep = cosine(step, total_steps, args.ema, 1.0)
                with torch.no_grad():
                    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - keep)
        else:
            left_out += 1
        bad.watch(step + 1, lr, loss, norm, model.parameters() if logging or saving else ())
        if not (logging or saving):
            continue

        # ---- what all processes are to read alike: the loss is each one's own until here
        dataset.agree(device)
        total, agreement, classes, bad_anywhere = joined(loss, logits, teacher_logits, bad.step)
        if bad_anywhere:
            if rank == 0:
                write(log, dict(step=int(bad.step), status=f"non-finite {bad.what}"))
                print(f"selflabel.py: error: {bad.message(loss._fields, amp, out)}", file=sys.stderr)
            return finish(3)
        stopped = next((signum for signum, wish in zip(SIGNALS, stop, strict=True) if wish > 0), None)
        if logging:
            seconds = time.time() - since
            images_per_s = (step + 1 - last_step) * args.batch_size / seconds
            entry = dict(epoch=step // steps_per_epoch + 1, step=step + 1, loss=total,
                         fraction=loss.fraction.item(), threshold=loss.threshold.item(), quantile=quantile,
                         classes=classes, agreement=agreement, left_out=left_out, lr=lr,
                         images_per_s=round(images_per_s, 1), waiting=round(waited / seconds, 4),
                         memory_mib=memory_mib(device), **dataset.tally())
            if classes == 1 and entry["fraction"] * args.batch_size >= 10:
                entry["collapsed"] = "one-class"
            elif entry["threshold"] < 1.02 / config["num_classes"]:
                entry["collapsed"] = "uniform"
            if rank == 0:
                write(log, entry)
                eta = (total_steps - step - 1) * args.batch_size / images_per_s
                print(progress_line(entry, total_steps, config["num_classes"], eta), flush=True)
            since, waited, last_step = time.time(), 0.0, step + 1
            collapsed = collapsed + 1 if "collapsed" in entry else 0
            if args.stop_on_collapse and collapsed > 1 and step >= warmup_steps:
                if rank == 0:
                    write(log, dict(step=step + 1, status=f"collapsed: {entry['collapsed']}"))
                    print(f"selflabel.py: error: collapsed ({entry['collapsed']}) at step {step + 1} and in "
                          f"the line before; the last checkpoint in {out} is from before", file=sys.stderr)
                return finish(4)
        if saving or stopped:
            rng = [rng_state(device)] * world_size
            if world_size > 1:
                dist.all_gather_object(rng, rng_state(device))
            if rank == 0:
                averaged = {} if teacher is None else dict(teacher=teacher.state_dict())
                write_atomically(out / "backbone.pth", exported.backbone.state_dict())
                save_checkpoint(out / "checkpoint.pth", dict(
                    model=model.state_dict(), **averaged, optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(), step=step + 1, epoch=epoch, left_out=left_out,
                    stage="selflabel", rng=rng, pictures=dataset.state_dict(), config=config))
        if stopped:
            if rank == 0:
                write(log, dict(step=step + 1, status=f"stopped by {stopped.name}, saved"))
                print(f"stopped by {stopped.name} after step {step + 1}, saved; the same command goes on")
            return finish(128 + stopped)

    # ---------------------------------------------------------------- save
    if rank == 0:
        metrics = read_log(out / "log.jsonl")[total_steps]
        write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
        write(log, dict(step=total_steps, status="done"))
        print(f"done: checkpoint.pth, backbone.pth, log.jsonl, metrics.json in {out}")
    return finish()


def finish(code=0):
    """Leaves the process group together, so that no process takes another's end for a fault."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code


def joined(loss, logits, teacher_logits, bad_step):
    """Of the global batch: loss, share of images whose two global views agree, classes among the labels, and
    whether any process has had a bad step."""
    _, label, confidence = anchors(logits[:2] if teacher_logits is None else teacher_logits[:2])
    chosen = F.one_hot(label[confidence > loss.threshold], logits.shape[-1]).sum(0)
    agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
    three = torch.stack([loss.total.detach().float(), agreement, (bad_step > 0).float()])
    mine = torch.cat([three, chosen.float()])
    everyones = [mine]
    if dist.is_initialized():
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, mine)
    everyones = torch.stack(everyones)                                            # [W, 3 + C]
    total, agreement = everyones[:, :2].mean(0).tolist()
    return total, agreement, int((everyones[:, 3:].sum(0) > 0).sum()), bool((everyones[:, 2] > 0).any())


def rng_state(device):
    """State of the generators that a network's noise comes from, a list of tensors."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_state(states, device):
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def write(log, entry):
    log.write(json.dumps(entry) + "\n")
    log.flush()


def progress_line(entry, total_steps, num_classes, eta):
    line = ("epoch {epoch} step {step}/{total} | loss {loss:.3f} of {fraction:.0%} of the images, above "
            "{threshold:.3f}, in {classes} of {most} classes | views agree {agreement:.0%}, steps left out "
            "{left_out} | lr {lr:.1e} | {images_per_s:.0f} images/s, waiting {waiting:.0%}, "
            "{memory_mib} MiB, ETA {minutes:.0f}:{seconds:02.0f}")
    line = line.format(**entry, total=total_steps, most=num_classes, minutes=eta // 60, seconds=eta % 60)
    return line + (f" | collapsed: {entry['collapsed']}" if "collapsed" in entry else "")


def memory_mib(device):
    """Most memory so far: of the CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


if __name__ == "__main__":
    run(main, get_parser())
