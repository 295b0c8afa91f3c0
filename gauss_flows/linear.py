"""Linear bijections that mix coordinates between couplings."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from . import _check
from ._columns import AbstractColumnwise


class HouseholderRotation(AbstractColumnwise):
    r"""A learned rotation: a product of Householder reflections.

    Each row :math:`v` of ``params`` reflects, :math:`x \mapsto x - 2 v (v^\top x) /
    v^\top v`; rows act one after another, the first row first. An even number of
    reflections has determinant 1, so the log-determinant is exactly 0, every singular
    value is exactly 1, and the inverse applies the rows backwards. As many reflections
    as there are coordinates reach every rotation; two turn one plane.

    Only the direction of a row matters. Two equal rows in succession cancel: that is
    how the layer starts, at the identity, when it is given no key.

    Cost: ``2 * n_reflections * dim`` multiplications, forward and inverse.

    Args:
        n_reflections: Number of reflections, even and at least 2.
        shape: Event shape ``(dim,)``.
        key: JAX random key; rows are then drawn from the standard normal distribution.
            Without it the layer starts at the identity.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If ``n_reflections`` is odd or below 2, or ``shape`` is no vector.

    Source:
        Tomczak & Welling (2016), "Improving Variational Auto-Encoders using
        Householder Flow", section 2.
    """

    shape: tuple[int, ...]
    params: Float[Array, "n_reflections dim"]
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        n_reflections: int = 2,
        shape: tuple[int, ...] = (2,),
        *,
        key: PRNGKeyArray | None = None,
        dtype: DTypeLike | None = None,
    ):
        if n_reflections < 2 or n_reflections % 2:
            raise ValueError(
                "expected an even number of reflections, at least 2 (an odd number "
                f"has determinant -1 and is no rotation), got {n_reflections}"
            )
        if len(shape) != 1 or shape[0] < 2:
            raise ValueError(f"expected shape (dim,) with dim >= 2, got {shape}")
        self.shape = shape
        if key is None:
            self.params = jnp.ones((n_reflections, *shape), dtype or float)
        else:
            self.params = jr.normal(key, (n_reflections, *shape), dtype or float)

    def columns(
        self, x: Float[Array, "dim *batch"], *, inverse: bool = False
    ) -> tuple[Float[Array, "dim *batch"], Float[Array, "*batch"]]:
        """Rotate events of shape ``(dim, *batch)``, or rotate them back.

        Args:
            x: The events.
            inverse: Whether to apply the inverse.

        Returns:
            The rotated events, and zeros: their log-determinants.
        """
        rows = self.params[::-1] if inverse else self.params
        log_det = jnp.zeros(x.shape[1:], x.dtype)
        if x.size <= x.shape[0] ** 2:
            return _reflect(x, rows), log_det
        # for so many events it pays to make the matrix first
        matrix = _reflect(jnp.eye(x.shape[0], dtype=rows.dtype), rows)
        return jnp.tensordot(matrix, x, 1, precision="highest"), log_det


class LearnedPermutation(AbstractColumnwise):
    r"""A permutation that training can change: coordinates in the order of scores.

    The coordinate with the highest score comes first. In front of a coupling with a
    fixed mask it decides which coordinates are passive, so that the pair is a coupling
    with a learned mask. On the way through it is an exact permutation: singular values
    1, log-determinant 0, and the inverse is the transpose.

    Ranks have no derivative. The gradient of the scores is that of a smooth stand-in,
    a softmax over distances of scores: it points somewhere, but it is not the gradient
    of the loss. In a likelihood it lacks the log-determinant of the stand-in, and pulls
    scores together; chapter 03 of the book measures what comes of it. Where the order
    need not be discrete, :class:`HouseholderRotation` has a true gradient.

    Cost: ``dim**2`` multiplications, forward and inverse.

    Args:
        shape: Event shape ``(dim,)``, ``dim >= 2``.
        key: JAX random key of the scores, for a random order. Without it the layer
            starts at the identity.
        temperature: Of the softmax, in units of scores; lower is closer to the
            permutation, with gradients between ever closer scores only.
        dtype: Floating dtype of the scores; JAX's default by default.

    Raises:
        ValueError: If ``shape`` is no vector or the temperature not positive.

    Source:
        Prillo & Eisenschlos (2020), "SoftSort", section 3, with a straight-through
        gradient (Bengio, Leonard & Courville 2013).
    """

    shape: tuple[int, ...]
    scores: Float[Array, " dim"]
    temperature: float = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        key: PRNGKeyArray | None = None,
        temperature: float = 1.0,
        dtype: DTypeLike | None = None,
    ):
        _check.positive(temperature=temperature)
        if len(shape) != 1 or shape[0] < 2:
            raise ValueError(f"expected shape (dim,) with dim >= 2, got {shape}")
        self.shape, self.temperature = shape, temperature
        if key is None:
            self.scores = jnp.linspace(1.0, -1.0, shape[0], dtype=dtype or float)
        else:
            self.scores = jr.normal(key, shape, dtype or float)

    @property
    def order(self) -> Int[Array, " dim"]:
        """Which coordinate comes first, second, ... and last."""
        return jnp.argsort(-self.scores)

    def columns(
        self, x: Float[Array, "dim *batch"], *, inverse: bool = False
    ) -> tuple[Float[Array, "dim *batch"], Float[Array, "*batch"]]:
        """Put coordinates in order, or back.

        Args:
            x: Events of shape ``(dim, *batch)``.
            inverse: Whether to apply the inverse.

        Returns:
            The permuted events, and zeros: their log-determinants.
        """
        order = self.order
        hard = jax.nn.one_hot(order, len(order), dtype=x.dtype)
        apart = jnp.abs(self.scores[order][:, None] - self.scores)
        apart = jnp.where(hard > 0, 0.0, apart)  # of itself; rounding may leave an ulp
        soft = jax.nn.softmax(-apart / self.temperature, axis=1).astype(x.dtype)
        matrix = hard + (soft - jax.lax.stop_gradient(soft))
        matrix = matrix.T if inverse else matrix
        log_det = jnp.zeros(x.shape[1:], x.dtype)
        return jnp.tensordot(matrix, x, 1, precision="highest"), log_det


def _reflect(
    x: Float[Array, "d *n"], rows: Float[Array, "r d"]
) -> Float[Array, "d *n"]:
    def step(x, row):
        # sums of products, not dot products: GPUs round those to 10 bits by default,
        # and the rotation would no longer undo itself
        row = row.reshape(-1, *(1,) * (x.ndim - 1))
        return x - row * (2 * jnp.sum(row * x, axis=0) / jnp.sum(row * row)), None

    return jax.lax.scan(step, x, rows, unroll=min(len(rows), 8))[0]
