"""Runs the scripts of this project in processes of their own, and reads what they wrote.

The processes are forks of a server that has imported torch and the scripts: importing takes longer than most
of these runs.
"""

import atexit
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import pretrain
from cli import launch, parse_args
from model import build_network

ROOT = Path(__file__).parents[1]
STAGES = {                       # flags of a run of 24 steps or 33; {network} is a checkpoint of pretrain
    "pretrain": "--data fake --image-size 16 --batch-size 40 --epochs 2 --hidden-dim 32 --ema 0.9 "
                "--knn-every 0",
    "barlow": "--data fake --image-size 16 --batch-size 40 --epochs 2 --hidden-dim 32 --knn-every 0",
    "selflabel": "--checkpoint {network} --batch-size 40 --epochs 2 --ema 0.9",
    "distill": "--teacher {network} --batch-size 40 --epochs 2 --queue-size 120 --num-local 1",
    "lincls": "--checkpoint {network} --batch-size 40 --epochs 3 --lrs 0.3 3",
    "semisup": "--checkpoint {network} --batch-size 32 --epochs 3 --label-fraction 0.5",
    "finetune": "--checkpoint {network} --data fake --batch-size 32 --steps 24",
    "segment": "--checkpoint {network} --num-scenes 24 8 --short-side 32 --crop-size 32 --head-width 8 "
               "--batch-size 4 --steps 24 --bn-batches 2",
    "detect": "--checkpoint {network} --num-scenes 24 8 --scene-size 32 --short-sides 32 --test-side 32 "
              "--anchors 16 --rois 8 --pre-nms 30 30 --post-nms 15 15 --warmup-steps 2 "
              "--batch-size 4 --steps 24 --bn-batches 2",
}
OFTEN = "--print-every 2 --save-every 3"
PATIENCE = 1800                  # seconds for what takes a few, as the machine may be doing other work
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["processes", *STAGES, "cluster_eval", "knn", "embed", "svm",
                              "transfer", "matplotlib.pyplot"])
STARTED = []


@functools.cache
def outputs():
    """A folder, which goes when this process ends; its forks need none."""
    return tempfile.TemporaryDirectory()


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def become_ranks(number):
    """Returns in a fork for each rank, with the environment that torchrun gives, and not in this process."""
    os.environ.update(WORLD_SIZE=str(number), MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    pids = []
    for rank in range(number):
        if not (pid := os.fork()):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            return
        pids.append(pid)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):      # are for the ranks
        signal.signal(signum, signal.SIG_IGN)
    os._exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))


def in_fork(words, output, ranks, prepare):
    """What a process of start() does; its stdout and stderr go to OUTPUT.out and OUTPUT.err."""
    os.setsid()
    os.chdir(ROOT)
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)        # for its workers, as in a plain process
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs ignore it
    sys.argv = words
    if ranks > 1:
        become_ranks(ranks)
    if prepare:
        prepare()
    script = importlib.import_module(words[0].removesuffix(".py"))
    try:
        launch(script.main, script.get_parser())
    finally:
        atexit._run_exitfuncs()                                 # which a fork leaves out


class Started:
    """A running command, with what the tests need of subprocess.Popen."""

    def __init__(self, words, ranks, prepare):
        self.output, self.ranks = f"{outputs().name}/{len(STARTED)}", ranks
        self.process = FORKS.Process(target=in_fork, args=(words, self.output, ranks, prepare))
        with pytest.MonkeyPatch.context() as patch:             # read once, when the server starts
            patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
            patch.setenv("OMP_NUM_THREADS", "1")
            self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=PATIENCE):
        self.process.join(timeout)
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"not done in {timeout} s")
        return self.poll()

    def send_signal(self, signum):
        """To the process itself, not to its workers; of several ranks to all."""
        if self.poll() is None:
            (os.killpg if self.ranks > 1 else os.kill)(self.pid, signum)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def said(self):
        return tuple(Path(self.output + suffix).read_text() for suffix in (".out", ".err"))


def start(command, ranks=1, prepare=None):
    """`python COMMAND`, say "pretrain.py --epochs 1", or ranks of torchrun; prepare() is called first."""
    STARTED.append(Started(shlex.split(str(command)), ranks, prepare))
    return STARTED[-1]


@atexit.register
def nothing_is_left():
    """Of tests that failed."""
    for process in STARTED:
        process.kill()


def finish(process, code=0):
    """(stdout, stderr) of a process, which must end with this exit code."""
    process.wait()
    out, err = process.said()
    assert process.poll() == code, f"exit code {process.poll()}\n{out}\n{err}"
    return out, err


def run(command, code=0, **kwargs):
    return finish(start(command, **kwargs), code)


def begin(stage, flags, out, **kwargs):
    """start() of a stage with an output folder."""
    return start(f"{stage}.py {flags} --output-dir {out}", **kwargs)


def wait_until(true, process, seconds=PATIENCE, pause=0.005):
    """Whether something became true before the process ended."""
    deadline = time.time() + seconds
    while not true():
        if process.poll() is not None:
            return False
        assert time.time() < deadline, "nothing happened"
        time.sleep(pause)
    return True


def wait_for(path, process):
    assert wait_until(path.exists, process), process.said()


def bounds_of(action):
    """low, kind and below of a parser's flag whose type is at_least(low, kind, below); {} of others."""
    found = inspect.getclosurevars(action.type).nonlocals if inspect.isfunction(action.type) else {}
    return {name: found[name] for name in ("low", "kind", "below") if name in found}


# ---------------------------------------------------------------- what a run wrote
def saved_network(path, flags="--data fake --image-size 16"):
    """Writes a checkpoint of an untrained network, as pretrain.py with these flags would begin; its path."""
    torch.manual_seed(0)
    config = vars(parse_args(pretrain.get_parser(), shlex.split(f"--hidden-dim 32 {flags}")))
    checkpoint.save_checkpoint(path, dict(model=build_network(config).state_dict(), config=config, step=1))
    return path


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def log_lines(folder):
    """The whole lines of a log, also of a run that is writing it; none yet if there is no log."""
    path = folder / "log.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def losses(folder):
    """The entries of training steps in a log."""
    return [line for line in log_lines(folder) if "loss" in line]


def resumed_from(folder):
    """The steps that a run was resumed from."""
    return [line["resumed_from"] for line in log_lines(folder) if "resumed_from" in line]


def same(a, b):
    """Whether two checkpoints (nested dicts and lists of tensors) are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def weights(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


def content(path):
    """A file of a run without what may differ between equal runs: folder, workers, speed, memory."""
    if path.suffix == ".pth":
        state = torch.load(path, weights_only=True)
        for name in {"output_dir", "workers"} & state.get("config", {}).keys():
            del state["config"][name]
        return state
    if path.name == "metrics.json":
        of_the_machine = ("images_per_s", "waiting", "memory_mib")
        return {key: value for key, value in metrics_of(path.parent).items() if key not in of_the_machine}
    return path.read_bytes() if path.suffix in (".csv", ".txt") else None


def assert_same_run(a, b):
    """All files of two runs are equal: weights, optimizer, random states, queues, metrics, predictions."""
    names = {path.name for path in a.iterdir()}
    assert names == {path.name for path in b.iterdir()}
    for name in names:
        assert same(content(a / name), content(b / name)), name
