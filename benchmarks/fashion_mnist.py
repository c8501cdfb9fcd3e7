"""Fashion-MNIST: every stage with several seeds, compared with raw pixels. The same command resumes.

    python benchmarks/fashion_mnist.py                                everything, up to 280 runs
    python benchmarks/fashion_mnist.py --recipes classes --seeds 10   the default run, one seed, all roundings

A run is a line of OUTPUT_DIR/results.csv. What finds classes runs with 10 seeds, 1 and 2 threads and each
rounding of this CPU: ATEN_CPU_CAPABILITY makes PyTorch use the instructions of older ones, which round
otherwise; bf16 is --amp bf16, on a CPU that has it. The rest runs with the first 5 seeds, one thread and the
last rounding. Seeds begin at 10, since settings were chosen with smaller ones.

ACC, NMI, ARI, AMI: predicted classes of the 10,000 test images; k-means is fitted on the training pixels.
20-NN: cosine, T = 0.07, against all 60,000 labelled training images; whitened: the same with knn.py
--whiten. Linear: multinomial logistic regression on centred and scaled features. Its C is chosen on 10,000
held-out training images; then it is fitted on all.
top1: lincls.py and semisup.py on the test images, from the backbone of `representation`, or from the same
after ten epochs instead of three. cpu_seconds: of all threads of the command, its start-up included; of a run
that was stopped and resumed, its last part alone.
"""

import argparse
import csv
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoint import write_atomically  # noqa: E402
from cluster_eval import evaluate  # noqa: E402
from data import build_dataset, eval_batches  # noqa: E402
from knn import extract_features, knn_predict, whiten  # noqa: E402
from predictions import predict  # noqa: E402
from pretrained import load_twist  # noqa: E402

RECIPES = {       # name: (the recipe whose network it starts from, command)
    "classes": (None, ["pretrain.py"]),
    "2 × 2 places": (None, ["pretrain.py", "--arch", "resnet8_2x2"]),
    "representation": (None, ["pretrain.py", "@recipes/fashion_mnist_representation.txt"]),
    "ten epochs": (None, ["pretrain.py", "@recipes/fashion_mnist_representation.txt", "--epochs", "10"]),
    "self-labelled": ("classes", ["selflabel.py", "@recipes/fashion_mnist_selflabel.txt"]),
    "linear": ("representation", ["lincls.py", "@recipes/fashion_mnist_lincls.txt"]),
    "1 % fine-tuned": ("representation", ["semisup.py", "@recipes/fashion_mnist_semisup_1.txt"]),
    "1 %, ten epochs": ("ten epochs", ["semisup.py", "@recipes/fashion_mnist_semisup_1.txt"]),
    "1 % from scratch": ("representation", ["semisup.py", "@recipes/fashion_mnist_semisup_1.txt",
                                            "--min-scale", "0.7", "--random-init"]),
    "10 % fine-tuned": ("representation", ["semisup.py", "@recipes/fashion_mnist_semisup_10.txt"]),
    "10 % from scratch": ("representation", ["semisup.py", "@recipes/fashion_mnist_semisup_10.txt",
                                             "--random-init"]),
}
FIND_CLASSES = ("classes", "2 × 2 places", "self-labelled")
SEEDS_OF_THE_REST = 5
ALL_ROUNDINGS = ["default", "avx2", "avx512"]
KEY = ("recipe", "seed", "threads", "rounding")
COLUMNS = ("acc", "nmi", "ari", "ami", "knn", "whitened", "linear", "top1", "minutes", "cpu_seconds")


def has_bf16():
    """Whether this CPU multiplies bfloat16 by itself. Others imitate it; an older PyTorch cannot tell."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return known.get("avx512_bf16", False)


def roundings():
    """The values of ATEN_CPU_CAPABILITY that this CPU has, oldest instructions first; bf16 if it has it."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    found = ALL_ROUNDINGS[:1 + ALL_ROUNDINGS.index(best)] if best in ALL_ROUNDINGS else ["default"]
    return found + ["bf16"] * has_bf16()


ROUNDINGS = roundings()


def knn_accuracy(train_features, train, features, test, whitened=False):
    """20-NN accuracy on the test set; train, test: ImageSets, which hold the labels."""
    if whitened:
        train_features, features = whiten(train_features, features)
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
    yield dict(recipe="pixels", knn=knn_accuracy(x, train, x_test, test),
               whitened=knn_accuracy(x, train, x_test, test, whitened=True),
               linear=linear_accuracy(x.numpy(), train, x_test.numpy(), test))
    yield dict(recipe="pixels, centred", knn=knn_accuracy(x - mean, train, x_test - mean, test))
    for seed in seeds:
        kmeans = KMeans(10, n_init=1, random_state=seed).fit(x.numpy())
        scores = evaluate(test.labels.numpy(), kmeans.predict(x_test.numpy()).astype(int))
        yield dict(recipe="k-means on pixels", seed=seed, **scores)


def trained(run, train, test, folder):
    """Makes a run (recipe, seed, threads, rounding) by the command that a user types; scores its network."""
    recipe, seed, threads, rounding = run
    origin, command = RECIPES[recipe]
    command = [sys.executable, *command, "--seed", str(seed), "--output-dir", str(place(folder, run))]
    if origin:
        command += ["--checkpoint", str(place(folder, (origin, *run[1:])) / "checkpoint.pth")]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    if rounding != "bf16":
        environment["ATEN_CPU_CAPABILITY"] = rounding
    elif command[1] != "lincls.py":
        command += ["--amp", "bf16"]
    start, cpu_start = time.time(), cpu_seconds()
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    row = dict(recipe=recipe, seed=seed, threads=threads, rounding=rounding,
               minutes=(time.time() - start) / 60, cpu_seconds=cpu_seconds() - cpu_start)
    if command[1] in ("lincls.py", "semisup.py"):
        metrics = json.loads((place(folder, run) / "metrics.json").read_text())
        return row | dict(top1=metrics.get("test_top1") or metrics["results"][0]["test_top1"])
    network, config = load_twist(place(folder, run) / "checkpoint.pth")
    _, probabilities = predict(network, eval_batches(test, config, "cpu"))
    row |= evaluate(test.labels.numpy(), probabilities.argmax(1), probabilities)
    if (threads, rounding) == (1, ROUNDINGS[-1]):
        features, test_features = (extract_features(network.backbone, eval_batches(part, config, "cpu"))
                                   for part in (train, test))
        row["knn"] = knn_accuracy(features, train, test_features, test)
        row["whitened"] = knn_accuracy(features, train, test_features, test, whitened=True)
        row["linear"] = linear_accuracy(features.numpy(), train, test_features.numpy(), test)
    return row


def place(folder, run):
    """The output folder of a run."""
    return folder / "_".join(map(str, run)).replace(" ", "_").replace("%", "percent")


def cpu_seconds():
    """Of all finished commands."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(rows):
    """Prints one line per recipe: the mean of its runs, and (least to greatest) if there are several."""
    print("| recipe | runs | " + " | ".join(COLUMNS) + " |\n" + "|---" * (2 + len(COLUMNS)) + "|")
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        of_recipe, cells = [row for row in rows if row["recipe"] == recipe], []
        for column in COLUMNS:
            values = [float(row[column]) for row in of_recipe if row.get(column, "") != ""]
            digits = {"minutes": 1, "cpu_seconds": 0}.get(column, 3)
            cell = f"{np.mean(values):.{digits}f}" if values else ""
            if len(values) > 1:
                cell += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            cells.append(cell)
        print(f"| {recipe} | {len(of_recipe)} | " + " | ".join(cells) + " |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=list(range(10, 20)), help="default: 10 to 19")
    add("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    add("--roundings", nargs="+", default=ROUNDINGS, choices=ROUNDINGS, help="default: all of this CPU")
    add("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES, help="default: all")
    add("--output-dir", default="runs/fashion_mnist", help="default: runs/fashion_mnist")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    train, test = build_dataset("fashion-mnist", "train"), build_dataset("fashion-mnist", "test")

    path = folder / "results.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    done = {tuple(row[name] for name in KEY) for row in rows}
    if not any(row["recipe"] == "pixels" for row in rows):
        rows += pixels(train, test, args.seeds)
        write_csv(path, rows, (*KEY, *COLUMNS))
    for recipe in args.recipes:
        runs = product([recipe], args.seeds[:SEEDS_OF_THE_REST], [1], ROUNDINGS[-1:])
        if recipe in FIND_CLASSES:
            runs = product([recipe], args.seeds, args.threads, args.roundings)
        for run in runs:
            if tuple(map(str, run)) not in done:
                rows.append(trained(run, train, test, folder))
                write_csv(path, rows, (*KEY, *COLUMNS))
    table(rows)
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {platform.machine()}, "
          f"{torch.backends.cpu.get_cpu_capability()}")


def write_csv(path, rows, columns):
    """Writes the rows, dicts, as a CSV; whoever stops it while it writes keeps the file of before."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


if __name__ == "__main__":
    main()
