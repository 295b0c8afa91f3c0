"""Symmetric laws of one number by their logarithms, right however far out.

A mixture's tail is a sum of tails: its probability underflows, and ``1 - CDF`` cancels,
long before its quantile is anything unusual. So everything here is a logarithm of the
*lower* tail; the upper one is its mirror image, since both laws are symmetric.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_HALF_LOG_TWO_PI = math.log(2 * math.pi) / 2
# The excess of the normal hazard, the sum over these of c / a**(1, 3, 5, ...)
_EXCESS = (1.0, -2.0, 10.0, -74.0, 706.0, -8162.0, 110410.0, -1708394.0)


class Law(NamedTuple):
    """A law symmetric about 0, its functions acting on arrays point by point.

    Attributes:
        cdf: Distribution function; all others are right where it underflows.
        log_cdf: Logarithm of the distribution function.
        log_hazard: Logarithm of density over distribution function, which is the
            derivative of ``log_cdf``.
        quantile: Inverse of ``log_cdf``, for arguments up to log(1/2).
        std: Standard deviation.
    """

    cdf: Callable[[Array], Array]
    log_cdf: Callable[[Array], Array]
    log_hazard: Callable[[Array], Array]
    quantile: Callable[[Array], Array]
    std: float


def _far(u: Float[Array, "*n"]) -> float:
    """From here on the series is exact; so far, erfc does not underflow."""
    return 30.0 if u.dtype == jnp.float64 else 10.0


def _series(a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Hazard of the normal law at ``-a``, minus ``a``, for large ``a``."""
    a = jnp.maximum(a, _far(a))
    total = jnp.zeros_like(a)
    for coefficient in reversed(_EXCESS):
        total = total / a**2 + coefficient
    return total / a


def _far_log_hazard(u: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.log(jnp.maximum(-u, _far(u)) + _series(-u))


def _near_log_cdf(u: Float[Array, "*n"]) -> Float[Array, "*n"]:
    tail = _normal_cdf(-jnp.minimum(jnp.abs(u), _far(u)))
    return jnp.where(u < 0, jnp.log(tail), jnp.log1p(-tail))


def _normal_cdf(u: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return jax.lax.erfc(-u / math.sqrt(2)) / 2


@jax.custom_jvp
def _normal_log_cdf(u: Float[Array, "*n"]) -> Float[Array, "*n"]:
    beyond = -(u**2) / 2 - _HALF_LOG_TWO_PI - _far_log_hazard(u)
    return jnp.where(u < -_far(u), beyond, _near_log_cdf(u))


@_normal_log_cdf.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (u,), (tangent,) = primals, tangents
    return _normal_log_cdf(u), jnp.exp(_normal_log_hazard(u)) * tangent


@jax.custom_jvp
def _normal_log_hazard(u: Float[Array, "*n"]) -> Float[Array, "*n"]:
    far = _far(u)
    near = -(jnp.maximum(u, -far) ** 2) / 2 - _HALF_LOG_TWO_PI - _near_log_cdf(u)
    return jnp.where(u < -far, _far_log_hazard(u), near)


@_normal_log_hazard.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (u,), (tangent,) = primals, tangents
    # hazard plus u, which cancels far out
    value = _normal_log_hazard(u)
    excess = jnp.where(u < -_far(u), _series(-u), jnp.exp(value) + u)
    return value, -excess * tangent


@jax.custom_jvp
def _normal_quantile(log_p: Float[Array, "*n"]) -> Float[Array, "*n"]:
    beyond = log_p < -30.0
    near = jax.scipy.special.ndtri(jnp.exp(jnp.maximum(log_p, -30.0)))
    # the tail is nearly exp(-y^2 / 2) / (|y| sqrt(2 pi))
    twice = 2 * jnp.maximum(-log_p, 30.0) - 2 * _HALF_LOG_TWO_PI
    y = jnp.where(beyond, -jnp.sqrt(twice - jnp.log(twice)), near)

    def newton(_: Any, y: Array) -> Array:
        return y - (_normal_log_cdf(y) - log_p) * jnp.exp(-_normal_log_hazard(y))

    return jax.lax.fori_loop(0, 3, newton, y)  # as many steps as the tail needs


@_normal_quantile.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (log_p,), (tangent,) = primals, tangents
    y = _normal_quantile(log_p)
    return y, jnp.exp(-_normal_log_hazard(y)) * tangent


def _logistic_quantile(log_p: Float[Array, "*n"]) -> Float[Array, "*n"]:
    return log_p - jnp.log1p(-jnp.exp(log_p))


NORMAL = Law(
    _normal_cdf, _normal_log_cdf, _normal_log_hazard, _normal_quantile, std=1.0
)
LOGISTIC = Law(
    jax.nn.sigmoid,
    jax.nn.log_sigmoid,
    lambda u: jax.nn.log_sigmoid(-u),
    _logistic_quantile,
    std=math.pi / math.sqrt(3),
)
