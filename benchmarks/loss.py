"""Measures twist_loss and the published code's form: pair by pair, every softmax and logarithm anew.

    python benchmarks/loss.py

Forward and backward with 2 global and 12 local views, batch 64, 4096 classes. The two forms take turns.
First it compares values and gradients, then time, memory kept for backward, and the cost of twice the views.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from cli import keep_memory  # noqa: E402
from loss import twist_loss  # noqa: E402

V, B, C, REPEATS = 14, 64, 4096, 15


def pair_by_pair(logits, alpha=1.0, beta=1.0, eps=1e-5, tau=1.0, num_global=2):
    """The same objective as a mean over pairs of views, nothing shared between pairs: 25 pairs at V = 14."""
    def kl(p, q):
        return (p * (torch.log(p + eps) - torch.log(q + eps))).sum(-1).mean()

    def entropy(p):
        return -(p * torch.log(p + eps)).sum(-1).mean()

    total, num_pairs = 0.0, 0
    for g in range(num_global):
        for s in range(g + 1, len(logits)):
            p1, p2 = logits[g].softmax(-1), logits[s].softmax(-1)                         # [B, C]
            q1, q2 = (logits[g] / tau).softmax(-1), (logits[s] / tau).softmax(-1)         # for both entropies
            consistency = 0.5 * (kl(p1, p2) + kl(p2, p1))
            sharpness = 0.5 * (entropy(q1) + entropy(q2))
            diversity = 0.5 * (entropy(q1.mean(0)) + entropy(q2.mean(0)))
            total, num_pairs = total + consistency + alpha * sharpness - beta * diversity, num_pairs + 1
    return total / num_pairs


def ours(logits):
    return twist_loss(logits).total


def seconds(function, logits):
    """Seconds that one forward and backward take."""
    start = time.perf_counter()
    torch.autograd.grad(function(logits), logits)
    return time.perf_counter() - start


def alternate(first, second, repeats=REPEATS):
    """Median seconds of two calls (function, logits), in turns, so that other work slows both alike."""
    pairs = [(seconds(*first), seconds(*second)) for _ in range(repeats + 1)][1:]        # the first warms up
    return [statistics.median(column) for column in zip(*pairs, strict=True)]


def saved_bytes(function, logits):
    """Bytes that forward keeps for backward. Each storage counts once, that of the logits not at all."""
    kept = {}                         # holds the tensors: a freed address could be used a second time

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(logits)
    kept.pop(logits.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def main():
    keep_memory()                            # as a stage does: page faults would take up to half of the time
    print(f"Python {platform.python_version()}, torch {torch.__version__}, CPU, "
          f"{torch.get_num_threads()} threads; medians of {REPEATS}")
    torch.manual_seed(0)
    logits, twice = (torch.randn(views, B, C).requires_grad_() for views in (V, 2 * V))

    value, their_value = ours(logits), pair_by_pair(logits)
    gradient, their_gradient = (torch.autograd.grad(x, logits)[0] for x in (value, their_value))
    error = (gradient - their_gradient).abs().max() / their_gradient.abs().max()
    assert abs(value - their_value) < 1e-4 and error < 1e-4, "the two forms differ"
    print(f"V {V}, B {B}, C {C}: loss {value.item():.5f}, pair by pair {their_value.item():.5f}; "
          f"largest difference of gradients {error:.0e} of the largest")

    mine, theirs = alternate((ours, logits), (pair_by_pair, logits))
    print(f"forward + backward   ours {1e3 * mine:.1f} ms, pair by pair {1e3 * theirs:.1f} ms: "
          f"{theirs / mine:.1f} times as fast (required: at least 4)")
    kept, their_kept = saved_bytes(ours, logits), saved_bytes(pair_by_pair, logits)
    print(f"saved for backward   ours {kept / 2**20:.0f} MiB, pair by pair {their_kept / 2**20:.0f} MiB: "
          f"{kept / their_kept:.3f} of it (required: at most 0.25)")
    once, double = alternate((ours, logits), (ours, twice))
    print(f"twice the views      V {V} {1e3 * once:.1f} ms, V {2 * V} {1e3 * double:.1f} ms: "
          f"{double / once:.2f} times the cost (required: at most 2.4)")


if __name__ == "__main__":
    main()
