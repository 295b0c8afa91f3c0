"""Pytrees in files: written whole or not at all, and read only where they fit.

A file is an ``.npz`` archive of plain arrays, one a leaf, and a header; it holds no
code, and every byte of an array is under a checksum. What is no array (sizes, masks of
Python numbers, activation functions) is not restored from the file: it is taken from
``like``, and the header holds its description, so that a file made with other ones is
refused.

A file may come from anyone. Nothing in it is compressed or pickled, and what its parts
claim to hold is compared with the file's own size, and with ``like``, before a byte of
them is read: a file can make a reader use no more memory than the two together.
"""

import glob
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

VERSION = 1
"""Version of the format that this package writes and reads."""

_FORMAT = "gauss_flows"


def save(
    path: str | os.PathLike, tree: PyTree, *, meta: dict[str, Any] | None = None
) -> None:
    """Write a flow, or any pytree, to a file, which it replaces in one go.

    The file is first written beside its place, under another name, and flushed to the
    disk. Whenever the program dies, ``path`` holds the old file or the new one.

    Args:
        path: Where to; the folder must exist.
        tree: A pytree; its arrays are stored, typed random keys among them.
        meta: What JSON can hold, to come back from ``read_meta``.

    Raises:
        OSError: The file could not be written: a full disk, a folder that is not there
            or not writable. What was at ``path`` is untouched.
        ValueError: An array holds Python objects.

    Example:
        >>> import tempfile
        >>> file = f"{tempfile.mkdtemp()}/weights.npz"
        >>> save(file, {"w": jnp.arange(3.0)})
        >>> load(file, {"w": jnp.zeros(3)})
        {'w': Array([0., 1., 2.], dtype=float32)}
    """
    path = Path(path)
    header = {"format": _FORMAT, "version": VERSION, "meta": meta or {}}
    header["leaves"] = _describe(tree)
    leaves = [_to_numpy(leaf) for leaf in jax.tree.leaves(tree) if _is_array(leaf)]
    if any(leaf.dtype.hasobject for leaf in leaves):
        raise ValueError("expected arrays of numbers or texts, got one of objects")
    arrays = {f"leaf{i}": leaf for i, leaf in enumerate(leaves)}
    arrays["header"] = np.frombuffer(
        json.dumps(header, default=float).encode(), np.uint8
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            left.unlink(missing_ok=True)  # by a process that was killed
        with open(partial, "wb") as file:
            _write(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write {path} ({error.strerror}); what was there is untouched",
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _write(file, arrays):
    """What ``np.savez`` writes; but before NumPy 2.1 that one left its archive open."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def load(path: str | os.PathLike, like: PyTree) -> PyTree:
    """Read what ``save`` wrote.

    Args:
        path: The file.
        like: A pytree of the same architecture, as built by the same call with any key.

    Returns:
        ``like`` with its arrays replaced by those in the file, bit by bit the saved
        ones, on the default device.

    Raises:
        ValueError: The file is foreign, truncated, damaged, of another version, or of
            another architecture; the first leaf that differs is named.
        OSError: The file cannot be read.
    """
    _check_architecture(path, _describe(like), _header(path)["leaves"])
    leaves, structure = jax.tree.flatten(like)
    places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    with _opened(path) as archive:
        if len(archive.namelist()) != len(places) + 1:
            raise ValueError(f"expected {len(places)} arrays")
        for n, i in enumerate(places):
            raw = _to_numpy(leaves[i])
            leaves[i] = _restore(
                _array(archive, f"leaf{n}", raw.dtype, raw.shape), leaves[i]
            )
    return jax.tree.unflatten(structure, leaves)


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """The ``meta`` that was given to ``save``.

    Only the header is read: damage to arrays is left for ``load`` to find.

    Raises:
        ValueError: The file is foreign, truncated, of another version, or its header
            is damaged.
        OSError: The file cannot be read.
    """
    return _header(path)["meta"]


def fingerprint(tree: PyTree) -> str:
    """A hash of all arrays of a pytree: of their values, shapes, dtypes and order."""
    digest = hashlib.sha256()
    for leaf in filter(_is_array, jax.tree.leaves(tree)):
        digest.update(_label(leaf).encode())
        # no copy: what is hashed may be a memory-mapped file larger than the memory
        flat = np.ascontiguousarray(_to_numpy(leaf)).reshape(-1)
        digest.update(flat.view(np.uint8).data)
    return digest.hexdigest()[:16]


def _is_array(leaf):
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(leaf):
    return np.asarray(jr.key_data(leaf) if _is_key(leaf) else leaf)


def _restore(array, like):
    if not isinstance(like, jax.Array):
        return array.view(like.dtype).copy()
    if _is_key(like):
        return jr.wrap_key_data(jnp.asarray(array), impl=jr.key_impl(like))
    # NumPy's files know no bfloat16: it comes back as bytes, to be named again
    return jnp.asarray(array.view(like.dtype))


def _label(leaf):
    """Describe a leaf in the same words in every process."""
    if _is_array(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}"
    text = getattr(leaf, "__qualname__", None) or repr(leaf)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _describe(node, path=""):
    """What each leaf and each static field of a pytree is, by its path."""
    if isinstance(node, eqx.Module):
        parts = {f".{f.name}": getattr(node, f.name, None) for f in fields(node)}
    elif isinstance(node, dict):
        parts = {f"[{name!r}]": part for name, part in node.items()}
    elif isinstance(node, list | tuple):
        parts = {f"[{i}]": part for i, part in enumerate(node)}
    elif not jax.tree_util.all_leaves([node]):
        leaves = jax.tree_util.tree_leaves_with_path(node)
        parts = {jax.tree_util.keystr(place): leaf for place, leaf in leaves}
    else:
        return {path: _label(node)}
    found = {path: type(node).__name__}
    for name, part in parts.items():
        found |= _describe(part, path + name)
    return found


def _check_architecture(path, expected, got):
    for name in [*expected, *got]:
        if (ours := expected.get(name)) != (theirs := got.get(name)):
            raise ValueError(
                f"{path} holds another architecture: expected {ours} at "
                f"{name or 'the root'}, got {theirs}"
            )


@contextmanager
def _opened(path) -> Iterator[zipfile.ZipFile]:
    """The archive of a file, whose parts are what they should be, by their claims.

    What goes wrong while it is open is a ``ValueError`` that names the file.
    """
    with open(path, "rb") as file:
        start, size = file.read(2), os.fstat(file.fileno()).st_size
        if start != b"PK"[: len(start)]:
            raise _foreign(path)
        try:
            with zipfile.ZipFile(file) as archive:
                _check_members(archive, size)
                yield archive
        except Exception as error:  # damaged bytes can raise nearly anything
            raise ValueError(
                f"expected a whole file, got {path}, truncated or damaged: {error}"
            ) from error


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Raise unless there is one header, one leaf a number, and nothing compressed."""
    members = archive.infolist()
    leaves = [f"leaf{i}.npy" for i in range(len(members) - 1)]
    if [member.filename for member in members] != [*leaves, "header.npy"]:
        raise ValueError("expected the parts leaf0, leaf1, ... and header, got foreign")
    stored = [m for m in members if m.compress_type == zipfile.ZIP_STORED]
    if [m.compress_size for m in members] != [m.file_size for m in stored]:
        raise ValueError("expected no compressed parts, got some")
    if (claimed := sum(member.file_size for member in members)) > size:
        raise ValueError(f"its parts claim {claimed} bytes, and it has {size}")


def _array(archive, name, dtype, shape=None) -> np.ndarray:
    """An array of that dtype; of any number of entries where no shape is given."""
    member = archive.getinfo(f"{name}.npy")
    # NumPy's files know no bfloat16: they call it two bytes
    expected = np.lib.format.descr_to_dtype(np.lib.format.dtype_to_descr(dtype))
    with archive.open(member) as file:
        np.lib.format.read_magic(file)
        got_shape, columns_first, got = np.lib.format.read_array_header_1_0(file)
        shape = got_shape if shape is None else shape
        if (got, got_shape) != (expected, shape):
            raise ValueError(
                f"expected {expected}{list(shape)} in {name}, "
                f"got {got}{list(got_shape)}"
            )
        if member.file_size - file.tell() != math.prod(shape) * got.itemsize:
            raise ValueError(f"{name} has another size than it says")
        order = "F" if columns_first else "C"
        return np.ndarray(shape, got, file.read(), order=order)


def _header(path) -> dict[str, Any]:
    """What ``save`` wrote beside the arrays."""
    with _opened(path) as archive:
        header = json.loads(_array(archive, "header", np.dtype(np.uint8)).tobytes())
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise _foreign(path)
    if (version := header.get("version")) != VERSION:
        raise ValueError(
            f"expected version {VERSION} of the format, got {version} in {path}"
        )
    if not all(isinstance(header.get(name), dict) for name in ("meta", "leaves")):
        raise ValueError(
            f"expected `meta` and `leaves` in {path}, truncated or damaged"
        )
    return header


def _foreign(path) -> ValueError:
    return ValueError(f"expected a file of gauss_flows, got {path}, a foreign one")
