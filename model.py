"""Backbones, the projection head with NBS (batch norm before the softmax), and the multi-crop forward.

Names and shapes of `Twist`'s state dict are those of the published network.
"""

from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import StochasticDepth

ARCHS = ("resnet8", "resnet8_2x2", "resnet8w2_2x2", "resnet18", "resnet34", "resnet50", "resnet101",
         "resnet152", "resnet50w2", "resnet50w4", "resnet50w5", "vit_t", "vit_s", "vit_b",
         "mobilenet_v3_large", "efficientnet_b0", "efficientnet_b1")


# ---------------------------------------------------------------- batch norm over processes and bunches
class _Normalize(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) over the axes `dims` and the processes of `group`, exact gradients."""

    @staticmethod
    def forward(ctx, x, dims, eps, group):
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        if group is not None:    # every process holds equally many rows: plain means of means are right
            parts = [torch.stack([mean, var])] * dist.get_world_size(group)
            parts = [torch.empty_like(part) for part in parts]
            dist.all_gather(parts, torch.stack([mean, var]), group=group)
            means, variances = torch.stack(parts).unbind(1)
            mean = means.mean(0)
            var = (variances + (means - mean) ** 2).mean(0)     # no cancellation, unlike E[x²] - E[x]²
        inv_std = (var + eps).rsqrt()
        y = (x - mean) * inv_std
        ctx.save_for_backward(y, inv_std)
        ctx.dims, ctx.group = dims, group
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, _mean, _var):
        y, inv_std = ctx.saved_tensors
        both = torch.stack([dy.mean(ctx.dims, keepdim=True), (dy * y).mean(ctx.dims, keepdim=True)])
        if ctx.group is not None:   # every process's loss depends on these statistics: sum the gradients
            dist.all_reduce(both, group=ctx.group)
            both /= dist.get_world_size(ctx.group)
        return inv_std * (dy - both[0] - y * both[1]), None, None, None


def bunch_layout(bunch_size, images, world_size):
    """How bunches of `bunch_size` images lie over processes that hold `images` each.

    Returns (bunches in a process, processes in a bunch); one of the two is 1. Raises ValueError where the
    bunch neither divides a process's images nor is a multiple of them that divides the global batch.
    """
    if bunch_size is None:
        return 1, world_size
    if bunch_size > 1 and images % bunch_size == 0:
        return images // bunch_size, 1
    if bunch_size > 1 and bunch_size % images == 0 and world_size % (bunch_size // images) == 0:
        return 1, bunch_size // images
    raise ValueError(f"bunch size {bunch_size} does not fit: it must divide a process's {images} images, "
                     f"or be a multiple of them that divides the global batch of {images * world_size}")


class BatchNorm(nn.Module):
    """Batch norm over all processes, or over bunches of `bunch_size` images; runs on any device.

    x: [N, C] or [N, C, H, W]. With bunches the N rows are `num_views` blocks of the same images. Running
    statistics are the mean over bunches, equal on all processes. nn.SyncBatchNorm refuses CPU tensors once a
    process group exists, and knows no bunches; the names in the state dict are the same.
    """

    def __init__(self, num_features, affine=True, bunch_size=None, eps=1e-5, momentum=0.1):
        super().__init__()
        self.bunch_size, self.eps, self.momentum = bunch_size or None, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self._groups = {}                                       # processes in a bunch -> process group

    def _group(self, processes):
        if processes == 1:
            return None
        if processes not in self._groups:                       # collective: every process comes by here
            world = dist.group.WORLD
            whole = processes == dist.get_world_size()
            self._groups[processes] = world if whole else dist.new_subgroups(processes)[0]
        return self._groups[processes]

    def forward(self, x, num_views=1):
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        images = len(x) // num_views
        if not self.training or (world_size == 1 and self.bunch_size in (None, images)):
            if self.training:
                self.num_batches_tracked += 1
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                                self.momentum, self.eps)

        bunches, processes = bunch_layout(self.bunch_size, images, world_size)
        if bunches == 1:
            rows, dims = x, (0, *range(2, x.dim()))                               # [N, C] or [N, C, H, W]
        else:
            rows, dims = x.view(num_views, bunches, -1, *x.shape[1:]), (0, 2, *range(4, x.dim() + 2))
        with torch.autocast(x.device.type, enabled=False):
            wide = rows.float() if x.dtype in (torch.float16, torch.bfloat16) else rows
            y, mean, var = _Normalize.apply(wide, dims, self.eps, self._group(processes))
            y = y.view(x.shape)
            if self.weight is not None:
                shape = (1, -1) + (1,) * (x.dim() - 2)
                y = torch.addcmul(self.bias.view(shape), y, self.weight.view(shape))
            self._update_running_statistics(mean, var, x.numel() // x.shape[1] // bunches * processes,
                                            reduce=processes < world_size)
        return y.to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean, var, count, reduce):
        C = len(self.running_mean)
        both = torch.stack([mean.reshape(-1, C).mean(0), var.reshape(-1, C).mean(0) * count / (count - 1)])
        if reduce:
            dist.all_reduce(both)
            both /= dist.get_world_size()
        self.running_mean.lerp_(both[0].to(self.running_mean), self.momentum)
        self.running_var.lerp_(both[1].to(self.running_var), self.momentum)
        self.num_batches_tracked += 1


def synchronize_batch_norms(module):
    """Replaces every torch batch norm below `module` by one over all processes; names and values stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            synced = BatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            synced.load_state_dict(child.state_dict())
            setattr(module, name, synced)
        else:
            synchronize_batch_norms(child)


@torch.no_grad()
def reestimate_batch_norms(network, batches):
    """Sets the running statistics of all batch norms of a Twist to their means over batches [B, 3, H, W].

    Those of a multi-crop run are of crops of several sizes, which whole images do not have.
    """
    norms = [module for module in network.modules() if hasattr(module, "running_mean")]
    before = [(norm, norm.momentum, getattr(norm, "bunch_size", None)) for norm in norms]
    network.train()
    for i, x in enumerate(batches):
        for norm in norms:
            norm.momentum, norm.bunch_size = 1 / (i + 1), None
        network([x])
    for norm, momentum, bunch_size in before:
        norm.momentum, norm.bunch_size = momentum, bunch_size


# ---------------------------------------------------------------- backbones
class ResNet(nn.Module):
    """A ResNet of any widths from torchvision's blocks, without classifier; its names are torchvision's.

    pool: its features are the last map averaged to pool × pool places.
    """

    def __init__(self, block, blocks, widths, stem_width, stem_kernel=7, max_pool=True, pool=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, stem_kernel, stride=2, padding=stem_kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if max_pool else nn.Identity()
        self.stages, inputs = [], stem_width
        for i, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            layers, outputs = [], width * block.expansion
            for j in range(depth):
                stride, downsample = 2 if i > 0 and j == 0 else 1, None
                if stride != 1 or inputs != outputs:
                    downsample = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
                layers.append(block(inputs, width, stride, downsample))
                inputs = outputs
            self.stages.append(f"layer{i + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layers))
        self.pool, self.feature_dim = pool, inputs * pool * pool

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
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
    def __init__(self, dim, heads, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(),
                                             fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = StochasticDepth(drop_path, "row")     # an image skips the branch altogether

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision transformer with patches of 16 pixels, for images of any size; names are DINO's, and timm's.

    Its feature is the class token after the last norm. Positions are learnt for 14 × 14 patches (224 pixels)
    and interpolated for others. drop_path: probability to skip in the last block, from 0 in the first.
    """

    def __init__(self, dim, heads, depth=12, drop_path=0.0):
        super().__init__()
        self.feature_dim = dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 14 * 14, dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, kernel_size=16, stride=16)
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / (depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linears(self)

    def positions(self, rows, columns):
        """Position embeddings [1, 1 + rows · columns, dim]."""
        if rows == columns == 14:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
        # a tenth of a patch more keeps the size from being rounded down, and shifts a bit: as published
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / 14, (columns + 0.1) / 14), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)

    def features(self, x, n_last_blocks=1, mean_of_patches=False):
        """[B, n · dim]: the class tokens of the last n blocks, each after the last norm, side by side; with
        mean_of_patches also the mean of the last block's patches. x: [B, 3, H, W]."""
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
    """Truncated normal weights of standard deviation 0.02 and no bias, as of transformers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def build_backbone(arch, small_images=False, drop_path=0.0):
    """A network that maps images [B, 3, H, W] to features [B, module.feature_dim].

    arch: one of ARCHS. resnet18 to resnet152 are torchvision's; resnet50w2/w4/w5 multiply every width, the
    stem's too (SwAV's layout, the published one); resnet8 is the small one for a CPU: one basic block at
    each of the widths 32, 64, 128 behind a 5×5 stem; resnet8_2x2 keeps 2 × 2 places of its last map, which
    makes 512 features of 128, and resnet8w2_2x2 doubles every width. vit_t, vit_s, vit_b: see ViT, drop_path
    is theirs. mobilenet_v3_large and efficientnet_b0/b1 are torchvision's, with the dropout before their
    classifier. small_images: 3×3 stem without stride and max-pool. Raises ValueError for an unknown arch, or
    small_images of what is no ResNet.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch '{arch}': choose from {', '.join(ARCHS)}")
    if small_images and not arch.startswith("resnet"):
        raise ValueError(f"small images: {arch} has no ResNet's stem to change")
    if arch.startswith("vit"):
        heads = {"vit_t": 3, "vit_s": 6, "vit_b": 12}[arch]
        return ViT(64 * heads, heads, drop_path=drop_path)
    if arch.startswith("resnet8"):
        w = 2 if "w2" in arch else 1
        backbone = ResNet(BasicBlock, [1, 1, 1], [32 * w, 64 * w, 128 * w], stem_width=32 * w, stem_kernel=5,
                          max_pool=False, pool=2 if arch.endswith("2x2") else 1)
    elif "w" in arch:
        w = int(arch[-1])
        backbone = ResNet(Bottleneck, [3, 4, 6, 3], [64 * w, 128 * w, 256 * w, 512 * w], stem_width=64 * w)
        for module in backbone.modules():                       # torchvision's initialisation
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
    """A torchvision network without its last layer, with `feature_dim`. Raises ValueError if it is no linear
    one."""
    name, last = list(network.named_modules())[-1]
    if not isinstance(last, nn.Linear):
        raise ValueError(f"the last layer of a {type(network).__name__} is no linear head, but "
                         f"{name}, a {type(last).__name__}")
    network.set_submodule(name, nn.Identity())
    network.feature_dim = last.in_features
    return network


def zero_init_residual(backbone):
    """Has every residual branch of a ResNet begin at 0: published of Barlow Twins, not of TWIST."""
    for module in backbone.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            nn.init.zeros_((module.bn2 if isinstance(module, BasicBlock) else module.bn3).weight)


def multi_crop(backbone, views):
    """Features [V·B, feature_dim] of V views [B, 3, h, w]; consecutive views of one size share a pass."""
    features, start = [], 0
    for i in range(1, len(views) + 1):
        if i == len(views) or views[i].shape[-2:] != views[start].shape[-2:]:
            features.append(backbone(torch.cat(views[start:i])))
            start = i
    return torch.cat(features)


# ---------------------------------------------------------------- TWIST
class ProjectionHead(nn.Module):
    """Linear-BN-ReLU twice, a last linear to C classes, then NBS: batch norm without affine parameters.

    gelu: instead of ReLU, as published for ViTs.
    """

    def __init__(self, feature_dim, hidden_dim, num_classes, bunch_size=None, nbs=True, gelu=False):
        super().__init__()
        act = nn.GELU() if gelu else nn.ReLU(inplace=True)
        # The published head has an unused dropout after each activation; its places in the numbering stay.
        self.projection_head = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), act, nn.Identity(),
            nn.Linear(hidden_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), act)
        self.last_linear = nn.Linear(hidden_dim, num_classes)
        self.norm = BatchNorm(num_classes, affine=False, bunch_size=bunch_size) if nbs else None

    def forward(self, features, num_views=1):
        """features [V·B, feature_dim], views one after the other -> logits [V·B, C]."""
        logits = self.last_linear(self.projection_head(features))
        return logits if self.norm is None else self.norm(logits, num_views)


class Twist(nn.Module):
    """Backbone and head. bunch_size: images that share one NBS (None: the whole global batch).

    The head behind a ViT has GELU and the ViT's initialisation, as in the published commands.
    Built while a process group of several processes is up, its batch norms are synchronised over all of them.
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

        All views share one pass through the head, whose batch statistics therefore mix global and local
        crops, as published.
        """
        logits = self.projection_heads(multi_crop(self.backbone, views), len(views))         # [V·B, C]
        return logits.view(len(views), -1, logits.shape[-1])


def build_twist(config, drop_path=0.0):
    """The Twist of a run's configuration (the flags of pretrain.py, as a checkpoint keeps them); drop_path is
    for training it on."""
    names = ("arch", "num_classes", "hidden_dim", "bunch_size", "nbs", "small_images")
    return Twist(**{name: config[name] for name in names}, drop_path=drop_path)


# ---------------------------------------------------------------- Barlow Twins, SEED
class BarlowTwins(nn.Module):
    """Backbone and projector of Barlow Twins (arXiv 2103.03230); names are the published ones.

    The projector has three linear layers of `hidden_dim`, without bias, the first two with batch norm and
    ReLU; the batch norm of the embeddings belongs to the loss.
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
        """views: list of V tensors [B, 3, h, w] -> embeddings [V, B, hidden_dim]; each view has batch
        statistics of its own, unlike in TWIST."""
        return torch.stack([self.projector(self.backbone(view)) for view in views])


class Embedder(nn.Module):
    """A backbone and a head, as SEED's student and teacher are: views -> embeddings."""

    def __init__(self, backbone, fc):
        super().__init__()
        self.backbone, self.fc = backbone, fc
        if dist.is_initialized() and dist.get_world_size() > 1:
            synchronize_batch_norms(self)

    def forward(self, views):
        """views: list of V tensors [B, 3, h, w] -> embeddings [V, B, D]."""
        return self.fc(multi_crop(self.backbone, views)).unflatten(0, (len(views), -1))


def build_student(config):
    """The student of a run's configuration (the flags of distill.py, as a checkpoint keeps them)."""
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
