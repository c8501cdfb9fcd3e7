"""Linear classification on frozen features: how well does a hyperplane separate the classes?

    python lincls.py --checkpoint weights/fashion-mnist.pth                         on the CPU or one GPU
    python lincls.py @recipes/fashion_mnist_lincls.txt --checkpoint runs/pretrain/checkpoint.pth
    torchrun --nproc-per-node 8 lincls.py @recipes/resnet50_lincls.txt --checkpoint FILE --data IMAGENET

Each pair of --lrs and --weight-decays trains its own linear classifier (a head), all in one run of the frozen
backbone. Held-out training images choose a head after the last epoch; the test images score that one alone.
The last command is the published protocol: SGD with momentum 0.9, cosine by epoch, random resized crops and
flips; of a ViT the class tokens of the last four blocks. The second computes features once, without crops.
"""

import argparse
import copy
import datetime
import itertools
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import UserError, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from data import Batches, eval_batches, folder_flags, hold_out, input_of, labelled, loader_workers, own_group
from model import BatchNorm, ViT
from optim import cosine, milestone_factor
from predictions import UNREADABLE, accuracies, classify, gather, write_predictions
from pretrained import fingerprint, load_network, network_flags
from run import Run
from views import Views, mirrored

# Feature1 to 5, stem and stages of a ResNet at 224 pixels (Goyal et al. 2019; MMSelfSup 0.x): side of the
# map, kernel, stride and padding of the average over it, places left, so that each has about 9,000 numbers
DEPTHS = ((112, 10, 10, 4, 12), (56, 16, 8, 0, 6), (28, 13, 5, 0, 4), (14, 8, 3, 0, 3), (7, 6, 1, 0, 2))


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    network_flags(parser)
    add = parser.add_argument_group("data and features").add_argument
    add("--data", help="fashion-mnist, mnist, fake, cifar10, cifar100, cifar100-20, stl10, a folder, a "
        "list or shards of labelled pictures; without it the data of the checkpoint")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--n-last-blocks", type=at_least(1), default=4, help="ViT: blocks whose class tokens are joined")
    add("--mean-of-patches", action="store_true", help="ViT: join the mean of the last patch tokens, too")
    add("--depths", action="store_true", help="ResNet: Feature1 to 5, of stem and stages; with batch norm")
    add("--batch-norm", action="store_true", help="batch norm of the features, without scale and shift")
    add("--cached", action="store_true", help="compute the features once, of whole images, or centre crops "
        "of files: another protocol")
    add("--min-scale", type=at_least(0, float), default=0.08, help="smallest share of the area in a crop")
    add("--interpolation", default="bicubic", choices=("bicubic", "bilinear"), help="of every resizing")
    add("--jitter", action="store_true", help="colour jitter and lighting noise, published for Feature1 to 5")
    folder_flags(parser, crops=True)
    add = parser.add_argument_group("heads").add_argument
    add("--lrs", type=at_least(0, float), nargs="+", default=[0.01, 0.03, 0.1, 0.3, 1.0],
        help="learning rates for batch size 256; scaled linearly for others")
    add("--weight-decays", type=at_least(0, float), nargs="+", default=[0.0], help="of weights and biases")
    add("--nesterov", action="store_true", help="Nesterov's momentum")
    add("--milestones", type=at_least(0), nargs="+",
        help="epochs at which the learning rate is divided by 10; without it a cosine")
    add("--held-out", type=at_least(0, float, 1), default=0.1, help="share of the images that chooses a head")
    add("--epochs", type=at_least(1), default=5, help="passes over the data")
    add("--batch-size", type=at_least(1), default=256, help="images in a step, of all processes together")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/lincls", help="folder for everything that is written")
    add("--resume", default="auto", metavar="auto|never|FILE",
        help="auto: from the last checkpoint in --output-dir; never; or a checkpoint file")
    add("--overwrite", action="store_true", help="start anew in a used --output-dir")
    add("--seed", type=at_least(0), default=0, help="of held-out images, initial weights, order, and crops")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to compute")
    add("--amp", default="off", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision of the backbone; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--workers", type=at_least(-1), default=-1,
        help="data-loader workers; -1: one per core for image files, 0 for in-memory sets")
    add("--save-every", type=at_least(1), default=500, help="steps between checkpoints")
    add("--print-every", type=at_least(1), default=50, help="steps between lines of the log")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


def check(args, train, held, test, world_size):
    """Raises UserError for flags that do not go together; each by itself is checked by its type."""
    if args.jitter and args.cached:
        raise UserError("--jitter: --cached takes centre crops as they are; leave one of the two out")
    if not 0 < args.min_scale <= 1:
        raise UserError(f"--min-scale {args.min_scale}: must be above 0 and at most 1")
    if len(args.lrs) * len(args.weight_decays) > 1 and not len(held):
        raise UserError(f"--held-out {args.held_out}: holds out no image to choose one of several --lrs or "
                        "--weight-decays by; hold out more")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the {world_size} processes")
    if args.batch_size > len(train):
        raise UserError(f"--batch-size {args.batch_size}: must be at most the {len(train)} training images")
    if world_size > min(len(test), len(held) or len(test)):
        raise UserError("--data: has fewer images to evaluate than there are processes; use fewer")


# ---------------------------------------------------------------- the frozen network
def build_reader(backbone, args):
    """(names, read): read maps images [B, 3, H, W] to a list of L features, one for each name.

    A feature is [B, D], with --depths a map [B, D, h, w], see pool_depth.
    """
    is_vit = isinstance(backbone, ViT)
    stages = [stage for stage in ("bn1", "layer1", "layer2", "layer3", "layer4") if hasattr(backbone, stage)]
    if args.mean_of_patches and not is_vit:
        raise UserError("--mean-of-patches: this backbone is not a ViT; leave it out")
    if args.depths and "bn1" not in stages:
        raise UserError("--depths: this backbone is not a ResNet; leave it out")
    if is_vit:
        if args.n_last_blocks > len(backbone.blocks):
            raise UserError(f"--n-last-blocks {args.n_last_blocks}: must be at most {len(backbone.blocks)}")
        return ["features"], lambda x: [backbone.features(x, args.n_last_blocks, args.mean_of_patches)]
    if not args.depths:
        return ["features"], lambda x: [backbone(x)]
    maps = []
    for stage in stages:
        getattr(backbone, stage).register_forward_hook(lambda module, inputs, output: maps.append(output))

    def read(x):
        maps.clear()
        backbone(x)
        # bn1 comes before its ReLU, which torchvision applies in place; on the other maps ReLU does nothing
        return [pool_depth(F.relu(feature_map), i) for i, feature_map in enumerate(maps)]
    return [f"Feature{i + 1}" for i in range(len(stages))], read


def pool_depth(feature_map, i):
    """Averages the map [B, D, H, W] of depth i = 0..4 to [B, D, h, w] as its row of DEPTHS says.

    A map of another side is averaged to as many places, or to its own if those are fewer.
    """
    side, kernel, stride, padding, places = DEPTHS[i]
    if feature_map.shape[-1] == feature_map.shape[-2] == side:
        return F.avg_pool2d(feature_map, kernel, stride, padding)
    return F.adaptive_avg_pool2d(feature_map, [min(places, n) for n in feature_map.shape[-2:]])


# ---------------------------------------------------------------- the heads
class Heads(nn.Module):
    """G linear classifiers, side by side, of each of L features; forward: L features -> logits [B, L, G, C].

    features: an example, each [B, D] or [B, D, h, w]. The heads of a feature start from the same weights,
    N(0, 0.01), and bias 0. norm: batch norm before them, over all processes, without scale and shift.
    """

    def __init__(self, features, num_heads, num_classes, norm=False):
        super().__init__()
        self.norms, self.linears = nn.ModuleList(), nn.ModuleList()
        for x in features:
            linear = nn.Linear(x[0].numel(), num_classes)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            self.linears.append(nn.ModuleList(copy.deepcopy(linear) for _ in range(num_heads)))
            self.norms.append(BatchNorm(x.shape[1], affine=False) if norm else nn.Identity())

    def forward(self, features):
        logits = []
        for x, norm, linears in zip(features, self.norms, self.linears, strict=True):
            weight = torch.cat([linear.weight for linear in linears])            # one product for all heads
            bias = torch.cat([linear.bias for linear in linears])
            logits.append(F.linear(norm(x).flatten(1), weight, bias).unflatten(1, (len(linears), -1)))
        return torch.stack(logits, 1)


def build_optimizer(heads, grid, batch_size, nesterov=False):
    """SGD with a group for each head; grid: G pairs (learning rate for batch size 256, weight decay)."""
    groups = []
    for linears in heads.linears:
        for linear, (lr, decay) in zip(linears, grid, strict=True):
            groups.append(dict(params=linear.parameters(), peak_lr=lr * batch_size / 256, weight_decay=decay))
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=nesterov)


def head_losses(logits, labels):
    """Cross-entropy [L, G] of each head, from logits [B, L, G, C] and labels [B]."""
    B, L, G, _ = logits.shape
    labels = labels.repeat_interleave(L * G)
    return F.cross_entropy(logits.flatten(0, 2), labels, reduction="none").view(B, L, G).mean(0)


def cache_features(batches_of_mine, batches, world_size):
    """(tensors, rows) for training: L features [N, ...] and labels [N]; image i reads row rows[i].

    batches_of_mine: of the features of this process's images. An unreadable image has the row of another.
    """
    features = [gather(torch.cat(parts), batches.dataset, world_size)
                for parts in zip(*batches_of_mine, strict=True)]
    readable = (features[0] != UNREADABLE).flatten(1).any(1).cpu()
    rows = torch.arange(len(readable))
    for i in (~readable).nonzero()[:, 0].tolist():
        rows[i] = next(int(other) for other in batches.stand_ins(i) if readable[other])
    return [*features, batches.dataset.labels.to(features[0].device)], rows.to(features[0].device)


def report(names, grid, held_scores, best, test_scores, say):
    """(results, table): for metrics.json the chosen head of each feature, and all heads; says them, too.

    held_scores: top-1 and top-5 [2, L, G] or None; best: chosen heads [L]; test_scores: theirs [2, L].
    """
    results, table = [], []
    for i, name in enumerate(names):
        for g, (lr, decay) in enumerate(grid):
            table.append(dict(features=name, lr=lr, weight_decay=decay))
            if held_scores is not None:
                top1, top5 = held_scores[:, i, g].tolist()
                table[-1] |= dict(held_out_top1=top1, held_out_top5=top5)
                say(f"  {name}, lr {lr:g}, weight decay {decay:g}: held-out top-1 {top1:.4f}")
        (lr, decay), (top1, top5) = grid[best[i]], test_scores[:, i].tolist()
        results.append(dict(table[i * len(grid) + best[i]], test_top1=top1, test_top5=top5))
        say(f"{name}: chosen lr {lr:g}, weight decay {decay:g}; test top-1 {top1:.4f}   top-5 {top5:.4f}")
    return results, table


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
    source["interpolation"] = args.interpolation         # of eval_batches
    data, (size, mean, std) = args.data or source["data"], input_of(source)
    whole, test = labelled(args, source)
    train, held = map(whole.subset, hold_out(whole.labels, args.held_out, args.seed))
    check(args, train, held, test, world_size)
    mine = slice(rank, None, world_size)     # which images of a set this process evaluates
    my_held, my_test = held.subset(mine), test.subset(mine)
    jitter = dict(jitter=(0.4, 0.4, 0.4, 0), jitter_p=1, lighting=0.1) if args.jitter else {}
    crop = dict(scale=(args.min_scale, 1), interpolation=args.interpolation, flip=mirrored(data), **jitter)
    views = Views([(size, crop)], mean, std)
    batches = Batches(train, args.batch_size, views, args.seed, rank, world_size, args.crop_on)
    total_steps = args.epochs * batches.steps_per_epoch

    # ---------------------------------------------------------------- model: a frozen backbone, trained heads
    backbone.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    names, read = build_reader(backbone, args)                                    # of L features

    @torch.no_grad()
    def features_of(x):                      # images [B, 3, h, w] -> L features
        with torch.autocast(device.type, dtype=amp_dtype, enabled=args.amp != "off"):
            return [feature.float() for feature in read(x)]

    def features_in(part):                   # yields those of images as they are; of files, of centre crops
        return map(features_of, eval_batches(part, source, device, args.batch_size, args.workers))

    if world_size > 1:
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
    torch.manual_seed(args.seed)
    grid = list(itertools.product(args.lrs, args.weight_decays))                  # G pairs
    example = features_of(torch.zeros(2, 3, size, size, device=device))
    heads = Heads(example, len(grid), len(train.class_names), args.depths or args.batch_norm).to(device)
    ddp = DistributedDataParallel(heads, broadcast_buffers=False) if world_size > 1 else heads
    optimizer = build_optimizer(heads, grid, args.batch_size, args.nesterov)

    # ---------------------------------------------------------------- resume
    config = dict(vars(args), pictures=whole.files, backbone_sha256=fingerprint(backbone))
    run = Run(args, "lincls", device, total_steps, batches.steps_per_epoch, config)
    run.track(model=heads, optimizer=optimizer)
    if args.cached:
        cached, rows = cache_features(features_in(train.subset(mine)), batches, world_size)
        cached_held = list(features_in(my_held))
    else:
        loader = iter(torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=range(run.start, total_steps), worker_init_fn=own_group,
            **loader_workers(args.workers, batches), pin_memory=device.type == "cuda",
            generator=torch.Generator()))        # else it draws from the generator that a checkpoint keeps

    def score_held():                        # top-1 and top-5 [2, L, G]
        classes = classify(heads, cached_held if args.cached else features_in(my_held))
        return accuracies(classes, my_held.readable().labels, world_size)

    # ---------------------------------------------------------------- train
    widths = ", ".join(f"{name} {x[0].numel()}" for name, x in zip(names, example, strict=True))
    protocol = "whole images (another protocol)" if args.cached else "random crops"
    run.say(f"{len(train):,} images to train on, {len(held):,} held out, {len(test):,} to test on; "
            f"{protocol}; {len(grid)} heads each on {widths}")
    held_scores = None
    heads.train()
    for step in run.steps():                 # saves; ends the run on a signal, or when all heads diverge
        epochs_done = step // batches.steps_per_epoch
        factor = cosine(epochs_done, args.epochs, 1, 0)
        if args.milestones is not None:
            factor = milestone_factor(epochs_done, args.milestones)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]

        # ---- one training step: B images of this process, G heads on each of L features
        if args.cached:
            indices = rows[batches.indices(step)]
            *features, labels = [x[indices] for x in cached]
        else:
            images, uniforms, labels = run.next(loader)
            features = features_of(views(images, uniforms, device)[0])
        labels = labels.to(device, non_blocking=device.type == "cuda")
        losses = head_losses(ddp(features), labels)                               # [L, G]
        optimizer.zero_grad()
        losses.sum().backward()              # a head's gradient comes from its own loss alone
        optimizer.step()
        run.watch(losses.nan_to_num(math.inf, math.inf).min())       # the run ends only if all heads diverge

        if run.logging:
            losses = run.average(losses=losses)["losses"].nan_to_num(math.inf, math.inf)
            line, entry = f"loss {{loss:.3f}}, the lowest of {losses.numel()}", dict(loss=losses.min().item())
            if run.epoch_ends and len(held):
                held_scores = score_held()
                entry["held_out"] = held_scores[0].amax(1).tolist()
                line += " | best on held-out images " + " ".join(f"{top1:.4f}" for top1 in entry["held_out"])
            run.log(line, **entry)

    # ---------------------------------------------------------------- evaluate
    if held_scores is None and len(held):    # the run resumed after its last step
        held_scores = score_held()
    best = held_scores[0].argmax(1) if len(held) else torch.zeros(len(names), dtype=torch.long)
    classes = classify(heads, features_in(my_test))[:, torch.arange(len(names)), best]       # [n, L, 5]
    test_scores = accuracies(classes, my_test.readable().labels, world_size)      # [2, L]
    predictions = gather(classes[:, -1, 0], test, world_size)                     # from the deepest features
    if fingerprint(backbone) != config["backbone_sha256"]:
        raise RuntimeError("the backbone has changed, though it was frozen")

    # ---------------------------------------------------------------- save
    results, table = report(names, grid, held_scores, best, test_scores, run.say)
    if rank == 0:
        write_predictions(run.out / "predictions.csv", test, predictions)
        write_atomically(run.out / "head.pth", heads.linears[-1][best[-1]].cpu().state_dict())
    num_broken = int((predictions == UNREADABLE).sum())
    run.done(dict(checkpoint=args.checkpoint, data=data, protocol=protocol, num_train=len(train),
                  num_held_out=len(held), num_test=len(test) - num_broken, num_broken=num_broken,
                  results=results, table=table), files=["head.pth", "predictions.csv"])


if __name__ == "__main__":
    launch(main, get_parser())
