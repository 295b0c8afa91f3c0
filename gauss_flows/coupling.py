r"""Coupling layers: transform one part of the coordinates, given the other.

A coupling splits an event into a passive part, which it copies, and an active part,
which it transforms coordinate by coordinate with parameters that a network, the
conditioner, computes from the passive part. The Jacobian is triangular up to the order
of the coordinates, so its log-determinant is a sum; and the inverse evaluates the same
conditioner on the same passive part, so the network is never inverted.

The network's output is rounded relative to the sums inside it, and the two ways may
round it differently. What is made of it is undone all the same; but splines and
mixtures bend by orders of magnitude where a parameter moves by 1, and their
log-determinants there and back agree only while sums are below about 1e4 in float32
and 1e12 in float64.

Source: Dinh, Krueger & Bengio (2014); Dinh, Sohl-Dickstein & Bengio (2017).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox import AbstractVar
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from . import _check, masks, transformers
from ._columns import AbstractColumnwise
from .conditioner import Conditioner

_Coupling = TypeVar("_Coupling")


class AbstractCoupling(AbstractColumnwise):
    """What all couplings share: split by a mask, condition, transform, merge.

    To write one, take a transformer and build the conditioner with as many outputs as
    ``n_active * transformer.n_parameters``.
    """

    shape: AbstractVar[tuple[int, ...]]
    active: AbstractVar[tuple[int, ...]]
    transformer: AbstractVar[transformers.AbstractTransformer]
    conditioner: AbstractVar[Conditioner]

    def from_data(self, x: Float[Array, "n ..."]) -> "AbstractCoupling":
        """The coupling that Gaussianizes each active coordinate of a batch by itself.

        The last layer of its conditioner has a kernel of zeros, so that the parameters
        are the same wherever the passive part is, and a bias that fits them to the
        marginals: an additive coupling takes the means away, an affine one also makes
        the variances 1, a spline maps quantiles to those of the normal distribution,
        a mixture of normal laws is fitted, and one of sigmoids only standardises.
        Hidden layers stay as they are.

        Args:
            x: Batch of events, shape ``(n, *shape)`` with ``n >= 2``.

        Raises:
            ValueError: If the batch has another shape or fewer than two events, or
                fewer than a mixture of normal laws has components.
            RuntimeError: If an active coordinate is constant, or out of the scales
                that a mixture can have (``EquinoxRuntimeError`` under jit).
        """
        _check.events(x, self.shape)
        active = x.reshape(len(x), -1)[:, np.array(self.active)]
        active = _check.varying("coupling", "active coordinate", active)
        bias = self.transformer.from_marginals(active).T.ravel()
        return with_last_layer(
            self, jnp.zeros_like(self.conditioner.layers[-1].weight), bias
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
        map_active = self.transformer.inverse if inverse else self.transformer.forward
        theta = self.conditioner.columns(
            passive, len(self.active), self.transformer.sizes
        )
        active, log_derivative = map_active(active, *theta)
        merged = _merge(passive, active, self.active)
        return merged.reshape(x.shape), log_derivative.sum(axis=0)


class AffineCoupling(AbstractCoupling):
    r"""Affine coupling: :math:`y = x\, s + t` on the active part.

    Scale :math:`s > 0` and shift :math:`t` are functions of the passive part. By
    default :math:`s = \operatorname{softplus}(r + r_1)` with :math:`r` the network's
    output and :math:`r_1` such that :math:`r = 0` gives 1, as in flowjax: the scale
    grows at most linearly in :math:`r`. With ``log_scale_bound`` :math:`B` it is
    :math:`s = e^{B \tanh(r / B)}`, which never leaves :math:`(e^{-B}, e^{B})`.

    Without a bound the scale has none either: where the network's output falls below
    about -100 (float32) or -700 (float64) it underflows and the inverse overflows. The
    gradient of the inverse holds :math:`1/s^2`, which does so from half of that on: at
    -40 (float32) or -350 (float64), and for a larger bound than that too.

    Cost per event: one pass of the conditioner, forward and inverse alike. Where few
    layers must do, :class:`RQSplineCoupling` bends more per layer.

    Args:
        key: JAX random key of the conditioner.
        shape: Event shape, at least two coordinates in all.
        mask: Boolean mask of the event's shape, True = active; by default the second
            half of a vector (:func:`gauss_flows.masks.half`).
        nn_width: Width of the conditioner's hidden layers.
        nn_depth: Number of its hidden layers; 0 makes it linear.
        nn_activation: What acts between its layers.
        nn_residual: Whether its hidden layers after the first are residual.
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
    transformer: transformers.Affine
    conditioner: Conditioner
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, ...],
        mask: masks.Mask | None = None,
        nn_width: int = 24,
        nn_depth: int = 2,
        nn_activation: Callable = jax.nn.relu,
        nn_residual: bool = False,
        log_scale_bound: float | None = None,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        self.shape, self.active = shape, _active(mask, shape)
        self.transformer = transformers.Affine(log_scale_bound)
        self.conditioner = _conditioner(
            key,
            self,
            width=nn_width,
            depth=nn_depth,
            activation=nn_activation,
            residual=nn_residual,
            identity_init=identity_init,
            dtype=dtype,
        )


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
        nn_activation: What acts between its layers.
        nn_residual: Whether its hidden layers after the first are residual.
        identity_init: Start at the identity, by a zero last layer of the conditioner.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If an argument is out of range or the mask does not fit.

    Source:
        Dinh, Krueger & Bengio (2014), "NICE", section 3.2.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    active: tuple[int, ...] = eqx.field(static=True)
    transformer: transformers.Additive
    conditioner: Conditioner
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, ...],
        mask: masks.Mask | None = None,
        nn_width: int = 24,
        nn_depth: int = 2,
        nn_activation: Callable = jax.nn.relu,
        nn_residual: bool = False,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        self.shape, self.active = shape, _active(mask, shape)
        self.transformer = transformers.Additive()
        self.conditioner = _conditioner(
            key,
            self,
            width=nn_width,
            depth=nn_depth,
            activation=nn_activation,
            residual=nn_residual,
            identity_init=identity_init,
            dtype=dtype,
        )


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
        nn_activation: What acts between its layers.
        nn_residual: Whether its hidden layers after the first are residual.
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
    transformer: transformers.RQSpline
    conditioner: Conditioner
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
        nn_activation: Callable = jax.nn.relu,
        nn_residual: bool = False,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        self.shape, self.active = shape, _active(mask, shape)
        self.transformer = transformers.RQSpline(n_bins, interval)
        self.conditioner = _conditioner(
            key,
            self,
            width=nn_width,
            depth=nn_depth,
            activation=nn_activation,
            residual=nn_residual,
            identity_init=identity_init,
            dtype=dtype,
        )


class MixtureCDFCoupling(AbstractCoupling):
    r"""Mixture-CDF coupling: from a mixture of normal laws to the normal one, by rank.

    :math:`y = \Phi^{-1}(\sum_k w_k \Phi((x - \mu_k)/\sigma_k))` on the active part,
    with weights, means and scales of the components as functions of the passive part.
    It acts on the whole line, and is affine far out. With a conditioner whose last
    kernel is zero it is a step of Gaussianization: see :mod:`gauss_flows.rbig`.

    Cost per event: one pass of the conditioner and two distribution functions a
    component and coordinate; the inverse iterates, at some tens of times that. Where
    speed counts or samples are drawn, :class:`RQSplineCoupling` bends as well.

    Args:
        key: JAX random key of the conditioner.
        shape: Event shape, at least two coordinates in all.
        n_components: Number of components.
        mask: Boolean mask of the event's shape, True = active; by default the second
            half of a vector.
        nn_width: Width of the conditioner's hidden layers.
        nn_depth: Number of its hidden layers; 0 makes it linear.
        nn_activation: What acts between its layers.
        nn_residual: Whether its hidden layers after the first are residual.
        identity_init: Start with a zero last layer of the conditioner: the same map for
            all points, *near* the identity. Components that made it exact would
            coincide, get equal gradients, and stay together.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If an argument is out of range or the mask does not fit.

    Source:
        Meng, Song, Song & Ermon (2020), section 3; Ho et al. (2019), "Flow++", section
        3.2, with logistic components.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    active: tuple[int, ...] = eqx.field(static=True)
    transformer: transformers.MixtureCDF
    conditioner: Conditioner
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, ...],
        n_components: int = 8,
        mask: masks.Mask | None = None,
        nn_width: int = 24,
        nn_depth: int = 2,
        nn_activation: Callable = jax.nn.relu,
        nn_residual: bool = False,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        self.shape, self.active = shape, _active(mask, shape)
        self.transformer = transformers.MixtureCDF(n_components)
        self.conditioner = _conditioner(
            key,
            self,
            width=nn_width,
            depth=nn_depth,
            activation=nn_activation,
            residual=nn_residual,
            identity_init=identity_init,
            dtype=dtype,
        )


class DeepSigmoidCoupling(AbstractCoupling):
    r"""Deep-sigmoid coupling: a mixture of sigmoids, and the logit of it.

    :math:`y = \operatorname{logit} \sum_k w_k\, \operatorname{sigmoid}(a_k x + b_k)`
    on the active part, with weights, slopes :math:`a_k > 0` and offsets as functions of
    the passive part. It is :class:`MixtureCDFCoupling` with logistic laws for normal
    ones, and cheaper, for its functions are in closed form. Affine far out.

    Cost per event: one pass of the conditioner and some ten operations a component and
    coordinate; the inverse iterates.

    Args:
        key: JAX random key of the conditioner.
        shape: Event shape, at least two coordinates in all.
        n_components: Number of components.
        mask: Boolean mask of the event's shape, True = active; by default the second
            half of a vector.
        nn_width: Width of the conditioner's hidden layers.
        nn_depth: Number of its hidden layers; 0 makes it linear.
        nn_activation: What acts between its layers.
        nn_residual: Whether its hidden layers after the first are residual.
        identity_init: Start with a zero last layer of the conditioner: the same map for
            all points, *near* the identity. Components that made it exact would
            coincide, get equal gradients, and stay together.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If an argument is out of range or the mask does not fit.

    Source:
        Huang, Krueger, Lacoste & Courville (2018), section 3.1.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    active: tuple[int, ...] = eqx.field(static=True)
    transformer: transformers.DeepSigmoid
    conditioner: Conditioner
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, ...],
        n_components: int = 8,
        mask: masks.Mask | None = None,
        nn_width: int = 24,
        nn_depth: int = 2,
        nn_activation: Callable = jax.nn.relu,
        nn_residual: bool = False,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        self.shape, self.active = shape, _active(mask, shape)
        self.transformer = transformers.DeepSigmoid(n_components)
        self.conditioner = _conditioner(
            key,
            self,
            width=nn_width,
            depth=nn_depth,
            activation=nn_activation,
            residual=nn_residual,
            identity_init=identity_init,
            dtype=dtype,
        )


def with_last_layer(
    coupling: _Coupling, weight: Array | np.ndarray, bias: Array | np.ndarray
) -> _Coupling:
    """The coupling with another last layer of its conditioner, in the old dtype."""

    def last(coupling: Any) -> tuple[Any, Any]:
        layer = coupling.conditioner.layers[-1]
        return layer.weight, layer.bias

    dtype = last(coupling)[0].dtype
    new = jnp.asarray(weight, dtype), jnp.asarray(bias, dtype)
    return eqx.tree_at(last, coupling, new)


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
    key: PRNGKeyArray, layer: AbstractCoupling, **options: Any
) -> Conditioner:
    """The network from the passive part to the parameters of the active one."""
    n_active = len(layer.active)
    return Conditioner(
        key,
        math.prod(layer.shape) - n_active,
        n_active * layer.transformer.n_parameters,
        **options,
    )


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
