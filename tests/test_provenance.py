"""Results say which commit ran: that of the start, and if all of it was committed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def provenance(monkeypatch, tmp_path):
    """The module, told that the repository is a new one with a benchmark in it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import provenance

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/one.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    commit_all(tmp_path)
    yield provenance
    sys.modules.pop("provenance")


def git(folder, *arguments):
    settings = ("user.name=a", "user.email=a@b.c", "commit.gpgsign=false")
    given = [part for setting in settings for part in ("-c", setting)]
    subprocess.run(["git", "-C", folder, *given, *arguments], check=True)


def commit_all(folder):
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "change")


def test_code_that_is_not_committed_is_told(provenance, tmp_path):
    clean = provenance.commit()
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    (tmp_path / "notes.md").write_text("no code\n")
    assert provenance.commit() == clean
    (tmp_path / "benchmarks/one.py").write_text("x = 2\n")
    assert provenance.commit() == f"{clean}+changes"
    commit_all(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{12}", provenance.commit())


def test_a_run_is_of_the_commit_at_its_start(provenance, tmp_path):
    first = provenance.commit()
    start = provenance.Start()
    (tmp_path / "benchmarks/one.py").write_text("x = 2\n")
    commit_all(tmp_path)
    told = start.told(provenance.versions("jax"))
    assert told["commit"] == first != provenance.commit()
    assert told["machine"]["kind"] in ("cpu", "gpu")
    assert set(told["versions"]) == {"python", "jax"}
    assert told["seconds"] >= 0


def test_a_package_that_is_missing_is_named(provenance):
    with pytest.raises(ModuleNotFoundError, match="no-such-package"):
        provenance.versions("no-such-package")
