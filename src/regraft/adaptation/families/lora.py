"""The family of LoRAs, whose product scaling·B·A is a dense delta of a weight."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, write_adapter
from regraft.adaptation.changes import parameter_of
from regraft.adaptation.families.peft_adapter import Peft, peft_state
from regraft.adaptation.fresh import fresh_model
from regraft.adaptation.labels import output_names, stored_head
from regraft.adaptation.layout import convert_as_peft, resolve_updates
from regraft.adaptation.lora import (
    A_SUFFIX,
    ADAPTER_NAME,
    B_SUFFIX,
    DETERMINED_INITS,
    PEFT_PREFIX,
    is_initialised_from_base,
    subtract_initial_factors,
)
from regraft.adaptation.lora_transform import transform_factors
from regraft.adaptation.merge import UNMERGEABLE_SETTINGS, merge_lora
from regraft.architecture import architecture_of
from regraft.checkpoint import read_json
from regraft.errors import CheckpointError, KindError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from regraft.adaptation.adaptation import Adaptation, GraftedAdaptation, Rule
    from regraft.architecture import Architecture
    from regraft.base import Base
    from regraft.checkpoint.derived import Tensors
    from regraft.progress import Progress
    from regraft.task import Head
    from regraft.upgrade import Upgrade


class Lora(Peft):
    """LoRAs and DoRAs. A LoRA whose initialisation changed its base is saved and grafted as a plain LoRA."""

    def changed_base(self, config: Mapping[str, Any]) -> bool:
        """Return whether the LoRA was initialised from the base's weights, as PiSSA is."""
        return is_initialised_from_base(config.get("init_lora_weights", True))

    def attach_adapter(
        self, model: Any, base: Base, head: Head, config: Any, heads: Sequence[str], modules: Sequence[str]
    ) -> Any:
        """Wrap the model with PEFT, and check that an initialisation from the weights reaches the full rank."""
        adapted = super().attach_adapter(model, base, head, config, heads, modules)
        if is_initialised_from_base(config.init_lora_weights):
            _check_ranks(adapted, base)
        return adapted

    def load(self, adaptation: Adaptation, base: Base, head: Head, *, trainable: bool) -> Any:
        """Load the adapter onto its base; PEFT repeats an initialisation that follows from the base."""
        check_reproducible_init(adaptation)
        return super().load(adaptation, base, head, trainable=trainable)

    def initial_factors(self, model: Any) -> Tensors:
        """Copy A and B if they were initialised from the base's weights."""
        if not is_initialised_from_base(model.peft_config[ADAPTER_NAME].init_lora_weights):
            return {}
        return {name: tensor.clone() for name, tensor in peft_state(model).items() if ".lora_" in name}

    def stored_tensors(self, adaptation: Adaptation, adapted: Any) -> Tensors:
        """Convert the factors of separate experts to those of fused experts, as PEFT does."""
        return convert_as_peft(adaptation.checkpoint, adapted)

    def save(self, model: Any, base: Base, folder: Path, initial_factors: Tensors) -> None:
        """Write the LoRA with PEFT; if it has initial factors, write the equivalent plain LoRA."""
        super().save(model, base, folder, initial_factors)
        if initial_factors:
            config = read_json(folder / ADAPTER_CONFIG)
            tensors, plain_config = subtract_initial_factors(peft_state(model), initial_factors, config)
            write_adapter(folder, tensors, plain_config)

    def plain_adapter(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, Mapping[str, Any]]:
        """Subtract the initial factors of a LoRA that changed its base, which are reproduced from the base."""
        if not adaptation.changed_base:
            return super().plain_adapter(adaptation, old)
        check_reproducible_init(adaptation)
        head = stored_head(adaptation, old)
        model = self.prepare_for_tuning(fresh_model(old, head, 0), old, head, self.read_config(adaptation), 0)
        return subtract_initial_factors(adaptation.checkpoint, self.initial_factors(model), adaptation.config)

    def transform(
        self, adaptation: Adaptation, upgrade: Upgrade, rule: Rule, progress: Progress, *, replace: bool = False
    ) -> GraftedAdaptation:
        """Apply the rule to scaling·B·A of each layer, and take the closest LoRA of the same rank."""
        grafted = self.graft(adaptation, upgrade, replace=replace)
        converted, updates = resolve_updates(grafted.tensors, grafted.config, _classifier(adaptation, upgrade.new))
        if converted.keys() != grafted.tensors.keys():
            raise KindError(
                f"{adaptation.path}: stores a LoRA for each expert separately, but the installed transformers fuses "
                "the experts. Load it with PEFT and save it again."
            )
        tensors = transform_factors(grafted.tensors, updates, upgrade, rule, progress)
        return dataclasses.replace(grafted, tensors=tensors)

    def tuned_body_tensors(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, dict[str, str]] | None:
        """Return the tensors of the merged model; None for a LoRA that cannot be merged."""
        if any(adaptation.config.get(key) for key in UNMERGEABLE_SETTINGS):
            return None
        adapter, config = self.plain_adapter(adaptation, old)
        merged = merge_lora(adapter, config, old.checkpoint, output_names=output_names(adaptation)).tensors
        inner_names = {name: old.architecture.identify(name) for name in merged}
        return merged, {inner: name for name, inner in inner_names.items() if inner is not None and inner in old.body}

    def check_linear(self, adaptation: Adaptation) -> None:
        """Check that all of the LoRA's tensors are factors of linear layers."""
        unsupported = [
            name
            for name, stored_tensor in adaptation.checkpoint.tensors.items()
            if ".lora_" in name and (not name.endswith((A_SUFFIX, B_SUFFIX)) or len(stored_tensor.shape) != 2)
        ]
        if unsupported:
            raise KindError(
                f"{adaptation.path}: tensor {unsupported[0]!r} is not a B or A of a linear layer. Use direct or init, "
                "or convert it to full first."
            )

    def proportional_parameter(self, parameter: str, model: Any) -> str | None:
        """Return the weight that B·A is added to, which is proportional to B."""
        module, separator, _ = parameter.partition(f".lora_B.{ADAPTER_NAME}.")
        return parameter_of(module, model.get_submodule(module)) if separator else None


def check_reproducible_init(adaptation: Adaptation) -> None:
    """Check that a LoRA's initialisation can be reproduced from its base, without which its delta is unknown.

    Args:
        adaptation: The adaptation.

    Raises:
        CheckpointError: The LoRA's initialisation changed its base, and is not one of `DETERMINED_INITS`.
    """
    init = adaptation.config.get("init_lora_weights")
    if adaptation.changed_base and str(init).lower() not in DETERMINED_INITS:
        raise CheckpointError(
            f"{adaptation.path}: the LoRA was initialised by {init!r}, which cannot be reproduced from its base. Merge "
            "it, with its initial adapter as --start: regraft weights merge-lora."
        )


def _check_ranks(adapted: Any, base: Base) -> None:
    """Check that the initialisation yields as many directions as the rank, without which PEFT cannot load the LoRA."""
    for name, module in adapted.named_modules():
        factors = getattr(module, "lora_A", {})
        if ADAPTER_NAME not in factors:
            continue
        rank = module.r[ADAPTER_NAME]
        num_directions = factors[ADAPTER_NAME].weight.shape[0]
        if num_directions < rank:
            raise RecipeError(
                f"{base.path}: rank {rank} is more than the {num_directions} directions of "
                f"{name.removeprefix(PEFT_PREFIX)}, from which this LoRA is initialised. Choose at most that rank."
            )


def _classifier(adaptation: Adaptation, base: Base) -> Architecture:
    """Build the classifier that an adapter was tuned in on the meta device, with its labels and rows of embeddings."""
    import transformers

    config = copy.deepcopy(base.config)
    head = stored_head(adaptation, base)
    for name, value in head.settings.items():
        setattr(config, name, value)
    if base.rows_override:
        config.get_text_config().vocab_size = base.rows_override
    auto_class = getattr(transformers, head.type.auto_class)
    return architecture_of(config, auto_class._model_mapping[type(config)].__name__)
