"""Targets: the law each docstring states, the spiral's exact density, bad input."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from gauss_flows import data

DIM = {name: 2 for name in data.TARGETS} | {"sphere_modes": 16, "digits": 64}


@pytest.mark.parametrize("name", data.TARGETS)
def test_every_target_has_its_shape_and_follows_its_key(name):
    x = data.make(name, jr.key(0), 50)
    assert x.shape == (50, DIM[name])
    assert x.dtype == jnp.float32
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(x, data.make(name, jr.key(0), 50))
    assert (x != data.make(name, jr.key(1), 50)).any()


@pytest.mark.parametrize("name", data.TARGETS)
def test_no_rows_is_an_error(name):
    with pytest.raises(ValueError, match="expected n to be an integer >= 1, got 0"):
        data.make(name, jr.key(0), 0)


def test_float64_follows_jax(x64):
    assert data.spiral(jr.key(0), 3).dtype == jnp.float64
    assert data.source_spiral(3).dtype == jnp.float64


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'digits'.*'two_moons'.*got 'moon'"):
        data.make("moon", jr.key(0), 3)


def test_source_spiral_is_the_source_of_the_numbers(x64):
    # written out once more, as the source's settings say it
    rng = np.random.default_rng(0)
    t = rng.uniform(0.5, 3.5, 3000)
    arm = rng.integers(0, 2, 3000) * 2 - 1
    noise = rng.standard_normal((3000, 2))
    x = np.stack([arm * t * np.cos(2.5 * t), arm * t * np.sin(2.5 * t)], 1)
    x = x + 0.08 * noise
    np.testing.assert_allclose(
        data.source_spiral(), (x - x.mean(0)) / x.std(0), rtol=1e-12, atol=1e-14
    )
    np.testing.assert_allclose(data.source_spiral(standardized=False), x, rtol=1e-12)


def test_spiral_density_integrates_to_one_and_has_the_stated_entropy(x64):
    side = jnp.linspace(-3.5, 3.5, 301)
    grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
    log_p = data.spiral_log_density(grid)
    cell = (side[1] - side[0]) ** 2
    assert jnp.exp(log_p).sum() * cell == pytest.approx(1, abs=1e-5)
    entropy = -(jnp.exp(log_p) * log_p).sum() * cell
    assert entropy == pytest.approx(1.3813, abs=1e-3)


def test_spiral_rows_follow_the_density(x64):
    x = data.spiral(jr.key(0), 20_000)
    np.testing.assert_allclose(x.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(x.std(0), 1, atol=0.02)
    np.testing.assert_allclose(data._spiral_scale(), [1.4134, 1.6628], atol=1e-4)
    # 0.85 is the spread of the log-density, so four standard errors are 0.024
    mean = data.spiral_log_density(x).mean()
    assert mean == pytest.approx(-1.3813, abs=0.024)


def test_spiral_density_is_that_of_a_plain_mixture(x64):
    raw = data.source_spiral(5, standardized=False)
    t = np.linspace(0.5, 3.5, 200_001)
    t = (t[1:] + t[:-1]) / 2
    arm = np.stack([t * np.cos(2.5 * t), t * np.sin(2.5 * t)], 1)
    both = np.concatenate([arm, -arm])
    for point in np.asarray(raw):
        square = ((point - both) ** 2).sum(1)
        normal = np.exp(-square / (2 * 0.08**2)) / (2 * math.pi * 0.08**2)
        log_p = data.spiral_log_density(jnp.asarray(point)[None], scale=jnp.ones(2))
        np.testing.assert_allclose(log_p[0], np.log(normal.mean()), rtol=1e-6)


def test_spiral_density_in_other_units(x64):
    raw = data.source_spiral(40, standardized=False)
    mean, scale = raw.mean(0), raw.std(0)
    plain = data.spiral_log_density(raw, scale=jnp.ones(2))
    moved = data.spiral_log_density((raw - mean) / scale, mean=mean, scale=scale)
    np.testing.assert_allclose(moved, plain + jnp.log(scale).sum(), rtol=1e-10)


def test_spiral_density_is_finite_far_away_in_float32():
    x = jnp.array([[0.0, 0.0], [5.0, -5.0], [30.0, 0.0]])
    assert np.isfinite(data.spiral_log_density(x)).all()
    assert np.isfinite(jax.grad(lambda x: data.spiral_log_density(x).sum())(x)).all()


def test_entropies_in_the_docstrings():
    x = data.four_gaussians(jr.key(0), 40_000)
    centres = 2 * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    square = ((np.asarray(x)[:, None] - centres) ** 2).sum(-1).min(1)
    log_p = -square / (2 * 0.25**2) - math.log(4 * 2 * math.pi * 0.25**2)
    entropy = math.log(4) + 1 + math.log(2 * math.pi * 0.25**2)
    assert entropy == pytest.approx(1.4516, abs=1e-4)
    assert -log_p.mean() == pytest.approx(entropy, abs=0.02)


def test_sphere_modes_sit_around_the_same_points_of_the_sphere():
    x = data.sphere_modes(jr.key(0), 4000, dim=8, modes=3)
    y = data.sphere_modes(jr.key(1), 500, dim=8, modes=3)
    distance = np.linalg.norm(np.asarray(y)[:, None] - np.asarray(x), axis=-1).min(1)
    assert distance.max() < 0.2
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=0.3)
    with pytest.raises(ValueError, match="dim >= 2, got 1"):
        data.sphere_modes(jr.key(0), 5, dim=1)


def test_two_moons_and_swiss_roll_stay_near_their_curves():
    x = np.asarray(data.two_moons(jr.key(0), 500, noise=1e-3))
    upper = np.abs(np.hypot(x[:, 0], x[:, 1]) - 1)
    lower = np.abs(np.hypot(x[:, 0] - 1, x[:, 1] - 0.5) - 1)
    assert np.minimum(upper, lower).max() < 0.01
    assert 0.3 < (upper < lower).mean() < 0.7
    radius = 5 * np.linalg.norm(data.swiss_roll(jr.key(0), 500, noise=1e-3), axis=1)
    assert 1.45 * math.pi < radius.min() < radius.max() < 4.55 * math.pi


def test_digits_are_dequantised_pictures_without_repeats():
    x = np.asarray(data.digits(jr.key(0), 1797))
    assert 0 < x.min() < x.max() < 1
    assert len(np.unique(np.floor(17 * x), axis=0)) > 1700
    with pytest.raises(ValueError, match="n <= 1797 pictures, got 1798"):
        data.digits(jr.key(0), 1798)


def test_standardize_by_other_rows():
    x = data.swiss_roll(jr.key(0), 200) * 3 + 5
    z = data.standardize(x)
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(data.standardize(x[:9], like=x), z[:9], atol=1e-5)
    with pytest.raises(ValueError, match=r"every coordinate to vary, got.*\[1\]"):
        data.standardize(x * jnp.array([1.0, 0.0]))


def test_split_keeps_every_row_once():
    x = jnp.arange(40.0).reshape(20, 2)
    train, held_out = data.split(jr.key(0), x, 0.3)
    assert train.shape == (14, 2)
    assert held_out.shape == (6, 2)
    rows = np.concatenate([train, held_out])
    np.testing.assert_array_equal(rows[rows[:, 0].argsort()], x)
    assert (rows != x).any()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 0.001])
def test_split_leaves_no_part_empty(fraction):
    with pytest.raises(ValueError, match="leaves rows in both parts"):
        data.split(jr.key(0), jnp.ones((20, 2)), fraction)


def test_noise_must_be_positive():
    with pytest.raises(ValueError, match="expected noise to be finite and > 0"):
        data.two_moons(jr.key(0), 5, noise=0.0)
    with pytest.raises(ValueError, match="expected sd"):
        data.four_gaussians(jr.key(0), 5, sd=-1.0)
