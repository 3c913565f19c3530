"""Checks by names, shapes and settings that a full fine-tune belongs to a base, without reading tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from regraft.architecture import BUFFER, architecture_of
from regraft.base import body_names
from regraft.checkpoint import FLOATING
from regraft.errors import MAX_LISTED, CheckpointError, MismatchError
from regraft.naming import class_of
from regraft.transformers_folder import read_config
from regraft.weights import is_optional

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base

COMPUTATION_SETTINGS = re.compile(
    r"heads$|^n_head$|head_dim|^(hidden_)?act(ivation)?(_fn|_function)?$|eps(ilon)?$|^rope_|rotary|position_embedding|"
    r"sliding|attention_window|soft_?cap|multiplier|scal(e|ing)|^is_decoder$"
)
"""Matches the settings that can change a model's outputs even if all its tensors stay the same."""
IGNORED_SETTINGS = {"position_embedding_type": "absolute"}
"""The settings that classes of transformers 5 may ignore, with the only value that these classes implement."""
ROTARY_SETTINGS = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
    "rope_scaling": None,  # equals all of `rope_parameters`
}
"""The settings that transformers 5 moves into `rope_parameters`, with their names in it."""


def check_body(adaptation: Adaptation, base: Base) -> None:
    """Check that the body of a full fine-tune has the tensors of a base, in their shapes.

    Tensors with a row per token may differ in shape, because their rows are matched by token.

    Args:
        adaptation: The full fine-tune.
        base: The old or the new base.

    Raises:
        CheckpointError: transformers cannot read the fine-tune's config.
        MismatchError: A tensor of one has no floating-point counterpart in the other, unless it belongs to a pooler; or
            the shapes differ.
    """
    tuned, body = adaptation.checkpoint, base.body
    no_counterpart = f"has no counterpart in {base.path}. Was it tuned on that base?"
    for name in body_names(tuned, architecture_of(read_tuned_config(adaptation))).values():
        if base.architecture.identify(name) is None:
            raise MismatchError(f"{adaptation.path}: tensor {name!r} {no_counterpart}")
    inner_names = body_names(tuned, base.architecture)
    for inner, name in inner_names.items():
        if inner not in body and not is_optional(inner):
            raise MismatchError(f"{adaptation.path}: tensor {name!r} {no_counterpart}")
        if inner not in body or base.checkpoint.tensors[body[inner]].shape == tuned.tensors[name].shape:
            continue
        if inner not in base.architecture.token_tensors:  # rows are matched by token
            raise MismatchError(
                f"{adaptation.path}: tensor {name!r} has shape {tuned.tensors[name].shape}, in {base.path} it has "
                f"{base.checkpoint.tensors[body[inner]].shape}. Was it tuned on that base?"
            )
    missing = sorted(inner for inner in body if inner not in inner_names and not is_optional(inner))
    if missing:
        raise MismatchError(
            f"{adaptation.path}: lacks {len(missing)} tensors of {base.path}, or does not store them as floating-point "
            f"numbers: {', '.join(missing[:MAX_LISTED])}. Was it tuned on that base?"
        )


def check_computation(adaptation: Adaptation, base: Base) -> None:
    """Check that the `config.json` of a full fine-tune makes its body compute as its base does.

    Args:
        adaptation: The full fine-tune.
        base: Its base.

    Raises:
        CheckpointError: transformers cannot read the config.
        MismatchError: A setting that `COMPUTATION_SETTINGS` matches differs, such as the number of attention heads, or
            has a value that transformers no longer supports.
    """
    if differing := differing_settings(read_tuned_config(adaptation), adaptation.path, base.config, base.path):
        raise MismatchError(
            f"{adaptation.path}/config.json differs from {base.path}'s: {'; '.join(differing[:MAX_LISTED])}. The same "
            "weights would compute something else. Was it tuned on that base?"
        )


def differing_settings(
    config: PretrainedConfig, folder: Path, reference: PretrainedConfig, reference_folder: Path
) -> list[str]:
    """Describe the settings with which two configs make the same weights compute something else.

    Args:
        config: A config.
        folder: The folder of `config`, for error messages.
        reference: The config that `config` is compared with.
        reference_folder: The folder of `reference`, for error messages.

    Returns:
        A phrase per differing setting.

    Raises:
        MismatchError: A setting of a config has a value that transformers no longer supports.
    """
    values, expected = config.to_dict(), reference.to_dict()
    ignored = _ignored_settings(config, folder) | _ignored_settings(reference, reference_folder)
    return [
        f"{key} is {values.get(key)!r:.80}, not {expected.get(key)!r:.80}"
        for key in sorted(values.keys() | expected.keys())
        if COMPUTATION_SETTINGS.search(key) and key not in ignored and values.get(key) != expected.get(key)
    ]


def read_tuned_config(adaptation: Adaptation) -> PretrainedConfig:
    """Read the config of a full fine-tune, completed by its class's defaults.

    Args:
        adaptation: The full fine-tune.

    Raises:
        CheckpointError: transformers cannot read the config.
    """
    return read_config(adaptation.checkpoint)


def check_unplaced_tensors(adaptation: Adaptation, base: Base) -> None:
    """Check that each stored tensor of a full fine-tune is a distinct floating-point parameter of its class.

    Obsolete buffers, and a pooler of the base that the class lacks, are allowed too.

    Args:
        adaptation: The full fine-tune.
        base: Its base.

    Raises:
        CheckpointError: A tensor is not a parameter of the class, is stored twice, or is not floating-point.
    """
    architecture = class_of(adaptation.checkpoint)
    unplaced = []
    parameters = set()
    for name, stored_tensor in adaptation.checkpoint.tensors.items():
        parameter = architecture.identify(name)
        if parameter is None:
            if BUFFER.search(name) or is_optional(base.architecture.identify(name) or ""):
                continue
            unplaced.append(name)
        elif parameter in parameters or stored_tensor.dtype not in FLOATING:
            unplaced.append(name)
        parameters.add(parameter)
    if unplaced:
        raise CheckpointError(
            f"{adaptation.path}: {len(unplaced)} tensors are not parameters of the model, are stored twice, or are not "
            f"floating-point: {', '.join(unplaced[:MAX_LISTED])}. Load it with transformers and call save_pretrained."
        )


def _ignored_settings(config: PretrainedConfig, folder: Path) -> set[str]:
    """Return the names of settings that a config's class ignores, and that describe its outputs correctly.

    Raises:
        MismatchError: An ignored setting contradicts the class, so the weights need a model that transformers lacks.
    """
    values = config.to_dict()
    defaults = type(config)().to_dict()
    rotary = values.get("rope_parameters") or {}
    ignored = set()
    for key in values.keys() - defaults.keys():
        value = values[key]
        if key in IGNORED_SETTINGS and value not in (None, IGNORED_SETTINGS[key]):
            raise MismatchError(
                f"{folder}/config.json: {key} is {value!r:.80}, which transformers no longer supports: its class now "
                f"computes {IGNORED_SETTINGS[key]!r}, for which these weights were not trained."
            )
        is_in_rotary = key in ROTARY_SETTINGS and value in (rotary, rotary.get(ROTARY_SETTINGS[key]))
        if key in IGNORED_SETTINGS or value is None or is_in_rotary:
            ignored.add(key)
    return ignored | {key for key in IGNORED_SETTINGS if key not in defaults}
