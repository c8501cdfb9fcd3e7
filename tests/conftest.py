"""Fixtures of all tests."""

import gc
import importlib
import shlex
import signal
import time
from collections import namedtuple

import pytest
import torch
from processes import OFTEN, ROOT, STAGES, begin, finish, saved_network, wait_until

import barlow
import cluster_eval
import embed
import pretrain
from cli import launch

Straight = namedtuple("Straight", "flags out said saved ended")


@pytest.fixture(scope="session", autouse=True)
def imports_are_not_collected():
    """What the imports left is no garbage; looking through it takes 0.3 s after each run of `here`."""
    gc.freeze()


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """A checkpoint of pretrain.py with an untrained resnet8 for `fake` at 16 pixels."""
    return saved_network(tmp_path_factory.mktemp("network") / "resnet8.pth")


@pytest.fixture(scope="session")
def straight(network, tmp_path_factory):
    """stage -> its undisturbed run: flags, folder, stdout, seconds to the first save and to the end."""
    root, runs = tmp_path_factory.mktemp("straight"), {}

    def of(stage):
        if stage not in runs:
            flags, out = f"{STAGES[stage].format(network=network)} {OFTEN}", root / stage
            start = time.time()
            process = begin(stage, flags, out)
            assert wait_until((out / "checkpoint.pth").exists, process), process.said()
            saved = time.time() - start
            said, _ = finish(process)
            runs[stage] = Straight(flags, out, said, saved, time.time() - start)
        return runs[stage]
    return of


@pytest.fixture
def here(monkeypatch, capfd):
    """here("lincls.py --epochs 1", code=0): as processes.run, but in this process, which is faster.

    Without pictures=True nothing is drawn: that takes longer than most of these runs.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                     # as in the processes that it is compared with

    def run(command, code=0, pictures=False):
        capfd.readouterr()
        name, *words = shlex.split(str(command))
        script = importlib.import_module(name.removesuffix(".py"))
        with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
            if not pictures:
                patch.setattr(pretrain, "draw_curves", lambda *args: None)
                patch.setattr(barlow, "draw_curves", lambda *args: None)
                patch.setattr(cluster_eval, "draw_clusters", lambda *args: None)
                patch.setattr(embed, "draw_embedding", lambda *args: None)
            launch(script.main, script.get_parser(), words)
        ended = stop.value.code or 0
        del stop
        gc.collect()                             # releases the lock on the folder
        out, err = capfd.readouterr()
        assert ended == code, f"exit code {ended}\n{out}\n{err}"
        return out, err
    yield run
    torch.set_num_threads(threads)
