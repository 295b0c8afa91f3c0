r"""Iterative Gaussianization, and the start of a flow from it, without a gradient.

Rotation-based iterative Gaussianization (RBIG) repeats two steps: rotate the data to
their principal axes, then map every coordinate by itself to a standard normal one. That
is a flow of rotations and diagonal layers, and :func:`fit` sets one from data. Two
couplings with complementary masks whose conditioners end in a kernel of zeros are a
diagonal layer too, so a stack of coupling blocks can hold RBIG exactly, and training
goes on from there: :func:`warm_start`.

Source: Chen & Gopinath (2000); Laparra, Camps-Valls & Malo (2011), section II; Meng,
Song, Song & Ermon (2020), section 3.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import Invert
from flowjax.distributions import Transformed
from jaxtyping import Array, Float, PRNGKeyArray

from . import _check
from .actnorm import ActNorm
from .coupling import AbstractCoupling
from .diagonal import Diagonal
from .linear import HouseholderRotation
from .stack import diagonal_flow, normalizing_map, set_from_data
from .transformers import AbstractTransformer


def fit(
    x: Float[Array, "n ..."],
    *,
    depth: int = 10,
    transformer: AbstractTransformer | None = None,
    key: PRNGKeyArray | None = None,
) -> Transformed:
    """Gaussianize data by rotations and one-dimensional fits: RBIG.

    What comes back is a flow like any other: ``log_prob`` is its log-density,
    ``sample`` draws from it, and ``gauss_flows.normalizing_map`` is its transform, with
    the inverse. It can be trained further.

    Cost: ``depth`` times a fit of each coordinate, and the eigenvectors of a
    ``(dim, dim)`` matrix. No gradients.

    Args:
        x: Data, one event a row, shape ``(n, dim)``; standardised, or nearly.
        depth: Number of blocks.
        transformer: Maps of single coordinates; ``MixtureCDF(8)`` by default, which
            needs at least as many rows as components.
        key: JAX random key, for random rotations in place of the principal axes.

    Returns:
        The flow.

    Raises:
        ValueError: If the data are not rows of events, or too few of them.
        RuntimeError: If a coordinate is constant, or far from standardised.

    Source:
        Laparra, Camps-Valls & Malo (2011), section II.

    Example:
        >>> import gauss_flows as gf, jax.random as jr
        >>> x = gf.data.standardize(gf.data.two_moons(jr.key(0), 1000))
        >>> flow = fit(x, depth=4)
        >>> bool(flow.log_prob(x).mean() > -2.2)  # a plain normal gives -2.84
        True
    """
    if x.ndim != 2:
        raise ValueError(f"expected data of shape (n, dim), got {x.shape}")
    flow = diagonal_flow(
        jax.random.key(0) if key is None else key,
        dim=x.shape[1],
        depth=depth,
        transformer=transformer,
        dtype=x.dtype,
    )
    return warm_start(flow, x, rotations="principal" if key is None else "kept")


def warm_start(
    flow: Transformed, x: Float[Array, "n ..."], *, rotations: str = "principal"
) -> Transformed:
    """Set every rotation, ActNorm and coupling of a flow from data, as RBIG does.

    The batch travels from the data to the latent space, and each layer on its way is
    set from what arrives there: a rotation turns to the principal axes; an ActNorm, a
    diagonal layer and a coupling are set by their ``from_data``. Hidden layers of
    conditioners keep their random weights, so that training can leave the start. Other
    layers, and all inside ``paramax.NonTrainable``, stay as they are.

    Principal axes see only correlation. Data whose coordinates are uncorrelated though
    dependent, such as a symmetric spiral, may get nothing out of further blocks: then
    keep the flow's own random rotations, with which RBIG converges as well.

    A spline is the identity outside its interval: standardise the data, or build the
    flow with ``actnorm=True``, so that they lie within. Affine and deep-sigmoid
    couplings only standardise: RBIG with them ends at whitened data after one block.

    Cost: one pass through the flow, a sort of each coordinate at each spline, and for
    each rotation the eigenvectors of a ``(dim, dim)`` matrix; where there are
    mixtures, a hundred iterations of expectation-maximisation a layer.

    Args:
        flow: A flow whose normalizing map is made of ``Chain`` and ``Scan``.
        x: Batch of data, shape ``(n, *flow.shape)``, ``n >= 2``; a few hundred at
            least, for quantiles to mean something.
        rotations: ``"principal"`` sets the rotations, ``"kept"`` leaves them.

    Returns:
        The flow with those layers set.

    Raises:
        ValueError: If ``rotations`` is unknown, the flow holds no coupling and no
            diagonal layer in its normalizing map, the batch has the wrong shape, or a
            rotation to be set has too few reflections (fewer than ``dim`` rounded down
            to even).
        RuntimeError: If a coordinate is constant where it is to become normal.

    Source:
        Laparra, Camps-Valls & Malo (2011), section II; Meng et al. (2020), section 3.

    Example:
        >>> import gauss_flows as gf, jax.random as jr
        >>> x = gf.data.two_moons(jr.key(0), 1000)
        >>> flow = gf.coupling_flow(jr.key(1), dim=2, depth=4)
        >>> cold, warm = flow.log_prob(x).mean(), warm_start(flow, x).log_prob(x).mean()
        >>> bool(warm > cold)
        True
    """
    if rotations not in ("principal", "kept"):
        raise ValueError(f"expected rotations principal or kept, got {rotations!r}")
    bijection = normalizing_map(flow)
    _check.events(x, flow.shape)
    leaves = jax.tree.leaves(bijection, is_leaf=_bends)
    if isinstance(bijection, Invert) or not any(map(_bends, leaves)):
        raise ValueError(
            "expected a flow with couplings or diagonal layers on its way from data to "
            "latent, got none"
        )

    def set_layer(layer: Any, x: Array) -> Any:
        match layer:
            case ActNorm() | Diagonal() | AbstractCoupling():
                return layer.from_data(x)
            case HouseholderRotation() if rotations == "principal":
                return principal_rotation(layer, x)
        return layer

    ready, _ = set_from_data(set_layer, bijection, x)
    return eqx.tree_at(lambda flow: flow.bijection.bijection, flow, ready)


def principal_rotation(
    layer: HouseholderRotation, x: Float[Array, "n dim"]
) -> HouseholderRotation:
    """The rotation that turns a batch to its principal axes.

    Args:
        layer: A rotation of the same number of coordinates, which says how many
            reflections there are.
        x: Batch of events, shape ``(n, dim)``, ``n >= 2``.

    Returns:
        A rotation after which the covariance of the batch is diagonal, with falling
        variances. Each axis points one way or the other as the reflections have it.

    Raises:
        ValueError: If the layer has fewer reflections than ``dim`` rounded down to
            even, or the batch has the wrong shape.
    """
    (dim,), n_reflections = layer.shape, len(layer.params)
    _check.events(x, layer.shape)
    if n_reflections < dim - dim % 2:
        raise ValueError(
            f"expected at least {dim - dim % 2} reflections, which reach every rotation"
            f" of {dim} coordinates, got {n_reflections}"
        )
    centred = x - x.mean(axis=0)
    covariance = jnp.matmul(centred.T, centred, precision="highest") / len(x)
    _, axes = jnp.linalg.eigh(covariance)
    rows = _reflections(axes[:, ::-1])
    if dim % 2 == 0:  # an odd number of reflections so far: turn the last axis round
        rows = jnp.concatenate([rows, jnp.eye(dim, dtype=rows.dtype)[-1:]])
    spare = jnp.ones((n_reflections - len(rows), dim), rows.dtype)  # pairs that cancel
    rows = jnp.concatenate([rows, spare]).astype(layer.params.dtype)
    return eqx.tree_at(lambda layer: layer.params, layer, rows)


def _reflections(axes: Float[Array, "d d"]) -> Float[Array, "d_minus_1 d"]:
    """Reflections that take each column of an orthogonal matrix to an axis, up to sign.

    Householder's triangularisation: a triangular orthogonal matrix is diagonal. The
    sign is the one that cancels nothing, so that no reflection is ever undetermined.
    """
    dim = len(axes)

    def step(matrix: Array, k: Array) -> tuple[Array, Array]:
        column = jnp.where(jnp.arange(dim) >= k, matrix[:, k], 0.0)
        length = jnp.linalg.norm(column)
        row = column.at[k].add(jnp.where(column[k] >= 0, length, -length))
        along = jnp.sum(row[:, None] * matrix, axis=0) * 2 / jnp.sum(row**2)
        return matrix - row[:, None] * along, row

    return jax.lax.scan(step, axes, jnp.arange(dim - 1))[1]


def _bends(node: object) -> bool:
    return isinstance(node, AbstractCoupling | Diagonal)
