"""The trained network that an evaluation looks at: the flags that name it, its weights, and its input.

A stage calls network_flags(parser) in its get_parser, and load_network(args) in its main.
"""

from checkpoint import UserError, load_pretrained, say_once
from data import input_of
from model import ARCHS
from run import at_least


def network_flags(parser, required=True):
    """Adds the group of flags that load_network reads, and returns it. required: of --checkpoint."""
    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--checkpoint", required=required, help="checkpoint of a run; with --arch any project's backbone")
    add("--key", help="network in a file that has several: teacher (default) or student of a run with --ema; "
        "in a file of another project the name that it stands under")
    add("--arch", choices=ARCHS, help="backbone of a file that does not name it, as one of another project")
    add("--small-images", action="store_true",
        help="with --arch: ResNet stem for images of 32 pixels, 3×3, stride 1, no max-pool")
    add("--image-size", type=at_least(0), default=0,
        help="pixels of the network's input; 0: as the checkpoint says, 224 if it does not")
    add("--mean", type=at_least(0, float), nargs="+", metavar="M",
        help="mean of the pixels (0 to 1), one number or three; without it the checkpoint's, else ImageNet's")
    add("--std", type=at_least(1e-6, float), nargs="+", metavar="S",
        help="standard deviation of the pixels, one number or three; without it as for --mean")
    return group


def load_network(args):
    """(backbone, configuration for data.input_of) that the flags of network_flags name.

    The configuration has at least data (a name or None), seed, arch, image_size, mean, std. Raises UserError.
    """
    backbone, config = load_pretrained(args.checkpoint, args.arch, args.small_images, args.key)
    return backbone, choose_input(config, args)


def choose_input(config, args):
    """The configuration with the input that the flags give, else its own; says which input that is.

    config: as load_pretrained and load_twist return it. Raises UserError for two or four means.
    """
    given = {name: getattr(args, name) for name in ("image_size", "mean", "std") if getattr(args, name)}
    for name in given.keys() & {"mean", "std"}:
        if len(given[name]) not in (1, 3):
            raise UserError(f"--{name}: one number for all channels or three")
    size, mean, std = input_of(config | given)
    sources = [f"--{name.replace('_', '-')}" for name in given]
    if len(given) < 3:
        sources.append(config.get("input_from", f"from {args.checkpoint}"))
    numbers = f"{size} × {size} pixels, mean {_joined(mean)}, std {_joined(std)}"
    say_once(f"input: {numbers} ({', '.join(sources)})")
    return config | dict(image_size=size, mean=list(mean), std=list(std))


def _joined(numbers):
    return " ".join(f"{number:.4g}" for number in numbers)
