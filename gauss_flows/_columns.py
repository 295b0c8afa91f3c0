"""Many events at once as columns: batch axes trail, so that loops run over events.

``jax.vmap`` puts the batch in front: a layer of a batch of plane events then works on
pairs, and on rows of a handful of spline parameters. With the batch behind, every
operation runs along the events: on a CPU a spline stack takes some 0.6 of the time.

A layer that can do this is an :class:`AbstractColumnwise`; :func:`transform` passes
columns through any bijection; with :func:`batched`, ``jax.vmap`` finds that way.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection, Chain, Invert
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, PyTree


class AbstractColumnwise(AbstractBijection):
    """A bijection that takes one event, or many whose batch axes trail."""

    @abstractmethod
    def columns(
        self, x: Float[Array, "..."], *, inverse: bool = False
    ) -> tuple[Float[Array, "..."], Float[Array, "*batch"]]:
        """Transform events, or undo that.

        Args:
            x: Events of shape ``(*shape, *batch)``.
            inverse: Whether to apply the inverse.

        Returns:
            Events of the same shape, and their log-determinants of shape ``batch``.
        """

    def transform_and_log_det(self, x: Array, condition: Array | None = None):
        """Transform one event; its image, and the log-determinant."""
        return self.columns(x)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None):
        """Undo the transformation; the preimage, and the inverse's log-determinant."""
        return self.columns(y, inverse=True)


def transform(
    bijection: AbstractBijection, x: Float[Array, "..."], *, inverse: bool = False
) -> tuple[Float[Array, "..."], Float[Array, "*batch"]]:
    """Pass columns through any bijection; its parameters must be unwrapped.

    See :meth:`AbstractColumnwise.columns`.
    """
    match bijection:
        case AbstractColumnwise():
            return bijection.columns(x, inverse=inverse)
        case Invert(bijection=inner):
            return transform(inner, x, inverse=not inverse)
        case Chain(bijections=parts):
            total = jnp.zeros((), x.dtype)
            for part in reversed(parts) if inverse else parts:
                x, log_det = transform(part, x, inverse=inverse)  # pyright: ignore
                total = total + log_det
            return x, total
    one = bijection.inverse_and_log_det if inverse else bijection.transform_and_log_det
    for _ in range(x.ndim - len(bijection.shape)):
        one = jax.vmap(one, in_axes=-1, out_axes=-1)
    return one(x)


def batched(
    function: Callable[[PyTree, Array], tuple[Array, Array]], arrays: PyTree, x: Array
) -> tuple[Array, Array]:
    """``function(arrays, x)`` of one event ``x``, and of columns where it is mapped.

    Args:
        function: Takes ``x`` of shape ``(*shape, *batch)`` to an array of that shape
            and one of shape ``batch``.
        arrays: Parameters. Where they are mapped too, the usual rule applies.
        x: One event.
    """
    leaves, structure = jax.tree.flatten(arrays)

    def flat(x: Array, *leaves: Array) -> tuple[Array, Array]:
        return function(jax.tree.unflatten(structure, leaves), x)

    return tuple(_batched.bind(x, *leaves, function=flat))  # pyright: ignore


# A primitive, because it has to vanish under differentiation as well as under vmap;
# what jax.custom_batching makes has no transpose, so that one event had no gradient.
_batched = Primitive("columns")
_batched.multiple_results = True


@_batched.def_impl
def _(x: Array, *leaves: Array, function: Callable) -> list[Array]:
    return list(function(x, *leaves))


@_batched.def_abstract_eval
def _(x: Any, *leaves: Any, function: Callable) -> list[Any]:
    shapes = jax.eval_shape(function, x, *leaves)
    return [ShapedArray(s.shape, s.dtype) for s in shapes]


def _jvp(primals: tuple, tangents: tuple, *, function: Callable) -> tuple[list, list]:
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def along(*moved: Array) -> list[Array]:
        arguments = list(primals)
        for i, argument in zip(moving, moved, strict=True):
            arguments[i] = argument
        return list(function(*arguments))

    return jax.jvp(along, [primals[i] for i in moving], [tangents[i] for i in moving])


def _vmap(arguments: tuple, axes: tuple, *, function: Callable) -> tuple[list, list]:
    x, *leaves = arguments
    if any(axis is not None for axis in axes[1:]) or x.shape[axes[0]] == 0:
        return list(jax.vmap(function, axes)(*arguments)), [0, 0]
    x = jnp.moveaxis(x, axes[0], -1)
    outs = _in_parts(lambda part: function(part, *leaves), x)
    return list(outs), [out.ndim - 1 for out in outs]


PART = 2**14
"""Numbers in the columns of one part, on a CPU; a spline has some 30 times as many.

All columns of 64 coordinates at once, 8,192 of them, take four times as long.
"""


def _in_parts(function: Callable, x: Array) -> list[Array]:
    """``function`` of columns, on a CPU of so few at a time that a cache holds them."""
    size = _part(x.shape[-1], x.size // x.shape[-1])
    if size == x.shape[-1]:
        return list(function(x))
    parts = jnp.moveaxis(x.reshape(*x.shape[:-1], -1, size), -2, 0)

    def whole(out: Array) -> Array:
        out = jnp.moveaxis(out, 0, -2)
        return out.reshape(*out.shape[:-2], -1)

    return [whole(out) for out in jax.lax.map(function, parts)]


def _part(n_columns: int, height: int) -> int:
    """How many columns to take at a time: a divisor of their number, or all of them."""
    most = PART // height
    if jax.default_backend() != "cpu" or n_columns <= most:
        return n_columns
    size = max((n for n in range(1, most + 1) if n_columns % n == 0), default=0)
    return size if 8 * size > most else n_columns


ad.primitive_jvps[_batched] = _jvp
batching.primitive_batchers[_batched] = _vmap
mlir.register_lowering(_batched, mlir.lower_fun(_batched.impl, multiple_results=True))
