"""The models that outcomes are compared with: the old deployment, and where chance depends on them, the bare bases."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation import is_right, load_model
from regraft.adaptation.outcome import PREDICTIONS_FILE
from regraft.adaptation.template import text_digest, with_deployment_tokenizers
from regraft.adaptation.tokens import with_adaptation_tokens
from regraft.checkpoint import is_sealed, read_json, read_json_lines, seal, to_json, write_atomic, write_json
from regraft.methods.record import further_figures, further_inputs, prediction_rows
from regraft.model import Deployment
from regraft.model.deployment import bare_deployment
from regraft.model.keep import keep_source, measure_keep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from regraft.adaptation import Adaptation
    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.task import TaskData
    from regraft.upgrade import Upgrade

REFERENCES_FOLDER = "references"
"""The folder of the references' figures, in the output folder of a comparison or a chain."""
OLD_DEPLOYMENT, OLD_BASE, NEW_BASE = "old-deployment", "old-base", "new-base"
"""The names of references."""
_DIGEST_CHARACTERS = 8  # as few as tell the few-shot samples of a comparison apart


@dataclasses.dataclass(frozen=True)
class Reference:
    """The figures of a model that outcomes are compared with.

    Args:
        score: The score on test, or on dev if there is no test split; None if it was not measured.
        right: Whether each prediction for that split is right.
        keep: The score on what the task names in `keep`; None without.
        lm_eval: The scores by task of lm-evaluation-harness and metric; empty without.
    """

    score: float | None = None
    right: Sequence[bool | None] = ()
    keep: float | None = None
    lm_eval: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class References:
    """The models that the outcomes of a comparison are compared with.

    Args:
        old: The old deployment.
        new_base: The bare new base, if its score is chance; None for types that guess.
        old_base: The bare old base; None without `keep`.
    """

    old: Reference
    new_base: Reference | None
    old_base: Reference | None


def measure_references(
    upgrade: Upgrade, adaptation: Adaptation, data: TaskData, precision: str, out: Path, progress: Progress
) -> References:
    """Measure the old deployment and, if a bare base answers in place of guessing, the bare bases.

    Where a model writes its answers token by token, the figures are stored, and a later run reads them.

    Args:
        upgrade: The upgrade.
        adaptation: The adaptation on the old base.
        data: The task's data, with labels in the order of the adaptation's head.
        precision: `bf16` or `fp32`.
        out: The output folder of the comparison.
        progress: Called at each batch.
    """
    upgrade = with_deployment_tokenizers(adaptation, with_adaptation_tokens(adaptation, upgrade), data.task)
    split = data.test or data.dev
    if not data.task.head_in_base:
        model = load_model(adaptation, upgrade.old, data.head)
        deployment = Deployment(model, upgrade.old, data, precision, progress)
        return References(Reference(deployment.score(split), deployment.right(split)), None, None)
    folder = reference_folder(out, OLD_DEPLOYMENT, data.digest())
    inputs = {"adaptation": adaptation.fingerprint, **_inputs(upgrade.old, data, precision)}
    if not is_sealed(folder / "sealed.json", inputs):
        model = load_model(adaptation, upgrade.old, data.head)
        deployment = Deployment(model, upgrade.old, data, precision, progress)
        rows = prediction_rows(deployment, data, split)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / PREDICTIONS_FILE, "".join(to_json(row, PREDICTIONS_FILE) + "\n" for row in rows))
        figures = {"score": deployment.score(split), **further_figures(deployment, data, folder, progress)}
        if "keep" in figures:
            figures["keep"] = figures["keep"]["score"]
        _store(folder, figures, inputs)
    right = [is_right(row) for row in read_json_lines(folder / PREDICTIONS_FILE)]
    old = Reference(**read_json(folder / "figures.json"), right=right)
    new_base = measure_bare_base(upgrade.new, data, precision, out, NEW_BASE, progress)
    has_keep = keep_source(data.task) is not None
    return References(
        old=old,
        new_base=new_base,
        old_base=measure_bare_base(upgrade.old, data, precision, out, OLD_BASE, progress, scored=False)
        if has_keep
        else None,
    )


def measure_bare_base(
    base: Base, data: TaskData, precision: str, out: Path, name: str, progress: Progress, *, scored: bool = True
) -> Reference:
    """Measure a base without an adaptation, for a task type whose head is the base's own; or read its stored figures.

    Args:
        base: The base.
        data: The task's data.
        precision: `bf16` or `fp32`.
        out: The output folder of the comparison or the chain.
        name: The name of the reference's folder.
        progress: Called at each batch.
        scored: Whether to score it on the task, and not only on `keep`.
    """
    folder = reference_folder(out, name, data.digest())
    inputs = {"scored": scored, **_inputs(base, data, precision)}
    if not is_sealed(folder / "sealed.json", inputs):
        deployment = bare_deployment(base, data, precision, progress)
        score = deployment.score(data.test or data.dev) if scored else None
        folder.mkdir(parents=True, exist_ok=True)
        keep = measure_keep(deployment.model, base, data, precision, progress)
        _store(folder, {"score": score, "keep": keep}, inputs)
    return Reference(**read_json(folder / "figures.json"))


def reference_folder(out: Path, name: str, digest: str) -> Path:
    """Return the folder of a reference's figures.

    Args:
        out: The output folder of the comparison or the chain.
        name: The name of the reference.
        digest: The digest of the task's data.
    """
    return out / REFERENCES_FOLDER / f"{name}-{digest[:_DIGEST_CHARACTERS]}"


def _inputs(base: Base, data: TaskData, precision: str) -> dict[str, Any]:
    """Return what the figures of a model depend on, as JSON."""
    return {
        "base": base.fingerprint,
        "head": base.language_head_fingerprint,
        "task": data.digest(),
        "texts": text_digest(base),
        "precision": precision,
        **further_inputs(data.task),
    }


def _store(folder: Path, figures: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Write figures, and seal all files of the folder."""
    write_json(folder / "figures.json", figures)
    files = [file for name in ("figures.json", PREDICTIONS_FILE) if (file := folder / name).is_file()]
    seal(folder / "sealed.json", files, inputs)
