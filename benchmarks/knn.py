"""k-NN classification beside scikit-learn's brute force and a plain loop over chunks in PyTorch.

    python benchmarks/knn.py          needs scikit-learn

10,000 queries against 60,000 training features of 128 and of 512 numbers, ten classes, the 20 nearest by
cosine. Ours and the loop weigh votes by exp(similarity / 0.07); scikit-learn gets the same weights. The
predictions of the three are compared first, then the three take turns. Medians of all rounds.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

sys.path.insert(0, str(Path(__file__).parent.parent))

from knn import knn_predict  # noqa: E402

M, N, C, K, T, ROUNDS = 60_000, 10_000, 10, 20, 0.07, 3


def ours(train, labels, queries):
    return knn_predict(train, labels, queries, K, T, C).argmax(1)


def plain_loop(train, labels, queries, chunk=100):
    """As DINO evaluates: for 1/100 of the queries at a time all similarities, topk, and one-hot votes."""
    train, queries = F.normalize(train, dim=1), F.normalize(queries, dim=1)
    predictions = []
    for part in queries.split(chunk):
        similarity, index = (part @ train.T).topk(K)                                      # [chunk, K]
        votes = F.one_hot(labels[index], C) * (similarity / T).exp()[:, :, None]          # [chunk, K, C]
        predictions.append(votes.sum(1).argmax(1))
    return torch.cat(predictions)


def scikit_learn(train, labels, queries):
    model = KNeighborsClassifier(K, weights=lambda distance: np.exp((1 - distance) / T), algorithm="brute",
                                 metric="cosine", n_jobs=torch.get_num_threads())
    return torch.from_numpy(model.fit(train.numpy(), labels.numpy()).predict(queries.numpy()))


def seconds(function, data):
    start = time.perf_counter()
    function(*data)
    return time.perf_counter() - start


def main():
    print(f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
          f"scikit-learn {sklearn.__version__}, CPU, {torch.get_num_threads()} threads; medians of {ROUNDS}")
    forms = {"ours": ours, "scikit-learn": scikit_learn, "plain loop": plain_loop}
    for D in (128, 512):
        rng = torch.Generator().manual_seed(0)
        labels, centres = torch.randint(0, C, (M + N,), generator=rng), torch.randn(C, D, generator=rng)
        features = 0.2 * centres[labels] + torch.randn(M + N, D, generator=rng)
        data = features[:M], labels[:M], features[M:]
        predictions = {name: form(*data) for name, form in forms.items()}                 # this warms up, too
        same = {name: (predictions["ours"] == other).double().mean().item()
                for name, other in predictions.items()}
        assert min(same.values()) > 0.999, f"the predictions differ: {same}"             # but for ties
        accuracy = (predictions["ours"] == labels[M:]).double().mean().item()
        agreement = ", ".join(f"{name} {share:.2%}" for name, share in same.items() if name != "ours")
        print(f"{N:,} × {M:,}, {D} numbers each, k = {K}: accuracy {accuracy:.4f}; predictions as ours: "
              f"{agreement}", flush=True)
        rounds = [{name: seconds(form, data) for name, form in forms.items()} for _ in range(ROUNDS)]
        taken = {name: [entry[name] for entry in rounds] for name in forms}
        for name, values in taken.items():
            ratio = statistics.median(values) / statistics.median(taken["ours"])
            print(f"  {name:12s} {statistics.median(values):6.2f} s ({min(values):.2f} to {max(values):.2f})"
                  + (f", {ratio:.2f} times ours (required: at least 1)" if name != "ours" else ""))


if __name__ == "__main__":
    main()
