"""Train our RealNVP or Glow on the digits; started by images.py."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from image_task import (
    CLIP,
    DEPTH,
    FIRST,
    LEVELS,
    LEVELS_OF_GREY,
    MARGIN,
    SIDE,
    WIDTH,
    Data,
    Job,
    Model,
    bits,
    read_command,
    serve,
)

import gauss_flows as gf
from gauss_flows import image


def untrained(key, job: Job, data: Data):
    """The flow of a seed, its ActNorms set from training pictures."""
    flow_key, noise_key = jr.split(key)
    flow = getattr(image, job.model)(
        flow_key, shape=(SIDE, SIDE, 1), levels=LEVELS, depth=DEPTH[job.model],
        nn_width=WIDTH[job.model], margin=MARGIN,
    )  # fmt: skip
    first = image.dequantize(noise_key, LEVELS_OF_GREY, data.train[:FIRST])
    return gf.initialize_actnorm(flow, first)


def loss(flow, grey, key):
    """Minus the mean log-density, of pictures that are dequantised anew."""
    x = (grey + jr.uniform(key, grey.shape, grey.dtype)) / LEVELS_OF_GREY
    return -flow.log_prob(x).mean()


def build(job: Job, data: Data) -> Model:
    """The flow, and how it trains."""
    train, validation, held_out = (jnp.asarray(x, jnp.float32) for x in data[:3])
    rates = jnp.asarray(data.rates)

    def rate(step):
        return rates[step]

    def fit(key, flow, steps: int, x_val):
        return gf.fit(
            key, flow, train, steps=steps, batch_size=job.batch, learning_rate=1.0,
            schedule=rate, clip=CLIP, loss=loss, x_val=x_val,
            eval_every=job.eval_every, progress=False,
        )  # fmt: skip

    def held_out_bits(flow) -> float:
        return bits(float(gf.mean_log_prob(flow, held_out)))

    def trained(seed: int) -> dict:
        flow_key, fit_key = jr.split(jr.key(seed))
        flow = untrained(flow_key, job, data)
        result = fit(fit_key, flow, job.steps, validation)
        return {
            "bits": held_out_bits(result.flow),
            "last_bits": held_out_bits(result.final_flow),
            "best_step": result.best_step,
            "validation": [bits(-value) for value in result.val_loss],
            "compile_seconds": result.compile_seconds,
        }

    start = untrained(jr.key(0), job, data)

    def repeat(n: int) -> None:
        # the last parameters are tried on one more batch, which costs what a step does
        fit(jr.key(1), start, n - 1, None)

    arrays = jax.tree.leaves(eqx.filter(start, eqx.is_inexact_array))
    facts = {"width": WIDTH[job.model]}
    return Model(sum(a.size for a in arrays), trained, repeat, facts)


if __name__ == "__main__":
    serve(build(*read_command()))
