"""Columns change how a batch is laid out, and nothing else."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flowjax.bijections import Chain, Flip, Invert, Tanh

import gauss_flows as gf
from gauss_flows import _columns

BATCHES = [(), (5,), (2, 3)]


def layers():
    keys = jr.split(jr.key(0), 6)
    mask = gf.masks.alternating(4)
    actnorm = gf.ActNorm((4,))
    shift = actnorm.from_data(jr.normal(keys[0], (9, 4)))
    rotation = gf.HouseholderRotation(4, (4,), key=keys[1])
    affine = gf.AffineCoupling(keys[2], shape=(4,), mask=mask)
    spline = gf.RQSplineCoupling(keys[3], shape=(4,))
    return {
        "affine": affine,
        "additive": gf.AdditiveCoupling(keys[4], shape=(4,)),
        "spline": spline,
        "linear conditioner": gf.RQSplineCoupling(keys[5], shape=(4,), nn_depth=0),
        "rotation": rotation,
        "learned permutation": gf.LearnedPermutation((4,), key=keys[1]),
        "PLU": gf.PLULinear(keys[1], (4,)),
        "actnorm": shift,
        "chain": Chain([shift, rotation, affine, Flip((4,)), spline]),
        "inverse of a chain": Invert(Chain([rotation, Invert(spline), affine])),
        "a layer of flowjax": Tanh((4,)),
    }


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", layers())
def test_columns_are_events_side_by_side(name, inverse, x64):
    layer = layers()[name]
    apply = jax.jit(lambda x: _columns.transform(layer, x, inverse=inverse))
    one = layer.inverse_and_log_det if inverse else layer.transform_and_log_det
    for batch in BATCHES:
        x = jr.uniform(jr.key(7), (4, *batch), minval=-0.9, maxval=0.9)
        y, log_det = apply(x)
        flat = x.reshape(4, -1).T
        expected, expected_log_det = jax.jit(jax.vmap(one))(flat)
        np.testing.assert_allclose(y.reshape(4, -1).T, expected, atol=1e-12)
        np.testing.assert_allclose(log_det.ravel(), expected_log_det, atol=1e-12)
        assert log_det.shape == batch


def polynomial(scale, x):
    """Of columns (d, *batch): each event by itself, and one number an event."""
    weight = scale.reshape(-1, *(1,) * (x.ndim - 1))
    return weight * x**3, (weight * x**2).sum(axis=0)


def scalar(scale, x):
    y, total = _columns.batched(polynomial, scale, x)
    return y.sum() * total


def plain(scale, x):
    y, total = polynomial(scale, x)
    return y.sum() * total


SCALE = jnp.array([1.0, 2.0, 3.0])
X = jr.normal(jr.key(1), (5, 3))
SCALES = jr.normal(jr.key(2), (5, 3))


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: f(SCALE, X[0]),
        lambda f: jax.vmap(f, (None, 0))(SCALE, X),
        lambda f: jax.vmap(f, (None, 1))(SCALE, X.T),
        lambda f: jax.vmap(f, (0, None))(SCALES, X[0]),
        lambda f: jax.vmap(f)(SCALES, X),
        lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None))(SCALES, X),
        lambda f: jax.grad(f)(SCALE, X[0]),
        lambda f: jax.vmap(jax.grad(f, 1), (None, 0))(SCALE, X),
        lambda f: jax.vmap(jax.grad(f), (None, 0))(SCALE, X),
        lambda f: jax.grad(lambda s: jax.vmap(f, (None, 0))(s, X).sum())(SCALE),
        lambda f: jax.jacfwd(f, 1)(SCALE, X[0]),
        lambda f: jax.vmap(jax.jacfwd(f, 1), (None, 0))(SCALE, X),
        lambda f: jax.hessian(f, 1)(SCALE, X[0]),
        lambda f: jax.jvp(jax.vmap(f, (None, 0)), (SCALE, X), (SCALE, X)),
        lambda f: jax.grad(jax.jit(f))(SCALE, X[0]),
        lambda f: jax.grad(jax.checkpoint(f))(SCALE, X[0]),
        lambda f: jax.lax.map(lambda x: f(SCALE, x), X),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_every_transformation_sees_the_plain_function(transformed, compiled):
    run = (lambda f: jax.jit(lambda: transformed(f))()) if compiled else transformed
    leaves = jax.tree.leaves(run(scalar)), jax.tree.leaves(run(plain))
    for got, expected in zip(*leaves, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_mapped_batch_arrives_as_columns():
    seen = []

    def look(scale, x):
        seen.append(x.shape)
        return polynomial(scale, x)

    jax.vmap(lambda x: _columns.batched(look, SCALE, x))(X)
    assert seen[-1] == (3, 5)


def test_a_flow_has_its_gradients_in_forward_mode_too(x64):
    flow = gf.coupling_flow(jr.key(0), dim=2, depth=3)
    x = jr.normal(jr.key(1), (2,))
    forward = jax.jit(jax.jacfwd(lambda x: flow.log_prob(x)))(x)
    backward = jax.jit(jax.grad(lambda x: flow.log_prob(x)))(x)
    np.testing.assert_allclose(forward, backward, rtol=1e-9)


def in_parts(monkeypatch, part, n=12):
    """Values and gradients of polynomials, so many numbers at a time."""
    monkeypatch.setattr(_columns, "PART", part)
    x = jr.normal(jr.key(3), (n, 3))
    seen = []

    def look(scale, x):
        seen.append(x.shape)
        return polynomial(scale, x)

    def all_of(scale):
        y, total = jax.vmap(lambda x: _columns.batched(look, scale, x))(x)
        return (y * jnp.cos(total)[:, None]).sum(), (y, total)

    return jax.value_and_grad(all_of, has_aux=True)(SCALE), seen


def test_parts_change_nothing_but_the_size(monkeypatch):
    whole, seen = in_parts(monkeypatch, 10**9)
    assert set(seen) == {(3, 12)}
    parts, seen = in_parts(monkeypatch, 14)
    assert set(seen) == {(3, 4)}
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("columns", "height", "size"),
    [
        (8192, 2, 8192),  # few enough
        (8192, 64, 256),
        (10_000, 64, 250),  # a divisor
        (10_007, 64, 10_007),  # a prime has none that is worth while
        (512, 50_000, 512),  # one event is more than a part
    ],
)
def test_a_part_divides_the_columns(columns, height, size):
    assert _columns._part(columns, height) == size


def test_only_a_cpu_has_parts(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _columns._part(8192, 64) == 8192
