"""benchmarks/fashion_mnist.py: which runs it makes, that it resumes, and what it makes of their scores."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import saved_network

from data import build_dataset

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import fashion_mnist  # noqa: E402


@pytest.fixture
def made(monkeypatch):
    """The runs that were made, each as (recipe, seed, threads, rounding); none trains."""
    runs = []

    def trained(run, train, test, folder):
        runs.append(run)
        recipe, seed, threads, rounding = run
        if len(runs) == 7:
            raise KeyboardInterrupt
        return dict(recipe=recipe, seed=seed, threads=threads, rounding=rounding, acc=0.7 + seed / 100)
    monkeypatch.setattr(fashion_mnist, "trained", trained)
    monkeypatch.setattr(fashion_mnist, "pixels", lambda *_: [dict(recipe="pixels", knn=0.8460)])
    return runs


def test_a_benchmark_that_was_stopped_makes_the_runs_that_are_left(made, tmp_path, capsys):
    seeds = ["0", "1", "2", "3", "4", "9"]
    command = ["--recipes", "classes", "linear", "--seeds", *seeds, "--output-dir", str(tmp_path)]
    roundings = fashion_mnist.ROUNDINGS
    expected = [("classes", seed, threads, rounding)
                for seed in map(int, seeds) for threads in (1, 2) for rounding in roundings]
    expected += [("linear", seed, 1, roundings[-1]) for seed in range(5)]          # the first five
    assert len(expected) >= 8
    with pytest.raises(KeyboardInterrupt):
        fashion_mnist.main(command)
    fashion_mnist.main(command)
    assert made == [*expected[:7], *expected[6:]]              # the seventh once more
    fashion_mnist.main(command)
    assert len(made) == len(expected) + 1
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["recipe"] for row in rows] == ["pixels"] + [run[0] for run in expected]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| classes")][-1]
    assert printed.startswith(f"| classes | {12 * len(roundings)} | 0.732 (0.700 to 0.790) | ")


def test_an_untrained_network_is_scored(monkeypatch, tmp_path):
    """The command gets the run's threads and rounding; the scores are those of its checkpoint."""
    seen = []
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)

    def train(command, cwd, check, env):
        seen.append((command[1:], env["OMP_NUM_THREADS"], env.get("ATEN_CPU_CAPABILITY")))
        out = Path(command[command.index("--output-dir") + 1])
        out.mkdir()
        saved_network(out / "checkpoint.pth", "--data fashion-mnist --image-size 12")
    monkeypatch.setattr(fashion_mnist.subprocess, "run", train)
    train_set, test_set = (build_dataset("fashion-mnist", part).subset(slice(200))
                           for part in ("train", "test"))
    monkeypatch.setattr(fashion_mnist, "linear_accuracy", lambda *_: 0.5)
    monkeypatch.setattr(fashion_mnist, "ROUNDINGS", ["default", "avx2", "bf16"])
    rows = []
    for run in (("classes", 3, 1, "bf16"), ("classes", 9, 2, "avx2")):
        rows.append(fashion_mnist.trained(run, train_set, test_set, tmp_path))
    command = ["pretrain.py", "--seed", "3", "--output-dir", f"{tmp_path}/classes_3_1_bf16", "--amp", "bf16"]
    assert seen[0] == (command, "1", None)
    command = ["pretrain.py", "--seed", "9", "--output-dir", f"{tmp_path}/classes_9_2_avx2"]
    assert seen[1] == (command, "2", "avx2")                   # as a user types it
    assert {"acc", "nmi", "ari", "ami", "knn", "linear", "minutes", "cpu_seconds"} <= rows[0].keys()
    assert 0.1 <= rows[0]["acc"] <= 1 and 0.1 <= rows[0]["knn"] <= 1 and "knn" not in rows[1]


@pytest.mark.parametrize("known, expected", [
    (dict(avx512_bf16=True), ["default", "avx2", "bf16"]), (dict(avx512_bf16=False), ["default", "avx2"]),
    (dict(), ["default", "avx2"]), (None, ["default", "avx2"])])
def test_bf16_is_the_last_rounding_of_a_cpu_that_has_it(known, expected, monkeypatch):
    """None: a PyTorch that cannot tell."""
    cpu = SimpleNamespace() if known is None else SimpleNamespace(get_capabilities=lambda: known)
    monkeypatch.setattr(fashion_mnist.torch, "cpu", cpu)
    monkeypatch.setattr(fashion_mnist.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert fashion_mnist.roundings() == expected
