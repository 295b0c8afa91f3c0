r"""Transformers: the increasing maps of one number that flows apply to coordinates.

A transformer says how a number is mapped, given its parameters, and holds none itself.
Where the parameters come from is what tells a coupling (:mod:`gauss_flows.coupling`: a
network of the other coordinates) from a diagonal layer (:class:`gauss_flows.Diagonal`:
free numbers, the same for all points). Any parameters will do, and parameters of zero
give the identity, or nearly so for mixtures. They lie on the first axis.
"""

import math
from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractClassVar
from jaxtyping import Array, Float
from paramax.utils import inv_softplus

from . import _check, mixture, spline

_RAW_UNIT_SCALE = math.log(math.expm1(1.0))


class AbstractTransformer(eqx.Module):
    """An increasing map of one number, whose parameters may be any numbers.

    To write one, say how many parameters there are, and map points both ways.

    Example:
        >>> spline = RQSpline(n_knots=8, interval=4.0)
        >>> theta = jnp.zeros((spline.n_parameters, 1))
        >>> y, log_slope = spline.forward(jnp.array([0.5]), *spline.split(theta))
        >>> float(y[0]), float(log_slope[0])
        (0.5, 0.0)
    """

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """How many parameters each of the arrays ``theta`` holds."""

    @abstractmethod
    def forward(
        self, x: Float[Array, "*n"], *theta: Float[Array, "_ *#n"]
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        """Map points.

        Args:
            x: Points, of any shape.
            *theta: Parameters of each point, as :meth:`split` gives them.

        Returns:
            The images, and the logarithm of the derivative at each point.
        """

    @abstractmethod
    def inverse(
        self, y: Float[Array, "*n"], *theta: Float[Array, "_ *#n"]
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        """The preimages, and the logarithm of the derivative of the inverse there."""

    @abstractmethod
    def from_marginals(self, x: Float[Array, "n d"]) -> Float[Array, "p d"]:
        """Parameters that bring each column of ``x`` close to a standard normal one."""

    @property
    def n_parameters(self) -> int:
        """Parameters of one number's map."""
        return sum(self.sizes)

    def split(self, theta: Float[Array, "p *n"]) -> list[Float[Array, "_ *n"]]:
        """The parameters, taken apart for :meth:`forward` and :meth:`inverse`."""
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        return [theta[i : i + size] for i, size in zip(starts, self.sizes, strict=True)]


class Additive(AbstractTransformer):
    r"""A shift, :math:`y = x + t`."""

    sizes: ClassVar[tuple[int, ...]] = (1,)

    def forward(self, x, shift):
        """Shift points."""
        return x + shift[0], jnp.zeros_like(x)

    def inverse(self, y, shift):
        """Shift points back."""
        return y - shift[0], jnp.zeros_like(y)

    def from_marginals(self, x):
        """Parameters that make the means 0."""
        return -x.mean(axis=0)[None]


class Affine(AbstractTransformer):
    r"""A scale and a shift, :math:`y = x\, s + t`.

    The scale is a softplus of its parameter, or :math:`e^{B \tanh(r / B)}`. A softplus
    underflows: with parameters up to 30 in size, 300 in float64, values and gradients
    of points up to a million are finite both ways.

    Args:
        log_scale_bound: The bound :math:`B` on the absolute log-scale; None for
            softplus.

    Raises:
        ValueError: If the bound is not positive and finite.
    """

    log_scale_bound: float | None = eqx.field(static=True, default=None)
    sizes: ClassVar[tuple[int, ...]] = (1, 1)

    def __check_init__(self):
        """Refuse what is out of range."""
        bound = self.log_scale_bound
        if bound is not None and not 0 < bound < math.inf:
            raise ValueError(
                f"expected a positive, finite log_scale_bound or None, got {bound}"
            )

    def scale(self, r: Float[Array, "*n"]) -> tuple[Array, Array]:
        """The scale of a parameter, and its logarithm."""
        if self.log_scale_bound is None:
            r = r + _RAW_UNIT_SCALE
            return jax.nn.softplus(r), _log_softplus(r)
        log_scale = self.log_scale_bound * jnp.tanh(r / self.log_scale_bound)
        return jnp.exp(log_scale), log_scale

    def parameter_of(self, scale: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The parameter of a positive scale, or of the nearest that the bound admits.

        No parameter reaches the bound: log-scales end at 0.99 of it.
        """
        if self.log_scale_bound is None:
            return inv_softplus(scale) - _RAW_UNIT_SCALE
        wanted = jnp.clip(jnp.log(scale) / self.log_scale_bound, -0.99, 0.99)
        return self.log_scale_bound * jnp.arctanh(wanted)

    def forward(self, x, shift, r):
        """Scale, then shift."""
        scale, log_scale = self.scale(r[0])
        return x * scale + shift[0], log_scale

    def inverse(self, y, shift, r):
        """Shift back, then divide by the scale."""
        scale, log_scale = self.scale(r[0])
        return (y - shift[0]) / scale, -log_scale

    def from_marginals(self, x):
        """Parameters that make means 0 and variances 1, as far as the bound admits."""
        r = self.parameter_of(1 / x.std(axis=0))
        return jnp.stack([-x.mean(axis=0) * self.scale(r)[0], r])


class RQSpline(AbstractTransformer):
    """A monotone rational-quadratic spline, the identity outside its interval.

    Values are right to rounding whatever the parameters. Slopes are right as long as a
    place can be told from the next knot: in float32 for intervals up to 100 and slopes
    at knots up to 1e3, in float64 for slopes up to 1e11.

    Args:
        n_knots: Number of interior knots, at least 1.
        interval: Half-width of the interval on which the spline acts.

    Raises:
        ValueError: If an argument is out of range.
    """

    n_knots: int = eqx.field(static=True, default=8)
    interval: float = eqx.field(static=True, default=4.0)

    def __check_init__(self):
        """Refuse what is out of range."""
        if self.n_knots < 1:
            raise ValueError(
                "expected n_knots (n_bins of a coupling) of at least 1, got "
                f"{self.n_knots}"
            )
        least = (self.n_knots + 1) * spline.MIN_WIDTH / 2
        if not least < self.interval < math.inf:
            raise ValueError(
                "expected a finite interval with room for every bin, above "
                f"{least}, got {self.interval}"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Raw widths, raw heights and raw slopes."""
        return spline.sizes(self.n_knots)

    def forward(self, x, widths, heights, slopes):
        """Apply the spline."""
        return spline.forward(x, widths, heights, slopes, self.interval)

    def inverse(self, y, widths, heights, slopes):
        """Invert the spline, in closed form."""
        return spline.inverse(y, widths, heights, slopes, self.interval)

    def from_marginals(self, x):
        """Parameters that take quantiles to those of the normal law."""
        knots = _quantile_knots(x, self.n_knots, self.interval)
        return spline.from_knots(*knots, self.interval)


class AbstractMixture(AbstractTransformer):
    """From a mixture of copies of a law to the law itself, by rank.

    Parameters are raw weights, means and scales of the components, which start apart;
    see :mod:`gauss_flows.mixture`.
    """

    law: AbstractClassVar[mixture.Law]
    n_components: int = eqx.field(static=True, default=8)

    def __check_init__(self):
        """Refuse what is out of range."""
        _check.at_least_one(n_components=self.n_components)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Raw weights, raw means and raw scales."""
        return (self.n_components,) * 3

    def forward(self, x, *theta):
        """Apply the map."""
        return mixture.forward(
            x, *mixture.components(*theta, law=self.law), law=self.law
        )

    def inverse(self, y, *theta):
        """Find preimages inside a bracket."""
        return mixture.inverse(
            y, *mixture.components(*theta, law=self.law), law=self.law
        )


class MixtureCDF(AbstractMixture):
    r"""From a mixture of normal laws to the normal one.

    :math:`y = \Phi^{-1}(\sum_k w_k \Phi((x - \mu_k)/\sigma_k))`.

    Args:
        n_components: Number of components, at least 1.

    Raises:
        ValueError: If there are fewer than 1.

    Source:
        Meng, Song, Song & Ermon (2020), section 3.1.
    """

    law: ClassVar[mixture.Law] = mixture.NORMAL

    def from_marginals(self, x):
        """Parameters of a mixture fitted to each column by :func:`mixture.fit`."""
        return jnp.concatenate(mixture.raw(*mixture.fit(x, self.n_components)))


class DeepSigmoid(AbstractMixture):
    r"""From a mixture of logistic laws to the logistic one.

    :math:`y = \operatorname{logit} \sum_k w_k\, \operatorname{sigmoid}(a_k x + b_k)`
    with slopes :math:`a_k = 1/\sigma_k` and offsets :math:`b_k = -\mu_k/\sigma_k`.

    Args:
        n_components: Number of components, at least 1.

    Raises:
        ValueError: If there are fewer than 1.

    Source:
        Huang, Krueger, Lacoste & Courville (2018), equation 8.
    """

    law: ClassVar[mixture.Law] = mixture.LOGISTIC

    def from_marginals(self, x):
        """Parameters that only standardise: what fits a column takes it to this law."""
        means, scale = mixture.spread(self.n_components, self.law)
        mean, std = x.mean(axis=0), x.std(axis=0)
        std = eqx.error_if(
            std,
            ~((std >= 1e-3) & (std <= 1e3)),
            "DeepSigmoid: expected every column to have a standard deviation of 1e-3 "
            "to 1e3, got one outside: standardise the data, for example with an "
            "ActNorm in front",
        )
        means = mean + std * jnp.asarray(means, x.dtype)[:, None]
        log_scales = jnp.broadcast_to(jnp.log(std) + math.log(scale), means.shape)
        raw = mixture.raw(jnp.zeros_like(means), means, log_scales, self.law)
        return jnp.concatenate(raw)


def _quantile_knots(
    x: Float[Array, "n active"], n_knots: int, interval: float
) -> tuple[Float[Array, "k active"], Float[Array, "k active"], Array]:
    """Quantiles of each column, the normal distribution's, and slopes of that map.

    A slope is the geometric mean of those of the two chords that meet in the knot. The
    outermost chords lead to the ends of the interval, where there may be no data, so
    that the outermost knots take the slope of their inner chord.
    """
    # two events are left, by this height; fewer than five have no such height
    beyond = -jax.scipy.special.ndtri(2 / max(len(x), 5))
    farthest = min(2.5, n_knots / 2, 0.9 * interval)  # few knots do better inside
    top = jnp.minimum(beyond, farthest).astype(x.dtype)
    y = top * (2 * jnp.arange(n_knots) + 1 - n_knots) / max(n_knots - 1, 1)
    y = y.astype(x.dtype)
    knots = jnp.quantile(x, jax.scipy.special.ndtr(y), axis=0)
    y = jnp.broadcast_to(y[:, None], knots.shape)
    end = jnp.full_like(y[:1], interval)
    rise, run = (jnp.diff(jnp.concatenate([-end, a, end]), axis=0) for a in (y, knots))
    chords = jnp.log(rise) - jnp.log(jnp.maximum(run, spline.MIN_WIDTH))
    inner = (chords[1:] + chords[:-1]) / 2
    if n_knots > 1:
        inner = inner.at[0].set(chords[1]).at[-1].set(chords[-2])
    one = jnp.ones_like(end)
    return knots, y, jnp.concatenate([one, jnp.exp(inner), one])


def _log_softplus(raw: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log(softplus(raw)), finite and exact where softplus underflows."""
    tiny = raw < -20.0
    series = raw - jnp.exp(jnp.minimum(raw, -20.0)) / 2
    return jnp.where(tiny, series, jnp.log(jax.nn.softplus(jnp.where(tiny, 0.0, raw))))
