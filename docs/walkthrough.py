# %% [markdown]
# # TWIST in two hours
#
# A network sorts 60,000 pictures of clothing into ten classes, and nobody tells it what a class is. This
# notebook builds the method ([arXiv 2110.07402](https://arxiv.org/abs/2110.07402)) step by step: its loss,
# the two ways in which training can fail, the views, a training, and the scores. It uses the functions of
# this repository; the code that you meet here is the code that trains.
#
# | part | about | minutes in class |
# |---|---|---|
# | 1 to 3 | class distributions, the loss, collapses | 35 |
# | 4 | NBS, the batch norm before the softmax | 15 |
# | 5 and 6 | views and training | 30 |
# | 7 | matching of clusters to classes, ACC and NMI | 20 |
# | 8 to 10 | features, self-labelling, exercises | 20 |
#
# All cells together take about three minutes of one slow CPU core. A GPU is not needed.
# `docs/make_walkthrough.py` makes this file from `docs/walkthrough.py`.

# %%
# On Colab (written, not run): enter the repository's address and take away the # of these lines.
# address = "…"
# !git clone {address} twist
# %cd twist

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from cluster_eval import evaluate
from data import FASHION_MNIST_CLASSES, Batches, build_dataset, eval_batches, input_of
from knn import knn_predict, whiten
from loss import anchors, self_label_loss, twist_loss
from model import BatchNorm, Twist
from optim import param_groups, warmup_cosine
from pictures import sharpest_with_nbs
from predictions import predict
from views import build_views

torch.set_num_threads(1)                   # two are faster, if nothing else runs
plt.rcParams.update({"figure.dpi": 64, "font.size": 9, "figure.constrained_layout.use": True})

# %% [markdown]
# ## 1. A class distribution
#
# The network ends in $C$ numbers for each image $i$, the logits $z_{ic}$. The softmax makes a distribution
# over classes from them:
#
# $$P_{ic} = \frac{e^{z_{ic}}}{\sum_{c'} e^{z_{ic'}}}$$
#
# Its entropy tells how undecided it is: 0 if one class has all the probability, $\ln C$ if all have the
# same. With the natural logarithm its unit is the *nat* (1 nat is 1.44 bits).
#
# $$H(P) = -\sum_c P_c \ln P_c$$

# %%
def H(P):
    return torch.special.entr(P).sum(-1)                       # entr(p) is -p ln p, and 0 for p = 0

z = torch.tensor([[0.0, 0, 0, 0], [1, 3, 0, 1], [0, 0, 9, 0]])                    # 3 images, C = 4
P = z.softmax(-1)

figure, grid = plt.subplots(1, 3, figsize=(8, 2), sharey=True)
for i, axes in enumerate(grid):
    axes.bar(range(4), P[i])
    axes.set(title=f"image {i}: H = {H(P[i]):.3f} nats", xlabel="class", xticks=range(4), ylim=(0, 1))
grid[0].set_ylabel("probability")
plt.show()
print(f"ln 4 = {np.log(4):.3f}")

# %% [markdown]
# ## 2. The loss, from its formula
#
# Two random views of an image show the same thing, so their distributions should agree. The Kullback-Leibler
# divergence measures how far they are apart:
#
# $$KL(P \| Q) = \sum_c P_c \left( \ln P_c - \ln Q_c \right)$$
#
# It is never negative, it is 0 only for equal distributions, and its two directions differ, so the loss takes
# both.
#
# The loss has three terms, for a batch of $B$ images with two views each:
#
# $$\mathcal{L} = \underbrace{\tfrac12 \tfrac1B \sum_i
# \left[ KL(P^1_i \| P^2_i) + KL(P^2_i \| P^1_i) \right]}_{\text{consistency}}
# + \alpha \underbrace{\tfrac12 \sum_v \tfrac1B \sum_i H(P^v_i)}_{\text{sharpness}}
# - \beta \underbrace{\tfrac12 \sum_v H\!\left(\tfrac1B \sum_i P^v_i\right)}_{\text{diversity}}$$
#
# *Consistency*: the views of an image agree. *Sharpness*: each image falls into one class. *Diversity*: the
# batch covers all classes. Mind where the mean over the batch stands in the last two terms: outside the
# entropy, then inside it. Here are the ten lines, with $\alpha = \beta = 1$, on random logits.

# %%
def KL(P, Q):
    return (P * (P.log() - Q.log())).sum(-1)

torch.manual_seed(0)
z = 2 * torch.randn(2, 5, 4)                                                      # 2 views, B = 5, C = 4
P1, P2 = z.softmax(-1)
B = len(P1)
consistency = 1 / 2 * 1 / B * sum(KL(P1[i], P2[i]) + KL(P2[i], P1[i]) for i in range(B))
sharpness = 1 / 2 * sum(1 / B * sum(H(P[i]) for i in range(B)) for P in (P1, P2))
diversity = 1 / 2 * sum(H(1 / B * sum(P[i] for i in range(B))) for P in (P1, P2))
total = consistency + sharpness - diversity

ours = twist_loss(z, eps=0)                # with eps > 0, as in training, every logarithm is log(p + eps)
torch.testing.assert_close(torch.stack([total, consistency, sharpness, diversity]), torch.stack(ours))
for name, value in ours._asdict().items():
    print(f"{name:<12}{value:7.4f}")

# %% [markdown]
# ## 3. Two collapses and the optimum
#
# A network may satisfy two of the terms and learn nothing. If *every output is uniform*, the views agree
# and the batch is diverse, but no image is sharp. If *all images are in one class*, the views agree and
# every image is sharp, but the batch is not diverse. In both cases the loss is 0: whenever all images have
# one distribution $P$, sharpness and diversity are both $H(P)$. What diversity has more than sharpness is
# the *mutual information* of image and class: how many nats the class tells about the image. So with
# $\alpha = \beta = 1$ the loss is consistency minus this information. Its minimum, $-\ln C$, needs all three
# terms: each image in one class, each class with the same share.

# %%
classes = torch.arange(20) % 10                                                   # of 20 images
cases = {"uniform": torch.zeros(20, 10),
         "one class": 100.0 * F.one_hot(torch.full((20,), 3), 10),
         "balanced classes": 100.0 * F.one_hot(classes[torch.randperm(20)], 10)}
figure, grid = plt.subplots(1, 3, figsize=(8, 4))
for axes, (name, z) in zip(grid, cases.items(), strict=True):
    loss = twist_loss(torch.stack([z, z]), eps=0)                                 # the two views agree
    shown = axes.imshow(z.softmax(-1), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set(title=f"{name}\nsharpness {loss.sharpness:.2f}, diversity {loss.diversity:.2f}\n"
                   f"loss {loss.total.round(decimals=2) + 0:.2f}", xlabel="class", ylabel="image",
             xticks=range(0, 10, 3), yticks=range(0, 20, 5))
figure.colorbar(shown, label="probability")
plt.show()

# %% [markdown]
# ## 4. NBS
#
# The loss alone has another weakness. Multiply all logits by 10: the classes stay the same, but the outputs
# get sharper and, where the views agree, the loss falls. So larger weights would lower it, and nothing is
# learnt. TWIST puts a batch norm without scale and shift before the softmax. Each class $c$ gets mean 0 and
# variance 1 over the batch:
#
# $$\hat z_{ic} = \frac{z_{ic} - \mu_c}{\sigma_c} \qquad \mu_c = \tfrac1B \sum_i z_{ic}
# \qquad \sigma_c^2 = \tfrac1B \sum_i (z_{ic} - \mu_c)^2$$
#
# In training both views go through it together, so the sums run over $2B$ outputs. In evaluation it takes
# running means, so the class of a picture does not depend on the others.

# %%
torch.manual_seed(1)
z = torch.randn(128, 10)
by_hand = (z - z.mean(0)) / z.var(0, unbiased=False).sqrt()
nbs = BatchNorm(10, affine=False)
torch.testing.assert_close(nbs(z), by_hand, atol=1e-4, rtol=0)
for scale in (1, 10, 100):
    without, with_nbs = (H(x.softmax(-1)).mean() for x in (scale * z, nbs(scale * z)))
    print(f"logits × {scale:<4} sharpness without NBS {without:.3f}, with NBS {with_nbs:.3f}")

# %% [markdown]
# So outputs cannot all be sharp (one image may be: among $B$ images a logit can reach $\sqrt{B - 1}$). Take
# $C$ balanced classes, each image in one of them. The logits of a class are high for one image in $C$ and
# alike for all others. With mean 0 and variance 1 they are $h$ there and $-1/h$ elsewhere. This gives the
# bound for the sharpness, a mean over images (`pictures.sharpest_with_nbs`):
#
# $$H_{\min} = \ln(1 + r) + \frac{r}{1 + r} \left( h + \tfrac1h \right) \qquad h = \sqrt{C - 1}
# \qquad r = (C - 1)\, e^{-h - 1/h}$$
#
# For $C = 10$ it is 1.09, so the loss of the default run can fall to about $1.09 - \ln 10 = -1.21$, not to
# $-2.30$.

# %%
gaps = np.linspace(0, 12, 100)             # between the logit of an image's class and those of the others
balanced = F.one_hot(torch.arange(20) % 10, 10).float()
losses = [twist_loss(torch.stack([gap * balanced] * 2), eps=0).total.item() for gap in gaps]
allowed = 3 + 1 / 3                                                               # h + 1 / h
lowest = twist_loss(torch.stack([nbs(balanced)] * 2), eps=0)
assert abs(lowest.sharpness - sharpest_with_nbs(10)) < 1e-3

figure, axes = plt.subplots(figsize=(5, 3))
axes.plot(gaps, losses, label="balanced classes")
axes.plot(allowed, lowest.total, "o", label=f"with NBS: loss {lowest.total:.2f}")
axes.axhline(-np.log(10), color="0.6", linewidth=1, label="−ln 10")
axes.set(xlabel="logit of the image's class − logits of the others", ylabel="loss (nats)",
         title="Larger logits lower the loss; NBS fixes how large they are")
axes.legend()
plt.show()
print(f"with NBS: sharpness {lowest.sharpness:.3f}, bound {sharpest_with_nbs(10):.3f}")

# %% [markdown]
# ## 5. Views of one image
#
# What should *not* change the class? A crop of at least 55 % of the area, a flip, another brightness and
# contrast. That is most of what we put in; the rest is the number of classes, that they are about equally
# large, and settings that were chosen on labelled images. Here is one image and twelve of its views.
# Training gives the network two of them at a time.

# %%
config = {"data": "fashion-mnist", "image_size": 20}           # 20 of the 28 pixels: half the time
size, mean, std = input_of(config)
views = build_views("fashion-mnist", mean, std, size)
train = build_dataset("fashion-mnist", "pretrain")             # without labels
test = build_dataset("fashion-mnist", "test").subset(slice(2000))
batches = Batches(train, batch_size=128, views=views, seed=0)

images, uniforms, _ = batches[0]           # uint8 [B, 1, 28, 28]; the random numbers of the views [2, B, 40]
same = images[2:3].expand_as(images)
pairs = torch.stack(views(same, uniforms))                                        # [2, B, 3, 20, 20]
black, white = (0 - mean[0]) / std[0], (1 - mean[0]) / std[0]
figure, grid = plt.subplots(2, 7, figsize=(8, 2.7))
for row in range(2):
    grid[row, 1].set_ylabel(f"view {row + 1}")
    for i in range(6):
        grid[row, i + 1].imshow(pairs[row, i, 0], cmap="gray", vmin=black, vmax=white)
for axes in grid.flat:
    axes.set(xticks=[], yticks=[])
grid[0, 0].imshow(same[0, 0], cmap="gray")
grid[0, 0].set_title("the image")
grid[1, 0].axis("off")
figure.suptitle("Each other column is a pair that a step of training could see")
plt.show()

# %% [markdown]
# ## 6. One epoch of training
#
# The network is a small ResNet (the *backbone*, which gives 128 features), a *projection head* of three
# linear layers, which ends in the ten logits, and NBS. Training is 468 steps with 128 images each,
# about two minutes of one CPU core. (`pretrain.py` trains for 1,872 steps. It starts four networks; the one
# that agrees most with the others goes on.) After each quarter, `look` shows for each class the ten test
# images that the network is surest of. Names and scores use the true labels; the training never sees them.

# %% [trained]
def look(network, when):
    """Scores the network's classes on test images and shows the surest images of each."""
    _, P = predict(network, eval_batches(test, config, "cpu"))                    # numpy [N, C]
    network.train()                                            # predict left it in evaluation mode
    found = P.argmax(1)
    scores = evaluate(test.labels.numpy(), found, P)
    print(f"{when}: ACC {scores['acc']:.3f}, NMI {scores['nmi']:.3f}")
    picture = np.full((10 * 28, 10 * 28), 255, np.uint8)
    order = np.argsort(scores["mapping"])                      # the cluster that is matched to each class
    for row, k in enumerate(order):
        surest = np.argsort(-np.where(found == k, P[:, k], -1))[:min(10, (found == k).sum())]
        for column, i in enumerate(surest):
            picture[28 * row:28 * row + 28, 28 * column:28 * column + 28] = test.images[i, 0]
    figure, axes = plt.subplots(figsize=(6, 5))
    axes.imshow(picture, cmap="gray")
    axes.set(title=f"{when}: ACC {scores['acc']:.2f}", xlabel="the surest images, from the left", xticks=[],
             yticks=np.arange(14, 280, 28), ylabel="found class, with the name it is matched to")
    axes.set_yticklabels([f"{FASHION_MNIST_CLASSES[c]} ({k})" for c, k in enumerate(order)])
    plt.show()

torch.manual_seed(0)
network = Twist("resnet8", num_classes=10, hidden_dim=512).to(memory_format=torch.channels_last)
optimizer = torch.optim.AdamW(param_groups(network, weight_decay=1e-4), lr=0.0, betas=(0.9, 0.99))
steps, history = batches.steps_per_epoch, []
for step in range(steps):
    for group in optimizer.param_groups:
        group["lr"] = warmup_cosine(step, steps, warmup_steps=47, peak=1e-3, final=1e-6)
    images, uniforms, _ = batches[step]
    logits = network(views(images, uniforms))                                     # [2, B, C]
    loss = twist_loss(logits)
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    history.append([term.item() for term in loss])
    if (step + 1) % (steps // 4) == 0:
        look(network, f"after step {step + 1}")

# %% [trained]
totals, *terms = np.transpose(history)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
for name, values in zip(("consistency", "sharpness", "diversity"), terms, strict=True):
    left.plot(values, label=name)
left.axhline(sharpest_with_nbs(10), color="0.6", linewidth=1, label="bound of NBS for the sharpness")
left.set(xlabel="step", ylabel="nats", title="the terms", ylim=(0, None))
right.plot(totals, color="black", label="loss")
right.axhline(0, color="tab:red", linewidth=1, label="collapse")
right.axhline(sharpest_with_nbs(10) - np.log(10), color="0.6", linewidth=1, label="bound with NBS")
right.set(xlabel="step", ylabel="nats", title="consistency + sharpness − diversity")
left.legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.28))
right.legend(fontsize=8)
plt.show()
print("last ten steps: loss {:.2f}, consistency {:.2f}, sharpness {:.2f}, diversity {:.2f}".format(
    *np.mean(history[-10:], axis=0)))

# %% [markdown]
# The loss is far below 0, so nothing collapsed, and for most classes the name is right. Look at the tops,
# too: coats, pullovers and shirts are often sorted by brightness more than by kind, although the views
# change the brightness. ACC counts these as mistakes.
#
# ## 7. Matching and the metrics, by hand
#
# Cluster 4 may be full of dresses, but the network does not know the word. To score it, clusters are
# matched to classes one to one, so that as many images as possible are in the class of their cluster. ACC,
# the accuracy of the clustering, is their share. With $n_{kc}$ images of class $c$ in cluster $k$, and
# permutations $\pi$ of the classes:
#
# $$\mathrm{ACC} = \max_{\pi} \tfrac1N \sum_k n_{k \pi(k)}$$
#
# With three classes we can try all six permutations. With 1,000 classes the Hungarian algorithm finds the
# best.

# %%
n = np.array([[6, 1, 0],                   # clusters × classes: cluster 0 has six images of class 0, ...
              [5, 3, 1],
              [0, 1, 7]])
N = n.sum()
for order in itertools.permutations(range(3)):
    hits = sum(n[k, order[k]] for k in range(3))
    print(f"clusters 0, 1, 2 -> classes {order}: {hits} of {N} right")
acc = max(sum(n[k, order[k]] for k in range(3)) for order in itertools.permutations(range(3))) / N
print(f"ACC = {acc:.4f}; if each cluster took its most frequent class: {n.max(1).sum() / N:.4f}")

# %% [markdown]
# The second number ignores that two clusters took the same class. It reaches 1 if every image is a cluster
# of its own, so it rewards many clusters. NMI, the normalised mutual information, needs no matching. It
# asks how much the cluster $U$ tells about the class $Y$, that is their mutual information $I$, as a share of
# what there is to tell; $H(U, Y)$ is the entropy of the pairs:
#
# $$\mathrm{NMI} = \frac{2\, I(U; Y)}{H(U) + H(Y)} \qquad I(U; Y) = H(U) + H(Y) - H(U, Y)$$

# %%
joint = torch.tensor(n / N)
H_U, H_Y = H(joint.sum(1)), H(joint.sum(0))
H_UY = H(joint.flatten())
nmi = 2 * (H_U + H_Y - H_UY) / (H_U + H_Y)
print(f"H(U) {H_U:.4f}, H(Y) {H_Y:.4f}, H(U, Y) {H_UY:.4f}, NMI {nmi:.4f}")

clusters, labels = (np.repeat(ids.ravel(), n.ravel()) for ids in np.indices((3, 3)))
scores = evaluate(labels, clusters)
assert scores["acc"] == acc and abs(scores["nmi"] - nmi) < 1e-12
print("cluster_eval.evaluate: ACC {acc:.4f}, many-to-one {acc_majority:.4f}, NMI {nmi:.4f}".format(**scores))

# %% [markdown]
# `cluster_eval.py` prints two more. AMI is NMI less what random clusters reach. ARI asks of all pairs of
# images whether both partitions put them together or both apart; random clusters have 0, too.
#
# ## 8. What the features are worth
#
# The logits are ten numbers; the 128 features before the projection head may tell more. Twenty labelled
# images whose features point in the most similar direction vote for the class of a test image. *Whitened*
# features have the same variance in all directions, so that the few in which the ten classes differ do not
# decide alone.

# %% [trained]
labelled = build_dataset("fashion-mnist", "train").subset(slice(0, 60000, 6))                   # 10,000
pixels = [part.images.flatten(1).float() for part in (labelled, test)]
features = [torch.from_numpy(predict(network, eval_batches(part, config, "cpu"))[0])
            for part in (labelled, test)]
network.train()
for name, (x, x_test) in (("pixels", pixels), ("features", features)):
    for how, pair in (("as they are", (x, x_test)), ("whitened", whiten(x, x_test))):
        votes = knn_predict(pair[0], labelled.labels, pair[1], k=20, temperature=0.07, num_classes=10)
        accuracy = (votes.argmax(1) == test.labels).float().mean()
        print(f"{name} {how}: 20-NN accuracy {accuracy:.3f}")

# %% [markdown]
# These pictures are small and aligned, so their pixels are good neighbours already; of photographs they are
# not. [docs/benchmarks.md](docs/benchmarks.md) has features of longer trainings.
#
# ## 9. Self-labelling
#
# The second stage of TWIST learns from the network's own answers. The *confidence* of a view is its largest
# probability. Of the two views of an image, the more confident one, $a_i$, gives a label $y_i$, its likeliest
# class. The other views are trained towards it by cross-entropy, but only for the set $S$ of images whose
# confidence is above a threshold, here the median of the batch:
#
# $$\mathcal{L}_{\text{self}} = \frac{1}{|S| (V - 1)} \sum_{i \in S} \sum_{v \neq a_i} -\ln P^v_{i y_i}$$

# %% [trained]
images, uniforms, _ = batches[0]
with torch.no_grad():
    logits = network(views(images, uniforms))                                     # [2, B, C]
view, label, confidence = anchors(logits)                                         # [B] each
loss = self_label_loss(logits, quantile=0.5)
selected = confidence > loss.threshold
other = logits.log_softmax(-1)[1 - view, torch.arange(len(view))]                 # [B, C]
by_hand = -other[selected, label[selected]].mean()                                # V = 2: one other view
torch.testing.assert_close(by_hand, loss.total)
print(f"threshold {loss.threshold:.3f}: {selected.sum()} of {len(view)} images selected, "
      f"loss {loss.total:.3f}")

names = [""] * 10                                              # of clusters, to be readable
_, P = predict(network, eval_batches(test, config, "cpu"))
network.train()
for k, c in enumerate(evaluate(test.labels.numpy(), P.argmax(1), P)["mapping"]):
    names[k] = FASHION_MNIST_CLASSES[c]
order = confidence.argsort(descending=True)
figure, grid = plt.subplots(2, 7, figsize=(8, 3))
for row, (what, chosen) in enumerate((("selected", order[:7]), ("left out", order[-7:]))):
    for axes, i in zip(grid[row], chosen, strict=True):
        axes.imshow(images[i, 0], cmap="gray")
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"{names[label[i]]}\n{confidence[i]:.2f}", fontsize=8)
    grid[row, 0].set_ylabel(what)
figure.suptitle("The most and the least certain images of a batch, with their labels and confidences")
plt.show()

# %% [markdown]
# Sixty steps of it change little: the scores are those of 2,000 images, so differences below 0.02 mean
# nothing, and NBS keeps the mean confidence low (part 4). `selflabel.py` takes 468 steps after a full
# training. It raised ACC from 0.731 to 0.733 (means of five seeds, [measurements](docs/benchmarks.md)).

# %% [trained]
optimizer = torch.optim.AdamW(param_groups(network, weight_decay=1e-4), lr=0.0, betas=(0.9, 0.99))
for step in range(60):
    for group in optimizer.param_groups:
        group["lr"] = warmup_cosine(step, 60, warmup_steps=6, peak=2e-4, final=2e-7)
    images, uniforms, _ = batches[steps + step]                # the next epoch has its own order and views
    loss = self_label_loss(network(views(images, uniforms)), quantile=0.5)
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
look(network, "after self-labelling")
images, uniforms, _ = batches[0]
with torch.no_grad():
    after = anchors(network(views(images, uniforms)))[2]
print(f"mean confidence in the batch above: {confidence.mean():.2f}, now {after.mean():.2f}")

# %% [markdown]
# ## 10. Exercises
#
# **1.** Why is the loss with $\alpha = \beta = 1$ never below $-\ln C$? When is it equal?
#
# <details><summary>Answer</summary>
#
# Consistency is a sum of divergences and sharpness a mean of entropies; neither is negative. Diversity is a
# mean of entropies over $C$ classes, so it is at most $\ln C$. Together:
#
# $$\mathcal{L} \geq 0 + 0 - \ln C$$
#
# They are equal if the views agree, each image has all its probability in one class, and each class has the
# same share of the batch: the third picture of part 3.
#
# </details>
#
# **2.** Which collapse do you expect without NBS if $\beta$ is 0? If $\alpha$ is 0? Does NBS change it? Try
# 40 steps.
#
# <details><summary>Answer</summary>
#
# Without diversity nothing keeps classes in use, and few stay; *one class* is the extreme. The code below
# leaves two: diversity 0.69 is $\ln 2$. With NBS all stay: if one class had the largest logit for every
# image, its mean would be above the others', but all means are 0. Without sharpness outputs become
# *uniform*, with NBS and without: the logits of an image may be equal for all classes. (Balanced, sharp
# classes would have the same loss, $-\ln C$. Uniform outputs agree from the start.)
#
# ```python
# for (alpha, beta), nbs in itertools.product([(1, 0), (0, 1)], [False, True]):
#     torch.manual_seed(0)
#     trial = Twist("resnet8", num_classes=10, hidden_dim=512, nbs=nbs).to(memory_format=torch.channels_last)
#     optimizer = torch.optim.AdamW(trial.parameters(), lr=1e-3)
#     for step in range(40):
#         images, uniforms, _ = batches[step]
#         loss = twist_loss(trial(views(images, uniforms)), alpha, beta)
#         optimizer.zero_grad()
#         loss.total.backward()
#         optimizer.step()
#     print(f"alpha {alpha}, beta {beta}, NBS {nbs}: "
#           f"sharpness {loss.sharpness:.2f}, diversity {loss.diversity:.2f}")
# ```
#
# </details>
#
# **3.** How sharp can outputs be with 4,096 balanced classes and NBS over at least as many images? What is
# the probability of the likeliest class?
#
# <details><summary>Answer</summary>
#
# Practically 0 nats: with that many classes the logit of the right one may be 64 above the others, and its
# probability is 1.0000 (0.996 with 100 classes, 0.757 with 10, 0.807 with 3). The bound matters for few
# classes only.
#
# ```python
# for C in (3, 10, 100, 4096):
#     h = (C - 1) ** 0.5
#     likeliest = 1 / (1 + (C - 1) * np.exp(-h - 1 / h))
#     print(f"C = {C}: sharpness {sharpest_with_nbs(C):.4f}, likeliest class {likeliest:.4f}")
# ```
#
# </details>
#
# **4.** *Multi-crop* has two large views (*global*) and twelve small ones (*local*). Each global view is in a
# pair with every later view: 13 + 12 = 25 pairs. Write the two divergences of a pair as one product. How is
# the sum over all pairs had without forming one?
#
# <details><summary>Answer</summary>
#
# $$KL(P \| Q) + KL(Q \| P) = \sum_c (P_c - Q_c) (\ln P_c - \ln Q_c)$$
#
# Multiplied out, two terms are minus entropies of one view alone, and two have a factor of each view. Summed
# over pairs, these are products of sums over views: $\sum_g P_g$ times $\sum_g \ln P_g + \sum_l \ln P_l$, and
# $\sum_l P_l$ times $\sum_g \ln P_g$, with global views $g$ and local views $l$, less $\sum_g P_g \ln P_g$,
# since no view is in a pair with itself. So `loss.twist_loss` forms no pair.
#
# </details>
#
# **5.** Three classes have eight images each. A network finds them without a mistake, but splits class 0 into
# two clusters of four. So there is a cluster more than classes, which stays unmatched. What are ACC,
# many-to-one accuracy and NMI?
#
# <details><summary>Answer</summary>
#
# One of the two halves finds no class to be matched to, so ACC is 20 / 24. Many-to-one does not see the
# split: it is 1. NMI lies between: the cluster tells all about the class, but has more entropy than needed.
#
# ```python
# clusters = np.repeat([0, 1, 2, 3], [4, 4, 8, 8])
# labels = np.repeat([0, 1, 2], [8, 8, 8])
# scores = evaluate(labels, clusters)
# print("ACC {acc:.4f}, many-to-one {acc_majority:.4f}, NMI {nmi:.4f}".format(**scores))
# assert scores["acc"] == 20 / 24 and scores["acc_majority"] == 1 and 0.90 < scores["nmi"] < 0.91
# ```
#
# </details>
#
# **Where next?** `loss.py` and `pretrain.py` are the method; [docs/method.md](docs/method.md) has its
# details, and `README.md` says how to train on your own pictures.
