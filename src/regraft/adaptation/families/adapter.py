"""The operations that PEFT's adapters and bottleneck adapters have in common."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from regraft.adaptation.adaptation import Family, GraftedAdaptation
from regraft.adaptation.adapter_checks import check_head_rows, check_loaded
from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, write_adapter
from regraft.adaptation.fresh import fresh_poolers, load_with_fresh_head
from regraft.adaptation.layout import OBSOLETE_SETTINGS
from regraft.adaptation.lora import name_without_prefix
from regraft.adaptation.patterns import check_patterns
from regraft.adaptation.replaced import graft_replacements, num_adapter_rows, renumber_token_ids, replaced_parameter
from regraft.adaptation.tokens import match_token_rows
from regraft.adaptation.vector import Vector
from regraft.errors import MAX_LISTED, CheckpointError, KindError, MismatchError, RecipeError
from regraft.task.types import task_types
from regraft.weights import is_optional

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation, Rule
    from regraft.base import Base
    from regraft.checkpoint.derived import Tensors
    from regraft.progress import Progress
    from regraft.task import Head, Task
    from regraft.upgrade import Upgrade
    from regraft.weights import RowMatch


class Adapter(Family):
    """An adapter on a frozen base, with a fully tuned head, stored in PEFT's layout."""

    needs_task_type: ClassVar[bool] = False
    """Whether PEFT builds a model without a head if the config names no task type."""

    def matching_task_types(self, config: Mapping[str, Any]) -> list[type[Task]]:
        """Return the task types with the PEFT task type of the config, or all task types if it has none."""
        peft_task_type = config.get("task_type")
        return [task_type for task_type in task_types().values() if peft_task_type in (None, task_type.peft_task_type)]

    @abstractmethod
    def config_class(self, config: Mapping[str, Any]) -> Any:
        """Return the dataclass of the content of `adapter_config.json`."""

    @abstractmethod
    def attach_adapter(
        self, model: Any, base: Base, head: Head, config: Any, heads: Sequence[str], modules: Sequence[str]
    ) -> Any:
        """Attach a fresh adapter to a model.

        Args:
            model: A model from `fresh_model`, which is modified.
            base: Its base.
            head: Its head.
            config: The adapter's config, of the class that `config_class` returns.
            heads: The names of the modules outside the body, apart from a dropout.
            modules: The names of all modules that are fully tuned and saved, including the heads.

        Returns:
            The model with the adapter.

        Raises:
            KindError: PEFT cannot put the adapter on the model.
            MismatchError: A bottleneck adapter's pattern does not fit the model.
            RecipeError: A LoRA's rank is more than the directions from which it is initialised.
        """

    @abstractmethod
    def load_adapter(
        self, model: Any, adaptation: Adaptation, head: Head, *, trainable: bool
    ) -> tuple[Any, dict[str, torch.Tensor], Tensors]:
        """Load a stored adapter onto a base with a fresh head.

        Args:
            model: The base with a fresh head.
            adaptation: The adapter.
            head: The task's head.
            trainable: Whether the adapter will be tuned further.

        Returns:
            The model, the adapter's tensors in it by stored name, and the stored tensors that they must equal.

        Raises:
            CheckpointError: The config is malformed or invalid.
            MismatchError: The adapter does not fit the base or the head.
        """

    def prepare_for_tuning(self, model: Any, base: Base, head: Head, config: Any, seed: int) -> Any:
        """Attach a fresh adapter, and mark the heads and a pooler that the base lacks as fully tuned."""
        from transformers import set_seed

        heads: list[str] = []
        if not head.type.head_in_base:  # the base's own head stays frozen
            heads = [name for name, _ in model.named_children() if name not in (model.base_model_prefix, "dropout")]
        modules = sorted({*(getattr(config, "modules_to_save", None) or ()), *heads, *fresh_poolers(base, model)})
        set_seed(seed)
        model.config.pad_token_id = base.config.pad_token_id  # an adapter's folder records no padding token
        return _with_float32_adapter(self.attach_adapter(model, base, head, config, heads, modules))

    def load(self, adaptation: Adaptation, base: Base, head: Head, *, trainable: bool) -> Any:
        """Load the adapter onto its base, and check that every tensor was loaded."""
        self.check_settings(adaptation, base, head)
        model, fresh_names = load_with_fresh_head(base, head, seed=0, frozen=not adaptation.changed_base)
        check_head_rows(adaptation, model, base, head)
        adapted, loaded, stored = self.load_adapter(model, adaptation, head, trainable=trainable)
        check_loaded(adaptation, base, head, fresh_names, loaded, stored)
        return _with_float32_adapter(adapted) if trainable else adapted

    def check_settings(self, adaptation: Adaptation, base: Base, head: Head) -> None:
        """Check that PEFT knows the settings, and that they fit the base and the head.

        Args:
            adaptation: The adaptation.
            base: Its base.
            head: The task's head.

        Raises:
            CheckpointError: A setting is unknown to the installed PEFT, a pattern is invalid, or the number of virtual
                tokens is missing.
            MismatchError: The adapter is for another task type, or its virtual tokens are for another model.
        """
        from peft import PeftConfig

        config = adaptation.config
        file = f"{adaptation.path}/{ADAPTER_CONFIG}"
        check_patterns(config, [f"{base.prefix}.{name}" for name, _ in base.classifier_body.named_modules()], file)
        config_classes = (self.config_class(config), PeftConfig)
        setting_names = {field.name for cls in config_classes for field in dataclasses.fields(cls)} | OBSOLETE_SETTINGS
        unknown = sorted(key for key, value in config.items() if value and key not in setting_names)
        if unknown:
            listed = ", ".join(f"{key}: {config[key]!r:.60}" for key in unknown[:MAX_LISTED])
            raise CheckpointError(
                f"{file}: the settings {listed} are unknown for a {adaptation.kind} and would be ignored, but the "
                "adapter may have been tuned with them. Update PEFT or regraft, or correct or remove them."
            )
        task_type = config.get("task_type")
        if task_type != head.type.peft_task_type and (self.needs_task_type or task_type is not None):
            raise MismatchError(
                f"{file}: task_type is {task_type!r}, but the task needs an adapter of type {head.type.peft_task_type}"
                ". If it is one, correct task_type."
            )

    def write(self, folder: Path, tensors: Tensors, config: Mapping[str, Any], progress: Progress) -> None:
        """Write the adapter in PEFT's layout."""
        write_adapter(folder, tensors, config)

    def check_bodies(self, adaptation: Adaptation, upgrade: Upgrade) -> None:
        """Do nothing: an adapter stores no body."""

    def check_linear(self, adaptation: Adaptation) -> None:
        """Do nothing: only LoRAs are checked."""

    def report_no_effect(self, adaptation: Adaptation, base: Base, num_texts: int) -> None:
        """Raise an error: an adapter without an effect was probably never tuned."""
        raise MismatchError(
            f"{adaptation.path}: loaded completely, but changes nothing in the output of {base.path} on {num_texts} "
            "texts. Was it ever tuned?"
        )

    def plain_adapter(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, Mapping[str, Any]]:
        """Return an adapter's tensors and config in a form that makes the same change to any base.

        Args:
            adaptation: The adaptation.
            old: The base it was tuned on.

        Returns:
            The stored tensors and config. For a LoRA whose initialisation changed its base, the tensors and config of
            the equivalent plain LoRA.

        Raises:
            CheckpointError: The initialisation cannot be reproduced from the base alone.
        """
        return adaptation.checkpoint, adaptation.config

    def graft(self, adaptation: Adaptation, upgrade: Upgrade, *, replace: bool = False) -> GraftedAdaptation:
        """Copy the adapter, and graft the tensors that it stores in place of its base's."""
        _check_pooler(adaptation, upgrade)
        _check_ties(adaptation, upgrade)
        tensors, config = self.plain_adapter(adaptation, upgrade.old)
        row_match = match_token_rows(adaptation, upgrade)
        grafted, replaced = graft_replacements(adaptation, tensors, upgrade, row_match, replace=replace)
        config = renumber_token_ids(adaptation, config, row_match)
        config = {**config, "base_model_name_or_path": upgrade.new.name, "revision": None}
        return GraftedAdaptation(grafted, config, replaced)

    def transform(
        self, adaptation: Adaptation, upgrade: Upgrade, rule: Rule, progress: Progress, *, replace: bool = False
    ) -> GraftedAdaptation:
        """Raise an error: transforming the deltas of this kind is not supported."""
        raise KindError(
            f"{adaptation.path}: the deltas of a {adaptation.kind} cannot be transformed. Use direct or init."
        )

    def remove_delta(self, model: Any, upgrade: Upgrade, row_match: RowMatch | None) -> Any:
        """Raise an error: removing an adapter of this kind is not supported."""
        raise KindError(f"{upgrade.new.path}: an adapter of this kind cannot be removed from it. Use direct or init.")

    def replace_vector(
        self,
        adaptation: Adaptation,
        upgrade: Upgrade,
        names: Collection[str],
        read_tensor: Callable[[str], torch.Tensor],
        progress: Progress,
        *,
        replace: bool = False,
    ) -> GraftedAdaptation:
        """Graft the adapter, and replace its tensors by those of the new vector."""
        grafted = self.graft(adaptation, upgrade, replace=replace)
        tensors = {
            name: read_tensor(name).to(tensor.dtype) if name in names else tensor
            for name, tensor in grafted.tensors.items()
        }
        return dataclasses.replace(grafted, tensors=tensors)

    def unmatched_tensor_names(self, adaptation: Adaptation, upgrade: Upgrade) -> list[str]:
        """Return the names of tensors that are stored in place of a tensor that only one base has."""

        def is_unmatched(name: str) -> bool:
            return bool(replaced_parameter(name, upgrade.old)) != bool(replaced_parameter(name, upgrade.new))

        return sorted(filter(is_unmatched, adaptation.checkpoint))

    def replaces_base_tensors(self, adaptation: Adaptation, base: Base) -> bool:
        """Return whether a stored tensor has the name of a tensor of the base's body."""
        return any(replaced_parameter(name, base) for name in adaptation.checkpoint)

    def num_embedding_rows(self, adaptation: Adaptation, base: Base) -> int | None:
        """Return the number of rows of embeddings that are stored, or to which a LoRA is applied; None without any."""
        return num_adapter_rows(adaptation, base)

    def has_token_rows(self, adaptation: Adaptation) -> bool:
        """Return whether a LoRA is applied to embeddings."""
        return any("lora_embedding_A" in name for name in adaptation.checkpoint)

    def vector(self, adaptation: Adaptation, base: Base) -> Vector:
        """Return the tensors of `plain_adapter` as a vector."""
        tensors, config = self.plain_adapter(adaptation, base)
        head_names = _head_names(adaptation, base)
        names = [
            name
            for name in tensors
            if name_without_prefix(name) not in head_names and not replaced_parameter(name, base)
        ]
        if not names:
            raise KindError(
                f"{adaptation.path}: stores only tensors in place of its base's, for which no map is learned. Use "
                "direct."
            )
        stored_names = {name: name for name in names}
        return Vector(
            str(adaptation.path), adaptation.kind, adaptation.fingerprint, tensors, config, None, stored_names
        )

    def merge(self, adaptation: Adaptation, model: Any, old: Base, head: Head) -> Any:
        """Raise an error: an adapter of this kind does not change weights, so it cannot be merged into them."""
        raise RecipeError(
            f"{adaptation.path}: a {adaptation.kind} does not change the weights of its base, so it can be recycled, "
            "but not converted."
        )


def _with_float32_adapter(model: Any) -> Any:
    """Convert trainable parameters to float32, in which they are tuned; their base may be stored in bfloat16."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return model


def _models(adaptation: Adaptation, base: Base) -> list[Any]:
    """Build models on the meta device with the heads that the adaptation may be for, if transformers has them."""
    import transformers

    recorded = adaptation.task_type
    types = [task_types()[recorded]] if recorded else adaptation.family.matching_task_types(adaptation.config)
    names = dict.fromkeys(task_type.auto_class for task_type in types)
    return [
        base.model_with_head(name) for name in names if type(base.config) in getattr(transformers, name)._model_mapping
    ]


def _head_names(adaptation: Adaptation, base: Base) -> set[str]:
    """Return the names of a model's tensors that its base lacks: the head's, and possibly a pooler's."""
    names = {name for model in _models(adaptation, base) for name in model.state_dict()}
    return {
        name
        for name in names
        if name.removeprefix(base.prefix + ".") not in base.parameters and name not in base.language_head
    }


def _check_ties(adaptation: Adaptation, upgrade: Upgrade) -> None:
    """Check that an adapter of a language model that tunes embeddings has the same ties on both bases.

    The change of tied embeddings is a change of the head too, which is lost if the new base has separate tensors.
    """
    old, new = upgrade.old, upgrade.new
    if old.ties_head == new.ties_head or adaptation.config.get("task_type") != "CAUSAL_LM":
        return
    embeddings = str(old.architecture.embeddings)
    module = embeddings.removesuffix(".weight")
    tuned = [
        name for name in adaptation.checkpoint if f"{module}." in name or replaced_parameter(name, old) == embeddings
    ]
    if tuned:
        tied, untied = (old, new) if old.ties_head else (new, old)
        raise MismatchError(
            f"{adaptation.path}: tunes the embeddings ({tuned[0]}), to which {tied.path} ties its head, but not "
            f"{untied.path} (tie_word_embeddings in config.json), so the adapter's change of the head has no "
            "counterpart. Convert it to full on the old base, and untie that first."
        )


def _check_pooler(adaptation: Adaptation, upgrade: Upgrade) -> None:
    """Check that the new base has the pooler that the adapter was tuned with, unless the adapter stores it."""
    old, new = upgrade.old, upgrade.new
    poolers = [name for name in sorted(old.body.keys() - new.body.keys()) if is_optional(name)]
    missing = [name for name in poolers if not any(stored.endswith(f".{name}") for stored in adaptation.checkpoint)]
    if missing and any(getattr(model.base_model, "pooler", None) is not None for model in _models(adaptation, new)):
        raise MismatchError(
            f"{new.path}: lacks {', '.join(missing)}, which {adaptation.path} was tuned with on {old.path}; "
            f"pre-training left it out. Add it to the new base: regraft weights graft --old-base {old.path} "
            f"--new-base {new.path} --adaptation {old.path} --out FOLDER."
        )
