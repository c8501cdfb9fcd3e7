"""Unsupervised classification: do the clusters that a network found agree with the true classes?

The cluster of an image is the argmax of softmax(logits) in evaluation mode (batch norms and NBS use their
running statistics). Cluster ids mean nothing by themselves, so ACC first matches clusters to classes one to
one (Hungarian algorithm); NMI, AMI, ARI and FMI need no matching. Labels are used for the scores only.

    python cluster_eval.py --checkpoint weights/fashion-mnist.pth
    python cluster_eval.py --checkpoint runs/pretrain/checkpoint.pth --split train --device cpu

One process, on the CPU or one GPU; without --data the checkpoint's own. The predictions of any other program
can be scored too:

    from cluster_eval import evaluate
    print(evaluate(labels, predictions))      # two arrays of integers, equally long
"""

import argparse
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln

from checkpoint import UserError, load_twist, run, write_atomically
from data import build_dataset, normalize

MAX_CLUSTERS = 40      # on the contact sheet and in the printed list; metrics.json has all of them


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint.pth of a pretrain.py run")
    add("--data", help="data set: fashion-mnist (embedded) or fake")
    add("--split", default="test", choices=("train", "test"), help="images to score")
    add("--output-dir", default="runs/cluster_eval", help="folder for all that is written")
    add("--images-per-cluster", type=int, default=12, help="on the contact sheet")
    add("--pixel-kmeans", action="store_true", help="score k-means on the pixels of the images, too")
    add("--batch-size", type=int, default=512, help="images in the GLOBAL batch")
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


def evaluate(labels, predictions, probabilities=None):
    """Scores predicted clusters against true classes; there may be more or fewer clusters than classes.

    labels, predictions: [N] integers from 0; probabilities: [N, K], only their order within a row matters.
    Without probabilities K is the largest prediction + 1; C is the largest label + 1. Returns a dict:

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

    counts = np.bincount(predictions * C + labels, minlength=K * C).reshape(K, C)
    clusters, classes = linear_sum_assignment(counts, maximize=True)
    mapping = np.full(K, -1)
    mapping[clusters] = classes
    metrics = {"acc": int(counts[clusters, classes].sum()) / N}
    if probabilities is not None:
        cluster_of, hits = np.full(C, -1), 0
        cluster_of[classes] = clusters
        for start in range(0, N, 4096):      # in blocks, for the memory
            p, own = probabilities[start:start + 4096], cluster_of[labels[start:start + 4096], None]
            p_own = np.take_along_axis(p, own, axis=1)
            ahead = (p > p_own) | ((p == p_own) & (np.arange(K) < own))     # of equals the first, as argmax
            hits += int(((own[:, 0] >= 0) & (ahead.sum(1) < 5)).sum())
        metrics["acc_top5"] = hits / N
    metrics["acc_majority"] = int(counts.max(1).sum()) / N
    metrics |= partition_scores(counts)
    return metrics | {"num_clusters_used": int((counts.sum(1) > 0).sum()), "mapping": mapping.tolist()}


# ---------------------------------------------------------------- predictions, in words and pictures
@torch.inference_mode()
def predict(network, dataset, device, batch_size):
    """Probabilities softmax(logits) [N, K] of a Twist in evaluation mode, a float32 array."""
    network.eval()
    probabilities = []
    for images in dataset.images.split(batch_size):
        x = normalize(images.to(device), dataset.mean, dataset.std)
        probabilities.append(network([x])[0].softmax(-1).float().cpu())
    return torch.cat(probabilities).numpy()


def pixel_kmeans(images, num_clusters, seed):
    """What needs no network: the cluster [N] of each image by k-means on its pixels, uint8 [N, C, H, W]."""
    pixels = images.flatten(1).float().numpy()
    return kmeans2(pixels, num_clusters, iter=50, minit="++", seed=seed)[1].astype(np.int64)


def describe_clusters(predictions, labels=None, mapping=None, class_names=None):
    """A dict for each cluster with images, largest first: cluster, size; with labels also class (that of the
    mapping, None if unmatched), majority (the most frequent class) and purity (its share)."""
    sizes = np.bincount(predictions)
    rows = []
    for k in np.argsort(-sizes, kind="stable")[:np.count_nonzero(sizes)].tolist():
        row = {"cluster": k, "size": int(sizes[k])}
        if labels is not None:
            counts = np.bincount(labels[predictions == k])
            row["class"] = class_names[mapping[k]] if mapping[k] >= 0 else None
            row["majority"] = class_names[int(counts.argmax())]
            row["purity"] = int(counts.max()) / row["size"]
        rows.append(row)
    return rows


def caption(row, width=12):
    """One line about a cluster; its majority is named where that is not the class it is matched to."""
    def short(name):
        return name if len(name) <= width else name[:width - 1] + "…"

    text = f"cluster {row['cluster']}"
    if "class" in row:
        text += f" → {short(row['class'] or 'unmatched')}   purity {row['purity']:.0%}"
        text += f" (mostly {short(row['majority'])})" if row["majority"] != row["class"] else ""
    return f"{text}   {row['size']:,} images"


def draw_contact_sheet(path, images, predictions, confidences, clusters, images_per_cluster=12):
    """PNG of each cluster's most confident images, uint8 [N, C, H, W]; clusters: from describe_clusters."""
    from matplotlib.figure import Figure

    shown = clusters[:MAX_CLUSTERS]
    columns = 1 if len(shown) <= 5 else 2
    rows = math.ceil(len(shown) / columns)
    H, W = images.shape[-2:]
    gap, strip_width = 1 + W // 28, 4.8                                           # pixels, inches
    row_height = strip_width / images_per_cluster * H / W + 0.28                  # the caption is 0.28
    figure = Figure(figsize=(columns * strip_width, rows * row_height + 0.4), layout="constrained")
    for i, row in enumerate(shown):
        members = np.flatnonzero(predictions == row["cluster"])
        best = members[np.argsort(-confidences[members], kind="stable")[:images_per_cluster]]
        strip = np.full((H, images_per_cluster * (W + gap) - gap, 3), 255, np.uint8)
        for j, index in enumerate(best):
            strip[:, j * (W + gap):j * (W + gap) + W] = images[index].permute(1, 2, 0).numpy()
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(strip)
        axes.set_title(caption(row), loc="left", fontsize=8, pad=3)
        axes.axis("off")
    left_out = f": the {len(shown)} largest of {len(clusters)}" if len(shown) < len(clusters) else ""
    figure.suptitle(f"Most confident images of each cluster{left_out}", fontsize=11)
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
    """PNG of the row-normalised confusion matrix; up to 50 classes with their names and integer per cents."""
    from matplotlib.figure import Figure

    matrix = confusion_matrix(labels, predicted_classes, len(class_names))
    rows, columns = matrix.shape
    size = max(4.5, 0.4 * rows) if rows <= 50 else 8                              # inches
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    last = "; last column: unmatched" if columns > rows else ""
    axes.set(xlabel=f"class that the predicted cluster is matched to{last}", ylabel="true class")
    if rows <= 50:
        axes.set_xticks(range(columns), [*class_names, "unmatched"][:columns], rotation=90)
        axes.set_yticks(range(rows), class_names)
        for i, j in np.argwhere(matrix > 0.005):      # among zeros everywhere the errors would not be seen
            axes.text(j, i, f"{100 * matrix[i, j]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if matrix[i, j] > 0.5 else "black")
    figure.savefig(path, dpi=150)


def write_assignments(path, probabilities, labels=None, mapping=None, class_names=None):
    """CSV with a line for each image: its cluster, the probability of that, and with labels the classes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "prediction", "probability"]
                    + (["mapped_label", "mapped_name", "label", "label_name"] if labels is not None else []))
    for i, (k, p) in enumerate(zip(probabilities.argmax(1), probabilities.max(1), strict=True)):
        line = [i, k, f"{p:.6f}"]
        if labels is not None:
            mapped_name = class_names[mapping[k]] if mapping[k] >= 0 else "unmatched"
            line += [mapping[k], mapped_name, labels[i], class_names[labels[i]]]
        writer.writerow(line)
    write_atomically(path, text.getvalue().encode())


def main(args):
    # ---------------------------------------------------------------- model
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    if device.type not in (best, "cpu"):
        raise UserError(f"--device {device}: there is none here; --device auto would take {best}")
    network, config = load_twist(args.checkpoint)
    name, seed = args.data or config["data"], config["seed"]

    # ---------------------------------------------------------------- data
    dataset = build_dataset(name, args.split, seed)
    labels = None if dataset.labels is None else dataset.labels.numpy()
    for flag in ("batch_size", "images_per_cluster"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    out = Path(args.output_dir)
    if (out / "checkpoint.pth").exists():
        raise UserError(f"--output-dir {out}: holds a training run; choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {out}: cannot be written ({error.strerror})") from None

    # ---------------------------------------------------------------- eval
    probabilities = predict(network.to(device), dataset, device, args.batch_size)         # [N, K]
    if not np.isfinite(probabilities).all():
        raise UserError(f"{args.checkpoint}: the network's output is not finite; use an earlier checkpoint")
    predictions, confidences = probabilities.argmax(1), probabilities.max(1)
    scores = {}
    if labels is not None:      # without labels no score: nothing is measured against invented ones
        scores = evaluate(labels, predictions, probabilities)
    mapping = scores.get("mapping")
    clusters = describe_clusters(predictions, labels, mapping, dataset.class_names)
    num_images, num_clusters = probabilities.shape
    print(f"{name}: {num_images:,} {args.split} images, {len(clusters)} of {num_clusters} clusters in use")
    scored = {"network": scores} if scores else {}
    if scores and args.pixel_kmeans:
        scored["k-means on pixels"] = evaluate(labels, pixel_kmeans(dataset.images, num_clusters, seed))
    for title, s in scored.items():
        print(f"  {title}: ACC {s['acc']:.4f} (clusters matched to classes one to one; many-to-one "
              f"{s['acc_majority']:.4f})   NMI {s['nmi']:.4f}   AMI {s['ami']:.4f}   ARI {s['ari']:.4f}")
    for row in clusters[:MAX_CLUSTERS]:
        print(f"  {caption(row, width=30)}")
    if len(clusters) > MAX_CLUSTERS:
        print(f"  and {len(clusters) - MAX_CLUSTERS} smaller ones, see metrics.json")

    # ---------------------------------------------------------------- save
    for old in ("metrics.json", "contact_sheet.png", "confusion_matrix.png"):
        (out / old).unlink(missing_ok=True)      # what lies in the folder afterwards belongs together
    write_assignments(out / "assignments.csv", probabilities, labels, mapping, dataset.class_names)
    try:
        draw_contact_sheet(out / "contact_sheet.png", dataset.images, predictions, confidences, clusters,
                           args.images_per_cluster)
        if labels is not None:
            draw_confusion_matrix(out / "confusion_matrix.png", labels, np.array(mapping)[predictions],
                                  dataset.class_names)
    except ImportError as error:
        print(f"no pictures: {error}")
    metrics = {"checkpoint": args.checkpoint, "data": name, "split": args.split, "num_images": num_images,
               "num_clusters": num_clusters, **scores, "clusters": clusters,
               "pixel_kmeans": scored.get("k-means on pixels")}
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    print(f"written: {out}")


if __name__ == "__main__":
    run(main, get_parser())
