"""cluster_eval.py: scores against scikit-learn, published values, closed forms; what it draws and writes."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

import cluster_eval
from checkpoint import run, save_checkpoint
from cluster_eval import (
    caption,
    confusion_matrix,
    describe_clusters,
    draw_confusion_matrix,
    draw_contact_sheet,
    evaluate,
    expected_mutual_information,
    write_assignments,
)
from data import build_dataset
from model import build_twist

GOLDEN = np.load(Path(__file__).parent / "golden" / "cluster_eval.npz")


def pairs():
    """(name, labels, predictions): random and degenerate ones."""
    rng = np.random.default_rng(0)
    some = rng.integers(0, 7, 500)
    noisy = np.where(rng.random(500) < 0.6, some, rng.integers(0, 7, 500))
    yield "random", some, rng.integers(0, 7, 500)
    yield "correlated", some, noisy
    yield "permuted", some, (some * 3 + 2) % 7
    yield "K > C", some, noisy * 3 + rng.integers(0, 3, 500)
    yield "K < C", some, noisy // 2
    yield "gaps in the ids", some * 5, noisy * 2 + 1
    yield "one cluster", some, np.zeros(500, int)
    yield "one class", np.zeros(500, int), some
    yield "one of each", np.zeros(9, int), np.zeros(9, int)
    yield "all but one in one part", np.array([0, 0, 0, 1]), np.array([0, 0, 1, 0])
    for n in (3, 10, 37, 60, 100, 500):
        yield f"all {n} singletons", np.arange(n), rng.permutation(n)
    yield "singleton clusters", rng.integers(0, 4, 60), np.arange(60)
    yield "singleton classes", np.arange(60), rng.integers(0, 4, 60)
    yield "one sample", np.array([0]), np.array([0])
    yield "one sample, high ids", np.array([3]), np.array([5])
    yield "two samples", np.array([0, 1]), np.array([1, 1])
    yield "independent", np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    yield "unbalanced", (rng.random(3000) < 0.01).astype(int), (rng.random(3000) ** 6 * 20).astype(int)
    yield "large parts", rng.integers(0, 2, 20_000), rng.integers(0, 3, 20_000)
    yield "many parts", rng.integers(0, 200, 3000), rng.integers(0, 300, 3000)
    yield "small integers", some.astype(np.uint8), noisy.astype(np.int16)


@pytest.mark.parametrize("labels, predictions", [pytest.param(y, p, id=name) for name, y, p in pairs()])
def test_equals_scikit_learn(labels, predictions):
    ours = evaluate(labels, predictions)
    assert ours["nmi"] == pytest.approx(sk.normalized_mutual_info_score(labels, predictions), abs=1e-12)
    assert ours["ari"] == pytest.approx(sk.adjusted_rand_score(labels, predictions), abs=1e-12)
    assert ours["fmi"] == pytest.approx(sk.fowlkes_mallows_score(labels, predictions), abs=1e-12)
    assert ours["ami"] == pytest.approx(sk.adjusted_mutual_info_score(labels, predictions), abs=1e-9)
    ami_max = sk.adjusted_mutual_info_score(labels, predictions, average_method="max")
    assert ours["ami_max"] == pytest.approx(ami_max, abs=1e-9)
    counts = sk.cluster.contingency_matrix(labels, predictions)
    assert ours["acc_majority"] == pytest.approx(counts.max(0).sum() / len(labels), abs=1e-12)
    assert ours["num_clusters_used"] == len(np.unique(predictions))


def test_pair_counts_do_not_overflow():
    labels = np.repeat([0, 1], [100_000, 150_000])       # pairs² is 4e21, beyond 64 bits
    for predictions in (np.arange(250_000) % 2, labels[::-1]):
        ours = evaluate(labels, predictions)
        assert ours["ari"] == pytest.approx(sk.adjusted_rand_score(labels, predictions), abs=1e-12)
        assert ours["fmi"] == pytest.approx(sk.fowlkes_mallows_score(labels, predictions), abs=1e-12)


def test_expected_mutual_information_enumerated():
    """Against the definition: the mean over all permutations of five labels."""
    labels, predictions = [0, 0, 1, 1, 2], [0, 0, 0, 1, 1]
    mean = np.mean([sk.mutual_info_score(labels, p) for p in itertools.permutations(predictions)])
    ours = expected_mutual_information(np.array([2, 2, 1]), np.array([3, 2]))
    assert ours == pytest.approx(mean, abs=1e-12)


def test_golden():
    ours = evaluate(GOLDEN["labels"], GOLDEN["predictions"], GOLDEN["probabilities"])
    for name in ("acc", "acc_top5", "nmi", "ari", "fmi"):
        assert ours[name] == pytest.approx(float(GOLDEN[name]), abs=1e-12)
    assert ours["ami"] == pytest.approx(float(GOLDEN["ami_arithmetic"]), abs=1e-9)
    assert ours["mapping"] == GOLDEN["mapping"].tolist()


@pytest.mark.parametrize("K, C", [(4, 4), (6, 3), (3, 5)])
def test_matching_is_the_best_of_all(K, C):
    rng = np.random.default_rng(K)
    labels, predictions = np.r_[C - 1, rng.integers(0, C, 80)], np.r_[K - 1, rng.integers(0, K, 80)]
    ours = evaluate(labels, predictions)
    tries = itertools.permutations([*range(C), *[-1] * (K - min(K, C))], K)
    assert ours["acc"] == pytest.approx(max(np.mean(np.array(t)[predictions] == labels) for t in tries))
    assert np.mean(np.array(ours["mapping"])[predictions] == labels) == pytest.approx(ours["acc"])
    matched = [c for c in ours["mapping"] if c >= 0]
    assert len(ours["mapping"]) == K and len(matched) == len(set(matched)) == min(K, C)


def test_two_fold_over_clustering():
    labels = np.repeat(np.arange(5), 100)
    ours = evaluate(labels, 2 * labels + np.arange(500) % 2)
    assert ours["acc"] == 0.5 and ours["acc_majority"] == 1.0
    assert ours["mapping"].count(-1) == 5          # an unmatched cluster predicts nothing, not class 0
    assert ours["nmi"] == pytest.approx(2 * np.log(5) / (np.log(5) + np.log(10)))


def test_top5_maps_five_clusters():
    rng = np.random.default_rng(1)
    labels, probabilities = rng.integers(0, 8, 5000), rng.random((5000, 12))   # more than one block of rows
    probabilities[np.arange(5000), labels] += 0.3
    ours = evaluate(labels, probabilities.argmax(1), probabilities)
    mapping = np.array(ours["mapping"])
    top5 = mapping[np.argsort(probabilities, 1)[:, -5:]]
    expected = np.mean([y in row for y, row in zip(labels, top5, strict=True)])
    assert ours["acc"] < ours["acc_top5"] < 1 and ours["acc_top5"] == expected
    few = rng.random((50, 3))                      # of fewer than five clusters all count
    assert evaluate(few.argmin(1), few.argmax(1), few)["acc_top5"] == 1.0
    assert len(evaluate(labels, labels, np.eye(20)[labels])["mapping"]) == 20    # K of probabilities
    assert "acc_top5" not in evaluate(labels, labels)
    tied = evaluate(labels, np.zeros(5000, int), np.full((5000, 12), 1 / 12))    # top five: clusters 0 to 4
    first = np.isin(labels, tied["mapping"][:5]).mean()
    assert tied["acc_top5"] == first < 0.8
    unmatched = evaluate([0, 1, 2, 2], [0, 0, 1, 1], np.eye(2)[[0, 0, 1, 1]])    # a class without cluster
    assert unmatched["acc_top5"] == 0.75


def test_cluster_ids_mean_nothing():
    _, labels, predictions = next(case for case in pairs() if case[0] == "correlated")
    order = np.random.default_rng(2).permutation(7)
    before, after = evaluate(labels, predictions), evaluate(labels, order[predictions])
    assert [after["mapping"][k] for k in order] == before.pop("mapping")
    for name, value in before.items():
        assert after[name] == pytest.approx(value, abs=1e-13)


SOUND = {"labels": [0, 1, 1], "predictions": [1, 0, 0], "probabilities": [[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]]}


@pytest.mark.parametrize("name, value, message", [
    ("labels", [], "labels: expected a non-empty"),
    ("predictions", [], "predictions: expected a non-empty"),
    ("labels", [[0], [1], [1]], "labels: .* one-dimensional"),
    ("labels", [0, 1, float("nan")], "labels: contains NaN"),
    ("predictions", [0, float("nan"), 1], "predictions: contains NaN"),
    ("labels", [0, 0.5, 1], "labels: expected integers"),
    ("predictions", ["a", "b", "c"], "predictions: expected integers"),
    ("labels", [0, -1, 1], "labels: .* got -1"),
    ("predictions", [0, -2, 1], "predictions: .* got -2"),
    ("predictions", [0, 1], "predictions: there are 2, but 3 labels"),
    ("predictions", [0, 1, 2], "probabilities: expected .3, 3 or more., got .3, 2."),
    ("probabilities", [[0.1, 0.9], [0.8, 0.2]], "probabilities: expected .3, 2 or more., got .2, 2."),
    ("probabilities", [0.9, 0.8, 0.6], "probabilities: expected"),
    ("probabilities", [[0.1, 0.9], [0.8, float("nan")], [0.6, 0.4]], "probabilities: contains NaN"),
    ("probabilities", [[0.1, 0.9], [0.8, float("inf")], [0.6, 0.4]], "probabilities: contains NaN"),
    ("probabilities", [[0.1, 0.9], [0.8, -0.2], [0.6, 0.4]], "probabilities: contains NaN"),
])
def test_bad_input_is_named(name, value, message):
    assert evaluate(**SOUND)["acc"] == 1.0
    with pytest.raises(ValueError, match=message):
        evaluate(**(SOUND | {name: value}))


# ---------------------------------------------------------------- words and pictures
NAMES = ["cat", "dog", "a class with quite a long name"]
LABELS, PREDICTIONS = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 3, 3, 3, 3, 1])
MAPPING = [0, 2, -1, 1]
PROBABILITIES = np.full((6, 4), 0.1, np.float32)
PROBABILITIES[np.arange(6), PREDICTIONS] = np.linspace(0.7, 0.6, 6)


def test_describe_clusters():
    rows = describe_clusters(PREDICTIONS, LABELS, MAPPING, NAMES)
    assert rows == [{"cluster": 3, "size": 4, "class": "dog", "majority": "dog", "purity": 0.75},
                    {"cluster": 0, "size": 1, "class": "cat", "majority": "cat", "purity": 1.0},
                    {"cluster": 1, "size": 1, "class": NAMES[2], "majority": NAMES[2], "purity": 1.0}]
    assert caption(rows[0]) == "cluster 3 → dog   purity 75%   4 images"
    assert caption(rows[0] | {"class": None}) == "cluster 3 → unmatched   purity 75% (mostly dog)   4 images"
    assert NAMES[2] in caption(rows[2])                                                  # names are whole
    assert caption(describe_clusters(PREDICTIONS)[0]) == "cluster 3   4 images"          # without labels
    mapped = describe_clusters(PREDICTIONS, None, MAPPING, NAMES)                        # mapped elsewhere
    assert caption(mapped[0]) == "cluster 3 → dog   4 images"
    assert [row["size"] for row in describe_clusters(np.array([-1, 2, 2, -1, 0]))] == [2, 1]     # -1: in none


def test_confusion_matrix():
    matched = confusion_matrix(LABELS, np.array(MAPPING)[PREDICTIONS], 3)
    assert matched.tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]     # each row by its own sum
    unmatched = confusion_matrix(LABELS, np.array([0, -1, 0, 1])[PREDICTIONS], 4)
    assert unmatched.shape == (4, 5) and unmatched[2].tolist() == [0, 0, 0, 0, 1]
    assert unmatched[3].sum() == 0                                       # a class without images


def test_assignments(tmp_path):
    write_assignments(tmp_path / "a.csv", PROBABILITIES, LABELS, [0, -1, -1, 1], NAMES)
    rows = list(csv.DictReader(open(tmp_path / "a.csv", newline="")))
    assert len(rows) == 6 and rows[1] == {
        "index": "1", "prediction": "3", "probability": "0.680000", "mapped_label": "1", "mapped_name": "dog",
        "label": "0", "label_name": "cat"}
    assert rows[5]["mapped_label"] == "-1" and rows[5]["mapped_name"] == "unmatched"
    write_assignments(tmp_path / "b.csv", PROBABILITIES)                 # without labels
    assert (tmp_path / "b.csv").read_text().startswith("index,prediction,probability\n0,0,0.700000\n")


@pytest.mark.parametrize("channels, num_clusters", [(1, 2), (3, 10), (1, 60)])
def test_contact_sheet_shows_the_most_confident(tmp_path, monkeypatch, channels, num_clusters):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    rng = np.random.default_rng(0)
    predictions, confidences = np.arange(240) % num_clusters, rng.random(240)
    images = torch.arange(240, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, 8, 8)
    clusters, path = describe_clusters(predictions), tmp_path / "sheet.png"
    draw_contact_sheet(path, images, predictions, confidences, clusters, images_per_cluster=5)
    axes = drawn[0].axes
    assert len(axes) == num_clusters
    for ax, row in zip(axes, clusters, strict=False):
        members = np.flatnonzero(predictions == row["cluster"])
        best = members[confidences[members].argsort()[::-1]][:5]
        strip = ax.images[0].get_array()
        assert strip.shape == (8, 44, 3) and strip[0, ::9, 0].tolist() == [*best, *[255] * (5 - len(best))]
        assert ax.get_title(loc="left") == caption(row)


def test_captions_do_not_overlap(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    row = {"size": 12_345, "class": "Staffordshire terrier", "majority": "miniature schnauzer", "purity": 1.0}
    rows = [row | {"cluster": 4000 + i} for i in range(6)]
    images = torch.zeros(9, 1, 28, 28, dtype=torch.uint8)
    draw_contact_sheet(tmp_path / "sheet.png", images, np.zeros(9), np.zeros(9), rows)
    drawn[0].draw_without_rendering()
    boxes = [ax._left_title.get_window_extent() for ax in drawn[0].axes]
    strips = [ax.images[0].get_window_extent() for ax in drawn[0].axes]
    assert boxes[0].x1 < boxes[1].x0 and boxes[0].y0 >= strips[0].y1 and boxes[2].y1 < strips[0].y0


def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    rows = describe_clusters(PREDICTIONS, LABELS, MAPPING, NAMES)
    draw_contact_sheet(tmp_path / "sheet.png", images, PREDICTIONS, PROBABILITIES.max(1), rows)
    draw_confusion_matrix(tmp_path / "few.png", LABELS, np.array(MAPPING)[PREDICTIONS], NAMES)
    draw_confusion_matrix(tmp_path / "many.png", LABELS, LABELS, [f"class {c}" for c in range(60)])
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


# ---------------------------------------------------------------- the command
CONFIG = {"arch": "resnet8", "num_classes": 14, "hidden_dim": 16, "bunch_size": None, "nbs": True,
          "small_images": False, "data": "fake", "seed": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    save_checkpoint(path, {"model": build_twist(CONFIG).state_dict(), "config": CONFIG})
    return path


def start(*argv):
    with pytest.raises(SystemExit) as end:
        run(cluster_eval.main, cluster_eval.get_parser(), [str(word) for word in argv])
    return end.value.code or 0


def test_command(checkpoint, tmp_path, capsys):
    assert start("--checkpoint", checkpoint, "--output_dir", tmp_path, "--device", "cpu",
                 "--pixel-kmeans") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rows = list(csv.DictReader(open(tmp_path / "assignments.csv", newline="")))
    labels = build_dataset("fake", "test", seed=3).labels.numpy()
    assert [int(row["label"]) for row in rows] == labels.tolist()
    predictions = [int(row["prediction"]) for row in rows]
    again = evaluate(labels, predictions)
    assert metrics["acc"] == again["acc"] and metrics["nmi"] == again["nmi"]
    assert metrics["acc_top5"] >= metrics["acc"]
    assert len(metrics["mapping"]) == metrics["num_clusters"] == 14
    assert [metrics["mapping"][k] for k in predictions] == [int(row["mapped_label"]) for row in rows]
    assert sum(row["size"] for row in metrics["clusters"]) == metrics["num_images"] == 256
    out = capsys.readouterr().out
    assert metrics["pixel_kmeans"]["acc"] > 0.5 and f"ACC {metrics['pixel_kmeans']['acc']:.4f}" in out
    assert f"ACC {metrics['acc']:.4f}" in out and caption(metrics["clusters"][0]) in out


def test_batch_size_changes_nothing(checkpoint, tmp_path):
    """Evaluation mode: batch statistics would make an image's cluster depend on its neighbours."""
    for size in (7, 256):
        out = tmp_path / str(size)
        assert start("--checkpoint", checkpoint, "--output-dir", out, "--batch-size", size) == 0
    few, all_ = (np.loadtxt(tmp_path / size / "assignments.csv", delimiter=",", skiprows=1, usecols=(1, 2))
                 for size in ("7", "256"))
    np.testing.assert_allclose(few, all_, atol=2e-6)


def test_without_labels_nothing_is_scored(checkpoint, tmp_path, monkeypatch):
    def unlabelled(*args):
        dataset = build_dataset(*args)
        dataset.labels = None
        return dataset
    monkeypatch.setattr(cluster_eval, "build_dataset", unlabelled)
    (tmp_path / "confusion_matrix.png").write_text("of an earlier run")
    assert start("--checkpoint", checkpoint, "--output-dir", tmp_path) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert not {"acc", "nmi", "mapping"} & metrics.keys() and "purity" not in metrics["clusters"][0]
    assert not (tmp_path / "confusion_matrix.png").exists()


def test_without_matplotlib_only_the_pictures_are_missing(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert start("--checkpoint", checkpoint, "--output-dir", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assignments.csv", "metrics.json"]
    assert "no pictures: " in capsys.readouterr().out


def test_bad_command_is_one_line(checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(checkpoint.read_bytes()[:-100])
    other = tmp_path / "other.pth"
    save_checkpoint(other, {"model": {}, "config": CONFIG})
    nan = tmp_path / "nan.pth"
    network = build_twist(CONFIG)
    torch.nn.init.constant_(network.projection_heads.last_linear.weight, torch.nan)
    save_checkpoint(nan, {"model": network.state_dict(), "config": CONFIG})
    out = tmp_path / "out"
    for argv, named in (
        (["--checkpoint", tmp_path / "none.pth"], "none.pth"),
        (["--checkpoint", broken], "broken.pth"),
        (["--checkpoint", other], "other.pth"),
        (["--checkpoint", nan], "nan.pth"),
        (["--checkpoint", checkpoint, "--data", "nothing"], "nothing"),
        (["--checkpoint", checkpoint, "--batch-size", 0], "--batch-size 0"),
        (["--checkpoint", checkpoint, "--images-per-cluster", 0], "--images-per-cluster 0"),
        (["--checkpoint", checkpoint, "--output-dir", checkpoint.parent], "--output-dir"),
        (["--checkpoint", checkpoint, "--output-dir", broken], "--output-dir"),
        (["--output-dir", out], "--checkpoint"),
    ):
        assert start("--output-dir", out, *argv) == 2
        error = capsys.readouterr().err
        assert named in error and len(error.splitlines()) == 1
        assert not out.exists() or not list(out.iterdir())
    command = [sys.executable, "cluster_eval.py", "--checkpoint", tmp_path / "none.pth"]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and "none.pth" in ended.stderr
