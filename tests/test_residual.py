"""The residual map, Banach's iteration and the networks of set spectral norm."""

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest
from conftest import enable_x64
from flowjax.bijections import Chain, Invert
from flowjax.distributions import StandardNormal, Transformed
from hypothesis import given

import gauss_flows as gf
from gauss_flows import residual

# a round trip loses a few units of rounding, amplified by 1 / (1 - L)
TOLERANCE = {False: 2e-5, True: 1e-13}


class Sine(eqx.Module):
    a: jax.Array
    b: jax.Array

    def __call__(self, x):
        return self.a * jnp.sin(self.b * x)


class Affine(eqx.Module):
    matrix: jax.Array
    shift: jax.Array

    def __call__(self, x):
        return self.matrix @ x + self.shift


def sine(a=0.3, b=1.0):
    return Sine(jnp.asarray(a), jnp.asarray(b))


def mlp(seed=0, dim=3, lipschitz=0.8):
    return residual.contraction_mlp(
        jr.key(seed), dim=dim, width=16, depth=2, lipschitz=lipschitz
    )


# --- banach_inverse -------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
def test_source_demo(wide):
    """400 points of [-3, 3] and (a, b) = (0.3, 1): the round trip of the source."""
    with enable_x64(wide):
        x, g = jnp.linspace(-3, 3, 400), sine()
        y = x + jax.vmap(g)(x)
        found = jax.vmap(lambda y: residual.banach_inverse(g, y, lipschitz=0.3))(y)
        assert found.x.dtype == x.dtype
        assert jnp.max(jnp.abs(found.x - x)) < (1e-12 if wide else 2e-6)
        assert jnp.max(found.steps) < (40 if wide else 20)


@pytest.mark.usefixtures("x64")
def test_source_demo_sixty_plain_steps():
    x, g = jnp.linspace(-3, 3, 400), sine()
    y = x + jax.vmap(g)(x)
    last = jax.vmap(lambda y: residual.banach_iterates(g, y, 60)[-1])(y)
    assert jnp.max(jnp.abs(last - x)) < 1e-12


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 1)])
def test_any_event_shape(shape):
    x = jr.normal(jr.key(0), shape)
    found = residual.banach_inverse(sine(0.5), x + sine(0.5)(x), lipschitz=0.5)
    assert found.x.shape == shape
    assert found.residual.shape == found.steps.shape == ()
    np.testing.assert_allclose(found.x, x, atol=2e-6)


@pytest.mark.usefixtures("x64")
def test_linear_map_against_solve():
    matrix = 0.6 * jnp.linalg.qr(jr.normal(jr.key(0), (4, 4)))[0]
    g, y = Affine(matrix, jnp.arange(4.0)), jnp.ones(4)
    found = residual.banach_inverse(g, y, lipschitz=0.6)
    exact = jnp.linalg.solve(jnp.eye(4) + matrix, y - g.shift)
    np.testing.assert_allclose(found.x, exact, rtol=1e-13)
    # an orthogonal matrix times 0.6 contracts every vector by 0.6
    np.testing.assert_allclose(found.rate, 0.6, rtol=1e-2)


@pytest.mark.usefixtures("x64")
def test_tolerance_is_kept_and_not_exceeded_by_much():
    g, y = Affine(0.9 * jnp.eye(2), jnp.ones(2)), jnp.array([3.0, -2.0])
    steps = []
    for tolerance in (1e-1, 1e-4, 1e-8):
        found = residual.banach_inverse(g, y, lipschitz=0.9, tolerance=tolerance)
        error = jnp.linalg.norm(found.x - (y - 1) / 1.9)
        assert error <= found.error_bound <= tolerance
        assert found.error_bound > 0.5 * tolerance
        steps.append(int(found.steps))
    assert steps[0] < steps[1] < steps[2]


def test_tolerance_bounds_the_residual_without_lipschitz():
    found = residual.banach_inverse(sine(), jnp.array(1.0), tolerance=1e-3)
    assert found.residual <= 1e-3
    assert jnp.isinf(found.error_bound)
    assert found.converged


@given(
    seed=st.integers(0, 10_000),
    dim=st.integers(1, 6),
    lipschitz=st.floats(0.0, 0.98),
    size=st.floats(-3, 4).map(lambda e: 10**e),
    loose=st.booleans(),
)
def test_error_bound_bounds_the_error(seed, dim, lipschitz, size, loose):
    """Linear maps, rotated and shifted, in float32, against the solve in float64."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((dim, dim))
    matrix *= lipschitz / np.linalg.norm(matrix, 2)
    g = Affine(jnp.asarray(matrix, "float32"), jnp.asarray(rng.normal(size=dim), "f4"))
    y = jnp.asarray(size * rng.standard_normal(dim), "float32")
    found = residual.banach_inverse(
        g,
        y,
        lipschitz=min(lipschitz + 1e-6, 0.99),
        tolerance=0.1 * size + 1e-3 if loose else None,
    )
    wide = (np.asarray(a, "float64") for a in (g.matrix, g.shift, y))
    matrix, shift, y = wide
    exact = np.linalg.solve(np.eye(dim) + matrix, y - shift)
    assert np.linalg.norm(found.x - exact) <= found.error_bound
    assert found.rate <= 1.05 * lipschitz or jnp.isnan(found.rate)


@eqx.filter_jit
def round_trip(g, x, lipschitz):
    t = residual.ResidualMap(g, shape=x.shape, lipschitz=lipschitz)
    y, log_det = t.transform_and_log_det(x)
    return *t.inverse_and_log_det(y), log_det


@given(  # each dim and bound is one compilation
    seed=st.integers(0, 10_000),
    dim=st.sampled_from([1, 4]),
    lipschitz=st.sampled_from([0.0, 0.97]),
    size=st.floats(-3, 3).map(lambda e: 10**e),
)
def test_round_trip_of_networks(seed, dim, lipschitz, size):
    g, x = mlp(seed, dim, lipschitz), size * jr.normal(jr.key(seed), (dim,))
    back, inverse_log_det, log_det = round_trip(g, x, lipschitz)
    np.testing.assert_allclose(back, x, rtol=2e-5, atol=2e-5 * (1 + size))
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_rate_never_exceeds_the_lipschitz_constant():
    for seed in range(5):
        g = mlp(seed, 3, 0.9)
        found = residual.banach_inverse(g, jr.normal(jr.key(seed), (3,)))
        assert 0 < found.rate <= 0.9


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dim", [2, 256])
def test_default_tolerance_is_reached(wide, dim):
    """Down to rounding in either dtype, in wide networks too."""
    with enable_x64(wide):
        g = residual.contraction_mlp(
            jr.key(0), dim=dim, width=256, depth=2, lipschitz=0.95
        )
        x = 10 * jr.normal(jr.key(1), (dim,))
        found = residual.banach_inverse(g, x + g(x), lipschitz=0.95)
        scale = jnp.linalg.norm(x)
        assert jnp.linalg.norm(found.x - x) < 20 * jnp.finfo(x.dtype).eps * scale


def test_steps_that_always_suffice():
    """The slowest contraction there is, g(x) = -L x, converges by default."""
    for lipschitz in (0.0, 0.5, 0.99, 0.999):
        found = residual.banach_inverse(
            lambda x, c=lipschitz: -c * x, jnp.array([1.0, 2.0]), lipschitz=lipschitz
        )
        assert found.converged


@pytest.mark.parametrize("wide", [False, True])
def test_rounding_may_keep_a_cycle_going(wide):
    """Slopes of -L at the solution: the residual stays at rounding over 1 - L."""
    with enable_x64(wide):
        x = jr.normal(jr.key(0), (50, 8)) / 10
        q = jnp.linalg.qr(jr.normal(jr.key(1), (8, 8)))[0]

        def g(x):
            return 0.999 * q.T @ jnp.sin(q @ x)

        y = x + jax.vmap(g)(x)
        found = jax.vmap(lambda y: residual.banach_inverse(g, y, lipschitz=0.999))(y)
        errors = jnp.linalg.norm(found.x - x, axis=1)
        assert jnp.all(errors <= found.error_bound)


# --- derivatives ----------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_gradient_against_unrolled_iterations():
    g, y = mlp(), jr.normal(jr.key(1), (3,))

    def implicit(g, y):
        return jnp.sum(residual.banach_inverse(g, y, lipschitz=0.8).x ** 2)

    def explicit(g, y):
        return jnp.sum(residual.banach_iterates(g, y, 100)[-1] ** 2)

    for one, other in zip(
        jax.tree.leaves(eqx.filter_grad(lambda a: implicit(*a))((g, y))),
        jax.tree.leaves(eqx.filter_grad(lambda a: explicit(*a))((g, y))),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_gradient_against_inverse_function_theorem():
    g, y = mlp(), jr.normal(jr.key(1), (3,))
    x = residual.banach_inverse(g, y, lipschitz=0.8).x
    expected = jnp.linalg.inv(jnp.eye(3) + jax.jacfwd(g)(x))
    for jacobian in (jax.jacfwd, jax.jacrev):
        got = jacobian(lambda y: residual.banach_inverse(g, y, lipschitz=0.8).x)(y)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_gradient_of_a_closure_against_finite_differences():
    def inverse(a):
        found = residual.banach_inverse(lambda x: a * jnp.sin(x), jnp.array(1.0))
        return found.x

    step = 1e-6
    finite = (inverse(0.5 + step) - inverse(0.5 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(inverse)(0.5), finite, rtol=1e-8)


def test_diagnostics_carry_no_gradient():
    def total(y):
        found = residual.banach_inverse(sine(), y, lipschitz=0.3)
        return found.residual + found.error_bound + found.rate

    assert jax.grad(total)(jnp.array(0.0)) == 0  # where the residual itself is 0


def test_gradient_memory_does_not_grow_with_the_steps():
    def memory(lipschitz):
        def loss(a):
            found = residual.banach_inverse(
                lambda x: a * jnp.sin(x), jnp.ones(50), lipschitz=lipschitz
            )
            return jnp.sum(found.x)

        compiled = jax.jit(jax.grad(loss)).lower(0.3).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert memory(0.999) == memory(0.3)


def test_jit_vmap_and_grad_together():
    g = mlp(dim=2)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(g, ys):
        inverse = jax.vmap(lambda y: residual.banach_inverse(g, y, lipschitz=0.8).x)
        return jnp.mean(inverse(ys) ** 2)

    grads = gradient(g, jr.normal(jr.key(0), (7, 2)))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("lipschitz", [1.0, 1.35, -0.1, float("nan"), float("inf")])
def test_no_contraction(lipschitz):
    for make in (
        lambda: residual.ResidualMap(sine(), shape=(), lipschitz=lipschitz),
        lambda: residual.banach_inverse(sine(), jnp.ones(()), lipschitz=lipschitz),
        lambda: mlp(lipschitz=lipschitz),
    ):
        with pytest.raises(ValueError, match=rf"contraction.*got {lipschitz}"):
            make()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tolerance": 0.0}, "positive, finite tolerance, got 0"),
        ({"tolerance": float("nan")}, "positive, finite tolerance, got nan"),
        ({"max_steps": 0}, "max_steps of at least 1, got 0"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        residual.banach_inverse(sine(), jnp.ones(()), **kwargs)


def test_g_must_keep_shape_and_dtype():
    with pytest.raises(ValueError, match=r"keep shape \(3,\).*got \(2, 3\)"):
        residual.banach_inverse(lambda x: jnp.zeros((2, 3)) + x, jnp.ones(3))
    with pytest.raises(ValueError, match=r"keep shape \(3,\).*got \(2, 3\)"):
        residual.ResidualMap(lambda x: jnp.zeros((2, 3)) + x, shape=(3,), lipschitz=0.5)
    with pytest.raises(ValueError, match=r"got .* and float32"):
        residual.banach_iterates(
            lambda x: x.astype("float32"), jnp.ones(3, "float16"), 3
        )
    with pytest.raises(ValueError, match="number of steps of at least 0, got -1"):
        residual.banach_iterates(sine(), jnp.ones(3), -1)


def test_no_convergence_states_residual_steps_and_rate():
    """g(x) = 2x: invertible, and the iteration diverges from it."""
    message = r"bound: none\).* residual of .* after 20 steps.* is at least 2$"
    with pytest.raises(RuntimeError, match=message):
        residual.banach_inverse(lambda x: 2 * x, jnp.ones(()), max_steps=20)
    found = residual.banach_inverse(
        lambda x: 2 * x, jnp.ones(()), max_steps=20, throw=False
    )
    assert not found.converged
    assert found.steps == 20


def test_a_cycle_does_not_converge():
    with pytest.raises(RuntimeError, match="after 1000 steps"):
        residual.banach_inverse(sine(0.9, 1.5), jnp.array(0.1))


def test_a_false_bound_is_found_out():
    """The iteration converges, but slower than the declared bound allows."""
    with pytest.raises(RuntimeError, match=r"bound: 0\.1\).* is at least 0\.[67]"):
        residual.banach_inverse(
            lambda x: 0.7 * x, jnp.ones(2), lipschitz=0.1, max_steps=1000
        )
    t = residual.ResidualMap(sine(0.9), shape=(), lipschitz=0.1)
    with pytest.raises(RuntimeError, match="expected Banach's iteration to converge"):
        t.inverse(jnp.array(3.0))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_points_that_are_not_finite(bad):
    with pytest.raises(RuntimeError, match=r"residual of (nan|inf)"):
        residual.banach_inverse(sine(), jnp.array([0.0, bad]), lipschitz=0.3)


def test_errors_inside_jit_and_vmap():
    def inverse(y):
        return residual.banach_inverse(lambda x: 2 * x, y, max_steps=9).x

    with pytest.raises(RuntimeError, match="throw=False"):
        jax.block_until_ready(eqx.filter_jit(inverse)(jnp.ones(())))
    with pytest.raises(RuntimeError, match="throw=False"):
        jax.block_until_ready(jax.vmap(inverse)(jnp.ones(3)))


# --- banach_iterates ------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_iterates_and_their_bounds():
    g, x = mlp(2), jr.normal(jr.key(3), (3,))
    y = x + g(x)
    xs = residual.banach_iterates(g, y, 12)
    assert xs.shape == (13, 3)
    np.testing.assert_array_equal(xs[0], y)
    np.testing.assert_allclose(xs[1], y - g(y), rtol=1e-15)
    errors = jnp.linalg.norm(xs - x, axis=1)
    first = jnp.linalg.norm(xs[1] - xs[0])
    assert jnp.all(errors <= 0.8 ** jnp.arange(13) / 0.2 * first + 1e-15)
    assert residual.banach_iterates(g, y, 0).shape == (1, 3)


# --- ResidualMap ----------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_log_det_against_autodiff(wide, shape):
    with enable_x64(wide):
        t = residual.ResidualMap(sine(0.4, 2.0), shape=shape, lipschitz=0.8)
        x = jr.normal(jr.key(0), shape)
        y, log_det = eqx.filter_jit(t.transform_and_log_det)(x)
        jacobian = jax.jacrev(t.transform)(x).reshape(x.size, x.size)
        np.testing.assert_allclose(
            log_det, jnp.linalg.slogdet(jacobian)[1], atol=TOLERANCE[wide]
        )
        back, inverse_log_det = eqx.filter_jit(t.inverse_and_log_det)(y)
        np.testing.assert_allclose(back, x, atol=TOLERANCE[wide])
        np.testing.assert_allclose(inverse_log_det, -log_det, atol=TOLERANCE[wide])
        assert back.dtype == log_det.dtype == x.dtype
        bounds = x.size * np.log1p(-0.8), x.size * np.log1p(0.8)
        assert bounds[0] <= log_det <= bounds[1]


@pytest.mark.usefixtures("x64")
def test_condition_number_is_bounded():
    for lipschitz in (0.3, 0.9):
        t = residual.ResidualMap(mlp(1, 4, lipschitz), shape=(4,), lipschitz=lipschitz)
        xs = jr.normal(jr.key(0), (50, 4))
        s = jnp.linalg.svd(jax.vmap(jax.jacfwd(t.transform))(xs), compute_uv=False)
        assert jnp.max(s) <= 1 + lipschitz
        assert jnp.min(s) >= 1 - lipschitz


@pytest.mark.usefixtures("x64")
def test_inside_flowjax():
    maps = [
        residual.ResidualMap(mlp(i, 2, 0.7), shape=(2,), lipschitz=0.7)
        for i in range(3)
    ]
    chain = Chain(maps)
    flow = Transformed(StandardNormal((2,)), Invert(chain))
    x = jr.normal(jr.key(0), (5, 2))
    z, log_det = jax.vmap(chain.transform_and_log_det)(x)
    expected = jnp.sum(jax.scipy.stats.norm.logpdf(z), axis=1) + log_det
    np.testing.assert_allclose(flow.log_prob(x), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(chain.inverse)(z), x, atol=1e-13)
    assert flow.sample(jr.key(1), (4,)).shape == (4, 2)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(flow, x):  # of the density of the pushforward: through the inverse
        return -jnp.mean(flow.log_prob(x))

    forward, backward = flow, Transformed(StandardNormal((2,)), chain)
    for flow in (forward, backward):
        leaves = jax.tree.leaves(eqx.filter(gradient(flow, x), eqx.is_inexact_array))
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in leaves)
        assert any(jnp.any(leaf != 0) for leaf in leaves)


def test_agrees_with_newton():
    """A root finder of optimistix, which knows nothing of contractions."""
    g, y = mlp(), jr.normal(jr.key(4), (3,))
    root = optx.root_find(
        lambda x, _: x + g(x) - y, optx.Newton(rtol=1e-6, atol=1e-6), y
    )
    np.testing.assert_allclose(
        residual.banach_inverse(g, y, lipschitz=0.8).x, root.value, atol=1e-5
    )


# --- contraction_mlp ------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_spectral_norms(wide, depth):
    with enable_x64(wide):
        net = residual.contraction_mlp(
            jr.key(0), dim=3, width=8, depth=depth, lipschitz=0.7
        )
        norms = [jnp.linalg.norm(layer.weight, 2) for layer in net.layers]
        assert len(norms) == depth + 1
        np.testing.assert_allclose(norms, 0.7 ** (1 / (depth + 1)), rtol=1e-6)
        xs = 3 * jr.normal(jr.key(1), (200, 3))
        jacobians = jax.vmap(jax.jacfwd(net))(xs)
        assert jnp.max(jnp.linalg.norm(jacobians, 2, axis=(1, 2))) <= 0.7 * (1 + 1e-6)


@pytest.mark.usefixtures("x64")
def test_network_dtype():
    net = residual.contraction_mlp(
        jr.key(0), dim=2, width=4, depth=1, lipschitz=0.5, dtype=jnp.float32
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(eqx.filter(net, eqx.is_array))} == {
        jnp.dtype("float32")
    }


def test_network_errors():
    with pytest.raises(ValueError, match=r"1-Lipschitz.*of slope 1\.1"):
        residual.contraction_mlp(
            jr.key(0), dim=2, width=4, depth=1, lipschitz=0.5, activation=jax.nn.silu
        )
    with pytest.raises(ValueError, match="got dim=0, width=4, depth=1"):
        residual.contraction_mlp(jr.key(0), dim=0, width=4, depth=1, lipschitz=0.5)
    for activation in (jax.nn.relu, jnp.sin, jax.nn.softplus):
        residual.contraction_mlp(
            jr.key(0), dim=2, width=4, depth=1, lipschitz=0.5, activation=activation
        )


def test_public_names():
    for name in ("ResidualMap", "BanachResult", "banach_inverse", "contraction_mlp"):
        assert getattr(gf, name) is getattr(residual, name)
