r"""Padding: more coordinates for a flow than the data have.

A coupling can only pass on what half of its coordinates say. Padding gives each half
more: rows :math:`(x, e)` of ``dim`` data coordinates and ``width`` further ones, which
are zeros or independent normal numbers. Half of the data coordinates (rounded down)
and then padding fill the first half of :func:`gauss_flows.masks.half`, the rest of
both the second one: from two of each on, either half holds data and padding.

Padding belongs to the rows: trained by the default loss, each row keeps the padding
that it was given. Fresh data for each row, or several ``copies`` of few rows, keep a
flow from learning it by heart; so does a loss of one's own that draws by its key.

Source: Dupont, Doucet & Teh (2019) pad with zeros; Huang, Dinh & Courville (2020) with
noise, and they give the bound that :func:`log_likelihood` estimates.
"""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flowjax.distributions import AbstractDistribution
from jaxtyping import Array, Float, Int, PRNGKeyArray

from . import _check

KINDS = ("none", "zero", "gaussian")
_UNIT_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)


def data_coordinates(dim: int, width: int) -> Int[np.ndarray, " dim"]:
    """Where the data stand in a padded row.

    Args:
        dim: Number of data coordinates.
        width: Number of padding coordinates.

    Raises:
        ValueError: ``dim`` is below 1, or ``width`` below 0.

    Example:
        >>> data_coordinates(2, 2).tolist()
        [0, 2]
    """
    _check.at_least_one(dim=dim)
    if width < 0:
        raise ValueError(f"expected width >= 0, got {width}")
    first, half = dim // 2, (dim + width) // 2
    return np.concatenate([np.arange(first), np.arange(half, half + dim - first)])


def padding_coordinates(dim: int, width: int) -> Int[np.ndarray, " width"]:
    """Where the padding stands: all places that :func:`data_coordinates` leaves.

    Raises:
        ValueError: As there.

    Example:
        >>> padding_coordinates(2, 2).tolist()
        [1, 3]
    """
    return np.setdiff1d(np.arange(dim + width), data_coordinates(dim, width))


def pad(
    key: PRNGKeyArray,
    x: Float[Array, "n dim"],
    width: int,
    kind: str = "gaussian",
    *,
    noise: float = 0.0,
    copies: int = 1,
) -> Float[Array, "rows total"]:
    """Rows of data and padding, in the dtype of ``x``.

    Args:
        key: Random key of the padding.
        x: Data, shape (n, dim).
        width: Number of padding coordinates; 0 if and only if ``kind`` is "none".
        kind: "none", "zero", or "gaussian" for standard normal numbers.
        noise: Standard deviation of normal noise about the zeros of "zero".
        copies: How often the rows are repeated, each time with padding of its own.

    Returns:
        Shape (copies * n, dim + width): all rows once, then all rows again.

    Raises:
        ValueError: An argument is out of range, or they do not fit each other.
    """
    sd = _standard_deviation(width, kind, noise)
    _check.at_least_one(copies=copies)
    x = jnp.tile(x, (copies, 1))
    return _join(x, sd * jr.normal(key, (len(x), width), x.dtype))


def unpad(rows: Float[Array, "*n total"], width: int) -> Float[Array, "*n dim"]:
    """The data coordinates of padded rows.

    Args:
        rows: Rows as :func:`pad` makes them, or samples of a flow trained on such.
        width: How many of the coordinates are padding.

    Raises:
        ValueError: ``width`` is negative, or leaves no data coordinate.
    """
    return rows[..., data_coordinates(rows.shape[-1] - width, width)]


def entropy(width: int, kind: str = "gaussian", *, noise: float = 0.0) -> float:
    r"""Entropy of the padding in nats, to take from the loss on padded rows.

    It is :math:`\tfrac12 \log 2\pi e \approx 1.4189` a coordinate of Gaussian padding,
    and :math:`\log\sigma` more with noise of standard deviation :math:`\sigma` about
    zeros. Zeros alone have no density, and minus infinity for an entropy.

    Raises:
        ValueError: As :func:`pad`.
    """
    sd = _standard_deviation(width, kind, noise)
    if width == 0:
        return 0.0
    return width * (_UNIT_ENTROPY + math.log(sd)) if sd > 0 else -math.inf


def log_likelihood(
    key: PRNGKeyArray,
    flow: AbstractDistribution,
    x: Float[Array, "n dim"],
    *,
    draws: int = 1,
    sd: float | Float[Array, " width"] = 1.0,
) -> Float[Array, " n"]:
    r"""Estimate the log-density that a flow of padded rows gives to the data alone.

    The flow's density of the data, :math:`p(x) = \int p(x, e)\,de`, is an integral.
    With :math:`e_k` drawn from :math:`q = N(0, \mathrm{sd}^2)` the estimate is

    .. math:: \log \frac1K \sum_{k=1}^K \frac{p(x, e_k)}{q(e_k)} .

    Its mean is at most :math:`\log p(x)`, for one draw less than for many; it is exact
    where ``width`` is 0. Take for ``sd`` the padding's, or that of the padding
    coordinates of the flow's samples where there is none, as for zeros.

    Cost: ``draws`` log-probabilities a row, of which ``n`` at a time are in memory.

    Args:
        key: Random key of the draws.
        flow: A distribution over padded rows, shape (dim + width,).
        x: Data, shape (n, dim).
        draws: Number :math:`K` of draws for each row.
        sd: Standard deviation of :math:`q`, one for all coordinates or one for each.

    Raises:
        ValueError: ``draws`` is below 1, ``sd`` is a number that is not positive, or
            the flow has fewer coordinates than ``x``.

    Source:
        Huang, Dinh & Courville (2020) for one draw; Burda, Grosse & Salakhutdinov
        (2016), theorem 1, for many.
    """
    _check.at_least_one(draws=draws)
    if isinstance(sd, float | int):
        _check.positive(sd=sd)
    width = flow.shape[0] - x.shape[1]
    if width < 0:
        raise ValueError(
            f"expected a flow of at least {x.shape[1]} coordinates, got {flow.shape[0]}"
        )
    if width == 0:
        return flow.log_prob(x)

    def log_weight(key: PRNGKeyArray) -> Array:
        unit = jr.normal(key, (len(x), width), x.dtype)
        log_q = -0.5 * unit**2 - 0.5 * math.log(2 * math.pi) - jnp.log(sd)
        return flow.log_prob(_join(x, sd * unit)) - log_q.sum(axis=1)

    log_weights = jax.lax.map(log_weight, jr.split(key, draws))
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(draws)


def _join(x: Array, padding: Array) -> Array:
    dim, width = x.shape[1], padding.shape[1]
    order = np.concatenate(
        [data_coordinates(dim, width), padding_coordinates(dim, width)]
    )
    return jnp.concatenate([x, padding], axis=1)[:, np.argsort(order)]


def _standard_deviation(width: int, kind: str, noise: float) -> float:
    """Standard deviation of the padding, once the arguments fit each other."""
    if kind not in KINDS:
        raise ValueError(f"expected kind in {KINDS}, got {kind!r}")
    if width < 0 or (width == 0) != (kind == "none"):
        expected = "0" if kind == "none" else ">= 1"
        raise ValueError(f"expected width {expected} for kind {kind!r}, got {width}")
    if noise != 0 and kind != "zero":
        raise ValueError(f"expected noise with kind 'zero' only, got {kind!r}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"expected noise to be finite and >= 0, got {noise}")
    return {"none": 0.0, "zero": noise, "gaussian": 1.0}[kind]
