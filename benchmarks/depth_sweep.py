"""The depth sweep two ways: unrolled with a Python loop, and scanned by ``gf.fit``.

    .venv/bin/python benchmarks/depth_sweep.py [--quick] [--out FOLDER]

The first way is the one of the notebook that chapter 07 starts from: flowjax's own
couplings in a ``Chain``, and one jitted step called from a Python loop. The second is
``gf.coupling_flow`` and ``gf.fit``. Same data, same random numbers, same number of
steps, float64; every time includes its compilation. Then the time to compile a training
step at 2 and at 64 blocks.

Times are wall clock, each measured once: run it on a quiet machine. ``--quick`` makes a
tenth of the steps, so that compilation weighs more. Writes ``sweep.md``, which the
book's page on the benchmarks includes.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from flowjax.bijections import (
    Chain,
    Coupling,
    Flip,
    Invert,
    RationalQuadraticSpline,
)
from flowjax.distributions import Normal, Transformed
from peers import HERE
from provenance import commit, machine, today

import gauss_flows as gf

DEPTHS = (1, 2, 4, 8)


class Row(NamedTuple):
    """Seconds and held-out log-probability of one trained flow."""

    compile_seconds: float
    run_seconds: float
    held_out: float


def spirals() -> tuple[jax.Array, jax.Array]:
    """The source's training points, and fresh ones in the same units."""
    raw = gf.data.source_spiral(standardized=False)
    fresh = gf.data.source_spiral(10_000, seed=1, standardized=False)
    return gf.data.standardize(raw), gf.data.standardize(fresh, like=raw)


def unrolled_flow(key: jax.Array, depth: int) -> Transformed:
    """The source's flow from flowjax's own parts, one after the other."""

    def coupling(key):
        return Coupling(
            key,
            transformer=RationalQuadraticSpline(knots=8, interval=4.0),
            untransformed_dim=1,
            dim=2,
            nn_width=24,
            nn_depth=2,
        )

    parts = []
    for block_key in jr.split(key, depth):
        rotation_key, first, second = jr.split(block_key, 3)
        rotation = gf.HouseholderRotation(n_reflections=2, shape=(2,))
        reflections = jr.normal(rotation_key, (2, 2))
        parts += [
            eqx.tree_at(lambda layer: layer.params, rotation, reflections),
            *(coupling(first), Flip((2,)), coupling(second), Flip((2,))),
        ]
    return Transformed(Normal(jnp.zeros(2)), Invert(Chain(parts)))


def scanned_flow(key: jax.Array, depth: int) -> Transformed:
    """The same flow, its blocks stacked."""
    return gf.coupling_flow(key, dim=2, depth=depth, base=Normal(jnp.zeros(2)))


def train_by_loop(flow, x, steps, key):
    """The source's trainer; returns the flow, and seconds to compile and to run."""
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    schedule = optax.cosine_onecycle_schedule(steps, 3e-3)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    opt_state = optimizer.init(params)

    @eqx.filter_jit
    def step(params, opt_state, key):
        key, subkey = jr.split(key)
        batch = x[jr.randint(subkey, (512,), 0, len(x))]

        def loss(params):
            return -eqx.combine(params, static).log_prob(batch).mean()

        grads = eqx.filter_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, key

    begin = time.perf_counter()
    params, opt_state, key = jax.block_until_ready(step(params, opt_state, key))
    first = time.perf_counter()
    for _ in range(steps - 1):
        params, opt_state, key = step(params, opt_state, key)
    jax.block_until_ready(params)
    seconds = first - begin, time.perf_counter() - first
    return eqx.combine(params, static), *seconds


def by_loop(x, held_out, depth, steps) -> Row:
    """One depth the source's way."""
    flow, compile_seconds, run_seconds = train_by_loop(
        unrolled_flow(jr.key(0), depth), x, steps, jr.key(1)
    )
    quality = float(gf.mean_log_prob(flow, held_out))
    return Row(compile_seconds, run_seconds, quality)


def by_fit(x, held_out, depth, steps) -> Row:
    """One depth our way."""
    flow = scanned_flow(jr.key(0), depth)
    fitted = gf.fit(jr.key(1), flow, x, steps=steps, progress=False)
    quality = float(gf.mean_log_prob(fitted.flow, held_out))
    return Row(fitted.compile_seconds, fitted.run_seconds, quality)


def compile_seconds(x, depth) -> float:
    """Seconds to trace and compile the training step of a scanned stack."""
    flow = scanned_flow(jr.key(0), depth)
    return gf.fit(jr.key(1), flow, x, steps=1, progress=False).compile_seconds


WAYS = {"unrolled": by_loop, "scanned": by_fit}


def sentence(rows: dict[tuple[int, str], Row]) -> str:
    """What the table comes to."""
    compiling, running = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, 0.0)
    for (_, way), row in rows.items():
        compiling[way] += row.compile_seconds
        running[way] += row.run_seconds
    loop, scanned = (compiling[way] + running[way] for way in WAYS)
    return (
        f"In all {loop:.1f} s unrolled and {scanned:.1f} s scanned: "
        f"{loop / scanned:.1f} times as fast. Compilation takes "
        f"{compiling['unrolled']:.1f} s of the former and {compiling['scanned']:.1f} s "
        "of the latter; the steps alone are "
        f"{running['unrolled'] / running['scanned']:.1f} times as fast."
    )


def table(rows: dict[tuple[int, str], Row], steps: int, ran: str) -> str:
    """What the page of the book includes, as MyST."""
    lines = [
        f"| {depth} | {way} | {row.compile_seconds:.1f} | {row.run_seconds:.1f} "
        f"| {row.compile_seconds + row.run_seconds:.1f} | {row.held_out:.3f} |"
        for (depth, way), row in rows.items()
    ]
    head = ("blocks", "way", "compile, s", "steps, s", "in all, s", "held out, nats")
    about = machine()
    caption = (
        f"The sweep of the source, {steps} steps of 512 rows a depth, in float64. Each "
        "time is measured once; held out is the mean log-probability of fresh points. "
        f"{about['processor']}, {about['cores']} cores, jax {jax.__version__}, "
        f"{today()}, commit `{ran}`."
    )
    body = "\n".join([f"| {' | '.join(head)} |", "|--:|:--|--:|--:|--:|--:|", *lines])
    return (
        f"{sentence(rows)}\n\n:::{{table}} {caption}\n:name: tab-sweep\n\n{body}\n:::\n"
    )


def main() -> None:
    """Measure both ways, depth by depth, then compile times, and write the table."""
    parser = argparse.ArgumentParser(description="The depth sweep, two ways.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    steps, ran = 120 if args.quick else 1200, commit()
    jax.config.update("jax_enable_x64", True)
    x, held_out = spirals()
    rows = {}
    for depth in DEPTHS:
        for way, run in WAYS.items():
            rows[depth, way] = run(x, held_out, depth, steps)
            print(depth, way, rows[depth, way], flush=True)
    # the least of three: other work on the machine only adds to it
    few, many = (
        min(compile_seconds(x[i:], depth) for i in range(3)) for depth in (2, 64)
    )
    print(
        f"compile a training step: {few:.1f} s at 2 blocks, {many:.1f} s at 64, "
        f"ratio {many / few:.2f}"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sweep.md").write_text(table(rows, steps, ran), encoding="utf-8")
    print(table(rows, steps, ran))


if __name__ == "__main__":
    main()
