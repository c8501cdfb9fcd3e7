"""Proves that views are the published ones: operations of Pillow and torchvision, distributions, order.

    pytest tests/method/test_views.py
"""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from scipy import ndimage, stats
from sklearn.datasets import load_sample_image

import views as views_module
from checkpoint import UserError
from data import ImageSet, build_dataset, eval_batches
from views import (
    COLOUR_AXES,
    COLOUR_WIDTHS,
    UNIFORMS,
    VIEWS,
    RandomView,
    build_views,
    crop_resize,
    gaussian_blur,
    mirrored,
    pick_views,
    solarize,
)

# The published table, view by view: scale, (brightness, contrast, saturation, hue), gray, blur, solarise.
PUBLISHED = {
    "barlow": [((0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.2, 1.0, 0.0),
               ((0.08, 1), (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2)],
    "moco": [((0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0.0),
             ((0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0.0)],
    "moco-v1": [((0.2, 1), (0.4, 0.4, 0.4, 0.4), 0.2, 0.0, 0.0)] * 2,
    "seed": [((0.14, 1), (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0.0)] * 2 +
            [((0.05, 0.14), (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0.0)],
    "selflabel": [((0.14, 1), (0.4, 0.4, 0.2, 0.1), 0.2, 1.0, 0.0),
                  ((0.14, 1), (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2),
                  ((0.05, 0.14), (0.4, 0.4, 0.2, 0.1), 0.2, 0.5, 0.0)],
    "multicrop": [((0.4, 1), (0.4, 0.4, 0.2, 0.1), 0.2, 1.0, 0.0),
                  ((0.4, 1), (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2),
                  ((0.05, 0.4), (0.4, 0.4, 0.2, 0.1), 0.2, 0.5, 0.0)],
}
ROWS = 20_000                    # views drawn to look at a distribution
SURE = 1e-4                      # least p-value; seeds are fixed, so a test passes always or never


def photograph(channels=3):
    """uint8 [C, 427, 640]: a real picture, smooth and sharp."""
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    return image if channels == 3 else image[1:2].contiguous()


def colours():
    """float32 [3, 16, 16] in 0..1: random, with black, white, gray, primaries, and both sides of hue 0."""
    x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    special = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 1),
               (1, 0, 0.01), (1, 0.01, 0)]
    x[:, 0, :8] = torch.tensor(special).T
    return x


def pillow(image):
    """A PIL image of uint8 [C, H, W]."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def levels(picture):
    """The other way: int [C, H, W]."""
    array = np.asarray(picture).astype(int)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def uniforms(rows, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((rows, UNIFORMS), dtype=np.float32))


def draw(view, u, height, width):
    return view.draw_crop(u, height, width) | view.draw_colour(u)


# ---------------------------------------------------------------- operations on fixed parameters
def random_boxes(rng, number, height, width):
    """(top, left, height, width), each [number]: of all sizes and places, and the whole picture."""
    h, w = rng.integers(1, height + 1, number), rng.integers(1, width + 1, number)
    h[:3], w[:3] = (height, 1, height), (width, width, 1)
    return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w


def pillows_resize(crop, size, resample=Image.BICUBIC):
    """crop.resize((size, size), resample), one axis a call: horizontal first, whatever the version.

    Up to Pillow 12 it always is. From 13 on vertical comes first where the height shrinks by more than twice
    what the width does; as levels are clamped in between, some then differ by ten and more.
    """
    return crop.resize((size, crop.height), resample).resize((size, size), resample)


@pytest.mark.parametrize("channels, height, width, size, number", [
    (1, 28, 28, 28, 100), (1, 28, 28, 12, 100), (3, 32, 32, 32, 100), (3, 23, 41, 28, 100),
    (3, 32, 20, 96, 30), (1, 427, 640, 28, 20), (3, 427, 640, 96, 20), (3, 427, 640, 224, 20)])
def test_crop_resize_is_pillows(channels, height, width, size, number):
    rng = np.random.default_rng(size)
    top, left = (0, 0) if height == 427 else (150, 250)                           # the whole, or a busy spot
    picture = photograph(channels)[:, top:top + height, left:left + width]
    boxes, flip = random_boxes(rng, number, height, width), torch.from_numpy(rng.random(number) < 0.5)
    ours = crop_resize(picture.expand(number, -1, -1, -1), *map(torch.from_numpy, boxes), size, flip)
    assert ours.shape == (number, channels, size, size) and ours.min() >= 0 and ours.max() <= 1
    shift = []
    for mine, top, left, h, w, flipped in zip(255 * ours.numpy(), *boxes, flip, strict=True):
        crop = pillow(picture).crop((left, top, left + w, top + h))
        theirs = pillows_resize(crop, size)
        if h <= size:                                                             # in every version
            assert theirs == crop.resize((size, size), Image.BICUBIC)
        theirs = levels(ImageOps.mirror(theirs) if flipped else theirs)
        assert np.abs(mine.round() - theirs).max() <= 1
        shift.append((mine - theirs).mean())
    assert abs(np.mean(shift)) < 0.03                          # half a level everywhere would pass the above


@pytest.mark.parametrize("channels, size", [(1, 28), (3, 96)])
def test_bilinear_crops_are_pillows_in_memory_and_of_files(channels, size):
    rng = np.random.default_rng(size)
    picture = photograph(channels)[:, 150:240, 250:330]
    top, left, h, w = random_boxes(rng, 30, 90, 80)
    flip = torch.zeros(30, dtype=torch.bool)
    ours = crop_resize(picture.expand(30, -1, -1, -1), *map(torch.from_numpy, (top, left, h, w)), size, flip,
                       "bilinear")
    for i in range(30):
        crop = pillow(picture).crop((left[i], top[i], left[i] + w[i], top[i] + h[i]))
        theirs = levels(pillows_resize(crop, size, Image.BILINEAR))
        assert np.abs(255 * ours[i].numpy() - theirs).max() <= 1.01
    view = RandomView(size, (0,), (1,), (0.2, 1), flip=0, interpolation="bilinear")
    u = uniforms(5)
    pictures = photograph(3)[None, :, 150:240, 250:330].repeat(5, 1, 1, 1)
    in_memory = view(pictures, u)
    assert (view.crop(pictures, u) / 255 - in_memory).abs().max() < 1.6 / 255
    assert (RandomView(size, (0,), (1,), (0.2, 1), flip=0)(pictures, u) - in_memory).abs().max() > 5 / 255


def test_evaluated_pictures_are_resized_as_wanted_and_stay_within_their_range(tmp_path):
    """A bicubic kernel overshoots at edges, of black and white for example."""
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat(4, 2).repeat_interleave(2, 1)[None, None]
    in_memory = ImageSet(pixels, torch.zeros(1), ["a"])
    pillow(photograph()).save(tmp_path / "a.png")
    of_files = ImageSet(None, torch.zeros(1), ["a"], np.array([str(tmp_path / "a.png").encode()]))
    for dataset, size in ((in_memory, 9), (of_files, 28)):
        config, found = dict(data=None, image_size=size, mean=[0], std=[1]), {}
        for name in ("bicubic", "bilinear"):
            found[name], = eval_batches(dataset, config | dict(interpolation=name), "cpu")
            assert 0 <= found[name].min() and found[name].max() <= 1
        assert next(eval_batches(dataset, config, "cpu")).equal(found["bicubic"])
        assert (found["bicubic"] - found["bilinear"]).abs().max() > 0.02
    side = round(28 * 256 / 224)
    theirs = Image.fromarray(photograph().permute(1, 2, 0).numpy())
    theirs = theirs.resize((side * theirs.width // theirs.height, side), Image.BILINEAR)
    left, top = round((theirs.width - 28) / 2), (side - 28) // 2
    theirs = levels(theirs.crop((left, top, left + 28, top + 28)))
    assert np.abs(255 * found["bilinear"][0].numpy() - theirs).max() <= 1.01


def test_gray_and_solarize_are_pillows():
    picture = photograph()
    gray = 255 * views_module.gray(picture[None] / 255)[0].numpy()
    assert np.abs(gray - levels(pillow(picture).convert("L"))).max() <= 1
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert views_module.gray(every_level[None]).equal(every_level[None])
    for image in (picture, every_level):
        ours = 255 * solarize(image[None] / 255)[0].numpy()
        np.testing.assert_allclose(ours, levels(ImageOps.solarize(pillow(image), 128)), atol=1e-3)


@pytest.mark.parametrize("name, factors", [
    ("brightness", (0.0, 0.6, 1.0, 1.4, 1.8)), ("contrast", (0.0, 0.2, 1.0, 1.4, 1.8)),
    ("saturation", (0.0, 0.6, 1.0, 1.4)), ("hue", (-0.5, -0.1, -0.02, 0.0, 0.03, 0.1, 0.5))])
def test_jitter_is_torchvisions(name, factors):
    """All factors in one batch; on colours, on a photograph, and where it means something on one channel."""
    ours, theirs = getattr(views_module, f"adjust_{name}"), getattr(TF, f"adjust_{name}")
    pictures = [colours(), photograph()[:, 100:164, 200:264] / 255]
    if name in ("brightness", "contrast"):
        pictures += [x[1:2] for x in pictures]
    for x in pictures:
        batch = ours(x.repeat(len(factors), 1, 1, 1), torch.tensor(factors).view(-1, 1, 1, 1))
        for mine, factor in zip(batch, factors, strict=True):
            torch.testing.assert_close(mine, theirs(x, factor), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [12, 28, 96])
def test_blur_is_a_true_gaussian(size):
    x = photograph()[:, 150:150 + size, 250:250 + size] / 255
    x[:, 0, 0], x[:, -1, -1], x[:, size // 2, size // 2] = 1, 0, 1            # peaks at the edges and within
    sigmas = torch.linspace(0.1, 2, 9)
    ours = gaussian_blur(x.expand(9, -1, -1, -1), sigmas.view(-1, 1, 1, 1))
    for mine, sigma in zip(ours, sigmas.tolist(), strict=True):
        theirs = ndimage.gaussian_filter(x.double().numpy(), (0, sigma, sigma), mode="nearest", truncate=20)
        assert 255 * np.abs(mine.numpy() - theirs).max() < 0.1


# ---------------------------------------------------------------- plans
def test_the_jitters_sequence_contains_every_order():
    """And no prefix of it does; hue, which costs most, is in it twice."""
    def has_all(sequence):
        places = [iter(sequence) for _ in range(24)]
        orders = itertools.permutations(range(4))
        return all(all(i in place for i in order) for place, order in zip(places, orders, strict=True))
    assert has_all(views_module.ALL_ORDERS) and not has_all(views_module.ALL_ORDERS[:-1])
    assert views_module.ALL_ORDERS.count(3) == 2


def test_packed_tensors_come_back():
    tensors = [torch.tensor([True, False, True]), torch.arange(5), torch.rand(2, 3), torch.empty(0),
               torch.rand(4, 2).T, torch.tensor([7], dtype=torch.int32), torch.rand(1).double()]
    flat = views_module.pack(tensors)
    assert flat.dtype == torch.uint8 and flat.numel() == sum(tensor.nbytes for tensor in tensors)
    for found, tensor in zip(views_module.unpack(flat, tensors), tensors, strict=True):
        assert found.dtype == tensor.dtype and found.equal(tensor)
        assert found.untyped_storage().data_ptr() == flat.data_ptr()


def test_views_of_one_size_are_made_together():
    """Two recipes of one size, in one run of operations, give what each gives alone."""
    images = torch.stack([torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8) for _ in range(32)])
    views = build_views("multicrop", (0.5,), (0.25,), 24, 12, 2)
    u = uniforms(4 * 32).view(4, 32, -1)
    made = views(images, u)
    assert len(views.groups) == 3 and len(views.runs) == 2
    for view, first, end in views.groups:
        for v in range(first, end):
            assert made[v].equal(view(images, u[v]))


# ---------------------------------------------------------------- random parameters
def test_recipes_are_the_published_ones():
    for name, published in PUBLISHED.items():
        num_local = 12 if len(published) == 3 else 0
        views = build_views(name, (0.5,), (0.25,), 224, 0, num_local)
        flat = []
        for view, first, end in views.groups:
            flat += [view] * (end - first)
        assert len(VIEWS[name]) == len(published) and len(views) == 2 + num_local
        assert [view.size for view in flat] == [224] * 2 + [96] * num_local
        groups = {"barlow": 2, "moco": 1, "moco-v1": 1, "seed": 2}        # equal ones are made together
        assert len(views.groups) == groups.get(name, 3)
        for v, view in enumerate(flat):
            ours = (view.scale, view.jitter, view.gray, view.blur, view.solarize)
            assert ours == published[min(v, 2)], (name, v)
            first = name == "moco-v1"                  # gray before the jitter, and this always
            assert (view.flip, view.jitter_p, view.gray_first) == (0.5, 1 if first else 0.8, first)
            assert (view.ratio, view.sigma) == ((3 / 4, 4 / 3), (0.1, 2.0))
    with pytest.raises(UserError, match="--num-local 6: .*barlow"):
        build_views("barlow", (0.5,), (0.25,), 224, 96, 6)
    seed = build_views("seed", (0.5,), (0.25,), 224, 96, 6, num_global=1)
    assert [(view.size, view.scale, end - first) for view, first, end in seed.groups] == [
        (224, (0.14, 1), 1), (96, (0.05, 0.14), 6)]


def test_min_scale_changes_the_global_crops_only():
    views = build_views("multicrop", (0.5,), (0.25,), 224, 96, 2, min_scale=0.7)
    assert [view.scale for view, _, _ in views.groups] == [(0.7, 1), (0.7, 1), (0.05, 0.4)]
    assert VIEWS["multicrop"][0]["scale"] == (0.4, 1)
    with pytest.raises(UserError, match="--min-scale 1.5: must be at most 1"):
        build_views("multicrop", (0.5,), (0.25,), 224, min_scale=1.5)


def test_local_scale_changes_the_local_crops_only():
    views = build_views("multicrop", (0.5,), (0.25,), 224, 96, 2, local_scale=[0.1, 0.3])
    assert [view.scale for view, _, _ in views.groups] == [(0.4, 1), (0.4, 1), (0.1, 0.3)]
    for local_scale in ([0, 0.3], [0.3, 0.1], [0.3, 1.1]):
        with pytest.raises(UserError, match="--local-scale: must be two shares"):
            build_views("multicrop", (0.5,), (0.25,), 224, 96, 2, local_scale=local_scale)
    with pytest.raises(UserError, match="--local-scale: there are no local crops"):
        build_views("multicrop", (0.5,), (0.25,), 224, local_scale=[0.1, 0.3])
    with pytest.raises(UserError, match="--local-size: there are no local crops"):
        build_views("multicrop", (0.5,), (0.25,), 224, 96)
    assert build_views("multicrop", (0.5,), (0.25,), 224, num_local=1).groups[-1][0].size == 96


@pytest.mark.parametrize("arch, patch", [("vit_t", 16), ("vit_t8", 8)])
def test_a_crop_holds_a_patch_of_the_network(arch, patch):
    build_views("multicrop", (0.5,), (0.25,), 32, patch, 1, arch=arch)
    with pytest.raises(UserError, match=f"{arch} has patches of {patch}, a crop {patch - 1} pixels"):
        build_views("multicrop", (0.5,), (0.25,), 32, patch - 1, 1, arch=arch)


def test_digits_are_not_mirrored():
    """Whole pictures of one gray value on the left and another on the right."""
    images = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    images[..., 4:] = 200
    for name, most in (("mnist", 0), ("fashion-mnist", 130)):
        kwargs = VIEWS[name][0] | dict(scale=(1, 1), ratio=(1, 1), jitter=(0,) * 4)
        view = RandomView(8, (0.0,), (1.0,), **kwargs)
        out = view(images, uniforms(200, seed=0))
        swapped = (out[..., 0].mean((1, 2)) > out[..., -1].mean((1, 2))).sum()
        assert most - 60 < swapped <= most
    assert (mirrored("mnist"), mirrored("fashion-mnist")) == (0, 0.5)


def test_auto_picks_our_recipe_for_the_embedded_sets_and_else_the_published_one():
    assert pick_views("auto", "fashion-mnist", published="barlow") == "fashion-mnist"
    assert pick_views("auto", "mnist", published="barlow") == "mnist"
    assert pick_views("auto", "cifar10", published="barlow") == "barlow"
    assert pick_views("moco", "fashion-mnist", published="barlow") == "moco"


@pytest.mark.parametrize("name, v", [(name, v) for name in VIEWS for v in range(len(VIEWS[name]))])
def test_draw_has_the_distributions_of_the_recipe(name, v):
    view = RandomView(28, (0.5,), (0.25,), **VIEWS[name][v])
    p = draw(view, uniforms(ROWS, seed=v), 32, 32)
    shares = dict(flip=0 if name == "mnist" else 0.5, jitter=view.jitter_p, gray=view.gray, blur=view.blur,
                  solarize=view.solarize)
    for key, share in shares.items():
        standard_error = (share * (1 - share) / ROWS) ** 0.5                      # 0 for never and always
        assert abs(p[key].double().mean() - share) <= 4 * standard_error, key
    b, c, s, h = view.jitter
    for key, low, high in (("brightness", 1 - b, 1 + b), ("contrast", 1 - c, 1 + c),
                           ("saturation", 1 - s, 1 + s), ("hue", -h, h), ("sigma", 0.1, 2.0)):
        values = p[key].double().numpy()
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6, key
        if high > low:
            assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > SURE, key
    orders, counts = np.unique(p["order"].numpy(), axis=0, return_counts=True)
    assert len(orders) == 24 and stats.chisquare(counts).pvalue > SURE


def test_parameters_are_drawn_independently():
    """Each from numbers of its own: no two are correlated, whatever each looks like alone."""
    view = RandomView(28, (0.5,), (0.25,), (0.2, 1), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.5, blur=0.5,
                      solarize=0.5)
    p = {key: value.double() for key, value in draw(view, uniforms(ROWS), 375, 375).items()}
    assert (p["jitter"] == p["jitter"][:, :1]).all()           # together, unless jitter_each
    columns = [p["jitter"][:, 0]]
    columns += [p[key] for key in ("flip", "gray", "blur", "solarize", "brightness", "contrast",
                                  "saturation", "hue", "sigma")]
    columns += [(p["top"] + 0.5) / (376 - p["height"]), (p["left"] + 0.5) / (376 - p["width"])]
    columns += [p["height"] * p["width"], (p["width"] / p["height"]).log(), *p["order"][:, :3].T]
    correlation = torch.corrcoef(torch.stack(columns)).fill_diagonal_(0)
    correlation[-3:, -3:] = 0                     # places of a permutation exclude each other
    assert correlation.abs().max() < 5 / ROWS ** 0.5


def test_jitter_each_decides_for_every_operation_by_itself():
    view = RandomView(28, (0.5,), (0.25,), (0.2, 1), jitter=(0.8, 0.8, 0, 0), jitter_each=True)
    p = draw(view, uniforms(ROWS), 28, 28)
    chosen = p["jitter"].double()
    assert (chosen.mean(0) - 0.8).abs().max() < 4 * (0.16 / ROWS) ** 0.5
    assert (torch.corrcoef(chosen.T) - torch.eye(4)).abs().max() < 5 / ROWS ** 0.5


def test_lighting_is_normal_along_the_colour_axes():
    """Three independent normal numbers an image, 0.1 times as wide as ImageNet's colours, at any u."""
    view, u = RandomView(28, (0.5,), (0.25,), (0.2, 1), lighting=0.1), uniforms(ROWS)
    axes, widths = np.array(COLOUR_AXES), np.array(COLOUR_WIDTHS)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=5e-4)
    assert axes[:, 0].std() < 0.01                                                # the widest is gray
    noise = view.draw_lighting(u).numpy()
    along = noise @ axes / (0.1 * widths)
    for values in along.T:
        assert stats.kstest(values, stats.norm.cdf).pvalue > SURE
    assert np.abs(np.corrcoef(along.T) - np.eye(3)).max() < 5 / ROWS ** 0.5
    ends = u[:2].clone()
    ends[0], ends[1] = 0, 1 - 2 ** -24                         # of what is drawn
    ends = view.draw_lighting(ends)
    torch.testing.assert_close(ends[0], -ends[1])
    assert 0.05 < ends.abs().max() < 0.2                       # 5.4 standard deviations


def test_lighting_takes_numbers_that_nothing_else_reads():
    view, u = RandomView(28, (0.5,), (0.25,), (0.2, 1), jitter=(0.4,) * 4, lighting=0.1), uniforms(100)
    other = uniforms(100, seed=1)
    other[:, 36:39] = u[:, 36:39]
    assert view.draw_lighting(other).equal(view.draw_lighting(u))
    other = u.clone()
    other[:, 36:39] = 0
    ours, theirs = draw(view, other, 32, 32), draw(view, u, 32, 32)
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_lighting_comes_last_and_on_colours_only():
    """One number for each image and channel is added to pixels in 0..1, and what leaves that range stays."""
    images, u = build_dataset("fake", "test").images[:40], uniforms(40)
    mean, std = (0.45, 0.4, 0.5), (0.5, 0.2, 0.3)
    kwargs = dict(scale=(0.2, 1), jitter=(0.4, 0.4, 0.4, 0), jitter_p=1, gray=0.3, blur=0.5, solarize=0.5)
    dark, lit = (RandomView(24, mean, std, **kwargs, lighting=x) for x in (0, 0.1))
    expected = (lit.draw_lighting(u) / torch.tensor(std))[:, :, None, None].expand(-1, -1, 24, 24)
    torch.testing.assert_close(lit(images, u) - dark(images, u), expected, atol=2e-6, rtol=0)
    pixels = lit(images, u) * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    assert pixels.min() < -0.005 and pixels.max() > 1.005
    gray = images[:, :1]
    dark, lit = (RandomView(24, (0.4,), (0.2,), **kwargs, lighting=x) for x in (0, 0.1))
    assert lit(gray, u).equal(dark(gray, u))


@pytest.mark.parametrize("height, width, scale, fallback", [
    (28, 28, (0.4, 1), False), (375, 500, (0.08, 1), False), (500, 375, (0.05, 0.4), False),
    (30, 300, (0.2, 1), True), (300, 30, (0.2, 1), True)])
def test_crops_are_distributed_as_torchvisions(height, width, scale, fallback):
    """A long picture has no room for most crops: then the largest central one is taken."""
    p = RandomView(28, (0.5,), (0.25,), scale).draw_crop(uniforms(ROWS), height, width)
    ours = torch.stack([p[key].double() for key in ("top", "left", "height", "width")]).numpy()
    torch.manual_seed(0)
    image, ratio = torch.empty(1, height, width), (3 / 4, 4 / 3)
    theirs = np.array([T.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(ROWS // 5)]).T
    for sample in (ours, theirs):
        assert ((sample[2:].max(0) == 40).mean() > 0.5) == fallback               # 30 × 4 / 3

    def looks(top, left, h, w):
        y, x = (top + 0.5) / (height - h + 1), (left + 0.5) / (width - w + 1)     # shares of the room
        return dict(area=h * w, ratio=np.log(w / h), top=top, left=left, sum=y + x, difference=y - x)

    for name, values in looks(*ours).items():
        assert stats.ks_2samp(values, looks(*theirs)[name]).pvalue > SURE, name


@pytest.mark.parametrize("height, width", [(28, 28), (375, 500), (1, 1), (1, 300), (300, 2), (257, 256)])
def test_crops_never_leave_the_picture(height, width):
    u = uniforms(2000)
    u[0], u[1] = 0, 1 - 2 ** -24                                                  # the ends of what is drawn
    for scale in ((0.05, 0.4), (0.4, 1)):
        p = RandomView(28, (0.5,), (0.25,), scale).draw_crop(u, height, width)
        for start, length, room in ((p["top"], p["height"], height), (p["left"], p["width"], width)):
            assert start.min() >= 0 and length.min() >= 1 and (start + length).max() <= room
            assert start.equal(start.round()) and length.equal(length.round())


# ---------------------------------------------------------------- whole views
def one_by_one(view, images, u):
    """What `view` ought to do, image by image with torchvision's functions, from the parameters it draws."""
    p, results = draw(view, u, *images.shape[-2:]), []
    for i, image in enumerate(images):
        box = (p[key][i:i + 1] for key in ("top", "left", "height", "width"))
        x = crop_resize(image[None], *box, view.size, p["flip"][i:i + 1])
        if p["gray"][i] and view.gray_first:
            x = TF.rgb_to_grayscale(x, 3)
        for k in p["order"][i].tolist():
            name = ("brightness", "contrast", "saturation", "hue")[k]
            if p["jitter"][i, k] and (len(image) == 3 or k < 2):
                x = getattr(TF, f"adjust_{name}")(x, p[name][i].item())
        if p["gray"][i] and len(image) == 3 and not view.gray_first:
            x = TF.rgb_to_grayscale(x, 3)
        if p["blur"][i]:
            x = gaussian_blur(x, p["sigma"][i].view(1, 1, 1, 1))
        if p["solarize"][i]:
            x = TF.solarize(x, 0.5)                            # both sides meet at one half: no jump there
        channels = len(x[0])
        x = TF.normalize(x, view.mean[:channels], view.std[:channels])
        results.append(x.expand(-1, 3, -1, -1))
    return torch.cat(results)


@pytest.mark.parametrize("channels, recipe, more", [
    (3, "barlow", {}), (3, "moco", {}), (3, "moco-v1", {}), (3, "multicrop", {}), (1, "fashion-mnist", {}),
    (1, "barlow", {}), (3, "moco", dict(jitter=(0.4, 0, 0.4, 0.1)))])
def test_views_do_what_they_drew_in_the_published_order(channels, recipe, more):
    """With the rare operations made likely, so that each meets each."""
    images = build_dataset("fake", "train").images[:40, :channels]
    for v, kwargs in enumerate(VIEWS[recipe]):
        kwargs = {**kwargs, "gray": 0.4, "blur": 0.5, "solarize": 0.5, **more}
        mean, std = (0.45, 0.4, 0.5)[:channels], (0.5, 0.2, 0.3)[:channels]
        view, u = RandomView(24, mean, std, **kwargs), uniforms(40, seed=v)
        torch.testing.assert_close(view(images, u), one_by_one(view, images, u), atol=2e-5, rtol=0)


@pytest.mark.parametrize("data_set, recipe", [("fashion-mnist", "fashion-mnist"), ("fake", "multicrop")])
def test_a_view_is_a_pure_function_and_the_batch_does_not_matter(data_set, recipe):
    images = build_dataset(data_set, "test").images[:32]
    before, state = images.clone(), torch.get_rng_state()
    for v, kwargs in enumerate(VIEWS[recipe]):
        view, u = RandomView(28, (0.0,), (1.0,), **kwargs), uniforms(32, seed=v)
        u_before, batch = u.clone(), view(images, u)
        assert batch.shape == (32, 3, 28, 28) and batch.dtype == torch.float32
        assert view(images, u).equal(batch)
        alone = torch.cat([view(images[i:i + 1], u[i:i + 1]) for i in range(32)])
        torch.testing.assert_close(batch, alone, atol=1e-6, rtol=0)
        assert images.equal(before) and u.equal(u_before) and torch.get_rng_state().equal(state)
