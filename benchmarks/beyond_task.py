"""What the flows beyond couplings train on, and how a training process answers.

Plain Python and NumPy, for it is imported in both environments. A *job* is one model of
one library, in a process of its own that keeps to one core. It reads a target and a
seed a line, trains a flow, and answers with one line of JSON. Times are CPU seconds: on
one core they are what a clock shows while nothing else runs.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TARGETS = {
    "two_moons": 2,
    "four_gaussians": 2,
    "swiss_roll": 2,
    "spiral": 2,
    "sphere_modes": 8,
}
"""Targets and their dimensions."""

LAYERS = 8  # residual maps, or single couplings, two of which are a block
WIDTH = {  # of hidden layers, for nearly the same number of parameters in a dimension
    "residual": {2: 16, 8: 21},
    "affine": {2: 16, 8: 22},
    "spline": {2: 8, 8: 6},
    "continuous": {2: 50, 8: 73},
}
LIPSCHITZ = 0.98  # of a residual map
PEAK = 0.01  # of the learning rate
BATCH, CLIP = 128, 1.0
ROWS = 4000  # to train on
HELD_OUT, DRAWS = 1000, 1000
CHUNK = 0.5  # CPU seconds of sampling that give one time


class Job(NamedTuple):
    """What a process trains.

    ``model`` is a key of ``WIDTH``, or ``roulette``: a residual flow whose determinants
    are estimated in training.
    """

    library: str
    model: str
    steps: int


class Data(NamedTuple):
    """Rows of each target to train on and held out; the learning rate of each step."""

    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    rates: np.ndarray


def save(data: Data, path: Path) -> None:
    """Write the data for the processes."""
    arrays: dict[str, Any] = {"rates": data.rates, **data.train}
    arrays |= {f"{name} held out": x for name, x in data.held_out.items()}
    np.savez(path, **arrays)


def read_command() -> tuple[Job, Data]:
    """The job of this process, and its data; from here on it keeps to one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    job, path = sys.argv[1:]
    arrays = np.load(path)
    data = Data(
        {name: arrays[name] for name in TARGETS},
        {name: arrays[f"{name} held out"] for name in TARGETS},
        arrays["rates"],
    )
    return Job(**json.loads(job)), data


def serve(train: Callable[[str, int], dict[str, Any]]) -> None:
    """Say that it is ready; answer ``train(target, seed)`` while there are lines."""
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        target, seed = line.split()
        print(json.dumps(train(target, int(seed))), flush=True)


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of one call, after a first one that may compile."""
    call()
    begin, n = time.process_time(), 0
    while time.process_time() - begin < CHUNK:
        call()
        n += 1
    return (time.process_time() - begin) / n


def judged(z: np.ndarray, jacobians: np.ndarray) -> dict[str, Any]:
    """Exact mean log-likelihood and condition numbers of a flow on held-out rows.

    Args:
        z: Latent points of the rows, (n, d), in 64 bits.
        jacobians: Of the whole map from data to latent at each row, (n, d, d).
    """
    values = np.linalg.svd(jacobians, compute_uv=False)
    normal = -(z**2 + np.log(2 * np.pi)).sum(axis=1) / 2
    kappa = values[:, 0] / values[:, -1]
    return {
        "log_p": float((normal + np.log(values).sum(axis=1)).mean()),
        "condition": np.quantile(kappa, (0.5, 0.95)).tolist(),
    }


def round_trip(z: np.ndarray, back: np.ndarray) -> float:
    """95 % quantile of the distances between latent points and those of their samples.

    ``back`` is computed from the samples in 64 bits, so that it is their error alone.
    """
    return float(np.quantile(np.linalg.norm(back - z, axis=1), 0.95))
