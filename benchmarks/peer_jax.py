"""Measure our stack or flowjax's Chain and Scan; started by peers.py.

``gauss_flows fit`` is what users call: steps scanned inside one compiled call. The
other three make a step a call, compiled, from a loop in Python.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from cells import (
    CLIP,
    INTERVAL,
    KNOTS,
    LEARNING_RATE,
    WIDTH,
    Cell,
    Model,
    read_command,
    serve,
    timed,
)
from flowjax.bijections import (
    Chain,
    Coupling,
    Flip,
    Invert,
    RationalQuadraticSpline,
    Scan,
)
from flowjax.distributions import StandardNormal, Transformed

import gauss_flows as gf

REFLECTIONS = 2  # of each block's rotation


def our_flow(cell: Cell) -> Transformed:
    """Our stack of blocks."""
    return gf.coupling_flow(
        jr.key(0),
        dim=cell.dim,
        depth=cell.depth,
        n_reflections=REFLECTIONS,
        n_bins=KNOTS,
        interval=INTERVAL,
        nn_width=WIDTH,
        nn_depth=2,
    )


def flowjax_block(cell: Cell, key) -> Chain:
    """The same block from flowjax's parts; it has no rotation, so that is ours."""
    rotation_key, *keys = jr.split(key, 3)
    parts = [gf.HouseholderRotation(REFLECTIONS, (cell.dim,), key=rotation_key)]
    for coupling_key in keys:
        coupling = Coupling(
            coupling_key,
            transformer=RationalQuadraticSpline(knots=KNOTS, interval=INTERVAL),
            untransformed_dim=cell.dim // 2,
            dim=cell.dim,
            nn_width=WIDTH,
            nn_depth=2,
        )
        parts += [coupling, Flip((cell.dim,))]
    return Chain(parts)


def flowjax_flow(cell: Cell) -> Transformed:
    """The same stack, its blocks one after the other or scanned."""
    block = functools.partial(flowjax_block, cell)
    keys = jr.split(jr.key(0), cell.depth)
    if cell.library == "flowjax Scan":
        stack = Scan(eqx.filter_vmap(block)(keys))
    else:
        stack = Chain([layer for key in keys for layer in block(key).bijections])
    return Transformed(StandardNormal((cell.dim,)), Invert(stack))


def one(step):
    """The schedule of a learning rate that stays as it is."""
    return jnp.ones(())


def by_fit(flow, x, cell: Cell):
    """Training by ``fit``: seconds of a step as it reports them.

    It tries the final parameters on one more batch, which costs what a step costs.
    """
    compiled = []

    def run(n: int) -> float:
        result = gf.fit(
            jr.key(1),
            flow,
            x,
            steps=cell.steps,
            batch_size=cell.batch,
            learning_rate=LEARNING_RATE,
            schedule=one,
            clip=CLIP,
            progress=False,
        )
        seconds = result.run_seconds / (cell.steps + 1)
        if compiled:
            return seconds
        compiled.append(result.compile_seconds)
        return seconds + result.compile_seconds

    return run, dict


def by_steps(flow, x, cell: Cell):
    """Training by a jitted step in a loop, and what XLA says of its memory."""
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LEARNING_RATE))

    @jax.jit
    def step(params, opt_state, key, x):
        key, subkey = jr.split(key)
        batch = x[jr.randint(subkey, (cell.batch,), 0, len(x))]

        def loss(params):
            return -eqx.combine(params, static).log_prob(batch).mean()

        grads = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, key

    state = (params, optimizer.init(params), jr.key(1))
    program: Any = None

    def repeat(n):
        nonlocal state, program
        if program is None:  # compiled by hand, so that it can be asked below
            program = step.lower(*state, x).compile()
        for _ in range(n):
            state = program(*state, x)
        jax.block_until_ready(state)

    def facts():
        memory = program.memory_analysis()
        found = {"temp_bytes": memory.temp_size_in_bytes} if memory else {}
        if stats := jax.devices()[0].memory_stats():  # none on a CPU
            found["device_peak_bytes"] = stats["peak_bytes_in_use"]
        return found

    return timed(repeat), facts


def both_directions(flow, x, cell: Cell):
    """Density of a batch, and drawing one."""
    params, static = eqx.partition(flow, eqx.is_inexact_array)

    @jax.jit
    def density(params, x):
        return eqx.combine(params, static).log_prob(x)

    @jax.jit
    def sample(params, key):
        return eqx.combine(params, static).sample(key, (cell.batch,))

    def repeat(call, n):
        for _ in range(n):
            out = call()
        jax.block_until_ready(out)

    calls = {
        "density": functools.partial(density, params, x[: cell.batch]),
        "sample": functools.partial(sample, params, jr.key(2)),
    }
    return {way: timed(functools.partial(repeat, calls[way])) for way in calls}


def build(cell: Cell, data) -> Model:
    """The flow, and how it trains, evaluates and samples."""
    jax.config.update("jax_enable_x64", cell.dtype == "float64")
    x = jnp.asarray(data)
    flow = our_flow(cell) if "gauss_flows" in cell.library else flowjax_flow(cell)
    train = by_fit if cell.library == "gauss_flows fit" else by_steps
    step, facts = train(flow, x, cell)
    arrays = jax.tree.leaves(eqx.filter(flow, eqx.is_inexact_array))
    return Model(
        sum(leaf.size for leaf in arrays),
        {"step": step, **both_directions(flow, x, cell)},
        facts,
    )


if __name__ == "__main__":
    serve(functools.partial(build, *read_command()))
