"""Boolean masks that say which coordinates a coupling transforms.

In every mask ``True`` marks the **active** part, the coordinates that the coupling
transforms, and ``False`` the **passive** part, which it copies and from which it
computes the parameters of the transformation. Masks are NumPy arrays: they are fixed
when a flow is built and are never traced.

Names follow RealNVP (Dinh, Sohl-Dickstein & Bengio 2017, section 3.4) where it has one.
"""

import numpy as np
from jax import random as jr
from jaxtyping import Bool, PRNGKeyArray

Mask = Bool[np.ndarray, "..."]


def half(dim: int) -> Bool[np.ndarray, " dim"]:
    """The first ``dim // 2`` coordinates passive, the rest active.

    Args:
        dim: Number of coordinates, at least 2.

    Raises:
        ValueError: If ``dim`` is below 2.

    Example:
        >>> half(5).tolist()
        [False, False, True, True, True]
    """
    return np.arange(_dimension(dim)) >= dim // 2


def alternating(dim: int) -> Bool[np.ndarray, " dim"]:
    """Every second coordinate active, beginning with the second.

    Args:
        dim: Number of coordinates, at least 2.

    Raises:
        ValueError: If ``dim`` is below 2.

    Example:
        >>> alternating(4).tolist()
        [False, True, False, True]
    """
    return np.arange(_dimension(dim)) % 2 == 1


def checkerboard(shape: tuple[int, int, int]) -> Bool[np.ndarray, "h w c"]:
    """A chessboard over the pixels of a picture, the same in every channel.

    Args:
        shape: ``(height, width, channels)`` of the picture.

    Raises:
        ValueError: If ``shape`` is no picture of at least two pixels.

    Example:
        >>> checkerboard((2, 2, 1))[..., 0].tolist()
        [[False, True], [True, False]]
    """
    height, width, channels = _picture(shape)
    if height * width < 2:
        raise ValueError(f"expected a picture of at least 2 pixels, got shape {shape}")
    parity = np.add.outer(np.arange(height), np.arange(width)) % 2 == 1
    return np.repeat(parity[..., None], channels, axis=-1)


def channelwise(shape: tuple[int, int, int]) -> Bool[np.ndarray, "h w c"]:
    """The first ``channels // 2`` channels passive, the rest active.

    Args:
        shape: ``(height, width, channels)`` of the picture, at least two channels.

    Raises:
        ValueError: If ``shape`` is no picture with at least two channels.

    Example:
        >>> channelwise((1, 1, 4))[0, 0].tolist()
        [False, False, True, True]
    """
    height, width, channels = _picture(shape)
    if channels < 2:
        raise ValueError(f"expected at least 2 channels, got shape {shape}")
    return np.broadcast_to(half(channels), (height, width, channels)).copy()


def random(
    key: PRNGKeyArray, shape: int | tuple[int, ...], n_active: int | None = None
) -> Bool[np.ndarray, "..."]:
    """A mask with a given number of active coordinates, placed at random.

    Args:
        key: JAX random key.
        shape: Shape of the event, or its number of coordinates.
        n_active: How many coordinates are active; half of them by default, rounded up.

    Raises:
        ValueError: If a size is below 1, or the mask would be all active or passive.
    """
    shape = (shape,) if isinstance(shape, int) else shape
    if min(shape, default=0) < 1:
        raise ValueError(f"expected a shape of sizes >= 1, got {shape}")
    size = _dimension(int(np.prod(shape)))
    n_active = size - size // 2 if n_active is None else n_active
    if not 0 < n_active < size:
        raise ValueError(f"expected n_active in 1..{size - 1}, got {n_active}")
    mask = np.zeros(size, dtype=bool)
    mask[np.asarray(jr.permutation(key, size))[:n_active]] = True
    return mask.reshape(shape)


def complement(mask: Mask) -> Bool[np.ndarray, "..."]:
    """The mask with active and passive parts exchanged.

    Example:
        >>> complement(half(3)).tolist()
        [True, False, False]
    """
    return ~validate(mask, np.shape(mask))


def validate(mask: np.ndarray, shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """Return ``mask`` as a boolean array of the given shape, or say what is wrong.

    Args:
        mask: Candidate mask, True = active.
        shape: Shape of the event that it must match.

    Raises:
        ValueError: If the mask is not boolean, has another shape, or leaves one of the
            two parts empty.
    """
    mask = np.asarray(mask)
    if mask.dtype != np.bool_:
        raise ValueError(f"expected a boolean mask, got dtype {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"expected a mask of shape {shape}, got shape {mask.shape}")
    if mask.all() or not mask.any():
        part = "active" if mask.all() else "passive"
        raise ValueError(
            f"expected a mask with an active and a passive part, got all {part}"
        )
    return mask


def _dimension(dim: int) -> int:
    if dim < 2:
        raise ValueError(f"expected at least 2 coordinates to split, got {dim}")
    return dim


def _picture(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"expected a picture shape (height, width, channels), got {shape}"
        )
    height, width, channels = shape
    return height, width, channels
