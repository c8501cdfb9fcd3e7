"""The files keep their shape: what is shared, how long and nested code is, which flags and imports it has."""

import argparse
import ast
import difflib
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

import data
import model
import pretrained
from cli import parse_args

ROOT = Path(__file__).parents[2]
SOURCES = {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}
STAGES = [name for name in SOURCES if "def get_parser" in SOURCES[name]]
SHARED = {"loss.py", "model.py", "data.py", "folders.py", "shards.py", "views.py", "optim.py",
          "checkpoint.py", "cli.py", "run.py", "pictures.py", "predictions.py", "pretrained.py",
          "restarts.py", "clusters.py", "results.py", "page.py", "logistic.py", "transfer_sets.py",
          "scenes.py", "segment_sets.py", "rcnn.py", "detection_sets.py", "detection_metrics.py"}
TRAINED = ("pretrain.py", "barlow.py", "selflabel.py", "distill.py")
# lines and cyclomatic complexity of `main`
LIMITS = dict.fromkeys(TRAINED, (120, 25))
LIMITS |= dict.fromkeys(("lincls.py", "semisup.py", "finetune.py", "segment.py", "detect.py",
                         "cluster_eval.py"), (140, 35))
LONGEST_STAGE, LONGEST_STEP, LONGEST_DIFF = 350, 30, 180
RUN_FLAGS = ("--output-dir", "--resume", "--overwrite", "--seed", "--device", "--amp", "--workers",
             "--save-every", "--print-every", "--timeout", "--data-dir")
PACKAGES = {"torch", "torchvision", "numpy", "scipy"}
ALSO = {"folders.py": {"PIL", "pillow_heif", "simplejpeg"}, "pictures.py": {"PIL", "matplotlib"},
        "page.py": {"PIL"}, "segment_sets.py": {"PIL"}, "detection_metrics.py": {"faster_coco_eval"}}
# PIL comes with torchvision, the others are optional


def parser_of(script):
    return importlib.import_module(script.removesuffix(".py")).get_parser()


def flags_of(script):
    return {flag: action for action in parser_of(script)._actions for flag in action.option_strings
            if action.dest != "help"}


def test_every_file_is_a_stage_or_a_shared_one():
    assert SOURCES.keys() - set(STAGES) == SHARED | {"minimal.py"}


# ---------------------------------------------------------------- length and nesting
def complexity(function):
    """Number of ways to branch, plus one: each condition, loop, handler, and operand of `and` or `or`."""
    number = 1
    for node in ast.walk(function):
        if isinstance(node, (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler)):
            number += 1
        elif isinstance(node, ast.BoolOp):
            number += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            number += 1 + len(node.ifs)
    return number


@pytest.mark.parametrize("script", LIMITS)
def test_main_is_read_in_one_sitting(script):
    functions = ast.parse(SOURCES[script]).body
    # in finetune.py, main is a loop over runs
    main = next(node for node in functions
                if isinstance(node, ast.FunctionDef) and node.name in ("train_once", "main"))
    measured = main.end_lineno - main.lineno + 1, complexity(main)
    assert all(found <= limit for found, limit in zip(measured, LIMITS[script], strict=True)), measured


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_is_not_long(script):
    assert len(SOURCES[script].splitlines()) <= LONGEST_STAGE


@pytest.mark.parametrize("script", (*TRAINED, "semisup.py", "finetune.py", "segment.py", "detect.py"))
def test_the_training_step_is_short(script):
    pattern = r"\n *# ---- one training step[^\n]*\n(.*?)\n *run\.watch\("
    steps = re.findall(pattern, SOURCES[script], re.DOTALL)
    assert len(steps) == 1 and len(steps[0].splitlines()) <= LONGEST_STEP


@pytest.mark.parametrize("sibling", ["barlow.py", "selflabel.py"])
def test_siblings_differ_by_the_method_only(sibling):
    lines = [SOURCES[name].splitlines() for name in ("pretrain.py", sibling)]
    opcodes = difflib.SequenceMatcher(None, *lines, autojunk=False).get_opcodes()
    marked = sum(a_end - a + b_end - b for tag, a, a_end, b, b_end in opcodes if tag != "equal")
    assert marked <= LONGEST_DIFF


@pytest.mark.parametrize("script", SOURCES)
def test_no_statement_has_two_comprehensions_or_ternaries(script):
    dense = []
    for node in ast.walk(ast.parse(SOURCES[script])):
        if isinstance(node, (ast.Assign, ast.Expr, ast.Return)):
            inner = [x for x in ast.walk(node) if isinstance(x, (ast.comprehension, ast.IfExp, ast.Lambda))]
            dense += [f"line {node.lineno}: {ast.unparse(node)[:100]}"] * (len(inner) > 1)
    assert not dense, dense


# ---------------------------------------------------------------- flags
def sources_that_read(script):
    """Of the stage, and of what it gives its flags to."""
    texts = [SOURCES[script]]
    for called, reader in (("Run(", SOURCES["run.py"]), ("input_of(", inspect.getsource(data.input_of)),
                           ("labelled(", inspect.getsource(data.labelled)),
                           ("folder_flags(", inspect.getsource(data.folder_options)),
                           ("build_network(", inspect.getsource(model)),
                           ("Restarts(", SOURCES["restarts.py"]),
                           ("network_flags(", SOURCES["pretrained.py"]),
                           ("load_init(", inspect.getsource(pretrained.load_init))):
        texts += [reader] * (called in SOURCES[script])
    return "\n".join(texts)


@pytest.mark.parametrize("script", STAGES)
def test_every_flag_has_help_and_is_read(script):
    text = sources_that_read(script)
    for flag, action in flags_of(script).items():
        assert action.help and action.help != argparse.SUPPRESS and "_" not in flag
        read = rf'args\.{action.dest}\b|config\[?(\.get\()?"{action.dest}"|names? (in|=) .*"{action.dest}"'
        assert re.search(read, text), f"{script} never reads {flag}"


def meaning(action):
    """What tells whether two flags take the same: their kind, choices, and what becomes of some values."""
    values = []
    for text in ("-2", "-1", "0", "0.5", "1", "2", "nan", "word"):
        try:
            values.append((action.type or str)(text))
        except (ValueError, argparse.ArgumentTypeError) as error:
            values.append(f"{type(error).__name__}: {error}")
    return type(action), action.nargs, action.choices and list(action.choices), action.metavar, values


@pytest.mark.parametrize("flag", RUN_FLAGS)
def test_a_flag_of_every_run_has_one_type(flag):
    meanings = {script: meaning(flags_of(script)[flag]) for script in STAGES if flag in flags_of(script)}
    assert len(meanings) >= 4
    first = next(iter(meanings.values()))
    assert {script: found for script, found in meanings.items() if found != first} == {}


def unknown_flags(text, script):
    """Flags that a text names but its stage does not have. `lincls.py --depths` is a flag of that stage, and
    `a run with --ema` is of pretrain.py."""
    unknown = []
    for other, flag in re.findall(r"(?:(\w+\.py|run with) )?(--[a-z][\w-]+)", text):
        stage = "pretrain.py" if other == "run with" else other or script
        unknown += [flag] * (flag not in flags_of(stage))
    return unknown


@pytest.mark.parametrize("script", STAGES)
def test_help_texts_are_true(script):
    """Flags, choices and values that they name are taken by this stage."""
    flags = flags_of(script)
    parser_of(script).format_help()                            # a lone % sign would end in an error
    for flag, action in flags.items():
        assert not unknown_flags(action.help, script), flag
        named = re.findall(r"(?:^|[;,] )([\w-]+): ", action.help)
        if action.choices:
            assert not set(named) - {"default", *action.choices}, flag
        elif action.type:
            for value in filter(re.compile(r"-?\d").match, named):
                action.type(value)


@pytest.mark.parametrize("script", STAGES)
def test_commands_and_flags_in_the_docstring_are_true(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = ast.get_docstring(ast.parse(SOURCES[script]))
    commands = re.findall(r"^    ((?:python|torchrun) .*?)(?:  +.*)?$", text, re.MULTILINE)
    assert commands, "name one command at least"
    for command in commands:
        words = shlex.split(command.replace("--device cuda", ""))             # there may be none here
        name = next(word for word in words if word in STAGES)
        parse_args(parser_of(name), words[words.index(name) + 1:])
    rest = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    assert not unknown_flags(rest, script)


def test_the_default_is_its_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    defaults = parse_args(parser_of("pretrain.py"), [])
    assert parse_args(parser_of("pretrain.py"), ["@recipes/fashion_mnist.txt"]) == defaults


# ---------------------------------------------------------------- first and last lines
@pytest.mark.parametrize("script", STAGES)
def test_every_stage_starts_in_the_same_way(script):
    """The tests call launch() as the last lines do."""
    assert SOURCES[script].endswith('\nif __name__ == "__main__":\n    launch(main, get_parser())\n')


@pytest.mark.parametrize("script", SOURCES)
def test_only_the_four_packages_are_imported(script):
    """matplotlib is optional, so pictures.py imports it where it draws."""
    names = set()
    for node in ast.walk(ast.parse(SOURCES[script])):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    ours = {name.removesuffix(".py") for name in SOURCES}
    assert names <= PACKAGES | ALSO.get(script, set()) | ours | sys.stdlib_module_names


def test_every_refusal_says_what_to_do():
    """After a semicolon, as a question, or as the range that a value must be in."""
    silent = []
    for name, source in SOURCES.items():
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "UserError":
                words = ast.unparse(call)
                says = re.search(r"; |\?|: must be|give one of|needs ", words)
                explains = re.search(r"\{(error|problem)\}'\)$|a readable picture", words)    # in that text
                if not says and not explains:
                    silent.append(f"{name}:{call.lineno}: {words}")
    assert not silent, "\n".join(silent)
