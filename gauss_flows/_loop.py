"""The compiled part of training: many steps in one call, for one seed or for many.

One call of ``interval`` takes the held-out loss and then makes up to ``Plan.interval``
steps; the same compiled program serves the first interval, a shorter last one, and the
trial of the final parameters. The host's part is in ``_run``, what users call in
``train``.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import paramax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray, PyTree

Loss = Callable[[Any, Array, PRNGKeyArray], Array]
"""``loss(flow, batch, key) -> scalar``; the flow's parameters arrive unwrapped."""


class Plan(NamedTuple):
    """All that is fixed before compilation; None turns an option off.

    Where data are ``streamed``, ``interval`` gets the batches of its steps, (interval,
    batch_size, ...), in the place of all rows.
    """

    loss: Loss
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    schedule: optax.Schedule | None
    batch_size: int
    interval: int
    many: bool
    ema: float | None = None
    patience: int | None = None
    mesh: Mesh | None = None
    streamed: bool = False


class Rates(NamedTuple):
    """Numbers that steer a run and are no part of its program: one a run, or a seed."""

    peak: Array
    clip: Array


class State(eqx.Module):
    """All that a step changes; a step that never came is -1.

    ``previous`` holds the parameters before the last update. Their loss and gradient
    were finite, which is not known of ``params`` until the next step. After a failure
    it holds those that failed. What an option needs is None where that is off.
    """

    params: PyTree
    previous: PyTree
    opt_state: PyTree
    key: PRNGKeyArray
    failed: Array
    best: PyTree
    best_loss: Array
    best_step: Array
    average: PyTree
    stale: Array | None
    stopped: Array | None

    def candidate(self) -> PyTree:
        """The parameters that are validated: the average, where one is kept."""
        return self.params if self.average is None else self.average


def trainable(flow: PyTree) -> tuple[PyTree, PyTree]:
    """Split into trainable arrays and the rest, as flowjax's own trainers do."""
    return eqx.partition(
        flow,
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )


@eqx.filter_jit
def initial_state(plan: Plan, params: PyTree, key: Array, dtype: Any) -> State:
    """The state before the first step; ``params`` and ``key`` lead with any seeds."""

    def one(params, key):
        none, inf = jnp.array(-1, jnp.int32), jnp.array(jnp.inf, dtype)
        return State(
            params=params,
            previous=params,
            opt_state=plan.optimizer(plan.schedule or jnp.ones_like).init(params),
            key=key,
            failed=none,
            best=params,
            best_loss=inf,
            best_step=none,
            average=params if plan.ema is not None else None,
            stale=jnp.array(0, jnp.int32) if plan.patience is not None else None,
            stopped=none if plan.patience is not None else None,
        )

    return eqx.filter_vmap(one)(params, key) if plan.many else one(params, key)


@eqx.filter_jit(donate="all-except-first")
def interval(inputs: tuple, state: State) -> tuple[State, tuple[Array, Array, Array]]:
    """Validate, then step; ``inputs`` are the arguments of ``_one_interval`` but one.

    Returns:
        The new state, the held-out loss, and loss and gradient norm of each step.
    """
    plan, *each_seed, x, x_val, start, stop, updates = inputs

    def one(static, rates, state):
        return _one_interval(plan, static, rates, x, x_val, start, stop, updates, state)

    every = eqx.filter_vmap(one) if plan.many else one
    out = every(*each_seed, state)  # pyright: ignore[reportCallIssue]
    return out if plan.mesh is None else eqx.filter_shard(out, replicated(plan.mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts all of an array on every device of ``mesh``."""
    return NamedSharding(mesh, PartitionSpec())


def draw(key: Array, rows: int, batch_size: int) -> tuple[Array, Array, Array]:
    """The next key, the numbers of the rows of a step's batch, and its loss's key."""
    key, batch_key, loss_key = jr.split(key, 3)
    return key, jr.randint(batch_key, (batch_size,), 0, rows), loss_key


@eqx.filter_jit
def draw_ahead(key: Array, rows: int, batch_size: int, steps: int) -> Array:
    """The numbers of the rows that the next steps draw, (steps, batch_size)."""

    def one(key, _):
        key, numbers, _ = draw(key, rows, batch_size)
        return key, numbers

    return jax.lax.scan(one, key, length=steps)[1]


def one_cycle(count: Array, steps: Array) -> Array:
    """``optax.cosine_onecycle_schedule(steps, 1.0)`` with the number of steps as data.

    So that runs of different lengths are one program.
    """
    first, peak, last = jnp.array([1 / 25, 1.0, 1 / (25 * 1e4)], float)
    top, count = 3 * steps // 10, count.astype(float)
    up = count / jnp.maximum(top, 1)
    down = (count - top) / jnp.maximum(steps - top, 1)
    rising = peak + (first - peak) / 2 * (jnp.cos(jnp.pi * up) + 1)
    falling = last + (peak - last) / 2 * (jnp.cos(jnp.pi * down) + 1)
    return jnp.where(count < top, rising, jnp.where(count < steps, falling, last))


def _one_interval(plan, static, rates, x, x_val, start, stop, updates, state):
    """Validate, then make the steps from ``start`` to before ``stop``."""
    nan = jnp.full((), jnp.nan, x.dtype)
    value = nan
    if x_val is not None:
        state, value = _validate(plan, static, x_val, updates, state, start)

    def body(state, step):
        index, read = step
        # How many steps is data, so that a remainder compiles no second program; and
        # `index` has no seed axis, so that under vmap this stays a branch.
        return jax.lax.cond(
            index < stop,
            lambda s: _step(plan, static, rates, x, updates, s, index, read),
            lambda s: (s, (nan, nan)),
            state,
        )

    indices = start + jnp.arange(plan.interval, dtype=start.dtype)
    batches = x if plan.streamed else None
    state, records = jax.lax.scan(body, state, (indices, batches))
    return state, (value, *records)


def _step(plan, static, rates, x, updates, state, index, read):
    """One step; after the last update the parameters are tried, not changed."""

    def objective(params):
        flow = paramax.unwrap(eqx.combine(params, static))
        return plan.loss(flow, batch, loss_key).astype(x.dtype)

    key, numbers, loss_key = draw(state.key, len(x), plan.batch_size)
    batch = _split(plan, x[numbers] if read is None else read)
    value, grads = eqx.filter_value_and_grad(objective)(state.params)
    norm = _norm(grads).astype(x.dtype)
    factor = plan.schedule or partial(one_cycle, steps=updates)
    optimizer = plan.optimizer(lambda count: rates.peak * factor(count))
    clipped = _clipped(grads, norm, rates.clip)
    change, opt_state = optimizer.update(clipped, state.opt_state, state.params)
    params = eqx.apply_updates(state.params, change)

    alive, moving = state.failed < 0, index < updates
    if plan.patience is not None:
        alive &= (state.stopped < 0) | (index <= state.stopped)
        moving &= state.stopped < 0
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    take = alive & finite & moving
    fail = alive & ~finite
    average = state.average
    if plan.ema is not None:
        tried = _averaged(plan.ema, average, state.params, index)
        average = select(alive & finite, tried, average)
    state = State(
        params=select(take, params, select(fail, state.previous, state.params)),
        previous=select(take | fail, state.params, state.previous),
        opt_state=select(take, opt_state, state.opt_state),
        key=key,
        failed=jnp.where(fail, index, state.failed),
        best=state.best,
        best_loss=state.best_loss,
        best_step=state.best_step,
        average=average,
        stale=state.stale,
        stopped=state.stopped,
    )
    return state, (jnp.where(alive, value, jnp.nan), jnp.where(alive, norm, jnp.nan))


def _validate(plan, static, x_val, updates, state, index):
    """Held-out loss after ``index`` updates, and the best parameters so far."""
    params = state.candidate()
    flow = paramax.unwrap(eqx.combine(params, static))
    rows = _split(plan, x_val)
    value = plan.loss(flow, rows, jr.key(0)).astype(x_val.dtype)
    alive = state.failed < 0
    if plan.patience is not None:
        alive &= state.stopped < 0
    value = jnp.where(alive, value, jnp.nan)
    better = value < state.best_loss
    best = (state.best, state.best_loss, state.best_step)
    best = select(better, (params, value, index), best)
    state = eqx.tree_at(lambda s: (s.best, s.best_loss, s.best_step), state, best)
    if plan.patience is not None:
        stale = jnp.where(better, 0, state.stale + 1)
        stop = alive & (stale >= plan.patience) & (index < updates)
        new = (stale, jnp.where(stop, index, state.stopped))
        state = eqx.tree_at(lambda s: (s.stale, s.stopped), state, new)
    return state, value


def _split(plan, rows):
    """Spread rows over the devices, where their number allows it."""
    if plan.mesh is None or len(rows) % plan.mesh.size:
        return rows
    spec = PartitionSpec(plan.mesh.axis_names)
    return jax.lax.with_sharding_constraint(rows, NamedSharding(plan.mesh, spec))


def _averaged(decay, average, params, index):
    """The average with one more member, number ``index``; weights sum to one."""
    count = (index + 1).astype(float)
    weight = (1 - decay) / -jnp.expm1(count * math.log(decay))
    return jax.tree.map(
        lambda old, new: (old + weight * (new - old)).astype(old.dtype), average, params
    )


def _norm(tree):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def _clipped(grads, norm, limit):
    """What ``optax.clip_by_global_norm`` does, with the norm that is reported."""

    def clip(grad):
        scaled = grad / norm.astype(grad.dtype) * limit.astype(grad.dtype)
        return jnp.where(norm < limit, grad, scaled)

    return jax.tree.map(clip, grads)


def select(condition, new, old):
    """The new arrays where the condition holds, else the old ones."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
