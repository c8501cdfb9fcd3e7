"""fit_logistic reaches the optimum of a converged scikit-learn, for all strengths at once, in any chunks."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from data import build_dataset, eval_batches
from logistic import fit_logistic
from pretrained import load_pretrained

ROOT = Path(__file__).parents[2]
STRENGTHS = (1e-2, 1, 100, 1e4)


def make(N=400, D=12, C=5, mean=2.0, seed=0):
    """Features with axes of different lengths, float64 [N, D], and classes that overlap, [N]."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (N,), generator=rng)
    x = torch.randn(C, D, generator=rng)[labels] / 2 + torch.randn(N, D, generator=rng)
    mixed = torch.linalg.qr(torch.randn(D, D, generator=rng))[0] * torch.linspace(0.3, 3, D)
    return (x @ mixed + mean).double(), labels


def make_labels(N=400, D=12, C=4):
    """Features [N, D], labels [N, C] that do not exclude each other, and weights of 0 and 1."""
    x, _ = make(N, D)
    rng = torch.Generator().manual_seed(1)
    scores = F.normalize(x - x.mean(0), dim=1) @ torch.randn(D, C, generator=rng).double()
    labels = (scores + torch.randn(N, C, generator=rng) > 0.5).double()
    return x, labels, (torch.rand(N, C, generator=rng) > 0.2).double()


def oracle(x, y, strength, solver="lbfgs"):
    """A converged scikit-learn: weights and biases, of two classes as one row."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                           # of no convergence
        model = LogisticRegression(C=1 / strength, solver=solver, tol=1e-8, max_iter=100_000)
        model.fit(x.numpy(), y.numpy())
    return torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def predict(x, W, b):
    return (x @ W.T.to(x) + b.to(x)).argmax(1)


def largest_gradient(x, y, strength, W, b, weights=None):
    """The largest component of the gradient of the mean objective, by autograd in float64 [C] or a number."""
    x, W, b = x.double(), W.double().requires_grad_(), b.double().requires_grad_()
    if y.dim() == 1:
        objective = F.cross_entropy(x @ W.T + b, y, reduction="sum") + strength / 2 * W.square().sum()
        gradients = torch.autograd.grad(objective / len(x), (W, b))
        return max(gradient.abs().max().item() for gradient in gradients)
    losses = F.binary_cross_entropy_with_logits(x @ W.T + b, y, weights, reduction="none")
    objective = ((losses.sum(0) + strength / 2 * W.square().sum(1)) / weights.sum(0)).sum()
    dW, db = torch.autograd.grad(objective, (W, b))
    return max(dW.abs().max().item(), db.abs().max().item())


# ---------------------------------------------------------------- the optimum
@pytest.mark.parametrize("C", [2, 5])
def test_float64_reaches_the_optimum(C):
    x, y = make(C=C)
    fit = fit_logistic(x, y, STRENGTHS, max_iter=2000, tol=1e-9)
    assert fit.weights.shape == (4, C, 12) and fit.biases.shape == (4, C) and fit.converged.all()
    assert fit.weights.dtype == torch.float64
    for i, strength in enumerate(STRENGTHS):
        W, b = oracle(x, y, strength)
        ours, ours_b = fit.weights[i], fit.biases[i]
        if C == 2:                       # scikit-learn has a sigmoid: its penalty is on the difference
            W, b = oracle(x, y, strength / 2)
            ours, ours_b = (t[1:] - t[:1] for t in (ours, ours_b))
        assert apart(ours, W) < 1e-4
        assert apart(ours_b - ours_b.mean() * (C > 2), b - b.mean() * (C > 2)) < 1e-4


def test_float32_predicts_the_same():
    x, y = make(N=3000)
    x, test = x[:1000], x[1000:]
    weights, biases, converged, _ = fit_logistic(x.float(), y[:1000], STRENGTHS, tol=1e-5)
    assert weights.dtype == torch.float32 and converged.all()
    for W, b, strength in zip(weights, biases, STRENGTHS, strict=True):
        same = predict(test, W, b) == predict(test, *oracle(x, y[:1000], strength))
        assert same.double().mean() >= 0.998


def test_multi_label_is_binary_problems_without_what_has_no_weight():
    x, y, weights = make_labels()
    fit = fit_logistic(x, y, STRENGTHS, tol=1e-9, max_iter=2000, weights=weights)
    assert fit.weights.shape == (4, 4, 12) and fit.converged.all()
    for i, strength in enumerate(STRENGTHS):
        for c in range(4):
            kept = weights[:, c] > 0
            W, b = oracle(x[kept], y[kept, c], strength)
            assert apart(fit.weights[i, c], W[0]) < 1e-4 and apart(fit.biases[i, c], b[0]) < 1e-4
    everywhere = fit_logistic(x, y, STRENGTHS, tol=1e-9, max_iter=2000)
    assert torch.equal(everywhere.weights, fit_logistic(x, y, STRENGTHS, tol=1e-9, max_iter=2000,
                                                        weights=torch.ones(400, 4)).weights)
    assert apart(everywhere.weights, fit.weights) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_the_gradient_is_below_tol(dtype, tol):
    x, y = make(mean=5.0)
    fit = fit_logistic(x.to(dtype), y, STRENGTHS, tol=tol)
    several = make_labels()
    many = fit_logistic(several[0].to(dtype), several[1], STRENGTHS, tol=tol, weights=several[2])
    assert fit.converged.all() and many.converged.all()
    slack = 1 + 1e-4 / tol * 1e-2 * (dtype == torch.float32)
    for i, strength in enumerate(STRENGTHS):
        assert largest_gradient(x, y, strength, fit.weights[i], fit.biases[i]) <= slack * tol
        assert largest_gradient(*several[:2], strength, many.weights[i], many.biases[i],
                                several[2]) <= slack * tol


def test_what_has_not_converged_is_marked():
    x, y = make()
    fit = fit_logistic(x, y, STRENGTHS, max_iter=6, tol=1e-6)
    assert fit.converged.tolist() == [False, False, False, True] and fit.iterations.max() <= 6
    more = fit_logistic(x, y, STRENGTHS, max_iter=7, tol=1e-6)
    assert not torch.equal(fit.weights[0], more.weights[0])


# ---------------------------------------------------------------- chunks, groups, line search
@pytest.mark.parametrize("max_bytes", [10_000, 50_000, 400_000])
def test_chunks_and_groups_change_nothing_but_rounding(max_bytes):
    x, y = make()
    x2, y2, weights = make_labels()
    for arguments in ((x, y, STRENGTHS, 2000, 1e-9), (x2, y2, STRENGTHS, 2000, 1e-9, weights)):
        whole, parts = fit_logistic(*arguments), fit_logistic(*arguments, max_bytes=max_bytes)
        assert parts.converged.all() and apart(parts.weights, whole.weights) < 1e-6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_bounded():
    """The logits of all rows and strengths would take 48 MB, and a step needs several such arrays."""
    code = """if True:
        import re, torch
        from pathlib import Path
        from logistic import fit_logistic

        def peak():                                                  # MiB since the last call
            found = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
            Path("/proc/self/clear_refs").write_text("5")
            return int(found[1]) / 1024

        torch.set_num_threads(1)
        features, labels = torch.randn(20_000, 16), torch.arange(20_000) % 40
        strengths = torch.logspace(-6, 5, 15)
        fit_logistic(features[:500], labels[:500], strengths, max_iter=1)
        peak()
        before = peak()
        fit_logistic(features, labels, strengths, max_iter=2, max_bytes=16 * 2**20)
        print(peak() - before)"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert 4 < float(found.stdout) < 16 + 4                          # the rotated copy has 1 MiB


def test_the_line_search_does_not_stall_in_rounding():
    """Differences of the values are lost in rounding below gradients of about 1e-8, of float64."""
    x, y = make()
    fit = fit_logistic(x, y, STRENGTHS[1:], max_iter=100, tol=1e-12)
    assert fit.converged.all()                            # max_iter counts the trials of the searches


def test_an_unreachable_tol_ends():
    x, y = make()
    fit = fit_logistic(x.float(), y, STRENGTHS, max_iter=150, tol=1e-12)
    assert not fit.converged.any()
    assert all(largest_gradient(x, y, strength, fit.weights[i], fit.biases[i]) < 1e-4
               for i, strength in enumerate(STRENGTHS))


# ---------------------------------------------------------------- borders
def test_fewer_images_than_features():
    x, y = make(N=30, D=80, C=3)
    fit = fit_logistic(x, y, (0.1, 10), max_iter=2000, tol=1e-9)
    assert fit.converged.all()
    for i, strength in enumerate((0.1, 10)):
        assert apart(fit.weights[i], oracle(x, y, strength)[0]) < 1e-4


def test_constant_features_have_no_weight():
    x, y = make()
    alone = fit_logistic(x, y, (1, 100), tol=1e-9, max_iter=2000)
    wider = fit_logistic(torch.cat([x, torch.full((400, 2), 7.0)], 1), y, (1, 100), tol=1e-9, max_iter=2000)
    assert wider.weights[..., 12:].abs().max() < 1e-9 and apart(wider.weights[..., :12], alone.weights) < 1e-6
    only = fit_logistic(torch.ones(100, 3), torch.arange(100) // 80, (1.0,), tol=1e-6)
    assert only.weights.abs().max() < 1e-6 and only.converged.all()
    assert only.biases[0].softmax(0).tolist() == pytest.approx([0.8, 0.2], abs=1e-4)


def test_a_class_without_images_is_never_predicted():
    x, y = make(C=4)
    fit = fit_logistic(x, y, STRENGTHS, num_classes=6)
    assert fit.weights.shape == (4, 6, 12) and fit.converged.all()
    assert all((predict(x, W, b) < 4).all() for W, b in zip(fit.weights, fit.biases, strict=True))


def test_one_label_of_an_image():
    x, y, _ = make_labels(C=1)
    fit = fit_logistic(x, y, (1, 100), tol=1e-9, max_iter=2000)
    for i, strength in enumerate((1, 100)):
        assert apart(fit.weights[i], oracle(x, y[:, 0], strength)[0]) < 1e-4


def test_a_label_that_no_image_or_every_image_has():
    x, y, weights = make_labels(C=3)
    y[:, 0], y[:, 1], weights[:, 2] = 0, 1, 0
    fit = fit_logistic(x, y, STRENGTHS, weights=weights)
    assert fit.converged.all() and fit.weights.isfinite().all()
    assert (fit.biases[:, 0] < -2).all() and (fit.biases[:, 1] > 2).all()
    assert (fit.weights[:, 2] == 0).all() and (fit.biases[:, 2] == 0).all()


@pytest.mark.parametrize("change, message", [
    (dict(features=torch.zeros(4)), "features: needs"),
    (dict(features=torch.zeros(4, 2).half()), "features: needs"),
    (dict(features=torch.full((4, 2), math.nan)), "features: contain NaN"),
    (dict(strengths=[]), "strengths: "),
    (dict(strengths=[1, 0]), "strengths: "),
    (dict(strengths=[math.inf]), "strengths: "),
    (dict(labels=torch.zeros(3).long()), r"labels: needs \[4\] or \[4, C\], not \[3\]"),
    (dict(labels=torch.tensor([0, 1, 2, -1])), "labels: needs integers from 0 to 2"),
    (dict(labels=torch.tensor([0, 1, 2, 3]), num_classes=3), "labels: needs integers from 0 to 2"),
    (dict(labels=torch.zeros(4)), "labels: needs integers"),
    (dict(labels=torch.full((4, 2), 0.5)), "labels: each"),
    (dict(weights=torch.ones(4, 2)), "weights: only for labels"),
    (dict(labels=torch.zeros(4, 2), weights=torch.ones(4, 3)), "weights: needs"),
    (dict(labels=torch.zeros(4, 2), weights=-torch.ones(4, 2)), "weights: needs")])
def test_what_makes_no_problem_is_refused(change, message):
    given = dict(features=torch.zeros(4, 2), labels=torch.arange(4), strengths=[1.0])
    with pytest.raises(ValueError, match=message):
        fit_logistic(**(given | change))


def test_settings_of_torch_are_left_alone():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        x, y = make(N=50)
        with torch.autocast("cpu"):
            fit = fit_logistic(x.float(), y, (1.0,))
        assert torch.get_float32_matmul_precision() == "medium" and fit.converged.all()
        assert fit.weights.dtype == torch.float32 and not fit.weights.requires_grad
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- real features
def fashion_features(number, part="train"):
    """Of the network in the repository: layer3 averaged to 2 × 2, float32 [number, 512], and labels."""
    backbone, config = load_pretrained(ROOT / "weights/fashion-mnist.pth")
    images, maps = build_dataset("fashion-mnist", part).subset(slice(number)), []
    backbone.eval().layer3.register_forward_hook(
        lambda module, inputs, output: maps.append(F.adaptive_avg_pool2d(output, 2).flatten(1)))
    with torch.inference_mode():
        for x in eval_batches(images, config, "cpu"):
            backbone(x)
    return torch.cat(maps).clone(), images.labels


def test_strengths_of_the_protocol_converge_on_real_features():
    """Nine of the 45, on 1,000 images."""
    x, y = fashion_features(1000)
    fit = fit_logistic(x, y, torch.logspace(-6, 5, 45)[::5])
    assert fit.converged.all() and fit.iterations.max() < 200
    test, truth = fashion_features(1000, "test")
    accuracy = [(predict(test, *found) == truth).double().mean().item()
                for found in zip(fit.weights, fit.biases, strict=True)]
    assert max(accuracy) > 0.8 > accuracy[-1]                        # the strongest is too strong


@pytest.mark.slow
def test_all_strengths_of_the_protocol_converge_on_real_features():
    x, y = fashion_features(10_000)
    assert fit_logistic(x, y, torch.logspace(-6, 5, 45)).converged.all()


@pytest.mark.slow
def test_real_features_have_the_optimum_of_scikit_learn():
    """By Newton's method: the strength 0.01 leaves a gradient of 1e-8 at weights that are 3e-4 apart."""
    x, y = fashion_features(2000)
    test, _ = fashion_features(5000, "test")
    exact = fit_logistic(x.double(), y, STRENGTHS, max_iter=10_000, tol=1e-10)
    plain = fit_logistic(x, y, STRENGTHS, max_iter=10_000, tol=1e-6)
    assert exact.converged.all() and plain.converged.all()
    for i, strength in enumerate(STRENGTHS):
        W, b = oracle(x.double(), y, strength, "newton-cholesky")
        assert apart(exact.weights[i], W) < 1e-4
        same = predict(test.double(), plain.weights[i], plain.biases[i]) == predict(test.double(), W, b)
        assert same.double().mean() >= 0.998
