"""Run each figure and table as a student pastes it: `make copy-test` (CHAPTER=...).

Every cell that shows something runs in a fresh process, outside the repository, after
the setup cell and those that it needs (`slices.py`) and no others. Which cells show
something is taken from the executed notebooks. Records are not at hand, as they are not
for a student. Chapters run side by side; the processes of one share what XLA compiled,
as most of them run the same cells. A slice with which one that runs begins has run too.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import notebooks as nbs
from nbformat import NotebookNode
from run_notebooks import clock, kernel_environment
from slices import read, slice_of

from gauss_flows.compilation import SHORTEST

SECONDS_A_SLICE = 3600
TIMES_COMPILATION = {"10_cost_of_depth"}  # and has to compile everything each time


def shows(cell: NotebookNode) -> bool:
    """Whether a cell gave a figure, a table or text, and not only values for prose."""
    return any("scrapbook" not in output.get("metadata", {}) for output in cell.outputs)


def environment(compiled: str = "") -> dict[str, str]:
    """A student's: the quick lane, no records, figures drawn but not shown."""
    env = {**kernel_environment("quick"), "MPLBACKEND": "agg"}
    env |= {"JAX_COMPILATION_CACHE_DIR": compiled} if compiled else {}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(SHORTEST)}
    return {k: v for k, v in env.items() if k != "GAUSS_FLOWS_RECORDS"}


def run(code: str, compiled: str = "") -> str:
    """Run code in a fresh process and folder; the error that stopped it, or nothing.

    Programs that are in the folder `compiled` are not compiled again.
    """
    with tempfile.TemporaryDirectory(prefix="copied-") as folder:
        script = Path(folder, "copied.py")
        script.write_text(code, encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, script],
                cwd=folder,
                env=environment(compiled),
                capture_output=True,
                text=True,
                timeout=SECONDS_A_SLICE,
            )
        except subprocess.TimeoutExpired:
            return f"it had not ended after {SECONDS_A_SLICE} s, its limit\n"
    return done.stderr if done.returncode else ""


def try_chapter(source: Path) -> tuple[int, int]:
    """Run the slices of a chapter; how many there were, and how many failed."""
    notebook = nbs.read_executed(source)
    if notebook is None:
        sys.exit(f"{source.name} has not been executed: make notebooks")
    codes = nbs.code_cells(notebook)
    cells = [read(code.source) for code in codes]
    places = [i for i, code in enumerate(codes) if i and shows(code)]
    chains = sorted((slice_of(cells, i).cells for i in places), key=len, reverse=True)
    passed: list[tuple[int, ...]] = []
    with tempfile.TemporaryDirectory(prefix="compiled-") as folder:
        compiled = "" if source.stem in TIMES_COMPILATION else folder
        for chain in chains:
            *needed, last = (i + 1 for i in chain)
            longer = [other for other in passed if other[: len(chain)] == chain]
            started = time.monotonic()
            code = "\n\n\n".join(codes[i].source for i in chain)
            error = "" if longer else run(code, compiled)
            took = f"; {clock(time.monotonic() - started)}"
            how = f", seen with cell {longer[0][-1] + 1}" if longer else took
            end = "FAILED" if error else "runs"
            line = f"{source.stem}, cell {last}: {end} after {str(needed)[1:-1]}{how}"
            print(f"{line}\n{error}", end="", flush=True)
            passed += [] if error else [chain]
    return len(chains), len(chains) - len(passed)


def main() -> int:
    names = sys.argv[1:] or [source.stem for source in nbs.sources()]
    sources = [source for source in nbs.sources() if source.stem in names]
    if len(sources) < len(names):
        sys.exit(f"expected chapters such as 07_depth_sweep, got {names}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = list(pool.map(try_chapter, sources))
    tried, failed = (sum(column) for column in zip(*counts, strict=True))
    print(f"copy-test: {tried - failed} of {tried} cells run with only what they need")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
