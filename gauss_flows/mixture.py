r"""Monotone maps made of mixtures, exact in the tails.

With :math:`G` the distribution function of a symmetric law,

.. math:: y = G^{-1}\Bigl(\sum_k w_k\, G\bigl((x - \mu_k) / \sigma_k\bigr)\Bigr)

takes a point from the mixture to the law: its rank stays. If :math:`G` is the normal
law, this is the map of Gaussianization flows (Meng et al. 2020, section 3.1); if it is
the logistic one, the deep sigmoid of Huang et al. (2018), equation 8, whose slopes are
:math:`1/\sigma_k`. With one component it is affine.

The sum is 1 to every digit long before :math:`y` is large, so each point is mapped by
its *smaller* tail, on logarithms, and the derivative is a ratio of hazards, in which
nothing large cancels. Far out the map is affine, with the slope of the component whose
tail reaches farthest. No inverse in closed form: it is bracketed between the quantiles
of the components, and found by Newton's method.

Squares of :math:`(x - \mu_k) / \sigma_k` have to stay finite: in float32, whose range
ends at 3e38, points and means may be of a size up to about 1e14. Between components
that lie far apart the map is nearly flat, and its inverse steep; values and logarithms
of slopes are finite there too, but gradients of the inverse hold squares of its slope,
and overflow where a logarithm is beyond 40 (float32) or 350 (float64).

Parameters lie on the first axis, one component after another.
"""

import functools
import math
from statistics import NormalDist

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from ._laws import LOGISTIC as LOGISTIC, NORMAL as NORMAL, Law as Law

LOG_SCALE_BOUND = 7.0
"""Bound on how far a component's log-scale may lie from where it starts."""

_START_SCALE = 0.7  # the components overlap, and yet start apart


def spread(n_components: int, law: Law = NORMAL) -> tuple[np.ndarray, float]:
    """Means and the common scale at which components start: apart.

    Components that start equal get equal gradients, and stay equal for ever. These mix
    to nearly the law itself, with its variance, so that the map is near the identity.

    Returns:
        Means, shape ``(n_components,)``, and the scale.
    """
    if n_components == 1:
        return np.zeros(1), 1.0
    middles = (np.arange(n_components) + 0.5) / n_components
    places = np.array([NormalDist().inv_cdf(p) for p in middles])
    share = law.std * math.sqrt(1 - _START_SCALE**2)
    return share * places / places.std(), _START_SCALE


def components(
    raw_weights: Float[Array, "k *#n"],
    raw_means: Float[Array, "k *#n"],
    raw_scales: Float[Array, "k *#n"],
    law: Law = NORMAL,
) -> tuple[Float[Array, "k *#n"], Float[Array, "k *#n"], Float[Array, "k *#n"]]:
    """Log-weights, means and log-scales of parameters that may be any numbers.

    At zero they are those of :func:`spread`, with equal weights.
    """
    means, scale = spread(len(raw_means), law)
    means = jnp.asarray(means, raw_means.dtype)
    bounded = LOG_SCALE_BOUND * jnp.tanh(raw_scales / LOG_SCALE_BOUND)
    return (
        jax.nn.log_softmax(raw_weights, axis=0),
        means.reshape(-1, *(1,) * (raw_means.ndim - 1)) + raw_means,
        math.log(scale) + bounded,
    )


def raw(
    log_weights: Float[Array, "k *#n"],
    means: Float[Array, "k *#n"],
    log_scales: Float[Array, "k *#n"],
    law: Law = NORMAL,
) -> tuple[Float[Array, "k *#n"], Float[Array, "k *#n"], Float[Array, "k *#n"]]:
    """Undo :func:`components`; log-scales must lie within their bound."""
    start, scale = spread(len(means), law)
    start = jnp.asarray(start, means.dtype).reshape(-1, *(1,) * (means.ndim - 1))
    within = (log_scales - math.log(scale)) / LOG_SCALE_BOUND
    return log_weights, means - start, LOG_SCALE_BOUND * jnp.arctanh(within)


def forward(
    x: Float[Array, "*n"],
    log_weights: Float[Array, "k *#n"],
    means: Float[Array, "k *#n"],
    log_scales: Float[Array, "k *#n"],
    law: Law = NORMAL,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Take points from a mixture to the law.

    Args:
        x: Points, of any shape.
        log_weights: Logarithms of each point's weights, which sum to 1 over the first
            axis; shapes broadcast.
        means: Means of the components.
        log_scales: Logarithms of their scales.
        law: What they are mixtures of, and what they are taken to.

    Returns:
        The images and the logarithm of the derivative at each, finite with all their
        derivatives, and right to rounding however far out.
    """
    u = (x - means) * jnp.exp(-log_scales)
    below = jnp.sum(jnp.exp(log_weights) * law.cdf(u), axis=0) < 0.5
    v = jnp.where(below, u, -u)  # the smaller tail, as a lower one
    tails = log_weights + law.log_cdf(v)
    y = law.quantile(logsumexp(tails, axis=0))
    slopes = law.log_hazard(v) - log_scales
    log_slope = logsumexp(jax.nn.log_softmax(tails, axis=0) + slopes, axis=0)
    return jnp.where(below, y, -y), log_slope - law.log_hazard(y)


def inverse(
    y: Float[Array, "*n"],
    log_weights: Float[Array, "k *#n"],
    means: Float[Array, "k *#n"],
    log_scales: Float[Array, "k *#n"],
    law: Law = NORMAL,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Take points from the law to the mixture; its gradient is that of the solution.

    Args:
        y: Points, of any shape.
        log_weights: Logarithms of the weights; shapes broadcast.
        means: Means of the components.
        log_scales: Logarithms of their scales.
        law: What they are mixtures of, and what they are taken from.

    Returns:
        The preimages and the logarithm of the derivative **of the inverse** at each.
        Where the mixture has next to no probability the map is flat, and the preimage
        is only as exact as rounding leaves ``y``.
    """
    x = _solve(law, y, log_weights, means, log_scales)
    return x, -forward(x, log_weights, means, log_scales, law)[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(law: Law, y: Array, *mixture: Array) -> Array:
    """The root of ``forward(x) = y``, by Newton's method inside a bracket.

    Each component takes its own quantile to ``y``, so that the mixture's lies between
    the least and the greatest of these. A step that leaves the bracket, or is more than
    half as long as the last one, is replaced by a bisection.
    """
    _, means, log_scales = mixture
    ends = means + jnp.exp(log_scales) * y
    low, high = ends.min(axis=0), ends.max(axis=0)
    eps, offset = jnp.finfo(y.dtype).eps, jnp.abs(means).max(axis=0)

    def narrow(state: tuple) -> tuple:
        count, x, low, high, last, _ = state
        found, log_slope = forward(x, *mixture, law=law)
        low, high = jnp.where(found < y, x, low), jnp.where(found < y, high, x)
        middle = low + (high - low) / 2
        newton = x - (found - y) * jnp.exp(-log_slope)
        good = (newton >= low) & (newton <= high) & (jnp.abs(newton - x) <= last / 2)
        new = jnp.where(good, newton, middle)
        step = jnp.where(found == y, 0.0, jnp.abs(new - x))
        moving = step > 2 * eps * (jnp.abs(x) + offset)
        new = jnp.where(found == y, x, jnp.where(jnp.isnan(found), found, new))
        return count + 1, new, low, high, step, jnp.any(moving)

    def unfinished(state: tuple) -> Array:
        return state[-1] & (state[0] < 4 * jnp.finfo(y.dtype).nmant)

    start = low + (high - low) / 2
    state = (0, start, low, high, high - low, jnp.array(True))
    return jax.lax.while_loop(unfinished, narrow, state)[1]


@_solve.defjvp
def _(law: Law, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    y, *mixture = primals
    y_tangent, *mixture_tangents = tangents
    x = _solve(law, y, *mixture)

    def image(*mixture: Array) -> Array:
        return forward(x, *mixture, law=law)[0]

    _, moved = jax.jvp(image, tuple(mixture), tuple(mixture_tangents))
    _, log_slope = forward(x, *mixture, law=law)
    return x, (y_tangent - moved) * jnp.exp(-log_slope)


def fit(
    x: Float[Array, "n d"], n_components: int = 8, *, steps: int = 100
) -> tuple[Float[Array, "k d"], Float[Array, "k d"], Float[Array, "k d"]]:
    """Fit a mixture of normal laws to each column, by expectation-maximisation.

    Components start at quantiles of the column. No scale falls below a hundredth of the
    column's own, measured by its quartiles, so that repeated values catch no component;
    all stay within the bound that a transformer's parameters have.

    Cost: ``steps * n * n_components * d`` exponentials.

    Args:
        x: One sample a row, ``n >= n_components``.
        n_components: Components a column.
        steps: Iterations; a fixed number, so that like data give like fits.

    Returns:
        Log-weights, means and log-scales, each of shape ``(n_components, d)``.

    Raises:
        ValueError: If there are fewer samples than components.
        RuntimeError: If a column's scale is out of 0.1 to 100 (``EquinoxRuntimeError``
            under jit): standardise the data.

    Source:
        Dempster, Laird & Rubin (1977), section 4.3.
    """
    if not 1 <= n_components <= len(x):
        raise ValueError(
            "expected n_components of at least 1 and at most one a sample, got "
            f"{n_components} for {len(x)} samples"
        )
    scale = _scale(x)
    scale = eqx.error_if(
        scale,
        ~((scale >= 0.1) & (scale <= 100)),
        "mixture: expected every column to have a scale of 0.1 to 100, got one "
        "outside: standardise the data, for example with an ActNorm in front",
    )
    low, high = 0.01 * scale, 0.99 * _START_SCALE * math.exp(LOG_SCALE_BOUND)
    middles = (jnp.arange(n_components, dtype=x.dtype) + 0.5) / n_components
    means = jnp.quantile(x, middles, axis=0)
    first = jnp.maximum(2 / n_components * scale, low)
    scales = jnp.broadcast_to(first, means.shape)
    weights = jnp.full_like(means, 1 / n_components)

    def improve(mixture: tuple, _: None) -> tuple[tuple, None]:
        weights, means, scales = mixture
        u = (x - means[:, None]) / scales[:, None]
        tiny = jnp.finfo(x.dtype).tiny
        log_joint = jnp.log(jnp.maximum(weights, tiny) / scales)[:, None] - u**2 / 2
        shares = jax.nn.softmax(log_joint, axis=0)
        counts = jnp.maximum(shares.sum(axis=1), 1e-6)
        means = jnp.sum(shares * x, axis=1) / counts
        variances = jnp.sum(shares * (x - means[:, None]) ** 2, axis=1) / counts
        scales = jnp.clip(jnp.sqrt(variances), low, high)
        return (counts / counts.sum(axis=0), means, scales), None

    mixture, _ = jax.lax.scan(improve, (weights, means, scales), length=steps)
    weights, means, scales = mixture
    return jnp.log(weights), means, jnp.log(scales)


def _scale(x: Float[Array, "n d"]) -> Float[Array, " d"]:
    """Standard deviation, by the quartiles where they differ: outliers do not count."""
    first, third = jnp.quantile(x, jnp.array([0.25, 0.75], x.dtype), axis=0)
    return jnp.where(third > first, (third - first) / 1.349, x.std(axis=0))
