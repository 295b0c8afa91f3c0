import ast
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest

import gauss_flows as gf
from gauss_flows import records

ROOT = Path(__file__).resolve().parents[1]
CHAPTER = "07_depth_sweep"
SETTINGS = {"seeds": 8, "depths": [1, 2]}
COMMITTED = sorted((ROOT / "book" / "records").glob("*"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GAUSS_FLOWS_LANE", "full")
    monkeypatch.setenv("GAUSS_FLOWS_RECORDS", str(tmp_path / "records"))
    return tmp_path / "records"


def save(**changes) -> Any:
    given = {
        "settings": SETTINGS,
        "data": {"x": np.arange(6.0).reshape(3, 2)},
        "tables": {"a": [1.0]},
        "seconds": 12.5,
        **changes,
    }
    return records.save(given.pop("chapter", CHAPTER), **given)


def load() -> Any:
    return records.load(CHAPTER)


def settings_of(chapter):
    """The literal SETTINGS of a chapter's settings cell."""
    text = (ROOT / "book" / f"{chapter}.md").read_text("utf-8")
    cells = re.findall(r"```\{code-cell\}[^\n]*\n(.*?)^```", text, re.S | re.M)
    (cell,) = (c for c in cells if re.search(r"^SETTINGS = ", c, re.M))
    code = re.sub(r"\A(---\n.*?^---\n|(:[^\n]*\n)*)", "", cell, flags=re.S | re.M)
    (value,) = (
        statement.value
        for statement in ast.parse(code).body
        if isinstance(statement, ast.Assign)
        and ast.unparse(statement.targets[0]) == "SETTINGS"
    )
    return ast.literal_eval(value)


@pytest.mark.parametrize(
    ("value", "lane"),
    [(None, "quick"), ("", "quick"), ("quick", "quick"), ("full",) * 2],
)
def test_lane(monkeypatch, value, lane):
    monkeypatch.delenv("GAUSS_FLOWS_LANE", raising=False)
    if value is not None:
        monkeypatch.setenv("GAUSS_FLOWS_LANE", value)
    assert records.lane() == lane


def test_lane_refuses_another_name(monkeypatch):
    monkeypatch.setenv("GAUSS_FLOWS_LANE", "fast")
    with pytest.raises(ValueError, match=r"one of \('quick', 'full'\), got 'fast'"):
        records.lane()


def test_round_trip(folder):
    tables = {
        "array": jnp.array([[1.0, 0.1], [jnp.nan, -jnp.inf]]),
        "numpy": np.float64(1 / 3),
        "rows": [{"name": "affine", "ok": True, "none": None, "n": 3}, (1, math.inf)],
    }
    path = save(tables=tables)
    assert path == folder / f"{CHAPTER}.json"
    assert [p.name for p in folder.iterdir()] == [path.name]
    record = load()
    np.testing.assert_allclose(
        record["tables"]["array"], [[1.0, 0.1], [np.nan, -np.inf]], rtol=1e-6
    )
    assert record["tables"]["numpy"] == 0.3333333333
    assert record["tables"]["rows"][0] == tables["rows"][0]
    assert record["tables"]["rows"][1] == [1, math.inf]
    assert record["settings"] == SETTINGS
    assert record["seconds"] == 12.5
    json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)


def test_a_record_tells_the_data_by_their_checksums(folder):
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    save(data={"plane": (x, x[:1]), "line": {"train": jnp.ones(4, int)}})
    told = load()["data"]
    assert list(told) == ["line/train", "plane/0", "plane/1"]
    assert told["line/train"]["shape"] == [4]
    assert told["plane/0"]["shape"] == [3, 2]
    assert told["plane/0"]["dtype"] == "float32"
    save(data={"plane": (jnp.asarray(x), x[:1] + 1e-7)})
    again = load()["data"]
    assert again["plane/0"] == told["plane/0"]
    assert again["plane/1"]["checksum"] != told["plane/1"]["checksum"]


def test_data_that_are_no_arrays_are_refused(folder, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"data of arrays, got 0\.1 at 'plane/1'"):
        save(data={"plane": (np.ones(2), 0.1)})


def test_saving_again_replaces(folder):
    save(tables={"a": 1})
    save(tables={"b": 2})
    assert load()["tables"] == {"b": 2}


def test_describe(folder):
    save()
    record = {**load(), "device": "CPU (2 cores)", "date": "2026-11-22"}
    assert records.describe(record) == "full lane, 8 seeds, CPU (2 cores), 2026-11-22"
    record["settings"] = {"steps": 3}
    assert records.describe(record) == "full lane, CPU (2 cores), 2026-11-22"


def test_nothing_is_written_in_the_quick_lane(folder, monkeypatch):
    monkeypatch.setenv("GAUSS_FLOWS_LANE", "quick")
    assert save() is None
    assert not folder.exists()
    assert load() is None


def test_nothing_is_written_or_found_without_a_folder(monkeypatch):
    monkeypatch.setenv("GAUSS_FLOWS_LANE", "full")
    monkeypatch.delenv("GAUSS_FLOWS_RECORDS", raising=False)
    assert save() is None
    assert load() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"chapter": "depth"},
        {"chapter": "../07_depth"},
        {"tables": {}},
        {"settings": {}},
        {"data": {}},
        {"tables": {"a": object()}},
        {"tables": {"a": "nan"}},
        {"seconds": 0.0},
        {"seconds": math.nan},
    ],
)
def test_save_refuses_and_leaves_the_old_record(folder, changes):
    save()
    before = (folder / f"{CHAPTER}.json").read_bytes()
    with pytest.raises(ValueError, match="expected"):
        save(**changes)
    assert [p.read_bytes() for p in folder.iterdir()] == [before]


def test_a_write_that_fails_leaves_the_old_record(folder, monkeypatch):
    save()
    before = (folder / f"{CHAPTER}.json").read_bytes()

    def broken(source, target):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk"):
        save(tables={"b": 2})
    assert [p.read_bytes() for p in folder.iterdir()] == [before]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("commit"),
        lambda record: record.update(extra=1),
        lambda record: record.update(chapter="08_gradient_norms"),
        lambda record: record.update(lane="quick"),
        lambda record: record.update(seconds="long"),
        lambda record: record.update(seconds=-1.0),
        lambda record: record.update(date="today"),
        lambda record: record.update(versions={"jax": "0"}),
        lambda record: record.update(tables=[]),
        lambda record: record.pop("data"),
        lambda record: record.update(data={}),
    ],
)
def test_load_refuses_another_form(folder, change):
    path = save()
    record = json.loads(path.read_text("utf-8"))
    change(record)
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(ValueError, match=r"expected .*07_depth_sweep\.json"):
        load()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": NaN}'])
def test_load_refuses_a_broken_file(folder, text):
    folder.mkdir()
    (folder / f"{CHAPTER}.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"expected .*07_depth_sweep\.json"):
        load()


def test_the_commit_says_whether_what_ran_was_committed(folder):
    folder.mkdir()
    commit = records._commit(ROOT / "book", CHAPTER)
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", commit)
    assert records._commit(folder, CHAPTER) == "unknown"


@pytest.mark.parametrize("header", ["", ":tags: [a]\n:x:\n", "---\ntags: [a]\n---\n"])
def test_the_settings_of_a_chapter_are_found(tmp_path, monkeypatch, header):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "book").mkdir()
    cell = 'import x\nSETTINGS = {\n    "full": {"seeds": 8}}\nsettings = SETTINGS["a"]'
    text = f"# T\n\n```{{code-cell}} ipython3\n{header}\n{cell}\n```\n"
    (tmp_path / "book" / f"{CHAPTER}.md").write_text(text, "utf-8")
    assert settings_of(CHAPTER) == {"full": {"seeds": 8}}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_every_record_of_the_book_has_the_form_and_the_settings(path):
    assert path.suffix == ".json"
    record = records.read(path)
    wanted = json.loads(json.dumps(settings_of(path.stem)["full"]))  # keys as text
    assert record["settings"] == wanted
    assert "unknown" not in record["commit"]
    assert record["date"] >= "2026-11-22"


def run_record(file, key=2, **options):
    """What ``fit`` writes of a small run."""
    x = np.linspace(-1, 1, 40, dtype=np.float32).reshape(20, 2)
    layer = eqx.nn.Linear(2, 2, key=jr.key(1))

    def loss(layer, batch, key):
        return ((jax.vmap(layer)(batch) - batch) ** 2).mean()

    options = {"steps": 4, "batch_size": 8, "progress": False, "loss": loss} | options
    gf.fit(jr.key(key), layer, x, record=file, **options)
    return json.loads(file.read_text("utf-8"))


def test_a_run_tells_what_must_be_the_same_for_its_numbers_to_come_again(tmp_path):
    one = run_record(tmp_path / "run.json")
    assert list(one) == [
        "settings", "key", "data", "flows", "result", "device", "versions", "commit",
        "date",
    ]  # fmt: skip
    assert one["settings"]["steps"] == 4
    assert one["settings"]["optimizer"] == "adam"
    assert one["key"] == {"impl": "threefry2x32", "data": [0, 2]}
    assert one["data"]["x"]["shape"] == [20, 2]
    assert math.isfinite(one["result"]["last_train_loss"])
    again = run_record(tmp_path / "again.json")
    assert again["data"] == one["data"]
    assert again["flows"] == one["flows"]
    other = run_record(tmp_path / "other.json", key=3)
    assert other["flows"]["start"] == one["flows"]["start"]
    assert other["flows"]["flow"] != one["flows"]["flow"]


def test_a_run_tells_of_its_rates_and_of_held_out_rows(tmp_path):
    plain = run_record(tmp_path / "plain.json", clip=None, learning_rate=0.5)
    assert plain["settings"]["clip"] is None
    assert plain["settings"]["learning_rate"] == 0.5
    assert list(plain["data"]) == ["x"]
    assert "lowest_val_loss" not in plain["result"]
    x_val = np.ones((3, 2), np.float32)
    judged = run_record(tmp_path / "run.json", clip=2.0, x_val=x_val, eval_every=2)
    assert judged["settings"]["clip"] == 2.0
    assert judged["data"]["x_val"]["shape"] == [3, 2]
    assert math.isfinite(judged["result"]["lowest_val_loss"])


def test_the_record_of_a_run_that_failed_is_written(tmp_path):
    def loss(layer, batch, key):
        return layer.weight.sum() * jnp.nan

    one = run_record(tmp_path / "run.json", loss=loss, throw=False)
    assert one["result"]["failed_step"] == 0
    assert one["result"]["last_train_loss"] == "nan"
    assert one["settings"]["loss"].endswith("loss")


def test_a_record_that_cannot_be_written_is_told_before_training(tmp_path):
    with pytest.raises(OSError, match="expected a folder to write"):
        run_record(tmp_path / "missing" / "run.json")
