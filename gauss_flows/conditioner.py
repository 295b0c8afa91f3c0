"""The conditioner: the network of a coupling, which is never inverted."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from . import _check

_FEW = 8
"""Up to so many inputs a layer is computed again for the backward pass, not stored."""

_KEPT = "pre-activation"


class Conditioner(eqx.Module):
    r"""A multi-layer perceptron from the passive part to a transformer's parameters.

    From the same key it holds the same numbers as ``equinox.nn.MLP``. With ``residual``
    each hidden layer after the first adds to what it is given,
    :math:`h \leftarrow h + a(W h + b)`, so that depth of the network costs no signal.

    Args:
        key: JAX random key.
        in_size: Number of passive coordinates.
        out_size: Number of active coordinates times parameters of each.
        width: Width of the hidden layers.
        depth: Number of hidden layers; 0 makes it linear.
        activation: What acts between layers, elementwise.
        residual: Whether hidden layers after the first are residual.
        identity_init: Start with a last layer of zeros, so that all outputs are 0.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If a size is out of range.

    Source:
        He, Zhang, Ren & Sun (2016) for residual layers; Durkan et al. (2019) use them
        in their conditioners.
    """

    layers: tuple[eqx.nn.Linear, ...]
    activation: Callable = eqx.field(static=True)
    residual: bool = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        in_size: int,
        out_size: int,
        *,
        width: int = 24,
        depth: int = 2,
        activation: Callable = jax.nn.relu,
        residual: bool = False,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        if width < 1 or depth < 0:
            raise ValueError(
                f"expected nn_width >= 1 and nn_depth >= 0, got {width} and {depth}"
            )
        self.activation, self.residual = activation, residual
        dtype = _check.floating(dtype)
        drawn = eqx.nn.MLP(in_size, out_size, width, depth, dtype=dtype, key=key)
        *hidden, last = drawn.layers
        if identity_init:
            last = jax.tree.map(jnp.zeros_like, last)
        self.layers = (*hidden, last)

    def __call__(self, passive: Float[Array, "passive *batch"]) -> Array:
        """All parameters, ``(out_size, *batch)``: those of one coordinate together."""
        *_, last = self.layers
        return _linear(last.weight, last.bias, self._hidden(passive))

    def columns(
        self, passive: Float[Array, "passive *batch"], n_active: int, sizes: Sequence
    ) -> list[Float[Array, "_ active *batch"]]:
        """The same, with the parameters of each coordinate taken apart by ``sizes``.

        The last layer is applied in parts: to slice its rows costs less than to slice
        what it makes of a batch, and to put the gradient together again. For the
        backward pass only the pre-activations of layers with many inputs are stored:
        the others, and all activations, take longer to write and read than to compute.
        """

        def parts(self, passive):
            return self._parts(passive, n_active, sizes)

        keep = jax.checkpoint_policies.save_only_these_names(_KEPT)
        # as every stack is a scan
        return jax.checkpoint(parts, prevent_cse=False, policy=keep)(self, passive)

    def _parts(self, passive, n_active, sizes):
        hidden, last = self._hidden(passive), self.layers[-1]
        weight = last.weight.reshape(n_active, -1, last.weight.shape[1]).swapaxes(0, 1)
        bias = None if last.bias is None else last.bias.reshape(n_active, -1).T
        found, start = [], 0
        for size in sizes:
            part = slice(start, start := start + size)
            rows = weight[part].reshape(size * n_active, -1)
            theta = _linear(rows, None if bias is None else bias[part].ravel(), hidden)
            found.append(theta.reshape(size, n_active, *hidden.shape[1:]))
        return found

    def _hidden(self, passive: Float[Array, "passive *batch"]) -> Array:
        """What the last hidden layer makes of the passive part."""
        h = passive
        for i, layer in enumerate(self.layers[:-1]):
            new = _linear(layer.weight, layer.bias, h)
            if len(h) > _FEW:
                new = checkpoint_name(new, _KEPT)
            new = self.activation(new)
            h = h + new if self.residual and i > 0 else new
        return h


def _linear(
    weight: Float[Array, "out in"],
    bias: Float[Array, " out"] | None,
    x: Float[Array, "in *batch"],
) -> Float[Array, "out *batch"]:
    y = jnp.tensordot(weight, x, 1)
    return y if bias is None else y + bias.reshape(-1, *(1,) * (x.ndim - 1))
