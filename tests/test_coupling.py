import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flowjax.bijections import Affine, Coupling, RationalQuadraticSpline

import gauss_flows as gf

KINDS = [gf.AffineCoupling, gf.AdditiveCoupling, gf.RQSplineCoupling]
ALL_KINDS = [*KINDS, gf.MixtureCDFCoupling, gf.DeepSigmoidCoupling]


@pytest.mark.parametrize(
    ("ours", "transformer"),
    [
        (gf.AffineCoupling, Affine),
        (
            gf.RQSplineCoupling,
            lambda: RationalQuadraticSpline(knots=8, interval=4.0),
        ),
    ],
)
def test_same_numbers_as_flowjax_from_the_same_key(ours, transformer, x64):
    """An independent implementation with the same parametrisation."""
    key = jr.key(3)
    peer = Coupling(
        key,
        transformer=transformer(),
        untransformed_dim=2,
        dim=5,
        nn_width=24,
        nn_depth=2,
    )
    layer = ours(key, shape=(5,))
    x = 2 * jr.normal(jr.key(1), (100, 5))

    def run(bijection, x):
        y, log_det = bijection.transform_and_log_det(x)
        return y, log_det, *bijection.inverse_and_log_det(y)

    run = eqx.filter_jit(jax.vmap(run, in_axes=(None, 0)))
    for mine, theirs in zip(run(layer, x), run(peer, x), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-11, rtol=1e-11)


def test_bounded_log_scale_keeps_its_bound():
    layer = gf.AffineCoupling(jr.key(0), shape=(2,), log_scale_bound=0.5)
    steep = jax.tree.map(lambda a: 100 * a if eqx.is_array(a) else a, layer)
    log_det = jax.vmap(lambda x: steep.transform_and_log_det(x)[1])
    values = log_det(10 * jr.normal(jr.key(1), (50, 2)))
    assert jnp.abs(values).max() <= 0.5
    assert jnp.abs(values).max() > 0.49  # the bound is reached, so it is what acts


def test_mask_property_gives_the_mask_back():
    mask = gf.masks.checkerboard((2, 3, 2))
    layer = gf.AdditiveCoupling(jr.key(0), shape=(2, 3, 2), mask=mask)
    np.testing.assert_array_equal(layer.mask, mask)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_transformer_has_no_leaves_to_train(kind):
    assert not jax.tree.leaves(kind(jr.key(0), shape=(3,)).transformer)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_its_leaves_are_the_numbers_of_its_network(kind):
    leaves = jax.tree.leaves(kind(jr.key(0), shape=(3,)))
    assert all(eqx.is_inexact_array(leaf) for leaf in leaves)
    assert len(leaves) == 2 * 3  # a matrix and a vector for each of three layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1,)}, r"at least 2 coordinates, got \(1,\)"),
        ({"shape": ()}, "at least 2 coordinates"),
        ({"shape": (2, 2, 1)}, "expected a mask for an event of shape"),
        ({"shape": (3,), "mask": np.ones(3, bool)}, "got all active"),
        ({"shape": (3,), "mask": np.zeros(3, bool)}, "got all passive"),
        ({"shape": (3,), "mask": np.zeros(2, bool)}, r"shape \(3,\), got shape \(2,\)"),
        ({"shape": (2,), "nn_width": 0}, "nn_width >= 1"),
        ({"shape": (2,), "nn_depth": -1}, "nn_depth >= 0"),
    ],
)
def test_bad_arguments_say_what_was_expected(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(jr.key(0), **options)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_bound(bound):
    with pytest.raises(ValueError, match="positive, finite log_scale_bound"):
        gf.AffineCoupling(jr.key(0), shape=(2,), log_scale_bound=bound)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bins": 0}, "of at least 1, got 0"),
        ({"interval": 0.0}, "finite interval with room for every bin"),
        ({"interval": float("inf")}, "finite interval"),
        ({"interval": float("nan")}, "finite interval"),
    ],
)
def test_bad_spline_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        gf.RQSplineCoupling(jr.key(0), shape=(2,), **options)


@pytest.mark.parametrize("shape", [(5, 4), (1, 3), (3,)])
def test_it_is_made_from_two_events_of_its_shape_or_more(shape):
    layer = gf.AffineCoupling(jr.key(0), shape=(3,))
    with pytest.raises(ValueError, match="expected"):
        layer.from_data(jnp.ones(shape))


def test_wrong_event_shape_is_refused():
    layer = gf.AffineCoupling(jr.key(0), shape=(2,))
    with pytest.raises(ValueError, match=r"\(2,\); got \(3,\)"):
        layer.transform(jnp.zeros(3))
