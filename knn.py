"""k-NN classification on frozen features: how many test images have neighbours of their own class?

Features are the backbone's, in evaluation mode; the k nearest training images (cosine similarity) vote with
weight exp(similarity / T). Nothing is trained, so it is a quick look at a representation.

    python knn.py --checkpoint weights/fashion-mnist.pth
    python knn.py --checkpoint runs/pretrain/checkpoint.pth --k 20 --temperature 0.1 --device cuda

One process, on the CPU or one GPU; without --data the checkpoint's own. The similarity matrix is never whole
in memory.
"""

import argparse
import json

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import UserError, load_pretrained, make_evaluation_folder, run, write_atomically
from data import build_dataset, eval_batches
from model import ARCHS


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint of a run; with --arch any project's backbone")
    add("--data", help="data set (fashion-mnist, fake, cifar10, cifar100, stl10), folder or list of pictures")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--output-dir", default="runs/knn", help="folder for all that is written")
    add("--arch", choices=ARCHS, help="backbone")
    add("--small-images", action="store_true", help="3×3 stem without stride and max-pool, for 32 pixels")
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours that vote")
    add("--temperature", type=float, default=0.07, help="T of the votes exp(similarity / T)")
    add("--batch-size", type=int, default=512, help="images in the GLOBAL batch")
    add("--workers", type=int, default=-1, help="processes that read ahead; -1: one a core for files, else 0")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    return parser


@torch.inference_mode()
def extract_features(backbone, batches):
    """Features [N, feature_dim], float32 on the CPU, of inputs in batches (data.eval_batches).

    In evaluation mode; the backbone is left in the mode it was found in.
    """
    was_training = backbone.training
    backbone.eval()
    features = [backbone(x).float().cpu() for x in batches]
    backbone.train(was_training)
    return torch.cat(features)


def nearest_neighbours(train_features, features, k, chunk=1024, train_chunk=32768):
    """Cosine similarities [N, k] and indices [N, k] of the k nearest training images, nearest first.

    train_features: [M, D], features: [N, D]; computed where `features` are. Of the similarities
    only [chunk, train_chunk] are in memory at a time: 128 MiB, where 50,000 x 1.2 million take 240 GB.
    Raises ValueError for k outside of 1..M and for features that are not finite.
    """
    M, N = len(train_features), len(features)
    if not 1 <= k <= M:
        raise ValueError(f"k: {k} neighbours asked for, there are {M} training images")
    features = F.normalize(features.float(), dim=1)
    similarity = features.new_full((N, k), -torch.inf)
    index = torch.zeros(N, k, dtype=torch.long, device=features.device)
    for start in range(0, M, train_chunk):                # each part of the training set comes by once
        part = F.normalize(train_features[start:start + train_chunk].to(features), dim=1)
        for i in range(0, N, chunk):
            best, place = (features[i:i + chunk] @ part.T).topk(min(k, len(part)))
            both = torch.cat([similarity[i:i + chunk], best], 1)     # the best so far and those of this part
            similarity[i:i + chunk], choice = both.topk(k)
            index[i:i + chunk] = torch.cat([index[i:i + chunk], start + place], 1).gather(1, choice)
    if similarity.isnan().any():                            # topk takes NaN for the greatest number
        raise ValueError("features: contain NaN or infinity")
    return similarity, index


def vote(similarity, neighbour_labels, temperature, num_classes):
    """Scores [N, num_classes]: for each class the sum of exp(similarity / temperature) over its neighbours.

    similarity, neighbour_labels: [N, k]. In float64, because exp(1 / T) leaves float32 at T = 0.011.
    """
    if not temperature >= 0.002:
        raise ValueError(f"temperature: expected at least 0.002, got {temperature}")
    weights = torch.exp(similarity.cpu().double() / temperature)
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, neighbour_labels.cpu(), weights)


def knn_predict(train_features, train_labels, features, k, temperature, num_classes):
    """Scores [N, num_classes] of k-NN classification with weighted vote (Wu et al. 2018, sec. 3.4; DINO).

    train_features: [M, D], train_labels: [M] in 0..num_classes - 1, features: [N, D], all L2-normalised here.
    Computed on the device of `features`; the scores are on the CPU. Raises ValueError naming the argument.
    """
    if len(train_labels) != len(train_features):
        raise ValueError(f"train_labels: {len(train_labels)} for {len(train_features)} train_features")
    if train_labels.min() < 0 or train_labels.max() >= num_classes:
        raise ValueError(f"train_labels: expected 0 to {num_classes - 1}")
    similarity, index = nearest_neighbours(train_features, features, k)
    return vote(similarity, train_labels[index.to(train_labels.device)], temperature, num_classes)


def main(args):
    # ------------------------------------------------------------------ model
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    if device.type not in (best, "cpu"):
        raise UserError(f"--device {device}: there is none here; --device auto would take {best}")
    backbone, config = load_pretrained(args.checkpoint, args.arch, args.small_images)
    name, seed = args.data or config["data"], config["seed"]
    if name is None:
        raise UserError(f"--data: {args.checkpoint} does not say which; name a data set, folder or list")
    backbone.to(device)

    # ------------------------------------------------------------------ data
    train, test = (build_dataset(name, split, seed, args.data_dir) for split in ("train", "test"))
    if train.labels is None or test.labels is None:
        raise UserError(f"--data {name}: has no labels, which k-NN classification needs")
    if train.images is None and np.array_equal(train.paths, test.paths):
        raise UserError(f"--data {name}: has no train and val parts; each picture would find itself")
    if not 1 <= min(args.k) <= max(args.k) <= len(train):
        raise UserError(f"--k {' '.join(map(str, args.k))}: must be 1 to {len(train)}, the training images")
    if not args.temperature >= 0.002:
        raise UserError(f"--temperature {args.temperature}: must be at least 0.002")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    out = make_evaluation_folder(args.output_dir)

    # ------------------------------------------------------------------ eval
    train_features, features = (extract_features(backbone, eval_batches(
        part, config, device, args.batch_size, args.workers)) for part in (train, test))
    num_broken = len(train) + len(test)
    train, test = train.readable(), test.readable()
    num_broken -= len(train) + len(test)
    if max(args.k) > len(train):
        raise UserError(f"--k {max(args.k)}: only {len(train)} training images can be read")
    try:
        similarity, index = nearest_neighbours(train_features, features.to(device), max(args.k))
    except ValueError as error:
        raise UserError(f"{args.checkpoint}: {error}; use an earlier checkpoint") from None
    neighbour_labels = train.labels[index.cpu()]                                          # [N, max k]
    num_classes = len(train.class_names)
    print(f"{name}: {len(test):,} test images against {len(train):,} training images, T = {args.temperature}"
          + (f"; {num_broken} broken pictures left out" if num_broken else ""))
    metrics = {"checkpoint": args.checkpoint, "data": name, "temperature": args.temperature,
               "num_train": len(train), "num_test": len(test), "num_broken": num_broken,
               "top1": {}, "top5": {}}
    for k in args.k:
        scores, classes = vote(similarity[:, :k], neighbour_labels[:, :k], args.temperature,
                               num_classes).topk(min(5, num_classes))                     # [N, 5]
        hits = (classes == test.labels[:, None]) & (scores > 0)       # 0: no neighbour is of that class
        metrics["top1"][k] = hits[:, 0].double().mean().item()
        metrics["top5"][k] = hits.any(1).double().mean().item()
        print(f"  k = {k:<5d} top-1 {metrics['top1'][k]:.4f}   top-5 {metrics['top5'][k]:.4f}")

    # ------------------------------------------------------------------ save
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    print(f"written: {out / 'metrics.json'}")


if __name__ == "__main__":
    run(main, get_parser())
