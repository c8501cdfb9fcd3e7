"""barlow.py trains Barlow Twins, alone and in two processes; its features are evaluated."""

import pytest
import torch
from processes import log_lines, metrics_of, run, weights

import barlow
import pretrain
from checkpoint import save_checkpoint
from cli import parse_args
from loss import barlow_twins_terms
from model import BarlowTwins, build_network

SMALL = "--data fake --image-size 16 --batch-size 64 --epochs 2 --hidden-dim 32 --print-every 2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    run(f"barlow.py {SMALL} --lambd 0.02 --bias-lr 0.1 --optimizer sgd --lr 0.1 --output-dir {folder}")
    return folder


def test_log_and_files_of_a_run(trained):
    first, *lines = log_lines(trained)
    assert first["command"].startswith("python barlow.py") and first["config"]["loss"] == "barlow"
    entries = [line for line in lines if "loss" in line]
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12, 14, 16]
    for e in entries:
        assert e["loss"] == pytest.approx(e["invariance"] + 0.02 * e["redundancy"], rel=1e-4)
        assert e["std_col"] > 0 and e["grad"] > 0 and not {"mi", "classes", "collapsed"} & e.keys()
    assert entries[-1]["loss"] < 0.95 * entries[0]["loss"] and entries[-1]["knn_monitor"] > 0.5
    assert "acc_monitor" not in entries[-1]                                         # there are no classes
    assert (trained / "curves.png").stat().st_size > 1000
    assert lines[-1]["status"] == "done" and metrics_of(trained) == entries[-1]
    state = torch.load(trained / "checkpoint.pth", weights_only=True)
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    assert rates == pytest.approx([entries[-1]["lr"], 0.1 * entries[-1]["lr"]])


def test_printed_lines_fit_120_columns(here, tmp_path, monkeypatch):
    """The longest there is says that the run has collapsed; the k-NN accuracy has a line of its own."""
    def constant(*args):
        network = build_network(*args)
        torch.nn.init.zeros_(network.projector[-1].weight)
        return network
    monkeypatch.setattr(barlow, "build_network", constant)
    out, _ = here(f"barlow.py {SMALL} --lr 0 --batch-size 128 --epochs 1 --output-dir {tmp_path}/run")
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    more = len("one-dimension") - len("constant")
    assert len(steps) == 2 and all(len(line) + more <= 120 for line in steps)
    assert all(line.endswith(" | collapsed: constant") for line in steps)
    assert [line["collapsed"] for line in log_lines(tmp_path / "run") if "loss" in line] == 2 * ["constant"]
    told = [line for line in out.splitlines() if "20-NN accuracy" in line]
    assert len(told) == 1 and told[0].startswith("epoch 1: 20-NN accuracy ")


def test_collapses_are_named():
    torch.manual_seed(0)
    z = torch.randn(64, 32)
    pairs = dict(alike=(z, z + 0.5 * torch.randn(64, 32)), foreign=(z, torch.randn(64, 32)),
                 still=(1e-6 * z, 1e-6 * z), line=(z[:, :1] + 0.01 * z, z[:, :1] + 0.01 * z))
    names = {name: barlow.describe(barlow_twins_terms(*pair), {}, 32).get("collapsed")
             for name, pair in pairs.items()}
    assert names == dict(alike=None, foreign=None, still="constant", line="one-dimension")


def in_double():
    """From now on this process trains in double precision: in single, a ReLU flips by rounding and steps
    multiply it."""
    build_network, build_views = barlow.build_network, barlow.build_views

    def views_in_double(*args, **kwargs):
        views = build_views(*args, **kwargs)
        views.register_forward_hook(lambda module, inputs, outputs: [x.double() for x in outputs])
        return views
    barlow.build_network = lambda *args: build_network(*args).double()
    barlow.build_views = views_in_double


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """The whole stage, in double precision."""
    flags = f"{SMALL} --epochs 1 --optimizer sgd --lr 0.05 --print-every 1 --knn-every 0"
    run(f"barlow.py {flags} --output-dir {tmp_path}/one", prepare=in_double)
    run(f"barlow.py {flags} --output-dir {tmp_path}/two", ranks=2, prepare=in_double)
    one, two = ([line["loss"] for line in log_lines(tmp_path / n) if "loss" in line] for n in ("one", "two"))
    assert len(one) == 8 and one == pytest.approx(two, rel=1e-9)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------- its network in other stages
@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A checkpoint as `pretrain.py --loss barlow` wrote it, when Barlow Twins was a flag of that stage."""
    path = tmp_path_factory.mktemp("old") / "checkpoint.pth"
    flags = ["--data", "fake", "--hidden-dim", "16"]
    config = vars(parse_args(pretrain.get_parser(), flags)) | dict(
        loss="barlow", lambd=0.0051, export="teacher", stop_on_collapse=False, device="auto", amp="auto",
        local_rank=None)
    torch.manual_seed(0)
    network = BarlowTwins("resnet8", 16)
    optimizer = torch.optim.AdamW(network.parameters())
    save_checkpoint(path, dict(
        model=network.state_dict(), optimizer=optimizer.state_dict(), scaler={}, step=2, epoch=1,
        stage="pretrain", rng=[[torch.get_rng_state()]], pictures={}, config=config))
    return path


@pytest.fixture(params=["trained", "old"])
def checkpoint(request):
    path = request.getfixturevalue(request.param)
    return path / "checkpoint.pth" if request.param == "trained" else path


@pytest.mark.parametrize("stage", ["cluster_eval.py", "selflabel.py"])
def test_stages_that_need_classes_refuse_it(stage, checkpoint, here, tmp_path):
    _, err = here(f"{stage} --checkpoint {checkpoint} --output-dir {tmp_path}/no", code=2)
    assert "holds no classes" in err and err.count("\n") == 1 and not (tmp_path / "no").exists()


def test_features_are_evaluated(checkpoint, here, tmp_path):
    here(f"knn.py --checkpoint {checkpoint} --k 5 --output-dir {tmp_path}/knn")
    assert metrics_of(tmp_path / "knn")["top1"]["5"] > 0.5
    here(f"lincls.py --checkpoint {checkpoint} --cached --epochs 1 --output-dir {tmp_path}/lincls")
    assert (tmp_path / "lincls" / "metrics.json").exists()


def test_it_teaches(checkpoint, here, tmp_path):
    """distill.py takes its projector as the head of the embedding."""
    here(f"distill.py --teacher {checkpoint} --batch-size 256 --queue-size 256 --epochs 1 "
         f"--output-dir {tmp_path}/student")
    assert log_lines(tmp_path / "student")[0]["config"]["teacher_head"] == "projector"


# ---------------------------------------------------------------- flags
@pytest.mark.parametrize("bad, names", [
    ("--lambd -1", "argument --lambd: -1: must be a number of at least 0"),
    ("--hidden-dim 0", "argument --hidden-dim: 0: must be a whole number of at least 1"),
    ("--num-classes 10", "--num-classes"), ("--num-local 2", "--num-local"), ("--ema 0.9", "--ema"),
    ("--batch-size 1024", "the data set has only 512 images"), ("--arch vit_t --small-images", "vit_t"),
    ("--std 0", "--std")])
def test_bad_input_is_one_line_and_code_2(bad, names, here, tmp_path):
    _, err = here(f"barlow.py {SMALL} --epochs 1 --output-dir {tmp_path}/bad {bad}", code=2)
    assert err.count("\n") == 1 and names in err and not (tmp_path / "bad").exists()
