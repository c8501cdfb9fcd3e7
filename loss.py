"""The objectives, each a pure function of tensors with the paper's names.

TWIST (arXiv 2110.07402): V views of B images (per process) end in logits z^v_i over C classes;
P^v_i = softmax(z^v_i). Below it Barlow Twins and SEED, for embeddings of D numbers.
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
        return _joined(p.mean(1), consistency_local, sharpness_local, weight, alpha, beta, eps, riders)


def momentum_twist_loss(teacher_logits, logits, alpha=1.0, beta=1.0, eps=1e-5, riders=None):
    """TWIST's objective with a momentum encoder: KL(teacher's view || student's view), one way, in nats.

    Consistency is the mean over each global view t of the teacher and each other view s of the student;
    sharpness and diversity are plain means over all V views of the student. As in the published code; the
    paper only names it.

    teacher_logits: [G, B, C] of the global views, which come first among the student's; they get no gradient.
    logits: [V, B, C]. The rest as for twist_loss. Raises ValueError for other shapes.
    """
    if logits.dim() != 3 or teacher_logits.dim() != 3 or logits.shape[1:] != teacher_logits.shape[1:] or not (
            1 <= len(teacher_logits) <= len(logits) >= 2):
        raise ValueError(f"logits: expected [V >= 2, B, C] and a teacher's [G <= V, B, C], got "
                         f"{list(logits.shape)} and {list(teacher_logits.shape)}")
    V, B, G = len(logits), logits.shape[1], len(teacher_logits)

    with torch.autocast(logits.device.type, enabled=False):
        z, t = _raise_precision(logits), _raise_precision(teacher_logits.detach())
        p, q = F.softmax(z, dim=-1), F.softmax(t, dim=-1)                            # student's, teacher's
        log_p, log_q = (torch.log(x + eps) if eps > 0 else F.log_softmax(y, dim=-1)
                        for x, y in ((p, z), (q, t)))
        # sum over t and s != t of q_t·(log q_t - log p_s), again by sums over views
        own = (q * log_q).sum(-1).sum()
        cross = (q.sum(0) * log_p.sum(0)).sum() - (q * log_p[:G]).sum()
        consistency_local = ((V - 1) * own - cross) / (G * (V - 1) * B)
        sharpness_local = -(p * log_p).sum(-1).mean()
        weight = z.new_full((V,), 1 / V)
        return _joined(p.mean(1), consistency_local, sharpness_local, weight, alpha, beta, eps, riders)


def _joined(m_local, consistency_local, sharpness_local, weight, alpha, beta, eps, riders):
    """The loss of the global batch from this process's batch means m [V, C] and per-image terms.

    weight: [V], of the views in the diversity. One collective takes the batch means, the two per-image terms
    (values only) and the riders.
    """
    V, C = m_local.shape
    rides = m_local.new_zeros(0) if riders is None else riders.to(m_local)
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


class SelfLabelLoss(NamedTuple):
    """total to differentiate (this process's); threshold of the confidence; fraction of images above it."""
    total: Tensor
    threshold: Tensor
    fraction: Tensor


def anchors(logits):
    """For each image the more confident of two views [2, B, C]: (view [B], label [B], confidence [B])."""
    confidence, label = _raise_precision(logits.detach()).softmax(-1).max(-1)        # [2, B]
    confidence, view = confidence.max(0)                                             # of equals the first
    return view, label.gather(0, view[None])[0], confidence


def self_label_loss(logits, quantile, teacher_logits=None, riders=None):
    """Self-labelling: of each confident image the more confident global view labels all its other views.

        1 / (V - 1) sum over the V - 1 other views of the mean over confident images of CE(z_view, label)

    An image's confidence is the largest probability in its two global views. Confident are, without ties,
    the ⌊quantile · B⌋ images of the global batch that lie strictly above the next one, the threshold. (The
    published code takes a threshold on each process by itself.)

    logits: [V, B, C] after NBS, the first two views global. teacher_logits: [2, B, C] if a teacher's global
    views give confidence and label. riders: optional [K] numbers, averaged as in twist_loss.
    Under DDP the average of the processes' gradients is that of the global mean over confident images; where
    there are none in all, the loss is 0 and `fraction` too, and the optimiser's step should be left out.
    Raises ValueError if logits are not [V >= 2, B, C] or quantile is not in 0..1.
    """
    if logits.dim() != 3 or len(logits) < 2:
        raise ValueError(f"logits: expected [V >= 2, B, C], got {list(logits.shape)}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: expected 0 to 1, got {quantile}")
    V, B, C = logits.shape
    world_size = dist.get_world_size() if dist.is_initialized() else 1

    with torch.autocast(logits.device.type, enabled=False):
        z = _raise_precision(logits)
        view, label, confidence = anchors(z[:2] if teacher_logits is None else teacher_logits[:2])
        rides = confidence.new_zeros(0) if riders is None else riders.to(confidence)
        packed = [torch.cat([confidence, rides])] * world_size
        if world_size > 1:
            packed = [torch.empty_like(packed[0]) for _ in packed]
            dist.all_gather(packed, torch.cat([confidence, rides]))
        everywhere = torch.stack([each[:B] for each in packed]).flatten()            # [W·B]
        if riders is not None:
            riders.copy_(torch.stack([each[B:] for each in packed]).mean(0))

        ranked = everywhere.sort(descending=True).values
        threshold = ranked[min(int(quantile * len(ranked)), len(ranked) - 1)]
        number = (everywhere > threshold).sum()
        cross_entropy = F.cross_entropy(z.flatten(0, 1), label.repeat(V), reduction="none").view(V, B)
        others = torch.arange(V, device=z.device)[:, None] != view                   # [V, B]
        chosen = others & (confidence > threshold)
        # DDP divides the sum over processes by their number; an empty choice gives 0, not 0 / 0
        total = torch.where(chosen, cross_entropy, 0).sum() / ((V - 1) * number.clamp_min(1) / world_size)
    return SelfLabelLoss(total, threshold, number / len(everywhere))


# ---------------------------------------------------------------- Barlow Twins
class BarlowTwinsLoss(NamedTuple):
    """Scalars of the global batch: total = invariance + lambd * redundancy."""
    total: Tensor
    invariance: Tensor
    redundancy: Tensor


def barlow_twins_terms(z1, z2, lambd=0.0051, eps=1e-5, riders=None):
    """Barlow Twins' objective (arXiv 2103.03230, eq. 1-2) with its two terms.

        C_ij = mean_b z1_bi z2_bj, each dimension of z1 and z2 with mean 0 and variance 1 over the batch
        invariance = sum_i (C_ii - 1)²        redundancy = sum_{i≠j} C_ij²

    z1, z2: [B, D] of two views, before any batch norm: it is in here, of the global batch, with eps as its
    epsilon. riders: as for twist_loss. Under DDP values and averaged gradients are those of one process with
    the joined batch. (The published code's are right but for a factor 1 / W, as it divides by the global
    batch before a sum that autograd does not see.) Raises ValueError for other shapes.
    """
    if z1.dim() != 2 or z1.shape != z2.shape or len(z1) < 1:
        raise ValueError(f"z1, z2: expected two of [B, D], got {list(z1.shape)} and {list(z2.shape)}")
    B, D = z1.shape
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.stack([_raise_precision(z1), _raise_precision(z2)])                # [2, B, D]
        rides = z.new_zeros(0) if riders is None else riders.to(z)
        mean, rides = _global_mean(torch.cat([z.mean(1).flatten(), rides])).split([2 * D, len(rides)])
        if riders is not None:
            riders.copy_(rides)
        # The mean may be a constant: second moments about a point have slope 0 in it where it is the mean.
        z = z - mean.view(2, 1, D)
        local = torch.cat([z.square().mean(1), z[0].mT @ z[1] / B])                  # [2 + D, D]
        moments = local + (_global_mean(local) - local).detach()                     # as in _joined
        scale = (moments[:2] + eps).rsqrt()
        C = moments[2:] * scale[0][:, None] * scale[1]                               # [D, D]
        on, off = C.diagonal(), C - C.diagonal().diag()
        invariance, redundancy = (on - 1).square().sum(), off.square().sum()
    return BarlowTwinsLoss(invariance + lambd * redundancy, invariance, redundancy)


def barlow_twins_loss(z1, z2, lambd=0.0051):
    """The scalar to differentiate of barlow_twins_terms."""
    return barlow_twins_terms(z1, z2, lambd).total


# ---------------------------------------------------------------- SEED
def seed_target(teacher, queue, teacher_temperature=0.01):
    """SEED's target [B, 1 + K]: softmax of [t_b·t_b, t_b·q_1, ..., t_b·q_K] / teacher_temperature.

    Column 0 is the positive, whose similarity is 1, the greatest there is: at a low temperature it takes all
    the mass, and SEED becomes InfoNCE with the teacher's embedding as the positive. teacher: [B, D], queue:
    [K, D], L2-normalised here.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        t, q = (F.normalize(_raise_precision(x.detach()), dim=-1) for x in (teacher, queue))
        similarity = torch.cat([t.new_ones(len(t), 1), t @ q.T], 1)                  # [B, 1 + K]
        return (similarity / teacher_temperature).softmax(-1)


def seed_loss(student, teacher, queue, student_temperature=0.2, teacher_temperature=0.01):
    """SEED's objective (arXiv 2101.04731, section 3.2): cross-entropy between two similarity distributions.

        - mean_b sum_j P^t_bj log P^s_bj,   P^s_b = softmax([s_b·t_b, s_b·q_1, ..., s_b·q_K] / T_s)

    and P^t by seed_target. student, teacher: [B, D] embeddings of the same view, queue: [K, D] the teacher's
    of earlier images; all L2-normalised here; only the student gets a gradient. T_t: the released code has
    1e-4, which is one-hot, the paper is recalled to use 0.01. A mean over images, so DDP's average is the
    global one without a collective. Raises ValueError if shapes do not fit or a temperature is not above 0.
    """
    if student.dim() != 2 or student.shape != teacher.shape or student.shape[1:] != queue.shape[1:]:
        raise ValueError(f"expected student and teacher [B, D] and queue [K, D], got {list(student.shape)}, "
                         f"{list(teacher.shape)} and {list(queue.shape)}")
    if not (student_temperature > 0 and teacher_temperature > 0):
        raise ValueError(f"temperatures: expected above 0, got {student_temperature}, {teacher_temperature}")
    with torch.autocast(student.device.type, enabled=False):
        s, t, q = (F.normalize(_raise_precision(x), dim=-1)
                   for x in (student, teacher.detach(), queue.detach()))
        logits = torch.cat([(s * t).sum(-1, keepdim=True), s @ q.T], 1)              # [B, 1 + K]
        target = seed_target(t, q, teacher_temperature)
        return -(target * (logits / student_temperature).log_softmax(-1)).sum(-1).mean()
