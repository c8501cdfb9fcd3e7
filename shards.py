"""Shards: tar files in WebDataset's layout, whose pictures are read in place.

Members whose names agree up to the first dot are one sample: `n01/0001.jpg` is a picture, `n01/0001.cls` its
class; other members (`.json`) are ignored. A picture has the path SHARD.tar/MEMBER: all else takes it for a
file. A tar is read through once. Where its pictures lie is then kept beside it, in SHARD.tar.index.
"""

import functools
import io
import itertools
import os
import re
import secrets
import tarfile
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from checkpoint import UserError, printable

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
MOST_SHARDS, LARGEST = 100_000, 2 ** 30          # shards of one pattern; bytes of a picture
REPACK = "pack it without links and holes, by tar --dereference --hard-dereference"
INDICES = {}                                     # of this process, by the tar's path; workers inherit it


class Index(NamedTuple):
    """Arrays [N] of a tar's pictures, in its order: names (bytes), first byte, size, class (bytes)."""
    names: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    classes: np.ndarray
    order: np.ndarray                            # sorts the names


# ---------------------------------------------------------------- which shards
def expand(pattern):
    """['a-08.tar', 'a-09.tar', 'a-10.tar'] of 'a-{08..10}.tar'; {a,b} are alternatives. Raises UserError."""
    pieces = []
    for i, piece in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if i % 2 == 0:
            choices = [piece]
        elif ends:
            first, last = map(int, ends.groups())
            choices = [f"{n:0{len(ends[1])}d}" for n in range(first, min(last, first + MOST_SHARDS) + 1)]
        else:
            choices = piece.split(",") if "," in piece else []
        pieces.append(choices)
    number = np.prod([float(len(choices)) for choices in pieces])
    if not pattern.endswith(".tar") or not 0 < number <= MOST_SHARDS:
        raise UserError(f"--data {printable(pattern)}: names no shards; it needs a form like "
                        f"'train-{{000..999}}.tar', of at most {MOST_SHARDS:,} shards")
    return ["".join(chosen) for chosen in itertools.product(*pieces)]


def read_shards(tars):
    """(paths, classes or None): of all pictures, in the shards' order. Raises UserError."""
    paths, classes, unlabelled, tars = [], [], [], list(tars)
    _open.cache_clear()                          # a tar may have been replaced
    for tar, count in Counter(map(os.path.realpath, tars)).items():
        if count > 1:
            raise UserError(f"--data {printable(tar)}: is named {count} times; name each shard once")
    for tar in tars:
        index = INDICES[tar] = index_of(tar)
        found = [f"{tar}/{os.fsdecode(name)}" for name in index.names.tolist()]
        unlabelled += [path for path, label in zip(found, index.classes.tolist(), strict=True) if not label]
        classes += [label.decode(errors="surrogateescape") for label in index.classes.tolist()]
        paths += found
    if not unlabelled:
        return paths, classes
    if len(unlabelled) < len(paths):
        raise UserError(f"--data {printable(unlabelled[0])}: has no .cls member, unlike others; give all "
                        "pictures one or none")
    return paths, None


# ---------------------------------------------------------------- what is in a shard
def index_of(tar):
    """The Index of a tar: the one beside it if the tar has kept its size and time, else a new one."""
    try:
        now = os.stat(tar)
        state = np.array([now.st_size, now.st_mtime_ns])
        with suppress(Exception), np.load(f"{tar}.index") as file:        # none, of another version, damaged
            if np.array_equal(file["tar"], state):
                return Index(*(file[name] for name in Index._fields))
        index = _scan(tar, now.st_size)
    except OSError as error:
        raise UserError(f"--data {printable(tar)}: cannot be read ({error.strerror}); correct the pattern, "
                        "or fetch this shard") from None
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UserError(f"--data {printable(tar)}: {printable(str(error))}; fetch or pack it anew") from None
    if not len(index.names):
        raise UserError(f"--data {printable(tar)}: holds no pictures ({', '.join(PICTURES)}); is the path "
                        "right?")
    content, beside = io.BytesIO(), f"{tar}.index.{secrets.token_hex(4)}"    # several processes may write it
    np.savez(content, tar=state, **index._asdict())
    try:
        with open(beside, "wb") as file:
            file.write(content.getvalue())
        os.replace(beside, f"{tar}.index")
    except OSError:                              # a folder to read only: each process keeps its own in memory
        with suppress(OSError):
            os.unlink(beside)
    return index


def _scan(tar, size):
    """The Index of a tar of so many bytes. Raises ValueError, or an error of tarfile, if it is damaged."""
    places, classes = {}, {}                     # of a sample, by its key
    with tarfile.open(tar, "r:") as file:        # uncompressed only: others cannot be read in place
        while (member := file.next()) is not None:
            file.members.clear()                 # a million of them would take gigabytes
            name, place = member.name.removeprefix("./"), member.offset_data
            folder, slash, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            key, ending = folder + slash + stem, ending.lower()
            if member.size < 0 or place + member.size > size:
                raise ValueError(f"'{name}' reaches beyond the end of the file")
            if not stem or ending not in (*PICTURES, "cls") or member.isdir():
                continue                         # names that begin with a dot are hidden
            if not member.isreg() or member.issparse():
                raise ValueError(f"'{name}' is no plain file; {REPACK}")
            known = classes if ending == "cls" else places
            if key in known:
                raise ValueError(f"'{name}' is a second picture or class of '{key}'")
            if ending == "cls":
                file.fileobj.seek(place)
                classes[key] = file.fileobj.read(min(member.size, 256)).strip()
                if not 0 < len(classes[key]) < 200 or b"\n" in classes[key]:
                    raise ValueError(f"'{name}' is not one line with a class")
            else:
                places[key] = os.fsencode(name), place, member.size
        file.fileobj.seek(file.offset)           # tarfile takes a header that is none for the end
        if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"is damaged or cut short at byte {file.offset:,}")
    names, starts, sizes = zip(*places.values(), strict=True) if places else ((), (), ())
    names = np.array(names, bytes)
    return Index(names, np.array(starts, np.int64), np.array(sizes, np.int64),
                 np.array([classes.get(key, b"") for key in places], bytes), names.argsort(kind="stable"))


# ---------------------------------------------------------------- one picture
@functools.lru_cache(maxsize=128)                # a closed one would have to be found again on the server
def _open(tar):
    return open(tar, "rb", buffering=0)


def read_member(path):
    """The bytes of a picture SHARD.tar/MEMBER; None for every other path. Raises OSError, ValueError."""
    end = path.find(".tar/")
    while end >= 0 and not (path[:end + 4] in INDICES or os.path.isfile(path[:end + 4])):
        end = path.find(".tar/", end + 5)        # it was a folder
    if end < 0:
        return None
    tar, name = path[:end + 4], np.bytes_(os.fsencode(path[end + 5:]))
    if tar not in INDICES:
        INDICES[tar] = index_of(tar)
    index = INDICES[tar]
    rank = np.searchsorted(index.names, name, sorter=index.order)
    i = index.order[min(rank, len(index.order) - 1)]
    start, size = int(index.starts[i]), int(index.sizes[i])
    if index.names[i] != name or size > LARGEST:
        raise ValueError("no such member in the shard" if size <= LARGEST else f"of {size:,} bytes")
    file = _open(tar)
    if hasattr(os, "pread"):                     # reads without a place in the file, which forks share
        content = os.pread(file.fileno(), size, start)
    else:
        file.seek(start)
        content = file.read(size)
    if len(content) < size:
        raise ValueError("the shard is cut short")
    return content
