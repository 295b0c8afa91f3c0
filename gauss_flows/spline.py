r"""The monotone rational-quadratic spline, without gathers.

Durkan et al. (2019), "Neural Spline Flows", equations 4 to 8. On ``[-B, B]`` the map
is a rational quadratic on each of ``n_knots + 1`` bins; outside it is the identity.

The usual code looks up the bin of ``x`` with a search and six gathers, whose backward
pass scatters. Here the bin is found by comparing ``x`` with all interior knots and
every quantity of the bin is a masked sum over bins: a handful of bins is cheaper to
sum than to index, on CPU and GPU alike, and the backward pass is a masked sum too.

A coordinate's parameters are one vector of length :func:`n_parameters`: raw bin widths,
raw bin heights and raw slopes at the knots, in this order. At zero the spline is the
identity. The parametrisation is that of ``flowjax.bijections.RationalQuadraticSpline``,
whose slopes at ``-B`` and ``B`` are free too: the map is continuous there, its
derivative in general is not.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MIN_WIDTH = 1e-3
"""Smallest width and height of a bin, in units of the interval's coordinate."""

MIN_SLOPE = 1e-3
"""Smallest derivative at a knot."""

_RAW_UNIT_SLOPE = math.log(math.expm1(1 - MIN_SLOPE))


def n_parameters(n_knots: int) -> int:
    """Length of a coordinate's parameter vector for ``n_knots`` interior knots.

    >>> n_parameters(8)
    28
    """
    n_bins = n_knots + 1
    return 3 * n_bins + 1


def forward(
    x: Float[Array, "*n"], theta: Float[Array, "*n p"], interval: float
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Apply the spline coordinate by coordinate.

    Args:
        x: Points, of any shape.
        theta: Parameters of each point's spline on the last axis.
        interval: The spline acts on ``[-interval, interval]``.

    Returns:
        The transformed points and the logarithm of the derivative at each. Outside the
        interval these are ``x`` and 0, and every derivative of both is finite.
    """
    widths, heights, raw_slopes = _bins(theta, interval)
    inside = jnp.abs(x) <= interval
    clipped = _clip(x, -interval, interval)
    passed = _passed(clipped, widths, interval)
    left, width, bottom, height, slope_left, slope_right = _pick(
        passed, widths, heights, raw_slopes, interval
    )
    mean_slope = height / width
    xi = _clip((clipped - left) / width, 0.0, 1.0)
    denominator = _denominator(xi, mean_slope, slope_left, slope_right)
    risen = (mean_slope * xi**2 + slope_left * xi * (1 - xi)) / denominator
    y = _clip(bottom + height * risen, -interval, interval)
    log_slope = _log_derivative(xi, mean_slope, slope_left, slope_right)
    return jnp.where(inside, y, x), jnp.where(inside, log_slope, 0.0)


def inverse(
    y: Float[Array, "*n"], theta: Float[Array, "*n p"], interval: float
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Invert the spline coordinate by coordinate, in closed form.

    Args:
        y: Points, of any shape.
        theta: Parameters of each point's spline on the last axis.
        interval: The spline acts on ``[-interval, interval]``.

    Returns:
        The preimages and the logarithm of the derivative **of the inverse** at each.
    """
    widths, heights, raw_slopes = _bins(theta, interval)
    inside = jnp.abs(y) <= interval
    clipped = _clip(y, -interval, interval)
    passed = _passed(clipped, heights, interval)
    left, width, bottom, height, slope_left, slope_right = _pick(
        passed, widths, heights, raw_slopes, interval
    )
    mean_slope = height / width
    # the edge of a bin is a sum, so rounding can put a point just outside its bin
    risen = _clip((clipped - bottom) / height, 0.0, 1.0)
    xi = _solve(risen, mean_slope, slope_left, slope_right)
    x = _clip(left + xi * width, -interval, interval)
    log_slope = _log_derivative(xi, mean_slope, slope_left, slope_right)
    return jnp.where(inside, x, y), jnp.where(inside, -log_slope, 0.0)


def _bins(
    theta: Float[Array, "*n p"], interval: float
) -> tuple[Float[Array, "*n k"], Float[Array, "*n k"], Float[Array, "*n k_plus_1"]]:
    """Bin widths, bin heights and raw knot slopes."""
    n_bins = (theta.shape[-1] - 1) // 3
    free = 2 * interval - MIN_WIDTH * n_bins
    widths = MIN_WIDTH + free * jax.nn.softmax(theta[..., :n_bins])
    heights = MIN_WIDTH + free * jax.nn.softmax(theta[..., n_bins : 2 * n_bins])
    return widths, heights, theta[..., 2 * n_bins :]


def _passed(
    x: Float[Array, "*n"], sizes: Float[Array, "*n k"], interval: float
) -> Bool[Array, "*n k_minus_1"]:
    """Which interior knots lie to the left of ``x``: all up to its bin, none after."""
    return x[..., None] > jnp.cumsum(sizes[..., :-1], axis=-1) - interval


def _pick(
    passed: Bool[Array, "*n k_minus_1"],
    widths: Float[Array, "*n k"],
    heights: Float[Array, "*n k"],
    raw_slopes: Float[Array, "*n k_plus_1"],
    interval: float,
) -> tuple[Float[Array, "*n"], ...]:
    """Left edge, width, bottom edge, height and both slopes of the bin of a point."""
    edge = jnp.ones_like(passed[..., :1])
    # bins whose right end is passed; and the one whose left end alone is
    before = jnp.concatenate([passed, ~edge], axis=-1)
    chosen = jnp.concatenate([edge, passed], axis=-1) & ~before

    def total(mask: Bool[Array, "*n k"], values: Float[Array, "*n k"]) -> Array:
        return jnp.sum(jnp.where(mask, values, 0.0), axis=-1)

    return (
        total(before, widths) - interval,
        total(chosen, widths),
        total(before, heights) - interval,
        total(chosen, heights),
        _slope(total(chosen, raw_slopes[..., :-1])),
        _slope(total(chosen, raw_slopes[..., 1:])),
    )


def _clip(x: Float[Array, "*n"], low: float, high: float) -> Float[Array, "*n"]:
    """Clip, with derivative 1 on both ends, where ``jnp.clip`` has one half."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _slope(raw: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return MIN_SLOPE + jax.nn.softplus(raw + _RAW_UNIT_SLOPE)


def _denominator(
    xi: Float[Array, "*n"],
    mean_slope: Float[Array, "*n"],
    slope_left: Float[Array, "*n"],
    slope_right: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Denominator of equation 4 of Durkan et al.; at least half of the mean slope."""
    return mean_slope + (slope_right + slope_left - 2 * mean_slope) * xi * (1 - xi)


def _solve(
    u: Float[Array, "*n"],
    mean_slope: Float[Array, "*n"],
    slope_left: Float[Array, "*n"],
    slope_right: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    r"""Where in its bin the spline has risen by the fraction ``u`` of the bin's height.

    The root in [0, 1] of the quadratic of equations 6 to 8 of Durkan et al. Their
    coefficients cancel in steep bins, down to a negative discriminant. With
    :math:`p = d_l (1 - u)` and :math:`q = d_r u` for the slopes at the two ends and
    :math:`s` for the mean slope the root is

    .. math:: \xi = \frac{2 s u}{2 s u + t}, \qquad
        t = p - q + \sqrt{(p - q)^2 + 4 s^2 u (1 - u)},

    in which nothing but :math:`p - q` can be negative; where it is, the equal
    :math:`t = 4 s^2 u (1 - u) / (q - p + \sqrt{\dots})` avoids the cancellation.
    """
    tilt = slope_left * (1 - u) - slope_right * u
    product = 4 * mean_slope**2 * u * (1 - u)
    rises = tilt >= 0
    far_root = jnp.where(rises, tilt, -tilt) + jnp.sqrt(tilt**2 + product)
    t = jnp.where(rises, far_root, product / far_root)
    twice = 2 * mean_slope * u
    return twice / (twice + t)


def _log_derivative(
    xi: Float[Array, "*n"],
    mean_slope: Float[Array, "*n"],
    slope_left: Float[Array, "*n"],
    slope_right: Float[Array, "*n"],
) -> Float[Array, "*n"]:
    """Equation 5 of Durkan et al."""
    numerator = (
        slope_right * xi**2
        + 2 * mean_slope * xi * (1 - xi)
        + slope_left * (1 - xi) ** 2
    )
    denominator = _denominator(xi, mean_slope, slope_left, slope_right)
    return jnp.log(numerator) + 2 * jnp.log(mean_slope / denominator)
