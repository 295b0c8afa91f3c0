r"""Linear couplings: constant scale, linear shift.

On vectors of even size :math:`n = 2d`, cut into an upper and a lower half,

.. math::
    L(A, b) = \begin{pmatrix} I & 0 \\ A & \operatorname{diag} b \end{pmatrix}
    \qquad\text{and}\qquad
    U(D, c) = \begin{pmatrix} \operatorname{diag} c & D \\ 0 & I \end{pmatrix}

with positive scales. A product of them is a flow with one fixed partition; the list
``[F_1, ..., F_m]`` stands for the matrix :math:`F_1 \cdots F_m`, so that its last
element acts first.

Source: Koehler, Mehta & Risteski (2021), with constant :math:`s` and linear :math:`t`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Literal

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flowjax.bijections import Chain
from jaxtyping import Array, DTypeLike, Float

from .. import masks
from ..coupling import AffineCoupling, with_last_layer
from ..pixels import ConvCoupling
from ..transformers import Affine


@dataclass(frozen=True, eq=False)
class LinearCoupling:
    r"""One factor, :math:`L(A, b)` or :math:`U(D, c)`.

    Args:
        kind: ``"L"`` changes the lower half, ``"U"`` the upper one.
        kernel: What the other half is multiplied by before it is added, shape (d, d).
        scale: What the half itself is multiplied by, shape (d,), positive.

    Raises:
        ValueError: If the kind is another, the shapes do not match, a scale is not
            finite and positive, or the kernel is not finite.
    """

    kind: Literal["L", "U"]
    kernel: Float[np.ndarray, "d d"]
    scale: Float[np.ndarray, " d"]

    def __post_init__(self):
        """Refuse what is no coupling."""
        if self.kind not in ("L", "U"):
            raise ValueError(f"expected kind L or U, got {self.kind!r}")
        if self.scale.ndim != 1 or self.kernel.shape != 2 * self.scale.shape:
            raise ValueError(
                "expected a kernel of shape (d, d) and a scale of shape (d,), got "
                f"{self.kernel.shape} and {self.scale.shape}"
            )
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError(f"expected finite, positive scales, got {self.scale}")
        if not np.isfinite(self.kernel).all():
            raise ValueError("expected a finite kernel, got NaN or inf")

    @property
    def matrix(self) -> Float[np.ndarray, "n n"]:
        """The factor as a matrix of shape (2 d, 2 d)."""
        one, zero = np.eye(len(self.scale)), np.zeros_like(self.kernel)
        scale = np.diag(self.scale)
        if self.kind == "L":
            return np.block([[one, zero], [self.kernel, scale]])
        return np.block([[scale, self.kernel], [zero, one]])

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing, exactly."""
        return not self.kernel.any() and bool((self.scale == 1).all())

    def __matmul__(self, other: "LinearCoupling") -> "LinearCoupling":
        """The product of two factors of one kind, again a factor of that kind."""
        if self.kind != other.kind:
            raise ValueError(f"expected kind {self.kind}, got {other.kind}")
        kernel = self.kernel + self.scale[:, None] * other.kernel
        return LinearCoupling(self.kind, kernel, self.scale * other.scale)

    def inverse(self) -> "LinearCoupling":
        """The inverse, a factor of the same kind."""
        kernel = -self.kernel / self.scale[:, None]
        return LinearCoupling(self.kind, kernel, 1 / self.scale)

    def swapped(self) -> "LinearCoupling":
        """The same factor with the halves exchanged."""
        return LinearCoupling("U" if self.kind == "L" else "L", self.kernel, self.scale)

    def layer(
        self,
        *,
        mask: masks.Mask | None = None,
        pixels: tuple[int, int] | None = None,
        dtype: DTypeLike | None = None,
    ) -> AffineCoupling | ConvCoupling:
        """The factor as a layer of a flow: an affine coupling without hidden layers.

        Args:
            mask: Which coordinates are the lower half, True = lower; by default the
                second half of the vector.
            pixels: Height and width of the pictures whose channels are the vectors, one
                a pixel. By default events are single vectors.
            dtype: Floating dtype of the parameters; JAX's default by default.

        Raises:
            ValueError: If the mask does not mark half of the coordinates.
        """
        d = len(self.scale)
        lower = masks.half(2 * d) if mask is None else masks.validate(mask, (2 * d,))
        if lower.sum() != d:
            raise ValueError(f"expected a mask of {d} of {2 * d}, got {lower.sum()}")
        active = lower if self.kind == "L" else masks.complement(lower)
        raw = Affine().parameter_of(jnp.asarray(self.scale, dtype))
        zero = np.zeros_like(self.kernel)
        if pixels is not None:
            return self._convolution(active, pixels, raw, dtype)
        coupling = AffineCoupling(
            jr.key(0), shape=(2 * d,), mask=active, nn_depth=0, dtype=dtype
        )
        # for each coordinate a row of the shift, and one of the scale: constant
        weight = np.stack([self.kernel, zero], axis=1)
        bias = jnp.stack([jnp.zeros_like(raw), raw], axis=1)
        return with_last_layer(coupling, weight.reshape(2 * d, d), bias.ravel())

    def _convolution(
        self,
        active: masks.Mask,
        pixels: tuple[int, int],
        raw: Float[Array, " d"],
        dtype: DTypeLike | None,
    ) -> ConvCoupling:
        """The layer for pictures: the middle of a 3×3 convolution, zeros around it."""
        d = len(self.scale)
        coupling = ConvCoupling(
            jr.key(0),
            shape=(*pixels, 2 * d),
            mask=np.broadcast_to(active, (*pixels, 2 * d)),
            transformer=Affine(),
            nn_depth=0,
            dtype=dtype,
        )
        # all shifts, then all scales
        weight = np.zeros((2 * d, d, 3, 3))
        weight[:d, :, 1, 1] = self.kernel
        bias = jnp.concatenate([jnp.zeros_like(raw), raw])
        return with_last_layer(coupling, weight, bias.reshape(-1, 1, 1))


def product(factors: Sequence[LinearCoupling]) -> Float[np.ndarray, "n n"]:
    """The matrix that a list of factors stands for, the last of them acting first.

    Raises:
        ValueError: If there is no factor.
    """
    if not factors:
        raise ValueError("expected at least one factor, got none")
    return reduce(np.matmul, [factor.matrix for factor in factors])


def chain(
    factors: Sequence[LinearCoupling],
    *,
    mask: masks.Mask | None = None,
    pixels: tuple[int, int] | None = None,
    dtype: DTypeLike | None = None,
) -> Chain:
    """The factors as a stack of coupling layers with one fixed partition.

    Args:
        factors: The factors; the bijection takes x to ``product(factors) @ x``.
        mask: Which coordinates are the lower half, True = lower; by default the second
            half of the vector.
        pixels: As for :meth:`LinearCoupling.layer`.
        dtype: Floating dtype of the parameters; JAX's default by default.

    Raises:
        ValueError: If there is no factor, or the mask does not mark half of the
            coordinates.
    """
    if not factors:
        raise ValueError("expected at least one factor, got none")
    options = {"mask": mask, "pixels": pixels, "dtype": dtype}
    return Chain([factor.layer(**options) for factor in reversed(factors)])


def merged(factors: Sequence[LinearCoupling]) -> list[LinearCoupling]:
    """The same product in fewer factors: identities left out, neighbours put together.

    What comes out alternates between the two kinds. If all cancel one identity is left.
    """
    out: list[LinearCoupling] = []
    for factor in factors:
        if factor.is_identity:
            continue
        if out and out[-1].kind == factor.kind:
            factor = out.pop() @ factor
        if not factor.is_identity:
            out.append(factor)
    if all(one.kind != other.kind for one, other in pairwise(out)):
        return out or [_identity(factor) for factor in factors[:1]]
    return merged(out)  # two became an identity, and their neighbours met


def _identity(like: LinearCoupling) -> LinearCoupling:
    return LinearCoupling(
        like.kind, np.zeros_like(like.kernel), np.ones_like(like.scale)
    )
