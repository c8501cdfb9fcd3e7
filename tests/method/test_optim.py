"""LARS, parameter groups and schedules have the numbers of the released implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model import Twist
from optim import LARS, cosine, load_optimizer, param_groups, seed_lr, warmup_cosine

GOLDEN = Path(__file__).parents[1] / "golden"


def test_lars_takes_the_published_steps():
    g = np.load(GOLDEN / "lars.npz")
    weight, bias = (torch.nn.Parameter(torch.tensor(g[k])) for k in ("weight0", "bias0"))
    optimizer = LARS([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0, "lars": False}], lr=0.0,
                     momentum=float(g["momentum"]), weight_decay=float(g["weight_decay"]),
                     trust_coefficient=float(g["trust_coefficient"]))
    for t, lr in enumerate(g["lrs"]):
        weight.grad, bias.grad = torch.tensor(g["weight_grads"][t]), torch.tensor(g["bias_grads"][t])
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
        np.testing.assert_allclose(weight.detach(), g["weights"][t], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(bias.detach(), g["biases"][t], rtol=1e-5, atol=1e-7)


def test_weight_decay_is_in_the_trust_ratio_and_in_the_update():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[0.0, 2.0]])
    LARS([weight], lr=0.1, weight_decay=0.5, trust_coefficient=0.2).step()
    trust = 0.2 * 5 / (2 + 0.5 * 5)                            # |w| = 5, |g| = 2
    expected = [[3 - 0.1 * trust * 0.5 * 3, 4 - 0.1 * trust * (2 + 0.5 * 4)]]
    torch.testing.assert_close(weight.detach(), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("w, g", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_lars_falls_back_to_plain_momentum_where_a_norm_is_zero(w, g):
    weight = torch.nn.Parameter(torch.full((2, 2), w))
    weight.grad = torch.full((2, 2), g)
    LARS([weight], lr=0.5, weight_decay=0.0).step()
    assert torch.equal(weight.detach(), torch.full((2, 2), w - 0.5 * g))


def test_an_optimizer_is_loaded_without_the_kernels_of_another_device():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    saved, loaded = torch.optim.AdamW([weight], fused=True, lr=0.5), torch.optim.AdamW([weight], lr=0.1)
    saved.step()
    load_optimizer(loaded, saved.state_dict())
    group = loaded.param_groups[0]
    assert group["fused"] is None and group["lr"] == 0.5 and loaded.state[weight]["step"] == 1
    assert saved.state_dict()["param_groups"][0]["fused"]


def test_lars_steps_without_gradients():
    weight = torch.nn.Parameter(torch.ones(3))
    LARS([weight], lr=0.5).step()
    assert weight.eq(1).all()


@pytest.mark.parametrize("arch", ["resnet50", "vit_s"])
def test_param_groups_are_the_published_ones(arch):
    golden = json.loads((GOLDEN / f"param_groups_{arch}.json").read_text())
    decayed, undecayed = param_groups(Twist(arch, num_classes=64, hidden_dim=96), weight_decay=1.5e-6)
    assert sorted(decayed["names"]) == sorted(golden["decay"])
    assert sorted(undecayed["names"]) == sorted(golden["no_decay"])
    assert decayed["weight_decay"] == 1.5e-6 and undecayed["weight_decay"] == 0
    assert decayed["lars"] and not undecayed["lars"]


def test_schedules_are_the_published_ones():
    (g,) = json.loads((GOLDEN / "schedules.json").read_text())
    per_epoch, pretrain = g["steps_per_epoch"], g["pretrain_epochs"] * g["steps_per_epoch"]
    ours = [warmup_cosine(t, pretrain, g["warmup_epochs"] * per_epoch, g["lr"], 0.001 * g["lr"])
            for t in range(pretrain)]
    np.testing.assert_allclose(ours, g["lr_per_step"][:pretrain], rtol=1e-12, atol=1e-15)
    total = g["epochs"] * per_epoch
    ours = [cosine(t, total, g["weight_decay_per_step"][0], 0.12) for t in range(total)]
    np.testing.assert_allclose(ours, g["weight_decay_per_step"], rtol=1e-12)
    ours = [cosine(t, pretrain, 0.996, 1.0) for t in range(pretrain)]             # of the momentum encoder
    np.testing.assert_allclose(ours, g["momentum_per_step"], rtol=1e-12)
    second, peak = total - pretrain, g["lr_self_label"]                           # self-labelling starts anew
    ours = [warmup_cosine(t, second, g["self_label_warmup_epochs"] * per_epoch, peak, 0.001 * peak)
            for t in range(second)]
    np.testing.assert_allclose(ours, g["lr_per_step"][pretrain:], rtol=1e-12, atol=1e-15)
    ours = [cosine(t, second, 0.5, 0.6) for t in range(second)]
    np.testing.assert_allclose(ours, g["quantile_per_step"], rtol=1e-12)


def test_warmup_starts_at_zero_and_reaches_peak_and_final():
    assert warmup_cosine(0, 100, 10, 2.0, 0.1) == 0
    assert warmup_cosine(10, 100, 10, 2.0, 0.1) == pytest.approx(2.0)
    assert warmup_cosine(100, 100, 10, 2.0, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(0, 100, 0, 2.0, 0.1) == pytest.approx(2.0)


def test_seed_lr_is_the_published_one():
    """200 epochs at batch 1024: five epochs from 0.03 to 0.12, then the rest of a cosine."""
    lrs = [seed_lr(epoch, 200, 5, 0.03, 0.12) for epoch in range(201)]
    assert lrs[:5] == pytest.approx([0.03, 0.048, 0.066, 0.084, 0.102])
    assert lrs[5] == pytest.approx(0.06 * (1 + np.cos(np.pi / 40))) and lrs[100] == pytest.approx(0.06)
    assert lrs[200] == pytest.approx(0, abs=1e-12)
    lrs = [seed_lr(epoch, 200, 5, 0.03, 0.12, [120, 160]) for epoch in (4, 5, 119, 120, 160)]
    assert lrs == pytest.approx([0.102, 0.12, 0.12, 0.012, 0.0012])
    assert seed_lr(2, 200, 5, 0.03, 0.0075) < 0.03        # below batch 256 the warm-up falls, as published
