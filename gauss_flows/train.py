"""Train a flow, or many at once: steps scanned inside one compiled call.

Nothing here knows a layer. Whatever holds inexact arrays can be trained, as long as
there is a loss for it; without one it must be a distribution with a ``log_prob``.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from flowjax.distributions import Transformed
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree, Shaped

from . import _check, _failure, _plan, _run, records
from ._loop import Loss
from ._plan import PEAK, Optimizer

Data = Shaped[Array | np.ndarray, "..."]


@dataclass(frozen=True)
class FitResult:
    """What a training run leaves behind.

    From ``fit_many`` the arrays lead with an axis of seeds, the flows' arrays too, and
    what is None, a step or a name is a tuple with one entry a seed.

    Attributes:
        flow: The flow to use: with the parameters of the lowest held-out loss if
            ``x_val`` was given, else the last ones; averaged ones if ``ema`` was given.
        final_flow: The flow after the last update; if training failed, with the last
            parameters whose loss and gradient were finite.
        train_loss: Loss of each step on its batch, before the update, shape (steps,);
            NaN after a failure or a stop. In nats with the default loss.
        gradient_norm: Global norm of each step's gradient before clipping, (steps,).
        val_steps: Numbers of updates after which the held-out loss was taken, (k,).
        val_loss: Held-out loss at those points, (k,); k = 0 without ``x_val``.
        best_step: Number of updates behind ``flow``; None where there was no finite
            held-out loss.
        failed_step: The step at which a loss or a gradient was not finite, that is the
            number of updates made before it; None where all went well.
        compile_seconds: Time of a first call that compiles and makes no step; close to
            zero when an earlier fit has compiled the same program.
        run_seconds: Time of all steps and validations after that, since resuming.
        stopped_step: Number of updates after which ``patience`` ended training, if so.
        failed_layer: Which block was the first that was not finite in the failed step.
        recorded: What ``callback`` returned, by name, with a leading axis of reports:
            after 0, ``eval_every``, ... and all updates.
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
    stopped_step: int | tuple[int | None, ...] | None = None
    failed_layer: str | tuple[str | None, ...] | None = None
    recorded: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """What a callback of ``fit`` sees; arrays lead with seeds if there are many.

    Attributes:
        step: Number of updates made.
        flow: A copy of the flow that is validated: the average where ``ema`` is given.
        train_loss: Loss of each step so far, shape (step,).
        val_loss: Held-out loss; NaN without ``x_val``.
    """

    step: int
    flow: PyTree
    train_loss: Float[np.ndarray, "... step"]
    val_loss: Float[np.ndarray, "..."]


Callback = Callable[[Snapshot], dict[str, Any] | None]


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
    learning_rate: float = PEAK,
    schedule: optax.Schedule | None = None,
    clip: float | None = 1.0,
    optimizer: Optimizer = optax.adam,
    x_val: Data | None = None,
    eval_every: int = 100,
    patience: int | None = None,
    ema: float | None = None,
    loss: Loss | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 1000,
    devices: Sequence[Any] | None = None,
    record: str | os.PathLike | None = None,
    progress: bool = True,
    throw: bool = True,
) -> FitResult:
    """Train ``flow`` on ``x`` by Adam, by default to maximum likelihood.

    Each step draws a batch from ``x`` with replacement. All inexact arrays of ``flow``
    are trained, except those inside ``paramax.NonTrainable``. The program is compiled
    once, for ``eval_every`` steps, or for all where they are fewer; another number of
    ``steps``, from ``eval_every`` on, compiles nothing.

    When a loss or a gradient is not finite, its step is not taken and training stops.
    The parameters that gave it are discarded too: what remains are the last ones whose
    own loss and gradient were finite. (Should the very first fail, it is the initial
    ones.) The parameters after the last update are tried on one more batch, so that a
    returned flow always had a finite loss.

    A run that was killed resumes from its ``checkpoint`` in the same call, and on the
    same device ends in the same bits. A finished one returns its result. Data, settings
    and program must be those of the file.

    On several hosts, after ``jax.distributed.initialize``, each process makes the same
    call with the same data and ``devices=jax.devices()``. The first one writes the
    checkpoint, into a folder that all can read. Sums over devices round differently:
    expect losses to agree with one device's to a few times the dtype's epsilon.

    Args:
        key: Random key of the batches.
        flow: A flowjax distribution, or any pytree if ``loss`` is given.
        x: Training data, shape ``(n, *flow.shape)``, of the flow's dtype. (Where 64-bit
            numbers are off, JAX rounds a float64 array in memory to float32.) A memory-
            mapped file, as from ``np.load(path, mmap_mode="r")``, stays on the disk:
            before each interval of ``eval_every`` steps its batches are read, the same
            rows that would be drawn in memory.
        steps: Number of updates.
        batch_size: Rows drawn for each step, at most n.
        learning_rate: Peak of the learning rate. It is data, like ``clip``: another
            value compiles nothing.
        schedule: The learning rate at each step, as a factor of its peak. By default
            ``optax.cosine_onecycle_schedule(steps, 1.0)``, which warms up over the
            first 30 % of the steps and then anneals.
        clip: Largest global norm of the gradient, larger ones are scaled down to it;
            None for no clipping.
        optimizer: A function of the learning rate's schedule, such as ``optax.adam`` or
            ``optax.sgd``; or a finished transformation, which has its own schedule.
            Gradients are clipped before they reach it.
        x_val: Held-out data, shape ``(n_val, *flow.shape)``. Its loss is taken before
            the first step, after each ``eval_every`` steps and at the end, and the best
            parameters are kept.
        eval_every: Steps between two reports.
        patience: Stop after so many held-out losses in a row without a new best one.
        ema: Decay, below 1, of an exponential moving average of the parameters, which
            is what is validated then. All that had a finite loss are in it, the initial
            ones too, with weights that sum to one (Kingma & Ba 2015, section 3).
        loss: ``loss(flow, batch, key) -> scalar``; default minus the mean
            log-probability. The key is another one at each step, for losses that draw
            something; the held-out loss gets the same one each time, ``jr.key(0)``.
        callback: Called with a ``Snapshot`` at each report. It may return numbers or
            arrays by name, of the same shapes each time, to be ``recorded``.
        checkpoint: File from which training resumes, if it is there, and into which it
            is saved: at the first report after so many steps, and at the end.
        checkpoint_every: Steps from one checkpoint to the next.
        devices: Devices over which the rows of each batch are split, and those of
            ``x_val`` if their number divides it. ``batch_size`` must be a multiple.
        record: File for the run's record (``records.save_run``), written at its end,
            also where it failed: settings, key, checksums of data and flow, versions,
            device, commit, and what came out.
        progress: Whether to show a progress bar; in a log file, a line now and then.
        throw: Whether a failure raises, or is only told by ``failed_step``.

    Returns:
        The trained flow and the records of the run, a ``FitResult``.

    Raises:
        ValueError: An argument is out of range; the data have the wrong shape or
            dtype, are empty, or hold NaN or inf; or the checkpoint is damaged or that
            of another run.
        OSError: The checkpoint cannot be written or read.
        NonFiniteError: A loss or a gradient was not finite, and ``throw`` is True.
    """
    return _fit(
        flow, None, key, x, x_val, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate, schedule=schedule, clip=clip, optimizer=optimizer,
        loss=loss, eval_every=eval_every, patience=patience, ema=ema, callback=callback,
        checkpoint=checkpoint, checkpoint_every=checkpoint_every, devices=devices,
        record=record, progress=progress, throw=throw,
    )  # fmt: skip


def fit_many(
    keys: Key[Array, " seeds"],
    build: Callable[[PRNGKeyArray], PyTree],
    x: Data,
    *,
    steps: int = 1200,
    batch_size: int = 512,
    learning_rate: float | Data = PEAK,
    schedule: optax.Schedule | None = None,
    clip: float | Data | None = 1.0,
    optimizer: Optimizer = optax.adam,
    x_val: Data | None = None,
    eval_every: int = 100,
    patience: int | None = None,
    ema: float | None = None,
    loss: Loss | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 1000,
    devices: Sequence[Any] | None = None,
    record: str | os.PathLike | None = None,
    progress: bool = True,
    throw: bool = True,
) -> FitResult:
    """Train one flow a seed, all of them in the same compiled steps (by ``vmap``).

    On a CPU the seeds are dealt out to its cores in equal shares, at most two to a
    core: a number of seeds with divisors goes faster than a prime one.
    A loss that calls LAPACK (``slogdet``, ``solve``, ``svd``) has been seen to stop for
    good in shares side by side, all threads waiting; train such flows one by one with
    ``fit``.

    Seed i does what ``fit(train, build(init), x)`` does, to rounding, where
    ``init, train = jr.split(keys[i])``. A seed that fails stops where it is; the others
    go on, and only when all are done an error is raised if ``throw`` is True.

    Args:
        keys: One key a seed, as from ``jr.split(key, seeds)``.
        build: Makes an untrained flow from a key; must be traceable by ``vmap``.
        x: Training data, the same for all seeds, shape ``(n, *flow.shape)``. All of
            it is loaded.
        steps: As for ``fit``, like all that follows.
        batch_size: See ``fit``. Each seed draws its own batches.
        learning_rate: See ``fit``; or one a seed, (seeds,), to try several at once.
        schedule: See ``fit``.
        clip: See ``fit``; or one a seed, (seeds,), with infinity for no clipping.
        optimizer: See ``fit``.
        x_val: See ``fit``. The best parameters are kept for each seed.
        eval_every: See ``fit``.
        patience: See ``fit``. Each seed stops for itself.
        ema: See ``fit``.
        loss: See ``fit``.
        callback: See ``fit``. It sees all seeds at once.
        checkpoint: See ``fit``.
        checkpoint_every: See ``fit``.
        devices: See ``fit``.
        record: See ``fit``.
        progress: See ``fit``.
        throw: See ``fit``.

    Returns:
        A ``FitResult`` whose arrays lead with an axis of seeds; ``member`` takes one
        flow out of ``result.flow``.

    Raises:
        ValueError: As ``fit``; or ``keys`` is not a non-empty array of keys.
        NonFiniteError: At least one seed failed, and ``throw`` is True.
    """
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not typed or keys.ndim != 1 or keys.size == 0:
        raise ValueError(
            "expected at least one key, one a seed, as from "
            f"jr.split(jr.key(0), seeds), got {keys.dtype} of shape {keys.shape}"
        )
    init, train = jnp.moveaxis(jax.vmap(jr.split)(keys), 1, 0)
    flows = eqx.filter_vmap(build)(init)
    return _fit(
        member(flows, 0), flows, train, x, x_val, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate, schedule=schedule, clip=clip, optimizer=optimizer,
        loss=loss, eval_every=eval_every, patience=patience, ema=ema, callback=callback,
        checkpoint=checkpoint, checkpoint_every=checkpoint_every, devices=devices,
        record=record, progress=progress, throw=throw,
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
    return -negative_log_likelihood(flow, x)


def negative_log_likelihood(flow: PyTree, x: Float[Array, "n ..."]) -> Float[Array, ""]:
    """Minus the mean log-probability of the rows of ``x`` in nats: the default loss.

    For a ``Transformed`` it is computed in the dtype of ``x``. With 64-bit numbers
    switched on, ``flow.log_prob`` would take a float32 flow through its layers in
    float64.
    """
    if not isinstance(flow, Transformed) or flow.cond_shape is not None:
        return -flow.log_prob(x).mean()
    z, log_det = jax.vmap(flow.bijection.inverse_and_log_det)(x)
    return -(flow.base_dist.log_prob(z).astype(x.dtype) + log_det).mean()


def _by_likelihood(flow, batch, key):
    return negative_log_likelihood(flow, batch)


def _fit(
    flow, flows, key, x, x_val, *, loss, callback, checkpoint, checkpoint_every,
    record, progress, throw, **options,
):  # fmt: skip
    """Check all arguments, train, and put the result together."""
    _check.at_least_one(checkpoint_every=checkpoint_every)
    if record is not None and not os.access(Path(record).parent, os.W_OK):
        raise OSError(f"expected a folder to write {record} into, got none")
    if loss is None and not hasattr(flow, "log_prob"):
        kind = type(flow).__name__
        raise ValueError(f"expected a flow with `log_prob`, or a `loss`, got {kind}")
    x = _check.rows("x", x, flow)
    streamed = isinstance(x, np.memmap) and flows is None
    x = x if streamed else jnp.asarray(x)
    if x_val is not None:
        x_val = jnp.asarray(_check.rows("x_val", x_val, flow))
    plan, rates, settings = _plan.plan(
        flow, len(x), loss=loss or _by_likelihood,
        seeds=None if flows is None else key.size, validated=x_val is not None,
        streamed=streamed, **options,
    )  # fmt: skip
    store = checkpoint and _run.Store(Path(checkpoint), checkpoint_every, settings)
    run = _run.run(
        plan, rates, flow if flows is None else flows, key, x, x_val, options["steps"],
        report=callback and (lambda *seen: callback(Snapshot(*seen))),
        progress=progress, store=store,
    )  # fmt: skip
    shown = slice(None if x_val is not None else 0)
    layers = _failure.layers(plan, run, key, x)
    result = FitResult(
        flow=run.best,
        final_flow=run.final,
        train_loss=run.log["steps"][0, ..., :-1],
        gradient_norm=run.log["steps"][1, ..., :-1],
        val_steps=run.log["val_steps"][shown],
        val_loss=np.moveaxis(run.log["val_losses"][shown], 0, -1),
        best_step=_or_none(run.best_step),
        failed_step=_or_none(run.failed),
        compile_seconds=run.compile_seconds,
        run_seconds=run.run_seconds,
        stopped_step=_or_none(run.stopped),
        failed_layer=tuple(layers) if plan.many else layers.item(),
        recorded={k[1:]: v for k, v in run.log.items() if k.startswith(".")},
    )
    if record is not None and jax.process_index() == 0:
        functions = {"loss": loss} | {k: options[k] for k in ("optimizer", "schedule")}
        names = {k: f and getattr(f, "__qualname__", "") for k, f in functions.items()}
        records.save_run(
            record,
            settings=settings | names,
            key=key,
            data={"x": x} | ({} if x_val is None else {"x_val": x_val}),
            flows={"start": flow if flows is None else flows, "flow": result.flow},
            result=_in_short(result),
        )
    if throw and np.any(run.failed >= 0):
        raise NonFiniteError(_failure.message(run, layers), result)
    return result


def _in_short(result: FitResult) -> dict[str, Any]:
    """What a record says of a result: all but flows and curves."""
    told = (
        "best_step", "failed_step", "failed_layer", "stopped_step", "compile_seconds",
        "run_seconds",
    )  # fmt: skip
    short = {name: getattr(result, name) for name in told}
    if result.val_loss.size:
        # NaN follows where a seed stopped before others
        short["lowest_val_loss"] = np.fmin.reduce(result.val_loss, axis=-1)
    return short | {"last_train_loss": result.train_loss[..., -1]}


def _or_none(steps):
    found = tuple(int(step) if step >= 0 else None for step in steps.ravel())
    return found if steps.ndim else found[0]
