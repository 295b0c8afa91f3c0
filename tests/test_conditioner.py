import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gauss_flows as gf


def test_it_draws_and_computes_what_equinox_does(x64):
    peer = eqx.nn.MLP(3, 10, 7, 2, key=jr.key(4))
    ours = gf.Conditioner(jr.key(4), 3, 10, width=7)
    x = jr.normal(jr.key(0), (5, 3))
    np.testing.assert_allclose(ours(x.T).T, jax.vmap(peer)(x), rtol=1e-13)
    np.testing.assert_allclose(ours(x[0]), peer(x[0]), rtol=1e-13)


def test_residual_layers_add_to_what_they_are_given(x64):
    net = gf.Conditioner(
        jr.key(0), 2, 3, width=4, depth=3, activation=jnp.tanh, residual=True
    )
    first, second, third, last = net.layers
    x = jnp.array([0.3, -0.7])
    h = jnp.tanh(first(x))
    h = h + jnp.tanh(second(h))
    h = h + jnp.tanh(third(h))
    np.testing.assert_allclose(net(x), last(h), rtol=1e-13)


def test_parts_are_the_whole(x64):
    net = gf.Conditioner(jr.key(0), 2, 3 * 5, width=4)
    x = jr.normal(jr.key(1), (2, 6))
    parts = net.columns(x, 3, (2, 3))
    whole = net(x).reshape(3, 5, 6).swapaxes(0, 1)
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-13)


@pytest.mark.parametrize("kind", ["affine", "spline", "mixture"])
def test_every_coupling_takes_its_options(kind):
    flow = gf.coupling_flow(
        jr.key(0),
        dim=2,
        depth=2,
        coupling=kind,
        nn_depth=3,
        nn_activation=jnp.tanh,
        nn_residual=True,
    )
    for block in gf.blocks(flow):
        for layer in block.bijections[1:]:
            assert layer.conditioner.residual
            assert layer.conditioner.activation is jnp.tanh
    plain = gf.coupling_flow(jr.key(0), dim=2, depth=2, coupling=kind, nn_depth=3)
    x = jr.normal(jr.key(1), (4, 2))
    assert (jnp.abs(flow.log_prob(x) - plain.log_prob(x)) > 1e-4).any()


def test_a_zero_last_layer_gives_zeros():
    net = gf.Conditioner(jr.key(0), 2, 3, identity_init=True)
    assert not net(jnp.ones(2)).any()
    assert net.layers[0].weight.any()
