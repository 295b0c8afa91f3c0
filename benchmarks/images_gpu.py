"""What a deep Glow costs on pictures of 32×32×3, by what is kept for going back.

    .venv/bin/python benchmarks/images_gpu.py [--levels 3] [--depth 16] [--batch 64]
        [--width 128] [--seconds 20] [--modes store recompute invert] [--out FOLDER]

For each mode of ``memory=``, in a process of its own: seconds to compile a training
step, pictures a second, the temporary memory that XLA plans for the step, and the peak
of the device. The step is that of ``fit``: batches of random grey values, dequantised
anew, mean log-density, its gradient, and Adam; float32. Meant for a GPU, and runs on a
CPU, where a small one is enough to try it out.

Prints the numbers, and writes them with device, versions, date and commit into
``benchmarks/results/images``, as ``glow32-DEVICE.json``.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import ENVIRONMENT, HERE
from provenance import Start, versions

MODES = ("store", "recompute", "invert")
SHAPE, LEVELS_OF_GREY = (32, 32, 3), 256
PACKAGES = ("gauss-flows", "flowjax", "equinox", "optax", "jax", "jaxlib")


def measure(args: argparse.Namespace, memory: str) -> dict[str, Any]:
    """Compile a training step, repeat it, and say what it took."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr
    import optax

    from gauss_flows import image

    flow = image.glow(
        jr.key(0), shape=SHAPE, levels=args.levels, depth=args.depth,
        nn_width=args.width, memory=memory, dtype=jnp.float32,
    )  # fmt: skip
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4))

    def step(params, state, key, grey):
        key, noise_key = jr.split(key)
        x = (grey + jr.uniform(noise_key, grey.shape)) / LEVELS_OF_GREY

        def loss(params):
            return -eqx.combine(params, static).log_prob(x).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return eqx.apply_updates(params, updates), state, key, value

    pictures = np.random.default_rng(0).integers(0, 256, (args.batch, *SHAPE))
    grey = jnp.asarray(pictures, jnp.float32)
    state = params, optimizer.init(params), jr.key(1)
    begin = time.perf_counter()
    # parameters and Adam's state are handed over, as `fit` does it
    program: Any = jax.jit(step, donate_argnums=(0, 1)).lower(*state, grey).compile()
    compile_seconds = time.perf_counter() - begin

    times, losses = [], []
    end = time.perf_counter() + args.seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        *state, value = program(*state, grey)
        losses.append(float(value))  # waits until all is computed
        times.append(time.perf_counter() - begin)
    plan = program.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}  # none on a CPU
    arrays = jax.tree.leaves(params)
    return {
        "memory": memory,
        "parameters": sum(a.size for a in arrays),
        "compile_seconds": compile_seconds,
        "steps": len(times),
        "step_seconds": float(np.median(times[1:])),
        "pictures_per_second": args.batch / float(np.median(times[1:])),
        "temp_bytes": plan.temp_size_in_bytes if plan else None,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "finite": bool(np.isfinite(losses).all()),
    }


def in_a_process(arguments: list[str], memory: str) -> dict[str, Any]:
    """The numbers of a mode; one that fails, as by lack of memory, says why."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--one", memory],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"memory": memory, "failed": last[:200]}
    return json.loads(done.stdout.splitlines()[-1])


def report(row: dict[str, Any]) -> str:
    """A mode's numbers in a line."""
    if "failed" in row:
        return f"{row['memory']:10s} failed: {row['failed']}"
    peak = row["device_peak_bytes"]
    return (
        f"{row['memory']:10s} {row['pictures_per_second']:8.1f} pictures/s, "
        f"{row['temp_bytes'] / 2**20:.0f} MiB for a step, peak "
        f"{'not known' if peak is None else f'{peak / 2**20:.0f} MiB'}, "
        f"compiled in {row['compile_seconds']:.1f} s"
    )


def main() -> None:
    """Measure all modes, print and write."""
    parser = argparse.ArgumentParser(description="A deep Glow on 32x32x3 pictures.")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--depth", type=int, default=16, help="steps of a level")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=128, help="of the conditioners")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--out", type=Path, default=HERE / "results/images")
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    rows, start = [], Start()
    for memory in args.modes:
        rows.append(in_a_process(sys.argv[1:], memory))
        print(report(rows[-1]), flush=True)
    result = {
        **start.told(versions(*PACKAGES)),
        **{name: getattr(args, name) for name in ("levels", "depth", "batch", "width")},
        "shape": SHAPE,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    device = result["machine"]["device"]
    path = args.out / f"glow32-{device.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{device}, {result['date']}, commit {result['commit']}: {path}")
    if any("failed" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
