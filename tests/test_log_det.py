"""Log-determinants of residual maps: exact, cut off, and at random without bias."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import enable_x64

import gauss_flows as gf
from gauss_flows import log_det

DRAWS = 100_000


class Scaled(eqx.Module):
    """A network times a number, so that a gradient is one number too."""

    scale: jax.Array
    network: eqx.Module

    def __call__(self, x):
        return self.scale * self.network(x)


def network(dim, lipschitz=0.9, seed=0):
    return gf.contraction_mlp(
        jr.key(seed), dim=dim, width=16, depth=2, lipschitz=lipschitz
    )


class Steep(eqx.Module):
    """0.6 P sin(Q x) with P and Q orthogonal: all singular values near 0.6."""

    left: jax.Array
    right: jax.Array

    def __call__(self, x):
        return 0.6 * self.left @ jnp.sin(self.right @ x)


def scaled(dim):
    """A map whose series is long enough for a wrong weight to show."""
    left, right = jnp.linalg.qr(jr.normal(jr.key(6), (2, dim, dim)))[0]
    return Scaled(jnp.ones(()), Steep(left, right))


def point(dim):
    return jr.normal(jr.key(5), (dim,)) / 2


@eqx.filter_jit
def draws(estimator, g, x, keys):
    """Values and derivatives by the scale, one a key."""

    def one(scale, key):
        return estimator.log_det(eqx.tree_at(lambda g: g.scale, g, scale), x, key)

    return jax.vmap(jax.value_and_grad(one), (None, 0))(g.scale, keys)


def exact_and_gradient(g, x):
    def value(scale):
        return log_det.exact(eqx.tree_at(lambda g: g.scale, g, scale), x)

    return jax.value_and_grad(value)(g.scale)


# --- exact and cut off ----------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (16,), (17,), (2, 2)])
def test_exact(shape, wide):
    with enable_x64(wide):
        x = jr.normal(jr.key(0), shape)
        g = lambda x: 0.5 * jnp.sin(x + 0.3 * jnp.roll(x, 1))  # noqa: E731
        jacobian = jnp.eye(x.size) + jax.jit(jax.jacrev(g))(x).reshape(x.size, x.size)
        found = jax.jit(lambda x: log_det.exact(g, x))(x)
        assert found.dtype == x.dtype
        np.testing.assert_allclose(
            found, jnp.linalg.slogdet(jacobian)[1], atol=1e-12 if wide else 1e-6
        )


@pytest.mark.usefixtures("x64")
def test_exact_pivots():
    """No contraction, and a first pivot of zero."""
    turn = jnp.array([[-1.0, -2.0, 0.0], [3.0, -1.0, 1.0], [0.0, 1.0, 4.0]])
    expected = jnp.linalg.slogdet(jnp.eye(3) + turn)[1]
    np.testing.assert_allclose(
        log_det.exact(lambda x: turn @ x, jnp.ones(3)), expected, rtol=1e-14
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize("lipschitz", [0.3, 0.5, 0.9, 0.98])
def test_truncation_is_within_its_bound(dim, lipschitz):
    """For networks, and for the map that attains it, at every length."""
    q = jnp.linalg.qr(jr.normal(jr.key(1), (dim, dim)))[0]
    hard = lambda x: -lipschitz * q.T @ jnp.sin(q @ x)  # noqa: E731
    lengths = (1, 2, 3, 5, 10, 20, 40, 80)

    @eqx.filter_jit
    def errors(g, x):
        exact = log_det.exact(g, x)
        return jnp.stack([jnp.abs(log_det.series(g, x, n) - exact) for n in lengths])

    bounds = np.array([log_det.series_bound(lipschitz, dim, n) for n in lengths])
    of_network = errors(network(dim, lipschitz), point(dim))
    assert np.all(of_network <= bounds * (1 + 1e-9) + 1e-13)
    np.testing.assert_allclose(
        errors(hard, jnp.zeros(dim)), bounds, rtol=1e-6, atol=1e-13
    )


def test_series_bound_against_its_closed_form():
    for lipschitz in (0.1, 0.9, 0.99):
        for terms in (0, 1, 7):
            head = sum(lipschitz**k / k for k in range(1, terms + 1))
            expected = -3 * (np.log1p(-lipschitz) + head)
            np.testing.assert_allclose(
                log_det.series_bound(lipschitz, 3, terms), expected, rtol=1e-7
            )
    assert log_det.series_bound(0.0, 3, 1) == 0


def test_sufficient_terms():
    for tolerance in (1e-1, 1e-6):
        n = log_det.sufficient_terms(0.9, 8, tolerance)
        assert log_det.series_bound(0.9, 8, n) <= tolerance
        assert log_det.series_bound(0.9, 8, n - 1) > tolerance
    assert log_det.sufficient_terms(0.1, 1, 10.0) == 1


# --- roulette -------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize("distribution", ["geometric", "poisson"])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_no_bias(dim, distribution, noise):
    """Value and gradient: the mean of 10^5 draws within 3 standard errors."""
    g, x = scaled(dim), point(dim)
    estimator = log_det.Roulette(distribution, noise=noise)
    drawn = draws(estimator, g, x, jr.split(jr.key(2), DRAWS))
    for got, exact in zip(drawn, exact_and_gradient(g, x), strict=True):
        error = got.std() / DRAWS**0.5
        assert jnp.abs(got.mean() - exact) < 3 * error
        assert error < 0.05


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("head", [0, 1, 5])
@pytest.mark.parametrize("probes", [1, 3])
def test_heads_and_probes(head, probes):
    g, x = scaled(2), point(2)
    estimator = log_det.Roulette(head=head, probes=probes)
    drawn = draws(estimator, g, x, jr.split(jr.key(3), DRAWS))
    for got, exact in zip(drawn, exact_and_gradient(g, x), strict=True):
        assert jnp.abs(got.mean() - exact) < 3.5 * got.std() / DRAWS**0.5
    assert estimator.mean_terms() == head + 2


@pytest.mark.usefixtures("x64")
def test_a_truncated_series_is_biased():
    """The same test finds a bias where there is one."""
    g, x = scaled(2), point(2)
    drawn = draws(log_det.Truncated(1), g, x, jr.split(jr.key(2), DRAWS))
    for got, exact in zip(drawn, exact_and_gradient(g, x), strict=True):
        assert jnp.abs(got.mean() - exact) > 3 * got.std() / DRAWS**0.5
    value, _ = drawn
    assert jnp.abs(value.mean() - log_det.series(g, x, 1)) < 4 * value.std() / 316


@pytest.mark.usefixtures("x64")
def test_one_dimension_needs_no_probe():
    """In one dimension a Rademacher probe is exact; only the roulette is random."""
    x = jnp.array([0.3])
    g = lambda x: 0.5 * jnp.sin(x)  # noqa: E731
    found = log_det.Truncated(60, noise="rademacher").log_det(g, x, jr.key(0))
    np.testing.assert_allclose(found, jnp.log1p(0.5 * jnp.cos(0.3)), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_surrogate_is_another_number():
    """Its gradient is right and its value is the trace of (I + J)^-1 J."""
    g, x = (lambda x: -0.6 * jnp.sin(x)), jnp.zeros(2)
    estimator = log_det.Truncated(200, noise="rademacher")
    estimate = estimator.estimate(g, x, estimator.draw_terms(jr.key(0)), jr.key(1))
    np.testing.assert_allclose(estimate.surrogate, 2 * -0.6 / 0.4, rtol=1e-12)
    np.testing.assert_allclose(estimate.value, 2 * np.log(0.4), rtol=1e-12)


@pytest.mark.parametrize("distribution", ["geometric", "poisson"])
def test_number_of_terms_and_chances_agree(distribution):
    estimator = log_det.Roulette(distribution, head=3)
    terms = jax.vmap(estimator.draw_terms)(jr.split(jr.key(0), DRAWS))
    assert terms.min() == (4 if distribution == "geometric" else 3)
    for k in range(1, 9):
        chance = float(estimator.reached(jnp.array(k)))
        assert abs((terms >= k).mean() - chance) < 4 * np.sqrt(0.25 / DRAWS)
    np.testing.assert_allclose(terms.mean(), estimator.mean_terms(), rtol=0.02)


def test_memory_does_not_grow_with_the_terms():
    def memory(terms):
        estimator = log_det.Truncated(terms)

        @eqx.filter_jit
        @eqx.filter_grad
        def gradient(g, x):
            return estimator.log_det(g, x, jr.key(0))

        compiled = gradient.lower(network(8), point(8)).compile().compiled
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(1000) == memory(5)


@pytest.mark.usefixtures("x64")
def test_gradients_of_closures_and_points():
    """What a plain function holds gets its gradient too, and so does the point."""

    def loss(a, x):
        estimator = log_det.Truncated(100, probes=2, noise="rademacher")
        return estimator.log_det(lambda x: a * jnp.sin(x), x, jr.key(0))

    a, x = jnp.array(0.4), jnp.array([0.3])
    exact = lambda a, x: jnp.log1p(a * jnp.cos(x[0]))  # noqa: E731
    for i in range(2):
        got, expected = jax.grad(loss, i)(a, x), jax.grad(exact, i)(a, x)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_batches_share_a_number_of_terms_and_no_probe():
    g, xs = network(3), jnp.tile(point(3), (6, 1))
    found = log_det.Truncated(4).log_dets(g, xs, jr.key(0))
    assert len(set(found.tolist())) == 6
    again = log_det.Truncated(4).log_dets(g, xs, jr.key(0))
    np.testing.assert_array_equal(found, again)


@pytest.mark.usefixtures("x64")
def test_dtype_is_kept():
    g = gf.contraction_mlp(
        jr.key(0), dim=3, width=8, depth=1, lipschitz=0.9, dtype=jnp.float32
    )
    for kind in log_det.DISTRIBUTIONS:
        for noise in log_det.NOISES:
            estimator = log_det.Roulette(kind, noise=noise)
            found = estimator.log_det(g, jnp.ones(3, jnp.float32), jr.key(0))
            assert found.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: log_det.Roulette("uniform"), "a distribution in .* got 'uniform'"),
        (lambda: log_det.Roulette(rate=1.0), r"a rate in \(0, 1\), got 1"),
        (lambda: log_det.Roulette("poisson", rate=0.0), r"\(0, inf\), got 0"),
        (lambda: log_det.Roulette(head=-1), "head of at least 0 terms, got -1"),
        (lambda: log_det.Roulette(probes=0), "probes to be an integer >= 1, got 0"),
        (lambda: log_det.Roulette(noise="cauchy"), "noise in .* got 'cauchy'"),
        (lambda: log_det.Truncated(0), "terms to be an integer >= 1, got 0"),
        (lambda: log_det.series(jnp.sin, jnp.ones(2), 0), "terms to be an integer"),
        (lambda: log_det.series_bound(1.0, 2, 1), r"bound in \[0, 1\), got 1"),
        (lambda: log_det.series_bound(0.5, 2, -1), "of at least 0, got -1"),
        (lambda: log_det.sufficient_terms(0.5, 2, 0.0), "tolerance to be finite"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
