"""README.md and docs/ are true: commands parse, links and names exist, line numbers are right, diffs run.

    python tests/stages/test_docs.py        rewrites line counts, line numbers and the diffs' hunk headers
"""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name).read_text() for name in
         ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "weights/README.md",
          *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
STAGES = [name for name in SCRIPTS if "def get_parser" in (ROOT / name).read_text()]
ANCHOR = re.compile(r"`([\w/]+\.py):(\d+)` `([^`]+)`")          # `file.py:123` `what stands in that line`
COUNT = re.compile(r"^\| `(\w+\.py)` \| (\d+) \|", re.MULTILINE)            # | `file.py` | lines |
TABLE_OF_SETS = re.compile(r"^\| `--datasets` \|.*?\n(?=\n)", re.MULTILINE | re.DOTALL)
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
REFRESH = "run `python tests/stages/test_docs.py`"


def source(name):
    return (ROOT / name).read_text().splitlines()


def line_of(name, expression):
    """The number of the one line of a file that contains an expression."""
    found = [number for number, line in enumerate(source(name), 1) if expression in line]
    assert len(found) == 1, f"{name}: `{expression}` stands in lines {found}; name a piece of one line"
    return found[0]


def hunk_header(diff):
    """(file, the right @@ line) of a diff with one hunk."""
    name = re.search(r"^--- a/(.*)$", diff, re.MULTILINE)[1]
    hunk = diff.split("\n@@")[1].splitlines()[1:]
    old = [line[1:] for line in hunk if line[0] in " -"]
    new = [line[1:] for line in hunk if line[0] in " +"]
    lines = source(name)
    starts = [start for start in range(len(lines)) if lines[start:start + len(old)] == old]
    assert len(starts) == 1, f"{name}: these lines of a diff stand there {len(starts)} times: {old}"
    return name, f"@@ -{starts[0] + 1},{len(old)} +{starts[0] + 1},{len(new)} @@"


def transfer_table():
    """The rows of transfer_sets.py, as docs/evaluation.md has them."""
    sets = importlib.import_module("transfer_sets").SETS
    lines = ["| `--datasets` | | classes | train / validation / test | metric | place in `--data-dir` |",
             "|---|---|---|---|---|---|"]
    for name, row in sets.items():
        images = " / ".join(f"{count:,}" if count else "–" for count in (row.train, row.val, row.test))
        lines.append(f"| `{name}` | {row.title} | {row.classes} | {images} | {row.metric} | {row.where} |")
    return "\n".join(lines) + "\n"


def refresh():
    """Rewrites all numbers that follow from the code."""
    for page, text in PAGES.items():
        text = ANCHOR.sub(lambda m: f"`{m[1]}:{line_of(m[1], m[3])}` `{m[3]}`", text)
        text = COUNT.sub(lambda m: f"| `{m[1]}` | {len(source(m[1]))} |", text)
        text = TABLE_OF_SETS.sub(lambda m: transfer_table(), text)
        for diff in DIFFS if page == "README.md" else ():
            text = text.replace(diff, re.sub(r"^@@.*@@", hunk_header(diff)[1], diff, flags=re.MULTILINE))
        (ROOT / page).write_text(text)


# ---------------------------------------------------------------- the README
def test_readme_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 200


def test_tables_of_files_are_complete_and_their_line_counts_are_right():
    """The README has the stages and what they teach, CONTRIBUTING.md what they share besides."""
    read_first = {name for name, _ in COUNT.findall(README)}
    rows = COUNT.findall(README) + COUNT.findall(PAGES["CONTRIBUTING.md"])
    stated = {name: int(lines) for name, lines in rows}
    assert stated.keys() == set(SCRIPTS) and len(rows) == len(SCRIPTS) and read_first >= set(STAGES)
    right = {name: len(source(name)) for name in SCRIPTS}
    assert stated == right, f"right is {right}; {REFRESH}"


@pytest.mark.parametrize("page", PAGES)
def test_line_numbers_point_at_what_they_name(page):
    for name, number, expression in ANCHOR.findall(PAGES[page]):
        right = line_of(name, expression)
        assert int(number) == right, f"{page}: {name}:{number} should be {name}:{right}; {REFRESH}"
    assert page != "README.md" or len(ANCHOR.findall(README)) == 8          # the hops of one image


def test_code_and_symbols_are_those_of_loss_py():
    loss = (ROOT / "loss.py").read_text()
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        assert block in loss
    rows = re.findall(r"\| symbol \| in `loss.py` .*?\n\n", PAGES["docs/method.md"], re.DOTALL)
    names = re.findall(r"`(\w+)`", "".join(row.split("\n", 1)[1] for row in rows))
    assert len(rows) == 3 and len(names) > 10
    assert not [name for name in names if not re.search(rf"\b{name}\b", loss)]


# ---------------------------------------------------------------- hack it
def test_there_are_three_short_diffs():
    assert len(DIFFS) == 3 and all(len(diff.splitlines()) <= 10 for diff in DIFFS)


@pytest.mark.slow
def test_diffs_apply_one_by_one_and_run_together(tmp_path):
    if not shutil.which("git"):
        pytest.skip("needs git")
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)    # else a tree above may be patched
    for number, diff in enumerate(DIFFS):
        name, header = hunk_header(diff)
        assert f"\n{header}\n" in diff, f"{name}: the hunk header should be {header}; {REFRESH}"
        (tmp_path / f"{number}.diff").write_text(diff)
        subprocess.run(["git", "apply", "--check", f"{number}.diff"], cwd=tmp_path, check=True)
    for number, diff in enumerate(DIFFS):
        subprocess.run(["git", "apply", f"{number}.diff"], cwd=tmp_path, check=True)
        for line in re.findall(r"^\+(?!\+)(.*)", diff, re.MULTILINE):
            assert line in (tmp_path / hunk_header(diff)[0]).read_text()
    arch, = re.findall(r'^\+.*"(\w+)",$', "\n".join(DIFFS), re.MULTILINE)
    command = f"pretrain.py --data fake --arch {arch} --batch-size 128 --epochs 1 --output-dir run"
    ended = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "step 4/4" in ended.stdout and (tmp_path / "run" / "metrics.json").exists()


# ---------------------------------------------------------------- the page of evaluations
def test_the_sets_of_transfer_are_those_of_the_code():
    assert TABLE_OF_SETS.findall(PAGES["docs/evaluation.md"]) == [transfer_table()], REFRESH


# ---------------------------------------------------------------- all pages
@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, monkeypatch):
    from cli import parse_args

    monkeypatch.chdir(ROOT)
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", PAGES[page], re.DOTALL)).replace("\\\n", " ")
    lines = blocks.splitlines() + re.findall(r"`((?:python|torchrun|sbatch) [^`]* [^`]+)`", PAGES[page])
    for line in filter(str.strip, lines):
        words = shlex.split(line, comments=True)
        script = next((word for word in words if word in STAGES), None)
        if script:
            parser = importlib.import_module(script.removesuffix(".py")).get_parser()
            parse_args(parser, words[words.index(script) + 1:])
        elif re.search("python$|sbatch", words[0]):
            assert (ROOT / words[1]).exists(), line
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        else:
            assert words[0] == "pip", line


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        assert re.match("https?://|#", target) or ((ROOT / page).parent / target).exists(), target


def test_readme_links_to_every_page():
    linked = set(re.findall(r"\]\(([^)\s]+)\)", README))
    assert linked >= PAGES.keys() - {"README.md", "weights/README.md"}


def test_recipes_that_are_named_exist_and_all_are_listed():
    exist = {path.stem for path in (ROOT / "recipes").glob("*.txt")}
    for page, text in PAGES.items():
        assert set(re.findall(r"recipes/(\w+)\.txt", text)) <= exist, page
    table = re.findall(r"^\| (.*?) \| `", PAGES["docs/recipes.md"], re.MULTILINE)
    assert set(re.findall(r"\w+", " ".join(table))) - {"then"} == exist


def test_tests_that_are_named_exist():
    named = set(re.findall(r"`(test_\w+\.py)`", PAGES["docs/benchmarks.md"]))
    assert named == {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_one_version_everywhere():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", PAGES["CHANGELOG.md"], re.MULTILINE)[1] == version


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    refresh()
