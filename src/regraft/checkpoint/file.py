"""The one way in which files are written: beside their place, synced, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError, DiskFullError, OutcomeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

# how safetensors (Rust) and torch's zip writer report a write that failed; neither keeps the error number
NO_ROOM = re.compile(r"os error (27|28|122)\b|No space left on device|file write failed|unexpected pos \d+ vs \d+")


@contextlib.contextmanager
def replace_atomically(file: Path, *, synced: bool = True) -> Iterator[Path]:
    """Write a file beside its place, sync it, and rename it: it is seen whole or not at all.

    Args:
        file: The file to write; one that exists is replaced.
        synced: Whether it must survive a loss of power from now on; not where `seal` or `publish` syncs it later.

    Yields:
        The temporary file to write to, removed again if that fails.

    Raises:
        DiskFullError: The disk is full.
        OutcomeError: The file cannot be written.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        beside.unlink(missing_ok=True)
        beside.touch(exist_ok=False)  # refuses a link that somebody else puts there
        yield beside
        os.chmod(beside, new_file_mode())  # safetensors leaves 0600
        if synced:
            sync(beside)
        os.replace(beside, file)
        if synced:
            sync(file.parent)
    except Exception as error:
        if is_disk_full(error):
            raise disk_full_error(file) from error
        if isinstance(error, OSError):
            raise OutcomeError(f"{file}: cannot be written ({error.strerror or error}).") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_atomic(file: Path, text: str) -> None:
    """Write a text file so that it is seen whole or not at all.

    Args:
        file: The file to write.
        text: Its content, written as UTF-8.

    Raises:
        DiskFullError: The disk is full.
        OutcomeError: The file cannot be written.
    """
    with replace_atomically(file) as beside:
        beside.write_text(text, encoding="utf-8")


def to_json(record: Any, name: str, indent: int | None = None) -> str:
    """Write a record as JSON, in which every number is one.

    Args:
        record: What JSON can hold.
        name: What it is a record of, for the message.
        indent: As of `json.dumps`.

    Returns:
        The text, without a newline at its end.

    Raises:
        OutcomeError: A figure in it is infinite or not a number; the message names it.
    """
    try:
        return json.dumps(record, indent=indent, allow_nan=False)
    except ValueError:
        field = next(_not_finite(record, ""), None)
        if field is None:
            raise
        raise OutcomeError(f"{name}: the figure {field} is infinite or not a number, so nothing is recorded.") from None


def new_file_mode() -> int:
    """Compute the permissions of a new file.

    Returns:
        Read and write, less what the umask takes away; which can only be read by setting it.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


def sync(path: Path) -> None:
    """Wait until what was written of a file, or the names in a folder, would survive a loss of power.

    Args:
        path: A file or a folder.

    Raises:
        OSError: The disk cannot keep the file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one that it came of, is that of a disk without room.

    Args:
        error: Any error, of Python's, safetensors' or torch's.

    Returns:
        Whether it is.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if not isinstance(cause, CheckpointError) and NO_ROOM.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def disk_full_error(path: Path | str) -> DiskFullError:
    """Make the error of a disk without room.

    Args:
        path: What could not be written.

    Returns:
        The error, for raising.
    """
    return DiskFullError(
        f"{path}: the disk is full (or your quota of it, or a limit on a file's size is reached). Make room, and the "
        "same command goes on."
    )


def seal(record: Path, files: Iterable[Path], facts: Mapping[str, Any] | None = None) -> None:
    """Sync files and record their digests, so that a later run can tell whether they are still what was written.

    Args:
        record: The file to write, in a folder that the files are in or below.
        files: What to seal; paths may go through `..`.
        facts: What must also be the same later, as JSON.
    """
    digests = {}
    for file in files:
        sync(file)
        digests[os.path.relpath(file, record.parent)] = _digest(file)
    write_atomic(record, json.dumps({"facts": dict(facts or {}), "files": digests}, sort_keys=True))


def is_sealed(record: Path, facts: Mapping[str, Any] | None = None) -> bool:
    """Check sealed files.

    Args:
        record: As of `seal`.
        facts: As of `seal`.

    Returns:
        Whether every sealed file exists with the content that it had, and the facts are the same.
    """
    try:
        content = json.loads(record.read_bytes())
        same = all(_digest(record.parent / name) == digest for name, digest in content["files"].items())
        return same and content["facts"] == json.loads(json.dumps(dict(facts or {})))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _digest(file: Path) -> str:
    if not file.is_file():  # a pipe would keep its reader waiting
        raise FileNotFoundError(errno.ENOENT, "is no file", str(file))
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _not_finite(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _not_finite(entry, f"{where}.{name}".removeprefix("."))
    elif isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            yield from _not_finite(entry, f"{where}[{number}]")
