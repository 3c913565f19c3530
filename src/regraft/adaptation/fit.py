"""Whether tuned weights belong to a base, told from names, shapes and settings alone, before any number is read."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adaptation import ADAPTER_CONFIG
from regraft.adaptation.layout import HARMLESS
from regraft.adaptation.patterns import check_patterns
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


def check_computing(adaptation: Adaptation, base: Base) -> None:
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


def check_beside_body(adaptation: Adaptation, base: Base) -> None:
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


def check_settings(adaptation: Adaptation, base: Base) -> None:
    """Refuse an adapter with settings that would be passed over, or that are not for a classifier of this size.

    Args:
        adaptation: Any but a full fine-tune.
        base: Its base.

    Raises:
        CheckpointError: The installed PEFT does not know a setting, or a number of virtual tokens is missing.
        MismatchError: It is for another task, or its virtual tokens are for another model.
    """
    config, where = adaptation.config, f"{adaptation.path}/{ADAPTER_CONFIG}"
    check_patterns(config, [f"{base.prefix}.{name}" for name, _ in base.bare.named_modules()], where)
    known, virtual = _known(adaptation.kind, str(config.get("peft_type")))
    unknown = sorted(key for key, value in config.items() if value and key not in known and key not in HARMLESS)
    if unknown:
        told = ", ".join(f"{key}: {config[key]!r:.60}" for key in unknown[:4])
        raise CheckpointError(
            f"{where}: the settings {told} are not known for a {adaptation.kind}, and would be passed over: what was "
            "tuned with them would be another model without. Update PEFT or regraft, or correct or remove them."
        )
    if config.get("task_type") != "SEQ_CLS" and (virtual or config.get("task_type") is not None):
        raise MismatchError(
            f"{where}: task_type is {config.get('task_type')!r}, and only classifiers of whole texts (SEQ_CLS) can be "
            "recycled. If it is one, correct that."
        )
    if not virtual:
        return
    if not config.get("num_virtual_tokens"):
        raise CheckpointError(f"{where}: num_virtual_tokens is missing.")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise MismatchError(f"{where}: num_transformer_submodules is not 1: it is not for a classifier.")
    layers = config.get("num_layers")
    if layers not in (None, base.config.num_hidden_layers):  # PEFT would drop what is for the others
        raise MismatchError(
            f"{adaptation.path}: was made for a model of {layers} layers, {base.path} has "
            f"{base.config.num_hidden_layers}: tensors would be left without a place."
        )
    heads = getattr(base.config, "num_key_value_heads", None) or base.config.num_attention_heads
    if adaptation.kind == "prefix" and config.get("num_attention_heads") not in (None, heads):
        raise MismatchError(
            f"{where}: num_attention_heads is {config['num_attention_heads']!r}, and keys and values of {base.path} "
            f"have {heads} heads. Was it tuned on that base?"
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


def _known(kind: str, peft_type: str) -> tuple[set[str], bool]:
    """Name the settings of a kind of adapter, and tell whether it has virtual tokens."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from regraft.adaptation.bottleneck import BottleneckConfig

    config: Any = BottleneckConfig if kind == "bottleneck" else PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]  # type: ignore[index]
    known = {field.name for shape in (config, PeftConfig) for field in dataclasses.fields(shape)}
    return known, "num_virtual_tokens" in known
