"""The stages as a user runs them: by subprocess, alone and under torchrun, killed, resumed, misused."""

import json
import math
import random
import shlex
import signal
import time

import pytest
import torch
from PIL import Image
from processes import ROOT, finish, run, start, wait_for
from sklearn.datasets import load_sample_image

import checkpoint
import pretrain

SMALL = "--data fake --batch-size 64 --epochs 2 --hidden-dim 32 --print-every 2"


def weights(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The undisturbed run that others are compared with."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run(f"pretrain.py {SMALL} --output-dir {folder}")
    return folder


def test_chain_of_stages(trained, tmp_path):
    first, *lines = log_lines(trained)
    config = first["config"]
    assert first["command"].startswith("python pretrain.py --data fake") and config["batch_size"] == 64
    assert config["total_steps"] == 16 and config["peak_lr"] == config["lr"] / 4
    entries = [line for line in lines if "loss" in line]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12, 14, 16]
    for e in entries:
        assert e["loss"] == pytest.approx(e["consistency"] + e["sharpness"] - e["diversity"], abs=1e-5)
        assert 0 <= e["mi_ratio"] <= 1 and 1 <= e["classes"] <= 10.001 and e["grad"] > 0
    assert entries[-1]["loss"] < entries[0]["loss"] and entries[-1]["knn_monitor"] > 0.5
    assert lines[-1]["status"] == "done"
    assert {path.name for path in trained.iterdir()} == {
        ".lock", "checkpoint.pth", "backbone.pth", "config.json", "curves.png", "log.jsonl", "metrics.json"}
    backbone = torch.load(trained / "backbone.pth", weights_only=True)
    assert set(backbone) >= {"conv1.weight", "layer3.0.bn2.bias"}

    out, _ = run(f"cluster_eval.py --checkpoint {trained}/checkpoint.pth --output-dir {tmp_path}/classes")
    metrics = json.loads((tmp_path / "classes" / "metrics.json").read_text())
    assert 0.1 <= metrics["acc"] <= 1 and "nmi" in metrics and f"{metrics['acc']:.4f}" in out
    for name in ("assignments.csv", "contact_sheet.png", "confusion_matrix.png"):
        assert (tmp_path / "classes" / name).stat().st_size > 1000
    run(f"knn.py --checkpoint {trained}/checkpoint.pth --k 1 20 --output-dir {tmp_path}/knn")
    assert (tmp_path / "knn" / "metrics.json").exists()


def test_finished_run_says_so_and_changes_nothing(trained, tmp_path):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    other = f"--output-dir {tmp_path}/new --resume {trained}/checkpoint.pth"
    for flags in (f"--output-dir {trained}", other):
        out, _ = run(f"pretrain.py {SMALL} {flags}")
        assert "finished" in out
    assert before == {path.name: path.read_bytes() for path in trained.iterdir()}


def test_killed_and_resumed_run_ends_with_the_same_weights(trained, tmp_path):
    """SIGKILL in mid-epoch; then with workers, for which views and order must not differ."""
    command = f"pretrain.py {SMALL} --output-dir {tmp_path}/killed --save-every 1"
    process = start(command)
    wait_for(tmp_path / "killed" / "checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    step = torch.load(tmp_path / "killed" / "checkpoint.pth", weights_only=True)["step"]
    assert 2 <= step < 16 and step != 8, f"killed at step {step}: not in mid-epoch, make the run longer"
    (tmp_path / "killed" / "log.jsonl").open("a").write('{"step": half a li')
    run(f"{command} --workers 2")
    assert {"resumed_from": step} in log_lines(tmp_path / "killed")
    assert_same_weights(trained, tmp_path / "killed")


def test_signal_saves_and_the_run_goes_on(trained, tmp_path):
    command = f"pretrain.py {SMALL} --output-dir {tmp_path}/run"
    process = start(command)
    wait_for(tmp_path / "run" / "log.jsonl", process)
    while len(log_lines(tmp_path / "run")) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process, code=143)
    assert "stopped by SIGTERM" in out and log_lines(tmp_path / "run")[-1]["status"].startswith("stopped by")
    run(f"pretrain.py {SMALL} --output-dir {tmp_path}/elsewhere --resume {tmp_path}/run/checkpoint.pth")
    assert_same_weights(trained, tmp_path / "elsewhere")


def test_two_processes_equal_one(trained, tmp_path):
    """Up to rounding, which training amplifies; test_ddp has it exact. SGD: AdamW amplifies most."""
    few = "--epochs 1 --print-every 1 --knn-every 0 --optimizer sgd --lr 0.02"
    run(f"pretrain.py {SMALL} {few} --output-dir {tmp_path}/one")
    out, _ = run(f"pretrain.py {SMALL} {few} --output-dir {tmp_path}/two", ranks=2)
    assert "2 process(es)" in out
    one, two = ([line["loss"] for line in log_lines(tmp_path / n) if "loss" in line] for n in ("one", "two"))
    assert len(one) == 8
    assert one[:3] == pytest.approx(two[:3], abs=5e-4) and one == pytest.approx(two, abs=0.02)


def test_multicrop_every_optimizer_and_ablation_trains(tmp_path):
    for i, flags in enumerate((
            "--views multicrop --num-local 2 --optimizer lars --lr 0.5 --bunch-size 16 --clip-norm 1",
            "--views barlow --optimizer sgd --lr 0.1 --no-nbs --alpha 0 --weight-decay-end 0.1",
            "--views moco --beta 0 --arch resnet18 --small-images --image-size 16 --amp bf16 --eps 0")):
        run(f"pretrain.py {SMALL} --epochs 1 --batch-size 128 {flags} --output-dir {tmp_path}/{i}")
        losses = [line["loss"] for line in log_lines(tmp_path / str(i)) if "loss" in line]
        assert all(abs(loss) < 100 for loss in losses)


def test_barlow_twins_trains_and_resumes(tmp_path):
    """The same stage with the other loss: killed, resumed, evaluated; it has no classes."""
    flags = f"{SMALL} --loss barlow --lambd 0.02 --bias-lr 0.1 --optimizer sgd --lr 0.1 --save-every 1"
    run(f"pretrain.py {flags} --output-dir {tmp_path}/straight")
    first, *lines = log_lines(tmp_path / "straight")
    entries = [line for line in lines if "loss" in line]
    for e in entries:
        assert e["loss"] == pytest.approx(e["invariance"] + 0.02 * e["redundancy"], rel=1e-4)
        assert e["std_col"] > 0 and e["grad"] > 0 and not {"mi", "classes", "collapsed"} & e.keys()
    assert entries[-1]["loss"] < 0.95 * entries[0]["loss"] and entries[-1]["knn_monitor"] > 0.5
    assert (tmp_path / "straight/curves.png").stat().st_size > 1000
    state = torch.load(tmp_path / "straight/checkpoint.pth", weights_only=True)
    assert [round(group["lr"] * 1e9) for group in state["optimizer"]["param_groups"]] == [
        round(entries[-1]["lr"] * 1e9), round(entries[-1]["lr"] * 1e8)]

    process = start(f"pretrain.py {flags} --output-dir {tmp_path}/killed")
    wait_for(tmp_path / "killed" / "checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    run(f"pretrain.py {flags} --output-dir {tmp_path}/killed")
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")

    path = tmp_path / "straight" / "checkpoint.pth"
    for stage in ("cluster_eval.py", "selflabel.py"):
        _, err = run(f"{stage} --checkpoint {path} --output-dir {tmp_path}/no", code=2)
        assert "holds no classes" in err and err.count("\n") == 1 and not (tmp_path / "no").exists()
    run(f"knn.py --checkpoint {path} --k 5 --output-dir {tmp_path}/knn")


def in_double():
    """From now on this process trains in double precision: in single, a ReLU flips by rounding and steps
    multiply it."""
    build_network, build_views = pretrain.build_network, pretrain.build_views

    def views_in_double(*args, **kwargs):
        views = build_views(*args, **kwargs)
        views.register_forward_hook(lambda module, inputs, outputs: [x.double() for x in outputs])
        return views
    pretrain.build_network = lambda *args: build_network(*args).double()
    pretrain.build_views = views_in_double


@pytest.mark.slow
def test_barlow_twins_in_two_processes_equals_one(tmp_path):
    """The whole stage, in double precision."""
    flags = f"{SMALL} --loss barlow --epochs 1 --optimizer sgd --lr 0.05 --print-every 1 --knn-every 0"
    run(f"pretrain.py {flags} --output-dir {tmp_path}/one", prepare=in_double)
    run(f"pretrain.py {flags} --output-dir {tmp_path}/two", ranks=2, prepare=in_double)
    one, two = ([line["loss"] for line in log_lines(tmp_path / n) if "loss" in line] for n in ("one", "two"))
    assert len(one) == 8 and one == pytest.approx(two, rel=1e-9)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-7, atol=1e-9)


def test_momentum_encoder_and_drop_path_resume_exactly(tmp_path):
    """A ViT with noise of its own, killed and resumed; and the teacher is the average that it should be."""
    flags = ("--arch vit_t --num-local 1 --local-size 16 --ema 0.5 --drop-path 0.3 --alpha 0.4 --clip-norm 3 "
             "--batch-size 64 --lr 0.001 --warmup-epochs 0 --epochs 1 --save-every 1 --knn-every 0")
    run(f"pretrain.py {SMALL} {flags} --output-dir {tmp_path}/straight")
    after, before = (torch.load(tmp_path / "straight" / name, weights_only=True)
                     for name in ("checkpoint.pth", "checkpoint.prev.pth"))
    assert (before["step"], after["step"]) == (7, 8)
    keep = 1 + 0.5 * (0.5 - 1) * (1 + math.cos(math.pi * 7 / 8))                # at the eighth of eight steps
    for name, value in after["teacher"].items():
        expected = keep * before["teacher"][name] + (1 - keep) * after["model"][name]
        if "running" not in name and value.dim():              # the statistics are the teacher's own
            torch.testing.assert_close(value, expected, msg=name)
    exported = torch.load(tmp_path / "straight" / "backbone.pth", weights_only=True)
    same = {part: all(x.equal(after[part][f"backbone.{name}"]) for name, x in exported.items())
            for part in ("model", "teacher")}
    assert same == {"model": False, "teacher": True}

    process = start(f"pretrain.py {SMALL} {flags} --export student --output-dir {tmp_path}/killed")
    wait_for(tmp_path / "killed" / "checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    run(f"pretrain.py {SMALL} {flags} --export student --output-dir {tmp_path}/killed")
    resumed = torch.load(tmp_path / "killed" / "checkpoint.pth", weights_only=True)
    for part in ("model", "teacher"):
        assert all(value.equal(after[part][name]) for name, value in resumed[part].items()), part
    exported = torch.load(tmp_path / "killed" / "backbone.pth", weights_only=True)
    assert all(value.equal(after["model"][f"backbone.{name}"]) for name, value in exported.items())


def test_non_finite_loss_stops_with_code_3_and_keeps_the_checkpoint(tmp_path):
    _, err = run(f"pretrain.py {SMALL} --lr 1e30 --optimizer sgd --warmup-epochs 0 --no-nbs --save-every 1 "
                 f"--output-dir {tmp_path}/run", code=3)
    assert err.count("\n") == 1 and "is not finite" in err
    saved = list((tmp_path / "run").glob("checkpoint*.pth"))
    states = [torch.load(path, weights_only=True)["model"] for path in saved]
    assert all(t.isfinite().all() for state in states for t in state.values())


@pytest.mark.parametrize("bad, names", [
    ("", None), ("--data nowhere", "nowhere"), ("--arch resnet9", "resnet9"),
    ("--num-classes 1", "num-classes"),
    ("--epochs 0", "epochs"), ("--bunch-size 24", "bunch size 24"), ("--batch-size 1024", "1024"),
    ("--lr nan", "lr"), ("--print-every 51", "print-every"), ("--resume nothing.pth", "nothing.pth"),
    ("--output-dir Makefile", "Makefile"), ("--num-local 2 --views barlow", "num-local"),
    ("--loss barlow --num-local 1 --views multicrop", "--loss barlow"), ("--loss barlow --ema 0.9", "--ema"),
    ("--lambd -1", "--lambd"), ("--arch mobilenet_v3_large --small-images", "mobilenet_v3_large"),
    ("--bunch_sise 3", "--bunch-sise"), ("@recipes/none.txt", "recipes/none.txt")])
def test_bad_input_is_one_line_and_code_2(bad, names, tmp_path, capsys, monkeypatch):
    """In this process, as importing torch costs more than all else; the first, sound, command trains."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    command = f"{SMALL} --epochs 1 --output-dir {tmp_path}/bad {bad}"
    with pytest.raises(SystemExit) as stop:
        checkpoint.run(pretrain.main, pretrain.get_parser(), shlex.split(command))
    err = capsys.readouterr().err
    if names is None:
        assert not stop.value.code and (tmp_path / "bad" / "metrics.json").exists()
    else:
        assert stop.value.code == 2 and err.count("\n") == 1 and names in err, err
        assert not (tmp_path / "bad").exists()


def test_used_folders_and_recipes(tmp_path):
    """Flags spelled with `_` and a recipe file; then the same folder with other flags, damage, and leave."""
    (tmp_path / "recipe.txt").write_text("# a comment\n--bunch-size 32  # images\n\n--num_classes 12\n")
    run(f"pretrain.py @{tmp_path}/recipe.txt {SMALL} --epochs 1 --num_local 0 --output_dir {tmp_path}/good")
    config = json.loads((tmp_path / "good" / "config.json").read_text())
    assert config["bunch_size"] == 32 and config["num_classes"] == 12

    command = f"pretrain.py @{tmp_path}/recipe.txt {SMALL} --epochs 1 --output-dir {tmp_path}/good"
    before = (tmp_path / "good" / "checkpoint.pth").read_bytes()
    _, err = run(f"{command} --lr 0.1", code=2)
    assert "lr was 0.004, is 0.1" in err and err.count("\n") == 1
    _, err = run(f"{command} --resume never", code=2)
    assert "holds a run already" in err
    (tmp_path / "broken.pth").write_bytes(before[:len(before) // 2])
    _, err = run(f"{command}2 --resume {tmp_path}/broken.pth", code=2)
    assert "broken.pth: not a readable checkpoint" in err and not (tmp_path / "good2").exists()
    assert (tmp_path / "good" / "checkpoint.pth").read_bytes() == before
    run(f"{command} --lr 0.1 --overwrite")


def test_processes_that_do_not_divide_the_batch(tmp_path):
    _, err = run(f"pretrain.py {SMALL} --batch-size 63 --output-dir {tmp_path}/bad", code=2, ranks=2)
    assert err.count("--batch-size 63: not divisible by the 2 processes") == 1
    assert not (tmp_path / "bad").exists()


def test_two_runs_in_one_folder(tmp_path):
    command = f"pretrain.py {SMALL} --epochs 50 --output-dir {tmp_path}/run"
    first = start(command)
    wait_for(tmp_path / "run" / "log.jsonl", first)
    _, err = run(command, code=2)
    assert "another run is using this folder" in err
    first.kill()
    first.wait()


# ---------------------------------------------------------------- people's own pictures
ON_FILES = ("--views multicrop --image-size 32 --num-local 2 --batch-size 16 --epochs 3 --hidden-dim 32 "
            "--num-classes 4")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """64 training and 16 validation photographs of two classes, a list of them, and what is not sound."""
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


def test_pictures_from_files_killed_and_resumed(pictures, tmp_path):
    """In mid-epoch, then with other workers: bit for bit the weights of the undisturbed run."""
    command = f"pretrain.py --data {pictures}/sound {ON_FILES} --print-every 1"
    out, _ = run(f"{command} --workers 0 --output-dir {tmp_path}/straight")
    assert "64 images; 12 steps of 16 × 4 views" in out and "20-NN" in out
    process = start(f"{command} --workers 1 --save-every 1 --output-dir {tmp_path}/killed")
    wait_for(tmp_path / "killed" / "checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    step = torch.load(tmp_path / "killed" / "checkpoint.pth", weights_only=True)["step"]
    assert 2 <= step < 12
    run(f"{command} --workers 3 --save-every 1 --output-dir {tmp_path}/killed")
    assert {"resumed_from": step} in log_lines(tmp_path / "killed")
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")

    checkpoint = f"--checkpoint {tmp_path}/straight/checkpoint.pth"
    run(f"cluster_eval.py {checkpoint} --output-dir {tmp_path}/classes --silhouette --bn-images 64")
    metrics = json.loads((tmp_path / "classes/metrics.json").read_text())
    assert metrics["class_names"] == ["china", "flower"] and metrics["num_images"] == 16
    assert metrics["acc_majority"] >= 0.75                     # blue and green are told apart by any network
    assert "sound/val/china/0.jpg" in (tmp_path / "classes/assignments.csv").read_text()
    for name in ("contact_sheet.png", "confusion_matrix.png", "top3.png"):
        assert (tmp_path / "classes" / name).stat().st_size > 1000
    out, _ = run(f"knn.py {checkpoint} --output-dir {tmp_path}/knn --k 5 --workers 1")
    assert "16 test images against 64 training images" in out


def test_pictures_without_labels(pictures, tmp_path):
    """Trained on and clustered; what would need labels is left out by name."""
    run(f"pretrain.py --data {pictures}/list.txt {ON_FILES} --epochs 1 --output-dir {tmp_path}/run")
    assert not any("knn_monitor" in line for line in log_lines(tmp_path / "run"))
    checkpoint = f"--checkpoint {tmp_path}/run/checkpoint.pth"
    out, _ = run(f"cluster_eval.py {checkpoint} --output-dir {tmp_path}/classes")
    assert "no labels: ACC, NMI, AMI, ARI, FMI, purity and the confusion matrix are left out" in out
    metrics = json.loads((tmp_path / "classes/metrics.json").read_text())
    assert not {"acc", "nmi", "ari"} & metrics.keys() and metrics["num_images"] == 64
    assert {path.name for path in (tmp_path / "classes").iterdir()} == {
        "assignments.csv", "contact_sheet.png", "metrics.json", "top3.png"}
    _, err = run(f"knn.py {checkpoint} --output-dir {tmp_path}/knn", code=2)
    assert "has no labels" in err and err.count("\n") == 1


@pytest.mark.parametrize("data, names", [
    ("sound", None), ("none", "'{root}/none' is neither a data set"), ("empty", "{root}/empty: no pictures"),
    ("notes", "{root}/notes: no pictures"),
    ("gap.txt", "{root}/gap.txt: line 65 names a missing file: {root}/sound/train/dog.jpg"),
    ("broken --workers 1", "--data: 11 of 32 pictures cannot be read")])
def test_bad_data_is_one_line_and_code_2(pictures, data, names, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    command = f"{ON_FILES} --epochs 1 --workers 0 --output-dir {tmp_path}/out --data {pictures}/{data}"
    with pytest.raises(SystemExit) as stop:
        checkpoint.run(pretrain.main, pretrain.get_parser(), shlex.split(command))
    err = capsys.readouterr().err
    if names is None:
        assert not stop.value.code and (tmp_path / "out/metrics.json").exists()
    else:
        assert stop.value.code == 2 and err.count("\n") == 1 and names.format(root=pictures) in err, err
        assert not (tmp_path / "out/checkpoint.pth").exists()
