"""A book of a few cells with the tools of this one, to try how builds fail and recover.

Used by tests/test_build_faults.py and trials/kills_of_book.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

TOOLS = Path(__file__).parent
CONFIG = """\
title: Tiny
only_build_toc_files: true
exclude_patterns: [_build, _notebooks]
execute: {execute_notebooks: cache, raise_on_error: true}
bibtex_bibfiles: [book/references.bib]
sphinx:
  config:
    extensions: [myst_nb, jupyter_book, sphinx_comments, sphinx_external_toc,
                 sphinx_book_theme, sphinx_design, sphinxcontrib.bibtex]
    nb_execution_raise_on_error: true
"""
HEAD = """\
---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
---

"""


def page(title: str, cells: list[str]) -> str:
    """A page of code cells, in MyST."""
    code = (f"```{{code-cell}} ipython3\n{cell}\n```\n" for cell in cells)
    return f"{HEAD}# {title}\n\nThe text of {title}.\n\n" + "\n".join(code)


def make(folder: Path, cells: dict[str, list[str]]) -> None:
    """Write a book whose pages, named by their stems, hold these cells."""
    for name in ("gauss_flows", "_ext", "book/records"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(TOOLS, folder / "tools", ignore=lambda *_: ["__pycache__"])
    locks = ("constraints.txt", "requirements.lock", "requirements-gpu.lock")
    for name in ("gauss_flows/__init__.py", "_style.py", *locks):
        (folder / name).touch()
    (folder / "book" / "references.bib").touch()
    (folder / "_config.yml").write_text(CONFIG)
    root, *rest = cells
    toc = {"format": "jb-book", "root": f"book/{root}.md"}
    chapters = [{"file": f"book/{name}.md"} for name in rest]
    text = yaml.safe_dump({**toc, **({"chapters": chapters} if rest else {})})
    (folder / "_toc.yml").write_text(text)
    for name in cells:
        (folder / "book" / f"{name}.md").write_text(page(name, cells[name]))


def start(folder: Path, tool: str, **options) -> subprocess.Popen[str]:
    """Start a tool, such as ``run_notebooks``, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, folder / "tools" / f"{tool}.py"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def build(folder: Path, tool: str, **options) -> tuple[int, str]:
    """Run one of the book's tools; its exit status and what it said."""
    process = start(folder, tool, **options)
    said, _ = process.communicate()
    return process.returncode, said
