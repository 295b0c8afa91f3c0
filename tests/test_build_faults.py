"""Builds that hang, die, fill the disk or meet another: what they say and leave."""

import contextlib
import http.client
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import alone
import build_site
import nbformat
import notebooks
import pytest
import run_notebooks
import serve
import tiny_book

TOOLS = Path(alone.__file__).parent
SETTING = {"lane": "quick", "device": "CPU, 2 cores", "python": "3"}
GOOD, OTHER = "print('before')", "print('after')"
FAULTS = {
    "hangs": (
        "import time\ntime.sleep(600)",
        "TimeoutError: the cell had not ended after 1 s, its limit",
    ),
    "is killed": (
        "import os\nos.kill(os.getpid(), 9)",
        "DeadKernelError: the kernel was killed (SIGKILL), as happens where memory "
        "runs out",
    ),
}


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of one page, on which the tools act that are imported here."""
    tiny_book.make(tmp_path, {"one": [GOOD, OTHER]})
    executed, build = tmp_path / "_notebooks", tmp_path / "_build"
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "EXECUTED", executed)
    monkeypatch.setattr(notebooks, "RECORDS", tmp_path / "book" / "records")
    monkeypatch.setattr(run_notebooks, "RUNNING", executed / "running")
    monkeypatch.setattr(run_notebooks, "SECONDS_A_CELL", {"quick": 1})
    monkeypatch.setattr(build_site, "BUILD", build)
    monkeypatch.setattr(build_site, "CACHE", build / ".jupyter_cache")
    monkeypatch.setattr(build_site, "LOG", build / "site.log")
    monkeypatch.setattr(build_site, "STAMP", build / "site.stamp")
    monkeypatch.setattr(serve, "SITE", build / "html")
    monkeypatch.setattr(serve, "STAMP", build / "site.stamp")
    return tmp_path


def source(book: Path) -> Path:
    return book / "book" / "one.md"


def as_executed(book: Path) -> Path:
    """What a good run of the page leaves, without a run."""
    notebook = notebooks.export(source(book))
    for i, cell in enumerate(notebooks.code_cells(notebook), start=1):
        cell.execution_count = i
    ran = book / "ran.ipynb"
    nbformat.write(notebook, ran)
    mark = notebooks.fingerprint(source(book), SETTING)
    about = {**SETTING, "seconds": 1.0, "memory": 1, "fingerprint": mark}
    run_notebooks.keep(source(book), notebook, ran, about)
    return notebooks.executed_path(source(book))


@contextlib.contextmanager
def full_disk(size: int = 100):
    """No file that we write may grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; a dead child of nobody counts."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


# a cell


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cell_that_fails_is_named_with_its_line(book, fault):
    code, error = FAULTS[fault]
    source(book).write_text(tiny_book.page("one", [GOOD, code]))
    before = as_executed(book)
    _, said = run_notebooks.execute(source(book), "[1/1]", SETTING, records=False)
    line = source(book).read_text().split("\n").index(code.split("\n")[0]) + 1
    assert said == f"book/one.md:{line}, code cell 2: {error}"
    assert not before.exists()
    kept = nbformat.read(run_notebooks.RUNNING / "one.ipynb", 4)
    assert notebooks.code_cells(kept)[0].outputs[0].text == "before\n"


def test_a_run_tells_the_most_memory_that_it_held(book):
    took = []
    for size in (0, 600_000_000):
        cells = [f"held = bytearray(b'1') * {size}", "del held"]
        source(book).write_text(tiny_book.page("one", cells))
        _, said = run_notebooks.execute(source(book), "[1/1]", SETTING, records=False)
        assert not said
        took.append(notebooks.read_executed(source(book)).metadata["gauss_flows"])
    small, large = (about["memory"] for about in took)
    assert 0.02e9 < small < 0.3e9
    assert 0.6e9 < large < 0.9e9


def test_a_run_that_leaves_no_notebook_names_the_cell_it_was_at(book):
    half = book / "half.ipynb"
    half.write_text('{"cells": [')
    log = "NBMAKE INTERNAL ERROR\n[Errno 28] No space left on device\n  File ..."
    said = run_notebooks.failure(source(book), half, 2, log)
    line = source(book).read_text().split("\n").index(OTHER) + 1
    reason = "[Errno 28] No space left on device"
    assert said == f"book/one.md:{line}, code cell 2: {reason}"
    begun = run_notebooks.failure(source(book), book / "none.ipynb", 0, "")
    assert begun == "book/one.md, before its first cell: stopped (see above)"


# the disk


def test_a_full_disk_leaves_the_file_that_was_there(book):
    path = as_executed(book)
    was = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match="File too large"):
        notebooks.write(notebooks.export(source(book)), path)
    assert path.read_bytes() == was
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_told_with_the_notebook(book):
    with full_disk():
        _, said = run_notebooks.execute(source(book), "[1/1]", SETTING, records=False)
    assert said.startswith("book/one.md, outside of its cells: ")
    assert "File too large" in said


@pytest.mark.parametrize("rest", ["", '{"cells": [', "\0\0\0"])
def test_half_an_executed_notebook_is_none(book, rest):
    path = as_executed(book)
    assert run_notebooks.refresh(source(book), SETTING)
    path.write_text(rest)
    assert not run_notebooks.refresh(source(book), SETTING)
    with pytest.raises(SystemExit, match="has not been executed"):
        build_site.fill_cache(build_site.CACHE)


# the site


def test_a_site_is_not_built_from_runs_of_other_code(book):
    as_executed(book)
    assert build_site.fill_cache(build_site.CACHE) == 1
    (book / "gauss_flows" / "__init__.py").write_text("changed = True\n")
    with pytest.raises(SystemExit, match=r"what one\.md runs has changed"):
        build_site.fill_cache(build_site.CACHE)


def test_no_disk_for_the_log_ends_the_build(book, monkeypatch):
    jupyter_book = book / "jupyter-book"
    jupyter_book.write_text("#!/bin/sh\nyes\n")  # until nobody listens
    jupyter_book.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(book / "python"))
    with full_disk(), pytest.raises(OSError, match="File too large"):
        build_site.build(log_path=book / "site.log")


def get(server) -> int:
    """The status that the server answers with."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        return connection.getresponse().status


def test_half_a_site_is_neither_served_nor_built_upon(book, monkeypatch):
    page = build_site.BUILD / "html" / "half.html"

    def half():
        page.parent.mkdir(exist_ok=True)
        page.touch()
        assert get(server) == 503
        raise KeyboardInterrupt

    def whole():
        assert not page.exists()
        page.parent.mkdir()
        return 0

    as_executed(book)
    page.parent.mkdir(parents=True)
    with serve.serve(0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(build_site, "build", half)
        with pytest.raises(KeyboardInterrupt):
            build_site.main()
        assert get(server) == 503
        with pytest.raises(SystemExit, match="not the whole of it"):
            serve.stop_unless_whole()
        monkeypatch.setattr(build_site, "build", whole)
        assert build_site.main() == 0
        assert get(server) == 200
        server.shutdown()


# two builds


def hold(code: str) -> subprocess.Popen[str]:
    """A process that takes the lock and then runs the code."""
    program = f"import alone, subprocess, time\nwith alone.alone('one'):\n    {code}"
    return subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        cwd=TOOLS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """A lock of the test's own, for us and for the processes of ``tiny_book``."""
    monkeypatch.setattr(alone, "LOCK", tmp_path / ".build.lock")


@pytest.mark.parametrize("tool", ["run_notebooks", "build_site", "bootstrap"])
def test_a_second_build_says_for_whom_it_waits(book, lock, tool):
    (book / "pyproject.toml").write_text("[tool]\n")
    with alone.alone("first"):
        second = tiny_book.start(book, tool)
        assert second.stdout is not None
        said = second.stdout.readline()
    second.kill()
    second.communicate()
    assert "waiting, because a build is at work here: first, process" in said
    assert str(os.getpid()) in said


def test_the_lock_is_free_when_its_holders_have_ended(tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "alone.py").write_text((TOOLS / "alone.py").read_text())
    monkeypatch.setattr(sys.modules[__name__], "TOOLS", tmp_path / "tools")
    child = "subprocess.Popen(['cat'], pass_fds=alone.HELD)"
    first = hold(f"{child}; print('has it'); time.sleep(600)")
    assert first.stdout.readline() == "has it\n"
    first.kill()
    first.wait()
    second = hold("print('has it')")
    waits = second.stdout.readline()
    assert "waiting, because a build is at work here: one, process" in waits
    first.communicate()  # closes the pipe that the dead one's child reads
    said, _ = second.communicate()
    assert said == "has it\n"


def test_a_killed_build_leaves_nobody_behind(book):
    cell = "import os, time\nopen('../../pid', 'w').write(str(os.getpid()))"
    source(book).write_text(tiny_book.page("one", [f"{cell}\ntime.sleep(600)"]))
    build = tiny_book.start(book, "run_notebooks")
    pid = book / "pid"
    while not (pid.exists() and pid.read_text()):
        assert build.poll() is None
        time.sleep(0.1)
    kernel = int(pid.read_text())
    parent = int(Path(f"/proc/{kernel}/stat").read_text().rsplit(")", 1)[1].split()[1])
    build.send_signal(signal.SIGKILL)
    build.communicate()
    assert gone(parent)
    assert gone(kernel)
