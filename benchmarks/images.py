"""Bits per dimension on handwritten digits, beside normflows and simple baselines.

    .venv/bin/python benchmarks/images.py [--quick] [--out FOLDER]

Our Glow and RealNVP and those of normflows learn scikit-learn's digits of 8×8 pixels
and 17 grey values: same levels and couplings, numbers of parameters as close as widths
allow, same optimiser, learning rates, batches, steps, and dequantisation. A fifth of
the training pictures is set aside to choose the best step by, in both libraries, and to
choose what the baselines have to choose. The held-out pictures are looked at once, at
the end. Each model is trained in a process of its own (``image_jax.py``,
``image_torch.py``) on one core; the PyTorch ones in ``.venv-peers``, see ``peers.py``.
Then all of them take turns, and the time of a step is measured.

Writes numbers and table, ``cpu.json`` and ``cpu.md``, into ``benchmarks/results/
images``. Two cores take it about half an hour. ``--quick`` measures little, to try it
out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from image_task import DEPTH, LEVELS_OF_GREY, SIDE, Data, Job, bits
from peers import ENVIRONMENT, HERE, PEERS, make_peers, versions
from provenance import Start

from gauss_flows import pictures

MODELS = ("glow", "realnvp")
LIBRARIES = ("gauss_flows", "normflows")
PEAK, BATCH, EVAL_EVERY = 3e-3, 128, 50
STEPS, SEEDS, ROUNDS = 1000, 8, 9
DRAWS = 4  # of noise on each held-out picture
RIDGES = np.logspace(-6, -1, 26)  # added to variances of pixels in (0, 1)
COUNTS = np.logspace(-3, 1, 21)  # added to what is counted of each grey value

Row = dict[str, Any]


class Process:
    """One model of one library: asked to train, or for the time of a step.

    ``task`` names the programs that do it, ``image_jax.py`` and ``image_torch.py``;
    ``job`` has a ``library``, and ``data`` is the path that they read.
    """

    def __init__(self, job: Any, data: Path, task: str = "image"):
        self.job = job
        self.errors = tempfile.TemporaryFile("w+")
        ours = job.library == LIBRARIES[0]
        python = sys.executable if ours else PEERS / "bin/python"
        worker = HERE / f"{task}_{'jax' if ours else 'torch'}.py"
        self.process = subprocess.Popen(
            [python, worker, json.dumps(job._asdict()), data],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"},
        )
        self.facts = self._answer()

    def ask(self, command: str) -> Row:
        """The answer to a command."""
        assert self.process.stdin
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Row:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        raise RuntimeError(f"{self.job} ended without an answer: {self.errors.read()}")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def make_data(steps: int) -> Data:
    """Pictures to train on, to choose by, and to judge by; the rate of each step."""
    p = pictures.digits()
    order = np.random.RandomState(0).permutation(len(p.train))
    n = len(p.train) // 5
    rng = np.random.default_rng(0)
    held_out = np.repeat(p.held_out, DRAWS, axis=0)
    noisy = (held_out + rng.random(held_out.shape)) / LEVELS_OF_GREY
    schedule = optax.cosine_onecycle_schedule(steps, PEAK)
    rates = jax.vmap(schedule)(np.arange(steps))
    return Data(
        train=p.train[order[n:]],
        validation=p.train[order[:n]],
        held_out=noisy.astype(np.float32),
        rates=np.asarray(rates, np.float32),
    )


def baselines(data: Data) -> list[Row]:
    """Laws without training: what they have to choose, they choose by validation."""
    grey = (LEVELS_OF_GREY * data.held_out).astype(int)
    rng = np.random.default_rng(1)
    validation = np.repeat(data.validation, DRAWS, axis=0)
    noisy = (validation + rng.random(validation.shape)) / LEVELS_OF_GREY
    added = min(COUNTS, key=lambda a: factorised(data.train, data.validation, a))
    ridge = min(RIDGES, key=lambda r: gaussian(data.train, noisy, r))
    return [
        {"model": "uniform", "bits": [bits(0.0)], "parameters": 0},
        {
            "model": "factorised",
            "bits": [factorised(data.train, grey, added)],
            "parameters": SIDE**2 * (LEVELS_OF_GREY - 1),
            "chosen": float(added),
        },
        {
            "model": "Gaussian",
            "bits": [gaussian(data.train, data.held_out, ridge)],
            "parameters": SIDE**2 + SIDE**2 * (SIDE**2 + 1) // 2,
            "chosen": float(ridge),
        },
    ]


def factorised(train: np.ndarray, grey: np.ndarray, added: float) -> float:
    """Bits per dimension with a histogram for each pixel, ``added`` to each count."""
    values = np.arange(LEVELS_OF_GREY)
    counts = (train.reshape(-1, SIDE**2, 1) == values).sum(0) + added
    log_p = np.log2(counts / counts.sum(1, keepdims=True))
    found = log_p[np.arange(SIDE**2), grey.reshape(-1, SIDE**2).astype(int)]
    return float(-found.mean())


def gaussian(train: np.ndarray, x: np.ndarray, ridge: float) -> float:
    """Bits per dimension with the normal law of the same mean and covariance.

    Those of dequantised pictures are known without a draw: the noise adds 1/2 to each
    mean and 1/12 to each variance, in units of a grey value.
    """
    rows = train.reshape(-1, SIDE**2).astype(float)
    covariance = np.cov(rows, rowvar=False) + np.eye(SIDE**2) / 12
    covariance = covariance / LEVELS_OF_GREY**2 + ridge * np.eye(SIDE**2)
    mean = (rows.mean(0) + 0.5) / LEVELS_OF_GREY
    root = np.linalg.cholesky(covariance)
    z = np.linalg.solve(root, (x.reshape(-1, SIDE**2) - mean).T)
    log_det = 2 * np.log(np.diag(root)).sum()
    square = (z**2).sum(0).mean()
    return bits(-(square + log_det + SIDE**2 * np.log(2 * np.pi)) / 2)


def train_all(folder: Path, steps: int, seeds: int, rounds: int) -> list[Row]:
    """Train each model in both libraries, one after the other; then time its steps."""
    rows = []
    for model in MODELS:
        processes, n_parameters = [], 0
        for library in LIBRARIES:
            job = Job(library, model, steps, BATCH, EVAL_EVERY, n_parameters)
            process = Process(job, folder)
            n_parameters = n_parameters or process.facts["parameters"]
            answers = [process.ask(f"train {seed}") for seed in range(seeds)]
            row = {"model": model, "library": library, **process.facts}
            rows.append(row | {k: [a[k] for a in answers] for k in answers[0]})
            rows[-1]["step"] = []
            processes.append((process, rows[-1]))
            print(
                f"{model:8s} {library:12s} bits {_list(rows[-1]['bits'])}", flush=True
            )
        for _ in range(rounds):
            for process, row in processes:
                row["step"].append(process.ask("step")["step"])
        for process, _ in processes:
            process.close()
    return rows


def table(result: dict[str, Any]) -> str:
    """What the page of the book shows, in Markdown."""
    lines = [
        "| model | of | parameters | held-out bits per dimension, seeds | median | at "
        "the last step | ms a step |",
        "| :-- | :-- | --: | :-- | --: | --: | --: |",
    ]
    for row in result["rows"]:
        trained = "library" in row
        cells = [
            row["model"],
            row.get("library", ""),
            f"{row['parameters']:,}",
            _list(row["bits"]) if trained else "",
            f"{np.median(row['bits']):.3f}",
            f"{np.median(row['last_bits']):.3f}" if trained else "",
            f"{1e3 * np.median(row['step']):.1f}" if trained else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    told = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    of = result["machine"]
    lines += [
        "",
        f"{result['steps']:,} steps of {result['batch']} pictures, "
        f"{result['pictures']['train']:,} pictures to train on, "
        f"{result['pictures']['validation']} to choose the step by, "
        f"{result['pictures']['held_out']} held out. Times are CPU seconds on one core "
        f"of {of['processor']}. {told}; {result['date']}, commit {result['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _short(value: Any) -> Any:
    """The same with six significant digits."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(result: Row, text: Callable[[Row], str], folder: Path) -> None:
    """Write numbers, rounded, and the table that ``text`` makes of them."""
    rounded = _short(result)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.json").write_text(json.dumps(rounded, indent=1) + "\n")
    (folder / "cpu.md").write_text(text(rounded))


def main() -> None:
    """Train and measure everything, then write numbers and table."""
    parser = argparse.ArgumentParser(description="Digits beside normflows.")
    parser.add_argument("--quick", action="store_true", help="little, to try it out")
    parser.add_argument("--out", type=Path, default=HERE / "results/images")
    args = parser.parse_args()
    make_peers()
    start = Start()
    steps, seeds, rounds = (60, 1, 2) if args.quick else (STEPS, SEEDS, ROUNDS)
    data = make_data(steps)
    with tempfile.TemporaryDirectory() as folder:
        for name, array in data._asdict().items():
            np.save(Path(folder) / f"{name}.npy", array)
        rows = train_all(Path(folder), steps, seeds, rounds)
    result = {
        **start.told(versions("normflows")),
        "steps": steps,
        "batch": BATCH,
        "peak": PEAK,
        "depth": DEPTH,
        "pictures": {
            "train": len(data.train),
            "validation": len(data.validation),
            "held_out": len(data.held_out) // DRAWS,
            "draws": DRAWS,
        },
        "rows": [*baselines(data), *rows],
    }
    write(result, table, args.out)
    print(table(result))


if __name__ == "__main__":
    main()
