"""Atomic file writing: a file is written under a temporary name, then renamed; and seals, which show later changes."""

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

# 27, 28 and 122 are EFBIG, ENOSPC and EDQUOT on Linux.
DISK_FULL_MESSAGE = re.compile(
    r"os error (27|28|122)\b|No space left on device|file write failed|unexpected pos \d+ vs \d+"
)
"""Matches how safetensors (Rust) and torch's zip writer report a full disk, without an errno attribute."""


@contextlib.contextmanager
def replace_atomically(file: Path, *, synced: bool = True) -> Iterator[Path]:
    """Provide a temporary file and rename it when it is written, so that readers see all of the file or nothing.

    Args:
        file: The file to write; an existing one is replaced.
        synced: Whether the file must survive a power loss as soon as this returns. Pass False where `seal` or
            `publish` syncs it later.

    Yields:
        The temporary file to write to, in the same folder; it is removed if writing fails.

    Raises:
        DiskFullError: The disk is full.
        OutcomeError: The file cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch(exist_ok=False)  # fails on a symbolic link that another process created meanwhile
        yield temporary
        os.chmod(temporary, new_file_mode())  # safetensors creates files with mode 0600
        if synced:
            sync(temporary)
        os.replace(temporary, file)
        if synced:
            sync(file.parent)
    except Exception as error:
        if is_disk_full(error):
            raise disk_full_error(file) from error
        if isinstance(error, OSError):
            raise OutcomeError(
                f"{file}: cannot be written ({error.strerror or error}). Check the permissions of its folder."
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(file: Path, text: str) -> None:
    """Write a text file atomically.

    Args:
        file: The file to write.
        text: The content, written as UTF-8.

    Raises:
        DiskFullError: The disk is full.
        OutcomeError: The file cannot be written.
    """
    with replace_atomically(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(record: Any, name: str, indent: int | None = None) -> str:
    """Convert a record to JSON, and refuse infinities and NaN.

    Args:
        record: Any value that JSON can represent.
        name: The record's name in the error message.
        indent: The indentation in spaces; None for a single line.

    Returns:
        The text, without a trailing newline.

    Raises:
        OutcomeError: A number in the record is infinite or NaN; the message names its field.
    """
    try:
        return json.dumps(record, indent=indent, allow_nan=False)
    except ValueError:
        field = next(_nonfinite_fields(record, ""), None)
        if field is None:
            raise
        raise OutcomeError(f"{name}: the figure {field} is infinite or NaN, so nothing is recorded.") from None


def write_json(file: Path, record: Any, indent: int | None = None) -> None:
    """Write a record as JSON, atomically.

    Args:
        file: The file to write; its name is the record's name in error messages.
        record: Any value that JSON can represent.
        indent: The indentation in spaces; None for a single line.

    Raises:
        DiskFullError: The disk is full.
        OutcomeError: A number in the record is infinite or NaN, or the file cannot be written.
    """
    write_atomic(file, to_json(record, file.name, indent) + "\n")


def equals_json(recorded: Any, value: Any) -> bool:
    """Return whether a value read from JSON equals the JSON form of a value, in which tuples are lists.

    Args:
        recorded: The value that was read.
        value: The value to compare, as it would be written.

    Raises:
        TypeError: `value` cannot be written as JSON.
    """
    return bool(recorded == json.loads(json.dumps(value)))


def new_file_mode() -> int:
    """Return the permissions of a new file: read and write for all, restricted by the umask."""
    umask = os.umask(0o077)  # the umask can be read only by setting it
    os.umask(umask)
    return 0o666 & ~umask


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk.

    Args:
        path: An existing file or folder.

    Raises:
        OSError: The path cannot be opened, or the disk cannot store the content.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, means that the disk is full or a quota or size limit is reached.

    Args:
        error: An error that Python, safetensors or torch raised.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if not isinstance(cause, CheckpointError) and DISK_FULL_MESSAGE.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def disk_full_error(path: Path | str) -> DiskFullError:
    """Return the error to raise when the disk is full.

    Args:
        path: The file or folder that could not be written.
    """
    return DiskFullError(
        f"{path}: the disk is full (or your quota or a limit on file sizes is reached). Make room, then run the same "
        "command again: it resumes."
    )


def seal(record: Path, files: Iterable[Path], facts: Mapping[str, Any] | None = None) -> None:
    """Sync files and record their digests, so that a later run can check that they are unchanged.

    Args:
        record: The record to write.
        files: The files to seal; their paths are recorded relative to the folder of `record`.
        facts: Values that must also be unchanged later, such as library versions; anything JSON can represent.

    Raises:
        DiskFullError: The disk is full.
        OSError: A file cannot be synced or read.
        OutcomeError: The record cannot be written.
    """
    digests = {}
    for file in files:
        sync(file)
        digests[os.path.relpath(file, record.parent)] = _digest(file)
    write_atomic(record, json.dumps({"facts": dict(facts or {}), "files": digests}, sort_keys=True))


def is_sealed(record: Path, facts: Mapping[str, Any] | None = None) -> bool:
    """Return whether every sealed file has its recorded digest, and the facts equal the recorded ones.

    Args:
        record: The file that `seal` wrote.
        facts: The facts to compare with the recorded ones.
    """
    try:
        seals = json.loads(record.read_bytes())
        is_unchanged = all(_digest(record.parent / name) == digest for name, digest in seals["files"].items())
        return is_unchanged and equals_json(seals["facts"], dict(facts or {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _digest(file: Path) -> str:
    if not file.is_file():  # reading a pipe would block
        raise FileNotFoundError(errno.ENOENT, "is not a regular file", str(file))
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _nonfinite_fields(value: Any, path: str) -> Iterator[str]:
    """Yield the paths of the infinite and NaN numbers in a value, such as `scores[0].mean`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _nonfinite_fields(entry, f"{path}.{name}".removeprefix("."))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _nonfinite_fields(entry, f"{path}[{index}]")
