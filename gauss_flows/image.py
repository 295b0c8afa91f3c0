r"""RealNVP and Glow: multi-scale flows over pictures (height, width, channels).

A level folds blocks of 2×2 pixels into channels, passes the picture through a number of
steps, keeps half of the channels for the next level and splits the other half off. What
is split off is put back in its place on the way out, so that a level keeps the shape of
the event, like any bijection, and its inverse is exact. Steps are scanned over depth:
compilation costs one step a level.

Source: Dinh, Sohl-Dickstein & Bengio (2017); Kingma & Dhariwal (2018).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import paramax
from flowjax.bijections import AbstractBijection, Chain, Invert
from flowjax.distributions import StandardNormal, Transformed
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from . import _check, _columns, masks
from ._columns import AbstractColumnwise
from .actnorm import ActNorm
from .dequantization import (
    DequantizedFlow as DequantizedFlow,
    VariationalNoise as VariationalNoise,
    bits_per_dimension as bits_per_dimension,
    dequantize as dequantize,
    dequantized_loss as dequantized_loss,
    quantize as quantize,
)
from .linear import PLULinear
from .memory import Stack
from .pixels import (
    ChannelPermutation as ChannelPermutation,
    ConvConditioner as ConvConditioner,
    ConvCoupling as ConvCoupling,
    Logit as Logit,
    check_halvings,
    squeeze as squeeze,
    unsqueeze as unsqueeze,
)
from .stack import set_from_data
from .transformers import AbstractTransformer

MIXINGS = ("learned", "reverse", "shuffle", "none")


class Level(AbstractColumnwise):
    """One level of a multi-scale flow: squeeze, steps, split, the levels inside.

    The inner levels act on the first half of the channels; the second half is split
    off as it is. At the end all is put back in its place.

    Args:
        steps: What acts on squeezed pictures, ``(height / 2, width / 2, 4 * channels)``
            for events ``(height, width, channels)``.
        inner: What acts on the half that goes on; None for the last level.

    Raises:
        ValueError: If the shapes do not fit each other.
    """

    steps: AbstractBijection
    inner: AbstractBijection | None
    shape: tuple[int, ...] = eqx.field(static=True)
    cond_shape: ClassVar[None] = None

    def __init__(self, steps: AbstractBijection, inner: AbstractBijection | None):
        check_halvings(steps.shape, 0)
        height, width, channels = steps.shape
        if channels % 4:
            raise ValueError(
                "expected steps on squeezed pictures, with a multiple of 4 channels, "
                f"got steps of shape {steps.shape}"
            )
        kept = (height, width, channels // 2)
        if inner is not None and inner.shape != kept:
            raise ValueError(
                f"expected an inner level of shape {kept}, got {inner.shape}"
            )
        self.steps, self.inner = steps, inner
        self.shape = (2 * height, 2 * width, channels // 4)

    def columns(
        self, x: Float[Array, "..."], *, inverse: bool = False
    ) -> tuple[Float[Array, "..."], Float[Array, "*batch"]]:
        """Pass pictures through this level and those inside, or undo that.

        Args:
            x: Events of shape ``(*shape, *batch)``.
            inverse: Whether to apply the inverse.

        Returns:
            Events of the same shape, and their log-determinants of shape ``batch``.
        """
        x, total = squeeze(x), jnp.zeros((), x.dtype)
        parts = (self._steps, self._rest)
        for part in reversed(parts) if inverse else parts:
            x, log_det = part(x, inverse)
            total = total + log_det
        return unsqueeze(x), jnp.broadcast_to(total, x.shape[3:])

    def set_from_data(
        self, set_layer: Callable[[Any, Array], Any], x: Float[Array, "n ..."]
    ) -> "Level":
        """The level with its layers set, each from what arrives there.

        Args:
            set_layer: As for :func:`gauss_flows.stack.set_from_data`.
            x: Batch of events, shape ``(n, *shape)``.
        """
        steps, y = set_from_data(set_layer, self.steps, jax.vmap(squeeze)(x))
        if self.inner is None:
            return Level(steps, None)
        kept = y[..., : y.shape[-1] // 2]
        return Level(steps, set_from_data(set_layer, self.inner, kept)[0])

    def _steps(self, x: Array, inverse: bool) -> tuple[Array, Array]:
        return _columns.transform(self.steps, x, inverse=inverse)

    def _rest(self, x: Array, inverse: bool) -> tuple[Array, Array]:
        if self.inner is None:
            return x, jnp.zeros((), x.dtype)
        kept, split_off = jnp.split(x, 2, axis=2)
        kept, log_det = _columns.transform(self.inner, kept, inverse=inverse)
        return jnp.concatenate([kept, split_off], axis=2), log_det


def realnvp(
    key: PRNGKeyArray,
    *,
    shape: tuple[int, ...],
    levels: int,
    depth: int,
    actnorm: bool = True,
    margin: float | None = 0.05,
    memory: str = "store",
    transformer: AbstractTransformer | None = None,
    nn_width: int = 32,
    nn_depth: int = 2,
    nn_activation: Callable = jax.nn.relu,
    identity_init: bool = True,
    dtype: DTypeLike | None = None,
) -> Transformed:
    r"""RealNVP: checkerboard couplings, squeeze, channel-wise couplings, split.

    A block is [ActNorm,] coupling, coupling with the complementary mask. Each level but
    the last has ``depth`` blocks of checkerboards and ``depth`` of channel-wise masks;
    the last has checkerboards only. In all ``(4 * levels - 2) * depth`` couplings. The
    authors have three couplings where there are two blocks here, batch normalisation
    for ActNorm, and double the width at each level.

    Cost: compilation is that of a block for each kind of mask and level; time and
    memory of a training step grow linearly in ``depth``.

    Args:
        key: JAX random key.
        shape: Picture shape ``(height, width, channels)``.
        levels: Number of levels; height and width are halved ``levels - 1`` times.
        depth: Number of blocks of each kind at a level.
        actnorm: Put an :class:`~gauss_flows.ActNorm` in front of each block, at the
            identity; :func:`gauss_flows.initialize_actnorm` sets it from data.
        margin: Of a :class:`Logit` in front of all, for pictures with values in (0, 1);
            None to leave it out, for values on the whole line.
        memory: What to keep for the backward pass; see
            :class:`~gauss_flows.memory.Stack`.
        transformer: As for :class:`ConvCoupling`, like all that follows.
        nn_width: See there.
        nn_depth: See there.
        nn_activation: See there.
        identity_init: See there.
        dtype: See there.

    Returns:
        The flow, a distribution over pictures, with a standard normal base.

    Raises:
        ValueError: If an argument is out of range, or the shape cannot be halved so
            often.

    Source:
        Dinh, Sohl-Dickstein & Bengio (2017), sections 3.4 to 3.6.

    Example:
        >>> flow = realnvp(jr.key(0), shape=(8, 8, 1), levels=2, depth=2, nn_width=8)
        >>> flow.sample(jr.key(1), (5,)).shape
        (5, 8, 8, 1)
    """
    _check.at_least_one(levels=levels, depth=depth)
    check_halvings(shape, levels - 1)
    times = 2 ** (levels - 1)
    if shape[0] * shape[1] < 2 * times**2:
        raise ValueError(
            f"expected at least 2 pixels at the last of {levels} levels, got shape "
            f"{shape}, which leaves 1: take fewer levels"
        )
    options = {
        "transformer": transformer,
        "nn_width": nn_width,
        "nn_depth": nn_depth,
        "nn_activation": nn_activation,
        "identity_init": identity_init,
        "dtype": dtype,
    }

    def pairs(key: PRNGKeyArray, mask: masks.Mask) -> Stack:
        def block(key: PRNGKeyArray) -> Chain:
            both = zip(jr.split(key), (mask, masks.complement(mask)), strict=True)
            layers: list[AbstractBijection] = [
                ConvCoupling(k, shape=mask.shape, mask=m, **options) for k, m in both
            ]
            norm = [ActNorm(mask.shape, dtype=dtype)] if actnorm else []
            return Chain([*norm, *layers])

        return Stack(eqx.filter_vmap(block)(jr.split(key, depth)), memory=memory)

    def level(key: PRNGKeyArray, shape: tuple, left: int) -> AbstractBijection:
        board_key, channel_key, inner_key = jr.split(key, 3)
        boards = pairs(board_key, masks.checkerboard(shape))
        if left == 1:
            return boards
        squeezed, kept = _halved(shape)
        channels = pairs(channel_key, masks.channelwise(squeezed))
        return Chain([boards, Level(channels, level(inner_key, kept, left - 1))])

    return _flow(level(key, shape, levels), margin)


def glow(
    key: PRNGKeyArray,
    *,
    shape: tuple[int, ...],
    levels: int,
    depth: int,
    mixing: str = "learned",
    conditional_prior: bool = True,
    actnorm: bool = True,
    margin: float | None = 0.05,
    memory: str = "store",
    transformer: AbstractTransformer | None = None,
    nn_width: int = 32,
    nn_depth: int = 2,
    nn_activation: Callable = jax.nn.relu,
    identity_init: bool = True,
    dtype: DTypeLike | None = None,
) -> Transformed:
    r"""Glow: at each level squeeze, steps of [ActNorm,] mixing, coupling, and split.

    All couplings transform the second half of the channels given the first. Which
    channels these are is up to the mixing in front of each:

    - ``"learned"``: a :class:`~gauss_flows.PLULinear`, from a random rotation on.
    - ``"reverse"``: the order of channels reversed, so that the halves of one fixed
      partition take turns.
    - ``"shuffle"``: a fixed permutation a step, drawn at random.
    - ``"none"``: the second half at every step. The first is scaled and shifted only;
      half of it is transformed at the next level, and so on.

    With the same key all four have the same couplings. Only ``"learned"`` has further
    parameters, ``(4 * channels)**2`` a step at the first level.

    The half that is split off is first transformed once more given the other half, by
    one convolution which starts at zero: the conditional prior of Glow.

    Cost: compilation is that of one step a level; time and memory of a training step
    grow linearly in ``depth``.

    Args:
        key: JAX random key.
        shape: Picture shape ``(height, width, channels)``.
        levels: Number of levels; height and width are halved so often.
        depth: Number of steps, and couplings, at each level.
        mixing: What mixes channels in front of each coupling.
        conditional_prior: Whether what is split off depends on what is kept.
        actnorm: As for :func:`realnvp`, like all that follows; here in front of steps.
        margin: See there.
        memory: See there.
        transformer: See there. The conditional prior has the same.
        nn_width: See there.
        nn_depth: See there.
        nn_activation: See there.
        identity_init: See there.
        dtype: See there.

    Returns:
        The flow, a distribution over pictures, with a standard normal base.

    Raises:
        ValueError: If an argument is out of range or unknown, or the shape cannot be
            halved so often.

    Source:
        Kingma & Dhariwal (2018), sections 3 and 4.

    Example:
        >>> flow = glow(jr.key(0), shape=(8, 8, 1), levels=2, depth=4, nn_width=8)
        >>> flow.log_prob(jnp.full((5, 8, 8, 1), 0.5)).shape
        (5,)
    """
    _check.at_least_one(levels=levels, depth=depth)
    check_halvings(shape, levels)
    if mixing not in MIXINGS:
        raise ValueError(f"expected mixing in {list(MIXINGS)}, got {mixing!r}")
    options = {
        "transformer": transformer,
        "nn_width": nn_width,
        "nn_activation": nn_activation,
        "dtype": dtype,
    }

    def level(key: PRNGKeyArray, shape: tuple, left: int) -> Level:
        squeezed, kept = _halved(shape)
        options_here = {
            **options,
            "shape": squeezed,
            "mask": masks.channelwise(squeezed),
        }

        def step(key: PRNGKeyArray) -> Chain:
            coupling_key, mixing_key = jr.split(key)
            coupling = ConvCoupling(
                coupling_key, nn_depth=nn_depth, identity_init=identity_init,
                **options_here,
            )  # fmt: skip
            norm = [ActNorm(squeezed, dtype=dtype)] if actnorm else []
            return Chain(
                [*norm, *_mixing(mixing, mixing_key, squeezed, dtype), coupling]
            )

        step_key, prior_key, inner_key = jr.split(key, 3)
        stacked = eqx.filter_vmap(step)(jr.split(step_key, depth))
        steps: AbstractBijection = Stack(stacked, memory=memory)
        if left == 1:
            return Level(steps, None)
        if conditional_prior:
            prior = ConvCoupling(
                prior_key, nn_depth=0, identity_init=True, **options_here
            )
            steps = Chain([steps, prior])
        return Level(steps, level(inner_key, kept, left - 1))

    return _flow(level(key, shape, levels), margin)


def sample(
    key: PRNGKeyArray, flow: Transformed, n: int, *, temperature: float = 1.0
) -> Float[Array, "n ..."]:
    """Samples of a flow whose latent is drawn at a temperature.

    The latent is multiplied by it: 1 samples from the flow, less keeps to where it is
    sure of itself, and 0 gives the image of the origin, ``n`` times.

    Args:
        key: JAX random key.
        flow: A flow over a standard normal base, or another one centred at 0.
        n: Number of samples.
        temperature: At least 0.

    Returns:
        Events, ``(n, *flow.shape)``, of the dtype of the flow's parameters.

    Raises:
        ValueError: If ``n`` is below 1, or the temperature negative or not finite.

    Source:
        Kingma & Dhariwal (2018), section 6; Parmar et al. (2018).
    """
    _check.at_least_one(n=n)
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"expected temperature to be finite and >= 0, got {temperature}"
        )
    z = flow.base_dist.sample(key, (n,)).astype(_check.dtype_of(flow) or float)
    return _decode(flow, temperature * z)


def interpolate(
    flow: Transformed,
    x: Float[Array, "..."],
    y: Float[Array, "..."],
    n: int,
    *,
    kind: str = "spherical",
) -> Float[Array, "n ..."]:
    r"""Events from ``x`` to ``y`` along a path in the latent space.

    The spherical path is :math:`(\sin((1 - t) \omega)\, z_x + \sin(t \omega)\, z_y) /
    \sin \omega` with :math:`\omega` the angle between the two latents. Latents of a
    flow in d dimensions lie close to a sphere of radius :math:`\sqrt d`; the straight
    path cuts through its inside, where the base has next to no mass, the spherical one
    does not. Where the latents are parallel or one is 0, the straight path is taken.

    Args:
        flow: The flow.
        x: First event, of shape ``flow.shape``.
        y: Last event.
        n: Number of events, at least 2; ``x`` and ``y`` are the ends.
        kind: ``"spherical"`` or ``"linear"``.

    Returns:
        Events, ``(n, *flow.shape)``.

    Raises:
        ValueError: If an argument is out of range, or an event has another shape.

    Source:
        Shoemake (1985), section 3.3; White (2016).
    """
    if n < 2 or kind not in ("spherical", "linear"):
        raise ValueError(
            f"expected n >= 2 and kind 'spherical' or 'linear', got {n} and {kind!r}"
        )
    if x.shape != flow.shape or y.shape != flow.shape:
        raise ValueError(
            f"expected two events of shape {flow.shape}, got {x.shape} and {y.shape}"
        )
    start, end = _encode(flow, jnp.stack([x, y]))
    t = jnp.linspace(0, 1, n, dtype=start.dtype).reshape(-1, *(1,) * x.ndim)
    weights = (1 - t, t) if kind == "linear" else _arc(start, end, t)
    return _decode(flow, weights[0] * start + weights[1] * end)


def latent_levels(shape: tuple[int, ...], levels: int) -> Int[np.ndarray, "h w c"]:
    """At which level each coordinate of the latent was split off, from 1 to ``levels``.

    For flows by :func:`realnvp` and :func:`glow`. To see what a level
    holds, draw anew what was split off up to it, and keep the rest.

    Args:
        shape: Picture shape ``(height, width, channels)``.
        levels: Number of levels of the flow.

    Raises:
        ValueError: If the picture cannot be halved that often.

    Example:
        >>> latent_levels((2, 4, 1), 2)[..., 0].tolist()
        [[2, 2, 2, 2], [1, 1, 1, 1]]
    """
    _check.at_least_one(levels=levels)
    check_halvings(shape, levels - 1)
    height, width, channels = shape
    if levels == 1:
        return np.ones(shape, int)
    half = (height // 2, width // 2, 2 * channels)
    parts = [latent_levels(half, levels - 1) + 1, np.ones(half, int)]
    return np.asarray(unsqueeze(jnp.asarray(np.concatenate(parts, axis=-1))))


def _halved(shape: tuple) -> tuple[tuple, tuple]:
    """Shape of a squeezed picture, and of the half of it that is kept."""
    height, width, channels = shape
    half = (height // 2, width // 2)
    return (*half, 4 * channels), (*half, 2 * channels)


def _mixing(
    kind: str, key: PRNGKeyArray, shape: tuple, dtype: DTypeLike | None
) -> list[AbstractBijection]:
    if kind == "learned":
        return [PLULinear(key, shape, dtype=dtype)]
    order = jnp.arange(shape[-1])
    if kind == "reverse":
        return [ChannelPermutation(shape, order[::-1])]
    if kind == "shuffle":
        return [ChannelPermutation(shape, jr.permutation(key, order))]
    return []


class _Path(Chain):
    """A ``Chain`` whose log-determinant has the dtype of the event: float32 stays."""

    def __init__(self, bijections: Sequence[Any]):
        super().__init__(bijections)

    def transform_and_log_det(self, x: Array, condition: Array | None = None):
        return _columns.transform(self, x)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None):
        return _columns.transform(self, y, inverse=True)


def _flow(bijection: AbstractBijection, margin: float | None) -> Transformed:
    """The flow of a normalizing map, behind a logit if there is a margin."""
    parts = bijection.bijections if isinstance(bijection, Chain) else (bijection,)
    if margin is not None:
        parts = (Logit(bijection.shape, margin), *parts)
    return Transformed(StandardNormal(bijection.shape), Invert(_Path(parts)))


@eqx.filter_jit
def _decode(flow: Transformed, z: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    return jax.vmap(paramax.unwrap(flow).bijection.transform)(z)


@eqx.filter_jit
def _encode(flow: Transformed, x: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
    return jax.vmap(paramax.unwrap(flow).bijection.inverse)(x)


def _arc(start: Array, end: Array, t: Array) -> tuple[Array, Array]:
    """Weights of the two ends along a great circle; straight where there is none."""
    norms = jnp.linalg.norm(start) * jnp.linalg.norm(end)
    cosine = jnp.vdot(start, end) / jnp.where(norms > 0, norms, 1)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    rounding = 10 * jnp.finfo(start.dtype).eps ** 0.5  # of an angle by its cosine
    straight = (norms == 0) | (jnp.sin(angle) < rounding)
    angle = jnp.where(straight, 1.0, angle)
    weights = jnp.sin((1 - t) * angle), jnp.sin(t * angle)
    there = [w / jnp.sin(angle) for w in weights]
    return jnp.where(straight, 1 - t, there[0]), jnp.where(straight, t, there[1])
