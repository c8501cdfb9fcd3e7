"""How fast does the default run train in two versions of this project?

    python benchmarks/speed.py OLDER_TREE --pairs 5        more flags are those of pretrain.py

OLDER_TREE is another checkout (`git worktree add OLDER_TREE COMMIT`). The two take turns, so that other work
on the machine slows both; images for a second of CPU time depend on it less than images a second. Each run is
stopped after 125 steps, of which the first 25 do not count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
EVERY, LINES = 25, 5             # steps between two lines of the log, lines of a run


def cpu_seconds(pid):
    """Of a process so far, in its own code and in the kernel's."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(tree, flags):
    """Of one run: images a second, the median over its lines, and images for a second of CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "pretrain.py", *flags, "--print-every", str(EVERY), "--output-dir", folder]
        process = subprocess.Popen(command, cwd=tree, stdout=subprocess.DEVNULL)
        rates, used = [], {}
        while len(rates) < LINES and process.poll() is None:
            time.sleep(0.05)
            log = Path(folder, "log.jsonl")
            entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            steps = [entry for entry in entries if "images_per_s" in entry]
            rates = [entry["images_per_s"] for entry in steps]
            if rates:
                used.setdefault(steps[-1]["step"], cpu_seconds(process.pid))
        process.kill()
        process.wait()
    (first, start), *_, (last, end) = used.items()
    return statistics.median(rates[1:]), entries[0]["config"]["batch_size"] * (last - first) / (end - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("older", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    args, flags = parser.parse_known_args()
    trees, found = {"older": args.older, "this": HERE}, {"older": [], "this": []}
    for pair in range(args.pairs):
        for name in list(trees)[::1 if pair % 2 else -1]:
            found[name].append(measure(trees[name], flags))
        (older, older_cpu), (this, this_cpu) = found["older"][-1], found["this"][-1]
        print(f"pair {pair + 1}: older {older:.0f}, this {this:.0f} images/s, {this / older:.3f} times; "
              f"a second of CPU time {older_cpu:.0f} and {this_cpu:.0f}, {this_cpu / older_cpu:.3f} times; "
              f"load {os.getloadavg()[0]:.1f}", flush=True)
    for i, what in enumerate(("images/s", "images for a second of CPU time")):
        ratios = [this[i] / older[i] for older, this in zip(found["older"], found["this"], strict=True)]
        print(f"{what}: median of the pairs {statistics.median(ratios):.3f} times, {min(ratios):.3f} to "
              f"{max(ratios):.3f}")


if __name__ == "__main__":
    main()
