"""Views (augmentations) of whole batches, by tensor operations.

All randomness of a view is a row of uniform numbers. `Batches` (data.py) draws them on the CPU, from (seed,
step), for the whole global batch. Everything after that is a pure function. So a run sees the same views for
any number of processes and workers, and wherever it was stopped.
"""

from functools import cache, partial
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import UserError
from model import patch_size

# Uniform numbers of one view of one image, by column:
#   0-9 area, 10-19 width / height of ten tries for a crop; 20 top, 21 left; 22 flip
#   23 jitter or not; 24-27 brightness, contrast, saturation, hue; 28-31 their order
#   32 gray, 33 blur, 34 its sigma, 35 solarise; 36-39 each jitter operation or not, or 36-38 lighting
UNIFORMS = 40
# Principal components of ImageNet's colours (RGB in 0..1), a column each, and their standard deviations: for
# AlexNet's noise. The numbers are those of fb.resnet.torch.
COLOUR_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
COLOUR_WIDTHS = (0.2175, 0.0188, 0.0045)
DEVICE_SIDE = 640                # pixels; of larger pictures workers cut the crops, whatever --crop-on says
BOX = ("top", "left", "height", "width", "flip")         # of a crop, in the order that resize takes them
JITTER = (0.4, 0.4, 0.2, 0.1)    # brightness, contrast, saturation, hue
# The jitter's operations, by number: crossing out some leaves any of their 24 orders. An image takes part in
# the four places of its own order. No shorter sequence does; hue, which costs most, is in it only twice.
ALL_ORDERS = (0, 1, 2, 3, 0, 1, 2, 0, 3, 1, 0, 2)
VIEWS = {                        # published recipes: first global crop, second, and local crops if it has any
    "barlow": (dict(scale=(0.08, 1), jitter=JITTER, gray=0.2, blur=1.0),
               dict(scale=(0.08, 1), jitter=JITTER, gray=0.2, blur=0.1, solarize=0.2)),
    "moco": (dict(scale=(0.2, 1), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5),) * 2,
    "moco-v1": (dict(scale=(0.2, 1), jitter=(0.4,) * 4, jitter_p=1, gray=0.2, gray_first=True),) * 2,
    "multicrop": (dict(scale=(0.4, 1), jitter=JITTER, gray=0.2, blur=1.0),
                  dict(scale=(0.4, 1), jitter=JITTER, gray=0.2, blur=0.1, solarize=0.2),
                  dict(scale=(0.05, 0.4), jitter=JITTER, gray=0.2, blur=0.5)),
    "selflabel": (dict(scale=(0.14, 1), jitter=JITTER, gray=0.2, blur=1.0),
                  dict(scale=(0.14, 1), jitter=JITTER, gray=0.2, blur=0.1, solarize=0.2),
                  dict(scale=(0.05, 0.14), jitter=JITTER, gray=0.2, blur=0.5)),
    "seed": (dict(scale=(0.14, 1), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5),) * 2 + (
        dict(scale=(0.05, 0.14), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5),),
    # Not published: for gray images of 28 × 28, strong light instead of colours and no blur. The crops are
    # large, because in a small one a shirt passes for a bag.
    "fashion-mnist": (dict(scale=(0.55, 1), jitter=(0.8, 0.4, 0, 0), jitter_each=True),) * 2 + (
        dict(scale=(0.1, 0.4), jitter=(0.8, 0.4, 0, 0), jitter_each=True),),
}
VIEWS["mnist"] = tuple(view | dict(flip=0) for view in VIEWS["fashion-mnist"])    # a mirrored digit is none
# For features: neighbours are better, classes less certain. It was `fashion-mnist` until version 0.7.0.
VIEWS["contrast"] = tuple(view | dict(jitter=(0.8, 0.8, 0, 0)) for view in VIEWS["fashion-mnist"])


def build_views(name, mean, std, size, local_size=0, num_local=0, num_global=2, min_scale=0,
                local_scale=None, arch=""):
    """The V = num_global + num_local views of a recipe in VIEWS, as a `Views`.

    size, local_size: pixels of the crops; 0: a local one has 3/7 of a global one's. min_scale: smallest share
    of the area in a global crop; 0: that of the recipe. local_scale: smallest and largest share in a local
    crop; None: those of the recipe. arch: the network that they are for. Raises UserError for shares outside
    0..1, if there are no local crops to which a setting belongs, or if a crop is too small for the network.
    """
    if num_local == 0 and (local_size or local_scale):
        raise UserError(f"--local-{'size' if local_size else 'scale'}: there are no local crops; --num-local "
                        "makes some")
    recipe, local_size = VIEWS[name], local_size or max(1, size * 3 // 7)
    smallest = min(size, local_size) if num_local > 0 else size
    if smallest < patch_size(arch):
        raise UserError(f"--image-size, --local-size: {arch} has patches of {patch_size(arch)}, a crop "
                        f"{smallest} pixels; use larger crops")
    if num_local > 0 and len(recipe) < 3:
        raise UserError(f"--num-local {num_local}: --views {name} has no local crops; --views multicrop has")
    if min_scale > 1:
        raise UserError(f"--min-scale {min_scale}: must be at most 1, the whole picture")
    if local_scale and not 0 < local_scale[0] <= local_scale[1] <= 1:
        raise UserError("--local-scale: must be two shares of the area, ascending, above 0 and at most 1")
    changed = {"scale": (min_scale, 1)} if min_scale else {}
    changed_local = {"scale": tuple(local_scale)} if local_scale else {}
    views = [(size, recipe[v] | changed) for v in range(num_global)]
    views += [(local_size, recipe[-1] | changed_local)] * num_local
    return Views(views, mean, std)


def mirrored(data):
    """Share of the images of a data set that a random crop mirrors: none of digits."""
    return 0.0 if data == "mnist" else 0.5


def pick_views(name, data, published):
    """The recipe for --views `name`; auto: our own for embedded sets, else the stage's `published` one."""
    if name != "auto":
        return name
    return data if data in ("fashion-mnist", "mnist") else published


class Views(nn.Module):
    """V views. Neighbours of equal size and recipe are made in one call, which is faster."""

    def __init__(self, sizes_and_recipes, mean, std):
        super().__init__()
        self.groups = []         # (view, first, end): views first to end - 1 of the V
        for (size, recipe), equal in groupby(sizes_and_recipes):
            first = len(self)
            end = first + len(list(equal))
            self.groups.append((RandomView(size, mean, std, **recipe), first, end))
        # neighbours of one size make a run: each operation acts on all of its views at once
        self.runs = [list(run) for _, run in groupby(self.groups, _size_and_interpolation)]

    def __len__(self):
        return self.groups[-1][2] if self.groups else 0

    def crop(self, pictures, uniforms):
        """What a worker does: B pictures uint8 [3, H, W], of any sizes -> V crops uint8 [B, 3, h, w]."""
        crops = []
        for view, first, end in self.groups:
            crops += [view.crop(pictures, u) for u in uniforms[first:end]]
        return crops

    @property
    def crop_bytes(self):
        """Bytes of the crops of an image."""
        return sum(3 * view.size ** 2 * (end - first) for view, first, end in self.groups)

    def pad(self, pictures, uniforms):
        """What a worker does with --crop-on device: a dict of B pictures uint8 [3, H, W], of any sizes.

        pictures: uint8 [n, 3, H, W], each in the upper left corner, those that are not above DEVICE_SIDE;
        sizes [n, 2]: theirs; crops: V × uint8 [B - n, 3, h, w] of the others; order [B]: which images these
        are, one after the other; place [B]: where image i is among them.
        """
        is_large = torch.tensor([max(picture.shape) > DEVICE_SIDE for picture in pictures])
        order = is_large.int().argsort(stable=True)
        whole, large = order[~is_large[order]].tolist(), order[is_large[order]]
        sizes = torch.tensor([pictures[i].shape[1:] for i in whole]).view(-1, 2)
        H, W = sizes.max(0).values.tolist() if whole else (1, 1)
        padded = torch.zeros(len(whole), H, W, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for room, i in zip(padded, whole, strict=True):
            room[:, :pictures[i].shape[1], :pictures[i].shape[2]] = pictures[i]
        crops = self.crop([pictures[i] for i in large.tolist()], uniforms[:, large])
        return dict(pictures=padded, sizes=sizes, crops=crops, order=order, place=order.argsort())

    def crop_padded(self, packed, uniforms, device):
        """The dict of `pad` -> V crops [B, 3, h, w] in 0..1 on `device`. One view at a time bounds memory."""
        on_cuda = device.type == "cuda"          # on MPS a copy that is not waited for may read freed memory
        pictures, place = (packed[name].to(device, non_blocking=on_cuda) for name in ("pictures", "place"))
        whole, plans, crops = packed["order"][:len(pictures)], [], []
        for view, first, end in self.groups:
            for u in uniforms[first:end, whole]:
                box = view.draw_crop(u, *packed["sizes"].T)
                plans.append([(view.resize, [box[name] for name in BOX])])
        for [(resize, drawn)], large in zip(send(plans, device), packed["crops"], strict=True):
            large = large.to(device, non_blocking=on_cuda).float() / 255
            both = torch.cat([resize(pictures, *drawn), large])
            crops.append(both.index_select(0, place))
        return crops

    def forward(self, images, uniforms, device=None):
        """Images or crops, and uniforms, as `Batches` gives them -> V inputs [B, 3, h, w] on `device`."""
        device = torch.device(device or "cpu")
        if isinstance(images, dict):
            images = self.crop_padded(images, uniforms, device)
        is_cut, B = isinstance(images, list), uniforms.shape[1]
        on_cuda = device.type == "cuda"
        images = images if is_cut else images.to(device, non_blocking=on_cuda)
        plans = []
        for run in self.runs:
            start, parts = run[0][1], []
            channels, *frame = images[start].shape[1:] if is_cut else images.shape[1:]
            for view, first, end in run:
                u = uniforms[first:end].flatten(0, 1)                             # [views · B, UNIFORMS]
                parts.append(view.plan(u, channels, None if is_cut else frame, (first - start) * B))
            plans.append(join(parts))

        inputs = []
        for run, plan in zip(self.runs, send(plans, device), strict=True):
            start, end = run[0][1], run[-1][2]
            if is_cut:
                x = torch.cat([crop.to(device, non_blocking=on_cuda) for crop in images[start:end]])
                x = x if x.is_floating_point() else x.float() / 255
            else:
                x = images.repeat(end - start, 1, 1, 1)
            inputs += run[0][0].make(x, plan).chunk(end - start)
        return [x.contiguous(memory_format=torch.channels_last) for x in inputs]


def _size_and_interpolation(group):
    return group[0].size, group[0].interpolation


# ---------------------------------------------------------------- plans
# A plan is what happens to images, in order: a list of (change, tensors), each x = change(x, *tensors). It is
# drawn on the CPU, so that no step waits for the device to say which images an operation is for.
def join(parts):
    """Dicts {place: (change, tensors)} of consecutive images -> one plan of all, by place."""
    joined = {}
    for part in parts:
        for place, (change, tensors) in part.items():
            if place in joined:
                tensors = [torch.cat(pair) for pair in zip(joined[place][1], tensors, strict=True)]
            joined[place] = change, tensors
    return [joined[place] for place in sorted(joined)]


def send(plans, device):
    """The same plans with their tensors on `device`, by one copy that nobody waits for."""
    if device.type == "cpu":
        return plans
    tensors = []
    for plan in plans:
        for _, of_change in plan:
            tensors += of_change
    if not tensors:                      # views that only crop and mirror, of files, which workers have cut
        return plans
    flat = pack(tensors)
    on_cuda = device.type == "cuda"
    flat = flat.pin_memory() if on_cuda else flat
    sent = iter(unpack(flat.to(device, non_blocking=on_cuda), tensors))
    on_device = []
    for plan in plans:
        on_device.append([])
        for change, of_change in plan:
            on_device[-1].append((change, [next(sent) for _ in of_change]))
    return on_device


def pack(tensors):
    """The bytes of tensors, one after the other, the widest numbers first: so each begins where it may."""
    by_width = sorted(tensors, key=lambda tensor: -tensor.element_size())
    return torch.cat([tensor.flatten().view(torch.uint8) for tensor in by_width])


def unpack(flat, tensors):
    """The tensors that `pack` made `flat` of, as views of it."""
    found = [None] * len(tensors)
    places = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    parts = flat.split([tensors[i].nbytes for i in places])
    for i, part in zip(places, parts, strict=True):
        found[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return found


class RandomView(nn.Module):
    """Random resized crop, flip, colour jitter, gray, blur, solarise, normalise; drawn per image.

    The distributions are those of torchvision's RandomResizedCrop and ColorJitter.

    size: pixels of the square output. scale: share of the area; ratio: width / height of the crop.
    interpolation: bicubic or bilinear, of the resizing.
    jitter: strengths of brightness, contrast, saturation, hue. All four happen together, with probability
    jitter_p; with jitter_each, each is drawn by itself. gray_first: gray before the jitter, not after it.
    flip, gray, blur, solarize: probabilities. sigma: range of the Gaussian blur, in pixels.
    lighting: standard deviation of noise along COLOUR_AXES, in COLOUR_WIDTHS; on RGB only. Not together with
    jitter_each, which reads the same uniform numbers.
    """

    def __init__(self, size, mean, std, scale, ratio=(3 / 4, 4 / 3), flip=0.5, jitter=(0, 0, 0, 0),
                 jitter_p=0.8, jitter_each=False, gray=0.0, blur=0.0, sigma=(0.1, 2.0), solarize=0.0,
                 lighting=0.0, gray_first=False, interpolation="bicubic"):
        super().__init__()
        self.size, self.mean, self.std, self.scale, self.ratio = size, mean, std, scale, ratio
        self.flip, self.jitter, self.jitter_p, self.jitter_each = flip, jitter, jitter_p, jitter_each
        self.gray, self.blur, self.sigma, self.solarize = gray, blur, sigma, solarize
        self.lighting, self.gray_first, self.interpolation = lighting, gray_first, interpolation

    def draw_crop(self, u, height, width):
        """Box of the crop and whether to mirror it, a dict of [B] with the names of BOX.

        u: uniform numbers [B, UNIFORMS] on the CPU. height, width: of the images, a number or [B].
        """
        height, width = torch.as_tensor(height).expand(len(u)), torch.as_tensor(width).expand(len(u))
        smallest, largest = self.scale
        area = (height * width)[:, None] * (smallest + u[:, 0:10] * (largest - smallest))
        low, high = np.log(self.ratio)
        ratio = torch.exp(low + u[:, 10:20] * (high - low))
        w, h = torch.round(torch.sqrt(area * ratio)), torch.round(torch.sqrt(area / ratio))     # ten tries
        fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
        found, first = fits.any(1), fits.int().argmax(1, keepdim=True)            # [B], [B, 1]
        # if none fits, torchvision takes the largest central crop whose ratio is allowed
        central_w = torch.minimum(width, torch.round(height * self.ratio[1]))
        central_h = torch.minimum(height, torch.round(width / self.ratio[0]))
        w = torch.where(found, w.gather(1, first)[:, 0], central_w)
        h = torch.where(found, h.gather(1, first)[:, 0], central_h)
        top = torch.floor(torch.where(found, u[:, 20] * (height - h + 1), (height - h) / 2))
        left = torch.floor(torch.where(found, u[:, 21] * (width - w + 1), (width - w) / 2))
        return dict(top=top, left=left, height=h, width=w, flip=u[:, 22] < self.flip)

    def draw_colour(self, u):
        """What happens after the crop, a dict of [B]; jitter (happens or not) and order are [B, 4].

        order: the four operations of the jitter, as they follow one another. u: [B, UNIFORMS] on the CPU.
        """
        strength, hue = torch.tensor(self.jitter[:3]), self.jitter[3]
        low = (1 - strength).clamp_min(0)
        factors = low + u[:, 24:27] * (1 + strength - low)                        # U(max(0, 1 - s), 1 + s)
        chance = u[:, 36:40] if self.jitter_each else u[:, 23:24].expand(-1, 4)
        least, most = self.sigma
        return dict(jitter=chance < self.jitter_p, order=u[:, 28:32].argsort(1), brightness=factors[:, 0],
                    contrast=factors[:, 1], saturation=factors[:, 2], hue=hue * (2 * u[:, 27] - 1),
                    gray=u[:, 32] < self.gray, blur=u[:, 33] < self.blur,
                    sigma=least + u[:, 34] * (most - least), solarize=u[:, 35] < self.solarize)

    def draw_lighting(self, u):
        """Uniform numbers [B, UNIFORMS] on the CPU -> what is added to red, green and blue, [B, 3]."""
        # u is a multiple of 2^-24 from 0 to 1 - 2^-24; half a step more keeps the normal number finite
        normal = torch.special.ndtri(u[:, 36:39].double() + 2 ** -25).float()
        return self.lighting * normal * torch.tensor(COLOUR_WIDTHS) @ torch.tensor(COLOUR_AXES).T

    def crop(self, pictures, u):
        """B pictures uint8 [3, H, W] on the CPU, each of its own size -> uint8 [B, 3, size, size].

        torch's kernel for bytes rounds between the axes, as Pillow does.
        """
        heights, widths = torch.tensor([picture.shape[1:] for picture in pictures]).view(-1, 2).T
        drawn = self.draw_crop(u, heights, widths)
        boxes = torch.stack([drawn[name] for name in BOX], 1).int().tolist()
        crops = torch.empty(len(pictures), 3, self.size, self.size, dtype=torch.uint8)
        for crop, picture, (top, left, h, w, flip) in zip(crops, pictures, boxes, strict=True):
            part = picture[None, :, top:top + h, left:left + w]
            made = F.interpolate(part, crop.shape[1:], mode=self.interpolation, antialias=True)[0]
            crop.copy_(made.flip(-1) if flip else made)
        return crops

    def plan(self, u, channels, frame=None, first=0):
        """What happens to B images: a dict {place: (change, tensors on the CPU)}, to `join`.

        u: uniform numbers [B, UNIFORMS] on the CPU. channels: 1 or 3. frame: (height, width) of the images,
        which are cropped; None: they are crops. first: the index of the first image in the joined batch.
        place: 0 the crop, 1 gray with gray_first, 2 to 13 the jitter (ALL_ORDERS); then gray, blur, solarise,
        lighting.
        """
        plan, drawn, is_colour = {}, self.draw_colour(u), channels == 3

        def add(place, op, chosen, *params):
            index = chosen.nonzero()[:, 0]
            if len(index):
                params = [param[index].view(len(index), -1, 1, 1) for param in params]
                plan[place] = partial(_change, op), [index + first, *params]

        if frame is not None:
            box = self.draw_crop(u, *frame)
            plan[0] = self.resize, [box[name] for name in BOX]
        names = ("brightness", "contrast", "saturation", "hue")
        ops = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        possible = range(4 if is_colour else 2)            # saturation and hue change nothing in a gray image
        used = torch.tensor([i for i in possible if self.jitter[i] > 0], dtype=torch.long)
        order = drawn["order"][torch.isin(drawn["order"], used)].view(len(u), len(used))
        next_ones = F.pad(order, (0, 1), value=-1)         # -1: an image has had all of its operations
        done = torch.zeros(len(u), 1, dtype=torch.long)
        for place, i in enumerate(ALL_ORDERS, 2):
            if i in used:
                due = next_ones.gather(1, done)[:, 0] == i
                add(place, ops[i], due & drawn["jitter"][:, i], drawn[names[i]])
                done[due] += 1
        after_jitter = 2 + len(ALL_ORDERS)
        if is_colour:
            add(1 if self.gray_first else after_jitter, to_gray, drawn["gray"])
        add(after_jitter + 1, gaussian_blur, drawn["blur"], drawn["sigma"])
        add(after_jitter + 2, solarize, drawn["solarize"])
        if is_colour and self.lighting > 0:            # may leave 0..1; the published code does not clamp it
            add(after_jitter + 3, torch.add, torch.ones(len(u), dtype=torch.bool), self.draw_lighting(u))
        return plan

    def resize(self, images, top, left, height, width, flip):
        """crop_resize to this view's size; the arguments are those of BOX."""
        return crop_resize(images, top, left, height, width, self.size, flip, self.interpolation)

    def make(self, x, plan):
        """Images uint8, or crops [B, C, h, w] in 0..1, which are overwritten, by a plan -> [B, 3, h, w]."""
        for change, tensors in plan:
            x = change(x, *tensors)
        return normalize(x, self.mean, self.std)

    def forward(self, images, u):
        """images uint8 [B, C, H, W] on any device, u [B, UNIFORMS] on the CPU -> [B, 3, size, size]."""
        plans = send([join([self.plan(u, images.shape[1], images.shape[2:])])], images.device)
        return self.make(images, plans[0])


def _change(op, x, index, *params):
    """x with the images of `index` replaced by op(those, *params); overwrites x."""
    if len(index) == len(x):             # all of them, in their order
        return op(x, *params).contiguous()
    x[index] = op(x[index], *params)
    return x


# ---------------------------------------------------------------- operations on batches
def crop_resize(images, top, left, height, width, size, flip, interpolation="bicubic"):
    """Crops of uint8 images [B, C, H, W], resized to [B, C, size, size] in 0..1; some mirrored.

    top, left, height, width: whole numbers, [B]. flip: bool [B]. It resizes as Pillow does up to version 12:
    antialiased, horizontal before vertical, clamped between. Pillow 13 starts with vertical for some shapes.
    A crop is two matrix products; the horizontal matrix turned upside down mirrors it.
    """
    H, W = images.shape[-2:]
    top, left, height, width, flip = (t.to(images.device) for t in (top, left, height, width, flip))
    horizontal = _resize_matrix(left, width, W, size, flip, interpolation)        # [B, size, W]
    vertical = _resize_matrix(top, height, H, size, torch.zeros_like(flip), interpolation)    # [B, size, H]
    x = torch.matmul(images.float(), horizontal[:, None].mT).clamp_(0, 255)
    return torch.matmul(vertical[:, None], x).clamp_(0, 255).div_(255)


def _resize_matrix(start, length, in_size, out_size, flip, interpolation):
    """Weights [B, out_size, in_size] that resample `length` pixels from `start` on, mirrored if flip."""
    start, length = start[:, None], length[:, None]
    scale = length / out_size
    pixel = torch.arange(in_size, device=start.device) + 0.5                      # centres, [in_size]
    inside = (pixel > start) & (pixel < start + length)                           # [B, in_size]
    source = torch.where(inside, pixel - start, torch.inf)                        # infinitely far: weight 0
    target = torch.arange(out_size, device=start.device) + 0.5                    # [out_size]
    target = torch.where(flip[:, None], out_size - target, target) * scale        # [B, out_size]
    reach = scale.clamp_min(1)                   # antialiasing: the kernel is wider where the image shrinks
    x = ((source / reach)[:, None] - (target / reach)[:, :, None]).abs_()         # [B, out_size, in_size]
    near, far = (1 - x).clamp_(min=0), (2 - x).clamp_(min=0)
    weights = near
    if interpolation == "bicubic":
        # cubic convolution, a = -0.5, as a sum of two pieces that end at distances 1 and 2: no torch.where
        weights = near * near * (1 - 2 * near) + far * far * (far - 1) / 2
    return weights.div_(weights.sum(-1, keepdim=True))


def gray(x):
    """Luma (ITU-R 601) [B, 1, H, W] of [B, 3, H, W]; a single channel is returned as it is."""
    if x.shape[1] == 1:
        return x
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def to_gray(x):
    return gray(x).expand_as(x)


def adjust_brightness(x, factor):
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Blends with the mean gray of the image."""
    mean = gray(x).mean((1, 2, 3), keepdim=True)
    return (mean + (x - mean) * factor).clamp_(0, 1)


def adjust_saturation(x, factor):
    """Blends with the gray image."""
    luma = gray(x)
    return (luma + (x - luma) * factor).clamp_(0, 1)


def adjust_hue(x, shift):
    """Turns the hue by `shift` [B, 1, 1, 1], a share of the full circle, in HSV."""
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    safe = chroma.clamp_min(1e-9)                     # a gray pixel has chroma 0, and then any hue will do
    hue = torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)
    hue = torch.where(value == r, (g - b) / safe, hue)
    hue += 6 * shift[:, 0]                            # in sixths of the circle
    k = hue[:, None] + _constant((5.0, 3.0, 1.0), x.device)            # of red, green, blue
    k -= (k / 6).floor_().mul_(6)                     # modulo 6; torch.remainder is several times slower
    share = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)               # min(k, 4 - k) is 2 - |k - 2|
    # value - chroma · max(0, min(k, 4 - k, 1))
    return torch.addcmul(value[:, None], share, chroma[:, None], value=-1)


def gaussian_blur(x, sigma):
    """Exact Gaussian blur, sigma [B, 1, 1, 1] of at most 2 pixels: cut off at 8 pixels, edges repeated."""
    size, reach = x.shape[-1], 8
    taps = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (taps / sigma.view(-1, 1)) ** 2)                   # [B, 17]
    weights = weights / weights.sum(1, keepdim=True)
    pixels = torch.arange(size, device=x.device)
    source = (pixels[:, None] + taps).clamp(0, size - 1)                          # [size, 17]
    # row i of an image's matrix adds the weight of each tap to the pixel that it reads
    matrix = torch.einsum("bk,ikj->bij", weights, F.one_hot(source, size).to(x))[:, None]
    return matrix @ x @ matrix.mT


def solarize(x):
    """Inverts values of at least 128 / 255, as Pillow does."""
    return torch.where(x > 127.5 / 255, 1 - x, x)


def normalize(images, mean, std):
    """Pixels 0..1 [B, C, H, W] -> the network's input [B, 3, H, W]. mean, std: one number or three.

    A gray image is repeated in three channels.
    """
    mean, std = (_constant(tuple(values), images.device) for values in (mean, std))
    return ((images - mean) / std).expand(-1, 3, -1, -1)


@cache
@torch.inference_mode(False)
def _constant(values, device):
    """Numbers of the channels on a device, [1, C, 1, 1]; kept, because a copy there waits for the device."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)
