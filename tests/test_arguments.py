"""Any arguments of the right types: what was asked for, or an error that says why not.

Constructors are evaluated abstractly, so that nothing is compiled.
"""

import functools
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fuzzing import examples, judge, outcome, seeds
from hypothesis import assume, given, strategies as st
from hypothesis.extra import numpy as hnp

import gauss_flows as gf
from gauss_flows import records

KEY = jr.key(0)
small = st.integers(-1, 4)
numbers = st.floats(width=32) | st.sampled_from([0.0, -1.0, 0.5, 2.0])
kinds = st.sampled_from(
    [None, "float32", "float16", "bfloat16", "int32", "bool", "complex64"]
)
shapes = st.lists(small, max_size=3).map(tuple) | st.sampled_from(
    [(2,), (3,), (2, 2, 1), (2, 2, 2), (4, 4, 1), (1, 1, 4)]
)
floating = {None, "float32", "float16", "bfloat16"}


@st.composite
def masks_for(draw, shape):
    """A mask that fits, or one of another shape or filling; or none."""
    shape = draw(st.just(shape) | shapes)
    assume(min(shape, default=1) >= 0)
    return draw(st.none() | hnp.arrays(bool, shape))


def built(what, build, dtype=None):
    """The module's shapes, or None where it was refused."""
    module = outcome(what, lambda: eqx.filter_eval_shape(build), ValueError)
    if module is not None:
        assert dtype in floating
        leaves = jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array_like))
        for leaf in [leaf for leaf in leaves if hasattr(leaf, "dtype")]:
            assert leaf.dtype == jnp.dtype(dtype or "float32")
    return module


COUPLINGS = {
    gf.AffineCoupling: {"log_scale_bound": st.none() | numbers},
    gf.AdditiveCoupling: {},
    gf.RQSplineCoupling: {"n_bins": small, "interval": numbers},
    gf.MixtureCDFCoupling: {"n_components": small},
    gf.DeepSigmoidCoupling: {"n_components": small},
}
network = {
    "nn_width": small,
    "nn_depth": small,
    "nn_residual": st.booleans(),
    "identity_init": st.booleans(),
}


@given(data=st.data())
@examples(60, 1500)
def test_couplings(data):
    kind = data.draw(st.sampled_from(list(COUPLINGS)))
    shape, dtype = data.draw(shapes), data.draw(kinds)
    mask = data.draw(masks_for(shape))
    options = data.draw(st.fixed_dictionaries({}, optional=network | COUPLINGS[kind]))
    layer = built(
        "couplings",
        lambda: kind(KEY, shape=shape, mask=mask, dtype=dtype, **options),
        dtype,
    )
    if layer is not None:
        assert layer.mask.shape == shape
        assert 0 < layer.mask.sum() < layer.mask.size


LAYERS = {
    "rotation": lambda n, shape, x, dtype: gf.HouseholderRotation(
        n, shape, dtype=dtype
    ),
    "drawn rotation": lambda n, shape, x, dtype: gf.HouseholderRotation(
        n, shape, key=KEY, dtype=dtype
    ),
    "permutation": lambda n, shape, x, dtype: gf.LearnedPermutation(
        shape, temperature=x, dtype=dtype
    ),
    "ActNorm": lambda n, shape, x, dtype: gf.ActNorm(shape, dtype=dtype),
    "diagonal spline": lambda n, shape, x, dtype: gf.Diagonal(
        gf.transformers.RQSpline(n, x), shape, dtype=dtype
    ),
    "diagonal mixture": lambda n, shape, x, dtype: gf.Diagonal(
        gf.transformers.MixtureCDF(n), shape, dtype=dtype
    ),
    "convolutional": lambda n, shape, x, dtype: gf.image.ConvCoupling(
        KEY,
        shape=shape,
        mask=gf.masks.checkerboard(shape),
        nn_width=n,
        nn_depth=abs(n) - 1,
        dtype=dtype,
    ),
    "Lipschitz": lambda n, shape, x, dtype: gf.LipschitzMLP(
        KEY, dim=max(shape, default=0), width=n, depth=n, lipschitz=x, dtype=dtype
    ),
}


@given(
    name=st.sampled_from(list(LAYERS)), n=small, shape=shapes, x=numbers, dtype=kinds
)
@examples(60, 1500)
def test_layers(name, n, shape, x, dtype):
    if name == "convolutional":
        assume(len(shape) == 3)
    built(f"layers: {name}", lambda: LAYERS[name](n, shape, x, dtype), dtype)


@given(data=st.data())
@examples(30, 600)
def test_flows(data):
    kind = data.draw(st.sampled_from(["coupling", "diagonal", "residual"]))
    shared = {"depth": small, "actnorm": st.booleans(), "dtype": kinds}
    shared["memory"] = st.sampled_from([*gf.memory.MODES, "all"])
    own = {"dim": small, "n_reflections": st.none() | small}
    if kind == "coupling":
        own |= {
            "coupling": st.sampled_from(["affine", "spline", "mixture", "cubic"]),
            "mask": masks_for((3,)),
        }
    if kind == "residual":
        own = {"shape": shapes, "lipschitz": numbers}
    given_ = data.draw(st.fixed_dictionaries(shared | own))
    build = getattr(gf, f"{kind}_flow")
    flow = built(f"flows: {kind}", lambda: build(KEY, **given_), given_["dtype"])
    if flow is not None:
        assert flow.shape == given_.get("shape", (given_.get("dim"),))


@given(data=st.data())
@examples(15, 200)
def test_flows_of_pictures(data):
    kind = data.draw(st.sampled_from(["realnvp", "glow"]))
    options = {"shape": shapes, "levels": small, "depth": small}
    options["margin"] = st.none() | numbers
    if kind == "glow":
        options["mixing"] = st.sampled_from([*gf.image.MIXINGS, "all"])
    given_ = data.draw(st.fixed_dictionaries(options))
    build = getattr(gf.image, kind)
    flow = built(f"flows: {kind}", lambda: build(KEY, nn_width=2, **given_))
    assert flow is None or flow.shape == given_["shape"]


@given(shape=shapes, dim=small, n_active=st.none() | small, dtype=kinds, seed=seeds)
@examples(40, 1000)
def test_masks(shape, dim, n_active, dtype, seed):
    kind = jnp.dtype(dtype or bool)
    makers = [
        (lambda: gf.masks.half(dim), (dim,)),
        (lambda: gf.masks.alternating(dim), (dim,)),
        (lambda: gf.masks.random(jr.key(seed), shape, n_active), shape),
        (lambda: gf.masks.random(jr.key(seed), dim, n_active), (dim,)),
        (lambda: gf.masks.validate(np.ones(3, kind), (3,)), (3,)),
    ]
    if len(shape) == 3:
        makers.append((lambda: gf.masks.checkerboard(shape), shape))
        makers.append((lambda: gf.masks.channelwise(shape), shape))
    for make, wanted in makers:
        mask = outcome("masks", make, ValueError)
        if mask is not None:
            assert (mask.shape, mask.dtype) == (wanted, bool)
            assert 0 < mask.sum() < mask.size
            assert (gf.masks.complement(mask) == ~mask).all()


# Data

FLOW = functools.cache(
    lambda: gf.coupling_flow(KEY, dim=2, depth=1, coupling="additive", nn_width=2)
)
GOOD = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
FAULTS = {
    "x": [
        GOOD[0], GOOD[:, :1], GOOD[:0], GOOD[None], GOOD.astype(int), GOOD > 0,
        GOOD.astype(np.float16), GOOD.astype(complex), np.array(1, np.float32),
    ],
    "x_val": [GOOD[0], GOOD[:0], GOOD * np.float32(np.nan), GOOD.astype(int)],
    "steps": [0, -1],
    "batch_size": [0, -5, 21],
    "eval_every": [0, -1],
    "checkpoint_every": [0, -1],
    "patience": [0, 3],  # of which the second needs x_val
    "ema": [0.0, 1.0, -1.0, math.nan, math.inf],
    "learning_rate": [0.0, -1.0, math.nan, math.inf],
    "clip": [0.0, -1.0, math.nan, -math.inf],
    "devices": [[]],
}  # fmt: skip


@given(data=st.data())
@examples(40, 800)
def test_fit_refuses_what_it_cannot_use(data):
    fault = data.draw(st.sampled_from(list(FAULTS)))
    options = {"x": GOOD, "steps": 2, "batch_size": 4, "progress": False}
    options[fault] = FAULTS[fault][data.draw(st.integers(0, len(FAULTS[fault]) - 1))]
    if fault == "x" and data.draw(st.booleans()):
        x = GOOD.copy()
        places = data.draw(st.sets(st.integers(0, x.size - 1), min_size=1))
        x.ravel()[list(places)] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        options["x"] = x
    result = outcome("fit", lambda: gf.fit(KEY, FLOW(), **options), ValueError)
    assert result is None


@given(data=st.data())
@examples(30, 500)
def test_targets(data):
    name = data.draw(st.sampled_from([*gf.data.TARGETS, "moon"]))
    n = data.draw(st.sampled_from([-1, 0, 5, 1798]))
    key = jr.key(data.draw(seeds))
    x = outcome("data", lambda: gf.data.make(name, key, n), ValueError)
    if x is not None:
        judge("data", jnp.isfinite(x).all(axis=1))
    noise = data.draw(numbers)
    assume(noise < 1e30)
    x = outcome("data", lambda: gf.data.two_moons(key, 5, noise=noise), ValueError)
    assert x is None or noise > 0
    fraction = data.draw(numbers)
    parts = outcome(
        "data", lambda: gf.data.split(key, jnp.asarray(GOOD), fraction), ValueError
    )
    if parts is not None:
        assert sorted(np.concatenate(parts).tolist()) == sorted(GOOD.tolist())
    width = data.draw(st.integers(0, 2))
    x = jnp.asarray(GOOD) * data.draw(st.sampled_from([1.0, 0.0, jnp.nan, 1e6]))
    flat = outcome("data", lambda: gf.data.standardize(x[:, :width]), ValueError)
    if flat is not None and width:
        np.testing.assert_allclose(flat.std(axis=0), 1, rtol=1e-3)


@given(
    dim=small, width=small, kind=st.sampled_from([*gf.padding.KINDS, "one"]),
    noise=numbers, copies=small, seed=seeds,
)  # fmt: skip
@examples(40, 600)
def test_padding(dim, width, kind, noise, copies, seed):
    assume(dim >= 0)
    assume(not noise > 1e30)
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, dim)), jnp.float32)
    rows = outcome(
        "padding",
        lambda: gf.padding.pad(KEY, x, width, kind, noise=noise, copies=copies),
        ValueError,
    )
    if rows is not None:
        assert rows.shape == (3 * copies, dim + width)
        back = gf.padding.unpad(rows, width)
        assert (back == jnp.concatenate([x] * copies)).all()
        entropy = gf.padding.entropy(width, kind, noise=noise)
        assert entropy < math.inf
    sd = {"sd": noise}
    outcome(
        "padding",
        lambda: eqx.filter_eval_shape(
            functools.partial(gf.padding.log_likelihood, **sd), KEY, FLOW(), x[:, :1]
        ),
        ValueError,
    )


# Pictures


@given(
    levels=st.sampled_from([-1, 0, 1, 2, 3, 17, 256, 65536]),
    grey=hnp.arrays(np.float32, 8, elements=st.integers(0, 16) | st.floats(width=32)),
    as_integers=st.booleans(),
    seed=seeds,
)
@examples(40, 1000)
def test_grey_values(levels, grey, as_integers, seed):
    if as_integers:
        with np.errstate(invalid="ignore"):
            grey = np.nan_to_num(grey, posinf=0, neginf=-1).clip(-2, 2**30).astype(int)
    x = outcome(
        "grey values",
        lambda: gf.image.dequantize(jr.key(seed), levels, grey),
        ValueError,
    )
    if x is not None:
        judge("grey values", (x > 0) & (x < 1), x=x)
        back = gf.image.quantize(levels, x)
        judge("grey values", back == np.asarray(grey).astype(int), grey=grey, x=x)
    if not as_integers:
        found = outcome(
            "grey values",
            lambda: gf.image.quantize(levels, grey),
            ValueError,
            RuntimeError,
        )
        if found is not None:
            judge("grey values", (found >= 0) & (found < levels), x=grey)


@given(shape=shapes, seed=seeds)
@examples(30, 300)
def test_folding(shape, seed):
    assume(len(shape) == 3)
    assume(min(shape) >= 0)
    x = jnp.arange(math.prod(shape)).reshape(shape)
    folded = outcome("folding", lambda: gf.image.squeeze(x), ValueError)
    if folded is not None:
        assert (gf.image.unsqueeze(folded) == x).all()
    wide = outcome("folding", lambda: gf.image.unsqueeze(x), ValueError)
    if wide is not None and x.size:
        assert (gf.image.squeeze(wide) == x).all()


# Records

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def rounded(value):
    """What ten digits leave of it; NaN as a text, so that it equals itself."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return f"float {value:.10g}" if isinstance(value, float) else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("records")
        patch.setenv("GAUSS_FLOWS_LANE", "full")
        patch.setenv("GAUSS_FLOWS_RECORDS", str(path))
        patch.setattr(records, "_commit", lambda *_: "unknown")
        yield path


@given(tables=st.dictionaries(st.text(max_size=3), values, max_size=3), time=numbers)
@examples(40, 1500)
def test_records_come_back(folder, tables, time):
    path = outcome(
        "records",
        lambda: records.save(
            "00_fuzz",
            settings={"seeds": 1},
            data={"x": np.zeros(2)},
            tables=tables,
            seconds=time,
        ),
        ValueError,
    )
    if path is not None:
        assert rounded(records.load("00_fuzz")["tables"]) == rounded(tables)


@given(data=st.data())
@examples(40, 1500)
def test_a_record_that_was_changed_has_its_form_or_is_refused(folder, data):
    record = {
        "chapter": "00_fuzz", "lane": "full", "settings": {"a": 1},
        "data": {"x": {"shape": [2], "dtype": "float64", "checksum": "0123"}},
        "tables": {"a": [1.0]}, "seconds": 1.0, "device": "CPU", "commit": "a",
        "versions": dict.fromkeys(("python", *records.PACKAGES), "1"),
        "date": "2026-11-29",
    }  # fmt: skip
    name = data.draw(st.sampled_from([*record, "more"]))
    record[name] = data.draw(values)
    raw = bytearray(json.dumps(record).encode())
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(raw) - 1))
        raw[start : start + data.draw(st.integers(0, 9))] = data.draw(
            st.binary(max_size=9)
        )
    path = folder / "00_fuzz.json"
    path.write_bytes(raw)
    found = outcome("records", lambda: records.read(path), ValueError)
    if found is not None:
        assert set(found) == set(record) - {"more"}
        assert isinstance(records.describe(found), str)


# The inverse of a residual map


@jax.jit
def inverted(weights, x):
    def one(weights, x):
        def g(v):
            return jnp.tanh(weights @ v)

        y = x + g(x)
        known = jnp.linalg.norm(weights, 2)
        found = gf.banach_inverse(g, y, throw=False, max_steps=300)
        sure = gf.banach_inverse(g, y, throw=False, lipschitz=0.9)
        off = jnp.linalg.norm(jnp.stack([found.x, sure.x]) - x, axis=1)
        return known, y, off, found, sure

    return jax.vmap(one)(weights, x)


@given(seed=seeds)
@examples(4, 100)
def test_an_iteration_never_claims_what_it_did_not_reach(seed):
    rng = np.random.default_rng(seed)
    size = 10 ** rng.uniform(-3, 1, (32, 1, 1))
    weights = (size * rng.normal(size=(32, 3, 3))).astype(np.float32)
    x = (rng.normal(size=(32, 3)) * 10 ** rng.uniform(-3, 6, (32, 1))).astype(
        np.float32
    )
    x[::8] = np.where(rng.random((4, 3)) < 0.5, np.nan, np.inf)
    known, y, off, found, sure = jax.tree.map(np.asarray, inverted(weights, x))
    number = np.isfinite(y).all(axis=1)
    contraction = known <= 0.9
    right = np.where(number, True, ~found.converged & ~sure.converged)
    right &= ~(number & contraction) | (sure.converged & found.converged)
    right &= ~(sure.converged & contraction) | (off[:, 1] <= sure.error_bound)
    sizes = (np.linalg.norm(part, axis=1) for part in (y, found.x))
    scale = np.finfo(np.float32).eps * np.maximum(1, np.maximum(*sizes))
    right &= ~found.converged | (found.residual <= 17 * scale)
    judge("residual maps", right, off=off, known=known, y=y)
