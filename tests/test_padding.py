import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flowjax.distributions import MultivariateNormal, StandardNormal
from scipy import stats

import gauss_flows as gf
from gauss_flows import padding

# one program in place of one for each operation
quickly = {"xla_backend_optimization_level": 0}
estimate = eqx.filter_jit(padding.log_likelihood, compiler_options=quickly)


@pytest.mark.parametrize("dim", [2, 3, 4, 5])
@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_both_halves_hold_data_and_padding(dim, width):
    active = gf.masks.half(dim + width)
    for part in (active, ~active):
        assert part[padding.data_coordinates(dim, width)].any()
        assert part[padding.padding_coordinates(dim, width)].any()


@pytest.mark.parametrize(("dim", "width"), [(1, 0), (1, 3), (2, 1), (3, 4), (6, 2)])
def test_places_are_a_partition_and_data_split_as_without_padding(dim, width):
    data = padding.data_coordinates(dim, width)
    both = np.concatenate([data, padding.padding_coordinates(dim, width)])
    assert sorted(both.tolist()) == list(range(dim + width))
    if dim > 1:
        active = gf.masks.half(dim + width)[data]
        assert active.tolist() == gf.masks.half(dim).tolist()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("kind", "width"), [("none", 0), ("zero", 2), ("gaussian", 1), ("gaussian", 5)]
)
def test_padding_is_taken_off_again(x64, dtype, kind, width):
    x = jr.normal(jr.key(0), (7, 3), dtype)
    rows = padding.pad(jr.key(1), x, width, kind, copies=2)
    assert rows.shape == (14, 3 + width)
    assert rows.dtype == dtype
    assert (padding.unpad(rows, width) == jnp.concatenate([x, x])).all()


def extra(rows, dim):
    return rows[:, padding.padding_coordinates(dim, rows.shape[1] - dim)]


def test_zero_padding_is_zero_and_noise_has_its_scale():
    x = jnp.ones((20_000, 2))
    assert not extra(padding.pad(jr.key(0), x, 3, "zero"), 2).any()
    noisy = extra(padding.pad(jr.key(0), x, 3, "zero", noise=0.01), 2)
    np.testing.assert_allclose(noisy.std(axis=0), 0.01, rtol=0.03)


def test_gaussian_padding_is_standard_normal_and_fresh_for_each_copy():
    rows = padding.pad(jr.key(0), jnp.ones((5_000, 2)), 2, copies=2)
    e = np.asarray(extra(rows, 2))
    assert stats.kstest(e.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(np.hstack([e[:5_000], e[5_000:]]).T)
    assert np.abs(correlation - np.eye(4)).max() < 0.06


def test_entropy_is_that_of_the_padding():
    normal = stats.norm(scale=0.02).entropy()
    assert padding.entropy(3, "zero", noise=0.02) == pytest.approx(3 * normal)
    assert padding.entropy(2) == pytest.approx(2.8378770664)
    assert padding.entropy(0, "none") == 0
    assert padding.entropy(1, "zero") == -math.inf


def joint_normal():
    """One data coordinate and two of padding, correlated; and the law of the data."""
    root = jnp.array([[0.9, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.4, 0.7]])
    mean = jnp.array([0.2, 1.0, -0.1])
    joint = MultivariateNormal(mean, root @ root.T)
    (at,) = padding.data_coordinates(1, 2)
    sd = float(jnp.sqrt((root @ root.T)[at, at]))
    return joint, stats.norm(float(mean[at]), sd)


def test_likelihood_of_many_draws_is_the_marginal(x64):
    joint, marginal = joint_normal()
    x = jnp.linspace(-1.0, 3.0, 5)[:, None]
    found = estimate(jr.key(0), joint, x, draws=200_000)
    np.testing.assert_allclose(found, marginal.logpdf(x[:, 0]), atol=0.02)


def test_likelihood_is_a_lower_bound_that_more_draws_tighten(x64):
    joint, marginal = joint_normal()
    x = jnp.repeat(jnp.linspace(-1.0, 3.0, 5)[:, None], 2_000, axis=0)
    exact = marginal.logpdf(x[:, 0])
    gap = [
        float((exact - estimate(jr.key(1), joint, x, draws=k)).mean()) for k in (1, 32)
    ]
    assert gap[0] > 1.3 * gap[1] > 0


def test_one_draw_falls_short_by_the_relative_entropy(x64):
    """KL(q || p(e | x)) for two normal laws, in closed form."""
    joint, marginal = joint_normal()
    data, rest = padding.data_coordinates(1, 2), padding.padding_coordinates(1, 2)
    x = jnp.full((400_000, 1), 0.7)
    root = np.array([[0.9, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.4, 0.7]])
    cov, mean = root @ root.T, np.array([0.2, 1.0, -0.1])
    gain = cov[np.ix_(rest, data)] / cov[data[0], data[0]]
    m = mean[rest] + gain[:, 0] * (0.7 - mean[data[0]])
    c = cov[np.ix_(rest, rest)] - gain @ cov[np.ix_(data, rest)]
    inverse = np.linalg.inv(c)
    divergence = 0.5 * (
        np.trace(inverse) + m @ inverse @ m - 2 + np.linalg.slogdet(c)[1]
    )
    found = estimate(jr.key(2), joint, x).mean()
    assert marginal.logpdf(0.7) - found == pytest.approx(divergence, rel=0.02)


def test_likelihood_is_exact_where_padding_is_independent():
    x = jr.normal(jr.key(0), (9, 2))
    exact = StandardNormal((2,)).log_prob(x)
    for shape, draws in (((5,), 1), ((5,), 3), ((2,), 1)):
        found = estimate(jr.key(1), StandardNormal(shape), x, draws=draws)
        np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_likelihood_takes_a_deviation_for_each_coordinate(x64):
    scales = jnp.array([0.1, 1.0, 3.0])  # padding, data, padding
    joint = MultivariateNormal(jnp.zeros(3), jnp.diag(scales**2))
    assert padding.padding_coordinates(1, 2).tolist() == [0, 2]
    x = jnp.array([[0.3], [-2.0]])
    found = estimate(jr.key(0), joint, x, sd=scales[jnp.array([0, 2])])
    np.testing.assert_allclose(found, stats.norm.logpdf(x[:, 0]), rtol=1e-10)


def test_it_works_under_jit_and_vmap():
    joint, _ = joint_normal()
    x = jr.normal(jr.key(1), (2, 6, 1))

    def one(x):
        return padding.log_likelihood(jr.key(2), joint, x, draws=3)

    many = jax.jit(jax.vmap(one))(x)
    np.testing.assert_allclose(many[1], one(x[1]), rtol=1e-5)


DEPTH, BOUND = 2, 0.5


@partial(eqx.filter_jit, compiler_options=quickly)
def stack(key):
    return gf.coupling_flow(
        key, dim=4, depth=DEPTH, coupling="affine", nn_width=4, nn_depth=1,
        n_reflections=0, log_scale_bound=BOUND,
    )  # fmt: skip


@partial(eqx.filter_jit, compiler_options=quickly)
def log_prob(flow, rows):
    return flow.log_prob(rows)


def test_zero_padding_has_no_best_flow(x64):
    """A factor c on zeros costs nothing and earns width * log c."""
    flow = stack(jr.key(0))
    rows = padding.pad(jr.key(1), jr.normal(jr.key(2), (50, 2)), 2, "zero")
    for factor in (10.0, 1e6):
        at = jnp.ones(4).at[padding.padding_coordinates(2, 2)].set(factor)
        scaled = log_prob(flow, rows * at) + jnp.log(at).sum()
        earned = scaled - log_prob(flow, rows)
        np.testing.assert_allclose(earned, 2 * math.log(factor), rtol=1e-9)


def test_bounded_scales_bound_the_likelihood(x64):
    """Each of 4 coordinates is scaled in one coupling of each block."""
    most = 4 * DEPTH * BOUND - 2 * math.log(2 * math.pi)
    rows = padding.pad(jr.key(0), jr.normal(jr.key(1), (50, 2)), 2, "zero")
    flow = stack(jr.key(2))
    steep = jax.tree.map(lambda a: 10 * a if eqx.is_inexact_array(a) else a, flow)
    assert float(log_prob(flow, rows).max()) < most
    assert float(log_prob(steep, rows).max()) < most
    # all scales at their bound, no shift, the origin: it is attained
    limit = eqx.tree_at(
        lambda f: [
            f.bijection.bijection.bijection.bijections[i].conditioner.layers[-1]
            for i in (0, 1)
        ],
        flow,
        replace_fn=at_the_bound,
    )
    assert float(log_prob(limit, 0 * rows)[0]) == pytest.approx(most)


def at_the_bound(layer):
    """A last layer that gives two coordinates shift 0 and a raw log-scale of 20."""
    raw = jnp.tile(jnp.array([0.0, 20.0, 0.0, 20.0]), (len(layer.bias), 1))
    return eqx.tree_at(lambda la: (la.weight, la.bias), layer, (0 * layer.weight, raw))


X = jnp.zeros((3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: padding.pad(jr.key(0), X, 2, "ones"), "kind in .*got 'ones'"),
        (
            lambda: padding.pad(jr.key(0), X, 0),
            r"width >= 1 for kind 'gaussian', got 0",
        ),
        (
            lambda: padding.pad(jr.key(0), X, 2, "none"),
            "width 0 for kind 'none', got 2",
        ),
        (lambda: padding.pad(jr.key(0), X, -1, "zero"), "width >= 1 .*got -1"),
        (
            lambda: padding.pad(jr.key(0), X, 1, noise=0.1),
            "'zero' only, got 'gaussian'",
        ),
        (lambda: padding.pad(jr.key(0), X, 1, "zero", noise=-1.0), "got -1"),
        (lambda: padding.pad(jr.key(0), X, 1, "zero", noise=math.nan), "got nan"),
        (lambda: padding.pad(jr.key(0), X, 1, copies=0), "copies .*got 0"),
        (lambda: padding.unpad(X, 2), "dim to be an integer >= 1, got 0"),
        (lambda: padding.unpad(X, -1), "width >= 0, got -1"),
        (lambda: padding.entropy(0), "width >= 1"),
        (
            lambda: padding.log_likelihood(jr.key(0), StandardNormal((1,)), X),
            "at least 2 coordinates, got 1",
        ),
        (
            lambda: padding.log_likelihood(jr.key(0), StandardNormal((2,)), X, draws=0),
            "draws .*got 0",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
