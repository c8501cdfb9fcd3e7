"""benchmarks/methods.py: its loop trains and repeats, and our Barlow Twins loss equals lightly's."""

import sys
from pathlib import Path

import pytest
import torch

from checkpoint import UserError
from cli import parse_args
from data import build_dataset
from loss import barlow_twins_loss

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import methods  # noqa: E402


def test_without_lightly_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    with pytest.raises(UserError, match="pip install --no-deps lightly=="):
        methods.main(parse_args(methods.get_parser(), ["--methods", "TWIST", "SimCLR"]))


def test_barlow_twins_equals_lightlys():
    losses = pytest.importorskip("lightly.loss")
    torch.manual_seed(0)
    ours = torch.randn(2, 12, 5, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    a, b = barlow_twins_loss(*ours, lambd=0.02), losses.BarlowTwinsLoss(lambda_param=0.02)(*theirs)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_loop_trains_and_repeats():
    args = parse_args(methods.pretrain.get_parser(), ["--epochs", "1", "--warmup-epochs", "0"])
    images = build_dataset("fashion-mnist", "train").subset(slice(2 * args.batch_size))

    def squared_distance(z1, z2):
        assert z1.shape == z2.shape == (args.batch_size, 4)
        losses.append((z1 - z2).square().mean())
        return losses[-1]

    runs = []
    for seed in (0, 0, 1):
        losses = []
        backbone = methods.train(squared_distance, (8, 4), 1e-3, images, args, seed)
        assert len(losses) == 2
        runs.append(torch.cat([p.detach().flatten() for p in backbone.parameters()]))
    assert runs[0].isfinite().all() and runs[0].equal(runs[1]) and not runs[0].equal(runs[2])
