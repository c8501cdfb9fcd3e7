"""Unsupervised classification: do the clusters that a network found agree with the true classes?

The cluster of an image is the argmax of softmax(logits) in evaluation mode (batch norms and NBS use their
running statistics). Cluster ids mean nothing by themselves, so ACC first matches clusters to classes one to
one (Hungarian algorithm); NMI, AMI, ARI and FMI need no matching. Labels are used for the scores only.

    python cluster_eval.py --checkpoint weights/fashion-mnist.pth
    python cluster_eval.py --checkpoint runs/pretrain/checkpoint.pth --data my/pictures
    python cluster_eval.py --predictions FILE       of any other program: .csv or .npz, see read_predictions

One process, on the CPU or one GPU; without --data the checkpoint's own. Without labels there are no scores,
but clusters, assignments and pictures.
"""

import argparse
import csv
import io
import json
import math
import os
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln

from checkpoint import UserError, load_twist, make_evaluation_folder, run, write_atomically
from data import CentreCrops, build_dataset, eval_batches
from model import reestimate_batch_norms

MAX_CLUSTERS = 40      # on a contact sheet and in the printed list; metrics.json has all of them


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="checkpoint of a run; with --arch any project's backbone")
    add("--predictions", help="score this .csv or .npz with labels and predictions instead of a checkpoint")
    add("--data", help="data set (fashion-mnist, fake, cifar10, cifar100, stl10), folder or list of pictures")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--split", default="test", choices=("train", "test"), help="images to score; test is val, too")
    add("--output-dir", default="runs/cluster_eval", help="folder for all that is written")
    # what is measured
    add("--map-from", help="metrics.json of another split, whose mapping of clusters to classes is applied")
    add("--silhouette", action="store_true", help="of the clusters, by cosine distance of backbone features")
    add("--bn-images", type=int, default=0, help="training images to estimate batch-norm statistics anew")
    add("--pixel-kmeans", action="store_true", help="score k-means on the pixels of the images, too")
    # pictures
    add("--images-per-cluster", type=int, default=12, help="on a contact sheet")
    add("--contact-sheets", type=int, default=3, help=f"at most so many, of {MAX_CLUSTERS} clusters each")
    # run
    add("--batch-size", type=int, default=512, help="images in the GLOBAL batch")
    add("--workers", type=int, default=-1, help="processes that read ahead; -1: one a core for files, else 0")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    return parser


# ---------------------------------------------------------------- metrics
def check_ids(name, ids):
    """The ids as an int64 array [N]; raises ValueError that names them unless they are integers from 0."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"{name}: expected a non-empty one-dimensional array, got shape {list(ids.shape)}")
    if ids.dtype.kind == "f" and np.isnan(ids).any():
        raise ValueError(f"{name}: contains NaN")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got {ids.dtype}")
    if ids.min() < 0:
        raise ValueError(f"{name}: expected ids from 0, got {ids.min()}")
    return ids.astype(np.int64)


def entropy(sizes):
    """Entropy, in nats, of a partition into parts of these sizes (> 0)."""
    p = sizes / sizes.sum()
    return -np.sum(p * np.log(p))


def expected_mutual_information(a, b):
    """Mean mutual information, in nats, of random partitions with part sizes a and b (Vinh et al. 2010).

    The overlap n of parts of sizes a_i and b_j is hypergeometric, so its term depends on these two only and
    is computed once for each *distinct* pair: N images make fewer than sqrt(2 N) distinct sizes.
    """
    N = a.sum()
    log_factorial = gammaln(np.arange(N + 1) + 1.0)
    b, b_times = np.unique(b, return_counts=True)
    total = 0.0
    for a_i, a_times in zip(*np.unique(a, return_counts=True), strict=True):
        # Beyond 10 sqrt(mean) below or 10 sqrt(mean) + 34 above the mean lies less than exp(-49) of the
        # probability (Chernoff's bound). Without that tail large parts are cheap, too.
        mean = a_i * b / N
        low, high = mean - 10 * np.sqrt(mean), mean + 10 * np.sqrt(mean) + 34
        first = np.maximum(np.maximum(1, a_i + b - N), low.astype(np.int64))
        last = np.minimum(np.minimum(a_i, b), high.astype(np.int64))
        count = last - first + 1
        j = np.repeat(np.arange(len(b)), count)                           # the part b_j of each term
        n = np.arange(len(j)) + (first + count - np.cumsum(count))[j]     # first..last, for each j in turn
        b_j = b[j]
        log_p = (log_factorial[a_i] + log_factorial[N - a_i] - log_factorial[N]
                 + log_factorial[b_j] + log_factorial[N - b_j] - log_factorial[n]
                 - log_factorial[a_i - n] - log_factorial[b_j - n] - log_factorial[N - a_i - b_j + n])
        total += a_times * np.sum(b_times[j] * np.exp(log_p) * n / N * np.log(N * n / (a_i * b_j)))
    return total


def partition_scores(counts):
    """NMI, AMI, ARI and FMI of counts [K, C] (clusters x classes), with scikit-learn's conventions.

    NMI = 2 I / (H_K + H_C) and AMI = (I - E[I]) / ((H_K + H_C) / 2 - E[I]) are those of TWIST's tables;
    ami_max has max(H_K, H_C) instead of the mean, as the paper prints the formula. ARI: Hubert & Arabie 1985.
    FMI: Fowlkes & Mallows 1983, the "F" of the published log.
    """
    N = int(counts.sum())
    a, b = counts.sum(1), counts.sum(0)
    i, j = np.nonzero(counts)
    n, a_i, b_j = counts[i, j], a[i], b[j]
    a, b = a[a > 0], b[b > 0]

    if len(a) == len(b) == len(n):       # the same partition twice: 1 by definition (0 / 0 for singletons)
        nmi = ami = ami_max = 1.0
    else:
        mi = max(0.0, np.sum(n / N * (np.log(n) + math.log(N) - np.log(a_i) - np.log(b_j))))
        emi, h_a, h_b = expected_mutual_information(a, b), entropy(a), entropy(b)
        nmi = 2 * mi / (h_a + h_b)
        ami, ami_max = (mi - emi) / ((h_a + h_b) / 2 - emi), (mi - emi) / (max(h_a, h_b) - emi)

    # Ordered pairs of images; Python's integers, because products of two such numbers overflow 64 bits.
    together, pairs = int(n @ n) - N, N * (N - 1)
    same_cluster, same_class = int(a @ a) - N, int(b @ b) - N
    spread = (same_cluster + same_class) * pairs - 2 * same_cluster * same_class
    ari = 2 * (together * pairs - same_cluster * same_class) / spread if spread else 1.0
    fmi = together / math.sqrt(same_cluster * same_class) if together else 0.0
    return {"nmi": float(nmi), "ami": float(ami), "ami_max": float(ami_max), "ari": ari, "fmi": fmi}


def evaluate(labels, predictions, probabilities=None, mapping=None):
    """Scores predicted clusters against true classes; there may be more or fewer clusters than classes.

    labels, predictions: [N] integers from 0; probabilities: [N, K], only their order within a row matters.
    Without probabilities K is the largest prediction + 1; C is the largest label + 1. mapping: for each of K
    or more clusters its class or -1, as another split gave it; else it is found here. Returns a dict:

    acc: share of images whose cluster is matched to their class, by the one-to-one matching with the greatest
        such share (Hungarian algorithm; rectangular if K != C: an unmatched cluster predicts nothing).
    acc_top5: the same for any of the five most probable clusters; only with probabilities.
    acc_majority: each cluster predicts its most frequent class (many-to-one). Rises with K, to 1 at K = N.
    nmi, ami, ami_max, ari, fmi: see partition_scores. num_clusters_used: clusters with at least one image.
    mapping: for each of the K clusters its class, or -1 if unmatched.

    Raises ValueError that names the argument. Needs memory for K x C counts.
    """
    labels, predictions = check_ids("labels", labels), check_ids("predictions", predictions)
    N, K, C = len(labels), int(predictions.max()) + 1, int(labels.max()) + 1
    if len(predictions) != N:
        raise ValueError(f"predictions: there are {len(predictions)}, but {N} labels")
    if probabilities is not None:
        probabilities = np.asarray(probabilities)
        if probabilities.ndim != 2 or len(probabilities) != N or probabilities.shape[1] < K:
            raise ValueError(f"probabilities: expected [{N}, {K} or more], got {list(probabilities.shape)}")
        if not (probabilities.min() >= 0 and probabilities.max() < np.inf):     # NaN fails, too
            raise ValueError("probabilities: contains NaN, infinite or negative values")
        K = probabilities.shape[1]
    if mapping is not None:
        mapping = np.asarray(mapping)
        matched = mapping[mapping >= 0]
        if mapping.ndim != 1 or mapping.dtype.kind != "i" or len(mapping) < K:
            raise ValueError(f"mapping: expected {K} or more integers, one for each cluster")
        if len(set(matched.tolist())) < len(matched):
            raise ValueError("mapping: two clusters have the same class")
        K, C = len(mapping), max(C, int(mapping.max()) + 1)

    counts = np.bincount(predictions * C + labels, minlength=K * C).reshape(K, C)
    if mapping is None:
        clusters, classes = linear_sum_assignment(counts, maximize=True)
        mapping = np.full(K, -1)
        mapping[clusters] = classes
    else:
        clusters = np.flatnonzero(mapping >= 0)
        classes = mapping[clusters]
    metrics = {"acc": int(counts[clusters, classes].sum()) / N}
    if probabilities is not None:
        cluster_of, hits = np.full(C, -1), 0
        cluster_of[classes] = clusters
        for start in range(0, N, 4096):      # in blocks, for the memory
            p, own = probabilities[start:start + 4096], cluster_of[labels[start:start + 4096], None]
            p_own = np.take_along_axis(p, own, axis=1)
            first = np.arange(p.shape[1]) < own                  # of equals the first counts, as in argmax
            ahead = (p > p_own) | ((p == p_own) & first)
            hits += int(((own[:, 0] >= 0) & (ahead.sum(1) < 5)).sum())
        metrics["acc_top5"] = hits / N
    metrics["acc_majority"] = int(counts.max(1).sum()) / N
    metrics |= partition_scores(counts)
    return metrics | {"num_clusters_used": int((counts.sum(1) > 0).sum()), "mapping": mapping.tolist()}


# ---------------------------------------------------------------- predictions, in words and pictures
@torch.inference_mode()
def predict(network, batches):
    """Features [N, feature_dim], probabilities softmax(logits) [N, K] of a Twist in evaluation mode, float32.

    batches: of inputs [B, 3, H, W], see data.eval_batches.
    """
    network.eval()
    features, probabilities = [], []
    for x in batches:
        y = network.backbone(x)
        features.append(y.float().cpu())
        probabilities.append(network.projection_heads(y).softmax(-1).float().cpu())
    return torch.cat(features).numpy(), torch.cat(probabilities).numpy()


def silhouette(features, predictions, chunk=4096):
    """Mean silhouette of clusters [N] by the cosine distance of features [N, D] (Rousseeuw 1987).

    None if there are fewer than two clusters, or as many as images.

    For each image (b - a) / max(a, b): a is its mean distance to the others of its cluster, b that to the
    nearest other cluster; 0 for one alone. Since 1 - x·y is linear in y, sums over clusters take the place of
    all N x N distances: exact, in N x K.
    """
    _, ids, sizes = np.unique(predictions, return_inverse=True, return_counts=True)
    K, N = len(sizes), len(ids)
    if not 2 <= K < N:
        return None
    x = F.normalize(torch.as_tensor(features).double(), dim=1)
    ids, sizes = torch.from_numpy(ids), torch.from_numpy(sizes)
    sums = x.new_zeros(K, x.shape[1]).index_add_(0, ids, x)
    total = 0.0
    for i in range(0, N, chunk):
        part, own = x[i:i + chunk], ids[i:i + chunk, None]
        distance = sizes - part @ sums.T                                          # [B, K], sums over clusters
        itself = 1 - (part * part).sum(1, keepdim=True)                           # 0, but for a zero feature
        a = (distance.gather(1, own) - itself) / (sizes[own] - 1)
        b = (distance / sizes).scatter(1, own, torch.inf).amin(1, keepdim=True)
        total += ((b - a) / torch.maximum(a, b)).where(sizes[own] > 1, 0).nan_to_num(0).sum().item()
    return total / N


def read_predictions(path):
    """(labels [N], predictions [N], probabilities [N, K] or None, class names, cluster names, remarks).

    A .csv has columns `label` and `prediction`; an .npz arrays `labels` and `predictions`, or probabilities
    [N, K]; either spelling will do. Labels and predictions are integers or strings of any kind and numbered
    from 0 here; but predictions that come with probabilities are columns of these. Negative predictions are
    noise, as scikit-learn's DBSCAN says it, and become -1. Raises UserError that names the column.
    """
    path, found = Path(path), {}
    if path.suffix not in (".csv", ".npz"):
        raise UserError(f"--predictions {path}: expected a .csv or .npz file")
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as file:              # a megabyte of it may hold a gigabyte of zeros
                unpacked = sum(record.file_size for record in file.infolist())
            if unpacked > max(2 ** 30, 100 * path.stat().st_size):
                raise ValueError(f"would take {unpacked / 2 ** 30:,.0f} GB of memory; save it by np.savez, "
                                 "which does not compress")
            with np.load(path) as file:
                found = {name: np.asarray(file[name]) for name in file.files}
        else:
            with open(path, newline="") as file:
                rows = list(csv.reader(file))
            for name, *column in zip(*rows, strict=True):
                found[name.strip()] = _column(column)
    except Exception as error:   # whatever a damaged or hostile file makes zipfile and numpy raise
        raise UserError(f"--predictions {path}: cannot be read ({error})") from None

    def take(*names):
        return next((found[name] for name in names if name in found), None)

    labels, predictions = take("labels", "label"), take("predictions", "prediction")
    probabilities = take("probabilities")
    if predictions is None and probabilities is not None and probabilities.ndim == 2:
        predictions = probabilities.argmax(1)
    remarks = []
    for name, ids in (("labels", labels), ("predictions", predictions)):
        if ids is None:
            raise UserError(f"--predictions {path}: has no column '{name}' (there are: {', '.join(found)})")
        if ids.ndim != 1 or len(ids) == 0:
            raise UserError(f"--predictions {path}: column '{name}' is empty or not one-dimensional")
        if ids.dtype.kind not in "iuUb":
            raise UserError(f"--predictions {path}: column '{name}' has gaps, or no integers or strings")
    if probabilities is not None and len(probabilities) != len(labels):
        raise UserError(f"--predictions {path}: {len(labels)} labels, but {len(probabilities)} probabilities")
    if len(labels) != len(predictions):
        raise UserError(f"--predictions {path}: {len(labels)} labels, but {len(predictions)} predictions")
    if labels.dtype.kind == "i" and labels.min() < 0:
        raise UserError(f"--predictions {path}: column 'labels' has {labels.min()}; leave such images out")
    noise = predictions < 0 if predictions.dtype.kind == "i" else np.zeros(len(labels), bool)
    if noise.any():
        remarks.append(f"{noise.sum():,} predictions ({noise.mean():.1%}) are negative, that is noise: in no "
                       "cluster, so wrong for every ACC; for NMI, AMI, ARI and FMI a cluster of their own")
    class_names, labels = np.unique(labels, return_inverse=True)
    if probabilities is None:
        cluster_names, ids = np.unique(predictions[~noise], return_inverse=True)
        predictions = np.full(len(labels), -1)
        predictions[~noise] = ids
    else:
        cluster_names = np.arange(probabilities.shape[-1])
    for what, names in (("classes", class_names), ("clusters", cluster_names)):
        if len(names) and names.dtype.kind in "iu" and names[-1] != len(names) - 1:
            remarks.append(f"{len(names):,} {what} with ids from {names[0]} to {names[-1]}")
    return labels, predictions, probabilities, [str(n) for n in class_names], cluster_names.tolist(), remarks


def _column(cells):
    """Of a .csv: integers if all are, 3.0 too; else strings. With a gap (empty or nan) all are NaN."""
    cells = np.array([cell.strip() for cell in cells])
    if any(cell.lower() in ("", "nan") for cell in cells):
        return np.full(len(cells), np.nan)
    try:
        numbers = cells.astype(float)
    except ValueError:
        return cells
    return numbers.astype(np.int64) if (numbers == np.floor(numbers)).all() else numbers


def evaluate_with_noise(labels, predictions):
    """`evaluate`, where a prediction of -1 is in no cluster: wrong for ACC, elsewhere a cluster by itself."""
    sound, share = predictions >= 0, float(np.mean(predictions >= 0))
    scores = evaluate(labels, np.where(sound, predictions, predictions.max() + 1))
    if not sound.any():
        return scores | {"acc": 0.0, "acc_majority": 0.0, "num_clusters_used": 0, "mapping": []}
    known = evaluate(labels[sound], predictions[sound])
    return scores | {"acc": share * known["acc"], "acc_majority": share * known["acc_majority"],
                     "num_clusters_used": known["num_clusters_used"], "mapping": known["mapping"]}


def pixel_kmeans(images, num_clusters, seed):
    """What needs no network: the cluster [N] of each image by k-means on its pixels, uint8 [N, C, H, W]."""
    pixels = images.flatten(1).float().numpy()
    return kmeans2(pixels, num_clusters, iter=50, minit="++", seed=seed)[1].astype(np.int64)


def describe_clusters(predictions, labels=None, mapping=None, class_names=None):
    """A dict for each cluster with images, largest first: cluster, size; with a mapping also class (None if
    unmatched); with labels also majority (the most frequent class) and purity (its share)."""
    sizes = np.bincount(predictions[predictions >= 0])
    rows = []
    for k in np.argsort(-sizes, kind="stable")[:np.count_nonzero(sizes)].tolist():
        row = {"cluster": k, "size": int(sizes[k])}
        if mapping is not None:
            row["class"] = class_names[mapping[k]] if mapping[k] >= 0 else None
        if labels is not None:
            counts = np.bincount(labels[predictions == k])
            row["majority"] = class_names[int(counts.argmax())]
            row["purity"] = int(counts.max()) / row["size"]
        rows.append(row)
    return rows


def caption(row):
    """One line about a cluster; its majority is named where that is not the class it is matched to."""
    text = f"cluster {row['cluster']}"
    if "class" in row:
        text += f" → {row['class'] or 'unmatched'}"
    if "purity" in row:
        text += f"   purity {row['purity']:.0%}"
        text += f" (mostly {row['majority']})" if row["majority"] != row["class"] else ""
    return f"{text}   {row['size']:,} images"


def draw_contact_sheet(path, images, predictions, confidences, clusters, images_per_cluster=12, title=""):
    """PNG of each cluster's most confident images; clusters: rows of describe_clusters.

    images[i]: uint8 [C, H, W], all of one size. Captions are whole, on as many lines as they need.
    """
    from matplotlib.figure import Figure

    columns = 1 if len(clusters) <= 5 else 2
    rows = math.ceil(len(clusters) / columns)
    captions = [textwrap.fill(caption(row), 72) for row in clusters]
    H, W = images[0].shape[-2:]
    gap, strip_width = 1 + W // 28, 4.8                                           # pixels, inches
    caption_height = 0.14 + 0.14 * max(text.count("\n") + 1 for text in captions)
    row_height = strip_width / images_per_cluster * H / W + caption_height
    figure = Figure(figsize=(columns * strip_width, rows * row_height + 0.4), layout="constrained")
    for i, row in enumerate(clusters):
        members = np.flatnonzero(predictions == row["cluster"])
        best = members[np.argsort(-confidences[members], kind="stable")[:images_per_cluster]]
        strip = np.full((H, images_per_cluster * (W + gap) - gap, 3), 255, np.uint8)
        for j, index in enumerate(best):
            strip[:, j * (W + gap):j * (W + gap) + W] = images[index].permute(1, 2, 0).numpy()
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(strip)
        axes.set_title(captions[i], loc="left", fontsize=8, pad=3)
        axes.axis("off")
    figure.suptitle(f"Most confident images of each cluster{title}", fontsize=11)
    figure.savefig(path, dpi=150)


def draw_top3(path, images, probabilities, index, cluster_names, truth=None):
    """PNG of some images with their three most probable clusters beneath (paper, Figure 1).

    images[i]: uint8 [C, H, W]; probabilities: [N, K]; index: which images; cluster_names: K strings, the
    mapped class where there is one; truth: N strings or None.
    """
    from matplotlib.figure import Figure

    top = np.argsort(-probabilities[index], 1, kind="stable")[:, :3]              # [n, 3]
    shown = [cluster_names[k] for k in top.flat] + ([truth[i] for i in index] if truth is not None else [])
    width = max(1.6, 0.5 + 0.07 * max(map(len, shown)))                           # inches; names are whole
    columns = min(6, len(index))
    rows = math.ceil(len(index) / columns)
    figure = Figure(figsize=(columns * width, rows * 2.35), layout="constrained")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[1.5, 0.75] * rows)
    for place, (i, clusters) in enumerate(zip(index, top, strict=True)):
        row, column = divmod(place, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        axes.imshow(images[i].permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axes.axis("off")
        axes = figure.add_subplot(grid[2 * row + 1, column])
        axes.barh(range(len(clusters)), probabilities[i, clusters], color="#9ecae1", height=0.9)
        for y, k in enumerate(clusters):
            axes.text(0.01, y, cluster_names[k], va="center", fontsize=7)
            axes.text(0.99, y, f"{probabilities[i, k]:.3f}", va="center", ha="right", fontsize=7)
        axes.set(xlim=(0, 1), ylim=(len(clusters) - 0.5, -0.5), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if truth is not None:
            mark = "✓" if cluster_names[clusters[0]] == truth[i] else "✗"
            axes.set_xlabel(f"{mark} truth: {truth[i]}", fontsize=7, fontweight="bold", labelpad=2)
    figure.suptitle(f"The three most probable classes of {len(index)} images drawn at random", fontsize=10)
    figure.savefig(path, dpi=150)


def confusion_matrix(labels, predicted_classes, num_classes):
    """Shares [C, C]: row = true class, column = predicted class; each row with images sums to 1.

    Where a predicted class is -1 (an unmatched cluster) there is one more column for it.
    """
    columns = num_classes + int(predicted_classes.min() < 0)
    predicted_classes = np.where(predicted_classes < 0, num_classes, predicted_classes)
    counts = np.bincount(labels * columns + predicted_classes, minlength=num_classes * columns)
    counts = counts.reshape(num_classes, columns)
    return counts / np.maximum(1, counts.sum(1, keepdims=True))


def draw_confusion_matrix(path, labels, predicted_classes, class_names):
    """PNG of the row-normalised confusion matrix: up to 200 classes are named, up to 50 have per cents."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    matrix = confusion_matrix(labels, predicted_classes, len(class_names))
    rows, columns = matrix.shape
    cell, font = (0.4, 8) if rows <= 50 else (0.15, 6)
    named = rows <= 200
    size = max(4.5, cell * rows) if named else 12                                 # inches
    names = 0.012 * font * max(map(len, class_names)) if named else 0
    figure = Figure(figsize=(size + 1.2 + names, size + names), layout="constrained")
    axes = figure.add_subplot()
    scale = PowerNorm(1 if named else 0.4, vmin=0, vmax=1)     # where a cell is a pixel, faint ones must show
    picture = axes.imshow(matrix, cmap="Blues", norm=scale)
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    last = "; last column: unmatched" if columns > rows else ""
    axes.set(xlabel=f"class that the predicted cluster is matched to{last}", ylabel="true class")
    if named:
        axes.set_xticks(range(columns), [*class_names, "unmatched"][:columns], rotation=90, fontsize=font)
        axes.set_yticks(range(rows), class_names, fontsize=font)
    if rows <= 50:
        for i, j in np.argwhere(matrix > 0.005):      # among zeros everywhere the errors would not be seen
            axes.text(j, i, f"{100 * matrix[i, j]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if matrix[i, j] > 0.5 else "black")
    figure.savefig(path, dpi=150)


def write_assignments(path, probabilities, labels=None, mapping=None, class_names=None, files=None):
    """CSV with a line for each image: its cluster and the probability of that; file and classes if known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", *(["file"] if files is not None else []), "prediction", "probability",
                     *(["mapped_label", "mapped_name"] if mapping is not None else []),
                     *(["label", "label_name"] if labels is not None else [])])
    for i, (k, p) in enumerate(zip(probabilities.argmax(1), probabilities.max(1), strict=True)):
        line = [i, *([os.fsdecode(files[i])] if files is not None else []), k, f"{p:.6f}"]
        if mapping is not None:
            line += [mapping[k], class_names[mapping[k]] if mapping[k] >= 0 else "unmatched"]
        if labels is not None:
            line += [labels[i], class_names[labels[i]]]
        writer.writerow(line)
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))


def read_mapping(path, num_clusters, class_names):
    """(mapping, class names) of a metrics.json, for so many clusters; class_names: of the labels, or None."""
    try:
        metrics = json.loads(Path(path).read_text())
        mapping, names = metrics["mapping"], metrics["class_names"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--map-from {path}: not the metrics.json of a labelled split ({error!r})") from None
    matched = [k for k in mapping if k != -1] if isinstance(mapping, list) else [None]
    classes = range(len(names)) if isinstance(names, list) else ()
    if not all(type(k) is int and k in classes for k in matched) or len(set(matched)) < len(matched):
        raise UserError(f"--map-from {path}: not a mapping of clusters to its {len(classes)} classes, "
                        "each one's at most once")
    if len(mapping) != num_clusters:
        raise UserError(f"--map-from {path}: maps {len(mapping)} clusters, the network has {num_clusters}")
    if class_names is not None and names != class_names:
        raise UserError(f"--map-from {path}: its classes are others than those of --data")
    return mapping, names


def main(args):
    # ---------------------------------------------------------------- model
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    if device.type not in (best, "cpu"):
        raise UserError(f"--device {device}: there is none here; --device auto would take {best}")
    if (args.checkpoint is None) == (args.predictions is None):
        raise UserError("--checkpoint or --predictions: one of the two is needed")
    least = dict(batch_size=1, images_per_cluster=1, contact_sheets=0, bn_images=0, workers=-1)
    for name, low in least.items():
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    if args.bn_images == 1:
        raise UserError("--bn-images 1: one image has no variance")
    dataset = class_names = mapping = None
    remarks, scores = [], {}

    # ---------------------------------------------------------------- data
    if args.predictions:
        for flag in ("map_from", "silhouette", "bn_images", "pixel_kmeans"):
            if getattr(args, flag):
                raise UserError(f"--{flag.replace('_', '-')}: needs a --checkpoint")
        title, split, seed = args.predictions, "predicted", 0
        labels, predictions, probabilities, class_names, cluster_names, remarks = read_predictions(title)
        num_images, num_clusters = len(labels), len(cluster_names)
    else:
        network, config = load_twist(args.checkpoint)
        title, split, seed = args.data or config["data"], args.split, config["seed"]
        dataset = build_dataset(title, split, seed, args.data_dir)
        labels = None if dataset.labels is None else dataset.labels.numpy()
        class_names = dataset.class_names if labels is not None else None
        num_images, num_clusters = len(dataset), config["num_classes"]
        cluster_names = list(range(num_clusters))
        if args.map_from:
            mapping, class_names = read_mapping(args.map_from, num_clusters, class_names)
        if args.bn_images:
            train = dataset if split == "train" else build_dataset(title, "train", seed, args.data_dir)
        if args.pixel_kmeans and dataset.images is None:
            raise UserError("--pixel-kmeans: only for data sets in memory; files have no common size")
    out = make_evaluation_folder(args.output_dir)

    # ---------------------------------------------------------------- eval
    metrics = {"checkpoint": args.checkpoint, "predictions": args.predictions, "data": title, "split": split,
               "num_images": num_images, "num_clusters": num_clusters}
    if dataset is not None:
        network.to(device)
        if args.bn_images:
            drawn = np.random.default_rng([seed, 6]).permutation(len(train))[:args.bn_images]
            count = min(round(len(drawn) / args.batch_size), len(drawn) // 2)       # at least two images each
            batch = len(drawn) // max(1, count)                                   # all of one size, or nearly
            train = train.subset(torch.from_numpy(drawn[:len(drawn) // batch * batch]))
            reestimate_batch_norms(network, eval_batches(train, config, device, batch, args.workers))
            remarks.append(f"batch-norm statistics are those of {len(train.readable()):,} training images")
        batches = eval_batches(dataset, config, device, args.batch_size, args.workers)
        features, probabilities = predict(network, batches)               # [N, feature_dim], [N, K]
        dataset = dataset.readable()
        metrics["num_broken"] = num_images - len(dataset)
        if metrics["num_broken"]:
            metrics["num_images"] = num_images = len(dataset)
            labels = None if labels is None else dataset.labels.numpy()
            remarks.append(f"{metrics['num_broken']} broken pictures left out")
        if not np.isfinite(probabilities).all():
            raise UserError(f"{args.checkpoint}: the network's output is not finite; take an earlier one")
        predictions = probabilities.argmax(1)
        if args.silhouette:
            metrics["silhouette"] = silhouette(features, predictions)
            remarks.append("no silhouette: there are not two clusters" if metrics["silhouette"] is None else
                           f"silhouette {metrics['silhouette']:.4f} (cosine distance of backbone features)")
    if labels is None:           # nothing is measured against invented labels
        remarks.append("no labels: ACC, NMI, AMI, ARI, FMI, purity and the confusion matrix are left out")
    elif (predictions < 0).any():
        scores = evaluate_with_noise(labels, predictions)
    else:
        scores = evaluate(labels, predictions, probabilities, mapping)
    if mapping is not None:
        remarks.append(f"clusters are named by the mapping of {args.map_from}")
    mapping = scores.get("mapping", mapping)
    clusters = describe_clusters(predictions, labels, mapping, class_names)
    scored = {"network" if dataset else "predictions": scores} if scores else {}
    if scores and args.pixel_kmeans:
        scored["k-means on pixels"] = evaluate(labels, pixel_kmeans(dataset.images, num_clusters, seed))
    print(f"{title}: {num_images:,} {split} images, {len(clusters)} of {num_clusters} clusters in use")
    for name, s in scored.items():
        print(f"  {name}: ACC {s['acc']:.4f} (clusters matched to classes one to one; many-to-one "
              f"{s['acc_majority']:.4f})   NMI {s['nmi']:.4f}   AMI {s['ami']:.4f}   ARI {s['ari']:.4f}")
    for remark in remarks:
        print(f"  {remark}")
    named = [row | {"cluster": cluster_names[row["cluster"]]} for row in clusters]         # ids as they came
    for row in named[:MAX_CLUSTERS]:
        print(f"  {caption(row)}")
    if len(named) > MAX_CLUSTERS:
        print(f"  and {len(named) - MAX_CLUSTERS} smaller ones, see metrics.json")

    # ---------------------------------------------------------------- save
    for old in ("metrics.json", "assignments.csv", "contact_sheet*.png", "confusion_matrix.png", "top3.png"):
        for path in out.glob(old):               # what lies in the folder afterwards belongs together
            path.unlink()
    try:
        if labels is not None:
            classes = np.where(predictions < 0, -1, np.array([*mapping, -1])[predictions])
            draw_confusion_matrix(out / "confusion_matrix.png", labels, classes, class_names)
        if dataset is not None:
            images = CentreCrops(dataset, 112) if dataset.images is None else dataset.images
            confidences = probabilities.max(1)
            for first in range(0, len(clusters), MAX_CLUSTERS)[:args.contact_sheets]:
                rows = clusters[first:first + MAX_CLUSTERS]
                path = out / f"contact_sheet{f'_{first // MAX_CLUSTERS + 1}' if first else ''}.png"
                part = f": {first + 1} to {first + len(rows)} of {len(clusters)}, the largest first"
                draw_contact_sheet(path, images, predictions, confidences, rows, args.images_per_cluster,
                                   part if len(rows) < len(clusters) else "")
            index = np.random.default_rng([seed, 7]).permutation(num_images)[:12]
            names = [f"cluster {k}" if mapping is None or mapping[k] < 0 else class_names[mapping[k]]
                     for k in range(num_clusters)]
            draw_top3(out / "top3.png", images, probabilities, index, names,
                      None if labels is None else [class_names[c] for c in labels])
    except ImportError as error:
        print(f"no pictures: {error}")
    if dataset is not None:
        write_assignments(out / "assignments.csv", probabilities, labels, mapping, class_names, dataset.paths)
    metrics |= {**scores, "class_names": class_names, "clusters": named,
                "pixel_kmeans": scored.get("k-means on pixels")}
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    print(f"written: {out}")


if __name__ == "__main__":
    run(main, get_parser())
