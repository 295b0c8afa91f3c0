r"""Coupling layers: transform one part of the coordinates, given the other.

A coupling splits an event into a passive part, which it copies, and an active part,
which it transforms coordinate by coordinate with parameters that a network, the
conditioner, computes from the passive part. The Jacobian is triangular up to the order
of the coordinates, so its log-determinant is a sum; and the inverse evaluates the same
conditioner on the same passive part, so the network is never inverted.

Source: Dinh, Krueger & Bengio (2014); Dinh, Sohl-Dickstein & Bengio (2017).
"""

import math
from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox import AbstractVar
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray
from paramax.utils import inv_softplus

from . import _check, masks, spline
from ._columns import AbstractColumnwise

_RAW_UNIT_SCALE = math.log(math.expm1(1.0))


class AbstractCoupling(AbstractColumnwise):
    """What all couplings share: split by a mask, condition, transform, merge.

    To write one, define the fields, build the conditioner with as many outputs as
    ``n_active * parameters per coordinate``, and implement :meth:`_forward` and
    :meth:`_inverse` on the active coordinates, and :meth:`_from_marginals` for
    :meth:`from_data`. Parameters of zero must give the identity: ``identity_init``
    relies on it.
    """

    shape: AbstractVar[tuple[int, ...]]
    active: AbstractVar[tuple[int, ...]]
    conditioner: AbstractVar[eqx.nn.MLP]

    @abstractmethod
    def _forward(
        self, x: Float[Array, "active *batch"], *theta: Float[Array, "_ active *batch"]
    ) -> tuple[Float[Array, "active *batch"], Float[Array, "active *batch"]]:
        """Transformed active coordinates and the log-derivative of each."""

    @abstractmethod
    def _inverse(
        self, y: Float[Array, "active *batch"], *theta: Float[Array, "_ active *batch"]
    ) -> tuple[Float[Array, "active *batch"], Float[Array, "active *batch"]]:
        """Preimages of the active coordinates and the log-derivative of each."""

    @abstractmethod
    def _sizes(self) -> tuple[int, ...]:
        """How many parameters of a coordinate each of the arrays ``theta`` holds."""

    @abstractmethod
    def _from_marginals(self, x: Float[Array, "n active"]) -> Float[Array, "p active"]:
        """Parameters that bring each column of ``x`` closest to a standard normal."""

    def from_data(self, x: Float[Array, "n ..."]) -> "AbstractCoupling":
        """The coupling that Gaussianizes each active coordinate of a batch by itself.

        The last layer of its conditioner has a kernel of zeros, so that the parameters
        are the same wherever the passive part is, and a bias that fits them to the
        marginals: an additive coupling takes the means away, an affine one also makes
        the variances 1, a spline maps quantiles to those of the normal distribution.
        Hidden layers stay as they are.

        Args:
            x: Batch of events, shape ``(n, *shape)`` with ``n >= 2``.

        Raises:
            ValueError: If the batch has another shape or fewer than two events.
            RuntimeError: If an active coordinate is constant
                (``EquinoxRuntimeError`` under jit).
        """
        _check.events(x, self.shape)
        active = x.reshape(len(x), -1)[:, np.array(self.active)]
        low, high = active.min(axis=0), active.max(axis=0)
        active = eqx.error_if(
            active,
            # differences of pure rounding are no spread
            high - low <= 10 * jnp.finfo(x.dtype).eps * jnp.maximum(high, -low),
            "coupling: expected every active coordinate to vary over the batch, got "
            "a constant one: no monotone map makes it Gaussian",
        )
        last = self.conditioner.layers[-1]
        bias = self._from_marginals(active).T.ravel().astype(last.weight.dtype)
        return eqx.tree_at(
            lambda layer: (
                layer.conditioner.layers[-1].weight,
                layer.conditioner.layers[-1].bias,
            ),
            self,
            (jnp.zeros_like(last.weight), bias),
        )

    @property
    def mask(self) -> masks.Mask:
        """The mask this coupling was built with, True = active."""
        mask = np.zeros(math.prod(self.shape), dtype=bool)
        mask[list(self.active)] = True
        return mask.reshape(self.shape)

    def columns(
        self, x: Float[Array, "..."], *, inverse: bool = False
    ) -> tuple[Float[Array, "..."], Float[Array, "*batch"]]:
        """Transform the active part given the passive part, or undo that.

        The passive part is the same on both sides.

        Args:
            x: Events of shape ``(*shape, *batch)``.
            inverse: Whether to apply the inverse.

        Returns:
            Events of the same shape, and their log-determinants of shape ``batch``.
        """
        batch = x.shape[len(self.shape) :]
        passive, active = _split(x.reshape(-1, *batch), self.active)
        transformer = self._inverse if inverse else self._forward
        active, log_derivative = transformer(active, *self._condition(passive))
        merged = _merge(passive, active, self.active)
        return merged.reshape(x.shape), log_derivative.sum(axis=0)

    def _condition(self, passive: Float[Array, "passive *batch"]) -> list[Array]:
        """The conditioner's parameters, each of shape (size, active, *batch).

        That is ``self.conditioner`` on columns. The last layer is applied in parts: to
        slice its rows costs less than to slice what it makes of a batch, and to put the
        gradient together again.
        """
        *hidden, last = self.conditioner.layers
        for layer in hidden:
            passive = _linear(layer.weight, layer.bias, passive)
            passive = self.conditioner.activation(passive)
        n_active, found, start = len(self.active), [], 0
        weight = last.weight.reshape(n_active, -1, last.weight.shape[1]).swapaxes(0, 1)
        bias = None if last.bias is None else last.bias.reshape(n_active, -1).T
        for size in self._sizes():
            part = slice(start, start := start + size)
            rows = weight[part].reshape(size * n_active, -1)
            theta = _linear(rows, None if bias is None else bias[part].ravel(), passive)
            found.append(theta.reshape(size, n_active, *passive.shape[1:]))
        return found


class AffineCoupling(AbstractCoupling):
    r"""Affine coupling: :math:`y = x\, s + t` on the active part.

    Scale :math:`s > 0` and shift :math:`t` are functions of the passive part. By
    default :math:`s = \operatorname{softplus}(r + r_1)` with :math:`r` the network's
    output and :math:`r_1` such that :math:`r = 0` gives 1, as in flowjax: the scale
    grows at most linearly in :math:`r`. With ``log_scale_bound`` :math:`B` it is
    :math:`s = e^{B \tanh(r / B)}`, which never leaves :math:`(e^{-B}, e^{B})`.

    Without a bound the scale has none either: where the network's output falls below
    about -100 (float32) or -700 (float64) it underflows and the inverse overflows.

    Cost per event: one pass of the conditioner, forward and inverse alike. Where few
    layers must do, :class:`RQSplineCoupling` bends more per layer.

    Args:
        key: JAX random key of the conditioner.
        shape: Event shape, at least two coordinates in all.
        mask: Boolean mask of the event's shape, True = active; by default the second
            half of a vector (:func:`gauss_flows.masks.half`).
        nn_width: Width of the conditioner's hidden layers.
        nn_depth: Number of its hidden layers; 0 makes it linear.
        log_scale_bound: Bound on the absolute log-scale, or None for softplus.
        identity_init: Start at the identity, by a zero last layer of the conditioner.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If an argument is out of range or the mask does not fit.

    Source:
        Dinh, Sohl-Dickstein & Bengio (2017), equations 7 and 8.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    active: tuple[int, ...] = eqx.field(static=True)
    conditioner: eqx.nn.MLP
    log_scale_bound: float | None = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, ...],
        mask: masks.Mask | None = None,
        nn_width: int = 24,
        nn_depth: int = 2,
        log_scale_bound: float | None = None,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        if log_scale_bound is not None and not 0 < log_scale_bound < math.inf:
            raise ValueError(
                f"expected a positive log_scale_bound or None, got {log_scale_bound}"
            )
        self.shape = shape
        self.active = _active(mask, shape)
        self.conditioner = _conditioner(
            key, shape, self.active, 2, nn_width, nn_depth, identity_init, dtype
        )
        self.log_scale_bound = log_scale_bound

    def _scale(self, raw: Float[Array, "*n"]) -> tuple[Array, Array]:
        if self.log_scale_bound is None:
            raw = raw + _RAW_UNIT_SCALE
            return jax.nn.softplus(raw), _log_softplus(raw)
        log_scale = self.log_scale_bound * jnp.tanh(raw / self.log_scale_bound)
        return jnp.exp(log_scale), log_scale

    def _sizes(self):
        return 1, 1

    def _forward(self, x, shift, raw):
        scale, log_scale = self._scale(raw[0])
        return x * scale + shift[0], log_scale

    def _inverse(self, y, shift, raw):
        scale, log_scale = self._scale(raw[0])
        return (y - shift[0]) / scale, -log_scale

    def _from_marginals(self, x):
        scale = 1 / x.std(axis=0)
        if self.log_scale_bound is None:
            raw = inv_softplus(scale) - _RAW_UNIT_SCALE
        else:  # no bound is reached by any raw parameter
            wanted = jnp.log(scale) / self.log_scale_bound
            raw = self.log_scale_bound * jnp.arctanh(jnp.clip(wanted, -0.99, 0.99))
        return jnp.stack([-x.mean(axis=0) * self._scale(raw)[0], raw])


class AdditiveCoupling(AbstractCoupling):
    r"""Additive coupling: :math:`y = x + t` on the active part.

    Volume preserving: the log-determinant is exactly 0 everywhere, so a stack of these
    alone moves probability about without ever making it denser. Unlike an affine
    coupling it is bi-Lipschitz as soon as the conditioner is Lipschitz.

    Cost per event: one pass of the conditioner, forward and inverse alike.

    Args:
        key: JAX random key of the conditioner.
        shape: Event shape, at least two coordinates in all.
        mask: Boolean mask of the event's shape, True = active; by default the second
            half of a vector.
        nn_width: Width of the conditioner's hidden layers.
        nn_depth: Number of its hidden layers; 0 makes it linear.
        identity_init: Start at the identity, by a zero last layer of the conditioner.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If an argument is out of range or the mask does not fit.

    Source:
        Dinh, Krueger & Bengio (2014), "NICE", section 3.2.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    active: tuple[int, ...] = eqx.field(static=True)
    conditioner: eqx.nn.MLP
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, ...],
        mask: masks.Mask | None = None,
        nn_width: int = 24,
        nn_depth: int = 2,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        self.shape = shape
        self.active = _active(mask, shape)
        self.conditioner = _conditioner(
            key, shape, self.active, 1, nn_width, nn_depth, identity_init, dtype
        )

    def _sizes(self):
        return (1,)

    def _forward(self, x, shift):
        return x + shift[0], jnp.zeros_like(x)

    def _inverse(self, y, shift):
        return y - shift[0], jnp.zeros_like(y)

    def _from_marginals(self, x):
        return -x.mean(axis=0)[None]


class RQSplineCoupling(AbstractCoupling):
    r"""Rational-quadratic spline coupling.

    Each active coordinate passes through a monotone spline on ``[-interval, interval]``
    whose bins and slopes are functions of the passive part; outside the interval it is
    copied, so the tails of the flow are those of the base distribution.

    Cost per event: one pass of the conditioner and some tens of operations a bin and
    coordinate; the inverse solves a quadratic in closed form at the same cost.

    Args:
        key: JAX random key of the conditioner.
        shape: Event shape, at least two coordinates in all.
        n_bins: Number of *interior* knots, so that there are ``n_bins + 1`` bins. The
            name and the count are flowjax's (``knots``) and the literature's loose use.
        interval: Half-width of the interval on which the spline acts.
        mask: Boolean mask of the event's shape, True = active; by default the second
            half of a vector.
        nn_width: Width of the conditioner's hidden layers.
        nn_depth: Number of its hidden layers; 0 makes it linear.
        identity_init: Start at the identity, by a zero last layer of the conditioner.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If an argument is out of range or the mask does not fit.

    Source:
        Durkan, Bekasov, Murray & Papamakarios (2019), section 3.1. Their slopes at the
        two ends are fixed at 1; here, as in flowjax, they are free.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    active: tuple[int, ...] = eqx.field(static=True)
    conditioner: eqx.nn.MLP
    interval: float = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, ...],
        n_bins: int = 8,
        interval: float = 4.0,
        mask: masks.Mask | None = None,
        nn_width: int = 24,
        nn_depth: int = 2,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        if n_bins < 1:
            raise ValueError(f"expected n_bins of at least 1, got {n_bins}")
        if not (n_bins + 1) * spline.MIN_WIDTH < 2 * interval < math.inf:
            raise ValueError(
                "expected a finite interval with room for every bin, at least "
                f"{(n_bins + 1) * spline.MIN_WIDTH / 2}, got {interval}"
            )
        self.shape = shape
        self.active = _active(mask, shape)
        self.conditioner = _conditioner(
            key,
            shape,
            self.active,
            spline.n_parameters(n_bins),
            nn_width,
            nn_depth,
            identity_init,
            dtype,
        )
        self.interval = interval

    def _sizes(self):
        return spline.sizes(self._n_knots())

    def _n_knots(self) -> int:
        return self.conditioner.layers[-1].weight.shape[0] // len(self.active) // 3 - 1

    def _forward(self, x, widths, heights, slopes):
        return spline.forward(x, widths, heights, slopes, self.interval)

    def _inverse(self, y, widths, heights, slopes):
        return spline.inverse(y, widths, heights, slopes, self.interval)

    def _from_marginals(self, x):
        knots = _quantile_knots(x, self._n_knots(), self.interval)
        return spline.from_knots(*knots, self.interval)


def _active(mask: masks.Mask | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Flat indices of the active coordinates."""
    if not shape or min(shape) < 1 or math.prod(shape) < 2:
        raise ValueError(
            f"expected an event shape with at least 2 coordinates, got {shape}"
        )
    if mask is None:
        if len(shape) != 1:
            raise ValueError(f"expected a mask for an event of shape {shape}, got None")
        mask = masks.half(shape[0])
    return tuple(np.flatnonzero(masks.validate(mask, shape)).tolist())


def _conditioner(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    active: tuple[int, ...],
    n_parameters: int,
    width: int,
    depth: int,
    identity_init: bool,
    dtype: DTypeLike | None,
) -> eqx.nn.MLP:
    """The network from the passive part to the parameters of the active one."""
    if width < 1 or depth < 0:
        raise ValueError(
            f"expected nn_width >= 1 and nn_depth >= 0, got {width} and {depth}"
        )
    network = eqx.nn.MLP(
        in_size=math.prod(shape) - len(active),
        out_size=len(active) * n_parameters,
        width_size=width,
        depth=depth,
        dtype=dtype,
        key=key,
    )
    if not identity_init:
        return network
    return eqx.tree_at(
        lambda net: (net.layers[-1].weight, net.layers[-1].bias),
        network,
        replace_fn=jnp.zeros_like,
    )


def _linear(
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None,
    x: Float[Array, "in *batch"],
) -> Float[Array, "out *batch"]:
    y = jnp.tensordot(weight, x, 1)
    return y if bias is None else y + bias.reshape(-1, *(1,) * (x.ndim - 1))


def _split(x: Float[Array, "n *batch"], active: tuple[int, ...]) -> tuple[Array, Array]:
    """Passive and active part; plain slices where the parts are contiguous."""
    passive = _passive(len(x), active)
    return _take(x, passive), _take(x, active)


def _merge(
    passive: Float[Array, "p *batch"],
    active: Float[Array, "a *batch"],
    index: tuple[int, ...],
) -> Float[Array, "n *batch"]:
    order = (*_passive(len(passive) + len(active), index), *index)
    if index[0] == 0 and _contiguous(index):
        return jnp.concatenate([active, passive])
    return _take(jnp.concatenate([passive, active]), tuple(np.argsort(order).tolist()))


def _passive(size: int, active: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(np.setdiff1d(np.arange(size), active).tolist())


def _take(
    x: Float[Array, "n *batch"], index: tuple[int, ...]
) -> Float[Array, "k *batch"]:
    if _contiguous(index):
        return x[index[0] : index[-1] + 1]
    return x.at[np.array(index)].get(unique_indices=True)


def _contiguous(index: tuple[int, ...]) -> bool:
    return index == tuple(range(index[0], index[0] + len(index)))


def _quantile_knots(
    x: Float[Array, "n active"], n_knots: int, interval: float
) -> tuple[Float[Array, "k active"], Float[Array, "k active"], Array]:
    """Quantiles of each column, the normal distribution's, and slopes of that map.

    A slope is the geometric mean of those of the two chords that meet in the knot. The
    outermost chords lead to the ends of the interval, where there may be no data, so
    that the outermost knots take the slope of their inner chord.
    """
    beyond = -jax.scipy.special.ndtri(2 / len(x))  # two events are left, by this height
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
    """log(softplus(raw)), finite where softplus underflows (there it equals raw)."""
    tiny = raw < -20.0
    return jnp.where(tiny, raw, jnp.log(jax.nn.softplus(jnp.where(tiny, 0.0, raw))))
