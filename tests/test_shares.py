"""Seeds dealt out to the cores of a CPU: the same results, one compilation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

import gauss_flows as gf
from gauss_flows import _loop, _shares
from gauss_flows.train import FitResult

ROWS = gf.data.two_moons(jr.key(0), 128)
OPTIONS = {"steps": 12, "batch_size": 16, "eval_every": 5, "progress": False}


def build(key):
    return gf.coupling_flow(
        key, dim=2, depth=2, coupling="affine", nn_width=5, nn_depth=1
    )


def plan(**changes):
    made = _loop.Plan(
        loss=lambda flow, x, key: x.sum(), optimizer=optax.sgd,
        schedule=lambda count: 1.0, batch_size=2, interval=1, many=True,
    )  # fmt: skip
    return made._replace(**changes)


def in_shares(monkeypatch, n, keys, **more) -> FitResult:
    monkeypatch.setattr(_shares, "_n_shares", lambda plan, seeds: n)
    return gf.fit_many(keys, build, ROWS, **OPTIONS, **more)


def test_shares_change_nothing(monkeypatch):
    keys = jr.split(jr.key(3), 4)
    more = {"x_val": ROWS[:32], "learning_rate": np.array([1e-3, 1e-2, 1e-2, 3e-2])}
    whole, parts = (in_shares(monkeypatch, n, keys, **more) for n in (1, 2))
    np.testing.assert_allclose(parts.train_loss, whole.train_loss, rtol=1e-5)
    np.testing.assert_allclose(parts.val_loss, whole.val_loss, rtol=1e-5)
    np.testing.assert_array_equal(parts.val_steps, whole.val_steps)
    assert parts.best_step == whole.best_step
    for mine, theirs in zip(
        jax.tree.leaves(eqx.filter(parts.flow, eqx.is_inexact_array)),
        jax.tree.leaves(eqx.filter(whole.flow, eqx.is_inexact_array)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_keys_of_another_kind_keep_it(monkeypatch):
    # what "rbg" draws depends on how many draw together, so that only kinds are equal
    keys = jr.split(jr.key(3, impl="rbg"), 4)
    losses = in_shares(monkeypatch, 2, keys).train_loss
    assert np.isfinite(losses).all()
    assert len(set(losses[:, 0])) == 4


def test_all_shares_run_one_program(monkeypatch):
    traces = []

    def loss(flow, batch, key):
        traces.append(batch.shape)
        return -flow.log_prob(batch).mean()

    keys = jr.split(jr.key(4), 6)
    in_shares(monkeypatch, 3, keys[:3], loss=loss)
    first = len(traces)
    in_shares(monkeypatch, 6, keys, loss=loss)
    assert len(traces) == first


def test_settings_of_this_thread_hold_in_every_share(monkeypatch, x64):
    rows = np.asarray(ROWS, float)
    monkeypatch.setattr(_shares, "_n_shares", lambda plan, seeds: 2)
    result = gf.fit_many(jr.split(jr.key(0), 2), build, rows, **OPTIONS)
    assert result.train_loss.dtype == np.float64
    leaves = jax.tree.leaves(eqx.filter(result.flow, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float64")}


def test_an_error_in_a_share_is_raised(monkeypatch):
    def loss(flow, batch, key):
        return eqx.error_if(-flow.log_prob(batch).mean(), batch.sum() < 1e9, "no")

    with pytest.raises(RuntimeError, match="no"):
        in_shares(monkeypatch, 2, jr.split(jr.key(0), 2), loss=loss)


@pytest.mark.parametrize(
    ("seeds", "cores", "expected"),
    [(32, 2, 4), (3, 2, 3), (5, 2, 1), (6, 4, 6), (24, 8, 12), (1, 8, 1)],
)
def test_shares_are_equal_and_some_to_each_core(monkeypatch, seeds, cores, expected):
    monkeypatch.setattr(_shares, "_n_cores", lambda: cores)
    assert _shares._n_shares(plan(), seeds) == expected


def test_one_flow_and_several_devices_have_no_shares():
    assert _shares._n_shares(plan(many=False), 1) == 1
    mesh = Mesh(np.asarray(jax.devices()), ("batch",), axis_types=(AxisType.Auto,))
    assert _shares._n_shares(plan(mesh=mesh), 4) == 1


def test_keys_are_handled_by_their_data_and_the_rest_stays():
    key = jr.key(5)
    twice = _shares.on_data(lambda a, b: jnp.stack([a, b]), key, jr.key(6))
    assert twice.dtype == key.dtype
    assert twice.shape == (2,)
    assert _shares.on_data(np.negative, "name") == "name"
