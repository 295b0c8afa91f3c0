"""Run the notebooks that the site offers, as Colab would: `make colab` (CHAPTER=...).

Each notebook runs outside the repository, in an environment of its own that holds
beforehand what Colab's does (`colab.txt`) and nothing of ours. Its install cell runs as
it stands, but for the repository's address, in whose place comes a wheel of this tree.
Afterwards each package of `colab.txt` must be as it was: an install that moves JAX
leaves Colab's GPU unused without a word.

The Python is the one of `.venv`, and there is no GPU: what Colab adds to both is not
imitated.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import nbformat
import notebooks as nbs
from nbclient import NotebookClient
from nbclient.exceptions import (
    CellExecutionError,
    CellTimeoutError,
    DeadKernelError,
)
from packaging.requirements import Requirement
from run_notebooks import clock

OFFERED = nbs.ROOT / "_build" / "html" / "notebooks" / "book"
COLAB = nbs.ROOT / "_build" / "colab"
PINS = Path(__file__).with_name("colab.txt")
SECONDS_A_CELL = 3600
LIST = """
import json, sys
from importlib.metadata import distribution
print(json.dumps({name: distribution(name).version for name in sys.argv[1:]}))
"""


def pins() -> dict[str, str]:
    """What Colab holds, by name."""
    lines = PINS.read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line[:1] not in ("", "#")]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in found}


def python_of(venv: Path) -> Path:
    return venv / "bin" / "python"


def make_base() -> Path:
    """The environment with what Colab holds; made anew when `colab.txt` changes."""
    base, stamp = COLAB / "base", COLAB / "base.txt"
    if stamp.exists() and stamp.read_text() == PINS.read_text():
        return base
    print("colab: installing what Colab holds, a few minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", base], check=True)
    pip = [python_of(base), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-r", PINS], check=True)
    stamp.write_text(PINS.read_text())
    return base


def make_wheel() -> Path:
    """The package of this tree, as pip would make it from the repository."""
    folder = COLAB / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=nbs.ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def overlay(base: Path, folder: Path) -> Path:
    """A new environment that sees the packages of `base`; its Python."""
    make = [sys.executable, "-m", "venv", "--without-pip", folder]
    subprocess.run(make, check=True)
    (own,) = folder.glob("lib/python3*/site-packages")
    (lent,) = base.glob("lib/python3*/site-packages")
    (own / "colab.pth").write_text(f"{lent}\n")
    return python_of(folder)


def make_kernel(python: Path, folder: Path) -> None:
    """A Jupyter kernel named `colab` that runs `python`."""
    kernel = folder / "kernels" / "colab"
    kernel.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))


def kernel_environment(home: Path) -> dict[str, str]:
    """The environment of a kernel: the quick lane, and nothing of this project."""
    ours = ("PYTHON", "GAUSS_FLOWS", "VIRTUAL_ENV", "IPYTHON", "MPL", "JUPYTER")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    # BLAS threads that wait for each other spin
    return {
        **env,
        "IPYTHONDIR": str(home),
        "OPENBLAS_NUM_THREADS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def install_from(notebook: nbformat.NotebookNode, wheel: Path) -> nbformat.NotebookNode:
    """Put the wheel in the place of the repository's address; the install cell."""
    first = nbs.code_cells(notebook)[0]
    before, address = first.source.split("git+", maxsplit=1)
    rest = address[address.index('"') :]
    first.source = f"{before}{wheel.as_uri()}{rest}"
    return first


def moved(python: Path) -> dict[str, str]:
    """The packages of Colab that are no longer as they were, and what they are."""
    wanted = pins()
    listed = subprocess.check_output([python, "-c", LIST, *wanted], text=True)
    return {k: v for k, v in json.loads(listed).items() if v != wanted[k]}


def cell_seconds(cell: nbformat.NotebookNode) -> float:
    """How long a cell ran, from the stamps that the client left."""
    begun, ended = (
        datetime.fromisoformat(cell.metadata["execution"][name])
        for name in ("iopub.execute_input", "shell.execute_reply")
    )
    return (ended - begun).total_seconds()


def execute(notebook: nbformat.NotebookNode, folder: Path) -> str:
    """Run a notebook in the kernel `colab`; the error that stopped it, or nothing."""
    folder.mkdir()
    client = NotebookClient(
        notebook,
        timeout=SECONDS_A_CELL,
        kernel_name="colab",
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute(env=kernel_environment(folder))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return nbs.COLOUR.sub("", str(error))
    return ""


def imitate(path: Path, base: Path, wheel: Path) -> str:
    """Run one notebook; what went wrong, or nothing."""
    notebook = nbformat.read(path, as_version=4)
    install = install_from(notebook, wheel)
    with tempfile.TemporaryDirectory(prefix="colab-") as name:
        python = overlay(base, Path(name, "env"))
        make_kernel(python, Path(name, "jupyter"))
        os.environ["JUPYTER_PATH"] = str(Path(name, "jupyter"))
        error = execute(notebook, Path(name, "content"))
        changed = moved(python)
    told = "".join(output.get("text", "") for output in install.outputs)
    device = re.search(r"JAX computes .*", told)
    said = device[0] if device else told
    print(f"  install cell: {cell_seconds(install):.0f} s. {said}")
    if changed:
        return f"the install moved what Colab holds: {changed}\n{error}"
    return error


def main() -> int:
    names = sys.argv[1:] or [source.stem for source in nbs.sources()]
    paths = [OFFERED / f"{name}.ipynb" for name in names]
    if missing := [path.stem for path in paths if not path.exists()]:
        sys.exit(f"not in the site: {', '.join(missing)}. First: make book")
    base, wheel, failed = make_base(), make_wheel(), []
    for path in paths:
        started = time.monotonic()
        error = imitate(path, base, wheel)
        end = "FAILED" if error else "passed"
        seconds = clock(time.monotonic() - started)
        print(f"{path.stem}: {end} after {seconds}\n{error}".rstrip(), flush=True)
        failed += [path.stem] if error else []
    print(f"colab: {len(paths) - len(failed)} of {len(paths)} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
