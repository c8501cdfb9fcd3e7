"""One HTML page about a run: what the network found, and whether to trust it. Or about several, compared.

    python report.py runs/demo                            what this run and its evaluations wrote
    python report.py runs/first runs/second               scores, curves and settings side by side

It reads config.json, log.jsonl and what evaluations wrote: in folders of the run's folder, or beside it if
they name its checkpoint. The page names what is missing, and the command that makes it. The pictures are in
the page, which needs no network: it can be mailed. Its look is in report.html.
The first command takes about 10 seconds of one CPU core.
"""

import argparse
import json
import math
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from checkpoint import UserError, to_stderr, to_stdout, write_atomically
from cli import HelpFormatter, at_least, launch
from embed import principal_components
from knn import nearest_neighbours
from page import clean, curves, fill, join, number, percent, point_map, strip, table, tag
from pictures import caption, confusion_matrix, loss_bound, sharpest_with_nbs
from results import EVALUATIONS, Absent, Pictures, read_assignments, read_embedding, read_results

IN_MAP, DOTS, MOST_CLASSES, MOST_IN_MATRIX = 200, 4000, 40, 25   # so that a page has a few MB at most
DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, zipfile.BadZipFile)
MONITORS = {"knn_monitor": "20-NN in training", "acc_monitor": "ACC in training",
            "nmi_monitor": "NMI in training"}
PANELS = {"Loss": ("loss",), "Terms of the loss": ("consistency", "sharpness", "diversity"),
          "Terms of the loss of Barlow Twins": ("invariance", "redundancy"),
          "Classes in use in a batch": ("classes",), "Scores of held-out images": tuple(MONITORS)}
COLLAPSES = {"uniform": "every image has the same, even distribution over the classes",
             "one-class": "all images are in one class", "constant": "all images have the same features",
             "one-dimension": "the features of all images lie on a line"}


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="of a run; several are compared")
    add = parser.add_argument
    add("--output", metavar="FILE", help="the page; without it report.html in the run's folder, or "
        "comparison.html in the first of several")
    add("--images-per-class", type=at_least(2), default=16,
        help="pictures of each class, one half the most confident ones, the other half the least")
    add("--data-dir", help="folder of torchvision's data sets; without it that of the run")
    return parser


def section(heading, build, *args):
    """(heading, content) for page.fill. What is missing or damaged costs a section, not the page."""
    try:
        return heading, build(*args)
    except Absent as absent:
        return heading, [note("Not here: {}. This makes it:".format(*absent.args)),
                         tag("pre", absent.args[1], tabindex=0)]
    except DAMAGE as error:
        what = heading or "Scores"
        said = f"{what}: left out, a file is damaged ({type(error).__name__}: {error}); evaluate again"
        to_stderr(f"warning: {clean(said)}")
        return heading, note(said)


def note(text):
    """A paragraph about what is missing; None if that is nothing."""
    return tag("p", text, class_="missing") if text else None


# ---------------------------------------------------------------- the first screen
def main_numbers(run):
    """The scores that one looks for first, as a list of terms."""
    scores = {}
    for evaluation in filter(None, map(run.first, EVALUATIONS)):
        scores |= evaluation.values()
    wanted = {"ACC": "ACC", "NMI": "NMI", "20-NN, top 1": "20-NN"}
    wanted |= {name: name.split(",")[0] for name in scores if re.match("(linear|fine-tuned).*top 1$", name)}
    terms = {short: f"{scores[name]:.3f}" for name, short in wanted.items() if name in scores}
    terms |= {"steps": f"{run.last['step']:,}"} if run.entries else {}
    terms |= {name: run.config[name] for name in ("arch", "data") if run.config.get(name)}
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in terms.items()])


def findings(run):
    """What the network found: a paragraph."""
    metrics = run.need("cluster_eval").metrics
    clusters, count = metrics["clusters"], metrics["num_clusters"]
    who = "k-means on the network's features" if "kmeans" in metrics else "The network"
    used = "" if len(clusters) == count else f", of which it uses {len(clusters):,}"
    said = (f"{who} sorted {metrics['num_images']:,} images of {metrics['data']} ({metrics['split']} part) "
            f"into {count:,} classes{used}. ")
    if "acc" not in metrics:
        said += "There are no labels, so there are no scores: judge by the pictures of each class."
        return tag("p", said, class_="lead")
    said += f"{percent(metrics['acc'])} of them are in the class that is matched to their label"
    if metrics.get("pixel_kmeans"):
        said += f"; with k-means on the pixels it would be {percent(metrics['pixel_kmeans']['acc'])}"
    purest, *_, mixed = sorted(clusters + clusters[:1], key=lambda row: -row["purity"])
    said += (f". The purest class is {percent(purest['purity'])} {purest['majority']}, the most mixed one "
             f"{percent(mixed['purity'])} {mixed['majority']}. Labels were used for these scores only.")
    return tag("p", said, class_="lead")


def health(run):
    """Whether the training went well: a list of sentences."""
    last, config = run.last, run.config
    if not run.entries:
        raise Absent("log.jsonl, which tells how the training went", run.training_command())
    total = next((line["config"].get("total_steps") for line in run.lines if "config" in line), "?")
    status = next((line["status"] for line in reversed(run.lines) if "status" in line), "no end in the log")
    few = " These are few: plan for hundreds, by --epochs." if last["step"] < 200 else ""
    said = [f"The training is finished: {last['step']:,} steps.{few}"]
    if status != "done":
        said = [join(tag("strong", "Not finished"), f": step {last['step']} of {total}, {status}.")]
    if "collapsed" in last:
        why = COLLAPSES.get(last["collapsed"], "the network no longer tells images apart")
        said.append(join(tag("strong", f"Collapsed ({last['collapsed']})"), f": {why}. Do not use it."))
    elif config.get("loss", "twist") in ("twist", "barlow", "seed"):      # other losses are not looked at
        said.append(tag("strong", "Not collapsed."))
    if "mi" in last:
        said += information(last, config)
    said += run.doubts()
    return tag("ul", [tag("li", sentence) for sentence in said], class_="facts")


def information(last, config):
    """Sentences about mi and the classes in use; last: a line of the log of pretrain.py."""
    most, mi = min(config["num_classes"], config["batch_size"]), last["mi"]
    said = [f"A class carries {mi:.2f} nats of information about its images (mi = diversity − sharpness). "
            f"This is {percent(last['mi_ratio'])} of ln {most} = {math.log(most):.2f}, the most that {most} "
            "classes can carry. After a collapse it is 0."]
    if config.get("nbs") and config["num_classes"] <= config["batch_size"]:
        sharpest = sharpest_with_nbs(most)
        reachable = math.log(most) - sharpest
        said.append(f"With NBS, sharpness is at least {sharpest:.2f} for {most} balanced classes; here it is "
                    f"{last['sharpness']:.2f}. So mi is at most {reachable:.2f}, of which "
                    f"{percent(mi / reachable)} is reached.")
    return [*said, f"A batch is spread as evenly as over {last['classes']:.2f} of {config['num_classes']:,} "
                   "classes."]


# ---------------------------------------------------------------- classes
def classes(run, args):
    """The most and the least confident images of each class."""
    evaluation = run.need("cluster_eval")
    columns = read_assignments(evaluation.folder / "assignments.csv")
    clusters, labels = evaluation.metrics["clusters"], columns.get("label_name")
    measure = "probability" if "probability" in columns else "similarity"
    predictions, confidences = np.array(columns["prediction"], int), np.array(columns[measure], float)
    pictures = Pictures(evaluation, run, columns.get("file"), args.data_dir)
    half, articles = args.images_per_class // 2, []
    for row in clusters[:MOST_CLASSES]:
        members = np.flatnonzero(predictions == row["cluster"])
        members = members[np.argsort(-confidences[members], kind="stable")]
        strips = []
        for which, shown in (("most", members[:half]), ("least", members[half:][-half:])):
            cells = []
            for i in shown.tolist():
                text, label = f"{confidences[i]:.2f}", labels[i] if labels else None
                about = ", ".join(filter(None, [pictures.name(i), label, f"{measure} {text}"]))
                wrong = label is not None and label != row["majority"]
                cells.append((pictures.uri(i), about, f"{text} {label}" if wrong else text, wrong))
            strips += [strip(f"the {which} confident images", cells)] if cells else []
        title = row.get("class") or f"Cluster {row['cluster']}"
        articles.append(tag("article", tag("h3", title), tag("p", caption(row)), strips))
    said = f"First the most confident images of a class, then the least confident ones, with the {measure}."
    if labels:
        said += " A frame and a name mark an image with another label than most of its class."
    if len(clusters) > MOST_CLASSES:
        said += f" These are the {MOST_CLASSES} largest of {len(clusters):,} classes."
    return tag("p", said), note(pictures.problem), tag("div", articles, class_="classes")


def confusions(run):
    """The confusion matrix, unless it is too large to read, and the pairs that are confused most."""
    evaluation = run.need("cluster_eval")
    columns = read_assignments(evaluation.folder / "assignments.csv")
    if "label" not in columns or "mapped_label" not in columns:
        return tag("p", "There are no labels, so it is not known what is confused.")
    names, tables = evaluation.metrics["class_names"], []
    labels, predicted = np.array(columns["label"], int), np.array(columns["mapped_label"], int)
    matrix, heads = confusion_matrix(labels, predicted, len(names)), [*names, "unmatched"]
    if len(names) <= MOST_IN_MATRIX:
        rows = []
        for name, shares in zip(names, matrix, strict=True):
            cells = [(f"{share:.0f}", f"shade s{share / 10:.0f}", share) for share in shares]
            rows.append([name, *cells])
        tables.append(table("Confusion matrix: of the images with a label, the percentage in each class",
                            ["label", *heads[:matrix.shape[1]]], rows, "matrix"))
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True)).most_common()
    wrong = [(c, other, count) for (c, other), count in pairs if c != other][:10]
    rows = []
    for c, other, count in wrong:
        share = matrix[c, other]
        rows.append([names[c], heads[other], number(count), (percent(share / 100), "number", share)])
    heads = ["label", "in the class", "images", "of the label"]
    return *tables, table("The most frequent confusions", heads, rows)


# ---------------------------------------------------------------- features
def feature_map(run, args):
    """Images as points: the first two principal components of their features."""
    unit, groups, names, pictures = read_embedding(run, args.data_dir)
    points, shares = principal_components(unit)
    drawn, marks = np.random.default_rng(0).permutation(len(points))[:DOTS], {}
    for place, i in enumerate(drawn[:IN_MAP].tolist()):
        if uri := pictures.uri(i):
            marks[place] = uri, f"{names[groups[i]]}, {pictures.name(i)}"
    across, upwards = map(percent, shares.tolist())
    said = (f"A dot is an image; here are {len(drawn):,} of {len(points):,}. The axes are the first two "
            f"principal components of the features: {across} of the variance across, {upwards} upwards.")
    return tag("p", said), note(pictures.problem), point_map(points[drawn].numpy(), groups[drawn], names,
                                                             said, marks)


def neighbours(run, args):
    """Images drawn at random, those of embed.py's neighbours.png, and the nearest others."""
    unit, groups, names, pictures = read_embedding(run, args.data_dir)
    queries = np.random.default_rng([run.config.get("seed", 0), 11]).permutation(len(unit))[:8]
    similarity, nearest = nearest_neighbours(unit, unit[queries], min(9, len(unit)))
    strips = []
    for query, near, cosines in zip(queries.tolist(), nearest.tolist(), similarity.tolist(), strict=True):
        name = names[groups[query]]
        cells = [(pictures.uri(query), f"{pictures.name(query)}, {name}", name, False)]
        for i, cosine in zip(near, cosines, strict=True):
            other, text = names[groups[i]], f"{cosine:.2f}"
            about = f"{pictures.name(i)}, {other}, similarity {text}"
            if i != query and len(cells) < 9:
                text = text if other == name else f"{text} {other}"
                cells.append((pictures.uri(i), about, text, other != name))
        strips.append(strip(f"{pictures.name(query)} and its nearest neighbours", cells, "strip query"))
    said = ("Each row begins with an image drawn at random. Its nearest neighbours follow, with the cosine "
            "similarity. A frame and a name mark those with another label or in another cluster.")
    return tag("p", said), note(pictures.problem), strips


# ---------------------------------------------------------------- numbers
def training(*runs):
    """Curves: of one run the terms of its loss together, of several runs a panel for each number."""
    alone, figures, first = len(runs) == 1, [], runs[0]
    for title, keys in PANELS.items():
        for shown in [keys] if alone else [(key,) for key in keys]:
            lines, bounds = {}, []
            for run, key in ((run, key) for run in runs for key in shown):
                points = [(entry["step"], entry[key]) for entry in run.entries if key in entry]
                if points:
                    lines[MONITORS.get(key, key) if alone else str(run.folder)] = points
            if alone and shown == ("loss",) and "mi" in first.last:
                bounds = [loss_bound(first.config)]
            if alone and shown == ("classes",) and "num_classes" in first.config:
                bounds = [(first.config["num_classes"], "all classes"), (1, "one class")]
            log = "invariance" in first.last and shown[0] in ("loss", "invariance", "redundancy")
            heading = title if alone else MONITORS.get(shown[0], shown[0])
            figures += [curves(heading, lines, bounds, log)] if lines else []
    if not figures:
        return note("There are no curves without log.jsonl.")
    said = "Scores of held-out images use labels: watch a run by them, do not choose one. "
    if alone and any("candidate" in line for line in first.lines):
        said += "The first steps are those of several candidates, one after the other; the best one goes on."
    return tag("p", said), tag("div", figures, class_="plots")


def evaluations(run):
    """All scores in a table, then what has not been evaluated."""
    rows, parts = [], []
    for evaluation in run.evaluations:
        where = [str(evaluation.metrics.get("data", "")), str(evaluation.folder)]
        rows += [[name, number(value), number(count), *where] for name, value, count in evaluation.scores()]
    if rows:
        parts.append(table("Scores", ["score", "value", "images", "data", "folder"], rows))
    lacking = [script for script, (_, _, use) in EVALUATIONS.items() if use and run.first(script) is None]
    if lacking:
        uses = "; ".join(EVALUATIONS[script][2] for script in lacking)
        commands = "\n".join(run.command(script) for script in lacking)
        parts += [note(f"Not here: {uses}. Accuracies need labels. These commands make it:"),
                  tag("pre", commands, tabindex=0)]
    return parts


def settings(run):
    """The commands to repeat it, and the configuration."""
    known = [evaluation for evaluation in run.evaluations if evaluation.script in EVALUATIONS]
    commands = [run.training_command(), *(run.command(found.script, found) for found in known)]
    rows = [[name, json.dumps(value)] for name, value in sorted(run.config.items())]
    return tag("pre", "\n".join(commands), tabindex=0), tag(
        "details", tag("summary", f"All {len(rows)} settings"), table("Settings", ["name", "value"], rows))


def compared(runs):
    """A table of scores with a row for each run."""
    logged = set().union(*(run.last for run in runs))
    keys = [key for key in ("step", "loss", "mi_ratio", "classes", *MONITORS) if key in logged]
    scores, names = [], {}
    for run in runs:
        scores.append({})
        for evaluation in run.evaluations:
            scores[-1] |= evaluation.values()
        names |= scores[-1]
    rows = []
    for run, found in zip(runs, scores, strict=True):
        values = [*map(run.last.get, keys), *map(found.get, names)]
        rows.append([str(run.folder), *map(number, values)])
    return table("Scores of the runs", ["run", *(MONITORS.get(key, key) for key in keys), *names], rows)


def differences(runs):
    """A table of the settings in which runs differ."""
    rows = []
    for name in sorted(set().union(*(run.config for run in runs)) - {"output_dir"}):
        values = [json.dumps(run.config.get(name)) for run in runs]
        rows += [[name, *values]] if len(set(values)) > 1 else []
    return table("Settings in which the runs differ", ["name", *(str(run.folder) for run in runs)], rows)


# ---------------------------------------------------------------- the page
def main(args):
    runs = [read_results(folder) for folder in args.folders]
    run, name = runs[0], "report.html" if len(runs) == 1 else "comparison.html"
    path = Path(args.output or run.folder / name)
    if path.suffix != ".html":
        raise UserError(f"--output {path}: is not an .html file; name one")
    if len(runs) > 1:
        page = fill(f"{len(runs)} runs compared", None, {
            "scores": section("Scores", compared, runs),
            "training": section("Training", training, *runs),
            "settings": section("Settings that differ", differences, runs)})
    else:
        page = fill(f"{run.folder}: a run on {run.config.get('data')}", section("", main_numbers, run)[1], {
            "found": section("What it found", findings, run),
            "trust": section("Can it be trusted?", health, run),
            "classes": section("Classes", classes, run, args),
            "confusions": section("Confusions", confusions, run),
            "map": section("Map of the features", feature_map, run, args),
            "neighbours": section("Nearest neighbours", neighbours, run, args),
            "training": section("Training", training, run),
            "scores": section("Evaluations", evaluations, run),
            "settings": section("Commands and settings", settings, run)})
    write_atomically(path, page)
    to_stdout(str(path))


if __name__ == "__main__":
    launch(main, get_parser())
