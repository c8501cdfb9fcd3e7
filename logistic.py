"""Logistic regression for many strengths of regularisation at once, to convergence, on the features' device.

    weights, biases = fit_logistic(features, labels, torch.logspace(-6, 5, 45))[:2]
    predictions = (test_features @ weights[l].T + biases[l]).argmax(1)           # of the l-th strength

L-BFGS by batches of problems: one product of matrices serves all strengths. Three things make it fast and exact.
Features are centred and rotated to their principal axes, which leaves the optimum as it is: |W|² does not change
under a rotation, and the free intercept takes the mean. There, Böhning's bound of the Hessian is nearly diagonal
for every strength, so it is the Hessian that L-BFGS starts from. The line search compares slopes where values
differ by rounding only.
"""

import math
from collections import deque
from contextlib import contextmanager
from typing import NamedTuple

import torch

ARMIJO, ROUNDING = 0.1, 1e-6     # Hager and Zhang's delta and epsilon
MOST_TRIALS = 20                 # of one line search
OTHER_COPIES = 14                # arrays as large as the parameters that a step needs beside the history


class Fit(NamedTuple):
    """What fit_logistic found, for L strengths, C classes and D features."""
    weights: torch.Tensor        # [L, C, D]
    biases: torch.Tensor         # [L, C]
    converged: torch.Tensor      # bool [L]: the largest component of the gradient is at most tol
    iterations: torch.Tensor     # int64 [L]: steps taken; multi-label: of the label that took most


def fit_logistic(features, labels, strengths, max_iter=300, tol=1e-4, weights=None, num_classes=None,
                 history=10, max_bytes=4 * 2**30):
    """Minimises sum of losses + strength / 2 · |W|² with a free intercept, for each of L strengths.

    features: float32 or float64 [N, D], on a CPU or CUDA device. labels: integers [N], one of C classes; or float
    [N, C] of zeros and ones, C labels that do not exclude each other: C binary problems. strengths: L positive
    numbers, scikit-learn's 1 / C. max_iter: evaluations of loss and gradient. tol: a problem is done when no
    component of the gradient of the mean loss, with its penalty, is larger; that is scikit-learn's rule.
    weights: [N, C] of a multi-label problem, 0 leaves an image out for a label. num_classes: C; without it the
    highest label plus one. history: pairs of L-BFGS. max_bytes: what is held beside the features and a rotated copy
    of them; rows are taken in chunks and problems in groups so that it is enough.

    Returns a Fit, of the features' type. Problems that are not done after max_iter, or whose loss does not fall
    any more, are not marked as converged. Raises ValueError for shapes, labels, weights, strengths or features that
    make no problem.

    Source: Liu and Nocedal 1989 (L-BFGS); Böhning 1992 (bound: half of XᵀX, a quarter if binary); Hager and
    Zhang 2005, section 2 (approximate Wolfe conditions).
    """
    strengths = torch.as_tensor(strengths, dtype=torch.float64, device=features.device).flatten()
    labels, weights, C = _check(features, labels, strengths, weights, num_classes)
    L, D = len(strengths), features.shape[1]
    binary = labels.dim() == 2
    outputs = 1 if binary else C                                   # of a problem
    strength = strengths.repeat_interleave(C) if binary else strengths                             # [problems]
    column = torch.arange(C, device=features.device).repeat(L) if binary else torch.zeros_like(strength).long()

    with torch.no_grad(), _full_precision(features.device):
        held = (2 * history + OTHER_COPIES) * outputs * (D + 1) * features.element_size()    # by a problem
        group = max(1, min(len(strength), int(0.75 * max_bytes / held)))
        chunk = max(1, int(0.25 * max_bytes / (4 * group * outputs * features.element_size())))
        x, axes, mean = _rotate(features, chunk)
        found = []
        for s, c in zip(strength.split(group), column.split(group), strict=True):
            problem = _Problem(x, axes, mean, labels, weights, outputs, s, c, chunk)
            theta, converged, iterations = _lbfgs(problem, max_iter, tol, history)
            W = theta[..., :-1] @ axes.T
            found.append((W, theta[..., -1] - W @ mean, converged, iterations))
        W, b, converged, iterations = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Fit(W.view(L, C, D), b.view(L, C), converged.view(L, -1).all(1), iterations.view(L, -1).amax(1))


def _check(features, labels, strengths, weights, num_classes):
    """Labels and weights on the device, and the number of classes. Raises ValueError."""
    if features.dim() != 2 or 0 in features.shape or features.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"features: float32 or float64 [N, D] is needed, not {features.dtype} "
                         f"{list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features: some are not finite")
    if not len(strengths) or not ((strengths > 0) & strengths.isfinite()).all():
        raise ValueError("strengths: positive numbers are needed")
    if labels.dim() not in (1, 2) or len(labels) != len(features):
        raise ValueError(f"labels: [N] or [N, C] with N = {len(features)} is needed, not {list(labels.shape)}")
    labels = labels.to(features.device, torch.long if labels.dim() == 1 else features.dtype)
    if labels.dim() == 1:
        C = int(labels.max()) + 1 if num_classes is None else num_classes
        if weights is not None:
            raise ValueError("weights: only multi-label problems have them")
        if labels.min() < 0 or labels.max() >= C:
            raise ValueError(f"labels: 0 to {C - 1} is needed, not {int(labels.min())} to {int(labels.max())}")
        return labels, None, C
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels: of [N, C] each is 0 or 1")
    weights = torch.ones_like(labels) if weights is None else weights.to(labels)
    if weights.shape != labels.shape or not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"weights: {list(labels.shape)} of at least 0 is needed")
    return labels, weights, labels.shape[1]


@contextmanager
def _full_precision(device):
    """Products of matrices in float32 proper: TF32's ten bits would end the descent far above tol."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _rotate(features, chunk):
    """Centred features on their principal axes with a column of ones [N, R + 1], the axes [D, R], the mean [D].

    R = min(N, D): other directions have no features, so the optimum has no weights there.
    """
    N, D = features.shape
    mean = features.mean(0, dtype=torch.float64)
    scatter = torch.zeros(D, D, dtype=torch.float64, device=features.device)
    for part in features.split(chunk):
        part = part.double() - mean
        scatter += part.T @ part
    axes = torch.linalg.eigh(scatter)[1][:, -min(N, D):]
    x = features.new_ones(N, axes.shape[1] + 1)
    for rows, part in zip(x.split(chunk), features.split(chunk), strict=True):
        rows[:, :-1] = (part.double() - mean) @ axes
    return x, axes.to(features.dtype), mean.to(features.dtype)


class _Problem:
    """P problems of `outputs` outputs each: the mean objective and its gradient, by chunks of rows."""

    def __init__(self, x, axes, mean, labels, weights, outputs, strength, column, chunk):
        self.x, self.axes, self.mean, self.labels, self.weights, self.chunk = x, axes, mean, labels, weights, chunk
        self.column = column
        if weights is None:
            count = torch.full_like(strength, len(x))
        else:
            count = weights.sum(0, dtype=torch.float64)[column].clamp_min(1)            # of rows, [P]
        self.count = count[:, None, None].to(x.dtype)                                   # [P, 1, 1]
        self.penalty = (strength / count)[:, None, None].to(x.dtype) * torch.ones_like(x[0])
        self.penalty[..., -1] = 0                                                       # [P, 1, R + 1]
        bound = 0.5 if weights is None else 0.25
        # a direction without features has no curvature but the penalty's
        self.hessian = bound * x.square().sum(0) / self.count + self.penalty            # [P, 1, R + 1]
        self.start = x.new_zeros(len(strength), outputs, x.shape[1])

    def keep(self, index):
        """Only these of the problems are evaluated from now on."""
        for name in ("column", "count", "penalty", "hessian"):
            setattr(self, name, getattr(self, name)[index])

    def __call__(self, theta):
        """theta [P, outputs, R + 1] → mean objectives, float64 [P]; gradients like theta; their largest
        components [P], as they are before centring and rotating."""
        gradient = torch.zeros_like(theta)
        value = torch.zeros(len(theta), dtype=torch.float64, device=theta.device)
        for start in range(0, len(self.x), self.chunk):
            rows = slice(start, start + self.chunk)
            logits = (self.x[rows] @ theta.flatten(0, 1).T).unflatten(1, theta.shape[:2])     # [n, P, outputs]
            loss, slope = self._softmax(logits, rows) if self.weights is None else self._sigmoid(logits, rows)
            value += loss
            gradient += (slope.flatten(1).T @ self.x[rows]).view_as(theta)
        value = value / self.count.flatten() + (self.penalty * theta.square()).sum((1, 2), dtype=torch.float64) / 2
        gradient = gradient / self.count + self.penalty * theta
        original = gradient[..., :-1] @ self.axes.T + gradient[..., -1:] * self.mean
        return value, gradient, torch.maximum(original.abs().amax((1, 2)), gradient[..., -1].abs().amax(1))

    def _softmax(self, logits, rows):
        """Sum of cross entropies [P], and its gradient like logits [n, P, C]."""
        labels = self.labels[rows]
        index = torch.arange(len(labels), device=labels.device)
        logits = logits.log_softmax(-1)
        loss = -logits[index, :, labels].sum(0, dtype=torch.float64)
        slope = logits.exp_()
        slope[index, :, labels] -= 1
        return loss, slope

    def _sigmoid(self, logits, rows):
        """Sum of weighted binary cross entropies [P], and its gradient like logits [n, P, 1]."""
        labels, weights = self.labels[rows][:, self.column, None], self.weights[rows][:, self.column, None]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, weights, reduction="none")
        return loss.sum((0, 2), dtype=torch.float64), (logits.sigmoid() - labels) * weights


def _dot(a, b):
    """Inner products of the problems' arrays, [P, outputs, R + 1] → float64 [P]."""
    return (a * b).sum((1, 2), dtype=torch.float64)


def _lbfgs(problem, max_iter, tol, history):
    """Minimises a _Problem → parameters [P, outputs, R + 1], converged [P], iterations [P].

    Each problem has its own line search. Those that are done leave the batch.
    """
    theta = problem.start
    P, device = len(theta), theta.device
    final, converged = theta.clone(), torch.zeros(P, dtype=torch.bool, device=device)
    iterations = torch.zeros(P, dtype=torch.long, device=device)
    active = torch.arange(P, device=device)
    pairs = deque(maxlen=history)
    value, gradient, largest = problem(theta)
    direction = -gradient / problem.hessian
    step = torch.ones_like(value)
    trials = torch.zeros_like(active)
    for evaluation in range(max_iter + 1):
        slope = _dot(gradient, direction)
        done = largest <= tol
        leaves = done | (trials >= MOST_TRIALS) | ~(slope < 0) | (evaluation == max_iter)
        if leaves.any():
            final[active[leaves]], converged[active[leaves]] = theta[leaves], done[leaves]
            stay = (~leaves).nonzero().flatten()
            if not len(stay):
                break
            problem.keep(stay)
            theta, gradient, direction, value, slope, step, trials, active = (
                t[stay] for t in (theta, gradient, direction, value, slope, step, trials, active))
            for i, pair in enumerate(pairs):
                pairs[i] = tuple(t[stay] for t in pair)
        move = step.to(theta.dtype)[:, None, None] * direction
        new_value, new_gradient, new_largest = problem(theta + move)
        new_slope = _dot(new_gradient, direction)
        # Near the optimum, values differ by rounding only. The slope along the line is still exact there: on a
        # parabola, the second condition is the same as the first.
        falls = new_value <= value + ARMIJO * step * slope
        flattens = (new_slope <= (2 * ARMIJO - 1) * slope) & (new_value <= value + ROUNDING * value.abs())
        accepted = falls | flattens
        where = accepted[:, None, None]
        change = new_gradient - gradient
        curvature = _dot(move, change)
        # a pair of a step that is not taken counts for nothing
        rho = torch.where(accepted & (curvature > 0), 1 / curvature, 0)
        pairs.append((torch.where(where, move, 0), torch.where(where, change, 0), rho.to(theta.dtype)))
        theta, gradient = torch.where(where, theta + move, theta), torch.where(where, new_gradient, gradient)
        value = torch.where(accepted, new_value, value)
        largest = torch.where(accepted, new_largest, math.inf)
        direction = torch.where(where, -_inverse_hessian_times(gradient, pairs, problem.hessian), direction)
        shorter = step * (slope / (slope - new_slope)).nan_to_num(0.1).clamp(0.1, 0.5)      # by secant
        step = torch.where(accepted, 1, shorter)
        trials = torch.where(accepted, 0, trials + 1)
        iterations[active] += accepted
    return final, converged, iterations


def _inverse_hessian_times(gradient, pairs, hessian):
    """The two loops of L-BFGS (Nocedal and Wright, algorithm 7.4), from a diagonal Hessian [P, 1, R + 1]."""
    q, alphas = gradient, []
    for move, change, rho in reversed(pairs):
        alphas.append(rho * _dot(move, q).to(rho))
        q = q - alphas[-1][:, None, None] * change
    q = q / hessian
    for (move, change, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        q = q + (alpha - rho * _dot(change, q).to(rho))[:, None, None] * move
    return q
