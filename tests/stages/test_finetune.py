"""The protocol as torch's own pieces do it, parts and metrics of small sets, and the grid: its cells are
plain runs, it goes on where it was killed, it chooses and tests one."""

import csv
import functools
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import assert_same_run, finish, log_lines, metrics_of, run, same, start, weights
from torch import nn

import finetune
import pretrained
import run as running
from checkpoint import UserError
from data import Batches, ImageSet, build_dataset, eval_batches, hold_out, input_of
from finetune import choose, join, loss_of, set_bn_momentum, table
from model import BatchNorm
from transfer_sets import SETS
from views import Views

GRID = "--grid --lrs 0.03 0.3 --weight-decays 0 0.003 --steps 6 --save-every 2 --print-every 1"


def small(network, out, flags=""):
    return (f"finetune.py --checkpoint {network} --data fake --batch-size 32 --steps 6 --print-every 2 "
            f"--output-dir {out} {flags}")


def predictions_of(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return [int(row["prediction"]) for row in csv.DictReader(file)]


# ---------------------------------------------------------------- the protocol
@pytest.mark.parametrize("flags", ["", "--bn-momentum 0.3 --interpolation bilinear --min-scale 0.5"])
def test_training_is_what_torchs_pieces_do(network, tmp_path, here, flags):
    """A second loop: Nesterov's momentum, a cosine by step, decay divided by the rate, batch norms' momentum.

    Of 512 images, 4 in a step: s = 128 steps an epoch, so a step's share is 10 / 128, not 0.1.
    """
    steps, lr, decay = 10, 0.05, 0.02
    here(small(network, tmp_path, f"--batch-size 4 --steps {steps} --lr {lr} --weight-decay {decay} {flags}"))
    backbone, config = pretrained.load_pretrained(network)
    size, mean, std = input_of(config)
    config["interpolation"] = "bilinear" if flags else "bicubic"
    whole = build_dataset("fake", "train")
    kept, held = hold_out(whole.labels, 0.2, 0)
    dataset = whole.subset(torch.cat([kept, held]))
    crop = dict(scale=(0.5 if flags else 0.4, 1), interpolation=config["interpolation"])
    views = Views([(size, crop)], mean, std)
    batches = Batches(dataset, 4, views, seed=0)
    torch.manual_seed(0)
    linear = nn.Linear(128, 10)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    model = nn.Sequential(backbone, linear).to(memory_format=torch.channels_last).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3 if flags else 1 - max(1 - 10 / 128, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=decay / lr, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for step in range(steps):
        images, uniforms, labels = batches[step]
        loss = F.cross_entropy(model(views(images, uniforms)[0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    state = weights(tmp_path)
    assert sum(name.endswith("running_var") for name in state) > 5
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(state[f"backbone.{name}"], value, rtol=2e-3, atol=2e-5, msg=name)
    torch.testing.assert_close(state["head.weight"], linear.weight.detach(), rtol=2e-3, atol=2e-5)

    # what was saved is what was reported
    model[0].load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True))
    model[1].load_state_dict({key: state[f"head.{key}"] for key in ("weight", "bias")})
    test, metrics = build_dataset("fake", "test"), metrics_of(tmp_path)
    with torch.no_grad():
        predicted = torch.cat([model.eval()(x) for x in eval_batches(test, config, "cpu", 32)]).argmax(1)
    assert predicted.tolist() == predictions_of(tmp_path)
    assert (predicted == test.labels).double().mean().item() == pytest.approx(metrics["test"], abs=1e-12)
    assert (metrics["num_train"], metrics["num_test"], metrics["metric"]) == (512, 256, "top-1")


@pytest.mark.parametrize("steps_per_epoch, share", [(3, 0.1), (100, 0.1), (200, 0.05), (10_000, 0.001)])
def test_momentum_of_batch_norms(steps_per_epoch, share):
    """max(1 - 10 / s, 0.9) is what is kept; both kinds of batch norms have it."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(BatchNorm(3)), nn.LayerNorm(3))
    set_bn_momentum(network, 0, steps_per_epoch)
    assert network[0].momentum == network[1][0].momentum == pytest.approx(share)
    assert network[0].momentum == pytest.approx(1 - max(1 - 10 / steps_per_epoch, 0.9))
    set_bn_momentum(network, 0.25, steps_per_epoch)
    assert network[0].momentum == 0.25 and not hasattr(network[2], "momentum")


def test_the_loss_of_several_labels():
    """The mean of binary losses over images and classes; 0, only difficult objects, is no object."""
    logits, labels = torch.randn(4, 3), torch.tensor([[1, -1, 0], [1, 1, -1], [0, 0, 0], [-1, -1, 1]])
    p, there = logits.sigmoid(), labels == 1
    torch.testing.assert_close(loss_of(logits, labels), -torch.where(there, p, 1 - p).log().mean())
    torch.testing.assert_close(loss_of(logits, labels[:, 0].clamp(0)),
                               -logits.log_softmax(1)[range(4), labels[:, 0].clamp(0)].mean())


def test_random_init_is_the_same_network_from_scratch(network, tmp_path, here):
    out, _ = here(f"{small(network, tmp_path)} --random-init --seed 5 --lr 1e-9 --steps 1")
    assert "resnet8, random weights" in out and metrics_of(tmp_path)["random_init"]
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)
    torch.manual_seed(5)
    fresh = finetune.build_backbone("resnet8").state_dict()
    torch.testing.assert_close(state["conv1.weight"], fresh["conv1.weight"], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- parts and metrics
def test_validation_images_are_left_out_and_scored(network, tmp_path, here):
    """A fifth of each class; with --label-fraction, of both parts."""
    out, _ = here(f"{small(network, tmp_path)} --validate --label-fraction 0.5")
    metrics = metrics_of(tmp_path)
    kept, held = hold_out(build_dataset("fake", "train").labels, 0.2, 0)
    assert metrics["num_train"] == round(len(kept) / 2) and metrics["num_validation"] == round(len(held) / 2)
    assert "test" not in metrics and f"validation images: top-1 {metrics['validation']:.4f}" in out
    with open(tmp_path / "predictions.csv", newline="") as file:
        labels = [int(row["label"]) for row in csv.DictReader(file)]
    assert len(labels) == metrics["num_validation"]
    assert np.ptp(np.bincount(labels, minlength=10)) <= 1       # as many of each class


def test_two_parts_are_joined():
    files = [ImageSet(None, torch.tensor([i]), ["a", "b"], np.array([name])) for i, name in
             enumerate((b"a.png", b"folder/longer.png"))]
    both = join(*files)
    assert both.paths.tolist() == [b"a.png", b"folder/longer.png"] and both.labels.tolist() == [0, 1]
    assert both.is_readable.tolist() == [True, True] and both.broken is not files[0].broken
    pixels = [ImageSet(torch.full((2, 1, 3, 3), i, dtype=torch.uint8), torch.tensor([i, i]), ["a", "b"])
              for i in range(2)]
    assert join(*pixels).images[:, 0, 0, 0].tolist() == join(*pixels).labels.tolist() == [0, 0, 1, 1]


COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
COUNTS = dict(classes=3, train=24, val=12, test=9)


def paint(path, colours):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.zeros((30, 34, 3), np.uint8) + 90
    for i, colour in enumerate(colours):
        picture[:, 10 * i:10 * i + 10] = colour
    Image.fromarray(picture).save(path, "PNG")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A small DTD and a small VOC2007, in their own formats; both have validation images of their own."""
    root = tmp_path_factory.mktemp("sets")
    (root / "dtd/dtd/labels").mkdir(parents=True)
    lists = root / "VOCdevkit/VOC2007/ImageSets/Main"
    lists.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        number, lines = COUNTS[part], []
        for i in range(number):
            name = ("banded", "dotted", "woven")[i % 3]
            lines.append(f"{name}/{name}_{part}{i}.jpg\n")
            paint(root / "dtd/dtd/images" / lines[-1].strip(), COLOURS[i % 3:i % 3 + 1] * 3)
        (root / f"dtd/dtd/labels/{part}1.txt").write_text("".join(lines))
        labels = rng.choice([1, -1, 0], (number, 3), p=[0.5, 0.4, 0.1])
        labels[:3] = [[1, -1, 0], [0, 1, -1], [-1, 0, 1]]
        for i, row in enumerate(labels):
            shown = [colour for colour, label in zip(COLOURS, row, strict=True) if label == 1]
            paint(root / f"VOCdevkit/VOC2007/JPEGImages/{part}{i:03d}.jpg", shown)
        for name, column in zip(("car", "cat", "dog"), labels.T, strict=True):
            rows = [f"{part}{i:03d} {label:2d}\n" for i, label in enumerate(column)]
            (lists / f"{name}_{part}.txt").write_text("".join(rows))
    return root


@pytest.fixture
def of_these_sizes(monkeypatch):
    for name in ("dtd", "voc07"):
        monkeypatch.setitem(SETS, name, SETS[name]._replace(**COUNTS))


def test_a_set_of_table_4_with_validation_images(network, sets, of_these_sizes, tmp_path, here):
    flags = f"--data dtd --data-dir {sets} --batch-size 8 --workers 0"
    here(f"{small(network, tmp_path / 'val', flags)} --validate")
    here(f"{small(network, tmp_path / 'test', flags)} --steps 40 --resize-side 16")
    validated, tested = metrics_of(tmp_path / "val"), metrics_of(tmp_path / "test")
    assert (validated["num_train"], validated["num_validation"]) == (24, 12)
    assert (tested["num_train"], tested["num_test"], tested["metric"]) == (36, 9, "top-1")
    assert tested["test"] == 1                                  # each class has its colour
    rows = (tmp_path / "test/predictions.csv").read_text().splitlines()
    assert f"{sets}/dtd/dtd/images/banded/banded_test0.jpg,0,0" in rows and len(rows) == 10


def eleven_points(scores, truth):
    """As VOC's development kit has it: at each recall the best precision at that recall or a higher one."""
    order = np.argsort(-scores)
    hits = np.cumsum(truth[order])
    recall, precision = hits / truth.sum(), hits / np.arange(1, len(hits) + 1)
    return np.mean([max(precision[recall >= t - 1e-9], default=0) for t in np.linspace(0, 1, 11)])


def test_voc_has_binary_losses_and_11_point_map(network, sets, of_these_sizes, tmp_path, here):
    """The metric of the saved network, by hand; difficult objects are left out of the test."""
    here(small(network, tmp_path, f"--data voc07 --data-dir {sets} --batch-size 36 --steps 30 --workers 0"))
    metrics, state = metrics_of(tmp_path), weights(tmp_path)
    assert (metrics["metric"], metrics["num_train"], metrics["num_test"]) == ("11-point mAP", 36, 9)
    assert not (tmp_path / "predictions.csv").exists() and state["head.weight"].shape == (3, 128)
    backbone, config = pretrained.load_pretrained(tmp_path / "backbone.pth")
    test = finetune.read_set("voc07", sets)["test"]
    linear = nn.Linear(128, 3)
    linear.load_state_dict({key: state[f"head.{key}"] for key in ("weight", "bias")})
    with torch.no_grad():
        scores = torch.cat([linear(backbone.eval()(x)) for x in eval_batches(test, config, "cpu")]).numpy()
    labels = test.labels.numpy()
    aps = [eleven_points(f[y != 0], y[y != 0] == 1) for f, y in zip(scores.T, labels.T, strict=True)]
    assert (labels == 0).sum() >= 3 and metrics["test"] == pytest.approx(np.mean(aps), abs=1e-9)
    first = log_lines(tmp_path)[1]["loss"]
    assert first == pytest.approx(np.log(2), abs=0.1)           # of three binary losses the mean, not the sum


# ---------------------------------------------------------------- the grid
@pytest.fixture(scope="module")
def grid(network, tmp_path_factory):
    """(command, folder, stdout) of an undisturbed grid of four cells, in a process of its own."""
    out = tmp_path_factory.mktemp("grid") / "whole"
    said, _ = run(small(network, out, GRID))
    return said, out


def test_a_grid_validates_each_cell_and_tests_one(grid, network, tmp_path, here):
    """Each cell is the plain run of the same flags, bit for bit; the best is trained on all and tested."""
    said, out = grid
    cells = [f"lr{lr}_wd{decay}" for lr in ("0.03", "0.3") for decay in ("0", "0.003")]
    found, chosen = {name: metrics_of(out / name) for name in cells}, metrics_of(out)
    assert all("test" not in metrics for metrics in found.values())
    best = max(found, key=lambda name: (found[name]["validation"], found[name]["weight_decay"],
                                        -found[name]["lr"]))
    assert {path.name for path in out.iterdir()} == {*cells, f"{best}_test", "metrics.json"}
    assert (chosen["lr"], chosen["weight_decay"]) == (found[best]["lr"], found[best]["weight_decay"])
    assert chosen["num_train"] == 512 == 100 + found[best]["num_train"]
    assert chosen["test"] == metrics_of(out / f"{best}_test")["test"]
    assert chosen["validation"] == found[best]["validation"] and len(chosen["grid"]) == 4
    assert len(predictions_of(out / f"{best}_test")) == 256
    for metrics in found.values():
        assert f"{metrics['validation']:.4f}" in said.split("validation top-1:")[1]
    assert f"test top-1 {chosen['test']:.4f}" in said.splitlines()[-1]
    assert chosen["command"] == f"python {small(network, out, GRID)}"        # which a report shows

    plain = "--save-every 2 --print-every 1 --lr 0.3 --weight-decay 0.003 --validate"
    here(small(network, tmp_path / "plain", plain))
    assert_same_run(out / "lr0.3_wd0.003", tmp_path / "plain")
    said, _ = here(small(network, out, GRID))                   # everything is there: nothing is trained
    assert said.count("this run is finished") == 5 and "step 6/6" not in said
    assert metrics_of(out) | {"command": chosen["command"]} == chosen


def test_a_grid_of_another_network_is_refused(network, tmp_path, here):
    shutil.copy(network, tmp_path / "network.pth")
    here(small(tmp_path / "network.pth", tmp_path / "out", "--lr 0.03"))
    state = torch.load(tmp_path / "network.pth", weights_only=True)
    next(value for value in state["model"].values() if value.is_floating_point()).add_(1)
    torch.save(state, tmp_path / "network.pth")
    _, err = here(small(tmp_path / "network.pth", tmp_path / "out", "--lr 0.03"), 2)
    assert err.count("\n") == 1 and "backbone_sha256 was" in err
    assert "put the files back as they were, another --output-dir, or --overwrite" in err


def die_after_a_save(number):
    """From now on this process kills itself when it has written a checkpoint for the number-th time."""
    save, saved = running.save_checkpoint, []

    def save_and_die(path, state):
        save(path, state)
        saved.append(path)
        if len(saved) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    running.save_checkpoint = save_and_die


def test_a_killed_grid_goes_on_at_the_first_missing_cell(grid, network, tmp_path):
    """Killed in the second of four cells, at step 4; the first is not touched, the rest as undisturbed."""
    _, undisturbed = grid
    command, out = small(network, tmp_path / "grid", GRID), tmp_path / "grid"
    finish(start(command, prepare=functools.partial(die_after_a_save, 3 + 2)), -signal.SIGKILL)
    assert (out / "lr0.03_wd0/metrics.json").exists() and not (out / "lr0.03_wd0.003/metrics.json").exists()
    assert not (out / "metrics.json").exists() and not (out / "lr0.3_wd0").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "lr0.03_wd0").iterdir()
              if path.name not in (".lock", "config.json")}
    said, _ = finish(start(command))
    assert "resumed from step 4" in said and said.count("this run is finished") == 1
    assert all((out / "lr0.03_wd0" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert metrics_of(out) | {"command": ""} == metrics_of(undisturbed) | {"command": ""}
    for cell in undisturbed.glob("lr*"):
        assert_same_run(cell, out / cell.name)


def stop_in(number):
    """The number-th step of this process gets SIGTERM."""
    watch, steps = running.Run.watch, []

    def watch_and_stop(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        watch(self, *args, **kwargs)
    running.Run.watch = watch_and_stop


def stop_between():
    """This process gets SIGTERM where the first of its runs is done, and the next one has not begun."""
    train, calls = finetune.train_once, []

    def stop_before(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        train(*args, **kwargs)
    finetune.train_once = stop_before


def test_a_signal_stops_the_whole_grid(grid, network, tmp_path):
    """In the second cell, after its step; and between two cells, where nothing is lost either."""
    command, out = small(network, tmp_path / "grid", GRID), tmp_path / "grid"
    said, _ = finish(start(command, prepare=functools.partial(stop_in, 9)), 128 + signal.SIGTERM)
    assert "stopped by SIGTERM after step 3, saved" in said and not (out / "lr0.3_wd0").exists()
    command, out = small(network, tmp_path / "between", GRID), tmp_path / "between"
    finish(start(command, prepare=stop_between), 128 + signal.SIGTERM)
    assert [path.name for path in out.iterdir()] == ["lr0.03_wd0"]
    assert same(weights(out / "lr0.03_wd0"), weights(grid[1] / "lr0.03_wd0"))


def test_a_cell_that_diverges_is_not_chosen(network, tmp_path, here):
    """Others go on; the table says so. If all diverge, that is one line."""
    flags = "--grid --lrs 1e30 0.1 --weight-decays 0"
    said, err = here(small(network, tmp_path / "one", flags))
    assert "diverged" in said and "chosen: lr 0.1, weight decay 0" in said and err.count("is not finite") == 1
    assert [row["validation"] is None for row in metrics_of(tmp_path / "one")["grid"]] == [True, False]
    _, err = here(small(network, tmp_path / "all", "--grid --lrs 1e30 --weight-decays 0"), 2)
    assert "--lrs: all runs of the grid diverged; try lower" in err.splitlines()[-1]
    assert not (tmp_path / "all/metrics.json").exists()


def test_of_equals_the_strongest_decay():
    cells = {(0.1, 0): 0.9, (0.1, 1e-4): 0.9, (0.01, 1e-4): 0.9, (0.01, 0): 0.9, (1.0, 1e-3): None,
             (0.01, 1e-2): 0.89}
    assert choose(cells) == (0.01, 1e-4)
    assert choose(cells | {(0.1, 0): 0.91}) == (0.1, 0)
    with pytest.raises(UserError, match="all runs of the grid diverged"):
        choose({(1.0, 1e-3): None})
    lines = table({(0.1, 0): 0.9, (0.01, 0): None, (0.1, 1e-4): 0.8, (0.01, 1e-4): 0.7})
    assert [line.split() for line in lines] == [
        ["weight", "decay", "0", "0.0001"], ["lr", "0.01", "diverged", "0.7000"],
        ["lr", "0.1", "0.9000", "0.8000"]]


def test_two_processes_share_the_runs_of_a_grid(network, tmp_path, here):
    """A diverging cell among them. The last is still a plain run of two: batch norms are by process."""
    flags = "--grid --lrs 1e30 0.1 --weight-decays 0 --print-every 1"
    run(small(network, tmp_path / "plain", "--lr 0.1 --print-every 1"), ranks=2)
    said, _ = run(small(network, tmp_path / "grid", flags), ranks=2)
    metrics, tested = metrics_of(tmp_path / "grid"), tmp_path / "grid/lr0.1_wd0_test"
    assert_same_run(tmp_path / "plain", tested)
    assert "2 process(es) on cpu" in said and said.count("chosen: lr 0.1") == 1
    before = predictions_of(tested)
    assert metrics["num_test"] == 256 == len(before)
    (tested / "metrics.json").unlink()
    here(small(network, tested, "--lr 0.1 --print-every 1"))    # scored again, by one process
    assert metrics_of(tested)["test"] == metrics["test"] and predictions_of(tested) == before


# ---------------------------------------------------------------- misuse
@pytest.mark.parametrize("bad, code, names", [
    ("--lr 0", 2, "--lr: 0: must be"), ("--steps 0", 2, "--steps: 0: must"), ("--bn-momentum 1", 2, "--bn-"),
    ("--min-scale 2", 2, "--min-scale 2.0: must be"), ("--resize-side 15", 2, "at least the 16 pixels"),
    ("--batch-size 513", 2, "at most the 512 training images"),
    ("--batch-size 64 --validate --label-fraction 0.1", 2, "at most the 41 training images"),
    ("--label-fraction 0.01", 2, "no image of class"), ("--label-fraction 2", 2, "--label-fraction 2.0"),
    ("--grid --validate", 2, "--validate: is what --grid"), ("--grid --resume {network}", 2, "--grid has"),
    ("--data pets --val-share 0.2", 2, "--data pets: has parts and classes of its own; leave --val-share"),
    ("--data pets", 2, "--data pets: there is no "), ("--data nowhere", 2, "neither a data set"),
    ("--grid --batch-size 513", 2, "at most the 4"), ("--lr 1e30", 3, "is not finite (lr"),
    ("--lrs 5 7", 2, "only --grid tries them")])
def test_bad_input_is_one_line(network, bad, code, names, tmp_path, here):
    command = small(network, tmp_path / "out", bad.format(network=network))
    _, err = here(f"{command} --data-dir {tmp_path}", code)
    assert err.count("\n") == 1 and names in err and "--datasets" not in err, err
    assert not (tmp_path / "out" / "metrics.json").exists()
    if code == 2:
        assert not (tmp_path / "out").exists()


def test_several_classes_for_an_image_are_not_drawn_by_class(network, sets, of_these_sizes, tmp_path, here):
    flags = f"--data voc07 --data-dir {sets} --label-fraction 0.5"
    _, err = here(small(network, tmp_path / "out", flags), 2)
    assert err.count("\n") == 1 and "have several classes each; leave it out" in err


def test_a_grid_of_other_flags_is_refused(grid, network, tmp_path, here):
    """And more learning rates may be added: the runs that are there are kept."""
    shutil.copytree(grid[1], tmp_path / "grid")
    for path in (tmp_path / "grid").rglob(".lock"):
        path.unlink()
    _, err = here(small(network, tmp_path / "grid", f"{GRID} --batch-size 64"), 2)
    assert err.count("\n") == 1 and "batch_size was 32, is 64" in err
    said, _ = here(small(network, tmp_path / "grid", GRID.replace("--lrs ", "--lrs 0.1 ")))
    assert said.count("this run is finished") >= 4 and len(metrics_of(tmp_path / "grid")["grid"]) == 6
    assert json.loads((tmp_path / "grid/lr0.1_wd0/config.json").read_text())["lr"] == 0.1
    _, err = here(small(network, tmp_path / "grid/lr0.1_wd0", GRID), 2)
    assert "holds a training run; choose another" in err
    assert same(weights(tmp_path / "grid/lr0.3_wd0"), weights(grid[1] / "lr0.3_wd0"))
