"""Make the virtual environment `.venv` and install everything the book needs.

Plain Python, because it runs before anything is installed. A second call returns
at once: a stamp in `.venv` holds a digest of what the environment was made from.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "gauss_flows.stamp"
OLDEST = (3, 11)


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def stop(text: str) -> NoReturn:
    sys.exit(f"set-up: {text}")


def find_python() -> str:
    """A Python that is new enough: this one, else the first newer one on the path."""
    if sys.version_info[:2] >= OLDEST:
        return sys.executable
    wanted = ".".join(map(str, OLDEST))
    for minor in range(OLDEST[1], OLDEST[1] + 10):
        if found := shutil.which(f"python3.{minor}"):
            return found
    stop(
        f"Python {wanted} or newer is needed; {sys.executable} is "
        f"{sys.version.split()[0]} and no newer one was found. Install one, or name "
        "it: make PYTHON=/path/to/python"
    )


def version(python: str) -> str:
    code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def digest(python: str, extra: str) -> str:
    """What the environment depends on, as one hash."""
    found = hashlib.sha256(f"{version(python)} {extra} {ROOT}".encode())
    for name in ("pyproject.toml", "constraints.txt", "tools/bootstrap.py"):
        found.update((ROOT / name).read_bytes())
    return found.hexdigest()


def make_venv(python: str) -> None:
    """Make `.venv`, fetching Debian's venv package where it is missing."""

    def attempt() -> subprocess.CompletedProcess:
        return subprocess.run(
            [python, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True
        )

    tried = attempt()
    if tried.returncode == 0:
        return
    package = f"python{'.'.join(version(python).split('.')[:2])}-venv"
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"this Python cannot make environments yet; installing {package}")
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", package]):
            subprocess.run(["apt-get", *command], env=quiet, stdout=subprocess.DEVNULL)
        tried = attempt()
        if tried.returncode == 0:
            return
    shutil.rmtree(VENV, ignore_errors=True)
    print(tried.stdout + tried.stderr, file=sys.stderr)
    stop(
        f"{python} -m venv does not work here. On Debian or Ubuntu, as root: "
        f"apt-get install {package}"
    )


def install(extra: str) -> None:
    """Install the project and its tools, at the versions of constraints.txt."""
    pip = [str(VENV / "bin" / "python"), "-m", "pip"]
    pip += ["--disable-pip-version-check", "--no-input", "install", "--quiet"]
    project = f".[{extra}]" if extra else "."
    for what, arguments in (
        ("pip", ["--upgrade", "pip>=25.1"]),  # the first that knows --group
        (
            "the packages, some 1.5 GB: a few minutes",
            ["-c", "constraints.txt", "-e", project, "--group", "dev"],
        ),
    ):
        say(f"installing {what}")
        if subprocess.run([*pip, *arguments], cwd=ROOT).returncode:
            stop(f"installing failed (see above): pip install {' '.join(arguments)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", default="", help="'gpu' for a CUDA machine")
    extra = parser.parse_args().extra
    python = find_python()
    wanted = digest(python, extra)
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    say(f"making .venv with Python {version(python)}")
    make_venv(python)
    install(extra)
    STAMP.write_text(wanted)
    say("done")


if __name__ == "__main__":
    main()
