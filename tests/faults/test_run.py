"""What run.py promises, shown on a toy stage: flags, exit codes, checkpoints, signals, numbers, the log."""

import argparse
import contextlib
import datetime
import errno
import functools
import importlib
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import (
    ROOT,
    STAGES,
    bounds_of,
    finish,
    log_lines,
    losses,
    metrics_of,
    resumed_from,
    same,
    start,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cli
import run
from checkpoint import UserError, load_checkpoint, save_checkpoint
from cli import HelpFormatter, at_least, launch, parse_args
from run import Run

CPU = torch.device("cpu")


# ---------------------------------------------------------------- a toy stage: `test_run.py`
class Loss(NamedTuple):
    total: torch.Tensor
    size: torch.Tensor


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(nn.functional.dropout(self.backbone(x)))


def get_parser():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--amp", default="off")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=at_least(1), default=8)
    parser.add_argument("--steps", type=at_least(1), default=20)
    parser.add_argument("--epoch", type=at_least(1), default=10, help="steps of an epoch")
    parser.add_argument("--print-every", type=at_least(1), default=2)
    parser.add_argument("--save-every", type=at_least(1), default=3)
    parser.add_argument("--timeout", type=at_least(1, float), default=60)
    parser.add_argument("--worker", action="store_true", help="have a data-loader worker")
    parser.add_argument("--disturb", nargs=3, metavar=("WHAT", "STEP", "RANK"), default=("", 0, 0))
    return parser


def main(args):
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    what, bad_step, bad_rank = args.disturb[0], int(args.disturb[1]), int(args.disturb[2])
    config = {name: value for name, value in vars(args).items() if name != "disturb"}
    if world_size > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=args.timeout))
    torch.manual_seed(0)
    model, count = Network(), torch.zeros((), dtype=torch.long)
    ddp = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    torch.manual_seed(rank)
    toy = Run(args, "toy", CPU, args.steps, args.epoch, config)
    toy.track(model=model, teacher=None, optimizer=optimizer, count=count)
    if args.worker:
        mark = functools.partial(write_pid, toy.out)
        workers = iter(torch.utils.data.DataLoader(range(1000), num_workers=1, worker_init_fn=mark))
        next(workers)
    loader = (torch.arange(8.0).view(2, 4) + step for step in range(toy.start, args.steps))
    for step in toy.steps():
        disturbed = step + 1 == bad_step and rank == bad_rank
        y = ddp(toy.next(loader))
        if disturbed and what == "gradient":
            y.register_hook(lambda grad: grad * math.inf)
        loss = Loss(y.square().mean(), y.abs().mean())
        if disturbed and what == "loss":
            loss = Loss(loss.total * math.nan, loss.size)
        optimizer.zero_grad()
        loss.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        count += 1
        if disturbed and what == "weights":
            model.head.bias.data.fill_(math.inf)
        if disturbed:
            send(what)
        toy.watch(loss, norm)
        if toy.logging:
            mean = toy.average(rank=torch.tensor(rank), of_two=torch.tensor([[1.0, rank]]))
            toy.log("loss {loss:.3f}", loss=loss.total.item(), rank=mean["rank"].item(),
                    of_two=mean["of_two"].tolist())
    if bad_step > args.steps and rank == bad_rank:
        send(what)
    toy.done()


def write_pid(folder, worker):
    (folder / "worker.pid").write_text(str(os.getpid()))


def send(signals):
    """Sends itself signals, such as SIGINT or SIGINT+wait+SIGINT."""
    for name in signals.split("+"):
        if name == "wait":
            time.sleep(1.1)
        elif name.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[name])


SELDOM = "--steps 60 --epoch 60 --print-every 1000 --save-every 1000"


def toy(out, flags="", code=0, ranks=1):
    """(stdout, stderr) of the toy stage in processes of its own."""
    return finish(start(f"test_run.py {flags} --output-dir {out}", ranks=ranks), code)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """begun(number of steps, **flags): a Run of a linear layer in this process; earlier ones have ended."""
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    lock, locks = run._lock, []
    monkeypatch.setattr(run, "_lock", lambda out: locks.append(lock(out)) or locks[-1])

    def begin(steps, scaler=None, lr=0.1, model=None, config=None, epoch=1000, **flags):
        while locks:
            locks.pop().close()
        args = dict(output_dir=str(tmp_path / "run"), resume="auto", overwrite=False, print_every=1000,
                    save_every=1000, batch_size=8, amp="off", timeout=60, lr=lr, workers=0, knn_every=1)
        args = argparse.Namespace(**{**args, **flags})
        model = model or nn.Linear(2, 1)
        begun = Run(args, "toy", CPU, steps, epoch, config)
        begun.track(model=model, optimizer=torch.optim.SGD(model.parameters(), lr), scaler=scaler)
        return begun
    return begin


# ---------------------------------------------------------------- flags
@pytest.mark.parametrize("number, good, bad", [
    (at_least(0), "0 1 007 281474976710656", "-1 1.5 1e3 x nan inf 281474976710657 99999999999999999999"),
    (at_least(-1), "-1 0", "-2 -inf"),
    (at_least(2, below=5), "2 4", "1 5 6"),
    (at_least(0, float), "0 1e-9 1.5 1e30", "-1e-9 nan inf -inf x 1,5"),
    (at_least(0, float, 1), "0 0.999", "1 1.0 -0.1 nan"),
    (at_least(1e-6, float), "1e-6 1", "0 9e-7"),
    (at_least(-math.inf, float), "-1e30 0 7", "nan inf -inf")])
def test_bounds_of_numbers(number, good, bad):
    for text in good.split():
        assert number(text) == float(text)
    for text in bad.split():
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(text)}: must be a"):
            number(text)


def test_message_names_the_bounds():
    for number, words in ((at_least(1), "a whole number of at least 1"),
                          (at_least(0, float, 1), "a number of at least 0 and below 1"),
                          (at_least(-math.inf, float), "a number")):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            number("x")
        assert str(error.value) == f"x: must be {words}"


@pytest.mark.parametrize("script", [*STAGES, "knn", "cluster_eval", "svm"])
def test_every_flag_of_every_script_keeps_its_bounds(script):
    """What is outside and what is not finite is refused; the bound itself is accepted."""
    bounded = 0
    for action in importlib.import_module(script).get_parser()._actions:
        bounds = bounds_of(action)
        if not bounds:
            assert action.type not in (int, float), f"{script} {action.option_strings[0]} has no bounds"
            continue
        bounded += 1
        low, kind, below = bounds.values()
        outside = ["nan", "inf", "-inf", "x", ""]
        if low > -math.inf:
            assert action.type(str(low)) == low
            outside.append(str(low - 1))
        if below < math.inf:
            outside += [str(below), str(below + 1)]
        if kind is int:
            outside += ["1.5", "9" * 20]
        for text in outside:
            with pytest.raises(argparse.ArgumentTypeError):
                action.type(text)
    assert bounded >= 3


def flags_parser():
    parser = argparse.ArgumentParser(prog="toy.py", allow_abbrev=False)
    parser.add_argument("--num-classes", type=at_least(2), default=10)
    parser.add_argument("--output-dir")
    parser.add_argument("--lrs", type=float, nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", default="auto")
    return parser


def test_files_of_flags(tmp_path):
    text = "# a comment\n--num_classes 12   # of images\n\n--lrs 1 2\n--output-dir from_file\n"
    (tmp_path / "a").write_text(text)
    (tmp_path / "b").write_text(f"@{tmp_path}/a\n--lrs 3\n")

    def parsed(*words):
        args = parse_args(flags_parser(), words)
        return args.num_classes, args.output_dir, args.lrs
    assert parsed(f"@{tmp_path}/a") == (12, "from_file", [1, 2])
    assert parsed(f"@{tmp_path}/b") == (12, "from_file", [3])
    assert parsed(f"@{tmp_path}/a", "--num-classes", "7", "--output_dir=of_mine") == (7, "of_mine", [1, 2])
    assert parsed("--num-classes", "7", f"@{tmp_path}/a") == (12, "from_file", [1, 2])
    assert parsed("--num_classes", "3", "--num_classes=5", "--output-dir", "a_b") == (5, "a_b", None)


@pytest.mark.parametrize("line, words", [
    ("--lrs 30 60 90    # the code's default", ["--lrs", "30", "60", "90"]),
    ("--output-dir 'my pictures'  # \"", ["--output-dir", "my pictures"]),
    ('--output-dir="a # b"#c', ["--output-dir=a # b#c"]),
    ("--output-dir set#2\t# of two", ["--output-dir", "set#2"]),
    (r"--output-dir C:\new\dir", ["--output-dir", r"C:\new\dir"]), ("  # --lrs 1", []), ("", []), ("#", [])])
def test_words_of_a_line_of_flags(line, words, tmp_path):
    """A # that does not begin a word is no comment, and quotes keep spaces together."""
    assert cli._words(line, flags_parser()) == words
    (tmp_path / "flags").write_text(line)
    assert parse_args(flags_parser(), [f"@{tmp_path}/flags"]) == parse_args(flags_parser(), words)


def test_flags_that_parse_args_resolves(monkeypatch):
    for words in (["--local-rank", "1"], ["--local_rank=1"], []):
        args = parse_args(flags_parser(), words)
        assert "local_rank" not in args and args.num_classes == 10
    for native, device, amp, expected in (
            (None, "cpu", "auto", "off"), (None, "mps", "auto", "off"), (True, "cuda", "auto", "bf16"),
            (False, "cuda", "auto", "fp16"), (True, "cuda", "off", "off"), (None, "cpu", "bf16", "bf16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native:
                            including_emulation or native)
        assert parse_args(flags_parser(), ["--device", device, "--amp", amp]).amp == expected


@pytest.mark.parametrize("words, message", [
    ("--num-classes 1", "argument --num-classes: 1: must be a whole number of at least 2"),
    ("--lrs", "argument --lrs"),
    ("--num-class 3", "unrecognized arguments: --num-class 3; did you mean --num-classes?"),
    ("--local-ran 0.1", "unrecognized arguments: --local-ran 0.1; toy.py --help lists what there is"),
    ("--zzz", "unrecognized arguments: --zzz; toy.py --help lists what there is"),
    ("--output-dir my pictures", "arguments: pictures; a value with spaces or braces stands in quotes"),
    ("--arch resnet51", "'vit_s'); did you mean resnet50?"),
    ("--arch=x", "; toy.py --help lists what there is"),
    ("@recipes/fashion_mnist_barlow.txt", "; recipes/fashion_mnist_barlow.txt is for barlow.py"),
    ("@recipes/resnet50_twoviews.txt", "did you mean @recipes/resnet50_two_views.txt?"),
    ("@resnet50_two_views.txt", "did you mean @recipes/resnet50_two_views.txt?"),
    ("@nowhere.txt", "nowhere.txt"), ("@{quote}", "--output-dir it's: a quote is not closed")])
def test_mistakes_in_flags_are_one_line(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "quote").write_text("--output-dir it's\n")
    parser = flags_parser()
    parser.add_argument("--arch", choices=("resnet50", "vit_s"))
    with pytest.raises(SystemExit) as stop:
        parse_args(parser, words.format(quote=tmp_path / "quote").split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert err.startswith("toy.py: error: ") and message in err


def test_help_keeps_lines_and_names_defaults():
    parser = argparse.ArgumentParser(description="one\n    two", formatter_class=HelpFormatter)
    parser.add_argument("--a", default=3, help="first")
    parser.add_argument("--b", help="second")
    parser.add_argument("--c", action="store_true", help="third")
    text = parser.format_help()
    for words in ("one\n    two\n", "first (default: 3)\n", "second\n", "third\n"):
        assert words in text


# ---------------------------------------------------------------- exit codes
class Broken(torch.utils.data.Dataset):
    """Its one item raises an error, or kills the worker that reads it."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise self.error


def read_by_worker(error):
    return next(iter(torch.utils.data.DataLoader(Broken(error), num_workers=1)))


def raised(error):
    raise error


FULL = OSError(errno.ENOSPC, "No space left on device", "runs/x")
QUOTA = OSError(errno.EDQUOT, "Disk quota exceeded")
ENDS = {                         # what a stage does: exit code, error
    "done": (lambda args: None, None, None),
    "finished": (lambda args: 0, 0, None),
    "mistake": (lambda args: raised(UserError("--data x: is missing")), 2, "--data x: is missing"),
    "worker's mistake": (lambda args: read_by_worker(UserError("--data x: broken")), 2, "--data x: broken"),
    "worker killed": (lambda args: read_by_worker(None), 1, "DataLoader worker .*; short of memory. Try "
                      "fewer --workers; start it again"),
    "disk full": (lambda args: raised(FULL), 2, r"runs/x: cannot be written \(No space left on device\); "
                  "make room, and start it again"),
    "output full": (lambda args: raised(QUOTA), 2, r"standard output, or the log in out: cannot be written "
                    r"\(Disk quota exceeded\); make room, and start it again"),
    "memory": (lambda args: raised(MemoryError()), 2, r"not enough memory \(MemoryError\); try a smaller "
               "--batch-size"),
    "torch's memory": (lambda args: torch.empty(2 ** 60), 2, r"not enough memory \(.*\); try a smaller "
                       "--batch-size"),
    "a GPU's memory": (lambda args: raised(torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 32.00 GiB. GPU 0 has a total capacity of 139.80 GiB")), 2,
        r"not enough memory \(CUDA out of memory. Tried to allocate 32.00 GiB\); try a smaller --batch-size"),
    "Ctrl-C": (lambda args: raised(KeyboardInterrupt()), 130, None),
}


@pytest.mark.parametrize("main, code, error", ENDS.values(), ids=ENDS)
def test_exit_codes(main, code, error, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(main, flags_parser(), ["--output-dir", "out"])
    err = capsys.readouterr().err
    assert stop.value.code == code
    assert re.fullmatch(f"toy.py: error: {error}\n" if error else "", err), err


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), FileNotFoundError("a bug"),
                                   RuntimeError("gloo is not used here")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)) as same_error:
        launch(lambda args: raised(error), flags_parser(), [])
    assert same_error.value is error


@pytest.mark.parametrize("error", [dist.DistBackendError("closed\nby peer"), RuntimeError("[gloo] closed")])
def test_lost_process_is_named_by_each_rank(error, capsys, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    parser = flags_parser()
    parser.add_argument("--timeout", type=float, default=60)
    with pytest.raises(SystemExit) as stop:
        launch(lambda args: raised(error), parser, [])
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1
    assert err.startswith("toy.py: error: rank 1: another process of this run died or did not answer within "
                          "--timeout 60 s (")


def test_mistake_of_all_ranks_is_one_line(capsys, monkeypatch):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stop:
            launch(lambda args: raised(UserError("--data x: is missing")), flags_parser(), [])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == lines


def test_more_processes_than_gpus_is_one_line_of_the_machine(capsys, monkeypatch):
    """A launcher may show each process one GPU, its own, as number 0: that is sound."""
    line = "toy.py: error: --nproc-per-node: this machine has only 1 GPU(s); start as many processes\n"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank, code, said in (("0", None, ""), ("1", 2, line), ("2", 2, "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        parser = flags_parser()
        parser.set_defaults(device="cuda")
        with pytest.raises(SystemExit) as stop:
            launch(lambda args: None, parser, [])
        assert stop.value.code == code and capsys.readouterr().err == said


def test_restarts_that_would_fail_are_warned_about(capsys, monkeypatch):
    said = []
    for shared in ("True", "False"):
        for name, value in (("RANK", "0"), ("TORCHELASTIC_MAX_RESTARTS", "3"),
                            ("TORCHELASTIC_USE_AGENT_STORE", shared)):
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            launch(lambda args: None, flags_parser(), [])
        said.append(capsys.readouterr().err)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said[0] and said[0].count("\n") == 1 and said[1] == ""


# ---------------------------------------------------------------- numbers that are not finite
NORM, NAN, INF = torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(math.inf)
FINE, NO_LOSS, NO_GRADIENT = ([1.0, 2.0], NORM), ([math.nan, 6.0], NORM), ([5.0, 6.0], INF)


@pytest.fixture
def watched(begun, capsys):
    """watched(steps, fp16, **flags): the end of a run of these steps, each (terms of the loss, norm)."""

    def end(steps, fp16=False, **flags):
        bad = begun(len(steps), torch.amp.GradScaler("cpu", enabled=fp16), overwrite=True, **flags)
        with pytest.raises(SystemExit) as stop:
            for (terms, norm), step in zip(steps, bad.steps(), strict=False):
                bad.parts["optimizer"].param_groups[0]["lr"] = (step + 1) / 8
                bad.watch(Loss(*torch.tensor(terms)), norm)
            bad.end(0)
        said = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code, error=said.err, found_at=bad.step + 1, out=bad.out,
                               last=log_lines(bad.out)[-1])
    return end


@pytest.mark.parametrize("bad, what", [
    (NO_LOSS, "loss"), (([5.0, math.inf], NORM), "loss"), (([5.0, 6.0], NAN), "gradient"),
    (NO_GRADIENT, "gradient"), (([math.nan, 6.0], NAN), "loss")])
def test_first_bad_step_is_named(bad, what, watched):
    """With its learning rate and the last finite terms, whatever comes after it; nothing is saved."""
    ended = watched([([3.0, 4.0], NORM), FINE, bad, ([9.0, 9.0], NAN), NO_LOSS, FINE])
    assert (ended.code, ended.found_at, ended.last) == (3, 6, dict(step=3, status=f"non-finite {what}"))
    assert ended.error == (
        f"toy.py: error: at step 3 the {what} is not finite (lr 0.375, amp off, last finite total 1, size 2)"
        f"; nothing is saved yet; try a lower learning rate\n")
    assert not list(ended.out.glob("*.pth"))
    assert "(lr 0.125, amp off); nothing is saved yet" in watched([NO_LOSS, FINE]).error


def test_fp16_may_overflow_but_not_20_times_in_a_row(watched):
    nineteen = [NO_GRADIENT] * 19
    assert watched([*nineteen, FINE, *nineteen], fp16=True).code == 0
    ended = watched([*nineteen, FINE, *nineteen, NO_GRADIENT, FINE], fp16=True, amp="fp16")
    assert ended.code == 3 and "amp fp16" in ended.error
    assert ended.last == dict(step=40, status="non-finite gradient")
    assert watched([FINE, NO_LOSS], fp16=True).last == dict(step=2, status="non-finite loss")
    assert watched([FINE, NO_GRADIENT]).last == dict(step=2, status="non-finite gradient")


def test_weights_are_looked_at_before_a_save(begun, capsys):
    model = nn.Linear(2, 1)
    bad = begun(10, model=model, save_every=2)
    with pytest.raises(SystemExit) as stop:
        for step in bad.steps():
            if step == 3:
                model.bias.data.fill_(math.inf)
            bad.watch(torch.tensor(1.0), NORM)
    assert stop.value.code == 3 and log_lines(bad.out)[-1] == dict(step=4, status="non-finite weights")
    said = capsys.readouterr().err
    assert "at step 4 the weights are not finite" in said
    assert f"the checkpoint in {bad.out} is from before" in said
    assert load_checkpoint(bad.out / "checkpoint.pth")["step"] == 2


def test_without_a_norm_the_loss_alone_counts(begun, capsys):
    """lincls.py: a head may diverge that is not chosen."""
    model = nn.Linear(2, 1)
    bad = begun(4, model=model)
    with pytest.raises(SystemExit) as stop:
        for step in bad.steps():
            model.bias.data.fill_(math.inf)
            bad.watch(torch.tensor(1.0 if step < 2 else math.nan))
    assert stop.value.code == 3 and "last finite loss 1)" in capsys.readouterr().err
    assert log_lines(bad.out)[-1] == dict(step=3, status="non-finite loss")


class NoReads(TorchDispatchMode):
    """Fails where a number is read from the device, which would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_steps_that_do_not_agree_wait_for_nothing(begun):
    quick = begun(60)
    for step in quick.steps():
        with contextlib.nullcontext() if step == 49 else NoReads():
            quick.watch(Loss(NORM, NORM), NORM)
        if step == 58:
            break


# ---------------------------------------------------------------- agreement
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_bad_number_is_found_by_step_50(what, ranks, tmp_path):
    """Whatever --print-every and --save-every say. The gradient is that of all ranks, the loss of one."""
    said, error = toy(tmp_path, f"{SELDOM} --disturb {what} 17 {ranks - 1}", 3, ranks)
    assert said.endswith("ended at step 50\n") and error.count("\n") == 1
    assert f"toy.py: error: at step 17 the {what} is not finite (lr 0.1, amp off, last finite total " in error
    assert log_lines(tmp_path)[-1] == dict(step=17, status=f"non-finite {what}")
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("here, there", [(20, 12), (12, 20)])
def test_the_first_bad_step_of_all_ranks_is_named(here, there, begun, monkeypatch, capsys):
    """Rank 0 has it at step `here`, another at step `there`."""
    one = begun(60)
    others = torch.tensor([0.0, 0.0, 0.0, 61 - there, 0.0, 0.0])
    monkeypatch.setattr(one, "world_size", 2)
    monkeypatch.setattr(dist, "all_reduce", lambda seen, op: seen.copy_(torch.maximum(seen, others)))
    with pytest.raises(SystemExit) as stop:
        for step in one.steps():
            one.watch(torch.tensor(math.nan if step + 1 == here else 1.0))
    assert stop.value.code == 3 and "at step 12 the loss is not finite" in capsys.readouterr().err


def test_bad_weights_of_one_rank_end_all(tmp_path):
    toy(tmp_path, f"{SELDOM} --save-every 20 --disturb weights 40 1", 3, ranks=2)
    assert log_lines(tmp_path)[-1] == dict(step=40, status="non-finite weights")
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    assert state["step"] == 20 and all(w.isfinite().all() for w in state["model"].values())


@pytest.mark.parametrize("ranks, signum, step", [(1, signal.SIGINT, 7), (1, signal.SIGUSR1, 7),
                                                 (2, signal.SIGTERM, 50)])
def test_signal_is_answered(ranks, signum, step, tmp_path):
    """By one process after its step, by two together at step 50 though only rank 1 got it."""
    said, _ = toy(tmp_path, f"{SELDOM} --disturb {signum.name} 7 {ranks - 1}", 128 + signum, ranks)
    assert said.count(f"stopped by {signum.name} after step {step}, saved; the same command resumes\n") == 1
    assert log_lines(tmp_path)[-1] == dict(step=step, status=f"stopped by {signum.name}, saved")
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == step


@pytest.mark.parametrize("signals, answered", [("SIGINT", 130), ("SIGINT+SIGTERM", 130),
                                               ("SIGINT+wait+SIGTERM", 143)])
def test_a_second_signal_ends_at_once(signals, answered, tmp_path):
    """Unless it comes with the first, as from a terminal and its launcher. What will happen is said first."""
    said, error = toy(tmp_path, f"--disturb {signals} 5 0", answered)
    assert "\nSIGINT: stopping after this step; once more ends at once\n" in said and not error
    at_once = "wait" in signals
    assert said.endswith("stopped by SIGTERM at once; the same command resumes from the last checkpoint\n" if
                         at_once else "stopped by SIGINT after step 5, saved; the same command resumes\n")
    assert load_checkpoint(tmp_path / "checkpoint.pth")["step"] == (3 if at_once else 5)
    status = "stopped by SIGTERM at once" if at_once else "stopped by SIGINT, saved"
    assert log_lines(tmp_path)[-1] == dict(step=5, status=status)


def test_a_second_signal_ends_the_other_ranks(tmp_path):
    """Which learn of the first one at the next save."""
    said, error = toy(tmp_path, f"{SELDOM} --save-every 9 --disturb SIGINT+wait+SIGINT 5 0", 130, ranks=2)
    assert "SIGINT: stopping after at most 9 steps; once more ends at once\n" in said
    assert "stopped by SIGINT at once" in said and not list(tmp_path.glob("*.pth"))
    assert error.count("\n") == 1 and "rank 1: another process of this run died" in error


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_after_the_last_step_is_answered_at_once(ranks, tmp_path):
    """Evaluations have nothing to save; the same command makes them again."""
    said, _ = toy(tmp_path, "--disturb SIGTERM 21 0", 143, ranks)
    assert said.endswith("stopped by SIGTERM at once; the same command resumes from the last checkpoint\n")
    assert log_lines(tmp_path)[-1] == dict(step=20, status="stopped by SIGTERM at once")
    toy(tmp_path, ranks=ranks)
    assert log_lines(tmp_path)[-1]["status"] == "done"


def test_a_signal_in_the_last_save_is_answered(begun):
    ended, last = [], begun(2)
    for step in last.steps():
        last.watch(NORM, NORM)
        if step == 1:
            last.end_at_once = ended.append
            last.save = lambda: last.answer(signal.SIGTERM, None)
    assert ended == [signal.SIGTERM]


def test_workers_end_with_a_second_signal(tmp_path):
    """At once; by themselves they notice after seconds that their process is gone."""
    toy(tmp_path, "--worker --disturb SIGINT+wait+SIGINT 5 0", 130)
    worker, ended = Path("/proc") / (tmp_path / "worker.pid").read_text(), time.time()
    while worker.exists() and "State:\tZ" not in (worker / "status").read_text():
        assert time.time() < ended + 2
        time.sleep(0.01)


# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_run_has_the_same_noise(ranks, tmp_path):
    """Dropout of each rank is restored, and so are parts that are tensors. --save-every may differ."""
    toy(tmp_path / "straight", ranks=ranks)
    toy(tmp_path / "run", "--disturb SIGTERM 7 0", 143, ranks)
    step = load_checkpoint(tmp_path / "run/checkpoint.pth")["step"]
    said, _ = toy(tmp_path / "run", "--save-every 5", ranks=ranks)
    assert resumed_from(tmp_path / "run") == [step] and step < 9 and f"resumed from step {step}" in said
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("straight", "run"))
    assert a["count"] == 20 and len(a["rng"]) == ranks and a["epoch"] == 2 and "teacher" not in a
    for state in (a, b):
        del state["config"]
    assert same(a, b)
    a, b = ({line["step"]: line["loss"] for line in losses(tmp_path / name)} for name in ("straight", "run"))
    assert a == b


def test_two_processes_resume_from_one(tmp_path):
    toy(tmp_path, "--disturb SIGTERM 7 0", 143)
    toy(tmp_path, ranks=2)
    assert resumed_from(tmp_path) == [7] and len(load_checkpoint(tmp_path / "checkpoint.pth")["rng"]) == 2


def saved(begun, **flags):
    """Folder of a run that has saved after its first of two steps."""
    one = begun(2, save_every=1, **flags)
    next(steps := one.steps())
    one.watch(torch.tensor(1.0))
    next(steps)
    return one.out


@pytest.mark.parametrize("flags, message", [
    (dict(lr=0.2), "lr was 0.1, is 0.2"),
    (dict(batch_size=4, lr=0.3), "batch_size was 8, is 4; lr was 0.1, is 0.3"),
    (dict(resume="never"), "holds a run already")])
def test_other_flags_are_refused_and_named(flags, message, begun):
    out = saved(begun)
    with pytest.raises(UserError, match=re.escape(message)):
        begun(2, **flags)
    assert json.loads((out / "config.json").read_text())["lr"] == 0.1


def test_flags_of_the_machine_may_differ(begun, tmp_path):
    out = saved(begun, workers=0)
    assert begun(2, workers=3, print_every=7, save_every=2, knn_every=0, amp="bf16", timeout=5).start == 1
    assert begun(2, output_dir=str(tmp_path / "new"), resume=str(out / "checkpoint.pth")).start == 1
    assert begun(2, lr=0.3, overwrite=True).start == 0


def test_run_that_lacks_its_metrics_goes_on_to_its_end(begun, tmp_path, capsys):
    """It was killed after its last save. With metrics, or as a file for another folder, it is finished."""
    def trained():
        training = begun(2, epoch=2, print_every=1)
        for step in training.steps():
            training.watch(NORM, NORM)
            training.log("loss {loss}", loss=1.0 + step)
        return training
    assert not trained().out.joinpath("metrics.json").exists()
    with pytest.raises(SystemExit) as stop:
        trained().done()
    assert not stop.value.code and metrics_of(tmp_path / "run")["loss"] == 2
    assert [line["step"] for line in losses(tmp_path / "run")] == [1, 2]
    for flags in ({}, dict(output_dir=str(tmp_path / "new"), resume=str(tmp_path / "run/checkpoint.pth"))):
        with pytest.raises(SystemExit) as stop:
            begun(2, **flags)
        assert stop.value.code == 0 and "this run is finished" in capsys.readouterr().out


def test_other_pictures_another_stage_and_other_networks_are_refused(begun):
    config = dict(lr=0.1, pictures="80 files, checksum 1")
    out = saved(begun, config=config)
    with pytest.raises(UserError, match="pictures was 80 files, checksum 1, is 81 files, checksum 2"):
        begun(2, config=dict(config, pictures="81 files, checksum 2"))
    with pytest.raises(UserError, match=r"its parts are not those of a run with these flags \(Run"):
        begun(2, config=config, model=nn.Linear(3, 1))
    assert begun(2, config=config).start == 1
    save_checkpoint(out / "checkpoint.pth", dict(load_checkpoint(out / "checkpoint.pth"), stage="pretrain"))
    with pytest.raises(UserError, match="stage was pretrain, is toy"):
        begun(2, config=config)


def test_metrics_are_written_last(begun, monkeypatch, capsys):
    """They say that a run is finished."""
    written = []
    monkeypatch.setattr(run, "write_atomically", lambda path, content: written.append(path.name))
    monkeypatch.setattr(run, "save_checkpoint", lambda path, state: written.append(path.name))
    model = Network()
    done = begun(2, model=model, epoch=2)
    for _ in done.steps():
        done.watch(NORM, NORM)
        if done.logging:
            done.log("loss {loss}", loss=1.0)
    (done.out / "curves.png").write_bytes(b"drawn")
    with pytest.raises(SystemExit) as stop:
        done.done(files=["curves.png", "not_drawn.png"])
    assert not stop.value.code
    assert written == ["config.json", "backbone.pth", "checkpoint.pth", "metrics.json"]
    assert log_lines(done.out)[-1] == dict(step=2, status="done")
    assert capsys.readouterr().out.endswith(f"done: log.jsonl, curves.png in {done.out}\n")


def test_metrics_are_the_last_line_of_the_log_or_those_given(begun):
    for metrics in (None, dict(top1=0.5)):
        done = begun(2, epoch=2, overwrite=True)
        for step in done.steps():
            done.watch(NORM, NORM)
            if done.logging:
                done.log("loss {loss}", loss=1.0 + step)
        with pytest.raises(SystemExit):
            done.done(metrics)
        assert metrics_of(done.out) == (metrics or losses(done.out)[-1])


def test_curves_run_by_step(begun):
    """A run that resumes from an earlier step may print more often than the log has lines there."""
    log = begun(8)
    lines = [f'{{"step": {step}, "loss": 1}}\n' for step in (2, 4, 6, 3, 4, 5, 6, 8)]
    (log.out / "log.jsonl").write_text("".join(lines))
    assert [entry["step"] for entry in log.entries()] == [2, 3, 4, 5, 6, 8]


# ---------------------------------------------------------------- the log
class Clock:
    """A time.time() that stands still until `now` is changed."""
    now = 0.0

    def time(self):
        return self.now

    def batches(self, seconds):
        while True:
            self.now += seconds
            yield "batch"


def test_speed_and_waiting_are_measured(begun, monkeypatch, capsys):
    """Of 5 seconds a step the loader takes 4: 8 images in 5 s, and 3 steps to go take 15 s.

    What a stage draws behind a line of the log is not in the rate.
    """
    clock = Clock()
    monkeypatch.setattr(run, "time", clock)
    timed, loader = begun(25, print_every=2), clock.batches(4.0)
    for step in timed.steps():
        assert timed.next(loader) == "batch"
        clock.now += 1.0
        timed.watch(NORM, NORM)
        if timed.logging:
            timed.log("loss {loss:.1f}", loss=0.25, lr=0.1)
            clock.now += 100 * (step == 3)
    entries = losses(timed.out)
    assert [entry["step"] for entry in entries] == [*range(2, 25, 2)]
    assert entries[0] == dict(epoch=1, step=2, loss=0.25, lr=0.1, images_per_s=1.6, waiting=0.8,
                              memory_mib=entries[0]["memory_mib"])
    assert entries[0]["memory_mib"] > 50 and entries[2]["images_per_s"] == 1.6
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[0] == "step 2/25 | loss 0.2 | 2 images/s, ETA 1:55" and lines[-1].endswith("ETA 0:05")


def test_a_loop_that_is_left_early_is_saved_and_finished(begun, capsys):
    early = begun(10, save_every=2)
    for step in early.steps():
        early.watch(NORM, NORM)
        if step == 4:
            break
    with pytest.raises(SystemExit) as stop:
        early.done(dict(score=1))
    assert stop.value.code == 0 and load_checkpoint(early.out / "checkpoint.pth")["step"] == 5
    assert log_lines(early.out)[-1] == dict(step=5, status="done")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        begun(10, save_every=2)
    assert stop.value.code == 0 and "this run is finished" in capsys.readouterr().out


def test_a_setting_that_no_checkpoint_may_hold_is_refused_before_the_first_step(begun):
    """A checkpoint with it would be refused when it is read."""
    with pytest.raises(TypeError, match=r"flat lists of these: .*\[\[1, 2\]\]"):
        begun(10, config=dict(stages=[[1, 2]]))
    begun(10, config=dict(stages=[1, 2], name=None))


def test_long_runs_tell_their_time_in_hours(begun, monkeypatch, capsys):
    """8 images in 5 s: 8 hours and 20 minutes for 6,000 steps more."""
    clock = Clock()
    monkeypatch.setattr(run, "time", clock)
    timed = begun(6001, print_every=1)
    next(timed.steps())
    clock.now += 5.0
    timed.watch(NORM, NORM)
    timed.log("loss {loss:.1f}", loss=0.25)
    assert capsys.readouterr().out.endswith("step 1/6001 | loss 0.2 | 2 images/s, ETA 8h20\n")


def test_average_over_two_processes(tmp_path):
    """And one process prints the lines and writes the log."""
    said, error = toy(tmp_path, ranks=2)
    lines = said.splitlines()
    assert error == "" and "2 process(es) on cpu" in lines[1] and lines[-1].startswith("done: ")
    assert lines[2].startswith("first step done after ")
    assert [line.split()[1] for line in lines[3:-1]] == [f"{step}/20" for step in range(2, 21, 2)]
    for entry in losses(tmp_path):
        assert entry["rank"] == 0.5 and entry["of_two"] == [[1.0, 0.5]]


@pytest.mark.parametrize("print_every", [1, 50])
def test_first_step_is_a_sign_of_life(print_every, begun, monkeypatch, capsys):
    """A line at once, of the log or of text."""
    clock = Clock()
    monkeypatch.setattr(run, "time", clock)
    slow = begun(100, print_every=print_every)
    for step in slow.steps():
        clock.now += 4.5
        slow.watch(NORM, NORM)
        if slow.logging:
            slow.log("loss {loss}", loss=1.0)
        if step == 1:
            break
    said = capsys.readouterr().out.splitlines()[2:]
    assert said[0].startswith("step 1/100 | loss 1.0" if print_every == 1 else "first step done after 4.5 s")
    assert len(said) == (2 if print_every == 1 else 1)


def test_what_is_read_is_said_before_it_is(capsys):
    parser = flags_parser()
    parser.add_argument("--data", default="my/pictures")
    parser.add_argument("--checkpoint", default="a.pth")
    with pytest.raises(SystemExit):
        launch(lambda args: None, parser, [])
    assert capsys.readouterr().out == "toy.py: reading a.pth and my/pictures\n"


def test_average_of_one_process_keeps_shapes(begun):
    mean = begun(1).average(a=torch.tensor(2), b=torch.tensor([[1.5], [2.5]], dtype=torch.float64))
    assert same(mean, dict(a=torch.tensor(2.0), b=torch.tensor([[1.5], [2.5]])))


def lines_of_a_run(begun):
    """A run of six steps that prints each: an epoch ends at steps 3 and 6, step 5 has collapsed."""
    talking = begun(6, epoch=3, print_every=1, overwrite=True)
    for step in talking.steps():
        talking.watch(NORM, NORM)
        talking.log("loss {loss}", loss=step + 0.5, **{"collapsed": "uniform"} if step == 4 else {})
    talking.say("the end")


def test_piped_output_is_plain_lines(begun, capsys):
    lines_of_a_run(begun)
    out = capsys.readouterr().out
    assert "\r" not in out and "\033" not in out
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{step}/6" for step in range(1, 7)]
    assert steps[4].endswith(" | collapsed: uniform")


def test_on_a_terminal_one_line_is_rewritten(begun, monkeypatch):
    """Between those that are kept: ends of epochs, collapses, and whatever is not a line of progress."""
    monkeypatch.setenv("COLUMNS", "30")
    reader, terminal = os.openpty()
    with open(terminal, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        lines_of_a_run(begun)
    written = ""
    with contextlib.suppress(OSError):                          # at the end, as nobody can write any more
        while True:
            written += os.read(reader, 100_000).decode()
    os.close(reader)
    shown = [line.split("\r\033[K")[1:] for line in written.replace("\r\n", "\n").split("\n")[:-1]]
    progress = [line for line in shown if line[-1].startswith("step ")]
    assert [[re.match(r"step \d", part)[0] for part in line] for line in progress] == [
        ["step 1", "step 2", "step 3"], ["step 4", "step 5"], ["step 6"]]
    assert shown[-1] == ["the end"] and len(shown) == len(progress) + 3
    replaced = [part for line in progress for part in line[:-1]]
    assert max(map(len, replaced)) == 29                        # one that wrapped could not be rewritten
