"""k-NN classification on frozen features: how many test images have neighbours of their own class?

    python knn.py --checkpoint weights/fashion-mnist.pth                 on the GPU if there is one, else CPU
    python knn.py --checkpoint runs/pretrain/checkpoint.pth --k 20 --temperature 0.1 --device cpu --whiten
    python knn.py --checkpoint resnet50.pth --arch resnet50 --data IMAGENET       weights of another project
    torchrun --nproc-per-node 8 knn.py --checkpoint runs/pretrain/checkpoint.pth  they share the features

Features are the backbone's, in evaluation mode. The k nearest training images (cosine similarity) vote with
weight exp(similarity / T). No training, so it is a quick check.
The first command takes less than 2 minutes of one CPU core; its top-1 accuracy is 0.849 for k = 20, and 0.883
with --whiten.
"""

import argparse
import datetime
import json
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from checkpoint import UserError, to_stderr, to_stdout, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from cluster_eval import evaluate
from data import build_dataset, count_overlap, eval_batches, folder_flags, folder_options, labelled
from predictions import UNREADABLE, predict, predict_part
from pretrained import load_network, network_flags, to_device
from run import make_evaluation_folder


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    network_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data", help="a data set, a folder, list or shards of pictures; without it the checkpoint's own")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--interpolation", default="bicubic", choices=("bicubic", "bilinear"), help="of every resizing")
    folder_flags(parser)
    add = parser.add_argument_group("vote").add_argument
    add("--k", type=at_least(1), nargs="+",
        help="numbers of neighbours that vote; without it those of 10, 20, 100 and 200 that there are")
    add("--temperature", type=at_least(0.002, float), default=0.07,
        help="T of the weights exp(similarity / T)")
    add("--whiten", action="store_true",
        help="compare features of equal variance in all directions, not published, often better")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/knn", help="folder for everything written")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to compute")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision of the backbone; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--batch-size", type=at_least(1), default=512, help="images per forward pass of a process")
    add("--workers", type=at_least(-1), default=-1, help="to read files; -1: one per core")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


def extract_features(backbone, batches, amp_dtype=torch.float32):
    """Features [N, feature_dim], float32 on the CPU, of inputs in batches (data.eval_batches).

    Computed in evaluation mode; the backbone, or any other module, returns to the mode that it was in.
    """
    was_training = backbone.training
    features, _ = predict(backbone, batches, amp_dtype)
    backbone.train(was_training)
    return torch.from_numpy(features)


def whiten(train_features, features, shrinkage=0.001):
    """Features [M, D] and [N, D] in coordinates of equal variance, uncorrelated; float32, new tensors.

    The few directions in which TWIST's classes differ have most of the variance, and decide the similarity.
    PCA whitening makes all count alike: with the eigenvalues λ and eigenvectors U of the training features'
    covariance, x becomes Uᵀ(x - mean) / sqrt(λ + shrinkage · mean λ). Directions of almost no variance are
    noise; the shrinkage bounds how much they grow. Raises ValueError for features that are not finite.
    """
    mean = train_features.mean(0, dtype=torch.float64)
    covariance = 0
    for part in train_features.split(32768):
        covariance += (part - mean).T @ (part - mean) / len(train_features)
    if not covariance.isfinite().all():
        raise ValueError("features: contain NaN or infinity")
    variances, directions = torch.linalg.eigh(covariance)
    variances += shrinkage * variances.mean()
    smallest = 1e-12 * variances.max() + 1e-300           # rounding leaves less; of equal features all is 0
    matrix = directions / variances.clamp(min=smallest).sqrt()

    def whitened(x):                                      # in parts, as float64 takes twice the memory
        return torch.cat([((part - mean) @ matrix).float() for part in x.split(32768)])
    return whitened(train_features), whitened(features)


def nearest_neighbours(train_features, features, k, chunk=1024, train_chunk=32768):
    """Cosine similarities [N, k] and indices [N, k] of the k nearest training images, nearest first.

    train_features: [M, D], features: [N, D]; computed on the device of `features`. In memory are at most
    chunk × train_chunk similarities, 128 MiB; all 50,000 × 1.2 million would take 240 GB. Raises ValueError
    for k outside 1..M and for features that are not finite.
    """
    M, N = len(train_features), len(features)
    if not 1 <= k <= M:
        raise ValueError(f"k: {k} neighbours asked for, there are {M} training images")
    features = F.normalize(features.float(), dim=1)
    similarity = features.new_full((N, k), -torch.inf)
    index = torch.zeros(N, k, dtype=torch.long, device=features.device)
    for start in range(0, M, train_chunk):
        part = F.normalize(train_features[start:start + train_chunk].to(features), dim=1)
        for i in range(0, N, chunk):
            best, place = (features[i:i + chunk] @ part.T).topk(min(k, len(part)))
            both = torch.cat([similarity[i:i + chunk], best], 1)          # the best so far and of this part
            similarity[i:i + chunk], choice = both.topk(k)
            index[i:i + chunk] = torch.cat([index[i:i + chunk], start + place], 1).gather(1, choice)
    if similarity.isnan().any():                          # one NaN is enough: topk ranks it first
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

    train_features: [M, D], train_labels: [M] in 0..num_classes - 1, features: [N, D]; L2-normalised here.
    Computed on the device of `features`; the scores are on the CPU. A ValueError names the argument.
    """
    if len(train_labels) != len(train_features):
        raise ValueError(f"train_labels: {len(train_labels)} for {len(train_features)} train_features")
    if train_labels.min() < 0 or train_labels.max() >= num_classes:
        raise ValueError(f"train_labels: expected 0 to {num_classes - 1}")
    similarity, index = nearest_neighbours(train_features, features, k)
    return vote(similarity, train_labels[index.to(train_labels.device)], temperature, num_classes)


# ---------------------------------------------------------------- to watch a training run
def knn_images(args, dataset):
    """[train, test]: at most 10,000 evenly spaced labelled images of each; None if --data has no such parts.

    None, too, if they share images, of which it warns. dataset: the run's own. Its mask of broken files is
    shared, so that each file is named once.
    """
    try:
        options = folder_options(args)
        train = build_dataset(args.data, "train", args.seed, args.data_dir, **options)
        test = build_dataset(args.data, "test", args.seed, args.data_dir, **options)
    except UserError:                                     # no labelled parts; this is only for watching
        return None
    if train.labels is None or test.labels is None or train.part == "images":
        return None
    if dataset.images is None:
        train.broken = dataset.broken
    train, test = (part.subset(torch.linspace(0, len(part) - 1, min(len(part), 10_000)).long())
                   for part in (train, test))
    overlap = count_overlap(train, test)
    if overlap:
        to_stderr(f"warning: no k-NN accuracy is watched, as {overlap:,} {test.part} are training images, "
                  "too")
        return None
    return [train, test]


def scores_to_watch(network, train, test, config, device, amp_dtype=torch.float32, k=20):
    """{knn_monitor: 0 to 1}, the k-NN accuracy on the images of knn_images, T = 0.07.

    If the network has classes (projection_heads), also acc_monitor and nmi_monitor of the test images, see
    cluster_eval.evaluate. To watch a run, not to report. The network does not change.
    """
    features = []
    for part in (train, test):
        batches = eval_batches(part, config, device, workers=config["workers"])
        features.append(extract_features(network.backbone, batches, amp_dtype))
    train, test = train.readable(), test.readable()
    scores = knn_predict(features[0], train.labels, features[1], min(k, len(train)), temperature=0.07,
                         num_classes=len(train.class_names))
    found = {"knn_monitor": (scores.argmax(1).cpu() == test.labels).float().mean().item()}
    if hasattr(network, "projection_heads"):
        logits = extract_features(network.projection_heads, features[1].to(device).split(512))
        clusters = evaluate(test.labels.numpy(), logits.argmax(1).numpy())
        found |= {"acc_monitor": clusters["acc"], "nmi_monitor": clusters["nmi"]}
    return found


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

    # ---------------------------------------------------------------- model
    backbone, config = load_network(args)
    config["interpolation"] = args.interpolation         # of eval_batches
    to_device(backbone, device)

    # ---------------------------------------------------------------- data
    train, test = labelled(args, config)
    if args.k and max(args.k) > len(train):
        raise UserError(f"--k {max(args.k)}: there are only {len(train)} training images; choose at most "
                        "that many")
    out = make_evaluation_folder(args.output_dir)

    # ---------------------------------------------------------------- features, shared by the processes
    if world_size > 1:
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
    train_features, features = (
        predict_part(part, backbone, config, device, args.batch_size, args.workers, amp_dtype)[0]
        for part in (train, test))
    if world_size > 1:
        dist.destroy_process_group()
    if rank > 0:                                         # the first process finds the neighbours alone
        return
    num_images = len(train) + len(test)
    readable, test_readable = ((x != UNREADABLE).any(1) for x in (train_features, features))
    train_features, features = train_features[readable], features[test_readable]
    train, test = train.subset(readable), test.subset(test_readable)
    num_broken = num_images - len(train) - len(test)

    # ---------------------------------------------------------------- eval
    ks = args.k or [k for k in (10, 20, 100, 200) if k <= len(train)] or [len(train)]
    if max(ks) > len(train):
        raise UserError(f"--k {max(ks)}: only {len(train)} training images can be read; choose at most "
                        "that many")
    try:
        if args.whiten:
            train_features, features = whiten(train_features, features)
        similarity, index = nearest_neighbours(train_features, features.to(device), max(ks))
    except ValueError as error:
        raise UserError(f"{args.checkpoint}: {error}; use an earlier checkpoint") from None
    neighbour_labels = train.labels[index.cpu()]                                          # [N, max k]
    num_classes = len(train.class_names)
    broken = f"; {num_broken} broken pictures left out" if num_broken else ""
    name = args.data or config["data"]
    whitened = ", whitened features" if args.whiten else ""
    to_stdout(f"{name}: {len(test):,} {test.part} against {len(train):,} {train.part}, "
              f"T = {args.temperature}{whitened}{broken}")
    metrics = {"checkpoint": args.checkpoint, "data": name, "amp": args.amp, "temperature": args.temperature,
               "whiten": args.whiten, "num_train": len(train), "num_test": len(test),
               "num_broken": num_broken, "top1": {}, "top5": {}}
    for k in ks:
        scores = vote(similarity[:, :k], neighbour_labels[:, :k], args.temperature, num_classes)
        scores, classes = scores.topk(min(5, num_classes))                                # [N, 5]
        hits = (classes == test.labels[:, None]) & (scores > 0)       # 0: no neighbour is of that class
        metrics["top1"][k] = hits[:, 0].double().mean().item()
        metrics["top5"][k] = hits.any(1).double().mean().item()
        to_stdout(f"  k = {k:<5d} top-1 {metrics['top1'][k]:.4f}   top-5 {metrics['top5'][k]:.4f}")

    # ---------------------------------------------------------------- save
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    to_stdout(f"written: {out / 'metrics.json'}")


if __name__ == "__main__":
    launch(main, get_parser())
