"""distill.py as a user runs it: alone, killed and resumed, over processes, from any teacher, misused."""

import json
import shlex
import signal

import pytest
import torch
import torch.nn.functional as F
from processes import ROOT, finish, run, start, wait_for
from test_pretrain import SMALL, assert_same_weights, log_lines
from torch import nn

import checkpoint
import distill
from checkpoint import UserError, load_backbone, load_head, load_teacher
from data import Batches, build_dataset, build_views, input_of
from lincls import fingerprint
from model import Embedder, build_backbone, build_twist

FLAGS = "--batch-size 64 --epochs 2 --print-every 2 --queue-size 192"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A larger network, pre-trained for eight steps."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    run(f"pretrain.py {SMALL} --epochs 1 --arch resnet8_2x2 --knn-every 0 --output-dir {folder}")
    return folder / "checkpoint.pth"


@pytest.fixture(scope="module")
def distilled(teacher):
    """The undisturbed run that others are compared with: with small crops, and so with both queues."""
    folder = teacher.parent.parent / "distilled"
    run(f"distill.py --teacher {teacher} {FLAGS} --num-local 2 --output-dir {folder}")
    return folder


def in_process(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as stop:
        checkpoint.run(distill.main, distill.get_parser(), shlex.split(command))
    return stop.value.code or 0


def test_a_student_learns(teacher, distilled, tmp_path):
    first, *lines = log_lines(distilled)
    config = first["config"]
    assert config["total_steps"] == 16 and config["peak_lr"] == config["lr"] / 4
    assert config["data"] == "fake" and config["embedding_dim"] == 32                   # the teacher's
    assert config["teacher_head"] == "projection_heads.projection_head"
    entries = [line for line in lines if "loss" in line]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert all(0 < e["positive_mass"] <= 1 and -1 <= e["cosine"] <= 1 for e in entries)
    assert entries[-1]["cosine"] > entries[0]["cosine"] + 0.1 and lines[-1]["status"] == "done"
    assert {path.name for path in distilled.iterdir()} == {
        ".lock", "checkpoint.pth", "backbone.pth", "config.json", "log.jsonl", "metrics.json"}
    state = torch.load(distilled / "checkpoint.pth", weights_only=True)
    assert {name.split(".")[0] for name in state["model"]} == {"backbone", "fc"}
    assert state["frozen"] == fingerprint(Embedder(load_teacher(teacher)[0], load_teacher(teacher)[2]))
    exported = load_backbone(build_backbone("resnet8"), distilled / "backbone.pth")
    assert exported.left_over == [] and all(value.equal(state["model"][f"backbone.{name}"]) for name, value in
                                            torch.load(distilled / "backbone.pth", weights_only=True).items())
    run(f"knn.py --checkpoint {distilled}/checkpoint.pth --k 5 --output-dir {tmp_path}/knn")
    assert json.loads((tmp_path / "knn/metrics.json").read_text())["top1"]["5"] > 0.9
    run(f"distill.py --teacher {distilled}/checkpoint.pth {FLAGS} --epochs 1 --output-dir {tmp_path}/again")
    assert log_lines(tmp_path / "again")[0]["config"]["teacher_head"] == "fc"


def test_the_queues_hold_the_latest_embeddings(teacher, distilled):
    """Of 16 × 64 images the last 192, at the places that their steps had; of the small crops the first."""
    backbone, _, head, config = load_teacher(teacher)
    network = Embedder(backbone, head).eval()
    size, mean, std = input_of(config)
    views = build_views("seed", mean, std, size, size * 3 // 7, 2, num_global=1)
    batches = Batches(build_dataset("fake", "pretrain"), 64, views, seed=0)
    queues = torch.load(distilled / "checkpoint.pth", weights_only=True)["queues"]
    assert queues.shape == (2, 192, 32)
    for step in (13, 14, 15):
        with torch.no_grad():
            embeddings = F.normalize(network(views(*batches[step]))[:2], dim=-1)
        start = step * 64 % 192
        torch.testing.assert_close(queues[:, start:start + 64], embeddings, rtol=1e-4, atol=1e-5)


def test_killed_and_resumed(teacher, distilled, tmp_path):
    command = (f"distill.py --teacher {teacher} {FLAGS} --num-local 2 --save-every 1 "
               f"--output-dir {tmp_path}/killed")
    process = start(command)
    wait_for(tmp_path / "killed" / "checkpoint.prev.pth", process)
    process.kill()
    process.wait()
    run(f"{command} --workers 2")
    assert any("resumed_from" in line for line in log_lines(tmp_path / "killed"))
    assert_same_weights(distilled, tmp_path / "killed")
    ends = [torch.load(folder / "checkpoint.pth", weights_only=True)["queues"]
            for folder in (distilled, tmp_path / "killed")]
    assert ends[0].equal(ends[1])


def test_a_signal_saves_and_a_file_goes_on_elsewhere(teacher, tmp_path):
    command = f"distill.py --teacher {teacher} {FLAGS} --epochs 50 --save-every 1 --output-dir {tmp_path}/run"
    process = start(command)
    wait_for(tmp_path / "run" / "checkpoint.pth", process)
    process.send_signal(signal.SIGUSR1)
    out, _ = finish(process, 138)
    assert "stopped by SIGUSR1" in out and log_lines(tmp_path / "run")[-1]["status"].endswith("saved")
    process = start(f"distill.py --teacher {teacher} {FLAGS} --epochs 50 --save-every 1 "
                    f"--resume {tmp_path}/run/checkpoint.pth --output-dir {tmp_path}/other")
    wait_for(tmp_path / "other" / "checkpoint.pth", process)
    process.kill()
    process.wait()
    assert "resumed_from" in log_lines(tmp_path / "other")[0]


def test_dropout_of_a_student_is_resumed_too(teacher, tmp_path, monkeypatch):
    """A MobileNet has dropout: a run in two halves must see the same noise."""
    flags = f"--teacher {teacher} --arch mobilenet_v3_large --batch-size 128 --queue-size 128 --lr 0.01"
    assert in_process(f"{flags} --epochs 1 --output-dir {tmp_path}/whole", monkeypatch) == 0
    save = distill.save_checkpoint

    class Stop(Exception):
        pass

    def save_and_stop(path, state):
        save(path, state)
        if state["step"] == 2:
            raise Stop

    monkeypatch.setattr(distill, "save_checkpoint", save_and_stop)
    halves = f"{flags} --epochs 1 --save-every 1 --output-dir {tmp_path}/halves"
    with pytest.raises(Stop):
        checkpoint.run(distill.main, distill.get_parser(), shlex.split(halves))
    monkeypatch.setattr(distill, "save_checkpoint", save)
    assert in_process(halves, monkeypatch) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "halves")


def test_two_processes_equal_one(teacher, distilled, tmp_path):
    run(f"distill.py --teacher {teacher} {FLAGS} --num-local 2 --output-dir {tmp_path}/two", ranks=2)
    one, two = ([line for line in log_lines(folder) if "loss" in line]
                for folder in (distilled, tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "positive_mass", "cosine"):
            assert a[key] == pytest.approx(b[key], rel=1e-3), key
    states = [torch.load(folder / "checkpoint.pth", weights_only=True)
              for folder in (distilled, tmp_path / "two")]
    torch.testing.assert_close(states[0]["queues"], states[1]["queues"], rtol=1e-3, atol=1e-5)
    for name, value in states[0]["model"].items():
        assert (value - states[1]["model"][name]).float().norm() <= 5e-3 * (1 + value.float().norm()), name


def test_the_published_schedule(teacher, tmp_path, monkeypatch):
    """By epochs; the warm-up begins at --lr itself, not at its multiple for the batch; then a cosine."""
    flags = f"--teacher {teacher} --batch-size 128 --queue-size 128 --lr 0.04 --schedule epochs"
    assert in_process(f"{flags} --epochs 4 --warmup-epochs 2 --output-dir {tmp_path}/cosine",
                      monkeypatch) == 0
    lrs = [line["lr"] for line in log_lines(tmp_path / "cosine") if "loss" in line]
    assert lrs == pytest.approx([0.04, 0.03, 0.01, 0.02 * 0.5 * (1 + 2 ** -0.5 * -1)])
    assert in_process(f"{flags} --epochs 3 --warmup-epochs 0 --milestones 1 2 --output-dir {tmp_path}/steps",
                      monkeypatch) == 0
    lrs = [line["lr"] for line in log_lines(tmp_path / "steps") if "loss" in line]
    assert lrs == pytest.approx([0.02, 0.002, 0.0002])


# ---------------------------------------------------------------- teachers of other projects
def mlp(*widths, norm=False, last_norm=False, bias=True):
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        last = i == len(widths) - 2
        layers.append(nn.Linear(a, b, bias=bias))
        if norm and (not last or last_norm):
            layers.append(nn.BatchNorm1d(b))
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def spread(module):
    """Running statistics as of a trained network, so that evaluation differs from the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return module.eval()


LAYOUTS = {           # name of the head, the head, names of (backbone, head) in the file, what lies around
    "MoCo v2": ("fc", mlp(512, 512, 16), "module.encoder_q.", "module.encoder_q.fc.", "state_dict"),
    "SimCLR": ("fc", mlp(512, 512, 16, norm=True), "module.module.module.", "module.module.module.fc.",
               "model"),
    "SwAV": ("projection_head", mlp(512, 64, 16, norm=True), "module.", "module.projection_head.", None),
    "SwAV w5": ("projection_head", mlp(512, 64, 16), "module.", "module.projection_head.", None),
    "Barlow Twins": ("projector", mlp(512, 64, 64, 64, norm=True, bias=False), "module.backbone.",
                     "module.projector.", "model"),
    "VICReg": ("projector", mlp(512, 64, 16, norm=True, last_norm=True), "module.backbone.",
               "module.projector.", "model"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_of_other_projects(layout, tmp_path):
    name, head, backbone_at, head_at, key = LAYOUTS[layout]
    torch.manual_seed(0)
    backbone, head = build_backbone("resnet18"), spread(head)
    state = {backbone_at + n: t for n, t in backbone.state_dict().items()}
    state |= {head_at + n: t for n, t in head.state_dict().items()}
    state["module.prototypes.weight"] = torch.ones(3)
    torch.save({key: state, "epoch": 1} if key else state, tmp_path / "file.pth")
    ours, found, ours_head, _ = load_teacher(tmp_path / "file.pth", "resnet18")
    assert found == name
    x = torch.randn(4, 512)
    assert ours_head.eval()(x).equal(head(x)) and ours.conv1.weight.equal(backbone.conv1.weight)
    assert load_teacher(tmp_path / "file.pth", "resnet18", "none")[1] == "none"
    with pytest.raises(UserError, match="--teacher-head head"):
        load_teacher(tmp_path / "file.pth", "resnet18", "head")


@pytest.mark.parametrize("arch", ["resnet8", "vit_t"])
def test_the_head_of_twist_is_its_hidden_layers(arch, tmp_path):
    config = dict(arch=arch, num_classes=7, hidden_dim=24, bunch_size=0, nbs=True, small_images=False)
    torch.manual_seed(0)
    network = build_twist(config)
    spread(network)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    checkpoint.save_checkpoint(tmp_path / "ours.pth", {"model": network.state_dict(), "config": config})
    for path, named in ((tmp_path / "published.pth", arch), (tmp_path / "ours.pth", None)):
        backbone, found, head, _ = load_teacher(path, named)
        x = torch.randn(4, backbone.feature_dim)
        assert found == "projection_heads.projection_head"
        torch.testing.assert_close(head.eval()(x), network.projection_heads.projection_head(x))


def test_a_lone_linear_layer_is_no_head_unless_named(tmp_path):
    """MoCo v1's head is as a classifier's: auto takes the features."""
    state = build_backbone("resnet18").state_dict()
    fc = nn.Linear(512, 16)
    torch.save({**state, "fc.weight": fc.weight.data, "fc.bias": fc.bias.data}, tmp_path / "file.pth")
    assert load_teacher(tmp_path / "file.pth", "resnet18")[1] == "none"
    _, name, head, _ = load_teacher(tmp_path / "file.pth", "resnet18", "fc")
    x = torch.randn(3, 512)
    assert name == "fc" and head(x).equal(fc(x))
    torch.save({**state, "fc.0.weight": torch.ones(2, 3, 4), "fc.1.weight": fc.weight.data,
                "fc.2.weight": fc.weight.data}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="odd.pth: fc: is not a projection head"):
        load_head(tmp_path / "odd.pth", "")


def test_a_mobilenet_of_torchvision_loads_whole(tmp_path):
    import torchvision
    for arch in ("mobilenet_v3_large", "efficientnet_b0"):
        torch.manual_seed(1)
        theirs = getattr(torchvision.models, arch)(weights=None).eval()
        torch.save(theirs.state_dict(), tmp_path / "file.pth")
        ours = build_backbone(arch).eval()
        load_backbone(ours, tmp_path / "file.pth")
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert theirs.classifier[-1](ours(x)).equal(theirs(x))


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize("bad, names", [
    ("", None), ("--teacher nothing.pth", "nothing.pth"),
    ("--teacher {bare}", "--teacher-arch"), ("--teacher {bare} --teacher-arch resnet18", "layer"),
    ("--teacher-arch resnet50", "--teacher-arch resnet50"), ("--teacher-head projector", "--teacher-head"),
    ("--teacher {bare} --teacher-arch resnet8_2x2 --data fake", None),
    ("--teacher {bare} --teacher-arch resnet8_2x2", "--data"),
    ("--teacher {garbage}", "garbage.pth"),
    ("--queue-size 200", "--queue-size 200"), ("--queue-size 0", "--queue-size"),
    ("--student-temperature 0", "--student-temperature"), ("--teacher-temperature nan", "--teacher-temp"),
    ("--arch squeezenet1_0", "squeezenet1_0"), ("--arch vit_t --small-images", "vit_t"),
    ("--batch-size 1024 --queue-size 1024", "--batch-size 1024"),
    ("--views moco --num-local 2", "--num-local"), ("--arch mobilenet_v3_large --small-images", "mobilenet"),
    ("--milestones 1", "--milestones"), ("--std 0", "--std"), ("--data nowhere", "nowhere")])
def test_bad_input_is_one_line_and_code_2(teacher, bad, names, tmp_path, capsys, monkeypatch):
    (tmp_path / "garbage.pth").write_bytes(b"PK\3\4 no more")
    bad = bad.format(bare=teacher.parent / "backbone.pth", garbage=tmp_path / "garbage.pth")
    code = in_process(f"--teacher {teacher} {FLAGS} --epochs 1 --output-dir {tmp_path}/out {bad}",
                      monkeypatch)
    err = capsys.readouterr().err
    if names is None:
        assert code == 0 and (tmp_path / "out/metrics.json").exists()
    else:
        assert code == 2 and err.count("\n") == 1 and names in err, err
        assert not (tmp_path / "out").exists()


def test_another_teacher_on_resuming_is_refused(teacher, tmp_path, capsys, monkeypatch):
    """Even in a file of the same name."""
    path = tmp_path / "teacher.pth"
    path.write_bytes(teacher.read_bytes())
    command = f"--teacher {path} {FLAGS} --output-dir {tmp_path}/out"
    for _ in range(2):                   # the second finds its end, and writes what is missing
        assert in_process(command, monkeypatch) == 0
        (tmp_path / "out/metrics.json").unlink()
    state = torch.load(path, weights_only=True)
    state["model"]["backbone.conv1.weight"][0, 0, 0, 0] += 1
    torch.save(state, path)
    assert in_process(command, monkeypatch) == 2 and "--teacher" in capsys.readouterr().err
