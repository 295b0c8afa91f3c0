"""Run one notebook under nbmake; say which cell it is at, and what memory it took.

Called by run_notebooks.py: `python tools/nbmake_one.py notebook.ipynb seconds`. It ends
when its standard input is closed; the kernel ends with it.
"""

import resource
import signal
import sys
import tempfile
from pathlib import Path

import nbmake.nb_run
import pytest
from alone import end_with_parent
from nbclient import NotebookClient
from nbclient.exceptions import (
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
)
from nbformat.v4 import new_output

MARK = "@@cell"
MEMORY = "@@memory"


class Watched(NotebookClient):
    """A client that prints the number of each code cell as it starts.

    A cell that hangs or kills its kernel gets an error as its output, as a cell that
    raises one does: so all failures are told alike, and the outputs before are kept.
    """

    sockets: Path
    startup_timeout = 300  # seconds: on a busy machine a minute, the usual, is short

    def create_kernel_manager(self):
        """Talk through sockets in a folder of our own.

        Kernels that begin side by side now and then choose the same free TCP port, and
        then one of them never answers.
        """
        manager = super().create_kernel_manager()
        manager.transport, manager.ip = "ipc", str(self.sockets / "kernel")
        return manager

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        """Say where we are, then execute the cell."""
        if cell.cell_type == "code":
            codes = [i for i, c in enumerate(self.nb.cells) if c.cell_type == "code"]
            print(MARK, codes.index(cell_index) + 1, len(codes), flush=True)
        try:
            return await super().async_execute_cell(cell, cell_index, *args, **kwargs)
        except CellTimeoutError as error:
            raise self.failed(cell, "TimeoutError", self.how_long()) from error
        except DeadKernelError as error:
            how = await self.how_it_died()
            raise self.failed(cell, "DeadKernelError", how) from error

    def failed(self, cell, name: str, text: str) -> CellExecutionError:
        """Note the error in the cell."""
        lines = [f"{name}: {text}"]
        cell.outputs.append(new_output("error", ename=name, evalue=text))
        cell.outputs[-1].traceback = lines
        return CellExecutionError(lines[0], name, text)

    def how_long(self) -> str:
        return f"the cell had not ended after {self.timeout} s, its limit"

    async def how_it_died(self) -> str:
        """What is known of the end of a kernel that nobody stopped."""
        assert self.km is not None
        assert self.km.provisioner is not None
        code = await self.km.provisioner.poll()
        if code == -signal.SIGKILL:
            return "the kernel was killed (SIGKILL), as happens where memory runs out"
        if code is not None and code < 0:
            return f"the kernel was killed ({signal.Signals(-code).name})"
        return f"the kernel ended by itself (exit status {code})"


def main(path: str, timeout: str) -> int:
    end_with_parent()
    nbmake.nb_run.NotebookClient = Watched
    with tempfile.TemporaryDirectory(prefix="gauss-flows-") as folder:
        Watched.sockets = Path(folder)
        code = under_nbmake(path, timeout)
    print(MEMORY, kernel_memory(), flush=True)
    return code


def kernel_memory() -> int:
    """The most bytes that the kernel, our one child and ended by now, ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def under_nbmake(path: str, timeout: str) -> int:
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
