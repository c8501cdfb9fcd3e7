"""Each training stage is what torch's pieces do: a second, plain loop arrives at the same weights.

Every flag that a step reads has a value here that a wrong use of it would show.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from processes import saved_network

from checkpoint import load_checkpoint, save_checkpoint
from data import Batches, build_dataset, input_of
from loss import barlow_twins_terms, momentum_twist_loss, seed_loss, self_label_loss, twist_loss
from model import Embedder, build_network
from pretrained import load_teacher
from views import build_views

STEPS = 8                        # 512 images, 64 in a step; the first two warm up
FLAGS = ("--batch-size 64 --epochs 1 --warmup-epochs 0.25 --optimizer sgd --momentum 0.5 --lr 0.08 "
         "--clip-norm 0.5 --amp off --device cpu --workers 0")
NEW = "--data fake --image-size 16 --hidden-dim 32 --knn-every 0"
STILL, RISING = (0.9, 0.9), (0.1, 2)            # weight decay at the start and at the end
DECAY = {STILL: "--weight-decay 0.9", RISING: "--weight-decay 0.1 --weight-decay-end 2"}
LOCAL = "--views multicrop --num-local 1 --local-size 8"


def cosine(step, total, start, end):
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


def batches_of(config, num_local=1, recipe="multicrop", **options):
    """(batches, views) of a run on `fake`."""
    size, mean, std = input_of(config)
    views = build_views(recipe, mean, std, size, 8 * (num_local > 0), num_local, **options)
    return Batches(build_dataset("fake", "pretrain"), 64, views, seed=0), views


def train(model, batches, views, loss_of, decay, bias_lr=1, teacher=None, ema=0):
    """SGD on loss_of(step, views [B, 3, h, w]) with clipping at 0.5; the teacher follows the model."""
    model.to(memory_format=torch.channels_last).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD([dict(params=matrices), dict(params=vectors)], lr=0, momentum=0.5)
    for step in range(STEPS):
        lr = 0.02 * step / 2 if step < 2 else cosine(step - 2, STEPS - 2, 0.02, 0.02 / 1000)
        optimizer.param_groups[0].update(lr=lr, weight_decay=cosine(step, STEPS, *decay))
        optimizer.param_groups[1].update(lr=lr * bias_lr, weight_decay=0)
        images, uniforms, _ = batches[step]
        loss = loss_of(step, views(images, uniforms))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if teacher is not None:
            keep = cosine(step, STEPS, ema, 1)
            with torch.no_grad():
                for theirs, ours in zip(teacher.parameters(), model.parameters(), strict=True):
                    theirs.copy_(keep * theirs + (1 - keep) * ours)


def assert_equal_weights(found, network):
    for name, value in network.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("ema, decay", [(0, STILL), (0.6, RISING)])
def test_pretrain(ema, decay, here, tmp_path):
    here(f"pretrain.py {NEW} {FLAGS} {DECAY[decay]} {LOCAL} --restarts 1 --bias-lr 3 --alpha 0.6 --beta 1.3 "
         f"--eps 0.01 --ema {ema} --output-dir {tmp_path}")
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    torch.manual_seed(0)
    model = build_network(state["config"])
    teacher = copy.deepcopy(model).to(memory_format=torch.channels_last).train() if ema else None

    def loss_of(step, x):
        if teacher is None:
            return twist_loss(model(x), alpha=0.6, beta=1.3, eps=0.01).total
        with torch.no_grad():
            z = teacher([x[0], x[1]])
        return momentum_twist_loss(z, model(x), alpha=0.6, beta=1.3, eps=0.01).total

    train(model, *batches_of(state["config"]), loss_of, decay, 3, teacher, ema)
    assert_equal_weights(state["model"], model)
    if ema:
        assert_equal_weights(state["teacher"], teacher)
        assert not state["teacher"]["backbone.conv1.weight"].equal(state["model"]["backbone.conv1.weight"])


@pytest.mark.parametrize("ema, decay", [(0, STILL), (0.6, RISING)])
def test_selflabel(ema, decay, here, tmp_path):
    """Of a first stage with a teacher whose weights are others than the student's."""
    source = torch.load(saved_network(tmp_path / "network.pth"), weights_only=True)
    torch.manual_seed(9)
    source["teacher"] = build_network(source["config"]).state_dict()
    save_checkpoint(tmp_path / "network.pth", source)
    here(f"selflabel.py --checkpoint {tmp_path}/network.pth {FLAGS} {DECAY[decay]} {LOCAL} --quantile 0.2 "
         f"--quantile-end 0.8 --ema {ema} --output-dir {tmp_path}/run")
    state = load_checkpoint(tmp_path / "run/checkpoint.pth")
    model, teacher = build_network(source["config"]), build_network(source["config"])
    model.load_state_dict(source["model"])
    teacher.load_state_dict(source["teacher"])
    teacher.to(memory_format=torch.channels_last).train()

    def loss_of(step, x):
        quantile = cosine(step, STEPS, 0.2, 0.8)
        if not ema:
            return self_label_loss(model(x), quantile).total
        with torch.no_grad():
            z = teacher([x[0], x[1]])
        return self_label_loss(model(x), quantile, z).total

    train(model, *batches_of(state["config"]), loss_of, decay, teacher=teacher if ema else None, ema=ema)
    assert_equal_weights(state["model"], model)
    if ema:
        assert_equal_weights(state["teacher"], teacher)


@pytest.mark.parametrize("decay", [STILL, RISING])
def test_barlow(decay, here, tmp_path):
    here(f"barlow.py {NEW} {FLAGS} {DECAY[decay]} --views barlow --bias-lr 3 --lambd 0.02 "
         f"--output-dir {tmp_path}")
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    torch.manual_seed(0)
    model = build_network(state["config"])
    train(model, *batches_of(state["config"], 0, "barlow"),
          lambda step, x: barlow_twins_terms(*model(x), lambd=0.02).total, decay, bias_lr=3)
    assert_equal_weights(state["model"], model)


def test_distill(network, here, tmp_path):
    """Two queues, global and local, from random directions on; the oldest embeddings go first."""
    here(f"distill.py --teacher {network} {FLAGS} --views seed --num-local 2 --local-size 8 "
         f"{DECAY[STILL]} --queue-size 192 --student-temperature 0.3 --teacher-temperature 0.07 "
         f"--output-dir {tmp_path}")
    state = load_checkpoint(tmp_path / "checkpoint.pth")
    torch.manual_seed(0)
    backbone, _, head, _ = load_teacher(network)
    teacher = Embedder(backbone, head).to(memory_format=torch.channels_last).eval()
    model = build_network(state["config"])
    queues = [F.normalize(queue, dim=1) for queue in torch.randn(2, 192, 32)]

    def loss_of(step, x):
        with torch.no_grad():
            t = [teacher([view])[0] for view in x]
        s, place = model(x), step % 3 * 64
        first = seed_loss(s[0], t[0], queues[0], 0.3, 0.07)
        local = (seed_loss(s[v], t[v], queues[1], 0.3, 0.07) for v in (1, 2))
        loss = first + sum(local) / 2
        for queue, embeddings in zip(queues, t, strict=False):
            queue[place:place + 64] = F.normalize(embeddings, dim=1)
        return loss

    train(model, *batches_of(state["config"], 2, "seed", num_global=1), loss_of, STILL)
    assert_equal_weights(state["model"], model)
    for found, queue in zip(state["queues"], queues, strict=True):
        torch.testing.assert_close(found, queue, rtol=1e-3, atol=1e-4)
