"""The family of full fine-tunes: all tensors of the base are tuned, and stored as a plain transformers folder."""

from __future__ import annotations

import functools
import json
import logging
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adaptation import Family, GraftedAdaptation
from regraft.adaptation.changes import base_tensor
from regraft.adaptation.compatibility import check_body, check_computation, check_unplaced_tensors, read_tuned_config
from regraft.adaptation.labels import check_num_outputs
from regraft.adaptation.model_class import matching_types
from regraft.adaptation.strict import load_strictly
from regraft.adaptation.tokens import match_token_rows
from regraft.adaptation.vector import Vector
from regraft.base import body_names
from regraft.checkpoint import DerivedTensors, TensorSpec, shape_of, write_atomic, write_checkpoint
from regraft.errors import MismatchError
from regraft.naming import named_tensors
from regraft.transformers_folder import upgraded_settings
from regraft.weights import counterparts, delta, graft, graft_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation, Rule
    from regraft.architecture import Architecture
    from regraft.base import Base
    from regraft.checkpoint.derived import Tensors
    from regraft.progress import Progress
    from regraft.task import Head, Task
    from regraft.upgrade import Upgrade
    from regraft.weights import RowMatch

    TensorRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)


class Full(Family):
    """A full fine-tune: its body is grafted tensor by tensor, and its head is copied."""

    tunes_base = True

    def matching_task_types(self, config: Mapping[str, Any]) -> list[type[Task]]:
        """Return the task types with the model's transformers class and `problem_type`."""
        return matching_types(config)

    def read_config(self, adaptation: Adaptation, *, for_new_adapter: bool = False) -> None:
        """Return None: a full fine-tune has no adapter."""

    def prepare_for_tuning(self, model: Any, base: Base, head: Head, config: None, seed: int) -> Any:
        """Return the model unchanged: all of it is trained."""
        return model

    def load(self, adaptation: Adaptation, base: Base, head: Head, *, trainable: bool) -> Any:
        """Load the folder with transformers, and compare it with its base."""
        import transformers

        check_computation(adaptation, base)
        auto_class = getattr(transformers, head.type.auto_class)
        model, _ = load_strictly(auto_class, adaptation.path, None, dtype="float32")
        check_body(adaptation, base)
        check_unplaced_tensors(adaptation, base)
        _check_tokens(adaptation, model, base)
        check_num_outputs(adaptation, model.config.num_labels, head)
        return model

    def save(self, model: Any, base: Base, folder: Path, initial_factors: Tensors) -> None:
        """Write a plain transformers folder."""
        model.save_pretrained(folder)

    def write(self, folder: Path, tensors: Tensors, config: Mapping[str, Any], progress: Progress) -> None:
        """Write a checkpoint, in shards if it is large, and its `config.json`."""

        def report(_stage: str, completed: int, total: int, figures: Mapping[str, Any]) -> None:
            progress("graft", completed, total, figures)

        write_checkpoint(folder, tensors, progress=report)
        write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")

    def config_for_head(self, config: Mapping[str, Any], head: Head) -> Mapping[str, Any]:
        """Return the config with the head's labels, and with its `problem_type` unless the current one is valid."""
        names = {str(i): label for i, label in head.settings["id2label"].items()}
        changed = {"id2label": names, "label2id": head.settings["label2id"]}
        if config.get("problem_type") not in head.type.problem_types:
            changed["problem_type"] = head.settings["problem_type"]
        return {**config, **changed}

    def check_bodies(self, adaptation: Adaptation, upgrade: Upgrade) -> None:
        """Check that the body has the tensors of both bases, in their shapes."""
        for base in (upgrade.old, upgrade.new):
            check_body(adaptation, base)

    def report_no_effect(self, adaptation: Adaptation, base: Base, num_texts: int) -> None:
        """Warn that only the head was tuned, which is legitimate."""
        logger.warning("%s has the body of its base unchanged: only its head was tuned.", adaptation.path)

    def graft(self, adaptation: Adaptation, upgrade: Upgrade, *, replace: bool = False) -> GraftedAdaptation:
        """Add the delta to the new base's body."""
        body = self._body(adaptation, upgrade, lambda _: graft)
        return GraftedAdaptation(body, _grafted_config(adaptation, upgrade))

    def transform(
        self, adaptation: Adaptation, upgrade: Upgrade, rule: Rule, progress: Progress, *, replace: bool = False
    ) -> GraftedAdaptation:
        """Add the transformed delta to the new base's body."""

        def make_rule(name: str) -> TensorRule:
            return functools.partial(_add_transformed, name=name, rule=rule)

        body = self._body(adaptation, upgrade, make_rule, elementwise=False)
        return GraftedAdaptation(body, _grafted_config(adaptation, upgrade))

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
        """Add the new vector's deltas to the new base's body."""

        def rule(name: str, _delta: torch.Tensor, _shift: torch.Tensor) -> torch.Tensor:
            return read_tensor(name)

        return self.transform(adaptation, upgrade, rule, progress)

    def unmatched_tensor_names(self, adaptation: Adaptation, upgrade: Upgrade) -> list[str]:
        """Return the names of the body's tensors that only one base has."""
        tuned = named_tensors(adaptation.checkpoint, read_tuned_config(adaptation))
        return list(counterparts(upgrade.new.named_tensors, tuned, upgrade.old.named_tensors).unmatched)

    def replaces_base_tensors(self, adaptation: Adaptation, base: Base) -> bool:
        """Return False: all tensors of the body have deltas."""
        return False

    def num_embedding_rows(self, adaptation: Adaptation, base: Base) -> int | None:
        """Return the number of rows of the embeddings; None for a class without embeddings."""
        tensors = named_tensors(adaptation.checkpoint, read_tuned_config(adaptation))
        return shape_of(tensors, str(tensors.embeddings))[0] if tensors.embeddings in tensors else None

    def has_token_rows(self, adaptation: Adaptation) -> bool:
        """Return True: the embeddings are part of the body."""
        return True

    def vector(self, adaptation: Adaptation, base: Base) -> Vector:
        """Return the deltas of the body's tensors as a vector."""
        tensors, names = self.tuned_body_tensors(adaptation, base)
        common = {inner: stored for inner, stored in names.items() if inner in base.body}
        subtrahend = (base.checkpoint, base.body)
        return Vector(str(adaptation.path), adaptation.kind, adaptation.fingerprint, tensors, {}, subtrahend, common)

    def tuned_body_tensors(self, adaptation: Adaptation, old: Base) -> tuple[Tensors, dict[str, str]]:
        """Return the checkpoint's tensors, and the stored names of the body's tensors by the names inside the body."""
        return adaptation.checkpoint, body_names(adaptation.checkpoint, old.architecture)

    def check_linear(self, adaptation: Adaptation) -> None:
        """Do nothing: all tensors have deltas."""

    def remove_delta(self, model: Any, upgrade: Upgrade, row_match: RowMatch | None) -> Any:
        """Copy the new base's tensors into the body; tokens that only the fine-tune has keep their rows."""
        import torch

        new = upgrade.new
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                inner = name.removeprefix(new.prefix + ".")
                value = base_tensor(name, new)
                if value is None or base_tensor(name, upgrade.old) is None:
                    continue
                indices: list[int] | slice = slice(None)
                has_token_rows = inner in new.architecture.token_parameters or inner in new.language_head
                if row_match is not None and has_token_rows:
                    indices = [row for row in row_match.new_row_indices if row >= 0]
                parameter[indices] = value[indices].to(parameter)
        return model

    def rule_tensors(self, tensors: dict[str, torch.Tensor], body: Architecture) -> dict[str, torch.Tensor]:
        """Convert parameters to the tensors on disk, which are the ones that are grafted."""
        return body.on_disk(tensors)

    def tunes_module_weight(self, module: str, base: Base) -> bool:
        """Return True: all weights are tuned."""
        return True

    def proportional_parameter(self, parameter: str, model: Any) -> str | None:
        """Return the parameter itself."""
        return parameter

    def parameter_names(self, model: Any) -> dict[str, str]:
        """Return the parameters' names, which are also their stored names."""
        return {name: name for name, _ in model.named_parameters()}

    def merge(self, adaptation: Adaptation, model: Any, old: Base, head: Head) -> Any:
        """Return the model unchanged."""
        return model

    def _body(
        self,
        adaptation: Adaptation,
        upgrade: Upgrade,
        make_rule: Callable[[str], TensorRule],
        *,
        elementwise: bool = True,
    ) -> DerivedTensors:
        """Return the grafted tensors of the body and the stored head, which are computed when they are read.

        The tensors have the fine-tune's dtypes, and the names under which its class is saved.

        Args:
            adaptation: The full fine-tune.
            upgrade: The two bases.
            make_rule: Function of a tensor's name in the body that returns its rule: new, tuned, old → tensor.
            elementwise: Whether the rules can be applied to flat slices.
        """
        self.check_bodies(adaptation, upgrade)
        old = upgrade.old.named_tensors
        new = upgrade.new.named_tensors
        tuned = named_tensors(adaptation.checkpoint, read_tuned_config(adaptation))
        pairs = counterparts(new, tuned, old)
        row_match = match_token_rows(adaptation, upgrade)
        entries = {}
        for name, entry in tuned.specs.items():
            if name not in pairs.new:  # the head, which has no delta
                entries[name] = entry
                continue
            operands = ((new, pairs.new[name]), (tuned, name), (old, pairs.old[name]))
            rule = make_rule(tuned.key_by_name[name])
            if row_match is not None and name in tuned.token_tensors:
                row_rule = functools.partial(graft_rows, match=row_match, rule=rule)
                entries[name] = TensorSpec(
                    entry.dtype, row_match.shape(entry.shape), operands, row_rule, elementwise=False
                )
            else:
                entries[name] = TensorSpec(entry.dtype, entry.shape, operands, rule, elementwise)
        return DerivedTensors(entries)


def _add_transformed(new: torch.Tensor, tuned: torch.Tensor, old: torch.Tensor, name: str, rule: Rule) -> torch.Tensor:
    """Return new + rule(delta), or the tuned tensor bit by bit if the upgrade did not change it."""
    import torch

    if torch.equal(new, old):
        return tuned
    return new.double() + rule(name, delta(tuned, old), delta(new, old)).double()


def _grafted_config(adaptation: Adaptation, upgrade: Upgrade) -> dict[str, Any]:
    """Return the content of `config.json` on the new base, with the new base's settings unless tuning changed them."""
    tuned = read_tuned_config(adaptation).to_dict()
    old, new = upgrade.old.config.to_dict(), upgrade.new.config.to_dict()
    has_same_ids = match_token_rows(adaptation, upgrade) is None
    return adaptation.config | upgraded_settings(
        tuned, old, new, is_decoder=upgrade.old.is_decoder, has_same_ids=has_same_ids
    )


def _check_tokens(adaptation: Adaptation, model: Any, base: Base) -> None:
    """Check that the embeddings have a row for every token of the base's tokenizer that has a row in the base."""
    if base.architecture.embeddings is None:  # CANINE hashes characters
        return
    num_rows = model.get_input_embeddings().weight.shape[0]
    # tokens for which the base has no rows either are refused when texts contain them
    ids = {token: i for token, i in base.tokenizer.get_vocab().items() if i < base.vocabulary_size}
    token = max(ids, key=lambda candidate: ids[candidate])
    largest_id = ids[token]
    if largest_id >= num_rows:
        raise MismatchError(
            f"{adaptation.path}: its embeddings have {num_rows:,} rows, but the tokenizer has ids up to {largest_id:,} "
            f"({token!r}). Was it tuned on {base.path}? If tokens were removed, copy its tokenizer into its folder."
        )
