"""Finding a checkpoint on the disk or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from regraft.errors import CheckpointError

AUXILIARY_FILES = ("*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.tiktoken")
"""Patterns of all files that transformers may need besides the weights: configs, tokenizers and chat templates."""


def find_path(name: str | Path) -> Path:
    """Return the path of a checkpoint on this machine; of a hub id, after downloading what the cache lacks.

    Args:
        name: A folder, a file, or a hub id with an optional `@revision`.

    Raises:
        CheckpointError: The path does not exist, and the hub has no such checkpoint or cannot be reached.
    """
    path = Path(name)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = str(name).partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=["*.safetensors", *AUXILIARY_FILES])
        )
    except HFValidationError:
        raise CheckpointError(f"{name}: no such file or folder, and no hub id either. Correct the name.") from None
    except Exception as error:  # many types: offline, unknown repository, no access
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}: no such file or folder, and it cannot be downloaded from the hub ({reason}). "
            "Correct the name, or download it first."
        ) from error
