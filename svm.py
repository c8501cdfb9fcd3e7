"""Linear SVMs on VOC07, on frozen features, by the published protocols (Goyal et al. 2019).

    python svm.py --checkpoint runs/pretrain/checkpoint.pth --data VOCdevkit/VOC2007
    python svm.py --checkpoint resnet50.pth --arch resnet50 --data VOCdevkit/VOC2007 --shots all --device cuda

For each class and each k of --shots, an SVM learns from k images with the class and 19 k without. The result
is the mAP on the test images, for the cost that does best there. --seed draws the images; the published draws
differ. `all` is another protocol: an SVM learns from all of trainval, and the cost of each class is chosen
there, by cross-validation in three folds. Features are Feature1 to 5 of lincls.py --depths, from pictures
that are squashed to a square.

Not run on VOC07 here, so no result. The tests compare it with scikit-learn on a small folder like VOC's.
"""

import argparse
import json
import os

import numpy as np
import torch
from torchvision.transforms.functional import resize

from checkpoint import UserError, to_stdout, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from data import CentreCrops, ImageSet, eval_batches
from lincls import build_reader
from pretrained import load_network, network_flags, to_device
from run import make_evaluation_folder
from transfer_sets import read_voc

FOLDS = 3                        # of the cross-validation


def shots(text):
    """The type of --shots: `all`, or a whole number of at least 1."""
    return text if text == "all" else at_least(1)(text)


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    network_flags(parser)
    add = parser.add_argument_group("features").add_argument
    add("--depth", type=at_least(0), default=0,
        help="which of a ResNet's features, 1 (stem) to 5 (last stage); 0: the last")
    add("--data", default="datasets", help="VOC2007, or a folder that holds it")
    add = parser.add_argument_group("SVMs").add_argument
    add("--shots", type=shots, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 96],
        help="numbers k of images with the class; all: all images, and a cost for each class")
    add("--samples", type=at_least(1, below=10_000), default=5, help="draws for each k")
    add("--costs", type=at_least(1e-9, float, 1e6), nargs="+",
        default=[2 ** n for n in range(-19, -3)] + [1, 10, 100],
        help="costs C to try; the defaults are the published ones")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/svm", help="folder for everything written")
    add("--device", default=DEVICES[0], choices=DEVICES, help="of the network")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision of the backbone; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--batch-size", type=at_least(1), default=64, help="images per forward pass")
    add("--workers", type=at_least(-1), default=-1, help="to read files; -1: one per core")
    add("--seed", type=at_least(0), default=0, help="draws the images of each k")
    return parser


class Squares(CentreCrops):
    """Whole pictures, squashed to size × size; first the shorter side is resized, as published."""

    def __getitem__(self, index):
        picture = self.dataset[index]
        return None if picture is None else resize(resize(picture, [self.side]), [self.size, self.size])


def read_features(parts, read, config, args):
    """Features [N, D] of unit length of all readable pictures; read: inputs [B, 3, size, size] -> maps.

    Nothing waits for a CUDA device before the last picture; those of VOC07 take at most 0.4 GB there.
    """
    rows = []
    for part in parts:
        for x in eval_batches(part, config, args.device, args.batch_size, args.workers,
                              crop_class=Squares):
            rows.append(torch.nn.functional.normalize(read(x).float().flatten(1)))
    return torch.cat(rows).cpu()


def most_shots(y, rest):
    """How many images with a class, and `rest` times as many without, labels [N, C] have of every class."""
    return int(min((y == 1).sum(0).min(), (y == -1).sum(0).min() // rest))


def draw_shots(y, k, rest, seed):
    """Indices of k images with a class and rest × k without; y: [N] labels of that class, seed: integers."""
    order = np.random.default_rng(seed).permutation(len(y))
    positive, negative = order[y[order] == 1], order[y[order] == -1]
    return np.append(positive[:k], negative[:k * rest])


def average_precision(scores, truth, interpolated=True):
    """Of scores [N] for truth [N], bool: mean over the true of the best precision at no lower recall.

    interpolated: False takes the precision at each recall itself, as scikit-learn does.
    """
    positive = np.sort(scores[truth])                           # each a threshold, highest recall first
    hits, chosen = (len(x) - np.searchsorted(x, positive) for x in (positive, np.sort(scores)))
    return (np.maximum.accumulate(hits / chosen) if interpolated else hits / chosen).mean()


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
            inside, target = c > 0, np.zeros(len(y))
            matrix = gram[np.ix_(inside, inside)] + np.diag(0.5 / c[inside])
            target[inside] = np.linalg.solve(matrix, y[inside])
            beta = beta + (target - beta) / (1 + i // 10)       # only whole steps could go in circles
            if np.array_equal(y * (gram @ target) < 1, inside):                   # target is the minimum
                break
        yield target


# ---------------------------------------------------------------- all images
def folds_of(y):
    """Fold 0, 1 or 2 of each image, in their order, with equal shares of both labels [N], 1 and -1.

    As scikit-learn's StratifiedKFold(3): a class goes on with the fold where the first image's class ended.
    """
    folds, end = np.empty(len(y), int), 0
    for label in (y[0], -y[0]):
        start, end = end, end + np.count_nonzero(y == label)
        folds[y == label] = np.sort(np.arange(start, end) % FOLDS)
    return folds


def cross_validate(gram, y, costs):
    """For each cost the mean AP of the folds, each by an SVM of the other two; gram: [N, N], y: [N]."""
    folds, aps = folds_of(y), np.zeros((FOLDS, len(costs)))
    for fold in range(FOLDS):
        rest, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        for i, beta in enumerate(fit_svm(gram[np.ix_(rest, rest)], y[rest], costs)):
            scores = gram[np.ix_(held, rest)] @ beta
            aps[fold, i] = average_precision(scores, y[held] == 1, interpolated=False)
    return aps.mean(0)


def learn_from_all(gram, y, test_y, costs):
    """APs on the test images and the costs that cross-validation chose, two lists, by class.

    gram: [all images, the N to learn from]; y: [N, C], test_y: [test images, C]. Where all objects of a class
    are difficult (0), the released code learns that it is not there, and does not test.
    """
    N, aps, chosen = len(y), [], []
    for labels, truth in zip(np.where(y == 1, 1, -1).T, test_y.T, strict=True):
        chosen.append(costs[cross_validate(gram[:N], labels, costs).argmax()])
        beta, test = next(fit_svm(gram[:N], labels, chosen[-1:])), np.flatnonzero(truth)
        aps.append(average_precision(gram[N + test] @ beta, truth[test] == 1))
    return aps, chosen


def main(args):
    # ---------------------------------------------------------------- model
    backbone, config = load_network(args)
    torch.backends.cudnn.benchmark = True        # seeks the fastest kernels once: the sizes stay the same
    amp_dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    to_device(backbone, args.device).eval().requires_grad_(False)
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
    numbers = [k for k in args.shots if k != "all"]
    if max(numbers, default=0) > most:
        raise UserError(f"--shots: must be 1 to {most} with these images")
    out = make_evaluation_folder(args.output_dir)

    # ---------------------------------------------------------------- features
    @torch.autocast(args.device, dtype=amp_dtype, enabled=args.amp != "off")
    def read_map(images):
        return read(images)[args.depth - 1]

    x = read_features(parts, read_map, config, args)
    y, test_y = (part.readable().labels.numpy() for part in parts)                # [N of the part, C]
    num_broken = len(parts[0]) + len(parts[1]) - len(x)
    if max(numbers, default=0) > most_shots(y, rest):
        raise UserError(f"--shots: must be at most {most_shots(y, rest)}, as many as can be read")
    if "all" in args.shots and (y == 1).sum(0).min() < FOLDS:
        raise UserError(f"--shots all: needs {FOLDS} images with each class, one for each fold")
    gram = (x.double() @ x[:len(y)].double().T + 1).numpy()     # [all images, those of trainval]
    if not np.isfinite(gram).all():
        raise UserError(f"{args.checkpoint}: features contain NaN or infinity; use an earlier checkpoint")
    if num_broken:
        to_stdout(f"{num_broken} broken pictures left out")

    # ---------------------------------------------------------------- SVMs
    metrics = dict(vars(args), feature=depths[args.depth - 1], dim=x.shape[1], num_broken=num_broken,
                   shots={})
    if "all" in args.shots:
        aps, chosen = learn_from_all(gram, y, test_y, args.costs)
        metrics["shots"]["all"] = dict(map=np.mean(aps), aps=aps, costs=chosen)
        costs = " ".join(f"{cost:g}" for cost in chosen)
        to_stdout(f"  all images   mAP {np.mean(aps):.4f}   costs {costs}")
    for k in numbers:
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
