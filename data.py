"""Data sets by name or path, and the batches of a training step and of an evaluation.

A set is either one uint8 tensor in memory or a list of picture files. Workers read files and crop them; sets
in memory are cropped on the training device, as files are with --crop-on device. The other augmentations are
the same for both (views.py).

The order of the images and the random numbers of their views are functions of the seed and the step. So a run
sees the same for any number of processes and workers, and wherever it was stopped.
"""

import argparse
import difflib
import gzip
import math
import os
import pickle
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

from checkpoint import UserError, printable, to_stderr
from cli import at_least
from folders import find_pictures, in_validation, jpeg_decoder, read_picture, warn_once
from scenes import compose
from views import DEVICE_SIDE, UNIFORMS, normalize

INPUTS = {                       # built-in sets: size in pixels; mean and std by channel, of pixels in 0..1
    "fashion-mnist": (28, (0.2860,), (0.3530,)),
    "mnist": (28, (0.1309,), (0.3080,)),
    "fake": (32, (0.5,), (0.25,)),
    "cifar10": (32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cifar100-20": (32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),     # with its 20 superclasses
    "stl10": (96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
PICTURES = (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))      # picture files: the values of ImageNet
MOST_BROKEN, ONE_IN = 10, 100    # a run stops above 10 broken pictures, or above 1 in 100 if that is more
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")                 # of a container: microseconds in a period
SHARED_MEMORY, MOST_HELD = "/dev/shm", 2 ** 30   # bytes
EMBEDDED = Path(__file__).parent / "datasets"
FASHION_MNIST_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
                         "Bag", "Ankle boot")
EMBEDDED_CLASSES = {"fashion-mnist": FASHION_MNIST_CLASSES, "mnist": tuple("0123456789")}


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
    decoder: str | None = None                    # of JPEG files, see folders.jpeg_decoder; None: Pillow
    part: str = "images"                          # or training images, validation images, test images

    def __post_init__(self):
        images, labels = self.images, self.labels
        if images is not None and not (torch.is_tensor(images) and images.dtype == torch.uint8 and
                                       images.dim() == 4 and images.shape[1] in (1, 3)):
            raise ValueError("images: expected a uint8 tensor [N, 1 or 3, H, W]")
        if labels is not None and not (torch.is_tensor(labels) and len(labels) == len(self)):
            raise ValueError(f"labels: expected a tensor of {len(self)}, as many as images")
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
            return read_picture(os.fsdecode(self.paths[index]), self.decoder)
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
            raise UserError(f"{count:,} of {total:,} pictures cannot be read, more than {most:,}; "
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
            return replace(self, images=self.images[index], labels=labels)
        positions = self.positions[index]
        places = np.asarray(index) if isinstance(index, torch.Tensor) else index
        return replace(self, labels=labels, paths=self.paths[places], positions=positions)

    @property
    def files(self):
        """Number of files and a checksum of their paths, or None: what a resumed run must find unchanged."""
        if self.images is not None:
            return None
        return f"{len(self)} files, CRC-32 {zlib.crc32(self.paths.tobytes()):08x}"


def input_of(config):
    """(size, mean, std) of a network's input, from the flags of the run that trains or trained it.

    Raises UserError for means or standard deviations that are not of one or three channels, or above 1.
    """
    size, mean, std = INPUTS.get(config["data"], PICTURES)
    for name in ("mean", "std"):
        values = config.get(name) or (0,)
        if len(values) not in (1, 3) or max(values) > 1:
            raise UserError(f"--{name}: must be one number for all channels or three, from 0 to 1")
    return config.get("image_size") or size, config.get("mean") or mean, config.get("std") or std


def folder_flags(parser, crops=False):
    """Adds the flags that say which pictures and classes of --data are taken and how files are read.

    They are the same in every stage. crops: adds --crop-on, for a stage with random crops.
    """
    add = parser.add_argument_group("parts and classes of --data").add_argument
    add("--val-share", type=at_least(0, float, 1), metavar="SHARE",
        help="share of each class for validation, in a folder or list that has no train and val; without it "
        "that of the checkpoint if there is one, else 0: all pictures are in every part")
    add("--group-names", action=argparse.BooleanOptionalAction, default=None,
        help="--val-share keeps pictures together whose names agree up to the last _")
    add("--classes", metavar="FILE",
        help="names of the classes to take, one a line, numbered in this order; without it those of the "
        "checkpoint if there is one, else all")
    add = parser.add_argument_group("picture files").add_argument
    add("--decoder", choices=("pillow", "torchvision", "simplejpeg"), help="what decodes JPEG files; the "
        "last two are faster, and their pixels may differ by a level; without it that of the checkpoint if "
        "there is one, else pillow")
    if crops:
        add("--crop-on", default="workers", choices=("workers", "device"),
            help="where random crops are cut; device: workers only decode, for a GPU that waits for them")


def folder_options(args, config=None):
    """The values of folder_flags, as keywords of build_dataset; `classes` becomes the list of names.

    config: a checkpoint's. Where --data is its own data, a flag that is not given has the value that is in
    there, so that an evaluation takes the same parts and classes as the training. Raises UserError.
    """
    inherited = {}
    if config and config.get("data") and (not args.data or _same_place(args.data, config["data"])):
        inherited = config
    options = {}
    for name in ("val_share", "group_names", "classes", "decoder"):
        given = getattr(args, name, None)         # not every script has the flags
        options[name] = inherited.get(name) if given is None else given
    options["decoder"] = None if options["decoder"] == "pillow" else options["decoder"]
    if isinstance(options["classes"], str):
        options["classes"] = _read_class_names(options["classes"])
    if getattr(args, "group_names", None) and not options["val_share"]:
        raise UserError("--group-names: needs --val-share, whose parts it makes")
    return options


def _same_place(a, b):
    return a == b or a not in INPUTS and b not in INPUTS and os.path.realpath(a) == os.path.realpath(b)


def _read_class_names(path):
    """The lines of a file of class names, without empty ones."""
    try:
        lines = Path(path).read_text(errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"--classes {path}: cannot be read ({error.strerror}); it has a class name a line"
                        ) from None
    names = [printable(line.strip()) for line in lines if line.strip()]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if not names or twice:
        problem = f"names '{twice[0]}' twice" if twice else "is empty"
        raise UserError(f"--classes {path}: {problem}; it needs a class name a line")
    return names


def build_dataset(name, split, seed=0, data_dir="datasets", val_share=None, group_names=None, classes=None,
                  decoder=None):
    """A split of a data set, as an ImageSet.

    name: fashion-mnist, mnist (embedded); fake (made from the seed); cifar10, cifar100, cifar100-20, stl10
    (torchvision's files in data_dir); or a path: a list of pictures, shards (*.tar), or a folder with
    train/class/* and val/class/*, with class/*, or with pictures without classes. train.txt and val.txt in a
    folder are lists; train-*.tar and val-*.tar are shards; `test` may stand for `val`. A path without train
    and val is every split, unless val_share divides it.
    split: train; test, a folder's val; or pretrain, which is train without labels, and of stl10 with the
    unlabelled part. val_share, group_names, classes, decoder: see folder_flags. Raises UserError.
    """
    if name is None:
        raise UserError("--data: the checkpoint does not say on what it was trained; name the data")
    options = dict(val_share=val_share, group_names=group_names, classes=classes, decoder=decoder)
    if split == "pretrain" and (name != "stl10" or classes):
        return replace(build_dataset(name, "train", seed, data_dir, **options), labels=None)
    if name in INPUTS:
        if val_share:
            raise UserError(f"--val-share: {name} has a test part already; leave the flag out")
        dataset = _built_in(name, split, seed, data_dir)
    elif os.path.exists(name) or name.endswith(".tar"):
        dataset = _from_files(name, split, val_share, group_names)
        dataset.decoder = decoder
        if decoder:
            jpeg_decoder(decoder)                 # is it installed?
    else:
        near = difflib.get_close_matches(name, INPUTS, 1)
        raise UserError(f"--data: '{name}' is neither a data set ({', '.join(INPUTS)}) nor a folder or list; "
                        f"{f'did you mean {near[0]}?' if near else 'is the path right?'}")
    return _take_classes(dataset, classes, name) if classes else dataset


def _take_classes(dataset, classes, name):
    """The images of these classes, which are numbered in this order."""
    if dataset.labels is None:
        raise UserError(f"--classes: {name} has no labels; leave the flag out")
    number = torch.full((len(dataset.class_names),), -1)
    for c, wanted in enumerate(classes):
        if wanted not in dataset.class_names:
            nearest = difflib.get_close_matches(wanted, dataset.class_names, 1) or dataset.class_names
            raise UserError(f"--classes: '{wanted}' is not among the {len(number)} classes of {name}; "
                            f"is '{nearest[0]}' meant?")
        number[dataset.class_names.index(wanted)] = c
    labels = number[dataset.labels]
    if not (labels >= 0).any():
        raise UserError(f"--classes: {name} has no {dataset.part} of these classes; name others")
    return replace(dataset.subset(labels >= 0), labels=labels[labels >= 0], class_names=list(classes))


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


def _built_in(name, split, seed, data_dir):
    """build_dataset of a name in INPUTS."""
    train = split != "test"
    part = "training images" if train else "test images"
    if name in EMBEDDED_CLASSES:
        stem = EMBEDDED / name / ("train" if train else "t10k")
        images = _read_idx(Path(f"{stem}-images-idx3-ubyte.gz"))[:, None]
        labels = _read_idx(Path(f"{stem}-labels-idx1-ubyte.gz")).long()
        return ImageSet(images, labels, list(EMBEDDED_CLASSES[name]), part=part)
    dataset = _fake(train, seed) if name == "fake" else _from_torchvision(name, split, data_dir)
    return replace(dataset, part=part)


def scenes(split, num, size, seed):
    """`num` scenes of size × size pixels, a scenes.Scenes: Fashion-MNIST's clothes on coloured noise.

    split: train or val, which have other clothes (the set's training and test images). Scene i is the same
    whatever num is. It has n items, one to four: boxes float [n, 4], labels 0 to 9 [n], masks bool [n, H, W].
    """
    clothes = _built_in("fashion-mnist", {"train": "train", "val": "test"}[split], seed, None)
    return compose(clothes.images[:, 0], clothes.labels, num, size, [seed, 13, split == "train"])


def _from_torchvision(name, split, data_dir):
    """CIFAR-10, CIFAR-100 or STL-10, as torchvision reads them; CIFAR-100-20 has CIFAR-100's superclasses."""
    stem = name.removesuffix("-20")
    kind = getattr(torchvision.datasets, stem.upper())
    try:
        if name == "stl10":
            found = kind(data_dir, split="train+unlabeled" if split == "pretrain" else split)
            images, labels, class_names = found.data, found.labels, found.classes
        else:
            found = kind(data_dir, train=split != "test")
            images = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
            labels, class_names = found.targets, found.classes
        if name == "cifar100-20":            # torchvision checks the files, but keeps fine labels only
            folder = Path(found.root, found.base_folder)
            with open(folder / ("test" if split == "test" else "train"), "rb") as file:
                labels = pickle.load(file, encoding="latin1")["coarse_labels"]
            with open(folder / "meta", "rb") as file:
                class_names = pickle.load(file, encoding="latin1")["coarse_label_names"]
    except (RuntimeError, OSError):
        code = f"import torchvision.datasets as d; d.{stem.upper()}('{data_dir}', download=True)"
        raise UserError(f"--data {name}: not whole in --data-dir {data_dir}; fetch it by "
                        f'python -c "{code}"') from None
    labels = None if split == "pretrain" else torch.as_tensor(labels).long()
    return ImageSet(torch.from_numpy(images), labels, list(class_names))


# ---------------------------------------------------------------- pictures in folders and lists
def _from_files(name, split, val_share, group_names):
    """build_dataset of a folder or list."""
    paths, labels, class_names, part = find_pictures(Path(name), train=split != "test")
    chosen = np.ones(len(paths), bool)
    if val_share and part != "images":
        raise UserError(f"--val-share: {name} has train and val already; leave the flag out")
    if val_share:
        chosen = in_validation(paths, name, val_share, group_names)
        part = "validation images"
        if split != "test":
            chosen, part = ~chosen, "training images"
        if not chosen.any():
            raise UserError(f"--val-share {val_share}: there are no {part} among the {len(paths):,}; take "
                            "another share" + " or leave --group-names out" * bool(group_names))
    paths = np.array([os.fsencode(path) for path in paths])[chosen]
    if labels is None:
        return ImageSet(None, None, None, paths, part=part)
    labels, class_names = np.array(labels, np.int64), [printable(name) for name in class_names]
    lacking = sorted({*labels.tolist()} - {*labels[chosen].tolist()})
    if lacking and split != "test":
        warn_once(f"--val-share {val_share}: {len(lacking)} classes have no training image, the first is "
                   f"'{class_names[lacking[0]]}'")
    return ImageSet(None, torch.from_numpy(labels[chosen]), class_names, paths, part=part)


# ---------------------------------------------------------------- labelled sets
def count_overlap(train, test):
    """Number of picture files of test that are in train, too, by whatever path or link; 0 in memory."""
    if train.images is not None:
        return 0
    return len(_real_paths(train) & _real_paths(test))


def _real_paths(dataset):
    """The set of the real paths of a data set's files."""
    real_folder, real = {}, set()
    for path in dataset.paths.tolist():
        folder, name = os.path.split(path)
        if folder not in real_folder:             # faster than to resolve each of a million files
            real_folder[folder] = os.path.realpath(folder)
        path = os.path.join(real_folder[folder], name)
        real.add(os.path.realpath(path) if os.path.islink(path) else path)
    return real


def labelled(args, config):
    """(train, test) of --data, or without it of a checkpoint's own data; config: the checkpoint's.

    Raises UserError if there are no labels or no such parts, or if training images would be tested on.
    """
    data = args.data or config["data"]
    options = folder_options(args, config)
    train, test = (build_dataset(data, split, config.get("seed", 0), args.data_dir, **options)
                   for split in ("train", "test"))
    if train.labels is None or test.labels is None:
        raise UserError(f"--data {data}: has no labels; sort the pictures into folders CLASS/, or list "
                        "them with labels")
    if train.part == "images":
        raise UserError(f"--data {data}: has no train and val parts; --val-share 0.2 keeps a fifth of each "
                        "class for validation")
    overlap = count_overlap(train, test)
    if overlap:
        raise UserError(f"--data {data}: {overlap:,} of the {len(test):,} {test.part} are training images, "
                        "too; remove them from one of the two")
    return train, test


def hold_out(labels, share, seed):
    """Ascending indices (kept, held out) of images with labels [N].

    Of a class with n images, round(share * n) are held out, at most n - 1.
    """
    shuffled = torch.from_numpy(np.random.default_rng([seed, 6]).permutation(len(labels)))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        of_class = shuffled[labels[shuffled] == label]
        held[of_class[:min(round(share * len(of_class)), len(of_class) - 1)]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def refuse_empty_classes(dataset, indices, where):
    """Raises UserError if a class has no image among these indices; where: the flag that chose them."""
    counts = torch.bincount(dataset.labels[indices], minlength=len(dataset.class_names))
    of_all = torch.bincount(dataset.labels, minlength=len(dataset.class_names))
    if 0 in of_all:
        raise UserError(f"--data: class '{dataset.class_names[int(of_all.argmin())]}' has no training image; "
                        "give it some, or number the classes from 0 without gaps")
    if 0 in counts:
        raise UserError(f"{where}: no image of class '{dataset.class_names[int(counts.argmin())]}', as of "
                        f"{int((counts == 0).sum())} of {len(counts)} classes; take more images")


def draw_labels(dataset, fraction, seed):
    """Ascending indices of round(fraction * N) images, equally many of each class or one more, by the seed.

    A class that has fewer images gives all; fraction 1 is all images. Raises UserError if a class has none.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--label-fraction {fraction}: must be above 0 and at most 1")
    if fraction == 1:
        return torch.arange(len(dataset))
    rng, C = np.random.default_rng([seed, 7]), len(dataset.class_names)
    each, more = divmod(round(fraction * len(dataset)), C)
    one_more, shuffled = set(rng.permutation(C)[:more].tolist()), rng.permutation(len(dataset))
    labels = dataset.labels.numpy()[shuffled]
    chosen = [shuffled[labels == c][:each + (c in one_more)] for c in range(C)]
    indices = torch.from_numpy(np.sort(np.concatenate(chosen)))
    refuse_empty_classes(dataset, indices, f"--label-fraction {fraction}")
    return indices


# ---------------------------------------------------------------- batches to train on
class Batches(torch.utils.data.Dataset):
    """Item t is this process's share of step t: (images, uniforms [V, B, UNIFORMS], labels [B] or None).

    images: of a set in memory uint8 [B, C, H, W]; of files a list of V crops, uint8 [B, 3, h, w], or with
    crop_on="device" whole pictures, see Views.pad. `views` makes inputs of each. batch_size: of all processes
    together. An epoch is a permutation, cut into steps; the rest is dropped. Items are steps, so a run
    resumes by starting its sampler at a later one.
    """

    def __init__(self, dataset, batch_size, views, seed, rank=0, world_size=1, crop_on="workers"):
        self.dataset, self.batch_size, self.views, self.seed = dataset, batch_size, views, seed
        self.crop_on = crop_on
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
            cut = self.views.crop if self.crop_on == "workers" else self.views.pad
            images = cut(pictures, uniforms)
        labels = None if self.dataset.labels is None else self.dataset.labels[indices]
        return images, uniforms, labels

    @property
    def item_bytes(self):
        """Bytes of an item, at most."""
        number = self.mine.stop - self.mine.start
        if self.dataset.images is not None:
            image = self.dataset.images[0].numel()
        elif self.crop_on == "device":
            image = 3 * DEVICE_SIDE ** 2
        else:
            image = self.views.crop_bytes
        return number * (image + 4 * UNIFORMS * len(self.views))

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
        raise UserError(f"--data: none of the {len(self.dataset):,} pictures can be read; is --data right?")

    def stand_ins(self, index):
        """Yields `index`, then every file in an order drawn from (seed, index)."""
        yield index
        yield from np.random.default_rng([self.seed, 8, index]).permutation(len(self.dataset))


def loader_workers(wanted, batches):
    """Keywords of a DataLoader: how many workers, and how many batches each prepares ahead.

    batches: a Batches or CentreCrops, whose item_bytes are those of one batch.

    A worker is two steps ahead if all that this process's workers hold is at most MOST_HELD, else one. They
    hold it in shared memory; where that is too small, a line says so before they die there.
    """
    number = num_workers(wanted, batches.dataset)
    if number == 0:
        return dict(num_workers=0)
    ahead = 2 if 2 * number * batches.item_bytes <= MOST_HELD else 1
    need = (ahead * number + 1) * batches.item_bytes * local_processes()     # and the one in use
    with suppress(OSError, AttributeError):       # not on Windows
        room = os.statvfs(SHARED_MEMORY)
        room = room.f_bavail * room.f_frsize
        if need > room:
            fits = max(0, room // (batches.item_bytes * local_processes()) - 1) // ahead
            warn_once(f"{SHARED_MEMORY} has {room >> 20:,} MiB, {number} workers of each process may need "
                      f"{need >> 20:,} MiB; --workers {fits} fits, or enlarge it (docker --shm-size "
                      f"{1 + (need >> 30)}g)")
    return dict(num_workers=number, prefetch_factor=ahead)


def local_processes():
    """Number of processes of this run on this machine."""
    total = int(os.environ.get("WORLD_SIZE", 1))
    return int(os.environ.get("LOCAL_WORLD_SIZE", min(total, torch.cuda.device_count() or total)))


def num_workers(wanted, dataset):
    """Data-loader workers of a process: as wanted; for -1 none for a set in memory, else its share of the
    CPUs that the processes on this machine may use."""
    if wanted >= 0 or dataset.images is not None:
        return max(0, wanted)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):           # no such file, or no limit in it
        quota, period = map(int, CPU_LIMIT.read_text().split())
        cpus = min(cpus, math.ceil(quota / period))
    return max(1, cpus // local_processes())


def own_group(worker):
    """The worker_init_fn of loaders. A terminal and torchrun send signals to the whole process group; in a
    group of their own, the workers live until the run has saved."""
    if hasattr(os, "setpgrp"):                    # Windows has no such groups
        os.setpgrp()


# ---------------------------------------------------------------- batches to evaluate
class CentreCrops(torch.utils.data.Dataset):
    """Pictures for evaluation: the shorter side resized to size · 256 / 224, then the middle size × size.

    side: another length of the shorter side. Item i is uint8 [3, size, size], or None if it cannot be read.
    batch_size: how many a worker puts together.
    """

    def __init__(self, dataset, size, interpolation="bicubic", side=None, batch_size=1):
        self.dataset, self.size, self.interpolation = dataset, size, interpolation
        self.item_bytes = batch_size * 3 * size ** 2
        self.side = side or round(size * 256 / 224)

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
        image = F.interpolate(image[None], (self.side * H // short, self.side * W // short),
                              mode=self.interpolation, antialias=True)
        return torchvision.transforms.functional.center_crop(image[0], self.size)


def eval_batches(dataset, config, device, batch_size=512, workers=0, crop_class=CentreCrops):
    """Yields all images in their order, as inputs [B, 3, size, size] of the network trained with `config`.

    Nothing is augmented: files are cut by crop_class, images in memory resized if the network's size differs,
    and to config["resize_side"] if it names one, of which the middle is taken.
    Broken files are left out; those that were yielded are dataset.readable() afterwards. No batch waits for a
    CUDA device: files come from pinned memory, images in memory are copied there once.
    """
    size, mean, std = input_of(config)
    on_cuda = torch.device(device).type == "cuda"
    interpolation = config.get("interpolation", "bicubic")
    if dataset.images is None:
        crops = crop_class(dataset, size, interpolation, config.get("resize_side"), batch_size)
        batches = torch.utils.data.DataLoader(
            crops, batch_size, **loader_workers(workers, crops), collate_fn=_stack_readable,
            worker_init_fn=own_group, pin_memory=on_cuda,
            generator=torch.Generator())          # else it draws from the generator that drop path uses
    else:
        batches = dataset.images.to(device).split(batch_size)
    for images in batches:
        if len(images) == 0:                      # nothing in it can be read
            continue
        images = images.to(device, non_blocking=on_cuda).float() / 255
        side = size if dataset.images is None else config.get("resize_side") or size
        if images.shape[2:] != (side, side):
            images = F.interpolate(images, (side, side), mode=interpolation, antialias=True).clamp_(0, 1)
        margin = (side - size) // 2
        images = images[:, :, margin:margin + size, margin:margin + size]
        yield normalize(images, mean, std)
    if len(dataset) and not dataset.is_readable.any():
        raise UserError(f"--data: none of the {len(dataset):,} pictures can be read; is --data right?")


def _stack_readable(pictures):
    """A batch of items of CentreCrops, without those that are None; [] if none is left."""
    pictures = [picture for picture in pictures if picture is not None]
    return torch.utils.data.default_collate(pictures) if pictures else []
