"""Each stage runs to its end, and after a kill the same command ends with the bits of the undisturbed run."""

import argparse
import functools
import os
import re
import signal

import pytest
import torch
from processes import (
    STAGES,
    assert_same_run,
    begin,
    finish,
    log_lines,
    losses,
    metrics_of,
    resumed_from,
    same,
)

import run
from checkpoint import UserError, load_checkpoint
from data import input_of
from pretrained import load_init, load_pretrained, load_teacher, load_trained

FILES = {                        # besides those of every stage
    "pretrain": {"backbone.pth", "backbone.json", "backbone_student.pth", "backbone_student.json",
                 "curves.png"},
    "barlow": {"backbone.pth", "backbone.json", "curves.png"},
    "selflabel": {"backbone.pth", "backbone.json", "backbone_student.pth", "backbone_student.json"},
    "distill": {"backbone.pth", "backbone.json"},
    "lincls": {"head.pth", "predictions.csv"},
    "semisup": {"backbone.pth", "backbone.json", "labels.txt", "predictions.csv"},
    "finetune": {"backbone.pth", "backbone.json", "predictions.csv"},
    "segment": {"backbone.pth", "backbone.json", "segmentation.png"},
    "detect": {"backbone.pth", "backbone.json", "detections.png", "detections.json"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_runs_to_its_end(stage, straight):
    flags, out, said, *_ = straight(stage)
    first, *_, last = log_lines(out)
    total, epoch = first["config"]["total_steps"], first["config"]["steps_per_epoch"]
    assert first["command"] == f"python {stage}.py {flags} --output-dir {out}"
    sizes = {"lincls": (33, 11), "semisup": (24, 8), "finetune": (24, 24), "segment": (24, 24),
             "detect": (24, 24)}
    assert (total, epoch) == sizes.get(stage, (24, 12))
    assert last == dict(step=total, status="done")
    steps = [entry["step"] for entry in losses(out)]
    assert steps == [step for step in range(1, total + 1) if step % 2 == 0 or step % epoch == 0]
    for entry in losses(out):
        assert entry["epoch"] == (entry["step"] - 1) // epoch + 1
        assert 0 <= entry["waiting"] <= 1 and entry["images_per_s"] > 0 and entry["memory_mib"] > 0
    assert {path.name for path in out.iterdir()} == FILES[stage] | {
        ".lock", "checkpoint.pth", "checkpoint.prev.pth", "config.json", "log.jsonl", "metrics.json"}
    state, before = load_checkpoint(out / "checkpoint.pth"), load_checkpoint(out / "checkpoint.prev.pth")
    assert (state["step"], before["step"], state["stage"]) == (total, {33: 30, 24: 21}[total], stage)
    assert said.splitlines()[-1].startswith("done: checkpoint.pth, ") and metrics_of(out)
    progress = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(progress) == len(steps) and max(map(len, progress)) <= 120


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "lincls"])
def test_backbones_are_those_of_the_checkpoint(stage, straight):
    """Of a run with a momentum encoder backbone.pth is the teacher's, backbone_student.pth the student's."""
    out = straight(stage).out
    state = load_checkpoint(out / "checkpoint.pth")
    files = {"backbone.pth": "model"}
    if "--ema" in STAGES[stage]:
        files = {"backbone.pth": "teacher", "backbone_student.pth": "model"}
        assert not same(state["teacher"], state["model"])
    for name, part in files.items():
        expected = {key.removeprefix("backbone."): tensor for key, tensor in state[part].items()
                    if key.startswith("backbone.")}
        assert same(torch.load(out / name, weights_only=True), expected)


@pytest.mark.parametrize("stage", ["lincls", "semisup", "finetune", "segment", "detect"])
def test_what_labels_trained_is_refused_with_its_backbone(stage, straight):
    out = straight(stage).out
    backbone = out / "backbone.pth" if stage != "lincls" else metrics_of(out)["checkpoint"]
    expected = f"checkpoint.pth: holds what {stage}.py trained with labels; use {backbone}, which has its"
    args = argparse.Namespace(init=out / "checkpoint.pth", output_dir=out / "no", resume="auto", restarts=1)
    for read in (load_trained, load_pretrained, load_teacher, lambda path: load_init(None, args)):
        with pytest.raises(UserError, match=re.escape(expected)):
            read(out / "checkpoint.pth")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "lincls"])
def test_a_bare_backbone_is_read_with_its_arch_and_input(stage, straight):
    """By what backbone.json says, without --arch."""
    out = straight(stage).out
    for file in out.glob("backbone*.pth"):
        if file.with_suffix(".json").name in FILES[stage]:
            backbone, config = load_pretrained(file)
            assert input_of(config) == (16, [0.5], [0.25])
            data = "scenes" if stage in ("segment", "detect") else "fake"
            assert (config["arch"], config["small_images"], config["data"]) == ("resnet8", False, data)
            assert same(backbone.state_dict(), torch.load(file, weights_only=True))


def die_after_a_save(number):
    """From now on this process kills itself when it has written the checkpoint for the number-th time."""
    save, saved = run.save_checkpoint, []

    def save_and_die(path, state):
        save(path, state)
        saved.append(state["step"])
        if len(saved) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    run.save_checkpoint = save_and_die


@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_resumes_to_the_same_bits(stage, straight, tmp_path):
    """In mid-epoch; the second half has workers, the first has none."""
    flags, undisturbed, *_ = straight(stage)
    out, die = tmp_path / "run", functools.partial(die_after_a_save, 2)
    finish(begin(stage, f"{flags} --workers 0", out, prepare=die), -signal.SIGKILL)
    assert load_checkpoint(out / "checkpoint.pth")["step"] == 6
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": half a li')
    said, _ = finish(begin(stage, f"{flags} --workers 2", out))
    assert resumed_from(out) == [6] and "resumed from step 6" in said
    assert_same_run(undisturbed, out)
    straight_losses, own_losses = ({line["step"]: line["loss"] for line in losses(folder)}
                                   for folder in (undisturbed, out))
    assert own_losses == straight_losses


@pytest.mark.parametrize("stage", ["pretrain", "barlow", "selflabel", "distill"])
def test_bf16_is_float32_but_for_rounding_and_resumes_to_the_same_bits(stage, straight, tmp_path):
    """A bf16 number has 8 bits; some CPUs are faster with them."""
    flags, in_float32, *_ = straight(stage)
    whole, killed, die = tmp_path / "whole", tmp_path / "killed", functools.partial(die_after_a_save, 2)
    said, _ = finish(begin(stage, f"{flags} --amp bf16", whole))
    assert "cpu, amp bf16" in said
    finish(begin(stage, f"{flags} --amp bf16", killed, prepare=die), -signal.SIGKILL)
    finish(begin(stage, f"{flags} --amp bf16", killed))
    assert resumed_from(killed) == [6]
    assert_same_run(whole, killed)
    exact, rounded = ([line["loss"] for line in losses(folder)] for folder in (in_float32, whole))
    assert rounded[0] == pytest.approx(exact[0], rel=0.01) and rounded[0] != exact[0]
    assert rounded[:5] == pytest.approx(exact[:5], rel=0.05)   # later, paths part as with another seed


@pytest.mark.parametrize("stage", STAGES)
def test_finished_run_says_so_and_changes_nothing(stage, straight, here):
    flags, out, *_ = straight(stage)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said, _ = here(f"{stage}.py {flags} --output-dir {out}")
    assert f"{out}: this run is finished; --overwrite starts it anew" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
