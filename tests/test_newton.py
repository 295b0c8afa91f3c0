"""Newton's method for residual maps, safeguarded by Banach's iteration."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import enable_x64

import gauss_flows as gf
from gauss_flows import newton


class Hard(eqx.Module):
    """L Q' sin(Q x) with Q orthogonal: the bound L is attained."""

    q: jax.Array
    bound: jax.Array

    def __call__(self, x):
        return self.bound * self.q.T @ jnp.sin(self.q @ x)


def hard(dim, lipschitz, dtype=None):
    q = jnp.linalg.qr(jr.normal(jr.key(0), (dim, dim)))[0].astype(dtype or float)
    x = jr.uniform(jr.key(1), (50, dim), minval=-jnp.pi, maxval=jnp.pi) @ q
    return Hard(q, jnp.asarray(lipschitz, q.dtype)), x.astype(q.dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize("krylov", [False, True])
@pytest.mark.parametrize("lipschitz", [0.5, 0.98])
def test_it_finds_the_inverse_and_bounds_its_error(dim, krylov, lipschitz):
    g, x = hard(dim, lipschitz)
    y = x + jax.vmap(g)(x)
    found = jax.vmap(
        lambda y: newton.newton_inverse(g, y, lipschitz=lipschitz, krylov=krylov)
    )(y)
    errors = jnp.linalg.norm(found.x - x, axis=1)
    assert jnp.all(errors <= found.error_bound)
    assert errors.max() < 1e-12 / (1 - lipschitz)
    assert found.steps.max() <= 30
    rates = found.rate[~jnp.isnan(found.rate)]
    assert jnp.all(rates <= lipschitz * (1 + 1e-9))


def steps_of(inverse, g, ys):
    return jax.vmap(lambda y: inverse(g, y, lipschitz=0.98, tolerance=1e-10).steps)(ys)


@pytest.mark.usefixtures("x64")
def test_a_third_of_the_evaluations_at_098():
    """Where the bound is attained; all is counted, products with the Jacobian too."""
    for dim in (2, 8):
        g, x = hard(dim, 0.98)
        y = x + jax.vmap(g)(x)
        banach = steps_of(gf.banach_inverse, g, y)
        steps = steps_of(newton.newton_inverse, g, y)
        evaluations = steps * newton.evaluations_per_step(dim)
        assert 3 * evaluations.max() <= banach.max()
        assert 3 * jnp.median(evaluations) <= jnp.median(banach)


@pytest.mark.parametrize("wide", [False, True])
def test_never_more_steps_than_banach(wide):
    with enable_x64(wide):
        for lipschitz in (0.0, 0.3, 0.9):
            g, x = hard(3, lipschitz)
            for y in x[:5] + jax.vmap(g)(x[:5]):
                options = {"lipschitz": lipschitz, "tolerance": 1e-4}
                slow = gf.banach_inverse(g, y, **options)
                fast = newton.newton_inverse(g, y, **options)
                assert fast.x.dtype == y.dtype
                assert fast.converged
                assert fast.steps <= slow.steps


@pytest.mark.usefixtures("x64")
def test_gradient_is_that_of_banach():
    g = gf.contraction_mlp(jr.key(0), dim=3, width=8, depth=1, lipschitz=0.8)

    def loss(inverse):
        return eqx.filter_grad(
            lambda both: jnp.sum(inverse(*both, lipschitz=0.8).x ** 2)
        )((g, jr.normal(jr.key(1), (3,))))

    for one, other in zip(
        jax.tree.leaves(loss(newton.newton_inverse)),
        jax.tree.leaves(loss(gf.banach_inverse)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_beyond_contractions():
    """Banach's iteration diverges for 2x and for 3 tanh x; this one does not."""
    for g in (lambda x: 2 * x, lambda x: 3 * jnp.tanh(x)):
        x = jnp.array([1.0, -2.5])
        found = newton.newton_inverse(g, x + g(x))
        np.testing.assert_allclose(found.x, x, atol=1e-12)
        assert jnp.isinf(found.error_bound)


def test_failure_names_residual_steps_and_rate():
    """Nothing solves x + |x| = -1."""
    message = r"Newton's iteration.* residual of .* after 7 steps.*Lipschitz constant"
    with pytest.raises(RuntimeError, match=message):
        newton.newton_inverse(jnp.abs, jnp.array([-1.0]), max_steps=7)
    g, x = hard(2, 0.9)
    with pytest.raises(RuntimeError, match=r"bound: 0\.2\)"):
        newton.newton_inverse(g, x[0] + g(x[0]), lipschitz=0.2)


def test_a_large_event_makes_no_matrix():
    """A picture, by GMRES, and as part of a residual map."""
    net = gf.spectral.LipschitzConvNet(
        jr.key(0), shape=(6, 6, 2), width=4, lipschitz=0.9
    )
    x = jr.normal(jr.key(1), (6, 6, 2))
    found = newton.newton_inverse(net, x + net(x), lipschitz=0.9)
    np.testing.assert_allclose(found.x, x, atol=2e-5)
    assert found.steps <= 10
