"""Every stage takes the same parts and classes of a folder; a network keeps its input on other pictures."""

import numpy as np
import pytest
from PIL import Image
from processes import log_lines, metrics_of, saved_network

from data import build_dataset

COLOURS = {"red": (220, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 220)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """red/*, green/*, blue/*: 30 noisy pictures of 16 × 18 pixels each."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(30):
            pixels = np.array(colour) + rng.normal(0, 40, (16, 18, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{name}_{i}.png")
    return root


def test_evaluations_take_the_parts_and_classes_of_the_training(photos, here, tmp_path):
    (tmp_path / "names.txt").write_text("green\nblue\n")
    command = (f"pretrain.py --data {photos} --val-share 0.3 --classes {tmp_path}/names.txt --image-size 16 "
               f"--batch-size 16 --epochs 1 --restarts 1 --hidden-dim 16 --workers 0 --num-classes 2 "
               f"--output-dir {tmp_path}/run")
    out, _ = here(command)
    options = dict(val_share=0.3, classes=["green", "blue"])
    train, val = (build_dataset(str(photos), split, **options) for split in ("train", "test"))
    assert len(train) + len(val) == 60 and f"{len(train)} images, 2 views" in out and "20-NN accuracy" in out
    config = log_lines(tmp_path / "run")[0]["config"]
    assert {name: config[name] for name in options} == options and config["pictures"] == train.files
    _, err = here(command.replace("0.3", "0.4"), code=2)
    assert "val_share was 0.3, is 0.4" in err and err.count("\n") == 1

    (tmp_path / "names.txt").unlink()            # the checkpoint holds the names themselves
    network = f"--checkpoint {tmp_path}/run/checkpoint.pth --workers 0"
    for part, split in ((val, "test"), (train, "train")):
        out, _ = here(f"cluster_eval.py {network} --split {split} --output-dir {tmp_path}/{split}")
        assert f"{photos}: {len(part)} {part.part}, " in out
        found = metrics_of(tmp_path / split)
        assert found["num_images"] == len(part) and found["class_names"] == ["green", "blue"]
    here(f"knn.py {network} --k 5 --output-dir {tmp_path}/knn")
    found = metrics_of(tmp_path / "knn")
    assert (found["num_train"], found["num_test"]) == (len(train), len(val))
    here(f"lincls.py {network} --lrs 1 --cached --batch-size 8 --epochs 1 --held-out 0 "
         f"--output-dir {tmp_path}/lincls")
    found = metrics_of(tmp_path / "lincls")
    assert (found["num_train"], found["num_test"]) == (len(train), len(val))
    here(f"selflabel.py {network} --batch-size 16 --output-dir {tmp_path}/selflabel")
    config = log_lines(tmp_path / "selflabel")[0]["config"]
    assert {name: config[name] for name in options} == options and config["pictures"] == train.files


def test_a_fine_tuned_backbone_says_what_it_was_trained_on(photos, here, tmp_path):
    (tmp_path / "names.txt").write_text("green\nblue\n")
    network = saved_network(tmp_path / "network.pth", "--data fake --image-size 16")
    here(f"semisup.py --checkpoint {network} --data {photos} --val-share 0.3 --classes {tmp_path}/names.txt "
         f"--label-fraction 1 --batch-size 16 --epochs 1 --workers 0 --output-dir {tmp_path}/run")
    here(f"knn.py --checkpoint {tmp_path}/run/backbone.pth --k 5 --workers 0 --output-dir {tmp_path}/knn")
    found = metrics_of(tmp_path / "knn")
    assert found["num_train"] + found["num_test"] == 60


def test_without_a_share_all_pictures_are_in_every_part(photos, here, tmp_path):
    network = saved_network(tmp_path / "network.pth", f"--data {photos} --image-size 16")
    flags = f"--checkpoint {network} --workers 0 --output-dir {tmp_path}/out"
    assert f"{photos}: 90 images, " in here(f"cluster_eval.py {flags}")[0]
    for command in ("knn.py --k 5", "lincls.py", "semisup.py"):
        _, err = here(f"{command} {flags}", code=2)
        assert "no train and val parts; --val-share 0.2 keeps a fifth" in err and err.count("\n") == 1
    out, _ = here(f"knn.py --k 5 --val-share 0.2 {flags}")
    test = build_dataset(str(photos), "test", val_share=0.2)
    assert f"{len(test)} validation images against {90 - len(test)} training images" in out


@pytest.mark.parametrize("stage, flag", [("selflabel", "--checkpoint"), ("distill", "--teacher")])
def test_a_network_keeps_its_input_on_other_pictures(photos, here, tmp_path, stage, flag):
    """`fake` has 32 pixels and a mean of 0.5; a folder alone would have 224 and ImageNet's."""
    network = saved_network(tmp_path / "network.pth", "--data fake")
    command = f"{stage}.py {flag} {network} --data {photos} --batch-size 32 --epochs 1 --workers 0"
    command += " --queue-size 32" if stage == "distill" else ""
    here(f"{command} --output-dir {tmp_path}/own")
    config = log_lines(tmp_path / "own")[0]["config"]
    assert config["data"] == str(photos)
    assert (config["image_size"], config["mean"], config["std"]) == (32, [0.5], [0.25])
    here(f"{command} --image-size 24 --output-dir {tmp_path}/given")
    assert log_lines(tmp_path / "given")[0]["config"]["image_size"] == 24
