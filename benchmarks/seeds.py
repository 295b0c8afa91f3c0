"""Many seeds at once by ``fit_many`` beside one by ``fit``: seconds of a step.

    .venv/bin/python benchmarks/seeds.py [--quick]

Eight blocks in the plane, 512 rows a step, float32: 1 to 32 seeds, on a GPU to 256. All
numbers of seeds take turns. Prints JSON. On a GPU it also says which share of the
machine's measured limits a step reaches, see ``roofline.py``.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import roofline

import gauss_flows as gf

DEPTH, BATCH = 8, 512
COUNTS = {"cpu": (1, 2, 4, 8, 16, 32), "gpu": (1, 2, 4, 8, 16, 32, 64, 128, 256)}


def build(key):
    """The flow of a seed."""
    return gf.coupling_flow(key, dim=2, depth=DEPTH, dtype=jnp.float32)


def seconds_of_a_step(x, seeds: int | None, steps: int) -> float:
    """Train, and divide; the trial of the final parameters costs what a step does."""
    options = {"steps": steps, "batch_size": BATCH, "progress": False}
    if seeds is None:
        result = gf.fit(jr.key(0), build(jr.key(1)), x, **options)
    else:
        result = gf.fit_many(jr.split(jr.key(0), seeds), build, x, **options)
    return result.run_seconds / (steps + 1)


def main() -> None:
    """Print the times of all numbers of seeds; ``null`` is one seed by ``fit``."""
    parser = argparse.ArgumentParser(description="Many seeds beside one.")
    parser.add_argument("--quick", action="store_true", help="little, to try it out")
    quick = parser.parse_args().quick
    kind = jax.default_backend()
    counts = (None, 1, 2) if quick else (None, *COUNTS[kind])
    steps, rounds = (5, 2) if quick else (50, 5)
    x = gf.data.source_spiral(10_000)
    times: dict[int | None, list[float]] = {count: [] for count in counts}
    for turn in range(rounds + 1):
        for count in counts:
            seconds = seconds_of_a_step(x, count, steps)
            if turn:  # the first compiles small things too
                times[count].append(seconds)
    rows = [{"seeds": n, "step": t} for n, t in times.items()]
    limits = {"roofline": roofline.shares(times, build, BATCH)} if kind == "gpu" else {}
    json.dump({"seeds": rows, **limits}, sys.stdout)


if __name__ == "__main__":
    main()
