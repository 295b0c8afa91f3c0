"""Deep coupling flows: one block, repeated over depth and compiled once.

A flow here is a ``flowjax.distributions.Transformed`` whose bijection is
``Invert(normalizing map)``: the map takes data to the latent space, the direction that
training on samples uses. The map is a ``flowjax.bijections.Scan`` over blocks with
stacked parameters, so that compilation costs one block whatever the depth.

:func:`normalizing_map`, :func:`blocks` and :func:`intermediates` take such flows apart,
and any other flow made of flowjax's ``Chain``, ``Scan`` and ``Invert``.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import paramax
from flowjax.bijections import AbstractBijection, Chain, Invert, Scan
from flowjax.distributions import AbstractDistribution, StandardNormal, Transformed
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, PyTree
from paramax import AbstractUnwrappable

from . import masks
from .actnorm import ActNorm
from .coupling import (
    AdditiveCoupling,
    AffineCoupling,
    DeepSigmoidCoupling,
    MixtureCDFCoupling,
    RQSplineCoupling,
)
from .diagonal import Diagonal
from .linear import HouseholderRotation
from .memory import Stack
from .transformers import AbstractTransformer, MixtureCDF

_COUPLINGS = {
    "affine": AffineCoupling,
    "additive": AdditiveCoupling,
    "spline": RQSplineCoupling,
    "mixture": MixtureCDFCoupling,
    "sigmoid": DeepSigmoidCoupling,
}


def coupling_flow(
    key: PRNGKeyArray,
    *,
    dim: int,
    depth: int,
    coupling: str = "spline",
    n_reflections: int | None = None,
    actnorm: bool = False,
    base: AbstractDistribution | None = None,
    mask: masks.Mask | None = None,
    nn_width: int = 24,
    nn_depth: int = 2,
    identity_init: bool = False,
    memory: str = "store",
    dtype: DTypeLike | None = None,
    **options: Any,
) -> Transformed:
    r"""A stack of coupling blocks over a base distribution.

    Each block is [ActNorm,] rotation, coupling, coupling with the complementary mask:
    one block transforms every coordinate once. In two dimensions, and with
    ``base=Normal(jnp.zeros(2))``, it is number for number the stack of blocks
    [ActNorm,] rotation, coupling, flip, coupling, flip drawn from the same keys.

    Cost: compilation is that of one block; time and memory of a training step grow
    linearly in ``depth``, memory with a factor that ``memory`` sets.

    Args:
        key: JAX random key. It is split over blocks, and each block's key into three:
            rotation, first coupling, second coupling.
        dim: Number of coordinates, at least 2.
        depth: Number of blocks, at least 1; a block has two couplings.
        coupling: Kind of coupling: ``"affine"``, ``"additive"``, ``"spline"``,
            ``"mixture"`` or ``"sigmoid"``.
        n_reflections: Householder reflections in a block's rotation, drawn at random;
            0 leaves the rotation out. The default, ``dim`` rounded down to even,
            turns all coordinates.
        actnorm: Put an :class:`~gauss_flows.ActNorm` in front of each block, at the
            identity; set it from data with :func:`initialize_actnorm`.
        base: Base distribution of shape ``(dim,)``; the standard normal by default,
            with nothing to train in it.
        mask: Mask of each block's first coupling; ``masks.half(dim)`` by default.
        nn_width: Width of the conditioners' hidden layers.
        nn_depth: Number of their hidden layers.
        identity_init: Start every coupling at the identity, or near it as
            :class:`~gauss_flows.MixtureCDFCoupling` says. Rotations are still random.
        memory: What to keep for the backward pass: ``"store"`` everything,
            ``"recompute"`` each block from the state in front of it, or ``"invert"``
            it; see :class:`~gauss_flows.memory.Stack`, and :func:`with_memory` to
            change it later.
        dtype: Floating dtype of the parameters; JAX's default by default.
        **options: Further options of the coupling: ``nn_activation`` and
            ``nn_residual`` for all; ``n_bins`` and ``interval`` for splines,
            ``log_scale_bound`` for affine ones, ``n_components`` for the last two.

    Returns:
        The flow, a distribution over events of shape ``(dim,)``.

    Raises:
        ValueError: If an argument is out of range or unknown, or shapes do not match.

    Example:
        >>> import jax.random as jr
        >>> flow = coupling_flow(jr.key(0), dim=2, depth=8, coupling="affine")
        >>> flow.sample(jr.key(1), (5,)).shape
        (5, 2)
    """
    if coupling not in _COUPLINGS:
        raise ValueError(f"expected coupling in {sorted(_COUPLINGS)}, got {coupling!r}")
    _check_options(coupling, options)
    mask = masks.half(dim) if mask is None else masks.validate(mask, (dim,))
    layer = functools.partial(
        _COUPLINGS[coupling],
        shape=(dim,),
        nn_width=nn_width,
        nn_depth=nn_depth,
        identity_init=identity_init,
        dtype=dtype,
        **options,
    )

    def couplings(*keys: PRNGKeyArray) -> list[AbstractBijection]:
        parts = (mask, masks.complement(mask))
        return [layer(k, mask=part) for k, part in zip(keys, parts, strict=True)]

    return _flow(
        key, couplings, dim, depth, n_reflections, actnorm, base, memory, dtype
    )


def diagonal_flow(
    key: PRNGKeyArray,
    *,
    dim: int,
    depth: int,
    transformer: AbstractTransformer | None = None,
    n_reflections: int | None = None,
    actnorm: bool = False,
    base: AbstractDistribution | None = None,
    memory: str = "store",
    dtype: DTypeLike | None = None,
) -> Transformed:
    r"""A stack of rotations and diagonal layers: a Gaussianization flow.

    Each block is [ActNorm,] rotation, :class:`~gauss_flows.Diagonal`. No network is in
    it: whatever one coordinate learns of another comes through the rotations. But for
    these, it starts at the identity, or near it as
    :class:`~gauss_flows.MixtureCDFCoupling` says; :mod:`gauss_flows.rbig` starts it
    from data.

    Cost: as for :func:`coupling_flow`, without its conditioners. Parameters grow with
    ``dim``, where those of couplings grow with ``dim * nn_width``.

    Args:
        key: JAX random key of the rotations, split over blocks.
        dim: Number of coordinates; one will do.
        depth: Number of blocks, at least 1.
        transformer: Maps of single coordinates; ``MixtureCDF(8)`` by default.
        n_reflections: Householder reflections in a block's rotation; 0 leaves the
            rotation out. By default, ``dim`` rounded down to even.
        actnorm: Put an :class:`~gauss_flows.ActNorm` in front of each block.
        base: Base distribution of shape ``(dim,)``; the standard normal by default.
        memory: What to keep for the backward pass; see :func:`coupling_flow`.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Returns:
        The flow, a distribution over events of shape ``(dim,)``.

    Raises:
        ValueError: If an argument is out of range, or shapes do not match.

    Source:
        Meng, Song, Song & Ermon (2020), section 3.

    Example:
        >>> import jax.random as jr
        >>> flow = diagonal_flow(jr.key(0), dim=2, depth=8)
        >>> flow.log_prob(jnp.zeros((5, 2))).shape
        (5,)
    """
    transformer = MixtureCDF() if transformer is None else transformer

    def diagonal(*_: PRNGKeyArray) -> list[AbstractBijection]:
        return [Diagonal(transformer, (dim,), dtype=dtype)]

    return _flow(key, diagonal, dim, depth, n_reflections, actnorm, base, memory, dtype)


def _flow(
    key: PRNGKeyArray,
    bend: Callable[..., list[AbstractBijection]],
    dim: int,
    depth: int,
    n_reflections: int | None,
    actnorm: bool,
    base: AbstractDistribution | None,
    memory: str,
    dtype: DTypeLike | None,
) -> Transformed:
    """A flow of blocks [ActNorm,] [rotation,] and the layers that ``bend`` makes."""
    if depth < 1:
        raise ValueError(f"expected depth of at least 1, got {depth}")
    base = StandardNormal((dim,)) if base is None else base
    if base.shape != (dim,):
        raise ValueError(
            f"expected a base distribution of shape {(dim,)}, got shape {base.shape}"
        )
    n_reflections = dim - dim % 2 if n_reflections is None else n_reflections

    def block(key: PRNGKeyArray) -> Chain:
        rotation_key, *keys = jr.split(key, 3)
        layers: list[AbstractBijection] = []
        if actnorm:
            layers.append(ActNorm((dim,), dtype=dtype))
        if n_reflections:
            layers.append(
                HouseholderRotation(
                    n_reflections, (dim,), key=rotation_key, dtype=dtype
                )
            )
        return Chain([*layers, *bend(*keys)])

    stacked = eqx.filter_vmap(block)(jr.split(key, depth))
    return Transformed(base, Invert(Stack(stacked, memory=memory)))


def with_memory(
    flow: PyTree,
    memory: str,
    *,
    keep_every: int = 16,
    tolerance: float | None = None,
) -> PyTree:
    """The same flow, keeping something else for its backward pass.

    Args:
        flow: A flow or bijection with a ``Scan`` over blocks.
        memory: ``"store"``, ``"recompute"`` or ``"invert"``.
        keep_every: With ``"invert"``: blocks from one kept state to the next.
        tolerance: With ``"invert"``: the largest drift of a rebuilt state, as
            :class:`~gauss_flows.memory.Stack` measures it.

    Returns:
        The flow with the same parameters.

    Raises:
        ValueError: If an argument is out of range, or the flow holds no ``Scan``.

    Example:
        >>> import jax.random as jr
        >>> flow = coupling_flow(jr.key(0), dim=2, depth=64)
        >>> frugal = with_memory(flow, "invert", keep_every=8)
    """

    def is_scan(node: PyTree) -> bool:
        return isinstance(node, Scan)

    if not any(map(is_scan, jax.tree.leaves(flow, is_leaf=is_scan))):
        raise ValueError("expected a flow with a Scan over blocks, got one without")
    options = {"memory": memory, "keep_every": keep_every, "tolerance": tolerance}
    return jax.tree.map(
        lambda node: Stack(node.bijection, **options) if is_scan(node) else node,
        flow,
        is_leaf=is_scan,
    )


def normalizing_map(
    flow: AbstractDistribution | AbstractBijection,
) -> AbstractBijection:
    """The bijection that takes data to the latent space.

    Args:
        flow: A ``Transformed`` distribution, whose own bijection takes latent to data;
            or a bijection from data to latent, which is returned as it is.

    Raises:
        ValueError: If ``flow`` is a distribution without a bijection.
    """
    if isinstance(flow, AbstractBijection):
        return flow
    if not isinstance(flow, Transformed):
        raise ValueError(
            f"expected a Transformed distribution or a bijection, got {type(flow)}"
        )
    forward = _unfreeze(flow.bijection)
    return (
        _unfreeze(forward.bijection) if isinstance(forward, Invert) else Invert(forward)
    )


def blocks(
    flow: AbstractDistribution | AbstractBijection,
) -> tuple[AbstractBijection, ...]:
    """The blocks of a flow, the one next to the data first.

    Args:
        flow: A flow, or a bijection from data to latent. The elements of its outermost
            ``Chain`` or ``Scan`` are its blocks; anything else is one block.

    Returns:
        Bijections whose composition, first to last, is the normalizing map.

    Example:
        >>> import jax.random as jr
        >>> len(blocks(coupling_flow(jr.key(0), dim=2, depth=3)))
        3
    """
    inner, inverted = outermost(normalizing_map(flow))
    found = tuple(_unfreeze(part) for part in elements(inner))
    return tuple(Invert(block) for block in reversed(found)) if inverted else found


def intermediates(
    flow: AbstractDistribution | AbstractBijection, x: Float[Array, "..."]
) -> Float[Array, "n_states ..."]:
    """Where an event is after 0, 1, ... and all blocks, on its way to the latent space.

    Args:
        flow: A flow, or a bijection from data to latent.
        x: One event; use ``jax.vmap`` for a batch.

    Returns:
        The states, shape ``(number of blocks + 1, *event shape)``: the first is ``x``.
    """

    def step(state: Array, block: AbstractBijection, _: Array) -> tuple[Array, Array]:
        return (after := block.transform(state)), after

    _, states = walk(step, x, normalizing_map(flow))
    return jnp.concatenate([x[None], states])


def walk(
    step: Callable[..., tuple[PyTree, PyTree]],
    init: PyTree,
    bijection: AbstractBijection,
    extra: PyTree = None,
) -> tuple[PyTree, PyTree]:
    """Fold over the blocks of a bijection, the first to act first.

    A ``Scan`` is folded by ``jax.lax.scan``: one block is compiled, whatever the depth.

    Args:
        step: ``carry, out = step(carry, block, item)``.
        init: The first carry.
        bijection: What to walk along.
        extra: Arrays that lead with an axis of blocks; each step gets its slice as
            ``item``.

    Returns:
        The last carry, and the outputs stacked over blocks.
    """
    inner, inverted = outermost(bijection)
    turn: Callable = Invert if inverted else lambda block: block
    extra = jnp.zeros(depth_of(bijection)) if extra is None else extra
    if isinstance(inner, Scan):
        arrays, static = eqx.partition(inner.bijection, eqx.is_array)
        if inverted:
            arrays = jax.tree.map(lambda a: a[::-1], arrays)
        return jax.lax.scan(
            lambda carry, part: step(
                carry, turn(eqx.combine(part[0], static)), part[1]
            ),
            init,
            (arrays, extra),
        )
    carry, outs = init, []
    for i, block in enumerate(elements(inner)[:: -1 if inverted else 1]):
        item = jax.tree.map(lambda a, i=i: a[i], extra)
        carry, out = step(carry, turn(_unfreeze(block)), item)
        outs.append(out)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def outermost(bijection: AbstractBijection) -> tuple[AbstractBijection, bool]:
    """The ``Scan`` or ``Chain`` that holds the blocks, and whether it runs backwards.

    A bijection that is neither is its own single block.
    """
    if isinstance(bijection, Invert) and isinstance(bijection.bijection, Scan | Chain):
        return bijection.bijection, True
    return bijection, False


def depth_of(bijection: AbstractBijection) -> int:
    """How many blocks a bijection has."""
    inner, _ = outermost(bijection)
    if isinstance(inner, Scan):
        return len(jax.tree.leaves(eqx.filter(inner, eqx.is_array))[0])
    return len(inner.bijections) if isinstance(inner, Chain) else 1


def elements(
    inner: AbstractBijection,
) -> tuple[AbstractBijection | AbstractUnwrappable[AbstractBijection], ...]:
    """The blocks of what :func:`outermost` found, in the order in which they stand."""
    if isinstance(inner, Scan):
        arrays, static = eqx.partition(inner.bijection, eqx.is_array)
        return tuple(
            eqx.combine(jax.tree.map(lambda a, i=i: a[i], arrays), static)
            for i in range(depth_of(inner))
        )
    return inner.bijections if isinstance(inner, Chain) else (inner,)


def initialize_actnorm(flow: Transformed, x: Float[Array, "n ..."]) -> Transformed:
    """Set every ActNorm of a flow that is not frozen, the one next to the data first.

    The batch travels through the flow; each ActNorm on its way is replaced by the one
    that gives its own input mean 0 and variance 1. Everything else stays as it is.

    Args:
        flow: A flow whose normalizing map is made of ``Chain``, ``Scan`` and
            :class:`gauss_flows.image.Level`.
        x: Batch of data, shape ``(n, *flow.shape)``, ``n >= 2``.

    Returns:
        The flow with its ActNorms set.

    Raises:
        ValueError: If the flow holds no such ActNorm in its normalizing map, or the
            batch has the wrong shape or fewer than two events.
        RuntimeError: If a channel is constant (``EquinoxRuntimeError`` under jit).

    Source:
        Salimans & Kingma (2016), section 3; Kingma & Dhariwal (2018), section 3.1.
    """
    normalizing_map(flow)  # raises where there is none
    shape = paramax.unwrap(flow).shape
    if x.ndim < 1 or x.shape[1:] != shape:
        raise ValueError(
            f"expected a batch of events of shape {shape}, got shape {x.shape}"
        )
    # what is frozen, or runs backwards, stays as it is
    inner = flow.bijection.bijection if isinstance(flow.bijection, Invert) else None
    opaque = ActNorm, Invert, AbstractUnwrappable
    leaves = jax.tree.leaves(inner, is_leaf=lambda a: isinstance(a, opaque))
    if inner is None or not any(isinstance(a, ActNorm) for a in leaves):
        raise ValueError(
            "expected a flow with ActNorm layers on its way from data to latent, got "
            "none: build it with actnorm=True"
        )

    def set_layer(layer: Any, x: Array) -> Any:
        return layer.from_data(x) if isinstance(layer, ActNorm) else layer

    initialized, _ = set_from_data(set_layer, inner, x)
    return eqx.tree_at(lambda flow: flow.bijection.bijection, flow, initialized)


def set_from_data(
    set_layer: Callable[[Any, Array], Any],
    bijection: AbstractBijection | AbstractUnwrappable[AbstractBijection],
    x: Float[Array, "n ..."],
) -> tuple[Any, Float[Array, "n ..."]]:
    """Set the layers of a bijection one after another, each from what arrives there.

    Args:
        set_layer: ``layer = set_layer(layer, x)``; returns what it does not know.
        bijection: Made of ``Chain``, ``Scan``, and what has layers inside and a
            ``set_from_data(set_layer, x)`` of its own to set them.
        x: Batch of events.

    Returns:
        The bijection with its layers set, and what it makes of ``x``.
    """
    match bijection:
        case Chain(bijections=parts):
            done = []
            for part in parts:
                ready, x = set_from_data(set_layer, part, x)
                done.append(ready)
            return type(bijection)(done), x
        case Scan(bijection=stacked):
            static = eqx.filter(stacked, eqx.is_array, inverse=True)

            def step(
                x: Array, block: AbstractBijection, _: Array
            ) -> tuple[Array, AbstractBijection]:
                ready, x = set_from_data(set_layer, block, x)
                return x, eqx.filter(ready, eqx.is_array)

            x, arrays = walk(step, x, bijection)
            ready = eqx.combine(arrays, static)
            return eqx.tree_at(lambda scan: scan.bijection, bijection, ready), x
    if isinstance(bijection, _HoldsLayers):
        ready = bijection.set_from_data(set_layer, x)
    else:
        ready = set_layer(bijection, x)
    return ready, jax.vmap(_unfreeze(ready).transform)(x)


@runtime_checkable
class _HoldsLayers(Protocol):
    """A bijection that knows how to set the layers inside it from data."""

    def set_from_data(
        self, set_layer: Callable[[Any, Array], Any], x: Float[Array, "n ..."]
    ) -> Any: ...


def _unfreeze(
    part: AbstractBijection | AbstractUnwrappable[AbstractBijection],
) -> AbstractBijection:
    return part.unwrap() if isinstance(part, AbstractUnwrappable) else part


def _check_options(kind: str, options: dict) -> None:
    accepted = inspect.signature(_COUPLINGS[kind]).parameters.keys() - {"key", "shape"}
    if unknown := options.keys() - accepted:
        raise ValueError(
            f"expected options of a {kind} coupling among {sorted(accepted)}, "
            f"got {sorted(unknown)}"
        )
