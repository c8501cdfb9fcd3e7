"""What a grid of 45 heads costs beside one: in the pass that runs the backbone, and on cached features.

    python benchmarks/lincls.py                     on an otherwise idle CPU; one thread, in this process

A step is the one of lincls.py: views, frozen backbone, heads forward and backward, SGD. Rounds time the two
grids in turn; medians of the rounds are printed, and the median of their ratios.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))
from lincls import Heads, build_optimizer, head_losses  # noqa: E402
from model import build_backbone  # noqa: E402
from views import UNIFORMS, Views  # noqa: E402

GRID, ROUNDS = 45, 7                                            # nine learning rates by five weight decays
SETTINGS = [("resnet8_2x2", 28, 10, 256), ("resnet18", 224, 1000, 64)]     # arch, pixels, classes, batch


def build_steps(arch, size, num_classes, batch):
    """{(grid, on cached features): a function that trains all heads of the grid for one step}."""
    torch.manual_seed(0)
    backbone = build_backbone(arch).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    views = Views([(size, dict(scale=(0.08, 1)))], (0.5,), (0.25,))
    images = torch.randint(0, 256, (batch, 1 if size == 28 else 3, size, size), dtype=torch.uint8)
    uniforms, labels = torch.rand(1, batch, UNIFORMS), torch.randint(0, num_classes, (batch,))
    cached = torch.randn(batch, backbone.feature_dim)

    def build_step(grid, on_cached):
        heads = Heads([cached], grid, num_classes)
        optimizer = build_optimizer(heads, [(0.1, 1e-4)] * grid, batch)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]

        def step():
            with torch.no_grad():
                features = cached if on_cached else backbone(views(images, uniforms)[0])
            optimizer.zero_grad()
            head_losses(heads([features]), labels).sum().backward()
            optimizer.step()
        return step
    return {(grid, on_cached): build_step(grid, on_cached)
            for on_cached in (False, True) for grid in (1, GRID)}


def seconds(step, times):
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


def main():
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision "
          f"{torchvision.__version__}, CPU, {torch.get_num_threads()} thread; medians of {ROUNDS} rounds")
    for arch, size, num_classes, batch in SETTINGS:
        steps = build_steps(arch, size, num_classes, batch)
        print(f"{arch}, {batch} images of {size} pixels, {num_classes} classes")
        for on_cached in (False, True):
            times = 50 if on_cached and num_classes == 10 else 1
            rounds = [[seconds(steps[grid, on_cached], times) for grid in (1, GRID)]
                      for _ in range(ROUNDS + 1)]
            one, all_heads = zip(*rounds[1:], strict=True)      # the first round warms up
            ratio = statistics.median(b / a for a, b in rounds[1:])
            print(f"  {'cached features' if on_cached else 'with the backbone'}: one head "
                  f"{1000 * statistics.median(one):.2f} ms a step, {GRID} heads "
                  f"{1000 * statistics.median(all_heads):.2f} ms: {ratio:.2f} times")


if __name__ == "__main__":
    main()
