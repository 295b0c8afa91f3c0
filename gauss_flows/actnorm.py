"""Activation normalisation: a per-channel affine map set from data."""

import math
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from . import _check
from ._columns import AbstractColumnwise


class ActNorm(AbstractColumnwise):
    r"""Activation normalisation, :math:`y = e^s x + t` with one pair per channel.

    The last axis of the event holds the channels; for a vector each coordinate is one.
    A new layer is **the identity**. :meth:`from_data`, or
    :func:`gauss_flows.initialize_actnorm` for a whole flow, sets it so that its output
    has mean 0 and variance 1 in every channel of a given batch; nothing happens behind
    your back on a first training step.

    Cost: one multiplication and addition a coordinate, both ways.

    Args:
        shape: Event shape, channels last: ``(dim,)`` or ``(height, width, channels)``.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If ``shape`` is empty or has a dimension below 1.

    Source:
        Kingma & Dhariwal (2018), "Glow", section 3.1.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    log_scale: Float[Array, " channels"]
    shift: Float[Array, " channels"]
    cond_shape: ClassVar[None] = None

    def __init__(self, shape: tuple[int, ...], *, dtype: DTypeLike | None = None):
        if not shape or min(shape) < 1:
            raise ValueError(f"expected an event shape such as (2,), got {shape}")
        self.shape = shape
        self.log_scale = jnp.zeros(shape[-1], _check.floating(dtype))
        self.shift = jnp.zeros(shape[-1], _check.floating(dtype))

    def from_data(self, x: Float[Array, "n ..."]) -> "ActNorm":
        """The layer whose output on ``x`` has mean 0 and variance 1 in each channel.

        Args:
            x: Batch of events, shape ``(n, *shape)`` with ``n >= 2``.

        Raises:
            ValueError: If the batch has another shape or fewer than two events.
            RuntimeError: If a channel is constant (``EquinoxRuntimeError`` under jit).
        """
        _check.events(x, self.shape)
        axes = tuple(range(x.ndim - 1))
        mean, spread = x.mean(axes), x.std(axes)
        spread = eqx.error_if(
            spread,
            # deviations of pure rounding are no spread
            spread <= 10 * jnp.finfo(x.dtype).eps * jnp.abs(mean),
            "ActNorm: expected every channel to vary over the batch, got a constant "
            "one: no scale gives it variance 1",
        )
        new = (-jnp.log(spread), -mean / spread)
        new = tuple(a.astype(self.shift.dtype) for a in new)
        return eqx.tree_at(lambda layer: (layer.log_scale, layer.shift), self, new)

    def columns(
        self, x: Float[Array, "..."], *, inverse: bool = False
    ) -> tuple[Float[Array, "..."], Float[Array, "*batch"]]:
        """Scale and shift each channel, or undo that.

        Args:
            x: Events of shape ``(*shape, *batch)``.
            inverse: Whether to apply the inverse.

        Returns:
            Events of the same shape, and their log-determinants of shape ``batch``.
        """
        batch = x.shape[len(self.shape) :]
        log_scale, shift = (
            a.reshape(-1, *(1,) * len(batch)) for a in (self.log_scale, self.shift)
        )
        log_det = math.prod(self.shape[:-1]) * jnp.sum(self.log_scale)
        if inverse:
            return (x - shift) * jnp.exp(-log_scale), jnp.full(batch, -log_det)
        return x * jnp.exp(log_scale) + shift, jnp.full(batch, log_det)


ActNorm1D = ActNorm
"""The name of :class:`ActNorm` for vectors, ``ActNorm1D(shape=(2,))``."""
