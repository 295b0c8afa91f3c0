"""Files that are whole or refused, and runs that resume in the same bits."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import Array

import gauss_flows as gf
from gauss_flows import checkpoint

LIKE = {"w": jnp.zeros(3), "n": jnp.array(0), "key": jr.key(0)}
TREE = {"w": jnp.arange(3.0), "n": jnp.array(7), "key": jr.key(5)}


def raw(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jr.key_data(leaf) if is_key else leaf)


def assert_same_bits(a, b):
    a, b = eqx.filter(a, eqx.is_array_like), eqx.filter(b, eqx.is_array_like)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if eqx.is_array(one):
            assert one.dtype == other.dtype
            one, other = raw(one), raw(other)
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def file(tmp_path):
    checkpoint.save(tmp_path / "tree.npz", TREE, meta={"step": 3})
    return tmp_path / "tree.npz"


def test_every_kind_of_leaf_comes_back(tmp_path, x64):
    tree = {
        "half": jnp.array([1.5, -2], jnp.bfloat16),
        "double": jnp.array([0.1, jnp.nan, -0.0]),
        "complex": jnp.array(1 + 2j),
        "none": (None, jnp.zeros((0, 3)), True),
        "bool": [jnp.array([True, False]), np.arange(4, dtype=np.int8)],
        "keys": (jr.split(jr.key(3), 4), jr.key(3, impl="rbg"), jr.PRNGKey(3)),
        "function": jnp.tanh,
    }
    like = jax.tree.map(
        lambda a: a ^ a if a.dtype == bool else a * 0,
        {name: tree[name] for name in ("half", "double", "complex", "bool")},
    )
    like |= {"none": (None, jnp.ones((0, 3)), True), "function": jnp.tanh}
    like["keys"] = (jr.split(jr.key(0), 4), jr.key(0, impl="rbg"), jr.PRNGKey(0))
    checkpoint.save(tmp_path / "all", tree)
    again = checkpoint.load(tmp_path / "all", like)
    assert_same_bits(again, tree)
    assert isinstance(again["bool"][1], np.ndarray)
    assert jr.bits(again["keys"][1]) == jr.bits(tree["keys"][1])
    assert os.listdir(tmp_path) == ["all"]


def test_a_flow_comes_back_and_its_meta(tmp_path):
    build = eqx.Partial(gf.coupling_flow, dim=2, depth=3)
    flow, like = build(jr.key(0)), build(jr.key(1))
    checkpoint.save(tmp_path / "flow.npz", flow, meta={"trained": [1, "day"]})
    assert_same_bits(checkpoint.load(tmp_path / "flow.npz", like), flow)
    assert checkpoint.read_meta(tmp_path / "flow.npz") == {"trained": [1, "day"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 4}, r"expected float32\[4, 2, 2\] at .*params, got float32\[3, 2"),
        ({"interval": 3.0}, r"expected 3.0 at .*\.interval, got 4.0"),
        ({"actnorm": True}, r"bijections\[0\], got HouseholderRotation"),
        ({"dtype": jnp.float16}, r"expected float16.* at .*, got float32"),
        ({"n_reflections": 0}, "holds another architecture"),
    ],
)
def test_another_architecture_is_refused_by_name(tmp_path, options, message):
    options = {"dim": 2, "depth": 3} | options
    like = gf.coupling_flow(jr.key(0), **options)
    checkpoint.save(tmp_path / "f", gf.coupling_flow(jr.key(0), dim=2, depth=3))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "f", like)


def test_a_leaf_too_many_or_too_few_is_refused(file):
    for like in (LIKE | {"more": jnp.zeros(1)}, {"w": LIKE["w"]}):
        with pytest.raises(ValueError, match="another architecture"):
            checkpoint.load(file, like)


def test_truncated_files_are_refused(file):
    whole = file.read_bytes()
    for size in range(0, len(whole), 13):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"truncated or damaged"):
            checkpoint.load(file, LIKE)


def test_a_flipped_byte_never_changes_what_is_read(file):
    whole, refused = bytearray(file.read_bytes()), 0
    for i in range(0, len(whole), 3):
        whole[i] ^= 0x55
        file.write_bytes(whole)
        whole[i] ^= 0x55
        try:
            assert_same_bits(checkpoint.load(file, LIKE), TREE)
        except ValueError:
            refused += 1
    assert refused > len(whole) / 6


def test_foreign_files_and_other_versions_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "f"
    file.write_text("not ours")
    with pytest.raises(ValueError, match="foreign"):
        checkpoint.load(file, LIKE)
    np.savez(tmp_path / "f.npz", w=np.zeros(3))
    with pytest.raises(ValueError, match="foreign"):
        checkpoint.load(tmp_path / "f.npz", LIKE)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none", LIKE)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 2)
        checkpoint.save(file, TREE)
    with pytest.raises(ValueError, match="expected version 1 of the format, got 2"):
        checkpoint.load(file, LIKE)


def test_a_full_disk_leaves_the_old_file(file):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
        with pytest.raises(
            OSError, match=r"could not write .*tree.npz \(File too large"
        ):
            checkpoint.save(file, {"w": jnp.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same_bits(checkpoint.load(file, LIKE), TREE)
    assert os.listdir(file.parent) == [file.name]


def test_a_folder_that_cannot_be_written_is_named(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"could not write .*nowhere"):
        checkpoint.save(tmp_path / "nowhere" / "f", TREE)
    with pytest.raises(NotADirectoryError, match="could not write"):
        checkpoint.save(file / "f", TREE)
    with pytest.raises(IsADirectoryError, match="could not write"):
        checkpoint.save(tmp_path, TREE)


def test_an_interrupted_write_leaves_the_old_file(file, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(file, LIKE)
    assert_same_bits(checkpoint.load(file, LIKE), TREE)
    # what a killed process leaves behind goes with the next write
    (file.parent / f".{file.name}.999999.partial").write_bytes(b"PK")
    checkpoint.save(file, TREE)
    assert os.listdir(file.parent) == [file.name]


class Line(eqx.Module):
    """Two numbers to fit; compiles in no time."""

    slope: Array
    shift: Array


def build(key):
    return Line(*jr.normal(key, (2,)))


def squares(line, batch, key):
    return ((line.slope * batch[:, 0] + line.shift - batch[:, 1]) ** 2).mean()


X = jr.normal(jr.key(8), (64, 2))
OPTIONS = {
    "steps": 70, "batch_size": 16, "eval_every": 10, "x_val": X[:9] + 0.1, "ema": 0.9,
    "loss": squares, "progress": False, "learning_rate": 0.1,
}  # fmt: skip


def look(snapshot):
    return {"slope": snapshot.flow.slope, "steps": len(snapshot.train_loss.T)}


def train(many=False, **options):
    options = {"callback": look} | OPTIONS | options
    if many:
        return gf.fit_many(jr.split(jr.key(1), 3), build, X, **options)
    return gf.fit(jr.key(1), build(jr.key(2)), X, **options)


def assert_same_result(a, b):
    a, b = (vars(result) for result in (a, b))
    for name in a.keys() - {"compile_seconds", "run_seconds"}:
        assert_same_bits(a[name], b[name])
        if isinstance(a[name], tuple | int | str | None):
            assert a[name] == b[name]


class Stop(Exception):
    """Ends a training run from inside."""


def stop_at(step):
    def callback(snapshot):
        if snapshot.step == step:
            raise Stop
        return look(snapshot)

    return callback


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("options", [{}, {"patience": 2}], ids=["all", "patience"])
def test_a_run_resumes_in_the_same_bits(tmp_path, many, options):
    plain = train(many, **options)
    options = options | {"checkpoint": tmp_path / "run.npz"}
    every = {"checkpoint_every": 15}
    for step in (0, 20, 50):
        if many or not (plain.stopped_step and step > plain.stopped_step):
            with pytest.raises(Stop):
                train(many, callback=stop_at(step), **every, **options)
    seen = []
    resumed = train(many, callback=lambda s: seen.append(s.step) or look(s), **options)
    assert seen[0] > 0  # it did not start again
    assert_same_result(resumed, plain)
    # a finished run is only read
    assert_same_result(train(many, callback=stop_at(70), **options), plain)


def test_checkpoints_come_as_often_as_asked(tmp_path, monkeypatch):
    written = []
    save = checkpoint.save

    def spy(path, tree, *, meta):
        written.append(meta["position"])
        save(path, tree, meta=meta)

    monkeypatch.setattr(checkpoint, "save", spy)
    train(checkpoint=tmp_path / "a", checkpoint_every=25)
    # at the start, to see that it can; at reports; after the last
    assert written == [0, 30, 60, 71]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": 80}, "steps = 70"),
        ({"batch_size": 8}, "batch_size = 16"),
        ({"eval_every": 11}, "eval_every = 10"),
        ({"ema": 0.8}, "ema = 0.9"),
        ({"patience": 3}, "patience = None"),
        ({"clip": None}, "clip = 1.0"),
        ({"learning_rate": 0.2}, "learning_rate = 0.1"),
        ({"x_val": X[:9]}, "x_val = "),
        ({"loss": lambda *seen: squares(*seen) * 2}, "program = "),
        ({"schedule": optax.constant_schedule(0.5)}, "program = "),
    ],
)
def test_another_setting_is_refused_by_name(tmp_path, change, name):
    train(checkpoint=tmp_path / "run", steps=70)
    before = (tmp_path / "run").read_bytes()
    with pytest.raises(ValueError, match=f"expected {name}"):
        train(checkpoint=tmp_path / "run", **change)
    assert (tmp_path / "run").read_bytes() == before


def test_other_data_keys_and_flows_are_refused(tmp_path):
    options = {**OPTIONS, "checkpoint": tmp_path / "run"}
    key, line = jr.key(1), build(jr.key(2))
    gf.fit(key, line, X, **options)
    for args, name in [
        ((key, line, X + 1), "x"),
        ((jr.key(2), line, X), "start"),
        ((key, build(jr.key(3)), X), "start"),
    ]:
        with pytest.raises(ValueError, match=f"expected {name} = "):
            gf.fit(*args, **options)


def test_what_is_no_checkpoint_is_never_trained_over(tmp_path):
    file = tmp_path / "run"
    checkpoint.save(file, TREE)
    with pytest.raises(ValueError, match="expected a checkpoint of `fit`"):
        train(checkpoint=file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated or damaged"):
        train(checkpoint=file)
    with pytest.raises(FileNotFoundError, match="could not write"):
        train(checkpoint=tmp_path / "nowhere" / "run", callback=stop_at(0))


def test_other_names_from_the_callback_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"callback to return the same names .*slope"):
        train(callback=lambda s: look(s) if s.step < 30 else None)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_checkpoint import train, look
from gauss_flows import checkpoint

writes, fsync = [], os.fsync
def dying(file):
    writes.append(file)
    if len(writes) == {write}:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = dying
def callback(snapshot):
    if snapshot.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return look(snapshot)
train(callback=callback, checkpoint={file!r}, checkpoint_every=10)
"""


def test_kill_9_in_a_step_and_in_a_write(tmp_path):
    file = tmp_path / "run.npz"
    for write, step in ((3, -1), (-1, 40)):
        code = KILLED.format(
            tests=str(Path(__file__).parent), file=str(file), write=write, step=step
        )
        done = subprocess.run([sys.executable, "-c", code], timeout=120)
        assert done.returncode == -signal.SIGKILL
    assert checkpoint.read_meta(file)["position"] == 40
    plain = train()
    assert_same_result(train(checkpoint=file), plain)
    assert os.listdir(tmp_path) == [file.name]
