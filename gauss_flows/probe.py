"""Measure a flow: gradients block by block, Jacobians, round trips.

Nothing here knows a layer. A function takes any flow, that is a
``flowjax.distributions.Transformed``, or any bijection; a flow is probed along its
normalizing map, from data to latent, and a bijection along its own ``transform``. The
blocks are the elements of the outermost ``Chain`` or ``Scan``, **data side first**.

Gradient norms average over a batch ``x`` of shape ``(n, *event)``. Everything about
Jacobians takes one event; use ``jax.vmap`` for a batch. All functions work under
``jax.jit`` and ``jax.vmap``, in float32 and float64, and compile a ``Scan`` in a time
that does not depend on its depth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.bijections import AbstractBijection, Scan
from flowjax.distributions import AbstractDistribution, Transformed
from jax.core import Tracer
from jaxtyping import Array, Float, Int
from paramax import unwrap

from ._loop import trainable
from .stack import depth_of, elements, normalizing_map, outermost, walk
from .train import negative_log_likelihood

Flow = AbstractDistribution | AbstractBijection
Loss = Callable[[Any, Array], Array]


class GradientNorms(NamedTuple):
    """The gradient's norm and its parts: ``total**2 = sum(blocks**2) + base**2``."""

    total: Float[Array, ""]
    blocks: Float[Array, " n_blocks"]
    base: Float[Array, ""]


def gradient_norms(
    flow: Transformed, x: Float[Array, "n ..."], *, loss: Loss | None = None
) -> GradientNorms:
    """Norms of the gradient of the loss: of all of it, of each block, of the base.

    Trainable is every floating-point array that no ``paramax.NonTrainable`` wraps:
    those of the bijection *and those of the base distribution*, where it has any.
    ``flowjax.distributions.Normal`` does, ``StandardNormal`` does not.

    Cost: one backward pass.

    Args:
        flow: A ``Transformed`` distribution.
        x: Batch of events, shape ``(n, *flow.shape)``, ``n >= 1``.
        loss: ``loss(flow, x)``, a scalar; by default
            :func:`gauss_flows.train.negative_log_likelihood`.

    Raises:
        ValueError: If ``flow`` has no bijection, or the batch is empty, has another
            shape, or holds a NaN or an infinity.
    """
    _check_batch(flow, x)
    normalizing_map(flow)  # a distribution without a bijection raises here
    return _gradient_norms(flow, x, loss or negative_log_likelihood)


def gradient_norm(
    flow: AbstractDistribution, x: Float[Array, "n ..."], *, loss: Loss | None = None
) -> Float[Array, ""]:
    """Euclidean norm of the gradient of the loss over all trainable parameters.

    As :func:`gradient_norms`, but for any distribution.
    """
    _check_batch(flow, x)
    return _norm(_gradient(flow, x, loss or negative_log_likelihood))


def block_gradient_norms(
    flow: Transformed, x: Float[Array, "n ..."], *, loss: Loss | None = None
) -> Float[Array, " n_blocks"]:
    """Norm of the part of the gradient that belongs to each block, data side first.

    See :func:`gradient_norms`.
    """
    return gradient_norms(flow, x, loss=loss).blocks


def state_gradients(
    flow: Transformed, x: Float[Array, "..."]
) -> Float[Array, "n_states ..."]:
    r"""Gradient of ``log p(x)`` in the state between any two blocks: the signal.

    With :math:`h_0 = x` and :math:`h_k` the state after :math:`k` blocks, entry
    :math:`k` is :math:`\partial \log p(x) / \partial h_k`, through the rest of the
    stack and the log-determinants of that rest. It is what the backward pass hands to
    block :math:`k`; how many parameters there are does not enter. The last entry is the
    score of the base distribution, :math:`-z` for a standard normal.

    Args:
        flow: A ``Transformed`` distribution.
        x: One event.

    Returns:
        Shape ``(number of blocks + 1, *event)``, data side first.
    """
    _check_event(flow, x)
    return _state_gradients(flow, x)


@eqx.filter_jit
def _state_gradients(flow: Transformed, x: Array) -> Array:
    flow = unwrap(flow)
    stack = normalizing_map(flow)

    def log_prob(kicks: Array) -> Array:
        def step(carry, block, kick):
            state, log_det = carry
            state, more = block.transform_and_log_det(state)
            return (state + kick, log_det + more.astype(log_det.dtype)), None

        start = (x + kicks[0], jnp.zeros((), x.dtype))
        (z, log_det), _ = walk(step, start, stack, kicks[1:])
        return flow.base_dist.log_prob(z) + log_det

    return jax.grad(log_prob)(jnp.zeros((depth_of(stack) + 1, *x.shape), x.dtype))


def signal_norms(
    flow: Transformed, x: Float[Array, "n ..."]
) -> Float[Array, " n_states"]:
    """Root mean square over a batch of the norms of :func:`state_gradients`."""
    _check_batch(flow, x)
    signals = eqx.filter_vmap(_state_gradients, in_axes=(None, 0))(flow, x)
    squares = signals.reshape(*signals.shape[:2], -1) ** 2
    return jnp.sqrt(squares.sum(axis=2).mean(axis=0))


def parameter_count(flow: Flow) -> int:
    """How many trainable numbers there are, in the base distribution too."""
    return _count(flow)


def block_parameter_counts(flow: Flow) -> Int[np.ndarray, " n_blocks"]:
    """How many of them each block has, data side first."""
    inner, inverted = outermost(normalizing_map(flow))
    if isinstance(inner, Scan):
        depth = depth_of(inner)
        return np.full(depth, _count(inner) // depth)
    counts = np.array([_count(part) for part in elements(inner)])
    return counts[::-1] if inverted else counts


@eqx.filter_jit
def jacobian(flow: Flow, x: Float[Array, "..."]) -> Float[Array, "d d"]:
    """Jacobian of the map at one event; an event of any shape counts as a vector.

    Cost: ``d`` forward passes.
    """
    _check_event(flow, x)
    with jax.default_matmul_precision("highest"):  # a GPU's default keeps 10 bits
        derivative = jax.jacfwd(normalizing_map(flow).transform)(x)
    return derivative.reshape(x.size, x.size)


@eqx.filter_jit
def singular_values(flow: Flow, x: Float[Array, "..."]) -> Float[Array, " d"]:
    r"""Singular values of the Jacobian at one event, largest first.

    Those of a numerical Jacobian carry an error of about ``eps`` times the largest, so
    in a deep stack the small ones would be noise. In two dimensions the smaller is
    therefore :math:`|\det J| / \sigma_{\max}`, with the log-determinant that the
    bijection adds up itself. In more dimensions those below
    :math:`\sqrt{\sigma_{\max} \sigma_{\min}}` come from the product of the blocks'
    inverse Jacobians. That is sound while each block on its own has a condition number
    well below ``1 / eps`` and that of the whole is below ``1 / eps**2``.

    Cost: ``d`` forward passes; for ``d > 2`` also an inverse of a ``d`` by ``d`` matrix
    for each block.
    """
    d = x.size
    values = jnp.linalg.svd(jacobian(flow, x), compute_uv=False)
    if d == 1:
        return values
    if d == 2:
        log_det = normalizing_map(flow).transform_and_log_det(x)[1]
        small = jnp.exp(log_det - jnp.log(values[0])).astype(values.dtype)
        return jnp.stack([values[0], jnp.minimum(small, values[0])])
    small = 1 / jnp.linalg.svd(_inverse_jacobian(flow, x), compute_uv=False)[::-1]
    merged = jnp.where(values**2 >= values[0] * small[-1], values, small)
    return -jnp.sort(-merged)


def condition_number(flow: Flow, x: Float[Array, "..."]) -> Float[Array, ""]:
    """Largest over smallest singular value of the Jacobian at one event, at least 1.

    In float32 it overflows to infinity beyond 3e38.
    """
    values = singular_values(flow, x)
    return values[0] / values[-1]


@eqx.filter_jit
def block_jacobians(flow: Flow, x: Float[Array, "..."]) -> Float[Array, "n_blocks d d"]:
    """Jacobian of each block where the event meets it, data side first.

    Their product, the last one leftmost, is the :func:`jacobian` of the whole.
    """
    _check_event(flow, x)

    def step(state, block, _):
        return block.transform(state), jacobian(block, state)

    return walk(step, x, unwrap(normalizing_map(flow)))[1]


@eqx.filter_jit
def block_singular_values(
    flow: Flow, x: Float[Array, "..."]
) -> Float[Array, "n_blocks d"]:
    """Singular values of each block's Jacobian, where the event meets that block."""
    _check_event(flow, x)

    def step(state, block, _):
        return block.transform(state), singular_values(block, state)

    return walk(step, x, unwrap(normalizing_map(flow)))[1]


def product_bounds(
    block_values: Float[Array, "n_blocks d"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""What the blocks' singular values say about those of their composition.

    Returns:
        A lower bound on the smallest, :math:`\prod_k \sigma_{\min}(J_k)`, and an upper
        bound on the largest, :math:`\prod_k \sigma_{\max}(J_k)`. They are attained only
        where the stretched directions of successive blocks line up:
        ``diag(2, 1/2) @ diag(1/2, 2)`` is the identity, and its bounds are 1/4 and 4.

    Source:
        Horn & Johnson (1991), "Topics in Matrix Analysis", theorem 3.3.4.
    """
    logs = jnp.log(block_values)
    return jnp.exp(logs.min(axis=1).sum()), jnp.exp(logs.max(axis=1).sum())


@eqx.filter_jit
def round_trip_error(flow: Flow, x: Float[Array, "..."]) -> Float[Array, ""]:
    """Largest absolute difference between an event and the inverse of its image."""
    _check_event(flow, x)
    stack = normalizing_map(flow)
    return jnp.max(jnp.abs(stack.inverse(stack.transform(x)) - x))


def lipschitz_lower_bound(
    function: Callable[[Array], Array] | AbstractBijection, xs: Float[Array, "n ..."]
) -> Float[Array, ""]:
    """Largest Jacobian norm of a function among the events ``xs``.

    A **lower** bound on its Lipschitz constant: between the samples the function may be
    steeper. Never use it to certify a contraction.

    Args:
        function: A function of one event, or a bijection, which stands for its
            ``transform``.
        xs: Batch of events where to look.
    """
    if xs.ndim < 1 or not len(xs):
        raise ValueError(f"expected at least one event, got shape {xs.shape}")
    f = function.transform if isinstance(function, AbstractBijection) else function

    def norm(x: Array) -> Array:
        return jnp.linalg.norm(jax.jacfwd(f)(x).reshape(-1, x.size), ord=2)

    with jax.default_matmul_precision("highest"):
        return jnp.max(jax.vmap(norm)(xs))


def _inverse_jacobian(flow: Flow, x: Array) -> Array:
    def step(carry, block, _):
        state, inverse = carry
        factor = jnp.linalg.inv(jacobian(block, state))
        return (block.transform(state), inverse @ factor), None

    with jax.default_matmul_precision("highest"):
        start = (x, jnp.eye(x.size, dtype=x.dtype))
        return walk(step, start, unwrap(normalizing_map(flow)))[0][1]


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(trainable(tree)[0]))


@eqx.filter_jit
def _gradient(flow: AbstractDistribution, x: Array, loss: Loss) -> Any:
    parameters, rest = trainable(flow)
    return jax.grad(lambda p: loss(eqx.combine(p, rest), x))(parameters)


@eqx.filter_jit
def _gradient_norms(flow: Transformed, x: Array, loss: Loss) -> GradientNorms:
    gradient = _gradient(flow, x, loss)
    inner, inverted = outermost(normalizing_map(gradient))
    if isinstance(inner, Scan):
        leaves = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(inner)]
        none = jnp.zeros((depth_of(normalizing_map(flow)), 1), x.dtype)  # if frozen
        blocks = jnp.linalg.norm(jnp.hstack(leaves or [none]), axis=1)
    else:
        blocks = jnp.stack([_norm(part) for part in elements(inner)])
    blocks = blocks[::-1] if inverted else blocks
    return GradientNorms(_norm(gradient), blocks, _norm(gradient.base_dist))


def _norm(tree: Any) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def _check_batch(flow: AbstractDistribution, x: Array) -> None:
    if not isinstance(flow, AbstractDistribution):
        raise ValueError(
            f"expected a distribution, whose density has a gradient, got {type(flow)}"
        )
    shape = unwrap(flow).shape
    if x.ndim < 1 or x.shape[1:] != shape or not len(x):
        raise ValueError(
            f"expected a batch of events of shape {shape}, that is {('n', *shape)} "
            f"with n >= 1, got shape {x.shape}"
        )
    if not isinstance(x, Tracer) and not np.isfinite(x).all():
        raise ValueError("expected finite data, got a NaN or an infinity")


def _check_event(flow: Flow, x: Array) -> None:
    shape = unwrap(flow).shape
    if x.shape != shape:
        raise ValueError(
            f"expected one event of shape {shape}, got shape {x.shape}; "
            "use jax.vmap for a batch"
        )
