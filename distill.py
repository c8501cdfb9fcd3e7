"""SEED: a small network learns, without labels, what a large pre-trained one finds alike.

    python distill.py --teacher weights/fashion-mnist.pth --arch resnet8          on whatever there is
    torchrun --nproc-per-node 8 distill.py --teacher FILE --teacher-arch resnet50 @recipes/FILE

Both networks see the same view of an image. The teacher, which is frozen, says how similar the image is to
those in a queue of its own earlier embeddings; the student learns to say the same, by cross-entropy. With
--num-local small crops take part, with a queue of their own. Reads like selflabel.py: what differs is where
the networks come from, the objective with its queue, and what a line of progress tells.
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
    load_teacher,
    open_log,
    open_output,
    read_log,
    refuse_misfit,
    run,
    save_checkpoint,
    write_atomically,
)
from data import VIEWS, Batches, build_dataset, build_views, input_of, num_workers, own_group
from lincls import fingerprint
from loss import seed_loss, seed_target
from model import ARCHS, Embedder, build_student
from optim import LARS, BadStep, param_groups, seed_lr, warmup_cosine

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)   # wishes to stop: save, exit with 128 + number


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="checkpoint of a run; with --teacher-arch any project's network")
    add("--teacher-arch", choices=ARCHS, help="the teacher's backbone, if its file is not a run's checkpoint")
    add("--teacher-head", default="auto", help="its projection head, which makes the embedding: projection_"
        "heads.projection_head (TWIST), projection_head (SwAV), projector (Barlow Twins), fc (MoCo, SimCLR); "
        "none: the features are the embedding; auto: the first of these that is there")
    add("--data", help="data set (fashion-mnist, fake, cifar10, cifar100, stl10), folder or list of pictures")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--output-dir", default="runs/distill", help="folder for all that is written")
    # network
    add("--arch", default="resnet8", choices=ARCHS, help="backbone")
    add("--small-images", action="store_true", help="3×3 stem without stride and max-pool, for 32 pixels")
    # loss
    add("--queue-size", type=int, default=4096, help="K, the teacher's latest embeddings to compare with")
    add("--student-temperature", type=float, default=0.2, help="T of the student's similarities")
    add("--teacher-temperature", type=float, default=0.01,
        help="T of the teacher's; the released code has 0.0001, which makes the target one-hot")
    # views
    add("--views", default="auto", choices=("auto", *VIEWS),
        help="augmentation recipe; auto: fashion-mnist for it, else the one published for the stage")
    add("--image-size", type=int, default=0, help="pixels of a global crop; 0: the data's own, 224 of files")
    add("--local-size", type=int, default=0, help="pixels of a local crop; 0: 3/7 of the global")
    add("--num-local", type=int, default=0, help="local crops beside the global ones")
    add("--mean", type=float, nargs="+", help="of pixels 0..1, one or three; None: the data's own")
    add("--std", type=float, nargs="+", help="of pixels 0..1, one or three; None: the data's own")
    # optimisation
    add("--optimizer", default="sgd", choices=("lars", "adamw", "sgd"), help="update rule")
    add("--epochs", type=int, default=4, help="passes over the data")
    add("--batch-size", type=int, default=128, help="images in the GLOBAL batch")
    add("--lr", type=float, default=0.03, help="peak learning rate at batch 256, scaled linearly")
    add("--schedule", default="steps", choices=("steps", "epochs"), help="steps: from 0 linearly, then a "
        "cosine, by steps; epochs: SEED's, by epochs, from the unscaled --lr linearly")
    add("--milestones", type=int, nargs="+",
        help="epochs at which the learning rate falls to a tenth; None: cosine")
    add("--warmup-epochs", type=float, default=0.1, help="epochs of linear warm-up")
    add("--weight-decay", type=float, default=1e-4, help="of matrices and kernels, at the start")
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
    least = dict(epochs=1, batch_size=2, save_every=1, print_every=1, workers=-1, num_local=0, queue_size=1,
                 image_size=0, local_size=0, lr=0, student_temperature=1e-6, teacher_temperature=1e-6,
                 warmup_epochs=0, weight_decay=0, momentum=0, clip_norm=0, timeout=1, seed=0,
                 beta2=0)
    for name, low in least.items():
        if not low <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    for name, values in (("mean", args.mean), ("std", args.std)):
        if values and (len(values) not in (1, 3) or not all(0 <= v < math.inf for v in values) or
                       (name == "std" and 0 in values)):
            raise UserError(f"--{name} {' '.join(map(str, values))}: one or three numbers, for 0 to 1 pixels")
    for name in ("momentum", "beta2"):
        if getattr(args, name) >= 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be below 1")
    if args.small_images and not args.arch.startswith("resnet"):
        raise UserError(f"--small-images: {args.arch} has no ResNet's stem to change")
    if args.print_every > 50:
        raise UserError(f"--print-every {args.print_every}: at most 50; a wish to stop is heard as often")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: not divisible by the {world_size} processes")
    if args.batch_size > len(dataset):
        raise UserError(f"--batch-size {args.batch_size}: --data has only {len(dataset)} images")
    if args.queue_size % args.batch_size:
        raise UserError(f"--queue-size {args.queue_size}: not divisible by --batch-size {args.batch_size}, "
                        f"of which it takes whole ones; {-(-args.queue_size // args.batch_size)} of them are "
                        f"{-(-args.queue_size // args.batch_size) * args.batch_size}")
    if args.milestones and args.schedule == "steps":
        raise UserError("--milestones: are epochs, and go with --schedule epochs only")


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
    torch.manual_seed(args.seed)

    # ---------------------------------------------------------------- data
    backbone, head_name, head, source = load_teacher(args.teacher, args.teacher_arch, args.teacher_head)
    inputs = dict(data=args.data or source["data"], image_size=args.image_size or source.get("image_size"),
                  mean=args.mean or source.get("mean"), std=args.std or source.get("std"))
    if inputs["data"] is None:
        raise UserError(f"--data: {args.teacher} does not say on what it was trained; name the data")
    dataset = build_dataset(inputs["data"], "pretrain", args.seed, args.data_dir)
    check(args, dataset, world_size)
    size, mean, std = input_of(inputs)                          # the teacher's own, unless told otherwise
    recipe = args.views
    if recipe == "auto":
        of_pictures = "seed" if args.num_local > 0 else "moco"
        recipe = "fashion-mnist" if inputs["data"] == "fashion-mnist" else of_pictures
    views = build_views(recipe, mean, std, size, args.local_size or max(1, size * 3 // 7), args.num_local,
                        num_global=1, arch=max(args.arch, source["arch"]))       # a ViT's, if one is
    batches = Batches(dataset, args.batch_size, views, args.seed, rank, world_size)
    steps_per_epoch = batches.steps_per_epoch
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256
    teacher = Embedder(backbone, head).eval().requires_grad_(False)
    with torch.no_grad():
        embedding_dim = teacher([torch.zeros(1, 3, size, size)]).shape[-1]
    config = {**vars(args), **inputs, "loss": "seed", "embedding_dim": embedding_dim}

    # ---------------------------------------------------------------- output folder, last checkpoint
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(seconds=args.timeout))
    out = Path(args.output_dir)
    lock, state = open_output(argparse.Namespace(**config), "distill") if rank == 0 else (None, None)
    if world_size > 1:                                          # all go on from what rank 0 read
        box = [state]
        dist.broadcast_object_list(box)
        state = box[0]

    # ---------------------------------------------------------------- model
    frozen = fingerprint(teacher)
    teacher.to(device, memory_format=torch.channels_last)
    model = build_student(config).to(device, memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model) if world_size > 1 else model
    queues = torch.randn(2 if args.num_local else 1, args.queue_size, embedding_dim)      # [Q, K, D]
    queues = F.normalize(queues, dim=-1).to(device)             # the same on all processes, at all times
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
    start_step = 0
    if state is not None:
        if state.get("frozen") != frozen:
            raise UserError(f"--teacher {args.teacher}: not the teacher that this run began with; "
                            "--overwrite starts anew")
        with refuse_misfit(args):
            start_step = int(state["step"])
            model.load_state_dict(state["model"])
            queues.copy_(state["queues"])
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
                    "teacher_head": head_name, "steps_per_epoch": steps_per_epoch,
                    "total_steps": total_steps, "peak_lr": peak_lr}
        command = shlex.join(["python", *sys.argv])
        write(log, dict(resumed_from=start_step) if state else dict(command=command, config=resolved))
        print(f"{command}\n{json.dumps(resolved)}\n{len(dataset):,} images; {total_steps} steps of "
              f"{args.batch_size} × {len(views)} views; lr {args.lr:g} at batch 256 is {peak_lr:g}; "
              f"embeddings of {embedding_dim} numbers, by the teacher's "
              f"{'backbone' if head_name == 'none' else head_name}; {world_size} process(es) on "
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
        if args.schedule == "steps":
            lr = warmup_cosine(step, total_steps, warmup_steps, peak_lr, 0.001 * peak_lr)
        else:
            lr = seed_lr(step // steps_per_epoch, args.epochs, args.warmup_epochs, args.lr, peak_lr,
                         args.milestones)
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = time.time()
        images, uniforms = next(loader)
        waited += time.time() - before

        # ---- one training step: B images of this process, V views, the first one global; K in a queue
        x = views(images, uniforms, device)                                       # V × [B, 3, h, w]
        stop = torch.tensor([float(signum in caught) for signum in SIGNALS], device=device)
        temperatures = args.student_temperature, args.teacher_temperature
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp != "off"):
            s = ddp(x)                                                            # [V, B, D]
            with torch.no_grad():
                t = teacher(x)                                                    # [V, B, D]
        loss = seed_loss(s[0], t[0], queues[0], *temperatures)
        if args.num_local:
            loss = loss + seed_loss(s[1:].flatten(0, 1), t[1:].flatten(0, 1), queues[1], *temperatures)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        health = torch.zeros(3, device=device)
        if logging:                                             # before the queues move on
            health[0] = seed_target(t[0], queues[0], args.teacher_temperature)[:, 0].mean()
            health[1] = F.cosine_similarity(s[0].detach().float(), t[0].float()).mean()
            health[2] = spread(s[0].detach()) / spread(t[0])
        news = F.normalize(t[:len(queues)].float(), dim=-1)     # of local crops the first one
        news, told = gather(news, torch.cat([loss.detach()[None], health, stop]))
        start = step * args.batch_size % args.queue_size        # the oldest leave
        queues[:, start:start + args.batch_size] = news
        bad.watch(step + 1, lr, told[:1], norm, model.parameters() if logging or saving else ())
        if not (logging or saving):
            continue

        # ---- what all processes read alike, as it came with the step's one collective
        dataset.agree(device)
        if bad.step > 0:
            if rank == 0:
                write(log, dict(step=int(bad.step), status=f"non-finite {bad.what}"))
                print(f"distill.py: error: {bad.message(('loss',), amp, out)}", file=sys.stderr)
            return finish(3)
        stopped = next((signum for signum, wish in zip(SIGNALS, told[4:], strict=True) if wish > 0), None)
        if logging:
            seconds = time.time() - since
            images_per_s = (step + 1 - last_step) * args.batch_size / seconds
            entry = dict(epoch=step // steps_per_epoch + 1, step=step + 1, loss=told[0].item(),
                         positive_mass=told[1].item(), cosine=told[2].item(), spread=told[3].item(), lr=lr,
                         images_per_s=round(images_per_s, 1), waiting=round(waited / seconds, 4),
                         memory_mib=memory_mib(device), **dataset.tally())
            if not entry["spread"] > 0.02:                      # the student's embeddings are all alike
                entry["collapsed"] = "constant"
            if rank == 0:
                write(log, entry)
                eta = (total_steps - step - 1) * args.batch_size / images_per_s
                print(progress_line(entry, total_steps, eta), flush=True)
            since, waited, last_step = time.time(), 0.0, step + 1
            collapsed = collapsed + 1 if "collapsed" in entry else 0
            if args.stop_on_collapse and collapsed > 1 and step >= warmup_steps:
                if rank == 0:
                    write(log, dict(step=step + 1, status=f"collapsed: {entry['collapsed']}"))
                    print(f"distill.py: error: collapsed ({entry['collapsed']}) at step {step + 1} and in "
                          f"the line before; the last checkpoint in {out} is from before", file=sys.stderr)
                return finish(4)
        if saving or stopped:
            rng = [rng_state(device)] * world_size
            if world_size > 1:
                dist.all_gather_object(rng, rng_state(device))
            if rank == 0:
                write_atomically(out / "backbone.pth", model.backbone.state_dict())
                save_checkpoint(out / "checkpoint.pth", dict(
                    model=model.state_dict(), queues=queues, frozen=frozen, optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(), step=step + 1, epoch=epoch, stage="distill", rng=rng,
                    pictures=dataset.state_dict(), config=config))
        if stopped:
            if rank == 0:
                write(log, dict(step=step + 1, status=f"stopped by {stopped.name}, saved"))
                print(f"stopped by {stopped.name} after step {step + 1}, saved; the same command goes on")
            return finish(128 + stopped)

    # ---------------------------------------------------------------- save
    if fingerprint(teacher) != frozen:
        raise RuntimeError("the teacher has changed, though it was frozen")
    if rank == 0:
        metrics = read_log(out / "log.jsonl")[total_steps]
        write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
        write(log, dict(step=total_steps, status="done"))
        print(f"done: checkpoint.pth, backbone.pth, log.jsonl, metrics.json in {out}")
    return finish()


def gather(embeddings, numbers):
    """Embeddings [Q, B, D] of each process -> [Q, W·B, D] of all, in the global batch's order, and the mean
    of their numbers [N]: one collective."""
    if not dist.is_initialized():
        return embeddings, numbers
    mine = torch.cat([embeddings.flatten(), numbers])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    everyones = [each.split([embeddings.numel(), len(numbers)]) for each in everyones]
    return (torch.cat([part.view_as(embeddings) for part, _ in everyones], 1),
            torch.stack([part for _, part in everyones]).mean(0))


def spread(embeddings):
    """Variance of the directions of embeddings [B, D] over a batch, of all D: 0 if they are all alike."""
    return F.normalize(embeddings.float(), dim=-1).var(0, correction=0).sum()


def finish(code=0):
    """Leaves the process group together, so that no process takes another's end for a fault."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return code


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


def progress_line(entry, total_steps, eta):
    line = ("epoch {epoch} step {step}/{total} | loss {loss:.3f}, of the target {positive_mass:.1%} on the "
            "positive, cosine to the teacher {cosine:.3f}, spread {spread:.2f} of its | lr {lr:.1e} | "
            "{images_per_s:.0f} images/s, waiting {waiting:.0%}, {memory_mib} MiB, "
            "ETA {minutes:.0f}:{seconds:02.0f}")
    line = line.format(**entry, total=total_steps, minutes=eta // 60, seconds=eta % 60)
    return line + (f" | collapsed: {entry['collapsed']}" if "collapsed" in entry else "")


def memory_mib(device):
    """Most memory so far: of the CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


if __name__ == "__main__":
    run(main, get_parser())
