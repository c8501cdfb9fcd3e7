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
BARLOW = dict(loss="barlow", arch="resnet50", views="barlow", zero_init_residual=True, hidden_dim=8192,
              lambd=0.0051, batch_size=2048, optimizer="lars", bias_lr=0.024, epochs=1000, warmup_epochs=10,
              weight_decay=1e-6, peak=1.6)
SEED = dict(num_local=6, image_size=224, local_size=96, queue_size=65536, student_temperature=0.2,
            teacher_temperature=1e-4, batch_size=256, optimizer="sgd", schedule="epochs", warmup_epochs=5,
            weight_decay=1e-4, momentum=0.9, milestones=None, views="seed", peak=0.03)
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
    "barlow_twins": BARLOW,
    "barlow_twins_lincls": dict(weight_decays=[1e-6], batch_size=256, epochs=100, milestones=None,
                                nesterov=False, jitter=False, depths=False, held_out=0, peak=0.3),
    "barlow_twins_depths": dict(weight_decays=[1e-4], batch_size=256, epochs=90, milestones=[30, 60, 90],
                                nesterov=True, jitter=True, depths=True, held_out=0, peak=0.01),
    "barlow_twins_knn": dict(k=[10, 20, 100, 200], temperature=0.07),
    "voc07_lowshot": dict(depth=5, samples=5, shots=[1, 2, 4, 8, 16, 32, 64, 96],
                          costs=pytest.approx([0.5 ** n for n in range(19, 3, -1)] + [1, 10, 100])),
    "seed_efficientnet_b0": dict(SEED, arch="efficientnet_b0", teacher_arch="resnet50w2", epochs=800),
    "seed_mobilenet_v3_large": dict(SEED, arch="mobilenet_v3_large", teacher_arch="resnet50w2", epochs=800),
    "seed_resnet50": dict(SEED, arch="resnet50", teacher_arch="resnet50w4", epochs=400),
    "seed_lincls": dict(weight_decays=[0], batch_size=256, epochs=100, milestones=[60, 80], nesterov=False,
                        held_out=0, peak=30),
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
OURS = {"fashion_mnist", "fashion_mnist_barlow", "fashion_mnist_teacher", "fashion_mnist_seed",
        "fashion_mnist_representation", "fashion_mnist_selflabel", "fashion_mnist_lincls",
        "fashion_mnist_semisup_1", "fashion_mnist_semisup_10", "cifar10", "stl10"}
SMALL = {       # what makes a stage small enough for a test, and 512 pictures two steps
    "pretrain": "--data fake --image-size 32 --local-size 16 --hidden-dim 16 --bunch-size 0 --batch-size 256 "
                "--epochs 1 --warmup-epochs 1 --knn-every 0 --amp off",
    "selflabel": "--local-size 16 --num-local 2 --batch-size 256 --bunch-size 0 --epochs 1 --amp off",
    "lincls": "--batch-size 230 --epochs 1",        # a tenth may be held out
    "distill": "--arch resnet8 --teacher-arch resnet8 --image-size 32 --local-size 16 --batch-size 256 "
               "--queue-size 256 --epochs 1 --warmup-epochs 0 --amp off",
    "semisup": "--label-fraction 0.5 --batch-size 128 --epochs 1",
}


def stage_of(recipe):
    """The script that a recipe is for stands in its first line."""
    name, script = RECIPES[recipe].read_text().split(":")[0].split()
    assert name == "#" and (ROOT / script).exists(), recipe
    return importlib.import_module(script.removesuffix(".py"))


def parsed(recipe, *more):
    module = stage_of(recipe)
    needs = {"pretrain": [], "distill": ["--teacher", "FILE"],
             "svm": ["--checkpoint", "FILE", "--data", "VOC"]}
    needs = needs.get(module.__name__, ["--checkpoint", "FILE"])
    return parse_args(module.get_parser(), [f"@{RECIPES[recipe]}", *needs, *more])


def test_every_recipe_is_known():
    assert set(RECIPES) == set(PUBLISHED) | OURS


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_numbers_are_the_published_ones(recipe):
    args = vars(parsed(recipe))
    rates = args.get("lrs") or [args.get("lr", 0)]
    args["peak"] = rates[0] * args.get("batch_size", 0) / 256
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


TRAINED = [recipe for recipe in RECIPES if stage_of(recipe).__name__ in SMALL]


def test_a_recipe_that_trains_nothing(checkpoints, tmp_path):
    """That of svm.py needs VOC: tests/test_svm.py makes a small one."""
    assert set(RECIPES) - set(TRAINED) == {"barlow_twins_knn", "voc07_lowshot"}
    knn = stage_of("barlow_twins_knn")
    with pytest.raises(SystemExit) as end:
        run(knn.main, knn.get_parser(), [f"@{RECIPES['barlow_twins_knn']}", "--checkpoint",
                                         str(checkpoints / "resnet8.pth"), "--output-dir", str(tmp_path)])
    assert not end.value.code and (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("recipe", TRAINED)
def test_two_steps(recipe, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    module = stage_of(recipe)
    stage, arch = module.__name__, "vit_t" if recipe.startswith("vit") else "resnet8"
    flags = shlex.split(SMALL[stage])
    if stage in ("pretrain", "distill"):
        flags += ["--num-local", str(min(2, parsed(recipe).num_local))]
    if stage == "pretrain":
        flags += ["--arch", arch] + ["--num-classes", "12"] * (parsed(recipe).loss == "twist")
    elif stage == "distill":
        flags += ["--teacher", str(checkpoints / f"{arch}.pth")]
    else:
        flags += ["--checkpoint", str(checkpoints / f"{arch}.pth")]
    with pytest.raises(SystemExit) as end:
        run(module.main, module.get_parser(), [f"@{RECIPES[recipe]}", *flags, "--output-dir", str(tmp_path)])
    assert not end.value.code
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["step"] == 2
