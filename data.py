"""Data sets by name or path, and the batches of a training step and of an evaluation.

A set is either one uint8 tensor in memory or a list of picture files. Files are read and cropped by workers;
sets in memory are cropped on the training device. The other augmentations are the same for both (views.py).

The order of the images and the random numbers of their views are functions of the seed and the step. So a run
sees the same for any number of processes and workers, and wherever it was stopped.
"""

import difflib
import gzip
import os
import stat
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError

from checkpoint import UserError, printable, to_stderr
from views import UNIFORMS, normalize

INPUTS = {                       # built-in sets: size in pixels; mean and std by channel, of pixels in 0..1
    "fashion-mnist": (28, (0.2860,), (0.3530,)),
    "fake": (32, (0.5,), (0.25,)),
    "cifar10": (32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": (96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
PICTURES = (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))      # picture files: the values of ImageNet
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Nothing else is opened, whatever a file is called: for an EPS file Pillow would start another program.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF")
MOST_BROKEN, ONE_IN = 10, 100    # a run stops above 10 broken pictures, or above 1 in 100 if that is more
FASHION_MNIST = Path(__file__).parent / "datasets" / "fashion-mnist"
FASHION_MNIST_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
                         "Bag", "Ankle boot")
warnings.filterwarnings("ignore", module=r"PIL\.")         # about odd files, which are read all the same


# ---------------------------------------------------------------- data sets
@dataclass
class ImageSet:
    """N images, in memory or as files.

    images: uint8 [N, C, H, W]; None for files. labels: int64 [N], or None. class_names: one for each label.
    paths: of files, an array of bytes. Workers share it; a Python list would be copied into each of them.

    A file that cannot be read is named once on stderr and counted. In training another one stands in, see
    Batches; an evaluation leaves it out and goes on with `readable()`. Too many of them end the run.
    """
    images: torch.Tensor | None
    labels: torch.Tensor | None
    class_names: list | None
    paths: np.ndarray | None = None
    # the parts of a set count its broken files together, and so do the workers: it is in shared memory
    broken: torch.Tensor | None = None            # bool, of all files of the whole set
    positions: torch.Tensor | None = None         # int64 [N], of this part's files in `broken`

    def __post_init__(self):
        if self.images is None and self.broken is None:
            self.broken = torch.zeros(len(self), dtype=torch.bool).share_memory_()
            self.positions = torch.arange(len(self))

    def __len__(self):
        return len(self.paths if self.images is None else self.images)

    def __getitem__(self, index):
        """Image uint8 [C, H, W], a file's in its own size; None if it cannot be read."""
        if self.images is not None:
            return self.images[index]
        position = self.positions[index]
        if self.broken[position]:
            return None
        try:
            return read_picture(os.fsdecode(self.paths[index]))
        except UserError as error:
            self.note_broken(position, error)
            return None

    def note_broken(self, position, error):
        """Names and counts a file that cannot be read. Raises UserError if there are too many."""
        if self.broken[position]:                 # another worker has just named it
            return
        self.broken[position] = True
        total, count = len(self.broken), int(self.broken.sum())
        most = max(MOST_BROKEN, total // ONE_IN)
        to_stderr(f"warning: {error}; {count:,} of {total:,} so far, above {most:,} the run stops")
        if count > most:
            raise UserError(f"--data: {count:,} of {total:,} pictures cannot be read, more than {most:,}; "
                            "each is named above: repair or remove them")

    @property
    def is_readable(self):
        """Bool [N]: False for a file that has turned out to be broken."""
        if self.images is not None:
            return torch.ones(len(self), dtype=torch.bool)
        return ~self.broken[self.positions]

    def readable(self):
        """The images that have not turned out to be broken."""
        return self if self.images is not None else self.subset(self.is_readable)

    def subset(self, index):
        """The images of a slice, an array of indices, or a mask."""
        labels = None if self.labels is None else self.labels[index]
        if self.images is not None:
            return ImageSet(self.images[index], labels, self.class_names)
        return ImageSet(None, labels, self.class_names, self.paths[index], self.broken, self.positions[index])

    @property
    def files(self):
        """Number of files and a checksum of their names, or None: what a resumed run must find unchanged."""
        if self.images is not None:
            return None
        return f"{len(self)} files, CRC-32 {zlib.crc32(self.paths.tobytes()):08x}"


def input_of(config):
    """(size, mean, std) of a network's input, from the flags of the run that trains or trained it."""
    size, mean, std = INPUTS.get(config["data"], PICTURES)
    return config.get("image_size") or size, config.get("mean") or mean, config.get("std") or std


def build_dataset(name, split, seed=0, data_dir="datasets"):
    """A split of a data set, as an ImageSet.

    name: fashion-mnist (embedded); fake (made from the seed); cifar10, cifar100, stl10 (torchvision's files
    in data_dir); or a path: a list of pictures (see _read_list), or a folder with train/class/* and
    val/class/*, with class/*, or with pictures without classes. train.txt and val.txt in a folder are lists.
    A path without train and val is every split.
    split: train; test, a folder's val; or pretrain, which is train without labels, and of stl10 with the
    unlabelled part. Raises UserError.
    """
    if split == "pretrain" and name != "stl10":
        return replace(build_dataset(name, "train", seed, data_dir), labels=None)
    train = split != "test"
    if name == "fashion-mnist":
        part = "train" if train else "t10k"
        images = _read_idx(FASHION_MNIST / f"{part}-images-idx3-ubyte.gz")[:, None]
        labels = _read_idx(FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz").long()
        return ImageSet(images, labels, list(FASHION_MNIST_CLASSES))
    if name == "fake":
        return _fake(train, seed)
    if name in INPUTS:
        return _from_torchvision(name, split, data_dir)
    if not os.path.exists(name):
        near = difflib.get_close_matches(name, INPUTS, 1)
        raise UserError(f"--data: '{name}' is neither a data set ({', '.join(INPUTS)}) nor a folder or list; "
                        f"{f'did you mean {near[0]}?' if near else 'is the path right?'}")
    paths, labels, class_names = _find_pictures(Path(name), train)
    paths = np.array([os.fsencode(path) for path in paths])
    if labels is None:
        return ImageSet(None, None, None, paths)
    return ImageSet(None, torch.tensor(labels), [printable(name) for name in class_names], paths)


# ---------------------------------------------------------------- built-in data sets
def _read_idx(path):
    """An idx.gz file of bytes: two zeros, type 8, number of axes, big-endian sizes, then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it from the repository") from None
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, offset=4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def _fake(train, seed):
    """A colour pattern for each of ten classes, under noise: enough to see a loss go down."""
    patterns = np.random.default_rng([seed, 5]).integers(0, 256, (10, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
    rng = np.random.default_rng([seed, 3 if train else 4])
    labels = rng.permutation(np.arange(512 if train else 256) % 10)
    images = np.clip(patterns[labels] + rng.normal(0, 40, (len(labels), 3, 32, 32)), 0, 255)
    return ImageSet(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels),
                    [f"class {c}" for c in range(10)])


def _from_torchvision(name, split, data_dir):
    """CIFAR-10, CIFAR-100 or STL-10, as torchvision reads them."""
    kind = getattr(torchvision.datasets, name.upper())
    try:
        if name == "stl10":
            found = kind(data_dir, split="train+unlabeled" if split == "pretrain" else split)
            images, labels = found.data, found.labels
        else:
            found = kind(data_dir, train=split != "test")
            images, labels = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)), found.targets
    except (RuntimeError, OSError):
        code = f"import torchvision.datasets as d; d.{name.upper()}('{data_dir}', download=True)"
        raise UserError(f"--data {name}: not whole in --data-dir {data_dir}; fetch it by "
                        f'python -c "{code}"') from None
    labels = None if split == "pretrain" else torch.as_tensor(labels).long()
    return ImageSet(torch.from_numpy(images), labels, list(found.classes))


# ---------------------------------------------------------------- pictures in folders and lists
def _find_pictures(data, train):
    """(paths, labels or None, class names or None) of a split of a folder or list, see build_dataset."""
    try:
        if data.is_file():
            return _read_list(data)
        parts = {"train": _part(data, "train"), "val": _part(data, "val") or _part(data, "test")}
        if not any(parts.values()):
            return _scan(data)
        wanted, other = ("train", "val") if train else ("val", "train")
        if not parts[wanted]:
            raise UserError(f"--data {data}: has {parts[other].name}, but no {wanted} folder and no "
                            f"{wanted}.txt")
        # both parts are read, so that a mistake in val is found before the training
        found = {}
        for name, part in parts.items():
            if part:
                found[name] = _read_list(part) if part.is_file() else _scan(part)
    except OSError as error:
        raise UserError(f"--data {error.filename}: cannot be read ({error.strerror})") from None
    paths, labels, names = found[wanted]
    known = found["train"][2] if "train" in found else names           # classes are numbered as in train
    if labels is None or known is None:
        return paths, None, None
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"--data {parts[wanted]}: class '{unknown[0]}' is not among those of "
                        f"{parts['train']}")
    number = [known.index(name) for name in names]
    return paths, [number[label] for label in labels], known


def _part(folder, name):
    """The folder or the list of that name in a folder, or None."""
    for part in (folder / name, folder / f"{name}.txt"):
        if part.exists():
            return part
    return None


def _scan(folder):
    """As _find_pictures. Subfolders are classes if there are two or more, and no pictures beside them."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    classes = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    if len(classes) < 2 or loose:
        return _pictures_below(folder), None, None
    paths, labels = [], []
    for label, top in enumerate(classes):
        below = _pictures_below(top)
        paths += below
        labels += [label] * len(below)
    return paths, labels, [top.name for top in classes]


def _pictures_below(top):
    """Paths of the pictures in a folder and its subfolders, links followed; UserError if there are none."""
    paths, seen = [], {os.path.realpath(top)}
    for parent, folders, files in os.walk(top, followlinks=True, onerror=_raise):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        # os.walk goes into what is left in `folders`; a link may lead back to a folder above it
        folders[:] = [name for name in real if not name.startswith(".") and real[name] not in seen]
        seen.update(real[name] for name in folders)
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                paths.append(os.path.join(parent, name))
    if not paths:
        raise UserError(f"--data {top}: no pictures in this folder ({' '.join(SUFFIXES)})")
    return paths


def _raise(error):
    raise error


def _read_list(path):
    """As _find_pictures, of lines `PICTURE` or `PICTURE LABEL`; paths are relative to the list's folder."""
    paths, labels, names_in = [], [], {}
    for number, line in enumerate(path.read_text(errors="surrogateescape").split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        words = line.rsplit(None, 1)              # one split: a path may have spaces in it
        has_label = len(words) == 2 and not line.lower().endswith(SUFFIXES)
        picture, label = words if has_label else (line, None)
        picture = os.path.join(path.parent, picture)
        folder, name = os.path.split(picture)
        if folder not in names_in:                # faster than to ask for each of a million files
            names_in[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in names_in[folder]:
            raise UserError(f"--data {path}: line {number} names a missing file: {picture}")
        if labels and (label is None) != (labels[0] is None):
            raise UserError(f"--data {path}: line {number} has {'no' if label is None else 'a'} label, "
                            "unlike the first")
        paths.append(picture)
        labels.append(label)
    if not paths:
        raise UserError(f"--data {path}: an empty list")
    if labels[0] is None:
        return paths, None, None
    return paths, *_number_labels(labels)


def _number_labels(labels):
    """(numbers, class names) of a list's labels: decimal ones are the numbers; others are sorted by name."""
    if all(label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        return numbers, [str(c) for c in range(1 + max(numbers))]
    names = sorted(set(labels))
    number = {name: c for c, name in enumerate(names)}
    return [number[label] for label in labels], names


def read_picture(path):
    """A picture file as uint8 [3, H, W].

    EXIF orientation is applied, transparency dropped; of several frames it is the first. Pillow reads it, as
    torchvision's JPEG decoder takes 0.85 instead of 0.95 ms and is deprecated since version 0.29.
    Raises UserError, one line, for everything that is not a picture.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):        # opening a pipe would wait for its other end
            raise ValueError("not a regular file")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):                 # 16 bits, which Pillow would clip to 8
                levels = np.clip(np.asarray(image) / 257, 0, 255).round()
                image = Image.fromarray(levels.astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:                             # a damaged file makes a decoder raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        raise UserError(printable(f"{path}: not a readable picture ({reason})")) from None


# ---------------------------------------------------------------- labelled sets
def same_files(train, test):
    """Whether train and test are the same files, as for a folder that has no train and val in it."""
    return train.images is None and np.array_equal(train.paths, test.paths)


def labelled(data, seed, data_dir):
    """(train, test) of a labelled data set. Raises UserError if there are no labels or no such parts."""
    train, test = (build_dataset(data, split, seed, data_dir) for split in ("train", "test"))
    if train.labels is None or test.labels is None:
        raise UserError(f"--data {data}: has no labels, which classification needs")
    if same_files(train, test):
        raise UserError(f"--data {data}: has no train and val parts; training images would be tested on")
    return train, test


def hold_out(labels, share, seed):
    """Ascending indices (kept, held out) of images with labels [N]; of each class the share is held out."""
    shuffled = torch.from_numpy(np.random.default_rng([seed, 6]).permutation(len(labels)))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        of_class = shuffled[labels[shuffled] == label]
        held[of_class[:round(share * len(of_class))]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


# ---------------------------------------------------------------- batches to train on
class Batches(torch.utils.data.Dataset):
    """Item t is this process's share of step t: (images, uniforms [V, B, UNIFORMS], labels [B] or None).

    images: of a set in memory uint8 [B, C, H, W]; of files a list of V crops, uint8 [B, 3, h, w]. `views`
    makes inputs of either. batch_size: of all processes together. An epoch is a permutation, cut into steps;
    the rest is dropped. Items are steps, so a run resumes by starting its sampler at a later one.
    """

    def __init__(self, dataset, batch_size, views, seed, rank=0, world_size=1):
        self.dataset, self.batch_size, self.views, self.seed = dataset, batch_size, views, seed
        self.steps_per_epoch = len(dataset) // batch_size
        self.mine = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._epoch = None

    def __getitem__(self, step):
        indices = self.indices(step)
        rng = np.random.default_rng([self.seed, 2, step])
        uniforms = rng.random((len(self.views), self.batch_size, UNIFORMS), dtype=np.float32)
        uniforms = torch.from_numpy(uniforms[:, self.mine])
        if self.dataset.images is not None:
            images = self.dataset.images[indices]
        else:
            chosen, pictures = zip(*[self.read(index) for index in indices.tolist()], strict=True)
            indices = torch.tensor(chosen)        # a stand-in brings its own label
            images = self.views.crop(pictures, uniforms)
        labels = None if self.dataset.labels is None else self.dataset.labels[indices]
        return images, uniforms, labels

    def indices(self, step):
        """Which images of the data set this process has in step t, int64 [B]."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.dataset))
            self._epoch = epoch
        start = step_in_epoch * self.batch_size
        return torch.from_numpy(self._order[start:start + self.batch_size][self.mine])

    def read(self, index):
        """(index, picture) of file `index`, or of the one that stands in if it cannot be read."""
        for candidate in self.stand_ins(index):
            picture = self.dataset[candidate]
            if picture is not None:
                return candidate, picture
        raise UserError(f"--data: none of the {len(self.dataset):,} pictures can be read")

    def stand_ins(self, index):
        """Yields `index`, then every file in an order drawn from (seed, index)."""
        yield index
        yield from np.random.default_rng([self.seed, 8, index]).permutation(len(self.dataset))


def num_workers(wanted, dataset, world_size=1):
    """Data-loader workers of a process: as wanted; for -1 one per core, or none for a set in memory."""
    if wanted >= 0 or dataset.images is not None:
        return max(0, wanted)
    processes = min(world_size, torch.cuda.device_count() or world_size)          # on this machine
    return max(1, (os.cpu_count() or 1) // processes)


def own_group(worker):
    """The worker_init_fn of loaders. A terminal and torchrun send signals to the whole process group; in a
    group of their own, the workers live until the run has saved."""
    if hasattr(os, "setpgrp"):                    # Windows has no such groups
        os.setpgrp()


# ---------------------------------------------------------------- batches to evaluate
class CentreCrops(torch.utils.data.Dataset):
    """Pictures for evaluation: the shorter side resized to size · 256 / 224, then the middle size × size.

    Item i is uint8 [3, size, size], or None if it cannot be read.
    """

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image = self.dataset[index]
        if image is None:
            return None
        height, width = image.shape[-2:]
        short = min(height, width)
        # the ends of a long picture go first: one of 1 × 100,000 would fill the memory when resized
        H, W = min(height, 4 * short), min(width, 4 * short)
        top, left = (height - H) // 2, (width - W) // 2
        image = image[:, top:top + H, left:left + W]
        side = round(self.size * 256 / 224)
        image = F.interpolate(image[None], (side * H // short, side * W // short), mode="bicubic",
                              antialias=True)
        return torchvision.transforms.functional.center_crop(image[0], self.size)


def eval_batches(dataset, config, device, batch_size=512, workers=0):
    """Yields all images in their order, as inputs [B, 3, size, size] of the network trained with `config`.

    Nothing is augmented: files give CentreCrops, images in memory are resized if the network's size differs.
    Broken files are left out; those that were yielded are dataset.readable() afterwards.
    """
    size, mean, std = input_of(config)
    if dataset.images is None:
        batches = torch.utils.data.DataLoader(
            CentreCrops(dataset, size), batch_size, num_workers=num_workers(workers, dataset),
            collate_fn=_stack_readable, worker_init_fn=own_group,
            generator=torch.Generator())          # else it draws from the generator that drop path uses
    else:
        batches = dataset.images.split(batch_size)
    for images in batches:
        if len(images) == 0:                      # nothing in it can be read
            continue
        images = images.to(device).float() / 255
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp_(0, 1)
        yield normalize(images, mean, std)
    if len(dataset) and not dataset.is_readable.any():
        raise UserError(f"--data: none of the {len(dataset):,} pictures can be read")


def _stack_readable(pictures):
    """A batch of items of CentreCrops, without those that are None; [] if none is left."""
    pictures = [picture for picture in pictures if picture is not None]
    return torch.utils.data.default_collate(pictures) if pictures else []
