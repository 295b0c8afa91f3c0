"""Any parameters, any points: a right answer, or the limit that a docstring states.

Programs are few: architectures come from finite tables, and parameters and points are
data. ``make fuzz`` tries many more of both.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from fuzzing import (
    LONG,
    SLACK,
    TRANSFORMERS,
    both_ways,
    dtypes,
    examples,
    finite_slopes,
    judge,
    offset,
    parameters,
    points,
    promised,
    resolved,
    seeds,
    spread,
    steep,
)
from hypothesis import given
from test_bijections import BIJECTIONS, COUPLINGS

import gauss_flows as gf

ROWS = 64
SETS = 8  # of parameters, each with ROWS / SETS points


def chosen(short, all_of_them):
    """A few names in the short profile, all in the long one; with their dtypes."""
    return [
        pytest.param(name, dtype, id=f"{name}-{dtype}")
        for i, name in enumerate(all_of_them)
        for dtype in dtypes
        if LONG or (name in short and dtype == dtypes[i % 2])
    ]


# Transformers

SHORT = ["affine", "spline", "mixture"]

quickly = {"xla_backend_optimization_level": 0}  # compiles in half of the time


@functools.partial(jax.jit, static_argnums=0, compiler_options=quickly)
def transformed(transformer, theta, x):
    """All that is asked of a transformer at each of many points, theirs its numbers."""

    def one(theta, x):
        def forward(x, theta=theta):
            return transformer.forward(x, *transformer.split(theta))

        def inverse(y, theta=theta):
            return transformer.inverse(y, *transformer.split(theta))

        size, active = offset(transformer, theta), jnp.array(True)
        return {
            **both_ways(forward, inverse, x, size, active),
            "slopes": finite_slopes(forward, x, theta)
            & finite_slopes(inverse, x, theta),
            "promised": promised(transformer, theta),
            "resolved": resolved(transformer, theta, 0 * theta),
            "steep": steep(transformer, theta, x),
        }

    return jax.vmap(one, (1, 0))(theta, x)


def of_transformer(transformer, rng, special):
    dtype = np.dtype(float if jax.config.jax_enable_x64 else np.float32)
    size = 10 ** rng.uniform(-3, 3, ROWS)
    theta = size * rng.normal(size=(transformer.n_parameters, ROWS))
    return theta.astype(dtype), points(rng, (ROWS,), special).astype(dtype)


def beyond_limits(got):
    """Where an answer may be wrong, and in what, as docstrings say."""
    not_finite = ~got["promised"] & ~(got["finite"] & got["slopes"])
    log_det = ~got["same"] & ~got["resolved"]
    gradient = ~got["slopes"] & got["steep"]
    others = got["undone"] & got["kept"] & got["finite"]
    others &= (got["same"] | log_det) & (got["slopes"] | gradient)
    return not_finite | (others & (log_det | gradient))


@pytest.mark.parametrize(("name", "dtype"), chosen(SHORT, TRANSFORMERS))
@given(seed=seeds)
@examples(8, 60)
def test_a_transformer_is_undone_and_its_slope_is_right(name, dtype, seed):
    transformer, rng = TRANSFORMERS[name], np.random.default_rng(seed)
    end = getattr(transformer, "interval", 4.0)
    with enable_x64(dtype == "float64"):
        theta, x = of_transformer(transformer, rng, [end, -end])
        got = {k: np.asarray(v) for k, v in transformed(transformer, theta, x).items()}
    right = got["undone"] & got["same"] & got["slopes"] & got["finite"]
    if dtype == "float64":
        # a steep bin shows the rounding of the place within it; exp underflows
        finest = 2 * end / gf.spline.MIN_WIDTH if "spline" in name else 10.0
        rounding = 500 * np.finfo(dtype).eps * finest * (1 + np.abs(got["log_det"]))
        with np.errstate(divide="ignore"):
            off = np.abs(np.log(got["slope"]) - got["log_det"])
        close = off <= rounding + got["room"]
        right &= close | (got["log_det"] < -30)
    judge(f"transformers: {name}", right, limit=beyond_limits(got), **got)


@pytest.mark.parametrize(("name", "dtype"), chosen(SHORT, TRANSFORMERS))
@given(seed=seeds)
@examples(3, 30)
def test_what_is_no_number_stays_none(name, dtype, seed):
    """NaN in a point or in its numbers comes out, and infinity is no finite answer."""
    transformer, rng = TRANSFORMERS[name], np.random.default_rng(seed)
    with enable_x64(dtype == "float64"):
        theta, x = of_transformer(transformer, rng, [])
        x[::4] = np.nan
        x[1::4] = np.inf * rng.choice([-1, 1], len(x[1::4]))
        theta[0, 2::4] = np.nan
        got = {k: np.asarray(v) for k, v in transformed(transformer, theta, x).items()}
    lost = np.isnan(x) | (np.isnan(theta[0]))
    if "spline" in name:  # the identity, whatever its numbers, outside its interval
        lost = np.isnan(x) | (lost & (np.abs(x) <= transformer.interval))
    right = np.ones(ROWS, bool)
    for value in (got["y"], got["preimage"]):
        right &= np.where(lost, np.isnan(value), True)
        right &= ~np.isinf(x) | ~np.isfinite(value)
    if transformer.n_parameters > 2:  # of the others the slope is the same everywhere
        for value in (got["log_det"], got["inverse_log_det"]):
            right &= np.where(lost, np.isnan(value), True)
    judge(f"no numbers: {name}", right, **got)


@pytest.mark.parametrize(("name", "dtype"), chosen(SHORT, TRANSFORMERS))
@given(seed=seeds)
@examples(8, 60)
def test_a_transformer_increases(name, dtype, seed):
    transformer, rng = TRANSFORMERS[name], np.random.default_rng(seed)
    with enable_x64(dtype == "float64"):
        theta, x = of_transformer(transformer, rng, [])
        theta, x = np.repeat(theta[:, :1], ROWS, 1), np.sort(x)
        got = {k: np.asarray(v) for k, v in transformed(transformer, theta, x).items()}
        size = np.asarray(offset(transformer, jnp.asarray(theta)))
    rounding = SLACK * np.finfo(dtype).eps * (size + np.abs(got["y"]))
    rises = np.diff(got["y"]) >= -rounding[1:]
    judge(f"increasing: {name}", rises, limit=~got["promised"][1:], x=x[1:])


# Couplings


def of_layer(bijection, rng, low, high, dtype, special=()):
    """Sets of parameters, and points for each."""
    arrays, rest = parameters(rng, bijection, SETS, low, high)
    shape = (SETS, ROWS // SETS, *bijection.shape)
    return (arrays, rest), points(rng, shape, list(special)).astype(dtype)


def over_sets(one):
    """``one(bijection, x)`` for all points of all sets of parameters, compiled."""

    @functools.partial(eqx.filter_jit, compiler_options=quickly)
    def all_of_them(arrays, rest, x):
        def of_set(arrays, x):
            return jax.vmap(lambda x: one(eqx.combine(arrays, rest), x))(x)

        return jax.vmap(of_set)(arrays, x)

    def call(layer, x):
        return {k: np.asarray(v) for k, v in all_of_them(*layer, x).items()}

    return call


def rounding_of(layer, passive):
    """The parameters of all active coordinates, and their rounding.

    A sum is rounded relative to the sizes of what is added, however small it comes out.
    The sizes are those of the network with every number made positive.
    """

    def columns(conditioner, passive):
        parts = conditioner.columns(passive, len(layer.active), layer.transformer.sizes)
        return jnp.concatenate(parts)

    arrays, rest = eqx.partition(layer.conditioner, eqx.is_inexact_array)
    positive = eqx.combine(jax.tree.map(jnp.abs, arrays), rest)
    rounding = SLACK * jnp.finfo(passive.dtype).eps
    theta = columns(layer.conditioner, passive)
    return theta, rounding * columns(positive, jnp.abs(passive))


@over_sets
def coupled(layer, x):
    mask, transformer = jnp.asarray(layer.mask), layer.transformer
    passive = x.ravel()[np.flatnonzero(~layer.mask)]
    theta, d_theta = rounding_of(layer, passive)

    def placed(values):
        whole = jnp.zeros(x.size, x.dtype).at[np.array(layer.active)]
        return whole.set(values).reshape(x.shape)

    def moved(x):
        """First-order, by the slopes of each coordinate in its own parameters."""
        x = x.ravel()[np.array(layer.active)]

        def total(theta, which):
            return transformer.forward(x, *transformer.split(theta))[which].sum()

        image, log_det = (
            (jnp.abs(jax.grad(total)(theta, which)) * d_theta).sum(axis=0)
            for which in (0, 1)
        )
        return placed(image), log_det.sum()

    found = both_ways(
        layer.transform_and_log_det,
        layer.inverse_and_log_det,
        x,
        placed(offset(transformer, theta)),
        mask,
        moved,
    )
    arrays, rest = eqx.partition(layer, eqx.is_inexact_array)

    def forward(arrays, x):
        return eqx.combine(arrays, rest).transform_and_log_det(x)

    def inverse(arrays, y):
        return eqx.combine(arrays, rest).inverse_and_log_det(y)

    return {
        **found,
        "slopes": finite_slopes(forward, arrays, x) & finite_slopes(inverse, arrays, x),
        "promised": promised(transformer, theta).all() & (jnp.abs(theta).max() < 1e15),
        "resolved": resolved(transformer, theta, d_theta).all(),
        "steep": steep(transformer, theta, x.ravel()[np.array(layer.active)]).any(),
    }


@pytest.mark.parametrize(("name", "dtype"), chosen(["affine, alternating"], COUPLINGS))
@given(seed=seeds)
@examples(6, 40)
def test_a_coupling_is_undone_whatever_its_network(name, dtype, seed):
    rng = np.random.default_rng(seed)
    with enable_x64(dtype == "float64"):
        bijection = BIJECTIONS[name](jax.random.key(0), np.dtype(dtype))
        layer, x = of_layer(bijection, rng, -3, 3, dtype, [4.0, -4.0])
        got = coupled(layer, x)
        lost = coupled(layer, np.where(rng.random(x.shape) < 0.1, np.nan, x))
    right = got["undone"] & got["same"] & got["kept"] & got["slopes"] & got["finite"]
    judge(f"couplings: {name}", right, limit=beyond_limits(got), **got)
    # NaN among passive coordinates makes all active ones NaN, if they depend on them
    event = tuple(range(2, x.ndim))
    nan, active = np.isnan(lost["x"]), bijection.mask
    unseen = (nan & ~active).any(event).reshape(*nan.shape[:2], *(1,) * len(event))
    if hasattr(bijection.transformer, "interval"):
        unseen = unseen & (np.abs(lost["x"]) <= bijection.transformer.interval)
    if name.startswith("conv"):  # which sees the neighbours only
        unseen = False
    passed_on = ~(nan | (active & unseen)) | np.isnan(lost["y"])
    judge(f"no numbers: {name}", passed_on.all(event), x=lost["x"], y=lost["y"])


# Linear layers: no bracket, but a condition number


@over_sets
def mixed(layer, x):
    y, log_det = layer.transform_and_log_det(x)
    back, inverse_log_det = layer.inverse_and_log_det(y)
    jacobian = jax.jacfwd(lambda x: layer.transform(x.reshape(y.shape)).ravel())
    matrix = jacobian(x.ravel())
    singular = jnp.linalg.svd(matrix, compute_uv=False)
    return {
        "x": x,
        "y": y,
        "off": jnp.abs(back - x).max(),
        "size": jnp.abs(x).max() + jnp.abs(y).max() + 1e-30,
        "log_dets": jnp.stack([log_det, -inverse_log_det, jnp.log(singular).sum()]),
        "condition": singular.max() / singular.min(),
        "smallest": singular.min(),
        "nan": jnp.isnan(y).any(),
    }


LINEAR = {
    "rotation": (-3, 3),
    "rotation, at the identity": (-3, 3),
    "permutation, learned": (-3, 3),
    "channel permutation": (-3, 3),
    "PLU linear": (-3, 0),
    "PLU linear, picture": (-3, 0),
    "actnorm": (-3, 1),
    "actnorm, picture": (-3, 1),
}


@pytest.mark.parametrize(
    ("name", "dtype"), chosen(["rotation", "PLU linear"], list(LINEAR))
)
@given(seed=seeds)
@examples(6, 60)
def test_a_linear_layer_is_undone_as_well_as_its_condition_allows(name, dtype, seed):
    rng = np.random.default_rng(seed)
    with enable_x64(dtype == "float64"):
        bijection = BIJECTIONS[name](jax.random.key(0), np.dtype(dtype))
        layer, x = of_layer(bijection, rng, *LINEAR[name], dtype)
        got = mixed(layer, x)
        broken = np.where(rng.random(x.shape) < 0.1, np.nan, x)
        lost = mixed(layer, broken)["nan"]
    eps = np.finfo(dtype).eps
    factors = 30.0 if "PLU" in name else 1.0  # of L and U apart
    rounding = SLACK * eps * factors * got["condition"]
    right = got["off"] <= rounding * got["size"] * (1 + 1 / got["smallest"])
    there, back, exact = np.moveaxis(got["log_dets"], -1, 0)
    near = 10 * rounding * (1 + np.abs(there))
    right &= (np.abs(there - back) <= near) & (np.abs(there - exact) <= near)
    judge(f"linear: {name}", right, **got)
    event = tuple(range(2, x.ndim))
    judge(f"no numbers: {name}", lost | ~np.isnan(broken).any(event), x=broken)


# Stacks


@over_sets
def stacked(flow, x):
    """The three ways to keep memory, forward and backward."""

    def way(memory):
        arrays, rest = eqx.partition(
            gf.with_memory(flow, memory, keep_every=2, tolerance=1e3),
            eqx.is_inexact_array,
        )

        def total(both):
            y, log_det = eqx.combine(both[0], rest).transform_and_log_det(both[1])
            return y.sum() + log_det, (y, log_det)

        slopes, (y, log_det) = jax.grad(total, has_aux=True)((arrays, x))
        flat = jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(slopes)])
        return jnp.concatenate([y, log_det[None]]), flat

    values, slopes = zip(*map(way, gf.memory.MODES), strict=True)
    y, log_det = values[0][:-1], values[0][-1]
    jacobian = jax.jacfwd(flow.transform)(x)
    back, inverse_log_det = flow.inverse_and_log_det(y)
    condition = jnp.linalg.norm(jacobian) * jnp.linalg.norm(jnp.linalg.inv(jacobian))
    return {
        "x": x,
        "values": jnp.stack(values),
        "slopes": jnp.stack(slopes),
        "off": jnp.abs(back - x).max(),
        "amplified": condition * (4 + jnp.abs(x).max() + jnp.abs(y).max()),
        "log_dets": jnp.stack(
            [log_det, -inverse_log_det, jnp.linalg.slogdet(jacobian)[1]]
        ),
    }


STACKS = {
    "affine": {"coupling": "affine", "log_scale_bound": 2.0, "actnorm": True},
    "spline": {"coupling": "spline"},
    "additive": {"coupling": "additive"},
    "mixture": {"coupling": "mixture", "n_components": 3},
    "sigmoid": {"coupling": "sigmoid", "n_components": 3},
}


@pytest.mark.parametrize(("name", "dtype"), chosen(["affine"], STACKS))
@given(seed=seeds)
@examples(6, 60)
def test_a_stack_is_the_same_however_it_keeps_memory(name, dtype, seed):
    rng = np.random.default_rng(seed)
    with enable_x64(dtype == "float64"):
        flow = gf.coupling_flow(
            jax.random.key(0), dim=2, depth=3, nn_width=8, nn_depth=1,
            dtype=dtype, **STACKS[name],
        )  # fmt: skip
        layer, _ = of_layer(gf.normalizing_map(flow), rng, -3, 0.3, dtype)
        x = spread(rng, (SETS, ROWS // SETS, 2), -3, 1).astype(dtype)
        got = stacked(layer, x)
    eps = np.finfo(dtype).eps
    rounding = 1e3 * eps * got["amplified"]
    ill = ~(rounding < 1e-3)  # beyond it a first-order bound says nothing
    right = np.isfinite(got["slopes"]).all((-1, -2))
    for values in (got["values"], got["slopes"][..., :2, :]):
        apart = np.abs(values - values[..., :1, :]).max((-1, -2))
        right &= apart <= 1e3 * eps * np.abs(values).max((-1, -2))
    invert = np.abs(got["slopes"][..., 2, :] - got["slopes"][..., 0, :]).max(-1)
    right &= ill | (invert <= 1e2 * rounding * np.abs(got["slopes"]).max((-1, -2)))
    right &= ill | (got["off"] <= rounding)
    there, back, exact = np.moveaxis(got["log_dets"], -1, 0)
    near = 1e2 * rounding * (1 + np.abs(there))
    right &= ill | ((np.abs(there - back) <= near) & (np.abs(there - exact) <= near))
    judge(f"stacks: {name}", right, **got)
