"""Pieces of the page that report.py writes: HTML in which everything is escaped, tables, curves and a map.

Colours, fonts and the script that sorts tables and moves in the map are in report.html.
"""

import base64
import hashlib
import io
import json
import math
import re
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoint import printable

TEMPLATE = Path(__file__).with_name("report.html")

# ---------------------------------------------------------------- HTML
def clean(text):
    """A text with what cannot be printed as escapes, as invalid UTF-8 in a file name; lines stay lines."""
    return re.sub(r"[^\n\u00a0]+", lambda found: printable(found[0]), str(text))


class Html(str):
    """Text that is HTML already. `tag` escapes all other text, so that no file name becomes an element."""


def tag(name, *children, **attributes):
    """<name attribute="…">children</name>. class_ is the attribute class, aria_label is aria-label."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(clean(value))}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if name in ("img", "input") else f"{opened}{join(*children)}</{name}>")


def join(*children):
    """The children one after the other, escaped unless they are Html. Lists are joined, None is left out."""
    parts = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(*child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else escape(clean(child)))
    return Html("".join(parts))


def percent(share):
    return f"{100 * share:.1f}\u00a0%"                                            # no line ends before the %


def number(value):
    """A cell of `table`: a share or another score with four decimals, a count, or – for None."""
    if value is None:
        return "–", "number", ""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}", "number", value


def table(caption, heads, rows, class_=None):
    """A table whose columns are sorted by buttons. The first cell of a row is its heading.

    rows: lists of cells, each a text, or a tuple (text, class, value to sort by).
    """
    heads = [tag("th", tag("button", tag("span", head), type="button"), scope="col") for head in heads]
    body = []
    for first, *cells in rows:
        row = [tag("th", first, scope="row")]
        for cell in cells:
            text, kind, value = cell if isinstance(cell, tuple) else (cell, None, None)
            row.append(tag("td", text, class_=kind, data_value=value))
        body.append(tag("tr", row))
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", heads)), tag("tbody", body),
                class_=class_)
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


# ---------------------------------------------------------------- pictures
def data_uri(image):
    """The data: URI of a picture, uint8 [C, H, W]: PNG up to 32 pixels, where JPEG blurs, else JPEG."""
    pixels = image.permute(1, 2, 0).numpy()
    kind, options = ("png", {"optimize": True}) if max(image.shape) <= 32 else ("jpeg", {"quality": 80})
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def strip(label, pictures, class_="strip"):
    """A list of pictures. Each is (data: URI or None, text alternative, text beneath, is it framed)."""
    items = []
    for uri, about, text, framed in pictures:
        picture = tag("img", src=uri, alt=about, title=about) if uri else tag("span", about, class_="gone")
        items.append(tag("li", picture, tag("span", text), class_="framed" if framed else None))
    return tag("ul", items, class_=class_, aria_label=label)


# ---------------------------------------------------------------- curves
def ticks(low, high):
    """Two to six round numbers from low to high."""
    unit = 10 ** math.floor(math.log10(high - low))
    step = unit * next(factor for factor in (0.2, 0.5, 1, 2) if high - low <= 5.001 * factor * unit)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def curves(title, lines, bounds=(), log=False):
    """A <figure> with lines over the steps and a legend with their first and last values.

    lines: {name: [(step, value), ...]}; bounds: pairs (value, name), drawn as horizontal lines; log: of the
    values. Values that are not finite, or with log not positive, are left out.
    """
    width, height, left, right, top, bottom = 480, 240, 46, 12, 10, 26
    scale, sound = math.log10 if log else float, {}
    ys = [scale(y) for y, _ in bounds]
    for name, points in lines.items():
        points = [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
        if points:
            sound[name] = [*points[:-1:len(points) // 400 + 1], points[-1]]       # more than pixels is no use
            ys += [scale(y) for _, y in sound[name]]
    last = max((points[-1][0] for points in sound.values()), default=1)
    ys = ys or [0]
    margin = 0.04 * (max(ys) - min(ys)) or 0.5
    y0, y1 = min(ys) - margin, max(ys) + margin

    def across(x):
        return left + (width - left - right) * x / last

    def down(y):                                                                  # y: scaled
        return top + (height - top - bottom) * (y1 - y) / (y1 - y0)

    drawn, legend = [], []
    for y in ticks(y0, y1):
        text = f"{10 ** y if log else y:.4g}"
        drawn += [tag("path", class_="grid", d=f"M{left} {down(y):.1f}H{width - right}"),
                  tag("text", text, x=left - 6, y=f"{down(y) + 4:.1f}", text_anchor="end")]
    for x in ticks(0, last):
        drawn.append(tag("text", f"{x:,.0f}", x=f"{across(x):.1f}", y=height - 8, text_anchor="middle"))
    for y, name in bounds:
        drawn.append(tag("path", class_="bound", d=f"M{left} {down(scale(y)):.1f}H{width - right}"))
        legend.append(tag("li", swatch("bound"), f"{name}: {y:.4g}"))
    for i, (name, points) in enumerate(sound.items()):
        path = "L".join(f"{across(x):.1f} {down(scale(y)):.1f}" for x, y in points)
        drawn += [tag("path", class_=f"curve c{i % 10}", d=f"M{path}"),
                  tag("path", class_=f"dots c{i % 10}", d=f"M{path.split('L')[-1]}h0")]          # its end
        legend.append(tag("li", swatch(f"curve c{i % 10}"),
                          f"{name}: {points[0][1]:.4g} → {points[-1][1]:.4g}"))
    about = f"{title}: curves up to step {last:,}; the list has their first and last values"
    svg = tag("svg", drawn, viewBox=f"0 0 {width} {height}", role="img", aria_label=about)
    return tag("figure", tag("figcaption", title), svg, tag("ul", legend, class_="legend"))


def swatch(kind):
    """A short piece of a line, or a dot, for a legend."""
    shape = "M13 6h0" if kind.startswith("dots") else "M2 6H24"
    return tag("svg", tag("path", class_=kind, d=shape), class_="swatch", viewBox="0 0 26 12",
               aria_hidden="true")


# ---------------------------------------------------------------- a map
def point_map(points, groups, names, about, marks):
    """A map of points, with a slider through those that have a picture.

    points: [N, 2]; groups: [N], the ten largest have colours; names: of the groups; about: text alternative;
    marks: {row of points: (data: URI, text)}.
    """
    width, margin = 640, 14
    spread = np.maximum(np.ptp(points, 0), 1e-9)
    scale = (width - 2 * margin) / max(spread[0], spread[1] / 0.8)                # the same for both axes
    places = np.round((points - points.min(0)) * [scale, -scale] + [margin, spread[1] * scale + margin])
    places = places.astype(int)
    sizes = np.bincount(groups, minlength=len(names))
    largest = np.argsort(-sizes, kind="stable")[:10]
    kinds = {"dots other": ("others", ~np.isin(groups, largest))}
    kinds |= {f"dots c{i}": (names[group], groups == group) for i, group in enumerate(largest)}
    drawn, legend = [], []
    for kind, (name, members) in kinds.items():
        if members.any():
            path = "".join(f"M{x} {y}h0" for x, y in places[members].tolist())    # lines of length 0 are dots
            drawn.append(tag("path", class_=kind, d=path))
            legend.append(tag("li", swatch(kind), f"{name}: {members.sum():,}"))
    height = int(spread[1] * scale) + 2 * margin
    svg = tag("svg", drawn, tag("circle", class_="mark", r=9), viewBox=f"0 0 {width} {height}", role="img",
              aria_label=about)
    figure = tag("figure", svg, tag("ul", legend, class_="legend"), class_="map")
    if not marks:
        return figure
    shown = [{"x": int(places[i, 0]), "y": int(places[i, 1]), "src": uri, "text": clean(text)}
             for i, (uri, text) in marks.items()]
    data = json.dumps(shown).replace("<", "\\u003c")                              # no </script> in a name
    slider = tag("label", f"Move over the map, or through {len(shown)} of its images: ",
                 tag("input", type="range", min=0, max=len(shown) - 1, value=0), hidden="hidden")
    peek = tag("p", tag("img", src=shown[0]["src"], alt=shown[0]["text"]),
               tag("output", shown[0]["text"], aria_live="polite"), class_="peek")
    data = tag("script", Html(data), type="application/json")
    return tag("div", figure, peek, slider, data, class_="explore")


# ---------------------------------------------------------------- the page
def fill(title, introduction, sections):
    """The page, bytes: report.html with a title, and sections {id: (heading, content)}.

    The page allows the browser nothing but data: URIs and its own style and script, known by their SHA-256.
    """
    template, values = TEMPLATE.read_text(), {}
    for kind in ("style", "script"):
        text = re.search(f"<{kind}>(.*?)</{kind}>", template, re.DOTALL)[1]
        values[kind.upper()] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    links, parts = [], []
    for ident, (heading, content) in sections.items():
        links.append(tag("li", tag("a", heading, href=f"#{ident}")))
        parts.append(tag("section", tag("h2", heading, id=ident), content, aria_labelledby=ident))
    values |= {"TITLE": join(title), "LINKS": join(links), "INTRODUCTION": join(introduction),
               "SECTIONS": join(parts)}
    return re.sub("@([A-Z]+)@", lambda found: values[found[1]], template).encode()
