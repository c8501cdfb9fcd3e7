"""Full disks, folders that are gone or taken, numbers that are not finite: one line and an exit code."""

import argparse
import contextlib
import errno
import fcntl
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import OFTEN, ROOT, STAGES, begin, content, finish, log_lines, same, wait_until

import checkpoint
import cli
import data
import pretrain
import run

EVALUATIONS = {"knn": "--checkpoint {network} --k 5", "cluster_eval": "--checkpoint {network}"}


@pytest.fixture
def tried(here, network):
    """tried(stage, flags, code): stderr of a stage in this process, one line if the code is not 0."""
    def start(stage, flags, code=2):
        _, err = here(f"{stage}.py {flags.format(network=network)}", code)
        assert err.count("\n") == (code != 0), err
        return err
    return start


def ended(process, code):
    """stderr of a process of begin(), one line."""
    _, said = finish(process, code)
    assert said.count("\n") == 1, said
    return said


# ---------------------------------------------------------------- disks
@contextlib.contextmanager
def mounted(folder, *options):
    """A file system of its own; where it cannot be made, the test is skipped by name."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"mount {' '.join(map(str, options))} is not possible here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def full_after_a_save(stage, network, out, fill):
    """A run whose disk becomes full in mid-run: it ends in one line, and resumes when there is room again."""
    flags = f"{STAGES[stage].format(network=network)} {OFTEN}"
    process = begin(stage, flags, out)
    assert wait_until((out / "checkpoint.prev.pth").exists, process)
    free = fill(process)
    said = ended(process, 2)
    assert f"{stage}.py: error: " in said and str(out) in said and "cannot be written (" in said, said
    assert " pos " not in said                                  # torch's words, which nobody understands
    assert not list(out.glob("*.tmp"))                          # half a file, which keeps the disk full
    step = checkpoint.load_checkpoint(out / "checkpoint.pth")["step"]
    free()
    finish(begin(stage, flags, out))
    assert {"resumed_from": step} in log_lines(out)
    finish(begin(stage, flags, f"{out}2"))
    assert same(content(out / "checkpoint.pth"), content(Path(f"{out}2/checkpoint.pth")))


@pytest.mark.parametrize("stage", ["lincls", *(pytest.param(s, marks=pytest.mark.slow)
                                               for s in STAGES if s != "lincls")])
def test_files_that_may_not_grow(stage, network, tmp_path):
    """The limit of a quota, set while the run goes on."""
    def limit(process):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return lambda: None
    full_after_a_save(stage, network, tmp_path / "run", limit)


@pytest.mark.parametrize("stage", ["semisup", *(pytest.param(s, marks=pytest.mark.slow)
                                                for s in STAGES if s != "semisup")])
def test_a_full_disk(stage, network, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=100m", "tmpfs") as disk:
        def fill(process):
            filler = open(disk / "filler", "wb")
            with contextlib.suppress(OSError):
                for size in (2**20, 2**12):
                    while True:
                        filler.write(bytes(size))
                        filler.flush()
            filler.close()
            return (disk / "filler").unlink
        (disk / "run").mkdir()
        (tmp_path / "run").symlink_to(disk / "run")             # its output goes elsewhere
        full_after_a_save(stage, network, tmp_path / "run", fill)


@pytest.mark.slow
def test_a_disk_too_small_for_a_save(network, tmp_path):
    """Full in the middle of a file, for which torch has words of its own."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=3m", "tmpfs") as disk:
        (disk / "run").mkdir()
        (tmp_path / "run").symlink_to(disk / "run")
        process = begin("pretrain", f"{STAGES['pretrain']} {OFTEN}", tmp_path / "run")
        said = ended(process, 2)
        assert "cannot be written (No space left on device)" in said
        assert not list((disk / "run").glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("errors", [None, subprocess.PIPE])
def test_output_to_a_full_disk(errors, tmp_path):
    """The exit code is right all the same; /dev/full is one."""
    command = f"{sys.executable} lincls.py --checkpoint weights/fashion-mnist.pth --data fake --epochs 1"
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command.split(), "--output-dir", tmp_path], cwd=ROOT, stdout=full,
                              stderr=errors or full, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    if errors:
        assert "standard output, or the log in" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("stage, flags", [*STAGES.items(), *EVALUATIONS.items()])
def test_a_folder_that_cannot_be_made(stage, flags, tried, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path}/file" in tried(stage, f"{flags} --output-dir {tmp_path}/file/run")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("stage, flags", [*STAGES.items(), *EVALUATIONS.items()])
def test_a_read_only_disk(stage, flags, tried, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "run").mkdir()
    with mounted(tmp_path / "disk", "--bind", "-o", "ro", tmp_path / "disk") as disk:
        if os.access(disk, os.W_OK):
            subprocess.run(["mount", "-o", "remount,ro,bind", disk], check=True)
        for name in ("run", "new"):
            err = tried(stage, f"{flags} --output-dir {disk}/{name}")
            assert "cannot be written (Read-only file system)" in err
        assert not list((disk / "run").iterdir()) and not (disk / "new").exists()


@pytest.mark.parametrize("stage", ["lincls", *(pytest.param(s, marks=pytest.mark.slow)
                                               for s in STAGES if s != "lincls")])
def test_the_folder_is_removed_in_mid_run(stage, network, tmp_path):
    out = tmp_path / "run"
    longer = "--steps 400" if stage in ("finetune", "segment", "detect") else "--epochs 40"
    process = begin(stage, f"{STAGES[stage].format(network=network)} {OFTEN} {longer}", out)
    assert wait_until((out / "checkpoint.prev.pth").exists, process)
    while out.exists():                                         # it may be writing just now
        shutil.rmtree(out, ignore_errors=True)
    said = ended(process, 2)
    assert f"{out}/" in said and "cannot be written (No such file or directory)" in said


# ---------------------------------------------------------------- folders
@pytest.mark.parametrize("stage, flags", STAGES.items())
def test_the_folder_of_a_living_run(stage, flags, tried, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for more in ("", "--overwrite"):
            err = tried(stage, f"{flags} {more} --output-dir {tmp_path}")
            assert "another run is using this folder" in err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    args = argparse.Namespace(output_dir=str(tmp_path), resume="auto", overwrite=False)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert run.open_output(args, "pretrain", {})[1] is None
    assert "cannot be locked (No locks available): make sure that no other run" in err.getvalue()


@pytest.mark.parametrize("stage, flags", STAGES.items())
def test_files_that_no_run_wrote_are_not_touched(stage, flags, tried, tmp_path):
    for name in ("labels.txt", "metrics.json", "log.jsonl"):
        (tmp_path / name).write_text("mine")
        assert f"holds {name}, which no run wrote" in tried(stage, f"{flags} --output-dir {tmp_path}")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_what_else_may_lie_in_a_used_folder(tried, tmp_path):
    """A run without a checkpoint binds nobody; a torn config.json or log.jsonl costs nothing."""
    flags = f"{STAGES['semisup']} --epochs 1 --output-dir {tmp_path}"
    (tmp_path / "config.json").write_text('{"lr": 7')
    tried("semisup", flags, 0)
    straight = content(tmp_path / "metrics.json")
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.04
    for torn in (b"\0" * 100, b'{"step": 3, "lo'):
        for name in ("metrics.json", "config.json"):
            (tmp_path / name).unlink()
        (tmp_path / "log.jsonl").write_bytes((tmp_path / "log.jsonl").read_bytes() + torn)
        tried("semisup", flags, 0)
        assert content(tmp_path / "metrics.json") == straight
    assert "lr was 0.04, is 0.1" in tried("semisup", f"{flags} --lr 0.1")
    assert "holds a run already" in tried("semisup", f"{flags} --resume never")


def test_the_next_save_keeps_the_checkpoint_that_was_gone_back_to(tmp_path, capfd):
    """The damaged one moves aside: in its place it would take that of the only good one."""
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path / "checkpoint.pth", dict(model={}, config={}, step=step))
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    for _ in range(2):                                          # and again, had it been killed here
        assert checkpoint.load_last_checkpoint(tmp_path)["step"] == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"warning: {tmp_path}/checkpoint.pth: not a readable")
    assert (tmp_path / "checkpoint.damaged.pth").read_bytes() == b"damaged"
    checkpoint.save_checkpoint(tmp_path / "checkpoint.pth", dict(model={}, config={}, step=3))
    assert [checkpoint.load_checkpoint(tmp_path / name)["step"]
            for name in ("checkpoint.pth", "checkpoint.prev.pth")] == [3, 1]
    for name in ("checkpoint.pth", "checkpoint.prev.pth"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(checkpoint.UserError, match="prev.pth: not a readable .*start anew with --overwrite"):
        checkpoint.load_last_checkpoint(tmp_path)


def test_logs_are_read_whole(tmp_path):
    """The later of two lines of a step; what a crash left between lines is skipped."""
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"command": "x"}\n{"step": 2, "loss": 1}\n\0\0\0\n[3]\n{"step": 4, "loss": 5}\n'
                     b'{"loss": 6}\n{"resumed_from": 0}\n{"step": 2, "loss": 3}\nhalf\xff\n{"step": 6, "lo')
    assert run.read_log(path) == {2: {"step": 2, "loss": 3}, 4: {"step": 4, "loss": 5}}
    whole = path.read_bytes()
    run.open_log(path).close()
    assert path.read_bytes() == whole[:whole.rfind(b"\n") + 1]


def test_too_little_memory(tried, tmp_path):
    """And a run that never began does not bind the folder."""
    flags = f"--data fake --batch-size 64 --epochs 1 --knn-every 0 --output-dir {tmp_path}"
    err = tried("pretrain", f"{flags} --hidden-dim 100000000")
    assert "not enough memory (" in err and "try a smaller --batch-size" in err
    tried("pretrain", f"{flags} --hidden-dim 16", 0)


def test_control_c_before_a_run_can_save(tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(pretrain, "build_dataset", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.launch(pretrain.main, pretrain.get_parser(), ["--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 130 and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- numbers
EXPLODES = {"pretrain": "--lr 1e30 --optimizer sgd --warmup-epochs 0 --no-nbs",
            "barlow": "--lr 1e30 --optimizer sgd --warmup-epochs 0",
            "selflabel": "--lr 1e30 --optimizer sgd --warmup-epochs 0",
            "distill": "--lr 1e30 --warmup-epochs 0", "lincls": "--lrs 1 --weight-decays 1e30",
            "semisup": "--lr 1e30", "finetune": "--lr 1e30", "segment": "--lr 1e30",
            "detect": "--lr 1e30"}


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_finite_is_not_saved(stage, tried, tmp_path):
    flags = f"{STAGES[stage]} {EXPLODES[stage]} --save-every 1 --output-dir {tmp_path}/run"
    err = tried(stage, flags, 3)
    assert "not finite (lr " in err and "amp off, last finite " in err and str(tmp_path) in err
    last = log_lines(tmp_path / "run")[-1]
    what = last["status"].removeprefix("non-finite ")
    assert f"{stage}.py: error: at step {last['step']} the {what} " in err
    saved = [checkpoint.load_checkpoint(path) for path in (tmp_path / "run").glob("checkpoint*.pth")]
    assert all(state["step"] < last["step"] for state in saved)
    for state in saved:
        weights = list(state["model"].values())
        assert any(w.isfinite().all() for w in weights) if stage == "lincls" else (
            all(w.isfinite().all() for w in weights))


class Poison(torch.autograd.Function):
    """x, whose gradient is not finite."""
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


@pytest.mark.parametrize("stage, loss", [
    ("pretrain", "twist_loss"), ("barlow", "barlow_twins_terms"), ("selflabel", "self_label_loss"),
    ("distill", "seed_loss"), ("semisup", None), ("finetune", None), ("segment", "pixel_loss"),
    ("detect", None)])
def test_a_gradient_that_is_not_finite(stage, loss, tried, tmp_path, monkeypatch):
    """The loss of step 4 is sound, its gradient is not: nothing of that step is saved."""
    module, calls = importlib.import_module(stage), []
    holder, loss = (module, loss) if loss else (torch.nn.functional, "cross_entropy")
    sound = getattr(holder, loss)

    def poisoned(logits, *args, **kwargs):
        calls.append(1)
        return sound(Poison.apply(logits) if len(calls) == 4 else logits, *args, **kwargs)
    monkeypatch.setattr(holder, loss, poisoned)
    flags = STAGES[stage].replace("--ema 0.9", "").replace("--num-local 1", "")
    flags += " --aux-weight 0" * (stage == "segment")           # which has two losses in a step
    err = tried(stage, f"{flags} --save-every 1 --output-dir {tmp_path}", 3)
    assert "at step 4 the gradient is not finite" in err
    assert log_lines(tmp_path)[-1] == dict(step=4, status="non-finite gradient")
    state = checkpoint.load_checkpoint(tmp_path / "checkpoint.pth")
    assert state["step"] == 3 and all(w.isfinite().all() for w in state["model"].values())


def test_weights_that_are_not_finite(tried, tmp_path):
    """Loss and gradient of step 1 are finite, the step is too long for single precision."""
    flags = "--optimizer sgd --warmup-epochs 0 --save-every 1 --lr 3e38 --batch-size 256 --weight-decay 10"
    flags = f"{STAGES['pretrain'].replace('--ema 0.9', '')} {flags}"
    err = tried("pretrain", f"{flags} --output-dir {tmp_path}", 3)
    assert "at step 1 the weights are not finite" in err and not list(tmp_path.glob("check*"))


@pytest.mark.parametrize("before, after", [("off", "fp16"), ("fp16", "off")])
def test_precision_may_change_when_a_run_resumes(before, after, tried, here, tmp_path, monkeypatch):
    flags = ("pretrain.py --data fake --image-size 8 --batch-size 128 --epochs 1 --hidden-dim 8 "
             f"--knn-every 0 --restarts 1 --output-dir {tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "watch", stop_after(2))
        here(f"{flags} --amp {before}", 143)
    said, _ = here(f"{flags} --amp {after}")
    assert f"amp {after} (was {before}); resumed from step 2" in said
    assert (content(tmp_path / "checkpoint.pth")["scaler"] == {}) == (after != "fp16")


def test_an_evaluation_leaves_the_noise_of_training_alone(tmp_path):
    """So --knn-every may differ when a run resumes, also one of pictures with drop path."""
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    dataset, before = data.build_dataset(str(tmp_path), "test", 0, "datasets"), torch.get_rng_state()
    config = dict(data=str(tmp_path), image_size=16, mean=None, std=None)
    assert [len(x) for x in data.eval_batches(dataset, config, "cpu")] == [4]
    assert torch.get_rng_state().equal(before)


def stop_after(step):
    """Run.watch of a run that gets SIGTERM in this step."""
    watch = run.Run.watch

    def watched(self, *args, **kwargs):
        if self.step + 1 == step:
            self.caught.append(signal.SIGTERM)
        watch(self, *args, **kwargs)
    return watched


@pytest.mark.parametrize("stage, lost", [("barlow", 1), *(pytest.param(stage, 1000, marks=pytest.mark.slow)
                                                          for stage in STAGES)])
def test_a_log_that_lost_its_last_lines(stage, lost, straight, here, tmp_path):
    """A crash of the machine after the last save: the run is finished by the same command all the same."""
    flags, out, *_ = straight(stage)
    shutil.copytree(out, tmp_path / "run")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    (tmp_path / "run/metrics.json").unlink()
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    trained = [line for line in lines if '"loss"' in line][:-lost]
    (tmp_path / "run/log.jsonl").write_text("".join(trained))
    here(f"{stage}.py {flags} --output-dir {tmp_path}/run", pictures=lost > 1)
    assert log_lines(tmp_path / "run")[-1]["status"] == "done"
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    own = stage in ("lincls", "semisup", "finetune", "segment", "detect")           # these measure once more
    expected = json.loads(trained[-1]) if trained else dict(step=metrics.get("step"))
    assert found == (metrics if own else expected)


@pytest.mark.slow
def test_fp16_resumes_with_its_scale(tmp_path):
    """Killed, in half precision: weights and the gradient's scale, with its age, are those of the other."""
    flags = ("--data fake --batch-size 16 --epochs 1 --hidden-dim 16 --image-size 8 --knn-every 0 --amp fp16 "
             "--print-every 4 --save-every 4")
    states = {}
    for name in ("straight", "killed"):
        process = begin("pretrain", flags, tmp_path / name)
        if name == "killed":
            assert wait_until((tmp_path / name / "checkpoint.prev.pth").exists, process)
            process.kill()
            process.wait()
            process = begin("pretrain", flags, tmp_path / name)
        finish(process)
        states[name] = content(tmp_path / name / "checkpoint.pth")
    assert any("resumed_from" in line for line in log_lines(tmp_path / "killed"))
    assert states["straight"]["scaler"]["scale"] > 1 and states["straight"]["scaler"]["_growth_tracker"] > 20
    assert same(states["straight"], states["killed"])


# ---------------------------------------------------------------- flags that would have no effect
@pytest.mark.parametrize("stages, flags, message", [
    ("pretrain barlow", "--drop-path 0.1", "--drop-path: resnet8 is not a ViT; leave"),
    ("pretrain barlow", "--zero-init-residual --arch vit_t", "--zero-init-residual: vit_t is not a ResNet"),
    ("pretrain distill", "--small-images --arch vit_t", "--small-images: vit_t is not a ResNet; leave it"),
    ("pretrain barlow selflabel distill", "--optimizer lars --beta2 0.5", "lars has no second beta; leave"),
    ("pretrain barlow distill", "--mean 127", "--mean: must be one number for all channels or three"),
    ("pretrain", "--std 57 57 57", "or three, from 0 to 1"),
    ("pretrain", "--data fashion_mnist", "nor a folder or list; did you mean fashion-mnist?")])
def test_flags_without_effect_are_refused(stages, flags, message, tried, tmp_path):
    for stage in stages.split():
        usual = STAGES[stage].replace("--image-size 16", "--image-size 32")
        assert message in tried(stage, f"{usual} {flags} --output-dir {tmp_path}/run")
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- a reader who leaves
def no_reader():
    """Standard output becomes a pipe that nobody reads, as that of `| head -1` in the end."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", closefd=False)                    # the old one takes itself for a file


def no_reader_of_either():
    no_reader()
    os.dup2(1, 2)
    sys.stderr = open(2, "w", closefd=False)


@pytest.mark.parametrize("stage", ["pretrain", "selflabel"])
@pytest.mark.parametrize("closed", [no_reader, pytest.param(no_reader_of_either, marks=pytest.mark.slow)])
def test_a_closed_pipe_stops_the_printing_not_the_run(stage, closed, straight, tmp_path):
    flags, undisturbed, *_ = straight(stage)
    said, error = finish(begin(stage, flags, tmp_path / "run", prepare=closed))
    assert said == error == ""
    assert content(tmp_path / "run/metrics.json") == content(undisturbed / "metrics.json")
    assert len(log_lines(tmp_path / "run")) == len(log_lines(undisturbed))


@pytest.mark.parametrize("command", ["knn.py --k 5", pytest.param("cluster_eval.py", marks=pytest.mark.slow),
                                     pytest.param("embed.py", marks=pytest.mark.slow)])
def test_an_evaluation_whose_reader_leaves_writes_its_files(command, network, tmp_path):
    """After a line, as `| head -1` does; what is printed later meets a closed pipe."""
    script, *flags = command.split()
    command = [sys.executable, script, "--checkpoint", network, "--output-dir", tmp_path, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout.readline().startswith(f"{script}: reading")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert (tmp_path / "metrics.json").exists()
