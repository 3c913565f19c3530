"""Whether tuned weights belong to a base, told from names, shapes and settings alone, before any number is read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from regraft.architecture import BUFFER, architecture_of
from regraft.base import body_names
from regraft.checkpoint import FLOATING
from regraft.errors import CheckpointError, MismatchError
from regraft.naming import class_of
from regraft.transformers_folder import read_config
from regraft.weights import is_optional

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base

# settings of a model that change what it computes, and the shape of no tensor
COMPUTING = re.compile(
    r"heads$|^n_head$|head_dim|^(hidden_)?act(ivation)?(_fn|_function)?$|eps(ilon)?$|^rope_|rotary|position_embedding|"
    r"sliding|attention_window|soft_?cap|multiplier|scal(e|ing)|^is_decoder$"
)
# settings that classes of transformers 5 ignore, with the value of what they now do
NEUTRAL = {"position_embedding_type": "absolute"}
# settings that transformers 5 reads into `rope_parameters`, by the name that they have in it
ROTARY = {
    "rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor", "rope_scaling": None,
}  # fmt: skip


def check_body(adaptation: Adaptation, base: Base) -> None:
    """Refuse a full fine-tune whose body has other tensors than its base, or another size.

    Args:
        adaptation: A full fine-tune.
        base: Its base.

    Raises:
        MismatchError: A tensor of one has no counterpart in the other, or another shape there.
    """
    tuned, body = adaptation.checkpoint, base.body
    for name in body_names(tuned, architecture_of(config_of(adaptation))).values():
        if base.architecture.identify(name) is None:
            raise MismatchError(
                f"{adaptation.path}: tensor {name!r} has no counterpart in {base.path}. Was it tuned on that base?"
            )
    inner_names = body_names(tuned, base.architecture)
    for inner, name in inner_names.items():
        if inner not in body and not is_optional(inner):
            raise MismatchError(
                f"{adaptation.path}: tensor {name!r} has no counterpart in {base.path}. Was it tuned on that base?"
            )
        if inner not in body or base.checkpoint.tensors[body[inner]].shape == tuned.tensors[name].shape:
            continue
        if inner not in base.architecture.by_token:  # those are matched by token
            raise MismatchError(
                f"{adaptation.path}: tensor {name!r} has shape {tuned.tensors[name].shape}, in {base.path} it has "
                f"{base.checkpoint.tensors[body[inner]].shape}. Was it tuned on that base?"
            )
    lost = sorted(inner for inner in body if inner not in inner_names and not is_optional(inner))
    if lost:
        raise MismatchError(
            f"{adaptation.path}: {len(lost)} tensors of {base.path} are not in it (or not as floating-point numbers): "
            f"{', '.join(lost[:4])}. Was it tuned on that base?"
        )


def check_computation(adaptation: Adaptation, base: Base) -> None:
    """Refuse a full fine-tune whose `config.json` would have its body compute otherwise than its base does.

    Args:
        adaptation: A full fine-tune.
        base: Its base.

    Raises:
        CheckpointError: transformers cannot read the config.
        MismatchError: A setting differs that no tensor's shape tells of, as the number of attention heads.
    """
    if differing := differing_settings(config_of(adaptation), adaptation.path, base.config, base.path):
        raise MismatchError(
            f"{adaptation.path}/config.json does not go with {base.path}: {'; '.join(differing[:4])}. The same weights "
            "would compute something else. Was it tuned on that base?"
        )


def differing_settings(config: PretrainedConfig, folder: Path, other: PretrainedConfig, beside: Path) -> list[str]:
    """Say in which settings two configs would have the same weights compute something else.

    Args:
        config: A config.
        folder: The folder it is in.
        other: The config that it is compared with.
        beside: The folder of that one.

    Returns:
        A phrase for each setting.

    Raises:
        MismatchError: One of them has a setting that transformers no longer reads.
    """
    tuned, own = config.to_dict(), other.to_dict()
    ignored = _ignored_settings(config, folder) | _ignored_settings(other, beside)
    return [
        f"{key} is {tuned.get(key)!r:.80}, not {own.get(key)!r:.80}"
        for key in sorted(tuned.keys() | own.keys())
        if COMPUTING.search(key) and key not in ignored and tuned.get(key) != own.get(key)
    ]


def config_of(adaptation: Adaptation) -> PretrainedConfig:
    """Read the `config.json` of a full fine-tune with the defaults that it leaves out.

    Args:
        adaptation: A full fine-tune.

    Returns:
        Its config.

    Raises:
        CheckpointError: Transformers cannot read it.
    """
    return read_config(adaptation.checkpoint)


def check_unplaced_tensors(adaptation: Adaptation, base: Base) -> None:
    """Refuse a full fine-tune that stores a tensor twice or under a name that transformers only guesses.

    Args:
        adaptation: A full fine-tune.
        base: Its base.

    Raises:
        CheckpointError: A tensor beside the body is none of the head.
    """
    head = class_of(adaptation.checkpoint)
    strays, taken = [], set()
    for name, info in adaptation.checkpoint.tensors.items():
        parameter = head.identify(name)
        if parameter is None:
            if BUFFER.search(name) or is_optional(base.architecture.identify(name) or ""):
                continue
            strays.append(name)
        elif parameter in taken or info.dtype not in FLOATING:
            strays.append(name)
        taken.add(parameter)
    if strays:
        raise CheckpointError(
            f"{adaptation.path}: {len(strays)} tensors are without a place of their own in the model, or are no "
            f"floating-point numbers: {', '.join(strays[:4])}. Load it with transformers and call save_pretrained."
        )


def _ignored_settings(config: PretrainedConfig, folder: Path) -> set[str]:
    """Name the settings that a config's class ignores, where they say what the class does anyway.

    Args:
        config: As transformers read it.
        folder: The folder it is in.

    Returns:
        Their names.

    Raises:
        MismatchError: One of them says otherwise: the weights were trained in a model that transformers no longer has.
    """
    settings = config.to_dict()
    known = type(config)().to_dict()
    rotary = settings.get("rope_parameters") or {}
    ignored = set()
    for key in settings.keys() - known.keys():
        value = settings[key]
        if key in NEUTRAL and value not in (None, NEUTRAL[key]):
            raise MismatchError(
                f"{folder}/config.json: {key} is {value!r:.80}, which transformers no longer reads: its class today "
                f"computes what {NEUTRAL[key]!r} means, and these weights were not trained for that."
            )
        if key in NEUTRAL or value is None or (key in ROTARY and value in (rotary, rotary.get(ROTARY[key]))):
            ignored.add(key)
    return ignored | {key for key in NEUTRAL if key not in known}
