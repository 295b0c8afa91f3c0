"""Linear maps as couplings: products, counts, norms, certificates, and errors."""

import itertools
import math
from functools import reduce

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg as sl
from conftest import enable_x64
from scipy.optimize import minimize
from scipy.stats import special_ortho_group

import gauss_flows as gf
from gauss_flows.theory import linear_coupling, linear_maps
from gauss_flows.theory.fixed_partition import with_fixed_partition
from gauss_flows.theory.linear_coupling import LinearCoupling, merged, product

ROUTES = {
    "lu": (linear_maps.factor_lu, 26),
    "minimal": (linear_maps.factor_minimal, 6),
    "stable": (linear_maps.factor_stable, 15),
    "svd": (linear_maps.factor_svd, 31),
}
LARGEST_NORM = (3 + math.sqrt(13)) / 2  # of an additive block of norm 3


def gaussian(rng, n):
    matrix = rng.standard_normal((n, n)) / math.sqrt(n)
    matrix[0] *= np.sign(np.linalg.det(matrix))
    return matrix


def even_permutation(order):
    matrix = np.eye(len(order))[list(order)]
    matrix[0] *= np.sign(np.linalg.det(matrix))
    return matrix


def rotation(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s], [s, c]])


def off(factors, matrix):
    return np.linalg.norm(product(factors) - matrix) / np.linalg.norm(matrix)


def norms(factors):
    return [np.linalg.norm(factor.matrix, 2) for factor in factors]


STUBBORN = sl.block_diag(-np.eye(2), np.linalg.inv([[0.5, 1.0], [-1.0, 0.5]]))
SPECIAL = {
    "I": np.eye(4),
    "-I": -np.eye(4),
    "-I of size 2": -np.eye(2),
    "-I of size 6": -np.eye(6),
    "3 I": 3 * np.eye(6),
    "-0.2 I": -0.2 * np.eye(4),
    "diag(-I, S)": STUBBORN,
    "swap of halves": np.roll(np.eye(4), 2, axis=0),
    "swap and turn": np.block(
        [[np.zeros((2, 2)), np.eye(2)], [-rotation(30), np.zeros((2, 2))]]
    ),
    "rotation of the plane": rotation(70),
    "diagonal": np.diag([2.0, -3.0, -0.5, 0.1]),
    "upper triangular": np.triu(np.arange(1.0, 17.0).reshape(4, 4)),
    "badly scaled": np.diag([1e6, 1.0, 1e-3, 1.0])
    @ gaussian(np.random.default_rng(0), 4),
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("route", ROUTES)
def test_special_maps(route, name):
    factor, most = ROUTES[route]
    factors = factor(SPECIAL[name])
    assert off(factors, SPECIAL[name]) < 1e-10
    assert 1 <= len(factors) <= most
    assert all(a.kind != b.kind for a, b in itertools.pairwise(factors))


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("route", ROUTES)
def test_gaussian_maps(route, n, rng):
    factor, most = ROUTES[route]
    for _ in range(10):
        matrix = gaussian(rng, n)
        factors = factor(matrix)
        assert off(factors, matrix) < 1e-6
        assert len(factors) <= most


def test_five_are_enough_when_a_corner_is_invertible(rng):
    for n in (4, 6, 8):
        assert len(linear_maps.factor_minimal(gaussian(rng, n))) <= 5


def test_all_permutations_of_six():
    worst = dict.fromkeys(ROUTES, 0)
    for order in itertools.permutations(range(6)):
        matrix = even_permutation(order)
        for route in ("lu", "stable"):
            factors = ROUTES[route][0](matrix)
            assert off(factors, matrix) < 1e-12
            worst[route] = max(worst[route], len(factors))
            assert max(norms(factors)) <= LARGEST_NORM + 1e-9
    assert worst["stable"] == 9
    assert worst["lu"] <= 19


@pytest.mark.slow
def test_permutations_of_six_in_six_factors():
    # a tenth of a second each, so every fifth
    for order in [*itertools.permutations(range(6))][::5]:
        matrix = even_permutation(order)
        factors = linear_maps.factor_minimal(matrix)
        assert off(factors, matrix) < 1e-8
        assert len(factors) <= 6


@pytest.mark.slow
def test_a_thousand_rotations_and_a_thousand_maps(rng):
    """Product within 1e-10, scales 1, norms bounded whatever the size."""
    for n, count in ((2, 300), (4, 300), (16, 300), (64, 80), (128, 20)):
        for matrix in special_ortho_group.rvs(n, count, random_state=rng):
            factors = linear_maps.factor_stable(matrix)
            assert off(factors, matrix) < 1e-10
            assert len(factors) <= 15
            assert max(norms(factors)) <= LARGEST_NORM + 1e-9
            for factor in factors:
                np.testing.assert_allclose(factor.scale, 1.0, rtol=0, atol=1e-12)
        for _ in range(count):
            matrix = gaussian(rng, n)
            factors = linear_maps.factor_svd(matrix)
            assert off(factors, matrix) < 1e-10
            assert len(factors) <= 31
            kernels = [np.linalg.norm(f.kernel, 2) for f in factors]
            values = np.linalg.svd(matrix, compute_uv=False)
            # two of the kernels merge with the singular values
            assert max(kernels) <= LARGEST_NORM * max(1.0, values[0]) * 1.01


def test_the_norm_of_a_block_is_reached():
    """A factor with a kernel of norm 3 has the norm (3 + sqrt 13) / 2."""
    factor = LinearCoupling("L", 3 * np.eye(2), np.ones(2))
    values = np.linalg.svd(factor.matrix, compute_uv=False)
    np.testing.assert_allclose(values[0], LARGEST_NORM)
    np.testing.assert_allclose(values[0] / values[-1], 10.908326913195985)


def test_rounding_that_spoils_the_least_number_of_factors_is_an_error(rng):
    with pytest.raises(ArithmeticError, match=r"size 64, got .*use factor_stable"):
        linear_maps.factor_minimal(gaussian(rng, 64))


@pytest.mark.parametrize("step", [1e-2, 1e-4, 1e-6, 1e-10])
def test_close_to_a_map_that_needs_six_factors(step, rng):
    """Five factors exist there, but they are huge; six are found that are not."""
    matrix = np.diag([-1.0, -1.0, 1.0, 1.0]) + step * rng.standard_normal((4, 4))
    factors = linear_maps.factor_minimal(matrix)
    assert off(factors, matrix) < 1e-6
    assert len(factors) <= 6


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3), r"even size, got \(3, 3\)"),
        (np.diag([1.0, -1.0]), "positive determinant .* got the sign -1"),
        (np.ones((2, 2)), "positive determinant .* got the sign 0"),
        (np.diag([1.0, 1e-20]), "condition number 1e"),
        (np.diag([1.0, np.nan]), "finite matrix"),
        (np.diag([1.0, np.inf]), "finite matrix"),
    ],
)
def test_bad_matrices(route, matrix, message):
    with pytest.raises(ValueError, match=message):
        ROUTES[route][0](matrix)


def test_four_factors_of_a_certified_map_are_out_of_reach(rng):
    """Where signs forbid four factors, minimising the distance leaves one."""
    assert linear_maps.four_factor_obstruction(STUBBORN, "LULU")
    assert linear_maps.four_factor_obstruction(STUBBORN, "ULUL")
    assert not linear_maps.four_factor_obstruction(np.eye(4))
    assert distance(STUBBORN, "LULU", rng) > 1e-3
    assert distance(STUBBORN, "LULULU", rng) < 1e-12


def distance(matrix, kinds, rng):
    """The least squared distance to a product of such factors, by L-BFGS."""
    d = len(matrix) // 2
    sizes = d * d + d

    def assembled(theta):
        out = jnp.eye(2 * d)
        for kind, part in zip(kinds, theta.reshape(-1, sizes), strict=True):
            kernel, scale = (
                part[: d * d].reshape(d, d),
                jnp.diag(jnp.exp(part[d * d :])),
            )
            one, zero = jnp.eye(d), jnp.zeros((d, d))
            rows = (
                [[one, zero], [kernel, scale]]
                if kind == "L"
                else [[scale, kernel], [zero, one]]
            )
            out = out @ jnp.block(rows)
        return jnp.sum((out - matrix) ** 2)

    with enable_x64(True):
        slope = jax.jit(jax.value_and_grad(assembled))

        def both(theta):
            value, gradient = slope(jnp.asarray(theta))
            return float(value), np.asarray(gradient, np.float64)

        starts = 0.3 * rng.standard_normal((6, len(kinds) * sizes))
        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-30, "gtol": 1e-16}
        return min(
            minimize(both, s, jac=True, method="L-BFGS-B", options=options).fun
            for s in starts
        )


def test_a_certificate_holds_in_a_neighbourhood(rng):
    for _ in range(20):
        near = STUBBORN + 0.05 * rng.standard_normal((4, 4))
        assert linear_maps.four_factor_obstruction(near)
    with pytest.raises(ValueError, match="got 'LU'"):
        linear_maps.four_factor_obstruction(STUBBORN, "LU")


def random_factor(rng, kind, d=3):
    return LinearCoupling(kind, rng.standard_normal((d, d)), rng.uniform(0.5, 2, d))


@pytest.mark.parametrize("kind", ["L", "U"])
def test_rules_of_composition(kind, rng):
    one, other = random_factor(rng, kind), random_factor(rng, kind)
    np.testing.assert_allclose((one @ other).matrix, one.matrix @ other.matrix)
    np.testing.assert_allclose(one.inverse().matrix @ one.matrix, np.eye(6), atol=1e-13)
    swapped = np.roll(one.matrix, 3, axis=(0, 1))
    np.testing.assert_array_equal(one.swapped().matrix, swapped)
    power = LinearCoupling(kind, np.full((3, 3), 0.5), np.full(3, 2.0))  # exactly
    np.testing.assert_allclose(
        merged([one, power, power.inverse()])[0].matrix, one.matrix
    )
    (left,) = merged(
        [power, power.swapped(), power.swapped().inverse(), power.inverse()]
    )
    assert left.is_identity
    assert len(merged([one, other])) == 1
    with pytest.raises(ValueError, match="expected kind"):
        one @ other.swapped()


def test_bad_factors():
    with pytest.raises(ValueError, match="positive scales"):
        LinearCoupling("L", np.zeros((1, 1)), np.array([-1.0]))
    with pytest.raises(ValueError, match="finite kernel"):
        LinearCoupling("L", np.full((1, 1), np.nan), np.ones(1))
    with pytest.raises(ValueError, match="at least one factor"):
        product([])
    with pytest.raises(ValueError, match="at least one factor"):
        linear_coupling.chain([])
    mask = np.array([True, False, False, False])
    with pytest.raises(ValueError, match="a mask of 2 of 4, got 1"):
        LinearCoupling("L", np.zeros((2, 2)), np.ones(2)).layer(mask=mask)


@pytest.mark.parametrize("route", ROUTES)
def test_as_a_flow(route, rng, x64):
    """Density, log-determinant, inverse and partial products are the dense map's."""
    matrix = gaussian(rng, 6)
    factors = ROUTES[route][0](matrix)
    flow = linear_coupling.chain(factors)
    x = rng.standard_normal((20, 6))
    y, log_det = jax.vmap(flow.transform_and_log_det)(jnp.asarray(x))
    np.testing.assert_allclose(y, x @ matrix.T, atol=1e-9)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(matrix)[1], atol=1e-9)
    np.testing.assert_allclose(jax.vmap(flow.inverse)(y), x, atol=1e-8)
    for k, layer in enumerate(flow.bijections):
        part = reduce(np.matmul, [f.matrix for f in factors[len(factors) - 1 - k :]])
        state = jnp.asarray(x[0])
        for earlier in flow.bijections[: k + 1]:
            state = earlier.transform(state)
        np.testing.assert_allclose(state, part @ x[0], atol=1e-8)
        assert isinstance(layer, gf.AffineCoupling)


@pytest.mark.parametrize("dim", [2, 4, 6])
def test_a_flow_on_a_fixed_partition(dim, x64):
    flow = gf.coupling_flow(jr.key(0), dim=dim, depth=3, coupling="affine")
    other = with_fixed_partition(flow)
    x = 2 * jr.normal(jr.key(1), (500, dim))
    np.testing.assert_allclose(flow.log_prob(x), other.log_prob(x), atol=1e-10)
    assert "Householder" not in str(jax.tree.structure(other))


def test_a_mask_of_ones_own_and_a_single_layer(x64):
    mask = gf.masks.alternating(4)
    flow = gf.coupling_flow(jr.key(0), dim=4, depth=2, mask=mask)
    other = with_fixed_partition(flow, mask=mask)
    x = jr.normal(jr.key(1), (50, 4))
    np.testing.assert_allclose(flow.log_prob(x), other.log_prob(x), atol=1e-10)
    layers = jax.tree.leaves(
        other, is_leaf=lambda node: isinstance(node, gf.AffineCoupling)
    )
    for layer in layers:
        if isinstance(layer, gf.AffineCoupling):
            part = layer.mask
            assert (part == mask).all() or (part == ~mask).all()
    turn = gf.HouseholderRotation(4, (4,), key=jr.key(2))
    np.testing.assert_allclose(
        with_fixed_partition(turn).transform(x[0]), turn.transform(x[0]), atol=1e-12
    )


@pytest.mark.parametrize("mixing", ["learned", "reverse"])
def test_a_multi_scale_flow_of_pictures_on_a_fixed_partition(mixing, x64):
    flow = gf.image.glow(
        jr.key(0), shape=(4, 4, 1), levels=2, depth=2, mixing=mixing, nn_width=4,
        identity_init=False,
    )  # fmt: skip
    stretched = jax.tree.map(
        lambda leaf: 1.5 * leaf if eqx.is_inexact_array(leaf) else leaf, flow
    )
    other = with_fixed_partition(stretched)
    x = jr.uniform(jr.key(1), (50, 4, 4, 1))
    np.testing.assert_allclose(stretched.log_prob(x), other.log_prob(x), atol=1e-9)
    names = str(jax.tree.structure(other))
    assert "PLULinear" not in names
    assert "ChannelPermutation" not in names
    halves = {tuple(c.mask[0, 0]) for c in couplings(other) if c.shape[-1] == 8}
    one = (False,) * 4 + (True,) * 4
    assert halves == {one, one[::-1]}


def couplings(flow):
    def is_coupling(node):
        return isinstance(node, gf.AbstractCoupling)

    return filter(is_coupling, jax.tree.leaves(flow, is_leaf=is_coupling))


def test_pictures_keep_their_dtype(x64):
    flow = gf.image.glow(
        jr.key(0), shape=(4, 4, 1), levels=1, depth=2, mixing="reverse", nn_width=4,
        dtype=jnp.float32,
    )  # fmt: skip
    other = with_fixed_partition(flow)
    leaves = jax.tree.leaves(eqx.filter(other, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


def test_what_cannot_be_rewritten():
    level = gf.PLULinear(jr.key(0), (2, 2, 4))
    with pytest.raises(ValueError, match="expected mask=None for pictures"):
        with_fixed_partition(level, mask=gf.masks.half(4))
    with pytest.raises(ValueError, match="positive determinant"):
        with_fixed_partition(
            gf.image.ChannelPermutation((2, 2, 4), jnp.array([1, 0, 2, 3]))
        )
    with pytest.raises(ValueError, match="1×1 convolutions, got none"):
        with_fixed_partition(gf.AffineCoupling(jr.key(0), shape=(4,)))
    odd = gf.LearnedPermutation((3,))
    with pytest.raises(ValueError, match="even size"):
        with_fixed_partition(odd)
    swap = eqx.tree_at(lambda p: p.scores, gf.LearnedPermutation((2,)), jnp.arange(2.0))
    with pytest.raises(ValueError, match="positive determinant"):
        with_fixed_partition(swap)
