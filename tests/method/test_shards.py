"""Shards: the same batches as from files, damaged and hostile tars in one line, and a run that is killed.

    pytest tests/method/test_shards.py
"""

import gzip
import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from processes import assert_same_run, metrics_of, run, same, start, wait_for, weights

import shards
from checkpoint import UserError
from data import Batches, build_dataset, labelled
from folders import read_picture
from shards import expand
from views import build_views

VIEWS = build_views("multicrop", (0.5,), (0.25,), 16, 8, num_local=1)


def add(tar, name, content, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def picture(i, kind="PNG"):
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def shard(path, numbers, classes="ab", form=tarfile.PAX_FORMAT):
    """A tar of pictures with these numbers, as `c/0007.png`, each with its class."""
    with tarfile.open(path, "w", format=form) as tar:
        for i in numbers:
            c = classes[i % 2] if classes else ""
            add(tar, f"{c}/{i:04d}.png", picture(i))
            if classes:
                add(tar, f"{c}/{i:04d}.cls", f"{i % 2}\n".encode())
            add(tar, f"{c}/{i:04d}.json", b"{}")
    return path


@pytest.fixture
def three(tmp_path):
    """A folder of shards with ten pictures each, sorted as the files in the folder beside it are."""
    for part, count in (("train", 20), ("val", 10)):
        for i in range(count):
            file = tmp_path / "files" / part / "ab"[i % 2] / f"{i:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(i))
    (tmp_path / "packed").mkdir()
    shard(tmp_path / "packed/train-00.tar", range(0, 20, 2))
    shard(tmp_path / "packed/train-01.tar", range(1, 20, 2))
    shard(tmp_path / "packed/val-00.tar", [*range(0, 10, 2), *range(1, 10, 2)])
    return tmp_path


def names(dataset, folder):
    return [os.path.relpath(os.fsdecode(path), folder) for path in dataset.paths]


# ---------------------------------------------------------------- which shards
@pytest.mark.parametrize("pattern, expected", [
    ("a.tar", ["a.tar"]), ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
    ("a-{08..10}.tar", ["a-08.tar", "a-09.tar", "a-10.tar"]),
    ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"])])
def test_patterns(pattern, expected):
    assert expand(pattern) == expected


@pytest.mark.parametrize("pattern", ["a-{3..1}.tar", "a-{0..999999999999}.tar", "a-{}.tar", "a-{x}.tar",
                                     "{0..999}{0..999}.tar", "a-{0..1}.txt"])
def test_a_pattern_that_names_no_shards_is_one_line(pattern):
    with pytest.raises(UserError, match="names no shards; it needs a form like 'train-{000..999}.tar'"):
        expand(pattern)


def test_every_way_to_name_them(three):
    folder = three / "packed"
    train = [f"train-0{s}.tar/{'ab'[s]}/{i:04d}.png" for s in range(2) for i in range(s, 20, 2)]
    for data in (folder / "train-{00..01}.tar", folder):
        dataset = build_dataset(str(data), "train")
        assert names(dataset, folder) == train
        assert dataset.labels.tolist() == [0] * 10 + [1] * 10 and dataset.class_names == ["0", "1"]
    test = build_dataset(str(folder), "test")
    assert test.part == "validation images" and len(test) == 10
    (three / "lists").mkdir()
    (three / "lists/train.txt").write_text("../packed/train-{00..01}.tar\n\n")
    (three / "lists/val.txt").write_text(f"{folder}/val-00.tar\n")
    for split, number in (("train", 20), ("pretrain", 20), ("test", 10)):
        assert len(build_dataset(str(three / "lists"), split)) == number
    for name in ("train-00", "train-01", "val-00"):             # folders train and val
        path = three / "parts" / name.split("-")[0] / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / f"{name}.tar", path)
    assert len(build_dataset(str(three / "parts"), "train")) == 20
    assert build_dataset(str(three / "parts"), "test").labels.tolist() == [0] * 5 + [1] * 5
    divided = [build_dataset(str(folder / "train-{00..01}.tar"), split, val_share=0.3)
               for split in ("train", "test")]
    assert sorted(sum((names(part, folder) for part in divided), [])) == sorted(train)
    assert all(map(len, divided))


@pytest.mark.parametrize("train, val", [("imagenet1k-train-0000", "imagenet1k-validation-00"),
                                        ("imagenet-train-000000", "imagenet-val-000000"),
                                        ("my_train_0", "my_test_0"), ("contest-train-0", "latest-val-0")])
def test_published_names_of_shards_keep_their_parts(train, val, three, tmp_path):
    (tmp_path / "flat").mkdir()
    shard(tmp_path / f"flat/{train}.tar", range(10))
    shard(tmp_path / f"flat/{val}.tar", range(10, 20))
    parts = [build_dataset(str(tmp_path / "flat"), split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [10, 10] and parts[0].part == "training images"
    assert parts[1].part == ("test images" if "_test" in val else "validation images")
    (three / "files/val").rename(three / "files/validation")
    assert len(build_dataset(str(three / "files"), "test")) == 10


def test_classes_are_names_or_numbers_and_all_pictures_have_one_or_none(tmp_path):
    path = tmp_path / "a.tar"
    for classes, labels, known in (((b"10", b" 2 "), [10, 2], 11), ((b"cat", b"ant"), [1, 0], 2)):
        with tarfile.open(path, "w") as tar:
            for i, c in enumerate(classes):
                add(tar, f"{i}.cls", c)
                add(tar, f"{i}.JPEG", picture(i, "JPEG"))
        dataset = build_dataset(str(path), "train")
        assert dataset.labels.tolist() == labels and len(dataset.class_names) == known
    assert build_dataset(str(shard(path, [1, 2], classes="")), "train").labels is None
    with tarfile.open(path, "w") as tar:
        add(tar, "1.png", picture(1)), add(tar, "1.cls", b"1"), add(tar, "2.png", picture(2))
    with pytest.raises(UserError, match="2.png: has no .cls member, unlike others; give all"):
        build_dataset(str(path), "train")


# ---------------------------------------------------------------- the same as files
def test_batches_are_those_of_the_folder(three):
    for split in ("train", "test"):
        ours, theirs = (build_dataset(str(three / name), split) for name in ("packed", "files"))
        assert ours.labels.equal(theirs.labels) and len(ours) == len(theirs)
        for workers in (0, 2):
            ours_then_theirs = [torch.utils.data.DataLoader(
                Batches(dataset, 4, VIEWS, seed=1), batch_size=None, num_workers=workers, sampler=range(1, 4))
                for dataset in (ours, theirs)]
            for a, b in zip(*ours_then_theirs, strict=True):
                assert same(a, b)


def test_pictures_in_both_parts_are_refused(three):
    os.remove(three / "packed/val-00.tar")
    os.symlink("train-00.tar", three / "packed/val-00.tar")
    args = type("Args", (), dict(data=str(three / "packed"), data_dir="datasets", checkpoint=None))
    with pytest.raises(UserError, match="10 of the 10 validation images are training images, too"):
        labelled(args, {})


OF_THE_MACHINE = ("images_per_s", "waiting", "memory_mib", "seconds")
TRAIN = ("pretrain.py --image-size 16 --batch-size 4 --epochs 3 --hidden-dim 16 --restarts 1 --save-every 1 "
         "--print-every 1")


def test_a_killed_run_on_shards_ends_bit_equal(three, here):
    command = f"{TRAIN} --data {three}/packed"
    process = start(f"{command} --workers 2 --output-dir {three}/killed")
    wait_for(three / "killed/checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    step = torch.load(three / "killed/checkpoint.pth", weights_only=True)["step"]
    assert 2 <= step < 15
    here(f"{command} --workers 0 --output-dir {three}/killed")
    here(f"{TRAIN} --data {three}/files --workers 0 --output-dir {three}/whole")
    assert same(weights(three / "killed"), weights(three / "whole"))


EVERY_STAGE = {
    "cluster_eval": "--checkpoint {network}",
    "lincls": "--checkpoint {network} --batch-size 4 --epochs 1 --lrs 1",
    "knn": "--checkpoint {network} --k 3", "embed": "--checkpoint {network}",
    "barlow": "--image-size 16 --hidden-dim 16 --batch-size 4 --epochs 1",
    "selflabel": "--checkpoint {network} --batch-size 4 --epochs 1",
    "distill": "--teacher {network} --batch-size 4 --epochs 1 --queue-size 8",
    "semisup": "--checkpoint {network} --batch-size 4 --epochs 1 --label-fraction 0.5",
    "finetune": "--checkpoint {network} --batch-size 4 --steps 4"}


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_every_stage_takes_shards_as_it_takes_the_folder(stage, three, network, here):
    found = []
    for name in ("packed", "files"):
        flags = EVERY_STAGE[stage].format(network=network)
        here(f"{stage}.py {flags} --data {three}/{name} --workers 0 --output-dir {three}/out-{name}")
        found.append({key: value for key, value in metrics_of(three / f"out-{name}").items()
                      if isinstance(value, (int, float)) and key not in OF_THE_MACHINE})
    assert found[0] == found[1] and found[0]


def test_how_pictures_are_read_stands_in_the_configuration(three, here):
    command = (f"{TRAIN} --epochs 1 --knn-every 0 --workers 0 --data {three}/packed --output-dir {three}/run "
               "--crop-on device")
    here(command)
    _, err = here(f"{command} --crop-on workers --decoder torchvision", code=2)
    assert "crop_on was device, is workers; decoder was None, is torchvision" in err
    here(f"{command} --decoder pillow --output-dir {three}/other")
    assert same(weights(three / "run"), weights(three / "other"))


@pytest.mark.slow
def test_a_killed_run_with_crops_on_the_device_ends_bit_equal(three):
    command = f"{TRAIN} --data {three}/packed --crop-on device --num-local 2 --views multicrop"
    process = start(f"{command} --workers 2 --output-dir {three}/killed")
    wait_for(three / "killed/checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    run(f"{command} --workers 1 --output-dir {three}/killed")
    run(f"{command} --workers 0 --output-dir {three}/whole")
    assert same(weights(three / "killed"), weights(three / "whole"))


@pytest.mark.slow
def test_two_processes_on_shards(three):
    for workers, name in ((0, "a"), (2, "b")):
        run(f"{TRAIN} --data {three}/packed --workers {workers} --output-dir {three}/{name}", ranks=2)
    assert_same_run(three / "a", three / "b")


def test_a_run_does_not_resume_with_other_shards(three, here):
    command = f"{TRAIN} --epochs 1 --knn-every 0 --workers 0 --data {three}/packed --output-dir {three}/run"
    here(command)
    shard(three / "packed/train-01.tar", range(1, 22, 2))
    _, err = here(command, code=2)
    assert "pictures was 20 files, CRC-32 " in err and ", is 21 files" in err and err.count("\n") == 1
    shard(three / "packed/train-01.tar", range(1, 20, 2))
    assert "this run is finished" in here(command)[0]


# ---------------------------------------------------------------- the index
def test_the_index_is_kept_and_made_anew_when_the_tar_changed(three, monkeypatch):
    path = str(three / "packed/train-00.tar")
    scans = []
    monkeypatch.setattr(shards, "_scan", lambda *args, scan=shards._scan: scans.append(1) or scan(*args))
    assert len(build_dataset(path, "train")) == 10 and len(scans) == 1
    index = build_dataset(path, "train")
    assert len(scans) == 1 and os.path.exists(f"{path}.index") and index[9].shape == (3, 38, 30)
    os.utime(path, ns=(0, 1))                                   # another time
    build_dataset(path, "train")
    assert len(scans) == 2
    shard(path, range(1, 8))                                    # another size
    os.utime(path, ns=(0, 1))
    assert len(build_dataset(path, "train")) == 7 and len(scans) == 3
    os.replace(shard(f"{path}.new", range(3, 10)), path)        # another file
    assert build_dataset(path, "train")[0].shape == (3, 23, 30) and len(scans) == 4
    content = bytearray((three / "packed/train-00.tar.index").read_bytes())
    content[len(content) // 2] ^= 0xFF                          # damaged
    for bad in (bytes(content), content[:100], b""):
        (three / "packed/train-00.tar.index").write_bytes(bad)
        assert len(build_dataset(path, "train")) == 7
    assert len(scans) == 7
    assert sorted(file.name for file in (three / "packed").iterdir()) == [
        "train-00.tar", "train-00.tar.index", "train-01.tar", "val-00.tar"]      # nothing is left over


def test_without_a_place_for_the_index_it_is_in_memory(three, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "replace", refuse)                  # root may write everywhere
    dataset = build_dataset(str(three / "packed"), "train")
    assert len(dataset) == 20 and dataset[19] is not None
    assert sorted(file.name for file in (three / "packed").iterdir()) == [
        "train-00.tar", "train-01.tar", "val-00.tar"]


def test_a_picture_is_read_by_its_path_alone(three, monkeypatch):
    """As report.py does, later and in another process; also where a folder is called like a tar."""
    path = f"{three}/packed/train-00.tar/a/0004.png"
    expected = read_picture(f"{three}/files/train/a/0004.png")
    shards.INDICES.clear()
    assert read_picture(path).equal(expected)
    with monkeypatch.context() as patch:
        patch.delattr(os, "pread", raising=False)               # Windows
        assert read_picture(path).equal(expected)
    for name in ("b/0004.png", "a/00.png", "z", "a/0004.png.and.more"):
        with pytest.raises(UserError, match="not a readable picture .no such member"):
            read_picture(f"{three}/packed/train-00.tar/{name}")
    (three / "odd.tar").mkdir()
    os.rename(three / "packed/train-00.tar", three / "odd.tar/in.tar")
    assert read_picture(f"{three}/odd.tar/in.tar/a/0004.png").equal(expected)
    (three / "odd.tar/a.png").write_bytes(picture(4))
    assert read_picture(f"{three}/odd.tar/a.png").equal(expected)


# ---------------------------------------------------------------- odd and damaged tars
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names(form, tmp_path):
    long = "d" * 90 + "/" + "é" * 40 if form == tarfile.USTAR_FORMAT else "d/" * 90 + "é" * 90
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for i, name in enumerate((f"{long}.png", "./1.tar/x y.PNG", "._hidden.png", "2.seg.png", "3.PNG")):
            add(tar, name, picture(i))
    dataset = build_dataset(str(tmp_path / "a.tar"), "train")
    found = [os.fsdecode(path).removeprefix(f"{tmp_path}/a.tar/") for path in dataset.paths]
    assert found == [f"{long}.png", "1.tar/x y.PNG", "3.PNG"]
    assert [dataset[i].shape[1] for i in range(3)] == [20, 21, 24]


def test_one_name_in_two_shards_is_two_pictures(tmp_path):
    for i in range(2):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            add(tar, "0.png", picture(i))
    dataset = build_dataset(str(tmp_path / "{0..1}.tar"), "train")
    assert [dataset[i].shape[1] for i in range(2)] == [20, 21]
    (tmp_path / "twice.txt").write_text("0.tar\n./0.tar\n")
    with pytest.raises(UserError, match="0.tar: is named 2 times; name each shard once"):
        build_dataset(str(tmp_path / "twice.txt"), "train")


def of(*members):
    """The bytes of a tar of (name, content, fields)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content, fields in members:
            add(tar, name, content, **fields)
    return file.getvalue()


def with_size(content, size):
    """The first member says that it has another size: 12 bytes, in a valid header."""
    content = bytearray(content)
    content[124:136] = size
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


PNG, LINK = picture(0), dict(linkname="a.png")
FIRST = 512 + -(-len(PNG) // 512) * 512          # bytes of the first member
GOOD = of(("a.png", picture(0), {}), ("b.png", picture(1), {}))
DAMAGED = {
    "empty": (b"", "empty file"),
    "no tar": (b"hello" * 500, "invalid|truncated|bad"),
    "compressed": (gzip.compress(GOOD), "."),
    "cut in a member": (GOOD[:2500], "unexpected end|reaches beyond|cut short"),
    "cut in a header": (GOOD[:FIRST + 100], "cut short"),
    "cut between members": (GOOD[:FIRST], "cut short"),
    "a damaged header": (GOOD[:FIRST] + b"x" * 512 + GOOD[-4096:], "is damaged"),
    "beyond the end": (with_size(of(("a.png", PNG, {})), b"00077777777\0"), "reaches beyond the end"),
    "far beyond": (with_size(of(("a.png", PNG, {})), b"\x80" + b"\0" * 3 + b"\x7f" * 8), "reaches beyond"),
    "before the start": (with_size(of(("a.png", PNG, {})), b"\xff" * 10 + b"\xf0\x00"),
                         "reaches beyond|invalid"),
    "hard link": (of(("a.png", PNG, {}), ("b.png", b"", LINK | dict(type=tarfile.LNKTYPE))), "no plain file"),
    "symbolic link": (of(("a.png", b"", LINK | dict(type=tarfile.SYMTYPE))), "plain file; pack"),
    "device": (of(("a.png", b"", dict(type=tarfile.CHRTYPE))), "no plain file"),
    "a name twice": (of(("a.png", PNG, {}), ("a.png", PNG, {})), "second picture or class of 'a'"),
    "two pictures of a sample": (of(("a.png", PNG, {}), ("a.jpg", PNG, {})), "second picture"),
    "a long class": (of(("a.png", PNG, {}), ("a.cls", b"1" * 300, {})), "not one line with a class"),
    "an empty class": (of(("a.png", PNG, {}), ("a.cls", b" \n", {})), "not one line with a class"),
    "no pictures": (of(("a.txt", b"hello", {}), ("b.cls", b"1", {})), "holds no pictures"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tar_is_one_line(name, tmp_path):
    content, message = DAMAGED[name]
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"--data .*bad.tar: .*({message})") as caught:
        build_dataset(str(tmp_path / "bad.tar"), "train")
    assert str(caught.value).isprintable() and ("; " in str(caught.value) or "?" in str(caught.value))
    assert os.listdir(tmp_path) == ["bad.tar"]                  # no index of it


def test_a_missing_shard_is_named(three):
    with pytest.raises(UserError, match="train-02.tar: cannot be read .No such file.*; correct the pattern"):
        build_dataset(f"{three}/packed/train-{{00..02}}.tar", "train")


def test_a_broken_picture_and_a_shard_cut_while_the_run_reads_it(tmp_path, capfd):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, content in enumerate((picture(0), b"", b"no picture", picture(3))):
            add(tar, f"{i}.png", content)
    dataset = build_dataset(str(tmp_path / "a.tar"), "train")
    os.truncate(tmp_path / "a.tar", 6000)
    assert [dataset[i] is None for i in range(4)] == [False, True, True, True]
    err = capfd.readouterr().err
    assert err.count("\n") == 3 and "a.tar/3.png: not a readable picture (the shard is cut short)" in err
