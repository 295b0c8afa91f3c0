"""Residual maps ``T(x) = x + g(x)`` and their inverse by Banach's iteration.

If ``g`` is a contraction, ``||g(a) - g(b)|| <= L ||a - b||`` with ``L < 1``, then
``T`` is invertible and ``x <- y - g(x)`` converges to the preimage of ``y``. The
condition is sufficient, not necessary: ``g(x) = 2x`` gives an invertible map too.

Everything takes a single event of any shape (batch with :func:`jax.vmap`); norms are
Euclidean norms of the whole event. Source: Behrmann et al. (2019), "Invertible
Residual Networks", Theorem 1 and Algorithm 1.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
import paramax
from flowjax.bijections import AbstractBijection
from jax import lax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from . import _check, log_det, spectral
from ._fixed_point import (
    CLEAR,
    AbstractIteration,
    BanachResult as BanachResult,
    IterationState,
    check_event,
    check_lipschitz,
    invert,
    scale_of,
)


class _BanachIteration(AbstractIteration):
    """The fixed-point map, again and again."""

    rtol: float
    atol: float
    norm: Callable[[Any], Float[Array, ""]] = optx.two_norm

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        _, target = args
        new, aux = fn(y, args)
        residual = self.norm(new - y)  # x + g(x) - target at x = y, up to its sign
        scale = scale_of(new, target)
        clear = residual > CLEAR * jnp.finfo(y.dtype).eps * scale
        clear &= jnp.isfinite(state.residual)
        ratio = jnp.where(clear, residual / state.residual, jnp.nan)
        rate = jnp.fmax(state.rate, ratio)
        return new, IterationState(residual, scale, rate), aux


def banach_inverse(
    g: Callable[[Array], Array],
    y: Float[Array, "..."],
    *,
    lipschitz: float | None = None,
    tolerance: float | None = None,
    max_steps: int | None = None,
    throw: bool = True,
) -> BanachResult:
    """Solve ``x + g(x) = y`` for ``x`` by iterating ``x <- y - g(x)`` from ``x = y``.

    The derivative of ``x`` with respect to ``y`` and all that ``g`` holds is that of
    the implicit function theorem: its memory does not depend on the number of steps.
    It solves one dense linear system, O(d^3) for an event of d entries.

    Cost: one evaluation of ``g`` a step, about ``log(eps) / log(lipschitz)`` steps at
    most. That is many where ``lipschitz`` is near 1: prefer a Newton method there.

    Args:
        g: Map from events to events of the same shape and dtype, a function or an
            :class:`equinox.Module`.
        y: The event to invert.
        lipschitz: A bound in [0, 1) on the Lipschitz constant of ``g``, if one is
            known. Without it the iteration may well converge, with no error bound.
        tolerance: Stop at this ``error_bound`` (at this residual if ``lipschitz`` is
            None), in the units of ``y``. By default go on to the rounding of the dtype.
        max_steps: Most steps to take. By default as many as always suffice for
            ``lipschitz`` (at most 100,000), and 1,000 if that is None.
        throw: Raise if the iteration did not converge; otherwise see ``converged``.

    Raises:
        ValueError: If ``lipschitz`` is not in [0, 1), ``tolerance`` not positive,
            ``max_steps`` below 1, or ``g`` changes shape or dtype.
        RuntimeError: If ``throw`` and the iteration did not converge, or showed that
            the declared ``lipschitz`` is too small. States residual, steps and rate;
            under jit or vmap (``EquinoxRuntimeError``) it can only say where they are.
    """
    return invert(
        _BanachIteration,
        "Banach's",
        g,
        y,
        lipschitz=lipschitz,
        tolerance=tolerance,
        max_steps=max_steps,
        throw=throw,
    )


def banach_iterates(
    g: Callable[[Array], Array], y: Float[Array, "*event"], n: int
) -> Float[Array, "iterates *event"]:
    """``y`` and the first ``n`` iterates of ``x <- y - g(x)``, shape ``(n + 1, ...)``.

    For looking at the iteration; to invert, use :func:`banach_inverse`.

    Args:
        g: Map from events to events of the same shape and dtype.
        y: The event to invert, also the start.
        n: Number of steps.

    Raises:
        ValueError: If ``n`` is negative, or ``g`` changes shape or dtype.
    """
    if n < 0:
        raise ValueError(f"expected a number of steps of at least 0, got {n}")
    g, y = paramax.unwrap(g), jnp.asarray(y)
    check_event(g, y)

    def step(x, _):
        x = y - g(x)
        return x, x

    with jax.default_matmul_precision("highest"):
        _, xs = lax.scan(step, y, length=n)
    return jnp.concatenate([y[None], xs])


class ResidualMap(AbstractBijection):
    """The residual map ``T(x) = x + g(x)`` of a contraction ``g``.

    ``T`` stretches by factors between ``1 - lipschitz`` and ``1 + lipschitz``, so its
    condition number is at most their ratio. The inverse is :func:`banach_inverse`. It
    raises where the iteration shows that the declared bound is too small.

    Cost: the log-determinant is exact, O(d^3) for an event of d entries and d
    derivatives of ``g``, in both directions. Not for large d.

    Args:
        g: Map from events to events of the same shape and dtype.
        shape: Event shape.
        lipschitz: A bound in [0, 1) on the Lipschitz constant of ``g``. It is declared,
            not enforced: training ``g`` may break it. Of an
            :class:`~gauss_flows.spectral.AbstractContraction`, which does enforce a
            bound, the norms are compared with it here.
        inverse: What solves ``x + g(x) = y``, with the signature of
            :func:`banach_inverse`; the other one is :func:`gauss_flows.newton_inverse`.

    Raises:
        ValueError: If ``lipschitz`` is not in [0, 1), ``g`` changes the shape, or it is
            an ``AbstractContraction`` that is not within ``lipschitz``.

    Source:
        Behrmann et al. (2019), "Invertible Residual Networks", Theorem 1.
    """

    g: Callable[[Array], Array]
    shape: tuple[int, ...]
    lipschitz: float = eqx.field(static=True)
    inverse_method: Callable[..., BanachResult] = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        g: Callable[[Array], Array],
        *,
        shape: tuple[int, ...],
        lipschitz: float,
        inverse: Callable[..., BanachResult] = banach_inverse,
    ):
        self.g, self.shape = g, tuple(shape)
        self.lipschitz, self.inverse_method = check_lipschitz(lipschitz), inverse
        if isinstance(g, spectral.AbstractContraction):
            spectral.check_bound(g, lipschitz)
        check_event(paramax.unwrap(g), jnp.zeros(self.shape), dtype=False)

    def transform_and_log_det(self, x, condition=None):
        """``x + g(x)`` and ``log |det (I + J_g(x))|``."""
        x = jnp.asarray(x)
        with jax.default_matmul_precision("highest"):
            return x + self.g(x), log_det.exact(self.g, x)

    def inverse_and_log_det(self, y, condition=None):
        """The solution of ``x + g(x) = y``, and minus the log-determinant there."""
        x = self.inverse_method(self.g, jnp.asarray(y), lipschitz=self.lipschitz).x
        with jax.default_matmul_precision("highest"):
            return x, -log_det.exact(self.g, x)


def contraction_mlp(
    key: PRNGKeyArray,
    *,
    dim: int,
    width: int,
    depth: int,
    lipschitz: float,
    activation: Callable[[Array], Array] = jnp.tanh,
    dtype: DTypeLike | None = None,
) -> eqx.nn.MLP:
    """A network ``(dim,) -> (dim,)`` whose spectral norms multiply to ``lipschitz``.

    Each weight matrix is divided by its largest singular value, from an exact SVD, and
    multiplied by ``lipschitz ** (1 / (depth + 1))``. With a 1-Lipschitz activation the
    product bounds the Lipschitz constant, which is itself smaller. The norms are set
    once: training moves them.

    Args:
        key: Of the initial weights, which are those of :class:`equinox.nn.MLP`.
        dim: Size of input and output.
        width: Size of each hidden layer.
        depth: Number of hidden layers.
        lipschitz: Product of the spectral norms, in [0, 1).
        activation: Elementwise and 1-Lipschitz: tanh and relu are; silu and gelu are
            not, with slopes up to 1.10 and 1.13.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If ``lipschitz`` is not in [0, 1), a size is below 1, ``depth`` is
            negative, or the activation is steeper than 1 on a grid over [-10, 10].
    """
    lipschitz = check_lipschitz(lipschitz)
    if min(dim, width) < 1 or depth < 0:
        raise ValueError(
            "expected dim and width of at least 1 and depth of at least 0, "
            f"got dim={dim}, width={width}, depth={depth}"
        )
    spectral.check_activation(activation)
    dtype = _check.floating(dtype)
    mlp = eqx.nn.MLP(dim, dim, width, depth, activation, dtype=dtype, key=key)
    norm = lipschitz ** (1 / (depth + 1))
    return eqx.tree_at(
        lambda m: [layer.weight for layer in m.layers],
        mlp,
        [w.weight * (norm / jnp.linalg.norm(w.weight, 2)) for w in mlp.layers],
    )
