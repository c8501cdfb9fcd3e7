"""fit_logistic beside scikit-learn's LogisticRegression, as ssl-transfer calls it, on 45 strengths.

    python benchmarks/transfer.py          needs scikit-learn

10,000 Fashion-MNIST images, features of weights/fashion-mnist.pth: layer3 averaged to 2 × 2, so 512 numbers.
scikit-learn goes from weak to strong, each from the last weights, with 100 iterations and tolerance 1e-4. One
thread each, in CPU seconds, which other programs on the machine disturb less than they disturb a clock.
"""

import argparse
import platform
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import build_dataset, eval_batches  # noqa: E402
from logistic import fit_logistic  # noqa: E402
from pretrained import load_pretrained  # noqa: E402

MOST = 0.7                                                                # of scikit-learn's seconds


def extract(part):
    """Features [10,000, 512] and labels."""
    backbone, config = load_pretrained(ROOT / "weights/fashion-mnist.pth")
    images, maps = build_dataset("fashion-mnist", part).subset(slice(10_000)), []
    backbone.eval().layer3.register_forward_hook(
        lambda module, inputs, output: maps.append(F.adaptive_avg_pool2d(output, 2).flatten(1)))
    with torch.inference_mode():
        for x in eval_batches(images, config, "cpu"):
            backbone(x)
    return torch.cat(maps).clone(), images.labels


def scikit_learn(x, y, strengths):
    """Weights [L, C, D], biases [L, C], and whether each converged within the limit [L]."""
    model, found = LogisticRegression(solver="lbfgs", warm_start=True, max_iter=100, tol=1e-4), []
    for strength in strengths.tolist():
        model.set_params(C=1 / strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # of no convergence
            model.fit(x.numpy(), y.numpy())
        found.append((model.coef_.copy(), model.intercept_.copy(), model.n_iter_[0] < 100))
    return [torch.from_numpy(np.array(part)) for part in zip(*found, strict=True)]


def main(args):
    torch.set_num_threads(1)
    threadpool_limits(1)                                                  # of scikit-learn's BLAS
    print(f"Python {platform.python_version()}, torch {torch.__version__}, scikit-learn "
          f"{sklearn.__version__}, CPU, 1 thread", flush=True)
    (x, y), (test, truth) = extract("train"), extract("test")
    strengths = torch.logspace(-6, 5, args.strengths)
    x, y, taken = x[:args.images], y[:args.images], {}
    for name, fit in (("fit_logistic", fit_logistic), ("scikit-learn", scikit_learn)):
        start = time.process_time()
        W, b, converged, *_ = fit(x, y, strengths)
        taken[name] = time.process_time() - start
        top1 = torch.stack([(test @ w.T.float() + c).argmax(1).eq(truth).double().mean()
                            for w, c in zip(W, b, strict=True)])
        print(f"  {name:13s} {taken[name]:6.1f} CPU s, {int(converged.sum())} of {len(strengths)} converged; "
              f"best test top-1 {top1.max():.4f} at strength {strengths[top1.argmax()]:.3g}", flush=True)
    ratio = taken["fit_logistic"] / taken["scikit-learn"]
    print(f"  {ratio:.2f} of scikit-learn's time (required: at most {MOST})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=10_000, help="training images")
    parser.add_argument("--strengths", type=int, default=45, help="between 1e-6 and 1e5")
    main(parser.parse_args())
