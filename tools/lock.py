"""Make the lock and environment.yml from pyproject.toml.

constraints.txt pins every package for every Python and platform we support. It names
no registry and no path, so that it serves whatever index pip is set up with. The same
pins stand, with the hashes of their files, in requirements.lock; those that only the
extra `gpu` asks for stand in requirements-gpu.lock. pip cannot take hashes from
constraints: https://github.com/pypa/pip/issues/8792
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [
    *("pip", "compile", "--quiet", "--universal", "--python-version", "3.11"),
    *("--group", "dev", "--extra", "pictures"),
    *("--no-emit-index-url", "--custom-compile-command", "make lock"),
]
HASHED = ("--generate-hashes", "--no-annotate", "-c", "constraints.txt")
HEAD = "# Made from pyproject.toml by `make lock`; do not edit.\n"


def compile_pins(*options: str) -> str:
    """The pins of everything in pyproject.toml."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("make lock needs uv: pip install uv, or your system's package of it")
    command = [uv, *COMMAND, *options, "pyproject.toml"]
    return subprocess.check_output(command, cwd=ROOT, text=True)


def entries(lock: str) -> list[str]:
    """The pins of a lock, each with its hashes."""
    return re.findall(r"^[^#\s].*\n(?: .*\n)*", lock, re.M)


def main() -> None:
    pins = compile_pins("--extra", "gpu", "--upgrade")
    (ROOT / "constraints.txt").write_text(pins, encoding="utf-8")
    base = entries(compile_pins(*HASHED))
    with_gpu = entries(compile_pins(*HASHED, "--extra", "gpu"))
    for name, held in {
        "requirements.lock": base,
        "requirements-gpu.lock": [entry for entry in with_gpu if entry not in base],
    }.items():
        (ROOT / name).write_text(HEAD + "".join(held), encoding="utf-8")
    print("constraints.txt, requirements.lock, requirements-gpu.lock written")
    subprocess.run([sys.executable, "tools/make_environment.py"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
