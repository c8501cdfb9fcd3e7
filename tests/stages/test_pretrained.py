"""The flags that name an evaluation's network: one group in each of them, and the input that they give."""

import argparse

import pytest
import torch
from processes import ROOT, metrics_of
from test_layout import STAGES as SCRIPTS
from test_layout import flags_of, meaning

from checkpoint import UserError, load_checkpoint
from data import PICTURES, input_of
from model import build_backbone
from pretrained import choose_input, load_network, network_flags

EVALUATIONS = [name for name in SCRIPTS if "network_flags(" in (ROOT / name).read_text()]
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
    with pytest.raises(UserError, match=f"^{flag}: one number for all channels or three$"):
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
                          ("other", "--image-size 2 --mean 1e9 --std 1e9")):
        said[name], _ = here(f"{command} {flags} {changed} --output-dir {tmp_path}/{name}")
    assert "input: 2 × 2 pixels, mean 1e+09, std 1e+09 (--image-size, --mean, --std)" in said["other"]
    assert "input: 16 × 16 pixels, mean 0.5, std 0.25" in said["own"]
    assert metrics_of(tmp_path / "own") == metrics_of(tmp_path / "same")
    assert metrics_of(tmp_path / "own") != metrics_of(tmp_path / "other")
