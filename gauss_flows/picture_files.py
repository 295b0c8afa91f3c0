"""Files of pictures: what wheels ship, what is downloaded, and how it is read.

The idx format of MNIST and the binary format of CIFAR-10 are read by a few lines each:
headers and sizes are checked before memory is taken, and no file is unpickled. All
public names are found in :mod:`gauss_flows.pictures` too.
"""

import gzip
import importlib
import math
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

EXTRA = "gauss-flows[pictures]"
SIDE = 32
"""Height and width of a picture of CIFAR-10."""

_RECORD = 1 + 3 * SIDE**2
_CLASSES = 10
_UNSIGNED_BYTE = 0x08
_DENSEST = 1032  # what one byte of a gzip file can hold at most
_Read = Callable[[int], bytes]
_NOT_GZIP = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.ReadError)


class Remote(NamedTuple):
    """A file on the net: its address, and the SHA-256 checksum that it must have."""

    address: str
    sha256: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rsplit("/", 1)[-1]


def in_wheel(distribution: str, package: str, *path: str) -> Traversable:
    """A data file of an installed package; no network is asked.

    Args:
        distribution: What to install, as pip calls it.
        package: The package that holds the file, as Python calls it.
        path: Folders and name of the file inside.

    Raises:
        ModuleNotFoundError: If the package is not installed; names the extra.
        FileNotFoundError: If its version ships no such file.
    """
    _module(distribution, package)
    file = resources.files(package).joinpath(*path)
    if not file.is_file():
        raise FileNotFoundError(
            f"expected {'/'.join(path)} among the files of the installed "
            f"{distribution}: another version may ship it, pip install -U '{EXTRA}'"
        )
    return file


def fetch(remote: Remote, folder: str | os.PathLike | None = None) -> Path:
    """The path of a file from the net, downloaded once and checked each time.

    Args:
        remote: The file.
        folder: Where to keep it; by default a folder for this package in the user's
            cache. A file put there by hand is taken, if its checksum is right.

    Raises:
        ModuleNotFoundError: If pooch is not installed; names the extra.
        ConnectionError: If it cannot be downloaded or stored.
        ValueError: If what came has another checksum; it is not kept.
    """
    pooch = _module("pooch", "pooch")
    folder = Path(folder or pooch.os_cache("gauss_flows") / "pictures").absolute()
    name, sha256 = remote.name, remote.sha256
    try:
        path = pooch.retrieve(remote.address, sha256, fname=name, path=folder)
    except OSError as error:  # that of requests is one, too
        raise ConnectionError(
            f"expected to download {name} from {remote.address} into {folder}, got "
            f"{type(error).__name__}: {error}. Offline, get the file elsewhere and put "
            f"it there; its SHA-256 checksum is {sha256}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"expected {name} from {remote.address} to have the SHA-256 checksum "
            f"{sha256}, got a file with another; it was not kept. Try again, or get "
            f"the file elsewhere and put it into {folder}"
        ) from error
    return Path(path)


def read_idx(path: str | os.PathLike) -> UInt8[np.ndarray, "..."]:
    """Read a file in the idx format, as MNIST has it: an array of whole grey values.

    Two zero bytes, the type of a number (8, an unsigned byte, is what is read here),
    the number of axes; then their lengths, each as 4 bytes, the highest first; then the
    numbers, the last axis fastest.

    Args:
        path: The file, compressed by gzip if its name ends in ``.gz``.

    Raises:
        ValueError: If the file is of another format or type, cut short, too long, or
            damaged.
        OSError: If it cannot be opened.

    Source:
        LeCun, Cortes & Burges (1998), the MNIST database of handwritten digits.
    """
    path = Path(path)
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            shape = _idx_shape(path, file.read)
            n = math.prod(shape)
            _must_fit(path, n, _DENSEST if packed else 1)
            numbers = _exactly(path, file.read, n)
            if file.read(1):
                raise ValueError(f"expected {n} numbers in {path}, got more")
    except _NOT_GZIP as error:
        raise _damaged(path, error) from error
    return numbers.reshape(shape)


def read_cifar(
    path: str | os.PathLike,
) -> dict[str, tuple[UInt8[np.ndarray, "n h w 3"], UInt8[np.ndarray, " n"]]]:
    """Read the archive of CIFAR-10's binary version: pictures and labels by batch.

    A batch is a file ``*.bin`` of records of 3,073 bytes: the label, then 32×32 values
    of red, as many of green, as many of blue, row by row. Nothing is unpacked to disk.

    Args:
        path: The archive, ``cifar-10-binary.tar.gz``.

    Returns:
        For each batch, by the name of its file without the ending, pictures of shape
        ``(n, 32, 32, 3)`` and labels of shape ``(n,)``.

    Raises:
        ValueError: If the archive or a batch in it is of another format, cut short, or
            damaged, or a label is not in 0, ..., 9.
        OSError: If it cannot be opened.

    Source:
        Krizhevsky (2009); the format is told on the page of the data set.
    """
    path = Path(path)
    try:
        with tarfile.open(path, "r:gz") as archive:
            batches = dict(_batches(path, archive))
    except _NOT_GZIP as error:
        raise _damaged(path, error) from error
    if not batches:
        raise ValueError(f"expected batches, files *.bin, in {path}, got none")
    return batches


def _batches(path: Path, archive: tarfile.TarFile) -> Iterator[tuple]:
    for member in archive:
        file = archive.extractfile(member) if member.isfile() else None
        if file is None or not member.name.endswith(".bin"):
            continue
        name = Path(member.name).stem
        n, rest = divmod(member.size, _RECORD)
        if rest or not n:
            raise ValueError(
                f"expected whole records of {_RECORD} bytes in {name} of {path}, got "
                f"{member.size} bytes"
            )
        _must_fit(path, member.size, _DENSEST)
        records = _exactly(path, file.read, member.size).reshape(n, _RECORD)
        labels = records[:, 0].copy()
        if labels.max() >= _CLASSES:
            raise ValueError(
                f"expected labels in 0..{_CLASSES - 1} in {name} of {path}, got "
                f"{labels.max()}"
            )
        planes = records[:, 1:].reshape(n, 3, SIDE, SIDE)
        yield name, (np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels)


def _idx_shape(path: Path, read: _Read) -> tuple[int, ...]:
    magic = read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE:
        raise ValueError(
            f"expected {path} to begin with 00 00 08, as an idx file of unsigned bytes "
            f"does, got {magic[:3].hex(' ') or 'nothing'}"
        )
    axes = magic[3]
    lengths = _exactly(path, read, 4 * axes)
    return tuple(lengths.view(">u4").tolist())


def _exactly(path: Path, read: _Read, n: int) -> UInt8[np.ndarray, " n"]:
    numbers = np.frombuffer(bytearray(read(n)), np.uint8)
    if len(numbers) < n:
        raise ValueError(
            f"expected {n} more bytes in {path}, got {len(numbers)}: it is cut short"
        )
    return numbers


def _must_fit(path: Path, n: int, density: int) -> None:
    """Refuse a size that the file cannot hold, before memory is taken for it."""
    size = path.stat().st_size
    if n > density * size:
        raise ValueError(
            f"expected the header of {path} to tell what is there, got one that tells "
            f"of {n} bytes; a file of {size} bytes cannot hold them"
        )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"expected {path} to be whole, got a damaged file: {error}")


def _module(distribution: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected {distribution} to be installed, which these pictures need: "
            f"pip install '{EXTRA}' ({error})",
            name=error.name,
        ) from error
