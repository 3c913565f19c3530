"""What PEFT's adapters and bottleneck adapters have in common: a folder of PEFT's layout, beside a frozen base."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from regraft.adaptation.adaptation import CarriedAdaptation, Family
from regraft.adaptation.adapter_folder import ADAPTER_CONFIG, write_adapter
from regraft.adaptation.fresh import fresh_parts, fresh_poolers
from regraft.adaptation.layout import HARMLESS, named_twice
from regraft.adaptation.lora import START, model_name
from regraft.adaptation.patterns import check_patterns
from regraft.adaptation.replaced import graft_replaced, renumbered_settings, replaced_parameter, rows_in_adapter
from regraft.adaptation.tokens import match_token_rows
from regraft.adaptation.vector import Vector
from regraft.checkpoint import FLOATING, dtype_of, shape_of
from regraft.errors import CheckpointError, KindError, MismatchError, RecipeError
from regraft.task.types import task_types
from regraft.weights import is_optional

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation, Rule, Tensors
    from regraft.base import Base
    from regraft.errors import RegraftError
    from regraft.progress import Progress
    from regraft.task import Head, Task
    from regraft.upgrade import Upgrade
    from regraft.weights import RowMatch


class Adapter(Family):
    """Weights beside a frozen base, with a head that is saved whole."""

    needs_task_type: ClassVar[bool] = False
    """Whether PEFT builds another model where the settings name no type of task."""

    def matching_task_types(self, config: Mapping[str, Any]) -> list[type[Task]]:
        """Return those of PEFT's task type; all where none is named."""
        named = config.get("task_type")
        return [of for of in task_types().values() if named in (None, of.peft_type)]

    @abstractmethod
    def config_class(self, config: Mapping[str, Any]) -> Any:
        """Return the dataclass whose fields are the settings of `adapter_config.json`."""

    @abstractmethod
    def attach_adapter(
        self, model: Any, base: Base, head: Head, config: Any, heads: Sequence[str], modules: Sequence[str]
    ) -> Any:
        """Put a fresh adapter on a model, and have modules saved whole.

        Args:
            model: From `fresh_model`.
            base: The base it came from.
            head: The head that it has.
            config: What kind of adapter.
            heads: The names of the modules beside its body.
            modules: The names of all that are saved whole, the heads among them.

        Returns:
            The model with the adapter.
        """

    @abstractmethod
    def load_adapter(
        self, model: Any, adaptation: Adaptation, head: Head, *, trainable: bool
    ) -> tuple[Any, dict[str, torch.Tensor], Tensors]:
        """Put a stored adapter on a base with a fresh head.

        Args:
            model: The base.
            adaptation: The adapter.
            head: The task's head.
            trainable: Whether it can be tuned further.

        Returns:
            The model, what is in it of the adapter by stored name, and what should be: the tensors as they are stored.
        """

    def attach(self, model: Any, base: Base, head: Head, config: Any, seed: int) -> Any:
        """Add the heads, and a pooler that the base lacks, to what is saved whole."""
        from transformers import set_seed

        heads = [name for name, _ in model.named_children() if name != model.base_model_prefix and name != "dropout"]
        modules = sorted({*(getattr(config, "modules_to_save", None) or ()), *heads, *fresh_poolers(base)})
        set_seed(seed)
        model.config.pad_token_id = base.config.pad_token_id  # an adapter's folder names none of its own
        return self.attach_adapter(model, base, head, config, heads, modules)

    def load(self, adaptation: Adaptation, base: Base, head: Head, *, trainable: bool) -> Any:
        """Put the adapter on its base, and account for every tensor."""
        self.check_settings(adaptation, base, head)
        model, fresh = fresh_parts(base, head, seed=0)
        adapted, landed, stored = self.load_adapter(model, adaptation, head, trainable=trainable)
        _account(adaptation, base, head, fresh, landed, stored)
        return adapted

    def check_settings(self, adaptation: Adaptation, base: Base, head: Head) -> None:
        """Refuse settings that would be passed over, or that are not for a classifier of this size.

        Args:
            adaptation: The tuned weights.
            base: Its base.
            head: The task's head.

        Raises:
            CheckpointError: The installed PEFT does not know a setting, or a number of virtual tokens is missing.
            MismatchError: It is for another task, or its virtual tokens are for another model.
        """
        from peft import PeftConfig

        config, where = adaptation.config, f"{adaptation.path}/{ADAPTER_CONFIG}"
        check_patterns(config, [f"{base.prefix}.{name}" for name, _ in base.bare.named_modules()], where)
        fields = {field.name for of in (self.config_class(config), PeftConfig) for field in dataclasses.fields(of)}
        unknown = sorted(key for key, value in config.items() if value and key not in fields and key not in HARMLESS)
        if unknown:
            named = ", ".join(f"{key}: {config[key]!r:.60}" for key in unknown[:4])
            raise CheckpointError(
                f"{where}: the settings {named} are not known for a {adaptation.kind}, and would be passed over: what "
                "was tuned with them would be another model without. Update PEFT or regraft, or correct or remove them."
            )
        task_type = config.get("task_type")
        if task_type != head.type.peft_type and (self.needs_task_type or task_type is not None):
            raise MismatchError(
                f"{where}: task_type is {task_type!r}, and the task takes an adapter of type {head.type.peft_type}. "
                "If it is one, correct that."
            )

    def write(self, into: Path, tensors: Tensors, settings: Mapping[str, Any], progress: Progress) -> None:
        """Write the adapter in PEFT's layout."""
        write_adapter(into, tensors, settings)

    def check_bodies(self, adaptation: Adaptation, upgrade: Upgrade) -> None:
        """Accept it: an adapter stores no body."""

    def check_linear(self, adaptation: Adaptation) -> None:
        """Accept it: it adds to no weights at all, or to the outputs of linear layers."""

    def report_no_effect(self, adaptation: Adaptation, base: Base, texts: int) -> None:
        """Refuse an adapter that changes nothing."""
        raise MismatchError(
            f"{adaptation.path}: loaded wholly, and it changes nothing in the output of {base.path} on {texts} texts. "
            "Was it ever tuned?"
        )

    def plain(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, Mapping[str, Any]]:
        """Return an adapter's tensors and config such that they mean the same change on any base.

        Args:
            adaptation: The tuned weights.
            old: The base they were tuned on.

        Returns:
            Both as they are stored; of a LoRA that took its start out of its base, those of the plain LoRA.

        Raises:
            CheckpointError: Its start cannot be found again from the base alone.
        """
        return adaptation.checkpoint, adaptation.config

    def graft(self, adaptation: Adaptation, upgrade: Upgrade, *, replace: bool = False) -> CarriedAdaptation:
        """Take the adapter as it is, and graft what it stores in place of its base's tensors."""
        _check_pooler(adaptation, upgrade)
        tensors, settings = self.plain(adaptation, upgrade.old)
        rows = match_token_rows(adaptation, upgrade)
        grafted, replaced = graft_replaced(adaptation, tensors, upgrade, rows, replace=replace)
        settings = renumbered_settings(adaptation, settings, rows)
        return CarriedAdaptation(
            grafted, {**settings, "base_model_name_or_path": upgrade.new.name, "revision": None}, replaced
        )

    def transform(
        self, adaptation: Adaptation, upgrade: Upgrade, rule: Rule, progress: Progress, *, replace: bool = False
    ) -> CarriedAdaptation:
        """Refuse: it is no change of its base's tensors."""
        raise KindError(f"{adaptation.path}: a {adaptation.kind} has no deltas of its base's tensors.")

    def remove_delta(self, model: Any, upgrade: Upgrade, rows: RowMatch | None) -> Any:
        """Refuse: there is none."""
        raise KindError(f"{upgrade.new.path}: what is put on it has no deltas of the base's tensors.")

    def replace_vector(
        self,
        adaptation: Adaptation,
        upgrade: Upgrade,
        names: Collection[str],
        numbers: Callable[[str], torch.Tensor],
        progress: Progress,
        *,
        replace: bool = False,
    ) -> CarriedAdaptation:
        """Graft the adapter, and put the numbers in the place of its own."""
        carried = self.graft(adaptation, upgrade, replace=replace)
        tensors = {
            name: numbers(name).to(carried.tensors[name].dtype) if name in names else carried.tensors[name]
            for name in carried.tensors
        }
        return dataclasses.replace(carried, tensors=tensors)

    def unmatched_tensors(self, adaptation: Adaptation, upgrade: Upgrade) -> list[str]:
        """Name the stored tensors that take the place of the base's in one of the bases alone."""
        in_old, in_new = (
            {name for name in adaptation.checkpoint if replaced_parameter(name, base)}
            for base in (upgrade.old, upgrade.new)
        )
        return sorted(in_old ^ in_new)

    def replaces_base_tensors(self, adaptation: Adaptation, base: Base) -> bool:
        """Return whether a stored tensor has the name of one of the base's body."""
        return any(replaced_parameter(name, base) for name in adaptation.checkpoint)

    def num_embedding_rows(self, adaptation: Adaptation, base: Base) -> int | None:
        """Count the rows of embeddings that it stores whole, or that a LoRA is on."""
        return rows_in_adapter(adaptation, base)

    def has_token_rows(self, adaptation: Adaptation) -> bool:
        """Return whether a LoRA is on embeddings."""
        return any("lora_embedding_A" in name for name in adaptation.checkpoint)

    def vector(self, adaptation: Adaptation, base: Base) -> Vector:
        """See what it adds to its base as a vector: of a LoRA that began in its base, the plain one."""
        tensors, settings = self.plain(adaptation, base)
        heads = _heads(base)
        names = {
            name: name for name in tensors if model_name(name) not in heads and replaced_parameter(name, base) is None
        }
        if not names:
            raise KindError(
                f"{adaptation.path}: stores nothing but what takes the place of its base's tensors, which no map is "
                "learned for. Take direct."
            )
        return Vector(str(adaptation.path), adaptation.kind, adaptation.fingerprint, tensors, settings, None, names)

    def merged(self, adaptation: Adaptation, model: Any, old: Base, head: Head) -> Any:
        """Refuse an adapter that is no change of weights."""
        raise RecipeError(
            f"{adaptation.path}: a {adaptation.kind} works beside the weights of its base, not as a change of them: it "
            "can be recycled, but not converted."
        )


def _heads(base: Base) -> set[str]:
    """Name the tensors of a classifier that its base has not: the head's, and a pooler's that the base lacks."""
    names = base.classifier.state_dict()
    return {name for name in names if name.removeprefix(base.prefix + ".") not in base.parameters}


def _check_pooler(adaptation: Adaptation, upgrade: Upgrade) -> None:
    """Refuse a new base that lacks a pooler which the adapter was tuned with and does not store."""
    old, new = upgrade.old, upgrade.new
    lost = [name for name in sorted(old.body.keys() - new.body.keys()) if is_optional(name)]
    lost = [name for name in lost if not any(stored.endswith(f".{name}") for stored in adaptation.checkpoint)]
    if lost and new.has_pooler:
        raise MismatchError(
            f"{new.path}: lacks {', '.join(lost)}, which {adaptation.path} was tuned with on {old.path}: pre-training "
            f"left it out. Add it to the new base: regraft weights graft --new {new.path} --tuned {old.path} --old "
            f"{old.path} --out FOLDER."
        )


def _account(
    adaptation: Adaptation,
    base: Base,
    head: Head,
    fresh: Sequence[str],
    landed: dict[str, torch.Tensor],
    stored: Tensors,
) -> None:
    """Compare what is in the model with what is stored: the same names, shapes and values, and no fresh head left."""
    import torch

    unfilled = [name for name in fresh if not {START + name, START.replace("model.", "", 1) + name} & landed.keys()]
    shared = sorted(landed.keys() & stored.keys())
    misshapen = [name for name in shared if tuple(landed[name].shape) != shape_of(stored, name)]
    quantised = [name for name in shared if landed[name].is_floating_point() and dtype_of(stored, name) not in FLOATING]
    lists = {
        "missing": sorted(landed.keys() - stored.keys()),
        "without a place": sorted(stored.keys() - landed.keys()),
        "of another shape": [f"{n} {shape_of(stored, n)}, expected {tuple(landed[n].shape)}" for n in misshapen],
        "stored as no floating-point numbers": [f"{name} ({dtype_of(stored, name)})" for name in quantised],
        "in the model that neither the base nor the adaptation fills": unfilled,
    }
    if any(lists.values()):
        problems = "; ".join(f"{len(names)} {what}: {', '.join(names[:4])}" for what, names in lists.items() if names)
        refusal: type[RegraftError] = MismatchError if misshapen else CheckpointError
        raise refusal(
            f"{adaptation.path}: does not fit {base.path} with {head}. Tensors {problems}."
            f"{named_twice(stored.keys() - landed.keys())}"
        )
    for name in shared:
        value = landed[name].cpu()
        if not torch.equal(value.nan_to_num(), stored[name].to(value.dtype).nan_to_num()):
            raise CheckpointError(
                f"{adaptation.path}: tensor {name!r} did not land in the model as it is stored: a {adaptation.kind} "
                "set up like this cannot be loaded exactly (or not be tuned further)."
            )
