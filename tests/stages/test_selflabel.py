"""selflabel.py trains on the confident images of the global batch, alone and in two processes."""

import math

import pytest
import torch
from processes import log_lines, metrics_of, run, saved_network, weights

import selflabel
from checkpoint import save_checkpoint

FIRST = "--data fake --image-size 16 --batch-size 64 --epochs 1 --hidden-dim 32 --knn-every 0"
FLAGS = "--batch-size 64 --epochs 2 --print-every 2 --lr 0.01"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    run(f"pretrain.py {FIRST} --output-dir {folder}")
    return folder


@pytest.fixture(scope="module")
def labelled(pretrained):
    folder = pretrained.parent / "labelled"
    run(f"selflabel.py --checkpoint {pretrained}/checkpoint.pth {FLAGS} --output-dir {folder}")
    return folder


def test_log_and_files_of_a_run(pretrained, labelled):
    first, *lines = log_lines(labelled)
    config = first["config"]
    assert config["total_steps"] == 16 and config["hidden_dim"] == 32 and config["data"] == "fake"
    entries = [line for line in lines if "loss" in line]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12, 14, 16]
    for e in entries:                                          # ⌊quantile · 64⌋ of 64 images
        assert e["fraction"] == int(e["quantile"] * 64) / 64 and 0.1 < e["threshold"] < 1 and e["loss"] > 0
        assert 1 <= e["classes"] <= 10 and 0 <= e["agreement"] <= 1 and e["left_out"] == 0
    assert entries[0]["quantile"] < 0.51 and 0.59 < entries[-1]["quantile"] <= 0.6
    assert entries[-1]["loss"] < entries[0]["loss"] and lines[-1]["status"] == "done"
    assert {path.name for path in labelled.iterdir()} == {
        ".lock", "checkpoint.pth", "backbone.pth", "backbone.json",
        "config.json", "log.jsonl", "metrics.json"}
    before, after = weights(pretrained), weights(labelled)
    assert before.keys() == after.keys()
    assert not before["backbone.conv1.weight"].equal(after["backbone.conv1.weight"])


def evaluate_by_every_stage(path, out, ranks=1):
    """The end of the chain: cluster_eval and knn in one process, lincls and semisup in `ranks`."""
    run(f"cluster_eval.py --checkpoint {path} --output-dir {out}/classes")
    run(f"knn.py --checkpoint {path} --k 5 --output-dir {out}/knn")
    run(f"lincls.py --checkpoint {path} --cached --epochs 2 --batch-size 128 "
        f"--output-dir {out}/lincls", ranks=ranks)
    run(f"semisup.py --checkpoint {path} --label-fraction 0.5 --epochs 2 --batch-size 64 "
        f"--output-dir {out}/semisup", ranks=ranks)
    for stage in ("classes", "knn", "lincls", "semisup"):
        metrics = metrics_of(out / stage)
        assert metrics.get("num_test", metrics.get("num_images")) == 256, stage
    for stage in ("lincls", "semisup"):                        # what the stages write, cluster_eval reads
        run(f"cluster_eval.py --predictions {out}/{stage}/predictions.csv --output-dir {out}/{stage}_scores")


@pytest.mark.slow
def test_its_network_is_evaluated_by_every_stage(labelled, tmp_path):
    evaluate_by_every_stage(labelled / "checkpoint.pth", tmp_path)


@pytest.mark.slow
def test_the_chain_in_two_processes(tmp_path):
    run(f"pretrain.py {FIRST} --output-dir {tmp_path}/one", ranks=2)
    run(f"selflabel.py --checkpoint {tmp_path}/one/checkpoint.pth {FLAGS} --output-dir {tmp_path}/two",
        ranks=2)
    evaluate_by_every_stage(tmp_path / "two/checkpoint.pth", tmp_path, ranks=2)


@pytest.mark.slow
def test_two_processes_equal_one(pretrained, tmp_path):
    """The threshold is that of the global batch, so the same images are chosen, until rounding decides."""
    flags = (f"--checkpoint {pretrained}/checkpoint.pth {FLAGS} --epochs 1 --optimizer sgd --lr 0.05 "
             "--ema 0.9 --num-local 1 --views multicrop")
    run(f"selflabel.py {flags} --output-dir {tmp_path}/one")
    run(f"selflabel.py {flags} --output-dir {tmp_path}/two", ranks=2)
    one, two = ([line for line in log_lines(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a["fraction"] == b["fraction"]
        for key in ("loss", "threshold", "agreement"):
            assert a[key] == pytest.approx(b[key], abs=0.05 if i else 1e-4), key
    states = [torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("one", "two")]
    for part in ("model", "teacher"):
        for name, value in states[0][part].items():
            assert (value - states[1][part][name]).float().norm() <= 0.02 * (1 + value.float().norm()), name


@pytest.mark.slow
def test_a_vit_keeps_its_drop_path_and_its_teacher(here, tmp_path, monkeypatch):
    """The second stage trains with the first's noise; its teacher begins as the first's and has none."""
    here(f"pretrain.py {FIRST} --arch vit_t --batch-size 512 --ema 0.9 "
         f"--drop-path 0.3 --lr 0.01 --warmup-epochs 0 --output-dir {tmp_path}/first")
    built, build = [], selflabel.build_ours
    monkeypatch.setattr(selflabel, "build_ours", lambda *args: built.append(build(*args)) or built[-1])
    here(f"selflabel.py --checkpoint {tmp_path}/first/checkpoint.pth --batch-size 512 --epochs 1 --ema 0.5 "
         f"--quantile 0 --quantile-end 0 --output-dir {tmp_path}/second")
    assert [round(network.backbone.blocks[11].drop_path.p, 6) for network in built] == [0.3, 0]
    first, second = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
                     for name in ("first", "second"))
    for part in ("model", "teacher"):                          # no step was made: it is what was loaded
        assert second[part]["backbone.cls_token"].equal(first[part]["backbone.cls_token"])
    assert not first["model"]["backbone.cls_token"].equal(first["teacher"]["backbone.cls_token"])


def is_trained(name):
    return "running" not in name and "tracked" not in name


@pytest.mark.parametrize("amp", ["off", pytest.param("fp16", marks=pytest.mark.slow)])
def test_without_a_confident_image_the_step_is_left_out(pretrained, here, tmp_path, amp):
    """No image is strictly above the greatest confidence."""
    here(f"selflabel.py --checkpoint {pretrained}/checkpoint.pth {FLAGS} --epochs 1 --quantile 0 "
         f"--quantile-end 0 --ema 0.5 --amp {amp} --device cpu --output-dir {tmp_path}/run")
    entries = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    assert [e["left_out"] for e in entries] == [2, 4, 6, 8]
    assert entries[-1]["fraction"] == entries[-1]["loss"] == 0
    state, before = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True), weights(pretrained)
    for part in ("model", "teacher"):
        assert all(value.equal(before[name]) for name, value in state[part].items() if is_trained(name))


def test_steps_without_a_confident_image_in_fp16(pretrained, here, tmp_path):
    """⌊quantile · 64⌋ is 0 in the first steps and more in the last. The scaler is updated after both."""
    here(f"selflabel.py --checkpoint {pretrained}/checkpoint.pth {FLAGS} --epochs 1 --quantile 0 "
         f"--quantile-end 0.1 --warmup-epochs 0 --print-every 1 --image-size 16 --amp fp16 "
         f"--output-dir {tmp_path}/run")
    entries = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    confident = [e["fraction"] > 0 for e in entries]
    assert confident == sorted(confident) and 0 < sum(confident) < len(confident) == 8
    assert entries[-1]["left_out"] == 8 - sum(confident)
    state, before = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True), weights(pretrained)
    overflows = math.log2(2 ** 16 / state["scaler"]["scale"])       # each halves the scale and skips a step
    assert state["optimizer"]["state"][0]["step"] == sum(confident) - overflows > 0
    assert not state["model"]["backbone.conv1.weight"].equal(before["backbone.conv1.weight"])


def collapsed_network(path, bias):
    """Writes a checkpoint whose classes do not depend on the image; bias: logit of the first of ten."""
    state = torch.load(saved_network(path, "--data fake --image-size 16 --no-nbs"), weights_only=True)
    head = "projection_heads.last_linear"
    torch.nn.init.normal_(state["model"][f"{head}.weight"], std=1e-4)
    state["model"][f"{head}.bias"] = bias * torch.eye(10)[0]
    save_checkpoint(path, state)
    return path


@pytest.mark.parametrize("bias, word", [(0, "uniform"), (3, "one-class")])
def test_a_collapse_is_named_in_lines_that_fit_120_columns(bias, word, here, tmp_path):
    network = collapsed_network(tmp_path / "network.pth", bias)
    flags = f"{FLAGS} --epochs 1 --lr 0"
    out, _ = here(f"selflabel.py --checkpoint {network} {flags} --output-dir {tmp_path}/run")
    entries = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    assert [e["collapsed"] for e in entries] == 4 * [word]
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(steps) == 4 and all(len(line) <= 120 for line in steps)
    assert all(line.endswith(f"| collapsed: {word}") for line in steps)


@pytest.mark.parametrize("bad, names", [
    ("", None), ("--quantile 1", "argument --quantile: 1: must be a number of at least 0 and below 1"),
    ("--quantile-end -0.1", "argument --quantile-end: -0.1: must be"),
    ("--ema 1", "argument --ema: 1: must be"),
    ("--checkpoint nothing.pth", "nothing.pth"), ("--checkpoint {other}", "other.pth"),
    ("--data nowhere", "nowhere"), ("--batch-size 1024", "the data set has only 512 images"),
    ("--bunch-size 24", "bunch size 24"), ("--arch resnet8", "--arch"),
    ("--num-local 2 --views moco", "num-local")])
def test_bad_input_is_one_line_and_code_2(pretrained, bad, names, here, tmp_path):
    state = torch.load(pretrained / "checkpoint.pth", weights_only=True)
    state["config"]["hidden_dim"] = 33
    torch.save(state, tmp_path / "other.pth")
    command = (f"selflabel.py --checkpoint {pretrained}/checkpoint.pth {FLAGS} --epochs 1 "
               f"--output-dir {tmp_path}/out " + bad.format(other=tmp_path / "other.pth"))
    _, err = here(command, code=2 if names else 0)
    if names is None:
        assert (tmp_path / "out/metrics.json").exists()
    else:
        assert err.count("\n") == 1 and names in err
        assert not (tmp_path / "out").exists()
