"""Bounds of norms, and networks that keep theirs."""

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import paramax
import pytest
from conftest import enable_x64
from hypothesis import given
from jax.test_util import check_grads

from gauss_flows import spectral


def mlp(lipschitz=0.9, *, dim=3, depth=2, dtype=None, seed=0):
    return spectral.LipschitzMLP(
        jr.key(seed), dim=dim, width=16, depth=depth, lipschitz=lipschitz, dtype=dtype
    )


def conv_net(lipschitz=0.9, dtype=None):
    return spectral.LipschitzConvNet(
        jr.key(0), shape=(4, 5, 2), width=6, lipschitz=lipschitz, dtype=dtype
    )


@eqx.filter_jit
def steepest(network, n=200, scale=3.0):
    shape = (*network.size, 2) if hasattr(network, "size") else (3,)
    dtype = jax.tree.leaves(eqx.filter(network, eqx.is_array))[0].dtype
    xs = scale * jr.normal(jr.key(9), (n, *shape), dtype)
    norms = jax.vmap(lambda x: spectral.exact_norm(network, x))(xs)
    return norms.max()


def enlarged(network, factor):
    """Every array of the network times a factor, as a wild optimiser would do."""
    return jax.tree.map(lambda a: factor * a if eqx.is_array(a) else a, network)


# --- bounds ---------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    out=st.sampled_from([1, 7, 40]),
    size=st.sampled_from([1, 33]),
    rank=st.sampled_from([1, 20]),
    exponent=st.floats(-25, 15),
)
def test_gram_bound_is_above_the_norm_and_near(seed, out, size, rank, exponent):
    """For all shapes, ranks and sizes of numbers, in float32."""
    left, right = (
        jr.normal(key, shape)
        for key, shape in zip(
            jr.split(jr.key(seed)), [(out, rank), (rank, size)], strict=True
        )
    )
    matrix = left @ right * 10**exponent
    bound = float(jax.jit(spectral.gram_bound)(matrix))
    norm = np.linalg.norm(np.asarray(matrix, "float64"), 2)
    assert norm <= bound <= 1.011 * norm


@pytest.mark.usefixtures("x64")
def test_gram_bound_of_equal_singular_values():
    """The worst case of the Gram iteration, and the one in which power is at home."""
    q = jnp.linalg.qr(jr.normal(jr.key(0), (64, 64)))[0]
    for tolerance in (0.3, 0.01, 1e-4):
        bound = spectral.gram_bound(q, tolerance=tolerance)
        assert 1 <= bound <= 1 + tolerance + 1e-9
    assert spectral.gram_bound(q, tolerance=0.3) > 1.1


@pytest.mark.usefixtures("x64")
def test_gram_bound_stacks_zeros_and_nans():
    stack = jr.normal(jr.key(0), (2, 3, 4, 5))
    bound = jax.jit(spectral.gram_bound)
    one_by_one = [[bound(m) for m in ms] for ms in stack]
    np.testing.assert_allclose(spectral.gram_bound(stack), one_by_one, rtol=1e-12)
    zeros = jnp.zeros((4, 5))
    assert spectral.gram_bound(zeros) == 0
    assert not jax.grad(spectral.gram_bound)(zeros).any()
    assert jnp.isnan(spectral.gram_bound(zeros.at[0, 0].set(jnp.nan)))
    with pytest.raises(ValueError, match="tolerance to be finite and > 0, got 0"):
        spectral.gram_bound(zeros, tolerance=0.0)


@pytest.mark.usefixtures("x64")
def test_gradients_against_differences():
    """Of the bound, and through the shrunk weights of both kinds."""
    matrix, kernel = jr.normal(jr.key(0), (4, 3)), jr.normal(jr.key(1), (3, 3, 2, 2))
    for f, x in [
        (spectral.gram_bound, matrix),
        (lambda w: spectral.conv_bound(w, (4, 5)), kernel),
        (lambda w: spectral.SpectralNorm(w, 0.5).unwrap() ** 3, matrix),
        (lambda w: spectral.SpectralConv(w, 0.5, (4, 5)).unwrap() ** 3, kernel),
    ]:
        check_grads(jax.jit(f), (x,), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (3, 7), (2, 2)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (3, 1)])
@pytest.mark.usefixtures("x64")
def test_conv_bound_against_the_dense_matrix(size, kernel):
    weight, x = jr.normal(jr.key(0), (*kernel, 3, 2)), jnp.zeros((*size, 3))
    exact = spectral.exact_norm(lambda x: spectral.convolve(x, weight), x)
    bound = spectral.conv_bound(weight, size)
    assert exact <= bound <= (1.4 if size == (2, 2) else 1.3) * exact
    if kernel == (1, 1):
        np.testing.assert_allclose(exact, jnp.linalg.norm(weight[0, 0], 2), rtol=1e-12)
        assert bound <= 1.011 * exact


def test_conv_bound_wants_a_kernel_that_fits():
    with pytest.raises(ValueError, match=r"with its rim of zeros, got \(5, 5\)"):
        spectral.conv_bound(jnp.ones((5, 5, 1, 1)), (2, 2))


@pytest.mark.usefixtures("x64")
def test_power_norm_approaches_from_below():
    matrix = jr.normal(jr.key(0), (7, 5))
    exact, x = jnp.linalg.norm(matrix, 2), jnp.ones(5)
    found = spectral.power_norm(
        lambda x: matrix @ x + 1, x, key=jr.key(1), tolerance=1e-12
    )
    np.testing.assert_allclose(found.norm, exact, rtol=1e-9)
    np.testing.assert_allclose(
        spectral.exact_norm(lambda x: matrix @ x + 1, x), exact, rtol=1e-12
    )
    for seed in range(20):
        early = spectral.power_norm(
            lambda x: matrix @ x, x, key=jr.key(seed), max_steps=2
        )
        assert early.norm <= exact
        assert early.steps == 2
    zero = spectral.power_norm(lambda x: 0 * x, x, key=jr.key(0))
    assert zero.norm == 0
    with pytest.raises(ValueError, match="max_steps to be an integer >= 1, got 0"):
        spectral.power_norm(lambda x: x, x, key=jr.key(0), max_steps=0)


@pytest.mark.usefixtures("x64")
def test_power_iteration_underestimates_where_the_gram_bound_does_not():
    """Two close singular values: what is shrunk by the estimate is no contraction."""
    matrix = jnp.diag(jnp.array([1.0] + [0.95] * 63))
    rough = spectral.power_norm(
        lambda x: matrix @ x, jnp.ones(64), key=jr.key(0), tolerance=1e-2
    ).norm
    assert rough < 0.97
    assert spectral.gram_bound(matrix) >= 1


# --- wrapped weights ------------------------------------------------------------------


def test_only_shrinking():
    small = jr.normal(jr.key(0), (2, 3)) * 1e-3
    np.testing.assert_array_equal(spectral.SpectralNorm(small, 0.9).unwrap(), small)
    stack = jnp.stack([jnp.eye(3) * 0.5, jnp.eye(3) * 5])
    used = spectral.SpectralNorm(stack, 0.9).unwrap()
    np.testing.assert_array_equal(used[0], stack[0])
    assert 0.89 < used[1, 0, 0] <= 0.9


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("make", [mlp, conv_net])
@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0, 1e4])
def test_the_bound_holds_for_any_weights(make, factor, wide):
    with enable_x64(wide):
        network = enlarged(make(0.7), factor)
        assert steepest(network) <= 0.7
        assert spectral.lipschitz_bound(network) <= 0.7 * (1 + 1e-4)
        spectral.check_bound(network, 0.7)


def test_the_bound_survives_a_file(tmp_path):
    """Weights that were trained without any bound, read into a network that has one."""
    path = tmp_path / "weights.eqx"
    eqx.tree_serialise_leaves(path, enlarged(mlp(), 50.0))
    assert steepest(eqx.tree_deserialise_leaves(path, mlp())) <= 0.9


def test_a_lost_bound_is_found():
    """Once unwrapped, weights are plain arrays, and can be set to anything."""
    network = paramax.unwrap(mlp())
    spectral.check_bound(network, 0.9)
    edited = eqx.tree_at(lambda n: n.weights[1], network, 5 * jnp.eye(16))
    with pytest.raises(ValueError, match=r"bound 0\.9, got layers .* multiply to \d"):
        spectral.check_bound(edited, 0.9)
    broken = eqx.tree_at(lambda n: n.weights[1], network, jnp.full((16, 16), jnp.nan))
    with pytest.raises(ValueError, match="multiply to nan"):
        spectral.check_bound(broken, 0.9)
    jax.jit(lambda n: spectral.check_bound(n, 0.9))(
        eqx.filter(edited, eqx.is_array)
    )  # no values yet, nothing to check


def test_lipschitz_bound_of_other_networks():
    linear = eqx.nn.Linear(3, 3, key=jr.key(0))
    exact = jnp.linalg.norm(linear.weight, 2)
    assert exact <= spectral.lipschitz_bound(linear) <= 1.001 * exact
    tanh = eqx.nn.MLP(2, 2, 8, 1, jnp.tanh, key=jr.key(0))
    norms = [jnp.linalg.norm(layer.weight, 2) for layer in tanh.layers]
    np.testing.assert_allclose(
        spectral.lipschitz_bound(tanh), norms[0] * norms[1], rtol=1e-3
    )
    with pytest.raises(ValueError, match=r"1-Lipschitz activation.* slope 1\.1"):
        spectral.lipschitz_bound(eqx.nn.MLP(2, 2, 8, 1, jax.nn.silu, key=jr.key(0)))
    with pytest.raises(ValueError, match="can be bounded, got function"):
        spectral.lipschitz_bound(lambda x: x)


@pytest.mark.usefixtures("x64")
def test_the_bound_is_attained():
    """Not merely small: a linear network reaches what it is allowed."""
    assert steepest(enlarged(mlp(0.9, depth=0), 100.0)) > 0.89


def test_gradients_reach_every_parameter():
    network = enlarged(mlp(), 3.0)
    grads = eqx.filter_grad(lambda n: jnp.sum(n(jnp.arange(3.0)) ** 2))(network)
    for leaf in jax.tree.leaves(grads):
        assert jnp.isfinite(leaf).all()
        assert leaf.any()


@pytest.mark.usefixtures("x64")
def test_lipswish():
    xs = jnp.linspace(-400, 400, 400_001)
    for b in (-5.0, 0.5, 3.0):
        act = eqx.tree_at(lambda a: a.b, spectral.LipSwish(), jnp.asarray(b))
        slopes = jax.vmap(jax.grad(act))(xs)
        assert 0.999 < jnp.abs(slopes).max() < 1
        assert act(jnp.zeros(())) == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [mlp, conv_net])
def test_dtype_is_kept(make):
    network = make(dtype=jnp.float32)
    shape = (4, 5, 2) if make is conv_net else (3,)
    assert network(jnp.ones(shape, jnp.float32)).dtype == jnp.float32
    leaves = jax.tree.leaves(eqx.filter(network, eqx.is_array))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("lipschitz", [0.0, 1.0, -0.5, float("nan")])
def test_bad_arguments(lipschitz):
    for make in (mlp, conv_net):
        with pytest.raises(ValueError, match=r"bound in \(0, 1\), got"):
            make(lipschitz)
    with pytest.raises(ValueError, match="a depth of at least 0, got -1"):
        mlp(depth=-1)
    with pytest.raises(ValueError, match="dim to be an integer >= 1, got 0"):
        mlp(dim=0)
    with pytest.raises(ValueError, match=r"2 pixels a side, got \(1, 4\)"):
        spectral.LipschitzConvNet(jr.key(0), shape=(1, 4, 1), width=2, lipschitz=0.5)
