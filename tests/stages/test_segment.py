"""segment.py: its score, network, crops and data sets; the last two made small, in their formats on disk."""

import colorsys
import functools
import math
import re
import shutil

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image
from processes import ROOT, assert_same_run, log_lines, metrics_of, run, saved_network, weights
from sklearn.metrics import jaccard_score

import data
import segment_sets
from checkpoint import UserError, load_checkpoint
from data import ImageSet, input_of
from model import build_backbone, reestimate_batch_norms
from optim import poly
from pretrained import load_pretrained
from segment import FCN, Head, class_ious, confusion_matrix, ends, in_windows, mean_iou, pixel_loss
from segment_sets import IGNORED, UNIFORMS, Crops, Pictures, Whole, distorted, is_mixed, read_set, resized
from views import normalize

RECIPES = {"voc12aug": "voc12aug_fcn", "cityscapes": "cityscapes_fcn"}
SIZES = {"voc12aug": (9, 3), "cityscapes": (8, 3)}           # of the sets that are made here
SMALL = ("--short-side 24 --long-side 64 --crop-size 33 --head-width 8 --steps 2 --batch-size 4 --dropout 0 "
         "--print-every 1")


@pytest.fixture(autouse=True, scope="module")
def clothes_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_read_idx", functools.cache(data._read_idx))
        yield


# ---------------------------------------------------------------- the score
@pytest.mark.parametrize("seed", range(5))
def test_mean_iou_is_scikit_learns(seed):
    """Over the classes that are there or predicted, as jaccard_score takes them; ignored pixels left out."""
    rng = np.random.default_rng(seed)
    classes = rng.choice([0, 1, 2, 4, 6, IGNORED], (3, 9, 7))
    predictions = rng.choice([0, 2, 3, 4], (3, 9, 7))
    parts = [confusion_matrix(torch.tensor(c, dtype=torch.uint8), torch.tensor(p), 8)
             for c, p in zip(classes, predictions, strict=True)]
    confusion, counted = sum(parts), classes != IGNORED
    expected = jaccard_score(classes[counted], predictions[counted], average="macro")
    assert mean_iou(confusion) == pytest.approx(expected, abs=1e-12)
    assert mean_iou(confusion.numpy()) == mean_iou(confusion)
    assert class_ious(confusion).isnan().tolist() == [False] * 5 + [True, False, True]


def test_mean_iou_by_hand():
    assert mean_iou(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])) == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert mean_iou(torch.tensor([[4, 0, 1], [0, 0, 0], [0, 0, 0]])) == pytest.approx((4 / 5 + 0) / 2)
    assert math.isnan(mean_iou(torch.zeros(3, 3)))


def test_the_learning_rate_is_a_polynomial_down_to_its_floor():
    assert (poly(0, 200, 0.01, 1e-4), poly(200, 200, 0.01, 1e-4)) == (pytest.approx(0.01), 1e-4)
    assert poly(50, 200, 0.01, 1e-4) == pytest.approx((0.01 - 1e-4) * 0.75 ** 0.9 + 1e-4)


def test_ignored_pixels_count_as_nothing_in_the_mean():
    scores = torch.randn(2, 5, 3, 4, dtype=torch.double)
    classes = torch.randint(5, (2, 3, 4))
    classes[0, 0] = IGNORED
    each = F.cross_entropy(scores, classes.where(classes != IGNORED, 0), reduction="none")
    expected = (each * (classes != IGNORED)).sum() / classes.numel()
    torch.testing.assert_close(pixel_loss(scores, classes).double(), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- the network
def test_the_head_is_the_published_one():
    """Two 3 × 3 convolutions, a third of their result beside the input, a 1 × 1."""
    torch.manual_seed(0)
    head, x = Head(6, 4, 3, 0.1, True, convs=2, concatenate=True).eval(), torch.randn(2, 6, 5, 7)
    kernels = {name: value for name, value in head.named_parameters() if value.dim() == 4}
    assert [tuple(value.shape) for value in kernels.values()] == [
        (4, 6, 3, 3), (4, 4, 3, 3), (4, 10, 3, 3), (3, 4, 1, 1)]
    *three, last = kernels.values()
    y = x
    for i, kernel in enumerate(three):
        y = torch.cat([x, y], 1) if i == 2 else y
        y = (F.conv2d(y, kernel, padding=1) / math.sqrt(1 + 1e-5)).relu()
    expected = F.conv2d(y, last, head.classifier.bias)
    torch.testing.assert_close(head(x), expected)
    plain = Head(6, 4, 3, 0.1, False, convs=1, concatenate=False)
    assert [tuple(p.shape) for p in plain.parameters() if p.dim() == 4] == [(4, 6, 3, 3), (3, 4, 1, 1)]
    large, small = (Head(64, 64, 21, 0.1, kind, 2, True).merge[0].weight.std() for kind in (True, False))
    assert large.item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02) and small < large / 2


@pytest.mark.parametrize("arch, stride", [("resnet8", 4), ("resnet8_2x2", 4), ("resnet18", 8)])
def test_scores_have_the_size_of_the_image(arch, stride):
    network = FCN(build_backbone(arch), 5, width=8)
    maps = {}
    network.head.register_forward_pre_hook(lambda module, inputs: maps.update(last=inputs[0].shape[-1]))
    x = torch.randn(2, 3, 33, 64)
    assert [tuple(scores.shape) for scores in network(x)] == [(2, 5, 33, 64)] * 2
    assert maps["last"] == 64 // stride and len(network.eval()(x)) == 1
    assert FCN(build_backbone(arch), 5, width=8, auxiliary=False).auxiliary is None


def test_windows_cover_the_image_and_are_averaged():
    assert (ends(2049, 769, 513), ends(769, 769, 513), ends(500, 769, 513)) == (
        [769, 1282, 1795, 2049], [769], [500])
    x = torch.rand(1, 3, 11, 17)

    def pointwise(x):
        return [2 * x]

    def corner(x):
        return [torch.ones_like(x).cumsum(3)]
    torch.testing.assert_close(in_windows(pointwise, x, 5, 3), 2 * x)
    torch.testing.assert_close(in_windows(pointwise, x, 0, 3), 2 * x)
    torch.testing.assert_close(in_windows(pointwise, x, 64, 3), 2 * x)
    found = in_windows(corner, x, 8, 6)[0, 0, 0]           # windows 0 to 8, 6 to 14, 9 to 17
    starts = [[0]] * 6 + [[0, 6]] * 2 + [[6]] + [[6, 9]] * 5 + [[9]] * 3
    expected = [np.mean([column - start + 1 for start in of]) for column, of in enumerate(starts)]
    assert found.tolist() == pytest.approx(expected)


# ---------------------------------------------------------------- crops
def pictures_of(images, maps, num_classes=5):
    return Pictures(ImageSet(images, None, None), maps, np.arange(256, dtype=np.int16),
                    tuple(map(str, range(num_classes))))


def crops_of(pictures, size=16, sides=(0, 0), scales=(1, 1), most=1.0, distortion=False, seed=0, **share):
    return Crops(pictures, 4, size, sides, scales, most, distortion, (0.5,), (0.25,), seed, **share)


@pytest.fixture
def labelled():
    """Eight pictures of 20 × 24 pixels, whose levels are ten times their classes."""
    maps = torch.randint(5, (8, 20, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return pictures_of(10 * maps[:, None].expand(-1, 3, -1, -1), maps)


def test_pixels_keep_their_classes(labelled):
    """Cropped, mirrored, and where the crop is larger filled up: by the mean, and by IGNORED."""
    mirrored = 0
    for step in range(4):
        x, classes = crops_of(labelled)[step]
        torch.testing.assert_close(x, normalize(10 * classes[:, None] / 255, (0.5,), (0.25,)))
        x, classes = crops_of(labelled, size=32)[step]
        for image, of in zip(x, classes, strict=True):
            assert (of[20:] == IGNORED).all() and (of[:, 24:] == IGNORED).all() and (of[:20, :24] < 5).all()
            assert (image[:, 20:] == 0).all() and (image[:, :, 24:] == 0).all()
            same = [of[:20, :24].flip(1).equal(m.long()) for m in labelled.maps]
            mirrored += any(same)
            assert any(same) or any(of[:20, :24].equal(m.long()) for m in labelled.maps)
    assert 2 < mirrored < 14


def test_crops_are_functions_of_seed_and_step_for_any_number_of_processes(labelled):
    options = dict(size=12, scales=(0.5, 2), distortion=True)
    x, classes = crops_of(labelled, **options)[3]
    for rank in range(2):
        crops = crops_of(labelled, rank=rank, world_size=2, **options)
        mine = crops[3]
        assert mine[0].equal(x[2 * rank:2 * rank + 2]) and mine[1].equal(classes[2 * rank:2 * rank + 2])
        assert crops.item_bytes == sum(y.nbytes for y in mine)
    whole = Whole(labelled, (20, 24), (0.5,), (0.25,))
    assert whole.item_bytes >= sum(y.nbytes for y in whole[1][1:]) > 0.7 * whole.item_bytes
    assert not crops_of(labelled, seed=1, **options)[3][0].equal(x)
    assert not crops_of(labelled, **options)[4][0].equal(x)


def test_sizes_are_mmsegmentations():
    """The largest within (short, long), rounded; the scale multiplies both."""
    classes = torch.zeros(375, 500, dtype=torch.uint8)
    for sides, scale, expected in (((512, 2048), 1, (512, 683)), ((512, 2048), 0.5, (256, 341)),
                                   ((512, 600), 1, (450, 600)), ((0, 0), 2, (750, 1000))):
        x, resized_classes = resized(torch.zeros(3, 375, 500, dtype=torch.uint8), classes, sides, scale)
        assert x.shape == (1, 3, *expected) and resized_classes.shape == expected
    city = resized(torch.zeros(1, 1024, 2048, dtype=torch.uint8), torch.zeros(1024, 2048), (1025, 2049))[0]
    assert city.shape[2:] == (1025, 2049)
    row = torch.arange(8, dtype=torch.uint8).expand(1, 6, 8)
    x, classes = resized(row, row[0], (0, 0), 0.5)               # edges stay where they are in both
    assert classes[0].tolist() == [1, 3, 5, 7]
    torch.testing.assert_close(255 * x[0, 0, 0], torch.tensor([0.5, 2.5, 4.5, 6.5]))


def test_a_crop_should_not_be_of_one_class():
    mixed = torch.zeros(10, 10, dtype=torch.uint8)
    mixed[:3] = 1
    mixed[3:6] = IGNORED                                         # does not count: 40 of 70 are of class 0
    assert is_mixed(mixed, 0.75) and not is_mixed(mixed, 0.5) and not is_mixed(mixed[6:], 0.75)
    maps = torch.zeros(4, 40, 40, dtype=torch.uint8)
    maps[:, :8, :8] = 1
    pictures = pictures_of(maps[:, None].expand(-1, 3, -1, -1), maps)
    share = [torch.cat([crops_of(pictures, 8, most=most)[step][1] for step in range(20)]).flatten(1).any(1)
             for most in (1.0, 0.75)]                            # crops that have the small class
    assert share[1].sum() > 1.3 * share[0].sum() > 0


def test_distortion_is_that_of_hsv():
    x = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    nothing = np.full(8, 0.9)
    assert distorted(x, nothing).equal(x)
    for place, value, change in ((5, 0.1, lambda h, s, v: (h, min(1, 0.7 * s), v)),
                                 (5, 0.4, lambda h, s, v: (h, min(1, 1.3 * s), v))):
        u = nothing.copy()
        u[place] = value
        expected = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel)))
                    for pixel in x[0].flatten(1).T.tolist()]
        torch.testing.assert_close(distorted(x, u)[0].flatten(1).T, torch.tensor(expected), atol=1e-5, rtol=0)
    u = nothing.copy()
    u[6:] = 0.2, 0.75                                            # by a twentieth of the circle
    expected = []
    for pixel in x[0].flatten(1).T.tolist():
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((h + 0.05) % 1, s, v))
    torch.testing.assert_close(distorted(x, u)[0].flatten(1).T, torch.tensor(expected), atol=1e-5, rtol=0)
    u = nothing.copy()
    u[2:4] = 0.2, 0.75
    torch.testing.assert_close(distorted(x, u), (x + 16 / 255).clamp(0, 1))
    u[:2] = 0.2, 0.25                                            # contrast comes last, with u[4] second
    torch.testing.assert_close(distorted(x, u), (0.75 * (x + 16 / 255).clamp(0, 1)))
    assert UNIFORMS == 2 + 2 * segment_sets.TRIES + len(nothing)


# ---------------------------------------------------------------- data sets, in their formats on disk
def picture(path, rng, size=None):
    """Writes a picture of one colour with noise; returns (height, width)."""
    height, width = size or (rng.integers(28, 40), rng.integers(28, 48))
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(256, size=3) // 2 + rng.integers(0, 128, (height, width, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return height, width


def label_map(path, numbers):
    """Writes numbers [H, W] as VOC's PNG with a palette, Cityscapes' gray one, or SBD's .mat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = numbers.astype(np.uint8)
    if path.suffix == ".mat":
        scipy.io.savemat(path, {"GTcls": {"Boundaries": np.zeros((3, 1)), "Segmentation": numbers,
                                          "CategoriesPresent": np.unique(numbers)}})
        return
    image = Image.fromarray(numbers)
    if "SegmentationClass" in str(path):
        image.putpalette(list(range(256)) * 3)
    image.save(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """--data-dir with VOC 2012, SBD, and Cityscapes, small."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    voc, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    lists = {voc / "ImageSets/Segmentation/train.txt": ["a0", "a1", "a2", "a3"],
             voc / "ImageSets/Segmentation/val.txt": ["v0", "v1", "v2"],
             sbd / "train.txt": ["a1", "b0", "b1", "b2", "v1"], sbd / "val.txt": ["b3", "b4", "v0"]}
    for path, names in lists.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names) + "\n")
    for name in sorted({name for names in lists.values() for name in names}):
        shape = picture(voc / f"JPEGImages/{name}.jpg", rng)
        numbers = rng.choice([0, 0, 1, 7, 20, IGNORED], (shape[0] // 4 + 1, shape[1])).repeat(4, 0)[:shape[0]]
        if name[0] in "av":
            label_map(voc / f"SegmentationClass/{name}.png", numbers)
        if name in {*lists[sbd / "train.txt"], *lists[sbd / "val.txt"]}:
            label_map(sbd / f"cls/{name}.mat", np.where(numbers == IGNORED, 0, numbers))
    for split, cities, number in (("train", ("ulm", "aachen"), 4), ("val", ("bonn",), 3)):
        for city in cities:
            for i in range(number):
                stem = f"{city}_00000{i}_000019"
                shape = picture(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", rng, (32, 64))
                numbers = rng.integers(0, 34, (4, 8)).repeat(8, 0).repeat(8, 1)
                label_map(root / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", numbers)
                label_map(root / f"gtFine/{split}/{city}/{stem}_gtFine_instanceIds.png", numbers)
    return root


def of_these_sizes():
    """From now on this process takes the small sets for whole."""
    for name, sizes in SIZES.items():
        segment_sets.SOURCES[name] = segment_sets.SOURCES[name]._replace(sizes=sizes)


@pytest.fixture
def small_sets(sets, monkeypatch):
    monkeypatch.setattr(segment_sets, "SOURCES", dict(segment_sets.SOURCES))
    of_these_sizes()
    return sets


def command(network, out, sets, name, more=""):
    window = "--window 32 --window-stride 20" if name == "cityscapes" else ""
    return (f"segment.py @{ROOT}/recipes/{RECIPES[name]}.txt --checkpoint {network} --data-dir {sets} "
            f"{SMALL} {window} --output-dir {out} {more}")


def test_voc12aug_is_voc_and_sbd_without_vocs_val(small_sets):
    train, test = read_set("voc12aug", small_sets, None, None, 0)
    names = [path.decode().split("/")[-1] for path in train.images.paths]
    assert names == [f"{name}.jpg" for name in ("a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3", "b4")]
    kinds = [path.rsplit(".")[-1] for path in train.maps]
    assert kinds == ["png"] * 4 + ["mat"] * 5 and len(test.class_names) == 21
    assert [path.split("/")[-1] for path in test.maps] == ["v0.png", "v1.png", "v2.png"]
    for pictures in (train, test):
        for i in range(len(pictures.images)):
            classes = pictures.classes(i, pictures.images[i].shape[1:])
            assert {*classes.unique().tolist()} <= {0, 1, 7, 20, IGNORED} and classes.dtype == torch.uint8
    assert segment_sets.Source(*segment_sets.SOURCES["voc12aug"]).sizes == (9, 3)


def test_cityscapes_has_19_of_its_34_numbers(small_sets):
    train, test = read_set("cityscapes", small_sets, None, None, 0)
    assert (len(train.images), len(test.images), len(test.class_names)) == (8, 3, 19)
    assert [path.decode().split("/")[-2] for path in train.images.paths] == ["aachen"] * 4 + ["ulm"] * 4
    of = {number: segment_sets.CITYSCAPES.get(number) for number in range(34)}
    names = [train.class_names[c] if c != IGNORED else None for c in train.class_of[:34]]
    assert names == list(of.values()) and (train.class_of[34:255] == -1).all()
    assert [names[i] for i in (7, 11, 24, 26, 33)] == ["road", "building", "person", "car", "bicycle"]
    numbers = np.array(Image.open(train.maps[0]))
    assert np.array_equal(train.classes(0, numbers.shape), train.class_of[numbers])


def test_published_sizes_are_demanded(sets, here, network, tmp_path):
    for name, numbers in (("voc12aug", "9 training images instead of 10,582"),
                          ("cityscapes", "8 training images instead of 2,975")):
        message = f"it has {numbers}, so it is not whole; place"
        _, err = here(command(network, tmp_path / "out", sets, name), 2)
        assert err.count("\n") == 1 and f"--data {name}: {message}" in err and "--data-dir" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_a_recipe_in_one_and_two_processes(name, small_sets, network, here, tmp_path):
    """Equal but for rounding: batch norms and the loss are those of the whole batch."""
    here(command(network, tmp_path / "one", small_sets, name, "--workers 0"))
    run(command(network, tmp_path / "two", small_sets, name, "--workers 1"), ranks=2, prepare=of_these_sizes)
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert (one["num_train"], one["num_test"], one["num_broken"]) == (*SIZES[name], 0)
    assert one["miou"] == pytest.approx(two["miou"], abs=0.02) and 0 <= one["miou"] < 0.5
    assert 3 <= len(one["iou"]) <= {"voc12aug": 21, "cityscapes": 19}[name]
    assert ("miou_objects" in one) == (name == "voc12aug")
    assert log_lines(tmp_path / "two")[0]["config"]["world_size"] == 2
    apart = [(a - b).abs().max().item() for a, b in zip(weights(tmp_path / "one").values(),
                                                        weights(tmp_path / "two").values(), strict=True)]
    assert max(apart) < 1e-3
    assert Image.open(tmp_path / "one/segmentation.png").size[0] > 100


def test_killed_and_resumed_with_files(small_sets, network, here, tmp_path):
    """One run of two steps; another stops after the first, and goes on with workers."""
    flags = "--save-every 1 --dropout 0.5 --workers"
    here(command(network, tmp_path / "straight", small_sets, "voc12aug", f"{flags} 0"))
    part = command(network, tmp_path / "run", small_sets, "voc12aug", f"{flags} 2")
    run(part, code=-9, prepare=functools.partial(die_in_step, 2))
    assert load_checkpoint(tmp_path / "run/checkpoint.pth")["step"] == 1
    run(part, prepare=of_these_sizes)
    assert_same_run(tmp_path / "straight", tmp_path / "run")


def die_in_step(number):
    import os
    import signal

    import segment
    of_these_sizes()
    loss_of, calls = segment.pixel_loss, []

    def loss_or_die(*args):
        calls.append(1)
        if len(calls) == 2 * number - 1:                         # two heads in a step
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_of(*args)
    segment.pixel_loss = loss_or_die


# ---------------------------------------------------------------- hostile files
def spoil(root, kind):
    """Makes a label map of VOC's, or of SBD's, what it must not be; its name."""
    voc, sbd = root / "VOCdevkit/VOC2012/SegmentationClass", root / "benchmark_RELEASE/dataset/cls"
    path = sbd / "b0.mat" if kind.startswith("mat") else voc / "a0.png"
    if kind == "colours":
        Image.open(path).convert("RGB").save(path)
    elif kind == "size":
        Image.open(path).resize((20, 20), Image.Resampling.NEAREST).save(path)
    elif kind == "number":
        numbers = np.array(Image.open(path))
        numbers[3, 4] = 21
        label_map(path, numbers)
    elif kind == "mat size":
        label_map(path, np.zeros((5, 6)))
    elif kind == "mat numbers":
        scipy.io.savemat(path, {"GTcls": {"Segmentation": np.zeros((5, 6))}})
    else:
        path.write_bytes(path.read_bytes()[:60] if kind.endswith("cut") else b"GIF89a")
    return path.name


@pytest.mark.parametrize("kind, says", [
    ("colours", "its pixels are RGB, not numbers of classes"), ("size", "20 × 20 pixels, its picture"),
    ("number", "21 is no class of its data set"), ("cut", "not a label map"), ("gif", "not a label map"),
    ("mat size", "it has 6 × 5 numbers of uint8, its picture"), ("mat cut", "not a label map"),
    ("mat numbers", "numbers of float64")])
def test_a_label_map_that_is_none_is_named(kind, says, sets, tmp_path, monkeypatch):
    shutil.copytree(sets, tmp_path / "sets")
    name = spoil(tmp_path / "sets", kind)
    monkeypatch.setattr(segment_sets, "SOURCES", dict(segment_sets.SOURCES))
    of_these_sizes()
    train, _ = read_set("voc12aug", tmp_path / "sets", None, None, 0)
    index = next(i for i, path in enumerate(train.maps) if path.endswith(name))
    with pytest.raises(UserError) as error:
        train.classes(index, train.images[index].shape[1:])
    message = str(error.value)
    assert name in message and says in message and "\n" not in message
    assert re.search(r"; fetch it again\)?$", message)


def test_a_bad_label_map_ends_a_run_in_one_line(sets, network, here, tmp_path, monkeypatch):
    """Also from a worker; what no picture can be is counted, and named."""
    shutil.copytree(sets, tmp_path / "sets")
    monkeypatch.setattr(segment_sets, "SOURCES", dict(segment_sets.SOURCES))
    of_these_sizes()
    (tmp_path / "sets/VOCdevkit/VOC2012/JPEGImages/v1.jpg").write_bytes(b"no picture")
    here(command(network, tmp_path / "fine", tmp_path / "sets", "voc12aug", "--workers 0"))
    metrics = metrics_of(tmp_path / "fine")
    assert (metrics["num_test"], metrics["num_broken"]) == (2, 1)
    for path in (tmp_path / "sets/VOCdevkit/VOC2012/SegmentationClass").glob("a*.png"):
        Image.open(path).convert("RGB").save(path)
    for workers in (0, 1):
        _, err = here(command(network, tmp_path / "out", tmp_path / "sets", "voc12aug",
                              f"--workers {workers} --steps 9 --overwrite"), 2)
        last = err.splitlines()[-1]
        assert ": error: " in last and "its pixels are RGB" in last


def test_what_is_missing_is_named(small_sets, network, here, tmp_path):
    for name, path in (("voc12aug", "benchmark_RELEASE/dataset/cls/b1.mat"), ("cityscapes", "gtFine")):
        shutil.copytree(small_sets, tmp_path / name)
        victim = tmp_path / name / path
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
        _, err = here(command(network, tmp_path / "out", tmp_path / name, name), 2)
        assert err.count("\n") == 1 and f"there is no {victim}" in err and "; place " in err
        _, err = here(command(network, tmp_path / "out", tmp_path / "nowhere", name), 2)
        assert err.count("\n") == 1 and f"there is no {tmp_path}/nowhere" in err and "; place " in err


# ---------------------------------------------------------------- a run on scenes
def scenes_command(network, out, more=""):
    return (f"segment.py --checkpoint {network} --num-scenes 16 4 --short-side 32 --crop-size 32 "
            f"--head-width 8 --batch-size 8 --steps 3 --output-dir {out} {more}")


def test_batch_norms_are_estimated_by_the_trained_network(network, here, tmp_path):
    """On the crops of the steps that would follow; what is saved is what is evaluated."""
    here(scenes_command(network, tmp_path / "with", "--bn-batches 2"))
    here(scenes_command(network, tmp_path / "without", "--bn-batches 0"))
    found, plain = weights(tmp_path / "with"), weights(tmp_path / "without")
    config = load_checkpoint(tmp_path / "with/checkpoint.pth")["config"]
    copy = FCN(build_backbone("resnet8"), 11, width=8)
    copy.load_state_dict(plain)
    train, _ = read_set("scenes", None, (16, 4), 32, 0)
    crops = Crops(train, 8, 32, (32, 0), (1, 1), 1, False, config["mean"], config["std"], 0)
    reestimate_batch_norms(copy, [crops[3][0], crops[4][0]], forward=copy)
    for name, value in copy.state_dict().items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert not found["head.convs.0.1.running_mean"].equal(plain["head.convs.0.1.running_mean"])


def test_a_plain_loop_arrives_at_the_same_weights(network, here, tmp_path):
    here(scenes_command(network, tmp_path, "--dropout 0 --bn-batches 0 --lr 0.2 --min-lr 0.05 "
                        "--weight-decay 0.01 --aux-weight 0.3"))
    backbone, config = load_pretrained(network)
    torch.manual_seed(0)
    model = FCN(backbone, 11, width=8, dropout=0, kaiming=False).train()
    train, _ = read_set("scenes", None, (16, 4), 32, 0)
    crops = Crops(train, 8, 32, (32, 0), (1, 1), 1, False, *input_of(config)[1:], seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 + 0.15 * (1 - step / 3) ** 0.9
        x, classes = crops[step]
        scores, auxiliary = model(x)
        loss = F.cross_entropy(scores, classes) + 0.3 * F.cross_entropy(auxiliary, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = weights(tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("bad, names", [
    ("--batch-size 17", "--batch-size 17: must be at most the 16 images"),
    ("--short-side 15", "--short-side 15: must be at least 16"),
    ("--scale-range 2 1", "--scale-range: must be two numbers, the lower one first"),
    ("--window 8 --window-stride 9", "--window-stride 9: must be at most --window, 8"),
    ("--data voc12", "did you mean voc12aug?")])
def test_bad_input_is_one_line(bad, names, network, here, tmp_path):
    _, err = here(scenes_command(network, tmp_path / "out", bad), 2)
    assert err.count("\n") == 1 and names in err and not (tmp_path / "out").exists()


def test_a_vit_is_refused_by_name(here, tmp_path):
    vit = saved_network(tmp_path / "vit.pth", "--data fake --arch vit_t --image-size 32")
    _, err = here(scenes_command(vit, tmp_path / "out"), 2)
    assert "it is a vit_t; a ViT has no stages with maps; use a ResNet" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
