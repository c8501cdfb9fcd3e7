"""benchmarks/gpu.py needs a GPU; here its commands are parsed, and most of its parts run on the CPU."""

import importlib
import runpy

import pytest
import torch
from processes import ROOT

from benchmarks import gpu
from cli import parse_args


@pytest.mark.parametrize("command", [*gpu.STAGES.values(), *next(zip(*gpu.EVALUATIONS.values(), strict=True)),
                                     *(f"{gpu.SCRIPTS.get(name, 'pretrain.py')} @{ROOT}/recipes/{name}.txt"
                                       for name in gpu.RECIPES)])
def test_commands_are_those_of_the_scripts(command):
    script, *flags = command.split()
    parse_args(importlib.import_module(script.removesuffix(".py")).get_parser(), flags)


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_a_benchmark_finds_what_it_imports(script):
    runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"), run_name="imported")


def test_it_says_that_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    gpu.main()
    assert "skipped, PyTorch sees no CUDA device" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("part", [gpu.parity, gpu.stages, gpu.evaluations, gpu.resume, gpu.two])
def test_parts_on_the_cpu(part, tmp_path, monkeypatch):
    monkeypatch.delitem(gpu.STAGES, "momentum encoder")          # a ViT in float16 takes minutes on a CPU
    for what, result, sound in part(torch.device("cpu"), tmp_path):
        assert sound, (what, result)
