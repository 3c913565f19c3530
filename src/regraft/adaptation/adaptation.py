"""What tuning left behind: a full fine-tune or a LoRA, with its head."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regraft.checkpoint import Checkpoint, fingerprint
from regraft.errors import CheckpointError, MismatchError

if TYPE_CHECKING:
    from regraft.upgrade import Base

logger = logging.getLogger(__name__)

Kind = Literal["full", "lora"]
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Weights tuned for a task on some base, on disk.

    Args:
        path: A plain transformers folder (full fine-tune) or PEFT folder (LoRA).
        kind: `full` or `lora`.
        labels: The label names in the order of the head's outputs; None if the folder does not tell.
        base: The fingerprint of the base it was tuned on; None if it was made elsewhere.
        checkpoint: Its tensors, unread.
    """

    path: Path
    kind: Kind
    labels: tuple[str, ...] | None
    base: str | None
    checkpoint: Checkpoint

    @functools.cached_property
    def fingerprint(self) -> str:
        """Which weights these are."""
        return fingerprint(self.checkpoint)

    def check_base(self, base: Base) -> None:
        """Refuse a base that is not the one this was tuned on.

        Args:
            base: The base in hand.

        Raises:
            MismatchError: The recorded fingerprint is another one.
        """
        if self.base is None:
            logger.warning("%s does not record its base: that it was tuned on %s is unproven.", self.path, base.path)
        elif self.base != base.fingerprint:
            raise MismatchError(
                f"{self.path} was not tuned on {base.path}: it records the base {self.base}, and this one is "
                f"{base.fingerprint}. Give the base it was tuned on."
            )


def load_adaptation(path: str | Path) -> Adaptation:
    """Find tuned weights and check that their files are whole.

    Args:
        path: An outcome folder, or a folder written by `save_pretrained` of transformers or PEFT.

    Returns:
        The adaptation; no weights have been read.

    Raises:
        CheckpointError: A file is missing, truncated, malformed or of a kind that is not supported.
    """
    folder = Path(path)
    if (folder / "adaptation").is_dir():
        folder = folder / "adaptation"
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder.")
    record = _read_json(folder.parent / "outcome.json") if (folder.parent / "outcome.json").is_file() else {}
    checkpoint = Checkpoint.open(folder)
    labels = tuple(record["labels"]) if "labels" in record else None
    base = record.get("base", {}).get("fingerprint")
    if (folder / "adapter_config.json").is_file():
        _check_adapter_config(folder)
        return Adaptation(folder, "lora", labels, base, checkpoint)
    config = _read_json(folder / "config.json")
    if not any("SequenceClassification" in name for name in config.get("architectures") or ()):
        raise CheckpointError(
            f"{folder}: is no sequence classifier (its config.json names {config.get('architectures')}). Give the "
            "folder of a tuned model."
        )
    if labels is None:
        labels = _labels_of(config)
    return Adaptation(folder, "full", labels, base, checkpoint)


def _labels_of(config: dict[str, Any]) -> tuple[str, ...] | None:
    names = config.get("id2label") or {}
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    placeholders = tuple(f"LABEL_{i}" for i in range(len(labels)))
    return labels if labels and labels != placeholders else None


def _check_adapter_config(folder: Path) -> None:
    config = _read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: a PEFT module of type {config.get('peft_type')}; only LORA is supported.")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGING_INITS):
        raise CheckpointError(
            f"{folder}: a LoRA initialised by {init!r}, which changed its base's weights. Convert it to a plain LoRA "
            "first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)."
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object.")
    return content
