"""Scripts of this project in processes of their own, alone or as the ranks of one run.

They are forks of a server that has imported what they need: that takes longer than most of these runs.
"""

import atexit
import functools
import importlib
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

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "selflabel", "distill", "lincls", "semisup")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["processes", *STAGES, "cluster_eval", "knn", "svm", "matplotlib.pyplot"])
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
    multiprocessing.set_start_method("fork", force=True)        # for its readers, as it is in a plain process
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs ignore it
    sys.argv = words
    if ranks > 1:
        become_ranks(ranks)
    if prepare:
        prepare()
    script = importlib.import_module(words[0].removesuffix(".py"))
    checkpoint.run(script.main, script.get_parser())


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

    def wait(self, timeout=300):
        self.process.join(timeout)
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"not done in {timeout} s")
        return self.poll()

    def send_signal(self, signum):
        """To the process itself, not to its readers; of several ranks to all."""
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


def wait_until(true, process, seconds=120, pause=0.005):
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
