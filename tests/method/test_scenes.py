"""Scenes: a function of (split, seed, index), with exact boxes and masks."""

import functools

import numpy as np
import pytest
import torch
from scipy import ndimage

import data
from scenes import MOST, boxes_of, compose, fill_holes


@pytest.fixture(scope="module")
def scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_read_idx", functools.cache(data._read_idx))     # it takes longer than the rest
        yield data.scenes("train", 40, 96, 0)


def test_shapes_and_kinds(scenes):
    assert scenes.images.shape == (40, 3, 96, 96) and scenes.images.dtype == torch.uint8
    counts = [len(labels) for labels in scenes.labels]
    assert {*counts} == {*range(1, MOST + 1)}
    for boxes, labels, masks in zip(scenes.boxes, scenes.labels, scenes.masks, strict=True):
        assert boxes.shape == (len(labels), 4) and boxes.dtype == torch.float32
        assert labels.dtype == torch.int64 and masks.dtype == torch.bool
        assert masks.shape == (len(labels), 96, 96) and masks.sum(0).max() == 1
    assert {*torch.cat(scenes.labels).tolist()} == set(range(10))


def test_boxes_are_those_of_the_masks(scenes):
    for boxes, masks in zip(scenes.boxes, scenes.masks, strict=True):
        for box, mask in zip(boxes.tolist(), masks, strict=True):
            rows, columns = np.nonzero(mask.numpy())
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    one = torch.zeros(1, 5, 7, dtype=torch.bool)
    one[0, 2, 3] = True
    assert boxes_of(one).tolist() == [[3, 2, 4, 3]] and boxes_of(one[:0]).shape == (0, 4)


def test_a_scene_is_a_function_of_split_seed_and_index(scenes):
    def differs(*args):
        other = data.scenes(*args)
        return [not a.equal(b) for a, b in zip(other.images, scenes.images, strict=False)]
    again = data.scenes("train", 40, 96, 0)
    assert again.images.equal(scenes.images) and not any(differs("train", 7, 96, 0))
    for name in ("boxes", "labels", "masks"):
        assert all(a.equal(b) for a, b in zip(getattr(again, name), getattr(scenes, name), strict=True))
    assert all(differs("train", 7, 96, 1)) and all(differs("val", 7, 96, 0))


def test_pixels_of_a_mask_are_the_items():
    """One white item, so each pixel of a mask is white, and the rest is noise below that."""
    item = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    scenes = compose(item, torch.tensor([7]), 12, 64, [0])
    for image, masks, labels in zip(scenes.images, scenes.masks, scenes.labels, strict=True):
        assert (image[:, masks.any(0)] == 255).all() and (image[:, ~masks.any(0)] < 255).all()
        assert (labels == 7).all()
    maps = scenes.class_maps()
    assert maps.dtype == torch.uint8 and maps.equal(8 * torch.stack([m.any(0) for m in scenes.masks]).byte())


def test_later_items_lie_over_earlier_ones_and_hidden_ones_are_left_out(monkeypatch):
    import scenes as module
    placed = [(0, 16, 0, 0), (1, 16, 8, 8), (2, 16, 8, 8)]      # the third hides the second
    monkeypatch.setattr(module, "plan", lambda count, size, rng: (rng, placed))
    items = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    found = compose(items, torch.tensor([4, 5, 6]), 1, 32, [0])
    assert found.labels[0].tolist() == [4, 6]
    assert found.boxes[0].tolist() == [[0, 0, 16, 16], [8, 8, 24, 24]]
    assert found.masks[0].flatten(1).sum(1).tolist() == [256 - 64, 256]


def test_holes_are_filled_as_scipy_does():
    """Also in noise, where a way out has many bends; and dark insides of clothes belong to them."""
    clothes = data.build_dataset("fashion-mnist", "test").images[:200, 0] >= 20
    noise = torch.rand(200, 28, 28, generator=torch.Generator().manual_seed(0)) > 0.4
    for shapes in (clothes, noise):
        expected = np.stack([ndimage.binary_fill_holes(shape) for shape in shapes.numpy()])
        assert np.array_equal(fill_holes(shapes).numpy(), expected)
    assert (fill_holes(clothes) & ~clothes).any()
