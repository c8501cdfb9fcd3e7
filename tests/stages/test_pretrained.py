"""The flags that name an evaluation's network: one group in each of them, and the input that they give."""

import argparse
import json

import pytest
import torch
from processes import ROOT, metrics_of, same
from test_layout import STAGES as SCRIPTS
from test_layout import flags_of, meaning

import model
from checkpoint import UserError, load_checkpoint, save_checkpoint
from data import PICTURES, input_of
from model import build_backbone
from pretrained import choose_input, description, load_network, load_pretrained, load_twist, network_flags

EVALUATIONS = [name for name in SCRIPTS if "network_flags(" in (ROOT / name).read_text()]
TINY = dict(arch="resnet8", num_classes=3, hidden_dim=4, bunch_size=0, nbs=True, small_images=False,
            loss="twist", seed=0, data=None, image_size=32)
FLAGS = ("--checkpoint", "--key", "--arch", "--small-images", "--image-size", "--mean", "--std")


def args_of(flags):
    parser = argparse.ArgumentParser()
    network_flags(parser)
    return parser.parse_args(str(flags).split())


def test_the_flags_of_the_network_mean_the_same_in_all_evaluations():
    assert {"knn.py", "lincls.py", "semisup.py", "svm.py", "export.py"} <= set(EVALUATIONS)
    expected = argparse.ArgumentParser()
    network_flags(expected, required=False)
    expected = {flag: action for action in expected._actions for flag in action.option_strings}
    for script in EVALUATIONS:
        for flag in FLAGS:
            found = flags_of(script)[flag]
            assert meaning(found) == meaning(expected[flag]) and found.help == expected[flag].help


def test_the_input_is_the_checkpoints(network, capsys):
    backbone, config = load_network(args_of(f"--checkpoint {network}"))
    assert input_of(config) == (16, [0.5], [0.25])
    assert capsys.readouterr().out == f"input: 16 × 16 pixels, mean 0.5, std 0.25 (from {network})\n"


@pytest.mark.parametrize("flags, found, said", [
    ("--image-size 20", (20, [0.5], [0.25]), "20 × 20 pixels, mean 0.5, std 0.25 (--image-size, from {0})"),
    ("--mean 0.1 0.2 0.3", (16, [0.1, 0.2, 0.3], [0.25]), "mean 0.1 0.2 0.3, std 0.25 (--mean, from {0})"),
    ("--mean 0 --std 1 --image-size 8", (8, [0.0], [1.0]),
     "8 × 8 pixels, mean 0, std 1 (--image-size, --mean, --std)\n")])
def test_flags_override_the_input_of_the_file(flags, found, said, network, capsys):
    _, config = load_network(args_of(f"--checkpoint {network} {flags}"))
    assert input_of(config) == found
    assert said.format(network) in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--mean", "--std"])
def test_two_means_are_refused(flag, network):
    with pytest.raises(UserError, match=f"^{flag}: must be one number for all channels or three"):
        choose_input(load_checkpoint(network)["config"], args_of(f"--checkpoint {network} {flag} 0.5 0.5"))


def test_a_file_without_a_description_has_imagenets_input_and_says_so(tmp_path, capsys):
    torch.save(build_backbone("resnet8").state_dict(), tmp_path / "other.pth")
    _, config = load_network(args_of(f"--checkpoint {tmp_path}/other.pth --arch resnet8"))
    assert input_of(config)[0] == PICTURES[0] and input_of(config)[1] == list(PICTURES[1])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (f"input: 224 × 224 pixels, mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (ImageNet's, as "
                    f"{tmp_path}/other.pth does not say)")


@pytest.mark.parametrize("command", [
    "knn.py --k 5", "lincls.py --epochs 1 --lrs 0.1", "semisup.py --epochs 1 --label-fraction 0.5"])
def test_an_evaluation_takes_the_input_of_the_flags(command, network, here, tmp_path):
    flags = f"--checkpoint {network} --device cpu"
    said = {}
    for name, changed in (("own", ""), ("same", "--image-size 16 --mean 0.5 --std 0.25"),
                          ("other", "--image-size 1 --mean 0 --std 1")):
        said[name], _ = here(f"{command} {flags} {changed} --output-dir {tmp_path}/{name}")
    assert "input: 1 × 1 pixels, mean 0, std 1 (--image-size, --mean, --std)" in said["other"]
    assert "input: 16 × 16 pixels, mean 0.5, std 0.25" in said["own"]
    assert metrics_of(tmp_path / "own") == metrics_of(tmp_path / "same")
    assert metrics_of(tmp_path / "own") != metrics_of(tmp_path / "other")


# ---------------------------------------------------------------- what stands beside a bare backbone
@pytest.fixture
def bare(tmp_path):
    """A bare backbone of a run on 20 pixels, with its description."""
    config = {"arch": "resnet8", "small_images": True, "data": "cifar10", "seed": 3, "image_size": 20}
    torch.save(build_backbone("resnet8", small_images=True).state_dict(), tmp_path / "backbone.pth")
    (tmp_path / "backbone.json").write_bytes(description(config, *input_of(config)))
    return tmp_path / "backbone.pth"


def test_a_bare_backbone_needs_no_arch_beside_its_description(bare, capsys):
    backbone, config = load_network(args_of(f"--checkpoint {bare}"))
    assert backbone.conv1.kernel_size == (3, 3) and config["arch"] == "resnet8"
    assert input_of(config) == (20, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    assert (config["data"], config["seed"]) == ("cifar10", 3)
    assert f"input: 20 × 20 pixels, mean 0.4914 0.4822 0.4465, std 0.247 0.2435 0.2616 (from {bare.parent}/" \
        "backbone.json)" in capsys.readouterr().out
    load_pretrained(bare, arch="resnet8", small_images=True)
    with pytest.raises(UserError, match=r"--arch resnet18: .*backbone.pth holds a resnet8; leave --arch out"):
        load_pretrained(bare, arch="resnet18")


def test_an_arch_that_cannot_be_built_without_memory_is_read_all_the_same(tmp_path, monkeypatch):
    """torchvision's RegNet reads numbers of tensors while it is built."""
    monkeypatch.setattr(model, "ARCHS", (*model.ARCHS, "regnet_y_400mf"))
    config = TINY | dict(arch="regnet_y_400mf")
    network = model.build_network(config)
    save_checkpoint(tmp_path / "checkpoint.pth", dict(model=network.state_dict(), config=config))
    found, _ = load_twist(tmp_path / "checkpoint.pth")
    assert same(found.state_dict(), network.state_dict())
    with pytest.raises(UserError, match="--arch resnet18: .*holds a regnet_y_400mf; leave --arch out"):
        load_twist(tmp_path / "checkpoint.pth", arch="resnet18")


def test_a_network_with_parts_of_its_own_points_to_its_backbone(tmp_path):
    state = dict(model.build_network(TINY).state_dict(), extra=torch.zeros(1))
    save_checkpoint(tmp_path / "checkpoint.pth", dict(model=state, config=TINY))
    with pytest.raises(UserError, match=r"unexpected: extra\); use another file"):
        load_twist(tmp_path / "checkpoint.pth")
    (tmp_path / "backbone.pth").touch()
    with pytest.raises(UserError, match=r"unexpected: extra\); use .*backbone.pth, its backbone"):
        load_twist(tmp_path / "checkpoint.pth")


def test_a_stem_that_the_description_denies_is_refused(bare):
    about = json.loads(bare.with_suffix(".json").read_text())
    torch.save(build_backbone("resnet8").state_dict(), bare)
    bare.with_suffix(".json").write_text(json.dumps(about | {"small_images": False}))
    load_pretrained(bare)
    with pytest.raises(UserError, match="--small-images: .* has no such stem"):
        load_pretrained(bare, small_images=True)


@pytest.mark.parametrize("change", [
    dict(arch="resnet7"), dict(arch=8), dict(arch=["resnet8"]), dict(small_images=1), dict(image_size=0),
    dict(image_size=True), dict(image_size=10 ** 30), dict(image_size=2.5), dict(mean=0.5), dict(mean=[1, 2]),
    dict(mean=["0.5"]), dict(mean=[float("nan")]), dict(std=[0.0]), dict(std=[float("inf")]), dict(std=[[1]]),
    dict(data=7), dict(seed=-1), dict(seed=1e3), dict(arch="vit_t", small_images=True), dict(val_share=2),
    dict(group_names="yes"), dict(classes="all"), dict(classes=[1])])
def test_a_wrong_description_is_one_line(change, bare):
    about = json.loads(bare.with_suffix(".json").read_text())
    bare.with_suffix(".json").write_text(json.dumps(about | change))
    with pytest.raises(UserError, match="backbone.json: does not describe .*move it") as error:
        load_pretrained(bare)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("content", [
    b"", b"[]", b"7", b"null", b"{}", b"{", b"\xff\xfe", b"[" * 100_000, b" " * 3_000_000,
    b'{"arch": "resnet8"}', b'{"arch": "a\nb"}', b"1" * 5000])
def test_a_damaged_description_is_one_line(content, bare):
    bare.with_suffix(".json").write_bytes(content)
    with pytest.raises(UserError, match="backbone.json: does not describe the backbone in ") as error:
        load_pretrained(bare)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
