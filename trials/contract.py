"""The numerical contract: what each layer promises of rounding, and what it keeps.

    PYTHONPATH=benchmarks .venv/bin/python trials/contract.py [--out FOLDER]

Each layer is drawn many times over in float64, rounded to a dtype, and tried there on
points of growing size: how far is ``inverse(transform(x))`` from ``x``, and how far is
its log-determinant from autodiff's, in float64 and with the same rounded parameters?
Then a flow of 128 blocks is tried at every depth on the way. Nothing is trained.

Errors are relative: to the largest entry of ``x``, and to the log-determinant, where
these are above 1. What does not come out as a finite number has an infinite error.

No program can undo what rounding ``y`` has lost. With ``J`` the Jacobian, a relative
error of epsilon in each ``1 + |y_i|`` comes back as ``epsilon * k`` with

    k = max(|J^-1| (1 + |y|)) / max(1, |x|) + 1,

the condition of the inverse. The error of the inverse over ``epsilon * k`` says what
the program adds. Where ``epsilon * k`` is above 1 no digit is left, and nothing is
promised: such a point is *lost*.

Writes ``contract.json``, ``contract.md`` and ``contract.svg``, which the book's page on
the contract includes, and fails if a promise was broken. ``tests/test_contract.py``
tries the same promises on other draws.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import contract_page
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from contract_promise import FAR, PROMISE, RADII, Promise
from provenance import Start, versions

import gauss_flows as gf

DIM = 4
DRAWS, POINTS = 16, 128
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)
DTYPES = ("float64", "float32", "bfloat16")
VERSIONS = ("jax", "jaxlib", "equinox", "flowjax", "numpy")


class Errors(NamedTuple):
    """Relative errors, (draws, points): NaN where there is nothing to compare with.

    Attributes:
        inverse: Of the round trip.
        log_det: Of the log-determinant; NaN where a slope underflows in float64.
        factor: ``inverse`` over epsilon times condition; NaN at lost points.
    """

    inverse: np.ndarray
    log_det: np.ndarray
    factor: np.ndarray


def enable_x64(value: bool):
    """A context in which new arrays are 64-bit, or not, whichever JAX is there."""
    there = hasattr(jax, "enable_x64")  # before jax 0.8 it was experimental
    home = jax if there else importlib.import_module("jax.experimental")
    return home.enable_x64(value)


def spread(key, layer):
    """All parameters, times a number between a half and two."""
    factor = 2 ** jr.uniform(key, minval=-1.0, maxval=1.0)
    arrays, rest = eqx.partition(layer, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda a: factor * a, arrays), rest)


def coupling(kind, **options):
    """Couplings as initialised, with all weights scaled up or down together."""

    def build(key):
        layer_key, scale_key = jr.split(key)
        return spread(scale_key, kind(layer_key, shape=(DIM,), **options))

    return build


def diagonal(transformer):
    """Diagonal layers of normal parameters with a standard deviation of one half."""

    def build(key):
        layer = gf.Diagonal(transformer, (DIM,))
        draw = jr.normal(key, layer.theta.shape) / 2
        return eqx.tree_at(lambda layer: layer.theta, layer, draw)

    return build


def actnorm(key):
    """Log-scales and shifts from the standard normal law."""
    layer, keys = gf.ActNorm((DIM,)), jr.split(key)
    draws = tuple(jr.normal(k, (DIM,)) for k in keys)
    return eqx.tree_at(lambda layer: (layer.log_scale, layer.shift), layer, draws)


def plu_linear(key):
    """A rotation whose factors were moved by a fifth."""
    layer_key, move_key = jr.split(key)
    layer = gf.PLULinear(layer_key, (DIM,))
    moved = layer.factors + 0.2 * jr.normal(move_key, layer.factors.shape)
    return eqx.tree_at(lambda layer: layer.factors, layer, moved)


def residual(inverse):
    """Residual maps of a network with spectral norms that multiply to 0.8."""

    def build(key):
        network = gf.contraction_mlp(key, dim=DIM, width=16, depth=2, lipschitz=0.8)
        return gf.ResidualMap(network, shape=(DIM,), lipschitz=0.8, inverse=inverse)

    return build


LAYERS: dict[str, Callable[[Any], Any]] = {
    "AdditiveCoupling": coupling(gf.AdditiveCoupling),
    "AffineCoupling": coupling(gf.AffineCoupling),
    "AffineCoupling, bounded": coupling(gf.AffineCoupling, log_scale_bound=2.0),
    "RQSplineCoupling": coupling(gf.RQSplineCoupling),
    "MixtureCDFCoupling": coupling(gf.MixtureCDFCoupling),
    "DeepSigmoidCoupling": coupling(gf.DeepSigmoidCoupling),
    "Diagonal, spline": diagonal(gf.transformers.RQSpline()),
    "Diagonal, mixture CDF": diagonal(gf.transformers.MixtureCDF()),
    "Diagonal, deep sigmoid": diagonal(gf.transformers.DeepSigmoid()),
    "ActNorm": actnorm,
    "HouseholderRotation": lambda key: gf.HouseholderRotation(4, (DIM,), key=key),
    "PLULinear": plu_linear,
    "LearnedPermutation": lambda key: gf.LearnedPermutation((DIM,), key=key),
    "ResidualMap, Banach": residual(gf.banach_inverse),
    "ResidualMap, Newton": residual(gf.newton_inverse),
}
FLOWS = ("affine", "spline")


def draw(build: Callable[[Any], Any], key: Any, n: int) -> Any:
    """A layer drawn ``n`` times over, in float64: each array leads with that axis."""
    with enable_x64(True):
        return eqx.filter_vmap(build)(jr.split(key, n))


def cast(tree: Any, dtype: str) -> Any:
    """The same with all its floats in another dtype, and integers as wide as JAX's."""

    def one(leaf):
        if not eqx.is_array(leaf):
            return leaf
        return leaf.astype(dtype if eqx.is_inexact_array(leaf) else int)

    return jax.tree.map(one, tree)


def points(key: Any, n: int, radius: float, dtype: str) -> jax.Array:
    """Events whose largest entry is ``radius``, in directions of the normal law."""
    with enable_x64(True):
        z = jr.normal(key, (n, DIM))
        return (radius * z / jnp.abs(z).max(axis=1, keepdims=True)).astype(dtype)


def each_with_each(function: Callable) -> Callable:
    """``function(layer, x)`` of every drawn layer at every point, compiled."""
    at_points = eqx.filter_vmap(function, in_axes=(None, 0))
    return eqx.filter_jit(eqx.filter_vmap(at_points, in_axes=(eqx.if_array(0), None)))


@each_with_each
def both_ways(layer, x):
    """What comes back from the other side, and the log-determinant."""
    y, log_det = layer.transform_and_log_det(x)
    return layer.inverse(y), log_det


def jacobian(layer, x):
    """By autodiff, with the images: of a coupling only the part that is transformed.

    The rest of a coupling's Jacobian is the identity, and no part of its determinant;
    eliminating it would cost small slopes their digits.
    """
    y, matrix = layer.transform(x), jax.jacfwd(layer.transform)(x)
    if isinstance(layer, gf.AbstractCoupling):
        part = np.array(layer.active)
        return y[part], matrix[part][:, part]
    return y, matrix


@each_with_each
def reference(layer, x):
    """Log-determinant and condition by autodiff, which knows nothing of formulas."""
    y, matrix = jacobian(layer, x)
    lost = jnp.abs(jnp.linalg.inv(matrix)) @ (1 + jnp.abs(y))
    condition = lost.max() / jnp.maximum(1, jnp.abs(x).max()) + 1
    return jnp.linalg.slogdet(matrix)[1], condition


def errors(layers: Any, x: jax.Array) -> Errors:
    """Errors of drawn layers, given in float64, at points and in the points' dtype."""
    dtype = str(x.dtype)
    with enable_x64(dtype == "float64"):
        rounded = cast(layers, dtype)
        back, log_det = jax.device_get(both_ways(rounded, x))
    with enable_x64(True):
        exact = reference(cast(rounded, "float64"), x.astype("float64"))
    return relative(x, back, log_det, *jax.device_get(exact))


def relative(x, back, log_det, exact, condition=1.0) -> Errors:
    """Errors over what is to come out, where that is above 1.

    Without a condition the factor is the error of the inverse in units of epsilon.
    """
    limit = float(jnp.finfo(x.dtype).eps) * condition
    x, back, log_det = (np.asarray(a, np.float64) for a in (x, back, log_det))
    with np.errstate(invalid="ignore", divide="ignore"):
        inverse = np.abs(back - x).max(axis=-1) / np.maximum(np.abs(x).max(axis=-1), 1)
        apart = np.abs(log_det - exact) / np.maximum(np.abs(exact), 1)
        inverse, apart = (np.where(np.isfinite(a), a, np.inf) for a in (inverse, apart))
        return Errors(
            inverse,
            np.where(np.isfinite(exact), apart, np.nan),
            np.where(limit < 1, inverse / limit, np.nan),
        )


def try_layer(name: str, dtype: str, *, key: Any, draws: int, n: int) -> list[dict]:
    """One row a radius, or one row that says why the layer does not take the dtype."""
    layer_key, *point_keys = jr.split(key, 1 + len(RADII))
    layers, rows = draw(LAYERS[name], layer_key, draws), []
    for radius, point_key in zip(RADII, point_keys, strict=True):
        about = {"layer": name, "dtype": dtype, "depth": 1, "radius": radius}
        try:
            found = errors(layers, points(point_key, n, radius, dtype))
        except (TypeError, NotImplementedError) as refusal:
            said = str(refusal).splitlines()[0]
            return [{**about, "radius": None, "refused": said}]
        except RuntimeError:  # the layer says that it cannot invert
            rows.append({**about, "raised": True})
        else:
            rows.append({**about, **summary(found)})
    return rows


def summary(found: Errors) -> dict[str, float | None]:
    """Medians and maxima, and the shares of points that they leave out.

    None stands for a number that is not finite, or for no number at all.
    """
    row: dict[str, float | None] = {"lost": float(np.isnan(found.factor).mean())}
    for name, values in found._asdict().items():
        there = values[~np.isnan(values)]
        for kind, of in (("median", np.median), ("max", np.max)):
            value = of(there) if there.size else np.nan
            row[f"{name}_{kind}"] = float(value) if np.isfinite(value) else None
    return row


@each_with_each
def down(blocks, x):
    """State and log-determinant after each block."""

    def step(carry, block):
        x, total = carry
        x, log_det = block.transform_and_log_det(x)
        total += log_det.astype(x.dtype)
        return (x, total), (x, total)

    return scan_blocks(step, (x, jnp.zeros((), x.dtype)), blocks)


@each_with_each
def exact_down(blocks, x):
    """The log-determinant after each block, by the Jacobians of its layers."""

    def step(carry, block):
        x, total = carry
        for layer in block.bijections:
            total += jnp.linalg.slogdet(jacobian(layer, x)[1])[1]
            x = layer.transform(x)
        return (x, total), total

    return scan_blocks(step, (x, jnp.zeros((), x.dtype)), blocks)


@eqx.filter_jit
def up(blocks, y, depth):
    """From the states after ``depth`` blocks back to the start."""

    def one(blocks, y):
        def step(carry, block):
            y, left = carry
            y = jnp.where(left <= depth, block.inverse(y), y)
            return (y, left - 1), y

        return scan_blocks(step, (y, jnp.array(DEPTHS[-1])), blocks, reverse=True)[0]

    at_points = eqx.filter_vmap(one, in_axes=(None, 0))
    return eqx.filter_vmap(at_points, in_axes=(eqx.if_array(0), 0))(blocks, y)


def scan_blocks(step, carry, blocks, *, reverse=False):
    """``jax.lax.scan`` over stacked blocks; where it ends, if it goes backwards."""
    arrays, static = eqx.partition(blocks, eqx.is_array)

    def body(carry, arrays):
        return step(carry, eqx.combine(arrays, static))

    end, all_ = jax.lax.scan(body, carry, arrays, reverse=reverse)
    return end if reverse else all_


def try_flow(kind: str, dtype: str, *, key: Any, draws: int, n: int) -> list[dict]:
    """One row a depth, at points of size 3, of a flow as it is initialised."""

    def build(key):
        flow = gf.coupling_flow(key, dim=DIM, depth=DEPTHS[-1], coupling=kind)
        stack: Any = gf.normalizing_map(flow)
        return stack.bijection

    flow_key, point_key = jr.split(key)
    blocks, x = draw(build, flow_key, draws), points(point_key, n, 3.0, dtype)
    with enable_x64(True):
        rounded = cast(blocks, dtype)
        exact = exact_down(cast(rounded, "float64"), x.astype("float64"))
        exact = jax.device_get(exact)
    rows = []
    with enable_x64(dtype == "float64"):
        states, log_dets = down(rounded, x)
        for depth in DEPTHS:
            back = up(rounded, states[:, :, depth - 1], jnp.array(depth))
            log_det = log_dets[:, :, depth - 1]
            found = relative(x, back, log_det, exact[:, :, depth - 1])
            about = {"layer": f"coupling_flow, {kind}", "dtype": dtype, "depth": depth}
            rows.append({**about, "radius": 3.0, **summary(found)})
    return rows


def broken(rows: list[dict]) -> Iterator[str]:
    """The promises that rows do not keep, in words."""
    for row in rows:
        promise = PROMISE.get(row["layer"], {}).get(row["dtype"])
        if promise is None or row["depth"] > 1:
            continue
        if "refused" in row or not keeps(row, promise):
            yield f"expected {promise}, got {row}"


def keeps(row: dict, promise: Promise) -> bool:
    """Whether the bounds on both errors are kept within reach, and the factor."""
    if "raised" in row:
        return row["radius"] > max(promise.reach, FAR)
    some_left = row["lost"] < 1 and row["radius"] <= FAR
    wanted = {"factor_max": promise.factor} if some_left else {}
    if row["radius"] <= promise.reach:
        wanted |= {"inverse_max": promise.inverse, "log_det_max": promise.log_det}
    return all(
        row[name] is not None and row[name] <= bound for name, bound in wanted.items()
    )


def measure() -> list[dict]:
    """Everything, layer by layer and dtype by dtype."""
    rows, options = [], {"draws": DRAWS, "n": POINTS}
    for i, name in enumerate(LAYERS):
        for dtype in DTYPES:
            begin = time.perf_counter()
            rows += try_layer(name, dtype, key=jr.key(i), **options)
            seconds = time.perf_counter() - begin
            print(f"{name}, {dtype}: {seconds:.1f} s", flush=True)
    for i, kind in enumerate(FLOWS, len(LAYERS)):
        for dtype in DTYPES:
            rows += try_flow(kind, dtype, key=jr.key(i), draws=DRAWS // 2, n=32)
    return rows


def main() -> None:
    """Measure, write numbers, table and figure, and name the promises broken."""
    parser = argparse.ArgumentParser(description="What layers promise of rounding.")
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "results")
    folder = parser.parse_args().out
    start = Start()
    rows = measure()
    result = {
        **start.told(versions(*VERSIONS)),
        "draws": DRAWS,
        "points": POINTS,
        "cells": rows,
    }
    if found := [*broken(rows)]:
        print(*found, sep="\n", file=sys.stderr)
    contract_page.write(result, folder)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
