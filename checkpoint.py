"""A run and its files: arguments, output folder and lock, atomic checkpoints, exact resume.

What is written can be trusted: a file is complete or it is not there, and it is checked before it is read.
Backbones are read from the files of other projects, too, with every name and shape accounted for.
"""

import argparse
import fcntl
import json
import os
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from model import build_backbone, build_network

VERSION = 1
# What may differ between a run and its continuation: it changes where and how fast, not what is computed.
FREE_FLAGS = {"workers", "print_every", "device", "amp", "output_dir", "timeout", "resume", "overwrite",
              "data_dir", "local_rank"}
RUN_FILES = ("config.json", "checkpoint.pth", "checkpoint.prev.pth", "backbone.pth", "log.jsonl",
             "metrics.json", "curves.png", "head.pth", "predictions.csv", "labels.txt")


class UserError(Exception):
    """Something the user can mend; says what, where and how. Stages print it as one line and exit with 2."""


# ---------------------------------------------------------------- arguments
def parse_args(parser, argv=None):
    """Parses flags and `@file`s (lines of `--flag value`, # comments); `_` in a long flag is taken as `-`.

    A mistake is one line on stderr and exit code 2. A later value wins, so flags after an @file override it.
    """
    parser.fromfile_prefix_chars = "@"
    parser.convert_arg_line_to_args = lambda line: _dashes(line.split("#")[0].split())
    parser.error = lambda message: _exit(parser.prog, message)
    return parser.parse_args(_dashes(sys.argv[1:] if argv is None else argv))


def _dashes(words):
    return [re.sub(r"^--[^=]*", lambda m: m[0].replace("_", "-"), word) for word in words]


def _exit(prog, message):
    if os.environ.get("RANK", "0") == "0":       # all processes of a run make the same mistake: say it once
        print(f"{prog}: error: {message}", file=sys.stderr)
    sys.exit(2)


def run(main, parser, argv=None):
    """What stands behind `python STAGE.py`: parse, run, report a UserError in one line with exit code 2."""
    try:
        sys.exit(main(parse_args(parser, argv)))
    except UserError as error:   # of a loader's worker the last line; the others are its traceback
        _exit(parser.prog, str(error).strip().splitlines()[-1].removeprefix("checkpoint.UserError: "))


# ---------------------------------------------------------------- the output folder
def open_output(args, stage):
    """Makes and locks args.output_dir; returns (lock, checkpoint to go on from or None). For one process.

    Refuses (UserError) a folder in use, one used with another configuration, and with --resume never any used
    one. Nothing is written before all of that is known. Keep `lock` for as long as the run lives.
    """
    out = Path(args.output_dir)
    config = dict(vars(args), stage=stage)
    if out.exists() and not out.is_dir():
        raise UserError(f"--output-dir {out}: is not a folder")
    lock = None
    if out.is_dir():
        lock = _lock(out)
        used = (out / "config.json").exists()
        if used and args.resume == "never" and not args.overwrite:
            raise UserError(f"--output-dir {out}: holds a run already; choose another or add --overwrite")
        if used and not args.overwrite:
            refuse_difference(json.loads((out / "config.json").read_text()), config, out)
    state = None
    if args.resume not in ("auto", "never"):
        state = load_checkpoint(args.resume)
        refuse_difference(state.get("config", {}), config, args.resume)
    elif args.resume == "auto" and not args.overwrite:
        state = load_last_checkpoint(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock or _lock(out)
        if state is None or args.overwrite:
            for name in RUN_FILES:
                (out / name).unlink(missing_ok=True)
        write_atomically(out / "config.json", json.dumps(config, indent=1).encode())
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None
    return lock, state


def make_evaluation_folder(path):
    """The output folder of an evaluation. Raises UserError if it holds a training run or cannot be made."""
    out = Path(path)
    if (out / "checkpoint.pth").exists():
        raise UserError(f"--output-dir {out}: holds a training run; choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None
    return out


def open_log(path):
    """log.jsonl to append to; half a line that a killed run left is cut off."""
    log = open(path, "a+")
    log.seek(0)
    log.truncate(log.read().rfind("\n") + 1)
    return log


def _lock(out):
    try:
        lock = open(out / ".lock", "w")
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output-dir {out}: another run is using this folder; choose another") from None
    return lock


def refuse_difference(before, now, where):
    """Raises UserError that names every flag in which a run and its continuation must agree but do not."""
    keys = sorted((before.keys() & now.keys()) - FREE_FLAGS)
    different = [f"{key} was {before[key]}, is {now[key]}" for key in keys if before[key] != now[key]]
    if different:
        raise UserError(f"{where}: made with another configuration ({'; '.join(different)}); "
                        "use the same flags, another --output-dir, or --overwrite")


# ---------------------------------------------------------------- checkpoints
def write_atomically(path, content):
    """Writes bytes, or what torch.save makes of an object, beside `path`, flushes to disk, then renames."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        file.write(content) if isinstance(content, bytes) else torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_checkpoint(path, state):
    """Saves a dict of plain types and tensors; the one before stays as checkpoint.prev.pth."""
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    write_atomically(beside, dict(state, version=VERSION))
    if path.exists():            # between these renames there is only the previous one; resuming finds it
        os.replace(path, path.with_name(path.stem + ".prev" + path.suffix))
    os.replace(beside, path)


def load_checkpoint(path):
    """The dict that save_checkpoint wrote. Raises UserError unless the file is whole."""
    state, verified = read_file(path)
    if not verified:
        raise UserError(f"{path}: not a readable checkpoint (not a zip-format PyTorch file, or cut short)")
    if not is_ours(state):
        raise UserError(f"{path}: not a checkpoint of this project (no 'model' and 'config' in it)")
    return state


def is_ours(content):
    """Whether a file's content is a training checkpoint of this project."""
    return isinstance(content, dict) and all(isinstance(content.get(k), dict) for k in ("model", "config"))


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
        network = build_network(config)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a network of this project ({str(error).splitlines()[0]})") from None
    problem = differences(network.state_dict(), weights)
    if problem:
        raise UserError(f"{path}: not a network of this project ({problem})")
    network.load_state_dict(weights)
    return network


# ---------------------------------------------------------------- files of any project
def read_file(path):
    """(content, verified) of a file that torch.save wrote, by whatever project; tensors on the CPU.

    Nothing in it is run: weights_only, and of foreign types argparse.Namespace alone (published TWIST, DINO
    and MAE files hold their flags in one). torch.load verifies no checksum, a flipped bit in a weight would
    load silently: those of a zip-format file are compared first. Files of torch before 1.6 have none; they
    are read, but not `verified`. Raises UserError for everything that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        verified = _check_records(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in _tensors(content).items():   # a stride of 0 makes 10^12 weights of one number
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(f"{name} claims more bytes than are stored")
    except Exception as error:   # whatever a damaged file makes zipfile or the unpickler raise
        foreign = _foreign_objects(path, error)
        if foreign:
            raise UserError(f"{path}: holds objects beside weights, which could run code and are not read: "
                            f"{', '.join(foreign)}; save the state dict alone in the project that wrote "
                            "it, by torch.save(model.state_dict(), FILE)") from None
        said = re.findall(r"WeightsUnpickler error:\s*(.+)", str(error)) or str(error).strip().splitlines()
        raise UserError(f"{path}: not a readable checkpoint "
                        f"({said[0] if said else type(error).__name__})") from None
    return content, verified


def _check_records(path):
    """True: a zip-format file whose checksums are right; False: another format. Raises ValueError."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":               # by these torch.load, too, tells the formats apart
            return False
    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip-format PyTorch file, or cut short")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("has compressed records")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("claims more bytes than the file has")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged} is wrong")
    return True


def _foreign_objects(path, error):
    """Names of the types in a file that are not allowed; none where that is not what `error` is about."""
    first = re.search(r"GLOBAL ([\w.]+)", str(error))
    if not first:
        return []
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:           # the old format: only the first is known
        return [first[1]]


def _tensors(content):
    """{dotted path: tensor} of nested dicts and lists, without torch.compile's `_orig_mod`."""
    tensors, todo, seen = {}, [((), content)], set()
    while todo:
        path, part = todo.pop()
        if isinstance(part, torch.Tensor):
            tensors[".".join(path)] = part
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))                              # a pickle may hold itself
            items = part.items() if isinstance(part, dict) else enumerate(part)
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
    names = list(map(str, names))
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
    """The newest readable checkpoint of a run's folder, or None if it has none."""
    paths = [path for path in (out / "checkpoint.pth", out / "checkpoint.prev.pth") if path.exists()]
    for i, path in enumerate(paths):
        try:
            return load_checkpoint(path)
        except UserError as error:
            if i + 1 == len(paths):
                raise
            print(f"warning: {error}; going back to {paths[i + 1].name}", file=sys.stderr)
    return None

