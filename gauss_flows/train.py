"""Train a flow, or many at once: steps scanned inside one compiled call.

Nothing here knows a layer. Whatever holds inexact arrays can be trained, as long as
there is a loss for it; without one it must be a distribution with a ``log_prob``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree, Shaped

from . import _check, _loop
from ._loop import Loss

PEAK = 3e-3
"""Default peak of the learning rate."""

Data = Shaped[Array | np.ndarray, "..."]


@dataclass(frozen=True)
class FitResult:
    """What a training run leaves behind.

    From ``fit_many`` the arrays lead with an axis of seeds, the flows' arrays too, and
    ``best_step`` and ``failed_step`` are tuples with one entry a seed.

    Attributes:
        flow: The flow to use: with the parameters of the lowest held-out loss if
            ``x_val`` was given, else ``final_flow``.
        final_flow: The flow after the last update; if training failed, with the last
            parameters whose loss and gradient were finite.
        train_loss: Loss of each step on its batch, before the update, shape (steps,);
            NaN after a failure. In nats with the default loss.
        gradient_norm: Global norm of each step's gradient before clipping, (steps,).
        val_steps: Numbers of updates after which the held-out loss was taken, (k,).
        val_loss: Held-out loss at those points, (k,); k = 0 without ``x_val``.
        best_step: Number of updates behind ``flow``; None where there was no finite
            held-out loss.
        failed_step: The step at which a loss or a gradient was not finite, that is the
            number of updates made before it; None where all went well.
        compile_seconds: Time of a first call that compiles and makes no step; close to
            zero when an earlier fit has compiled the same program.
        run_seconds: Time of all steps and validations after that.
    """

    flow: PyTree
    final_flow: PyTree
    train_loss: Float[np.ndarray, "... steps"]
    gradient_norm: Float[np.ndarray, "... steps"]
    val_steps: np.ndarray
    val_loss: Float[np.ndarray, "... k"]
    best_step: int | tuple[int | None, ...] | None
    failed_step: int | tuple[int | None, ...] | None
    compile_seconds: float
    run_seconds: float


class NonFiniteError(FloatingPointError):
    """Training met a loss or a gradient that is not finite.

    Attributes:
        result: The ``FitResult`` up to there, with the last good parameters.
    """

    def __init__(self, message: str, result: FitResult):
        super().__init__(message)
        self.result = result


def fit(
    key: PRNGKeyArray,
    flow: PyTree,
    x: Data,
    *,
    steps: int = 1200,
    batch_size: int = 512,
    learning_rate: float | optax.Schedule = PEAK,
    clip: float | None = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    x_val: Data | None = None,
    eval_every: int = 100,
    loss: Loss | None = None,
    progress: bool = True,
    throw: bool = True,
) -> FitResult:
    """Train ``flow`` on ``x`` by Adam, by default to maximum likelihood.

    Each step draws a batch from ``x`` with replacement. All inexact arrays of ``flow``
    are trained, except those inside ``paramax.NonTrainable``. The program is compiled
    once, for ``eval_every`` steps; its size does not depend on ``steps``.

    When a loss or a gradient is not finite, its step is not taken and training stops.
    The parameters that gave it are discarded too: what remains are the last ones whose
    own loss and gradient were finite. (Should the very first fail, it is the initial
    ones.) The parameters after the last update are tried on one more batch, so that a
    returned flow always had a finite loss.

    Args:
        key: Random key of the batches.
        flow: A flowjax distribution, or any pytree if ``loss`` is given.
        x: Training data, shape ``(n, *flow.shape)``, of the flow's dtype.
        steps: Number of updates.
        batch_size: Rows drawn for each step, at most n.
        learning_rate: Peak of ``optax.cosine_onecycle_schedule(steps, peak)``, or a
            schedule to use instead.
        clip: Largest global norm of the gradient, larger ones are scaled down to it;
            None for no clipping.
        optimizer: Used in place of Adam and its schedule; ``clip`` still applies.
        x_val: Held-out data, shape ``(n_val, *flow.shape)``. Its loss is taken before
            the first step, after each ``eval_every`` steps and at the end, and the best
            parameters are kept.
        eval_every: Steps between two reports.
        loss: ``loss(flow, batch) -> scalar``; default minus the mean log-probability.
        progress: Whether to show a progress bar.
        throw: Whether a failure raises, or is only told by ``failed_step``.

    Returns:
        The trained flow and the records of the run, a ``FitResult``.

    Raises:
        ValueError: An argument is out of range, or the data have the wrong shape or
            dtype, are empty, or hold NaN or inf.
        NonFiniteError: A loss or a gradient was not finite, and ``throw`` is True.
    """
    return _fit(
        flow, None, key, x, x_val, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate, clip=clip, optimizer=optimizer, loss=loss,
        eval_every=eval_every, progress=progress, throw=throw,
    )  # fmt: skip


def fit_many(
    keys: Key[Array, " seeds"],
    build: Callable[[PRNGKeyArray], PyTree],
    x: Data,
    *,
    steps: int = 1200,
    batch_size: int = 512,
    learning_rate: float | optax.Schedule = PEAK,
    clip: float | None = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    x_val: Data | None = None,
    eval_every: int = 100,
    loss: Loss | None = None,
    progress: bool = True,
    throw: bool = True,
) -> FitResult:
    """Train one flow a seed, all of them in the same compiled steps (by ``vmap``).

    Seed i does what ``fit(train, build(init), x)`` does, to rounding, where
    ``init, train = jr.split(keys[i])``. A seed that fails stops where it is; the others
    go on, and only when all are done an error is raised if ``throw`` is True.

    Args:
        keys: One key a seed, as from ``jr.split(key, seeds)``.
        build: Makes an untrained flow from a key; must be traceable by ``vmap``.
        x: Training data, the same for all seeds, shape ``(n, *flow.shape)``.
        steps: As for ``fit``, like all that follows.
        batch_size: See ``fit``. Each seed draws its own batches.
        learning_rate: See ``fit``.
        clip: See ``fit``.
        optimizer: See ``fit``.
        x_val: See ``fit``. The best parameters are kept for each seed.
        eval_every: See ``fit``.
        loss: See ``fit``.
        progress: See ``fit``.
        throw: See ``fit``.

    Returns:
        A ``FitResult`` whose arrays lead with an axis of seeds; ``member`` takes one
        flow out of ``result.flow``.

    Raises:
        ValueError: As ``fit``; or ``keys`` is not a non-empty array of keys.
        NonFiniteError: At least one seed failed, and ``throw`` is True.
    """
    if keys.size == 0:
        raise ValueError("expected at least one key (one a seed), got none")
    init, train = jnp.moveaxis(jax.vmap(jr.split)(keys), 1, 0)
    flows = eqx.filter_vmap(build)(init)
    return _fit(
        member(flows, 0), flows, train, x, x_val, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate, clip=clip, optimizer=optimizer, loss=loss,
        eval_every=eval_every, progress=progress, throw=throw,
    )  # fmt: skip


def member(flows: PyTree, index: int) -> PyTree:
    """Take one flow out of those that ``fit_many`` trained together.

    Args:
        flows: A flow whose arrays all lead with an axis of seeds.
        index: Which seed; negative counts from the end.

    Returns:
        The flow of that seed.

    Raises:
        IndexError: There is no such seed.
    """
    seeds = {len(leaf) for leaf in jax.tree.leaves(eqx.filter(flows, eqx.is_array))}
    if len(seeds) == 1 and not -min(seeds) <= index < min(seeds):
        raise IndexError(f"expected a seed below {min(seeds)}, got {index}")
    return jax.tree.map(lambda leaf: leaf[index] if eqx.is_array(leaf) else leaf, flows)


@eqx.filter_jit
def mean_log_prob(flow: PyTree, x: Float[Array, "n ..."]) -> Float[Array, ""]:
    """Mean log-probability of the rows of ``x`` in nats, compiled.

    For flows from ``fit_many`` give each seed its own:
    ``eqx.filter_vmap(mean_log_prob, in_axes=(eqx.if_array(0), None))(result.flow, x)``.
    """
    return flow.log_prob(x).mean()


def negative_log_likelihood(flow: PyTree, x: Float[Array, "n ..."]) -> Float[Array, ""]:
    """Minus the mean log-probability of the rows of ``x`` in nats: the default loss."""
    return -flow.log_prob(x).mean()


@lru_cache(maxsize=32)
def _optimizer(steps, learning_rate, clip, optimizer):
    # Cached, so that a second fit finds the same functions and compiles nothing.
    if optimizer is None and not callable(learning_rate):
        learning_rate = optax.cosine_onecycle_schedule(steps, learning_rate)
    if optimizer is None:
        optimizer = optax.adam(learning_rate)  # pyright: ignore[reportArgumentType]
    if clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


def _fit(
    flow, flows, key, x, x_val, *, steps, batch_size, learning_rate, clip, optimizer,
    eval_every, loss, progress, throw,
):  # fmt: skip
    """Check all arguments, train, and put the result together."""
    _check.at_least_one(steps=steps, batch_size=batch_size, eval_every=eval_every)
    if clip is not None:
        _check.positive(clip=clip)
    if not callable(learning_rate):
        _check.positive(learning_rate=learning_rate)
    if optimizer is not None and learning_rate != PEAK:
        raise ValueError("expected `optimizer` or `learning_rate`, got both")
    if loss is None and not hasattr(flow, "log_prob"):
        kind = type(flow).__name__
        raise ValueError(f"expected a flow with `log_prob`, or a `loss`, got {kind}")
    if _check.dtype_of(_loop.trainable(flow)[0]) is None:
        raise ValueError("expected a flow with trainable arrays, got one with none")
    x = _check.rows("x", x, flow)
    x_val = x_val if x_val is None else _check.rows("x_val", x_val, flow)
    if batch_size > len(x):
        raise ValueError(f"expected batch_size <= {len(x)} (rows), got {batch_size}")
    plan = _loop.Plan(
        loss=loss or negative_log_likelihood,
        optimizer=_optimizer(steps, learning_rate, clip, optimizer),
        batch_size=batch_size,
        interval=min(eval_every, steps),
        many=flows is not None,
    )
    flow = flow if flows is None else flows
    run = _loop.run(plan, flow, key, x, x_val, steps, progress)
    result = FitResult(
        flow=run.best,
        final_flow=run.final,
        train_loss=run.losses[..., :-1],
        gradient_norm=run.norms[..., :-1],
        val_steps=run.val_steps,
        val_loss=run.val_losses,
        best_step=_or_none(run.best_step),
        failed_step=_or_none(run.failed),
        compile_seconds=run.compile_seconds,
        run_seconds=run.run_seconds,
    )
    if throw and np.any(run.failed >= 0):
        raise NonFiniteError(_failures(run), result)
    return result


def _or_none(steps):
    found = tuple(int(step) if step >= 0 else None for step in steps.ravel())
    return found if steps.ndim else found[0]


def _failures(run):
    """Say which seed failed at which step, and with what."""
    found = []
    for seed in np.ndindex(run.failed.shape):
        if (step := int(run.failed[seed])) >= 0:
            who = f" (seed {seed[0]})" if seed else ""
            loss, norm = run.losses[(*seed, step)], run.norms[(*seed, step)]
            found.append(f"loss {loss}, gradient norm {norm} at step {step}{who}")
    return (
        f"expected a finite loss and gradient, got {'; '.join(found)}. The last good "
        "parameters are in this error's `result`. A lower learning rate, clipping or "
        "a bound on log-scales may help."
    )
