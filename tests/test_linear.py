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
