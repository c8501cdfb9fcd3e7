"""Data sets by name, and views (augmentations), made for whole batches by tensor operations on any device.

All randomness of a view is a row of uniform numbers, drawn on the CPU from (seed, step) for the whole global
batch and sliced by process; everything after that is a pure function. So a run sees the same views whatever
the number of processes and workers, and wherever it was stopped.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import UserError

DATASETS = ("fashion-mnist", "fake")
FASHION_MNIST = Path(__file__).parent / "datasets" / "fashion-mnist"
FASHION_MNIST_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
                         "Bag", "Ankle boot")
UNIFORMS = 40                    # random numbers in one view of one image, see RandomView.draw


# ---------------------------------------------------------------- data sets
@dataclass
class ImageSet:
    """images uint8 [N, C, H, W], labels int64 [N] or None; mean, std: to normalise pixels of 0..1."""
    images: torch.Tensor
    labels: torch.Tensor | None
    class_names: list
    mean: float
    std: float

    def __len__(self):
        return len(self.images)


def build_dataset(name, split, seed=0):
    """The `train` or `test` split of a built-in data set: `fashion-mnist` (embedded) or `fake`."""
    if name == "fashion-mnist":
        part = "train" if split == "train" else "t10k"
        images = _read_idx(FASHION_MNIST / f"{part}-images-idx3-ubyte.gz")[:, None]
        labels = _read_idx(FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz").long()
        return ImageSet(images, labels, list(FASHION_MNIST_CLASSES), mean=0.2860, std=0.3530)
    if name == "fake":           # per class one colour pattern, under noise: enough to see a loss go down
        rng = np.random.default_rng([seed, 3 if split == "train" else 4])
        labels = rng.permutation(np.arange(512 if split == "train" else 256) % 10)
        patterns = np.random.default_rng([seed, 5]).integers(0, 256, (10, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
        images = np.clip(patterns[labels] + rng.normal(0, 40, (len(labels), 3, 32, 32)), 0, 255)
        return ImageSet(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels),
                        [f"class {c}" for c in range(10)], mean=0.5, std=0.25)
    raise UserError(f"--data: unknown data set '{name}': choose from {', '.join(DATASETS)}")


def _read_idx(path):
    """An idx.gz file of bytes: two zeros, type 8, number of axes, big-endian sizes, then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it from the repository") from None
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, offset=4).astype(int)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())


class Batches(torch.utils.data.Dataset):
    """Item t is this process's share of step t: (images uint8 [B, C, H, W], uniforms [V, B, UNIFORMS]).

    Each epoch is a permutation from (seed, epoch) cut into steps of the global batch, the rest dropped. As
    the loader maps steps to batches, a run resumes by starting its sampler elsewhere, with any workers.
    """

    def __init__(self, dataset, batch_size, num_views, seed, rank=0, world_size=1):
        self.dataset, self.batch_size, self.num_views, self.seed = dataset, batch_size, num_views, seed
        self.steps_per_epoch = len(dataset) // batch_size
        self.mine = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._epoch = None

    def __getitem__(self, step):
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.dataset))
            self._epoch = epoch
        indices = self._order[place * self.batch_size:][self.mine]
        rng = np.random.default_rng([self.seed, 2, step])
        uniforms = rng.random((self.num_views, self.batch_size, UNIFORMS), dtype=np.float32)[:, self.mine]
        return self.dataset.images[torch.from_numpy(indices)], torch.from_numpy(uniforms)


def normalize(images, mean, std):
    """uint8 [B, C, H, W] -> the network's input, float32 [B, 3, H, W]; gray is repeated."""
    return ((images.float() / 255 - mean) / std).expand(-1, 3, -1, -1)


# ---------------------------------------------------------------- views
JITTER = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue
VIEWS = {                        # the first global crop, the second, the local crops; of the published code
    "barlow": (dict(scale=(0.08, 1), jitter=JITTER, gray=0.2, blur=1.0),
               dict(scale=(0.08, 1), jitter=JITTER, gray=0.2, blur=0.1, solarize=0.2)),
    "moco": (dict(scale=(0.2, 1), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5),) * 2,
    "multicrop": (dict(scale=(0.4, 1), jitter=JITTER, gray=0.2, blur=1.0),
                  dict(scale=(0.4, 1), jitter=JITTER, gray=0.2, blur=0.1, solarize=0.2),
                  dict(scale=(0.05, 0.4), jitter=JITTER, gray=0.2, blur=0.5)),
    # ours, for 28 × 28 gray pictures: strong contrast instead of colour, no blur of the few pixels there are
    "fashion-mnist": (dict(scale=(0.4, 1), jitter=(0.8, 0.8, 0, 0), jitter_each=True),) * 2 + (
        dict(scale=(0.1, 0.4), jitter=(0.8, 0.8, 0, 0), jitter_each=True),),
}


def build_views(name, mean, std, size, local_size=None, num_local=0):
    """The V = 2 + num_local views of the recipe `name`, each a module (images, uniforms) -> input."""
    recipe = VIEWS[name]
    if num_local > 0 and len(recipe) < 3:
        raise UserError(f"--num-local {num_local}: --views {name} has no local crops; --views multicrop has")
    return ([RandomView(size, mean, std, **kwargs) for kwargs in recipe[:2]]
            + [RandomView(local_size, mean, std, **recipe[2]) for _ in range(num_local)])


class RandomView(nn.Module):
    """Random resized crop (bicubic), flip, colour jitter, gray, blur, solarise, normalise; drawn per image.

    size: pixels of the square output. scale: share of the area, ratio: width / height of the crop. jitter:
    strengths of brightness, contrast, saturation, hue, applied together with probability jitter_p, or with
    jitter_each independently. flip, gray, blur, solarize: probabilities; sigma: of the Gaussian blur, in
    pixels. Distributed as torchvision's RandomResizedCrop and ColorJitter.
    """

    def __init__(self, size, mean, std, scale, ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0, 0, 0, 0),
                 jitter_p=0.8, jitter_each=False, gray=0.0, blur=0.0, sigma=(0.1, 2.0), solarize=0.0):
        super().__init__()
        self.size, self.mean, self.std, self.scale, self.ratio = size, mean, std, scale, ratio
        self.flip, self.jitter, self.jitter_p, self.jitter_each = flip, jitter, jitter_p, jitter_each
        self.gray, self.blur, self.sigma, self.solarize = gray, blur, sigma, solarize

    def draw(self, u, height, width):
        """Uniform numbers [B, UNIFORMS] on the CPU -> parameters of one view of each image, a dict of [B]."""
        # ten tries for a crop that fits, as torchvision makes; else the largest central one that may be
        area = height * width * (self.scale[0] + u[:, 0:10] * (self.scale[1] - self.scale[0]))
        low, high = np.log(self.ratio)
        ratio = torch.exp(low + u[:, 10:20] * (high - low))
        w, h = torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.int().argmax(1, keepdim=True)                                # [B, 1]
        found = fits.any(1)
        w_central = min(width, round(height * self.ratio[1]))
        h_central = min(height, round(width / self.ratio[0]))
        w = torch.where(found, w.gather(1, first)[:, 0], w_central)
        h = torch.where(found, h.gather(1, first)[:, 0], h_central)
        top = torch.where(found, torch.floor(u[:, 20] * (height - h + 1)), (height - h_central) // 2)
        left = torch.where(found, torch.floor(u[:, 21] * (width - w + 1)), (width - w_central) // 2)

        b, c, s, hue = self.jitter
        around = 2 * u[:, 24:28] - 1                                              # U(-1, 1)
        strength = torch.tensor([b, c, s])
        low = (1 - strength).clamp_min(0)
        chance = u[:, 36:40] if self.jitter_each else u[:, 23:24].expand(-1, 4)
        factors = low + u[:, 24:27] * (1 + strength - low)                        # U(max(0, 1 - s), 1 + s)
        return dict(top=top, left=left, height=h, width=w, flip=u[:, 22] < self.flip,
                    jitter=chance < self.jitter_p, brightness=factors[:, 0], contrast=factors[:, 1],
                    saturation=factors[:, 2], hue=hue * around[:, 3], order=u[:, 28:32].argsort(1),
                    gray=u[:, 32] < self.gray, blur=u[:, 33] < self.blur,
                    sigma=self.sigma[0] + u[:, 34] * (self.sigma[1] - self.sigma[0]),
                    solarize=u[:, 35] < self.solarize)

    def forward(self, images, u):
        """images uint8 [B, C, H, W] on any device, u [B, UNIFORMS] on the CPU -> [B, 3, size, size]."""
        p = self.draw(u, *images.shape[-2:])
        x = crop_resize(images, p["top"], p["left"], p["height"], p["width"], self.size, p["flip"])
        colour = x.shape[1] == 3                      # of gray pictures saturation and hue change nothing
        ops = [(0, adjust_brightness, "brightness"), (1, adjust_contrast, "contrast"),
               (2, adjust_saturation, "saturation"), (3, adjust_hue, "hue")][:4 if colour else 2]
        ops = [(i, op, name) for i, op, name in ops if self.jitter[i] > 0]
        rank = p["order"].argsort(1)[:, [i for i, _, _ in ops]].argsort(1).argsort(1)      # among these ops
        for position in range(len(ops)):              # each image has its own order
            for k, (i, op, name) in enumerate(ops):
                _apply(op, x, p["jitter"][:, i] & (rank[:, k] == position), p[name])
        if colour:
            _apply(lambda x: gray(x).expand_as(x), x, p["gray"])
        _apply(gaussian_blur, x, p["blur"], p["sigma"])
        _apply(solarize, x, p["solarize"])
        return ((x - self.mean) / self.std).expand(-1, 3, -1, -1)


def _apply(op, x, chosen, *params):
    """x[chosen] = op(x[chosen], params[chosen]); `chosen` is on the CPU: no device has to be waited for."""
    index = chosen.nonzero()[:, 0]
    if len(index):
        params = [param[index].to(x.device).view(-1, 1, 1, 1) for param in params]
        index = index.to(x.device)
        x[index] = op(x[index], *params)


def crop_resize(images, top, left, height, width, size, flip):
    """Crops [B] of uint8 images [B, C, H, W] at bicubic [B, C, size, size] in 0..1, some mirrored.

    Pillow's resize (up to version 12; 13 turns the order of the axes for some shapes): antialiased, a = -0.5,
    horizontal before vertical and clamped between. Two matrices per image; a mirrored image is one whose
    horizontal matrix stands upside down.
    """
    H, W = images.shape[-2:]
    top, left, height, width, flip = (t.to(images.device) for t in (top, left, height, width, flip))
    horizontal = _bicubic_matrix(left, width, W, size)                            # [B, size, W]
    horizontal = torch.where(flip[:, None, None], horizontal.flip(1), horizontal)
    vertical = _bicubic_matrix(top, height, H, size)                              # [B, size, H]
    x = torch.matmul(images.float(), horizontal[:, None].mT).clamp_(0, 255)
    return torch.matmul(vertical[:, None], x).clamp_(0, 255).div_(255)


def _bicubic_matrix(start, length, in_size, out_size):
    """Weights [B, out_size, in_size] that resample `length` pixels from `start` on to out_size pixels."""
    scale = (length / out_size)[:, None, None]
    place = torch.arange(in_size, device=start.device) + 0.5                      # [in_size], pixel centres
    target = torch.arange(out_size, device=start.device)[:, None] + 0.5           # [out_size, 1]
    x = ((place - start[:, None, None] - target * scale) / scale.clamp_min(1)).abs()
    # cubic convolution, a = -0.5: two pieces that end at 1 and at 2, added without choosing between them
    near, far = (1 - x).clamp_(min=0), (2 - x).clamp_(min=0)
    weights = near * near * (1 - 2 * near) + far * far * (far - 1) / 2
    inside = (place > start[:, None]) & (place < (start + length)[:, None])       # [B, in_size]
    weights = weights * inside[:, None]                                           # nothing from outside
    return weights / weights.sum(-1, keepdim=True)


def gray(x):
    """Luma (ITU-R 601) [B, 1, H, W] of [B, 3, H, W]; of one channel the channel itself."""
    return x if x.shape[1] == 1 else 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def adjust_brightness(x, factor):
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Blend with the mean gray of the image."""
    mean = gray(x).mean((1, 2, 3), keepdim=True)
    return (mean + (x - mean) * factor).clamp_(0, 1)


def adjust_saturation(x, factor):
    """Blend with the gray image."""
    luma = gray(x)
    return (luma + (x - luma) * factor).clamp_(0, 1)


def adjust_hue(x, shift):
    """Turn the hue by `shift` of the full circle, in HSV."""
    v, low = x.amax(1), x.amin(1)
    chroma = v - low
    r, g, b = x.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(v == r, (g - b) / safe, torch.where(v == g, 2 + (b - r) / safe, 4 + (r - g) / safe)) / 6
    hue = hue + shift[:, 0]
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1) + 6 * hue[:, None]) % 6
    return v[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma):
    """True Gaussian of sigma <= 2 pixels ([B, 1, 1, 1]), cut off at 8, edges repeated: two products."""
    size, reach = x.shape[-1], 8
    taps = torch.arange(-reach, reach + 1, device=x.device)
    g = torch.exp(-0.5 * (taps / sigma.view(-1, 1)) ** 2)                         # [B, 17]
    source = (torch.arange(size, device=x.device)[:, None] + taps).clamp(0, size - 1)
    matrix = torch.einsum("bk,ikj->bij", g / g.sum(1, keepdim=True), F.one_hot(source, size).to(x))[:, None]
    return matrix @ x @ matrix.mT


def solarize(x):
    """Invert what is at least 128 of 255."""
    return torch.where(x > 127.5 / 255, 1 - x, x)
