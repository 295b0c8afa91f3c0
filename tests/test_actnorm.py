import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gauss_flows as gf


@pytest.mark.parametrize("shape", [(3,), (4, 5, 2)])
def test_from_data_standardises_every_channel(shape, x64):
    x = 5 + 3 * jr.normal(jr.key(0), (200, *shape))
    y = jax.vmap(gf.ActNorm(shape).from_data(x).transform)(x)
    axes = tuple(range(y.ndim - 1))
    np.testing.assert_allclose(y.mean(axes), 0.0, atol=1e-13)
    np.testing.assert_allclose(y.std(axes), 1.0, atol=1e-13)


def test_a_new_layer_is_the_identity_exactly():
    x = jr.normal(jr.key(0), (3,))
    y, log_det = gf.ActNorm1D(shape=(3,)).transform_and_log_det(x)
    np.testing.assert_array_equal(y, x)
    assert log_det == 0.0


def test_sixteen_new_layers_do_not_compound():
    """A default scale of softplus(0) = 0.693 would multiply by 0.693^16 = 0.003."""
    x = jnp.array([1.0, -1.0])
    for _ in range(16):
        x = gf.ActNorm1D(shape=(2,)).transform(x)
    np.testing.assert_array_equal(x, [1.0, -1.0])


def test_a_constant_channel_is_refused():
    x = jr.normal(jr.key(0), (10, 2)).at[:, 1].set(0.1)
    with pytest.raises(RuntimeError, match="every channel to vary"):
        gf.ActNorm((2,)).from_data(x)


@pytest.mark.parametrize("shape", [(10, 3), (1, 2), (10, 2, 1)])
def test_a_wrong_batch_is_refused(shape):
    with pytest.raises(ValueError, match="at least 2 events of shape"):
        gf.ActNorm((2,)).from_data(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match="expected an event shape"):
        gf.ActNorm(shape)
