"""Flows of residual maps: build, train by estimated log-determinants, certify."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import paramax
from flowjax.bijections import AbstractBijection, Chain, Invert, Scan
from flowjax.distributions import AbstractDistribution, StandardNormal, Transformed
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, PyTree

from . import spectral
from .actnorm import ActNorm
from .log_det import AbstractEstimator
from .memory import Stack
from .residual import BanachResult, ResidualMap, banach_inverse
from .stack import depth_of, normalizing_map, walk


def residual_flow(
    key: PRNGKeyArray,
    *,
    shape: tuple[int, ...],
    depth: int,
    lipschitz: float = 0.9,
    nn_width: int = 24,
    nn_depth: int = 2,
    actnorm: bool = False,
    inverse: Callable[..., BanachResult] = banach_inverse,
    base: AbstractDistribution | None = None,
    memory: str = "store",
    dtype: DTypeLike | None = None,
) -> Transformed:
    r"""A stack of residual maps over a base distribution, scanned over depth.

    Each block is [ActNorm,] ``x + g(x)``, with ``g`` a network whose norms are held at
    every use: no step of an optimiser and no weights from a file can break the bound.
    ``log_prob`` is exact. Where that is too dear to train by, see
    :class:`EstimatedLikelihood`.

    Cost: a log-density takes ``prod(shape)`` derivatives of ``g`` and a determinant a
    block, a sample takes some tens of evaluations of ``g`` a block.

    Args:
        key: JAX random key, split over blocks.
        shape: Event shape: ``(dim,)`` for vectors with dense networks, or ``(height,
            width, channels)`` for small pictures with convolutions.
        depth: Number of blocks, at least 1.
        lipschitz: Bound on the Lipschitz constant of each network, in (0, 1).
        nn_width: Width of the networks' hidden layers.
        nn_depth: Number of hidden layers; dense networks only.
        actnorm: Put an :class:`~gauss_flows.ActNorm` in front of each block. Without it
            a block changes lengths by a factor between ``1 - lipschitz`` and
            ``1 + lipschitz`` only.
        inverse: ``banach_inverse`` or ``newton_inverse``.
        base: Base distribution of the event's shape; standard normal by default.
        memory: What to keep for the backward pass: ``"store"`` or ``"recompute"``, see
            :class:`~gauss_flows.memory.Stack`.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Returns:
        The flow, a distribution over events of shape ``shape``.

    Raises:
        ValueError: If an argument is out of range, or shapes do not match.

    Source:
        Chen, Behrmann, Duvenaud & Jacobsen (2019), "Residual flows".

    Example:
        >>> import jax.random as jr
        >>> flow = residual_flow(jr.key(0), shape=(2,), depth=4, lipschitz=0.9)
        >>> flow.log_prob(jnp.zeros((5, 2))).shape
        (5,)
    """
    if depth < 1:
        raise ValueError(f"expected depth of at least 1, got {depth}")
    if memory not in ("store", "recompute"):
        raise ValueError(f"expected memory 'store' or 'recompute', got {memory!r}")
    base = StandardNormal(shape) if base is None else base
    if base.shape != shape:
        raise ValueError(
            f"expected a base distribution of shape {shape}, got shape {base.shape}"
        )
    options = {"width": nn_width, "lipschitz": lipschitz, "dtype": dtype}
    network: Callable
    if len(shape) == 1:
        network = functools.partial(
            spectral.LipschitzMLP, dim=shape[0], depth=nn_depth, **options
        )
    elif len(shape) == 3:
        network = functools.partial(spectral.LipschitzConvNet, shape=shape, **options)
    else:
        raise ValueError(f"expected an event shape of 1 or 3 axes, got {shape}")

    def block(key: PRNGKeyArray) -> AbstractBijection:
        bend = ResidualMap(
            network(key), shape=shape, lipschitz=lipschitz, inverse=inverse
        )
        return Chain([ActNorm(shape, dtype=dtype), bend]) if actnorm else bend

    stacked = eqx.filter_vmap(block)(jr.split(key, depth))
    return Transformed(base, Invert(Stack(stacked, memory=memory)))


class EstimatedLikelihood(eqx.Module):
    """A loss for :func:`gauss_flows.fit`: likelihood with estimated log-determinants.

    It is ``loss(flow, batch, key)``, minus the mean log-density of the batch, with the
    log-determinant of each :class:`~gauss_flows.ResidualMap` estimated and those of all
    other layers exact. Its value is an estimate of the loss and its gradient one of the
    gradient, both without bias if the estimator has none; other implementations report
    a surrogate. Judge a trained flow by its ``log_prob`` all the same: that is exact.

    Args:
        estimator: :class:`~gauss_flows.log_det.Roulette` or ``Truncated``.
    """

    estimator: AbstractEstimator

    def __call__(
        self, flow: Transformed, x: Float[Array, "n ..."], key: PRNGKeyArray
    ) -> Float[Array, ""]:
        """The estimate for one batch.

        Args:
            flow: A flow whose normalizing map is made of ``Chain``, ``Scan`` and maps
                from data to latent.
            x: Batch of events.
            key: Random key, split over blocks and events.
        """
        flow = paramax.unwrap(flow)
        z, log_det = self._along(normalizing_map(flow), x, key)
        return -(flow.base_dist.log_prob(z).astype(x.dtype) + log_det).mean()

    def _along(self, stack: Any, x: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        def step(carry: tuple, block: Any, key: PRNGKeyArray) -> tuple:
            x, total = carry
            x, log_det = self._pass(block, x, key)
            return (x, total + log_det.astype(x.dtype)), None

        start = (x, jnp.zeros(len(x), x.dtype))
        return walk(step, start, stack, jr.split(key, depth_of(stack)))[0]

    def _pass(self, block: Any, x: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        if isinstance(block, ResidualMap):
            with jax.default_matmul_precision("highest"):
                moved = x + jax.vmap(block.g)(x)
            return moved, self.estimator.log_dets(block.g, x, key)
        if isinstance(block, Chain | Scan):
            return self._along(block, x, key)
        return jax.vmap(block.transform_and_log_det)(x)


def certify(flow: PyTree) -> Float[np.ndarray, " maps"]:
    """Prove, block by block, that each residual map of a flow is a contraction.

    Args:
        flow: A flow, a bijection, or any tree with :class:`~gauss_flows.ResidualMap` in
            it whose networks :func:`gauss_flows.spectral.lipschitz_bound` knows.

    Returns:
        The proven bounds, one a residual map, in the order in which they stand.

    Raises:
        ValueError: If a proven bound exceeds the declared one (the message says where),
            a network is of an unknown kind, or there is no residual map.
    """
    nodes = jax.tree.leaves(flow, is_leaf=lambda a: isinstance(a, ResidualMap))
    maps = [node for node in nodes if isinstance(node, ResidualMap)]
    if not maps:
        raise ValueError(f"expected a flow with residual maps, got {type(flow)}")
    found = []
    for i, node in enumerate(maps):
        try:
            spectral.check_bound(node.g, node.lipschitz)
        except ValueError as error:
            raise ValueError(f"residual map {i} of {len(maps)}: {error}") from error
        found.append(np.ravel(spectral.lipschitz_bound(node.g)))
    return np.concatenate(found)
