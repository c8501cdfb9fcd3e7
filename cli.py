"""The command line of a script: types of flags, @files of flags, errors in one line, exit codes."""

import argparse
import atexit
import ctypes
import difflib
import errno
import importlib.util
import math
import multiprocessing
import os
import re
import shlex
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import UserError, to_stderr, to_stdout

if importlib.util.find_spec("scipy") is None:        # PyTorch runs without it, so it may be missing
    to_stderr("error: scipy is not installed; pip install -r requirements.txt")
    sys.exit(2)


# ---------------------------------------------------------------- flags
DEVICES = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


def at_least(low, kind=int, below=math.inf):
    """A type for add_argument: a finite number of this kind with low <= number < below."""
    def number(text):
        try:
            value = kind(text)
            if not low <= value < below or abs(value) > 2 ** 48 and kind is int:     # products fit 64 bits
                raise ValueError
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text}: must be {words}") from None
        return value
    words = "a whole number" if kind is int else "a number"
    words += f" of at least {low:g}" if low > -math.inf else ""
    words += f" and below {below:g}" if below < math.inf else ""
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a description, and names each default that is a value."""

    def _get_help_string(self, action):
        has_no_value = action.default is None or action.default is False
        return action.help if has_no_value else super()._get_help_string(action)


def parse_args(parser, argv=None):
    """Parses flags and `@file`s, which hold lines of `--flag value` and # comments.

    In a file, a value with spaces stands in quotes, and a # begins a comment at the start of a word. A later
    value wins, so flags behind an @file override it. `--num_classes` is read as `--num-classes`, and the
    --local-rank of old launchers is ignored. A mistake is one line on stderr and exit code 2.
    """
    parser.fromfile_prefix_chars = "@"
    parser.convert_arg_line_to_args = lambda line: _hyphens(_words(line, parser))
    words = _hyphens(sys.argv[1:] if argv is None else argv)
    parser.error = lambda message: _exit(parser.prog, message + _did_you_mean(message, parser, words))
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    del args.local_rank
    if getattr(args, "amp", None) == "auto":
        args.amp = half_precision() if args.device == "cuda" else "off"
    return args


def half_precision():
    """What --amp auto is on this GPU. Those before Ampere only imitate bf16, slowly or not at all."""
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _words(line, parser):
    """The words of a line of an @file without its comment; in quotes they may have spaces and # in them."""
    text = re.match(r"""(?:[^#'"]|(?<=\S)#|'[^']*'|"[^"]*")*""", line)[0]
    if line[len(text):len(text) + 1] in ("'", '"'):
        parser.error(f"{line.strip()}: a quote is not closed")
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""        # a path of Windows has \\
    return list(lexer)


def _did_you_mean(message, parser, words):
    """What an error of argparse may have meant: another script, the nearest flag, choice or file of flags."""
    flag, choice, file = (re.search(pattern, message) for pattern in (
        r"unrecognized arguments:.*?(--[\w-]+)", r"argument (--[\w-]+): invalid choice: '(.*?)'",
        r"No such file or directory: '(.*?)'"))
    for recipe in [Path(word[1:]) for word in words if flag and word.startswith("@")]:
        script = re.match(r"# (\w+\.py)", recipe.read_text())
        if script and script[1] != parser.prog and flag[1] in recipe.read_text():
            return f"; {recipe} is for {script[1]}"
    if flag:
        shown = [name for name, action in parser._option_string_actions.items()
                 if action.help != argparse.SUPPRESS]
        near = difflib.get_close_matches(flag[1], shown)
    elif choice:
        choices = parser._option_string_actions[choice[1]].choices
        near = difflib.get_close_matches(choice[2], map(str, choices))
    elif file:
        files = [*Path(file[1]).parent.glob("*.txt"), *Path("recipes").glob("*.txt")]
        near = [f"@{path}" for path in difflib.get_close_matches(file[1], map(str, files))]
    else:
        quotes = "; a value with spaces or braces stands in quotes"
        return quotes if "unrecognized arguments" in message else ""
    return f"; did you mean {near[0]}?" if near else f"; {parser.prog} --help lists what there is"


def _hyphens(words):
    """The words, with `-` for `_` in the names of flags, not in their values."""
    spelled = []
    for word in words:
        name, equals, value = word.partition("=")
        spelled.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return spelled


# ---------------------------------------------------------------- memory
# Options of glibc's mallopt, numbered as in malloc.h: no block comes from mmap, and freed ones stay with the
# process. Else steps return the memory of their tensors and ask for it again, page by page. How much time
# that takes depends on the kernel: 6 % of the default network's step in one set of pairs, none in another.
MALLOPT = {"M_TRIM_THRESHOLD": (-1, 2 ** 31 - 1), "M_TOP_PAD": (-2, 2 ** 28), "M_MMAP_MAX": (-4, 0),
           "M_ARENA_MAX": (-8, 1)}


def keep_memory():
    """Tells the allocator of Linux to keep what it has. One that has no mallopt is left as it is."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            for option, value in MALLOPT.values():
                ctypes.CDLL(None).mallopt(option, value)


# ---------------------------------------------------------------- threads
def run_in_turns():
    """Asks Linux not to interrupt a thread for one that wakes up (SCHED_BATCH); later threads inherit it.

    In each collective of gloo several threads wake each other. On two cores one in ten of these calls took a
    tick of the scheduler, 4 ms, where 0.3 are enough (docs/scaling.md).
    """
    with suppress(AttributeError, OSError):      # other systems have no such policy, a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


# ---------------------------------------------------------------- exit codes
def launch(main, parser, argv=None):
    """Parses the flags, runs main(args) and turns errors into one line and an exit code.

    2: the user can mend it (UserError, a full disk, too little memory). 1: another process of the run was
    lost, or a bug, which keeps its traceback. 130: Ctrl-C before the run can save.
    """
    keep_memory()
    # the flag that PyTorch 2.14 wants in its place is unknown to 2.5
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")        # a pipe on Windows lacks most letters
    args = parse_args(parser, argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and getattr(args, "device", None) == "cpu":
        run_in_turns()
    rank, restarts, shared = (os.environ.get(name) for name in (
        "RANK", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"))
    if rank == "0" and restarts not in (None, "0") and shared == "True":
        to_stderr("warning: ranks that torchrun restarts may not find each other; set "
                  "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment to prevent that")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))      # not LOCAL_WORLD_SIZE: each may see its GPU alone
    if getattr(args, "device", None) == "cuda" and local_rank >= torch.cuda.device_count():
        if local_rank == torch.cuda.device_count():
            to_stderr(f"{parser.prog}: error: --nproc-per-node: this machine has only {local_rank} GPU(s); "
                      "start as many processes")
        sys.exit(2)
    if sys.platform == "linux" and not multiprocessing.get_start_method(allow_none=True):
        # Python 3.14 would start workers from a server, which a signal to the process group kills
        multiprocessing.set_start_method("fork")
    atexit.register(to_stdout, "", end="")       # else what is left for a closed pipe ends in a traceback
    sources = [vars(args)[name] for name in ("checkpoint", "teacher", "predictions", "data") if name in args]
    sources = " and ".join(filter(None, sources))
    try:
        if sources and os.environ.get("RANK", "0") == "0":        # reading may take minutes
            to_stdout(f"{parser.prog}: reading {sources}")
        sys.exit(main(args))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:   # one from a data-loader worker ends in its message, below its traceback
        _exit(parser.prog, str(error).strip().splitlines()[-1].removeprefix("checkpoint.UserError: "))
    except (OSError, MemoryError, RuntimeError) as error:
        message, code = _explain(error, args)
        if message is None:
            raise
        _exit(parser.prog, message, code)


def _exit(prog, message, code=2):
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if dist.is_initialized():    # from here on a mistake may be one rank's alone, so each rank speaks
        message = f"rank {rank}: {message}" if dist.get_world_size() > 1 else message
    elif local_rank != "0":      # before, every rank makes the same mistake: one line per machine is enough
        sys.exit(code)
    with suppress(OSError):      # stderr may be on the disk that is full; the exit code must still be right
        to_stderr(f"{prog}: error: {message}")
    sys.exit(code)


def _explain(error, args):
    """(line, exit code) for an error of the machine, (None, 1) for one of the program."""
    said, out = str(error).strip() or type(error).__name__, getattr(args, "output_dir", "")
    remedy = "the same command resumes from the last checkpoint" if "resume" in args else "start it again"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE):
            place = error.filename or f"standard output, or the log in {out}"
            return f"{place}: cannot be written ({error.strerror}); make room, and start it again", 2
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in said:
        how_much = ". ".join(said.splitlines()[0].split(". ")[:2])
        return f"not enough memory ({how_much}); try a smaller --batch-size", 2
    elif worker := re.search(r"DataLoader worker.*(killed by signal|exited unexpectedly)[^.]*", said):
        return f"{worker[0]}; short of memory? Try fewer --workers; {remedy}", 1
    elif dist.is_initialized() and (isinstance(error, dist.DistError) or re.search("gloo|nccl", said, re.I)):
        return (f"another process of this run died or did not answer within --timeout {args.timeout:g} s "
                f"({said.splitlines()[0][:160]}); {remedy}"), 1
    return None, 1
