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

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection, Scan
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, PyTree

from . import _check

MODES = ("store", "recompute", "invert")


class Stack(Scan):
    """A ``flowjax.bijections.Scan`` that chooses what to keep for its backward pass.

    Values and, up to rounding, gradients are those of ``Scan`` in each mode:

    - ``"store"``: everything. Fastest where it fits.
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
        ValueError: If an argument is out of range or unknown.
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

        def there(block: PyTree, x: Array) -> tuple[Array, Array]:
            block = eqx.combine(block, static)
            return (
                block.inverse_and_log_det(x)
                if backwards
                else (block.transform_and_log_det(x))
            )

        def back(block: PyTree, y: Array) -> Array:
            block = eqx.combine(block, static)
            return block.transform(y) if backwards else block.inverse(y)

        if self.memory == "invert":
            return _invertible(there, back, self.keep_every, self.tolerance)(arrays, x)
        if self.memory == "recompute":
            # Inside a scan nothing can be merged with the first pass anyway.
            there = jax.checkpoint(there, prevent_cse=False)
        return _scan(there, arrays, x)


def _scan(there: Callable, arrays: PyTree, x: Array) -> tuple[Array, Array]:
    def step(carry: tuple[Array, Array], block: PyTree) -> tuple:
        x, total = carry
        y, log_det = there(block, x)
        return (y, total + log_det), None

    return jax.lax.scan(step, (x, _weak_zero()), arrays)[0]


def _weak_zero() -> Array:
    """A zero that takes the dtype of whatever is added to it."""
    return jnp.asarray(0.0)


def _invertible(
    there: Callable, back: Callable, keep_every: int, tolerance: float | None
) -> Callable[[PyTree, Array], tuple[Array, Array]]:
    """The scan of ``there`` whose backward pass rebuilds states with ``back``."""

    @eqx.filter_custom_vjp
    def run(inputs: tuple[PyTree, Array]) -> tuple[Array, Array]:
        return _scan(there, *inputs)

    def forward(_: PyTree, inputs: tuple[PyTree, Array]) -> tuple:
        arrays, x = inputs
        y, log_det, kept = _scan_and_keep(there, arrays, x, keep_every)
        return (y, log_det), (y, log_det, kept)

    def backward(
        residuals: tuple, cotangents: tuple, _: PyTree, inputs: tuple[PyTree, Array]
    ) -> tuple[PyTree, Array]:
        y, log_det, kept = residuals
        of_y, of_log_det = cotangents
        of_y = jnp.zeros_like(y) if of_y is None else of_y
        of_log_det = jnp.zeros_like(log_det) if of_log_det is None else of_log_det
        params, rest = eqx.partition(inputs[0], eqx.is_inexact_array)
        batch = jax.tree.map(lambda a: a[None], (y, kept, of_y, of_log_det))
        of_params, of_x = pull_back(params, rest, *batch)
        return of_params, of_x[0]

    @custom_vmap
    def pull_back(params: PyTree, rest: PyTree, *batch: Array) -> tuple:
        return _pull_back(there, back, keep_every, tolerance, params, rest, *batch)

    @pull_back.def_vmap
    def _(size: int, batched: list, params: PyTree, rest: PyTree, *batch: Array):
        if any(jax.tree.leaves(batched[:2])):
            axes = jax.tree.map(lambda b: 0 if b else None, tuple(batched))
            plain = jax.vmap(
                lambda *args: _pull_back(there, back, keep_every, tolerance, *args),
                axes,
            )
            out = plain(params, rest, *batch)
            return out, jax.tree.map(lambda _: True, out)
        batch = tuple(
            a if is_batched else jnp.broadcast_to(a, (size, *a.shape))
            for a, is_batched in zip(batch, batched[2:], strict=True)
        )
        n = batch[0].shape[1]
        of_params, of_x = pull_back(
            params, rest, *(a.reshape(-1, *a.shape[2:]) for a in batch)
        )
        # The sum over events is taken inside, by a matrix product. Outside, vmap sums
        # once more, over an axis that holds nothing but shares of that sum.
        shares = jax.tree.map(
            lambda a: jnp.broadcast_to(a / size, (size, *a.shape)), of_params
        )
        out = shares, of_x.reshape(size, n, *of_x.shape[1:])
        return out, jax.tree.map(lambda _: True, out)

    run.def_fwd(forward)
    run.def_bwd(backward)
    return lambda arrays, x: run((arrays, x))


def _scan_and_keep(
    there: Callable, arrays: PyTree, x: Array, keep_every: int
) -> tuple[Array, Array, Array]:
    """As ``_scan``, and the states in front of every ``keep_every``-th block."""
    depth = len(jax.tree.leaves(arrays)[0])

    def step(carry: tuple, item: tuple) -> tuple:
        x, total, kept = carry
        index, block = item
        y, log_det = there(block, x)
        # all writes of a stretch but the first fall outside the buffer
        place = jnp.where(index % keep_every == 0, index // keep_every, len(kept))
        return (y, total + log_det, kept.at[place].set(x, mode="drop")), None

    kept = jnp.zeros((-(-depth // keep_every), *x.shape), x.dtype)
    return jax.lax.scan(step, (x, _weak_zero(), kept), (jnp.arange(depth), arrays))[0]


def _pull_back(
    there: Callable,
    back: Callable,
    keep_every: int,
    tolerance: float | None,
    params: PyTree,
    rest: PyTree,
    y: Float[Array, "n ..."],
    kept: Float[Array, "n n_kept ..."],
    of_y: Float[Array, "n ..."],
    of_log_det: Float[Array, " n"],
) -> tuple[PyTree, Float[Array, "n ..."]]:
    """Cotangents of parameters, summed over events, and of the first states."""
    depth = len(jax.tree.leaves(params)[0])

    def step(carry: tuple, item: tuple) -> tuple:
        y, of_y, drift = carry
        index, block, rest = item
        full = eqx.combine(block, rest)
        x = jax.vmap(back, (None, 0))(full, y)
        true = kept[:, index // keep_every]
        at_kept = index % keep_every == 0
        drift = jnp.maximum(drift, jnp.where(at_kept, _distance(x, true), 0.0))
        x = jnp.where(at_kept, true, x)

        def through(block: PyTree, x: Array) -> tuple[Array, Array]:
            return jax.vmap(there, (None, 0))(eqx.combine(block, rest), x)

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
    x: Float[Array, "n ..."], true: Float[Array, "n ..."]
) -> Float[Array, ""]:
    """Largest difference of an event, in units of 1 + the event's largest entry."""
    axes = tuple(range(1, x.ndim))
    apart = jnp.abs(x - true).max(axis=axes) / (1 + jnp.abs(true).max(axis=axes))
    # a state that is no longer a number has drifted beyond any bound
    return jnp.where(jnp.isnan(apart), jnp.inf, apart).max()


def _rounding(*trees: PyTree) -> float:
    """The epsilon of the coarsest dtype: a state is no better than what acts on it."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(trees))
