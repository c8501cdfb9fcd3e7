"""Features of images by any backbone, in one file, and two pictures of them: a map and nearest neighbours.

    python embed.py --checkpoint weights/fashion-mnist.pth               on the GPU if there is one, else CPU
    python embed.py --checkpoint runs/pretrain/checkpoint.pth --data my/pictures --format csv
    python embed.py --checkpoint resnet50.pth --arch resnet50 --data IMAGENET     weights of another project
    torchrun --nproc-per-node 8 embed.py --checkpoint FILE                        they share the features

features.npz has arrays: features [N, D], files or index, labels and class_names if they are known, clusters
and probabilities if the network has classes. features.csv has a row for each image. map.png shows the first
two principal components of the L2-normalised features. neighbours.png shows images drawn at random and,
beside each, the others that are nearest to it by cosine similarity.
The first command takes about 20 seconds of one CPU core.
"""

import argparse
import csv
import datetime
import io
import json
import os

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from checkpoint import UserError, to_stdout, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from data import CentreCrops, build_dataset, folder_flags, folder_options
from knn import nearest_neighbours
from pictures import draw_embedding
from predictions import UNREADABLE, name_classes, predict_part
from pretrained import choose_input, load_network, load_twist, network_flags, to_device
from run import make_evaluation_folder


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    network_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data", help="a data set, a folder, list or shards of pictures; without it the checkpoint's own")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--split", default="test", choices=("train", "test"), help="part to embed; of a folder, test is val")
    add("--class-names", metavar="FILE", help="names of the classes, one a line, by class number; imagenet: "
        "those of its 1,000 classes")
    folder_flags(parser)
    add = parser.add_argument_group("files and pictures").add_argument
    add("--format", default="npz", choices=("npz", "csv"), help="of the file of features")
    add("--queries", type=at_least(1), default=8, help="images whose neighbours are shown")
    add("--neighbours", type=at_least(1), default=7, help="how many are shown of each")
    add("--output-dir", default="runs/embed", help="folder for everything written")
    add = parser.add_argument_group("run").add_argument
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to compute")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision of the backbone; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--batch-size", type=at_least(1), default=512, help="images per forward pass of a process")
    add("--workers", type=at_least(-1), default=-1, help="to read files; -1: one per core")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


def load(args):
    """(network, configuration): a Twist if the file holds one, else a backbone, see pretrained.py."""
    if args.arch:
        return load_network(args)
    try:
        network, config = load_twist(args.checkpoint, args.key)
    except UserError:                        # no classes in it; what else is wrong is found again
        return load_network(args)
    return network, choose_input(config, args)


def principal_components(features, count=2):
    """(projections [N, count], shares of the variance [count]) on the first principal components, float64.

    features: [N, D]. The greatest entry of a component is positive, so that no map is mirrored by chance.
    """
    x = features.double() - features.double().mean(0)
    variances, vectors = torch.linalg.eigh(x.T @ x)                               # ascending
    vectors = vectors.flip(1)[:, :count]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return x @ vectors, variances.flip(0)[:count] / variances.sum().clamp_min(1e-300)


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

    # ---------------------------------------------------------------- network and data
    network, config = load(args)
    to_device(network, device)
    name, seed = args.data or config["data"], config["seed"]
    dataset = build_dataset(name, args.split, seed, args.data_dir, **folder_options(args, config))
    if args.class_names and dataset.labels is None:
        raise UserError(f"--class-names: {name} has no labels; leave the flag out")
    class_names = name_classes(args.class_names, dataset.class_names)
    out = make_evaluation_folder(args.output_dir)

    # ---------------------------------------------------------------- features, shared by the processes
    if world_size > 1:
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
    features, probabilities = predict_part(                                       # [N, D], [N, K] or None
        dataset, network, config, device, args.batch_size, args.workers, amp_dtype)
    if world_size > 1:
        dist.destroy_process_group()
    if rank > 0:                                 # the first process goes on alone
        return
    readable = (features != UNREADABLE).any(1)
    features, kept = features[readable].numpy(), dataset.subset(readable)
    if not np.isfinite(features).all():
        raise UserError(f"{args.checkpoint}: the features are not finite; take an earlier checkpoint")
    columns = {"index": np.arange(len(kept))}
    if kept.paths is not None:
        columns = {"files": np.array([os.fsdecode(path) for path in kept.paths])}
    if kept.labels is not None:
        columns |= {"labels": kept.labels.numpy(), "class_names": np.array(class_names)}
    if probabilities is not None:
        probabilities = probabilities[readable].numpy()
        columns |= {"clusters": probabilities.argmax(1), "probabilities": probabilities}

    # ---------------------------------------------------------------- map and neighbours
    unit = F.normalize(torch.from_numpy(features), dim=1)
    points, shares = principal_components(unit)
    queries = np.random.default_rng([seed, 11]).permutation(len(kept))[:args.queries]
    k = min(args.neighbours + 1, len(kept))
    similarity, nearest = nearest_neighbours(unit, unit[queries], k)
    groups, names = None, None
    if kept.labels is not None:
        groups, names = columns["labels"], class_names
    elif probabilities is not None:
        groups, names = columns["clusters"], [f"cluster {c}" for c in range(probabilities.shape[1])]

    # ---------------------------------------------------------------- save
    for old in ("metrics.json", "features.npz", "features.csv", "map.png", "neighbours.png"):
        (out / old).unlink(missing_ok=True)      # of an earlier run, which may have written another format
    path = out / f"features.{args.format}"
    write_atomically(path, to_csv(features, columns) if args.format == "csv" else to_npz(features, columns))
    images = CentreCrops(kept, 112) if kept.images is None else kept.images
    draw_embedding(out, f"{name}, {dataset.part}; {args.checkpoint}", images, points.numpy(), shares.tolist(),
                   queries, nearest.numpy(), similarity.numpy(), groups, names)
    metrics = {"checkpoint": args.checkpoint, "data": name, "split": args.split, "amp": args.amp,
               "num_images": len(kept), "num_broken": len(dataset) - len(kept),
               "feature_dim": features.shape[1], "variance_of_map": shares.tolist()}
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    broken = f"; {metrics['num_broken']} broken pictures left out" if metrics["num_broken"] else ""
    to_stdout(f"{name}: {len(kept):,} {dataset.part}, {features.shape[1]} features of each{broken}")
    to_stdout(f"written: {path}")


def to_npz(features, columns):
    """Bytes of an .npz file."""
    file = io.BytesIO()
    np.savez(file, features=features, **columns)
    return file.getvalue()


def to_csv(features, columns):
    """Bytes of a .csv file, a row for each image: file or index, label, cluster, features f0, f1, ..."""
    head = {"file" if "files" in columns else "index": columns.get("files", columns.get("index"))}
    if "labels" in columns:
        head |= {"label": columns["labels"], "label_name": columns["class_names"][columns["labels"]]}
    if "clusters" in columns:
        head |= {"cluster": columns["clusters"], "probability": columns["probabilities"].max(1)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, *(f"f{d}" for d in range(features.shape[1]))])
    for row, x in zip(zip(*head.values(), strict=True), features.tolist(), strict=True):
        writer.writerow([*row, *(f"{value:.6g}" for value in x)])
    return text.getvalue().encode(errors="surrogateescape")


if __name__ == "__main__":
    launch(main, get_parser())
