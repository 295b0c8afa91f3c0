"""The numerical contract: what layers promise of rounding, tried on fresh draws."""

import importlib.util
import json
import re
import sys
from datetime import date
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "trials/results/contract.json"
DRAWS, POINTS = 3, 16  # compiling takes the time, not these
# a second or two each; `make contract` tries every layer in every dtype
FRESH = {
    "AdditiveCoupling": "bfloat16",
    "AffineCoupling": "float32",
    "AffineCoupling, bounded": "float64",
    "RQSplineCoupling": "float32",
    "MixtureCDFCoupling": "float32",
    "ActNorm": "bfloat16",
    "HouseholderRotation": "float32",
    "PLULinear": "float64",
    "ResidualMap, Banach": "float32",
}


def promised() -> dict:
    """The promises, which are plain data, before anything else is imported."""
    path = ROOT / "trials/contract_promise.py"
    spec = importlib.util.spec_from_file_location("contract_promise", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PROMISE


PROMISES = [(layer, dtype) for layer, row in promised().items() for dtype in row]


@pytest.fixture(scope="module")
def contract():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.syspath_prepend(str(ROOT / "trials"))
        import contract

        yield contract


@pytest.fixture(scope="module")
def page(contract):
    return sys.modules["contract_page"]


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULT.read_text())


@pytest.mark.parametrize(("layer", "dtype"), FRESH.items())
def test_a_layer_keeps_its_promise_on_fresh_draws(contract, layer, dtype):
    options = {"key": jr.key(1000), "draws": DRAWS, "n": POINTS}
    rows = contract.try_layer(layer, dtype, **options)
    assert len(rows) == len(contract.RADII)
    assert not [*contract.broken(rows)]


def test_a_promise_can_be_broken(contract):
    row = {"layer": "ActNorm", "dtype": "float32", "depth": 1, "radius": 1.0}
    good = {"lost": 0.0, "inverse_max": 1e-7, "log_det_max": 1e-7, "factor_max": 1.0}
    assert not [*contract.broken([row | good])]
    for name in ("inverse_max", "log_det_max", "factor_max"):
        for bad in (1e9, None):
            (said,) = contract.broken([row | good | {name: bad}])
            assert said.startswith("expected Promise(")
    assert [*contract.broken([row | {"raised": True}])]
    assert [*contract.broken([row | {"radius": None, "refused": "why"}])]


def test_errors_are_relative_and_lost_points_are_told_apart(contract):
    x = jnp.array([[3.0, -1.0], [0.1, 0.2], [1.0, 1.0]], jnp.float32)
    back = np.array([[3.3, -1.0], [0.1, 0.3], [np.nan, 1.0]])
    exact = np.array([4.0, 0.5, -np.inf])
    eps = float(jnp.finfo(x.dtype).eps)
    log_det, condition = np.array([5.0, 0.6, 1.0]), np.array([2, 4, 2 / eps])
    found = contract.relative(x, back, log_det, exact, condition)
    np.testing.assert_allclose(found.inverse, [0.1, 0.1, np.inf], rtol=1e-6)
    np.testing.assert_allclose(found.log_det, [0.25, 0.1, np.nan], rtol=1e-6)
    factor = [0.1 / (2 * eps), 0.1 / (4 * eps), np.nan]
    np.testing.assert_allclose(found.factor, factor, rtol=1e-6)
    row = contract.summary(found)
    assert row["lost"] == pytest.approx(1 / 3)
    assert row["inverse_max"] is None
    assert row["log_det_max"] == pytest.approx(0.25)


def test_every_layer_and_dtype_has_a_promise_or_refuses(result):
    refused = {(c["layer"], c["dtype"]) for c in result["cells"] if "refused" in c}
    tried = {(c["layer"], c["dtype"]) for c in result["cells"] if c["depth"] == 1}
    flows = {pair for pair in tried if pair[0].startswith("coupling_flow")}
    assert tried - flows == {*PROMISES} | refused
    assert not refused & {*PROMISES}
    assert len(refused) < len(PROMISES) / 4


def test_the_committed_result_keeps_the_promises_and_says_its_origin(contract, result):
    assert not [*contract.broken(result["cells"])]
    assert date.fromisoformat(result["date"]) <= date.today()
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?", result["commit"])
    assert {"jax", "equinox"} <= result["versions"].keys()


def test_the_page_shows_the_result(page, result):
    assert RESULT.read_text() == page.as_json(result)
    assert RESULT.with_suffix(".md").read_text() == page.page(result)
    assert RESULT.with_suffix(".svg").exists()
    text = (ROOT / "book/contract.md").read_text()
    assert "```{include} ../trials/results/contract.md\n" in text
    assert "```{figure} ../trials/results/contract.svg\n" in text
