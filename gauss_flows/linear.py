"""Linear bijections that mix coordinates between couplings."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.scipy.linalg import solve_triangular
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

    Only the direction of a row matters, as long as the square of its length is neither
    0 nor infinite: in float32 entries may be from about 1e-15 to 1e15. Two equal rows
    in succession cancel: that is how the layer starts, at the identity, when it is
    given no key.

    Cost of an event: ``2 * n_reflections * dim`` multiplications, forward and inverse;
    ``dim**2`` where more than ``dim`` events pass together, for which the matrix is
    made once.

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

    shape: tuple[int, ...] = eqx.field(static=True)
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
            self.params = jnp.ones((n_reflections, *shape), _check.floating(dtype))
        else:
            self.params = jr.normal(
                key, (n_reflections, *shape), _check.floating(dtype)
            )

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

    shape: tuple[int, ...] = eqx.field(static=True)
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
            self.scores = jnp.linspace(
                1.0, -1.0, shape[0], dtype=_check.floating(dtype)
            )
        else:
            self.scores = jr.normal(key, shape, _check.floating(dtype))

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


class PLULinear(AbstractColumnwise):
    r"""A learned linear map of the last axis: of a vector, or of each pixel's channels.

    :math:`y = W x` with :math:`W = P L (U + \operatorname{diag} s)`: a permutation
    :math:`P`, a lower triangular :math:`L` with ones on its diagonal, and a strictly
    upper triangular :math:`U`. On pictures it is a 1×1 convolution. It starts at a
    random rotation; :math:`L`, :math:`U` and :math:`\log |s|` are trained, :math:`P`
    and the signs of :math:`s` stay as they were drawn. So training cannot make
    :math:`W` exactly singular, nor change the sign of its determinant, but condition
    numbers have no bound. Where they should have one,
    :class:`HouseholderRotation` keeps them at 1.

    The log-determinant is that of one pixel, :math:`\sum \log |s|`, times the number of
    pixels.

    Cost: ``channels**2`` multiplications a pixel, and forward ``channels**3`` once a
    batch for :math:`W`; the inverse solves two triangular systems instead. The
    determinant costs ``channels``.

    Args:
        key: JAX random key of the rotation.
        shape: Event shape, channels last: ``(dim,)`` or ``(height, width, channels)``.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If there are fewer than two channels.
        EquinoxRuntimeError: In the inverse, if training has made the matrix singular to
            rounding: the least :math:`|s|` is below the dtype's epsilon times the
            largest, or one is not finite.

    Source:
        Kingma & Dhariwal (2018), "Glow", section 3.2.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    factors: Float[Array, "channels channels"]
    r"""L below the diagonal, U above it, and the logarithms of :math:`|s|` on it."""
    order: Int[Array, " channels"]
    """Which row of ``L (U + diag s)`` is the first of W, the second, ..."""
    signs: Int[Array, " channels"]
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, ...],
        *,
        dtype: DTypeLike | None = None,
    ):
        if not shape or min(shape) < 1 or shape[-1] < 2:
            raise ValueError(
                "expected an event shape with at least 2 channels, such as (2,) or "
                f"(8, 8, 4), got {shape}"
            )
        self.shape = shape
        drawn = jr.orthogonal(key, shape[-1], dtype=_check.floating(dtype))
        rotation = drawn.at[0].multiply(jnp.sign(jnp.linalg.det(drawn)))
        permutation, lower, upper = jax.scipy.linalg.lu(rotation)
        diagonal = jnp.diag(upper)
        self.factors = (
            jnp.tril(lower, -1)
            + jnp.triu(upper, 1)
            + jnp.diag(jnp.log(jnp.abs(diagonal)))
        )
        self.order = jnp.argmax(permutation, axis=1)
        self.signs = jnp.sign(diagonal).astype(self.order.dtype)

    @property
    def matrix(self) -> Float[Array, "channels channels"]:
        """The matrix W."""
        product = jnp.matmul(self._lower, self._upper, precision="highest")
        return product[self.order]

    @property
    def _lower(self) -> Float[Array, "channels channels"]:
        return jnp.tril(self.factors, -1) + jnp.eye(
            len(self.order), dtype=self.factors.dtype
        )

    @property
    def _upper(self) -> Float[Array, "channels channels"]:
        scale = self.signs * jnp.exp(jnp.diag(self.factors))
        return jnp.triu(self.factors, 1) + jnp.diag(scale)

    def columns(
        self, x: Float[Array, "..."], *, inverse: bool = False
    ) -> tuple[Float[Array, "..."], Float[Array, "*batch"]]:
        """Multiply the channels by W, or by its inverse.

        Args:
            x: Events of shape ``(*shape, *batch)``.
            inverse: Whether to apply the inverse.

        Returns:
            Events of the same shape, and their log-determinants of shape ``batch``.
        """
        axis = len(self.shape) - 1
        batch = x.shape[axis + 1 :]
        log_det = math.prod(self.shape[:-1]) * jnp.trace(self.factors)
        if not inverse:
            y = jnp.tensordot(self.matrix, x, (1, axis), precision="highest")
            return jnp.moveaxis(y, 0, axis), jnp.full(batch, log_det)
        y = jnp.moveaxis(x, axis, 0)
        rows = y.reshape(len(y), -1)[jnp.argsort(self.order)]
        rows = solve_triangular(self._lower, rows, lower=True, unit_diagonal=True)
        rows = solve_triangular(self._checked_upper(), rows)
        return jnp.moveaxis(rows.reshape(y.shape), 0, axis), jnp.full(batch, -log_det)

    def _checked_upper(self) -> Float[Array, "channels channels"]:
        upper = self._upper
        scale = jnp.abs(jnp.diag(upper))
        least = jnp.finfo(scale.dtype).eps * scale.max()
        return eqx.error_if(
            upper,
            ~((scale.min() > least) & jnp.isfinite(least)),
            "PLULinear: expected an invertible matrix, got one that is singular to "
            "rounding: training has driven its scales |s| too far apart",
        )


def _reflect(
    x: Float[Array, "d *n"], rows: Float[Array, "r d"]
) -> Float[Array, "d *n"]:
    def step(x, row):
        # sums of products, not dot products: GPUs round those to 10 bits by default,
        # and the rotation would no longer undo itself
        row = row.reshape(-1, *(1,) * (x.ndim - 1))
        return x - row * (2 * jnp.sum(row * x, axis=0) / jnp.sum(row * row)), None

    return jax.lax.scan(step, x, rows, unroll=min(len(rows), 8))[0]
