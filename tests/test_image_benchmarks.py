"""The digits beside normflows: the baselines, and the committed result if there is one.

Training itself is not repeated here; the workers run in environments of their own.
"""

import json
import math
from datetime import date
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/images/cpu.json"


@pytest.fixture(scope="module")
def images():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import images

        yield images


@pytest.fixture(scope="module")
def data(images):
    return images.make_data(10)


def test_the_three_parts_are_disjoint_and_all_of_the_digits(images, data):
    held_out = np.floor(17 * data.held_out[:: images.DRAWS]).astype(np.uint8)
    parts = [data.train, data.validation, held_out]
    assert [len(part) for part in parts] == [1151, 287, 359]
    assert len({x.tobytes() for part in parts for x in part}) == 1797
    assert data.rates.shape == (10,)
    assert data.rates.max() == pytest.approx(images.PEAK)


def test_the_factorised_law_by_hand(images):
    train = np.zeros((3, 8, 8, 1), np.uint8)
    train[0] = 16
    x = np.zeros((1, 8, 8, 1), np.uint8)
    # 2 of 3 zeros, with 1 added to each of 17 counts
    assert images.factorised(train, x, 1.0) == pytest.approx(-math.log2(3 / 20))
    assert images.factorised(train, x + 5, 1.0) == pytest.approx(-math.log2(1 / 20))


def test_the_gaussian_is_that_of_scipy(images, data):
    from scipy.stats import multivariate_normal

    x = np.random.default_rng(0).random((5, 8, 8, 1))
    grey = data.train.reshape(-1, 64)
    covariance = np.cov(grey, rowvar=False) / 289 + np.eye(64) * (1 / 12 / 289 + 1e-3)
    law = multivariate_normal((grey.mean(0) + 0.5) / 17, covariance)
    log_p = law.logpdf(x.reshape(-1, 64)).mean()
    wanted = math.log2(17) - log_p / (64 * math.log(2))
    assert images.gaussian(data.train, x, 1e-3) == pytest.approx(wanted, rel=1e-9)


def test_baselines_choose_within_their_ranges_and_beat_the_uniform_law(images, data):
    uniform, factorised, gaussian = images.baselines(data)
    assert uniform["bits"] == [pytest.approx(math.log2(17))]
    assert images.COUNTS[0] < factorised["chosen"] < images.COUNTS[-1]
    assert images.RIDGES[0] < gaussian["chosen"] < images.RIDGES[-1]
    for row in (factorised, gaussian):
        assert row["bits"][0] < uniform["bits"][0]


@pytest.mark.skipif(not RESULT.exists(), reason="no result is committed")
def test_the_result_is_whole(images):
    result = json.loads(RESULT.read_text())
    assert date.fromisoformat(result["date"]) <= date.today()
    assert {"jax", "torch", "normflows", "gauss-flows"} <= result["versions"].keys()
    assert RESULT.with_suffix(".md").read_text() == images.table(result)
    trained = {(r["model"], r["library"]): r for r in result["rows"] if "library" in r}
    assert set(trained) == {(m, n) for m in images.MODELS for n in images.LIBRARIES}
    for row in trained.values():
        assert len(row["bits"]) >= 3
        assert np.isfinite(row["bits"]).all()
        ours = trained[row["model"], images.LIBRARIES[0]]
        assert row["parameters"] == pytest.approx(ours["parameters"], rel=0.05)
