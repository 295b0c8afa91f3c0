r"""Log-determinants of residual maps: exact, by a series, by estimates without bias.

For a contraction :math:`g` with Jacobian :math:`J`,

.. math::

    \log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k ,
    \qquad \operatorname{tr} J^k = \mathbb{E}\, v^\top J^k v

for random probes :math:`v` of mean 0 and covariance I. Cut off after n terms the
series is biased, by at most :func:`series_bound`. Stopped at a random number of terms,
and with term k divided by the chance that it is reached, it has no bias ("Russian
roulette").

Everything takes one event of any shape. Sources: Behrmann et al. (2019), section 3.2,
for the series; Chen et al. (2019), theorems 1 and 2, for roulette and its gradient.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from . import _check

NOISES = ("gaussian", "rademacher")
DISTRIBUTIONS = ("geometric", "poisson")
Map = Callable[[Array], Array]
_WRITTEN_OUT = 16  # entries of an event up to which elimination is unrolled


def exact(g: Map, x: Float[Array, "..."]) -> Float[Array, ""]:
    """``log |det (I + J)|`` by elimination, O(d^3) for an event of d entries.

    Cost: ``d`` derivatives of ``g`` and the elimination, with pivots. Up to 16 entries
    it is written out, so that a batch of them is a few operations on columns: LAPACK
    would take small matrices one by one.
    """
    matrix = jnp.eye(x.size, dtype=x.dtype) + _jacobian(g, x)
    if x.size > _WRITTEN_OUT:
        return jnp.linalg.slogdet(matrix)[1]
    total = jnp.zeros((), x.dtype)
    for left in range(x.size, 0, -1):
        largest = jnp.argmax(jnp.abs(matrix[:, 0])) == jnp.arange(left)
        top = jnp.sum(jnp.where(largest[:, None], matrix, 0), axis=0)
        others = jnp.where(largest[:, None], matrix[0], matrix)[1:]
        total += jnp.log(jnp.abs(top[0]))
        matrix = others[:, 1:] - jnp.outer(others[:, 0] / top[0], top[1:])
    return total


def series(g: Map, x: Float[Array, "..."], terms: int) -> Float[Array, ""]:
    """The series cut off after ``terms`` terms, with exact traces.

    Cost: ``d`` derivatives of ``g`` and ``terms`` products of d by d matrices.

    Raises:
        ValueError: If ``terms`` is below 1.
    """
    _check.at_least_one(terms=terms)
    with jax.default_matmul_precision("highest"):
        jacobian = _jacobian(g, x)

        def step(power: Array, k: Array) -> tuple[Array, Array]:
            power = -jacobian @ power
            return power, -jnp.trace(power) / k

        ks = jnp.arange(1, terms + 1, dtype=x.dtype)
        return lax.scan(step, jnp.eye(x.size, dtype=x.dtype), ks)[1].sum()


def series_bound(lipschitz: float, dim: int, terms: int) -> float:
    r"""Most that :func:`series` can be wrong: :math:`d \sum_{k > n} L^k / k`.

    Args:
        lipschitz: A bound in [0, 1) on the Lipschitz constant of ``g``.
        dim: Number of entries of an event.
        terms: Number of terms that are kept.

    Raises:
        ValueError: If ``lipschitz`` is not in [0, 1), ``dim`` is below 1 or ``terms``
            negative.

    Source:
        Behrmann et al. (2019), theorem 3.
    """
    _check_contraction(lipschitz)
    _check.at_least_one(dim=dim)
    if terms < 0:
        raise ValueError(f"expected a number of terms of at least 0, got {terms}")
    # added up from the small end; what is left off is below rounding
    last = terms + 50 + math.ceil(40 / max(1 - lipschitz, 1e-6))
    tail = math.fsum(lipschitz**k / k for k in range(terms + 1, last))
    return dim * (tail + lipschitz**last / (last * (1 - lipschitz)))


def sufficient_terms(lipschitz: float, dim: int, tolerance: float) -> int:
    """Fewest terms for which :func:`series_bound` is at most ``tolerance`` nats.

    Raises:
        ValueError: As :func:`series_bound`; or ``tolerance`` is not positive.
    """
    _check.positive(tolerance=tolerance)
    high = 1
    while series_bound(lipschitz, dim, high) > tolerance:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if series_bound(lipschitz, dim, middle) > tolerance:
            low = middle
        else:
            high = middle
    return high


class Estimate(NamedTuple):
    """One draw of an estimator."""

    value: Float[Array, ""]
    """Estimate of the log-determinant; carries no gradient."""
    surrogate: Float[Array, ""]
    """A number whose **gradient** estimates that of the log-determinant. The number
    itself estimates something else, the trace of ``(I + J)^-1 J``: never report it."""
    terms: Int[Array, ""]
    """How many powers of the Jacobian were used."""


class AbstractEstimator(eqx.Module):
    """A random estimate of the log-determinant, in memory that no term adds to.

    Cost: one product with the Jacobian a term and probe, and one differentiable product
    a probe, whatever the number of terms. That differentiable product carries the
    gradient: the rest of the series enters it as constants (Neumann series).
    """

    probes: eqx.AbstractVar[int]
    noise: eqx.AbstractVar[str]

    @abstractmethod
    def draw_terms(self, key: PRNGKeyArray) -> Int[Array, ""]:
        """A number of terms."""

    @abstractmethod
    def reached(self, k: Int[Array, ""]) -> Float[Array, ""]:
        """The chance that term ``k`` is used, in float32; its weight is one over it."""

    def log_det(
        self, g: Map, x: Float[Array, "..."], key: PRNGKeyArray
    ) -> Float[Array, ""]:
        """An estimate whose value *and* gradient are those of the log-determinant.

        Args:
            g: The contraction; an :class:`equinox.Module` or a function.
            x: One event.
            key: Random key, split here for the number of terms and the probes.
        """
        count_key, probe_key = jr.split(key)
        terms = self.draw_terms(count_key)
        return combined(self.estimate(g, x, terms, probe_key))

    def log_dets(
        self, g: Map, xs: Float[Array, "n ..."], key: PRNGKeyArray
    ) -> Float[Array, " n"]:
        """The same for a batch, with one number of terms for all and probes for each.

        The number is shared because a batch waits for its longest series anyway.
        """
        count_key, probe_key = jr.split(key)
        terms = self.draw_terms(count_key)

        def one(x: Array, key: PRNGKeyArray) -> Array:
            return combined(self.estimate(g, x, terms, key))

        return jax.vmap(one)(xs, jr.split(probe_key, len(xs)))

    def estimate(
        self, g: Map, x: Float[Array, "..."], terms: Int[Array, ""], key: PRNGKeyArray
    ) -> Estimate:
        """The estimate for a given number of terms, in its two parts.

        Args:
            g: The contraction.
            x: One event.
            terms: Number of terms, as :meth:`draw_terms` gives it.
            key: Random key of the probes.
        """
        draw = jr.normal if self.noise == "gaussian" else jr.rademacher
        v = draw(key, (self.probes, *x.shape), x.dtype)
        with jax.default_matmul_precision("highest"):
            u, total = self._powers(g, x, v, terms)
            tangent = jax.vmap(lambda v: jax.jvp(g, (x,), (v,))[1])(v)
            surrogate = jnp.sum(lax.stop_gradient(u) * tangent) / self.probes
        return Estimate(lax.stop_gradient(total), surrogate, terms)

    def _powers(self, g: Map, x: Array, v: Array, terms: Array) -> tuple[Array, Array]:
        """Both weighted series of powers of the Jacobian, without derivatives."""
        frozen, x = lax.stop_gradient(eqx.filter(g, eqx.is_array)), lax.stop_gradient(x)
        g = eqx.combine(frozen, eqx.filter(g, eqx.is_array, inverse=True))
        pull = jax.vmap(jax.vjp(g, x)[1])

        def step(state: tuple) -> tuple:
            k, power, u, total = state
            power = pull(power)[0]
            weight = jnp.where(k % 2 == 0, 1, -1) / self.reached(k).astype(x.dtype)
            total = total - weight * jnp.sum(v * power) / (k * self.probes)
            return k + 1, power, u + weight * power, total

        start = (jnp.ones((), jnp.int32), v, v, jnp.zeros((), x.dtype))
        _, _, u, total = lax.while_loop(lambda s: s[0] <= terms, step, start)
        return u, total


class Truncated(AbstractEstimator):
    """The series cut off after ``terms`` terms, with random probes: biased.

    Args:
        terms: Number of terms.
        probes: Number of probes.
        noise: ``"gaussian"`` or ``"rademacher"``.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """

    terms: int = eqx.field(static=True)
    probes: int = eqx.field(static=True)
    noise: str = eqx.field(static=True)

    def __init__(self, terms: int, *, probes: int = 1, noise: str = "gaussian"):
        _check.at_least_one(terms=terms)
        _check_probes(probes, noise)
        self.terms, self.probes, self.noise = terms, probes, noise

    def draw_terms(self, key: PRNGKeyArray) -> Int[Array, ""]:
        """Always ``terms``."""
        return jnp.asarray(self.terms, jnp.int32)

    def reached(self, k: Int[Array, ""]) -> Float[Array, ""]:
        """Always 1."""
        return jnp.ones((), jnp.float32)


class Roulette(AbstractEstimator):
    r"""The series stopped at random, without bias.

    There are ``head`` terms for certain and N more. For ``"geometric"``,
    :math:`\Pr(N \ge m) = (1 - p)^{m-1}` with :math:`m \ge 1` and p the ``rate``; for
    ``"poisson"`` N is Poisson with mean ``rate``.

    Its variance is finite only where :math:`\Pr(N \ge m)` falls more slowly than
    :math:`\rho^{2m}`, with :math:`\rho` the spectral radius of the Jacobian:
    :math:`\rho^2 < 1 - p` for the geometric law, and nowhere (but at :math:`\rho = 0`)
    for the Poisson law. Small :math:`\rho` makes the draws that show it very rare.

    Args:
        distribution: ``"geometric"`` or ``"poisson"``.
        rate: Parameter of that law: a probability in (0, 1), or a mean above 0. By
            default 0.5 and 2.
        head: Number of terms that are always used, at least 0.
        probes: Number of probes.
        noise: ``"gaussian"`` or ``"rademacher"``.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """

    distribution: str = eqx.field(static=True)
    rate: float = eqx.field(static=True)
    head: int = eqx.field(static=True)
    probes: int = eqx.field(static=True)
    noise: str = eqx.field(static=True)

    def __init__(
        self,
        distribution: str = "geometric",
        *,
        rate: float | None = None,
        head: int = 2,
        probes: int = 1,
        noise: str = "gaussian",
    ):
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"expected a distribution in {DISTRIBUTIONS}, got {distribution!r}"
            )
        if rate is None:
            rate = 0.5 if distribution == "geometric" else 2.0
        top = 1 if distribution == "geometric" else math.inf
        if not 0 < rate < top:
            raise ValueError(f"expected a rate in (0, {top}), got {rate}")
        if head < 0:
            raise ValueError(f"expected a head of at least 0 terms, got {head}")
        _check_probes(probes, noise)
        self.distribution, self.rate, self.head = distribution, float(rate), head
        self.probes, self.noise = probes, noise

    def draw_terms(self, key: PRNGKeyArray) -> Int[Array, ""]:
        """``head`` and a random number more."""
        if self.distribution == "geometric":
            more = jr.geometric(key, self.rate, dtype=jnp.int32)
        else:
            more = jr.poisson(key, self.rate, dtype=jnp.int32)
        return self.head + more

    def reached(self, k: Int[Array, ""]) -> Float[Array, ""]:
        """``Pr(head + N >= k)``."""
        beyond = (k - self.head).astype(jnp.float32)
        if self.distribution == "geometric":
            return (1 - self.rate) ** jnp.maximum(beyond - 1, 0)
        chance = jax.scipy.special.gammainc(jnp.maximum(beyond, 1), self.rate)
        return jnp.where(beyond > 0, chance, 1)

    def mean_terms(self) -> float:
        """Average number of terms."""
        more = 1 / self.rate if self.distribution == "geometric" else self.rate
        return self.head + more


def combined(estimate: Estimate) -> Float[Array, ""]:
    """The value of an estimate, with the gradient of its surrogate."""
    value, surrogate, _ = estimate
    return value + (surrogate - lax.stop_gradient(surrogate))


def _jacobian(g: Map, x: Array) -> Float[Array, "d d"]:
    return jax.jacfwd(g)(x).reshape(x.size, x.size)


def _check_contraction(lipschitz: float) -> None:
    if not 0 <= lipschitz < 1:
        raise ValueError(f"expected a Lipschitz bound in [0, 1), got {lipschitz}")


def _check_probes(probes: int, noise: str) -> None:
    _check.at_least_one(probes=probes)
    if noise not in NOISES:
        raise ValueError(f"expected noise in {NOISES}, got {noise!r}")
