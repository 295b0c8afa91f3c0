"""Training: the source's loop step by step, failures, best parameters, bad input."""

import io
import json
import os
import socket
import subprocess
import sys
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import paramax
import pytest
from flowjax.bijections import AbstractBijection, Affine, Chain, Invert, Scan
from flowjax.distributions import Normal, StandardNormal, Transformed
from jaxtyping import Array

import gauss_flows as gf
from gauss_flows import _loop, _progress, data, train


class Point(eqx.Module):
    """One trainable number; with `down` and plain descent it counts the updates."""

    w: Array


def down(point, batch, key):
    return -point.w + 0 * batch.sum()


def count_then(bad):
    """Loss -w, and what `bad` makes of it once w has passed 4.5."""

    def loss(point, batch, key):
        return jnp.where(point.w > 4.5, bad(point.w), down(point, batch, key))

    return loss


COUNT = {"optimizer": optax.sgd(1.0), "clip": None, "batch_size": 4, "progress": False}
NAN = count_then(lambda w: jnp.nan)
X = jnp.zeros((8, 2), jnp.float32)


def point(w=0.0):
    return Point(jnp.array(w, jnp.float32))


def flow_of(key, dtype=None):
    return gf.coupling_flow(
        key, dim=2, depth=2, coupling="affine", nn_width=6, nn_depth=1, dtype=dtype
    )


def plain_loop(flow, x, steps, *, peak, clip, batch_size, key):
    """The source's way: a Python loop over one jitted step."""
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    # optax takes the cosine of a 32-bit count in 32 bits, whatever the numbers are
    cycle = optax.cosine_onecycle_schedule(steps, peak)
    optimizer = optax.adam(lambda count: cycle(count.astype(float)))
    if clip is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, key):
        key, subkey = jr.split(key)
        batch = x[jr.randint(subkey, (batch_size,), 0, len(x))]
        loss, grads = jax.value_and_grad(
            lambda p: -eqx.combine(p, static).log_prob(batch).mean()
        )(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads)))
        return eqx.apply_updates(params, updates), opt_state, key, loss, norm

    records = []
    for _ in range(steps):
        params, opt_state, key, loss, norm = step(params, opt_state, key)
        records.append((loss, norm))
    return params, np.array(records).T


def assert_trees_close(a, b, **tolerance):
    a, b = (jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)) for tree in (a, b))
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


@pytest.mark.parametrize("clip", [0.5, None])
def test_fit_is_the_plain_loop(x64, clip):
    x = data.source_spiral(300)
    flow = gf.coupling_flow(
        jr.key(0), dim=2, depth=2, nn_width=6, nn_depth=1, base=Normal(jnp.zeros(2))
    )
    params, records = plain_loop(
        flow, x, 50, peak=3e-3, clip=clip, batch_size=64, key=jr.key(1)
    )
    result = train.fit(
        jr.key(1), flow, x, steps=50, batch_size=64, clip=clip, eval_every=20,
        progress=False,
    )  # fmt: skip
    assert result.train_loss.dtype == np.float64
    np.testing.assert_allclose(result.train_loss, records[0], rtol=1e-9)
    np.testing.assert_allclose(result.gradient_norm, records[1], rtol=1e-6)
    assert_trees_close(result.flow, params, rtol=1e-6, atol=1e-9)
    assert result.failed_step is None
    assert result.best_step is None
    # clipping must matter here, or the test above would not see it
    assert (records[1] > 0.5).any()


def test_fit_lowers_the_loss_and_leaves_its_arguments_alone():
    key, x = jr.key(0), data.four_gaussians(jr.key(1), 256)
    flow = flow_of(jr.key(2))
    before = train.mean_log_prob(flow, x)
    result = train.fit(key, flow, x, steps=60, batch_size=64, progress=False)
    assert train.mean_log_prob(result.flow, x) > before + 0.1
    # donated buffers would raise here
    assert train.mean_log_prob(flow, x) == before
    jr.split(key)
    assert result.train_loss.shape == result.gradient_norm.shape == (60,)
    assert result.val_steps.shape == result.val_loss.shape == (0,)


def test_float32_is_kept_under_x64(x64):
    x = data.two_moons(jr.key(1), 64).astype(jnp.float32)
    result = train.fit(
        jr.key(0), flow_of(jr.key(2), jnp.float32), x, steps=3, batch_size=8,
        x_val=x, progress=False,
    )  # fmt: skip
    leaves = jax.tree.leaves(eqx.filter(result.flow, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert result.train_loss.dtype == result.val_loss.dtype == np.float32


@pytest.mark.parametrize(
    "bad",
    [
        lambda w: jnp.nan,
        lambda w: jnp.inf,
        lambda w: -w + 0 * jnp.sqrt(jnp.abs(w - 5)),  # the gradient alone is NaN
    ],
    ids=["nan", "inf", "gradient"],
)
@pytest.mark.parametrize("eval_every", [1, 3, 100])
def test_failure_keeps_the_last_good_parameters(bad, eval_every):
    loss = count_then(bad)
    result = train.fit(
        jr.key(0), point(), X, steps=12, loss=loss, eval_every=eval_every, throw=False,
        **COUNT,
    )  # fmt: skip
    # w counts the updates: after five of them it is 5, and its loss is bad
    assert result.failed_step == 5
    assert result.final_flow.w == result.flow.w == 4
    np.testing.assert_array_equal(result.train_loss[:5], [0, -1, -2, -3, -4])
    np.testing.assert_array_equal(result.gradient_norm[:5], 1)
    recorded = np.stack([result.train_loss, result.gradient_norm])
    assert not np.isfinite(recorded[:, 5]).all()
    assert np.isnan(recorded[:, 6:]).all()


def test_failure_after_the_last_update_is_seen():
    result = train.fit(jr.key(0), point(), X, steps=5, loss=NAN, throw=False, **COUNT)
    assert result.failed_step == 5
    assert result.flow.w == 4
    assert np.isfinite(result.train_loss).all()
    fine = train.fit(jr.key(0), point(), X, steps=4, loss=NAN, **COUNT)
    assert fine.failed_step is None
    assert fine.flow.w == 4


def test_failure_at_the_very_first_step_keeps_the_initial_parameters():
    result = train.fit(
        jr.key(0), point(7.0), X, steps=5, loss=NAN, throw=False, **COUNT
    )
    assert result.failed_step == 0
    assert result.flow.w == 7


def test_failure_raises_with_the_result():
    with pytest.raises(train.NonFiniteError, match=r"loss nan.*at step 5") as caught:
        train.fit(jr.key(0), point(), X, steps=12, loss=NAN, **COUNT)
    assert caught.value.result.flow.w == 4


def test_best_parameters_by_held_out_loss():
    def square(point, batch, key):  # trains away from 0, where the held-out rows are
        return ((point.w - batch) ** 2).mean()

    result = train.fit(
        jr.key(0), point(-1.0), X + 10, x_val=X, steps=25, eval_every=4, loss=square,
        optimizer=optax.sgd(0.01), clip=None, batch_size=4, progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(result.val_steps, [0, 4, 8, 12, 16, 20, 24, 25])
    w = 10 - 11 * 0.98 ** np.array(result.val_steps)
    np.testing.assert_allclose(result.val_loss, w**2, rtol=1e-4)
    assert result.best_step == 4
    np.testing.assert_allclose(result.flow.w, w[1], rtol=1e-5)
    np.testing.assert_allclose(result.final_flow.w, w[-1], rtol=1e-5)


def test_best_parameters_may_be_the_initial_or_the_last_ones():
    kwargs = {"x_val": X, "steps": 6, "eval_every": 4, **COUNT}
    last = train.fit(jr.key(0), point(), X, loss=down, **kwargs)
    assert (last.best_step, float(last.flow.w)) == (6, 6)
    kwargs["optimizer"] = optax.sgd(-1.0)
    first = train.fit(jr.key(0), point(), X, loss=down, **kwargs)
    assert (first.best_step, float(first.flow.w), float(first.final_flow.w)) == (
        0,
        0,
        -6,
    )


def test_held_out_loss_that_is_never_finite_does_not_stop_training():
    def loss(point, batch, key):  # infinite on the held-out rows only
        return down(point, batch, key) + jnp.where(batch.max() > 1, jnp.inf, 0.0)

    result = train.fit(jr.key(0), point(), X, x_val=X + 2, steps=3, loss=loss, **COUNT)
    assert result.best_step is None
    assert result.failed_step is None
    assert result.flow.w == 3


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(1.0), optax.adam], ids=["own", "cycle"]
)
def test_compiled_once_whatever_the_number_of_steps(optimizer):
    traces = []

    def loss(point, batch, key):
        traces.append(batch.shape)
        return down(point, batch, key)

    options = {"loss": loss, "eval_every": 10, "x_val": X, **COUNT}
    options["optimizer"] = optimizer
    train.fit(jr.key(0), point(), X, steps=25, **options)
    first = len(traces)
    train.fit(jr.key(1), point(1.0), X + 1, steps=40, **options)
    assert len(traces) == first


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 99, 1000])
def test_the_default_schedule_is_that_of_optax(steps, x64):
    counts = jnp.arange(steps + 3, dtype=jnp.int32)
    cycle = optax.cosine_onecycle_schedule(steps, 1.0)
    expected = jax.vmap(cycle)(counts.astype(float))
    found = _loop.one_cycle(counts, jnp.array(steps, jnp.int32))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("make", [optax.adam, optax.sgd])
def test_a_peak_with_a_schedule_is_the_finished_optimizer(make):
    options = {"steps": 9, "loss": down, "batch_size": 4, "progress": False}
    optimizer = make(optax.cosine_onecycle_schedule(9, 0.1))
    finished = train.fit(jr.key(0), point(), X, optimizer=optimizer, **options).flow
    options = {"optimizer": make, "learning_rate": 0.1, **options}
    cycle = train.fit(jr.key(0), point(), X, **options).flow
    shape = optax.cosine_onecycle_schedule(9, 2.0)
    options["learning_rate"] = 0.05
    given = train.fit(jr.key(0), point(), X, schedule=shape, **options).flow
    assert finished.w != 0
    np.testing.assert_allclose([cycle.w, given.w], finished.w, rtol=1e-6)


def test_clipping_is_that_of_optax():
    options = {"steps": 5, "loss": down, "batch_size": 4, "progress": False}
    options["optimizer"] = optax.sgd(1.0)
    for clip in (0.3, 1.0, 3.0, float("inf"), None):
        ours = train.fit(jr.key(0), point(), X, clip=clip, **options).flow
        limit = optax.clip_by_global_norm(clip or float("inf"))
        other = options | {"optimizer": optax.chain(limit, optax.sgd(1.0))}
        theirs = train.fit(jr.key(0), point(), X, clip=None, **other).flow
        assert ours.w == theirs.w == pytest.approx(5 * min(clip or 1.0, 1.0))


def test_rates_are_data_and_may_differ_between_seeds():
    traces = []

    def loss(point, batch, key):
        traces.append(batch.shape)
        return down(point, batch, key)

    options = {"steps": 6, "loss": loss, "batch_size": 4, "progress": False}
    options |= {"optimizer": optax.sgd, "schedule": optax.constant_schedule(1.0)}
    rates, clips = np.array([0.1, 0.2, 0.2]), np.array([1.0, 0.5, np.inf])
    many = train.fit_many(
        jr.split(jr.key(0), 3), lambda key: point(), X,
        learning_rate=rates, clip=clips, **options,
    )  # fmt: skip
    np.testing.assert_allclose(many.flow.w, [0.6, 0.6, 1.2], rtol=1e-5)
    train.fit(jr.key(0), point(), X, learning_rate=0.1, **options)
    before = len(traces)
    train.fit(jr.key(0), point(), X, learning_rate=0.3, clip=None, **options)
    assert len(traces) == before


def test_non_trainable_parameters_stay():
    class Pair(eqx.Module):
        free: Array
        fixed: Array | paramax.NonTrainable

    def loss(pair, batch, key):
        return (pair.free - batch).sum() ** 2 + pair.fixed * pair.free**2

    pair = Pair(jnp.array(1.0), paramax.NonTrainable(jnp.array(3.0)))
    options = {**COUNT, "optimizer": optax.sgd(1e-3)}
    result = train.fit(jr.key(0), pair, X, steps=3, loss=loss, **options)
    assert result.flow.fixed.tree == 3
    assert result.flow.free != 1


def test_fit_many_does_what_fit_does():
    x = data.two_moons(jr.key(0), 200)
    keys = jr.split(jr.key(1), 3)
    options = {"steps": 20, "batch_size": 32, "eval_every": 8, "progress": False}
    many = train.fit_many(keys, flow_of, x, x_val=x[:50], **options)
    assert many.train_loss.shape == (3, 20)
    assert many.val_loss.shape == (3, 4)
    assert many.failed_step == many.stopped_step == (None, None, None)
    for i, key in enumerate(keys):
        init, batches = jr.split(key)
        one = train.fit(batches, flow_of(init), x, x_val=x[:50], **options)
        np.testing.assert_allclose(many.train_loss[i], one.train_loss, rtol=2e-5)
        np.testing.assert_allclose(many.val_loss[i], one.val_loss, rtol=2e-5)
        assert many.best_step[i] == one.best_step
        assert_trees_close(train.member(many.flow, i), one.flow, rtol=1e-3, atol=1e-5)
    assert len(set(many.train_loss[:, 0])) == 3
    each = eqx.filter_vmap(train.mean_log_prob, in_axes=(eqx.if_array(0), None))
    assert each(many.flow, x).shape == (3,)


def test_a_seed_that_fails_does_not_stop_the_others():
    def build(key):  # every other seed starts far below
        return Point(jnp.where(jr.bernoulli(key), 0.0, -100.0).astype(jnp.float32))

    keys = jr.split(jr.key(0), 4)
    starts = np.array([build(jr.split(key)[0]).w for key in keys])
    assert set(starts) == {0.0, -100.0}
    options = {"steps": 9, "eval_every": 4, "loss": NAN, "x_val": X, **COUNT}
    result = train.fit_many(keys, build, X, throw=False, **options)
    failed = starts == 0
    assert result.failed_step == tuple(5 if bad else None for bad in failed)
    np.testing.assert_array_equal(result.final_flow.w, np.where(failed, 4, -91))
    assert np.isfinite(result.train_loss[~failed]).all()
    assert np.isnan(result.train_loss[failed, 5:]).all()
    with pytest.raises(train.NonFiniteError, match=r"at step 5 \(seed \d\)") as caught:
        train.fit_many(keys, build, X, **options)
    np.testing.assert_array_equal(caught.value.result.final_flow.w, result.final_flow.w)


def test_member_takes_one_flow_and_knows_how_many_there_are():
    flows = eqx.filter_vmap(flow_of)(jr.split(jr.key(0), 2))
    first = train.member(flows, 0)
    assert_trees_close(first, flow_of(jr.split(jr.key(0), 2)[0]), rtol=1e-6)
    with pytest.raises(IndexError, match="below 2, got 2"):
        train.member(flows, 2)


class Terminal(io.StringIO):
    def isatty(self):
        return True


Notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})


@pytest.mark.parametrize("stream", [Terminal, Notebook])
def test_progress_bar_where_it_can_be_drawn(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", shown := stream())
    options = {"loss": down, "x_val": X, **COUNT}
    train.fit(jr.key(0), point(), X, steps=2, **options)
    assert shown.getvalue() == ""
    train.fit(jr.key(0), point(), X, steps=2, **(options | {"progress": True}))
    assert "\r" in shown.getvalue()
    assert "2/2" in shown.getvalue()
    assert "held out" in shown.getvalue()


def test_progress_in_a_log_file_is_a_line_now_and_then(capsys, monkeypatch):
    options = {"loss": down, "eval_every": 5, **COUNT, "progress": True}
    train.fit(jr.key(0), point(), X, steps=100, **options)
    lines = ["step 5/100, loss -4.000", "step 100/100, loss -100.000"]
    assert capsys.readouterr().err.splitlines() == lines
    monkeypatch.setattr(_progress, "SECONDS", 0)
    train.fit(jr.key(0), point(), X, steps=100, **options)
    assert len(capsys.readouterr().err.splitlines()) == 21


@pytest.mark.parametrize("many", [False, True])
def test_average_is_that_of_optax_over_the_parameters_tried(many):
    options = {**COUNT, "loss": lambda p, *_: p.w**2, "optimizer": optax.sgd(0.1)}
    options |= {"steps": 7, "ema": 0.8}
    if many:
        options["keys"] = jr.split(jr.key(0), 2)
        result = train.fit_many(build=lambda key: point(3.0), x=X, **options)
    else:
        result = train.fit(jr.key(0), point(3.0), X, **options)
    ema = optax.ema(0.8)
    state = ema.init(jnp.zeros(()))
    for w in 3 * 0.8 ** np.arange(8):  # before each update, and after the last
        average, state = ema.update(jnp.asarray(w, jnp.float32), state)
    np.testing.assert_allclose(result.flow.w, average, rtol=1e-6)
    np.testing.assert_allclose(result.final_flow.w, w, rtol=1e-6)


def test_average_is_what_is_validated_and_leaves_out_what_failed():
    def loss(point, batch, key):
        return jnp.where(point.w > 4.5, jnp.nan, down(point, batch, key))

    options = {**COUNT, "loss": loss, "x_val": X, "eval_every": 4, "ema": 0.5}
    result = train.fit(jr.key(0), point(), X, steps=12, throw=False, **options)
    weights = 0.5 ** np.arange(5)[::-1]
    average = np.average(np.arange(5), weights=weights)  # of 0 to 4, and not of 5
    assert result.failed_step == 5
    np.testing.assert_allclose(
        result.val_loss[1], -np.average(range(4), weights=weights[1:]), rtol=1e-6
    )
    assert result.best_step == 4
    assert result.final_flow.w == 4
    no_val = train.fit(
        jr.key(0), point(), X, steps=12, throw=False, **(options | {"x_val": None})
    )
    np.testing.assert_allclose(no_val.flow.w, average, rtol=1e-6)


AWAY = {  # leaves the held-out rows behind after four steps
    **COUNT, "loss": lambda point, batch, _: ((point.w - batch) ** 2).mean(),
    "optimizer": optax.sgd(0.01), "eval_every": 4, "x_val": X, "x": X + 10,
}  # fmt: skip


def test_patience_stops_after_evaluations_without_a_better_one():
    result = train.fit(jr.key(0), point(-1.0), steps=40, patience=3, **AWAY)
    np.testing.assert_array_equal(result.val_steps, [0, 4, 8, 12, 16])
    assert (result.best_step, result.stopped_step) == (4, 16)
    np.testing.assert_allclose(result.final_flow.w, 10 - 11 * 0.98**16, rtol=1e-5)
    assert np.isfinite(result.train_loss[:16]).all()
    assert np.isnan(result.train_loss[17:]).all()
    # as many steps as that, without patience, are the same
    plain = train.fit(jr.key(0), point(-1.0), steps=16, **AWAY)
    assert plain.final_flow.w == result.final_flow.w
    assert plain.flow.w == result.flow.w
    assert plain.stopped_step is None
    # it does not count as stopped where it would stop anyway
    last = train.fit(jr.key(0), point(-1.0), steps=16, patience=3, **AWAY)
    assert last.stopped_step is None


def test_patience_may_end_at_the_first_evaluation(tmp_path):
    def loss(point, batch, key):  # infinite on the held-out rows, where w is 0
        infinite = (batch.max() > 1) & (point.w < 1)
        return down(point, batch, key) + jnp.where(infinite, jnp.inf, 0.0)

    options = {"x_val": X + 2, "eval_every": 1, "patience": 1, "loss": loss, **COUNT}
    result = train.fit(jr.key(0), point(), X, steps=3, **options)
    assert result.stopped_step == 0
    assert result.final_flow.w == 0
    assert np.isnan(result.train_loss[1:]).all()

    def build(key):  # w = 0 for one seed, and 5 for the other
        return point() if key is None else Point(5.0 * (jr.bits(key) % 2))

    keys = jr.split(jr.key(3), 2)
    file = tmp_path / "run.json"
    many = train.fit_many(keys, build, X, steps=3, record=file, **options)
    np.testing.assert_array_equal(many.final_flow.w, [0, 8])
    np.testing.assert_array_equal(many.val_loss[0], [np.inf] + 3 * [np.nan])
    assert json.loads(file.read_text())["result"]["lowest_val_loss"] == ["inf", -8.0]


def test_each_seed_has_its_own_patience():
    def build(key):
        return (
            point(-1.0)
            if key is None
            else Point(jnp.where(jr.bits(key) % 2, 9.0, -1.0))
        )

    keys = jr.split(jr.key(0), 5)
    many = train.fit_many(keys, build, steps=60, patience=2, **AWAY)
    assert len(set(many.stopped_step)) == 2
    for i, key in enumerate(keys):
        init, batches = jr.split(key)
        one = train.fit(batches, build(init), steps=60, patience=2, **AWAY)
        assert many.stopped_step[i] == one.stopped_step
        assert many.best_step[i] == one.best_step
        np.testing.assert_allclose(many.final_flow.w[i], one.final_flow.w, rtol=1e-6)


def test_callback_sees_a_snapshot_and_what_it_returns_is_recorded():
    seen = []

    def callback(snapshot):
        seen.append(snapshot)
        return {"w": snapshot.flow.w, "pair": [snapshot.step, 1.0]}

    options = {"loss": down, "eval_every": 4, "x_val": X, "callback": callback, **COUNT}
    result = train.fit(jr.key(0), point(), X, steps=10, **options)
    assert [snapshot.step for snapshot in seen] == [0, 4, 8, 10]
    np.testing.assert_array_equal(result.recorded["w"], [0, 4, 8, 10])
    np.testing.assert_array_equal(result.recorded["pair"][:, 0], [0, 4, 8, 10])
    for snapshot in seen:  # their buffers are not donated
        assert snapshot.flow.w == snapshot.step == -snapshot.val_loss
        np.testing.assert_array_equal(snapshot.train_loss, -np.arange(snapshot.step))


def test_callback_measures_blocks(x64):
    x = data.two_moons(jr.key(0), 64)
    blocks = Chain([Affine(jnp.zeros(2), jnp.ones(2)), Affine(jnp.ones(2))])
    flow = Transformed(StandardNormal((2,)), Invert(blocks))

    def callback(snapshot):
        condition = jax.vmap(lambda x: gf.probe.condition_number(snapshot.flow, x))
        return {
            "norms": gf.probe.block_gradient_norms(snapshot.flow, x),
            "condition": condition(x[:5]),
        }

    result = train.fit(
        jr.key(0), flow, x, steps=5, batch_size=8, eval_every=3, callback=callback,
        progress=False,
    )  # fmt: skip
    assert result.recorded["norms"].shape == (3, 2)
    assert result.recorded["condition"].shape == (3, 5)
    last = gf.probe.block_gradient_norms(result.flow, x)
    np.testing.assert_allclose(result.recorded["norms"][-1], last, rtol=1e-9)


class Poisoned(AbstractBijection):
    """The identity; its parameter counts the steps and then spoils what it should."""

    w: Array
    kind: str = eqx.field(static=True)
    shape: tuple[int, ...] = (2,)
    cond_shape: ClassVar[None] = None

    def transform_and_log_det(self, x, condition=None):
        late = self.w > 2.5
        if self.kind == "output":
            return jnp.where(late, jnp.nan, x + 0 * self.w), self.w
        if self.kind == "gradient":  # finite, with a slope that is not
            root = jnp.sqrt(jnp.abs(self.w - 3) + 0 * x)
            return x + 0 * self.w + jnp.where(late, root, 0.0), self.w
        return x, self.w

    def inverse_and_log_det(self, y, condition=None):
        raise NotImplementedError


@pytest.mark.parametrize("kind", ["output", "gradient"])
@pytest.mark.parametrize("scan", [True, False])
def test_failure_names_the_block(kind, scan):
    """Block 1 of 3 fails when its parameter, which grows by one a step, is at 3."""
    starts = [-50.0, 0.0, 0.0 if kind == "output" else -50.0]
    parts = [Poisoned(jnp.array(w), kind) for w in starts]
    stacked = jax.tree.map(
        lambda *a: jnp.stack(a) if eqx.is_array(a[0]) else a[0], *parts
    )
    inner = Scan(stacked) if scan else Chain(parts)
    flow = Transformed(StandardNormal((2,)), Invert(inner))
    options = {**COUNT, "x": X, "steps": 9, "eval_every": 4}
    with pytest.raises(
        train.NonFiniteError, match=rf"at step 3, first in the {kind} of block 1 of 3"
    ) as caught:
        train.fit(jr.key(0), flow, **options)
    result = caught.value.result
    assert result.failed_step == 3
    assert result.failed_layer == f"the {kind} of block 1 of 3, data side first"
    w = result.flow.bijection.bijection
    w = w.bijection.w[1] if scan else w.bijections[1].w
    assert w == 2
    many = train.fit_many(
        jr.split(jr.key(0), 2), lambda key: flow, throw=False, **options
    )
    assert many.failed_layer == (result.failed_layer,) * 2


def test_a_second_failure_compiles_nothing():
    traces = []

    def lost(flow, batch, key):
        traces.append(batch.shape)
        return jnp.inf * flow.log_prob(batch).mean()

    options = {"steps": 1, "batch_size": 4, "loss": lost, "progress": False}
    for key in range(3):
        result = train.fit(jr.key(key), flow_of(jr.key(key)), X, throw=False, **options)
        assert result.failed_step == 0
        first = len(traces) if key == 0 else first
    assert len(traces) == first


def test_failure_of_what_is_no_flow_names_the_leaf():
    def loss(pair, batch, key):
        return 0 * jnp.sqrt(jnp.abs(pair[1].w - 2)) - pair[0].w - pair[1].w

    pair = (point(), point())
    options = {**COUNT, "optimizer": optax.sgd(1.0)}
    with pytest.raises(
        train.NonFiniteError, match=r"first in the gradient of \[1\]\.w"
    ):
        train.fit(jr.key(0), pair, X, steps=9, loss=loss, **options)
    with pytest.raises(train.NonFiniteError, match="first in the loss itself"):
        train.fit(jr.key(0), point(), X, steps=9, loss=NAN, **COUNT)


ROWS = np.zeros((20, 2), np.float32)
NAN_ROW = ROWS.copy()
NAN_ROW[7, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": ROWS[0]}, r"expected x of shape \(n, 2\), got \(2,\)"),
        ({"x": ROWS[:, :1]}, r"expected x of shape \(n, 2\), got \(20, 1\)"),
        ({"x": ROWS[None]}, r"expected x of shape \(n, 2\), got \(1, 20, 2\)"),
        ({"x": ROWS[:0]}, "at least one row"),
        ({"x": ROWS.astype(int)}, "dtype float32, got int32"),
        ({"x": ROWS.astype(np.float16)}, "dtype float32, got float16"),
        ({"x": NAN_ROW}, r"NaN or inf in 1 of 20 rows, the first in row 7"),
        ({"x_val": ROWS[:, :1]}, r"expected x_val of shape \(n, 2\)"),
        ({"x_val": NAN_ROW}, "expected x_val to be finite"),
        ({"steps": 0}, "expected steps to be an integer >= 1, got 0"),
        ({"eval_every": 0}, "expected eval_every"),
        ({"batch_size": 0}, "expected batch_size to be"),
        ({"batch_size": 21}, r"expected batch_size <= 20 \(rows\), got 21"),
        ({"clip": 0.0}, "expected clip to be finite and > 0"),
        ({"learning_rate": -1.0}, "expected learning_rate"),
        ({"learning_rate": float("nan")}, "expected learning_rate"),
        ({"learning_rate": 0.1, "optimizer": optax.sgd(1.0)}, "got both"),
        ({"schedule": float, "optimizer": optax.sgd(1.0)}, "got both"),
        ({"ema": 1.0}, "expected ema between 0 and 1, got 1.0"),
        ({"patience": 0, "x_val": ROWS}, "expected patience to be"),
        ({"patience": 1}, "expected x_val, whose loss `patience` watches"),
        ({"checkpoint_every": 0}, "expected checkpoint_every to be"),
        ({"devices": []}, "multiple of the number of devices, 0, got 8"),
        ({"devices": jax.devices() * 3}, "number of devices, 3, got 8"),
        ({"flow": point()}, "`log_prob`, or a `loss`, got Point"),
        ({"flow": Point(jnp.array(1)), "loss": down}, "trainable arrays"),
    ],
)
def test_bad_input_is_named(change, message):
    options = {
        "x": ROWS,
        "batch_size": 8,
        "progress": False,
        "flow": flow_of(jr.key(0)),
    }
    options.update(change)
    with pytest.raises(ValueError, match=message):
        train.fit(jr.key(0), **options)


def test_float64_data_for_a_float32_flow_is_an_error(x64):
    x = data.two_moons(jr.key(0), 20)
    with pytest.raises(ValueError, match="dtype float32, got float64"):
        train.fit(jr.key(0), flow_of(jr.key(0), jnp.float32), x, batch_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": np.ones(2)}, r"array of shape \(3,\), got shape \(2,\)"),
        ({"clip": np.ones((3, 1))}, "expected clip to be a number or an array"),
        ({"clip": np.array([1.0, 0.0, 1.0])}, "expected clip to be finite and > 0"),
        ({"learning_rate": np.array([1, np.inf, 1])}, "learning_rate to be finite"),
    ],
)
def test_rates_of_another_form_are_named(change, message):
    keys, options = jr.split(jr.key(0), 3), {"batch_size": 8, "progress": False}
    with pytest.raises(ValueError, match=message):
        train.fit_many(keys, flow_of, ROWS, **options, **change)


def test_fit_many_needs_seeds():
    with pytest.raises(ValueError, match="at least one key"):
        train.fit_many(jr.split(jr.key(0), 3)[:0], flow_of, ROWS, batch_size=8)


PARALLEL = """
import sys
import jax
if len(sys.argv) > 2:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address, process = f"127.0.0.1:{sys.argv[2]}", int(sys.argv[3])
    jax.distributed.initialize(address, 2, process)
import equinox as eqx, jax.numpy as jnp, jax.random as jr, numpy as np
import gauss_flows as gf
from gauss_flows import _run

assert jax.device_count() == (8 if len(sys.argv) == 2 else 2)
x = gf.data.two_moons(jr.key(0), 200)
programs, hashes = [], _run._hashes
_run._hashes = lambda **told: programs.append(told["program"]) or hashes(**told)

def loss(layer, batch, key):
    hidden = jnp.tanh(batch @ layer.weight[:, :2].T + layer.bias)
    return ((hidden @ layer.weight[:, 2:] - batch) ** 2).mean()

def build(key):
    return eqx.nn.Linear(4, 8, key=key)

options = dict(
    steps=60, batch_size=64, eval_every=20, x_val=x[:70], ema=0.9, patience=2,
    loss=loss, progress=False, learning_rate=0.05,
)
def fit(**more):
    return gf.fit(jr.key(2), build(jr.key(1)), x, **options, **more)

def fit_many(**more):
    return gf.fit_many(jr.split(jr.key(1), 3), build, x, **options, **more)

class Killed(Exception):
    pass

def killer(snapshot):
    if snapshot.step == 40:
        raise Killed

for train in (fit, fit_many) if len(sys.argv) == 2 else (fit,):
    one = train()
    file = f"{sys.argv[1]}/{train.__name__}"
    several = train(devices=jax.devices(), checkpoint=file)
    assert '{"batch"}, {}]' in programs[-1]
    for name in ("train_loss", "gradient_norm", "val_loss"):
        np.testing.assert_allclose(
            getattr(several, name), getattr(one, name), rtol=1e-11
        )
    assert several.best_step == one.best_step
    again = train(devices=jax.devices(), checkpoint=file)
    for flow, tolerance in ((one.flow, 1e-11), (again.flow, 0)):
        np.testing.assert_allclose(several.flow.weight, flow.weight, rtol=tolerance)
    assert several.flow.weight.devices() == one.flow.weight.devices()
    often = dict(devices=jax.devices(), checkpoint=file + "-killed", checkpoint_every=1)
    try:
        train(callback=killer, **often)
    except Killed:
        assert gf.checkpoint.read_meta(file + "-killed")["position"] == 40
    resumed = train(**often)
    np.testing.assert_array_equal(resumed.train_loss, several.train_loss)
    np.testing.assert_array_equal(resumed.flow.weight, several.flow.weight)
"""


def start(*args, **env):
    env = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"} | env
    command = [sys.executable, "-W", "error", "-c", PARALLEL, *map(str, args)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def test_eight_devices_do_what_one_does(tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    process = start(tmp_path, XLA_FLAGS=flags)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 0


def test_two_processes_do_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [start(tmp_path, port, process) for process in range(2)]
    try:
        errors = [process.communicate(timeout=120)[1] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], errors
    assert sorted(os.listdir(tmp_path)) == ["fit", "fit-killed"]


def test_the_loss_gets_a_fresh_key_each_step_and_a_fixed_one_on_held_out_rows():
    def noise(point, batch, key):
        return 0 * point.w + jr.normal(key)

    options = {**COUNT, "loss": noise, "x_val": X, "eval_every": 4, "steps": 12}
    result = train.fit(jr.key(0), point(), X, **options)
    assert len(set(result.train_loss.tolist())) == 12
    np.testing.assert_array_equal(result.val_loss, [jr.normal(jr.key(0))] * 4)
    again = train.fit(jr.key(0), point(), X, **options)
    np.testing.assert_array_equal(result.train_loss, again.train_loss)
    other = train.fit(jr.key(1), point(), X, **options)
    assert not set(result.train_loss.tolist()) & set(other.train_loss.tolist())
