"""Pictures with boxes of objects: scenes, PASCAL VOC, COCO; how they are resized.

The sizes and flips of a training step are a function of the seed and the step.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import UserError, printable, say_once
from data import FASHION_MNIST_CLASSES, Batches, ImageSet, scenes
from detection_metrics import Bitmaps, Polygons, coco_tools
from segment_sets import VOC_CLASSES
from views import normalize

CLASSES = VOC_CLASSES[1:]        # without the background
VOC = {"training images": (("2007", "trainval"), ("2012", "trainval")), "test images": (("2007", "test"),)}
COCO = {"training images": "train2017", "test images": "val2017"}
WHERE = {
    "voc": "VOCdevkit/VOC2007/ and VOCdevkit/VOC2012/, each with Annotations/, ImageSets/Main/, JPEGImages/",
    "coco": "train2017/, val2017/, and annotations/ with instances_train2017.json, instances_val2017.json"}
SIZES = {"voc": (16551, 4952), "coco": (118287, 5000)}        # pictures to train on and to test on
LARGEST_XML = 2 ** 20            # bytes


class Pictures(NamedTuple):
    """N pictures and their M objects, in arrays that workers share; those of picture i begin at firsts[i]."""
    images: ImageSet
    names: list                  # what a picture is called in its data set
    sizes: torch.Tensor          # int64 [N, 2], height and width
    firsts: torch.Tensor         # int64 [N + 1]
    boxes: torch.Tensor          # float32 [M, 4]: left, top, right, bottom; pixel x reaches from x to x + 1
    labels: torch.Tensor         # int64 [M], from 0
    difficult: torch.Tensor      # bool [M], neither right nor wrong in VOC's evaluation
    class_names: list
    masks: Any = None            # Bitmaps or Polygons, or none
    annotations: str = None      # COCO's file, and its number of each class
    class_ids: tuple = ()

    def objects(self, index):
        return slice(int(self.firsts[index]), int(self.firsts[index + 1]))

    def target(self, index):
        """boxes [n, 4], labels [n], difficult [n] of a picture."""
        which = self.objects(index)
        return dict(boxes=self.boxes[which], labels=self.labels[which], difficult=self.difficult[which])


# ---------------------------------------------------------------- data sets
def read_set(name, data_dir, num_scenes, size, seed, masks=False):
    """(Pictures to train on, Pictures to test on) of scenes, voc, or coco. masks: of the objects, too.

    num_scenes (of both), size, seed: of scenes; those to test on are the same for every seed. voc: trainval
    of 2007 and of 2012, difficult objects as well, and the test images of 2007. coco: train2017 without
    crowds and without pictures that have nothing else, and val2017. Raises UserError, one line.
    """
    if name == "scenes":
        return (scene_pictures("train", "training images", num_scenes[0], size, seed),
                scene_pictures("val", "test images", num_scenes[1], size, 0))
    if name == "voc" and masks:
        raise UserError("--masks: VOC has no masks for most of its objects; leave it out, or use --data coco")
    if name == "coco":
        coco_tools()
    read, parts = (read_voc, VOC) if name == "voc" else (read_coco, COCO)
    place, found = f"place {WHERE[name]} in --data-dir {data_dir}", []
    for (part, source), size in zip(parts.items(), SIZES[name], strict=True):
        try:
            pictures = read(Path(data_dir), source, part, masks)
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "filename", None) or error
            raise UserError(f"--data {name}: there is no {what}, or it cannot be read; {place}") from None
        if len(pictures.images) != size:
            raise UserError(f"--data {name}: it has {len(pictures.images):,} {part} instead of {size:,}, so "
                            f"it is not whole; {place}")
        absent = next((path for path in pictures.images.paths if not os.path.exists(path)), None)
        if absent:
            raise UserError(f"--data {name}: there is no {os.fsdecode(absent)}; {place}")
        found.append(pictures)
    if name == "coco":
        found[0] = without_empty(found[0])
    return tuple(found)


def scene_pictures(split, part, num, size, seed):
    made = scenes(split, num, size, seed)
    labels, masks = torch.cat(made.labels), torch.cat(made.masks)
    return Pictures(ImageSet(made.images, None, None, part=part), [*range(num)],
                    torch.tensor([[size, size]] * num), cumulated(made.labels), torch.cat(made.boxes), labels,
                    torch.zeros(len(labels), dtype=torch.bool), list(FASHION_MNIST_CLASSES), Bitmaps(masks))


def cumulated(lists):
    return torch.tensor([0, *np.cumsum([*map(len, lists)])])


def gather(part, rows, class_names, **more):
    """Pictures of rows (name, path, (height, width), list of (box, label, difficult)).

    Boxes without area are left out, and said once. Raises UserError for one that is turned inside out.
    """
    kept, flat = [], []
    for _, path, _, objects in rows:
        kept.append([item for item in objects if has_area(item[0], path)])
        flat += kept[-1]
    left_out = sum(len(row[3]) for row in rows) - len(flat)
    if left_out:
        first = next(i for i, objects in enumerate(kept) if len(objects) < len(rows[i][3]))
        path = printable(str(rows[first][1]))
        say_once(f"{part}: {left_out:,} boxes without area are left out, the first in {path}")
    boxes, labels, difficult = zip(*flat, strict=True) if flat else ((), (), ())
    names, paths, sizes, _ = zip(*rows, strict=True) if rows else ((), (), (), ())
    paths = np.array([*map(os.fsencode, paths)])
    return Pictures(ImageSet(None, None, None, paths, part=part), [*names],
                    torch.tensor(sizes).view(-1, 2), cumulated(kept),
                    torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(labels).long(),
                    torch.tensor(difficult).bool(), list(class_names), **more)


def has_area(box, path):
    """Whether a box in a picture is wider and higher than 0; UserError for less than 0, or no number."""
    width, height = box[2] - box[0], box[3] - box[1]
    if not np.isfinite(box).all() or width < 0 or height < 0:
        raise UserError(f"{printable(str(path))}: a box from {box[:2]} to {box[2:]} has no size; correct its "
                        "annotation, or fetch it again")
    return width > 0 and height > 0


def without_empty(pictures):
    """The pictures that have an object."""
    counts = pictures.firsts.diff()
    full = torch.where(counts > 0)[0]
    return pictures._replace(images=pictures.images.subset(full), sizes=pictures.sizes[full],
                             names=[pictures.names[i] for i in full.tolist()],
                             firsts=torch.cat([pictures.firsts[:1], counts[full].cumsum(0)]))


# ---------------------------------------------------------------- VOC
def read_voc(root, sources, part, masks):
    rows = []
    for year, listed in sources:
        folder = root / f"VOCdevkit/VOC{year}"
        for line in (folder / f"ImageSets/Main/{listed}.txt").read_text().split():
            # by the name in the list: the <filename> in some annotations is another
            size, objects = read_xml(folder / f"Annotations/{line}.xml")
            rows.append((line, folder / f"JPEGImages/{line}.jpg", size, objects))
    return gather(part, rows, CLASSES)


class NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, *args):
        raise ValueError("it has a DOCTYPE, which could make it grow without end")


def read_xml(path):
    """((height, width), list of (box, label, difficult)) of an annotation of VOC.

    Its first pixel has number 1 and boxes include their last pixels, so left and top become one less.
    Raises UserError, one line, for what is no annotation.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_XML + 1)
        if len(content) > LARGEST_XML:
            raise ValueError(f"it has more than {LARGEST_XML:,} bytes")
        tree = ElementTree.fromstring(content, ElementTree.XMLParser(target=NoDoctype()))
        size = tuple(int(tree.findtext(f"size/{name}")) for name in ("height", "width"))
        objects = []
        for item in tree.iterfind("object"):
            name = item.findtext("name").strip()
            left, top, right, bottom = (float(item.findtext(f"bndbox/{side}"))
                                        for side in ("xmin", "ymin", "xmax", "ymax"))
            if name not in CLASSES:
                raise ValueError(f"'{name[:40]}' is no class of VOC")
            objects.append(((left - 1, top - 1, right, bottom), CLASSES.index(name),
                            item.findtext("difficult", "0").strip() == "1"))
    except OSError:
        raise
    except (ElementTree.ParseError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(printable(f"{path}: not an annotation of VOC ({error}); fetch it again")) from None
    return size, objects


# ---------------------------------------------------------------- COCO
def is_ring(ring):
    """Whether it is x, y, x, y, ... of three points at least."""
    return len(ring) >= 6 and len(ring) % 2 == 0


def read_coco(root, source, part, masks):
    path = root / f"annotations/instances_{source}.json"
    with open(path, "rb") as file:
        content = file.read()
    try:
        content = json.loads(content)
        classes = dict(sorted((item["id"], item["name"]) for item in content["categories"]))
        label_of = {number: label for label, number in enumerate(classes)}           # 91 numbers, 80 classes
        objects = {picture["id"]: [] for picture in content["images"]}
        polygons = {picture: [] for picture in objects}
        for item in content["annotations"]:
            if item.get("iscrowd"):              # not trained on; the evaluation reads the file itself
                continue
            x, y, width, height = map(float, item["bbox"])
            box = (x, y, x + width, y + height)
            if masks and width > 0 and height > 0:
                if not isinstance(item["segmentation"], list):
                    raise ValueError(f"annotation {item['id']} has no polygon")
                rings = list(filter(is_ring, item["segmentation"]))
                if not rings:                    # as in detectron2: nothing to learn a mask from
                    continue
                polygons[item["image_id"]].append(rings)
            objects[item["image_id"]].append((box, label_of[item["category_id"]], False))
        rows = []
        for picture in sorted(content["images"], key=lambda item: item["id"]):
            name = picture["file_name"]
            if os.path.basename(name) != name:
                raise ValueError(f"'{name[:40]}' is no name of a picture")
            rows.append((picture["id"], root / source / name, (int(picture["height"]), int(picture["width"])),
                         objects[picture["id"]]))
        drawn = None
        if masks:
            drawn = Polygons([*itertools.chain.from_iterable(polygons[row[0]] for row in rows)])
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(printable(f"{path}: not annotations of COCO ({said}); fetch it again")) from None
    return gather(part, rows, classes.values(), masks=drawn, annotations=str(path), class_ids=tuple(classes))


# ---------------------------------------------------------------- pictures to train on, and to test on
class Steps(torch.utils.data.Dataset):
    """Item t is this process's share of step t: (x [B, 3, H, W], sizes, targets), as Detector takes them.

    A picture's shorter side becomes one of `sides`, unless its longer one would be longer than `longest`
    then (0: no limit), and half of the pictures are mirrored. multiple: of H and W. item_bytes: about, with
    the masks of ten objects a picture.
    """

    def __init__(self, pictures, batch_size, sides, longest, multiple, mean, std, masks, seed, rank=0,
                 world_size=1):
        self.order = Batches(pictures.images, batch_size, None, seed, rank, world_size)
        self.pictures, self.sides, self.longest, self.multiple = pictures, sides, longest, multiple
        self.mean, self.std, self.masks, self.seed = mean, std, masks, seed
        number = self.order.mine.stop - self.order.mine.start
        self.dataset = pictures.images
        self.item_bytes = number * (12 + 10 * masks) * max(sides) * (longest or 2 * max(sides))

    def __getitem__(self, step):
        uniforms = np.random.default_rng([self.seed, 15, step]).random((self.order.batch_size, 2))
        items = []
        for index, (u, v) in zip(self.order.indices(step).tolist(), uniforms[self.order.mine], strict=True):
            items.append(self.item(index, self.sides[int(u * len(self.sides))], v < 0.5))
        images, targets = zip(*items, strict=True)
        return *padded(images, self.multiple), list(targets)

    def item(self, index, side, mirrored):
        """(x [3, h, w], target) of a picture, or of the one that stands in for a broken one."""
        index, picture = self.order.read(index)
        own = check_size(self.pictures, index, picture)
        x = resized(picture, side, self.longest, self.mean, self.std)
        size, target = x.shape[1:], self.pictures.target(index)
        boxes = scaled(target["boxes"], own, size)
        there = (boxes[:, 2:] > boxes[:, :2]).all(1)
        target = dict(boxes=boxes[there], labels=target["labels"][there])
        if self.masks:
            numbers = torch.arange(*self.pictures.firsts[index:index + 2])[there].tolist()
            drawn = [self.pictures.masks.draw(number, own, tuple(size)) for number in numbers]
            target["masks"] = torch.stack(drawn) if drawn else torch.zeros(0, *size, dtype=torch.bool)
        return (x, target) if not mirrored else flipped(x, target)


def flipped(x, target):
    """A picture [3, h, w] and its target, mirrored."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = x.shape[2]
    target["boxes"] = torch.stack([width - right, top, width - left, bottom], 1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(2)
    return x.flip(2), target


class Whole(torch.utils.data.Dataset):
    """Item i is picture i: (i, (height, width) of its own, x [1, 3, H, W], sizes), None if it is broken."""

    def __init__(self, pictures, side, longest, multiple, mean, std):
        self.pictures, self.side, self.longest, self.multiple = pictures, side, longest, multiple
        self.mean, self.std = mean, std
        self.dataset, self.item_bytes = pictures.images, 12 * side * (longest or 2 * side)

    def __getitem__(self, index):
        picture = self.pictures.images[index]
        if picture is None:
            return None
        own = check_size(self.pictures, index, picture)
        x = resized(picture, self.side, self.longest, self.mean, self.std)
        return index, own, *padded([x], self.multiple)


def check_size(pictures, index, picture):
    """(height, width) of a picture, which must be as annotated, else boxes would misfit. Raises UserError."""
    own = tuple(picture.shape[1:])
    if own != tuple(pictures.sizes[index].tolist()):
        height, width = pictures.sizes[index].tolist()
        path = printable(os.fsdecode(pictures.images.paths[index]))
        raise UserError(f"{path}: has {own[1]} × {own[0]} pixels, its annotation says {width} × {height}; "
                        "fetch both again")
    return own


def resized(picture, side, longest, mean, std):
    """The input [3, h, w] of a picture uint8 [3, H, W]; its shorter side becomes `side`; see Steps."""
    own = picture.shape[1:]
    scale = side / min(own)
    if longest:
        scale = min(scale, longest / max(own))
    size = tuple(max(1, int(length * scale + 0.5)) for length in own)
    x = picture[None]
    if size != tuple(own):               # as Pillow does it, in whole levels
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
    return normalize(x.float() / 255, mean, std)[0]


def scaled(boxes, own, size):
    """Boxes [n, 4] in a picture of size own (height, width), in one of size (h, w), cut at its borders."""
    (height, width), (h, w) = own, size
    boxes = boxes * torch.tensor([w / width, h / height, w / width, h / height])
    return boxes.clamp(min=0).minimum(torch.tensor([w, h, w, h]))


def padded(images, multiple):
    """Inputs [3, h, w] of several sizes in one: (x [B, 3, H, W] with zeros on the right and below, sizes)."""
    sizes = [tuple(image.shape[1:]) for image in images]
    H, W = (-(-max(lengths) // multiple) * multiple for lengths in zip(*sizes, strict=True))
    return torch.stack([F.pad(x, (0, W - x.shape[2], 0, H - x.shape[1])) for x in images]), sizes
