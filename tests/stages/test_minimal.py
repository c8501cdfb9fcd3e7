"""`minimal.py` is the same method as `pretrain.py`: its loss, its steps, its views, and what it reaches."""

import runpy
import sys

import pytest
import torch
from processes import ROOT

import minimal
from checkpoint import load_checkpoint
from data import Batches, build_dataset, input_of
from loss import twist_loss
from model import build_network
from views import build_views


def test_loss():
    """In value and gradient, also where classes are unused."""
    for scale in (0.1, 1, 30):
        logits = (scale * torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(0))).double()
        ours, real = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = minimal.twist_loss(*ours)
        total = twist_loss(real).total
        torch.testing.assert_close(loss, total, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(*pair)[0] for pair in ((loss, ours), (total, real))))


def test_steps(here, tmp_path, monkeypatch):
    """From the same weights, with the same views, four steps of both change the weights alike."""
    here("pretrain.py --data fake --views moco --image-size 20 --restarts 1 --epochs 1 --warmup-epochs 1 "
         f"--weight-decay 0 --knn-every 0 --device cpu --output-dir {tmp_path}")
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    torch.manual_seed(0)
    twist = build_network(state["config"])
    views = build_views("moco", *input_of(state["config"])[1:], 20)
    batches = Batches(build_dataset("fake", "pretrain"), 128, views, seed=0)
    made = [x for step in range(4) for x in views(*batches[step][:2])]
    network, optimizer = minimal.begin(seed=0)
    network.load_state_dict(dict(zip(network.state_dict(), twist.state_dict().values(), strict=True)))

    monkeypatch.setattr(minimal, "WARMUP", 4)
    monkeypatch.setattr(minimal, "random_view", lambda x: made.pop(0))
    minimal.train(network, optimizer, torch.zeros(512, 1), range(4))
    assert not made
    before, after = twist.state_dict().values(), state["model"].values()
    for (name, ours), old, real in zip(network.state_dict().items(), before, after, strict=True):
        if ours.dim() > 1:                       # other gradients are partly rounding, which Adam enlarges
            assert (real - old).norm() > 1e-3 * old.norm()
            assert (ours - real).norm() < 0.02 * (real - old).norm(), name


def test_views():
    """The crops, and so the mean of each pixel and the spread over images, are those of `views.py`."""
    images, _ = minimal.read("train")
    images = images[:4000]
    views = build_views("fashion-mnist", (0.286,), (0.353,), 20)
    torch.manual_seed(0)
    ours = minimal.random_view(images)
    real = views((images * 255).byte(), torch.rand(2, 4000, 40))[0]
    assert ours.shape == real.shape == (4000, 3, 20, 20)
    torch.testing.assert_close(ours.mean(0), real.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(ours.std(0), real.std(0), rtol=0, atol=0.1)


def test_scores_and_draws(tmp_path):
    images, labels = minimal.read("t10k")
    network = minimal.build_network()
    accuracy = minimal.evaluate(network, images[:600], labels[:600], tmp_path / "new/classes.png")
    assert 0.1 <= accuracy < 0.7                 # matching alone gives more than chance
    assert (tmp_path / "new/classes.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_finds_the_classes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minimal.py"])
    runpy.run_path(str(ROOT / "minimal.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert float(said.split("accuracy ")[1].split(";")[0]) >= 0.70, said
    assert (tmp_path / "runs/minimal/classes.png").exists()
