"""knn.py equals a naive weighted vote for any number of images and chunks; the command does what it says."""

import argparse
import copy
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import metrics_of, run
from sklearn.decomposition import PCA

import data
import knn
from checkpoint import UserError, save_checkpoint
from data import build_dataset, eval_batches
from knn import (
    extract_features,
    knn_images,
    knn_predict,
    nearest_neighbours,
    scores_to_watch,
    vote,
    whiten,
)
from model import build_backbone
from predictions import predict, predict_part
from pretrained import load_pretrained, load_twist

FAKE = {"data": "fake", "image_size": 0, "mean": None, "std": None}


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
    features = extract_features(backbone, eval_batches(dataset, FAKE, "cpu", batch_size=100))
    assert features.shape == (256, backbone.feature_dim) and features.dtype == torch.float32
    one_by_one = extract_features(backbone, eval_batches(dataset, FAKE, "cpu", 1))    # no batch statistics
    torch.testing.assert_close(one_by_one, features)
    assert backbone.training is training and all(module.training is training for module in backbone.modules())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_of_the_backbone_alone(network, dtype):
    """Rows are float32 all the same, near those of float32; the head's products are float32."""
    twist, config = load_twist(network)
    dataset = build_dataset("fake", "test")
    plain, _ = predict(twist, eval_batches(dataset, config, "cpu"))
    features, probabilities = predict(twist, eval_batches(dataset, config, "cpu"), dtype)
    assert features.dtype == probabilities.dtype == np.float32 and not np.array_equal(features, plain)
    np.testing.assert_allclose(features, plain, atol=0.03 * np.abs(plain).max())
    with torch.inference_mode():
        again = twist.projection_heads(torch.from_numpy(features)).softmax(-1)
    torch.testing.assert_close(torch.from_numpy(probabilities), again)
    same = extract_features(twist.backbone, eval_batches(dataset, config, "cpu"), dtype)
    assert same.equal(torch.from_numpy(features))


# ---------------------------------------------------------------- whitened
def test_whitened_features_have_the_similarities_of_scikit_learns_pca():
    train_features, _, features = map(torch.from_numpy, make())
    mixed = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pca = PCA(whiten=True).fit(train_features @ mixed)
    expected = torch.from_numpy(pca.transform(features @ mixed))
    white_train, white = whiten(train_features @ mixed, features @ mixed, shrinkage=0)
    assert white.dtype == white_train.dtype == torch.float32
    expected = (expected @ expected.T).float() * 300 / 299     # scikit-learn divides by M - 1
    torch.testing.assert_close(white @ white.T, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(white_train.T @ white_train / 300, torch.eye(16), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_no_linear_map_changes_whitened_neighbours(seed):
    torch.manual_seed(seed)
    train_features, train_labels, features = map(torch.from_numpy, make(seed=seed))
    mixed, shift = torch.randn(16, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    scores = []
    for pair in ((train_features, features), (train_features @ mixed + shift, features @ mixed + shift)):
        white_train, white = whiten(*pair, shrinkage=0)
        scores.append(knn_predict(white_train, train_labels, white, 20, 0.07, 7))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)


def test_shrinkage_is_in_the_formula():
    """Two directions, of variance 1 and 9, so the mean is 5; half of it is added."""
    train_features = torch.tensor([[1.0, 3], [-1, 3], [1, -3], [-1, -3]])
    white, _ = whiten(train_features + 7, train_features, shrinkage=0.5)
    found = (white ** 2).mean(0).sort().values
    torch.testing.assert_close(found, torch.tensor([1 / 3.5, 9 / 11.5]))


def test_a_strong_direction_no_longer_hides_the_class():
    """Brightness says nothing of the class, and varies 30 times as much as the rest."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, 600))
    x = torch.from_numpy(rng.normal(size=(600, 8)))
    x[:, 0] = 0.3 * x[:, 0] + labels
    x[:, 1] *= 30
    x = x @ torch.linalg.qr(torch.from_numpy(rng.normal(size=(8, 8))))[0]
    right = []
    for train_features, features in ((x[:500], x[500:]), whiten(x[:500], x[500:])):
        scores = knn_predict(train_features, labels[:500], features, 20, 0.07, 2)
        right.append((scores.argmax(1) == labels[500:]).float().mean())
    assert right[0] < 0.75 and right[1] > right[0] + 0.1


def test_fewer_images_than_features_and_features_all_alike():
    train_features, train_labels, features = map(torch.from_numpy, make(M=10))
    assert all(part.isfinite().all() for part in whiten(train_features, features))
    alike = torch.ones(10, 16)
    white_train, white = whiten(alike, features.float())
    assert torch.equal(white_train, torch.zeros(10, 16)) and knn_predict(
        white_train, train_labels, white_train, 5, 0.07, 7).isfinite().all()
    for bad in (torch.nan, torch.inf):
        train_features[3, 2] = bad
        with pytest.raises(ValueError, match="features: contain NaN"):
            whiten(train_features, features)


# ---------------------------------------------------------------- the command
def test_the_command_whitens(here, network, tmp_path):
    for flags in ("", "--whiten"):
        out, _ = here(f"knn.py --checkpoint {network} --k 5 --device cpu {flags} "
                      f"--output-dir {tmp_path}/k{flags}")
        assert (", whitened features\n" in out) is bool(flags)
        metrics = metrics_of(tmp_path / f"k{flags}")
        assert metrics["whiten"] is bool(flags)
    backbone, config = load_pretrained(network)
    parts = [build_dataset("fake", name, 0) for name in ("train", "test")]
    white_train, white = whiten(*(extract_features(backbone, eval_batches(part, config, "cpu"))
                                  for part in parts))
    scores = knn_predict(white_train, parts[0].labels, white, 5, 0.07, 10)
    expected = (scores.argmax(1) == parts[1].labels).double().mean().item()
    assert metrics["top1"]["5"] == pytest.approx(expected, abs=1 / 256)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_command(here, network, tmp_path, monkeypatch, interpolation):
    def shuffled(*args, **options):          # labels that no feature tells, so that no accuracy is 1
        dataset = build_dataset(*args, **options)
        dataset.labels = torch.randint(0, 10, (len(dataset),), generator=torch.Generator().manual_seed(0))
        return dataset
    monkeypatch.setattr(data, "build_dataset", shuffled)
    out, _ = here(f"knn.py --checkpoint {network} --output_dir {tmp_path} --k 200 1 --device cpu "
                  f"--interpolation {interpolation}")
    metrics = metrics_of(tmp_path)
    backbone, config = load_pretrained(network)
    config["interpolation"] = interpolation
    train, test = shuffled("fake", "train", 0), shuffled("fake", "test", 0)
    features = [extract_features(backbone, eval_batches(part, config, "cpu")).double().numpy()
                for part in (train, test)]
    for k in (1, 200):
        scores = naive_scores(features[0], train.labels.numpy(), features[1], k, 0.07, 10)
        hits = scores.argsort(1)[:, ::-1] == test.labels.numpy()[:, None]
        assert metrics["top1"][str(k)] == pytest.approx(hits[:, 0].mean(), abs=1 / 256)    # but for a tie
        assert f"top-1 {metrics['top1'][str(k)]:.4f}   top-5 {metrics['top5'][str(k)]:.4f}" in out
    assert metrics["top5"]["200"] == pytest.approx(hits[:, :5].any(1).mean(), abs=1 / 256)
    assert metrics["top5"]["1"] == metrics["top1"]["1"]     # classes without a neighbour do not count
    assert metrics["num_train"] == 512 and metrics["num_test"] == 256 and metrics["num_broken"] == 0


@pytest.mark.parametrize(("number", "ks"), [
    (9, [9]), (10, [10]), (150, [10, 20, 100]), (512, [10, 20, 100, 200])])
def test_without_k_only_neighbours_that_are_there_vote(here, network, tmp_path, monkeypatch, number, ks):
    monkeypatch.setattr(data, "build_dataset",
                        lambda *args, **options: build_dataset(*args, **options).subset(slice(number)))
    here(f"knn.py --checkpoint {network} --output_dir {tmp_path} --device cpu")
    assert [*metrics_of(tmp_path)["top1"]] == [str(k) for k in ks]


def test_two_processes_equal_one(network, tmp_path):
    for ranks in (1, 2):
        run(f"knn.py --checkpoint {network} --output-dir {tmp_path}/{ranks} --device cpu", ranks=ranks)
    one, two = (metrics_of(tmp_path / f"{ranks}") for ranks in (1, 2))
    assert one["num_train"] == two["num_train"] == 512 and one["num_test"] == two["num_test"] == 256
    for k, top1 in one["top1"].items():
        assert two["top1"][k] == pytest.approx(top1, abs=1 / 256) and top1 > 0.2


def test_half_precision_in_the_command(here, network, tmp_path):
    for amp in ("off", "bf16"):
        here(f"knn.py --checkpoint {network} --output-dir {tmp_path}/{amp} --k 20 --device cpu --amp {amp}")
    off, bf16 = (metrics_of(tmp_path / amp) for amp in ("off", "bf16"))
    assert (off["amp"], bf16["amp"]) == ("off", "bf16")
    assert bf16["top1"]["20"] == pytest.approx(off["top1"]["20"], abs=0.02) and off["top1"]["20"] > 0.5


def test_fewer_images_than_processes_are_refused(network, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 300)
    backbone, config = load_pretrained(network)
    with pytest.raises(UserError, match="256 test images, fewer than processes; use fewer"):
        predict_part(build_dataset("fake", "test"), backbone, config, "cpu", 64, 0)


def test_the_accuracy_to_watch_is_the_commands(here, network, tmp_path):
    here(f"knn.py --checkpoint {network} --output-dir {tmp_path} --k 20 --device cpu")
    backbone, config = load_pretrained(network)
    args = argparse.Namespace(**config | {"workers": 0})
    images = knn_images(args, build_dataset("fake", "pretrain"))
    bare = types.SimpleNamespace(backbone=backbone)                # as a network without classes
    found = scores_to_watch(bare, *images, vars(args), "cpu")
    assert found == {"knn_monitor": pytest.approx(metrics_of(tmp_path)["top1"]["20"])}
    assert found["knn_monitor"] > 0.5


def test_the_clusters_to_watch_are_the_commands(here, network, tmp_path):
    """Of a network that is being trained; neither it nor the random numbers notice."""
    here(f"cluster_eval.py --checkpoint {network} --output-dir {tmp_path} --device cpu")
    twist, config = load_twist(network)
    twist.train()
    args = argparse.Namespace(**config | {"workers": 0})
    images = knn_images(args, build_dataset("fake", "pretrain"))
    before, noise = copy.deepcopy(twist.state_dict()), torch.get_rng_state()
    found = scores_to_watch(twist, *images, vars(args), "cpu")
    assert all(module.training for module in twist.modules()) and noise.equal(torch.get_rng_state())
    assert all(value.equal(before[name]) for name, value in twist.state_dict().items())
    metrics = metrics_of(tmp_path)
    assert found["acc_monitor"] == pytest.approx(metrics["acc"], abs=1 / 256)
    assert found["nmi_monitor"] == pytest.approx(metrics["nmi"], abs=0.01) and found["knn_monitor"] > 0.5


@pytest.mark.parametrize("stage", ["pretrain", "barlow"])
def test_what_is_watched_has_the_precision_of_the_run(stage, here, tmp_path, monkeypatch):
    seen = []

    def extract(backbone, batches, amp_dtype=torch.float32):
        seen.append(amp_dtype)
        return extract_features(backbone, batches, amp_dtype)
    monkeypatch.setattr(knn, "extract_features", extract)
    here(f"{stage}.py --data fake --image-size 16 --hidden-dim 32 --batch-size 256 --epochs 1 --amp bf16 "
         f"--device cpu --output-dir {tmp_path}/run" + " --restarts 1" * (stage == "pretrain"))
    assert seen[:2] == [torch.bfloat16] * 2 and torch.bfloat16 not in seen[2:]         # the head: float32


def test_nothing_is_watched_without_a_validation_split(tmp_path):
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    args = argparse.Namespace(data=str(tmp_path), seed=0, data_dir="datasets")
    assert knn_images(args, build_dataset(args.data, "pretrain")) is None


def test_key_chooses_the_network(here, network, tmp_path):
    state = torch.load(network, weights_only=True)
    student = {name: weight + 0.5 if weight.dim() == 4 else weight for name, weight in state["model"].items()}
    save_checkpoint(tmp_path / "both.pth", state | {"model": student, "teacher": state["model"]})
    save_checkpoint(tmp_path / "student.pth", state | {"model": student})
    found = {}
    for name, flags in (("teacher", "--key teacher"), ("default", ""), ("student", "--key student")):
        out, _ = here(f"knn.py --checkpoint {tmp_path}/both.pth {flags} --output-dir {tmp_path}/{name}")
        found[name] = metrics_of(tmp_path / name)["top1"]
        assert ("the student is taken" in out) == (name == "student")
    for name, path in (("alone", network), ("student alone", tmp_path / "student.pth")):
        here(f"knn.py --checkpoint {path} --output-dir '{tmp_path}/{name}'")
        found[name] = metrics_of(tmp_path / name)["top1"]
    assert found["default"] == found["teacher"] == found["alone"]
    assert found["student"] == found["student alone"] != found["teacher"]


@pytest.mark.parametrize("flags, named", [
    ("--checkpoint none.pth", "none.pth"), ("--checkpoint {other}", "other.pth"),
    ("--data nothing", "nothing"), ("--k 10 513", "--k 513: there are only 512"), ("--k 0", "--k: 0"),
    ("--temperature 0", "--temperature: 0"), ("--batch-size 0", "--batch-size: 0"),
    ("--key teacher", "has no 'teacher'"), ("--key ema", "--key"), ("--output-dir {folder}", "--output-dir")])
def test_bad_command_is_one_line(here, network, tmp_path, flags, named):
    other, out = tmp_path / "other.pth", tmp_path / "out"
    save_checkpoint(other, {"model": {}, "config": torch.load(network, weights_only=True)["config"]})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pth").touch()
    flags = flags.format(other=other, folder=tmp_path / "run")
    _, err = here(f"knn.py --checkpoint {network} --output-dir {out} {flags}", code=2)
    assert named in err and len(err.splitlines()) == 1 and not out.exists()


def test_a_checkpoint_is_needed(here):
    assert "--checkpoint" in here("knn.py --k 10", code=2)[1]
