"""Pictures as events: squeezing, and layers that know rows, columns and channels.

A picture has shape ``(height, width, channels)``. All names are found in
:mod:`gauss_flows.image` too.

Source: Dinh, Sohl-Dickstein & Bengio (2017).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray, Shaped

from . import _check, masks
from ._columns import AbstractColumnwise
from .coupling import AbstractCoupling, with_last_layer
from .transformers import AbstractTransformer, Affine


class Logit(AbstractColumnwise):
    r"""From (0, 1) to the line: :math:`y = \operatorname{logit}(m + (1 - 2m)\, x)`.

    The margin :math:`m` keeps black and white finite. Whatever the flow behind makes,
    the inverse stays within :math:`m / (1 - 2m)` of the unit interval; points farther
    out than that have no image, and get NaN.

    Cost: two logarithms a coordinate; nothing is trained.

    Args:
        shape: Event shape.
        margin: The margin, at least 0 and below 1/2.

    Raises:
        ValueError: If the margin is out of range or the shape empty.

    Source:
        Dinh, Sohl-Dickstein & Bengio (2017), section 4.1, with a margin on one side.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    margin: float = eqx.field(static=True, default=0.05)
    cond_shape: ClassVar[None] = None

    def __check_init__(self):
        """Refuse what is out of range."""
        if not self.shape or min(self.shape) < 1:
            raise ValueError(
                f"expected an event shape such as (8, 8, 1), got {self.shape}"
            )
        if not 0 <= self.margin < 0.5:
            raise ValueError(f"expected 0 <= margin < 1/2, got {self.margin}")

    def columns(
        self, x: Float[Array, "..."], *, inverse: bool = False
    ) -> tuple[Float[Array, "..."], Float[Array, "*batch"]]:
        """Apply the logit, or undo it.

        Args:
            x: Events of shape ``(*shape, *batch)``.
            inverse: Whether to apply the inverse.

        Returns:
            Events of the same shape, and their log-determinants of shape ``batch``.
        """
        room, axes = 1 - 2 * self.margin, tuple(range(len(self.shape)))
        if inverse:
            log_slope = jax.nn.log_sigmoid(x) + jax.nn.log_sigmoid(-x) - math.log(room)
            return (jax.nn.sigmoid(x) - self.margin) / room, log_slope.sum(axes)
        log_p = jnp.log(self.margin + room * x)
        log_q = jnp.log(self.margin + room * (1 - x))
        return log_p - log_q, (math.log(room) - log_p - log_q).sum(axes)


def squeeze(x: Shaped[Array, "h w c *batch"]) -> Shaped[Array, "h2 w2 c4 *batch"]:
    """Fold blocks of 2×2 pixels into channels, the upper row of a block first.

    Channel ``(2 i + j) * channels + k`` of the result is channel ``k`` of the pixel in
    row ``i`` and column ``j`` of each block, as in TensorFlow's ``space_to_depth``.

    Args:
        x: Pictures of shape ``(height, width, channels, *batch)``.

    Returns:
        Pictures of shape ``(height / 2, width / 2, 4 * channels, *batch)``.

    Raises:
        ValueError: If height or width is odd.

    Source:
        Dinh, Sohl-Dickstein & Bengio (2017), section 3.6.
    """
    check_halvings(x.shape[:3], 1)
    height, width, channels, *batch = x.shape
    blocks = x.reshape(height // 2, 2, width // 2, 2, channels, *batch)
    return jnp.moveaxis(blocks, 2, 1).reshape(
        height // 2, width // 2, 4 * channels, *batch
    )


def unsqueeze(x: Shaped[Array, "h w c *batch"]) -> Shaped[Array, "h2 w2 c4 *batch"]:
    """Undo :func:`squeeze`.

    Args:
        x: Pictures of shape ``(height, width, 4 * channels, *batch)``.

    Raises:
        ValueError: If the number of channels is not a multiple of 4.
    """
    height, width, channels, *batch = x.shape
    if channels % 4:
        raise ValueError(
            f"expected a multiple of 4 channels to unfold, got shape {x.shape}"
        )
    blocks = x.reshape(height, width, 2, 2, channels // 4, *batch)
    return jnp.moveaxis(blocks, 2, 1).reshape(
        2 * height, 2 * width, channels // 4, *batch
    )


def check_halvings(shape: tuple[int, ...], times: int) -> None:
    """Raise ``ValueError`` unless a picture can be squeezed so many times."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"expected a picture shape (height, width, channels), got {shape}"
        )
    if shape[0] % 2**times or shape[1] % 2**times:
        raise ValueError(
            f"expected height and width to be multiples of {2**times}, to be halved "
            f"{times} times, got shape {shape}: crop or pad, or take fewer levels"
        )


class ConvConditioner(eqx.Module):
    r"""A convolutional network from the passive part to a transformer's parameters.

    It sees the passive part as a picture, with zeros in the active places, and gives a
    picture of parameters, of which those in the active places are used. Channels that
    are all active are left out of the first picture, and channels that are all passive
    out of the second. All convolutions are 3×3 and see zeros beyond the border; after
    the first come residual blocks, :math:`h \leftarrow h + C_2\, a(C_1\, a(h))`.

    Cost: ``9 * width**2`` multiplications a pixel for each inner convolution.

    Args:
        key: JAX random key.
        mask: Mask of a picture, True = active.
        n_parameters: Parameters of one active coordinate.
        width: Channels inside.
        depth: Hidden stages: the first is a convolution, the others are blocks; 0
            makes the network one convolution, which is linear.
        activation: What acts between convolutions, elementwise.
        identity_init: Start with a last layer of zeros, so that all outputs are 0.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If a size is out of range, or the mask is no picture's.

    Source:
        He, Zhang, Ren & Sun (2016) for the blocks; Kingma & Dhariwal (2018), section
        3.3, for the last layer.
    """

    layers: tuple[eqx.nn.Conv2d, ...]
    activation: Callable = eqx.field(static=True)
    shape: tuple[int, int, int] = eqx.field(static=True)
    places: tuple[int, ...] = eqx.field(static=True)
    wanted: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        mask: masks.Mask,
        n_parameters: int,
        *,
        width: int = 32,
        depth: int = 2,
        activation: Callable = jax.nn.relu,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        _check.at_least_one(nn_width=width, n_parameters=n_parameters)
        if depth < 0:
            raise ValueError(f"expected nn_depth >= 0, got {depth}")
        check_halvings(np.shape(mask), 0)
        mask = masks.validate(mask, np.shape(mask))
        passive = ~mask[..., ~mask.all((0, 1))]
        active = mask[..., mask.any((0, 1))]
        self.shape, self.activation = passive.shape, activation
        self.places = tuple(np.flatnonzero(passive).tolist())
        self.wanted = tuple(np.flatnonzero(active).tolist())
        sizes = [passive.shape[-1], *[width] * max(2 * depth - 1, 0)]
        sizes.append(n_parameters * active.shape[-1])
        keys, dtype = jr.split(key, len(sizes) - 1), _check.floating(dtype)
        *hidden, last = [
            eqx.nn.Conv2d(n, m, 3, padding="SAME", dtype=dtype, key=k)
            for (n, m), k in zip(itertools.pairwise(sizes), keys, strict=True)
        ]
        if identity_init:
            last = jax.tree.map(jnp.zeros_like, last)
        self.layers = (*hidden, last)

    def __call__(self, picture: Float[Array, "h w c *batch"]) -> Array:
        """Parameters of all channels that have any, ``(h, w, p * channels, *batch)``.

        Those of one kind stand together: all first parameters, then all second ones.
        """
        if len(self.layers) == 1:
            return _convolve(self.layers[0], picture)
        first, *inner, last = self.layers
        h, act = _convolve(first, picture), self.activation
        for one, two in zip(inner[::2], inner[1::2], strict=True):
            h = h + _convolve(two, act(_convolve(one, act(h))))
        return _convolve(last, act(h))

    def columns(
        self, passive: Float[Array, "passive *batch"], n_active: int, sizes: Sequence
    ) -> list[Float[Array, "_ active *batch"]]:
        """Parameters of each active coordinate, taken apart by ``sizes``."""
        batch = passive.shape[1:]
        n_places = int(np.prod(self.shape))
        if len(self.places) < n_places:  # zeros where nothing may be seen
            index = np.full(n_places, len(passive))
            index[list(self.places)] = np.arange(len(passive))
            zero = jnp.zeros((1, *batch), passive.dtype)
            passive = jnp.concatenate([passive, zero])[index]
        theta = self(passive.reshape(*self.shape, *batch))
        height, width = self.shape[:2]
        theta = theta.reshape(height, width, sum(sizes), -1, *batch)
        theta = jnp.moveaxis(theta, 2, 0).reshape(sum(sizes), -1, *batch)
        if n_active < theta.shape[1]:
            theta = theta[:, np.array(self.wanted)]
        ends = np.cumsum([0, *sizes]).tolist()
        return [theta[i:j] for i, j in itertools.pairwise(ends)]


class ConvCoupling(AbstractCoupling):
    r"""A coupling of pictures with a convolutional conditioner and any transformer.

    Cost per event: one pass of the conditioner, forward and inverse alike.

    Args:
        key: JAX random key of the conditioner.
        shape: Event shape ``(height, width, channels)``.
        mask: Boolean mask of that shape, True = active, such as
            :func:`gauss_flows.masks.checkerboard` or ``channelwise``.
        transformer: Maps of single numbers; ``Affine(2.0)`` by default, whose
            log-scales stay between -2 and 2.
        nn_width: Channels inside the conditioner.
        nn_depth: Its hidden stages, see :class:`ConvConditioner`.
        nn_activation: What acts between its convolutions.
        identity_init: Start at the identity, by a zero last layer of the conditioner;
            near it for mixtures.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If an argument is out of range or the mask does not fit.

    Source:
        Dinh, Sohl-Dickstein & Bengio (2017), sections 3.4 and 3.5.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    active: tuple[int, ...] = eqx.field(static=True)
    transformer: AbstractTransformer
    conditioner: ConvConditioner  # pyright: ignore[reportIncompatibleVariableOverride]
    cond_shape: ClassVar[None] = None

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, ...],
        mask: masks.Mask,
        transformer: AbstractTransformer | None = None,
        nn_width: int = 32,
        nn_depth: int = 2,
        nn_activation: Callable = jax.nn.relu,
        identity_init: bool = False,
        dtype: DTypeLike | None = None,
    ):
        check_halvings(shape, 0)
        mask = masks.validate(mask, shape)
        self.shape = shape
        self.active = tuple(np.flatnonzero(mask).tolist())
        self.transformer = Affine(2.0) if transformer is None else transformer
        self.conditioner = ConvConditioner(
            key,
            mask,
            self.transformer.n_parameters,
            width=nn_width,
            depth=nn_depth,
            activation=nn_activation,
            identity_init=identity_init,
            dtype=dtype,
        )

    def from_data(self, x: Float[Array, "n ..."]) -> "ConvCoupling":
        """The coupling that Gaussianizes each active channel of a batch by itself.

        As :meth:`AbstractCoupling.from_data`, but a channel has one bias for all its
        pixels: it fits their common distribution.

        Args:
            x: Batch of events, shape ``(n, *shape)`` with ``n >= 2``.

        Raises:
            ValueError: If the batch has another shape or fewer than two events.
            RuntimeError: If a channel's active part is constant
                (``EquinoxRuntimeError`` under jit).
        """
        _check.events(x, self.shape)
        mask, theta = self.mask, []
        for channel in np.flatnonzero(mask.any((0, 1))):
            values = x[:, mask[..., channel], channel].reshape(-1, 1)
            values = _check.varying("coupling", "active channel", values)
            theta.append(self.transformer.from_marginals(values))
        return with_last_layer(
            self,
            jnp.zeros_like(self.conditioner.layers[-1].weight),
            jnp.concatenate(theta, axis=1).reshape(-1, 1, 1),
        )


class ChannelPermutation(AbstractColumnwise):
    """A fixed permutation of the channels, the last axis.

    Args:
        shape: Event shape, channels last.
        order: Which channel comes first, second, ...; as integers it is not trained.

    Raises:
        ValueError: If ``order`` has another length than there are channels.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    order: Int[Array, " channels"]
    cond_shape: ClassVar[None] = None

    def __check_init__(self):
        """Refuse another number of channels; values are not looked at."""
        if not self.shape or self.order.shape != self.shape[-1:]:
            raise ValueError(
                f"expected an order of the channels of {self.shape}, got an array of "
                f"shape {self.order.shape}"
            )

    def columns(
        self, x: Float[Array, "..."], *, inverse: bool = False
    ) -> tuple[Float[Array, "..."], Float[Array, "*batch"]]:
        """Put channels in order, or back; the log-determinant is 0.

        Args:
            x: Events of shape ``(*shape, *batch)``.
            inverse: Whether to apply the inverse.
        """
        axis = len(self.shape) - 1
        order = jnp.argsort(self.order) if inverse else self.order
        y = x.at[(*(slice(None),) * axis, order)].get(unique_indices=True)
        return y, jnp.zeros(x.shape[axis + 1 :], x.dtype)


def _convolve(
    layer: eqx.nn.Conv2d, x: Float[Array, "h w c *batch"]
) -> Float[Array, "h w d *batch"]:
    """A 3×3 convolution of pictures whose batch axes trail, zeros beyond the border.

    On a CPU by one matrix product with the nine shifted pictures: within the loop over
    depth XLA's own convolution takes more than ten times as long there.
    """
    height, width, channels, *batch = x.shape
    x = x.reshape(height, width, channels, -1)
    if jax.default_backend() == "cpu":
        wide = jnp.pad(x, ((1, 1), (1, 1), (0, 0), (0, 0)))
        shifted = [
            wide[i : i + height, j : j + width] for i in range(3) for j in range(3)
        ]
        kernel = layer.weight.transpose(0, 2, 3, 1).reshape(len(layer.weight), -1)
        y = jnp.tensordot(kernel, jnp.concatenate(shifted, axis=2), (1, 2))
        y = jnp.moveaxis(y, 0, 2)
    else:
        axes = ("HWCN", "OIHW", "HWCN")
        y = jax.lax.conv_general_dilated(
            x, layer.weight, (1, 1), "SAME", dimension_numbers=axes
        )
    y = y if layer.bias is None else y + layer.bias[..., 0]
    return y.reshape(height, width, -1, *batch)
