"""Training from a memory-mapped file: the same bits as from memory, and less of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import gauss_flows as gf
from gauss_flows import _check

ROWS = np.asarray(gf.data.two_moons(jr.key(0), 200))


def loss(layer, batch, key):
    return ((jax.vmap(layer)(batch) - batch) ** 2).mean()


OPTIONS = {
    "steps": 50, "batch_size": 16, "eval_every": 20, "progress": False, "loss": loss,
}  # fmt: skip


def build(key=None):
    return eqx.nn.Linear(2, 2, key=jr.key(1) if key is None else key)


def on_disk(folder, rows=ROWS):
    np.save(folder / "rows.npy", rows)
    return np.load(folder / "rows.npy", mmap_mode="r")


def same_bits(one, other):
    assert one.train_loss.tobytes() == other.train_loss.tobytes()
    assert one.val_loss.tobytes() == other.val_loss.tobytes()
    assert gf.checkpoint.fingerprint(one.flow) == gf.checkpoint.fingerprint(other.flow)


def test_the_same_bits_as_from_memory(tmp_path):
    x_val = on_disk(tmp_path, ROWS[:30])
    memory = gf.fit(jr.key(2), build(), ROWS, x_val=ROWS[:30], **OPTIONS)
    disk = gf.fit(jr.key(2), build(), on_disk(tmp_path), x_val=x_val, **OPTIONS)
    same_bits(memory, disk)


def test_the_file_is_never_loaded_whole(tmp_path, monkeypatch):
    seen, asarray = [], jnp.asarray

    def watched(x, *rest, **more):
        seen.append(np.shape(x))
        return asarray(x, *rest, **more)

    monkeypatch.setattr(_check, "ROWS_READ", 64)
    monkeypatch.setattr(jnp, "asarray", watched)
    gf.fit(jr.key(2), build(), on_disk(tmp_path), **OPTIONS)
    assert (20, 16, 2) in seen  # the batches of one interval
    assert ROWS.shape not in seen


def test_a_run_killed_while_it_reads_resumes(tmp_path):
    def stop(seen):
        if seen.step == 40:
            raise KeyboardInterrupt

    file = on_disk(tmp_path)
    options = OPTIONS | {"checkpoint": tmp_path / "run.npz", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        gf.fit(jr.key(2), build(), file, callback=stop, **options)
    assert gf.checkpoint.read_meta(tmp_path / "run.npz")["position"] == 40
    resumed = gf.fit(jr.key(2), build(), file, **options)
    same_bits(resumed, gf.fit(jr.key(2), build(), ROWS, **OPTIONS))


def test_devices_share_what_is_read(tmp_path):
    one = gf.fit(jr.key(2), build(), on_disk(tmp_path), **OPTIONS)
    mesh = gf.fit(
        jr.key(2), build(), on_disk(tmp_path), devices=jax.devices(), **OPTIONS
    )
    np.testing.assert_allclose(mesh.train_loss, one.train_loss, rtol=1e-5)


def test_many_seeds_load_it(tmp_path):
    keys = jr.split(jr.key(3), 2)
    memory = gf.fit_many(keys, build, ROWS, **OPTIONS)
    same_bits(memory, gf.fit_many(keys, build, on_disk(tmp_path), **OPTIONS))


def test_a_bad_row_is_named_wherever_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(_check, "ROWS_READ", 64)
    bad = ROWS.copy()
    bad[130, 1] = np.nan
    with pytest.raises(ValueError, match=r"NaN or inf in 1 of 200 rows, .* row 130"):
        gf.fit(jr.key(2), build(), on_disk(tmp_path, bad), **OPTIONS)


def test_another_dtype_is_an_error_and_not_cast(tmp_path):
    file = on_disk(tmp_path, ROWS.astype(np.float64))
    with pytest.raises(ValueError, match="dtype float32, got float64"):
        gf.fit(jr.key(2), build(), file, **OPTIONS)


def test_a_failure_is_at_the_same_step_and_in_the_same_leaf(tmp_path):
    def fails(layer, batch, key):
        # finite until a batch holds the row that lies furthest out
        far = jnp.where(jnp.abs(batch).max() > 0.999 * np.abs(ROWS).max(), jnp.nan, 1)
        return loss(layer, batch, key) * far

    options = OPTIONS | {"throw": False, "loss": fails}
    memory = gf.fit(jr.key(2), build(), ROWS, **options)
    disk = gf.fit(jr.key(2), build(), on_disk(tmp_path), **options)
    assert memory.failed_step not in (None, 0)
    assert disk.failed_step == memory.failed_step
    assert disk.failed_layer == memory.failed_layer
    assert eqx.tree_equal(disk.final_flow, memory.final_flow)
