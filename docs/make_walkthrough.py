"""Makes walkthrough.ipynb at the top level from docs/walkthrough.py: runs its cells and stores the outputs.

    python docs/make_walkthrough.py            about 3 minutes of one slow core

Edit docs/walkthrough.py, not the notebook. A cell begins with `# %%`; `# %% [markdown]` has text behind `# `.
"""

import json
import re
import zlib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
SCRIPT, NOTEBOOK = HERE / "walkthrough.py", ROOT / "walkthrough.ipynb"
TRAINED = "trained"            # tag of cells whose outputs depend on a training, so on how a machine rounds


def read_cells():
    """The cells of walkthrough.py: a list of (kind, source), kind "markdown", "code" or "trained"."""
    cells = []
    for cell in re.split(r"^# %%", SCRIPT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        head, source = cell.split("\n", 1)
        kind = head.strip(" []") or "code"
        if kind == "markdown":
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        cells.append((kind, source.strip("\n")))
    return cells


def build():
    """The notebook without outputs, as a dict in format 4.5. It names no interpreter and no machine."""
    cells = []
    for kind, source in read_cells():
        name = f"{zlib.crc32(source.encode()):08x}"            # of the text: a new cell renames no other
        cell = dict(cell_type="markdown", id=name, metadata={}, source=source.splitlines(keepends=True))
        if kind != "markdown":
            tags = {"tags": [TRAINED]} if kind == TRAINED else {}
            cell |= dict(cell_type="code", metadata=tags, execution_count=None, outputs=[])
        cells.append(cell)
    kernel = dict(display_name="Python 3", language="python", name="python3")
    return dict(cells=cells, metadata=dict(kernelspec=kernel, language_info=dict(name="python")),
                nbformat=4, nbformat_minor=5)


def execute(notebook):
    """The notebook with outputs, by a fresh kernel in the repository's folder. Raises nbclient's
    CellExecutionError, which shows the cell that failed."""
    import nbformat
    from nbclient import NotebookClient

    executed = nbformat.from_dict(nbformat.v4.reads(json.dumps(notebook)))
    NotebookClient(executed, timeout=1800, record_timing=False, coalesce_streams=True,
                   resources={"metadata": {"path": str(ROOT)}}).execute()
    executed["metadata"] = notebook["metadata"]                # the kernel has added its version
    return json.loads(nbformat.writes(executed))


if __name__ == "__main__":
    NOTEBOOK.write_text(json.dumps(execute(build()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
