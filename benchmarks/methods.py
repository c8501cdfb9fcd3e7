"""Fashion-MNIST: TWIST compared with other methods, with the same backbone, views and number of steps.

    pip install --no-deps lightly==1.6.0        losses of SimCLR and VICReg; they need no other package
    python benchmarks/methods.py                about 20 minutes per seed; the same command resumes
    python benchmarks/methods.py --methods TWIST "Barlow Twins" --seeds 0

ACC: predicted classes of the 10,000 test images, matched to the true ones. The predictions are those of
TWIST's head, or of k-means on the L2-normalised features of the training images (10 clusters, best of 10
starts), which any backbone has. 20-NN, linear: as in fashion_mnist.py. Minutes: training and its start-up.
SEED: a larger network, pre-trained by TWIST, teaches a resnet8. The other rows have no teacher.
"""

import argparse
import json
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
from fashion_mnist import knn_accuracy, linear_accuracy  # noqa: E402

import pretrain  # noqa: E402
from checkpoint import UserError, write_atomically  # noqa: E402
from cli import launch, parse_args  # noqa: E402
from cluster_eval import evaluate, predict  # noqa: E402
from data import Batches, build_dataset, eval_batches, input_of  # noqa: E402
from knn import extract_features  # noqa: E402
from model import build_backbone  # noqa: E402
from optim import param_groups, warmup_cosine  # noqa: E402
from pretrained import load_pretrained, load_twist  # noqa: E402
from views import build_views  # noqa: E402

# What all methods share: 936 steps, crops of 40 to 100 %. It was the default run of pretrain.py until 0.2.0.
SAME = "--epochs 2 --image-size 28 --min-scale 0.4 --restarts 1".split()
COMMANDS = {      # methods that a stage trains, by the command that a user types
    "TWIST": ["pretrain.py", *SAME, "--lr", "0.004", "--knn-every", "0"],
    "Barlow Twins": ["barlow.py", "@recipes/fashion_mnist_barlow.txt", "--knn-every", "0"],
    "SEED teacher": ["pretrain.py", "@recipes/fashion_mnist_teacher.txt", "--knn-every", "0"],
    "SEED student": ["distill.py", "@recipes/fashion_mnist_seed.txt"],
}
# Methods that `train` trains: lightly's loss, its arguments, widths of the projector, peak learning rate.
# Each is the best of four by 20-NN of 10,000 training images against the other 50,000, after one epoch with
# seed 0. SimCLR: T = 0.1 gave 0.847; T = 0.2 gave 0.844, also at a rate of 4e-3; T = 0.5 gave 0.836. VICReg:
# 512 wide gave 0.847, at 4e-3 0.846 and at 2e-3 0.842; 1024 wide at 2e-3 gave 0.841. The settings of Barlow
# Twins are in its recipe.
LOOPS = {
    "SimCLR": ("NTXentLoss", dict(temperature=0.1), (512, 128), 2e-3),
    "VICReg": ("VICRegLoss", dict(), (512, 512, 512), 8e-3),
}


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


def train(loss_function, widths, lr, dataset, args, seed):
    """Trains a backbone by the loop of pretrain.py without its Run; returns it.

    loss_function(z1, z2): of two views' embeddings, each [B, D]. widths: of the projector. args: the flags of
    pretrain.py. lr: peak learning rate, not scaled by the batch size.
    """
    torch.manual_seed(seed)
    backbone = build_backbone(args.arch)
    network = nn.Sequential(backbone, projector(backbone.feature_dim, *widths))
    network.to(memory_format=torch.channels_last)
    size, mean, std = input_of(vars(args))
    views = build_views("fashion-mnist", mean, std, size, min_scale=args.min_scale)
    batches = Batches(dataset, args.batch_size, views, seed)
    optimizer = torch.optim.AdamW(param_groups(network, args.weight_decay), lr=0.0,
                                  betas=(args.momentum, args.beta2))
    total_steps = args.epochs * batches.steps_per_epoch
    warmup_steps = round(args.warmup_epochs * batches.steps_per_epoch)
    for step in range(total_steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, total_steps, warmup_steps, lr, 0.001 * lr)
        images, uniforms, _ = batches[step]
        z1, z2 = (network(x) for x in views(images, uniforms))     # each with batch statistics of its own
        loss = loss_function(z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{total_steps} | loss {loss.item():.3f}", flush=True)
    return backbone


def trained(method, seed, train_set, folder):
    """Trains a method with a seed: (backbone, its configuration, the Twist if it has ten classes or None)."""
    if method in LOOPS:
        name, arguments, widths, lr = LOOPS[method]
        args = parse_args(pretrain.get_parser(), SAME)
        return train(lightly_loss(name, arguments), widths, lr, train_set, args, seed), vars(args), None
    out = {name: folder / f"{name}_{seed}".replace(" ", "_") for name in COMMANDS}
    command = [sys.executable, *COMMANDS[method], "--seed", str(seed), "--output-dir", str(out[method])]
    if method == "SEED student":
        command += ["--teacher", str(out["SEED teacher"] / "checkpoint.pth")]
    subprocess.run(command, cwd=ROOT, check=True)
    path = out[method] / "checkpoint.pth"
    backbone, config = load_pretrained(path)
    has_classes = config.get("loss", "twist") == "twist" and config["num_classes"] == 10
    return backbone, config, load_twist(path)[0] if has_classes else None


def result(method, seed, train_set, test_set, folder):
    """Trains one method with one seed and scores its backbone."""
    start = time.time()
    backbone, config, twist = trained(method, seed, train_set, folder)
    row = dict(method=method, seed=seed, minutes=(time.time() - start) / 60)
    features, test_features = (extract_features(backbone, eval_batches(part, config, "cpu"))
                               for part in (train_set, test_set))                 # [N, feature_dim]
    labels = test_set.labels.numpy()
    if twist is not None:
        _, probabilities = predict(twist, eval_batches(test_set, config, "cpu"))
        row["acc"] = evaluate(labels, probabilities.argmax(1))["acc"]
    x, x_test = (F.normalize(z, dim=1).numpy() for z in (features, test_features))
    kmeans = KMeans(10, n_init=10, random_state=seed).fit(x)
    row["kmeans_acc"] = evaluate(labels, kmeans.predict(x_test).astype(int))["acc"]
    row["knn"] = knn_accuracy(features, train_set, test_features, test_set)
    row["linear"] = linear_accuracy(features.numpy(), train_set, test_features.numpy(), test_set)
    return row


def table(results):
    """Prints one row per method: the mean of each column over the seeds, and (least to greatest)."""
    print("| method | seeds | ACC | ACC, k-means | 20-NN | linear | minutes |\n" + "|---" * 7 + "|")
    for method in sorted({r["method"] for r in results}, key=[*COMMANDS, *LOOPS].index):
        rows = [r for r in results if r["method"] == method]
        cells = [method, str(len(rows))]
        for column, digits in dict(acc=3, kmeans_acc=3, knn=3, linear=3, minutes=1).items():
            v = [r[column] for r in rows if column in r]
            cells.append(f"{np.mean(v):.{digits}f} ({min(v):.{digits}f} to {max(v):.{digits}f})" if v else "")
        print("| " + " | ".join(cells) + " |")


def get_parser():
    methods = (*COMMANDS, *LOOPS)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=methods, help="default: all")
    parser.add_argument("--output-dir", default="runs/methods", help="default: runs/methods")
    return parser


def main(args):
    for method in set(args.methods) & set(LOOPS):
        lightly_loss(*LOOPS[method][:2])                # fails now if it is missing, not after hours
    folder = Path(args.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else []
    train_set, test_set = build_dataset("fashion-mnist", "train"), build_dataset("fashion-mnist", "test")
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed) not in {(r["method"], r["seed"]) for r in results}:
                results.append(result(method, seed, train_set, test_set, folder))
                write_atomically(path, json.dumps(results).encode())
    table(results)
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    launch(main, get_parser())
