"""The continuous flow: against closed forms, its adjoints, its loss, its failures."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.scipy.linalg
import numpy as np
import pytest
from conftest import enable_x64
from flowjax.bijections import Chain, Invert, Scan
from flowjax.distributions import StandardNormal, Transformed

import gauss_flows as gf
from gauss_flows import continuous

# a solver's tolerance of each dtype, and what a round trip of a short flow then keeps
TOLERANCE = {"float32": (1e-6, 2e-4), "float64": (1e-12, 1e-10)}
TIGHT = {"rtol": 1e-11, "atol": 1e-11}
MATRIX = ((0.5, -1.5, 0.2), (1.0, -0.3, 0.0), (0.1, 0.4, -0.9))


class Linear(eqx.Module):
    """dx/dt = A x, whose map is the matrix exponential."""

    matrix: jax.Array

    def __call__(self, t, x):
        return (self.matrix @ x.ravel()).reshape(x.shape)


class Driven(eqx.Module):
    """dx/dt = a x + cos t, one number."""

    a: jax.Array

    def __call__(self, t, x):
        return self.a * x + jnp.cos(t)


SEEN = []


def counted(t, x):
    """A field that tells the host of each evaluation."""

    def host(x):
        SEEN.append(0)
        return x

    return jnp.sin(5 * t + jax.pure_callback(host, x, x))


def linear(**options):
    return continuous.ContinuousMap(
        Linear(jnp.array(MATRIX)), shape=(3,), **{**TIGHT, **options}
    )


def flow(seed=0, dim=2, **options):
    return continuous.continuous_flow(jr.key(seed), dim=dim, nn_width=12, **options)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


# --- the map --------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", continuous.SOLVERS)
def test_linear_field_is_the_matrix_exponential(solver):
    matrix, x = jnp.array(MATRIX), jnp.array([1.0, -2.0, 0.5])
    expected = jax.scipy.linalg.expm(matrix)
    options = {} if solver != "bosh3" else {"rtol": 1e-8, "atol": 1e-8}
    atol = 1e-9 if solver != "bosh3" else 1e-6
    bijection = linear(solver=solver, **options)
    y, log_det = bijection.transform_and_log_det(x)
    np.testing.assert_allclose(y, expected @ x, atol=atol)
    np.testing.assert_allclose(log_det, jnp.trace(matrix), atol=1e-12)
    back, inverse_log_det = bijection.inverse_and_log_det(expected @ x)
    np.testing.assert_allclose(back, x, atol=10 * atol)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_time_reaches_the_field():
    """x' = a x + cos t from t = 0, solved by hand; the time runs backwards too."""
    a, x = 0.7, jnp.array(0.4)
    bijection = continuous.ContinuousMap(Driven(jnp.array(a)), shape=(), **TIGHT)
    particular = lambda t: (np.sin(t) - a * np.cos(t)) / (1 + a**2)  # noqa: E731
    expected = particular(1.0) + (x - particular(0.0)) * np.exp(a)
    np.testing.assert_allclose(bijection.transform(x), expected, rtol=1e-9)
    np.testing.assert_allclose(bijection.inverse(expected), x, rtol=1e-9)
    times = jnp.array([0.0, 0.3, 1.0])
    by_hand = particular(times) + (x - particular(0.0)) * np.exp(a * times)
    walked = continuous.path(bijection, x, times)
    np.testing.assert_allclose(walked, by_hand, rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_events_of_any_shape():
    """A picture of 3 numbers goes where the vector goes, log-det and energy too."""
    x, one = jnp.array([1.0, -2.0, 0.5]), linear()
    picture = continuous.ContinuousMap(one.field, shape=(1, 3, 1), **TIGHT)
    y, log_det = picture.transform_and_log_det(x.reshape(1, 3, 1))
    assert y.shape == (1, 3, 1)
    np.testing.assert_allclose(y.ravel(), one.transform(x), rtol=1e-10)
    np.testing.assert_allclose(log_det, jnp.trace(jnp.array(MATRIX)), rtol=1e-12)


@eqx.filter_jit
def both_ways(bijection, x):
    def one(x):
        y, log_det = bijection.transform_and_log_det(x)
        back, inverse_log_det = bijection.inverse_and_log_det(y)
        jacobian = jax.jacfwd(bijection.transform)(x)
        forth = bijection.transform(bijection.inverse(x))
        dense = jnp.linalg.slogdet(jacobian)[1]
        return y, back, forth, log_det, -inverse_log_det, dense

    return jax.vmap(one)(x)


def tabled(key, dtype):
    """What stands in the table of all bijections."""
    tolerance = TOLERANCE[str(jnp.dtype(dtype))][0]
    made = continuous.continuous_flow(
        key, dim=3, nn_width=8, dtype=dtype, rtol=tolerance, atol=tolerance,
        max_steps=256, solver="dopri8", adjoint="direct",
    )  # fmt: skip
    return gf.normalizing_map(made)


def test_round_trip_and_log_det_against_autodiff(dtype):
    bijection, tolerance = tabled(jr.key(0), dtype), TOLERANCE[str(dtype)][1]
    x = 2.5 * jr.normal(jr.key(1), (16, 3), dtype)
    y, back, forth, log_det, inverse_log_det, dense = both_ways(bijection, x)
    assert all(v.dtype == dtype for v in (y, back, log_det, inverse_log_det))
    near = {"atol": tolerance, "rtol": tolerance}
    np.testing.assert_allclose(back, x, **near)
    np.testing.assert_allclose(forth, x, **near)
    near["atol"] *= 10
    np.testing.assert_allclose(inverse_log_det, log_det, **near)
    np.testing.assert_allclose(dense, log_det, **near)
    alone = bijection.transform_and_log_det(x[0])
    np.testing.assert_allclose(alone[0], y[0], **near)
    np.testing.assert_allclose(alone[1], log_det[0], **near)
    far = both_ways(bijection, 1e4 * x)
    assert all(jnp.isfinite(v).all() for v in far)


@pytest.mark.usefixtures("x64")
def test_scan_equals_chain():
    bijection = tabled(jr.key(0), jnp.float64)
    stacked = jax.tree.map(
        lambda a: jnp.stack([a, 0.9 * a]) if eqx.is_array(a) else a, bijection
    )
    scan, x = Scan(stacked), jr.normal(jr.key(1), (3,))
    scanned = scan.transform_and_log_det(x)
    chained = Chain(gf.blocks(scan)).transform_and_log_det(x)
    for one, other in zip(scanned, chained, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_float32_stays_float32_in_64_bit_mode():
    narrow = flow(dtype=jnp.float32)
    x = jr.normal(jr.key(1), (4, 2), jnp.float32)
    bijection = gf.normalizing_map(narrow)
    for value in (
        *jax.vmap(bijection.transform_and_log_det)(x),
        bijection.inverse(x[0]),
    ):
        assert value.dtype == jnp.float32
    assert continuous.Likelihood()(narrow, x, jr.key(2)).dtype == jnp.float32
    assert continuous.path(narrow, x[0], jnp.linspace(0, 1, 3)).dtype == jnp.float32
    wide = jax.vmap(bijection.transform)(x.astype(jnp.float64))
    assert wide.dtype == jnp.float64


def test_identity_start():
    bijection = gf.normalizing_map(flow(identity_init=True))
    y, log_det = bijection.transform_and_log_det(jnp.array([0.3, -2.0]))
    np.testing.assert_array_equal(y, jnp.array([0.3, -2.0]))
    assert log_det == 0


@pytest.mark.usefixtures("x64")
def test_log_prob_integrates_to_one():
    made = flow(rtol=1e-7, atol=1e-7)
    made = eqx.tree_at(
        lambda f: f.bijection.bijection.field.net.layers[-1].weight,
        made,
        replace_fn=lambda w: 3 * w,
    )
    t = jnp.linspace(-8, 8, 81)
    grid = jnp.stack(jnp.meshgrid(t, t), -1).reshape(-1, 2)
    mass = jnp.exp(made.log_prob(grid)).sum() * (t[1] - t[0]) ** 2
    np.testing.assert_allclose(mass, 1, atol=2e-3)


@pytest.mark.usefixtures("x64")
def test_either_orientation():
    """A map from latent to data, as for flow matching: the same density in the end."""
    inner = linear()
    there = Transformed(StandardNormal((3,)), Invert(inner))
    reverse = continuous.ContinuousMap(Linear(-inner.field.matrix), shape=(3,), **TIGHT)
    here = Transformed(StandardNormal((3,)), reverse)
    x = jr.normal(jr.key(0), (5, 3))
    loss = continuous.Likelihood(probes=None, kinetic=0.3, frobenius=0.2)
    np.testing.assert_allclose(here.log_prob(x), there.log_prob(x), rtol=1e-8)
    np.testing.assert_allclose(
        loss(here, x, jr.key(1)), loss(there, x, jr.key(1)), rtol=1e-8
    )


# --- evaluations and failures ---------------------------------------------------------


@pytest.mark.parametrize("solver", continuous.SOLVERS)
def test_evaluations_are_those_that_were_made(solver):
    x = jnp.array([1.0, 2.0])
    made = continuous.ContinuousMap(counted, shape=(2,), solver=solver, rtol=1e-6)
    SEEN.clear()
    # alone, since a callback has no derivative for the trace
    _, counts = continuous._solve(made, continuous._velocity, x, counted, False)
    jax.effects_barrier()
    more = len(SEEN) - continuous._evaluations(made, counts["num_steps"])
    assert 0 <= more <= min(1, counts["num_rejected_steps"])
    found = continuous.integrate(flow(solver=solver), x)
    assert found.evaluations == continuous._evaluations(made, found.steps)
    assert 0 <= found.rejected < found.steps


def test_evaluations_grow_as_the_tolerance_falls():
    counts = []
    for tolerance in (1e-3, 1e-4, 1e-5):
        made = continuous.with_options(flow(), rtol=tolerance, atol=tolerance / 10)
        counts.append(
            int(continuous.integrate(made, jnp.array([3.0, 1.0])).evaluations)
        )
    assert counts[0] <= counts[1] <= counts[2]
    assert counts[0] < counts[2]


@pytest.mark.usefixtures("x64")
def test_kinetic_energy_of_a_linear_field():
    matrix, x = jnp.array(MATRIX), jnp.array([1.0, -2.0, 0.5])
    t = np.linspace(0, 1, 2001)
    speeds = [jnp.sum((matrix @ jax.scipy.linalg.expm(s * matrix) @ x) ** 2) for s in t]
    expected = np.trapezoid(speeds, t)
    there = continuous.integrate(linear(), x)
    back = continuous.integrate(linear(), there.x, backwards=True)
    np.testing.assert_allclose(there.kinetic, expected, rtol=1e-6)
    np.testing.assert_allclose(back.kinetic, there.kinetic, rtol=1e-8)


def test_too_few_steps_raise_and_say_how_many():
    made = flow(max_steps=1, rtol=1e-6)
    message = r"max_steps=1 steps at rtol=1e-06 and atol=1e-05"
    with pytest.raises(Exception, match=message):
        made.log_prob(jnp.ones((4, 2)))
    with pytest.raises(Exception, match=message):
        made.sample(jr.key(0))
    with pytest.raises(Exception, match=message):
        continuous.Likelihood()(made, jnp.ones((4, 2)), jr.key(0))
    with pytest.raises(Exception, match=message):
        gf.normalizing_map(made).transform(jnp.ones(2))


def test_a_field_or_event_that_is_not_finite_raises():
    with pytest.raises(Exception, match="not finite"):
        flow(max_steps=64).log_prob(jnp.array([jnp.nan, 0.0]))
    broken = eqx.tree_at(
        lambda f: f.bijection.bijection.field.net.layers[-1].bias,
        flow(max_steps=64),
        replace_fn=lambda b: jnp.full_like(b, jnp.nan),
    )
    with pytest.raises(Exception, match="not finite"):
        broken.log_prob(jnp.zeros(2))


def test_a_solution_that_leaves_in_finite_time_raises():
    """x' = x^2 from 2 is at infinity at time 1/2."""
    bijection = continuous.ContinuousMap(lambda t, x: x**2, shape=(1,))
    with pytest.raises(Exception, match="got no solution"):
        bijection.transform(jnp.array([2.0]))
    np.testing.assert_allclose(bijection.transform(jnp.array([0.5])), 1.0, rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_a_failure_of_the_backward_equation_raises():
    """Contracting forwards is one step; backwards the same equation explodes."""
    bijection = continuous.ContinuousMap(
        Linear(-60 * jnp.eye(2)), shape=(2,), max_steps=40, adjoint="backsolve"
    )
    x = jnp.array([1e-3, 2e-3])
    assert jnp.isfinite(bijection.transform(x)).all()
    tight = continuous.with_options(bijection, rtol=1e-10, atol=1e-16, max_steps=2000)
    few = continuous.with_options(tight, max_steps=20)
    with pytest.raises(Exception, match=r"steps"):
        jax.grad(lambda x: few.transform(x).sum())(x)


# --- derivatives ----------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adjoint", ["checkpoint", "direct", "backsolve"])
def test_gradients_of_a_linear_field(adjoint):
    """By the matrix, the event and through the log-determinant, against expm."""
    bijection = linear(adjoint=adjoint, max_steps=128, solver="dopri8")
    x, matrix = jnp.array([1.0, -2.0, 0.5]), jnp.array(MATRIX)

    def solved(inputs):
        bijection, x = inputs
        y, log_det = bijection.transform_and_log_det(x)
        return jnp.sum(jnp.sin(y)) + log_det**2

    def by_hand(inputs):
        matrix, x = inputs
        y = jax.scipy.linalg.expm(matrix) @ x
        return jnp.sum(jnp.sin(y)) + jnp.trace(matrix) ** 2

    got, of_x = eqx.filter_grad(solved)((bijection, x))
    expected, of_x_expected = jax.grad(by_hand)((matrix, x))
    np.testing.assert_allclose(got.field.matrix, expected, atol=1e-8)
    np.testing.assert_allclose(of_x, of_x_expected, atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adjoint", ["forward", "direct"])
def test_forward_mode(adjoint):
    jacobian = jax.jacfwd(linear(adjoint=adjoint, max_steps=256).transform)(jnp.ones(3))
    np.testing.assert_allclose(
        jacobian, jax.scipy.linalg.expm(jnp.array(MATRIX)), atol=1e-9
    )
    values = gf.probe.singular_values(linear(adjoint=adjoint), jnp.ones(3))
    expected = jnp.linalg.svd(
        jax.scipy.linalg.expm(jnp.array(MATRIX)), compute_uv=False
    )
    np.testing.assert_allclose(values, expected, rtol=1e-8)


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
def test_reverse_mode_alone_says_so(adjoint):
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jacfwd(linear(adjoint=adjoint, rtol=1e-4).transform)(jnp.ones(3))


def test_gradients_are_finite_far_out():
    made = flow(rtol=1e-4)

    def total(both):
        made, x = both
        return made.log_prob(x).sum() + gf.normalizing_map(made).inverse(x[0]).sum()

    x = jnp.array([[1.0, -1.0], [1e3, 10.0], [1e5, -1e5]])
    for leaf in jax.tree.leaves(eqx.filter_grad(total)((made, x))):
        assert jnp.isfinite(leaf).all()


# --- the loss -------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_the_exact_loss_is_minus_the_mean_log_density():
    made, x = flow(**TIGHT), jr.normal(jr.key(1), (6, 2))
    loss = continuous.Likelihood(probes=None)
    np.testing.assert_allclose(
        loss(made, x, jr.key(2)), -made.log_prob(x).mean(), rtol=1e-8
    )
    one, other = (loss(made, x, jr.key(k)) for k in (2, 3))
    assert one == other


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("noise", "probes"), [("rademacher", 1), ("gaussian", 2)])
def test_the_estimate_has_the_right_mean_and_variance(noise, probes):
    """Linear field: the trace estimate's law is known, and its gradient's mean."""
    base = StandardNormal((3,))
    made = Transformed(base, Invert(linear(rtol=1e-8, atol=1e-8)))
    x = jnp.zeros((1, 3))  # stays where it is: all that varies is the trace
    loss = continuous.Likelihood(probes=probes, noise=noise)
    value_and_grad = eqx.filter_value_and_grad(lambda made, key: loss(made, x, key))
    draws = 4000
    values, gradients = eqx.filter_jit(
        eqx.filter_vmap(value_and_grad, in_axes=(None, 0))
    )(made, jr.split(jr.key(1), draws))
    matrix = np.array(MATRIX)
    symmetric = (matrix + matrix.T) / 2
    variance = 2 * np.sum(symmetric**2)
    if noise == "rademacher":
        variance -= 2 * np.sum(np.diag(symmetric) ** 2)
    variance /= probes
    exact = -base.log_prob(x).mean() - np.trace(matrix)
    assert abs(values.mean() - exact) < 4 * np.sqrt(variance / draws)
    np.testing.assert_allclose(values.var(), variance, rtol=0.15)
    gradient = gradients.bijection.bijection.field.matrix
    error = np.asarray(gradient.std(axis=0)) / np.sqrt(draws) + 1e-9
    assert np.all(np.abs(gradient.mean(axis=0) + np.eye(3)) < 5 * error)


def test_keys_make_the_probes():
    made, x = flow(rtol=1e-4), jr.normal(jr.key(1), (8, 2))
    loss = continuous.Likelihood()
    same, again, other = (loss(made, x, jr.key(k)) for k in (2, 2, 3))
    assert same == again
    assert same != other
    # each event has its own probes: equal ones share a step's noise by chance only
    probes = loss._probes(jr.key(2), jnp.zeros((200, 3)))
    assert probes.shape == (200, 1, 3)
    assert jnp.abs(jnp.corrcoef(probes[:-1].ravel(), probes[1:].ravel())[0, 1]) < 0.2
    assert set(np.unique(probes)) == {-1.0, 1.0}


@pytest.mark.usefixtures("x64")
def test_regularisation_of_a_linear_field():
    x, matrix = jr.normal(jr.key(0), (4, 3)), jnp.array(MATRIX)
    made = Transformed(StandardNormal((3,)), Invert(linear()))
    plain, kinetic, frobenius = (
        continuous.Likelihood(probes=None, **weights)(made, x, jr.key(1))
        for weights in ({}, {"kinetic": 0.5}, {"frobenius": 0.25})
    )
    energies = jax.vmap(lambda x: continuous.integrate(made, x).kinetic)(x)
    np.testing.assert_allclose(kinetic - plain, 0.5 * energies.mean(), rtol=1e-6)
    np.testing.assert_allclose(frobenius - plain, 0.25 * jnp.sum(matrix**2), rtol=1e-8)
    draws = [
        continuous.Likelihood(frobenius=1.0, probes=200)(made, x, jr.key(k))
        - continuous.Likelihood(probes=200)(made, x, jr.key(k))
        for k in range(3)
    ]
    np.testing.assert_allclose(np.mean(draws), jnp.sum(matrix**2), rtol=0.1)


def test_equal_losses_are_one_program():
    assert continuous.Likelihood(kinetic=0.1) == continuous.Likelihood(kinetic=0.1)
    assert hash(continuous.Likelihood()) == hash(continuous.Likelihood())
    assert continuous.Likelihood() != continuous.Likelihood(probes=2)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
def test_training_with_the_estimate_raises_the_exact_likelihood(adjoint):
    x = gf.data.two_moons(jr.key(0), 1000)
    x = gf.data.standardize(x, like=x)
    made = flow(rtol=1e-3, atol=1e-3, adjoint=adjoint)
    before = gf.mean_log_prob(made, x)
    loss = continuous.Likelihood(kinetic=0.01, frobenius=0.01)
    fitted = gf.fit(
        jr.key(1), made, x[:900], steps=60, batch_size=128, learning_rate=0.02,
        x_val=x[900:], eval_every=30, loss=loss, progress=False,
    )  # fmt: skip
    after = gf.mean_log_prob(fitted.final_flow, x)
    assert after > before + 0.15
    assert np.isfinite(fitted.val_loss).all()


# --- the stack ------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_the_stack_is_eulers_method():
    made, x = flow(), jnp.array([0.3, -1.0])
    field = made.bijection.bijection.field
    stack = continuous.residual_stack(made, depth=5, lipschitz=4.0)
    y = x
    for k in range(5):
        y = y + field(jnp.array(k / 5), y) / 5
    np.testing.assert_allclose(gf.normalizing_map(stack).transform(x), y, rtol=1e-14)
    assert len(gf.blocks(stack)) == 5
    back = gf.normalizing_map(stack).inverse(y)
    np.testing.assert_allclose(back, x, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_stack_tends_to_the_flow_at_rate_one():
    made = flow(3, **TIGHT)
    bound = float(made.bijection.bijection.field.lipschitz_bound())
    x = jr.normal(jr.key(1), (20, 2))
    limit, log_prob = jax.vmap(gf.normalizing_map(made).transform)(x), made.log_prob(x)
    errors = []
    for depth in (64, 128, 256):
        stack = continuous.residual_stack(made, depth=depth, lipschitz=bound)
        y = jax.vmap(gf.normalizing_map(stack).transform)(x)
        apart = jnp.abs(y - limit).max(), jnp.abs(stack.log_prob(x) - log_prob).max()
        errors.append(jnp.stack(apart))
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(rates, 1, atol=0.1)


def test_times_of_the_stack_are_not_trained():
    made = flow(rtol=1e-3)
    stack = continuous.residual_stack(made, depth=4, lipschitz=3.9)
    x = jr.normal(jr.key(0), (200, 2))
    fitted = gf.fit(
        jr.key(1), stack, x, steps=3, batch_size=50, eval_every=3, progress=False
    ).final_flow
    for before, after in zip(gf.blocks(stack), gf.blocks(fitted), strict=True):
        assert after.g.t.tree == before.g.t.tree
        old, new = (b.g.field.net.layers[0].weight for b in (before, after))
        assert (old != new).any()


def test_stack_of_a_bijection_is_one():
    inner = gf.normalizing_map(flow())
    stack = continuous.residual_stack(inner, depth=4, lipschitz=3.0)
    assert isinstance(stack, gf.Stack)
    inverted = continuous.residual_stack(Invert(inner), depth=4, lipschitz=3.0)
    y = stack.transform(jnp.ones(2))
    np.testing.assert_allclose(inverted.inverse(y), stack.transform(y), rtol=1e-5)


def test_the_lipschitz_bound_is_one():
    with enable_x64(True):
        field = continuous.TimeField(jr.key(2), dim=3, width=16)
        x = 3 * jr.normal(jr.key(0), (200, 3))
        t = jr.uniform(jr.key(1), (200,))
        jacobians = jax.vmap(jax.jacfwd(field, argnums=1))(t, x)
        largest = jnp.linalg.norm(jacobians, 2, axis=(1, 2)).max()
        assert 0.1 * field.lipschitz_bound() < largest <= field.lipschitz_bound()
        one = continuous.TimeField(jr.key(2), dim=3, width=1, depth=1)
        weight = one.net.layers[0].weight[:, :3]
        expected = jnp.linalg.norm(weight) * jnp.linalg.norm(one.net.layers[1].weight)
        np.testing.assert_allclose(one.lipschitz_bound(), expected, rtol=1e-12)


# --- arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0}, "rtol"),
        ({"atol": float("inf")}, "atol"),
        ({"max_steps": 0}, "max_steps"),
        ({"solver": "euler"}, "expected solver in"),
        ({"adjoint": "magic"}, "expected adjoint in"),
        ({"dim": 0}, "dim"),
        ({"nn_depth": 0}, "depth"),
        ({"nn_width": 0}, "width"),
        ({"base": StandardNormal((3,))}, r"shape \(2,\), got shape \(3,\)"),
    ],
)
def test_arguments_of_the_flow(options, message):
    with pytest.raises(ValueError, match=message):
        continuous.continuous_flow(jr.key(0), **{"dim": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes"),
        ({"noise": "pink"}, "expected noise in"),
        ({"kinetic": -1.0}, "kinetic"),
        ({"frobenius": float("nan")}, "frobenius"),
    ],
)
def test_arguments_of_the_loss(options, message):
    with pytest.raises(ValueError, match=message):
        continuous.Likelihood(**options)


def test_other_arguments():
    made = flow()
    with pytest.raises(ValueError, match="keeps the shape"):
        continuous.ContinuousMap(lambda t, x: x[:1], shape=(2,))
    with pytest.raises(ValueError, match=r"depth above the field's Lipschitz bound 4"):
        continuous.residual_stack(made, depth=4, lipschitz=4.0)
    with pytest.raises(ValueError, match="depth"):
        continuous.residual_stack(made, depth=0, lipschitz=0.0)
    other = gf.coupling_flow(jr.key(0), dim=2, depth=2)
    for function in (
        lambda f: continuous.residual_stack(f, depth=2, lipschitz=1.0),
        lambda f: continuous.integrate(f, jnp.zeros(2)),
        lambda f: continuous.Likelihood()(f, jnp.zeros((3, 2)), jr.key(0)),
        lambda f: continuous.with_options(f, rtol=1e-3),
    ):
        with pytest.raises(ValueError, match="ContinuousMap"):
            function(other)
    with pytest.raises(ValueError, match=r"an event of shape \(2,\), got \(3, 2\)"):
        continuous.integrate(made, jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="a batch of events"):
        continuous.Likelihood()(made, jnp.zeros(2), jr.key(0))
    with pytest.raises(TypeError, match="tolerance"):
        continuous.with_options(made, tolerance=1e-3)


def test_with_options_changes_what_was_asked_for():
    made = flow(rtol=1e-3, adjoint="direct")
    inner = gf.normalizing_map(continuous.with_options(made, atol=1e-2, max_steps=7))
    assert (inner.rtol, inner.atol, inner.max_steps) == (1e-3, 1e-2, 7)
    assert (inner.solver, inner.adjoint) == ("tsit5", "direct")
    assert eqx.tree_equal(inner.field, gf.normalizing_map(made).field)
    seeds = eqx.filter_vmap(flow)(jnp.arange(3))
    assert gf.normalizing_map(continuous.with_options(seeds, atol=1e-2)).atol == 1e-2
