"""Several gloo processes compute what one process computes on the joined batch: values and gradients."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from distill import gather
from loss import barlow_twins_terms, momentum_twist_loss, seed_loss, self_label_loss, twist_loss
from model import BarlowTwins, Twist, build_student

# Few pixels: a ReLU whose input is within rounding of 0 may flip, and with many of them one does.
BATCH, SIZES = 24, {"two views": (16, 16), "multi-crop": (16, 16, 8, 8, 8)}


def network_and_views(dtype, crops, bunch_size, kind):
    torch.manual_seed(0)
    if kind == "barlow":
        model = BarlowTwins("resnet8", hidden_dim=16)
    elif kind == "seed":
        model = build_student(dict(arch="resnet8", small_images=False, embedding_dim=6))
    else:
        model = Twist("resnet8", num_classes=6, hidden_dim=16, bunch_size=bunch_size)
    return model.to(dtype), [torch.randn(BATCH, 3, s, s, dtype=dtype) for s in SIZES[crops]]


class Scalar(NamedTuple):
    total: torch.Tensor


def loss_of(kind, logits, views, riders=None):
    """One of the objectives; the teacher's logits are some function of each image."""
    teacher = torch.stack([10 * view.flatten(1)[:, :logits.shape[-1]] for view in views[:2]])
    if kind == "twist":
        return twist_loss(logits, 0.4, 1.2, riders=riders)
    if kind == "barlow":
        return barlow_twins_terms(*logits, 0.05, riders=riders)
    if kind == "seed":                   # as distill.py does; its collective is that of the queue
        queue = torch.sin(torch.arange(60, dtype=logits.dtype)).view(10, 6)
        loss = (seed_loss(logits[0], teacher[0], queue, 0.2, 0.1) +
                seed_loss(logits[1:].flatten(0, 1), teacher[1:].repeat(len(logits) - 1, 1, 1).flatten(0, 1),
                          queue, 0.2, 0.1))
        if riders is not None:
            news, told = gather(teacher, torch.cat([loss.detach()[None], riders.to(logits)]))
            assert news.shape[1] == BATCH
            riders.copy_(told[1:])
            loss = loss + (told[0] - loss).detach()
        return Scalar(loss)
    if kind == "momentum":
        return momentum_twist_loss(teacher, logits, 0.4, 1.2, riders=riders)
    # few images: with 4 processes one has none of them
    return self_label_loss(logits, 0.13, teacher if kind == "self-label, teacher" else None, riders=riders)


def one_process(dtype, crops, bunch_size, kind):
    model, views = network_and_views(dtype, crops, bunch_size, kind)
    loss = loss_of(kind, model(views), views)
    loss.total.backward()
    state = {name: t for name, t in model.state_dict().items() if "running" in name}
    return [v.detach() for v in loss], {n: p.grad for n, p in model.named_parameters()}, state


def worker(rank, world_size, store, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
    calls, collectives = [], ("all_reduce", "all_gather")
    for case in cases:
        kind = case[-1]
        model, views = network_and_views(*case)
        ddp = DistributedDataParallel(model)
        mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        views = [view[mine] for view in views]
        logits = ddp(views)
        riders = torch.tensor([float(rank == 1), 0.0])
        real = [getattr(dist, name) for name in collectives]
        for name, call in zip(collectives, real, strict=True):
            setattr(dist, name, lambda *args, call=call: (calls.append(1), call(*args)))
        loss = loss_of(kind, logits, views, riders)
        for name, call in zip(collectives, real, strict=True):
            setattr(dist, name, call)
        assert len(calls) == (2 if kind == "barlow" else 1), "the loss needs one collective, or two"
        calls.clear()
        assert riders[0] > 0 and riders[1] == 0, "a wish of one process is heard by all"
        loss.total.backward()

        values, grads, state = one_process_beside(case)
        tolerance = 1e-10 if case[0] == torch.float64 else 1e-4
        if kind.startswith("self"):          # its total is each process's own: their mean is the global one
            chosen = float(loss.total > 0)
            loss = loss._replace(total=loss.total.detach().clone())
            dist.all_reduce(loss.total)
            loss.total.div_(world_size)
            if world_size == 4:
                empty = torch.tensor(1 - chosen)
                dist.all_reduce(empty)
                assert empty > 0, "no process without a confident image: not what is to be tested"
        for value, expected, name in zip(loss, values, loss._fields, strict=True):
            assert abs(value - expected) <= tolerance * max(1, abs(expected)), (case, name, value, expected)
        largest = max(g.abs().max() for g in grads.values())
        for name, param in model.named_parameters():    # a bias before a batch norm has only rounding
            size = grads[name].abs().max()
            error = (param.grad - grads[name]).abs().max() / (size if size > 1e-6 * largest else largest)
            assert error <= tolerance, (case, name, error)
        for name, expected in state.items():
            torch.testing.assert_close(model.state_dict()[name], expected, rtol=tolerance, atol=tolerance)
    dist.destroy_process_group()


def one_process_beside(case):
    """The reference, computed as if no process group were up."""
    up, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        return one_process(*case)
    finally:
        dist.is_initialized = up


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_equal_those_of_one_process(world_size, tmp_path):
    images = BATCH // world_size
    bunches = [None, images, images // 2] + ([2 * images] if world_size == 4 else [])
    cases = [(dtype, crops, bunch, "twist") for dtype in (torch.float64, torch.float32) for crops in SIZES
             for bunch in bunches]
    cases += [(dtype, "multi-crop", None, kind) for dtype in (torch.float64, torch.float32)
              for kind in ("momentum", "self-label", "self-label, teacher", "seed")]
    cases += [(dtype, "two views", None, "barlow") for dtype in (torch.float64, torch.float32)]
    mp.start_processes(worker, (world_size, tmp_path / "store", cases), world_size, start_method="forkserver")
