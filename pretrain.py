"""TWIST pre-training: a network learns, without labels, to sort images into C classes.

    python pretrain.py                                      the embedded Fashion-MNIST, on whatever there is
    torchrun --nproc-per-node 8 pretrain.py @recipes/FILE   8 processes of one machine

Two or more augmented views of each image go through one network that ends in a softmax over C classes. The
loss makes the views agree (consistency), each image sharp (sharpness) and the batch diverse (diversity).
With --loss barlow it is Barlow Twins, whose loss is of embeddings instead of classes; all else is the same.
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
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    UserError,
    open_log,
    open_output,
    read_log,
    refuse_misfit,
    run,
    save_checkpoint,
    write_atomically,
)
from data import VIEWS, Batches, build_dataset, build_views, eval_batches, input_of, num_workers, own_group
from knn import extract_features, knn_predict
from loss import barlow_twins_terms, momentum_twist_loss, twist_loss
from model import ARCHS, build_network, bunch_layout, zero_init_residual
from optim import LARS, BadStep, cosine, param_groups, warmup_cosine

TERMS = ("consistency", "sharpness", "diversity", "invariance", "redundancy")       # of either loss
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)   # wishes to stop: save, exit with 128 + number


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="fashion-mnist",
        help="data set (fashion-mnist, fake, cifar10, cifar100, stl10), folder or list of pictures")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--output-dir", default="runs/pretrain", help="folder for all that is written")
    # network
    add("--arch", default="resnet8", choices=ARCHS, help="backbone")
    add("--small-images", action="store_true", help="3×3 stem without stride and max-pool, for 32 pixels")
    add("--num-classes", type=int, default=10, help="C, classes to discover")
    add("--hidden-dim", type=int, default=512, help="width of the head's hidden layers")
    add("--nbs", action=argparse.BooleanOptionalAction, default=True, help="batch norm before the softmax")
    add("--bunch-size", type=int, default=0, help="images that share one NBS; 0: the global batch")
    add("--zero-init-residual", action="store_true", help="residual branches of a ResNet begin at 0")
    add("--drop-path", type=float, default=0.0, help="stochastic depth of a ViT's last block, 0 to the first")
    add("--ema", type=float, default=0.0, help="momentum of a momentum encoder, to 1 by a cosine; 0: none")
    add("--export", default="teacher", choices=("teacher", "student"), help="whose backbone is backbone.pth")
    # loss
    add("--loss", default="twist", choices=("twist", "barlow"), help="objective: TWIST's or Barlow Twins'")
    add("--lambd", type=float, default=0.0051, help="Barlow Twins: weight of redundancy")
    add("--alpha", type=float, default=1.0, help="weight of sharpness")
    add("--beta", type=float, default=1.0, help="weight of diversity")
    add("--eps", type=float, default=1e-5, help="inside every logarithm of the loss")
    # views
    add("--views", default="auto", choices=("auto", *VIEWS),
        help="augmentation recipe; auto: fashion-mnist for it, else the one published for the stage")
    add("--image-size", type=int, default=0, help="pixels of a global crop; 0: the data's own, 224 of files")
    add("--local-size", type=int, default=0, help="pixels of a local crop; 0: 3/7 of the global")
    add("--num-local", type=int, default=0, help="local crops beside the global ones")
    add("--mean", type=float, nargs="+", help="of pixels 0..1, one or three; None: the data's own")
    add("--std", type=float, nargs="+", help="of pixels 0..1, one or three; None: the data's own")
    # optimisation
    add("--optimizer", default="adamw", choices=("lars", "adamw", "sgd"), help="update rule")
    add("--epochs", type=int, default=2, help="passes over the data")
    add("--batch-size", type=int, default=128, help="images in the GLOBAL batch")
    add("--lr", type=float, default=4e-3, help="peak learning rate at batch 256, scaled linearly")
    add("--bias-lr", type=float, default=1.0, help="of biases and norms, as a multiple of --lr")
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
    add("--knn-every", type=int, default=1, help="epochs between k-NN checks, to watch only; 0: none")
    add("--stop-on-collapse", action="store_true", help="end with code 4 at the second line that says so")
    add("--timeout", type=float, default=600, help="seconds that a process waits for its peers")
    add("--local-rank", type=int, help=argparse.SUPPRESS)       # old launchers pass it; LOCAL_RANK is read
    return parser


def check(args, dataset, world_size):
    """Refuses what cannot work, by name, before anything is written."""
    least = dict(epochs=1, num_classes=2, hidden_dim=1, batch_size=2, save_every=1, print_every=1, workers=-1,
                 num_local=0, knn_every=0, bunch_size=0, image_size=0, local_size=0, eps=0, lr=0, drop_path=0,
                 ema=0, warmup_epochs=0, weight_decay=0, momentum=0, clip_norm=0, timeout=1, seed=0, lambd=0,
                 bias_lr=0, beta2=0)
    for name, low in least.items():
        if not low <= getattr(args, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    for name, values in (("mean", args.mean), ("std", args.std)):
        if values and (len(values) not in (1, 3) or not all(0 <= v < math.inf for v in values) or
                       (name == "std" and 0 in values)):
            raise UserError(f"--{name} {' '.join(map(str, values))}: one or three numbers, for 0 to 1 pixels")
    for name in ("ema", "drop_path", "momentum", "beta2"):
        if getattr(args, name) >= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be below 1")
    if args.small_images and not args.arch.startswith("resnet"):
        raise UserError(f"--small-images: {args.arch} has no ResNet's stem to change")
    others = dict(twist=("lambd",), barlow=("num_classes", "alpha", "beta", "eps", "nbs", "bunch_size"))
    for name in others[args.loss]:
        if getattr(args, name) != get_parser().get_default(name):
            raise UserError(f"--{name.replace('_', '-')}: does nothing with --loss {args.loss}; leave it out")
    if args.loss == "barlow" and (args.num_local or args.ema):
        raise UserError("--loss barlow: takes two views and no momentum encoder, so no --num-local, no --ema")
    if args.print_every > 50:
        raise UserError(f"--print-every {args.print_every}: at most 50; a wish to stop is heard as often")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: not divisible by the {world_size} processes")
    if args.batch_size > len(dataset):
        raise UserError(f"--batch-size {args.batch_size}: --data {args.data} has only {len(dataset)} images")
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
    torch.manual_seed(args.seed)

    # ---------------------------------------------------------------- data
    dataset = build_dataset(args.data, "pretrain", args.seed, args.data_dir)
    check(args, dataset, world_size)
    size, mean, std = input_of(vars(args))
    recipe = args.views
    if recipe == "auto":
        of_pictures = "multicrop" if args.num_local > 0 else "barlow"
        recipe = "fashion-mnist" if args.data == "fashion-mnist" else of_pictures
    views = build_views(recipe, mean, std, size, args.local_size or max(1, size * 3 // 7), args.num_local,
                        arch=args.arch)
    batches = Batches(dataset, args.batch_size, views, args.seed, rank, world_size)
    steps_per_epoch = batches.steps_per_epoch
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256

    # ---------------------------------------------------------------- output folder, last checkpoint
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(seconds=args.timeout))
    out = Path(args.output_dir)
    lock, state = open_output(args, "pretrain") if rank == 0 else (None, None)
    if world_size > 1:                                          # all go on from what rank 0 read
        box = [state]
        dist.broadcast_object_list(box)
        state = box[0]

    # ---------------------------------------------------------------- model
    model = build_network(vars(args), args.drop_path).to(device, memory_format=torch.channels_last)
    if args.zero_init_residual:
        zero_init_residual(model.backbone)
    last_linear = model.projector[-1] if args.loss == "barlow" else model.projection_heads.last_linear
    ddp = DistributedDataParallel(model) if world_size > 1 else model
    teacher = None
    if args.ema > 0:             # without drop path, as DINO's; in training mode, so with its own statistics
        teacher = build_network(vars(args)).to(device, memory_format=torch.channels_last)
        teacher.requires_grad_(False)
        teacher.load_state_dict(model.state_dict())
    watched_model = teacher if teacher is not None and args.export == "teacher" else model
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
        with refuse_misfit(args):
            start_step = int(state["step"])
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
        config = {**vars(args), "device": str(device), "amp": amp, "world_size": world_size,
                  "steps_per_epoch": steps_per_epoch, "total_steps": total_steps, "peak_lr": peak_lr}
        command = shlex.join(["python", *sys.argv])
        write(log, dict(resumed_from=start_step) if state else dict(command=command, config=config))
        print(f"{command}\n{json.dumps(config)}\n{len(dataset):,} images; {total_steps} steps of "
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
    watched = monitored(args, dataset) if rank == 0 and args.knn_every else None
    bad, collapsed = BadStep(device, scaler), 0
    since, waited, last_step = time.time(), 0.0, start_step
    model.train()
    for step in range(start_step, total_steps):
        epoch, place = divmod(step + 1, steps_per_epoch)
        logging = (step + 1) % args.print_every == 0 or place == 0
        saving = (step + 1) % args.save_every == 0 or step + 1 == total_steps
        lr = warmup_cosine(step, total_steps, warmup_steps, peak_lr, 0.001 * peak_lr)
        for group, factor in zip(optimizer.param_groups, (1, args.bias_lr), strict=True):
            group["lr"] = lr * factor
        if args.weight_decay_end is not None:
            optimizer.param_groups[0]["weight_decay"] = cosine(step, total_steps, args.weight_decay,
                                                               args.weight_decay_end)
        health = {}
        watch = watch_logits(last_linear, health) if logging else None
        before = time.time()
        images, uniforms = next(loader)
        waited += time.time() - before

        # ---- one training step: B images of this process, V views, C classes
        x = views(images, uniforms, device)                                       # V × [B, 3, h, w]
        stop = torch.tensor([float(signum in caught) for signum in SIGNALS], device=device)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp != "off"):
            logits = ddp(x)                                                       # [V, B, C]
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(x[:2])                               # [2, B, C]
        if args.loss == "barlow":
            loss = barlow_twins_terms(*logits, args.lambd, riders=stop)           # of embeddings [2, B, D]
        elif teacher is None:
            loss = twist_loss(logits, args.alpha, args.beta, args.eps, riders=stop)
        else:
            loss = momentum_twist_loss(teacher_logits, logits, args.alpha, args.beta, args.eps, riders=stop)
        optimizer.zero_grad()
        scaler.scale(loss.total).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_norm or math.inf)
        scaler.step(optimizer)
        scaler.update()
        if teacher is not None:
            keep = cosine(step, total_steps, args.ema, 1.0)
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - keep)
        bad.watch(step + 1, lr, loss, norm, model.parameters() if logging or saving else ())
        if not (logging or saving):
            continue

        # ---- what all processes read alike, as it came with the loss's one collective
        dataset.agree(device)
        if bad.step > 0:
            if rank == 0:
                write(log, dict(step=int(bad.step), status=f"non-finite {bad.what}"))
                print(f"pretrain.py: error: {bad.message(loss._fields, amp, out)}", file=sys.stderr)
            return finish(3)
        stopped = next((signum for signum, wish in zip(SIGNALS, stop, strict=True) if wish > 0), None)
        if logging:
            watch.remove()
            seconds, grad_scale = time.time() - since, scaler.get_scale() * world_size
            images_per_s = (step + 1 - last_step) * args.batch_size / seconds
            entry = dict(epoch=step // steps_per_epoch + 1, step=step + 1, **terms_and_health(
                loss, health, grad_scale, min(args.num_classes, args.batch_size), logits.shape[-1]), lr=lr,
                images_per_s=round(images_per_s, 1), waiting=round(waited / seconds, 4),
                memory_mib=memory_mib(device), **dataset.tally())
            if watched and place == 0 and epoch % args.knn_every == 0:
                entry["knn_monitor"] = monitor(watched_model, watched, args, device)
            if rank == 0:
                write(log, entry)
                eta = (total_steps - step - 1) * args.batch_size / images_per_s
                print(progress_line(entry, total_steps, eta), flush=True)
            since, waited, last_step = time.time(), 0.0, step + 1
            collapsed = collapsed + 1 if "collapsed" in entry else 0
            if args.stop_on_collapse and collapsed > 1 and step >= warmup_steps:
                if rank == 0:
                    write(log, dict(step=step + 1, status=f"collapsed: {entry['collapsed']}"))
                    print(f"pretrain.py: error: collapsed ({entry['collapsed']}) at step {step + 1} and in "
                          f"the line before; the last checkpoint in {out} is from before", file=sys.stderr)
                return finish(4)
        if saving or stopped:
            rng = [rng_state(device)] * world_size
            if world_size > 1:
                dist.all_gather_object(rng, rng_state(device))
            if rank == 0:
                averaged = {} if teacher is None else dict(teacher=teacher.state_dict())
                write_atomically(out / "backbone.pth", watched_model.backbone.state_dict())
                save_checkpoint(out / "checkpoint.pth", dict(
                    model=model.state_dict(), **averaged, optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(), step=step + 1, epoch=epoch,
                    stage="pretrain", rng=rng, pictures=dataset.state_dict(), config=vars(args)))
        if stopped:
            if rank == 0:
                write(log, dict(step=step + 1, status=f"stopped by {stopped.name}, saved"))
                print(f"stopped by {stopped.name} after step {step + 1}, saved; the same command goes on")
            return finish(128 + stopped)

    # ---------------------------------------------------------------- save
    if rank == 0:
        entries = read_log(out / "log.jsonl")
        draw_curves(list(entries.values()), args, out / "curves.png")
        write_atomically(out / "metrics.json", json.dumps(entries[total_steps], indent=1).encode())
        write(log, dict(step=total_steps, status="done"))
        print(f"done: checkpoint.pth, backbone.pth, log.jsonl, metrics.json, curves.png in {out}")
    return finish()


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


def watch_logits(last_linear, health):
    """For one step: deviations of the logits before NBS, their mean |gradient| (paper, Tables 7 and 8)."""
    def look(module, inputs, logits):
        z = logits.detach().float()
        health.update(std_col=z.std(0).mean(), std_row=z.std(1).mean())
        logits.register_hook(lambda grad: health.update(grad=grad.detach().float().abs().mean()))
    return last_linear.register_forward_hook(look)


def terms_and_health(loss, health, grad_scale, most_classes, width):
    """The loss's terms and the health of a step, in nats; the gradient was multiplied by `grad_scale`, an
    embedding (Barlow Twins) has `width` numbers. What collapsed is told by numbers of the global batch."""
    terms = {name: value.item() for name, value in loss._asdict().items()}
    entry = dict(loss=terms.pop("total"), **terms)
    if "diversity" in terms:                                    # there are classes
        mi = terms["diversity"] - terms["sharpness"]            # I(image; class): 0 if collapsed
        entry |= dict(mi=mi, mi_ratio=mi / math.log(most_classes), classes=math.exp(terms["diversity"]))
        if entry["mi_ratio"] < 0.02:
            entry["collapsed"] = "one-class" if entry["classes"] < 1.1 else "uniform"
    elif terms["redundancy"] > 0.98 * width * (width - 1):      # all dimensions vary alike
        entry["collapsed"] = "one-dimension"
    elif terms["redundancy"] < 1e-4 * width * (width - 1) and terms["invariance"] > 0.9 * width:
        entry["collapsed"] = "constant"                         # no dimension varies: below the epsilon
    return entry | dict(std_col=health["std_col"].item(), std_row=health["std_row"].item(),
                        grad=health["grad"].item() / grad_scale)


def progress_line(entry, total_steps, eta):
    terms = ", ".join(f"{name} {entry[name]:.3f}" for name in TERMS if name in entry)
    classes = "mi {mi:.2f} ({mi_ratio:.0%}), classes {classes:.1f}, " if "mi" in entry else ""
    line = ("epoch {epoch} step {step}/{total} | loss {loss:.3f} = {terms} | " + classes +
            "std {std_col:.2f} / {std_row:.2f}, grad {grad:.0e} | lr {lr:.1e} | "
            "{images_per_s:.0f} images/s, waiting {waiting:.0%}, {memory_mib} MiB, "
            "ETA {minutes:.0f}:{seconds:02.0f}")
    line = line.format(**entry, terms=terms, total=total_steps, minutes=eta // 60, seconds=eta % 60)
    if "collapsed" in entry:
        line += f" | collapsed: {entry['collapsed']}"
    if "knn_monitor" in entry:
        line += f" | 20-NN {entry['knn_monitor']:.4f} (to watch only)"
    return line


def memory_mib(device):
    """Most memory so far: of the CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def monitored(args, dataset):
    """Labelled training and test images, up to 10,000 evenly spaced of each; None if there are no such."""
    try:
        parts = [build_dataset(args.data, split, args.seed, args.data_dir) for split in ("train", "test")]
    except UserError:                                           # no val part
        return None
    if dataset.images is None:                                  # so that a broken file is named once
        parts[0].broken = dataset.broken
    train, test = (part.subset(torch.linspace(0, len(part) - 1, min(len(part), 10_000)).long())
                   for part in parts)
    apart = train.images is not None or train.paths[0] != test.paths[0]
    return (train, test) if apart and train.labels is not None and test.labels is not None else None


def monitor(model, watched, args, device):
    """20-NN accuracy of the test images against the training images: to watch, not to report."""
    features = [extract_features(model.backbone, eval_batches(part, vars(args), device, workers=args.workers))
                for part in watched]
    train, test = (part.readable() for part in watched)
    scores = knn_predict(features[0], train.labels, features[1], k=min(20, len(train)), temperature=0.07,
                         num_classes=len(train.class_names))
    return (scores.argmax(1).cpu() == test.labels).float().mean().item()


def draw_curves(entries, args, path):
    """The terms and the loss over the steps, with their bounds; no matplotlib costs the picture only."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path} is not drawn: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    steps, most = [e["step"] for e in entries], math.log(min(args.num_classes, args.batch_size))
    for name, style in zip([name for name in TERMS if name in entries[0]], ("-", "--", "-."), strict=False):
        left.plot(steps, [e[name] for e in entries], style, label=name)
    right.plot(steps, [e["loss"] for e in entries], color="black", label="loss")
    if args.loss == "twist":
        left.axhline(most, color="0.6", linewidth=1, label=f"ln {math.exp(most):.0f}, the greatest entropy")
        right.axhline(-args.beta * most, color="0.6", linewidth=1, label="lower bound")
        unit, total = "nats", f"consistency + {args.alpha:g} · sharpness − {args.beta:g} · diversity"
    else:
        unit, total = "squared correlation", f"invariance + {args.lambd:g} · redundancy"
    axis = dict(ylim=(0, None)) if args.loss == "twist" else dict(yscale="log")     # D and D² summands
    left.set(xlabel="step", ylabel=unit, title="the terms", **axis)
    right.set(xlabel="step", ylabel=unit, title=total)
    for axes in (left, right):
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run(main, get_parser())
