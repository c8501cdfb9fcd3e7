"""What the project promises about itself: its README, its flags, its imports."""

import argparse
import ast
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

import model
from checkpoint import parse_args

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
STAGES = [name for name in SCRIPTS if "def get_parser" in (ROOT / name).read_text()]
SHARED = {"loss.py", "model.py", "data.py", "optim.py", "checkpoint.py"}
README = (ROOT / "README.md").read_text()


def parser_of(script):
    return importlib.import_module(script.removesuffix(".py")).get_parser()


def flags_of(script):
    return {flag: action for action in parser_of(script)._actions for flag in action.option_strings
            if action.dest != "help"}


def test_every_file_is_a_stage_or_one_of_five_shared_ones():
    assert set(SCRIPTS) - set(STAGES) == SHARED


def test_one_flag_has_one_type_and_one_help_text_everywhere():
    seen = {}
    for script in STAGES:
        for flag, action in flags_of(script).items():
            meaning = (action.type, action.choices and list(action.choices), action.help, action.nargs)
            assert seen.setdefault(flag, meaning) == meaning, f"{script} {flag}"


@pytest.mark.parametrize("script", STAGES)
def test_every_flag_has_help_and_is_read(script):
    source = (ROOT / script).read_text()
    shared = (ROOT / "checkpoint.py").read_text() + (ROOT / "data.py").read_text()    # open_output, input_of
    if "build_network(vars(args)" in source:
        shared += inspect.getsource(model.build_twist)
    for flag, action in flags_of(script).items():
        assert action.help and "_" not in flag
        if action.help != argparse.SUPPRESS:
            read = rf'args\.{action.dest}\b|config.get\("{action.dest}"\)|names = .*"{action.dest}"'
            assert re.search(read, source + shared), f"{script} never reads {flag}"


def test_every_stage_chooses_its_device_alike():
    block = r'    best = "cuda".*?would take {best}"\)\n'
    blocks = [re.search(block, (ROOT / script).read_text(), re.DOTALL)
              for script in STAGES if "--device" in flags_of(script)]
    assert all(blocks) and len({block[0] for block in blocks}) == 1


def test_copies_in_the_stages_are_equal():
    """Each stage stands by itself, so these are written again in each; what differs would be a mistake."""
    blocks = (r"    rank, world_size, local_rank = .*?\n    best",
              r"\n        dist\.init_process_group\(.*?\)\)\n",
              r"    if world_size > 1: +# all go on.*?state = box\[0\]\n", r"SIGNALS = .*?\n",
              r"    caught = \[\]\n.*?append\(signum\)\)\n")
    functions = [rf"\ndef {name}\(.*?(?=\n\n\n)"
                 for name in ("finish", "write", "rng_state", "set_rng_state", "memory_mib")]
    trained = [script for script in STAGES if "--timeout" in flags_of(script)]
    assert len(trained) == 5
    for pattern in (*blocks, *functions):
        matches = [re.search(pattern, (ROOT / script).read_text(), re.DOTALL) for script in trained]
        assert all(matches) or pattern in functions, pattern
        found = [match[0] for match in matches if match]
        assert len(found) >= 2 and len(set(found)) == 1, pattern


def test_every_script_starts_in_the_same_way():
    """The tests call run() as its last lines do."""
    last = '\nif __name__ == "__main__":\n    run(main, get_parser())\n'
    assert all((ROOT / script).read_text().endswith(last) for script in STAGES)


def test_collapse_is_handled_alike():
    """But for the name of the stage."""
    block = r"            collapsed = collapsed \+ 1 if .*?return finish\(4\)\n"
    found = {script: re.search(block, (ROOT / script).read_text(), re.DOTALL)
             for script in STAGES if "--stop-on-collapse" in flags_of(script)}
    assert len(found) == 3 and all(found.values())
    assert len({match[0].replace(script, "") for script, match in found.items()}) == 1


def test_readme_commands_parse():
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in blocks.splitlines() if line.strip()]
    parsed = 0
    for words in commands:
        script = next((word for word in words if word in STAGES), None)
        if script:
            parse_args(parser_of(script), words[words.index(script) + 1:])
            parsed += 1
        elif words[0] == "python":
            assert (ROOT / words[1]).exists() or words[1] == "-m", words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    assert parsed >= 4


def test_readme_table_of_files_is_complete():
    named = set(re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE))
    assert named >= set(SCRIPTS) and all((ROOT / name).exists() for name in named)


def test_the_default_is_its_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = parser_of("pretrain.py")
    assert parse_args(parser, ["@recipes/fashion_mnist.txt"]) == parse_args(parser, [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_the_four_packages_are_imported(script):
    tree = ast.parse((ROOT / script).read_text())
    names = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import)
             for alias in node.names}
    names |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    ours = {name.removesuffix(".py") for name in SCRIPTS}
    # PIL: torchvision needs it itself
    assert names <= {"torch", "torchvision", "numpy", "scipy", "PIL"} | ours | sys.stdlib_module_names
