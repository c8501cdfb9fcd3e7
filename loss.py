"""The objectives, each a function of tensors alone, with the paper's names.

TWIST (arXiv 2110.07402): V views of B images (per process) end in logits z over C classes, P = softmax(z).
Barlow Twins and SEED follow below it; they work on embeddings of D numbers.
"""

from collections import namedtuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

# Scalars. `total` is the one to differentiate; the others are values of the global batch, to be logged.
TwistLoss = namedtuple("TwistLoss", "total consistency sharpness diversity")
SelfLabelLoss = namedtuple("SelfLabelLoss", "total threshold fraction")
BarlowTwinsLoss = namedtuple("BarlowTwinsLoss", "total invariance redundancy")


# ---------------------------------------------------------------- TWIST
def twist_loss_two_views(z1, z2, alpha=1.0, beta=1.0, eps=1e-5):
    """TWIST's objective for two views, logits z1, z2 [B, C], as the paper defines it (eq. 2-5), in nats.

    Read this one first. Training uses `twist_loss`, the same for more views and processes.
    """
    def entropy(p):
        return -(p * torch.log(p + eps)).sum(-1)

    def kl(p, q):
        return (p * (torch.log(p + eps) - torch.log(q + eps))).sum(-1)

    p1, p2 = z1.softmax(-1), z2.softmax(-1)                                          # [B, C]
    consistency = (kl(p1, p2) + kl(p2, p1)).mean() / 2                   # the two views of an image agree
    sharpness = (entropy(p1).mean() + entropy(p2).mean()) / 2            # each image falls into one class
    diversity = (entropy(p1.mean(0)) + entropy(p2.mean(0))) / 2          # the batch covers all classes
    return TwistLoss(consistency + alpha * sharpness - beta * diversity, consistency, sharpness, diversity)


def twist_loss(logits, alpha=1.0, beta=1.0, eps=1e-5, num_global=2):
    """TWIST's objective: the mean of `twist_loss_two_views` over the pairs (global view, later view).

    logits: [V, B, C] after NBS; the first `num_global` views are global crops. Half precision is raised to
    float32. eps: stands inside every logarithm, as in the released code. 0 gives the exact limit, which is
    finite in values and gradients for any logits.
    Under DDP the values are those of the global batch. The gradient that DDP averages is that of one process
    with the joined batch. Raises ValueError for other shapes, or a num_global that is not in 1..V.
    """
    if logits.dim() != 3 or logits.shape[0] < 2 or logits.shape[1] < 1 or logits.shape[2] < 2:
        raise ValueError(f"logits: expected [V >= 2, B >= 1, C >= 2], got {list(logits.shape)}")
    V, B, _ = logits.shape
    if not 1 <= num_global <= V:
        raise ValueError(f"num_global: expected 1 to {V}, the number of views, got {num_global}")

    with torch.autocast(logits.device.type, enabled=False):
        z = raise_precision(logits)
        p = F.softmax(z, dim=-1)                                                     # [V, B, C]
        log_p = _log_probabilities(z, p, eps)                                        # [V, B, C]
        minus_entropy = (p * log_p).sum(-1)                                          # [V, B]

        # A global view is in a pair with each other view, a local view with each global one.
        G = num_global
        num_pairs = (G * (V - 1) + (V - G) * G) // 2
        is_global = torch.arange(V, device=z.device) < G     # built on the device: a copy to it would wait
        weight = torch.where(is_global, V - 1, G).to(z) / (2 * num_pairs)            # [V], sums to 1

        # No pair is formed: the cost is linear in V. For a pair (a, b), with a·b summed over classes,
        #   KL(a || b) + KL(b || a) = a·log a + b·log b - (a·log b + b·log a).
        # The first two terms are minus entropies. The cross terms factor into sums over views:
        #   Σ pairs (a·log b + b·log a) = Σ global a · (Σ global log b + Σ local log b)
        #       + Σ local a · Σ global log b - Σ global a·log a        (no view is in a pair with itself)
        p_global, p_local = (part.sum(0) for part in p.split([G, V - G]))            # [B, C] each
        log_p_global, log_p_local = (part.sum(0) for part in log_p.split([G, V - G]))
        products = p_global * (log_p_global + log_p_local) + p_local * log_p_global
        cross_terms = products.sum() - minus_entropy[:G].sum()

        sharpness = -weight @ minus_entropy.mean(1)                                  # of this process
        consistency = -cross_terms / (2 * num_pairs * B) - sharpness
        return _of_global_batch(p.mean(1), consistency, sharpness, weight, alpha, beta, eps)


def momentum_twist_loss(teacher_logits, logits, alpha=1.0, beta=1.0, eps=1e-5):
    """TWIST's objective with a momentum encoder, the teacher, whose softmax is Q. Only the student learns.

        consistency = mean of KL(Q^t_i || P^s_i) over images i, teacher's views t, student's views s ≠ t
        sharpness, diversity: as in `twist_loss`, but plain means over the V views of the student

    The paper only mentions the momentum encoder; this is the form of the released code.
    teacher_logits: [G, B, C] of the global views, which come first among the student's. It gets no gradient.
    logits: [V, B, C]. The rest is as in `twist_loss`. Raises ValueError for other shapes.
    """
    if logits.dim() != 3 or teacher_logits.dim() != 3 or logits.shape[1:] != teacher_logits.shape[1:] or not (
            1 <= len(teacher_logits) <= len(logits) >= 2):
        raise ValueError(f"logits: expected [V >= 2, B, C] and a teacher's [G <= V, B, C], got "
                         f"{list(logits.shape)} and {list(teacher_logits.shape)}")
    V, B, G = len(logits), logits.shape[1], len(teacher_logits)

    with torch.autocast(logits.device.type, enabled=False):
        z, z_teacher = raise_precision(logits), raise_precision(teacher_logits.detach())
        p, q = F.softmax(z, dim=-1), F.softmax(z_teacher, dim=-1)                    # [V, B, C], [G, B, C]
        log_p, log_q = _log_probabilities(z, p, eps), _log_probabilities(z_teacher, q, eps)

        # Σ q_t·(log q_t - log p_s) over s ≠ t: the cross terms of all t and s, less those of s = t
        minus_entropy = (q * log_q).sum(-1).sum()
        cross_terms = (q.sum(0) * log_p.sum(0)).sum() - (q * log_p[:G]).sum()
        consistency = ((V - 1) * minus_entropy - cross_terms) / (G * (V - 1) * B)
        sharpness = -(p * log_p).sum(-1).mean()
        weight = z.new_full((V,), 1 / V)
        return _of_global_batch(p.mean(1), consistency, sharpness, weight, alpha, beta, eps)


def _of_global_batch(m_local, consistency_local, sharpness_local, weight, alpha, beta, eps):
    """TwistLoss of the global batch from one process's batch means m_local [V, C] and its two other terms."""
    # One collective for all three: what it costs is the waiting, hardly the size.
    local = torch.cat([m_local.flatten(), torch.stack([consistency_local, sharpness_local])])
    m_global, terms = _mean_over_processes(local).split([m_local.numel(), 2])
    consistency = _with_value(consistency_local, terms[0])
    sharpness = _with_value(sharpness_local, terms[1])
    # Not a mean of the processes' diversities: the mean of entropies is not the entropy of the mean.
    m = _with_value(m_local, m_global.view_as(m_local))
    # Not xlogy where eps = 0: its slope at 0 is infinite, so an unused class would make the gradient NaN.
    log_m = torch.log(m + eps) if eps > 0 else torch.log(m.clamp_min(torch.finfo(m.dtype).tiny))
    diversity = -weight @ (m * log_m).sum(-1)
    return TwistLoss(consistency + alpha * sharpness - beta * diversity, consistency, sharpness, diversity)


# ---------------------------------------------------------------- precision and processes
def raise_precision(x):
    """Half and bfloat16 to float32; float64 stays. In bfloat16 0.01 + 1e-5 is 0.01: eps would be lost."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def all_gather(x, group=None):
    """x of each process, of one shape -> [W, *x.shape], by one collective into one tensor."""
    # torch renames it in 2.14, and warns of the name that older versions have
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    everyone = x.new_empty(dist.get_world_size(group) * x.numel())
    gather(everyone, x.contiguous().flatten(), group=group)
    return everyone.view(-1, *x.shape)


def _log_probabilities(z, p, eps):
    """log(p + eps) of p = softmax(z). For eps = 0 log_softmax, which is finite where p has rounded to 0."""
    return torch.log(p + eps) if eps > 0 else F.log_softmax(z, dim=-1)


def _mean_over_processes(local):
    """Mean over processes by one collective; without a process group, `local`. Autograd does not see it."""
    mean = local.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean


def _with_value(local, value):
    """The global batch's `value` with the gradient of this process's `local` term.

    Let m be the mean over W processes of m_w. The gradient of f(m) is the mean of f'(m)·dm_w: each process
    computes its own f'(m)·dm_w, DDP takes the mean. An all_reduce inside autograd would make it W times that.
    """
    return local + (value - local).detach()


# ---------------------------------------------------------------- self-labelling
def anchors(logits):
    """For each image the more confident of two views [2, B, C]: (view [B], label [B], confidence [B]).

    The confidence is the largest probability, the label its class. Of equal views the first is taken.
    """
    confidences, labels = raise_precision(logits.detach()).softmax(-1).max(-1)      # [2, B] each
    confidence, view = confidences.max(0)
    return view, labels.gather(0, view[None])[0], confidence


def self_label_loss(logits, quantile, teacher_logits=None):
    """Self-labelling: the more confident global view of an image labels all its other views.

        mean of CE(z_view, label) over the confident images and their V - 1 other views

    An image is confident if it is above the threshold: the (⌊quantile · N⌋ + 1)-th largest confidence of the
    N images in the global batch. (The released code takes a threshold for each process.)

    logits: [V, B, C] after NBS, the first two views global. teacher_logits: [2, B, C] of the global views, if
    a teacher gives confidence and label. Under DDP the mean of totals and gradients over processes is that of
    the joined batch. If no image is confident anywhere, total and fraction are 0, and the caller should skip
    the optimiser's step. Raises ValueError for other shapes, or a quantile that is not in 0..1.
    """
    if logits.dim() != 3 or len(logits) < 2:
        raise ValueError(f"logits: expected [V >= 2, B, C], got {list(logits.shape)}")
    if teacher_logits is not None and teacher_logits.shape != (2, *logits.shape[1:]):
        raise ValueError(f"teacher_logits: expected [2, B, C] of {list(logits.shape)}, got "
                         f"{list(teacher_logits.shape)}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: expected 0 to 1, got {quantile}")
    V, B, _ = logits.shape
    world_size = dist.get_world_size() if dist.is_initialized() else 1

    with torch.autocast(logits.device.type, enabled=False):
        z = raise_precision(logits)
        view, label, confidence = anchors(z[:2] if teacher_logits is None else teacher_logits)
        everyone = all_gather(confidence) if world_size > 1 else confidence
        ranked = everyone.flatten().sort(descending=True).values                     # [N]
        threshold = ranked[min(int(quantile * len(ranked)), len(ranked) - 1)]
        # Not >=: where all images are equally confident, as after a collapse, none gets a label.
        num_confident = (ranked > threshold).sum()

        cross_entropy = F.cross_entropy(z.flatten(0, 1), label.repeat(V), reduction="none").view(V, B)
        other_view = torch.arange(V, device=z.device)[:, None] != view               # [V, B]
        chosen = torch.where(other_view & (confidence > threshold), cross_entropy, 0)
        # The global number, so that each confident image weighs the same in whatever process it is.
        # clamp_min: none gives 0, not 0 / 0. world_size: DDP divides by it.
        total = chosen.sum() / ((V - 1) * num_confident.clamp_min(1) / world_size)
    return SelfLabelLoss(total, threshold, num_confident / len(ranked))


# ---------------------------------------------------------------- Barlow Twins
def barlow_twins_terms(z1, z2, lambd=0.0051, eps=1e-5):
    """Barlow Twins' objective (arXiv 2103.03230, eq. 1-2): total = invariance + lambd * redundancy.

        C_ij = mean_b z1_bi z2_bj, each dimension of z1 and z2 with mean 0 and variance 1 over the batch
        invariance = sum_i (C_ii - 1)²        redundancy = sum_{i≠j} C_ij²

    z1, z2: [B, D] embeddings of two views. They are normalised here; eps is added to the variance. Under DDP
    values and averaged gradients are those of one process with the joined batch. (In the released code the
    gradient is W times smaller: it divides by the global batch before a sum that autograd does not see.)
    Raises ValueError for other shapes.
    """
    if z1.dim() != 2 or z1.shape != z2.shape or len(z1) < 1:
        raise ValueError(f"z1, z2: expected two of [B, D], got {list(z1.shape)} and {list(z2.shape)}")
    B, D = z1.shape
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.stack([raise_precision(z1), raise_precision(z2)])                # [2, B, D]
        # The mean m may be a constant: the derivative of E[(z - m)²] in m is 0 at m = E[z]. It is taken off
        # first, by a collective of its own, because E[z²] - m² would cancel where m is large.
        centred = z - _mean_over_processes(z.mean(1))[:, None]
        local = torch.cat([centred.square().mean(1), centred[0].mT @ centred[1] / B])    # [2 + D, D]
        variance, covariance = _with_value(local, _mean_over_processes(local)).split([2, D])
        scale = (variance + eps).rsqrt()                                             # [2, D]
        C = covariance * scale[0][:, None] * scale[1]                                # [D, D]
        on_diagonal, off_diagonal = C.diagonal(), C - C.diagonal().diag()
        invariance, redundancy = (on_diagonal - 1).square().sum(), off_diagonal.square().sum()
    return BarlowTwinsLoss(invariance + lambd * redundancy, invariance, redundancy)


def barlow_twins_loss(z1, z2, lambd=0.0051):
    """The total of `barlow_twins_terms`, a scalar to differentiate."""
    return barlow_twins_terms(z1, z2, lambd).total


# ---------------------------------------------------------------- SEED
def seed_target(teacher, queue, teacher_temperature=0.01):
    """SEED's target P^t [B, 1 + K]: softmax of [t_b·t_b, t_b·q_1, ..., t_b·q_K] / teacher_temperature.

    teacher: [B, D], queue: [K, D]; L2-normalised here. Column 0 is the image itself, whose similarity, 1, is
    the largest possible. At a low temperature it takes all the mass: SEED becomes InfoNCE with the teacher's
    embedding as the positive.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        t, q = (F.normalize(raise_precision(x.detach()), dim=-1) for x in (teacher, queue))
        similarity = torch.cat([t.new_ones(len(t), 1), t @ q.T], 1)
        return (similarity / teacher_temperature).softmax(-1)


def seed_loss(student, teacher, queue, student_temperature=0.2, teacher_temperature=0.01):
    """SEED's objective (arXiv 2101.04731, section 3.2): cross-entropy between two similarity distributions.

        - mean_b sum_j P^t_bj log P^s_bj,   P^s_b = softmax([s_b·t_b, s_b·q_1, ..., s_b·q_K] / T_s)

    with P^t from `seed_target`. student, teacher: [B, D] embeddings of the same views. queue: [K, D], the
    teacher's of earlier images. All are L2-normalised here; only the student gets a gradient. The released
    code's teacher temperature is 1e-4, which makes the target one-hot. No collective: it is a mean over
    images, so DDP's average is the global gradient. Raises ValueError if shapes or temperatures do not fit.
    """
    if student.dim() != 2 or student.shape != teacher.shape or student.shape[1:] != queue.shape[1:]:
        raise ValueError(f"expected student and teacher [B, D] and queue [K, D], got {list(student.shape)}, "
                         f"{list(teacher.shape)} and {list(queue.shape)}")
    if not (student_temperature > 0 and teacher_temperature > 0):
        raise ValueError(f"temperatures: expected above 0, got {student_temperature}, {teacher_temperature}")
    with torch.autocast(student.device.type, enabled=False):
        s, t, q = (F.normalize(raise_precision(x), dim=-1)
                   for x in (student, teacher.detach(), queue.detach()))
        logits = torch.cat([(s * t).sum(-1, keepdim=True), s @ q.T], 1)              # [B, 1 + K]
        target = seed_target(t, q, teacher_temperature)
        return -(target * (logits / student_temperature).log_softmax(-1)).sum(-1).mean()
