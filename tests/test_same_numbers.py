"""The same numbers again, within what the page on trust promises."""

import json
import sys
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "trials/results/same_numbers.json"
CPU, DEFAULT = jax.devices("cpu")[0], jax.devices()[0]


@pytest.fixture(scope="module")
def same():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.syspath_prepend(str(ROOT / "trials"))
        import same_numbers

        yield same_numbers
    sys.modules.pop("same_numbers")


def early(same, start, dtype, device=CPU, *, reference):
    """The largest distance of the first losses from those of another training."""
    result = same.trained(start, dtype, device, steps=same.EARLY)
    return same.apart(reference, result, dtype).max()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("affine", "float64"), ("spline", "float32")]
)
def test_early_losses_bear_a_rounding_error_and_another_device(same, x64, kind, dtype):
    flow = same.untrained(kind, dtype)
    reference = same.trained(flow, dtype, CPU, steps=same.EARLY)
    start = same.moved(flow, jr.key(99), np.finfo(dtype).eps)
    assert 0 < early(same, start, dtype, reference=reference) < same.LIMIT
    assert early(same, flow, dtype, DEFAULT, reference=reference) < same.LIMIT
    assert early(same, flow, dtype, reference=reference) == 0
    start = same.moved(flow, jr.key(99), 1e4 * np.finfo(dtype).eps)
    assert early(same, start, dtype, reference=reference) > same.LIMIT


def test_the_committed_result_keeps_the_promise(same):
    result = json.loads(RESULT.read_text())
    assert result["same_bits"] == result["flows"] == len(same.FLOWS)
    assert result["processes"] == 2
    assert (result["limit"], result["early_steps"]) == (same.LIMIT, same.EARLY)
    told = [(row["flow"], row["dtype"]) for row in result["rows"]]
    assert {*told} == {*same.FLOWS}
    assert all(row["early"] < same.LIMIT for row in result["rows"])
    text = " ".join((ROOT / "book/trust.md").read_text().split())
    assert "first ten steps of training agree to within 100 units of ε" in text
    assert same.EARLY == 10
