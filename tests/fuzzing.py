"""What property tests share: outcomes that are counted, draws, and judges of answers.

A case is a point with parameters of its own. Many share one compiled program, and each
is judged by itself: its outcome is a right answer, a documented error or limit, or
neither, which fails the test.
"""

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings, strategies as st

import gauss_flows as gf
from gauss_flows.transformers import AbstractMixture, Affine, RQSpline

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"

OUTCOMES: dict[str, Counter[str]] = defaultdict(Counter)
"""How many cases of what came out how."""

SLACK = 64.0
"""Roundings of a value that are admitted; each has some tens of operations."""

_HALF = [4.0**-k for k in range(5)]
SCALES = [*(-s for s in _HALF), 0.0, *reversed(_HALF)]
"""Where to look between a point's neighbours, from the lower to the upper one."""

seeds = st.integers(0, 2**32 - 1)
dtypes = ["float32", "float64"]


def examples(short: int, long: int) -> Callable:
    """How many examples a test tries in the short profile and in the long one."""
    return settings(
        max_examples=long if LONG else short, suppress_health_check=list(HealthCheck)
    )


def judge(what: str, right: Any, *, limit: Any = False, **shown: Any) -> None:
    """Count the cases, and fail if one is neither right nor beyond a stated limit."""
    right, limit = np.broadcast_arrays(right, limit)
    bad = np.argwhere(~(right | limit))
    OUTCOMES[what]["right"] += int(right.sum())
    OUTCOMES[what]["documented"] += int((limit & ~right).sum())
    OUTCOMES[what]["undocumented"] += len(bad)
    if len(bad):
        index = tuple(bad[0])
        first = {name: np.asarray(value)[index] for name, value in shown.items()}
        raise AssertionError(f"{len(bad)} of {right.size} cases of {what}: {first}")


def outcome(what: str, call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What a call returns; None where it raises an error that says what it expected."""
    try:
        result = call()
    except errors as error:
        if "expected" not in str(error):
            OUTCOMES[what]["undocumented"] += 1
            raise
        OUTCOMES[what]["documented"] += 1
        return None
    except Exception:
        OUTCOMES[what]["undocumented"] += 1
        raise
    OUTCOMES[what]["right"] += 1
    return result


def spread(rng: np.random.Generator, shape: tuple, low: float, high: float) -> Any:
    """Normal numbers of every size from ``10**low`` to ``10**high``."""
    return rng.normal(size=shape) * 10 ** rng.uniform(low, high, shape)


def parameters(
    rng: np.random.Generator, tree: Any, n: int, low: float, high: float
) -> Any:
    """``n`` trees whose arrays are drawn anew, at ``10**low`` to ``10**high`` times."""
    size = 10 ** rng.uniform(low, high, n)

    def draw(leaf):
        drawn = rng.uniform(-1, 1, (n, *leaf.shape))
        unit = float(np.abs(leaf).max()) or 1.0
        return (unit * drawn * size.reshape(-1, *(1,) * leaf.ndim)).astype(leaf.dtype)

    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return jax.tree.map(draw, arrays), rest


def offset(transformer: Any, theta: Any) -> Any:
    """The size of numbers inside a transformer: rounding is relative to it."""
    match transformer:
        case RQSpline():
            return jnp.full(theta.shape[1:], transformer.interval, theta.dtype)
        case AbstractMixture():
            return jnp.abs(transformer.split(theta)[1]).max(axis=0) + 2
    return jnp.abs(theta[0]) + 1


def promised(transformer: Any, theta: Any) -> Any:
    """Where a transformer's docstring promises finite answers."""
    single = theta.dtype == jnp.float32
    if isinstance(transformer, AbstractMixture):
        return offset(transformer, theta) < (1e14 if single else 1e150)
    if isinstance(transformer, Affine) and transformer.log_scale_bound is None:
        return jnp.abs(theta[1]) < (30 if single else 300)
    return jnp.ones(theta.shape[1:], bool)


def resolved(transformer: Any, theta: Any, rounding: Any) -> Any:
    """Where its parameters, rounded so far, are said to give exact log-determinants."""
    single = theta.dtype == jnp.float32
    fine = (rounding < 0.1).all(axis=0)
    if isinstance(transformer, RQSpline):
        slopes = transformer.split(theta)[2].max(axis=0)
        narrow = transformer.interval <= 100 or not single
        return fine & narrow & (slopes < (1e3 if single else 1e11))
    return fine | ~jnp.array(isinstance(transformer, AbstractMixture))


def steep(transformer: Any, theta: Any, x: Any) -> Any:
    """Where a mixture is so flat, or steep, that gradients of its inverse overflow."""
    if not isinstance(transformer, AbstractMixture):
        return jnp.zeros(theta.shape[1:], bool)
    parts = transformer.split(theta)
    log_slopes = transformer.forward(x, *parts)[1], transformer.inverse(x, *parts)[1]
    limit = 40 if theta.dtype == jnp.float32 else 350
    return jnp.maximum(*map(jnp.abs, log_slopes)) > limit


def unmoved(x: Any) -> tuple[Any, Any]:
    """What rounding of the numbers of a map does to it, where they are exact."""
    return jnp.zeros_like(x), jnp.zeros((), x.dtype)


def both_ways(
    forward: Callable,
    inverse: Callable,
    x: Any,
    size: Any,
    active: Any,
    moved: Callable = unmoved,
) -> dict[str, Any]:
    """Map a point forward and back, and undo it as if it were an image.

    An increasing map is undone rightly, however steep it is, if a point just above the
    answer has an image above, and one just below has one below, where "just" is the
    rounding of the numbers at hand. The inverse's log-determinant has to be one that
    the map takes on between these points, which are looked at on all scales, as a bin
    may be narrow; at the point itself ``room`` is admitted. ``moved`` says how far
    rounding of the map's own numbers moves an image and a log-determinant.
    """
    eps = SLACK * jnp.finfo(x.dtype).eps
    (y, log_det), (stretch, _) = jax.jvp(forward, (x,), (active * jnp.ones_like(x),))
    images = jnp.stack([y, x])
    found, inverse_log_det = jax.vmap(inverse)(images)
    moved_image, moved_log_det = jax.vmap(moved)(found)
    dx = active * eps * (jnp.abs(x) + jnp.abs(found) + size)
    dy = eps * (jnp.abs(images) + size + jnp.abs(stretch) * (jnp.abs(x) + size))
    dy += moved_image
    near = jnp.stack([found + scale * dx for scale in SCALES])
    values, log_dets = jax.vmap(jax.vmap(forward))(near)
    low, high = log_dets.min(axis=0), log_dets.max(axis=0)
    room = eps * (10 + jnp.abs(inverse_log_det)) * x.size + (high - low)
    room += moved_log_det
    undone = (values[0] <= images + dy) & (values[-1] >= images - dy)
    same = (-inverse_log_det >= low - room) & (-inverse_log_det <= high + room)
    numbers = jax.tree.leaves((y, log_det, found, inverse_log_det))
    return {
        "x": x,
        "y": y,
        "log_det": log_det,
        "slope": stretch,
        "back": found[0],
        "preimage": found[1],
        "inverse_log_det": inverse_log_det[0],
        "undone": undone.all(),
        "same": same.all(),
        "room": room[0],
        "kept": (jnp.where(active, 0.0, jnp.stack([y, found[1]]) - x) == 0).all(),
        "finite": jnp.stack([jnp.isfinite(a).all() for a in numbers]).all(),
    }


def finite_slopes(function: Callable, *arguments: Any) -> Any:
    """Whether all derivatives of a sum of outputs are finite."""

    def total(arguments):
        y, log_det = function(*arguments)
        return y.sum() + log_det

    slopes = jax.tree.leaves(eqx.filter_grad(total)(arguments))
    return functools.reduce(jnp.logical_and, [jnp.isfinite(s).all() for s in slopes])


def points(rng: np.random.Generator, shape: tuple, special: list[float]) -> Any:
    """Points of every size up to a few 1e6; one entry in eight is a special one."""
    x = np.clip(spread(rng, shape, -6, 6), -4e6, 4e6)
    chosen = rng.choice([*special, 0.0, -0.0, 1e6, -1e6], shape)
    return np.where(rng.random(shape) < 1 / 8, chosen, x)


TRANSFORMERS = {
    "additive": gf.transformers.Additive(),
    "affine, bounded": gf.transformers.Affine(2.0),
    "affine": gf.transformers.Affine(),
    "spline": gf.transformers.RQSpline(),
    "mixture": gf.transformers.MixtureCDF(3),
    "sigmoid": gf.transformers.DeepSigmoid(3),
    # the others in the long run only
    "affine, bound of 20": gf.transformers.Affine(20.0),
    "spline, one knot": gf.transformers.RQSpline(1, 1.0),
    "spline, many knots": gf.transformers.RQSpline(32, 10.0),
    "spline, hardly room": gf.transformers.RQSpline(8, 0.0046),
    "spline, wide": gf.transformers.RQSpline(4, 1000.0),
    "mixture, one": gf.transformers.MixtureCDF(1),
    "mixture, eight": gf.transformers.MixtureCDF(8),
    "sigmoid, one": gf.transformers.DeepSigmoid(1),
    "sigmoid, eight": gf.transformers.DeepSigmoid(8),
}
