"""Flows beyond couplings at equal size: what judges them, and the committed result.

Training itself is not repeated here; the workers run in environments of their own.
"""

import json
import math
from datetime import date
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/beyond/cpu.json"

committed = pytest.mark.skipif(not RESULT.exists(), reason="no result is committed")


@pytest.fixture(scope="module")
def beyond():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import beyond

        yield beyond


@pytest.fixture(scope="module")
def task(beyond):
    import beyond_task

    return beyond_task


@pytest.fixture(scope="module")
def worker(beyond):
    import beyond_jax

    return beyond_jax


def test_a_linear_map_is_judged_as_the_normal_law_that_it_makes(task):
    from scipy.stats import multivariate_normal

    rng = np.random.default_rng(0)
    matrix, x = rng.normal(size=(3, 3)), rng.normal(size=(50, 3))
    found = task.judged(x @ matrix.T, np.broadcast_to(matrix, (50, 3, 3)))
    law = multivariate_normal(np.zeros(3), np.linalg.inv(matrix.T @ matrix))
    assert found["log_p"] == pytest.approx(law.logpdf(x).mean(), rel=1e-9)
    assert found["condition"] == pytest.approx([np.linalg.cond(matrix)] * 2)


def test_the_error_is_the_distance_that_few_samples_exceed(task):
    z = np.zeros((100, 2))
    back = np.zeros((100, 2))
    back[:4] = 5.0
    assert task.round_trip(z, back) == 0
    back[4:10] = [0.3, 0.4]
    assert task.round_trip(z, back) == pytest.approx(0.5)


def test_rows_are_standardised_by_those_to_train_on(beyond, task):
    data = beyond.make_data(20)
    assert data.rates.max() == pytest.approx(task.PEAK)
    assert len(data.rates) == 20
    for name, dim in task.TARGETS.items():
        x, held_out = data.train[name], data.held_out[name]
        assert x.shape == (task.ROWS, dim)
        assert held_out.shape == (task.HELD_OUT, dim)
        np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(x.std(0), 1, atol=1e-5)
        assert not {row.tobytes() for row in x} & {row.tobytes() for row in held_out}


def test_data_come_back_from_their_file(beyond, task, tmp_path, monkeypatch):
    data, path = beyond.make_data(20), tmp_path / "data.npz"
    task.save(data, path)
    job = task.Job("gauss_flows", "affine", 20)
    monkeypatch.setattr("sys.argv", ["", json.dumps(job._asdict()), str(path)])
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None, raising=False)
    read_job, read = task.read_command()
    assert read_job == job
    for name in task.TARGETS:
        np.testing.assert_array_equal(read.train[name], data.train[name])
        np.testing.assert_array_equal(read.held_out[name], data.held_out[name])
    np.testing.assert_array_equal(read.rates, data.rates)


def test_flows_of_one_dimension_have_nearly_as_many_parameters(beyond, task, worker):
    models = {
        model for library, model in beyond.JOBS.values() if library == beyond.OURS
    }
    for dim in set(task.TARGETS.values()):
        sizes = [parameters(worker.builder(model, dim)) for model in models]
        assert max(sizes) < 1.1 * min(sizes), (dim, sizes)


def parameters(build) -> int:
    shapes = eqx.filter_eval_shape(build, jr.key(0))
    leaves = [a for a in jax.tree.leaves(shapes) if hasattr(a, "dtype")]
    floats = [a for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum(math.prod(a.shape) for a in floats)


def test_a_worker_answers_what_the_table_shows(beyond, task, worker, monkeypatch):
    monkeypatch.setattr(task, "CHUNK", 0.01)
    monkeypatch.setattr(worker, "EVERY", 2)
    data = beyond.make_data(4)
    train = worker.trainer(task.Job("gauss_flows", "affine", 4), data)
    answer = train("two_moons", 0)
    assert json.loads(json.dumps(answer)) == answer
    assert answer["failed_step"] is None
    assert -4 < answer["log_p"] < -2  # a normal law has about -2.8
    low, high = answer["condition"]
    assert 1 <= low <= high < 10
    assert answer["error"] < 1e-5
    assert min(answer["step"], answer["sample"]) > 0


@pytest.fixture
def result(beyond, task):
    row = {
        "parameters": 2000, "log_p": [1.0, 3.0, 2.0], "condition": [[2.0, 9.0]] * 3,
        "step": [1e-3] * 3, "sample": [1e-6] * 3, "error": [1e-6] * 3,
        "failed_step": [None] * 3,
    }  # fmt: skip
    rows = [
        {"target": target, "flow": flow, **row}
        for target in task.TARGETS
        for flow in beyond.JOBS
    ]
    return {
        "machine": {"processor": "one", "cores": 2}, "versions": {"jax": "1"},
        "date": "2026-01-01", "commit": "abc", "load": [0.5, 1.0], "steps": 400,
        "seeds": 3, "rows": rows,
    }  # fmt: skip


def test_the_table_tells_ratios_and_spread(beyond, result):
    result["rows"][1] |= {"step": [2e-3, 5e-3, 4e-3]}
    line = beyond.table(result).splitlines()[3]
    assert line == (
        "| two moons, 2 | spline coupling | 2,000 | 2.00 (1.00 to 3.00) | 4 | 1 | "
        "2; 9 | 1e−06 |"
    )


def test_the_table_tells_of_a_busy_machine_and_of_runs_that_stopped(beyond, result):
    assert "busy" not in beyond.table(result)
    assert "stopped" not in beyond.table(result)
    result["load"] = [0.5, 9.0]
    result["rows"][2]["failed_step"] = [None, 17, None]
    text = beyond.table(result)
    assert "the machine was busy" in text
    assert "| continuous, 1 stopped |" in text


@committed
def test_the_result_is_whole(beyond, task):
    result = json.loads(RESULT.read_text())
    assert date.fromisoformat(result["date"]) <= date.today()
    assert "+changes" not in result["commit"]
    assert {"jax", "torch", "normflows", "gauss-flows"} <= result["versions"].keys()
    assert RESULT.with_suffix(".md").read_text() == beyond.table(result)
    rows = {(row["target"], row["flow"]): row for row in result["rows"]}
    assert set(rows) == {(t, f) for t in task.TARGETS for f in beyond.JOBS}
    for (target, _), row in rows.items():
        assert len(row["log_p"]) >= 3
        assert np.isfinite(row["log_p"]).all()
        assert min(row["step"] + row["sample"]) > 0
        base = rows[target, beyond.BASE]
        assert row["parameters"] == pytest.approx(base["parameters"], rel=0.1)


@committed
def test_the_page_shows_the_result():
    page = (ROOT / "book/benchmarks.md").read_text()
    assert "```{include} ../benchmarks/results/beyond/cpu.md\n" in page
