"""What a step or a batch asks of a GPU, counted on a device that is not there: launches, waits, bytes."""

import pytest
import torch
from fake_cuda import be_there, run_evaluation, run_stage, run_whole
from PIL import Image

import data
import pretrain
from data import ImageSet
from model import build_backbone
from pretrained import to_device
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
    "segment": ("--checkpoint {network} --num-scenes 24 8 --batch-size 4 --steps 9", 300, 0),
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


@pytest.mark.parametrize("crop_on", ["workers", "device"])
@pytest.mark.parametrize("stage, flags", [
    ("pretrain", "--num-classes 2 --hidden-dim 8 --knn-every 0 --restarts 1"),
    ("lincls", "--checkpoint {network} --held-out 0.2"),
    ("semisup", "--checkpoint {network} --label-fraction 1"),
    ("finetune", "--checkpoint {network} --steps 9")])
def test_a_step_on_picture_files(stage, flags, crop_on, network, pictures, tmp_path, monkeypatch):
    """The views of the last three only crop and mirror, so that workers leave nothing to be done or sent."""
    flags = (f"{flags.format(network=network)} --data {pictures} --image-size 16 --batch-size 4 "
             f"--crop-on {crop_on} --output-dir {tmp_path}/run")
    _, step = run_stage(monkeypatch, stage, flags, steps=2)
    assert len(step["waits"]) <= 3, step["waits"]


@pytest.mark.parametrize("source", ["files", "memory"])
@pytest.mark.parametrize("stage, flags", [
    ("lincls", "--epochs 2 --held-out 0.2"), ("semisup", "--epochs 2 --label-fraction 1"),
    ("finetune", "--steps 5 --validate")])
def test_a_whole_run_mixes_no_devices(stage, flags, source, network, pictures, tmp_path, monkeypatch):
    """With its scores and predictions, whose numbers mean nothing here."""
    data = f"{pictures} --image-size 16 --batch-size 4" if source == "files" else "fake --batch-size 64"
    flags = f"--checkpoint {network} {flags} --data {data} --output-dir {tmp_path}/run"
    assert run_whole(monkeypatch, stage, flags) == 0


# ---------------------------------------------------------------- evaluations
EVALUATIONS = {                  # flags, what works without the device, passes over data
    "knn": ("--k 2", "nearest_neighbours", 2), "cluster_eval": ("", "evaluate", 1),
    "kmeans": ("--kmeans 2", "cluster_features", 2), "embed": ("", "principal_components", 1)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i in range(32):
        path = root / ("train", "val")[i // 16] / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (i, 0, 0)).save(path)
    return root


@pytest.mark.parametrize("source", ["files", "memory"])
@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_batch_of_an_evaluation_waits_for_nothing(name, source, network, pictures, tmp_path, monkeypatch):
    """Once in a pass the rows are waited for, however many batches it has."""
    more, after, passes = EVALUATIONS[name]
    where = f"{pictures} --image-size 16" if source == "files" else "fake"
    waits, launches = [], []
    for size in (8, 4) if source == "files" else (64, 32):
        flags = f"--checkpoint {network} --data {where} --batch-size {size} --output-dir {tmp_path}/out "
        with monkeypatch.context() as patch:
            counter = run_evaluation(patch, name.replace("kmeans", "cluster_eval"), flags + more, after)
        waits.append(len(counter.waits))
        launches.append(counter.launches)
        assert sum(wait.startswith("everything") for wait in counter.waits) == passes
    assert waits[1] <= waits[0] < 100, counter.waits      # the first made the constants of the input
    assert launches[1] > launches[0]


def test_half_precision_moves_fewer_bytes(network, tmp_path, monkeypatch):
    """Of the backbone; and networks to evaluate are channels-last on CUDA alone."""
    found = {}
    for amp in ("off", "bf16"):
        with monkeypatch.context() as patch:
            counter = run_evaluation(patch, "knn", f"--checkpoint {network} --data fake --k 2 --amp {amp} "
                                     f"--output-dir {tmp_path}/{amp}", "nearest_neighbours")
        found[amp] = counter.bytes
    assert found["bf16"] < 0.75 * found["off"]
    assert to_device(build_backbone("resnet8"), "cpu").conv1.weight.is_contiguous()
    counter, translate = be_there(monkeypatch)
    with translate, counter:
        weight = to_device(build_backbone("resnet8"), "cuda").conv1.weight
    assert weight.is_cuda and weight.is_contiguous(memory_format=torch.channels_last)


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
