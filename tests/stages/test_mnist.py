"""--data mnist in the stages and evaluations, as commands; also with another network."""

import pytest
from processes import log_lines, metrics_of, run, saved_network

SMALL = "--data mnist --image-size 14 --batch-size 500 --epochs 1 --hidden-dim 32 --knn-every 0"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The folder of eight steps of pretrain.py."""
    out = tmp_path_factory.mktemp("mnist") / "run"
    run(f"pretrain.py {SMALL} --restarts 1 --output-dir {out}")
    return out


def test_pretraining_takes_the_training_digits(digits):
    first, *_, last = log_lines(digits)
    assert last == dict(step=8, status="done") and first["config"]["steps_per_epoch"] == 8       # of 4,000


def test_barlow_takes_them_too(tmp_path):
    run(f"barlow.py {SMALL} --output-dir {tmp_path}/run")
    assert log_lines(tmp_path / "run")[-1] == dict(step=8, status="done")


def test_evaluations_take_the_data_of_the_checkpoint(digits, tmp_path):
    network = f"--checkpoint {digits}/checkpoint.pth"
    out, _ = run(f"cluster_eval.py {network} --output-dir {tmp_path}/classes")
    assert "mnist: 1,000 test images" in out
    assert metrics_of(tmp_path / "classes")["class_names"] == list("0123456789")
    run(f"semisup.py {network} --batch-size 100 --epochs 1 --label-fraction 0.05 --output-dir {tmp_path}/few")
    few = metrics_of(tmp_path / "few")
    assert (few["num_train"], few["num_test"]) == (200, 1000)                        # 5 % of 4,000
    run(f"embed.py {network} --output-dir {tmp_path}/features")
    assert metrics_of(tmp_path / "features")["num_images"] == 1000


def test_features_of_another_network_tell_digits_apart(tmp_path):
    network = saved_network(tmp_path / "fashion.pth", "--data fashion-mnist --image-size 14")
    run(f"knn.py --checkpoint {network} --data mnist --k 5 --output-dir {tmp_path}/knn")
    found = metrics_of(tmp_path / "knn")
    assert (found["num_train"], found["num_test"]) == (4000, 1000) and found["top1"]["5"] > 0.7
    run(f"lincls.py --checkpoint {network} --data mnist --cached --epochs 2 --batch-size 200 --lrs 0.3 "
        f"--output-dir {tmp_path}/linear")
    assert len((tmp_path / "linear/predictions.csv").read_text().splitlines()) == 1001
