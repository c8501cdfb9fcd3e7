"""benchmarks/ablations.py: runs are trained, scored and resumed; docs/ablations.md has their tables."""

import csv
import sys
from pathlib import Path

import pytest

from cluster_eval import evaluate
from data import build_dataset, eval_batches
from predictions import predict
from pretrained import load_twist

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import ablations  # noqa: E402


def test_docs_have_the_tables_of_complete_runs():
    rows = ablations.read_rows()
    made = [(row["run"], int(row["seed"])) for row in rows]
    assert sorted(made) == sorted((name, seed) for name in ablations.RUNS for seed in ablations.SEEDS)
    assert all(row[key] for row in rows for key in ("knn", "acc", "nmi", "minutes"))
    assert ablations.tables(rows) in (ROOT / "docs/ablations.md").read_text(encoding="utf-8")


def test_a_cell_is_the_mean_least_and_greatest():
    rows = [dict(run="TWIST", loss=value) for value in ("-0.5", "-0.75", "-1")] + [dict(run="x", loss="9")]
    assert ablations.cell(rows, "TWIST", "loss") == "-0.75 (-1.00 to -0.50)"
    assert ablations.cell(rows, "y", "loss") == ""


def test_runs_are_trained_scored_and_resumed(monkeypatch, tmp_path, capsys):
    """Four steps of two runs, the second from the checkpoint of the first."""
    monkeypatch.setattr(ablations, "ROWS", tmp_path / "ablations.csv")
    monkeypatch.setattr(ablations, "COMMON", "--data fake --epochs 1 --device cpu --print-every 1")
    monkeypatch.setattr(ablations, "RUNS", {"TWIST": "--alpha 0.5", "self-labelled": None})
    monkeypatch.setattr(ablations, "TABLES", (("All", ("TWIST", "self-labelled"), ("loss", "acc"), {}),))
    monkeypatch.setattr(ablations, "SEEDS", (3,))
    monkeypatch.setattr(ablations, "ProcessPoolExecutor", lambda processes: Here())
    monkeypatch.setattr(ablations, "build_dataset", lambda name, part: build_dataset("fake", part))
    monkeypatch.setattr(ablations, "draw", lambda *_: None)
    ablations.main(["--output-dir", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "ablations.csv").open()))
    assert [(row["run"], row["seed"]) for row in rows] == [("TWIST", "3"), ("self-labelled", "3")]
    entries = ablations.log_of(tmp_path / "TWIST_3")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert float(rows[0]["loss"]) == pytest.approx(entries[-1]["loss"], rel=1e-3)        # the last quarter
    assert rows[1]["sharpness"] == ""                        # a term that self-labelling does not have
    network, config = load_twist(tmp_path / "self-labelled_3/checkpoint.pth")
    assert config["checkpoint"] == str(tmp_path / "TWIST_3/checkpoint.pth") and config["seed"] == 3
    test = build_dataset("fake", "test")
    _, probabilities = predict(network, eval_batches(test, config, "cpu"))
    acc = evaluate(test.labels.numpy(), probabilities.argmax(1))["acc"]
    assert float(rows[1]["acc"]) == pytest.approx(acc, abs=1e-4)
    before = (tmp_path / "ablations.csv").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(ablations, "make", lambda *_: 1 / 0)
    ablations.main(["--output-dir", str(tmp_path)])                      # nothing is left to do
    assert (tmp_path / "ablations.csv").read_bytes() == before
    assert "| self-labelled |" in capsys.readouterr().out


class Here:
    """Runs the jobs of a pool in this process."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)
