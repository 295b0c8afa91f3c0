"""Make the virtual environment `.venv` and install everything the book needs.

Plain Python, because it runs before anything is installed. A second call returns
at once: a stamp in `.venv` holds a digest of what the environment was made from.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from alone import alone

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "gauss_flows.json"
OLDEST = (3, 11)
LOCKS = (ROOT / "requirements.lock", ROOT / "requirements-gpu.lock")

ADVICE = """\
set-up: where hashes differ, your index serves other files than the one that the lock
set-up: was made from. If you trust it: make setup VERIFY=no"""


def say(text: str) -> None:
    print(f"set-up: {text}", flush=True)


def stop(text: str) -> NoReturn:
    sys.exit(f"set-up: {text}")


def use_new_python() -> None:
    """Go on with a Python that is new enough: this one, or the first on the path."""
    if sys.version_info[:2] >= OLDEST:
        return
    for minor in range(OLDEST[1], OLDEST[1] + 10):
        if found := shutil.which(f"python3.{minor}"):
            os.execv(found, [found, *sys.argv])
    stop(
        f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed; {sys.executable} is "
        f"{platform.python_version()} and no newer one was found. Install one, or name "
        "it: make PYTHON=/path/to/python"
    )


def wanted(extra: str) -> dict[str, str]:
    """What the environment is made from: the Python, and a hash of what it holds."""
    import tomllib

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pyproject.pop("tool")  # how to lint and test, which installs nothing
    about = [extra, pyproject, *(read.read_text(encoding="utf-8") for read in LOCKS)]
    packages = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return {"python": f"{platform.python_version()} in {ROOT}", "packages": packages}


def make_venv() -> None:
    """Make `.venv`, fetching Debian's venv package where it is missing."""

    def attempt() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "venv", "--clear", VENV],
            capture_output=True,
            text=True,
        )

    tried = attempt()
    if tried.returncode == 0:
        return
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
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
        f"{sys.executable} -m venv does not work here. On Debian or Ubuntu, as root: "
        f"apt-get install {package}"
    )


def unverified(lock: Path) -> Path:
    """A copy of a lock without its hashes."""
    copy = VENV / lock.name
    pins = re.sub(r" \\\n +--hash=\S+", "", lock.read_text(encoding="utf-8"))
    copy.write_text(pins, encoding="utf-8")
    return copy


def install(extra: str, *, verify: bool) -> None:
    """Install the packages of the lock, and this tree in place.

    The tree is a folder, of which there is no hash, and pip wants one of all or none:
    hence two calls. The second fetches nothing.
    """
    pip = [str(VENV / "bin" / "python"), "-m", "pip"]
    pip += ["--disable-pip-version-check", "--no-input"]
    locks = LOCKS if extra == "gpu" else LOCKS[:1]
    packages = ["--require-hashes"] if verify else []
    for lock in locks:
        packages += ["-r", str(lock if verify else unverified(lock))]
    for what, arguments in (
        ("installing the packages, some 1.5 GB: a few minutes", packages),
        ("installing gauss_flows", ["--no-deps", "--no-build-isolation", "-e", "."]),
    ):
        say(what)
        if subprocess.run(
            [*pip, "install", "--quiet", *arguments], cwd=ROOT
        ).returncode:
            stop(f"failed (see above): pip install {' '.join(arguments)}\n{ADVICE}")
    if subprocess.run([*pip, "check"], cwd=ROOT, stdout=subprocess.PIPE).returncode:
        stop("the lock lacks what pyproject.toml asks for: make lock")


def main() -> None:
    use_new_python()
    parser = argparse.ArgumentParser(description=__doc__)
    choices = ["", "gpu"]
    parser.add_argument("--extra", default="", choices=choices, help="for CUDA: gpu")
    parser.add_argument("--unverified", action="store_true", help="look at no hashes")
    options = parser.parse_args()
    if present() == wanted(options.extra):
        return
    with alone("set-up"):
        set_up(options.extra, verify=not options.unverified)


def present() -> dict[str, str]:
    """What the environment was made from; nothing where making it broke off."""
    try:
        return json.loads(STAMP.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def set_up(extra: str, *, verify: bool) -> None:
    """Make the environment what it should be, unless another set-up just did."""
    want, have = wanted(extra), present()
    if have == want:
        return
    STAMP.unlink(missing_ok=True)
    if have.get("python") != want["python"]:
        say(f"making .venv with Python {platform.python_version()}")
        make_venv()
    install(extra, verify=verify)
    STAMP.write_text(json.dumps(want))
    say("done")


if __name__ == "__main__":
    main()
