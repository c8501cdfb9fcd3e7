"""Export: a trained backbone as a file that torchvision, timm, DINO or detectron2 read.

    python export.py --checkpoint runs/pretrain/checkpoint.pth --format torchvision --output backbone.pth
    python export.py --checkpoint twist.pth --arch resnet50 --format detectron2 --output twist.pkl

One process on the CPU. The names in the file are those of the other project, which needs nothing of this one:

    torchvision   ResNets: torchvision.models.resnet18() takes all but its classifier fc
    timm          ViTs and ResNets: timm's models with num_classes=0 take all, and DINO's
    detectron2    ResNets: a pickle of numpy arrays for MODEL.WEIGHTS; with INPUT.FORMAT "RGB"
"""

import argparse
import pickle
import re
from pathlib import Path

from checkpoint import UserError, load_pretrained, run, write_atomically
from data import input_of
from model import ARCHS


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint of a run; with --arch any project's backbone")
    add("--arch", choices=ARCHS, help="backbone")
    add("--small-images", action="store_true", help="3×3 stem without stride and max-pool, for 32 pixels")
    add("--key", help="of several networks in a file the one below this name, such as student")
    add("--format", required=True, choices=("torchvision", "timm", "detectron2"), help="whose names to use")
    add("--output", required=True, help="file to write; it must not exist")
    return parser


def detectron2_name(name):
    """layer1.0.bn2.weight -> res2.0.conv2.norm.weight, conv1.weight -> stem.conv1.weight, and so on."""
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name if name.startswith("res") else f"stem.{name}"
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"\bbn(\d)", r"conv\1.norm", name)


def main(args):
    # ------------------------------------------------------------------ model
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already; choose another name or remove it")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    backbone, config = load_pretrained(args.checkpoint, args.arch, args.small_images, args.key)
    arch, state = config["arch"], dict(backbone.state_dict())
    its_own = "timm" if arch.startswith("vit") else "torchvision"
    if not arch.startswith("resnet") and args.format != its_own:
        raise UserError(f"--format {args.format}: has no {arch}, or by other names; --format {its_own} has")
    if args.format == "detectron2" and state["conv1.weight"].shape[-1] != 7:
        raise UserError(f"--format detectron2: its ResNets have a 7×7 stem, which this {arch} has not")

    # ------------------------------------------------------------------ save
    if args.format == "detectron2":
        arrays = {detectron2_name(name): value.numpy() for name, value in state.items()}
        content = {"model": arrays, "__author__": "TWIST", "matching_heuristics": True}
        state = pickle.dumps(content, protocol=4)
    write_atomically(output, state)
    size, mean, std = input_of(config)
    print(f"written: {output}, {arch} in {args.format}'s names; its input are {size} × {size} pixels, from "
          f"0 to 1, less {mean}, divided by {std}")


if __name__ == "__main__":
    run(main, get_parser())
