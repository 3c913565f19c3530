"""Checkpoints under the names that their transformers classes write, every tensor once."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from regraft.architecture import BUFFER, Architecture, architecture_of
from regraft.checkpoint import TensorSpec, are_equal, dtype_of, read_json, shape_of
from regraft.errors import CheckpointError
from regraft.transformers_folder import read_config
from regraft.weights import NamedTensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PretrainedConfig

    from regraft.checkpoint import Checkpoint

# the classes that there are for a type of model, by transformers' tables: those that pre-training writes come first
TASKS = (
    "MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "PRETRAINING", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
)  # fmt: skip


def class_name(checkpoint: Mapping[str, torch.Tensor], config: PretrainedConfig) -> str:
    """Name the transformers class of a checkpoint: the one with a head that its config names, or that has most of it.

    Args:
        checkpoint: The stored tensors.
        config: The config beside them, which may name no class, none of transformers, or the bare body.

    Returns:
        The class; empty for the bare body.

    Raises:
        CheckpointError: Transformers cannot build the class that the config names.
    """
    import transformers.models.auto.modeling_auto as auto

    declared, body = (config.architectures or [""])[0], architecture_of(config)
    if type(architecture_of(config, declared).model) is not type(body.model):
        return declared
    tables = (getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS)
    most = {"": _count(checkpoint, body)}
    for name in dict.fromkeys(str(table.get(config.model_type)) for table in tables):
        if max(most.values()) == len(checkpoint):
            break
        with contextlib.suppress(CheckpointError):
            most[name] = _count(checkpoint, architecture_of(config, name))
    return max(most, key=lambda name: most[name])


def named(checkpoint: Checkpoint, config: PretrainedConfig) -> NamedTensors:
    """Present a checkpoint under the names that its transformers class writes, every tensor once.

    Buffers that no model has today are left out. What the class does not have otherwise keeps its stored name.

    Args:
        checkpoint: The stored tensors.
        config: The config beside them.

    Returns:
        The tensors, read when they are asked for.

    Raises:
        CheckpointError: Transformers cannot build the class, or it has none of the tensors, or one is stored twice.
    """
    head, body = architecture_of(config, class_name(checkpoint, config)), architecture_of(config)
    start = f"{head.prefix}." if any(name.startswith(f"{head.prefix}.") for name in head.stored) else ""

    def key_of(name: str) -> str:
        return body.identify(name) or name

    if not any(map(body.identify, checkpoint)) and not any(map(head.identify, checkpoint)):
        raise body.unrelated_checkpoint_error(checkpoint)
    sources: dict[str, str] = {}
    for stored in sorted(checkpoint, key=head.is_tied):  # a tensor before what is tied to it
        inner = body.identify(stored)
        name = head.identify(stored) or (start + inner if inner else None if BUFFER.search(stored) else stored)
        if name in sources and head.is_tied(stored):
            if are_equal(checkpoint, sources[name], checkpoint, stored):
                continue
            name = stored  # transformers ties no two tensors that differ in the checkpoint
        if name in sources:
            raise CheckpointError(
                f"{checkpoint.path}: stores {sources[name]!r} and {stored!r}, which are the same tensor. Load it with "
                "transformers and call save_pretrained."
            )
        if name:
            sources[name] = stored
    entries = {
        name: TensorSpec(dtype_of(checkpoint, stored), shape_of(checkpoint, stored), ((checkpoint, stored),))
        for name, stored in sorted(sources.items())
    }
    keys = {name: name if head.is_tied(name) else key_of(name) for name in entries}
    ties = {tied: key_of(str(head.identify(tied))) for tied in head.ties}
    expected = {key_of(name) for name in head.stored if not head.is_tied(name)}
    return NamedTensors(entries, keys, ties, expected, lambda: head.token_tensors, head.embeddings)


def class_of(checkpoint: Checkpoint) -> Architecture:
    """Build the class that a checkpoint's `config.json` names.

    Args:
        checkpoint: A transformers folder.

    Returns:
        The class on the meta device.

    Raises:
        CheckpointError: Transformers cannot read the config, or cannot build the class.
    """
    config = read_config(checkpoint)
    return architecture_of(config, class_name(checkpoint, config))


def name_consistently(sides: Mapping[str, Checkpoint]) -> tuple[dict[str, Mapping[str, torch.Tensor]], str | None]:
    """Present checkpoints under the names that their transformers classes write, or all as they are stored.

    Args:
        sides: The checkpoints, by what they are.

    Returns:
        The tensors of each side; and why stored names count, where a side is of no class that transformers has.

    Raises:
        CheckpointError: A config contradicts its tensors, or a tensor is stored twice.
    """
    from transformers import CONFIG_MAPPING

    views: dict[str, Mapping[str, torch.Tensor]] = {}
    for which, checkpoint in sides.items():
        if checkpoint.path.is_file() or not (checkpoint.path / "config.json").is_file():
            return dict(
                sides
            ), f"{checkpoint.path}: has no config.json beside it, so tensors are paired by their stored names"
        kind = read_json(checkpoint.path / "config.json").get("model_type")
        if str(kind) not in CONFIG_MAPPING:
            reason = f"transformers has no model of type {kind!r:.80}"
            return dict(sides), f"{checkpoint.path}: {reason}, so tensors are paired by their stored names"
        views[which] = named(checkpoint, read_config(checkpoint))
    return views, None


def _count(checkpoint: Mapping[str, torch.Tensor], architecture: Architecture) -> int:
    """Count the tensors that a class has or leaves out by intent."""
    return sum(bool(architecture.identify(name) or BUFFER.search(name)) for name in checkpoint)
