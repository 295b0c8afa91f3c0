"""What all libraries are measured on, and how a measuring process answers.

Plain Python and NumPy, for it is imported in both environments. A *cell* is one library
at one depth, dimension, batch and dtype, in a process of its own. The process reads the
name of a *way* a line, ``step`` (train), ``density`` or ``sample``, repeats it for
about ``CHUNK`` seconds, and answers with one line of JSON.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WIDTH = 24  # of the two hidden layers of each conditioner
KNOTS = 8  # interior ones, so that there is one bin more
INTERVAL = 4.0  # half-width of the interval on which a spline acts
LEARNING_RATE = 1e-3
CLIP = 1.0
CHUNK = 0.2  # seconds of repeating that give one time

Run = Callable[[int], float]
"""``run(n)`` repeats n times and returns the seconds of one."""


class Cell(NamedTuple):
    """What a process measures; ``steps`` is how many ``fit`` makes in one call."""

    library: str
    depth: int
    dim: int
    batch: int
    dtype: str
    steps: int = 10


class Model(NamedTuple):
    """A library's flow: its number of parameters, and what it can be asked to do."""

    parameters: int
    ways: dict[str, Run]
    facts: Callable[[], dict[str, Any]] = dict  # known after the first step


def read_command() -> tuple[Cell, np.ndarray]:
    """The cell that this process measures, and its data.

    The command line holds the cell as JSON, the file of the data, and the bytes beyond
    which the process may not grow, so that a deep flow cannot take the machine down.
    """
    cell, data, memory = sys.argv[1:]
    if not Path("/dev/nvidia0").exists():  # CUDA reserves more than it ever uses
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory), int(memory)))
    cell = Cell(**json.loads(cell))
    return cell, np.load(Path(data)).astype(cell.dtype)


def timed(repeat: Callable[[int], None]) -> Run:
    """A run from a function that repeats and waits until all is computed."""

    def run(n: int) -> float:
        begin = time.perf_counter()
        repeat(n)
        return (time.perf_counter() - begin) / n

    return run


def serve(build: Callable[[], Model]) -> None:
    """Answer until there are no more questions.

    The first answer on a way has ``first`` and ``warm``, seconds of the first and of
    the second call, and the peak of memory; any other has ``seconds``.
    """
    before = _peak_bytes()
    model = build()
    repeats: dict[str, int] = {}
    for line in sys.stdin:
        way = line.strip()
        run = model.ways[way]
        if way in repeats:
            answer = {"seconds": run(repeats[way])}
        else:
            answer = {"first": run(1), "warm": run(1)}
            repeats[way] = int(np.clip(CHUNK / answer["warm"], 1, 10_000))
            answer |= {
                "peak_bytes": _peak_bytes() - before,
                "parameters": model.parameters,
                **model.facts(),
            }
        print(json.dumps(answer), flush=True)


def _peak_bytes() -> int:
    """The largest resident size so far."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
