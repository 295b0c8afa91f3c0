"""What the build tools know about notebooks: which there are, where, and how fresh.

A page of the table of contents whose front matter names a kernel is a notebook. Its
executed copy is `_notebooks/<page>.ipynb`, which carries in its metadata, under
`gauss_flows`, how it was made and a fingerprint of all that its outputs depend on.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jupytext
import nbformat
import yaml
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
EXECUTED = ROOT / "_notebooks"
RECORDS = ROOT / "book" / "records"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of terminals, no use in a log
LANES = ("quick", "full")
PACKAGES = ("jax", "flowjax", "equinox", "optax")


def pages(toc: object) -> list[str]:
    """The files that a table of contents names, in reading order."""
    if isinstance(toc, list):
        return [page for item in toc for page in pages(item)]
    if not isinstance(toc, dict):
        return []
    own = [toc[key] for key in ("root", "file") if key in toc]
    return own + [page for value in toc.values() for page in pages(value)]


def sources() -> list[Path]:
    """The notebooks of the book, in reading order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    found = [ROOT / page for page in pages(toc)]
    if missing := [path for path in found if not path.exists()]:
        sys.exit(f"_toc.yml names what is not there: {', '.join(map(str, missing))}")
    return [path for path in found if "kernelspec" in front_matter(path)]


def front_matter(path: Path) -> dict:
    head = path.read_text(encoding="utf-8").split("\n---\n", maxsplit=1)[0]
    return (yaml.safe_load(head) or {}) if head.startswith("---\n") else {}


def executed_path(source: Path) -> Path:
    return (EXECUTED / source.relative_to(ROOT)).with_suffix(".ipynb")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def export(source: Path) -> NotebookNode:
    """The notebook of a MyST page, without outputs."""
    notebook = jupytext.read(source)
    # stable ids, so that an unchanged page gives an unchanged file
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    return notebook


def read(path: Path) -> NotebookNode | None:
    """A notebook; None where there is none, or only a part of one."""
    try:
        return nbformat.read(path, as_version=4)
    except (FileNotFoundError, ValueError):
        return None


def read_executed(source: Path) -> NotebookNode | None:
    return read(executed_path(source))


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook, so that the file is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    try:
        nbformat.write(notebook, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def with_outputs(fresh: NotebookNode, ran: NotebookNode) -> NotebookNode:
    """A notebook with the outputs of another run of the same code."""
    for cell, done in zip(code_cells(fresh), code_cells(ran), strict=True):
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    fresh.metadata = {**ran.metadata, **fresh.metadata}
    return fresh


def read_as_book(source: Path) -> NotebookNode:
    """The notebook as the book's own reader sees it: the cache's key is made of it."""
    return read_myst_markdown_notebook(
        source.read_text(encoding="utf-8"), path=str(source)
    )


def lane() -> str:
    """The lane that the environment asks for."""
    asked = os.environ.get("GAUSS_FLOWS_LANE", "quick") or "quick"
    if asked not in LANES:
        sys.exit(f"GAUSS_FLOWS_LANE: expected one of {LANES}, got {asked!r}")
    return asked


def device() -> str:
    """What JAX computes on, in words: 'CPU, 2 cores' or 'GPU, NVIDIA H200'."""
    code = (
        "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    if found.returncode:
        sys.exit(f"JAX finds no device to run on:\n{found.stderr}")
    backend, count, kind = found.stdout.strip().split(maxsplit=2)
    if backend == "cpu":
        return (
            f"CPU, {len(os.sched_getaffinity(0))} cores"
            if hasattr(os, "sched_getaffinity")
            else f"CPU, {os.cpu_count()} cores"
        )
    return f"{backend.upper()}, {f'{count} × ' if int(count) > 1 else ''}{kind}"


def environment() -> dict[str, str]:
    """Lane, device and versions of a run made now."""
    versions = {name: version(name) for name in PACKAGES}
    return {
        "lane": lane(),
        "device": device(),
        "python": platform.python_version(),
        **versions,
    }


def fingerprint(source: Path, setting: dict[str, str]) -> str:
    """A hash of all that a notebook's outputs depend on, which its prose is not."""
    cells = [
        [cell.source, {k: v for k, v in cell.metadata.items() if k != "execution"}]
        for cell in code_cells(export(source))
    ]
    backend = setting["device"].split(",")[0]
    about = [cells, setting["lane"], setting["python"], backend]
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    files = [*sorted((ROOT / "gauss_flows").rglob("*.py")), ROOT / "_style.py"]
    files += [ROOT / "constraints.txt", ROOT / "tools/nbmake_one.py"]
    if setting["lane"] == "quick":  # the full lane writes its record, and reads none
        files.append(RECORDS / f"{source.stem}.json")
    for path in files:
        found.update(str(path.relative_to(ROOT)).encode())
        found.update(path.read_bytes() if path.exists() else b"-")
    return found.hexdigest()
