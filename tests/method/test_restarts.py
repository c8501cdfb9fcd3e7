"""Restarts: candidates take 3/8 of the schedule each; the one that agrees most with the others goes on."""

import copy
from types import SimpleNamespace

import pytest
import torch
from processes import log_lines, run, same
from torch import nn

import pretrain
from checkpoint import UserError, load_checkpoint, save_checkpoint
from cli import parse_args
from data import Batches, build_dataset
from loss import twist_loss
from optim import warmup_cosine
from restarts import Restarts, agreement, on_fresh_views
from views import build_views

SMALL = "--data fake --image-size 16 --batch-size 64 --hidden-dim 32 --print-every 1 --knn-every 0"
ARGS = SimpleNamespace(restarts=3, seed=0, drop_path=0.0, zero_init_residual=False)


class Log:
    """Stands for a Run: a step, and what was written."""

    def __init__(self):
        self.step, self.entries = 0, []

    def say(self, line):
        pass

    def write(self, entry):
        self.entries.append(entry)


def states(*parts):
    return copy.deepcopy([part.state_dict() for part in parts])


ONE, OTHER, THIRD = [0, 0, 1, 1], [3, 3, 2, 2], [0, 1, 1, 1]        # ONE and OTHER differ in numbers only


@pytest.mark.parametrize(("found", "losses", "best"), [
    ([ONE, THIRD, OTHER], [2, 1, 3], 1),                 # the first and the third agree: the loss decides
    ([ONE, THIRD, OTHER], [3, 1, 2], 3),
    ([THIRD, ONE, OTHER], [1, 3, 2], 3),
    ([ONE, ONE, OTHER], [3, 1, 2], 2)])
def test_the_candidate_that_agrees_most_goes_on(found, losses, best, monkeypatch):
    torch.manual_seed(0)
    model, teacher = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    begun, ended, log, schedule = [], {}, Log(), []
    given = zip(losses, found, strict=True)

    def new_network(config, drop_path):
        begun.append(1 + len(begun))
        network = nn.BatchNorm1d(4)
        nn.init.constant_(network.weight, begun[-1])
        return network

    def fresh(network, *_):
        network(torch.randn(8, 4))                       # moves the running statistics, as the real one does
        loss, classes = next(given)
        return float(loss), torch.tensor(classes)

    monkeypatch.setattr("restarts.build_network", new_network)
    monkeypatch.setattr("restarts.on_fresh_views", fresh)
    restarts = Restarts(ARGS, {}, None, 28, None, model, teacher, optimizer)
    assert (restarts.trial, restarts.schedule_steps) == (6, 16)
    for log.step in range(28):
        before = states(model, teacher, optimizer)
        step = restarts.begin(log)
        schedule.append(step)
        if log.step in (6, 12, 18):
            ended[log.step // 6] = before
        if step == 0 and log.step:                       # a candidate begins: its weights, and no moments
            assert (model.weight == begun[-1]).all() and (teacher.weight == begun[-1]).all()
            assert not optimizer.state
        if log.step == 18:
            now = states(model, teacher, optimizer)
            assert same(now[0], ended[best][0]) and same(now[1], ended[best][1])
            assert same(now[2]["state"][0], ended[best][2]["state"][0])
        optimizer.zero_grad()
        (model(torch.randn(8, 4)) ** 2 * torch.arange(4)).sum().backward()
        optimizer.step()
        teacher.load_state_dict(model.state_dict())
    assert begun == [1, 2] and schedule == [*range(6)] * 2 + [*range(16)]
    assert [entry["fresh_views_loss"] for entry in log.entries[:3]] == losses
    chosen = log.entries[3]
    assert (chosen["step"], chosen["chosen"]) == (18, best) and not restarts.state_dict()
    assert chosen["agreement"] == pytest.approx(agreement(list(map(torch.tensor, found))))


def test_agreement_is_the_mean_share_of_images_in_matched_classes():
    found = [torch.tensor(classes) for classes in (ONE, OTHER, THIRD)]
    assert agreement(found) == pytest.approx([(1 + 0.75) / 2, (1 + 0.75) / 2, 0.75])
    assert agreement(found[::2]) == pytest.approx([0.75, 0.75])          # of two, the loss decides
    many = torch.arange(3).repeat_interleave(2)
    assert agreement([many, torch.zeros(6, dtype=torch.int64)]) == pytest.approx([1 / 3, 1 / 3])


def test_one_candidate_is_a_plain_run():
    args = SimpleNamespace(**vars(ARGS) | dict(restarts=1))
    restarts = Restarts(args, {}, None, 20, None, nn.Linear(1, 1), None, None)
    assert restarts.schedule_steps == 20
    assert [restarts.begin(SimpleNamespace(step=step)) for step in range(20)] == [*range(20)]


@pytest.mark.parametrize(("count", "trial", "schedule_steps"), [(2, 510, 1362), (4, 330, 882), (8, 193, 521)])
def test_a_candidate_takes_three_eighths_of_a_schedule(count, trial, schedule_steps):
    args = SimpleNamespace(**vars(ARGS) | dict(restarts=count))
    restarts = Restarts(args, {}, None, 1872, None, nn.Linear(1, 1), None, None)
    assert (restarts.trial, restarts.schedule_steps) == (trial, schedule_steps)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("total_steps", [1, 2, 5, 6, 7, 100])
def test_the_schedule_ends_with_the_run(count, total_steps, monkeypatch):
    model = nn.Linear(1, 1)
    optimizer, log = torch.optim.AdamW(model.parameters()), Log()
    monkeypatch.setattr("restarts.build_network", lambda config, drop_path: nn.Linear(1, 1))
    monkeypatch.setattr("restarts.on_fresh_views", lambda *_: (0.0, torch.arange(4)))
    args = SimpleNamespace(**vars(ARGS) | dict(restarts=count))
    restarts = Restarts(args, {}, None, total_steps, None, model, None, optimizer)
    schedule = []
    for log.step in range(total_steps):
        schedule.append(restarts.begin(log))
    assert 0 <= min(schedule) and schedule[-1] == max(schedule) == restarts.schedule_steps - 1


def test_loss_and_classes_are_those_of_all_images_together():
    args = parse_args(pretrain.get_parser(), SMALL.split())
    dataset = build_dataset("fake", "pretrain", 0, "datasets")
    views = build_views("barlow", (0.5,), (0.5,), 16)
    seen = []

    class Model(nn.Module):                              # its logits are ten pixels
        def forward(self, x):
            seen.append([view.flatten(1)[:, :10] for view in x])
            return torch.stack(seen[-1])
    batches = Batches(dataset, 64, views, 0)
    loss, classes = on_fresh_views(Model(), batches, args, torch.device("cpu"), num_images=200)
    assert len(seen) == 3                                # whole batches only
    joined = torch.stack([torch.cat(view) for view in zip(*seen, strict=True)])       # [2, 192, 10]
    assert loss == pytest.approx(twist_loss(joined).total.item(), abs=1e-6)
    assert torch.equal(classes, joined.softmax(-1).mean(0).argmax(-1))
    images, uniforms, _ = batches[0]
    assert not torch.equal(seen[0][0], views(images, uniforms)[0].flatten(1)[:, :10])


def test_a_run_with_restarts_goes_on_with_the_best_candidate(tmp_path):
    """The first candidate takes the steps of a plain run; each begins with the warm-up."""
    flags = f"{SMALL} --epochs 2 --warmup-epochs 0.25"
    said, _ = run(f"pretrain.py {flags} --restarts 3 --output-dir {tmp_path}/three")
    lines = log_lines(tmp_path / "three")
    candidates = [line for line in lines if "candidate" in line]
    assert [(line["candidate"], line["step"]) for line in candidates] == [(1, 3), (2, 6), (3, 9)]
    losses = [line["fresh_views_loss"] for line in candidates]
    [choice] = [line for line in lines if "chosen" in line]
    best = max(range(3), key=lambda i: (choice["agreement"][i], -losses[i]))
    assert choice["chosen"] == best + 1 and len(set(losses)) == 3
    assert f"candidate {best + 1} goes on" in said
    steps = [line for line in lines if "loss" in line]
    rates = [line["lr"] for line in steps]
    assert len(rates) == 16 and rates[:3] == rates[3:6] == rates[6:9]
    schedule = [warmup_cosine(step, 10, 2, max(rates), 0.001 * max(rates)) for step in range(10)]
    assert rates[6:] == pytest.approx(schedule)          # the last one takes all of it
    run(f"pretrain.py {flags} --restarts 1 --output-dir {tmp_path}/one")
    plain = [line for line in log_lines(tmp_path / "one") if "loss" in line]
    assert [line["loss"] for line in plain[:3]] == [line["loss"] for line in steps[:3]]
    final = load_checkpoint(tmp_path / "three" / "checkpoint.pth")
    assert final["restarts"] == []                       # the candidates are not kept


@pytest.mark.parametrize("old", [{}, dict(number=1, loss=-0.9, states=[]),
                                 [dict(loss=-0.9, classes=torch.tensor([0]), states=[{}, {}])]])
def test_restarts_of_an_older_version_are_refused_and_its_plain_runs_are_not(old):
    """Their schedule was another one."""
    restarts = Restarts(ARGS, {}, None, 28, None, nn.Linear(1, 1), None, None)
    with pytest.raises(UserError, match="anew with --overwrite"):
        restarts.load_state_dict(old)
    args = SimpleNamespace(**vars(ARGS) | dict(restarts=1))
    plain = Restarts(args, {}, None, 28, None, nn.Linear(1, 1), None, None)
    plain.load_state_dict({})
    assert plain.state_dict() == []


def test_a_warm_up_as_long_as_the_shortened_schedule_is_refused():
    restarts = Restarts(ARGS, {}, None, 28, None, nn.Linear(1, 1), None, None)
    assert restarts.schedule_steps_after(15) == restarts.schedule_steps_after(28) == 16
    with pytest.raises(UserError, match="is 16 steps.*--restarts 3.*choose"):
        restarts.schedule_steps_after(16)


def test_a_checkpoint_of_many_candidates_is_readable(tmp_path):
    """Each candidate is one tensor, so a deep network's do not exceed what a checkpoint may hold."""
    model = nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(500)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 1)).square().sum().backward()
    optimizer.step()
    args = SimpleNamespace(**vars(ARGS) | dict(restarts=8))
    restarts = Restarts(args, {}, None, 290, None, model, None, optimizer)
    for number in range(1, 8):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("restarts.on_fresh_views", lambda *_: (0.0, torch.tensor([0])))
            restarts.keep(number, Log())
    save_checkpoint(tmp_path / "checkpoint.pth", dict(
        model=model.state_dict(), config={}, restarts=restarts.state_dict()))
    found = load_checkpoint(tmp_path / "checkpoint.pth")["restarts"]
    assert same(found, restarts.state_dict())


def test_a_new_candidate_leaves_the_generators_of_gpus_alone(monkeypatch):
    """They draw the noise, which differs between ranks."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded a GPU"))
    monkeypatch.setattr("restarts.build_network", lambda *_: nn.Linear(1, 1))
    model = nn.Linear(1, 1)
    model(torch.ones(1, 1)).sum().backward()
    before = torch.get_rng_state()
    Restarts(ARGS, {}, None, 28, None, model, None, torch.optim.AdamW(model.parameters())).begin_anew(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.weight.grad is None                     # nor does it begin with a gradient of the last one


@pytest.mark.slow
def test_two_processes_choose_as_one(tmp_path):
    flags = f"{SMALL} --epochs 1 --ema 0.9"
    run(f"pretrain.py {flags} --output-dir {tmp_path}/one")
    run(f"pretrain.py {flags} --output-dir {tmp_path}/two", ranks=2)
    one, two = ([line for line in log_lines(tmp_path / name) if {"candidate", "chosen"} & line.keys()]
                for name in ("one", "two"))
    assert [line["step"] for line in one] == [1, 2, 3, 4, 4]
    for mine, theirs in zip(one, two, strict=True):
        assert mine.pop("agreement", None) == pytest.approx(theirs.pop("agreement", None), abs=2e-3)
        assert mine == pytest.approx(theirs, abs=1e-4)
