"""Mathematics of clusters: k-means, the silhouette, and scores of two partitions against each other."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.special import gammaln


# ---------------------------------------------------------------- k-means
def cluster_features(train_features, features, num_clusters, starts, seed, device):
    """Clusters [N] of features [N, D] by k-means on train_features [M, D]; both are L2-normalised here.

    Features are arrays. Returns (clusters, cosine similarity of each feature to its centre [N], inertia).
    """
    train, x = (F.normalize(torch.from_numpy(part).to(device), dim=1) for part in (train_features, features))
    centres, inertia = kmeans(train, num_clusters, starts, seed)
    clusters = nearest_centres(x, centres)[0]
    similarity = torch.cosine_similarity(x, centres[clusters])
    return clusters.cpu().numpy(), similarity.cpu().numpy(), inertia


def cluster_pixels(images, num_clusters, seed):
    """Clusters [N] of uint8 images [N, C, H, W] by one start of scipy's k-means, a baseline."""
    return kmeans2(images.flatten(1).float().numpy(), num_clusters, iter=50, minit="++", seed=seed)[1]


def kmeans(features, num_clusters, starts=10, seed=0, iterations=300):
    """(centres [K, D], inertia) of k-means: of several starts that with the lowest inertia.

    features: [N, D], on any device. A start draws its centres by k-means++ from (seed, number of the start).
    Inertia is the sum of squared distances to the nearest centres. Raises ValueError for more clusters than
    features.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(f"num_clusters: {num_clusters} clusters of {len(features)} images")
    best, lowest = None, torch.inf
    for start in range(starts):
        rng = np.random.default_rng([seed, 10, start])
        centres, inertia = lloyd(features, kmeans_plus_plus(features, num_clusters, rng), iterations)
        if best is None or inertia < lowest:
            best, lowest = centres, inertia
    return best, lowest


def kmeans_plus_plus(features, num_clusters, rng, chunk=65536):
    """Centres [K, D], features drawn in turn: each by its squared distance to the nearest centre so far."""
    chosen = [int(rng.integers(len(features)))]
    nearest = torch.full((len(features),), torch.inf, dtype=torch.float64)
    while len(chosen) < num_clusters:
        distances = [((part - features[chosen[-1]]) ** 2).sum(1) for part in features.split(chunk)]
        nearest = nearest.minimum(torch.cat(distances).cpu().double())
        cumulated = nearest.cumsum(0).numpy()
        place = np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right")
        chosen.append(min(int(place), len(features) - 1))        # no distance is left: the last one
    return features[chosen]


def lloyd(features, centres, iterations=300):
    """(centres [K, D], inertia) after Lloyd's iterations, until no image changes its cluster.

    centres: [K, D], to start from. One without images stays where it is.
    """
    before = None
    for _ in range(iterations):
        clusters, distances, sums = nearest_centres(features, centres)
        if before is not None and clusters.equal(before):
            break
        before, sizes = clusters, clusters.bincount(minlength=len(centres))[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return centres, distances.sum().item()


def nearest_centres(features, centres, chunk=4096):
    """(clusters [N], squared distances [N], sums [K, D] of each cluster's features)."""
    clusters, distances, sums = [], [], _wide(torch.zeros_like(centres))
    for part in features.split(chunk):
        scores = part @ centres.T - (centres ** 2).sum(1) / 2                     # greatest at the nearest
        ids = scores.argmax(1)
        clusters.append(ids)
        distances.append(_wide(((part - centres[ids]) ** 2).sum(1)))
        # not index_add_, whose order of summation differs from run to run on a GPU
        sums += _wide(F.one_hot(ids, len(centres)).to(part).T @ part)
    return torch.cat(clusters), torch.cat(distances), sums.to(centres)


def _wide(x):
    """x in float64, but on MPS, which has none, as it is."""
    return x if x.device.type == "mps" else x.double()


# ---------------------------------------------------------------- scores
def silhouette(features, predictions, chunk=4096):
    """Mean silhouette of clusters [N] by the cosine distance of features [N, D] (Rousseeuw 1987).

    For each image (b - a) / max(a, b): a is its mean distance to the others of its cluster, b that to the
    nearest other cluster; 0 for one alone. As 1 - x·y is linear in y, sums over clusters replace all N x N
    distances. None if there are fewer than two clusters, or as many as images.
    """
    _, ids, sizes = np.unique(predictions, return_inverse=True, return_counts=True)
    K, N = len(sizes), len(ids)
    if not 2 <= K < N:
        return None
    x = F.normalize(torch.as_tensor(features).double(), dim=1)
    ids, sizes = torch.from_numpy(ids), torch.from_numpy(sizes)
    sums = x.new_zeros(K, x.shape[1]).index_add_(0, ids, x)
    total = 0.0
    for i in range(0, N, chunk):
        part, own = x[i:i + chunk], ids[i:i + chunk, None]
        distance = sizes - part @ sums.T                                          # [B, K], sums over clusters
        itself = 1 - (part * part).sum(1, keepdim=True)                           # 0, but for a zero feature
        a = (distance.gather(1, own) - itself) / (sizes[own] - 1)
        b = (distance / sizes).scatter(1, own, torch.inf).amin(1, keepdim=True)
        total += ((b - a) / torch.maximum(a, b)).where(sizes[own] > 1, 0).nan_to_num(0).sum().item()
    return total / N


def partition_scores(counts):
    """NMI, AMI, ARI and FMI of counts [K, C] (clusters x classes), with scikit-learn's conventions.

    NMI = 2 I / (H_K + H_C) and AMI = (I - E[I]) / ((H_K + H_C) / 2 - E[I]) are those of TWIST's tables;
    ami_max has max(H_K, H_C) instead of the mean, as the paper prints the formula. ARI: Hubert & Arabie 1985.
    FMI: Fowlkes & Mallows 1983, the "F" of the published log.
    """
    N = int(counts.sum())
    a, b = counts.sum(1), counts.sum(0)
    i, j = np.nonzero(counts)
    n, a_i, b_j = counts[i, j], a[i], b[j]
    a, b = a[a > 0], b[b > 0]
    if len(a) == len(b) == len(n):       # the same partition twice: 1 by definition (0 / 0 for singletons)
        nmi = ami = ami_max = 1.0
    else:
        mi = max(0.0, np.sum(n / N * (np.log(n) + math.log(N) - np.log(a_i) - np.log(b_j))))
        emi, p_a, p_b = expected_mutual_information(a, b), a / a.sum(), b / b.sum()
        h_a, h_b = -np.sum(p_a * np.log(p_a)), -np.sum(p_b * np.log(p_b))         # entropies in nats
        nmi = 2 * mi / (h_a + h_b)
        ami, ami_max = (mi - emi) / ((h_a + h_b) / 2 - emi), (mi - emi) / (max(h_a, h_b) - emi)

    # Ordered pairs of images; Python's integers, because products of two such numbers overflow 64 bits.
    together, pairs = int(n @ n) - N, N * (N - 1)
    same_cluster, same_class = int(a @ a) - N, int(b @ b) - N
    spread = (same_cluster + same_class) * pairs - 2 * same_cluster * same_class
    ari = 2 * (together * pairs - same_cluster * same_class) / spread if spread else 1.0
    fmi = together / math.sqrt(same_cluster * same_class) if together else 0.0
    return {"nmi": float(nmi), "ami": float(ami), "ami_max": float(ami_max), "ari": ari, "fmi": fmi}


def expected_mutual_information(a, b):
    """Mean mutual information, in nats, of random partitions with part sizes a and b (Vinh et al. 2010).

    The overlap n of parts of sizes a_i and b_j is hypergeometric, so its term depends on these two only and
    is computed once for each pair of distinct sizes: N images have fewer than sqrt(2 N) of them.
    """
    N = a.sum()
    log_factorial = gammaln(np.arange(N + 1) + 1.0)
    b, b_times = np.unique(b, return_counts=True)
    total = 0.0
    for a_i, a_times in zip(*np.unique(a, return_counts=True), strict=True):
        # More than 10 sqrt(mean) below the mean, or 10 sqrt(mean) + 34 above it, lies less than exp(-49) of
        # the probability (Chernoff's bound). Leaving that tail out makes large parts cheap.
        mean = a_i * b / N
        low, high = mean - 10 * np.sqrt(mean), mean + 10 * np.sqrt(mean) + 34
        first = np.maximum(np.maximum(1, a_i + b - N), low.astype(np.int64))
        last = np.minimum(np.minimum(a_i, b), high.astype(np.int64))
        count = last - first + 1
        j = np.repeat(np.arange(len(b)), count)                           # the part b_j of each term
        n = np.arange(len(j)) + (first + count - np.cumsum(count))[j]     # first..last, for each j in turn
        b_j = b[j]
        log_p = (log_factorial[a_i] + log_factorial[N - a_i] - log_factorial[N]
                 + log_factorial[b_j] + log_factorial[N - b_j] - log_factorial[n]
                 - log_factorial[a_i - n] - log_factorial[b_j - n] - log_factorial[N - a_i - b_j + n])
        total += a_times * np.sum(b_times[j] * np.exp(log_p) * n / N * np.log(N * n / (a_i * b_j)))
    return total
