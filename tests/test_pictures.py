"""Bad and odd files among people's pictures: odd ones are read; broken ones are named once and counted,
replaced in training, left out in evaluation; too many of them end the run.

    pytest tests/test_pictures.py
"""

import gc
import importlib
import io
import json
import multiprocessing
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import traceback
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, finish, run, start, wait_for, wait_until

import checkpoint
import cluster_eval
import knn
import lincls
import pretrain
import semisup
from checkpoint import UserError
from data import Batches, ImageSet, build_dataset, build_views, eval_batches, read_picture

CONFIG = dict(data="files", image_size=16)
RED, BLUE = (200, 40, 40), (40, 40, 200)


# ---------------------------------------------------------------- kinds of files
def picture(width=48, height=32):
    """Left half red, right half blue."""
    halves = Image.new("RGB", (width, height), RED)
    halves.paste(BLUE, (width // 2, 0, width, height))
    return halves


def encoded(kind, image=None, **options):
    file = io.BytesIO()
    (image or picture()).save(file, kind, **options)
    return file.getvalue()


def png(width, height, pixels, depth=8, colour=2, text=None):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    if text:
        chunks.insert(1, (b"zTXt", b"a\0\0" + zlib.compress(text)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks)


def exif(orientation, **more):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return dict(exif=tags.tobytes(), **more)


def flipped(content, marker, offset, byte=0xFF):
    place = content.index(marker) + offset
    return content[:place] + bytes([content[place] ^ byte]) + content[place + 1:]


def animated(kind, **options):
    return encoded(kind, save_all=True, append_images=[Image.new("RGB", (48, 32), "lime")] * 2, **options)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
STEPS = Image.fromarray(np.repeat(np.array([[0, 257 * 128]], np.uint16), 24, 1).repeat(32, 0))   # 16 bits
WIDE, TALL = (32, 48), (48, 32)                   # [H, W] of a sound one, and of one turned
PLAIN = (WIDE, RED, BLUE)                         # its height and width, its first and its last pixel
GRAY = (WIDE, (0, 0, 0), (128, 128, 128))
FOREIGN = "none of JPEG, PNG, BMP, GIF, PPM, WEBP, TIFF"
ODD = {                                           # read: content, (height and width, first and last pixel)
    "plain.jpg": (encoded("JPEG"), PLAIN), "progressive.jpg": (encoded("JPEG", progressive=True), PLAIN),
    "cmyk.jpg": (encoded("JPEG", picture().convert("CMYK")), PLAIN),
    "cmyk.tif": (encoded("TIFF", picture().convert("CMYK")), PLAIN),
    "lab.tif": (encoded("TIFF", picture().convert("LAB")), PLAIN),
    "gray.jpg": (encoded("JPEG", picture().convert("L")), (WIDE, (88,) * 3, (58,) * 3)),
    "two-levels.png": (encoded("PNG", picture().convert("L").point(lambda v: 255 * (v > 70)).convert("1")),
                       (WIDE, (255,) * 3, (0,) * 3)),
    "palette.png": (encoded("PNG", picture().convert("P", palette=Image.Palette.ADAPTIVE)), PLAIN),
    "palette-alpha.png": (encoded("PNG", picture().convert("P", palette=Image.Palette.ADAPTIVE),
                                  transparency=b"\x40\xff"), PLAIN),
    "alpha.png": (encoded("PNG", picture().convert("RGBA")), PLAIN),
    "invisible.png": (png(1, 1, b"\0" + bytes([*RED, 0]), colour=6), ((1, 1), RED, RED)),
    "gray-alpha.png": (png(1, 1, b"\0\x58\x20", colour=4), ((1, 1), (88,) * 3, (88,) * 3)),
    "deep-gray.png": (encoded("PNG", STEPS), GRAY), "deep-gray.tif": (encoded("TIFF", STEPS), GRAY),
    "deep-gray.pgm": (b"P5 2 1 65535\n" + struct.pack(">2H", 0, 128 * 257), ((1, 2), (0,) * 3, (128,) * 3)),
    "deep-turned.png": (encoded("PNG", STEPS, **exif(6)), (TALL, (0, 0, 0), (128, 128, 128))),
    "deep-colour.png": (png(1, 1, b"\0" + struct.pack(">3H", *(257 * v for v in RED)), 16),
                        ((1, 1), RED, RED)),
    "one-pixel.png": (png(1, 1, b"\0" + bytes(RED)), ((1, 1), RED, RED)),
    "one-row.png": (encoded("PNG", picture(20_000, 1)), ((1, 20_000), RED, BLUE)),
    "one-column.png": (encoded("PNG", picture(1, 20_000)), ((20_000, 1), BLUE, BLUE)),
    "moving.gif": (animated("GIF"), PLAIN), "moving.webp": (animated("WEBP", lossless=True), PLAIN),
    "moving.png": (animated("PNG"), PLAIN), "pages.tif": (animated("TIFF"), PLAIN),
    "several.jpg": (animated("MPO"), PLAIN),
    **{f"turned-{k}.jpg": (encoded("JPEG", **exif(k)), (TALL if 4 < k < 9 else WIDE, *ends)) for k, ends in
       {2: (BLUE, RED), 3: (BLUE, RED), 4: (RED, BLUE), 5: (RED, BLUE), 6: (RED, BLUE), 7: (BLUE, RED),
        8: (BLUE, RED), 9: (RED, BLUE)}.items()},                                 # 9: there is no such
    "bad-exif.jpg": (encoded("JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff junk"), PLAIN),
    "bad-profile.png": (encoded("PNG", icc_profile=b"junk"), PLAIN),
    "junk-behind.jpg": (encoded("JPEG") + b"junk" * 1000, PLAIN),
    "a-png-named.jpg": (encoded("PNG"), PLAIN), "a-jpeg-named.gif": (encoded("JPEG"), PLAIN),
    "large.PNG": (encoded("PNG", Image.new("L", (9_600, 9_500), 88)),
                  ((9_500, 9_600), (88,) * 3, (88,) * 3)),
    "naïve 図.jpg": (encoded("JPEG"), PLAIN), "new\nline\t.jpg": (encoded("JPEG"), PLAIN),
    "no utf-8 \udcff.jpg": (encoded("JPEG"), PLAIN), "$(touch x);'\".jpg": (encoded("JPEG"), PLAIN)}
BROKEN = {                                        # content or what makes it, part of the reason
    "zero-bytes.jpg": (b"", FOREIGN), "text.jpg": (b"<html>404 Not Found</html>\n", FOREIGN),
    "zeros.jpg": (bytes(5000), FOREIGN), "header-only.jpg": (encoded("JPEG")[:20], ""),
    "truncated.jpg": (encoded("JPEG", NOISE)[:-400], "truncated"),
    "truncated-progressive.jpg": (encoded("JPEG", NOISE, progressive=True)[:5000], "truncated"),
    **{f"truncated.{kind}": (content[:len(content) * 9 // 10], "") for kind, content in
       ((kind, encoded(kind, NOISE)) for kind in ("png", "gif", "bmp", "webp", "tiff", "ppm"))},
    "too-little-data.png": (png(100, 100, bytes(1000)), "truncated"),
    "a-flipped-bit.png": (flipped(encoded("PNG", NOISE), b"IDAT", 300), "broken"),
    "no-width.png": (png(0, 0, b""), FOREIGN),
    "bomb.png": (png(30_000, 30_000, bytes(1000)), "exceeds limit"),
    "bomb-in-text.png": (png(1, 1, b"\0" + bytes(RED), text=bytes(1 << 27)), "too large"),
    "postscript.jpg": (encoded("EPS"), FOREIGN), "jpeg2000.jpg": (encoded("JPEG2000"), FOREIGN),
    "icon.png": (encoded("ICO"), FOREIGN),
    "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", FOREIGN),
    "dangling.jpg": (lambda path: os.symlink("/no/where", path), "No such file"),
    "loop.jpg": (lambda path: os.symlink(path, path), "symbolic links"),
    "pipe.jpg": (os.mkfifo, "not a regular file"),
    "socket.jpg": (lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
                   "not a regular file"),
    "device.jpg": (lambda path: os.symlink("/dev/zero", path), "not a regular file"),
    "a-folder.jpg": (os.mkdir, "not a regular file"),
    "bad-\n\udcff-図.jpg": (b"", FOREIGN)}
assert len(ODD) >= 30 and len(BROKEN) >= 25       # whatever is added, none is lost


def write(path, content):
    try:
        content(path) if callable(content) else Path(path).write_bytes(content)
    except OSError as error:
        pytest.skip(f"cannot be made here: {error}")


def make_set(folder, odd, content, number=8):
    """ImageSet of two classes, 0 1 0 1 ...; file 3 is the odd one."""
    paths = []
    for i in range(number):
        path = folder / (odd if i == 3 else f"sound-{i}.png")
        if i == 3:
            write(path, content)
        else:
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + i, 24, 3), np.uint8)).save(path)
        paths.append(os.fsencode(path))
    return ImageSet(None, torch.arange(number) % 2, ["even", "odd"], np.array(paths))


def views():
    return build_views("multicrop", (0.5,), (0.25,), 16, 8, 1)


def inputs_of(dataset, batch_size=3):
    return torch.cat(list(eval_batches(dataset, CONFIG, "cpu", batch_size)))


@pytest.mark.filterwarnings("ignore")             # pytest undoes data.py's filter; see the run further down
@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_read(name, tmp_path, capfd):
    content, (shape, first, last) = ODD[name]
    dataset = make_set(tmp_path, name, content)
    image = dataset[3]
    assert image.dtype == torch.uint8 and image.shape == (3, *shape)
    for pixel, colour in ((image[:, 0, 0], first), (image[:, -1, -1], last)):
        assert (pixel.int() - torch.tensor(colour)).abs().max() <= 3, (pixel, colour)
    if name != "large.PNG":                       # this takes a second each time
        crops, _ = Batches(dataset, 8, views(), seed=0)[0]
        assert [crop.shape[:2] for crop in crops] == [(8, 3)] * 3
        assert inputs_of(dataset).shape == (8, 3, 16, 16)
    assert dataset.readable().paths.tolist() == dataset.paths.tolist()
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def impatient():
    """Who waits for a pipe's other end is woken."""
    def wake(*args):
        raise TimeoutError("waited too long")
    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named_replaced_and_left_out(name, tmp_path, capfd, monkeypatch, impatient):
    content, reason = BROKEN[name]
    monkeypatch.chdir(tmp_path)                   # a socket's name has but 100 bytes
    dataset = make_set(tmp_path, name, content)
    opened = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    for _ in range(3):
        with pytest.raises(UserError, match="not a readable picture") as error:
            read_picture(tmp_path / name)
    said = str(error.value)
    assert said.isprintable() and reason in said and said.startswith(f"{tmp_path}/{name[:4]}")
    del error
    assert not opened or len(os.listdir("/proc/self/fd")) == len(opened)

    others = np.random.default_rng([5, 8, 3]).permutation([1, 3, 5, 7])           # of the same class
    stand_in = next(i for i in others if i != 3)
    whole = ImageSet(None, dataset.labels, dataset.class_names, dataset.paths.copy())
    whole.paths = whole.paths.astype(object)
    whole.paths[3] = whole.paths[stand_in]
    batches, expected = (Batches(d, 8, views(), seed=5) for d in (dataset, whole))
    for step in range(3):
        ours, theirs = batches[step], expected[step]
        assert ours[1].equal(theirs[1]) and all(a.equal(b) for a, b in zip(ours[0], theirs[0], strict=True))
    assert inputs_of(dataset).equal(inputs_of(whole.subset(np.delete(np.arange(8), 3))))
    readable = dataset.readable()
    assert len(readable) == 7 and readable.labels.tolist() == [0, 1, 0, 0, 1, 0, 1]
    assert os.fsencode(tmp_path / name) not in readable.paths.tolist()
    out, err = capfd.readouterr()
    assert out == "" and err == f"warning: {said}; 1 of 8 so far, above 10 the run stops\n"


def test_nothing_is_left_open_and_memory_does_not_grow(tmp_path):
    """Fifty readings of a picture that fails when half of it is decoded."""
    resource = pytest.importorskip("resource")
    content = encoded("PNG", Image.new("RGB", (2000, 1000), RED))
    (tmp_path / "a.png").write_bytes(flipped(content, b"IDAT", len(content) // 2))

    def read():
        with pytest.raises(UserError):
            read_picture(tmp_path / "a.png")
    for _ in range(5):
        read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        read()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50 * 2000 * 1000 * 3 / 5 / (1 if sys.platform == "darwin" else 1024)


def test_a_link_back_does_not_multiply_pictures(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name / "deep").mkdir(parents=True)
        picture().save(tmp_path / name / "deep" / "a.jpg")
        os.symlink("..", tmp_path / name / "deep" / "up")
        os.symlink(tmp_path, tmp_path / name / "all")
    names = [os.path.relpath(os.fsdecode(p), tmp_path) for p in build_dataset(str(tmp_path), "train").paths]
    assert names == ["cat/all/dog/deep/a.jpg", "cat/deep/a.jpg", "dog/all/cat/deep/a.jpg", "dog/deep/a.jpg"]


# ---------------------------------------------------------------- a set with several broken ones
def sixty(folder, broken=(4, 7, 20, 33, 34, 59), labelled=True, repeat=1):
    """60 files of three classes, in the order 0 1 2 0 1 2 ..., some broken; repeat: each so often."""
    paths = []
    for i in range(60):
        paths.append(folder / f"{i}.png")
        if not paths[-1].exists():
            rng = np.random.default_rng(i)
            Image.fromarray(rng.integers(0, 256, (20 + i % 9, 24, 3), np.uint8)).save(paths[-1])
        if i in broken:
            paths[-1].write_bytes(paths[-1].read_bytes()[:60])
    paths = np.array([os.fsencode(path) for path in paths] * repeat)
    labels, names = (torch.arange(60 * repeat) % 3, list("abc")) if labelled else (None, None)
    return ImageSet(None, labels, names, paths)


def loaded(dataset, workers, steps, rank=0, world_size=1, seed=1):
    batches = Batches(dataset, 12, views(), seed, rank, world_size)
    return list(torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers))


def assert_same(ours, theirs):
    for (crops, u), (other_crops, other_u) in zip(ours, theirs, strict=True):
        assert u.equal(other_u)
        assert all(crop.equal(other) for crop, other in zip(crops, other_crops, strict=True))


@pytest.mark.parametrize("labelled", [True, False])
def test_the_same_views_for_any_workers_processes_and_starts(tmp_path, labelled):
    """Bit for bit with broken files: 0, 1, 3 workers, 1 and 2 processes, begun in mid-epoch, whatever has
    been found broken before."""
    whole = sixty(tmp_path, labelled=labelled)
    straight = loaded(whole, 0, range(15))                     # three epochs of five steps
    assert whole.broken.nonzero()[:, 0].tolist() == [4, 7, 20, 33, 34, 59]
    assert_same(loaded(whole, 0, range(15)), straight)
    for workers, first in ((1, 0), (3, 0), (3, 7)):
        assert_same(loaded(sixty(tmp_path, labelled=labelled), workers, range(first, 15)), straight[first:])
    halves = [loaded(sixty(tmp_path, labelled=labelled), 0, range(15), rank, 2) for rank in range(2)]
    joined = [([torch.cat(crops) for crops in zip(a, b, strict=True)], torch.cat([u, v], 1))
              for (a, u), (b, v) in zip(*halves, strict=True)]
    assert_same(joined, straight)
    with pytest.raises(AssertionError):
        assert_same(loaded(sixty(tmp_path, labelled=labelled), 0, range(5), seed=2), straight[:5])


def test_a_stand_in_has_the_class_of_the_broken_one_and_is_of_the_training_part(tmp_path):
    dataset = sixty(tmp_path)
    part = dataset.subset(torch.arange(3, 60))                 # what comes before is held out
    list(inputs_of(dataset))
    batches, known = Batches(part, 12, views(), 0), part.is_readable
    chosen = {i: batches.stand_in(i, lambda j: j if known[j] else None) for i in range(57) if not known[i]}
    assert len(chosen) == 6 and all(part.labels[i] == part.labels[j] for i, j in chosen.items())
    assert all(known[j] for j in chosen.values()) and len(set(chosen.values())) > 3
    rows = batches.readable_rows()                             # for features of readable ones only
    assert part.readable().labels[rows].equal(part.labels) and rows[known].tolist() == list(range(51))
    assert all(rows[i] == rows[j] for i, j in chosen.items())


@pytest.mark.parametrize("workers", [0, 3])
def test_each_is_named_once_and_counted(tmp_path, workers, capfd):
    """In three epochs of training, then in evaluations of the whole and of a part."""
    dataset = sixty(tmp_path)
    assert dataset.tally() == {}
    loaded(dataset, workers, range(15))
    assert dataset.tally() == dict(num_broken=6) and dataset.subset(slice(0, 8)).tally() == dict(num_broken=2)
    part = dataset.subset(torch.arange(0, 60, 2))
    for images, number in ((dataset, 54), (part, 27), (part.subset(slice(1, None, 2)), 14)):
        inputs = torch.cat(list(eval_batches(images, CONFIG, "cpu", 4, workers)))
        assert len(inputs) == len(images.readable()) == number
    lines = capfd.readouterr().err.splitlines()
    assert sorted(int(Path(line.split(":")[1]).stem) for line in lines) == [4, 7, 20, 33, 34, 59]
    assert [line.split("; ")[1][0] for line in lines] == list("123456") or workers
    assert all(line.endswith(" of 60 so far, above 10 the run stops") for line in lines)


def say_often(path, times):
    sys.stderr = io.TextIOWrapper(open(path, "ab", buffering=0), write_through=True)    # as Python's own is
    for _ in range(times):
        checkpoint.to_stderr("warning: a line")


def test_lines_of_several_processes_stay_lines(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=say_often, args=(tmp_path / "err", 5000)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert (tmp_path / "err").read_text() == "warning: a line\n" * 20_000


def test_a_batch_without_a_readable_picture_is_skipped(tmp_path):
    dataset = sixty(tmp_path, broken=range(12, 20))
    assert [len(x) for x in eval_batches(dataset, CONFIG, "cpu", 4)] == [4] * 13
    with pytest.raises(UserError, match="none of the 8 pictures can be read"):
        inputs_of(dataset.subset(slice(12, 20)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeat, most", [(1, 10), (16, 10), (20, 12)])           # 60, 960, 1,200 pictures
def test_above_a_share_the_run_stops(tmp_path, workers, repeat, most, capfd):
    dataset = sixty(tmp_path, (), repeat=repeat)
    (tmp_path / "broken").mkdir()

    def spoil(i):
        dataset.paths = dataset.paths.astype(object)
        dataset.paths[i] = os.fsencode(tmp_path / f"broken/{i}.png")
    for i in range(most):
        spoil(i)
    assert len(inputs_of(dataset, 100)) == len(dataset) - most
    assert capfd.readouterr().err.count("\n") == most
    spoil(40)
    message = f"{most + 1} of {len(dataset):,} pictures cannot be read, more than {most}; each is named"
    for read in (lambda: list(eval_batches(dataset, CONFIG, "cpu", 100, workers)),
                 lambda: loaded(dataset, workers, range(len(dataset) // 12))):
        with pytest.raises(UserError, match=message) as error:
            read()
        traceback.clear_frames(error.tb)          # the loader in them ends its workers now
        assert "broken/40.png: not a readable" in capfd.readouterr().err
        dataset.broken[40] = False


def test_a_class_without_a_readable_picture_ends_the_run(tmp_path):
    dataset = sixty(tmp_path, (0, 3, 6)).subset(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]))
    with pytest.raises(UserError, match="none of the 3 pictures of class 'a' can be read") as error:
        Batches(dataset, 8, views(), 0)[0]
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the stages
ODD_ONES = ("bad-exif.jpg", "palette-alpha.png", "several.jpg", "new\nline\t.jpg", "no utf-8 \udcff.jpg")
BROKEN_ONES = {"train": ("bomb.png", "truncated.jpg", "bad-\n\udcff-図.jpg"),
               "val": ("pipe.jpg", "truncated.png")}
CLASSES = ("blüte", "sk\udcfcy")
ON_FILES = ("--image-size 32 --views multicrop --num-local 1 --batch-size 8 --epochs 2 --hidden-dim 32 "
            "--num-classes 4 --workers 0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`damaged`: 40 training and 20 validation pictures of two classes, five of them broken, some odd;
    `mended`: stand-ins of their class in the place of broken training pictures, `blind`: any stand-ins;
    `without`: broken ones left out."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, number in (("train", 20), ("val", 10)):
        for c, name in enumerate(CLASSES):
            (root / "damaged" / split / name).mkdir(parents=True)
            odd = [*(ODD_ONES[c::2] if split == "train" else ()), *BROKEN_ONES[split][c::2]]
            for i in range(number):
                path = root / "damaged" / split / name / (f"{i}.png" if i >= len(odd) else odd[i])
                if i < len(odd):
                    write(path, {**BROKEN, **ODD}[odd[i]][0])
                else:
                    pixels = np.array((RED, BLUE)[c]) + rng.normal(0, 30, (40, 30 + i, 3))
                    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    for name in ("mended", "blind", "without"):
        subprocess.run(["cp", "-r", "damaged", name], check=True, cwd=root)
    dataset = build_dataset(f"{root}/damaged", "train")
    paths = [os.path.relpath(os.fsdecode(path), root / "damaged") for path in dataset.paths]
    broken = [i for i, path in enumerate(paths) if os.path.basename(path) in BROKEN]
    for i in broken:
        of_class = np.flatnonzero(dataset.labels == dataset.labels[i])
        for folder, others in (("mended", of_class), ("blind", np.arange(len(paths)))):
            order = np.random.default_rng([0, 8, i]).permutation(others)
            stand_in = next(j for j in order if j not in broken)
            (root / folder / paths[i]).write_bytes((root / "damaged" / paths[stand_in]).read_bytes())
        (root / "without" / paths[i]).unlink()
    for name in BROKEN_ONES["val"]:
        for path in root.glob(f"*/val/*/{name}"):
            if path.parts[len(root.parts)] != "damaged":
                path.unlink()
    assert len(broken) == 3 and len(list(root.rglob("*.*"))) == 60 + 58 + 58 + 55
    return root


def call(stage, command, code=0):
    """A stage in this process, as importing torch costs more than all else."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(signal, "signal", lambda *args: None)
        checkpoint.run(stage.main, stage.get_parser(), shlex.split(command))
    assert (stop.value.code or 0) == code


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def assert_same_state(a, b):
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """pretrain.py on `damaged` as users start it, and on `blind` with other workers: it reads no labels."""
    runs = tmp_path_factory.mktemp("runs")
    command = f"pretrain.py --data {folders}/damaged {ON_FILES} --workers 2 --output-dir {runs}/damaged"
    _, err = run(command)
    lines = err.splitlines()
    assert len(lines) == 5 and all(line.isprintable() for line in lines), err     # nothing of the odd ones
    for name in ("bomb.png", "truncated.jpg", "bad-\\n\\udcff-図.jpg", "pipe.jpg", "truncated.png"):
        assert sum(f"/{name}: not a readable picture (" in line for line in lines) == 1, err
    call(pretrain, f"--data {folders}/blind {ON_FILES} --output-dir {runs}/blind")
    return runs


def test_training_on_a_damaged_folder_is_training_with_the_stand_ins(trained):
    assert_same_state(trained / "damaged", trained / "blind")
    entries = [json.loads(line) for line in (trained / "damaged/log.jsonl").read_text().splitlines()]
    assert [entry["knn_monitor"] for entry in entries if "knn_monitor" in entry] == [1.0, 1.0]
    assert entries[-2]["num_broken"] == 3 and "num_broken" not in metrics_of(trained / "blind")


def test_knn_and_clusters_of_what_can_be_read(trained, folders, tmp_path, capsys):
    """The same numbers as of a folder from which the broken ones have been removed."""
    given = f"--checkpoint {trained}/damaged/checkpoint.pth --workers 0"
    read = {}
    for folder, number in (("without", 0), ("damaged", 5)):
        out = tmp_path / folder
        call(knn, f"{given} --data {folders}/{folder} --k 5 37 --output-dir {out}/knn")
        printed = capsys.readouterr().out
        assert "18 test images against 37 training images" in printed
        assert ("5 broken pictures left out" in printed) == (folder == "damaged")
        read[folder] = [metrics_of(out / "knn")]
        assert read[folder][0].pop("num_broken") == number
        call(cluster_eval, f"{given} --data {folders}/{folder} --output-dir {out}/classes --split train "
                           "--silhouette")
        found, printed = metrics_of(out / "classes"), capsys.readouterr().out
        assert found.pop("num_broken") == (3 if number else 0) and found["num_images"] == 37
        assert ("3 broken pictures left out" in printed) == (number > 0)
        read[folder] += [found, *(path.read_bytes().replace(os.fsencode(folder), b"") for path in
                                  sorted((out / "classes").iterdir()) if path.suffix in (".csv", ".png"))]
        assert found["class_names"] == ["blüte", "sk\\udcfcy"]
    assert list(map(type, read["damaged"])) == [dict, dict, *[bytes] * 4]
    for a, b in zip(read["without"], read["damaged"], strict=True):
        if isinstance(a, dict):
            assert a.pop("data") != b.pop("data")
        assert a == b
    call(cluster_eval, f"{given} --data {folders}/damaged --bn-images 40 --contact-sheets 0 "
                       f"--output-dir {tmp_path}/bn")
    assert metrics_of(tmp_path / "bn")["num_images"] == 18
    assert "batch-norm statistics are those of 37 training images" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    for name in ("knn", "mine"):                                # at the end a new empty folder goes
        command = f"knn.py {given} --data {folders}/damaged --k 38 --output-dir {tmp_path}/{name}"
        refused = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
        assert refused.returncode == 2 and "--k 38: only 37 training images can be read" in refused.stderr
        assert (tmp_path / name).exists() == (name == "mine")


@pytest.mark.parametrize("flags", ["", "--cached"])
def test_linear_classification_replaces_and_leaves_out(trained, folders, tmp_path, flags, capsys):
    given = f"--checkpoint {trained}/damaged/checkpoint.pth --batch-size 8 --epochs 3 --workers 0 {flags}"
    for folder in ("damaged", "mended"):
        call(lincls, f"{given} --lrs 1 --held-out 0 --data {folders}/{folder} "
                     f"--output-dir {tmp_path}/{folder}")
        printed = capsys.readouterr().out
        assert ("18 test images; 5 broken pictures left out:" in printed) == (folder == "damaged")
    ours, theirs = (metrics_of(tmp_path / folder) for folder in ("damaged", "mended"))
    assert (ours["num_train"], ours["num_test"], ours["num_broken"]) == (37, 18, 5)
    assert (theirs["num_train"], theirs["num_test"], theirs["num_broken"]) == (40, 18, 0)
    assert ours["results"] == theirs["results"] and ours["results"][0]["test_top1"] == 1
    assert_same_state(tmp_path / "damaged", tmp_path / "mended")
    ours, theirs = ((tmp_path / folder / "predictions.csv").read_bytes().replace(os.fsencode(folder), b"")
                    for folder in ("damaged", "mended"))
    assert ours == theirs and b"pipe" not in ours

    call(lincls, f"{given} --held-out 0.5 --data {folders}/damaged --output-dir {tmp_path}/held")
    found = metrics_of(tmp_path / "held")
    assert found["num_train"] + found["num_held_out"] == 37 and 17 <= found["num_held_out"] < 20
    assert found["num_broken"] == 5 and found["results"][0]["held_out_top1"] > 0.8


def test_fine_tuning_replaces_and_leaves_out(trained, folders, tmp_path, capsys):
    given = (f"--checkpoint {trained}/damaged/checkpoint.pth --batch-size 8 --epochs 2 --workers 0 "
             "--label-fraction 1")
    for folder in ("damaged", "mended"):
        call(semisup, f"{given} --data {folders}/{folder} --output-dir {tmp_path}/{folder}")
    printed = capsys.readouterr().out
    assert printed.count("18 test images, after") == 2 and printed.count("5 broken pictures left out") == 1
    ours, theirs = (metrics_of(tmp_path / folder) for folder in ("damaged", "mended"))
    assert (ours["num_train"], ours["num_test"], ours["num_broken"]) == (37, 18, 5)
    assert theirs["num_train"] == 40 and ours["test_top1"] == theirs["test_top1"]
    assert_same_state(tmp_path / "damaged", tmp_path / "mended")
    assert (tmp_path / "damaged/predictions.csv").read_bytes().count(b"\n0") == 0
    call(semisup, f"{given} --held-out 0.5 --data {folders}/damaged --output-dir {tmp_path}/held")
    found = metrics_of(tmp_path / "held")
    assert found["num_train"] + found["num_held_out"] == 37 and found["num_broken"] == 3    # test is not read


def test_too_many_end_a_stage_in_one_line(trained, tmp_path, capsys):
    for split in ("train", "val"):
        for c in "ab":
            (tmp_path / "data" / split / c).mkdir(parents=True)
            for i in range(12):
                content = b"" if split == "val" and i % 2 else encoded("PNG")
                (tmp_path / "data" / split / c / f"{i}.png").write_bytes(content)
    given = f"--checkpoint {trained}/damaged/checkpoint.pth --workers 0 --data {tmp_path}/data"
    for stage, flags in ((knn, "--k 5"), (cluster_eval, ""), (lincls, "--batch-size 8 --epochs 1"),
                         (semisup, "--batch-size 8 --epochs 1 --label-fraction 1")):
        call(stage, f"{given} {flags} --output-dir {tmp_path}/{stage.__name__}", code=2)
        *named, last = capsys.readouterr().err.splitlines()
        assert len(named) == 11 and "error: --data: 11 of 24 pictures" in last
        assert not (tmp_path / stage.__name__ / "metrics.json").exists()


# ---------------------------------------------------------------- killed
def children_of(pid):
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    return [int(a) for a, b in map(str.split, listing.stdout.splitlines()) if int(b) == pid]


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow)])
def test_a_killed_worker_ends_the_run_in_one_line(folders, tmp_path, signum):
    """As the kernel does where memory is short, or a decoder that crashes."""
    log = tmp_path / "run/log.jsonl"
    process = start(f"pretrain.py --data {folders}/without {ON_FILES} --workers 2 --epochs 9999 "
                    f"--print-every 1 --save-every 99999 --knn-every 0 --output-dir {tmp_path}/run")
    assert wait_until(lambda: log.exists() and log.read_text().count("\n") >= 4, process)
    os.kill(children_of(process.pid)[0], signum)
    _, err = finish(process, 1)
    *lines, last = err.splitlines()
    told = signal.strsignal(signum), "exited unexpectedly"      # of a crash PyTorch may hear either way
    assert "worker" in last and any(word in last for word in told), err
    assert len(lines) <= (signum == signal.SIGSEGV), err       # of this PyTorch itself says that it happened


@pytest.mark.slow
def test_killed_and_resumed_on_a_damaged_folder(folders, trained, tmp_path):
    command = f"pretrain.py --data {folders}/damaged {ON_FILES} --save-every 1 --output-dir {tmp_path}/killed"
    process = start(f"{command} --workers 1")
    wait_for(tmp_path / "killed/checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    step = torch.load(tmp_path / "killed/checkpoint.pth", weights_only=True)["step"]
    assert 2 <= step < 10
    _, err = run(f"{command} --workers 3")
    assert "Traceback" not in err
    assert_same_state(tmp_path / "killed", trained / "damaged")


ON_NETWORK = "--checkpoint {network} --batch-size 8 --epochs 2 --workers 0"
KILLED = {
    "pretrain": f"{ON_FILES} --knn-every 0",
    "selflabel": ON_NETWORK,
    "distill": ON_NETWORK.replace("checkpoint", "teacher"),
    "lincls": f"{ON_NETWORK} --lrs 1 --held-out 0",
    "semisup": f"{ON_NETWORK} --label-fraction 1",
}


@pytest.mark.parametrize("stage", ["lincls", *(pytest.param(stage, marks=pytest.mark.slow)
                                               for stage in KILLED if stage != "lincls")])
def test_what_was_broken_stays_out_when_a_run_goes_on(stage, trained, folders, tmp_path, monkeypatch, capsys):
    """Interrupted after an epoch, its broken pictures mended, resumed: as the run that was not disturbed."""
    subprocess.run(["cp", "-r", folders / "damaged", tmp_path / "data"], check=True)
    module = importlib.import_module(stage)
    flags = (f"{KILLED[stage].format(network=trained / 'damaged/checkpoint.pth')} --data {tmp_path}/data "
             f"--print-every 1 --save-every 5 --output-dir {tmp_path}")

    def save_and_end(path, state):
        checkpoint.save_checkpoint(path, state)
        raise KeyboardInterrupt
    call(module, f"{flags}/straight")
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", save_and_end)
        call(module, f"{flags}/killed", code=130)
    gc.collect()                                                # the lock, which a process takes along
    broken = checkpoint.load_checkpoint(tmp_path / "killed/checkpoint.pth")["pictures"]["broken"]
    paths = [os.fsdecode(build_dataset(f"{tmp_path}/data", "train").paths[i]) for i in broken]
    assert {os.path.basename(path) for path in paths} == set(BROKEN_ONES["train"])
    Path(paths[0]).rename(f"{paths[0]}.png")
    capsys.readouterr()
    call(module, f"{flags}/killed", code=2)
    assert "pictures were added, removed or renamed since the run was saved" in capsys.readouterr().err
    gc.collect()
    Path(f"{paths[0]}.png").rename(paths[0])
    for path in paths:
        Path(path).write_bytes(encoded("PNG"))
    call(module, f"{flags}/killed")
    err = capsys.readouterr().err
    assert not any(os.path.basename(path) in err for path in paths)
    assert_same_state(tmp_path / "straight", tmp_path / "killed")
    a, b = (metrics_of(tmp_path / name) for name in ("straight", "killed"))
    assert all(a.get(key) == b.get(key) for key in ("num_train", "num_broken", "results", "test_top1"))
    entries = map(json.loads, (tmp_path / "killed/log.jsonl").read_text().splitlines())
    assert {entry["num_broken"] for entry in entries if entry.get("step", 0) > 5 and "loss" in entry} == {3}


@pytest.mark.slow
def test_two_processes_on_a_damaged_folder(folders, trained, tmp_path):
    """Each finds the broken ones of its share; together they train and evaluate as on the mended folder."""
    given = f"--checkpoint {trained}/damaged/checkpoint.pth --batch-size 8 --epochs 2 --workers 1"
    stages = ((f"pretrain.py {ON_FILES}", "pretrain"), (f"semisup.py {given} --label-fraction 1", "semisup"),
              (f"lincls.py {given} --lrs 1 --held-out 0 --cached", "lincls"))
    for command, name in stages:
        mended = "blind" if name == "pretrain" else "mended"
        for folder in ("damaged", mended):
            run(f"{command} --data {folders}/{folder} --output-dir {tmp_path}/{name}-{folder}", ranks=2)
        ours, theirs = (tmp_path / f"{name}-{folder}" for folder in ("damaged", mended))
        assert_same_state(ours, theirs)
        if name != "pretrain":
            found, other = metrics_of(ours), metrics_of(theirs)
            assert (found["num_train"], found["num_test"], found["num_broken"]) == (37, 18, 5)
            assert all(found.get(key) == other.get(key) for key in ("results", "test_top1", "test_top5"))
            ours, theirs = ((path / "predictions.csv").read_bytes().replace(os.fsencode(folder), b"")
                            for path, folder in ((ours, "damaged"), (theirs, mended)))
            assert ours == theirs
