"""Finding a checkpoint on the disk or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.errors import CheckpointError


def find_path(name: str | Path) -> Path:
    """Return the path of a checkpoint, after downloading it if it is on the hub and not in the local cache.

    Args:
        name: A folder, a file, or a hub id with an optional `@revision`.

    Raises:
        CheckpointError: There is no such path, and it cannot be downloaded.
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
    except Exception as error:  # many types: offline, unknown repository, no access
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}: no such file or folder, and it cannot be downloaded from the hub ({reason})"
        ) from error
