import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flowjax.bijections import Chain, Flip, Invert, Scan
from flowjax.distributions import Normal, StandardNormal, Transformed
from paramax import NonTrainable

import gauss_flows as gf


def source_build(key, depth, kind, actnorm=False):
    """The source notebook's stack, layer by layer as it is described."""
    layers = []
    for block_key in jr.split(key, depth):
        rotation_key, first, second = jr.split(block_key, 3)
        rotation = gf.HouseholderRotation(n_reflections=2, shape=(2,))
        rotation = eqx.tree_at(
            lambda r: r.params, rotation, jr.normal(rotation_key, (2, 2))
        )
        coupling = {
            "spline": lambda k: gf.RQSplineCoupling(
                k, shape=(2,), n_bins=8, interval=4.0, nn_width=24, nn_depth=2
            ),
            "affine": lambda k: gf.AffineCoupling(
                k, shape=(2,), nn_width=24, nn_depth=2
            ),
        }[kind]
        layers += [gf.ActNorm1D(shape=(2,))] if actnorm else []
        layers += [rotation, coupling(first), Flip((2,))]
        layers += [coupling(second), Flip((2,))]
    return Transformed(Normal(jnp.zeros(2)), Invert(Chain(layers)))


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_same_flow_as_the_source_recipe(kind, x64):
    x = 1.5 * jr.normal(jr.key(1), (200, 2))
    ours = gf.coupling_flow(
        jr.key(0), dim=2, depth=3, coupling=kind, base=Normal(jnp.zeros(2))
    )
    expected = eqx.filter_jit(source_build(jr.key(0), 3, kind).log_prob)(x)
    np.testing.assert_allclose(eqx.filter_jit(ours.log_prob)(x), expected, rtol=1e-10)


@pytest.mark.parametrize("dim", [2, 5])
def test_density_integrates_samples_back(dim, x64):
    """Samples and their log-density agree with the way back through log_prob."""
    flow = gf.coupling_flow(jr.key(0), dim=dim, depth=2)
    x, log_prob = eqx.filter_jit(flow.sample_and_log_prob)(jr.key(1), (50,))
    assert x.shape == (50, dim)
    np.testing.assert_allclose(eqx.filter_jit(flow.log_prob)(x), log_prob, atol=1e-8)


def test_density_has_mass_one(x64):
    flow = gf.coupling_flow(jr.key(2), dim=2, depth=2)
    side = jnp.linspace(-9, 9, 401)
    grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
    mass = jnp.exp(eqx.filter_jit(flow.log_prob)(grid)).sum() * (side[1] - side[0]) ** 2
    np.testing.assert_allclose(mass, 1.0, atol=2e-3)


def test_nothing_in_the_default_base_is_trainable():
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=1)
    assert not jax.tree.leaves(eqx.filter(flow.base_dist, eqx.is_inexact_array))


def test_dtype_reaches_every_parameter(x64):
    flow = gf.coupling_flow(jr.key(0), dim=3, depth=2, actnorm=True, dtype=jnp.float32)
    leaves = jax.tree.leaves(eqx.filter(flow, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("container", ["scan", "chain", "inverted chain", "one"])
def test_blocks_and_intermediates_compose_to_the_map(container, x64):
    scan = gf.normalizing_map(gf.coupling_flow(jr.key(0), dim=2, depth=3))
    bijection, count = {
        "scan": (scan, 3),
        "chain": (Chain(gf.blocks(scan)), 3),
        "inverted chain": (Invert(Chain(gf.blocks(scan))), 3),
        "one": (gf.blocks(scan)[0][0], 1),
    }[container]
    x = jnp.array([0.4, -1.1])
    states = eqx.filter_jit(gf.intermediates)(bijection, x)
    assert states.shape == (count + 1, 2)
    assert len(gf.blocks(bijection)) == count
    np.testing.assert_array_equal(states[0], x)
    np.testing.assert_allclose(states[-1], bijection.transform(x), atol=1e-12)
    np.testing.assert_allclose(
        gf.blocks(bijection)[0].transform(x), states[1], atol=1e-12
    )


def test_normalizing_map_of_a_flow_that_samples_forward(x64):
    block = gf.AffineCoupling(jr.key(0), shape=(2,))
    flow = Transformed(StandardNormal((2,)), block)
    x = jnp.array([0.4, -1.1])
    np.testing.assert_allclose(
        gf.normalizing_map(flow).transform(x), block.inverse(x), rtol=1e-14
    )
    with pytest.raises(ValueError, match="Transformed distribution or a bijection"):
        gf.normalizing_map(StandardNormal((2,)))


def each_actnorm_output(flow, x):
    for block in gf.blocks(flow):
        yield jax.vmap(block[0].transform)(x)
        x = jax.vmap(block.transform)(x)


def test_initialize_actnorm_standardises_at_every_depth(x64):
    x = 4 + 3 * jr.normal(jr.key(1), (300, 2))
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=4, coupling="affine", actnorm=True)
    ready = eqx.filter_jit(gf.initialize_actnorm)(flow, x)
    for y in each_actnorm_output(ready, x):
        np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-10)
        np.testing.assert_allclose(y.std(0), 1.0, atol=1e-10)
    # everything else is as it was
    for old, new in zip(gf.blocks(flow), gf.blocks(ready), strict=True):
        assert eqx.tree_equal(old[1:], new[1:])


def test_initialize_actnorm_keeps_frozen_layers_frozen():
    x = jr.normal(jr.key(1), (20, 2))
    frozen = NonTrainable(gf.HouseholderRotation(key=jr.key(0)))
    chain = Chain([frozen, gf.ActNorm((2,))])
    flow = gf.initialize_actnorm(
        Transformed(StandardNormal((2,)), Invert(chain)), 2 * x
    )
    first, second = flow.bijection.bijection.bijections
    assert isinstance(first, NonTrainable)
    assert second.log_scale.max() < 0


def test_initialize_actnorm_says_what_is_missing():
    x = jnp.zeros((10, 2))
    with pytest.raises(ValueError, match="actnorm=True"):
        gf.initialize_actnorm(gf.coupling_flow(jr.key(0), dim=2, depth=2), x)
    with pytest.raises(ValueError, match=r"shape \(2,\), got shape \(10, 3\)"):
        gf.initialize_actnorm(
            gf.coupling_flow(jr.key(0), dim=2, depth=2, actnorm=True),
            jnp.zeros((10, 3)),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 1, "depth": 1}, "at least 2 coordinates"),
        ({"dim": 2, "depth": 0}, "depth of at least 1, got 0"),
        ({"dim": 2, "depth": 1, "coupling": "cubic"}, "got 'cubic'"),
        (
            {"dim": 2, "depth": 1, "coupling": "affine", "n_bins": 4},
            "got .'n_bins'",
        ),
        ({"dim": 2, "depth": 1, "n_reflections": 3}, "even number of reflections"),
        ({"dim": 2, "depth": 1, "base": StandardNormal((3,))}, r"got shape \(3,\)"),
        ({"dim": 2, "depth": 1, "mask": np.ones(2, bool)}, "got all active"),
        ({"dim": 2, "depth": 1, "nn_width": 0}, "nn_width >= 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        gf.coupling_flow(jr.key(0), **options)


def test_scan_is_what_the_stack_is_made_of():
    """The compiled program must not grow with depth."""

    def operations(depth):
        flow = gf.coupling_flow(jr.key(0), dim=2, depth=depth)
        assert isinstance(gf.normalizing_map(flow), Scan)
        x = jnp.zeros((4, 2))
        return str(jax.make_jaxpr(flow.log_prob)(x)).count("=")

    assert operations(2) == operations(32)
