"""Multi-scale flows over pictures, and what prepares pictures for them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flowjax.bijections import Identity, Invert
from flowjax.distributions import StandardNormal, Transformed
from sklearn.datasets import load_digits

import gauss_flows as gf
from gauss_flows import image, masks, transformers

SHAPE = (4, 4, 2)
X = np.random.default_rng(0).uniform(0.05, 0.95, (30, *SHAPE))


@pytest.fixture(autouse=True)
def all_in_float64(x64):
    """One dtype for all, but where another is asked for: fewer programs to compile."""


FLOWS = {"realnvp": image.realnvp, "glow": image.glow}


def small(build, shape=SHAPE, levels=2, depth=2, **options):
    options = {"nn_width": 6, "nn_depth": 1, **options}
    return build(jr.key(0), shape=shape, levels=levels, depth=depth, **options)


# programs that run once or twice: most of the time is that of the compiler
once = functools.partial(
    eqx.filter_jit, compiler_options={"xla_backend_optimization_level": 0}
)


@once
def encode(flow, x):
    return jax.vmap(flow.bijection.inverse_and_log_det)(x)


@once
def apply(bijection, x):
    return jax.vmap(bijection.transform_and_log_det)(x)


initialize_actnorm = once(gf.initialize_actnorm)


def digits(n=100):
    grey = load_digits().images[:n, :, :, None]
    return image.dequantize(jr.key(5), 17, grey)


# --- grey values -----------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 17, 256])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dequantised_grey_values_come_back(n, dtype):
    grey = np.tile(np.arange(n), 4000)
    y = image.dequantize(jr.key(0), n, grey, dtype=dtype)
    assert y.dtype == dtype
    assert ((y > 0) & (y < 1)).all()
    np.testing.assert_array_equal(image.quantize(n, y), grey)
    inside = n * np.asarray(y, float) - grey
    edges = np.linspace(0, 1, 11)
    counts = np.histogram(inside, edges)[0] / len(grey)
    np.testing.assert_allclose(counts, 0.1, atol=5 * np.sqrt(0.09 / len(grey)))


def test_rounding_does_not_carry_a_point_into_the_next_cell(monkeypatch):
    grey = jnp.arange(17)
    for u in (0.0, 1 - 2.0**-24):
        fixed = jnp.full(grey.shape, u, jnp.float32)
        monkeypatch.setattr(jr, "uniform", lambda *_, fixed=fixed: fixed)
        y = image.dequantize(jr.key(0), 17, grey, dtype="float32")
        assert ((y > 0) & (y < 1)).all()
        np.testing.assert_array_equal(image.quantize(17, y), grey)


def test_samples_beyond_black_and_white_get_the_nearest_grey():
    x = jnp.array([-0.2, 0.0, 0.5, 1.0, 1.3])
    np.testing.assert_array_equal(image.quantize(4, x), [0, 0, 2, 3, 3])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.array([0, 256]), r"in 0..255, got others, between 0 and 256"),
        (np.array([-1, 3]), "got others, between -1 and 3"),
        (np.array([0.0, 0.5]), "got fractions, between 0.0 and 0.5"),
        (np.array([0.0, np.nan]), "whole grey values"),
    ],
)
def test_what_is_no_grey_value_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        image.dequantize(jr.key(0), 256, x)


def test_it_is_refused_under_jit_too():
    spread = eqx.filter_jit(lambda x: image.dequantize(jr.key(0), 4, x))
    assert spread(jnp.arange(4)).shape == (4,)
    with pytest.raises(RuntimeError, match="whole grey values"):
        spread(jnp.arange(5)).block_until_ready()


def test_a_uniform_law_has_log_2_n_bits():
    log_prob = jnp.zeros(3)
    for n, bits in ((2, 1.0), (256, 8.0)):
        found = image.bits_per_dimension(log_prob, (8, 8, 3), n)
        np.testing.assert_array_equal(found, bits)


def test_bits_are_those_of_the_grey_values():
    """A density constant on cells has the code length of its law of grey values."""
    law = np.array([0.7, 0.1, 0.15, 0.05])
    grey = np.array([[0, 1], [2, 2], [3, 0]])
    log_density = np.log(4 * law)[grey].sum(axis=1)
    expected = -np.log2(law)[grey].mean(axis=1)
    found = image.bits_per_dimension(log_density, (2,), 4)
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.3])
@pytest.mark.parametrize(
    ("dtype", "near"), [("float32", 2e-5), ("float64", 1e-12)], ids=str
)
def test_logit(margin, dtype, near):
    layer = image.Logit((2, 3), margin)
    x = jr.uniform(jr.key(0), (50, 2, 3), dtype, 0.01, 0.99)
    x = x.at[0].set(0.0).at[1].set(1.0) if margin else x
    y, log_det = jax.vmap(layer.transform_and_log_det)(x)
    back, inverse_log_det = jax.vmap(layer.inverse_and_log_det)(y)
    assert y.dtype == log_det.dtype == back.dtype == dtype
    p = margin + (1 - 2 * margin) * np.asarray(x, float)
    close = {"rtol": near, "atol": near}
    np.testing.assert_allclose(y, np.log(p / (1 - p)), **close)
    np.testing.assert_allclose(back, x, **close)
    np.testing.assert_allclose(inverse_log_det, -log_det, **close)
    slope = jax.vmap(jax.vmap(jax.vmap(jax.grad(lambda a: layer1(a, margin)))))(x)
    np.testing.assert_allclose(log_det, jnp.log(slope).sum((1, 2)), **close)


def layer1(x, margin):
    return image.Logit((1,), margin).transform(x[None])[0]


def test_logit_stays_finite_far_out_on_the_line_and_says_nan_off_the_square():
    layer = image.Logit((1,), 0.05)
    x, log_det = jax.vmap(layer.inverse_and_log_det)(jnp.array([[-1e4], [1e4]]))
    np.testing.assert_allclose(x, [[-0.05 / 0.9], [1 + 0.05 / 0.9]], rtol=1e-6)
    assert jnp.isfinite(log_det).all()
    assert jnp.isnan(layer.transform(jnp.array([1.1]))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: image.dequantize(jr.key(0), 1, np.zeros(2)), "at least 2 levels"),
        (lambda: image.quantize(0, jnp.zeros(2)), "at least 2 levels of grey, got 0"),
        (lambda: image.bits_per_dimension(jnp.zeros(2), (), 256), r"got \(\)"),
        (lambda: image.bits_per_dimension(jnp.zeros(2), (3,), 1), "at least 2 levels"),
        (lambda: image.Logit((2,), 0.5), "margin < 1/2, got 0.5"),
        (lambda: image.Logit((2,), -0.1), "0 <= margin"),
        (lambda: image.Logit((), 0.1), "expected an event shape"),
    ],
)
def test_bad_arguments_of_pre_processing(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- squeezing -------------------------------------------------------------------


def test_squeeze_has_the_order_of_space_to_depth():
    x = jnp.arange(16).reshape(4, 4, 1)
    expected = [[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]]
    np.testing.assert_array_equal(image.squeeze(x), expected)
    x = jnp.arange(2 * 2 * 3).reshape(2, 2, 3)
    np.testing.assert_array_equal(image.squeeze(x)[0, 0], x.ravel())


def test_unsqueeze_undoes_it_and_batches_trail():
    x = jr.normal(jr.key(0), (4, 6, 3, 5, 2))
    y = image.squeeze(x)
    assert y.shape == (2, 3, 12, 5, 2)
    np.testing.assert_array_equal(y[..., 1, 0], image.squeeze(x[..., 1, 0]))
    np.testing.assert_array_equal(image.unsqueeze(y), x)


def test_what_cannot_be_squeezed_is_refused():
    with pytest.raises(ValueError, match=r"multiples of 2, .* got shape \(3, 4, 1\)"):
        image.squeeze(jnp.zeros((3, 4, 1)))
    with pytest.raises(ValueError, match=r"multiple of 4 channels .* \(2, 2, 6\)"):
        image.unsqueeze(jnp.zeros((2, 2, 6)))


# --- convolutional couplings -----------------------------------------------------

MASKS = {
    "checkerboard": masks.checkerboard(SHAPE),
    "channelwise": masks.channelwise(SHAPE),
    "random": masks.random(jr.key(3), SHAPE),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("depth", [0, 3])
def test_the_conditioner_is_a_network_of_equinox_convolutions(mask, depth, monkeypatch):
    mask = MASKS[mask]
    n_active = int(mask.sum())
    net = image.ConvConditioner(jr.key(0), mask, 3, width=5, depth=depth)
    passive = jr.normal(jr.key(1), (32 - n_active, 2, 3))

    def alone(passive):
        picture = jnp.zeros(SHAPE).at[~mask].set(passive)
        first, *rest = net.layers
        h = first(picture[..., ~mask.all((0, 1))].transpose(2, 0, 1))
        for one, two in zip(rest[:-1:2], rest[1:-1:2], strict=True):
            h = h + two(jax.nn.relu(one(jax.nn.relu(h))))
        h = rest[-1](jax.nn.relu(h)) if rest else h
        wanted = mask.any((0, 1))
        theta = h.reshape(3, wanted.sum(), *SHAPE[:2])
        return theta.transpose(0, 2, 3, 1)[:, mask[..., wanted]]

    expected = jax.jit(jax.vmap(jax.vmap(alone, -1, -1), -1, -1))(passive)
    for backend in ("cpu", "gpu"):  # two ways to convolve; the second runs here too
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        found = jax.jit(lambda a: net.columns(a, n_active, (1, 2)))(passive)
        assert [part.shape for part in found] == [(k, n_active, 2, 3) for k in (1, 2)]
        np.testing.assert_allclose(jnp.concatenate(found), expected, atol=1e-12)
    one = net.columns(passive[:, 0, 0], n_active, (1, 2))
    np.testing.assert_allclose(jnp.concatenate(one), expected[..., 0, 0], atol=1e-12)


def test_a_zero_last_layer_gives_zeros():
    net = image.ConvConditioner(jr.key(0), MASKS["random"], 2, identity_init=True)
    (theta,) = net.columns(jnp.ones((16, 3)), 16, (2,))
    assert not theta.any()
    assert net.layers[0].weight.any()


@pytest.mark.parametrize("mask", ["channelwise", "random"])
@pytest.mark.parametrize("kind", ["additive", "affine", "spline"])
def test_a_coupling_from_data_gaussianizes_each_channel(mask, kind):
    transformer = {
        "additive": transformers.Additive(),
        "affine": transformers.Affine(2.0),
        "spline": transformers.RQSpline(16),
    }[kind]
    layer = image.ConvCoupling(
        jr.key(0), shape=SHAPE, mask=MASKS[mask], transformer=transformer
    )
    x = jnp.exp(jr.normal(jr.key(1), (500, *SHAPE)) * jnp.array([0.3, 0.2])) - 2
    y, _ = apply(layer.from_data(x), x)
    np.testing.assert_array_equal(y[:, ~layer.mask], x[:, ~layer.mask])
    for channel in np.flatnonzero(layer.mask.any((0, 1))):
        active = np.asarray(y[:, layer.mask[..., channel], channel])
        assert abs(active.mean()) < (0.05 if kind == "spline" else 1e-10)
        if kind != "additive":
            assert abs(active.std() - 1) < (0.05 if kind == "spline" else 1e-10)


def test_from_data_says_what_is_wrong():
    layer = image.ConvCoupling(jr.key(0), shape=SHAPE, mask=MASKS["checkerboard"])
    with pytest.raises(ValueError, match=r"events of shape \(4, 4, 2\)"):
        layer.from_data(jnp.zeros((3, 4, 4)))
    with pytest.raises(RuntimeError, match="active channel to vary"):
        layer.from_data(jnp.ones((3, *SHAPE)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (4, 4), "mask": masks.random(jr.key(0), (4, 4))}, "picture shape"),
        ({"shape": (4, 2, 2)}, r"mask of shape \(4, 2, 2\), got shape \(4, 4, 2\)"),
        ({"mask": np.ones(SHAPE, bool)}, "got all active"),
        ({"nn_width": 0}, "nn_width to be an integer >= 1, got 0"),
        ({"nn_depth": -1}, "nn_depth >= 0, got -1"),
    ],
)
def test_bad_arguments_of_a_coupling(options, message):
    options = {"shape": SHAPE, "mask": MASKS["random"], **options}
    with pytest.raises(ValueError, match=message):
        image.ConvCoupling(jr.key(0), **options)


def test_a_permutation_of_channels_takes_them_in_order():
    layer = image.ChannelPermutation((1, 1, 3), jnp.array([2, 0, 1]))
    x = jnp.array([[[10.0, 11.0, 12.0]]])
    np.testing.assert_array_equal(layer.transform(x), [[[12.0, 10.0, 11.0]]])
    with pytest.raises(ValueError, match=r"got an array of shape \(2,\)"):
        image.ChannelPermutation((1, 1, 3), jnp.array([1, 0]))


# --- levels ----------------------------------------------------------------------


def test_a_level_keeps_what_it_splits_off():
    """Each coordinate is scaled once for each level that it goes through."""

    def scale(shape, by):
        norm = gf.ActNorm(shape)
        factor = jnp.full(shape[-1], jnp.log(by))
        return eqx.tree_at(lambda a: a.log_scale, norm, factor)

    last = image.Level(scale((1, 1, 16), 5.0), None)
    level = image.Level(scale((4, 4, 4), 2.0), image.Level(scale((2, 2, 8), 3.0), last))
    x = jr.normal(jr.key(0), (8, 8, 1))
    depth = image.latent_levels((8, 8, 1), 3)
    y, log_det = level.transform_and_log_det(x)
    factor = np.array([2.0, 6.0, 30.0])[depth - 1]
    np.testing.assert_allclose(y, factor * x, rtol=1e-12)
    np.testing.assert_allclose(log_det, np.log(factor).sum(), rtol=1e-12)
    assert [(depth == level).sum() for level in (1, 2, 3)] == [32, 16, 16]


@pytest.mark.parametrize("build", FLOWS)
def test_latent_levels_are_those_of_the_flows(build):
    """What level 1 splits off does not see the levels inside change."""
    flow = small(FLOWS[build], identity_init=False)

    def inner(flow):
        return flow.bijection.bijection.bijections[-1].inner

    moved = jax.tree.map(
        lambda a: 1.1 * a + 0.1 if eqx.is_inexact_array(a) else a, inner(flow)
    )
    y, z = (encode(f, X)[0][0] for f in (flow, eqx.tree_at(inner, flow, moved)))
    depth = image.latent_levels(SHAPE, 2)
    np.testing.assert_array_equal(y[depth == 1], z[depth == 1])
    assert (y[depth > 1] != z[depth > 1]).all()


def test_levels_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"4 channels, got steps of shape \(2, 2, 6\)"):
        image.Level(Identity((2, 2, 6)), None)
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\), got \(2, 2, 4\)"):
        image.Level(Identity((2, 2, 4)), Identity((2, 2, 4)))
    with pytest.raises(ValueError, match=r"picture shape .* got \(8,\)"):
        image.Level(Identity((8,)), None)


# --- flows -----------------------------------------------------------------------


@pytest.mark.parametrize("build", FLOWS)
def test_a_whole_flow_against_its_dense_jacobian(build):
    """ActNorms set from data, a logit in front: 1e-8 the determinant, 1e-10 back."""
    flow = small(FLOWS[build], identity_init=False)
    flow = initialize_actnorm(flow, X)
    z, log_det = encode(flow, X)
    back, inverse_log_det = apply(flow.bijection, z)
    np.testing.assert_allclose(back, X, atol=1e-10)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-8)

    @once
    def dense(flow, x):
        flat = jax.jacfwd(lambda v: flow.bijection.inverse(v.reshape(x.shape)).ravel())
        return jnp.linalg.slogdet(flat(x.ravel()))[1]

    assert abs(dense(flow, jnp.asarray(X[0])) - log_det[0]) < 1e-8


@pytest.mark.parametrize(
    ("build", "shape"),
    [("realnvp", SHAPE), ("glow", SHAPE), ("glow", (2, 2, 3))],
)
def test_a_start_at_the_identity_but_for_mixing(build, shape):
    flow = small(FLOWS[build], shape, 2 if shape == SHAPE else 1, margin=None)
    x = jr.normal(jr.key(0), (1, *shape))
    z, log_det = encode(flow, x)
    np.testing.assert_allclose((z**2).sum(), (x**2).sum(), rtol=1e-10)
    np.testing.assert_allclose(log_det, 0, atol=1e-10)
    if build == "realnvp":
        np.testing.assert_allclose(z, x, atol=1e-10)


def test_the_kinds_of_mixing_have_equal_couplings():
    def is_coupling(node):
        return isinstance(node, image.ConvCoupling)

    def couplings(flow):
        leaves = jax.tree.leaves(flow, is_leaf=is_coupling)
        return jax.tree.leaves([a for a in leaves if is_coupling(a)])

    def size(flow):
        return sum(
            a.size for a in jax.tree.leaves(eqx.filter(flow, eqx.is_inexact_array))
        )

    flows = {m: small(image.glow, mixing=m, identity_init=False) for m in image.MIXINGS}
    expected = couplings(flows["none"])
    assert len(expected) == 2 * (2 + 2 + 1)  # kernels and biases of convolutions
    for flow in flows.values():
        jax.tree.map(np.testing.assert_array_equal, couplings(flow), expected)
    extra = {m: size(flow) - size(flows["none"]) for m, flow in flows.items()}
    learned = 2 * 8**2 + 2 * 16**2  # two steps at 8 channels, two at 16
    assert extra == {"learned": learned, "reverse": 0, "shuffle": 0, "none": 0}


@pytest.mark.parametrize(
    ("mixing", "depth", "moved"),
    [("none", 2, 0.5), ("reverse", 2, 1.0), ("shuffle", 6, 1.0)],
)
def test_mixing_decides_which_channels_are_transformed(mixing, depth, moved):
    flow = small(
        image.glow, levels=1, depth=depth, mixing=mixing, margin=None, actnorm=False,
        identity_init=False,
    )  # fmt: skip
    x = image.squeeze(jr.normal(jr.key(1), SHAPE))
    z = image.squeeze(encode(flow, image.unsqueeze(x)[None])[0][0])
    unmoved = [(z == x[..., [c]]).all((0, 1)).any() for c in range(8)]
    assert 1 - np.mean(unmoved) == moved


def test_what_is_split_off_is_conditioned_on_what_is_kept():
    """The conditional prior, once its convolution is no longer zero."""
    flow = small(image.glow, mixing="none", margin=None)
    (level,) = gf.normalizing_map(flow).bijections
    _, prior = level.steps.bijections
    kernel = prior.conditioner.layers[0].weight
    assert not kernel.any()
    moved = eqx.tree_at(
        lambda a: a.steps.bijections[1].conditioner.layers[0].weight,
        level,
        kernel + 0.1,
    )
    jacobian = once(lambda a: jax.jacfwd(a.transform)(jnp.ones(SHAPE)))
    depth = image.latent_levels(SHAPE, 2)
    for one, conditioned in ((level, False), (moved, True)):
        assert (jacobian(one)[depth == 1][:, depth == 2] != 0).any() == conditioned
    flow = small(image.glow, conditional_prior=False, margin=None)
    assert isinstance(gf.normalizing_map(flow).bijections[0].steps, gf.Stack)


@pytest.mark.parametrize("build", FLOWS)
def test_compilation_does_not_grow_with_depth(build):
    def equations(depth):
        flow = eqx.filter_eval_shape(lambda: small(FLOWS[build], depth=depth))
        arrays, static = eqx.partition(
            flow, lambda a: isinstance(a, jax.ShapeDtypeStruct)
        )

        def loss(arrays, x):
            return eqx.combine(arrays, static).log_prob(x).sum()

        x = jax.ShapeDtypeStruct((3, *SHAPE), float)
        return count(jax.make_jaxpr(jax.grad(loss, allow_int=True))(arrays, x).jaxpr)

    assert equations(2) == equations(12)


def count(jaxpr):
    inner = [
        getattr(sub, "jaxpr", sub)
        for equation in jaxpr.eqns
        for value in equation.params.values()
        for sub in (value if isinstance(value, tuple | list) else [value])
        if hasattr(getattr(sub, "jaxpr", sub), "eqns")
    ]
    return len(jaxpr.eqns) + sum(map(count, inner))


def test_memory_modes_have_the_same_gradient():
    flow = small(image.glow, levels=1, identity_init=False)
    x = jr.uniform(jr.key(1), (3, *SHAPE), minval=0.1, maxval=0.9)
    gradient = once(eqx.filter_grad(lambda flow: flow.log_prob(x).sum()))
    found = gradient(gf.with_memory(flow, "invert", keep_every=2))
    expected = gradient(flow)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)


def test_float32_stays_float32_among_64_bit_numbers():
    flow = small(image.glow, levels=1, dtype="float32")
    x = jr.uniform(jr.key(1), (3, *SHAPE), "float32")
    for each in (flow, initialize_actnorm(flow, x)):
        z, log_det = encode(each, x)
        assert z.dtype == log_det.dtype == jnp.float32
    assert image.sample(jr.key(0), flow, 2).dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        ("glow", {"shape": (25, 25, 1)}, r"multiples of 4, .* got shape \(25, 25, 1\)"),
        ("glow", {"levels": 3}, r"multiples of 8, to be halved 3 times"),
        ("realnvp", {"levels": 4}, r"multiples of 8, to be halved 3 times"),
        ("realnvp", {"levels": 3, "depth": 1}, "at least 2 pixels"),
        ("glow", {"shape": (4, 4)}, r"\(height, width, channels\), got \(4, 4\)"),
        ("glow", {"shape": (4, 4, 0)}, r"got \(4, 4, 0\)"),
        ("glow", {"levels": 0}, "levels to be an integer >= 1, got 0"),
        ("realnvp", {"depth": 0}, "depth to be an integer >= 1, got 0"),
        ("glow", {"mixing": "random"}, "expected mixing in .* got 'random'"),
        ("glow", {"margin": 0.7}, "margin < 1/2, got 0.7"),
        ("glow", {"memory": "none"}, "expected memory in"),
    ],
)
def test_bad_arguments_of_flows(build, options, message):
    with pytest.raises(ValueError, match=message):
        small(FLOWS[build], **options)


# --- ActNorm from data -----------------------------------------------------------


def standard(x):
    axes = tuple(range(x.ndim - 1))
    return abs(x.mean(axes)).max() < 1e-9 and abs(x.std(axes) - 1).max() < 1e-9


def test_actnorm_is_set_at_every_level():
    """One step, couplings at the identity: all latents are standardised."""
    flow = small(image.glow, depth=1, mixing="none", conditional_prior=False)
    z, _ = encode(initialize_actnorm(flow, X), X)
    kept, split_off = jnp.split(jax.vmap(image.squeeze)(z), 2, axis=-1)
    assert standard(split_off)
    assert standard(jax.vmap(image.squeeze)(kept))


@pytest.mark.parametrize("build", FLOWS)
def test_only_actnorms_are_set(build):
    flow = small(FLOWS[build], identity_init=False)
    ready = initialize_actnorm(flow, X)

    def is_norm(node):
        return isinstance(node, gf.ActNorm)

    pairs = zip(
        jax.tree.leaves(flow, is_leaf=is_norm),
        jax.tree.leaves(ready, is_leaf=is_norm),
        strict=True,
    )
    for before, after in pairs:
        if is_norm(before):
            assert (before.log_scale != after.log_scale).all()
            assert jnp.isfinite(after.log_scale).all()
        else:
            np.testing.assert_array_equal(before, after)
    again = initialize_actnorm(ready, X)
    for one, other in zip(jax.tree.leaves(ready), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_actnorm_from_data_says_what_is_wrong():
    with pytest.raises(ValueError, match="got none: build it with actnorm=True"):
        gf.initialize_actnorm(small(image.glow, actnorm=False), jnp.ones((3, *SHAPE)))
    flow = small(image.glow)
    with pytest.raises(ValueError, match=r"events of shape \(4, 4, 2\)"):
        gf.initialize_actnorm(flow, jnp.ones((3, 4, 4, 1)))
    with pytest.raises(ValueError, match="at least 2 events"):
        gf.initialize_actnorm(flow, jnp.ones((1, *SHAPE)))
    with pytest.raises(RuntimeError, match="every channel to vary"):
        gf.initialize_actnorm(flow, jnp.full((3, *SHAPE), 0.5))


# --- training, samples, paths ----------------------------------------------------


def test_a_glow_learns():
    x = digits()
    flow = small(image.glow, (8, 8, 1), nn_width=8)
    flow = initialize_actnorm(flow, x)
    result = gf.fit(
        jr.key(1), flow, x, steps=40, batch_size=50, learning_rate=1e-2, eval_every=40,
        progress=False,
    )  # fmt: skip
    start, end = result.train_loss[:3].mean(), result.train_loss[-3:].mean()
    assert end < start - 10  # nats a picture of 64 numbers
    bits = image.bits_per_dimension(-end, (8, 8, 1), 17)
    assert bits < np.log2(17)  # better than the uniform law


@pytest.mark.parametrize("build", FLOWS)
def test_many_can_be_built_at_once(build):
    """As ``fit_many`` does."""

    def built(keys):
        return eqx.filter_vmap(lambda key: FLOWS[build](
            key, shape=SHAPE, levels=2, depth=2
        ))(keys)  # fmt: skip

    flows = eqx.filter_eval_shape(built, jr.split(jr.key(0), 3))
    arrays = [a for a in jax.tree.leaves(flows) if isinstance(a, jax.ShapeDtypeStruct)]
    assert {a.shape[0] for a in arrays} == {3}


def test_temperature():
    flow = small(image.glow, identity_init=False)
    draws = {
        t: image.sample(jr.key(1), flow, 5, temperature=t) for t in (0.0, 1.0, 2.0)
    }
    assert all(jnp.isfinite(x).all() for x in draws.values())
    (still, warm, hot) = (encode(flow, x)[0] for x in draws.values())
    np.testing.assert_allclose(still, 0, atol=1e-9)
    np.testing.assert_allclose(hot, 2 * warm, atol=1e-6)
    assert abs(warm.std() - 1) < 0.25
    for temperature in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="temperature to be finite and >= 0"):
            image.sample(jr.key(1), flow, 5, temperature=temperature)
    with pytest.raises(ValueError, match="n to be an integer >= 1, got 0"):
        image.sample(jr.key(1), flow, 0)


def test_interpolation():
    flow = small(image.glow, identity_init=False)
    x, *_, y = image.sample(jr.key(1), flow, 5)
    for kind in ("spherical", "linear"):
        path = image.interpolate(flow, x, y, 5, kind=kind)
        assert path.shape == (5, *SHAPE)
        np.testing.assert_allclose(path[0], x, atol=1e-8)
        np.testing.assert_allclose(path[-1], y, atol=1e-8)
    start, middle, end = encode(flow, path)[0][jnp.array([0, 2, 4])]
    np.testing.assert_allclose(middle, (start + end) / 2, atol=1e-7)


def plain():
    """A flow whose latent is the event."""
    return Transformed(StandardNormal(SHAPE), Invert(gf.ActNorm(SHAPE)))


@pytest.mark.parametrize("angle", [1e-3, 1.2, 3.0])
def test_a_spherical_path_stays_on_the_sphere(angle):
    x = jnp.zeros(SHAPE).at[0, 0, 0].set(2.0)
    y = 2 * jnp.zeros(SHAPE).at[0, 0, :].set([jnp.cos(angle), jnp.sin(angle)])
    path = image.interpolate(plain(), x, y, 7)
    np.testing.assert_allclose((path**2).sum((1, 2, 3)), 4, rtol=1e-9)
    steps = ((path[1:] - path[:-1]) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_parallel_latents_have_a_straight_path():
    x = jr.normal(jr.key(0), SHAPE)
    for y in (x, 3 * x, -x, 0 * x):
        path = image.interpolate(plain(), x, y, 3)
        np.testing.assert_allclose(path[1], (x + y) / 2, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SHAPE, SHAPE, 1, "linear"), "expected n >= 2"),
        ((SHAPE, SHAPE, 3, "cubic"), "got 3 and 'cubic'"),
        ((SHAPE, (1, *SHAPE), 3, "linear"), r"\(4, 4, 2\), got .*\(1, 4, 4, 2\)"),
    ],
)
def test_bad_arguments_of_interpolation(arguments, message):
    one, other, n, kind = arguments
    with pytest.raises(ValueError, match=message):
        image.interpolate(plain(), jnp.ones(one), jnp.ones(other), n, kind=kind)
