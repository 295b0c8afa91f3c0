"""A flow whose rotations and permutations are rewritten as couplings.

Whatever a learned partition represents, a fixed one does too, at a constant cost in
depth: Koehler, Mehta & Risteski (2021). Here that is done to a trained flow.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.bijections import Chain
from jaxtyping import Float, PyTree

from .. import masks
from ..linear import HouseholderRotation, LearnedPermutation
from .linear_coupling import LinearCoupling, chain
from .linear_maps import factor_stable

_MIXING = (HouseholderRotation, LearnedPermutation)


def with_fixed_partition(flow: PyTree, *, mask: masks.Mask | None = None) -> PyTree:
    """The same flow, with each rotation or permutation as a stack of couplings.

    All the new layers, and with the flow's own ``mask`` all the old ones, cut the
    coordinates into the same two halves. A rotation takes at most 15 couplings, a
    permutation 9; in a stack scanned over depth each block gets as many as the largest
    needs. The density is unchanged up to rounding: use float64 where that matters.

    Args:
        flow: A flow or bijection over vectors of even size.
        mask: The two halves, True = lower; by default those of ``masks.half``.

    Returns:
        The flow with the same density, and no layer that mixes coordinates otherwise.

    Raises:
        ValueError: If the flow has no layer to replace, the size is odd, the mask does
            not mark half of the coordinates, or a permutation is odd: its determinant
            is -1, and that of couplings is positive.

    Example:
        >>> import jax.random as jr
        >>> import gauss_flows as gf
        >>> flow = gf.coupling_flow(jr.key(0), dim=4, depth=3, coupling="affine")
        >>> len(gf.blocks(with_fixed_partition(flow))[0].bijections[0].bijections)
        15
    """

    def is_mixing(node: Any) -> bool:
        return isinstance(node, _MIXING)

    if not any(map(is_mixing, jax.tree.leaves(flow, is_leaf=is_mixing))):
        raise ValueError("expected a flow with rotations or permutations, got none")
    return jax.tree.map(
        lambda node: _replaced(node, mask) if is_mixing(node) else node,
        flow,
        is_leaf=is_mixing,
    )


def _replaced(
    layer: HouseholderRotation | LearnedPermutation, mask: masks.Mask | None
) -> Chain:
    """One layer, or a stack of them along a leading axis, as a chain of couplings."""
    (dim,) = layer.shape
    (parameters,) = (leaf for leaf in jax.tree.leaves(layer) if jnp.ndim(leaf))
    one = 2 if isinstance(layer, HouseholderRotation) else 1
    stacked = parameters.ndim > one

    def matrix(single: Any) -> Any:
        return single.columns(jnp.eye(dim, dtype=parameters.dtype))[0]

    matrices = np.asarray((jax.vmap(matrix) if stacked else matrix)(layer), np.float64)
    found = _aligned(
        [factor_stable(_cut(m, mask)) for m in matrices.reshape(-1, dim, dim)]
    )
    chains = [chain(f, mask=mask, dtype=parameters.dtype) for f in found]
    if not stacked:
        return chains[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *chains)


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
