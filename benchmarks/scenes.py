"""What pre-training is worth on scenes: a Fashion-MNIST network, and the same network from scratch.

    python benchmarks/scenes.py                      10 runs of segment.py; the same command resumes
    python benchmarks/scenes.py --lrs 0.1 --seeds 0 --steps 100
    python benchmarks/scenes.py --stage detect --lrs 0.05 --steps 200 500 --schedule-steps 500

For each start, the first seed tries each learning rate; the other seeds take the best one. A seed draws the
training scenes, their order, the initial weights of the heads and of the network from scratch. The 200 test
scenes are the same for all, and the learning rate is chosen on them. All runs stand in OUTPUT_DIR/STAGE.csv.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
STARTS = {"pre-trained": [], "from scratch": ["--random-init"]}
SCORES = {"segment": ("miou", "miou_objects"),           # of metrics.json; the first one chooses
          "detect": ("AP50", "AP75", "AP")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--stage", default="segment", choices=SCORES, help="default: segment")
    add("--checkpoint", default="weights/fashion-mnist.pth", help="default: weights/fashion-mnist.pth")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--lrs", type=float, nargs="+", default=[0.03, 0.1, 0.3], help="default: 0.03 0.1 0.3")
    add("--steps", type=int, nargs="+", default=[300], help="numbers of steps; default: 300")
    add("--schedule-steps", type=int, help="of detect: length of the schedule, which --steps may be part of")
    add("--output-dir", default="runs/scenes_benchmark", help="default: runs/scenes_benchmark")
    args = parser.parse_args(argv)
    out, rows = Path(args.output_dir).absolute(), []

    def run(start, steps, lr, seed):
        """The row of a run; one that is finished is not repeated."""
        folder = out / f"{args.stage}_{start.replace(' ', '_')}_{steps}_lr{lr:g}_{seed}"
        command = [sys.executable, f"{args.stage}.py", "--checkpoint", args.checkpoint, *STARTS[start],
                   "--steps", str(steps), "--lr", str(lr), "--seed", str(seed), "--output-dir", str(folder)]
        if args.schedule_steps:
            command += ["--schedule-steps", str(args.schedule_steps)]
        if not (folder / "metrics.json").exists():
            subprocess.run(command, cwd=ROOT, check=True)
        metrics = json.loads((folder / "metrics.json").read_text())
        rows.append(dict(start=start, steps=steps, lr=lr, seed=seed,
                         **{name: metrics[name] for name in SCORES[args.stage]}))
        with open(out / f"{args.stage}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return rows[-1]

    lines = [f"| start | steps | learning rate | seeds | {' | '.join(SCORES[args.stage])} |",
             "|---" * (4 + len(SCORES[args.stage])) + "|"]
    for steps in args.steps:
        for start in STARTS:
            tried = [run(start, steps, lr, args.seeds[0]) for lr in args.lrs]
            best = max(tried, key=lambda row: row[SCORES[args.stage][0]])
            found = [best, *(run(start, steps, best["lr"], seed) for seed in args.seeds[1:])]
            cells = []
            for name in SCORES[args.stage]:
                values = [row[name] for row in found]
                cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            lines.append(f"| {start} | {steps} | {best['lr']:g} | {len(found)} | {' | '.join(cells)} |")
    print("\n".join(lines))
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    main()
