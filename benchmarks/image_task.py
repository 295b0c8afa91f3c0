"""What both libraries train on the digits, and how a training process answers.

Plain Python and NumPy, for it is imported in both environments. A *job* is one model of
one library, in a process of its own that keeps to one core. It reads commands, a line
each: ``train`` with a seed, or ``step`` for the time of a step; and answers each with
one line of JSON. Times are CPU seconds: on one core they are what a clock shows while
nothing else runs.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEVELS_OF_GREY = 17
SIDE = 8
LEVELS = 2  # of both models
DEPTH = {"glow": 4, "realnvp": 1}
WIDTH = {"glow": 16, "realnvp": 16}
"""Channels inside our conditioners; theirs follow from the number of parameters."""
MARGIN = 0.05  # of the logit in front of all
CLIP = 1.0
FIRST = 512  # pictures that set the ActNorms
CHUNK = 2.0  # CPU seconds of repeating that give one time


class Job(NamedTuple):
    """What a process trains; ``parameters`` is how many it is to have, about."""

    library: str
    model: str
    steps: int
    batch: int
    eval_every: int
    parameters: int = 0


class Data(NamedTuple):
    """Grey values to train on and to choose by; dequantised held-out pictures; rates.

    Arrays of pictures have shape ``(n, 8, 8, 1)``; ``rates`` is the learning rate of
    each step.
    """

    train: np.ndarray
    validation: np.ndarray
    held_out: np.ndarray
    rates: np.ndarray


class Model(NamedTuple):
    """``train(seed)`` gives records by name; ``repeat(n)`` makes n steps."""

    parameters: int
    train: Callable[[int], dict[str, Any]]
    repeat: Callable[[int], None]
    facts: dict[str, Any]


def bits(log_prob: float) -> float:
    """Bits per dimension of a mean log-density in nats."""
    return float(np.log2(LEVELS_OF_GREY) - log_prob / (SIDE**2 * np.log(2)))


def read_command() -> tuple[Job, Data]:
    """The job of this process, and its data; from here on it keeps to one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    job, folder = sys.argv[1:]
    arrays = (np.load(Path(folder) / f"{name}.npy") for name in Data._fields)
    return Job(**json.loads(job)), Data(*arrays)


def serve(model: Model) -> None:
    """Answer until there are no more commands; first of all, what the model is."""
    print(json.dumps({"parameters": model.parameters, **model.facts}), flush=True)
    repeats = 0
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "train":
            begin = time.process_time()
            answer = model.train(int(rest[0]))
            answer["cpu_seconds"] = time.process_time() - begin
        else:
            if not repeats:  # the first call may compile
                _seconds(model, 2)
                repeats = int(np.clip(CHUNK / _seconds(model, 10), 10, 10_000))
            answer = {"step": _seconds(model, repeats)}
        print(json.dumps(answer), flush=True)


def _seconds(model: Model, n: int) -> float:
    begin = time.process_time()
    model.repeat(n)
    return (time.process_time() - begin) / n
