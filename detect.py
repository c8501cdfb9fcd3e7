"""Object detection with a pre-trained backbone, as in the paper's Table 5: boxes, and with --masks masks.

    python detect.py --checkpoint weights/fashion-mnist.pth                    scenes, CPU or one GPU
    python detect.py --checkpoint weights/fashion-mnist.pth --random-init      the same network from scratch
    python detect.py --checkpoint weights/fashion-mnist.pth --neck fpn --masks
    torchrun --nproc-per-node 8 detect.py @recipes/voc07_12_fpn.txt --checkpoint FILE --data-dir DATA
    torchrun --nproc-per-node 8 detect.py @recipes/coco_1x_mask.txt --checkpoint FILE --data-dir DATA

The network is Faster R-CNN (rcnn.py), all of which is trained. On scenes and VOC, AP is the mean over ten
overlaps of the mean over classes of VOC's AP of 2007, as in detectron2; on COCO it is COCO's.

Scenes are composed of Fashion-MNIST's clothes. The first command takes 89 seconds of one CPU core; its AP50
is 0.718. The last two are the paper's protocols. They were not run here.
"""

import argparse
import datetime
import json
import math
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import UserError, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from data import input_of, loader_workers, own_group
from detection_metrics import (
    as_published,
    coco_entries,
    coco_numbers,
    mask_overlaps,
    paste,
    voc_average_precision,  # noqa: F401
    voc_numbers,
)
from detection_sets import Steps, Whole, read_set, scaled
from model import build_backbone, reestimate_batch_norms, synchronize_batch_norms
from optim import cosine, milestone_factor
from pictures import draw_detections
from pretrained import fingerprint, load_network, network_flags
from rcnn import Detector
from run import Run

SHOWN = 12                       # test images in detections.png
SAID = ("AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75")


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    add = network_flags(parser).add_argument
    add("--random-init", action="store_true", help="train the same network from scratch, to compare with")
    add("--neck", default="c4", choices=("fpn", "c4"),
        help="fpn: a pyramid of maps; c4: one map, and the last stage as the box head")
    add("--masks", action="store_true", help="find the masks of objects, too: Mask R-CNN; needs --neck fpn")
    add("--width", type=at_least(1), default=32, help="with fpn, channels of the pyramid and of the heads")
    add("--convs", type=at_least(0), default=1, help="with fpn, convolutions of the box head and mask head")
    add("--fc-width", type=at_least(1), default=128, help="with fpn, channels of the box head's last layer")
    add("--anchor-scale", type=at_least(1e-3, float), default=4.0,
        help="side of an anchor in strides of its map")
    add("--anchors", type=at_least(2), default=64, help="anchors of an image that the loss takes")
    add("--rois", type=at_least(1), default=32, help="boxes of an image that the heads are trained on")
    add("--pre-nms", type=at_least(1), nargs=2, default=[200, 200], metavar=("TRAIN", "TEST"),
        help="proposals of each map that are taken")
    add("--post-nms", type=at_least(1), nargs=2, default=[100, 100], metavar=("TRAIN", "TEST"),
        help="proposals of an image that are left after the suppression of overlapping ones")
    add("--pool-side", type=at_least(1), default=6,
        help="positions on a side of what the box head gets of a box")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="scenes", choices=("scenes", "voc", "coco"), help="what to detect in")
    add("--data-dir", default="datasets", help="folder of the data sets")
    add("--num-scenes", type=at_least(1), nargs=2, default=[1000, 200], metavar=("TRAIN", "TEST"),
        help="scenes to train on and to test on")
    add("--scene-size", type=at_least(16), default=96, help="pixels of a side of a scene")
    add("--short-sides", type=at_least(16), nargs="+", default=[96], metavar="PIXELS",
        help="lengths of a training image's shorter side, of which one is drawn for each image")
    add("--test-side", type=at_least(16), default=96, help="the same for a test image")
    add("--long-side", type=at_least(0), default=0,
        help="the longer side is at most this long, whatever the shorter one then is; 0: no limit")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=at_least(1), default=500, help="training steps")
    add("--schedule-steps", type=at_least(0), default=0,
        help="length of the learning rate's schedule, of which a run may be the beginning; 0: --steps")
    add("--batch-size", type=at_least(1), default=8, help="images in a step, of all processes together")
    add("--lr", type=at_least(1e-9, float), default=0.05, help="peak learning rate, whatever the batch size")
    add("--milestones", type=at_least(0), nargs="+",
        help="steps after which the learning rate falls to a tenth; without it, it follows a cosine to 0")
    add("--warmup-steps", type=at_least(0), default=100,
        help="steps over which the learning rate rises linearly from a thousandth")
    add("--weight-decay", type=at_least(0, float), default=1e-4, help="of weights and biases, not of norms")
    add("--bn-batches", type=at_least(0), default=20,
        help="batches that estimate the batch norms of the trained network; 0: keep the running statistics")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/detect", help="folder for everything that is written")
    add("--resume", default="auto", metavar="auto|never|FILE",
        help="auto: from the last checkpoint in --output-dir; never; or a checkpoint file")
    add("--overwrite", action="store_true", help="start anew in a used --output-dir")
    add("--seed", type=at_least(0), default=0, help="of scenes, initial weights, order, sizes, and samples")
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
    if 0 < args.schedule_steps < args.steps:
        raise UserError(f"--schedule-steps {args.schedule_steps}: must be at least --steps, {args.steps}")
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the {world_size} processes")
    if args.batch_size > len(train.images):
        raise UserError(f"--batch-size {args.batch_size}: must be at most the {len(train.images)} images")


def build_detector(backbone, num_classes, args, arch):
    """A Detector with the sizes of the flags. Raises UserError for a backbone that is no ResNet."""
    try:
        return Detector(backbone, num_classes, args.neck, args.masks, args.anchor_scale, args.width,
                        args.convs, args.fc_width, args.anchors, args.rois, args.pre_nms, args.post_nms,
                        args.pool_side)
    except ValueError as error:
        raise UserError(f"{args.checkpoint}: its {arch} does not detect: {error}") from None


def learning_rate(step, total_steps, peak, warmup_steps, milestones):
    """A cosine from `peak` to 0, or a tenth after each milestone; the first steps rise from a thousandth."""
    lr = cosine(step, total_steps, peak, 0)
    if milestones:
        lr = peak * milestone_factor(step, milestones)
    done = min(1, step / warmup_steps) if warmup_steps else 1
    return lr * (0.001 * (1 - done) + done)


def decay_groups(network, weight_decay):
    """Groups of parameters: those that decay, and those of norms, which do not."""
    norms = []
    for module in network.modules():
        if hasattr(module, "running_var"):
            norms += module.parameters()
    of_norms = {*map(id, norms)}
    others = [param for param in network.parameters() if id(param) not in of_norms]
    return [dict(params=others, weight_decay=weight_decay), dict(params=norms, weight_decay=0.0)]


# ---------------------------------------------------------------- evaluation
@torch.inference_mode()
def detect(network, test, args, mean, std, rank, world_size):
    """Of each image of this process (index, prediction), in the image's own pixels; None for a broken one."""
    network.eval()
    device = next(network.parameters()).device
    whole = Whole(test, args.test_side, args.long_side, network.multiple, mean, std)
    loader = torch.utils.data.DataLoader(
        whole, batch_size=None, sampler=range(rank, len(test.images), world_size), worker_init_fn=own_group,
        **loader_workers(args.workers, whole), pin_memory=device.type == "cuda", generator=torch.Generator())
    found = []
    for item in loader:
        if item is None:
            found.append(None)
            continue
        index, own, x, sizes = item
        prediction = network(x.to(device, non_blocking=device.type == "cuda"), sizes)[0]
        prediction = {name: value.cpu() for name, value in prediction.items()}
        prediction["boxes"] = scaled(prediction["boxes"], sizes[0], own)
        seen = (prediction["boxes"][:, 2:] > prediction["boxes"][:, :2]).all(1)
        prediction = {name: value[seen] for name, value in prediction.items()}
        if "masks" in prediction:
            prediction["masks"] = paste(prediction["masks"], prediction["boxes"], own)
        prediction["entries"] = coco_entries(prediction, test.names[index], test.class_ids)
        if test.class_ids and len(found) >= SHOWN:       # run lengths in the entries are much smaller
            prediction.pop("masks", None)
        found.append((index, prediction))
    return found


def score(test, found, masks):
    """The numbers of metrics.json for detections found as by detect(), those of all processes together."""
    if test.class_ids:
        entries = sum((prediction["entries"] for _, prediction in found), [])
        numbers = coco_numbers(test.annotations, entries, "bbox")
        return numbers | (with_prefix(coco_numbers(test.annotations, entries, "segm")) if masks else {})
    targets, predictions = [], []
    for index, prediction in found:
        target = test.target(index)
        targets.append(target | as_published(target["boxes"]))
        predictions.append(prediction | as_published(prediction["boxes"], prediction["scores"]))
        if masks:
            targets[-1]["masks"] = test.masks.masks[test.objects(index)]
    numbers = voc_numbers(predictions, targets, test.class_names)
    if masks:
        numbers |= with_prefix(voc_numbers(predictions, targets, test.class_names, mask_overlaps))
    return numbers


def with_prefix(numbers):
    return {f"mask_{name}": value for name, value in numbers.items()}


def main(args):
    # ---------------------------------------------------------------- ddp: torchrun sets these variables
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device(args.device), dict(backend="gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = dict(backend="nccl", device_id=device)
        torch.cuda.set_device(device)        # no cudnn.benchmark: each batch has its own size
    amp_dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]

    # ---------------------------------------------------------------- data
    if args.masks and args.neck == "c4":
        raise UserError("--masks: needs the pyramid; add --neck fpn")
    backbone, source = load_network(args)
    sha256 = fingerprint(backbone)
    size, mean, std = input_of(source)
    train, test = read_set(args.data, args.data_dir, args.num_scenes, args.scene_size, args.seed, args.masks)
    check(args, train, world_size)

    # ---------------------------------------------------------------- model
    torch.manual_seed(args.seed)
    if args.random_init:
        backbone = build_backbone(source["arch"], source.get("small_images", False))
    network = build_detector(backbone, len(train.class_names), args, source["arch"])
    network.to(device, memory_format=torch.channels_last)
    ddp = network
    if world_size > 1:
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
        synchronize_batch_norms(network)
        network.to(device)
        # buffers are equal anyway: batch norms are synchronised
        ddp = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    torch.manual_seed(args.seed + rank)      # from here on samples of anchors and boxes differ between ranks

    # ---------------------------------------------------------------- optimizer
    optimizer = torch.optim.SGD(decay_groups(network, args.weight_decay), lr=0.0, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # ---------------------------------------------------------------- resume
    config = vars(args) | dict(arch=source["arch"], small_images=source.get("small_images", False),
                               image_size=size, mean=mean, std=std,        # what backbone.json says
                               pictures=[train.images.files, test.images.files],
                               backbone_sha256=sha256)
    run = Run(args, "detect", device, args.steps, args.steps, config)      # the whole run is one epoch
    run.track(model=network, optimizer=optimizer, scaler=scaler)
    batches = Steps(train, args.batch_size, args.short_sides, args.long_side, network.multiple, mean, std,
                    args.masks, args.seed, rank, world_size)
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(run.start, args.steps + args.bn_batches),
        worker_init_fn=own_group, **loader_workers(args.workers, batches),
        pin_memory=device.type == "cuda", generator=torch.Generator()))    # else it draws from the samples'

    # ---------------------------------------------------------------- train
    start = "random weights" if args.random_init else "pre-trained"
    run.say(f"{len(train.images):,} images with {len(train.labels):,} objects to train on, "
            f"{len(test.images):,} to test on; {source['arch']}, {start}")
    network.train()
    for step in run.steps():                 # saves; ends the run on a signal or a number that is not finite
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.schedule_steps or args.steps, args.lr, args.warmup_steps,
                                        args.milestones)

        # ---- one training step: B images of this process
        x, sizes, targets = run.next(loader)                           # [B, 3, H, W], B × (h, w), B dicts
        x = x.to(device, non_blocking=device.type == "cuda", memory_format=torch.channels_last)
        targets = on(device, targets)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=args.amp != "off"):
            losses = ddp(x, sizes, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)           # before the norm, which fp16's scale would multiply
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), math.inf)       # no clipping
        scaler.step(optimizer)
        scaler.update()
        run.watch(loss, norm)

        if run.logging:
            means = run.average(loss=loss, **losses)
            numbers = {name: value.item() for name, value in means.items()}
            run.log(" ".join(f"{name} {{{name}:.3f}}" for name in numbers), **numbers)
        if step + 1 == args.steps and args.bn_batches:       # before the last save; the statistics lag behind
            more = (run.next(loader) for _ in range(args.bn_batches))
            reestimate_batch_norms(network, more, lambda batch: network(
                batch[0].to(device, non_blocking=device.type == "cuda"), batch[1], on(device, batch[2])))

    # ---------------------------------------------------------------- evaluate
    found = detect(network, test, args, mean, std, rank, world_size)
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, found)
        found = sum(parts, [])
    num_broken = found.count(None)
    found = sorted(filter(None, found), key=lambda pair: pair[0])
    numbers = {}
    if rank == 0:
        numbers = score(test, found, args.masks)
        draw_detections(run.out / "detections.png", test, found[:SHOWN])
        entries = sum((prediction["entries"] for _, prediction in found), [])
        write_atomically(run.out / "detections.json", json.dumps(entries).encode())
    said = [f"{name} {value:.4f}" for name, value in numbers.items() if name in SAID]
    run.say(f"{len(found):,} test images: {', '.join(said)}")
    metrics = dict(checkpoint=args.checkpoint, data=args.data, random_init=args.random_init, lr=args.lr,
                   steps=args.steps, num_train=len(train.images), num_test=len(found), num_broken=num_broken)
    run.done(metrics | numbers, files=["detections.json", "detections.png"])


def on(device, targets):
    """Dicts of tensors, moved to the device."""
    moved, on_cuda = [], device.type == "cuda"
    for target in targets:
        moved.append({name: value.to(device, non_blocking=on_cuda) for name, value in target.items()})
    return moved


if __name__ == "__main__":
    launch(main, get_parser())
