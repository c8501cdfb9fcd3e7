"""Export: a trained backbone as a file that torchvision, timm, DINO or detectron2 reads.

    python export.py --checkpoint runs/resnet18 --format torchvision --output resnet18.pth
    python export.py --checkpoint twist.pth --arch resnet50 --format detectron2 --output twist.pkl

The first command is for a run with --arch resnet18, and torchvision loads its file:

    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load("resnet18.pth", weights_only=True), strict=False)

The classifier fc keeps its random weights. The other project needs nothing of this one, because the file has
that project's names:

    torchvision   ResNets, MobileNets, EfficientNets: all but the classifier; resnet8 exists only here
    timm          ViTs and ResNets: timm's models with num_classes=0, and DINO's, load all of it
    detectron2    ResNets: a pickle of numpy arrays for MODEL.WEIGHTS; set INPUT.FORMAT to "RGB"

One process on the CPU, a second or two. Nothing is converted but names, so accuracy stays as it is.
"""

import argparse
import pickle
import re
from pathlib import Path

from checkpoint import UserError, to_stdout, write_atomically
from cli import HelpFormatter, launch
from pretrained import load_network, network_flags


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    network_flags(parser)
    add = parser.add_argument_group("file").add_argument
    add("--format", required=True, choices=("torchvision", "timm", "detectron2"),
        help="project whose names the tensors get")
    add("--output", required=True, help="file to write; it must not exist yet")
    return parser


def detectron2_name(name):
    """layer1.0.bn2.weight -> res2.0.conv2.norm.weight, conv1.weight -> stem.conv1.weight, and so on."""
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name if name.startswith("res") else f"stem.{name}"
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"\bbn(\d)", r"conv\1.norm", name)


def main(args):
    # ---------------------------------------------------------------- model
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already; choose another name or remove it")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    backbone, config = load_network(args)
    arch, state = config["arch"], dict(backbone.state_dict())
    own_format = "timm" if arch.startswith("vit") else "torchvision"
    if not arch.startswith("resnet") and args.format != own_format:      # timm's MobileNet has other names
        raise UserError(f"--format {args.format}: has no {arch}, or with other names; "
                        f"use --format {own_format}")
    if args.format == "detectron2" and state["conv1.weight"].shape[-1] != 7:
        raise UserError(f"--format detectron2: its ResNets have a 7×7 stem, which this {arch} has not; use "
                        f"--format {own_format}")

    # ---------------------------------------------------------------- save
    if args.format == "detectron2":
        arrays = {detectron2_name(name): value.numpy() for name, value in state.items()}
        # matching_heuristics lets detectron2 match the names by their endings
        content = {"model": arrays, "__author__": "TWIST", "matching_heuristics": True}
        state = pickle.dumps(content, protocol=4)
    write_atomically(output, state)
    to_stdout(f"written: {output}, {arch} in {args.format}'s names. The pixels of its input are from 0 to 1, "
              "minus the mean, divided by std")


if __name__ == "__main__":
    launch(main, get_parser())
