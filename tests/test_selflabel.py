"""selflabel.py as a user runs it: alone, killed and resumed, over processes, with a teacher, misused."""

import json
import shlex
import signal

import pytest
import torch
from processes import ROOT, finish, run, start, wait_for
from test_pretrain import SMALL, assert_same_weights, log_lines, weights

import checkpoint
import selflabel

FLAGS = "--batch-size 64 --epochs 2 --print-every 2 --lr 0.01"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    run(f"pretrain.py {SMALL} --epochs 1 --knn-every 0 --output-dir {folder}")
    return folder


@pytest.fixture(scope="module")
def labelled(pretrained):
    """The undisturbed run that others are compared with."""
    folder = pretrained.parent / "labelled"
    run(f"selflabel.py --checkpoint {pretrained}/checkpoint.pth {FLAGS} --output-dir {folder}")
    return folder


def test_a_run_goes_on_from_the_first_stage(pretrained, labelled, tmp_path):
    first, *lines = log_lines(labelled)
    config = first["config"]
    assert config["total_steps"] == 16 and config["peak_lr"] == 0.01 / 4 and config["hidden_dim"] == 32
    entries = [line for line in lines if "loss" in line]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12, 14, 16]
    for e in entries:                                          # ⌊quantile · 64⌋ of 64 images
        assert e["fraction"] == int(e["quantile"] * 64) / 64 and 0.1 < e["threshold"] < 1 and e["loss"] > 0
        assert 1 <= e["classes"] <= 10 and 0 <= e["agreement"] <= 1 and e["left_out"] == 0
    assert entries[0]["quantile"] < 0.51 and 0.59 < entries[-1]["quantile"] <= 0.6
    assert entries[-1]["loss"] < entries[0]["loss"] and lines[-1]["status"] == "done"
    assert {path.name for path in labelled.iterdir()} == {
        ".lock", "checkpoint.pth", "backbone.pth", "config.json", "log.jsonl", "metrics.json"}
    before, after = weights(pretrained), weights(labelled)
    assert before.keys() == after.keys()
    assert not before["backbone.conv1.weight"].equal(after["backbone.conv1.weight"])
    evaluate_by_every_stage(labelled / "checkpoint.pth", tmp_path)


def evaluate_by_every_stage(path, out, ranks=1):
    """The end of the chain: cluster_eval and knn in one process, lincls and semisup in `ranks`."""
    run(f"cluster_eval.py --checkpoint {path} --output-dir {out}/classes")
    run(f"knn.py --checkpoint {path} --k 5 --output-dir {out}/knn")
    run(f"lincls.py --checkpoint {path} --cached --epochs 2 --batch-size 128 "
        f"--output-dir {out}/lincls", ranks=ranks)
    run(f"semisup.py --checkpoint {path} --label-fraction 0.5 --epochs 2 --batch-size 64 "
        f"--output-dir {out}/semisup", ranks=ranks)
    for stage in ("classes", "knn", "lincls", "semisup"):
        metrics = json.loads((out / stage / "metrics.json").read_text())
        assert metrics.get("num_test", metrics.get("num_images")) == 256, stage
    for stage in ("lincls", "semisup"):                        # what the stages write, cluster_eval reads
        run(f"cluster_eval.py --predictions {out}/{stage}/predictions.csv --output-dir {out}/{stage}_scores")


@pytest.mark.slow
def test_the_chain_in_two_processes(tmp_path):
    run(f"pretrain.py {SMALL} --output-dir {tmp_path}/one", ranks=2)
    run(f"selflabel.py --checkpoint {tmp_path}/one/checkpoint.pth {FLAGS} --output-dir {tmp_path}/two",
        ranks=2)
    evaluate_by_every_stage(tmp_path / "two/checkpoint.pth", tmp_path, ranks=2)


def test_killed_and_resumed(pretrained, labelled, tmp_path):
    command = (f"selflabel.py --checkpoint {pretrained}/checkpoint.pth {FLAGS} --save-every 1 "
               f"--output-dir {tmp_path}/killed")
    process = start(command)
    wait_for(tmp_path / "killed" / "checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    run(f"{command} --workers 2")
    assert any("resumed_from" in line for line in log_lines(tmp_path / "killed"))
    assert_same_weights(labelled, tmp_path / "killed")


def test_a_signal_saves(pretrained, tmp_path):
    command = (f"selflabel.py --checkpoint {pretrained}/checkpoint.pth {FLAGS} --epochs 50 --save-every 1 "
               f"--output-dir {tmp_path}/run")
    process = start(command)
    wait_for(tmp_path / "run" / "checkpoint.pth", process)
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process, 143)
    assert "stopped by SIGTERM" in out and log_lines(tmp_path / "run")[-1]["status"].endswith("saved")
    process = start(f"{command} --resume {tmp_path}/run/checkpoint.pth --output-dir {tmp_path}/other")
    wait_for(tmp_path / "other" / "checkpoint.pth", process)   # --data is the first stage's, not repeated
    process.kill()
    process.wait()
    assert "resumed_from" in log_lines(tmp_path / "other")[0]


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


def test_a_vit_keeps_its_drop_path_and_its_teacher(tmp_path, monkeypatch):
    """The second stage trains with the first's noise; its teacher begins as the first's and has none."""
    run(f"pretrain.py {SMALL} --arch vit_t --batch-size 256 --epochs 1 --knn-every 0 --ema 0.9 "
        f"--drop-path 0.3 --lr 0.01 --warmup-epochs 0 --output-dir {tmp_path}/first")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    built, build = [], selflabel.build_twist
    monkeypatch.setattr(selflabel, "build_twist", lambda *args: built.append(build(*args)) or built[-1])
    command = (f"--checkpoint {tmp_path}/first/checkpoint.pth --batch-size 256 --epochs 1 --ema 0.5 "
               f"--quantile 0 --quantile-end 0 --output-dir {tmp_path}/second")
    with pytest.raises(SystemExit) as stop:
        checkpoint.run(selflabel.main, selflabel.get_parser(), shlex.split(command))
    assert not stop.value.code
    assert [round(network.backbone.blocks[11].drop_path.p, 6) for network in built] == [0, 0.3, 0]
    first, second = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
                     for name in ("first", "second"))
    for part in ("model", "teacher"):                          # no step was made: it is what was loaded
        assert second[part]["backbone.cls_token"].equal(first[part]["backbone.cls_token"])
    assert not first["model"]["backbone.cls_token"].equal(first["teacher"]["backbone.cls_token"])


def test_without_a_confident_image_the_step_is_left_out(pretrained, tmp_path):
    """No image is strictly above the greatest confidence."""
    run(f"selflabel.py --checkpoint {pretrained}/checkpoint.pth {FLAGS} --epochs 1 --quantile 0 "
        f"--quantile-end 0 --ema 0.5 --output-dir {tmp_path}/run")
    entries = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    assert [e["left_out"] for e in entries] == [2, 4, 6, 8]
    assert entries[-1]["fraction"] == entries[-1]["loss"] == 0
    state, before = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True), weights(pretrained)
    for part in ("model", "teacher"):
        assert all(value.equal(before[name]) for name, value in state[part].items()
                   if "running" not in name and "tracked" not in name)


@pytest.mark.parametrize("bad, names", [
    ("", None), ("--quantile 1", "--quantile 1"), ("--quantile-end -0.1", "--quantile-end"),
    ("--ema 1", "--ema 1"), ("--checkpoint nothing.pth", "nothing.pth"),
    ("--checkpoint {other}", "other.pth"), ("--data nowhere", "nowhere"), ("--batch-size 1024", "1024"),
    ("--bunch-size 24", "bunch size 24"),
    ("--num-local 2 --views moco", "num-local")])
def test_bad_input_is_one_line_and_code_2(pretrained, bad, names, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    state = torch.load(pretrained / "checkpoint.pth", weights_only=True)
    state["config"]["hidden_dim"] = 33
    torch.save(state, tmp_path / "other.pth")
    command = (f"--checkpoint {pretrained}/checkpoint.pth {FLAGS} --epochs 1 --output-dir {tmp_path}/out "
               + bad.format(other=tmp_path / "other.pth"))
    with pytest.raises(SystemExit) as stop:
        checkpoint.run(selflabel.main, selflabel.get_parser(), shlex.split(command))
    err = capsys.readouterr().err
    if names is None:
        assert not stop.value.code and (tmp_path / "out/metrics.json").exists()
    else:
        assert stop.value.code == 2 and err.count("\n") == 1 and names in err, err
        assert not (tmp_path / "out").exists()
