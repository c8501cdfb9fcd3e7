"""A grid of heads is what torch trains one by one; its choice; depths; resumed and distributed runs."""

import csv
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from PIL import Image
from processes import finish, log_lines, metrics_of, run, same, saved_network, start, wait_for
from torch import nn

import checkpoint
import lincls
import pretrained
from data import Batches, ImageSet, build_dataset, eval_batches, hold_out, input_of
from lincls import Heads, build_optimizer, build_reader, cache_features, head_losses, pool_depth
from model import build_backbone
from predictions import UNREADABLE, accuracies, classify, gather, write_predictions
from views import Views


def small(network, out):
    return (f"lincls.py --checkpoint {network} --batch-size 48 --epochs 2 --lrs 0.3 3 --print-every 2 "
            f"--output-dir {out}")


def predictions_of(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return [int(row["prediction"]) for row in csv.DictReader(file)]


# ---------------------------------------------------------------- the heads
@pytest.mark.parametrize("nesterov", [False, True])
def test_every_head_of_a_grid_is_the_one_that_torch_trains_alone(nesterov):
    """Five steps on two features at once against nn.Linear and torch.optim.SGD, in float64."""
    torch.manual_seed(0)
    features = [torch.randn(5, 16, 12, dtype=torch.float64), torch.randn(5, 16, 2, 3, 3, dtype=torch.float64)]
    labels = torch.randint(0, 4, (5, 16))
    grid = [(0.1, 0.0), (0.1, 0.01), (2.0, 0.0), (0.01, 0.3), (1e200, 0.0)]      # the last diverges, alone
    heads = Heads([x[0] for x in features], len(grid), 4).double()
    alone = [[nn.Linear(x[0][0].numel(), 4).double() for _ in grid] for x in features]
    for ours, theirs in zip(heads.linears, alone, strict=True):
        for one, linear in zip(ours, theirs, strict=True):
            linear.load_state_dict(one.state_dict())
    optimizer = build_optimizer(heads, grid, 128, nesterov)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    for step in range(5):
        optimizer.zero_grad()
        head_losses(heads([x[step] for x in features]), labels[step]).sum().backward()
        optimizer.step()
    for x, ours, theirs in zip(features, heads.linears, alone, strict=True):
        for one, linear, (lr, decay) in list(zip(ours, theirs, grid, strict=True))[:4]:
            sgd = torch.optim.SGD(linear.parameters(), lr / 2, 0.9, weight_decay=decay, nesterov=nesterov)
            for step in range(5):
                sgd.zero_grad()
                F.cross_entropy(linear(x[step].flatten(1)), labels[step]).backward()
                sgd.step()
            torch.testing.assert_close(one.weight, linear.weight, rtol=0, atol=1e-12)
            torch.testing.assert_close(one.bias, linear.bias, rtol=0, atol=1e-12)
        diverged = ours[4].weight
        assert not diverged.isfinite().all() or diverged.abs().max() > 1e100


def test_initial_weights_are_the_published_ones():
    torch.manual_seed(0)
    heads, = Heads([torch.zeros(2, 512)], 3, 100).linears
    assert heads[0].weight.std().item() == pytest.approx(0.01, rel=0.02) and not heads[0].bias.any()
    assert torch.equal(heads[0].weight, heads[2].weight) and abs(heads[0].weight.mean().item()) < 1e-4


def test_accuracies_against_counting_and_a_diverged_head():
    torch.manual_seed(0)
    heads = Heads([torch.zeros(2, 6)], 3, 8)
    for linear in heads.linears[0]:
        linear.weight.data.normal_()
    heads.linears[0][2].weight.data[:] = torch.nan
    x, labels = torch.randn(50, 6), torch.randint(0, 8, (50,))
    classes = classify(heads, [[x[:20]], [x[20:]]])
    (top1,), (top5,) = accuracies(classes, labels)
    for g in range(2):
        logits = x @ heads.linears[0][g].weight.T
        order = logits.argsort(1, descending=True)
        assert top1[g] == sum(int(order[i, 0]) == int(labels[i]) for i in range(50)) / 50
        assert top5[g] == sum(bool(labels[i] in order[i, :5]) for i in range(50)) / 50
    assert top1[2] == top5[2] == 0


def test_scoring_is_in_evaluation_mode_and_training_goes_on():
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).train()
    before = network[1].running_mean.clone()
    x = torch.randn(20, 6)
    classes = classify(network, [x[:9], x[9:]])
    assert network.training and torch.equal(network[1].running_mean, before)
    assert classes.shape == (20, 5)
    assert torch.equal(classes[:, 0], network.eval()(x).argmax(1))


def test_held_out_images_are_balanced_seeded_and_apart():
    labels = torch.arange(1000) % 7 * (torch.arange(1000) % 3 > 0)               # unequal classes
    kept, held = hold_out(labels, 0.2, seed=3)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(1000))
    for c in range(7):
        assert (labels[held] == c).sum() == round(0.2 * int((labels == c).sum()))
    assert torch.equal(held, hold_out(labels, 0.2, seed=3)[1])
    assert not torch.equal(held, hold_out(labels, 0.2, seed=4)[1])
    assert len(hold_out(labels, 0.0, seed=3)[1]) == 0


def test_unreadable_pictures_keep_their_places_and_have_no_prediction(tmp_path):
    """And in training on cached features the image stands in that Batches names, with its own label."""
    paths = np.array([f"{i}.png".encode() for i in range(6)])
    dataset = ImageSet(None, torch.arange(6), list("abcdef"), paths)
    dataset.broken[[0, 3]] = True
    features = torch.rand(4, 2)
    batches = Batches(dataset, 2, [], 5)
    (cached, labels), rows = cache_features([[features[:3]], [features[3:]]], batches, 1)
    assert labels.equal(dataset.labels)
    assert (cached[[0, 3]] == UNREADABLE).all() and torch.equal(cached[[1, 2, 4, 5]], features)
    for i in range(6):
        order = [int(other) for other in batches.stand_ins(i)]
        assert rows[i] == next(other for other in order if other not in (0, 3))
    assert rows[1] == 1 and rows[0] != 0
    predictions = gather(torch.tensor([9, 8, 7, 6]), dataset, 1)
    write_predictions(tmp_path / "predictions.csv", dataset, predictions)
    lines = (tmp_path / "predictions.csv").read_text().split()
    assert lines == ["image,label,prediction", "1.png,1,9", "2.png,2,8", "4.png,4,7", "5.png,5,6"]


def gather_in_parts(rank, world_size, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    dataset = ImageSet(None, torch.arange(11), list("abcdefghijk"), np.array([b"x.png"] * 11))
    dataset.broken[[4, 9]] = True
    features = torch.arange(22.0).view(11, 2)
    mine = features[rank::world_size][~dataset.broken[rank::world_size].bool()]
    expected = features.clone()
    expected[[4, 9]] = UNREADABLE
    for chunk in (1, 2, 3, 100):
        assert gather(mine, dataset, world_size, chunk=chunk).equal(expected)
    dist.destroy_process_group()


def test_rows_of_processes_come_together_part_by_part(tmp_path):
    mp.start_processes(gather_in_parts, (3, tmp_path / "store"), 3, start_method="forkserver")


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
    torch.testing.assert_close(*found)
    heads = Heads(found[1], 1, 1000, norm=True)
    for x, norm, (head,) in zip(found[1], heads.norms, heads.linears, strict=True):
        assert norm.running_mean.shape == x.shape[1:2] and head.weight.shape == (1000, x[0].numel())


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
@pytest.mark.parametrize("cached", ["", "--cached"])
def test_choice_is_made_on_held_out_images_and_reported_on_the_test_set(network, tmp_path, here, cached):
    before = network.read_bytes()
    out, _ = here(f"{small(network, tmp_path)} --weight-decays 0 0.01 {cached}")
    metrics = metrics_of(tmp_path)
    assert metrics["num_train"] == 462 and metrics["num_held_out"] == 50 and metrics["num_test"] == 256
    result, = metrics["results"]
    table = {(row["lr"], row["weight_decay"]): row["held_out_top1"] for row in metrics["table"]}
    assert len(table) == 4 and table[result["lr"], result["weight_decay"]] == max(table.values())
    assert result["held_out_top1"] == max(table.values())
    assert all(f"held-out top-1 {value:.4f}" in out for value in table.values())
    by_epoch = [line["held_out"] for line in log_lines(tmp_path) if "held_out" in line]
    assert len(by_epoch) == 2 and by_epoch[-1] == [max(table.values())]

    # what was saved is what was reported, recomputed from the files alone
    labels = build_dataset("fake", "test").labels
    predicted = torch.tensor(predictions_of(tmp_path))
    assert (predicted == labels).double().mean().item() == result["test_top1"]
    backbone, config = pretrained.load_pretrained(network)
    linear = nn.Linear(128, 10)
    linear.load_state_dict(torch.load(tmp_path / "head.pth", weights_only=True))
    with torch.no_grad():
        test = eval_batches(build_dataset("fake", "test"), config, "cpu")
        logits = [linear(backbone.eval()(x)) for x in test]
        train = build_dataset("fake", "train")
        held = train.subset(hold_out(train.labels, 0.1, seed=0)[1])
        classes = torch.cat([linear(backbone(x)) for x in eval_batches(held, config, "cpu")]).argmax(1)
    assert torch.equal(torch.cat(logits).argmax(1), predicted)
    assert (classes == held.labels).double().mean().item() == result["held_out_top1"]
    assert network.read_bytes() == before


@pytest.mark.parametrize("multi_head", [False, True])
def test_published_recipe_is_what_torchs_pieces_do(network, tmp_path, here, multi_head):
    """One head, nothing held out: nn.Linear, SGD, CosineAnnealingLR stepped by epoch, on the same crops; or
    what was published for Feature1-5: Nesterov's momentum, steps, jitter, lighting."""
    flags = "--nesterov --jitter --milestones 1 2 9 --interpolation bilinear" if multi_head else ""
    here(f"lincls.py --checkpoint {network} --batch-size 64 --epochs 3 --lrs 0.8 --weight-decays 0.001 "
         f"--held-out 0 --seed 5 --output-dir {tmp_path} {flags}")
    metrics = metrics_of(tmp_path)
    assert metrics["num_train"] == 512 and len(metrics["results"]) == 1

    backbone, config = pretrained.load_pretrained(network)
    backbone.eval().to(memory_format=torch.channels_last)
    size, mean, std = input_of(config)
    dataset = build_dataset("fake", "train")
    jitter = dict(jitter=(0.4, 0.4, 0.4, 0), jitter_p=1, lighting=0.1) if multi_head else {}
    config["interpolation"] = "bilinear" if multi_head else "bicubic"
    crop = dict(scale=(0.08, 1), interpolation=config["interpolation"])
    views = Views([(size, crop | jitter)], mean, std)
    batches = Batches(dataset, 64, views, seed=5)
    torch.manual_seed(5)
    linear = nn.Linear(128, 10)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.8 * 64 / 256, momentum=0.9, weight_decay=0.001,
                                nesterov=multi_head)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    if multi_head:
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 9], gamma=0.1)
    for step in range(3 * 8):
        images, uniforms, labels = batches[step]
        with torch.no_grad():
            x = backbone(views(images, uniforms)[0])
        optimizer.zero_grad()
        F.cross_entropy(linear(x), labels).backward()
        optimizer.step()
        if step % 8 == 7:
            scheduler.step()
    head = torch.load(tmp_path / "head.pth", weights_only=True)
    assert (head["weight"] - linear.weight).norm() < 0.01 * linear.weight.norm()
    linear.load_state_dict(head)
    with torch.no_grad():
        test = eval_batches(build_dataset("fake", "test"), config, "cpu")
        predicted = torch.cat([linear(backbone(x)) for x in test]).argmax(1)
    assert predicted.tolist() == predictions_of(tmp_path)


def test_depths_cached_and_batch_norm(network, tmp_path, here):
    here(f"{small(network, tmp_path / 'depths')} --depths")
    metrics = metrics_of(tmp_path / "depths")
    assert [r["features"] for r in metrics["results"]] == [f"Feature{i}" for i in (1, 2, 3, 4)]
    assert len(metrics["table"]) == 4 * 2 and all(r["test_top1"] > 0.3 for r in metrics["results"])
    out, _ = here(f"{small(network, tmp_path / 'cached')} --cached --batch-norm")
    assert "another protocol" in out
    metrics = metrics_of(tmp_path / "cached")
    assert metrics["protocol"].startswith("whole images") and metrics["results"][0]["test_top1"] > 0.5


def test_vit(tmp_path, here):
    path = saved_network(tmp_path / "vit_t.pth", "--data fake --arch vit_t --image-size 16")
    out, _ = here(f"{small(path, tmp_path / 'four')} --cached --epochs 1")
    assert "heads each on features 768" in out                                   # 4 × 192
    out, _ = here(f"{small(path, tmp_path / 'one')} --cached --epochs 1 --n-last-blocks 1 --mean-of-patches")
    assert "heads each on features 384" in out
    for flags in ("--depths", "--n-last-blocks 13"):
        _, err = here(f"{small(path, tmp_path / 'bad')} {flags}", 2)
        assert err.count("\n") == 1 and flags.split()[0] in err and not (tmp_path / "bad").exists()


def test_the_student_of_a_run_with_a_momentum_encoder(tmp_path, here):
    """--key chooses one of two backbones; without it the teacher's is taken."""
    paths = [saved_network(tmp_path / f"{key}.pth") for key in ("teacher", "student")]
    teacher, student = (torch.load(path, weights_only=True) for path in paths)
    for value in student["model"].values():
        value.add_(value.abs().double().mean().to(value.dtype))
    checkpoint.save_checkpoint(paths[1], student)
    both = dict(student, teacher=teacher["model"])
    checkpoint.save_checkpoint(tmp_path / "both.pth", both)
    hashes = []
    commands = [small(paths[0], tmp_path / "0"), small(paths[1], tmp_path / "1")]
    commands += [f"{small(tmp_path / 'both.pth', tmp_path / str(i))} {key}"
                 for i, key in ((2, ""), (3, "--key teacher"), (4, "--key student"))]
    for i, command in enumerate(commands):
        here(f"{command} --epochs 1 --cached")
        hashes.append(json.loads((tmp_path / str(i) / "config.json").read_text())["backbone_sha256"])
    of_teacher, of_student, *chosen = hashes
    assert of_teacher != of_student and chosen == [of_teacher, of_teacher, of_student]


def test_a_backbone_that_changes_is_found_out(network, tmp_path, here, monkeypatch):
    """In training mode a batch norm's statistics move; parameters alone would not show it."""
    frozen = lincls.build_reader
    monkeypatch.setattr(lincls, "build_reader", lambda backbone, args: frozen(backbone.train(), args))
    with pytest.raises(RuntimeError, match="backbone has changed"):
        here(f"{small(network, tmp_path / 'run')} --epochs 1")
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_pictures_from_files(tmp_path, here):
    colours = {"red": (200, 30, 30), "green": (30, 200, 30)}
    for split, number in (("train", 20), ("val", 7)):
        for name, colour in colours.items():
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (40 + i, 36), colour).save(folder / f"{i}.png")
    flags = f"--data {tmp_path}/data --image-size 32 --arch resnet8_2x2"
    path = saved_network(tmp_path / "network.pth", flags)
    here(f"lincls.py --checkpoint {path} --batch-size 8 --epochs 3 --lrs 1 --held-out 0.25 --workers 1 "
         f"--output-dir {tmp_path}/run")
    assert metrics_of(tmp_path / "run")["results"][0]["test_top1"] == 1
    assert "data/val/green/0.png,0,0" in (tmp_path / "run" / "predictions.csv").read_text()


# ---------------------------------------------------------------- stopped, killed, several processes
def state_of(folder):
    """The heads and the optimizer's state."""
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    return {key: state[key] for key in ("model", "optimizer")}


def test_milestones_and_jitter_resume_to_the_same_heads(network, tmp_path, here):
    flags = "--epochs 5 --save-every 1 --print-every 60 --milestones 1 3 --nesterov --jitter"
    here(f"{small(network, tmp_path / 'straight')} {flags}")
    command = f"{small(network, tmp_path / 'killed')} {flags}"
    process = start(command)
    wait_for(tmp_path / "killed" / "checkpoint.prev.pth", process)
    process.kill()
    finish(process, -signal.SIGKILL)
    step = checkpoint.load_last_checkpoint(tmp_path / "killed")["step"]
    assert 1 <= step < 45, f"at step {step}: make the run longer"
    here(command)
    assert same(state_of(tmp_path / "straight"), state_of(tmp_path / "killed"))
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "straight")


def test_one_two_and_three_processes(network, tmp_path, here):
    """Trained by two: the heads of one, up to rounding. The same heads evaluated by 1, 2 and 3: each test
    image counts once, and the predictions are the same (256 images are not divisible by three)."""
    here(f"{small(network, tmp_path / 'one')} --depths")
    run(f"{small(network, tmp_path / 'two')} --depths", ranks=2)
    one, two = (state_of(tmp_path / name)["model"] for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        a, b = one[name].double(), two[name].double()
        assert (a - b).norm() <= 0.01 * a.norm(), name
    for n in (2, 3):
        shutil.copytree(tmp_path / "one", tmp_path / str(n))
        for name in ("metrics.json", "predictions.csv"):
            (tmp_path / str(n) / name).unlink()
        run(f"{small(network, tmp_path / str(n))} --depths", ranks=n)
        assert metrics_of(tmp_path / str(n)) == metrics_of(tmp_path / "one")
        assert predictions_of(tmp_path / str(n)) == predictions_of(tmp_path / "one")


def test_two_processes_on_cached_features(network, tmp_path, here):
    here(f"{small(network, tmp_path / 'one')} --cached --held-out 0 --lrs 1")
    run(f"{small(network, tmp_path / 'two')} --cached --held-out 0 --lrs 1", ranks=2)
    one, two = (torch.load(tmp_path / name / "head.pth", weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- misuse
@pytest.mark.parametrize("bad, code, names", [
    ("", 0, None), ("--held-out 0", 2, "--held-out 0"), ("--held-out 1", 2, "--held-out: 1"),
    ("--lrs 0.1 nan", 2, "--lrs"), ("--batch-size 600", 2, "at most the 462 training"),
    ("--min-scale 0", 2, "min-scale"), ("--milestones 1 -1", 2, "--milestones"),
    ("--milestones 0.5", 2, "--milestones"), ("--jitter --cached", 2, "--cached"),
    ("--mean-of-patches", 2, "not a ViT"), ("--epochs 0", 2, "--epochs"),
    ("--data {list}", 2, "has no labels"),
    ("--checkpoint none.pth", 2, "none.pth"), ("--key teacher", 2, "has no 'teacher'"),
    ("--weight-decays 1e30", 3, "the loss is not finite")])
def test_bad_input_is_one_line(network, bad, code, names, tmp_path, here):
    (tmp_path / "list.txt").write_text("a.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    bad = bad.format(list=tmp_path / "list.txt")
    _, err = here(f"{small(network, tmp_path / 'out')} --epochs 1 {bad}", code)
    if code:
        assert err.count("\n") == 1 and names in err, err
        assert not (tmp_path / "out" / "metrics.json").exists()
    if code == 2:
        assert not (tmp_path / "out").exists()


def test_another_backbone_under_the_same_name_is_refused_on_resuming(network, tmp_path, here):
    shutil.copy(network, tmp_path / "network.pth")
    command = small(tmp_path / "network.pth", tmp_path / "run")
    here(command)
    (tmp_path / "run" / "metrics.json").unlink()
    state = torch.load(tmp_path / "network.pth", weights_only=True)
    state["model"]["backbone.bn1.running_mean"] += 1e-6
    checkpoint.save_checkpoint(tmp_path / "network.pth", state)
    _, err = here(command, 2)
    assert "made with another configuration (backbone_sha256 was" in err
