"""Predictions of a network or of another program: made and scored by several processes, read, written.

With several processes, each one has the images rank::world_size of a set, so that every image counts once.
"""

import csv
import io
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision

from checkpoint import UserError, printable, to_stderr, write_atomically
from data import eval_batches
from loss import all_gather

DIVERGED, UNREADABLE = -1, -2    # take the place of a predicted class


# ---------------------------------------------------------------- of a network, by several processes
@torch.inference_mode()
def predict(network, batches, amp_dtype=torch.float32):
    """Features [N, feature_dim] and probabilities softmax(logits) [N, K], float32; None of a bare backbone.

    network: a Twist or a backbone, which is put into evaluation mode; batches: of inputs [B, 3, H, W], see
    data.eval_batches. amp_dtype: of the backbone's products. The head works in float32: it costs little, and
    logits of bfloat16 would tie. Both are arrays.
    """
    network.eval()
    heads = getattr(network, "projection_heads", None)
    backbone = network if heads is None else network.backbone
    features, probabilities = [], []
    for x in batches:
        with torch.autocast(x.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
            y = backbone(x)
        y = y.float()
        features.append(y.to("cpu", non_blocking=y.is_cuda))     # into pinned memory; the device goes on
        if heads is not None:
            probabilities.append(heads(y).softmax(-1).to("cpu", non_blocking=y.is_cuda))
    if torch.cuda.is_initialized():      # the only wait for the device: here the copies have arrived
        torch.cuda.synchronize()
    return torch.cat(features).numpy(), torch.cat(probabilities).numpy() if probabilities else None


def predict_part(part, network, config, device, batch_size, workers, amp_dtype=torch.float32):
    """What `predict` makes of all images of a part, in order: two tensors on the CPU, or one and None.

    Rows of broken pictures are UNREADABLE throughout. If there are several processes, each computes those of
    its images, rank::world_size, and gets all. Raises UserError for fewer images than processes.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if len(part) < world_size:
        raise UserError(f"--data: has {len(part)} {part.part}, fewer than processes; use fewer")
    mine, found = part.subset(slice(rank, None, world_size)), []
    for rows in predict(network, eval_batches(mine, config, device, batch_size, workers), amp_dtype):
        found.append(None if rows is None else gather(torch.from_numpy(rows), part, world_size, device))
    return found


# ---------------------------------------------------------------- of a classifier, by several processes
@torch.no_grad()
def classify(model, batches):
    """The five likeliest classes [n, ..., min(5, C)], by a model that maps a batch to logits [B, ..., C].

    DIVERGED where a logit is not finite. The model is in evaluation mode here, in training mode afterwards.
    """
    model.eval()
    classes = []
    for x in batches:
        logits = model(x)
        top = logits.topk(min(5, logits.shape[-1])).indices
        classes.append(top.where(logits.isfinite().all(-1, keepdim=True), DIVERGED))
    model.train()
    return torch.cat(classes)


def accuracies(classes, labels, world_size=1):
    """Top-1 and top-5 [2, ...] of all images, from each process's classes [n, ..., 5] and labels [n]."""
    hits = classes == labels.to(classes.device).view(-1, *[1] * (classes.dim() - 1))
    top1 = hits[..., 0].sum(0)
    sums = torch.stack([top1, hits.any(-1).sum(0), torch.full_like(top1, len(hits))])
    if world_size > 1:
        dist.all_reduce(sums)
    sums = sums.cpu().double()
    return sums[:2] / sums[2]


def gather(mine, dataset, world_size, device=None, chunk=4096):
    """Rows [N, ...] of all images of a set, in order.

    mine: the rows of this process's readable images; its images are rank::world_size. Rows of unreadable
    images are UNREADABLE throughout. device: where processes exchange them, as NCCL takes no tensors of the
    CPU; default: theirs. chunk: rows of each process in an exchange, which bounds the memory.
    """
    rank = dist.get_rank() if world_size > 1 else 0
    readable = dataset.is_readable[rank::world_size].nonzero()[:, 0].to(mine.device)
    rows = mine.new_full((math.ceil(len(dataset) / world_size), *mine.shape[1:]), UNREADABLE)
    rows[readable] = mine
    if world_size == 1:
        return rows
    everyone = rows.new_empty(len(rows), world_size, *rows.shape[1:])     # [i, r]: row i of process r
    for part, place in zip(rows.split(chunk), everyone.split(chunk), strict=True):
        place.copy_(all_gather(part.to(device or part.device)).transpose(0, 1))
    return everyone.flatten(0, 1)[:len(dataset)]


def write_predictions(path, dataset, predictions):
    """A .csv of the readable images, in order, which cluster_eval.py --predictions reads, too."""
    names = range(len(dataset)) if dataset.images is not None else map(os.fsdecode, dataset.paths)
    rows = zip(names, dataset.labels.tolist(), predictions.tolist(), strict=True)
    text = io.StringIO()
    csv.writer(text).writerow(("image", "label", "prediction"))
    csv.writer(text).writerows(row for row in rows if row[2] != UNREADABLE)
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))


# ---------------------------------------------------------------- of any program, from files
def read_predictions(path):
    """(labels [N], predictions [N], probabilities [N, K] or None, class names, cluster names, remarks).

    A .csv has columns `label` and `prediction`; an .npz has arrays `labels` and `predictions`, or
    probabilities [N, K] instead of predictions. Each name is read in singular and plural. Labels and
    predictions are integers or strings, and are numbered from 0 here; with probabilities, predictions are
    column numbers of these. Negative predictions are noise, as in scikit-learn's DBSCAN.
    Raises UserError that names the column.
    """
    columns = _read_columns(path)
    label, prediction = (_heading(name, columns, path) for name in ("labels", "predictions"))
    labels, predictions = columns.get(label), columns.get(prediction)
    probabilities = columns.get("probabilities")
    problem = None if probabilities is None else _problem_of_probabilities(probabilities)
    if predictions is None and probabilities is not None and not problem:
        predictions = probabilities.argmax(1)
    if labels is None or predictions is None and not problem:
        missing = label if labels is None else prediction
        problem = f"has no column '{missing}', only {', '.join(columns) or 'an empty heading'}; rename that"
    problem = problem or _problem(label, labels, prediction, predictions, probabilities)
    if problem:
        raise UserError(f"--predictions {path}: {problem}")

    remarks, noise = [], np.zeros(len(labels), bool)
    if predictions.dtype.kind == "i":
        noise = predictions < 0
    if noise.any():
        remarks.append(f"{noise.sum():,} predictions ({noise.mean():.1%}) are negative, that is noise: in no "
                       "cluster, so wrong for every ACC; for NMI, AMI, ARI and FMI a cluster of their own")
    class_names, labels = np.unique(labels, return_inverse=True)
    if probabilities is None:
        cluster_names, ids = np.unique(predictions[~noise], return_inverse=True)
        predictions = np.full(len(labels), -1)
        predictions[~noise] = ids
    else:
        cluster_names = np.arange(probabilities.shape[1])
    for what, names in (("classes", class_names), ("clusters", cluster_names)):
        if len(names) and names.dtype.kind in "iu" and names[-1] != len(names) - 1:
            remarks.append(f"{len(names):,} {what} with ids from {names[0]} to {names[-1]}")
    return labels, predictions, probabilities, [str(n) for n in class_names], cluster_names.tolist(), remarks


def _heading(name, columns, path):
    """What a file calls a column, `label` or `labels`; if it has neither, what it should."""
    is_csv = Path(path).suffix == ".csv"
    return name[:-1] if name[:-1] in columns or is_csv and name not in columns else name


def _problem_of_probabilities(probabilities):
    """What is wrong with these columns of a file, and what to do; None if nothing is."""
    if probabilities.ndim != 2 or probabilities.size == 0 or probabilities.dtype.kind not in "fiu":
        return "column 'probabilities' is not two-dimensional, or no numbers; save an array [N, K]"
    if not np.isfinite(probabilities).all():
        return "column 'probabilities' has NaN or infinite values; leave such images out"
    if probabilities.min() < 0 or probabilities.max() > 1.001:
        return "column 'probabilities' has values below 0 or above 1, as logits; take their softmax first"
    return None


def _problem(label, labels, prediction, predictions, probabilities):
    """What is wrong with the columns of a file, which have these headings; None if nothing is."""
    for name, ids in ((label, labels), (prediction, predictions)):
        if ids.ndim != 1 or len(ids) == 0:
            return f"column '{name}' is empty or not one-dimensional; it needs one value for each image"
        if ids.dtype.kind not in "iuUb":
            return f"column '{name}' has gaps, or no integers or strings; fill it, or leave such images out"
    for name, values in (("probabilities", probabilities), ("predictions", predictions)):
        if values is not None and len(values) != len(labels):
            return f"{len(labels)} labels, but {len(values)} {name}; each image needs both"
    if probabilities is not None:
        K = probabilities.shape[1]
        if predictions.dtype.kind not in "iu" or predictions.max() >= K:
            return (f"column '{prediction}' has to hold column numbers of 'probabilities', 0 to {K - 1}; "
                    "without that column the most probable one is taken")
    if labels.dtype.kind == "i" and labels.min() < 0:
        return f"column '{label}' has {labels.min()}; leave such images out"
    return None


def _read_columns(path):
    """{name: array} of a .csv or .npz file."""
    path = Path(path)
    if path.suffix not in (".csv", ".npz"):
        raise UserError(f"--predictions {path}: expected a .csv or .npz file; save it as one of these")
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:           # Excel writes a mark first
                rows = [row for row in csv.reader(file) if row]
            for number, row in enumerate(rows, 1):
                if len(row) != len(rows[0]):
                    raise ValueError(f"row {number} has {len(row)} columns, the heading {len(rows[0])}")
            return {name.strip(): _to_array(cells) for name, *cells in zip(*rows, strict=True)}
        with zipfile.ZipFile(path) as file:              # a compressed megabyte may hold a gigabyte of zeros
            unpacked = sum(record.file_size for record in file.infolist())
        if unpacked > max(2 ** 30, 100 * path.stat().st_size):
            raise ValueError(f"would take {unpacked / 2 ** 30:,.0f} GB of memory; save it by np.savez, "
                             "which does not compress")
        with np.load(path) as file:
            return {name: np.asarray(file[name]) for name in file.files}
    except Exception as error:   # whatever a damaged or hostile file makes zipfile and numpy raise
        raise UserError(f"--predictions {path}: cannot be read ({error}); is it the right file?") from None


def _to_array(cells):
    """A column of a .csv: integers (3.0 is one), else floats, else strings; with a gap all NaN."""
    cells = np.array([cell.strip() for cell in cells])
    if any(cell.lower() in ("", "nan") for cell in cells):
        return np.full(len(cells), np.nan)
    for kind in (np.int64, float):
        try:
            numbers = cells.astype(kind)
        except (ValueError, OverflowError):
            continue
        if kind is float and (np.abs(numbers) < 2 ** 53).all() and (numbers == np.floor(numbers)).all():
            return numbers.astype(np.int64)              # a larger float may stand for several integers
        return numbers
    return cells


def read_mapping(path, num_clusters, class_names, made_by=None):
    """(mapping, class names) of a metrics.json; num_clusters: of the network; class_names: of --data or None.

    made_by: dict of the network's fingerprint and of --bn-images, on which clusters depend; a file of version
    0.9.0 or older has neither. Warns of other --bn-images. Raises UserError if the rest does not fit.
    """
    try:
        metrics = json.loads(Path(path).read_text())
        mapping = metrics["mapping"]
        names = [str(name) for name in metrics["class_names"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--map-from {path}: not the metrics.json of a labelled split ({error!r}); take "
                        "one that cluster_eval.py wrote for data with labels") from None
    allowed = range(-1, len(names))
    valid = isinstance(mapping, list) and all(type(c) is int and c in allowed for c in mapping)
    if valid:
        matched = [c for c in mapping if c >= 0]
        valid = len(set(matched)) == len(matched)
    if not valid:
        raise UserError(f"--map-from {path}: not a mapping of clusters to its {len(names)} classes, "
                        "each one's at most once; take one that cluster_eval.py wrote")
    if len(mapping) != num_clusters:
        raise UserError(f"--map-from {path}: maps {len(mapping)} clusters, the network has {num_clusters}; "
                        "take one of the same network")
    made_by = made_by or {}
    if metrics.get("network_sha256", made_by.get("network_sha256")) != made_by.get("network_sha256"):
        raise UserError(f"--map-from {path}: its clusters are those of another network; take a metrics.json "
                        "that was made from this --checkpoint")
    if metrics.get("bn_images", made_by.get("bn_images")) != made_by.get("bn_images"):
        to_stderr(f"warning: --map-from {path}: was made with --bn-images {metrics['bn_images']}; with other "
                  "statistics of the batch norms its clusters may mean something else, so give the same here")
    if class_names is not None and names != class_names:
        raise UserError(f"--map-from {path}: its classes are others than those of --data; is --class-names "
                        "in one of the two commands only?")
    return mapping, names


def name_clusters(map_from, names_file, num_clusters, class_names, made_by):
    """(mapping of clusters to classes or None, class names or None), by --map-from and --class-names.

    class_names: of the data, None without labels; made_by: see read_mapping. Raises UserError.
    """
    mapping, names = None, name_classes(names_file, class_names)
    if map_from:
        mapping, mapped = read_mapping(map_from, num_clusters, names, made_by)
        names = names or name_classes(names_file, mapped)
    if names_file and names is None:
        raise UserError("--class-names: there are no classes to name; they come from labels or --map-from")
    return mapping, names


def name_classes(file, names):
    """Readable names for classes with these names, or the same if no file is given; None stays None.

    file: of one name a line, by class number; or imagenet, for those that torchvision has. Raises UserError
    for another number of names.
    """
    if file is None or names is None:
        return names
    if file == "imagenet":
        readable = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    else:
        try:
            lines = Path(file).read_text(errors="surrogateescape").strip().split("\n")
        except OSError as error:
            raise UserError(f"--class-names {file}: cannot be read ({error.strerror}); it has one name a line"
                            ) from None
        readable = [printable(line.strip()) for line in lines]
    if len(readable) != len(names) or "" in readable:
        empty = f", line {readable.index('') + 1} empty" if "" in readable else ""
        raise UserError(f"--class-names {file}: {len(readable)} names{empty}, for {len(names)} classes; it "
                        "needs one a line, in the order of the class numbers")
    return list(readable)


# ---------------------------------------------------------------- of clusters, in rows
def describe_clusters(predictions, labels=None, mapping=None, class_names=None):
    """A dict for each cluster with images, largest first: cluster, size.

    With a mapping also class (None if unmatched); with labels majority (the most frequent class) and purity
    (its share). A prediction of -1 is in no cluster.
    """
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


def write_assignments(path, predictions, confidences, labels=None, mapping=None, class_names=None, files=None,
                      confidence="probability"):
    """Writes a CSV, a row for each image: its cluster, how sure that is, its file and classes if known.

    predictions, confidences, labels: [N]; mapping: the class of each cluster or -1; files: N names, bytes;
    confidence: name of that column.
    """
    rows = []
    for i, k in enumerate(predictions.tolist()):
        row = {"index": i}
        if files is not None:
            row["file"] = os.fsdecode(files[i])
        row |= {"prediction": k, confidence: f"{confidences[i]:.6f}"}
        if mapping is not None:
            row["mapped_label"] = mapping[k]
            row["mapped_name"] = class_names[mapping[k]] if mapping[k] >= 0 else "unmatched"
        if labels is not None:
            row |= {"label": labels[i], "label_name": class_names[labels[i]]}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode(errors="surrogateescape"))
