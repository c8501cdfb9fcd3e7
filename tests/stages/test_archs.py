"""Every arch goes from training through every evaluation."""

import shutil

import pytest
from PIL import Image
from processes import metrics_of

from model import ARCHS

CHEAP = ("resnet8",)
ALIKE = ("resnet50w4", "resnet50w5")       # gigabytes, and the code of resnet50w2
EVALUATIONS = (                            # each is given --checkpoint
    "knn.py --k 5 --workers 0 --output-dir {out}/knn",
    "lincls.py --epochs 1 --batch-size 8 --lrs 0.1 --workers 0 --output-dir {out}/lincls",
    "semisup.py --label-fraction 1 --epochs 1 --batch-size 8 --workers 0 --output-dir {out}/semisup",
    "finetune.py --data {data} --steps 2 --batch-size 8 --workers 0 --output-dir {out}/finetune",
    "svm.py --data {data}/VOC2007 --shots 1 --samples 1 --costs 1 --output-dir {out}/svm",
    "embed.py --queries 2 --workers 0 --output-dir {out}/embed",
    "cluster_eval.py --kmeans 2 --kmeans-starts 1 --workers 0 --output-dir {out}/clusters",
    "export.py --format {format} --output {out}/exported.pth",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train and val with two classes of one colour each, and the same pictures in a folder like VOC2007."""
    root = tmp_path_factory.mktemp("data")
    voc, lists = root / "VOC2007/JPEGImages", root / "VOC2007/ImageSets/Main"
    for folder in (voc, lists, *(root / part / name for part in ("train", "val") for name in ("cow", "dog"))):
        folder.mkdir(parents=True)
    for i in range(16):
        name, colour = (("cow", "red"), ("dog", "blue"))[i % 2]
        picture = Image.new("RGB", (40 + i, 36), colour)
        picture.save(root / f"train/{name}/{i}.jpg")
        picture.save(root / f"val/{name}/{i}.jpg")
        picture.save(voc / f"{i}.jpg")
    for name, first in (("cow", 0), ("dog", 1)):
        for part, numbers in (("trainval", range(8)), ("test", range(8, 16))):
            lines = [f"{i} {1 if i % 2 == first else -1}\n" for i in numbers]
            (lists / f"{name}_{part}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("arch", [*CHEAP, *(pytest.param(arch, marks=pytest.mark.slow)
                                            for arch in ARCHS if arch not in CHEAP + ALIKE)])
def test_an_arch_goes_through_every_stage(arch, data, here, tmp_path):
    here(f"pretrain.py --data {data} --arch {arch} --image-size 32 --hidden-dim 16 --batch-size 8 --epochs 1 "
         f"--restarts 1 --lr 1e-4 --knn-every 0 --workers 0 --output-dir {tmp_path}/run")
    shutil.copy(tmp_path / "run/checkpoint.pth", tmp_path / "network.pth")
    for command in EVALUATIONS:
        command = command.format(out=tmp_path, data=data, format="timm" if "vit" in arch else "torchvision")
        here(f"{command} --checkpoint {tmp_path}/network.pth")
    for stage in ("knn", "lincls", "semisup", "finetune", "svm", "embed", "clusters"):
        assert metrics_of(tmp_path / stage), stage
    assert (tmp_path / "exported.pth").stat().st_size > 1000
