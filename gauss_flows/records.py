"""Lanes and records: how large a chapter runs, what its full run found, and what ran.

A chapter runs in the lane that the environment variable `GAUSS_FLOWS_LANE` names:
`quick` (the default) or `full`. A full run leaves its result tables as one JSON
file a chapter in the folder that `GAUSS_FLOWS_RECORDS` names, and a quick run draws
them beside its own. Without that variable nothing is written and nothing is found.

A file holds chapter, lane, settings, checksums of the data, tables, seconds, device,
versions, commit and date. Numbers in tables keep ten significant digits. JSON has no
NaN and no infinity: they are stored as the texts "nan", "inf" and "-inf", and `load`
turns them back.

The record of a single training run, which `fit(..., record=file)` writes, says what
must be the same for its numbers to come again: `save_run`.
"""

import json
import math
import os
import platform
import re
import subprocess
import tempfile
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array, PyTree

from . import checkpoint

LANES = ("quick", "full")
PACKAGES = ("jax", "flowjax", "equinox", "optax", "gauss_flows")
_FORM = {
    "chapter": str,
    "lane": str,
    "settings": dict,
    "data": dict,
    "tables": dict,
    "seconds": float,
    "device": str,
    "versions": dict,
    "commit": str,
    "date": str,
}
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def lane() -> str:
    """Return "quick" or "full", as the environment variable GAUSS_FLOWS_LANE says.

    Raises:
        ValueError: the variable holds something else.
    """
    name = os.environ.get("GAUSS_FLOWS_LANE") or "quick"
    if name not in LANES:
        raise ValueError(
            f"expected GAUSS_FLOWS_LANE to be one of {LANES}, got {name!r}"
        )
    return name


def save(
    chapter: str,
    *,
    settings: dict[str, Any],
    data: PyTree[Array | np.ndarray],
    tables: dict[str, Any],
    seconds: float,
) -> Path | None:
    """Write the record of a full run; in the quick lane, or without a folder, nothing.

    Args:
        chapter: file name of the chapter without its ending, "07_depth_sweep".
        settings: what the run used: the chapter's `SETTINGS["full"]`.
        data: arrays on which the run was made, in dictionaries by name; their shapes,
            dtypes and checksums are written.
        tables: results by name: numbers, texts, None, arrays, and lists or
            dictionaries of these.
        seconds: that the experiments took, compilation included.

    Returns:
        Path of the file, or None where nothing is written.

    Raises:
        ValueError: the chapter's name, the data, the tables or the time have another
            form.
    """
    folder = _folder()
    if lane() != "full" or folder is None:
        return None
    record = {
        "chapter": chapter,
        "lane": "full",
        "settings": _plain(settings),
        "data": _described(data),
        "tables": _plain(tables, digits=10),
        "seconds": float(f"{seconds:.4g}"),
        **_where_and_when(folder, "gauss_flows", "_style.py", f"book/{chapter}.md"),
    }
    path = _path(folder, chapter)
    _check(_restore(record), path)
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, _text(record))
    return path


def save_run(
    path: str | os.PathLike,
    *,
    settings: dict[str, Any],
    key: Array,
    data: PyTree[Array | np.ndarray],
    flows: dict[str, Any],
    result: dict[str, Any],
) -> None:
    """Write the record of one training run, as JSON, whole or not at all.

    Beside what is given it holds device, versions, date, and the commit of the folder
    in which the program runs ("+changes" where something there is not committed). Two
    runs with equal settings, key, checksums, versions and device should have found the
    same: equal fingerprints of their flows.

    Args:
        path: The file; what was there is replaced.
        settings: What the run used, numbers and texts by name.
        key: The random key with which it began, or one a seed.
        data: Arrays by name, as for `save`.
        flows: Pytrees by name; fingerprints of their arrays are written.
        result: What came out, numbers, texts and arrays by name.

    Raises:
        OSError: The file cannot be written.
    """
    record = {
        "settings": _plain(settings),
        "key": {"impl": str(jr.key_impl(key)), "data": jr.key_data(key).tolist()},
        "data": _described(data),
        "flows": {name: checkpoint.fingerprint(flow) for name, flow in flows.items()},
        "result": _plain(result),
        **_where_and_when(Path.cwd(), "."),
    }
    _write(Path(path), json.dumps(record, indent=1, allow_nan=False) + "\n")


def load(chapter: str) -> dict[str, Any] | None:
    """Return the record of a chapter's full run, or None where there is none.

    Raises:
        ValueError: there is a file, but it does not have the form of a record.
    """
    folder = _folder()
    if folder is None or not (path := _path(folder, chapter)).exists():
        return None
    return read(path)


def read(path: Path) -> dict[str, Any]:
    """Return the record in the file `path`.

    Raises:
        ValueError: the file does not have the form of a record.
    """
    try:
        record = json.loads(path.read_text("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a record in {path.name}, got {error}") from error
    record = _restore(record)
    _check(record, path)
    return record


def describe(record: dict[str, Any]) -> str:
    """Return one line on where a record comes from.

    Example: "full lane, 8 seeds, CPU (2 cores), 2026-11-22".
    """
    seeds = record["settings"].get("seeds")
    parts = [f"{record['lane']} lane", record["device"], record["date"]]
    return ", ".join(
        parts if seeds is None else [parts[0], f"{seeds} seeds", *parts[1:]]
    )


def _described(data: PyTree[Array | np.ndarray]) -> dict[str, Any]:
    """Shape, dtype and checksum of each array; "a/b" names what lies within."""
    found = {}
    for path, array in tree_leaves_with_path(data):
        name = keystr(path, simple=True, separator="/")
        if not isinstance(array, Array | np.ndarray):
            raise ValueError(f"expected data of arrays, got {array!r} at {name!r}")
        found[name] = {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "checksum": checkpoint.fingerprint(array),
        }
    return found


def _where_and_when(folder: Path, *ran: str) -> dict[str, Any]:
    """Device, versions, date, and the commit of what ran."""
    return {
        "device": _device(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "commit": _commit(folder, *ran),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _write(path: Path, text: str) -> None:
    """Write a file: a reader of its folder sees the old or the new, never a half."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _folder() -> Path | None:
    name = os.environ.get("GAUSS_FLOWS_RECORDS")
    return Path(name) if name else None


def _path(folder: Path, chapter: str) -> Path:
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", chapter):
        raise ValueError(
            f"expected a chapter such as '07_depth_sweep', got {chapter!r}"
        )
    return folder / f"{chapter}.json"


def _plain(value: Any, digits: int | None = None) -> Any:
    """Turn arrays and tuples into lists, and numbers into what JSON can hold."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, digits) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        short = value if digits is None else float(f"{value:.{digits}g}")
        return short if math.isfinite(short) else value  # the largest would round up
    if value is None or (
        isinstance(value, bool | int | str) and value not in _NOT_FINITE
    ):
        return value
    raise ValueError(f"expected numbers, texts, lists and dictionaries, got {value!r}")


def _restore(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restore(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _text(record: dict[str, Any]) -> str:
    """One line an array and a table, so that a change can be read in a diff."""
    lines = []
    for key, value in record.items():
        if key in ("data", "tables"):
            rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            lines.append(f'"{key}": {{\n' + ",\n".join(rows) + "\n}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _no_constant(name: str) -> None:
    raise ValueError(f"the constant {name}")


def _check(record: Any, path: Path) -> None:
    wrong = None
    if not isinstance(record, dict) or set(record) != set(_FORM):
        got = sorted(record) if isinstance(record, dict) else type(record).__name__
        wrong = f"the keys {sorted(_FORM)}, got {got}"
    else:
        for key, kind in _FORM.items():
            if not isinstance(record[key], kind):
                wrong = f"{key} as {kind.__name__}, got {record[key]!r}"
        wrong = wrong or _check_values(record, path)
    if wrong:
        raise ValueError(f"expected in the record {path.name} {wrong}")


def _check_values(record: dict[str, Any], path: Path) -> str | None:
    if record["chapter"] != path.stem:
        return f"the chapter {path.stem!r}, got {record['chapter']!r}"
    if record["lane"] != "full":
        return f"the lane 'full', got {record['lane']!r}"
    if not (math.isfinite(record["seconds"]) and record["seconds"] > 0):
        return f"seconds above 0, got {record['seconds']}"
    if set(record["versions"]) != {"python", *PACKAGES}:
        return f"versions of python and {PACKAGES}, got {sorted(record['versions'])}"
    for part in ("settings", "data", "tables"):
        if not record[part]:
            return f"something under {part!r}, got nothing"
    try:
        date.fromisoformat(record["date"])
    except ValueError:
        return f"a date such as '2026-11-22', got {record['date']!r}"
    return None


def _device() -> str:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"CPU ({os.cpu_count()} cores)"
    return f"{jax.device_count()} x {device.device_kind}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit(folder: Path, *ran: str) -> str:
    """Commit of the code that ran; "+changes" where what ran was not committed."""
    where = folder if folder.exists() else folder.parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(where), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )

    try:
        top = git("rev-parse", "--show-toplevel").stdout.strip()
        commit = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        changed = git("-C", top, "status", "--porcelain", "--", *ran).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changed else commit
