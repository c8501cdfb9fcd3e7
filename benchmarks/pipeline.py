"""From JPEG files to 2 × 224 + 12 × 96 views: images a second and core, beside torchvision's pipelines.

    python benchmarks/pipeline.py                   CPU seconds of one thread, in this process

Published: torchvision's v1 transforms on Pillow images, view by view and image by image, as in the published
code. v2: its transforms on byte tensors, likewise. Ours: the workers' side (decode, 14 crops; with --crop-on
device decode and pad), and then the rest (colours, blur, normalisation), which is batched and runs on the
device: here on the same core. With each decoder that is installed, and from a shard instead of files.
"""

import importlib.util
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.views import per_sample_view  # noqa: E402
from cli import keep_memory  # noqa: E402
from data import PICTURES, Batches, build_dataset  # noqa: E402
from views import VIEWS, build_views  # noqa: E402

SIZE, MEAN, STD = PICTURES
LOCAL_SIZE, NUM_LOCAL, BATCH, IMAGES, ROUNDS = 96, 12, 32, 64, 5
RECIPES = [*VIEWS["multicrop"][:2], *[VIEWS["multicrop"][2]] * NUM_LOCAL]
SIZES = [SIZE] * 2 + [LOCAL_SIZE] * NUM_LOCAL


def write_photographs(folder):
    """JPEG files of 500 × 375, as many of ImageNet's are, cut from two photographs."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    for i in range(IMAGES):
        x, y = rng.integers(0, 140), rng.integers(0, 52)
        photographs[i % 2].crop((x, y, x + 500, y + 375)).save(folder / f"{i:03d}.jpg", quality=90)


def v2_view(size, scale, jitter, gray=0.0, blur=0.0, solarize=0.0):
    """The same view by torchvision's v2 transforms, of byte tensors; of the blur a kernel of 13 taps."""
    bicubic = v2.InterpolationMode.BICUBIC
    steps = [(1, v2.RandomResizedCrop(size, scale, interpolation=bicubic, antialias=True)),
             (1, v2.RandomHorizontalFlip()), (0.8, v2.ColorJitter(*jitter)), (gray, v2.Grayscale(3)),
             (blur, v2.GaussianBlur(13, (0.1, 2.0))), (solarize, v2.RandomSolarize(128, p=1.0)),
             (1, v2.ToDtype(torch.float32, scale=True)), (1, v2.Normalize(MEAN, STD))]
    return v2.Compose([step if p == 1 else v2.RandomApply([step], p) for p, step in steps if p > 0])


def published(paths, views):
    for path in paths:
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        yield [view(image) for view in views]


def by_v2(dataset, views):
    for i in range(len(dataset)):
        image = dataset[i]
        yield [view(image) for view in views]


def seconds(iterable):
    """CPU seconds an image, of this process with its one thread: other work on the machine counts little."""
    start = time.process_time()
    for _ in iterable:
        pass
    return (time.process_time() - start) / IMAGES


def main():
    torch.set_num_threads(1)
    keep_memory()                            # as a stage does
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    print(f"Python {platform.python_version()}, {versions}, CPU, 1 thread\n{IMAGES} JPEG files of 500 × 375, "
          f"2 × {SIZE} + {NUM_LOCAL} × {LOCAL_SIZE} views, batches of {BATCH}; medians of {ROUNDS} rounds",
          flush=True)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "files")
        folder.mkdir()
        write_photographs(folder)
        dataset = build_dataset(str(folder), "train")
        paths = [os.fsdecode(path) for path in dataset.paths]
        v1_views = [per_sample_view(size, MEAN, STD, **kwargs)
                    for size, kwargs in zip(SIZES, RECIPES, strict=True)]
        v2_views = [v2_view(size, **kwargs) for size, kwargs in zip(SIZES, RECIPES, strict=True)]
        views = build_views("multicrop", MEAN, STD, SIZE, LOCAL_SIZE, NUM_LOCAL)
        batches = Batches(dataset, BATCH, views, seed=0)
        cut = [batches[step][:2] for step in range(IMAGES // BATCH)]
        with tarfile.open(f"{root}/0.tar", "w") as tar:
            for path in paths:
                tar.add(path, os.path.basename(path))

        def worker_side(data=str(folder), **options):
            steps = Batches(build_dataset(data, "train", **options), BATCH, views, 0, crop_on=crop_on)
            return lambda: (steps[step] for step in range(IMAGES // BATCH))
        decoders = [name for name in (None, "torchvision", "simplejpeg")
                    if not name or importlib.util.find_spec(name)]
        ways = {"published, v1 on Pillow": lambda: published(paths, v1_views),
                "v2 on tensors": lambda: by_v2(dataset, v2_views),
                "ours, the rest": lambda: (views(*batch) for batch in cut)}
        for crop_on in ("workers", "device"):
            for name in decoders:
                ways[f"crops on {crop_on}, {name or 'pillow'}"] = worker_side(decoder=name)
        ways["crops on device, pillow, shard"] = worker_side(f"{root}/0.tar")
        rounds = [[seconds(way()) for way in ways.values()] for _ in range(ROUNDS + 1)]       # one to warm up
    times = dict(zip(ways, map(statistics.median, zip(*rounds[1:], strict=True)), strict=True))
    times["all on the CPU, pillow"] = times["crops on workers, pillow"] + times["ours, the rest"]
    for name, value in times.items():
        print(f"{name:31s} {1e3 * value:6.1f} ms, {1 / value:6.1f} images/s and core, "
              f"{times['published, v1 on Pillow'] / value:5.2f} of the published")
    print("required: crops on workers at least 7, on the device at least 10, all on the CPU at least 1.5")


if __name__ == "__main__":
    main()
