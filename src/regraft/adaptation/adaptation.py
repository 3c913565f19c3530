"""What tuning left behind, whatever its kind: a full fine-tune, a PEFT module or bottleneck adapters, with a head."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regraft.adaptation.record import RECORD, agreed_labels, configured_labels, recorded
from regraft.checkpoint import Checkpoint, check_plain, fingerprint, read_json, write_atomic
from regraft.errors import CheckpointError, MismatchError
from regraft.transformers_folder import read_tokenizer
from regraft.vocabulary import has_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from regraft.base import Base

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
SHORT_NAMES = {"prefix_tuning": "prefix", "prompt_tuning": "prompt", "p_tuning": "p-tuning", "ln_tuning": "layernorm"}
Lineage = Literal["proven", "unproven", "forced"]


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Weights tuned for a task on some base, on disk.

    Args:
        path: A plain transformers folder (full fine-tune) or PEFT folder (all other kinds).
        kind: `full`, `lora`, `ia3`, `prefix`, `prompt`, `layernorm`, `bottleneck`, or PEFT's name of another type.
        labels: The label names in the order of the head's outputs; None if the folder does not tell.
        base: The fingerprint of the base it was tuned on; None if it was made elsewhere.
        checkpoint: Its tensors, unread.
        config: The content of its `config.json` or `adapter_config.json`.
    """

    path: Path
    kind: str
    labels: tuple[str, ...] | None
    base: str | None
    checkpoint: Checkpoint
    config: dict[str, Any] = dataclasses.field(repr=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Which weights these are."""
        return fingerprint(self.checkpoint)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its own tokenizer, which may have tokens that its base's has not; None if its folder holds none."""
        return read_tokenizer(self.path) if has_tokenizer(self.path) else None

    @property
    def changed_base(self) -> bool:
        """Whether its start was taken out of its base, as PiSSA's: it means nothing without that base."""
        init = str(self.config.get("init_lora_weights", True)).lower()
        return self.kind == "lora" and init.startswith(BASE_CHANGING_INITS)

    @property
    def virtual_tokens(self) -> int:
        """How many tokens it puts before every input."""
        return int(self.config.get("num_virtual_tokens") or 0) if self.kind != "full" else 0

    def check_base(self, base: Base, *, force: bool = False) -> Lineage:
        """Refuse a base that is not the one this was tuned on.

        Args:
            base: The base in hand.
            force: Take it in spite of that.

        Returns:
            `proven` if the recorded fingerprint is the base's, `unproven` if none is recorded, `forced` if it is
            another one and that was wanted.

        Raises:
            MismatchError: The recorded fingerprint is another one, or the revision is.
        """
        if self.base in (base.fingerprint, base.stored_fingerprint):
            return "proven"
        problem = None
        name, _, revision = base.name.partition("@")
        recorded = str(self.config.get("revision") or "")
        if self.base and base.made_from == self.base:
            problem = (
                f"it was tuned on the base that {base.path} was pre-trained from: give {base.path} as the new base"
            )
        elif self.base:
            problem = f"it records the base {self.base}, and this one is {base.fingerprint}"
        elif recorded and revision and recorded != revision and self.config.get("base_model_name_or_path") == name:
            problem = f"it records revision {recorded} of {name}, and this is {revision}"
        if problem and not force:
            raise MismatchError(
                f"{self.path} was not tuned on {base.path}: {problem}. Give the base it was tuned on (or --force)."
            )
        if problem:
            logger.warning("%s was not tuned on %s: %s. Used by force.", self.path, base.path, problem)
            return "forced"
        logger.warning("%s does not record its base: that it was tuned on %s is unproven.", self.path, base.path)
        return "unproven"


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
        if own := [name for name in (ADAPTER_CONFIG, "config.json") if (folder / name).is_file()]:
            raise CheckpointError(
                f"{folder}: holds {own[0]} and a folder adaptation/ too: which of them was tuned? Give that one alone."
            )
        folder = folder / "adaptation"
    if not folder.is_dir():
        remedy = f"is a file. Give its folder, {folder.parent}" if folder.is_file() else "no such folder"
        raise CheckpointError(f"{path}: {remedy}.")
    labels, base = recorded(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        config = read_json(folder / ADAPTER_CONFIG)
        _check_adapter(folder, config)
        checkpoint = Checkpoint.open(folder / ADAPTER_WEIGHTS)
        _check_sizes(checkpoint, config, folder / ADAPTER_CONFIG)
        return Adaptation(folder, _kind_of(config, folder), labels, base, checkpoint, config)
    below = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if below and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds no adapter, but folders that do: {', '.join(below[:4])}. PEFT saves an adapter that has "
            f"a name in a folder of that name. Give {folder / below[0]}."
        )
    checkpoint = Checkpoint.open(folder)
    expected = ADAPTER_CONFIG if (folder / ADAPTER_WEIGHTS).is_file() else "config.json"
    if not (folder / expected).is_file():
        raise CheckpointError(f"{folder}: holds no {expected}. Copy the one that was saved with these weights.")
    config = read_json(folder / "config.json")
    check_plain(folder, checkpoint.tensors)
    _check_classifier(folder, config)
    labels = agreed_labels(labels, configured_labels(config, folder), folder)
    return Adaptation(folder, "full", labels, base, checkpoint, config)


def write_lineage(folder: Path, base: Base, labels: Sequence[str] | None) -> None:
    """Write beside an adaptation's tensors what neither transformers nor PEFT records: its base and its labels.

    Args:
        folder: The adaptation's folder.
        base: The base it lives on.
        labels: The label names, in the order of the head's outputs; None if unknown.
    """
    record = {
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "labels": list(labels) if labels is not None else None,
    }
    write_atomic(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _kind_of(config: dict[str, Any], folder: Path) -> str:
    from peft.utils import PeftType

    kind = str(config.get("peft_type"))
    if kind != "BOTTLENECK" and kind not in {member.value for member in PeftType}:
        raise CheckpointError(
            f"{folder}/{ADAPTER_CONFIG}: is of type {kind}, which the installed PEFT does not know. Is PEFT too old?"
        )
    return SHORT_NAMES.get(kind.lower(), kind.lower())


def check_peft(folder: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter that is none of PEFT's, or that has PEFT run code that it names.

    Args:
        folder: The adapter's folder.
        config: The content of its `adapter_config.json`.

    Raises:
        CheckpointError: It is; the message says what it is and what to do.
    """
    where = f"{folder}/{ADAPTER_CONFIG}"
    if config.get("peft_type") is None:
        if isinstance(config.get("config"), dict | str) or "model_class" in config:
            raise CheckpointError(
                f"{where}: is of an adapter of the adapters library (AdapterHub, adapter-transformers), which has no "
                "peft_type. Neither PEFT nor regraft reads these: tune it anew (regraft tune --kind bottleneck or "
                "pfeiffer are the same kind), or merge it there and give the merged model."
            )
        raise CheckpointError(
            f"{where}: has no peft_type, so it is no adapter of PEFT. Was it saved by save_pretrained?"
        )
    if config.get("megatron_config"):
        raise CheckpointError(
            f"{where}: megatron_config has PEFT import {config.get('megatron_core')!r:.80}, and no code that a "
            "checkpoint names is run. Merge it where it was tuned, and give the merged model."
        )


def _check_sizes(checkpoint: Checkpoint, config: dict[str, Any], file: Path) -> None:
    """Refuse sizes that no stored tensor has, before PEFT makes room for them."""
    largest = max((size for info in checkpoint.tensors.values() for size in info.shape), default=0)
    ranks = config.get("rank_pattern")
    sizes = {name: config.get(name) for name in ("r", "num_virtual_tokens")} if config["peft_type"] != "LOKR" else {}
    for name, size in [*sizes.items(), *(ranks.items() if isinstance(ranks, dict) else ())]:
        if type(size) is int and size > max(largest, 1024):
            raise CheckpointError(f"{file}: {name} is {size:,}, and no stored tensor has more than {largest:,} rows.")


def _check_adapter(folder: Path, config: dict[str, Any]) -> None:
    check_peft(folder, config)
    if strangers := sorted(entry.name for entry in folder.glob("model*.safetensors*")):
        raise CheckpointError(
            f"{folder}: holds an adapter and a whole model too ({', '.join(strangers[:4])}): which of them was "
            "tuned? Keep them in folders of their own."
        )
    shards = sorted(e.name for e in folder.glob("adapter_model*.safetensors*") if e.name != ADAPTER_WEIGHTS)
    if shards:
        raise CheckpointError(
            f"{folder}: holds {', '.join(shards[:4])}, and an adapter is one file, {ADAPTER_WEIGHTS}, of which PEFT "
            "would read that alone. Load it with what saved it and call save_pretrained of PEFT."
        )
    virtual = config.get("num_virtual_tokens")
    if virtual is not None and (type(virtual) is not int or virtual < 1):
        raise CheckpointError(f"{folder}/{ADAPTER_CONFIG}: num_virtual_tokens is {virtual!r}, not a number from 1.")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
        raise CheckpointError(
            f"{folder}: has no {ADAPTER_WEIGHTS} beside its {ADAPTER_CONFIG}. "
            + (
                f"{pickles[0]} is a pickle, which can run code and is not read: if you trust it, load it with PEFT and "
                "call save_pretrained."
                if pickles
                else "Fetch the whole folder again, or call save_pretrained of PEFT once more."
            )
        )


def _check_classifier(folder: Path, config: dict[str, Any]) -> None:
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures) or not all(
        "SequenceClassification" in str(name) for name in architectures
    ):
        raise CheckpointError(
            f"{folder}: is no sequence classifier (its config.json names {architectures}). Give the folder of a tuned "
            "model."
        )
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise CheckpointError(
            f"{folder}: was tuned for {config['problem_type']!r}, and only one label a text can be recycled."
        )
