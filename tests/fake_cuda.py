"""A CUDA device that is not there: runs a stage's real main() on it and counts what a GPU would be asked.

Its tensors are torch's meta tensors: shapes and types without numbers. Tensors of the CPU are real, and an
operation that takes both raises, as on a GPU. Counted are, for each step,

    launches    operations that start a kernel; of a `_foreach` as many as torch makes of its lists
    waits       blocking points: copies to the device that are not pinned and asynchronous, copies back, reads
                of a number, waits for an event, and shapes that depend on numbers
    bytes       that the kernels read and write, each tensor once in an operation
    peak        bytes of the device's tensors that are alive together

It is no timing. Collectives and DDP do nothing here; autocast casts what goes into matrix products,
convolutions and attention; fp16 has no scale. The work space of kernels is not in the peak.
"""

import contextlib
import importlib
import math
import shlex
import sys
import types
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import run
from cli import parse_args

CUDA, META = torch.device("cuda", 0), torch.device("meta")
ROOT = str(Path(__file__).parents[1]) + "/"
FREE = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "unbind",
        "detach", "alias", "as_strided", "unsqueeze", "squeeze", "split_with_sizes", "unfold", "diagonal",
        "lift_fresh", "_reshape_alias", "is_pinned", "empty", "empty_like", "empty_strided", "new_empty",
        "new_empty_strided"}
DEPENDS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
CAST = {torch.conv2d, F.linear, torch.matmul, torch.Tensor.matmul, torch.bmm, F.scaled_dot_product_attention}
# of torch's multi_tensor_apply: tensors in a launch by the number of lists, blocks in one, numbers in a block
MOST_TENSORS, MOST_BLOCKS, BLOCK = {1: 110, 2: 64, 3: 48, 4: 36}, 320, 65536


def statistics(x, *args):
    return torch.empty(2, x.shape[1], device=META).unbind()


KERNELS = {                      # of a batch norm over processes: torch has no meta kernels for them
    "batch_norm_stats": statistics, "batch_norm_gather_stats_with_counts": statistics,
    "batch_norm_elemt": lambda x, *args: torch.empty_like(x),
    "batch_norm_backward_reduce": lambda dy, x, *args: [*statistics(x), *statistics(x)],
    "batch_norm_backward_elemt": lambda dy, x, *args: torch.empty_like(x)}


class Counter(TorchDispatchMode):
    """Counts what torch's operations ask of the device."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.storages = 0, 0, set()
        self.inside = False              # an operation: there the tensors are what they are
        self.begin()

    def begin(self):
        """A new step."""
        self.launches, self.bytes, self.waits, self.peak, self.by_line = 0, 0, [], self.live, {}

    def wait(self, what):
        self.waits.append(f"{what} at {line()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:                   # in inference mode torch leaves it to us to take an operation apart
                return func.decompose(*args, **kwargs or {})
        self.inside = True
        try:
            return self.dispatch(func, args, kwargs)
        finally:
            self.inside = False

    def dispatch(self, func, args, kwargs):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        fakes = [x for x in tensors if x.is_meta]
        target = kwargs.get("device")
        if not fakes and target != META:
            return func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and len(fakes) < len(tensors) or name == "_to_copy" and not fakes:
            source = args[1] if name == "copy_" else args[0]
            asynchronous = kwargs.get("non_blocking") or name == "copy_" and args[2:] == (True,)
            if not (asynchronous and getattr(source, "is_in_pinned_memory", False)):
                self.wait("copy to the device")
            return args[0] if name == "copy_" else self.track(torch.empty_like(
                source, dtype=kwargs.get("dtype"), device=META, memory_format=kwargs.get("memory_format")))
        if target is not None and target.type == "cpu" or name == "_local_scalar_dense":
            if not kwargs.get("non_blocking"):
                self.wait("number read" if target is None else "copy back")
            return 0.5 if target is None else torch.zeros(args[0].shape, dtype=args[0].dtype)
        indices = args[1] if name in ("index", "index_put_", "index_put", "_index_put_impl_") else []
        if name in DEPENDS or any(i is not None and i.dtype == torch.bool for i in indices):
            self.wait(f"shape of {name}")
        if any(i is not None and not i.is_meta for i in indices):
            self.wait("index on the CPU")
        if name in KERNELS:
            out = KERNELS[name](*args)
        elif name.startswith("_fused"):
            out = None
        else:
            out = func(*args, **kwargs)
        outs = [self.track(x) for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        if name not in FREE:
            self.count(name, args, tensors, outs)
        return out

    def count(self, name, args, tensors, outs):
        number = 1
        if name.startswith(("_foreach", "_fused")):
            lists = [x for x in args if isinstance(x, (list, tuple))]
            depth = min(4, len(lists) + (not name.endswith("_")))
            blocks = sum(math.ceil(x.numel() / BLOCK) for x in lists[0])
            number = max(math.ceil(len(lists[0]) / MOST_TENSORS[depth]), math.ceil(blocks / MOST_BLOCKS))
        if name == "convolution_backward":                       # by input and by weight
            number, tensors = 2, tensors + tensors
        if name == "batch_norm_gather_stats_with_counts":        # of the first it reads the type
            tensors = tensors[1:]
        seen = tensors if name == "convolution_backward" else {id(x): x for x in tensors + outs}.values()
        self.launches += number
        self.bytes += sum(x.numel() * x.element_size() for x in seen)
        where = line()
        self.by_line[where] = self.by_line.get(where, 0) + number

    def track(self, x):
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if x.is_meta and key not in self.storages:
            self.storages.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key, size)
        return x

    def free(self, key, size):
        self.storages.discard(key)
        self.live -= size


def line():
    """The line of this project that runs, as file:line."""
    frame = sys._getframe()
    while frame and (frame.f_code.co_filename == __file__ or not frame.f_code.co_filename.startswith(ROOT)):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(ROOT)}:{frame.f_lineno}" if frame else "?"


class Translate(TorchFunctionMode):
    """Makes tensors on "cuda" meta tensors, and casts what autocast would."""

    def __init__(self, counter):
        super().__init__()
        self.counter, self.half = counter, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def to_meta(x):
            is_cuda = isinstance(x, (str, torch.device)) and str(x).startswith("cuda")
            return META if is_cuda else x
        if func is not torch.device:
            args, kwargs = tree_map(to_meta, (args, kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and kwargs and kwargs.get("device") == META:
            self.counter.wait("new constant")
        if func in CAST and self.half:
            args = tree_map(lambda x: x.to(self.half) if isinstance(x, torch.Tensor) and x.is_floating_point()
                            else x, args)
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def autocast(self, device_type, dtype=None, enabled=True):
        before, self.half = self.half, dtype if enabled else None
        try:
            yield
        finally:
            self.half = before


# ---------------------------------------------------------------- a stage
class Enough(BaseException):
    """Ends a run after its last counted step."""


def no_workers(dataset, batch_size, collate_fn, pin_memory=False, **kwargs):
    """A DataLoader of eval_batches, in this process."""
    for start in range(0, len(dataset), batch_size):
        batch = collate_fn([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        yield pin(batch) if pin_memory and isinstance(batch, torch.Tensor) else batch


class Event:
    """Of torch.cuda: to wait for it is a blocking point."""

    def record(self):
        pass

    def synchronize(self):
        COUNTERS[-1].wait("event")


COUNTERS = []


def pin(tensor):
    pinned = tensor.clone()
    pinned.is_in_pinned_memory = True
    return pinned


def loader_of(counter, steps, found):
    """A DataLoader that ends the run after `steps` steps, and adds each one's counts to `found`."""
    def load(batches, sampler=None, pin_memory=False, **kwargs):
        for number, step in enumerate(sampler):
            if number:
                found.append(dict(launches=counter.launches, waits=counter.waits, bytes=counter.bytes,
                                  peak=counter.peak, by_line=counter.by_line))
            if number == steps:
                raise Enough
            counter.begin()
            images, *others = batches[step]
            item = [images if isinstance(images, list) else [images], *others]
            item = tree_map(lambda x: pin(x) if pin_memory and isinstance(x, torch.Tensor) else x, item)
            yield [item[0] if isinstance(images, list) else item[0][0], *item[1:]]
    return load


def be_there(monkeypatch):
    """Makes torch believe in the device; returns what counts, and the modes to run in."""
    counter = Counter()
    translate, device = Translate(counter), torch.Tensor.device
    COUNTERS.append(counter)
    for name, value in dict(Event=Event, set_device=lambda device: None, get_rng_state=lambda device: None,
                            max_memory_allocated=lambda device: 0, is_initialized=lambda: True,
                            synchronize=lambda: counter.wait("everything")).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "device", property(
        lambda x: CUDA if x.is_meta and not counter.inside else device.__get__(x)), raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.is_meta), raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin, raising=False)
    monkeypatch.setattr(torch, "autocast", translate.autocast)
    monkeypatch.setattr(clip_grad, "_has_foreach_support", lambda *args: True)
    return counter, translate


def run_evaluation(monkeypatch, stage, flags, after):
    """The counter of an evaluation up to its function `after`, which works without the device."""
    counter, translate = be_there(monkeypatch)
    monkeypatch.setattr(torch.utils.data, "DataLoader", no_workers)

    def enough(*args):
        raise Enough
    script = importlib.import_module(stage)
    monkeypatch.setattr(script, after, enough)
    args = parse_args(script.get_parser(), shlex.split(f"{flags} --device cpu --workers 0"))
    args.device = "cuda"
    with contextlib.suppress(Enough), translate, counter:
        script.main(args)
    return counter


def any_loader(batches, *args, batch_size=None, sampler=None, collate_fn=None, pin_memory=False, **kwargs):
    """A DataLoader in this process, of a training stage or of eval_batches."""
    if collate_fn is not None:
        yield from no_workers(batches, *args or (batch_size,), collate_fn, pin_memory)
        return
    for step in sampler:
        yield tree_map(lambda x: pin(x) if pin_memory and isinstance(x, torch.Tensor) else x, batches[step])


def run_whole(monkeypatch, stage, flags):
    """The exit code of a stage's main(), which trains, scores and ends; no checkpoint is saved."""
    counter, translate = be_there(monkeypatch)
    monkeypatch.setattr(torch.utils.data, "DataLoader", any_loader)
    monkeypatch.setattr(run.Run, "save", lambda self: None)
    script = importlib.import_module(stage)
    args = parse_args(script.get_parser(), shlex.split(f"{flags} --device cpu --workers 0"))
    args.device = "cuda"
    try:
        with translate, counter:
            script.main(args)
    except SystemExit as end:
        return end.code


def run_stage(monkeypatch, stage, flags, steps=3, world_size=1):
    """The counts of each of the first steps of a stage, dicts; flags: without --device."""
    counter, translate = be_there(monkeypatch)
    found = []
    monkeypatch.setattr(torch.utils.data, "DataLoader", loader_of(counter, steps, found))
    if world_size > 1:
        world = types.SimpleNamespace(size=world_size)
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        for name, value in dict(
                init_process_group=lambda **kwargs: None, is_initialized=lambda: True, get_rank=lambda: 0,
                get_world_size=lambda group=None: group.size if group else world_size,
                all_reduce=lambda *args, **kwargs: None, all_gather_single=lambda *args, **kwargs: None,
                all_gather_into_tensor=lambda *args, **kwargs: None, group=types.SimpleNamespace(WORLD=world),
                new_subgroups=lambda size, **kwargs: (types.SimpleNamespace(size=size), None),
                broadcast_object_list=lambda objects: None).items():
            monkeypatch.setattr(dist, name, value, raising=False)
    script = importlib.import_module(stage)
    if hasattr(script, "DistributedDataParallel"):
        monkeypatch.setattr(script, "DistributedDataParallel", lambda network, **kwargs: network)
    words = shlex.split(f"{flags} --device cpu --workers 0 --print-every 1000")
    args = parse_args(script.get_parser(), words)
    args.device = "cuda"
    with contextlib.suppress(Enough), translate, counter:
        script.main(args)
    return found
