"""Our stack beside flowjax, zuko, nflows and normflows: ``make benchmark``.

    .venv/bin/python benchmarks/peers.py [--quick] [--limit SECONDS] [--out FOLDER]

Same architecture, data, batch and optimiser in all of them. Each cell, a library at one
depth, dimension, batch and dtype, is measured in a process of its own (``peer_jax.py``,
``peer_torch.py``); the PyTorch ones in ``.venv-peers``, which is made from
``peers.txt`` when it is missing. At the headline cells all processes are alive together
and take turns, so that ratios are between times of the same minutes. A way that takes
longer than the limit is stopped and told as such; one that the depth before says will,
is not tried. Then ``seeds.py`` trains many seeds at once.

Writes numbers, table and figure, ``cpu.json``, ``cpu.md`` and ``cpu.svg``, or those of
a GPU if JAX has one, into ``benchmarks/results``. Run it on a quiet machine; two cores
take it about half an hour. ``--quick`` measures little, to try it out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import render
from cells import CHUNK, Cell
from provenance import ROOT, Start, printed

HERE = Path(__file__).resolve().parent
PEERS = ROOT / ".venv-peers"
SPAN = 2.0  # seconds after which a way's rounds end, in a cell that is no headline
ROWS = 10_000
DEPTHS = (2, 4, 8, 16, 32, 64)
DTYPES = ("float32", "float64")
OURS = ("gauss-flows", "flowjax", "equinox", "optax", "jax")
TORCH = ("zuko", "nflows", "normflows")
# in this order: what a step takes tells how many `fit` is to make in one call
LIBRARIES = (
    "flowjax Scan",
    "gauss_flows step",
    "gauss_flows fit",
    "flowjax Chain",
    *TORCH,
)
WAYS = ("step", "density", "sample")
ENVIRONMENT = {
    **os.environ,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU is shared at the headline
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile times are measured
}
NO_MEMORY = ("can't allocate memory", "RESOURCE_EXHAUSTED", "bad_alloc", "MemoryError")

Row = dict[str, Any]


def ways(library: str) -> tuple[str, ...]:
    """What a library is asked for; `fit` tells the directions of our flow already."""
    return WAYS[:1] if library == "gauss_flows step" else WAYS


class Stopped(Exception):
    """A process has ended before its answer, and why."""


class Process:
    """One cell's process: asked for a way, it answers with times."""

    def __init__(self, cell: Cell, folder: Path, memory: int, limit: float):
        self.cell = cell
        self.limit = limit
        self.ended = ""
        self.errors = tempfile.TemporaryFile("w+")
        worker = HERE / f"peer_{'torch' if cell.library in TORCH else 'jax'}.py"
        python = PEERS / "bin/python" if cell.library in TORCH else sys.executable
        data = folder / f"{cell.dim}.npy"
        self.process = subprocess.Popen(
            [python, worker, json.dumps(cell._asdict()), data, str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=ENVIRONMENT,
        )

    def ask(self, way: str) -> Row:
        """The answer on a way, or ``Stopped``."""
        if self.ended:
            raise Stopped(self.ended)
        assert self.process.stdin
        assert self.process.stdout
        timer = threading.Timer(self.limit, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(f"{way}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        late = not timer.is_alive()
        timer.cancel()
        if line:
            return json.loads(line)
        self.ended = f"> {self.limit:.0f} s" if late else self._why()
        raise Stopped(self.ended)

    def _why(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        text = self.errors.read()
        if any(sign in text for sign in NO_MEMORY):
            return "out of memory"
        return f"failed: {(text.strip().splitlines() or ['no message'])[-1]}"

    def close(self) -> None:
        """End the process."""
        if self.process.stdin and not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        self.process.wait()
        self.errors.close()


class Measurement:
    """Everything that is measured in one run of this program."""

    def __init__(self, folder: Path, quick: bool, limit: float):
        self.folder = folder
        self.limit = limit
        self.memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        self.rounds = 2 if quick else 3
        self.headline_rounds = 2 if quick else 15
        self.rows: dict[Cell, Row] = {}

    def headline(self, cells: list[Cell]) -> None:
        """Measure cells in turns: way by way, round by round, library by library."""
        processes = []
        for cell in cells:
            processes.append(self._start(cell))
            self._prepare(processes[-1], "step")  # the next may need its time
        for way in WAYS:
            asked = [p for p in processes if way in ways(p.cell.library)]
            if way != "step":
                for process in asked:
                    self._prepare(process, way)
            for _ in range(self.headline_rounds):
                for process in asked:
                    self._round(process, way)
        for process in processes:
            process.close()
            self._tell(process.cell)

    def alone(self, cell: Cell) -> None:
        """Measure one cell, unless the depth before says that it is hopeless."""
        if reason := self._hopeless(cell):
            self.rows[_name(cell)] = dict.fromkeys(ways(cell.library), reason)
            self._tell(cell)
            return
        process = self._start(cell)
        for way in ways(cell.library):
            self._prepare(process, way)
            begin = time.perf_counter()
            for _ in range(self.rounds):
                self._round(process, way)
                if time.perf_counter() - begin > SPAN:
                    break
        process.close()
        self._tell(cell)

    def _start(self, cell: Cell) -> Process:
        self.rows[_name(cell)] = {}
        return Process(self._with_steps(cell), self.folder, self.memory, self.limit)

    def _prepare(self, process: Process, way: str) -> None:
        """First call of a way, and what it tells; or why it does not come."""
        row = self.rows[_name(process.cell)]
        try:
            answer = process.ask(way)
        except Stopped as stopped:
            row[way] = str(stopped)
            return
        first, warm = answer.pop("first"), answer.pop("warm")
        row[way] = []
        if way == "step":
            row |= {"compile_seconds": max(first - warm, 0.0), "warm": warm, **answer}

    def _round(self, process: Process, way: str) -> None:
        row = self.rows[_name(process.cell)]
        if isinstance(row[way], str):
            return
        try:
            row[way].append(process.ask(way)["seconds"])
        except Stopped as stopped:
            row[way] = str(stopped)

    def _with_steps(self, cell: Cell) -> Cell:
        """The cell, with as many steps of ``fit`` as a process can make in a while."""
        for other in ("gauss_flows step", "flowjax Scan"):
            row = self.rows.get(_name(cell._replace(library=other)), {})
            if "warm" in row:
                steps = int(np.clip(3 * CHUNK / row["warm"], 2, 100))
                return cell._replace(steps=steps)
        return cell

    def _hopeless(self, cell: Cell) -> str | None:
        """Why a cell is not tried, from the next lower depth of the same."""
        lower = [c for c in self.rows if c._replace(depth=cell.depth) == _name(cell)]
        lower = [c for c in lower if c.depth < cell.depth]
        if not lower:
            return None
        below = max(lower, key=lambda c: c.depth)
        row, times = self.rows[below], cell.depth / below.depth
        if isinstance(row["step"], str):
            return (
                row["step"] if "expected" in row["step"] else f"{row['step']} expected"
            )
        unrolled = times if cell.library == "flowjax Chain" else 1.0
        if row["compile_seconds"] * unrolled + row["warm"] * times > self.limit:
            return f"> {self.limit:.0f} s expected"
        if row["peak_bytes"] * times > self.memory:
            return "out of memory expected"
        return None

    def _tell(self, cell: Cell) -> None:
        step = self.rows[_name(cell)]["step"]
        shown = (
            step if isinstance(step, str) else f"{1e3 * np.median(step):.3g} ms a step"
        )
        print(
            f"{cell.library:17s} {cell.depth:3d} blocks, {cell.dim}-D, "
            f"{cell.batch} rows, {cell.dtype}: {shown}",
            flush=True,
        )


def _name(cell: Cell) -> Cell:
    """A cell without what may differ between two looks at it."""
    return cell._replace(steps=0)


def grid(quick: bool) -> list[Cell]:
    """The cells beyond the headline, deeper ones after shallower ones."""
    cells = []
    for dim, batch in ((2, 512), (2, 8192), (64, 512), (64, 8192)):
        chapters = (dim, batch) == (2, 512)
        depths = DEPTHS if chapters else (8,)
        # elsewhere `fit` stands for both ways of training
        names = [n for n in LIBRARIES if chapters or n != "gauss_flows step"]
        cells += [
            Cell(name, depth, dim, batch, dtype)
            for dtype in DTYPES
            for depth in depths
            for name in names
        ]
    return [c for c in cells if c[1:5] == (2, 64, 512, "float32")] if quick else cells


def measure(folder: Path, quick: bool, limit: float) -> list[Row]:
    """Measure all cells; returns their rows."""
    todo = Measurement(folder, quick, limit)
    for dtype in DTYPES[:1] if quick else DTYPES:
        todo.headline([Cell(name, 8, 2, 512, dtype) for name in LIBRARIES])
    for cell in grid(quick):
        if _name(cell) not in todo.rows:
            todo.alone(cell)
    rows = [(cell._asdict(), row) for cell, row in sorted(todo.rows.items())]
    drop = ("steps", "warm")
    return [{k: v for k, v in (c | r).items() if k not in drop} for c, r in rows]


def write_data(folder: Path) -> None:
    """The source's spiral, and normals in 64 dimensions."""
    import gauss_flows as gf

    np.save(folder / "2.npy", np.asarray(gf.data.source_spiral(ROWS)))
    np.save(folder / "64.npy", np.random.default_rng(0).standard_normal((ROWS, 64)))


def make_peers() -> None:
    """Make the environment of the PyTorch peers, unless it is what is asked for."""
    wanted, stamp = (HERE / "peers.txt").read_text(), PEERS / "peers.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("making .venv-peers, some gigabytes: a few minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", PEERS], check=True)
    pip = [PEERS / "bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-r", HERE / "peers.txt"], check=True)
    stamp.write_text(wanted)


def versions(*theirs: str) -> dict[str, str]:
    """Versions of Python and of all that is compared, from both environments."""
    ask = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    told = printed(PEERS / "bin/python", "-c", ask, "torch", *theirs).split()
    return provenance.versions(*OURS) | dict(zip(("torch", *theirs), told, strict=True))


def main() -> None:
    """Measure everything, then write numbers, table and figure."""
    parser = argparse.ArgumentParser(description="Our stack beside its peers.")
    parser.add_argument("--quick", action="store_true", help="little, to try it out")
    parser.add_argument(
        "--limit",
        type=float,
        default=60.0,
        help="seconds for the first call of a way, compilation included",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    make_peers()
    start = Start()
    quick = ["--quick"] if args.quick else []
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        cells = measure(Path(folder), args.quick, args.limit)
    result = {
        **start.told(versions(*TORCH)),
        "limit_seconds": args.limit,
        **json.loads(printed(sys.executable, HERE / "seeds.py", *quick)),
        "cells": cells,
    }
    render.write(result, args.out)


if __name__ == "__main__":
    main()
