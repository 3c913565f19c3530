"""Where a checkpoint is: a folder or file of this disk, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.errors import CheckpointError


def find_path(name: str | Path) -> Path:
    """Find a checkpoint by what the user called it.

    Args:
        name: A folder or file, or a hub id with an optional `@revision`; what is in the local cache is not fetched.

    Returns:
        Its place on this disk.

    Raises:
        CheckpointError: There is no such place, and the hub does not give it.
    """
    path = Path(name)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = str(name).partition("@")
    arguments: dict[str, Any] = {"allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]}
    try:
        return Path(snapshot_download(repository, revision=revision or None, **arguments))
    except HFValidationError:
        raise CheckpointError(f"{name}: no such file or folder, and no hub id either.") from None
    except Exception as error:  # the hub's client raises many kinds: offline, no such repository, no access
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: no such file or folder, and the hub does not give it ({reason})") from error
