"""What the inverses of a residual map share: their result, their start and their stop.

Both solve ``x + g(x) = y``, as the fixed point of ``x <- y - g(x)``, and differ only in
the step that they take.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
import paramax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

# In units of eps * scale: a residual below FLOOR is as good as zero, one above CLEAR
# is known to 1 %; the rounding of x + g(x) - y counts _ROUNDING in the error bound.
FLOOR, CLEAR, _ROUNDING = 16, 200, 4


class BanachResult(eqx.Module):
    """What :func:`gauss_flows.banach_inverse` found, and how far it can be trusted.

    Attributes:
        x: The inverse, of the shape of ``y``. The only differentiable field.
        steps: Number of iterations taken.
        residual: ``||x + g(x) - y||`` at the returned ``x``.
        error_bound: A-posteriori bound on the distance from ``x`` to the exact inverse:
            the residual and its rounding, over ``1 - lipschitz``. Infinite where no
            Lipschitz bound was given: nothing is known then.
        rate: Largest ratio of successive residuals seen, a lower bound on the
            Lipschitz constant of ``g``; nan if fewer than two stood clear of rounding.
        converged: Whether the stopping rule was met, by ``x`` itself where no Lipschitz
            bound was given, and a declared bound not contradicted by ``rate``.
    """

    x: Float[Array, "..."]
    steps: Int[Array, ""]
    residual: Float[Array, ""]
    error_bound: Float[Array, ""]
    rate: Float[Array, ""]
    converged: Bool[Array, ""]


class IterationState(eqx.Module):
    """What a solver knows of its last iterate; ``rate`` is NaN until one is known."""

    residual: Float[Array, ""]
    scale: Float[Array, ""]
    rate: Float[Array, ""]


class AbstractIteration(optx.AbstractFixedPointSolver):
    """An iteration, but for its step, that stops at ``atol + rtol * scale``."""

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        """Nothing is known of the start."""
        del fn, args, options, f_struct, aux_struct, tags
        inf = jnp.array(jnp.inf, y.dtype)
        return IterationState(inf, jnp.ones_like(inf), jnp.full_like(inf, jnp.nan))

    def terminate(self, fn, y, args, options, state, tags):
        """Whether to stop."""
        del fn, y, args, options, tags
        limit = self.atol + self.rtol * state.scale
        return state.residual <= limit, optx.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        """The last iterate is the answer."""
        del fn, args, options, state, tags, result
        return y, aux, {}


def invert(
    iteration: Callable[[float, float], optx.AbstractFixedPointSolver],
    name: str,
    g: Callable[[Array], Array],
    y: Array,
    *,
    lipschitz: float | None,
    tolerance: float | None,
    max_steps: int | None,
    throw: bool,
) -> BanachResult:
    """Check what is asked for, iterate, and judge the answer.

    Args:
        iteration: Makes the solver from rtol and atol.
        name: What the iteration is called in errors.
        g: As for :func:`gauss_flows.banach_inverse`, as is all that follows.
        y: See there.
        lipschitz: See there.
        tolerance: See there.
        max_steps: See there.
        throw: See there.
    """
    if lipschitz is not None:
        lipschitz = check_lipschitz(lipschitz)
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ValueError(f"expected a positive, finite tolerance, got {tolerance}")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"expected max_steps of at least 1, got {max_steps}")
    g, y = paramax.unwrap(g), jnp.asarray(y)
    check_event(g, y)
    eps, gap = float(jnp.finfo(y.dtype).eps), _gap(lipschitz)
    if tolerance is None:
        solver = iteration(FLOOR * eps, 0.0)
    else:
        rounding = 0.0 if lipschitz is None else _ROUNDING * eps
        solver = iteration(-rounding, tolerance * gap)
    if max_steps is None:
        max_steps = _sufficient_steps(lipschitz, eps)
    # "highest", here and below: a GPU may round float32 products to 10 bits
    with jax.default_matmul_precision("highest"):
        solution = optx.fixed_point(
            _banach_step, solver, y, (g, y), max_steps=max_steps, throw=False
        )
        x, target = lax.stop_gradient((solution.value, y))
        residual = jnp.linalg.norm(jnp.ravel(x + lax.stop_gradient(g(x)) - target))
    result = _judge(solution, residual, eps * scale_of(x, target), lipschitz, tolerance)
    return _checked(result, lipschitz, name) if throw else result


def _judge(
    solution: optx.Solution,
    residual: Array,
    ulp: Array,
    lipschitz: float | None,
    tolerance: float | None,
) -> BanachResult:
    """How far the last iterate can be trusted; ``ulp`` is its rounding."""
    gap = _gap(lipschitz)
    error_bound = (residual + _ROUNDING * ulp) / gap
    rate = lax.stop_gradient(solution.state.rate)
    steps = jnp.asarray(solution.stats["num_steps"], jnp.int32)
    converged = solution.result == optx.RESULTS.successful
    if tolerance is None:
        # rounding of alternating sign keeps a cycle of size ulp / (1 - L) going; after
        # fewer steps than contract to rounding, what is left is something else
        eps = float(jnp.finfo(residual.dtype).eps)
        enough = lipschitz is None or steps >= _contracting_steps(lipschitz, eps)
        converged |= enough & (residual <= FLOOR * ulp / gap)
    if lipschitz is None:
        error_bound = jnp.full_like(residual, jnp.inf)
        # the last step may lead away again, if g is no contraction
        wanted = FLOOR * ulp if tolerance is None else tolerance
        converged &= residual <= wanted + ulp
    else:
        converged &= ~(rate > 1.05 * lipschitz)  # 5 % for the rounding of residuals
    return BanachResult(solution.value, steps, residual, error_bound, rate, converged)


def _gap(lipschitz: float | None) -> float:
    return 1.0 if lipschitz is None else 1.0 - lipschitz


def _banach_step(x, args):
    g, y = args
    return y - g(x)


def scale_of(x, y):
    """Size of the numbers at hand: rounding errors are relative to it."""
    x, y = (jnp.linalg.norm(jnp.ravel(a)) for a in (x, y))
    return jnp.maximum(1, jnp.maximum(x, y))


def _sufficient_steps(lipschitz: float | None, eps: float) -> int:
    """Steps that suffice, with some to spare; at most 100,000."""
    if lipschitz is None:
        return 1000
    return min(10 + _contracting_steps(lipschitz, eps), 100_000)


def _contracting_steps(lipschitz: float, eps: float) -> int:
    """Steps after which ``lipschitz ** k`` is below the rounding unit."""
    return math.ceil(math.log(eps) / math.log(max(lipschitz, eps)))


def check_lipschitz(lipschitz: float) -> float:
    if not 0 <= lipschitz < 1:
        raise ValueError(
            f"expected a contraction, a Lipschitz bound in [0, 1), got {lipschitz}"
        )
    return float(lipschitz)


def check_event(g, x, *, dtype: bool = True) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected an event of floating dtype, got {x.dtype}")
    image = jax.eval_shape(g, x)
    moved = jax.eval_shape(jnp.add, x, image)
    if image.shape != x.shape or (dtype and moved.dtype != x.dtype):
        raise ValueError(
            f"expected g to keep shape {x.shape} and {x.dtype}, "
            f"got {image.shape} and {moved.dtype}"
        )


def _checked(result: BanachResult, lipschitz: float | None, name: str) -> BanachResult:
    """The result, if it converged; else an error with all that is known."""
    declared = "none" if lipschitz is None else f"{lipschitz:g}"
    expected = f"expected {name} iteration to converge (declared bound: {declared}), "
    if isinstance(result.converged, Tracer):
        return eqx.error_if(
            result,
            ~result.converged,
            f"{expected}got otherwise; the inverse with throw=False returns the "
            "residual, the steps and the rate",
        )
    if not result.converged:
        raise RuntimeError(
            f"{expected}got a residual of {float(result.residual):.3g} after "
            f"{int(result.steps)} steps; the Lipschitz constant that its steps showed "
            f"is at least {float(result.rate):.3g}"
        )
    return result
