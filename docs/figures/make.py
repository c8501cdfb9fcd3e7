"""Draws the figures of docs/method.md as SVG files beside this script.

    python docs/figures/make.py

architecture.svg: what happens to an image (after the paper's Figure 2). collapses.svg: the loss of the two
collapses and of the optimum; loss.py computes the numbers.
"""

import sys
from html import escape
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from loss import twist_loss  # noqa: E402

INK, GRAY, PALE, PAPER = "#1a1a1a", "#595959", "#eef2f7", "#ffffff"
BLUE, ORANGE = "#1f5fa8", "#b3500b"                    # of view 1 and view 2; dark enough on white
SHIRT = "-14,-22 -6,-25 0,-21 6,-25 14,-22 27,-9 20,0 14,-5 14,25 -14,25 -14,-5 -20,0 -27,-9"
NUM_IMAGES, NUM_CLASSES = 20, 10                       # of the heat maps


# ---------------------------------------------------------------- SVG
def text(x, y, words, size=14, fill=INK, anchor="middle", weight="normal"):
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
            f'font-weight="{weight}">{escape(words)}</text>')


def box(x, y, width, height, fill=PALE, stroke=GRAY):
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" '
            f'stroke="{stroke}"/>')


def line(points):
    return f'<polyline points="{points}" fill="none" stroke="{GRAY}"/>'


def arrow(points, stroke=INK, both_ends=False):
    start = ' marker-start="url(#head)"' if both_ends else ""
    return (f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-width="2" '
            f'marker-end="url(#head)"{start}/>')


def svg(width, height, title, description, elements):
    """The file's text. The white background keeps it readable on dark pages."""
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
             f'height="{height}" font-family="system-ui, sans-serif" role="img" '
             'aria-labelledby="title desc">',
             f'<title id="title">{escape(title)}</title>', f'<desc id="desc">{escape(description)}</desc>',
             '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
             f'orient="auto-start-reverse"><path d="M0,0 L10,5 L0,10 z" fill="{INK}"/></marker></defs>',
             f'<rect width="{width}" height="{height}" fill="{PAPER}"/>', *elements, "</svg>"]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the method
def picture(x, y, number, change, shade, colour):
    """A square of 84 pixels with a shirt; `change` is what a view does to it."""
    square = f'<rect x="{x}" y="{y}" width="84" height="84"'
    return (f'<clipPath id="clip{number}">{square}/></clipPath>'
            f'<g clip-path="url(#clip{number})">{square} fill="#2b2b2b"/><polygon points="{SHIRT}" '
            f'transform="translate({x + 42},{y + 42}) {change}" fill="{shade}"/></g>'
            f'{square} fill="none" stroke="{colour}" stroke-width="3"/>')


def bars(x, y, shares, colour):
    """A distribution over classes in a box of 120 × 84 pixels."""
    width = 120 / len(shares)
    drawn = [box(x, y, 120, 84, PAPER)]
    for k, share in enumerate(shares):
        height = round(72 * share, 1)
        drawn.append(f'<rect x="{x + k * width + 2:g}" y="{y + 84 - height:g}" width="{width - 4:g}" '
                     f'height="{height:g}" fill="{colour}"/>')
    return "".join(drawn)


def architecture():
    """The text of architecture.svg."""
    title = "TWIST: from an image to the loss"
    description = (
        "An image gives two random views. Both go through one network with the same weights: backbone, "
        "projection head, NBS (batch norm without scale and shift), softmax. Each view ends in a class "
        "distribution. The loss asks that the two agree (consistency), that each image falls into one class "
        "(sharpness), and that the batch covers all classes (diversity).")
    top, bottom = 92, 232                              # the middle of the two rows
    parts = [text(500, 26, title, 17, weight="bold"),
             picture(20, 120, 0, "scale(1.25)", "#d9d9d9", GRAY), text(62, 226, "image i"),
             picture(160, top - 42, 1, "translate(8,-4) scale(1.75)", "#ffffff", BLUE),
             picture(160, bottom - 42, 2, "translate(-6,6) scale(-1.5,1.5)", "#8c8c8c", ORANGE),
             text(202, top + 60, "view 1", fill=BLUE), text(202, bottom + 60, "view 2", fill=ORANGE),
             arrow(f"104,150 130,150 130,{top} 156,{top}"),
             arrow(f"104,174 130,174 130,{bottom} 156,{bottom}"),
             box(276, 44, 354, 236), text(453, 300, "one network, the same weights for both views", 13, GRAY)]
    for x, width, name, what in ((288, 88, "backbone", "features"), (388, 68, "head", "logits"),
                                 (468, 64, "NBS", "mean 0"), (544, 74, "softmax", "")):
        parts += [box(x, 60, width, 204, PAPER), text(x + width / 2, 158, name, weight="bold")]
        if what:
            parts.append(text(x + width / 2, 178, what, 12, GRAY))
    for y, colour, shares, name in ((top, BLUE, (.03, .06, .74, .02, .05, .04, .03, .03), "P¹ᵢ"),
                                    (bottom, ORANGE, (.04, .10, .62, .03, .08, .05, .04, .04), "P²ᵢ")):
        parts += [arrow(f"244,{y} 284,{y}"), arrow(f"376,{y} 385,{y}"), arrow(f"456,{y} 465,{y}"),
                  arrow(f"532,{y} 541,{y}"), arrow(f"618,{y} 656,{y}"), line(f"780,{y} 794,{y}"),
                  bars(660, y - 42, shares, colour)]
        parts.append(text(720, y - 50 if y == top else y + 60, f"{name}, over the classes", 13, colour))
    parts += [arrow(f"720,{top + 47} 720,{bottom - 47}", both_ends=True)]
    for y, name, what, how in ((84, "consistency", "the two views agree", "KL between P¹ᵢ and P²ᵢ: small"),
                               (162, "sharpness", "an image is in one class", "entropy of each Pᵢ: small"),
                               (240, "diversity", "all classes are used", "entropy of the mean P: large")):
        parts += [line(f"794,{y} 806,{y}"), box(806, y - 34, 176, 68),
                  text(894, y - 14, name, weight="bold"), text(894, y + 5, what, 13),
                  text(894, y + 23, how, 11, GRAY)]
    parts += [line("794,84 794,240"),
              text(500, 334, "loss = consistency + α · sharpness − β · diversity", 15, weight="bold")]
    return svg(1000, 352, title, description, parts)


# ---------------------------------------------------------------- the two collapses
def outputs():
    """Yields (name, what happens, logits [B, C]) of the three cases. A logit of 100 is a probability of 1."""
    yield "Every output is uniform", "diverse, but not sharp", torch.zeros(NUM_IMAGES, NUM_CLASSES)
    one_class = torch.zeros(NUM_IMAGES, NUM_CLASSES)
    one_class[:, 3] = 100
    yield "All images are in one class", "sharp, but not diverse", one_class
    balanced = torch.zeros(NUM_IMAGES, NUM_CLASSES)
    images = torch.arange(NUM_IMAGES)
    balanced[images, (7 * images + 3) % NUM_CLASSES] = 100
    yield "Each class has its share", "sharp and diverse: the optimum", balanced


def heat_map(left, top, width, height, rows):
    """Probabilities, a cell of width × height each, white to blue. One rectangle has all the lowest."""
    lowest = min(map(min, rows))
    cells = [(0, 0, len(rows[0]), len(rows), lowest)]
    for i, row in enumerate(rows):
        cells += [(k, i, 1, 1, share) for k, share in enumerate(row) if share > lowest + 1e-6]
    drawn = []
    for k, i, columns, lines, share in cells:
        shade = ",".join(str(round(255 + share * (dark - 255))) for dark in (31, 95, 168))
        drawn.append(f'<rect x="{left + k * width}" y="{top + i * height}" width="{columns * width}" '
                     f'height="{lines * height}" fill="rgb({shade})"/>')
    grid = [f"M{left},{top + i * height} h{len(rows[0]) * width}" for i in range(len(rows) + 1)]
    grid += [f"M{left + k * width},{top} v{len(rows) * height}" for k in range(len(rows[0]) + 1)]
    return "".join(drawn) + f'<path d="{" ".join(grid)}" stroke="#d0d7de" stroke-width="0.5"/>'


def collapses():
    """The text of collapses.svg."""
    title = "Two collapses and the optimum"
    parts, told, cell = [text(480, 26, title, 17, weight="bold")], [], 16
    for number, (name, what, logits) in enumerate(outputs()):
        loss = twist_loss(torch.stack([logits, logits]), eps=0)        # the two views agree
        values = {}
        for field, value in loss._asdict().items():
            values[field] = f"{round(value.item(), 2) + 0.0:.2f}".replace("-", "−")      # + 0.0: not -0.00
        left, top, side = 90 + number * 310, 84, cell * NUM_CLASSES
        parts += [text(left + side / 2, 56, name, weight="bold"), text(left + side / 2, 74, what, 13, GRAY)]
        parts.append(heat_map(left, top, cell, 11, logits.softmax(-1).tolist()))
        below = top + 11 * NUM_IMAGES
        parts += [text(left + side / 2, below + 18, f"{NUM_CLASSES} classes", 12, GRAY),
                  f'<g transform="translate({left - 10},{top + 110}) rotate(-90)">'
                  f'{text(0, 0, f"batch of {NUM_IMAGES} images", 12, GRAY)}</g>']
        for line, field in enumerate(("consistency", "sharpness", "diversity", "total")):
            weight, label = ("bold", "loss") if field == "total" else ("normal", field)
            y = below + 44 + 20 * line
            parts += [text(left, y, label, anchor="start", weight=weight),
                      text(left + side, y, values[field], anchor="end", weight=weight)]
        told.append(f"{name}: consistency {values['consistency']}, sharpness {values['sharpness']}, "
                    f"diversity {values['diversity']}, loss {values['total']}.")
    parts.append(text(480, 428, "Dark: probability 1; white: probability 0. Entropies in nats; "
                      "α = β = 1, ln 10 = 2.30.", 12, GRAY))
    return svg(960, 444, title, " ".join(told), parts)


FIGURES = {"architecture.svg": architecture, "collapses.svg": collapses}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / name).write_text(draw(), encoding="utf-8")
