"""Every recipe parses, has the published numbers, and trains two steps."""

import importlib
import re

import pytest
import torch
from processes import ROOT, saved_network

from cli import parse_args

RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.txt"))}

LARS = dict(optimizer="lars", momentum=0.9, weight_decay=1.5e-6, weight_decay_end=None, eps=1e-5, alpha=1,
            beta=1, ema=0, clip_norm=0, hidden_dim=4096, nbs=True, amp="fp16", drop_path=0,
            restarts=1)
VIT = dict(optimizer="adamw", momentum=0.9, beta2=0.999, weight_decay=0.06, alpha=0.4, beta=1, ema=0.996,
           clip_norm=3, hidden_dim=4096, num_classes=4096, nbs=True, batch_size=1024, bunch_size=256,
           views="multicrop", epochs=300, warmup_epochs=10, amp="fp16", restarts=1)
SELF_LABEL = dict(optimizer="lars", momentum=0.9, weight_decay=1.5e-6, views="selflabel", num_local=12,
                  quantile=0.5, quantile_end=0.6, epochs=50, warmup_epochs=5, ema=0)
BARLOW = dict(arch="resnet50", views="barlow", zero_init_residual=True, hidden_dim=8192,
              lambd=0.0051, batch_size=2048, optimizer="lars", bias_lr=0.024, epochs=1000, warmup_epochs=10,
              weight_decay=1e-6, peak=1.6)
SEED = dict(num_local=6, image_size=224, local_size=96, queue_size=65536, student_temperature=0.2,
            teacher_temperature=1e-4, batch_size=256, optimizer="sgd", schedule="epochs", warmup_epochs=5,
            weight_decay=1e-4, momentum=0.9, milestones=None, views="seed", peak=0.03)
LINEAR = dict(weight_decays=[0], batch_size=1024, epochs=100, min_scale=0.08, held_out=0)
FEW_LABELS = dict(weight_decay=0, milestones=None, batch_size=256, min_scale=0.08, interpolation="bilinear")
SEGMENTED = dict(scale_range=[0.5, 2], cat_max_ratio=0.75, distortion=True, head_width=512, aux_weight=0.4,
                 dropout=0.1, kaiming=True, lr=0.01, min_lr=1e-4, weight_decay=5e-4, bn_batches=0)
DETECTED = dict(anchor_scale=8, anchors=256, rois=512, short_sides=[*range(480, 801, 32)], test_side=800,
                long_side=1333, steps=24000, milestones=[18000, 22000], warmup_steps=100, batch_size=16,
                lr=0.02, weight_decay=1e-4, bn_batches=200, schedule_steps=0, random_init=False)
# What was published, run by run; `peak` is the learning rate that training reaches.
PUBLISHED = {
    "resnet50_two_views": dict(LARS, arch="resnet50", views="barlow", num_local=0, num_classes=32768,
                               bunch_size=256, batch_size=2048, epochs=800, warmup_epochs=10, peak=4.0),
    "resnet50_multicrop": dict(LARS, arch="resnet50", views="multicrop", num_local=12, num_classes=4096,
                               bunch_size=256, batch_size=2048, epochs=800, warmup_epochs=10, peak=4.0),
    "resnet50_multicrop_300": dict(LARS, arch="resnet50", views="multicrop", num_local=12, num_classes=4096,
                                   bunch_size=256, batch_size=2048, epochs=300, warmup_epochs=10, peak=4.0),
    "resnet50_selflabel": dict(SELF_LABEL, bunch_size=256, batch_size=2048, peak=0.4),
    "resnet50w2_multicrop": dict(LARS, arch="resnet50w2", views="multicrop", num_local=12, num_classes=4096,
                                 bunch_size=240, batch_size=1920, epochs=200, warmup_epochs=10, peak=3.75),
    "resnet50w2_selflabel": dict(SELF_LABEL, bunch_size=240, batch_size=1920, peak=0.375),
    "vit_s": dict(VIT, arch="vit_s", num_local=6, weight_decay_end=0.12, drop_path=0, peak=1.2e-3),
    "vit_b": dict(VIT, arch="vit_b", num_local=10, weight_decay_end=None, drop_path=0.1, peak=3e-3),
    "resnet50_1000_classes": dict(arch="resnet50", num_classes=1000, epochs=800, restarts=1),
    "barlow_twins": BARLOW,
    "barlow_twins_lincls": dict(weight_decays=[1e-6], batch_size=256, epochs=100, milestones=None,
                                nesterov=False, jitter=False, depths=False, held_out=0, peak=0.3,
                                interpolation="bilinear"),
    "barlow_twins_depths": dict(weight_decays=[1e-4], batch_size=256, epochs=90, milestones=[30, 60, 90],
                                nesterov=True, jitter=True, depths=True, held_out=0, peak=0.01,
                                interpolation="bilinear"),
    "barlow_twins_knn": dict(k=[10, 20, 100, 200], temperature=0.07, interpolation="bilinear"),
    "barlow_twins_semisup_1": dict(FEW_LABELS, label_fraction=0.01, epochs=20, peak=0.002, head_lr=0.5),
    "barlow_twins_semisup_10": dict(FEW_LABELS, label_fraction=0.1, epochs=20, peak=0.002, head_lr=0.5),
    "finetune": dict(steps=20000, batch_size=256, bn_momentum=0, resize_side=256, grid=True, min_scale=0.08,
                     lrs=pytest.approx([10 ** (n / 2) for n in range(-8, -1)], rel=0.01),
                     weight_decays=pytest.approx([0, *(10 ** (n / 2) for n in range(-12, -5))], rel=0.01)),
    "finetune_short": dict(steps=5000, batch_size=64, bn_momentum=0.1, resize_side=224, grid=True,
                           lrs=pytest.approx([1e-4, 1e-3, 1e-2, 1e-1]), min_scale=0.08,
                           weight_decays=pytest.approx([0, 1e-6, 1e-5, 1e-4, 1e-3])),
    **{name: dict(SEGMENTED, data=data, short_side=sides[0], long_side=sides[1], crop_size=crop, steps=steps,
                  batch_size=batch, window=window, window_stride=stride, align_corners=window > 0)
       for name, data, sides, crop, steps, batch, window, stride in (
           ("voc12aug_fcn", "voc12aug", (512, 2048), 512, 20000, 16, 0, 64),
           ("cityscapes_fcn", "cityscapes", (1025, 2049), 769, 40000, 8, 769, 513))},
    "voc07_12_fpn": dict(DETECTED, pool_side=7, data="voc", neck="fpn", masks=False, pre_nms=[2000, 1000],
                         post_nms=[1000, 1000]),
    "voc07_12_c4": dict(DETECTED, pool_side=14, data="voc", neck="c4", masks=False, pre_nms=[12000, 6000],
                        post_nms=[2000, 1000]),
    "coco_1x_mask": dict(DETECTED, pool_side=7, data="coco", neck="fpn", masks=True, pre_nms=[2000, 1000],
                         post_nms=[1000, 1000], short_sides=[*range(640, 801, 32)], steps=90000,
                         milestones=[60000, 80000], warmup_steps=1000),
    "voc07_lowshot": dict(depth=5, samples=5, shots=[1, 2, 4, 8, 16, 32, 64, 96],
                          costs=pytest.approx([0.5 ** n for n in range(19, 3, -1)] + [1, 10, 100])),
    "voc07_svm": dict(depth=5, shots=["all"],
                      costs=pytest.approx([0.5 ** n for n in range(19, 3, -1)] + [1, 10, 100])),
    "seed_efficientnet_b0": dict(SEED, arch="efficientnet_b0", teacher_arch="resnet50w2", epochs=800),
    "seed_mobilenet_v3_large": dict(SEED, arch="mobilenet_v3_large", teacher_arch="resnet50w2", epochs=800),
    "seed_resnet50": dict(SEED, arch="resnet50", teacher_arch="resnet50w4", epochs=400),
    "seed_lincls": dict(weight_decays=[0], batch_size=256, epochs=100, milestones=[60, 80], nesterov=False,
                        held_out=0, peak=30, interpolation="bilinear"),
    "resnet50_lincls": dict(LINEAR, peak=0.2, interpolation="bilinear"),
    "vit_s_lincls": dict(LINEAR, interpolation="bicubic", n_last_blocks=4, mean_of_patches=False, peak=0.08),
    "vit_b_lincls": dict(LINEAR, interpolation="bicubic", n_last_blocks=4, mean_of_patches=False, peak=0.006),
    **{f"{arch}_semisup_1": dict(FEW_LABELS, label_fraction=0.01, epochs=20, peak=0.04, head_lr=0.2)
       for arch in ("resnet50", "resnet50w2", "vit_b")},
    **{f"{arch}_semisup_10": dict(FEW_LABELS, label_fraction=0.1, epochs=20, peak=0.02, head_lr=0.2)
       for arch in ("resnet50", "resnet50w2", "vit_b")},
    **{f"{arch}_semisup_100": dict(FEW_LABELS, label_fraction=1, epochs=30, peak=0.01, head_lr=0.2)
       for arch in ("resnet50", "resnet50w2", "vit_b")},
}
OURS = {"fashion_mnist", "fashion_mnist_barlow", "fashion_mnist_teacher", "fashion_mnist_seed",
        "fashion_mnist_representation", "fashion_mnist_selflabel", "fashion_mnist_lincls",
        "fashion_mnist_semisup_1", "fashion_mnist_semisup_10", "cifar10", "stl10"}
SMALL = {       # what makes a stage small enough for a test, and 512 pictures two steps
    "pretrain": "--data fake --image-size 16 --hidden-dim 16 --bunch-size 0 --batch-size 256 --epochs 1 "
                "--warmup-epochs 1 --knn-every 0 --amp off",
    "barlow": "--data fake --image-size 16 --hidden-dim 16 --batch-size 256 --epochs 1 --warmup-epochs 1 "
              "--knn-every 0 --amp off",
    "selflabel": "--local-size 16 --num-local 2 --batch-size 256 --bunch-size 0 --epochs 1 --amp off",
    "lincls": "--batch-size 230 --epochs 1",        # a tenth may be held out
    "distill": "--arch resnet8 --teacher-arch resnet8 --image-size 16 --batch-size 256 --queue-size 256 "
               "--epochs 1 --warmup-epochs 0 --amp off",
    "semisup": "--label-fraction 0.5 --batch-size 128 --epochs 1",
    "finetune": "--data fake --lrs 0.1 --weight-decays 0 --steps 2 --batch-size 64",
}


def stage_of(recipe):
    """The name of the script that a recipe is for, which stands in its first line."""
    sign, script = RECIPES[recipe].read_text().split(":")[0].split()
    assert sign == "#" and (ROOT / script).exists(), recipe
    return script.removesuffix(".py")


def parsed(recipe):
    """The flags of a recipe, with those that its stage requires."""
    stage = stage_of(recipe)
    needs = {"pretrain": [], "barlow": [], "distill": ["--teacher", "FILE"],
             "svm": ["--checkpoint", "FILE", "--data", "VOC"]}.get(stage, ["--checkpoint", "FILE"])
    return parse_args(importlib.import_module(stage).get_parser(), [f"@{RECIPES[recipe]}", *needs])


def test_every_recipe_is_known():
    assert set(RECIPES) == set(PUBLISHED) | OURS


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_numbers_are_the_published_ones(recipe):
    args = vars(parsed(recipe))
    rates = args.get("lrs") or [args.get("lr", 0)]
    args["peak"] = rates[0] * args.get("batch_size", 0) / 256
    for key, value in PUBLISHED[recipe].items():
        assert args[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert len(rates) == 1 or args["grid"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """{arch: checkpoint of an untrained network}."""
    folder = tmp_path_factory.mktemp("networks")
    flags = "--data fake --image-size 16 --num-classes 12"
    return {arch: saved_network(folder / f"{arch}.pth", f"{flags} --arch {arch}")
            for arch in ("resnet8", "vit_t")}


TRAINED = [recipe for recipe in RECIPES if stage_of(recipe) in SMALL]
ALIKE = [recipe for recipe in TRAINED               # they differ from another in numbers or the network alone
         if re.match("resnet50w2|vit_b|resnet50_1000|.*_300|.*_semisup_10|seed_(resnet|mobile)", recipe)]


def test_a_recipe_that_trains_nothing(here, networks, tmp_path):
    """Those of svm.py, segment.py and detect.py need data; their own tests make it, small."""
    assert set(RECIPES) - set(TRAINED) == {"barlow_twins_knn", "voc07_lowshot", "voc07_svm", "voc12aug_fcn",
                                           "cityscapes_fcn", "voc07_12_fpn", "voc07_12_c4", "coco_1x_mask"}
    here(f"knn.py @{RECIPES['barlow_twins_knn']} --checkpoint {networks['resnet8']} --output-dir {tmp_path}")
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("recipe", [*(recipe for recipe in TRAINED if recipe not in ALIKE),
                                    *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in ALIKE)])
def test_two_steps(recipe, here, networks, tmp_path):
    stage, arch = stage_of(recipe), "vit_t" if recipe.startswith("vit") else "resnet8"
    command = f"{stage}.py @{RECIPES[recipe]} {SMALL[stage]} --output-dir {tmp_path}"
    if stage in ("pretrain", "distill"):
        num_local = min(1, parsed(recipe).num_local)
        command += f" --num-local {num_local} --local-size {16 * num_local}"
    if stage in ("pretrain", "barlow"):
        command += f" --arch {arch}" + " --num-classes 12" * (stage == "pretrain")
    else:
        command += f" --{'teacher' if stage == 'distill' else 'checkpoint'} {networks[arch]}"
    here(command)
    saved = sorted(tmp_path.rglob("checkpoint.pth"))             # of a grid of one run: two
    assert len(saved) == 1 + (stage == "finetune")
    assert all(torch.load(path, weights_only=True)["step"] == 2 for path in saved)
