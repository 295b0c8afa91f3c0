"""Kill builds of a small book at random moments: does the next one make the same pages?

    .venv/bin/python trials/kills_of_book.py [--kills 24] [--seed 0]

The book has three small notebooks and the tools of the real one. Its pages are made
once undisturbed. Then builds are killed (SIGKILL), from nothing or after an edit, by
turns the whole process group and only the tool at work, whose children are left behind.
After each kill, what counts as a whole site must be one, the earlier or the new; the
next build, which begins at once and cleans nothing up, must make the pages of an
undisturbed one, byte by byte: of one from nothing, or of one after the edit, which has
another search index, since Sphinx keeps words that are gone. What was found goes to
trials/results/kills_of_book.json; exits with 1 if a page differed.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import tiny_book  # noqa: E402
from provenance import Start, versions  # noqa: E402

TOOLS = ("run_notebooks", "build_site")
CELLS = {
    "first": ["x = 2", "print(x**2)"],
    "second": ["import time", "time.sleep(1)\nprint('slept')"],
    "third": [f"print({i})" for i in range(5)],
}
EDITED = "print('an earlier version')"
RESULT = Path(__file__).parent / "results" / "kills_of_book.json"
PACKAGES = ("jupyter-book", "sphinx", "nbmake", "nbclient", "ipykernel")


def pages(book: Path) -> dict[str, str]:
    """A hash of each file of the built site; none where it does not count as whole."""
    site = book / "_build" / "html"
    if not (book / "_build" / "site.stamp").exists():
        return {}
    return {
        str(path.relative_to(site)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(site.rglob("*"))
        if path.is_file()
    }


def finish(book: Path) -> tuple[float, str]:
    """Build undisturbed, which must succeed; the seconds it took and what it said."""
    begin, said = time.monotonic(), ""
    for tool in TOOLS:
        code, text = tiny_book.build(book, tool)
        said += text
        if code:
            sys.exit(f"{tool} failed:\n{said}")
    return time.monotonic() - begin, said


def edit(book: Path, *cells: str) -> None:
    """Give the second page other cells."""
    text = tiny_book.page("second", [*cells] or CELLS["second"])
    (book / "book" / "second.md").write_text(text)


def begin_from(state: Path | None, book: Path) -> None:
    """Put what an earlier build left into the book; nothing of it for None."""
    for name in ("_build", "_notebooks"):
        shutil.rmtree(book / name, ignore_errors=True)
        if state:
            shutil.copytree(state / name, book / name)
    edit(book)  # newer than what was built


def kill(book: Path, after: float, whom: str) -> dict[str, Any]:
    """Build for so many seconds, then kill; which tool it hit, and where it was."""
    until = time.monotonic() + after
    for tool in TOOLS:
        process = tiny_book.start(book, tool)
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            if whom == "group":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            return {"tool": tool, "whom": whom, "after": round(after, 2)}
    return {"tool": "none", "whom": whom, "after": round(after, 2)}


Pages = dict[str, str]


def trial(
    book: Path,
    state: Path | None,
    after: float,
    whom: str,
    earlier: Pages,
    wanted: list[Pages],
) -> dict[str, Any]:
    """One kill and the build after it."""
    begin_from(state, book)
    row = {"from": "an edit" if state else "nothing", **kill(book, after, whom)}
    row["half_built_taken_for_whole"] = pages(book) not in (
        {},
        earlier,
        *wanted,
    )
    seconds, said = finish(book)
    row |= {"next_seconds": round(seconds, 1), "next_waited": "waiting" in said}
    row["same_pages"] = pages(book) in wanted
    return row


def write(about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write what was found so far, a line a kill."""
    counts = {
        "kills": len(rows),
        "differing": sum(not row["same_pages"] for row in rows),
        "half_built_taken_for_whole": sum(
            row["half_built_taken_for_whole"] for row in rows
        ),
    }
    text = json.dumps({**about, **counts}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(f'{text},\n "rows": [\n{lines}\n ]\n}}\n')


def main() -> int:
    """Kill, write what was found, and say whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, start = random.Random(options.seed), Start()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        book, older = Path(folder, "book"), Path(folder, "older")
        tiny_book.make(book, CELLS)
        edit(book, EDITED)
        finish(book)
        earlier = pages(book)
        for name in ("_build", "_notebooks"):
            shutil.copytree(book / name, older / name)
        begin_from(older, book)
        finish(book)
        wanted = [pages(book)]
        begin_from(None, book)
        undisturbed, _ = finish(book)
        wanted.append(pages(book))
        about = {
            "seed": options.seed,
            "undisturbed_seconds": round(undisturbed, 1),
            "files": len(wanted[0]),
        }
        turns = itertools.cycle(itertools.product((None, older), ("group", "tool")))
        while len(rows) < options.kills:
            state, whom = next(turns)
            after = rng.uniform(0.0, undisturbed)
            row = trial(book, state, after, whom, earlier, wanted)
            if row["tool"] == "none":  # the build was faster this time
                continue
            rows.append(row)
            print(len(rows), row, flush=True)
            write({**start.told(versions(*PACKAGES)), **about}, rows)
    bad = [r for r in rows if r["half_built_taken_for_whole"] or not r["same_pages"]]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
