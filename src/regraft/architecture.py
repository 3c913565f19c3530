"""The names and shapes of a transformers class's tensors, in memory and on disk, without any weights.

Names on disk differ from names in memory (fused experts, renamed modules) and between writers (`LayerNorm.gamma`,
`_orig_mod.`, obsolete buffers). The conversions of transformers map between them. The canonical name of a tensor is the
name under which transformers saves it.
"""

from __future__ import annotations

import copy
import functools
import json
import os.path
import re
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import DerivedTensors, GroupedTensors, TensorSpec, dtype_of, shape_of
from regraft.errors import MAX_LISTED, CheckpointError
from regraft.weights import is_optional

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from regraft.checkpoint import Checkpoint

COMPILED = "_orig_mod."
"""The part that torch.compile adds to the names of the tensors of a module that it wraps."""
CACHED_ARCHITECTURES = 16  # arbitrary: more take memory, fewer are built again
"""The number of architectures in the cache."""
BUFFER = re.compile(
    r"(?:^|\.)(?:(?:cross)?att(?:entio)?n\.bias|masked_bias|causal_mask|inv_freq|original_inv_freq|(?:cos|sin)_cached|"
    r"position_ids|token_type_ids|embed_positions\.weights)$"
)
"""Matches buffers that older versions stored and current models compute: causal masks, positions, rotary tables."""


class Architecture:
    """A transformers class with a config, on the meta device.

    Args:
        config: The config that the class is built with.
        name: The name of the class, as in `architectures` of a config. None, an unknown name or a class of another
            config means the body.

    Raises:
        CheckpointError: transformers cannot build the class.
    """

    def __init__(self, config: PretrainedConfig, name: str | None = None):
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion

        self.config = config
        body_class: Any = transformers.AutoModel
        named_class: Any = getattr(transformers, name, None) if name else None
        config_class = getattr(named_class, "config_class", None) or ()
        is_named = issubclass(type(config), config_class)
        try:
            with torch.device("meta"):
                build = named_class._from_config if is_named else body_class.from_config
                self.model: PreTrainedModel = build(copy.deepcopy(config))
        except Exception as error:  # classes raise many types of errors for inconsistent settings
            raise CheckpointError(
                f"transformers cannot build a {name or config.model_type} from this config.json ({error!r:.200})."
            ) from error
        self.prefix = str(self.model.base_model_prefix)
        self.parameters: dict[str, torch.Tensor] = self.model.state_dict()
        self.ties: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        conversions = get_model_conversion_mapping(self.model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.stored: dict[str, torch.Tensor] = revert_weight_conversion(self.model, self.parameters)
        self._canonical = {self._locate(name): name for name in self.stored}

    def identify(self, name: str) -> str | None:
        """Return the canonical name of a stored tensor.

        Args:
            name: The name in a checkpoint.

        Returns:
            The canonical name; for a tied tensor, the canonical name of the tensor that it is tied to. None if the
            class has no such tensor.
        """
        parameter, part = self._locate(name)
        if parameter not in self.parameters:
            return None
        tied_parameter = self.ties.get(parameter, parameter)
        return str(self._canonical.get((tied_parameter, part), tied_parameter))

    def is_unknown_body_tensor(self, name: str) -> bool:
        """Return whether a stored tensor seems to belong to the body, but is unknown to the class.

        An example is a tensor of layer 12 if the config has 12 layers, which count from 0. Tensors of heads and
        poolers and obsolete buffers do not count.

        Args:
            name: The name in a checkpoint.
        """
        ignored = (BUFFER.pattern, *(self.model._keys_to_ignore_on_load_unexpected or ()))
        if self.identify(name) is not None or any(re.search(pattern, name) for pattern in ignored):
            return False
        prefix = f"{self.prefix}."
        if is_optional(name.removeprefix(prefix)):  # a class with a head may have a pooler that the body lacks
            return False
        top_level_modules = {stored.removeprefix(prefix).split(".")[0] for stored in self.stored}
        return name.startswith(prefix) or name.split(".")[0] in top_level_modules

    def unrelated_checkpoint_error(self, checkpoint: Checkpoint) -> CheckpointError:
        """Return the error for a checkpoint without any tensor of the class.

        Args:
            checkpoint: The checkpoint, whose path and first names the message has.
        """
        names = ", ".join(map(repr, sorted(checkpoint)[:MAX_LISTED]))
        return CheckpointError(
            f"{checkpoint.path}: has no weights of a {type(self.model).__name__}: its tensors have names such as "
            f"{names}, none of which transformers would load. Load it with the tool that saved it, and call "
            "save_pretrained of the model itself, not of a wrapper (`module.`, `base_model.`)."
        )

    def is_tied(self, name: str) -> bool:
        """Return whether a stored tensor is tied to another tensor, such as an output layer to the embeddings.

        Args:
            name: The name in a checkpoint.
        """
        return self._locate(name)[0] in self.ties

    def parameter_of(self, name: str) -> str:
        """Return the name in memory of the parameter that a stored tensor is part of; of several, the first.

        Args:
            name: The name in a checkpoint.

        Returns:
            A name such as `layers.0.mlp.experts.down_proj`; if the class has no such tensor, a name that is not in
            `parameters`.
        """
        return self._locate(name)[0]

    def in_memory(self, checkpoint: Mapping[str, torch.Tensor]) -> DerivedTensors:
        """Return the parameters that transformers loads from stored tensors.

        Args:
            checkpoint: The stored tensors, under any names that transformers loads.

        Returns:
            The parameters by their names in memory, computed when they are read.
        """
        parts: dict[str, list[str]] = {}
        for name in sorted(checkpoint, key=_natural_key):
            parameter = self._locate(name)[0]
            if parameter in self.parameters:
                parts.setdefault(parameter, []).append(name)
        specs = {}
        for parameter, names in parts.items():
            operands = tuple((checkpoint, name) for name in names)
            dtype = dtype_of(checkpoint, names[0])
            if self._converter(names[0]) is None:
                specs[parameter] = TensorSpec(dtype, shape_of(checkpoint, names[0]), operands[:1])
                continue
            for target, shape in self._shapes_of(parameter).items():  # a tensor may be split into several parameters
                rule = functools.partial(self._convert, parameter, target, names)
                specs[target] = TensorSpec(dtype, shape, operands, rule, elementwise=False)
        return DerivedTensors(specs)

    def on_disk(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert parameters, or their gradients, to the tensors that they are saved as.

        Args:
            parameters: The parameters by their names in memory. Of parameters that are saved in common tensors, either
                all or none.

        Returns:
            The tensors by canonical name.
        """
        from transformers.core_model_loading import revert_weight_conversion

        stored: dict[str, torch.Tensor] = revert_weight_conversion(self.model, dict(parameters))
        return stored

    def saved_tensors(self, parameters: DerivedTensors) -> DerivedTensors:
        """Return the tensors that parameters are saved as, computed when they are read.

        Args:
            parameters: The parameters by their names in memory. Of parameters that are saved in common tensors, either
                all or none.

        Returns:
            The tensors by canonical name.
        """
        specs: dict[str, TensorSpec] = {}
        groups: dict[str, tuple[str, ...]] = {}
        for parameter, names in self._parts.items():
            if self._converter(names[0]) is None:
                if parameter in parameters:
                    specs[names[0]] = parameters.specs[parameter]
                continue
            group = tuple(self._shapes_of(parameter))
            if group[0] not in parameters:
                continue
            for index, name in enumerate(names):
                # Only the first tensor lists the operands, so that they are counted once.
                operands = tuple((parameters, member) for member in group) if index == 0 else ()
                dtype = parameters.specs[group[0]].dtype
                specs[name] = TensorSpec(dtype, tuple(self.stored[name].shape), operands, elementwise=False)
                groups[name] = group

        def compute_group(group: tuple[str, ...]) -> dict[str, torch.Tensor]:
            return self.on_disk({member: parameters[member] for member in group})

        return GroupedTensors(specs, groups, compute_group)

    def parts_of(self, parameter: str) -> list[str]:
        """Return the canonical names of the tensors that a parameter is saved as.

        Args:
            parameter: The name in memory; of parameters that are saved in common tensors, the name of the first.
        """
        return self._parts.get(parameter, [])

    @functools.cached_property
    def _parts(self) -> dict[str, list[str]]:
        """The canonical names of the tensors by the parameter that they are part of; of several, the first."""
        parts: dict[str, list[str]] = {}
        for name in sorted(self.stored, key=_natural_key):
            parts.setdefault(self._locate(name)[0], []).append(name)
        return parts

    @functools.cached_property
    def embeddings(self) -> str | None:
        """The canonical name of the token embeddings; None if the model reads no tokens."""
        try:
            module = self.model.get_input_embeddings()
        except NotImplementedError:  # the model reads no tokens
            return None
        names = (f"{name}.weight" for name, candidate in self.model.named_modules() if candidate is module)
        return next((self._canonical.get((name, ""), name) for name in names), None)

    @property
    def token_parameters(self) -> frozenset[str]:
        """The names in memory of the parameters whose size depends on the vocabulary."""
        return frozenset(self.parameter_of(name) for name in self.token_tensors)

    @functools.cached_property
    def token_tensors(self) -> frozenset[str]:
        """The canonical names of the tensors whose size depends on the vocabulary: [tokens, …] or [1, tokens]."""
        config = copy.deepcopy(self.config)
        text_config: Any = config.get_text_config()
        if getattr(text_config, "vocab_size", None) is None:  # the model reads no tokens
            return frozenset()
        text_config.vocab_size += 1
        grown = Architecture(config, type(self.model).__name__)
        return frozenset(
            str(self.identify(name))
            for name, tensor in self.stored.items()
            if tensor.dim() and tuple(grown.stored[name].shape) in _shapes_with_another_token(tuple(tensor.shape))
        )

    def _locate(self, name: str) -> tuple[str, str]:
        """Return the parameter that a stored tensor is part of, and the part's identifier, empty for an only part."""
        from transformers.core_model_loading import apply_renamings, rename_source_key

        name = name.replace(COMPILED, "")
        parameter, pattern = rename_source_key(name, self._renamings, self._converters, self.prefix, self.parameters)
        if pattern is None:
            return parameter, ""
        prefix = self.prefix + "."
        inner_name = apply_renamings(name, self._renamings).removeprefix(prefix)
        common = os.path.commonprefix([inner_name, parameter.removeprefix(prefix)])  # noqa: RUF071 - names, not paths
        return parameter, inner_name[len(common) :]

    def _converter(self, name: str) -> Any:
        """Return the conversion of transformers that a stored tensor takes part in; None if it is only renamed."""
        from transformers.core_model_loading import apply_converters, apply_renamings

        _, pattern = apply_converters(apply_renamings(name.replace(COMPILED, ""), self._renamings), self._converters)
        return next((entry for entry in self._converters if pattern and pattern in entry.source_patterns), None)

    def _convert(self, parameter: str, target: str, names: list[str], *tensors: torch.Tensor) -> torch.Tensor:
        """Compute the parameter `target` of a conversion from its stored tensors, as transformers does on loading."""
        from transformers.core_model_loading import apply_converters, apply_renamings

        converter = copy.deepcopy(self._converter(names[0]))
        for name, tensor in zip(names, tensors, strict=True):
            renamed = apply_renamings(name.replace(COMPILED, ""), self._renamings)
            converter.add_tensor(parameter, name, apply_converters(renamed, self._converters)[1], tensor)
        value = converter.convert(parameter, model=self.model, config=self.config)[target]
        result: torch.Tensor = value[0] if isinstance(value, list) else value
        return result

    def _shapes_of(self, parameter: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters that are computed from the same stored tensors as a parameter."""
        from transformers.core_model_loading import apply_converters, apply_renamings

        names = self._parts[parameter]
        converter = copy.deepcopy(self._converter(names[0]))
        if len(converter.target_patterns) == 1:
            return {parameter: tuple(self.parameters[parameter].shape)}
        for name in names:
            renamed = apply_renamings(name, self._renamings)
            converter.add_tensor(parameter, name, apply_converters(renamed, self._converters)[1], self.stored[name])
        converted = converter.convert(parameter, model=self.model, config=self.config)
        return {name: tuple(self.parameters[name].shape) for name in converted}


@functools.lru_cache(maxsize=CACHED_ARCHITECTURES)
def _cached_architecture(config_json: str, name: str | None, config_class: type[PretrainedConfig]) -> Architecture:
    return Architecture(config_class.from_dict(json.loads(config_json)), name)


def architecture_of(config: PretrainedConfig, name: str | None = None) -> Architecture:
    """Return the architecture of a config, cached for equal configs.

    Args:
        config: The config that the class is built with.
        name: The name of the class, as in `architectures` of a config; None for the body.

    Raises:
        CheckpointError: transformers cannot build the class.
    """
    config_class: Any = type(config)
    content = config.to_dict()
    content.pop("_name_or_path", None)  # the architecture does not depend on the folder
    return _cached_architecture(json.dumps(content, sort_keys=True, default=str), name, config_class)


def _shapes_with_another_token(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    shapes = [(shape[0] + 1, *shape[1:])]
    if len(shape) == 2 and shape[0] == 1:
        shapes.append((1, shape[1] + 1))
    return shapes


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders the numbers in names by value: experts.2 before experts.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
