"""Scores equal scikit-learn's, published values and closed forms; pictures and files hold what they say."""

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, metrics_of, run, saved_network
from sklearn import metrics as sk

import cluster_eval
import pictures
from checkpoint import UserError, save_checkpoint
from cluster_eval import evaluate, evaluate_with_noise
from clusters import expected_mutual_information, silhouette
from data import build_dataset
from model import Twist, reestimate_batch_norms
from pictures import caption, confusion_matrix, draw_confusion_matrix, draw_contact_sheet, draw_top3
from predictions import describe_clusters, name_classes, read_predictions, write_assignments

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "cluster_eval.npz")


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


def test_a_mapping_from_elsewhere():
    rng = np.random.default_rng(3)
    train, test = rng.integers(0, 6, 400), rng.integers(0, 6, 300)
    train_p, test_p = (np.where(rng.random(len(y)) < 0.5, (y + 2) % 6, rng.integers(0, 8, len(y)))
                       for y in (train, test))
    probabilities = rng.random((300, 8)) + np.eye(8)[test_p]
    mapping = evaluate(np.r_[train, 5], np.r_[train_p, 7])["mapping"]
    ours = evaluate(test, test_p, probabilities, mapping=mapping)
    own = evaluate(test, test_p, probabilities)
    assert ours["acc"] == np.mean(np.array(mapping)[test_p] == test) and ours["mapping"] == mapping
    top5 = np.array(mapping)[np.argsort(probabilities, 1)[:, -5:]]
    assert ours["acc_top5"] == np.mean([y in row for y, row in zip(test, top5, strict=True)])
    assert own["acc"] >= ours["acc"] and own["nmi"] == ours["nmi"]
    few = evaluate([0, 0, 1], [2, 2, 0], mapping=[4, -1, 0, 1])      # with classes and clusters not seen here
    assert few["acc"] == 2 / 3 and few["mapping"] == [4, -1, 0, 1]
    for bad, message in (([0, 1], "mapping: expected 3"), ([0, 1, 1, 2], "mapping: two clusters"),
                         ([0.0, 1.0, 2.0], "mapping: expected"), ([[0], [1], [2]], "mapping: expected")):
        with pytest.raises(ValueError, match=message):
            evaluate([0, 0, 1], [2, 2, 0], mapping=bad)


def test_noise_is_in_no_cluster():
    """Scores as scikit-learn has them, where -1 is a cluster; but noise is never matched to a class."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 4, 500)
    predictions = np.where(rng.random(500) < 0.4, -1, labels)
    ours = evaluate_with_noise(labels, predictions)
    for name, score in (("nmi", sk.normalized_mutual_info_score), ("ari", sk.adjusted_rand_score),
                        ("ami", sk.adjusted_mutual_info_score), ("fmi", sk.fowlkes_mallows_score)):
        assert ours[name] == pytest.approx(score(labels, predictions), abs=1e-9)
    assert ours["acc"] == ours["acc_majority"] == pytest.approx(np.mean(predictions >= 0))
    assert ours["mapping"] == [0, 1, 2, 3] and ours["num_clusters_used"] == 4
    assert evaluate_with_noise(labels, labels) == evaluate(labels, labels)
    nothing = evaluate_with_noise(labels, np.full(500, -1))
    assert nothing["acc"] == nothing["acc_majority"] == nothing["num_clusters_used"] == 0
    assert nothing["nmi"] == pytest.approx(0, abs=1e-12) and nothing["mapping"] == []


@pytest.mark.parametrize("K, N", [(2, 50), (7, 300), (40, 120)])
def test_silhouette_is_scikit_learns(K, N):
    rng = np.random.default_rng(K)
    predictions = np.r_[np.arange(K), rng.integers(0, K, N - K)] * 3              # ids with gaps
    features = rng.normal(size=(N, 5)) + 2 * rng.normal(size=(3 * K, 5))[predictions]
    predictions[0] = 3 * K                                                        # one alone
    features[1] = 0                                            # without direction: at distance 1 from all
    expected = sk.silhouette_score(features, predictions, metric="cosine")
    for chunk in (1, 7, 4096):
        assert silhouette(features, predictions, chunk) == pytest.approx(expected, abs=1e-9)
    assert silhouette(features.astype(np.float32), predictions) == pytest.approx(expected, abs=1e-6)
    assert silhouette(features, np.zeros(N, int)) is None and silhouette(features, np.arange(N)) is None


# ---------------------------------------------------------------- predictions of other programs
def test_predictions_of_other_programs(tmp_path):
    labels, clusters = ["dog", "cat", "cat", "eel", "dog"], [7, 40, 40, 7, -1]
    lines = [f"{i},{y},{p}\n" for i, (y, p) in enumerate(zip(labels, clusters, strict=True))]
    (tmp_path / "a.csv").write_text("index,label,prediction\n" + "".join(lines))
    np.savez(tmp_path / "a.npz", labels=np.array(labels), predictions=np.array(clusters, np.int32))
    for name in ("a.csv", "a.npz"):
        y, p, probabilities, class_names, cluster_names, remarks = read_predictions(tmp_path / name)
        assert y.tolist() == [1, 0, 0, 2, 1] and p.tolist() == [0, 1, 1, 0, -1] and probabilities is None
        assert class_names == ["cat", "dog", "eel"] and cluster_names == [7, 40]
        assert "1 predictions (20.0%) are negative, that is noise" in remarks[0]
        assert remarks[1] == "2 clusters with ids from 7 to 40"
    (tmp_path / "b.csv").write_text("labels, predictions\n3.0,b\n10.0,a a\n3.0,b\n")    # floats as of pandas
    y, p, _, class_names, cluster_names, remarks = read_predictions(tmp_path / "b.csv")
    assert y.tolist() == [0, 1, 0] and p.tolist() == [1, 0, 1] and cluster_names == ["a a", "b"]
    assert class_names == ["3", "10"] and remarks == ["2 classes with ids from 3 to 10"]
    np.savez(tmp_path / "p.npz", label=[1, 0], probabilities=[[0.1, 0.2, 0.7], [0.8, 0.1, 0.1]])
    y, p, probabilities, _, cluster_names, remarks = read_predictions(tmp_path / "p.npz")
    assert p.tolist() == [2, 0] and probabilities.shape == (2, 3)
    assert cluster_names == [0, 1, 2] and not remarks


def test_large_ids_of_other_programs_stay_apart(tmp_path):
    """Neighbours above 2^53 are the same float; a byte-order mark and empty lines of a .csv are skipped."""
    text = f"label,prediction\n{2 ** 53},1\n\n{2 ** 53 + 1},{2 ** 62}\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8-sig")
    labels, predictions, _, class_names, cluster_names, _ = read_predictions(tmp_path / "a.csv")
    assert labels.tolist() == predictions.tolist() == [0, 1]
    assert class_names == [str(2 ** 53), str(2 ** 53 + 1)] and cluster_names == [1, 2 ** 62]


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "label,guess\n1,2\n", "no column 'prediction', only label, guess; rename that"),
    ("a.csv", "truth,prediction\n1,2\n", "no column 'label', only truth, prediction; rename that"),
    ("a.csv", "label,prediction\n1,2\n,3\n", "column 'label' has gaps"),
    ("a.csv", "labels,prediction\n1,2\n0,nan\n", "column 'prediction' has gaps"),
    ("a.csv", "label,prediction\n1,0.5\n0,1\n", "column 'prediction' has gaps, or no integers"),
    ("a.csv", "label,prediction\n1e20,5\n0,1\n", "column 'label' has gaps, or no integers"),
    ("a.csv", "label,prediction\ninf,5\n0,1\n", "column 'label' has gaps, or no integers"),
    ("a.csv", "label,prediction\n-1,2\n0,1\n", "column 'label' has -1"),
    ("a.csv", "label,prediction\n", "column 'label' is empty"),
    ("a.csv", "", "no column 'label', only an empty heading"),
    ("a.csv", "label,prediction\n1,2\n3\n", "cannot be read .row 3 has 1 columns, the heading 2"),
    ("a.npz", "not a zip", "cannot be read"), ("a.txt", "label,prediction\n1,2\n", "expected a .csv or .npz"),
    ("a.npz", dict(labels=[0, 1], predictions=[0, 1, 1]), "2 labels, but 3 predictions"),
    ("a.npz", dict(labels=[[0, 1]], predictions=[0, 1]), "column 'labels' is empty or not one-dimensional"),
    ("a.npz", dict(labels=[0, 1], probabilities=[[0.1, 0.9]]), "2 labels, but 1 probab"),
    ("a.npz", dict(label=[0], probabilities=[[1.1, -0.1]]), "values below 0 .* softmax first"),
    ("a.npz", dict(label=[0], probabilities=[[7.0, 2.0]]), "values .* above 1, as logits"),
    ("a.npz", dict(label=[0], probabilities=[["a", "b"]]), "'probabilities' is not two-dim.* save an array"),
    ("a.npz", dict(label=["x"], probabilities=[0.5]), "'probabilities' is not two-dim"),
    ("a.npz", dict(labels=[0], predictions=[0], probabilities=[0.1]), "'probabilities' is not two-dim"),
    ("a.npz", dict(labels=[0], probabilities=[[0.1, np.nan]]), "column 'probabilities' has NaN"),
    ("a.npz", dict(labels=[0], predictions=[2], probabilities=[[1.0, 0.0]]), "0 to 1; without that column"),
    ("a.npz", dict(labels=[0], predictions=["a"], probabilities=[[1.0, 0.0]]), "'predictions' has to hold"),
    ("a.npz", dict(labels=np.array(["a", None]), predictions=[0, 1]), "cannot be read"),
    ("a.npz", dict(predictions=[0, 1]), "no column 'labels'")])
def test_wrong_predictions_are_refused_by_name(here, tmp_path, name, content, message):
    path, sound = tmp_path / name, tmp_path / "sound.csv"
    sound.write_text("label,prediction\n1,2\n0,1\n")
    assert read_predictions(sound)[0].tolist() == [1, 0]
    if isinstance(content, str):
        path.write_text(content)
    else:
        np.savez(path, **content)
    with pytest.raises(UserError, match=f"--predictions .*{name}: .*{message}"):
        read_predictions(path)
    _, err = here(f"cluster_eval.py --predictions {path} --output-dir {tmp_path}/out", code=2)
    assert len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_command_with_predictions(here, tmp_path):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 5, 300)
    predictions = np.where(rng.random(300) < 0.7, 10 * labels, 10 * rng.integers(0, 5, 300))
    predictions[:30] = -1
    np.savez(tmp_path / "a.npz", labels=np.array(list("abcde"))[labels], predictions=predictions)
    out, _ = here(f"cluster_eval.py --predictions {tmp_path}/a.npz --output-dir {tmp_path}/out",
                  pictures=True)
    metrics = metrics_of(tmp_path / "out")
    assert metrics["ari"] == pytest.approx(sk.adjusted_rand_score(labels, predictions), abs=1e-12)
    assert metrics["acc"] == np.mean(predictions == 10 * labels) and metrics["class_names"] == list("abcde")
    classes = {row["cluster"]: row["class"] for row in metrics["clusters"]}
    assert classes == {0: "a", 10: "b", 20: "c", 30: "d", 40: "e"}
    assert "30 predictions (10.0%) are negative" in out and re.search("cluster 40: .. % e, .. images", out)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["confusion_matrix.png", "metrics.json"]


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
    assert caption(rows[0]) == "cluster 3: 75 % dog, 4 images"
    assert caption(rows[0] | {"class": "cat"}) == "cluster 3: 75 % dog (matched to cat), 4 images"
    assert caption(rows[0] | {"class": None}) == "cluster 3: 75 % dog (unmatched), 4 images"
    assert NAMES[2] in caption(rows[2])                                                  # names are whole
    assert caption(describe_clusters(PREDICTIONS)[0]) == "cluster 3: 4 images"           # without labels
    mapped = describe_clusters(PREDICTIONS, None, MAPPING, NAMES)                        # mapped elsewhere
    assert caption(mapped[0]) == "cluster 3: matched to dog, 4 images"
    assert caption(mapped[0] | {"class": None}) == "cluster 3: unmatched, 4 images"
    assert [row["size"] for row in describe_clusters(np.array([-1, 2, 2, -1, 0]))] == [2, 1]     # -1: in none


def test_confusion_matrix():
    matched = confusion_matrix(LABELS, np.array(MAPPING)[PREDICTIONS], 3)
    assert matched.tolist() == [[50, 50, 0], [0, 100, 0], [0, 0, 100]]     # each row by its own sum
    unmatched = confusion_matrix(LABELS, np.array([0, -1, 0, 1])[PREDICTIONS], 4)
    assert unmatched.shape == (4, 5) and unmatched[2].tolist() == [0, 0, 0, 0, 100]
    assert unmatched[3].sum() == 0                                       # a class without images


def test_assignments(tmp_path):
    confidences = PROBABILITIES.max(1)
    write_assignments(tmp_path / "a.csv", PREDICTIONS, confidences, LABELS, [0, -1, -1, 1], NAMES)
    rows = list(csv.DictReader(open(tmp_path / "a.csv", newline="")))
    assert len(rows) == 6 and rows[1] == {
        "index": "1", "prediction": "3", "probability": "0.680000", "mapped_label": "1", "mapped_name": "dog",
        "label": "0", "label_name": "cat"}
    assert rows[5]["mapped_label"] == "-1" and rows[5]["mapped_name"] == "unmatched"
    write_assignments(tmp_path / "b.csv", PREDICTIONS, confidences)      # without labels
    assert (tmp_path / "b.csv").read_text().startswith("index,prediction,probability\n0,0,0.700000\n")


@pytest.mark.parametrize("channels, num_clusters", [(1, 2), (3, 10), (1, 60)])
def test_contact_sheet_shows_confident_and_random_images(tmp_path, monkeypatch, channels, num_clusters):
    """Of five the three most confident, then two of the rest; red frames tell the images of other classes."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    rng = np.random.default_rng(0)
    predictions, confidences, labels = np.arange(240) % num_clusters, rng.random(240), rng.integers(0, 3, 240)
    images = torch.arange(240, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, 8, 8)
    clusters, path = describe_clusters(predictions, labels, None, NAMES), tmp_path / "sheet.png"
    for seed in (1, 1, 2):
        draw_contact_sheet(path, images, predictions, confidences, clusters, 5, "data; run", labels, seed)
    strips = [[ax.images[0].get_array() for ax in figure.axes] for figure in drawn]
    random = []
    for ax, row, strip, same, other in zip(drawn[0].axes, clusters, *strips, strict=True):
        members = np.flatnonzero(predictions == row["cluster"])
        best = members[confidences[members].argsort()[::-1]]
        centres = [5, 16, 27, 42, 53]                        # of each image, in a strip of 10 x 58 pixels
        shown = [int(strip[5, x, 2]) for x in centres[:len(members)]]
        assert strip.shape == (10, 58, 3) and ax.get_title(loc="left") == caption(row)
        assert shown[:3] == best[:3].tolist() and set(shown[3:]) <= set(best[3:].tolist())
        assert len(set(shown)) == len(shown) == min(5, len(members)) and np.array_equal(strip, same)
        random.append(np.array_equal(np.sort(strip[5, :, 2]), np.sort(other[5, :, 2])))
        framed = [strip[0, x].tolist() == [220, 0, 0] for x in centres[:len(members)]]
        assert framed == [NAMES[labels[i]] != row["majority"] for i in shown]
    assert all(random) == (num_clusters == 60)                      # of four images all are shown
    assert drawn[0].get_suptitle().startswith("data; run\nof each cluster: the most confident images")
    draw_contact_sheet(path, images, predictions, confidences, clusters)
    assert all((ax.images[0].get_array()[0] == 255).all() for ax in drawn[-1].axes)         # without labels


def test_captions_do_not_overlap(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    row = {"size": 12_345, "class": "Staffordshire terrier", "majority": "miniature schnauzer", "purity": 1.0}
    rows = [row | {"cluster": 4000 + i} for i in range(6)]
    rows[3]["class"] = "one of those whose name is longer than any other that anybody has seen yet"
    images = torch.zeros(9, 1, 28, 28, dtype=torch.uint8)
    draw_contact_sheet(tmp_path / "sheet.png", images, np.zeros(9), np.zeros(9), rows)
    drawn[0].draw_without_rendering()
    boxes = [ax._left_title.get_window_extent() for ax in drawn[0].axes]
    strips = [ax.images[0].get_window_extent() for ax in drawn[0].axes]
    assert boxes[0].x1 < boxes[1].x0 and boxes[0].y0 >= strips[0].y1 and boxes[2].y1 < strips[0].y0


def test_top3_names_are_whole_and_do_not_overlap(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path, **kwargs: drawn.append(self))
    names = ["shoe", "soft-coated wheaten terrier", "American Staffordshire terrier", "cluster 3"]
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), 20)
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8)
    truth = [names[i % 3] for i in range(20)]
    draw_top3(tmp_path / "top3.png", images, probabilities, np.arange(3, 17), names, truth)
    drawn[0].draw_without_rendering()
    pictures, bars = drawn[0].axes[0::2], drawn[0].axes[1::2]
    assert len(pictures) == len(bars) == 14
    for i, picture, bar in zip(range(3, 17), pictures, bars, strict=True):
        assert np.array_equal(picture.images[0].get_array()[..., 2], images[i, 0])
        best = probabilities[i].argsort()[::-1][:3]
        assert [text.get_text() for text in bar.texts[0::2]] == [names[k] for k in best]
        assert [text.get_text() for text in bar.texts[1::2]] == [f"{probabilities[i, k]:.3f}" for k in best]
        assert [b.get_width() for b in bar.patches] == probabilities[i, best].tolist()
        assert bar.get_xlabel() == f"{'✓' if names[best[0]] == truth[i] else '✗'} truth: {truth[i]}"
    things = sum(([*bar.texts, bar.xaxis.label] for bar in bars), [picture.images[0] for picture in pictures])
    boxes = [thing.get_window_extent() for thing in things]
    for a, b in itertools.combinations(boxes, 2):
        assert not a.shrunk(0.99, 0.99).overlaps(b)
    whole = drawn[0].bbox
    assert all(box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 for box in boxes)


def test_titles_name_data_run_and_accuracy(start, checkpoint, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    titles, colour_bar = {}, []

    def keep(self, path, **kwargs):
        title = self.get_suptitle() or self.axes[0].get_title()
        titles[path.name] = title.replace("\n", " ")
        if "matrix" in path.name:
            colour_bar.append((self.axes[1].get_ylabel(), self.axes[1].get_ylim(),
                               max(int(text.get_text()) for text in self.axes[0].texts)))
    monkeypatch.setattr(figure.Figure, "savefig", keep)
    out, _ = start(pictures=True)
    acc = re.search(r"ACC (0\.\d\d\d)", out)[1]
    assert titles.keys() == {"confusion_matrix.png", "contact_sheet.png", "top3.png"}
    for title in titles.values():                            # the lines of a long path are broken
        before, _, after = title.partition(": ACC ")
        assert before.replace(" ", "") == f"fake,testimages;{checkpoint}"
        assert float(after[:5]) == pytest.approx(float(acc), abs=0.0011)
    (label, limits, largest), = colour_bar                     # one unit in the cells and in the colour bar
    assert label == "percent of the true class" and limits == (0, 100) and 10 < largest <= 100


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
FLAGS = "--data fake --image-size 16 --num-classes 14 --hidden-dim 16 --seed 3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved_network(tmp_path_factory.mktemp("run") / "checkpoint.pth", FLAGS)


@pytest.fixture
def start(here, checkpoint, tmp_path):
    """start("--silhouette", code=0): cluster_eval.py on the checkpoint, into tmp_path/out; (out, err)."""
    def run_here(flags="", *args, **kwargs):
        command = f"cluster_eval.py --checkpoint {checkpoint} --output-dir {tmp_path}/out {flags}"
        return here(command, *args, **kwargs)
    return run_here


def assignments_of(folder):
    with open(folder / "assignments.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_command(start, tmp_path):
    out, _ = start(f"--output_dir {tmp_path} --device cpu --pixel-kmeans", pictures=True)
    metrics, rows = metrics_of(tmp_path), assignments_of(tmp_path)
    labels = build_dataset("fake", "test", seed=3).labels.numpy()
    assert [int(row["label"]) for row in rows] == labels.tolist()
    predictions = [int(row["prediction"]) for row in rows]
    again = evaluate(labels, predictions)
    assert metrics["acc"] == again["acc"] and metrics["nmi"] == again["nmi"]
    assert metrics["acc_top5"] >= metrics["acc"]
    assert len(metrics["mapping"]) == metrics["num_clusters"] == 14
    assert [metrics["mapping"][k] for k in predictions] == [int(row["mapped_label"]) for row in rows]
    assert sum(row["size"] for row in metrics["clusters"]) == metrics["num_images"] == 256
    assert metrics["num_broken"] == 0
    assert metrics["pixel_kmeans"]["acc"] > 0.5 and f"ACC {metrics['pixel_kmeans']['acc']:.4f}" in out
    assert f"ACC {metrics['acc']:.4f}" in out and caption(metrics["clusters"][0]) in out
    assert all((tmp_path / f"{name}.png").exists() for name in ("confusion_matrix", "contact_sheet", "top3"))


def test_batch_norms_are_estimated_anew():
    torch.manual_seed(0)
    network = Twist("resnet8", num_classes=14, hidden_dim=16, bunch_size=8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batches = [torch.randn(40, 3, 16, 16) + 1, 2 * torch.randn(40, 3, 16, 16)]
    reestimate_batch_norms(network, batches)
    after = network.state_dict()
    first = [batch.mean((0, 2, 3)) for batch in map(network.backbone.conv1, batches)]
    torch.testing.assert_close(after["backbone.bn1.running_mean"], sum(first) / 2)    # of all batches alike
    first = [network.backbone.conv1(batch).var((0, 2, 3)) for batch in batches]
    torch.testing.assert_close(after["backbone.bn1.running_var"], sum(first) / 2)
    for name in before:
        assert before[name].equal(after[name]) != ("running" in name or "tracked" in name), name
    other = Twist("resnet8", num_classes=14, hidden_dim=16, bunch_size=8)
    other.load_state_dict(before)
    for each in (network, other):                 # whatever statistics there were before are forgotten
        reestimate_batch_norms(each, batches[:1])
    for name, value in other.state_dict().items():
        assert value.equal(network.state_dict()[name]) or "tracked" in name, name
    assert network.projection_heads.norm.bunch_size == 8 and network.projection_heads.norm.momentum == 0.1


def test_silhouette_and_batch_norms_in_the_command(start, tmp_path):
    start(f"--output-dir {tmp_path}/a")
    out, _ = start(f"--output-dir {tmp_path}/b --silhouette --bn-images 300 --batch-size 100")
    a, b = metrics_of(tmp_path / "a"), metrics_of(tmp_path / "b")
    line = f"silhouette {b['silhouette']:.4f} (cosine distance of backbone features)"
    assert "silhouette" not in a and line in out and a["nmi"] != b["nmi"]
    assert "batch-norm statistics are those of 300 training images" in out


@pytest.mark.parametrize("flags", ["--silhouette", "--kmeans 5 --kmeans-starts 2"])
def test_two_processes_equal_one(flags, checkpoint, tmp_path):
    """To the bit: an image's row does not depend on its batch, if that is as large."""
    for ranks in (1, 2):
        run(f"cluster_eval.py --checkpoint {checkpoint} --output-dir {tmp_path}/{ranks} --device cpu "
            f"--batch-size 64 --contact-sheets 0 --bn-images 100 {flags}", ranks=ranks)
    for name in ("metrics.json", "assignments.csv"):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--kmeans 2"])
def test_torchrun_on_pictures_without_labels(flags, checkpoint, tmp_path):
    """Some are broken, of which each process meets its own; each has a worker."""
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(31):
        pixels = rng.integers(0, 256, (20, 16 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{i:02}.png")
    for i in (4, 7, 30):
        (tmp_path / f"data/{i:02}.png").write_bytes(b"")
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] * (ranks == 2)
        command = [sys.executable, *launcher, "cluster_eval.py", "--checkpoint", checkpoint, *flags.split(),
                   "--data", tmp_path / "data", "--output-dir", tmp_path / f"{ranks}", "--batch-size", "4",
                   "--workers", "1", "--contact-sheets", "0", "--device", "cpu"]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True)
        named = {i for i in range(31) if f"/{i:02}.png: " in done.stderr}
        assert done.returncode == 0 and named == {4, 7, 30}, done.stderr
        assert done.stdout.count("3 broken pictures left out") == done.stdout.count("written: ") == 1
    one, two = (metrics_of(tmp_path / f"{ranks}") for ranks in (1, 2))
    assert one["num_images"] == 28 and one["num_broken"] == 3 and one.keys() == two.keys()
    one, two = (assignments_of(tmp_path / f"{ranks}") for ranks in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a["file"], a["prediction"]) == (b["file"], b["prediction"])
        column = "similarity" if flags else "probability"
        assert float(a[column]) == pytest.approx(float(b[column]), abs=2e-6)


def die_before_the_rows_are_gathered():
    import predictions
    if os.environ["RANK"] == "1":
        predictions.gather = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_process_ends_the_other_in_one_line(checkpoint, tmp_path):
    _, err = run(f"cluster_eval.py --checkpoint {checkpoint} --output-dir {tmp_path} --device cpu", code=1,
                 ranks=2, prepare=die_before_the_rows_are_gathered)
    assert err.count("\n") == 1 and "rank 0: another process of this run died" in err
    assert "; start it again" in err and not (tmp_path / "metrics.json").exists()


def test_two_processes_score_predictions_once(tmp_path):
    (tmp_path / "theirs.csv").write_text("label,prediction\na,0\nb,1\n")
    command = f"cluster_eval.py --predictions {tmp_path}/theirs.csv --output-dir {tmp_path}/out"
    out, err = run(command, ranks=2)
    assert out.count("ACC 1.0000") == 1 and not err and metrics_of(tmp_path / "out")["acc"] == 1


def test_map_from_another_split(start, tmp_path):
    start(f"--output-dir {tmp_path}/train --split train")
    source = tmp_path / "train/metrics.json"
    out, _ = start(f"--output-dir {tmp_path}/test --map-from {source}")
    train, test = metrics_of(tmp_path / "train"), metrics_of(tmp_path / "test")
    rows, mapping = assignments_of(tmp_path / "test"), train["mapping"]
    assert test["mapping"] == mapping and train["num_images"] == 512 and test["num_images"] == 256
    assert [int(row["mapped_label"]) for row in rows] == [mapping[int(row["prediction"])] for row in rows]
    assert test["acc"] == np.mean([row["mapped_label"] == row["label"] for row in rows])
    assert f"named by the mapping of {source}" in out
    for text, message in (("{}", "not the metrics.json"), ("no json", "not the metrics.json"),
                          (json.dumps(train | {"mapping": [0] * 14}), "not a mapping of clusters"),
                          (json.dumps(train | {"mapping": [10, *[-1] * 13]}), "not a mapping of clusters"),
                          (json.dumps(train | {"mapping": ["a"] * 14}), "not a mapping of clusters"),
                          (json.dumps(train | {"mapping": 3}), "not a mapping of clusters"),
                          (json.dumps(train | {"class_names": 3}), "not the metrics.json"),
                          (json.dumps(train | {"mapping": [0, 1]}), "maps 2 clusters, the network has 14"),
                          (json.dumps(train | {"network_sha256": "0"}), "those of another network; take"),
                          (json.dumps(train | {"class_names": list("abcdefghij")}), "classes are others")):
        (tmp_path / "bad.json").write_text(text)
        _, err = start(f"--map-from {tmp_path}/bad.json", code=2)
        assert message in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_new_pictures_get_the_names_of_classes(start, tmp_path):
    """Clusters are named once, on labelled images; then any pictures are classified by these names."""
    (tmp_path / "names.txt").write_text("".join(f"name {c}\n" for c in range(10)))
    start(f"--class-names {tmp_path}/names.txt --output-dir {tmp_path}/labelled")
    (tmp_path / "new").mkdir()
    for i, image in enumerate(build_dataset("fake", "test", seed=3).images[:20]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"new/{i:02}.png")
    source = tmp_path / "labelled/metrics.json"
    out, err = start(f"--data {tmp_path}/new --map-from {source} --workers 0 --bn-images 20", pictures=True)
    assert err.count("warning: ") == 1 and "was made with --bn-images 0; " in err        # other statistics
    mapping, rows = metrics_of(tmp_path / "labelled")["mapping"], assignments_of(tmp_path / "out")
    assert [row["file"] for row in rows] == [f"{tmp_path}/new/{i:02}.png" for i in range(20)]
    for row in rows:
        c = mapping[int(row["prediction"])]
        assert row["mapped_name"] == ("unmatched" if c < 0 else f"name {c}") and "label" not in row
    assert len({row["mapped_name"] for row in rows}) > 2 and ": matched to name " in out
    assert "20 images, " in out and not (tmp_path / "out/confusion_matrix.png").exists()
    one = f"--data {tmp_path}/one.txt --workers 0"
    (tmp_path / "one.txt").write_text("new/00.png\n")
    start(f"--output-dir {tmp_path}/plain")
    for file, name in (("labelled", "name"), ("plain", "class"), ("plain", "name")):
        names = f"--class-names {tmp_path}/names.txt" if (file, name) == ("plain", "name") else ""
        start(f"{one} {names} --map-from {tmp_path}/{file}/metrics.json")
        assert assignments_of(tmp_path / "out")[0]["mapped_name"].startswith((f"{name} ", "unmatched"))


def test_class_names_are_in_all_that_is_written(start, tmp_path):
    names = ["Äpfel", "a b", "c, d", *(f"name {c}" for c in range(3, 10))]
    (tmp_path / "names.txt").write_text("\n".join(names))
    flags = f"--class-names {tmp_path}/names.txt"
    out, _ = start(flags)
    metrics, rows = metrics_of(tmp_path / "out"), assignments_of(tmp_path / "out")
    assert metrics["class_names"] == names and {row["majority"] for row in metrics["clusters"]} <= set(names)
    assert {row["label_name"] for row in rows} == set(names) and caption(metrics["clusters"][0]) in out
    assert {row["mapped_name"] for row in rows} <= {*names, "unmatched"}
    start(f"{flags} --map-from {tmp_path}/out/metrics.json --output-dir {tmp_path}/b")
    _, err = start(f"--map-from {tmp_path}/out/metrics.json --output-dir {tmp_path}/c", code=2)
    assert "--class-names in one of the two commands only?" in err


@pytest.mark.slow
def test_many_clusters_take_several_sheets(start, tmp_path, monkeypatch):
    for module in (cluster_eval, pictures):
        monkeypatch.setattr(module, "PER_SHEET", 4)
    out, _ = start("--bn-images 512", pictures=True)
    used = metrics_of(tmp_path / "out")["num_clusters_used"]
    assert used > 4 and (tmp_path / "out/contact_sheet_2.png").exists()
    assert f"and {used - 4} smaller ones, see metrics.json" in out
    start("--bn-images 512 --contact-sheets 1", pictures=True)
    assert [path.name for path in (tmp_path / "out").glob("contact*")] == ["contact_sheet.png"]


def test_batch_size_changes_nothing(start, tmp_path):
    """Evaluation mode: batch statistics would make an image's cluster depend on its neighbours."""
    for size in (7, 256):
        start(f"--output-dir {tmp_path}/{size} --batch-size {size}")
    few, all_ = (np.loadtxt(tmp_path / size / "assignments.csv", delimiter=",", skiprows=1, usecols=(1, 2))
                 for size in ("7", "256"))
    np.testing.assert_allclose(few, all_, atol=2e-6)


def test_without_labels_nothing_is_scored(start, tmp_path, monkeypatch):
    def unlabelled(*args, **options):
        dataset = build_dataset(*args, **options)
        dataset.labels = None
        return dataset
    monkeypatch.setattr(cluster_eval, "build_dataset", unlabelled)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/confusion_matrix.png").write_text("of an earlier run")
    start(pictures=True)
    metrics = metrics_of(tmp_path / "out")
    assert not {"acc", "nmi", "mapping"} & metrics.keys() and "purity" not in metrics["clusters"][0]
    assert not (tmp_path / "out/confusion_matrix.png").exists() and (tmp_path / "out/top3.png").exists()


def test_without_matplotlib_only_the_pictures_are_missing(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out, _ = start(pictures=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["assignments.csv", "metrics.json"]
    assert out.count("no pictures: matplotlib is not installed") == 1


def test_key_chooses_the_network(start, checkpoint, tmp_path):
    """teacher is the momentum encoder and the default, student the network that was trained."""
    state = torch.load(checkpoint, weights_only=True)
    student = {name: -weight if "last_linear" in name else weight for name, weight in state["model"].items()}
    save_checkpoint(tmp_path / "both.pth", state | {"model": student, "teacher": state["model"]})
    save_checkpoint(tmp_path / "student.pth", state | {"model": student})
    written = {}
    for name, flags in (("alone", ""), ("default", f"--checkpoint {tmp_path}/both.pth"),
                        ("teacher", f"--checkpoint {tmp_path}/both.pth --key teacher"),
                        ("student", f"--checkpoint {tmp_path}/both.pth --key student"),
                        ("student alone", f"--checkpoint {tmp_path}/student.pth")):
        out, _ = start(f"{flags} --output-dir '{tmp_path}/{name}'")
        written[name] = assignments_of(tmp_path / name)
        assert ("the student is taken" in out) == (name == "student")
    assert written["default"] == written["teacher"] == written["alone"]
    assert written["student"] == written["student alone"] != written["teacher"]


@pytest.mark.parametrize("flags, named", [
    ("--checkpoint none.pth", "none.pth"), ("--checkpoint {broken}", "broken.pth"),
    ("--checkpoint {other}", "other.pth"), ("--checkpoint {nan}", "nan.pth"), ("--data nothing", "nothing"),
    ("--predictions a.csv", "--checkpoint or --predictions"), ("--bn-images 1", "--bn-images: 1"),
    ("--contact-sheets -1", "--contact-sheets: -1"), ("--batch-size 0", "--batch-size: 0"),
    ("--images-per-cluster 0", "--images-per-cluster: 0"), ("--key teacher", "has no 'teacher'"),
    ("--output-dir {run}", "--output-dir"), ("--output-dir {broken}", "--output-dir")])
def test_bad_command_is_one_line(start, checkpoint, tmp_path, flags, named):
    broken, other, nan = (tmp_path / name for name in ("broken.pth", "other.pth", "nan.pth"))
    broken.write_bytes(checkpoint.read_bytes()[:-100])
    state = torch.load(checkpoint, weights_only=True)
    save_checkpoint(other, state | {"model": {}})
    state["model"]["projection_heads.last_linear.weight"][:] = torch.nan
    save_checkpoint(nan, state)
    _, err = start(flags.format(broken=broken, other=other, nan=nan, run=checkpoint.parent), code=2)
    out = tmp_path / "out"
    assert named in err and len(err.splitlines()) == 1 and (not out.exists() or not list(out.iterdir()))


@pytest.mark.parametrize("content, problem", [
    ("a\nb\n", "2 names, for 10 classes"), ("a\n" * 11, "11 names, for 10"), ("", "1 names, line 1 empty"),
    ("a\nb\n\n" + "c\n" * 7, "10 names, line 3 empty, for 10"), (None, "cannot be read (No such file")])
def test_wrong_class_names_are_refused(start, tmp_path, content, problem):
    if content is not None:
        (tmp_path / "names.txt").write_text(content)
    _, err = start(f"--class-names {tmp_path}/names.txt", code=2)
    assert f"--class-names {tmp_path}/names.txt: {problem}" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_class_names_of_imagenet(start, tmp_path):
    """In the order of the synsets' numbers, as their folders are sorted."""
    names = name_classes("imagenet", [f"n{c:08}" for c in range(1000)])
    known = {0: "tench", 207: "golden retriever", 281: "tabby", 930: "French loaf", 999: "toilet tissue"}
    assert {c: names[c] for c in known} == known and len(set(names)) == 1000
    assert "1000 names, for 10 classes" in start("--class-names imagenet", code=2)[1]
    (tmp_path / "one.txt").write_text("one.png\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    _, err = start(f"--data {tmp_path}/one.txt --class-names imagenet", code=2)
    assert "they come from labels or --map-from" in err and err.count("\n") == 1


def test_class_names_of_predictions(here, tmp_path):
    np.savez(tmp_path / "a.npz", labels=np.arange(30) % 3, predictions=np.arange(30) % 3)
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    out, _ = here(f"cluster_eval.py --predictions {tmp_path}/a.npz --class-names {tmp_path}/names.txt "
                  f"--output-dir {tmp_path}/out")
    assert "cluster 2: 100 % cow, 10 images" in out


@pytest.mark.parametrize("flags, named", [
    ("", "--checkpoint or --predictions"), ("--predictions none.csv", "none.csv"),
    ("--predictions a.csv --silhouette", "--silhouette: needs a --checkpoint"),
    ("--predictions a.csv --key student", "--key: needs a --checkpoint"),
    ("--predictions a.csv --kmeans 3", "--kmeans: needs a --checkpoint")])
def test_one_of_checkpoint_and_predictions_is_needed(here, tmp_path, flags, named):
    _, err = here(f"cluster_eval.py --output-dir {tmp_path}/out {flags}", code=2)
    assert named in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_refusal_leaves_no_folder_and_no_traceback(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["projection_heads.last_linear.weight"][:] = torch.nan
    save_checkpoint(tmp_path / "nan.pth", state)
    _, err = run(f"cluster_eval.py --checkpoint {tmp_path}/nan.pth --output-dir {tmp_path}/out", code=2)
    assert "nan.pth" in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
