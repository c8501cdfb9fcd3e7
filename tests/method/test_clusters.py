"""k-means equals scikit-learn's from the same starts, and cluster_eval.py --kmeans scores any backbone."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import metrics_of
from sklearn.cluster import KMeans

from checkpoint import save_checkpoint
from cluster_eval import evaluate
from clusters import cluster_features, kmeans, kmeans_plus_plus, lloyd, nearest_centres
from data import build_dataset, eval_batches
from predictions import predict
from pretrained import load_twist


def blobs(N=600, K=7, D=5, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(K, D))
    return torch.from_numpy(centres[rng.integers(0, K, N)] + rng.normal(size=(N, D)))


# ---------------------------------------------------------------- the algorithm
@pytest.mark.parametrize("K", [1, 2, 7, 40])
def test_lloyd_is_scikit_learns(K):
    x = blobs()
    start = kmeans_plus_plus(x, K, np.random.default_rng(1))
    centres, inertia = lloyd(x, start)
    theirs = KMeans(K, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(x.numpy())
    np.testing.assert_allclose(centres, theirs.cluster_centers_, atol=1e-12)
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-12)
    new = blobs(seed=2)
    assert nearest_centres(new, centres)[0].tolist() == theirs.predict(new.numpy()).tolist()


def test_the_tightest_of_several_starts_wins():
    x = blobs()
    tries = [lloyd(x, kmeans_plus_plus(x, 7, np.random.default_rng([3, 10, i]))) for i in range(6)]
    inertias = [inertia for _, inertia in tries]
    assert min(inertias) < 0.99 * max(inertias) and np.argmin(inertias) not in (0, 5)   # it is a choice
    centres, inertia = kmeans(x, 7, starts=6, seed=3)
    assert inertia == min(inertias) and centres.equal(tries[np.argmin(inertias)][0])
    assert kmeans(x, 7, starts=6, seed=3)[0].equal(centres)                       # a function of the seed


def test_starts_are_spread_out():
    """k-means++ draws by squared distance: of three far groups it takes one each, whatever their sizes."""
    x = torch.tensor([[0.0, 0.0]] * 500 + [[1e4, 0.0]] * 2 + [[0.0, 1e4]])
    for seed in range(20):
        assert len(kmeans_plus_plus(x, 3, np.random.default_rng(seed)).unique(dim=0)) == 3


def test_chunks_and_equal_images_change_nothing():
    x = blobs(N=100)
    for one, other in zip(nearest_centres(x, x[:4]), nearest_centres(x, x[:4], chunk=7), strict=True):
        torch.testing.assert_close(one, other)
    same = torch.tensor([[1.0, 2.0]] * 9 + [[3.0, 4.0]])       # two different images in three clusters
    centres, inertia = kmeans(same, 3, starts=2)
    assert inertia == 0 and centres.isfinite().all()
    with pytest.raises(ValueError, match="num_clusters: 11 clusters of 10 images"):
        kmeans(same, 11)


def test_features_are_normalised():
    """By their direction, not by their length: a scaled feature stays in its cluster."""
    x, scale = blobs().float().numpy(), np.random.default_rng(4).uniform(0.1, 9, (600, 1)).astype(np.float32)
    clusters, similarity, _ = cluster_features(x, x, 7, 3, 0, "cpu")
    scaled, *_ = cluster_features(x * scale, x[::-1].copy(), 7, 3, 0, "cpu")
    assert (scaled[::-1] == clusters).mean() > 0.99 and len(set(clusters)) == 7
    unit = F.normalize(torch.from_numpy(x), dim=1)
    centres = torch.stack([unit[clusters == k].mean(0) for k in range(7)])
    np.testing.assert_allclose(similarity, torch.cosine_similarity(unit, centres[clusters]), atol=1e-5)


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def bare(network, tmp_path_factory):
    """The backbone of `network` alone, as a file of another project, with the flags that it needs."""
    path = tmp_path_factory.mktemp("bare") / "backbone.pth"
    torch.save(load_twist(network)[0].backbone.state_dict(), path)
    return f"{path} --arch resnet8 --image-size 16 --mean 0.5 --std 0.25 --data fake"


def assignments_of(folder):
    with open(folder / "assignments.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_clusters_of_any_backbone(here, network, bare, tmp_path):
    """Fitted on training images, predicted on the others; scored and written as a network's own classes."""
    flags = "--kmeans 12 --kmeans-starts 2 --silhouette --device cpu"
    out, _ = here(f"cluster_eval.py --checkpoint {bare} {flags} --output-dir {tmp_path}/a", pictures=True)
    rows, metrics = assignments_of(tmp_path / "a"), metrics_of(tmp_path / "a")
    twist, config = load_twist(network)
    train, test = (build_dataset("fake", split) for split in ("train", "test"))
    features = [predict(twist, eval_batches(part, config, "cpu"))[0] for part in (train, test)]
    clusters, similarity, inertia = cluster_features(*features, 12, 2, 0, "cpu")
    assert [int(row["prediction"]) for row in rows] == clusters.tolist()
    np.testing.assert_allclose([float(row["similarity"]) for row in rows], similarity, atol=1e-5)
    assert "probability" not in rows[0] and rows[0]["label_name"].startswith("class ")
    expected = evaluate(test.labels.numpy(), clusters)
    assert metrics["acc"] == expected["acc"] > 0.5 and metrics["nmi"] == expected["nmi"]
    assert metrics["kmeans"] == {"num_train": 512, "starts": 2, "inertia": pytest.approx(inertia, rel=1e-5)}
    assert -1 < metrics["silhouette"] < 1 and "k-means on the features of 512 training images" in out
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert written == {"assignments.csv", "metrics.json", "confusion_matrix.png", "contact_sheet.png"}
    here(f"cluster_eval.py --checkpoint {network} {flags} --output-dir {tmp_path}/b")       # of a Twist, too
    assert metrics_of(tmp_path / "b")["acc"] == metrics["acc"]
    here(f"cluster_eval.py --checkpoint {bare} {flags} --split train --output-dir {tmp_path}/c")
    assert metrics_of(tmp_path / "c")["kmeans"] == metrics["kmeans"]              # the same centres


@pytest.mark.parametrize("flags, named", [
    ("{bare}", "--kmeans K clusters the features"), ("{barlow}", "--kmeans K clusters the features"),
    ("{bare} --kmeans 513", "--kmeans 513: must be at most the 512 training images"),
    ("{bare} --kmeans 5 --map-from a.json", "--map-from: --kmeans numbers its clusters anew"),
    ("{bare} --kmeans -1", "--kmeans: -1"), ("nowhere.pth", "nowhere.pth")])
def test_a_network_without_classes_is_refused_with_a_remedy(here, network, bare, tmp_path, flags, named):
    state = torch.load(network, weights_only=True)
    save_checkpoint(tmp_path / "barlow.pth", state | {"config": state["config"] | {"loss": "barlow"}})
    flags = flags.format(bare=bare, barlow=tmp_path / "barlow.pth")
    _, err = here(f"cluster_eval.py --checkpoint {flags} --output-dir {tmp_path}/out", code=2)
    assert named in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert ("--kmeans" in err) == ("nowhere" not in flags)
