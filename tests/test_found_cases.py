"""Cases that random ones found, each as it was: see trials/results/bugs_fuzz.json.

Those of files are in test_untrusted_files.py.
"""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import enable_x64

import gauss_flows as gf
from gauss_flows import records

KEY = jr.key(0)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_spline_passes_on_nan_and_its_slope_too(direction):
    spline = gf.transformers.RQSpline(2)
    theta = spline.split(jnp.zeros((spline.n_parameters, 1)))
    for value in getattr(spline, direction)(jnp.array([jnp.nan]), *theta):
        assert jnp.isnan(value).all()
    for value in getattr(spline, direction)(
        jnp.array([0.5]), theta[0] + jnp.nan, *theta[1:]
    ):
        assert jnp.isnan(value).all()


@pytest.mark.parametrize("which", range(3))
def test_a_mixture_of_nan_has_no_inverse(which):
    mixture = gf.transformers.MixtureCDF(2)
    theta = mixture.split(jnp.ones((6, 1)))
    theta[which] = theta[which].at[0].set(jnp.nan)
    for value in mixture.inverse(jnp.array([0.3]), *theta):
        assert jnp.isnan(value).all()


@pytest.mark.parametrize("raw", [-19.0, -20.0, -20.6, -21.0, -25.0, -40.0, -700.0])
def test_an_affine_log_scale_is_exact_where_the_scale_is_tiny(raw, x64):
    scale, log_scale = gf.transformers.Affine().scale(jnp.array(raw))
    inside = raw + math.log(math.expm1(1.0))
    exact = math.log(math.log1p(math.exp(inside)))
    np.testing.assert_allclose(log_scale, exact, rtol=4e-16)
    np.testing.assert_allclose(jnp.log(scale), exact, rtol=1e-15)


@pytest.mark.parametrize(("dtype", "raw"), [("float32", 30.0), ("float64", 300.0)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_affine_gradients_are_finite_as_far_as_is_stated(dtype, raw, sign):
    affine = gf.transformers.Affine()

    def total(x, shift, r):
        ways = affine.forward(x, shift, r), affine.inverse(x, shift, r)
        return sum(number.sum() for way in ways for number in way)

    with enable_x64(dtype == "float64"):
        numbers = [jnp.array([a], dtype) for a in (1e6, 1.0, sign * raw)]
        for slope in jax.grad(total, (0, 1, 2))(*numbers):
            assert jnp.isfinite(slope).all()


def test_a_spline_too_wide_for_its_dtype_is_undone_all_the_same():
    spline = gf.transformers.RQSpline(4, 1000.0)
    widths = [-86.8, 1148.6, 247.7, 838.2, 710.9]
    heights = [1323.9, 217.4, -441.6, 866.2, 669.5]
    slopes = [-771.2, -971.6, -663.9, -158.0, 1027.8, 1422.4]
    theta = spline.split(jnp.array([*widths, *heights, *slopes])[:, None])
    x = jnp.linspace(-1000, 1000, 2001, dtype=jnp.float32)
    y, _ = spline.forward(x, *theta)
    back, _ = spline.inverse(y, *theta)
    again, _ = spline.forward(back, *theta)
    np.testing.assert_allclose(again, y, atol=2e-3)
    assert (jnp.diff(y) >= -1e-3).all()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 40), ("float64", 350)])
def test_gradients_of_a_mixture_are_finite_as_far_as_is_stated(dtype, limit):
    mixture = gf.transformers.MixtureCDF(2)

    @jax.jit
    def both(raw):
        x, theta = jnp.zeros(raw.shape[1:], raw.dtype), mixture.split(raw)
        return mixture.forward(x, *theta), mixture.inverse(x, *theta)

    def total(raw):
        return sum(number.sum() for way in both(raw) for number in way)

    with enable_x64(dtype == "float64"):
        apart = jnp.linspace(0, 40, 161, dtype=dtype)
        raw = jnp.zeros((6, 161), dtype).at[2].set(-apart).at[3].set(apart)
        log_slopes = both(raw)[0][1]  # at 0, midway between the components
        stated = log_slopes > -limit
        assert log_slopes[stated].min() < -0.8 * limit
        assert jnp.isfinite(jax.grad(total)(raw[:, stated])).all()
        assert jnp.isfinite(both(1e4 * raw)[0][1]).all()


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
@pytest.mark.parametrize(
    "build",
    [
        lambda dtype: gf.ActNorm((2,), dtype=dtype),
        lambda dtype: gf.Diagonal(gf.transformers.Additive(), (2,), dtype=dtype),
        lambda dtype: gf.HouseholderRotation(2, (2,), dtype=dtype),
        lambda dtype: gf.LearnedPermutation((2,), dtype=dtype),
        lambda dtype: gf.AdditiveCoupling(KEY, shape=(2,), dtype=dtype),
        lambda dtype: gf.image.dequantize(KEY, 4, jnp.array([1]), dtype=dtype),
    ],
)
def test_parameters_are_floating(build, dtype):
    with pytest.raises(ValueError, match=f"expected a floating dtype, got {dtype}"):
        build(dtype)


def test_a_mask_has_no_negative_sizes():
    with pytest.raises(ValueError, match=r"sizes >= 1, got \(-1, -1, 2\)"):
        gf.masks.random(KEY, (-1, -1, 2))


def test_nan_has_no_grey_value():
    with pytest.raises(RuntimeError, match="expected numbers to quantize, got NaN"):
        gf.image.quantize(4, jnp.array([0.5, jnp.nan]))
    assert gf.image.quantize(4, jnp.array([-jnp.inf, jnp.inf])).tolist() == [0, 3]


@pytest.mark.parametrize("fraction", [math.nan, math.inf, -math.inf])
def test_a_fraction_is_finite(fraction):
    with pytest.raises(ValueError, match="expected a fraction that leaves rows"):
        gf.data.split(KEY, jnp.ones((4, 2)), fraction)


@pytest.mark.parametrize("sd", [0.0, -1.0, math.nan, math.inf])
def test_padding_is_drawn_with_a_positive_deviation(sd):
    flow = gf.coupling_flow(KEY, dim=2, depth=1, coupling="additive", nn_width=2)
    with pytest.raises(ValueError, match="expected sd to be finite and > 0"):
        gf.padding.log_likelihood(KEY, flow, jnp.ones((2, 1)), sd=sd)


def test_a_record_of_endless_lists_is_refused(tmp_path):
    (tmp_path / "00_a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"expected a record in 00_a\.json"):
        records.read(tmp_path / "00_a.json")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_residual_flow_of_pictures_in_half_precision(dtype):
    flow = gf.residual_flow(KEY, shape=(2, 2, 1), depth=1, dtype=dtype)
    x = jnp.full((2, 2, 1), 0.5, dtype)
    assert gf.normalizing_map(flow).transform(x).dtype == dtype
    kernel = jnp.full((3, 3, 1, 1), 0.1, dtype)
    exact = gf.spectral.conv_bound(kernel.astype(jnp.float32), (4, 4))
    bound = gf.spectral.conv_bound(kernel, (4, 4))
    assert bound.dtype == dtype
    assert exact <= bound.astype(jnp.float32) < 1.02 * exact


def test_a_residual_flow_of_pictures_in_float32_beside_float64(x64):
    flow = gf.residual_flow(KEY, shape=(2, 2, 1), depth=1, dtype="float32")
    x = jnp.full((2, 2, 1), 0.5, "float32")
    assert gf.normalizing_map(flow).transform(x).dtype == "float32"


def test_a_record_of_the_largest_number_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GAUSS_FLOWS_LANE", "full")
    monkeypatch.setenv("GAUSS_FLOWS_RECORDS", str(tmp_path))
    largest = float(np.finfo(float).max)
    tables = {"a": [largest, -largest]}
    records.save("00_fuzz", settings={"seeds": 1}, tables=tables, seconds=1.0)
    assert records.load("00_fuzz")["tables"] == tables


def test_no_inverse_is_claimed_where_the_last_step_leads_away(x64):
    """Without a bound only the residual tells; it doubles with each step here."""

    def g(x):
        return jnp.tanh(2 * x)

    y = jnp.zeros(1)
    for start in np.linspace(0.5, 1.0, 60) * 1e-3:  # near the fixed point 0
        result = gf.banach_inverse(g, y + start, tolerance=2e-3, throw=False)
        assert not result.converged or result.residual < 2.1e-3
