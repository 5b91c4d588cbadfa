"""A table of images and their labels: a CSV file with a row an image, read strictly and with the line of what is wrong.

Columns, in any order and with any others beside them, which are left alone:

- `path`: of the image. A relative one is meant from the manifest's folder and stays in it; an absolute one may be
  anywhere.
- `label`: a class; several, separated by ";"; or a number.
- `split`: train, validation or test.
- `group`: what images have in common that must not be on both sides of a split, e.g. a patient.
- `mpp`: micrometres a pixel, in place of what the file says.
- `mask`: a file that says where to look, as `ats.mask_cells` takes it; its path is like an image's.

An optional column that is empty in all rows counts as missing.
"""

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ats.paths import user_path

REQUIRED, OPTIONAL = ("path", "label"), ("split", "group", "mpp", "mask")
SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {name: name for name in SPLITS} | {"training": "train", "val": "validation", "valid": "validation"}
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Row:
    """One image of a manifest, on one `line` of it; what the columns hold, None where a column is not there."""

    line: int
    path: Path
    label: str
    split: str | None = None
    group: str | None = None
    mpp: float | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Manifest:
    """The rows of a manifest, in their order.

    Attributes:
        path: the file.
        rows: at least one. Either all of them have a split, or none; so it is with groups.
    """

    path: Path
    rows: tuple[Row, ...]

    @property
    def has_splits(self) -> bool:
        """Whether it says what to train and to test on."""
        return self.rows[0].split is not None

    def where(self, row: Row) -> str:
        """A row's place, for messages."""
        return f"{self.path}, line {row.line}"

    def select(self, split: str) -> tuple[Row, ...]:
        """The rows of a split."""
        return tuple(row for row in self.rows if row.split == split)

    def digest(self) -> str:
        """Text that changes when what the rows say does, or what a mask says that they name.

        It does not when the folder is moved, or when lines trade places. Masks are read whole.
        """
        said = sorted(
            [os.path.relpath(row.path, self.path.parent), row.label, row.split, row.group, row.mpp, *_of_mask(row.mask)]
            for row in self.rows
        )
        return hashlib.sha256(json.dumps(said).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _of_mask(mask: Path | None) -> tuple[str, ...]:
    """Text that tells a mask from another, wherever it lies; one that cannot be read has none of its own."""
    if mask is None:
        return ()
    try:
        return (hashlib.sha256(mask.read_bytes()).hexdigest(),)
    except OSError:
        return (mask.name,)


def read_manifest(path: str | os.PathLike[str], *, labels: bool = True) -> Manifest:
    """Read a manifest. Whether the images are there is not looked at.

    Commas, semicolons or tabs part its columns, and Excel's marks at the beginning of a file are known. Empty lines are
    left out. Without `labels` there need not be any: what rows say then is "" where there is no such column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is wrong with it, and on which line: columns that are missing or twice there, rows of another
            length, labels, splits or groups that are missing, an image that is listed twice, a path that leaves the
            folder, a group on both sides of the splits.
    """
    place = Path(os.path.abspath(user_path(path)))
    if place.is_dir():
        raise ValueError(f"{place} is a folder; name the manifest, a CSV file with the columns path and label")
    text = _decode(place)
    lines = list(_fields(place, text))
    if not lines:
        raise ValueError(f"{place} is empty; it needs a line with the columns path and label, and a line an image")
    first, header = lines[0]
    columns = _columns(place, first, header, REQUIRED if labels else REQUIRED[:1])
    cells = [_by_column(place, line, fields, header, columns) for line, fields in lines[1:]]
    if not cells:
        raise ValueError(f"{place} lists no images below its header")
    for name in OPTIONAL:
        if all(not values.get(name) for _, values in cells):
            for _, values in cells:
                values.pop(name, None)
    rows = tuple(_row(place, line, values) for line, values in cells)
    manifest = Manifest(place, rows)
    _check_once(manifest)
    _check_groups(manifest)
    return manifest


def _decode(path: Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save it as CSV UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path}, line {line}: has a zero byte, so it is no text; save it as CSV UTF-8")
    return text


def _fields(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The number and the stripped fields of each line that is not empty."""
    header = next((line for line in text.splitlines() if line.strip(" \t,;")), "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(header), strict=True)
    before = 0
    try:
        for fields in reader:
            line, before = before + 1, reader.line_num  # a quoted field may go over several
            if any(field.strip() for field in fields):
                yield line, [field.strip() for field in fields]
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {before + 1}: {error}; a field with quotes in it has each of them twice"
        ) from error


def _delimiter(header: str) -> str:
    """What parts the columns: with which the header has most of those that are known."""
    known = {*REQUIRED, *OPTIONAL}

    def found(delimiter: str) -> int:
        return len(known & {name.strip().strip('"').strip().lower() for name in header.split(delimiter)})

    return max(_DELIMITERS, key=found)  # commas where it has none


def _columns(path: Path, line: int, header: Sequence[str], required: Sequence[str]) -> dict[str, int]:
    """Where the columns that are known are."""
    names = [name.lower() for name in header]
    for name in (*REQUIRED, *OPTIONAL):
        if names.count(name) > 1:
            raise ValueError(f"{path}, line {line}: the column {name} is there {names.count(name)} times; keep one")
    for name in required:
        if name not in names:
            raise ValueError(
                f"{path}, line {line}: there is no column {name!r} among {', '.join(map(repr, header))}; the first "
                f"line names the columns, at least {' and '.join(required)}, parted by commas, semicolons or tabs"
            )
    return {name: names.index(name) for name in (*REQUIRED, *OPTIONAL) if name in names}


def _by_column(
    path: Path, line: int, fields: Sequence[str], header: Sequence[str], columns: dict[str, int]
) -> tuple[int, dict[str, str]]:
    while len(fields) > len(header) and not fields[-1]:  # spreadsheets leave these
        fields = fields[:-1]
    if len(fields) != len(header):
        raise ValueError(
            f"{path}, line {line}: has {len(fields)} fields where the header has {len(header)}; put fields that hold a "
            'delimiter in "quotes"'
        )
    return line, {name: fields[index] for name, index in columns.items()}


def _row(path: Path, line: int, values: dict[str, str]) -> Row:
    where = f"{path}, line {line}"
    if not values["path"]:
        raise ValueError(f"{where}: has no path; name the image, or remove the line")
    split = values.get("split")
    if split is not None:
        if not split:
            raise ValueError(f"{where}: has no split, where other lines have one; expected {', '.join(SPLITS)}")
        if split.lower() not in _SPLIT_NAMES:
            raise ValueError(f"{where}: the split {split!r} is unknown, expected one of {', '.join(SPLITS)}")
        split = _SPLIT_NAMES[split.lower()]
    group = values.get("group")
    if group == "":
        raise ValueError(
            f"{where}: has no group, where other lines have one; an image that shares its with no other gets a name of "
            "its own"
        )
    mask = values.get("mask")
    return Row(
        line=line,
        path=_place(path, where, values["path"]),
        label=values.get("label", ""),
        split=split,
        group=group,
        mpp=_mpp(where, values["mpp"]) if values.get("mpp") else None,
        mask=_place(path, where, mask) if mask else None,
    )


def _place(manifest: Path, where: str, text: str) -> Path:
    path = user_path(text)
    if path.is_absolute():
        return Path(os.path.normpath(path))
    full = Path(os.path.normpath(manifest.parent / path))
    if not full.is_relative_to(manifest.parent):
        raise ValueError(
            f"{where}: {text} leads out of {manifest.parent}, the manifest's folder; write the whole path, from the "
            "root, if it is meant"
        )
    return full


def _mpp(where: str, text: str) -> float:
    number = to_number(text)
    if number is None or number <= 0:
        raise ValueError(f"{where}: mpp is {text!r}, expected micrometres a pixel, a number above 0 (with a point)")
    return number


def to_number(text: str) -> float | None:
    """The finite number that a text is, else None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _check_once(manifest: Manifest) -> None:
    seen: dict[str, Row] = {}
    for row in manifest.rows:
        other = seen.setdefault(os.path.realpath(row.path), row)
        if other is not row:
            raise ValueError(
                f"{manifest.where(row)}: {row.path} is listed on line {other.line} already{_as_link(other, row)}; keep "
                'one of the two lines, with several labels as "a;b"'
            )


def _as_link(first: Row, second: Row) -> str:
    return "" if first.path == second.path else f" as {first.path}, one file by another name"


def _check_groups(manifest: Manifest) -> None:
    seen: dict[str, Row] = {}
    for row in manifest.rows:
        if row.group is None or row.split is None:
            continue
        other = seen.setdefault(row.group, row)
        if other.split != row.split:
            raise ValueError(
                f"{manifest.where(row)}: group {row.group!r} is in {row.split} here and in {other.split} on line "
                f"{other.line}; keep a group on one side, or leave the column split out to have that done"
            )
