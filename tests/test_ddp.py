"""Several gloo processes compute what one process computes on the joined batch: values and gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from loss import twist_loss
from model import Twist

# Few pixels: a ReLU whose input is within rounding of 0 may flip, and with many of them one does.
BATCH, SIZES = 24, {"two views": (16, 16), "multi-crop": (16, 16, 8, 8, 8)}


def network_and_views(dtype, crops, bunch_size):
    torch.manual_seed(0)
    model = Twist("resnet8", num_classes=6, hidden_dim=16, bunch_size=bunch_size).to(dtype)
    return model, [torch.randn(BATCH, 3, s, s, dtype=dtype) for s in SIZES[crops]]


def one_process(dtype, crops, bunch_size):
    model, views = network_and_views(dtype, crops, bunch_size)
    loss = twist_loss(model(views), 0.4, 1.2)
    loss.total.backward()
    state = {name: t for name, t in model.state_dict().items() if "running" in name}
    return [v.detach() for v in loss], {n: p.grad for n, p in model.named_parameters()}, state


def worker(rank, world_size, store, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
    reduce, calls = dist.all_reduce, []
    for case in cases:
        model, views = network_and_views(*case)
        ddp = DistributedDataParallel(model)
        mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        logits = ddp([view[mine] for view in views])
        riders = torch.tensor([float(rank == 1), 0.0])
        dist.all_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))
        loss = twist_loss(logits, 0.4, 1.2, riders=riders)
        dist.all_reduce = reduce
        assert len(calls) == 1, "the loss needs one collective"
        calls.clear()
        assert riders[0] > 0 and riders[1] == 0, "a wish of one process is heard by all"
        loss.total.backward()

        values, grads, state = one_process_beside(case)
        tolerance = 1e-10 if case[0] == torch.float64 else 1e-4
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


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gradients_equal_those_of_one_process(world_size, tmp_path):
    images = BATCH // world_size
    bunches = [None, images, images // 2] + ([2 * images] if world_size == 4 else [])
    cases = [(dtype, crops, bunch) for dtype in (torch.float64, torch.float32) for crops in SIZES
             for bunch in bunches]
    mp.spawn(worker, (world_size, tmp_path / "store", cases), nprocs=world_size)
