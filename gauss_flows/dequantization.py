"""From whole grey values to numbers in (0, 1), and what a density there is worth.

A density over (0, 1) says nothing of whole numbers: it could pile up on them without
bound. With noise that fills the cells between them, its mean log-density is a bound on
the log-probability of the grey values. All names are found in :mod:`gauss_flows.image`
too.

Source: Theis, van den Oord & Bethge (2016), section 3.1, for uniform noise and its
bound; Ho et al. (2019), "Flow++", section 3.1, for noise that is learned.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flowjax.distributions import Transformed
from jax.core import Tracer
from jax.scipy.special import ndtr
from jax.scipy.stats import norm
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray, Shaped

from . import _check, masks
from .pixels import ConvCoupling, check_halvings


def dequantize(
    key: PRNGKeyArray,
    levels_of_grey: int,
    x: Shaped[Array | np.ndarray, "*n"],
    *,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*n"]:
    r"""Spread whole grey values uniformly over cells of (0, 1): :math:`(x + u) / n`.

    The mean log-density of a flow on what comes out is a lower bound on the mean
    log-probability of the grey values (by Jensen's inequality), once the volume of a
    cell is taken into account, as :func:`bits_per_dimension` does. :func:`quantize`
    gives the grey values back.

    Args:
        key: JAX random key; draw anew for each epoch, or batch.
        levels_of_grey: Number n of grey values, 256 for pictures of 8 bits.
        x: Whole numbers in 0, ..., n - 1, of any shape and any dtype.
        dtype: Floating dtype of the result; JAX's default by default.

    Returns:
        Numbers strictly between 0 and 1, of the same shape.

    Raises:
        ValueError: If a value is not whole or out of range (``EquinoxRuntimeError``
            under jit), ``levels_of_grey`` is below 2, or the dtype cannot tell that
            many levels apart.

    Example:
        >>> grey = jnp.array([0, 255])
        >>> quantize(256, dequantize(jr.key(0), 256, grey)).tolist()
        [0, 255]
    """
    _at_least_two(levels_of_grey)
    grey = jnp.asarray(_grey(levels_of_grey, x)).astype(_check.floating(dtype))
    return _in_cell(levels_of_grey, grey, jr.uniform(key, grey.shape, grey.dtype))


def quantize(
    levels_of_grey: int, x: Float[Array | np.ndarray, "*n"]
) -> Int[Array, "*n"]:
    """The grey values whose cells hold numbers in (0, 1); nearest ones for others.

    Args:
        levels_of_grey: Number n of grey values.
        x: Numbers, such as a flow's samples, of any shape.

    Returns:
        Whole numbers in 0, ..., n - 1.

    Raises:
        ValueError: If ``levels_of_grey`` is below 2.
        RuntimeError: If a number is NaN (``EquinoxRuntimeError`` under jit).
    """
    _at_least_two(levels_of_grey)
    x = jnp.asarray(x)
    x = eqx.error_if(x, jnp.isnan(x).any(), "expected numbers to quantize, got NaN")
    grey = jnp.floor(x * levels_of_grey)
    return jnp.clip(grey, 0, levels_of_grey - 1).astype(int)


def bits_per_dimension(
    log_prob: Float[Array | np.ndarray, "*n"] | float | np.floating,
    shape: tuple[int, ...],
    levels_of_grey: int = 256,
) -> Float[Array, "*n"]:
    r"""Bits per dimension of grey values, from a log-density over (0, 1).

    :math:`\log_2 n - \log p(x) / (d \log 2)` with :math:`d` numbers in an event: each
    of the :math:`n^d` cells of the unit cube has volume :math:`n^{-d}`. The uniform law
    has :math:`\log_2 n`.

    Args:
        log_prob: Log-density in nats of dequantised events, as :func:`dequantize`
            makes them; of any shape.
        shape: Event shape.
        levels_of_grey: Number n of grey values.

    Raises:
        ValueError: If ``shape`` is empty or ``levels_of_grey`` below 2.

    Example:
        >>> float(bits_per_dimension(jnp.zeros(()), (8, 8, 1), 256))
        8.0
    """
    _at_least_two(levels_of_grey)
    if not shape or min(shape) < 1:
        raise ValueError(f"expected an event shape such as (8, 8, 1), got {shape}")
    nats = jnp.asarray(log_prob) / math.prod(shape)
    return math.log2(levels_of_grey) - nats / math.log(2)


class VariationalNoise(eqx.Module):
    r"""Learned noise: a law :math:`q(u \mid x)` on the cell of each grey value.

    Normal noise passes couplings that see the whole picture ``x``, then the normal
    distribution function, which brings it to (0, 1). A new one is uniform and
    independent of ``x``, so that training starts at the bound of :func:`dequantize`.

    Cost per picture: ``2 * depth`` convolutional conditioners.

    Args:
        key: JAX random key of the conditioners.
        shape: Picture shape ``(height, width, channels)``.
        levels_of_grey: Number n of grey values.
        depth: Number of pairs of couplings, on a checkerboard and on its complement.
        nn_width: As for :class:`~gauss_flows.image.ConvCoupling`.
        nn_depth: See there.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Ho, Chen, Srinivas, Duan & Abbeel (2019), "Flow++", section 3.1, with affine
        couplings and a normal distribution function in the place of a sigmoid.
    """

    couplings: tuple[ConvCoupling, ...]
    shape: tuple[int, ...] = eqx.field(static=True)
    levels_of_grey: int = eqx.field(static=True)

    def __init__(
        self,
        key: PRNGKeyArray,
        *,
        shape: tuple[int, ...],
        levels_of_grey: int,
        depth: int = 1,
        nn_width: int = 32,
        nn_depth: int = 2,
        dtype: DTypeLike | None = None,
    ):
        _check.at_least_one(depth=depth)
        _at_least_two(levels_of_grey)
        check_halvings(shape, 0)
        self.shape, self.levels_of_grey = tuple(shape), levels_of_grey
        height, width, channels = shape
        board = masks.checkerboard((height, width, channels))
        picture = np.zeros(shape, bool)  # is seen, and stays as it is
        parts = [
            np.concatenate([picture, part], axis=2)
            for part in (board, masks.complement(board)) * depth
        ]
        self.couplings = tuple(
            ConvCoupling(
                k,
                shape=mask.shape,
                mask=mask,
                nn_width=nn_width,
                nn_depth=nn_depth,
                identity_init=True,
                dtype=dtype,
            )
            for k, mask in zip(jr.split(key, len(parts)), parts, strict=True)
        )

    def __call__(
        self, key: PRNGKeyArray, x: Float[Array, "h w c"]
    ) -> tuple[Float[Array, "h w c"], Float[Array, ""]]:
        """Draw noise for one picture of grey values.

        Args:
            key: JAX random key.
            x: Whole grey values, in a floating dtype.

        Returns:
            Noise in [0, 1], and the logarithm of its density given ``x``, in nats.
        """
        start = jr.normal(key, x.shape, x.dtype)
        seen = (x + 0.5) / self.levels_of_grey - 0.5
        state, log_q = jnp.concatenate([seen, start], axis=2), norm.logpdf(start).sum()
        for coupling in self.couplings:
            state, log_det = coupling.transform_and_log_det(state)
            log_q = log_q - log_det
        end = state[..., x.shape[2] :]
        return ndtr(end), log_q - norm.logpdf(end).sum()


class DequantizedFlow(eqx.Module):
    """A flow over (0, 1) as a model of whole grey values, with the noise between them.

    Args:
        flow: A flow over pictures with values in (0, 1).
        levels_of_grey: Number n of grey values.
        noise: Learned noise; None for uniform noise.

    Raises:
        ValueError: If flow and noise are not made for the same pictures.

    Example:
        >>> import gauss_flows as gf
        >>> flow = gf.image.glow(jr.key(0), shape=(4, 4, 1), levels=1, depth=1)
        >>> model = DequantizedFlow(flow, 17)
        >>> x = jnp.full((3, 4, 4, 1), 16.0)
        >>> model.log_prob_bound(jr.key(1), x).shape
        (3,)
    """

    flow: Transformed
    levels_of_grey: int = eqx.field(static=True)
    noise: VariationalNoise | None = None

    def __check_init__(self):
        """Refuse noise for other pictures."""
        _at_least_two(self.levels_of_grey)
        if self.noise is None:
            return
        wanted, got = (
            (part.shape, n)
            for part, n in (
                (self.flow, self.levels_of_grey),
                (self.noise, self.noise.levels_of_grey),
            )
        )
        if wanted != got:
            raise ValueError(
                f"expected noise for pictures of shape {wanted[0]} and {wanted[1]} "
                f"grey values, got noise for {got[0]} and {got[1]}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Picture shape."""
        return self.flow.shape

    def log_prob_bound(
        self, key: PRNGKeyArray, x: Float[Array, "n h w c"], *, samples: int = 1
    ) -> Float[Array, " n"]:
        r"""An estimate of a lower bound on the log-probability of each picture.

        :math:`\log \tfrac1K \sum_k p(y_k) / q(u_k \mid x)` with
        :math:`y_k = (x + u_k)/n`; its mean over the noise is a bound from below for any
        number K of samples, and the tighter the more there are. To be comparable with
        log-densities over (0, 1) the volume of a cell, :math:`n^{-d}`, is left to
        :func:`bits_per_dimension`.

        Args:
            key: JAX random key of the noise.
            x: Whole grey values, in the flow's floating dtype.
            samples: Number K of samples a picture.

        Returns:
            In nats.

        Raises:
            ValueError: If a value is not whole or out of range
                (``EquinoxRuntimeError`` under jit), ``samples`` is below 1, or the
                dtype cannot tell the levels of grey apart.

        Source:
            Burda, Grosse & Salakhutdinov (2016), equation 8, for more than one sample.
        """
        _check.at_least_one(samples=samples)
        x = _grey(self.levels_of_grey, x)
        keys = jr.split(key, (samples, len(x)))
        one = jax.vmap(self._log_ratio)
        logs = jax.vmap(one, in_axes=(0, None))(keys, x)
        return jax.nn.logsumexp(logs, axis=0) - math.log(samples)

    def _log_ratio(self, key: PRNGKeyArray, x: Array) -> Array:
        if self.noise is None:
            u, log_q = jr.uniform(key, x.shape, x.dtype), jnp.zeros((), x.dtype)
        else:
            u, log_q = self.noise(key, x)
        y = _in_cell(self.levels_of_grey, x, u)
        z, log_det = self.flow.bijection.inverse_and_log_det(y)
        return self.flow.base_dist.log_prob(z).astype(x.dtype) + log_det - log_q


def dequantized_loss(
    model: DequantizedFlow, x: Float[Array, "n h w c"], key: PRNGKeyArray
) -> Float[Array, ""]:
    """Minus the mean bound in nats, with fresh noise: a ``loss`` for ``gf.fit``.

    Args:
        model: The flow and its noise.
        x: Whole grey values, in the flow's floating dtype.
        key: JAX random key of the noise.
    """
    return -model.log_prob_bound(key, x).mean()


def _at_least_two(levels_of_grey: int) -> None:
    if levels_of_grey < 2:
        raise ValueError(f"expected at least 2 levels of grey, got {levels_of_grey}")


def _grey(n: int, x: Shaped[Array | np.ndarray, "*n"]) -> Shaped[Array, "*n"]:
    """``x``, if its values are whole numbers in 0, ..., n - 1."""
    traced = isinstance(x, Tracer)
    # known values as NumPy's: under jit jax.numpy would make tracers of them too
    x, ops = (x, jnp) if traced else (np.asarray(x), np)
    wrong = (x < 0) | (x > n - 1) | (x != ops.floor(x))
    wanted = f"expected whole grey values in 0..{n - 1}, got "
    if traced:
        return eqx.error_if(x, wrong.any(), wanted + "others")
    if wrong.any():
        low, high = np.min(x), np.max(x)
        what = "fractions" if 0 <= low <= high <= n - 1 else "others"
        raise ValueError(f"{wanted}{what}, between {low} and {high}")
    return jnp.asarray(x)


def _in_cell(n: int, grey: Float[Array, "*n"], u: Float[Array, "*n"]) -> Array:
    """The point at ``u`` of each cell; rounding must not carry it into the next one."""
    cell, eps = 1 / n, float(jnp.finfo(grey.dtype).eps)
    if 4 * n * eps > 1:
        raise ValueError(
            f"expected a dtype that tells {n} levels of grey apart, got {grey.dtype}"
        )
    low = jnp.maximum(grey * cell * (1 + 2 * eps), eps * cell)
    return jnp.clip((grey + u) * cell, low, (grey + 1) * cell * (1 - 2 * eps))
