"""What a run and its evaluations wrote, read back: files, scores, commands, and pictures of their images."""

import argparse
import csv
import functools
import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import UserError, load_checkpoint, printable, to_stderr
from data import CentreCrops, build_dataset, folder_options
from folders import read_picture
from page import data_uri
from run import read_log

SIDE = 64                        # pixels of a picture on the page
EVALUATIONS = {                  # script: what only its metrics.json has, the folder to suggest, its use
    "cluster_eval": ("num_clusters", "classes", "what is in each class, and scores"),
    "embed": ("variance_of_map", "features", "the map of the features, and nearest neighbours"),
    "svm": ("shots", "svm", None),                       # of VOC07 only, so it is not suggested
    "transfer": ("sets", "transfer", None),              # of other data than the run's
    "knn": ("temperature", "knn", "accuracy of nearest neighbours"),
    "lincls": ("results", "linear", "accuracy of a linear classifier"),
    "finetune": ("metric", "finetune", None),            # of other data, too
    "semisup": ("head_lr", "few", "accuracy with few labels"),
    "segment": ("miou", "segmentation", None),           # these two, too
    "detect": ("AP50", "detection", None),
}
CLUSTER_SCORES = {"acc": "ACC", "acc_majority": "ACC, many-to-one", "acc_top5": "ACC, top 5", "nmi": "NMI",
                  "ami": "AMI", "ari": "ARI", "fmi": "FMI", "silhouette": "silhouette"}


class Absent(Exception):
    """What a section lacks, and the command that makes it."""


class Evaluation(NamedTuple):
    folder: Path
    script: str                  # a key of EVALUATIONS, or "other"
    metrics: dict

    def scores(self):
        """Yields rows (name, value, number of images or None)."""
        metrics = self.metrics
        if self.script == "cluster_eval":
            of_kmeans = f"k-means, K = {metrics['num_clusters']}: " if "kmeans" in metrics else ""
            for before, found in ((of_kmeans, metrics), ("k-means on pixels: ", metrics.get("pixel_kmeans"))):
                for key, name in CLUSTER_SCORES.items():
                    if found and found.get(key) is not None:
                        yield before + name, found[key], metrics["num_images"]
        elif self.script == "knn":
            for top in (1, 5):
                for k, value in metrics[f"top{top}"].items():
                    whitened = ", whitened" if metrics.get("whiten") else ""
                    yield f"{k}-NN{whitened}, top {top}", value, metrics["num_test"]
        elif self.script == "lincls":
            for found in metrics["results"]:
                for top in (1, 5):
                    name = f"linear, {found['features']}, top {top}"
                    yield name, found[f"test_top{top}"], metrics["num_test"]
        elif self.script == "semisup":
            part = "test" if "test_top1" in metrics else "held_out"
            start = "from scratch" if metrics["random_init"] else "fine-tuned"
            name = f"{start} on {metrics['num_train']:,} labels, {part.replace('_', '-')} images"
            for top in (1, 5):
                yield f"{name}, top {top}", metrics[f"{part}_top{top}"], metrics[f"num_{part}"]
        elif self.script == "transfer":
            for name, found in metrics["sets"].items():
                yield f"transfer to {name}, {found['metric']}", found["test"], found["num_test"]
        elif self.script == "finetune":
            part = "test" if "test" in metrics else "validation"
            start = "from scratch" if metrics["random_init"] else "fine-tuned"
            yield f"{start} on {metrics['data']}, {metrics['metric']}", metrics[part], metrics[f"num_{part}"]
        elif self.script in ("segment", "detect"):
            start = "from scratch" if metrics["random_init"] else "fine-tuned"
            for key in ("miou", "miou_objects", "AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75"):
                if key in metrics:
                    yield f"{start} on {metrics['data']}, {key}", metrics[key], metrics["num_test"]
        elif self.script == "svm":
            for k, found in metrics["shots"].items():
                images = "all images" if k == "all" else f"{k} images a class"
                yield f"SVM, {images}, mAP", found["map"], None
        else:
            for name, value in metrics.items():
                if isinstance(value, float):
                    yield name, value, None

    def values(self):
        """{name: value} of the scores."""
        return {name: value for name, value, _ in self.scores()}


class Results(NamedTuple):
    """Of a run. `evaluations` are found in folders of its folder, and beside it if they name a file of it."""
    folder: Path
    config: dict
    lines: list                  # of the log
    entries: list                # its training lines, by step
    last: dict                   # the last of these, {} without a log
    evaluations: list

    def first(self, script):
        """The evaluation by a script, if there is one. Of several: of the run's own data and own classes."""
        found = [evaluation for evaluation in self.evaluations
                 if evaluation.script == script and not evaluation.metrics.get("predictions")]
        return min(found, default=None, key=lambda evaluation: (
            evaluation.metrics.get("data") != self.config.get("data"), "kmeans" in evaluation.metrics))

    def need(self, script):
        """first(script). Raises Absent if there is none."""
        evaluation = self.first(script)
        if evaluation is None:
            raise Absent(EVALUATIONS[script][2], self.command(script))
        return evaluation

    def doubts(self):
        """Yields a sentence for each evaluation that may mislead."""
        checkpoint, in_training = self.folder / "checkpoint.pth", self.last.get("classes", 0)
        for folder, _, metrics in self.evaluations:
            written = (folder / "metrics.json").stat().st_mtime
            if checkpoint.exists() and written < checkpoint.stat().st_mtime - 60:
                yield f"{folder} is older than the checkpoint: evaluate again."
            used = metrics.get("num_clusters_used", in_training)
            if used < min(in_training, metrics.get("num_images", 0)) / 2 and "kmeans" not in metrics:
                yield (f"{folder} has only {used} classes in use, where a batch of the training has "
                       f"{in_training:.2f}: after few steps the statistics of the batch norms lag behind. "
                       "Evaluate with cluster_eval.py --bn-images 1000, or train for longer.")
            if metrics.get("num_broken"):
                yield f"{folder} left out {metrics['num_broken']:,} broken pictures."

    def training_command(self):
        """The command of the run, as its log has it, else without the flags."""
        stage, folder = self.config.get("stage", "pretrain"), shlex.quote(str(self.folder))
        usual = f"python {stage}.py --output-dir {folder}"
        return next((line["command"] for line in self.lines if "command" in line), usual)

    def command(self, script, evaluation=None):
        """The command of an evaluation, with the flags that its files tell; of none, the usual one."""
        config, metrics = self.config, evaluation.metrics if evaluation else {}
        folder = evaluation.folder if evaluation else self.folder / EVALUATIONS[script][1]
        for line in [metrics, *read_lines(folder / "log.jsonl")]:        # of a grid, of stages that train
            if "command" in line:
                return line["command"]
        checkpoint = metrics.get("checkpoint") or self.folder / "checkpoint.pth"
        words = ["python", f"{script}.py", "--checkpoint", checkpoint, "--output-dir", folder]
        has_classes = config.get("loss", "twist") == "twist"
        if "kmeans" in metrics or script == "cluster_eval" and not has_classes and not evaluation:
            words += ["--kmeans", metrics.get("num_clusters", 10)]
        if script == "semisup":
            words += ["--label-fraction", 0.01]
        for name, usual in (("data", config.get("data")), ("split", "test"), ("temperature", 0.07),
                            ("bn_images", 0)):
            if metrics.get(name, usual) != usual:
                words += [f"--{name.replace('_', '-')}", metrics[name]]
        words += [flag for flag in ("--pixel-kmeans", "--whiten") if metrics.get(flag[2:].replace("-", "_"))]
        return shlex.join(map(str, words))


# ---------------------------------------------------------------- files
def read_json(path):
    """The object in a file; {}, and a warning, if it has none."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        problem = "no object in it"
    except (OSError, ValueError, RecursionError) as error:
        problem = error
    to_stderr(f"warning: {printable(str(path))} is left out ({problem})")
    return {}


def read_results(folder):
    """The Results of a run's folder. Raises UserError if it has no run."""
    out = Path(folder)
    if (out / "config.json").is_file():
        config = read_json(out / "config.json")
    elif (out / "checkpoint.pth").is_file():
        config = load_checkpoint(out / "checkpoint.pth")["config"]
    else:
        raise UserError(f"{printable(folder)}: holds no run (no config.json, no checkpoint.pth); name the "
                        "--output-dir of a training")
    lines, entries = read_lines(out / "log.jsonl"), []
    if lines:
        entries = [entry for _, entry in sorted(read_log(out / "log.jsonl").items())]
    return Results(out, config, lines, entries, entries[-1] if entries else {}, find_evaluations(out))


def read_lines(path):
    """The objects in a log; [] without a log. Lines that a crash damaged are left out."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def find_evaluations(out):
    """Evaluations of the run in a folder, see Results."""
    found, home = {}, out.resolve()
    for path in [*sorted(out.glob("*/metrics.json")), *sorted(out.parent.glob("*/metrics.json"))]:
        folder, metrics = path.parent.resolve(), read_json(path)
        of_it = home in Path(str(metrics.get("checkpoint", ""))).resolve().parents
        if metrics and folder not in found and (folder.parent == home or of_it):
            script = next((name for name, (key, *_) in EVALUATIONS.items() if key in metrics), "other")
            found[folder] = Evaluation(path.parent, script, metrics)
    return list(found.values())


@functools.cache
def read_assignments(path):
    """{column: values} of an assignments.csv."""
    with open(path, newline="", errors="surrogateescape") as file:
        heads, *rows = csv.reader(file)
    return dict(zip(heads, zip(*rows, strict=True), strict=True))


@functools.cache
def read_features(path):
    """{name: array} of a features.npz."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def read_embedding(run, data_dir):
    """(unit features [N, D], groups [N], names of the groups, Pictures) of embed.py. Raises Absent."""
    evaluation = run.need("embed")
    path = evaluation.folder / "features.npz"
    if not path.exists():                                # it has written a .csv
        raise Absent(path, run.command("embed", evaluation))
    found = read_features(path)
    unit = F.normalize(torch.from_numpy(found["features"]).float(), dim=1)
    groups, names = found.get("labels"), found.get("class_names")
    if groups is None:
        groups = found.get("clusters", np.zeros(len(unit), int))
        names = [f"cluster {k}" for k in range(groups.max() + 1)]
    return unit, groups, [*map(str, names)], Pictures(evaluation, run, found.get("files"), data_dir)


# ---------------------------------------------------------------- pictures
class Pictures:
    """Pictures of an evaluation's images, as data: URIs; `problem` says why one is missing, else None."""

    def __init__(self, evaluation, run, files, data_dir):
        """files: the images' paths, or None for a set in memory; data_dir: of torchvision's sets or None."""
        metrics, config = evaluation.metrics, run.config
        self.files, self.images, self.problem = files, None, None
        if files is not None:
            return
        try:
            options = folder_options(argparse.Namespace(data=metrics["data"]), config)
            self.images = build_dataset(metrics["data"], metrics["split"], config.get("seed", 0),
                                        data_dir or config.get("data_dir") or "datasets", **options).images
        except UserError as error:
            self.problem = f"Pictures are missing: {error}"
        if self.images is not None and len(self.images) != metrics["num_images"]:
            self.images = None
            self.problem = f"Pictures are missing: {metrics['data']} has another number of images now"

    def name(self, index):
        return f"image {index}" if self.files is None else printable(Path(self.files[index]).name)

    def uri(self, index):
        """None for an image that is not there any more."""
        if self.files is None and self.images is None:
            return None
        try:
            image = self.images[index] if self.files is None else read_picture(self.files[index])
        except UserError as error:
            self.problem = self.problem or f"Pictures are missing: {error}"
            return None
        small = self.files is None and image.shape[-1] <= SIDE
        return data_uri(image if small else CentreCrops([image], SIDE)[0])
