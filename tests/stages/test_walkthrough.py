"""walkthrough.ipynb and the figures of docs/ are what their scripts make."""

import json
import platform
import re
import sys

import pytest
from processes import ROOT

sys.path += [str(ROOT / "docs"), str(ROOT / "docs" / "figures")]
import make  # noqa: E402
import make_walkthrough  # noqa: E402

NOTEBOOK = json.loads((ROOT / "walkthrough.ipynb").read_text(encoding="utf-8"))
NUMBER = re.compile(r"-?\d+\.?\d*")
# Another machine rounds otherwise, so a number may differ by 0.002. After a training it may differ by 0.2
# because rounding decides which classes are found. Above 2 the limit is this share of half the number.
TOLERANCE = {False: 0.002, True: 0.2}


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def difference(old, new):
    """What differs between the outputs of a cell and those of its second execution; None if nothing does."""
    text, again = printed(old), printed(new)
    if NUMBER.sub("#", text) != NUMBER.sub("#", again):
        return f"prints {again!r}, not {text!r}"
    if pictures(old) != pictures(new):
        return f"draws {pictures(new)} pictures, not {pictures(old)}"
    tolerance = TOLERANCE["trained" in old["metadata"].get("tags", ())]
    for a, b in zip(NUMBER.findall(text), NUMBER.findall(again), strict=True):
        if abs(float(a) - float(b)) > tolerance * max(1, abs(float(a)) / 2):
            return f"prints {b}, not {a}, in {again!r}"
    return None


# ---------------------------------------------------------------- figures
@pytest.mark.parametrize("name", make.FIGURES)
def test_figures_are_those_that_their_script_draws(name):
    assert (make.HERE / name).read_bytes() == make.FIGURES[name]().encode()


def test_the_numbers_of_the_collapses_are_those_of_the_two_cases_in_the_readme():
    told = re.search("<desc.*?>(.*)</desc>", make.collapses())[1]
    assert re.findall("loss (.*?)\\.(?: |$)", told) == ["0.00", "0.00", "−2.30"]
    assert re.findall("sharpness (.*?), diversity (.*?),", told) == [("2.30", "2.30"), ("0.00", "0.00"),
                                                                     ("0.00", "2.30")]


# ---------------------------------------------------------------- the notebook
def test_the_notebook_has_the_cells_of_its_script():
    """After a change: python docs/make_walkthrough.py"""
    built = make_walkthrough.build()
    for cell, committed in zip(built["cells"], NOTEBOOK["cells"], strict=True):
        outputs = {"outputs", "execution_count"} & committed.keys()
        assert cell == committed | {name: cell[name] for name in outputs}
    assert {**built, "cells": None} == {**NOTEBOOK, "cells": None}


def test_the_notebook_has_outputs_and_names_no_machine():
    text = (ROOT / "walkthrough.ipynb").read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        source = "".join(cell["source"])
        assert pictures(cell) >= source.count("plt.show()") - source.count("def look(")
        assert bool(printed(cell)) == ("print(" in source or "look(" in source), source
        outputs = json.dumps([shown for shown in cell["outputs"] if "image/png" not in shown.get("data", {})])
        assert not re.search(r'stderr|"error"|/\w+/\w+|\\\\\w+\\\\|Warning', outputs), outputs
        assert platform.node() not in outputs
    assert sum(map(pictures, cells)) >= 10


def test_a_difference_is_found():
    def cell(text, tags=()):
        return dict(metadata={"tags": tags}, outputs=[dict(output_type="stream", name="stdout", text=[text])])
    old = cell("ACC 0.500 of 24 images")
    assert difference(old, cell("ACC 0.501 of 24 images")) is None
    assert difference(old, cell("ACC 0.503 of 24 images"))
    assert difference(old, cell("ACC 0.500 of 25 images"))
    assert difference(old, cell("ACC 0.500 of 24 views"))
    assert difference(old, cell("ACC 0.500 of 24 images") | dict(outputs=[]))
    trained = cell("ACC 0.500", [make_walkthrough.TRAINED])
    assert difference(trained, cell("ACC 0.690")) is None and difference(trained, cell("ACC 0.710"))


@pytest.mark.slow
def test_a_fresh_kernel_makes_the_same_outputs_and_the_answers_run():
    notebook = make_walkthrough.build()
    number = len(notebook["cells"])
    answers = re.findall(r"```python\n(.*?)```", "".join(notebook["cells"][-1]["source"]), re.DOTALL)
    assert len(answers) == 3
    for i, answer in enumerate(answers):
        notebook["cells"].append(dict(cell_type="code", id=f"answer{i}", metadata={}, execution_count=None,
                                      outputs=[], source=answer))
    cells = make_walkthrough.execute(notebook)["cells"]
    different = [difference(old, new) for old, new in zip(NOTEBOOK["cells"], cells[:number], strict=True)
                 if old["cell_type"] == "code"]
    assert not list(filter(None, different)), different
    diversity = re.findall(r"sharpness (.*), diversity (.*)", printed(cells[number]))
    one_class, with_nbs, uniform, uniform_with_nbs = (tuple(map(float, row)) for row in diversity)
    assert one_class[1] < 1.5 and with_nbs[1] > 2.2
    assert uniform[0] > 2.2 and uniform_with_nbs[0] > 2.2
