"""Run each figure and table as a student pastes it: `make copy-test` (CHAPTER=...).

Every cell that shows something runs in a fresh process, outside the repository, after
the setup cell and those that it needs (`slices.py`) and no others. Which cells show
something is taken from the executed notebooks. Records are not at hand, as they are not
for a student.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import notebooks as nbs
from nbformat import NotebookNode
from run_notebooks import clock, kernel_environment
from slices import read, slice_of

SECONDS_A_SLICE = 3600


def shows(cell: NotebookNode) -> bool:
    """Whether a cell gave a figure, a table or text, and not only values for prose."""
    return any("scrapbook" not in output.get("metadata", {}) for output in cell.outputs)


def environment() -> dict[str, str]:
    """A student's: the quick lane, no records, figures drawn but not shown."""
    env = {**kernel_environment("quick"), "MPLBACKEND": "agg"}
    return {k: v for k, v in env.items() if k != "GAUSS_FLOWS_RECORDS"}


def run(code: str) -> str:
    """Run code in a fresh process and folder; the error that stopped it, or nothing."""
    with tempfile.TemporaryDirectory(prefix="copied-") as folder:
        script = Path(folder, "copied.py")
        script.write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, script],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS_A_SLICE,
        )
    return done.stderr if done.returncode else ""


def try_chapter(source: Path) -> tuple[int, int]:
    """Run the slices of a chapter; how many there were, and how many failed."""
    notebook = nbs.read_executed(source)
    if notebook is None:
        sys.exit(f"{source.name} has not been executed: make notebooks")
    codes = nbs.code_cells(notebook)
    cells = [read(code.source) for code in codes]
    places = [i for i, code in enumerate(codes) if i and shows(code)]
    failed = 0
    for place in places:
        chain = slice_of(cells, place).cells
        started = time.monotonic()
        error = run("\n\n\n".join(codes[i].source for i in chain))
        seconds = clock(time.monotonic() - started)
        end = "FAILED" if error else "runs"
        after = ", ".join(str(i + 1) for i in chain[:-1])
        print(f"{source.stem}, cell {place + 1}: {end} after {after}; {seconds}")
        print(error, end="", flush=True)
        failed += bool(error)
    return len(places), failed


def main() -> int:
    names = sys.argv[1:] or [source.stem for source in nbs.sources()]
    sources = [source for source in nbs.sources() if source.stem in names]
    if len(sources) < len(names):
        sys.exit(f"expected chapters such as 07_depth_sweep, got {names}")
    counts = [try_chapter(source) for source in sources]
    tried, failed = (sum(column) for column in zip(*counts, strict=True))
    print(f"copy-test: {tried - failed} of {tried} cells run with only what they need")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
