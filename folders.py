"""Picture files: which ones a folder or a list holds, their classes and parts, and how one is read."""

import functools
import hashlib
import io
import itertools
import os
import re
import stat
import warnings
from collections import Counter
from contextlib import suppress

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from checkpoint import UserError, printable, to_stderr
from shards import expand, read_member, read_shards

try:
    import pillow_heif
except ImportError:
    pillow_heif = None           # optional, for the pictures of iPhones

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm",
            ".pgm")
# Nothing else is opened, whatever a file is called: for an EPS file Pillow would start another program.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF")
REMEDIES = {".avif": "install Pillow 11.3 or later", ".heic": "install pillow-heif",
            ".heif": "install pillow-heif"}      # for pictures that may not be readable here
if "avif" in features.modules and features.check("avif"):
    SUFFIXES, FORMATS = (*SUFFIXES, ".avif"), (*FORMATS, "AVIF")
if pillow_heif:
    pillow_heif.register_heif_opener()
    SUFFIXES, FORMATS = (*SUFFIXES, ".heic", ".heif"), (*FORMATS, "HEIF")
TOPS = (1, 255, 4095, 65535)     # white in pictures of more than 8 bits
warnings.filterwarnings("ignore", module=r"PIL\.")         # about odd files, which are read all the same


# ---------------------------------------------------------------- folders and lists
def in_validation(paths, data, share, group_names=False):
    """Bool [N]: which pictures of a folder or list `data` are for validation, about the share of each class.

    A fixed function of a picture's path below `data`, so a copy of the folder is divided alike, and a new
    picture moves no other. group_names: of its name up to the last _ alone, in whatever folder.
    """
    root = data if os.path.isdir(data) else os.path.dirname(data) or "."
    chosen = np.zeros(len(paths), bool)
    for i, path in enumerate(paths):
        key = os.path.relpath(path, root).replace(os.sep, "/")
        if group_names:
            stem = os.path.splitext(os.path.basename(path))[0]
            key = stem.rpartition("_")[0] or stem
        digest = hashlib.sha256(os.fsencode(key)).digest()
        chosen[i] = int.from_bytes(digest[:8], "big") < share * 2 ** 64
    return chosen


def find_pictures(data, train):
    """(paths, labels or None, class names or None, part) of a split of a folder, a list or shards."""
    try:
        if data.name.endswith(".tar") and not data.is_dir():
            return *_number(*read_shards(expand(str(data)))), "images"
        if data.is_file():
            return *_read_list(data), "images"
        parts = {"train": _part(data, "train"), "val": _part(data, "val")}
        called = {"train": "training images", "val": "validation images"}
        if not parts["val"]:
            parts["val"], called["val"] = _part(data, "test"), "test images"
        if not any(parts.values()):
            return *_scan(data), "images"
        wanted, other = ("train", "val") if train else ("val", "train")
        if not parts[wanted]:
            raise UserError(f"--data {data}: has {parts[other][0].name}, but no {wanted} folder and no "
                            f"{wanted}.txt; add one")
        # both parts are read, so that a mistake in val is found before the training
        found = {}
        for name, part in parts.items():
            if part:
                known = found["train"][2] if "train" in found else None
                if part[0].name.endswith(".tar"):
                    found[name] = _number(*read_shards(map(str, part)))
                else:
                    found[name] = _read_list(part[0]) if part[0].is_file() else _scan(part[0], known or ())
    except OSError as error:
        raise UserError(f"--data {error.filename}: cannot be read ({error.strerror}); may you read it?"
                        ) from None
    paths, labels, names = found[wanted]
    known = found["train"][2] if "train" in found else names           # classes are numbered as in train
    if labels is None or known is None:
        return paths, None, None, called[wanted]
    unknown = sorted({names[label] for label in labels} - set(known))
    if unknown:
        raise UserError(f"--data {parts[wanted][0]}: class '{unknown[0]}' is not among those of "
                        f"{parts['train'][0]}; rename or remove it")
    number = {name: c for c, name in enumerate(known)}
    return paths, [number[names[label]] for label in labels], known, called[wanted]


def _part(folder, name):
    """[the folder or the list of that name in a folder], or its shards named so; [] if there are none."""
    names = (name, "validation") if name == "val" else (name,)
    for part in [folder / f"{name}{ending}" for name in names for ending in ("", ".txt")]:
        if part.exists():
            return [part]
    word = re.compile(rf"(^|[-_.])({'|'.join(names)})[-_.]")       # as in imagenet1k-validation-00.tar
    return sorted(path for path in folder.glob("*.tar") if word.search(path.name))


def _scan(folder, known=()):
    """As find_pictures, without the part. Subfolders with pictures are classes if there are two or more, or
    one that is among the known ones, and no pictures beside them. Names what is left out on stderr."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    left_out = Counter(_ending(entry.name) for entry in entries if entry.is_file())
    below = {}
    if not left_out.keys() & set(SUFFIXES):
        below = {entry.name: _pictures_below(entry, left_out) for entry in entries if entry.is_dir()}
    classes = [name for name in below if below[name]]
    if len(classes) < 2 and not set(classes) & set(known):
        left_out = Counter()
        paths, labels, classes = _pictures_below(folder, left_out), None, None
        tars = [str(entry) for entry in entries if entry.name.endswith(".tar")]
        if not paths and tars:
            return _number(*read_shards(tars))
        if not paths:
            raise UserError(f"--data {folder}: no pictures in this folder ({' '.join(SUFFIXES)}); it has "
                            f"{_listed(left_out) or 'no files at all'}; is the path right?")
    else:
        paths, labels = [], []
        for label, name in enumerate(classes):
            paths += below[name]
            labels += [label] * len(below[name])
    without = [name for name in below if not below[name]]
    if without:
        warn_once(f"--data {folder}: folders without pictures are left out: {', '.join(without)}")
    if left_out:
        warn_once(f"--data {folder}: {left_out.total():,} files are left out: {_listed(left_out)}")
    return paths, labels, classes


def _ending(name):
    return os.path.splitext(name)[1].lower()


def _listed(left_out):
    """'60 .heic (install pillow-heif), 17 .txt' of a Counter of endings."""
    words = []
    for ending, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0])):
        remedy = f" ({REMEDIES[ending]})" if ending in REMEDIES else ""
        words.append(f"{count:,} {ending or 'without an ending'}{remedy}")
    return ", ".join(words)


@functools.cache
def warn_once(line):
    """A warning on stderr, by the first process on each machine; each part of a set is read several times."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        to_stderr(f"warning: {printable(line)}")


def _pictures_below(top, left_out):
    """Paths of the pictures in a folder and its subfolders, links followed; counts other files by ending."""
    paths, seen = [], {os.path.realpath(top)}
    for parent, folders, files in os.walk(top, followlinks=True, onerror=_raise):
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in sorted(folders)}
        # os.walk goes into what is left in `folders`; a link may lead back to a folder above it
        folders[:] = [name for name in real if not name.startswith(".") and real[name] not in seen]
        seen.update(real[name] for name in folders)
        for name in sorted(files):
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                paths.append(os.path.join(parent, name))
            else:
                left_out[_ending(name)] += 1
    return paths


def _raise(error):
    raise error


def _read_list(path):
    """As find_pictures, of lines `PICTURE` or `PICTURE LABEL`, or of lines that name shards.

    Paths are relative to the list's folder.
    """
    if str(path).lower().endswith(SUFFIXES):
        raise UserError(f"--data {path}: is a picture; give its folder, or a text file that names pictures")
    paths, labels, names_in = [], [], {}
    lines = path.read_text("utf-8-sig", errors="surrogateescape").split("\n")     # Excel writes a mark first
    if "\0" in lines[0]:
        raise UserError(f"--data {path}: is no text file; give a folder, shards (.tar, not compressed), or a "
                        "list with lines PICTURE or PICTURE LABEL")
    if next(filter(None, map(str.strip, lines)), "").endswith(".tar"):
        patterns = [os.path.join(path.parent, line.strip()) for line in lines if line.strip()]
        return _number(*read_shards(itertools.chain(*map(expand, patterns))))
    for number, line in enumerate(lines, 1):
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
            raise UserError(f"--data {path}: line {number} names a missing file, {printable(picture)}; "
                            "correct it: lines are PICTURE or PICTURE LABEL")
        if labels and (label is None) != (labels[0] is None):
            raise UserError(f"--data {path}: line {number} has {'no' if label is None else 'a'} label, "
                            "unlike the first; give all lines one or none")
        paths.append(picture)
        labels.append(label)
    if not paths:
        raise UserError(f"--data {path}: an empty list; it needs a path of a picture a line")
    return _number(paths, None if labels[0] is None else labels)


def _number(paths, labels):
    """(paths, numbers, class names) of a list's labels, or of None. Decimal ones are the numbers, unless most
    numbers up to the largest, above 1,000, are missing. Others are sorted, by number or by name."""
    if labels is None:
        return paths, None, None
    if all(label.isdecimal() and len(label) < 19 for label in labels):
        numbers = [int(label) for label in labels]
        names = sorted(set(numbers))
        if names[-1] < max(1000, 2 * len(names)):
            return paths, numbers, [str(c) for c in range(1 + names[-1])]
        labels, names = map(str, numbers), [str(number) for number in names]
    else:
        names = sorted(set(labels))
    number = {name: c for c, name in enumerate(names)}
    return paths, [number[label] for label in labels], names


# ---------------------------------------------------------------- files
@functools.cache
def jpeg_decoder(name):
    """torchvision's or simplejpeg's function from the bytes of a JPEG file to uint8 [3, H, W]. UserError."""
    try:
        if name == "simplejpeg":
            from simplejpeg import decode_jpeg
            return lambda content: torch.from_numpy(decode_jpeg(content, "RGB")).permute(2, 0, 1)
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as decode
        warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)    # since version 0.29
        return lambda content: decode(torch.frombuffer(bytearray(content), dtype=torch.uint8),
                                      ImageReadMode.RGB)
    except ImportError:
        raise UserError(f"--decoder {name}: is not installed; pip install {name}, or take another") from None


def read_picture(path, decoder=None):
    """A picture file as uint8 [3, H, W].

    EXIF orientation is applied; of several frames it is the first. What is transparent is put on white, as
    colours under it are arbitrary. Pillow reads it; a decoder, see jpeg_decoder, takes less time for upright
    JPEG files of gray or RGB. Pillow still checks their size first, and what a decoder refuses is Pillow's to
    read or to refuse. Raises UserError, one line, for everything else.
    """
    try:
        packed = read_member(os.fspath(path))
        if packed is None and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")         # opening a pipe would wait for its other end
        with (open(path, "rb") if packed is None else io.BytesIO(packed)) as file, \
                Image.open(file, formats=FORMATS) as image:
            orientation = 1
            if image.format == "JPEG":                     # malformed EXIF costs no picture
                with suppress(Exception):
                    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
                image.info.pop("exif", None)               # Pillow would write it anew, and may fail
            if decoder and image.format == "JPEG" and image.mode in ("RGB", "L") and orientation == 1:
                file.seek(0)
                with suppress(ValueError, RuntimeError):
                    return jpeg_decoder(decoder)(file.read())
            deep_colours = any(";16" in str(tile) for tile in image.tile)      # Pillow keeps the upper 8 bits
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith(("I", "F")):
                image = Image.fromarray(_to_8_bits(np.asarray(image)))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.array(image.convert("RGB"))
            if deep_colours and image.mode == "RGB" and pixels.max() < 16:
                pixels *= 17                               # 12 bits stored in 16, see _to_8_bits
            return torch.from_numpy(pixels).permute(2, 0, 1)
    except Exception as error:                             # a damaged file makes a decoder raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        raise UserError(printable(f"{path}: not a readable picture ({reason})")) from None


def _to_8_bits(levels):
    """uint8 [H, W] of integers or floats [H, W], which Pillow would clip to 255.

    White is the first of TOPS that no level exceeds (1 for floats only): 12 bits are often stored in 16.
    """
    low, high = levels.min(), levels.max()
    if not 0 <= low <= high <= TOPS[-1]:                   # true for NaN
        raise ValueError(f"levels from {low:g} to {high:g}; scale them to 0 to {TOPS[-1]}")
    tops = TOPS if levels.dtype.kind == "f" else TOPS[1:]
    white = next(top for top in tops if high <= top)
    return (levels * (255 / white)).round().astype(np.uint8)
