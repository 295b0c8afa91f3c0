"""The committed results of the benchmarks, and the page that shows them."""

import importlib.util
import json
import re
from datetime import date
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))
PAGE = (ROOT / "book/benchmarks.md").read_text()
LIBRARIES = {
    *("gauss_flows fit", "gauss_flows step", "flowjax Chain", "flowjax Scan"),
    *("zuko", "nflows", "normflows"),
}
REASON = r"(> \d+ s|out of memory)( expected)?"
WAYS = ("step", "density", "sample")

every_result = pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location(
        "render", ROOT / "benchmarks/render.py"
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    return json.loads(path.read_text())


def test_there_are_results_of_a_cpu():
    assert "cpu" in [path.stem for path in RESULTS]


@every_result
def test_a_result_says_where_it_comes_from(path):
    result = read(path)
    assert date.fromisoformat(result["date"]) <= date.today()
    assert re.fullmatch(r"[0-9a-f]{12}", result["commit"])
    assert result["machine"]["kind"] == path.stem.split("-")[0]
    assert {"jax", "flowjax", "torch", *LIBRARIES & result["versions"].keys()} <= {
        *result["versions"]
    }
    assert result["seconds"] > 0


@every_result
def test_every_cell_has_times_or_a_reason(path):
    for cell in read(path)["cells"]:
        only_step = cell["library"] == "gauss_flows step"
        for way in WAYS[:1] if only_step else WAYS:
            if isinstance(cell[way], str):
                assert re.fullmatch(REASON, cell[way]), cell
            else:
                assert cell[way], cell
                assert np.all(np.array(cell[way]) > 0)
        if not isinstance(cell["step"], str):
            assert min(cell["parameters"], cell["peak_bytes"]) > 0


@every_result
def test_nothing_of_the_grid_is_left_out(path):
    cells = read(path)["cells"]
    found = {
        tuple(cell[k] for k in ("library", "depth", "dim", "batch", "dtype"))
        for cell in cells
    }
    assert len(found) == len(cells)
    wanted = {
        (library, depth, dim, batch, dtype)
        for library in LIBRARIES
        for depth in (2, 4, 8, 16, 32, 64)
        for dim in (2, 64)
        for batch in (512, 8192)
        for dtype in ("float32", "float64")
        if depth == 8 or (dim, batch) == (2, 512)
        if library != "gauss_flows step" or (dim, batch) == (2, 512)
    }
    assert found == wanted


@every_result
def test_seeds_go_up_to_32_or_256(path):
    result = read(path)
    most = 32 if result["machine"]["kind"] == "cpu" else 256
    counts = [row["seeds"] for row in result["seeds"]]
    assert counts == [None, *(2**k for k in range(most.bit_length()))]
    assert all(min(row["step"]) > 0 for row in result["seeds"])


@every_result
def test_table_and_numbers_are_what_the_program_writes(render, path):
    result = read(path)
    assert path.with_suffix(".md").read_text() == render.table(result)
    assert path.read_text() == render.as_json(result)
    assert path.with_suffix(".svg").exists()


@every_result
def test_the_page_shows_the_result(path):
    name = path.with_suffix("")
    where = f"../{name.relative_to(ROOT)}"
    assert f"```{{include}} {where}.md\n" in PAGE
    assert f"```{{figure}} {where}.svg\n" in PAGE


def test_the_sentence_names_a_peer_that_wins(render):
    times = {name: 1.0 for name in LIBRARIES} | {"gauss_flows fit": 0.5}
    rows = [
        {"library": name, "step": [t], "density": [t], "sample": [t]}
        for name, t in times.items()
    ]
    assert "No peer is faster" in render.sentence(rows, "float32")
    for row in rows:
        if row["library"] == "zuko":
            row["sample"] = [0.1]
    text = render.sentence(rows, "float32")
    assert "A peer is the fastest at: sampling (zuko)." in text
    assert "`Chain`, stepped from a loop, takes 2.0 times as long" in text
    assert "No peer" not in text
