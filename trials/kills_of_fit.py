"""Kill training at random moments and resume it, again and again: the same bits?

    PYTHONPATH=benchmarks .venv/bin/python trials/kills_of_fit.py [--kills 200]
        [--seed 0] [--out FILE]

A process trains a small affine flow with all that a checkpoint has to keep: Adam and
its schedule, held-out loss and best parameters, an average, what a callback records. It
writes a checkpoint every 20 steps. Once it is left alone; its result is the reference.
Then it is started again and again, to be killed (``SIGKILL``) at a random moment: one
in four from the start on, the others while it steps and writes. When it comes to its
end, it begins anew, until there were enough kills; then it is left alone to finish.
Each end must hold the bits of the reference. Exits with 1 otherwise.

Each process is forked from one that has imported everything and run nothing, and all
share a compilation cache, which is written under the same kills.
"""

import argparse
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from provenance import Start, versions

import gauss_flows as gf

HERE = Path(__file__).resolve().parent
RECORDS = ("train_loss", "gradient_norm", "val_steps", "val_loss")
STEPS = 6000
FORKS = multiprocessing.get_context("forkserver")


def train(folder: Path) -> None:
    """What is killed: train, and leave all numbers of the result in ``out.npz``."""
    gf.cache_compilation(folder.parent / "compiled")
    x = gf.data.two_moons(jr.key(0), 2000)
    flow = gf.coupling_flow(jr.key(1), dim=2, depth=4, coupling="affine", nn_width=16)
    result = gf.fit(
        jr.key(2), flow, x, steps=STEPS, batch_size=256, x_val=x[:500], eval_every=20,
        ema=0.99, callback=lambda seen: {"step": seen.step, "loss": seen.val_loss},
        checkpoint=folder / "run.npz", checkpoint_every=20, progress=False,
    )  # fmt: skip
    kept = (result.flow, result.final_flow, result.recorded, result.best_step)
    leaves = jax.tree.leaves(eqx.filter(kept, eqx.is_array_like))
    leaves += [getattr(result, name) for name in RECORDS]
    np.savez(folder / "out.npz", *map(np.asarray, leaves))


def start(folder: Path) -> ForkServerProcess:
    """Train in a process of its own, with its files in ``folder``."""
    process = FORKS.Process(target=train, args=(folder,))
    process.start()
    return process


def finish(process: ForkServerProcess) -> None:
    """Wait for its end, which must be a good one."""
    process.join()
    if process.exitcode:
        sys.exit(f"training ended with {process.exitcode}")


def same(one: Path, other: Path) -> bool:
    """Whether two results agree in every bit."""
    with np.load(one) as a, np.load(other) as b:
        return a.files == b.files and all(
            a[name].tobytes() == b[name].tobytes() for name in a.files
        )


def position(folder: Path) -> int:
    """How many steps the checkpoint holds; -1 if there is none yet."""
    file = folder / "run.npz"
    return gf.checkpoint.read_meta(file)["position"] if file.exists() else -1


def wait_for_step(process: ForkServerProcess, folder: Path) -> None:
    """Until the process has written a new checkpoint, or come to its end."""
    begin = position(folder)
    while process.is_alive() and position(folder) <= max(begin, 0):
        time.sleep(0.02)


def kill(folder: Path, rng: random.Random, starting: float, stepping: float) -> bool:
    """Train until a random moment; False if the end came first.

    One moment in four may be any, mostly in imports and compilation; the others come
    after the first new checkpoint, while it steps and writes.
    """
    process = start(folder)
    if rng.random() < 0.25:
        process.join(rng.uniform(0, starting))
    else:
        wait_for_step(process, folder)
        process.join(rng.uniform(0, stepping))
    process.kill()  # does nothing to one that has ended
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return True
    finish(process)
    return False


def compare(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill, resume and compare; prints a line for each end."""
    rng, reference = random.Random(seed), root / "reference"
    (root / "first").mkdir()
    finish(start(root / "first"))  # compiles, so that the reference does not
    reference.mkdir()
    begin = time.monotonic()
    process = start(reference)
    wait_for_step(process, reference)
    starting = time.monotonic() - begin
    finish(process)
    stepping = time.monotonic() - begin - starting
    print(f"reference: {starting:.1f} s to start, {stepping:.1f} s to step", flush=True)
    folder, done, ends, equal, where = root / "0", 0, 0, 0, []
    while done < kills or where:
        folder.mkdir(exist_ok=True)
        if done == kills:
            finish(start(folder))
        elif kill(folder, rng, starting, stepping / 2):
            done += 1
            where.append(position(folder))
            continue
        good = same(reference / "out.npz", folder / "out.npz")
        print(f"killed at {where}: {'same bits' if good else 'DIFFERENT'}", flush=True)
        ends, equal, where = ends + 1, equal + good, []
        folder = root / str(ends)
    print(f"{done} kills, {ends} ends, {equal} of them with the same bits")
    return {
        "kills": done,
        "ends": ends,
        "ends_with_the_same_bits": equal,
        "seed": seed,
        "steps": STEPS,
    }


def main() -> None:
    """Kill and resume, and write down what came of it."""
    parser = argparse.ArgumentParser(description="Kill training and resume it.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results/kills_of_fit.json")
    args = parser.parse_args()
    FORKS.set_forkserver_preload(["gauss_flows"])
    begin = Start()
    with tempfile.TemporaryDirectory() as root:
        found = compare(Path(root), args.kills, args.seed)
    found |= begin.told(versions("jax"))
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(found["ends"] != found["ends_with_the_same_bits"])


if __name__ == "__main__":
    main()
