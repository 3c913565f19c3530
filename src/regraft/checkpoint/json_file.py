"""Reading JSON from untrusted files, with bounded memory and without repeated names in an object."""

from __future__ import annotations

import json
import stat
from collections import Counter
from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_JSON_BYTES = 32_000_000  # the parsed objects take up to twenty times as much memory
"""The largest JSON that is read, in bytes."""


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Args:
        file: A file in UTF-8 of at most `MAX_JSON_BYTES`.

    Returns:
        The content by name.

    Raises:
        CheckpointError: The file cannot be read, is too large, is not a JSON object, or repeats a name.
    """
    try:
        num_bytes = _regular_file_size(file)
        if num_bytes > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: has {num_bytes:,} bytes, more than the {MAX_JSON_BYTES:,} that are read.")
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    return _parse_object(data, str(file))


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read a file with a JSON object on each line.

    Args:
        file: A file in UTF-8 of any size, with lines of at most `MAX_JSON_BYTES`.

    Yields:
        The object of each line.

    Raises:
        CheckpointError: The file cannot be read, or a line is too long, is not a JSON object or repeats a name.
    """
    try:
        _regular_file_size(file)
        with file.open("rb") as stream:
            bounded_lines = iter(lambda: stream.readline(MAX_JSON_BYTES + 1), b"")
            for line_number, line in enumerate(bounded_lines, start=1):
                origin = f"{file}, line {line_number}"
                if len(line) > MAX_JSON_BYTES:
                    raise CheckpointError(f"{origin}: is longer than the {MAX_JSON_BYTES:,} bytes read.")
                yield _parse_object(line, origin)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error


def parse_json(data: bytes) -> Any:
    """Parse JSON, and refuse objects with repeated names, of which `json.loads` would use the last.

    Args:
        data: The JSON in UTF-8.

    Raises:
        RecursionError: The JSON is nested too deeply.
        ValueError: The data is not JSON, or an object repeats a name.
    """
    return json.loads(data.decode("utf-8"), object_pairs_hook=_object_without_repeats)


def _regular_file_size(file: Path) -> int:
    """Return a file's size in bytes; refuse pipes and devices, which could block or never end."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: is a folder, pipe or device, not a file.")
    return status.st_size


def _parse_object(data: bytes, origin: str) -> dict[str, Any]:
    try:
        parsed = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin}: not valid JSON ({error!s:.200}). Correct or replace it.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{origin}: not a JSON object. Correct or replace it.")
    return parsed


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {repeated!r:.200} is repeated")
    return unique
