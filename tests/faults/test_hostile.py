"""Damaged and hostile files load never as other content, run nothing, take no memory, and end in one line."""

import argparse
import copyreg
import functools
import gzip
import importlib
import io
import itertools
import json
import operator
import os
import pickle
import random
import resource
import runpy
import shutil
import struct
import subprocess
import tarfile
import timeit
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import FORKS, ROOT, metrics_of, run

import checkpoint
import predictions
import pretrained
from checkpoint import UserError, load_checkpoint, load_last_checkpoint

SMALL = ("--data fake --image-size 16 --batch-size 128 --epochs 1 --hidden-dim 16 --save-every 2 "
         "--knn-every 0")
STAGES = {   # flags of a short run; {sound} is the checkpoint of pretrain's
    "pretrain": SMALL,
    "barlow": SMALL,
    "selflabel": "--checkpoint {sound} --batch-size 256 --epochs 1",
    "distill": "--teacher {sound} --batch-size 256 --epochs 1 --queue-size 256",
    "lincls": "--checkpoint {sound} --batch-size 256 --epochs 1 --lrs 0.1",
    "semisup": "--checkpoint {sound} --batch-size 64 --epochs 1 --label-fraction 0.25",
    "finetune": "--checkpoint {sound} --data fake --batch-size 64 --steps 4"}
ENTRIES = {   # every way for a file into a stage; {file} is that file, {out} a folder of its own
    **{name: f"{name}.py {flags.format(sound='{file}')} --output-dir {{out}}"
       for name, flags in STAGES.items() if "{sound}" in flags},
    "knn": "knn.py --checkpoint {file} --k 5 --output-dir {out}",
    "svm": "svm.py --checkpoint {file} --data {out}/voc --output-dir {out}",
    "cluster_eval": "cluster_eval.py --checkpoint {file} --contact-sheets 0 --output-dir {out}",
    "export": "export.py --checkpoint {file} --format torchvision --output {out}.pth",
    **{f"{name} --resume": f"{name}.py {flags} --resume {{file}} --output-dir {{out}}"
       for name, flags in STAGES.items()}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{stage: folder} of short runs, made when first asked for; pretrain has a previous checkpoint, too."""
    class Runs(dict):
        def __missing__(self, name):
            folder = tmp_path_factory.mktemp("runs") / name
            sound = None if name == "pretrain" else self["pretrain"] / "checkpoint.pth"
            run(f"{name}.py {STAGES[name].format(sound=sound)} --output-dir {folder}")
            return self.setdefault(name, folder)
    return Runs()


# ---------------------------------------------------------------- payloads
class Call:
    """Pickled as a call of `function`, which may be a Call itself."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __call__(self):
        """Only so that pickle takes one as a function."""

    def __reduce__(self):
        return self.function, self.args


class Rebuilt:
    """Pickled as an object of `Foreign`, in the way of protocols 0 and 1."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return copyreg._reconstructor, (Foreign, object, None), {"command": self.command}


class Foreign:
    """Runs code by BUILD, when its state is set."""

    def __init__(self, command):
        self.command = command

    def __setstate__(self, state):
        os.system(state["command"])


def saved(value, path, place="thing", sound=None, **options):
    """Saves the whole checkpoint `sound` with a value more."""
    state = torch.load(sound, weights_only=True)
    if place == "thing":
        state["thing"] = value
    elif place == "key":
        state["config"][value] = 1
    elif place == "Namespace":
        state["args"] = argparse.Namespace(lr=0.1, hook=value)
    else:
        state[place]["thing"] = value
    torch.save(state, path, **options)


def records_of(path):
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def write_records(path, records, compression=zipfile.ZIP_STORED):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")                         # of two records of one name
        for name, content in records:
            archive.writestr(name, content)


def with_pickle(sound, path, change):
    """Writes a sound file's records with another data.pkl, and right checksums."""
    write_records(path, [(name, change(content) if name.endswith("/data.pkl") else content)
                         for name, content in records_of(sound)])


def two_pickles(touch, marker, sound, path, second="data.pkl"):
    records = records_of(sound)
    name = records[0][0].replace("data.pkl", second)
    write_records(path, [*records, (name, pickle.dumps(Call(os.system, touch), 2))])


def under(place, **options):
    return lambda touch, marker, sound, path: saved(Call(os.system, touch), path, place, sound, **options)


def thing(make):
    return lambda touch, marker, sound, path: saved(make(touch, marker), path, sound=sound)


def script(touch, marker):
    Path(f"{marker}.py").write_text(f"open({str(marker)!r}, 'w')")
    return f"{marker}.py"


SYSTEM = Call(importlib.import_module, "os")
KINDS = {
    "os.system": thing(lambda touch, marker: Call(os.system, touch)),
    "eval": thing(lambda touch, marker: Call(eval, f"open({str(marker)!r}, 'w')")),
    "exec": thing(lambda touch, marker: Call(exec, f"open({str(marker)!r}, 'w').close()")),
    "open": thing(lambda touch, marker: Call(open, str(marker), "w")),
    "Popen": thing(lambda touch, marker: Call(subprocess.check_call, ["touch", str(marker)])),
    "timeit": thing(lambda touch, marker: Call(timeit.timeit, f"open({str(marker)!r}, 'w')", "pass",
                                               timeit.default_timer, 1)),
    "runpy": thing(lambda touch, marker: Call(runpy.run_path, script(touch, marker))),
    "partial": thing(lambda touch, marker: Call(functools.partial(functools.partial(os.system), touch))),
    "getattr": thing(lambda touch, marker: Call(Call(getattr, SYSTEM, "system"), touch)),
    "attrgetter": thing(lambda touch, marker: Call(Call(operator.attrgetter("system"), SYSTEM), touch)),
    "methodcaller": thing(lambda touch, marker: Call(operator.methodcaller("system", touch), SYSTEM)),
    "__setstate__": thing(lambda touch, marker: Foreign(touch)),
    "copyreg": thing(lambda touch, marker: Rebuilt(touch)),
    "numpy": thing(lambda touch, marker: np.array([Call(os.system, touch)], dtype=object)),
    "pickle in pickle": thing(lambda touch, marker: Call(pickle.loads, pickle.dumps(Call(os.system, touch)))),
    "torch's": thing(lambda touch, marker: Call(torch._tensor._rebuild_from_type_v2, os.system,
                                                   int, (touch,), {})),
    "in optimizer": under("optimizer"),
    "in config": under("config"),
    "in model": under("model"),
    "in Namespace": under("Namespace"),
    "as key": under("key"),
    "old format": under("thing", _use_new_zipfile_serialization=False),
    "protocol 4": under("thing", pickle_protocol=4),
    "INST": lambda touch, marker, sound, path: with_pickle(
        sound, path, lambda _: b"\x80\x02(U" + bytes([len(touch)]) + touch.encode() + b"ios\nsystem\n."),
    "STACK_GLOBAL": lambda touch, marker, sound, path: with_pickle(
        sound, path, lambda content: b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93(U" + bytes([len(touch)]) +
        touch.encode() + b"tR."),
    "two pickles": two_pickles,
    "DATA.PKL": functools.partial(two_pickles, second="DATA.PKL"),
}
NOT_READ = ("two pickles", "DATA.PKL")           # of these torch may read the sound one


@pytest.fixture
def refuse(runs, tmp_path, here):
    """Runs a command that must end with code 2 and one line, with nothing run and nothing written."""
    marker, path, out = tmp_path / "m", tmp_path / "hostile.pth", tmp_path / "out"

    def check(kind, entry):
        sound, first = sound_file(entry, runs), runs["pretrain"] / "checkpoint.pth"
        KINDS[kind](f"touch {marker}", marker, sound, path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")                      # a warning would be a second line
            _, error = here(ENTRIES[entry].format(file=path, out=out, sound=first), code=2)
        assert str(path) in error and error.count("\n") == 1 and len(error) < 600, (kind, entry, error)
        assert not marker.exists() and not out.exists(), (kind, entry)
    return check


def sound_file(entry, runs):
    return runs[entry.split()[0] if "--resume" in entry else "pretrain"] / "checkpoint.pth"


@pytest.mark.parametrize("kind", KINDS)
def test_every_payload_is_live(kind, runs, tmp_path):
    """Each file of the tests below does run its code, and is else whole, where all of pickle is allowed."""
    marker, path = tmp_path / "m", tmp_path / "hostile.pth"
    sound = runs["pretrain"] / "checkpoint.pth"
    KINDS[kind](f"touch {marker}", marker, sound, path)
    if kind in NOT_READ:
        with zipfile.ZipFile(path) as archive:
            pickle.loads(archive.read(archive.infolist()[-1]))
    elif kind in ("INST", "STACK_GLOBAL"):
        pickle.loads(next(content for name, content in records_of(path) if name.endswith("data.pkl")))
    else:
        state = torch.load(path, weights_only=False)
        assert state["model"].keys() - {"thing"} == load_checkpoint(sound)["model"].keys()
    assert marker.exists()


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_sound_file_is_taken_and_a_payload_refused(entry, runs, refuse, tmp_path, here):
    for kind in list(KINDS)[list(ENTRIES).index(entry)::len(ENTRIES)]:
        refuse(kind, entry)
    sound, first = sound_file(entry, runs), runs["pretrain"] / "checkpoint.pth"
    command = ENTRIES[entry].format(file=sound, out=tmp_path / "out", sound=first)
    if entry == "svm":                           # it has no embedded data, but has read the checkpoint before
        assert f"{tmp_path}/out/voc" in here(command, code=2)[1]
    else:
        here(command)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_every_payload_is_refused_by_every_entry(entry, refuse):
    for kind in KINDS:
        refuse(kind, entry)


def used(folder, out):
    shutil.copytree(folder, out)
    return out / "checkpoint.pth", out / "checkpoint.prev.pth"


@pytest.mark.parametrize("number", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
@pytest.mark.parametrize("name", STAGES)
def test_a_hostile_checkpoint_in_the_folder(name, number, runs, tmp_path, here):
    """The run goes back to the previous checkpoint; if that is hostile as well, it ends in one line."""
    out, marker = tmp_path / "out", tmp_path / "m"
    last, previous = used(runs[name], out)
    sound, first = runs[name] / "checkpoint.pth", runs["pretrain"] / "checkpoint.pth"
    command = f"{name}.py {STAGES[name].format(sound=first)} --output-dir {out}"
    for kind in list(KINDS)[list(STAGES).index(name) + number * len(STAGES):][:1]:
        shutil.copy(sound, previous)
        KINDS[kind](f"touch {marker}", marker, sound, last)
        _, error = here(command)
        assert error.startswith(f"warning: {last}: ") and "going back to checkpoint.prev.pth" in error
        assert error.count("\n") == 1 and not marker.exists()

        for path in (last, previous):
            KINDS[kind](f"touch {marker}", marker, sound, path)
        before = last.read_bytes(), previous.read_bytes()
        error = here(command, code=2)[1].splitlines()
        assert len(error) == 2 and "warning: " in error[0] and f"error: {previous}: " in error[1], error
        assert not marker.exists() and before == (last.read_bytes(), previous.read_bytes())


@pytest.mark.parametrize("name", STAGES)
def test_parts_that_do_not_fit_are_one_line(name, runs, tmp_path, here):
    """A whole file, harmless, of this stage and these flags, but made by hand: a part is missing or odd."""
    path, first = tmp_path / "file.pth", runs["pretrain"] / "checkpoint.pth"
    command = f"{name}.py {STAGES[name].format(sound=first)} --resume {path} --output-dir {tmp_path}/out"
    state = load_checkpoint(runs[name] / "checkpoint.pth")
    odd = dict(step="three", model={"w": torch.zeros(3)}, optimizer=3, rng=[torch.zeros(3)])
    changed = [(part, dict(state, **{part: value})) for part, value in odd.items() if part in state]
    changed += [(part, {key: state[key] for key in state if key != part}) for part in ("step", "optimizer")]
    for part, content in changed:
        torch.save(content, path)
        _, error = here(command, code=2)
        assert error.count("\n") == 1, (part, error)
        assert f"error: {path}: its parts are not those of a run with these flags" in error, (part, error)
    torch.save(state, path)
    here(command)


# ---------------------------------------------------------------- bombs
def inserted(make, old=False):
    """A bomb as a value of an else sound checkpoint."""
    def write(sound, path):
        saved(make(), path, sound=sound, _use_new_zipfile_serialization=not old)
    return write


def raw(content):
    """A bomb that is a pickle by itself."""
    return lambda sound, path: with_pickle(sound, path, lambda _: content)


def zeros(number):
    """Deflated zeros: number megabytes of them in a thousandth."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2 ** 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * number + packer.flush()


def deflated(sound, path):
    """A sound file and a record of a gigabyte in a megabyte."""
    write_records(path, [*records_of(sound), ("archive/data/bomb", content := zeros(1024))])
    data = bytearray(path.read_bytes())
    for at in (data.index(b"PK\x03\x04" + data[4:10], data.rindex(content) - 60),
               data.rindex(b"PK\x01\x02")):
        place = at + (8 if data[at + 2] == 3 else 10)
        struct.pack_into("<H", data, place, zipfile.ZIP_DEFLATED)
        struct.pack_into("<I", data, place + (14 if data[at + 2] == 3 else 14), 2 ** 30)
    path.write_bytes(data)


def claiming(numel):
    """Every storage of the file says that it has so many numbers."""
    def write(sound, path, old=False):
        torch.save({"model": {"w": torch.arange(77.0)}, "config": {}}, path,
                   _use_new_zipfile_serialization=not old)
        number, long = b"KMt", b"\x8a\x06" + numel.to_bytes(6, "little") + b"t"
        if old:
            content = path.read_bytes()
            path.write_bytes(content.replace(b"KMN", long[:-1] + b"N").replace(
                b"KM\x85", long[:-1] + b"\x85"))
            assert path.read_bytes() != content
        else:
            with_pickle(path, path, lambda content: content.replace(number, long).replace(
                b"KM\x85", long[:-1] + b"\x85"))
    return write


def hexed():
    """Bytes twice as long with each of 33 calls."""
    value = "0"
    for _ in range(33):
        value = Call(importlib.import_module("_codecs").encode, value, "hex" if value != "0" else "latin1")
    return value


def many(number, value):
    """A list of so many values, which a byte or five stand for."""
    return b"\x80\x02](" + value * number + b"e."


def recursive():
    ring = []
    ring.append({"again": ring})
    return ring


DEEP = 10 ** 6
LONG = ("dicts", "counters", "deep lists", "deep dicts", "all deflated", "bytearray, old", "stride 0, old",
        "Tensor", "claims 2^31", "claims 2^31, old")           # in the slow tests
BOMBS = {   # name: (writer of the file, whether it may be read)
    "deflated": (deflated, False),
    "all deflated": (lambda sound, path: write_records(
        path, [*records_of(sound), ("archive/data/bomb", bytes(2 ** 28))], zipfile.ZIP_DEFLATED), False),
    "bytearray": (inserted(lambda: Call(bytearray, 10 ** 10)), False),
    "bytearray, old": (inserted(lambda: Call(bytearray, 10 ** 10), old=True), False),
    "FloatTensor": (raw(b"\x80\x02ctorch\nFloatTensor\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R."), False),
    "Tensor": (inserted(lambda: Call(torch.Tensor, 10 ** 10)), False),
    "UntypedStorage": (raw(b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R."),
                       False),
    "hex of hex": (inserted(hexed), False),
    "stride 0": (inserted(lambda: torch.zeros(1).expand(2 ** 40)), False),
    "stride 0, old": (inserted(lambda: torch.zeros(1).expand(2 ** 40), old=True), False),
    "overlapping": (inserted(lambda: torch.zeros(2 ** 10).as_strided((2 ** 9, 2 ** 9), (1, 1))), False),
    "meta": (inserted(lambda: torch.zeros(2 ** 40, device="meta")), False),
    "sparse": (inserted(lambda: torch.zeros(2 ** 10).to_sparse()), False),
    "claims 2^40": (claiming(2 ** 40), False),
    "claims 2^31": (claiming(2 ** 31), False),
    "claims 2^40, old": (functools.partial(claiming(2 ** 40), old=True), False),
    "claims 2^31, old": (functools.partial(claiming(2 ** 31), old=True), False),
    "long string": (raw(b"\x80\x02X\xff\xff\xff\xff" + b"x" * 100 + b"."), False),
    "sets": (raw(many(10 ** 7, b"\x8f")), False),
    "dicts": (raw(many(10 ** 7, b"}")), False),
    "counters": (raw(b"\x80\x02](ccollections\nCounter\nq\0)q\1R" + b"h\0h\1R" * 10 ** 6 + b"e."), False),
    "recursive": (inserted(recursive), True),
    "rather deep lists": (raw(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."), False),
    "doubling": (raw(b"\x80\x02](Ne" + b"q\0](h\0h\0e" * 60 + b"."), False),
    "deep lists": (raw(b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."), False),
    "deep dicts": (raw(b"\x80\x02" + b"}U\1a" * DEEP + b"N" + b"s" * DEEP + b"."), False),
    "deep tuples": (raw(b"\x80\x02)" + b"\x85" * DEEP + b"."), False),
    "deep key": (raw(b"\x80\x02})" + b"\x85" * DEEP + b"Ns."), False),
    "large network": (lambda sound, path: torch.save(
        (state := torch.load(sound, weights_only=True)) | {"config": state["config"] | {
            "num_classes": 10 ** 7, "hidden_dim": 512}}, path), None),
}


def in_child(function, pipe, path):
    """Sends the exception's type, its text and the growth of the memory's peak in MB."""
    resource.setrlimit(resource.RLIMIT_AS, (14 << 30, 14 << 30))           # a failure here shall be the last
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20
    said = None
    try:
        function(path)
    except Exception as error:
        said = type(error).__name__, str(error)
    pipe.send((said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - before))


def measured(function, path):
    """What in_child sends from a process of its own."""
    ours, theirs = FORKS.Pipe(duplex=False)
    child = FORKS.Process(target=in_child, args=(function, theirs, path))
    child.start()
    theirs.close()
    answered = ours.poll(600)
    result = ours.recv() if answered else ("hangs", 0)
    child.kill()
    return result


@pytest.fixture(scope="module")
def usual(runs):
    """MB that reading the sound file takes."""
    said, growth = measured(load_checkpoint, runs["pretrain"] / "checkpoint.pth")
    assert said is None
    return growth


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG))
                                  for name in BOMBS])
def test_bombs_take_no_memory(name, runs, usual, tmp_path):
    (write, may_be_read), path = BOMBS[name], tmp_path / "bomb.pth"
    sound = runs["pretrain"] / "checkpoint.pth"
    write(sound, path)
    said, growth = measured(load_checkpoint if may_be_read is not None else pretrained.load_twist, path)
    assert (said is None) if may_be_read else (said[0] == "UserError" and "\n" not in said[1]), said
    assert growth < usual + 200, (growth, usual)


def npz(**members):
    """An .npz of (compression method, content of the .npy) that zipfile reads."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name + ".npy", content)
    return buffer.getvalue()


def npy(shape, content=bytes(24), descr="<i8"):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": descr})
    return buffer.getvalue() + content


def zeros_npz(path):
    """8 GB of labels in 8 MB."""
    content, size = zeros(8192), 2 ** 33
    path.write_bytes(npz(labels=content, predictions=npy((3,))))
    data = bytearray(path.read_bytes())
    for signature, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.index(signature)
        struct.pack_into("<H", data, at + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<I", data, at + method + 14, 2 ** 32 - 2)
    path.write_bytes(data)
    assert size > 2 ** 32


def objects_npz(path):
    np.savez(path, labels=np.array([Call(os.system, f"touch {path}.ran")], dtype=object), predictions=[0])


@pytest.mark.parametrize("write", [
    zeros_npz, objects_npz,
    lambda path: path.write_bytes(npz(labels=npy((10 ** 12,)), predictions=npy((3,)))),
    lambda path: path.write_bytes(npz(labels=npy((10 ** 9,)), predictions=npy((3,)))),
    lambda path: path.write_bytes(npz(labels=npy((2 ** 62, 4)), predictions=npy((3,)))),
    lambda path: path.write_bytes(npy((3,))),
    lambda path: path.write_bytes(pickle.dumps(Call(os.system, f"touch {path}.ran"))),
    lambda path: path.write_bytes(npz(labels=pickle.dumps(Call(os.system, f"touch {path}.ran")))),
    lambda path: path.write_bytes(b""),
    lambda path: path.mkdir(),
], ids="zeros objects 8TB 8GB 2^64 npy pickle inner empty folder".split())
def test_predictions_of_others(write, tmp_path):
    """Hostile .npz files; sound ones, compressed a thousandfold, are read."""
    path = tmp_path / "bomb.npz"
    write(path)
    said, growth = measured(predictions.read_predictions, path)
    assert said[0] == "UserError" and "\n" not in said[1] and str(path) in said[1], said
    assert growth < 200 and not Path(f"{path}.ran").exists()
    ids = np.zeros(10 ** 6, int)
    np.savez_compressed(tmp_path / "sound.npz", labels=ids, predictions=ids + 1)
    labels, *_ = predictions.read_predictions(tmp_path / "sound.npz")
    assert (tmp_path / "sound.npz").stat().st_size < 20_000 and len(labels) == 10 ** 6


def test_a_mapping_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "metrics.json").write_text("[" * 10 ** 6)
    with pytest.raises(UserError, match="--map-from .*: not the metrics.json"):
        predictions.read_mapping(tmp_path / "metrics.json", 10, None)


# ---------------------------------------------------------------- two readers of one zip file
def behind(first, second):
    """The records of two zip files, one after the other; zipfile reads the second's, torch the first's.

    zipfile looks for zip64's end record where it must be, torch where its locator says.
    """
    kept = first[:-42]                                          # without its locator and end record
    at, = struct.unpack("<I", second[-6:-2])
    directory, place = bytearray(second[at:-98]), 0
    while place < len(directory):
        offset, = struct.unpack_from("<I", directory, place + 42)
        struct.pack_into("<I", directory, place + 42, offset + len(kept))
        place += 46 + sum(struct.unpack_from("<HHH", directory, place + 28))
    end64, locator, end = bytearray(second[-98:-42]), bytearray(second[-42:-22]), bytearray(second[-22:])
    struct.pack_into("<Q", end64, 48, len(kept) + at)
    struct.pack_into("<I", end, 16, len(kept) + at)
    struct.pack_into("<Q", locator, 8, len(first) - 98)
    return kept + second[:at] + directory + end64 + locator + end


def test_the_locator_of_zip64_points_at_the_end(tmp_path):
    path = tmp_path / "file.pth"
    for name, value in (("ones", torch.ones(3)), ("zeros", torch.zeros(3))):
        torch.save({"w": value}, tmp_path / f"{name}.pth")
    path.write_bytes(behind((tmp_path / "ones.pth").read_bytes(), (tmp_path / "zeros.pth").read_bytes()))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.namelist()[0] == "zeros/data.pkl"
    assert torch.equal(torch.load(path, weights_only=True)["w"], torch.ones(3))
    with pytest.raises(UserError, match="has bytes before or after its zip archive"):
        checkpoint.read_file(path)


def test_what_is_checked_is_what_is_loaded(runs, tmp_path):
    """zipfile, which checks, and torch, which loads, must not see different files in one.

    For each trick zipfile alone would find whole and harmless what torch loads as something else.
    """
    sound, path = tmp_path / "sound.pth", tmp_path / "bad.pth"
    torch.save({"w": torch.zeros(3)}, sound)
    torch.save({"w": torch.ones(3)}, path)
    harmless, other = sound.read_bytes(), path.read_bytes()
    end = harmless[-22:]
    at, length = struct.unpack("<I", end[16:20])[0], len(harmless)
    directory = harmless[at:length - 98]

    def ended(content, start, size):
        """With an end record alone, whose directory is said to be at `start`."""
        return content + end[:12] + struct.pack("<IIH", size, start, 0)
    locator = bytearray(harmless[-42:-22])
    struct.pack_into("<Q", locator, 8, len(other) - 98)                    # torch's; zipfile looks before it
    moved = bytearray(directory)
    tricks = {
        "a file before it": other + harmless,
        "a comment": harmless[:-2] + struct.pack("<H", len(other)) + other,
        "a comment of an end record": harmless[:-2] + struct.pack("<H", 22) + end,
        "bytes after it": harmless + b"\0",
        "a second directory": ended(other[:-98] + directory, len(other[:-98]) - 1, len(directory)),
        "zip64's end elsewhere": other + harmless[:-42] + locator + end,
        "a flag of encryption": None, "a size": None, "another name": None, "a second extra field": None,
    }
    moved[8] |= 1
    tricks["a flag of encryption"] = ended(harmless[:at] + moved, at, len(moved))
    moved = bytearray(directory)
    struct.pack_into("<I", moved, 20, struct.unpack_from("<I", moved, 20)[0] - 1)
    tricks["a size"] = ended(harmless[:at] + moved, at, len(moved))
    name = struct.unpack_from("<H", directory, 28)[0]
    other = b"bad/data.pkl\0"[:name].ljust(name, b"\0")
    tricks["another name"] = ended(harmless[:at] + directory[:46] + other + directory[46 + name:], at,
                                   len(directory))
    twice = b"\1\0\x08\0" + b"\xff" * 8
    moved = (directory[:30] + struct.pack("<H", 24) + directory[32:46 + name] + twice * 2 +
             directory[46 + name:])
    tricks["a second extra field"] = ended(harmless[:at] + moved, at, len(moved))
    moved = bytearray(directory)
    moved[moved.index(b"sound/data/0") + 38 - 46] |= 16        # of its attributes, not its name
    tricks["a record that is a folder"] = ended(harmless[:at] + moved, at, len(moved))
    for trick, content in tricks.items():
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            checkpoint.read_file(path)
        assert "not a readable checkpoint" in str(error.value), trick
    path.write_bytes(ended(harmless[:at] + directory, at, len(directory)))      # of a writer without zip64
    assert torch.equal(checkpoint.read_file(path)[0]["w"], torch.zeros(3))
    for record, content in records_of(sound):
        if "/data/" in record or record.endswith(".pkl"):
            reader = torch._C.PyTorchFileReader(str(sound))
            assert reader.get_record(record.partition("/")[2]) == content


# ---------------------------------------------------------------- damage
def same(a, b):
    """Equal in every type, order and bit; processes.same takes 0.0 and -0.0 for equal."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def harmless(content, path, expected):
    """Whether such a file is refused, or read as `expected`; and whether it was read."""
    path.write_bytes(content)
    for load in (load_checkpoint, lambda path: checkpoint.read_file(path)[0]):
        try:
            if not same(load(path), expected):
                return False, True
            read = True
        except UserError:
            read = False
    return True, read


def flip(content, bit):
    content = bytearray(content)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def test_truncated_and_flipped_checkpoints(runs, tmp_path):
    whole = (runs["pretrain"] / "checkpoint.pth").read_bytes()
    expected = torch.load(runs["pretrain"] / "checkpoint.pth", weights_only=True)
    assert harmless(whole, tmp_path / "file.pth", expected) == (True, True)
    rng = random.Random(0)
    for place in sorted(rng.sample(range(len(whole)), 50)) + [0, 1, 4, len(whole) - 1]:
        assert harmless(whole[:place], tmp_path / "file.pth", expected) == (True, False), place
    read = 0
    for bit in rng.sample(range(8 * len(whole)), 50):
        good, was_read = harmless(flip(whole, bit), tmp_path / "file.pth", expected)
        assert good, bit
        read += was_read
    assert read < 25                                            # those in padding


@pytest.mark.slow
def test_every_bit_of_a_small_checkpoint_and_every_cut(runs, tmp_path):
    """All headers, names, checksums and directories among them."""
    sound = runs["pretrain"] / "checkpoint.pth"
    model = dict(list(load_checkpoint(sound)["model"].items())[1:4])
    checkpoint.save_checkpoint(tmp_path / "small.pth", {"model": model, "config": {"arch": "resnet8"}})
    state = load_checkpoint(tmp_path / "small.pth")
    small = (tmp_path / "small.pth").read_bytes()
    read = 0
    for bit in range(8 * len(small)):
        good, was_read = harmless(flip(small, bit), tmp_path / "file.pth", state)
        assert good, bit
        read += was_read
    assert 0 < read < 4 * len(small)
    for place in range(len(small)):
        assert harmless(small[:place], tmp_path / "file.pth", state) == (True, False), place
    whole = sound.read_bytes()
    expected = load_checkpoint(sound)
    for place in range(len(whole) - 2048, len(whole)):
        assert harmless(whole[:place], tmp_path / "file.pth", expected) == (True, False), place


def packed_tar(sound):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(sound, "checkpoint.pth")
    return buffer.getvalue()


def other_zip(sound):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes/readme.txt", "hello " * 100)
    return buffer.getvalue()


def old_tar(sound):
    """A tar whose first name begins like a file of torch before 1.6: torch.load would unpack it."""
    name = checkpoint.OLD_FORMAT.decode("latin1") + "."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="latin1") as archive:
        for member, content in ((name, b"x"), ("storages", pickle.dumps(0, 2)),
                                ("tensors", pickle.dumps(0, 2)), ("pickle", pickle.dumps({}, 2))):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert buffer.getvalue().startswith(checkpoint.OLD_FORMAT)
    return buffer.getvalue()


def middle(sound):
    whole = sound.read_bytes()
    with zipfile.ZipFile(sound) as archive:
        weight = max(archive.infolist(), key=lambda record: record.file_size)
    return flip(whole, 8 * (weight.header_offset + weight.file_size // 2))


DAMAGES = {
    "empty": lambda sound: b"",
    "half": lambda sound: sound.read_bytes()[:sound.stat().st_size // 2],
    "a byte less": lambda sound: sound.read_bytes()[:-1],
    "a bit": middle,
    "zeros": lambda sound: bytes(sound.stat().st_size),         # a disk that lost it
    "folder": None,
    "text": lambda sound: b"weights\n" * 1000,
    "other zip": other_zip,
    "PNG": lambda sound: (ROOT / "weights/top3.png").read_bytes(),
    "tar.gz": packed_tar,
    "gzip": lambda sound: gzip.compress(sound.read_bytes(), 1),
    "tar": old_tar,
    "pickle": lambda sound: pickle.dumps({"model": {}, "config": {}}, 2),
    "bare tensor": lambda sound: (torch.save(torch.ones(3), buffer := io.BytesIO()), buffer.getvalue())[1],
    "bare backbone": lambda sound: (sound.parent / "backbone.pth").read_bytes(),
}


def damage(kind, sound, path):
    path.unlink(missing_ok=True)
    path.mkdir() if kind == "folder" else path.write_bytes(DAMAGES[kind](sound))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files(kind, runs, tmp_path, capsys):
    """Alone, and beside a sound previous one."""
    sound, last, previous = runs["pretrain"] / "checkpoint.pth", *map(tmp_path.__truediv__, (
        "checkpoint.pth", "checkpoint.prev.pth"))
    damage(kind, sound, last)
    for load, path in ((load_checkpoint, last), (load_last_checkpoint, tmp_path)):
        with pytest.raises(UserError, match=f"^{last}: .*") as error:
            load(path)
        assert "\n" not in str(error.value)
    shutil.copy(sound, previous)
    assert same(load_last_checkpoint(tmp_path), load_checkpoint(sound))
    error = capsys.readouterr().err
    assert f"warning: {last}: " in error and "going back to checkpoint.prev.pth" in error


@pytest.mark.parametrize("kind", ["a bit", "folder", *(pytest.param(kind, marks=pytest.mark.slow)
                                                       for kind in ("empty", "half", "zeros", "other zip"))])
def test_a_run_goes_back_to_the_previous_checkpoint(kind, runs, tmp_path, here):
    """And ends with the weights of the undisturbed run; without a good one it ends in one line."""
    out = tmp_path / "out"
    last, previous = used(runs["pretrain"], out)
    undisturbed = load_checkpoint(last)
    assert load_checkpoint(previous)["step"] == 2 and undisturbed["step"] == 4
    damage(kind, runs["pretrain"] / "checkpoint.pth", last)
    _, error = here(f"pretrain.py {SMALL} --output-dir {out}")
    assert error.startswith(f"warning: {last}: ") and "going back to checkpoint.prev.pth" in error
    assert error.count("\n") == 1
    again = load_checkpoint(last)
    assert all(same(again[key], undisturbed[key]) for key in ("model", "optimizer", "step", "rng"))
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"resumed_from": 2} in entries and metrics_of(out)["step"] == 4

    for path in (last, previous):
        if path.exists():
            path.unlink()
        damage(kind, runs["pretrain"] / "checkpoint.pth", path)
    before = [path.is_dir() or path.read_bytes() for path in (last, previous)]
    error = here(f"pretrain.py {SMALL} --output-dir {out}", code=2)[1].splitlines()
    assert len(error) == 2 and f"error: {previous}: " in error[1]
    assert before == [path.is_dir() or path.read_bytes() for path in (last, previous)]


assert len(set(itertools.chain(KINDS, BOMBS, DAMAGES))) == len(KINDS) + len(BOMBS) + len(DAMAGES)
