"""The trained network that a file holds: its weights, its input, and the flags of an evaluation that name it.

A stage calls network_flags(parser) in its get_parser, and load_network(args) in its main.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from torch import nn

from checkpoint import (
    UserError,
    differences,
    is_ours,
    load_backbone,
    load_head,
    printable,
    read_file,
    require_ours,
    say_once,
)
from cli import at_least
from data import input_of
from model import ARCHS, build_backbone, build_network


# ---------------------------------------------------------------- flags of an evaluation
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


def fingerprint(network):
    """SHA-256 of all parameters and buffers of a network, names and bits."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def choose_input(config, args):
    """The configuration with the input that the flags give, else its own; says which input that is.

    config: as load_pretrained and load_twist return it. Raises UserError for two or four means.
    """
    given = {name: getattr(args, name) for name in ("image_size", "mean", "std") if getattr(args, name)}
    size, mean, std = input_of(config | given)
    sources = [f"--{name.replace('_', '-')}" for name in given]
    if len(given) < 3:
        sources.append(config.get("input_from", f"from {args.checkpoint}"))
    numbers = f"{size} × {size} pixels, mean {_joined(mean)}, std {_joined(std)}"
    say_once(f"input: {numbers} ({', '.join(sources)})")
    return config | dict(image_size=size, mean=list(mean), std=list(std))


def to_device(network, device):
    """The network on a device, to be evaluated. On CUDA its convolutions are faster channels-last.

    On a CPU the other layout would change the last digits.
    """
    on_cuda = torch.device(device).type == "cuda"
    return network.to(device, memory_format=torch.channels_last if on_cuda else torch.preserve_format)


def _joined(numbers):
    return " ".join(f"{number:.4g}" for number in numbers)


# ---------------------------------------------------------------- the network in a file
def load_twist(path, key=None, arch=None):
    """(Twist, configuration) of a training run's checkpoint. The Twist is in training mode.

    key: teacher, the momentum encoder, or student, the trained network; None: teacher if there is one.
    arch: what the user takes its backbone for, or None. Raises UserError for another backbone, and for a run
    that had another loss, and so no classes.
    """
    state = load_trained(path)
    _refuse_arch(state["config"], arch, path, "--arch")
    return build_ours(state["config"], state[_choose(state, key, path)], path), state["config"]


def load_trained(path):
    """{model, config, maybe teacher} of a Twist, from a checkpoint of a run or of TWIST's released code.

    Raises UserError for a bare backbone, and for a network that was trained by an objective without classes.
    """
    content, verified = read_file(path)
    state = _trained(content, path) if verified else None
    if state is None:
        require_ours(content, verified, path)            # says what is wrong with it
    loss = state["config"].get("loss", "twist")
    if loss != "twist":
        raise UserError(f"{path}: holds no classes, because its loss was {loss}; use one of pretrain.py")
    return state


def _trained(content, path, published=True):
    """A file's content as {model, config, maybe teacher}, if a run pre-trained it, else None.

    published: also of TWIST's released code. Raises UserError for a run of a stage that trains with labels.
    """
    if not is_ours(content):
        return read_published(content, path) if published else None
    stage = content.get("stage")
    if stage in ("lincls", "semisup", "finetune", "segment", "detect"):
        backbone = Path(path).with_name("backbone.pth")
        other = backbone if backbone.is_file() else content["config"].get("checkpoint")
        raise UserError(f"{path}: holds what {stage}.py trained with labels; use {printable(str(other))}, "
                        "which has its backbone")
    return content


def load_pretrained(path, arch=None, small_images=False, key=None):
    """(backbone, configuration for data.input_of) of a file, for stages that start from a trained backbone.

    A checkpoint of this project or of TWIST's released code needs no arch; key is as for load_twist. A bare
    backbone of a run needs none if its description lies beside it (see read_description). Any other file is
    read into build_backbone(arch, small_images) by load_backbone(..., key).
    """
    return _pretrained(path, arch, small_images, key)[:2]


def load_teacher(path, arch=None, head="auto"):
    """(backbone, name of the head, head, configuration) of SEED's teacher; see load_pretrained, load_head."""
    backbone, config, place = _pretrained(path, arch, arch_flag="--teacher-arch", key_flag=None)
    activation = nn.GELU if config["arch"].startswith("vit") else nn.ReLU
    return backbone, *load_head(path, place, head, activation), config


def _pretrained(path, arch=None, small_images=False, key=None, arch_flag="--arch", key_flag="--key"):
    """(backbone, configuration, place of the backbone in the file); the flags are those of the stage."""
    content, _ = read_file(path)
    trained = _trained(content, path, published=arch is None)
    config = trained["config"] if trained else read_description(path)
    _refuse_arch(config or {}, arch, path, arch_flag)
    if config and small_images and not config["small_images"]:
        raise UserError(f"--small-images: {path} has no such stem; leave it out")
    if trained:
        name = _choose(trained, key, path, key_flag)
        place = f"{name}.{trained.get('prefix', '')}backbone"
        return build_ours(config, trained[name], path).backbone, config, place
    if config:
        backbone = build_backbone(config["arch"], config["small_images"])
        return backbone, config, load_backbone(backbone, path, key).place
    if arch is None:
        raise UserError(f"{arch_flag}: {path} is no training checkpoint of this project and does not say "
                        f"which network it holds; name it by {arch_flag}")
    try:
        backbone = build_backbone(arch, small_images)
    except ValueError as error:
        raise UserError(f"{arch_flag}: {error}") from None
    place = load_backbone(backbone, path, key).place
    config = {"data": None, "image_size": 0, "mean": None, "std": None, "arch": arch, "seed": 0,
              "small_images": small_images, "input_from": f"ImageNet's, as {path} does not say"}
    return backbone, config, place


def _refuse_arch(config, arch, path, flag):
    if arch not in (None, config.get("arch", arch)):
        raise UserError(f"{flag} {arch}: {path} holds a {config['arch']}; leave {flag} out")


def load_init(network, args):
    """Starts a Twist from the weights of --init; not if the run resumes, since its own weights follow then.

    Of a whole network the head is taken too if it has the same sizes; of other files the backbone alone.
    Says which. Raises UserError if the backbone is not that of --arch.
    """
    out = Path(args.output_dir)
    saved = (out / "checkpoint.pth").exists() or (out / "checkpoint.prev.pth").exists()
    if args.init is None or args.resume not in ("auto", "never") or saved and not args.overwrite:
        return
    if args.restarts > 1:
        raise UserError(f"--restarts {args.restarts}: all would start from --init; use --restarts 1")
    content, _ = read_file(args.init)
    trained = _trained(content, args.init)
    if trained is None:
        load_backbone(network.backbone, args.init)
        say_once(f"--init {args.init}: the backbone starts from it, the head anew")
        return
    weights = trained[_choose(trained, None, args.init, flag=None)]
    misfit = differences(network.state_dict(), weights)
    if not misfit:
        network.load_state_dict(weights)
        say_once(f"--init {args.init}: backbone and head start from it")
        return
    backbone = {str(name).removeprefix("backbone."): value for name, value in weights.items()
                if str(name).startswith("backbone.")}
    problem = differences(network.backbone.state_dict(), backbone)
    if problem:
        raise UserError(f"--init {args.init}: its {trained['config'].get('arch')} is not this --arch "
                        f"{args.arch} ({problem}); use its flags")
    network.backbone.load_state_dict(backbone)
    say_once(f"--init {args.init}: the backbone starts from it, the head anew, as its own differs ({misfit})")


# ---------------------------------------------------------------- TWIST's released code
RENAMED = (("module.", ""),                                 # of DistributedDataParallel; the others are older
           ("projection_heads.cls_heads.0.0.", "projection_heads.last_linear."),
           ("projection_heads.cls_heads.0.1.", "projection_heads.norm."))


def read_published(content, path):
    """A checkpoint of TWIST's released code as {model, config, prefix, and teacher if there is one}, or None.

    Its `args` are not read: sizes and arch stand in the tensors, the input is ImageNet's at 224 pixels.
    Raises UserError if the backbone is none of ARCHS.
    """
    networks, is_candidate = {}, isinstance(content, dict) and "config" not in content
    for name in ("model", "teacher"):
        found = content.get(name) if is_candidate else None
        if isinstance(found, dict):
            networks[name] = {_renamed(str(key)): value for key, value in found.items()}
    hidden = networks.get("model", {}).get("projection_heads.projection_head.0.bias")
    last = networks.get("model", {}).get("projection_heads.last_linear.bias")
    if not isinstance(hidden, torch.Tensor) or not isinstance(last, torch.Tensor):
        return None
    config = {"loss": "twist", "num_classes": last.numel(), "hidden_dim": hidden.numel(), "bunch_size": 0,
              "nbs": "projection_heads.norm.running_var" in networks["model"], "small_images": False,
              "data": None, "seed": 0, "image_size": 224, "mean": None, "std": None,
              "input_from": "ImageNet's, as in TWIST's released code"}
    vit = "backbone.cls_token" in networks["model"]
    for arch in [arch for arch in ARCHS if arch.startswith("vit") == vit]:
        if not differences(shapes(config | {"arch": arch}), networks["model"]):
            say_once(f"{path}: a checkpoint of TWIST's released code; {arch}, {last.numel()} classes")
            prefix = "module." * all(str(key).startswith("module.") for key in content["model"])
            return networks | {"config": config | {"arch": arch}, "prefix": prefix}
    raise UserError(f"{path}: looks like a checkpoint of TWIST's released code, but its network is none of "
                    f"{', '.join(ARCHS)}; use one of these")


def _renamed(name):
    for old, new in RENAMED:
        name = name.replace(old, new, 1) if name.startswith(old) else name
    return name


# ---------------------------------------------------------------- what a bare backbone is
def description(config, size, mean, std):
    """What read_description reads, as JSON: arch, input and data of the backbone of a run's configuration."""
    about = {"arch": config["arch"], "small_images": config.get("small_images", False), "image_size": size,
             "mean": list(mean), "std": list(std)}
    about |= {name: config.get(name) for name in ("data", "seed", "val_share", "group_names", "classes")}
    return json.dumps(about, indent=1).encode()


def read_description(path):
    """The configuration in FILE.json beside a bare backbone FILE.pth, or None if there is none.

    Raises UserError unless all values are of their kind.
    """
    file = Path(path).with_suffix(".json")
    if Path(path).is_dir() or not file.is_file():
        return None
    try:
        if file.stat().st_size > 2 ** 20:
            raise ValueError("is too large")
        about = json.loads(file.read_bytes())
        kinds = {"arch": about["arch"] in ARCHS, "small_images": isinstance(about["small_images"], bool),
                 "image_size": type(about["image_size"]) is int and 0 < about["image_size"] < 2 ** 16,
                 "mean": _are_numbers(about["mean"], -math.inf), "std": _are_numbers(about["std"], 0),
                 "data": isinstance(about["data"], str | None),
                 "seed": type(about["seed"]) is int and 0 <= about["seed"] < 2 ** 48,
                 "val_share": about["val_share"] is None or 0 <= about["val_share"] < 1,
                 "group_names": isinstance(about["group_names"], bool | None),
                 "classes": isinstance(about["classes"], list | None)}
        if kinds["classes"] and not all(isinstance(name, str) for name in about["classes"] or ()):
            kinds["classes"] = False
        wrong = [name for name, right in kinds.items() if not right]
        if wrong:
            raise ValueError(f"{wrong[0]} is {printable(repr(about[wrong[0]]))[:40]}")
        if about["small_images"] and not about["arch"].startswith("resnet"):
            raise ValueError(f"small_images with {about['arch']}")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(f"{file}: does not describe the backbone in {path} ({said.splitlines()[0]}); restore "
                        "it, or move it away and use --arch") from None
    return about | {"input_from": f"from {file}"}


def _are_numbers(values, low):
    """Whether values is a list of one or three finite numbers above low."""
    if not isinstance(values, list) or len(values) not in (1, 3):
        return False
    return all(type(value) in (int, float) and low < value < math.inf for value in values)


def _choose(state, key, path, flag="--key"):
    """'teacher' or 'model', the part of a run's checkpoint that `key` means; says so if it has both."""
    networks = ["teacher", "student"] if "teacher" in state else ["student"]
    name = "student" if key == "model" else key or networks[0]
    if name not in networks:
        raise UserError(f"{path}: has no '{name}', only {' and '.join(networks)}; choose another --key")
    if len(networks) == 2:
        other = "student" if name == "teacher" else "teacher"
        hint = f"; {flag} {other} takes the other" if flag else ""
        say_once(f"{path}: holds a teacher (the momentum encoder) and a student; the {name} is taken{hint}")
    return "teacher" if name == "teacher" else "model"


def shapes(config):
    """The state dict of a configuration's network, without memory: a hostile one may claim any size."""
    try:
        with torch.device("meta"):
            return build_network(config).state_dict()
    except RuntimeError:                 # an arch of one's own may read numbers while it is built
        return build_network(config).state_dict()


def build_ours(config, weights, path, drop_path=0.0):
    """The network of a run's configuration with these weights. Raises UserError if they do not fit."""
    try:
        problem = differences(shapes(config), weights)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
    if problem:
        backbone = Path(path).with_name("backbone.pth")
        other = f"{printable(str(backbone))}, its backbone" if backbone.is_file() else "another file"
        raise UserError(f"{path}: not a network of this project ({problem}); use {other}")
    network = build_network(config, drop_path)
    network.load_state_dict(weights)
    return network
