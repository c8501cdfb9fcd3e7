"""report.py writes one page whose numbers are those of the files, whatever files and classes are called."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shlex
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, STAGES, losses, metrics_of, run, saved_network

from cli import parse_args
from data import build_dataset
from page import Html, curves, data_uri, join, table, tag, ticks
from results import EVALUATIONS, Evaluation, find_evaluations, read_assignments, read_features, read_results

HOSTILE = "<img src=x onerror=alert(1)>.jpg"
HOSTILE_CLASS = '</script><script>alert("1")</script>&amp;'


class Page(HTMLParser):
    """elements: (name, attributes, section) of each; texts: of each section; tables: {caption: rows};
    scripts: their contents by type."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.texts, self.tables, self.scripts, self.open = [], {}, {}, {}, []
        self.section = self.cell = self.caption = None
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        if name == "section":
            self.section = attributes["aria-labelledby"]
        self.elements.append((name, attributes, self.section))
        if name not in ("img", "input", "meta"):
            self.open.append((name, attributes))
        if name == "table":
            self.rows = []
        elif name == "tr":
            self.rows.append([])
        elif name in ("td", "th", "caption"):
            self.cell = ""

    def handle_endtag(self, name):
        assert self.open.pop()[0] == name, f"{name} is not closed in turn"
        if name == "caption":
            self.caption = self.cell
        elif name in ("td", "th"):
            self.rows[-1].append(self.cell)
        elif name == "table":
            self.tables[self.caption] = self.rows
        elif name == "section":
            self.section = None

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1].get("type")] = data
        else:
            self.texts[self.section] = self.texts.get(self.section, "") + data.replace("\u00a0", " ")
            self.cell = None if self.cell is None else self.cell + data.replace("\u00a0", " ")

    def all(self, name, section=None):
        return [attributes for found, attributes, where in self.elements
                if found == name and section in (None, where)]


def evaluate(folder, flags="", cluster_flags="", more=()):
    """Runs the evaluations that have pictures, and more of them, in folders of the run's folder."""
    for command in (f"cluster_eval.py {cluster_flags} --contact-sheets 0 --output-dir {folder}/classes",
                    f"embed.py --queries 1 --output-dir {folder}/features", *more):
        run(f"{command} --checkpoint {folder}/checkpoint.pth {flags} --device cpu --workers 0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on `fake`, long enough for ten classes, with all its evaluations."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run("pretrain.py --data fake --image-size 16 --batch-size 40 --epochs 6 --hidden-dim 32 --restarts 1 "
        f"--knn-every 3 --device cpu --output-dir {out}")
    evaluate(out, cluster_flags="--pixel-kmeans", more=(
        f"knn.py --k 5 20 --output-dir {out}/knn",
        f"lincls.py --epochs 1 --lrs 0.3 --output-dir {out}/linear",
        f"semisup.py --epochs 1 --label-fraction 0.5 --output-dir {out}/few"))
    return out


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained run, to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def hostile_folder(folder):
    """A run, and evaluations of pictures in two classes, all with odd names; a file names the classes."""
    rng = np.random.default_rng(0)
    names = [HOSTILE.encode(), b"new\nline.png", b"\xff\xfe.png", "‮gnp.exe.png".encode(), b"'\"&amp;.png"]
    names += [f"é {i:02}.png".encode() for i in range(15)]
    for c, kind in enumerate(("<b>bold", "a&b")):
        (folder / "data" / kind).mkdir(parents=True)
        for name in names:
            pixels = (rng.integers(0, 128, (40, 50, 3)) + 100 * c).astype(np.uint8)
            path = os.path.join(os.fsencode(folder / "data" / kind), name)
            Image.fromarray(pixels).save(path, "PNG")        # whatever it is called
    (folder / "names.txt").write_text(f"{HOSTILE_CLASS}\nplain\n")
    (folder / "run").mkdir()
    saved_network(folder / "run" / "checkpoint.pth", f"--image-size 16 --data {folder}/data")
    evaluate(folder / "run", f"--class-names {folder}/names.txt")
    return folder / "run"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return hostile_folder(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def report(here):
    """report(folder, ...) -> its Page, without warnings."""
    def of(*folders, warns=False):
        for cached in (read_assignments, read_features):     # a process of its own would read the files anew
            cached.cache_clear()
        out, err = here(f"report.py {' '.join(map(shlex.quote, map(str, folders)))}")
        assert bool(err) == warns, err
        path = folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
        assert out.splitlines()[-1] == str(path)
        return Page(path)
    return of


# ---------------------------------------------------------------- numbers
def test_numbers_are_those_of_the_files(report, trained):
    page = report(trained)
    clusters, knn = metrics_of(trained / "classes"), metrics_of(trained / "knn")
    head, *rows = page.tables["Scores"]
    shown = {(row[0], row[4]): (row[1], row[2]) for row in rows}
    expected = {("ACC", "classes"): clusters["acc"], ("NMI", "classes"): clusters["nmi"],
                ("ACC, top 5", "classes"): clusters["acc_top5"],
                ("k-means on pixels: ACC", "classes"): clusters["pixel_kmeans"]["acc"],
                ("20-NN, top 1", "knn"): knn["top1"]["20"], ("5-NN, top 5", "knn"): knn["top5"]["5"]}
    linear, few = metrics_of(trained / "linear")["results"][0], metrics_of(trained / "few")
    expected[f"linear, {linear['features']}, top 1", "linear"] = linear["test_top1"]
    expected[f"fine-tuned on {few['num_train']} labels, test images, top 1", "few"] = few["test_top1"]
    for (name, folder), value in expected.items():
        assert shown[name, str(trained / folder)] == (f"{value:.4f}", "256")
    assert len(rows) == len(shown) == 13 + 4 + 2 + 2         # clusters twice, k-NN, linear, few labels
    assert f"{clusters['acc']:.3f}" in page.texts[None] and f"{knn['top1']['20']:.3f}" in page.texts[None]
    found = page.texts["found"]
    assert "256 images of fake (test part) into 10 classes" in found
    purities = [row["purity"] for row in clusters["clusters"]]
    for share in (clusters["acc"], clusters["pixel_kmeans"]["acc"], max(purities), min(purities)):
        assert f"{100 * share:.1f} %" in found
    first, *_, last = losses(trained)
    assert "is finished: 72 steps" in page.texts["trust"] and f"{last['mi']:.2f} nats" in page.texts["trust"]
    assert f"{100 * last['mi_ratio']:.1f} % of ln 10 = 2.30" in page.texts["trust"]
    watched = [entry["knn_monitor"] for entry in losses(trained) if "knn_monitor" in entry]
    for name, a, b in (("sharpness", first["sharpness"], last["sharpness"]), ("20-NN in training", *watched)):
        assert f"{name}: {a:.4g} → {b:.4g}" in page.texts["training"]
    command = f"--output-dir {trained}\n"
    assert command in page.texts["settings"] and "python knn.py --checkpoint" in page.texts["settings"]


def test_confusions_are_counted_from_the_assignments(report, trained):
    page = report(trained)
    with open(trained / "classes/assignments.csv", newline="") as file:
        pairs = [(row["label_name"], row["mapped_name"]) for row in csv.DictReader(file)]
    matrix, = (rows for caption, rows in page.tables.items() if caption.startswith("Confusion matrix"))
    (_, *classes), *rows = matrix
    assert classes == [f"class {c}" for c in range(10)]
    for label, *cells in rows:
        total = sum(a == label for a, _ in pairs)
        for name, cell in zip(classes, cells, strict=True):
            assert cell == f"{100 * pairs.count((label, name)) / total:.0f}"
    _, first, *_ = page.tables["The most frequent confusions"]
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    assert int(first[2]) == wrong.count(tuple(first[:2])) == max(map(wrong.count, wrong)) > 1


def test_pictures_are_those_that_they_are_called(report, trained):
    page, images = report(trained), build_dataset("fake", "test").images
    with open(trained / "classes/assignments.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    largest = str(metrics_of(trained / "classes")["clusters"][0]["cluster"])
    order = sorted((row for row in rows if row["prediction"] == largest),
                   key=lambda row: -float(row["probability"]))
    shown = [*order[:8], *order[8:][-8:]]
    pictures = page.all("img", "classes")
    for picture, row in zip(pictures[:16], shown, strict=True):
        about = f"image {row['index']}, {row['label_name']}, probability {float(row['probability']):.2f}"
        assert picture["alt"] == about
    for picture in [*pictures, *page.all("img", "neighbours")]:
        index = int(re.match(r"image (\d+),", picture["alt"])[1])
        assert (pixels_of(picture["src"]) == images[index].permute(1, 2, 0).numpy()).all()
    clusters = metrics_of(trained / "classes")["clusters"]
    wrong = sum(row["label_name"] != clusters[0]["majority"] for row in shown)
    _, first, *others = page.source.split("<article")
    assert first.count('class="framed"') == wrong > 0 and len(others) == len(clusters) - 1
    marks = json.loads(page.scripts["application/json"])
    assert len(marks) == 200
    with np.load(trained / "features/features.npz") as arrays:
        for mark in marks:
            name, index = re.fullmatch(r"(.*), image (\d+)", mark["text"]).groups()
            assert arrays["class_names"][arrays["labels"][int(index)]] == name
            assert (pixels_of(mark["src"]) == images[int(index)].permute(1, 2, 0).numpy()).all()


def pixels_of(uri):
    kind, content = re.fullmatch(r"data:image/(\w+);base64,(.*)", uri).groups()
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.format.lower() == kind
        return np.asarray(image)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_data_uri(shape):
    image = torch.arange(np.prod(shape)).view(shape).remainder(256).to(torch.uint8)
    pixels = pixels_of(data_uri(image))
    assert pixels.shape[:2] == shape[1:]
    if shape[1] <= 32:                                       # PNG loses nothing
        assert (pixels.reshape(*shape[1:], shape[0]) == image.permute(1, 2, 0).numpy()).all()


# ---------------------------------------------------------------- the page
@pytest.mark.parametrize("which", ["trained", "hostile"])
def test_page_is_sound(report, which, request):
    page = report(request.getfixturevalue(which))
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and page.all("html")[0]["lang"] == "en"
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    for _, attributes, _ in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    assert all(picture["alt"] for picture in page.all("img")) and len(page.all("img")) > 20
    hidden = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert hidden and all(svg["role"] == "img" and svg["aria-label"] for svg in hidden)
    levels = [int(name[1]) for name, _, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(len(page.all(landmark)) == 1 for landmark in ("header", "nav", "main", "footer", "title"))
    assert len(page.all("caption")) == len(page.all("table")) == len(page.tables) > 0
    assert all(head["scope"] in ("row", "col") for head in page.all("th"))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for kind in ("style", "script"):
        text = re.search(f"<{kind}>(.*?)</{kind}>", page.source, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert len(page.source) < 3e6 and "://" not in re.sub(r"'sha256-[^']*'|data:[^\"]*", "", page.source)


def test_names_stay_text(report, hostile):
    page = report(hostile)
    marks = json.loads(page.scripts["application/json"])
    assert set(page.scripts) == {None, "application/json"} and "alert" not in page.scripts[None]
    assert {HOSTILE, "new\\nline.png", "\\udcff\\udcfe.png", "\\u202egnp.exe.png"} <= {
        mark["text"].split(", ", 1)[1] for mark in marks}
    assert any(mark["text"].startswith(f"{HOSTILE_CLASS}, ") for mark in marks)
    alts = [picture["alt"] for picture in page.all("img")]
    assert sum(alt.startswith(f"{HOSTILE}, ") for alt in alts) >= 1
    assert HOSTILE_CLASS in page.tables["The most frequent confusions"][1][:2]
    assert not any(attributes.get("src") == "x" for attributes in page.all("img")) and not page.all("b")
    assert str(hostile.parent) not in page.texts["classes"] + "".join(alts)      # names, not whole paths


def test_everything_is_escaped_unless_it_is_html():
    assert join("<&>", ["\"'", Html("<br>"), None], 3) == "&lt;&amp;&gt;&quot;&#x27;<br>3"
    link = tag("a", "x", class_="b", aria_label='"<\n', hidden=None)
    assert link == '<a class="b" aria-label="&quot;&lt;\n">x</a>'
    assert join("a\nb\u00a0c\x00\udcff\u202e") == "a\nb\u00a0c\\x00\\udcff\\u202e"
    assert "<i>" not in table("<i>", ["<i>"], [["<i>", ("<i>", "<i>", "<i>")]])
    assert "<i>" not in curves("<i>", {"<i>": [(1, 2.0)]}, [(1, "<i>")])


@pytest.mark.parametrize("low, high", [(0, 1), (0, 468), (3.1, 3.1001), (-1e-9, 2e-9), (0, 5e6)])
def test_ticks_are_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low - 1e-12 <= found[0] and found[-1] <= high * (1 + 1e-6)


def test_curves_are_where_their_numbers_are():
    drawn = curves("loss", {"a": [(0, 0.0), (10, 1.0), (20, float("nan")), (20, 0.5)]})
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split()) for pair in
                                    re.search(r'class="curve c0" d="M(.*?)"', drawn)[1].split("L"))
    assert x1 - x0 == x2 - x1 > 0 and y1 < y2 < y0 and abs(y0 + y1 - 2 * y2) < 0.2
    assert "nan" not in drawn and "a: 0 → 0.5" in drawn
    logs = curves("loss", {"a": [(0, 1.0), (1, 10.0), (2, 100.0), (3, -1.0)]}, log=True)
    y = [float(pair.split()[1]) for pair in re.search(r'curve c0" d="M(.*?)"', logs)[1].split("L")]
    assert len(y) == 3 and abs(y[0] - 2 * y[1] + y[2]) < 0.3
    assert "<svg" in curves("empty", {"a": [(1, float("inf"))]})


# ---------------------------------------------------------------- what is missing
@pytest.mark.slow
def test_what_is_missing_is_named_with_a_command_that_makes_it(report, copy, monkeypatch):
    for folder in ("classes", "features", "knn", "linear", "few"):
        shutil.rmtree(copy / folder)
    page = report(copy)
    for ident in ("found", "classes", "confusions", "map", "neighbours", "scores"):
        assert "Not here" in page.texts[ident]
    commands = set(re.findall(r"python \w+\.py --checkpoint .*", page.texts["scores"]))
    assert commands >= set(re.findall(r"python \w+\.py --checkpoint .*", page.texts["map"])) > set()
    of_other_data = {"svm", "transfer", "finetune", "segment", "detect"}
    assert {words.split()[1][:-3] for words in commands} == EVALUATIONS.keys() - of_other_data
    for command in commands:
        _, script, *words = shlex.split(command)
        args = parse_args(__import__(script[:-3]).get_parser(), words)
        assert args.checkpoint == str(copy / "checkpoint.pth") and args.output_dir.startswith(str(copy))
    run(next(command for command in commands if "cluster_eval" in command).removeprefix("python "))
    assert "Not here" not in report(copy).texts["found"]


@pytest.mark.slow
def test_clusters_of_a_run_without_classes_are_suggested(report, tmp_path):
    run(f"barlow.py {STAGES['barlow']} --device cpu --output-dir {tmp_path}/run")
    page = report(tmp_path / "run")
    assert "cluster_eval.py --checkpoint" in page.texts["found"] and "--kmeans 10" in page.texts["found"]
    assert "invariance" in page.texts["training"] and "Not collapsed" in page.texts["trust"]
    run(f"cluster_eval.py --checkpoint {tmp_path}/run/checkpoint.pth --kmeans 4 --kmeans-starts 1 "
        f"--contact-sheets 0 --device cpu --output-dir {tmp_path}/run/classes")
    page = report(tmp_path / "run")
    assert "into 4 classes" in page.texts["found"] and "similarity" in page.texts["classes"]
    assert "k-means, K = 4: ACC" in {row[0] for row in page.tables["Scores"]}


def test_pictures_without_labels(report, hostile, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(hostile.parent / "data/a&b", flat)
    shutil.copytree(hostile, tmp_path / "run", ignore=shutil.ignore_patterns("classes", "features"))
    evaluate(tmp_path / "run", f"--data '{flat}'")
    page = report(tmp_path / "run")
    assert "There are no labels" in page.texts["found"] and "no labels" in page.texts["confusions"]
    sizes = [row["size"] for row in metrics_of(tmp_path / "run/classes")["clusters"]]
    assert len(page.all("img", "classes")) == sum(min(16, size) for size in sizes) > 0
    assert "cluster " in page.texts["map"]
    for path in flat.iterdir():
        path.unlink()
    gone = report(tmp_path / "run")
    assert "Pictures are missing" in gone.texts["classes"] and not gone.all("img")
    assert HOSTILE in gone.texts["classes"]


def test_evaluations_beside_a_run_count_if_they_name_it(report, copy):
    (copy / "knn").rename(copy.parent / "knn")
    shutil.copytree(copy / "classes", copy.parent / "other")                     # of another run
    metrics = metrics_of(copy.parent / "knn") | {"checkpoint": str(copy / "checkpoint.pth")}
    (copy.parent / "knn/metrics.json").write_text(json.dumps(metrics))
    folders = {row[4] for row in report(copy).tables["Scores"][1:]}
    assert str(copy.parent / "knn") in folders and str(copy.parent / "other") not in folders


# ---------------------------------------------------------------- what went wrong
@pytest.mark.parametrize("line, said", [
    ({"step": 20, "status": "stopped by SIGTERM, saved"}, "Not finished: step 72 of 72, stopped by SIGTERM"),
    ({"step": 72, "loss": 0.0, "mi": 0.0, "mi_ratio": 0.0, "classes": 1.0, "sharpness": 0.0,
      "collapsed": "one-class"}, "Collapsed (one-class): all images are in one class. Do not use it.")])
def test_a_run_that_went_wrong(report, copy, line, said):
    with open(copy / "log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\n")
    trust = report(copy).texts["trust"]
    assert said in trust and ("Not collapsed" in trust) == ("collapsed" not in line)


def test_few_steps_are_named(report, copy):
    assert "72 steps. These are few: plan for hundreds" in report(copy).texts["trust"]
    with open(copy / "log.jsonl", "a") as log:
        log.write(json.dumps(losses(copy)[-1] | {"step": 200}) + "\n")
    trust = report(copy).texts["trust"]
    assert "200 steps." in trust and "few" not in trust


def test_classes_that_only_the_training_uses_are_named(report, copy):
    assert "classes in use, where" not in report(copy).texts["trust"]
    metrics = metrics_of(copy / "classes") | {"num_clusters_used": 1}
    (copy / "classes/metrics.json").write_text(json.dumps(metrics))
    trust = report(copy).texts["trust"]
    assert f"{copy}/classes has only 1 classes in use, where" in trust and "--bn-images 1000" in trust


def test_an_old_evaluation_is_named(report, copy):
    assert "older" not in report(copy).texts["trust"]
    os.utime(copy / "knn/metrics.json", (1e9, 1e9))
    assert f"{copy}/knn is older than the checkpoint" in report(copy).texts["trust"]


def damage(path, content=None):
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2] if content is None else content)


@pytest.mark.parametrize("file, content, section", [
    ("classes/assignments.csv", None, "classes"), ("classes/assignments.csv", b"", "confusions"),
    ("features/features.npz", None, "map"), ("features/features.npz", b"PK", "neighbours"),
    ("classes/metrics.json", b'{"num_clusters": 10}', "found"), ("knn/metrics.json", b"{", "scores"),
    ("knn/metrics.json", b"[1]", "scores"), ("knn/metrics.json", b'{"temperature": 1}', "scores")])
def test_a_damaged_file_costs_a_section(report, copy, file, content, section):
    before = report(copy)
    damage(copy / file, content)
    page = report(copy, warns=True)
    assert "left out" in page.texts[section] or "Not here" in page.texts[section]
    assert page.texts["trust"] == before.texts["trust"] and page.texts["training"] == before.texts["training"]


@pytest.mark.parametrize("command, named", [
    ("{tmp}/empty", "empty: holds no run"), ("{tmp}/nowhere", "nowhere: holds no run"),
    ("{run} {tmp}/empty", "empty: holds no run"), ("{run}/knn", "knn: holds no run"),
    ("{run} --output {run}/checkpoint.pth", "is not an .html file"), ("", "required: OUTPUT_DIR"),
    ("{run} --output {tmp}/nowhere/a.html", "cannot be written"),
    ("{run} --images-per-class 1", "at least 2")])
def test_bad_command_is_one_line(here, copy, tmp_path, command, named):
    (tmp_path / "empty").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    _, err = here(f"report.py {command.format(run=copy, tmp=tmp_path)}", code=2)
    assert named in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_that_begins_anew_has_no_page(here, copy):
    (copy / "report.html").write_text("old")
    here(f"pretrain.py {STAGES['pretrain']} --device cpu --overwrite --output-dir {copy}")
    assert not (copy / "report.html").exists()


# ---------------------------------------------------------------- several runs
def test_comparison(report, trained, copy):
    config = json.loads((copy / "config.json").read_text()) | {"alpha": 0.25}
    (copy / "config.json").write_text(json.dumps(config))
    shutil.rmtree(copy / "knn")
    report(copy)
    alone = (copy / "report.html").read_bytes()
    page = report(copy, trained)
    assert (copy / "report.html").read_bytes() == alone
    head, *rows = page.tables["Scores of the runs"]
    first, second = (dict(zip(head, row, strict=True)) for row in rows)
    assert [first["run"], second["run"]] == [str(copy), str(trained)]
    acc, top1 = metrics_of(trained / "classes")["acc"], metrics_of(trained / "knn")["top1"]["20"]
    assert first["ACC"] == second["ACC"] == f"{acc:.4f}"
    assert first["20-NN, top 1"] == "–" and second["20-NN, top 1"] == f"{top1:.4f}"
    assert first["loss"] == f"{losses(trained)[-1]['loss']:.4f}" and first["step"] == "72"
    assert page.tables["Settings in which the runs differ"][1:] == [["alpha", "0.25", "1.0"]]
    legends = page.texts["training"]
    assert legends.count(f"{copy}: ") == legends.count(f"{trained}: ") == 8      # all numbers of PANELS


def test_scores_of_svms_and_of_unknown_evaluations(tmp_path):
    svm = Evaluation(tmp_path, "svm", {"shots": {"1": {"map": 0.5}, "8": {"map": 0.7}}})
    assert [value for _, value, _ in svm.scores()] == [0.5, 0.7]
    svm = Evaluation(tmp_path, "svm", {"shots": {"all": {"map": 0.8}}})
    assert list(svm.scores()) == [("SVM, all images, mAP", 0.8, None)]
    for part in ("test", "validation"):
        tuned = {"metric": "top-1", "data": "mnist", "random_init": True, part: 0.9, f"num_{part}": 7}
        assert list(Evaluation(tmp_path, "finetune", tuned).scores()) == [
            ("from scratch on mnist, top-1", 0.9, 7)]
    found = {"pets": {"metric": "mean per class", "test": 0.9, "num_test": 3669}}
    transfer = Evaluation(tmp_path, "transfer", {"sets": found})
    assert list(transfer.scores()) == [("transfer to pets, mean per class", 0.9, 3669)]
    for metrics, expected in (
            (dict(random_init=False, miou=0.4, miou_objects=0.3, data="scenes", num_test=200),
             [("fine-tuned on scenes, miou", 0.4, 200), ("fine-tuned on scenes, miou_objects", 0.3, 200)]),
            (dict(random_init=True, AP=0.3, AP50=0.5, AP75=0.2, data="voc", num_test=7),
             [("from scratch on voc, AP", 0.3, 7), ("from scratch on voc, AP50", 0.5, 7),
              ("from scratch on voc, AP75", 0.2, 7)])):
        (tmp_path / "run/found").mkdir(parents=True, exist_ok=True)
        (tmp_path / "run/found/metrics.json").write_text(json.dumps(metrics))
        [found] = find_evaluations(tmp_path / "run")
        assert list(found.scores()) == expected
    other = Evaluation(tmp_path, "other", {"top": 0.25, "name": "x", "count": 3})
    assert other.values() == {"top": 0.25}


def test_whitened_neighbours_have_a_name_and_a_command_of_their_own(tmp_path, trained):
    run = read_results(trained)
    for whiten, name, flag in ((False, "20-NN, top 1", ""), (True, "20-NN, whitened, top 1", " --whiten")):
        metrics = dict(metrics_of(trained / "knn"), whiten=whiten)
        evaluation = Evaluation(tmp_path / "knn", "knn", metrics)
        assert name in evaluation.values()
        assert run.command("knn", evaluation).endswith(f"--output-dir {tmp_path}/knn{flag}")


def test_the_command_of_a_grid_is_the_one_that_was_typed(tmp_path, trained):
    evaluation = Evaluation(tmp_path, "finetune", dict(metric="top-1", command="python finetune.py --grid"))
    assert read_results(trained).command("finetune", evaluation) == "python finetune.py --grid"


def test_the_embedded_networks_file_makes_a_run(tmp_path):
    shutil.copy(ROOT / "weights/fashion-mnist.pth", tmp_path / "checkpoint.pth")
    results = read_results(tmp_path)
    assert results.config["data"] == "fashion-mnist" and results.entries == [] and results.evaluations == []
