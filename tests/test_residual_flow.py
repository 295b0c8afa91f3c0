"""Stacks of residual maps: bijections, training, and the proof that they contract."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import paramax
import pytest
from conftest import enable_x64
from flowjax.bijections import Chain
from flowjax.distributions import Normal, StandardNormal

import gauss_flows as gf
from gauss_flows import log_det, newton, residual_stack, spectral

ROUNDING = {False: 2e-4, True: 1e-10}


def flow(shape=(2,), depth=3, seed=0, **options):
    options = {"nn_width": 12, "lipschitz": 0.8, **options}
    return residual_stack.residual_flow(
        jr.key(seed), shape=shape, depth=depth, **options
    )


KINDS = {
    "plane": {},
    "with actnorm": {"actnorm": True},
    "eight": {"shape": (8,), "depth": 2, "nn_depth": 1},
    "picture": {"shape": (3, 4, 2), "depth": 2, "nn_width": 4},
    "by newton": {"inverse": newton.newton_inverse},
    "recomputed": {"memory": "recompute"},
}


@eqx.filter_jit
def both_ways(bijection, x):
    def one(x):
        y, log_det = bijection.transform_and_log_det(x)
        back, inverse_log_det = bijection.inverse_and_log_det(y)
        flat = jax.jacfwd(lambda v: bijection.transform(v.reshape(x.shape)).ravel())
        true = jnp.linalg.slogdet(flat(x.ravel()))[1]
        return y, back, log_det, inverse_log_det, true

    return jax.vmap(one)(x)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bijection(kind, wide):
    with enable_x64(wide):
        stack = gf.normalizing_map(flow(**KINDS[kind]))
        x = 2 * jr.normal(jr.key(1), (16, *stack.shape))
        y, back, found, inverse_log_det, true = both_ways(stack, x)
        near = {"atol": ROUNDING[wide], "rtol": ROUNDING[wide]}
        np.testing.assert_allclose(back, x, **near)
        np.testing.assert_allclose(found, true, **near)
        np.testing.assert_allclose(inverse_log_det, -true, **near)
        assert y.dtype == back.dtype == found.dtype == x.dtype


@pytest.mark.usefixtures("x64")
def test_scanned_blocks_are_the_blocks():
    stack = gf.normalizing_map(flow(depth=4, actnorm=True))
    x = jr.normal(jr.key(0), (5, 2))
    one_by_one = jax.vmap(Chain(gf.blocks(stack)).transform_and_log_det)(x)
    scanned = jax.vmap(stack.transform_and_log_det)(x)
    for got, expected in zip(scanned, one_by_one, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_float32_stays_float32():
    small = flow(dtype=jnp.float32, actnorm=True)
    x = jr.normal(jr.key(0), (7, 2), jnp.float32)
    z, log_dets = jax.vmap(gf.normalizing_map(small).transform_and_log_det)(x)
    assert z.dtype == log_dets.dtype == jnp.float32
    loss = residual_stack.EstimatedLikelihood(log_det.Roulette())
    assert loss(small, x, jr.key(1)).dtype == jnp.float32


# --- training -------------------------------------------------------------------------


def test_the_bound_holds_after_every_step():
    """At a learning rate that would break it at once, in what is used and by proof."""
    x = gf.data.two_moons(jr.key(0), 500)
    xs = 2 * jr.normal(jr.key(1), (50, 2))
    seen = []

    def look(snapshot):
        stack = paramax.unwrap(gf.normalizing_map(snapshot.flow))
        norms = [
            gf.probe.lipschitz_lower_bound(block.g, xs) for block in gf.blocks(stack)
        ]
        proven = residual_stack.certify(snapshot.flow)
        seen.append((max(norms), proven.max()))

    result = gf.fit(
        jr.key(2), flow(), x, steps=6, eval_every=1, learning_rate=0.5,
        batch_size=64, callback=look, progress=False,
    )  # fmt: skip
    raw = [w.weight for w in result.flow.bijection.bijection.bijection.g.weights]
    assert max(jnp.linalg.norm(w, 2, axis=(1, 2)).max() for w in raw) > 2
    assert len(seen) == 7
    for measured, proven in seen:
        assert measured <= proven * (1 + 1e-5)
        assert proven <= 0.8 * (1 + 1e-4)


@pytest.mark.usefixtures("x64")
def test_the_inverse_after_training():
    """Below 1e-10, in at most the steps that the bound allows, at every block."""
    x = gf.data.four_gaussians(jr.key(0), 1000)
    result = gf.fit(
        jr.key(1), flow(depth=4, lipschitz=0.9), x, steps=150, batch_size=128,
        learning_rate=0.01, progress=False,
    )  # fmt: skip
    assert result.train_loss[-20:].mean() < result.train_loss[:20].mean() - 0.1
    stack = paramax.unwrap(gf.normalizing_map(result.flow))
    z = jax.vmap(stack.transform)(x)
    assert jnp.abs(jax.vmap(stack.inverse)(z) - x).max() < 1e-10

    def step(x, block, _):
        y = jax.vmap(block.transform)(x)
        found = jax.vmap(
            lambda y: gf.banach_inverse(block.g, y, lipschitz=0.9, tolerance=1e-11)
        )(y)
        error = jnp.linalg.norm(found.x - x, axis=1)
        first = jnp.linalg.norm(jax.vmap(block.g)(y), axis=1)
        # L^k |x1 - x0| / (1 - L) is below the tolerance from here on; one to see it
        allowed = jnp.log(1e-11 * 0.1 / first) / jnp.log(0.9) + 2
        return y, (error.max(), (found.steps - allowed).max(), found.error_bound.max())

    _, (errors, excess, bounds) = gf.stack.walk(step, x, stack)
    assert errors.max() < 1e-10
    assert bounds.max() < 1e-10
    assert excess.max() <= 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("actnorm", [False, True])
def test_the_loss_estimates_the_likelihood(actnorm):
    """Its value and its gradient, in the mean over keys, against the exact ones."""
    some, x = flow(actnorm=actnorm), jr.normal(jr.key(0), (20, 2))
    loss = residual_stack.EstimatedLikelihood(log_det.Roulette(probes=2))
    exact, gradient = eqx.filter_value_and_grad(gf.train.negative_log_likelihood)(
        some, x
    )

    @eqx.filter_jit
    def estimates(keys):
        def one(key):
            return eqx.filter_value_and_grad(lambda f: loss(f, x, key))(some)

        return jax.vmap(one)(keys)

    values, gradients = estimates(jr.split(jr.key(1), 4000))
    assert jnp.abs(values.mean() - exact) < 4 * values.std() / 4000**0.5
    for got, expected in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(gradient), strict=True
    ):
        error = got.std(axis=0) / 4000**0.5
        score = (got.mean(axis=0) - expected) / (error + 1e-12)
        assert jnp.sqrt(jnp.mean(score**2)) < 2.5
    assert loss(some, x, jr.key(2)) == loss(some, x, jr.key(2))
    assert loss(some, x, jr.key(2)) != loss(some, x, jr.key(3))


class Recorder(log_det.AbstractEstimator):
    """Gives each block the number that its key draws, for a log-determinant."""

    probes: int = 1
    noise: str = "gaussian"

    def draw_terms(self, key):
        return jnp.asarray(0, jnp.int32)

    def reached(self, k):
        return jnp.ones((), jnp.float32)

    def log_dets(self, g, xs, key):
        return jr.normal(key, (len(xs),), xs.dtype)


@pytest.mark.usefixtures("x64")
def test_no_key_is_used_twice():
    """Each block and each row draws for itself: sums have the variance of sums."""
    x, deep = jr.normal(jr.key(0), (400, 2)), flow(depth=9)
    loss = residual_stack.EstimatedLikelihood(Recorder())
    moved = jax.vmap(gf.normalizing_map(deep).transform)(x)
    known = StandardNormal((2,)).log_prob(moved).mean()
    drawn = jax.vmap(lambda key: loss(deep, x, key))(jr.split(jr.key(1), 500)) + known
    # a mean over 400 rows of sums over 9 blocks; equal keys would give 9 times that
    np.testing.assert_allclose(drawn.var(), 9 / 400, rtol=0.3)
    rows = log_det.Truncated(3).log_dets(gf.blocks(deep)[0].g, x[:1] + 0 * x, jr.key(0))
    assert len(set(np.asarray(rows).tolist())) == 400


def test_fit_with_estimates_learns():
    x = gf.data.four_gaussians(jr.key(0), 1000)
    x, x_val = x[:800], x[800:]
    loss = residual_stack.EstimatedLikelihood(log_det.Roulette("poisson"))
    start = gf.initialize_actnorm(flow(actnorm=True), x)
    result = gf.fit(
        jr.key(1), start, x, x_val=x_val, steps=60, batch_size=128, eval_every=30,
        learning_rate=0.01, loss=loss, progress=False,
    )  # fmt: skip
    gain = gf.mean_log_prob(result.flow, x_val) - gf.mean_log_prob(start, x_val)
    assert gain > 0.05


def test_actnorm_is_set_from_data():
    x = 5 + 3 * jr.normal(jr.key(0), (200, 2))
    start = gf.initialize_actnorm(flow(actnorm=True), x)
    state = gf.blocks(start)[0].bijections[0].transform
    moved = jax.vmap(state)(x)
    np.testing.assert_allclose(moved.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(moved.std(axis=0), 1, rtol=1e-5)


# --- proofs and errors ----------------------------------------------------------------


def test_certify_every_block():
    found = residual_stack.certify(flow(depth=5, actnorm=True))
    assert found.shape == (5,)
    assert np.all(found <= 0.8 * (1 + 1e-4))
    mixed = Chain(
        [
            gf.ResidualMap(
                gf.contraction_mlp(
                    jr.key(i), dim=2, width=8, depth=1, lipschitz=0.5 + i / 10
                ),
                shape=(2,),
                lipschitz=0.5 + i / 10,
            )
            for i in range(2)
        ]
    )
    np.testing.assert_allclose(residual_stack.certify(mixed), [0.5, 0.6], rtol=1e-3)
    edited = eqx.tree_at(
        lambda c: c.bijections[1].g.layers[0].weight, mixed, jnp.ones((8, 2))
    )
    with pytest.raises(ValueError, match=r"map 1 of 2: .* bound 0\.6, got layers"):
        residual_stack.certify(edited)
    with pytest.raises(ValueError, match=r"map 0 of 1: .*can be bounded, got function"):
        residual_stack.certify(
            gf.ResidualMap(lambda x: 0.5 * x, shape=(2,), lipschitz=0.5)
        )
    with pytest.raises(ValueError, match="a flow with residual maps"):
        residual_stack.certify(gf.coupling_flow(jr.key(0), dim=2, depth=1))


def test_a_lost_bound_is_found_at_construction():
    net = paramax.unwrap(
        spectral.LipschitzMLP(jr.key(0), dim=2, width=8, depth=1, lipschitz=0.8)
    )
    gf.ResidualMap(net, shape=(2,), lipschitz=0.8)
    edited = eqx.tree_at(lambda n: n.weights[0], net, 3 * net.weights[0])
    with pytest.raises(ValueError, match=r"bound 0\.8, got layers"):
        gf.ResidualMap(edited, shape=(2,), lipschitz=0.8)
    with pytest.raises(ValueError, match=r"bound 0\.1, got layers"):
        gf.ResidualMap(net, shape=(2,), lipschitz=0.1)


def test_a_stack_that_was_unwrapped_and_edited_is_found():
    """Not by a wrong inverse: by the check."""
    bare = paramax.unwrap(flow())
    residual_stack.certify(bare)
    edited = jax.tree.map(lambda a: 3 * a if eqx.is_array(a) else a, bare)
    with pytest.raises(ValueError, match=r"bound 0\.8, got layers"):
        residual_stack.certify(edited)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth of at least 1, got 0"),
        ({"memory": "invert"}, "'store' or 'recompute', got 'invert'"),
        ({"shape": (2, 2)}, r"1 or 3 axes, got \(2, 2\)"),
        ({"lipschitz": 1.0}, r"bound in \(0, 1\), got 1"),
        ({"base": Normal(jnp.zeros(3))}, r"base distribution of shape \(2,\)"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        flow(**options)
