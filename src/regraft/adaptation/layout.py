"""The updates that the tensors of a LoRA make to the parameters of its model, found with PEFT on the meta device."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import (
    A_SUFFIX,
    ADAPTER_NAME,
    B_SUFFIX,
    MAGNITUDE_SUFFIX,
    PEFT_PREFIX,
    TOKEN_ROWS_SUFFIX,
)
from regraft.adaptation.update import Bias, Experts, Factors, ReplacedModule, Rows, Update
from regraft.checkpoint import dtype_of, shape_of, torch_dtype
from regraft.errors import MAX_LISTED, CheckpointError, MismatchError
from regraft.progress import quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from regraft.architecture import Architecture
    from regraft.checkpoint.derived import Tensors

# with `bias`, PEFT stores the biases of a fully tuned module a second time under such names
NESTED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.(?=[^.]+\.)")
WRAPPERS = {"base_layer", "original_module", "token_adapter", "modules_to_save"}
"""The parts that PEFT's wrappers add to names of modules and tensors."""
# stored factors are read without them; some need the base's weights, and `megatron_core` makes PEFT import a module
TRAINING_SETTINGS = {
    "init_lora_weights",
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "runtime_config",
}
"""The settings of initialisation and training."""
OBSOLETE_SETTINGS = {"merge_weights", "enable_lora"}
"""Settings of old versions of PEFT that the installed one lacks: `merge_weights` changes no output, and a LoRA with
`enable_lora` differs in shape and is refused."""
UNSWAPPED_SINCE = (0, 19)
"""The version of PEFT before which A and B of target_parameters of three dimensions were exchanged."""


def resolve_updates(
    adapter: Tensors, config: Mapping[str, Any], architecture: Architecture
) -> tuple[Tensors, dict[str, Update]]:
    """Return the updates that a LoRA makes to the parameters of its model.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.
        architecture: The architecture of the model that the LoRA was tuned on.

    Returns:
        The adapter's tensors as PEFT converts them on loading (separate experts become fused ones), and the updates by
        the parameters' names in memory.

    Raises:
        CheckpointError: PEFT cannot add the adapter to the model, a setting is unknown or invalid, the LoRA updates a
            layer that cannot be merged, or tensors are missing or unexpected.
        MismatchError: A tensor differs in shape from the model's.
    """
    from peft import get_peft_model_state_dict

    class_name = type(architecture.model).__name__
    tuned, adapter = _attach(adapter, config, architecture)
    expected = get_peft_model_state_dict(tuned, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    if absent := sorted(expected.keys() - adapter.keys()):
        raise CheckpointError(
            f"the LoRA lacks {len(absent)} tensors of a {class_name} that its config tunes: "
            f"{', '.join(absent[:MAX_LISTED])}. It is incomplete, or was tuned on another base."
            f"{adapter_name_hint(adapter)}"
        )
    updates = _updates_of_modules(tuned, adapter, config)
    unplaced = _add_replacements(updates, adapter, architecture)
    if biasless := sorted(updates.keys() - architecture.parameters.keys()):
        raise CheckpointError(
            f"the LoRA adds biases to {len(biasless)} layers of a {class_name} that have none "
            f"({', '.join(biasless[:MAX_LISTED])}). PEFT does not merge it either: serve it as an adapter."
        )
    _check_values(updates, architecture)
    if unplaced:
        remedy = "" if config.get("task_type") else " If it has a head, write its task_type into adapter_config.json."
        if any(".lora_" in name for name in unplaced):
            remedy = (
                " PEFT does not merge them either, such as those of a tied module that is tuned twice: serve it as an "
                "adapter."
            )
        raise CheckpointError(
            f"{len(unplaced)} tensors of the LoRA are unexpected in a {class_name}, and would be ignored: "
            f"{', '.join(unplaced[:MAX_LISTED])}.{remedy}"
        )
    _check_shapes(adapter, expected, updates, architecture)
    return adapter, updates


def adapter_name_hint(names: Iterable[str]) -> str:
    """Return a remedy if names of tensors contain the adapter's name, as in a model's state but not in PEFT's files.

    Args:
        names: The names of an adapter's tensors.

    Returns:
        A sentence with a leading space, or an empty text.
    """
    example = next((name for name in names if f".{ADAPTER_NAME}." in name), None)
    if example is None:
        return ""
    return (
        f" Its tensors' names contain the adapter's name, such as {example!r}, and PEFT would not load them: remove "
        f"`.{ADAPTER_NAME}` from them, or save it with save_pretrained of PEFT."
    )


def peft_lora_config(config: Mapping[str, Any]) -> Any:
    """Return PEFT's config of a LoRA, without settings of initialisation and training.

    Args:
        config: The content of `adapter_config.json`.

    Raises:
        CheckpointError: PEFT cannot read it, or does not know a setting.
    """
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - {"peft_type"}
    unknown = sorted(
        key for key, value in config.items() if value and key not in fields | OBSOLETE_SETTINGS | {"peft_type"}
    )
    if unknown:
        raise CheckpointError(
            f"the LoRA's adapter_config.json: the settings {', '.join(unknown[:MAX_LISTED])} are unknown to the "
            "installed PEFT, and would be ignored. Update PEFT, or remove them if they have no effect."
        )
    settings = {key: copy.deepcopy(config[key]) for key in config if key in fields - TRAINING_SETTINGS}
    try:
        return LoraConfig(**settings, inference_mode=True)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the LoRA's adapter_config.json: PEFT cannot read it ({error}).") from error


def convert_as_peft(adapter: Tensors, tuned: Any) -> Tensors:
    """Return a LoRA's tensors as PEFT converts them on loading: those of separate experts become those of fused ones.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        tuned: PEFT's model with the adapter.

    Returns:
        The tensors by the names under which PEFT stores them now; `adapter` itself if there is nothing to convert.
    """
    import torch
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert

    config = tuned.peft_config[ADAPTER_NAME]
    shapes = {
        name: torch.empty(shape_of(adapter, name), dtype=torch_dtype(dtype_of(adapter, name)), device="meta")
        for name in adapter
    }
    if convert(tuned, config, shapes, ADAPTER_NAME).keys() == adapter.keys():
        return adapter
    factors = {name: adapter[name] for name in adapter if ".lora_" in name}
    remaining = {name: adapter[name] for name in adapter if name not in factors}
    converted: dict[str, torch.Tensor] = convert(tuned, config, factors, ADAPTER_NAME)
    return remaining | converted


def _attach(adapter: Tensors, config: Mapping[str, Any], architecture: Architecture) -> tuple[Any, Tensors]:
    """Put an adapter on its class on the meta device, and return PEFT's model and the adapter's tensors as loaded."""
    from peft import get_peft_model

    lora_config = peft_lora_config(config)
    for key in ("r", "lora_alpha"):
        if key in config and type(config[key]) not in (int, float):
            raise CheckpointError(
                f"the LoRA's adapter_config.json: {key} is {config[key]!r:.80}. Correct it to a number."
            )
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of settings that it corrects for a layer's type
        try:
            model = copy.deepcopy(architecture.model)
            tuned: Any = get_peft_model(model, lora_config, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
            return tuned, convert_as_peft(adapter, tuned)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError, re.error) as error:
            raise CheckpointError(
                f"PEFT cannot put the LoRA on a {type(architecture.model).__name__} ({str(error).strip()[:300]}). "
                "Was it tuned on another base?"
            ) from error


def _updates_of_modules(tuned: Any, adapter: Tensors, config: Mapping[str, Any]) -> dict[str, Update]:
    """Return the updates that PEFT's wrappers make to the parameters of their modules."""
    modules = dict(tuned.base_model.model.named_modules())
    updates: dict[str, Update] = {}
    for path, module in modules.items():
        updates |= _updates_of(path, module, adapter, config)
        tied = getattr(getattr(module, "token_adapter", None), "tied_adapter", None)
        if tied is not None:  # rows of a tied output layer are stored with the embeddings
            owner = next(name for name, candidate in modules.items() if candidate is tied)
            operands = (f"{PEFT_PREFIX}{owner}{TOKEN_ROWS_SUFFIX}",)
            parameter = f"{_name_without_wrappers(path)}.weight"
            updates[parameter] = dataclasses.replace(updates[parameter], operands=operands)
    return updates


def _add_replacements(updates: dict[str, Update], adapter: Tensors, architecture: Architecture) -> list[str]:
    """Add updates for stored tensors that replace the base's, and return the names of unexpected tensors."""
    used = {name for update in updates.values() for name in (update.weight, *update.operands) if name}
    unplaced = []
    for stored in sorted(adapter.keys() - used):
        name = _name_without_wrappers(stored.removeprefix(PEFT_PREFIX))
        update = updates.get(name)
        has_rows = stored.endswith(TOKEN_ROWS_SUFFIX)
        if has_rows or ".original_module." in stored or ".modules_to_save." in stored:
            parameter = name.removesuffix(TOKEN_ROWS_SUFFIX) + ".weight" if has_rows else name
            if parameter not in updates:  # otherwise it is a duplicate
                unplaced.append(stored)
        elif name not in architecture.parameters or (update and update.weight) or ".lora_" in stored:
            unplaced.append(stored)
        else:
            updates[name] = dataclasses.replace(update or Update(), weight=stored)
    return unplaced


def _check_values(updates: Mapping[str, Update], architecture: Architecture) -> None:
    """Check that no scale is infinite or NaN, and that rows are valid and distinct."""
    for name, update in updates.items():
        if not math.isfinite(update.scale):
            raise CheckpointError(f"the LoRA's scaling of {name!r} is {update.scale}. Correct its lora_alpha.")
        outside = [row for row in update.rows if not 0 <= row < len(architecture.parameters[name])]
        if outside or len(set(update.rows)) < len(update.rows):
            raise CheckpointError(
                f"the LoRA's trainable_token_indices for {name!r} are not distinct rows of "
                f"{len(architecture.parameters[name]):,}: {(outside or sorted(update.rows))[:MAX_LISTED]}."
            )


def _updates_of(path: str, module: Any, adapter: Tensors, config: Mapping[str, Any]) -> dict[str, Update]:
    """Return the updates that PEFT's wrapper makes to the parameters of a module."""
    from peft.tuners import lora
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    stored = f"{PEFT_PREFIX}{path}"
    name = _name_without_wrappers(path)
    if isinstance(module, ModulesToSaveWrapper):
        parameters = module.modules_to_save[ADAPTER_NAME].state_dict()
        return {f"{name}.{parameter}": ReplacedModule((f"{stored}.{parameter}",)) for parameter in parameters}
    if isinstance(module, TrainableTokensWrapper):
        indices = module.token_adapter.token_indices[ADAPTER_NAME]
        rows = tuple(indices) if isinstance(indices, list | tuple) else (-1,)  # _check_values refuses it
        return {f"{name}.weight": Rows((f"{stored}.token_adapter{TOKEN_ROWS_SUFFIX}",), rows=rows)}
    if not isinstance(module, lora.LoraLayer):
        return {}
    if isinstance(module, ParamWrapper):
        a, b = stored + A_SUFFIX, stored + B_SUFFIX
        weight: Any = getattr(module.get_base_layer(), module.parameter_name)
        update = Factors((b, a), scale=module.scaling[ADAPTER_NAME])
        if weight.dim() == 3:
            transposed = not module._did_swap_in_out_features or _is_of_old_peft(module, adapter, (b, a), config)
            update = Experts((b, a), scale=module.scaling[ADAPTER_NAME], transposed=transposed)
        return {f"{name}.{module.parameter_name}": update}
    suffixes = (B_SUFFIX, A_SUFFIX)
    if isinstance(module, lora.Embedding):
        suffixes = (".lora_embedding_B", ".lora_embedding_A")
    elif not isinstance(module, lora.Linear):
        raise CheckpointError(
            f"module {name!r} of the LoRA is a {type(module.get_base_layer()).__name__}, but regraft merges only "
            "linear layers, embeddings and experts. Merge it with PEFT: merge_and_unload."
        )
    operands = tuple(stored + suffix for suffix in suffixes)
    if module.use_dora[ADAPTER_NAME]:
        operands += (stored + MAGNITUDE_SUFFIX,)
    transposed = isinstance(module, lora.Embedding) or bool(module.fan_in_fan_out)
    factor_update = Factors(operands, scale=module.scaling[ADAPTER_NAME], transposed=transposed)
    updates: dict[str, Update] = {f"{name}.weight": factor_update}
    if module.lora_bias[ADAPTER_NAME]:
        updates[f"{name}.bias"] = Bias((f"{stored}.lora_B.bias",), scale=module.scaling[ADAPTER_NAME])
    return updates


def _is_of_old_peft(module: Any, adapter: Tensors, factors: tuple[str, str], config: Mapping[str, Any]) -> bool:
    """Return whether A and B of experts are exchanged, as in PEFT before 0.19."""
    if not config.get("target_parameters"):  # stored as separate experts, and already converted
        return False
    sizes = shape_of(adapter, factors[0])[0], shape_of(adapter, factors[1])[1]
    if module.in_features != module.out_features:
        return sizes == (module.in_features, module.out_features)
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.0"))
    return version is not None and (int(version[1]), int(version[2])) < UNSWAPPED_SINCE


def _check_shapes(
    adapter: Tensors, expected: Tensors, updates: Mapping[str, Update], architecture: Architecture
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for parameter, update in updates.items():
        shapes |= update.shapes(tuple(architecture.parameters[parameter].shape), shapes)
    differing = [
        f"{name} is {shape_of(adapter, name)}, expected {shape}"
        for name, shape in shapes.items()
        if shape_of(adapter, name) != shape
    ]
    if differing:
        listed = "; ".join(differing[:MAX_LISTED])
        raise MismatchError(
            f"{len(differing)} tensors of the LoRA do not fit the base: {listed}. Was it tuned on another base?"
        )


def _name_without_wrappers(path: str) -> str:
    path = NESTED_MODULE.sub(".", path)
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)
