"""Lists of labels and each mistake in them, balanced fractions, fine-tuning as torch's own pieces do it."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import log_lines, metrics_of, run, same, saved_network, weights
from torch import nn

import checkpoint
import pretrained
import semisup
from checkpoint import UserError
from data import Batches, ImageSet, build_dataset, draw_labels, eval_batches, input_of
from semisup import label_lines, read_labels
from views import Views

NAMES = ["n01440764", "n01443537", "n02002724"]


def small(network, out, labels="--label-fraction 0.25"):
    return (f"semisup.py --checkpoint {network} {labels} --batch-size 32 --epochs 4 --lr 0.3 --head-lr 1 "
            f"--print-every 2 --output-dir {out}")


def predictions_of(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return [int(row["prediction"]) for row in csv.DictReader(file)]


# ---------------------------------------------------------------- lists of labels
@pytest.fixture
def pictures():
    """A set of files, 20 of each class, named as ImageNet's; nothing is read from them."""
    paths = [f"data/train/{name}/{name}_{i}.JPEG" for name in NAMES for i in range(20)]
    labels = torch.arange(3).repeat_interleave(20)
    return ImageSet(None, labels, list(NAMES), np.array([path.encode() for path in paths]))


def test_simclrs_lists_class_lists_and_indices_are_read(pictures, tmp_path):
    path = tmp_path / "list.txt"
    wanted = torch.tensor([41, 3, 25, 0])
    for lines in ([f"{NAMES[i // 20]}_{i % 20}.JPEG" for i in wanted],                   # as SimCLR's
                  [f"{NAMES[i // 20]}/{NAMES[i // 20]}_{i % 20}.JPEG" for i in wanted],
                  [f"{NAMES[i // 20]}/{NAMES[i // 20]}_{i % 20}.JPEG {i // 20}" for i in wanted],
                  [f"{NAMES[i // 20]}/{NAMES[i // 20]}_{i % 20}.JPEG {NAMES[i // 20]}" for i in wanted]):
        path.write_text("\n".join(lines) + "\n\n")
        assert torch.equal(read_labels(path, pictures), wanted)
    in_memory = ImageSet(torch.zeros(60, 1, 2, 2, dtype=torch.uint8), pictures.labels, list(NAMES))
    for lines in ("41\n3\n25\n0", f"41 {NAMES[2]}\n3 0\n25 1\n0 0\n"):
        path.write_text(lines)
        assert torch.equal(read_labels(path, in_memory), wanted)


@pytest.mark.parametrize("line, message", [
    ("", None),
    ("n01440764_77.JPEG", "line 4: 'n01440764/n01440764_77.JPEG' is not among the training images"),
    ("n09999999_1.JPEG", "line 4: unknown class 'n09999999'"),
    ("n01440764/n01440764_1.JPEG dog", "line 4: unknown class 'dog'"),
    ("n01440764/n01440764_1.JPEG 3", "line 4: unknown class '3'"),
    ("n01440764/n01440764_1.JPEG 1", "line 4: 'n01440764/n01440764_1.JPEG' is of class 'n01440764', not"),
    ("n01443537_2.JPEG", "line 4: 'n01443537/n01443537_2.JPEG' is there already, in line 2")])
def test_mistakes_in_a_list_are_named(pictures, line, message, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"n01440764_0.JPEG\nn01443537_2.JPEG\nn02002724_5.JPEG\n{line}\n")
    if message is None:
        assert read_labels(path, pictures).tolist() == [0, 22, 45]
    else:
        with pytest.raises(UserError) as error:
            read_labels(path, pictures)
        assert str(error.value).startswith(f"--labels {path}: {message}")


def test_empty_classes_empty_lists_and_doubtful_names(pictures, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("n01440764_0.JPEG\nn02002724_5.JPEG\n")
    with pytest.raises(UserError, match="no image of class 'n01443537', as of 1 of 3 classes"):
        read_labels(path, pictures)
    path.write_text("\n \n")
    with pytest.raises(UserError, match="an empty list"):
        read_labels(path, pictures)
    pictures.paths = np.array([*pictures.paths[:1], b"data/train/n01440764/below/n01440764_0.JPEG",
                               *pictures.paths[2:]])
    path.write_text("n01440764_0.JPEG\n")
    with pytest.raises(UserError, match="is the name of 2 training images"):
        read_labels(path, pictures)


@pytest.mark.parametrize("sizes", [[600] * 10, [700, 900, 1300], [3, 500, 500]])
def test_a_fraction_is_balanced_seeded_and_can_be_given_back(sizes, tmp_path):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    names = [f"class {c}" for c in range(len(sizes))]                    # with a space: written as numbers
    paths = np.array([f"{i}/my {i}.png".encode() for i in range(len(labels))])
    for dataset in (ImageSet(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels, names),
                    ImageSet(None, labels, names, paths),
                    ImageSet(None, labels, [name.replace(" ", "") for name in names], paths)):
        indices = draw_labels(dataset, 0.1, seed=1)
        counts = torch.bincount(labels[indices]).tolist()
        full = [c for c, size in zip(counts, sizes, strict=True) if c < size]
        assert max(full) - min(full) <= 1 and len(set(indices.tolist())) == len(indices)
        assert sum(counts) == round(0.1 * len(labels)) or sizes[0] == counts[0] == 3
        assert torch.equal(indices, draw_labels(dataset, 0.1, seed=1))
        assert not torch.equal(indices, draw_labels(dataset, 0.1, seed=2))
        (tmp_path / "list.txt").write_text(label_lines(dataset, indices))
        assert torch.equal(read_labels(tmp_path / "list.txt", dataset), indices)
        assert len(draw_labels(dataset, 1.0, seed=1)) == len(labels)
        with pytest.raises(UserError, match="--label-fraction 0.0001: no image of class"):
            draw_labels(dataset, 0.0001, seed=1)
        for fraction in (0, 1.5, float("nan")):
            with pytest.raises(UserError, match="above 0 and at most 1"):
                draw_labels(dataset, fraction, seed=1)


# ---------------------------------------------------------------- whole runs
@pytest.mark.parametrize("steps", [False, True])
def test_fine_tuning_is_what_torchs_pieces_do(network, tmp_path, here, steps):
    """Its own loop: SGD with two learning rates, CosineAnnealingLR by epoch, batch norms in training mode; or
    with weight decay, MultiStepLR and bilinear pictures."""
    flags = "--weight-decay 0.1 --milestones 1 3 --interpolation bilinear" if steps else ""
    here(f"{small(network, tmp_path / 'run')} {flags}")
    metrics = metrics_of(tmp_path / "run")
    assert metrics["num_train"] == 128 and metrics["num_test"] == 256 and "held_out_top1" not in metrics
    backbone, config = pretrained.load_pretrained(network)
    size, mean, std = input_of(config)
    dataset = build_dataset("fake", "train").subset(draw_labels(build_dataset("fake", "train"), 0.25, 0))
    if steps:
        config["interpolation"] = "bilinear"
    crop = dict(scale=(0.08, 1), interpolation=config.get("interpolation", "bicubic"))
    views = Views([(size, crop)], mean, std)
    batches = Batches(dataset, 32, views, seed=0)
    torch.manual_seed(0)
    linear = nn.Linear(128, 10)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    model = nn.Sequential(backbone, linear).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD([dict(params=backbone.parameters(), lr=0.3 / 8),
                                 dict(params=linear.parameters(), lr=1 / 8)], momentum=0.9,
                                weight_decay=0.1 * steps)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    if steps:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.1)
    for step in range(4 * 4):
        images, uniforms, labels = batches[step]
        loss = F.cross_entropy(model(views(images, uniforms)[0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 3:
            scheduler.step()
    state = weights(tmp_path / "run")
    for name, value in backbone.state_dict().items():
        a, b = state[f"backbone.{name}"].double(), value.double()
        assert (a - b).norm() <= 0.02 * b.norm(), name
    before = pretrained.load_pretrained(network)[0].state_dict()
    moved = [name for name in before if not torch.equal(before[name], state[f"backbone.{name}"])]
    assert len(moved) == len(before)                            # every parameter and every statistic

    # what was saved is what was reported
    model[0].load_state_dict(torch.load(tmp_path / "run" / "backbone.pth", weights_only=True))
    model[1].load_state_dict({key: state[f"head.{key}"] for key in ("weight", "bias")})
    test = build_dataset("fake", "test")
    with torch.no_grad():
        predicted = torch.cat([model.eval()(x) for x in eval_batches(test, config, "cpu", 32)]).argmax(1)
    assert predicted.tolist() == predictions_of(tmp_path / "run")
    assert (predicted == test.labels).double().mean().item() == metrics["test_top1"] > 0.3

    # the list that was written gives the same run
    here(small(network, tmp_path / "again", labels=f"--labels {tmp_path}/run/labels.txt {flags}"))
    assert metrics_of(tmp_path / "again") == metrics


def test_noise_of_the_network_is_resumed(here, tmp_path, monkeypatch):
    """A MobileNet has dropout: a run in two halves sees the same noise."""
    network = saved_network(tmp_path / "network.pth", "--data fake --arch mobilenet_v3_large --image-size 16")
    flags = f"--checkpoint {network} --label-fraction 0.1 --batch-size 12 --epochs 1 --save-every 2"
    here(f"semisup.py {flags} --output-dir {tmp_path}/whole")

    def save_and_stop(path, state):
        checkpoint.save_checkpoint(path, state)
        if state["step"] == 2:
            raise SystemExit(99)

    with monkeypatch.context() as patch:
        patch.setattr("run.save_checkpoint", save_and_stop)
        here(f"semisup.py {flags} --output-dir {tmp_path}/halves", code=99)
    here(f"semisup.py {flags} --output-dir {tmp_path}/halves")
    assert log_lines(tmp_path / "whole")[0]["config"]["total_steps"] == 4
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "halves"))


def test_held_out_images_leave_the_test_set_alone(network, tmp_path, here):
    out, _ = here(f"{small(network, tmp_path)} --held-out 0.25")
    metrics = metrics_of(tmp_path)
    assert metrics["num_train"] == 98 and metrics["num_held_out"] == 30 and "test_top1" not in metrics
    assert f"held-out top-1 {metrics['held_out_top1']:.4f}" in out
    logged = [line["held_out_top1"] for line in log_lines(tmp_path) if "held_out_top1" in line]
    assert len(logged) == 4 and logged[-1] == metrics["held_out_top1"]
    assert len(predictions_of(tmp_path)) == 30


def test_random_init_is_the_same_network_from_scratch(network, tmp_path, here):
    out, _ = here(f"{small(network, tmp_path)} --random-init --seed 5 --lr 0 --epochs 1")
    assert "resnet8, random weights" in out
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)
    before = pretrained.load_pretrained(network)[0].state_dict()
    torch.manual_seed(5)
    fresh = semisup.build_backbone("resnet8").state_dict()
    assert torch.equal(state["conv1.weight"], fresh["conv1.weight"])
    assert not torch.equal(state["conv1.weight"], before["conv1.weight"])


def test_pictures_from_files_by_a_list_in_simclrs_form(tmp_path, here):
    for split, number in (("train", 12), ("val", 5)):
        for name, colour in zip(NAMES, ((200, 30, 30), (30, 200, 30), (30, 30, 200)), strict=True):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (40 + i, 36), colour).save(folder / f"{name}_{i}.JPEG")
    lines = [f"{name}_{i}.JPEG\n" for name in NAMES for i in range(4)]
    (tmp_path / "list.txt").write_text("".join(lines))
    flags = f"--data {tmp_path}/data --image-size 32 --arch resnet8_2x2"
    path = saved_network(tmp_path / "network.pth", flags)
    here(f"semisup.py --checkpoint {path} --labels {tmp_path}/list.txt --batch-size 6 --epochs 8 --lr 0.5 "
         f"--head-lr 2 --workers 1 --output-dir {tmp_path}/run")
    metrics = metrics_of(tmp_path / "run")
    assert metrics["num_train"] == 12 and metrics["test_top1"] > 0.5
    assert (tmp_path / "run" / "labels.txt").read_text().startswith("n01440764/n01440764_0.JPEG n01440764\n")


# ---------------------------------------------------------------- several processes
def test_two_processes_train_and_three_evaluate(network, tmp_path, here):
    """Batch norms are by process, so the weights are others than one process's; evaluated by one and by three
    processes they give the same predictions, each test image once."""
    command = small(network, tmp_path).replace("--batch-size 32", "--batch-size 36")
    run(command, ranks=2)
    two, predictions = metrics_of(tmp_path), predictions_of(tmp_path)
    first, second = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["rng"]
    assert not first[0].equal(second[0])                       # each process has its own noise for dropout
    assert two["test_top1"] > 0.3 and len(predictions) == 256
    for n in (1, 3):
        (tmp_path / "metrics.json").unlink()
        if n == 1:
            here(command)
        else:
            run(command, ranks=3)
        assert metrics_of(tmp_path) == two and predictions_of(tmp_path) == predictions


# ---------------------------------------------------------------- misuse
@pytest.mark.parametrize("bad, code, names", [
    ("", 0, None), ("--label-fraction 0.01", 2, "no image of class"),
    ("--labels none.txt", 2, "not allowed with"), ("--lr -1", 2, "--lr"),
    ("--label-fraction 0", 2, "--label-fraction 0.0"),
    ("--label-fraction 2", 2, "--label-fraction 2.0"), ("--held-out 1", 2, "--held-out: 1"),
    ("--held-out 0.01", 2, "holds out none"), ("--batch-size 129", 2, "at most the 128 labelled"),
    ("--key teacher", 2, "has no 'teacher'"), ("--lr 1e30", 3, "is not finite (lr")])
def test_bad_input_is_one_line(network, bad, code, names, tmp_path, here):
    _, err = here(f"{small(network, tmp_path / 'out')} --epochs 1 {bad}", code)
    if code:
        assert err.count("\n") == 1 and names in err, err
        assert not (tmp_path / "out" / "metrics.json").exists()
    if code == 2:
        assert not (tmp_path / "out").exists()


def test_a_missing_list_is_named(network, tmp_path, here):
    _, err = here(small(network, tmp_path / "out", labels="--labels none.txt"), 2)
    assert err.count("\n") == 1 and "--labels none.txt: cannot be read (No such file or directory)" in err


def test_a_list_that_changed_is_refused_on_resuming(network, tmp_path, here):
    path = tmp_path / "list.txt"
    path.write_text("\n".join(map(str, range(64))))
    command = small(network, tmp_path / "run", labels=f"--labels {path}")
    here(command)
    assert metrics_of(tmp_path / "run")["num_train"] == 64
    (tmp_path / "run" / "metrics.json").unlink()
    path.write_text("\n".join(map(str, range(100, 164))))
    _, err = here(command, 2)
    assert "made with another configuration (labels_sha256 was" in err
