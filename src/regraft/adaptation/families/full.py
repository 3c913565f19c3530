"""Full fine-tunes: every tensor of the base tuned, stored as a plain transformers folder."""

from __future__ import annotations

import functools
import json
import logging
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adaptation import CarriedAdaptation, Family
from regraft.adaptation.compatibility import check_body, check_computation, check_unplaced_tensors, config_of
from regraft.adaptation.strict import load_strictly
from regraft.adaptation.tokens import match_token_rows
from regraft.adaptation.vector import Vector
from regraft.base import body_names
from regraft.checkpoint import DerivedTensors, TensorSpec, shape_of, write_atomic, write_checkpoint
from regraft.errors import CheckpointError, MismatchError
from regraft.naming import named
from regraft.task.types import task_types
from regraft.transformers_folder import upgraded_settings
from regraft.weights import counterparts, delta, graft, graft_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation, Rule, Tensors
    from regraft.architecture import Architecture
    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.task import Head, Task
    from regraft.upgrade import Upgrade
    from regraft.weights import RowMatch

    RuleOfTensors = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)


class Full(Family):
    """A full fine-tune: its body is grafted tensor by tensor, and what no base has, as its head, is copied."""

    tunes_base = True

    def matching_task_types(self, config: Mapping[str, Any]) -> list[type[Task]]:
        """Return those whose class of transformers the model is, and whose kind of problem it names."""
        names = config.get("architectures")
        if not isinstance(names, list) or not names:
            return []
        types = [of for of in task_types().values() if config.get("problem_type") in of.problem_types]
        return [of for of in types if all(of.auto_class.removeprefix("AutoModelFor") in str(name) for name in names)]

    def read_config(self, adaptation: Adaptation, *, afresh: bool = False) -> None:
        """Return None: nothing is put beside the base."""

    def attach(self, model: Any, base: Base, head: Head, config: None, seed: int) -> Any:
        """Return the model as it is: all of it is trained."""
        return model

    def load(self, adaptation: Adaptation, base: Base, head: Head, *, trainable: bool) -> Any:
        """Load the folder by transformers, and compare it with its base."""
        import transformers

        check_computation(adaptation, base)
        auto = getattr(transformers, head.type.auto_class)
        model, _ = load_strictly(auto, adaptation.path, None, dtype="float32")
        check_body(adaptation, base)
        check_unplaced_tensors(adaptation, base)
        _check_tokens(adaptation, model, base)
        if model.config.num_labels != head.num_outputs:
            raise MismatchError(_wrong_labels(adaptation, model.config.num_labels, head))
        return model

    def save(self, model: Any, base: Base, into: Path, start: Tensors) -> None:
        """Write a plain transformers folder."""
        model.save_pretrained(into)

    def write(self, into: Path, tensors: Tensors, settings: Mapping[str, Any], progress: Progress) -> None:
        """Write a checkpoint, in shards if it is large, and its `config.json`."""
        write_checkpoint(into, tensors, progress=lambda _, *rest: progress("graft", *rest))
        write_atomic(into / "config.json", json.dumps(settings, indent=2) + "\n")

    def settings_for_head(self, settings: Mapping[str, Any], head: Head) -> Mapping[str, Any]:
        """Name the labels as transformers does, and the kind of problem where it is another one."""
        new = head.settings
        changed = {"id2label": {str(i): label for i, label in new["id2label"].items()}, "label2id": new["label2id"]}
        if settings.get("problem_type") not in head.type.problem_types:
            changed["problem_type"] = new["problem_type"]
        return {**settings, **changed}

    def check_bodies(self, adaptation: Adaptation, upgrade: Upgrade) -> None:
        """Refuse a body with other tensors than the bases', or of another size."""
        for base in (upgrade.old, upgrade.new):
            check_body(adaptation, base)

    def report_no_effect(self, adaptation: Adaptation, base: Base, texts: int) -> None:
        """Warn that only the head was tuned."""
        logger.warning("%s has the body of its base unchanged: only its head was tuned.", adaptation.path)

    def graft(self, adaptation: Adaptation, upgrade: Upgrade, *, replace: bool = False) -> CarriedAdaptation:
        """Add to the new base's body what tuning added to the old one's."""
        body = self._body(adaptation, upgrade, lambda _: graft)
        return CarriedAdaptation(body, _grafted_config(adaptation, upgrade))

    def transform(
        self, adaptation: Adaptation, upgrade: Upgrade, rule: Rule, progress: Progress, *, replace: bool = False
    ) -> CarriedAdaptation:
        """Add to the new base's body what the rule makes of each delta."""

        def rule_of(name: str) -> RuleOfTensors:
            return functools.partial(_add_reworked, name=name, rule=rule)

        body = self._body(adaptation, upgrade, rule_of, elementwise=False)
        return CarriedAdaptation(body, _grafted_config(adaptation, upgrade))

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
        """Add other deltas to the new base's body."""
        return self.transform(adaptation, upgrade, lambda name, _, __: numbers(name), progress)

    def unmatched_tensors(self, adaptation: Adaptation, upgrade: Upgrade) -> list[str]:
        """Name the tensors of the body that have no counterpart in one of the bases."""
        tuned = named(adaptation.checkpoint, config_of(adaptation))
        return list(counterparts(upgrade.new.named, tuned, upgrade.old.named).unmatched_tensors)

    def replaces_base_tensors(self, adaptation: Adaptation, base: Base) -> bool:
        """Return False: all of its body is a delta against its base's."""
        return False

    def num_embedding_rows(self, adaptation: Adaptation, base: Base) -> int | None:
        """Count the rows of its own embeddings; None of a class that has none."""
        tensors = named(adaptation.checkpoint, config_of(adaptation))
        return shape_of(tensors, str(tensors.embeddings))[0] if tensors.embeddings in tensors else None

    def has_token_rows(self, adaptation: Adaptation) -> bool:
        """Return True: the embeddings are part of the body."""
        return True

    def vector(self, adaptation: Adaptation, base: Base) -> Vector:
        """See the deltas of the body's tensors as a vector."""
        tensors, names = self.tuned_body_tensors(adaptation, base)
        shared = {inner: stored for inner, stored in names.items() if inner in base.body}
        subtracted = (base.checkpoint, base.body)
        return Vector(str(adaptation.path), adaptation.kind, adaptation.fingerprint, tensors, {}, subtracted, shared)

    def tuned_body_tensors(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, dict[str, str]]:
        """Return the checkpoint, and which of its tensors are the body's."""
        return adaptation.checkpoint, body_names(adaptation.checkpoint, old.architecture)

    def check_linear(self, adaptation: Adaptation) -> None:
        """Accept it: each of its tensors has a delta."""

    def remove_delta(self, model: Any, upgrade: Upgrade, rows: RowMatch | None) -> Any:
        """Copy the new base's tensors into the body; tokens that the fine-tune alone has keep their rows."""
        import torch

        new = upgrade.new
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                inner = name.removeprefix(new.prefix + ".")
                if inner in new.parameters and inner in upgrade.old.parameters:
                    by_token = rows is not None and inner in new.architecture.token_parameters
                    of_new = [row for row in rows.new_row_indices if row >= 0] if rows and by_token else slice(None)
                    parameter[of_new] = new.parameters[inner][of_new].to(parameter)
        return model

    def rule_tensors(self, tensors: dict[str, torch.Tensor], body: Architecture) -> dict[str, torch.Tensor]:
        """Convert parameters to the tensors on disk, which are those that are grafted."""
        return body.on_disk(tensors)

    def tunes_module_weight(self, module: str, base: Base) -> bool:
        """Return True: every module's own weight is tuned."""
        return True

    def proportional_parameter(self, parameter: str, model: Any) -> str | None:
        """Name the parameter itself."""
        return parameter

    def parameter_names(self, model: Any) -> dict[str, str]:
        """Return the names of the parameters as they are, which they are stored under."""
        return {name: name for name, _ in model.named_parameters()}

    def merged(self, adaptation: Adaptation, model: Any, old: Base, head: Head) -> Any:
        """Return the model as it is."""
        return model

    def _body(
        self,
        adaptation: Adaptation,
        upgrade: Upgrade,
        rule_of: Callable[[str], RuleOfTensors],
        *,
        elementwise: bool = True,
    ) -> DerivedTensors:
        """Compute each tensor of the body from the new base's, the tuned and the old one when it is asked for.

        The rule of a tensor is asked for by its name inside the body; `elementwise` says whether a rule gives the same
        on flat pieces. Tensors have the fine-tune's dtypes and the names that its class writes.
        """
        self.check_bodies(adaptation, upgrade)
        old, new, tuned = upgrade.old.named, upgrade.new.named, named(adaptation.checkpoint, config_of(adaptation))
        pairs, rows = counterparts(new, tuned, old), match_token_rows(adaptation, upgrade)
        entries = {}
        for name, entry in tuned.specs.items():
            if name not in pairs.new:  # the head, which is no difference between two bases but has its own values
                entries[name] = entry
                continue
            operands = ((new, pairs.new[name]), (tuned, name), (old, pairs.old[name]))
            rule = rule_of(tuned.key_by_name[name])
            if rows is not None and name in tuned.token_tensors:
                by_row = functools.partial(graft_rows, match=rows, rule=rule)
                entries[name] = TensorSpec(entry.dtype, rows.shape(entry.shape), operands, by_row, elementwise=False)
            else:
                entries[name] = TensorSpec(entry.dtype, entry.shape, operands, rule, elementwise)
        return DerivedTensors(entries)


def check_classifier(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a model that no type of task is for.

    Args:
        folder: The model's folder.
        config: The content of its `config.json`.

    Raises:
        CheckpointError: It is of another class, or was tuned for another kind of problem.
    """
    if Full().matching_task_types(config):
        return
    if Full().matching_task_types({**config, "problem_type": None}):
        kinds = {str(kind) for of in task_types().values() for kind in of.problem_types if kind}
        raise CheckpointError(
            f"{folder}: was tuned for {config['problem_type']!r:.100}, and what can be recycled is for "
            f"{' or '.join(sorted(kinds))}."
        )
    raise CheckpointError(
        f"{folder}: is no sequence classifier (its config.json names {config.get('architectures')}). Give the "
        "folder of a tuned model."
    )


def _add_reworked(new: torch.Tensor, tuned: torch.Tensor, old: torch.Tensor, name: str, rule: Rule) -> torch.Tensor:
    import torch

    if torch.equal(new, old):
        return tuned
    return new.double() + rule(name, delta(tuned, old), delta(new, old)).double()


def _grafted_config(adaptation: Adaptation, upgrade: Upgrade) -> dict[str, Any]:
    """Return what `config.json` says on the new base, whose settings it has wherever the tuning changed none."""
    tuned, old, new = config_of(adaptation).to_dict(), upgrade.old.config.to_dict(), upgrade.new.config.to_dict()
    same = match_token_rows(adaptation, upgrade) is None
    return adaptation.config | upgraded_settings(tuned, old, new, is_decoder=upgrade.old.is_decoder, has_same_ids=same)


def _check_tokens(adaptation: Adaptation, model: Any, base: Base) -> None:
    """Refuse a fine-tune whose embeddings have no row for a token that texts are read with."""
    if base.architecture.embeddings is None:  # as CANINE, which hashes characters
        return
    rows = model.get_input_embeddings().weight.shape[0]
    # tokens beyond the base's own rows are refused where texts hold them
    token, highest = max(
        ((token, i) for token, i in base.tokenizer.get_vocab().items() if i < base.rows), key=lambda item: item[1]
    )
    if highest >= rows:
        raise MismatchError(
            f"{adaptation.path}: its embeddings have {rows:,} rows, and its texts are read with tokens up to {token!r} "
            f"({highest:,}). Was it tuned on {base.path}? If tokens were taken out, copy its tokenizer into it."
        )


def _wrong_labels(adaptation: Adaptation, outputs: int, head: Head) -> str:
    return (
        f"{adaptation.path}: its head has {outputs} outputs"
        f"{' (' + ', '.join(adaptation.labels) + ')' if adaptation.labels else ''}, the task has {head}. "
        "Give the task it was tuned on."
    )
