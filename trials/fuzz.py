"""The property tests with many more cases, and how these came out.

    .venv/bin/python trials/fuzz.py [--seed 0] [-k EXPRESSION]

Runs the tests of ``TESTS`` in Hypothesis's profile ``long`` and writes
``trials/results/fuzz.json``: for each kind of case how many gave a right answer, how
many the error or the limit that a docstring states, and how many neither. Exits with 1
if a test failed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "trials" / "results" / "fuzz.json"
TESTS = (
    "test_properties.py",
    "test_arguments.py",
    "test_untrusted_files.py",
    "test_fit_machine.py",
)
PACKAGES = ("gauss-flows", "jax", "equinox", "flowjax", "optax", "hypothesis")
OUTCOMES = ("right", "documented", "undocumented")

os.environ["HYPOTHESIS_PROFILE"] = "long"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]


def main() -> None:
    """Run the tests, and write what came of it."""
    parser = argparse.ArgumentParser(description="The property tests at length.")
    parser.add_argument("--seed", type=int, default=0, help="of Hypothesis")
    parser.add_argument("-k", default="", help="which tests, as for pytest")
    given = parser.parse_args()

    import pytest
    from provenance import Start, versions

    start = Start()
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    options = [f"--hypothesis-seed={given.seed}", "-q", "-k", given.k]
    code = pytest.main([f"--rootdir={ROOT}", *options, *tests])
    result = report(given.seed) | start.told(versions(*PACKAGES))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['cases']} cases: {result['outcomes']}")
    sys.exit(int(code))


def report(seed: int) -> dict:
    """Counts by kind of case."""
    from fuzzing import OUTCOMES as counted

    kinds = {
        kind: {name: counts[name] for name in OUTCOMES}
        for kind, counts in sorted(counted.items())
    }
    total = {name: sum(counts[name] for counts in kinds.values()) for name in OUTCOMES}
    return {
        "cases": sum(total.values()),
        "outcomes": total,
        "kinds": kinds,
        "seed": seed,
    }


if __name__ == "__main__":
    main()
