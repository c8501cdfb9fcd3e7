"""Scenes to segment or to detect in: small pictures of clothes at random size and place, on coloured noise.

data.scenes makes them of Fashion-MNIST, so boxes and masks are exact, and nothing is downloaded.
"""

from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

MOST = 4                         # items in a scene
DARKEST = 20                     # level from which a pixel belongs to an item; black is not always 0
OVERLAP = 0.2                    # share of the smaller of two items' squares that may lie in the other
TRIES = 10                       # to find a place for an item; then it is left out


class Scenes(NamedTuple):
    """N scenes. Of n items in a scene, the later ones lie over the earlier ones."""
    images: torch.Tensor         # uint8 [N, 3, H, W]
    boxes: list                  # N times float [n, 4]: left, top, right, bottom of what is seen
    labels: list                 # N times int64 [n]
    masks: list                  # N times bool [n, H, W], what is seen of an item

    def class_maps(self):
        """uint8 [N, H, W]: 0 for the background, else the item's label + 1."""
        maps = torch.zeros(self.images[:, 0].shape, dtype=torch.uint8)
        for scene, labels, masks in zip(maps, self.labels, self.masks, strict=True):
            for label, mask in zip(labels, masks, strict=True):
                scene[mask] = label.to(torch.uint8) + 1
        return maps


def compose(items, labels, num, size, key):
    """`num` scenes of size × size pixels; scene i is a function of the items and of (*key, i).

    items: uint8 [M, h, w] on black; labels: int64 [M]; key: a list of numbers, for the random generator. An
    item is resized to a square with a side of a quarter to half of the scene's.
    """
    plans = [plan(len(items), size, np.random.default_rng([*key, i])) for i in range(num)]
    everything = chain.from_iterable(placed for _, placed in plans)
    used = torch.tensor([index for index, *_ in everything])
    shapes = fill_holes(items[used] >= DARKEST)                      # of all scenes at once, which is faster
    drawn = iter(torch.stack([items[used].float(), 255.0 * shapes], 1))          # each [2, h, w]
    found = [paint(size, rng, placed, drawn, labels) for rng, placed in plans]
    images, *lists = map(list, zip(*found, strict=True))
    return Scenes(torch.stack(images), *lists)


def plan(count, size, rng):
    """(rng, list of (item, side, top, left)): which of `count` items are where."""
    placed = []
    for _ in range(rng.integers(1, MOST + 1)):
        for _ in range(TRIES):
            side = rng.integers(size // 4, size // 2 + 1)
            top, left = rng.integers(0, size - side + 1, 2)
            if all(overlap(side, top, left, *other) <= OVERLAP for _, *other in placed):
                placed.append((int(rng.integers(count)), int(side), int(top), int(left)))
                break
    return rng, placed


def overlap(side, top, left, other_side, other_top, other_left):
    """Area that two squares share, as a share of the smaller one."""
    height = min(top + side, other_top + other_side) - max(top, other_top)
    width = min(left + side, other_left + other_side) - max(left, other_left)
    return max(height, 0) * max(width, 0) / min(side, other_side) ** 2


def paint(size, rng, placed, drawn, labels):
    """(image, boxes, labels, masks) of a scene. drawn: an iterator: items and their shapes [2, h, w]."""
    coarse = torch.from_numpy(rng.random((1, 3, 6, 6), dtype=np.float32))
    image = 70 * F.interpolate(coarse, (size, size), mode="bilinear")[0]
    image += torch.from_numpy(rng.integers(0, 50, image.shape, np.uint8))
    masks = torch.zeros(len(placed), size, size, dtype=torch.bool)
    for i, (_, side, top, left) in enumerate(placed):
        item, mask = F.interpolate(next(drawn)[None], (side, side), mode="bilinear")[0]
        mask = mask > 127.5
        rows, columns = slice(top, top + side), slice(left, left + side)
        image[:, rows, columns] = torch.where(mask, item, image[:, rows, columns])
        masks[:i, rows, columns] &= ~mask        # it lies over the items before
        masks[i, rows, columns] = mask
    seen = masks.flatten(1).any(1)               # else others hide it, so nobody could find it
    masks = masks[seen]
    kept = torch.tensor([index for index, *_ in placed])[seen]
    return image.round_().byte(), boxes_of(masks), labels[kept], masks


def boxes_of(masks):
    """float [n, 4]: left, top, right, bottom of bool masks [n, H, W] with a pixel at least.

    Pixel x reaches from x to x + 1, so a mask of one column has a box of width 1.
    """
    ends = []
    for axis in (1, 2):                          # whether a column, then whether a row has a pixel
        there = masks.any(axis).byte()
        ends += [there.argmax(1), there.shape[1] - there.flip(1).argmax(1)]
    left, right, top, bottom = ends
    return torch.stack([left, top, right, bottom], 1).float()


def fill_holes(shapes):
    """Bool [N, h, w] with holes filled: background from which no path leads out of the picture."""
    free = F.pad(~shapes, (1, 1, 1, 1), value=True)
    outside = torch.zeros_like(free)
    outside[:, 0] = True                         # the frame around the picture
    before = -1
    while (count := int(outside.sum())) != before:
        before = count
        for axis in (1, 2):
            first, rest = (outside.narrow(axis, start, outside.shape[axis] - 1) for start in (0, 1))
            rest |= first.clone()
            outside &= free
            first |= rest.clone()
            outside &= free
    return ~outside[:, 1:-1, 1:-1]
