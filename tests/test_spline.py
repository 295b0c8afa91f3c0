import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import enable_x64
from hypothesis import given, strategies as st
from jax.test_util import check_grads

from gauss_flows import spline

INTERVAL = 3.0


def on_last_axis(direction):
    """The same with a point's parameters in one array, on its last axis."""

    def call(x, theta, interval):
        return direction(x, *spline.split(jnp.moveaxis(theta, -1, 0)), interval)

    return jax.jit(call, static_argnums=2)


forward, inverse = on_last_axis(spline.forward), on_last_axis(spline.inverse)


def parameters(n, spread=2.0, n_knots=6):
    return spread * jr.normal(jr.key(0), (n, spline.n_parameters(n_knots)))


def test_zero_parameters_give_the_identity(x64):
    x = jnp.linspace(-5, 5, 101)
    y, log_slope = forward(x, jnp.zeros((101, 19)), INTERVAL)
    np.testing.assert_allclose(y, x, atol=1e-14)
    np.testing.assert_allclose(log_slope, 0.0, atol=1e-14)


def test_log_slope_is_the_derivative(x64):
    x = jnp.linspace(-4, 4, 403)
    theta = parameters(len(x))
    slope = jax.vmap(jax.grad(lambda x, t: forward(x, t, INTERVAL)[0]))(x, theta)
    np.testing.assert_allclose(
        forward(x, theta, INTERVAL)[1], jnp.log(slope), atol=1e-9
    )


def test_log_slope_is_the_derivative_at_ends_and_knots(x64):
    """With equal bins the knots are exact, and so are ties in every comparison."""
    x = jnp.linspace(-INTERVAL, INTERVAL, 9)
    theta = jnp.concatenate([jnp.zeros((9, 16)), parameters(9)[:, :9]], axis=-1)
    for direction in (forward, inverse):
        slope = jax.vmap(jax.grad(lambda x, t, f=direction: f(x, t, INTERVAL)[0]))
        expected = jnp.exp(direction(x, theta, INTERVAL)[1])
        np.testing.assert_allclose(slope(x, theta), expected, rtol=1e-12)


@pytest.mark.parametrize("direction", [forward, inverse])
@pytest.mark.parametrize("modes", ["fwd", "rev"])
def test_derivatives_by_the_parameters_are_those_of_differences(direction, modes, x64):
    """First and second, for the rule that finds them is written by hand."""
    x = jnp.array([-3.5, -2.9, -1.1, 0.2, 1.7, 2.8])
    check_grads(
        lambda theta: direction(x, theta, INTERVAL),
        (parameters(len(x)),),
        order=2,
        modes=[modes],
    )


@pytest.mark.parametrize("direction", [forward, inverse])
@pytest.mark.parametrize("spread", [1.0, 1e2, 1e4, 1e6])
def test_values_and_gradients_stay_finite_in_float32(direction, spread):
    """However steep the bins; the textbook's root of the quadratic fails at 1e2."""
    theta = parameters(5000, spread)
    x = jr.uniform(jr.key(1), (5000,), minval=-1.1 * INTERVAL, maxval=1.1 * INTERVAL)

    def total(x, theta):
        y, log_slope = direction(x, theta, INTERVAL)
        return y + log_slope

    gradients = jax.vmap(jax.value_and_grad(total, argnums=(0, 1)))(x, theta)
    for leaf in jax.tree.leaves(gradients):
        assert jnp.isfinite(leaf).all()


def test_increasing_and_onto_the_interval(x64):
    x = jnp.linspace(-INTERVAL, INTERVAL, 2001)
    theta = jnp.broadcast_to(parameters(1), (len(x), 22))
    y, _ = forward(x, theta, INTERVAL)
    assert (jnp.diff(y) > 0).all()
    np.testing.assert_allclose(y[jnp.array([0, -1])], [-INTERVAL, INTERVAL], atol=1e-12)


def test_outside_the_interval_it_is_the_identity():
    x = jnp.array([-1e6, -INTERVAL - 1e-3, INTERVAL + 1e-3, 1e6])
    for direction in (forward, inverse):
        y, log_slope = direction(x, parameters(4), INTERVAL)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(log_slope, 0.0)


@given(
    seed=st.integers(0, 2**31 - 1),
    spread=st.floats(0.0, 8.0),
    x=st.floats(-INTERVAL, INTERVAL),
)
def test_inverse_undoes_any_spline(seed, spread, x):
    with enable_x64(True):
        theta = spread * jr.normal(jr.key(seed), (spline.n_parameters(6),))
        y, log_slope = forward(jnp.asarray(x), theta, INTERVAL)
        back, inverse_log_slope = inverse(y, theta, INTERVAL)
        # rounding of y, of size 1e-15, comes back multiplied by the inverse's slope
        slack = 1e-13 * (1 + np.exp(-log_slope))
        assert abs(back - x) <= slack * 1e3
        assert np.isfinite(inverse_log_slope)


@pytest.mark.parametrize("edge", [-INTERVAL, INTERVAL])
def test_a_knot_belongs_to_one_bin(edge, x64):
    """At every knot, ends included, both neighbours agree on the value."""
    theta = parameters(1)[0]
    eps = 1e-9
    inside = forward(jnp.asarray(edge * (1 - eps)), theta, INTERVAL)[0]
    np.testing.assert_allclose(forward(jnp.asarray(edge), theta, INTERVAL)[0], edge)
    assert abs(inside - edge) < 1e-6
