"""The same numbers again, within what the page on trust promises."""

import json
import sys
from pathlib import Path

import jax.random as jr
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "trials/results/same_numbers.json"


@pytest.fixture(scope="module")
def same():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.syspath_prepend(str(ROOT / "trials"))
        import same_numbers

        yield same_numbers
    sys.modules.pop("same_numbers")


def early(same, dtype, start, device=None):
    """Losses of the first steps, on the CPU if no device is named."""
    device = same.CPU if device is None else device
    return same.trained(start, dtype, device, steps=same.EARLY).train_loss


@pytest.mark.parametrize(
    ("kind", "dtype"), [("affine", "float64"), ("spline", "float32")]
)
def test_early_losses_bear_a_rounding_error_and_another_device(same, x64, kind, dtype):
    flow = same.untrained(kind, dtype)
    plain, eps = early(same, dtype, flow), np.finfo(dtype).eps
    nearby, far = (
        early(same, dtype, same.moved(flow, jr.key(99), size))
        for size in (eps, 1e4 * eps)
    )
    assert 0 < same.apart(plain, nearby, dtype).max() < same.LIMIT
    assert same.LIMIT < same.apart(plain, far, dtype).max()
    elsewhere = early(same, dtype, flow, same.DEFAULT)
    assert same.apart(plain, elsewhere, dtype).max() < same.LIMIT
    np.testing.assert_array_equal(plain, early(same, dtype, flow))


def test_the_committed_result_keeps_the_promise(same):
    result = json.loads(RESULT.read_text())
    assert result["same_bits"] == result["flows"] == len(same.FLOWS)
    assert result["processes"] == 2
    assert (result["limit"], result["early_steps"]) == (same.LIMIT, same.EARLY)
    told = {(row["flow"], row["dtype"], row["other"]) for row in result["rows"]}
    assert len(told) == len(result["rows"]) >= 2 * len(same.FLOWS)
    assert all(row["early"] < same.LIMIT for row in result["rows"])
    text = " ".join((ROOT / "book/trust.md").read_text().split())
    assert "first ten steps of training agree to within 100 units of ε" in text
    assert same.EARLY == 10
