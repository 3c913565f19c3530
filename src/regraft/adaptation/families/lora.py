"""LoRAs: B·A added to weights, a delta that is dense once it is multiplied out."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, write_adapter
from regraft.adaptation.changes import parameter_of
from regraft.adaptation.families.peft_adapter import Peft, peft_state
from regraft.adaptation.fresh import fresh_model
from regraft.adaptation.labels import stored_head
from regraft.adaptation.layout import as_loaded, lay_out
from regraft.adaptation.lora import ADAPTER, DETERMINED_INITS, PARTS, START, begins_in_base, fold_start
from regraft.adaptation.lora_transform import transform_factors
from regraft.adaptation.merge import CANNOT_MERGE, merge_lora
from regraft.architecture import architecture_of
from regraft.checkpoint import read_json
from regraft.errors import CheckpointError, KindError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from regraft.adaptation.adaptation import Adaptation, CarriedAdaptation, Rule, Tensors
    from regraft.architecture import Architecture
    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.task import Head
    from regraft.upgrade import Upgrade


class Lora(Peft):
    """A LoRA, or a DoRA; one that took its start out of its base is saved and grafted as a plain one."""

    def changed_base(self, config: Mapping[str, Any]) -> bool:
        """Return whether it was initialised as PiSSA is."""
        return begins_in_base(config.get("init_lora_weights", True))

    def attach_adapter(
        self, model: Any, base: Base, head: Head, config: Any, heads: Sequence[str], modules: Sequence[str]
    ) -> Any:
        """Have PEFT wrap the model, and check that its matrices have as many directions as are taken out of them."""
        adapted = super().attach_adapter(model, base, head, config, heads, modules)
        if begins_in_base(config.init_lora_weights):
            _check_ranks(adapted, base)
        return adapted

    def load(self, adaptation: Adaptation, base: Base, head: Head, *, trainable: bool) -> Any:
        """Put the adapter on its base; PEFT repeats the start if it followed from the base."""
        check_start(adaptation)
        return super().load(adaptation, base, head, trainable=trainable)

    def start(self, model: Any) -> Tensors:
        """Copy A and B where they were taken out of the base."""
        if not begins_in_base(model.peft_config[ADAPTER].init_lora_weights):
            return {}
        return {name: tensor.clone() for name, tensor in peft_state(model).items() if ".lora_" in name}

    def stored(self, adaptation: Adaptation, adapted: Any) -> Tensors:
        """Convert factors of single experts to those of fused ones, as PEFT does."""
        return as_loaded(adaptation.checkpoint, adapted)

    def save(self, model: Any, base: Base, into: Path, start: Tensors) -> None:
        """Have PEFT write it; of one with a start that was copied, write the plain LoRA that it amounts to."""
        super().save(model, base, into, start)
        if start:
            write_adapter(into, *fold_start(peft_state(model), start, read_json(into / ADAPTER_CONFIG)))

    def plain(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, Mapping[str, Any]]:
        """Subtract the start, found again by starting anew."""
        if not adaptation.changed_base:
            return super().plain(adaptation, old)
        check_start(adaptation)
        head = stored_head(adaptation, old)
        model = self.attach(fresh_model(old, head, 0), old, head, self.read_config(adaptation), 0)
        return fold_start(adaptation.checkpoint, self.start(model), adaptation.config)

    def transform(
        self, adaptation: Adaptation, upgrade: Upgrade, rule: Rule, progress: Progress, *, replace: bool = False
    ) -> CarriedAdaptation:
        """Give the rule scaling·B·A of each layer, and take the closest LoRA of the same rank to its result."""
        carried = self.graft(adaptation, upgrade, replace=replace)
        loaded, updates = lay_out(carried.tensors, carried.settings, _classifier(adaptation, upgrade.new))
        if loaded.keys() != carried.tensors.keys():
            raise KindError(
                f"{adaptation.path}: stores a LoRA for every expert by itself, which the installed transformers has no "
                "place for. Load it with PEFT and save it again."
            )
        return dataclasses.replace(
            carried, tensors=transform_factors(carried.tensors, updates, upgrade, rule, progress)
        )

    def tuned_body_tensors(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, dict[str, str]] | None:
        """Merge it into the base; None of one that is more than a change of weights."""
        if any(adaptation.config.get(key) for key in CANNOT_MERGE):
            return None
        merged = merge_lora(*self.plain(adaptation, old), old.checkpoint, labels=adaptation.labels).tensors
        return merged, {inner: name for name in merged if (inner := old.architecture.identify(name)) in old.body}

    def check_linear(self, adaptation: Adaptation) -> None:
        """Refuse tensors that are no B or A of a linear layer."""
        infos = adaptation.checkpoint.tensors
        other = [n for n in infos if ".lora_" in n and (not n.endswith(PARTS[:2]) or len(infos[n].shape) != 2)]
        if other:
            raise KindError(
                f"{adaptation.path}: tensor {other[0]!r} is no B or A of a linear layer. Take direct or init, or "
                "convert it to full first."
            )

    def proportional_parameter(self, parameter: str, model: Any) -> str | None:
        """Name what B's product with A is added to."""
        module, is_factor, _ = parameter.partition(f".lora_B.{ADAPTER}.")
        return parameter_of(module, model.get_submodule(module)) if is_factor else None


def check_start(adaptation: Adaptation) -> None:
    """Refuse a LoRA that took its start out of its base in a way that cannot be repeated.

    Args:
        adaptation: The tuned weights.

    Raises:
        CheckpointError: Its start cannot be found again from the base alone, so neither can what it changed.
    """
    init = adaptation.config.get("init_lora_weights")
    if adaptation.changed_base and str(init).lower() not in DETERMINED_INITS:
        raise CheckpointError(
            f"{adaptation.path}: the LoRA was initialised by {init!r}, which took a start out of its base that cannot "
            "be found again. Merge it with its start: regraft weights merge-lora --start."
        )


def _check_ranks(adapted: Any, base: Base) -> None:
    """Refuse a start taken out of matrices that have fewer directions than its rank: PEFT could not load what it is."""
    for name, module in adapted.named_modules():
        rank, factor = getattr(module, "r", {}), getattr(module, "lora_A", {})
        if ADAPTER in factor and factor[ADAPTER].weight.shape[0] < rank[ADAPTER]:
            raise RecipeError(
                f"{base.path}: rank {rank[ADAPTER]} is more than {name.removeprefix(START)} has directions "
                f"({factor[ADAPTER].weight.shape[0]}), and this LoRA takes its start out of them. Choose at most that."
            )


def _classifier(adaptation: Adaptation, base: Base) -> Architecture:
    """Build the class that an adapter was tuned in, with as many labels."""
    import transformers

    config, head = copy.deepcopy(base.config), stored_head(adaptation, base)
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: i for i, label in enumerate(head.labels)}
    if base.own_rows:
        config.get_text_config().vocab_size = base.own_rows
    auto = getattr(transformers, head.type.auto_class)
    return architecture_of(config, auto._model_mapping[type(config)].__name__)
