"""Pictures of runs and evaluations, drawn with matplotlib into PNG files.

matplotlib is imported where a picture is drawn: without it a run loses its pictures only.
"""

import io
import math
import textwrap

import numpy as np

from checkpoint import to_stdout, write_atomically

PER_SHEET = 40         # clusters on a contact sheet
RED, YELLOW, GREEN = (220, 0, 0), (255, 220, 0), (0, 200, 80)


def _wrap(text, width):
    """The lines of a text; names with hyphens stay whole."""
    return textwrap.wrap(text, width, break_on_hyphens=False)


# ---------------------------------------------------------------- a training run
def draw_curves(run, config):
    """Draws curves.png: the loss and its terms over the steps, their bounds, and the accuracies to watch.

    run: a Run, whose first rank draws; config: its configuration. A picture that cannot be drawn, say without
    matplotlib, costs a line on stdout and not the run.
    """
    if run.rank > 0:
        return
    path = run.out / "curves.png"
    try:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(11, 4.5))
        _plot_curves(figure, run.entries(), config)
        image = io.BytesIO()
        figure.savefig(image, dpi=120)
        write_atomically(path, image.getvalue())
    except ImportError:
        to_stdout(f"{path} is not drawn: matplotlib is not installed")
    except Exception as error:
        to_stdout(f"{path} is not drawn: {error}")


def _plot_curves(figure, entries, config):
    left, right = figure.subplots(1, 2, gridspec_kw=dict(left=0.06, right=0.94, bottom=0.26, top=0.82,
                                                         wspace=0.22))
    steps = [entry["step"] for entry in entries]
    loss, unit, title = config.get("loss", "twist"), "", "loss"
    terms = {"twist": ("consistency", "sharpness", "diversity"), "barlow": ("invariance", "redundancy")}
    for name, style in zip(terms.get(loss, ()), ("-", "--", "-."), strict=False):
        left.plot(steps, [entry[name] for entry in entries], style, label=name)
    right.plot(steps, [entry["loss"] for entry in entries], color="black", label="loss")
    if loss == "twist":
        unit, classes = "nats", min(config["num_classes"], config["batch_size"])
        left.axhline(math.log(classes), color="0.6", linewidth=1, label=f"ln {classes}, the greatest entropy")
        left.set(ylim=(0, None))
        lowest, why = loss_bound(config)
        right.axhline(lowest, color="0.6", linewidth=1, label=why)
        title = f"consistency + {config['alpha']:g} · sharpness − {config['beta']:g} · diversity"
    elif loss == "barlow":
        left.set(yscale="log")                   # invariance sums D numbers, redundancy D² - D
        right.set(yscale="log")
        unit, title = "squared correlation", f"invariance + {config['lambd']:g} · redundancy"
    else:                                        # of one's own: nothing is known of its terms
        left.set_axis_off()
    left.set(xlabel="step", ylabel=unit, title="the terms")
    right.set(xlabel="step", ylabel=unit, title=title)
    headline = f"{config.get('data')}, {config.get('output_dir')}: step {steps[-1]:,}"
    measured = [entry for entry in entries if "knn_monitor" in entry]
    lines = right.get_lines()
    if measured:
        accuracy = right.twinx()
        accuracy.set(ylim=(0, 1.03), ylabel="accuracy on held-out images")
        for key, name, style in (("knn_monitor", "20-NN", "s-"), ("acc_monitor", "ACC", "o:")):
            points = [(entry["step"], entry[key]) for entry in measured if key in entry]
            if points:
                lines += accuracy.plot(*zip(*points, strict=True), style, color="tab:green", markersize=4,
                                       linewidth=1, label=f"{name} (right axis)")
                headline += f", {name} {points[-1][1]:.3f}"
    figure.suptitle(headline, fontsize=10)
    for axes, shown in ((left, left.get_lines()), (right, lines)):
        axes.legend(handles=shown, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def loss_bound(config):
    """(the least loss of a run of TWIST, what it is); config: of the run."""
    classes = min(config["num_classes"], config["batch_size"])
    lowest = -config["beta"] * math.log(classes)
    if not config.get("nbs") or config["num_classes"] > config["batch_size"]:
        return lowest, "lower bound"
    lowest += config["alpha"] * sharpest_with_nbs(classes)
    return lowest, f"{classes} balanced classes, as sharp as NBS allows"


def sharpest_with_nbs(num_classes):
    """The least sharpness, in nats, of logits after NBS over images of C balanced classes.

    A column of logits has mean 0 and variance 1. If it is high for 1 image in C and alike for all others, it
    is sqrt(C - 1) there and -1 / sqrt(C - 1) elsewhere.
    """
    height = math.sqrt(num_classes - 1)
    others = (num_classes - 1) * math.exp(-height - 1 / height)     # relative to the likeliest class
    return math.log(1 + others) + others / (1 + others) * (height + 1 / height)


# ---------------------------------------------------------------- clusters
def draw_clusters(folder, title, clusters, predictions, confidences, labels, mapping, class_names,
                  images=None, probabilities=None, images_per_cluster=12, contact_sheets=3, seed=0):
    """With labels draws confusion_matrix.png; with images contact_sheet.png, ..._2.png, ...; top3.png.

    title: of all pictures; clusters: rows of predictions.describe_clusters; predictions: [N], -1 for no
    cluster; confidences: [N], for the sheets; labels: [N] or None; mapping: the class of each cluster or -1,
    or None; images[i]: uint8 [C, H, W]; probabilities: [N, K], for top3.png; contact_sheets: at most so many;
    seed: of the images that are drawn at random. Without matplotlib it says so and draws nothing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        to_stdout("no pictures: matplotlib is not installed")
        return
    if labels is not None:
        classes = np.where(predictions < 0, -1, np.array([*mapping, -1])[predictions])
        draw_confusion_matrix(folder / "confusion_matrix.png", labels, classes, class_names, title)
    if images is None:
        return
    for first in range(0, len(clusters), PER_SHEET)[:contact_sheets]:
        shown, number, which = clusters[first:first + PER_SHEET], first // PER_SHEET + 1, title
        if len(shown) < len(clusters):
            which += f"; clusters {first + 1} to {first + len(shown)} of {len(clusters)}, the largest first"
        path = folder / (f"contact_sheet_{number}.png" if number > 1 else "contact_sheet.png")
        draw_contact_sheet(path, images, predictions, confidences, shown, images_per_cluster, which, labels,
                           seed)
    if probabilities is None:
        return
    names = [f"cluster {k}" for k in range(probabilities.shape[1])]
    for k, c in enumerate(mapping or []):
        if c >= 0:
            names[k] = class_names[c]
    truth = None
    if labels is not None:
        truth = [class_names[c] for c in labels]
    index = np.random.default_rng([seed, 7]).permutation(len(predictions))[:12]
    draw_top3(folder / "top3.png", images, probabilities, index, names, truth, title)


def caption(row):
    """One line about a cluster, a row of predictions.describe_clusters.

    With labels its most frequent class; the class that it is matched to is named where it is another.
    """
    about = []
    if "purity" in row:
        about.append(f"{100 * row['purity']:.0f} % {row['majority']}")
    if "class" in row and row["class"] != row.get("majority", ""):
        match = f"matched to {row['class']}" if row["class"] else "unmatched"
        about = [f"{about[0]} ({match})" if about else match]
    about.append(f"{row['size']:,} image{'s' * (row['size'] != 1)}")
    return f"cluster {row['cluster']}: {', '.join(about)}"


def draw_contact_sheet(path, images, predictions, confidences, clusters, images_per_cluster=12, title="",
                       labels=None, seed=0):
    """Writes a PNG: a strip of images of each cluster, half the most confident ones, half drawn at random.

    images[i]: uint8 [C, H, W], all of one size, C 1 or 3; predictions, confidences: [N]; clusters: rows of
    predictions.describe_clusters; labels: [N] or None; seed: of the drawing. With labels an image has a red
    frame if it is not of the most frequent class of its cluster. A long caption takes several lines.
    """
    from matplotlib.figure import Figure

    columns = 1 if len(clusters) <= 5 else 2
    rows = math.ceil(len(clusters) / columns)
    captions = [textwrap.fill(caption(row), 72) for row in clusters]
    caption_height = 0.14 + 0.14 * max(text.count("\n") + 1 for text in captions)       # inches
    num_best = math.ceil(images_per_cluster / 2)
    H, W = images[0].shape[-2:]
    frame = 1 + W // 28                                                           # pixels
    cell, between = W + 3 * frame, W // 2                 # between the most confident and the drawn ones
    shape = (H + 2 * frame, images_per_cluster * cell - frame + between, 3)
    strip_width = 4.8                                                             # inches
    row_height = strip_width * shape[0] / shape[1] + caption_height
    figure = Figure(figsize=(columns * strip_width, rows * row_height + 0.7), layout="constrained")
    for i, row in enumerate(clusters):
        members = np.flatnonzero(predictions == row["cluster"])
        members = members[np.argsort(-confidences[members], kind="stable")]
        rest = np.random.default_rng([seed, 9, row["cluster"]]).permutation(members[num_best:])
        shown = [*members[:num_best], *rest[:images_per_cluster - num_best]]
        majority = None if labels is None else np.bincount(labels[members]).argmax()
        strip = np.full(shape, 255, np.uint8)
        for j, index in enumerate(shown):
            left = j * cell + (between if j >= num_best else 0)
            if labels is not None and labels[index] != majority:
                strip[:, left:left + W + 2 * frame] = RED
            strip[frame:frame + H, left + frame:left + frame + W] = images[index].permute(1, 2, 0).numpy()
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(strip)
        axes.set_title(captions[i], loc="left", fontsize=8, pad=3)
        axes.axis("off")
    text = "of each cluster: the most confident images, then others drawn at random"
    text += "; red: of another class than most" if labels is not None else ""
    figure.suptitle("\n".join([*_wrap(title, 55 * columns), *_wrap(text, 55 * columns)]),
                    fontsize=10)
    figure.savefig(path, dpi=150)


def draw_top3(path, images, probabilities, index, cluster_names, truth=None, title=""):
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
    text = f"the three most probable classes of {len(index)} images drawn at random"
    figure.suptitle("\n".join([*_wrap(title, round(13 * columns * width)), text]), fontsize=10)
    figure.savefig(path, dpi=150)


def confusion_matrix(labels, predicted_classes, num_classes):
    """Percentages [C, C]: row = true class, column = predicted class; each row with images sums to 100.

    labels, predicted_classes: [N]. If some predicted class is -1 (an unmatched cluster), the matrix is
    [C, C + 1] and the last column counts these.
    """
    columns = num_classes + int(predicted_classes.min() < 0)
    predicted_classes = np.where(predicted_classes < 0, num_classes, predicted_classes)
    counts = np.bincount(labels * columns + predicted_classes, minlength=num_classes * columns)
    counts = counts.reshape(num_classes, columns)
    return 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))


def draw_confusion_matrix(path, labels, predicted_classes, class_names, title=""):
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
    scale = PowerNorm(1 if with_names else 0.4, vmin=0, vmax=100)   # makes a faint cell of one pixel visible
    picture = axes.imshow(matrix, cmap="Blues", norm=scale)
    figure.colorbar(picture, label="percent of the true class", shrink=0.8)
    last = "; last column: unmatched" if columns > rows else ""
    axes.set(xlabel=f"class that the predicted cluster is matched to{last}", ylabel="true class")
    if with_names:
        axes.set_xticks(range(columns), [*class_names, "unmatched"][:columns], rotation=90, fontsize=font)
        axes.set_yticks(range(rows), class_names, fontsize=font)
    if with_numbers:
        for i, j in np.argwhere(matrix > 0.5):      # zeros in all other cells would hide the errors
            axes.text(j, i, f"{matrix[i, j]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if matrix[i, j] > 50 else "black")
    axes.set_title("\n".join(_wrap(title, round(10 * side))), fontsize=10)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- features
def draw_embedding(folder, title, images, points, shares, queries, nearest, similarity, groups=None,
                   names=None):
    """Draws map.png and neighbours.png. Without matplotlib it says so and draws nothing.

    images[i]: uint8 [C, H, W]; points: [N, 2], with the shares [2] of the variance; queries: [Q], which
    images; nearest, similarity: [Q, k], of each its nearest images, itself among them; groups: [N], the class
    or cluster of each image, or None; names: of the groups.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        to_stdout("no pictures: matplotlib is not installed")
        return
    draw_map(folder / "map.png", points, shares, groups, names, title)
    draw_neighbours(folder / "neighbours.png", images, queries, nearest, similarity, groups, names, title)


def draw_map(path, points, shares, groups=None, names=None, title=""):
    """Writes a PNG: a point for each image. Up to 20 groups, the largest, have colours and names."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.add_subplot()
    size = float(np.clip(20_000 / len(points), 2, 30))                            # points²
    if groups is None:
        axes.scatter(*points.T, s=size, linewidths=0, alpha=0.6)
    else:
        sizes = np.bincount(groups, minlength=len(names))
        shown = np.argsort(-sizes, kind="stable")[:20]
        shown = np.sort(shown[sizes[shown] > 0])
        others = ~np.isin(groups, shown)
        if others.any():
            axes.scatter(*points[others].T, s=size, color="0.8", linewidths=0, label="others")
        colours = colormaps["tab10" if len(shown) <= 10 else "tab20"]
        for i, group in enumerate(shown):
            axes.scatter(*points[groups == group].T, s=size, color=colours(i), linewidths=0, alpha=0.6,
                         label=textwrap.shorten(names[group], 30, placeholder="…"))
        legend = axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        for handle in legend.legend_handles:
            handle.set(sizes=[30], alpha=1)
    first, second = (f"{100 * share:.0f} % of the variance" for share in shares)
    axes.set(xlabel=f"first principal component ({first})", ylabel=f"second ({second})", aspect="equal")
    figure.suptitle("\n".join(_wrap(title, 100)), fontsize=10)
    figure.savefig(path, dpi=120)


def draw_neighbours(path, images, queries, nearest, similarity, groups=None, names=None, title=""):
    """Writes a PNG: a row for each query, itself first; those of another group have a red frame."""
    from matplotlib.figure import Figure

    rows, columns = nearest.shape
    height = 1.45 * rows + 0.6                                                    # inches
    figure = Figure(figsize=(1.25 * columns, height))
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw=dict(
        left=0.01, right=0.99, bottom=0.3 / height, top=1 - 0.6 / height, hspace=0.45))
    for i, query in enumerate(queries):
        others = nearest[i] != query             # a copy of the query may be as near as itself
        order = [query, *nearest[i][others][:columns - 1]]
        for j, index in enumerate(order):
            axes = grid[i, j]
            axes.imshow(images[index].permute(1, 2, 0).expand(-1, -1, 3).numpy())
            text = "query" if j == 0 else f"{similarity[i][others][j - 1]:.3f}"
            if groups is not None:
                text = f"{textwrap.shorten(names[groups[index]], 18, placeholder='…')}\n{text}"
            wrong = groups is not None and groups[index] != groups[query]
            axes.set_xlabel(text, fontsize=6, labelpad=2, fontweight="bold" if j == 0 else "normal")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="red" if wrong else "none", linewidth=2)
    text = "images drawn at random, then their nearest neighbours with the cosine similarity"
    text += "; red: of another class or cluster" if groups is not None else ""
    lines = [*_wrap(title, 15 * columns), *_wrap(text, 15 * columns)]
    figure.suptitle("\n".join(lines), fontsize=9, y=0.99)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- segmentation and detection
def class_colours():
    """uint8 [256, 3]: PASCAL VOC's colour of each class. Class 0 is black, 255 is light."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), int)
    for bit in range(8):                 # three bits of the number at a time go to red, green, and blue
        for channel in range(3):
            colours[:, channel] |= (numbers >> (3 * bit + channel) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def draw_segmentation(path, rows, height=128):
    """Writes a PNG with a row for each of some pictures: the picture, its classes, and the predicted ones.

    rows: of (uint8 [C, H, W], classes [H, W], classes [H, W]); height: of a row in pixels. Two such rows
    stand side by side.
    """
    from PIL import Image

    colours, strips = class_colours(), []
    for image, *maps in rows:
        size = max(1, round(height * image.shape[2] / image.shape[1])), height
        parts = [Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()).resize(size)]
        for numbers in maps:
            parts.append(Image.fromarray(colours[np.asarray(numbers)]).resize(size, Image.Resampling.NEAREST))
        framed = [np.pad(part, ((2, 2), (2, 2), (0, 0)), constant_values=255) for part in parts]
        strips.append(np.concatenate(framed, 1))
    _save_strips(path, strips)


def draw_detections(path, pictures, found, height=192, least=0.5):
    """Writes a PNG of pairs: the objects of a picture, and beside them what was found in it.

    pictures: a detection_sets.Pictures; found: list of (index, prediction); least: lowest score drawn.
    """
    import torch
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    strips = []
    for index, prediction in found:
        image, parts = pictures.images[index].expand(3, -1, -1)[None].float(), []
        scale = height / image.shape[2]
        size = height, max(1, round(scale * image.shape[3]))
        image = torch.nn.functional.interpolate(image, size)[0].byte()
        for objects in (pictures.target(index), prediction):
            names, drawn = [pictures.class_names[label] for label in objects["labels"].tolist()], image
            chosen = torch.ones(len(names), dtype=torch.bool)
            if "scores" in objects:
                chosen = objects["scores"] >= least
                scores = objects["scores"].tolist()
                names = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
            if "masks" in objects and chosen.any():
                masks = torch.nn.functional.interpolate(objects["masks"][chosen][None].float(), size)[0] > 0.5
                drawn = draw_segmentation_masks(drawn, masks, alpha=0.5, colors=GREEN)
            if chosen.any():
                names = [name for name, drawn_too in zip(names, chosen.tolist(), strict=True) if drawn_too]
                drawn = draw_bounding_boxes(drawn, scale * objects["boxes"][chosen], names, colors=YELLOW)
            drawn = drawn.permute(1, 2, 0).numpy()
            parts.append(np.pad(drawn, ((2, 2), (2, 2), (0, 0)), constant_values=255))
        strips.append(np.concatenate(parts, 1))
    _save_strips(path, strips)


def _save_strips(path, strips):
    """Writes a PNG of strips uint8 [h, w, 3] of one height, two side by side; none of no strips."""
    from PIL import Image

    if not strips:
        return
    width = max(strip.shape[1] for strip in strips)
    strips = [np.pad(strip, ((0, 0), (0, width + 8 - strip.shape[1]), (0, 0)), constant_values=255)
              for strip in strips]
    if len(strips) % 2:
        strips.append(np.full_like(strips[0], 255))
    pairs = [np.concatenate(strips[i:i + 2], 1) for i in range(0, len(strips), 2)]
    picture = io.BytesIO()
    Image.fromarray(np.concatenate(pairs)).save(picture, "PNG")
    write_atomically(path, picture.getvalue())
