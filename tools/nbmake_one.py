"""Run one notebook under nbmake and say which cell it is at.

Called by run_notebooks.py: `python tools/nbmake_one.py notebook.ipynb seconds`.
"""

import sys

import nbmake.nb_run
import pytest
from nbclient import NotebookClient

MARK = "@@cell"


class Watched(NotebookClient):
    """A client that prints the number of each code cell as it starts."""

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        """Say where we are, then execute the cell."""
        if cell.cell_type == "code":
            codes = [i for i, c in enumerate(self.nb.cells) if c.cell_type == "code"]
            print(MARK, codes.index(cell_index) + 1, len(codes), flush=True)
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def main(path: str, timeout: str) -> int:
    nbmake.nb_run.NotebookClient = Watched
    # the project's own pytest options are meant for its tests, not for this
    return pytest.main(
        [
            *("--nbmake", "--overwrite", "--nbmake-kernel=python3"),
            *(f"--nbmake-timeout={timeout}", "-c", "/dev/null", "--rootdir=."),
            *(
                "-p",
                "no:cacheprovider",
                "-s",
                "-q",
                "--color=no",
                "--disable-warnings",
                path,
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
