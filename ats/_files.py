"""Files that are written whole or not at all, and what a process that was killed left of one."""

import errno
import itertools
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# .NAME.HOST.PROCESS-COUNT.part or, of earlier versions, .NAME.PROCESS.part
_PART = re.compile(r"\..+\.(?:(?P<host>[\w-]+)\.(?P<process>\d+)-\d+|(?P<alone>\d+))\.part", re.DOTALL)
_COUNT = itertools.count()
_STARTED = time.time()


def write_whole(path: Path, data: bytes | memoryview, *, overwrite: bool = True) -> None:
    """Write `data` beside `path`, flush it to the disk, then put it in its place.

    A reader finds the old file or the new one, never half, whenever the process is killed or the power goes.

    Raises:
        FileExistsError: not `overwrite`, and there is a file, even one that another process wrote just now.
        OSError: it cannot be written, e.g. to a full disk; `filename` is `path`, and what was there is untouched.
    """
    with whole_file(path, overwrite=overwrite) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A file to write to, bit by bit, that is put in `path`'s place once the block ends, as by `write_whole`."""
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name is cut, so that it fits where `path` does.
        name = os.fsdecode(os.fsencode(path.name)[:150])
        part = path.with_name(f".{name}.{_host()}.{os.getpid()}-{next(_COUNT)}.part")
        try:
            with part.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(part, path)
            else:
                _put_new(part, path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


def _put_new(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # which, unlike a rename, fails where there is a file
    except FileExistsError:
        raise
    except OSError:  # a file system without links: two processes may both pass here, and one file is whole still
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.replace(part, path)


def write_json(path: Path, values: dict[str, Any] | list[dict[str, Any]], *, overwrite: bool = True) -> None:
    """Write `values` as JSON, as `write_whole` does."""
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode(), overwrite=overwrite)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: there is none that can be read.
        ValueError: it is no JSON; the message names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read (its brackets are nested too deep)") from error
    except ValueError as error:  # JSON's errors are some, and those of decoding, too
        raise ValueError(f"{path} cannot be read ({error})") from error


def read_object(path: Path, *names: str) -> dict[str, Any]:
    """What a JSON file holds, an object with at least these names.

    Raises:
        OSError: there is none that can be read.
        ValueError: it holds something else; the message names the file.
    """
    values = read_json(path)
    missing = [name for name in names if not isinstance(values, dict) or name not in values]
    if missing or not isinstance(values, dict):
        lacks = f"it lacks {', '.join(missing)}" if missing else "it holds no object"
        raise ValueError(f"{path} cannot be read ({lacks})")
    return values


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the system can."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def is_part(path: Path) -> bool:
    """Whether a file is what `write_whole` writes to before it is whole: nobody's work."""
    return _PART.fullmatch(path.name) is not None


def remove_parts(folder: Path) -> None:
    """Remove what processes of this machine that were killed left of files in `folder`; others' are left alone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _PART.fullmatch(path.name)
        if found is None or found["host"] not in (None, _host()):
            continue
        if not _writes(int(found["process"] or found["alone"]), path):
            path.unlink(missing_ok=True)


_UNFINISHED = re.compile(r"\.unfinished(?:\.(?P<host>[\w-]+)\.(?P<process>\d+))?")


def unfinished(folder: Path) -> Path:
    """Where this process writes what is to be in `folder` once it is whole."""
    return folder / f".unfinished.{_host()}.{os.getpid()}"


def remove_unfinished(folder: Path) -> None:
    """Remove what processes of this machine that were killed left `unfinished`; others' is left alone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _UNFINISHED.fullmatch(path.name)
        # Earlier versions did not say whose it is.
        if (
            found
            and found["host"] in (None, _host())
            and not (found["process"] and _writes(int(found["process"]), path))
        ):
            shutil.rmtree(path, ignore_errors=True)


def _writes(process: int, path: Path) -> bool:
    """Whether a process may still be writing a file."""
    if process == os.getpid():  # in a container, a dead process often had the same number
        try:
            return path.stat().st_mtime >= _STARTED
        except FileNotFoundError:
            return False
    return is_alive(process)


def is_alive(process: int) -> bool:
    """Whether this machine has a process of that number."""
    if os.name == "nt":  # where a signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    return re.sub(r"[^\w-]+", "-", platform.node(), flags=re.ASCII)[:40] or "host"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have the system's errors name the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
