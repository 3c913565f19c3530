"""JSON from files of others: bounded in size, and no name in an object twice."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError

if TYPE_CHECKING:
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
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: has {size:,} bytes, more than the {MAX_JSON_BYTES:,} that are read.")
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object.")
    return content


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twin!r:.200} is there twice")
    return content
