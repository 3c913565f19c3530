"""What tuning left behind, whatever its kind, and what each family of such adaptations knows to do with it."""

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
    from regraft.progress import Progress
    from regraft.task import Head, Task
    from regraft.upgrade import Upgrade
    from regraft.weights import RowMatch

    Tensors = Mapping[str, torch.Tensor]
    Rule = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)

Lineage = Literal["proven", "unproven", "forced"]


@dataclasses.dataclass(frozen=True, eq=False)
class Adaptation:
    """Weights tuned for a task on some base, on disk.

    Args:
        path: A plain transformers folder (full fine-tune) or PEFT folder (all other kinds).
        kind: `full`, `lora`, `ia3`, `prefix`, `prompt`, `layernorm`, `bottleneck`, or PEFT's name of another type.
        family: What is done with adaptations of this kind.
        labels: The label names in the order of the head's outputs; None if the folder does not tell.
        base: The fingerprint of the base it was tuned on; None if it was made elsewhere.
        checkpoint: Its tensors, unread.
        config: The content of its `config.json` or `adapter_config.json`.
        task_type: The name of the type of task that it is for; None if it was made elsewhere, or by regraft 0.1.
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
        """Which weights these are."""
        return fingerprint(self.checkpoint)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its own tokenizer, which may have tokens that its base's has not; None if its folder holds none."""
        return read_tokenizer(self.path) if has_tokenizer(self.path) else None

    @property
    def variant(self) -> str:
        """Its kind, a DoRA told from a LoRA."""
        return "dora" if self.config.get("use_dora") else self.kind

    @property
    def changed_base(self) -> bool:
        """Whether its start was taken out of its base, as PiSSA's: it means nothing without that base."""
        return self.family.changed_base(self.config)

    @property
    def virtual_tokens(self) -> int:
        """How many tokens it puts before every input."""
        return self.family.virtual_tokens(self.config)

    def check_base(self, base: Base, *, force: bool = False) -> Lineage:
        """Refuse a base that is not the one this was tuned on.

        Args:
            base: The base in hand.
            force: Take it in spite of that.

        Returns:
            `proven` if the recorded fingerprint is the base's, `unproven` if none is recorded, `forced` if it is
            another one and that was wanted.

        Raises:
            MismatchError: The recorded fingerprint is another one, or the revision is.
        """
        if self.base in (base.fingerprint, base.stored_fingerprint):
            return "proven"
        problem = None
        name, _, revision = base.name.partition("@")
        recorded = str(self.config.get("revision") or "")
        if self.base and base.made_from == self.base:
            problem = (
                f"it was tuned on the base that {base.path} was pre-trained from: give {base.path} as the new base"
            )
        elif self.base:
            problem = f"it records the base {self.base}, and this one is {base.fingerprint}"
        elif recorded and revision and recorded != revision and self.config.get("base_model_name_or_path") == name:
            problem = f"it records revision {recorded} of {name}, and this is {revision}"
        if problem and not force:
            raise MismatchError(
                f"{self.path} was not tuned on {base.path}: {problem}. Give the base it was tuned on (or --force)."
            )
        if problem:
            logger.warning("%s was not tuned on %s: %s. Used by force.", self.path, base.path, problem)
            return "forced"
        logger.warning("%s does not record its base: that it was tuned on %s is unproven.", self.path, base.path)
        return "unproven"


@dataclasses.dataclass(frozen=True, eq=False)
class CarriedAdaptation:
    """What an adaptation became on another base.

    Args:
        tensors: By stored name.
        settings: The content of its `config.json` or `adapter_config.json`.
        replaced: The names of an adapter's tensors that were grafted in place of the base's.
    """

    tensors: Tensors
    settings: Mapping[str, Any]
    replaced: tuple[str, ...] = ()


class Family(ABC):
    """How the adaptations of a family are loaded, saved and grafted, and what their deltas are; it holds no state."""

    tunes_base: ClassVar[bool] = False
    """Whether the base's own tensors are tuned, so that a delta is tuned − base, tensor by tensor."""

    @abstractmethod
    def matching_task_types(self, config: Mapping[str, Any]) -> list[type[Task]]:
        """Return the types of task that an adaptation of these settings can be for."""

    def virtual_tokens(self, config: Mapping[str, Any]) -> int:
        """Return how many tokens an adaptation of these settings puts before every input."""
        return 0

    def changed_base(self, config: Mapping[str, Any]) -> bool:
        """Return whether an adaptation of these settings took its start out of its base."""
        return False

    @abstractmethod
    def read_config(self, adaptation: Adaptation, *, afresh: bool = False) -> Any:
        """Read how an adaptation was set up.

        Args:
            adaptation: The tuned weights.
            afresh: Whether a fresh one like it is made: a start that needs data is then replaced by the usual one.

        Returns:
            PEFT's config, or ours; None of a full fine-tune.

        Raises:
            CheckpointError: PEFT cannot read it.
        """

    @abstractmethod
    def attach(self, model: Any, base: Base, head: Head, config: Any, seed: int) -> Any:
        """Put a fresh adapter on a model that has a fresh head: the function `attach` says how."""

    def start(self, model: Any) -> Tensors:
        """Copy what an adapter took out of its base, before the first step: the function `initial_factors` says how."""
        return {}

    @abstractmethod
    def load(self, adaptation: Adaptation, base: Base, head: Head, *, trainable: bool) -> Any:
        """Load an adaptation as a model, wholly or not at all: the function `load_model` says how."""

    @abstractmethod
    def save(self, model: Any, base: Base, into: Path, start: Tensors) -> None:
        """Write a tuned model's tensors and settings: the function `save_model` says how."""

    @abstractmethod
    def write(self, into: Path, tensors: Tensors, settings: Mapping[str, Any], progress: Progress) -> None:
        """Write tensors by stored name, and settings, into a folder as plain transformers or PEFT reads them."""

    def settings_for_head(self, settings: Mapping[str, Any], head: Head) -> Mapping[str, Any]:
        """Return settings with another head; an adapter's name none, and stay what they are."""
        return settings

    @abstractmethod
    def check_bodies(self, adaptation: Adaptation, upgrade: Upgrade) -> None:
        """Refuse an adaptation that stores another body than the bases', before anything is loaded."""

    @abstractmethod
    def report_no_effect(self, adaptation: Adaptation, base: Base, texts: int) -> None:
        """Warn of an adaptation that changes nothing its base computes for some texts, or refuse it if an adapter."""

    @abstractmethod
    def graft(self, adaptation: Adaptation, upgrade: Upgrade, *, replace: bool = False) -> CarriedAdaptation:
        """Put an adaptation onto the new base: new + (tuned − old), or the same adapter.

        Args:
            adaptation: What was tuned on `upgrade.old`.
            upgrade: The two bases.
            replace: Whether an adapter's tensors take the place of the new base's as they are stored.

        Returns:
            What it is there.

        Raises:
            CheckpointError: Its start cannot be found again from the base alone.
            MismatchError: A tensor has another shape than the base's, or the new base lacks the old one's pooler.
        """

    @abstractmethod
    def transform(
        self, adaptation: Adaptation, upgrade: Upgrade, rule: Rule, progress: Progress, *, replace: bool = False
    ) -> CarriedAdaptation:
        """Apply a rule to every delta of an adaptation, as `write_transform` describes."""

    @abstractmethod
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
        """Put an adaptation onto the new base with other numbers in its vector.

        Args:
            adaptation: What was tuned on `upgrade.old`.
            upgrade: The two bases.
            names: Those of the vector.
            numbers: Returns a tensor of the vector by its name there.
            progress: Told of each tensor.
            replace: As for `graft`.

        Returns:
            What it is there.
        """

    @abstractmethod
    def unmatched_tensors(self, adaptation: Adaptation, upgrade: Upgrade) -> list[str]:
        """Name the stored tensors that one of the bases lacks, as pre-training left them out, and that are copied."""

    @abstractmethod
    def replaces_base_tensors(self, adaptation: Adaptation, base: Base) -> bool:
        """Return whether an adapter stores tensors in place of its base's."""

    @abstractmethod
    def num_embedding_rows(self, adaptation: Adaptation, base: Base) -> int | None:
        """Count the rows of the embeddings that an adaptation stores; None if it stores none."""

    @abstractmethod
    def has_token_rows(self, adaptation: Adaptation) -> bool:
        """Return whether numbers of an adaptation's vector belong to single tokens."""

    @abstractmethod
    def vector(self, adaptation: Adaptation, base: Base) -> Vector:
        """See an adaptation as a vector, without its head and what an adapter stores in place of its base's tensors.

        Args:
            adaptation: The tuned weights.
            base: The base they were tuned on.

        Returns:
            The vector; nothing has been read of it but where a LoRA's start had to be found.

        Raises:
            KindError: Nothing is left of it.
        """

    def tuned_body_tensors(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, dict[str, str]] | None:
        """Return what the body's tensors became by tuning.

        Args:
            adaptation: The tuned weights.
            old: The base they were tuned on.

        Returns:
            The tensors, and their names by the inner ones; None of a kind that is no change of its base's tensors.
        """
        return None

    @abstractmethod
    def check_linear(self, adaptation: Adaptation) -> None:
        """Refuse an adapter that adds to more than the weights of linear layers."""

    @abstractmethod
    def remove_delta(self, model: Any, upgrade: Upgrade, rows: RowMatch | None) -> Any:
        """Take the delta of a kind that has one off a grafted model, and leave the head.

        Args:
            model: The adaptation put on the new base; it may be changed.
            upgrade: The two bases.
            rows: How the rows of the vocabularies match, if they are not the same.

        Returns:
            The new base under the old head.
        """

    def rule_tensors(self, tensors: dict[str, torch.Tensor], body: Architecture) -> dict[str, torch.Tensor]:
        """Give parameters of the body in memory the names by which the rule of `rework` is asked for them."""
        return tensors

    @abstractmethod
    def tunes_module_weight(self, module: str, base: Base) -> bool:
        """Return whether the own weight of a module of the model is tuned, rather than something beside it."""

    def proportional_parameter(self, parameter: str, model: Any) -> str | None:
        """Name the base's parameter that changes in proportion to a parameter of the model; None if none does."""
        return None

    @abstractmethod
    def parameter_names(self, model: Any) -> dict[str, str]:
        """Return the name of a model's parameter by the name under which it is stored."""

    @abstractmethod
    def merged(self, adaptation: Adaptation, model: Any, old: Base, head: Head) -> Any:
        """Merge an adaptation into its base.

        Args:
            adaptation: The tuned weights.
            model: These as a model; it may be changed.
            old: The base they were tuned on.
            head: Its head.

        Returns:
            A full fine-tune that computes the same; the same model if it is one.

        Raises:
            MismatchError: It changes nothing in its base.
            RecipeError: It works beside the weights of its base, or PEFT cannot merge it.
        """
