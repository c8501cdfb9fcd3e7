"""A run and its files: arguments, output folder and lock, atomic checkpoints, exact resume.

What is written can be trusted: a file is complete or it is not there, and it is checked before it is read.
Backbones are read from the files of other projects, too, with every name and shape accounted for.
"""

import argparse
import atexit
import errno
import fcntl
import io
import json
import multiprocessing
import os
import pickletools
import re
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from model import build_backbone, build_network

VERSION = 1
# What may differ between a run and its continuation: it changes where and how fast, not what is computed.
FREE_FLAGS = {"workers", "print_every", "device", "amp", "output_dir", "timeout", "resume", "overwrite",
              "data_dir", "local_rank"}
RUN_FILES = ("config.json", "checkpoint.pth", "checkpoint.prev.pth", "backbone.pth", "log.jsonl",
             "metrics.json", "curves.png", "head.pth", "predictions.csv", "labels.txt",
             "checkpoint.damaged.pth")


class UserError(Exception):
    """Something the user can mend; says what, where and how. Stages print it as one line and exit with 2."""


def to_stderr(line):
    """Prints a line to stderr in one write: by `print` those of several processes get mixed up."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def printable(name):
    """A name of a file, or in one, with what is not to be printed, newlines or no UTF-8, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


# ---------------------------------------------------------------- arguments
def parse_args(parser, argv=None):
    """Parses flags and `@file`s (lines of `--flag value`, # comments); `_` in a long flag is taken as `-`.

    A mistake is one line on stderr and exit code 2. A later value wins, so flags after an @file override it.
    """
    parser.fromfile_prefix_chars = "@"
    parser.convert_arg_line_to_args = lambda line: _dashes(line.split("#")[0].split())
    parser.error = lambda message: _exit(parser.prog, message)
    args = parser.parse_args(_dashes(sys.argv[1:] if argv is None else argv))
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > 2 ** 48:          # products with it must fit 64 bits
                _exit(parser.prog, f"--{name.replace('_', '-')} {number}: too large a number")
    return args


def _dashes(words):
    return [re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), word) for word in words]


def _exit(prog, message, code=2):
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if dist.is_initialized():                    # from here on it may be the mistake of one process alone
        message = f"rank {rank}: {message}" if dist.get_world_size() > 1 else message
    elif local_rank != "0":                      # before, all make the same: it is said once on each machine
        sys.exit(code)
    try:
        to_stderr(f"{prog}: error: {message}")
    except OSError:              # it goes to the disk that is full; the exit code is to be right all the same
        pass
    sys.exit(code)


def run(main, parser, argv=None):
    """What stands behind `python STAGE.py`: parse and run; what is not a bug is told in one line.

    Exit code 2 for what the user can mend, a full disk and too little memory among it; 1 if another process
    of the run was lost, which the same command mends; 130 for Ctrl-C before a run knows how to save.
    """
    args = parse_args(parser, argv)
    rank, restarts, shared = (os.environ.get(name) for name in (
        "RANK", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"))
    if rank == "0" and restarts not in (None, "0") and shared == "True":
        to_stderr("warning: ranks that torchrun starts again may not find each other; to prevent that, set "
                  "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment")
    if sys.platform == "linux" and not multiprocessing.get_start_method(allow_none=True):
        multiprocessing.set_start_method("fork")         # of readers; Python 3.14 would have a server between
    try:
        sys.exit(main(args))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:   # of a loader's worker the last line; the others are its traceback
        _exit(parser.prog, str(error).strip().splitlines()[-1].removeprefix("checkpoint.UserError: "))
    except (OSError, MemoryError, RuntimeError) as error:
        message, code = _explain(error, args)
        if message is None:
            raise
        _exit(parser.prog, message, code)


def _explain(error, args):
    """(line, exit code) for an error of the machine rather than of the program; else (None, 1)."""
    said, out = str(error).strip() or type(error).__name__, getattr(args, "output_dir", "")
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE):
            place = error.filename or f"standard output, or the log in {out}"
            return f"{place}: cannot be written ({error.strerror})", 2
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in said:
        return f"not enough memory ({said.splitlines()[0][:120]}); try a smaller --batch-size", 2
    elif worker := re.search(r"DataLoader worker.*(killed by signal|exited unexpectedly)[^.]*", said):
        return (f"{worker[0]}; short of memory? Try fewer --workers; the same command goes on from the last "
                "checkpoint"), 1
    elif dist.is_initialized() and (isinstance(error, dist.DistError) or re.search("gloo|nccl", said, re.I)):
        return (f"another process of this run died or did not answer within --timeout {args.timeout:g} s "
                f"({said.splitlines()[0][:160]}); the same command goes on from the last checkpoint"), 1
    return None, 1


# ---------------------------------------------------------------- the output folder
def open_output(args, stage):
    """Makes and locks args.output_dir; returns (lock, checkpoint to go on from or None). For one process.

    Refuses (UserError) a folder in use, one of a run with another configuration, with --resume never any used
    one, and one with files of these names that are no run's. Nothing is written before all of that is known.
    A run that had not saved yet binds nobody: it is begun anew. Keep `lock` for as long as the run lives.
    """
    out = Path(args.output_dir)
    config = dict(vars(args), stage=stage)
    if out.exists() and not out.is_dir():
        raise UserError(f"--output-dir {out}: is not a folder")
    lock = state = None
    if out.is_dir():
        lock = _lock(out)
        there = [name for name in RUN_FILES if (out / name).exists()]
        if there and not args.overwrite:
            if not {"config.json", "checkpoint.pth", "checkpoint.prev.pth"} & set(there):
                raise UserError(f"--output-dir {out}: holds {there[0]}, which no run wrote; choose another, "
                                "or --overwrite replaces it")
            if args.resume == "never":
                raise UserError(f"--output-dir {out}: holds a run already; choose another or add --overwrite")
            state = load_last_checkpoint(out)
            if state is not None:
                refuse_difference(state, config, out)
    if args.resume not in ("auto", "never"):
        state = load_checkpoint(args.resume)
        refuse_difference(state, config, args.resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock or _lock(out)
        if state is None or args.overwrite:
            for name in RUN_FILES[1:]:
                (out / name).unlink(missing_ok=True)
        write_atomically(out / "config.json", json.dumps(config, indent=1).encode())
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None
    return lock, state


def make_evaluation_folder(path):
    """The output folder of an evaluation; if nothing is written into a new one, it goes at the end.

    Raises UserError if it holds a training run or cannot be made.
    """
    out = Path(path)

    def remove_if_empty():
        with suppress(OSError):
            out.rmdir()
    if not out.exists():
        atexit.register(remove_if_empty)
    if (out / "checkpoint.pth").exists():
        raise UserError(f"--output-dir {out}: holds a training run; choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None
    return out


def open_log(path):
    """log.jsonl to append to; half a line that a killed run left is cut off."""
    log = open(path, "a+b", buffering=0)                        # nothing is left over when the disk is full
    log.seek(0)
    log.truncate(log.read().rfind(b"\n") + 1)
    return io.TextIOWrapper(log, write_through=True)


def read_log(path):
    """{step: entry} of a log's lines of training, of a step that was logged twice the later one.

    Lines that a crash of the machine left damaged are passed over.
    """
    entries = {}
    for line in Path(path).read_bytes().splitlines():
        try:
            entry = json.loads(line)
            entries |= {entry["step"]: entry} if "loss" in entry else {}
        except (ValueError, KeyError, TypeError):
            pass
    return entries


def _lock(out):
    try:
        lock = open(out / ".lock", "w")
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output-dir {out}: another run is using this folder; choose another") from None
    except OSError as error:     # some network file systems
        to_stderr(f"warning: {out} cannot be locked ({error.strerror}): mind that no other run uses it")
    register_after_fork(lock, io.TextIOWrapper.close)          # readers of a killed run outlive it by seconds
    return lock


def refuse_difference(state, config, where):
    """Raises UserError that names the flags in which a checkpoint and its continuation must agree."""
    before = {**state["config"], "stage": state.get("stage")}
    keys = sorted((before.keys() & config.keys()) - FREE_FLAGS)
    different = [f"{key} was {before[key]}, is {config[key]}" for key in keys if before[key] != config[key]]
    if different:
        raise UserError(f"{where}: made with another configuration ({'; '.join(different)}); "
                        "use the same flags, another --output-dir, or --overwrite")


# ---------------------------------------------------------------- checkpoints
def write_atomically(path, content):
    """Writes bytes, or what torch.save makes of an object, beside `path`, flushes to disk, then renames.

    Raises UserError where that is not possible (a full disk, a folder that is gone); `path` is as it was.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            file.write(content) if isinstance(content, bytes) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)              # the new name, too, is to outlive a power cut
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:                    # torch.save makes a RuntimeError of some
        if "DataLoader worker" in str(error):                   # a reader that was killed just then
            raise
        try:
            beside.unlink(missing_ok=True)                      # half a file, which would keep the disk full
        except OSError:
            pass
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); what was saved before is as it was") from None


def save_checkpoint(path, state):
    """Saves a dict of plain types and tensors; the one before stays as checkpoint.prev.pth."""
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    write_atomically(beside, dict(state, version=VERSION))
    try:
        if path.exists():        # between these renames there is only the previous one; resuming finds it
            os.replace(path, path.with_name(path.stem + ".prev" + path.suffix))
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def load_checkpoint(path):
    """The dict that save_checkpoint wrote. Raises UserError unless the file is whole."""
    state, verified = read_file(path)
    if not verified:
        raise UserError(f"{path}: not a readable checkpoint (not a zip-format PyTorch file, or cut short)")
    if not is_ours(state):
        raise UserError(f"{path}: not a checkpoint of this project (no 'model' and 'config' in it)")
    return state


@contextmanager
def refuse_misfit(args):
    """For the loading of a checkpoint's parts: what does not fit, in one made by hand, is a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = str(error).strip().splitlines()[-1].strip() or type(error).__name__
        where = args.output_dir if args.resume == "auto" else args.resume
        raise UserError(f"{where}: its parts are not those of a run with these flags "
                        f"({type(error).__name__}: {said[:200]})") from None


def is_ours(content):
    """Whether a file's content is a training checkpoint of this project, its configuration one of flags."""
    def plain(value):
        return value is None or isinstance(value, (str, int, float))
    return (isinstance(content, dict) and all(isinstance(content.get(k), dict) for k in ("model", "config"))
            and all(plain(value) or isinstance(value, list) and all(map(plain, value))
                    for value in content["config"].values()))


def load_twist(path):
    """The network of a training run's checkpoint, the averaged one if it has one, and its configuration."""
    state = load_checkpoint(path)
    refuse_classless(state["config"], path)
    return _build_ours(state["config"], state.get("teacher", state["model"]), path), state["config"]


def refuse_classless(config, path):
    """Raises UserError for a network that was trained by an objective without classes."""
    if config.get("loss", "twist") != "twist":
        raise UserError(f"{path}: holds no classes, as TWIST's network does; its loss was {config['loss']}")


def _build_ours(config, weights, path):
    try:
        with torch.device("meta"):               # sizes only: a configuration may claim any, and take them
            problem = differences(build_network(config).state_dict(), weights)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a network of this project ({str(error).splitlines()[0]})") from None
    if problem:
        raise UserError(f"{path}: not a network of this project ({problem})")
    network = build_network(config)
    network.load_state_dict(weights)
    return network


# ---------------------------------------------------------------- files of any project
# What weights, optimizers and settings are pickled as. torch.load's own list is longer; with the rest of it a
# small file can take any amount of memory (bytearray(10**11), torch.Tensor(10**11), hex of hex of ...).
ALLOWED = {"collections OrderedDict", "collections Counter", "argparse Namespace", "__builtin__ set",
           "torch Size", "torch device", "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2",
           "torch._utils _rebuild_parameter",
           *(f"torch {kind}Storage" for kind in "Float Double Half BFloat16 Long Int Short Char Byte Bool "
             "ComplexFloat ComplexDouble".split()),
           *(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype))}
OLD_FORMAT = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"     # its first pickle, a number


def read_file(path):
    """(content, verified) of a file that torch.save wrote, by whatever project; tensors on the CPU.

    Nothing in it is run: weights_only, and of that only what ALLOWED names (published TWIST, DINO and MAE
    files hold their flags in a Namespace). torch.load verifies no checksum, a flipped bit in a weight would
    load silently: those of a zip-format file are compared first. Files of torch before 1.6 have none; they
    are read, but not `verified`. Raises UserError for everything that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with open(path, "rb") as file:           # once: what was checked is what is loaded, whoever writes
            verified = file.read(4) == b"PK\3\4"        # by these torch.load, too, tells the formats apart
            found = _check_records(file) if verified else _check_old(file)
            foreign = sorted(name.replace(" ", ".") for name in found - ALLOWED)
            if foreign:
                raise UserError(f"{path}: holds objects beside weights, which could run code and are not "
                                f"read: {_first(foreign, 9)}; save the state dict alone in the project that "
                                "wrote it, by torch.save(model.state_dict(), FILE)")
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
        stored = {}
        for name, tensor in _tensors(content).items():   # a stride of 0 makes 10^12 weights of one number
            storage = tensor.untyped_storage()
            stored[storage.data_ptr()] = storage.nbytes()
            if tensor.numel() * tensor.element_size() > storage.nbytes():
                raise ValueError(f"{name} claims more bytes than are stored")
        if sum(stored.values()) > size:
            raise ValueError("claims more bytes than the file has")
    except UserError:
        raise
    except Exception as error:   # whatever a damaged file makes zipfile or the unpickler raise
        said = re.findall(r"WeightsUnpickler error:\s*(.+)", str(error)) or str(error).strip().splitlines()
        raise UserError(f"{path}: not a readable checkpoint "
                        f"({said[0] if said else type(error).__name__})") from None
    return content, verified


def _check_records(file):
    """Names of the types in a zip-format file. Raises ValueError unless its checksums are right.

    zipfile reads it here and torch's own code later, so a file that the two could understand differently is
    refused: one central directory, right before the end, no two records of a name, whatever its case.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError("not a zip-format PyTorch file, or cut short")
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        size = file.seek(0, os.SEEK_END)
        file.seek(-98, os.SEEK_END)              # zip64's end record 56, where that is 20, the end record 22
        tail = file.read()
        zip64 = tail[56:60] == b"PK\6\7"
        directory, = struct.unpack("<Q", tail[48:56]) if zip64 else struct.unpack("<I", tail[92:96])
        if (tail[76:80] != b"PK\5\6" or tail[96:] != b"\0\0" or directory != archive.start_dir or
                zip64 and struct.unpack("<Q", tail[64:72]) != (size - 98,)):
            raise ValueError("has bytes before or after what it says that it holds")
        if (len({record.filename.lower() for record in records}) < len(records) or
                any(record.filename != record.orig_filename for record in records)):
            raise ValueError("has two records of one name")
        if any(record.external_attr & 16 or          # a folder: torch leaves its memory as it happens to be
               record.extra and len(record.extra) != 4 + int.from_bytes(record.extra[2:4], "little")
               for record in records):
            raise ValueError("has records that another program than PyTorch wrote")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("has compressed records")
        if (any(record.compress_size != record.file_size for record in records) or
                sum(record.file_size for record in records) > size):
            raise ValueError("claims more bytes than the file has")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged} is wrong")
        pickles = [record for record in records if record.filename.lower().endswith(".pkl")]
        return set().union(*(_globals(archive.read(record)) for record in pickles))


def _check_old(file):
    """Names of the types in a file of torch before 1.6: five pickles, of which the fourth is the content."""
    file.seek(0)
    is_old = file.read(len(OLD_FORMAT)) == OLD_FORMAT
    file.seek(0)
    if not is_old or tarfile.is_tarfile(file):   # torch.load tries tar, torch's format before 0.1.11, first
        raise ValueError("not a PyTorch file, or cut short")
    file.seek(0)
    return set().union(*(_globals(file) for _ in range(5)))


def _globals(pickled):
    """{'module name'} of all that a pickle, bytes or the next of a file, wants to call or make. Runs nothing.

    Raises ValueError for more parts than any network has: some of one byte take hundreds in memory, and to
    hash tuples within tuples takes a stack that 100,000 of them exceed.
    """
    found, ops = set(), Counter()
    for op, value, _ in pickletools.genops(pickled):
        ops["TUPLE" if op.name.startswith("TUPLE") else "all"] += 1
        if ops["TUPLE"] > 50_000 or ops["all"] > 2_000_000:
            raise ValueError("has more parts than a network's file")
        if op.name == "GLOBAL":
            found.add(value)
        elif op.name == "PROTO" and value != 2:
            raise ValueError(f"is pickled by protocol {value}, not by torch.save's 2")
    return found


def _tensors(content):
    """{dotted path: tensor} of nested dicts and lists, without torch.compile's `_orig_mod`."""
    tensors, todo, seen = {}, [((), content)], set()
    while todo:
        path, part = todo.pop()
        if isinstance(part, torch.Tensor):
            tensors[".".join(path)] = part
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            if len(path) > 1000:
                raise ValueError("is nested too deeply")
            seen.add(id(part))                              # a pickle may hold itself
            # an OrderedDict of a file may have an attribute `items` of its own
            items = dict.items(part) if isinstance(part, dict) else enumerate(part)
            inner = [(path + tuple(w for w in str(k).split(".") if w != "_orig_mod"), v) for k, v in items]
            todo += reversed(inner)
    return tensors


def differences(expected, found):
    """What keeps the state dict `found` from being loaded into `expected`, in words; empty if nothing."""
    problems = {"missing": [name for name in expected if name not in found],
                "unexpected": [name for name in found if name not in expected],
                "misshapen": []}
    for name, tensor in expected.items():
        value = found.get(name, tensor)
        if not isinstance(value, torch.Tensor):
            problems["misshapen"].append(f"{name} is no tensor")
        elif value.shape != tensor.shape:
            problems["misshapen"].append(f"{name} is {list(value.shape)}, not {list(tensor.shape)}")
        elif value.is_floating_point() != tensor.is_floating_point():
            problems["misshapen"].append(f"{name} is {value.dtype}, not {tensor.dtype}")
    return "; ".join(f"{kind}: {_first(names, 3)}" for kind, names in problems.items() if names)


def _first(names, count):
    names = [printable(str(name)) for name in names]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# How others spell the names of our backbones: (pattern, replacement), one after the other.
SPELLINGS = (
    (),                                                     # torchvision's, timm's, DINO's
    ((r"^conv1", "0"), (r"^bn1", "1"),                      # lightly: Sequential(*torchvision's children)
     (r"^layer(\d)", lambda m: str(int(m[1]) + 3))),
    ((r"^conv1", "0"), (r"^bn1", "1"), ("downsample", "shortcut"),     # the same of lightly's own ResNets
     (r"^layer(\d)", lambda m: str(int(m[1]) + 1))),
    ((r"^norm\b", "ln1"), (r"^blocks", "layers"), (r"\bnorm([12])", r"ln\1"),        # OpenMMLab's ViT
     (r"mlp\.fc1", "ffn.layers.0.0"), (r"mlp\.fc2", "ffn.layers.1"), (r"embed\.proj", "embed.projection")),
)


def _rank(place):
    """Of several networks in one file the least is taken: the one that its project itself evaluates."""
    if place.startswith("teacher"):
        return 0                 # a dict beside the student's: the moving average of DINO, of TWIST, and ours
    if "teacher_" in place:
        return 2                 # the same as a module of the whole: lightly's DINO
    if re.search("student|online", place):
        return 3                 # what is left of SEED, whose teacher is another network
    if re.search(r"teacher|momentum|target|encoder_k|(^|[._])ema([._]|$)", place):
        return 4
    return 1                     # backbone, encoder, encoder_q (MoCo), base_encoder (MoCo v3), or no name


class Loaded(NamedTuple):
    """Where the weights stood, how many tensors were loaded, what else the file and the backbone have."""
    place: str                   # dotted path in the file before the backbone's names; empty: top level
    others: list                 # places of other networks in the file that would have fitted, too
    loaded: int
    left_over: list              # names of all other tensors in the file
    missing: list                # the backbone's names that keep their value
    verified: bool               # whether the file has checksums


def load_backbone(backbone, path, key=None, partial=False):
    """Loads a backbone of build_backbone from a file of any project; says in a line what; returns a Loaded.

    Wherever in the file's nested dicts the backbone's names stand together, behind one prefix (`module.`,
    `state_dict` and `module.encoder_q.`, ...) and in one of SPELLINGS, with every shape and nothing else in
    the same layers, is a network that fits. Of several the first by _rank is taken; key, its path or a word
    of it (`student`), chooses another. num_batches_tracked may be missing throughout, as evaluation reads
    none; they are reported. partial: of the place that has most, load what fits, and report the rest.
    Raises UserError that names the tensors in the way, or networks between which nothing decides.
    """
    content, verified = read_file(path)
    tensors = _tensors(content) if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"{path}: holds no state dict, but a {type(content).__name__} without named tensors")
    expected = backbone.state_dict()
    places = _places(expected, tensors, key)
    if not places:
        raise UserError(f"{path}: holds none of the network's names{f' under {key}' if key else ''}; it has "
                        f"{_first(tensors, 3)}, the network {_first(expected, 3)}")
    fitting = sorted((place for place in places if not place.problem),
                     key=lambda place: (place.name != key, _rank(place.name), place.name.count(".")))
    if not fitting and not partial:
        raise UserError(f"{path}: is not this network ({places[0].problem}), looked for in "
                        f"{places[0].name or 'its top level'}")
    best, *others = fitting or places[:1]
    for other in others:
        if best.name != key and _rank(other.name) == _rank(best.name) and not all(
                torch.equal(tensors[best.names[name]], tensors[other.names[name]])
                for name in best.names.keys() & other.names.keys()):
            raise UserError(f"{path}: holds several networks that fit, {best.name} and {other.name}; "
                            "save the state dict of one of them alone")
    if re.search("base_encoder|momentum_encoder", best.name) and len(expected.get("norm.weight", ())) == 384:
        raise UserError(f"{path}: MoCo v3's ViT-S has 12 heads, vit_s 6: another network of these shapes")

    backbone.load_state_dict(expected | {name: tensors[there] for name, there in best.names.items()})
    used = set(best.names.values())
    report = Loaded(best.name, [other.name for other in others], len(used),
                    [name for name in tensors if name not in used],
                    [name for name in expected if name not in best.names], verified)
    if os.environ.get("RANK", "0") == "0":
        print(describe(report, path))
    return report


class _Place(NamedTuple):
    name: str                    # dotted path before the backbone's names
    names: dict                  # of the backbone's tensors that fit: our name -> name in the file
    problem: str                 # why it is not the whole network; empty: it is


def _places(expected, tensors, key):
    """Where names of the state dict `expected` stand among `tensors`, most of them first."""
    counters = [name for name in expected if name.endswith("num_batches_tracked")]
    places = []
    for spelling in SPELLINGS:
        ours = {}                                           # their name -> our name
        for name in expected:
            spelled = name
            for pattern, replacement in spelling:
                spelled = re.sub(pattern, replacement, spelled)
            ours[spelled] = name
        if spelling and ours.keys() == expected.keys():     # does not concern this network
            continue
        layers = {name.split(".")[0] for name in ours}
        counts = Counter()
        for name in tensors:
            words = name.split(".")
            counts.update(".".join(words[:i]) for i in range(len(words)) if ".".join(words[i:]) in ours)
        counts = {place: n for place, n in counts.items() if not key or f".{key}." in f".{place}."}
        for place, count in counts.items():
            if count < max(counts.values()) and count < len(expected) - len(counters):
                continue                                    # a block within a network, whose names are alike
            start = place + "." if place else ""
            inside = {name[len(start):]: name for name in tensors if name.startswith(start)}
            state = {ours.get(n, n): name for n, name in inside.items() if n.split(".")[0] in layers
                     and not re.match(r"classifier\.[1-9]", n)}        # a MobileNet's last layer
            found = {name: tensors[there] for name, there in state.items()}
            if not any(name in found for name in counters):
                found.update((name, expected[name]) for name in counters)
            names = {n: there for n, there in state.items()
                     if n in expected and not differences({n: expected[n]}, {n: tensors[there]})}
            places.append((count, _Place(place, names, differences(expected, found))))
    return [place for _, place in sorted(places, key=lambda pair: -pair[0])]


def describe(report, path):
    """One line, or two, for a Loaded: what was loaded, chosen before what, and what was left over."""
    def group(name):             # `state_dict.module.fc.0.weight` is counted under `state_dict.module.fc`
        words, place = name.split("."), report.place.split(".")
        same = next((i for i, (a, b) in enumerate(zip(words, place, strict=False)) if a != b), len(place))
        return ".".join(words[:(same if report.place else 0) + 1])
    line = f"{path}: {report.loaded} tensors loaded from {report.place or 'its top level'}"
    if report.others:
        line += f", rather than {', '.join(report.others)}"
    groups = Counter(map(group, report.left_over))
    line += "; left over: " + _first([f"{n} ({count})" for n, count in groups.items()] or ["nothing"], 8)
    if report.missing:
        line += f"; not in the file, kept as they were: {_first(report.missing, 3)}"
    if not report.verified:
        line += f"\nwarning: {path} is in PyTorch's old format, without checksums: damage would go unseen"
    return line


def load_pretrained(path, arch=None, small_images=False, key=None):
    """(backbone, configuration for data.input_of) of a checkpoint file, for stages that start from one.

    Of this project's training checkpoints the network of their own configuration: the averaged one
    (`teacher`) where there is one, else, or with key "model", the trained one. Of other files, bare
    backbones among them, build_backbone(arch, small_images) by load_backbone; their input is data.PICTURES.
    """
    return _pretrained(path, arch, small_images, key)[:2]


def load_teacher(path, arch=None, head="auto"):
    """(backbone, name of the head, head, configuration) of SEED's teacher: load_pretrained and load_head."""
    backbone, config, place = _pretrained(path, arch, flag="--teacher-arch")
    act = nn.GELU if config["arch"].startswith("vit") else nn.ReLU
    return backbone, *load_head(path, place, head, act), config


def _pretrained(path, arch=None, small_images=False, key=None, flag="--arch"):
    """What load_pretrained gives, and the place of the backbone in the file; flag: what sets arch."""
    content, _ = read_file(path)
    if is_ours(content):
        config = content["config"]
        if arch is not None and arch != config.get("arch"):
            raise UserError(f"{flag} {arch}: {path} holds a {config.get('arch')}; leave {flag} out")
        name = key or ("teacher" if "teacher" in content else "model")
        if name not in ("model", "teacher") or name not in content:
            raise UserError(f"{path}: has no '{name}'")
        return _build_ours(config, content[name], path).backbone, config, f"{name}.backbone"
    if arch is None:
        raise UserError(f"{flag}: {path} is no training checkpoint of this project and does not say which "
                        f"network it holds; name it by {flag}")
    try:
        backbone = build_backbone(arch, small_images)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None
    place = load_backbone(backbone, path, key).place
    config = {"data": None, "image_size": 0, "mean": None, "std": None, "arch": arch, "seed": 0}
    return backbone, config, place


# Where projection heads stand, beside a backbone or in it: of TWIST, SwAV, Barlow Twins, MoCo and SimCLR
HEADS = ("projection_heads.projection_head", "projection_head", "projector", "fc")


def load_head(path, place, name="auto", act=nn.ReLU):
    """(name, nn.Sequential) of the projection head that belongs to the backbone at `place` in a file.

    name: one of HEADS or any other; auto: the first of HEADS with several linear layers, as one alone may be
    a classifier; none, or nothing found by auto: the identity. The layers are told by their tensors: linear
    ones by a matrix, batch norms by running statistics; between them, before every further linear layer,
    stands an activation, and of TWIST's head, whose hidden output is meant, after the last batch norm, too.
    Raises UserError if what stands there is something else.
    """
    tensors, parent = _tensors(read_file(path)[0]), place.rpartition(".")[0]
    for candidate in {"auto": HEADS, "none": ()}.get(name, (name,)):
        for start in (place, parent):
            start = ".".join(filter(None, (start, candidate))) + "."
            found = {n.removeprefix(start): tensor for n, tensor in tensors.items() if n.startswith(start)}
            found = {n if "." in n else f"0.{n}": tensor for n, tensor in found.items()}      # a lone layer
            matrices = sum(n.endswith("weight") and tensor.dim() == 2 for n, tensor in found.items())
            if matrices >= (2 if name == "auto" else 1):
                head = _build_head(found, act, f"{path}: {start[:-1]}")
                return candidate, head.append(act()) if candidate == HEADS[0] else head
    if name not in ("auto", "none"):
        raise UserError(f"--teacher-head {name}: {path} has no linear layers of that name beside "
                        f"{place or 'its top level'}")
    return "none", nn.Sequential()


def _build_head(tensors, act, where):
    """nn.Sequential of linear layers, batch norms and activations, from {'0.weight': tensor, ...}."""
    try:
        head = nn.Sequential()
        for index in sorted({int(name.split(".")[0]) for name in tensors}):
            state = {name.split(".")[1]: tensor for name, tensor in tensors.items()
                     if name.startswith(f"{index}.")}
            if "running_var" in state:
                layer = nn.BatchNorm1d(len(state["running_var"]), affine="weight" in state)
            else:
                layer = nn.Linear(*reversed(state["weight"].shape), bias="bias" in state)
                if len(head):
                    head.append(act())
            layer.load_state_dict(state)
            head.append(layer)
        return head
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{where}: is not a projection head of linear layers and batch norms "
                        f"({str(error).splitlines()[0]})") from None


def load_last_checkpoint(out):
    """The newest readable checkpoint of a run's folder, or None if it has none.

    If that is the previous one, the damaged one is moved to checkpoint.damaged.pth: where it is, the next
    save would put it in the place of the only good one.
    """
    paths = [path for path in (out / "checkpoint.pth", out / "checkpoint.prev.pth") if path.exists()]
    for i, path in enumerate(paths):
        try:
            state = load_checkpoint(path)
        except UserError as error:
            if i + 1 == len(paths):
                raise
            to_stderr(f"warning: {error}; going back to {paths[i + 1].name}")
            continue
        if i > 0:
            try:
                os.replace(paths[0], out / "checkpoint.damaged.pth")
            except OSError as error:
                raise UserError(f"{paths[0]}: damaged, and cannot be moved ({error.strerror})") from None
        return state
    return None
