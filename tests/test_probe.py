"""Probes against closed forms, and against each other."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
from flowjax.bijections import (
    AbstractBijection,
    Affine,
    Chain,
    Invert,
    Scan,
    TriangularAffine,
)
from flowjax.distributions import Normal, StandardNormal, Transformed
from paramax import non_trainable

import gauss_flows as gf
from gauss_flows import probe


class Linear(AbstractBijection):
    """x -> A x, the closed form of most tests."""

    matrix: jax.Array
    shape: tuple[int, ...]
    cond_shape: ClassVar[None] = None

    def __init__(self, matrix):
        self.matrix = jnp.asarray(matrix, float)
        self.shape = (self.matrix.shape[-1],)

    def transform_and_log_det(self, x, condition=None):
        return self.matrix @ x, jnp.linalg.slogdet(self.matrix)[1]

    def inverse_and_log_det(self, y, condition=None):
        return jnp.linalg.solve(self.matrix, y), -jnp.linalg.slogdet(self.matrix)[1]


class Broken(AbstractBijection):
    """Its inverse is off by one half."""

    shape: tuple[int, ...] = (2,)
    cond_shape: ClassVar[None] = None

    def transform_and_log_det(self, x, condition=None):
        return x, jnp.zeros(())

    def inverse_and_log_det(self, y, condition=None):
        return y + 0.5, jnp.zeros(())


def orthogonal(seed, d):
    return jnp.linalg.qr(jr.normal(jr.key(seed), (d, d)))[0]


def as_scan(flow):
    return flow.bijection.bijection


def as_chain(flow):
    return Transformed(flow.base_dist, Invert(Chain(gf.blocks(flow))))


def turned(flow):
    """The same flow, its stack written from latent to data."""
    backwards = eqx.filter_vmap(Invert)(
        jax.tree.map(
            lambda a: a[::-1] if eqx.is_array(a) else a, as_scan(flow).bijection
        )
    )
    return Transformed(flow.base_dist, Scan(backwards))


@pytest.fixture(scope="module", params=["affine"])
def flow(request):
    base = Normal(jnp.zeros(2))
    return gf.coupling_flow(
        jr.key(3), dim=2, depth=3, coupling=request.param, nn_width=6, base=base
    )


@pytest.fixture
def batch():
    return 1.5 * jr.normal(jr.key(5), (20, 2))


def test_gradient_norm_of_a_normal(x64):
    """For N(m, s): d/dm = -(mean x - m)/s^2; the scale sits behind a softplus."""
    x = jnp.array([[1.0], [3.0]])
    flow = Normal(jnp.zeros(1), 2 * jnp.ones(1))
    d_loc = -x.mean() / 4
    d_scale = 1 / 2 - (x**2).mean() / 8
    through_softplus = d_scale * (1 - jnp.exp(-2.0))
    expected = jnp.hypot(d_loc, through_softplus)
    np.testing.assert_allclose(probe.gradient_norm(flow, x), expected, rtol=1e-12)


def test_frozen_parameters_do_not_count(flow, batch):
    frozen = eqx.tree_at(lambda f: f.base_dist, flow, replace_fn=non_trainable)
    whole, rest = (probe.gradient_norm(f, batch) for f in (flow, frozen))
    assert rest < whole
    blocks = probe.block_gradient_norms(frozen, batch)
    np.testing.assert_allclose(jnp.sum(blocks**2), rest**2, rtol=1e-4)
    assert probe.parameter_count(flow) - probe.parameter_count(frozen) == 4


def test_own_loss(flow, batch):
    double = probe.gradient_norm(
        flow, batch, loss=lambda f, x: -2 * f.log_prob(x).mean()
    )
    np.testing.assert_allclose(double, 2 * probe.gradient_norm(flow, batch), rtol=1e-5)


def test_parts_add_up_to_the_global_norm(flow, batch):
    total, blocks, base = probe.gradient_norms(flow, batch)
    np.testing.assert_allclose(jnp.sum(blocks**2) + base**2, total**2, rtol=1e-4)
    np.testing.assert_allclose(probe.gradient_norm(flow, batch), total, rtol=1e-5)
    np.testing.assert_array_equal(probe.block_gradient_norms(flow, batch), blocks)

    def loss_of_base(base):
        moved = Transformed(base, flow.bijection)
        return probe.negative_log_likelihood(moved, batch)

    gradient = jax.tree.leaves(eqx.filter_grad(loss_of_base)(flow.base_dist))
    own = sum(jnp.sum(g**2) for g in gradient)
    np.testing.assert_allclose(base**2, own, rtol=1e-4)


def test_block_jacobians_multiply_to_the_whole(flow, batch):
    first, second, third = probe.block_jacobians(flow, batch[0])
    np.testing.assert_allclose(
        third @ second @ first, probe.jacobian(flow, batch[0]), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["affine", "spline"], indirect=True)
@pytest.mark.parametrize("rewrite", [as_chain, turned])
def test_chain_scan_and_inverted_agree(flow, batch, rewrite):
    other = rewrite(flow)
    for measure in (probe.block_gradient_norms, probe.signal_norms):
        np.testing.assert_allclose(
            measure(other, batch), measure(flow, batch), rtol=2e-3
        )
    np.testing.assert_array_equal(
        probe.block_parameter_counts(other), probe.block_parameter_counts(flow)
    )
    np.testing.assert_allclose(
        probe.block_singular_values(other, batch[0]),
        probe.block_singular_values(flow, batch[0]),
        rtol=1e-3,
    )


def test_data_side_comes_first(batch):
    """Only the block next to the data is large, whichever way the flow is written."""
    wide = gf.AffineCoupling(jr.key(0), shape=(2,), nn_width=50)
    slim = gf.AffineCoupling(jr.key(1), shape=(2,), nn_width=5)
    base = StandardNormal((2,))
    inward = Transformed(base, Invert(Chain([wide, slim])))
    outward = Transformed(base, Chain([Invert(slim), Invert(wide)]))
    for flow in (inward, outward):
        wide_count, slim_count = probe.block_parameter_counts(flow)
        assert wide_count > slim_count
        assert probe.block_gradient_norms(flow, batch).shape == (2,)
    np.testing.assert_allclose(
        probe.block_gradient_norms(inward, batch),
        probe.block_gradient_norms(outward, batch),
        rtol=1e-3,
    )


def test_parameter_counts(flow):
    counts = probe.block_parameter_counts(flow)
    assert counts.shape == (3,)
    assert probe.parameter_count(flow) == counts.sum() + 4  # base: loc and scale
    mlp = lambda out: (6 + 6) + (36 + 6) + (6 * out + out)  # noqa: E731
    out = 2 if "AffineCoupling" in str(flow) else 28
    assert counts[0] == 4 + 2 * mlp(out)


def test_signal_of_linear_maps(x64):
    """For a chain of linear maps, d log p / d h_k = -(rest of the maps)^T z."""
    a, b = Linear([[2.0, 1.0], [0.0, 1.0]]), Linear([[1.0, 0.0], [3.0, 0.5]])
    flow = Transformed(StandardNormal((2,)), Invert(Chain([a, b])))
    x = jnp.array([0.3, -1.2])
    z = b.matrix @ a.matrix @ x
    expected = jnp.stack([-(b.matrix @ a.matrix).T @ z, -b.matrix.T @ z, -z])
    np.testing.assert_allclose(probe.state_gradients(flow, x), expected, rtol=1e-12)
    xs = jnp.stack([x, 3 * x])  # signals are linear in x here
    rms = jnp.sqrt((1 + 9) / 2) * jnp.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(probe.signal_norms(flow, xs), rms, rtol=1e-12)


def test_signal_at_the_data_is_the_score(flow, batch):
    """The first entry is the gradient of log p in x, log-determinants included."""
    score = jax.grad(lambda x: flow.log_prob(x))(batch[0])
    signals = probe.state_gradients(flow, batch[0])
    np.testing.assert_allclose(signals[0], score, rtol=1e-3, atol=1e-4)
    z = gf.intermediates(flow, batch[0])[-1]
    np.testing.assert_allclose(signals[-1], -z, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_singular_values_of_a_known_map(d, x64):
    values = jnp.logspace(2, -3, d)
    matrix = orthogonal(0, d) * values @ orthogonal(1, d)
    got = probe.singular_values(Linear(matrix), jnp.ones(d))
    np.testing.assert_allclose(got, values, rtol=1e-9)
    np.testing.assert_allclose(
        probe.condition_number(Linear(matrix), jnp.ones(d)),
        values[0] / values[-1],
        rtol=1e-9,
    )


@pytest.mark.parametrize("d", [2, 4])
def test_small_singular_values_of_a_product_are_not_noise(d, x64):
    """Condition 1e24: an SVD of the product alone gets the small ones wrong."""
    spread = jnp.logspace(1.5, -1.5, d)
    frames = [orthogonal(k, d) for k in range(9)]
    factors = [
        Linear(frames[k + 1] * spread @ frames[k].T) for k in range(8)
    ]  # the stretched directions line up, so singular values multiply
    x = jnp.ones(d)
    stack = Chain(factors)
    np.testing.assert_allclose(probe.singular_values(stack, x), spread**8, rtol=1e-3)
    plain = jnp.linalg.svd(probe.jacobian(stack, x), compute_uv=False)
    assert not np.allclose(plain[-1], spread[-1] ** 8, rtol=0.5)
    lower, upper = probe.product_bounds(probe.block_singular_values(stack, x))
    np.testing.assert_allclose([upper, lower], [1e12, 1e-12], rtol=1e-9)


def test_product_bounds_are_not_equalities():
    """diag(2, 1/2) diag(1/2, 2) = I, though the bounds say 1/4 and 4."""
    stack = Chain([Linear(jnp.diag(jnp.array(v))) for v in ([2.0, 0.5], [0.5, 2.0])])
    values = probe.block_singular_values(stack, jnp.ones(2))
    np.testing.assert_allclose(values, [[2, 0.5], [2, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(probe.product_bounds(values), [0.25, 4.0], rtol=1e-6)
    np.testing.assert_allclose(
        probe.singular_values(stack, jnp.ones(2)), [1, 1], rtol=1e-6
    )


def test_product_bounds_hold(flow, batch):
    def ratios(x):
        lower, upper = probe.product_bounds(probe.block_singular_values(flow, x))
        values = probe.singular_values(flow, x)
        return jnp.stack([upper / values[0], values[-1] / lower])

    assert (jax.vmap(ratios)(batch) > 1 - 1e-4).all()


def test_jacobian_of_a_flow_goes_from_data_to_latent():
    flow = Transformed(
        StandardNormal((2,)), Affine(jnp.zeros(2), jnp.array([2.0, 4.0]))
    )
    expected = jnp.diag(jnp.array([0.5, 0.25]))
    np.testing.assert_allclose(probe.jacobian(flow, jnp.ones(2)), expected)
    np.testing.assert_allclose(
        probe.jacobian(flow.bijection, jnp.ones(2)), jnp.linalg.inv(expected)
    )


def test_jacobian_of_a_picture():
    coupling = gf.AffineCoupling(
        jr.key(0), shape=(2, 2, 1), mask=gf.masks.checkerboard((2, 2, 1)), nn_width=4
    )
    x = jr.normal(jr.key(1), (2, 2, 1))
    values = probe.singular_values(coupling, x)
    log_det = coupling.transform_and_log_det(x)[1]
    np.testing.assert_allclose(jnp.log(values).sum(), log_det, atol=1e-5)


def test_round_trip_error():
    shear = Chain([TriangularAffine(jnp.zeros(2), jnp.array([[1.0, 0.0], [9.0, 1.0]]))])
    assert probe.round_trip_error(shear, jnp.ones(2)) < 1e-5

    np.testing.assert_allclose(probe.round_trip_error(Broken(), jnp.zeros(2)), 0.5)


def test_lipschitz_lower_bound():
    xs = jnp.linspace(-2, 2, 41)[:, None]
    steepest = probe.lipschitz_lower_bound(lambda x: 0.9 * jnp.sin(1.5 * x), xs)
    np.testing.assert_allclose(steepest, 1.35, rtol=1e-5)
    assert probe.lipschitz_lower_bound(Linear(3 * jnp.eye(2)), jnp.ones((1, 2))) == 3


def test_under_jit_and_vmap_over_flows(batch):
    def build(key):
        return gf.coupling_flow(key, dim=2, depth=2, coupling="affine", nn_width=4)

    flows = eqx.filter_vmap(build)(jr.split(jr.key(0), 3))

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), None))
    def measure(flow, x):
        norms = probe.block_gradient_norms(flow, x)
        conditions = jax.vmap(lambda e: probe.condition_number(flow, e))(x)
        return norms, probe.signal_norms(flow, x), conditions

    norms, signals, conditions = measure(flows, batch)
    assert norms.shape == (3, 2)
    assert signals.shape == (3, 3)
    assert conditions.shape == (3, 20)
    one = jax.tree.map(lambda a: a[1] if eqx.is_array(a) else a, flows)
    np.testing.assert_allclose(
        norms[1], probe.block_gradient_norms(one, batch), rtol=1e-4
    )
    assert (conditions >= 1).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_kept(dtype, x64):
    base = StandardNormal((2,))
    flow = gf.coupling_flow(
        jr.key(0), dim=2, depth=2, base=base, nn_width=4, dtype=dtype
    )
    x = jnp.ones((3, 2), dtype)
    assert probe.block_gradient_norms(flow, x).dtype == dtype
    assert probe.gradient_norm(flow, x).dtype == dtype
    assert probe.state_gradients(flow, x[0]).dtype == dtype
    assert probe.singular_values(flow, x[0]).dtype == dtype


def test_program_does_not_grow_with_depth(batch):
    """Traced programs of 2 and 20 blocks have as many operations."""

    def size(depth, measure, x):
        flow = gf.coupling_flow(
            jr.key(0), dim=2, depth=depth, coupling="affine", nn_width=4
        )
        arrays, static = eqx.partition(flow, eqx.is_array)
        traced = jax.make_jaxpr(lambda a: measure(eqx.combine(a, static), x))(arrays)
        return str(traced).count("=")

    for measure, x in [
        (probe.block_gradient_norms, batch),
        (probe.signal_norms, batch),
        (probe.block_singular_values, batch[0]),
        (probe.singular_values, batch[0]),
    ]:
        assert size(20, measure, x) == size(2, measure, x)


PRINTED = {"affine": (1.8, 3.6, 2.4, 8.9), "spline": (3.1, 5.3, 7.7, 37.1)}


@pytest.mark.slow
@pytest.mark.parametrize("coupling", PRINTED)
def test_the_source_notebooks_gradient_norms(coupling, x64):
    """Its eight numbers; chapter 08 gets them from its own recipe, too."""
    x = gf.data.source_spiral()[:1000]
    for depth, printed in zip((2, 4, 8, 16), PRINTED[coupling], strict=True):
        base = Normal(jnp.zeros(2))
        flow = gf.coupling_flow(
            jr.key(0), dim=2, depth=depth, coupling=coupling, base=base
        )
        assert round(float(probe.gradient_norm(flow, x)), 1) == printed


@pytest.mark.parametrize("shape", [(2,), (5, 3), (0, 2), (4, 5, 2)])
@pytest.mark.parametrize("measure", [probe.gradient_norm, probe.signal_norms])
def test_wrong_batch(measure, shape, flow):
    with pytest.raises(ValueError, match=r"expected a batch.*\(2,\).*got shape"):
        measure(flow, jnp.zeros(shape))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_data_that_is_not_finite(bad, flow, batch):
    with pytest.raises(ValueError, match="expected finite data"):
        probe.block_gradient_norms(flow, batch.at[3, 1].set(bad))


def test_wrong_event(flow):
    for measure in (
        probe.jacobian,
        probe.block_singular_values,
        probe.round_trip_error,
    ):
        with pytest.raises(ValueError, match=r"expected one event.*vmap"):
            measure(flow, jnp.zeros((4, 2)))


def test_wrong_kind(batch, monkeypatch):
    """What users see, whose calls no type checker comes before."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    bijection: Any = Linear(jnp.eye(2))
    with pytest.raises(ValueError, match="expected a distribution"):
        probe.gradient_norm(bijection, batch)
    no_blocks: Any = StandardNormal((2,))
    with pytest.raises(ValueError, match="expected a Transformed"):
        probe.block_gradient_norms(no_blocks, batch)
    with pytest.raises(ValueError, match="at least one event"):
        probe.lipschitz_lower_bound(jnp.sin, jnp.zeros((0, 2)))
