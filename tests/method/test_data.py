"""Proves that each data set is found and read right, and that batches do not depend on processes and workers.

    pytest tests/method/test_data.py
"""

import argparse
import hashlib
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as T
from PIL import Image, ImageOps
from processes import same
from sklearn.datasets import load_sample_image

import data
import folders
import views as views_module
from checkpoint import UserError
from data import (
    EMBEDDED,
    INPUTS,
    Batches,
    CentreCrops,
    ImageSet,
    build_dataset,
    count_overlap,
    eval_batches,
    folder_flags,
    folder_options,
    hold_out,
    labelled,
    loader_workers,
    num_workers,
)
from folders import SUFFIXES, in_validation, read_picture
from views import UNIFORMS, RandomView, Views, build_views, crop_resize, normalize

PHOTOGRAPHS = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


def photograph(seed, width=120, height=90):
    """A part of one of two photographs, as a Pillow image."""
    rng = np.random.default_rng(seed)
    picture = PHOTOGRAPHS[seed % 2]
    x, y = rng.integers(0, picture.width - width), rng.integers(0, picture.height - height)
    return picture.crop((x, y, x + width, y + height))


def make(folder, *names):
    """Writes a picture for each name, in the format of its suffix, and other files as text."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in SUFFIXES:
            photograph(seed, width=60 + 13 * (seed % 5), height=50 + 7 * (seed % 7)).save(path)
        else:
            path.write_text("not a picture")


def found(path, split="train"):
    """{path below the folder: class name or None}, in the order of the set."""
    dataset, root = build_dataset(str(path), split), path if path.is_dir() else path.parent
    names = [os.path.relpath(os.fsdecode(name), root) for name in dataset.paths]
    if dataset.labels is None:
        assert dataset.class_names is None
        return dict.fromkeys(names)
    return dict(zip(names, [dataset.class_names[c] for c in dataset.labels], strict=True))


# ---------------------------------------------------------------- what is found
def test_class_folders_with_train_and_val(tmp_path):
    make(tmp_path, "train/cat/b.jpg", "train/cat/a.JPEG", "train/cat/deep/er/c.png", "train/dog/a.bmp",
         "train/eel/a.gif", "val/eel/x.webp", "val/cat/x.tif", "train/dog/notes.txt", "train/.cache/a.jpg",
         "train/dog/._a.jpg")
    train = {"train/cat/a.JPEG": "cat", "train/cat/b.jpg": "cat", "train/cat/deep/er/c.png": "cat",
             "train/dog/a.bmp": "dog", "train/eel/a.gif": "eel"}
    assert found(tmp_path) == train and list(found(tmp_path)) == list(train)
    blind = build_dataset(str(tmp_path), "pretrain")
    assert blind.labels is None
    assert list(map(os.fsdecode, blind.paths)) == [f"{tmp_path}/{name}" for name in train]
    assert found(tmp_path, "test") == {"val/cat/x.tif": "cat", "val/eel/x.webp": "eel"}
    assert build_dataset(str(tmp_path), "test").labels.tolist() == [0, 2]         # numbered as in training
    make(tmp_path, "val/fox/a.jpg")
    with pytest.raises(UserError, match="val: class 'fox' is not among those of .*train"):
        build_dataset(str(tmp_path), "test")
    os.rename(tmp_path / "val", tmp_path / "test")
    (tmp_path / "test/fox/a.jpg").unlink(), (tmp_path / "test/fox").rmdir()
    assert found(tmp_path, "test") == {"test/cat/x.tif": "cat", "test/eel/x.webp": "eel"}
    os.rename(tmp_path / "test", tmp_path / "other")
    with pytest.raises(UserError, match="has train, but no val folder and no val.txt"):
        build_dataset(str(tmp_path), "test")


def test_class_folders_alone_are_every_split(tmp_path):
    make(tmp_path, "2/a.jpg", "10/a.jpg", "10/b b.jpg")
    everything = {"10/a.jpg": "10", "10/b b.jpg": "10", "2/a.jpg": "2"}
    assert found(tmp_path) == found(tmp_path, "test") == everything


def test_piles_have_no_labels(tmp_path):
    """No metric is computed from invented labels: not of one class folder, nor of a mixture."""
    make(tmp_path / "flat", "b.jpg", "a.png", "readme.md")
    assert found(tmp_path / "flat") == {"a.png": None, "b.jpg": None}
    make(tmp_path / "one", "all/b.jpg", "all/more/a.png")
    assert found(tmp_path / "one") == {"all/b.jpg": None, "all/more/a.png": None}
    make(tmp_path / "mixed", "cat/a.jpg", "dog/a.jpg", "stray.jpg")
    assert set(found(tmp_path / "mixed").values()) == {None} and len(found(tmp_path / "mixed")) == 3
    make(tmp_path / "split", "train/a.jpg", "val/b.jpg")
    assert found(tmp_path / "split", "test") == {"val/b.jpg": None}


def test_links_are_followed(tmp_path):
    make(tmp_path, "store/a.jpg", "store/b.jpg")
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store")
    assert len(found(tmp_path / "data")) == 4


def test_lists(tmp_path):
    make(tmp_path, "p/a.jpg", "p/with a space.jpg", "p/c.png")
    plain, spaced = tmp_path / "plain.txt", f"{tmp_path}/p/with a space.jpg"      # relative and absolute
    plain.write_text(f"p/a.jpg\n\n  {spaced}  \r\np/c.png\n")
    assert found(plain) == {"p/a.jpg": None, "p/with a space.jpg": None, "p/c.png": None}
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("p/c.png 3\np/with a space.jpg\t0\np/a.jpg 3")
    assert found(numbers, "test") == {"p/c.png": "3", "p/with a space.jpg": "0", "p/a.jpg": "3"}
    assert build_dataset(str(numbers), "train").labels.tolist() == [3, 0, 3]
    (tmp_path / "both").mkdir()
    (tmp_path / "both/train.txt").write_text("../p/a.jpg dog\n../p/c.png cat\n")
    (tmp_path / "both/val.txt").write_text("../p/c.png dog\n")
    assert found(tmp_path / "both") == {"../p/a.jpg": "dog", "../p/c.png": "cat"}
    assert build_dataset(str(tmp_path / "both"), "test").labels.tolist() == [1]   # cat, dog
    for text, message in (
            ("p/a.jpg\np/b.jpg\n", "line 2 names a missing file, .*p/b.jpg"),
            ("p/a.jpg 0\nq/a.jpg 1\n", "line 2 names a missing file, .*q/a.jpg"),
            ("p/a.jpg 0\n\np/c.png\n", "line 3 has no label, unlike the first"),
            ("p/a.jpg\np/c.png 1\n", "line 2 has a label, unlike the first"),
            ("\ufeffp/a.jpg\np/b.jpg\n", "line 2 names a missing file, .*p/b.jpg"),
            ("p/a.jpg\0\n", "is no text file"),
            ("\n", "an empty list")):
        numbers.write_text(text)
        with pytest.raises(UserError, match=f"--data .*numbers.txt: {message}"):
            build_dataset(str(numbers), "train")


@pytest.mark.parametrize("path, message", [
    ("none", "'.*none' is neither a data set .fashion-mnist, .* nor a folder or list"),
    ("empty", r"no pictures in this folder \(.jpg .*\); it has no files at all; is the path right\?$"),
    ("notes", r"no pictures in this folder \(.*\); it has 1 .txt; is the path right\?$"),
    ("phone", r"it has 2 .xyz, 1 without an ending, 1 .txt; is the path right\?$")])
def test_nothing_there_is_one_line(tmp_path, path, message):
    make(tmp_path, "notes/a.txt", "phone/cat/a.XYZ", "phone/cat/b.xyz", "phone/dog/a.txt", "phone/README",
         "sound/cat/a.jpg", "sound/dog/a.jpg")
    (tmp_path / "empty").mkdir()
    assert len(build_dataset(str(tmp_path / "sound"), "train")) == 2
    with pytest.raises(UserError, match=f"--data.*{message}") as error:
        build_dataset(str(tmp_path / path), "train")
    assert "\n" not in str(error.value)


def test_what_is_left_out_is_counted_and_said_once(tmp_path, capfd, monkeypatch):
    make(tmp_path, "cat/a.jpg", "cat/b.jfif", "cat/c.jpe", "dog/a.jpg", "dog/b.heic", "dog/deep/c.HEIC",
         "dog/notes.txt", "__MACOSX/x.txt", "eel/a.heic", ".hidden/x.txt", "cat/.x.txt", "README")
    monkeypatch.setattr(folders, "SUFFIXES", tuple(suffix for suffix in SUFFIXES if suffix != ".heic"))
    for split in ("train", "test"):
        assert list(found(tmp_path, split)) == ["cat/a.jpg", "cat/b.jfif", "cat/c.jpe", "dog/a.jpg"]
    assert build_dataset(str(tmp_path), "train").class_names == ["cat", "dog"]
    assert capfd.readouterr().err.splitlines() == [
        f"warning: --data {tmp_path}: folders without pictures are left out: __MACOSX, eel",
        f"warning: --data {tmp_path}: 6 files are left out: 3 .heic (install pillow-heif), 2 .txt, "
        "1 without an ending"]


def test_one_class_of_a_validation_folder_keeps_its_label(tmp_path):
    make(tmp_path, "train/cat/a.jpg", "train/dog/a.jpg", "val/dog/a.jpg", "val/dog/b.jpg")
    assert found(tmp_path, "test") == {"val/dog/a.jpg": "dog", "val/dog/b.jpg": "dog"}
    assert build_dataset(str(tmp_path), "test").labels.tolist() == [1, 1]
    os.rename(tmp_path / "val/dog", tmp_path / "val/all")                         # no class of that name
    assert set(found(tmp_path, "test").values()) == {None}


def test_numbers_of_a_list_make_no_classes_without_pictures(tmp_path):
    make(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    (tmp_path / "train.txt").write_text("a.jpg 3000000\nb.jpg 7\nc.jpg 20\n")
    (tmp_path / "val.txt").write_text("d.jpg 20\n")
    train, test = (build_dataset(str(tmp_path), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["7", "20", "3000000"]
    assert train.labels.tolist() == [2, 0, 1] and test.labels.tolist() == [1]
    (tmp_path / "train.txt").write_text("a.jpg 999\nb.jpg 7\n")                   # of ImageNet, say
    (tmp_path / "val.txt").write_text("d.jpg 7\n")
    train, test = (build_dataset(str(tmp_path), split) for split in ("train", "test"))
    assert train.labels.tolist() == [999, 7] and len(train.class_names) == 1000
    assert test.labels.tolist() == [7]
    (tmp_path / "train.txt").write_text(f"a.jpg {'9' * 5000}\nb.jpg 7\n")
    assert build_dataset(str(tmp_path), "train").labels.tolist() == [1, 0]


# ---------------------------------------------------------------- parts and classes
def options_of(words, config=None, data_name=None):
    parser = argparse.ArgumentParser()
    folder_flags(parser)
    return folder_options(argparse.Namespace(data=data_name, **vars(parser.parse_args(words))), config)


@pytest.mark.parametrize("kind", ["classes", "flat", "list"])
def test_val_share_divides_by_name(tmp_path, kind):
    """Disjoint, whole, the same in a copy elsewhere, and no picture moves when others are added."""
    def parts(where, number):
        names = [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(number)]
        if kind == "flat":
            names = [name.replace("/", "") for name in names]
        for name in names:
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).touch()
        (where / "list.txt").write_text("".join(f"{name} {name[:3]}\n" for name in names))
        path = where / "list.txt" if kind == "list" else where
        sets = [build_dataset(str(path), split, val_share=0.3) for split in ("train", "test", "pretrain")]
        assert [part.part for part in sets] == ["training images", "validation images", "training images"]
        assert sets[0].paths.tolist() == sets[2].paths.tolist() and sets[2].labels is None
        train, val = ({os.path.relpath(os.fsdecode(path), where) for path in part.paths} for part in sets[:2])
        assert not train & val and train | val == set(names)
        if kind != "flat":
            assert sets[1].class_names == ["cat", "dog"]
            assert all(0.2 < share < 0.4 for share in sets[1].labels.bincount() / number)
            assert [name[:3] for name in sorted(val)] == [["cat", "dog"][c] for c in sorted(sets[1].labels)]
        return train, val
    train, val = parts(tmp_path / "one", 150)
    assert parts(tmp_path / "another/place", 150) == (train, val)
    more_train, more_val = parts(tmp_path / "one", 200)
    assert train < more_train and val < more_val


def test_a_class_without_a_training_image_is_said(tmp_path, capfd):
    """Moving one there would move it back as soon as another picture is added."""
    names = [f"cat/{i}.jpg" for i in range(20)] + ["dog/1.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    share = next(s for s in np.arange(0.05, 1, 0.05).round(2) if in_validation(names, ".", s)[-1])
    assert len(build_dataset(str(tmp_path), "train", val_share=share)) < 20
    said = f"warning: --val-share {share}: 1 classes have no training image, the first is 'dog'\n"
    assert capfd.readouterr().err == said


def test_val_share_is_the_share():
    names = [f"x/{i}.jpg" for i in range(4000)]
    chosen = [in_validation(names, "x", share).mean() for share in (0.05, 0.2, 0.5, 0.9)]
    assert chosen == pytest.approx([0.05, 0.2, 0.5, 0.9], abs=0.03)              # four standard deviations
    assert (in_validation(names, "x", 0.2) <= in_validation(names, "x", 0.5)).all()


def test_group_names_keeps_groups_on_one_side(tmp_path):
    names = [f"{c}/person-{p}_{i}.jpg" for c in ("cat", "dog") for p in range(100) for i in range(3)]
    plain, grouped = (in_validation(names, str(tmp_path), 0.4, group) for group in (False, True))
    sides = {}
    for name, chosen in zip(names, grouped.tolist(), strict=True):
        sides.setdefault(name.split("/")[1].split("_")[0], set()).add(chosen)
    assert all(len(side) == 1 for side in sides.values()) and 0.2 < grouped.mean() < 0.6
    assert len({side for sides_of in (plain[:3], plain[3:6], plain[6:9]) for side in sides_of}) == 2
    for name in (f"IMG_{i}.jpg" for i in range(9)):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="no .* images among the 9; .*leave --group-names out"):
        for split in ("train", "test"):
            build_dataset(str(tmp_path), split, val_share=0.5, group_names=True)


def test_classes_are_taken_in_the_files_order(tmp_path):
    make(tmp_path, "ant/a.jpg", "bee/b.jpg", "cow/c.jpg", "cow/d.jpg")
    (tmp_path / "names.txt").write_text("cow\n\nant\n")
    options = options_of(["--classes", f"{tmp_path}/names.txt"])
    assert options["classes"] == ["cow", "ant"]
    dataset = build_dataset(str(tmp_path), "train", **options)
    assert dataset.labels.tolist() == [1, 0, 0] and dataset.class_names == ["cow", "ant"]
    assert len(build_dataset(str(tmp_path), "pretrain", **options)) == 3
    fake, some = build_dataset("fake", "test"), build_dataset("fake", "test", classes=["class 7", "class 2"])
    assert some.images.equal(fake.images[(fake.labels == 7) | (fake.labels == 2)])
    assert some.images[some.labels == 0].equal(fake.images[fake.labels == 7])
    with pytest.raises(UserError, match="'clas 8' is not among the 10 classes of fake; is 'class 8' meant"):
        build_dataset("fake", "train", classes=["clas 8"])
    make(tmp_path / "pile", "a.jpg")
    with pytest.raises(UserError, match="--classes: .*pile has no labels"):
        build_dataset(str(tmp_path / "pile"), "pretrain", classes=["cow"])
    for text, message in (("", "is empty"), ("cow\nbee\ncow\n", "names 'cow' twice")):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(UserError, match=f"--classes .*names.txt: {message}"):
            options_of(["--classes", f"{tmp_path}/names.txt"])
    with pytest.raises(UserError, match="--classes none.txt: cannot be read .No such file"):
        options_of(["--classes", "none.txt"])


def test_a_checkpoint_says_which_parts_and_classes_were_trained_on(tmp_path):
    make(tmp_path, "mine/a.jpg", "other/a.jpg")
    own = dict(val_share=0.3, group_names=True, classes=["x"], decoder="torchvision")
    trained = dict(own, data=f"{tmp_path}/mine")
    nothing = dict(val_share=None, group_names=None, classes=None, decoder=None)
    assert options_of([], trained) == own and options_of([], trained, f"{tmp_path}/other/../mine/") == own
    assert options_of([], trained, f"{tmp_path}/other") == options_of([], trained, "fake") == nothing
    assert options_of([]) == options_of([], dict(data=None)) == options_of([], dict(data="fake")) == nothing
    given = options_of(["--val-share", "0", "--decoder", "pillow"], trained)
    assert given == dict(own, val_share=0, decoder=None)
    with pytest.raises(UserError, match="--group-names: needs --val-share"):
        options_of(["--group-names"])


def test_val_share_is_refused_where_there_are_parts(tmp_path):
    make(tmp_path, "train/a.jpg", "val/a.jpg")
    for name in ("fake", str(tmp_path)):
        with pytest.raises(UserError, match=f"--val-share: {name} has .* already; leave the flag out"):
            build_dataset(name, "train", val_share=0.2)
        assert build_dataset(name, "train", val_share=0).part == "training images"
    assert build_dataset(str(tmp_path), "test").part == "validation images"
    os.rename(tmp_path / "val", tmp_path / "test")
    assert build_dataset(str(tmp_path), "test").part == build_dataset("fake", "test").part == "test images"
    assert build_dataset(str(tmp_path / "train"), "test").part == "images"


def test_pictures_in_both_parts_are_counted_and_refused(tmp_path):
    """In another order, through links of folders and of files, in part."""
    make(tmp_path, "train/cat/a.jpg", "train/cat/b.jpg", "train/dog/c.jpg", "val/cat/x.jpg", "val/dog/y.jpg")
    args = argparse.Namespace(data=str(tmp_path), data_dir="", checkpoint="", val_share=None)
    assert [len(part) for part in labelled(args, {})] == [3, 2]
    (tmp_path / "val/dog/link.jpg").symlink_to(tmp_path / "train/cat/b.jpg")
    (tmp_path / "val/cat/more").symlink_to(tmp_path / "train/dog")
    train, test = (build_dataset(str(tmp_path), split) for split in ("train", "test"))
    assert count_overlap(train, test) == 2
    assert count_overlap(train, train.subset(torch.tensor([2, 0]))) == 2
    with pytest.raises(UserError, match="2 of the 4 validation images are training images, too; remove"):
        labelled(args, {})
    (tmp_path / "cat.txt").write_text("train/cat/a.jpg 0\ntrain/dog/c.jpg 1")
    args.data = f"{tmp_path}/cat.txt"
    with pytest.raises(UserError, match="has no train and val parts; --val-share 0.2 keeps a fifth"):
        labelled(args, {})


def test_one_picture_alone_can_be_chosen(tmp_path):
    make(tmp_path, "a.jpg", "b.jpg")
    both = build_dataset(str(tmp_path), "train")
    one = both.subset(torch.tensor([False, True])).subset(torch.tensor([True]))
    assert one.paths.tolist() == [os.fsencode(tmp_path / "b.jpg")] and one.positions.tolist() == [1]
    assert len(one.readable()) == 1 and len(one.subset(torch.tensor([False]))) == 0
    assert both.subset(slice(1, None)).paths.tolist() == one.paths.tolist()
    x = list(eval_batches(one, dict(data="files", image_size=8), "cpu"))
    assert [len(batch) for batch in x] == [1] and len(one.readable()) == 1


def test_held_out_images_leave_each_class_one():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    kept, held = hold_out(labels, 0.99, seed=0)
    assert labels[kept].tolist() == [0, 1, 2] and len(held) == 3


@pytest.mark.parametrize("environment, quota, expected", [
    ({}, None, 6), (dict(LOCAL_WORLD_SIZE="2", WORLD_SIZE="16"), None, 3), (dict(WORLD_SIZE="3"), None, 2),
    (dict(LOCAL_WORLD_SIZE="8"), None, 1), ({}, "250000 100000", 3), ({}, "max 100000", 6)])
def test_workers_are_as_many_as_cpus_for_this_process(tmp_path, monkeypatch, environment, quota, expected):
    """Of the CPUs that it may use, in a container and beside other processes."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(data, "CPU_LIMIT", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    make(tmp_path, "a.jpg")
    files = build_dataset(str(tmp_path), "train")
    assert num_workers(-1, files) == expected and num_workers(5, files) == 5
    assert num_workers(-1, build_dataset("fake", "test")) == 0
    monkeypatch.delattr(os, "sched_getaffinity")
    assert num_workers(-1, files) > expected or quota == "250000 100000"


# ---------------------------------------------------------------- how it is read
def pillows(image):
    return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1).int()


def rotated(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return dict(exif=exif.tobytes())


@pytest.mark.parametrize("name, mode, options", [
    ("a.jpg", "RGB", {}), ("a.jpg", "L", {}), ("a.jpg", "CMYK", {}), ("a.tif", "CMYK", {}),
    ("a.png", "RGBA", {}), ("a.png", "LA", {}), ("a.png", "P", {}), ("a.png", "P", dict(transparency=3)),
    ("a.png", "1", {}),
    ("a.gif", "P", {}), ("a.bmp", "RGB", {}), ("a.webp", "RGB", dict(lossless=True)), ("a.ppm", "RGB", {}),
    ("a.tif", "RGB", {}), ("a.jpg", "RGB", dict(progressive=True)), ("a.gif.JPEG", "RGB", {}),
    *(("a.jpg", "RGB", rotated(None, k)) for k in range(1, 9)), ("a.png", "RGB", rotated(None, 6))])
def test_read_picture_is_pillows(tmp_path, name, mode, options):
    picture = photograph(3, 61, 47).convert(mode)
    picture.save(tmp_path / name, **options)
    ours = read_picture(tmp_path / name)
    theirs = pillows(Image.open(tmp_path / name))
    assert ours.dtype == torch.uint8 and ours.shape == theirs.shape
    assert ours.int().equal(theirs)


def test_odd_pictures(tmp_path):
    Image.fromarray(np.array([[0, 257, 32_896, 65_535]], np.uint16)).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png")[:, 0].tolist() == [[0, 1, 128, 255]] * 3       # not clipped
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime", "blue")]
    for name in ("moving.gif", "moving.webp", "pages.tif", "moving.png"):
        options = dict(lossless=True) if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert read_picture(tmp_path / name)[:, 0, 0].tolist() == [255, 0, 0]       # the first frame
    views = build_views("multicrop", (0.5,), (0.25,), 32, 16, 2)
    for width, height in ((1, 1), (1, 3000), (3000, 1), (7, 900)):
        Image.new("RGB", (width, height), (10, 200, 90)).save(tmp_path / "odd.png")
        dataset = ImageSet(None, None, None, np.array([os.fsencode(tmp_path / "odd.png")]))
        assert dataset[0].shape == (3, height, width)
        crop = CentreCrops(dataset, 32)[0]
        crops, _, _ = Batches(dataset, 1, views, seed=0)[0]
        assert crop.shape == (3, 32, 32) and [c.shape[-1] for c in crops] == [32, 32, 16, 16]
        for c in (crop[None], *crops):
            assert (c.float().mean((0, 2, 3)) - torch.tensor([10, 200, 90])).abs().max() < 1


def test_a_damaged_picture_is_named(tmp_path):
    photograph(0).save(tmp_path / "a.jpg")
    sound = (tmp_path / "a.jpg").read_bytes()
    assert read_picture(tmp_path / "a.jpg").shape == (3, 90, 120)
    for content in (b"", b"some text", sound[:10]):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(UserError, match="a.jpg: not a readable picture") as error:
            read_picture(tmp_path / "a.jpg")
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- crops and batches
@pytest.mark.parametrize("size, scale", [
    (224, (0.08, 1)), (224, (0.4, 1)), (96, (0.05, 0.4)), (96, (0.05, 0.14))])
def test_a_workers_crops_are_pillows(size, scale):
    """The kernel has 16-bit weights, Pillow's 22: of two million values one differs by two, none by more; and
    neither is nearer to the exact result."""
    view = RandomView(size, (0.5,), (0.25,), scale)
    u = torch.from_numpy(np.random.default_rng(size).random((24, UNIFORMS), dtype=np.float32))
    pictures = [torch.from_numpy(np.array(PHOTOGRAPHS[i % 2])).permute(2, 0, 1) for i in range(24)]
    p = view.draw_crop(u, *torch.tensor([x.shape[1:] for x in pictures]).T)
    differences, offsets, theirs_off = [], [], []
    for i, ours in enumerate(view.crop(pictures, u).int()):
        top, left, h, w = (int(p[key][i]) for key in ("top", "left", "height", "width"))
        # one axis a call: Pillow 13 chooses the order of the axes by the shape
        theirs = PHOTOGRAPHS[i % 2].crop((left, top, left + w, top + h)).resize((size, h), Image.BICUBIC)
        theirs = theirs.resize((size, size), Image.BICUBIC)
        theirs = pillows(ImageOps.mirror(theirs) if p["flip"][i] else theirs)
        box = (p[key][i:i + 1] for key in ("top", "left", "height", "width"))
        exact = 255 * crop_resize(pictures[i][None], *box, size, p["flip"][i:i + 1])[0]
        differences.append((ours - theirs).abs().flatten())
        offsets.append((ours - exact).abs().flatten())
        theirs_off.append((theirs - exact).abs().flatten())
    differences, offsets, theirs_off = map(torch.cat, (differences, offsets, theirs_off))
    assert differences.max() <= 2 and (differences == 2).double().mean() < 1e-5
    assert offsets.max() < theirs_off.max() + 0.1 and abs(offsets.mean() - theirs_off.mean()) < 1e-3


def test_centre_crops_are_torchvisions(tmp_path):
    transform = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.CenterCrop(224)])
    for i, shape in enumerate([(400, 300), (301, 417), (224, 224), (100, 80), (90, 350)]):
        photograph(i, *shape).save(tmp_path / "a.png")
        dataset = ImageSet(None, None, None, np.array([os.fsencode(tmp_path / "a.png")]))
        theirs = pillows(transform(Image.open(tmp_path / "a.png")))
        difference = (CentreCrops(dataset, 224)[0].int() - theirs).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.1      # and Pillow 13's order of axes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    make(root, *(f"{split}/{c}/{i:02d}.jpg" for split, n in (("train", 14), ("val", 5)) for c in "ab"
                 for i in range(n)))
    return root


def assert_same(a, b):
    assert len(a) == len(b) > 0
    for (crops, u, labels), (other_crops, other_u, other_labels) in zip(a, b, strict=True):
        assert u.equal(other_u) and labels.equal(other_labels)
        assert all(crop.equal(other) for crop, other in zip(crops, other_crops, strict=True))


def test_the_same_views_for_any_workers_processes_and_starts(folder):
    """Bit for bit: 0, 1, 3 workers, 1 and 2 processes, begun in mid-epoch."""
    dataset, views = build_dataset(str(folder), "train"), build_views("multicrop", (0.5,), (0.25,), 32, 16, 3)
    whole = Batches(dataset, 8, views, seed=1)
    assert whole.steps_per_epoch == 3
    straight = [whole[step] for step in range(8)]
    assert [crop.shape for crop in straight[0][0]] == [(8, 3, s, s) for s in (32, 32, 16, 16, 16)]
    assert all(crop.dtype == torch.uint8 for crop in straight[0][0])
    for workers, start in ((0, 0), (1, 0), (3, 0), (3, 4)):
        loader = torch.utils.data.DataLoader(Batches(dataset, 8, views, seed=1), batch_size=None,
                                             sampler=range(start, 8), num_workers=workers)
        assert_same(list(loader), straight[start:])
    halves = [[Batches(dataset, 8, views, 1, rank, 2)[step] for step in range(8)] for rank in range(2)]
    joined = []
    for (a, u, labels), (b, v, other_labels) in zip(*halves, strict=True):
        crops = [torch.cat(pair) for pair in zip(a, b, strict=True)]
        joined.append((crops, torch.cat([u, v], 1), torch.cat([labels, other_labels])))
    assert_same(joined, straight)
    assert straight[3][2].equal(dataset.labels[whole.indices(3)])
    finished = views(*straight[3][:2])
    assert [x.shape for x in finished] == [(8, 3, s, s) for s in (32, 32, 16, 16, 16)]
    assert not finished[3].equal(finished[4]) and not straight[0][0][0].equal(straight[3][0][0])


def test_crops_of_files_and_of_memory_are_the_same_views(tmp_path):
    """A worker's bytes, finished, are what the device makes of the same picture in memory, up to rounding."""
    picture = photograph(0, 64, 64)
    picture.save(tmp_path / "a.png")
    files = ImageSet(None, None, None, np.array([os.fsencode(tmp_path / "a.png")] * 6))
    memory = ImageSet(files[0].expand(6, -1, -1, -1), None, None)
    views = build_views("multicrop", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 48, 24, 2)
    for dataset in (files, memory):
        dataset.made = views(*Batches(dataset, 6, views, seed=2)[0][:2])
    for mine, other in zip(files.made, memory.made, strict=True):
        assert (mine - other).abs().mean() < 0.02 and mine.shape == other.shape and mine.std() > 0.3


def test_crops_on_the_device_are_the_workers(tmp_path, monkeypatch):
    """Of upright, lying and too large pictures in one batch, for any number of each; mirrored ones, too."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    recipes = [(48, dict(scale=(0.4, 1)))] * 2 + [(24, dict(scale=(0.05, 0.4)))] * 2
    views = Views(recipes, mean, std)
    for i, size in enumerate([(64, 48), (48, 64), (60, 61), (90, 30), (40, 40), (30, 90)]):
        photograph(i, *size).save(tmp_path / f"{i}.png")
    dataset = build_dataset(str(tmp_path), "train")
    by_workers, by_device = (Batches(dataset, 6, views, seed=4, crop_on=on) for on in ("workers", "device"))
    expected = views(*by_workers[0][:2])
    for side, whole in ((640, 6), (70, 4), (20, 0)):
        monkeypatch.setattr(views_module, "DEVICE_SIDE", side)
        packed, uniforms, _ = by_device[0]
        assert len(packed["pictures"]) == whole and len(packed["crops"][0]) == 6 - whole
        assert (packed["order"].tolist() == [*range(6)]) == (side != 70)        # these are put in order again
        for mine, other in zip(views(packed, uniforms), expected, strict=True):
            levels = (mine - other).abs() * torch.tensor(std).view(-1, 1, 1) * 255
            assert mine.shape == other.shape and levels.max() <= 1.6 and levels.mean() < 0.4
            assert other.std() > 0.3
    for workers in (0, 2):                                      # as a loader gives it
        loader = torch.utils.data.DataLoader(by_device, batch_size=None, sampler=[0], num_workers=workers)
        assert same(next(iter(loader))[0], packed)


def test_what_workers_hold_is_bounded_and_a_small_shared_memory_is_said(tmp_path, monkeypatch, capfd):
    make(tmp_path, *[f"{i}.png" for i in range(4)])
    files = build_dataset(str(tmp_path), "train")
    views = build_views("multicrop", (0.5,), (0.25,), 224, 96, 12)
    batches = Batches(files, 4, views, seed=0)
    assert batches.item_bytes == 4 * (2 * 3 * 224 ** 2 + 12 * 3 * 96 ** 2 + 14 * 40 * 4)
    images, uniforms, _ = batches[0]
    assert batches.item_bytes == sum(x.nbytes for x in (*images, uniforms))
    whole = Batches(files, 4, views, seed=0, crop_on="device")
    assert whole.item_bytes == 4 * (3 * 640 ** 2 + 14 * 40 * 4)
    gray = Batches(build_dataset("fashion-mnist", "test"), 256, range(2), 0, rank=1, world_size=2)
    assert gray.item_bytes == sum(x.nbytes for x in gray[0][:2])
    room = SimpleNamespace(f_bavail=64, f_frsize=2 ** 20)
    monkeypatch.setattr(os, "statvfs", lambda path: room, raising=False)
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert loader_workers(0, batches) == dict(num_workers=0)
    assert loader_workers(8, batches) == dict(num_workers=8, prefetch_factor=2)
    assert capfd.readouterr().err == ""
    batches.batch_size, batches.mine = 256, slice(0, 256)       # 155 MiB
    assert loader_workers(3, batches) == dict(num_workers=3, prefetch_factor=2)
    assert loader_workers(12, batches) == dict(num_workers=12, prefetch_factor=1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    room.f_bavail = 2 ** 20                                     # enough
    loader_workers(12, batches)
    room.f_bavail = 8000
    loader_workers(12, batches)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("warning: /dev/shm has ") for line in lines)
    assert "64 MiB, 12 workers of each process may need 2,0" in lines[1] and "--workers 0 fits" in lines[1]
    assert "--workers 5 fits, or enlarge it (docker --shm-size 16g)" in lines[2], lines[2]


def test_images_in_memory_are_of_the_size_of_the_network_whatever_their_shape():
    for height, width in ((24, 16), (16, 24), (32, 32)):
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
        x, = eval_batches(ImageSet(images, None, None), dict(data="fake", image_size=16), "cpu")
        assert x.shape == (2, 3, 16, 16)


def test_the_middle_of_a_larger_picture_in_memory_is_taken():
    """As of files, where finetune.py names the side: 256 of 224 for CIFAR."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    config = dict(data="fake", image_size=14, mean=[0.0], std=[1.0])
    x, = eval_batches(ImageSet(images, None, None), config | dict(resize_side=16), "cpu")
    expected = F.interpolate(images / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(x, expected[:, :, 1:15, 1:15])
    whole, = eval_batches(ImageSet(images, None, None), config | dict(resize_side=0), "cpu")
    assert whole.shape == x.shape and not torch.allclose(whole, x, atol=0.05)


def test_a_set_in_memory_is_bytes_with_a_label_each():
    """Floats from 0 to 1 would all be black."""
    bytes_, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    for images in (bytes_.float(), bytes_.permute(0, 2, 3, 1), bytes_[:, 0], bytes_.numpy()):
        with pytest.raises(ValueError, match=r"images: expected a uint8 tensor \[N, 1 or 3, H, W\]"):
            ImageSet(images, labels, ["a"])
    with pytest.raises(ValueError, match="labels: expected a tensor of 4"):
        ImageSet(bytes_, labels[:3], ["a"])


def test_eval_batches(folder):
    dataset = build_dataset(str(folder), "test")
    config = dict(data=str(folder), image_size=48)
    x = torch.cat(list(eval_batches(dataset, config, "cpu", 3)))
    assert x.shape == (10, 3, 48, 48)
    crop = CentreCrops(dataset, 48)[7].double() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(x[7], ((crop - mean) / std).float(), atol=1e-5, rtol=0)        # ImageNet's
    assert torch.cat(list(eval_batches(dataset, config, "cpu", 4, workers=2))).equal(x)
    fake = build_dataset("fake", "test")
    config = dict(data="fashion-mnist", image_size=0, mean=[0.1, 0.2, 0.3])   # the network's
    x = torch.cat(list(eval_batches(fake, config, "cpu", 100)))
    assert x.shape == (256, 3, 28, 28)
    raw = torch.cat(list(eval_batches(fake, config | dict(mean=[0.0], std=[1.0], image_size=32), "cpu")))
    torch.testing.assert_close(raw, fake.images / 255)


# ---------------------------------------------------------------- sets in memory
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_one_global_batch(world_size):
    dataset = build_dataset("fake", "train")
    whole = Batches(dataset, 32, range(3), seed=5)
    shares = [Batches(dataset, 32, range(3), 5, rank, world_size) for rank in range(world_size)]
    for step in (0, 1, 15, 16, 40):
        images, u, labels = whole[step]
        parts = [share[step] for share in shares]
        assert images.shape == (32, 3, 32, 32) and u.shape == (3, 32, UNIFORMS) and u.dtype == torch.float32
        assert all(len(part[0]) == 32 // world_size for part in parts)
        assert torch.cat([part[0] for part in parts]).equal(images)
        assert torch.cat([part[1] for part in parts], dim=1).equal(u)
        assert torch.cat([part[2] for part in parts]).equal(labels)
        assert labels.equal(dataset.labels[whole.indices(step)])


def test_an_epoch_is_a_permutation_cut_into_steps():
    dataset = build_dataset("fake", "train")
    dataset.images = torch.arange(512).view(-1, 1, 1, 1)
    batches, drawn = Batches(dataset, 48, range(2), seed=0), []
    assert batches.steps_per_epoch == 10
    for epoch in range(3):
        order = torch.cat([batches[step][0] for step in range(10 * epoch, 10 * epoch + 10)]).flatten()
        assert len(order.unique()) == 480                      # none twice; the rest, 32, is dropped
        assert not order.equal(order.sort().values)
        drawn.append(order)
    assert not drawn[0].equal(drawn[1]) and not drawn[1].equal(drawn[2])
    assert not Batches(dataset, 48, range(2), seed=1)[0][0].equal(batches[0][0])
    assert not batches[0][1].equal(batches[1][1]) and not batches[0][1][0].equal(batches[0][1][1])


def test_workers_change_nothing_and_a_run_may_start_anywhere():
    batches = Batches(build_dataset("fake", "train"), 64, range(2), seed=3)
    straight = [batches[step] for step in range(20)]
    for start, workers in ((0, 0), (5, 0), (5, 2)):            # 8 steps an epoch: all cross into the next
        loaded = list(torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(start, 20),
                                                  num_workers=workers))
        assert len(loaded) == 20 - start
        for ours, theirs in zip(loaded, straight[start:], strict=True):
            assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name, sizes", [("fashion-mnist", (60_000, 10_000)), ("mnist", (4000, 1000))])
def test_an_embedded_set_is_whole(name, sizes):
    sums = [line.split() for line in (EMBEDDED / name / "SHA256SUMS").read_text().splitlines()]
    assert {file for _, file in sums} == {path.name for path in (EMBEDDED / name).glob("*.gz")}
    assert len(sums) == 4
    for digest, file in sums:
        assert hashlib.sha256((EMBEDDED / name / file).read_bytes()).hexdigest() == digest, file
    for split, number in zip(("train", "test"), sizes, strict=True):
        dataset = build_dataset(name, split)
        assert dataset.images.shape == (number, 1, 28, 28) and dataset.images.dtype == torch.uint8
        assert dataset.labels.dtype == torch.int64
        assert dataset.labels.bincount().tolist() == [number // 10] * 10
        assert len(dataset) == number and len(dataset.class_names) == 10
        if split == "train":                                   # by counts of the 256 levels: no big copy
            share = dataset.images.flatten().bincount(minlength=256).double() / dataset.images.numel()
            level = torch.arange(256).double() / 255
            mean = (share * level).sum()
            size, stated_mean, stated_std = INPUTS[name]
            assert size == 28 and stated_mean[0] == pytest.approx(mean.item(), abs=5e-5)
            assert stated_std[0] == pytest.approx((share * (level - mean) ** 2).sum().sqrt().item(), abs=5e-5)
            x = normalize(dataset.images[:100] / 255, stated_mean, stated_std)
            assert x.shape == (100, 3, 28, 28) and x.dtype == torch.float32
            pixels = x[:, 2] * stated_std[0] + stated_mean[0]
            torch.testing.assert_close(pixels, dataset.images[:100, 0] / 255)


def test_mnist_has_no_digit_twice_and_its_labels_fit():
    train, test = (build_dataset("mnist", part) for part in ("train", "test"))
    assert len(torch.cat([train.images, test.images]).flatten(1).unique(dim=0)) == 5000
    assert train.labels[:10].tolist() == test.labels[:10].tolist() == list(range(10))
    assert train.class_names == list("0123456789")
    nearest = torch.cdist(test.images.flatten(1).float(), train.images.flatten(1).float()).argmin(1)
    assert (train.labels[nearest] == test.labels).float().mean() > 0.92


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_an_embedded_set_that_is_damaged_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr("data.EMBEDDED", tmp_path)
    with pytest.raises(UserError, match=f"{name}/train-images.*cannot be read .*; restore it from the repo"):
        build_dataset(name, "train")
    (tmp_path / name).mkdir()
    for path in (EMBEDDED / name).glob("t10k*.gz"):
        (tmp_path / name / path.name).write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{name}/t10k-images.*cannot be read .*; restore it from the repo"):
        build_dataset(name, "test")


def test_fake_depends_on_the_seed_only():
    for split, number in (("train", 512), ("test", 256)):
        one = build_dataset("fake", split, seed=1)
        assert one.images.shape == (number, 3, 32, 32) and one.images.dtype == torch.uint8
        assert one.labels.unique().tolist() == list(range(10)) and len(one.class_names) == 10
        torch.manual_seed(split == "train")                    # neither torch's nor numpy's global generator
        np.random.seed(7)
        same, other = build_dataset("fake", split, seed=1), build_dataset("fake", split, seed=2)
        assert same.images.equal(one.images) and same.labels.equal(one.labels)
        assert not other.images.equal(one.images) and not other.labels.equal(one.labels)
    train, test = (build_dataset("fake", split, seed=1) for split in ("train", "test"))
    centres = torch.stack([train.images[train.labels == c].float().mean(0) for c in range(10)]).flatten(1)
    nearest = torch.cdist(test.images.float().flatten(1), centres).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.95      # both splits show the same classes


def test_an_unknown_data_set_is_named():
    with pytest.raises(UserError, match="--data: 'fashoin-mnist'.*fashion-mnist"):
        build_dataset("fashoin-mnist", "train")


# ---------------------------------------------------------------- torchvision's files
@pytest.fixture
def unchecked(monkeypatch):
    """torchvision compares the files with the sums of the whole data sets, which small ones cannot have."""
    for kind in (torchvision.datasets.CIFAR10, torchvision.datasets.STL10):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)


@pytest.mark.parametrize("name, folder, files, meta, key", [
    ("cifar10", "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
     ("batches.meta", "label_names"), "labels"),
    ("cifar100", "cifar-100-python", ["train", "test"], ("meta", "fine_label_names"), "fine_labels"),
    ("cifar100-20", "cifar-100-python", ["train", "test"], ("meta", "coarse_label_names"), "coarse_labels")])
def test_cifar(tmp_path, monkeypatch, unchecked, name, folder, files, meta, key):
    rng, root = np.random.default_rng(0), tmp_path / folder
    root.mkdir()
    pixels, labels = {}, {}
    for file in files:
        pixels[file] = rng.integers(0, 256, (20, 3072), np.uint8)
        labels[file] = rng.integers(0, 10, 20).tolist()
        others = {"fine_labels": [0] * 20, "coarse_labels": [0] * 20}             # labels of the other kind
        (root / file).write_bytes(pickle.dumps({"data": pixels[file]} | others | {key: labels[file]}))
    names = {"fine_label_names": ["wrong"] * 10, meta[1]: [f"thing {c}" for c in range(10)]}
    (root / meta[0]).write_bytes(pickle.dumps(names))
    kind = getattr(torchvision.datasets, name.removesuffix("-20").upper())
    known = "fine_label_names" if name == "cifar100-20" else meta[1]
    monkeypatch.setattr(kind, "meta", dict(filename=meta[0], key=known, md5=None))
    for split, used in (("train", files[:-1]), ("pretrain", files[:-1]), ("test", files[-1:])):
        dataset = build_dataset(name, split, 0, str(tmp_path))
        expected = np.concatenate([pixels[f] for f in used]).reshape(-1, 3, 32, 32)
        assert dataset.images.equal(torch.from_numpy(expected)) and dataset.class_names[3] == "thing 3"
        if split == "pretrain":
            assert dataset.labels is None
        else:
            assert dataset.labels.tolist() == sum((labels[f] for f in used), [])


def test_stl10(tmp_path, unchecked):
    rng, root = np.random.default_rng(0), tmp_path / "stl10_binary"
    root.mkdir()
    (root / "class_names.txt").write_text("airplane\nbird\n")
    pixels = {name: rng.integers(0, 256, (n, 3, 96, 96), np.uint8)
              for name, n in (("train", 6), ("test", 4), ("unlabeled", 9))}
    for name, values in pixels.items():
        (root / f"{name}_X.bin").write_bytes(values.transpose(0, 1, 3, 2).tobytes())          # by columns
        if name != "unlabeled":
            (root / f"{name}_y.bin").write_bytes(bytes(1 + i % 2 for i in range(len(values))))
    for split in ("train", "test"):
        dataset = build_dataset("stl10", split, 0, str(tmp_path))
        assert dataset.images.equal(torch.from_numpy(pixels[split]))
        assert dataset.labels.tolist() == [i % 2 for i in range(len(dataset))]
    dataset = build_dataset("stl10", "pretrain", 0, str(tmp_path))
    assert dataset.images.equal(torch.from_numpy(np.concatenate([pixels["train"], pixels["unlabeled"]])))
    assert dataset.labels is None                                                 # most have none


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "cifar100-20", "stl10"])
def test_what_is_not_downloaded_is_said(tmp_path, name):
    with pytest.raises(UserError, match=f"--data {name}: not whole in --data-dir .*download=True") as error:
        build_dataset(name, "train", 0, str(tmp_path))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
