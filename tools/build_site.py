"""Build the site from the executed notebooks; nothing is executed here."""

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import alone
import notebooks as nbs
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn

BUILD = nbs.ROOT / "_build"
CACHE = BUILD / ".jupyter_cache"
LOG = BUILD / "site.log"
STAMP = BUILD / "site.stamp"

# Jupyter Book's own redirect has neither title nor icon
INDEX = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Gaussianization flows</title>
<link rel="icon" href="_static/favicon.svg">
<link rel="canonical" href="book/intro.html">
<meta http-equiv="refresh" content="0; url=book/intro.html">
<p><a href="book/intro.html">Gaussianization flows</a></p>
</html>
"""


def fill_cache(folder: Path) -> int:
    """Hand the executed notebooks to the book's cache; how many there are."""
    # the cache knows nothing of the package or of JAX, so it never outlives a build
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cache = get_cache(str(folder))
    sources = nbs.sources()
    for source in sources:
        ran = nbs.read_executed(source)
        if ran is None:
            sys.exit(f"{source.name} has not been executed: make notebooks")
        book = nbs.read_as_book(source)
        for cell, done in zip(nbs.code_cells(book), nbs.code_cells(ran), strict=True):
            if cell.source != done.source:
                sys.exit(f"{source.name} has changed since it ran: make notebooks")
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
        about = ran.metadata["gauss_flows"]
        if nbs.fingerprint(source, about) != about["fingerprint"]:
            sys.exit(f"what {source.name} runs has changed: make notebooks")
        book.metadata.language_info = ran.metadata.get("language_info", {})
        spent = {"execution_seconds": about["seconds"]}
        bundle = CacheBundleIn(book, str(source), data=spent)
        cache.cache_notebook_bundle(bundle, overwrite=True)
    return len(sources)


def machinery() -> str:
    """A hash of what shapes every page, and which Sphinx does not watch."""
    found = hashlib.sha256()
    names = ["_config.yml", "_toc.yml", "constraints.txt", "book/references.bib"]
    files = [nbs.ROOT / name for name in names]
    for path in [*files, *sorted((nbs.ROOT / "_ext").glob("*.py"))]:
        found.update(path.read_bytes())
    return found.hexdigest()


def start_clean_if_needed() -> None:
    """Drop an earlier site that was made by other machinery, or that failed."""
    if STAMP.exists() and STAMP.read_text() == machinery():
        return
    for folder in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(BUILD / folder, ignore_errors=True)


def build(*options: str, log_path: Path = LOG) -> int:
    """Run Jupyter Book; warnings are errors, and are shown as they come."""
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", ".", "-W", "--keep-going", *options]
    process = subprocess.Popen(
        command,
        cwd=nbs.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=alone.HELD,  # while it writes, no other build may
    )
    assert process.stdout is not None
    told = False
    with process, log_path.open("w", encoding="utf-8") as log:
        for line in process.stdout:
            line = nbs.COLOUR.sub("", line)
            log.write(line)
            if any(word in line for word in ("WARNING", "ERROR", "CRITICAL")):
                print(line.rstrip(), flush=True)
                told = True
    if process.wait() and not told:
        print("\n".join(log_path.read_text(encoding="utf-8").splitlines()[-25:]))
    return process.returncode


def main() -> int:
    started = time.monotonic()
    BUILD.mkdir(exist_ok=True)
    given = fill_cache(CACHE)
    start_clean_if_needed()
    # a build that breaks off is neither built upon nor served
    STAMP.unlink(missing_ok=True)
    print("site: building", flush=True)
    if build():
        print(f"site: FAILED; the whole log is {LOG.relative_to(nbs.ROOT)}")
        return 1
    if len(get_cache(str(CACHE)).list_cache_records()) != given:
        print("site: FAILED; the build executed a notebook that had already run")
        return 1
    (BUILD / "html" / "index.html").write_text(INDEX, encoding="utf-8")
    STAMP.write_text(machinery())
    seconds = time.monotonic() - started
    print(f"site: _build/html/index.html, {seconds:.0f} s. To read it: make serve")
    return 0


if __name__ == "__main__":
    try:
        with alone.alone("site"):
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nsite: broken off; the next `make book` begins it anew")
    except OSError as fault:
        sys.exit(f"site: FAILED: {fault}")
