"""Run the package's tests with other versions of what it stands on than the lock's.

    python tools/try_versions.py oldest|newest|pre [options of pytest]

``oldest`` takes the lowest versions that pyproject.toml declares, ``newest`` the newest
that it admits, and ``pre`` those with pre-releases: each in an environment of its own.
``list`` only names the tests: those of the book's build need the book's packages, and
are left out.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ("tools", "_ext", "benchmarks")
OLDEST = (3, 11)  # older packages have no wheels for a newer Python
QUIET = ("--disable-pip-version-check", "--no-input", "--quiet")


def package_tests() -> list[str]:
    """The files of tests that import nothing of what builds the book."""
    modules = [path.stem for folder in BUILD for path in (ROOT / folder).glob("*.py")]
    modules.append("_style")
    build = re.compile(rf"^\s*(?:import|from) ({'|'.join(modules)})\b", re.M)
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [
        str(path.relative_to(ROOT))
        for path in files
        if not build.search(path.read_text(encoding="utf-8"))
    ]


def python_for(which: str) -> str:
    """The Python to make the environment with."""
    if which != "oldest" or sys.version_info[:2] == OLDEST:
        return sys.executable
    name = f"python{OLDEST[0]}.{OLDEST[1]}"
    return shutil.which(name) or sys.exit(
        f"test-oldest: expected {name}, got {sys.version.split()[0]}. Name one: "
        f"make test-oldest PYTHON=/path/to/{name}"
    )


def run(*command: str | Path) -> None:
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"failed with {code}: {' '.join(map(str, command))}")


def install(which: str, venv: Path) -> None:
    """Make the environment and install the package and its tests' needs."""
    print(f"test-{which}: making {venv.name}", flush=True)
    run(python_for(which), "-m", "venv", "--clear", venv)
    pip = (venv / "bin" / "python", "-m", "pip", *QUIET, "install")
    run(*pip, "--upgrade", "pip>=25.1")
    chosen = ["--pre"] if which == "pre" else []
    if which == "oldest":
        run(*pip, "uv")
        chosen = ["-c", str(lowest(venv))]
    run(*pip, *chosen, "-e", ".[pictures]", "--group", "test")
    run(venv / "bin" / "python", "-m", "pip", "--version")
    run(venv / "bin" / "python", "-m", "pip", "freeze", "--exclude-editable")


def lowest(venv: Path) -> Path:
    """Pins of the lowest versions that are declared, as uv finds them."""
    pins = venv / "lowest.txt"
    options = ("--quiet", "--resolution", "lowest-direct", "--no-emit-index-url")
    wanted = ("--group", "test", "--extra", "pictures", "pyproject.toml")
    uv = (venv / "bin" / "uv", "pip", "compile", "--python", venv / "bin" / "python")
    run(*uv, *options, "-o", pins, *wanted)
    return pins


def main() -> None:
    which, *options = sys.argv[1:] or ["help"]
    if which == "list":
        return print(*package_tests())
    if which not in ("oldest", "newest", "pre"):
        sys.exit(__doc__)
    venv = ROOT / f".venv-{which}"
    install(which, venv)
    tests = options or ["-n", "auto", "-q", "gauss_flows", *package_tests()]
    run(venv / "bin" / "python", "-m", "pytest", *tests)


if __name__ == "__main__":
    main()
