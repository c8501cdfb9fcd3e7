"""distill.py teaches a student what any project's network sees, alone and in two processes; noise resumes."""

import shutil

import pytest
import torch
import torch.nn.functional as F
import torchvision
from processes import log_lines, metrics_of, run, same, weights
from torch import nn

import distill
from checkpoint import UserError, load_backbone, load_head, save_checkpoint
from data import Batches, build_dataset, input_of
from model import Embedder, build_backbone, build_network
from pretrained import fingerprint, load_teacher
from views import build_views

FLAGS = "--batch-size 64 --epochs 2 --print-every 2 --queue-size 192"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A larger network, pre-trained for eight steps."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    run("pretrain.py --data fake --image-size 16 --arch resnet8_2x2 --batch-size 64 --epochs 1 "
        f"--hidden-dim 32 --knn-every 0 --output-dir {folder}")
    return folder / "checkpoint.pth"


@pytest.fixture(scope="module")
def distilled(teacher):
    """A run with small crops, and so with both queues."""
    folder = teacher.parent.parent / "distilled"
    run(f"distill.py --teacher {teacher} {FLAGS} --num-local 2 --output-dir {folder}")
    return folder


def test_a_student_learns(teacher, distilled):
    first, *lines = log_lines(distilled)
    config = first["config"]
    assert config["total_steps"] == 16 and config["loss"] == "seed"
    assert config["data"] == "fake" and config["embedding_dim"] == 32                   # the teacher's
    assert config["teacher_head"] == "projection_heads.projection_head"
    entries = [line for line in lines if "loss" in line]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert all(0 < e["positive_mass"] <= 1 and -1 <= e["cosine"] <= 1 for e in entries)
    assert entries[-1]["cosine"] > entries[0]["cosine"] + 0.1 and lines[-1]["status"] == "done"
    assert {path.name for path in distilled.iterdir()} == {
        ".lock", "checkpoint.pth", "backbone.pth", "backbone.json",
        "config.json", "log.jsonl", "metrics.json"}
    state = torch.load(distilled / "checkpoint.pth", weights_only=True)
    assert {name.split(".")[0] for name in state["model"]} == {"backbone", "fc"}
    backbone, _, head, _ = load_teacher(teacher)
    assert config["teacher_sha256"] == fingerprint(Embedder(backbone, head))
    exported = load_backbone(build_backbone("resnet8"), distilled / "backbone.pth")
    assert exported.left_over == []
    written = torch.load(distilled / "backbone.pth", weights_only=True)
    assert all(value.equal(state["model"][f"backbone.{name}"]) for name, value in written.items())


def test_a_student_is_evaluated_and_teaches(distilled, here, tmp_path):
    here(f"knn.py --checkpoint {distilled}/checkpoint.pth --k 5 --output-dir {tmp_path}/knn")
    assert metrics_of(tmp_path / "knn")["top1"]["5"] > 0.9
    here(f"distill.py --teacher {distilled}/checkpoint.pth {FLAGS} --epochs 1 --output-dir {tmp_path}/again")
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
        images, uniforms, _ = batches[step]
        with torch.no_grad():
            embeddings = F.normalize(network(views(images, uniforms))[:2], dim=-1)
        start = step * 64 % 192
        torch.testing.assert_close(queues[:, start:start + 64], embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_queues_and_dropout_are_resumed(teacher, here, tmp_path, monkeypatch):
    """A MobileNet has dropout: a run in two halves must see the same noise."""
    flags = (f"--teacher {teacher} --arch mobilenet_v3_large --batch-size 256 --queue-size 512 --lr 0.01 "
             "--epochs 1 --num-local 1")
    here(f"distill.py {flags} --output-dir {tmp_path}/whole")

    def save_and_stop(path, state):
        save_checkpoint(path, state)
        if state["step"] == 1:
            raise SystemExit(99)

    with monkeypatch.context() as patch:
        patch.setattr("run.save_checkpoint", save_and_stop)
        here(f"distill.py {flags} --save-every 1 --output-dir {tmp_path}/halves", code=99)
    here(f"distill.py {flags} --save-every 1 --output-dir {tmp_path}/halves")
    assert {"resumed_from": 1} in log_lines(tmp_path / "halves")
    whole, halves = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
                     for name in ("whole", "halves"))
    assert same(whole["model"], halves["model"]) and same(whole["queues"], halves["queues"])


@pytest.mark.slow
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


def test_the_published_schedule(teacher, here, tmp_path):
    """By epochs; the warm-up begins at --lr itself, not at its multiple for the batch; then a cosine."""
    flags = f"--teacher {teacher} --batch-size 128 --queue-size 128 --lr 0.04 --schedule epochs"
    here(f"distill.py {flags} --epochs 4 --warmup-epochs 2 --output-dir {tmp_path}/cosine")
    lrs = [line["lr"] for line in log_lines(tmp_path / "cosine") if "loss" in line]
    assert lrs == pytest.approx([0.04, 0.03, 0.01, 0.02 * 0.5 * (1 + 2 ** -0.5 * -1)])
    here(f"distill.py {flags} --epochs 3 --warmup-epochs 0 --milestones 1 2 --output-dir {tmp_path}/steps")
    lrs = [line["lr"] for line in log_lines(tmp_path / "steps") if "loss" in line]
    assert lrs == pytest.approx([0.02, 0.002, 0.0002])


def test_a_collapse_is_named_in_lines_that_fit_120_columns(teacher, here, tmp_path, monkeypatch):
    """The spread is the variance of the directions, summed over the dimensions."""
    assert distill.spread(torch.ones(8, 5)) == 0 and distill.spread(torch.eye(8)) == pytest.approx(7 / 8)

    def constant_student(config):
        student = build_network(config)
        nn.init.zeros_(student.fc[-1].weight)
        return student
    monkeypatch.setattr(distill, "build_network", constant_student)
    out, _ = here(f"distill.py --teacher {teacher} {FLAGS} --epochs 1 --lr 0 --output-dir {tmp_path}/run")
    entries = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    assert [e["collapsed"] for e in entries] == 4 * ["constant"]
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert len(steps) == 4 and all(len(line) <= 120 for line in steps)
    assert all(line.endswith("| collapsed: constant") for line in steps)


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
    "MoCo v2": ("fc", mlp(128, 128, 16), "module.encoder_q.", "module.encoder_q.fc.", "state_dict"),
    "SimCLR": ("fc", mlp(128, 128, 16, norm=True), "module.module.module.", "module.module.module.fc.",
               "model"),
    "SwAV": ("projection_head", mlp(128, 64, 16, norm=True), "module.", "module.projection_head.", None),
    "SwAV w5": ("projection_head", mlp(128, 64, 16), "module.", "module.projection_head.", None),
    "Barlow Twins": ("projector", mlp(128, 64, 64, 64, norm=True, bias=False), "module.backbone.",
                     "module.projector.", "model"),
    "VICReg": ("projector", mlp(128, 64, 16, norm=True, last_norm=True), "module.backbone.",
               "module.projector.", "model"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_of_other_projects(layout, tmp_path):
    name, head, backbone_at, head_at, key = LAYOUTS[layout]
    torch.manual_seed(0)
    backbone, head = build_backbone("resnet8"), spread(head)
    state = {backbone_at + n: t for n, t in backbone.state_dict().items()}
    state |= {head_at + n: t for n, t in head.state_dict().items()}
    state["module.prototypes.weight"] = torch.ones(3)
    torch.save({key: state, "epoch": 1} if key else state, tmp_path / "file.pth")
    ours, found, ours_head, _ = load_teacher(tmp_path / "file.pth", "resnet8")
    assert found == name
    x = torch.randn(4, 128)
    assert ours_head.eval()(x).equal(head(x)) and ours.conv1.weight.equal(backbone.conv1.weight)
    assert load_teacher(tmp_path / "file.pth", "resnet8", "none")[1] == "none"
    with pytest.raises(UserError, match="--teacher-head head"):
        load_teacher(tmp_path / "file.pth", "resnet8", "head")


@pytest.mark.parametrize("arch", ["resnet8", "vit_t"])
def test_the_head_of_twist_is_its_hidden_layers(arch, tmp_path):
    config = dict(arch=arch, num_classes=7, hidden_dim=24, bunch_size=0, nbs=True, small_images=False)
    torch.manual_seed(0)
    network = build_network(config)
    spread(network)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    save_checkpoint(tmp_path / "ours.pth", {"model": network.state_dict(), "config": config})
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
    ("--teacher {bare} --teacher-arch resnet8_2x2 --data fake --image-size 16", None),
    ("--teacher {bare} --teacher-arch resnet8_2x2", "--data"),
    ("--teacher {garbage}", "garbage.pth"),
    ("--queue-size 200", "--queue-size 200: not divisible by --batch-size 64; 256 would be"),
    ("--queue-size 0", "argument --queue-size: 0: must be a whole number of at least 1"),
    ("--student-temperature 0", "argument --student-temperature: 0: must be"),
    ("--teacher-temperature nan", "argument --teacher-temperature: nan: must be"),
    ("--arch squeezenet1_0", "squeezenet1_0"), ("--arch vit_t --small-images", "vit_t"),
    ("--batch-size 1024 --queue-size 1024", "--batch-size 1024"),
    ("--views moco --num-local 2", "--num-local"), ("--arch mobilenet_v3_large --small-images", "mobilenet"),
    ("--milestones 1", "--milestones"), ("--std 0", "--std"), ("--data nowhere", "nowhere")])
def test_bad_input_is_one_line_and_code_2(teacher, bad, names, here, tmp_path):
    (tmp_path / "garbage.pth").write_bytes(b"PK\3\4 no more")
    shutil.copy(teacher.parent / "backbone.pth", tmp_path / "bare.pth")            # without its backbone.json
    bad = bad.format(bare=tmp_path / "bare.pth", garbage=tmp_path / "garbage.pth")
    command = f"distill.py --teacher {teacher} {FLAGS} --epochs 1 --output-dir {tmp_path}/out {bad}"
    _, err = here(command, code=2 if names else 0)
    if names is None:
        assert (tmp_path / "out/metrics.json").exists()
    else:
        assert err.count("\n") == 1 and names in err
        assert not (tmp_path / "out").exists()


def test_another_teacher_on_resuming_is_refused(teacher, here, tmp_path):
    """Even in a file of the same name."""
    path = tmp_path / "teacher.pth"
    path.write_bytes(teacher.read_bytes())
    command = f"distill.py --teacher {path} {FLAGS} --epochs 1 --output-dir {tmp_path}/out"
    for _ in range(2):                           # the second run only writes metrics.json
        here(command)
        (tmp_path / "out/metrics.json").unlink()
    before = weights(tmp_path / "out")
    state = torch.load(path, weights_only=True)
    state["model"]["backbone.conv1.weight"][0, 0, 0, 0] += 1
    torch.save(state, path)
    _, err = here(command, code=2)
    assert "teacher_sha256 was" in err and err.count("\n") == 1 and same(before, weights(tmp_path / "out"))


def test_a_teacher_that_changes_is_a_bug(teacher, here, tmp_path, monkeypatch):
    """The run ends with an error instead of saying that it is done."""
    digests = iter("ab")
    monkeypatch.setattr(distill, "fingerprint", lambda network: next(digests))
    with pytest.raises(RuntimeError, match="the teacher has changed"):
        here(f"distill.py --teacher {teacher} {FLAGS} --epochs 1 --output-dir {tmp_path}/out")
    assert not (tmp_path / "out/metrics.json").exists()
