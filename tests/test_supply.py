"""What we take over from others: the lock's hashes, licences, and other versions."""

import json
import re
import subprocess
import sys
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import audit
import bootstrap
import lock
import pytest
import try_versions as versions
from conftest import build_wheel

ROOT = Path(audit.ROOT)


def pins(text: str) -> list[str]:
    """The pins of a lock, without hashes and notes."""
    lines = (re.sub(r" \\$", "", line) for line in text.splitlines())
    return sorted(line for line in lines if re.match(r"[^#\s]", line))


def test_each_file_of_the_lock_has_its_hashes():
    for path in bootstrap.LOCKS:
        entries = lock.entries(path.read_text())
        assert entries
        for entry in entries:
            assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry


def test_the_lock_with_hashes_pins_what_the_constraints_pin():
    base, gpu = (pins(path.read_text()) for path in bootstrap.LOCKS)
    assert sorted(base + gpu) == pins((ROOT / "constraints.txt").read_text())
    assert gpu
    assert all(re.match("nvidia|jax-cuda", pin) for pin in gpu)


def test_without_verification_the_pins_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    path = bootstrap.LOCKS[0]
    text = bootstrap.unverified(path).read_text()
    assert "--hash" not in text
    assert "\\" not in text
    assert pins(text) == pins(path.read_text())


@pytest.mark.parametrize("verify", [True, False])
def test_set_up_asks_pip_to_verify(tmp_path, monkeypatch, verify):
    asked = []

    def run(command, **_: Any):
        asked.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    bootstrap.install("gpu", verify=verify)
    packages, tree, _ = asked
    assert ("--require-hashes" in packages) is verify
    assert packages.count("-r") == 2
    assert tree[-4:] == ["--no-deps", "--no-build-isolation", "-e", "."]


def test_a_failed_set_up_says_what_to_do(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="make setup VERIFY=no"):
        bootstrap.install("", verify=True)


def test_a_file_with_another_hash_is_not_installed(tmp_path):
    build_wheel(tmp_path)
    false = tmp_path / "false.lock"
    false.write_text(f"gauss-flows==0.1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    pip = [sys.executable, "-m", "pip", "install", "--require-hashes", "--no-deps"]
    pip += ["--no-index", "--find-links", tmp_path, "--target", tmp_path / "there"]
    done = subprocess.run([*pip, "-r", false], capture_output=True, text=True)
    assert done.returncode
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_every_licence_is_on_the_list():
    lines, others = audit.licences()
    assert len(lines) > 50
    assert not others


@pytest.mark.parametrize(
    ("fields", "text", "fine"),
    [
        ({"License-Expression": "MIT"}, "MIT", True),
        ({"License-Expression": "GPL-3.0 OR MIT"}, "GPL-3.0 OR MIT", True),
        ({"License-Expression": "GPL-3.0 AND MIT"}, "GPL-3.0 AND MIT", False),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, "MIT License", True),
        ({"License": "Proprietary\nand more"}, "Proprietary", False),
        ({}, "unknown", False),
    ],
)
def test_a_licence_that_is_not_on_the_list_is_named(monkeypatch, fields, text, fine):
    about = Message()
    for name, value in {"Name": "other", **fields}.items():
        about[name] = value
    package: Any = SimpleNamespace(metadata=about, version="1")
    monkeypatch.setattr(audit, "distributions", lambda: [package])
    lines, others = audit.licences()
    assert lines == [f"other 1: {text}"]
    assert others == ([] if fine else lines)


def test_flaws_and_silence_are_findings():
    sound = {"name": "a", "version": "1", "vulns": []}
    flaw = {"id": "X-1", "fix_versions": ["2"]}
    flawed = {"name": "b", "version": "1", "vulns": [flaw]}
    silent = {"name": "c", "skip_reason": "not found"}
    assert audit.flaws(json.dumps({"dependencies": [sound]})) == []
    (named,) = audit.flaws(json.dumps({"dependencies": [sound, flawed]}))
    assert named == "b 1: X-1, mended in 2"
    (unasked,) = audit.flaws(json.dumps({"dependencies": [sound, silent]}))
    assert unasked.startswith("1 of 2 packages were not audited")


def test_the_packages_tests_are_those_that_need_no_book():
    chosen = versions.package_tests()
    assert {"tests/test_masks.py", "tests/test_train.py"} <= set(chosen)
    assert not {"tests/test_book.py", "tests/test_supply.py"} & set(chosen)


def test_the_oldest_versions_want_the_oldest_python(monkeypatch):
    monkeypatch.setattr(versions.sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(versions.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"expected python3\.11, got 3\."):
        versions.python_for("oldest")
    assert versions.python_for("newest") == sys.executable
