"""The same numbers again: another process, one rounding error, another device.

    PYTHONPATH=benchmarks .venv/bin/python trials/same_numbers.py [--out FILE]

Small flows are trained, each in two fresh processes, and must end in the same bits.
On another device sums are rounded differently, and bits cannot be asked for; what can
be is how far the losses are apart, in units of the dtype's epsilon. What to expect is
measured without such a device: the start is moved by one rounding error a parameter.
``LIMIT`` is the promise, for the first ``EARLY`` steps; later steps are told, and
nothing is promised of them.

Where JAX's default device is an accelerator it is compared with the CPU. Both multiply
matrices in full precision: an accelerator's default for 32 bits may keep ten.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from contract import enable_x64
from peers import commit, machine

import gauss_flows as gf
from gauss_flows import checkpoint

HERE = Path(__file__).resolve().parent
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


def trained(flow: Any, dtype: str, device: Any = None, steps: int = STEPS) -> Any:
    """The result of training, on a device or on JAX's default."""
    arrays, rest = eqx.partition(flow, eqx.is_array)
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        x = np.asarray(gf.data.source_spiral(), dtype)
        flow = eqx.combine(jax.device_put(arrays, device), rest)
        return gf.fit(
            jr.key(2), flow, x, steps=steps, batch_size=256, progress=False, throw=False
        )


def apart(one: Any, other: Any, dtype: str) -> np.ndarray:
    """How far the losses are from each other at each step, in units of epsilon."""
    a, b = (np.asarray(result.train_loss, np.float64) for result in (one, other))
    return np.abs(a - b) / np.maximum(1, np.abs(a)) / float(jnp.finfo(dtype).eps)


def row(kind: str, dtype: str, other: str, found: list[np.ndarray]) -> dict[str, Any]:
    """The largest distances, early and at all."""
    return {
        "flow": kind,
        "dtype": dtype,
        "other": other,
        "runs": len(found),
        "early": float(np.max([steps[:EARLY] for steps in found])),
        "all": float(np.max(found)),
    }


def rows(kind: str, dtype: str) -> list[dict[str, Any]]:
    """A row for the moved start, and one for the accelerator if there is one."""
    flow = untrained(kind, dtype)
    cpu, default = jax.devices("cpu")[0], jax.devices()[0]
    reference = trained(flow, dtype, cpu)
    eps = float(jnp.finfo(dtype).eps)
    starts = [moved(flow, key, eps) for key in jr.split(jr.key(3), STARTS)]
    by_start = [apart(reference, trained(s, dtype, cpu), dtype) for s in starts]
    told = [row(kind, dtype, "a start moved by one rounding error", by_start)]
    if default.platform != "cpu":
        found = apart(reference, trained(flow, dtype, default), dtype)
        told.append(row(kind, dtype, default.device_kind, [found]))
    return told


def fingerprints() -> list[str]:
    """Of the trained flows, a hash of every bit."""
    return [checkpoint.fingerprint(trained(untrained(*f), f[1]).flow) for f in FLOWS]


def main() -> None:
    """Train, compare and write; with ``--part`` tell the fingerprints only."""
    parser = argparse.ArgumentParser(description="The same numbers again.")
    parser.add_argument("--out", type=Path, default=HERE / "results/same_numbers.json")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    with enable_x64(True):
        if args.part:
            print(json.dumps(fingerprints()))
            return
        begin, ran = time.perf_counter(), commit()
        here = [sys.executable, __file__, "--part"]
        again = [
            json.loads(subprocess.run(here, check=True, stdout=subprocess.PIPE).stdout)
            for _ in range(2)
        ]
        found = [row for flow in FLOWS for row in rows(*flow)]
    told = {
        "processes": len(again),
        "flows": len(FLOWS),
        "same_bits": sum(a == b for a, b in zip(*again, strict=True)),
        "early_steps": EARLY,
        "steps": STEPS,
        "limit": LIMIT,
        "rows": found,
        "machine": machine(),
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "commit": ran,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - begin),
    }
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    wide = [row for row in found if row["early"] > LIMIT]
    if wide or told["same_bits"] < len(FLOWS):
        sys.exit(f"expected the same numbers, got {wide or 'other bits'}")


if __name__ == "__main__":
    main()
