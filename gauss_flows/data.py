r"""Target laws to train on: a few shapes in the plane, modes on a sphere, digits.

Each target is a function ``name(key, n)`` that draws ``n`` independent rows, shape
``(n, dim)``, in JAX's default float dtype (float64 under ``jax_enable_x64``). Its
docstring gives the law; where the entropy is known it is given too, in nats: no model
can reach a higher mean log-density on fresh data than minus the entropy.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from .pictures import handwritten

_TURNS = 2.5  # angle of the spiral, in radians per unit of t
_START, _END = 0.5, 3.5  # range of t
_NOISE = 0.08


def two_moons(key: PRNGKeyArray, n: int, *, noise: float = 0.05) -> Float[Array, "n 2"]:
    r"""Two interleaving half circles.

    With :math:`\theta` uniform on :math:`(0, \pi)`, half of the rows are
    :math:`(\cos\theta, \sin\theta)`, half :math:`(1 - \cos\theta, 1/2 - \sin\theta)`,
    plus normal noise of standard deviation ``noise``.

    Raises:
        ValueError: ``n`` is below 1, or ``noise`` is not positive.
    """
    _check.at_least_one(n=n)
    _check.positive(noise=noise)
    k_angle, k_moon, k_noise = jr.split(key, 3)
    angle = jr.uniform(k_angle, (n,), maxval=math.pi)
    lower = jr.bernoulli(k_moon, shape=(n, 1))
    upper_moon = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    lower_moon = jnp.array([1.0, 0.5]) - upper_moon
    return jnp.where(lower, lower_moon, upper_moon) + noise * jr.normal(k_noise, (n, 2))


def four_gaussians(
    key: PRNGKeyArray, n: int, *, radius: float = 2.0, sd: float = 0.25
) -> Float[Array, "n 2"]:
    r"""Four normal blobs at :math:`(\pm r, 0)` and :math:`(0, \pm r)`, equally likely.

    Entropy :math:`\log 4 + 1 + \log(2\pi\,\mathrm{sd}^2)` as long as the blobs do not
    touch; 1.4516 by default.

    Raises:
        ValueError: ``n`` is below 1, or ``radius`` or ``sd`` is not positive.
    """
    _check.at_least_one(n=n)
    _check.positive(radius=radius, sd=sd)
    k_mode, k_noise = jr.split(key)
    centres = radius * jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    return centres[jr.randint(k_mode, (n,), 0, 4)] + sd * jr.normal(k_noise, (n, 2))


def swiss_roll(key: PRNGKeyArray, n: int, *, noise: float = 0.1) -> Float[Array, "n 2"]:
    r"""A spiral of one arm, the Swiss roll seen from its end.

    :math:`t\,(\cos t, \sin t) / 5` with :math:`t` uniform on
    :math:`(3\pi/2, 9\pi/2)`, plus normal noise of standard deviation ``noise``.

    Raises:
        ValueError: ``n`` is below 1, or ``noise`` is not positive.
    """
    _check.at_least_one(n=n)
    _check.positive(noise=noise)
    k_t, k_noise = jr.split(key)
    t = jr.uniform(k_t, (n, 1), minval=1.5 * math.pi, maxval=4.5 * math.pi)
    curve = t * jnp.concatenate([jnp.cos(t), jnp.sin(t)], axis=1) / 5
    return curve + noise * jr.normal(k_noise, (n, 2))


def sphere_modes(
    key: PRNGKeyArray, n: int, *, dim: int = 16, modes: int = 32, seed: int = 0
) -> Float[Array, "n dim"]:
    r"""Equally likely normal modes, centred at random points of the unit sphere.

    Each mode has standard deviation :math:`0.1/\sqrt{\mathrm{dim}}` in every
    coordinate, so that its rows lie about 0.1 from its centre. The centres depend on
    ``seed`` only, not on ``key``. While the modes do not touch the entropy is
    :math:`\log\mathrm{modes} + \tfrac{\mathrm{dim}}{2}\log(2\pi e\,0.01/\mathrm{dim})`.

    Raises:
        ValueError: ``n`` or ``modes`` is below 1, or ``dim`` below 2.
    """
    _check.at_least_one(n=n, modes=modes, dim=dim)
    if dim < 2:
        raise ValueError(f"expected dim >= 2, got {dim}")
    centres = jr.normal(jr.key(seed), (modes, dim))
    centres = centres / jnp.linalg.norm(centres, axis=1, keepdims=True)
    k_mode, k_noise = jr.split(key)
    noise = 0.1 / math.sqrt(dim) * jr.normal(k_noise, (n, dim))
    return centres[jr.randint(k_mode, (n,), 0, modes)] + noise


def digits(key: PRNGKeyArray, n: int) -> Float[Array, "n 64"]:
    """Handwritten digits of 8 by 8 pixels, dequantised: rows in (0, 1).

    A random choice, without replacement, of scikit-learn's 1,797 pictures. Grey levels
    v = 0, ..., 16 become (v + u) / 17 with u uniform on (0, 1), so that a density
    exists. Divide minus the log-density by 64 log 2 for bits per dimension, and add
    log2 17 for those of the grey levels. The entropy is not known. See
    :func:`gauss_flows.pictures.digits` for the grey levels themselves, with a fixed
    split.

    Raises:
        ValueError: ``n`` is below 1 or above 1,797.
    """
    _check.at_least_one(n=n)
    pictures = handwritten()[0].reshape(-1, 64)
    if n > len(pictures):
        raise ValueError(f"expected n <= {len(pictures)} pictures, got {n}")
    k_choice, k_noise = jr.split(key)
    chosen = jr.choice(k_choice, jnp.asarray(pictures), (n,), replace=False)
    return (chosen + jr.uniform(k_noise, chosen.shape)) / 17


def spiral(key: PRNGKeyArray, n: int) -> Float[Array, "n 2"]:
    r"""The two-arm spiral, with mean 0 and variance 1 in each coordinate.

    :math:`\pm\,(t\cos 2.5t,\ t\sin 2.5t) + 0.08\,\varepsilon` with either sign equally
    likely, :math:`t` uniform on (0.5, 3.5) and :math:`\varepsilon` standard normal,
    divided by the standard deviations of that law (not of the sample), 1.4134 and
    1.6628. The density is known: :func:`spiral_log_density`. Entropy 1.3813.

    Raises:
        ValueError: ``n`` is below 1.
    """
    _check.at_least_one(n=n)
    k_t, k_arm, k_noise = jr.split(key, 3)
    t = jr.uniform(k_t, (n,), minval=_START, maxval=_END)
    arm = jr.rademacher(k_arm, (n, 1)).astype(t.dtype)
    curve = t[:, None] * jnp.stack([jnp.cos(_TURNS * t), jnp.sin(_TURNS * t)], axis=1)
    return (arm * curve + _NOISE * jr.normal(k_noise, (n, 2))) / _spiral_scale()


def source_spiral(
    n: int = 3000, *, seed: int = 0, standardized: bool = True
) -> Float[Array, "n 2"]:
    """The sample of the two-arm spiral that the depth chapter's source trains on.

    Drawn by NumPy in float64 and standardised by its own mean and standard deviation.

    Args:
        n: Number of rows.
        seed: Seed of NumPy's generator.
        standardized: Whether to standardise the sample.

    Raises:
        ValueError: ``n`` is below 1, or below 2 with ``standardized``.
    """
    _check.at_least_one(n=n)
    if standardized and n < 2:
        raise ValueError(f"expected at least 2 rows to standardise, got {n}")
    rng = np.random.default_rng(seed)
    t = rng.uniform(_START, _END, n)
    arm = rng.integers(0, 2, n) * 2 - 1
    noise = rng.standard_normal((n, 2))
    curve = t[:, None] * np.stack([np.cos(_TURNS * t), np.sin(_TURNS * t)], axis=1)
    x = arm[:, None] * curve + _NOISE * noise
    if standardized:
        x = (x - x.mean(axis=0)) / x.std(axis=0)
    return jnp.asarray(x)


def spiral_log_density(
    x: Float[Array, "n 2"],
    *,
    mean: Float[Array, " 2"] | None = None,
    scale: Float[Array, " 2"] | None = None,
) -> Float[Array, " n"]:
    r"""Exact log-density of the two-arm spiral, in nats, by quadrature over the arms.

    The law is a mixture of normals of standard deviation 0.08 centred along both arms;
    the integral over :math:`t` is done by Gauss-Legendre quadrature to rounding error.

    Args:
        x: Points, in units of the standardised spiral, shape (n, 2).
        mean: What was taken from the raw points, shape (2,); by default 0.
        scale: What they were divided by, shape (2,); by default the law's own standard
            deviations, as in :func:`spiral`.

    Returns:
        The log-density of the standardised law at each point, shape (n,).
    """
    mean = jnp.zeros(2, x.dtype) if mean is None else mean
    scale = jnp.asarray(_spiral_scale() if scale is None else scale, x.dtype)
    t, weights = _quadrature()
    arm = np.stack([t * np.cos(_TURNS * t), t * np.sin(_TURNS * t)], axis=1)
    centres = jnp.asarray(np.concatenate([arm, -arm]), x.dtype)
    # both arms, t uniform, and the normalisation of a normal in the plane
    factor = weights / (2 * (_END - _START) * 2 * math.pi * _NOISE**2)
    log_weights = jnp.asarray(np.log(np.concatenate([factor, factor])), x.dtype)

    def one(point):
        square = (((point * scale + mean) - centres) ** 2).sum(axis=1)
        return jax.nn.logsumexp(log_weights - square / (2 * _NOISE**2))

    return jax.lax.map(one, x, batch_size=512) + jnp.log(scale).sum()


@lru_cache
def _quadrature(panels: int = 200, order: int = 8):
    """Nodes and weights on the range of t; panels are shorter than the noise."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    edges = np.linspace(_START, _END, panels + 1)
    half = (edges[1:] - edges[:-1])[:, None] / 2
    middle = (edges[1:] + edges[:-1])[:, None] / 2
    return (middle + half * nodes).ravel(), (half * weights).ravel()


@lru_cache
def _spiral_scale():
    """Standard deviation of each coordinate of the raw spiral, as a NumPy array."""
    t, weights = _quadrature()
    squares = np.stack([(t * np.cos(_TURNS * t)) ** 2, (t * np.sin(_TURNS * t)) ** 2])
    return np.sqrt(squares @ weights / (_END - _START) + _NOISE**2)


TARGETS: dict[str, Callable[..., Array]] = {
    "two_moons": two_moons,
    "four_gaussians": four_gaussians,
    "swiss_roll": swiss_roll,
    "sphere_modes": sphere_modes,
    "digits": digits,
    "spiral": spiral,
}
"""Targets by name."""


def make(name: str, key: PRNGKeyArray, n: int) -> Float[Array, "n dim"]:
    """Draw from the target of that name.

    Raises:
        ValueError: There is no such target; or ``n`` is out of its range.
    """
    if name not in TARGETS:
        raise ValueError(f"expected a target in {sorted(TARGETS)}, got {name!r}")
    return TARGETS[name](key, n)


def standardize(
    x: Float[Array, "n dim"], *, like: Float[Array, "m dim"] | None = None
) -> Float[Array, "n dim"]:
    """Give each coordinate mean 0 and variance 1 over the rows.

    Args:
        x: Rows, shape (n, dim).
        like: Rows whose mean and standard deviation are used in place of those of
            ``x``: give the training rows when standardising held-out ones.

    Raises:
        ValueError: A coordinate is constant.
    """
    like = x if like is None else like
    scale = like.std(axis=0)
    # the mean of a constant is rounded, so that its deviation need not be 0
    varies = np.asarray((like.max(axis=0) > like.min(axis=0)) & (scale > 0))
    if not varies.all():
        constant = np.flatnonzero(~varies).tolist()
        raise ValueError(f"expected every coordinate to vary, got constant {constant}")
    return (x - like.mean(axis=0)) / scale


def split(
    key: PRNGKeyArray, x: Float[Array, "n dim"], fraction: float = 0.25
) -> tuple[Float[Array, "n_train dim"], Float[Array, "n_held_out dim"]]:
    """Split rows at random into training and held-out rows.

    Args:
        key: Random key of the shuffle.
        x: Rows, shape (n, dim).
        fraction: Part to hold out, in (0, 1); rounded to whole rows.

    Returns:
        Training rows and held-out rows; together they are the rows of ``x``.

    Raises:
        ValueError: One of the two parts would be empty.
    """
    held_out = round(len(x) * fraction) if math.isfinite(fraction) else 0
    if not 0 < held_out < len(x):
        raise ValueError(
            "expected a fraction that leaves rows in both parts, got "
            f"{fraction} of {len(x)} rows"
        )
    x = jr.permutation(key, x)
    return x[held_out:], x[:held_out]
