"""What a step asks of a GPU, counted on a CUDA device that is not there: launches, waits, bytes."""

import pytest
import torch
from fake_cuda import run_stage

import data
import pretrain
from data import ImageSet
from views import UNIFORMS

FAKE = "--data fake --image-size 16 --batch-size 32 --hidden-dim 32"
# Kernel launches of a step at most; and its blocking points.
STAGES = {
    "pretrain": (f"{FAKE} --knn-every 0 --restarts 1 --num-local 2", 900, 0),
    "pretrain, momentum": (f"{FAKE} --knn-every 0 --restarts 1 --ema 0.9 --clip-norm 1", 560, 0),
    "barlow": (f"{FAKE} --knn-every 0 --optimizer lars", 640, 0),
    "selflabel": ("--checkpoint {network} --batch-size 32 --ema 0.9", 520, 1),
    "distill": ("--teacher {network} --batch-size 32 --queue-size 64 --num-local 1", 980, 0),
    "lincls": ("--checkpoint {network} --batch-size 32", 175, 0),
    "semisup": ("--checkpoint {network} --batch-size 32 --label-fraction 1", 225, 0),
    "finetune": ("--checkpoint {network} --data fake --batch-size 32 --steps 9", 225, 0),
}


def launches(step, file):
    return sum(number for line, number in step["by_line"].items() if line.startswith(file))


@pytest.mark.parametrize("name", STAGES)
def test_a_step_waits_for_nothing(name, network, tmp_path, monkeypatch):
    """The first step makes constants. Its successors have at most three blocking points in any stage."""
    flags, most, waits = STAGES[name]
    flags = f"{flags.format(network=network)} --output-dir {tmp_path}/run"
    _, step = run_stage(monkeypatch, name.split(",")[0], flags, steps=2)
    assert len(step["waits"]) == waits <= 3, step["waits"]
    assert step["launches"] <= most, step["launches"]


def test_several_processes_wait_for_nothing(tmp_path, monkeypatch):
    flags = f"{FAKE} --knn-every 0 --restarts 1 --bunch-size 16 --output-dir {tmp_path}/run"
    _, step = run_stage(monkeypatch, "pretrain", flags, 2, world_size=2)
    assert not step["waits"] and step["launches"] <= 900


@pytest.mark.slow
def test_a_published_step_on_eight_gpus(tmp_path, monkeypatch):
    """ResNet-50, multi-crop, 256 images on each of 8 GPUs, beside one GPU with torch's own batch norm.

    2,967 launches beside 1,875, of them 40 of LARS and 389 of the views; 562 GB beside 490; 45.8 GiB at most.
    """
    images = torch.zeros(1, dtype=torch.uint8).expand(8192, 3, 224, 224)
    monkeypatch.setattr(pretrain, "build_dataset", lambda *args, **kwargs: ImageSet(images, None, None))

    def crops(batches, step):
        uniforms = torch.rand(len(batches.views), 256, UNIFORMS)
        return [images[:256, :, :size, :size] for size in [224] * 2 + [96] * 12], uniforms, None
    monkeypatch.setattr(data.Batches, "__getitem__", crops)
    found = {}
    for world_size in (1, 8):
        flags = (f"@recipes/resnet50_multicrop.txt --batch-size {256 * world_size} --knn-every 0 --amp bf16 "
                 f"--output-dir {tmp_path}/{world_size}")
        with monkeypatch.context() as patch:
            _, found[world_size] = run_stage(patch, "pretrain", flags, 2, world_size)
    one, eight = found[1], found[8]
    assert eight["bytes"] <= 1.2 * one["bytes"] and eight["peak"] <= 50 * 2 ** 30
    assert not eight["waits"]
    assert launches(eight, "optim.py") <= 40 and launches(eight, "views.py") <= 400
