"""Proves that several gloo processes compute what one does on the joined batch: values and gradients."""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import model
from distill import gather
from loss import barlow_twins_terms, momentum_twist_loss, seed_loss, self_label_loss, twist_loss
from model import BarlowTwins, BatchNorm, Twist, build_student

# Few pixels: a ReLU whose input is within rounding of 0 may flip, and with many of them one does.
BATCH, SIZES = 24, {"two views": (16, 16), "multi-crop": (16, 16, 8, 8, 8)}
# Each collective costs a wait in every step. SEED needs none: its loss is a mean over images.
COLLECTIVES = {"twist": 1, "momentum": 1, "self-label": 1, "self-label, teacher": 1, "barlow": 2, "seed": 0}


class Case(NamedTuple):
    """What is compared. One set of processes runs all cases: starting them takes longer than a case."""
    loss: str
    dtype: torch.dtype
    crops: str = "multi-crop"
    bunch_size: int | None = None


class Scalar(NamedTuple):
    total: torch.Tensor


def network_and_views(case):
    torch.manual_seed(0)
    if case.loss == "barlow":
        model = BarlowTwins("resnet8", hidden_dim=16)
    elif case.loss == "seed":
        model = build_student(dict(arch="resnet8", small_images=False, embedding_dim=6))
    else:
        model = Twist("resnet8", num_classes=6, hidden_dim=16, bunch_size=case.bunch_size)
    views = [torch.randn(BATCH, 3, size, size, dtype=case.dtype) for size in SIZES[case.crops]]
    return model.to(case.dtype), views


def loss_of(name, logits, views):
    """One of the objectives; the teacher's logits are some function of each image."""
    teacher = torch.stack([10 * view.flatten(1)[:, :logits.shape[-1]] for view in views[:2]])
    if name == "twist":
        return twist_loss(logits, 0.4, 1.2)
    if name == "momentum":
        return momentum_twist_loss(teacher, logits, 0.4, 1.2)
    if name == "barlow":
        return barlow_twins_terms(*logits, 0.05)
    if name == "seed":                   # as in distill.py: the first view, and all others with one target
        queue = torch.sin(torch.arange(60, dtype=logits.dtype)).view(10, 6)
        others = teacher[1:].repeat(len(logits) - 1, 1, 1)
        return Scalar(seed_loss(logits[0], teacher[0], queue, 0.2, 0.1) +
                      seed_loss(logits[1:].flatten(0, 1), others.flatten(0, 1), queue, 0.2, 0.1))
    # few images are confident: of 4 processes one has none of them
    return self_label_loss(logits, 0.13, teacher if name == "self-label, teacher" else None)


def one_process(case):
    """The reference: loss, gradients and running statistics, as if no process group were up."""
    is_initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        model, views = network_and_views(case)
        loss = loss_of(case.loss, model(views), views)
        loss.total.backward()
    finally:
        dist.is_initialized = is_initialized
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    statistics = {name: value for name, value in model.state_dict().items() if "running" in name}
    return loss, gradients, statistics


def counted_collectives(function, *args):
    """The result of function(*args), and how many collectives it called."""
    calls = []
    names = ("all_reduce", "all_gather", "all_gather_single", "all_gather_into_tensor")
    real = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    for name, collective in real.items():
        setattr(dist, name, lambda *args, collective=collective, **kwargs: (
            calls.append(1), collective(*args, **kwargs)))
    result = function(*args)
    for name, collective in real.items():
        setattr(dist, name, collective)
    return result, len(calls)


def check(case, rank, world_size):
    """Compares the loss on a part of the batch, and the gradient that DDP averages, with one process."""
    model, all_views = network_and_views(case)
    ddp = DistributedDataParallel(model)
    mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    views = [view[mine] for view in all_views]
    logits = ddp(views)
    loss, calls = counted_collectives(loss_of, case.loss, logits, views)
    assert calls == COLLECTIVES[case.loss], f"{calls} collectives"
    loss.total.backward()

    if case.loss == "seed" or case.loss.startswith("self-label"):    # each process has a total of its own
        own_total = loss.total.detach()
        totals = [torch.empty_like(own_total) for _ in range(world_size)]
        dist.all_gather(totals, own_total)
        loss = loss._replace(total=sum(totals) / world_size)
        if case.loss != "seed" and world_size == 4:
            assert 0 in totals, "each process has a confident image: not what is to be tested"

    expected_loss, gradients, statistics = one_process(case)
    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-4
    for name, value, expected in zip(loss._fields, loss, expected_loss, strict=True):
        assert abs(value - expected) <= tolerance * max(1, abs(expected)), f"{name} {value}, not {expected}"
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():    # a bias before a batch norm has only rounding
        size = gradients[name].abs().max()
        scale = size if size > 1e-6 * largest else largest
        error = (parameter.grad - gradients[name]).abs().max() / scale
        assert error <= tolerance, f"gradient of {name} differs by {error:.1e} of its largest entry"
    for name, expected in statistics.items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=tolerance, atol=tolerance)


def check_queue(rank, world_size):
    """distill.py's queue takes the embeddings of all processes, in the global order, by one collective."""
    embeddings = torch.arange(2.0 * BATCH * 3).view(2, BATCH, 3)
    mine = embeddings[:, rank * BATCH // world_size:(rank + 1) * BATCH // world_size]
    gathered, calls = counted_collectives(gather, mine)
    assert gathered.equal(embeddings) and calls == 1


# ---------------------------------------------------------------- batch norm
# Rows of each process: equal, unequal, none. The first process without rows is the hard case.
ROWS = {2: [[4, 4], [3, 5], [8, 0], [0, 8]], 3: [[4, 4, 4], [0, 5, 2], [3, 0, 0]],
        4: [[2] * 4, [0, 0, 3, 5], [7, 1, 1, 0]]}


def stats(x, eps):
    var, mean = torch.var_mean(x, [axis for axis in range(x.dim()) if axis != 1], correction=0)
    return mean, (var + eps).rsqrt()


def gather_stats(x, means, inv_stds, running_mean, running_var, momentum, eps, counts):
    """As torch's kernel does it, whose number of rows so far is an integer."""
    mean, sum_of_squares, n = torch.zeros_like(means[0]), torch.zeros_like(means[0]), 0
    for m, inv_std, count in zip(means, inv_stds, counts.tolist(), strict=True):
        factor = 1 / (n + count)
        sum_of_squares += (1 / inv_std ** 2 - eps) * count + (m - mean) ** 2 * n * count * factor
        mean = n * factor * mean + count * factor * m
        n += int(count)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(sum_of_squares / (n - 1), momentum)
    return mean, (sum_of_squares / n + eps).rsqrt()


def elemt(x, weight, bias, mean, inv_std, eps):
    return F.batch_norm(x, mean, inv_std ** -2 - eps, weight, bias, eps=eps)


def backward_reduce(dy, x, mean, inv_std, weight, *needed):
    axes, centred = [axis for axis in range(x.dim()) if axis != 1], (x.movedim(1, -1) - mean).movedim(-1, 1)
    sum_dy, sum_dy_xmu = dy.sum(axes), (dy * centred).sum(axes)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * inv_std if needed[1] else None, sum_dy if needed[2] else None


def backward_elemt(dy, x, mean, inv_std, weight, sum_dy, sum_dy_xmu, counts):
    assert counts.dtype == torch.int32
    n, scale = counts.sum(), inv_std if weight is None else weight * inv_std
    dx = dy.movedim(1, -1) - sum_dy / n - (x.movedim(1, -1) - mean) * inv_std ** 2 * sum_dy_xmu / n
    return (dx * scale).movedim(-1, 1)


KERNELS = {"batch_norm_stats": stats, "batch_norm_gather_stats_with_counts": gather_stats,
           "batch_norm_elemt": elemt, "batch_norm_backward_reduce": backward_reduce,
           "batch_norm_backward_elemt": backward_elemt}


def check_batch_norm(rows, shape, affine, rank):
    """Values, gradients and running statistics are those of torch's batch norm of all processes' rows."""
    torch.manual_seed(0)
    x = 3 + torch.randn(sum(rows), *shape, dtype=torch.float64)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    target, norm = torch.randn_like(x), BatchNorm(shape[0], affine=affine).double()
    weight, bias = (torch.randn(shape[0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    if affine:
        norm.load_state_dict(norm.state_dict() | dict(weight=weight.detach(), bias=bias.detach()))
    mine = slice(sum(rows[:rank]), sum(rows[:rank + 1]))
    own, x = x[mine].clone().requires_grad_(), x.requires_grad_()
    running_mean, running_var = torch.zeros(shape[0]).double(), torch.ones(shape[0]).double()
    y = F.batch_norm(x, running_mean, running_var, *((weight, bias) if affine else ()), training=True)
    (y * target).sum().backward()

    own_y = norm(own)
    (own_y * target[mine]).sum().backward()
    pairs = [(own_y, y[mine]), (own.grad, x.grad[mine]), (norm.running_mean, running_mean),
             (norm.running_var, running_var)]
    if affine:
        gradients = torch.stack([norm.weight.grad, norm.bias.grad])
        if dist.is_initialized():
            dist.all_reduce(gradients)
        pairs.append((gradients, torch.stack([weight.grad, bias.grad])))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert norm.num_batches_tracked == 1


def check_batch_norms(rank, world_size):
    """By the plain formula, and by CUDA's kernels, for which formulas of torch's source stand in."""
    torchs = {name: getattr(torch, name) for name in KERNELS}
    for kernels in (torchs, KERNELS):
        for name, kernel in kernels.items():
            setattr(torch, name, kernel)
        model.has_kernels = lambda x, kernels=kernels: kernels is KERNELS
        for rows, shape, affine in itertools.product(ROWS[world_size], [(5,), (5, 2, 3)], [True, False]):
            check_batch_norm(rows, shape, affine, rank)


def worker(rank, world_size, store, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
    for case in cases:
        try:
            check(case, rank, world_size)
        except Exception as error:
            raise AssertionError(f"{case}, rank {rank} of {world_size}: {error}") from error
    check_queue(rank, world_size)
    check_batch_norms(rank, world_size)
    dist.barrier()               # with torch 2.5, rank 0 may wait forever for one that has gone
    dist.destroy_process_group()


def start(world_size, folder, cases):
    mp.start_processes(worker, (world_size, folder / "store", cases), world_size, start_method="forkserver")


@pytest.mark.parametrize("world_size", [3, 4])
def test_processes_with_different_numbers_of_rows(world_size, tmp_path):
    """See check_batch_norms; two processes do it below."""
    start(world_size, tmp_path, [])


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_gradients_equal_those_of_one_process(world_size, tmp_path):
    images = BATCH // world_size
    bunch_sizes = [None, images, images // 2]
    if world_size == 4:
        bunch_sizes.append(2 * images)
    cases = []
    for dtype in (torch.float64, torch.float32)[:1 if world_size == 2 else 2]:
        for crops in SIZES:
            cases += [Case("twist", dtype, crops, bunch_size) for bunch_size in bunch_sizes]
        for loss in ("momentum", "self-label", "self-label, teacher", "seed"):
            cases.append(Case(loss, dtype))
        cases.append(Case("barlow", dtype, "two views"))
    start(world_size, tmp_path, cases)
