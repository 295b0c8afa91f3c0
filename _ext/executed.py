"""The notebooks that were executed for this book, as Sphinx sees them."""

import hashlib
import json
from pathlib import Path


class Run:
    """One executed notebook: its page, and what its metadata tells about the run."""

    def __init__(self, srcdir: str | Path, docname: str):
        self.docname = docname
        self.path = Path(srcdir, "_notebooks", f"{docname}.ipynb")
        self.bytes = self.path.read_bytes() if self.path.exists() else b""
        self.digest = hashlib.sha256(self.bytes).hexdigest()

    @property
    def notebook(self) -> dict:
        return json.loads(self.bytes) if self.bytes else {"cells": [], "metadata": {}}

    @property
    def about(self) -> dict[str, str]:
        """Lane, device, versions, date, seconds and bytes of memory of the run."""
        return self.notebook["metadata"].get("gauss_flows", {})

    @property
    def outputs(self) -> list[dict]:
        cells = self.notebook["cells"]
        return [output for cell in cells for output in cell.get("outputs", [])]

    @property
    def verdicts(self) -> list[dict]:
        """The rows of the chapter's ledger."""
        return [
            row
            for output in self.outputs
            for row in output.get("metadata", {}).get("verdicts", [])
        ]


def runs(srcdir: str | Path) -> list[Run]:
    """All executed notebooks, by file name."""
    folder = Path(srcdir, "_notebooks", "book")
    return [Run(srcdir, f"book/{p.stem}") for p in sorted(folder.glob("*.ipynb"))]


def digest_of_all(srcdir: str | Path) -> str:
    return hashlib.sha256("".join(r.digest for r in runs(srcdir)).encode()).hexdigest()


def duration(seconds: float) -> str:
    """A run time as one says it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"


def size(memory: float) -> str:
    """Bytes of memory as one says them."""
    return f"{memory / 1e9:.1f} GB"
