"""Batched views beside torchvision's per-sample pipeline, and their share of a training step.

    python benchmarks/views.py                 on a CPU; OMP_NUM_THREADS=1 on a machine that does other work

Images a second with two views each: ours in this process, and torchvision's transforms on Pillow images in a
DataLoader with 2 workers, in turns. Then steps of pretrain.py's default network, the views timed inside them.
"""

import platform
import statistics
import sys
import time
from pathlib import Path

import PIL
import torch
import torchvision
import torchvision.transforms as T
from PIL import Image, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import INPUTS, Batches, build_dataset  # noqa: E402
from loss import twist_loss  # noqa: E402
from model import Twist  # noqa: E402
from optim import param_groups  # noqa: E402
from views import VIEWS, build_views  # noqa: E402

BATCH, WORKERS = 128, 2
ROUNDS, BATCHES, STEPS = 5, 20, 60             # rounds of so many batches; training steps


def per_sample_view(size, mean, std, scale, jitter, jitter_each=False, gray=0.0, blur=0.0, solarize=0.0):
    """One view of a Pillow image by torchvision's transforms; those that never happen are left out."""
    channels = len(mean)

    def blurred(image):
        return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item()))

    colours = [(0.8, T.ColorJitter(*jitter))]
    if jitter_each:
        colours = [(0.8, T.ColorJitter(**{name: strength})) for name, strength in
                   zip(("brightness", "contrast", "saturation", "hue"), jitter, strict=True) if strength > 0]
    steps = [(1, T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC)),
             (1, T.RandomHorizontalFlip()), *colours, (gray, T.Grayscale(channels)),
             (blur, T.Lambda(blurred)), (solarize, T.Lambda(ImageOps.solarize)), (1, T.ToTensor()),
             (1, T.Normalize(mean, std))]
    return T.Compose([step if p == 1 else T.RandomApply([step], p) for p, step in steps if p > 0])


class PerSample(torch.utils.data.Dataset):
    """Item i is the two views of image i."""

    def __init__(self, name, dataset, recipe):
        pixels = dataset.images.permute(0, 2, 3, 1).numpy()
        self.images = [Image.fromarray(image.squeeze()) for image in pixels]
        size, mean, std = INPUTS[name]
        mean, std = (values * (dataset.images.shape[1] // len(values)) for values in (mean, std))
        self.views = [per_sample_view(size, mean, std, **kwargs) for kwargs in VIEWS[recipe][:2]]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return [view(self.images[i]) for view in self.views]


def per_sample_rate(loader):
    """Images a second, over all of the loader's batches."""
    start = time.perf_counter()
    for _ in loader:
        pass
    return len(loader) * BATCH / (time.perf_counter() - start)


def batched_rate(batches, views):
    """Images a second, from the data set to the network's input."""
    start = time.perf_counter()
    for step in range(BATCHES):
        images, uniforms, _ = batches[step]
        views(images, uniforms)
    return BATCHES * BATCH / (time.perf_counter() - start)


def step_seconds(batches, views):
    """Medians over STEPS training steps: seconds of a step, and of making its views."""
    torch.manual_seed(0)
    model = Twist("resnet8", num_classes=10, hidden_dim=512).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-4), lr=1e-3)
    seconds = []
    for step in range(STEPS + 3):
        start = time.perf_counter()
        images, uniforms, _ = batches[step]
        x = views(images, uniforms)
        made = time.perf_counter()
        loss = twist_loss(model(x)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append((time.perf_counter() - start, made - start))
    return [statistics.median(column) for column in zip(*seconds[3:], strict=True)]      # three to warm up


def compare(name, recipe, required=("", "")):
    dataset = build_dataset(name, "train")
    size, mean, std = INPUTS[name]
    views = build_views(recipe, mean, std, size)
    batches = Batches(dataset, BATCH, views, seed=0)
    some = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=BATCH * BATCHES)
    loader = torch.utils.data.DataLoader(PerSample(name, dataset, recipe), BATCH, sampler=some,
                                         num_workers=WORKERS, persistent_workers=True)
    rates = [(batched_rate(batches, views), per_sample_rate(loader)) for _ in range(ROUNDS + 1)]
    ours, theirs = (statistics.median(column) for column in zip(*rates[1:], strict=True))   # one to warm up
    print(f"{name} {size} × {size}, views '{recipe}': ours {ours:,.0f} images/s in this process, torchvision "
          f"{theirs:,.0f} with {WORKERS} workers: {ours / theirs:.1f}-fold{required[0]}")
    step, made = step_seconds(batches, views)
    print(f"  of a training step of {1e3 * step:.1f} ms the views take {1e3 * made:.1f} ms: "
          f"{made / step:.1%}{required[1]}", flush=True)


def main():
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    print(f"Python {platform.python_version()}, {versions}, CPU, {torch.get_num_threads()} threads\n"
          f"batch {BATCH}, two views of each image; training step: resnet8, head 512, AdamW", flush=True)
    compare("fashion-mnist", "fashion-mnist", (" (required: at least 10)", " (required: under 15%)"))
    compare("fake", "barlow")


if __name__ == "__main__":
    main()
