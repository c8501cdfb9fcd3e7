"""All scores of cluster_eval.py beside scikit-learn's, on as many labels as ImageNet's validation set has.

    python benchmarks/cluster_eval.py          needs scikit-learn

50,000 labels of 1,000 classes and 1,000 clusters of unequal sizes, correlated so that NMI is about 0.72.
scikit-learn is timed on NMI, AMI, ARI and FMI. Ours computes these, ami_max, the matching and the accuracies.
"""

import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy
import sklearn
from sklearn import metrics

sys.path.insert(0, str(Path(__file__).parent.parent))

from cluster_eval import evaluate  # noqa: E402
from clusters import expected_mutual_information  # noqa: E402

N, C, CORRECT, REPEATS = 50_000, 1000, 0.595, 5


def fastest(function, repeats):
    """Least seconds of several calls, and the value."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        value = function()
        seconds.append(time.perf_counter() - start)
    return min(seconds), value


def main():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, N)
    elsewhere = (C * rng.random(N) ** 1.5).astype(int)          # to some clusters more often than to others
    predictions = np.where(rng.random(N) < CORRECT, labels, elsewhere)
    probabilities = rng.random((N, C), dtype=np.float32)

    ours_s, ours = fastest(lambda: evaluate(labels, predictions), REPEATS)
    top5_s, _ = fastest(lambda: evaluate(labels, predictions, probabilities), 1)
    sizes = np.bincount(labels), np.bincount(predictions)
    emi_s, emi = fastest(lambda: expected_mutual_information(*sizes), REPEATS)
    table = metrics.cluster.contingency_matrix(labels, predictions, sparse=True)
    their_emi_s, their_emi = fastest(lambda: metrics.cluster.expected_mutual_information(table, N), 1)
    theirs_s, theirs = fastest(lambda: {
        "nmi": metrics.normalized_mutual_info_score(labels, predictions),
        "ami": metrics.adjusted_mutual_info_score(labels, predictions),
        "ari": metrics.adjusted_rand_score(labels, predictions),
        "fmi": metrics.fowlkes_mallows_score(labels, predictions)}, 1)

    print(f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}, "
          f"scikit-learn {sklearn.__version__}")
    values = ", ".join(f"{k} {ours[k]:.4f}" for k in ("acc", *theirs))
    print(f"{N:,} labels, {C:,} x {C:,} classes: {values}")
    for what, mine, other in (("NMI, AMI, ARI, FMI", ours_s, theirs_s), ("E[I] alone", emi_s, their_emi_s)):
        print(f"{what:20s} ours {mine:.4f} s, scikit-learn {other:.3f} s, ratio {other / mine:.0f}")
    print(f"{'and top-5':20s} ours {top5_s:.4f} s")
    difference = {k: abs(ours[k] - theirs[k]) for k in theirs} | {"emi": abs(emi - their_emi)}
    print("difference          " + ", ".join(f"{k} {value:.1e}" for k, value in difference.items()))


if __name__ == "__main__":
    main()
