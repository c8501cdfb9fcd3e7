"""TWIST in one file: a small network sorts 60,000 pictures of clothing into ten classes, without labels.

    python minimal.py

After 2 to 5 minutes on two CPU cores the ten classes are matched with the true ones, and drawn.
`pretrain.py` is the same for real use: other data and networks, several GPUs, checkpoints, restarts.
"""

import gzip
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.utils import save_image

DATA = Path(__file__).parent / "datasets/fashion-mnist"
CLASSES, BATCH, LR = 10, 128, 1e-3
STEPS, WARMUP = 832, 47                  # the learning rate rises for 47 steps, then it follows a cosine


def read(name):
    """Images [N, 1, 28, 28] from 0 to 1, and labels [N], which are for the score only."""
    images = gzip.decompress((DATA / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]      # behind a header
    labels = gzip.decompress((DATA / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
    images, labels = np.frombuffer(images, np.uint8), np.frombuffer(labels, np.uint8)
    return torch.tensor(images).view(-1, 1, 28, 28) / 255, labels.astype(int)


def random_view(x):
    """Another look at each image [B, 1, 28, 28]: cropped, mirrored, other light; an input [B, 3, 20, 20]."""
    def uniform(low, high):
        return torch.empty(len(x)).uniform_(low, high)

    def factor(most):                    # 1 - most to 1 + most for 80 % of the images, else 1
        return torch.where(uniform(0, 1) < 0.8, uniform(1 - most, 1 + most), 1).view(-1, 1, 1, 1)

    area, ratio = uniform(0.55, 1), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    ratio = ratio.clamp(area, 1 / area)                              # so that the crop is inside the image
    w, h = (area * ratio).sqrt(), (area / ratio).sqrt()              # shares of the image's sides
    x0, y0, mirror = uniform(-1, 1) * (1 - w), uniform(-1, 1) * (1 - h), uniform(-1, 1).sign()      # centre
    zero = torch.zeros(len(x))
    crop = torch.stack([w * mirror, zero, x0, zero, h, y0], 1).view(-1, 2, 3)
    grid = F.affine_grid(crop, [len(x), 1, 40, 40], align_corners=False)         # halved below: smoother
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    x = F.avg_pool2d(x, 2).clamp(0, 1)
    light, contrast = factor(0.8), factor(0.4)
    light_first = change_contrast((x * light).clamp(0, 1), contrast)
    light_last = (change_contrast(x, contrast) * light).clamp(0, 1)
    return to_input(torch.where(uniform(0, 1).view(-1, 1, 1, 1) < 0.5, light_first, light_last))


def change_contrast(x, factor):
    mean = x.mean((1, 2, 3), keepdim=True)
    return (mean + (x - mean) * factor).clamp(0, 1)


def to_input(x):
    """Pixels from 0 to 1 [B, 1, h, w] -> the network's input [B, 3, h, w], normalised."""
    return ((x - 0.286) / 0.353).expand(-1, 3, -1, -1)               # mean and deviation of the data's pixels


def block(inputs, outputs, stride):
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut if stride > 1 else None)


def build_network():
    """A small ResNet and a head of three layers: inputs [B, 3, h, w] -> logits [B, CLASSES]."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        block(32, 32, 1), block(32, 64, 2), block(64, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 512), nn.BatchNorm1d(512), nn.ReLU(),
        nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(),
        nn.Linear(512, CLASSES),
        nn.BatchNorm1d(CLASSES, affine=False))       # NBS: no class can win for all images


def twist_loss(z1, z2):
    """Equations 2 to 5 of the paper, for the logits [B, C] of two views of each image."""
    p, q = z1.softmax(1), z2.softmax(1)                                   # class distributions
    log_p, log_q = (p + 1e-5).log(), (q + 1e-5).log()
    m, n = p.mean(0), q.mean(0)                                           # [C], of the batch
    consistency = (p * (log_p - log_q) + q * (log_q - log_p)).sum(1).mean() / 2      # KL(p|q) + KL(q|p)
    sharpness = -(p * log_p + q * log_q).sum(1).mean() / 2                # entropy of an image: low
    diversity = -(m * (m + 1e-5).log() + n * (n + 1e-5).log()).sum() / 2  # entropy of the batch: high
    return consistency + sharpness - diversity


def begin(seed):
    """A network with random weights, those of this seed, and its optimizer."""
    torch.manual_seed(seed)
    network = build_network()
    return network, torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))


def train(network, optimizer, images, steps):
    """Trains on images [N, 1, 28, 28]. steps: of the schedule, range(STEPS) for all."""
    losses = []
    for step in steps:
        if step < WARMUP:
            lr = LR * step / WARMUP
        else:
            lr = LR * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        optimizer.param_groups[0]["lr"] = lr
        x = images[torch.randint(len(images), (BATCH,))]
        z1, z2 = network(torch.cat([random_view(x), random_view(x)])).chunk(2)
        loss = twist_loss(z1, z2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 104 == 0:                                    # eight times
            print(f"step {step + 1} of {STEPS}: loss {np.mean(losses[-100:]):.3f}")


@torch.no_grad()
def evaluate(network, images, labels, picture):
    """Accuracy after matching each class with a true one (Hungarian algorithm). Draws the classes, too."""
    network.eval()                                   # batch norms use the statistics of the training now
    inputs = to_input(F.interpolate(images, (20, 20), mode="bilinear", antialias=True))
    p = torch.cat([network(x).softmax(1) for x in inputs.split(1000)])                    # [N, CLASSES]
    counts = np.zeros((CLASSES, CLASSES), int)
    np.add.at(counts, (p.argmax(1).numpy(), labels), 1)
    found, true = linear_sum_assignment(counts, maximize=True)
    picture.parent.mkdir(parents=True, exist_ok=True)
    save_image(images[p.topk(16, 0).indices.T.flatten()], picture, nrow=16)      # a row for each class
    return counts[found, true].sum() / len(labels)


if __name__ == "__main__":
    images, _ = read("train")
    network, optimizer = begin(seed=0)
    train(network, optimizer, images, range(STEPS))
    picture = Path("runs/minimal/classes.png")
    accuracy = evaluate(network, *read("t10k"), picture)
    print(f"accuracy {accuracy:.3f}; the classes are in {picture}")
