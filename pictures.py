"""Pictures of runs and evaluations, drawn with matplotlib into PNG files.

matplotlib is imported where a picture is drawn: without it a run loses its pictures only.
"""

import math
import textwrap

import numpy as np

PER_SHEET = 40         # clusters on a contact sheet


# ---------------------------------------------------------------- a training run
def draw_curves(path, entries, config):
    """The terms of the loss and the loss over the steps, with their bounds.

    entries: training lines of a log; config: the run's. Without matplotlib it says so and draws nothing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: matplotlib is not installed")
        return
    figure = Figure(figsize=(10, 4.2))
    left, right = figure.subplots(1, 2, gridspec_kw=dict(left=0.07, right=0.98, bottom=0.26, wspace=0.22))
    steps = [entry["step"] for entry in entries]
    twist = config.get("loss", "twist") == "twist"
    terms = ("consistency", "sharpness", "diversity") if twist else ("invariance", "redundancy")
    for name, style in zip(terms, ("-", "--", "-."), strict=False):
        left.plot(steps, [entry[name] for entry in entries], style, label=name)
    right.plot(steps, [entry["loss"] for entry in entries], color="black", label="loss")
    if twist:
        classes = min(config["num_classes"], config["batch_size"])
        left.axhline(math.log(classes), color="0.6", linewidth=1, label=f"ln {classes}, the greatest entropy")
        left.set(ylim=(0, None))
        right.axhline(-config["beta"] * math.log(classes), color="0.6", linewidth=1, label="lower bound")
        title = f"consistency + {config['alpha']:g} · sharpness − {config['beta']:g} · diversity"
    else:
        left.set(yscale="log")                   # invariance sums D numbers, redundancy D² - D
        right.set(yscale="log")
        title = f"invariance + {config['lambd']:g} · redundancy"
    unit = "nats" if twist else "squared correlation"
    left.set(xlabel="step", ylabel=unit, title="the terms")
    right.set(xlabel="step", ylabel=unit, title=title)
    for axes in (left, right):
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- clusters
def draw_clusters(folder, clusters, predictions, labels, mapping, class_names, images=None,
                  probabilities=None, images_per_cluster=12, contact_sheets=3, seed=0):
    """With labels draws confusion_matrix.png; with images contact_sheet.png, ..._2.png, ... and top3.png.

    clusters: rows of predictions.describe_clusters; predictions: [N], -1 for no cluster; labels: [N] or None;
    mapping: the class of each cluster or -1, or None; images[i]: uint8 [C, H, W]; probabilities: [N, K];
    contact_sheets: how many at most. Without matplotlib it says so and draws nothing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return
    if labels is not None:
        classes = np.where(predictions < 0, -1, np.array([*mapping, -1])[predictions])
        draw_confusion_matrix(folder / "confusion_matrix.png", labels, classes, class_names)
    if images is None:
        return
    for first in range(0, len(clusters), PER_SHEET)[:contact_sheets]:
        shown, number, title = clusters[first:first + PER_SHEET], first // PER_SHEET + 1, ""
        if len(shown) < len(clusters):
            title = f": {first + 1} to {first + len(shown)} of {len(clusters)}, the largest first"
        path = folder / (f"contact_sheet_{number}.png" if number > 1 else "contact_sheet.png")
        draw_contact_sheet(path, images, predictions, probabilities.max(1), shown, images_per_cluster, title)
    names = [f"cluster {k}" for k in range(probabilities.shape[1])]
    for k, c in enumerate(mapping or []):
        if c >= 0:
            names[k] = class_names[c]
    truth = None
    if labels is not None:
        truth = [class_names[c] for c in labels]
    index = np.random.default_rng([seed, 7]).permutation(len(predictions))[:12]
    draw_top3(folder / "top3.png", images, probabilities, index, names, truth)


def caption(row):
    """One line about a cluster, a row of predictions.describe_clusters.

    The most frequent class is named where it is not the class that the cluster is matched to.
    """
    text = f"cluster {row['cluster']}"
    if "class" in row:
        text += f" → {row['class'] or 'unmatched'}"
    if "purity" in row:
        text += f"   purity {row['purity']:.0%}"
        if row["majority"] != row["class"]:
            text += f" (mostly {row['majority']})"
    return f"{text}   {row['size']:,} images"


def draw_contact_sheet(path, images, predictions, confidences, clusters, images_per_cluster=12, title=""):
    """Writes a PNG: a strip of the most confident images of each cluster.

    images[i]: uint8 [C, H, W], all of one size, C 1 or 3; predictions, confidences: [N]; clusters: rows of
    predictions.describe_clusters. A long caption takes several lines.
    """
    from matplotlib.figure import Figure

    columns = 1 if len(clusters) <= 5 else 2
    rows = math.ceil(len(clusters) / columns)
    captions = [textwrap.fill(caption(row), 72) for row in clusters]
    caption_height = 0.14 + 0.14 * max(text.count("\n") + 1 for text in captions)       # inches
    H, W = images[0].shape[-2:]
    gap = 1 + W // 28                                                             # pixels
    strip_width = 4.8                                                             # inches
    row_height = strip_width / images_per_cluster * H / W + caption_height
    figure = Figure(figsize=(columns * strip_width, rows * row_height + 0.4), layout="constrained")
    for i, row in enumerate(clusters):
        members = np.flatnonzero(predictions == row["cluster"])
        best = members[np.argsort(-confidences[members], kind="stable")[:images_per_cluster]]
        strip = np.full((H, images_per_cluster * (W + gap) - gap, 3), 255, np.uint8)
        for j, index in enumerate(best):
            left = j * (W + gap)
            strip[:, left:left + W] = images[index].permute(1, 2, 0).numpy()
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(strip)
        axes.set_title(captions[i], loc="left", fontsize=8, pad=3)
        axes.axis("off")
    figure.suptitle(f"Most confident images of each cluster{title}", fontsize=11)
    figure.savefig(path, dpi=150)


def draw_top3(path, images, probabilities, index, cluster_names, truth=None):
    """Writes a PNG: some images with their three most probable clusters beneath (paper, Figure 1).

    images[i]: uint8 [C, H, W]; probabilities: [N, K]; index: which images; cluster_names: K strings, the
    mapped class where there is one; truth: N strings or None.
    """
    from matplotlib.figure import Figure

    top3 = np.argsort(-probabilities[index], 1, kind="stable")[:, :3]             # [n, 3]
    shown = [cluster_names[k] for k in top3.flat]
    if truth is not None:
        shown += [truth[i] for i in index]
    longest = max(len(name) for name in shown)
    width = max(1.6, 0.5 + 0.07 * longest)                                        # inches: no name is cut
    columns = min(6, len(index))
    rows = math.ceil(len(index) / columns)
    figure = Figure(figsize=(columns * width, rows * 2.35), layout="constrained")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[1.5, 0.75] * rows)
    for place, (i, clusters) in enumerate(zip(index, top3, strict=True)):
        row, column = divmod(place, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        axes.imshow(images[i].permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axes.axis("off")
        axes = figure.add_subplot(grid[2 * row + 1, column])
        axes.barh(range(len(clusters)), probabilities[i, clusters], color="#9ecae1", height=0.9)
        for y, k in enumerate(clusters):
            axes.text(0.01, y, cluster_names[k], va="center", fontsize=7)
            axes.text(0.99, y, f"{probabilities[i, k]:.3f}", va="center", ha="right", fontsize=7)
        axes.set(xlim=(0, 1), ylim=(len(clusters) - 0.5, -0.5), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if truth is not None:
            mark = "✓" if cluster_names[clusters[0]] == truth[i] else "✗"
            axes.set_xlabel(f"{mark} truth: {truth[i]}", fontsize=7, fontweight="bold", labelpad=2)
    figure.suptitle(f"The three most probable classes of {len(index)} images drawn at random", fontsize=10)
    figure.savefig(path, dpi=150)


def confusion_matrix(labels, predicted_classes, num_classes):
    """Shares [C, C]: row = true class, column = predicted class; each row with images sums to 1.

    labels, predicted_classes: [N]. If some predicted class is -1 (an unmatched cluster), the matrix is
    [C, C + 1] and the last column counts these.
    """
    columns = num_classes + int(predicted_classes.min() < 0)
    predicted_classes = np.where(predicted_classes < 0, num_classes, predicted_classes)
    counts = np.bincount(labels * columns + predicted_classes, minlength=num_classes * columns)
    counts = counts.reshape(num_classes, columns)
    return counts / np.maximum(1, counts.sum(1, keepdims=True))


def draw_confusion_matrix(path, labels, predicted_classes, class_names):
    """Writes a PNG of confusion_matrix: up to 200 classes have names, up to 50 have percentages."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    matrix = confusion_matrix(labels, predicted_classes, len(class_names))
    rows, columns = matrix.shape
    with_numbers, with_names = rows <= 50, rows <= 200
    cell, font = (0.4, 8) if with_numbers else (0.15, 6)                          # inches, points
    side, margin = 12, 0
    if with_names:
        side = max(4.5, cell * rows)
        margin = 0.012 * font * max(len(name) for name in class_names)
    figure = Figure(figsize=(side + 1.2 + margin, side + margin), layout="constrained")
    axes = figure.add_subplot()
    scale = PowerNorm(1 if with_names else 0.4, vmin=0, vmax=1)     # makes a faint cell of one pixel visible
    picture = axes.imshow(matrix, cmap="Blues", norm=scale)
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    last = "; last column: unmatched" if columns > rows else ""
    axes.set(xlabel=f"class that the predicted cluster is matched to{last}", ylabel="true class")
    if with_names:
        axes.set_xticks(range(columns), [*class_names, "unmatched"][:columns], rotation=90, fontsize=font)
        axes.set_yticks(range(rows), class_names, fontsize=font)
    if with_numbers:
        for i, j in np.argwhere(matrix > 0.005):      # zeros in all other cells would hide the errors
            axes.text(j, i, f"{100 * matrix[i, j]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if matrix[i, j] > 0.5 else "black")
    figure.savefig(path, dpi=150)
