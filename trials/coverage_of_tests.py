"""How much of the package its own tests reach, by lines and by branches.

    PYTHONPATH=benchmarks .venv/bin/python trials/coverage_of_tests.py TEST...

Runs pytest with coverage, prints what was missed, and writes the totals to
``results/coverage.json``. Exits with pytest's code: not 0 if a test failed, or
below `fail_under`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import Start, versions

RESULT = Path(__file__).resolve().parent / "results" / "coverage.json"


def totals(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of coverage's own report."""
    of = report["totals"]
    return {
        "lines": of["num_statements"],
        "lines_covered": of["covered_lines"],
        "branches": of["num_branches"],
        "branches_covered": of["covered_branches"],
        "modules": {
            name: round(module["summary"]["percent_covered"], 1)
            for name, module in sorted(report["files"].items())
        },
    }


def main() -> None:
    """Run the tests that are named, and write the totals."""
    start = Start()
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "pytest", "-n", "auto", "-q", "--cov"]
        command += ["--cov-report=term-missing", f"--cov-report=json:{full}"]
        code = subprocess.run([*command, *sys.argv[1:]], check=False).returncode
        report = json.loads(full.read_text(encoding="utf-8"))
    result = {
        **totals(report),
        **start.told(versions("coverage", "pytest", "jax")),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
