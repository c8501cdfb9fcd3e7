"""Semantic segmentation with a pre-trained backbone, as in the paper's Table 6: a class for each pixel.

    python segment.py --checkpoint weights/fashion-mnist.pth                   scenes, CPU or one GPU
    python segment.py --checkpoint weights/fashion-mnist.pth --random-init     the same network from scratch
    torchrun --nproc-per-node 4 segment.py @recipes/voc12aug_fcn.txt --checkpoint FILE --data-dir DATA

The network is MMSegmentation's FCN: the backbone with dilated last stages, a head of three convolutions of
3 × 3, and an auxiliary head on the stage before. All of it is trained. The score is the mean over the classes
of intersection over union (mIoU), counted over the pixels of all test images.

Scenes are composed of Fashion-MNIST's clothes. The first command takes 37 seconds of one CPU core; its mIoU
is 0.397. The last command is most likely how the paper's table was made. It was not run here.
"""

import argparse
import datetime
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import UserError
from cli import DEVICES, HelpFormatter, at_least, launch
from data import input_of, loader_workers, own_group
from model import (
    build_backbone,
    dilate,
    feature_maps,
    reestimate_batch_norms,
    stages_of,
    synchronize_batch_norms,
)
from optim import poly
from pictures import draw_segmentation
from pretrained import fingerprint, load_network, network_flags
from run import Run
from segment_sets import IGNORED, Crops, Whole, ends, read_set

SHOWN = 8                        # test images in segmentation.png


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    add = network_flags(parser).add_argument
    add("--random-init", action="store_true", help="train the same network from scratch, to compare with")
    add("--head-width", type=at_least(1), default=64, help="channels of the head; the auxiliary one has half")
    add("--aux-weight", type=at_least(0, float), default=0.4, help="weight of the auxiliary head's loss")
    add("--dropout", type=at_least(0, float, 1), default=0.1, help="share of the head's channels left out")
    add("--kaiming", action="store_true", help="initialise the heads as MMSegmentation does, for long runs")
    add("--align-corners", action="store_true", help="corner pixels keep their places when maps are enlarged")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="scenes", choices=("scenes", "voc12aug", "cityscapes"), help="what to segment")
    add("--data-dir", default="datasets", help="folder of the data sets")
    add("--num-scenes", type=at_least(1), nargs=2, default=[1000, 200], metavar=("TRAIN", "TEST"),
        help="scenes to train on and to test on")
    add("--short-side", type=at_least(1), default=64, help="shorter side of resized images; size of scenes")
    add("--long-side", type=at_least(0), default=0,
        help="the longer side is at most this long, whatever the shorter one then is; 0: no limit")
    add("--scale-range", type=at_least(0.01, float), nargs=2, default=[1.0, 1.0], metavar=("LOW", "HIGH"),
        help="for training the sides are multiplied by a random number in this range")
    add("--crop-size", type=at_least(9), default=64, help="pixels of a side of the training crops")
    add("--cat-max-ratio", type=at_least(0, float), default=1.0, help="most of a crop that is of one class")
    add("--distortion", action="store_true", help="distort brightness, contrast, saturation, hue at random")
    add("--window", type=at_least(0), default=0, help="side of the windows a test image is cut into; 0: none")
    add("--window-stride", type=at_least(1), default=64, help="pixels from one window to the next")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=at_least(1), default=300, help="training steps")
    add("--batch-size", type=at_least(1), default=8, help="images in a step, of all processes together")
    add("--lr", type=at_least(1e-9, float), default=0.03, help="learning rate of the first step")
    add("--min-lr", type=at_least(0, float), default=1e-4, help="learning rate at the end")
    add("--weight-decay", type=at_least(0, float), default=5e-4, help="of all weights, biases and norms")
    add("--bn-batches", type=at_least(0), default=20,
        help="batches that estimate the batch norms of the trained network; 0: keep the running statistics")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/segment", help="folder for everything that is written")
    add("--resume", default="auto", metavar="auto|never|FILE",
        help="auto: from the last checkpoint in --output-dir; never; or a checkpoint file")
    add("--overwrite", action="store_true", help="start anew in a used --output-dir")
    add("--seed", type=at_least(0), default=0, help="of scenes, initial weights, order, and crops")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to compute")
    add("--amp", default="off", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--workers", type=at_least(-1), default=-1,
        help="data-loader workers; -1: one per core for image files, 0 for in-memory sets")
    add("--save-every", type=at_least(1), default=500, help="steps between checkpoints")
    add("--print-every", type=at_least(1), default=50, help="steps between lines of the log")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


def check(args, train, world_size):
    """Raises UserError for flags that do not go together; each by itself is checked by its type."""
    if args.scale_range[0] > args.scale_range[1]:
        raise UserError("--scale-range: must be two numbers, the lower one first")
    if args.window and args.window_stride > args.window:
        raise UserError(f"--window-stride {args.window_stride}: must be at most --window, {args.window}")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the {world_size} processes")
    if args.batch_size > len(train.images):
        raise UserError(f"--batch-size {args.batch_size}: must be at most the {len(train.images)} images")


# ---------------------------------------------------------------- the network
class Head(nn.Module):
    """MMSegmentation's FCN head: maps [B, inputs, h, w] -> scores [B, num_classes, h, w].

    `convs` convolutions of 3 × 3; with `concatenate` one more of what they make and the input together.
    kaiming: its initialisation. PyTorch's weights are several times smaller, so a step changes them more.
    """

    def __init__(self, inputs, width, num_classes, dropout, kaiming, convs, concatenate):
        super().__init__()
        widths = [inputs] + [width] * convs
        self.convs = nn.Sequential(*[conv_norm_relu(*widths[i:i + 2]) for i in range(convs)])
        self.merge = conv_norm_relu(inputs + width, width) if concatenate else None
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        if kaiming:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.normal_(self.classifier.weight, std=0.01)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        y = self.convs(x)
        if self.merge is not None:
            y = self.merge(torch.cat([x, y], 1))
        return self.classifier(self.dropout(y))


def conv_norm_relu(inputs, outputs):
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class FCN(nn.Module):
    """A dilated ResNet and its heads: images [B, 3, H, W] -> list of scores [B, num_classes, H, W].

    They are the head's, and in training those of the auxiliary head, which trains the stage before the last.
    Changes the backbone. Raises ValueError for another network than a ResNet.
    """

    def __init__(self, backbone, num_classes, width=512, dropout=0.1, kaiming=True, auxiliary=True,
                 align_corners=False):
        super().__init__()
        before, last = stages_of(backbone)[-2:]
        dilate(backbone)
        self.backbone = feature_maps(backbone, [before, last])
        channels = self.backbone.channels
        rest, half = (num_classes, dropout, kaiming), max(1, width // 2)
        self.head = Head(channels[last], width, *rest, convs=2, concatenate=True)
        self.auxiliary = Head(channels[before], half, *rest, 1, concatenate=False) if auxiliary else None
        self.align_corners = align_corners

    def forward(self, x):
        before, last = self.backbone(x).values()
        scores = [self.head(last)]
        if self.training and self.auxiliary is not None:
            scores.append(self.auxiliary(before))
        size, corners = x.shape[2:], self.align_corners
        return [F.interpolate(y, size, mode="bilinear", align_corners=corners) for y in scores]


def pixel_loss(scores, classes):
    """Mean cross-entropy of scores [B, C, H, W] with classes [B, H, W], over all pixels.

    Those of class IGNORED count as 0, as published, and not by a smaller divisor. So the mean over processes
    is that of the whole batch.
    """
    return F.cross_entropy(scores.float(), classes, ignore_index=IGNORED, reduction="none").mean()


# ---------------------------------------------------------------- the score
def confusion_matrix(classes, predictions, num_classes):
    """int64 [C, C]: pixels by true class (row) and predicted class, without those of class IGNORED."""
    counted = classes != IGNORED
    pairs = num_classes * classes[counted].long() + predictions[counted].long()
    return torch.bincount(pairs.flatten(), minlength=num_classes ** 2).view(num_classes, num_classes)


def class_ious(confusion):
    """Intersection over union of each class, float64 [C]; nan for one that is neither there nor predicted.

    confusion: [C, C], pixels of the whole data set by true class and predicted class.
    """
    confusion = torch.as_tensor(confusion).double()
    hits = confusion.diagonal()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


def mean_iou(confusion):
    """Mean of class_ious over the classes that are there or predicted, a float from 0 to 1."""
    return class_ious(confusion).nanmean().item()


# ---------------------------------------------------------------- evaluation
def in_windows(network, x, window, stride):
    """Scores [1, C, H, W] of an image [1, 3, H, W]: means over windows, the last of which end at its borders.

    window: their side; 0: the whole image at once.
    """
    if not window:
        return network(x)[0]
    H, W = x.shape[2:]
    total = count = 0
    for bottom in ends(H, window, stride):
        for right in ends(W, window, stride):
            top, left = max(bottom - window, 0), max(right - window, 0)
            scores, margins = network(x[:, :, top:bottom, left:right])[0], (left, W - right, top, H - bottom)
            total = total + F.pad(scores, margins)
            count = count + F.pad(torch.ones_like(scores[:, :1]), margins)
    return total / count


@torch.inference_mode()
def evaluate(network, test, args, mean, std, rank, world_size):
    """(confusion [C, C] of all images, number of broken ones, [(index, classes, predictions)] to show)."""
    network.eval()
    device, C, shown = next(network.parameters()).device, len(test.class_names), []
    on_cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = args.window > 0         # whole images have many sizes
    whole = Whole(test, (args.short_side, args.long_side), mean, std)
    loader = torch.utils.data.DataLoader(
        whole, batch_size=None, sampler=range(rank, len(test.images), world_size), worker_init_fn=own_group,
        **loader_workers(args.workers, whole), pin_memory=on_cuda, generator=torch.Generator())
    counts = torch.zeros(C * C + 1, dtype=torch.long, device=device)
    for item in loader:
        if item is None:
            counts[-1] += 1
            continue
        index, x, classes = item
        scores = in_windows(network, x.to(device, non_blocking=on_cuda), args.window, args.window_stride)
        scores = F.interpolate(scores, classes.shape, mode="bilinear", align_corners=args.align_corners)
        predictions = scores[0].argmax(0)
        counts[:-1] += confusion_matrix(classes.to(device, non_blocking=on_cuda), predictions, C).flatten()
        if len(shown) < SHOWN:
            shown.append((index, classes, predictions.cpu()))
    if world_size > 1:
        dist.all_reduce(counts)
    return counts[:-1].view(C, C).cpu(), int(counts[-1]), shown


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
    size, mean, std = input_of(source)
    train, test = read_set(args.data, args.data_dir, args.num_scenes, args.short_side, args.seed)
    check(args, train, world_size)
    crops = Crops(train, args.batch_size, args.crop_size, (args.short_side, args.long_side), args.scale_range,
                  args.cat_max_ratio, args.distortion, mean, std, args.seed, rank, world_size)

    # ---------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    if args.random_init:
        backbone = build_backbone(source["arch"], source.get("small_images", False))
    try:
        network = FCN(backbone, len(train.class_names), args.head_width, args.dropout, args.kaiming,
                      args.aux_weight > 0, args.align_corners).to(device, memory_format=torch.channels_last)
    except ValueError as error:
        raise UserError(f"{args.checkpoint}: it is a {source['arch']}; {error}") from None
    ddp = network
    if world_size > 1:
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
        synchronize_batch_norms(network)
        network.to(device)
        ddp = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    torch.manual_seed(args.seed + rank)      # from here on noise (dropout) should differ between ranks

    # ---------------------------------------------------------------- optimizer
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---------------------------------------------------------------- resume
    config = vars(args) | dict(arch=source["arch"], small_images=source.get("small_images", False),
                               image_size=size, mean=mean, std=std,        # what backbone.json says
                               pictures=[train.images.files, test.images.files],
                               backbone_sha256=sha256)
    run = Run(args, "segment", device, args.steps, args.steps, config)     # the whole run is one epoch
    run.track(model=network, optimizer=optimizer, scaler=scaler)
    loader = iter(torch.utils.data.DataLoader(
        crops, batch_size=None, sampler=range(run.start, args.steps + args.bn_batches),
        worker_init_fn=own_group, **loader_workers(args.workers, crops),
        pin_memory=device.type == "cuda", generator=torch.Generator()))    # else it draws from dropout's

    # ---------------------------------------------------------------- train
    run.say(f"{len(train.images):,} images to train on, {len(test.images):,} to test on; {source['arch']}, "
            f"{'random weights' if args.random_init else 'pre-trained'}; {len(train.class_names)} classes")
    network.train()
    for step in run.steps():                 # saves; ends the run on a signal or a number that is not finite
        for group in optimizer.param_groups:
            group["lr"] = poly(step, args.steps, args.lr, args.min_lr)

        # ---- one training step: B images of this process
        x, classes = run.next(loader)                                  # [B, 3, crop, crop], [B, crop, crop]
        x = x.to(device, non_blocking=device.type == "cuda", memory_format=torch.channels_last)
        classes = classes.to(device, non_blocking=device.type == "cuda")
        with torch.autocast(device.type, dtype=amp_dtype, enabled=args.amp != "off"):
            scores, *auxiliary = ddp(x)                                # each [B, C, crop, crop]
        loss = pixel_loss(scores, classes)
        for scores in auxiliary:
            loss = loss + args.aux_weight * pixel_loss(scores, classes)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)           # before the norm, which fp16's scale would multiply
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), math.inf)       # no clipping
        scaler.step(optimizer)
        scaler.update()
        run.watch(loss, norm)

        if run.logging:
            run.log("loss {loss:.3f}", loss=run.average(loss=loss)["loss"].item())
        if step + 1 == args.steps and args.bn_batches:       # before the last save; the statistics lag behind
            batches = (run.next(loader)[0].to(device) for _ in range(args.bn_batches))
            reestimate_batch_norms(network, batches, forward=network)

    # ---------------------------------------------------------------- evaluate
    confusion, num_broken, shown = evaluate(network, test, args, mean, std, rank, world_size)
    ious = class_ious(confusion)
    line, scores = "mIoU {miou:.4f}", dict(miou=mean_iou(confusion))
    if test.class_names[0] == "background":
        line, scores["miou_objects"] = line + ", of the objects {miou_objects:.4f}", ious[1:].nanmean().item()
    if rank == 0:
        draw_segmentation(run.out / "segmentation.png", [(test.images[i], *maps) for i, *maps in shown])
    number = len(test.images) - num_broken
    run.say(f"{number:,} test images: {line.format(**scores)}")
    by_class = zip(test.class_names, ious.tolist(), strict=True)
    scores["iou"] = {name: iou for name, iou in by_class if not math.isnan(iou)}
    metrics = dict(checkpoint=args.checkpoint, data=args.data, random_init=args.random_init, lr=args.lr,
                   steps=args.steps, num_train=len(train.images), num_test=number, num_broken=num_broken)
    run.done(metrics | scores, files=["segmentation.png"])


if __name__ == "__main__":
    launch(main, get_parser())
