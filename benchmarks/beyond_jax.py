"""Train our residual, coupling and continuous flows; started by beyond.py."""

import time
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from beyond_task import (
    BATCH,
    CLIP,
    DRAWS,
    LAYERS,
    LIPSCHITZ,
    PEAK,
    ROWS,
    TARGETS,
    WIDTH,
    Data,
    Job,
    judged,
    read_command,
    round_trip,
    seconds,
    serve,
)

import gauss_flows as gf
from gauss_flows import continuous, log_det
from gauss_flows.residual_stack import EstimatedLikelihood, residual_flow

EVERY = 50  # steps in one compiled call
LOOSE, TIGHT = 1e-3, 1e-6  # tolerances of the solver, in training and in judging
LOSSES = {
    "roulette": EstimatedLikelihood(log_det.Roulette()),
    "continuous": continuous.Likelihood(probes=None),
}
"""Losses by model; the others train by their exact likelihood."""


@cache
def builder(model: str, dim: int):
    """A function of a key that makes an untrained flow, compiled."""
    kind = "residual" if model == "roulette" else model
    width = WIDTH[kind][dim]
    if kind == "residual":
        make = partial(
            residual_flow, shape=(dim,), depth=LAYERS, lipschitz=LIPSCHITZ,
            nn_width=width, actnorm=True,
        )  # fmt: skip
    elif kind == "continuous":
        make = partial(
            continuous.continuous_flow, dim=dim, nn_width=width, rtol=LOOSE, atol=LOOSE
        )
    else:
        make = partial(
            gf.coupling_flow, dim=dim, depth=LAYERS // 2, coupling=kind, nn_width=width,
            actnorm=True,
        )  # fmt: skip
    return eqx.filter_jit(make)


def in_double(flow):
    """The flow in 64 bits, and a solver, if it has one, that is as good as exact."""
    if isinstance(gf.normalizing_map(flow), continuous.ContinuousMap):
        flow = continuous.with_options(flow, adjoint="forward", rtol=TIGHT, atol=TIGHT)
    return jax.tree.map(
        lambda a: a.astype(jnp.float64) if eqx.is_inexact_array(a) else a, flow
    )


@eqx.filter_jit
def latent(flow, x):
    """Latent points of rows."""
    return jax.vmap(gf.normalizing_map(flow).transform)(x)


@eqx.filter_jit
def jacobians(flow, x):
    """Jacobians of the whole map at rows."""
    return jax.vmap(partial(gf.probe.jacobian, flow))(x)


@eqx.filter_jit
def drawn(flow, z):
    """Samples from latent points."""
    return jax.vmap(flow.bijection.transform)(z)


def trainer(job: Job, data: Data):
    """A function that trains the job's model on a target from a seed."""

    def fit(flow, x, key, steps: int):
        return gf.fit(
            key, flow, x, steps=steps, batch_size=BATCH, learning_rate=PEAK, clip=CLIP,
            loss=LOSSES.get(job.model), eval_every=EVERY, progress=False, throw=False,
        )  # fmt: skip

    @cache
    def compile_first(dim: int) -> None:
        flow, rows = builder(job.model, dim)(jr.key(0)), jnp.zeros((ROWS, dim))
        fit(flow, rows, jr.key(0), EVERY)

    def train(target: str, seed: int) -> dict:
        compile_first(TARGETS[target])
        flow_key, fit_key, draw_key = jr.split(jr.key(seed), 3)
        flow = builder(job.model, TARGETS[target])(flow_key)
        x = jnp.asarray(data.train[target])
        begin = time.process_time()
        result = fit(flow, x, fit_key, job.steps)
        spent = time.process_time() - begin
        flow = result.final_flow
        z = jr.normal(draw_key, (DRAWS, flow.shape[0]))
        sampling = seconds(lambda: drawn(flow, z).block_until_ready())
        samples, z = np.asarray(drawn(flow, z), float), np.asarray(z, float)
        with jax.enable_x64(True):
            exact, rows = in_double(flow), data.held_out[target].astype(float)
            found = judged(
                np.asarray(latent(exact, rows)), np.asarray(jacobians(exact, rows))
            )
            error = round_trip(z, np.asarray(latent(exact, samples)))
        return found | {
            "parameters": gf.probe.parameter_count(flow),
            "step": spent / (job.steps + 1),  # the last one is only tried
            "sample": sampling / DRAWS,
            "error": error,
            "failed_step": result.failed_step,
        }

    return train


if __name__ == "__main__":
    serve(trainer(*read_command()))
