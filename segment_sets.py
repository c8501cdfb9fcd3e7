"""Pictures with a class for each pixel: scenes, VOC12aug, Cityscapes; random crops of them to train on.

The random numbers of a crop are a function of the seed, the step and the place in the global batch.
"""

import math
import os
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image

from checkpoint import UserError, printable
from data import FASHION_MNIST_CLASSES, Batches, ImageSet, scenes
from views import adjust_brightness, adjust_hue, normalize

IGNORED = 255                    # class of pixels that neither the loss nor the score counts
SCENE_CLASSES = ("background", *FASHION_MNIST_CLASSES)
VOC_CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
               "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
               "train", "tvmonitor")
CITYSCAPES = {                   # of the numbers 0 to 33 in its label maps, the 19 that are scored
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
SMALLEST = 16                    # pixels of a scene
TRIES = 11                       # of a crop, until no class fills too much of it
UNIFORMS = 2 + 2 * TRIES + 8     # random numbers of a crop: scale, flip; places; distortion


class Pictures(NamedTuple):
    """N pictures, and where the class of each of their pixels stands."""
    images: ImageSet
    maps: Any                    # uint8 [N, H, W], or the paths of N label maps
    class_of: np.ndarray         # int16 [256]: class of a number in a label map; -1: there is no such number
    class_names: tuple

    def classes(self, index, shape):
        """uint8 [H, W], the class of each pixel of a picture of this shape (H, W). Raises UserError."""
        if isinstance(self.maps, torch.Tensor):
            return self.maps[index]
        path = self.maps[index]
        levels = read_map(path, tuple(shape))
        classes = self.class_of[levels]
        if classes.min() < 0:
            number = levels[classes < 0][0]
            raise UserError(f"{printable(path)}: {number} is no class of its data set; fetch it again")
        return torch.from_numpy(classes.astype(np.uint8))


# ---------------------------------------------------------------- data sets
def read_voc12aug(root):
    """{part: list of (picture, label map)}: VOC 2012 and SBD without VOC's val, which is tested on.

    Label maps are VOC's where it has one. Those of SBD have classes at the borders of objects, too.
    """
    voc, sbd = root / "VOCdevkit/VOC2012", root / "SBD"
    if not sbd.is_dir() and (root / "benchmark_RELEASE").is_dir():                # as its archive has it
        sbd = root / "benchmark_RELEASE/dataset"
    train, val = (lines(voc / f"ImageSets/Segmentation/{part}.txt") for part in ("train", "val"))
    more = {*lines(sbd / "train.txt"), *lines(sbd / "val.txt")} - {*train, *val}

    def pair(name, folder=voc / "SegmentationClass", suffix="png"):
        return voc / f"JPEGImages/{name}.jpg", folder / f"{name}.{suffix}"
    from_sbd = [pair(name, sbd / "cls", "mat") for name in sorted(more)]
    return {"training images": [*map(pair, train), *from_sbd], "test images": [*map(pair, val)]}


def lines(path):
    """The lines of a list of names."""
    return [printable(line.strip()) for line in path.read_text().split("\n") if line.strip()]


def read_cityscapes(root):
    """{part: list of (picture, label map)}: the fine annotations; val is tested on."""
    found = {}
    for part, folder in (("training images", "train"), ("test images", "val")):
        os.listdir(root / f"leftImg8bit/{folder}")                    # raises if it is missing
        pictures = sorted((root / f"leftImg8bit/{folder}").glob("*/*_leftImg8bit.png"))
        names = [picture.name.removesuffix("_leftImg8bit.png") for picture in pictures]
        found[part] = [(picture, root / f"gtFine/{folder}/{picture.parent.name}/{name}_gtFine_labelIds.png")
                       for picture, name in zip(pictures, names, strict=True)]
    return found


class Source(NamedTuple):
    """How a data set is read, and what it must be."""
    read: Any                    # of its folder -> {part: list of (picture, label map)}
    sizes: tuple                 # pictures to train on and to test on
    class_names: tuple
    numbers: tuple               # of these classes in a label map
    others: tuple                # numbers that are left out
    where: str                   # what belongs into --data-dir


SOURCES = {
    "voc12aug": Source(
        read_voc12aug, (10582, 1449), VOC_CLASSES, tuple(range(21)), (IGNORED,),
        "VOCdevkit/VOC2012/ with ImageSets/Segmentation/, JPEGImages/, SegmentationClass/, and SBD/ or "
        "benchmark_RELEASE/dataset/ with train.txt, val.txt, cls/"),
    "cityscapes": Source(
        read_cityscapes, (2975, 500), tuple(CITYSCAPES.values()), tuple(CITYSCAPES), (*range(34), IGNORED),
        "leftImg8bit/ and gtFine/, each with train/CITY/ and val/CITY/"),
}


def read_set(name, data_dir, num_scenes, size, seed):
    """(Pictures to train on, Pictures to test on) of scenes or a data set in SOURCES.

    num_scenes (of both), size, seed: of scenes; those to test on are the same for every seed. Raises
    UserError, one line, for missing lists and files, and for another number of pictures than the published.
    """
    if name == "scenes":
        if size < SMALLEST:
            raise UserError(f"--short-side {size}: must be at least {SMALLEST}, as a scene has four items")
        return (scene_pictures("train", "training images", num_scenes[0], size, seed),
                scene_pictures("val", "test images", num_scenes[1], size, 0))
    source = SOURCES[name]
    place = f"place {source.where} in --data-dir {data_dir}"
    try:
        found = source.read(Path(data_dir))
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "filename", None) or error
        raise UserError(f"--data {name}: there is no {what}, or it cannot be read; {place}") from None
    for (part, pairs), expected in zip(found.items(), source.sizes, strict=True):
        if len(pairs) != expected:
            raise UserError(f"--data {name}: it has {len(pairs):,} {part} instead of {expected:,}, so it is "
                            f"not whole; {place}")
        absent = next((path for path in chain.from_iterable(pairs) if not path.exists()), None)
        if absent:
            raise UserError(f"--data {name}: there is no {absent}, which is for its {part}; {place}")
    class_of = np.full(256, -1, np.int16)
    class_of[[*source.others]] = IGNORED
    class_of[[*source.numbers]] = range(len(source.numbers))
    return tuple(file_pictures(part, pairs, class_of, source.class_names) for part, pairs in found.items())


def scene_pictures(split, part, num, size, seed):
    made = scenes(split, num, size, seed)
    images = ImageSet(made.images, None, None, part=part)
    return Pictures(images, made.class_maps(), np.arange(256, dtype=np.int16), SCENE_CLASSES)


def file_pictures(part, pairs, class_of, class_names):
    paths = np.array([os.fsencode(picture) for picture, _ in pairs])
    return Pictures(ImageSet(None, None, None, paths, part=part), [str(path) for _, path in pairs], class_of,
                    class_names)


def read_map(path, shape):
    """The numbers uint8 [H, W] in a label map of this shape (H, W): a PNG, or one of SBD's .mat files.

    Raises UserError, one line, for another size, for a PNG of colours, and for a damaged file.
    """
    try:
        if path.endswith(".mat"):
            levels = scipy.io.loadmat(path)["GTcls"]["Segmentation"][0, 0]
        else:
            with Image.open(path, formats=("PNG",)) as image:
                if image.mode not in ("P", "L"):
                    raise ValueError(f"its pixels are {image.mode}, not numbers of classes")
                if image.size != shape[::-1]:              # before it is decoded
                    raise ValueError(f"it has {image.width} × {image.height} pixels, its picture "
                                     f"{shape[1]} × {shape[0]}")
                levels = np.array(image)
        if levels.shape != shape or levels.dtype != np.uint8:
            raise ValueError(f"it has {levels.shape[-1]} × {levels.shape[0]} numbers of {levels.dtype}, its "
                             f"picture {shape[1]} × {shape[0]}")
    except Exception as error:                             # a damaged file makes a decoder raise anything
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(printable(f"{path}: not a label map of its picture ({said.splitlines()[0]}); fetch "
                                  "it again")) from None
    return levels


# ---------------------------------------------------------------- crops to train on
class Crops(torch.utils.data.Dataset):
    """Item t is this process's share of step t: inputs [B, 3, size, size], classes int64 [B, size, size].

    As in MMSegmentation, a picture is resized by a random scale, cropped, mirrored, and distorted in its
    colours. Where it is smaller than the crop, its mean and IGNORED are put on the right and below.
    sides: see resized; scales: least and greatest factor; most: share of a crop that one class may fill.
    """

    def __init__(self, pictures, batch_size, size, sides, scales, most, distortion, mean, std, seed, rank=0,
                 world_size=1):
        self.order = Batches(pictures.images, batch_size, None, seed, rank, world_size)
        number = self.order.mine.stop - self.order.mine.start
        self.dataset, self.item_bytes = pictures.images, number * size ** 2 * (3 * 4 + 8)
        self.pictures, self.size, self.sides, self.scales = pictures, size, sides, scales
        self.most, self.distortion, self.mean, self.std, self.seed = most, distortion, mean, std, seed

    def __getitem__(self, step):
        rng = np.random.default_rng([self.seed, 14, step])
        uniforms = rng.random((self.order.batch_size, UNIFORMS))[self.order.mine]
        inputs, classes = zip(*map(self.crop, self.order.indices(step).tolist(), uniforms), strict=True)
        return torch.stack(inputs), torch.stack(classes)

    def crop(self, index, u):
        """(input [3, size, size], classes [size, size]) of a picture and UNIFORMS numbers in 0..1."""
        index, picture = self.order.read(index)              # another stands in for a broken picture
        classes = self.pictures.classes(index, picture.shape[1:])
        low, high = self.scales
        x, classes = resized(picture, classes, self.sides, low + (high - low) * u[0])
        for place in u[2:2 + 2 * TRIES].reshape(TRIES, 2):
            spare = np.maximum(np.array(x.shape[2:]) - self.size, 0)
            top, left = (place * (spare + 1)).astype(int)
            window = classes[top:top + self.size, left:left + self.size]
            if self.most >= 1 or is_mixed(window, self.most):            # else the last place is taken
                break
        x = x[:, :, top:top + self.size, left:left + self.size]
        if u[1] < 0.5:
            x, window = x.flip(3), window.flip(1)
        if self.distortion:
            x = distorted(x.expand(-1, 3, -1, -1), u[2 + 2 * TRIES:])
        x = normalize(x, self.mean, self.std)
        below, right = (self.size - side for side in window.shape)
        return F.pad(x[0], (0, right, 0, below)), F.pad(window.long(), (0, right, 0, below), value=IGNORED)


def resized(picture, classes, sides, scale=1.0):
    """A picture as float [1, C, h, w] in 0..1, and its classes [h, w].

    sides: (short, long): the largest size of the picture's shape within these sides times scale; 0: no limit,
    so (0, 0) is the picture's own size times scale.
    """
    height, width = picture.shape[1:]
    limits = [side / own for side, own in zip(sides, sorted((height, width)), strict=True) if side]
    factor = scale * min(limits, default=1)
    size = tuple(max(1, int(side * factor + 0.5)) for side in (height, width))
    x = picture[None].float() / 255
    if size != (height, width):          # without antialias, as OpenCV does in the published code
        x = F.interpolate(x, size, mode="bilinear")
        classes = F.interpolate(classes[None, None], size, mode="nearest-exact")[0, 0]
    return x, classes


def is_mixed(classes, most):
    """Whether a crop has two classes at least, and none of them fills the share `most` of what counts."""
    counts = torch.bincount(classes.flatten(), minlength=256)[:IGNORED]
    return (counts > 0).sum() > 1 and counts.max() < most * counts.sum()


def distorted(x, u):
    """SSD's photometric distortion of colours [1, 3, h, w] in 0..1, by eight numbers u in 0..1.

    Each with probability 1/2: brightness ± 32 levels, contrast and saturation times 0.5 to 1.5, hue ± 36
    degrees. Contrast comes second or last.
    """
    def contrast(x):
        return adjust_brightness(x, 0.5 + u[1]) if u[0] < 0.5 else x
    if u[2] < 0.5:
        x = (x + (2 * u[3] - 1) * 32 / 255).clamp(0, 1)
    if u[4] < 0.5:
        x = contrast(x)
    if u[5] < 0.5:                       # given that, 2 · u[5] is uniform in 0..1
        x = scale_saturation(x, 0.5 + 2 * u[5])
    if u[6] < 0.5:
        x = adjust_hue(x, torch.full((1, 1, 1, 1), (2 * u[7] - 1) / 10, dtype=x.dtype))
    return x if u[4] < 0.5 else contrast(x)


def scale_saturation(x, factor):
    """Multiplies the saturation of HSV, up to its maximum; value and hue stay."""
    value = x.amax(1, keepdim=True)
    saturation = (value - x.amin(1, keepdim=True)) / value.clamp_min(1e-9)
    return value - (value - x) * torch.minimum(1 / saturation.clamp_min(1e-9), torch.tensor(factor).to(x))


# ---------------------------------------------------------------- whole pictures to test on
class Whole(torch.utils.data.Dataset):
    """Item i is picture i: (i, input [1, 3, h, w] resized into these sides, classes uint8 [H, W] as stored).

    It is None for a picture that cannot be read. item_bytes: where the longer side has no limit, of pictures
    twice as long as high.
    """

    def __init__(self, pictures, sides, mean, std):
        short, long = sides
        self.dataset, self.item_bytes = pictures.images, 13 * short * (long or 2 * short)
        self.pictures, self.sides, self.mean, self.std = pictures, sides, mean, std

    def __getitem__(self, index):
        picture = self.pictures.images[index]
        if picture is None:
            return None
        classes = self.pictures.classes(index, picture.shape[1:])
        return index, normalize(resized(picture, classes, self.sides)[0], self.mean, self.std), classes


def ends(length, window, stride):
    """Where windows end on a side of this length."""
    number = max(math.ceil((length - window) / stride), 0) + 1
    return [min(i * stride + window, length) for i in range(number)]
