"""Checkpoints under the canonical names of their transformers classes, without tied duplicates."""

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

CLASS_TABLES = (
    "MASKED_LM",
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "PRETRAINING",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
)
"""transformers' tables of classes, in the order in which they are tried: classes of pre-training first."""


def class_name(checkpoint: Mapping[str, torch.Tensor], config: PretrainedConfig) -> str:
    """Return the transformers class that the config names, or else the class that has the most of the tensors.

    Args:
        checkpoint: The stored tensors, under any names that transformers loads.
        config: The config, which may name no class, an unknown class or the body.

    Returns:
        The name of the class; empty for the body.

    Raises:
        CheckpointError: transformers cannot build the class that the config names.
    """
    import transformers.models.auto.modeling_auto as auto

    declared = (config.architectures or [""])[0]
    body = architecture_of(config)
    if type(architecture_of(config, declared).model) is not type(body.model):
        return declared
    tables = (getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in CLASS_TABLES)
    num_identified = {"": _count_identified(checkpoint, body)}
    for name in dict.fromkeys(str(table.get(config.model_type)) for table in tables):
        if max(num_identified.values()) == len(checkpoint):
            break
        with contextlib.suppress(CheckpointError):
            num_identified[name] = _count_identified(checkpoint, architecture_of(config, name))
    return max(num_identified, key=lambda name: num_identified[name])


def named_tensors(checkpoint: Checkpoint, config: PretrainedConfig) -> NamedTensors:
    """Return a checkpoint under the canonical names of its transformers class.

    Obsolete buffers and tied duplicates are left out. Tensors that are unknown to the class keep their stored names.

    Args:
        checkpoint: The stored tensors, under any names that transformers loads.
        config: The config that was saved with the tensors.

    Returns:
        The tensors, which are read on access.

    Raises:
        CheckpointError: transformers cannot build the class, the class has none of the tensors, or a tensor is stored
            twice.
    """
    model = architecture_of(config, class_name(checkpoint, config))
    body = architecture_of(config)
    prefix = f"{model.prefix}." if any(name.startswith(f"{model.prefix}.") for name in model.stored) else ""

    def key_of(name: str) -> str:
        return body.identify(name) or name

    if not (any(map(body.identify, checkpoint)) or any(map(model.identify, checkpoint))):
        raise body.unrelated_checkpoint_error(checkpoint)
    stored_names: dict[str, str] = {}
    for stored in sorted(checkpoint, key=model.is_tied):  # tied tensors last
        body_name = body.identify(stored)
        name: str | None = model.identify(stored)
        if name is None and body_name:
            name = prefix + body_name
        elif name is None and not BUFFER.search(stored):
            name = stored
        if name in stored_names and model.is_tied(stored):
            if are_equal(checkpoint, stored_names[name], checkpoint, stored):
                continue
            name = stored  # transformers does not tie tensors that differ in the checkpoint
        if name in stored_names:
            raise CheckpointError(
                f"{checkpoint.path}: stores the same tensor as {stored_names[name]!r} and {stored!r}. Load it with "
                "transformers and call save_pretrained."
            )
        if name:
            stored_names[name] = stored
    specs = {
        name: TensorSpec(dtype_of(checkpoint, stored), shape_of(checkpoint, stored), ((checkpoint, stored),))
        for name, stored in sorted(stored_names.items())
    }
    keys = {name: name if model.is_tied(name) else key_of(name) for name in specs}
    ties = {tied: key_of(str(model.identify(tied))) for tied in model.ties}
    expected = {key_of(name) for name in model.stored if not model.is_tied(name)}
    return NamedTensors(specs, keys, ties, expected, lambda: model.token_tensors, model.embeddings)


def class_of(checkpoint: Checkpoint) -> Architecture:
    """Return the architecture of a checkpoint's transformers class.

    Args:
        checkpoint: A transformers folder's checkpoint.

    Raises:
        CheckpointError: transformers cannot read the config, or cannot build the class.
    """
    config = read_config(checkpoint)
    return architecture_of(config, class_name(checkpoint, config))


def name_consistently(
    checkpoints: Mapping[str, Checkpoint],
) -> tuple[dict[str, Mapping[str, torch.Tensor]], str | None]:
    """Return checkpoints under their canonical names; under their stored names if any has no transformers class.

    Args:
        checkpoints: The checkpoints by role, such as `old` and `tuned`.

    Returns:
        The tensors by role; and the reason if they have their stored names, otherwise None.

    Raises:
        CheckpointError: A config contradicts its tensors, or a tensor is stored twice.
    """
    from transformers import CONFIG_MAPPING

    tensors_by_role: dict[str, Mapping[str, torch.Tensor]] = {}
    for role, checkpoint in checkpoints.items():
        reason = None
        if checkpoint.path.is_file() or not (checkpoint.path / "config.json").is_file():
            reason = "there is no config.json"
        else:
            model_type = read_json(checkpoint.path / "config.json").get("model_type")
            if str(model_type) not in CONFIG_MAPPING:
                reason = f"transformers has no model of type {model_type!r:.80}"
        if reason:
            return dict(checkpoints), f"{checkpoint.path}: {reason}, so tensors are paired by their stored names"
        tensors_by_role[role] = named_tensors(checkpoint, read_config(checkpoint))
    return tensors_by_role, None


def _count_identified(checkpoint: Mapping[str, torch.Tensor], architecture: Architecture) -> int:
    """Count the stored tensors that a class has or ignores."""
    return sum(bool(architecture.identify(name) or BUFFER.search(name)) for name in checkpoint)
