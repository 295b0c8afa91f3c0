r"""The depth bound: well-separated modes, a shallow generator of them, the counting.

A law with ``k`` far-apart modes can be told from others of its kind by which ``k`` of
``n`` places its modes stand at. There are many such choices, and a family of maps with
few parameters cannot come close to the laws of all of them: it has too few members that
differ. A generator with one hidden layer hits any of them.

Each step is a function of its own, with every constant as an argument:
:func:`separated_means`, :func:`aligned_pair_bound` and :func:`packing_bound` for the
places; :class:`ModeGenerator` for the law; :func:`log_family_size` for the choices,
:func:`witness` and :func:`separation` for their distance, :func:`log_net_size` for the
maps; :func:`least_parameters` and :func:`error_floor` for what follows.

Source: Koehler, Mehta & Risteski (2021), by the outline in its authors' blog post. The
constants are ours, and may differ from those of the paper.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.spatial.distance import pdist
from scipy.special import betainc, ndtr, ndtri
from scipy.stats import hypergeom

from .. import _check


def random_means(key: PRNGKeyArray, n: int, dim: int) -> Float[Array, "n dim"]:
    """Independent uniform points of the unit sphere.

    Raises:
        ValueError: ``n`` is below 1, or ``dim`` below 2.
    """
    _check.at_least_one(n=n)
    _sphere(dim)
    points = jr.normal(key, (n, dim))
    return points / jnp.linalg.norm(points, axis=1, keepdims=True)


def separated_means(
    key: PRNGKeyArray, n: int, dim: int, *, distance: float = 1.0, rounds: int = 50
) -> Float[Array, "n dim"]:
    """Points of the unit sphere no two of which are nearer than ``distance``.

    Random points are taken one after another, and kept if they are far from all kept
    ones. The first of a longer list are those of a shorter one from the same key.

    Raises:
        ValueError: ``n`` is below 1, ``dim`` below 2, ``distance`` not in (0, 2); or
            the sphere was full, as far as ``rounds`` of 2,000 points show.
    """
    _check.at_least_one(n=n, rounds=rounds)
    if not 0 < distance < 2:
        raise ValueError(f"expected a distance in (0, 2), got {distance}")
    kept = np.empty((n, dim))
    found = 0
    for i in range(rounds):
        drawn = np.asarray(random_means(jr.fold_in(key, i), 2000, dim), dtype=float)
        for point in drawn:
            if (((kept[:found] - point) ** 2).sum(axis=1) >= distance**2).all():
                kept[found] = point
                found += 1
                if found == n:
                    return jnp.asarray(kept)
    raise ValueError(
        f"expected room for {n} points at distance {distance} on the sphere of "
        f"R^{dim}, got {found} from {2000 * rounds} random ones"
    )


def smallest_distance(means: Float[Array | np.ndarray, "n dim"]) -> float:
    """Smallest Euclidean distance between two of the rows.

    Raises:
        ValueError: There are fewer than two.
    """
    if len(means) < 2:
        raise ValueError(f"expected at least 2 means, got {len(means)}")
    return float(pdist(np.asarray(means, dtype=float)).min())


def aligned_pair_bound(n: int, dim: int, cosine: float) -> float:
    r"""Bound on the probability that two of ``n`` random unit vectors are aligned.

    The probability that :math:`|\langle u, v\rangle| > t` for some pair is at most
    :math:`n(n-1)\,e^{-d t^2/2}`, by :math:`e^{-d t^2/2}` for the measure of a cap and a
    sum over the pairs. It may be above 1, and then says nothing.

    Raises:
        ValueError: ``n`` is below 1, ``dim`` below 2, or ``cosine`` not in (0, 1).
    """
    _check.at_least_one(n=n)
    _sphere(dim)
    if not 0 < cosine < 1:
        raise ValueError(f"expected a cosine in (0, 1), got {cosine}")
    return n * (n - 1) * math.exp(-dim * cosine**2 / 2)


def packing_bound(dim: int, distance: float) -> float:
    """How many unit vectors at that mutual distance there are at least.

    Points are added as long as one is left that is far from all. When there is none,
    the caps of that radius around them cover the sphere, so there are at least as many
    as one over the measure of a cap, which is exact here (by the beta function).

    Raises:
        ValueError: ``dim`` is below 2, or ``distance`` not in (0, sqrt 2].
    """
    _sphere(dim)
    if not 0 < distance <= math.sqrt(2):
        raise ValueError(f"expected a distance in (0, sqrt 2], got {distance}")
    cosine = 1 - distance**2 / 2
    return 2 / float(betainc((dim - 1) / 2, 0.5, 1 - cosine**2))


class ModeGenerator(eqx.Module):
    r"""A ReLU network with one hidden layer whose law is a mixture of ``k`` modes.

    From :math:`z_0` and :math:`z \in \mathbb{R}^d`, all standard normal, it makes

    .. math:: g(z_0, z) = \mu_1 + \sum_{j=1}^{k-1} (\mu_{j+1} - \mu_j)\,
              \mathrm{ramp}\Bigl(\frac{z_0 - t_j}{\tau}\Bigr) + \sigma z,
              \qquad t_j = \Phi^{-1}(j/k),

    where the ramp rises from 0 to 1 between -1/2 and 1/2 and is the difference of two
    rectifiers. With steps in place of ramps the law would be the mixture exactly.
    Hidden units: :math:`2(k-1)` that see :math:`z_0`, and :math:`2d` that pass on
    :math:`z`. In float32 a ``ramp`` below 1e-3 loses digits.

    Args:
        means: Centres of the modes, shape (k, d); k at least 2.
        sd: Standard deviation of each mode in each coordinate.
        ramp: Width of each ramp, at most the smallest gap between two thresholds.

    Raises:
        ValueError: An argument is out of range.
    """

    inner: Float[Array, "units inputs"]
    inner_bias: Float[Array, " units"]
    outer: Float[Array, "dim units"]
    outer_bias: Float[Array, " dim"]
    means: Float[Array, "k dim"]
    sd: float = eqx.field(static=True)
    ramp: float = eqx.field(static=True)

    def __init__(self, means: Float[Array, "k dim"], *, sd: float, ramp: float):
        _check.positive(sd=sd, ramp=ramp)
        k, dim = means.shape
        at = thresholds(k)
        if k > 2 and ramp > (room := np.diff(at).min()):
            raise ValueError(f"expected ramp <= {room:.3g}, got {ramp}: ramps overlap")
        steps = jnp.diff(means, axis=0)
        eye, zero = jnp.eye(dim), jnp.zeros((2 * (k - 1), dim))
        slopes = jnp.full((2 * (k - 1), 1), 1 / ramp)
        corners = jnp.concatenate([-at / ramp + 0.5, -at / ramp - 0.5])
        self.inner = jnp.block(
            [[slopes, zero], [jnp.zeros((2 * dim, 1)), jnp.concatenate([eye, -eye])]]
        ).astype(means.dtype)
        self.inner_bias = jnp.pad(corners, (0, 2 * dim)).astype(means.dtype)
        self.outer = jnp.concatenate(
            [steps.T, -steps.T, sd * eye, -sd * eye], axis=1
        ).astype(means.dtype)
        self.outer_bias, self.means, self.sd, self.ramp = means[0], means, sd, ramp

    def __call__(self, z: Float[Array, " inputs"]) -> Float[Array, " dim"]:
        """From one point of the base, shape (d + 1,), to one of the law, (d,)."""
        hidden = jax.nn.relu(self.inner @ z + self.inner_bias)
        return self.outer @ hidden + self.outer_bias

    def ideal(self, z: Float[Array, " inputs"]) -> Float[Array, " dim"]:
        """The same with steps in place of ramps: its law is the mixture."""
        which = jnp.searchsorted(jnp.asarray(thresholds(len(self.means))), z[0])
        return self.means[which] + self.sd * z[1:]

    @property
    def n_weights(self) -> int:
        """Number of weights and biases that are not zero in general."""
        k, dim = self.means.shape
        return 2 * (k - 1) * (2 + dim) + 4 * dim + dim

    @property
    def ramp_mass(self) -> float:
        """Probability that the input is on a ramp."""
        at, half = thresholds(len(self.means)), self.ramp / 2
        return float((ndtr(at + half) - ndtr(at - half)).sum())

    @property
    def ramp_mass_bound(self) -> float:
        r"""Its bound, :math:`(k-1)\,\tau / \sqrt{2\pi}`."""
        return (len(self.means) - 1) * self.ramp / math.sqrt(2 * math.pi)

    @property
    def w1_bound(self) -> float:
        """Bound on W1 from its law to the mixture: half a step, times the ramp mass."""
        steps = np.linalg.norm(np.diff(np.asarray(self.means), axis=0), axis=1)
        return float(steps.max() / 2 * self.ramp_mass_bound)


def thresholds(k: int) -> Float[np.ndarray, " cuts"]:
    """The ``k - 1`` points that cut the standard normal law into ``k`` equal parts.

    Raises:
        ValueError: ``k`` is below 2.
    """
    if k < 2:
        raise ValueError(f"expected at least 2 modes, got {k}")
    return ndtri(np.arange(1, k) / k)


def log_family_size(n: int, k: int) -> float:
    r"""Log of how many sets of ``k`` of ``n`` share at most half of theirs, pairwise.

    At least so many: sets are taken as long as one is left; each taken one forbids the
    share of all sets that have more than half of theirs in common with it, which is a
    tail of the hypergeometric law. It is at least :math:`(k/2) \log(n / 8k)` for
    :math:`n \ge 2k`.

    Raises:
        ValueError: ``k`` is below 1, or ``n`` below ``k``.
    """
    _check.at_least_one(n=n, k=k)
    if n < k:
        raise ValueError(f"expected n >= k = {k}, got {n}")
    common = np.arange(k // 2 + 1, k + 1)
    return max(0.0, -float(np.logaddexp.reduce(hypergeom.logpmf(common, n, k, k))))


def witness(
    ours: Float[Array, "a dim"], theirs: Float[Array, "b dim"], distance: float
) -> Callable[[Float[Array, " dim"]], Float[Array, ""]]:
    """A function of Lipschitz constant 1 that tells two sets of places apart.

    It is ``distance / 2`` at each of ours, minus that at each of theirs, and falls to 0
    at the border of the ball of that radius around it. Values are within these two.

    Args:
        ours: Places, shape (a, dim).
        theirs: Others, (b, dim).
        distance: At most the smallest distance between any two of all places.

    Raises:
        ValueError: ``distance`` is not positive.
    """
    _check.positive(distance=distance)

    def f(x: Float[Array, " dim"]) -> Float[Array, ""]:
        def peak(places):
            far = jnp.linalg.norm(places - x, axis=1).min()
            return jnp.maximum(distance / 2 - far, 0)

        return peak(ours) - peak(theirs)

    return f


def separation(distance: float, radius: float, *, apart: float = 0.5) -> float:
    r"""Least difference in the mean of :func:`witness` between two mixtures, so of W1.

    :math:`\mathrm{apart}\,(\Delta - 2r)`, which may be negative and then says nothing.

    Args:
        distance: Smallest distance between two places.
        radius: Mean distance of a mode's points from its place, or a bound on it.
        apart: Share of the modes that the two mixtures do not have in common.

    Raises:
        ValueError: An argument is out of range.
    """
    _check.positive(distance=distance, radius=radius, apart=apart)
    if apart > 1:
        raise ValueError(f"expected apart <= 1, got {apart}")
    return apart * (distance - 2 * radius)


def log_net_size(
    layers: int,
    parameters: int,
    *,
    norm: float,
    sensitivity: float,
    lipschitz: float,
    resolution: float,
) -> float:
    r"""Log of a number of laws that come near every law of a family of stacks.

    Some :math:`(1 + 2 R L' \ell \Lambda / \gamma)^{p \ell}` of its laws are within
    :math:`\gamma` of each of them in W1.

    Args:
        layers: Number of layers, :math:`\ell`.
        parameters: Number of parameters of each, :math:`p`.
        norm: Bound on the Euclidean norm of a layer's parameters, :math:`R`.
        sensitivity: Mean distance that a state is moved for each unit by which a
            layer's parameters are, at most, :math:`L'`.
        lipschitz: Bound on the Lipschitz constant of any last layers of a stack taken
            together, :math:`\Lambda`; at most the product of theirs, or 1.
        resolution: :math:`\gamma`.

    Raises:
        ValueError: An argument is out of range.
    """
    _check.at_least_one(layers=layers, parameters=parameters)
    return layers * parameters * _log_cells(
        layers, norm, sensitivity, lipschitz, resolution
    )  # fmt: skip


def least_parameters(
    log_family: float,
    layers: int,
    *,
    norm: float,
    sensitivity: float,
    lipschitz: float,
    resolution: float,
) -> float:
    r"""Parameters of all layers together below which a family misses some of the laws.

    If :math:`p\ell` is below it, then :func:`log_net_size` is below ``log_family``, and
    :func:`error_floor` applies. Below 1, it says nothing.

    Args:
        log_family: Log of the number of laws, as from :func:`log_family_size`.
        layers: Number of layers, :math:`\ell`.
        norm: See :func:`log_net_size`, also for the others.
        sensitivity: See there.
        lipschitz: See there.
        resolution: See there.

    Raises:
        ValueError: An argument is out of range.
    """
    _check.at_least_one(layers=layers)
    return log_family / _log_cells(layers, norm, sensitivity, lipschitz, resolution)


def error_floor(gap: float, *, generator: float, resolution: float) -> float:
    r"""What a family that is too small misses some law by, in W1.

    :math:`\epsilon = \mathrm{gap}/2 - \eta - \gamma`. In relative entropy it is missed
    by :math:`2 (\epsilon/\Delta)^2` nats, with :math:`\Delta` the smallest distance.

    Args:
        gap: Distance of two of the mixtures, as from :func:`separation`.
        generator: W1 from the generator's law to its mixture, :math:`\eta`.
        resolution: As in :func:`log_net_size`, :math:`\gamma`.
    """
    return gap / 2 - generator - resolution


def _log_cells(
    layers: int, norm: float, sensitivity: float, lipschitz: float, resolution: float
) -> float:
    _check.positive(
        norm=norm, sensitivity=sensitivity, lipschitz=lipschitz, resolution=resolution
    )
    if lipschitz < 1:
        raise ValueError(
            f"expected lipschitz >= 1 (no last layers at all have 1), got {lipschitz}"
        )
    return math.log1p(2 * norm * sensitivity * layers * lipschitz / resolution)


def _sphere(dim: int) -> None:
    if dim < 2:
        raise ValueError(f"expected dim >= 2, got {dim}")
