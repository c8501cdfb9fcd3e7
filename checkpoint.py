"""Files of weights: written atomically, verified before they are loaded, read from other projects as well.

save_checkpoint and load_checkpoint keep the state of a run. load_backbone and load_head read the network of
another project; pretrained.py calls them. The checks of hostile files stand at the end.
Wherever a file is read, a run's folder means its newest readable checkpoint.
"""

import argparse
import os
import pickletools
import re
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

VERSION = 1


class UserError(Exception):
    """A mistake that the user can mend. Its one line says what, where and how; a stage exits with code 2."""


def to_stderr(line):
    """Prints a line to stderr in one write, so that lines of several processes do not mix."""
    _write(sys.stderr, line + "\n")


def to_stdout(line, end="\n"):
    """Prints a line at once."""
    _write(sys.stdout, line + end)


def _write(stream, text):
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:     # what is left in the buffer would fail once more when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not isinstance(error, BrokenPipeError):       # the reader has left (`| head -1`): no mistake
            raise


def printable(name):
    """A name with everything that cannot be printed (newlines, invalid UTF-8) as escapes."""
    text = ""
    for character in name:
        text += character if character.isprintable() else ascii(character)[1:-1]
    return text


def say_once(line):
    """Prints a line, in the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        to_stdout(line)


# ---------------------------------------------------------------- checkpoints of a run
def save_checkpoint(path, state):
    """Saves a dict of plain types and tensors; the checkpoint before it stays as checkpoint.prev.pth."""
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    write_atomically(beside, dict(state, version=VERSION))
    try:
        if path.exists():        # between the two renames only the previous one exists; resuming finds it
            os.replace(path, path.with_name(path.stem + ".prev" + path.suffix))
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); is its folder still there?") from None


def load_checkpoint(path):
    """The dict that save_checkpoint wrote. Raises UserError unless the file is whole."""
    return require_ours(*read_file(path), path)


def require_ours(state, verified, path):
    """Returns what read_file found in a file. Raises UserError unless it is a checkpoint of this project."""
    if not verified:
        raise UserError(f"{path}: not a readable checkpoint (not a zip-format PyTorch file, or cut short); "
                        "use another")
    if not is_ours(state):
        raise UserError(f"{path}: not a checkpoint of this project (no 'model' and 'config' in it); use the "
                        "checkpoint.pth of a run")
    return state


def load_last_checkpoint(out):
    """The newest readable checkpoint in a run's folder, or None if there is none.

    A damaged checkpoint.pth is moved to checkpoint.damaged.pth once the previous one has been read. If it
    stayed, the next save would rename it to checkpoint.prev.pth, over the only good file.
    """
    last, previous = out / "checkpoint.pth", out / "checkpoint.prev.pth"
    if not previous.exists():
        return load_checkpoint(last) if last.exists() else None
    if last.exists():
        try:
            return load_checkpoint(last)
        except UserError as error:
            to_stderr(f"warning: {error}; going back to {previous.name}")
    try:
        state = load_checkpoint(previous)
    except UserError as error:
        raise UserError(f"{error}; or start anew with --overwrite") from None
    if last.exists():
        try:
            os.replace(last, out / "checkpoint.damaged.pth")
        except OSError as error:
            raise UserError(f"{last}: damaged, and cannot be moved ({error.strerror}); remove it") from None
    return state


def write_atomically(path, content):
    """Writes bytes, or any object by torch.save, beside `path`, flushes them to disk, then renames the file.

    Raises UserError where that fails (a full disk, a missing folder); `path` keeps its old content then.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                    # torch.save turns some into a RuntimeError
        if "DataLoader worker" in str(error):                   # a worker was killed meanwhile: not our error
            raise
        with suppress(OSError):
            beside.unlink(missing_ok=True)                      # half a file would keep the disk full
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); make room or restore the folder, and run the "
                        "same command") from None
    with suppress(OSError):              # Windows opens no folder, and some file systems flush none
        folder = os.open(path.parent, os.O_RDONLY)      # only a flushed one keeps a name in a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def is_ours(content):
    """Whether a file's content is a checkpoint of this project, with a configuration of plain values."""
    config = content.get("config") if isinstance(content, dict) else None
    if not isinstance(config, dict) or not isinstance(content.get("model"), dict):
        return False
    values = []
    for value in config.values():
        values += value if isinstance(value, list | tuple) else [value]
    return all(value is None or isinstance(value, (str, int, float)) for value in values)


# ---------------------------------------------------------------- backbones from files of any project
COUNTER = "num_batches_tracked"
# How projects spell the names of our backbones: (pattern, replacement) pairs, applied one after the other.
SPELLINGS = (
    (),                                                     # torchvision, timm, DINO
    ((r"^conv1", "0"), (r"^bn1", "1"),                      # lightly: Sequential(*torchvision's children)
     ("^layer1", "4"), ("^layer2", "5"), ("^layer3", "6"), ("^layer4", "7")),
    ((r"^conv1", "0"), (r"^bn1", "1"), ("downsample", "shortcut"),               # lightly's own ResNets
     ("^layer1", "2"), ("^layer2", "3"), ("^layer3", "4"), ("^layer4", "5")),
    ((r"^norm\b", "ln1"), (r"^blocks", "layers"), (r"\bnorm([12])", r"ln\1"),    # OpenMMLab's ViT
     (r"mlp\.fc1", "ffn.layers.0.0"), (r"mlp\.fc2", "ffn.layers.1"), (r"embed\.proj", "embed.projection")),
)


class Loaded(NamedTuple):
    """What load_backbone did."""
    place: str                   # dotted path before the backbone's names in the file; empty: top level
    others: list                 # places of other networks in the file that would have fitted
    loaded: int                  # number of tensors
    left_over: list              # names of all other tensors in the file
    missing: list                # counters of batch norms, which the file lacks
    verified: bool               # whether the file has checksums


class _Place(NamedTuple):
    """A prefix in the file behind which names of the backbone stand."""
    prefix: str                  # dotted path; empty: top level
    count: int                   # how many of the backbone's names
    names: dict                  # our name -> full name in the file, of the tensors that fit
    problem: str                 # why it is not the whole network; empty: it is


def load_backbone(backbone, path, key=None):
    """Loads a backbone of build_backbone from a file of any project, prints what it did, returns a Loaded.

    A place is a prefix in the file's nested dicts (`module.`, `state_dict` and `module.encoder_q.`, ...) with
    the backbone's names behind it, in one of SPELLINGS. It fits if every tensor has its shape and the same
    layers hold nothing else. Of several that fit, _preference decides, or key: a place or a word of it.
    All num_batches_tracked may be missing, because evaluation does not read them.
    Raises UserError that names the tensors that do not fit, or the networks that it cannot choose between.
    """
    content, verified = read_file(path)
    tensors = _tensors(content) if isinstance(content, dict) else {}
    if not tensors:
        raise UserError(f"{path}: holds no state dict, but a {type(content).__name__} without named tensors; "
                        "use another file")
    expected = backbone.state_dict()
    places = _find_places(expected, tensors, key)
    if not places:
        raise UserError(f"{path}: holds none of the network's names{f' under {key}' if key else ''}; it has "
                        f"{_first(tensors, 3)}, the network {_first(expected, 3)}; is --arch right?")
    fitting = [place for place in places if not place.problem]
    if not fitting:
        raise UserError(f"{path}: is not this network ({places[0].problem}), looked for in "
                        f"{places[0].prefix or 'its top level'}; is --arch right?")
    fitting.sort(key=lambda place: (place.prefix != key, _preference(place.prefix), place.prefix.count(".")))
    best, *others = fitting
    if best.prefix != key:
        _refuse_ambiguous(best, others, tensors, path)
    from_moco3 = re.search("base_encoder|momentum_encoder", best.prefix)
    if from_moco3 and len(expected.get("norm.weight", ())) == 384:
        raise UserError(f"{path}: MoCo v3's ViT-S has 12 heads, vit_s 6; use one with 6, such as DINO's")

    backbone.load_state_dict(expected | {ours: tensors[theirs] for ours, theirs in best.names.items()})
    used = set(best.names.values())
    left_over = [name for name in tensors if name not in used]
    missing = [name for name in expected if name not in best.names]
    report = Loaded(best.prefix, [place.prefix for place in others], len(used), left_over, missing, verified)
    say_once(describe(report, path))
    return report


def describe(report, path):
    """A Loaded in one line, or two: what was loaded and from where, and what was left over."""
    line = f"{path}: {report.loaded} tensors loaded from {report.place or 'its top level'}"
    if report.others:
        line += f", rather than {', '.join(report.others)}"
    place = report.place.split(".") if report.place else []
    groups = Counter()           # `state_dict.module.fc.0.weight` counts for `state_dict.module.fc`
    for name in report.left_over:
        words = name.split(".")
        shared = len(os.path.commonprefix([words, place]))
        groups[".".join(words[:shared + 1])] += 1
    counts = [f"{group} ({count})" for group, count in groups.items()]
    line += f"; left over: {_first(counts or ['nothing'], 8)}"
    if report.missing:
        line += f"; not in the file, kept as they were: {_first(report.missing, 3)}"
    if not report.verified:
        line += f"\nwarning: {path} is in PyTorch's old format, without checksums: damage would go unseen"
    return line


def _preference(place):
    """Of several networks in a file the lowest is taken: the one that its project itself evaluates."""
    if place.startswith("teacher"):
        return 0                 # a dict beside the student's: the moving average of DINO, TWIST, and ours
    if "teacher_" in place:
        return 2                 # the same as a submodule: lightly's DINO
    if re.search("student|online", place):
        return 3                 # SEED's student; there `teacher` (4) is another network
    if re.search(r"teacher|momentum|target|encoder_k|(^|[._])ema([._]|$)", place):
        return 4
    return 1                     # backbone, encoder, encoder_q (MoCo), base_encoder (MoCo v3), or no name


def _refuse_ambiguous(best, others, tensors, path):
    """Raises UserError if a place as good as `best` holds other weights."""
    for other in others:
        if _preference(other.prefix) == _preference(best.prefix):
            for name in best.names.keys() & other.names.keys():
                if not torch.equal(tensors[best.names[name]], tensors[other.names[name]]):
                    raise UserError(f"{path}: holds several networks that fit, {best.prefix} and "
                                    f"{other.prefix}; save the state dict of one of them alone")


def _find_places(expected, tensors, key):
    """The places among `tensors` (full name -> tensor) that may hold the state dict `expected`.

    Those with most names come first. key: only places with these words in their path.
    """
    places = []
    for spelling in SPELLINGS:
        our_names = {_spell(name, spelling): name for name in expected}           # their name -> ours
        if spelling and our_names.keys() == expected.keys():
            continue                                        # it changes no name of this network
        for prefix, count in _candidates(our_names, tensors, key).items():
            places.append(_compare(prefix, count, our_names, expected, tensors))
    return sorted(places, key=lambda place: -place.count)


def _spell(name, spelling):
    for pattern, replacement in spelling:
        name = re.sub(pattern, replacement, name)
    return name


def _candidates(our_names, tensors, key):
    """{prefix: number of the network's names behind it} of the prefixes that may hold the whole network."""
    counts = Counter()
    for full_name in tensors:
        words = full_name.split(".")
        for i in range(len(words)):
            if ".".join(words[i:]) in our_names:
                counts[".".join(words[:i])] += 1
    if key:
        counts = {prefix: count for prefix, count in counts.items() if f".{key}." in f".{prefix}."}
    # A block has names like those of a network (conv1, bn1), so prefixes with few names are left out.
    needed = sum(not name.endswith(COUNTER) for name in our_names)
    enough = min(needed, max(counts.values(), default=0))
    return {prefix: count for prefix, count in counts.items() if count >= enough}


def _compare(prefix, count, our_names, expected, tensors):
    """The _Place at a prefix."""
    start = prefix + "." if prefix else ""
    layers = {name.split(".")[0] for name in our_names}
    full_names, found = {}, {}                              # by our name, or theirs where we have none
    for full_name, tensor in tensors.items():
        name = full_name[len(start):]
        is_classifier = re.match(r"classifier\.[1-9]", name)          # of a MobileNet: no part of a backbone
        if full_name.startswith(start) and name.split(".")[0] in layers and not is_classifier:
            full_names[our_names.get(name, name)] = full_name
            found[our_names.get(name, name)] = tensor
    fitting = {name: full_name for name, full_name in full_names.items() if name in expected
               and not differences({name: expected[name]}, {name: found[name]})}
    counters = {name: value for name, value in expected.items() if name.endswith(COUNTER)}
    if not counters.keys() & found.keys():                  # all missing: allowed
        found |= counters
    return _Place(prefix, count, fitting, differences(expected, found))


def differences(expected, found):
    """Why the state dict `found` does not load into `expected`, in words; empty if it does."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = []
    for name, tensor in expected.items():
        value = found.get(name, tensor)
        if not isinstance(value, torch.Tensor):
            misshapen.append(f"{name} is no tensor")
        elif value.shape != tensor.shape:
            misshapen.append(f"{name} is {list(value.shape)}, not {list(tensor.shape)}")
        elif value.is_floating_point() != tensor.is_floating_point():
            misshapen.append(f"{name} is {value.dtype}, not {tensor.dtype}")
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    return "; ".join(f"{kind}: {_first(names, 3)}" for kind, names in problems.items() if names)


def _first(names, count):
    names = [printable(str(name)) for name in names]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# ---------------------------------------------------------------- projection heads from files of any project
# Names beside the backbone's place, or in it: of TWIST, SwAV, Barlow Twins, MoCo and SimCLR
HEADS = ("projection_heads.projection_head", "projection_head", "projector", "fc")


def load_head(path, place, name="auto", act=nn.ReLU):
    """(name, nn.Sequential) of the projection head that belongs to the backbone at `place` in a file.

    name: one of HEADS or any other. auto: the first of HEADS with several linear layers; a lone one may be a
    classifier. none, or auto without success: the identity.
    Linear layers are recognised by a matrix, batch norms by running statistics. An activation stands before
    every linear layer but the first. TWIST's head, of which the hidden output is taken, ends in one as well.
    Raises UserError if the layers are of another kind.
    """
    tensors, parent = _tensors(read_file(path)[0]), place.rpartition(".")[0]
    for candidate in {"auto": HEADS, "none": ()}.get(name, (name,)):
        for above in (place, parent):
            start = f"{above}.{candidate}" if above else candidate
            found = {}
            for full_name, tensor in tensors.items():
                if full_name.startswith(start + "."):
                    inner = full_name[len(start) + 1:]
                    found[inner if "." in inner else f"0.{inner}"] = tensor      # a lone layer has no number
            matrices = sum(inner.endswith("weight") and value.dim() == 2 for inner, value in found.items())
            if matrices >= (2 if name == "auto" else 1):
                head = _build_head(found, act, f"{path}: {start}")
                return candidate, head.append(act()) if candidate == HEADS[0] else head
    if name not in ("auto", "none"):
        raise UserError(f"--teacher-head {name}: {path} has no linear layers of that name beside "
                        f"{place or 'its top level'}; use auto or none")
    return "none", nn.Sequential()


def _build_head(tensors, act, where):
    """nn.Sequential of linear layers, batch norms and activations, from {'0.weight': tensor, ...}."""
    try:
        states = {}                                         # number of the layer -> its state dict
        for name, tensor in tensors.items():
            number, name = name.split(".")[:2]
            states.setdefault(int(number), {})[name] = tensor
        head = nn.Sequential()
        for _, state in sorted(states.items()):
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
                        f"({str(error).splitlines()[0]}); use --teacher-head none") from None


# ---------------------------------------------------------------- damaged and hostile files
# The types that weights, optimizers and settings are pickled as. torch.load allows more by itself, and with
# those a small file can take any amount of memory: bytearray(10**11), torch.Tensor(10**11).
ALLOWED = {"collections OrderedDict", "collections Counter", "argparse Namespace", "__builtin__ set",
           "torch Size", "torch device", "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2",
           "torch._utils _rebuild_parameter"}
ALLOWED |= {f"torch {kind}Storage" for kind in "Float Double Half BFloat16 Long Int Short Char Byte Bool "
            "ComplexFloat ComplexDouble".split()}
ALLOWED |= {f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
ZIP_FORMAT = b"PK\3\4"                                                      # the first bytes of a file
OLD_FORMAT = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"    # before 1.6: a pickled number
FOLDER = 16                      # an attribute of a zip record; torch returns uninitialised memory for one
# The last 98 bytes of a zip file of PyTorch, and what we read of them:
END_OF_ZIP = struct.Struct("<48xQ"              # zip64's end record: offset of the central directory
                           "4s4xQ4x"            # zip64's locator: signature, offset of zip64's end record
                           "4s12xIH")           # end record: signature, offset of the directory, comment


def read_file(path):
    """(content, verified) of a file that torch.save wrote, by whatever project; tensors on the CPU.

    Nothing in it is run: weights_only, and of that only the types in ALLOWED (published TWIST, DINO and MAE
    files hold their flags in a Namespace). torch.load verifies no checksum and would load a flipped bit
    silently, so the checksums are compared first. Files of PyTorch before 1.6 have none: they are not
    `verified`. Raises UserError for everything that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; is the path right?")
    try:
        with open(path, "rb") as file:           # opened once, so that what was checked is what is loaded
            verified = file.read(4) == ZIP_FORMAT        # torch.load looks at the same bytes
            types = _check_zip(file) if verified else _check_old(file)
            foreign = sorted(name.replace(" ", ".") for name in types - ALLOWED)
            if foreign:
                raise UserError(f"{path}: holds other objects beside weights, which could run code and are "
                                f"not read: {_first(foreign, 9)}; save the state dict alone in the project "
                                "that wrote it: torch.save(model.state_dict(), FILE)")
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
        _check_sizes(content, size)
    except UserError:
        raise
    except Exception as error:   # a damaged file makes zipfile and the unpickler raise errors of any type
        said = re.findall(r"WeightsUnpickler error:\s*(.+)", str(error)) or str(error).strip().splitlines()
        reason = said[0] if said else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason}); use another, or copy it again"
                        ) from None
    return content, verified


def _read_folder(folder):
    """read_file of a run's checkpoint.pth; of the one before where that is damaged or being replaced."""
    last, previous = folder / "checkpoint.pth", folder / "checkpoint.prev.pth"
    if not last.exists() and not previous.exists():
        raise UserError(f"{folder}: a folder without a run's checkpoint.pth; name a file")
    if not previous.exists():
        return read_file(last)
    try:
        return read_file(last)
    except UserError as error:
        if last.exists():
            to_stderr(f"warning: {error}; {previous.name} is read instead")
    return read_file(previous)


def _check_zip(file):
    """The names of the types in a zip-format file. Raises ValueError unless its checksums are right.

    zipfile checks the file here and torch's own code loads it later, so a file that the two could understand
    differently is refused.
    """
    size = file.seek(0, os.SEEK_END)
    if size < END_OF_ZIP.size or not zipfile.is_zipfile(file):
        raise ValueError("not a zip-format PyTorch file, or cut short")
    with zipfile.ZipFile(file) as archive:
        _check_directory(file, size, archive.start_dir)
        _check_records(archive.infolist(), size)
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged} is wrong")
        types = set()
        for record in archive.infolist():
            if record.filename.lower().endswith(".pkl"):
                types |= _types_in(archive.read(record))
    return types


def _check_directory(file, size, directory_of_zipfile):
    """Raises ValueError unless there is one central directory, right before the end of the file."""
    file.seek(size - END_OF_ZIP.size)
    zip64_directory, locator, zip64_end, end, directory, comment = END_OF_ZIP.unpack(file.read())
    if locator == b"PK\6\7":     # other writers leave zip64's two records out
        directory = zip64_directory if zip64_end == size - END_OF_ZIP.size else None
    if end != b"PK\5\6" or comment or directory != directory_of_zipfile:
        raise ValueError("has bytes before or after its zip archive")


def _check_records(records, size):
    """Raises ValueError unless the records are as torch.save writes them: stored, each name once."""
    if len({record.filename.lower() for record in records}) < len(records):
        raise ValueError("has two records of one name")
    for record in records:
        if record.filename != record.orig_filename:          # zipfile cuts a name at a zero byte
            raise ValueError("has two records of one name")
        one_field = 4 + int.from_bytes(record.extra[2:4], "little") if record.extra else 0
        if record.external_attr & FOLDER or len(record.extra) != one_field:
            raise ValueError("has records that another program than PyTorch wrote")
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError("has compressed records")
        if record.compress_size != record.file_size:
            raise ValueError("claims more bytes than the file has")
    if sum(record.file_size for record in records) > size:
        raise ValueError("claims more bytes than the file has")


def _check_old(file):
    """The names of the types in a file of PyTorch before 1.6: five pickles, the fourth is the content."""
    file.seek(0)
    is_old = file.read(len(OLD_FORMAT)) == OLD_FORMAT
    file.seek(0)
    if not is_old or tarfile.is_tarfile(file):   # torch.load tries tar, its format before 0.1.11, first
        raise ValueError("not a PyTorch file, or cut short")
    file.seek(0)
    return set().union(*(_types_in(file) for _ in range(5)))


def _types_in(pickled):
    """{'module name'} of all types and functions that a pickle asks for; pickled: bytes, or a file at one.

    Runs nothing. Raises ValueError for more parts than any network has: one byte can stand for hundreds in
    memory, and hashing 100,000 nested tuples overflows the stack.
    """
    types, parts, tuples = set(), 0, 0
    for opcode, value, _ in pickletools.genops(pickled):
        parts += 1
        tuples += opcode.name.startswith("TUPLE")
        if tuples > 50_000 or parts > 2_000_000:
            raise ValueError("has more parts than a network's file")
        if opcode.name == "GLOBAL":
            types.add(value)
        elif opcode.name == "PROTO" and value != 2:
            raise ValueError(f"is pickled by protocol {value}, not by torch.save's 2")
    return types


def _check_sizes(content, size):
    """Raises ValueError for tensors larger than what is stored: a stride of 0 makes 10^12 weights of one."""
    stored = {}                                             # address -> bytes; tensors may share a storage
    for name, tensor in _tensors(content).items():
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"{name} claims more bytes than are stored")
    if sum(stored.values()) > size:
        raise ValueError("claims more bytes than the file has")


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
            seen.add(id(part))                              # a pickle may contain itself
            # not part.items(): a hostile OrderedDict may bring an attribute of that name
            items = dict.items(part) if isinstance(part, dict) else enumerate(part)
            for key, value in reversed(list(items)):        # popped from the end, so in the file's order
                words = [word for word in str(key).split(".") if word != "_orig_mod"]
                todo.append(((*path, *words), value))
    return tensors
