"""Proves that odd pictures are read, and broken ones named once, counted, and replaced or left out.

    pytest tests/faults/test_pictures.py
"""

import importlib.util
import io
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import traceback
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from processes import finish, log_lines, metrics_of, run, same, start, wait_for, wait_until, weights

import checkpoint
import folders as picture_files
from checkpoint import UserError
from data import Batches, ImageSet, build_dataset, eval_batches, read_picture
from views import build_views

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


def cut_short(content):
    return content[:len(content) * 9 // 10]


def animated(kind, **options):
    return encoded(kind, save_all=True, append_images=[Image.new("RGB", (48, 32), "lime")] * 2, **options)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))


def levels(two, dtype):
    """A left and a right half of these two levels."""
    return Image.fromarray(np.repeat(np.array([two], dtype), 24, 1).repeat(32, 0))


STEPS = levels([0, 257 * 128], np.uint16)         # 16 bits
WHITE = (255, 255, 255)
WIDE, TALL = (32, 48), (48, 32)                   # [H, W] of a sound one, and of one turned
PLAIN = (WIDE, RED, BLUE)                         # its height and width, its first and its last pixel
GRAY = (WIDE, (0, 0, 0), (128, 128, 128))
FOREIGN = "none of JPEG, PNG, BMP, GIF, PPM, WEBP, TIFF"      # and AVIF where Pillow reads it
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
                                  transparency=b"\x00\xff"), (WIDE, WHITE, BLUE)),
    "alpha.png": (encoded("PNG", picture().convert("RGBA")), PLAIN),
    "invisible.png": (png(1, 1, b"\0" + bytes([*RED, 0]), colour=6), ((1, 1), WHITE, WHITE)),
    "half.png": (png(1, 1, b"\0" + bytes([*RED, 128]), colour=6), ((1, 1), (227, 147, 147), (227, 147, 147))),
    "gray-alpha.png": (png(1, 1, b"\0\x58\x20", colour=4), ((1, 1), (234,) * 3, (234,) * 3)),
    "one-colour-clear.png": (encoded("PNG", picture(), transparency=RED), (WIDE, WHITE, BLUE)),
    "clear.gif": (encoded("GIF", picture().convert("P", palette=Image.Palette.ADAPTIVE), transparency=0),
                  (WIDE, WHITE, BLUE)),
    "deep-gray.png": (encoded("PNG", STEPS), GRAY), "deep-gray.tif": (encoded("TIFF", STEPS), GRAY),
    "deep-gray.pgm": (b"P5 2 1 65535\n" + struct.pack(">2H", 0, 128 * 257), ((1, 2), (0,) * 3, (128,) * 3)),
    "deep-turned.png": (encoded("PNG", STEPS, **exif(6)), (TALL, (0, 0, 0), (128, 128, 128))),
    "float.tif": (encoded("TIFF", levels([0, 0.5], np.float32)), GRAY),
    "float-255.tif": (encoded("TIFF", levels([0, 128], np.float32)), GRAY),
    "float-65535.tif": (encoded("TIFF", levels([0, 128 * 257], np.float32)), GRAY),
    "integers.tif": (encoded("TIFF", levels([0, 128 * 257], np.int32)), GRAY),
    "12-bits.png": (encoded("PNG", levels([4095, 2056], np.uint16)), (WIDE, WHITE, (128,) * 3)),
    "12-bits.tif": (encoded("TIFF", levels([4095, 2056], np.uint16)), (WIDE, WHITE, (128,) * 3)),
    "8-bits-in-16.png": (encoded("PNG", levels([0, 128], np.uint16)), GRAY),
    "black.png": (encoded("PNG", levels([0, 0], np.uint16)), (WIDE, (0,) * 3, (0,) * 3)),
    "12-bit-colour.png": (png(1, 1, b"\0" + struct.pack(">3H", 0xFFF, 0x800, 0), 16),
                          ((1, 1), (255, 136, 0), (255, 136, 0))),
    "deep-colour.png": (png(1, 1, b"\0" + struct.pack(">3H", *(257 * v for v in RED)), 16),
                        ((1, 1), RED, RED)),
    "one-pixel.png": (png(1, 1, b"\0" + bytes(RED)), ((1, 1), RED, RED)),
    "one-row.png": (encoded("PNG", picture(20_000, 1)), ((1, 20_000), RED, BLUE)),
    "one-column.png": (encoded("PNG", picture(1, 20_000)), ((20_000, 1), BLUE, BLUE)),
    "moving.gif": (animated("GIF"), PLAIN), "moving.webp": (animated("WEBP", lossless=True), PLAIN),
    "moving.png": (animated("PNG"), PLAIN), "pages.tif": (animated("TIFF"), PLAIN),
    "several.jpg": (animated("MPO"), PLAIN),
    **{f"turned-{k}.jpg": (encoded("JPEG", **exif(k)), (WIDE, *ends)) for k, ends in
       {2: (BLUE, RED), 3: (BLUE, RED), 4: (RED, BLUE), 9: (RED, BLUE)}.items()},      # 9 does not exist
    **{f"turned-{k}.jpg": (encoded("JPEG", **exif(k)), (TALL, *ends)) for k, ends in
       {5: (RED, BLUE), 6: (RED, BLUE), 7: (BLUE, RED), 8: (BLUE, RED)}.items()},
    # a tag of another type, which Pillow cannot write anew; and a header that is none
    "turned-6-text.jpg": (encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\2\0\x12\1\3\0\1\0\0\0\6\0\0\0"
                                  b"\x28\1\2\0\4\0\0\0abc\0\0\0\0\0"), (TALL, RED, BLUE)),
    "no-tiff-in-exif.jpg": (encoded("JPEG", exif=b"Exif\0\0junk", dpi=(72, 72)), PLAIN),
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
    **{f"truncated.{kind}": (cut_short(encoded(kind, NOISE)), "")
       for kind in ("png", "gif", "bmp", "webp", "tiff", "ppm")},
    "too-little-data.png": (png(100, 100, bytes(1000)), "truncated"),
    "a-flipped-bit.png": (flipped(encoded("PNG", NOISE), b"IDAT", 300), "broken"),
    "no-width.png": (png(0, 0, b""), FOREIGN),
    "bomb.png": (png(30_000, 30_000, bytes(1000)), "exceeds limit"),
    "float-nan.tif": (encoded("TIFF", levels([0, np.nan], np.float32)), "levels from nan"),
    "float-negative.tif": (encoded("TIFF", levels([-1, 1], np.float32)), "levels from -1 to 1; scale them"),
    "integers-too-large.tif": (encoded("TIFF", levels([0, 70_000], np.int32)), "levels from 0 to 70000"),
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


def inputs_of(dataset, batch_size=3, workers=0):
    return torch.cat(list(eval_batches(dataset, CONFIG, "cpu", batch_size, workers)))


def loaded(dataset, workers, steps, rank=0, world_size=1, seed=1, batch_size=12):
    batches = Batches(dataset, batch_size, views(), seed, rank, world_size)
    return list(torch.utils.data.DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers))


def assert_same(ours, theirs):
    for (crops, u, labels), (other_crops, other_u, other_labels) in zip(ours, theirs, strict=True):
        assert u.equal(other_u) and same(labels, other_labels)
        assert all(crop.equal(other) for crop, other in zip(crops, other_crops, strict=True))


def stand_in(index, broken, seed, number):
    """What the documentation promises: the first readable file of an order drawn from (seed, index)."""
    order = np.random.default_rng([seed, 8, index]).permutation(number)
    return next(int(other) for other in order if other not in broken)


def replaced(dataset, broken, seed):
    """The same set with stand-ins, and their labels, instead of its broken files."""
    chosen = np.arange(len(dataset))
    for index in broken:
        chosen[index] = stand_in(index, broken, seed, len(dataset))
    labels = None if dataset.labels is None else dataset.labels[chosen]
    return ImageSet(None, labels, dataset.class_names, dataset.paths[chosen])


@pytest.mark.filterwarnings("ignore")             # pytest undoes folders.py's filter; see below
@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_read(name, tmp_path, capfd):
    content, (shape, first, last) = ODD[name]
    dataset = make_set(tmp_path, name, content)
    image = dataset[3]
    assert image.dtype == torch.uint8 and image.shape == (3, *shape)
    for pixel, colour in ((image[:, 0, 0], first), (image[:, -1, -1], last)):
        assert (pixel.int() - torch.tensor(colour)).abs().max() <= 3, (pixel, colour)
    if name != "large.PNG":                       # this takes a second each time
        crops, _, _ = Batches(dataset, 8, views(), seed=0)[0]
        assert [crop.shape[:2] for crop in crops] == [(8, 3)] * 3
        assert inputs_of(dataset).shape == (8, 3, 16, 16)
    assert dataset.readable().paths.tolist() == dataset.paths.tolist()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind, suffix", [("AVIF", ".avif"), ("HEIF", ".heic"), ("HEIF", ".HEIF")])
def test_pictures_of_phones_are_read(kind, suffix, tmp_path):
    heif = suffix.lower() in picture_files.SUFFIXES                 # if pillow-heif is installed
    if not (heif if kind == "HEIF" else features.check("avif")):
        pytest.skip(picture_files.REMEDIES[suffix.lower()])
    picture().save(tmp_path / f"a{suffix}", kind, quality=95)
    (tmp_path / "plain.jpg").write_bytes(encoded("JPEG"))
    dataset = build_dataset(str(tmp_path), "train")
    assert len(dataset) == 2 and dataset[0].shape == (3, 32, 48)
    for pixel, colour in ((dataset[0][:, 5, 5], RED), (dataset[0][:, -5, -5], BLUE)):
        assert (pixel.int() - torch.tensor(colour)).abs().max() <= 6


@pytest.mark.parametrize("installed", [True, False])
def test_heic_is_read_where_pillow_heif_is_installed(installed, monkeypatch):
    """The module is loaded once more, beside an optional package that is there or not."""
    registered = []
    package = types.SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", package if installed else None)
    spec = importlib.util.spec_from_file_location("folders_again", picture_files.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "folders_again", again)
    spec.loader.exec_module(again)
    assert registered == [True] * installed
    assert (".heic" in again.SUFFIXES) == ("HEIF" in again.FORMATS) == installed
    assert again.REMEDIES[".heic"] == "install pillow-heif"


@pytest.fixture
def impatient():
    """Who waits for a pipe's other end is woken."""
    def wake(*args):
        raise TimeoutError("waited too long")
    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(300)
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

    whole = replaced(dataset, broken=[3], seed=5)
    assert_same(loaded(dataset, 0, range(3), seed=5, batch_size=8),
                loaded(whole, 0, range(3), seed=5, batch_size=8))
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
BROKEN_OF_SIXTY = [4, 7, 20, 33, 34, 59]


def sixty(folder, broken=BROKEN_OF_SIXTY, labelled=True, repeat=1):
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


@pytest.mark.parametrize("labelled, seed", [(True, 1), (True, 2), (False, 1)])
def test_a_stand_in_is_a_function_of_seed_and_index_and_brings_its_label(tmp_path, labelled, seed):
    """Bit for bit, for 0, 1, 3 workers, 1 and 2 processes, begun in mid-epoch, whatever was read before."""
    whole = sixty(tmp_path, labelled=labelled)
    straight = loaded(whole, 0, range(15), seed=seed)          # three epochs of five steps
    assert whole.broken.nonzero()[:, 0].tolist() == BROKEN_OF_SIXTY
    assert_same(straight, loaded(replaced(whole, BROKEN_OF_SIXTY, seed), 0, range(15), seed=seed))
    assert_same(loaded(whole, 0, range(15), seed=seed), straight)
    for workers, first in ((1, 0), (3, 0), (3, 7)):
        again = loaded(sixty(tmp_path, labelled=labelled), workers, range(first, 15), seed=seed)
        assert_same(again, straight[first:])
    halves = [loaded(sixty(tmp_path, labelled=labelled), 0, range(15), rank, 2, seed) for rank in range(2)]
    joined = []
    for (a, u, labels), (b, v, other_labels) in zip(*halves, strict=True):
        crops = [torch.cat(pair) for pair in zip(a, b, strict=True)]
        labels = torch.cat([labels, other_labels]) if labelled else None
        joined.append((crops, torch.cat([u, v], 1), labels))
    assert_same(joined, straight)


@pytest.mark.parametrize("workers", [0, 3])
def test_each_is_named_once_and_counted(tmp_path, workers, capfd):
    """In three epochs of training, then in evaluations of the whole and of parts."""
    dataset = sixty(tmp_path)
    loaded(dataset, workers, range(15))
    assert int((~dataset.is_readable).sum()) == 6 and len(dataset.subset(slice(0, 8)).readable()) == 6
    part = dataset.subset(torch.arange(0, 60, 2))
    for images, number in ((dataset, 54), (part, 27), (part.subset(slice(1, None, 2)), 14)):
        assert len(inputs_of(images, 4, workers)) == len(images.readable()) == number
    lines = capfd.readouterr().err.splitlines()
    assert sorted(int(Path(line.split(":")[1]).stem) for line in lines) == BROKEN_OF_SIXTY
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
        process.join()
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


def test_a_set_without_a_readable_picture_ends_the_run(tmp_path):
    dataset = sixty(tmp_path, range(8)).subset(slice(0, 8))
    with pytest.raises(UserError, match="none of the 8 pictures can be read") as error:
        Batches(dataset, 8, views(), 0)[0]
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the stages
ODD_ONES = ("bad-exif.jpg", "palette-alpha.png", "several.jpg", "new\nline\t.jpg", "no utf-8 \udcff.jpg")
BROKEN_ONES = {"train": ("bomb.png", "truncated.jpg", "bad-\n\udcff-図.jpg"),
               "val": ("pipe.jpg", "truncated.png")}
CLASSES = ("blüte", "sk\udcfcy")
ON_FILES = ("--image-size 32 --views multicrop --num-local 1 --batch-size 8 --epochs 2 --hidden-dim 32 "
            "--num-classes 4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`damaged`: 40 training and 20 validation pictures of two classes, five of them broken, some odd.
    `without`: the broken ones removed. `mended`: lists; stand-ins replace the broken training pictures."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, number in (("train", 20), ("val", 10)):
        for c, name in enumerate(CLASSES):
            folder = root / "damaged" / split / name
            folder.mkdir(parents=True)
            odd = BROKEN_ONES[split][c::2]
            odd += ODD_ONES[c::2] if split == "train" else ()
            for file in odd:
                write(folder / file, (BROKEN | ODD)[file][0])
            for i in range(len(odd), number):
                pixels = np.array((RED, BLUE)[c]) + rng.normal(0, 30, (40, 30 + i, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    subprocess.run(["cp", "-r", "damaged", "without"], check=True, cwd=root)
    (root / "mended").mkdir()
    for split in ("train", "val"):
        dataset = build_dataset(f"{root}/damaged", split.replace("val", "test"))
        paths = [Path(os.fsdecode(path)) for path in dataset.paths]
        broken = [i for i, path in enumerate(paths) if path.name in BROKEN]
        assert len(broken) == len(BROKEN_ONES[split])
        lines = []
        for i, path in enumerate(paths):
            if i in broken:
                (root / "without" / path.relative_to(root / "damaged")).unlink()
            if i not in broken or split == "train":
                readable = paths[stand_in(i, broken, 0, len(paths))] if i in broken else path
                (root / f"mended/{split}-{i}.png").symlink_to(readable)
                lines.append(f"{split}-{i}.png {readable.parent.name}\n")
        (root / f"mended/{split}.txt").write_text("".join(lines), errors="surrogateescape")
    return root


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """pretrain.py on `damaged` with workers, and on `mended` without."""
    runs = tmp_path_factory.mktemp("runs")
    _, err = run(f"pretrain.py --data {folders}/damaged {ON_FILES} --workers 2 --output-dir {runs}/damaged")
    lines = err.splitlines()                                    # nothing about the odd ones
    assert len(lines) == 5 and all(line.isprintable() for line in lines), err
    for name in ("bomb.png", "truncated.jpg", "bad-\\n\\udcff-図.jpg", "pipe.jpg", "truncated.png"):
        assert sum(f"/{name}: not a readable picture (" in line for line in lines) == 1, err
    run(f"pretrain.py --data {folders}/mended {ON_FILES} --workers 0 --output-dir {runs}/mended")
    return runs


def on_network(trained, flags="--batch-size 8 --epochs 2"):
    return f"--checkpoint {trained}/damaged/checkpoint.pth --workers 0 {flags}"


def test_training_on_a_damaged_folder_is_training_with_the_stand_ins(trained):
    assert same(weights(trained / "damaged"), weights(trained / "mended"))
    watched = [line["knn_monitor"] for line in log_lines(trained / "damaged") if "knn_monitor" in line]
    assert watched == [1.0, 1.0]


def test_knn_leaves_out_and_counts(trained, folders, tmp_path, here):
    """The numbers are those of a folder from which the broken files were removed."""
    found = {}
    for folder in ("without", "damaged"):
        out, _ = here(f"knn.py {on_network(trained, '--k 5 37')} --data {folders}/{folder} "
                      f"--output-dir {tmp_path}/{folder}")
        assert "18 validation images against 37 training images" in out
        assert ("5 broken pictures left out" in out) == (folder == "damaged")
        found[folder] = metrics_of(tmp_path / folder)
    assert (found["without"].pop("num_broken"), found["damaged"].pop("num_broken")) == (0, 5)
    assert found["without"].pop("data") != found["damaged"].pop("data")
    assert found["without"] == found["damaged"]
    command = f"knn.py {on_network(trained, '--k 38')} --data {folders}/damaged --output-dir {tmp_path}/38"
    _, err = here(command, code=2)
    assert "--k 38: only 37 training images can be read" in err


def test_clusters_leave_out_and_count(trained, folders, tmp_path, here):
    found = {}
    for folder in ("without", "damaged"):
        out, _ = here(f"cluster_eval.py {on_network(trained, '--split train --contact-sheets 0')} "
                      f"--data {folders}/{folder} --output-dir {tmp_path}/{folder}")
        assert ("3 broken pictures left out" in out) == (folder == "damaged")
        metrics, table = metrics_of(tmp_path / folder), (tmp_path / folder / "assignments.csv").read_bytes()
        assert metrics["num_images"] == 37 and metrics["class_names"] == ["blüte", "sk\\udcfcy"]
        assert metrics.pop("num_broken") == (3 if folder == "damaged" else 0)
        assert folder in metrics.pop("data")
        found[folder] = metrics, table.replace(folder.encode(), b"")
    assert found["without"] == found["damaged"]
    here(f"cluster_eval.py {on_network(trained, '--bn-images 40 --contact-sheets 0')} "
         f"--data {folders}/damaged --output-dir {tmp_path}/bn")
    assert metrics_of(tmp_path / "bn")["num_images"] == 18


TRAINED_ON_LABELS = {"lincls": "lincls.py --lrs 1 --held-out 0",
                     "cached": "lincls.py --lrs 1 --held-out 0 --cached",
                     "semisup": "semisup.py --label-fraction 1"}


@pytest.mark.parametrize("name", TRAINED_ON_LABELS)
def test_classification_replaces_and_leaves_out(name, trained, folders, tmp_path, here):
    """Trained with stand-ins and their labels; tested on what can be read."""
    for folder, num_broken in (("damaged", 2), ("mended", 0)):
        here(f"{TRAINED_ON_LABELS[name]} {on_network(trained)} --data {folders}/{folder} "
             f"--output-dir {tmp_path}/{folder}")
        metrics = metrics_of(tmp_path / folder)
        assert metrics["num_test"] == 18 and metrics["num_broken"] == num_broken
    assert same(weights(tmp_path / "damaged"), weights(tmp_path / "mended"))
    predicted = []
    for folder in ("damaged", "mended"):
        lines = (tmp_path / folder / "predictions.csv").read_bytes().splitlines()
        predicted.append([line.split(b",")[-2:] for line in lines])                # without the path
    assert predicted[0] == predicted[1] and len(predicted[0]) == 1 + 18


TOO_MANY = {"pretrain": f"pretrain.py {ON_FILES}", "knn": "knn.py --k 5", "cluster_eval": "cluster_eval.py",
            "lincls": f"{TRAINED_ON_LABELS['lincls']} --batch-size 8 --epochs 1",
            "semisup": f"{TRAINED_ON_LABELS['semisup']} --batch-size 8 --epochs 1"}


@pytest.mark.parametrize("stage", TOO_MANY)
def test_too_many_end_a_stage_in_one_line(stage, trained, tmp_path, here):
    for split in ("train", "val"):
        for c in "ab":
            (tmp_path / "data" / split / c).mkdir(parents=True)
            for i in range(12):
                content = b"" if i % 2 else encoded("PNG")
                (tmp_path / "data" / split / c / f"{i}.png").write_bytes(content)
    network = "--workers 0" if stage == "pretrain" else on_network(trained, "")
    _, err = here(f"{TOO_MANY[stage]} {network} --data {tmp_path}/data --output-dir {tmp_path}/run", code=2)
    *named, last = err.splitlines()
    assert len(named) == 11 and "error: 11 of 24 pictures cannot be read, more than 10" in last
    assert not (tmp_path / "run/metrics.json").exists()


# ---------------------------------------------------------------- resumed
ONE_EPOCH = "--batch-size 8 --epochs 1 --workers 0"
NO_NETWORK = f"--image-size 32 --hidden-dim 32 --knn-every 0 {ONE_EPOCH}"
STAGES = {"pretrain": NO_NETWORK, "barlow": NO_NETWORK,
          "selflabel": f"{ONE_EPOCH} --checkpoint ", "distill": f"{ONE_EPOCH} --teacher ",
          "lincls": f"{ONE_EPOCH} --lrs 1 --checkpoint ",
          "semisup": f"{ONE_EPOCH} --label-fraction 1 --checkpoint "}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_does_not_resume_with_other_pictures(stage, trained, folders, tmp_path, here):
    subprocess.run(["cp", "-r", folders / "without", tmp_path / "data"], check=True)
    network = "" if STAGES[stage] == NO_NETWORK else trained / "damaged/checkpoint.pth"
    command = f"{stage}.py {STAGES[stage]}{network} --data {tmp_path}/data --output-dir {tmp_path}/run"
    here(command)
    one = tmp_path / "data/train" / CLASSES[0] / "19.png"
    other, away = one.with_name("99.png"), tmp_path / "19.png"
    changes = [(lambda: one.rename(other), lambda: other.rename(one), 37),        # renamed
               (lambda: picture().save(other), other.unlink, 38),                 # added
               (lambda: one.rename(away), lambda: away.rename(one), 36)]          # removed
    for change, undo, number in changes[:3 if stage == "pretrain" else 1]:
        change()
        _, err = here(command, code=2)
        assert err.count("\n") == 1 and "made with another configuration" in err
        assert "pictures was 37 files, CRC-32 " in err and f", is {number} files, CRC-32 " in err
        assert "put the files back as they were, another --output-dir, or --overwrite" in err
        undo()
    out, _ = here(command)
    assert "this run is finished" in out


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
    command = (f"pretrain.py --data {folders}/damaged {ON_FILES} --save-every 1 "
               f"--output-dir {tmp_path}/killed")
    process = start(f"{command} --workers 1")
    wait_for(tmp_path / "killed/checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    step = torch.load(tmp_path / "killed/checkpoint.pth", weights_only=True)["step"]
    assert 2 <= step < 10
    _, err = run(f"{command} --workers 3")
    assert "Traceback" not in err
    assert same(weights(tmp_path / "killed"), weights(trained / "damaged"))


@pytest.mark.slow
def test_two_processes_on_a_damaged_folder(folders, trained, tmp_path):
    """Each reads its share; together they train and evaluate as on the mended folder."""
    stages = {"pretrain": f"pretrain.py {ON_FILES} --workers 1"}
    for name, command in TRAINED_ON_LABELS.items():
        stages[name] = f"{command} {on_network(trained)}"
    for name, command in stages.items():
        for folder in ("damaged", "mended"):
            run(f"{command} --data {folders}/{folder} --output-dir {tmp_path}/{name}-{folder}", ranks=2)
        ours, theirs = (tmp_path / f"{name}-{folder}" for folder in ("damaged", "mended"))
        assert same(weights(ours), weights(theirs))
        if name != "pretrain":
            assert metrics_of(ours)["num_broken"] == 2 and metrics_of(theirs)["num_broken"] == 0


@pytest.mark.slow
def test_a_process_that_meets_too_many_ends_with_code_2_and_the_other_as_for_a_lost_one(tmp_path):
    """The first of two reads all broken ones: the order of the first epoch is known."""
    sixty(tmp_path, ())
    paths = build_dataset(str(tmp_path), "train").paths
    for index in np.random.default_rng([0, 1, 0]).permutation(60)[:12]:
        Path(os.fsdecode(paths[index])).write_bytes(b"")
    _, err = run(f"pretrain.py --data {tmp_path} {ON_FILES} --batch-size 24 --knn-every 0 --workers 0 "
                 f"--output-dir {tmp_path}/run", ranks=2, code=2)
    assert "rank 0: 11 of 60 pictures cannot be read" in err
    assert "rank 1: another process of this run died" in err


# ---------------------------------------------------------------- other decoders of JPEG files
def read_or_refused(path, decoder=None):
    try:
        return read_picture(path, decoder)
    except UserError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("decoder", ["torchvision", "simplejpeg"])
def test_other_decoders_read_and_refuse_what_pillow_does(decoder, tmp_path):
    """EXIF orientation, gray, CMYK, other formats, damage: to a level, and with the same words."""
    pytest.importorskip(decoder)
    rotated = {f"rotated-{o}.jpg": encoded("JPEG", NOISE, **exif(o)) for o in (1, 3, 6, 8)}
    samples = {f"sampled-{s}.jpg": encoded("JPEG", NOISE, subsampling=s) for s in range(3)}
    samples["a-flipped-bit.jpg"] = flipped(encoded("JPEG", NOISE), b"\xff\xda", 900, 0x10)
    contents = {name: content for name, (content, _) in (ODD | BROKEN).items()
                if isinstance(content, bytes) and name.endswith((".jpg", "12-bit-colour.png"))}
    for name, content in (contents | rotated | samples).items():
        path = tmp_path / name
        write(path, content)
        expected, ours = read_or_refused(path), read_or_refused(path, decoder)
        if isinstance(expected, str):
            assert ours == expected, name
        else:
            assert ours.shape == expected.shape and (ours.int() - expected.int()).abs().max() <= 1, name
    dataset = build_dataset(str(tmp_path), "train", decoder=decoder)
    assert dataset.decoder == decoder


def test_a_decoder_reads_what_it_can(tmp_path, monkeypatch):
    """And nothing else: Pillow has checked the size, and reads what is rotated or no RGB JPEG."""
    calls = []
    monkeypatch.setattr(picture_files, "jpeg_decoder", lambda name: lambda content: calls.append(name))
    for name, content in (("rgb.jpg", encoded("JPEG")), ("gray.jpg", encoded("JPEG", picture().convert("L"))),
                          ("turned.jpg", encoded("JPEG", **exif(6))), ("rgb.png", encoded("PNG")),
                          ("cmyk.jpg", encoded("JPEG", picture().convert("CMYK")))):
        write(tmp_path / name, content)
        result = read_picture(tmp_path / name, "torchvision")
        assert (result is None) == (name in ("rgb.jpg", "gray.jpg"))
    assert calls == ["torchvision"] * 2
    read_picture(tmp_path / "rgb.jpg")
    assert len(calls) == 2
    size = encoded("JPEG").index(b"\xff\xc0") + 5
    content = bytearray(encoded("JPEG"))
    content[size:size + 4] = b"\xff\xff\xff\xff"               # 65535 × 65535 pixels
    (tmp_path / "bomb.jpg").write_bytes(content)
    with pytest.raises(UserError, match="exceeds limit"):
        read_picture(tmp_path / "bomb.jpg", "torchvision")
    assert len(calls) == 2


def test_a_decoder_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    picture_files.jpeg_decoder.cache_clear()
    write(tmp_path / "a.jpg", encoded("JPEG"))
    with pytest.raises(UserError, match="--decoder simplejpeg: is not installed; pip install simplejpeg"):
        build_dataset(str(tmp_path), "train", decoder="simplejpeg")
