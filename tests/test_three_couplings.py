from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import ot
import pytest
from conftest import enable_x64

from gauss_flows.theory import three_couplings as tc

TARGETS = {"annulus": tc.annulus(), "half-annuli": tc.half_annuli()}
targets = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
Z = tc.RADIUS


once = partial(eqx.filter_jit, compiler_options={"xla_backend_optimization_level": 0})


@once
def climb(stairs, x):
    return stairs(x), stairs.on_ramp(x)


@once
def forward(chain, z):
    return jax.vmap(chain.transform_and_log_det)(z)


@once
def transport(target, first, second):
    return jnp.stack(target.transport(first, second), axis=1)


@once
def slices(target, z):
    height = target.marginal(z[:, 0])
    return jnp.stack([target.conditional(height, z[:, 1]), height], axis=1)


@once
def backward(chain, y):
    return jax.vmap(chain.inverse_and_log_det)(y)


def three(target, epsilon, **options):
    options = {"bound": target.bound, **options}
    return tc.three_couplings(target.transport, epsilon, **options)


def two(target, epsilon, **options):
    options = {"bound": target.bound, **options}
    return tc.two_couplings(target.marginal, target.conditional, epsilon, **options)


def sliced(x, y):
    return ot.sliced_wasserstein_distance(
        np.asarray(x), np.asarray(y), n_projections=50, seed=0
    )


# the staircase


def test_a_staircase_rounds_off_its_ramps_and_never_errs_by_more_than_half_a_step(x64):
    stairs = tc.Staircase(0.25, ramp=0.08, bound=2.0, offset=0.1)
    x = np.linspace(-1.9, 2.1, 20_001)
    steps, on = map(np.asarray, climb(stairs, jnp.asarray(x)))
    rounded = 0.1 + 0.25 * np.round((x - 0.1) / 0.25)
    np.testing.assert_allclose(steps[~on], rounded[~on], atol=1e-14)
    assert np.abs(steps - x).max() <= 0.125 + 1e-14
    assert 0.07 < on.mean() < 0.09
    # continuous: no jump larger than the slope 1 / ramp allows
    assert np.abs(np.diff(steps)).max() <= 2e-4 / 0.08 * 1.01


def test_a_staircase_levels_off(x64):
    stairs = tc.Staircase(0.5, ramp=0.01, bound=2.2)
    np.testing.assert_allclose(
        climb(stairs, jnp.array([-9.0, 2.6, 50.0]))[0], [-2.5, 2.5, 2.5]
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_its_network_is_the_same_function(dtype, x64):
    stairs = tc.Staircase(0.25, ramp=0.05, bound=1.2, offset=0.03, dtype=dtype)
    thresholds, weights, constant = stairs.network()
    assert len(thresholds) == 4 * 5
    assert thresholds.dtype == dtype
    x = np.linspace(-3, 3, 4001, dtype=dtype)
    thresholds, weights = np.asarray(thresholds), np.asarray(weights)
    network = constant + np.maximum(x[:, None] - thresholds, 0) @ weights
    steps = climb(stairs, jnp.asarray(x))[0]
    np.testing.assert_allclose(network, steps, atol=2e4 * jnp.finfo(dtype).eps)
    assert steps.dtype == dtype


# the targets


@targets
def test_both_images_have_the_uniform_law_on_the_rings(target, x64):
    z = jr.normal(jr.key(0), (20_000, 2))
    both = [np.asarray(transport(target, *z.T)), np.asarray(slices(target, z))]
    for x in both:
        assert np.abs(x).max() <= target.bound
        inside = np.zeros(len(x), bool)
        for centre, side in zip(target.centres, target.sides, strict=True):
            radius = np.hypot(*(x - np.array(centre)).T)
            ring = (radius > target.inner - 1e-9) & (radius < target.outer + 1e-9)
            inside |= ring & (side * (x[:, 1] - centre[1]) >= -1e-9)
        assert inside.all()
    # a small square deep inside holds its share of the area
    at = np.array(target.centres[0])
    at[1] += (target.inner + target.outer) / 2
    share = 0.2**2 / target.area
    for x in both:
        hit = (np.abs(x - at) < 0.1).all(axis=1).mean()
        np.testing.assert_allclose(hit, share, rtol=0.2)
    assert sliced(*both) < 0.02


# the theorem on three


@targets
@pytest.mark.parametrize("epsilon", [0.5, 0.002])
def test_each_coordinate_is_within_the_step(target, epsilon, x64):
    chain = three(target, epsilon)
    stairs, write = chain.bijections[0].shift, chain.bijections[1].shift
    z = jr.normal(jr.key(1), (20_000, 2))
    image = forward(chain, z)[0]
    goal = transport(target, climb(stairs, z[:, 0])[0], z[:, 1])
    ramp = np.asarray(climb(stairs, z[:, 0])[1] | climb(write.stairs, goal[:, 0])[1])
    assert ramp.mean() < 4 * epsilon**2 / 100 + 2e-3
    error = np.abs(image - goal)[~ramp]
    assert error.max() <= epsilon
    assert error[:, 0].max() > 0.65 * epsilon, "the constant is not idle"


def test_the_bound_needs_the_stated_scales(x64):
    """With a larger scale of the second coupling the digits run into each other."""
    target = TARGETS["annulus"]
    chain = three(target, 0.05)
    wide = eqx.tree_at(
        lambda c: c.bijections[1].scale, chain, replace_fn=lambda a: 300 * a
    )
    z = jr.normal(jr.key(1), (4000, 2))
    goal = transport(target, *z.T)

    def error(chain):
        return jnp.sqrt(jnp.mean((forward(chain, z)[0] - goal) ** 2))

    assert error(wide) > 2 * error(chain)


def test_on_the_ramps_it_is_wrong_but_bounded(x64):
    target, epsilon = TARGETS["annulus"], 0.1
    chain = three(target, epsilon, ramp=0.1)
    z = jr.normal(jr.key(1), (20_000, 2))
    image = forward(chain, z)[0]
    error = jnp.abs(image - transport(target, *z.T))
    assert (error.max(axis=0) > 3 * epsilon).all()
    assert error[:, 0].max() <= 2.45 * target.bound
    assert error[:, 1].max() <= 2.7 * target.bound


def test_some_offset_keeps_the_image_off_the_ramps(x64):
    """On average over offsets the share on ramps is the ramp's."""
    target, epsilon, ramp = TARGETS["annulus"], 0.4, 0.05
    first = transport(target, *jr.normal(jr.key(2), (2, 20_000)))[:, 0]
    shares = [
        np.mean(climb(tc.Staircase(epsilon, ramp=ramp, bound=2.0, offset=o), first)[1])
        for o in np.linspace(0, epsilon, 40, endpoint=False)
    ]
    np.testing.assert_allclose(np.mean(shares), ramp, rtol=0.05)
    assert np.ptp(shares) > 0.004


def test_jacobian_is_the_one_of_the_proposition(x64):
    target, epsilon = TARGETS["annulus"], 0.05
    chain = three(target, epsilon)
    B = target.bound
    delta, eta, nu = (b.scale for b in chain.bijections)
    z = jnp.array([0.41, -0.73])
    a = once(lambda y: jax.grad(lambda y: target.transport(0.4 + 0 * y, y)[1])(y))(z[1])
    expected = jnp.array(
        [[eta, 0.4 * epsilon / B * a], [B * eta / (0.4 * epsilon), a + nu * delta]]
    )
    np.testing.assert_allclose(
        once(lambda z: jax.jacobian(chain.transform)(z))(z), expected, rtol=1e-9
    )
    np.testing.assert_allclose(
        delta * eta * nu, 0.02 * epsilon**4 / (B * Z**3), rtol=1e-12
    )
    log_det = forward(chain, z[None])[1][0]
    np.testing.assert_allclose(log_det, jnp.log(delta * eta * nu), rtol=1e-13)


# the theorem on two


@targets
@pytest.mark.parametrize("epsilon", [0.5, 0.002])
def test_two_couplings_are_within_the_step_too(target, epsilon, x64):
    chain = two(target, epsilon)
    stairs = chain.bijections[0].shift.stairs
    z = jr.normal(jr.key(1), (20_000, 2))
    image = forward(chain, z)[0]
    height = slices(target, z)[:, 1]
    goal = once(lambda y, z: target.conditional(stairs(y), z))(height, z[:, 1])
    off = ~np.asarray(climb(stairs, height)[1])
    assert np.abs(image[:, 1] - height)[off].max() <= 0.9 * epsilon
    assert np.abs(image[:, 0] - goal)[off].max() <= epsilon
    delta, eta = (b.scale for b in chain.bijections)
    np.testing.assert_allclose(delta * eta, 0.4 * epsilon**2 / Z**2, rtol=1e-12)


@pytest.mark.parametrize("build", [three, two])
def test_it_reaches_the_target(build, x64):
    target = TARGETS["half-annuli"]
    z = jr.normal(jr.key(3), (10_000, 2))
    x = transport(target, *jr.normal(jr.key(4), (2, 10_000)))
    coarse, fine = (
        sliced(x, forward(build(target, epsilon), z)[0]) for epsilon in (0.5, 0.01)
    )
    assert fine < 0.025 < 1.5 * coarse


# as bijections


@pytest.mark.parametrize("build", [three, two])
def test_inverse_log_det_and_pairs(build, x64):
    target, dim = TARGETS["annulus"], 6
    chain = build(target, 0.1, dim=dim)
    z = jr.normal(jr.key(5), (200, dim))
    y, log_det = forward(chain, z)
    back, back_log_det = backward(chain, y)
    np.testing.assert_allclose(jnp.median(jnp.abs(back - z)), 0, atol=1e-9)
    np.testing.assert_allclose(back_log_det, -log_det, rtol=1e-13)
    pair = build(target, 0.1)
    half = dim // 2
    for i in range(half):
        one, part = forward(pair, z[:, [i, i + half]])
        np.testing.assert_allclose(y[:, [i, i + half]], one, atol=1e-13)
        np.testing.assert_allclose(log_det, half * part, rtol=1e-13)


def test_a_transport_may_mix_the_pairs(x64):
    target, dim, epsilon = TARGETS["annulus"], 4, 0.02
    rotation = np.linalg.qr(np.random.default_rng(6).normal(size=(dim, dim)))[0]

    def mixed(first, second):
        x = jnp.concatenate(target.transport(first, second))
        return tuple(jnp.split(jnp.tensordot(rotation, x, 1), 2))

    bound = 2**0.5 * target.bound
    chain = tc.three_couplings(mixed, epsilon, bound=bound, dim=dim)
    z = jr.normal(jr.key(7), (2000, dim))
    goal = once(lambda z: jnp.concatenate(mixed(*jnp.split(z.T, 2))).T)(z)
    error = np.asarray(forward(chain, z)[0] - goal)
    assert np.sqrt(np.mean(error**2)) < epsilon


def test_float32_runs_and_loses_the_digits_float64_keeps(x64):
    target = TARGETS["annulus"]
    z = jr.normal(jr.key(8), (500, 2))
    errors = {}
    for dtype in (jnp.float32, jnp.float64):
        chain = three(target, 0.01, dtype=dtype)
        y = forward(chain, z.astype(dtype))[0]
        assert y.dtype == dtype
        back = backward(chain, y)[0]
        errors[dtype] = float(jnp.median(jnp.abs(back - z)))
    assert errors[jnp.float64] < 1e-5 < 1 < errors[jnp.float32]


# errors


@pytest.mark.parametrize("build", [three, two])
def test_bad_steps_and_bounds(build):
    target = TARGETS["annulus"]
    for epsilon in (0.0, -0.1, np.nan):
        with pytest.raises(ValueError, match="epsilon to be finite"):
            build(target, epsilon)
    with pytest.raises(ValueError, match=r"epsilon <= 0\.6"):
        build(target, 0.7)
    with pytest.raises(ValueError, match="bound to be finite"):
        build(target, 0.1, bound=0.0)
    with pytest.raises(ValueError, match=r"ramp of at most 0\.1"):
        build(target, 0.1, ramp=0.2)
    with pytest.raises(ValueError, match="even number of coordinates, got 3"):
        build(target, 0.1, dim=3)


def test_a_step_too_small_for_the_dtype():
    target = TARGETS["annulus"]
    with pytest.raises(ValueError, match="float64 has room"):
        three(target, 1e-3, dtype=jnp.float32)
    least = tc.least_epsilon(1.2, jnp.float32)
    np.testing.assert_allclose(least, 1.2 * np.sqrt(10 * 2.0**-23))
    three(target, 1.01 * least, dtype=jnp.float32)
    with enable_x64(True):
        three(target, 1e-3)


def test_bad_rings():
    with pytest.raises(ValueError, match="0 < inner < outer"):
        tc.Rings(1.0, 0.5, ((0.0, 0.0),), (0,))
    with pytest.raises(ValueError, match="a side for each centre"):
        tc.Rings(0.5, 1.0, ((0.0, 0.0),), (0, 1))
    with pytest.raises(ValueError, match="scale to be finite"):
        tc.ShiftCoupling(jnp.sin, -1.0)
