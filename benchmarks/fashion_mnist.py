"""Fashion-MNIST: every stage with several seeds, compared with raw pixels. The same command resumes.

    python benchmarks/fashion_mnist.py                        about 15 minutes per seed on two cores
    python benchmarks/fashion_mnist.py --seeds 0 --recipes classes

ACC, NMI, ARI, AMI: predicted classes of the 10,000 test images; k-means is fitted on the training pixels.
20-NN: cosine, T = 0.07, against all 60,000 labelled training images. Linear: multinomial logistic regression
on centred and scaled features. Its C is chosen on 10,000 held-out training images; then it is fitted on all.
top1: lincls.py and semisup.py on the test images, from the backbone of `representation`.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import load_twist, write_atomically  # noqa: E402
from cluster_eval import evaluate, predict  # noqa: E402
from data import build_dataset, eval_batches  # noqa: E402
from knn import extract_features, knn_predict  # noqa: E402

RECIPES = {       # name: (the recipe whose network it starts from, command)
    "classes": (None, ["pretrain.py"]),
    "representation": (None, ["pretrain.py", "@recipes/fashion_mnist_representation.txt"]),
    "self-labelled": ("classes", ["selflabel.py", "@recipes/fashion_mnist_selflabel.txt"]),
    "linear": ("representation", ["lincls.py", "@recipes/fashion_mnist_lincls.txt"]),
    "1 % fine-tuned": ("representation", ["semisup.py", "@recipes/fashion_mnist_semisup_1.txt"]),
    "1 % from scratch": ("representation", ["semisup.py", "@recipes/fashion_mnist_semisup_1.txt",
                                            "--lr", "0.03", "--random-init"]),
    "10 % fine-tuned": ("representation", ["semisup.py", "@recipes/fashion_mnist_semisup_10.txt"]),
    "10 % from scratch": ("representation", ["semisup.py", "@recipes/fashion_mnist_semisup_10.txt",
                                             "--lr", "0.03", "--random-init"]),
}


def knn_accuracy(train_features, train, features, test):
    """20-NN accuracy on the test set; train, test: ImageSets, which hold the labels."""
    scores = knn_predict(train_features, train.labels, features, k=20, temperature=0.07, num_classes=10)
    return (scores.argmax(1) == test.labels).double().mean().item()


def linear_accuracy(train_features, train, features, test):
    """Accuracy of logistic regression on the test set; features are arrays [N, D]."""
    mean, scale = train_features.mean(0), train_features.std()
    x, x_test = (train_features - mean) / scale, (features - mean) / scale
    y, y_test = train.labels.numpy(), test.labels.numpy()

    def score(C, fit, held):
        return LogisticRegression(C=C, max_iter=200, tol=1e-3).fit(x[fit], y[fit]).score(*held)

    best = max((0.01, 0.1, 1.0), key=lambda C: score(C, slice(50_000), (x[50_000:], y[50_000:])))
    return score(best, slice(None), (x_test, y_test))


def pixels(train, test, seeds):
    """Yields the results of raw pixels: k-NN and logistic regression, then k-means for each seed."""
    x, x_test = (part.images.flatten(1).float() / 255 for part in (train, test))
    mean = x.mean(0)
    yield dict(method="pixels", knn=knn_accuracy(x, train, x_test, test),
               knn_centred=knn_accuracy(x - mean, train, x_test - mean, test),
               linear=linear_accuracy(x.numpy(), train, x_test.numpy(), test))
    for seed in seeds:
        kmeans = KMeans(10, n_init=1, random_state=seed).fit(x.numpy())
        scores = evaluate(test.labels.numpy(), kmeans.predict(x_test.numpy()).astype(int))
        yield dict(method="k-means on pixels", seed=seed, **scores)


def trained(recipe, seed, train, test, folder):
    """Runs one recipe with one seed, by the command that a user types, and scores its network."""
    out, start = folder / f"{recipe}_{seed}".replace(" ", "_").replace("%", "percent"), time.time()
    origin, command = RECIPES[recipe]
    command = [sys.executable, *command, "--seed", str(seed), "--output-dir", str(out)]
    if origin:
        command += ["--checkpoint", str(folder / f"{origin}_{seed}" / "checkpoint.pth")]
    subprocess.run(command, cwd=ROOT, check=True)
    minutes = (time.time() - start) / 60
    if command[1] in ("lincls.py", "semisup.py"):
        metrics = json.loads((out / "metrics.json").read_text())
        top1 = metrics["test_top1"] if "test_top1" in metrics else metrics["results"][0]["test_top1"]
        return dict(method=recipe, seed=seed, minutes=minutes, top1=top1)
    network, config = load_twist(out / "checkpoint.pth")
    features = [extract_features(network.backbone, eval_batches(part, config, "cpu"))
                for part in (train, test)]
    result = dict(method=recipe, seed=seed, minutes=minutes)
    _, probabilities = predict(network, eval_batches(test, config, "cpu"))
    if probabilities.shape[1] == 10:
        result |= evaluate(test.labels.numpy(), probabilities.argmax(1), probabilities)
    return result | dict(knn=knn_accuracy(features[0], train, features[1], test),
                         linear=linear_accuracy(features[0].numpy(), train, features[1].numpy(), test))


def table(results):
    """Prints one row per method: the mean over its seeds, and (least to greatest) if there are several."""
    columns = ("acc", "nmi", "ari", "ami", "knn", "knn_centred", "linear", "top1", "minutes")
    print("| method | seeds | " + " | ".join(columns) + " |\n" + "|---" * (2 + len(columns)) + "|")
    for method in dict.fromkeys(r["method"] for r in results):
        rows, cells = [r for r in results if r["method"] == method], []
        for column in columns:
            values = [r[column] for r in rows if column in r]
            digits = 1 if column == "minutes" else 3
            cell = f"{np.mean(values):.{digits}f}" if values else ""
            if len(values) > 1:
                cell += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            cells.append(cell)
        print(f"| {method} | {len(rows)} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, help="default: all")
    parser.add_argument("--output-dir", default="runs/fashion_mnist", help="default: runs/fashion_mnist")
    args = parser.parse_args()
    folder = Path(args.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else []
    done = {(r["method"], r.get("seed")) for r in results}
    train, test = build_dataset("fashion-mnist", "train"), build_dataset("fashion-mnist", "test")

    if ("pixels", None) not in done:
        results += pixels(train, test, args.seeds)
        write_atomically(path, json.dumps(results).encode())
    for recipe in args.recipes:
        for seed in args.seeds:
            if (recipe, seed) not in done:
                results.append(trained(recipe, seed, train, test, folder))
                write_atomically(path, json.dumps(results).encode())
    table(results)
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {platform.machine()}, "
          f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
