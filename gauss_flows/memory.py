"""What a deep stack keeps for its backward pass: all, little, or next to nothing.

The gradient of a stack needs what every block saw. Plain autodiff stores it, with all
that happened inside the block, so memory grows with depth. Two ways out: keep only the
state in front of each block and compute the block again; or keep not even that, since
a flow can be inverted, and rebuild each state from the one behind it. The second is
exact in real numbers only. In floating point the rebuilt states drift, and in a deep
untrained stack of splines the drift grows until the gradient is noise. So true states
are kept every few blocks; there the drift is measured, and too large a one is an error.

Source: Chen et al. (2016), "Training deep nets with sublinear memory cost"; Gomez et
al. (2017), "The reversible residual network", section 3.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection, Scan
from jaxtyping import Array, Float, PyTree

from . import _check, _columns

MODES = ("store", "recompute", "invert")


class Stack(Scan):
    """A ``flowjax.bijections.Scan`` that chooses what to keep for its backward pass.

    Values and, up to rounding, gradients are those of ``Scan`` in each mode:

    - ``"store"``: all that autodiff asks for. Each block is computed once.
    - ``"recompute"``: the state in front of each block. The block is computed twice.
    - ``"invert"``: the state in front of every ``keep_every``-th block. Each block is
      computed twice and inverted once. First derivatives in reverse mode only.

    Args:
        bijection: A block whose arrays lead with an axis of depth.
        memory: What to keep.
        keep_every: With ``"invert"``: blocks from one kept state to the next.
        tolerance: With ``"invert"``: the largest drift of a rebuilt state from the
            kept one, in units of 1 + the state's largest entry. By default the square
            root of the coarsest epsilon among parameters and state: 1.5e-8 if all are
            float64, 3.5e-4 if any is float32.

    Raises:
        ValueError: If an argument is out of range or unknown, or the block takes a
            condition.
        EquinoxRuntimeError: In the backward pass, if the drift exceeds ``tolerance``.
    """

    bijection: AbstractBijection
    shape: tuple[int, ...]
    cond_shape: tuple[int, ...] | None
    memory: str = eqx.field(static=True)
    keep_every: int = eqx.field(static=True)
    tolerance: float | None = eqx.field(static=True)

    def __init__(
        self,
        bijection: AbstractBijection,
        *,
        memory: str = "store",
        keep_every: int = 16,
        tolerance: float | None = None,
    ):
        if memory not in MODES:
            raise ValueError(f"expected memory in {list(MODES)}, got {memory!r}")
        _check.at_least_one(keep_every=keep_every)
        if tolerance is not None:
            _check.positive(tolerance=tolerance)
        super().__init__(bijection)
        if self.cond_shape is not None:
            raise ValueError(
                "expected a block without a condition, got one of cond_shape "
                f"{self.cond_shape}: flowjax's Scan takes it"
            )
        self.memory = memory
        self.keep_every = keep_every
        self.tolerance = tolerance

    def transform_and_log_det(self, x: Array, condition: Array | None = None):
        """Pass an event through all blocks, the first one first.

        Args:
            x: Event of shape ``shape``.
            condition: Unused.

        Returns:
            The transformed event and the scalar log-determinant.
        """
        return self._run(x, backwards=False)

    def inverse_and_log_det(self, y: Array, condition: Array | None = None):
        """Undo all blocks, the last one first.

        Args:
            y: Event of shape ``shape``.
            condition: Unused.

        Returns:
            The preimage and the scalar log-determinant of the inverse.
        """
        return self._run(y, backwards=True)

    def _run(self, x: Array, *, backwards: bool) -> tuple[Array, Array]:
        arrays, static = eqx.partition(self.bijection, eqx.is_array)
        if backwards:
            arrays = jax.tree.map(lambda a: a[::-1], arrays)

        def there(arrays: PyTree, x: Array) -> tuple[Array, Array]:
            block = eqx.combine(arrays, static)
            return _columns.transform(block, x, inverse=backwards)

        def back(arrays: PyTree, y: Array) -> Array:
            block = eqx.combine(arrays, static)
            return _columns.transform(block, y, inverse=not backwards)[0]

        if self.memory == "invert":
            event_axes = tuple(range(x.ndim))
            run = _invertible(there, back, event_axes, self.keep_every, self.tolerance)
        else:
            if self.memory == "recompute":
                # Inside a scan nothing can be merged with the first pass anyway.
                there = jax.checkpoint(there, prevent_cse=False)
            run = functools.partial(_scan, there, x.ndim)
        return _columns.batched(run, arrays, x)


def _scan(
    there: Callable, event_ndim: int, arrays: PyTree, x: Array
) -> tuple[Array, Array]:
    def step(carry: tuple[Array, Array], block: PyTree) -> tuple:
        x, total = carry
        y, log_det = there(block, x)
        return (y, total + log_det.astype(total.dtype)), None

    start = (x, _no_log_det(event_ndim, arrays, x))
    return jax.lax.scan(step, start, arrays)[0]


def _no_log_det(event_ndim: int, arrays: PyTree, x: Array) -> Array:
    inexact = jax.tree.leaves(eqx.filter(arrays, eqx.is_inexact_array))
    return jnp.zeros(x.shape[event_ndim:], jnp.result_type(x, *inexact))


def _invertible(
    there: Callable,
    back: Callable,
    event_axes: tuple[int, ...],
    keep_every: int,
    tolerance: float | None,
) -> Callable[[PyTree, Array], tuple[Array, Array]]:
    """The scan of ``there`` whose backward pass rebuilds states with ``back``."""

    @eqx.filter_custom_vjp
    def run(inputs: tuple[PyTree, Array]) -> tuple[Array, Array]:
        return _scan(there, len(event_axes), *inputs)

    def forward(_: PyTree, inputs: tuple[PyTree, Array]) -> tuple:
        y, log_det, kept = _scan_and_keep(there, len(event_axes), *inputs, keep_every)
        return (y, log_det), (y, log_det, kept)

    def backward(
        residuals: tuple, cotangents: tuple, _: PyTree, inputs: tuple[PyTree, Array]
    ) -> tuple[PyTree, Array]:
        y, log_det, kept = residuals
        of_y, of_log_det = cotangents
        of_y = jnp.zeros_like(y) if of_y is None else of_y
        of_log_det = jnp.zeros_like(log_det) if of_log_det is None else of_log_det
        return _pull_back(
            there, back, event_axes, keep_every, tolerance, inputs[0],
            y, kept, of_y, of_log_det,
        )  # fmt: skip

    run.def_fwd(forward)
    run.def_bwd(backward)
    return lambda arrays, x: run((arrays, x))


def _scan_and_keep(
    there: Callable, event_ndim: int, arrays: PyTree, x: Array, keep_every: int
) -> tuple[Array, Array, Array]:
    """As ``_scan``, and the states in front of every ``keep_every``-th block."""
    depth = len(jax.tree.leaves(arrays)[0])

    def step(carry: tuple, item: tuple) -> tuple:
        x, total, kept = carry
        index, block = item
        y, log_det = there(block, x)
        # all writes of a stretch but the first fall outside the buffer
        place = jnp.where(index % keep_every == 0, index // keep_every, len(kept))
        kept = kept.at[place].set(x, mode="drop")
        return (y, total + log_det.astype(total.dtype), kept), None

    kept = jnp.zeros((-(-depth // keep_every), *x.shape), x.dtype)
    start = (x, _no_log_det(event_ndim, arrays, x), kept)
    return jax.lax.scan(step, start, (jnp.arange(depth), arrays))[0]


def _pull_back(
    there: Callable,
    back: Callable,
    event_axes: tuple[int, ...],
    keep_every: int,
    tolerance: float | None,
    arrays: PyTree,
    y: Float[Array, "..."],
    kept: Float[Array, "n_kept ..."],
    of_y: Float[Array, "..."],
    of_log_det: Float[Array, "*batch"],
) -> tuple[PyTree, Float[Array, "..."]]:
    """Cotangents of parameters, summed over events, and of the first states."""
    params, rest = eqx.partition(arrays, eqx.is_inexact_array)
    depth = len(jax.tree.leaves(params)[0])

    def step(carry: tuple, item: tuple) -> tuple:
        y, of_y, drift = carry
        index, block, rest = item
        x = back(eqx.combine(block, rest), y)
        true = kept[index // keep_every]
        at_kept = index % keep_every == 0
        apart = _distance(x, true, event_axes)
        drift = jnp.maximum(drift, jnp.where(at_kept, apart, 0.0))
        x = jnp.where(at_kept, true, x)

        def through(block: PyTree, x: Array) -> tuple[Array, Array]:
            y, log_det = there(eqx.combine(block, rest), x)
            return y, log_det.astype(of_log_det.dtype)

        of_block, of_x = jax.vjp(through, block, x)[1]((of_y, of_log_det))
        return (x, of_x, drift), of_block

    start = (y, of_y, jnp.zeros((), y.dtype))
    items = (jnp.arange(depth), params, rest)
    (_, of_x, drift), of_params = jax.lax.scan(step, start, items, reverse=True)
    limit = _rounding(params, y) ** 0.5 if tolerance is None else tolerance
    return eqx.error_if(
        (of_params, of_x),
        drift > limit,
        "expected states rebuilt by inversion to drift by at most the tolerance, "
        f"{limit:.1e}, got more: keep more states (a smaller keep_every), use float64, "
        'or memory="recompute", which has no drift',
    )


def _distance(
    x: Float[Array, "..."], true: Float[Array, "..."], event_axes: tuple[int, ...]
) -> Float[Array, ""]:
    """Largest difference of an event, in units of 1 + the event's largest entry."""
    size = 1 + jnp.abs(true).max(axis=event_axes)
    apart = jnp.abs(x - true).max(axis=event_axes) / size
    # a state that is no longer a number has drifted beyond any bound
    return jnp.where(jnp.isnan(apart), jnp.inf, apart).max()


def _rounding(*trees: PyTree) -> float:
    """The epsilon of the coarsest dtype: a state is no better than what acts on it."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(trees))
