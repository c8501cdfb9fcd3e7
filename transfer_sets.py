"""The data sets of the paper's Table 4: a table of them, how each is read from its files, and their metrics.

They lie in --data-dir as torchvision's classes put them there, so existing folders work. Lists and labels are
read here; pictures are read later, as those of every other set.
"""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.io import loadmat

from checkpoint import UserError, printable
from data import ImageSet, build_dataset, count_overlap, hold_out

HELD_OUT = 0.2                   # share of each class's training images, where a set has no validation images
PARTS = {"train": "training images", "val": "validation images", "test": "test images"}
CALTECH_SHOTS = 30               # training images of each class


# ---------------------------------------------------------------- readers
# Each maps (data_dir, part, seed) to the paths [N], or the pixels uint8 [N, C, H, W], and N names of classes.
def read_built_in(name):
    """A reader of a set that data.py knows."""
    def read(root, part, seed):
        dataset = build_dataset(name, part, seed, root)
        return dataset.images, dataset.labels.tolist()
    return read


def read_food(root, part, seed):
    root, pairs = f"{root}/food-101", []
    with open(f"{root}/meta/{part}.json") as file:
        listed = json.load(file)                 # {class: its images}
    for name in listed:
        pairs += [(f"{root}/images/{image}.jpg", name) for image in listed[name]]
    return _two_lists(pairs)


def read_sun397(root, part, seed):
    """Lines are /a/abbey/sun_1.jpg or /a/apse/indoor/sun_2.jpg: the class is the whole folder."""
    lines = _lines(f"{root}/SUN397/{'Training' if part == 'train' else 'Testing'}_01.txt")
    return _two_lists((f"{root}/SUN397{line}", os.path.dirname(line)) for line in lines)


def read_cars(root, part, seed):
    root = f"{root}/stanford_cars"
    file = "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
    rows = loadmat(f"{root}/{file}", squeeze_me=True)["annotations"]
    return _two_lists((f"{root}/cars_{part}/{row['fname']}", int(row["class"])) for row in rows)


def read_aircraft(root, part, seed):
    root = f"{root}/fgvc-aircraft-2013b/data"
    rows = (line.split(" ", 1) for line in _lines(f"{root}/images_variant_{part}.txt"))
    return _two_lists((f"{root}/images/{image}.jpg", name) for image, name in rows)


def read_voc(data, part):
    """Paths [N] and labels [N, C] of trainval or test: 1, -1, or 0 (only difficult objects of the class)."""
    root = [*Path(data).glob("VOCdevkit/VOC2007"), *Path(data).glob("VOC2007"), Path(data)][0]
    classes = sorted({str(path).rpartition("_")[0] for path in root.glob("ImageSets/Main/[!.]*_*.txt")})
    try:
        images, labels = np.array([np.loadtxt(f"{name}_{part}.txt", str) for name in classes]).T   # [N, C]
        if (images.T != images[:, 1]).any() or any({*y, "0"} != {"1", "-1", "0"} for y in labels.T):
            raise ValueError
    except (OSError, ValueError, IndexError):                   # IndexError: one class alone
        raise UserError(f"--data {data}: needs ImageSets/Main/CLASS_{part}.txt as in VOC2007") from None
    return [root / f"JPEGImages/{image}.jpg" for image in images[:, 0]], labels.astype(int)


def read_voc07(root, part, seed):
    """Labels are an array [N, 20] here: 1, -1, or 0 where all objects of the class are difficult."""
    return read_voc(f"{root}/VOCdevkit/VOC2007", part)


def read_dtd(root, part, seed):
    lines = _lines(f"{root}/dtd/dtd/labels/{part}1.txt")             # the first of ten partitions
    return _two_lists((f"{root}/dtd/dtd/images/{line}", os.path.dirname(line)) for line in lines)


def read_pets(root, part, seed):
    root, file = f"{root}/oxford-iiit-pet", {"train": "trainval", "test": "test"}[part]
    rows = map(str.split, _lines(f"{root}/annotations/{file}.txt"))  # Abyssinian_201 1 1 1: class 1
    return _two_lists((f"{root}/images/{row[0]}.jpg", int(row[1])) for row in rows)


def read_caltech101(root, part, seed):
    """All 102 folders are classes, the background, too. 30 images of each, drawn by the seed, are to train.

    There is no official division, and the draws of SimCLR and BYOL are unknown.
    """
    root, pairs = f"{root}/caltech101/101_ObjectCategories", []
    for c, name in enumerate(sorted(os.listdir(root))):
        files = sorted(file for file in os.listdir(f"{root}/{name}") if file.endswith(".jpg"))
        order = np.random.default_rng([seed, 12, c]).permutation(len(files))
        chosen = order[:CALTECH_SHOTS] if part == "train" else order[CALTECH_SHOTS:]
        pairs += [(f"{root}/{name}/{files[i]}", name) for i in sorted(chosen)]
    return _two_lists(pairs)


def read_flowers(root, part, seed):
    root, key = f"{root}/flowers-102", {"train": "trnid", "val": "valid", "test": "tstid"}[part]
    labels = loadmat(f"{root}/imagelabels.mat", squeeze_me=True)["labels"]
    numbers = loadmat(f"{root}/setid.mat", squeeze_me=True)[key]     # from 1
    return _two_lists((f"{root}/jpg/image_{i:05d}.jpg", int(labels[i - 1])) for i in numbers)


def _lines(path):
    with open(path) as file:
        return [line.strip() for line in file if line.strip()]


def _two_lists(pairs):
    paths, names = zip(*pairs, strict=True)
    return list(paths), list(names)


# ---------------------------------------------------------------- metrics, of scores [N, C]
def top_1(scores, labels):
    """Share of the images [N] whose class has the highest score."""
    return (scores.argmax(1) == labels).mean()


def mean_per_class(scores, labels):
    """Mean over the classes of the top-1 accuracy among their images, of classes that have any."""
    hits = scores.argmax(1) == labels
    return np.mean([hits[labels == c].mean() for c in np.unique(labels)])


def map_11_points(scores, labels):
    """Mean over the classes of VOC07's average precision; labels [N, C]: 1, -1, or 0 for left out.

    That is the mean of the best precisions at recalls of at least 0, 0.1, ..., 1. Images with equal scores
    are found together. A class without an image is left out.
    """
    precisions = []
    for f, y in zip(scores.T, labels.T, strict=True):
        positive = np.sort(f[y == 1])                               # each a threshold, highest recall first
        if len(positive):
            hits, chosen = (len(x) - np.searchsorted(x, positive) for x in (positive, np.sort(f[y != 0])))
            best = np.maximum.accumulate(hits / chosen)             # at this recall or a higher one
            needed = -(-np.arange(11) * len(positive) // 10)        # hits for each recall, rounded up, exact
            precisions.append(best[len(positive) - np.maximum(needed, 1)].mean())
    return np.mean(precisions)


METRICS = {"top-1": top_1, "mean per class": mean_per_class, "11-point mAP": map_11_points}


# ---------------------------------------------------------------- the table
class Source(NamedTuple):
    """A row of the table. docs/evaluation.md prints it; a download that differs from it is refused."""
    title: str
    classes: int
    train: int                   # numbers of images
    val: int                     # 0: HELD_OUT of each class's training images are drawn
    test: int
    metric: str                  # a key of METRICS
    read: Callable
    where: str                   # what lies where in --data-dir


SETS = {
    "mnist": Source("MNIST, 5,000 digits", 10, 4000, 0, 1000, "top-1", read_built_in("mnist"),
                    "nothing, it is in the repository"),
    "food": Source("Food-101", 101, 75750, 0, 25250, "top-1", read_food,
                   "food-101/ with meta/ and images/"),
    "cifar10": Source("CIFAR-10", 10, 50000, 0, 10000, "top-1", read_built_in("cifar10"),
                      "cifar-10-batches-py/"),
    "cifar100": Source("CIFAR-100", 100, 50000, 0, 10000, "top-1", read_built_in("cifar100"),
                       "cifar-100-python/"),
    "sun397": Source("SUN397", 397, 19850, 0, 19850, "top-1", read_sun397,
                     "SUN397/ with a/ to z/, and from its separate archive Partitions Training_01.txt and "
                     "Testing_01.txt"),
    "cars": Source("Stanford Cars", 196, 8144, 0, 8041, "top-1", read_cars,
                   "stanford_cars/ with cars_train/, cars_test/, devkit/cars_train_annos.mat and "
                   "cars_test_annos_withlabels.mat"),
    "aircraft": Source("FGVC Aircraft", 100, 3334, 3333, 3333, "mean per class", read_aircraft,
                       "fgvc-aircraft-2013b/ with data/"),
    "voc07": Source("VOC07", 20, 2501, 2510, 4952, "11-point mAP", read_voc07,
                    "VOCdevkit/VOC2007/ with ImageSets/Main/ and JPEGImages/, of both trainval and test"),
    "dtd": Source("DTD", 47, 1880, 1880, 1880, "top-1", read_dtd,
                  "dtd/dtd/ with labels/ and images/"),
    "pets": Source("Oxford-IIIT Pets", 37, 3680, 0, 3669, "mean per class", read_pets,
                   "oxford-iiit-pet/ with annotations/ and images/"),
    "caltech101": Source("Caltech-101", 102, 3060, 0, 6084, "mean per class", read_caltech101,
                         "caltech101/101_ObjectCategories/ with its 102 folders, BACKGROUND_Google, too"),
    "flowers": Source("Flowers-102", 102, 1020, 1020, 6149, "mean per class", read_flowers,
                      "flowers-102/ with jpg/, imagelabels.mat and setid.mat"),
}
TABLE_4 = [name for name in SETS if name != "mnist"]


# ---------------------------------------------------------------- a set, checked
def read_set(name, data_dir, seed=0, source=None, flag="--datasets"):
    """{train, val, test} of a set in SETS: ImageSets with labels int64 [N], of voc07 [N, 20].

    source: the row of SETS that it must equal. Where that has no validation images, HELD_OUT of each class's
    training images are drawn by the seed (data.hold_out). Raises UserError, one line that begins with the
    flag, for missing or damaged lists, missing pictures, other numbers of images or classes than the row's.
    """
    source, parts = source or SETS[name], {}
    place = f"place {source.where} in --data-dir {data_dir}"
    for part in ("train", "val", "test") if source.val else ("train", "test"):
        try:
            parts[part] = source.read(data_dir, part, seed)
        except FileNotFoundError as error:
            raise UserError(f"{flag} {name}: there is no {error.filename}; {place}") from None
        except UserError as error:               # "--data NAME: what is wrong" of data.py and svm.py
            reason = str(error).partition(": ")[2]
            raise UserError(f"{flag} {name}: {reason}" + f"; {place}" * ("; " not in reason)) from None
        except Exception as error:               # a damaged file makes json and scipy raise anything
            said = printable(str(error) or type(error).__name__)[:100]
            raise UserError(f"{flag} {name}: cannot read which are its {PARTS[part]} ({said}); fetch it "
                            f"again and {place}") from None
    for part in parts:
        problem = _problem(part, parts, source)
        if problem:
            raise UserError(f"{flag} {name}: {problem}, so it is not whole; fetch it again and {place}")
    parts = _number_classes(parts)
    if count_overlap(parts["train"], parts["test"]):
        raise UserError(f"{flag} {name}: there are training images among its test images; fetch it again "
                        f"and {place}")
    if not source.val:
        kept, held = hold_out(parts["train"].labels, HELD_OUT, seed)
        parts |= {"train": parts["train"].subset(kept), "val": parts["train"].subset(held)}
    return {part: parts[part] for part in PARTS}


def _problem(part, parts, source):
    """What is wrong with a part {part: (images, names)}, or None: numbers, classes, a picture is missing."""
    images, names = parts[part]
    expected, classes = getattr(source, part), _classes(names)
    if len(images) != expected:
        return f"it has {len(images):,} {PARTS[part]} instead of {expected:,}"
    if len(classes) != source.classes:
        return f"its {PARTS[part]} are of {len(classes)} classes instead of {source.classes}"
    if classes != _classes(parts["train"][1]):
        return f"its {PARTS[part]} are of other classes than its training images"
    files_in = {}                                # faster than to ask for each of 100,000 files
    for path in () if isinstance(images, torch.Tensor) else images:
        folder, file = os.path.split(path)
        if folder not in files_in:
            files_in[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if file not in files_in[folder]:
            return f"there is no {printable(str(path))}, which is one of its {PARTS[part]}"
    return None


def _classes(names):
    """The classes that have an image; of labels [N, C] their numbers."""
    return {*np.flatnonzero((names == 1).any(0))} if isinstance(names, np.ndarray) else {*names}


def _number_classes(parts):
    """The parts as ImageSets; labels are numbers of the sorted names of classes."""
    classes, sets = sorted(_classes(parts["train"][1])), {}
    number = {name: c for c, name in enumerate(classes)}
    for part, (images, labels) in parts.items():
        if not isinstance(labels, np.ndarray):
            labels = np.array([number[name] for name in labels])
        in_memory, paths = (images, None) if isinstance(images, torch.Tensor) else (None, images)
        if paths is not None:
            paths = np.array([os.fsencode(path) for path in paths])
        sets[part] = ImageSet(in_memory, torch.from_numpy(labels), classes, paths, part=PARTS[part])
    return sets


def checksum(part):
    """What tells whether the images of an ImageSet are others: number, names of files or pixels, labels."""
    images = part.files or f"{len(part)} images, CRC-32 {zlib.crc32(part.images.numpy().tobytes()):08x}"
    return f"{images}, labels {zlib.crc32(part.labels.numpy().tobytes()):08x}"
