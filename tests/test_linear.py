import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gauss_flows as gf


@pytest.mark.parametrize("dim", [2, 3, 12])
def test_it_is_a_rotation(dim, x64):
    layer = gf.HouseholderRotation(10, (dim,), key=jr.key(0))
    matrix = jax.jit(jax.jacfwd(layer.transform))(jnp.zeros(dim))
    np.testing.assert_allclose(matrix @ matrix.T, jnp.eye(dim), atol=1e-13)
    np.testing.assert_allclose(jnp.linalg.det(matrix), 1.0, atol=1e-13)
    assert jnp.abs(matrix - jnp.eye(dim)).max() > 0.1


def test_rows_reflect_in_order_first_row_first(x64):
    rows = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    layer = eqx.tree_at(lambda m: m.params, gf.HouseholderRotation(), rows)
    # (x, y) -> (-x, y) -> minus the swapped pair, (-y, x)
    np.testing.assert_allclose(layer.transform(jnp.array([3.0, 5.0])), [-5.0, 3.0])


def test_length_of_a_row_does_not_matter(x64):
    layer = gf.HouseholderRotation(key=jr.key(0))
    longer = eqx.tree_at(lambda m: m.params, layer, 7 * layer.params)
    x = jnp.array([0.3, -2.0])
    np.testing.assert_allclose(layer.transform(x), longer.transform(x), rtol=1e-14)


def test_without_a_key_it_starts_at_the_identity_and_can_leave_it():
    layer = gf.HouseholderRotation(n_reflections=2, shape=(2,))
    x = jnp.array([1.0, -2.0])
    np.testing.assert_allclose(layer.transform(x), x, atol=1e-6)
    gradient = eqx.filter_grad(lambda m: m.transform(x)[0])(layer)
    assert jnp.abs(gradient.params).max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (2,)), "even number of reflections, at least 2"),
        ((3, (2,)), "got 3"),
        ((2, (1,)), r"dim >= 2, got \(1,\)"),
        ((2, (2, 2)), "expected shape"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        gf.HouseholderRotation(*arguments)


def test_a_learned_permutation_puts_the_highest_score_first():
    layer = gf.LearnedPermutation((4,))
    np.testing.assert_array_equal(layer.order, [0, 1, 2, 3])
    layer = eqx.tree_at(lambda a: a.scores, layer, jnp.array([0.1, 3.0, -1.0, 2.0]))
    x = jnp.array([10.0, 11.0, 12.0, 13.0])
    np.testing.assert_array_equal(layer.transform(x), [11.0, 13.0, 10.0, 12.0])
    np.testing.assert_array_equal(layer.inverse(layer.transform(x)), x)


def test_its_scores_learn_a_swap():
    """By gradient descent on the straight-through gradient."""
    x = jnp.array([2.0, 1.0]) + 0.1 * jr.normal(jr.key(0), (200, 2))
    layer = gf.LearnedPermutation((2,))

    @eqx.filter_jit
    @eqx.filter_grad
    def slope(layer):
        return jnp.mean((jax.vmap(layer.transform)(x) - jnp.array([1.0, 2.0])) ** 2)

    for _ in range(200):
        step = jax.tree.map(lambda g: -0.05 * g, slope(layer))
        layer = eqx.apply_updates(layer, step)
    np.testing.assert_array_equal(layer.order, [1, 0])


def test_leaves_are_numbers_to_train():
    rotation = gf.HouseholderRotation(2, (3,), key=jr.key(0))
    permutation, mixing = gf.LearnedPermutation((3,)), gf.PLULinear(jr.key(0), (3,))
    for layer, shapes in (
        (rotation, [(2, 3)]),
        (permutation, [(3,)]),
        (mixing, [(3, 3), (3,), (3,)]),  # and its order and signs, which stay
    ):
        assert [leaf.shape for leaf in jax.tree.leaves(layer)] == shapes


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_its_gradient_is_that_of_soft_sorting(temperature, x64):
    scores = jnp.array([0.1, 3.0, -1.0, 2.0])
    x = jnp.array([10.0, 11.0, 13.0, 17.0])
    layer = gf.LearnedPermutation((4,), temperature=temperature)
    got = jax.jacobian(
        lambda s: eqx.tree_at(lambda a: a.scores, layer, s).transform(x)
    )(scores)

    def soft(s):  # Prillo and Eisenschlos (2020), equation 3
        apart = jnp.abs(jnp.sort(s)[::-1, None] - s)
        return jax.nn.softmax(-apart / temperature, axis=1) @ x

    near = 1e-5 * jnp.eye(4)
    wanted = jnp.stack([(soft(scores + d) - soft(scores - d)) / 2e-5 for d in near], 1)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1,)}, "dim >= 2"),
        ({"shape": (2, 2)}, "dim >= 2"),
        ({"shape": (2,), "temperature": 0.0}, "temperature to be finite and > 0"),
    ],
)
def test_bad_arguments_of_a_learned_permutation(options, message):
    with pytest.raises(ValueError, match=message):
        gf.LearnedPermutation(**options)


def test_a_plu_layer_starts_at_a_rotation(x64):
    for dim in (2, 3, 4, 7):
        layer = gf.PLULinear(jr.key(dim), (dim,))
        w = layer.matrix
        np.testing.assert_allclose(w @ w.T, np.eye(dim), atol=1e-12)
        np.testing.assert_allclose(jnp.linalg.det(w), 1.0, rtol=1e-12)
    assert not jnp.allclose(w, gf.PLULinear(jr.key(8), (7,)).matrix, atol=0.1)


def test_a_plu_layer_is_its_matrix_at_every_pixel(x64):
    layer = gf.PLULinear(jr.key(0), (2, 3, 4))
    layer = eqx.tree_at(lambda a: a.factors, layer, layer.factors + 0.3)
    x = jr.normal(jr.key(1), (2, 3, 4))
    y, log_det = layer.transform_and_log_det(x)
    np.testing.assert_allclose(y, x @ layer.matrix.T, rtol=1e-12, atol=1e-12)
    expected = 6 * jnp.linalg.slogdet(layer.matrix)[1]
    np.testing.assert_allclose(log_det, expected, rtol=1e-12)
    np.testing.assert_allclose(log_det, 6 * 4 * 0.3, rtol=1e-12)
    np.testing.assert_allclose(layer.inverse(y), x, atol=1e-12)


def test_a_plu_layer_trains_its_factors_only():
    layer = gf.PLULinear(jr.key(0), (3,))
    trained = eqx.filter(layer, eqx.is_inexact_array)
    assert [leaf.shape for leaf in jax.tree.leaves(trained)] == [(3, 3)]
    slope = eqx.filter_grad(lambda a: (a.transform(jnp.arange(1.0, 4.0)) ** 3).sum())
    assert (slope(layer).factors != 0).all()


@pytest.mark.parametrize("log_scale", [-20.0, -1e4, 1e4, jnp.nan])
def test_a_plu_layer_that_has_become_singular_is_named(log_scale):
    layer = gf.PLULinear(jr.key(0), (3,))

    def scaled(by):
        return eqx.tree_at(
            lambda a: a.factors, layer, layer.factors.at[1, 1].set(by)
        ).inverse(jnp.ones(3))

    assert jnp.isfinite(scaled(-5.0)).all()
    with pytest.raises(RuntimeError, match="PLULinear: expected an invertible matrix"):
        scaled(log_scale).block_until_ready()


@pytest.mark.parametrize("shape", [(), (1,), (4, 4, 1), (0, 4, 2)])
def test_bad_shapes_of_a_plu_layer(shape):
    with pytest.raises(ValueError, match="at least 2 channels"):
        gf.PLULinear(jr.key(0), shape)
