"""Linear classification on frozen features: how well do classes separate by a hyperplane?

The backbone is frozen, in evaluation mode, and proven unchanged at the end. One linear classifier per pair of
--lrs and --weight-decays is trained on its features, all of them side by side in the one pass that runs the
backbone. Images held out from the training set choose among them; the choice sees the test set once.

    python lincls.py --checkpoint weights/fashion-mnist.pth                      the CPU, or one GPU
    torchrun --nproc-per-node 8 lincls.py --checkpoint runs/pretrain/checkpoint.pth --data DATA
    python lincls.py --checkpoint FILE --lrs 0.05 --held-out 0 --batch-size 1024 --epochs 100

The last is the published protocol for ResNets (lr 0.2 at batch 1024): SGD with momentum 0.9, cosine by epoch,
random resized crops (bicubic here) and flips, single precision; for ViTs the [CLS] of the last four blocks.
"""

import argparse
import csv
import datetime
import hashlib
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

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
from data import Batches, Views, build_dataset, eval_batches, input_of, num_workers, own_group
from model import ARCHS, BatchNorm
from optim import BadStep, cosine

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)   # wishes to stop: save, exit with 128 + number
# Feature1 to 5, stem and stages of a ResNet at 224 pixels (Goyal et al. 2019; MMSelfSup 0.x): side of the
# map, kernel, stride and padding of the average over it, places left, so that each has about 9,000 numbers
DEPTHS = ((112, 10, 10, 4, 12), (56, 16, 8, 0, 6), (28, 13, 5, 0, 4), (14, 8, 3, 0, 3), (7, 6, 1, 0, 2))


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint of a run; with --arch any project's backbone")
    add("--data", help="data set (fashion-mnist, fake, cifar10, cifar100, stl10), folder or list of pictures")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--output-dir", default="runs/lincls", help="folder for all that is written")
    # network
    add("--arch", choices=ARCHS, help="backbone")
    add("--small-images", action="store_true", help="3×3 stem without stride and max-pool, for 32 pixels")
    # features
    add("--n-last-blocks", type=int, default=4, help="ViT: blocks whose [CLS] are joined")
    add("--mean-of-patches", action="store_true", help="ViT: join the mean of the last patches, too")
    add("--depths", action="store_true", help="ResNet: Feature1 to 5, of the stem and each stage, by itself")
    add("--batch-norm", action="store_true", help="of the features, without scale and shift")
    add("--cached", action="store_true", help="features of centre crops, once: another protocol, faster")
    # heads
    add("--lrs", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3, 1.0],
        help="learning rates at batch 256, scaled linearly")
    add("--weight-decays", type=float, nargs="+", default=[0.0], help="of weights and biases of the heads")
    add("--nesterov", action="store_true", help="Nesterov's momentum")
    add("--milestones", type=int, nargs="+",
        help="epochs at which the learning rate falls to a tenth; None: cosine")
    add("--held-out", type=float, default=0.1, help="share of the training images that chooses")
    add("--min-scale", type=float, default=0.08, help="least share of the area in a random crop")
    add("--jitter", action="store_true", help="colour jitter and lighting noise, as published for Feature1-5")
    add("--epochs", type=int, default=5, help="passes over the data")
    add("--batch-size", type=int, default=256, help="images in the GLOBAL batch")
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
    least = dict(epochs=1, batch_size=1, save_every=1, print_every=1, workers=-1, timeout=1, seed=0,
                 n_last_blocks=1)
    for flag, low in least.items():
        if not low <= getattr(args, flag) < math.inf:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {low}")
    for flag, values in (("lrs", args.lrs), ("weight-decays", args.weight_decays),
                         ("milestones", args.milestones or [])):
        if not all(0 <= value < math.inf for value in values):
            raise UserError(f"--{flag} {' '.join(map(str, values))}: must be numbers from 0")
    if args.print_every > 50:
        raise UserError(f"--print-every {args.print_every}: at most 50; a wish to stop is heard as often")
    if args.jitter and args.cached:
        raise UserError("--jitter: --cached takes centre crops as they are; leave one of the two out")
    if not 0 < args.min_scale <= 1:
        raise UserError(f"--min-scale {args.min_scale}: must be above 0 and at most 1")
    if len(args.lrs) * len(args.weight_decays) > 1 and not len(held):
        raise UserError(f"--held-out {args.held_out}: holds out no image, and several --lrs or "
                        "--weight-decays need some to choose by")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: not divisible by the {world_size} processes")
    if args.batch_size > len(train):
        raise UserError(f"--batch-size {args.batch_size}: --data {name} has only {len(train)} images to "
                        "train on")
    if world_size > min(len(test), len(held) or len(test)):
        raise UserError(f"--data {name}: has fewer images to evaluate than there are processes")


def labelled(name, seed, data_dir):
    """(train, test) of a labelled data set. Raises UserError if there are no labels or no such parts."""
    train, test = (build_dataset(name, split, seed, data_dir) for split in ("train", "test"))
    if train.labels is None or test.labels is None:
        raise UserError(f"--data {name}: has no labels, which classification needs")
    if train.images is None and np.array_equal(train.paths, test.paths):
        raise UserError(f"--data {name}: has no train and val parts; training images would be tested on")
    return train, test


def hold_out(labels, share, seed):
    """Indices (kept, held out) of labels [N], both in order: of each class the same share, by the seed."""
    if not 0 <= share < 1:
        raise UserError(f"--held-out {share}: must be a share, from 0 to below 1")
    shuffled = torch.from_numpy(np.random.default_rng([seed, 6]).permutation(len(labels)))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        of_class = shuffled[labels[shuffled] == c]
        held[of_class[:round(share * len(of_class))]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


# ---------------------------------------------------------------- the frozen network
def fingerprint(network):
    """SHA-256 of all parameters and buffers of a network, names and bits."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def build_reader(backbone, args):
    """(names, read): read maps images [B, 3, H, W] to a list of features, one for each name.

    [B, D]; with --depths [B, C, h, w] of the stem and of each stage of a ResNet, averaged over fewer places.
    """
    is_vit = hasattr(backbone, "features")
    if args.mean_of_patches and not is_vit:
        raise UserError("--mean-of-patches: this backbone is not a ViT, it has no patch tokens")
    if not args.depths:
        if is_vit:
            if args.n_last_blocks > len(backbone.blocks):
                raise UserError(f"--n-last-blocks {args.n_last_blocks}: there are {len(backbone.blocks)}")
            return ["features"], lambda x: [backbone.features(x, args.n_last_blocks, args.mean_of_patches)]
        return ["features"], lambda x: [backbone(x)]
    stages = [stage for stage in ("bn1", "layer1", "layer2", "layer3", "layer4") if hasattr(backbone, stage)]
    if "bn1" not in stages:
        raise UserError("--depths: this backbone is not a ResNet, it has no stages")
    maps = []
    for stage in stages:
        getattr(backbone, stage).register_forward_hook(lambda module, inputs, output: maps.append(output))

    def read(x):
        maps.clear()
        backbone(x)
        # relu again: bn1 is hooked, and whether the relu behind it works in place is not for us to know
        return [pool_depth(F.relu(feature_map), i) for i, feature_map in enumerate(maps)]
    return [f"Feature{i + 1}" for i in range(len(stages))], read


def pool_depth(feature_map, i):
    """Map [B, C, H, W] of depth i = 0..4, averaged to [B, C, h, w] as its row of DEPTHS at 224 pixels; a map
    of another size to as many places, or to its own if those are fewer."""
    side, kernel, stride, padding, places = DEPTHS[i]
    if feature_map.shape[-1] == feature_map.shape[-2] == side:
        return F.avg_pool2d(feature_map, kernel, stride, padding)
    return F.adaptive_avg_pool2d(feature_map, [min(places, n) for n in feature_map.shape[-2:]])


# ---------------------------------------------------------------- the heads
class Heads(nn.Module):
    """G linear classifiers of the same features, side by side: one weight tensor, one matrix product.

    features: an example [B, D] or [B, C, h, w]. All start from the same weights, N(0, 0.01), and bias 0.
    norm: batch norm without affine parameters before them, over the C channels (D features) and processes.
    """

    def __init__(self, features, num_heads, num_classes, norm=False):
        super().__init__()
        self.norm = BatchNorm(features.shape[1], affine=False) if norm else nn.Identity()
        weight = torch.randn(num_classes, features[0].numel()) * 0.01
        self.weight = nn.Parameter(weight.repeat(num_heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, num_classes))

    def forward(self, features):
        x = self.norm(features).flatten(1)                                                # [B, D]
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)

    def one(self, g):
        """State dict of head g alone, as a Heads of one."""
        return {name: (value[g:g + 1] if name in ("weight", "bias") else value).clone()
                for name, value in self.state_dict().items()}


def head_losses(logits, labels):
    """Cross-entropy [G] of each head: logits [B, G, C], labels [B]."""
    B, G, _ = logits.shape
    labels = labels.repeat_interleave(G)
    return F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(B, G).mean(0)


@torch.no_grad()
def sgd_step(weights, velocities, lr, weight_decay, momentum=0.9, nesterov=False):
    """SGD with momentum, as torch.optim.SGD's, of tensors [G, ...] with an lr [G] and a decay [G] a head.

        v <- momentum * v + g + weight_decay * w;  w <- w - lr * v
    or, by Nesterov,                               w <- w - lr * (g + weight_decay * w + momentum * v)
    """
    for w, v in zip(weights, velocities, strict=True):
        shape = (-1,) + (1,) * (w.dim() - 1)
        v.mul_(momentum).add_(w.grad).addcmul_(w, weight_decay.view(shape))
        step = w.grad.addcmul(w, weight_decay.view(shape)).add_(v, alpha=momentum) if nesterov else v
        w.addcmul_(step, lr.view(shape), value=-1)


# ---------------------------------------------------------------- evaluation by several processes
@torch.no_grad()
def classify(heads, feature_batches):
    """For each Heads the five likeliest classes [N, G, 5] of features in batches, likeliest first.

    feature_batches: of lists of features, one for each Heads. -1 where a head has diverged: nobody's class.
    """
    classes = []
    for features in feature_batches:
        classes.append([])
        for head, x in zip(heads, features, strict=True):
            logits = head.eval()(x)
            top = logits.topk(min(5, logits.shape[-1])).indices
            classes[-1].append(top.where(logits.isfinite().all(-1, keepdim=True), -1))
    return [torch.cat(parts) for parts in zip(*classes, strict=True)]


def accuracies(classes, labels, world_size=1):
    """Top-1 and top-5 [2, G] from the classes [n, G, 5] and labels [n] of each process's images."""
    hits = classes == labels.to(classes.device)[:, None, None]
    number = torch.full((1,), len(hits), device=hits.device)
    sums = torch.cat([hits[..., 0].sum(0), hits.any(-1).sum(0), number])
    if world_size > 1:
        dist.all_reduce(sums)
    return (sums[:-1].double() / sums[-1]).view(2, -1).cpu()


def gather(mine, part, world_size):
    """Rows of the readable images among rank::world_size of a set, from each process -> of all, in order."""
    if world_size == 1:
        return mine
    part.agree(mine.device)
    readable = part.is_readable.to(mine.device)
    rows = mine.new_zeros(-(-len(part) // world_size), *mine.shape[1:])
    rows[readable[dist.get_rank()::world_size].nonzero()[:, 0]] = mine
    parts = [torch.empty_like(rows) for _ in range(world_size)]
    dist.all_gather(parts, rows)
    return torch.stack(parts, 1).flatten(0, 1)[:len(part)][readable]


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
    whole, test = labelled(name, config.get("seed", 0), args.data_dir)
    train, held = map(whole.subset, hold_out(whole.labels, args.held_out, args.seed))
    check(args, name, (train, held, test), world_size)
    num_classes = len(train.class_names)
    jitter = dict(jitter=(0.4, 0.4, 0.4, 0), jitter_p=1, lighting=0.1) if args.jitter else {}
    views = Views([(size, dict(scale=(args.min_scale, 1), **jitter))], mean, std)
    batches = Batches(train, args.batch_size, views, args.seed, rank, world_size)
    steps_per_epoch = batches.steps_per_epoch
    total_steps = args.epochs * steps_per_epoch

    # ---------------------------------------------------------------- model
    backbone.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    frozen = fingerprint(backbone)
    depths, read = build_reader(backbone, args)

    @torch.no_grad()
    def features_of(x):                                         # images -> a list of features, by depth
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp != "off"):
            return [feature.float() for feature in read(x)]

    def share_of(part):                                         # this process's rows, rank::world_size
        return part.subset(slice(rank, None, world_size))

    def features_in(part):
        return map(features_of, eval_batches(share_of(part), config, device, args.batch_size, args.workers))

    # ---------------------------------------------------------------- output folder, last checkpoint
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(seconds=args.timeout))
    out = Path(args.output_dir)
    lock, state = open_output(args, "lincls") if rank == 0 else (None, None)
    if world_size > 1:                                          # all go on from what rank 0 read
        box = [state]
        dist.broadcast_object_list(box)
        state = box[0]

    # ---------------------------------------------------------------- heads, optimizer
    grid = [(lr, decay) for lr in args.lrs for decay in args.weight_decays]
    lrs = torch.tensor([lr * args.batch_size / 256 for lr, _ in grid], device=device)             # [G]
    decays = torch.tensor([decay for _, decay in grid], device=device)                            # [G]
    examples = features_of(torch.zeros(2, 3, size, size, device=device))
    norm = args.depths or args.batch_norm
    torch.manual_seed(args.seed)
    heads = nn.ModuleList(Heads(x, len(grid), num_classes, norm) for x in examples).to(device)
    weights = list(heads.parameters())
    velocities = [torch.zeros_like(w) for w in weights]

    # ---------------------------------------------------------------- resume
    start_step, scores, best_heads = 0, [None] * len(heads), [None] * len(heads)
    if state is not None:
        if state.get("frozen") != frozen:
            raise UserError(f"--checkpoint {args.checkpoint}: not the backbone that this run began with; "
                            "--overwrite starts anew")
        with refuse_misfit(args):
            start_step, scores, best_heads = int(state["step"]), state["scores"], state["best"]
            heads.load_state_dict(state["model"])
            for v, saved in zip(velocities, state["optimizer"], strict=True):
                v.copy_(saved)
            whole.load_state_dict(state.get("pictures"))
    if start_step == total_steps and (args.resume != "auto" or (out / "metrics.json").exists()):
        if rank == 0:
            print(f"{out}: this run is finished; --overwrite starts it anew")
        return finish()
    if rank == 0:
        log = open_log(out / "log.jsonl")
        command = shlex.join(["python", *sys.argv])
        resolved = {**vars(args), "data": name, "device": str(device), "amp": amp, "world_size": world_size,
                    "total_steps": total_steps,
                    "peak_lrs": [lr * args.batch_size / 256 for lr in args.lrs]}
        write(log, dict(resumed_from=start_step) if state else dict(command=command, config=resolved))
        widths = ", ".join(f"{depth} {x[0].numel()}" for depth, x in zip(depths, examples, strict=True))
        print(f"{command}\n{json.dumps(resolved)}\n{len(train):,} images to train on, {len(held):,} held "
              f"out, {len(test):,} to test on; numbers an image: {widths}\n{len(grid)} heads, {total_steps} "
              f"steps of {args.batch_size}; lr at batch 256 {args.lrs}, scaled {resolved['peak_lrs']}; "
              f"{world_size} process(es) on {device}, amp {amp}"
              + (f"; resumed from step {start_step}" if state else ""), flush=True)
        if args.cached:
            print("--cached: trained on features of centre crops, not of augmented images: another protocol")

    # ---------------------------------------------------------------- train
    caught = []
    for signum in SIGNALS:
        signal.signal(signum, lambda signum, frame: caught.append(signum))
    if args.cached and start_step < total_steps:
        cached = [gather(torch.cat(parts), train, world_size)
                  for parts in zip(*features_in(train), strict=True)]
        rows = batches.readable_rows().to(device)
        held_features = list(features_in(held)) if len(held) else []
    elif start_step < total_steps:
        loader = iter(torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=range(start_step, total_steps),
            num_workers=num_workers(args.workers, train, world_size), pin_memory=device.type == "cuda",
            worker_init_fn=own_group))
    bad = BadStep(device)
    since, last_step = time.time(), start_step
    for step in range(start_step, total_steps):
        epoch, place = divmod(step + 1, steps_per_epoch)
        logging = (step + 1) % args.print_every == 0 or place == 0
        saving = (step + 1) % args.save_every == 0 or place == 0

        # ---- one training step: B images of this process, G heads at each depth
        indices = batches.indices(step)
        if args.cached:
            features = [x[rows[indices.to(device)]] for x in cached]
        else:
            images, uniforms = next(loader)
            features = features_of(views(images, uniforms, device)[0])
        labels = train.labels[indices].to(device)
        losses = torch.stack([head_losses(head.train()(x), labels)
                              for head, x in zip(heads, features, strict=True)])          # [depths, G]
        heads.zero_grad()
        losses.sum().backward()                                 # a head's gradient is of its own loss only
        stop = torch.tensor([float(signum in caught) for signum in SIGNALS], device=device)
        losses = losses.detach()
        if world_size > 1:                                      # one collective, with all there is to say
            average([w.grad for w in weights] + [losses, stop])
        passed = step // steps_per_epoch                        # epochs
        rate = (cosine(passed, args.epochs, 1, 0) if args.milestones is None
                else 0.1 ** sum(milestone <= passed for milestone in args.milestones))
        sgd_step(weights, velocities, rate * lrs, decays, nesterov=args.nesterov)
        least = losses.nan_to_num(math.inf).min()               # a head that diverges is not chosen
        bad.watch(step + 1, rate * min(args.lrs) * args.batch_size / 256, least[None])
        if not (logging or saving):
            continue

        # ---- what all processes read alike
        whole.agree(device)
        if bad.step > 0:
            if rank == 0:
                write(log, dict(step=int(bad.step), status=f"non-finite {bad.what}"))
                print(f"lincls.py: error: of every head {bad.message(('least loss',), amp, out, '--lrs')}",
                      file=sys.stderr)
            return finish(3)
        stopped = next((signum for signum, wish in zip(SIGNALS, stop, strict=True) if wish > 0), None)
        if place == 0 and len(held):
            classes = classify(heads, held_features if args.cached else features_in(held))
            scores = [accuracies(c, share_of(held).readable().labels, world_size) for c in classes]
            for i, (head, (top1, top5)) in enumerate(zip(heads, scores, strict=True)):
                g = int(top1.argmax())
                if best_heads[i] is None or top1[g] > best_heads[i]["top1"]:
                    best_heads[i] = dict(epoch=epoch, head=g, top1=top1[g].item(), top5=top5[g].item(),
                                         state=head.one(g))
        if logging and rank == 0:
            images_per_s = (step + 1 - last_step) * args.batch_size / (time.time() - since)
            least = least.item()
            entry = dict(epoch=step // steps_per_epoch + 1, step=step + 1, loss=least,
                         images_per_s=round(images_per_s, 1), **whole.tally())
            eta = (total_steps - step - 1) * args.batch_size / images_per_s
            line = (f"epoch {entry['epoch']} step {step + 1}/{total_steps} | loss {least:.3f}, the least of "
                    f"{losses.numel()} | {images_per_s:.0f} images/s, ETA {eta // 60:.0f}:{eta % 60:02.0f}")
            if place == 0 and len(held):
                entry["held_out"] = [score[0].max().item() for score in scores]
                line += " | best on held-out images " + ", ".join(f"{top1:.4f}" for top1 in entry["held_out"])
            write(log, entry)
            print(line, flush=True)
        if logging:
            since, last_step = time.time(), step + 1
        if (saving or stopped) and rank == 0:
            save_checkpoint(out / "checkpoint.pth", dict(
                model=heads.state_dict(), optimizer=velocities, step=step + 1, epoch=epoch, stage="lincls",
                pictures=whole.state_dict(), frozen=frozen, scores=scores, best=best_heads,
                config=vars(args)))
        if stopped:
            if rank == 0:
                write(log, dict(step=step + 1, status=f"stopped by {stopped.name}, saved"))
                print(f"stopped by {stopped.name} after step {step + 1}, saved; the same command goes on")
            return finish(128 + stopped)

    # ---------------------------------------------------------------- eval
    # per depth two classifiers: the choice at the last epoch, and the best one of all epochs (if held out)
    chosen, reports = [], []
    for i, head in enumerate(heads):
        g = int(scores[i][0].argmax()) if len(held) else 0
        last = dict(epoch=args.epochs, head=g, state=head.one(g))
        if len(held):
            last |= dict(top1=scores[i][0][g].item(), top5=scores[i][1][g].item())
        for which, choice in (("last", last), ("best", best_heads[i]))[:2 if len(held) else 1]:
            classifier = Heads(examples[i], 1, num_classes, norm).to(device)
            classifier.load_state_dict(choice["state"])
            chosen.append(classifier)
            lr, decay = grid[choice["head"]]
            reports.append(dict(
                which=which, features=depths[i], epoch=choice["epoch"], lr=lr, weight_decay=decay,
                held_out_top1=choice.get("top1"), held_out_top5=choice.get("top5")))
    twice = 2 if len(held) else 1
    classes = classify(chosen, ([x for x in features for _ in range(twice)]
                                for features in features_in(test)))
    for report, c in zip(reports, classes, strict=True):
        top1, top5 = accuracies(c, share_of(test).readable().labels, world_size)
        report |= dict(test_top1=top1.item(), test_top5=top5.item())
    predictions = gather(classes[-twice], test, world_size)[:, 0, 0]         # of the deepest features, last
    whole.agree(device)
    read = [part.readable() for part in (train, held, test)]
    num_broken = sum(map(len, (train, held, test))) - sum(map(len, read))
    if fingerprint(backbone) != frozen:
        raise RuntimeError("the backbone has changed, though it was frozen")

    # ---------------------------------------------------------------- save
    if rank == 0:
        table = [dict(features=depth, lr=lr, weight_decay=decay, held_out_top1=s[0][g].item(),
                      held_out_top5=s[1][g].item())
                 for depth, s in zip(depths, scores, strict=True) if s is not None
                 for g, (lr, decay) in enumerate(grid)]
        print_tables(args, depths, scores)
        broken = f"; {num_broken} broken pictures left out" if num_broken else ""
        print(f"{len(read[2]):,} test images{broken}:")
        for r in reports:
            by = "" if r["held_out_top1"] is None else f"held-out top-1 {r['held_out_top1']:.4f}   "
            print(f"  {r['features']}, {r['which']}: epoch {r['epoch']}, lr {r['lr']:g}, decay "
                  f"{r['weight_decay']:g}   {by}test top-1 {r['test_top1']:.4f}   top-5 {r['test_top5']:.4f}")
        write_predictions(out / "predictions.csv", read[2], predictions.tolist())
        weight, bias = (chosen[-twice].state_dict()[key][0].cpu() for key in ("weight", "bias"))
        write_atomically(out / "head.pth", dict(weight=weight, bias=bias))
        protocol = "cached centre crops" if args.cached else "augmented crops"
        metrics = dict(checkpoint=args.checkpoint, data=name, protocol=protocol, num_train=len(read[0]),
                       num_held_out=len(read[1]), num_test=len(read[2]), num_broken=num_broken,
                       results=reports, table=table)
        write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
        write(log, dict(step=total_steps, status="done"))
        print(f"done; the backbone is unchanged, bit for bit: checkpoint.pth, head.pth, predictions.csv, "
              f"log.jsonl, metrics.json in {out}")
    return finish()


def average(tensors):
    """Replaces tensors by their means over all processes, in one collective."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def print_tables(args, depths, scores):
    """Held-out top-1 after the last epoch of every head: lr down, weight decay across, * the choice."""
    for depth, score in zip(depths, scores, strict=True):
        if score is None:
            continue
        top1 = score[0].view(len(args.lrs), len(args.weight_decays))
        best = int(top1.argmax())
        print(f"{depth}, held-out top-1 after the last epoch\n  lr \\ decay" +
              "".join(f"{decay:>10g}" for decay in args.weight_decays))
        for i, lr in enumerate(args.lrs):
            cells = [f"{a:.4f}" + ("*" if i * len(args.weight_decays) + j == best else " ")
                     for j, a in enumerate(top1[i].tolist())]
            print(f"  {lr:>10g}" + "".join(f"{cell:>11}" for cell in cells)[1:])
        lr = args.lrs[best // len(args.weight_decays)]
        if len(set(args.lrs)) > 2 and lr in (min(args.lrs), max(args.lrs)):
            print(f"  the choice, lr {lr:g}, is at the edge of --lrs: try some beyond it")


def write_predictions(path, dataset, predictions):
    """A .csv of all images in their order, which cluster_eval.py --predictions reads, too."""
    names = range(len(dataset)) if dataset.images is not None else map(os.fsdecode, dataset.paths)
    text = io.StringIO()
    csv.writer(text).writerows([("image", "label", "prediction"),
                                *zip(names, dataset.labels.tolist(), predictions, strict=True)])
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))


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
