"""A disturbed run resumes to the bits of an undisturbed one: killed, stopped, ranks or launchers lost."""

import functools
import io
import json
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import (
    FORKS,
    OFTEN,
    PATIENCE,
    ROOT,
    STAGES,
    assert_same_run,
    begin,
    content,
    finish,
    free_port,
    log_lines,
    losses,
    resumed_from,
    same,
    wait_until,
)

import checkpoint
import data
import pretrain
import run

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


def end(process, code=0):
    """All that a process said; it must end with this exit code."""
    return "".join(finish(process, code))


# ---------------------------------------------------------------- killed
UNFINISHED = ("checkpoint.pth.new.tmp", "checkpoint.pth.new", "backbone.pth.tmp")       # files of a save


def killed(stage, straight, out, kind, rng):
    """Kills a run at a random moment; whether it was of this kind: any, later (than a save), inside (one)."""
    undisturbed = straight(stage)
    process = begin(stage, undisturbed.flags, out)
    if kind == "any":
        time.sleep(rng.uniform(0, undisturbed.ended))
    else:
        wait_until((out / "checkpoint.pth").exists, process)
        time.sleep(rng.uniform(0, undisturbed.ended - undisturbed.saved))
    if kind == "inside":
        wait_until((out / rng.choice(UNFINISHED[:2 if stage == "lincls" else 3])).exists, process, pause=0)
    process.kill()
    process.wait()
    left = any((out / name).exists() for name in UNFINISHED)
    torn = left or (out / "checkpoint.prev.pth").exists() and not (out / "checkpoint.pth").exists()
    finished = process.poll() != -signal.SIGKILL or any("status" in line for line in log_lines(out))
    return not finished and {"any": True, "later": (out / "checkpoint.pth").exists(), "inside": torn}[kind]


def killed_and_resumed(stage, straight, folder, kind, rng):
    """Kills and resumes a run, compares its files; the step that it resumed from, None if it began anew."""
    for attempt in range(20):
        out = folder / f"{kind}{attempt}"
        if killed(stage, straight, out, kind, rng):
            break
    else:
        raise AssertionError(f"20 runs of {stage}, and none was killed in time: {kind}")
    state = checkpoint.load_last_checkpoint(out)
    step = state and state["step"]
    said = end(begin(stage, straight(stage).flags, out))
    assert resumed_from(out) == ([] if step is None else [step])
    assert ("resumed from step" in said) == bool(step)
    assert_same_run(straight(stage).out, out)
    return step


@pytest.mark.slow
def test_killed_inside_a_save(straight, tmp_path):
    assert killed_and_resumed("lincls", straight, tmp_path, "inside", random.Random(1)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_twenty_random_moments(stage, straight, tmp_path):
    kinds = ["later"] * 12 + ["inside"] * 5 + ["any"] * 3
    rng, steps = random.Random(stage), {}
    for i, kind in enumerate(kinds):
        (tmp_path / str(i)).mkdir()
        step = killed_and_resumed(stage, straight, tmp_path / str(i), kind, rng)
        steps.setdefault(kind, []).append(step)
        assert step or kind == "any"
    print(f"\n{stage}: resumed from the steps {steps}; {len(kinds)} of {len(kinds)} as undisturbed")


@pytest.mark.parametrize("stage", ["semisup", *(pytest.param(stage, marks=pytest.mark.slow)
                                                for stage in ("pretrain", "barlow", "selflabel", "distill"))])
def test_killed_between_the_two_files_of_the_last_save(stage, straight, tmp_path):
    """backbone.pth must be that of the checkpoint, though no step is left to be made."""
    flags, undisturbed, *_ = straight(stage)                   # 24 steps, 8 saves
    out = tmp_path / "run"
    process = begin(stage, flags, out, prepare=functools.partial(die_before, 16))
    process.wait()
    assert process.poll() == -signal.SIGKILL
    end(begin(stage, flags, out))
    assert_same_run(undisturbed, out)


def die_before(call):
    """From now on this process kills itself before it writes one of these files for the call-th time."""
    calls = []

    def counted(write):
        def write_or_die(path, content):
            calls.extend(["one more"] if path.name in ("checkpoint.pth", "backbone.pth") else [])
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, content)
        return write_or_die
    for name in ("save_checkpoint", "write_atomically"):
        setattr(run, name, counted(getattr(run, name)))


@pytest.mark.slow
def test_killed_while_the_curves_are_drawn(straight, tmp_path):
    """metrics.json, which says that a run is finished, comes after everything else."""
    flags, undisturbed, *_ = straight("pretrain")
    process = begin("pretrain", flags, tmp_path / "run", prepare=die_in_draw_curves)
    process.wait()
    assert process.poll() == -signal.SIGKILL
    end(begin("pretrain", flags, tmp_path / "run"))
    assert_same_run(undisturbed, tmp_path / "run")


def die_in_draw_curves():
    pretrain.draw_curves = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


class Counted(io.BufferedWriter):
    """A file whose process is killed before the n-th operation on any file; what was not flushed is lost."""

    done, fatal = [], None

    def __init__(self, path, mode):
        self.tick("open", path)
        super().__init__(io.FileIO(path, mode))

    @classmethod
    def tick(cls, operation, *args):
        cls.done.append((operation, *map(str, args)))
        if len(cls.done) == cls.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, data):
        self.tick("write")
        return super().write(data)

    def flush(self):
        self.tick("flush")
        super().flush()


def save_or_die(path, state, fatal):
    """In a fork: save_checkpoint, killed before its n-th operation; else the operations, into a file."""
    def counted(name):
        function = getattr(os, name)

        def do(*args):
            Counted.tick(name, *args)
            return function(*args)
        return do
    Counted.fatal, checkpoint.open = fatal, Counted
    for name in ("fsync", "replace"):
        setattr(os, name, counted(name))
    checkpoint.save_checkpoint(path, state)
    path.with_name("operations").write_text(json.dumps(Counted.done))


@pytest.mark.parametrize("saved_before", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1))])
def test_killed_before_every_operation_of_a_save(saved_before, tmp_path):
    """What is found is the last state or the one before, whole, and the next save is none the worse."""
    def state(step):
        return dict(model=dict(w=torch.full((3, 1000), float(step))), config={}, step=step, stage="pretrain")

    def found(out):
        last = checkpoint.load_last_checkpoint(out)
        assert last is None or same(last, dict(state(last["step"]), version=checkpoint.VERSION))
        return last and last["step"]

    seen = set()
    for fatal in range(1, 200):
        out = tmp_path / str(fatal)
        out.mkdir()
        for step in range(saved_before):
            checkpoint.save_checkpoint(out / "checkpoint.pth", state(step + 1))
        process = FORKS.Process(target=save_or_die, args=(out / "checkpoint.pth", state(3), fatal))
        process.start()
        process.join(PATIENCE)
        seen.add(found(out))
        assert found(out) in {saved_before or None, 3}
        checkpoint.save_checkpoint(out / "checkpoint.pth", state(4))
        assert found(out) == 4
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert seen == {saved_before or None, 3} and fatal > 10

    # and the order that outlives a power cut, too: all is on the disk before it has the name
    operations = [operation for operation, *_ in json.loads((out / "operations").read_text())]
    first_name = operations.index("replace")
    assert "fsync" in operations[:first_name]
    assert "write" not in operations[operations.index("fsync"):]


# ---------------------------------------------------------------- with data-loader workers
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_workers_neither_die_of_a_signal_nor_keep_the_lock(signum, straight, tmp_path):
    """torchrun and a terminal signal the whole group; the workers of a killed run outlive it for a while."""
    flags, undisturbed, *_ = straight("semisup")
    out = tmp_path / "run"
    process = begin("semisup", f"{flags} --workers 2", out)
    wait_until(lambda: len(losses(out)) > 1, process)
    if signum == signal.SIGTERM:
        os.killpg(process.pid, signum)
        assert "stopped by SIGTERM" in end(process, 143)
    else:
        process.kill()
        process.wait()
    end(begin("semisup", f"{flags} --workers 2", out))
    assert_same_run(undisturbed, out)


# ---------------------------------------------------------------- preempted
SOME = [("lincls", signal.SIGUSR1), ("semisup", signal.SIGINT)]


@pytest.mark.parametrize("stage, signum", [
    pytest.param(stage, signum, marks=() if (stage, signum) in SOME else pytest.mark.slow)
    for stage in STAGES for signum in SIGNALS])
def test_a_signal_saves_after_the_step(stage, signum, straight, tmp_path):
    flags, undisturbed, *_ = straight(stage)
    out = tmp_path / "run"
    process = begin(stage, flags, out)
    wait_until(lambda: losses(out), process)
    os.kill(process.pid, signum)
    seen = losses(out)[-1]["step"]
    said, last = end(process, SIGNALS[signum]), log_lines(out)[-1]
    assert last["status"] == f"stopped by {signum.name}, saved" and said.count("stopped by") == 1
    assert seen <= last["step"] <= seen + 4                    # lines are two steps apart
    assert torch.load(out / "checkpoint.pth", weights_only=True)["step"] == last["step"]
    end(begin(stage, flags, out))
    assert_same_run(undisturbed, out)


@pytest.mark.parametrize("signum", [signal.SIGUSR1, *(pytest.param(signum, marks=pytest.mark.slow)
                                                      for signum in (signal.SIGINT, signal.SIGTERM))])
def test_a_signal_before_the_first_step_breaks_nothing(signum, straight, tmp_path):
    """It ends the process at once, as no handler is installed yet; the same command resumes."""
    flags, undisturbed, *_ = straight("semisup")
    out = tmp_path / "run"
    process = begin("semisup", flags, out)
    wait_until((out / "config.json").exists, process, pause=0)
    os.kill(process.pid, signum)
    process.wait()
    assert process.poll() in (-signum, SIGNALS[signum])
    assert process.poll() == 130 or not (out / "checkpoint.pth").exists()
    end(begin("semisup", flags, out))
    assert_same_run(undisturbed, out)


# ---------------------------------------------------------------- several processes
TORCHRUN = "--nproc-per-node 2 --standalone"
LAUNCHED = []
ALL_SIGNALS = "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# Else torch 2.14 keeps one store for all attempts, in which ranks that start again may find the addresses of
# those that are gone; and a launcher that comes back does not learn where the others meet.
RESTARTS = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
TOGETHER = f"{STAGES['pretrain']} {OFTEN}"                           # 24 steps


def torchrun(options, flags, out, **more):
    """torchrun of pretrain.py in a session of its own; what it and the ranks say goes to OUT.out."""
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(options), "pretrain.py",
               *shlex.split(flags), "--output-dir", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **more}
    with open(f"{out}.out", "a") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output,
                                   start_new_session=True)
    return launched(process, out)


def launched(process, out):
    """The process, with said() as those of start() have, to be killed if the test fails."""
    process.said = lambda: (Path(f"{out}.out").read_text(), "")
    LAUNCHED.append(process)
    return process


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Of a test that failed: neither a launcher nor its ranks, each of which has a session of its own."""
    yield
    while LAUNCHED:
        process = LAUNCHED.pop()
        if process.poll() is None:
            for pid in [process.pid, *children(process.pid)]:
                os.kill(pid, signal.SIGKILL)
            process.wait()


def children(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def ranks_of(launcher):
    """{rank: process id} of what a launcher started."""
    environments = {pid: Path(f"/proc/{pid}/environ").read_text() for pid in children(launcher.pid)}
    ranks = {pid: re.search(r"(?:^|\0)RANK=(\d+)", text) for pid, text in environments.items()}
    return {int(rank[1]): pid for pid, rank in ranks.items() if rank}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """Folder of the undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("in_two") / "run"
    end(begin("pretrain", TOGETHER, out, ranks=2))
    return out


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_same_bits(in_two, tmp_path):
    said = end(torchrun(f"{TORCHRUN} --max-restarts 1", TOGETHER, tmp_path / "run"))
    assert said.count("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == 1
    assert_same_run(in_two, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_from_the_checkpoint(rank, in_two, tmp_path):
    out = tmp_path / "run"
    launcher = torchrun(f"{TORCHRUN} --max-restarts 2", TOGETHER, out, **RESTARTS)
    assert wait_until((out / "checkpoint.pth").exists, launcher)
    time.sleep(random.Random(rank).uniform(0, 1))
    os.kill(ranks_of(launcher)[rank], signal.SIGKILL)
    said = end(launcher)
    resumed = resumed_from(out)
    print(f"\nrank {rank} killed, resumed from {resumed}")
    assert len(resumed) == 1 and 3 <= resumed[0] < 24 and "warning" not in said, said
    assert_same_run(in_two, out)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_rank_ends_the_other(rank, in_two, tmp_path):
    """Long before the timeout, as its connection is gone; the same command resumes."""
    process = begin("pretrain", TOGETHER, tmp_path / "run", ranks=2)
    assert wait_until((tmp_path / "run/checkpoint.pth").exists, process)
    os.kill(children(process.pid)[rank], signal.SIGKILL)
    _, error = finish(process, 1)
    assert error.count("\n") == 1 and f"rank {1 - rank}: another process of this run died" in error, error
    end(begin("pretrain", TOGETHER, tmp_path / "run", ranks=2))
    assert_same_run(in_two, tmp_path / "run")


@pytest.mark.slow
def test_a_lost_rank_without_restarts_ends_the_run_and_is_named(in_two, tmp_path):
    out = tmp_path / "run"
    launcher = torchrun(TORCHRUN, TOGETHER, out)
    assert wait_until((out / "checkpoint.pth").exists, launcher)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    killed = time.time()
    said = end(launcher, 1)
    print(f"\nended {time.time() - killed:.1f} s after rank 1 was killed")
    assert "rank      : 1 (local_rank: 1)" in said and "Signal 9 (SIGKILL)" in said
    end(torchrun(TORCHRUN, TOGETHER, out))
    assert_same_run(in_two, out)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run(in_two, tmp_path):
    out = tmp_path / "run"
    launcher = torchrun(TORCHRUN, f"{TOGETHER} --timeout 15", out)
    assert wait_until((out / "checkpoint.pth").exists, launcher)
    ranks, hung = ranks_of(launcher), time.time()
    os.kill(ranks[1], signal.SIGSTOP)
    assert wait_until(lambda: "--timeout 15 s" in Path(f"{out}.out").read_text(), launcher)
    print(f"\nrank 0 gave up {time.time() - hung:.1f} s after rank 1 hung")
    said = end(launcher, 1)
    print(f"the run ended {time.time() - hung:.1f} s after")
    assert "rank 0: another process of this run died or did not answer within --timeout 15 s" in said
    end(torchrun(TORCHRUN, TOGETHER, out))
    assert_same_run(in_two, out)


@pytest.mark.slow
def test_one_of_two_launchers_is_killed_and_started_again(in_two, tmp_path):
    """As two machines: the one that is lost is not the one that the others meet at."""
    out, port = tmp_path / "run", free_port()

    def start(node):
        meet = ("--nnodes 2 --nproc-per-node 1 --max-restarts 3 --rdzv-id faults --rdzv-backend c10d "
                f"--rdzv-endpoint localhost:{port} --local-addr localhost "
                f"--rdzv-conf is_host={int(node == 0)}")
        return torchrun(meet, TOGETHER, out, **RESTARTS)

    launchers = [start(0), start(1)]
    assert wait_until((out / "checkpoint.pth").exists, launchers[1])
    for pid in ranks_of(launchers[1]).values():
        os.killpg(pid, signal.SIGKILL)
    os.killpg(launchers[1].pid, signal.SIGKILL)
    launchers[1].wait()
    began = time.time()
    launchers[1] = start(1)
    for launcher in launchers:
        end(launcher)
    resumed = resumed_from(out)
    print(f"\na launcher killed, resumed from {resumed}, done {time.time() - began:.0f} s after it came back")
    assert resumed and resumed[0] >= 3
    assert_same_run(in_two, out)


NOISY = ("--data fake --image-size 16 --arch vit_t --drop-path 0.3 --batch-size 40 --hidden-dim 32 "
         "--epochs 1 --knn-every 0 --print-every 2")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    out = tmp_path_factory.mktemp("noisy") / "run"
    end(torchrun(TORCHRUN, NOISY, out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("signum", SIGNALS)
def test_all_ranks_stop_together(signum, noisy, tmp_path):
    """torchrun hands the signal on, or rank 1 alone has it. Each rank's own noise (drop path) is restored."""
    out = tmp_path / "run"
    launcher = torchrun(f"{TORCHRUN} {ALL_SIGNALS}", NOISY, out)
    assert wait_until(lambda: losses(out), launcher)
    os.kill(ranks_of(launcher)[1] if signum == signal.SIGTERM else launcher.pid, signum)
    seen = losses(out)[-1]["step"]
    said, last = end(launcher, 1), log_lines(out)[-1]
    assert last["status"] == f"stopped by {signum.name}, saved" and seen <= last["step"] <= seen + 4
    assert said.count("the same command resumes") == 1
    end(torchrun(f"{TORCHRUN} {ALL_SIGNALS}", NOISY, out))
    assert {"resumed_from": last["step"]} in log_lines(out)
    for name in ("checkpoint.pth", "backbone.pth", "metrics.json"):
        assert same(content(noisy / name), content(out / name)), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_slurm_file_requeues_what_was_stopped_and_nothing_else(processes, tmp_path):
    """recipes/slurm.sbatch itself, with commands of Slurm that do as if; of one process without torchrun."""
    out, small = tmp_path / "run", f"{TOGETHER.replace('--data fake', '')}"
    text = (ROOT / "recipes/slurm.sbatch").read_text()
    for old, new in (("runs/resnet50_multicrop", str(out)), ("@recipes/resnet50_multicrop.txt", small),
                     ("--nproc-per-node 8", f"--nproc-per-node {processes}"), (":29500", f":{free_port()}"),
                     ("OMP_NUM_THREADS=4", "OMP_NUM_THREADS=1")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "sound").write_text(text)
    (tmp_path / "wrong").write_text(text.replace(small, f"{small} --lr nan"))
    alone = f'while [ "$1" != pretrain.py ]; do shift; done; exec {sys.executable} "$@"'
    torchrun = f'exec {sys.executable} -m torch.distributed.run "$@"'
    commands = {"srun": 'shift; exec "$@"', "torchrun": alone if processes == 1 else torchrun,
                "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" >> {tmp_path}/requeued'}
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)

    def submit(script):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "fake", "SLURM_NNODES": "1",
               "SLURM_CPUS_PER_TASK": "1",
               "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "here"}
        with open(f"{out}.out", "a") as output:
            process = subprocess.Popen(["bash", str(tmp_path / script)], cwd=ROOT, env=env, stdout=output,
                                       stderr=output, start_new_session=True)
        return launched(process, out)

    def requeued():
        path = tmp_path / "requeued"
        return path.read_text().splitlines() if path.exists() else []

    job = submit("sound")
    assert wait_until(lambda: losses(out), job)
    os.kill(*children(job.pid), signal.SIGUSR1)
    end(job, 138 if processes == 1 else 1)
    stopped = log_lines(out)[-1]
    assert stopped["status"] == "stopped by SIGUSR1, saved" and requeued() == ["requeue 17"]
    assert "--lr: nan: must be" in end(submit("wrong"), 2 if processes == 1 else 1)
    assert log_lines(out)[-1] == stopped and requeued() == ["requeue 17"]       # the log still ends with it
    end(submit("sound"))
    assert log_lines(out)[-1]["status"] == "done" and requeued() == ["requeue 17"]


def own_folder():
    """Each rank has an output folder of its own, as on machines that share none."""
    sys.argv[sys.argv.index("--output-dir") + 1] += os.environ["RANK"]


@pytest.mark.parametrize("stage, more", [("lincls", ""), ("finetune", "--grid --lrs 0.1 --weight-decays 0")])
def test_a_finished_command_ends_where_machines_share_no_folder(stage, more, network, tmp_path):
    """Only the first one knows that the run is finished; the others must not go on to the evaluation."""
    flags = f"{STAGES[stage].format(network=network)} {more} --timeout 30"
    for _ in range(2):
        said = end(begin(stage, flags, tmp_path / "run", ranks=2, prepare=own_folder))
    assert "this run is finished" in said
    assert not (tmp_path / "run1").exists()


# ---------------------------------------------------------------- another number of processes
def in_double(stop_at=None):
    """From now on this process computes in double precision: in single, rounding grows from step to step.

    stop_at: the step in which rank 0 sends itself SIGTERM.
    """
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    item = data.Batches.__getitem__

    def double_item(self, step):
        images, uniforms, labels = item(self, step)
        return images, uniforms.double(), labels
    data.Batches.__getitem__ = double_item
    watch = run.Run.watch

    def watch_or_stop(self, *args, **kwargs):
        if self.step + 1 == stop_at and self.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        watch(self, *args, **kwargs)
    run.Run.watch = watch_or_stop


@pytest.mark.parametrize("stage", ["lincls", *(pytest.param(stage, marks=pytest.mark.slow)
                                               for stage in STAGES if stage != "lincls")])
def test_one_then_two_then_one_process(stage, network, tmp_path):
    """The same global batches in the same views: but for rounding the run of one process from end to end."""
    flags = f"{STAGES[stage].format(network=network)} --print-every 1 --save-every 50"
    flags += " --dropout 0" * (stage == "segment")             # which is noise of each process
    end(begin(stage, flags, tmp_path / "straight", prepare=in_double))
    out, places = tmp_path / "run", (5, 15)
    for ranks, step in zip((1, 2), places, strict=True):
        stopped = functools.partial(in_double, step)
        said = end(begin(stage, flags, out, ranks=ranks, prepare=stopped), 143)
        assert f"{ranks} process(es) on cpu" in said
        assert log_lines(out)[-1] == dict(step=step, status="stopped by SIGTERM, saved")
    end(begin(stage, flags, out, prepare=in_double))
    assert resumed_from(out) == list(places)
    a, b = ([line["loss"] for line in losses(folder)] for folder in (tmp_path / "straight", out))
    states = [torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
              for folder in (tmp_path / "straight", out)]
    apart = max((x - y).abs().max().item() for x, y in zip(*(s.values() for s in states), strict=True))
    print(f"\n{stage}: two processes from step {places[0]} to {places[1]}; losses differ by "
          f"{max(abs(x - y) for x, y in zip(a, b, strict=True)):.1e}, weights by {apart:.1e}")
    # batch norms, or the samples of anchors and boxes, are each process's own
    if stage in ("semisup", "finetune", "detect"):
        assert a[:places[0]] == b[:places[0]] and a[places[0]:places[1]] != b[places[0]:places[1]]
    else:
        assert a == pytest.approx(b, rel=1e-7) and apart < 1e-7


# ---------------------------------------------------------------- long runs
LONG = {                         # 2,000 steps or a few more
    "pretrain": "--data fashion-mnist --batch-size 4 --epochs 1 --hidden-dim 16 --ema 0.9",
    "barlow": "--data fake --batch-size 4 --epochs 16 --hidden-dim 16",
    "pretrain, files": "--data {pictures} --image-size 32 --batch-size 4 --epochs 100 --hidden-dim 16 "
                       "--workers 2 --knn-every 5",
    "selflabel": "--checkpoint {network} --batch-size 4 --epochs 16",
    "distill": "--teacher {network} --batch-size 4 --epochs 16 --queue-size 64",
    "lincls": "--checkpoint {network} --batch-size 8 --epochs 36 --lrs 0.3",
    "semisup": "--checkpoint {network} --batch-size 4 --epochs 32 --label-fraction 0.5",
    "finetune": "--checkpoint {network} --data fake --batch-size 4 --steps 2048",
}


def measure(process, out):
    """[(step, MiB, open files, processes)] of a run and its workers, about every 100 steps of its log."""
    series, at = [], 50
    while process.poll() is None and at <= 2000:
        step = max([line["step"] for line in losses(out)], default=0)
        if step >= at:
            pids = [process.pid, *children(process.pid)]
            try:
                kib = sum(int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
                          for pid in pids)
                files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
            except (OSError, TypeError):                        # one that has just ended
                continue
            series.append((step, kib // 1024, files, len(pids)))
            at = step + 100
        time.sleep(0.05)
    return series


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_memory_and_open_files_of_2000_steps_stay_flat(name, network, tmp_path):
    for i in range(100):                                        # 80 to train on
        path = tmp_path / "pictures" / ("val" if i % 5 == 4 else "train") / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 48), 20 + 20 * (i % 2)).save(path)
    flags = LONG[name].format(network=network, pictures=tmp_path / "pictures")
    process = begin(name.split(",")[0], f"{flags} --save-every 100 --print-every 50", tmp_path / "run")
    series = measure(process, tmp_path / "run")
    print(f"\n{name}: (step, MiB, open files, processes) {series}")
    end(process)
    # the scores and the curves after an epoch take 50 MiB more in the first 30 epochs, and then no more
    settled = 800 if name == "pretrain, files" else 400         # after 40 of its 100 epochs
    _, memory, *rest = zip(*(row for row in series if row[0] >= settled), strict=True)
    assert len(memory) >= (1900 - settled) // 100 and max(memory) <= 1.05 * memory[0]
    for numbers in rest:             # with workers some come and go; while it saves a file more is open
        assert statistics.median(numbers[-5:]) <= statistics.median(numbers[:5]) + 1
