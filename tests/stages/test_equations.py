"""Each equation in README.md, docs/method.md and the walkthrough is what the code computes.

Beside each equation, as it stands in the page, is a check that writes it out in plain torch, with loops, and
compares with the code. An equation that is new or has changed has no check, and the test fails.
"""

import itertools
import math
import re
import sys

import numpy as np
import pytest
import torch
from processes import ROOT

import cluster_eval
import loss
from model import BatchNorm
from pictures import sharpest_with_nbs

sys.path.append(str(ROOT / "docs"))
from make_walkthrough import read_cells  # noqa: E402

torch.manual_seed(0)
ALPHA, BETA = 0.7, 1.3
Z = torch.randn(2, 6, 5, dtype=torch.float64) * 3              # two views, B = 6, C = 5


def same(a, b):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64),
                               torch.as_tensor(b, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def softmax(z):
    return [math.exp(z_c) / sum(math.exp(z_k) for z_k in z) for z_c in z.tolist()]


def entropy(P):
    return -sum(p * math.log(p) for p in P if p > 0)


def kl(P, Q):
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(P, Q, strict=True))


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


# ---------------------------------------------------------------- TWIST
def check_softmax():
    same(loss.anchors(Z)[2], [max(max(softmax(a)), max(softmax(b))) for a, b in zip(*Z, strict=True)])


def check_entropy():
    """Sharpness of a batch with one image, whose two views are equal."""
    z = Z[0, :1]
    same(loss.twist_loss(torch.stack([z, z]), eps=0).sharpness, entropy(softmax(z[0])))


def check_kl():
    """Consistency of a batch with one image."""
    P, Q = softmax(Z[0, 0]), softmax(Z[1, 0])
    same(loss.twist_loss(Z[:, :1], eps=0).consistency, (kl(P, Q) + kl(Q, P)) / 2)


def check_twist():
    P1, P2 = ([softmax(z) for z in view] for view in Z)
    B = len(P1)
    consistency = 1 / 2 * 1 / B * sum(kl(p, q) + kl(q, p) for p, q in zip(P1, P2, strict=True))
    sharpness = 1 / 2 * sum(1 / B * sum(entropy(p) for p in P) for P in (P1, P2))
    diversity = 1 / 2 * sum(entropy(mean(P)) for P in (P1, P2))
    total = consistency + ALPHA * sharpness - BETA * diversity
    for computed in (loss.twist_loss(Z, ALPHA, BETA, 0), loss.twist_loss_two_views(*Z, ALPHA, BETA, 0)):
        same(torch.stack(computed), [total, consistency, sharpness, diversity])


def check_symmetric_kl():
    P, Q = softmax(Z[0, 0]), softmax(Z[1, 0])
    short = sum((p - q) * (math.log(p) - math.log(q)) for p, q in zip(P, Q, strict=True))
    same(kl(P, Q) + kl(Q, P), short)
    same(2 * loss.twist_loss(Z[:, :1], eps=0).consistency, short)


def check_lower_bound():
    balanced = 100.0 * torch.eye(5, dtype=torch.float64).repeat(2, 1)
    same(loss.twist_loss(torch.stack([balanced, balanced]), eps=0).total, -math.log(5))


def check_nbs():
    z = Z[0]
    mu = [sum(column) / len(z) for column in z.T.tolist()]
    var = [sum((x - m) ** 2 for x in column) / len(z) for column, m in zip(z.T.tolist(), mu, strict=True)]
    by_hand = [[(x - m) / math.sqrt(v) for x, m, v in zip(row, mu, var, strict=True)] for row in z.tolist()]
    torch.testing.assert_close(BatchNorm(5, affine=False).double()(z), torch.tensor(by_hand).double(),
                               atol=1e-4, rtol=0)             # the code adds 1e-5 to the variance


def check_bound_of_nbs():
    for C in (3, 10, 40):
        h = math.sqrt(C - 1)
        r = (C - 1) * math.exp(-h - 1 / h)
        same(sharpest_with_nbs(C), math.log(1 + r) + r / (1 + r) * (h + 1 / h))
        logits = torch.full((C, C), -1 / h, dtype=torch.float64).fill_diagonal_(h)  # of one image a class
        same(logits.mean(0), torch.zeros(C))
        same(logits.var(0, unbiased=False), torch.ones(C))
        same(sharpest_with_nbs(C), entropy(softmax(logits[0])))
        if C == 10:
            assert f"{sharpest_with_nbs(C):.2f}" == "1.09"
            assert f"{sharpest_with_nbs(C) - math.log(10):.2f}" == "-1.21"


def check_self_label():
    P = [[softmax(z) for z in view] for view in torch.cat([Z, Z[:1].flip(0) + 1])]           # V = 3
    V, B = 3, len(P[0])
    surest = [max((0, 1), key=lambda v: max(P[v][i])) for i in range(B)]                    # a_i
    certainty = [max(P[surest[i]][i]) for i in range(B)]
    threshold = sorted(certainty, reverse=True)[B // 2]
    S = [i for i in range(B) if certainty[i] > threshold]
    total = 0
    for i in S:
        y = P[surest[i]][i].index(certainty[i])
        total += sum(-math.log(P[v][i][y]) for v in range(V) if v != surest[i])
    computed = loss.self_label_loss(torch.cat([Z, Z[:1].flip(0) + 1]), 0.5)
    assert 0 < len(S) < B
    same(computed.total, total / (len(S) * (V - 1)))


# ---------------------------------------------------------------- Barlow Twins, SEED
def normalized(column):
    m = sum(column) / len(column)
    deviation = math.sqrt(sum((x - m) ** 2 for x in column) / len(column))
    return [(x - m) / deviation for x in column]


def check_barlow():
    B, D = 6, 5
    z1, z2 = ([normalized(column) for column in z.T.tolist()] for z in Z)                   # [D][B]
    C = [[sum(z1[i][b] * z2[j][b] for b in range(B)) / B for j in range(D)] for i in range(D)]
    invariance = sum((C[i][i] - 1) ** 2 for i in range(D))
    redundancy = sum(C[i][j] ** 2 for i in range(D) for j in range(D) if i != j)
    computed = loss.barlow_twins_terms(*Z, lambd=0.3, eps=0)
    same(torch.stack(computed), [invariance + 0.3 * redundancy, invariance, redundancy])


def check_seed():
    T_s, T_t = 0.2, 0.07
    queue = torch.randn(7, 5, dtype=torch.float64)
    s, t, q = ([[x / math.hypot(*row) for x in row] for row in z.tolist()] for z in (*Z, queue))

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))
    total = 0
    for s_b, t_b in zip(s, t, strict=True):
        P_t = softmax(torch.tensor([dot(t_b, t_b), *(dot(t_b, q_j) for q_j in q)]) / T_t)
        P_s = softmax(torch.tensor([dot(s_b, t_b), *(dot(s_b, q_j) for q_j in q)]) / T_s)
        total -= sum(p * math.log(p_s) for p, p_s in zip(P_t, P_s, strict=True)) / len(s)
    torch.testing.assert_close(loss.seed_loss(*Z, queue, T_s, T_t).item(), total, rtol=1e-5, atol=0)


# ---------------------------------------------------------------- metrics
COUNTS = np.array([[6, 1, 0], [5, 3, 1], [0, 1, 7]])
CLUSTERS, LABELS = (np.repeat(ids.ravel(), COUNTS.ravel()) for ids in np.indices((3, 3)))


def check_acc():
    best = max(sum(COUNTS[k, pi[k]] for k in range(3)) for pi in itertools.permutations(range(3)))
    same(cluster_eval.evaluate(LABELS, CLUSTERS)["acc"], best / COUNTS.sum())


def check_nmi():
    joint = COUNTS / COUNTS.sum()
    H_U, H_Y, H_UY = entropy(joint.sum(1)), entropy(joint.sum(0)), entropy(joint.ravel())
    same(cluster_eval.evaluate(LABELS, CLUSTERS)["nmi"], 2 * (H_U + H_Y - H_UY) / (H_U + H_Y))


# ---------------------------------------------------------------- the pages
UNDERBRACED = r"""
    \mathcal{L} = \underbrace{\tfrac12 \tfrac1B \sum_i \left[ KL(P^1_i \| P^2_i) + KL(P^2_i \| P^1_i) \right]
    }_{\text{consistency}} + \alpha \underbrace{\tfrac12 \sum_v \tfrac1B \sum_i H(P^v_i)}_{\text{sharpness}}
    - \beta \underbrace{\tfrac12 \sum_v H\!\left(\tfrac1B \sum_i P^v_i\right)}_{\text{diversity}}"""
EQUATIONS = {
    "README.md": [(r"""
        \mathcal{L} = \tfrac12 \tfrac1B \sum_i \left[ KL(P^1_i \| P^2_i) + KL(P^2_i \| P^1_i) \right]
        + \alpha \tfrac12 \sum_v \tfrac1B \sum_i H(P^v_i)
        - \beta \tfrac12 \sum_v H\!\left(\tfrac1B \sum_i P^v_i\right)""", check_twist)],
    "docs/method.md": [
        (UNDERBRACED, check_twist),
        (r"KL(p \| q) + KL(q \| p) = (p - q) \cdot (\log p - \log q)", check_symmetric_kl),
        (r"""\mathcal{L} = \underbrace{\sum_i (\mathcal{C}_{ii} - 1)^2}_{\text{invariance}}
            + \lambda \underbrace{\sum_{i \neq j} \mathcal{C}_{ij}^2}_{\text{redundancy}}
            \qquad \mathcal{C}_{ij} = \tfrac1B \sum_b \hat z^1_{b,i}\, \hat z^2_{b,j}""", check_barlow),
        (r"""\mathcal{L} = -\tfrac1B \sum_b \sum_{j=0}^{K} P^t_{bj} \log P^s_{bj} \qquad
            P^t_b = \mathrm{softmax}\left(\tfrac{1}{T_t} [t_b \cdot t_b,\, t_b \cdot q_1,\, \ldots]\right)
            \qquad P^s_b = \mathrm{softmax}\left(\tfrac{1}{T_s} [s_b \cdot t_b,\, s_b \cdot q_1,\,
            \ldots]\right)""", check_seed)],
    "the walkthrough": [
        (r"P_{ic} = \frac{e^{z_{ic}}}{\sum_{c'} e^{z_{ic'}}}", check_softmax),
        (r"H(P) = -\sum_c P_c \ln P_c", check_entropy),
        (r"KL(P \| Q) = \sum_c P_c \left( \ln P_c - \ln Q_c \right)", check_kl),
        (UNDERBRACED, check_twist),
        (r"""\hat z_{ic} = \frac{z_{ic} - \mu_c}{\sigma_c} \qquad \mu_c = \tfrac1B \sum_i z_{ic}
            \qquad \sigma_c^2 = \tfrac1B \sum_i (z_{ic} - \mu_c)^2""", check_nbs),
        (r"""H_{\min} = \ln(1 + r) + \frac{r}{1 + r} \left( h + \tfrac1h \right) \qquad h = \sqrt{C - 1}
            \qquad r = (C - 1)\, e^{-h - 1/h}""", check_bound_of_nbs),
        (r"1.09 - \ln 10 = -1.21", check_bound_of_nbs),
        (r"\mathrm{ACC} = \max_{\pi} \tfrac1N \sum_k n_{k \pi(k)}", check_acc),
        (r"""\mathrm{NMI} = \frac{2\, I(U; Y)}{H(U) + H(Y)}
            \qquad I(U; Y) = H(U) + H(Y) - H(U, Y)""", check_nmi),
        (r"\mathcal{L} \geq 0 + 0 - \ln C", check_lower_bound),
        (r"KL(P \| Q) + KL(Q \| P) = \sum_c (P_c - Q_c) (\ln P_c - \ln Q_c)", check_symmetric_kl),
        (r"""\mathcal{L}_{\text{self}} = \frac{1}{|S| (V - 1)} \sum_{i \in S} \sum_{v \neq a_i}
            -\ln P^v_{i y_i}""", check_self_label)],
}


def written(equation):
    """An equation without its line breaks and spaces, which mean nothing."""
    return re.sub(r"\s+", "", equation)


def equations_of(page):
    """All $$equations$$ of a page, and its $formulas$ with an equals sign, without values ($C = 10$)."""
    if page == "the walkthrough":
        text = "\n\n".join(source for kind, source in read_cells() if kind == "markdown")
    else:
        text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    displayed = re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL)
    inline = re.findall(r"\$([^$]+)\$", re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL))
    values = re.compile(r"(\\?\w+ = )+[\d.]+")
    inline = [formula for formula in inline if "=" in formula and not values.fullmatch(formula)]
    return [written(found) for found in displayed + inline]


@pytest.mark.parametrize("page", EQUATIONS)
def test_each_equation_of_a_page_has_a_check(page):
    found, checked = equations_of(page), [written(equation) for equation, _ in EQUATIONS[page]]
    assert sorted(found) == sorted(checked), f"in {page} but not in the table, or the other way round"


@pytest.mark.parametrize("check", dict.fromkeys(check for rows in EQUATIONS.values() for _, check in rows),
                         ids=lambda check: check.__name__.removeprefix("check_"))
def test_an_equation_is_what_the_code_computes(check):
    check()
