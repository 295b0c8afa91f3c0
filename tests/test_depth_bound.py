"""The depth bound: each constant of the counting, and the generator."""

import itertools
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import betainc

from gauss_flows.theory import depth_bound as bound

CONSTANTS = {"norm": 3.0, "sensitivity": 2.0, "lipschitz": 5.0, "resolution": 0.1}


def test_places_are_on_the_sphere_and_apart(x64):
    means = bound.separated_means(jr.key(0), 40, 16, distance=1.0)
    np.testing.assert_allclose(jnp.linalg.norm(means, axis=1), 1, atol=1e-12)
    assert bound.smallest_distance(means) >= 1
    few = bound.separated_means(jr.key(0), 10, 16, distance=1.0)
    np.testing.assert_array_equal(few, means[:10])
    by_hand = min(
        float(jnp.linalg.norm(a - b)) for a, b in itertools.combinations(means, 2)
    )
    assert bound.smallest_distance(means) == pytest.approx(by_hand)


def test_a_full_sphere_is_told():
    # at most five points of the circle are more than 60 degrees apart
    with pytest.raises(ValueError, match="expected room for 6 points"):
        bound.separated_means(jr.key(0), 6, 2, distance=1.001, rounds=2)


@pytest.mark.parametrize("dim", [2, 3, 16, 128])
def test_the_cap_bound_holds_everywhere(dim):
    t = np.linspace(0.01, 0.99, 50)
    both_caps = betainc((dim - 1) / 2, 0.5, 1 - t**2)
    # one pair: 2 exp(-d t^2 / 2), the two caps
    limit = [bound.aligned_pair_bound(2, dim, float(c)) for c in t]
    assert (both_caps <= np.array(limit)).all()
    assert limit[-1] == pytest.approx(2 * math.exp(-dim * 0.99**2 / 2))
    assert bound.aligned_pair_bound(10, dim, 0.5) == pytest.approx(
        45 * bound.aligned_pair_bound(2, dim, 0.5)
    )


def test_packing_on_the_circle_is_known():
    # caps of 60 degrees to both sides cover a third of the circle
    assert bound.packing_bound(2, 1.0) == pytest.approx(3)
    assert bound.packing_bound(3, 1.0) == pytest.approx(4)  # a quarter of the sphere
    assert math.log(bound.packing_bound(64, 1.0)) > 64 * 0.5**2 / 2


@pytest.fixture
def generator(x64):
    means = bound.separated_means(jr.key(1), 12, 5, distance=0.6)
    return bound.ModeGenerator(means, sd=0.02, ramp=0.01)


def test_the_network_is_the_formula(generator):
    z = (
        jr.normal(jr.key(2), (500, 6))
        .at[:11, 0]
        .set(
            jnp.asarray(bound.thresholds(12)) + 0.002  # on the ramps
        )
    )
    t = jnp.asarray(bound.thresholds(12))
    ramp = jnp.clip((z[:, :1] - t) / 0.01 + 0.5, 0, 1)
    expected = (
        generator.means[0] + ramp @ jnp.diff(generator.means, axis=0) + 0.02 * z[:, 1:]
    )
    np.testing.assert_allclose(jax.vmap(generator)(z), expected, atol=1e-11)
    zeros = sum(
        int((np.asarray(a) != 0).sum())
        for a in (generator.inner, generator.outer, generator.outer_bias)
    ) + 2 * (12 - 1)  # the biases of the ramps
    assert generator.n_weights == zeros


def test_the_ideal_generator_draws_the_mixture(generator):
    z = jr.normal(jr.key(3), (60_000, 6))
    x = jax.vmap(generator.ideal)(z)
    which = cdist(x, generator.means).argmin(axis=1)
    share = np.bincount(which, minlength=12) / len(x)
    assert abs(share - 1 / 12).max() < 5 * math.sqrt(1 / 12 / len(x))
    assert (x - generator.means[which]).std() == pytest.approx(0.02, rel=0.02)


def test_the_error_is_within_its_bound(generator):
    z = jr.normal(jr.key(4), (200_000, 6))
    made, ideal = jax.vmap(generator)(z), jax.vmap(generator.ideal)(z)
    off = jnp.linalg.norm(made - ideal, axis=1)
    measured = float((off > 1e-9).mean())
    assert measured == pytest.approx(generator.ramp_mass, rel=0.05)
    assert 0.5 * generator.ramp_mass_bound < generator.ramp_mass
    assert generator.ramp_mass <= generator.ramp_mass_bound
    steps = jnp.linalg.norm(jnp.diff(generator.means, axis=0), axis=1)
    assert 0.45 * steps.max() < off.max() <= steps.max() / 2 + 1e-9
    assert off.mean() <= generator.w1_bound


def test_float32_generates_too():
    means = bound.random_means(jr.key(5), 8, 4)
    g = bound.ModeGenerator(means, sd=0.1, ramp=0.01)
    z = jr.normal(jr.key(6), (200, 5))
    x = jax.vmap(g)(z)
    assert x.dtype == jnp.float32
    off = jnp.linalg.norm(x - jax.vmap(g.ideal)(z), axis=1)
    assert float((off < 1e-3).mean()) > 0.9


@pytest.mark.parametrize(("n", "k"), [(6, 3), (7, 4), (8, 2)])
def test_the_family_exists(n, k):
    """Greedily, over all sets: no fewer than assured."""
    family: list[set[int]] = []
    for chosen in map(set, itertools.combinations(range(n), k)):
        if all(2 * len(chosen & other) <= k for other in family):
            family.append(chosen)
    assert math.log(len(family)) >= bound.log_family_size(n, k) - 1e-12


def test_the_family_by_hand_and_by_the_closed_form():
    # of the 20 sets of 3 of 6, 1 + 9 have more than half of theirs in common
    assert bound.log_family_size(6, 3) == pytest.approx(math.log(2))
    for n, k in ((64, 4), (200, 7), (1000, 100), (90_000, 1000)):
        assert bound.log_family_size(n, k) >= k / 2 * math.log(n / (8 * k))


def test_the_witness_tells_mixtures_apart(x64):
    places = bound.separated_means(jr.key(7), 12, 8, distance=0.9)
    delta = bound.smallest_distance(places)
    f = jax.vmap(bound.witness(places[:4], places[8:], delta))
    np.testing.assert_allclose(f(places[:4]), delta / 2)
    np.testing.assert_allclose(f(places[4:8]), 0)
    np.testing.assert_allclose(f(places[8:]), -delta / 2)
    x = 1.2 * bound.random_means(jr.key(8), 300, 8)
    x = jnp.concatenate([x, places + 0.3 * bound.random_means(jr.key(9), 12, 8)])
    far = cdist(x, x)
    rise = np.abs(np.subtract.outer(f(x), f(x)))
    assert (rise <= far + 1e-12).all()
    noise = 0.1 / math.sqrt(8) * jr.normal(jr.key(10), (2, 400, 8))
    which = jnp.arange(400) % 8
    ours, theirs = places[:8][which] + noise[0], places[4:][which] + noise[1]
    cost = cdist(ours, theirs)
    w1 = cost[linear_sum_assignment(cost)].mean()
    shown = float(f(ours).mean() - f(theirs).mean())
    # half of the modes are not shared; their noise is 0.1 long at most on average
    assert bound.separation(delta, 0.1) - 0.01 <= shown <= w1


def test_the_net_is_large_enough():
    """One layer of shifts, f(x) = x + a: a net of the ball is one of its laws."""
    resolution, norm = 0.4, 1.0
    rng = np.random.default_rng(0)
    ball = rng.uniform(-norm, norm, (4000, 2))
    ball = ball[np.linalg.norm(ball, axis=1) <= norm]
    net = ball[:1]
    for a in ball:
        if np.linalg.norm(net - a, axis=1).min() > resolution:
            net = np.vstack([net, a])
    size = bound.log_net_size(
        1, 2, norm=norm, sensitivity=1.0, lipschitz=1.0, resolution=resolution
    )
    assert size == pytest.approx(2 * math.log(6))
    assert math.log(len(net)) <= size


def test_the_net_moves_a_stack_by_no_more_than_its_resolution():
    """Layers 2x + 0.3 + a: each moved by the spacing of its net, that is attained."""
    layers, resolution, norm = 4, 0.1, 3.0
    # the layers after one stretch by 8, 4, 2 and 1: in the mean by 15 / 4
    size = bound.log_net_size(
        layers, 1, norm=norm, sensitivity=1.0, lipschitz=15 / 4, resolution=resolution
    )
    spacing = 2 * norm / math.expm1(size / layers)
    x, moved = np.zeros(3), np.zeros(3)
    for _ in range(layers):
        x, moved = 2 * x + 0.3, 2 * moved + 0.3 + spacing
    np.testing.assert_allclose(moved - x, resolution)


def test_parameters_demanded_are_those_of_an_equal_net():
    log_family = 1000.0
    least = bound.least_parameters(log_family, 4, **CONSTANTS)
    each = bound.log_net_size(4, 1, **CONSTANTS) / 4
    assert each == pytest.approx(math.log(1 + 2 * 3 * 2 * 4 * 5 / 0.1))
    assert least * each == pytest.approx(log_family)
    deeper = bound.least_parameters(log_family, 40, **CONSTANTS)
    assert deeper < least


def test_floors():
    gap = bound.separation(1.0, 0.1)
    assert gap == pytest.approx(0.4)
    assert bound.separation(1.0, 0.1, apart=1.0) == pytest.approx(0.8)
    floor = bound.error_floor(gap, generator=0.05, resolution=0.05)
    assert floor == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bound.random_means(jr.key(0), 3, 1), "dim >= 2, got 1"),
        (lambda: bound.separated_means(jr.key(0), 3, 4, distance=2.5), "got 2.5"),
        (lambda: bound.smallest_distance(np.zeros((1, 2))), "at least 2 means"),
        (lambda: bound.aligned_pair_bound(3, 4, 1.5), "cosine in"),
        (lambda: bound.packing_bound(4, 1.9), "distance in"),
        (lambda: bound.thresholds(1), "at least 2 modes"),
        (lambda: bound.log_family_size(3, 4), "n >= k = 4, got 3"),
        (lambda: bound.separation(1.0, 0.1, apart=2.0), "apart <= 1"),
        (lambda: bound.log_net_size(1, 1, **{**CONSTANTS, "lipschitz": 0.5}), ">= 1"),
        (
            lambda: bound.ModeGenerator(jnp.eye(9), sd=0.1, ramp=0.5),
            "ramps overlap",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
