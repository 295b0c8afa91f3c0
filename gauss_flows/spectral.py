r"""Networks with a Lipschitz bound that no change of their weights can break.

A matrix is divided by an **upper** bound of its norm wherever that exceeds what is
allowed, each time that it is used: after every step of an optimiser, and after weights
were edited or loaded. Power iteration, which is customary, approaches the norm from
below: stopped early it certifies nothing. Used here is the Gram iteration instead,

.. math:: \|A\| \le \|(A^\top A)^m\|_F^{1/2m} \le n^{1/4m}\, \|A\|, \qquad m = 2^k,

by k squarings of a matrix of the smaller side n. For a convolution with zero padding it
is taken frequency by frequency on a torus that holds the padded picture.

Sources: Miyato et al. (2018) for spectral normalisation; Delattre et al. (2023),
theorem 1, for the Gram iteration; Sedghi, Gupta & Long (2019) for convolutions on a
torus; Chen et al. (2019), section 3.3, for LipSwish.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import paramax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, DTypeLike, Float, Inexact, Int, PRNGKeyArray
from paramax import AbstractUnwrappable

from . import _check

_TOLERANCE = 0.01  # of the Gram iteration: how far its bound may lie above the norm
_SHARP, _SLACK = 1e-4, 1.005  # the same for checks, and what they let pass
_GRID = (-10.0, 10.0, 2001)  # where the slope of an activation is looked at
_STEEPEST = 1.001


class PowerNorm(NamedTuple):
    """What :func:`power_norm` found: a lower bound of the norm, and the steps taken."""

    norm: Float[Array, ""]
    steps: Int[Array, ""]


def gram_bound(
    matrix: Inexact[Array, "*stack out in"], *, tolerance: float = _TOLERANCE
) -> Float[Array, "*stack"]:
    """Upper bound of the largest singular value of each matrix, differentiable.

    Cost: ``log2(log(n) / (4 tolerance))`` products of matrices of the smaller side n,
    about 7 for n = 32 and the default.

    Args:
        matrix: One matrix, or a stack of them; real or complex.
        tolerance: The bound is at most ``1 + tolerance`` times the norm, up to
            rounding.

    Raises:
        ValueError: If ``tolerance`` is not positive and finite.
    """
    _check.positive(tolerance=tolerance)
    out, size = matrix.shape[-2:]
    dtype = matrix.real.dtype
    # squares of sums overflow in half precision
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    small = min(out, size)
    powers = math.log(small) / (4 * math.log1p(tolerance))
    squarings = math.ceil(math.log2(powers)) if powers > 1 else 0
    largest = lax.stop_gradient(jnp.abs(matrix).max(axis=(-2, -1), keepdims=True))
    zero = largest == 0
    unit = jnp.where(zero, 1, largest)
    # a matrix of zeros has no direction: ones stand in for it
    scaled = jnp.where(zero, 1, matrix / unit)
    adjoint = jnp.conj(jnp.swapaxes(scaled, -2, -1))
    with jax.default_matmul_precision("highest"):
        gram = scaled @ adjoint if out <= size else adjoint @ scaled

        def square(carry: tuple, share: Array) -> tuple[tuple, None]:
            gram, total = carry
            norm = _frobenius(gram)
            unit = gram / norm
            return (unit @ unit, total + share * jnp.log(norm)), None

        start, shares = (gram, jnp.zeros_like(unit)), 0.5 ** jnp.arange(squarings)
        (gram, total), _ = lax.scan(square, start, shares.astype(unit.dtype))
        total += jnp.log(_frobenius(gram)) / 2**squarings
    rounding = 1 + 4 * (out + size) * float(jnp.finfo(unit.dtype).eps)
    if dtype != unit.dtype:
        rounding *= 1 + float(jnp.finfo(dtype).eps)
    bound = unit * jnp.exp(total / 2) * rounding
    return jnp.where(zero, 0, bound)[..., 0, 0].astype(dtype)


def conv_bound(
    kernel: Float[Array, "*stack height width in out"],
    size: tuple[int, int],
    *,
    tolerance: float = _TOLERANCE,
) -> Float[Array, "*stack"]:
    """Upper bound of the norm of a convolution of pictures, padded by zeros.

    A picture with a rim of zeros fits on a torus. There the convolution is one matrix
    for each frequency, and its norm the largest of theirs; on the picture it can only
    be smaller.

    Args:
        kernel: One kernel of odd height and width, or a stack of them.
        size: Height and width of the picture; the stride is 1.
        tolerance: As in :func:`gram_bound`.

    Raises:
        ValueError: If ``tolerance`` is not positive and finite, or the kernel is larger
            than the picture with half a kernel as its rim.
    """
    rim = tuple(n + k // 2 for n, k in zip(size, kernel.shape[-4:-2], strict=True))
    # a Fourier transform would cut off what exceeds the torus
    low = [k - n for n, k in zip(rim, kernel.shape[-4:-2], strict=True)]
    if max(low) > 0:
        raise ValueError(
            "expected a kernel that fits on a picture with its rim of zeros, got "
            f"{kernel.shape[-4:-2]} for {size}"
        )
    # there is no Fourier transform of half precision
    exact = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    symbol = jnp.fft.rfft2(exact, s=rim, axes=(-4, -3))
    bound = gram_bound(symbol, tolerance=tolerance).max(axis=(-2, -1))
    rounding = float(jnp.finfo(kernel.dtype).eps) if exact.dtype != kernel.dtype else 0
    return (bound * (1 + rounding)).astype(kernel.dtype)


def exact_norm(linear: Callable[[Array], Array], x: Float[Array, "..."]) -> Array:
    """Norm of a linear map by the singular values of its dense matrix.

    A constant that the map adds does not count. Cost: as many passes as ``x`` has
    entries, and a dense decomposition. For small layers, as a check on the bounds.

    Args:
        linear: A linear or affine map.
        x: Any event of the right shape and dtype.
    """
    with jax.default_matmul_precision("highest"):
        matrix = jax.jacfwd(linear)(x).reshape(-1, x.size)
        return jnp.linalg.norm(matrix, 2)


def power_norm(
    linear: Callable[[Array], Array],
    x: Float[Array, "..."],
    *,
    key: PRNGKeyArray,
    tolerance: float = 1e-3,
    max_steps: int = 1000,
) -> PowerNorm:
    """Norm of a linear map by power iteration: an estimate **from below**.

    It stops when a step changes the estimate by less than ``tolerance`` of it. Where
    two singular values are close that may be far from the end, so it certifies no
    contraction; :func:`gram_bound` and :func:`conv_bound` do.

    Args:
        linear: A linear or affine map.
        x: Any event of the right shape and dtype.
        key: Of the random start.
        tolerance: Relative change at which to stop.
        max_steps: Most steps to take.

    Raises:
        ValueError: If ``tolerance`` is not positive, or ``max_steps`` below 1.

    Source:
        Gouk et al. (2021), algorithm 1.
    """
    _check.positive(tolerance=tolerance)
    _check.at_least_one(max_steps=max_steps)
    forward = jax.linearize(linear, x)[1]
    backward = jax.linear_transpose(forward, x)

    def unit(v: Array) -> Array:
        norm = jnp.sqrt(jnp.sum(v**2))
        return v / jnp.where(norm > 0, norm, 1)

    def going(state: tuple) -> Array:
        _, norm, change, steps = state
        return (steps < max_steps) & (change > tolerance * norm)

    def step(state: tuple) -> tuple:
        v, old, _, steps = state
        image = forward(v)
        norm = jnp.sqrt(jnp.sum(image**2))
        return unit(backward(image)[0]), norm, jnp.abs(norm - old), steps + 1

    start = unit(jr.normal(key, x.shape, x.dtype))
    zero = jnp.zeros((), x.dtype)
    _, norm, _, steps = lax.while_loop(going, step, (start, zero, zero + 1, 0))
    return PowerNorm(norm, jnp.asarray(steps, jnp.int32))


class SpectralNorm(AbstractUnwrappable[Array]):
    """A matrix that becomes at most ``bound`` in norm when it is unwrapped.

    It is only ever shrunk, by the factor ``bound / gram_bound(weight)`` where that is
    below 1. Gradients go through the factor.

    Args:
        weight: The matrix, or a stack of them.
        bound: Largest norm.
    """

    weight: Float[Array, "*stack out in"]
    bound: float = eqx.field(static=True)

    def unwrap(self) -> Array:
        """The matrix to use."""
        norm = gram_bound(self.weight)[..., None, None]
        return self.weight * (self.bound / jnp.maximum(norm, self.bound))


class SpectralConv(AbstractUnwrappable[Array]):
    """As :class:`SpectralNorm`, for the kernel of a convolution padded by zeros.

    Args:
        weight: The kernel, shape ``(height, width, in, out)``, or a stack of them.
        bound: Largest norm of the convolution.
        size: Height and width of the pictures that it is for.
    """

    weight: Float[Array, "*stack height width in out"]
    bound: float = eqx.field(static=True)
    size: tuple[int, int] = eqx.field(static=True)

    def unwrap(self) -> Array:
        """The kernel to use."""
        norm = conv_bound(self.weight, self.size)[..., None, None, None, None]
        return self.weight * (self.bound / jnp.maximum(norm, self.bound))


class LipSwish(eqx.Module):
    r"""The activation :math:`x\,\operatorname{sigmoid}(\beta x)/1.1`, of slope below 1.

    :math:`\beta = \operatorname{softplus}(b)` with a trainable :math:`b`. The slope of
    :math:`x\,\operatorname{sigmoid}(x)` is at most 1.0999, and :math:`\beta` only
    rescales it. Unlike relu it has a second derivative, without which the gradient of a
    log-determinant says nothing about where the slopes should go.
    """

    b: Float[Array, "*stack"]

    def __init__(self, *, dtype: DTypeLike | None = None):
        self.b = jnp.full((), 0.5, _check.floating(dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Apply it to each number."""
        return x * jax.nn.sigmoid(jax.nn.softplus(self.b) * x) / 1.1


class AbstractContraction(eqx.Module):
    """A network whose layers have norms that multiply to at most ``lipschitz``."""

    lipschitz: eqx.AbstractVar[float]

    @abstractmethod
    def layer_norms(self) -> Float[Array, "*stack layers"]:
        """Upper bounds of the norms of its layers, as they are used."""

    @abstractmethod
    def __call__(self, x: Array) -> Array:
        """Apply the network to one event."""


class LipschitzMLP(AbstractContraction):
    """A network of dense layers and LipSwish, from ``(dim,)`` to ``(dim,)``.

    Each weight is a :class:`SpectralNorm` of bound ``lipschitz ** (1 / (depth + 1))``.

    Args:
        key: Of the initial weights, those of :class:`equinox.nn.MLP`, then shrunk.
        dim: Size of input and output.
        width: Size of each hidden layer.
        depth: Number of hidden layers.
        lipschitz: Bound on the Lipschitz constant, in (0, 1).
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If ``lipschitz`` is not in (0, 1), or a size is out of range.
    """

    weights: tuple[SpectralNorm | Array, ...]
    biases: tuple[Array, ...]
    activations: tuple[LipSwish, ...]
    lipschitz: float = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        dim: int,
        width: int,
        depth: int,
        lipschitz: float,
        dtype: DTypeLike | None = None,
    ):
        _check.at_least_one(dim=dim, width=width)
        bound = _layer_bound(lipschitz, depth)
        dtype = _check.floating(dtype)
        drawn = eqx.nn.MLP(dim, dim, width, depth, dtype=dtype, key=key).layers
        self.weights = tuple(SpectralNorm(layer.weight, bound) for layer in drawn)
        self.biases = tuple(layer.bias for layer in drawn if layer.bias is not None)
        self.activations = tuple(LipSwish(dtype=dtype) for _ in range(depth))
        self.lipschitz = float(lipschitz)

    def layer_norms(self) -> Float[Array, "*stack layers"]:
        """Upper bounds of the norms of its layers, as they are used."""
        weights = paramax.unwrap(self.weights)
        norms = [gram_bound(w, tolerance=_SHARP) for w in weights]
        return jnp.stack(norms, axis=-1)

    def __call__(self, x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """Apply the network to one event."""
        *weights, last = paramax.unwrap(self.weights)
        *biases, shift = self.biases
        for w, b, act in zip(weights, biases, self.activations, strict=True):
            x = act(w @ x + b)
        return last @ x + shift


class LipschitzConvNet(AbstractContraction):
    """Convolutions of 3, 1 and 3 pixels with LipSwish between, for small pictures.

    Each kernel is a :class:`SpectralConv` of bound ``lipschitz ** (1 / 3)``.

    Args:
        key: Of the initial weights, uniform as those of :class:`equinox.nn.Conv2d`.
        shape: Height, width and channels of a picture.
        width: Number of channels of the hidden layers.
        lipschitz: Bound on the Lipschitz constant, in (0, 1).
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If ``lipschitz`` is not in (0, 1), a size is below 1, or a picture
            has fewer than 2 pixels on a side.

    Source:
        Chen et al. (2019), appendix E, for the kernels.
    """

    weights: tuple[SpectralConv | Array, ...]
    biases: tuple[Array, ...]
    activations: tuple[LipSwish, ...]
    size: tuple[int, int] = eqx.field(static=True)
    lipschitz: float = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, int, int],
        width: int,
        lipschitz: float,
        dtype: DTypeLike | None = None,
    ):
        _check.at_least_one(width=width, channels=shape[2])
        if min(shape[:2]) < 2:
            raise ValueError(f"expected pictures of 2 pixels a side, got {shape[:2]}")
        bound = _layer_bound(lipschitz, 2)
        self.size, channels = shape[:2], (shape[2], width, width, shape[2])
        weights, biases = [], []
        for i, (k, layer_key) in enumerate(
            zip((3, 1, 3), jr.split(key, 3), strict=True)
        ):
            most = 1 / math.sqrt(channels[i] * k * k)
            w_key, b_key = jr.split(layer_key)
            draw = {"dtype": _check.floating(dtype), "minval": -most, "maxval": most}
            kernel = jr.uniform(w_key, (k, k, channels[i], channels[i + 1]), **draw)
            weights.append(SpectralConv(kernel, bound, self.size))
            biases.append(jr.uniform(b_key, (channels[i + 1],), **draw))
        self.weights, self.biases = tuple(weights), tuple(biases)
        self.activations = tuple(LipSwish(dtype=dtype) for _ in range(2))
        self.lipschitz = float(lipschitz)

    def layer_norms(self) -> Float[Array, "*stack layers"]:
        """Upper bounds of the norms of its layers, as they are used."""
        weights = paramax.unwrap(self.weights)
        norms = [conv_bound(w, self.size, tolerance=_SHARP) for w in weights]
        return jnp.stack(norms, axis=-1)

    def __call__(self, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """Apply the network to one picture."""
        *weights, last = paramax.unwrap(self.weights)
        *biases, shift = self.biases
        for w, b, act in zip(weights, biases, self.activations, strict=True):
            x = act(convolve(x, w) + b)
        return convolve(x, last) + shift


def convolve(
    x: Float[Array, "h w in"], kernel: Float[Array, "kh kw in out"]
) -> Float[Array, "h w out"]:
    """Convolution of stride 1 with a rim of zeros, channels last."""
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x[None], kernel, (1, 1), "SAME", dimension_numbers=names
    )[0]


def lipschitz_bound(network: Any) -> Float[Array, "*stack"]:
    """Proven upper bound on the Lipschitz constant: the product of its layers' norms.

    Args:
        network: An :class:`AbstractContraction`; or an :class:`equinox.nn.MLP` or
            ``Linear``, whose activations are looked at on a grid over [-10, 10].

    Raises:
        ValueError: If the network is of another kind, of which nothing is known, or if
            an activation is steeper than 1.
    """
    network = paramax.unwrap(network)
    if isinstance(network, AbstractContraction):
        return jnp.prod(network.layer_norms(), axis=-1)
    if isinstance(network, eqx.nn.Linear):
        return gram_bound(network.weight, tolerance=_SHARP)
    if isinstance(network, eqx.nn.MLP):
        for activation in (network.activation, network.final_activation):
            check_activation(activation)
        norms = [gram_bound(w.weight, tolerance=_SHARP) for w in network.layers]
        return jnp.prod(jnp.stack(norms, axis=-1), axis=-1)
    raise ValueError(
        "expected an AbstractContraction, equinox.nn.MLP or equinox.nn.Linear, whose "
        f"Lipschitz constant can be bounded, got {type(network).__name__}"
    )


def check_bound(network: Any, lipschitz: float) -> None:
    """Raise ``ValueError`` unless the network is proven to be within ``lipschitz``.

    Under ``jit`` and ``vmap`` its weights have no values yet, and nothing is checked.

    Args:
        network: What :func:`lipschitz_bound` knows.
        lipschitz: The bound that is declared of it.

    Raises:
        ValueError: If the product of its norms is larger, or not a number; or if it is
            of an unknown kind.
    """
    found = lipschitz_bound(network)
    if isinstance(found, Tracer) or bool(jnp.all(found <= lipschitz * _SLACK)):
        return
    where = f" in block {np.argmax(found)} of {found.size}" if found.ndim else ""
    raise ValueError(
        f"expected a network of Lipschitz bound {lipschitz:g}, got layers whose norms "
        f"multiply to {np.max(found):.4g}{where}: its weights were set from elsewhere"
    )


def check_activation(activation: Callable[[Array], Array]) -> None:
    """Raise ``ValueError`` if the activation is steeper than 1 on a grid."""
    slope = jnp.max(jnp.abs(jax.vmap(jax.grad(activation))(jnp.linspace(*_GRID))))
    if not slope <= _STEEPEST:
        raise ValueError(
            f"expected a 1-Lipschitz activation, got one of slope {float(slope):.3f}"
        )


def _layer_bound(lipschitz: float, depth: int) -> float:
    if not 0 < lipschitz < 1:
        raise ValueError(f"expected a Lipschitz bound in (0, 1), got {lipschitz}")
    if depth < 0:
        raise ValueError(f"expected a depth of at least 0, got {depth}")
    return float(lipschitz) ** (1 / (depth + 1))


def _frobenius(matrix: Inexact[Array, "*stack n n"]) -> Float[Array, "*stack 1 1"]:
    square = jnp.real(matrix * jnp.conj(matrix))
    return jnp.sqrt(square.sum(axis=(-2, -1), keepdims=True))
