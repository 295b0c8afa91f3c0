"""Cases that random ones found, each as it was: see trials/results/bugs_fuzz.json.

Those of files are in test_untrusted_files.py.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import paramax
import pytest
from conftest import enable_x64
from flowjax.bijections import AdditiveCondition, Affine, Chain, Invert, Scan
from flowjax.distributions import Normal, StandardNormal, Transformed

import gauss_flows as gf
from gauss_flows import data, dequantization, probe, records, spectral
from gauss_flows.theory import linear_coupling

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
    data = {"x": np.zeros(2)}
    records.save(
        "00_fuzz", settings={"seeds": 1}, data=data, tables=tables, seconds=1.0
    )
    assert records.load("00_fuzz")["tables"] == tables


def test_no_inverse_is_claimed_where_the_last_step_leads_away(x64):
    """Without a bound only the residual tells; it doubles with each step here."""

    def g(x):
        return jnp.tanh(2 * x)

    y = jnp.zeros(1)
    for start in np.linspace(0.5, 1.0, 60) * 1e-3:  # near the fixed point 0
        result = gf.banach_inverse(g, y + start, tolerance=2e-3, throw=False)
        assert not result.converged or result.residual < 2.1e-3


@pytest.mark.parametrize(
    ("lipschitz", "y", "steps"), [(0.99999, 0.1, None), (0.9999, 0.01, 1)]
)
def test_no_inverse_is_claimed_before_its_steps_are_done(lipschitz, y, steps):
    """In float32 ulp / (1 - L) is of the size of the answer itself."""

    def g(x):
        return -lipschitz * x

    options = {"lipschitz": lipschitz, "max_steps": steps}
    y = jnp.array([y])
    assert not gf.banach_inverse(g, y, throw=False, **options).converged
    with pytest.raises(RuntimeError, match="expected Banach's iteration to converge"):
        gf.banach_inverse(g, y, **options)
    found = gf.newton_inverse(g, y, lipschitz=lipschitz)
    np.testing.assert_allclose(found.x, y / (1 - lipschitz), rtol=0.02)


def test_an_answer_found_in_the_last_step_is_one():
    """Without a bound it is judged by itself, not by the step before."""
    found = gf.banach_inverse(jnp.ones_like, jnp.array([3.0]), max_steps=1)
    assert found.converged
    assert found.x == 2


@pytest.mark.parametrize("nested", [True, False])
def test_a_nested_stack_is_estimated_too(nested):
    inner = gf.normalizing_map(gf.residual_flow(KEY, shape=(3,), depth=2))
    if nested:
        other = gf.residual_flow(jr.key(1), shape=(3,), depth=1)
        inner = Chain([gf.normalizing_map(other), inner])
    stack = Chain([Affine(jnp.ones(3)), inner])
    flow = Transformed(StandardNormal((3,)), Invert(stack))
    loss = gf.EstimatedLikelihood(gf.log_det.Truncated(3))
    x = jr.normal(KEY, (20, 3))
    found = [float(loss(flow, x, jr.key(i))) for i in range(3)]
    assert len({*found}) == 3
    np.testing.assert_allclose(found, -flow.log_prob(x).mean(), rtol=0.1)


def test_known_grey_values_are_checked_under_jit_too():
    grey, spread = jnp.array([0, 255]), dequantization.dequantize
    found = jax.jit(lambda key: spread(key, 256, grey))(KEY)
    assert dequantization.quantize(256, found).tolist() == [0, 255]


def test_a_dtype_too_coarse_for_the_grey_values_is_refused():
    grey = jnp.arange(246, 256)
    with pytest.raises(ValueError, match="tells 256 levels of grey apart, got bfloat"):
        dequantization.dequantize(KEY, 256, grey, dtype=jnp.bfloat16)
    for n, dtype in ((256, jnp.float16), (32, jnp.bfloat16)):
        found = dequantization.dequantize(KEY, n, jnp.arange(n), dtype=dtype)
        assert (dequantization.quantize(n, found) == jnp.arange(n)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bounds_of_norms_in_half_precision(dtype):
    bound = spectral.gram_bound(jnp.ones((64, 64), dtype))
    assert bound.dtype == dtype
    assert 64 <= bound < 65
    net = spectral.LipschitzMLP(
        KEY, dim=2, width=128, depth=2, lipschitz=0.9, dtype=dtype
    )
    assert jnp.isfinite(net(jnp.ones(2, dtype))).all()


def test_a_map_to_another_shape_is_no_residual():
    def mean(x):
        return 0.3 * x.mean()

    with pytest.raises(ValueError, match=r"keep shape \(3,\) and float32, got \(\)"):
        gf.ResidualMap(mean, shape=(3,), lipschitz=0.5)
    with pytest.raises(ValueError, match=r"keep shape \(3,\) and float32, got \(\)"):
        gf.banach_inverse(mean, jnp.ones(3))


def test_a_continuous_map_is_traced_once():
    traced = []

    class Field(eqx.Module):
        def __call__(self, t, x):
            traced.append(t)
            return -x

    there = gf.continuous.ContinuousMap(Field(), shape=(2,))
    there.transform(jnp.ones(2))
    before = len(traced)
    there.transform(jnp.zeros(2))
    assert len(traced) == before


@pytest.mark.parametrize(
    ("kind", "kernel", "said"),
    [("X", (2, 2), "kind L or U, got 'X'"), ("L", (2, 3), r"got \(2, 3\) and \(2,\)")],
)
def test_what_is_no_linear_coupling(kind, kernel, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=said):
        linear_coupling.LinearCoupling(kind, np.zeros(kernel), np.ones(2))


def test_a_stack_takes_no_condition():
    layers = eqx.filter_vmap(lambda w: AdditiveCondition(lambda c: w * c, (3,), (3,)))
    with pytest.raises(ValueError, match=r"without a condition, got .* \(3,\)"):
        gf.Stack(layers(jnp.ones(2)))


def test_a_frozen_stack_has_no_gradient():
    flow = gf.coupling_flow(KEY, dim=2, depth=2, base=Normal(jnp.zeros(2)))
    assert isinstance(gf.stack.outermost(gf.normalizing_map(flow))[0], Scan)
    frozen = Transformed(flow.base_dist, paramax.non_trainable(flow.bijection))
    norms = probe.gradient_norms(frozen, jr.normal(KEY, (5, 2)))
    assert norms.blocks.tolist() == [0, 0]
    assert norms.total == norms.base > 0


def test_the_block_that_breaks_its_bound_is_named():
    flow = paramax.unwrap(gf.residual_flow(KEY, shape=(2,), depth=3))
    spoilt = jax.tree.map(
        lambda a: a.at[1].multiply(3) if eqx.is_inexact_array(a) and a.ndim else a, flow
    )
    with pytest.raises(ValueError, match="in block 1 of 3"):
        gf.certify(spoilt)


@pytest.mark.parametrize("memory", gf.memory.MODES)
def test_an_empty_batch(memory):
    flow = gf.coupling_flow(KEY, dim=2, depth=2, memory=memory)
    for batch in ((0,), (0, 3), (3, 0)):
        assert flow.log_prob(jnp.zeros((*batch, 2))).shape == batch
        assert flow.sample(KEY, batch).shape == (*batch, 2)


@pytest.mark.parametrize("n_knots", [1, 2, 5, 8, 30])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_a_spline_from_a_handful_of_events(n, n_knots):
    layer = gf.Diagonal(gf.transformers.RQSpline(n_knots, 4.0), (2,))
    x = jr.normal(KEY, (n, 2))
    layer = layer.from_data(x)
    y = jax.vmap(layer.transform)(x)
    np.testing.assert_allclose(jax.vmap(layer.inverse)(y), x, atol=1e-4)
    assert (jnp.argsort(y, axis=0) == jnp.argsort(x, axis=0)).all()


@pytest.mark.parametrize(("scale", "fits"), [(900, True), (1500, False), (1e-4, False)])
def test_sigmoids_from_data_of_any_scale(scale, fits):
    layer = gf.Diagonal(gf.transformers.DeepSigmoid(4), (2,))
    x = scale * jr.normal(KEY, (100, 2))
    if fits:
        y = jax.vmap(layer.from_data(x).transform)(x)
        assert jnp.isfinite(y).all()
        return
    with pytest.raises(RuntimeError, match="standard deviation of 1e-3 to 1e3"):
        layer.from_data(x)


@pytest.mark.parametrize("value", [0.1, 0.3, 1e4])
def test_a_constant_column_cannot_be_standardised(value):
    x = jnp.stack([jnp.full(1000, value), jnp.arange(1000.0)], axis=1)
    with pytest.raises(ValueError, match=r"got constant \[0\]"):
        data.standardize(x)


def test_one_row_of_the_source_cannot_be_standardised():
    with pytest.raises(ValueError, match="at least 2 rows to standardise, got 1"):
        data.source_spiral(1)
    assert data.source_spiral(1, standardized=False).shape == (1, 2)


@pytest.mark.parametrize(
    "hide",
    [
        lambda layer: Invert(Chain([paramax.NonTrainable(layer)])),
        lambda layer: Invert(Chain([Invert(layer)])),
        lambda layer: paramax.NonTrainable(Invert(Chain([layer]))),
    ],
)
def test_an_actnorm_out_of_reach_is_not_passed_over(hide):
    flow = gf.coupling_flow(KEY, dim=2, depth=1, actnorm=True)
    layer = gf.ActNorm((2,))
    flow = eqx.tree_at(lambda flow: flow.bijection, flow, hide(layer))
    with pytest.raises(ValueError, match="expected a flow with ActNorm"):
        gf.initialize_actnorm(flow, 3 + 2 * jr.normal(KEY, (50, 2)))


@pytest.mark.parametrize(
    "keys", [jr.split(jr.PRNGKey(0), 3), jr.key(0), jr.split(KEY, (2, 2))]
)
def test_keys_of_many_that_are_not_one_a_seed(keys, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x = jr.normal(KEY, (8, 2))
    with pytest.raises(ValueError, match="expected at least one key, one a seed"):
        gf.fit_many(keys, lambda key: gf.coupling_flow(key, dim=2, depth=1), x, steps=1)
