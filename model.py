"""Backbones, the projection head with NBS (batch norm before the softmax), and the multi-crop forward.

The state dict of `Twist` has the names and shapes of the released network (arXiv 2110.07402).
"""

import re
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import StochasticDepth

from loss import all_gather, raise_precision

ARCHS = ("resnet8", "resnet8_2x2", "resnet8w2_2x2", "resnet18", "resnet34", "resnet50", "resnet101",
         "resnet152", "resnet50w2", "resnet50w4", "resnet50w5", "vit_t", "vit_s", "vit_b", "vit_t8", "vit_s8",
         "vit_b8", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_b1")


# ---------------------------------------------------------------- batch norm over processes and bunches
class _Normalize(torch.autograd.Function):
    """y = weight * (x - mean) / sqrt(var + eps) + bias; mean and var over images, pixels and processes.

    x: [N, C, ...]. weight, bias: [C] or None. group: the processes that share the statistics, or None. They
    may hold different numbers of rows, none included. The gradient is exact: it goes through mean and var,
    across processes as well. Those of weight and bias are this process's.
    Returns (y, statistics [2, C]): mean and unbiased variance.

    Each pass over x is one fused kernel: on CUDA one of nn.SyncBatchNorm's, which read half precision, on a
    CPU one for given statistics. nn.SyncBatchNorm itself waits for the device in each layer, to leave
    empty processes out.
    """
    # `spread` is 1 / sqrt(var + eps) where the kernels are CUDA's, and var elsewhere.

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        fused, count = has_kernels(x), x.numel() // x.shape[1]
        x = _dense(x)
        z = x if fused and count else raise_precision(x)
        if count == 0:                   # the others wait for this process's statistics, whatever they are
            mean, spread = z.new_zeros(x.shape[1]), z.new_ones(x.shape[1])
        elif fused:
            mean, spread = torch.batch_norm_stats(z, eps)
        elif x.device.type == "cpu":     # 20 times as fast as var_mean, which MPS needs
            mean, spread = torch.batch_norm_update_stats(z, None, None, 0.0)
        else:
            spread, mean = torch.var_mean(z, [0, *range(2, z.dim())], correction=0)

        # The count goes with the statistics: no process needs to know it, so none waits for the device. No
        # rows count as 1e-20 of a row, which is lost beside those of others and spares a division by 0.
        mine = torch.cat([mean, spread, mean.new_full((1,), count or 1e-20)])
        everyone = mine[None] if group is None else all_gather(mine, group)
        means, spreads, counts = everyone.split([len(mean), len(mean), 1], 1)                # [W, ...]

        if fused:
            statistics = mean.new_zeros(2, len(mean))
            mean, spread = torch.batch_norm_gather_stats_with_counts(
                x, means, spreads, *statistics, 1.0, eps, counts.flatten())     # 1.0: replaces the zeros
            y = torch.batch_norm_elemt(z, weight, bias, mean, spread, eps) if count else torch.empty_like(x)
        else:
            share, total = counts / counts.sum(), counts.sum()
            mean = (share * means).sum(0)
            spread = (share * (spreads + (means - mean) ** 2)).sum(0)     # E[x²] - E[x]² would cancel digits
            statistics = torch.stack([mean, spread * total / (total - 1)])
            y = _with_statistics(z, weight, bias, mean, spread, eps).to(x.dtype) if count else x.clone()
        ctx.save_for_backward(x, weight, mean, spread, counts)
        ctx.fused, ctx.eps, ctx.group = fused, eps, group
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    def backward(ctx, dy, _statistics):
        x, weight, mean, spread, counts = ctx.saved_tensors
        affine, has_rows, dy = weight is not None, x.numel() > 0, _dense(dy)
        if not has_rows:
            sums = mean.new_zeros(2, len(mean))
            d_bias, d_weight = sums.clone()
        elif ctx.fused:                  # sums of dy and of dy * (x - mean)
            *sums, d_weight, d_bias = torch.batch_norm_backward_reduce(dy, x, mean, spread, weight, True,
                                                                       affine, affine)
            sums = torch.stack(sums)
        else:                            # as if the statistics were constant; sums of dy and of dy * y
            z, scale = raise_precision(x), torch.ones_like(mean) if weight is None else weight
            dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                raise_precision(dy), z, scale, mean, spread, None, None, False, ctx.eps, [True] * 3)
            sums = torch.stack([d_bias, d_weight])
        if ctx.group is not None:        # the loss of every process depends on this process's statistics
            dist.all_reduce(sums, group=ctx.group)
        if not has_rows:
            dx = dy
        elif ctx.fused:
            dx = torch.batch_norm_backward_elemt(dy, x, mean, spread, weight, *sums, counts.flatten().int())
        else:
            of_bias, of_weight = -scale * (spread + ctx.eps).rsqrt() * sums / counts.sum()
            dx = dx.add_(_with_statistics(z, of_weight, of_bias, mean, spread, ctx.eps)).to(x.dtype)
        return dx, *((d_weight, d_bias) if affine else (None, None)), None, None


def has_kernels(x):
    """Whether torch's kernels for a batch norm over processes work on x."""
    return x.is_cuda


def _with_statistics(x, weight, bias, mean, var, eps):
    """weight * (x - mean) / sqrt(var + eps) + bias, in one pass over x."""
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


def _dense(x):
    """x as these kernels need it: without gaps, channels last or first."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def bunch_layout(bunch_size, images, world_size):
    """(bunches in a process, processes in a bunch) for processes with `images` each; one of the two is 1.

    bunch_size: images that are normalised together; None: the global batch. Raises ValueError unless it
    divides a process's images, or is a multiple of them that divides the global batch.
    """
    if bunch_size is None:
        return 1, world_size
    if images and bunch_size > 1 and images % bunch_size == 0:
        return images // bunch_size, 1
    if images and bunch_size > 1 and bunch_size % images == 0 and world_size % (bunch_size // images) == 0:
        return 1, bunch_size // images
    raise ValueError(f"bunch size {bunch_size} does not fit: it must divide a process's {images} images, "
                     f"or be a multiple of them that divides the global batch of {images * world_size}")


class BatchNorm(nn.Module):
    """Batch norm over all processes, or over bunches of `bunch_size` images; x: [N, C] or [N, C, H, W].

    The N rows are `num_views` blocks of the same images, so a bunch has rows in each block. Without bunches
    the processes may have different N. The running statistics are the mean over bunches, equal on all
    processes. nn.SyncBatchNorm, whose names in the state dict these are, cannot replace it: it has no
    bunches, and refuses CPU tensors in a process group.
    """

    def __init__(self, num_features, affine=True, bunch_size=None, eps=1e-5, momentum=0.1):
        super().__init__()
        self.bunch_size, self.eps, self.momentum = bunch_size or None, eps, momentum    # 0 means None
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self._groups = {}                # processes in a bunch -> process group

    def _group(self, processes):
        """The process group that shares this process's bunch; None if it has none to share."""
        if processes == 1:
            return None
        if processes == dist.get_world_size():
            return dist.group.WORLD
        if processes not in self._groups:        # made once: new_subgroups is a collective call, and slow
            dist.barrier()                       # NCCL splits off a group only where nothing is under way
            world = dist.group.WORLD._get_backend(self.running_mean.device)
            self._groups[processes] = dist.new_subgroups(processes, timeout=world.options._timeout)[0]
        return self._groups[processes]

    def forward(self, x, num_views=1):
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        images = len(x) // num_views
        if self.training:
            self.num_batches_tracked += 1
        if not self.training or (world_size == 1 and self.bunch_size in (None, images)):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                                self.momentum, self.eps)

        bunches, processes = bunch_layout(self.bunch_size, images, world_size)
        by_bunch, weight, bias = x, self.weight, self.bias
        if bunches > 1:                  # the C channels of each bunch apart: [N / bunches, bunches · C, ...]
            by_bunch = x.view(num_views, bunches, -1, *x.shape[1:]).transpose(1, 2)
            by_bunch = by_bunch.flatten(2, 3).flatten(0, 1)
            if weight is not None:
                weight, bias = weight.repeat(bunches), bias.repeat(bunches)
        with torch.autocast(x.device.type, enabled=False):       # statistics need float32 at least
            y, statistics = _Normalize.apply(by_bunch, weight, bias, self.eps, self._group(processes))
        if bunches > 1:
            statistics = statistics.view(2, bunches, -1).mean(1)
        if processes < world_size:                               # other processes have other bunches
            dist.all_reduce(statistics)
            statistics /= world_size
        running = [self.running_mean, self.running_var]
        torch._foreach_lerp_(running, list(statistics.to(self.running_mean)), self.momentum)
        if bunches == 1:
            return y                     # a view would make a ReLU in place copy its gradient
        return y.view(num_views, -1, bunches, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def synchronize_batch_norms(module):
    """Replaces every batch norm of torch in `module` by one over all processes; names and values stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            synced = BatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(module, name, synced)
        else:
            synchronize_batch_norms(child)


@torch.no_grad()
def reestimate_batch_norms(network, batches, forward=None):
    """Sets the running statistics of a network's batch norms to their means over batches [B, 3, H, W].

    A multi-crop run leaves statistics of crops of several sizes, which differ from those of whole images.
    After few steps they lag behind the weights. forward: makes a pass of a batch; default: that of a Twist.
    The network stays in training mode.
    """
    norms = [module for module in network.modules() if hasattr(module, "running_mean")]
    before = [(norm, norm.momentum, getattr(norm, "bunch_size", None)) for norm in norms]
    network.train()
    for i, x in enumerate(batches):
        for norm in norms:               # 1, 1/2, 1/3, ...: the running statistic is then a plain mean
            norm.momentum, norm.bunch_size = 1 / (i + 1), None
        forward(x) if forward else network([x])
    for norm, momentum, bunch_size in before:
        norm.momentum, norm.bunch_size = momentum, bunch_size


# ---------------------------------------------------------------- backbones
class ResNet(nn.Module):
    """A ResNet of any width (He et al., arXiv 1512.03385), from torchvision's blocks and with its names.

    It has no classifier: its features are the last map, averaged to pool × pool positions.
    """

    def __init__(self, block, blocks, widths, stem_width, stem_kernel=7, max_pool=True, pool=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, stem_kernel, stride=2, padding=stem_kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.relu = nn.ReLU(inplace=True)        # a child, as feature_maps runs the children in their order
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if max_pool else nn.Identity()
        self.stages, inputs = [], stem_width
        for i, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            layers, outputs = [], width * block.expansion
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                downsample = None
                if stride != 1 or inputs != outputs:
                    downsample = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
                layers.append(block(inputs, width, stride, downsample))
                inputs = outputs
            self.stages.append(f"layer{i + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layers))
        self.pool, self.feature_dim = pool, inputs * pool * pool

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return F.adaptive_avg_pool2d(x, self.pool).flatten(1)                     # [B, feature_dim]


class Attention(nn.Module):
    """Multi-head self-attention of tokens [B, N, dim]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # [B, heads, N, d]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with its norms before attention and MLP; tokens [B, N, dim] -> the same."""

    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(),
                                             fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = StochasticDepth(drop_path, "row")      # row: drawn anew for each image

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision transformer (arXiv 2010.11929) with the names of DINO and timm. patch: pixels of its patches.

    Its feature is the class token after the last norm. Positions are learnt for the patches of 224 pixels and
    interpolated for other sizes. drop_path: probability that an image skips a branch of the last block,
    rising linearly from 0 in the first.
    """

    def __init__(self, dim, heads, depth=12, drop_path=0.0, patch=16):
        super().__init__()
        self.feature_dim, self.grid = dim, 224 // patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / (depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linears(self)

    def positions(self, rows, columns):
        """Position embeddings [1, 1 + rows · columns, dim]."""
        n = self.grid
        if rows == columns == n:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)
        # DINO adds 0.1 so that the size is not rounded down. That also shifts the grid a little; keep it, as
        # published networks were trained and are evaluated so.
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / n, (columns + 0.1) / n), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)

    def features(self, x, n_last_blocks=1, mean_of_patches=False):
        """Images x [B, 3, H, W] -> [B, n · dim], the class tokens of the last n blocks after the last norm.

        mean_of_patches: then follows the mean of the last block's patch tokens, another dim.
        """
        x = self.patch_embed.proj(x)                                              # [B, dim, rows, columns]
        positions = self.positions(*x.shape[-2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT], 1) + positions
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n_last_blocks:
                outputs.append(self.norm(x)[:, 0])
        if mean_of_patches:
            outputs.append(self.norm(x)[:, 1:].mean(1))
        return torch.cat(outputs, 1)

    def forward(self, x):
        return self.features(x)


def init_linears(module):
    """Initialises linear layers as transformers do: truncated normal weights, deviation 0.02; zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def patch_size(arch):
    """Pixels of a patch of a ViT, the least that a picture may have; 1 for other networks."""
    if not arch.startswith("vit"):
        return 1
    return int(re.search(r"\d*$", arch)[0] or 16)


def build_backbone(arch, small_images=False, drop_path=0.0):
    """A network that maps images [B, 3, H, W] to features [B, module.feature_dim].

    arch: one of ARCHS.
      resnet18 to resnet152, mobilenet_v3_large, efficientnet_b0, _b1: torchvision's without their last layer.
      resnet50w2, w4, w5 multiply every width, the stem's as well, like the wide networks of TWIST and SwAV.
      resnet8 is for a CPU: a 5×5 stem and one basic block at each of the widths 32, 64, 128. resnet8_2x2
      averages its last map to 2 × 2 positions, which gives 512 features; resnet8w2_2x2 is twice as wide.
      vit_t, vit_s, vit_b: see ViT; only they use drop_path. Those that end in 8 have patches of 8 pixels, not
      of 16: four times as many.
    small_images: a ResNet's stem becomes 3×3 without stride and max-pool.
    Raises ValueError for an unknown arch, or for small_images of another network than a ResNet.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch '{arch}': choose from {', '.join(ARCHS)}")
    if small_images and not arch.startswith("resnet"):
        raise ValueError(f"small images: {arch} is not a ResNet, so it has no stem to change")
    if re.fullmatch(r"vit_[tsb]\d*", arch):
        heads = {"t": 3, "s": 6, "b": 12}[arch[4]]
        return ViT(64 * heads, heads, drop_path=drop_path, patch=patch_size(arch))
    if arch.startswith("resnet8"):
        w = 2 if "w2" in arch else 1
        backbone = ResNet(BasicBlock, [1, 1, 1], [32 * w, 64 * w, 128 * w], stem_width=32 * w, stem_kernel=5,
                          max_pool=False, pool=2 if arch.endswith("2x2") else 1)
    elif re.fullmatch(r"resnet50w\d", arch):
        w = int(arch[-1])
        backbone = ResNet(Bottleneck, [3, 4, 6, 3], [64 * w, 128 * w, 256 * w, 512 * w], stem_width=64 * w)
        for module in backbone.modules():                       # as torchvision initialises its ResNets
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        backbone = remove_classifier(getattr(torchvision.models, arch)(weights=None))
    if small_images:
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone


def remove_classifier(network):
    """A torchvision network without its last layer, and with `feature_dim`.

    Raises ValueError if the last layer is not linear.
    """
    name, last = list(network.named_modules())[-1]
    if not isinstance(last, nn.Linear):
        raise ValueError(f"the last layer of a {type(network).__name__} is no linear head, but "
                         f"{name}, a {type(last).__name__}")
    network.set_submodule(name, nn.Identity())
    network.feature_dim = last.in_features
    return network


def zero_init_residual(backbone):
    """Starts every residual branch of a ResNet at 0. Barlow Twins was trained so, TWIST was not."""
    for module in backbone.modules():
        if isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
        elif isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)


class FeatureMaps(nn.ModuleDict):
    """A ResNet up to a stage, with the names of its state dict: images [B, 3, H, W] -> {name: [B, C, h, w]}.

    Built by feature_maps. channels: {name: C}.
    """

    def forward(self, x):
        maps = {}
        for name, child in self.items():
            x = child(x)
            if name in self.channels:
                maps[name] = x
        return maps


def feature_maps(backbone, names):
    """The maps after stages of a ResNet (layer1, layer2, ...) as a FeatureMaps, which shares its layers.

    They are those of the backbone's own forward pass. What comes after the last of these stages is left out.
    Raises ValueError for a stage that it has not, and for another network than a ResNet.
    """
    stages = stages_of(backbone)
    for name in names:
        if name not in stages:
            raise ValueError(f"it has no stage '{name}'; choose from {', '.join(stages)}")
    last = max(names, key=stages.index)
    children = dict(backbone.named_children())
    order = list(children)                       # in which both kinds of ResNet run them
    maps = FeatureMaps({name: children[name] for name in order[:order.index(last) + 1]})
    maps.channels = {}
    for name in names:
        norms = [module for module in children[name].modules() if hasattr(module, "running_mean")]
        maps.channels[name] = norms[-1].num_features
    return maps


def stages_of(backbone):
    """The names of a ResNet's stages, in their order. Raises ValueError for another network."""
    if not isinstance(backbone, (ResNet, torchvision.models.ResNet)):
        raise ValueError(f"a {type(backbone).__name__} has no stages with maps; use a ResNet")
    return [name for name, _ in backbone.named_children() if name.startswith("layer")]


def dilate(backbone):
    """Takes the strides out of a ResNet's stages from the third on, in place; its later kernels are dilated.

    Maps become larger, and hold those of the strided network at every second or fourth place. Of four stages
    it is what torchvision's replace_stride_with_dilation=[False, True, True] builds: the last map has stride
    8 instead of 32. With the three of resnet8 it is 4 instead of 8. Raises ValueError for another network.
    """
    dilation = 1
    for stage in stages_of(backbone)[2:]:
        convs = [module for module in getattr(backbone, stage).modules() if isinstance(module, nn.Conv2d)]
        before, dilation = dilation, 2 * dilation
        for conv in convs:
            if conv.kernel_size[0] > 1:          # the convolution that had the stride sees the places of old
                conv.dilation = conv.padding = (before if conv.stride[0] > 1 else dilation,) * 2
            conv.stride = (1, 1)


def multi_crop(backbone, views):
    """V views [B, 3, h, w] -> features [V·B, feature_dim]; consecutive views of one size share a pass.

    Batch norm takes its statistics from a pass, so one pass for each view would give other features.
    """
    features, start = [], 0
    for i in range(1, len(views) + 1):
        if i == len(views) or views[i].shape[-2:] != views[start].shape[-2:]:
            features.append(backbone(torch.cat(views[start:i])))
            start = i
    return torch.cat(features)


# ---------------------------------------------------------------- TWIST
class ProjectionHead(nn.Module):
    """Linear-BN-ReLU twice, a linear layer to C classes, then NBS: batch norm without affine parameters.

    gelu: GELU instead of ReLU.
    """

    def __init__(self, feature_dim, hidden_dim, num_classes, bunch_size=None, nbs=True, gelu=False):
        super().__init__()
        act = nn.GELU() if gelu else nn.ReLU(inplace=True)
        # The released head has an unused dropout after each activation. The identity keeps its number, so
        # that the second linear layer is projection_head.4 there and here.
        self.projection_head = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), act, nn.Identity(),
            nn.Linear(hidden_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), act)
        self.last_linear = nn.Linear(hidden_dim, num_classes)    # has a bias for nbs=False; NBS cancels it
        self.norm = BatchNorm(num_classes, affine=False, bunch_size=bunch_size) if nbs else None

    def forward(self, features, num_views=1):
        """Features [V·B, feature_dim], one view after the other -> logits [V·B, C]."""
        logits = self.last_linear(self.projection_head(features))
        return logits if self.norm is None else self.norm(logits, num_views)


class Twist(nn.Module):
    """Backbone and projection head. bunch_size: images that share one NBS; None: the global batch.

    The head of a ViT has GELU and the ViT's initialisation, as in TWIST's released commands.
    Build it after the process group: then its batch norms are synchronised over all processes.
    """

    def __init__(self, arch, num_classes=4096, hidden_dim=4096, bunch_size=None, nbs=True,
                 small_images=False, drop_path=0.0):
        super().__init__()
        self.backbone = build_backbone(arch, small_images, drop_path)
        vit = arch.startswith("vit")
        self.projection_heads = ProjectionHead(self.backbone.feature_dim, hidden_dim, num_classes, bunch_size,
                                               nbs, gelu=vit)
        if vit:
            init_linears(self.projection_heads)
        if dist.is_initialized() and dist.get_world_size() > 1:
            synchronize_batch_norms(self)

    def forward(self, views):
        """views: list of V tensors [B, 3, h, w] -> logits [V, B, C].

        All views share one pass through the head, as in the released code. The statistics of its batch norms
        and of NBS therefore mix global and local crops.
        """
        logits = self.projection_heads(multi_crop(self.backbone, views), len(views))         # [V·B, C]
        return logits.view(len(views), -1, logits.shape[-1])


def build_twist(config, drop_path=0.0):
    """The Twist of a run's configuration: the flags of pretrain.py, as its checkpoint keeps them."""
    names = ("arch", "num_classes", "hidden_dim", "bunch_size", "nbs", "small_images")
    return Twist(**{name: config[name] for name in names}, drop_path=drop_path)


# ---------------------------------------------------------------- Barlow Twins, SEED
class BarlowTwins(nn.Module):
    """Backbone and projector of Barlow Twins (arXiv 2103.03230), with the names of the released code.

    The projector has three linear layers of width `hidden_dim` without bias. Batch norm and ReLU follow the
    first two. The batch norm of the embeddings belongs to the loss.
    """

    def __init__(self, arch, hidden_dim=8192, small_images=False, drop_path=0.0):
        super().__init__()
        self.backbone = build_backbone(arch, small_images, drop_path)
        layers = []
        for inputs in (self.backbone.feature_dim, hidden_dim):
            layers += [nn.Linear(inputs, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(hidden_dim, hidden_dim, bias=False))
        if dist.is_initialized() and dist.get_world_size() > 1:
            synchronize_batch_norms(self)

    def forward(self, views):
        """views: list of V tensors [B, 3, h, w] -> embeddings [V, B, hidden_dim].

        Unlike TWIST, a pass for each view: the released code normalises each view with its own statistics.
        """
        return torch.stack([self.projector(self.backbone(view)) for view in views])


class Embedder(nn.Module):
    """A backbone and a head that gives embeddings: SEED's student and teacher (arXiv 2101.04731)."""

    def __init__(self, backbone, fc):
        super().__init__()
        self.backbone, self.fc = backbone, fc
        if dist.is_initialized() and dist.get_world_size() > 1:
            synchronize_batch_norms(self)

    def forward(self, views):
        """views: list of V tensors [B, 3, h, w] -> embeddings [V, B, D]."""
        return self.fc(multi_crop(self.backbone, views)).unflatten(0, (len(views), -1))


def build_student(config):
    """SEED's student of a run's configuration: the flags of distill.py, as its checkpoint keeps them."""
    backbone = build_backbone(config["arch"], config["small_images"])
    width = backbone.feature_dim
    return Embedder(backbone, nn.Sequential(nn.Linear(width, width), nn.ReLU(),
                                            nn.Linear(width, config["embedding_dim"])))


def build_network(config, drop_path=0.0):
    """The network of a run's configuration, whichever stage trained it."""
    loss = config.get("loss", "twist")
    if loss == "barlow":
        return BarlowTwins(config["arch"], config["hidden_dim"], config["small_images"], drop_path)
    return build_student(config) if loss == "seed" else build_twist(config, drop_path)


def watch_logits(last_linear, run, scaler):
    """Watches the logits before NBS, or an embedding, at the steps that `run` logs (paper, Tables 7 and 8).

    Returns a dict that such a step fills: std_col, the deviation over images, std_row, that over classes, and
    grad, the mean |gradient|.
    """
    health = {}

    def look(module, inputs, logits):
        if run.logging and logits.requires_grad:         # not where a candidate is judged
            # a process's gradient is larger than the global one: by fp16's scale, and as DDP will take a mean
            z, scale = logits.detach().float(), scaler.get_scale() * run.world_size
            health.update(std_col=z.std(0).mean(), std_row=z.std(1).mean())
            logits.register_hook(lambda grad: health.update(grad=grad.float().abs().mean() / scale))
    last_linear.register_forward_hook(look)
    return health
