"""Proves that every loss has the published values and gradients, equals its definition, keeps its limits."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss import (
    TwistLoss,
    anchors,
    barlow_twins_loss,
    barlow_twins_terms,
    momentum_twist_loss,
    seed_loss,
    seed_target,
    self_label_loss,
    twist_loss,
    twist_loss_two_views,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("i", range(4))
def test_values_and_gradients_are_the_published_ones(i):
    g = np.load(GOLDEN / f"twist_loss_{i}.npz")
    logits = torch.tensor(g["logits"], requires_grad=True)
    loss = twist_loss(logits, float(g["alpha"]), float(g["beta"]), float(g["eps"]))
    loss.total.backward()
    for name, value in loss._asdict().items():
        np.testing.assert_allclose(value.item(), g[name], rtol=1e-5, err_msg=name)
    assert np.abs(logits.grad.numpy() - g["grad"]).max() < 1e-5 * np.abs(g["grad"]).max()


def mean_over_pairs(logits, alpha, beta, eps, num_global):
    """The paper's definition, averaged over the pairs of each global view with each later view."""
    losses = []
    for g in range(num_global):
        for later in logits[g + 1:]:
            losses.append(torch.stack(twist_loss_two_views(logits[g], later, alpha, beta, eps)))
    return TwistLoss(*torch.stack(losses).mean(0))


def gradients(loss, logits):
    """Of the total and of each term."""
    return {name: torch.autograd.grad(value, logits, retain_graph=True)[0]
            for name, value in loss._asdict().items()}


@pytest.mark.parametrize("eps", [1e-5, 1e-2, 0.0])
@pytest.mark.parametrize("V, num_global", [
    (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (5, 2), (6, 4), (7, 3), (14, 2)])
def test_the_linear_form_equals_the_definition_over_all_pairs(V, num_global, eps):
    torch.manual_seed(0)
    logits = torch.randn(V, 6, 9, dtype=torch.float64, requires_grad=True)
    loss = twist_loss(logits, 0.4, 1.3, eps, num_global)
    expected = mean_over_pairs(logits, 0.4, 1.3, eps, num_global)
    torch.testing.assert_close(loss._asdict(), expected._asdict(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients(loss, logits), gradients(expected, logits), rtol=1e-10, atol=1e-13)


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


def test_wrong_shapes_are_named():
    for shape in ((2, 3), (1, 3, 4), (2, 0, 4), (2, 3, 1)):
        with pytest.raises(ValueError, match="logits: expected"):
            twist_loss(torch.zeros(shape))
    for num_global in (0, 3):
        with pytest.raises(ValueError, match="num_global"):
            twist_loss(torch.zeros(2, 3, 4), num_global=num_global)


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
    for teacher in (z[:1], z[:, :, 1:], z[:2, 1:], torch.cat([z, z])):
        with pytest.raises(ValueError, match="teacher_logits: expected"):
            self_label_loss(z, 0.5, teacher)


# ---------------------------------------------------------------- Barlow Twins
def test_barlow_twins_values_and_gradients_are_the_published_ones():
    g = np.load(GOLDEN / "barlow_twins_loss.npz")
    z1, z2 = (torch.tensor(g[name], requires_grad=True) for name in ("z1", "z2"))
    loss = barlow_twins_loss(z1, z2, float(g["lambd"]))
    loss.backward()
    assert loss.shape == ()
    np.testing.assert_allclose(loss.item(), g["loss"], rtol=1e-5)
    for z, name in ((z1, "grad1"), (z2, "grad2")):
        assert np.abs(z.grad.numpy() - g[name]).max() < 1e-5 * np.abs(g[name]).max()


def barlow_twins_by_definition(z1, z2, lambd, eps=1e-5):
    z1, z2 = (F.batch_norm(z, None, None, training=True, eps=eps) for z in (z1, z2))
    C = z1.T @ z2 / len(z1)
    off = ~torch.eye(len(C), dtype=torch.bool)
    return (C.diagonal() - 1).square().sum() + lambd * C[off].square().sum()


@pytest.mark.parametrize("shift", [0.0, 3.0, 1000.0])
def test_barlow_twins_by_its_definition(shift):
    """Also far from 0, where the mean of squares and the square of the mean would cancel."""
    torch.manual_seed(0)
    z1, z2 = (2 * torch.randn(16, 5, dtype=torch.float64) + shift for _ in range(2))
    expected = barlow_twins_by_definition(z1.requires_grad_(), z2.requires_grad_(), 0.3)
    gradients = torch.autograd.grad(expected, (z1, z2))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3 if shift > 100 else 1e-5)):
        a, b = (z.detach().to(dtype).requires_grad_() for z in (z1, z2))
        ours = barlow_twins_loss(a, b, 0.3)
        assert ours.item() == pytest.approx(expected.item(), rel=tolerance)
        for grad, reference in zip(torch.autograd.grad(ours, (a, b)), gradients, strict=True):
            assert (grad - reference).abs().max() <= tolerance * reference.abs().max()


def test_barlow_twins_closed_forms():
    z = torch.tensor([[1., 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])              # uncorrelated columns
    loss = barlow_twins_terms(z, 7 * z + 5, lambd=2, eps=0)
    assert loss.invariance.item() == pytest.approx(0, abs=1e-9) and loss.redundancy.item() < 1e-9
    loss = barlow_twins_terms(z, -z, lambd=2, eps=0)                                   # C = -1
    assert loss.total.item() == pytest.approx(12)
    same = z[:, :1].expand(-1, 3)                                                      # every C_ij = 1
    assert barlow_twins_terms(same, same, lambd=2, eps=0).total.item() == pytest.approx(12)
    constant = torch.full((4, 3), 1e3, requires_grad=True)                             # collapsed: C = 0
    loss = barlow_twins_loss(constant, constant)
    loss.backward()
    assert loss.item() == pytest.approx(3) and constant.grad.isfinite().all()


def test_barlow_twins_gradient_is_exact_and_half_precision_raised():
    torch.manual_seed(0)
    z1, z2 = (torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(barlow_twins_loss, (z1, z2))
    half = [z.detach().bfloat16() for z in (z1, z2)]
    assert barlow_twins_loss(*half).equal(barlow_twins_loss(*(z.float() for z in half)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert barlow_twins_loss(*(z.float() for z in half)).dtype == torch.float32
    with pytest.raises(ValueError, match="z1, z2"):
        barlow_twins_loss(z1, z2[:5])


# ---------------------------------------------------------------- SEED
@pytest.mark.parametrize("i", range(2))
def test_seed_values_and_gradients_are_the_published_ones(i):
    g = np.load(GOLDEN / f"seed_loss_{i}.npz")
    student, teacher, queue = (torch.tensor(g[name]) for name in ("student", "teacher", "queue"))
    loss = seed_loss(student.requires_grad_(), teacher, queue, float(g["student_temperature"]),
                     float(g["teacher_temperature"]))
    loss.backward()
    np.testing.assert_allclose(loss.item(), g["loss"], rtol=1e-5)
    s, grad = student.detach(), torch.tensor(g["grad"])         # of unit vectors as leaves
    s = s / s.norm(dim=1, keepdim=True)
    tangential = grad - (grad * s).sum(1, keepdim=True) * s
    assert (student.grad - tangential).abs().max() < 1e-5 * tangential.abs().max()


def seed_inputs(B=6, D=5, K=9, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(n, D, dtype=dtype) for n in (B, B, K)]


def test_seed_by_its_definition_whatever_the_lengths():
    student, teacher, queue = seed_inputs()
    cos = lambda a, b: (a @ b) / a.norm() / b.norm()                                  # noqa: E731
    total = 0
    for s, t in zip(student, teacher, strict=True):
        of_student = torch.stack([cos(s, t), *(cos(s, q) for q in queue)]) / 0.3
        of_teacher = torch.stack([cos(t, t), *(cos(t, q) for q in queue)]) / 0.1
        total -= (of_teacher.softmax(0) * of_student.log_softmax(0)).sum() / len(student)
    for scale in (1, 100):
        ours = seed_loss(scale * student, teacher / scale, scale * queue, 0.3, 0.1)
        torch.testing.assert_close(ours, total, rtol=1e-12, atol=0)


def test_seed_limits():
    """A cold teacher is InfoNCE with the positive as the label; a perfect student reaches the entropy."""
    student, teacher, queue = seed_inputs()
    s, t, q = (F.normalize(x, dim=1) for x in (student, teacher, queue))
    logits = torch.cat([(s * t).sum(1, keepdim=True), s @ q.T], 1) / 0.2
    info_nce = F.cross_entropy(logits, torch.zeros(len(s), dtype=torch.long))
    torch.testing.assert_close(seed_loss(student, teacher, queue, 0.2, 1e-4), info_nce)
    assert seed_target(teacher, queue, 1e-4)[:, 0].min() == 1
    target = seed_target(teacher, queue, 0.2)
    assert target.shape == (6, 10) and target.argmax(1).eq(0).all() and target[:, 0].max() < 0.9
    torch.testing.assert_close(target.sum(1), torch.ones(6).double())
    entropy = -(target * target.log()).sum(1).mean()
    torch.testing.assert_close(seed_loss(teacher, teacher, queue, 0.2, 0.2), entropy)
    assert seed_loss(student, teacher, queue, 0.2, 0.2) > entropy


def test_seed_gradient_is_the_students_alone():
    inputs = [x.requires_grad_() for x in seed_inputs()]
    assert torch.autograd.gradcheck(lambda s: seed_loss(s, *inputs[1:], 0.2, 0.05), inputs[:1])
    seed_loss(*inputs).backward()
    assert inputs[0].grad.norm() > 0 and inputs[1].grad is None and inputs[2].grad is None
    half = [x.detach().half() for x in inputs]
    assert seed_loss(*half, 0.2, 1e-4).equal(seed_loss(*(x.float() for x in half), 0.2, 1e-4))
    for bad in ((half[0][:3], *half[1:]), (half[0], half[1], half[2][:, :3])):
        with pytest.raises(ValueError, match="expected student"):
            seed_loss(*bad)
    with pytest.raises(ValueError, match="temperatures"):
        seed_loss(*half, teacher_temperature=0)
