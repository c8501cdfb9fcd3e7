"""The objective: published numbers, closed forms, limits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from loss import anchors, momentum_twist_loss, self_label_loss, twist_loss

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("i", range(4))
def test_values_and_gradients_are_the_published_ones(i):
    g = np.load(GOLDEN / f"twist_loss_{i}.npz")
    logits = torch.tensor(g["logits"], requires_grad=True)
    loss = twist_loss(logits, float(g["alpha"]), float(g["beta"]), float(g["eps"]))
    loss.total.backward()
    for name, value in loss._asdict().items():
        np.testing.assert_allclose(value.item(), g[name], rtol=1e-5, err_msg=name)
    assert np.abs(logits.grad.numpy() - g["grad"]).max() < 1e-5 * np.abs(g["grad"]).max()


def pair_by_pair(logits, alpha, beta, eps, num_global):
    """The definition, written down pair by pair."""
    V, terms = len(logits), []
    p = logits.softmax(-1)
    kl = lambda p, q: (p * (torch.log(p + eps) - torch.log(q + eps))).sum(-1).mean()  # noqa: E731
    entropy = lambda p: -(p * torch.log(p + eps)).sum(-1).mean()                      # noqa: E731
    for g in range(num_global):
        for s in range(g + 1, V):
            terms.append(torch.stack([0.5 * (kl(p[g], p[s]) + kl(p[s], p[g])),
                                      0.5 * (entropy(p[g]) + entropy(p[s])),
                                      0.5 * (entropy(p[g].mean(0)) + entropy(p[s].mean(0)))]))
    consistency, sharpness, diversity = torch.stack(terms).mean(0)
    return consistency + alpha * sharpness - beta * diversity


@pytest.mark.parametrize("V, num_global", [(2, 1), (2, 2), (3, 1), (3, 3), (5, 2), (6, 4)])
def test_factored_sums_equal_the_sum_over_pairs(V, num_global):
    torch.manual_seed(0)
    logits = torch.randn(V, 6, 9, dtype=torch.float64, requires_grad=True)
    ours = twist_loss(logits, 0.4, 1.3, 1e-5, num_global).total
    theirs = pair_by_pair(logits, 0.4, 1.3, 1e-5, num_global)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_gradient_is_exact():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    for eps in (1e-5, 0.0):
        assert torch.autograd.gradcheck(lambda z, eps=eps: twist_loss(z, 0.4, 1.2, eps).total, logits)


def test_uniform_output_has_the_closed_form_entropies():
    """Table 8 prints 8.28 for the collapsed runs: -log(1/4096 + 1e-5), not ln 4096 = 8.3178."""
    loss = twist_loss(torch.zeros(2, 8, 4096))
    assert loss.sharpness.item() == pytest.approx(8.2776, abs=5e-5)
    assert loss.diversity.item() == pytest.approx(8.2776, abs=5e-5)
    assert loss.consistency.item() == pytest.approx(0, abs=1e-5)
    assert loss.total.item() == pytest.approx(0, abs=1e-5)


def test_balanced_one_hot_agreement_is_the_minimum():
    one_hot = 100 * torch.eye(4096)
    assert twist_loss(torch.stack([one_hot, one_hot])).total.item() == pytest.approx(-8.2776, abs=2e-4)


def test_one_class_for_all_is_worth_nothing():
    logits = torch.zeros(2, 8, 10)
    logits[..., 3] = 100
    assert twist_loss(logits).total.item() == pytest.approx(0, abs=1e-6)


def test_symmetric_among_global_and_among_local_views():
    torch.manual_seed(0)
    z = torch.randn(6, 4, 7, dtype=torch.float64)
    total = twist_loss(z).total
    torch.testing.assert_close(twist_loss(z[[1, 0, 2, 3, 4, 5]]).total, total)
    torch.testing.assert_close(twist_loss(z[[0, 1, 5, 3, 2, 4]]).total, total)
    assert abs(twist_loss(z[[2, 1, 0, 3, 4, 5]]).total - total) > 1e-3       # a local view is no global one


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("agree", [True, False])
def test_huge_logits_stay_finite(eps, agree):
    torch.manual_seed(0)
    z = 1e4 * torch.randn(1 if agree else 4, 6, 9).expand(4, 6, 9)
    z = z.clone().requires_grad_()
    loss = twist_loss(z, eps=eps)
    loss.total.backward()
    assert all(value.isfinite() for value in loss) and z.grad.isfinite().all()


def test_eps_zero_is_the_limit():
    torch.manual_seed(0)
    z = torch.randn(3, 5, 8, dtype=torch.float64)
    exact = twist_loss(z, eps=0.0)
    for small, tolerance in ((1e-6, 1e-4), (1e-10, 1e-8)):
        for a, b in zip(exact, twist_loss(z, eps=small), strict=True):
            assert abs(a - b) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_whatever_autocast_says(dtype):
    torch.manual_seed(0)
    z = torch.randn(2, 6, 9).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = twist_loss(z)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, twist_loss(z.float()).total)
    assert twist_loss(z.double()).total.dtype == torch.float64


def test_riders_come_back_and_wrong_shapes_are_named():
    riders = torch.tensor([0.0, 1.0])
    twist_loss(torch.randn(2, 3, 4), riders=riders)
    assert riders.tolist() == [0.0, 1.0]
    for shape in ((2, 3), (1, 3, 4), (2, 0, 4), (2, 3, 1)):
        with pytest.raises(ValueError, match="logits: expected"):
            twist_loss(torch.zeros(shape))
    with pytest.raises(ValueError, match="num_global"):
        twist_loss(torch.zeros(2, 3, 4), num_global=3)


# ---------------------------------------------------------------- with a momentum encoder
def test_momentum_values_and_gradients_are_the_published_ones():
    g = np.load(GOLDEN / "momentum_twist_loss.npz")
    logits, teacher = (torch.tensor(g[name], requires_grad=True) for name in ("logits", "teacher_logits"))
    loss = momentum_twist_loss(teacher, logits, float(g["alpha"]), float(g["beta"]), float(g["eps"]))
    loss.total.backward()
    for name, value in loss._asdict().items():
        np.testing.assert_allclose(value.item(), g[name], rtol=1e-5, err_msg=name)
    assert np.abs(logits.grad.numpy() - g["grad"]).max() < 1e-5 * np.abs(g["grad"]).max()
    assert teacher.grad is None


@pytest.mark.parametrize("V, G", [(2, 2), (2, 1), (5, 2), (4, 4)])
def test_momentum_consistency_is_the_sum_over_pairs(V, G):
    torch.manual_seed(1)
    z = torch.randn(V, 6, 9, dtype=torch.float64, requires_grad=True)
    t = torch.randn(G, 6, 9, dtype=torch.float64)
    for eps in (1e-5, 0.0):
        p, q = z.softmax(-1), t.softmax(-1)
        pairs = [(q[i] * (torch.log(q[i] + eps) - torch.log(p[s] + eps))).sum(-1).mean()
                 for i in range(G) for s in range(V) if s != i]
        ours = momentum_twist_loss(t, z, 0.4, 1.3, eps)
        torch.testing.assert_close(ours.consistency, torch.stack(pairs).mean(), rtol=1e-12, atol=1e-13)
        assert torch.autograd.gradcheck(lambda z, eps=eps: momentum_twist_loss(t, z, 0.4, 1.3, eps).total, z)
    huge = momentum_twist_loss(1e4 * t.float(), (1e4 * z).float(), eps=0)
    assert all(value.isfinite() for value in huge)


@pytest.mark.parametrize("teacher, logits", [
    ((3, 4, 5), (2, 4, 5)), ((2, 4, 6), (2, 4, 5)), ((2, 4, 5), (1, 4, 5)), ((2, 4), (2, 4, 5)),
    ((0, 4, 5), (2, 4, 5))])
def test_momentum_bad_shapes_are_named(teacher, logits):
    assert momentum_twist_loss(torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)).total.isfinite()
    with pytest.raises(ValueError, match="logits: expected"):
        momentum_twist_loss(torch.zeros(teacher), torch.zeros(logits))


# ---------------------------------------------------------------- self-labelling
@pytest.mark.parametrize("name", ["self_label_loss", "self_label_loss_teacher"])
def test_self_label_values_and_gradients_are_the_published_ones(name):
    g = np.load(GOLDEN / f"{name}.npz")
    logits = torch.tensor(g["logits"], requires_grad=True)
    teacher = torch.tensor(g["teacher_logits"], requires_grad=True) if "teacher_logits" in g else None
    loss = self_label_loss(logits, float(g["quantile"]), teacher)
    loss.total.backward()
    for key, value in loss._asdict().items():
        np.testing.assert_allclose(value.item(), g[key], rtol=1e-5, err_msg=key)
    assert np.abs(logits.grad.numpy() - g["grad"]).max() < 1e-5 * np.abs(g["grad"]).max()
    assert teacher is None or teacher.grad is None


def test_self_label_by_hand():
    """Image 0 is labelled by view 1, image 1 by view 0; image 2 is not confident enough."""
    z = torch.zeros(3, 3, 4, dtype=torch.float64)
    z[1, 0, 2], z[0, 1, 3], z[0, 2, 1], z[2, 0, 2] = 5, 4, 1, 1
    z.requires_grad_()
    view, label, confidence = anchors(z[:2])
    assert view.tolist() == [1, 0, 0] and label.tolist() == [2, 3, 1]
    assert confidence.argsort().tolist() == [2, 1, 0]
    loss = self_label_loss(z, 0.67)
    expected = [-z[v, i].log_softmax(-1)[c] for v, i, c in ((0, 0, 2), (2, 0, 2), (1, 1, 3), (2, 1, 3))]
    torch.testing.assert_close(loss.total, torch.stack(expected).mean())
    assert loss.fraction == 2 / 3 and loss.threshold == confidence[2]
    loss.total.backward()
    assert z.grad[1, 0].abs().sum() == z.grad[0, 1].abs().sum() == z.grad[:, 2].abs().sum() == 0
    assert z.grad[0, 0].abs().sum() > 0


def test_self_label_chooses_nothing_without_confidence():
    z = torch.zeros(4, 6, 5, requires_grad=True)               # all alike: none is strictly above another
    loss = self_label_loss(z, 0.5)
    loss.total.backward()
    assert loss.total == 0 and loss.fraction == 0 and z.grad.abs().sum() == 0
    torch.manual_seed(0)
    z = torch.randn(2, 10, 5)
    for quantile, number in ((0.0, 0), (0.5, 5), (0.55, 5), (0.99, 9), (1.0, 9)):
        assert round(10 * self_label_loss(z, quantile).fraction.item()) == number
    assert self_label_loss(1e4 * z, 0.5).total.isfinite()
    with pytest.raises(ValueError, match="quantile: expected 0 to 1, got 1.5"):
        self_label_loss(z, 1.5)
    with pytest.raises(ValueError, match="logits: expected"):
        self_label_loss(z[0], 0.5)
