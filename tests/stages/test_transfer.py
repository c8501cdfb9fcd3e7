"""transfer.py reads each set's files, few or as many as published; splits, metrics, kills, two processes."""

import functools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import tempfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from processes import ROOT, metrics_of, run, saved_network
from scipy.io import savemat
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

import transfer
from checkpoint import UserError
from data import hold_out
from pretrained import load_twist
from transfer import PUBLISHED, evaluate, table
from transfer_sets import METRICS, SETS, TABLE_4, map_11_points, mean_per_class, read_set, top_1


# ---------------------------------------------------------------- the sets' files
# Each writes the lists of a set below a folder and returns {part: [(path, class)]} of its pictures. Classes
# are names or numbers; for VOC they are a row of labels. row: of SETS, for numbers of images and classes.
def numbers(row):
    """{part: [class of each image]} with as many images as the row has."""
    counts = {"train": row.train, "val": row.val, "test": row.test}
    return {part: [i % row.classes for i in range(count)] for part, count in counts.items() if count}


def text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def make_food(root, row):
    expected = {}
    for part, labels in numbers(row).items():
        listed = {}
        for i, c in enumerate(labels):
            listed.setdefault(f"dish {c}", []).append(f"dish {c}/{part}{i}")
        text(root / f"food-101/meta/{part}.json", [json.dumps(listed)])
        expected[part] = [(f"food-101/images/{image}.jpg", name)
                          for name, images in listed.items() for image in images]
    return expected


def make_sun397(root, row):
    """Lines in no order, classes in folders of one and two levels with common names."""
    expected = {}
    for part, file in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        labels = np.array(numbers(row)[part])
        expected[part] = []
        for i in np.random.default_rng(0).permutation(len(labels)):
            c = labels[i]
            folder = f"{'ab'[c % 2]}/place{c // 4}{('', '/indoor')[c // 2 % 2]}"
            expected[part].append((f"SUN397/{folder}/sun_{part}{i}.jpg", folder))
        text(root / "SUN397" / file, [path.removeprefix("SUN397") for path, _ in expected[part]])
    return expected


def make_cars(root, row):
    expected, fields = {}, ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    (root / "stanford_cars/devkit").mkdir(parents=True)
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = [(1, 2, 30, 40, c + 1, f"{i:05d}.jpg") for i, c in enumerate(numbers(row)[part])]
        array = np.array(rows, [(field, "O") for field in fields])[None]          # [1, N], as in the devkit
        savemat(root / "stanford_cars" / file, {"annotations": array})
        expected[part] = [(f"stanford_cars/cars_{part}/{name}", c) for *_, c, name in rows]
    return expected


def make_aircraft(root, row):
    expected = {}
    for part, labels in numbers(row).items():
        text(root / f"fgvc-aircraft-2013b/data/images_variant_{part}.txt",
             [f"{part}{i:07d} Boeing 707-{c:03d}" for i, c in enumerate(labels)])
        expected[part] = [(f"fgvc-aircraft-2013b/data/images/{part}{i:07d}.jpg", c)
                          for i, c in enumerate(labels)]
    return expected


def make_voc07(root, row):
    """Image i has class i % C; in every third, the next class has difficult objects only."""
    expected = {}
    for part, labels in numbers(row).items():
        rows = np.full((len(labels), row.classes), -1)
        rows[np.arange(len(labels)), labels] = 1
        rows[np.arange(0, len(labels), 3), (np.array(labels[::3]) + 1) % row.classes] = 0
        for c in range(row.classes):
            text(root / f"VOCdevkit/VOC2007/ImageSets/Main/thing{c:02d}_{part}.txt",
                 [f"{part}{i:06d} {y:2d}" for i, y in enumerate(rows[:, c])])
        expected[part] = [(f"VOCdevkit/VOC2007/JPEGImages/{part}{i:06d}.jpg", tuple(y))
                          for i, y in enumerate(rows.tolist())]
    return expected


def make_dtd(root, row):
    expected = {}
    for part, labels in numbers(row).items():
        lines = [f"kind{c:02d}/kind{c:02d}_{part}{i}.jpg" for i, c in enumerate(labels)]
        text(root / f"dtd/dtd/labels/{part}1.txt", lines)
        text(root / f"dtd/dtd/labels/{part}2.txt", ["another partition"])
        expected[part] = [(f"dtd/dtd/images/{line}", c) for line, c in zip(lines, labels, strict=True)]
    return expected


def make_pets(root, row):
    expected = {}
    for part, file in (("train", "trainval"), ("test", "test")):
        labels = numbers(row)[part]
        text(root / f"oxford-iiit-pet/annotations/{file}.txt",
             [f"pet_{part}_{i} {c + 1} 1 {c + 1}" for i, c in enumerate(labels)])
        expected[part] = [(f"oxford-iiit-pet/images/pet_{part}_{i}.jpg", c) for i, c in enumerate(labels)]
    return expected


def make_caltech101(root, row):
    """Folders of very different sizes; in the background's there is a file that is no picture."""
    names = ["BACKGROUND_Google", *(f"thing{c:03d}" for c in range(1, row.classes))]
    sizes = [31] * row.classes
    sizes[0] += row.train + row.test - 31 * row.classes
    top = root / "caltech101/101_ObjectCategories"
    (top / names[0]).mkdir(parents=True)
    (top / names[0] / "tmp").touch()
    return {"": [(f"caltech101/101_ObjectCategories/{name}/image_{i:04d}.jpg", c)
                 for c, name in enumerate(names) for i in range(1, sizes[c] + 1)]}


def make_flowers(root, row):
    """The parts' numbers are mixed, and the files' order is not that of setid.mat."""
    labels = sum(numbers(row).values(), [])
    order = np.random.default_rng(0).permutation(len(labels))
    train, val, test = np.split(1 + order, [row.train, row.train + row.val])
    by_number = np.zeros(len(labels), int)
    by_number[order] = labels
    (root / "flowers-102").mkdir()
    savemat(root / "flowers-102/setid.mat", {"trnid": train[None], "valid": val[None], "tstid": test[None]})
    savemat(root / "flowers-102/imagelabels.mat", {"labels": by_number[None] + 1})
    return {part: [(f"flowers-102/jpg/image_{i:05d}.jpg", int(by_number[i - 1])) for i in found]
            for part, found in (("train", train), ("val", val), ("test", test))}


MAKE = {name.removeprefix("make_"): function for name, function in list(globals().items())
        if name.startswith("make_")}
PICTURES = [name for name in TABLE_4 if not name.startswith("cifar")]
SMALL = {"train": 24, "test": 12, "classes": 4}
SIZES = {"caltech101": {"train": 120, "test": 40, "classes": 4}}


def small(name):
    """A row of SETS for a small tree."""
    sizes = SIZES.get(name, SMALL)
    return SETS[name]._replace(**sizes, val=sizes["train"] // 2 if SETS[name].val else 0)


def touch(path, c):
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def draw(path, c):
    """A small picture in the colour of its class, with noise; sides are of all shapes."""
    rng = np.random.default_rng(zlib.crc32(os.path.basename(path).encode()))
    height, width = rng.integers(18, 40, 2)
    colour = np.array([(200, 40, 40), (40, 180, 40), (40, 40, 200), (200, 200, 40)])[c]
    pixels = np.clip(colour + rng.normal(0, 60, (height, width, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def make(name, root, row, write=touch):
    """Writes a tree with all its pictures; what it holds as {part: [(path, class)]}."""
    expected = MAKE[name](root, row)
    for folder in {os.path.dirname(path) for pairs in expected.values() for path, _ in pairs}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for pairs in expected.values():
        for path, c in pairs:
            write(f"{root}/{path}", np.argmax(c) if isinstance(c, tuple) else c)
    return expected


def pairs_of(part, root):
    """(path, label) of the images of an ImageSet, paths relative to root."""
    labels = part.labels.tolist()
    return [(os.path.relpath(os.fsdecode(path), root), tuple(y) if isinstance(y, list) else y)
            for path, y in zip(part.paths, labels, strict=True)]


def assert_read(name, root, row, expected):
    parts = read_set(name, str(root), source=row)
    assert list(parts) == ["train", "val", "test"]
    found = {part: pairs_of(images, root) for part, images in parts.items()}
    if name != "voc07":                          # numbers of the sorted names
        names = sorted({c for _, c in expected["train"]})
        number = {c: i for i, c in enumerate(names)}
        expected = {part: [(path, number[c]) for path, c in pairs] for part, pairs in expected.items()}
    if not row.val:                              # both are parts of what the set calls train
        whole = expected["train"]
        kept, held = hold_out(torch.tensor([c for _, c in whole]), 0.2, 0)
        expected |= {"train": [whole[i] for i in kept], "val": [whole[i] for i in held]}
    assert found == expected


@pytest.mark.parametrize("name", [name for name in PICTURES if name != "caltech101"])
def test_small_trees_are_read(name, tmp_path):
    row = small(name)
    assert_read(name, tmp_path, row, make(name, tmp_path, row))


@pytest.fixture
def roomy(tmp_path):
    """A folder for many empty files: in memory if possible, as a disk needs five times as long."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PICTURES if name != "caltech101"])
def test_trees_of_the_published_sizes_are_read(name, roomy):
    """As many names of images as published; the files are empty, as nothing decodes them here."""
    assert_read(name, roomy, SETS[name], make(name, roomy, SETS[name]))


def test_caltech_has_30_a_class_and_the_rest(roomy):
    expected = make("caltech101", roomy, SETS["caltech101"])[""]
    assert len(expected) == 9144
    parts = read_set("caltech101", str(roomy))
    found = {part: pairs_of(images, roomy) for part, images in parts.items()}
    assert [len(found[part]) for part in ("train", "val", "test")] == [2448, 612, 6084]
    assert sorted(sum(found.values(), [])) == sorted(expected)                    # each once: no replacement
    for part, count in (("train", 24), ("val", 6)):
        assert np.bincount([c for _, c in found[part]]).tolist() == [count] * 102
    again, other = (read_set("caltech101", str(roomy), seed) for seed in (0, 1))
    assert pairs_of(again["test"], roomy) == found["test"] != pairs_of(other["test"], roomy)


def test_the_order_of_a_folder_does_not_matter(tmp_path, monkeypatch):
    """os.listdir promises none."""
    row = small("caltech101")
    make("caltech101", tmp_path, row)
    first = read_set("caltech101", str(tmp_path), source=row)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    second = read_set("caltech101", str(tmp_path), source=row)
    assert all((first[part].paths == second[part].paths).all() for part in first)


@pytest.mark.parametrize("name, folder, files, meta", [
    ("cifar10", "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
     ("batches.meta", "label_names", "labels")),
    ("cifar100", "cifar-100-python", ["train", "test"], ("meta", "fine_label_names", "fine_labels"))])
def test_cifar_is_read(tmp_path, monkeypatch, name, folder, files, meta):
    kind = getattr(torchvision.datasets, name.upper())
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "meta", dict(filename=meta[0], key=meta[1], md5=None))
    (tmp_path / folder).mkdir()
    pixels = {file: np.random.default_rng(i).integers(0, 256, (20, 3072), np.uint8)
              for i, file in enumerate(files)}
    for file in files:
        content = {"data": pixels[file], meta[2]: [i % 4 for i in range(20)]}
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))
    (tmp_path / folder / meta[0]).write_bytes(pickle.dumps({meta[1]: list("abcd")}))
    row = SETS[name]._replace(classes=4, train=20 * len(files) - 20, test=20)
    parts = read_set(name, str(tmp_path), source=row)
    assert parts["test"].images.flatten(1).equal(torch.from_numpy(pixels[files[-1]]))
    assert parts["test"].labels.tolist() == [i % 4 for i in range(20)]
    whole = torch.from_numpy(np.concatenate([pixels[file] for file in files[:-1]]))
    kept, held = hold_out(torch.arange(len(whole)) % 4, 0.2, 0)
    assert parts["train"].images.flatten(1).equal(whole[kept])
    assert parts["val"].images.flatten(1).equal(whole[held]) and len(held) == len(whole) // 5
    with pytest.raises(UserError, match=rf"--datasets {name}: it has \d+ training images instead of 50,000"):
        read_set(name, str(tmp_path))


def test_mnist_is_the_embedded_one():
    parts = read_set("mnist", "nowhere")
    assert [len(parts[part]) for part in ("train", "val", "test")] == [3200, 800, 1000]
    for part, count in (("train", 320), ("val", 80), ("test", 100)):
        assert np.bincount(parts[part].labels).tolist() == [count] * 10


# ---------------------------------------------------------------- what is wrong with a download
DAMAGE = [
    ("food", "rm -r food-101/meta", "there is no .*train.json; place food-101/ with meta/ and images/ in"),
    ("food", "echo '[1, 2' > food-101/meta/test.json", "cannot read which are its test images"),
    ("food", "echo '[1, 2]' > food-101/meta/test.json", "cannot read which are its test images"),
    ("food", "rm food-101/images/dish*/test3.jpg", "there is no .*test3.jpg, which is one of its test"),
    ("sun397", "rm SUN397/Testing_01.txt", "no .*Testing_01.txt; place SUN397/ .* archive Partitions"),
    ("sun397", "sed -i 5d SUN397/Training_01.txt", "it has 23 training images instead of 24"),
    ("sun397", "cp SUN397/Training_01.txt SUN397/Testing_01.txt", "it has 24 test images instead of 12"),
    ("sun397", "head -12 SUN397/Training_01.txt > SUN397/Testing_01.txt", "training images among its test"),
    ("cars", "rm stanford_cars/cars_test_annos_withlabels.mat", "place .*cars_test_annos_withlabels.mat"),
    ("cars", "truncate -s 300 stanford_cars/devkit/cars_train_annos.mat",
     "cannot read which are its training images"),
    ("cars", "rm -r stanford_cars/cars_test", "there is no .*cars_test/.*jpg, which is one of its test"),
    ("aircraft", "echo oneword > fgvc-aircraft-2013b/data/images_variant_val.txt",
     "cannot read which are its validation images"),
    ("aircraft", "sed -i 's/707-001/707-000/' fgvc-aircraft-2013b/data/images_variant_train.txt",
     "its training images are of 3 classes instead of 4"),
    ("aircraft", "sed -i 's/707-001/A300/' fgvc-aircraft-2013b/data/images_variant_test.txt",
     "its test images are of other classes than its training images"),
    ("voc07", "rm VOCdevkit/VOC2007/ImageSets/Main/thing01_val.txt", "CLASS_val.txt as in VOC2007; place"),
    ("voc07", "sed -i 's/  *1$/ -1/' VOCdevkit/VOC2007/ImageSets/Main/thing02_test.txt",
     "CLASS_test.txt as in VOC2007; place VOCd"),
    ("dtd", "rm dtd/dtd/labels/val1.txt", "there is no .*val1.txt; place dtd/dtd/ with labels/ and images/"),
    ("pets", "sed -i 2,4d oxford-iiit-pet/annotations/trainval.txt", "has 21 training images instead of 24"),
    ("pets", "echo > oxford-iiit-pet/annotations/test.txt", "cannot read which are its test images"),
    ("caltech101", "rm -r caltech101", "there is no .*101_ObjectCategories; place caltech101/101_Object"),
    ("caltech101", "rm -r caltech101/*/BACKGROUND_Google", "it has 90 training images instead of 120"),
    ("caltech101", "rm caltech101/*/BACKGROUND_Google/*1.jpg", "test images instead of 40"),
    ("flowers", "rm flowers-102/setid.mat", "there is no .*setid.mat; place flowers-102/ with jpg/"),
    ("flowers", "echo x > flowers-102/imagelabels.mat", "cannot read which are its training images"),
]


@pytest.mark.parametrize("name, damage, said", DAMAGE)
def test_damage_is_one_line(here, network, tmp_path, monkeypatch, name, damage, said):
    row = small(name)
    make(name, tmp_path, row)
    monkeypatch.setitem(SETS, name, row)
    read_set(name, str(tmp_path))
    subprocess.run(damage, shell=True, check=True, cwd=tmp_path)
    flags = f"--datasets {name} --data-dir {tmp_path} --output-dir {tmp_path}/out"
    _, err = here(f"transfer.py --checkpoint {network} {flags}", code=2)
    assert re.search(rf"error: --datasets {name}: .*{said}", err), err
    assert err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TABLE_4)
def test_a_missing_set_is_one_line(here, network, tmp_path, name):
    flags = f"--datasets mnist {name} --data-dir {tmp_path} --output-dir {tmp_path}/out"
    _, err = here(f"transfer.py --checkpoint {network} {flags}", code=2)
    assert re.search(rf"--datasets {name}: .*({re.escape(SETS[name].where)}|download=True)", err), err
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, named", [
    ("--checkpoint nowhere.pth", "nowhere.pth"), ("--datasets imagenet", "--datasets: invalid choice"),
    ("--strengths 0", "--strengths: 0: must be"), ("--max-iter 0", "--max-iter: 0: must be"),
    ("--arch resnet18", "resnet8")])
def test_bad_command_is_one_line(here, network, tmp_path, flags, named):
    _, err = here(f"transfer.py --checkpoint {network} --output-dir {tmp_path}/out {flags}", code=2)
    assert named in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- metrics
def literal_11_points(scores, truth):
    """The devkit's rule, word by word, in fractions: at each recall the best precision there or later."""
    points = []
    for threshold in sorted(set(scores)):
        found = [t for s, t in zip(scores, truth, strict=True) if s >= threshold]
        points.append((Fraction(sum(found), sum(truth)), Fraction(sum(found), len(found))))
    best = [max([precision for recall, precision in points if recall >= Fraction(t, 10)], default=0)
            for t in range(11)]
    return sum(best) / Fraction(11)


@pytest.mark.parametrize("ties", [False, True])
def test_11_points_are_the_literal_rule(ties):
    """With 1 to 40 true images, some left out, and with scores that are equal."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = rng.choice([1, -1, 0], (int(rng.integers(4, 60)), 3), p=[0.4, 0.4, 0.2])
        labels[:2] = [[1, 1, 1], [-1, -1, -1]]
        scores = rng.integers(0, 6, labels.shape).astype(float) if ties else rng.normal(size=labels.shape)
        kept = [labels[:, c] != 0 for c in range(3)]
        expected = [float(literal_11_points(scores[kept[c], c].tolist(), (labels[kept[c], c] == 1).tolist()))
                    for c in range(3)]
        assert map_11_points(scores, labels) == pytest.approx(np.mean(expected), abs=1e-12)


def test_11_points_by_hand():
    """Found: true, false, true. Precisions 1 up to recall 0.5, then 2/3: (6 · 1 + 5 · 2/3) / 11."""
    labels = np.array([[1], [-1], [1], [0]])
    scores = np.array([[4.0], [3], [2], [9]])                        # what is left out would be found first
    assert map_11_points(scores, labels) == pytest.approx((6 + 10 / 3) / 11, abs=1e-12)
    both = np.hstack([labels, -np.ones((4, 1))])                     # a class that no image has
    assert map_11_points(np.hstack([scores, scores]), both) == map_11_points(scores, labels)


def test_accuracies_are_scikit_learns():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = rng.choice(6, 200, p=[0.5, 0.3, 0.1, 0.05, 0.05, 0])        # of one class there is none
        scores = rng.normal(size=(200, 6)) + 2 * np.eye(6)[labels] * (rng.random((200, 1)) < 0.6)
        predicted = scores.argmax(1)
        if set(predicted) <= set(labels):        # else scikit-learn warns
            assert mean_per_class(scores, labels) == pytest.approx(balanced_accuracy_score(labels, predicted),
                                                                   abs=1e-12)
        expected = [np.mean(predicted[labels == c] == c) for c in range(5)]
        assert mean_per_class(scores, labels) == pytest.approx(np.mean(expected), abs=1e-12)
        assert top_1(scores, labels) == pytest.approx((predicted == labels).mean(), abs=1e-12)


# ---------------------------------------------------------------- fit, choose, test
def problem(multi_label=False, seed=0):
    rng = np.random.default_rng(seed)
    features, labels = {}, {}
    for part, count in (("train", 120), ("val", 60), ("test", 80)):
        y = rng.integers(0, 4, count)
        features[part] = torch.from_numpy(rng.normal(size=(count, 10)) + 1.2 * np.eye(4, 10)[y])
        labels[part] = torch.from_numpy(y)
        if multi_label:
            present = 2 * np.eye(4, dtype=int)[y] - 1
            labels[part] = torch.from_numpy(np.where(rng.random((count, 4)) < 0.2, 0, present))
    return features, labels


@pytest.mark.parametrize("metric", METRICS)
def test_choice_and_test_are_scikit_learns(metric):
    """A strength is chosen on validation, fitted on both parts, tested; to fit, 0 counts as -1."""
    multi_label = metric == "11-point mAP"
    features, labels = problem(multi_label)
    strengths = torch.logspace(-2, 3, 6, dtype=torch.float64)

    def fit(x, y, strength):
        targets = (y == 1).T if multi_label else [y]
        heads = [LogisticRegression(C=1 / strength, tol=1e-8, max_iter=10_000).fit(x, y) for y in targets]
        return lambda x: np.stack([head.decision_function(x) for head in heads], -1).reshape(len(x), -1)

    score = METRICS[metric]
    val = [score(fit(features["train"], labels["train"], s)(features["val"]), labels["val"].numpy())
           for s in strengths.tolist()]
    best = max(range(6), key=lambda i: (val[i], i))                  # of equals the strongest
    x, y = (torch.cat([values["train"], values["val"]]) for values in (features, labels))
    expected = score(fit(x, y, strengths[best].item())(features["test"]), labels["test"].numpy())
    found = evaluate(features, labels, score, strengths, 300)
    assert found["lambda"] == pytest.approx(strengths[best].item())
    assert found["converged"] == found["fits"] == 7
    assert found["scores"] == pytest.approx(val, abs=0.005)
    assert found["test"] == pytest.approx(expected, abs=0.01)


def test_of_equally_good_strengths_the_strongest_is_chosen():
    features, labels = problem()
    strengths = torch.logspace(-2, 3, 6, dtype=torch.float64)
    found = evaluate(features, labels, lambda scores, labels: 0.5, strengths, 300)
    assert found["lambda"] == pytest.approx(1000) and found["test"] == 0.5


def test_the_test_images_choose_nothing():
    """Other test labels change the test score alone."""
    features, labels = problem()
    strengths = torch.logspace(-2, 3, 6, dtype=torch.float64)
    first = evaluate(features, labels, top_1, strengths, 300)
    second = evaluate(features, labels | {"test": labels["test"].roll(1)}, top_1, strengths, 300)
    assert second.pop("test") < first.pop("test") and first == second


# ---------------------------------------------------------------- as a user runs it
def shrink(rows, kill_after=None):
    """For processes: the sets have these rows; killed when this result is written."""
    SETS.update(rows)
    write = transfer.write_atomically

    def write_and_die(path, content):
        write(path, content)
        if path.name == "metrics.json":
            os.kill(os.getpid(), signal.SIGKILL)
    if kill_after:
        transfer.write_atomically = write_and_die


NAMES = ("pets", "voc07", "dtd")
ROWS = {name: small(name) for name in NAMES}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A --data-dir with small trees of three sets, whose pictures can be decoded."""
    root = tmp_path_factory.mktemp("data")
    for name in NAMES:
        make(name, root, ROWS[name], draw)
    return root


@pytest.fixture
def small_sets(monkeypatch):
    for name in NAMES:
        monkeypatch.setitem(SETS, name, ROWS[name])


def flags_of(network, trees, out):
    return (f"transfer.py --checkpoint {network} --datasets {' '.join(NAMES)} --data-dir {trees} --workers 0 "
            f"--strengths 8 --output-dir {out}")


def test_features_are_the_backbones_of_whole_pictures(here, network, trees, small_sets, tmp_path):
    """The shorter side has the size of the input, not 256 / 224 times that."""
    out, _ = here(flags_of(network, trees, tmp_path))
    metrics = metrics_of(tmp_path)
    assert list(metrics["sets"]) == list(NAMES) and "average" in out
    twist, config = load_twist(network)
    file = tmp_path / "features" / metrics["sets"]["pets"]["features"]
    cached = torch.load(file, weights_only=True)
    for part, images in read_set("pets", str(trees)).items():
        rows = []
        for path in images.paths:
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
            height, width = pixels.shape[-2:]
            size = [16 * length // min(height, width) for length in (height, width)]
            resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
            rows.append(torchvision.transforms.functional.center_crop(resized, 16) / 255)
        mean, std = config["mean"] or (0.5,), config["std"] or (0.25,)               # of fake
        with torch.inference_mode():
            expected = twist.backbone.eval()((torch.cat(rows) - mean[0]) / std[0])
        torch.testing.assert_close(cached[part], expected, atol=1e-5, rtol=1e-4)
    for name, found in metrics["sets"].items():
        assert found["num_train"] == ROWS[name].train + ROWS[name].val and found["num_test"] == 12
        assert f"{found['test']:.4f}" in out and found["num_broken"] == 0
        assert found["metric"] == SETS[name].metric
    assert metrics["sets"]["pets"]["test"] > 0.6             # colours are seen by any network


def test_killed_after_the_first_set_it_goes_on_with_the_second(network, trees, tmp_path):
    command = flags_of(network, trees, tmp_path / "a")
    run(command, code=-signal.SIGKILL, prepare=functools.partial(shrink, ROWS, kill_after="pets"))
    first = metrics_of(tmp_path / "a")["sets"]
    assert list(first) == ["pets"] and not list((tmp_path / "a").glob("*.tmp"))
    said, _ = run(command, prepare=functools.partial(shrink, ROWS))
    assert re.search(r"pets .*; done before\n  voc07 .*converged\n  dtd .*converged\n", said)
    assert "features of" not in said             # they were computed for all sets before the first fit
    run(flags_of(network, trees, tmp_path / "b"), prepare=functools.partial(shrink, ROWS))
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert metrics_of(tmp_path / "a")["sets"]["pets"] == first["pets"]


def test_two_processes_equal_one(network, trees, tmp_path):
    for out, ranks in (("one", 1), ("two", 2)):
        run(flags_of(network, trees, tmp_path / out), ranks=ranks, prepare=functools.partial(shrink, ROWS))
    one, two = (metrics_of(tmp_path / out)["sets"] for out in ("one", "two"))
    for name in NAMES:
        assert one[name]["features"] == two[name]["features"]
        files = [torch.load(tmp_path / out / "features" / one[name]["features"], weights_only=True)
                 for out in ("one", "two")]
        for part in files[0]:
            torch.testing.assert_close(files[0][part], files[1][part], atol=1e-5, rtol=1e-4)
        assert one[name]["test"] == pytest.approx(two[name]["test"], abs=0.09)        # one of twelve images


def test_other_networks_and_settings_do_not_mix(here, network, trees, small_sets, tmp_path):
    """Results of others are refused; --overwrite takes no features of another network, size or list."""
    command = flags_of(network, trees, tmp_path / "out").replace("voc07 dtd", "")
    here(command)
    first = metrics_of(tmp_path / "out")["sets"]["pets"]
    assert "done before" in here(command)[0]
    other = saved_network(tmp_path / "other.pth", "--data fake --image-size 16")
    weights = torch.load(other, weights_only=True)
    weights["model"]["backbone.conv1.weight"][0, 0, 0, 0] += 1
    torch.save(weights, other)
    for changed, named in ((command.replace(str(network), str(other)), "backbone_sha256 was"),
                           (f"{command} --image-size 12", "image_size was 16, is 12"),
                           (f"{command} --seed 1", "seed was 0, is 1"),
                           (f"{command} --amp bf16", "precision was off, is bf16"),
                           (f"{command} --strengths 9", "strengths was 8, is 9")):
        _, err = here(changed, code=2)
        assert named in err and "--overwrite" in err and err.count("\n") == 1
        assert metrics_of(tmp_path / "out")["sets"]["pets"] == first
    written = metrics_of(tmp_path / "out")                       # of a version that had no other precision
    del written["settings"]["precision"]
    (tmp_path / "out/metrics.json").write_text(json.dumps(written))
    assert "done before" in here(command)[0]
    files = {first["features"]}
    for changed in (command.replace(str(network), str(other)), f"{command} --amp bf16",
                    f"{command} --image-size 12"):
        out, _ = here(f"{changed} --overwrite")
        assert "pets: features of 36 images" in out
        files.add(metrics_of(tmp_path / "out")["sets"]["pets"]["features"])
    assert len(files) == 4 and len(list((tmp_path / "out/features").iterdir())) == 1
    assert "features of" not in here(f"{command} --image-size 12 --overwrite --strengths 9")[0]


def test_another_list_of_files_is_read_anew(here, network, trees, small_sets, tmp_path):
    shutil.copytree(trees / "oxford-iiit-pet", tmp_path / "data/oxford-iiit-pet")
    command = flags_of(network, tmp_path / "data", tmp_path / "out").replace("voc07 dtd", "")
    here(command)
    text = tmp_path / "data/oxford-iiit-pet/annotations/trainval.txt"
    text.write_text("\n".join(reversed(text.read_text().splitlines())))
    out, _ = here(command)
    assert "pets: features of 36 images" in out and "done before" not in out


def test_damaged_files_of_its_own(here, network, trees, small_sets, tmp_path):
    command = flags_of(network, trees, tmp_path / "out").replace("voc07 dtd", "")
    here(command)
    file, = (tmp_path / "out/features").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    _, err = here(f"{command} --overwrite", code=2)
    assert f"{file}: damaged; remove it" in err and err.count("\n") == 1
    for wrong in ('{"top1": {}}', "[]", "{", '{"settings": {}, "sets": []}'):
        (tmp_path / "out/metrics.json").write_text(wrong)
        _, err = here(command, code=2)
        assert "metrics.json: not of transfer.py" in err and err.count("\n") == 1


def test_broken_pictures_are_left_out_of_every_part(here, network, trees, small_sets, tmp_path):
    shutil.copytree(trees / "oxford-iiit-pet", tmp_path / "data/oxford-iiit-pet")
    images = tmp_path / "data/oxford-iiit-pet/images"
    for name in ("pet_train_3", "pet_test_0", "pet_test_5"):
        (images / f"{name}.jpg").write_bytes(b"no picture")
    _, err = here(flags_of(network, tmp_path / "data", tmp_path / "out").replace("voc07 dtd", ""))
    found = metrics_of(tmp_path / "out")["sets"]["pets"]
    assert (found["num_broken"], found["num_train"], found["num_test"]) == (3, 23, 10)
    assert err.count("not a readable picture") == 3 == err.count("\n")


# ---------------------------------------------------------------- MNIST, and the tables
def test_mnist_by_the_embedded_network(tmp_path):
    """The embedded network against two random ones: at its own 20 pixels, and at the data's 28."""
    scores = []
    flags = f"--output-dir {tmp_path}/out --overwrite"
    random = {size: saved_network(tmp_path / f"{size}.pth", f"--data fashion-mnist --image-size {size}")
              for size in (20, 28)}
    for network in (ROOT / "weights/fashion-mnist.pth", *random.values()):
        out, _ = run(f"transfer.py --checkpoint {network} {flags}")
        found = metrics_of(tmp_path / "out")["sets"]["mnist"]
        assert f"mnist      top-1 {found['test']:.4f}" in out and found["converged"] >= 45
        scores.append(found["test"])
    assert scores[0] >= 0.89 and scores[1] < scores[0] - 0.03 and scores[2] <= 0.82


def test_the_last_table():
    """The published averages are those of the paper; a part of the sets is averaged alike in each row."""
    results = {name: {"test": 0.5 + 0.01 * i} for i, name in enumerate(TABLE_4)}
    lines = table(results | {"mnist": {"test": 1}})
    assert lines[0].split() == [*TABLE_4, "average"] and len({len(line) for line in lines}) == 1
    averages = {line[:13].strip(): float(line.split()[-1]) for line in lines[1:]}
    assert averages == {"SimCLR": 73.6, "BYOL": 79.5, "supervised": 79.3, "TWIST": 78.0, "this network": 55.0}
    assert all(len(row) == 11 for row in PUBLISHED.values()) and len(lines[0]) <= 110
    lines = table({"dtd": {"test": 0.7}, "pets": {"test": 0.8}})
    assert [line.split()[-3:] for line in lines[-2:]] == [["76.6", "91.6", "84.1"], ["70.0", "80.0", "75.0"]]
    assert table({"mnist": {"test": 1}}) == []
