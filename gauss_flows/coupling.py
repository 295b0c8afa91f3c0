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
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox import AbstractVar
from flowjax.bijections import AbstractBijection
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from . import masks, spline

_RAW_UNIT_SCALE = math.log(math.expm1(1.0))


class AbstractCoupling(AbstractBijection):
    """What all couplings share: split by a mask, condition, transform, merge.

    To write one, define the fields, build the conditioner with as many outputs as
    ``n_active * parameters per coordinate``, and implement :meth:`_forward` and
    :meth:`_inverse` on the active coordinates. Parameters of zero must give the
    identity: ``identity_init`` relies on it.
    """

    shape: AbstractVar[tuple[int, ...]]
    active: AbstractVar[tuple[int, ...]]
    conditioner: AbstractVar[eqx.nn.MLP]

    @abstractmethod
    def _forward(
        self, x: Float[Array, " active"], theta: Float[Array, "active p"]
    ) -> tuple[Float[Array, " active"], Float[Array, " active"]]:
        """Transformed active coordinates and the log-derivative of each."""

    @abstractmethod
    def _inverse(
        self, y: Float[Array, " active"], theta: Float[Array, "active p"]
    ) -> tuple[Float[Array, " active"], Float[Array, " active"]]:
        """Preimages of the active coordinates and the log-derivative of each."""

    @property
    def mask(self) -> masks.Mask:
        """The mask this coupling was built with, True = active."""
        mask = np.zeros(math.prod(self.shape), dtype=bool)
        mask[list(self.active)] = True
        return mask.reshape(self.shape)

    def transform_and_log_det(self, x: Array, condition: Array | None = None):
        """Transform the active part given the passive part.

        Args:
            x: Event of shape ``shape``.
            condition: Unused.

        Returns:
            The transformed event and the scalar log-determinant.
        """
        return self._apply(self._forward, x)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None):
        """Undo the transformation; the passive part is the same on both sides.

        Args:
            y: Event of shape ``shape``.
            condition: Unused.

        Returns:
            The preimage and the scalar log-determinant of the inverse.
        """
        return self._apply(self._inverse, y)

    def _apply(
        self, transformer: Callable, x: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, ""]]:
        passive, active = _split(x.ravel(), self.active)
        theta = self.conditioner(passive).reshape(len(self.active), -1)
        active, log_derivative = transformer(active, theta)
        merged = _merge(passive, active, self.active)
        return merged.reshape(self.shape), log_derivative.sum()


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

    def _scale(self, raw: Float[Array, " n"]) -> tuple[Array, Array]:
        if self.log_scale_bound is None:
            raw = raw + _RAW_UNIT_SCALE
            return jax.nn.softplus(raw), _log_softplus(raw)
        log_scale = self.log_scale_bound * jnp.tanh(raw / self.log_scale_bound)
        return jnp.exp(log_scale), log_scale

    def _forward(self, x, theta):
        scale, log_scale = self._scale(theta[:, 1])
        return x * scale + theta[:, 0], log_scale

    def _inverse(self, y, theta):
        scale, log_scale = self._scale(theta[:, 1])
        return (y - theta[:, 0]) / scale, -log_scale


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

    def _forward(self, x, theta):
        return x + theta[:, 0], jnp.zeros_like(x)

    def _inverse(self, y, theta):
        return y - theta[:, 0], jnp.zeros_like(y)


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

    def _forward(self, x, theta):
        return spline.forward(x, theta, self.interval)

    def _inverse(self, y, theta):
        return spline.inverse(y, theta, self.interval)


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


def _split(x: Float[Array, " n"], active: tuple[int, ...]) -> tuple[Array, Array]:
    """Passive and active part; plain slices where the parts are contiguous."""
    passive = _passive(len(x), active)
    return _take(x, passive), _take(x, active)


def _merge(
    passive: Float[Array, " p"], active: Float[Array, " a"], index: tuple[int, ...]
) -> Float[Array, " n"]:
    order = (*_passive(len(passive) + len(active), index), *index)
    if index[0] == 0 and _contiguous(index):
        return jnp.concatenate([active, passive])
    return _take(jnp.concatenate([passive, active]), tuple(np.argsort(order).tolist()))


def _passive(size: int, active: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(np.setdiff1d(np.arange(size), active).tolist())


def _take(x: Float[Array, " n"], index: tuple[int, ...]) -> Float[Array, " k"]:
    if _contiguous(index):
        return x[index[0] : index[-1] + 1]
    return x.at[np.array(index)].get(unique_indices=True)


def _contiguous(index: tuple[int, ...]) -> bool:
    return index == tuple(range(index[0], index[0] + len(index)))


def _log_softplus(raw: Float[Array, " n"]) -> Float[Array, " n"]:
    """log(softplus(raw)), finite where softplus underflows (there it equals raw)."""
    tiny = raw < -20.0
    return jnp.where(tiny, raw, jnp.log(jax.nn.softplus(jnp.where(tiny, 0.0, raw))))
