"""Linear evaluation: the grid against single heads and torch's own pieces, files, processes, misuse."""

import csv
import json
import shlex
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from processes import ROOT, finish, run, start, wait_for
from torch import nn

import checkpoint
import lincls
import pretrain
from data import Batches, Views, build_dataset, eval_batches, input_of
from lincls import Heads, accuracies, build_reader, classify, head_losses, hold_out, pool_depth, sgd_step
from model import Twist, build_backbone


def saved_network(folder, flags):
    """A checkpoint of an untrained network, as pretrain.py with these flags would begin."""
    torch.manual_seed(0)
    config = vars(checkpoint.parse_args(pretrain.get_parser(), shlex.split(flags)))
    network = Twist(config["arch"], config["num_classes"], 32, small_images=config["small_images"])
    config["hidden_dim"] = 32
    path = folder / f"{config['arch']}.pth"
    checkpoint.save_checkpoint(path, dict(model=network.state_dict(), config=config, step=1))
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return saved_network(tmp_path_factory.mktemp("network"), "--data fake --arch resnet8")


@pytest.fixture
def here(monkeypatch):
    """Runs the stage in this process, as importing torch costs more than all else; returns the exit code."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                    # as of the processes it is compared with

    def call(command):
        with pytest.raises(SystemExit) as stop:
            checkpoint.run(lincls.main, lincls.get_parser(), shlex.split(str(command)))
        return stop.value.code or 0
    yield call
    torch.set_num_threads(threads)


def small(network, out):
    return f"--checkpoint {network} --batch-size 48 --epochs 2 --lrs 0.3 3 --print-every 2 --output-dir {out}"


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def predictions_of(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return [int(row["prediction"]) for row in csv.DictReader(file)]


# ---------------------------------------------------------------- the heads
@pytest.mark.parametrize("nesterov", [False, True])
def test_every_head_of_a_grid_is_the_one_that_torch_trains_alone(nesterov):
    """Five steps of Heads and sgd_step against nn.Linear and torch.optim.SGD, in float64."""
    torch.manual_seed(0)
    x, labels = torch.randn(5, 16, 12, dtype=torch.float64), torch.randint(0, 4, (5, 16))
    grid = [(0.1, 0.0), (0.1, 0.01), (2.0, 0.0), (0.01, 0.3), (1e200, 0.0)]      # the last diverges, alone
    heads = Heads(x[0], len(grid), 4).double()
    first = heads.one(2)
    velocities = [torch.zeros_like(w) for w in heads.parameters()]
    lrs, decays = torch.tensor(grid, dtype=torch.float64).T
    for step in range(5):
        heads.zero_grad()
        head_losses(heads(x[step]), labels[step]).sum().backward()
        sgd_step(list(heads.parameters()), velocities, lrs, decays, nesterov=nesterov)
    for g, (lr, decay) in enumerate(grid[:4]):
        linear = nn.Linear(12, 4).double()
        linear.load_state_dict({name: value[0] for name, value in first.items()})
        optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9, weight_decay=decay,
                                    nesterov=nesterov)
        for step in range(5):
            optimizer.zero_grad()
            F.cross_entropy(linear(x[step]), labels[step]).backward()
            optimizer.step()
        torch.testing.assert_close(heads.weight[g], linear.weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(heads.bias[g], linear.bias, rtol=0, atol=1e-12)
    assert not heads.weight[4].isfinite().all() or heads.weight[4].abs().max() > 1e100


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    heads = Heads(torch.zeros(2, 512), 3, 100)
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.02) and not heads.bias.any()
    assert torch.equal(heads.weight[0], heads.weight[2]) and abs(heads.weight.mean().item()) < 1e-4


def test_accuracies_against_counting_and_a_diverged_head():
    torch.manual_seed(0)
    heads = Heads(torch.zeros(2, 6), 3, 8)
    heads.weight.data.normal_()
    heads.weight.data[2] = torch.nan
    x, labels = torch.randn(50, 6), torch.randint(0, 8, (50,))
    classes, = classify([heads], [[x[:20]], [x[20:]]])
    top1, top5 = accuracies(classes, labels)
    for g in range(2):
        logits = x @ heads.weight[g].T
        order = logits.argsort(1, descending=True)
        assert top1[g] == sum(int(order[i, 0]) == int(labels[i]) for i in range(50)) / 50
        assert top5[g] == sum(bool(labels[i] in order[i, :5]) for i in range(50)) / 50
    assert top1[2] == top5[2] == 0


def test_held_out_images_are_balanced_seeded_and_apart():
    labels = torch.arange(1000) % 7 * (torch.arange(1000) % 3 > 0)               # unequal classes
    kept, held = hold_out(labels, 0.2, seed=3)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(1000))
    for c in range(7):
        assert (labels[held] == c).sum() == round(0.2 * int((labels == c).sum()))
    assert torch.equal(held, hold_out(labels, 0.2, seed=3)[1])
    assert not torch.equal(held, hold_out(labels, 0.2, seed=4)[1])
    assert len(hold_out(labels, 0.0, seed=3)[1]) == 0


# ---------------------------------------------------------------- features of several depths
def test_depths_have_the_published_sizes():
    widths = {64: (112, 9216), 256: (56, 9216), 512: (28, 8192), 1024: (14, 9216), 2048: (7, 8192)}
    for i, (channels, (side, numbers)) in enumerate(widths.items()):
        assert pool_depth(torch.zeros(1, channels, side, side), i).numel() == numbers
    image = torch.arange(7.0 * 7).view(1, 1, 7, 7)
    assert pool_depth(image, 4)[0, 0, 0, 1] == image[0, 0, :6, 1:].mean()
    assert pool_depth(torch.zeros(1, 3, 4, 4), 3).shape == (1, 3, 3, 3)
    assert pool_depth(torch.zeros(1, 3, 2, 2), 3).shape == (1, 3, 2, 2)


def test_depths_of_a_resnet50_at_224_pixels_are_the_published_ones():
    """Places and numbers of Feature1-5 (Goyal et al. 2019; MMSelfSup 0.x), of torchvision's network, too."""
    theirs, ours = torchvision.models.resnet50(), build_backbone("resnet50")
    theirs.fc = nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    found = []
    for backbone in (theirs, ours):
        names, read = build_reader(backbone.eval(), SimpleNamespace(depths=True, mean_of_patches=False))
        with torch.no_grad():
            found.append(read(torch.ones(1, 3, 224, 224)))
    assert names == ["Feature1", "Feature2", "Feature3", "Feature4", "Feature5"]
    assert [tuple(x.shape[1:]) for x in found[0]] == [
        (64, 12, 12), (256, 6, 6), (512, 4, 4), (1024, 3, 3), (2048, 2, 2)]
    assert [x[0].numel() for x in found[0]] == [9216, 9216, 8192, 9216, 8192]
    for x, same in zip(*found, strict=True):
        torch.testing.assert_close(x, same)
        head = lincls.Heads(x, 1, 1000, norm=True)
        assert head.norm.running_mean.shape == x.shape[1:2] and head.weight.shape == (1, 1000, x[0].numel())


@pytest.mark.parametrize("arch, small_images", [("resnet18", False), ("resnet18", True), ("resnet8", False)])
def test_depths_are_the_maps_of_the_network(arch, small_images):
    torch.manual_seed(0)
    backbone = build_backbone(arch, small_images).eval()
    names, read = build_reader(backbone, SimpleNamespace(depths=True, mean_of_patches=False))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            found = read(x)
            y = F.relu(backbone.bn1(backbone.conv1(x)))
            expected = [pool_depth(y, 0)]
            y = backbone.maxpool(y)
            for i in range(1, len(names)):
                y = getattr(backbone, f"layer{i}")(y)
                expected.append(pool_depth(y, i))
            assert len(found) == len(names) == (4 if arch == "resnet8" else 5)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- whole runs
def test_choice_is_made_on_held_out_images_and_reported_on_the_test_set(network, tmp_path, here, capsys):
    before = network.read_bytes()
    assert here(f"{small(network, tmp_path / 'run')} --weight-decays 0 0.01") == 0
    out = capsys.readouterr().out
    metrics = metrics_of(tmp_path / "run")
    assert metrics["num_train"] == 462 and metrics["num_held_out"] == 50 and metrics["num_test"] == 256
    last, best = metrics["results"]
    assert (last["which"], best["which"], last["epoch"]) == ("last", "best", 2)
    table = {(row["lr"], row["weight_decay"]): row["held_out_top1"] for row in metrics["table"]}
    assert len(table) == 4 and table[last["lr"], last["weight_decay"]] == max(table.values())
    assert best["held_out_top1"] >= last["held_out_top1"] == max(table.values())
    assert all(f"{value:.4f}" in out for value in table.values())

    # a longer run, no better at its end: the best epoch comes before the last
    flags = "--cached --lrs 300 1000 --epochs 20"
    assert here(f"{small(network, tmp_path / 'long')} {flags}") == 0
    lines = map(json.loads, (tmp_path / "long" / "log.jsonl").read_text().splitlines())
    by_epoch = {line["epoch"]: line["held_out"][0] for line in lines if "held_out" in line}
    _, best = metrics_of(tmp_path / "long")["results"]
    assert best["held_out_top1"] == max(by_epoch.values()) == by_epoch[best["epoch"]]
    assert best["epoch"] == min(e for e, top1 in by_epoch.items() if top1 == best["held_out_top1"]) < 20

    # what was saved is what was reported, recomputed from the files alone
    labels = build_dataset("fake", "test").labels
    predicted = torch.tensor(predictions_of(tmp_path / "run"))
    assert (predicted == labels).double().mean().item() == last["test_top1"]
    backbone, config = checkpoint.load_pretrained(network)
    head = torch.load(tmp_path / "run" / "head.pth", weights_only=True)
    linear = nn.Linear(128, 10)
    linear.load_state_dict(head)
    with torch.no_grad():
        test = eval_batches(build_dataset("fake", "test"), config, "cpu")
        logits = [linear(backbone.eval()(x)) for x in test]
    assert torch.equal(torch.cat(logits).argmax(1), predicted)
    assert network.read_bytes() == before
    assert here(f"{small(network, tmp_path / 'run')} --weight-decays 0 0.01") == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("multi_head", [False, True])
def test_published_recipe_is_what_torchs_pieces_do(network, tmp_path, here, multi_head):
    """One head, nothing held out: nn.Linear, SGD, CosineAnnealingLR stepped by epoch, on the same crops; or
    what was published for Feature1-5: Nesterov's momentum, steps, jitter, lighting."""
    flags = "--nesterov --jitter --milestones 1 2 9" if multi_head else ""
    assert here(f"--checkpoint {network} --batch-size 64 --epochs 3 --lrs 0.8 --weight-decays 0.001 "
                f"--held-out 0 --seed 5 --output-dir {tmp_path} {flags}") == 0
    metrics = metrics_of(tmp_path)
    assert metrics["num_train"] == 512 and [r["which"] for r in metrics["results"]] == ["last"]

    backbone, config = checkpoint.load_pretrained(network)
    backbone.eval().to(memory_format=torch.channels_last)
    size, mean, std = input_of(config)
    dataset = build_dataset("fake", "train")
    jitter = dict(jitter=(0.4, 0.4, 0.4, 0), jitter_p=1, lighting=0.1) if multi_head else {}
    views = Views([(size, dict(scale=(0.08, 1), **jitter))], mean, std)
    batches = Batches(dataset, 64, views, seed=5)
    linear = nn.Linear(128, 10)
    torch.manual_seed(5)
    linear.weight.data = torch.randn(10, 128) * 0.01
    linear.bias.data.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.8 * 64 / 256, momentum=0.9, weight_decay=0.001,
                                nesterov=multi_head)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    if multi_head:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 9], gamma=0.1)
    for step in range(3 * 8):
        with torch.no_grad():
            x = backbone(views(*batches[step])[0])
        optimizer.zero_grad()
        F.cross_entropy(linear(x), dataset.labels[batches.indices(step)]).backward()
        optimizer.step()
        if step % 8 == 7:
            scheduler.step()
    head = torch.load(tmp_path / "head.pth", weights_only=True)
    assert (head["weight"] - linear.weight).norm() < 0.01 * linear.weight.norm()


def test_depths_cached_and_batch_norm(network, tmp_path, here, capsys):
    assert here(f"{small(network, tmp_path / 'depths')} --depths") == 0
    metrics = metrics_of(tmp_path / "depths")
    assert [r["features"] for r in metrics["results"][::2]] == [f"Feature{i}" for i in (1, 2, 3, 4)]
    assert len(metrics["table"]) == 4 * 2 and all(r["test_top1"] > 0.3 for r in metrics["results"])
    assert here(f"{small(network, tmp_path / 'cached')} --cached --batch-norm") == 0
    assert "another protocol" in capsys.readouterr().out
    metrics = metrics_of(tmp_path / "cached")
    assert metrics["protocol"] == "cached centre crops" and metrics["results"][0]["test_top1"] > 0.5


def test_vit(tmp_path, here, capsys):
    path = saved_network(tmp_path, "--data fake --arch vit_t")
    assert here(f"{small(path, tmp_path / 'four')} --cached --epochs 1") == 0
    assert "numbers an image: features 768" in capsys.readouterr().out               # 4 × 192
    flags = "--cached --epochs 1 --n-last-blocks 1 --mean-of-patches"
    assert here(f"{small(path, tmp_path / 'one')} {flags}") == 0
    assert "numbers an image: features 384" in capsys.readouterr().out
    assert here(f"{small(path, tmp_path / 'bad')} --depths") == 2
    assert here(f"{small(path, tmp_path / 'bad')} --n-last-blocks 13") == 2
    assert capsys.readouterr().err.count("\n") == 2 and not (tmp_path / "bad").exists()


def test_a_backbone_that_changes_is_found_out(network, tmp_path, here, monkeypatch):
    """In training mode a batch norm's statistics move; parameters alone would not show it."""
    frozen = lincls.build_reader
    monkeypatch.setattr(lincls, "build_reader", lambda backbone, args: frozen(backbone.train(), args))
    with pytest.raises(RuntimeError, match="backbone has changed"):
        checkpoint.run(lincls.main, lincls.get_parser(),
                       shlex.split(f"{small(network, tmp_path / 'run')} --epochs 1"))
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_pictures_from_files(tmp_path, here):
    colours = {"red": (200, 30, 30), "green": (30, 200, 30)}
    for split, number in (("train", 20), ("val", 7)):
        for name, colour in colours.items():
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (40 + i, 36), colour).save(folder / f"{i}.png")
    path = saved_network(tmp_path, f"--data {tmp_path}/data --image-size 32 --arch resnet8_2x2")
    assert here(f"--checkpoint {path} --batch-size 8 --epochs 3 --lrs 1 --held-out 0.25 --workers 1 "
                f"--output-dir {tmp_path}/run") == 0
    assert metrics_of(tmp_path / "run")["results"][0]["test_top1"] == 1
    assert "data/val/green/0.png,0,0" in (tmp_path / "run" / "predictions.csv").read_text()


# ---------------------------------------------------------------- stopped, killed, several processes
def heads_of(folder):
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    return {**state["model"], **{str(i): v for i, v in enumerate(state["optimizer"])},
            **state["best"][0]["state"]}


@pytest.mark.parametrize("flags", ["", "--milestones 1 3 --nesterov --jitter"])
def test_killed_or_stopped_and_resumed_run_ends_with_the_same_heads(network, tmp_path, here, flags):
    command = f"{small(network, tmp_path / 'straight')} --epochs 5 --save-every 1 {flags}"
    assert here(command) == 0
    signals = (("killed", signal.SIGKILL), ("stopped", signal.SIGTERM))[:1 if flags else 2]
    for name, signum in signals:
        command = f"{small(network, tmp_path / name)} --epochs 5 --save-every 1 {flags}"
        process = start(f"lincls.py {command}")
        wait_for(tmp_path / name / "checkpoint.prev.pth", process)
        process.send_signal(signum)
        finish(process, {signal.SIGKILL: -9, signal.SIGTERM: 143}[signum])
        step = torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["step"]
        assert 2 <= step < 45, f"at step {step}: make the run longer"
        assert here(command) == 0
        a, b = heads_of(tmp_path / "straight"), heads_of(tmp_path / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert metrics_of(tmp_path / name) == metrics_of(tmp_path / "straight")


def test_one_two_and_three_processes(network, tmp_path, here):
    """Trained by two: the heads of one, up to rounding. The same heads evaluated by 1, 2 and 3: each test
    image counts once, and the predictions are the same (256 images are not divisible by three)."""
    assert here(f"{small(network, tmp_path / 'one')} --depths") == 0
    run(f"lincls.py {small(network, tmp_path / 'two')} --depths", ranks=2)
    one, two = heads_of(tmp_path / "one"), heads_of(tmp_path / "two")
    for name in one:
        a, b = one[name].double(), two[name].double()
        assert (a - b).norm() <= 0.01 * a.norm(), name
    for n in (2, 3):
        shutil.copytree(tmp_path / "one", tmp_path / str(n))
        for name in ("metrics.json", "predictions.csv"):
            (tmp_path / str(n) / name).unlink()
        run(f"lincls.py {small(network, tmp_path / str(n))} --depths", ranks=n)
        assert metrics_of(tmp_path / str(n)) == metrics_of(tmp_path / "one")
        assert predictions_of(tmp_path / str(n)) == predictions_of(tmp_path / "one")


def test_two_processes_on_cached_features(network, tmp_path, here):
    assert here(f"{small(network, tmp_path / 'one')} --cached --held-out 0 --lrs 1") == 0
    run(f"lincls.py {small(network, tmp_path / 'two')} --cached --held-out 0 --lrs 1", ranks=2)
    one, two = (torch.load(tmp_path / name / "head.pth", weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- misuse
@pytest.mark.parametrize("bad, code, names", [
    ("", 0, None), ("--held-out 0", 2, "--held-out 0"), ("--held-out 1", 2, "--held-out 1"),
    ("--lrs 0.1 nan", 2, "--lrs"), ("--batch-size 600", 2, "only 462 images"),
    ("--min-scale 0", 2, "min-scale"), ("--milestones 1 -1", 2, "--milestones 1 -1"),
    ("--milestones 0.5", 2, "--milestones"), ("--jitter --cached", 2, "--cached"),
    ("--mean-of-patches", 2, "not a ViT"), ("--epochs 0", 2, "--epochs"),
    ("--data {list}", 2, "has no labels"),
    ("--checkpoint none.pth", 2, "none.pth"), ("--resume {network}", 2, "another configuration"),
    ("--weight-decays 1e30", 3, "of every head the loss of step")])
def test_bad_input_is_one_line(network, bad, code, names, tmp_path, here, capsys):
    (tmp_path / "list.txt").write_text("a.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    bad = bad.format(list=tmp_path / "list.txt", network=network)
    assert here(f"{small(network, tmp_path / 'out')} --epochs 1 {bad}") == code
    err = capsys.readouterr().err
    if code:
        assert err.count("\n") == 1 and names in err, err
        assert not (tmp_path / "out" / "metrics.json").exists()
    if code == 2:
        assert not (tmp_path / "out").exists()


def test_another_backbone_under_the_same_name_is_refused_on_resuming(network, tmp_path, here, capsys):
    shutil.copy(network, tmp_path / "network.pth")
    command = small(tmp_path / "network.pth", tmp_path / "run")
    assert here(command) == 0
    (tmp_path / "run" / "metrics.json").unlink()
    state = torch.load(tmp_path / "network.pth", weights_only=True)
    state["model"]["backbone.bn1.running_mean"] += 1e-6
    checkpoint.save_checkpoint(tmp_path / "network.pth", state)
    assert here(command) == 2
    assert "not the backbone that this run began with" in capsys.readouterr().err
