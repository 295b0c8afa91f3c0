"""After a failed step: which layer stopped being finite, and where it comes first."""

from functools import lru_cache
from operator import itemgetter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
from flowjax.distributions import Transformed
from jaxtyping import Array

from ._loop import Plan, draw, trainable
from ._run import Run
from .stack import normalizing_map, walk


def layers(plan: Plan, run: Run, key: Array, x: Array | np.memmap) -> np.ndarray:
    """Name the layer at which training failed, or None, for each seed if many.

    Args:
        plan: What was trained, and how.
        run: What came of it.
        key: The key with which training began; each batch can be drawn again from it.
        x: Training data.
    """
    found = np.full(run.failed.shape, None, object)
    for seed in _failed(run):
        arrays, rest = eqx.partition(run.failing, eqx.is_array)
        flow = eqx.combine(jax.tree.map(itemgetter(seed), arrays), rest)
        found[seed] = _first(plan, flow, key[seed], x, run.failed[seed])
    return found


def message(run: Run, layers: np.ndarray) -> str:
    """Say which seed failed at which step, in which layer, and with what."""
    found = []
    for seed in _failed(run):
        step = int(run.failed[seed])
        loss, norm = run.log["steps"][(slice(None), *seed, step)]
        who = f" (seed {seed[0]})" if seed else ""
        found.append(
            f"loss {loss}, gradient norm {norm} at step {step}{who}, first in "
            f"{layers[seed]}"
        )
    return (
        f"expected a finite loss and gradient, got {'; '.join(found)}. The last good "
        "parameters are in this error's `result`. A lower learning rate, clipping or "
        "a bound on log-scales may help."
    )


def _failed(run):
    return [seed for seed in np.ndindex(run.failed.shape) if run.failed[seed] >= 0]


def _first(plan, flow, key, x, step):
    """What is not finite in the step that failed, and where."""
    numbers, loss_key = _draw_of_step(key, len(x), step, plan.batch_size)
    batch = jnp.asarray(x[np.asarray(numbers)])
    loss = eqx.Partial(_on_wrapped(plan.loss), key=loss_key)
    try:
        find = _block if isinstance(flow, Transformed) else _leaf
        return find(flow, batch, loss)
    except Exception as error:  # must not hide the failure that it is to explain
        return f"a layer that could not be found ({type(error).__name__})"


@eqx.filter_jit
def _draw_of_step(key, rows, step, batch_size):
    def next_key(_, key):
        return draw(key, rows, batch_size)[0]

    return draw(jax.lax.fori_loop(0, step, next_key, key), rows, batch_size)[1:]


# Cached, so that a second failure finds the same function and compiles nothing.
@lru_cache(maxsize=32)
def _on_wrapped(loss):
    return lambda flow, batch, key: loss(paramax.unwrap(flow), batch, key)


def _block(flow, batch, loss):
    """Follow the batch through the blocks, then the gradient back."""
    from . import probe  # which imports `train`, which imports this module

    lost = np.flatnonzero(_lost(flow, batch))
    norms = probe.gradient_norms(flow, batch, loss=loss)
    bad = np.flatnonzero(~np.isfinite(norms.blocks))
    if lost.size:
        return f"the output of block {lost[0]} of {len(norms.blocks)}, data side first"
    if bad.size:
        # the backward pass comes from the latent side
        return (
            f"the gradient of block {bad[-1]} of {len(norms.blocks)}, data side first"
        )
    return "the base distribution, or the loss itself"


@eqx.filter_jit
def _lost(flow, batch):
    """Where a block's output or log-determinant is not finite, data side first."""

    def step(states, block, _):
        states, log_det = jax.vmap(block.transform_and_log_det)(states)
        return states, ~(jnp.isfinite(states).all() & jnp.isfinite(log_det).all())

    return walk(step, batch, paramax.unwrap(normalizing_map(flow)))[1]


def _leaf(flow, batch, loss):
    params, static = trainable(flow)
    grads = jax.grad(lambda p: loss(eqx.combine(p, static), batch))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if not jnp.isfinite(grad).all():
            return f"the gradient of {jax.tree_util.keystr(path)}"
    return "the loss itself"
