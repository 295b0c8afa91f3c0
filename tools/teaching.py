"""Leave a version of the notebooks without solutions, for teachers: `make solutions`.

The notebooks are those that the site offers, less the cells that solve an exercise.
"""

import shutil
import sys
from pathlib import Path

import nbformat
import notebooks as nbs
from nbformat import NotebookNode

OFFERED = nbs.ROOT / "_build" / "html" / "notebooks" / "book"
TEACHING = nbs.ROOT / "_build" / "teaching"


def without_solutions(notebook: NotebookNode) -> NotebookNode:
    """The notebook less the cells with the tag `solution`."""
    kept = [c for c in notebook.cells if "solution" not in c.metadata.get("tags", [])]
    return NotebookNode({**notebook, "cells": kept})


def write_all(offered: Path, teaching: Path) -> int:
    """Write the notebooks of one folder without solutions into another; how many."""
    shutil.rmtree(teaching, ignore_errors=True)
    teaching.mkdir(parents=True)
    paths = sorted(offered.glob("*.ipynb"))
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        nbformat.write(without_solutions(notebook), teaching / path.name)
    return len(paths)


def main() -> None:
    count = write_all(OFFERED, TEACHING)
    if not count:
        sys.exit("the site has no notebooks yet: make book")
    print(f"{TEACHING.relative_to(nbs.ROOT)}: {count} notebooks without solutions")


if __name__ == "__main__":
    main()
