"""pretrain.py trains what the paper describes, alone and in two processes; its network is evaluated."""

import json
import math
import random

import pytest
import torch
from PIL import Image
from processes import log_lines, metrics_of, run, same, start, wait_for, weights
from sklearn.datasets import load_sample_image

import pretrain
from checkpoint import load_last_checkpoint
from loss import twist_loss
from pretrain import describe

SMALL = "--data fake --image-size 16 --batch-size 64 --epochs 2 --hidden-dim 32 --restarts 1 --print-every 2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run(f"pretrain.py {SMALL} --output-dir {folder}")
    return folder


# ---------------------------------------------------------------- what a run writes and prints
def test_log_and_files_of_a_run(trained):
    first, *lines = log_lines(trained)
    assert first["command"].startswith("python pretrain.py --data fake")
    assert first["config"]["batch_size"] == 64 and first["config"]["total_steps"] == 16
    entries = [line for line in lines if "loss" in line]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12, 14, 16]
    for e in entries:
        assert e["loss"] == pytest.approx(e["consistency"] + e["sharpness"] - e["diversity"], abs=1e-5)
        assert 0 <= e["mi_ratio"] <= 1 and 1 <= e["classes"] <= 10.001
        assert e["grad"] > 0 and e["std_col"] > 0 and e["std_row"] > 0
    assert entries[-1]["loss"] < entries[0]["loss"] and entries[-1]["knn_monitor"] > 0.5
    assert 0.1 <= entries[-1]["acc_monitor"] <= 1 and 0 < entries[-1]["nmi_monitor"] < 1
    assert lines[-1]["status"] == "done" and metrics_of(trained) == entries[-1]
    assert {path.name for path in trained.iterdir()} == {
        ".lock", "checkpoint.pth", "backbone.pth", "backbone.json",
        "config.json", "curves.png", "log.jsonl", "metrics.json"}
    backbone = torch.load(trained / "backbone.pth", weights_only=True)
    assert set(backbone) >= {"conv1.weight", "layer3.0.bn2.bias"}


def test_its_network_is_evaluated(trained, here, tmp_path):
    out, _ = here(f"cluster_eval.py --checkpoint {trained}/checkpoint.pth --output-dir {tmp_path}/classes",
                  pictures=True)
    metrics = metrics_of(tmp_path / "classes")
    assert 0.1 <= metrics["acc"] <= 1 and "nmi" in metrics and f"{metrics['acc']:.4f}" in out
    for name in ("assignments.csv", "contact_sheet.png", "confusion_matrix.png"):
        assert (tmp_path / "classes" / name).stat().st_size > 1000
    here(f"knn.py --checkpoint {trained}/checkpoint.pth --k 1 20 --output-dir {tmp_path}/knn")
    assert metrics_of(tmp_path / "knn")["top1"].keys() == {"1", "20"}


def test_lines_of_the_papers_longest_run_fit_120_columns():
    numbers = describe(twist_loss(torch.randn(2, 8, 4096).sort()[0]), {}, 2048)
    line = pretrain.LINE.format(**numbers | dict(loss=-7.877, classes=4012.93))
    assert len(f"step 500000/500000 | {line} | 12345 images/s, ETA 99h59") <= 120


def test_printed_lines_fit_120_columns(here, tmp_path):
    """The longest there is says that the run has collapsed; the k-NN accuracy has a line of its own."""
    out, _ = here(f"pretrain.py {SMALL} --epochs 1 --alpha 0 --no-nbs --output-dir {tmp_path}/run")
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(steps) == 4 and all(len(line) <= 120 for line in steps)
    assert "| collapsed: uniform" in steps[-1]
    told = [line for line in out.splitlines() if "20-NN accuracy" in line]
    assert len(told) == 1 and told[0].startswith("epoch 1: 20-NN accuracy ")


def test_the_learning_rate_at_its_peak_is_printed(here, tmp_path):
    """--lr is for 256 images; a run with 64 has a quarter."""
    flags = "--lr 0.008 --warmup-epochs 0 --print-every 1 --knn-every 0"
    out, _ = here(f"pretrain.py {SMALL} {flags} --epochs 1 --output-dir {tmp_path}/run")
    assert "512 images, 2 views of each; peak learning rate 0.002\n" in out
    rates = [line["lr"] for line in log_lines(tmp_path / "run") if "loss" in line]
    assert rates[0] == 0.002 and rates == sorted(rates, reverse=True)


# ---------------------------------------------------------------- the method
def test_two_processes_equal_one(tmp_path):
    """Up to rounding, which training amplifies; test_ddp has it exact. SGD: AdamW amplifies most."""
    few = "--epochs 1 --print-every 1 --knn-every 0 --optimizer sgd --lr 0.02"
    run(f"pretrain.py {SMALL} {few} --output-dir {tmp_path}/one")
    out, err = run(f"pretrain.py {SMALL} {few} --output-dir {tmp_path}/two", ranks=2)
    assert "2 process(es)" in out and "Warning" not in err
    one, two = ([line["loss"] for line in log_lines(tmp_path / n) if "loss" in line] for n in ("one", "two"))
    assert len(one) == 8
    assert one[:3] == pytest.approx(two[:3], abs=5e-4) and one == pytest.approx(two, abs=0.02)
    first, second = torch.load(tmp_path / "two/checkpoint.pth", weights_only=True)["rng"]
    assert not first[0].equal(second[0])                       # each process has its own noise for drop path


def test_processes_that_do_not_divide_the_batch(tmp_path):
    _, err = run(f"pretrain.py {SMALL} --batch-size 63 --output-dir {tmp_path}/bad", code=2, ranks=2)
    assert err.count("--batch-size 63: not divisible by the 2 processes") == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("flags", [
    "--views multicrop --num-local 2 --local-size 8 --optimizer lars --lr 0.5 --bunch-size 16 --clip-norm 1",
    "--views barlow --optimizer sgd --lr 0.1 --no-nbs --alpha 0 --weight-decay-end 0.1 --small-images",
    "--views moco --beta 0 --zero-init-residual --amp bf16 --eps 0"])
def test_crops_optimizers_and_ablations_train(flags, here, tmp_path):
    small = "--epochs 1 --batch-size 128 --image-size 16 --knn-every 0"
    here(f"pretrain.py {SMALL} {small} {flags} --output-dir {tmp_path}/run")
    losses = [line["loss"] for line in log_lines(tmp_path / "run") if "loss" in line]
    assert len(losses) == 2 and all(abs(loss) < 100 for loss in losses)


def test_collapses_are_named():
    torch.manual_seed(0)
    z = torch.randn(64, 32)
    names = {}
    for name, logits in dict(spread=z, one_each=9 * torch.eye(32).repeat(2, 1), alike=0.01 * z,
                             first=9 * torch.eye(32)[:1] + 0.01 * z).items():
        entry = describe(twist_loss(logits.expand(2, -1, -1)), {}, most_classes=32)
        names[name] = entry.get("collapsed")
        assert entry["mi_ratio"] == pytest.approx(entry["mi"] / math.log(32))
    assert names == dict(spread=None, one_each=None, alike="uniform", first="one-class")


def test_the_momentum_encoder_is_an_average(here, tmp_path):
    flags = "--ema 0.5 --alpha 0.4 --clip-norm 3 --epochs 1 --save-every 1 --knn-every 0"
    here(f"pretrain.py {SMALL} {flags} --output-dir {tmp_path}")
    after, before = (torch.load(tmp_path / name, weights_only=True)
                     for name in ("checkpoint.pth", "checkpoint.prev.pth"))
    assert (before["step"], after["step"]) == (7, 8)
    keep = 1 + 0.5 * (0.5 - 1) * (1 + math.cos(math.pi * 7 / 8))                # at the eighth of eight steps
    for name, value in after["teacher"].items():
        expected = keep * before["teacher"][name] + (1 - keep) * after["model"][name]
        if "running" not in name and value.dim():              # the statistics are the teacher's own
            torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.slow
def test_momentum_encoder_and_drop_path_resume_exactly(tmp_path):
    """A ViT with noise of its own, killed and resumed."""
    flags = ("--arch vit_t --batch-size 128 --num-local 1 --local-size 16 --ema 0.5 --drop-path 0.3 "
             "--clip-norm 3 --lr 0.001 --warmup-epochs 0 --epochs 1 --save-every 1 --knn-every 0")
    run(f"pretrain.py {SMALL} {flags} --output-dir {tmp_path}/straight")
    process = start(f"pretrain.py {SMALL} {flags} --output-dir {tmp_path}/killed")
    wait_for(tmp_path / "killed" / "checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    run(f"pretrain.py {SMALL} {flags} --output-dir {tmp_path}/killed")
    assert any("resumed_from" in line for line in log_lines(tmp_path / "killed"))
    straight, resumed = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
                         for name in ("straight", "killed"))
    for part in ("model", "teacher"):
        assert same(straight[part], resumed[part]), part


def test_backbones_of_teacher_and_student(here, tmp_path):
    here(f"pretrain.py {SMALL} --epochs 1 --ema 0.5 --knn-every 0 --output-dir {tmp_path}/run")
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    for file, part in (("backbone.pth", "teacher"), ("backbone_student.pth", "model")):
        exported = torch.load(tmp_path / "run" / file, weights_only=True)
        ours = {name: value for name, value in state[part].items() if name.startswith("backbone.")}
        assert same({f"backbone.{name}": value for name, value in exported.items()}, ours)
    assert not same(state["teacher"], state["model"])


# ---------------------------------------------------------------- flags
@pytest.mark.parametrize("bad, names", [
    ("", None), ("--data nowhere", "nowhere"), ("--arch resnet9", "resnet9"),
    ("--num-classes 1", "argument --num-classes: 1: must be a whole number of at least 2"),
    ("--epochs 0", "argument --epochs: 0: must be a whole number of at least 1"),
    ("--ema 1", "argument --ema: 1: must be a number of at least 0 and below 1"),
    ("--lr nan", "argument --lr: nan: must be a number of at least 0"),
    ("--print-every 2.5", "argument --print-every: 2.5: must be a whole number"),
    ("--bunch-size 24", "bunch size 24"), ("--batch-size 1024", "the data set has only 512 images"),
    ("--num-local 2 --views barlow", "num-local"), ("--mean 0.1 0.2", "--mean: must be one number"),
    ("--arch mobilenet_v3_large --small-images", "mobilenet_v3_large"), ("--loss barlow", "--loss"),
    ("--bunch_sise 3", "--bunch-sise"), ("@recipes/none.txt", "recipes/none.txt")])
def test_bad_input_is_one_line_and_code_2(bad, names, here, tmp_path):
    """The first, sound, command trains."""
    command = f"pretrain.py {SMALL} --epochs 1 --output-dir {tmp_path}/bad {bad}"
    _, err = here(command, code=2 if names else 0)
    if names is None:
        assert (tmp_path / "bad" / "metrics.json").exists()
    else:
        assert err.count("\n") == 1 and names in err
        assert not (tmp_path / "bad").exists()


def test_recipes_and_flags_with_underscores(here, tmp_path):
    """A later flag wins, also over one in a file."""
    (tmp_path / "recipe.txt").write_text("# a comment\n--bunch-size 32  # images\n\n--num_classes 12\n"
                                         "--data cifar10\n")
    here(f"pretrain.py @{tmp_path}/recipe.txt {SMALL} --epochs 1 --num_local 0 --output_dir={tmp_path}/run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["bunch_size"] == 32 and config["num_classes"] == 12 and config["data"] == "fake"
    assert weights(tmp_path / "run")["projection_heads.last_linear.weight"].shape[0] == 12


# ---------------------------------------------------------------- the default run
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_hundred_steps_of_the_default_run(amp, here, monkeypatch, tmp_path):
    """Seeds 0 to 4 end at -0.39 to -0.46; crops of 8 % at -0.20, no NBS at -1.15, --lr 5e-5 at -0.05."""
    build = pretrain.build_dataset
    monkeypatch.setattr(pretrain, "build_dataset",
                        lambda *args, **options: build(*args, **options).subset(slice(12_800)))
    here("pretrain.py --epochs 1 --restarts 1 --print-every 10 --knn-every 0 "
         f"--amp {amp} --output-dir {tmp_path}/run")
    losses = [line["loss"] for line in log_lines(tmp_path / "run") if "loss" in line]
    assert len(losses) == 10 and -0.6 < sum(losses[-3:]) / 3 < -0.3


@pytest.mark.slow
def test_the_default_run_finds_the_classes(tmp_path):
    run(f"pretrain.py --output-dir {tmp_path}/run")
    run(f"cluster_eval.py --checkpoint {tmp_path}/run/checkpoint.pth --output-dir {tmp_path}/classes")
    assert metrics_of(tmp_path / "classes")["acc"] >= 0.70


# ---------------------------------------------------------------- people's own pictures
ON_FILES = ("--views multicrop --image-size 32 --num-local 2 --batch-size 16 --epochs 3 --hidden-dim 32 "
            "--num-classes 4 --restarts 1 --lr 0.004")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """64 training and 16 validation photographs of two classes, a list of them, and folders with faults."""
    root = tmp_path_factory.mktemp("pictures")
    for split, number in (("train", 32), ("val", 8)):
        for name in ("china", "flower"):
            photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
            rng = random.Random(f"{split}{name}")
            for i in range(number):
                x, y, s = rng.randrange(500), rng.randrange(300), rng.randrange(40, 100)
                path = root / "sound" / split / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                photograph.crop((x, y, x + s, y + s + 10)).save(path)
    names = sorted(str(path.relative_to(root)) for path in (root / "sound/train").rglob("*.jpg"))
    (root / "list.txt").write_text("\n".join(names))
    (root / "gap.txt").write_text("\n".join([*names, "sound/train/dog.jpg"]))
    for folder in ("empty", "notes", "broken"):
        (root / folder).mkdir()
    (root / "notes" / "a.txt").write_text("no picture")
    for i, name in enumerate(names[:32]):
        content = (root / name).read_bytes()
        (root / "broken" / f"{i}.jpg").write_bytes(content[:300] if i < 20 else content)
    return root


@pytest.mark.slow
def test_pictures_from_files_killed_and_resumed(pictures, tmp_path):
    """In mid-epoch, then with other workers: bit for bit the weights of the undisturbed run."""
    command = f"pretrain.py --data {pictures}/sound {ON_FILES} --print-every 1"
    out, _ = run(f"{command} --workers 0 --output-dir {tmp_path}/straight")
    assert "64 images, 4 views of each" in out and "12 steps to go" in out and "20-NN" in out
    process = start(f"{command} --workers 1 --save-every 1 --output-dir {tmp_path}/killed")
    wait_for(tmp_path / "killed" / "checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    step = load_last_checkpoint(tmp_path / "killed")["step"]
    assert 1 <= step < 12
    run(f"{command} --workers 3 --save-every 1 --output-dir {tmp_path}/killed")
    assert {"resumed_from": step} in log_lines(tmp_path / "killed")
    assert same(weights(tmp_path / "straight"), weights(tmp_path / "killed"))

    checkpoint = f"--checkpoint {tmp_path}/straight/checkpoint.pth"
    run(f"cluster_eval.py {checkpoint} --output-dir {tmp_path}/classes --silhouette --bn-images 64")
    metrics = metrics_of(tmp_path / "classes")
    assert metrics["class_names"] == ["china", "flower"] and metrics["num_images"] == 16
    assert metrics["acc_majority"] >= 0.75                     # blue and green are told apart by any network
    assert "sound/val/china/0.jpg" in (tmp_path / "classes/assignments.csv").read_text()
    for name in ("contact_sheet.png", "confusion_matrix.png", "top3.png"):
        assert (tmp_path / "classes" / name).stat().st_size > 1000
    out, _ = run(f"knn.py {checkpoint} --output-dir {tmp_path}/knn --k 5 --workers 1")
    assert "16 validation images against 64 training images" in out


def test_pictures_without_labels(pictures, tmp_path):
    """Trained on and clustered; what would need labels is left out by name."""
    run(f"pretrain.py --data {pictures}/list.txt {ON_FILES} --epochs 1 --output-dir {tmp_path}/run")
    assert not any("knn_monitor" in line for line in log_lines(tmp_path / "run"))
    checkpoint = f"--checkpoint {tmp_path}/run/checkpoint.pth"
    out, _ = run(f"cluster_eval.py {checkpoint} --output-dir {tmp_path}/classes")
    assert "no labels: ACC, NMI, AMI, ARI, FMI, purity and the confusion matrix are left out" in out
    metrics = metrics_of(tmp_path / "classes")
    assert not {"acc", "nmi", "ari"} & metrics.keys() and metrics["num_images"] == 64
    assert {path.name for path in (tmp_path / "classes").iterdir()} == {
        "assignments.csv", "contact_sheet.png", "metrics.json", "top3.png"}
    _, err = run(f"knn.py {checkpoint} --output-dir {tmp_path}/knn", code=2)
    assert "has no labels" in err and err.count("\n") == 1


@pytest.mark.parametrize("data, names", [
    ("sound", None), ("none", "'{root}/none' is neither a data set"), ("empty", "{root}/empty: no pictures"),
    ("notes", "{root}/notes: no pictures"),
    ("sound/train/china/0.jpg", "train/china/0.jpg: is a picture; give its folder"),
    ("gap.txt", "{root}/gap.txt: line 65 names a missing file, {root}/sound/train/dog.jpg")])
def test_bad_data_is_one_line_and_code_2(pictures, data, names, here, tmp_path):
    command = f"{ON_FILES} --epochs 1 --workers 0 --output-dir {tmp_path}/out --data {pictures}/{data}"
    _, err = here(f"pretrain.py {command}", code=2 if names else 0)
    if names is None:
        assert (tmp_path / "out/metrics.json").exists()
    else:
        assert err.count("\n") == 1 and names.format(root=pictures) in err
        assert not (tmp_path / "out").exists()


def test_too_many_broken_pictures(pictures, here, tmp_path):
    """Each is named once; then the run ends, even if it is a worker that reads them."""
    command = f"pretrain.py {ON_FILES} --epochs 1 --workers 1 --output-dir {tmp_path}/out"
    _, err = here(f"{command} --data {pictures}/broken", code=2)
    named = [line for line in err.splitlines() if "error: " not in line]
    assert err.count("error: ") == err.count("11 of 32 pictures cannot be read") == 1
    assert len(named) == len(set(named)) >= 11 and all(".jpg" in line for line in named)
    assert not (tmp_path / "out/checkpoint.pth").exists()


@pytest.mark.slow
def test_fp16_clips_the_norm_of_the_gradient_without_its_scale(here, tmp_path):
    for name, flags in (("start", "--lr 0"), ("off", "--lr 1"), ("fp16", "--lr 1 --amp fp16 --device cpu")):
        here(f"pretrain.py {SMALL} --knn-every 0 --optimizer sgd --weight-decay 0 --clip-norm 0.1 {flags} "
             f"--output-dir {tmp_path}/{name}")
    start, single, half = (torch.cat([value.flatten() for name, value in weights(tmp_path / which).items()
                                      if name.endswith("weight")]) for which in ("start", "off", "fp16"))
    assert (single - start).norm() > 0.01
    assert (half - single).norm() < 0.5 * (single - start).norm()
