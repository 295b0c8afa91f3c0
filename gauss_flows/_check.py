"""Checks of arguments: each error says what was expected and what came."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

ROWS_READ = 1 << 16
"""How many rows of a file are looked at together."""


def at_least_one(**values: Any) -> None:
    """Raise ``ValueError`` unless each value is an integer of at least 1."""
    for name, value in values.items():
        is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_int or value < 1:
            raise ValueError(f"expected {name} to be an integer >= 1, got {value!r}")


def positive(**values: Any) -> None:
    """Raise ``ValueError`` unless each value is a finite number above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"expected {name} to be finite and > 0, got {value!r}")


def floating(dtype: Any) -> Any:
    """``dtype``, JAX's default for None; ``ValueError`` if it is no real float."""
    found = jnp.dtype(dtype or float)
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"expected a floating dtype, got {found}")
    return dtype or float


def dtype_of(tree: Any) -> Any:
    """The dtype of the inexact arrays of ``tree``; None if it has none."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return jnp.result_type(*leaves) if leaves else None


def events(x: Array, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``x`` holds two or more events of that shape."""
    if x.shape[1:] != shape or len(x) < 2:
        raise ValueError(
            f"expected at least 2 events of shape {shape}, got an array of shape "
            f"{x.shape}"
        )


def varying(layer: str, what: str, x: Array) -> Array:
    """Return the rows ``x``, or raise at run time if a column of them is constant."""
    low, high = x.min(axis=0), x.max(axis=0)
    return eqx.error_if(
        x,
        # differences of pure rounding are no spread
        high - low <= 10 * jnp.finfo(x.dtype).eps * jnp.maximum(high, -low),
        f"{layer}: expected every {what} to vary over the batch, got a constant one: "
        "no monotone map makes it Gaussian",
    )


def rows(name: str, x: Any, flow: Any) -> Array | np.memmap:
    """Return ``x`` as an array of events of ``flow``, or raise ``ValueError``.

    Where ``flow`` has a ``shape`` the rows must have it; where it has inexact arrays
    ``x`` must have their dtype, and is not cast to it. With 64-bit numbers off, JAX
    itself makes float32 of a float64 array in memory; a memory-mapped one is refused.
    A memory-mapped file is read once, part by part, and returned as it is.
    """
    x = x if isinstance(x, np.memmap) else jnp.asarray(x)
    shape = getattr(flow, "shape", None)
    if x.ndim == 0 or (shape is not None and x.shape[1:] != tuple(shape)):
        sizes = "".join(f", {size}" for size in shape) if shape is not None else ", ..."
        raise ValueError(f"expected {name} of shape (n{sizes}), got {x.shape}")
    if x.size == 0:
        raise ValueError(f"expected {name} to hold at least one row, got {x.shape}")
    expected = dtype_of(flow) or x.dtype
    if not jnp.issubdtype(x.dtype, jnp.inexact) or x.dtype != expected:
        raise ValueError(
            f"expected {name} of the flow's dtype {expected}, got {x.dtype}; "
            "convert one of them"
        )
    bad = np.concatenate(
        [
            ~np.asarray(jnp.isfinite(part).reshape(len(part), -1).all(axis=1))
            for part in (x[i : i + ROWS_READ] for i in range(0, len(x), ROWS_READ))
        ]
    )
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"expected {name} to be finite, got NaN or inf in {int(bad.sum())} of "
            f"{len(x)} rows, the first in row {row}: {np.asarray(x[row]).ravel()[:8]}"
        )
    return x
