"""Average precision beside slow statements of the rules, and beside pycocotools."""

import copy
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from detect import voc_average_precision
from detection_metrics import (
    COCO_NUMBERS,
    as_published,
    coco_entries,
    coco_numbers,
    mask_overlaps,
    paste,
    voc_numbers,
)


def overlap(a, b):
    """Of two boxes, by their pixels; both ends belong to a box."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return width * height / (sum(areas) - width * height)


def slow_average_precision(predictions, targets, c, iou):
    """The rule of the VOC 2007 devkit, one detection after the other, for one class."""
    count = sum(int(label == c and not hard) for t in targets
                for label, hard in zip(t["labels"], t["difficult"], strict=True))
    if count == 0:
        return math.nan
    found = [(score, picture, box) for picture, p in enumerate(predictions)
             for box, label, score in zip(p["boxes"], p["labels"], p["scores"], strict=True) if label == c]
    found.sort(key=lambda one: -one[0])                                    # sort is stable
    right, wrong, taken, curve = 0, 0, set(), []
    for _, picture, box in found:
        best, which = -math.inf, None
        for i, (other, label) in enumerate(zip(targets[picture]["boxes"], targets[picture]["labels"],
                                               strict=True)):
            if label == c and overlap(box, other) > best:
                best, which = overlap(box, other), i
        if best > iou:
            if targets[picture]["difficult"][which]:
                continue
            if (picture, which) not in taken:
                taken.add((picture, which))
                right += 1
            else:
                wrong += 1
        else:
            wrong += 1
        curve.append((Fraction(right, count), right / (right + wrong)))
    tops = [max((p for r, p in curve if r >= Fraction(t, 10)), default=0) for t in range(11)]
    return sum(tops) / 11


def prediction(*rows):
    """rows: (box, label, score)."""
    boxes, labels, scores = zip(*rows, strict=True) if rows else ((), (), ())
    return dict(boxes=torch.tensor(boxes, dtype=torch.float64).view(-1, 4),
                labels=torch.tensor(labels).long(), scores=torch.tensor(scores, dtype=torch.float64))


def target(*rows):
    """rows: (box, label, difficult)."""
    boxes, labels, difficult = zip(*rows, strict=True) if rows else ((), (), ())
    return dict(boxes=torch.tensor(boxes, dtype=torch.float64).view(-1, 4),
                labels=torch.tensor(labels).long(), difficult=torch.tensor(difficult).bool())


A, B, FAR = (0, 0, 9, 9), (20, 20, 39, 29), (70, 70, 80, 80)


@pytest.mark.parametrize("name, predictions, targets, expected", [
    ("all found", [prediction((A, 0, 0.9), (B, 0, 0.8))], [target((A, 0, False), (B, 0, False))], 1),
    ("one of two, so recalls up to 0.5", [prediction((A, 0, 0.9))], [target((A, 0, False), (B, 0, False))],
     6 / 11),
    ("nothing is found", [prediction()], [target((A, 0, False))], 0),
    ("a mistake before it", [prediction((FAR, 0, 0.9), (A, 0, 0.8))], [target((A, 0, False))], 1 / 2),
    ("a mistake behind it costs nothing", [prediction((A, 0, 0.9), (FAR, 0, 0.8))], [target((A, 0, False))],
     1),
    ("the second on one object is wrong", [prediction((A, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7))],
     [target((A, 0, False), (B, 0, False))], (6 + 5 * 2 / 3) / 11),
    ("a difficult one is neither right nor wrong", [prediction((B, 0, 0.9), (B, 0, 0.85), (A, 0, 0.8))],
     [target((A, 0, False), (B, 0, True))], 1),
    ("only difficult ones", [prediction((A, 0, 0.9))], [target((A, 0, True))], math.nan),
    ("objects of another class do not count", [prediction((A, 0, 0.9), (B, 0, 0.8))],
     [target((A, 1, False), (B, 0, False))], 1 / 2),
    ("no object in its picture", [prediction((A, 0, 0.9)), prediction((A, 0, 0.8))],
     [target(), target((A, 0, False))], 1 / 2),
    ("equal scores, in their order", [prediction((FAR, 0, 0.5)), prediction((A, 0, 0.5))],
     [target(), target((A, 0, False))], 1 / 2),
    ("equal scores, the other order", [prediction((A, 0, 0.5)), prediction((FAR, 0, 0.5))],
     [target((A, 0, False)), target()], 1),
    # 10 × 10 and 10 × 5 pixels: 0.5 exactly, which is not more than 0.5; as lengths it would be 36 / 81
    ("an overlap of just 0.5", [prediction(((0, 0, 9, 4), 0, 0.9))], [target((A, 0, False))], 0),
    ("one pixel more", [prediction(((0, 0, 9, 5), 0, 0.9))], [target((A, 0, False))], 1),
    # 7 of 13 as pixels, 6 of 13 as lengths: the + 1 decides
    ("the + 1", [prediction(((3, 0, 12, 0), 0, 0.9))], [target(((0, 0, 9, 0), 0, False))], 1),
    # it overlaps the taken object more than the free one, which it may not have
    ("the best overlap only", [prediction(((0, 0, 9, 9), 0, 0.9), ((0, 0, 9, 9), 0, 0.8))],
     [target(((0, 0, 9, 9), 0, False), ((0, 0, 9, 7), 0, False))], 6 / 11),
])
def test_cases_by_hand(name, predictions, targets, expected):
    ap = voc_average_precision(predictions, targets, 2, 0.5)
    assert ap.shape == (2,) and ap.dtype == np.float64
    assert ap[0] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert slow_average_precision(predictions, targets, 0, 0.5) == pytest.approx(expected, nan_ok=True)


def random_set(rng):
    """Pictures with objects and detections near them, with ties, duplicates, and difficult objects."""
    predictions, targets, C = [], [], int(rng.integers(1, 5))
    for _ in range(rng.integers(0, 6)):
        def boxes(count):
            corner = rng.integers(0, 30, (count, 2))
            return np.concatenate([corner, corner + rng.integers(0, 25, (count, 2))], 1).astype(float)
        wanted = boxes(rng.integers(0, 7))
        near = wanted[rng.integers(0, max(1, len(wanted)), rng.integers(0, 9) if len(wanted) else 0)]
        found = np.concatenate([near + rng.integers(-3, 4, near.shape), boxes(rng.integers(0, 4))])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        predictions.append(dict(boxes=found, labels=rng.integers(0, C, len(found)),
                                scores=rng.integers(0, 8, len(found)) / 8))
        targets.append(dict(boxes=wanted, labels=rng.integers(0, C, len(wanted)),
                            difficult=rng.random(len(wanted)) < 0.2))
    return predictions, targets, C


def test_random_sets():
    rng, values = np.random.default_rng(0), []
    for number in range(200):
        predictions, targets, C = random_set(rng)
        iou = (0.5, 0.75, 0.3, 0.95)[number % 4]
        ap = voc_average_precision(predictions, targets, C, iou)
        slow = [slow_average_precision(predictions, targets, c, iou) for c in range(C)]
        np.testing.assert_allclose(ap, slow, rtol=0, atol=1e-12)
        values += [*ap]
    values = np.array(values)
    assert np.isnan(values).sum() > 20 and (values > 0).sum() > 90 and len({*values.round(6)}) > 80


def test_means_over_overlaps_and_classes():
    """A class without objects is in no mean. (0, 0, 9, 7) overlaps A by 0.8: right at 6 of 10 thresholds."""
    numbers = voc_numbers([prediction(((0, 0, 9, 7), 0, 0.9))], [target((A, 0, False), (B, 2, False))],
                          ["a", "b", "c"])
    assert numbers["AP50_of_classes"] == {"a": 1, "b": None, "c": 0}
    assert numbers["AP50"] == numbers["AP75"] == 0.5 and numbers["AP"] == pytest.approx(0.3)


def test_rounding_of_the_published_evaluator():
    """Boxes to 0.1 with the first pixel 1, scores to 0.001."""
    found = as_published(torch.tensor([[0.04, 3.46, 10.0, 7.26]]), torch.tensor([0.12349]))
    assert found["boxes"].tolist() == [[1.0, 4.5, 10.0, 7.3]] and found["scores"].tolist() == [0.123]
    assert as_published(torch.tensor([[4.0, 4.0, 9.0, 9.0]]))["boxes"].tolist() == [[5, 5, 9, 9]]


def test_overlaps_of_masks():
    a, b = torch.zeros(2, 4, 6, 6, dtype=torch.bool).unbind()
    a[0, :3, :4], a[1, 5, 5] = True, True
    b[0, :3, 2:], b[1, 5, 5] = True, True
    expected = [[6 / 18, 0, 0, 0], [0, 1, 0, 0]]
    np.testing.assert_allclose(mask_overlaps(dict(masks=a), dict(masks=b))[:2], expected, atol=1e-12)


def test_pasted_masks():
    """A mask of ones fills its box, a gradient is 0.5 in its middle, outside there is nothing."""
    masks = torch.stack([torch.ones(28, 28), torch.linspace(0, 1, 28).expand(28, -1)])
    boxes = torch.tensor([[2.0, 3.0, 8.0, 5.0], [0.0, 0.0, 10.0, 4.0]])
    full, half = paste(masks, boxes, (6, 12))
    expected = torch.zeros(6, 12, dtype=torch.bool)
    expected[3:5, 2:8] = True
    assert full.equal(expected)
    expected = torch.zeros(6, 12, dtype=torch.bool)
    expected[:4, 5:10] = True
    assert half.equal(expected)


# ---------------------------------------------------------------- COCO
def polygon(box):
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def test_cocos_numbers_agree_with_pycocotools(tmp_path):
    """Bounding boxes and masks, with a crowd, objects of all sizes, and numbers of classes with gaps."""
    pytest.importorskip("faster_coco_eval")
    tools, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    rng, ids, truth, entries = np.random.default_rng(3), (3, 7, 90), [], []
    images = [dict(id=int(10 + 3 * i), file_name=f"{i}.jpg", height=160, width=200) for i in range(12)]
    for image in images:
        boxes, labels, masks, scores = [], [], [], []
        for _ in range(int(rng.integers(1, 6))):
            w, h = rng.integers(6, 120, 2)
            x, y = rng.integers(0, 200 - w), rng.integers(0, 160 - h)
            box, label = [float(v) for v in (x, y, x + w, y + h)], int(rng.integers(3))
            truth.append(dict(id=len(truth) + 1, image_id=image["id"], category_id=ids[label], iscrowd=0,
                              bbox=[box[0], box[1], float(w), float(h)], area=float(w * h),
                              segmentation=polygon(box)))
            moved = (np.array(box) + rng.normal(0, 5, 4)).clip(0, 155)
            if (moved[2:] > moved[:2] + 1).all():
                boxes.append(moved.tolist())
                labels.append(label if rng.random() < 0.8 else 0)
                scores.append(float(rng.random()))
                left, top, right, bottom = moved.astype(int)
                masks.append(torch.zeros(160, 200, dtype=torch.bool))
                masks[-1][top:(top + 7 * bottom) // 8 + 1, left:right + 1] = True        # not all of the box
        found = dict(boxes=torch.tensor(boxes).view(-1, 4), labels=torch.tensor(labels).long(),
                     scores=torch.tensor(scores), masks=torch.stack(masks))
        entries += coco_entries(found, image["id"], ids)
    crowd = dict(id=999, image_id=10, category_id=3, iscrowd=1, bbox=[0.0, 0.0, 200.0, 80.0], area=16000.0,
                 segmentation=dict(size=[160, 200], counts=[0, *[80, 80] * 200]))
    categories = [dict(id=i, name=str(i)) for i in ids]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(dict(images=images, annotations=[*truth, crowd], categories=categories)))
    for kind in ("bbox", "segm"):
        ours = coco_numbers(str(path), entries, kind)
        oracle = tools.COCO(str(path))
        shown = copy.deepcopy(entries)
        if kind == "segm":                               # as detectron2: by the size of masks
            for entry in shown:
                del entry["bbox"]
        theirs = evaluation.COCOeval(oracle, oracle.loadRes(shown), kind)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
        assert [*ours] == [*COCO_NUMBERS] and 0.05 < ours["AP"] < 0.95 and len({*ours.values()}) > 6
        np.testing.assert_allclose([*ours.values()], theirs.stats, rtol=0, atol=1e-12)
    assert coco_numbers(str(path), [], "bbox")["AP"] == 0
