"""Kill training at random moments and resume it, again and again: the same bits?

    python benchmarks/kill_and_resume.py [--kills 50] [--seed 0]

A process trains a small affine flow with all that a checkpoint has to keep: Adam and
its schedule, held-out loss and best parameters, an average, what a callback records. It
writes a checkpoint every 20 steps. Once it is left alone; its result is the reference.
Then it is started again and again, to be killed (``SIGKILL``) at a random moment: one
in four from the start on, the others while it steps and writes. When it comes to its
end, it begins anew, until there were enough kills; then it is left alone to finish.
Each end must hold the bits of the reference. Exits with 1 otherwise.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np

import gauss_flows as gf

RECORDS = ("train_loss", "gradient_norm", "val_steps", "val_loss")


def train(checkpoint: Path, out: Path) -> None:
    """What is killed: train, and leave all numbers of the result in ``out``."""
    x = gf.data.two_moons(jr.key(0), 2000)
    flow = gf.coupling_flow(jr.key(1), dim=2, depth=4, coupling="affine", nn_width=16)
    result = gf.fit(
        jr.key(2), flow, x, steps=6000, batch_size=256, x_val=x[:500], eval_every=20,
        ema=0.99, callback=lambda seen: {"step": seen.step, "loss": seen.val_loss},
        checkpoint=checkpoint, checkpoint_every=20, progress=False,
    )  # fmt: skip
    kept = (result.flow, result.final_flow, result.recorded, result.best_step)
    leaves = jax.tree.leaves(eqx.filter(kept, eqx.is_array_like))
    leaves += [getattr(result, name) for name in RECORDS]
    np.savez(out, *map(np.asarray, leaves))


def start(folder: Path) -> subprocess.Popen:
    """Train in a process of its own, with its files in ``folder``."""
    return subprocess.Popen([sys.executable, __file__, "--folder", str(folder)])


def finish(process: subprocess.Popen) -> None:
    """Wait for its end, which must be a good one."""
    if process.wait():
        sys.exit(f"training ended with {process.returncode}")


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


def wait_for_step(process: subprocess.Popen, folder: Path) -> None:
    """Until the process has written a new checkpoint, or come to its end."""
    begin = position(folder)
    while process.poll() is None and position(folder) <= max(begin, 0):
        time.sleep(0.1)


def kill(folder: Path, rng: random.Random, starting: float, stepping: float) -> bool:
    """Train until a random moment; False if the end came first.

    One moment in four may be any, mostly in imports and compilation; the others come
    after the first new checkpoint, while it steps and writes.
    """
    process = start(folder)
    try:
        if rng.random() < 0.25:
            process.wait(rng.uniform(0, starting))
        else:
            wait_for_step(process, folder)
            process.wait(rng.uniform(0, stepping))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    finish(process)
    return False


def compare(root: Path, kills: int, seed: int) -> bool:
    """Kill, resume and compare; prints a line for each end."""
    rng, begin = random.Random(seed), time.monotonic()
    reference = root / "reference"
    reference.mkdir()
    process = start(reference)
    wait_for_step(process, reference)
    starting = time.monotonic() - begin
    finish(process)
    stepping = time.monotonic() - begin - starting
    print(f"reference: {starting:.1f} s to start, {stepping:.1f} s to step", flush=True)
    folder, done, ends, equal, where = root / "0", 0, 0, True, []
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
        ends, equal, where = ends + 1, equal and good, []
        folder = root / str(ends)
    print(f"{done} kills, {ends} ends, {'all equal' if equal else 'NOT EQUAL'}")
    return equal


def main() -> None:
    """Read the command line; with ``--folder`` be the process that is killed."""
    parser = argparse.ArgumentParser(description="Kill training and resume it.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        train(args.folder / "run.npz", args.folder / "out.npz")
        return
    with tempfile.TemporaryDirectory() as root:
        sys.exit(not compare(Path(root), args.kills, args.seed))


if __name__ == "__main__":
    main()
