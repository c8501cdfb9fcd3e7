"""Flags drawn at random: each command starts, or is refused in one line, with code 2 and nothing written."""

import argparse
import gc
import importlib
import json
import random
import signal

import pytest
import torch
from PIL import Image
from processes import ROOT, STAGES, bounds_of, saved_network

import cli
import run

EVALUATED = ("knn", "cluster_eval", "embed", "export")
ARCHS = ("resnet8", "resnet8w2_2x2", "resnet18", "vit_t", "mobilenet_v3_large", "resnet9")
USUAL = {int: ("1", "2", "3", "5", "8", "16", "32", "64"),
         float: ("0", "1e-3", "0.1", "0.25", "0.5", "0.9", "0.99", "1")}
ODD = {int: ("-1", "0", "17", "33", "96", "100", "513", "1.5", "x", "99999999999999999999"),
       float: ("-1", "1e-12", "1.5", "3", "1e3", "1e30", "nan", "inf", "-inf", "x", "0,5")}
SPECIAL = {                      # what depends on files, or would take long
    "data": ("fake", "fake", "fake", "nowhere", "cifar10", "{pile}", "{classes}", "{list}"),
    "data_dir": ("datasets", "nowhere"), "classes": ("{text}", "nowhere.txt"),
    "resume": ("auto", "never", "nowhere.pth", "{network}", "{text}"),
    "checkpoint": ("{network}", "{network}", "{network}", "{vit}", "{bare}", "{text}", "nowhere.pth"),
    "teacher": ("{network}", "{network}", "{network}", "{vit}", "{bare}", "{text}", "nowhere.pth"),
    "init": ("{network}", "{bare}", "{vit}", "{text}", "nowhere.pth"),
    "teacher_head": ("auto", "none", "fc", "projector", "x"),
    "labels": ("{labels}", "{text}", "nowhere.txt"),
    "predictions": ("{text}", "nowhere.csv"), "map_from": ("{text}", "nowhere.json"),
    "class_names": ("{text}", "nowhere.txt", "imagenet"),
    "key": ("teacher", "student", "x"), "output": ("{out}", "{text}", "nowhere/out.pth"),
    "arch": ARCHS, "teacher_arch": ARCHS, "workers": ("-1", "0", "0", "1", "-2", "x"),
    "device": ("cpu", "cpu", "cpu", "auto", "cuda", "tpu"), "amp": ("off", "bf16", "auto", "fp16", "fp8"),
    "num_local": ("0", "1", "2", "3", "-1", "x"), "local_size": ("0", "8", "16", "7", "1", "-1", "x"),
    "image_size": ("0", "8", "16", "32", "33", "48", "1", "-1", "x"),
}


class Started(Exception):
    """The first training step was made."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    rng = random.Random(0)
    for name in [f"{c}/{i}" for c in ("a", "b") for i in range(40)]:
        for folder in ("classes/train", "classes/val", "pile"):
            path = root / folder / f"{name if 'classes' in folder else name.replace('/', '')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 24), tuple(rng.randrange(256) for _ in range(3))).save(path)
    (root / "list.txt").write_text("\n".join(f"pile/a{i}.png {i % 3}" for i in range(40)))
    (root / "labels.txt").write_text("\n".join(map(str, range(300))))
    (root / "text.txt").write_text("some text")
    network = saved_network(root / "resnet8.pth", "--data fake --image-size 16")
    vit = saved_network(root / "vit_t.pth", "--data fake --arch vit_t --image-size 32")
    state = torch.load(network, weights_only=True)["model"]
    torch.save({n.removeprefix("backbone."): w for n, w in state.items() if n.startswith("backbone.")},
               root / "bare.pth")
    return dict(network=network, vit=vit, bare=root / "bare.pth", text=root / "text.txt", pile=root / "pile",
                classes=root / "classes", list=root / "list.txt", labels=root / "labels.txt")


def drawn(stage, number, files, out):
    """A command line: required flags, and some with values that may or may not make sense."""
    rng, parser = random.Random(f"{stage} {number}"), importlib.import_module(stage).get_parser()
    actions = {action.dest: action for action in parser._actions if action.help != argparse.SUPPRESS}
    del actions["help"], actions["output_dir" if "output_dir" in actions else "output"]
    flags = {"--output-dir" if stage != "export" else "--output": [str(out)]}
    if "data" in actions and rng.random() < 0.9 and stage in ("pretrain", "barlow"):
        flags["--data"] = ["fake"]
    if stage == "finetune":
        flags |= {"--data": ["fake"], "--steps": ["8"]}         # its own need longer
    if stage == "segment":
        flags |= {"--num-scenes": ["40", "2"], "--steps": ["8"], "--head-width": ["8"],
                  "--short-side": ["32"], "--crop-size": ["32"]}
    if stage == "detect":
        flags |= {"--num-scenes": ["40", "2"], "--steps": ["8"], "--width": ["8"], "--scene-size": ["32"],
                  "--short-sides": ["32"], "--test-side": ["32"]}
    if "batch_size" in actions:
        flags["--batch-size"] = [rng.choice(("2", "16", "32"))]
    for action in actions.values():
        if action.required or action.dest == "checkpoint":
            usual = SPECIAL[action.dest][:1] if action.dest in SPECIAL else action.choices
            flags[action.option_strings[0]] = [rng.choice(usual).format(**files)]
    if stage == "semisup":
        flags["--label-fraction"] = ["0.5"]                     # 1 % of 512 images are too few
    if stage in ("segment", "detect"):
        del actions["data"]                                     # the other sets are not there
    for action in rng.sample(list(actions.values()), min(rng.randrange(1, 7), len(actions))):
        flag = action.option_strings[0]
        if isinstance(action, argparse.BooleanOptionalAction):
            flags[rng.choice(action.option_strings)] = []
        elif action.nargs == 0:
            flags[flag] = []
        else:
            pool = SPECIAL.get(action.dest) or action.choices
            if not pool:
                pool = (ODD if rng.random() < 0.25 else USUAL)[bounds_of(action)["kind"]]
            count = rng.randrange(1, 4) if action.nargs == "+" else action.nargs or 1
            flags[flag] = [rng.choice(list(pool)).format(**files, out=out) for _ in range(count)]
    if "--labels" in flags:
        del flags["--label-fraction"]
    return [word for flag, values in flags.items() for word in (flag, *values)]


def outcome(stage, words, out, capfd):
    """'started' or 'refused', whichever is proper; raises AssertionError for all else."""
    script = importlib.import_module(stage)
    try:
        cli.launch(script.main, script.get_parser(), words)
    except Started:
        config, = out.rglob("config.json")                      # of a grid, in the folder of its first run
        json.loads(config.read_text())
        assert config.with_name("log.jsonl").exists() and not list(out.rglob("*.tmp"))
        return "started"
    except SystemExit as stop:
        said, code = capfd.readouterr(), stop.code or 0
        if code == 0:
            assert stage in EVALUATED, said
            return "started"
        assert code == 2 and said.err.count("\n") == 1 and ": error: " in said.err, said.err
        assert not out.exists(), f"refused, but something was written: {said.err}"
        return "refused"


def all_outcomes(stage, numbers, files, folder, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    watch = run.Run.watch

    def started(self, *args, **kwargs):
        watch(self, *args, **kwargs)
        raise Started
    monkeypatch.setattr(run.Run, "watch", started)
    torch.set_num_threads(1)
    outcomes, faults = [], []
    for number in numbers:
        out = folder / str(number)
        words = drawn(stage, number, files, out)
        try:
            outcomes.append(outcome(stage, words, out, capfd))
        except (Exception, AssertionError) as error:
            faults.append(f"{stage}.py {' '.join(words)}\n    {type(error).__name__}: {str(error)[:600]}")
        capfd.readouterr()
        gc.collect()                                            # locks and workers of this process
    assert not faults, "\n".join([f"{len(faults)} of {len(numbers)}", *faults])
    return outcomes


@pytest.mark.parametrize("stage", (*STAGES, *EVALUATED))
def test_a_few_drawn_commands(stage, files, tmp_path, capfd, monkeypatch):
    assert "refused" in all_outcomes(stage, range(204, 208), files, tmp_path, capfd, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("stage", (*STAGES, *EVALUATED))
def test_two_hundred_drawn_commands(stage, files, tmp_path, capfd, monkeypatch):
    outcomes = all_outcomes(stage, range(200), files, tmp_path, capfd, monkeypatch)
    counts = {outcome: outcomes.count(outcome) for outcome in ("started", "refused")}
    print(f"\n{stage}: {counts}")
    assert min(counts.values()) >= 15
