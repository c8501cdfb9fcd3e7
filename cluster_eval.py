"""Unsupervised classification: do the clusters that a network found agree with the true classes?

    python cluster_eval.py --checkpoint weights/fashion-mnist.pth        on the GPU if there is one, else CPU
    python cluster_eval.py --checkpoint runs/pretrain/checkpoint.pth --data my/pictures --device cpu
    python cluster_eval.py --checkpoint resnet50.pth --arch resnet50 --kmeans 1000 --data IMAGENET
    torchrun --nproc-per-node 8 cluster_eval.py --checkpoint FILE --split train      they share the images
    python cluster_eval.py --predictions FILE        scores a .csv or .npz of any other program

The cluster of an image is the argmax of softmax(logits); batch norms and NBS use their running statistics.
With --kmeans it is the nearest of K centres of backbone features, for networks without classes of their own.
ACC first matches clusters to classes one to one (Hungarian algorithm); NMI, AMI, ARI and FMI need no match.
Labels are used for the scores only. Without labels there are clusters, assignments and pictures, no scores.
The first command takes about 20 seconds of one CPU core: ACC 0.734, NMI 0.673, AMI 0.673, ARI 0.585.
"""

import argparse
import datetime
import json
import os

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import UserError, read_file, to_stdout, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from clusters import cluster_features, cluster_pixels, partition_scores, silhouette
from data import CentreCrops, build_dataset, eval_batches, folder_flags, folder_options
from model import reestimate_batch_norms
from pictures import PER_SHEET, caption, draw_clusters
from predictions import (
    UNREADABLE,
    describe_clusters,
    name_classes,
    name_clusters,
    predict_part,
    read_predictions,
    write_assignments,
)
from pretrained import choose_input, fingerprint, load_network, load_twist, network_flags, to_device
from run import make_evaluation_folder


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    network_flags(parser, required=False)
    add = parser.add_argument_group("clusters, or --predictions, and data").add_argument
    add("--predictions", help=".csv or .npz with labels and predictions, of any program")
    add("--kmeans", type=at_least(0), default=0, metavar="K",
        help="K clusters of the backbone's features, fitted on training images; 0: the network's own")
    add("--kmeans-starts", type=at_least(1), default=10, help="starts of k-means; the tightest clusters win")
    add("--data", help="a data set, a folder, list or shards of pictures; without it the checkpoint's own")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--split", default="test", choices=("train", "test"), help="part to score; of a folder, test is val")
    folder_flags(parser)
    add = parser.add_argument_group("scores").add_argument
    add("--map-from", help="metrics.json of a labelled split: use its mapping of clusters to classes")
    add("--class-names", metavar="FILE", help="names of the classes, one a line, by class number; imagenet: "
        "those of its 1,000 classes")
    add("--silhouette", action="store_true", help="of the clusters, by cosine distance of backbone features")
    add("--bn-images", type=at_least(2), default=0, metavar="N",
        help="take batch-norm statistics from N training images; without it those of the checkpoint")
    add("--pixel-kmeans", action="store_true", help="for comparison, score k-means on the pixels of "
        "the scored images")
    add = parser.add_argument_group("pictures and run").add_argument
    add("--images-per-cluster", type=at_least(1), default=12, help="on contact sheets")
    add("--contact-sheets", type=at_least(0), default=3,
        help=f"most contact sheets to draw, of {PER_SHEET} clusters each")
    add("--output-dir", default="runs/cluster_eval", help="for everything written")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to compute")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision of the backbone; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--batch-size", type=at_least(1), default=512, help="images per forward pass of a process")
    add("--workers", type=at_least(-1), default=-1, help="to read files; -1: one per core")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


def check(args):
    """Raises UserError for flags that do not go together; each by itself is checked by its type."""
    if (args.checkpoint is None) == (args.predictions is None):
        raise UserError("--checkpoint or --predictions: one of the two is needed; give one FILE")
    for flag in ("key", "arch", "data", "kmeans", "map_from", "silhouette", "bn_images", "pixel_kmeans"):
        if args.predictions and getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')}: needs a --checkpoint")
    if args.kmeans and args.map_from:
        raise UserError("--map-from: --kmeans numbers its clusters anew; leave one of the two out")


# ---------------------------------------------------------------- metrics
def check_ids(name, ids):
    """The ids as an int64 array [N]. Raises ValueError unless they are integers from 0."""
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


def evaluate(labels, predictions, probabilities=None, mapping=None):
    """Scores predicted clusters against true classes; there may be more or fewer clusters than classes.

    labels, predictions: [N] integers from 0; probabilities: [N, K], only their order within a row matters.
    Without probabilities K is the largest prediction + 1; C is the largest label + 1. mapping: for each of K
    or more clusters its class or -1, as another split gave it; default: the best is found. Returns a dict:

    acc: share of images whose cluster is matched to their class, by the one-to-one matching with the greatest
        such share (Hungarian algorithm; rectangular if K != C: an unmatched cluster predicts nothing).
    acc_top5: the same for any of the five most probable clusters; only with probabilities.
    acc_majority: each cluster predicts its most frequent class (many-to-one). Rises with K, to 1 at K = N.
    nmi, ami, ami_max, ari, fmi: see clusters.partition_scores. num_clusters_used: clusters with an image.
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
        if not (probabilities.min() >= 0 and probabilities.max() < np.inf):     # false for NaN
            raise ValueError("probabilities: contains NaN, infinite or negative values")
        K = probabilities.shape[1]
    if mapping is not None:
        mapping = np.asarray(mapping)
        matched = mapping[mapping >= 0]
        if mapping.ndim != 1 or mapping.dtype.kind != "i" or len(mapping) < K:
            raise ValueError(f"mapping: expected {K} or more integers, one for each cluster")
        if len(np.unique(matched)) < len(matched):
            raise ValueError("mapping: two clusters have the same class")
        K, C = len(mapping), max(C, int(mapping.max()) + 1)
    counts = np.bincount(predictions * C + labels, minlength=K * C).reshape(K, C)
    if mapping is None:
        # the Hungarian algorithm; imported here, so that cli.py can say first that scipy is missing
        from scipy.optimize import linear_sum_assignment
        clusters, classes = linear_sum_assignment(counts, maximize=True)
        mapping = np.full(K, -1)
        mapping[clusters] = classes
    clusters = np.flatnonzero(mapping >= 0)
    classes = mapping[clusters]
    metrics = {"acc": int(counts[clusters, classes].sum()) / N}
    if probabilities is not None:
        cluster_of = np.full(C, -1)
        cluster_of[classes] = clusters
        metrics["acc_top5"] = top5(probabilities, cluster_of[labels])
    metrics["acc_majority"] = int(counts.max(1).sum()) / N
    metrics |= partition_scores(counts)
    return metrics | {"num_clusters_used": int((counts.sum(1) > 0).sum()), "mapping": mapping.tolist()}


def top5(probabilities, clusters, chunk=4096):
    """Share of images whose cluster [N] (-1: none) is among the five most probable [N, K].

    Of equal probabilities the first counts more, as in argmax.
    """
    hits = 0
    for start in range(0, len(clusters), chunk):                                  # bounds the memory
        p, k = probabilities[start:start + chunk], clusters[start:start + chunk, None]
        p_k = np.take_along_axis(p, k, axis=1)
        ahead = (p > p_k) | ((p == p_k) & (np.arange(p.shape[1]) < k))
        hits += int(((k[:, 0] >= 0) & (ahead.sum(1) < 5)).sum())
    return hits / len(clusters)


def evaluate_with_noise(labels, predictions, probabilities=None):
    """`evaluate`, but negative predictions are wrong for ACC, else a cluster, and acc_top5 is left out."""
    sound = predictions >= 0
    if sound.all():
        return evaluate(labels, predictions, probabilities)
    scores = evaluate(labels, np.where(sound, predictions, predictions.max() + 1))
    if not sound.any():
        return scores | {"acc": 0.0, "acc_majority": 0.0, "num_clusters_used": 0, "mapping": []}
    known, share = evaluate(labels[sound], predictions[sound]), float(np.mean(sound))
    return scores | {"acc": share * known["acc"], "acc_majority": share * known["acc_majority"],
                     "num_clusters_used": known["num_clusters_used"], "mapping": known["mapping"]}


# ---------------------------------------------------------------- clusters of a network
def load_clusters(args):
    """(network, configuration): a Twist, or with --kmeans a backbone; see pretrained.load_network."""
    if args.kmeans:
        return load_network(args)
    try:
        network, config = load_twist(args.checkpoint, args.key, args.arch)
    except UserError as error:
        read_file(args.checkpoint)           # a file that cannot be read has no features either
        raise UserError(f"{error}; --kmeans K clusters the features of a network without classes") from None
    return network, choose_input(config, args)


def build_parts(args, config):
    """(images to score, training images or None) of --data, else of the checkpoint's data."""
    name, options, train = args.data or config["data"], folder_options(args, config), None
    dataset = build_dataset(name, args.split, config["seed"], args.data_dir, **options)
    if args.bn_images or args.kmeans:
        train = build_dataset(name, "train", config["seed"], args.data_dir, **options)
        if args.kmeans > len(train):
            raise UserError(f"--kmeans {args.kmeans}: must be at most the {len(train):,} {train.part}")
    if args.pixel_kmeans and dataset.images is None:
        raise UserError("--pixel-kmeans: files have no common size; leave it out")
    return dataset, train


def estimate_batch_norms(network, train, config, device, args):
    """Sets batch-norm statistics by up to args.bn_images training images; returns how many could be read."""
    drawn = np.random.default_rng([config["seed"], 6]).permutation(len(train))[:args.bn_images]
    count = min(round(len(drawn) / args.batch_size), len(drawn) // 2)             # at least two images each
    batch = len(drawn) // max(1, count)                            # of one size: some images are left out
    train = train.subset(torch.from_numpy(drawn[:len(drawn) // batch * batch]))
    batches = eval_batches(train, config, device, batch, args.workers)
    reestimate_batch_norms(network, batches, forward=network if args.kmeans else None)
    return len(train.readable())


def print_report(scored, remarks, clusters):
    """Prints scores {name: dict of evaluate}, remarks, and the largest clusters (of describe_clusters)."""
    for name, scores in scored.items():
        to_stdout("  {0}: ACC {acc:.4f} (clusters matched to classes one to one; many-to-one "
                  "{acc_majority:.4f})   NMI {nmi:.4f}   AMI {ami:.4f}   ARI {ari:.4f}"
                  .format(name, **scores))
    for line in [*remarks, *map(caption, clusters[:PER_SHEET])]:
        to_stdout(f"  {line}")
    if len(clusters) > PER_SHEET:
        to_stdout(f"  and {len(clusters) - PER_SHEET} smaller ones, see metrics.json")


def main(args):
    # ---------------------------------------------------------------- ddp: torchrun sets these variables
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device(args.device), dict(backend="gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = dict(backend="nccl", device_id=device)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True        # seeks the fastest kernels once: the sizes stay the same
    amp_dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]

    # ---------------------------------------------------------------- data
    check(args)
    source, scored, made_by = args.checkpoint, {}, {}
    if args.predictions:
        dataset, mapping, seed = None, None, 0
        title, split, part = args.predictions, "predicted", "predicted images"
        labels, predictions, probabilities, class_names, cluster_names, remarks = read_predictions(title)
        class_names, num_clusters = name_classes(args.class_names, class_names), len(cluster_names)
        scored["predictions"] = evaluate_with_noise(labels, predictions, probabilities)
    else:
        network, config = load_clusters(args)
        title, split, seed, remarks = args.data or config["data"], args.split, config["seed"], []
        dataset, train = build_parts(args, config)
        num_clusters = args.kmeans or config["num_classes"]
        part, cluster_names = dataset.part, range(num_clusters)
        class_names = dataset.class_names if dataset.labels is not None else None
        made_by = {"network_sha256": fingerprint(network), "bn_images": args.bn_images}
        mapping, class_names = name_clusters(args.map_from, args.class_names, num_clusters, class_names,
                                             made_by)
        if args.map_from:
            remarks.append(f"clusters are named by the mapping of {args.map_from}")
    out = make_evaluation_folder(args.output_dir)
    metrics = {"checkpoint": source, "predictions": args.predictions, "data": title, "split": split,
               "num_images": len(labels if dataset is None else dataset), "num_clusters": num_clusters}
    metrics |= made_by

    # ---------------------------------------------------------------- network, shared by the processes
    if dataset is not None:
        to_device(network, device)
        if args.bn_images:       # by each process for itself: in a group, NBS would average over them
            count = estimate_batch_norms(network, train, config, device, args)
            remarks.append(f"batch-norm statistics are those of {count:,} training images")
        if world_size > 1:
            dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
        settings = device, args.batch_size, args.workers, amp_dtype
        features, probabilities = predict_part(dataset, network, config, *settings)   # [N, D], [N, K] or None
        fitted = features        # what k-means is fitted on
        if args.kmeans and part not in ("training images", "images"):
            fitted, _ = predict_part(train, network, config, *settings)
        if world_size > 1:
            dist.destroy_process_group()
    if rank > 0:                 # the first process goes on alone
        return

    # ---------------------------------------------------------------- clusters
    if dataset is not None:
        readable = (features != UNREADABLE).any(1)
        kept, features = dataset.subset(readable), features[readable].numpy()
        probabilities = None if args.kmeans else probabilities[readable].numpy()
        if not np.isfinite(features if args.kmeans else probabilities).all():
            raise UserError(f"{source}: the network's output is not finite; take an earlier one")
        if args.kmeans:
            fitted = fitted[(fitted != UNREADABLE).any(1)].numpy()
            predictions, confidences, inertia = cluster_features(
                fitted, features, args.kmeans, args.kmeans_starts, seed, device)
            metrics["kmeans"] = {"num_train": len(fitted), "starts": args.kmeans_starts, "inertia": inertia}
            source += f", k-means with K = {num_clusters}"
            remarks.append(f"k-means on the features of {len(fitted):,} {train.part}, inertia {inertia:.2f}")
        else:
            predictions, confidences = probabilities.argmax(1), probabilities.max(1)
        labels = None if kept.labels is None else kept.labels.numpy()
        metrics |= {"amp": args.amp, "num_images": len(kept), "num_broken": len(dataset) - len(kept)}
        if metrics["num_broken"]:
            remarks.append(f"{metrics['num_broken']} broken pictures left out")
        if args.silhouette:
            metrics["silhouette"] = silhouette(features, predictions)
            remarks.append("no silhouette: there are not two clusters" if metrics["silhouette"] is None else
                           f"silhouette {metrics['silhouette']:.4f} (cosine distance of backbone features)")
        if labels is None:       # nothing is measured against invented labels
            remarks.append("no labels: ACC, NMI, AMI, ARI, FMI, purity and the confusion matrix are left out")
        else:
            scored["network"] = evaluate(labels, predictions, probabilities, mapping)
            if args.pixel_kmeans:
                ids = cluster_pixels(kept.images, num_clusters, seed)
                scored["k-means on pixels"] = evaluate(labels, ids)

    # ---------------------------------------------------------------- report
    metrics |= scored.get("network", scored.get("predictions", {}))
    mapping = metrics.get("mapping", mapping)
    clusters = describe_clusters(predictions, labels, mapping, class_names)
    named = [row | {"cluster": cluster_names[row["cluster"]]} for row in clusters]         # ids of the file
    to_stdout(f"{title}: {len(predictions):,} {part}, {len(clusters)} of {num_clusters} clusters in use")
    print_report(scored, remarks, named)

    # ---------------------------------------------------------------- save
    for old in ("metrics.json", "assignments.csv", "contact_sheet*.png", "confusion_matrix.png", "top3.png"):
        for path in out.glob(old):               # of an earlier evaluation, which may have written more
            path.unlink()
    images, headline = None, f"{title}, {part}; {source}"
    if dataset is None:
        headline, confidences = title, None
    else:
        images = CentreCrops(kept, 112) if kept.images is None else kept.images
        write_assignments(out / "assignments.csv", predictions, confidences, labels, mapping, class_names,
                          kept.paths, "similarity" if args.kmeans else "probability")
    headline += f": ACC {metrics['acc']:.3f}" if "acc" in metrics else ""
    draw_clusters(out, headline, clusters, predictions, confidences, labels, mapping, class_names, images,
                  probabilities, args.images_per_cluster, args.contact_sheets, seed)
    metrics |= {"class_names": class_names, "clusters": named,
                "pixel_kmeans": scored.get("k-means on pixels")}
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    to_stdout(f"written: {out}")


if __name__ == "__main__":
    launch(main, get_parser())
