"""Manifests: what is read, what is refused and with which line; folds that keep groups together."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ats.datasets.folds import grouped_folds
from ats.datasets.manifest import Manifest, read_manifest


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(folder: Path, text: str | bytes) -> Manifest:
    return read_manifest(written(folder, text))


def test_all_columns_in_any_order_with_others_beside_them(tmp_path: Path) -> None:
    text = (
        "Label,note, PATH ,split,group,mpp,mask\n"
        'tumour,"x, y",a/1.png,training,p1,0.5,masks/1.png\n'
        "none,,/elsewhere/2.png,TEST,p2,,\n"
    )
    one, two = read(tmp_path, text).rows
    assert (one.line, one.path, one.label) == (2, tmp_path / "a" / "1.png", "tumour")
    assert (one.split, one.group, one.mpp, one.mask) == ("train", "p1", 0.5, tmp_path / "masks" / "1.png")
    assert (two.line, two.path, two.split, two.mpp, two.mask) == (3, Path("/elsewhere/2.png"), "test", None, None)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_spreadsheets_write(tmp_path: Path, delimiter: str, encoding: str, newline: str) -> None:
    """Byte-order marks, other delimiters, empty lines and rows of empty fields, an optional column without entries."""
    lines = ["", "path,label,split", "ä.png,eins,", ",,", "", '"b,; .png",zwei,']
    fields = [line.split(",") if '"' not in line else ['"b,; .png"', "zwei", ""] for line in lines]
    text = newline.join(delimiter.join(row) for row in fields) + newline
    manifest = read(tmp_path, text.encode(encoding))
    assert [(row.line, row.path.name, row.label, row.split) for row in manifest.rows] == [
        (3, "ä.png", "eins", None), (6, "b,; .png", "zwei", None),
    ]  # fmt: skip
    assert not manifest.has_splits


def test_a_field_over_several_lines_counts_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels\.csv, line 5: has no path"):
        read(tmp_path, 'path,label,note\na.png,x,"one\ntwo\nthree"\n,y,\n')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"labels\.csv is empty; it needs a line with the columns path and label"),
        ("path,label\n", r"labels\.csv lists no images below its header"),
        ("path,class\na,b\n", r"line 1: there is no column 'label' among 'path', 'class'"),
        ("image;label\na;b\n", r"line 1: there is no column 'path' among 'image', 'label'"),
        ("path,label,Label\na,b,c\n", r"line 1: the column label is there 2 times; keep one"),
        ("path,label\na.png,x\nb.png\n", r"line 3: has 1 fields where the header has 2"),
        ("path,label\na.png,x\nb,c.png,y\n", r'line 3: has 3 fields where the header has 2; put .* in "quotes"'),
        ("path,label\na.png,x\n\n./a.png,y\n", r"line 4: .*a\.png is listed on line 2 already"),
        ("path,label\nsub/../../a.png,x\n", r"line 2: sub/\.\./\.\./a\.png leads out of .*; write the whole path"),
        ("path,label,mask\na.png,x,../m.png\n", r"line 2: \.\./m\.png leads out of"),
        ("path,label,split\na,x,train\nb,x,tset\n", r"line 3: the split 'tset' is unknown, expected one of train"),
        ("path,label,split\na,x,train\nb,x,\n", r"line 3: has no split, where other lines have one"),
        ("path,label,group\na,x,p1\nb,x,\n", r"line 3: has no group, where other lines have one"),
        ("path,label,mpp\na,x,0,5\n", r"line 2: has 4 fields"),
        ("path,label,mpp\na,x,-1\n", r"line 2: mpp is '-1', expected micrometres a pixel"),
        ("path;label;mpp\na;x;0,5\n", r"line 2: mpp is '0,5', expected micrometres a pixel.*\(with a point\)"),
        (
            "path,label,split,group\na,x,train,p1\nb,x,train,p2\nc,x,test,p1\n",
            r"line 4: group 'p1' is in test here and in train on line 2; keep a group on one side",
        ),
        (b"path,label\na.png,\xfcber\n", r"line 2: not UTF-8 text; save it as CSV UTF-8"),
        (b"path,label\na.png,x\nb\0.png,x\n", r"line 3: has a zero byte"),
        ('path,label\n"a"b.png,x\n', r"line 2: .*quotes"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "labels.csv") in str(caught.value)


def test_a_folder_and_nothing_are_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; name the manifest"):
        read_manifest(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path / "labels.csv")


def test_links_to_one_file_are_one_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is listed on line 2 already"):
        read(tmp_path, "path,label\na.png,x\nb.png,y\n")


def test_the_digest_follows_what_is_said_not_where(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    first = read(one, "path,label\na.png,x\nb.png,y\n").digest()
    assert read(two, "path;label\nb.png;y\na.png;x\n").digest() == first
    assert read(two, "path,label\na.png,x\nb.png,x\n").digest() != first
    assert read(two, "path,label,split\na.png,x,train\nb.png,y,test\n").digest() != first


def test_the_digest_follows_what_masks_show(tmp_path: Path) -> None:
    """Their content, wherever they lie; without masks it is as it was before masks counted."""
    plain = read(tmp_path, "path,label\na.png,x\nb.png,y\n").digest()
    masked = "path,label,mask\na.png,x,m.png\nb.png,y,\n"
    (tmp_path / "m.png").write_bytes(b"one")
    (tmp_path / "same.png").write_bytes(b"one")
    first = read(tmp_path, masked).digest()
    assert first != plain == "4f999c8561de80ea"
    assert read(tmp_path, masked.replace("m.png", "same.png")).digest() == first
    assert read(tmp_path, masked.replace("x,m.png", "x,").replace("y,", "y,m.png")).digest() != first
    (tmp_path / "m.png").write_bytes(b"two")
    assert read(tmp_path, masked).digest() != first
    (tmp_path / "m.png").unlink()
    assert read(tmp_path, masked).digest() not in (first, plain)


@pytest.mark.parametrize("seed", range(5))
def test_folds_keep_groups_and_spread_labels(seed: int) -> None:
    """Patients with 1 to 6 images of three classes: a fold that missed its share by more than a patient would show."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 7, 60)
    groups = np.repeat(np.arange(60), sizes)
    labels = random.choice(3, len(groups), p=[0.6, 0.3, 0.1])
    fold = grouped_folds(np.eye(3)[labels], groups.tolist(), 5, seed=seed)
    assert all(len(set(fold[groups == group])) == 1 for group in range(60))
    for label in range(3):
        counts = np.bincount(fold[labels == label], minlength=5)
        assert abs(counts - counts.mean()).max() <= 6, counts
    again = grouped_folds(np.eye(3)[labels], groups.tolist(), 5, seed=seed)
    other = grouped_folds(np.eye(3)[labels], groups.tolist(), 5, seed=seed + 100)
    assert np.array_equal(fold, again)
    assert not np.array_equal(fold, other)


@pytest.mark.parametrize("counts", [(20, 20), (23, 9), (50, 3, 7)])
def test_folds_of_single_images_differ_by_one_a_class(counts: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    fold = grouped_folds(np.eye(len(counts))[labels], list(range(len(labels))), 4, seed=3)
    for label in range(len(counts)):
        each = Counter(fold[labels == label].tolist())
        assert max(each[part] for part in range(4)) - min(each[part] for part in range(4)) <= 1
    sizes = np.bincount(fold, minlength=4)
    assert sizes.max() - sizes.min() <= 1


def test_folds_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most the groups there are, 2; got 3"):
        grouped_folds(np.ones((4, 1)), ["a", "a", "b", "b"], 3)
