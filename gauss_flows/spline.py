r"""The monotone rational-quadratic spline, without gathers.

Durkan et al. (2019), "Neural Spline Flows", equations 4 to 8. On ``[-B, B]`` the map
is a rational quadratic on each of ``n_knots + 1`` bins; outside it is the identity.

The usual code looks up the bin of ``x`` with a search and six gathers, whose backward
pass scatters. Here the bin is found by comparing ``x`` with all interior knots and
every quantity of the bin is a masked sum over bins: a handful of bins is cheaper to
sum than to index, on CPU and GPU alike, and the backward pass is one pass over bins.
Parameters lie on the *first* axis, so that these sums run along many points at once.

A point's parameters are raw bin widths, raw bin heights and raw slopes at the knots, in
this order, :func:`n_parameters` in all. At zero the spline is the identity. The
parametrisation is that of ``flowjax.bijections.RationalQuadraticSpline``, whose slopes
at ``-B`` and ``B`` are free too: the map is continuous there, its derivative in general
is not.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from paramax.utils import inv_softplus

MIN_WIDTH = 1e-3
"""Smallest width and height of a bin, in units of the interval's coordinate."""

MIN_SLOPE = 1e-3
"""Smallest derivative at a knot."""

_again = functools.partial(jax.checkpoint, prevent_cse=False)  # as stacks are scans
"""The same function, computed once more for the backward pass instead of stored.

Some forty intermediate results take longer to write and read than to compute.
"""

_RAW_UNIT_SLOPE = math.log(math.expm1(1 - MIN_SLOPE))


def n_parameters(n_knots: int) -> int:
    """Number of parameters of a spline with ``n_knots`` interior knots.

    >>> n_parameters(8)
    28
    """
    return sum(sizes(n_knots))


def sizes(n_knots: int) -> tuple[int, int, int]:
    """How many of them are raw widths, raw heights and raw slopes."""
    return n_knots + 1, n_knots + 1, n_knots + 2


def split(theta: Float[Array, "p *n"]) -> tuple[Array, Array, Array]:
    """Raw widths, raw heights and raw slopes, of all parameters in one array."""
    n_bins = len(theta) // 3
    return theta[:n_bins], theta[n_bins : 2 * n_bins], theta[2 * n_bins :]


def forward(
    x: Float[Array, "*n"],
    raw_widths: Float[Array, "k *#n"],
    raw_heights: Float[Array, "k *#n"],
    raw_slopes: Float[Array, "k_plus_1 *#n"],
    interval: float,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Apply the spline point by point.

    Args:
        x: Points, of any shape.
        raw_widths: Raw widths of each point's bins on the first axis.
        raw_heights: Raw heights of the bins.
        raw_slopes: Raw slopes at all knots, both ends among them.
        interval: The spline acts on ``[-interval, interval]``.

    Returns:
        The transformed points and the logarithm of the derivative at each. Outside the
        interval these are ``x`` and 0, and every derivative of both is finite.
    """
    with jax.named_scope("spline"):  # so that profiles name it
        *box, left, right = _bin(interval, 0, x, raw_widths, raw_heights, raw_slopes)
        formula = functools.partial(_forward, interval=interval)
        return _again(formula)(x, *box, _slope(left), _slope(right))


def _forward(x, left, width, bottom, height, slope_left, slope_right, *, interval):
    outside = jnp.abs(x) > interval  # NaN is not, and comes out as NaN
    clipped = _clip(x, -interval, interval)
    mean_slope = height / width
    xi = _within((clipped - left) / width, 0.0, 1.0)
    denominator = _denominator(xi, mean_slope, slope_left, slope_right)
    risen = (mean_slope * xi**2 + slope_left * xi * (1 - xi)) / denominator
    y = _within(bottom + height * risen, -interval, interval)
    log_slope = _log_derivative(xi, mean_slope, slope_left, slope_right)
    return jnp.where(outside, x, y), jnp.where(outside, 0.0, log_slope)


def inverse(
    y: Float[Array, "*n"],
    raw_widths: Float[Array, "k *#n"],
    raw_heights: Float[Array, "k *#n"],
    raw_slopes: Float[Array, "k_plus_1 *#n"],
    interval: float,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Invert the spline point by point, in closed form.

    Args:
        y: Points, of any shape.
        raw_widths: Raw widths of each point's bins on the first axis.
        raw_heights: Raw heights of the bins.
        raw_slopes: Raw slopes at all knots, both ends among them.
        interval: The spline acts on ``[-interval, interval]``.

    Returns:
        The preimages and the logarithm of the derivative **of the inverse** at each.
    """
    with jax.named_scope("spline"):
        *box, left, right = _bin(interval, 1, y, raw_widths, raw_heights, raw_slopes)
        formula = functools.partial(_inverse, interval=interval)
        return _again(formula)(y, *box, _slope(left), _slope(right))


def _inverse(y, left, width, bottom, height, slope_left, slope_right, *, interval):
    outside = jnp.abs(y) > interval  # NaN is not, and comes out as NaN
    clipped = _clip(y, -interval, interval)
    mean_slope = height / width
    risen = _within((clipped - bottom) / height, 0.0, 1.0)
    xi = _solve(risen, mean_slope, slope_left, slope_right)
    x = _within(left + xi * width, -interval, interval)
    log_slope = _log_derivative(xi, mean_slope, slope_left, slope_right)
    return jnp.where(outside, y, x), jnp.where(outside, 0.0, -log_slope)


def from_knots(
    x: Float[Array, "k *#n"],
    y: Float[Array, "k *#n"],
    slopes: Float[Array, "k_plus_2 *n"],
    interval: float,
) -> Float[Array, "p *n"]:
    """Parameters of the spline through given knots; :func:`split` takes them apart.

    Where a bin is narrower than :data:`MIN_WIDTH`, as where two knots coincide or one
    lies outside the interval, it gets nearly that width at the others' cost; where a
    slope is below :data:`MIN_SLOPE` it gets nearly that.

    Args:
        x: Interior knots in increasing order on the first axis.
        y: Where the spline takes them, in increasing order.
        slopes: Derivatives at ``-interval``, at the knots and at ``interval``.
        interval: The spline acts on ``[-interval, interval]``.

    Returns:
        The parameters, ``n_parameters(k)`` on the first axis; zeros for equally spaced
        knots on the diagonal with slopes 1.
    """

    def raw_sizes(knots: Float[Array, "k *#n"]) -> Float[Array, "k_plus_1 *#n"]:
        end = jnp.full_like(knots[:1], interval)
        sizes = jnp.diff(jnp.concatenate([-end, knots, end]), axis=0)
        raw = jnp.log(jnp.maximum(sizes - MIN_WIDTH, 0.01 * MIN_WIDTH))
        return raw - raw.mean(axis=0)

    above = jnp.maximum(slopes - MIN_SLOPE, 0.01 * MIN_SLOPE)
    raw_slopes = inv_softplus(above) - _RAW_UNIT_SLOPE
    return jnp.concatenate([raw_sizes(x), raw_sizes(y), raw_slopes])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _bin(
    interval: float,
    axis: int,
    point: Float[Array, "*n"],
    raw_widths: Float[Array, "k *#n"],
    raw_heights: Float[Array, "k *#n"],
    raw_slopes: Float[Array, "k_plus_1 *#n"],
) -> tuple[Float[Array, "*n"], ...]:
    """Left edge, width, bottom edge, height and both raw slopes of a point's bin.

    The point is an x on ``axis`` 0, a y on ``axis`` 1. Autodiff would go back through
    each masked sum and the softmax by itself; the rule below needs one pass for all.
    """
    raw = raw_widths, raw_heights, raw_slopes
    return _bin_and_more(interval, axis, point, *raw)[0]


@_bin.defjvp
def _bin_jvp(interval, axis, primals, tangents):
    found, n_passed, shares = _bin_and_more(interval, axis, *primals)
    _, *sizes, slopes = tangents  # a bin stays the same as its point moves
    free = _free(len(shares[0]), interval)

    def moved(n_passed, start, size, share, tangent):
        # The barrier keeps product and sums apart, here and in the transpose: a sum
        # over bins with a product fused in takes XLA ten times as long on a CPU.
        weighted = jax.lax.optimization_barrier(share * tangent)
        before, own = _before_and_at(n_passed, weighted)
        mean = jnp.sum(weighted, axis=0)
        return (
            free * before - (start - _least(n_passed, start, interval)) * mean,
            free * own - (size - MIN_WIDTH) * mean,
        )

    across = _again(moved)(n_passed, *found[0:2], shares[0], sizes[0])
    up = _again(moved)(n_passed, *found[2:4], shares[1], sizes[1])
    return found, (*across, *up, *_again(_around)(n_passed, slopes))


def _bin_and_more(interval, axis, point, raw_widths, raw_heights, raw_slopes):
    """What :func:`_bin` gives, the bin's number, and the shares of all bins.

    Those are what each gets of the length that all minimal widths leave over.
    """
    shares = jax.nn.softmax(raw_widths, axis=0), jax.nn.softmax(raw_heights, axis=0)
    n_passed = _n_passed(_clip(point, -interval, interval), shares[axis], interval)
    free = _free(len(raw_widths), interval)

    def edge_and_size(share):
        before, own = _before_and_at(n_passed, share)
        return _least(n_passed, share, interval) + free * before, MIN_WIDTH + free * own

    found = (
        *edge_and_size(shares[0]),
        *edge_and_size(shares[1]),
        *_around(n_passed, raw_slopes),
    )
    return found, n_passed, shares


def _free(n_bins: int, interval: float) -> float:
    return 2 * interval - MIN_WIDTH * n_bins


def _n_passed(
    x: Float[Array, "*n"], shares: Float[Array, "k *#n"], interval: float
) -> Int[Array, "*n"]:
    """How many interior knots lie to the left of ``x``, which is the bin's number."""
    n_bins = len(shares)
    least = (MIN_WIDTH * jnp.arange(1, n_bins) - interval).astype(shares.dtype)
    knots = _free(n_bins, interval) * jnp.cumsum(shares[:-1], axis=0)
    knots += least.reshape(-1, *(1,) * x.ndim)
    return jnp.sum(x > knots, axis=0)


def _least(
    n_passed: Int[Array, "*n"], like: Float[Array, "..."], interval: float
) -> Float[Array, "*n"]:
    """Where a bin would begin if all those before it had the minimal width."""
    return n_passed.astype(like.dtype) * MIN_WIDTH - interval


def _before_and_at(
    n_passed: Int[Array, "*n"], values: Float[Array, "k *#n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """The sum of what belongs to the bins before a point's, and what to its own."""
    number = _numbers(values)
    return _total(number < n_passed, values), _total(number == n_passed, values)


def _around(
    n_passed: Int[Array, "*n"], at_knots: Float[Array, "k_plus_1 *#n"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """What belongs to the knots at the left and at the right end of a point's bin."""
    number = _numbers(at_knots)
    left, right = number == n_passed, number == n_passed + 1
    return _total(left, at_knots), _total(right, at_knots)


def _numbers(values: Float[Array, "k *n"]) -> Int[Array, "k ..."]:
    return jnp.arange(len(values)).reshape(-1, *(1,) * (values.ndim - 1))


def _total(mask: Bool[Array, "k *n"], values: Float[Array, "k *#n"]) -> Array:
    return jnp.sum(jnp.where(mask, values, 0.0), axis=0)


def _clip(x: Float[Array, "*n"], low: float, high: float) -> Float[Array, "*n"]:
    """Clip, with derivative 1 on both ends, where ``jnp.clip`` has one half."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _within(x: Float[Array, "*n"], low: float, high: float) -> Float[Array, "*n"]:
    """Clip what only rounding can have put outside, such as a point just off its bin.

    A bin's edge is a sum. The derivative is 1: were it 0, a point on a knot would lose
    its gradient.
    """
    return x + jax.lax.stop_gradient(_clip(x, low, high) - x)


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
