"""Average precision of detections, by PASCAL VOC's rule of 2007 and by COCO's; masks of objects."""

import contextlib
import copy
import io
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import UserError

IOUS = [0.5 + 0.05 * i for i in range(10)]           # thresholds; AP is the mean over them
COCO_NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
                "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


# ---------------------------------------------------------------- VOC
def box_overlaps(found, wanted):
    """Intersection over union [n, m] of boxes whose last pixels belong to them, so their widths are + 1."""
    a, b = (np.asarray(part["boxes"], np.float64).reshape(-1, 4) for part in (found, wanted))
    inner = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2]) + 1
    inner = inner.clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(1) for boxes in (a, b)]
    return inner / (areas[0][:, None] + areas[1] - inner)


def mask_overlaps(found, wanted):
    """Intersection over union [n, m] of masks, bool [n, H, W] and [m, H, W]."""
    a, b = (torch.as_tensor(part["masks"]).flatten(1).double() for part in (found, wanted))
    inner = a @ b.T
    return (inner / (a.sum(1)[:, None] + b.sum(1) - inner).clamp_min(1)).numpy()


def voc_average_precision(predictions, targets, num_classes, iou, overlaps=box_overlaps):
    """AP of each class by PASCAL VOC's rule of 2007, float64 [num_classes]; nan for a class without objects.

    predictions: for each picture a dict of boxes [n, 4], labels [n] from 0, scores [n]; targets: of boxes
    [m, 4], labels [m], difficult [m]. Boxes are left, top, right, bottom, and include their last pixels.
    Detections of a class are taken by falling score, equal ones in their order. One is right if the object of
    its class that it overlaps most is overlapped by more than `iou`, and no detection before took it. If that
    object is difficult, it is neither right nor wrong. AP is the mean over recalls 0, 0.1, ..., 1 of the best
    precision at no lower recall, and difficult objects do not count in recall. Nothing is rounded here.
    """
    columns, count = ([], [], [], [], []), np.zeros(num_classes, int)
    for number, (found, wanted) in enumerate(zip(predictions, targets, strict=True)):
        labels, of_objects = np.asarray(found["labels"], int), np.asarray(wanted["labels"], int)
        difficult = np.asarray(wanted["difficult"], bool)
        count += np.bincount(of_objects[~difficult], minlength=num_classes)
        n = len(labels)
        best, taken, ignored = np.zeros(n), np.zeros(n, int), np.zeros(n, bool)
        if n and len(of_objects):
            shared = np.where(labels[:, None] == of_objects, overlaps(found, wanted), -1)
            best, taken = shared.max(1), shared.argmax(1)
            ignored = difficult[taken]
        objects = np.stack([np.full(n, number), taken], 1)
        values = labels, np.asarray(found["scores"]), objects, best > iou, ignored
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    aps = np.full(num_classes, np.nan)
    if not predictions:
        return aps
    labels, scores, objects, matched, ignored = map(np.concatenate, columns)
    for c in range(num_classes):
        mine = labels == c
        aps[c] = eleven_points(scores[mine], objects[mine], matched[mine], ignored[mine], count[c])
    return aps


def eleven_points(scores, objects, matched, ignored, count):
    """AP of a class with `count` objects; see voc_average_precision. objects: [n, 2], picture and object."""
    if not count:
        return np.nan
    order = np.argsort(-scores, kind="stable")
    order = order[~(matched & ignored)[order]]
    objects, matched = objects[order], matched[order]
    right = np.zeros(len(order), bool)
    candidates = np.flatnonzero(matched)
    first = np.unique(objects[matched], axis=0, return_index=True)[1]      # detection of each object
    right[candidates[first]] = True
    hits = right.cumsum()
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    needed = -(-np.arange(11) * count // 10)         # hits for each recall, rounded up, exact
    place = np.searchsorted(hits, needed)            # the first detection with that recall
    return np.append(precision, 0)[place].sum() / 11


def voc_numbers(predictions, targets, class_names, overlaps=box_overlaps):
    """{AP, AP50, AP75: means over classes with objects, AP50_of_classes: {name: number or None}}."""
    rows = [voc_average_precision(predictions, targets, len(class_names), iou, overlaps) for iou in IOUS]
    by_iou = np.array(rows)                                                       # [10, C]
    means = np.nanmean(by_iou, 1)
    by_class = dict.fromkeys(class_names)
    for name, ap in zip(class_names, by_iou[0].tolist(), strict=True):
        if not np.isnan(ap):
            by_class[name] = ap
    means = means.tolist()
    return dict(AP=sum(means) / 10, AP50=means[0], AP75=means[5], AP50_of_classes=by_class)


def as_published(boxes, scores=None):
    """Boxes in VOC's numbers, where the first pixel is 1; with scores rounded as detectron2 writes them."""
    boxes = torch.as_tensor(boxes).double() + torch.tensor([1, 1, 0, 0])
    return dict(boxes=boxes) if scores is None else dict(boxes=boxes.round(decimals=1),
                                                         scores=scores.double().round(decimals=3))


# ---------------------------------------------------------------- masks
class Bitmaps:
    """Masks of M objects, bool [M, H, W], each of its whole picture."""

    def __init__(self, masks):
        self.masks = masks

    def draw(self, number, own, size):
        """bool [h, w] of an object. own: (height, width) of its picture; size: (h, w) after resizing."""
        mask = self.masks[number][None, None].float()
        return F.interpolate(mask, size, mode="nearest-exact")[0, 0] > 0


class Polygons:
    """Masks of objects, each one or more polygons, in three flat arrays."""

    def __init__(self, objects):
        """objects: for each a list of lists x, y, x, y, ..."""
        rings = [*itertools.chain.from_iterable(objects)]
        self.firsts = np.cumsum([0, *map(len, objects)])                   # of an object, among the rings
        self.starts = np.cumsum([0, *map(len, rings)])                     # of a ring, among the numbers
        self.numbers = np.array([*itertools.chain.from_iterable(rings)], np.float32)

    def draw(self, number, own, size):
        mask_api, (height, width) = coco_tools().mask, own
        scale, rings = np.array([size[1] / width, size[0] / height]), []
        for ring in range(*self.firsts[number:number + 2]):
            points = self.numbers[self.starts[ring]:self.starts[ring + 1]].reshape(-1, 2)
            rings.append((points * scale).flatten().tolist())
        mask = mask_api.decode(mask_api.merge(mask_api.frPyObjects(rings, *size)))
        return torch.from_numpy(mask.astype(bool))


def paste(masks, boxes, size, threshold=0.5):
    """bool [n, height, width]: masks [n, M, M] of probabilities, each stretched over its box [n, 4]."""
    whole = torch.zeros(len(masks), *size, dtype=torch.bool)
    y, x = (torch.arange(length) + 0.5 for length in size)
    for pasted, mask, (left, top, right, bottom) in zip(whole, masks.float(), boxes.tolist(), strict=True):
        rows, columns = ((values - low) / (high - low) * 2 - 1
                         for values, low, high in ((y, top, bottom), (x, left, right)))
        grid = torch.stack([columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))], 2)
        pasted[:] = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= threshold
    return whole


# ---------------------------------------------------------------- COCO
def coco_tools():
    """The package faster_coco_eval, which only COCO's masks and evaluation need. Raises UserError."""
    try:
        import faster_coco_eval
    except ImportError:
        raise UserError("--data coco: needs a package; pip install faster-coco-eval") from None
    return faster_coco_eval


def coco_entries(prediction, image_id, class_ids):
    """A prediction as a list of entries of COCO's result files; a mask becomes its run lengths."""
    entries = []
    columns = [prediction[name].tolist() for name in ("boxes", "labels", "scores")]
    for i, ((left, top, right, bottom), label, score) in enumerate(zip(*columns, strict=True)):
        entries.append(dict(image_id=image_id, category_id=class_ids[label] if class_ids else label,
                            bbox=[left, top, right - left, bottom - top], score=score))
        if class_ids and "masks" in prediction:
            encoded = coco_tools().mask.encode(np.asfortranarray(prediction["masks"][i].byte().numpy()))
            entries[-1]["segmentation"] = dict(size=encoded["size"], counts=encoded["counts"].decode())
    return entries


def coco_numbers(annotations, entries, kind):
    """COCO's twelve numbers, {name: number}; -1: no such objects. annotations: a file; kind: bbox or segm."""
    if not entries:
        return dict.fromkeys(COCO_NUMBERS, 0.0)
    tools, entries = coco_tools(), copy.deepcopy(entries)
    if kind == "segm":                   # else objects are small or large by their boxes, not by their masks
        for entry in entries:
            del entry["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = tools.COCO(annotations)
        evaluation = tools.COCOeval_faster(truth, truth.loadRes(entries), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(COCO_NUMBERS, map(float, evaluation.stats[:12]), strict=True))
