"""`ats.datasets.mnist`: the digits that ship, the IDX reader, and fetching the whole set."""

import gzip
import hashlib
import os
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from ats.datasets import mnist
from ats.datasets.mnist import fetch_mnist, load_digits, read_idx

REAL = Path(os.environ.get("ATS_DATA", "")) / "mnist"
needs_mnist = pytest.mark.skipif(
    "ATS_DATA" not in os.environ or not REAL.is_dir(),
    reason="the whole of MNIST: set ATS_DATA to a folder that holds mnist/ with the four IDX files",
)


def idx(*shape, start=0):
    """An IDX file of bytes that count up."""
    values = (torch.arange(start, start + torch.Size(shape).numel()) % 10).to(torch.uint8)
    return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(values.tolist())


FILES = {
    "train-images-idx3-ubyte": idx(20, 28, 28),
    "train-labels-idx1-ubyte": idx(20),
    "t10k-images-idx3-ubyte": idx(10, 28, 28, start=3),
    "t10k-labels-idx1-ubyte": idx(10, start=3),
}


def write_files(folder, suffix=".gz"):
    folder.mkdir(exist_ok=True)
    for name, data in FILES.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return folder


@pytest.fixture
def small_mnist(monkeypatch):
    """Make the published checksums those of FILES, and leave no mirror to reach."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    monkeypatch.setattr(mnist, "CHECKSUMS", sums)
    monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:9/",))


@pytest.mark.parametrize(("split", "count"), [("train", 5000), ("test", 1000)])
def test_bundled_digits(split, count):
    """What ships must be whole: every class, in bytes, white on black."""
    digits = load_digits(split)
    assert digits.images.shape == (count, 28, 28)
    assert digits.images.dtype == torch.uint8
    assert digits.labels.dtype == torch.int64
    assert digits.labels.bincount(minlength=10).min() >= count / 20
    assert len(digits.labels.unique()) == 10
    assert digits.images.flatten(1).amax(-1).min() > 127, "a digit without ink"
    assert digits.images.float().mean() < 64, "black on white"


def test_bundled_splits_share_no_digit():
    """A test digit seen in training would flatter every test error."""
    train, test = ({image.numpy().tobytes() for image in load_digits(split).images} for split in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_load_digits_from_a_folder(tmp_path, suffix):
    """Gzip-compressed and plain files of either split."""
    folder = write_files(tmp_path, suffix)
    train, test = load_digits("train", folder), load_digits("test", str(folder))
    assert torch.equal(train.labels, torch.arange(20) % 10)
    assert torch.equal(train.images.flatten().long(), torch.arange(20 * 28 * 28) % 10)
    assert torch.equal(test.labels, (torch.arange(10) + 3) % 10)


def test_load_digits_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown split 'val', expected 'train' or 'test'"):
        load_digits("val")
    with pytest.raises(FileNotFoundError, match=r"neither train-images-idx3-ubyte.gz nor train-images-idx3-ubyte"):
        load_digits("train", tmp_path)
    write_files(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(9)))
    with pytest.raises(ValueError, match=r"test files hold images \(10, 28, 28\) and labels \(9,\)"):
        load_digits("test", tmp_path)


def test_images_of_another_size_are_not_mnist(tmp_path):
    """20×20 digits would only fail much later, where they are joined with the noise."""
    write_files(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(20, 20, 20)))
    with pytest.raises(ValueError, match=r"\(20, 20, 20\).*expected \(M, 28, 28\)"):
        load_digits("train", tmp_path)


WHOLE = idx(7, 6, 5)
PACKED = gzip.compress(WHOLE, mtime=0)
BROKEN = {
    "empty": ("a", b"", "not an IDX file of bytes"),
    "text": ("a", b"<html>not found</html>", "not an IDX file of bytes: it starts with 3c 68 74 6d"),
    "IDX of floats": ("a", b"\0\0\x0d\x01" + bytes(8), "not an IDX file of bytes: it starts with 00 00 0d 01"),
    "header cut": ("a", WHOLE[:9], "truncated within its header"),
    "data cut": ("a", WHOLE[:-3], r"header says \(7, 6, 5\), 210 bytes, and 207 follow"),
    "too long": ("a", WHOLE + b"\0", r"header says \(7, 6, 5\), 210 bytes, and more follow"),
    "product overflows": (
        "a",
        b"\0\0\x08\x03" + b"\x80\0\0\0" * 2 + b"\0\0\0\4",
        "18446744073709551616 bytes; digits take",
    ),
    "product overflows to the size": (
        "a",
        b"\0\0\x08\x03\0\0\1\0" + b"\x01\0\0\0\x01\0\0\0",
        "72057594037927936 bytes; digits take",
    ),
    "data cut, compressed": ("a.gz", gzip.compress(WHOLE[:-3]), "210 bytes, and 207 follow"),
    "not gzip": ("a.gz", WHOLE, "not a complete gzip file"),
    "gzip cut": ("a.gz", PACKED[:-12], "not a complete gzip file"),
    "gzip checksum": ("a.gz", PACKED[:-8] + bytes(8), "not a complete gzip file"),
    "gzip damaged": ("a.gz", PACKED[:10] + b"\xff" * 8 + PACKED[18:], "not a complete gzip file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_read_idx_errors(name, tmp_path):
    """Every damage is a ValueError that names the file."""
    file_name, data, message = BROKEN[name]
    path = tmp_path / file_name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_a_small_file_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    """Not more is unpacked than the header says, nor than any set of digits has: here a MiB, of which 64 follow."""
    monkeypatch.setattr(mnist, "MOST_BYTES", 1 << 20)
    short, long = tmp_path / "short.gz", write_files(tmp_path / "folder") / "train-images-idx3-ubyte.gz"
    short.write_bytes(gzip.compress(idx(20, 28, 28)[:16] + bytes(1 << 26), 1))
    long.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 1 << 26) + bytes(1 << 26), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"short\.gz .* 15680 bytes, and more follow"):
        read_idx(short)
    with pytest.raises(ValueError, match=r": its header says \(67108864,\), 67108864 bytes; digits take 1048576"):
        read_idx(long)
    with pytest.raises(ValueError, match="not the published train-images-idx3-ubyte"):
        fetch_mnist(long.parent)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23


def test_an_empty_idx(tmp_path):
    (tmp_path / "a").write_bytes(idx(0, 28, 28))
    assert read_idx(tmp_path / "a").shape == (0, 28, 28)


def test_read_idx(tmp_path):
    for name, data in (("a", WHOLE), ("a.gz", PACKED)):
        (tmp_path / name).write_bytes(data)
        values = read_idx(tmp_path / name)
        assert values.dtype == torch.uint8
        assert torch.equal(values.long(), (torch.arange(210) % 10).view(7, 6, 5))


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fetch_takes_what_is_there(small_mnist, tmp_path, suffix):
    """Files that are present are verified and not downloaded again: no mirror can be reached here."""
    folder = write_files(tmp_path, suffix)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert fetch_mnist(folder) == folder
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_fetch_refuses_a_wrong_checksum(small_mnist, tmp_path):
    folder = write_files(tmp_path)
    wrong = folder / "t10k-labels-idx1-ubyte.gz"
    wrong.write_bytes(gzip.compress(idx(10)))
    with pytest.raises(ValueError, match=rf"{re.escape(str(wrong))} is not the published t10k-labels-idx1-ubyte"):
        fetch_mnist(folder)


def test_fetch_downloads_what_is_missing(small_mnist, tmp_path, monkeypatch):
    """From the first mirror that has it, with a progress bar, leaving nothing but the files."""
    mirror, folder = write_files(tmp_path / "mirror"), tmp_path / "new" / "mnist"
    monkeypatch.setattr(mnist, "MIRRORS", ((tmp_path / "gone").as_uri() + "/", mirror.as_uri() + "/"))
    assert fetch_mnist(folder) == folder
    assert {path.name for path in folder.iterdir()} == {f"{name}.gz" for name in FILES}
    assert torch.equal(load_digits("train", folder).labels, torch.arange(20) % 10)


def test_fetch_of_a_download_cut_short(small_mnist, tmp_path, monkeypatch):
    """A dropped connection must end in an error that names the file, as a wrong checksum does."""
    mirror = write_files(tmp_path / "mirror")
    cut = mirror / "train-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:-20])
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.as_uri() + "/",))
    with pytest.raises((ValueError, ConnectionError), match="train-images-idx3-ubyte"):
        fetch_mnist(tmp_path / "new")


def test_fetch_offline_names_the_way_out(small_mnist, tmp_path):
    """The file, the folder, each address tried and what to do instead."""
    with pytest.raises(ConnectionError) as error:
        fetch_mnist(tmp_path)
    message = str(error.value)
    for part in ("train-images-idx3-ubyte.gz", str(tmp_path), "http://127.0.0.1:9/", "by hand", "bundled"):
        assert part in message
    assert not list(tmp_path.iterdir()), "a failed download leaves nothing behind"


@needs_mnist
def test_the_whole_of_mnist():
    """The published files: checksums, sizes and the known number of each class."""
    assert fetch_mnist(REAL) == REAL
    train, test = load_digits("train", REAL), load_digits("test", REAL)
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.images.shape == (60_000, 28, 28)
    bundled = {image.numpy().tobytes() for image in load_digits("train").images}
    assert bundled <= {image.numpy().tobytes() for image in train.images}, "bundled digits are MNIST's"
