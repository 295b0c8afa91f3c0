"""Make constraints.txt and environment.yml from pyproject.toml.

constraints.txt pins every package for every Python and platform we support. It names
no registry and no path, so that it serves whatever index pip is set up with.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [
    *("pip", "compile", "--quiet", "--universal", "--python-version", "3.11"),
    *("--group", "dev", "--extra", "gpu", "--extra", "pictures"),
    *("--no-emit-index-url", "--custom-compile-command", "make lock"),
]


def compile_constraints(output: Path, *, upgrade: bool = False) -> None:
    """Write the pins of everything in pyproject.toml to `output`."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("make lock needs uv: pip install uv, or your system's package of it")
    arguments = [*COMMAND, "-o", str(output), *(["--upgrade"] if upgrade else [])]
    subprocess.run([uv, *arguments, "pyproject.toml"], cwd=ROOT, check=True)


def main() -> None:
    compile_constraints(ROOT / "constraints.txt", upgrade=True)
    print("constraints.txt written")
    subprocess.run([sys.executable, "tools/make_environment.py"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
