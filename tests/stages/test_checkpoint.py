"""Checkpoints of this and of other projects load entirely, or are refused in a line that names the cause."""

import argparse
import multiprocessing
import os
import pickle
import re
import sys
import zipfile
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
import torchvision
from processes import ROOT, metrics_of

import checkpoint
import export
import pretrained
from checkpoint import COUNTER, UserError, load_backbone, save_checkpoint, write_atomically
from cli import launch
from data import PICTURES, input_of
from model import build_backbone, build_network, build_twist
from pretrained import load_pretrained, load_teacher, load_twist

CONFIG = {"arch": "resnet8", "num_classes": 10, "hidden_dim": 16, "bunch_size": None, "nbs": True,
          "small_images": False, "data": "fake", "seed": 3}


def randomised(arch, seed, small_images=False):
    """A state dict of a backbone in which no two tensors are equal."""
    with torch.device("meta"):
        state = build_backbone(arch, small_images).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator).abs() if value.is_floating_point() else
            torch.tensor(seed * 1000 + i) for i, (name, value) in enumerate(state.items())}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def assert_holds(backbone, state):
    found = backbone.state_dict()
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value), name


NET, OTHER = randomised("resnet8", 1), randomised("resnet8", 2)
SMALL, R18 = randomised("resnet8", 3, small_images=True), randomised("resnet18", 4)
VIT, VIT2 = randomised("vit_t", 5), randomised("vit_t", 6)
FC = {"fc.weight": torch.ones(1000, 128), "fc.bias": torch.ones(1000)}
HEAD = {"0.weight": torch.ones(8, 512), "1.running_mean": torch.ones(8)}
SGD = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
ARGS = argparse.Namespace(arch="resnet18", lr=0.1)
SEQUENTIAL = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
LIGHTLYS = {"conv1": "0", "bn1": "1", "layer1": "2", "layer2": "3", "layer3": "4", "layer4": "5"}
MM_VIT = {"patch_embed.proj.": "patch_embed.projection.", "blocks.": "layers.", ".norm1.": ".ln1.",
          ".norm2.": ".ln2.", "mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1",
          "norm.weight": "ln1.weight", "norm.bias": "ln1.bias"}


def first_renamed(table, state):
    return {table[name.split(".")[0]] + name[name.index("."):]: value for name, value in state.items()}


def replaced(table, state):
    def rename(name):
        for old, new in table.items():
            name = name.replace(old, new)
        return name
    return {rename(name): value for name, value in state.items()}


def twist_file(backbone, teacher=None):
    """As the published train.py saves."""
    full = under("backbone.", backbone) | under("projection_heads.projection_head.", HEAD)
    state = {"model": full, "backbone": dict(backbone), "optimizer": SGD, "epoch": 3, "args": ARGS}
    if teacher:
        state |= {"teacher": under("backbone.", teacher) | under("projection_heads.projection_head.", HEAD),
                  "teacher_backbone": dict(teacher)}
    return state


LAYOUTS = {   # name: (what is loaded, arch, content of the file, place, key, small images)
    "torchvision": (NET, "resnet8", NET | FC, ""),
    "timm ViT": (VIT, "vit_t", VIT | {"head.weight": torch.ones(10, 192), "head.bias": torch.ones(10)}, ""),
    "DataParallel": (NET, "resnet8", under("module.", NET), "module"),
    "torch.compile": (NET, "resnet8", under("_orig_mod.", NET), ""),
    "torch.compile within DDP": (NET, "resnet8", {"model": under("module._orig_mod.backbone.", NET)},
                                 "model.module.backbone"),
    "TWIST": (NET, "resnet8", twist_file(NET), "backbone"),
    "TWIST, momentum": (VIT, "vit_t", twist_file(VIT2, VIT), "teacher_backbone"),
    "TWIST, momentum, student": (VIT2, "vit_t", twist_file(VIT2, VIT), "backbone", "backbone"),
    "Barlow Twins": (NET, "resnet8", {"epoch": 1, "optimizer": SGD, "model": under(
        "module.backbone.", NET) | under("module.projector.", HEAD)}, "model.module.backbone"),
    "Barlow Twins, backbone": (NET, "resnet8", NET, ""),
    "MoCo v1, v2": (NET, "resnet8", {"epoch": 1, "arch": "resnet8", "optimizer": SGD, "state_dict": under(
        "module.encoder_k.", OTHER) | under("module.encoder_q.", NET | FC) | {"module.queue": torch.ones(9)}},
        "state_dict.module.encoder_q"),
    "MoCo v2, key encoder": (OTHER, "resnet8", {"state_dict": under("module.encoder_k.", OTHER) | under(
        "module.encoder_q.", NET)}, "state_dict.module.encoder_k", "encoder_k"),
    "MoCo v3": (VIT, "vit_t", {"arch": "vit_tiny", "state_dict": under(
        "module.momentum_encoder.", VIT2) | under("module.base_encoder.", VIT) | under(
        "module.predictor.", HEAD)}, "state_dict.module.base_encoder"),
    "SimSiam": (NET, "resnet8", {"epoch": 1, "arch": "resnet8", "state_dict": under(
        "module.encoder.", NET | under("fc.", HEAD)) | under("module.predictor.", HEAD)},
        "state_dict.module.encoder"),
    "SwAV": (NET, "resnet8", under("module.", NET | under("projection_head.", HEAD)) | {
        "module.prototypes.weight": torch.ones(30, 8)}, "module"),
    "SwAV, training": (NET, "resnet8", {"epoch": 1, "optimizer": SGD, "state_dict": under(
        "module.", NET | under("projection_head.", HEAD))}, "state_dict.module"),
    "DINO": (VIT, "vit_t", VIT, ""),
    "DINO, training": (VIT, "vit_t", {
        "student": under("module.backbone.", VIT2) | under("module.head.", HEAD), "teacher": under(
            "backbone.", VIT) | under("head.", HEAD), "epoch": 1, "args": ARGS,
        "dino_loss": {"center": torch.ones(1, 4)}}, "teacher.backbone"),
    "DINO, training, student": (VIT2, "vit_t", {"student": under("module.backbone.", VIT2), "teacher": under(
        "backbone.", VIT)}, "student.module.backbone", "student"),
    "MAE": (VIT, "vit_t", {"model": VIT | {
        "mask_token": torch.ones(1, 1, 512), "decoder_norm.weight": torch.ones(512),
        "decoder_blocks.0.norm1.weight": torch.ones(512)}, "args": ARGS}, "model"),
    "SEED": (NET, "resnet8", {"epoch": 1, "state_dict": {"module.queue": torch.ones(9)} | under(
        "module.teacher.", OTHER | under("fc.", HEAD)) | under("module.student.", NET | under("fc.", HEAD))},
        "state_dict.module.student"),
    "solo-learn": (NET, "resnet8", {"epoch": 1, "pytorch-lightning_version": "1.6", "state_dict": under(
        "momentum_backbone.", OTHER) | under("backbone.", NET) | under("projector.", HEAD) | under(
        "classifier.", HEAD)}, "state_dict.backbone"),
    "solo-learn, 2021": (NET, "resnet8", {"state_dict": under("encoder.", NET)}, "state_dict.encoder"),
    "lightly, benchmarks": (NET, "resnet8", {"state_dict": under("backbone.", NET) | under(
        "teacher_backbone.", OTHER)}, "state_dict.backbone"),
    "lightly, examples": (NET, "resnet8", {"state_dict": under("backbone.", first_renamed(SEQUENTIAL, NET))},
                          "state_dict.backbone"),
    "lightly, DINO": (NET, "resnet8", {"state_dict": under("student_backbone.", OTHER) | under(
        "teacher_backbone.", NET)}, "state_dict.teacher_backbone"),
    "lightly's ResNet": (SMALL, "resnet8", {"state_dict": under("backbone.", replaced(
        {"downsample": "shortcut"}, first_renamed(LIGHTLYS, SMALL)))}, "state_dict.backbone", None, True),
    "MMSelfSup": (NET, "resnet8", {"meta": {"epoch": 1}, "state_dict": under("backbone.", NET) | under(
        "neck.", HEAD) | under("head.", HEAD)}, "state_dict.backbone"),
    "MMSelfSup, extracted": (NET, "resnet8", {"state_dict": NET, "author": "MMSelfSup"}, "state_dict"),
    "MMSelfSup, BYOL": (NET, "resnet8", {"state_dict": under("target_net.0.", OTHER) | under(
        "online_net.0.", NET)}, "state_dict.online_net.0"),
    "MMSelfSup, ViT": (VIT, "vit_t", {"state_dict": under("backbone.", replaced(MM_VIT, VIT))},
                       "state_dict.backbone"),
    "ours": (NET, "resnet8", {"model": under("backbone.", NET) | under("projection_heads.", HEAD),
                               "config": {}}, "model.backbone"),
    "ours, momentum": (VIT, "vit_t", {"model": under("backbone.", VIT2), "teacher": under("backbone.", VIT)},
                       "teacher.backbone"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_entirely(layout, tmp_path, capsys):
    state, arch, content, place, key, small = (*LAYOUTS[layout], None, False)[:6]
    torch.save(content, tmp_path / "file.pth")
    backbone = build_backbone(arch, small)
    report = load_backbone(backbone, tmp_path / "file.pth", key)
    assert_holds(backbone, state)
    assert (report.place, report.loaded, report.missing, report.verified) == (place, len(state), [], True)
    names = checkpoint._tensors(content)
    assert len(report.left_over) == len(names) - len(state) and set(report.left_over) < {*names, ""}
    out = capsys.readouterr().out
    assert f"{len(state)} tensors loaded from {place or 'its top level'}" in out and out.count("\n") == 1
    for name in report.left_over:                               # never silently
        assert any(name.startswith(group) for group in re.findall(r"(\S+) \(\d+\)", out)), name


def test_old_files_load_and_are_said_to_be_unverified(tmp_path, capsys):
    content = {"state_dict": under("module.encoder_q.", NET | FC), "args": ARGS}
    torch.save(content, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    backbone = build_backbone("resnet8")
    assert not load_backbone(backbone, tmp_path / "old.pth.tar").verified
    assert_holds(backbone, NET)
    assert "old format, without checksums" in capsys.readouterr().out
    whole = (tmp_path / "old.pth.tar").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="cut.pth: not a readable checkpoint"):
        load_backbone(backbone, tmp_path / "cut.pth")


def test_counters_may_be_missing_and_this_is_said(tmp_path, capsys):
    state = {name: value for name, value in NET.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "file.pth")
    backbone = build_backbone("resnet8")
    report = load_backbone(backbone, tmp_path / "file.pth")
    assert len(report.missing) == 9 and report.loaded == len(state) and report.left_over == []
    assert "kept as they were: bn1.num_batches_tracked" in capsys.readouterr().out
    assert_holds(backbone, NET | {name: torch.tensor(0) for name in report.missing})
    torch.save(state | {"bn1.num_batches_tracked": torch.tensor(1)}, tmp_path / "file.pth")   # some only
    with pytest.raises(UserError, match="missing: layer1.0.bn1.num_batches_tracked"):
        load_backbone(backbone, tmp_path / "file.pth")


def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    state = NET | {"conv1.weight": torch.ones(32, 3, 3, 3)}
    del state["layer3.0.bn2.weight"]
    torch.save({"state_dict": under("module.", state)}, tmp_path / "file.pth")
    backbone = build_backbone("resnet8")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match="missing: layer3.0.bn2.weight; misshapen: conv1.weight is"):
        load_backbone(backbone, tmp_path / "file.pth")
    assert_holds(backbone, before)                              # a refused file leaves everything as it was


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize("arch, content, named", [
    ("resnet8", {}, "no state dict, but a dict without named tensors"),
    ("resnet8", [NET], "no state dict, but a list"),
    ("resnet8", torch.ones(3), "no state dict, but a Tensor"),
    ("resnet8", {"weight": torch.ones(3)}, "none of the network's names; it has weight, the network conv1."),
    ("resnet8", {"model": VIT}, "none of the network's names; it has model.cls_token"),
    ("resnet8", without(NET, *list(NET)[24:]), "missing: layer2.0.conv2.weight, "),
    ("resnet8", under("module.", without(NET, "bn1.bias")), "(missing: bn1.bias), looked for in module"),
    ("resnet8", NET | {"bn1.bias": torch.ones(33)}, "misshapen: bn1.bias is [33], not [32]"),
    ("resnet8", NET | {"bn1.bias": torch.ones(32, dtype=torch.int8)}, "bn1.bias is torch.int8"),
    ("resnet8", SMALL, "misshapen: conv1.weight is [32, 3, 3, 3], not [32, 3, 5, 5]"),
    ("resnet18", randomised("resnet34", 6), "unexpected: layer1.2.conv1.weight"),   # deeper, all shapes fit
    ("resnet18", randomised("resnet50", 6), "misshapen: layer1.0.conv1.weight is [64, 64, 1, 1]"),
    ("resnet8", {"a": NET, "b": OTHER}, "several networks that fit, a and b"),
    ("resnet8", {"state_dict": under("a.", NET) | under("b.", OTHER)}, "state_dict.a and state_dict.b"),
    ("vit_t", VIT | {"pos_embed": torch.ones(1, 577, 192)}, "pos_embed is [1, 577, 192], not [1, 197, 192]"),
    ("vit_t", VIT | {"blocks.0.ls1.gamma": torch.ones(192)}, "unexpected: blocks.0.ls1.gamma"),
    ("vit_t", randomised("vit_s", 6), "misshapen: cls_token is [1, 1, 384]"),
    ("vit_s", {"state_dict": under("module.base_encoder.", randomised("vit_s", 6))}, "MoCo v3's ViT-S has"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_foreign_files_that_do_not_fit_are_one_line(arch, content, named, tmp_path, here):
    torch.save(content, tmp_path / "file.pth")
    command = (f"export.py --checkpoint {tmp_path}/file.pth --arch {arch} --output {tmp_path}/out.pth "
               f"--format {'timm' if arch.startswith('vit') else 'torchvision'}")
    _, error = here(command, code=2)
    assert named in error and str(tmp_path / "file.pth") in error and error.count("\n") == 1, error
    assert not (tmp_path / "out.pth").exists()
    sound = {"resnet8": NET, "resnet18": R18, "vit_t": VIT}
    torch.save(sound[arch] if arch in sound else replaced({"base_encoder.": ""}, content["state_dict"]),
               tmp_path / "file.pth")
    here(command)
    assert (tmp_path / "out.pth").exists()


class Runner:
    """What a full training checkpoint may hold beside weights."""


class Evil:
    def __reduce__(self):
        return print, ("code of the file was run",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("thing, named", [
    (Runner(), "test_checkpoint.Runner"), (Evil(), "print"), (PurePosixPath("/tmp"), "PurePosixPath"),
    (np.float64(3), "numpy"), (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear")],
    ids=lambda value: type(value).__name__)
def test_foreign_objects_are_named_and_not_run(thing, named, zipped, tmp_path, here):
    def save(thing):
        torch.save({"state_dict": NET, "thing": thing}, tmp_path / "file.pth",
                   _use_new_zipfile_serialization=zipped)
    save(thing)
    command = (f"export.py --checkpoint {tmp_path}/file.pth --arch resnet8 --format torchvision "
               f"--output {tmp_path}/out.pth")
    out, error = here(command, code=2)
    assert named in error and "save the state dict alone" in error and error.count("\n") == 1, error
    assert "was run" not in out
    save(ARGS)
    here(command)


# ---------------------------------------------------------------- damage
def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """Copies a zip-format file with other records, whose checksums are right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for record in old.namelist():
            new.writestr(record, change(record, old.read(record)))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    save_checkpoint(path, {"model": build_twist(CONFIG).state_dict(), "config": CONFIG})
    return path


def test_our_checkpoints_are_refused_by_name_in_one_line(ours, tmp_path, here):
    """Through a stage's command; the sound file goes through the same."""
    whole = ours.read_bytes()
    with zipfile.ZipFile(ours) as archive:
        weight = max(archive.infolist(), key=lambda record: record.file_size)
    flipped = bytearray(whole)
    flipped[weight.header_offset + weight.file_size // 2] ^= 1
    state = torch.load(ours, weights_only=True)
    model, half = state["model"], list(state["model"])[20:]

    def saved(change):
        torch.save(state | change, tmp_path / "made.pth")
        return (tmp_path / "made.pth").read_bytes()

    bad = {
        "cut in half": (whole[:len(whole) // 2], "cut short"),
        "cut by a byte": (whole[:-1], "cut short"),
        "flipped": (bytes(flipped), "checksum of"),
        "empty": (b"", "not a readable checkpoint"),
        "text": (b"weights\n" * 100, "not a readable checkpoint"),
        "half missing": (saved({"model": {name: model[name] for name in half}}),
                         "missing: backbone.conv1.weight"),
        "module.": (saved({"model": under("module.", model)}), "unexpected: module.backbone.conv1.weight"),
        "misshapen": (saved({"model": model | {"backbone.conv1.weight": torch.ones(2)}}),
                      "misshapen: backbone.conv1.weight is [2]"),
        "no tensor": (saved({"model": model | {"backbone.conv1.weight": 3}}), "conv1.weight is no tensor"),
        "empty weights": (saved({"model": {}}), "missing: backbone.conv1.weight"),
        "no weights": (saved({"model": 3}), "not a checkpoint of this project"),
        "no arch": (saved({"config": {}}), "not a network of this project"),
        "odd arch": (saved({"config": CONFIG | {"arch": "resnet7"}}), "unknown arch 'resnet7'"),
        "odd width": (saved({"config": CONFIG | {"hidden_dim": "x"}}), "not a network of this project"),
        "an object": (saved({"thing": Runner()}), "test_checkpoint.Runner"),
    }
    for name, (content, named) in bad.items():
        (tmp_path / "bad.pth").write_bytes(content)
        out = tmp_path / "out"
        _, error = here(f"cluster_eval.py --checkpoint {tmp_path}/bad.pth --output-dir {out}", code=2)
        assert "bad.pth: " in error and named in error and error.count("\n") == 1, (name, error)
        assert not out.exists()
    here(f"cluster_eval.py --checkpoint {ours} --output-dir {out} --device cpu")


def test_a_folder_that_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch):
    """As on some network file systems: the file is there by then."""
    flush, open_files = os.fsync, len(os.listdir("/proc/self/fd"))

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        flush(descriptor)
    monkeypatch.setattr(os, "fsync", refuse)
    write_atomically(tmp_path / "x.json", b"new")
    assert (tmp_path / "x.json").read_bytes() == b"new"
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_every_flipped_byte_of_a_weight_is_found(ours, tmp_path):
    """torch.load alone reads all of these without a word."""
    whole = ours.read_bytes()
    with zipfile.ZipFile(ours) as archive:
        weight = max(archive.infolist(), key=lambda record: record.file_size)
    for place in range(0, weight.file_size, weight.file_size // 10):
        flipped = bytearray(whole)
        flipped[weight.header_offset + 200 + place % (weight.file_size - 200)] ^= 64
        (tmp_path / "flipped.pth").write_bytes(flipped)
        torch.load(tmp_path / "flipped.pth", weights_only=True)
        with pytest.raises(UserError, match="checksum of .*/data/"):
            load_twist(tmp_path / "flipped.pth")


def test_claims_beyond_what_is_stored(tmp_path):
    """Of a stride of 0, a size, an offset, the storage itself; and compressed records."""
    torch.save({"w": torch.arange(4.0)}, tmp_path / "sound.pth")
    size = b"K\x00K\x04\x85q\x08K\x01"                        # pickled: offset 0, size (4,), stride (1,)
    for old, new, named in (
            (size, b"K\x00J\x00\x00\x00\x40\x85q\x08K\x00", "w claims more bytes than are stored"),
            (size, b"K\x00K\x40\x85q\x08K\x01", "not a readable checkpoint"),     # 64 numbers of 4
            (size, b"K\x03K\x04\x85q\x08K\x01", "not a readable checkpoint"),     # 4 numbers from the last on
            (b"K\x04t", b"K\x40t", "not a readable checkpoint")):                  # a storage of 64 numbers
        rewritten(tmp_path / "sound.pth", tmp_path / "bad.pth", lambda record, data, old=old, new=new:
                  data.replace(old, new) if record.endswith("data.pkl") else data)
        with pytest.raises(UserError, match=named):
            checkpoint.read_file(tmp_path / "bad.pth")
    rewritten(tmp_path / "sound.pth", tmp_path / "packed.pth", lambda _, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed records"):
        checkpoint.read_file(tmp_path / "packed.pth")
    rewritten(tmp_path / "sound.pth", tmp_path / "same.pth", lambda _, data: data)
    assert torch.equal(checkpoint.read_file(tmp_path / "same.pth")[0]["w"], torch.arange(4.0))


# ---------------------------------------------------------------- load_pretrained
def test_our_checkpoints_bring_their_configuration(ours, tmp_path):
    model = torch.load(ours, weights_only=True)["model"]
    backbone, config = load_pretrained(ours)
    assert config == CONFIG
    assert_holds(backbone, {name.removeprefix("backbone."): value for name, value in model.items()
                            if name.startswith("backbone.")})
    load_pretrained(ours, arch="resnet8")
    with pytest.raises(UserError, match="--arch resnet18: .* holds a resnet8"):
        load_pretrained(ours, arch="resnet18")


@pytest.mark.parametrize("key, taken, other", [
    (None, "teacher", "student"), ("teacher", "teacher", "student"), ("student", "student", "teacher"),
    ("model", "student", "teacher")])
def test_the_key_chooses_teacher_or_student(key, taken, other, ours, tmp_path, capsys, monkeypatch):
    """And rank 0 says in one line which one was taken, and which flag takes the other."""
    model = torch.load(ours, weights_only=True)["model"]
    expected = {"student": model, "teacher": {name: value + 1 for name, value in model.items()}}
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"model": model, "teacher": expected["teacher"], "config": CONFIG})
    network, config = load_twist(path, key)
    assert config == CONFIG
    assert_holds(network, expected[taken])
    said = capsys.readouterr().out
    assert f"{path}: " in said and f"the {taken} is taken; --key {other} takes" in said
    assert said.count("\n") == 1
    backbone, _ = load_pretrained(path, key=key)
    assert torch.equal(backbone.conv1.weight, expected[taken]["backbone.conv1.weight"])
    assert capsys.readouterr().out == said
    monkeypatch.setenv("RANK", "1")
    load_pretrained(path, key=key)
    assert capsys.readouterr().out == ""


def test_without_a_momentum_encoder_there_is_only_the_student(ours, capsys):
    model = torch.load(ours, weights_only=True)["model"]
    for key in (None, "student", "model"):
        assert_holds(load_twist(ours, key)[0], model)
        assert torch.equal(load_pretrained(ours, key=key)[0].conv1.weight, model["backbone.conv1.weight"])
    assert capsys.readouterr().out == ""                        # nothing to choose from
    for load in (load_twist, load_pretrained):
        for key in ("teacher", "encoder_q"):
            with pytest.raises(UserError, match=f"{ours}: has no '{key}', only student; "):
                load(ours, key=key)


def test_the_teacher_of_seed_is_the_momentum_encoder(ours, tmp_path, capsys):
    """distill.py has no --key, so none is named."""
    model = torch.load(ours, weights_only=True)["model"]
    teacher = {name: value + 1 for name, value in model.items()}
    save_checkpoint(tmp_path / "checkpoint.pth", {"model": model, "teacher": teacher, "config": CONFIG})
    backbone, head_name, head, _ = load_teacher(tmp_path / "checkpoint.pth")
    assert torch.equal(backbone.conv1.weight, teacher["backbone.conv1.weight"])
    assert head_name == "projection_heads.projection_head"
    assert torch.equal(head[0].weight, teacher["projection_heads.projection_head.0.weight"])
    said = capsys.readouterr().out
    assert "the teacher is taken" in said and "--key" not in said


@pytest.mark.parametrize("loss, stage", [("barlow", "pretrain"), ("barlow", "barlow"), ("seed", "distill")])
def test_networks_without_classes_give_their_backbone(loss, stage, tmp_path):
    """Barlow Twins' of today and of `pretrain.py --loss barlow`, and SEED's student."""
    config = CONFIG | {"loss": loss, "embedding_dim": 8}
    network = build_network(config)
    save_checkpoint(tmp_path / "c.pth", {"model": network.state_dict(), "config": config, "stage": stage})
    assert_holds(load_pretrained(tmp_path / "c.pth")[0], network.backbone.state_dict())
    with pytest.raises(UserError, match=f"holds no classes, because its loss was {loss}"):
        load_twist(tmp_path / "c.pth")


def test_a_stage_of_ones_own_is_read_as_one_that_pretrains(tmp_path):
    network = build_network(CONFIG)
    save_checkpoint(tmp_path / "c.pth", {"model": network.state_dict(), "config": CONFIG, "stage": "mine"})
    assert_holds(load_twist(tmp_path / "c.pth")[0], network.state_dict())


def test_other_files_need_an_arch_and_are_of_pictures(tmp_path):
    torch.save(NET, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="--arch: .*backbone.pth is no training checkpoint of this project"):
        load_pretrained(tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="--arch: unknown arch"):
        load_pretrained(tmp_path / "backbone.pth", "resnet7")
    backbone, config = load_pretrained(tmp_path / "backbone.pth", "resnet8")
    assert_holds(backbone, NET)
    assert input_of(config) == PICTURES and config["arch"] == "resnet8" and config["data"] is None
    torch.save(SMALL, tmp_path / "small.pth")
    assert_holds(load_pretrained(tmp_path / "small.pth", "resnet8", small_images=True)[0], SMALL)


# ---------------------------------------------------------------- export.py
def exported(here, tmp_path, state, arch, layout):
    torch.save({"state_dict": under("module.", state)}, tmp_path / "file.pth")
    output = tmp_path / f"{arch}.{layout}"
    here(f"export.py --checkpoint {tmp_path}/file.pth --arch {arch} --format {layout} --output {output}")
    return output


@pytest.mark.parametrize("state, arch, layout", [(R18, "resnet18", "torchvision"), (R18, "resnet18", "timm"),
                                                 (VIT, "vit_t", "timm")])
def test_export_and_back(state, arch, layout, tmp_path, here):
    output = exported(here, tmp_path, state, arch, layout)
    assert_holds(load_pretrained(output, arch)[0], state)
    if layout == "torchvision":
        model = torchvision.models.resnet18()
        result = model.load_state_dict(torch.load(output, weights_only=True), strict=False)
        assert result.missing_keys == ["fc.weight", "fc.bias"] and result.unexpected_keys == []
        assert_holds(model, state | model.fc.state_dict(prefix="fc."))


def test_the_lines_of_the_docs_load_an_export_into_torchvision(tmp_path, here, monkeypatch):
    """Those of export.py's docstring, and the same ones in docs/weights.md."""
    network = build_twist(CONFIG | {"arch": "resnet18"})
    save_checkpoint(tmp_path / "checkpoint.pth", {"model": network.state_dict(), "config": CONFIG | {
        "arch": "resnet18"}})
    command = re.search(r"python (export.py .*resnet18.pth)", export.__doc__)[1]
    lines = re.findall(r"^    (network.*)$", export.__doc__, re.MULTILINE)
    page = (ROOT / "docs/weights.md").read_text()
    assert len(lines) == 2 and "\n".join(lines) in page and f"python {command}\n" in page
    here(command.replace("runs/resnet18", str(tmp_path)).replace("--output ", f"--output {tmp_path}/"))
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "torchvision": torchvision}
    exec("\n".join(lines), names)
    loaded = names["network"].state_dict()
    assert_holds(network.backbone, {name: value for name, value in loaded.items() if "fc." not in name})


def test_export_to_detectron2_and_back(tmp_path, here):
    with open(exported(here, tmp_path, R18, "resnet18", "detectron2"), "rb") as file:
        content = pickle.load(file)
    arrays = content.pop("model")
    assert content == {"__author__": "TWIST", "matching_heuristics": True}
    assert all(type(array) is np.ndarray for array in arrays.values())
    for ours_, theirs in (("conv1.weight", "stem.conv1.weight"), ("bn1.weight", "stem.conv1.norm.weight"),
                          ("layer1.0.conv2.weight", "res2.0.conv2.weight"),
                          ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
                          ("layer2.0.downsample.1.bias", "res3.0.shortcut.norm.bias"),
                          ("layer4.1.bn2.running_var", "res5.1.conv2.norm.running_var")):
        assert np.array_equal(arrays[theirs], R18[ours_]), theirs
    back = {}
    for name, array in arrays.items():
        name = re.sub(r"conv(\d)\.norm", r"bn\1", name.removeprefix("stem."))
        name = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", name)
        name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        back[name] = torch.tensor(array)
    torch.save(back, tmp_path / "back.pth")
    backbone = build_backbone("resnet18")
    assert load_backbone(backbone, tmp_path / "back.pth").left_over == []
    assert_holds(backbone, R18)


def test_export_of_a_run_and_what_it_refuses(ours, tmp_path, here):
    out = tmp_path / "out.pth"
    command = f"export.py --checkpoint {ours} --format torchvision --output {out}"
    (tmp_path / "mine.pth").write_text("mine")
    for change, named in ((f"--output {tmp_path}/mine.pth", "mine.pth: exists already"),
                          (f"--output {tmp_path}/none/out.pth", "there is no folder"),
                          ("--format detectron2", "--format detectron2: its ResNets have a 7×7 stem"),
                          ("--key teacher", "has no 'teacher'"),
                          ("--arch resnet18", "--arch resnet18"),
                          (f"--checkpoint {tmp_path}/none.pth", "no such checkpoint")):
        _, error = here(f"{command} {change}", code=2)
        assert named in error and error.count("\n") == 1, error
    assert (tmp_path / "mine.pth").read_text() == "mine" and not out.exists()
    here(command)
    assert_holds(load_pretrained(out, "resnet8")[0], load_twist(ours)[0].backbone.state_dict())


@pytest.mark.parametrize("arch, layout, others", [("vit_t", "timm", ("torchvision", "detectron2")),
                                                  ("mobilenet_v3_large", "torchvision", ("timm",))])
def test_a_format_without_the_network_is_refused(arch, layout, others, tmp_path, here):
    torch.save(build_backbone(arch).state_dict(), tmp_path / "file.pth")
    command = f"export.py --checkpoint {tmp_path}/file.pth --arch {arch} --output {tmp_path}/out"
    for other in others:
        _, error = here(f"{command} --format {other}", code=2)
        assert f"--format {other}: has no {arch}" in error and error.count("\n") == 1
    here(f"{command} --format {layout}")


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_export_of_either_network_of_a_momentum_run(key, ours, tmp_path, here):
    model = torch.load(ours, weights_only=True)["model"]
    teacher = {name: value + 1 for name, value in model.items()}
    save_checkpoint(tmp_path / "run.pth", {"model": model, "teacher": teacher, "config": CONFIG})
    out, _ = here(f"export.py --checkpoint {tmp_path}/run.pth --format torchvision --key {key} "
                  f"--output {tmp_path}/out.pth")
    assert f"the {key} is taken" in out
    weight = torch.load(tmp_path / "out.pth", weights_only=True)["conv1.weight"]
    assert torch.equal(weight, (teacher if key == "teacher" else model)["backbone.conv1.weight"])


# ---------------------------------------------------------------- workers
@pytest.mark.parametrize("chosen", [None, "spawn"])
def test_workers_are_forks_unless_another_start_is_chosen(chosen, monkeypatch):
    """On Linux. From Python 3.14 on, multiprocessing does not fork by default."""
    said = []
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: chosen)
    monkeypatch.setattr(multiprocessing, "set_start_method", said.append)
    with pytest.raises(SystemExit):
        launch(lambda args: 0, argparse.ArgumentParser(), [])
    assert said == (["fork"] if not chosen and sys.platform == "linux" else [])


# ---------------------------------------------------------------- a run's folder
def test_a_folder_is_its_newest_readable_checkpoint(ours, tmp_path, capfd):
    state = torch.load(ours, weights_only=True)
    later = {name: value + 1 for name, value in state["model"].items()}
    with pytest.raises(UserError, match=f"^{tmp_path}: a folder without a run's checkpoint.pth; name a "):
        load_twist(tmp_path)
    save_checkpoint(tmp_path / "checkpoint.pth", {"model": state["model"], "config": CONFIG})
    assert_holds(load_twist(tmp_path)[0], state["model"])
    save_checkpoint(tmp_path / "checkpoint.pth", {"model": later, "config": CONFIG})
    assert_holds(load_twist(tmp_path)[0], later)
    assert_holds(load_pretrained(tmp_path)[0], load_twist(tmp_path)[0].backbone.state_dict())
    assert_holds(load_teacher(tmp_path)[0], load_twist(tmp_path)[0].backbone.state_dict())
    (tmp_path / "checkpoint.pth").rename(tmp_path / "checkpoint.pth.new")         # a save in its middle
    assert_holds(load_twist(tmp_path)[0], state["model"])
    assert capfd.readouterr().err == ""
    (tmp_path / "checkpoint.pth").write_bytes(b"PK")
    assert_holds(load_twist(tmp_path)[0], state["model"])
    assert f"{tmp_path}/checkpoint.pth: not a readable" in capfd.readouterr().err
    assert (tmp_path / "checkpoint.pth").read_bytes() == b"PK"                    # nothing is moved
    (tmp_path / "checkpoint.prev.pth").unlink()
    with pytest.raises(UserError, match="checkpoint.pth: not a readable checkpoint"):
        load_twist(tmp_path)


@pytest.mark.parametrize("command", ["cluster_eval.py", "selflabel.py"])
def test_a_bare_backbone_for_a_whole_network_is_refused(command, straight, here, tmp_path):
    out = straight("pretrain").out
    _, error = here(f"{command} --checkpoint {out}/backbone.pth --output-dir {tmp_path}/out", code=2)
    assert "no 'model' and 'config' in it); use the checkpoint.pth of a run" in error
    assert error.count("\n") == 1


def test_stages_take_the_folder_of_a_run(straight, here, tmp_path):
    out = straight("pretrain").out
    for command in ("knn.py --k 5", "cluster_eval.py"):
        for name in ("folder", "file"):
            path = out if name == "folder" else out / "checkpoint.pth"
            here(f"{command} --checkpoint {path} --output-dir {tmp_path}/{command[:3]}{name}")
        folder, file = (metrics_of(tmp_path / f"{command[:3]}{name}") for name in ("folder", "file"))
        assert folder.pop("checkpoint") == str(out) and file.pop("checkpoint") and folder == file
    said, _ = here(f"pretrain.py {straight('pretrain').flags} --resume {out} --output-dir {tmp_path}/again")
    assert "this run is finished" in said


# ---------------------------------------------------------------- --key
def test_every_evaluation_takes_the_network_of_key_and_says_which(straight, here, tmp_path):
    """Of a run with --ema; backbones, and in cluster_eval.py the whole network."""
    out, found = straight("pretrain").out, {}
    commands = {"knn.py": "--k 300 --temperature 0.01", "lincls.py": "--epochs 1 --lrs 0.1",
                "cluster_eval.py": "", "semisup.py": "--epochs 1 --label-fraction 0.5",
                "export.py": "--format torchvision"}
    for script, flags in commands.items():
        for key in ("teacher", "student"):
            place = tmp_path / f"{script}-{key}"
            flag = "--output" if script == "export.py" else "--output-dir"
            said, _ = here(f"{script} --checkpoint {out} --key {key} {flags} {flag} {place}")
            assert f"the {key} is taken" in said
            found[key] = place.read_bytes() if place.is_file() else metrics_of(place)
        assert found["teacher"] != found["student"] or script == "knn.py"         # there all are right


# ---------------------------------------------------------------- checkpoints of TWIST's released code
def released(network, teacher=None, prefix="", old=False):
    """What TWIST's train.py saves; old: with the head's names of an early version."""
    def renamed(state):
        names = {"last_linear": "cls_heads.0.0", "projection_heads.norm": "projection_heads.cls_heads.0.1"}
        return under(prefix, replaced(names, state) if old else state)
    state = {"model": renamed(network.state_dict()), "backbone": dict(network.backbone.state_dict()),
             "optimizer": SGD, "epoch": 3, "args": argparse.Namespace(backbone="resnet50", dim=12, lr=0.1)}
    if teacher is not None:
        state["teacher"] = renamed(teacher.state_dict())
        state["teacher_backbone"] = dict(teacher.backbone.state_dict())
    return state


def twist(arch, seed, nbs=True):
    torch.manual_seed(seed)
    network = build_twist(CONFIG | dict(arch=arch, num_classes=12, hidden_dim=24, nbs=nbs))
    for name, value in network.state_dict().items():
        if "running" in name or name.endswith("bias"):
            value.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize("layout", [dict(), dict(prefix="module."), dict(old=True)])
def test_a_released_checkpoint_is_a_whole_network(layout, tmp_path, capsys):
    network = twist("resnet8", 1)
    torch.save(released(network, **layout), tmp_path / "twist.pth")
    found, config = load_twist(tmp_path / "twist.pth")
    assert_holds(found, network.state_dict())                   # with NBS's running statistics
    assert f"{tmp_path}/twist.pth: a checkpoint of TWIST's released code; resnet8, 12 classes" \
        in capsys.readouterr().out
    assert (config["arch"], config["num_classes"], config["hidden_dim"]) == ("resnet8", 12, 24)
    assert input_of(config) == PICTURES
    images = [torch.rand(2, 3, 32, 32)]
    assert torch.equal(found.eval()(images), network.eval()(images))
    assert_holds(load_pretrained(tmp_path / "twist.pth")[0], network.backbone.state_dict())
    _, head_name, head, _ = load_teacher(tmp_path / "twist.pth")
    assert head_name == "projection_heads.projection_head" and len(head[0].weight) == 24


@pytest.mark.parametrize("key", [None, "student"])
def test_a_released_checkpoint_with_a_momentum_encoder(key, tmp_path):
    student, teacher = twist("vit_t", 1), twist("vit_t", 2)
    torch.save(released(student, teacher), tmp_path / "twist.pth")
    expected = student if key == "student" else teacher
    assert_holds(load_twist(tmp_path / "twist.pth", key)[0], expected.state_dict())
    assert_holds(load_pretrained(tmp_path / "twist.pth", key=key)[0], expected.backbone.state_dict())
    assert_holds(load_pretrained(tmp_path / "twist.pth", "vit_t")[0], teacher.backbone.state_dict())


@pytest.mark.parametrize("arch", ["resnet50", "resnet50w2", "vit_s", "vit_b"])
def test_the_arch_of_a_released_checkpoint_is_that_of_its_tensors(arch, monkeypatch):
    """Of the paper's networks, by names and shapes alone."""
    with torch.device("meta"):
        network = build_twist(CONFIG | dict(arch=arch, num_classes=4096, hidden_dim=4096))
    config = pretrained.read_published(released(network), "twist.pth")["config"]
    assert (config["arch"], config["num_classes"], config["nbs"]) == (arch, 4096, True)


def test_a_released_checkpoint_without_nbs_or_of_another_network(tmp_path):
    torch.save(released(twist("resnet8", 1, nbs=False)), tmp_path / "twist.pth")
    assert load_twist(tmp_path / "twist.pth")[1]["nbs"] is False
    state = released(twist("resnet8", 1))
    state["model"]["backbone.conv1.weight"] = torch.ones(7, 3, 5, 5)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: looks like a checkpoint of TWIST's released code, but"):
        load_twist(tmp_path / "other.pth")
    for change in ({"model": [1]}, {"model": {"projection_heads.last_linear.bias": 3}}, {"model": None}):
        torch.save(state | change, tmp_path / "odd.pth")
        with pytest.raises(UserError, match="odd.pth: not a checkpoint of this project"):
            load_twist(tmp_path / "odd.pth")


def test_the_second_stage_and_the_classes_of_a_released_checkpoint(tmp_path, here):
    torch.save(released(twist("resnet8", 1), twist("resnet8", 2)), tmp_path / "twist.pth")
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        torchvision.utils.save_image(torch.rand(3, 20, 20), tmp_path / f"pictures/{i}.png")
    command = f"--checkpoint {tmp_path}/twist.pth --data {tmp_path}/pictures"
    said, _ = here(f"cluster_eval.py {command} --key student --output-dir {tmp_path}/classes")
    assert "the student is taken" in said and metrics_of(tmp_path / "classes")["num_clusters"] == 12
    here(f"selflabel.py {command} --image-size 32 --batch-size 8 --ema 0.9 --workers 0 "
         f"--output-dir {tmp_path}/second")
    config = load_pretrained(tmp_path / "second")[1]
    assert input_of(config)[0] == 32 and list(input_of(config)[1]) == list(PICTURES[1])
    for script in ("cluster_eval.py", "selflabel.py", "knn.py"):
        _, error = here(f"{script} --checkpoint {tmp_path}/twist.pth --output-dir {tmp_path}/none", code=2)
        assert "--data: " in error and "does not say on what it was trained" in error


# ---------------------------------------------------------------- pretrain.py --init
INIT = ("pretrain.py --data fake --image-size 16 --batch-size 256 --epochs 1 --restarts 1 --knn-every 0 "
        "--device cpu --lr 0")


def started(here, flags, out):
    """What a run without learning says, and the weights that it started from."""
    said, _ = here(f"{INIT} {flags} --output-dir {out}")
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    moving = ("running_mean", "running_var", COUNTER)
    return said, {name: value for name, value in state["model"].items() if not name.endswith(moving)}, state


def taken(weights, state):
    """Which of a run's weights are those of a state dict."""
    return {name for name in weights if name in state and torch.equal(weights[name], state[name])}


def test_init_takes_the_whole_network_of_a_run(network, here, tmp_path):
    whole = torch.load(network, weights_only=True)
    flags = "--hidden-dim {hidden_dim} --num-classes {num_classes}".format(**whole["config"])
    said, weights, state = started(here, f"{flags} --init {network} --ema 0.9", tmp_path / "a")
    assert f"--init {network}: backbone and head start from it" in said
    assert taken(weights, whole["model"]) == weights.keys() == taken(weights, state["teacher"])
    assert state["config"]["init"] == str(network)
    said, weights, _ = started(here, f"{flags} --init {tmp_path}/a", tmp_path / "b")       # a run's folder
    assert "the teacher is taken" in said and taken(weights, whole["model"]) == weights.keys()


def test_init_takes_the_backbone_if_the_head_differs(network, here, tmp_path):
    whole = torch.load(network, weights_only=True)["model"]
    said, weights, _ = started(here, f"--num-classes 7 --init {network}", tmp_path / "a")
    assert "the backbone starts from it, the head anew, as its own differs (misshapen: " in said
    assert taken(weights, whole) >= {name for name in weights if name.startswith("backbone.")}
    assert not any(name.startswith("projection_heads") and name.endswith("0.weight")
                   for name in taken(weights, whole))


def test_init_takes_any_projects_backbone(here, tmp_path):
    torch.save({"state_dict": under("module.encoder_q.", NET | FC)}, tmp_path / "moco.pth")
    said, weights, _ = started(here, f"--init {tmp_path}/moco.pth", tmp_path / "a")
    assert f"--init {tmp_path}/moco.pth: the backbone starts from it, the head anew" in said
    assert taken(weights, under("backbone.", NET)) == {
        name for name in weights if name.startswith("backbone.")}


def test_a_resumed_run_does_not_read_init_again(network, here, tmp_path):
    flags = f"{INIT} --init {tmp_path}/gone.pth --save-every 1 --output-dir {tmp_path}/run"
    (tmp_path / "gone.pth").write_bytes(network.read_bytes())
    here(flags)
    (tmp_path / "gone.pth").unlink()
    said, _ = here(flags)
    assert "this run is finished" in said and "start from it" not in said
    _, error = here(flags.replace("--epochs 1", "--epochs 2"), code=2)
    assert (f"to go on with its weights, add --init {tmp_path}/run to another --output-dir" in error
            and "epochs was 1, is 2" in error and error.count("\n") == 1)
    _, error = here(flags.replace("gone.pth", "other.pth"), code=2)
    assert "init was" in error


def test_init_that_does_not_fit_is_refused_before_anything_is_written(network, here, tmp_path):
    before = network.read_bytes()
    torch.save(R18, tmp_path / "r18.pth")
    for flags, named in (
            (f"--init {network} --restarts 3", "--restarts 3: all would start from --init; use --restarts 1"),
            (f"--init {network} --arch resnet18", "its resnet8 is not this --arch resnet18"),
            (f"--init {tmp_path}/r18.pth", "r18.pth: "),
            (f"--init {tmp_path}/none.pth", "no such checkpoint")):
        _, error = here(f"{INIT} {flags} --output-dir {tmp_path}/run", code=2)
        assert named in error and error.count("\n") == 1 and not (tmp_path / "run").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/checkpoint.pth").write_bytes(before)
    _, error = here(f"{INIT} --init {tmp_path}/none.pth --overwrite --output-dir {tmp_path}/old", code=2)
    assert (tmp_path / "old/checkpoint.pth").read_bytes() == before
    here(f"{INIT} --init {tmp_path}/old --hidden-dim 32 --overwrite --output-dir {tmp_path}/old")    # its own
