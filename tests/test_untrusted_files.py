"""A file from anyone: refused by its claims, before it costs memory or runs code."""

import functools
import io
import json
import os
import struct
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzzing import examples, outcome
from hypothesis import given, strategies as st
from test_checkpoint import assert_same_bits, train

import gauss_flows as gf
from gauss_flows import checkpoint

TREE = {"w": jnp.arange(3.0), "n": np.arange(4, dtype=np.int8)}
SMALL = 2**20


@pytest.fixture
def whole(tmp_path):
    checkpoint.save(tmp_path / "whole", TREE, meta={"step": 3})
    return tmp_path / "whole"


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, parts, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items() if isinstance(parts, dict) else parts:
            archive.writestr(name, data)
    return path


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def refused(path, message, like=TREE):
    """The error names the file, and little memory was ever taken."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            checkpoint.load(path, like)
        assert str(path) in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < SMALL
    finally:
        tracemalloc.stop()


class Bomb:
    """What would leave a trace if a pickle of it were ever loaded."""

    def __reduce__(self):
        return os.mkdir, ("pickled",)


def test_an_array_of_objects_is_never_unpickled(whole, monkeypatch):
    monkeypatch.chdir(whole.parent)
    objects = npy(np.array([Bomb()] * 3, object), allow_pickle=True)
    for name in ("leaf0.npy", "leaf1.npy", "header.npy"):
        write(whole.parent / "bad", members(whole) | {name: objects})
        refused(whole.parent / "bad", "got object")
        with pytest.raises(ValueError, match="expected"):
            gf.checkpoint.load(whole.parent / "bad", {"w": np.array([None] * 3)})
    assert not (whole.parent / "pickled").exists()


def test_objects_are_not_saved_either(tmp_path):
    with pytest.raises(ValueError, match="numbers or texts, got one of objects"):
        checkpoint.save(tmp_path / "f", {"w": np.array([None, 1])})
    assert not os.listdir(tmp_path)
    with pytest.raises(ValueError, match="got one of objects"):
        train(checkpoint=tmp_path / "f", callback=lambda s: {"o": np.array(None)})


@pytest.mark.parametrize("name", ["leaf0.npy", "header.npy"])
def test_a_compressed_bomb_is_not_inflated(whole, name):
    bomb = npy(np.zeros(2**27, np.uint8))
    bad = write(
        whole.parent / "bad", members(whole) | {name: bomb}, zipfile.ZIP_DEFLATED
    )
    assert bad.stat().st_size < SMALL
    refused(bad, "no compressed parts")
    with pytest.raises(ValueError, match="no compressed parts"):
        checkpoint.read_meta(bad)


def header_of(shape, dtype="<f4"):
    file = io.BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (header_of((2**40,)), r"expected float32\[3\] in leaf1, got float32\[10995"),
        (header_of((2**40, 2**40)), "expected float32"),
        (header_of((3,)), "another size than it says"),
        (header_of((3,)) + bytes(13), "another size than it says"),
        (npy(np.zeros(4, np.float32)), r"got float32\[4\]"),
        (npy(np.zeros((3, 1), np.float32)), r"got float32\[3, 1\]"),
        (npy(np.zeros(3)), r"got float64\[3\]"),
        (npy(np.zeros(3, np.int32)), r"got int32\[3\]"),
        (npy(np.zeros(3, ">f4")), "got >f4"),
        (npy(np.zeros(3, "V4")), r"got \|V4"),
        (b"", "truncated or damaged"),
        (b"\x93NUMPY\x01\x00\xff\xff", "truncated or damaged"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(whole, part, message):
    bad = write(whole.parent / "bad", members(whole) | {"leaf1.npy": part})
    refused(bad, message)


def test_sizes_that_the_directory_claims_are_those_of_the_file(whole):
    """The zip's directory says 4 GB where there are some bytes."""
    raw, entry = bytearray(whole.read_bytes()), b"PK\x01\x02"
    place = raw.index(entry)
    for field in ((20,), (24,), (20, 24)):  # compressed size, true size, both
        bad = bytearray(raw)
        for start in field:
            bad[place + start : place + start + 4] = struct.pack("<I", 2**32 - 2)
        path = whole.parent / "bad"
        path.write_bytes(bad)
        refused(path, "compressed parts|parts claim")


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: [*parts.items(), ("leaf2.npy", npy(np.zeros(3)))],
        lambda parts: [("../leaf0.npy", parts.pop("leaf0.npy")), *parts.items()],
        lambda parts: [("/tmp/leaf0.npy", parts.pop("leaf0.npy")), *parts.items()],
        lambda parts: [("leaf0.npy", parts["leaf0.npy"]), *parts.items()],
        lambda parts: [*parts.items(), ("header.npy", parts["header.npy"])],
        lambda parts: list(parts.items())[::-1],
        lambda parts: list(parts.items())[:-1],
        lambda parts: [],
    ],
    ids=[
        "more", "path up", "path from root", "leaf twice", "header twice", "order",
        "no header", "nothing",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_other_parts_than_those_written_are_refused(whole, change):
    bad = write(whole.parent / "bad", change(members(whole)))
    refused(bad, "foreign")


def with_header(whole, text):
    header = npy(np.frombuffer(text.encode(), np.uint8))
    return write(whole.parent / "bad", members(whole) | {"header.npy": header})


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "null", "{", "[" * 100_000, "1" * 5000, '{"format": "gauss_flows"}']
    + [
        json.dumps({"format": "gauss_flows", "version": 1, "meta": {}} | more)
        for more in ({}, {"leaves": []}, {"meta": 1, "leaves": {}}, {"leaves": {}})
    ],
    ids=lambda text: text[:60],
)
def test_a_header_of_another_form_is_refused(whole, text):
    bad = with_header(whole, text)
    with pytest.raises(ValueError, match=r"expected .*bad|bad holds another"):
        checkpoint.load(bad, TREE)


def test_fewer_arrays_than_the_header_says_are_refused(whole):
    parts = members(whole)
    del parts["leaf1.npy"]
    refused(write(whole.parent / "bad", parts), "expected 2 arrays")


def test_arrays_by_columns_and_named_fields_come_back(tmp_path):
    named = np.array([(1, 2.5)], [("a", "<i4"), ("b", "<f8")])
    tree = {"columns": np.arange(6.0).reshape(2, 3).T, "named": named, "text": "é" * 3}
    tree["text"] = np.array(["a", "bcé"])
    checkpoint.save(tmp_path / "f", tree)
    again = checkpoint.load(tmp_path / "f", jax.tree.map(np.zeros_like, tree))
    assert_same_bits(again, tree)
    again["columns"][0] = 7  # and can be written to


@given(data=st.data())
@examples(40, 2000)
def test_bytes_that_were_changed_are_refused_or_do_not_matter(whole, data):
    raw = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw) - 1))
        part = data.draw(st.binary(max_size=8))
        raw[start : start + data.draw(st.integers(0, 8))] = part
    path = whole.parent / "bad"
    path.write_bytes(raw)
    again = outcome("changed files", lambda: checkpoint.load(path, TREE), ValueError)
    if again is not None:
        assert_same_bits(again, TREE)


@functools.cache
def finished():
    """The bytes of a checkpoint after a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        train(checkpoint=f"{folder}/run")
        return Path(folder, "run").read_bytes()


def changed_meta(path, **changes):
    """A checkpoint of ``fit`` whose header was changed by hand."""
    parts = members(path)
    header = json.loads(np.load(io.BytesIO(parts["header.npy"])).tobytes())
    header["meta"] |= changes
    parts["header.npy"] = npy(np.frombuffer(json.dumps(header).encode(), np.uint8))
    write(path, parts)


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "many"},
        {"position": -1},
        {"position": 10**9},
        {"position": None},
        {"settings": 3},
        {"log": None},
        {"log": {}},
        {"log": {"steps": [[2, 10**12], "<f4"]}},
        {"log": {"steps": [[10**12] * 3, "<f8"]}},
        {"log": {"steps": [[2, 71], "no dtype"]}},
        {"log": {"steps": [[2, 71], "<f4"], "val_steps": [[10**12], "<i8"]}},
        {"log": {"steps": 5}},
    ],
    ids=str,
)
def test_a_checkpoint_of_fit_that_claims_nonsense_is_refused(tmp_path, changes):
    file = tmp_path / "run"
    file.write_bytes(finished())
    changed_meta(file, **changes)
    with pytest.raises(ValueError, match=r"expected a checkpoint|another architecture"):
        train(checkpoint=file)
