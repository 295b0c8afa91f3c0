"""Mixtures as monotone maps: tails, inverse, gradients, and the fit."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.special
from conftest import enable_x64
from jax.test_util import check_grads
from sklearn.mixture import GaussianMixture

from gauss_flows import mixture

LAWS = {"normal": mixture.NORMAL, "logistic": mixture.LOGISTIC}
FAR = [-1e6, -1e3, -40.0, -10.0, 10.0, 40.0, 1e3, 1e6]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


@pytest.fixture(params=LAWS)
def law(request):
    return LAWS[request.param]


def draw(dtype, seed=0, k=6):
    """Weights, means and scales of a mixture, as forward takes them."""
    raw = [jnp.asarray(a, dtype) for a in jr.normal(jr.key(seed), (3, k, 1))]
    return mixture.components(*raw)


def points(dtype):
    return jnp.concatenate([jnp.linspace(-6, 6, 41), jnp.array(FAR)]).astype(dtype)


def test_the_normal_law_is_that_of_scipy_however_far_out(x64):
    law, u = mixture.NORMAL, np.concatenate([-np.logspace(7, -3, 300), [0.0, 0.5, 5.0]])
    log_cdf = scipy.special.log_ndtr(u)
    np.testing.assert_allclose(law.log_cdf(jnp.array(u)), log_cdf, rtol=1e-13)
    np.testing.assert_allclose(law.quantile(jnp.array(log_cdf[:301])), u[:301], 1e-9)
    log_p = -np.logspace(14, np.log10(np.log(2) + 1e-9), 300)
    expected = scipy.special.ndtri_exp(log_p)
    np.testing.assert_allclose(law.quantile(jnp.array(log_p)), expected, 1e-12, 1e-15)
    hazard = np.sqrt(2 / np.pi) / scipy.special.erfcx(-u / np.sqrt(2))
    np.testing.assert_allclose(law.log_hazard(jnp.array(u)), np.log(hazard), atol=1e-12)


@pytest.mark.parametrize("u", [-1e6, -500.0, -30.5, -29.5, -9.0, -1.0, 0.0, 2.0, 30.0])
def test_derivatives_of_the_normal_law(u, x64):
    """Against the functions' own differences, where these can be formed."""
    law, step = mixture.NORMAL, 1e-5 * max(1.0, abs(u))
    u = jnp.array(u)
    for function in (law.log_cdf, law.log_hazard):
        rise = (function(u + step) - function(u - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(function)(u), rise, rtol=2e-5, atol=1e-9)
    log_p = law.log_cdf(jnp.minimum(u, 0.0))
    slope = jax.grad(law.quantile)(log_p)
    np.testing.assert_allclose(
        slope, jnp.exp(-law.log_hazard(jnp.minimum(u, 0.0))), rtol=1e-9
    )


def test_one_component_is_affine_to_the_last_digits(law, dtype):
    """A case with a known answer, far beyond where any probability underflows."""
    mean, log_scale = jnp.full((1, 1), 0.3, dtype), jnp.full((1, 1), -1.2, dtype)
    x = points(dtype)
    y, log_slope = mixture.forward(x, jnp.zeros((1, 1), dtype), mean, log_scale, law)
    eps = 40 * jnp.finfo(dtype).eps
    np.testing.assert_allclose(y, (x - mean[0]) * jnp.exp(1.2), rtol=eps, atol=eps)
    np.testing.assert_allclose(log_slope, 1.2, rtol=100 * eps)


@functools.partial(jax.jit, static_argnums=2)
def there_and_back(x, logs, law):
    """Image, log-slope, preimage, its log-slope, and autodiff's slope."""
    y, log_slope = mixture.forward(x, *logs, law)
    one = [a[:, 0] for a in logs]
    slope = jax.vmap(jax.grad(lambda x: mixture.forward(x, *one, law)[0]))(x)
    return y, log_slope, *mixture.inverse(y, *logs, law), slope


@pytest.mark.parametrize("seed", range(5))
def test_log_slope_is_the_derivative_and_the_inverse_undoes(law, dtype, seed):
    x, tolerance = points(dtype), 1e-5 if dtype == jnp.float32 else 1e-11
    found = there_and_back(x, draw(dtype, seed), law)
    y, log_slope, back, inverse_log_slope, slope = found
    np.testing.assert_allclose(jnp.log(slope), log_slope, atol=10 * tolerance)
    np.testing.assert_allclose(back, x, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(inverse_log_slope, -log_slope, atol=20 * tolerance)
    order = jnp.argsort(x)
    assert (jnp.diff(y[order]) > 0).all()
    assert y.dtype == log_slope.dtype == back.dtype == dtype


def test_the_textbook_formula_where_it_can_be_trusted(x64):
    weights, means, scales = (np.exp(draw(jnp.float64)[0]), *draw(jnp.float64)[1:])
    x = np.linspace(-3, 3, 31)
    cdf = (weights * scipy.special.ndtr((x - means) / np.exp(scales))).sum(axis=0)
    y, _ = mixture.forward(jnp.array(x), *draw(jnp.float64))
    np.testing.assert_allclose(y, scipy.special.ndtri(cdf), atol=1e-9)


def test_the_deep_sigmoid_is_huangs_formula(x64):
    logs, x = draw(jnp.float64), np.linspace(-3, 3, 31)
    slopes = np.exp(-np.asarray(logs[2]))
    inside = scipy.special.expit(slopes * x - slopes * np.asarray(logs[1]))
    expected = scipy.special.logit((np.exp(logs[0]) * inside).sum(axis=0))
    y, _ = mixture.forward(jnp.array(x), *logs, mixture.LOGISTIC)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_inverse_are_those_of_the_solution(law, x64):
    """Against differences: of the point, and of every parameter."""
    logs, y = draw(jnp.float64), jnp.array([-8.0, -0.7, 0.1, 2.0])

    @jax.jit
    def total(y, logs):
        x, log_slope = mixture.inverse(y, *logs, law)
        return jnp.sum(jnp.sin(x) + log_slope)

    check_grads(total, (y, logs), order=2, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_everywhere(law, dtype):
    logs = draw(dtype)

    @jax.jit
    def total(x, logs):
        there, back = mixture.forward(x, *logs, law), mixture.inverse(x, *logs, law)
        return sum(a.sum() for a in (*there, *back))

    for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(points(dtype), logs)):
        assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize("k", [1, 2, 8, 16])
def test_components_start_apart_and_mix_to_nearly_the_law(law, k, x64):
    raw = jnp.zeros((3, k, 1))
    log_weights, means, log_scales = mixture.components(*raw, law)
    assert len(np.unique(means)) == k
    variance = jnp.sum(jnp.exp(log_weights) * (means**2 / law.std**2)) + jnp.exp(
        2 * log_scales[0, 0]
    )
    np.testing.assert_allclose(variance, 1.0, rtol=1e-12)
    x = jnp.linspace(-3, 3, 61)
    y, _ = mixture.forward(x, log_weights, means, log_scales, law)
    assert jnp.abs(y - x).max() < 0.5
    for a, b in zip(raw, mixture.raw(log_weights, means, log_scales, law), strict=True):
        np.testing.assert_allclose(a - a.mean(), b - b.mean(), atol=1e-12)


fit = jax.jit(mixture.fit, static_argnums=1)


def mean_log_density(x, logs):
    weights, means, scales = (np.asarray(a)[:, None] for a in logs)
    z = (np.asarray(x) - means) / np.exp(scales)
    log_joint = weights - scales - z**2 / 2 - np.log(2 * np.pi) / 2
    return scipy.special.logsumexp(log_joint, axis=0).mean(axis=0)


def test_the_fit_is_as_good_as_that_of_scikit_learn(dtype):
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(-1, 0.2, 1500), rng.normal(0.7, 0.5, 1500)])
    x = np.stack([two, rng.gamma(2.0, size=3000), rng.uniform(size=3000)], axis=1)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    ours = mean_log_density(x, fit(jnp.asarray(x, dtype), 8))
    for column, score in zip(x.T, ours, strict=True):
        peer = GaussianMixture(8, max_iter=1000, random_state=0).fit(column[:, None])
        assert score > peer.score(column[:, None]) - 0.02


def test_repeated_values_catch_no_component(dtype):
    normal = jr.normal(jr.key(0), (500,), dtype)
    x = jnp.concatenate([normal, jnp.full(500, 0.25, dtype)])[:, None]
    log_weights, _, log_scales = fit(x, 8)
    assert jnp.isfinite(log_weights).all()
    assert log_scales.min() > np.log(1e-3)
    y, log_slope = mixture.forward(x[:, 0], *fit(x, 8))
    assert jnp.isfinite(y).all()
    assert jnp.isfinite(log_slope).all()


def test_heavy_tails_keep_the_bulk_and_stay_finite(dtype):
    x = jr.cauchy(jr.key(0), (2000, 1), dtype)
    y, log_slope = mixture.forward(x[:, 0], *fit(x, 8))
    assert jnp.isfinite(y).all()
    assert jnp.isfinite(log_slope).all()
    inner = jnp.abs(x[:, 0]) < 5
    ranks = scipy.special.ndtri((jnp.argsort(jnp.argsort(x[:, 0])) + 0.5) / len(x))
    assert np.abs(np.asarray(y) - ranks)[inner].mean() < 0.15


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="at most one a sample, got 8 for 5 samples"):
        mixture.fit(jnp.arange(5.0)[:, None], 8)
    for scale in (1e-3, 1e4):
        with pytest.raises(RuntimeError, match=r"scale of 0\.1 to 100.*standardise"):
            mixture.fit(scale * jr.normal(jr.key(0), (50, 1)), 2)


def test_columns_are_fitted_one_by_one(x64):
    x = jr.normal(jr.key(0), (300, 3)) ** 3 / 3
    together = fit(x, 4)
    alone = functools.partial(fit, x[:, 1:2], 4)()
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[:, 1:2], b, rtol=1e-9, atol=1e-9)
