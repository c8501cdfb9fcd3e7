"""curves.png shows the terms, the bounds and the accuracies of a run, and never ends it."""

import math
from types import SimpleNamespace

import pytest
import torch
from processes import losses

from loss import twist_loss
from model import BatchNorm
from pictures import _plot_curves, draw_curves, sharpest_with_nbs

CONFIG = dict(loss="twist", data="fake", output_dir="runs/a", num_classes=10, batch_size=64, alpha=1.0,
              beta=1.0, nbs=True)
TERMS = dict(consistency=0.3, sharpness=1.5, diversity=2.0)
ENTRIES = [dict(step=10 * i, loss=0.5 - 0.1 * i, **TERMS) for i in (1, 2, 3)]


def lines_of(entries, config):
    """{label: line} and the title of a figure that is drawn."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    _plot_curves(figure, entries, config)
    figure.draw_without_rendering()
    lines = sum((axes.get_lines() for axes in figure.axes), [])
    return {line.get_label(): line for line in lines}, figure.get_suptitle()


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_no_logits_after_nbs_have_a_lower_loss(num_classes):
    """The bound is reached by balanced classes, and gradient descent on the logits themselves ends there."""
    bound = sharpest_with_nbs(num_classes) - math.log(num_classes)
    norm = BatchNorm(num_classes, affine=False)
    images = torch.eye(num_classes).repeat(6, 1)
    best = twist_loss(norm(images)[None].expand(2, -1, -1), eps=0).total.item()
    assert best == pytest.approx(bound, abs=1e-4)              # NBS adds 1e-5 to the variance
    logits = torch.randn(6 * num_classes, num_classes, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam([logits.requires_grad_()], lr=0.1)
    for _ in range(200):
        loss = twist_loss(norm(logits)[None].expand(2, -1, -1), eps=0).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert bound - 1e-4 < loss.item() < bound + 0.02


def test_curves_have_the_bound_that_holds():
    for change, label, bound in (
            ({}, "10 balanced classes, as sharp as NBS allows", 1.0886 - math.log(10)),
            ({"alpha": 0.4}, "10 balanced classes, as sharp as NBS allows", 0.4 * 1.0886 - math.log(10)),
            ({"nbs": False}, "lower bound", -math.log(10)), ({"batch_size": 8}, "lower bound", -math.log(8))):
        lines, title = lines_of(ENTRIES, CONFIG | change)
        assert lines[label].get_ydata()[0] == pytest.approx(bound, abs=1e-3)
        assert lines["loss"].get_ydata() == pytest.approx([0.4, 0.3, 0.2])
        assert title == "fake, runs/a: step 30"


def test_accuracies_are_drawn_where_they_were_measured():
    entries = [*ENTRIES[:2], ENTRIES[2] | {"knn_monitor": 0.8, "acc_monitor": 0.6}]
    lines, title = lines_of(entries, CONFIG)
    assert title == "fake, runs/a: step 30, 20-NN 0.800, ACC 0.600"
    assert lines["20-NN (right axis)"].get_xydata().tolist() == [[30, 0.8]]
    assert lines["ACC (right axis)"].get_xydata().tolist() == [[30, 0.6]]
    barlow = [dict(step=1, loss=3.0, invariance=2.0, redundancy=200.0, knn_monitor=0.5)]
    lines, title = lines_of(barlow, dict(loss="barlow", lambd=0.005, data="fake", output_dir="b"))
    assert title == "fake, b: step 1, 20-NN 0.500" and "ACC (right axis)" not in lines


def test_of_a_loss_of_ones_own_the_loss_is_drawn():
    lines, title = lines_of([dict(step=i, loss=3.0 - i, variance=1.0) for i in (1, 2)],
                            dict(loss="mine", data="fake", output_dir="m"))
    assert list(lines) == ["loss"] and lines["loss"].get_ydata().tolist() == [2, 1]
    assert title == "fake, m: step 2"


def test_a_picture_that_fails_costs_a_line(tmp_path, capsys):
    run = SimpleNamespace(rank=0, out=tmp_path, entries=lambda: [{"step": 1}])
    draw_curves(run, CONFIG)
    assert f"{tmp_path}/curves.png is not drawn: 'consistency'" in capsys.readouterr().out
    run.out = tmp_path / "nowhere"
    run.entries = lambda: ENTRIES
    draw_curves(run, CONFIG)
    assert "curves.png is not drawn: " in capsys.readouterr().out and not list(tmp_path.iterdir())
    run.rank, run.entries = 1, None                            # of several processes the first one draws
    draw_curves(run, CONFIG)


def test_curves_are_drawn_after_each_epoch(here, monkeypatch, tmp_path):
    """From the log so far, so a run can be watched by its picture."""
    import pretrain
    drawn = []

    def draw(run, config):
        drawn.append([entry["step"] for entry in run.entries()])
        draw_curves(run, config)
        assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(pretrain, "draw_curves", draw)
    here(f"pretrain.py --data fake --image-size 16 --batch-size 128 --epochs 3 --restarts 1 --hidden-dim 16 "
         f"--print-every 2 --output-dir {tmp_path}/run", pictures=True)
    assert drawn == [[2, 4], [2, 4, 6, 8], [2, 4, 6, 8, 10, 12]] and len(losses(tmp_path / "run")) == 6
