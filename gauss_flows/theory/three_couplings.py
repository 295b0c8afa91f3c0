r"""Universality by hidden digits: three affine couplings, or two, any bounded target.

Let :math:`\varphi` carry the standard normal law to the target. The first coupling
rounds :math:`z_1` to a grid of step :math:`\epsilon` and hides :math:`z_2` in the
digits below; the second reads both, and writes :math:`\varphi_1` rounded, with
:math:`\varphi_2` in the digits below; the third brings those up. All scales are
constants and all shifts functions of the passive half, so the three are couplings, and
the log-determinant is one constant: the law comes out close in :math:`W_2`, and as far
as one likes in likelihood.

Source: after Koehler, Mehta & Risteski (2021), whose theorem has three couplings. The
constants, and :func:`two_couplings`, are our own; chapter 13 of the book proves them.

The low digits need room: use float64 for a step below about 0.1. The round trip of
three couplings loses some :math:`10^3\,\mathrm{eps} / \epsilon^3`.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flowjax.bijections import Chain
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .. import _check
from .._columns import AbstractColumnwise

ROOM = 0.4
"""Share of a step, to either side, that the low digits may take."""
RADIUS = 8.0
"""Where normal coordinates are cut off; beyond it lies a probability of 1.2e-15."""


class Staircase(eqx.Module):
    r"""Round to the nearest step, by short ramps: continuous, piecewise linear.

    Steps are the multiples of ``step``, counted from ``offset``, up to the first one
    that is at least ``bound`` away; there it levels off. Half-way between two steps a
    ramp of width ``ramp * step`` joins them, so that the result is never further than
    half a step from the input.

    Args:
        step: Distance of two steps.
        ramp: Width of a ramp as a share of the step, at most 0.1.
        bound: How far from ``offset`` inputs reach.
        offset: Where one of the steps lies.
        dtype: Floating dtype; JAX's default by default.

    Raises:
        ValueError: If a number is out of range.
    """

    step: Float[Array, ""]
    ramp: Float[Array, ""]
    top: Float[Array, ""]
    offset: Float[Array, ""]

    def __init__(
        self,
        step: float,
        *,
        ramp: float,
        bound: float,
        offset: float = 0.0,
        dtype: DTypeLike | None = None,
    ):
        _check.positive(step=step, ramp=ramp, bound=bound)
        if ramp > 0.1:
            raise ValueError(f"expected a ramp of at most 0.1 of a step, got {ramp}")
        self.step, self.ramp, self.top, self.offset = (
            jnp.asarray(value, dtype or float)
            for value in (step, ramp, math.ceil(bound / step), offset)
        )

    def __call__(self, x: Float[Array, "*#n"]) -> Float[Array, "*#n"]:
        """Round each number; cost some ten operations a number."""
        y = jnp.clip((x - self.offset) / self.step, -self.top, self.top)
        nearest = jnp.round(y)
        past = y - nearest  # in [-1/2, 1/2]; on a ramp near either end
        up = jax.nn.relu(jnp.abs(past) - (0.5 - self.ramp / 2)) / self.ramp
        return self.offset + self.step * (nearest + jnp.sign(past) * up)

    def on_ramp(self, x: Float[Array, "*#n"]) -> Array:
        """Whether each number lies on a ramp, where it is not rounded."""
        y = (x - self.offset) / self.step
        past = jnp.abs(y - jnp.round(y))
        return (past > 0.5 - self.ramp / 2) & (jnp.abs(y) < self.top)

    def network(
        self,
    ) -> tuple[Float[Array, " units"], Float[Array, " units"], Float[Array, ""]]:
        """The same function as a network with one hidden layer of ReLU units.

        Returns:
            Thresholds ``a``, weights ``c`` and a constant ``b`` such that the staircase
            is ``b + c @ relu(x - a)``: two units a ramp, ``4 * top`` in all. Only its
            sums round worse, by about ``1 / ramp``.
        """
        top = int(self.top)
        middle = (jnp.arange(-top, top, dtype=self.step.dtype) + 0.5) * self.step
        half = self.ramp * self.step / 2
        thresholds = self.offset + jnp.concatenate([middle - half, middle + half])
        weights = jnp.repeat(jnp.array([1.0, -1.0], self.step.dtype), 2 * top)
        return thresholds, weights / self.ramp, self.offset - self.top * self.step


class ShiftCoupling(AbstractColumnwise):
    r"""A coupling of two halves with a constant scale: :math:`y_a = c\,x_a + t(x_p)`.

    Cost: that of the shift, forward and inverse alike.

    Args:
        shift: Function :math:`t` of the passive half, ``(dim / 2, *batch)`` to the same
            shape; any function will do.
        scale: Constant :math:`c > 0`.
        dim: Number of coordinates, even.
        first: Whether the first half is the active one, in place of the second.
        dtype: Floating dtype of the scale; JAX's default by default.

    Raises:
        ValueError: If the scale is not positive or ``dim`` not even.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    shift: Callable[[Array], Array]
    scale: Float[Array, ""]
    first: bool = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        shift: Callable[[Array], Array],
        scale: float,
        *,
        dim: int = 2,
        first: bool = False,
        dtype: DTypeLike | None = None,
    ):
        _check.positive(scale=scale)
        _check.at_least_one(dim=dim)
        if dim % 2:
            raise ValueError(f"expected an even number of coordinates, got {dim}")
        self.shape, self.shift, self.first = (dim,), shift, first
        self.scale = jnp.asarray(scale, dtype or float)

    def columns(
        self, x: Float[Array, "n *batch"], *, inverse: bool = False
    ) -> tuple[Float[Array, "n *batch"], Float[Array, "*batch"]]:
        """Scale and shift the active half, or undo that; batch axes trail."""
        half = len(x) // 2
        passive, active = (x[half:], x[:half]) if self.first else (x[:half], x[half:])
        shift = self.shift(passive)
        log_det = jnp.broadcast_to(half * jnp.log(self.scale), x.shape[1:])
        if inverse:
            active, log_det = (active - shift) / self.scale, -log_det
        else:
            active = active * self.scale + shift
        parts = (active, passive) if self.first else (passive, active)
        return jnp.concatenate(parts), log_det


class Rings(eqx.Module):
    r"""The uniform law on an annulus, or on half-annuli, as an image of the normal law.

    Two images, to be exact, of :math:`z \sim N(0, I_2)`. :meth:`transport` is polar:
    ring and radius from :math:`z_1`, angle from :math:`z_2`; it jumps where the ring
    changes. With :meth:`marginal` :math:`T` and :meth:`conditional` :math:`S` the point
    :math:`(S(T(z_1), z_2), T(z_1))` has the same law, as in the rearrangement of Knothe
    and Rosenblatt; :math:`T` comes from a table. All work number by number.

    Args:
        inner: Radius of the hole.
        outer: Outer radius.
        centres: Centre ``(x, y)`` of each ring; the rings must not touch.
        sides: For each ring: 1 for its upper half, -1 for its lower one, 0 for all.

    Raises:
        ValueError: If the radii are not ``0 < inner < outer``, there are not as many
            sides as centres, or whole and half rings are mixed.
    """

    inner: float = eqx.field(static=True)
    outer: float = eqx.field(static=True)
    centres: tuple[tuple[float, float], ...] = eqx.field(static=True)
    sides: tuple[int, ...] = eqx.field(static=True)

    def __check_init__(self):
        """Raise ``ValueError`` unless the rings make sense."""
        if not 0 < self.inner < self.outer:
            raise ValueError(
                f"expected 0 < inner < outer, got {self.inner, self.outer}"
            )
        kinds = {abs(side) for side in self.sides}
        if len(self.sides) != len(self.centres) or kinds not in ({0}, {1}):
            raise ValueError(
                "expected a side for each centre, all 0 or all 1 and -1, got "
                f"{self.sides} for {len(self.centres)} centres"
            )

    @property
    def bound(self) -> float:
        """A number that no coordinate exceeds."""
        return max(max(map(abs, centre)) for centre in self.centres) + self.outer

    @property
    def area(self) -> float:
        """Area of the support; the density is one over it, the entropy its log."""
        whole = math.pi * (self.outer**2 - self.inner**2) * len(self.centres)
        return whole / 2 if self.sides[0] else whole

    def transport(
        self, first: Float[Array, "*#n"], second: Float[Array, "*#n"]
    ) -> tuple[Float[Array, "*#n"], Float[Array, "*#n"]]:
        """The polar image: ring and radius from ``first``, angle from ``second``."""
        n_rings = len(self.centres)
        cuts = ndtri(jnp.arange(1, n_rings, dtype=first.dtype) / n_rings)
        ring = jnp.sum(first[..., None] > cuts, axis=-1)
        square = self.outer**2 - self.inner**2
        share = jnp.clip(ndtr(first) * n_rings - ring, 0, 1)
        radius = jnp.sqrt(self.inner**2 + share * square)
        angle = (math.pi if self.sides[0] else 2 * math.pi) * ndtr(second)
        centres = jnp.asarray(self.centres, first.dtype)[ring]
        side = jnp.asarray([side or 1 for side in self.sides], first.dtype)[ring]
        return (
            centres[..., 0] + radius * jnp.cos(angle),
            centres[..., 1] + side * radius * jnp.sin(angle),
        )

    def marginal(self, first: Float[Array, "*#n"]) -> Float[Array, "*#n"]:
        """The second coordinate: the quantile of its law at the rank of ``first``."""
        heights, ranks = (jnp.asarray(a, first.dtype) for a in self._table())
        return jnp.interp(ndtr(first), ranks, heights)

    def conditional(
        self, height: Float[Array, "*#n"], second: Float[Array, "*#n"]
    ) -> Float[Array, "*#n"]:
        """The first coordinate, given the second: uniform on a few intervals."""
        left, lengths = self._intervals(height, jnp)
        before = jnp.cumsum(lengths, axis=0)
        at = ndtr(second) * before[-1]
        piece = jnp.minimum(jnp.sum(at >= before, axis=0), len(before) - 1)[None]
        left, lengths, before = (
            jnp.take_along_axis(a, piece, axis=0)[0] for a in (left, lengths, before)
        )
        return left + jnp.clip(at - before + lengths, 0, lengths)

    def sample(self, key: PRNGKeyArray, n: int) -> Float[Array, "n 2"]:
        """Draw ``n`` rows, by the polar image."""
        return jnp.stack(self.transport(*jr.normal(key, (2, n))), axis=1)

    def _intervals(self, height, xp):
        """Left ends and lengths of what a horizontal line meets, ``(2 k, *n)``."""
        lefts, lengths = [], []
        for (x, y), side in zip(self.centres, self.sides, strict=True):
            squares = (r**2 - (height - y) ** 2 for r in (self.outer, self.inner))
            far, near = (  # a root of 0 has no derivative
                xp.sqrt(xp.where(s > 0, s, 1)) * (s > 0) for s in squares
            )
            inside = 1 if side == 0 else side * (height - y) >= 0
            lefts += [x - far, x + near]
            lengths += [(far - near) * inside] * 2
        return xp.stack(lefts), xp.stack(lengths)

    def _table(self, size: int = 20_001):
        low = min(y - (s <= 0) * self.outer for (_, y), s in self._placed())
        high = max(y + (s >= 0) * self.outer for (_, y), s in self._placed())
        heights = np.linspace(low, high, size)
        density = self._intervals((heights[1:] + heights[:-1]) / 2, np)[1].sum(axis=0)
        ranks = np.concatenate([[0.0], np.cumsum(density)])
        return heights, ranks / ranks[-1]

    def _placed(self):
        return zip(self.centres, self.sides, strict=True)


def annulus() -> Rings:
    """The uniform law on the annulus with radii 0.5 and 1.2; bound 1.2."""
    return Rings(0.5, 1.2, ((0.0, 0.0),), (0,))


def half_annuli() -> Rings:
    """The uniform law on two interleaving half-annuli, radii 0.7 and 1; bound 1.5."""
    return Rings(0.7, 1.0, ((-0.5, -0.2), (0.5, 0.2)), (1, -1))


class Decode(eqx.Module):
    """Take apart what the first coupling wrote: high digits, and low ones."""

    stairs: Staircase
    scale: Float[Array, ""]

    def __call__(
        self, v: Float[Array, "*#n"]
    ) -> tuple[Float[Array, "*#n"], Float[Array, "*#n"]]:
        """High digits: the step. Low ones: the rest over the scale, cut off."""
        high = self.stairs(v)
        return high, jnp.clip((v - high) / self.scale, -RADIUS, RADIUS)


class Write(eqx.Module):
    """Shift of the second of three couplings: one image rounded, the other below."""

    decode: Decode
    stairs: Staircase
    transport: Callable[[Array, Array], tuple[Array, Array]]
    bound: float = eqx.field(static=True)

    def __call__(self, v: Float[Array, "*#n"]) -> Float[Array, "*#n"]:
        """Read both halves out of ``v``, transport them, and write both images."""
        first, second = self.transport(*self.decode(v))
        return self.stairs(first) + ROOM * self.stairs.step * second / self.bound


class Lift(eqx.Module):
    """Shift of the third: the low digits, brought up; the high ones thrown away."""

    stairs: Staircase
    bound: float = eqx.field(static=True)

    def __call__(self, u: Float[Array, "*#n"]) -> Float[Array, "*#n"]:
        """Read the second image out of ``u``."""
        return self.bound * (u - self.stairs(u)) / (ROOM * self.stairs.step)


class Pick(eqx.Module):
    """Shift of the second of two couplings: a point of the conditional law."""

    decode: Decode
    conditional: Callable[[Array, Array], Array]

    def __call__(self, v: Float[Array, "*#n"]) -> Float[Array, "*#n"]:
        """Read height and noise out of ``v``, and give the conditional's quantile."""
        return self.conditional(*self.decode(v))


class Hide(eqx.Module):
    """Shift of the first of two couplings: the marginal's quantile, rounded."""

    stairs: Staircase
    marginal: Callable[[Array], Array]

    def __call__(self, z: Float[Array, "*#n"]) -> Float[Array, "*#n"]:
        """Round the image of ``z``."""
        return self.stairs(self.marginal(z))


def least_epsilon(bound: float, dtype: DTypeLike | None = None) -> float:
    r"""The smallest step for three couplings: below it rounding swallows a coordinate.

    At :math:`B \sqrt{10\,\mathrm{eps}}` what the second coupling keeps of its active
    half, at most :math:`\epsilon^2 / 10 B`, is one unit in the last place of the rest:
    1.1e-3 times the bound in float32, 4.7e-8 times in float64. The inverse is of no use
    long before: its error is some :math:`10^3\,\mathrm{eps}/\epsilon^3`.

    Args:
        bound: Bound of the target's coordinates.
        dtype: Floating dtype; JAX's default by default.
    """
    return bound * math.sqrt(10 * float(jnp.finfo(jnp.dtype(dtype or float)).eps))


def three_couplings(
    transport: Callable[[Array, Array], tuple[Array, Array]],
    epsilon: float,
    *,
    bound: float,
    dim: int = 2,
    ramp: float | None = None,
    offset: float = 0.0,
    dtype: DTypeLike | None = None,
) -> Chain:
    r"""Three affine couplings that carry :math:`N(0, I)` near the law of a transport.

    With :math:`Z = 8`, scales :math:`\delta = 0.4\epsilon/Z`,
    :math:`\eta = 0.1\epsilon^2/BZ` and :math:`\nu = \epsilon/2Z`. For
    :math:`\lvert z_i\rvert \le Z`, and where no number lies on a ramp, each coordinate
    of the image is within :math:`\epsilon` of :math:`\varphi(\hat z)`, where
    :math:`\hat z` is :math:`z` with the first half rounded to the step
    :math:`\epsilon`. The log-determinant is
    :math:`\tfrac{\mathrm{dim}}{2}\log\delta\eta\nu` everywhere.

    Cost: an evaluation of the transport, forward and inverse alike.

    Args:
        transport: Function :math:`\varphi`: takes both halves of a latent point, each
            ``(dim / 2, *batch)``, to both halves of a point of the target. A function
            of numbers, such as :meth:`Rings.transport`, acts on each pair
            :math:`(x_i, x_{i + \mathrm{dim}/2})` by itself.
        epsilon: The step :math:`\epsilon`, at most half of ``bound`` and of
            :data:`RADIUS`, and at least :func:`least_epsilon`.
        bound: :math:`B`, not exceeded by any coordinate of the transport.
        dim: Number of coordinates, even.
        ramp: Width of the ramps as a share of the step; by default
            :math:`\epsilon^2 / 100`, at most 0.1.
        offset: Where one step of the output's staircase lies.
        dtype: Floating dtype of the constants; JAX's default by default.

    Returns:
        The map from latent points to data, a ``Chain`` of three
        :class:`ShiftCoupling`, of events of shape ``(dim,)``.

    Raises:
        ValueError: If a number is out of range.
    """
    ramp = _check_step(epsilon, bound, ramp)
    least = least_epsilon(bound, dtype)
    if epsilon < least:
        raise ValueError(
            f"expected epsilon >= {least:.2g} for a bound of {bound:g} in "
            f"{jnp.dtype(dtype or float)} (below, rounding swallows what the second "
            f"coupling keeps), got {epsilon:g}; float64 has room for more digits"
        )
    hide, out = (
        Staircase(epsilon, ramp=ramp, bound=reach, offset=at, dtype=dtype)
        for reach, at in ((RADIUS, 0.0), (bound + abs(offset), offset))
    )
    delta = ROOM * epsilon / RADIUS
    eta, nu = 0.1 * epsilon**2 / (bound * RADIUS), epsilon / (2 * RADIUS)
    decode = Decode(hide, jnp.asarray(delta, hide.step.dtype))
    write = Write(decode, out, transport, bound)
    return Chain(
        [
            ShiftCoupling(hide, delta, dim=dim, dtype=dtype),
            ShiftCoupling(write, eta, dim=dim, first=True, dtype=dtype),
            ShiftCoupling(Lift(out, bound), nu, dim=dim, dtype=dtype),
        ]
    )


def two_couplings(
    marginal: Callable[[Array], Array],
    conditional: Callable[[Array, Array], Array],
    epsilon: float,
    *,
    bound: float,
    dim: int = 2,
    ramp: float | None = None,
    offset: float = 0.0,
    dtype: DTypeLike | None = None,
) -> Chain:
    r"""Two affine couplings that carry :math:`N(0, I)` near a bounded law.

    With :math:`\delta = 0.4\epsilon/Z` and :math:`\eta = \epsilon/Z`, :math:`Z = 8`.
    The first coupling writes :math:`T(z_1)`, rounded, and :math:`z_2` below it; the
    second :math:`S` of both. For :math:`\lvert z_i\rvert \le Z`, and where no number
    lies on a ramp, the image is within :math:`\epsilon` of
    :math:`(S(\hat y, z_2), y)` in each coordinate, with :math:`y = T(z_1)` and
    :math:`\hat y` its rounding.

    Args:
        marginal: Function :math:`T` that carries :math:`N(0, I)` to the law of the
            second half, ``(dim / 2, *batch)`` to the same shape.
        conditional: Function :math:`S`: given the second half, carries
            :math:`N(0, I)` to the conditional law of the first.
        epsilon: The step :math:`\epsilon`, at most half of ``bound`` and of
            :data:`RADIUS`.
        bound: :math:`B`, not exceeded by any coordinate of the marginal.
        dim: Number of coordinates, even.
        ramp: Width of the ramps as a share of the step, as for
            :func:`three_couplings`.
        offset: Where one step of the staircase lies.
        dtype: Floating dtype of the constants; JAX's default by default.

    Returns:
        The map from latent points to data, a ``Chain`` of two :class:`ShiftCoupling`.

    Raises:
        ValueError: If a number is out of range.
    """
    ramp = _check_step(epsilon, bound, ramp)
    reach = bound + abs(offset)
    stairs = Staircase(epsilon, ramp=ramp, bound=reach, offset=offset, dtype=dtype)
    delta = ROOM * epsilon / RADIUS
    decode = Decode(stairs, jnp.asarray(delta, stairs.step.dtype))
    pick = Pick(decode, conditional)
    return Chain(
        [
            ShiftCoupling(Hide(stairs, marginal), delta, dim=dim, dtype=dtype),
            ShiftCoupling(pick, epsilon / RADIUS, dim=dim, first=True, dtype=dtype),
        ]
    )


def _check_step(epsilon: float, bound: float, ramp: float | None) -> float:
    """Check the step; the ramp, or the usual one."""
    _check.positive(epsilon=epsilon, bound=bound)
    if epsilon > min(bound, RADIUS) / 2:
        raise ValueError(
            f"expected epsilon <= {min(bound, RADIUS) / 2:g}, half of the bound "
            f"{bound:g} and of the radius {RADIUS:g}, got {epsilon:g}"
        )
    return min(epsilon**2 / 100, 0.1) if ramp is None else ramp
