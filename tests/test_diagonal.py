import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gauss_flows as gf
from gauss_flows import transformers


@pytest.mark.parametrize("kind", ["affine", "spline", "mixture", "sigmoid"])
def test_two_couplings_with_zero_kernels_are_one_diagonal_layer(kind, x64):
    x = jr.normal(jr.key(0), (400, 3)) ** 3 / 3 + 0.2
    couplings = {
        "affine": gf.AffineCoupling,
        "spline": gf.RQSplineCoupling,
        "mixture": gf.MixtureCDFCoupling,
        "sigmoid": gf.DeepSigmoidCoupling,
    }
    mask = gf.masks.half(3)
    first, second = (
        couplings[kind](jr.key(1), shape=(3,), mask=m).from_data(x)
        for m in (mask, ~mask)
    )
    diagonal = gf.Diagonal(first.transformer, (3,)).from_data(x)

    @eqx.filter_jit
    @jax.vmap
    def both(x):
        y, log_det = first.transform_and_log_det(x)
        y, more = second.transform_and_log_det(y)
        return (y, log_det + more), diagonal.transform_and_log_det(x)

    for a, b in zip(*both(2 * x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


def test_its_jacobian_is_diagonal():
    layer = gf.Diagonal(transformers.MixtureCDF(3), (4,)).from_data(
        jr.normal(jr.key(0), (50, 4))
    )
    jacobian = jax.jacfwd(layer.transform)(jnp.array([0.1, -2.0, 0.5, 3.0]))
    np.testing.assert_array_equal(jacobian, jnp.diag(jnp.diag(jacobian)))


def test_a_diagonal_flow_of_one_number_has_no_rotation():
    flow = gf.diagonal_flow(jr.key(0), dim=1, depth=2)
    assert len(gf.blocks(flow)[0].bijections) == 1
    assert flow.log_prob(jnp.zeros((3, 1))).shape == (3,)


def test_a_diagonal_flow_takes_the_options_of_a_coupling_flow(x64):
    flow = gf.diagonal_flow(
        jr.key(0),
        dim=4,
        depth=2,
        transformer=transformers.RQSpline(5, 3.0),
        actnorm=True,
        n_reflections=2,
        memory="recompute",
        dtype=jnp.float32,
    )
    norm, rotation, layer = gf.blocks(flow)[0].bijections
    assert norm.shift.dtype == rotation.params.dtype == layer.theta.dtype == jnp.float32
    assert rotation.params.shape == (2, 4)
    assert layer.theta.shape == (transformers.RQSpline(5).n_parameters, 4)
    x = jr.normal(jr.key(1), (6, 4), jnp.float32)
    back = jax.vmap(lambda v: flow.bijection.transform(flow.bijection.inverse(v)))(x)
    np.testing.assert_allclose(back, x, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gf.Diagonal(transformers.Affine(), ()), r"such as \(2,\), got \(\)"),
        (lambda: transformers.MixtureCDF(0), "n_components to be an integer >= 1"),
        (lambda: transformers.DeepSigmoid(-2), "n_components to be an integer >= 1"),
        (lambda: transformers.RQSpline(0), "at least 1, got 0"),
        (lambda: transformers.Affine(-1.0), "positive, finite log_scale_bound"),
        (
            lambda: gf.diagonal_flow(jr.key(0), dim=2, depth=0),
            "depth of at least 1, got 0",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_constant_coordinate_is_refused():
    x = jr.normal(jr.key(0), (50, 2)).at[:, 1].set(0.3)
    with pytest.raises(RuntimeError, match="every coordinate to vary"):
        gf.Diagonal(transformers.Affine(), (2,)).from_data(x)
