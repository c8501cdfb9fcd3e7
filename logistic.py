"""Logistic regression for many strengths of regularisation at once, to convergence, on the features' device.

    fit = fit_logistic(features, labels, torch.logspace(-6, 5, 45))
    predictions = (test_features @ fit.weights[0].T + fit.biases[0]).argmax(1)       # with the first strength

It is L-BFGS on a batch of problems, so that one product of matrices serves all strengths:

- Features are centred and rotated to their principal axes. The optimum is the same: a rotation does not
  change |W|², and the free intercept takes the mean. But there, Böhning's bound of the Hessian is diagonal
  for every strength. L-BFGS starts from it, scaled to the curvature that the last step met.
- Near the optimum, values of the loss differ by rounding only. The line search then compares slopes.
- A problem that has converged leaves the batch.
"""

import math
from collections import deque
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

ARMIJO, ROUNDING = 0.1, 1e-6     # Hager and Zhang's delta and epsilon
MOST_TRIALS = 20                 # of a line search
OTHER_COPIES = 14                # of the parameters, which a step holds beside the history
LOGIT_COPIES = 8                 # of the logits of a chunk


class Fit(NamedTuple):
    """What fit_logistic found, for L strengths, C classes and D features."""
    weights: torch.Tensor        # [L, C, D]
    biases: torch.Tensor         # [L, C]
    converged: torch.Tensor      # bool [L]: no component of the gradient is larger than tol
    iterations: torch.Tensor     # int64 [L]: steps taken; multi-label: by the label that took most


def fit_logistic(features, labels, strengths, max_iter=300, tol=1e-4, weights=None, num_classes=None,
                 history=10, max_bytes=4 * 2**30):
    """Minimises sum of losses + strength / 2 · |W|² with a free intercept, for each of L strengths.

    features: float32 or float64 [N, D], on a CPU or CUDA device. labels: integers [N], one of C classes; or
    [N, C] of zeros and ones, labels that do not exclude each other, so C binary problems. strengths: L
    positive numbers, each scikit-learn's 1 / C. max_iter: steps that are tried. tol: a problem has converged
    when no component of the gradient of the mean objective (sum / N) is larger, as in scikit-learn.
    weights: [N, C] of a multi-label problem; 0 leaves an image out for a label, whose N is then the sum of
    its weights. num_classes: C; None: the highest label plus one. history: steps that L-BFGS remembers.
    max_bytes: held beside the features and a rotated copy of them; rows go in chunks and problems in groups,
    so that it is enough. Results do not depend on it, but for rounding.

    Returns a Fit with numbers of the features' type. A problem that has not converged has the best that was
    found. Raises ValueError if shapes, types or values do not fit.

    Source: Liu and Nocedal 1989 (L-BFGS); Böhning 1992 (bound: half of XᵀX, a quarter if binary); Hager and
    Zhang 2005, equations 4 and 27 (approximate Wolfe conditions).
    """
    strengths = torch.as_tensor(strengths, dtype=torch.float64, device=features.device).flatten()
    labels, weights, C = _check(features, labels, strengths, weights, num_classes)
    L, D = len(strengths), features.shape[1]
    binary = labels.dim() == 2
    outputs = 1 if binary else C                                        # of a problem
    column = torch.arange(C if binary else 1, device=features.device).repeat(L)
    strength = strengths.repeat_interleave(len(column) // L)            # like column, of each problem

    held = outputs * features.element_size()                            # by a problem, for a feature or a row
    group = max(1, int(0.75 * max_bytes / (held * (D + 1) * (2 * history + OTHER_COPIES))))
    group = math.ceil(len(column) / math.ceil(len(column) / group))     # groups of equal sizes
    chunk = max(1, int(0.25 * max_bytes / (held * group * LOGIT_COPIES)))
    found = []
    with torch.no_grad(), _full_precision(features.device):
        x, axes, mean = _rotate(features, max(1, int(max_bytes / (32 * D))))
        for part in zip(strength.split(group), column.split(group), strict=True):
            problems = _Problems(x, axes, mean, labels, weights, outputs, chunk, *part)
            theta, converged, iterations = _lbfgs(problems, max_iter, tol, history)
            W = theta[..., :-1] @ axes.T                                # back to the given features
            found.append((W, theta[..., -1] - W @ mean, converged, iterations))
    W, b, converged, iterations = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Fit(W.view(L, C, D), b.view(L, C), converged.view(L, -1).all(1), iterations.view(L, -1).amax(1))


def _check(features, labels, strengths, weights, num_classes):
    """Labels and weights on the features' device, and the number of classes. Raises ValueError."""
    if features.dim() != 2 or not features.numel() or features.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"features: needs float32 or float64 [N, D], not {features.dtype} "
                         f"{list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features: contain NaN or infinity")
    if not len(strengths) or not ((strengths > 0) & strengths.isfinite()).all():
        raise ValueError("strengths: needs positive numbers")
    if labels.dim() not in (1, 2) or len(labels) != len(features):
        raise ValueError(f"labels: needs [{len(features)}] or [{len(features)}, C], not {list(labels.shape)}")
    if labels.dim() == 1:
        if weights is not None:
            raise ValueError("weights: only for labels [N, C]")
        C = int(labels.max()) + 1 if num_classes is None else num_classes
        if labels.is_floating_point() or labels.min() < 0 or labels.max() >= C:
            raise ValueError(f"labels: needs integers from 0 to {C - 1}")
        return labels.to(features.device, torch.long), None, C
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels: each of [N, C] must be 0 or 1")
    labels = labels.to(features)
    weights = torch.ones_like(labels) if weights is None else weights.to(features)
    if weights.shape != labels.shape or not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"weights: needs {list(labels.shape)} numbers of at least 0")
    return labels, weights, labels.shape[1]


@contextmanager
def _full_precision(device):
    """Products of float32 in float32: with TF32's ten bits the descent would end far above tol."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _rotate(features, chunk):
    """Centred features on R principal axes with a column of ones [N, R + 1]; the axes [D, R]; the mean [D].

    R = min(N, D): along the other axes all features are 0, so the optimum has no weights there.
    """
    N, D = features.shape
    mean = features.mean(0, dtype=torch.float64)
    scatter = torch.zeros(D, D, dtype=torch.float64, device=features.device)
    for rows in features.split(chunk):
        centred = rows.double() - mean
        scatter += centred.T @ centred
    axes = torch.linalg.eigh(scatter)[1][:, -min(N, D):]
    x = features.new_ones(N, axes.shape[1] + 1)
    for out, rows in zip(x.split(chunk), features.split(chunk), strict=True):
        out[:, :-1] = (rows.double() - mean) @ axes
    return x, axes.to(features), mean.to(features)


class _Problems:
    """P problems with `outputs` outputs each: mean objective and gradient, by chunks of rows.

    curvature + penalty [P, 1, R + 1] is the diagonal bound of the Hessian, the same for all outputs.
    """

    def __init__(self, x, axes, mean, labels, weights, outputs, chunk, strength, column):
        self.x, self.axes, self.mean, self.chunk = x, axes, mean, chunk
        self.labels, self.weights, self.column = labels, weights, column
        count, bound = torch.full_like(strength, len(x)), torch.full_like(strength, 0.5)
        if weights is not None:
            count = weights.sum(0, dtype=torch.float64)[column]
            count[count == 0] = 1                                  # no image: any number gives W = 0
            bound = weights.amax(0)[column] / 4
        self.count = count[:, None, None].to(x)                    # [P, 1, 1]
        self.penalty = (strength / count)[:, None, None].to(x) * torch.ones_like(x[0])
        self.penalty[..., -1] = 0                                  # of the intercept
        self.curvature = (bound / count)[:, None, None].to(x) * x.square().sum(0)
        self.start = x.new_zeros(len(strength), outputs, x.shape[1])

    def keep(self, index):
        """Drops all problems but these."""
        for name in ("column", "count", "penalty", "curvature"):
            setattr(self, name, getattr(self, name)[index])

    def __call__(self, theta):
        """theta [P, outputs, R + 1] → mean objectives, float64 [P]; gradients like theta; [P]: their largest
        components with respect to the weights of the given features."""
        value = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
        gradient = torch.zeros_like(theta)
        loss = self._cross_entropy if self.weights is None else self._binary_cross_entropy
        for start in range(0, len(self.x), self.chunk):
            rows = slice(start, start + self.chunk)
            x = self.x[rows]
            sums, slopes = loss((x @ theta.flatten(0, 1).T).unflatten(1, theta.shape[:2]), rows)
            value += sums
            gradient += (slopes.flatten(1).T @ x).view_as(theta)
        value = value / self.count.flatten() + _dot(self.penalty * theta, theta) / 2
        gradient = gradient / self.count + self.penalty * theta
        given = gradient[..., :-1] @ self.axes.T + gradient[..., -1:] * self.mean
        return value, gradient, torch.maximum(given.abs().amax((1, 2)), gradient[..., -1].abs().amax(1))

    def _cross_entropy(self, logits, rows):
        """Sums of losses [P], and their gradient like logits [n, P, C]."""
        labels = self.labels[rows]
        index = torch.arange(len(labels), device=labels.device)
        log_p = logits.log_softmax(-1)
        sums = -log_p[index, :, labels].sum(0, dtype=torch.float64)
        slopes = log_p.exp_()                                     # in place: logits take the most memory
        slopes[index, :, labels] -= 1
        return sums, slopes

    def _binary_cross_entropy(self, logits, rows):
        """Sums of weighted losses [P], and their gradient like logits [n, P, 1]."""
        labels, weights = self.labels[rows][:, self.column, None], self.weights[rows][:, self.column, None]
        losses = F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none")
        return losses.sum((0, 2), dtype=torch.float64), (logits.sigmoid() - labels) * weights


def _dot(a, b):
    """Inner products of the problems' arrays, [P, outputs, R + 1] → float64 [P]."""
    return (a * b).sum((1, 2), dtype=torch.float64)


def _lbfgs(problems, max_iter, tol, history):
    """Minimises _Problems → theta [P, outputs, R + 1], converged [P], iterations [P]. Each has its step."""
    theta = problems.start
    final, active = theta.clone(), torch.arange(len(theta), device=theta.device)
    converged, iterations = torch.zeros_like(active, dtype=torch.bool), torch.zeros_like(active)
    value, gradient, largest = problems(theta)
    direction = -gradient / (problems.curvature + problems.penalty)
    step, trials = torch.ones_like(value), torch.zeros_like(active)
    pairs = deque(maxlen=history)
    for tried in range(max_iter + 1):
        slope = _dot(gradient, direction)
        done = largest <= tol
        leaves = done | ~(slope < 0) | (trials == MOST_TRIALS) | (tried == max_iter)
        if leaves.any():
            final[active[leaves]], converged[active[leaves]] = theta[leaves], done[leaves]
            stay = (~leaves).nonzero().flatten()
            if not len(stay):
                break
            problems.keep(stay)
            theta, gradient, direction, value, slope, step, trials, active = (
                t[stay] for t in (theta, gradient, direction, value, slope, step, trials, active))
            for i, pair in enumerate(pairs):
                pairs[i] = tuple(t[stay] for t in pair)

        move = step.to(theta)[:, None, None] * direction
        new_value, new_gradient, new_largest = problems(theta + move)
        new_slope = _dot(new_gradient, direction)
        # On a parabola, both conditions say the same. The second needs no difference of two values, which
        # near the optimum is smaller than their rounding: with the first alone the search would stall there.
        falls = new_value <= value + ARMIJO * step * slope
        flattens = (new_slope <= (2 * ARMIJO - 1) * slope) & (new_value <= value + ROUNDING * value.abs())
        accepted = falls | flattens
        taken = accepted[:, None, None]
        change = new_gradient - gradient
        rho = torch.where(accepted & (_dot(move, change) > 0), 1 / _dot(move, change), 0)
        # a refused step stays out of the history
        pairs.append((torch.where(taken, move, 0), torch.where(taken, change, 0), rho.to(theta)))
        theta, gradient = torch.where(taken, theta + move, theta), torch.where(taken, new_gradient, gradient)
        value, largest = torch.where(accepted, new_value, value), torch.where(accepted, new_largest, math.inf)
        newest = -_inverse_hessian_times(gradient, pairs, problems)
        direction = torch.where(taken, newest, direction)
        shorter = step * (slope / (slope - new_slope)).nan_to_num(0.1).clamp(0.1, 0.5)              # secant
        step, trials = torch.where(accepted, 1, shorter), torch.where(accepted, 0, trials + 1)
        iterations[active] += accepted
    return final, converged, iterations


def _inverse_hessian_times(gradient, pairs, problems):
    """The two loops of L-BFGS (Nocedal and Wright, algorithm 7.4), from scale · curvature + penalty.

    Böhning's bound is several times the true curvature where the classes are sure. The last step tells how
    many times, of the loss alone: the penalty is exact.
    """
    q, alphas = gradient, []
    for move, change, rho in reversed(pairs):
        alphas.append((rho * _dot(move, q).to(rho))[:, None, None])
        q = q - alphas[-1] * change
    move, change, rho = pairs[-1]
    loss_change = change - problems.penalty * move
    least = torch.finfo(q.dtype).eps * problems.curvature.amax(-1, keepdim=True)   # some directions have none
    scale = _dot(loss_change, loss_change / problems.curvature.clamp_min(least)) / _dot(loss_change, move)
    scale = torch.where((rho > 0) & (scale > 0), scale, 1).clamp(1e-3, 1).to(q)
    q = q / (scale[:, None, None] * problems.curvature + problems.penalty)
    for (move, change, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + (alpha - (rho * _dot(change, q).to(rho))[:, None, None]) * move
    return q
