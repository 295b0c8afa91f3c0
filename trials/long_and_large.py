"""Long and large: a million rows from a file, a thousand blocks, 100,000 steps.

    PYTHONPATH=benchmarks .venv/bin/python trials/long_and_large.py [--quick]
        [--out FILE]

Each part has a process of its own, whose anonymous memory (``RssAnon`` of Linux: what
the program itself holds, without pages of files that the system may drop) is looked at
ten times a second. Some steps come before, which compile; what is held after them is
taken off.

rows
    A million rows of 64 float32 numbers, 256 MB, from a memory-mapped file; and, for
    comparison, the same rows loaded.
blocks
    A stack of 1,000 affine blocks, each rebuilt or computed again in the backward pass,
    and as many kept in memory as fit; the round trip of the trained stack.
steps
    100,000 steps with a checkpoint every 1,000: how much more memory is held at the
    end than after a tenth of them.

``--quick`` is a fiftieth of each, to try it out.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from provenance import Start, versions

import gauss_flows as gf

HERE = Path(__file__).resolve().parent
DIM, BATCH, BLOCK_STEPS = 64, 512, 20
MB = 1e6


def anonymous() -> float:
    """Memory of this process that belongs to no file, in MB."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / MB


@contextmanager
def watched() -> Iterator[list[float]]:
    """A list that grows by the memory held, ten times a second."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what compilation has freed is no free reserve
    held, done = [anonymous()], threading.Event()

    def look():
        while not done.wait(0.1):
            held.append(anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield held
    finally:
        done.set()
        thread.join()


def write_rows(file: Path, rows: int) -> None:
    """Correlated normals, written part by part."""
    mix = np.random.default_rng(0).standard_normal((DIM, DIM)) / np.sqrt(DIM)
    table = np.lib.format.open_memmap(
        file, mode="w+", dtype=np.float32, shape=(rows, DIM)
    )
    for part, start in enumerate(range(0, rows, 10_000)):
        rng = np.random.default_rng([1, part])
        table[start : start + 10_000] = rng.standard_normal((10_000, DIM)) @ mix
    table.flush()


def rows(share: float, *, loaded: bool) -> dict[str, Any]:
    """Train on many rows, which lie in a file or in memory."""
    count = int(1_000_000 * share)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        write_rows(file, count)
        flow = gf.coupling_flow(jr.key(0), dim=DIM, depth=4, coupling="affine")

        def train(steps: int) -> gf.FitResult:
            x = np.load(file, mmap_mode=None if loaded else "r")
            return gf.fit(
                jr.key(1), flow, x, steps=steps, batch_size=BATCH, eval_every=50,
                progress=False,
            )  # fmt: skip

        train(50)
        with watched() as held:
            result = train(2000)
        return {
            "rows": count,
            "file_mb": file.stat().st_size / MB,
            "peak_mb": max(held) - held[0],
            "run_seconds": result.run_seconds,
            "last_loss": float(result.train_loss[-1]),
            "fingerprint": gf.checkpoint.fingerprint(result.flow),
        }


def blocks(share: float, *, memory: str) -> dict[str, Any]:
    """Train a deep stack, and see whether it still knows its own inverse."""
    depth = max(int(1000 * share), 2)
    x = gf.data.spiral(jr.key(0), 10_000)
    flow = gf.coupling_flow(
        jr.key(1), dim=2, depth=depth, coupling="affine", memory=memory,
        identity_init=True,  # else the scales of so many blocks multiply to no number
    )  # fmt: skip

    def train() -> gf.FitResult:
        return gf.fit(
            jr.key(2), flow, x, steps=BLOCK_STEPS, batch_size=BATCH,
            eval_every=BLOCK_STEPS, learning_rate=1e-4, progress=False,
        )  # fmt: skip

    compiled = train()
    with watched() as held:
        result = train()
    bijection = result.flow.bijection
    there = jax.vmap(bijection.inverse)(x[:BATCH])
    error = jnp.abs(jax.vmap(bijection.transform)(there) - x[:BATCH])
    return {
        "blocks": depth,
        "memory": memory,
        "peak_mb": max(held) - held[0],
        "compile_seconds": compiled.compile_seconds,
        "seconds_a_step": result.run_seconds / (BLOCK_STEPS + 1),
        "round_trip_error": float(error.max()),
        "last_loss": float(result.train_loss[-1]),
    }


def steps(share: float) -> dict[str, Any]:
    """Train for long, with checkpoints."""
    count, every = int(100_000 * share), max(int(1000 * share), 1)
    x = gf.data.two_moons(jr.key(0), 2000)
    flow = gf.coupling_flow(jr.key(1), dim=2, depth=2, coupling="affine", nn_width=16)
    held = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.npz"
        result = gf.fit(
            jr.key(2), flow, x, steps=count, batch_size=128, x_val=x[:500],
            eval_every=every, checkpoint=file, checkpoint_every=every, progress=False,
            callback=lambda seen: held.append(anonymous()),
        )  # fmt: skip
        size = file.stat().st_size / MB
    tenth = len(held) // 10
    return {
        "steps": count,
        "checkpoints": count // every + 1,
        "checkpoint_mb": size,
        "held_after_a_tenth_mb": held[tenth],
        "held_at_the_end_mb": held[-1],
        "most_after_a_tenth_mb": max(held[tenth:]),
        "run_seconds": result.run_seconds,
        "finite": bool(np.isfinite(result.train_loss).all()),
    }


PARTS: dict[str, Callable[[float], dict[str, Any]]] = {
    "rows on disk": lambda share: rows(share, loaded=False),
    "rows in memory": lambda share: rows(share, loaded=True),
    "blocks stored": lambda share: blocks(share, memory="store"),
    "blocks computed again": lambda share: blocks(share, memory="recompute"),
    "blocks inverted": lambda share: blocks(share, memory="invert"),
    "steps": steps,
}


def main() -> None:
    """Run each part in its process; with ``--part`` be one of them."""
    parser = argparse.ArgumentParser(description="Long and large runs.")
    parser.add_argument("--quick", action="store_true", help="little, to try it out")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results/long_and_large.json"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](0.02 if args.quick else 1.0)))
        return
    start, found = Start(), {}
    for name in PARTS:
        command = [sys.executable, __file__, "--part", name]
        command += ["--quick"] * args.quick
        part = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(part.stdout)
        print(name, found[name], flush=True)
    told = {"parts": found, **start.told(versions("jax", "numpy"))}
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
