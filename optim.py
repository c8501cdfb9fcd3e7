"""LARS, parameter groups, and schedules as pure functions of the step."""

import math

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), in the form of TWIST's released code.

        v <- momentum * v + lr * trust * (g + weight_decay * w);  w <- w - v
        trust = trust_coefficient * |w| / (|g| + weight_decay * |w|); 1 where either norm is zero

    The learning rate is inside v. Barlow Twins has it outside, which differs while the learning rate changes.
    Groups with lars=False take trust = 1: plain momentum.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      trust_coefficient=trust_coefficient, lars=True))

    @torch.no_grad()
    def step(self):                      # by _foreach: one kernel for many tensors, not one for each
        weights, velocities = [], []
        for group in self.param_groups:
            ws = [w for w in group["params"] if w.grad is not None]
            if not ws:
                continue
            updates = [w.grad for w in ws]
            if group["weight_decay"]:
                updates = torch._foreach_add(updates, ws, alpha=group["weight_decay"])
            if group["lars"]:
                updates = torch._foreach_mul(updates, _spread(self._trust(ws, group), ws))
            for w in ws:
                if "momentum_buffer" not in self.state[w]:
                    self.state[w]["momentum_buffer"] = torch.zeros_like(w)
            vs = [self.state[w]["momentum_buffer"] for w in ws]
            torch._foreach_mul_(vs, group["momentum"])
            torch._foreach_add_(vs, updates, alpha=group["lr"])
            weights += ws
            velocities += vs
        if weights:
            torch._foreach_sub_(weights, velocities)

    def _trust(self, ws, group):
        """The trust of each weight, [number]. No .item() and no `if` on a norm: either waits for the GPU."""
        norms = torch.stack(torch._foreach_norm(ws + [w.grad for w in ws])).view(2, -1)
        w_norm, g_norm = norms
        trust = group["trust_coefficient"] * w_norm / (g_norm + group["weight_decay"] * w_norm)
        return trust.masked_fill_(norms.amin(0) <= 0, 1.0)


def _spread(numbers, tensors):
    """A number for each tensor -> tensors of their shapes and strides, filled with it.

    torch has no _foreach kernel that multiplies each tensor by its own number on the device.
    """
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.cat([n.expand(size) for n, size in zip(numbers.unbind(), sizes, strict=True)]).split(sizes)
    return [part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
            for part, tensor in zip(flat, tensors, strict=True)]


def param_groups(model, weight_decay):
    """[decayed, undecayed] groups of a model's trainable parameters, each with `names`.

    Undecayed are biases, norms, position embeddings and class tokens. They take plain momentum in LARS.
    """
    decayed = dict(params=[], names=[], weight_decay=weight_decay, lars=True)
    undecayed = dict(params=[], names=[], weight_decay=0.0, lars=False)
    for name, param in model.named_parameters():
        if param.requires_grad:
            last = name.split(".")[-1]
            plain = param.dim() <= 1 or last in ("pos_embed", "cls_token")
            group = undecayed if plain else decayed
            group["params"].append(param)
            group["names"].append(name)
    return [decayed, undecayed]


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict(state), but with the kernels of this device, not of the one that saved."""
    groups = []
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        groups.append(group | {name: own[name] for name in ("fused", "foreach") if name in own})
    optimizer.load_state_dict(state | {"param_groups": groups})


def cosine(step, total_steps, start, end):
    """Half a cosine from `start` at step 0 to `end` at step `total_steps`."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))


def poly(step, total_steps, start, end, power=0.9):
    """From `start` at step 0 to `end` at step `total_steps`, almost linearly (DeepLab, arXiv 1606.00915)."""
    return end + (start - end) * (1 - step / total_steps) ** power


def warmup_cosine(step, total_steps, warmup_steps, peak, final):
    """0 -> peak linearly over `warmup_steps` from step 0, then half a cosine towards `final`."""
    if step < warmup_steps:              # the first step has learning rate 0, as in the released code
        return peak * step / warmup_steps
    return cosine(step - warmup_steps, total_steps - warmup_steps, peak, final)


def milestone_factor(done, milestones):
    """The factor of a learning rate: a tenth for each milestone that is reached; in epochs, or in steps."""
    return 0.1 ** sum(milestone <= done for milestone in milestones)


def seed_lr(epoch, epochs, warmup_epochs, lr, peak, milestones=None):
    """SEED's learning rate, constant within an epoch (arXiv 2101.04731, released code).

    It goes linearly from `lr` to `peak`, which is `lr` scaled to the batch size. Then it follows a cosine to
    0, or falls to a tenth at each of the milestones (epochs).
    """
    if epoch < warmup_epochs:            # below batch size 256 the peak is lower, and the warm-up falls
        return lr + (peak - lr) * epoch / warmup_epochs
    if milestones:
        return peak * milestone_factor(epoch, milestones)
    return cosine(epoch, epochs, peak, 0)        # of all epochs, so it starts a little below the peak
