"""What the tensors of a transformers class are called, in memory and on disk, without any weights.

Names on disk differ from names in memory (fused experts, renamed modules), and from one writer to another
(LayerNorm.gamma, `_orig_mod.`, buffers that no model has today). Transformers' own conversions say which stand for the
same tensor; the name that counts is the one that a fresh model of the class is saved under.
"""

from __future__ import annotations

import copy
import functools
import json
import os.path
import re
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import DerivedTensors, GroupedTensors, TensorSpec, dtype_of, shape_of
from regraft.errors import CheckpointError
from regraft.weights import is_optional

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PretrainedConfig

    from regraft.checkpoint import Checkpoint

COMPILED = "_orig_mod."  # torch.compile's wrapper, saved with the names of what it wraps
# buffers that models compute for themselves and older versions stored: causal masks, positions, rotary tables
BUFFER = re.compile(
    r"(?:^|\.)(?:(?:cross)?att(?:entio)?n\.bias|masked_bias|causal_mask|inv_freq|original_inv_freq|(?:cos|sin)_cached|"
    r"position_ids|token_type_ids|embed_positions\.weights)$"
)


class Architecture:
    """A transformers class of one config, on the meta device.

    Args:
        config: The model's config.
        name: The class, as `architectures` of a config names it; None for the bare body.

    Raises:
        CheckpointError: Transformers cannot build it.
    """

    def __init__(self, config: PretrainedConfig, name: str | None = None):
        import torch
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, revert_weight_conversion

        self.config = config
        body: Any = transformers.AutoModel
        named_class: Any = getattr(transformers, name, None) if name else None
        if not issubclass(type(config), getattr(named_class, "config_class", None) or ()):  # none, or of another config
            named_class = None
        try:
            with torch.device("meta"):
                own = copy.deepcopy(config)
                self.model: Any = named_class._from_config(own) if named_class else body.from_config(own)
        except Exception as error:  # whatever a class raises on settings that contradict one another
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
        """Return the name that a stored tensor has where a fresh model of this class is saved.

        Args:
            name: Its name in a checkpoint, whoever wrote it.

        Returns:
            The canonical name, that of its source where the tensor is tied to another; None if the class has no such
            tensor.
        """
        parameter, part = self._locate(name)
        if parameter not in self.parameters:
            return None
        source = self.ties.get(parameter, parameter)
        return str(self._canonical.get((source, part), source))

    def is_unknown_body_tensor(self, name: str) -> bool:
        """Return whether a stored tensor lies inside the body and is none of it, as one of a layer beyond the config's.

        Args:
            name: Its name in a checkpoint.

        Returns:
            False for tensors of the class, for heads and poolers, and for what it passes over by intent: old buffers.
        """
        passed_over = (BUFFER.pattern, *(self.model._keys_to_ignore_on_load_unexpected or ()))
        if self.identify(name) is not None or any(re.search(pattern, name) for pattern in passed_over):
            return False
        start = f"{self.prefix}."
        if is_optional(name.removeprefix(start)):  # a head's class may have a pooler that the bare body has not
            return False
        tops = {stored.removeprefix(start).split(".")[0] for stored in self.stored}
        return name.startswith(start) or name.split(".")[0] in tops

    def unrelated_checkpoint_error(self, checkpoint: Checkpoint) -> CheckpointError:
        """Return the error for a checkpoint of which the class has no tensor.

        Args:
            checkpoint: The stored tensors.

        Returns:
            The error, with what tensors are called there and what to do.
        """
        names = ", ".join(map(repr, sorted(checkpoint)[:2]))
        return CheckpointError(
            f"{checkpoint.path}: holds no weights of a {type(self.model).__name__}: it names tensors as {names}, and "
            "transformers would load none of these. Load it with what saved it and call save_pretrained of the model "
            "itself, not of a wrapper (`module.`, `base_model.`)."
        )

    def is_tied(self, name: str) -> bool:
        """Return whether a stored tensor is another one once more.

        Args:
            name: Its name in a checkpoint.

        Returns:
            True for an output layer that is tied to the embeddings, and its like.
        """
        return self._locate(name)[0] in self.ties

    def parameter_of(self, name: str) -> str:
        """Return the name in memory of the parameter that a stored tensor goes into, or its first of several.

        Args:
            name: Its name in a checkpoint.

        Returns:
            As in `layers.0.mlp.experts.down_proj`; the name itself if the class has no such tensor.
        """
        return self._locate(name)[0]

    def in_memory(self, checkpoint: Mapping[str, torch.Tensor]) -> DerivedTensors:
        """Present stored tensors as the parameters of the model that transformers makes of them.

        Args:
            checkpoint: The stored tensors.

        Returns:
            The parameters that the checkpoint has, by their names in memory, computed when they are asked for.
        """
        parts: dict[str, list[str]] = {}
        for name in sorted(checkpoint, key=_natural):
            parameter = self._locate(name)[0]
            if parameter in self.parameters:
                parts.setdefault(parameter, []).append(name)
        entries = {}
        for parameter, names in parts.items():
            operands = tuple((checkpoint, name) for name in names)
            dtype = dtype_of(checkpoint, names[0])
            if self._converter(names[0]) is None:
                entries[parameter] = TensorSpec(dtype, shape_of(checkpoint, names[0]), operands[:1])
                continue
            for target, shape in self._shapes_of(parameter).items():  # one stored tensor may be several parameters
                rule = functools.partial(self._convert, parameter, target, names)
                entries[target] = TensorSpec(dtype, shape, operands, rule, elementwise=False)
        return DerivedTensors(entries)

    def on_disk(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return parameters as they are saved.

        Args:
            parameters: By their names in memory; all of those that are saved as parts of one tensor, or none.

        Returns:
            By canonical name; values of any linear kind, as gradients, are converted as weights are.
        """
        from transformers.core_model_loading import revert_weight_conversion

        stored: dict[str, torch.Tensor] = revert_weight_conversion(self.model, dict(parameters))
        return stored

    def saved(self, parameters: DerivedTensors) -> DerivedTensors:
        """Present parameters as they are saved, computed when they are asked for.

        Args:
            parameters: By their names in memory; all of those that are saved as parts of one tensor, or none.

        Returns:
            By canonical name.
        """
        entries: dict[str, TensorSpec] = {}
        groups: dict[str, tuple[str, ...]] = {}
        for parameter, names in self._parts.items():
            if self._converter(names[0]) is None:
                if parameter in parameters:
                    entries[names[0]] = parameters.specs[parameter]
                continue
            group = tuple(self._shapes_of(parameter))
            if group[0] not in parameters:
                continue
            for number, name in enumerate(names):
                operands = tuple((parameters, member) for member in group) if number == 0 else ()  # counted once
                dtype = parameters.specs[group[0]].dtype
                entries[name] = TensorSpec(dtype, tuple(self.stored[name].shape), operands, elementwise=False)
                groups[name] = group
        return GroupedTensors(
            entries, groups, lambda group: self.on_disk({member: parameters[member] for member in group})
        )

    def parts_of(self, parameter: str) -> list[str]:
        """Name the tensors that a parameter is saved as.

        Args:
            parameter: Its name in memory.

        Returns:
            Their canonical names; of parameters that are saved in common parts, under the first of them.
        """
        return self._parts.get(parameter, [])

    @functools.cached_property
    def _parts(self) -> dict[str, list[str]]:
        """The canonical names of the tensors that go into each parameter; of several in common, into their first."""
        parts: dict[str, list[str]] = {}
        for name in sorted(self.stored, key=_natural):
            parts.setdefault(self._locate(name)[0], []).append(name)
        return parts

    @functools.cached_property
    def embeddings(self) -> str | None:
        """The canonical name of the token embeddings."""
        try:
            module = self.model.get_input_embeddings()
        except NotImplementedError:  # models that read no tokens
            return None
        names = (f"{name}.weight" for name, each in self.model.named_modules() if each is module)
        return next((self._canonical.get((name, ""), name) for name in names), None)

    @property
    def token_parameters(self) -> frozenset[str]:
        """The names in memory of the parameters that grow with the vocabulary."""
        return frozenset(self.parameter_of(name) for name in self.token_tensors)

    @functools.cached_property
    def token_tensors(self) -> frozenset[str]:
        """The canonical names of the tensors that grow with the vocabulary: [tokens, …], or [1, tokens] as in BART."""
        own = copy.deepcopy(self.config)
        text: Any = own.get_text_config()
        if getattr(text, "vocab_size", None) is None:  # models that read no tokens
            return frozenset()
        text.vocab_size += 1
        grown = Architecture(own, type(self.model).__name__)
        return frozenset(
            str(self.identify(name))
            for name, tensor in self.stored.items()
            if tensor.dim() and tuple(grown.stored[name].shape) in _grown(tuple(tensor.shape))
        )

    def _locate(self, name: str) -> tuple[str, str]:
        """Return the parameter a stored tensor goes into, and which part of it it is ('' for the whole)."""
        from transformers.core_model_loading import apply_renamings, rename_source_key

        name = name.replace(COMPILED, "")
        parameter, pattern = rename_source_key(name, self._renamings, self._converters, self.prefix, self.parameters)
        if pattern is None:
            return parameter, ""
        renamed = apply_renamings(name, self._renamings)
        start = self.prefix + "."
        short = [text.removeprefix(start) for text in (renamed, parameter)]
        return parameter, short[0][len(os.path.commonprefix(short)) :]  # noqa: RUF071 - the names are no paths

    def _converter(self, name: str) -> Any:
        from transformers.core_model_loading import apply_converters, apply_renamings

        _, pattern = apply_converters(apply_renamings(name.replace(COMPILED, ""), self._renamings), self._converters)
        return next((entry for entry in self._converters if pattern and pattern in entry.source_patterns), None)

    def _convert(self, parameter: str, target: str, names: list[str], *tensors: torch.Tensor) -> torch.Tensor:
        """Make one of the parameters that stored tensors amount to together, as transformers does on loading."""
        from transformers.core_model_loading import apply_converters, apply_renamings

        converter = copy.deepcopy(self._converter(names[0]))
        for name, tensor in zip(names, tensors, strict=True):
            renamed = apply_renamings(name.replace(COMPILED, ""), self._renamings)
            converter.add_tensor(parameter, name, apply_converters(renamed, self._converters)[1], tensor)
        value = converter.convert(parameter, model=self.model, config=self.config)[target]
        result: torch.Tensor = value[0] if isinstance(value, list) else value
        return result

    def _shapes_of(self, parameter: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters that are made of the same stored tensors as this one."""
        names = self._parts[parameter]
        first = self._converter(names[0])
        if len(first.target_patterns) == 1:
            return {parameter: tuple(self.parameters[parameter].shape)}
        converter = copy.deepcopy(first)
        from transformers.core_model_loading import apply_converters, apply_renamings

        for name in names:
            renamed = apply_renamings(name, self._renamings)
            converter.add_tensor(parameter, name, apply_converters(renamed, self._converters)[1], self.stored[name])
        converted = converter.convert(parameter, model=self.model, config=self.config)
        return {name: tuple(self.parameters[name].shape) for name in converted}


@functools.lru_cache(maxsize=16)
def _cached(settings: str, name: str | None, kind: type[PretrainedConfig]) -> Architecture:
    return Architecture(kind.from_dict(json.loads(settings)), name)


def architecture_of(config: PretrainedConfig, name: str | None = None) -> Architecture:
    """Build a transformers class on the meta device, once for equal configs.

    Args:
        config: The model's config.
        name: The class, as `architectures` of a config names it; None for the bare body.

    Returns:
        The architecture.

    Raises:
        CheckpointError: Transformers cannot build it.
    """
    kind: Any = type(config)
    settings = config.to_dict()
    settings.pop("_name_or_path", None)  # equal models of different folders are one architecture
    return _cached(json.dumps(settings, sort_keys=True, default=str), name, kind)


def _grown(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that a tensor would have with a token more."""
    grown = ((shape[0] + 1, *shape[1:]),)
    return (*grown, (1, shape[1] + 1)) if len(shape) == 2 and shape[0] == 1 else grown


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
