"""Low-shot linear SVMs on VOC07, on frozen features, as published (Goyal et al. 2019) but for the draws.

Told apart: k images with a class, 19 k without, drawn by --seed. The cost is the best on the test images, as
published; features: Feature5 of lincls.py --depths, pictures squashed to a square. Without --data: datasets.

    python svm.py --checkpoint runs/pretrain/checkpoint.pth --data VOCdevkit/VOC2007
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import resize

from checkpoint import UserError, load_pretrained, make_evaluation_folder, run, write_atomically
from data import ImageSet, input_of, normalize
from lincls import build_reader
from model import ARCHS


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint of a run; with --arch any project's backbone")
    add("--data", help="data set (fashion-mnist, fake, cifar10, cifar100, stl10), folder or list of pictures")
    add("--output-dir", default="runs/svm", help="folder for all that is written")
    add("--arch", choices=ARCHS, help="backbone")
    add("--depth", type=int, default=0, help="ResNet: which of Feature1 to 5, of stem and stages; 0: last")
    add("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 96], help="k, positives of a class")
    add("--samples", type=int, default=5, help="draws for each k")
    add("--costs", type=float, nargs="+", default=[2 ** n for n in range(-19, -3)] + [1, 10, 100], help="C")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    add("--seed", type=int, default=0, help="of the initial weights, the order and the views")
    return parser


def read_voc(data, part):
    """Paths [N] and labels [N, C] of trainval or test: 1, -1, or 0: difficult objects only."""
    root = [*Path(data).glob("VOCdevkit/VOC2007"), *Path(data).glob("VOC2007"), Path(data)][0]
    classes = sorted({str(path).rpartition("_")[0] for path in root.glob("ImageSets/Main/[!.]*_*.txt")})
    try:
        images, labels = np.array([np.loadtxt(f"{name}_{part}.txt", str) for name in classes]).T   # [N, C]
        if (images.T != images[:, 1]).any() or any({*y, "0"} != {"1", "-1", "0"} for y in labels.T):
            raise ValueError
    except (OSError, ValueError, IndexError):                   # IndexError: one class alone
        raise UserError(f"--data {data}: needs ImageSets/Main/CLASS_{part}.txt as in VOC2007") from None
    return [root / f"JPEGImages/{image}.jpg" for image in images[:, 0]], labels.astype(int)


def most_shots(y, rest):
    """How many images with a class, and `rest` times as many without, labels [N, C] have of every class."""
    return int(min((y == 1).sum(0).min(), (y == -1).sum(0).min() // rest))


def average_precision(scores, truth):
    """Of scores [N] for truth [N], bool: mean over the true of the best precision at no lower recall."""
    positive = np.sort(scores[truth])                           # each a threshold, highest recall first
    hits, chosen = (len(x) - np.searchsorted(x, positive) for x in (positive, np.sort(scores)))
    return np.maximum.accumulate(hits / chosen).mean()


def fit_svm(gram, y, costs):
    """Yields for each cost the coefficients [n] of gram's rows [n, n], inner products plus 1 for the bias, in
    the scores f at the exact minimum of |w|²/2 + Σ c_i max(0, 1 - y_i f_i)², c the cost, twice that of y = 1:
    scikit-learn's LinearSVC, by Newton's method in the primal (Chapelle 2007)."""
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
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    if device.type not in (best, "cpu"):
        raise UserError(f"--device {device}: there is none here; --device auto would take {best}")
    backbone, config = load_pretrained(args.checkpoint, args.arch)
    depths, read = build_reader(backbone.to(device).eval().requires_grad_(False), argparse.Namespace(
        depths=hasattr(backbone, "bn1"), mean_of_patches=False, n_last_blocks=1))
    parts = [ImageSet(None, torch.from_numpy(y), None, np.array([os.fsencode(path) for path in paths]))
             for paths, y in (read_voc(args.data or "datasets", part) for part in ("trainval", "test"))]
    rest = parts[0].labels.shape[1] - 1                         # 19: as many negatives for each positive
    most = most_shots(parts[0].labels, rest)
    for flag, low, high in (("shots", 1, most), ("samples", 1, 1e6), ("costs", 1e-9, 1e6),
                            ("depth", 0, len(depths)), ("seed", 0, 1e18)):
        if not low <= np.min(vars(args)[flag]) <= np.max(vars(args)[flag]) <= high:
            raise UserError(f"--{flag}: must be {low} to {high:g}, with this network and these images")
    out = Path(args.output_dir)
    if out.is_file() or (out / "checkpoint.pth").exists():
        raise UserError(f"--output-dir {out}: is a file or holds a training run; choose another")

    size, mean, std = input_of(config)
    pictures = (picture for part in parts for picture in map(part.__getitem__, range(len(part))))
    pictures = (resize(x, [round(size * 256 / 224)]) for x in pictures if x is not None)
    inputs = (normalize(resize(x, [size, size])[None].to(device) / 255, mean, std) for x in pictures)
    x = torch.cat([torch.nn.functional.normalize(read(x)[args.depth - 1].flatten(1)).cpu() for x in inputs])
    y, test_y = (part.readable().labels.numpy() for part in parts)
    num_broken = sum(map(len, parts)) - len(x)
    if max(args.shots) > most_shots(y, rest):
        raise UserError(f"--shots: at most {most_shots(y, rest)} of a class can be read")
    gram = (x.double() @ x[:len(y)].double().T + 1).numpy()     # [all images, those of trainval]
    if not np.isfinite(gram).all():
        raise UserError(f"{args.checkpoint}: features contain NaN or infinity; use an earlier checkpoint")
    make_evaluation_folder(out)
    metrics = dict(vars(args), feature=depths[args.depth - 1], dim=x.shape[1], num_broken=num_broken,
                   shots={})
    if num_broken:
        print(f"{num_broken} broken pictures left out")
    for k in args.shots:
        aps = np.zeros((args.samples, len(args.costs)))
        for sample, c in np.ndindex(args.samples, rest + 1):
            order = np.random.default_rng([args.seed, 7, k, sample, c]).permutation(len(y))
            drawn = np.append(order[y[order, c] == 1][:k], order[y[order, c] == -1][:k * rest])
            test, = test_y[:, c].nonzero()
            kernel, truth = gram[np.ix_(len(y) + test, drawn)], test_y[test, c] == 1
            for i, beta in enumerate(fit_svm(gram[np.ix_(drawn, drawn)], y[drawn, c], args.costs)):
                aps[sample, i] += average_precision(kernel @ beta, truth) / (rest + 1)
        best = aps.mean(0).argmax()
        metrics["shots"][k] = found = dict(map=aps.mean(0)[best], std=aps.std(0)[best], cost=args.costs[best])
        print("  k = {:<5d} mAP {map:.4f}   std {std:.4f}   cost {cost:g}".format(k, **found), flush=True)
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())


if __name__ == "__main__":
    run(main, get_parser())
