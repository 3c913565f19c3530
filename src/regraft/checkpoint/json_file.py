"""Reading JSON from untrusted files: of bounded size, and without repeated names in an object."""

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


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Args:
        file: The file.

    Raises:
        CheckpointError: The file cannot be read, is no JSON object, or repeats a name.
    """
    try:
        if (size := _check_regular(file)) > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: has {size:,} bytes, more than the {MAX_JSON_BYTES:,} that are read.")
        text = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    return _parse_object(text, str(file))


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read a file with a JSON object on each line.

    Args:
        file: The file.

    Yields:
        The objects.

    Raises:
        CheckpointError: The file cannot be read, or a line is no JSON object or repeats a name.
    """
    try:
        _check_regular(file)
        with file.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_JSON_BYTES + 1), b""), start=1):
                if len(line) > MAX_JSON_BYTES:
                    raise CheckpointError(f"{file}, line {number}: is longer than the {MAX_JSON_BYTES:,} bytes read.")
                yield _parse_object(line, f"{file}, line {number}")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error


def parse_json(text: bytes) -> Any:
    """Parse JSON without repeated names in an object.

    Args:
        text: The JSON in UTF-8.

    Raises:
        ValueError: It is no JSON, or an object repeats a name.
    """
    return json.loads(text.decode("utf-8"), object_pairs_hook=_object_without_repeats)


def _check_regular(file: Path) -> int:
    """Return a file's size, after checking that it is no pipe or device, which could block or never end."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: is a folder, pipe or device, not a file.")
    return status.st_size


def _parse_object(text: bytes, origin: str) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin}: not valid JSON ({error!s:.200}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin}: not a JSON object.")
    return content


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {repeated!r:.200} is repeated")
    return content
