"""Fashion-MNIST: TWIST compared with other methods, with the same backbone, views and number of steps.

    pip install --no-deps lightly==1.6.0        losses of SimCLR and VICReg; they need no other package
    python benchmarks/methods.py                about 25 minutes per seed, and before them 40 of choosing
    python benchmarks/methods.py --methods "TWIST, features" SimCLR --seeds 0

Each method's settings are chosen by one protocol, an axis after the other: crop area, learning rate, then
those of its own. A setting trains for one epoch with seed 0; the criterion is 20-NN accuracy of 10,000
training images against the other 50,000. With the best, a method trains for four epochs with each seed.
"TWIST" is the default run, whose settings are as they are.

ACC: predicted classes of the 10,000 test images, matched to the true ones. The predictions are those of
TWIST's head, or of k-means on the L2-normalised features of the training images (10 clusters, best of 10
starts), which any backbone has. 20-NN, whitened, linear: as in fashion_mnist.py. Minutes: training and its
start-up.
SEED: a larger network, pre-trained by TWIST with the same seed, teaches. The other rows have no teacher.

Each run is a line of OUTPUT_DIR/METHOD.csv, so that the same command goes on, and commands for different
methods may run side by side.
"""

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.cluster import KMeans

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from fashion_mnist import knn_accuracy, linear_accuracy, write_csv  # noqa: E402

import pretrain  # noqa: E402
from checkpoint import UserError  # noqa: E402
from cli import launch, parse_args  # noqa: E402
from cluster_eval import evaluate  # noqa: E402
from data import Batches, build_dataset, eval_batches, input_of  # noqa: E402
from knn import extract_features  # noqa: E402
from model import build_backbone  # noqa: E402
from optim import param_groups, warmup_cosine  # noqa: E402
from predictions import predict  # noqa: E402
from pretrained import load_pretrained, load_twist  # noqa: E402
from views import build_views  # noqa: E402

SAME = ["--views", "fashion-mnist", "--image-size", "20", "--batch-size", "128"]
AREAS = ["0.4", "0.55", "0.7"]       # smallest share of a picture that a crop shows
# name: (a stage's command, or lightly's loss with its arguments and the projector's widths; axes of settings)
METHODS = {
    "TWIST": (["pretrain.py"], {}),
    "TWIST, features": (["pretrain.py", "--restarts", "1"],
                        {"min-scale": AREAS, "lr": ["0.002", "0.004", "0.008"],
                         "num-classes": ["10", "30", "100"]}),
    "Barlow Twins": (["barlow.py", "@recipes/fashion_mnist_barlow.txt"],
                     {"min-scale": AREAS, "lr": ["0.004", "0.008", "0.016"],
                      "lambd": ["0.0025", "0.0051", "0.01"]}),
    "SimCLR": (("NTXentLoss", dict(temperature=0.1), (512, 128)),
               {"min-scale": AREAS, "lr": ["0.002", "0.004", "0.008"]}),
    "VICReg": (("VICRegLoss", dict(), (512, 512, 512)),
               {"min-scale": AREAS, "lr": ["0.008", "0.016", "0.032"]}),
    "SEED teacher": (["pretrain.py", "@recipes/fashion_mnist_teacher.txt"], {}),
    "SEED": (["distill.py", "@recipes/fashion_mnist_seed.txt"],
             {"min-scale": AREAS, "lr": ["0.002", "0.004", "0.008"]}),
}
TEACHER_EPOCHS, EPOCHS = 2, 4
SCORES = ("held_out", "acc", "kmeans_acc", "knn", "whitened", "linear", "minutes")
COLUMNS = ("method", "settings", "epochs", "seed", *SCORES)


def lightly_loss(name, arguments):
    """A loss of the package lightly. Raises UserError if it is not installed."""
    try:
        import lightly.loss
    except ImportError:
        raise UserError(f"{name}: needs the package lightly: pip install --no-deps lightly==1.6.0") from None
    return getattr(lightly.loss, name)(**arguments)


def projector(width, *widths):
    """The projector of SimCLR and VICReg: Linear, BN, ReLU for each width; the last is a Linear only."""
    layers = []
    for outputs in widths:
        layers += [nn.Linear(width, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        width = outputs
    return nn.Sequential(*layers[:-2])


def train(loss_function, widths, dataset, args):
    """Trains a backbone by the loop of pretrain.py without its Run; returns it.

    loss_function(z1, z2): of two views' embeddings, each [B, D]. widths: of the projector. args: the flags of
    pretrain.py.
    """
    torch.manual_seed(args.seed)
    backbone = build_backbone(args.arch)
    network = nn.Sequential(backbone, projector(backbone.feature_dim, *widths))
    network.to(memory_format=torch.channels_last)
    size, mean, std = input_of(vars(args))
    views = build_views("fashion-mnist", mean, std, size, min_scale=args.min_scale)
    batches = Batches(dataset, args.batch_size, views, args.seed)
    optimizer = torch.optim.AdamW(param_groups(network, args.weight_decay), lr=0.0,
                                  betas=(args.momentum, args.beta2))
    total_steps = args.epochs * batches.steps_per_epoch
    warmup_steps = round(args.warmup_epochs * batches.steps_per_epoch)
    peak_lr = args.lr * args.batch_size / 256
    for step in range(total_steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, total_steps, warmup_steps, peak_lr, 0.001 * peak_lr)
        images, uniforms, _ = batches[step]
        z1, z2 = (network(x) for x in views(images, uniforms))     # each with batch statistics of its own
        loss = loss_function(z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{total_steps} | loss {loss.item():.3f}", flush=True)
    return backbone


def trained(method, settings, epochs, seed, train_set, folder):
    """Trains a method: (backbone, its configuration, the Twist if it has ten classes, else None)."""
    how = METHODS[method][0]
    flags = [*SAME, "--epochs", str(epochs), "--seed", str(seed)]
    flags += [text for name, value in settings.items() for text in (f"--{name}", value)]
    if isinstance(how, tuple):
        name, arguments, widths = how
        args = parse_args(pretrain.get_parser(), flags)
        return train(lightly_loss(name, arguments), widths, train_set, args), vars(args), None
    if method == "SEED":
        flags += ["--teacher", str(place(folder, *teacher_of(seed)) / "checkpoint.pth")]
    else:
        flags += ["--knn-every", "0"]
    out = place(folder, method, settings, epochs, seed)
    subprocess.run([sys.executable, *how, *flags, "--output-dir", str(out)], cwd=ROOT, check=True)
    backbone, config = load_pretrained(out / "checkpoint.pth")
    has_classes = config.get("loss") == "twist" and config["num_classes"] == 10
    return backbone, config, load_twist(out / "checkpoint.pth")[0] if has_classes else None


def place(folder, method, settings, epochs, seed):
    """The output folder of a run."""
    words = [method, *(f"{name} {value}" for name, value in settings.items()), f"{epochs} epochs", seed]
    return folder / "_".join(map(str, words)).replace(" ", "_").replace(",", "")


def teacher_of(seed):
    """The run that teaches SEED: method, settings, epochs, seed."""
    return "SEED teacher", {}, TEACHER_EPOCHS, seed


def result(method, settings, epochs, seed, parts, folder, final):
    """Trains a method and scores its backbone: a line of the table, or of the choice of settings."""
    train_set, test_set = parts
    if method == "SEED":                     # a teacher that is there already is not trained again
        trained(*teacher_of(seed), train_set, folder)
    start = time.time()
    backbone, config, twist = trained(method, settings, epochs, seed, train_set, folder)
    row = dict(method=method, settings=words(settings), epochs=epochs, seed=seed,
               minutes=(time.time() - start) / 60)
    features = extract_features(backbone, eval_batches(train_set, config, "cpu"))        # [N, feature_dim]
    bank, held_out = slice(50_000), slice(50_000, None)
    row["held_out"] = knn_accuracy(features[bank], train_set.subset(bank),
                                   features[held_out], train_set.subset(held_out))
    if not final:
        return row
    test_features = extract_features(backbone, eval_batches(test_set, config, "cpu"))
    labels = test_set.labels.numpy()
    if twist is not None:
        _, probabilities = predict(twist, eval_batches(test_set, config, "cpu"))
        row["acc"] = evaluate(labels, probabilities.argmax(1))["acc"]
    x, x_test = (F.normalize(z, dim=1).numpy() for z in (features, test_features))
    kmeans = KMeans(10, n_init=10, random_state=seed).fit(x)
    row["kmeans_acc"] = evaluate(labels, kmeans.predict(x_test).astype(int))["acc"]
    row["knn"] = knn_accuracy(features, train_set, test_features, test_set)
    row["whitened"] = knn_accuracy(features, train_set, test_features, test_set, whitened=True)
    row["linear"] = linear_accuracy(features.numpy(), train_set, test_features.numpy(), test_set)
    return row


def words(settings):
    return " ".join(f"--{name} {value}" for name, value in settings.items())


class Results:
    """The runs of a method, in OUTPUT_DIR/METHOD.csv; one that is there is not made again."""

    def __init__(self, method, parts, folder):
        self.method, self.parts, self.folder = method, parts, folder
        self.path = folder / f"{method.replace(', ', '_').replace(' ', '_')}.csv"
        self.rows = list(csv.DictReader(self.path.read_text().splitlines())) if self.path.exists() else []

    def get(self, settings, epochs, seed, final=False):
        """The row of a run; final: with all scores."""
        for row in self.rows:
            if (row["settings"], row["epochs"], row["seed"]) == (words(settings), str(epochs), str(seed)):
                return row
        row = result(self.method, settings, epochs, seed, self.parts, self.folder, final)
        self.rows.append({name: str(value) for name, value in row.items()})
        write_csv(self.path, self.rows, COLUMNS)
        return self.rows[-1]

    def choose(self, axes):
        """The best settings, an axis after the other; what is not chosen yet has its middle value."""
        chosen = {name: values[len(values) // 2] for name, values in axes.items()}
        for name, values in axes.items():
            scores = {value: float(self.get(chosen | {name: value}, 1, 0)["held_out"]) for value in values}
            chosen[name] = max(scores, key=scores.get)
        return chosen


def table(results):
    """Prints one row per method: the mean of each column over the seeds, and (least to greatest)."""
    print("| method | settings | seeds | held-out 20-NN | ACC | ACC, k-means | 20-NN | whitened | linear | "
          "minutes |\n" + "|---" * 10 + "|")
    for method, rows in results.items():
        cells = [method, f"`{rows[0]['settings']}`" if rows[0]["settings"] else "", str(len(rows))]
        for column in SCORES:
            v = [float(row[column]) for row in rows if row.get(column)]
            digits = 1 if column == "minutes" else 3
            cells.append(f"{np.mean(v):.{digits}f} ({min(v):.{digits}f} to {max(v):.{digits}f})" if v else "")
        print("| " + " | ".join(cells) + " |")


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    parser.add_argument("--output-dir", default="runs/methods", help="default: runs/methods")
    return parser


def main(args):
    for method in args.methods:
        if isinstance(METHODS[method][0], tuple):
            lightly_loss(*METHODS[method][0][:2])       # fails now if it is missing, not after hours
    folder = Path(args.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    parts = build_dataset("fashion-mnist", "train"), build_dataset("fashion-mnist", "test")
    results = {}
    for method in args.methods:
        found = Results(method, parts, folder)
        settings = found.choose(METHODS[method][1])
        epochs = TEACHER_EPOCHS if method == "SEED teacher" else EPOCHS
        results[method] = [found.get(settings, epochs, seed, final=True) for seed in args.seeds]
    table(results)
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    launch(main, get_parser())
