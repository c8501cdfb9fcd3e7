"""benchmarks/methods.py: how it chooses settings and goes on; its loop trains and repeats; our Barlow Twins
loss equals lightly's."""

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


@pytest.fixture
def made(monkeypatch):
    """The runs (settings, epochs, seed, final) that were made; a setting's score is what `scores` says."""
    scores, runs = {"a": 0.1, "b": 0.2, "c": 0.3, "x": 0.02, "y": 0.03, "z": 0.01}, []

    def result(method, settings, epochs, seed, parts, folder, final):
        runs.append((tuple(settings.values()), epochs, seed, final))
        return dict(method=method, settings=methods.words(settings), epochs=epochs, seed=seed,
                    held_out=sum(map(scores.get, settings.values())), knn=0.5 if final else "")

    monkeypatch.setattr(methods, "result", result)
    return runs


def test_axes_are_chosen_one_after_the_other_and_no_run_is_made_twice(made, tmp_path):
    axes = {"min-scale": ["a", "b", "c"], "lr": ["x", "y", "z"]}
    results = methods.Results("SEED", None, tmp_path)
    assert results.choose(axes) == {"min-scale": "c", "lr": "y"}
    assert made == [(("a", "y"), 1, 0, False), (("b", "y"), 1, 0, False), (("c", "y"), 1, 0, False),
                    (("c", "x"), 1, 0, False), (("c", "z"), 1, 0, False)]         # ("c", "y") is known
    again = methods.Results("SEED", None, tmp_path)              # as after a stop
    assert again.choose(axes) == {"min-scale": "c", "lr": "y"} and len(made) == 5


def test_the_chosen_settings_train_longer_with_each_seed(made, tmp_path, capsys):
    arguments = ["--methods", "SEED teacher", "--seeds", "3", "4", "--output-dir", str(tmp_path)]
    methods.main(parse_args(methods.get_parser(), arguments))
    assert made == [((), 2, 3, True), ((), 2, 4, True)]
    assert "| SEED teacher |  | 2 |" in capsys.readouterr().out


def test_the_loop_trains_and_repeats():
    def flags(seed):
        return parse_args(methods.pretrain.get_parser(),
                          ["--epochs", "1", "--warmup-epochs", "0", "--seed", str(seed)])

    args = flags(0)
    images = build_dataset("fashion-mnist", "train").subset(slice(2 * args.batch_size))

    def squared_distance(z1, z2):
        assert z1.shape == z2.shape == (args.batch_size, 4)
        losses.append((z1 - z2).square().mean())
        return losses[-1]

    runs = []
    for seed in (0, 0, 1):
        losses = []
        backbone = methods.train(squared_distance, (8, 4), images, flags(seed))
        assert len(losses) == 2
        runs.append(torch.cat([p.detach().flatten() for p in backbone.parameters()]))
    assert runs[0].isfinite().all() and runs[0].equal(runs[1]) and not runs[0].equal(runs[2])
