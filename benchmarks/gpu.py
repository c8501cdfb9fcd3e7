"""Checks and measures this project on a machine with one CUDA GPU, in about six minutes. None has run it yet.

    make test-gpu
    python benchmarks/gpu.py --only parity stages        two of the parts
    python benchmarks/gpu.py --device cpu --only stages  without a GPU, to try the script itself

Parts: `parity` compares losses, gradients, views and three published training steps with the CPU and with
tests/golden. `stages` trains every stage for some steps in float32, bfloat16 and float16, and compares the
first loss with the CPU's. `evaluations` compares features and scores with the CPU's. `resume` kills a run and
goes on. `two` has two processes share the GPU by gloo; NCCL refuses that. `speed` runs published recipes at
the batch that one GPU has there, and features of a ResNet-50, on pictures in memory and on JPEG files. All of
it is OUTPUT_DIR/page.md, to paste into the docs. Exit code 1 if a check fails.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from golden_inputs import fill_noise, noise  # noqa: E402

import loss as losses  # noqa: E402
from benchmarks.pipeline import write_photographs  # noqa: E402
from checkpoint import to_stdout  # noqa: E402
from data import ImageSet, build_dataset, eval_batches  # noqa: E402
from model import BatchNorm, Twist, build_backbone  # noqa: E402
from optim import LARS, param_groups  # noqa: E402
from predictions import predict, predict_part  # noqa: E402
from pretrained import load_twist, to_device  # noqa: E402
from views import UNIFORMS, build_views  # noqa: E402

NETWORK = "weights/fashion-mnist.pth"
FAKE = "--data fake --batch-size 128 --epochs 5"                             # 20 steps
STAGES = {
    "twist": f"pretrain.py {FAKE}",
    "multi-crop": f"pretrain.py {FAKE} --views multicrop --num-local 2",
    "momentum encoder": f"pretrain.py {FAKE} --arch vit_t8 --ema 0.9 --clip-norm 3",
    "LARS": f"pretrain.py {FAKE} --optimizer lars --lr 0.5 --bunch-size 32",
    "barlow": f"barlow.py {FAKE}",
    "selflabel": f"selflabel.py {FAKE} --checkpoint {NETWORK}",
    "distill": f"distill.py {FAKE} --teacher {NETWORK} --queue-size 512 --num-local 1",
    "lincls": f"lincls.py {FAKE} --checkpoint {NETWORK}",
    "lincls on files": "lincls.py --data {files} --val-share 0.2 --image-size 64 --batch-size 16 --epochs 7 "
                       f"--workers 2 --checkpoint {NETWORK}",
    "semisup": f"semisup.py {FAKE} --checkpoint {NETWORK} --label-fraction 1",
    "finetune": f"finetune.py --data fake --checkpoint {NETWORK} --batch-size 128 --steps 20",
    "segment": f"segment.py --checkpoint {NETWORK} --num-scenes 64 16 --steps 20 --dropout 0",
    "detect": f"detect.py --checkpoint {NETWORK} --num-scenes 64 16 --steps 20",
    "detect with masks": f"detect.py --checkpoint {NETWORK} --neck fpn --masks --num-scenes 64 16 --steps 20",
}
EVALUATIONS = {                   # and a score from 0 to 1 in its metrics.json
    "knn": (f"knn.py --data mnist --checkpoint {NETWORK}", lambda metrics: metrics["top1"]["20"]),
    "cluster_eval": (f"cluster_eval.py --checkpoint {NETWORK}", lambda metrics: metrics["acc"]),
    "embed": (f"embed.py --data mnist --checkpoint {NETWORK}", lambda metrics: metrics["variance_of_map"][0]),
    "transfer": (f"transfer.py --strengths 3 --checkpoint {NETWORK}",
                 lambda metrics: metrics["sets"]["mnist"]["test"]),
}
PRECISIONS = {                    # of the backbone; how far features may be from the CPU's, see difference
    "off": (torch.float32, 5e-3), "bf16": (torch.bfloat16, 3e-2), "fp16": (torch.float16, 5e-3)}
RECIPES = {                       # images in a step of one GPU, as published: batch size / number of GPUs
    "resnet50_multicrop": 128, "resnet50_two_views": 256, "resnet50w2_multicrop": 60, "vit_s": 64,
    "vit_b": 32, "barlow_twins": 64}
SCRIPTS = {"barlow_twins": "barlow.py"}                                      # the others: pretrain.py
ON_FILES = ("resnet50_multicrop", "vit_s")


def run(command, out, *flags):
    """Runs a script of this project; returns the lines of its log, dicts, [] if it has none."""
    done = subprocess.run([sys.executable, *command.split(), *flags, "--output-dir", str(out)], cwd=ROOT,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    log = out / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def difference(ours, expected):
    """Largest difference of two tensors, as a share of the largest number."""
    ours, expected = ours.detach().double().cpu(), expected.detach().double().cpu()
    return ((ours - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------- parts: each yields (what, result, is sound)
def parity(device, out):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 64, 100, generator=generator, dtype=torch.float64)
    functions = {
        "twist_loss": losses.twist_loss,
        "momentum_twist_loss": lambda z: losses.momentum_twist_loss(logits[:2].to(z), z, 1.0, 1.0, 1e-5),
        "self_label_loss": lambda z: losses.self_label_loss(z, 0.5),
        "barlow_twins_terms": lambda z: losses.barlow_twins_terms(z[0], z[1])}
    for name, function in functions.items():
        found = []
        for x in (logits.float().to(device), logits):
            x = x.clone().requires_grad_()
            total = function(x)[0]
            found.append((total, *torch.autograd.grad(total, x)))
        worst = max(map(difference, *found))
        yield f"{name}, float32 here and float64 on the CPU", f"{worst:.1e}", worst < 1e-4

    images = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8, generator=generator)
    uniforms = torch.rand(8, 32, UNIFORMS, generator=generator)
    views = build_views("multicrop", (0.5,), (0.25,), 48, 24, 6)
    pairs = zip(*(views(images, uniforms, where) for where in (device, torch.device("cpu"))), strict=True)
    mean = max((ours.cpu() - real).abs().mean().item() for ours, real in pairs)
    yield "views, mean difference of a pixel, standard deviation 1", f"{mean:.1e}", mean < 1e-3

    g = np.load(ROOT / "tests/golden/three_steps.npz")
    model = Twist("resnet18", num_classes=64, hidden_dim=96).double()
    fill_noise(model.state_dict())
    model.to(device)
    batch, sizes = int(g["batch"]), [32, 32] + [16] * (int(g["num_views"]) - 2)
    x = [torch.from_numpy(noise(batch * 3 * s * s, 1000 + v)).view(batch, 3, s, s).to(device)
         for v, s in enumerate(sizes)]
    optimizer = LARS(param_groups(model, float(g["weight_decay"])), lr=0.0, momentum=float(g["momentum"]))
    found = []
    for lr in g["learning_rates"]:
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        total = losses.twist_loss(model(x), float(g["alpha"]), float(g["beta"]), float(g["eps"])).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(total.item())
    worst = difference(torch.tensor(found, dtype=torch.float64), torch.from_numpy(g["losses"]))
    yield "three published training steps of a ResNet-18, float64", f"{worst:.1e}", worst < 1e-6
    for flag, allowed in zip(flags, before, strict=True):        # as users have it, for `speed`
        flag.allow_tf32 = allowed


def stages(device, out):
    write_photographs(out)
    files = out / "files.txt"
    pictures = sorted(out.glob("*.jpg"))
    files.write_text("".join(f"{path} {i % 2}\n" for i, path in enumerate(pictures)))

    def first_and_last(job):
        name, amp, where = job
        try:
            folder = out / f"{name}_{amp}_{where}".replace(" ", "_")
            lines = run(STAGES[name].format(files=files), folder, "--device", where, "--amp", amp,
                        "--print-every", "1")
            values = [line["loss"] for line in lines if "loss" in line]
            return values[0], values[-1], len(values)
        except RuntimeError as error:
            return error

    ways = [("off", "cpu"), *((amp, device.type) for amp in ("off", "bf16", "fp16"))]
    jobs = [(name, *way) for name in STAGES for way in dict.fromkeys(ways)]       # two are equal on a CPU
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(jobs, pool.map(first_and_last, jobs), strict=True))
    for name in STAGES:
        results = [found[(name, *way)] for way in ways]
        errors = [str(result) for result in results if isinstance(result, RuntimeError)]
        if errors:
            yield name, "; ".join(errors), False
            continue
        reference, same, *half = (first for first, _, _ in results)
        sound = abs(same - reference) < 1e-2 * max(1, abs(reference)) and np.isfinite(half).all()
        text = ", ".join(f"{first:.4f} to {last:.4f}" for first, last, _ in results)
        yield f"{name}: loss on the CPU, then here in fp32, bf16, fp16", text, bool(sound)


def evaluations(device, out):
    network, config = load_twist(ROOT / NETWORK)
    images = build_dataset("fashion-mnist", "test").subset(slice(2000))
    expected, classes = map(torch.from_numpy, predict(network, eval_batches(images, config, "cpu")))
    to_device(network, device)
    for amp, (dtype, most) in PRECISIONS.items():
        features, probabilities = map(torch.from_numpy,
                                      predict(network, eval_batches(images, config, device), dtype))
        worst = difference(features, expected)
        same = (probabilities.argmax(1) == classes.argmax(1)).float().mean().item()
        yield (f"features here, --amp {amp}, and on the CPU in float32",
               f"{worst:.1e}, the same class for {100 * same:.1f} %", worst < most and same > 0.98)

    def scored(job):
        name, number, where, amp = job
        command, score = EVALUATIONS[name]
        folder = out / f"{name}_{number}"
        run(command, folder, "--device", where, "--amp", amp)
        return score(json.loads((folder / "metrics.json").read_text()))

    ways = [(0, "cpu", "off"), (1, device.type, "off"), (2, device.type, "bf16")]
    jobs = [(name, *way) for name in EVALUATIONS for way in ways]
    with ThreadPoolExecutor(4) as pool:
        scores = iter(list(pool.map(scored, jobs)))
    for name in EVALUATIONS:
        found = [next(scores) for _ in ways]
        yield (f"{name}: score on the CPU, then here in fp32, bf16",
               ", ".join(f"{value:.4f}" for value in found), max(found) - min(found) < 0.01)


def resume(device, out):
    command = f"pretrain.py {FAKE} --epochs 30 --save-every 5 --device {device.type}"
    run(command, out / "whole")
    process = subprocess.Popen([sys.executable, *command.split(), "--output-dir", str(out / "killed")],
                               cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out / "killed/checkpoint.pth").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = run(command, out / "killed")
    whole, killed = (torch.load(out / name / "checkpoint.pth", weights_only=True)["model"]
                     for name in ("whole", "killed"))
    worst = max(difference(killed[name], value) for name, value in whole.items() if value.is_floating_point())
    start = next((line["resumed_from"] for line in lines if "resumed_from" in line), None)
    yield f"killed, resumed at step {start} of 120: largest difference of a weight", f"{worst:.1e}", \
        start is not None and bool(np.isfinite(worst))


def two(device, out):
    """Batch norm of 3 and 5 images in two processes, against all 8 in one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               __file__, "--device", device.type, "--only", "worker", "--output-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("difference ")]
    if not found:
        yield "two processes by gloo", done.stderr.strip()[-300:], False
        return
    yield "batch norm of 3 and 5 images in two processes by gloo", f"{max(found):.1e}", max(found) < 1e-4


def worker(device, out):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    rank, x, dy = dist.get_rank(), torch.randn(8, 16, 4, 4).to(device), torch.randn(8, 16, 4, 4).to(device)
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    alone, shared = torch.nn.BatchNorm2d(16).to(device), BatchNorm(16).to(device)
    found = []
    for norm, part in ((alone, slice(None)), (shared, mine)):
        inputs = x[part].clone().requires_grad_()
        y = norm(inputs)
        y.backward(dy[part])
        found.append((y, inputs.grad))
    worst = max(difference(ours, expected[mine]) for expected, ours in zip(*found, strict=True))
    to_stdout(f"difference {worst}")         # in one piece: both processes write to one pipe
    dist.barrier()
    dist.destroy_process_group()
    yield "worker", f"{worst:.1e}", True


def speed(device, out):
    write_photographs(out)
    photographs = sorted(out.glob("*.jpg"))
    (out / "files.txt").write_text("\n".join(map(str, photographs * 16)))             # 1,024 pictures
    for name, batch in RECIPES.items():
        for data in ("fake", "files") if name in ON_FILES else ("fake",):
            stage = SCRIPTS.get(name, "pretrain.py")
            epochs = max(4, 30 * batch // 512)
            flags = (f"--image-size 224 --batch-size {batch} --epochs {epochs} --warmup-epochs 0 "
                     f"--knn-every 0 --print-every 10 --device {device.type}").split()
            flags += ["--data", "fake" if data == "fake" else str(out / "files.txt")]
            flags += ["--bunch-size", "0"] if stage == "pretrain.py" else []
            lines = run(f"{stage} @recipes/{name}.txt", out / f"{name}_{data}", *flags)
            lines = [line for line in lines if "images_per_s" in line][1:]     # the first has the start-up
            rate = np.median([line["images_per_s"] for line in lines])
            waiting = np.median([line["waiting"] for line in lines])
            yield (f"{name}, {batch} images a step, {'in memory' if data == 'fake' else 'JPEG files'}",
                   f"{rate:,.0f} images/s, {lines[-1]['memory_mib']:,} MiB, {100 * waiting:.0f} % of the "
                   "time waiting for data", True)
    yield from features(device, out)
    yield from launches(device, out)


def features(device, out):
    """Those of a ResNet-50 at 224 pixels; the second pass, as the first seeks the fastest kernels."""
    torch.backends.cudnn.benchmark = True
    backbone = to_device(build_backbone("resnet50"), device)
    config = dict(data=None, image_size=224)
    noisy = torch.randint(0, 256, (2048, 3, 224, 224), dtype=torch.uint8)
    files = build_dataset(str(out / "files.txt"), "train")
    for name, images, workers in (("in memory", ImageSet(noisy, None, None), 0), ("JPEG files", files, -1)):
        for amp in ("off", "bf16"):
            for _ in range(2):
                start = time.time()
                predict_part(images, backbone, config, device, 256, workers, PRECISIONS[amp][0])
            rate = len(images) / (time.time() - start)
            yield f"features of a ResNet-50, {name}, --amp {amp}", f"{rate:,.0f} images/s", True


def launches(device, out):
    """Kernels in a step of resnet50_multicrop at 128 images, counted by PyTorch's profiler.

    An epoch of four steps more makes the difference of two runs, without what a run does once. A first run
    seeks the fastest kernels.
    """
    import pretrain
    from cli import parse_args
    flags = ("@recipes/resnet50_multicrop.txt --data fake --image-size 224 --batch-size 128 --bunch-size 0 "
             f"--warmup-epochs 0 --knn-every 0 --device {device.type}").split()
    counts = []
    for number, epochs in enumerate((1, 1, 2)):
        more = ["--epochs", str(epochs), "--output-dir", str(out / f"launches_{number}")]
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            try:
                pretrain.main(parse_args(pretrain.get_parser(), flags + more))
            except SystemExit:                       # as a Run ends
                pass
        counts.append(sum(event.device_type.name == "CUDA" for event in profile.events()))
    number = (counts[2] - counts[1]) / 4
    yield "resnet50_multicrop, kernels and copies in a step", f"{number:,.0f}", number > 0


PARTS = {part.__name__: part for part in (parity, stages, evaluations, resume, two, speed, worker)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", default=list(PARTS)[:-1], choices=PARTS,
                        help="default: all but worker, which `two` starts")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs/gpu", help="default: runs/gpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("make test-gpu: skipped, PyTorch sees no CUDA device here")
        return
    device, start, failed = torch.device(args.device), time.time(), 0
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    page = [f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}"]
    print(page[0], flush=True)
    for part in args.only:
        out = args.output_dir.resolve() / part
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)           # `worker` is two processes
        page += ["", f"| {part} | result |", "|---|---|"]
        try:
            for what, result, sound in PARTS[part](device, out):
                page.append(f"| {what} | {result}{'' if sound else ' **FAILED**'} |")
                failed += not sound
                print(page[-1], flush=True)
        except Exception as error:               # the other parts are worth their minutes all the same
            traceback.print_exc()
            page.append(f"| {part} | {type(error).__name__}: {error} **FAILED** |")
            failed += 1
    page += ["", f"{failed} checks failed; {(time.time() - start) / 60:.1f} minutes"]
    (args.output_dir / "page.md").write_text("\n".join(page) + "\n")
    print(f"{page[-1]}; written: {args.output_dir / 'page.md'}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
