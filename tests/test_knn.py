"""knn.py: the weighted vote against a naive one, any number of images, and the command."""

import json

import numpy as np
import pytest
import torch

import knn
from checkpoint import run, save_checkpoint
from data import build_dataset, eval_batches
from knn import extract_features, knn_predict, nearest_neighbours, vote
from model import build_backbone, build_twist


def naive_scores(train_features, train_labels, features, k, temperature, num_classes):
    """One image at a time, in float64."""
    train = train_features / np.linalg.norm(train_features, axis=1, keepdims=True)
    scores = np.zeros((len(features), num_classes))
    for i, x in enumerate(features / np.linalg.norm(features, axis=1, keepdims=True)):
        similarity = train @ x
        for j in np.argsort(-similarity)[:k]:
            scores[i, train_labels[j]] += np.exp(similarity[j] / temperature)
    return scores


def make(M=300, N=101, D=16, num_classes=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(M, D)), rng.integers(0, num_classes, M), rng.normal(size=(N, D))


@pytest.mark.parametrize("N", [1, 99, 101, 1025])
@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.07), (300, 0.5), (5, 0.01)])
def test_equals_the_naive_vote(N, k, temperature):
    train_features, train_labels, features = make(N=N)
    scores = knn_predict(*map(torch.from_numpy, (train_features, train_labels, features)), k, temperature, 7)
    expected = naive_scores(train_features, train_labels, features, k, temperature, 7)
    assert scores.shape == (N, 7)
    np.testing.assert_allclose(scores, expected, rtol=3e-7 / temperature)      # float32 similarities
    assert scores.argmax(1).tolist() == expected.argmax(1).tolist()


def test_chunks_change_nothing():
    train_features, _, features = map(torch.from_numpy, make())
    similarity, index = nearest_neighbours(train_features, features, 50)
    for chunk, train_chunk in ((1, 300), (7, 13), (101, 1), (100, 299)):      # also parts smaller than k
        s, i = nearest_neighbours(train_features, features, 50, chunk, train_chunk)
        torch.testing.assert_close(s, similarity, rtol=0, atol=1e-6)
        assert torch.equal(i, index)
    assert (similarity.diff() <= 0).all()                                    # nearest first


def test_fewer_neighbours_are_a_prefix():
    train_features, train_labels, features = map(torch.from_numpy, make())
    similarity, index = nearest_neighbours(train_features, features, 200)
    for k in (10, 20, 100, 200):
        scores = knn_predict(train_features, train_labels, features, k, 0.07, 7)
        torch.testing.assert_close(vote(similarity[:, :k], train_labels[index[:, :k]], 0.07, 7), scores)


def test_an_absent_class_has_a_column():
    train_features, train_labels, features = map(torch.from_numpy, make())
    scores = knn_predict(train_features, train_labels.clamp_max(5), features, 10, 0.07, 9)
    assert scores.shape == (101, 9) and (scores[:, 6:] == 0).all()


@pytest.mark.parametrize("change, message", [
    ({"k": 0}, "k: 0 neighbours"),
    ({"k": 301}, "k: 301 neighbours"),
    ({"temperature": 0.0}, "temperature: "),
    ({"temperature": float("nan")}, "temperature: "),
    ({"num_classes": 3}, "train_labels: expected 0 to 2"),
    ({"train_labels": torch.zeros(299, dtype=torch.long)}, "train_labels: 299 for 300"),
    ({"features": torch.full((2, 16), torch.nan)}, "features: contain NaN"),
    ({"train_features": torch.full((300, 16), torch.inf)}, "features: contain NaN"),
])
def test_bad_input_is_named(change, message):
    train_features, train_labels, features = map(torch.from_numpy, make())
    sound = dict(train_features=train_features, train_labels=train_labels, features=features, k=5,
                 temperature=0.07, num_classes=7)
    assert torch.isfinite(knn_predict(**sound)).all()
    with pytest.raises(ValueError, match=message):
        knn_predict(**(sound | change))


@pytest.mark.parametrize("training", [True, False])
def test_extract_features(training):
    torch.manual_seed(0)
    backbone = build_backbone("resnet8").train(training)
    dataset = build_dataset("fake", "test")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = extract_features(backbone, eval_batches(dataset, CONFIG, "cpu", batch_size=100))
    assert features.shape == (256, backbone.feature_dim) and features.dtype == torch.float32
    one_by_one = extract_features(backbone, eval_batches(dataset, CONFIG, "cpu", 1))    # no batch statistics
    torch.testing.assert_close(one_by_one, features)
    assert backbone.training is training and all(module.training is training for module in backbone.modules())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


# ---------------------------------------------------------------- the command
CONFIG = {"arch": "resnet8", "num_classes": 10, "hidden_dim": 16, "bunch_size": None, "nbs": True,
          "small_images": False, "data": "fake", "seed": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    save_checkpoint(path, {"model": build_twist(CONFIG).state_dict(), "config": CONFIG})
    return path


def start(*argv):
    with pytest.raises(SystemExit) as end:
        run(knn.main, knn.get_parser(), [str(word) for word in argv])
    return end.value.code or 0


def test_command(checkpoint, tmp_path, capsys, monkeypatch):
    def shuffled(*args):         # labels that cannot be told, lest every accuracy be 1
        dataset = build_dataset(*args)
        dataset.labels = torch.randint(0, 10, (len(dataset),), generator=torch.Generator().manual_seed(0))
        return dataset
    monkeypatch.setattr(knn, "build_dataset", shuffled)
    assert start("--checkpoint", checkpoint, "--output_dir", tmp_path, "--k", 200, 1, "--device", "cpu") == 0
    metrics, out = json.loads((tmp_path / "metrics.json").read_text()), capsys.readouterr().out
    network = build_twist(CONFIG)
    network.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    train, test = shuffled("fake", "train", 3), shuffled("fake", "test", 3)
    features = [extract_features(network.backbone, eval_batches(part, CONFIG, "cpu")).double().numpy()
                for part in (train, test)]
    for k in (1, 200):
        scores = naive_scores(features[0], train.labels.numpy(), features[1], k, 0.07, 10)
        hits = scores.argsort(1)[:, ::-1] == test.labels.numpy()[:, None]
        assert metrics["top1"][str(k)] == pytest.approx(hits[:, 0].mean(), abs=1 / 256)    # but for a tie
        assert f"top-1 {metrics['top1'][str(k)]:.4f}   top-5 {metrics['top5'][str(k)]:.4f}" in out
    assert metrics["top5"]["200"] == pytest.approx(hits[:, :5].any(1).mean(), abs=1 / 256)
    assert metrics["top5"]["1"] == metrics["top1"]["1"]     # classes without a neighbour do not count
    assert metrics["num_train"] == 512 and metrics["num_test"] == 256


def test_bad_command_is_one_line(checkpoint, tmp_path, capsys):
    other = tmp_path / "other.pth"
    save_checkpoint(other, {"model": {}, "config": CONFIG})
    out = tmp_path / "out"
    for argv, named in (
        (["--checkpoint", tmp_path / "none.pth"], "none.pth"),
        (["--checkpoint", other], "other.pth"),
        (["--checkpoint", checkpoint, "--data", "nothing"], "nothing"),
        (["--checkpoint", checkpoint, "--k", 10, 513], "--k 10 513"),
        (["--checkpoint", checkpoint, "--k", 0], "--k 0"),
        (["--checkpoint", checkpoint, "--temperature", 0], "--temperature 0"),
        (["--checkpoint", checkpoint, "--batch-size", 0], "--batch-size 0"),
        (["--checkpoint", checkpoint, "--output-dir", checkpoint.parent], "--output-dir"),
        (["--k", 10], "--checkpoint"),
    ):
        assert start("--output-dir", out, *argv) == 2
        error = capsys.readouterr().err
        assert named in error and len(error.splitlines()) == 1
        assert not out.exists()
