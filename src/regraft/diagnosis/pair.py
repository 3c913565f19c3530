"""The two deployments that a diagnosis compares."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from regraft.adaptation import (
    Adaptation,
    check_task_type,
    load_adaptation,
    load_model,
    load_old_model,
    write_graft,
)
from regraft.adaptation.template import with_deployment_tokenizers
from regraft.adaptation.tokens import with_adaptation_tokens
from regraft.checkpoint import temporary_folder
from regraft.errors import MAX_LISTED, MismatchError
from regraft.model import Deployment, match_labels
from regraft.model.deployment import chance_score, measure_effect
from regraft.model.device import device
from regraft.model.keep import check_keep
from regraft.progress import Progress, silent
from regraft.recipe import Recipe
from regraft.task import agreement, load_data

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from regraft.base import Base
    from regraft.task import Split, Task, TaskData
    from regraft.upgrade import Upgrade


@dataclasses.dataclass(frozen=True, eq=False)
class DeploymentPair:
    """The old deployment and a deployment on the new base.

    Args:
        upgrade: The old and the new base, with the tokens that only the adaptation has.
        adaptation: The adaptation tuned on the old base.
        data: The task's data, with labels in the order of the heads.
        lineage: Whether the adaptation is proven to belong to the old base, as in `Check`.
        effect: The relative change of the head's input by the adaptation, as in `Check`.
        old: The adaptation on the old base.
        new: The same adaptation on the new base, or one tuned for the same task there.
    """

    upgrade: Upgrade
    adaptation: Adaptation
    data: TaskData
    lineage: str
    effect: float
    old: Deployment
    new: Deployment

    @property
    def precision(self) -> str:
        """The precision that both compute in, `bf16` or `fp32`."""
        return self.old.precision

    @property
    def progress(self) -> Progress:
        """The callback that is called after each batch."""
        return self.old.progress

    @functools.cached_property
    def split(self) -> Split:
        """The split that is measured: test, or dev if the task has no test split."""
        return self.data.test or self.data.dev

    @property
    def old_predictions(self) -> list[Any]:
        """The old deployment's predictions for the split."""
        return predictions(self.old, self.split)

    @property
    def new_predictions(self) -> list[Any]:
        """The new deployment's predictions for the split."""
        return predictions(self.new, self.split)

    @functools.cached_property
    def chance(self) -> float | None:
        """The chance score for the split, for which the bare new base may have to run; None without labels."""
        if not self.data.labelled:
            return None
        return chance_score(self.data, self.split, self.upgrade.new, self.precision)

    @property
    def floor(self) -> str:
        """The name of what has the chance score, for messages."""
        return "the bare new base" if self.data.task.head_in_base else "guessing"

    def score(self, deployment: Deployment) -> float | None:
        """Score a deployment on the split; None without labels."""
        return deployment.score(self.split) if self.data.labelled else None

    def agreement(self, deployment: Deployment) -> float | None:
        """Measure how far the predictions of a deployment for the split are those of the old one.

        Args:
            deployment: A deployment of the same adaptation, or of one for the same task, on any base.

        Returns:
            The agreement, from 0 to 1; where no answers are generated, the mean overlap of the distributions of tokens,
            which is None if the tokenizers divide the examples into different tokens.
        """
        if not self.data.task.head_in_base or self.data.task.answers_needed:
            return agreement(self.data, self.old_predictions, predictions(deployment, self.split))
        new_ids = self._new_ids(deployment)
        examples = self.old.examples(self.split)
        if new_ids is not None:
            examples = examples.with_ids(new_ids.numpy())
        other = deployment.examples(self.split)
        if (examples.columns, examples.tokens) != (other.columns, other.tokens):
            return None
        return deployment.similarity_to(self.split, self.old.signal(self.split, new_ids))[0]

    def _new_ids(self, deployment: Deployment) -> torch.Tensor | None:
        """Return a deployment's id of each token of the old one, −1 for none; None if all ids are the same."""
        import torch

        old, new = self.old.base.vocabulary, deployment.base.vocabulary
        if old == new:
            return None
        ids = torch.full((self.old.outputs(self.split).shape[1],), -1, dtype=torch.long)
        for token, old_id in old.items():
            ids[old_id] = new.get(token, -1)
        return ids


def predictions(deployment: Deployment, split: Split) -> list[Any]:
    """Return the predictions of a deployment, or refuse outputs that are infinite or NaN.

    Args:
        deployment: A deployment of either base.
        split: The examples to predict.

    Returns:
        One prediction per example, in the order of the split.

    Raises:
        MismatchError: An output is infinite or NaN.
    """
    if not deployment.is_finite(split):  # a row of NaN would count as its first class, without an error
        raise MismatchError(
            f"{deployment.base.path}: what the weights on it predict is infinite or NaN. Compute in fp32 "
            "(--precision), or look for such a number in its config.json."
        )
    return deployment.predictions(split)


@contextlib.contextmanager
def load_pair(
    upgrade: Upgrade,
    adaptation: Adaptation | str | Path,
    task: Task | TaskData | str | Path,
    *,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Iterator[DeploymentPair]:
    """Load an adaptation on its old base and, without tuning it again, on the new base.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation tuned on the old base, or its folder.
        task: A task file, a `Task` or its data.
        recipe: The recipe whose seed and precision are used; None for the default recipe.
        force: Whether to accept an adaptation that records a different old base.
        progress: Called after each batch or tensor.

    Yields:
        The two deployments; the grafted weights are deleted at the end of the context.

    Raises:
        CheckpointError: A weight file is incomplete or damaged, or holds infinite or NaN values.
        DataError: The task's data is malformed, or has no labels although its models write no answers.
        MismatchError: The bases, the adaptation and the task do not fit together.
    """
    recipe = recipe or Recipe()
    adaptation = adaptation if isinstance(adaptation, Adaptation) else load_adaptation(adaptation)
    lineage = adaptation.check_base(upgrade.old, force=force)
    upgrade = with_adaptation_tokens(adaptation, upgrade)
    data = load_data(task, recipe.seed)
    data = _with_answers(data)
    check_keep(data.task)
    upgrade = with_deployment_tokenizers(adaptation, upgrade, data.task)
    data = match_labels(
        adaptation, data.with_virtual_tokens(adaptation.num_virtual_tokens, upgrade.new.max_input_length)
    )
    upgrade.check_finite()
    old_model = load_old_model(adaptation, upgrade, data.head)
    effect = measure_effect(old_model, adaptation, upgrade.old, data)
    precision = recipe.resolve_precision()
    with temporary_folder() as folder:
        write_graft(adaptation, upgrade, folder / "direct", progress)
        new_model = load_model(load_adaptation(folder / "direct"), upgrade.new, data.head)
        yield DeploymentPair(
            upgrade=upgrade,
            adaptation=adaptation,
            data=data,
            lineage=lineage,
            effect=effect,
            old=Deployment(old_model, upgrade.old, data, precision, progress),
            new=Deployment(new_model, upgrade.new, data, precision, progress),
        )


def _with_answers(data: TaskData) -> TaskData:
    """Return data of which deployments can be compared: with labels, or with prompts that models answer."""
    task = data.task
    if data.labelled or not task.head_in_base:
        data.require_labels("check")
        return data
    # without references, nothing but answers can be compared
    return (
        data
        if task.answers_needed or task.agreement_metric is None
        else data.with_settings(metric=task.agreement_metric.name)
    )


def load_counterpart(path: str | Path, base: Base, data: TaskData) -> Any:
    """Load an adaptation that was tuned for the same task on the new base.

    Args:
        path: The folder of an outcome or an adaptation.
        base: The new base, on which the adaptation was tuned.
        data: The task's data, with labels in the order of the old head.

    Returns:
        The model with its head, on the device.

    Raises:
        CheckpointError: The folder has no adaptation, or its weights do not load completely.
        MismatchError: The adaptation's base, task type or labels differ, or the order of its labels.
    """
    adaptation = load_adaptation(path)
    adaptation.check_base(base)
    check_task_type(adaptation, data.task)
    if data.labels and adaptation.labels is not None and tuple(adaptation.labels) != tuple(data.labels):
        raise MismatchError(
            f"{path}: its head has the labels {', '.join(adaptation.labels[:MAX_LISTED])}, but the old head has "
            f"{', '.join(data.labels[:MAX_LISTED])}: their outputs cannot be compared one by one. Tune it with the "
            "task file's `labels` in that order."
        )
    return load_model(adaptation, base, data.head).to(device())
