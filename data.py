"""Data sets by name or path, and views (augmentations), made for whole batches by tensor operations.

A set is either in memory, as one uint8 tensor, or a list of picture files. Of the first, crops are cut on the
device; of the second by workers, where the file is read; what follows, from colours on, is the same.

All randomness of a view is a row of uniform numbers, drawn on the CPU from (seed, step) for the whole global
batch and sliced by process; everything after that is a pure function. So a run sees the same views whatever
the number of processes and workers, and wherever it was stopped.
"""

import gzip
import os
import stat
import warnings
import zlib
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from checkpoint import UserError, printable, to_stderr

INPUTS = {                       # built-in data sets: pixels, and mean and std of pixels in 0..1, by channel
    "fashion-mnist": (28, (0.2860,), (0.3530,)),
    "fake": (32, (0.5,), (0.25,)),
    "cifar10": (32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": (96, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
PICTURES = (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))      # of picture files: ImageNet's
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# what may be opened, whatever a file is called: of an EPS, for one, Pillow would start another program
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF")
MOST_BROKEN, ONE_IN = 10, 100    # pictures of a set that may be broken: so many, or one in so many if more
FASHION_MNIST = Path(__file__).parent / "datasets" / "fashion-mnist"
FASHION_MNIST_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
                         "Bag", "Ankle boot")
# principal components of ImageNet's colours, RGB in 0..1, for noise as AlexNet's (as in fb.resnet.torch):
# one direction a column, and how wide each is
COLOUR_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
COLOUR_WIDTHS = (0.2175, 0.0188, 0.0045)
UNIFORMS = 40                    # random numbers in one view of one image, see RandomView
warnings.filterwarnings("ignore", module=r"PIL\.")         # of odd files, which are read all the same


# ---------------------------------------------------------------- data sets
@dataclass
class ImageSet:
    """N images: uint8 [N, C, H, W], or None and the paths of N picture files; labels: int64 [N] or None.

    A file that cannot be read is named once, counted, and given as None: training takes another in its place
    (Batches), evaluation leaves it out and goes on with `readable()`. Too many of them end the run.
    """
    images: torch.Tensor | None
    labels: torch.Tensor | None
    class_names: list | None
    paths: np.ndarray | None = None               # of bytes; of a list every worker would come to own a copy
    broken: torch.Tensor | None = None            # bool, of the set that this is a part of; workers share it
    places: torch.Tensor | None = None            # int64 [N], in that set

    def __post_init__(self):
        if self.images is None and self.broken is None:
            self.broken = torch.zeros(len(self), dtype=torch.bool).share_memory_()
            self.places = torch.arange(len(self))

    def __len__(self):
        return len(self.paths if self.images is None else self.images)

    def __getitem__(self, index):
        """Image uint8 [C, H, W], a file's as large as it is; None: it is broken."""
        if self.images is not None:
            return self.images[index]
        if self.broken[self.places[index]]:
            return None
        try:
            return read_picture(os.fsdecode(self.paths[index]))
        except UserError as error:
            self._note(self.places[index], error)

    def _note(self, place, error):
        """Marks a file as broken, and names it."""
        if self.broken[place]:                    # by another worker, just now
            return
        self.take_for_broken(place, error)

    def take_for_broken(self, places, error=None):
        """Marks files by their places in the whole set. Raises UserError if too many of it are broken.

        error: of one that is new; of those that another process found, or an earlier part of the run, none.
        """
        if self.images is not None:
            return
        self.broken[places] = True                # no other's mark is touched, as `|=` of the whole would do
        number, count = len(self.broken), int(self.broken.sum())
        most = max(MOST_BROKEN, number // ONE_IN)
        if error is not None:
            to_stderr(f"warning: {error}; {count:,} of {number:,} so far, above {most:,} the run stops")
        if count > most:
            raise UserError(f"--data: {count:,} of {number:,} pictures cannot be read, more than {most:,}; "
                            "each is named above: mend them, or remove them and begin anew")

    def state_dict(self):
        """Of a whole set, for a checkpoint: which files these are, and the places of those found broken."""
        if self.images is not None:
            return {}
        return dict(names=zlib.crc32(self.paths.tobytes()), broken=self.broken.nonzero()[:, 0])

    def load_state_dict(self, state):
        """What state_dict() gave. Raises UserError if these are not the same files."""
        if self.images is None and state:
            if state["names"] != zlib.crc32(self.paths.tobytes()):
                raise UserError("--data: pictures were added, removed or renamed since the run was saved; "
                                "put back what was there, or --overwrite starts anew")
            self.take_for_broken(state["broken"])

    def agree(self, device):
        """What one process has found broken all take for broken: a collective, of files only."""
        if self.images is None and dist.is_initialized():
            broken = (~self.is_readable).to(device, torch.uint8)
            dist.all_reduce(broken, dist.ReduceOp.MAX)
            self.take_for_broken(self.places[broken.cpu() > 0])

    def tally(self):
        """For a line of the log: {"num_broken": files that have turned out to be broken}, {} if none has."""
        num_broken = int((~self.is_readable).sum())
        return {"num_broken": num_broken} if num_broken else {}

    @property
    def is_readable(self):
        """Bool [N]: False for a file that has turned out to be broken."""
        return torch.ones(len(self)) > 0 if self.images is not None else ~self.broken[self.places]

    def readable(self):
        """The images that have not turned out to be broken."""
        return self if self.images is not None else self.subset(self.is_readable)

    def subset(self, index):
        """The images of a slice, an array of indices, or a mask."""
        images, labels, paths, places = (x if x is None else x[index]
                                         for x in (self.images, self.labels, self.paths, self.places))
        return ImageSet(images, labels, self.class_names, paths, self.broken, places)


def input_of(config):
    """(size, mean, std) of a network's input, from the flags of the run that trains or trained it."""
    size, mean, std = INPUTS.get(config["data"], PICTURES)
    return config.get("image_size") or size, config.get("mean") or mean, config.get("std") or std


def build_dataset(name, split, seed=0, data_dir="datasets"):
    """A split of a data set: built in, of torchvision, or the user's pictures.

    name: fashion-mnist (embedded); fake; cifar10, cifar100, stl10 (torchvision's files in data_dir); or a
    path: a folder with train/class/* and val/class/*, or class/*, or pictures without classes, or a list (see
    _read_list); train.txt and val.txt in a folder are lists, too. Without such parts all is in every split.
    split: train, test (that is val, too), or pretrain: train without labels, and of stl10 the unlabelled part
    with it.
    """
    if seed < 0:                 # as numpy's generators, which everything is drawn by, refuse it
        raise UserError(f"--seed {seed}: must be at least 0")
    if split == "pretrain" and name != "stl10":
        return replace(build_dataset(name, "train", seed, data_dir), labels=None)
    train = split != "test"
    if name == "fashion-mnist":
        part = "train" if train else "t10k"
        images = _read_idx(FASHION_MNIST / f"{part}-images-idx3-ubyte.gz")[:, None]
        labels = _read_idx(FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz").long()
        return ImageSet(images, labels, list(FASHION_MNIST_CLASSES))
    if name == "fake":           # per class one colour pattern, under noise: enough to see a loss go down
        rng = np.random.default_rng([seed, 3 if train else 4])
        labels = rng.permutation(np.arange(512 if train else 256) % 10)
        patterns = np.random.default_rng([seed, 5]).integers(0, 256, (10, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
        images = np.clip(patterns[labels] + rng.normal(0, 40, (len(labels), 3, 32, 32)), 0, 255)
        return ImageSet(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels),
                        [f"class {c}" for c in range(10)])
    if name in INPUTS:
        return _torchvisions(name, split, data_dir)
    if not os.path.exists(name):
        raise UserError(f"--data: '{name}' is neither a data set ({', '.join(INPUTS)}) nor a folder or list")
    paths, labels, class_names = _find_pictures(Path(name), train)
    return ImageSet(None, None if labels is None else torch.tensor(labels),
                    class_names and [printable(name) for name in class_names],
                    np.array([os.fsencode(path) for path in paths]))


def _torchvisions(name, split, data_dir):
    """CIFAR-10, CIFAR-100, STL-10 as torchvision reads them."""
    kind = getattr(torchvision.datasets, name.upper())
    if name == "stl10":
        which = dict(split={"pretrain": "train+unlabeled"}.get(split, split))
    else:
        which = dict(train=split != "test")
    try:
        found = kind(data_dir, **which)
    except (RuntimeError, OSError):
        code = f"import torchvision.datasets as d; d.{name.upper()}('{data_dir}', download=True)"
        raise UserError(f"--data {name}: not whole in --data-dir {data_dir}; fetch it by "
                        f'python -c "{code}"') from None
    images = found.data if name == "stl10" else np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
    labels = torch.as_tensor(found.labels if name == "stl10" else found.targets).long()
    return ImageSet(torch.from_numpy(images), None if split == "pretrain" else labels, list(found.classes))


def _find_pictures(data, train):
    """(paths, labels or None, class names or None) of a folder or a list, see build_dataset."""
    try:
        if data.is_file():
            return _read_list(data)
        found = {name: next((data / n for n in (name, f"{name}.txt") if (data / n).exists()), None)
                 for name in ("train", "val", "test")}
        found["val"] = found["val"] or found["test"]
        if not (found["train"] or found["val"]):
            return _scan(data)
        here, other = ("train", "val") if train else ("val", "train")
        if not found[here]:
            raise UserError(f"--data {data}: has {found[other].name}, but no {here} folder and no {here}.txt")
        read = {name: _read_list(part) if part.is_file() else _scan(part) for name, part in found.items()
                if part and name != "test"}
    except OSError as error:
        raise UserError(f"--data {error.filename}: cannot be read ({error.strerror})") from None
    paths, labels, names = read[here]
    known = read["train"][2] if found["train"] else names        # classes are numbered as in training
    if labels is None or known is None:
        return paths, None, None
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(f"--data {found[here]}: class '{unknown[0]}' is not among those of {found['train']}")
    return paths, [known.index(names[label]) for label in labels], known


def _scan(folder):
    """Pictures below a folder; its subfolders are classes, unless there is but one, or pictures beside it."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    flat = len(folders) < 2 or any(entry.suffix.lower() in SUFFIXES for entry in entries if entry.is_file())
    paths, labels = [], []
    for label, top in enumerate([folder] if flat else folders):
        before, seen = len(paths), {os.path.realpath(top)}
        for parent, inner, files in os.walk(top, followlinks=True, onerror=_fail):
            real = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(inner)}
            inner[:] = [name for name in real if not name.startswith(".") and real[name] not in seen]
            seen.update(real[name] for name in inner)             # a link may lead back to where it stands
            paths += [os.path.join(parent, name) for name in sorted(files)
                      if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        if len(paths) == before:
            raise UserError(f"--data {top}: no pictures in this folder ({' '.join(SUFFIXES)})")
        labels += [label] * (len(paths) - before)
    return (paths, None, None) if flat else (paths, labels, [top.name for top in folders])


def _fail(error):
    raise error


def _read_list(path):
    """Lines `PICTURE` or `PICTURE LABEL`, paths from the list's folder on; labels are numbers or names."""
    entries, listed = [], {}
    for number, line in enumerate(path.read_text(errors="surrogateescape").split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        bare = line.lower().endswith(SUFFIXES)       # a path may have spaces in it
        picture, label = (line, None) if bare else (*line.rsplit(None, 1), None)[:2]
        picture = os.path.join(path.parent, picture)
        parent, name = os.path.split(picture)
        if parent not in listed:                     # one look at each folder, not at each of a million files
            listed[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
        if name not in listed[parent]:
            raise UserError(f"--data {path}: line {number} names a missing file: {picture}")
        if entries and (label is None) != (entries[0][1] is None):
            raise UserError(f"--data {path}: line {number} has {'no' if label is None else 'a'} label, "
                            "unlike the first")
        entries.append((picture, label))
    if not entries:
        raise UserError(f"--data {path}: an empty list")
    paths, labels = zip(*entries, strict=True)
    if labels[0] is None:
        return paths, None, None
    if all(label.isdecimal() for label in labels):
        names = [str(c) for c in range(1 + max(map(int, labels)))]
        return paths, [int(label) for label in labels], names
    names = sorted(set(labels))
    number = {name: c for c, name in enumerate(names)}
    return paths, [number[label] for label in labels], names


def _read_idx(path):
    """An idx.gz file of bytes: two zeros, type 8, number of axes, big-endian sizes, then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it from the repository") from None
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, offset=4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


def read_picture(path):
    """A picture file as uint8 [3, H, W]: of several frames the first, turned as EXIF says, without alpha.

    By Pillow: torchvision's JPEG decoder is hardly faster (0.85 for 0.95 ms), and deprecated since 0.29.
    Raises UserError, of one line, for whatever is not one.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe is to wait for its other end
            raise ValueError("not a regular file")
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):           # 16 bits, which Pillow would clip to 8
                image = Image.fromarray(np.clip(np.asarray(image) / 257, 0, 255).round().astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:   # whatever a damaged file makes a decoder raise
        reason = (f"none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else
                  getattr(error, "strerror", None) or str(error) or type(error).__name__)
        raise UserError(printable(f"{path}: not a readable picture ({reason})")) from None


class Batches(torch.utils.data.Dataset):
    """Item t is this process's share of step t, (images, uniforms [V, B, UNIFORMS]), for `views` to finish.

    images: uint8 [B, C, H, W] of a set in memory; of files a list of V crops, uint8 [B, 3, h, w]. Each epoch
    is a permutation from (seed, epoch) cut into steps of the global batch, the rest dropped. As the loader
    maps steps to batches, a run resumes by starting its sampler elsewhere, with any workers. In the place of
    a broken file stands another, which is a function of (seed, index).
    """

    def __init__(self, dataset, batch_size, views, seed, rank=0, world_size=1):
        self.dataset, self.batch_size, self.views, self.seed = dataset, batch_size, views, seed
        self.steps_per_epoch = len(dataset) // batch_size
        self.mine = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._epoch = None

    def indices(self, step):
        """Which images of the data set this process has in step t: int64 [B]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.dataset))
            self._epoch = epoch
        return torch.from_numpy(self._order[place * self.batch_size:][:self.batch_size][self.mine])

    def __getitem__(self, step):
        indices = self.indices(step)
        rng = np.random.default_rng([self.seed, 2, step])
        uniforms = rng.random((len(self.views), self.batch_size, UNIFORMS), dtype=np.float32)[:, self.mine]
        uniforms = torch.from_numpy(uniforms)
        if self.dataset.images is None:
            pictures = [self.dataset[i] for i in indices]
            pictures = [self.stand_in(i, self.dataset.__getitem__) if picture is None else picture
                        for i, picture in zip(indices, pictures, strict=True)]
            return self.views.crop(pictures, uniforms), uniforms
        return self.dataset.images[indices], uniforms

    def stand_in(self, index, find):
        """find(i) for a readable image i in the place of the broken one `index`, of the same class if known.

        The first of an order drawn by the index for which find(i) is not None. Raises UserError if none is.
        """
        labels = self.dataset.labels              # of the set with gaps: indices(step) says which labels
        others = (torch.arange(len(self.dataset)) if labels is None else
                  (labels == labels[index]).nonzero()[:, 0])
        order = np.random.default_rng([self.seed, 8, int(index)]).permutation(others)
        found = next((x for x in map(find, order) if x is not None), None)
        if found is None:
            of_class = "" if labels is None else f" of class '{self.dataset.class_names[labels[index]]}'"
            raise UserError(f"--data: none of the {len(order):,} pictures{of_class} can be read")
        return found

    def readable_rows(self):
        """For each image its row in dataset.readable(), for a broken one that of its stand-in: int64 [N]."""
        row = {int(i): n for n, i in enumerate(self.dataset.is_readable.nonzero()[:, 0])}
        return torch.tensor([row[i] if i in row else self.stand_in(i, row.get)
                             for i in range(len(self.dataset))])


def num_workers(wanted, dataset, world_size=1):
    """Processes that prepare batches: as wanted; for -1 none of a set in memory, else one per core."""
    if wanted >= 0 or dataset.images is not None:
        return max(0, wanted)
    processes = min(world_size, torch.cuda.device_count() or world_size)          # on this machine
    return max(1, (os.cpu_count() or 1) // processes)


def own_group(worker):
    """For a process that prepares batches: what torchrun or a terminal sends to a whole group, a wish to stop
    above all, is for the run itself; a reader would die of it, and the run of that."""
    os.setpgrp()


def normalize(images, mean, std):
    """Pixels 0..1 [B, C, H, W] -> the network's input [B, 3, H, W]; gray is repeated. mean, std: 1 or 3."""
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    return ((images - mean) / std).expand(-1, 3, -1, -1)


class CentreCrops(torch.utils.data.Dataset):
    """Pictures as they are evaluated: shorter side to 256/224 of `size`, of that the middle size × size."""

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        """uint8 [3, size, size]; None: it is broken."""
        image = self.dataset[index]
        if image is None:
            return None
        H, W = image.shape[-2:]
        short = min(H, W)
        top, left = max(0, H - 4 * short) // 2, max(0, W - 4 * short) // 2    # 1 × 100,000 would fill memory
        H, W = min(H, 4 * short), min(W, 4 * short)
        image = image[:, top:top + H, left:left + W]
        side = round(self.size * 256 / 224)
        image = F.interpolate(image[None], (side * H // short, side * W // short), mode="bicubic",
                              antialias=True)
        return torchvision.transforms.functional.center_crop(image[0], self.size)


def eval_batches(dataset, config, device, batch_size=512, workers=0):
    """Yields all images in their order, as inputs [B, 3, size, size] of the network trained with `config`.

    Nothing is augmented: of files CentreCrops, images in memory whole, resized if the network's size differs.
    Broken files are left out: what has been yielded is dataset.readable() of afterwards.
    """
    size, mean, std = input_of(config)
    if dataset.images is None:
        batches = torch.utils.data.DataLoader(CentreCrops(dataset, size), batch_size, collate_fn=_readable,
                                              num_workers=num_workers(workers, dataset),
                                              worker_init_fn=own_group)
    else:
        batches = dataset.images.split(batch_size)
    for images in filter(len, batches):
        images = images.to(device).float() / 255
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp_(0, 1)
        yield normalize(images, mean, std)
    if len(dataset) and not dataset.is_readable.any():
        raise UserError(f"--data: none of the {len(dataset):,} pictures can be read")


def _readable(pictures):
    """A batch of what CentreCrops gives, [] if nothing of it can be read."""
    pictures = [picture for picture in pictures if picture is not None]
    return torch.utils.data.default_collate(pictures) if pictures else []


# ---------------------------------------------------------------- views
JITTER = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue
VIEWS = {                        # the first global crop, the second, the local crops; of the published code
    "barlow": (dict(scale=(0.08, 1), jitter=JITTER, gray=0.2, blur=1.0),
               dict(scale=(0.08, 1), jitter=JITTER, gray=0.2, blur=0.1, solarize=0.2)),
    "moco": (dict(scale=(0.2, 1), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5),) * 2,
    "moco-v1": (dict(scale=(0.2, 1), jitter=(0.4,) * 4, jitter_p=1, gray=0.2, gray_first=True),) * 2,
    "multicrop": (dict(scale=(0.4, 1), jitter=JITTER, gray=0.2, blur=1.0),
                  dict(scale=(0.4, 1), jitter=JITTER, gray=0.2, blur=0.1, solarize=0.2),
                  dict(scale=(0.05, 0.4), jitter=JITTER, gray=0.2, blur=0.5)),
    "selflabel": (dict(scale=(0.14, 1), jitter=JITTER, gray=0.2, blur=1.0),
                  dict(scale=(0.14, 1), jitter=JITTER, gray=0.2, blur=0.1, solarize=0.2),
                  dict(scale=(0.05, 0.14), jitter=JITTER, gray=0.2, blur=0.5)),
    "seed": (dict(scale=(0.14, 1), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5),) * 2 + (
        dict(scale=(0.05, 0.14), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5),),
    # ours, for 28 × 28 gray pictures: strong contrast instead of colour, no blur of the few pixels there are
    "fashion-mnist": (dict(scale=(0.4, 1), jitter=(0.8, 0.8, 0, 0), jitter_each=True),) * 2 + (
        dict(scale=(0.1, 0.4), jitter=(0.8, 0.8, 0, 0), jitter_each=True),),
}


def build_views(name, mean, std, size, local_size=None, num_local=0, num_global=2, arch=""):
    """The V = num_global + num_local views of the recipe `name`, as a `Views`, for a network of that arch."""
    recipe = VIEWS[name]
    least = min(size, local_size if num_local > 0 else size)
    if arch.startswith("vit") and least < 16:
        raise UserError(f"--image-size, --local-size: {arch} has patches of 16, a crop {least} pixels")
    if num_local > 0 and len(recipe) < 3:
        raise UserError(f"--num-local {num_local}: --views {name} has no local crops; --views multicrop has")
    views = [(size, recipe[v]) for v in range(num_global)] + [(local_size, recipe[-1])] * num_local
    return Views(views, mean, std)


class Views(nn.Module):
    """V views; those in a row that have size and parameters in common are made together, which is faster."""

    def __init__(self, sizes_and_kwargs, mean, std):
        super().__init__()
        self.runs = []           # (view, first, last + 1)
        for (size, kwargs), run in groupby(sizes_and_kwargs):
            first = len(self)
            self.runs.append((RandomView(size, mean, std, **kwargs), first, first + len(list(run))))

    def __len__(self):
        return self.runs[-1][2] if self.runs else 0

    def crop(self, pictures, uniforms):
        """B pictures uint8 [3, H, W], each of its own size -> V crops uint8 [B, 3, h, w]: a worker's part."""
        return [view.crop(pictures, u) for view, first, last in self.runs for u in uniforms[first:last]]

    def forward(self, images, uniforms, device=None):
        """What `Batches` gives -> V inputs [B, 3, h, w] on `device`."""
        x = []
        for view, first, last in self.runs:
            u = uniforms[first:last].flatten(0, 1)
            if isinstance(images, list):
                crops = torch.cat([crop.to(device, non_blocking=True) for crop in images[first:last]])
                made = view.colour(crops.float() / 255, u)
            else:
                made = view(images.to(device, non_blocking=True).repeat(last - first, 1, 1, 1), u)
            x += made.chunk(last - first)
        return [v.contiguous(memory_format=torch.channels_last) for v in x]


class RandomView(nn.Module):
    """Random resized crop (bicubic), flip, colour jitter, gray, blur, solarise, normalise; drawn per image.

    size: pixels of the square output. scale: share of the area, ratio: width / height of the crop. jitter:
    strengths of brightness, contrast, saturation, hue, applied together with probability jitter_p, or with
    jitter_each independently. flip, gray, blur, solarize: probabilities; sigma: of the Gaussian blur, in
    pixels. Distributed as torchvision's RandomResizedCrop and ColorJitter. lighting: standard deviation, in
    COLOUR_WIDTHS, of noise along COLOUR_AXES; on RGB, and not with jitter_each, whose numbers it takes.
    gray_first: gray before the jitter, not after it.
    """

    def __init__(self, size, mean, std, scale, ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0, 0, 0, 0),
                 jitter_p=0.8, jitter_each=False, gray=0.0, blur=0.0, sigma=(0.1, 2.0), solarize=0.0,
                 lighting=0.0, gray_first=False):
        super().__init__()
        self.size, self.mean, self.std, self.scale, self.ratio = size, mean, std, scale, ratio
        self.flip, self.jitter, self.jitter_p, self.jitter_each = flip, jitter, jitter_p, jitter_each
        self.gray, self.blur, self.sigma, self.solarize = gray, blur, sigma, solarize
        self.lighting, self.gray_first = lighting, gray_first

    def draw_crop(self, u, height, width):
        """Uniform numbers [B, UNIFORMS] on the CPU -> crop and flip, a dict of [B]; height, width: of the
        images, one number or [B]."""
        # ten tries for a crop that fits, as torchvision makes; else the largest central one that may be
        height, width = (torch.as_tensor(n).expand(len(u)) for n in (height, width))
        area = (height * width)[:, None] * (self.scale[0] + u[:, 0:10] * (self.scale[1] - self.scale[0]))
        low, high = np.log(self.ratio)
        ratio = torch.exp(low + u[:, 10:20] * (high - low))
        w, h = torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))
        fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
        first = fits.int().argmax(1, keepdim=True)                                # [B, 1]
        found = fits.any(1)
        w_central = torch.minimum(width, torch.round(height * self.ratio[1]))
        h_central = torch.minimum(height, torch.round(width / self.ratio[0]))
        w = torch.where(found, w.gather(1, first)[:, 0], w_central)
        h = torch.where(found, h.gather(1, first)[:, 0], h_central)
        top = torch.floor(torch.where(found, u[:, 20] * (height - h + 1), (height - h) / 2))
        left = torch.floor(torch.where(found, u[:, 21] * (width - w + 1), (width - w) / 2))
        return dict(top=top, left=left, height=h, width=w, flip=u[:, 22] < self.flip)

    def draw_colour(self, u):
        """Uniform numbers [B, UNIFORMS] on the CPU -> what comes after the crop, a dict of [B]."""
        b, c, s, hue = self.jitter
        around = 2 * u[:, 24:28] - 1                                              # U(-1, 1)
        strength = torch.tensor([b, c, s])
        low = (1 - strength).clamp_min(0)
        chance = u[:, 36:40] if self.jitter_each else u[:, 23:24].expand(-1, 4)
        factors = low + u[:, 24:27] * (1 + strength - low)                        # U(max(0, 1 - s), 1 + s)
        return dict(jitter=chance < self.jitter_p, brightness=factors[:, 0], contrast=factors[:, 1],
                    saturation=factors[:, 2], hue=hue * around[:, 3], order=u[:, 28:32].argsort(1),
                    gray=u[:, 32] < self.gray, blur=u[:, 33] < self.blur,
                    sigma=self.sigma[0] + u[:, 34] * (self.sigma[1] - self.sigma[0]),
                    solarize=u[:, 35] < self.solarize)

    def draw_lighting(self, u):
        """Uniform numbers [B, UNIFORMS] on the CPU -> what is added to red, green and blue, [B, 3]."""
        normal = torch.special.ndtri(u[:, 36:39].double() + 2 ** -25).float()     # of 24 bits: never 0 or 1
        return self.lighting * normal * torch.tensor(COLOUR_WIDTHS) @ torch.tensor(COLOUR_AXES).T

    def crop(self, pictures, u):
        """B pictures uint8 [3, H, W] on the CPU, each of its own size -> uint8 [B, 3, size, size].

        The library's kernel for bytes rounds as Pillow does, between the axes too.
        """
        p = self.draw_crop(u, *torch.tensor([picture.shape[1:] for picture in pictures]).T)
        boxes = torch.stack([p[key] for key in ("top", "left", "height", "width")], 1).int().tolist()
        crops = torch.empty(len(pictures), 3, self.size, self.size, dtype=torch.uint8)
        for crop, picture, (top, left, h, w) in zip(crops, pictures, boxes, strict=True):
            crop.copy_(F.interpolate(picture[None, :, top:top + h, left:left + w], (self.size, self.size),
                                     mode="bicubic", antialias=True)[0])
        return torch.where(p["flip"].view(-1, 1, 1, 1), crops.flip(-1), crops)

    def colour(self, x, u):
        """x [B, C, h, w] in 0..1 on any device, overwritten; u [B, UNIFORMS] on the CPU -> [B, 3, h, w]."""
        p = self.draw_colour(u)
        colour = x.shape[1] == 3                      # of gray pictures saturation and hue change nothing
        ops = [(0, adjust_brightness, "brightness"), (1, adjust_contrast, "contrast"),
               (2, adjust_saturation, "saturation"), (3, adjust_hue, "hue")][:4 if colour else 2]
        ops = [(i, op, name) for i, op, name in ops if self.jitter[i] > 0]
        if colour and self.gray_first:
            _apply(lambda x: gray(x).expand_as(x), x, p["gray"])
        rank = p["order"].argsort(1)[:, [i for i, _, _ in ops]].argsort(1).argsort(1)      # among these ops
        for position in range(len(ops)):              # each image has its own order
            for k, (i, op, name) in enumerate(ops):
                _apply(op, x, p["jitter"][:, i] & (rank[:, k] == position), p[name])
        if colour and not self.gray_first:
            _apply(lambda x: gray(x).expand_as(x), x, p["gray"])
        _apply(gaussian_blur, x, p["blur"], p["sigma"])
        _apply(solarize, x, p["solarize"])
        if colour and self.lighting > 0:              # last, and what leaves 0..1 stays there, as published
            x += self.draw_lighting(u).to(x.device)[:, :, None, None]
        return normalize(x, self.mean, self.std)

    def forward(self, images, u):
        """images uint8 [B, C, H, W] on any device, u [B, UNIFORMS] on the CPU -> [B, 3, size, size]."""
        p = self.draw_crop(u, *images.shape[-2:])
        x = crop_resize(images, p["top"], p["left"], p["height"], p["width"], self.size, p["flip"])
        return self.colour(x, u)


def _apply(op, x, chosen, *params):
    """x[chosen] = op(x[chosen], params[chosen]); `chosen` is on the CPU: no device has to be waited for."""
    index = chosen.nonzero()[:, 0]
    if len(index):
        params = [param[index].to(x.device).view(-1, 1, 1, 1) for param in params]
        index = index.to(x.device)
        x[index] = op(x[index], *params)


def crop_resize(images, top, left, height, width, size, flip):
    """Crops [B] of uint8 images [B, C, H, W] at bicubic [B, C, size, size] in 0..1, some mirrored.

    Pillow's resize (up to version 12; 13 turns the order of the axes for some shapes): antialiased, a = -0.5,
    horizontal before vertical and clamped between. Two matrices per image; a mirrored image is one whose
    horizontal matrix stands upside down.
    """
    H, W = images.shape[-2:]
    top, left, height, width, flip = (t.to(images.device) for t in (top, left, height, width, flip))
    horizontal = _bicubic_matrix(left, width, W, size, flip)                      # [B, size, W]
    vertical = _bicubic_matrix(top, height, H, size, torch.zeros_like(flip))      # [B, size, H]
    x = torch.matmul(images.float(), horizontal[:, None].mT).clamp_(0, 255)
    return torch.matmul(vertical[:, None], x).clamp_(0, 255).div_(255)


def _bicubic_matrix(start, length, in_size, out_size, flip):
    """Weights [B, out_size, in_size] that resample `length` pixels from `start` on, with flip mirrored."""
    start, length, scale = start[:, None], length[:, None], length[:, None] / out_size
    place = torch.arange(in_size, device=start.device) + 0.5                      # [in_size], pixel centres
    target = torch.arange(out_size, device=start.device) + 0.5                    # [out_size]
    target = torch.where(flip[:, None], out_size - target, target) * scale        # [B, out_size]
    inside = (place > start) & (place < start + length)                           # [B, in_size]
    place = torch.where(inside, place - start, torch.inf)                         # nothing from outside
    reach = scale.clamp_min(1)                                                    # wider where it shrinks
    x = ((place / reach)[:, None] - (target / reach)[:, :, None]).abs_()          # [B, out_size, in_size]
    # cubic convolution, a = -0.5: two pieces that end at 1 and at 2, added without choosing between them
    near, far = (1 - x).clamp_(min=0), (2 - x).clamp_(min=0)
    weights = near * near * (1 - 2 * near) + far * far * (far - 1) / 2
    return weights.div_(weights.sum(-1, keepdim=True))


def gray(x):
    """Luma (ITU-R 601) [B, 1, H, W] of [B, 3, H, W]; of one channel the channel itself."""
    return x if x.shape[1] == 1 else 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def adjust_brightness(x, factor):
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Blend with the mean gray of the image."""
    mean = gray(x).mean((1, 2, 3), keepdim=True)
    return (mean + (x - mean) * factor).clamp_(0, 1)


def adjust_saturation(x, factor):
    """Blend with the gray image."""
    luma = gray(x)
    return (luma + (x - luma) * factor).clamp_(0, 1)


def adjust_hue(x, shift):
    """Turn the hue by `shift` of the full circle, in HSV."""
    r, g, b = x.unbind(1)
    v = torch.maximum(torch.maximum(r, g), b)
    chroma = v - torch.minimum(torch.minimum(r, g), b)
    safe = chroma.clamp_min(1e-9)                     # of gray, whose hue does not show
    hue = torch.where(v == r, (g - b) / safe, torch.where(v == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue += 6 * shift[:, 0]                            # in sixths of the circle
    y = torch.empty_like(x)
    for channel, n in enumerate((5, 3, 1)):
        k = hue + n
        k -= (k / 6).floor_().mul_(6)                 # modulo 6, several times faster
        torch.addcmul(v, k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1), chroma, value=-1, out=y[:, channel])
    return y


def gaussian_blur(x, sigma):
    """True Gaussian of sigma <= 2 pixels ([B, 1, 1, 1]), cut off at 8, edges repeated: two products."""
    size, reach = x.shape[-1], 8
    taps = torch.arange(-reach, reach + 1, device=x.device)
    g = torch.exp(-0.5 * (taps / sigma.view(-1, 1)) ** 2)                         # [B, 17]
    source = (torch.arange(size, device=x.device)[:, None] + taps).clamp(0, size - 1)
    matrix = torch.einsum("bk,ikj->bij", g / g.sum(1, keepdim=True), F.one_hot(source, size).to(x))[:, None]
    return matrix @ x @ matrix.mT


def solarize(x):
    """Invert what is at least 128 of 255."""
    return torch.where(x > 127.5 / 255, 1 - x, x)
