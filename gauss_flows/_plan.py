"""From the arguments of ``fit`` to what is compiled, with a check of each of them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from . import _check, _loop

PEAK = 3e-3
"""Default peak of the learning rate."""


def plan(
    flow: Any,
    rows: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float | optax.Schedule,
    clip: float | None,
    optimizer: optax.GradientTransformation | None,
    eval_every: int,
    patience: int | None,
    ema: float | None,
    loss: Any,
    devices: Sequence[Any] | None,
    validated: bool,
    many: bool,
) -> tuple[_loop.Plan, dict[str, Any]]:
    """The plan of a run, and those settings that a checkpoint names.

    ``rows`` is the number of rows of data; ``validated`` tells if some are held out.
    """
    _check.at_least_one(steps=steps, batch_size=batch_size, eval_every=eval_every)
    if clip is not None:
        _check.positive(clip=clip)
    if not callable(learning_rate):
        _check.positive(learning_rate=learning_rate)
    if optimizer is not None and learning_rate != PEAK:
        raise ValueError("expected `optimizer` or `learning_rate`, got both")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"expected ema between 0 and 1, got {ema!r}")
    if patience is not None:
        _check.at_least_one(patience=patience)
        if not validated:
            raise ValueError("expected x_val, whose loss `patience` watches, got None")
    if _check.dtype_of(_loop.trainable(flow)[0]) is None:
        raise ValueError("expected a flow with trainable arrays, got one with none")
    if batch_size > rows:
        raise ValueError(f"expected batch_size <= {rows} (rows), got {batch_size}")
    made = _loop.Plan(
        loss=loss,
        optimizer=_optimizer(steps, learning_rate, clip, optimizer),
        batch_size=batch_size,
        interval=min(eval_every, steps),
        many=many,
        ema=ema,
        patience=patience,
        mesh=None if devices is None else _mesh(devices, batch_size),
    )
    named = {
        "steps": steps, "batch_size": batch_size, "eval_every": eval_every,
        "patience": patience, "ema": ema, "clip": clip,
        "learning_rate": "a schedule" if callable(learning_rate) else learning_rate,
    }  # fmt: skip
    return made, named


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


def _mesh(devices, batch_size):
    if not len(devices) or batch_size % len(devices):
        raise ValueError(
            f"expected batch_size to be a multiple of the number of devices, "
            f"{len(devices)}, got {batch_size}"
        )
    return Mesh(np.asarray(devices), ("batch",), axis_types=(AxisType.Auto,))
