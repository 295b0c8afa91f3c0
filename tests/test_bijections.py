"""One table of all bijections drives every property that a bijection must have.

Adding a layer means adding a line to ``BIJECTIONS``.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import enable_x64
from flowjax.bijections import Chain, Scan
from hypothesis import given, strategies as st

import gauss_flows as gf

IMAGE = (2, 2, 2)


def rotation(key, dtype, dim=3):
    return gf.HouseholderRotation(4, (dim,), key=key, dtype=dtype)


def actnorm(key, dtype, shape=(3,)):
    batch = 1.5 + 3 * jr.normal(key, (50, *shape), dtype)
    return gf.ActNorm(shape, dtype=dtype).from_data(batch)


def coupling(kind, shape=(3,), mask=None, **options):
    def build(key, dtype):
        return kind(key, shape=shape, mask=mask, dtype=dtype, **options)

    return build


TRANSFORMERS = {
    "additive": gf.transformers.Additive(),
    "affine": gf.transformers.Affine(2.0),
    "spline": gf.transformers.RQSpline(),
    "mixture CDF": gf.transformers.MixtureCDF(),
    "deep sigmoid": gf.transformers.DeepSigmoid(),
}


def diagonal(transformer, shape=(3,)):
    def build(key, dtype):
        layer = gf.Diagonal(transformer, shape, dtype=dtype)
        draw = 0.5 * jr.normal(key, layer.theta.shape, dtype)
        return eqx.tree_at(lambda layer: layer.theta, layer, draw)

    return build


def flow_map(**options):
    def build(key, dtype):
        flow = gf.coupling_flow(key, dim=2, depth=3, dtype=dtype, **options)
        return gf.normalizing_map(flow)

    return build


def conv(mask, transformer=None, **options):
    def build(key, dtype):
        return gf.image.ConvCoupling(
            key, shape=IMAGE, mask=mask, transformer=transformer, nn_width=5,
            dtype=dtype, **options,
        )  # fmt: skip

    return build


def level(key, dtype):
    """Whole flows of levels are in test_image.py: they take long to compile."""
    keys, shape = jr.split(key), (1, 1, 8)
    steps = gf.image.ConvCoupling(
        keys[0], shape=shape, mask=gf.masks.channelwise(shape), nn_width=5, dtype=dtype
    )
    return gf.image.Level(steps, gf.PLULinear(keys[1], (1, 1, 4), dtype=dtype))


def residual(**options):
    def build(key, dtype):
        flow = gf.residual_flow(key, lipschitz=0.8, nn_width=8, dtype=dtype, **options)
        return gf.normalizing_map(flow)

    return build


def continuous(key, dtype):
    """Differentiated through its steps: the tests below go both ways."""
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-12
    flow = gf.continuous_flow(
        key, dim=3, nn_width=8, dtype=dtype, rtol=tolerance, atol=tolerance,
        max_steps=256, solver="dopri8", adjoint="direct",
    )  # fmt: skip
    return gf.normalizing_map(flow)


BIJECTIONS = {
    "additive": coupling(gf.AdditiveCoupling),
    "additive, checkerboard": coupling(
        gf.AdditiveCoupling, IMAGE, gf.masks.checkerboard(IMAGE)
    ),
    "affine": coupling(gf.AffineCoupling),
    "affine, alternating": coupling(
        gf.AffineCoupling, (5,), gf.masks.alternating(5), nn_width=7, nn_depth=1
    ),
    "affine, bounded": coupling(gf.AffineCoupling, log_scale_bound=1.5),
    "affine, channelwise": coupling(
        gf.AffineCoupling, IMAGE, gf.masks.channelwise(IMAGE)
    ),
    "affine, identity": coupling(gf.AffineCoupling, identity_init=True),
    "affine, linear conditioner": coupling(gf.AffineCoupling, nn_depth=0),
    "affine, random mask": coupling(
        gf.AffineCoupling, (5,), gf.masks.random(jr.key(7), 5)
    ),
    "spline": coupling(gf.RQSplineCoupling),
    "spline, complement": coupling(
        gf.RQSplineCoupling, (3,), gf.masks.complement(gf.masks.half(3))
    ),
    "spline, identity": coupling(gf.RQSplineCoupling, identity_init=True),
    "spline, few wide bins": coupling(gf.RQSplineCoupling, n_bins=2, interval=1.0),
    "spline, checkerboard": coupling(
        gf.RQSplineCoupling, IMAGE, gf.masks.checkerboard(IMAGE)
    ),
    "mixture CDF": coupling(gf.MixtureCDFCoupling),
    "mixture CDF, few components, random mask": coupling(
        gf.MixtureCDFCoupling, (5,), gf.masks.random(jr.key(7), 5), n_components=3
    ),
    "mixture CDF, from data": lambda key, dtype: gf.MixtureCDFCoupling(
        key, shape=(3,), dtype=dtype
    ).from_data(jr.normal(key, (200, 3), dtype) ** 3 / 3),
    "deep sigmoid": coupling(gf.DeepSigmoidCoupling),
    "deep sigmoid, checkerboard": coupling(
        gf.DeepSigmoidCoupling, IMAGE, gf.masks.checkerboard(IMAGE)
    ),
    **{
        f"diagonal, {name}": diagonal(transformer)
        for name, transformer in TRANSFORMERS.items()
    },
    "diagonal, picture": diagonal(gf.transformers.MixtureCDF(3), IMAGE),
    "diagonal, one number": diagonal(gf.transformers.MixtureCDF(3), (1,)),
    "rotation": rotation,
    "rotation, at the identity": lambda key, dtype: gf.HouseholderRotation(
        2, (3,), dtype=dtype
    ),
    "permutation, learned": lambda key, dtype: gf.LearnedPermutation(
        (5,), key=key, dtype=dtype
    ),
    "permutation, at the identity": lambda key, dtype: gf.LearnedPermutation(
        (3,), dtype=dtype
    ),
    "PLU linear": lambda key, dtype: gf.PLULinear(key, (3,), dtype=dtype),
    "PLU linear, picture": lambda key, dtype: gf.PLULinear(key, (2, 1, 5), dtype=dtype),
    "channel permutation": lambda key, dtype: gf.image.ChannelPermutation(
        (2, 1, 3), jnp.array([2, 0, 1])
    ),
    "conv, bounded affine, checkerboard": conv(gf.masks.checkerboard(IMAGE)),
    "conv, additive, random mask": conv(
        gf.masks.random(jr.key(7), IMAGE), gf.transformers.Additive(), nn_depth=1
    ),
    "conv, spline, channelwise": conv(
        gf.masks.channelwise(IMAGE), gf.transformers.RQSpline(), nn_depth=1
    ),
    "level": level,
    "conv, identity": conv(gf.masks.channelwise(IMAGE), identity_init=True),
    "actnorm": actnorm,
    "actnorm, picture": lambda key, dtype: actnorm(key, dtype, IMAGE),
    "stack, spline": flow_map(),
    "stack, bounded affine with actnorm": flow_map(
        coupling="affine", actnorm=True, log_scale_bound=2.0
    ),
    "stack, mixture CDF": flow_map(coupling="mixture", n_components=4),
    "stack, deep sigmoid": flow_map(coupling="sigmoid", n_components=4),
    "stack, diagonal": lambda key, dtype: gf.normalizing_map(
        gf.diagonal_flow(key, dim=2, depth=3, dtype=dtype)
    ),
    "stack, residual": residual(shape=(2,), depth=3),
    "stack, residual with actnorm, by Newton": residual(
        shape=(3,), depth=2, actnorm=True, inverse=gf.newton_inverse
    ),
    "continuous": continuous,
}
COUPLINGS = [
    n
    for n in BIJECTIONS
    if n.startswith(("additive", "affine", "spline", "mixture", "deep", "conv"))
]
# An unbounded scale overflows once the conditioner's output does; that is a property of
# the map, so these are tried near the data only. All others must bear any finite point.
UNBOUNDED = [n for n in BIJECTIONS if "affine" in n and "bounded" not in n]

# Rounding of a few tens of operations, times slopes of up to about 10; the steepest
# spline bin multiplies a rounding error by its inverse slope.
TOLERANCE = {"float32": 2e-4, "float64": 1e-10}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


@pytest.fixture(params=BIJECTIONS)
def name(request):
    return request.param


def points(bijection, dtype, n=64, scale=2.5):
    return scale * jr.normal(jr.key(1), (n, *bijection.shape), dtype)


@eqx.filter_jit
def both_ways(bijection, x):
    """Everything the tests below look at, compiled once a bijection."""

    def one(x):
        y, log_det = bijection.transform_and_log_det(x)
        back, inverse_log_det = bijection.inverse_and_log_det(y)
        forth = bijection.transform(bijection.inverse(x))
        flat = jax.jacfwd(lambda v: bijection.transform(v.reshape(x.shape)).ravel())
        return {
            "y": y,
            "log_det": log_det,
            "back": back,
            "inverse_log_det": inverse_log_det,
            "forth": forth,
            "jacobian_log_det": jnp.linalg.slogdet(flat(x.ravel()))[1],
        }

    return jax.vmap(one)(x)


def test_inverse_log_det_shape_and_dtype(name, dtype):
    """Round trip both ways, log-det against autodiff, signs, dtype kept."""
    bijection = BIJECTIONS[name](jr.key(0), dtype)
    x, tolerance = points(bijection, dtype), TOLERANCE[str(dtype)]
    got = both_ways(bijection, x)
    for value in got.values():
        assert value.dtype == dtype
    assert got["y"].shape == x.shape
    assert got["log_det"].shape == got["inverse_log_det"].shape == (len(x),)
    near = {"atol": tolerance, "rtol": tolerance}
    np.testing.assert_allclose(got["back"], x, **near)
    np.testing.assert_allclose(got["forth"], x, **near)
    near["atol"] *= 10
    np.testing.assert_allclose(got["inverse_log_det"], -got["log_det"], **near)
    np.testing.assert_allclose(got["jacobian_log_det"], got["log_det"], **near)
    # Far beyond all data; a stack's Jacobian is too ill-conditioned for a determinant.
    if dtype == jnp.float64 and name not in UNBOUNDED and "stack" not in name:
        scales = jnp.logspace(0, 4, len(x)).reshape(-1, *(1,) * (x.ndim - 1))
        far = both_ways(bijection, scales * x)
        difference = far["jacobian_log_det"] - far["log_det"]
        assert jnp.abs(difference).max() < 1e-9


@pytest.mark.parametrize("name", ["affine", "spline", "rotation", "actnorm"])
def test_jit_changes_nothing(name, x64):
    bijection = BIJECTIONS[name](jr.key(0), jnp.float64)
    x = points(bijection, jnp.float64, n=1)
    compiled = both_ways(bijection, x)
    y, log_det = bijection.transform_and_log_det(x[0])
    np.testing.assert_allclose(y, compiled["y"][0], rtol=1e-12)
    np.testing.assert_allclose(log_det, compiled["log_det"][0], rtol=1e-12, atol=1e-14)


def test_gradients_are_finite_near_and_far(name, dtype):
    """Far outside a spline's interval too, both ways, for points and parameters."""
    bijection = BIJECTIONS[name](jr.key(0), dtype)
    scales = (0.5, 1.0) if name in UNBOUNDED else (1.0, 1e2, 1e4, 1e6)
    x = jnp.concatenate(
        [points(bijection, dtype, 8, s) for s in scales]
        # exactly on the ends of the interval, and at the origin
        + [jnp.full((1, *bijection.shape), v, dtype) for v in (-4.0, 0.0, 4.0)]
    )

    @eqx.filter_jit
    def gradients(both):
        def total(both):
            module, x = both
            y, log_det = jax.vmap(module.transform_and_log_det)(x)
            z, inverse_log_det = jax.vmap(module.inverse_and_log_det)(x)
            return (y + z).sum() + (log_det + inverse_log_det).sum()

        return eqx.filter_grad(total)(both)

    for leaf in jax.tree.leaves(gradients((bijection, x))):
        assert jnp.isfinite(leaf).all()


def test_scan_equals_chain(name, x64):
    bijection = BIJECTIONS[name](jr.key(0), jnp.float64)
    stacked = jax.tree.map(
        lambda a: (
            jnp.stack([a, 0.9 * a if eqx.is_inexact_array(a) else a])
            if eqx.is_array(a)
            else a
        ),
        bijection,
    )
    scan = Scan(stacked)
    x = points(bijection, jnp.float64, n=4)
    scanned, chained = both_ways(scan, x), both_ways(Chain(gf.blocks(scan)), x)
    for key, value in scanned.items():
        np.testing.assert_allclose(value, chained[key], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", COUPLINGS)
def test_mask_is_respected(name):
    layer = BIJECTIONS[name](jr.key(0), jnp.float32)
    x = points(layer, jnp.float32, n=8)
    y = both_ways(layer, x)["y"]
    np.testing.assert_array_equal(y[:, ~layer.mask], x[:, ~layer.mask])
    if "identity" not in name:
        assert (y[:, layer.mask] != x[:, layer.mask]).any(axis=0).all()
    # an active coordinate depends on itself and on passive ones, on no other active one
    jacobian = jax.jacfwd(lambda v: layer.transform(v.reshape(layer.shape)).ravel())
    active = np.flatnonzero(layer.mask)
    among_active = eqx.filter_jit(jacobian)(x[0].ravel())[np.ix_(active, active)]
    np.testing.assert_array_equal(among_active, np.diag(np.diag(among_active)))


@pytest.mark.parametrize("name", [n for n in BIJECTIONS if "identity" in n])
def test_identity_start_is_the_identity(name, x64):
    layer = BIJECTIONS[name](jr.key(0), jnp.float64)
    x = points(layer, jnp.float64)
    got = both_ways(layer, x)
    np.testing.assert_allclose(got["y"], x, atol=1e-14)
    np.testing.assert_allclose(got["log_det"], 0.0, atol=1e-14)


@given(
    seed=st.integers(0, 2**31 - 1),
    dim=st.integers(2, 5),
    kind=st.sampled_from(["affine", "additive", "spline", "mixture", "sigmoid"]),
    weight=st.floats(0.1, 3.0),
    scale=st.floats(1e-3, 1e3),
)
def test_any_coupling_is_invertible(seed, dim, kind, weight, scale):
    """Random masks, weights and points: round trip and log-det agree in float64."""
    kinds = {
        "affine": functools.partial(gf.AffineCoupling, log_scale_bound=5.0),
        "additive": gf.AdditiveCoupling,
        "spline": gf.RQSplineCoupling,
        "mixture": gf.MixtureCDFCoupling,
        "sigmoid": gf.DeepSigmoidCoupling,
    }
    with enable_x64(True):
        mask_key, layer_key, point_key = jr.split(jr.key(seed), 3)
        n_active = 1 + seed % (dim - 1)
        mask = gf.masks.random(mask_key, dim, n_active)
        layer = kinds[kind](layer_key, shape=(dim,), mask=mask, nn_width=8, nn_depth=1)
        layer = jax.tree.map(lambda a: weight * a if eqx.is_array(a) else a, layer)
        near = min(scale, 3.0) if kind == "affine" else scale  # see UNBOUNDED
        x = near * jr.normal(point_key, (dim,))
        got = {key: value[0] for key, value in both_ways(layer, x[None]).items()}
        y, log_det, back = got["y"], got["log_det"], got["back"]
        assert mask.sum() == n_active
        # a scale far from 1 amplifies rounding in y by its inverse on the way back
        slack = 1e-9 * jnp.maximum(1.0, jnp.exp(-log_det)) * (1 + jnp.abs(y).max())
        assert jnp.abs(back - x).max() <= slack
        # where the map is flat, y tells two points apart no better than that: the
        # inverse's log-determinant is that of the point found
        _, there = layer.transform_and_log_det(back)
        np.testing.assert_allclose(got["inverse_log_det"], -there, rtol=1e-9, atol=1e-9)
        if log_det > -10:
            np.testing.assert_allclose(there, log_det, rtol=1e-6, atol=1e-6)
