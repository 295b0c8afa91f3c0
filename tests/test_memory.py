"""What a stack keeps changes its cost, never its values or its gradient."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flowjax.bijections import Invert
from flowjax.distributions import StandardNormal, Transformed

import gauss_flows as gf

MODES = ["recompute", "invert"]


def loss(flow, x):
    return -flow.log_prob(x).mean()


gradient = eqx.filter_jit(eqx.filter_grad(loss))


def assert_same(a, b, **tolerance):
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    for left, right in zip(*leaves, strict=True):
        np.testing.assert_allclose(left, right, **tolerance)


@pytest.mark.parametrize("kind", ["spline", "affine"])
def test_gradients_agree(kind, x64):
    """With kept states in front of every block, of some, and of the first alone."""
    x = gf.data.source_spiral()[:64]
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=7, coupling=kind)
    expected = gradient(flow, x)
    assert_same(gradient(gf.with_memory(flow, "recompute"), x), expected, rtol=1e-9)
    for keep_every in (1, 3, 16) if kind == "affine" else (3,):
        other = gf.with_memory(flow, "invert", keep_every=keep_every)
        assert_same(gradient(other, x), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_both_directions_single_events_and_log_det_alone(mode, x64):
    """Sampling through the inverse; no batch; a loss that ignores the latent point."""
    flow = gf.coupling_flow(jr.key(0), dim=3, depth=5, coupling="affine")
    other = gf.with_memory(flow, mode, keep_every=2)
    z = jr.normal(jr.key(1), (8, 3))

    def reverse(flow, z):
        x, log_det = jax.vmap(flow.bijection.transform_and_log_det)(z)
        return (jnp.cos(x).sum() - log_det.sum()) / len(z)

    def one(flow, x):
        return gf.normalizing_map(flow).transform_and_log_det(x)[1]

    for function, point in ((reverse, z), (one, z[0])):
        pull = eqx.filter_jit(eqx.filter_grad(function))
        assert_same(pull(other, point), pull(flow, point), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("mode", ["store", *MODES])
def test_float32_stays_float32_among_64_bits(mode, x64):
    flow = gf.coupling_flow(
        jr.key(0), dim=2, depth=3, identity_init=True, memory=mode, dtype=jnp.float32
    )
    x = gf.data.source_spiral()[:8].astype(jnp.float32)
    leaves = jax.tree.leaves(gradient(flow, x))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    ignored = eqx.filter_grad(lambda f: gf.normalizing_map(f).transform(x[0]).sum())
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(ignored(flow)))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_points(mode, x64):
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=5, coupling="affine")
    x = gf.data.source_spiral()[:16]

    @eqx.filter_jit
    def slopes(flow):
        return jax.vmap(jax.grad(lambda x: flow.log_prob(x)))(x)

    got = slopes(gf.with_memory(flow, mode))
    np.testing.assert_allclose(got, slopes(flow), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_many_seeds_train_as_with_everything_stored(mode, x64):
    x = gf.data.source_spiral()[:256]

    def fitted(memory):
        def build(key):
            return gf.coupling_flow(
                key, dim=2, depth=3, coupling="affine", memory=memory
            )

        keys = jr.split(jr.key(0), 2)
        return gf.fit_many(keys, build, x, steps=5, batch_size=32, progress=False)

    got, expected = fitted(mode), fitted("store")
    np.testing.assert_allclose(got.train_loss, expected.train_loss, rtol=1e-8)
    assert_same(got.gradient_norm, expected.gradient_norm, rtol=1e-6)


@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_gradient_memory_of_a_deep_stack(coupling):
    """At 512 blocks `invert` needs less than 1/20 of what `store` needs."""
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=512, coupling=coupling)
    x = gf.data.source_spiral()[:512].astype(jnp.float32)

    def temporary(flow):
        params, static = eqx.partition(flow, eqx.is_array)

        def pull(params, x):
            return jax.grad(lambda p: loss(eqx.combine(p, static), x))(params)

        stats = jax.jit(pull).lower(params, x).compile().memory_analysis()
        return stats.temp_size_in_bytes

    stored = temporary(flow)
    assert temporary(gf.with_memory(flow, "invert")) < stored / 20
    assert temporary(gf.with_memory(flow, "recompute")) < stored / 10


def test_a_drifting_stack_raises(x64):
    """Scales of about 1e-3 lose thirteen digits in five blocks of the way back."""
    flow = gf.coupling_flow(
        jr.key(0), dim=2, depth=40, coupling="affine", log_scale_bound=8.0
    )

    def bias(flow):
        first_coupling = flow.bijection.bijection.bijection.bijections[1]
        return first_coupling.conditioner.layers[-1].bias

    flow = eqx.tree_at(bias, flow, replace_fn=lambda b: b - 7.0)
    x = gf.data.source_spiral()[:8]
    with pytest.raises(eqx.EquinoxRuntimeError, match="expected states rebuilt"):
        jax.block_until_ready(gradient(gf.with_memory(flow, "invert"), x))


def test_the_tolerance_is_the_one_given(x64):
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=8, coupling="affine")
    x = gf.data.source_spiral()[:8]
    strict = gf.with_memory(flow, "invert", keep_every=4, tolerance=1e-30)
    with pytest.raises(eqx.EquinoxRuntimeError, match="got more"):
        jax.block_until_ready(gradient(strict, x))


def test_bad_options_are_refused():
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=2)
    with pytest.raises(ValueError, match="expected memory in"):
        gf.coupling_flow(jr.key(0), dim=2, depth=2, memory="forget")
    with pytest.raises(ValueError, match="keep_every"):
        gf.with_memory(flow, "invert", keep_every=0)
    with pytest.raises(ValueError, match="tolerance"):
        gf.with_memory(flow, "invert", tolerance=-1.0)
    unstacked = Transformed(StandardNormal((2,)), Invert(gf.blocks(flow)[0]))
    with pytest.raises(ValueError, match="Scan"):
        gf.with_memory(unstacked, "invert")


@pytest.mark.parametrize("mode", ["store", *MODES])
def test_actnorm_keeps_the_mode(mode):
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=2, actnorm=True, memory=mode)
    x = gf.data.source_spiral().astype(jnp.float32)[:100]
    ready = gf.initialize_actnorm(flow, x)
    assert ready.bijection.bijection.memory == mode
