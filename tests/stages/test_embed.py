"""embed.py writes the features of any backbone, with what is known of each image, and draws what it says."""

import csv
import re
import runpy
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, metrics_of, run, saved_network
from sklearn.decomposition import PCA

from data import build_dataset, eval_batches
from embed import principal_components
from pictures import draw_map, draw_neighbours
from predictions import predict
from pretrained import load_twist


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures without labels, one of them broken."""
    folder, rng = tmp_path_factory.mktemp("data") / "mine", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"é {i:02}.png")
    (folder / "é 05.png").write_bytes(b"no picture")
    return folder


def test_features_of_a_labelled_set(here, network, tmp_path):
    out, _ = here(f"embed.py --checkpoint {network} --output-dir {tmp_path}/a", pictures=True)
    assert "fake: 256 test images, " in out
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert written == {"features.npz", "map.png", "neighbours.png", "metrics.json"}
    twist, config = load_twist(network)
    test = build_dataset("fake", "test")
    features, probabilities = predict(twist, eval_batches(test, config, "cpu"))
    with np.load(tmp_path / "a/features.npz") as found:                           # nothing in it is pickled
        np.testing.assert_allclose(found["features"], features, atol=1e-5)
        np.testing.assert_allclose(found["probabilities"], probabilities, atol=1e-5)
        assert found["clusters"].tolist() == found["probabilities"].argmax(1).tolist()
        assert found["labels"].tolist() == test.labels.tolist()
        assert found["index"].tolist() == [*range(256)]
        assert found["class_names"].tolist() == test.class_names and "files" not in found
    metrics = metrics_of(tmp_path / "a")
    assert metrics["num_images"] == 256 and metrics["feature_dim"] == features.shape[1]
    assert 0 < metrics["variance_of_map"][1] < metrics["variance_of_map"][0] < 1
    here(f"embed.py --checkpoint {network} --format csv --output-dir {tmp_path}/a")
    assert not (tmp_path / "a/features.npz").exists()        # it is of the run before
    with open(tmp_path / "a/features.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:6] == ["index", "label", "label_name", "cluster", "probability", "f0"] and len(rows) == 256
    numbers = np.array([row[5:] for row in rows], float)
    np.testing.assert_allclose(numbers, features, rtol=1e-4, atol=1e-5)
    assert rows[3][:3] == ["3", str(int(test.labels[3])), test.class_names[test.labels[3]]]


def test_features_of_pictures_by_a_bare_backbone(here, network, folder, tmp_path):
    torch.save(load_twist(network)[0].backbone.state_dict(), tmp_path / "bare.pth")
    flags = f"--checkpoint {tmp_path}/bare.pth --arch resnet8 --image-size 16 --data {folder} --workers 0"
    out, err = here(f"embed.py {flags} --output-dir {tmp_path}/a", pictures=True)
    assert "11 images" in out and "1 broken pictures left out" in out and err.count("\n") == 1
    with np.load(tmp_path / "a/features.npz") as found:
        assert set(found) == {"features", "files"} and len(found["features"]) == 11
        assert found["files"].tolist() == [f"{folder}/é {i:02}.png" for i in range(12) if i != 5]
    assert (tmp_path / "a/map.png").exists() and (tmp_path / "a/neighbours.png").exists()
    flags = f"--checkpoint {network} --data {folder} --format csv --workers 0"
    here(f"embed.py {flags} --output-dir {tmp_path}/b", pictures=True)
    with open(tmp_path / "b/features.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"][-9:] for row in rows[4:6]] == ["/é 04.png", "/é 06.png"]
    assert "label" not in rows[0] and 0 <= int(rows[0]["cluster"]) < 10


def test_two_processes_leave_broken_pictures_out_as_one_does(network, folder, tmp_path):
    """Each meets other pictures; the first process writes the rows of both."""
    for ranks in (1, 2):
        _, err = run(f"embed.py --checkpoint {network} --data {folder} --batch-size 1 --workers 0 "
                     f"--device cpu --output-dir {tmp_path}/{ranks}", ranks=ranks)
        assert err.count("é 05.png") == err.count("\n") == 1
    one, two = (np.load(tmp_path / f"{ranks}/features.npz") for ranks in (1, 2))
    assert one.files == two.files and metrics_of(tmp_path / "2")["num_broken"] == 1
    for name in one.files:
        np.testing.assert_array_equal(one[name], two[name])


def test_one_picture_has_a_map(here, network, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    (tmp_path / "list.txt").write_text("one.png\n")
    here(f"embed.py --checkpoint {network} --data {tmp_path}/list.txt --output-dir {tmp_path}/a --workers 0",
         pictures=True)
    assert (tmp_path / "a/map.png").exists() and metrics_of(tmp_path / "a")["num_images"] == 1


def test_without_matplotlib_only_the_pictures_are_missing(here, network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out, _ = here(f"embed.py --checkpoint {network} --output-dir {tmp_path}", pictures=True)
    assert "no pictures: matplotlib is not installed" in out
    assert {path.name for path in tmp_path.iterdir()} == {"features.npz", "metrics.json"}


@pytest.mark.parametrize("flags, named", [
    ("--checkpoint nowhere.pth", "nowhere.pth"), ("--data nothing", "nothing"),
    ("--queries 0", "--queries: 0"), ("--class-names nowhere.txt", "nowhere.txt"),
    ("--key ema", "has no 'ema'"), ("--arch resnet18", "resnet8"),
    ("--data {folder} --class-names a.txt", "has no labels")])
def test_bad_command_is_one_line(here, network, folder, tmp_path, flags, named):
    flags = flags.format(folder=folder)
    _, err = here(f"embed.py --checkpoint {network} --output-dir {tmp_path}/out {flags}", code=2)
    assert named in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- pictures
def test_principal_components_are_scikit_learns():
    x = np.random.default_rng(0).normal(size=(300, 6)) * [5, 3, 2, 1, 1, 1] + 4
    points, shares = principal_components(torch.from_numpy(x))
    theirs = PCA(2).fit(x)
    signs = np.sign(np.take_along_axis(theirs.components_, abs(theirs.components_).argmax(1)[:, None], 1))
    np.testing.assert_allclose(points, theirs.transform(x) * signs[:, 0], atol=1e-9)
    np.testing.assert_allclose(shares, theirs.explained_variance_ratio_, atol=1e-12)
    alike = principal_components(torch.ones(5, 3))
    assert (alike[0] == 0).all() and (alike[1] == 0).all()


def figure_of(monkeypatch, draw, *args):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
        draw("a.png", *args)
    drawn[0].draw_without_rendering()
    return drawn[0]


@pytest.mark.parametrize("num_groups", [3, 20, 50])
def test_a_map_names_the_largest_groups(monkeypatch, num_groups):
    groups = np.arange(1000) % 97 % num_groups
    points = np.random.default_rng(0).normal(size=(1000, 2))
    names = [f"class {k}" for k in range(num_groups)]
    figure = figure_of(monkeypatch, draw_map, points, [0.4, 0.2], groups, names, "data; run")
    axes = figure.axes[0]
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    expected = names if num_groups <= 20 else ["others", *names[:20]]
    assert named == expected and figure.get_suptitle() == "data; run"
    drawn = np.concatenate([part.get_offsets() for part in axes.collections])
    assert sorted(drawn.tolist()) == sorted(points.tolist())
    assert axes.get_legend().get_window_extent().x1 <= figure.bbox.x1
    assert axes.get_xlabel() == "first principal component (40 % of the variance)"
    colours = {tuple(part.get_facecolor()[0][:3]) for part in axes.collections}
    assert len(colours) == len(expected)


def test_neighbours_are_beside_their_query(monkeypatch):
    images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    nearest, similarity = np.array([[3, 7, 9], [5, 4, 6]]), np.array([[1, 0.9, 0.8], [1, 1, 0.7]])
    groups, names = np.arange(40) % 2, ["even", "odd"]
    figure = figure_of(monkeypatch, draw_neighbours, images, np.array([3, 4]), nearest, similarity, groups,
                       names, "data; run")
    shown = [int(axes.images[0].get_array()[0, 0, 0]) for axes in figure.axes]
    assert shown == [3, 7, 9, 4, 5, 6]                       # a copy of the query may be before the query
    texts = [axes.get_xlabel() for axes in figure.axes]
    assert texts == ["odd\nquery", "odd\n0.900", "odd\n0.800", "even\nquery", "odd\n1.000", "even\n0.700"]
    red = [axes.spines["top"].get_edgecolor() == (1, 0, 0, 1) for axes in figure.axes]
    assert red == [False, False, False, False, True, False]


# ---------------------------------------------------------------- what docs/evaluation.md offers to copy
@pytest.fixture
def snippet(tmp_path, monkeypatch):
    """snippet("attention.py", "argument") runs that block of the page in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(name, argument):
        page = (ROOT / "docs/evaluation.md").read_text()
        code, = re.findall(rf"```python\n(# {name}\n.*?)```", page, re.DOTALL)
        (tmp_path / name).write_text(code)
        monkeypatch.setattr(sys, "argv", [name, str(argument)])
        runpy.run_path(str(tmp_path / name))
    return run


def test_attention_maps_of_a_vit(snippet, tmp_path):
    flags = "--data fake --arch vit_t --image-size 48"
    snippet("attention.py", saved_network(tmp_path / "vit.pth", flags))
    with Image.open(tmp_path / "attention.png") as image:
        rows = np.asarray(image)
    assert rows.shape == (2 * 50 + 2, 8 * 50 + 2, 3)           # eight images, their maps beneath them
    first = rows[52:100, 2:50, 0]
    assert len(np.unique(first)) > 2 and (first.reshape(3, 16, 3, 16) == first[::16, None, ::16, None]).all()


def test_pixels_of_ones_own(snippet, capsys):
    snippet("classify.py", ROOT / "weights/fashion-mnist.pth")
    assert re.fullmatch(r"\(8, 128\) \[(\d ?){8}\]\n", capsys.readouterr().out.splitlines(True)[-1])


def test_the_log_in_tensorboard(snippet, tmp_path, monkeypatch):
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda *entry: written.append(entry), close=lambda: None)
    package = types.SimpleNamespace(SummaryWriter=lambda folder: writer)          # it need not be installed
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    lines = ['{"config": {}}', '{"step": 2, "loss": 0.5}', '{"step": 2, "status": "done"}']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    snippet("to_tensorboard.py", tmp_path)
    assert written == [("step", 2, 2), ("loss", 0.5, 2)]
