"""The same numbers again: another process, one rounding error, another device.

    PYTHONPATH=benchmarks .venv/bin/python trials/same_numbers.py [--out FILE]

Small flows are trained, each in two fresh processes, and must end in the same bits.
On another device sums are rounded differently, and bits cannot be asked for; what can
be is how far the losses are apart, in units of the dtype's epsilon. What to expect is
measured without such a device, in two ways: the start is moved by one rounding error a
parameter, and all is compiled without optimisations. ``LIMIT`` is the promise, for the
first ``EARLY`` steps; later steps are told, and nothing is promised of them.

All this is on the CPU. Where JAX's default device is an accelerator, that is compared
with it. Both multiply matrices in full precision: an accelerator's default for 32 bits
may keep ten.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from contract import enable_x64
from provenance import Start, versions

import gauss_flows as gf
from gauss_flows import checkpoint

HERE = Path(__file__).resolve().parent
CPU, DEFAULT = jax.devices("cpu")[0], jax.devices()[0]
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
EARLY, STEPS, STARTS = 10, 100, 8
LIMIT = 100.0
"""How far losses of the first ``EARLY`` steps may be apart, in units of epsilon."""
FLOWS = [
    (kind, dtype) for kind in ("affine", "spline") for dtype in ("float64", "float32")
]


def untrained(kind: str, dtype: str) -> Any:
    """Four blocks, as they are initialised."""
    return gf.coupling_flow(jr.key(1), dim=2, depth=4, coupling=kind, dtype=dtype)


def moved(flow: Any, key: Any, size: float) -> Any:
    """The same with each parameter multiplied by 1 + size or by 1 - size."""
    arrays, rest = eqx.partition(flow, eqx.is_inexact_array)
    leaves, form = jax.tree.flatten(arrays)
    keys = jr.split(key, len(leaves))
    leaves = [
        a * (1 + size * jr.rademacher(k, a.shape, a.dtype))
        for k, a in zip(keys, leaves, strict=True)
    ]
    return eqx.combine(jax.tree.unflatten(form, leaves), rest)


def trained(flow: Any, dtype: str, device: Any, steps: int = STEPS) -> Any:
    """The result of training on a device."""
    arrays, rest = eqx.partition(flow, eqx.is_array)
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        x = np.asarray(gf.data.source_spiral(), dtype)
        flow = eqx.combine(jax.device_put(arrays, device), rest)
        return gf.fit(
            jr.key(2), flow, x, steps=steps, batch_size=256, progress=False, throw=False
        )


def apart(one: Any, other: Any, dtype: str) -> np.ndarray:
    """How far losses are from others at each step, in units of epsilon."""
    a, b = (np.asarray(losses, np.float64) for losses in (one, other))
    return np.abs(a - b) / np.maximum(1, np.abs(a)) / float(jnp.finfo(dtype).eps)


def row(
    kind: str, dtype: str, other: str, losses: Any, found: list[Any]
) -> dict[str, Any]:
    """The largest distances of other losses, early and at all."""
    distances = np.array([apart(losses, other, dtype) for other in found])
    return {
        "flow": kind,
        "dtype": dtype,
        "other": other,
        "runs": len(found),
        "early": float(distances[:, :EARLY].max()),
        "all": float(distances.max()),
    }


def rows(kind: str, dtype: str, plain: Any, otherwise: Any) -> list[dict[str, Any]]:
    """A row for each way in which the other training differs from the plain one.

    ``otherwise`` are the losses of another compilation.
    """
    flow, eps = untrained(kind, dtype), float(jnp.finfo(dtype).eps)
    starts = [moved(flow, key, eps) for key in jr.split(jr.key(3), STARTS)]
    by_start = [trained(start, dtype, CPU).train_loss for start in starts]
    ways = {
        "a start moved by one rounding error": by_start,
        "compiled without optimisations": [otherwise],
    }
    if DEFAULT.platform != "cpu":
        there = trained(flow, dtype, DEFAULT).train_loss
        ways[f"on {DEFAULT.device_kind}"] = [there]
    return [row(kind, dtype, way, plain, found) for way, found in ways.items()]


def part() -> list[dict[str, Any]]:
    """Of each flow trained on the CPU, a hash of every bit, and the losses."""
    results = [trained(untrained(*flow), flow[1], CPU) for flow in FLOWS]
    return [
        {
            "bits": checkpoint.fingerprint(result.flow),
            "losses": np.asarray(result.train_loss, np.float64).tolist(),
        }
        for result in results
    ]


def in_a_process(flags: str = "") -> list[dict[str, Any]]:
    """The part, as a fresh process with these flags for XLA finds it."""
    env = os.environ | {"XLA_FLAGS": flags}
    here = [sys.executable, __file__, "--part"]
    done = subprocess.run(here, check=True, stdout=subprocess.PIPE, env=env)
    return json.loads(done.stdout)


def main() -> None:
    """Train, compare and write; with ``--part`` be one of the processes."""
    parser = argparse.ArgumentParser(description="The same numbers again.")
    parser.add_argument("--out", type=Path, default=HERE / "results/same_numbers.json")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with enable_x64(True):
        if args.part:
            print(json.dumps(part()))
            return
        start = Start()
        again = [in_a_process(), in_a_process()]
        of_each = zip(FLOWS, again[0], in_a_process(UNOPTIMISED), strict=True)
        found = [
            row
            for flow, plain, otherwise in of_each
            for row in rows(*flow, plain["losses"], otherwise["losses"])
        ]
    told = {
        "processes": len(again),
        "flows": len(FLOWS),
        "same_bits": sum(a == b for a, b in zip(*again, strict=True)),
        "early_steps": EARLY,
        "steps": STEPS,
        "limit": LIMIT,
        "rows": found,
        **start.told(versions("jax", "numpy")),
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    wide = [row for row in found if row["early"] > LIMIT]
    if wide or told["same_bits"] < len(FLOWS):
        sys.exit(f"expected the same numbers, got {wide or 'other bits'}")


if __name__ == "__main__":
    main()
