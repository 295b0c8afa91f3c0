"""How near a training step comes to what a device can do.

The limits are measured, not looked up: the rate of a large product of matrices, and the
bandwidth of a copy. XLA says how many operations and bytes a step needs. It counts the
body of a loop once, so it is asked about one block, and the answer multiplied.
"""

import time
from collections.abc import Callable
from math import nan
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import DTypeLike

import gauss_flows as gf


def shares(
    times: dict[int | None, list[float]], build: Callable, batch: int
) -> dict[str, object]:
    """The device's limits, and for each number of seeds the share that a step reaches.

    The share is the least time that the limits allow, divided by the median time.
    """
    rate, bandwidth = matmul_rate(), copy_bandwidth()
    flow = build(jr.key(0))
    depth = len(gf.blocks(flow))
    flops, moved = (depth * cost for cost in block_cost(batch))
    least = max(flops / rate, moved / bandwidth)
    return {
        "flops_per_second": rate,
        "bytes_per_second": bandwidth,
        "step_flops": flops,
        "step_bytes": moved,
        "shares": [
            {"seeds": n, "share": (n or 1) * least / float(np.median(t))}
            for n, t in times.items()
        ],
    }


def gradient_of(depth: int, batch: int, dtype: DTypeLike) -> tuple[Any, tuple]:
    """The compiled loss and gradient of a stack in the plane, and its arguments."""
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=depth, dtype=dtype)
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    x = jnp.asarray(gf.data.source_spiral(batch), dtype)

    @jax.jit
    def gradient(params, x):
        def loss(params):
            flow = eqx.combine(params, static)
            return gf.train.negative_log_likelihood(flow, x)

        return jax.value_and_grad(loss)(params)

    return gradient.lower(params, x).compile(), (params, x)


def block_cost(batch: int) -> tuple[float, float]:
    """Operations and bytes of loss and gradient of one block, from XLA."""
    program, _ = gradient_of(1, batch, jnp.float32)
    cost = program.cost_analysis() or {"flops": nan, "bytes accessed": nan}
    return cost["flops"], cost["bytes accessed"]


def matmul_rate(size: int = 4096, dtype: DTypeLike = jnp.float32) -> float:
    """Operations a second of a product of two square matrices."""
    a = jr.normal(jr.key(0), (size, size), dtype)
    return 2 * size**3 / best_seconds(jax.jit(lambda a: a @ a), a)


def copy_bandwidth(size: int = 2**27) -> float:
    """Bytes a second, read and written, of adding one to a vector."""
    a = jnp.zeros(size, jnp.float32)
    return 2 * a.nbytes / best_seconds(jax.jit(lambda a: a + 1), a)


def best_seconds(call: Callable, a: jax.Array) -> float:
    """The least seconds of twenty calls; other work only adds to it."""
    call(a).block_until_ready()
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        call(a).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
