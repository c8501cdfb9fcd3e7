"""The objectives, each a pure function of tensors with the paper's names (TWIST, arXiv 2110.07402).

V views of B images (per process) end in logits z^v_i over C classes; P^v_i = softmax(z^v_i).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class TwistLoss(NamedTuple):
    """Scalars whose values are those of the global batch; `total` is the one to differentiate."""
    total: Tensor
    consistency: Tensor
    sharpness: Tensor
    diversity: Tensor


def _raise_precision(logits):
    """Half and bfloat16 to float32; float64 stays. An eps of 1e-5 is far below what bfloat16 resolves."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _global_mean(local):
    """Mean over processes with one collective; without a process group the identity. Not differentiable."""
    total = local.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total


def twist_loss(logits, alpha=1.0, beta=1.0, eps=1e-5, num_global=2, riders=None):
    """TWIST's objective, paper eq. 2-5: consistency + alpha * sharpness - beta * diversity, in nats.

        consistency = ½ mean_i [KL(P1_i || P2_i) + KL(P2_i || P1_i)]   the two views agree
        sharpness   = ½ sum_k mean_i H(Pk_i)                           each image falls into one class
        diversity   = ½ sum_k H(mean_i Pk_i)                           the batch covers all classes

    averaged over the pairs (g, s) of each global view g with every later view s.

    logits: [V, B, C] after NBS; the first `num_global` views are global crops. Half precision is raised.
    eps: stands inside every logarithm, as published; 0 gives the exact limit, finite for any logits.
    riders: optional [K] numbers of each process, averaged over them in place by the loss's one collective.

    Under DDP the values are those of the global batch, and the gradient averaged by DDP is that of one
    process with the joined batch. Costs are linear in V: sums over pairs factor into sums over views.
    Raises ValueError if the logits are not [V >= 2, B >= 1, C >= 2] or num_global is not in 1..V.
    """
    if logits.dim() != 3 or logits.shape[0] < 2 or logits.shape[1] < 1 or logits.shape[2] < 2:
        raise ValueError(f"logits: expected [V >= 2, B >= 1, C >= 2], got {list(logits.shape)}")
    V, B, C = logits.shape
    if not 1 <= num_global <= V:
        raise ValueError(f"num_global: expected 1 to {V}, the number of views, got {num_global}")

    with torch.autocast(logits.device.type, enabled=False):
        z = _raise_precision(logits)
        p = F.softmax(z, dim=-1)                                                     # [V, B, C]
        log_p = torch.log(p + eps) if eps > 0 else F.log_softmax(z, dim=-1)          # [V, B, C]

        # KL(p, q) + KL(q, p) = (p - q)·(log p - log q); the pairs are all that have a global view in them:
        #   sum over pairs of p_a·log p_b + p_b·log p_a  needs only the sums over global and over local views.
        G = num_global
        num_pairs = sum(V - 1 - g for g in range(min(G, V - 1)))
        in_pairs = [V - 1 if v < G else G for v in range(V)]
        weight = z.new_tensor(in_pairs) / (2 * num_pairs)                            # [V], sums to 1
        own = (p * log_p).sum(-1)                                                    # [V, B], minus entropies
        (p_global, p_local), (log_p_global, log_p_local) = (
            [part.sum(0) for part in x.split([G, V - G])] for x in (p, log_p))       # 4 × [B, C]
        cross = (p_global * (log_p_global + log_p_local) + p_local * log_p_global).sum() - own[:G].sum()
        sharpness_local = -weight @ own.mean(1)
        consistency_local = -cross / (2 * num_pairs * B) - sharpness_local
        m_local = p.mean(1)                                                          # [V, C]

        # One collective for all: the batch means, the two per-image terms (values only) and the riders.
        rides = z.new_zeros(0) if riders is None else riders.to(z)
        packed = torch.cat([m_local.flatten(), torch.stack([consistency_local, sharpness_local]), rides])
        m_global, terms, rides = _global_mean(packed).split([V * C, 2, len(rides)])
        if riders is not None:
            riders.copy_(rides)

        # Value of the global batch, gradient of the local term: DDP's average then is the global gradient.
        # Reducing m itself inside autograd would count every process's gradient W times.
        consistency = consistency_local + (terms[0] - consistency_local).detach()
        sharpness = sharpness_local + (terms[1] - sharpness_local).detach()
        m = m_local + (m_global.view(V, C) - m_local).detach()
        # xlogy has an infinite slope at 0 and would turn unused classes into NaN gradients.
        log_m = torch.log(m + eps) if eps > 0 else torch.log(m.clamp_min(torch.finfo(m.dtype).tiny))
        diversity = -weight @ (m * log_m).sum(-1)
        total = consistency + alpha * sharpness - beta * diversity
    return TwistLoss(total, consistency, sharpness, diversity)
