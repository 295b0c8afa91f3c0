"""A flow whose rotations, permutations and 1×1 convolutions are rewritten as couplings.

Whatever a learned partition represents, a fixed one does too, at a constant cost in
depth: Koehler, Mehta & Risteski (2021). Here that is done to a trained flow.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.bijections import Chain
from jaxtyping import Float, PyTree

from .. import _check, masks
from ..linear import HouseholderRotation, LearnedPermutation, PLULinear
from ..pixels import ChannelPermutation
from .linear_coupling import LinearCoupling, chain
from .linear_maps import factor_stable, factor_svd

_Mixing = HouseholderRotation | LearnedPermutation | PLULinear | ChannelPermutation


def with_fixed_partition(flow: PyTree, *, mask: masks.Mask | None = None) -> PyTree:
    """The same flow, with each linear layer that mixes as a stack of couplings.

    All the new layers, and with the flow's own ``mask`` all the old ones, cut the
    coordinates into the same two halves. A rotation takes at most 15 couplings, a
    permutation 9, a :class:`~gauss_flows.PLULinear` 31; in a stack scanned over depth
    each block gets as many as the largest needs. On pictures the coordinates are the
    channels, and the couplings are :class:`~gauss_flows.image.ConvCoupling` layers that
    look at one pixel. The density is unchanged up to rounding: use float64 where that
    matters.

    Args:
        flow: A flow or bijection over vectors of even size, or over pictures whose
            mixing layers see even numbers of channels.
        mask: The two halves of a vector, True = lower; by default, and on pictures
            always, those of ``masks.half``.

    Returns:
        The flow with the same density, and no layer that mixes coordinates otherwise.

    Raises:
        ValueError: If the flow has no layer to replace, the size is odd, the mask does
            not mark half of the coordinates or is given for pictures, or a permutation
            is odd: its determinant is -1, and that of couplings is positive.

    Example:
        >>> import jax.random as jr
        >>> import gauss_flows as gf
        >>> flow = gf.coupling_flow(jr.key(0), dim=4, depth=3, coupling="affine")
        >>> len(gf.blocks(with_fixed_partition(flow))[0].bijections[0].bijections)
        15
    """

    def is_mixing(node: Any) -> bool:
        return isinstance(node, _Mixing)

    if not any(map(is_mixing, jax.tree.leaves(flow, is_leaf=is_mixing))):
        raise ValueError(
            "expected a flow with rotations, permutations or 1×1 convolutions, got none"
        )
    dtype = _check.dtype_of(flow)
    return jax.tree.map(
        lambda node: _replaced(node, mask, dtype) if is_mixing(node) else node,
        flow,
        is_leaf=is_mixing,
    )


def _replaced(layer: _Mixing, mask: masks.Mask | None, dtype: Any) -> Chain:
    """One layer, or a stack of them along a leading axis, as a chain of couplings."""
    *pixels, dim = layer.shape
    if pixels and mask is not None:
        raise ValueError(
            f"expected mask=None for pictures, whose channels are cut, got {mask}"
        )
    matrices = _matrices(layer)
    factor = factor_svd if isinstance(layer, PLULinear) else factor_stable
    found = _aligned([factor(_cut(m, mask)) for m in matrices.reshape(-1, dim, dim)])
    options = {"mask": mask, "pixels": tuple(pixels) or None, "dtype": dtype}
    chains = [chain(f, **options) for f in found]
    if matrices.ndim == 2:
        return chains[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *chains)


def _matrices(layer: _Mixing) -> Float[np.ndarray, "*stack n n"]:
    """What a layer, or each of a stack of them, multiplies vectors or channels by."""
    if isinstance(layer, ChannelPermutation):
        return np.eye(layer.shape[-1])[np.asarray(layer.order)]
    if isinstance(layer, PLULinear):
        stacked = layer.factors.ndim > 2
    elif isinstance(layer, HouseholderRotation):
        stacked = layer.params.ndim > 2
    else:
        stacked = layer.scores.ndim > 1
    return np.asarray((jax.vmap(_matrix) if stacked else _matrix)(layer), np.float64)


def _matrix(layer: HouseholderRotation | LearnedPermutation | PLULinear) -> Any:
    if isinstance(layer, PLULinear):
        return layer.matrix
    return layer.columns(jnp.eye(layer.shape[0], dtype=_check.dtype_of(layer)))[0]


def _cut(
    matrix: Float[np.ndarray, "n n"], mask: masks.Mask | None
) -> Float[np.ndarray, "n n"]:
    """The matrix with the upper half of the mask in front."""
    if mask is None:
        return matrix
    order = np.argsort(masks.validate(mask, (len(matrix),)), kind="stable")
    return matrix[np.ix_(order, order)]


def _aligned(lists: list[list[LinearCoupling]]) -> list[list[LinearCoupling]]:
    """Lists of one length that alternate U, L, U, ...: identities fill the gaps."""
    d = len(lists[0][0].scale)
    fill = {
        kind: LinearCoupling(kind, np.zeros((d, d)), np.ones(d)) for kind in ("U", "L")
    }
    started = [[fill["U"], *f] if f[0].kind == "L" else f for f in lists]
    longest = max(map(len, started))
    kinds = ["UL"[i % 2] for i in range(longest)]
    return [[*f, *(fill[kind] for kind in kinds[len(f) :])] for f in started]
