r"""The inverse of a residual map by Newton's method, kept safe by Banach's iteration.

Newton's step solves :math:`(I + J_g(x))\,s = x + g(x) - y`. Far from the solution a
full step may leap away. Here steps of several lengths are tried together with the
Banach step :math:`x \leftarrow y - g(x)`, and the one of least residual is taken. Of a
contraction the Banach step shrinks the residual by L at least, so that Banach's bound
on the number of steps holds here too, and near the solution a handful will do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Float

from ._fixed_point import (
    CLEAR,
    FLOOR,
    AbstractIteration,
    BanachResult,
    IterationState,
    invert,
    scale_of,
)

LENGTHS = (1.0, 0.5, 0.25, 0.125)
"""Parts of a Newton step that are tried."""
DENSE = 64
"""Entries of an event up to which the Jacobian is written out."""


def newton_inverse(
    g: Callable[[Array], Array],
    y: Float[Array, "..."],
    *,
    lipschitz: float | None = None,
    tolerance: float | None = None,
    max_steps: int | None = None,
    throw: bool = True,
    krylov: bool | None = None,
) -> BanachResult:
    """Solve ``x + g(x) = y`` for ``x`` by safeguarded Newton steps from ``x = y``.

    Arguments, errors, gradients and the result are those of
    :func:`gauss_flows.banach_inverse`; its ``rate`` is here the largest ratio
    ``|g(a) - g(b)| / |a - b|`` of successive iterates.

    Cost of a step: :func:`evaluations_per_step` evaluations of ``g`` or products with
    its Jacobian, and a dense linear system; with ``krylov`` instead as many products as
    GMRES takes, and no matrix. It pays where ``lipschitz`` is near 1 *and attained*:
    many networks contract far better than their bound, and are cheaper to invert by
    Banach's iteration.

    Args:
        g: Map from events to events of the same shape and dtype, a function or an
            :class:`equinox.Module`.
        y: The event to invert.
        lipschitz: A bound in [0, 1) on the Lipschitz constant of ``g``, if one is
            known. Without it convergence is not proven.
        tolerance: Stop at this ``error_bound`` (at this residual if ``lipschitz`` is
            None), in the units of ``y``. By default go on to the rounding of the dtype.
        max_steps: Most steps to take; by default as for ``banach_inverse``.
        throw: Raise if the iteration did not converge; otherwise see ``converged``.
        krylov: Solve by GMRES; by default for events of more than 64 entries.

    Raises:
        ValueError: As for ``banach_inverse``.
        RuntimeError: As for ``banach_inverse``.

    Source:
        Kelley (1995), "Iterative Methods for Linear and Nonlinear Equations", chapters
        5 and 6.
    """
    krylov = jnp.size(y) > DENSE if krylov is None else krylov
    return invert(
        partial(_SafeNewton, krylov=krylov),
        "Newton's",
        g,
        y,
        lipschitz=lipschitz,
        tolerance=tolerance,
        max_steps=max_steps,
        throw=throw,
    )


def evaluations_per_step(dim: int) -> int:
    """Evaluations of ``g`` and of products with its Jacobian in one dense step."""
    return 1 + dim + len(LENGTHS) + 1


class _SafeNewton(AbstractIteration):
    """Least residual of damped Newton steps and the step of the fixed-point map."""

    rtol: float
    atol: float
    krylov: bool = eqx.field(static=True)
    norm: Callable[[Any], Float[Array, ""]] = optx.two_norm

    def step(self, fn, y, args, options, state, tags):
        del options, tags

        def image(x):
            return fn(x, args)[0]

        landed, derivative = jax.linearize(image, y)
        newton = self._solve(lambda v: v - derivative(v), y - landed)
        # the Banach step is the first, and stays where all others give no number
        lengths = jnp.array(LENGTHS, y.dtype).reshape(-1, *(1,) * y.ndim)
        tries = jnp.concatenate([landed[None], y - lengths * newton])
        images = jax.vmap(image)(tries)
        residuals = jax.vmap(self.norm)(tries - images)
        best = jnp.argmin(jnp.where(jnp.isfinite(residuals), residuals, jnp.inf))
        new, residual = tries[best], residuals[best]
        scale, apart = scale_of(new, args[1]), self.norm(new - y)
        clear = apart > CLEAR * jnp.finfo(y.dtype).eps * scale
        ratio = jnp.where(clear, self.norm(images[best] - landed) / apart, jnp.nan)
        rate = jnp.fmax(state.rate, ratio)
        return new, IterationState(residual, scale, rate), fn(new, args)[1]

    def _solve(self, matvec: Callable[[Array], Array], r: Array) -> Array:
        if not self.krylov:
            basis = jnp.eye(r.size, dtype=r.dtype).reshape(r.size, *r.shape)
            columns = jax.vmap(matvec)(basis).reshape(r.size, r.size)
            return jnp.linalg.solve(columns.T, r.ravel()).reshape(r.shape)
        eps = float(jnp.finfo(r.dtype).eps)
        solver = lx.GMRES(rtol=max(1e-6, FLOOR * eps), atol=FLOOR * eps)
        operator = lx.FunctionLinearOperator(matvec, jax.eval_shape(lambda: r))
        return lx.linear_solve(operator, r, solver, throw=False).value
