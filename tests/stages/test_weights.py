"""The trained network that the repository ships is what its page says."""

import json

import numpy as np
import pytest
from processes import ROOT

from cluster_eval import evaluate
from data import build_dataset, eval_batches
from predictions import predict
from pretrained import load_twist

WEIGHTS = ROOT / "weights"


def test_weights_score_what_is_written_beside_them():
    path = WEIGHTS / "fashion-mnist.pth"
    assert path.stat().st_size < 4e6
    network, config = load_twist(path)
    stated = json.loads((WEIGHTS / "fashion-mnist.json").read_text())
    dataset = build_dataset(config["data"], "test")
    features, probabilities = predict(network, eval_batches(dataset, config, "cpu"))
    scores = evaluate(dataset.labels.numpy(), probabilities.argmax(1), probabilities)
    for name in ("acc", "acc_top5", "nmi", "ami", "ari"):      # another machine may round an image elsewhere
        assert scores[name] == pytest.approx(stated[name], abs=2e-3), name
    variances = np.linalg.eigvalsh(np.cov(features.T))         # ascending; docs/evaluation.md says 94 %
    assert variances[-9:].sum() / variances.sum() == pytest.approx(0.94, abs=0.005)
    assert stated["acc"] > 0.6 and f"{stated['acc']:.3f}" in (WEIGHTS / "README.md").read_text()
