"""Residual, coupling and continuous flows at equal size, beside normflows.

    .venv/bin/python benchmarks/beyond.py [--quick] [--out FOLDER]

Four targets in the plane and one in 8 dimensions; all flows with nearly the same number
of parameters, the same optimiser, learning rates, batches and steps. Each model has a
process of its own (``beyond_jax.py``, ``beyond_torch.py``) that keeps to one core; the
PyTorch one in ``.venv-peers``, see ``peers.py``. The processes take turns, target by
target and seed by seed, so that ratios are between times of the same minutes. Every
likelihood is exact, from the Jacobian of the whole map in 64 bits, whatever the loss.

Writes numbers and table, ``cpu.json`` and ``cpu.md``, into ``benchmarks/results/
beyond``. A quiet machine takes about a quarter of an hour. ``--quick`` measures little,
to try it out.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
import optax
from beyond_task import (
    BATCH,
    HELD_OUT,
    LAYERS,
    PEAK,
    ROWS,
    TARGETS,
    Data,
    Job,
    save,
)
from images import LIBRARIES, Process, write
from peers import HERE, make_peers, versions
from provenance import Start

import gauss_flows as gf

OURS, PEER = LIBRARIES
JOBS = {
    "affine coupling": (OURS, "affine"),
    "spline coupling": (OURS, "spline"),
    "continuous": (OURS, "continuous"),
    "residual, exact": (OURS, "residual"),
    "residual, roulette": (OURS, "roulette"),
    "residual of normflows": (PEER, "roulette"),
}
BASE = "affine coupling"  # whose times are the unit
STEPS, SEEDS = 400, 3

Row = dict[str, Any]


def make_data(steps: int) -> Data:
    """Standardised rows of each target, and the rate of each step."""
    train, held_out = {}, {}
    for i, (name, dim) in enumerate(TARGETS.items()):
        key, n = jr.key(i), ROWS + HELD_OUT
        if name == "sphere_modes":
            raw = gf.data.sphere_modes(key, n, dim=dim, modes=8)
        else:
            raw = gf.data.make(name, key, n)
        x = np.asarray(gf.data.standardize(raw, like=raw[:ROWS]), np.float32)
        train[name], held_out[name] = x[:ROWS], x[ROWS:]
    rates = jax.vmap(optax.cosine_onecycle_schedule(steps, PEAK))(np.arange(steps))
    return Data(train, held_out, np.asarray(rates, np.float32))


def train_all(path: Path, steps: int, seeds: int) -> list[Row]:
    """Train all flows in turns; a row for each target and flow."""
    processes = {
        name: Process(Job(*job, steps), path, "beyond") for name, job in JOBS.items()
    }
    rows = []
    for target in TARGETS:
        found: dict[str, list[Row]] = {name: [] for name in JOBS}
        for seed in range(seeds):
            for name, process in processes.items():
                found[name].append(process.ask(f"{target} {seed}"))
        for name, answers in found.items():
            columns = {k: [answer[k] for answer in answers] for k in answers[0]}
            [columns["parameters"]] = {*columns["parameters"]}
            rows.append({"target": target, "flow": name, **columns})
            print(target, name, _spread(rows[-1]["log_p"]), flush=True)
    for process in processes.values():
        process.close()
    return rows


def over(row: Row, base: Row, what: str) -> float:
    """A time over that of the base, both of the same turn; the median of the seeds."""
    return float(np.median(np.divide(row[what], base[what])))


def table(result: dict[str, Any]) -> str:
    """What the page of the book shows, in Markdown."""
    lines = [
        "| target | flow | parameters | held-out log p | a step | a sample | condition "
        "number | error |",
        "| :-- | :-- | --: | :-- | --: | --: | --: | --: |",
    ]
    bases = {r["target"]: r for r in result["rows"] if r["flow"] == BASE}
    for row in result["rows"]:
        base = bases[row["target"]]
        middle, most = np.median(row["condition"], axis=0)
        stopped = sum(step is not None for step in row["failed_step"])
        cells = [
            f"{row['target'].replace('_', ' ')}, {TARGETS[row['target']]}",
            row["flow"] + (f", {stopped} stopped" if stopped else ""),
            f"{row['parameters']:,}",
            _spread(row["log_p"]),
            f"{over(row, base, 'step'):.3g}",
            f"{over(row, base, 'sample'):.3g}",
            f"{middle:.3g}; {most:.3g}",
            f"{np.median(row['error']):.0e}",
        ]
        # minus signs, at which no line is broken, where hyphens would be
        lines.append(f"| {' | '.join(cells)} |".replace("-", "−"))
    unit = [
        f"{1e3 * np.median(base['step']):.2g} ms and "
        f"{1e6 * np.median(base['sample']):.2g} µs ({name.replace('_', ' ')})"
        for name, base in bases.items()
        if name in ("two_moons", "sphere_modes")
    ]
    told = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    before, after = result["load"]
    of = result["machine"]
    lines += [
        "",
        f"{result['steps']:,} steps of {BATCH} rows, {result['seeds']} seeds, {LAYERS} "
        "layers. Log p in nats: median, and least to most of the seeds. A step and a "
        "sample: times over those of the affine coupling on the same target, which "
        f"takes {' or '.join(unit)}. They are CPU seconds on one core of "
        f"{of['processor']}, {of['cores']} cores, at a load of {before:.1f} in the "
        f"beginning and {after:.1f} in the end{_busy(result)}. Condition number of the "
        "Jacobian at held-out rows: median; 95 %. Error: how far from its latent point "
        f"a sample really is, 95 %. {told}; {result['date']}, commit "
        f"{result['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def _busy(result: dict[str, Any]) -> str:
    """What a load of other programs means for the times."""
    alone = max(result["load"]) <= result["machine"]["cores"]
    return "" if alone else ": the machine was busy, and ratios alone mean something"


def _spread(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Train and measure everything, then write numbers and table."""
    parser = argparse.ArgumentParser(description="Beyond couplings, at equal size.")
    parser.add_argument("--quick", action="store_true", help="little, to try it out")
    parser.add_argument("--out", type=Path, default=HERE / "results/beyond")
    args = parser.parse_args()
    make_peers()
    start, load = Start(), os.getloadavg()[0]
    steps, seeds = (50, 1) if args.quick else (STEPS, SEEDS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        save(make_data(steps), path)
        rows = train_all(path, steps, seeds)
    result = {
        **start.told(versions("normflows")),
        "load": [load, os.getloadavg()[0]],
        "steps": steps,
        "seeds": seeds,
        "rows": rows,
    }
    write(result, table, args.out)
    print(table(result))


if __name__ == "__main__":
    main()
