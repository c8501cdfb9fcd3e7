"""Every recipe: it parses, its numbers are the published ones, and it trains two steps.

    pytest tests/test_recipes.py
"""

import importlib
import shlex
import signal
from pathlib import Path

import pytest
import torch

from checkpoint import parse_args, run, save_checkpoint
from model import build_twist

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.txt"))}

LARS = dict(optimizer="lars", momentum=0.9, weight_decay=1.5e-6, weight_decay_end=None, eps=1e-5, alpha=1,
            beta=1, ema=0, clip_norm=0, hidden_dim=4096, nbs=True, amp="fp16", drop_path=0)
VIT = dict(optimizer="adamw", momentum=0.9, beta2=0.999, weight_decay=0.06, alpha=0.4, beta=1, ema=0.996,
           clip_norm=3, hidden_dim=4096, num_classes=4096, nbs=True, batch_size=1024, bunch_size=256,
           views="multicrop", epochs=300, warmup_epochs=10, amp="fp16")
SELF_LABEL = dict(optimizer="lars", momentum=0.9, weight_decay=1.5e-6, views="selflabel", num_local=12,
                  quantile=0.5, quantile_end=0.6, epochs=50, warmup_epochs=5, ema=0)
LINEAR = dict(weight_decays=[0], batch_size=1024, epochs=100, min_scale=0.08, held_out=0)
# What was published, run by run; `peak` is the learning rate that training reaches.
PUBLISHED = {
    "resnet50_two_views": dict(LARS, arch="resnet50", views="barlow", num_local=0, num_classes=32768,
                               bunch_size=256, batch_size=2048, epochs=800, warmup_epochs=10, peak=4.0),
    "resnet50_multicrop": dict(LARS, arch="resnet50", views="multicrop", num_local=12, num_classes=4096,
                               bunch_size=256, batch_size=2048, epochs=800, warmup_epochs=10, peak=4.0),
    "resnet50_selflabel": dict(SELF_LABEL, bunch_size=256, batch_size=2048, peak=0.4),
    "resnet50w2_multicrop": dict(LARS, arch="resnet50w2", views="multicrop", num_local=12, num_classes=4096,
                                 bunch_size=240, batch_size=1920, epochs=200, warmup_epochs=10, peak=3.75),
    "resnet50w2_selflabel": dict(SELF_LABEL, bunch_size=240, batch_size=1920, peak=0.375),
    "vit_s": dict(VIT, arch="vit_s", num_local=6, weight_decay_end=0.12, drop_path=0, peak=1.2e-3),
    "vit_b": dict(VIT, arch="vit_b", num_local=10, weight_decay_end=None, drop_path=0.1, peak=3e-3),
    "resnet50_1000_classes": dict(arch="resnet50", num_classes=1000, epochs=800),
    "resnet50_lincls": dict(LINEAR, peak=0.2),
    "vit_s_lincls": dict(LINEAR, n_last_blocks=4, mean_of_patches=False, peak=0.08),
    "vit_b_lincls": dict(LINEAR, n_last_blocks=4, mean_of_patches=False, peak=0.006),
    **{f"{arch}_semisup_1": dict(label_fraction=0.01, epochs=20, peak=0.04, head_lr=0.2, batch_size=256)
       for arch in ("resnet50", "resnet50w2", "vit_b")},
    **{f"{arch}_semisup_10": dict(label_fraction=0.1, epochs=20, peak=0.02, head_lr=0.2, batch_size=256)
       for arch in ("resnet50", "resnet50w2", "vit_b")},
    **{f"{arch}_semisup_100": dict(label_fraction=1, epochs=30, peak=0.01, head_lr=0.2, batch_size=256)
       for arch in ("resnet50", "resnet50w2", "vit_b")},
}
OURS = {"fashion_mnist", "fashion_mnist_representation", "fashion_mnist_selflabel", "fashion_mnist_lincls",
        "fashion_mnist_semisup_1", "fashion_mnist_semisup_10", "cifar10", "stl10"}
SMALL = {       # what makes a stage small enough for a test, and 512 pictures two steps
    "pretrain": "--data fake --image-size 32 --local-size 16 --hidden-dim 16 --num-classes 12 --bunch-size 0 "
                "--batch-size 256 --epochs 1 --warmup-epochs 1 --knn-every 0 --amp off",
    "selflabel": "--local-size 16 --num-local 2 --batch-size 256 --bunch-size 0 --epochs 1 --amp off",
    "lincls": "--batch-size 230 --epochs 1",        # a tenth may be held out
    "semisup": "--label-fraction 0.5 --batch-size 128 --epochs 1",
}


def stage_of(recipe):
    """The script that a recipe is for stands in its first line."""
    name, script = RECIPES[recipe].read_text().split(":")[0].split()
    assert name == "#" and (ROOT / script).exists(), recipe
    return importlib.import_module(script.removesuffix(".py"))


def parsed(recipe, *more):
    module = stage_of(recipe)
    needs = ["--checkpoint", "FILE"] if module.__name__ != "pretrain" else []
    return parse_args(module.get_parser(), [f"@{RECIPES[recipe]}", *needs, *more])


def test_every_recipe_is_known():
    assert set(RECIPES) == set(PUBLISHED) | OURS


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_numbers_are_the_published_ones(recipe):
    args = vars(parsed(recipe))
    rates = args.get("lrs") or [args["lr"]]
    args["peak"] = rates[0] * args["batch_size"] / 256
    for key, value in PUBLISHED[recipe].items():
        assert args[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert len(rates) == 1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A small network of each kind, untrained."""
    folder = tmp_path_factory.mktemp("networks")
    for arch in ("resnet8", "vit_t"):
        config = {"arch": arch, "num_classes": 12, "hidden_dim": 16, "bunch_size": 0, "nbs": True, "seed": 0,
                  "small_images": False, "data": "fake", "image_size": 32, "mean": None, "std": None}
        torch.manual_seed(0)
        save_checkpoint(folder / f"{arch}.pth", {"model": build_twist(config).state_dict(), "config": config})
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(recipe, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    module = stage_of(recipe)
    stage, arch = module.__name__, "vit_t" if recipe.startswith("vit") else "resnet8"
    flags = shlex.split(SMALL[stage])
    if stage == "pretrain":
        flags += ["--arch", arch, "--num-local", str(min(2, parsed(recipe).num_local))]
    else:
        flags += ["--checkpoint", str(checkpoints / f"{arch}.pth")]
    with pytest.raises(SystemExit) as end:
        run(module.main, module.get_parser(), [f"@{RECIPES[recipe]}", *flags, "--output-dir", str(tmp_path)])
    assert not end.value.code
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["step"] == 2
