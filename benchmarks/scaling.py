"""How time and memory of a training step grow with views, classes, batch and processes, on a CPU.

    python benchmarks/scaling.py           under 5 minutes; OMP_NUM_THREADS is not read

Step: resnet8 with TWIST's head on random views of 20 × 20 pixels, loss, backward, AdamW. Its CPU seconds with
one thread are medians over rounds that visit all sizes in turn; memory is what the forward pass keeps for the
backward pass. The exponent e of time ~ size^e is fitted to all sizes, and once more to the largest two. Then
two gloo processes with one thread each take turns with one process of two threads and one of one thread. A
busy machine slows two threads that wait for each other most: look at the images of a CPU second there.
"""

import multiprocessing
import os
import platform
import socket
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.loss import saved_bytes  # noqa: E402
from cli import keep_memory, run_in_turns  # noqa: E402
from loss import twist_loss  # noqa: E402
from model import Twist  # noqa: E402
from optim import param_groups  # noqa: E402

BASE = dict(V=4, C=256, B=32)                    # views of an image, classes, images of a step
SIZES = dict(V=(2, 4, 8, 16), C=(1024, 4096, 16384, 65536), B=(16, 32, 64, 128))
ROUNDS, TURNS, STEPS, BATCH = 5, 5, 5, 128       # TURNS of STEPS steps with BATCH images, two views of each
COLLECTIVES = 500                                # calls of all_reduce, to time one
REQUIRED = dict(V=1.05, C=1.05)                  # the largest exponents of time


class Step:
    """One training step of a network of its own; world_size: processes that share the B images."""

    def __init__(self, V, C, B, world_size=1):
        torch.manual_seed(0)
        self.model = Twist("resnet8", num_classes=C, hidden_dim=256).to(memory_format=torch.channels_last)
        self.ddp = self.model
        if world_size > 1:                       # with the flags of a stage
            self.ddp = DistributedDataParallel(self.model, broadcast_buffers=False,
                                               gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, 1e-4), lr=1e-3)
        self.views = [torch.randn(B // world_size, 3, 20, 20) for _ in range(V)]
        self.views = [x.contiguous(memory_format=torch.channels_last) for x in self.views]

    def loss(self, _=None):
        return twist_loss(self.ddp(self.views)).total

    def run(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def cpu_seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def exponent(sizes, values):
    return np.polyfit(np.log(sizes), np.log(values), 1)[0]


def grow(name, sizes):
    """Prints how a step, its loss alone, and its memory grow with one size."""
    steps, losses, seconds = [], [], {}
    for size in sizes:
        shape = BASE | {name: size}
        steps.append(Step(**shape))
        losses.append(torch.randn(shape["V"], shape["B"], shape["C"], requires_grad=True))
    for number in range(ROUNDS + 1):
        for i, (step, logits) in enumerate(zip(steps, losses, strict=True)):
            times = cpu_seconds(step.run), cpu_seconds(lambda x=logits: twist_loss(x).total.backward())
            if number > 0:                       # the first round warms up
                seconds.setdefault(i, []).append(times)
    medians = [[statistics.median(column) for column in zip(*seconds[i], strict=True)] for i in seconds]
    rows = {"step, ms": [1e3 * step for step, _ in medians], "loss, ms": [1e3 * loss for _, loss in medians],
            "kept, MiB": [saved_bytes(step.loss, torch.empty(0)) / 2 ** 20 for step in steps]}
    fixed = ", ".join(f"{key} {value}" for key, value in BASE.items() if key != name)
    print(f"{name} of {', '.join(map(str, sizes))}; {fixed}")
    for what, values in rows.items():
        limit = f" (required: at most {REQUIRED[name]})" if name in REQUIRED and what == "step, ms" else ""
        last = exponent(sizes[-2:], values[-2:])
        print(f"  {what:10s} {'  '.join(f'{value:8.2f}' for value in values)}   exponent "
              f"{exponent(sizes, values):.2f}, of the largest two {last:.2f}{limit}", flush=True)


def serve(pipe, rank, world_size, threads, port):
    """A process that does what it is told, so many times, and answers with seconds, clock and CPU."""
    torch.set_num_threads(threads)
    if world_size > 1:
        run_in_turns()                           # as a stage does
        dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=world_size)
    step, sums = Step(2, 10, BATCH, world_size), torch.zeros(129)          # sums: as of 64 channels
    actions = {"step": step.run, "all_reduce": lambda: dist.all_reduce(sums)}
    while told := pipe.recv():
        name, times = told
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            actions[name]()
        pipe.send((time.perf_counter() - start, time.process_time() - cpu))


def compare_processes():
    """Images a second of one process and of two with one thread each, and of one with two threads."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipes, turns = {(1, 2): [], (2, 1): [], (1, 1): []}, {}                       # of (processes, threads)
    for (world_size, threads), ends in pipes.items():
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, rank, world_size, threads, port), daemon=True).start()
            ends.append(ours)
    for _ in range(TURNS + 1):
        for group, ends in pipes.items():
            clock, cpu = ask(ends, "step", STEPS)
            turns.setdefault(group, []).append((STEPS * BATCH / max(clock), STEPS * BATCH / sum(cpu)))
    found = {}
    for (world_size, threads), rates in turns.items():
        clock, cpu = zip(*rates[1:], strict=True)                                 # the first turn warms up
        found[world_size, threads] = statistics.median(clock), max(clock), statistics.median(cpu)
        print(f"{world_size} process(es), {threads} thread(s): images/s %.0f, fastest turn %.0f; images a "
              "CPU second %.0f" % found[world_size, threads])
    median, fastest, _ = (a / b for a, b in zip(found[2, 1], found[1, 2], strict=True))
    print(f"two processes reach {median:.2f} of two threads, fastest turns {fastest:.2f} (required: at least "
          f"0.9); a CPU second does {found[2, 1][2] / found[1, 1][2]:.2f} of what it does in one process")
    clock, _ = ask(pipes[2, 1], "all_reduce", COLLECTIVES)
    print(f"one all_reduce of 129 numbers by two processes: {1000 * max(clock) / COLLECTIVES:.2f} ms")
    for end in sum(pipes.values(), []):
        end.send(None)


def ask(ends, name, times):
    """(seconds, CPU seconds) of each process behind the pipes for doing a thing so many times at once."""
    for end in ends:
        end.send((name, times))
    return zip(*[end.recv() for end in ends], strict=True)


def main():
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPUs{load}; "
          f"medians of {ROUNDS} rounds", flush=True)
    keep_memory()                            # as a stage does
    torch.set_num_threads(1)
    for name, sizes in SIZES.items():
        grow(name, sizes)
    compare_processes()


if __name__ == "__main__":
    main()
