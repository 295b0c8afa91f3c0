"""Training many seeds on a CPU: the seeds dealt out, in equal shares, to its cores.

XLA multiplies the small matrices of all seeds one after another on a single core, and
what a step of all seeds keeps is too much for a cache. So shares of the seeds run the
same compiled program side by side, each in a thread of its own.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from ._loop import Plan, State, interval

SHARES_PER_CORE = 2  # smaller shares fit better into a core's cache

Program = Callable[[tuple, State], tuple[State, tuple]]


def compiled(plan: Plan, inputs: tuple, state: State) -> Program:
    """``interval``, compiled, as one program for each share or for all seeds.

    ``inputs`` must ask for no step: they are passed through it.
    """
    share, *others = _jobs(plan, inputs, state)
    if not others:
        interval(*share)
        return interval
    program = interval.lower(*share).compile()

    def advance(inputs: tuple, state: State) -> tuple[State, tuple]:
        # Compiled before, because settings made by a context manager, such as
        # `jax.enable_x64`, hold in one thread only.
        jobs = _jobs(plan, inputs, state)
        with ThreadPoolExecutor(len(jobs)) as pool:
            done = pool.map(lambda job: jax.block_until_ready(program(*job)), jobs)
            return _join(*done)

    return advance


def _jobs(plan: Plan, inputs: tuple, state: State) -> list[tuple[tuple, State]]:
    """The arguments of ``interval`` for each share of the seeds."""
    seeds = np.size(state.failed)
    shares = _n_shares(plan, seeds)
    if shares == 1:
        return [(inputs, state)]
    _, static, rates, *common = inputs
    jobs = []
    for seed in range(0, seeds, seeds // shares):
        mine = slice(seed, seed + seeds // shares)
        (*own, part) = (_cut(tree, mine) for tree in (static, rates, state))
        jobs.append(((plan, *own, *common), part))
    return jobs


def _n_shares(plan: Plan, seeds: int) -> int:
    """In how many shares the seeds run: as many as divide them, some to each core."""
    if not plan.many or plan.mesh is not None or jax.default_backend() != "cpu":
        return 1
    most = SHARES_PER_CORE * _n_cores()
    return max(n for n in range(1, most + 1) if seeds % n == 0)


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cut(tree: PyTree, seeds: slice) -> PyTree:
    def rows(array):
        return jnp.asarray(np.asarray(array)[seeds])

    return jax.tree.map(partial(on_data, rows), tree)


def _join(*trees: PyTree) -> PyTree:
    def joined(*arrays):
        return jnp.asarray(np.concatenate(arrays))

    return jax.tree.map(partial(on_data, joined), *trees)


def on_data(operation: Callable, *leaves):
    """An operation on arrays, and on random keys by their data; the rest stays."""
    first, *_ = leaves
    if not eqx.is_array(first):
        return first
    if jnp.issubdtype(first.dtype, jax.dtypes.prng_key):
        data = operation(*map(jr.key_data, leaves))
        return jr.wrap_key_data(data, impl=jr.key_impl(first))
    return operation(*leaves)
