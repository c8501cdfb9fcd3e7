"""LARS, parameter groups, and schedules as pure functions of the step."""

import math

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling in the form TWIST was published with (You et al., arXiv 1708.03888).

        v <- momentum * v + lr * trust * (g + weight_decay * w);  w <- w - v
        trust = trust_coefficient * |w| / (|g| + weight_decay * |w|); 1 where either norm is zero

    The learning rate is inside v (Barlow Twins keeps it outside, which differs while lr changes).
    Groups with lars=False take trust = 1: plain momentum.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      trust_coefficient=trust_coefficient, lars=True))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                update = w.grad.add(w, alpha=group["weight_decay"])
                if group["lars"]:   # tensors throughout: .item() would wait for the device, tensor by tensor
                    w_norm, g_norm = w.norm(), w.grad.norm()
                    trust = group["trust_coefficient"] * w_norm / (g_norm + group["weight_decay"] * w_norm)
                    update *= torch.where((w_norm > 0) & (g_norm > 0), trust, torch.ones_like(trust))
                v = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                v.mul_(group["momentum"]).add_(update, alpha=group["lr"])
                w.sub_(v)


def param_groups(model, weight_decay):
    """[decayed, undecayed] groups of the trainable parameters; the second has no decay and no LARS scaling.

    Undecayed: 1-D tensors (biases, norms), *.bias, pos_embed, cls_token, dist_token. Each group has `names`.
    """
    decayed = dict(params=[], names=[], weight_decay=weight_decay, lars=True)
    undecayed = dict(params=[], names=[], weight_decay=0.0, lars=False)
    for name, param in model.named_parameters():
        if param.requires_grad:
            last = name.split(".")[-1]
            plain = param.dim() <= 1 or last in ("bias", "pos_embed", "cls_token", "dist_token")
            group = undecayed if plain else decayed
            group["params"].append(param)
            group["names"].append(name)
    return [decayed, undecayed]


def cosine(step, total_steps, start, end):
    """Half a cosine from `start` at step 0 to `end` at step `total_steps`."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))


def warmup_cosine(step, total_steps, warmup_steps, peak, final):
    """0 -> peak linearly over `warmup_steps` from step 0, then half a cosine towards `final`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return cosine(step - warmup_steps, total_steps - warmup_steps, peak, final)


def seed_lr(epoch, epochs, warmup_epochs, lr, peak, milestones=None):
    """SEED's learning rate of a whole epoch: from `lr` linearly to `peak`, its multiple for the batch size,
    then the cosine of all epochs, warm-up included, to 0, or a tenth at each milestone."""
    if epoch < warmup_epochs:
        return lr + (peak - lr) * epoch / warmup_epochs
    if milestones:
        return peak * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    return cosine(epoch, epochs, peak, 0)


class BadStep:
    """The first step whose loss, gradient or weights are not finite: kept on the device, read when asked.

    step: -1 while there is none. With a scaler that is in use (fp16) a gradient that is not finite is part of
    the method, the step is left out and the scale halved; 20 in a row are too many, as the scale then is
    2^20 times smaller and has not helped.
    """
    KINDS = ("loss", "gradient", "weights")

    def __init__(self, device, scaler=None):
        self.patience = 20 if scaler is not None and scaler.is_enabled() else 1
        self.step, self.kind, self.overflows = (torch.full((), n, device=device) for n in (-1, 0, 0))
        self.lr, self.last = torch.zeros((), device=device), None

    @torch.no_grad()
    def watch(self, step, lr, terms, norm=None, weights=()):
        """Once a step, from 1 on: its learning rate, the terms of its loss (scalars, or one [N]), the norm of
        its gradient, and, at steps that are read, the weights that it made."""
        terms = torch.stack([*terms]).float()
        if norm is not None:
            self.overflows = torch.where(norm.isfinite(), 0, self.overflows + 1)
        fine = torch.stack([terms.isfinite().all(), self.overflows < self.patience,
                            *(w.isfinite().all() for w in weights)])
        so_far = self.step < 0
        self.last = torch.where(so_far & fine.all(), terms, terms * 0 if self.last is None else self.last)
        new = so_far & ~fine.all()
        self.kind = torch.where(new, (~fine).int().argmax().clamp_max(2), self.kind)
        self.lr = torch.where(new, lr, self.lr)
        self.step = torch.where(new, step, self.step)

    @property
    def what(self):
        return self.KINDS[int(self.kind)]

    def message(self, names, amp, out, flag="--lr"):
        """One line for the user; names: of the terms, of which the last finite ones are told, amp: precision,
        out: output folder, flag: what to lower."""
        last = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, self.last.tolist(), strict=True))
        return (f"the {self.what} of step {int(self.step)} is not finite (lr {self.lr:.3g}, amp {amp}; "
                f"before {last}); the last checkpoint in {out} is from before; try a lower {flag}")
