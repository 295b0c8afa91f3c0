"""The host's part of training: one interval after the other, reports, checkpoints.

What users call is in ``train``, and what is compiled in ``_loop``.
"""

import hashlib
import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from . import checkpoint
from ._loop import (
    Plan,
    Rates,
    State,
    draw_ahead,
    initial_state,
    interval,
    replicated,
    select,
    trainable,
)
from ._progress import Progress
from ._shares import compiled, on_data

Report = Callable[[int, PyTree, np.ndarray, np.ndarray], dict[str, Any] | None]
"""``report(step, flow, losses, held_out)``: what it returns, by name, is recorded."""

Log = dict[str, np.ndarray]
"""``steps``: losses and norms, (2, *seeds, steps + 1); the rest: a row a report.

The names of what a callback returns begin with a dot.
"""


class Store(NamedTuple):
    """Where checkpoints go, how often, and the settings that must agree to resume."""

    path: Path
    every: int
    settings: dict[str, Any]


class Run(NamedTuple):
    """What ``run`` returns: flows, records as NumPy arrays, and times in seconds.

    ``failing`` holds the parameters that failed, where a step did.
    """

    best: PyTree
    final: PyTree
    failing: PyTree
    log: Log
    best_step: np.ndarray
    failed: np.ndarray
    stopped: np.ndarray
    compile_seconds: float
    run_seconds: float


def run(
    plan: Plan,
    rates: Rates,
    flow: PyTree,
    key: Array,
    x: Array | np.memmap,
    x_val: Array | None,
    steps: int,
    *,
    report: Report | None,
    progress: bool,
    store: Store | None,
) -> Run:
    """Train; the host is asked once an interval. The caller has checked all data."""
    params, static = trainable(flow)
    state = initial_state(plan, params, key, x.dtype)
    blank = np.full((2, *np.shape(state.failed), steps + 1), np.nan, x.dtype)
    log = {"steps": blank, "val_steps": np.zeros(0, int)}
    memory = None if isinstance(x, np.memmap) else x
    on_devices = _place(plan, (static, rates, x_val, memory))
    position = 0

    def inputs(start, stop, state):
        static, rates, x_val, rows = on_devices
        rows = _read(plan, x, state.key) if isinstance(x, np.memmap) else rows
        counts = (jnp.asarray(i, jnp.int32) for i in (start, stop, steps))
        return plan, static, rates, rows, x_val, *counts

    if store is not None:
        program = interval.lower(inputs(0, 0, state), _owned(plan, state)).as_text()
        hashes = _hashes(x=x, x_val=x_val, start=(state, static), program=program)
        store = store._replace(settings=store.settings | hashes)
        state, log, position = _resume(store, state, log)
    begin = perf_counter()
    advance = interval
    if position <= steps:
        advance = compiled(plan, inputs(0, 0, state), _owned(plan, state))
    ready = perf_counter()
    state = _owned(plan, state)
    with Progress(steps, position, progress) as bar:
        saved = position
        starts = (*range(0, steps, plan.interval), steps)
        for start in [start for start in starts if start >= position]:
            stop = min(start + plan.interval, steps) if start < steps else steps + 1
            seen = report and eqx.combine(_local(state.candidate()), static)
            state, (value, *new) = advance(inputs(start, stop, state), state)
            log["steps"][..., start:stop] = np.stack(new)[..., : stop - start]
            losses, value = log["steps"][0, ..., :stop].copy(), np.asarray(value)
            found = (report and report(start, seen, losses[..., :start], value)) or {}
            log = _appended(log, start, value, found)
            over = bool(np.all(_ended(state)))
            position = steps + 1 if over else stop
            if store and (position > steps or position - saved >= store.every):
                _save(store, state, log, position)
                saved = position
            held_out = "" if x_val is None else f", held out {np.median(value):.3f}"
            text = f"loss {np.median(losses[..., -1]):.3f}{held_out}"
            bar.report(min(stop, steps), text, last=position > steps)
            if over:
                break
    failed = np.asarray(state.failed)
    return Run(
        **_flows(plan, state, static),
        log=log,
        best_step=np.asarray(state.best_step),
        failed=failed,
        stopped=np.asarray(failed * 0 - 1 if state.stopped is None else state.stopped),
        compile_seconds=ready - begin,
        run_seconds=perf_counter() - ready,
    )


def _flows(plan, state, static):
    """The flows of a state, by their names in ``Run``."""
    choose = jax.vmap(select) if plan.many else select
    best = choose(state.best_step >= 0, state.best, state.candidate())
    found = {"best": best, "final": state.params, "failing": state.previous}
    found = found if plan.mesh is None else _local(found)
    return {name: eqx.combine(params, static) for name, params in found.items()}


def _ended(state):
    """Which seeds make no more steps."""
    stopped = -1 if state.stopped is None else np.asarray(state.stopped)
    return (np.asarray(state.failed) >= 0) | (stopped >= 0)


def _appended(log: Log, start, value, found) -> Log:
    """The log with one more row, that of the report after ``start`` updates."""
    row = {"val_steps": start, "val_losses": value}
    row |= {f".{name}": array for name, array in found.items()}
    row = {name: np.asarray(array)[None] for name, array in row.items()}
    if not len(log["val_steps"]):
        return row | {"steps": log["steps"]}
    if (names := log.keys() - {"steps"}) != row.keys():
        raise ValueError(
            "expected the callback to return the same names each time, "
            f"{sorted(names)}, got {sorted(row)}"
        )
    rows = {name: np.concatenate([log[name], array]) for name, array in row.items()}
    return rows | {"steps": log["steps"]}


def _owned(plan: Plan, state: State) -> State:
    """A copy to donate: the caller's flow and key must outlive the call."""
    return jax.tree.map(jnp.copy, _place(plan, state))


def _read(plan: Plan, x: np.memmap, key: Array) -> Array:
    """Read the batches of the next interval: the rows that ``key`` will draw."""
    here = on_data(lambda data: jnp.asarray(np.asarray(data)), key)
    numbers = draw_ahead(here, len(x), plan.batch_size, plan.interval)
    return _place(plan, jnp.asarray(x[np.asarray(numbers)]))


def _place(plan: Plan, tree: PyTree) -> PyTree:
    """Put all arrays on every device of the mesh, if there is one."""
    if plan.mesh is None:
        return tree
    sharding = replicated(plan.mesh)

    def put(array):
        return jax.device_put(np.asarray(array), sharding)  # the same in each process

    return jax.tree.map(partial(on_data, put), tree)


def _local(tree: PyTree) -> PyTree:
    """A copy of parameters on the default device of this process."""
    return jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), tree)


def _hashes(*, program: str, **trees: PyTree) -> dict[str, str]:
    # the program is the one complete record of loss, optimizer, schedule and layers
    digest = hashlib.sha256(program.encode()).hexdigest()[:16]
    return {
        **{name: checkpoint.fingerprint(tree) for name, tree in trees.items()},
        "program": digest,
    }


def _save(store: Store, state: State, log: Log, position: int) -> None:
    if jax.process_index() == 0:
        shapes = {name: [array.shape, str(array.dtype)] for name, array in log.items()}
        meta = {"position": position, "settings": store.settings, "log": shapes}
        checkpoint.save(store.path, (state, log), meta=meta)


def _resume(store: Store, state: State, log: Log) -> tuple[State, Log, int]:
    """State, log and position in the checkpoint, if there is one; else write it."""
    position = 0
    if store.path.exists():
        meta = checkpoint.read_meta(store.path)
        if not isinstance(meta.get("settings"), dict):
            raise ValueError(f"expected a checkpoint of `fit`, got {store.path}")
        _check_settings(store, meta["settings"])
        position, log = _described(store, meta, log)
        state, log = checkpoint.load(store.path, (state, log))
    else:
        _save(store, state, log, position)  # a bad path is to be told at once
    if jax.process_count() > 1:
        multihost_utils.assert_equal(
            np.asarray(position), f"expected all processes to see {store.path}"
        )
    return state, log, position


def _described(store: Store, meta: dict[str, Any], log: Log) -> tuple[int, Log]:
    """Position and log that a checkpoint says it holds; no memory is taken for them."""
    try:
        position = operator.index(meta["position"])
        written = {
            name: np.broadcast_to(np.zeros((), dtype), shape)
            for name, (shape, dtype) in meta["log"].items()
        }
        fits = written["steps"].shape == log["steps"].shape
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"expected a checkpoint of `fit`, got {store.path}") from error
    if not (fits and 0 <= position <= log["steps"].shape[-1]):
        raise ValueError(
            f"expected a checkpoint of {log['steps'].shape[-1] - 1} steps, got "
            f"{store.path}, which says it holds others"
        )
    return position, written


def _check_settings(store: Store, written: dict[str, Any]) -> None:
    for name, ours in store.settings.items():
        if (theirs := written.get(name)) != ours:
            raise ValueError(
                f"expected {name} = {theirs}, as in the run that wrote {store.path}, "
                f"got {ours}; a new run needs a new file"
            )
