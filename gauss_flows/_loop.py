"""The compiled part of training: many steps in one call, for one seed or for many.

Public entry points are in ``train``. One call of ``_interval`` takes the held-out loss
and then makes up to ``interval`` steps; the same compiled program serves the first
interval, a shorter last one, and the trial of the final parameters.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import paramax
from jaxtyping import Array, PRNGKeyArray, PyTree
from tqdm import tqdm

Loss = Callable[[Any, Array], Array]
"""``loss(flow, batch) -> scalar``; the flow arrives with its parameters unwrapped."""


class Plan(NamedTuple):
    """All that is fixed before compilation."""

    loss: Loss
    optimizer: optax.GradientTransformation
    batch_size: int
    interval: int
    many: bool


class State(eqx.Module):
    """All that a step changes; ``failed`` and ``best_step`` are -1 for "none".

    ``previous`` holds the parameters before the last update. Their loss and gradient
    were finite, which is not known of ``params`` until the next step.
    """

    params: PyTree
    previous: PyTree
    opt_state: PyTree
    key: PRNGKeyArray
    failed: Array
    best: PyTree
    best_loss: Array
    best_step: Array


class Run(NamedTuple):
    """What ``run`` returns: flows, records as NumPy arrays, and times in seconds."""

    best: PyTree
    final: PyTree
    losses: np.ndarray
    norms: np.ndarray
    val_steps: np.ndarray
    val_losses: np.ndarray
    best_step: np.ndarray
    failed: np.ndarray
    compile_seconds: float
    run_seconds: float


def trainable(flow: PyTree) -> tuple[PyTree, PyTree]:
    """Split into trainable arrays and the rest, as flowjax's own trainers do."""
    return eqx.partition(
        flow,
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )


def run(
    plan: Plan,
    flow: PyTree,
    key: Array,
    x: Array,
    x_val: Array | None,
    steps: int,
    progress: bool,
) -> Run:
    """Train; the host is asked once an interval. Arrays are checked by the caller."""
    params, static = trainable(flow)
    state = _initial_state(plan, params, key, x.dtype)
    # Buffers are donated to each call; the caller's flow and key must outlive that.
    state = jax.tree.map(jnp.copy, state)

    def call(state, start, stop):
        numbers = [jnp.asarray(i, jnp.int32) for i in (start, stop, steps)]
        state, records = _interval((plan, static, x, x_val, *numbers), state)
        return state, [np.asarray(record) for record in records]

    begin = perf_counter()
    state, _ = call(state, 0, 0)  # compiles, and makes no step
    compiled = perf_counter()
    seeds = np.shape(state.failed)
    records = np.full((2, *seeds, steps + 1), np.nan, x.dtype)
    val_steps, val_losses = [], []
    with tqdm(total=steps, disable=not progress, unit="step") as bar:
        for start in [*range(0, steps, plan.interval), steps]:
            stop = min(start + plan.interval, steps) if start < steps else steps + 1
            state, (value, *new) = call(state, start, stop)
            records[..., start:stop] = np.stack(new)[..., : stop - start]
            val_steps.append(start)
            val_losses.append(value)
            bar.update(min(stop, steps) - start)
            bar.set_postfix_str(_postfix(records[0, ..., stop - 1], value, x_val))
            if np.all(np.asarray(state.failed) >= 0):
                break
    select = jax.vmap(_select) if plan.many else _select
    best = select(state.best_step >= 0, state.best, state.params)
    taken = None if x_val is not None else 0
    return Run(
        best=eqx.combine(best, static),
        final=eqx.combine(state.params, static),
        losses=records[0],
        norms=records[1],
        val_steps=np.asarray(val_steps)[:taken],
        val_losses=np.stack(val_losses, axis=-1)[..., :taken],
        best_step=np.asarray(state.best_step),
        failed=np.asarray(state.failed),
        compile_seconds=compiled - begin,
        run_seconds=perf_counter() - compiled,
    )


@eqx.filter_jit
def _initial_state(plan, params, key, dtype):
    def one(params, key):
        none, inf = jnp.array(-1, jnp.int32), jnp.array(jnp.inf, dtype)
        opt_state = plan.optimizer.init(params)
        return State(params, params, opt_state, key, none, params, inf, none)

    return eqx.filter_vmap(one)(params, key) if plan.many else one(params, key)


@eqx.filter_jit(donate="all-except-first")
def _interval(inputs, state):
    plan, static, *rest = inputs

    def one(static, state):
        return _one_interval(plan, static, *rest, state)  # pyright: ignore

    return eqx.filter_vmap(one)(static, state) if plan.many else one(static, state)


def _one_interval(plan, static, x, x_val, start, stop, updates, state):
    """Validate, then make the steps from ``start`` to before ``stop``."""
    nan = jnp.full((), jnp.nan, x.dtype)
    value = nan
    if x_val is not None:
        state, value = _validate(plan, static, x_val, state, start)

    def body(state, index):
        # How many steps is data, so that a remainder compiles no second program; and
        # `index` has no seed axis, so that under vmap this stays a branch.
        return jax.lax.cond(
            index < stop,
            lambda s: _step(plan, static, x, updates, s, index),
            lambda s: (s, (nan, nan)),
            state,
        )

    indices = start + jnp.arange(plan.interval, dtype=start.dtype)
    state, records = jax.lax.scan(body, state, indices)
    return state, (value, *records)


def _step(plan, static, x, updates, state, index):
    """One step; after the last update the parameters are tried, not changed."""

    def objective(params):
        flow = paramax.unwrap(eqx.combine(params, static))
        return plan.loss(flow, batch).astype(x.dtype)

    key, subkey = jr.split(state.key)
    batch = x[jr.randint(subkey, (plan.batch_size,), 0, x.shape[0])]
    value, grads = eqx.filter_value_and_grad(objective)(state.params)
    norm = _norm(grads).astype(x.dtype)
    change, opt_state = plan.optimizer.update(grads, state.opt_state, state.params)
    params = eqx.apply_updates(state.params, change)

    alive = state.failed < 0
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    take = alive & finite & (index < updates)
    fail = alive & ~finite
    state = State(
        params=_select(take, params, _select(fail, state.previous, state.params)),
        previous=_select(take, state.params, state.previous),
        opt_state=_select(take, opt_state, state.opt_state),
        key=key,
        failed=jnp.where(fail, index, state.failed),
        best=state.best,
        best_loss=state.best_loss,
        best_step=state.best_step,
    )
    return state, (jnp.where(alive, value, jnp.nan), jnp.where(alive, norm, jnp.nan))


def _validate(plan, static, x_val, state, index):
    """Held-out loss after ``index`` updates, and the best parameters so far."""
    flow = paramax.unwrap(eqx.combine(state.params, static))
    value = plan.loss(flow, x_val).astype(x_val.dtype)
    value = jnp.where(state.failed < 0, value, jnp.nan)
    better = value < state.best_loss
    best = (state.best, state.best_loss, state.best_step)
    best = _select(better, (state.params, value, index), best)
    return eqx.tree_at(lambda s: (s.best, s.best_loss, s.best_step), state, best), value


def _norm(tree):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def _select(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _postfix(loss, value, x_val):
    held_out = "" if x_val is None else f", held out {np.median(value):.3f}"
    return f"loss {np.median(loss):.3f}{held_out}"
