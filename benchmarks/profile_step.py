"""Where the time of a training step goes, and how little the arithmetic alone takes.

    .venv/bin/python benchmarks/profile_step.py [--depth 8] [--out FOLDER]

Loss and gradient of a spline stack in the plane, 512 rows, as ``fit`` takes them, in
both dtypes. JAX's profiler times each operation; what it is part of, XLA's program
says. Profiling slows operations down, so the time without it is divided in proportion.
Beside it stands a floor: matrix products at the rate of a large product, other
operations and transcendental functions at the rates of a vector that fits into the
cache, all of them measured here. XLA counts the body of a loop once, so the counts are
those of one block, multiplied.

On Linux it keeps to one core, since what runs on several overlaps. Writes
``profile.md``, which the book's page on the benchmarks includes.
"""

import argparse
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from peers import HERE
from provenance import commit, machine, today
from roofline import best_seconds, gradient_of, matmul_rate

import gauss_flows as gf

BATCH, CALLS = 512, 50
DTYPES = ("float32", "float64")
PARTS = ("matrix products", "splines", "all else")


class Profile(NamedTuple):
    """Seconds of one gradient, of its parts, and of the floor's."""

    whole: float
    parts: dict[str, float]
    floor: dict[str, float]


def parts_of(program: Any) -> dict[str, str]:
    """What each instruction of a program belongs to."""
    text = program.as_text()
    bodies = dict(re.findall(r"^%([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S))
    found = {}
    for name, rest in re.findall(r"^ +(?:ROOT )?%([\w.\-]+) = (.*)$", text, re.M):
        called = re.search(r"calls=%([\w.\-]+)", rest)
        inside = rest + (bodies.get(called.group(1), "") if called else "")
        if re.search(r"\bdot\(", inside):
            found[name] = "matrix products"
        else:
            found[name] = "splines" if "spline" in inside else "all else"
    return found


def seconds_by_event(program: Any, arguments: tuple) -> dict[str, float]:
    """Seconds a call that the profiler gives to each event."""
    seconds: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                out = program(*arguments)
            jax.block_until_ready(out)
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    seconds[event.name] += event.duration_ns / 1e9 / CALLS
    return seconds


def seconds_of(call: Callable, *arguments: Any) -> float:
    """Median seconds of a call that nobody profiles."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        for _ in range(CALLS):
            out = call(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / CALLS)
    return float(np.median(times))


def rate_of(
    function: Callable, dtype: Any, repeats: int = 200, size: int = 4096
) -> float:
    """Evaluations a second of a function, on a vector that stays in the cache."""

    @jax.jit
    def chain(a):
        return jax.lax.fori_loop(0, repeats, lambda _, a: function(a), a)

    return size * repeats / best_seconds(chain, jnp.full(size, 0.5, dtype))


def floor(depth: int, dtype: Any) -> dict[str, float]:
    """The least seconds of the arithmetic of a gradient, by its kind."""
    program, _ = gradient_of(1, BATCH, dtype)
    cost = program.cost_analysis()
    layer = gf.RQSplineCoupling(jr.key(0), shape=(2,), dtype=dtype)
    kernels = 2 * sum(part.weight.size for part in layer.conditioner.layers)
    # one product forward and two for the gradients, two operations a weight and row
    products = 6 * BATCH * kernels
    multiply_add = rate_of(lambda a: a * 0.999 + 1e-3, dtype)
    exponential = rate_of(lambda a: jnp.exp(-a), dtype)
    return {
        "matrix products": depth * products / matmul_rate(1024, dtype),
        "other operations": depth * (cost["flops"] - products) / (2 * multiply_add),
        "transcendental functions": depth * cost["transcendentals"] / exponential,
    }


def profile(depth: int, dtype: Any) -> Profile:
    """Measure one dtype."""
    program, arguments = gradient_of(depth, BATCH, dtype)
    whole = seconds_of(program, *arguments)
    parts = parts_of(program)
    seen: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for name, seconds in seconds_by_event(program, arguments).items():
        if name in parts and not name.startswith("while"):
            seen[parts[name]] += seconds
    share = whole / sum(seen.values())
    return Profile(whole, {k: t * share for k, t in seen.items()}, floor(depth, dtype))


def table(found: dict[str, Profile], depth: int, ran: str) -> str:
    """What the page of the book includes, as MyST."""
    about = machine()
    rows = [("**gradient**", [p.whole for p in found.values()])]
    rows += [(name, [p.parts[name] for p in found.values()]) for name in PARTS]
    rows += [("**floor**", [sum(p.floor.values()) for p in found.values()])]
    kinds = next(iter(found.values())).floor
    rows += [(name, [p.floor[name] for p in found.values()]) for name in kinds]
    lines = [
        f"| {name} | " + " | ".join(f"{1e3 * t:.2f}" for t in times) + " |"
        for name, times in rows
    ]
    return (
        f":::{{table}} Milliseconds of loss and gradient, {depth} spline blocks in the "
        f"plane, {BATCH} rows, on one core, divided as the profiler sees it; and the "
        f"least that the arithmetic takes at this machine's measured rates. "
        f"{about['processor']}, jax {jax.__version__}, "
        f"{today()}, commit `{ran}`.\n"
        ":name: tab-profile\n\n"
        f"| part | {' | '.join(found)} |\n|:--|{'--:|' * len(found)}\n"
        + "\n".join(lines)
        + "\n:::\n"
    )


def main() -> None:
    """Measure both dtypes and write the table."""
    parser = argparse.ArgumentParser(description="The profile of a training step.")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found, ran = {}, commit()
    for name in DTYPES:
        jax.config.update("jax_enable_x64", name == "float64")
        found[name] = profile(args.depth, jnp.dtype(name))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "profile.md").write_text(table(found, args.depth, ran))
    print(table(found, args.depth, ran))


if __name__ == "__main__":
    main()
