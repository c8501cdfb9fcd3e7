"""svm.py finds scikit-learn's minima and average precision by its definition; the command, on a small VOC."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import metrics_of, run, saved_network
from sklearn.datasets import load_sample_image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC
from torchvision.transforms.functional import resize

import checkpoint
import data
import pretrained
import svm
from data import read_picture
from lincls import pool_depth
from model import build_backbone
from svm import average_precision, cross_validate, fit_svm, folds_of, read_features, read_voc

COLOURS = {"cow": (200, 40, 40), "dog": (40, 180, 40), "train": (40, 40, 200), "cat": (200, 200, 40)}
FLAGS = "--shots 1 4 --samples 3 --costs 0.01 1 100"


# ---------------------------------------------------------------- the SVM
def problem(seed, n, d, apart):
    """Rows [n, d] and labels; apart: how far the classes are from each other."""
    rng = np.random.default_rng(seed)
    y = np.where(np.arange(n) < max(2, n // 4), 1, -1)
    return rng.normal(size=(n, d)) + apart * y[:, None] / np.sqrt(d), y


def linear_svc(x, y, cost):
    return LinearSVC(loss="squared_hinge", dual=True, tol=1e-9, C=cost, class_weight={1: 2, -1: 1},
                     intercept_scaling=1, max_iter=5_000_000, random_state=0).fit(x, y)


@pytest.mark.parametrize("n, d, apart", [(60, 5, 0.3), (60, 5, 4), (40, 300, 0), (20, 2, 0.5)])
def test_minima_are_scikit_learns(n, d, apart):
    """Overlapping and separable data, more and fewer numbers than images, small to large costs."""
    x, y = problem(0, n, d, apart)
    costs = [0.5 ** 19, 0.001, 0.1, 1, 10, 100]
    new = np.random.default_rng(1).normal(size=(10, d))
    for cost, beta in zip(costs, fit_svm(x @ x.T + 1, y, costs), strict=True):
        theirs = linear_svc(x, y, cost)
        np.testing.assert_allclose(x.T @ beta, theirs.coef_[0], atol=1e-4)
        assert beta.sum() == pytest.approx(theirs.intercept_[0], abs=1e-4)
        np.testing.assert_allclose((new @ x.T + 1) @ beta, theirs.decision_function(new), atol=1e-4)
    separable = (y * ((x @ x.T + 1) @ beta) > 0).all()
    assert separable == (apart == 4 or d > n)


def assert_is_minimum(gram, y, cost, beta):
    """The gradient vanishes: of a convex function that is the minimum."""
    pull = 2 * cost * np.where(y > 0, 2, 1) * y * np.maximum(0, 1 - y * (gram @ beta))
    np.testing.assert_allclose(beta, pull, atol=1e-6 * np.abs(beta).max())


def test_always_converges():
    """Whole steps of Newton's method go in circles on the first of these, and on some of the others."""
    x = np.array([[-0.1, 0.1], [-2.3, -0.3], [3.0, 16.6], [-0.9, 2.1], [-2.5, -6.4], [-0.1, -1.4]])
    y = np.array([-1, -1, -1, -1, -1, 1])
    assert_is_minimum(x @ x.T + 1, y, 10.0, next(fit_svm(x @ x.T + 1, y, [10.0])))
    for seed in range(300):
        rng = np.random.default_rng(seed)
        n, d = rng.integers(4, 30), rng.integers(1, 4)
        x, y = np.clip(rng.standard_cauchy((n, d)), -30, 30).round(1), np.where(rng.random(n) < 0.5, 1, -1)
        x[1], costs = x[0], rng.permutation([0.01, 1.0, 10.0])                    # twins; costs in any order
        for cost, beta in zip(costs, fit_svm(x @ x.T + 1, y, costs), strict=True):
            assert_is_minimum(x @ x.T + 1, y, cost, beta)


# ---------------------------------------------------------------- average precision
def naive_ap(scores, truth):
    """The sum over thresholds, highest first, of what recall gains times the best precision from there on."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        chosen = scores >= threshold
        points.append((truth[chosen].sum() / truth.sum(), truth[chosen].mean()))
    area, before = 0, 0
    for i, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[i:])
        before = recall
    return area


def test_average_precision_by_hand():
    def ap(truth, scores=None):
        truth = np.array(truth, bool)
        return average_precision(np.array(scores or range(len(truth), 0, -1), float), truth)
    assert ap([1, 1, 0, 0]) == 1
    assert ap([0, 0, 1, 1]) == 0.5                     # precisions 1/3, then 1/2: the first is raised
    assert ap([1, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)
    assert ap([0, 1, 1, 1]) == 0.75
    assert ap([1, 0, 0, 1, 0], [1] * 5) == ap([0, 0, 1, 1, 0], [1] * 5) == 0.4    # nothing told apart
    assert ap([1, 0, 1, 0], [2, 1, 1, 0]) == ap([1, 1, 0, 0], [2, 1, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)


def test_average_precision_against_the_definition():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scores, truth = rng.integers(-9, rng.integers(-7, 99), 60).astype(float), rng.random(60) < 0.3
        assert average_precision(scores, truth) == pytest.approx(naive_ap(scores, truth), abs=1e-12)


def test_average_precision_of_scikit_learn_is_not_interpolated():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        scores, truth = rng.integers(-9, rng.integers(-7, 99), 60).astype(float), rng.random(60) < 0.3
        found = average_precision(scores, truth, interpolated=False)
        assert found == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
        assert found <= average_precision(scores, truth)
    scores, truth = np.array([3.0, 2, 1]), np.array([False, True, True])
    assert average_precision(scores, truth, interpolated=False) == pytest.approx((1 / 2 + 2 / 3) / 2)


# ---------------------------------------------------------------- costs by cross-validation
@pytest.mark.parametrize("n, share", [(60, 0.3), (61, 0.1), (62, 0.05), (100, 0.9)])
def test_folds_are_scikit_learns(n, share):
    for seed in range(20):
        y = np.where(np.random.default_rng(seed).random(n) < share, 1, -1)
        y[seed % n], y[-3:] = 1, (1, 1, -1)
        for fold, (_, held) in enumerate(StratifiedKFold(3).split(np.zeros(n), y)):
            assert np.flatnonzero(folds_of(y) == fold).tolist() == held.tolist()


def test_cross_validation_is_scikit_learns():
    """The released code's call, with a smaller tolerance."""
    x, y = problem(3, 90, 6, 0.5)
    x, y = x[::-1], y[::-1]                             # the first image is a negative one
    costs = [0.5 ** 12, 0.01, 1.0, 100.0]
    expected = []
    for cost in costs:
        svc = LinearSVC(loss="squared_hinge", tol=1e-9, C=cost, class_weight={1: 2, -1: 1},
                        max_iter=5_000_000)
        expected.append(cross_val_score(svc, x, y, cv=3, scoring="average_precision").mean())
    assert len({round(ap, 4) for ap in expected}) > 2
    np.testing.assert_allclose(cross_validate(x @ x.T + 1, y, costs), expected, atol=1e-6)


# ---------------------------------------------------------------- a small VOC
@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """VOCdevkit/VOC2007 with four classes, each a spot of its colour; where it says 0, perhaps one, too."""
    root = tmp_path_factory.mktemp("data") / "VOCdevkit" / "VOC2007"
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    rng = np.random.default_rng(0)
    for part, number in (("trainval", 60), ("test", 40)):
        images = [f"{part}{i:03d}" for i in range(number)]
        labels = rng.choice([1, -1, 0], (number, 4), p=[0.3, 0.55, 0.15])
        for image, row in zip(images, labels, strict=True):
            height, width = rng.integers(40, 70, 2)
            picture = rng.integers(60, 120, (height, width, 3))
            for c, (label, colour) in enumerate(zip(row, COLOURS.values(), strict=True)):
                if label == 1 or label == 0 and rng.random() < 0.5:
                    top, left = height * c // 4, rng.integers(width // 2)
                    picture[top:top + height // 4, left:left + width // 3] = np.array(colour)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / f"JPEGImages/{image}.jpg")
        for name, column in zip(COLOURS, labels.T, strict=True):
            lines = [f"{image} {label:2d}\n" for image, label in zip(images, column, strict=True)]
            (lists / f"{name}_{part}.txt").write_text("".join(lines))
        (lists / f"{part}.txt").write_text("\n".join(images))
    return root


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network for 32 pixels, whose last map has 4 × 4 places."""
    return saved_network(tmp_path_factory.mktemp("network") / "resnet8.pth", "--data fake")


@pytest.fixture
def start(here, network, voc, tmp_path):
    """start("--shots 2", code=0): svm.py on the small VOC with other flags; returns (out, err)."""
    def run_here(flags="", code=0):
        return here(f"svm.py --checkpoint {network} --data {voc} --output-dir {tmp_path}/out {FLAGS} {flags}",
                    code)
    return run_here


def test_pictures_are_squashed_as_pillow_does(start, voc, tmp_path, monkeypatch):
    """Shorter side to 256, then to a square, both bilinear and in bytes, whichever way the picture lies."""
    shutil.copytree(voc, tmp_path / "voc")
    photograph, squashed, normalize = load_sample_image("china.jpg").copy(), [], data.normalize    # 427 × 640
    pictures = [photograph, photograph.transpose(1, 0, 2)]
    for part, picture in zip(("trainval", "test"), pictures, strict=True):
        Image.fromarray(picture.copy()).save(tmp_path / f"voc/JPEGImages/{part}000.jpg", format="PNG")
    monkeypatch.setattr(data, "normalize", lambda x, *how: squashed.extend(x * 255) or normalize(x, *how))
    network = saved_network(tmp_path / "resnet8.pth", "--data fake --arch resnet8 --image-size 224")
    start(f"--checkpoint {network} --data {tmp_path}/voc --shots 1 --samples 1")
    assert len(squashed) == 100
    pairs = zip((squashed[0], squashed[60]), pictures, ((383, 256), (256, 383)), strict=True)
    for x, picture, between in pairs:
        expected = Image.fromarray(picture.copy()).resize(between, Image.BILINEAR)
        expected = np.asarray(expected.resize((224, 224), Image.BILINEAR)).astype(int)
        difference = np.abs(x.permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 2.01 and difference.mean() < 0.3


def features_by_hand(network, voc, part):
    """The last map, averaged over 2 × 2 of 4 × 4 places, to length 1."""
    backbone, _ = pretrained.load_pretrained(network)
    backbone.eval()
    rows = []
    for path in read_voc(voc, part)[0]:
        x = resize(resize(read_picture(path), [37]), [32, 32])[None] / 255
        with torch.no_grad():
            x = F.relu(backbone.bn1(backbone.conv1((x - 0.5) / 0.25)))
            for stage in (backbone.maxpool, backbone.layer1, backbone.layer2, backbone.layer3):
                x = stage(x)
        x = pool_depth(x, 3).flatten().double().numpy()
        rows.append(x / (np.linalg.norm(x) + 1e-5))
    return np.array(rows)


def labels_by_hand(voc, part):
    return np.array([[int(line.split()[1]) for line in open(voc / f"ImageSets/Main/{name}_{part}.txt")]
                     for name in sorted(COLOURS)]).T


def test_as_a_user_runs_it_and_by_hand(start, network, voc, tmp_path):
    """In a process of its own, and again with scikit-learn, on the same draws; then for each cost alone."""
    out, _ = run(f"svm.py --checkpoint {network} --data {voc.parent.parent} --output-dir {tmp_path} "
                 f"--seed 5 {FLAGS}")
    found = metrics_of(tmp_path)["shots"]
    assert list(found) == ["1", "4"] and f"k = 4     mAP {found['4']['map']:.4f}" in out
    assert found["4"]["map"] > 0.7 and found["4"]["map"] > found["1"]["map"] + 0.05

    y, test_y = labels_by_hand(voc, "trainval"), labels_by_hand(voc, "test")
    alone = []
    for cost in (0.01, 1, 100):
        start(f"--seed 5 --costs {cost}")
        alone.append(metrics_of(tmp_path / "out")["shots"])
    x, test_x = (features_by_hand(network, voc, part) for part in ("trainval", "test"))
    for k in (1, 4):
        aps = np.zeros((3, 3))
        for sample in range(3):
            for c in range(4):
                rng = np.random.default_rng([5, 7, k, sample, c])
                order = list(rng.permutation(60))
                drawn = [i for i in order if y[i, c] == 1][:k] + [i for i in order if y[i, c] == -1][:3 * k]
                easy = test_y[:, c] != 0
                for i, cost in enumerate((0.01, 1, 100)):
                    scores = linear_svc(x[drawn], y[drawn, c], cost).decision_function(test_x[easy])
                    aps[sample, i] += naive_ap(scores, test_y[easy, c] == 1) / 4
        best = aps.mean(0).argmax()
        assert found[str(k)]["cost"] == (0.01, 1, 100)[best]
        assert found[str(k)]["map"] == pytest.approx(aps[:, best].mean(), abs=1e-3)
        assert found[str(k)]["std"] == pytest.approx(aps[:, best].std(), abs=1e-3)
        assert [each[str(k)]["map"] for each in alone] == pytest.approx(list(aps.mean(0)), abs=1e-3)


def test_batches_and_workers_change_nothing(start, monkeypatch):
    kept = []
    monkeypatch.setattr(svm, "read_features", lambda *args: kept.append(read_features(*args)) or kept[-1])
    for flags in ("--batch-size 1 --workers 0", "--batch-size 64 --workers 0", "--batch-size 7 --workers 2"):
        start(flags)
    assert len(kept[0]) == 100
    for features in kept[1:]:
        torch.testing.assert_close(features, kept[0], rtol=0, atol=1e-6)


def test_half_precision_is_near(start, monkeypatch):
    kept = []
    monkeypatch.setattr(svm, "read_features", lambda *args: kept.append(read_features(*args)) or kept[-1])
    for amp in ("off", "bf16"):
        start(f"--amp {amp}")
    assert not kept[0].equal(kept[1]) and kept[1].dtype == torch.float32
    torch.testing.assert_close(kept[1], kept[0], atol=0.01, rtol=0)


def test_all_images_with_a_cost_for_each_class(start, network, voc, tmp_path):
    """The released protocol with scikit-learn; difficult objects are learnt as absent, and are not tested."""
    out, _ = start("--shots all 1 --costs 0.001 0.1 10")
    metrics = metrics_of(tmp_path / "out")["shots"]
    assert list(metrics) == ["all", "1"] and f"all images   mAP {metrics['all']['map']:.4f}" in out
    y, test_y = labels_by_hand(voc, "trainval"), labels_by_hand(voc, "test")
    x, test_x = (features_by_hand(network, voc, part) for part in ("trainval", "test"))
    costs, aps = [], []
    for c in range(4):
        labels = np.where(y[:, c] == 1, 1, -1)
        svcs = [LinearSVC(loss="squared_hinge", tol=1e-9, C=cost, class_weight={1: 2, -1: 1},
                          max_iter=5_000_000) for cost in (0.001, 0.1, 10)]
        scores = [cross_val_score(svc, x, labels, cv=3, scoring="average_precision").mean() for svc in svcs]
        costs.append((0.001, 0.1, 10)[np.argmax(scores)])
        easy, svc = test_y[:, c] != 0, svcs[np.argmax(scores)].fit(x, labels)
        aps.append(naive_ap(svc.decision_function(test_x[easy]), test_y[easy, c] == 1))
    assert metrics["all"]["costs"] == costs and len(set(costs)) > 1
    assert metrics["all"]["aps"] == pytest.approx(aps, abs=1e-3)
    assert metrics["all"]["map"] == pytest.approx(np.mean(aps), abs=1e-3) and (y == 0).sum() > 10


def test_draws(start, monkeypatch):
    """Of each class k positives and 19 k negatives (of four classes 3 k), other ones in each draw."""
    drawn, fit = [], svm.fit_svm
    monkeypatch.setattr(svm, "fit_svm", lambda gram, y, costs: drawn.append((gram, y)) or fit(gram, y, costs))
    start()
    assert [(sum(y == 1), sum(y == -1), len(y)) for _, y in drawn] == [(1, 3, 4)] * 12 + [(4, 12, 16)] * 12
    for grams in ([g for g, _ in drawn[:12]], [g for g, _ in drawn[12:]]):
        assert len({round(gram.sum(), 9) for gram in grams}) == 12
        assert all(gram.diagonal() == pytest.approx(2, abs=1e-3) for gram in grams)   # 1, and 1 for the bias
    first, drawn[:] = [gram for gram, _ in drawn], []
    start()
    assert all(np.array_equal(a, b) for a, (b, _) in zip(first, drawn, strict=True))
    drawn.clear()
    start("--seed 1")
    assert not any(np.array_equal(a, b) for a, (b, _) in zip(first, drawn, strict=True))


def test_folders_and_labels(voc):
    expected = labels_by_hand(voc, "test")
    assert {*expected.flat} == {1, -1, 0}
    for folder in (voc, voc.parent, voc.parent.parent):
        paths, labels = read_voc(folder, "test")
        assert np.array_equal(labels, expected)
        assert len(paths) == 40 and paths[7] == voc / "JPEGImages/test007.jpg"


def test_difficult_images_are_ignored(start, voc, tmp_path):
    """Pictures that are difficult for all classes may show anything."""
    shutil.copytree(voc, tmp_path / "voc")
    for part in ("trainval", "test"):
        for name in COLOURS:
            path = tmp_path / f"voc/ImageSets/Main/{name}_{part}.txt"
            lines = path.read_text().splitlines()
            lines[:10] = [line.split()[0] + "  0" for line in lines[:10]]
            path.write_text("\n".join(lines))
    results = []
    for colour in ((0, 0, 0), (255, 0, 255)):
        for part in ("trainval", "test"):
            for i in range(10):
                Image.new("RGB", (50, 50), colour).save(tmp_path / f"voc/JPEGImages/{part}{i:03d}.jpg")
        start(f"--data {tmp_path}/voc")
        results.append(metrics_of(tmp_path / "out")["shots"])
    assert results[0] == results[1]


@pytest.mark.slow
def test_other_networks_and_depths(start, voc, tmp_path):
    def read(flags):
        start(flags)
        metrics = metrics_of(tmp_path / "out")
        return metrics["feature"], metrics["dim"]
    assert read("--shots 2 --samples 1") == ("Feature4", 1152)                    # 128 × 3 × 3
    assert read("--depth 2 --shots 2 --samples 1")[0] == "Feature2"
    vit = saved_network(tmp_path / "vit_t.pth", "--data fake --arch vit_t")
    assert read(f"--checkpoint {vit} --shots 2 --samples 1") == ("features", 192)
    shutil.copytree(voc, tmp_path / "voc")                                        # fewer, as they are large
    subprocess.run("sed -i '25,$d' voc/ImageSets/Main/*_*.txt", shell=True, check=True, cwd=tmp_path)
    torch.manual_seed(0)
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "bare.pth")
    flags = f"--checkpoint {tmp_path}/bare.pth --arch resnet18 --data {tmp_path}/voc --shots 1 --samples 1"
    assert read(flags) == ("Feature5", 2048)                      # 512 × 2 × 2


@pytest.mark.parametrize("flags, names", [
    ("--data none", "--data none: needs"), ("--shots 40", "--shots: must be 1 to"),
    ("--shots 0", "--shots: 0: must"), ("--shots one", "--shots: one: must"),
    ("--shots all 40", "--shots: must be 1 to"),
    ("--samples 0", "--samples: 0: must"), ("--costs 1 0", "--costs: 0: must"),
    ("--costs nan", "--costs: nan: must"), ("--costs inf", "--costs: inf: must"),
    ("--depth 5", "--depth: must be 0 to 4"), ("--depth -1", "--depth: -1: must"),
    ("--seed -1", "--seed: -1: must"), ("--key teacher", "has no 'teacher'"),
    ("--checkpoint none.pth", "none.pth"), ("--checkpoint {bare}", "--arch"),
    ("--checkpoint {bare} --arch resnet34", "is not this network"), ("--arch vit_t", "--arch vit_t"),
    ("--output-dir {bare}", "bare.pth: cannot be"), ("--output-dir {bare}/x", "bare.pth/x: cannot be")])
def test_bad_input_is_one_line(start, flags, names, tmp_path):
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "bare.pth")
    _, err = start(flags.format(bare=tmp_path / "bare.pth"), code=2)
    assert err.count("\n") == 1 and names in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage, names", [
    ("rm ImageSets/Main/dog_test.txt", "CLASS_test.txt"),
    ("rm ImageSets/Main/dog_trainval.txt", "CLASS_trainval.txt"),
    ("rm ImageSets/Main/*_*.txt", "CLASS_trainval.txt"), ("rm -r ImageSets", "CLASS_trainval.txt"),
    ("rm ImageSets/Main/[dt]*_*.txt ImageSets/Main/cow_*.txt", "CLASS_trainval.txt"),
    ("sed -i s/-1/2/ ImageSets/Main/cat_test.txt", "CLASS_test.txt"),
    ("sed -i 's/ 1$/-1/' ImageSets/Main/cat_test.txt", "CLASS_test.txt"),
    ("sed -i 3d ImageSets/Main/cat_test.txt", "CLASS_test.txt"),
    ("sed -i 3d ImageSets/Main/[dt]*_test.txt", "CLASS_test.txt"),
    ("sed -i 's/$/ 1/' ImageSets/Main/cow_trainval.txt", "CLASS_trainval.txt"),
    ("rm JPEGImages/test02*.jpg JPEGImages/test007.jpg", "11 of 40 pictures cannot be read")])
def test_a_damaged_folder_is_one_line(start, voc, damage, names, tmp_path):
    shutil.copytree(voc, tmp_path / "voc")
    subprocess.run(damage, shell=True, check=True, cwd=tmp_path / "voc")
    *warnings, err = start(f"--data {tmp_path}/voc", code=2)[1].splitlines()
    assert names in err and len(warnings) == 11 * ("11 of" in names), err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_broken_pictures_are_left_out(start, voc, tmp_path):
    """Of the same numbers as without them in the lists."""
    for name in ("damaged", "without"):
        shutil.copytree(voc, tmp_path / name)
    (tmp_path / "damaged/JPEGImages/trainval003.jpg").write_bytes(b"")
    (tmp_path / "damaged/JPEGImages/test007.jpg").unlink()
    subprocess.run("sed -i -e /trainval003/d -e /test007/d ImageSets/Main/*_*.txt", shell=True, check=True,
                   cwd=tmp_path / "without")
    found = {}
    for name in ("damaged", "without"):
        out, _ = start(f"--data {tmp_path}/{name}")
        found[name] = metrics_of(tmp_path / "out")
        assert found[name]["num_broken"] == (2 if name == "damaged" else 0)
        assert ("2 broken pictures left out" in out) == (name == "damaged")
    assert found["damaged"]["shots"] == found["without"]["shots"]
    labels = svm.read_voc(tmp_path / "damaged", "trainval")[1]
    most = svm.most_shots(labels, 3)
    rarest = np.flatnonzero(labels[:, (labels == 1).sum(0).argmin()] == 1)
    for i in rarest[:10]:
        (tmp_path / f"damaged/JPEGImages/trainval{i:03d}.jpg").write_bytes(b"")
    assert "--shots: must be at most" in start(f"--data {tmp_path}/damaged --shots {most}", code=2)[1]


def test_a_training_runs_folder_and_a_broken_network_are_refused(start, network, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pth").touch()
    assert "holds a training run" in start(code=2)[1]
    state = torch.load(network, weights_only=True)
    state["model"]["backbone.conv1.weight"][:] = torch.nan
    checkpoint.save_checkpoint(tmp_path / "nan.pth", state)
    assert "NaN" in start(f"--checkpoint {tmp_path}/nan.pth --output-dir {tmp_path}/other", code=2)[1]


def test_too_few_images_for_three_folds_are_one_line(start, voc, tmp_path):
    shutil.copytree(voc, tmp_path / "voc")
    path = tmp_path / "voc/ImageSets/Main/cat_trainval.txt"
    lines = [f"{line.split()[0]} {'01'[i < 2] if i < 5 else -1}\n" for i, line in enumerate(open(path))]
    path.write_text("".join(lines))
    _, err = start(f"--data {tmp_path}/voc --shots all", code=2)
    assert err.count("\n") == 1 and "--shots all: needs 3 images with each class" in err
