"""Do two versions of this project train the same weights, bit for bit?

    python benchmarks/same_weights.py OLDER_TREE --output-dir runs/same            40 steps on `fake`
    python benchmarks/same_weights.py OLDER_TREE --output-dir runs/same --default  the default runs

OLDER_TREE is another checkout (`git worktree add OLDER_TREE COMMIT`). Every command runs in both trees on one
thread. Then all weights in the two checkpoints are compared. Finished runs are not repeated.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parents[1]
FAKE = "--data fake --batch-size 64 --epochs 5 --hidden-dim 64"
NETWORK = "weights/fashion-mnist.pth"
SHORT = {                                   # 40 steps each: 512 images, 64 a step, 5 epochs
    "twist": f"pretrain.py {FAKE}",
    "multicrop": f"pretrain.py {FAKE} --views multicrop --num-local 2",
    "momentum": f"pretrain.py {FAKE} --ema 0.9 --clip-norm 1 --weight-decay-end 0.1",
    "lars": f"pretrain.py {FAKE} --optimizer lars --lr 0.5 --bunch-size 16",
    "bf16": f"pretrain.py {FAKE} --amp bf16",
    "barlow": f"barlow.py {FAKE} --lr 0.008",
    "selflabel": f"selflabel.py --checkpoint {NETWORK} --data fake --batch-size 64 --epochs 5 --ema 0.9",
    "distill": f"distill.py --teacher {NETWORK} --data fake --batch-size 64 --epochs 5 --queue-size 512",
    "local crops": f"distill.py --teacher {NETWORK} --data fake --batch-size 64 --epochs 5 --queue-size 512 "
                   "--num-local 2 --schedule epochs",
    "semisup": f"semisup.py --checkpoint {NETWORK} --data fake --batch-size 64 --epochs 5 --label-fraction 1",
}
DEFAULT = {
    "twist": "pretrain.py",
    "multicrop": "pretrain.py --num-local 2 --epochs 1",
    "momentum": "pretrain.py --ema 0.99 --epochs 1",
    "barlow": "barlow.py",
    "selflabel": f"selflabel.py --checkpoint {NETWORK}",
    "distill": f"distill.py --teacher {NETWORK} --epochs 1",
    "semisup": f"semisup.py --checkpoint {NETWORK}",
}


def train(tree, command, out):
    """Runs a stage in a tree unless its folder has a finished run; returns its weights."""
    script, *flags = command.split()
    if script == "barlow.py" and not (tree / script).exists():          # it was a flag of pretrain.py
        script, flags = "pretrain.py", ["--loss", "barlow", *flags]
    subprocess.run([sys.executable, script, *flags, "--output-dir", str(out)], cwd=tree, check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    parts = {name: state[name] for name in ("model", "teacher") if name in state}
    return state["step"], {f"{part}.{name}": value for part, state in parts.items()
                           for name, value in state.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("older", type=Path)
    parser.add_argument("--output-dir", type=Path, default=HERE / "runs/same_weights")
    parser.add_argument("--default", action="store_true", help="each stage's default run instead of 40 steps")
    parser.add_argument("--only", choices=("older", "this"), help="run one tree and compare nothing")
    args = parser.parse_args()
    different = 0
    for name, command in (DEFAULT if args.default else SHORT).items():
        folder = args.output_dir.resolve() / ("default" if args.default else "fake") / name
        trees = {"older": args.older.resolve(), "this": HERE}
        states = [train(tree, command, folder / which) for which, tree in trees.items()
                  if args.only in (None, which)]
        if args.only is None:
            (step, old), (_, new) = states
            unequal = [key for key in old if key not in new or not torch.equal(old[key], new[key])]
            different += bool(unequal)
            verdict = f"DIFFERENT in {len(unequal)} of {len(old)}" if unequal else f"{len(old)} tensors equal"
            print(f"{name:15} {step:4} steps   {verdict}   {command}", flush=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
