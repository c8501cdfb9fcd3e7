"""Fine-tuning on few labels of MNIST: from Fashion-MNIST's network, and the same network from scratch.

    python benchmarks/finetune.py                       3 seeds, 36 runs; the same command resumes
    python benchmarks/finetune.py --seeds 0 --label-fraction 1

Each seed draws the images with labels. The grid of finetune.py chooses the learning rate for each start, on a
fifth of these images, and trains the best one anew on all. Both starts make the same steps on the same
images. Top-1: on the 1,000 test images, by the chosen run alone.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
STARTS = {"pre-trained": [], "from scratch": ["--random-init"]}
SHARED = "--data mnist --batch-size 32 --weight-decays 0 --grid --print-every 9999".split()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", default="weights/fashion-mnist.pth", help="default: weights/fashion-mnist.pth")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--label-fraction", type=float, default=0.25, help="of 4,000 images; default: 0.25")
    add("--steps", type=int, default=200, help="default: 200")
    add("--lrs", nargs="+", default=["0.01", "0.03", "0.1", "0.3", "1"],
        help="default: 0.01 0.03 0.1 0.3 1")
    add("--output-dir", default="runs/finetune_benchmark", help="default: runs/finetune_benchmark")
    args = parser.parse_args(argv)
    rows = {start: [] for start in STARTS}
    for seed in args.seeds:
        for start, flags in STARTS.items():
            out = Path(args.output_dir).absolute() / f"{start.replace(' ', '_')}_{seed}"
            command = [sys.executable, "finetune.py", "--checkpoint", args.checkpoint, *SHARED, *flags,
                       "--label-fraction", str(args.label_fraction), "--steps", str(args.steps), "--lrs",
                       *args.lrs, "--seed", str(seed), "--output-dir", str(out)]
            subprocess.run(command, cwd=ROOT, check=True)       # what is finished is not repeated
            rows[start].append(json.loads((out / "metrics.json").read_text()))
    print(f"| start | images | steps | seeds | top-1 | learning rates |\n{'|---' * 6}|")
    for start, found in rows.items():
        top1, rates = [row["test"] for row in found], " ".join(f"{row['lr']:g}" for row in found)
        print(f"| {start} | {found[0]['num_train']:,} | {args.steps} | {len(found)} | {np.mean(top1):.3f} "
              f"({min(top1):.3f} to {max(top1):.3f}) | {rates} |")
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    main()
