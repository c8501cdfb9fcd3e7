"""The paper's ablations on Fashion-MNIST, an epoch each: Tables 7 and 8, Figures 3 and 4, and the views.

    make ablations          45 runs, two at a time, about an hour; the same command resumes

A run is a line of docs/ablations.csv. The script prints the tables that stand in docs/ablations.md, and draws
docs/figures/ablations_*.png. docs/ablations.csv has all runs: to repeat them, delete it first.

loss, sharpness, diversity, std_col, std_row, grad: means over the last quarter of a run's steps (see
docs/method.md). 20-NN: cosine, T = 0.07, of the 10,000 test images against 10,000 labelled training images.
ACC and NMI: the classes of the test images. With 200 classes, at most ten are matched, so ACC is not shown.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from cli import at_least  # noqa: E402
from data import build_dataset  # noqa: E402
from knn import scores_to_watch  # noqa: E402
from pretrained import load_twist  # noqa: E402

ROWS = ROOT / "docs/ablations.csv"
COMMON = "--epochs 1 --device cpu --amp off --print-every 13 --views contrast"
RUNS = {
    "TWIST": "",
    "without NBS": "--no-nbs",
    "without sharpness": "--alpha 0",
    "without diversity": "--beta 0",
    "without both": "--alpha 0 --beta 0",
    "without NBS and diversity": "--no-nbs --beta 0",
    "20 classes": "--num-classes 20",
    "50 classes": "--num-classes 50",
    "200 classes": "--num-classes 200",
    "two epochs": "--epochs 2",
    "two local crops": "--num-local 2",
    "self-labelled": None,                       # an epoch of selflabel.py after TWIST
    "crops from 0.2 of the area": "--min-scale 0.2",
    "crops from 0.85 of the area": "--min-scale 0.85",
    "views of Barlow Twins": "--views barlow",
}
SEEDS = (0, 1, 2)
MEASURED = ("loss", "sharpness", "diversity", "std_col", "std_row", "grad")
SCORES = {"knn_monitor": "knn", "acc_monitor": "acc", "nmi_monitor": "nmi"}
COLUMNS = ("run", "seed", *MEASURED, *SCORES.values(), "minutes")
# (heading, rows, columns); the paper's values: ResNet-50 on ImageNet, 50 epochs, C = 4,096, linear accuracy
TABLES = (
    ("NBS (Table 7)", ("TWIST", "without NBS"), ("loss", "knn", "acc", "nmi", "std_col", "std_row"),
     {"TWIST": ("-5.05", "70.6 %", "", "0.590", "2.37", "1.12"),
      "without NBS": ("-3.78", "65.5 %", "", "0.470", "0.26", "1.14")}),
    ("Terms of the loss (Table 8)",
     ("without both", "without sharpness", "without diversity", "TWIST", "without NBS and diversity"),
     ("sharpness", "diversity", "grad", "knn", "acc", "nmi"),
     {"without both": ("8.28", "8.28", "0", "0.1 %", "", ""),
      "without sharpness": ("8.27", "8.28", "0", "0.1 %", "", ""),
      "without diversity": ("2.59", "6.42", "0.01", "56.1 %", "", ""),
      "TWIST": ("1.51", "7.87", "0.02", "70.9 %", "", "")}),
    ("Number of classes (Figure 4a)", ("TWIST", "20 classes", "50 classes", "200 classes"),
     ("knn", "nmi"), {}),
    ("Epochs, local crops, self-labelling (Figure 4b)",
     ("TWIST", "two epochs", "two local crops", "self-labelled"), ("knn", "acc", "nmi"), {}),
    ("Views", ("TWIST", "crops from 0.2 of the area", "crops from 0.85 of the area", "views of Barlow Twins"),
     ("knn", "acc", "nmi"), {}),
)
HEADINGS = {"knn": "20-NN", "acc": "ACC", "nmi": "NMI", "grad": "mean \\|g\\|", "std_col": "std_c",
            "std_row": "std_r"}


def make(name, seed, folder):
    """The row of one run: trained by the command that a user types, then scored."""
    torch.set_num_threads(1)
    out = folder / f"{name.replace(' ', '_')}_{seed}"
    command = ["pretrain.py", "--restarts", "1", "--knn-every", "0"]
    if RUNS[name] is None:
        command = ["selflabel.py", "@recipes/fashion_mnist_selflabel.txt",
                   "--checkpoint", str(folder / f"TWIST_{seed}/checkpoint.pth")]
    command += [*COMMON.split(), *(RUNS[name] or "").split(), "--seed", str(seed), "--output-dir", str(out)]
    start = time.time()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    minutes = (time.time() - start) / 60
    last = [entry for entry in log_of(out) if entry["step"] > 0.75 * log_of(out)[-1]["step"]]
    row = dict(run=name, seed=seed, minutes=minutes)
    for key in MEASURED:
        if key in last[0]:                       # self-labelling has another loss
            row[key] = np.mean([entry[key] for entry in last])
    network, config = load_twist(out / "checkpoint.pth")
    train, test = build_dataset("fashion-mnist", "train"), build_dataset("fashion-mnist", "test")
    train = train.subset(torch.linspace(0, len(train) - 1, 10_000).long())
    scores = scores_to_watch(network, train, test, config, "cpu")
    return row | {SCORES[key]: value for key, value in scores.items()}


def log_of(out):
    """The training lines of a run's log."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def read_rows():
    return list(csv.DictReader(ROWS.read_text().splitlines())) if ROWS.exists() else []


def write_rows(rows):
    order = list(RUNS)
    with open(ROWS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in sorted(rows, key=lambda row: (order.index(row["run"]), int(row["seed"]))):
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value
                             for key, value in row.items()})


# ---------------------------------------------------------------- tables and pictures
def tables(rows):
    """The tables of docs/ablations.md: mean (least to greatest) of the seeds, the paper's values below."""
    text = []
    made = {row["run"] for row in rows}
    for heading, names, columns, paper in TABLES:
        if not made.issuperset(names):
            continue
        text += [f"### {heading}", "",
                 "| run | " + " | ".join(HEADINGS.get(column, column) for column in columns) + " |",
                 "|---" * (1 + len(columns)) + "|"]
        for name in names:
            cells = [cell(rows, name, column) for column in columns]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
            if name in paper:
                text.append("| *the paper's* | " + " | ".join(paper[name]) + " |")
        text.append("")
    minutes = [float(row["minutes"]) for row in rows]
    text.append(f"{len(rows)} runs, each on one core; minutes: {np.mean(minutes):.1f} "
                f"({min(minutes):.1f} to {max(minutes):.1f}).")
    return "\n".join(text)


def cell(rows, name, column):
    values = [float(row[column]) for row in rows if row["run"] == name and row[column] != ""]
    if not values:
        return ""
    digits = {"grad": 6, "knn": 3, "acc": 3, "nmi": 3}.get(column, 2)
    low, mean, high = (f"{value:.{digits}f}" for value in (min(values), np.mean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def draw(rows, folder):
    """Figure 3: deviations before NBS over the training. Figure 4: scores over classes, of each other run."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("std_col", "std_row"), strict=True):
        for name, colour in (("TWIST", "tab:blue"), ("without NBS", "tab:orange")):
            for seed in SEEDS:
                entries = log_of(folder / f"{name.replace(' ', '_')}_{seed}")
                axes.plot([entry["step"] for entry in entries], [entry[key] for entry in entries],
                          color=colour, linewidth=1, label=name if seed == SEEDS[0] else None)
        axes.set(xlabel="step", ylabel=f"{HEADINGS[key]}, standard deviation", ylim=(0, None))
        axes.legend()
    figure.suptitle("Logits before NBS, three seeds each (the paper's Figure 3)", fontsize=10)
    figure.savefig(ROOT / "docs/figures/ablations_nbs.png", dpi=100)

    figure = Figure(figsize=(9, 4), layout="constrained")
    names = [name for name in RUNS if name != "without both"]
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("knn", "nmi"), strict=True):
        for place, name in enumerate(names):
            values = [float(row[key]) for row in rows if row["run"] == name]
            axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
        axes.set(xlabel=HEADINGS[key], yticks=range(len(names)), yticklabels=names,
                 ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="y", color="0.9")
    figure.suptitle("Each run with three seeds", fontsize=10)
    figure.savefig(ROOT / "docs/figures/ablations_scores.png", dpi=100)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", default="runs/ablations", help="default: runs/ablations")
    parser.add_argument("--processes", type=at_least(1), default=2, help="runs at a time; default: 2")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir).absolute()
    rows = read_rows()
    done = {(row["run"], int(row["seed"])) for row in rows}
    todo = [(name, seed) for name in RUNS for seed in SEEDS if (name, seed) not in done]
    with ProcessPoolExecutor(args.processes) as pool:
        for number, row in enumerate(pool.map(make, *zip(*todo, strict=True), [folder] * len(todo)), 1):
            rows.append(row)
            write_rows(rows)
            print(f"{number} of {len(todo)}: {row['run']}, seed {row['seed']}: {row['minutes']:.1f} minutes, "
                  f"20-NN {row['knn']:.3f}, ACC {row['acc']:.3f}, NMI {row['nmi']:.3f}", flush=True)
    rows = read_rows()
    print(tables(rows))
    if todo:                                     # else the logs may be on another machine
        draw(rows, folder)


if __name__ == "__main__":
    main()
