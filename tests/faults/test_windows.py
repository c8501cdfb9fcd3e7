"""Every script starts, trains, locks and resumes where modules and signals of Unix are missing."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from processes import ROOT, log_lines

import cli

# What Windows does not have goes before anything of ours is imported; msvcrt is what it has instead.
HIDE = """
import errno, fcntl, os, signal, sys, types
import matplotlib.figure, torch, torchvision, torch.utils.data              # these have their own ways there

def locking(descriptor, mode, count):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

def no_folder(path, *args):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return opened(path, *args)

opened, os.open = os.open, no_folder
sys.modules.update(fcntl=None, resource=None, msvcrt=types.SimpleNamespace(locking=locking, LK_NBLCK=2))
del signal.SIGUSR1, os.setpgrp, os.fork, os.sched_getaffinity, os.getpgid, os.killpg
"""
SCRIPTS = """
import gc, runpy

def start(script, *flags):
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    gc.collect()                                                # releases the lock
    return code

for script in {scripts}:
    assert start(script, "--help") == 0, script

import run
watch, signal.signal = run.Run.watch, lambda *args: None        # a handler would keep the run, and its lock

def killed(self, loss, norm):
    watch(self, loss, norm)
    if self.step == 1:
        raise KeyboardInterrupt

flags = ("--data fake --image-size 16 --batch-size 128 --hidden-dim 16 --epochs 1 --knn-every 0 --restarts 1 "
         "--workers 0 --device cpu --save-every 1 --output-dir {out}").split()
run.Run.watch = killed
codes = [start("pretrain.py", *flags)]
run.Run.watch = watch
with open("{out}/.lock", "a") as taken:
    locking(taken, 2, 1)
    codes.append(start("pretrain.py", *flags))
codes.append(start("pretrain.py", *flags))
print(codes)
"""


def test_scripts_without_what_windows_lacks(tmp_path):
    """Also with an output that cannot write every letter."""
    scripts = [path.name for path in sorted(ROOT.glob("*.py")) if "def get_parser" in path.read_text()]
    code = HIDE + SCRIPTS.replace("{scripts}", str(scripts)).replace("{out}", str(tmp_path / "run"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[130, 2, 0]\n"), done.stdout + done.stderr
    assert done.stdout.count("usage: ") == len(scripts) and "resumed from step 1" in done.stdout
    assert "another run is using this folder" in done.stderr and done.stderr.count("\n") == 1
    assert log_lines(tmp_path / "run")[-1]["status"] == "done"
    assert json.loads((tmp_path / "run/metrics.json").read_text())["memory_mib"] == 0


@pytest.mark.parametrize("script", ("pretrain.py", "cluster_eval.py"))
def test_a_missing_package_is_one_line(script):
    """As after `pip install torch torchvision` alone."""
    code = f"import runpy, sys; sys.modules['scipy'] = None; runpy.run_path('{script}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2
    assert done.stderr == "error: scipy is not installed; pip install -r requirements.txt\n"


def test_an_allocator_without_mallopt_is_left_as_it_is(monkeypatch):
    taken = []
    libraries = [SimpleNamespace(mallopt=lambda *option: taken.append(option) or 1), SimpleNamespace(), None]
    for library, platform in zip(libraries, ("linux", "linux", "win32"), strict=True):
        monkeypatch.setattr(cli.ctypes, "CDLL", lambda name, library=library: library)
        monkeypatch.setattr(sys, "platform", platform)
        cli.keep_memory()
    assert taken == list(cli.MALLOPT.values())


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
                    reason="an allocator of its own")
def test_glibc_knows_the_options():
    program = "import cli, ctypes; print([ctypes.CDLL(None).mallopt(*o) for o in cli.MALLOPT.values()])"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == str([1] * len(cli.MALLOPT)), said.stderr


POLICY = """import argparse, os, cli
parser = argparse.ArgumentParser()
parser.add_argument("--device")
cli.launch(lambda args: print(os.sched_getscheduler(0) == os.SCHED_BATCH), parser)"""


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="a scheduler without this policy")
@pytest.mark.parametrize("world_size, device, in_turns", [
    (2, "cpu", True), (2, "mps", False), (1, "cpu", False)])
def test_processes_of_gloo_alone_run_in_turns(world_size, device, in_turns):
    said = subprocess.run([sys.executable, "-c", POLICY, "--device", device], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"WORLD_SIZE": str(world_size)})
    assert said.stdout.strip() == str(in_turns), said.stderr


def test_a_system_without_the_policy_is_left_as_it_is(monkeypatch):
    monkeypatch.delattr(os, "sched_setscheduler", raising=False)
    cli.run_in_turns()
