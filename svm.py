"""Low-shot linear SVMs on VOC07, on frozen features, by the published protocol (Goyal et al. 2019).

    python svm.py --checkpoint runs/pretrain/checkpoint.pth --data VOCdevkit/VOC2007
    python svm.py --checkpoint resnet50.pth --arch resnet50 --data VOCdevkit/VOC2007 --depth 5 --device cuda

For each class and each k, an SVM learns from k images with the class and 19 k without. The result is the mAP
on the test images, for the cost that does best there. --seed draws the images; the published draws differ.
Features are Feature1 to 5 of lincls.py --depths, from pictures that are squashed to a square.

Not run on VOC07 here, so no result. The tests compare it with scikit-learn on a small folder like VOC's.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import resize

from checkpoint import UserError, to_stdout, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from data import ImageSet, input_of
from lincls import build_reader
from pretrained import load_network, network_flags
from run import make_evaluation_folder
from views import normalize


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    network_flags(parser)
    add = parser.add_argument_group("features").add_argument
    add("--depth", type=at_least(0), default=0,
        help="which of a ResNet's features, 1 (stem) to 5 (last stage); 0: the last")
    add("--data", default="datasets", help="VOC2007, or a folder that holds it")
    add = parser.add_argument_group("SVMs").add_argument
    add("--shots", type=at_least(1), nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 96],
        help="numbers k of images with the class")
    add("--samples", type=at_least(1, below=10_000), default=5, help="draws for each k")
    add("--costs", type=at_least(1e-9, float, 1e6), nargs="+",
        default=[2 ** n for n in range(-19, -3)] + [1, 10, 100],
        help="costs C to try; the defaults are the published ones")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/svm", help="folder for everything written")
    add("--device", default=DEVICES[0], choices=DEVICES, help="of the network")
    add("--seed", type=at_least(0), default=0, help="draws the images of each k")
    return parser


def read_voc(data, part):
    """Paths [N] and labels [N, C] of trainval or test: 1, -1, or 0 (only difficult objects of the class)."""
    root = [*Path(data).glob("VOCdevkit/VOC2007"), *Path(data).glob("VOC2007"), Path(data)][0]
    classes = sorted({str(path).rpartition("_")[0] for path in root.glob("ImageSets/Main/[!.]*_*.txt")})
    try:
        images, labels = np.array([np.loadtxt(f"{name}_{part}.txt", str) for name in classes]).T   # [N, C]
        if (images.T != images[:, 1]).any() or any({*y, "0"} != {"1", "-1", "0"} for y in labels.T):
            raise ValueError
    except (OSError, ValueError, IndexError):                   # IndexError: one class alone
        raise UserError(f"--data {data}: needs ImageSets/Main/CLASS_{part}.txt as in VOC2007") from None
    return [root / f"JPEGImages/{image}.jpg" for image in images[:, 0]], labels.astype(int)


def read_features(parts, read, size, mean, std, device):
    """Features [N, D] of unit length of all readable pictures; read: inputs [1, 3, size, size] -> a map."""
    rows = []
    for part in parts:
        for i in range(len(part)):
            picture = part[i]
            if picture is not None:
                picture = resize(resize(picture, [round(size * 256 / 224)]), [size, size])
                x = normalize(picture[None].to(device) / 255, mean, std)
                rows.append(torch.nn.functional.normalize(read(x).flatten(1)).cpu())
    return torch.cat(rows)


def most_shots(y, rest):
    """How many images with a class, and `rest` times as many without, labels [N, C] have of every class."""
    return int(min((y == 1).sum(0).min(), (y == -1).sum(0).min() // rest))


def draw_shots(y, k, rest, seed):
    """Indices of k images with a class and rest × k without; y: [N] labels of that class, seed: integers."""
    order = np.random.default_rng(seed).permutation(len(y))
    positive, negative = order[y[order] == 1], order[y[order] == -1]
    return np.append(positive[:k], negative[:k * rest])


def average_precision(scores, truth):
    """Of scores [N] for truth [N], bool: mean over the true of the best precision at no lower recall."""
    positive = np.sort(scores[truth])                           # each a threshold, highest recall first
    hits, chosen = (len(x) - np.searchsorted(x, positive) for x in (positive, np.sort(scores)))
    return np.maximum.accumulate(hits / chosen).mean()


def fit_svm(gram, y, costs):
    """Yields for each cost the SVM's coefficients beta [n]: its scores are f = gram @ beta.

    gram: [n, n], inner products plus 1 for the bias; y: [n], 1 or -1. They are at the exact minimum of
    |w|²/2 + Σ c_i max(0, 1 - y_i f_i)², where c_i is the cost, and twice the cost for y_i = 1: scikit-learn's
    LinearSVC, by Newton's method in the primal (Chapelle 2007).
    """
    beta = np.zeros(len(y))
    for cost in costs:
        for i in range(1000):
            c = cost * np.where(y > 0, 2, 1) * (y * (gram @ beta) < 1)            # 0 outside the margin
            target = np.linalg.solve(2 * c[:, None] * gram + np.eye(len(y)), 2 * c * y)
            beta = beta + (target - beta) / (1 + i // 10)       # only whole steps could go in circles
            if np.array_equal(y * (gram @ target) < 1, c > 0):                    # target is the minimum
                break
        yield target


def main(args):
    # ---------------------------------------------------------------- model
    backbone, config = load_network(args)
    backbone.to(args.device).eval().requires_grad_(False)
    depths, read = build_reader(backbone, argparse.Namespace(
        depths=hasattr(backbone, "bn1"), mean_of_patches=False, n_last_blocks=1))
    if args.depth > len(depths):
        raise UserError(f"--depth: must be 0 to {len(depths)} with this network")

    # ---------------------------------------------------------------- data
    parts = []
    for name in ("trainval", "test"):
        paths, labels = read_voc(args.data, name)
        paths = np.array([os.fsencode(path) for path in paths])
        parts.append(ImageSet(None, torch.from_numpy(labels), None, paths))
    rest = parts[0].labels.shape[1] - 1                         # 19: as many negatives for each positive
    most = most_shots(parts[0].labels, rest)
    if max(args.shots) > most:
        raise UserError(f"--shots: must be 1 to {most} with these images")
    out = make_evaluation_folder(args.output_dir)

    # ---------------------------------------------------------------- features
    x = read_features(parts, lambda images: read(images)[args.depth - 1], *input_of(config), args.device)
    y, test_y = (part.readable().labels.numpy() for part in parts)                # [N of the part, C]
    num_broken = len(parts[0]) + len(parts[1]) - len(x)
    if max(args.shots) > most_shots(y, rest):
        raise UserError(f"--shots: must be at most {most_shots(y, rest)}, as many as can be read")
    gram = (x.double() @ x[:len(y)].double().T + 1).numpy()     # [all images, those of trainval]
    if not np.isfinite(gram).all():
        raise UserError(f"{args.checkpoint}: features contain NaN or infinity; use an earlier checkpoint")
    if num_broken:
        to_stdout(f"{num_broken} broken pictures left out")

    # ---------------------------------------------------------------- SVMs
    metrics = dict(vars(args), feature=depths[args.depth - 1], dim=x.shape[1], num_broken=num_broken,
                   shots={})
    for k in args.shots:
        aps = np.zeros((args.samples, len(args.costs)))
        for sample, c in np.ndindex(args.samples, rest + 1):
            drawn = draw_shots(y[:, c], k, rest, [args.seed, 7, k, sample, c])
            test = np.flatnonzero(test_y[:, c])                 # difficult objects do not count
            kernel, truth = gram[np.ix_(len(y) + test, drawn)], test_y[test, c] == 1
            for i, beta in enumerate(fit_svm(gram[np.ix_(drawn, drawn)], y[drawn, c], args.costs)):
                aps[sample, i] += average_precision(kernel @ beta, truth) / (rest + 1)
        best = aps.mean(0).argmax()
        metrics["shots"][k] = found = dict(map=aps.mean(0)[best], std=aps.std(0)[best], cost=args.costs[best])
        to_stdout("  k = {:<5d} mAP {map:.4f}   std {std:.4f}   cost {cost:g}".format(k, **found))
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())


if __name__ == "__main__":
    launch(main, get_parser())
