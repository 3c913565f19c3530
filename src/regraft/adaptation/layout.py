"""What each tensor of a LoRA does to which parameter of its model, as PEFT itself lays it out, without any weights."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import ADAPTER, START
from regraft.adaptation.update import Bias, Experts, Factors, ReplacedModule, Rows, Update
from regraft.checkpoint import dtype_of, shape_of, torch_dtype
from regraft.errors import CheckpointError, MismatchError
from regraft.progress import quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from regraft.architecture import Architecture

    Tensors = Mapping[str, torch.Tensor]

ROWS = "trainable_tokens_delta"
# with `bias`, PEFT stores those of a module of several layers that is saved as a whole a second time, by such names
NESTED = re.compile(r"\.modules_to_save\.[^.]+\.(?=[^.]+\.)")
WRAPPERS = {"base_layer", "original_module", "token_adapter", "modules_to_save"}  # what PEFT puts around a module
# settings of how a LoRA begins and trains, which change nothing once its tensors are there: some need the base's
# weights, and `megatron_core` has PEFT import whatever module it names
OF_TRAINING = {
    "init_lora_weights", "corda_config", "eva_config", "loftq_config", "lora_ga_config", "inference_mode",
    "megatron_config", "megatron_core", "runtime_config",
}  # fmt: skip
OBSOLETE_SETTINGS = {"merge_weights", "enable_lora"}  # what old PEFT wrote, whose value changed nothing
TURNED_UNTIL = (0, 19)  # the version of PEFT that exchanged A and B of target_parameters of three dimensions


def resolve_updates(
    adapter: Tensors, config: Mapping[str, Any], architecture: Architecture
) -> tuple[Tensors, dict[str, Update]]:
    """Find out what a LoRA does to each parameter of the model that it was tuned in.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        config: The content of `adapter_config.json`.
        architecture: The class that it was tuned in, of the sizes that it was tuned with.

    Returns:
        The adapter's tensors as PEFT converts them on loading (experts one by one become fused ones), and what is done
        with them, by the parameter's name in memory.

    Raises:
        CheckpointError: PEFT cannot put such an adapter on the class, or tensors are missing or without a place.
        MismatchError: A tensor has another shape than the model has room for.
    """
    from peft import get_peft_model_state_dict

    name_of = type(architecture.model).__name__
    tuned, adapter = _attach(adapter, config, architecture)
    expected = get_peft_model_state_dict(tuned, adapter_name=ADAPTER, save_embedding_layers=False)
    if absent := sorted(expected.keys() - adapter.keys()):
        raise CheckpointError(
            f"the LoRA tunes {len(absent)} tensors of a {name_of} that it does not hold: {', '.join(absent[:4])}. "
            f"Either it is not whole, or it is of another base.{adapter_name_hint(adapter)}"
        )
    updates = _updates_of_modules(tuned, adapter, config)
    strays = _add_stored_whole(updates, adapter, architecture)
    if without := sorted(updates.keys() - architecture.parameters.keys()):
        raise CheckpointError(
            f"the LoRA adds biases to {len(without)} layers that have none ({', '.join(without[:4])}): it is no change "
            f"of a {name_of}'s weights, and PEFT does not merge it either. Serve it beside its base."
        )
    _check_values(updates, architecture)
    if strays:
        remedy = "" if config.get("task_type") else " If it has a head, write its task_type into adapter_config.json."
        if any(".lora_" in name for name in strays):
            remedy = (
                " PEFT merges none of them either, as where a tied module is tuned twice: serve it beside its base."
            )
        raise CheckpointError(
            f"{len(strays)} tensors of the LoRA have no place in a {name_of} with it, and would be lost: "
            f"{', '.join(strays[:4])}.{remedy}"
        )
    _check_shapes(adapter, expected, updates, architecture)
    return adapter, updates


def adapter_name_hint(names: Iterable[str]) -> str:
    """Return what to do about names that hold the adapter's name, as a model's state has them and PEFT's files do not.

    Args:
        names: Of an adapter's tensors.

    Returns:
        A sentence after a space; nothing where no name is of that kind.
    """
    example = next((name for name in names if f".{ADAPTER}." in name), None)
    if example is None:
        return ""
    return (
        f" Its names hold the adapter's, as {example!r}, and PEFT would load none of these: take `.{ADAPTER}` out of "
        "them, or save it with save_pretrained of PEFT."
    )


def peft_settings(config: Mapping[str, Any]) -> Any:
    """Read how a LoRA is laid out.

    Args:
        config: The content of `adapter_config.json`.

    Returns:
        PEFT's config, without how the LoRA began.

    Raises:
        CheckpointError: PEFT cannot read it, or knows a setting no more or not yet.
    """
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig) if field.init} - {"peft_type"}
    strangers = sorted(
        key for key, value in config.items() if value and key not in fields | OBSOLETE_SETTINGS | {"peft_type"}
    )
    if strangers:
        raise CheckpointError(
            f"the LoRA's adapter_config.json: the settings {', '.join(strangers[:4])} are not known to the installed "
            "PEFT, and would be passed over. Update PEFT, or remove them if they change nothing."
        )
    own = {key: copy.deepcopy(config[key]) for key in config if key in fields - OF_TRAINING}
    try:
        return LoraConfig(**own, inference_mode=True)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the LoRA's adapter_config.json: PEFT cannot read it ({error}).") from error


def as_loaded_by_peft(adapter: Tensors, tuned: Any) -> Tensors:
    """Present a LoRA's tensors as PEFT converts them on loading: those of single experts become those of fused ones.

    Args:
        adapter: The tensors of `adapter_model.safetensors`.
        tuned: PEFT's model of the adapter.

    Returns:
        The tensors by the names that PEFT would store them under today; unread where nothing changes.
    """
    import torch
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert

    settings = tuned.peft_config[ADAPTER]
    shapes = {
        name: torch.empty(shape_of(adapter, name), dtype=torch_dtype(dtype_of(adapter, name)), device="meta")
        for name in adapter
    }
    if convert(tuned, settings, shapes, ADAPTER).keys() == adapter.keys():
        return adapter
    factors = {name: adapter[name] for name in adapter if ".lora_" in name}
    others = {name: adapter[name] for name in adapter if name not in factors}
    converted: dict[str, torch.Tensor] = convert(tuned, settings, factors, ADAPTER)
    return others | converted


def _attach(adapter: Tensors, config: Mapping[str, Any], architecture: Architecture) -> tuple[Any, Tensors]:
    """Put an adapter on the class, on the meta device."""
    from peft import get_peft_model

    settings = peft_settings(config)
    for key in ("r", "lora_alpha"):
        if type(value := config.get(key, 8)) not in (int, float):
            raise CheckpointError(f"the LoRA's {key} is {value!r:.80} in adapter_config.json, not a number.")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what it sets right by each layer's type
        try:
            model = copy.deepcopy(architecture.model)
            tuned: Any = get_peft_model(model, settings, adapter_name=ADAPTER, low_cpu_mem_usage=True)
            return tuned, as_loaded_by_peft(adapter, tuned)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError, re.error) as error:
            raise CheckpointError(
                f"PEFT cannot put the LoRA on a {type(architecture.model).__name__} ({str(error).strip()[:300]}). "
                "Is it of another base?"
            ) from error


def _updates_of_modules(tuned: Any, adapter: Tensors, config: Mapping[str, Any]) -> dict[str, Update]:
    """Return what PEFT's wrappers do to the parameters of the modules that they wrap."""
    modules = dict(tuned.base_model.model.named_modules())
    updates: dict[str, Update] = {}
    for path, module in modules.items():
        updates |= _updates_of(path, module, adapter, config)
        tied = getattr(getattr(module, "token_adapter", None), "tied_adapter", None)
        if tied is not None:  # rows of an output layer that is tied to the embeddings are stored with these
            owner = next(other for other, candidate in modules.items() if candidate is tied)
            rows = dataclasses.replace(updates[f"{_plain(path)}.weight"], operands=(f"{START}{owner}.{ROWS}",))
            updates[f"{_plain(path)}.weight"] = rows
    return updates


def _add_stored_whole(updates: dict[str, Update], adapter: Tensors, architecture: Architecture) -> list[str]:
    """Add tensors that take the place of the base's beside PEFT's wrappers, and return those without a place."""
    used = {name for update in updates.values() for name in (update.weight, *update.operands) if name}
    strays = []
    for stored in sorted(adapter.keys() - used):
        name = _plain(stored.removeprefix(START))
        update = updates.get(name)
        if ".original_module." in stored or ".modules_to_save." in stored or stored.endswith(ROWS):
            if name.removesuffix(ROWS) + "weight" * stored.endswith(ROWS) not in updates:  # else it is stored twice
                strays.append(stored)
        elif name not in architecture.parameters or (update and update.weight) or ".lora_" in stored:
            strays.append(stored)
        else:
            updates[name] = dataclasses.replace(update or Update(), weight=stored)
    return strays


def _check_values(updates: Mapping[str, Update], architecture: Architecture) -> None:
    """Refuse factors that are no numbers, and rows that are none or there twice."""
    for name, update in updates.items():
        if not math.isfinite(update.scale):
            raise CheckpointError(f"the LoRA's factor on {name!r} is {update.scale}: is its lora_alpha right?")
        outside = [row for row in update.rows if not 0 <= row < len(architecture.parameters[name])]
        if outside or len(set(update.rows)) < len(update.rows):
            raise CheckpointError(
                f"the LoRA's trainable_token_indices for {name!r} are no distinct rows of the "
                f"{len(architecture.parameters[name]):,} there are: {(outside or sorted(update.rows))[:4]}."
            )


def _updates_of(path: str, module: Any, adapter: Tensors, config: Mapping[str, Any]) -> dict[str, Update]:
    """Return what PEFT's wrapper of one module does to the parameters of that."""
    from peft.tuners import lora
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    stored, name = f"{START}{path}", _plain(path)
    if isinstance(module, ModulesToSaveWrapper):
        own = module.modules_to_save[ADAPTER].state_dict()
        return {f"{name}.{part}": ReplacedModule((f"{stored}.{part}",)) for part in own}
    if isinstance(module, TrainableTokensWrapper):
        chosen = module.token_adapter.token_indices[ADAPTER]
        rows = tuple(chosen) if isinstance(chosen, list | tuple) else (-1,)  # refused, with other rows that are none
        return {f"{name}.weight": Rows((f"{stored}.token_adapter.{ROWS}",), rows=rows)}
    if not isinstance(module, lora.LoraLayer):
        return {}
    if isinstance(module, ParamWrapper):
        a, b = f"{stored}.lora_A.weight", f"{stored}.lora_B.weight"
        weight: Any = getattr(module.get_base_layer(), module.parameter_name)
        update = Factors((b, a), scale=module.scaling[ADAPTER])
        if weight.dim() == 3:
            turned = not module._did_swap_in_out_features or _is_of_old_peft(module, adapter, (b, a), config)
            update = Experts((b, a), scale=module.scaling[ADAPTER], transposed=turned)
        return {f"{name}.{module.parameter_name}": update}
    factors = ("lora_B.weight", "lora_A.weight")
    if isinstance(module, lora.Embedding):
        factors = ("lora_embedding_B", "lora_embedding_A")
    elif not isinstance(module, lora.Linear):
        raise CheckpointError(
            f"module {name!r} of the LoRA is a {type(module.get_base_layer()).__name__}, and only linear layers, "
            "embeddings and experts are merged here. Merge it with PEFT: merge_and_unload."
        )
    operands = tuple(f"{stored}.{part}" for part in factors)
    if module.use_dora[ADAPTER]:
        operands += (f"{stored}.lora_magnitude_vector",)
    turned = isinstance(module, lora.Embedding) or bool(module.fan_in_fan_out)
    updates: dict[str, Update] = {f"{name}.weight": Factors(operands, scale=module.scaling[ADAPTER], transposed=turned)}
    if module.lora_bias[ADAPTER]:
        updates[f"{name}.bias"] = Bias((f"{stored}.lora_B.bias",), scale=module.scaling[ADAPTER])
    return updates


def _is_of_old_peft(module: Any, adapter: Tensors, factors: tuple[str, str], config: Mapping[str, Any]) -> bool:
    """Return whether A and B of experts are exchanged, as PEFT before 0.19 had them."""
    if not config.get("target_parameters"):  # stored by single experts, and fused just now
        return False
    sizes = shape_of(adapter, factors[0])[0], shape_of(adapter, factors[1])[1]
    if module.in_features != module.out_features:
        return sizes == (module.in_features, module.out_features)
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.0"))
    return version is not None and (int(version[1]), int(version[2])) < TURNED_UNTIL


def _check_shapes(
    adapter: Tensors, expected: Tensors, updates: Mapping[str, Update], architecture: Architecture
) -> None:
    room = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for parameter, update in updates.items():
        room |= update.shapes(tuple(architecture.parameters[parameter].shape), room)
    differing = [
        f"{name} is {shape_of(adapter, name)}, and the model has room for {shape}"
        for name, shape in room.items()
        if shape_of(adapter, name) != shape
    ]
    if differing:
        raise MismatchError(f"{len(differing)} tensors of the LoRA do not fit the base: {'; '.join(differing[:4])}.")


def _plain(path: str) -> str:
    path = NESTED.sub(".", path)
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)
