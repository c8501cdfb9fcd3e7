"""A run and its files: arguments, output folder and lock, atomic checkpoints, exact resume.

What is written can be trusted: a file is complete or it is not there, and it is checked before it is read.
"""

import fcntl
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import torch

from model import build_twist

VERSION = 1
# What may differ between a run and its continuation: it changes where and how fast, not what is computed.
FREE_FLAGS = {"workers", "print_every", "device", "amp", "output_dir", "timeout", "resume", "overwrite",
              "data_dir", "local_rank"}
RUN_FILES = ("config.json", "checkpoint.pth", "checkpoint.prev.pth", "backbone.pth", "log.jsonl",
             "metrics.json", "curves.png")


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
    """The dict that save_checkpoint wrote. Raises UserError unless the file is whole.

    torch.load alone verifies no checksum: a flipped bit in a weight would load silently.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        _check_records(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:   # whatever a damaged file makes zipfile or the unpickler raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or "model" not in state or "config" not in state:
        raise UserError(f"{path}: not a checkpoint of this project (no 'model' and 'config' in it)")
    return state


def _check_records(path):
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


def load_twist(path):
    """The network of a pretrain.py checkpoint, every weight as saved, and that run's configuration."""
    state = load_checkpoint(path)
    try:
        network = build_twist(state["config"])
        network.load_state_dict(state["model"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a network of this project ({str(error).splitlines()[0]})") from None
    return network, state["config"]


def load_pretrained(path, arch=None, small_images=False):
    """(backbone, configuration for data.input_of) of a checkpoint file, for stages that start from one."""
    network, config = load_twist(path)
    return network.backbone, config


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

