"""Diagonal layers: each coordinate by itself, the same map for all points."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from . import _check
from ._columns import AbstractColumnwise
from .transformers import AbstractTransformer


class Diagonal(AbstractColumnwise):
    """Map every coordinate by a transformer of its own, whatever the others are.

    Its Jacobian is diagonal. It is a coupling without a conditioner, or with one whose
    last kernel is zero: it bends marginals, and no dependence. With rotations between
    such layers it is a Gaussianization flow; see :func:`gauss_flows.diagonal_flow`.

    Cost: that of the transformer at each coordinate.

    Args:
        transformer: Which maps, for example ``transformers.MixtureCDF(8)``.
        shape: Event shape; one number will do, ``(1,)``.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If ``shape`` is empty or has a dimension below 1.

    Source:
        Laparra, Camps-Valls & Malo (2011), section II; Meng, Song, Song & Ermon (2020),
        section 3.1.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    transformer: AbstractTransformer
    theta: Float[Array, "p ..."]
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        transformer: AbstractTransformer,
        shape: tuple[int, ...],
        *,
        dtype: DTypeLike | None = None,
    ):
        if not shape or min(shape) < 1:
            raise ValueError(f"expected an event shape such as (2,), got {shape}")
        self.shape, self.transformer = shape, transformer
        self.theta = jnp.zeros(
            (transformer.n_parameters, *shape), _check.floating(dtype)
        )

    def from_data(self, x: Float[Array, "n ..."]) -> "Diagonal":
        """The layer that Gaussianizes each coordinate of a batch by itself.

        Args:
            x: Batch of events, shape ``(n, *shape)`` with ``n >= 2``.

        Raises:
            ValueError: If the batch has another shape or fewer than two events, or
                fewer than a mixture of normal laws has components.
            RuntimeError: If a coordinate is constant, or out of the scales that a
                mixture can have (``EquinoxRuntimeError`` under jit).
        """
        _check.events(x, self.shape)
        rows = _check.varying("Diagonal", "coordinate", x.reshape(len(x), -1))
        theta = self.transformer.from_marginals(rows).reshape(self.theta.shape)
        return eqx.tree_at(
            lambda layer: layer.theta, self, theta.astype(self.theta.dtype)
        )

    def columns(
        self, x: Float[Array, "..."], *, inverse: bool = False
    ) -> tuple[Float[Array, "..."], Float[Array, "*batch"]]:
        """Map each coordinate, or undo that.

        Args:
            x: Events of shape ``(*shape, *batch)``.
            inverse: Whether to apply the inverse.

        Returns:
            Events of the same shape, and their log-determinants of shape ``batch``.
        """
        batch = x.shape[len(self.shape) :]
        flat = x.reshape(-1, *batch)
        theta = self.theta.reshape(len(self.theta), len(flat), *(1,) * len(batch))
        apply = self.transformer.inverse if inverse else self.transformer.forward
        y, log_derivative = apply(flat, *self.transformer.split(theta))
        return y.reshape(x.shape), log_derivative.sum(axis=0)
