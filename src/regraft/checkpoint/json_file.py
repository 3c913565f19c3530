"""JSON from files of others: bounded in size, and no name in an object twice."""

from __future__ import annotations

import json
import stat
from collections import Counter
from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_JSON_BYTES = 32_000_000  # of a config or a record; Python's objects take up to twenty times as much


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object, no name in it twice.

    Args:
        file: The file.

    Returns:
        Its content.

    Raises:
        CheckpointError: It cannot be read or is none.
    """
    try:
        if (size := _regular(file)) > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: has {size:,} bytes, more than the {MAX_JSON_BYTES:,} that are read.")
        text = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    return _object(text, str(file))


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read a file with a JSON object on each line.

    Args:
        file: The file.

    Yields:
        The objects.

    Raises:
        CheckpointError: It cannot be read, or a line of it is none.
    """
    try:
        _regular(file)
        with file.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_JSON_BYTES + 1), b""), start=1):
                if len(line) > MAX_JSON_BYTES:
                    raise CheckpointError(f"{file}, line {number}: is longer than the {MAX_JSON_BYTES:,} bytes read.")
                yield _object(line, f"{file}, line {number}")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error


def parse_json(text: bytes) -> Any:
    """Parse JSON that must not name a thing twice.

    Args:
        text: UTF-8.

    Returns:
        What it says.

    Raises:
        ValueError: It is no JSON, or an object in it has a name twice.
    """
    return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)


def _regular(file: Path) -> int:
    """Return a file's size; a pipe would keep its reader waiting, and a device has no end."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: is a folder, pipe or device, not a file.")
    return status.st_size


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON ({error!s:.200}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: not a JSON object.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twin!r:.200} is there twice")
    return content
