"""Transfer of a frozen backbone to the eleven data sets of TWIST's Table 4, by logistic regression.

    python transfer.py --checkpoint weights/fashion-mnist.pth                     MNIST, which is embedded
    python transfer.py --checkpoint resnet50.pth --arch resnet50 --datasets all --data-dir DATA --device cuda
    torchrun --nproc-per-node 8 transfer.py --checkpoint runs/pretrain/checkpoint.pth --datasets pets dtd

Features are of whole pictures: the shorter side has the size of the network's input, and the middle is taken.
Of 45 strengths of L2 regularisation, the one that does best on validation images is fitted anew on training
and validation images together, and tested once. The table of the sets is in transfer_sets.py.
The first command takes about 15 seconds of one CPU core; its top-1 accuracy is 0.897.
"""

import argparse
import datetime
import hashlib
import json
import os

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import UserError, read_file, say_once, to_stdout, write_atomically
from cli import DEVICES, HelpFormatter, at_least, launch
from logistic import fit_logistic
from predictions import UNREADABLE, predict_part
from pretrained import fingerprint, load_network, network_flags, to_device
from run import make_evaluation_folder, refuse_difference
from transfer_sets import METRICS, SETS, TABLE_4, checksum, read_set

WEAKEST, STRONGEST = -6, 5       # powers of ten: the published range of strengths
# Linear rows of the paper's Table 4, ResNet-50, in per cent, in the order of TABLE_4
PUBLISHED = {
    "SimCLR": (68.4, 90.6, 71.6, 58.8, 50.3, 50.3, 80.5, 74.5, 83.6, 90.3, 91.2),
    "BYOL": (75.3, 91.3, 78.4, 62.2, 67.8, 60.6, 82.5, 75.5, 90.4, 94.2, 96.1),
    "supervised": (72.3, 93.6, 78.3, 61.9, 66.7, 61.0, 82.8, 74.9, 91.5, 94.5, 94.7),
    "TWIST": (78.0, 91.2, 74.4, 66.8, 55.2, 53.6, 85.7, 76.6, 91.6, 91.1, 93.4),
}


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    network_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add("--datasets", nargs="+", default=["mnist"], choices=[*SETS, "all"], metavar="NAME",
        help=f"{', '.join(SETS)}; all: the eleven without mnist")
    add("--data-dir", default="datasets", help="folder of torchvision's data sets")
    add("--interpolation", default="bicubic", choices=("bicubic", "bilinear"), help="of every resizing")
    add = parser.add_argument_group("classifier").add_argument
    add("--strengths", type=at_least(1), default=45,
        help="numbers of regularisation to try, evenly spaced in the logarithm from 1e-6 to 1e5")
    add("--max-iter", type=at_least(1), default=300, help="evaluations of the loss in a fit")
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/transfer", help="folder for everything written")
    add("--overwrite", action="store_true", help="start anew in a used --output-dir")
    add("--seed", type=at_least(0), default=0,
        help="of the validation images where a set has none, and of Caltech-101's training images")
    add("--device", default=DEVICES[0], choices=DEVICES, help="where to compute")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="mixed precision of the backbone; auto: on CUDA bf16, or fp16 on an older GPU, else off")
    add("--batch-size", type=at_least(1), default=512, help="images per forward pass of a process")
    add("--workers", type=at_least(-1), default=-1, help="to read files; -1: one per core")
    add("--timeout", type=at_least(1, float), default=600, help="seconds to wait for the other processes")
    return parser


# ---------------------------------------------------------------- features
def read_features(file):
    """{part: features [N, D]} that main has written. Raises UserError for a damaged file."""
    try:
        return read_file(file)[0]
    except UserError:
        raise UserError(f"{file}: damaged; remove it, and its features are computed again") from None


# ---------------------------------------------------------------- one set
def evaluate(features, labels, metric, strengths, max_iter):
    """Chooses a strength on validation images, fits on them and the training images, and tests once.

    features, labels: {train, val, test: [N, D], [N] or [N, C]}; metric: of METRICS. Of strengths that do
    equally well, the strongest is chosen. Returns a dict with validation and test as 0 to 1, lambda, and how
    many of the fits converged. Raises ValueError for features that are not finite.
    """
    def fit(x, y, strengths):
        # where only difficult objects of a class are in a picture (0), it counts as one without
        found = fit_logistic(x, (y == 1).to(x) if y.dim() == 2 else y, strengths, max_iter)
        return found, list(zip(found.weights, found.biases, strict=True))

    def score(classifier, part):
        weights, biases = classifier
        return float(metric((features[part] @ weights.T + biases).cpu().numpy(), labels[part].cpu().numpy()))

    found, classifiers = fit(features["train"], labels["train"], strengths)
    scores = np.array([score(classifier, "val") for classifier in classifiers])
    best = np.flatnonzero(scores == scores.max())[-1]
    x, y = (torch.cat([values["train"], values["val"]]) for values in (features, labels))
    last, classifiers = fit(x, y, strengths[best:best + 1])
    return {"test": score(classifiers[0], "test"), "validation": scores[best],
            "lambda": float(strengths[best]), "scores": scores.tolist(), "fits": len(scores) + 1,
            "converged": int(found.converged.sum() + last.converged.sum())}


def line_of(name, result):
    """A result in one line."""
    return (f"  {name:<11s}{SETS[name].metric} {result['test']:.4f}   lambda {result['lambda']:.3g} "
            f"(validation {result['validation']:.4f}); {result['num_train']:,} images to fit, "
            f"{result['num_test']:,} to test; {result['converged']} of {result['fits']} fits converged")


def table(results):
    """Lines of the results on sets of Table 4 beside the published ones, in per cent; [] without any."""
    names = [name for name in TABLE_4 if name in results]
    if not names:
        return []
    rows = {title: dict(zip(TABLE_4, values, strict=True)) for title, values in PUBLISHED.items()}
    rows["this network"] = {name: 100 * results[name]["test"] for name in names}
    lines = [" " * 13 + "".join(f"{name:>{len(name) + 2}s}" for name in names) + "  average"]
    for title, row in rows.items():
        cells = "".join(f"{row[name]:>{len(name) + 2}.1f}" for name in names)
        lines.append(f"{title:<13s}{cells}{np.mean([row[name] for name in names]):>9.1f}")
    return lines


# ---------------------------------------------------------------- what was done before
def read_results(out, settings, overwrite):
    """{name: result} that was written into a folder with the same settings; raises UserError for others."""
    path = out / "metrics.json"
    if overwrite or not path.exists():
        return {}
    try:
        written = json.loads(path.read_bytes())
        before = {"precision": "off"} | written["settings"]        # older files do not name it
        if before.keys() != settings.keys():
            raise ValueError
        refuse_difference({"config": before}, settings, path)
        return {name: written["sets"][name] for name in SETS if name in written["sets"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not of transfer.py, or damaged; choose another --output-dir, or --overwrite"
                        ) from None


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
    backbone, config = load_network(args)
    to_device(backbone, device)
    config |= {"interpolation": args.interpolation, "resize_side": config["image_size"]}     # of eval_batches
    names = list(dict.fromkeys(TABLE_4 if "all" in args.datasets else args.datasets))
    sets = {name: read_set(name, args.data_dir, args.seed) for name in names}   # all, before hours of work
    inputs = {name: config[name] for name in ("image_size", "mean", "std", "interpolation")}
    inputs |= {"backbone_sha256": fingerprint(backbone)}
    if args.amp != "off":
        inputs["precision"] = args.amp           # else files of older versions would have other names
    settings = {"precision": "off"} | inputs
    settings |= {name: getattr(args, name) for name in ("seed", "strengths", "max_iter")}
    out = make_evaluation_folder(args.output_dir)
    results, files = read_results(out, settings, args.overwrite), {}
    for name, parts in sets.items():             # another network, input or image has another file
        key = json.dumps([inputs, *map(checksum, parts.values())]).encode()
        files[name] = out / f"features/{name}-{hashlib.sha256(key).hexdigest()[:16]}.pt"
    todo = [name for name in names if results.get(name, {}).get("features") != files[name].name]

    # ---------------------------------------------------------------- features, shared by the processes
    missing = [[name for name in todo if not files[name].exists()]]
    if world_size > 1:
        dist.init_process_group(**backend, timeout=datetime.timedelta(seconds=args.timeout))
        dist.broadcast_object_list(missing)      # the folder may be on the first machine only
    for name in missing[0]:
        say_once(f"{name}: features of {sum(map(len, sets[name].values())):,} images")
        features = {}
        for part, images in sets[name].items():
            features[part], _ = predict_part(images, backbone, config, device, args.batch_size, args.workers,
                                             amp_dtype)
        if rank == 0:
            files[name].parent.mkdir(exist_ok=True)
            for old in files[name].parent.glob(f"{name}-*.pt"):
                old.unlink()
            write_atomically(files[name], features)
    if world_size > 1:
        dist.destroy_process_group()
    if rank > 0:                                 # the first process fits alone
        return

    # ---------------------------------------------------------------- fit, choose, test
    strengths = torch.logspace(WEAKEST, STRONGEST, args.strengths, dtype=torch.float64)
    where = "cpu" if device.type == "mps" else device                # which has no float64
    for name in names:
        if name in todo:
            features, labels = read_features(files[name]), {}
            for part, x in features.items():
                readable = (x != UNREADABLE).any(1)
                features[part] = x[readable].to(where)
                labels[part] = sets[name][part].labels[readable].to(where)
            sizes = {part: len(x) for part, x in features.items()}
            try:
                found = evaluate(features, labels, METRICS[SETS[name].metric], strengths, args.max_iter)
            except ValueError as error:
                raise UserError(f"{args.checkpoint}: {error}; use an earlier checkpoint") from None
            results[name] = {"features": files[name].name, "metric": SETS[name].metric, **found,
                             "num_train": sizes["train"] + sizes["val"], "num_test": sizes["test"],
                             "num_broken": sum(map(len, sets[name].values())) - sum(sizes.values())}
            metrics = {"checkpoint": args.checkpoint, "settings": settings, "sets": results}
            write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())
        to_stdout(line_of(name, results[name]) + "; done before" * (name not in todo))
    lines = table(results)
    if lines:
        to_stdout("\n".join(lines))
    to_stdout(f"written: {out / 'metrics.json'}")


if __name__ == "__main__":
    launch(main, get_parser())
