"""From the arguments of ``fit`` to what is compiled, with a check of each of them."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh
from jaxtyping import Array

from . import _check, _loop

PEAK = 3e-3
"""Default peak of the learning rate."""

Optimizer = (
    Callable[[optax.Schedule], optax.GradientTransformation]
    | optax.GradientTransformation
)


def plan(
    flow: Any,
    rows: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: Any,
    schedule: optax.Schedule | None,
    clip: Any,
    optimizer: Optimizer,
    eval_every: int,
    patience: int | None,
    ema: float | None,
    loss: Any,
    devices: Sequence[Any] | None,
    validated: bool,
    streamed: bool,
    seeds: int | None,
) -> tuple[_loop.Plan, _loop.Rates, dict[str, Any]]:
    """The plan of a run, its rates, and those settings that a checkpoint names.

    ``rows`` is the number of rows of data; ``validated`` tells if some are held out,
    ``streamed`` if they stay on the disk; ``seeds`` is None where one flow is trained.
    """
    _check.at_least_one(steps=steps, batch_size=batch_size, eval_every=eval_every)
    finished = isinstance(optimizer, optax.GradientTransformation)
    if finished and (np.any(np.not_equal(learning_rate, PEAK)) or schedule is not None):
        raise ValueError(
            "expected a finished `optimizer`, or a function such as `optax.adam` with "
            "`learning_rate` and `schedule`, got both"
        )
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"expected ema between 0 and 1, got {ema!r}")
    if patience is not None:
        _check.at_least_one(patience=patience)
        if not validated:
            raise ValueError("expected x_val, whose loss `patience` watches, got None")
    dtype = _check.dtype_of(_loop.trainable(flow)[0])
    if dtype is None:
        raise ValueError("expected a flow with trainable arrays, got one with none")
    if batch_size > rows:
        raise ValueError(f"expected batch_size <= {rows} (rows), got {batch_size}")
    made = _loop.Plan(
        loss=loss,
        optimizer=_always(optimizer) if finished else optimizer,
        schedule=schedule or (_one if finished else None),
        batch_size=batch_size,
        interval=min(eval_every, steps),
        many=seeds is not None,
        ema=ema,
        patience=patience,
        mesh=None if devices is None else _mesh(devices, batch_size),
        streamed=streamed,
    )
    rates = _loop.Rates(
        peak=_rate("learning_rate", learning_rate, seeds, dtype),
        clip=_rate("clip", math.inf if clip is None else clip, seeds, dtype),
    )
    named = {
        "steps": steps, "batch_size": batch_size, "eval_every": eval_every,
        "patience": patience, "ema": ema, "clip": _plain(clip),
        "learning_rate": _plain(learning_rate),
    }  # fmt: skip
    return made, rates, named


def _rate(name: str, value: Any, seeds: int | None, dtype: Any) -> Array:
    """A rate as an array, one entry a seed if there are many; infinity is no clip."""
    array = np.asarray(value, float)
    if array.shape not in ((), (seeds,)):
        one_a_seed = "" if seeds is None else f" or an array of shape ({seeds},)"
        raise ValueError(
            f"expected {name} to be a number{one_a_seed}, got shape {array.shape}"
        )
    for number in array.ravel()[~((name == "clip") & np.isposinf(array.ravel()))]:
        _check.positive(**{name: float(number)})
    return jnp.asarray(np.broadcast_to(array, () if seeds is None else (seeds,)), dtype)


def _plain(value: Any) -> Any:
    return value if value is None else np.asarray(value, float).tolist()


def _one(count: Any) -> float:
    return 1.0


# Cached, so that a second fit finds the same function and compiles nothing.
@lru_cache(maxsize=32)
def _always(optimizer: optax.GradientTransformation) -> Callable:
    return lambda _: optimizer


def _mesh(devices, batch_size):
    if not len(devices) or batch_size % len(devices):
        raise ValueError(
            f"expected batch_size to be a multiple of the number of devices, "
            f"{len(devices)}, got {batch_size}"
        )
    return Mesh(np.asarray(devices), ("batch",), axis_types=(AxisType.Auto,))
