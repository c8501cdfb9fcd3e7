"""detect.py: its network, pictures and data sets; VOC and COCO made small, in their formats on disk."""

import functools
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from processes import ROOT, assert_same_run, log_lines, metrics_of, run, same, saved_network, weights
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

import detection_sets
from checkpoint import UserError, load_checkpoint
from cli import parse_args
from data import ImageSet, scenes
from detect import build_detector, decay_groups, get_parser, learning_rate
from detection_sets import (
    CLASSES,
    Bitmaps,
    Steps,
    Whole,
    flipped,
    gather,
    padded,
    read_set,
    read_xml,
    resized,
    scene_pictures,
)
from model import build_backbone, feature_maps, synchronize_batch_norms
from rcnn import RPN, Anchors, Detector, FloatHead, Pooler, box_losses, strides_of

RECIPES = {"voc07_12_fpn": "voc", "voc07_12_c4": "voc", "coco_1x_mask": "coco"}
SMALL = ("--width 8 --convs 1 --fc-width 16 --anchors 16 --rois 8 --pre-nms 40 30 --post-nms 20 15 "
         "--batch-size 4 --steps 2 --milestones 1 --warmup-steps 1 --bn-batches 1 --short-sides 32 48 "
         "--test-side 40 --long-side 64 --anchor-scale 4 --print-every 1")
TINY = dict(anchor_scale=4, width=8, convs=1, fc_width=16, anchors=16, rois=8, pre_nms=(40, 30),
            post_nms=(20, 15))


# ---------------------------------------------------------------- the network
def test_anchors_are_detectron2s():
    """sqrt(area / ratio) wide, not rounded; on the strides, also where a map's size is odd."""
    anchors = Anchors([4, 8], [[32], [64, 128]])
    assert anchors.num_anchors_per_location() == [3, 6]
    maps = [torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 2, 2)]
    one, two = anchors(ImageList(torch.zeros(2, 3, 12, 16), [(12, 16), (9, 16)]), maps)
    assert one.equal(two) and one.shape == (3 * 4 * 3 + 2 * 2 * 6, 4) and one.dtype == torch.float32
    torch.testing.assert_close(one[0], torch.tensor([-22.627417, -11.3137085, 22.627417, 11.3137085]))
    torch.testing.assert_close(one[1], torch.tensor([-16.0, -16, 16, 16]))
    torch.testing.assert_close(one[3 * 5 + 1], torch.tensor([-12.0, -12, 20, 20]))       # row 1, column 1
    torch.testing.assert_close(one[-5], torch.tensor([-24.0, -24, 40, 40]))
    theirs = AnchorGenerator(((32,), (64, 128)), ((0.5, 1.0, 2.0),) * 2)
    theirs.cell_anchors = anchors.cells                                    # theirs would be rounded
    sizes = ImageList(torch.zeros(1, 3, 16, 16), [(16, 16)])
    maps = [torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 2, 2)]
    assert anchors(sizes, maps)[0].equal(theirs(sizes, maps)[0])


def test_pooling_is_that_of_the_boxs_level():
    """Aligned, with as many points as needed; 224 × 224 lies on stride 16, half of that on stride 8."""
    g = torch.Generator().manual_seed(0)
    maps = {str(s): torch.randn(2, 3, 512 // s, 512 // s, generator=g) for s in (4, 8, 16, 32)}
    maps["pool"] = torch.randn(2, 3, 8, 8, generator=g)                    # of the RPN alone
    sides = {5: 4, 111: 4, 113: 8, 223: 8, 224: 16, 447: 16, 448: 32, 500: 32}
    boxes = [torch.tensor([[3.3, 7.7, 3.3 + side, 7.7 + side] for side in sides]), torch.zeros(0, 4)]
    pooled = Pooler([4, 8, 16, 32], 7)(maps, boxes, None)
    for box, stride, found in zip(boxes[0], sides.values(), pooled, strict=True):
        roi = torch.cat([torch.zeros(1), box])[None]
        expected = roi_align(maps[str(stride)], roi, 7, 1 / stride, sampling_ratio=0, aligned=True)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    second = Pooler([4, 8, 16, 32], 7)(maps, [boxes[1], boxes[0][:1]], None)
    expected = roi_align(maps["4"], torch.cat([torch.ones(1), boxes[0][0]])[None], 7, 0.25, 0, True)
    assert second.equal(expected)


def test_losses_are_plain_l1():
    scores = torch.randn(4, 3)
    deltas, wanted = torch.randn(4, 12), torch.randn(4, 4)
    labels = torch.tensor([0, 2, 1, 0])
    losses = box_losses(scores, deltas, labels, wanted)
    far = (deltas[1, 8:] - wanted[1]).abs().sum() + (deltas[2, 4:8] - wanted[2]).abs().sum()
    torch.testing.assert_close(losses["boxes"], far / 4)
    torch.testing.assert_close(losses["classes"], -scores.log_softmax(1)[range(4), labels].mean())
    rpn = RPN(Anchors([4], [[16]]), FloatHead(4, 3), 0.7, 0.3, 6, 0.5, {}, {}, 0.7)
    objectness, deltas, wanted = torch.randn(10), torch.randn(10, 4), torch.randn(2, 5, 4)
    labels = [torch.tensor([1.0, 0, 0, -1, -1]), torch.tensor([-1.0, 0, -1, -1, -1])]      # fewer than 6
    loss, boxes = rpn.compute_loss(objectness, deltas, labels, list(wanted))
    expected = sum(math.log1p(math.exp(x)) for x in (-objectness[0], *objectness[[1, 2, 6]]))
    assert loss.item() == pytest.approx(expected / 12, rel=1e-5)
    torch.testing.assert_close(boxes, (deltas[0] - wanted[0, 0]).abs().sum() / 12)


@pytest.mark.parametrize("arch, small, stages, strides", [
    ("resnet8", False, ["layer2", "layer3"], [4, 8]), ("resnet8_2x2", True, ["layer3"], [4]),
    ("resnet18", False, ["layer1", "layer2", "layer3", "layer4"], [4, 8, 16, 32]),
    ("resnet18", True, ["layer3", "layer4"], [4, 8])])
def test_the_pyramid_begins_at_stride_4(arch, small, stages, strides):
    network = Detector(build_backbone(arch, small), 5, **TINY).eval()
    assert network.stages == stages and network.multiple == strides[-1]
    assert network.rpn.anchor_generator.strides == [*strides, 2 * strides[-1]]
    maps = network.maps(torch.zeros(1, 3, 64, 64))
    assert [64 // x.shape[2] for x in maps.values()] == [*strides, 2 * strides[-1]]
    assert {x.shape[1] for x in maps.values()} == {8}


def test_the_published_networks():
    """Sizes and initial weights of the recipes' networks; every batch norm can be synchronised."""
    with torch.device("meta"):               # no memory, no numbers
        network = Detector(build_backbone("resnet50"), 80, masks=True)
        c4 = Detector(build_backbone("resnet50"), 20, "c4")
    counts = {name: sum(p.numel() for p in getattr(network, name).parameters())
              for name in ("backbone", "pyramid", "rpn", "heads")}
    convs = 4 * (256 * 256 * 9 + 512)
    masks = convs + 256 * 256 * 4 + 256 + 256 * 80 + 80
    assert counts["backbone"] == 23508032                                  # ResNet-50 without its classifier
    assert counts["pyramid"] == 256 * (256 + 512 + 1024 + 2048) + 4 * 256 * 256 * 9 + 8 * 512
    assert counts["rpn"] == 256 * 256 * 9 + 256 + 257 * 3 * 5
    assert counts["heads"] == masks + convs + (256 * 49 + 1) * 1024 + 1025 * 81 * 5
    assert len({*map(id, network.parameters())}) == len([*network.named_parameters()])
    assert (c4.stages, c4.multiple, c4.rpn.anchor_generator.strides) == (["layer3"], 1, [16])
    assert sum(p.numel() for p in c4.heads.parameters()) == 2049 * 21 * 5  # the last stage is the backbone's
    assert sum(p.numel() for p in c4.norm.parameters()) == 2 * 2048
    network = Detector(build_backbone("resnet8"), 80, masks=True)
    predictor = network.heads.box_predictor
    assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert network.heads.mask_predictor.mask_fcn_logits.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not any(value.any() for name, value in network.heads.named_parameters() if name.endswith("bias"))
    c4 = Detector(build_backbone("resnet18"), 20, "c4")
    assert (c4.rpn.anchor_generator.cells[0][1::3, 2] * 2).tolist() == [32, 64, 128, 256, 512]
    assert c4.maps(torch.zeros(1, 3, 64, 64))["layer3"].shape == (1, 256, 4, 4)
    assert c4.run_last_stage(torch.randn(3, 256, 14, 14)).shape == (3, 512)


def targets_of(count, size=64):
    made = scenes("train", count, size, 0)
    targets = [dict(boxes=boxes, labels=labels, masks=masks) for boxes, labels, masks in
               zip(made.boxes, made.labels, made.masks, strict=True)]
    return made.images.float() / 255, [(size, size)] * count, targets


@pytest.mark.parametrize("neck, masks", [("fpn", False), ("fpn", True), ("c4", False)])
def test_every_weight_learns_and_pictures_may_be_empty(neck, masks):
    """Also where no picture has an object: processes would wait for the gradient that is missing."""
    torch.manual_seed(0)
    network = Detector(build_backbone("resnet8"), 10, neck, masks, **TINY)
    x, sizes, targets = targets_of(2)
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long),
                   masks=torch.zeros(0, 64, 64, dtype=torch.bool))
    for part in (targets, [nothing, targets[1]], [nothing, nothing]):
        before = [target["labels"].clone() for target in part]
        losses = network(x, sizes, part)
        assert [*losses] == ["objects", "proposals", "classes", "boxes"] + ["mask"] * masks
        network.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        assert all(target["labels"].equal(b) for target, b in zip(part, before, strict=True))
    assert losses["boxes"] == losses["proposals"] == 0 and (not masks or losses["mask"] == 0)
    found = network.eval()(x, sizes)
    for picture in found:
        assert {*picture["labels"].tolist()} <= {*range(10)} and len(picture["boxes"]) <= 100
        assert not masks or picture["masks"].shape[1:] == (28, 28)
        assert (picture["boxes"] >= 0).all() and (picture["boxes"] <= 64).all()


def one_without_objects(rank, world_size, store):
    """A step of two processes. The second one has no object, so its mask head has no row."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    network = Detector(build_backbone("resnet8"), 10, masks=True, **TINY)
    synchronize_batch_norms(network)
    x, sizes, targets = targets_of(2)
    if rank == 1:
        targets = [{name: value[:0] for name, value in target.items()} for target in targets]
    ddp = nn.parallel.DistributedDataParallel(network)
    sum(ddp(x, sizes, targets).values()).backward()
    for name, value in [*network.named_buffers(), *((n, p.grad) for n, p in network.named_parameters())]:
        assert value.isfinite().all(), name
    norms = torch.stack([p.grad.norm() for p in network.heads.mask_head.parameters()])
    assert norms.max() > 0
    both = [torch.empty_like(norms) for _ in range(world_size)]
    dist.all_gather(both, norms)
    assert both[0].equal(both[1])
    dist.destroy_process_group()


def test_a_process_without_objects_takes_part(tmp_path):
    mp.start_processes(one_without_objects, (2, tmp_path / "store"), 2, start_method="forkserver")


def test_class_0_is_an_object_not_the_background():
    """A network that learns one scene by heart finds its classes, masks and boxes."""
    torch.manual_seed(0)
    network = Detector(build_backbone("resnet8"), 10, "fpn", True, **TINY | dict(width=16, rois=16))
    x, sizes, targets = targets_of(1)
    targets[0]["labels"] = torch.zeros_like(targets[0]["labels"])
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        sum(network(x, sizes, targets).values()).backward()
        optimizer.step()
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.momentum = 1.0
    network(x, sizes, targets)
    found = network.eval()(x, sizes)[0]
    assert len(found["labels"]) and found["labels"].eq(0).all() and found["scores"][0] > 0.2


def test_other_networks_are_refused_by_name(here, tmp_path):
    file = saved_network(tmp_path / "a.pth", "--data fake --image-size 16 --num-classes 12 --arch vit_t")
    flags = f"--num-scenes 4 2 --batch-size 2 --output-dir {tmp_path}/run"
    _, err = here(f"detect.py --checkpoint {file} {flags}", 2)
    assert err.count("\n") == 1 and "its vit_t does not detect: a ViT" in err and "use a ResNet" in err
    assert not (tmp_path / "run").exists()
    args = parse_args(get_parser(), ["--checkpoint", "FILE"])
    for arch, kind in (("mobilenet_v3_large", "MobileNetV3"), ("efficientnet_b0", "EfficientNet")):
        said = f"FILE: its {arch} does not detect: a {kind}"
        with torch.device("meta"), pytest.raises(UserError, match=said):
            build_detector(build_backbone(arch), 10, args, arch)


def test_strides_are_seen_and_nothing_changes():
    maps = feature_maps(build_backbone("resnet18"), ["layer2", "layer4"])
    before = {name: value.clone() for name, value in maps.state_dict().items()}
    assert strides_of(maps) == {"layer2": 8, "layer4": 32} and maps.training
    assert same(before, dict(maps.state_dict()))


def test_schedule_and_groups():
    assert learning_rate(0, 100, 0.02, 10, [60, 80]) == pytest.approx(0.02 / 1000)
    assert learning_rate(5, 100, 0.02, 10, [60, 80]) == pytest.approx(0.02 * (0.0005 + 0.5))
    rates = [learning_rate(step, 100, 0.02, 10, [60, 80]) for step in (10, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert learning_rate(50, 100, 0.02, 0, None) == pytest.approx(0.01)
    network = Detector(build_backbone("resnet8"), 5, **TINY)
    others, norms = decay_groups(network, 0.1)
    assert (others["weight_decay"], norms["weight_decay"]) == (0.1, 0)
    count = 2 * sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert len(norms["params"]) == count and all(p.dim() == 1 for p in norms["params"])
    assert len(norms["params"]) + len(others["params"]) == len([*network.parameters()])
    biases = [network.heads.box_predictor.cls_score.bias, network.rpn.head.cls_logits.bias]
    assert all(any(bias is p for p in others["params"]) for bias in biases)


# ---------------------------------------------------------------- pictures
def test_boxes_and_masks_follow_their_picture():
    """Squares of one colour each, resized and mirrored: the pixels of a box and of a mask have its colour."""
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    boxes = torch.tensor([[4.0, 8, 20, 24], [32, 4, 56, 36]])
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    for i, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[i, top:bottom, left:right] = 255
        masks[i, top:bottom, left:right] = True
    pictures = detection_sets.Pictures(
        ImageSet(image[None], None, None), [0], torch.tensor([[40, 60]]), torch.tensor([0, 2]), boxes,
        torch.tensor([3, 5]), torch.zeros(2, dtype=torch.bool), [""] * 10, Bitmaps(masks))
    steps = Steps(pictures, 1, [20, 60, 80], 100, 8, (0.0,), (1.0,), True, 0)
    shapes, seen = set(), set()
    for step in range(24):
        x, [(h, w)], [target] = steps[step]
        assert x.shape[2] % 8 == 0 and x.shape[3] % 8 == 0 and x.shape[2] - h < 8 and not x[:, :, h:].any()
        shapes.add((h, w))
        for i, (box, mask) in enumerate(zip(target["boxes"], target["masks"], strict=True)):
            left, top, right, bottom = box.round().int().tolist()
            inside = torch.zeros(h, w, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            colour = x[0, i, :h, :w] > 0.5
            assert (mask != inside).float().mean() < 0.02 and (colour != inside).float().mean() < 0.02
        seen.add(bool(target["boxes"][0, 0] < target["boxes"][1, 0]))
        assert target["labels"].tolist() == [3, 5]
        assert x.nbytes + target["masks"].nbytes <= steps.item_bytes
    assert shapes == {(20, 30), (60, 90), (67, 100)}             # 80 × 120 would be too long
    whole = Whole(pictures, 40, 60, 4, (0.0,), (1.0,))
    assert whole.item_bytes == whole[0][2].nbytes
    assert seen == {True, False}


def test_steps_are_functions_of_seed_and_step_for_any_number_of_processes():
    pictures = scene_pictures("train", "images", 8, 48, 0)

    def item(step, *args, seed=0):
        return Steps(pictures, 4, [32, 40, 48], 0, 8, (0.3,), (0.4,), False, seed, *args)[step]
    x, sizes, targets = item(5)
    for rank in range(2):
        mine, own, parts = item(5, rank, 2)
        assert own == sizes[2 * rank:2 * rank + 2] and same(parts, targets[2 * rank:2 * rank + 2])
        assert mine.equal(x[2 * rank:2 * rank + 2, :, :mine.shape[2], :mine.shape[3]])
    assert not same(item(5, seed=1)[2], targets) and not same(item(6)[2], targets) and len({*sizes}) > 1
    x, target = torch.rand(3, 4, 10), dict(boxes=torch.tensor([[1.0, 0, 4, 2]]))
    assert flipped(x, target)[1]["boxes"].tolist() == [[6, 0, 9, 2]]


def test_sizes_are_detectron2s():
    """The shorter side, unless the longer one were too long; rounded; bilinear as Pillow does it."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (37, 50, 3)).astype(np.uint8)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)
    for side, longest, (h, w) in ((30, 0, (30, 41)), (80, 100, (74, 100)), (37, 0, (37, 50)),
                                  (20, 20, (15, 20))):
        x = resized(picture, side, longest, (0.5,), (0.5,))
        assert x.shape == (3, h, w)
        expected = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR))
        expected = torch.from_numpy(expected.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        assert (x - expected).abs().max() < 1.01 / 127.5
    x, sizes = padded([torch.ones(3, 5, 9), torch.ones(3, 8, 4)], 8)
    assert x.shape == (2, 3, 8, 16) and sizes == [(5, 9), (8, 4)] and x.sum() == 3 * (45 + 32)


# ---------------------------------------------------------------- data sets, in their formats on disk
def picture(path, rng, objects=()):
    """Writes a picture with a rectangle for each of some boxes; returns (height, width)."""
    height, width = rng.integers(36, 48), rng.integers(40, 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return int(height), int(width)


XML = """<annotation><folder>VOC</folder><filename>other.jpg</filename>
<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>0</truncated>{difficult}<bndbox>
<xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox><part><name>head</name>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def annotation(path, height, width, objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ""
    for name, box, hard in objects:
        hard = "" if hard is None else f"<difficult>{hard}</difficult>"
        text += OBJECT.format(*box, name=name, difficult=hard)
    path.write_text(XML.format(height=height, width=width, objects=text))


def make_voc(root, rng):
    for year, part, count in (("2007", "trainval", 4), ("2012", "trainval", 5), ("2007", "test", 4)):
        folder, names = root / f"VOCdevkit/VOC{year}", [f"{year}_{part[:2]}{i}" for i in range(count)]
        (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (folder / f"ImageSets/Main/{part}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            height, width = picture(folder / f"JPEGImages/{name}.jpg", rng)
            objects = [("dog", (1, 1, width, height), 0), ("person", (5, 6, 30, 28), i % 2)][:1 + i % 3]
            objects += [("tvmonitor", (10.6, 3, 20, 35), None)] * (i == 3)
            annotation(folder / f"Annotations/{name}.xml", height, width, objects)


def make_coco(root, rng):
    ids = [(90, "toothbrush"), (1, "person"), (13, "stop sign")]           # not in their order, with gaps
    for part, count in (("train2017", 7), ("val2017", 4)):
        images, annotations = [], []
        for i in range(count):
            name = f"{i:012d}.jpg"
            height, width = picture(root / part / name, rng)
            images.append(dict(id=100 - i, file_name=name, height=height, width=width))
            for j in range(i % 3):                                         # of every third there is nothing
                x, y, w, h = 4 + 9 * j, 5, 20, 24
                rings = [[x, y, x + w, y, x + w, y + h], [x, y, x + w, y + h, x, y + h]][:1 + j]
                annotations.append(dict(id=len(annotations) + 1, image_id=100 - i, category_id=ids[j][0],
                                        bbox=[x, y, w, h], area=w * h, iscrowd=0, segmentation=rings))
        crowd = dict(id=77, image_id=100, category_id=1, bbox=[0, 0, 30, 30], area=900, iscrowd=1,
                     segmentation=dict(size=[images[0]["height"], images[0]["width"]],
                                       counts=[0, images[0]["height"] * images[0]["width"]]))
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{part}.json").write_text(json.dumps(dict(
            images=images, annotations=[*annotations, crowd],
            categories=[dict(id=i, name=name, supercategory="") for i, name in ids])))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """--data-dir with VOC and COCO, small."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    make_voc(root, rng)
    make_coco(root, rng)
    return root


def of_these_sizes():
    """From now on this process takes the small sets for whole."""
    detection_sets.SIZES = dict(voc=(9, 4), coco=(7, 4))


@pytest.fixture
def small_sets(sets, monkeypatch):
    monkeypatch.setattr(detection_sets, "SIZES", detection_sets.SIZES)
    of_these_sizes()
    return sets


def command(network, out, sets, recipe, more=""):
    return (f"detect.py @{ROOT}/recipes/{recipe}.txt --checkpoint {network} --data-dir {sets} {SMALL} "
            f"--output-dir {out} {more}")


def test_voc_is_read_as_published(small_sets):
    """Trainval of both years, difficult objects too, parts of objects not, numbers from 1 become from 0."""
    train, test = read_set("voc", small_sets, None, None, 0)
    assert train.names == [f"2007_tr{i}" for i in range(4)] + [f"2012_tr{i}" for i in range(5)]
    assert test.names == [f"2007_te{i}" for i in range(4)] and train.class_names == sorted(CLASSES)
    assert train.firsts.diff().tolist() == [1, 2, 2, 2, 1, 2, 2, 2, 2]
    target, (height, width) = train.target(3), train.sizes[3].tolist()
    assert train.images[3].shape == (3, height, width)
    assert target["boxes"].tolist() == [[0, 0, width, height], [pytest.approx(9.6), 2, 20, 35]]
    assert [train.class_names[label] for label in target["labels"]] == ["dog", "tvmonitor"]
    assert train.difficult.tolist() == [False, False, True, False, False, False, False, False, False, True,
                                        False, False, False, False, False, False][:len(train.difficult)]
    with pytest.raises(UserError, match="--masks: VOC has no masks.*leave it out"):
        read_set("voc", small_sets, None, None, 0, masks=True)


def test_coco_is_read_as_published(small_sets):
    """Classes by their numbers; crowds are left out, and for training the pictures without anything else."""
    train, test = read_set("coco", small_sets, None, None, 0, masks=True)
    assert train.class_ids == (1, 13, 90) and train.class_names == ["person", "stop sign", "toothbrush"]
    assert train.names == [95, 96, 98, 99] and test.names == [97, 98, 99, 100]           # by number
    assert [os.path.basename(os.fsdecode(path)) for path in train.images.paths] == [
        f"{i:012d}.jpg" for i in (5, 4, 2, 1)]
    assert train.labels.tolist() == [2, 0, 2, 2, 0, 2] and train.firsts.tolist() == [0, 2, 3, 5, 6]
    assert train.target(0)["boxes"].tolist() == [[4, 5, 24, 29], [13, 5, 33, 29]]
    assert train.images[1].shape[1:] == tuple(train.sizes[1].tolist()) and test.firsts[-1] == 3
    own = tuple(train.sizes[0].tolist())
    half, whole = (train.masks.draw(number, own, own) for number in (0, 1))
    assert whole.sum() == pytest.approx(20 * 24, abs=2) and whole[5:29, 13:33].float().mean() > 0.98
    assert half.sum() == pytest.approx(240, abs=20) and half[6, 23] and not half[27, 5]  # a triangle
    double = train.masks.draw(1, own, (2 * own[0], 2 * own[1]))
    assert double[10:58, 26:66].float().mean() > 0.98 and double.sum() < 2000


def test_published_sizes_are_demanded(sets, here, network, tmp_path):
    for recipe, numbers in (("voc07_12_fpn", "9 training images instead of 16,551"),
                            ("coco_1x_mask", "7 training images instead of 118,287")):
        _, err = here(command(network, tmp_path / "out", sets, recipe), 2)
        assert err.count("\n") == 1 and f"it has {numbers}, so it is not whole; place" in err
        _, err = here(command(network, tmp_path / "out", tmp_path, recipe), 2)
        assert err.count("\n") == 1 and "there is no" in err and "in --data-dir" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_of_a_recipe_in_one_and_two_processes(recipe, small_sets, network, here, tmp_path):
    """Processes draw their own anchors and boxes, so their weights are not those of one process."""
    here(command(network, tmp_path / "one", small_sets, recipe, "--workers 0"))
    run(command(network, tmp_path / "two", small_sets, recipe, "--workers 1"), ranks=2,
        prepare=of_these_sizes)
    for folder in ("one", "two"):
        metrics = metrics_of(tmp_path / folder)
        assert (metrics["num_train"], metrics["num_test"], metrics["num_broken"]) == (
            {"voc": 9, "coco": 4}[RECIPES[recipe]], 4, 0)
        assert 0 <= metrics["AP"] <= metrics["AP50"] < 0.9
        assert ("mask_AP50" in metrics) == ("mask" in recipe) and ("AR100" in metrics) == ("coco" in recipe)
        entries = json.loads((tmp_path / folder / "detections.json").read_text())
        for entry in entries[:3]:
            keys = ["image_id", "category_id", "bbox", "score"] + ["segmentation"] * ("mask" in recipe)
            assert [*entry] == keys
        assert all(value.isfinite().all() for value in weights(tmp_path / folder).values())
        assert Image.open(tmp_path / folder / "detections.png").size[0] > 100
    assert log_lines(tmp_path / "two")[0]["config"]["world_size"] == 2
    one, two = (torch.load(tmp_path / f"{folder}/backbone.pth", weights_only=True)
                for folder in ("one", "two"))
    assert one.keys() == two.keys() == build_backbone("resnet8").state_dict().keys()
    entry = [line for line in log_lines(tmp_path / "one") if "loss" in line][0]
    assert entry["loss"] == pytest.approx(sum(entry[name] for name in (
        "objects", "proposals", "classes", "boxes", "mask") if name in entry), rel=1e-4)


def die_in_step(number):
    import detect
    of_these_sizes()
    rate_of = detect.learning_rate

    def rate_or_die(step, *args):
        if step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return rate_of(step, *args)
    detect.learning_rate = rate_or_die


@pytest.mark.parametrize("recipe", [pytest.param("voc07_12_fpn", marks=pytest.mark.slow), "coco_1x_mask"])
def test_killed_and_resumed_with_files(recipe, small_sets, network, here, tmp_path):
    """One run of three steps; another is killed in the third, and goes on with workers: the same bits."""
    flags = "--save-every 1 --steps 3 --milestones 2 --workers"
    here(command(network, tmp_path / "straight", small_sets, recipe, f"{flags} 0"))
    part = command(network, tmp_path / "run", small_sets, recipe, f"{flags} 2")
    run(part, code=-9, prepare=functools.partial(die_in_step, 2))
    assert load_checkpoint(tmp_path / "run/checkpoint.pth")["step"] == 2
    run(part, prepare=of_these_sizes)
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    one, two = (tmp_path / folder / "detections.json" for folder in ("straight", "run"))
    assert one.read_bytes() == two.read_bytes()


# ---------------------------------------------------------------- hostile files
BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;">]>'


@pytest.mark.parametrize("change, says", [
    (lambda text: BOMB + text, "it has a DOCTYPE"),
    (lambda text: (BOMB + text).encode("utf-16"), "DOCTYPE"),
    (lambda text: text + " " * 2 ** 20, "more than 1,048,576 bytes"),
    (lambda text: text[:200], "no element found|unclosed"),
    (lambda text: text.replace("<name>dog</name>", "<name>wolf</name>"), "'wolf' is no class of VOC"),
    (lambda text: text.replace("<xmin>1</xmin>", "<xmin>left</xmin>", 1), "could not convert"),
    (lambda text: text.replace("<height>", "<tall>").replace("</height>", "</tall>"), "not an annotation"),
    (lambda text: "no xml", "not an annotation of VOC"), (lambda text: b"\x00\xff" * 40, "not an annotation"),
    (lambda text: "<a>" * 20000, "not an annotation")])
def test_an_annotation_that_is_none_is_named(change, says, sets, tmp_path):
    text = (sets / "VOCdevkit/VOC2007/Annotations/2007_tr0.xml").read_text()
    changed, path = change(text), tmp_path / "2007_tr0.xml"
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(UserError, match=says) as error:
        read_xml(path)
    assert "2007_tr0.xml" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("; fetch it again")


@pytest.mark.parametrize("change, says", [
    (lambda content: content["annotations"][0].pop("bbox"), "no 'bbox'"),
    (lambda content: content["annotations"][0].update(category_id=5), "no 5"),
    (lambda content: content["annotations"][0].update(image_id=5), "no 5"),
    (lambda content: content["annotations"][0].update(bbox=[1, 2, 3]), "unpack"),
    (lambda content: content["annotations"][0].update(bbox=["a", 2, 3, 4]), "could not convert"),
    (lambda content: content["annotations"][0].update(segmentation=dict(counts=[3])), "no polygon"),
    (lambda content: content["images"][0].update(file_name="../../etc/passwd"), "no name of a picture"),
    (lambda content: content["images"][0].update(file_name=3), "not annotations"),
    (lambda content: content["images"][0].pop("height"), "no 'height'"),
    (lambda content: content.pop("categories"), "no 'categories'")])
def test_annotations_of_coco_that_are_none_are_named(change, says, sets, tmp_path):
    path = tmp_path / "annotations/instances_train2017.json"
    path.parent.mkdir()
    content = json.loads((sets / "annotations/instances_train2017.json").read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=says) as error:
        detection_sets.read_coco(tmp_path, "train2017", "images", True)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and message.endswith("fetch it again")
    for text in ("", "[]", "[" * 100000, "{", "3", '{"images": 3}', "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match="not annotations of COCO"):
            detection_sets.read_coco(tmp_path, "train2017", "images", True)


def test_rings_of_fewer_than_three_points_are_left_out(sets, tmp_path):
    """As in detectron2; an object without another ring is no object to learn from."""
    path = tmp_path / "annotations/instances_train2017.json"
    path.parent.mkdir()
    content = json.loads((sets / "annotations/instances_train2017.json").read_text())
    first, second = (item for item in content["annotations"][:2])
    sound = len(detection_sets.read_coco(sets, "train2017", "images", True).labels)
    first["segmentation"] = [*first["segmentation"], [1, 2, 3, 4]]
    second["segmentation"] = [[1, 2, 3, 4, 5]]
    path.write_text(json.dumps(content))
    assert len(detection_sets.read_coco(tmp_path, "train2017", "images", True).labels) == sound - 1
    assert len(detection_sets.read_coco(tmp_path, "train2017", "images", False).labels) == sound


def test_boxes_without_area_are_left_out_and_others_refused(capsys):
    rows = [("a", "a.jpg", (10, 10), [((1, 1, 1, 5), 0, False), ((1, 1, 4, 5), 1, False)]),
            ("b", "b.jpg", (10, 10), [((2, 3, 7, 3), 2, False)])]
    pictures = gather("images", rows, ["x", "y", "z"])
    assert pictures.labels.tolist() == [1] and pictures.firsts.tolist() == [0, 1, 1]
    assert pictures.target(1)["boxes"].shape == (0, 4) and pictures.target(1)["boxes"].dtype == torch.float32
    assert "images: 2 boxes without area are left out, the first in a.jpg" in capsys.readouterr().out
    for box in ((5, 1, 4, 5), (1, 5, 4, 4), (1, 1, math.nan, 5), (1, 1, math.inf, 5)):
        with pytest.raises(UserError, match="c.jpg: a box from .* has no size; correct its annotation"):
            gather("images", [("c", "c.jpg", (10, 10), [(box, 0, False)])], ["x"])


def test_a_picture_of_another_size_than_annotated_and_a_broken_one(small_sets, network, here, tmp_path):
    shutil.copytree(small_sets, tmp_path / "sets")
    folder = tmp_path / "sets/VOCdevkit/VOC2007/JPEGImages"
    (folder / "2007_te1.jpg").write_bytes(b"no picture")
    here(command(network, tmp_path / "fine", tmp_path / "sets", "voc07_12_fpn", "--workers 0"))
    metrics = metrics_of(tmp_path / "fine")
    assert (metrics["num_test"], metrics["num_broken"]) == (3, 1)
    Image.new("RGB", (20, 24)).save(folder / "2007_te2.jpg")
    _, err = here(command(network, tmp_path / "run", tmp_path / "sets", "voc07_12_fpn", "--workers 1"), 2)
    assert "2007_te2.jpg: has 20 × 24 pixels, its annotation says" in err.splitlines()[-1]
    assert err.splitlines()[-1].endswith("fetch both again")


def test_without_the_package_coco_is_refused(here, network, sets, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    _, err = here(command(network, tmp_path / "out", sets, "coco_1x_mask"), 2)
    assert "--data coco: needs a package; pip install faster-coco-eval" in err and err.count("\n") == 1


def test_flags_that_do_not_go_together(here, network, tmp_path):
    for flags, says in (("--masks", "--masks: needs the pyramid; add --neck fpn"),
                        ("--batch-size 9", "--batch-size 9: must be at most the 8"),
                        ("--steps 9 --schedule-steps 5", "--schedule-steps 5: must be at least")):
        flags += f" --num-scenes 8 2 --output-dir {tmp_path}/run"
        _, err = here(f"detect.py --checkpoint {network} {flags}", 2)
        assert err.count("\n") == 1 and says in err
    assert not (tmp_path / "run").exists() and get_parser().get_default("data") == "scenes"


def test_schedule_steps_is_the_beginning_of_a_longer_run(here, network, tmp_path):
    small = ("--num-scenes 8 2 --scene-size 32 --short-sides 32 --test-side 32 --batch-size 4 "
             "--rois 8 --bn-batches 0 --warmup-steps 1")
    for flags in (f"--steps 4 --save-every 2 --output-dir {tmp_path}/long",
                  f"--steps 2 --schedule-steps 4 --output-dir {tmp_path}/short"):
        here(f"detect.py --checkpoint {network} {small} {flags}")
    half = load_checkpoint(tmp_path / "long/checkpoint.prev.pth")
    assert half["step"] == 2 and same(half["model"], weights(tmp_path / "short"))


def test_whole_pictures_are_not_mirrored():
    pictures = scene_pictures("val", "images", 2, 48, 0)
    index, own, x, sizes = Whole(pictures, 48, 0, 8, (0.0,), (1.0,))[1]
    assert (index, own, sizes) == (1, (48, 48), [(48, 48)])
    torch.testing.assert_close(x[0], pictures.images[1] / 255)
