"""Adaptations on disk, and the interface that each family of adaptations implements."""

from __future__ import annotations

import dataclasses
import functools
import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from regraft.checkpoint import fingerprint
from regraft.errors import MismatchError
from regraft.transformers_folder import read_tokenizer
from regraft.vocabulary import has_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedTokenizerBase

    from regraft.adaptation.vector import Vector
    from regraft.architecture import Architecture
    from regraft.base import Base
    from regraft.checkpoint import Checkpoint
    from regraft.checkpoint.derived import Tensors
    from regraft.progress import Progress
    from regraft.task import Head, Task
    from regraft.upgrade import Upgrade
    from regraft.weights import RowMatch

    Rule = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)

Lineage = Literal["proven", "unproven", "forced"]


@dataclasses.dataclass(frozen=True, eq=False)
class Adaptation:
    """Weights on disk that were tuned for a task on a base.

    Args:
        path: A plain transformers folder (full fine-tune) or PEFT folder (all other kinds).
        kind: `full`, `lora`, `ia3`, `prefix`, `prompt`, `layernorm`, `p-tuning`, `bottleneck`, or PEFT's name of
            another type in lower case.
        family: The operations on adaptations of this kind.
        labels: The label names in the order of the head's outputs; None if the folder does not record them.
        base: The fingerprint of the base it was tuned on; None if another tool wrote the folder.
        checkpoint: The tensors, which are read when they are used.
        config: The content of `config.json` or `adapter_config.json`.
        task_type: The name of its task type; None if another tool or regraft 0.1 wrote the folder.
    """

    path: Path
    kind: str
    family: Family = dataclasses.field(repr=False)
    labels: tuple[str, ...] | None
    base: str | None
    checkpoint: Checkpoint
    config: dict[str, Any] = dataclasses.field(repr=False)
    task_type: str | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the weights."""
        return fingerprint(self.checkpoint)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer in its folder, which may have tokens that its base's lacks; None if it has none."""
        return read_tokenizer(self.path) if has_tokenizer(self.path) else None

    @property
    def exact_kind(self) -> str:
        """The kind, where a DoRA is `dora` rather than `lora`."""
        return "dora" if self.config.get("use_dora") else self.kind

    @property
    def changed_base(self) -> bool:
        """Whether its initialisation changed its base, as PiSSA's does: its tensors mean nothing on another base."""
        return self.family.changed_base(self.config)

    @property
    def num_virtual_tokens(self) -> int:
        """The number of virtual tokens that the adapter puts before each input."""
        return self.family.num_virtual_tokens(self.config)

    def check_base(self, base: Base, *, force: bool = False) -> Lineage:
        """Check that the adaptation was tuned on a base.

        Args:
            base: The base that the adaptation will be loaded on.
            force: Whether to accept a base other than the recorded one, with a warning.

        Returns:
            `proven` if the recorded fingerprint is the base's, `forced` if the fingerprint or the revision of another
            base is recorded and `force` is set, and `unproven` in all other cases, with a warning.

        Raises:
            MismatchError: The fingerprint or the revision of another base is recorded, and `force` is not set.
        """
        if self.base in (base.fingerprint, base.stored_fingerprint):
            return "proven"
        problem = None
        name, _, revision = base.name.partition("@")
        recorded = str(self.config.get("revision") or "")
        if self.base and base.parent_fingerprint == self.base:
            problem = f"it was tuned on the base that {base.path} was pre-trained from, so {base.path} is the new base"
        elif self.base:
            problem = f"it records the base {self.base}, but this one is {base.fingerprint}"
        elif recorded and revision and recorded != revision and self.config.get("base_model_name_or_path") == name:
            problem = f"it records revision {recorded} of {name}, but this one is {revision}"
        if problem and not force:
            raise MismatchError(
                f"{self.path} was not tuned on {base.path}: {problem}. Use the base it was tuned on, or --force."
            )
        if problem:
            logger.warning("%s was not tuned on %s: %s. Used because of --force.", self.path, base.path, problem)
            return "forced"
        logger.warning("%s records no fingerprint, so it is unproven that it was tuned on %s.", self.path, base.path)
        return "unproven"


@dataclasses.dataclass(frozen=True, eq=False)
class GraftedAdaptation:
    """The content of an adaptation that was grafted onto another base.

    Args:
        tensors: The tensors by stored name.
        config: The content of `config.json` or `adapter_config.json`.
        replaced: The names of the grafted tensors that an adapter stores in place of its base's.
    """

    tensors: Tensors
    config: Mapping[str, Any]
    replaced: tuple[str, ...] = ()


class Family(ABC):
    """The operations that differ between families of adaptations, such as loading and grafting. It has no state."""

    tunes_base: ClassVar[bool] = False
    """Whether the base's own tensors are tuned, so that the delta is tuned − base, tensor by tensor."""

    @abstractmethod
    def matching_task_types(self, config: Mapping[str, Any]) -> list[type[Task]]:
        """Return the task types that an adaptation can belong to, according to its config."""

    def num_virtual_tokens(self, config: Mapping[str, Any]) -> int:
        """Return the number of virtual tokens that an adaptation puts before each input, according to its config."""
        return 0

    def changed_base(self, config: Mapping[str, Any]) -> bool:
        """Return whether an adaptation's initialisation changed its base, according to its config."""
        return False

    @abstractmethod
    def read_config(self, adaptation: Adaptation, *, for_new_adapter: bool = False) -> Any:
        """Read an adaptation's config.

        Args:
            adaptation: The adaptation.
            for_new_adapter: Whether a new adapter will be initialised with the config. Any initialisation apart from
                `DETERMINED_INITS`, such as one that needs data, is then replaced by PEFT's default.

        Returns:
            PEFT's or regraft's config; None for a full fine-tune.

        Raises:
            CheckpointError: The config is malformed or invalid.
        """

    @abstractmethod
    def prepare_for_tuning(self, model: Any, base: Base, head: Head, config: Any, seed: int) -> Any:
        """Implement the function `prepare_for_tuning`."""

    def initial_factors(self, model: Any) -> Tensors:
        """Implement the function `initial_factors`."""
        return {}

    @abstractmethod
    def load(self, adaptation: Adaptation, base: Base, head: Head, *, trainable: bool) -> Any:
        """Implement the function `load_model`."""

    @abstractmethod
    def save(self, model: Any, base: Base, folder: Path, initial_factors: Tensors) -> None:
        """Write a tuned model's tensors and config; see the function `save_model`."""

    @abstractmethod
    def write(self, folder: Path, tensors: Tensors, config: Mapping[str, Any], progress: Progress) -> None:
        """Write tensors by stored name, and the config, as a plain transformers or PEFT folder."""

    def config_for_head(self, config: Mapping[str, Any], head: Head) -> Mapping[str, Any]:
        """Return the config for another head. An adapter's config does not depend on the head."""
        return config

    @abstractmethod
    def check_bodies(self, adaptation: Adaptation, upgrade: Upgrade) -> None:
        """Check that the stored body has the tensors of both bases, before anything is loaded."""

    @abstractmethod
    def report_no_effect(self, adaptation: Adaptation, base: Base, num_texts: int) -> None:
        """Report that a model's outputs equal the base's on some texts: warn, or raise an error for an adapter."""

    @abstractmethod
    def graft(self, adaptation: Adaptation, upgrade: Upgrade, *, replace: bool = False) -> GraftedAdaptation:
        """Graft an adaptation onto the new base: new + (tuned − old), or the same adapter.

        Args:
            adaptation: An adaptation of `upgrade.old`.
            upgrade: The two bases.
            replace: Whether the tensors that an adapter stores in place of the base's are copied, not grafted.

        Raises:
            CheckpointError: The adapter's initialisation cannot be reproduced from the base alone.
            MismatchError: A tensor has another shape than in a base, or is missing there, such as the adapter's pooler.
        """

    @abstractmethod
    def transform(
        self, adaptation: Adaptation, upgrade: Upgrade, rule: Rule, progress: Progress, *, replace: bool = False
    ) -> GraftedAdaptation:
        """Apply a rule to every delta of an adaptation, as `write_transform` describes."""

    @abstractmethod
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
        """Graft an adaptation onto the new base with a different vector.

        Args:
            adaptation: An adaptation of `upgrade.old`.
            upgrade: The two bases.
            names: The names of the tensors of the new vector.
            read_tensor: Returns a tensor of the new vector, given its name.
            progress: Not called by any family yet.
            replace: As for `graft`.
        """

    @abstractmethod
    def unmatched_tensor_names(self, adaptation: Adaptation, upgrade: Upgrade) -> list[str]:
        """Return the names of stored tensors with a counterpart in only one base, such as a pooler; they are copied."""

    @abstractmethod
    def replaces_base_tensors(self, adaptation: Adaptation, base: Base) -> bool:
        """Return whether an adapter stores tensors in place of its base's."""

    @abstractmethod
    def num_embedding_rows(self, adaptation: Adaptation, base: Base) -> int | None:
        """Return the number of rows of the embeddings that are stored or adapted by a LoRA; None if there are none."""

    @abstractmethod
    def has_token_rows(self, adaptation: Adaptation) -> bool:
        """Return whether an adaptation's vector may have tensors with a row or a column per token."""

    @abstractmethod
    def vector(self, adaptation: Adaptation, base: Base) -> Vector:
        """Return an adaptation as a vector, without its head and the tensors stored in place of its base's.

        Args:
            adaptation: The adaptation.
            base: The base it was tuned on.

        Returns:
            The vector, whose tensors are read when they are used.

        Raises:
            CheckpointError: The adapter's initialisation cannot be reproduced from the base alone.
            KindError: The vector is empty.
        """

    def tuned_body_tensors(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, dict[str, str]] | None:
        """Return the tuned tensors of the body.

        Args:
            adaptation: The adaptation.
            old: The base it was tuned on.

        Returns:
            The tensors by stored name, and the stored names by the names inside the body; None for adapters that are
            not LoRAs, and for LoRAs that cannot be merged.
        """
        return None

    @abstractmethod
    def check_linear(self, adaptation: Adaptation) -> None:
        """Check that a LoRA changes the weights of linear layers only, or raise a KindError."""

    @abstractmethod
    def remove_delta(self, model: Any, upgrade: Upgrade, row_match: RowMatch | None) -> Any:
        """Remove the delta from a grafted model; the head stays.

        Args:
            model: The grafted model, which may be modified.
            upgrade: The two bases.
            row_match: The match of the rows of the vocabularies; None if they have the same tokens in the same rows.

        Returns:
            The new base with the old head.

        Raises:
            KindError: The adapter has no delta that can be removed.
        """

    def rule_tensors(self, tensors: dict[str, torch.Tensor], body: Architecture) -> dict[str, torch.Tensor]:
        """Return parameters of the body under the names that the rule of `transform` gets."""
        return tensors

    @abstractmethod
    def tunes_module_weight(self, module: str, base: Base) -> bool:
        """Return whether a module's own weight is tuned, rather than an adapter on it."""

    def proportional_parameter(self, parameter: str, model: Any) -> str | None:
        """Return the name of the base's weight that a parameter of the model changes in proportion to itself, or None.

        For bottleneck adapters, it is the weight of the layer whose output the parameter changes.
        """
        return None

    @abstractmethod
    def parameter_names(self, model: Any) -> dict[str, str]:
        """Return the names of a model's parameters by their stored names."""

    @abstractmethod
    def merge(self, adaptation: Adaptation, model: Any, old: Base, head: Head) -> Any:
        """Merge an adaptation into its base.

        Args:
            adaptation: The adaptation.
            model: The adaptation as a model, which may be modified.
            old: The base it was tuned on.
            head: Its head.

        Returns:
            A full fine-tune with the same outputs; for a full fine-tune, `model` itself.

        Raises:
            MismatchError: The adapter changes no weight of its base.
            RecipeError: The adapter's kind does not change weights of its base, or PEFT cannot merge it.
        """
