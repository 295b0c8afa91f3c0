"""Execute the notebooks whose outputs are not those of the present code.

This is the only place where the book's code runs: what comes out is tested, rendered
and offered for download. A notebook that fails keeps its last good outputs out of the
book, and is named together with its cell and its error.
"""

import argparse
import datetime
import os
import queue
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import nbformat
import notebooks as nbs
from alone import alone
from nbformat import NotebookNode
from nbmake_one import MARK, MEMORY

ONE = Path(__file__).with_name("nbmake_one.py")
RUNNING = nbs.EXECUTED / "running"
SECONDS_A_CELL = {"quick": 1800, "full": 6 * 3600}
TERMINAL = sys.stdout.isatty()
SIGN_OF_LIFE = 1 if TERMINAL else 30  # seconds
RUNS: set[subprocess.Popen[str]] = set()


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def say(text: str, *, passing: bool = False) -> None:
    """Print a line; in a terminal the next one overwrites a passing one."""
    if TERMINAL:
        print(f"\r\033[K{text}", end="" if passing else "\n", flush=True)
    else:
        print(text, flush=True)


def kernel_environment(lane: str) -> dict[str, str]:
    """The environment of the kernel: ours, and none of the user's own Jupyter."""
    ours = Path(sys.prefix) / "share" / "jupyter"
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME")
    }
    # kernels run side by side, and BLAS threads that wait for each other spin
    env.setdefault("OPENBLAS_NUM_THREADS", "1")
    env.update(
        GAUSS_FLOWS_LANE=lane,
        GAUSS_FLOWS_RECORDS=str(nbs.RECORDS),
        JUPYTER_PATH=str(ours),
        JUPYTER_CONFIG_DIR=str(RUNNING / "jupyter"),
        JUPYTER_NO_CONFIG="1",
        IPYTHONDIR=str(RUNNING / "ipython"),
        MPLCONFIGDIR=str(RUNNING / "matplotlib"),
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        PYTHONUNBUFFERED="1",
        PYDEVD_DISABLE_FILE_VALIDATION="1",
    )
    return env


def line_of(source: Path, code: str) -> int:
    """The line of the page on which a cell's code begins."""
    text = source.read_text(encoding="utf-8")
    return text[: max(text.find(code), 0)].count("\n") + 1


def failure(source: Path, path: Path, number: int, log: str) -> str:
    """Which cell failed and how, from the notebook that nbmake left.

    Where it left none, the cell is the one that was begun last, and the reason is what
    nbmake said of itself.
    """
    page = source.relative_to(nbs.ROOT)
    ran = nbs.read(path)
    for i, cell in enumerate(nbs.code_cells(ran) if ran else [], start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                where = f"{page}:{line_of(source, cell.source)}, code cell {i}"
                return f"{where}: {output.ename}: {output.evalue}"
    said = re.search(r"NBMAKE INTERNAL ERROR\n(.+)", log)
    reason = said[1] if said else "stopped (see above)"
    if not number:
        return f"{page}, before its first cell: {reason}"
    code = nbs.code_cells(nbs.export(source))[number - 1].source
    return f"{page}:{line_of(source, code)}, code cell {number}: {reason}"


class Outcome(NamedTuple):
    """How a run went: its seconds, the most bytes its kernel held, the error if any."""

    seconds: float
    memory: int
    error: str


def follow(
    process: subprocess.Popen[str], name: str, started: float
) -> tuple[int, int, str]:
    """Show where a notebook is until it ends; its last cell, memory, and printing."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    log, line, due = [], "", started + SIGN_OF_LIFE
    number, cell, memory = 0, "starting", 0
    while line is not None:
        try:
            line = lines.get(timeout=max(0.05, due - time.monotonic()))
        except queue.Empty:
            line = ""
        if line and (mark := re.search(rf"{MARK} (\d+) (\d+)", line)):
            number, cell = int(mark[1]), f"cell {mark[1]} of {mark[2]}"
        elif line and (mark := re.search(rf"{MEMORY} (\d+)", line)):
            memory = int(mark[1])
        elif line:
            log.append(line)
        if time.monotonic() >= due:
            spent = clock(time.monotonic() - started)
            say(f"{name}: {cell}, {spent}", passing=True)
            due = time.monotonic() + SIGN_OF_LIFE
    return number, memory, nbs.COLOUR.sub("", "".join(log)).rstrip()


def run(source: Path, path: Path, place: str, lane: str) -> Outcome:
    """Execute the notebook at `path`."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, ONE, path, str(SECONDS_A_CELL[lane])],
        cwd=nbs.ROOT,
        env=kernel_environment(lane),
        stdin=subprocess.PIPE,  # never written to: it ends when we do
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    RUNS.add(process)
    with process:
        number, memory, log = follow(process, f"{place} {source.stem}", started)
        code = process.wait()
    RUNS.discard(process)
    seconds = time.monotonic() - started
    if code == 0:
        return Outcome(seconds, memory, "")
    say(log)
    return Outcome(seconds, memory, failure(source, path, number, log))


def refresh(source: Path, setting: dict[str, str]) -> bool:
    """Whether the executed notebook is up to date; new prose is taken over."""
    ran = nbs.read_executed(source)
    if ran is None:
        return False
    about = ran.metadata.get("gauss_flows", {})
    if about.get("fingerprint") != nbs.fingerprint(source, setting):
        return False
    present = nbs.with_outputs(nbs.export(source), ran)
    if present != ran:
        nbs.write(present, nbs.executed_path(source))
    return True


def keep(
    source: Path, notebook: NotebookNode, path: Path, about: dict[str, object]
) -> None:
    """Make a run that went well the book's own."""
    done = nbs.with_outputs(notebook, nbformat.read(path, 4))
    done.metadata["gauss_flows"] = about
    nbs.write(done, nbs.executed_path(source))
    path.unlink()


def forget_removed(sources: list[Path]) -> None:
    """Drop executed notebooks whose page is no longer in the table of contents."""
    wanted = {nbs.executed_path(source) for source in sources}
    for path in (nbs.EXECUTED / "book").glob("*.ipynb"):
        if path not in wanted:
            path.unlink()


def execute(
    source: Path, place: str, setting: dict[str, str], *, records: bool
) -> tuple[float, str]:
    """Execute one notebook and keep it; the seconds it took, and the error if any."""
    say(f"{place} {source.stem}: starting", passing=True)
    # taken before the run, because what is edited meanwhile is not what ran
    notebook, mark = nbs.export(source), nbs.fingerprint(source, setting)
    path = RUNNING / f"{source.stem}.ipynb"
    seconds = 0.0
    try:
        nbs.write(notebook, path)
        seconds, memory, error = run(source, path, place, setting["lane"])
        if not (error or records):
            date = datetime.date.today().isoformat()
            cost = {"seconds": round(seconds, 1), "memory": memory}
            about = {**setting, **cost, "date": date, "fingerprint": mark}
            keep(source, notebook, path, about)
    except OSError as fault:  # a full disk, say
        error = f"{source.relative_to(nbs.ROOT)}, outside of its cells: {fault}"
    if error and not records:
        # what the failed code once gave must not stay in the book
        nbs.executed_path(source).unlink(missing_ok=True)
    return seconds, error


def at_once(setting: dict[str, str], *, records: bool) -> int:
    """How many notebooks run side by side: two, since one rarely fills two cores.

    One alone where its times are to be kept, or where a GPU has room for one only.
    """
    kept = records or setting["lane"] == "full"
    alone = kept or not setting["device"].startswith("CPU")
    return 1 if alone else min(2, os.cpu_count() or 1)


def find_fonts(lane: str) -> None:
    """Have Matplotlib look for fonts now: in a cell, what it says would be output."""
    subprocess.run(
        [sys.executable, "-c", "import matplotlib.font_manager"],
        env=kernel_environment(lane),
        stderr=subprocess.DEVNULL,
        check=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--records",
        action="store_true",
        help="run in the full lane for book/records, and leave the book as it is",
    )
    parser.add_argument("chapters", nargs="*", help="such as 07_depth_sweep; all")
    options = parser.parse_args()
    if options.records:
        os.environ["GAUSS_FLOWS_LANE"] = "full"
    sources = nbs.sources()
    names = options.chapters or [source.stem for source in sources]
    if unknown := set(names) - {source.stem for source in sources}:
        sys.exit(f"no such chapter: {', '.join(sorted(unknown))}")
    setting = nbs.environment()
    asked = todo = [source for source in sources if source.stem in names]
    if not options.records:
        forget_removed(sources)
        todo = [source for source in asked if not refresh(source, setting)]
    fresh = f"{len(asked) - len(todo)} of {len(asked)} up to date"
    what = "for book/records" if options.records else fresh
    say(f"notebooks: {setting['lane']} lane on {setting['device']}; {what}")

    if todo:
        find_fonts(setting["lane"])
    failures, left = [], len(todo)
    with ThreadPoolExecutor(at_once(setting, records=options.records)) as pool:
        runs = {
            pool.submit(
                execute,
                source,
                f"[{i}/{len(todo)}]",
                setting,
                records=options.records,
            ): f"[{i}/{len(todo)}] {source.stem}"
            for i, source in enumerate(todo, start=1)
        }
        try:
            for done in as_completed(runs):
                (seconds, error), left = done.result(), left - 1
                failures += [error] if error else []
                end = "FAILED after" if error else "done in"
                say(f"{runs[done]}: {end} {clock(seconds)}; {left} left")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*RUNS]:
                process.terminate()  # nbmake then stops the kernel
            raise
    for error in failures:
        say(f"FAILED {error}")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        with alone("notebooks"):
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nnotebooks: broken off; those that were done stay done")
    except OSError as fault:
        sys.exit(f"notebooks: FAILED: {fault}")
