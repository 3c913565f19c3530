"""The two deployments that a diagnosis compares, each loaded once."""

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
from regraft.adaptation.tokens import with_adaptation_tokens
from regraft.checkpoint import temporary_folder
from regraft.errors import MismatchError
from regraft.model import Deployment, match_labels
from regraft.model.deployment import check_effect
from regraft.model.device import device
from regraft.progress import Progress, silent
from regraft.recipe import Recipe
from regraft.task import load_data

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from regraft.base import Base
    from regraft.task import Split, Task, TaskData
    from regraft.upgrade import Upgrade


@dataclasses.dataclass(frozen=True, eq=False)
class DeploymentPair:
    """The old deployment and its counterpart on the new base.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation tuned on the old base.
        data: The task, with its labels in the order of the heads.
        lineage: Whether the adaptation is proven to belong to the old base, as in `Check`.
        effect: How much the adaptation changes what the head reads on the old base, as in `Check`.
        old: The old deployment.
        new: The deployment on the new base.
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
        """The callback for each batch."""
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


def predictions(deployment: Deployment, split: Split) -> list[Any]:
    """Return the predictions of a deployment whose outputs are all finite.

    Args:
        deployment: The deployment.
        split: The examples to predict.

    Returns:
        A prediction for each example.

    Raises:
        MismatchError: An output is infinite or not a number.
    """
    if not deployment.is_finite(split):  # the argmax of NaN would silently be the first class
        raise MismatchError(
            f"{deployment.base.path}: what the weights on it predict is infinite or not a number. Compute in fp32 "
            "(--precision), or look for such a number in its config.json."
        )
    return deployment.predictions(split)


@contextlib.contextmanager
def load_pair(
    upgrade: Upgrade,
    adaptation: Adaptation | str | Path,
    task: Task | TaskData | str | Path,
    *,
    counterpart: str | Path | None = None,
    recipe: Recipe | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Iterator[DeploymentPair]:
    """Load an adaptation on its old base, and its counterpart on the new base.

    Args:
        upgrade: The old and the new base.
        adaptation: The weights tuned on the old base, or their folder.
        task: A task file, a `Task` or its data.
        counterpart: An outcome or adaptation of the same task on the new base; None for the old weights as they are.
        recipe: The recipe whose seed and precision are used.
        force: Whether to accept an adaptation that records another old base.
        progress: The callback for each batch.

    Yields:
        The two deployments.

    Raises:
        CheckpointError: A file of weights is incomplete.
        DataError: The task's data cannot be used.
        MismatchError: The bases, the adaptations and the task do not fit together.
    """
    recipe = recipe or Recipe()
    adaptation = adaptation if isinstance(adaptation, Adaptation) else load_adaptation(adaptation)
    lineage = adaptation.check_base(upgrade.old, force=force)
    upgrade = with_adaptation_tokens(adaptation, upgrade)
    data = load_data(task, recipe.seed)
    data.require_labels("check")
    data = match_labels(adaptation, data.with_virtual_tokens(adaptation.virtual_tokens, upgrade.new.max_input_length))
    upgrade.check_finite()
    old_model = load_old_model(adaptation, upgrade, data.head)
    effect = check_effect(old_model, adaptation, upgrade.old, data)
    precision = recipe.resolve(len(data.train), 1.0).precision
    with temporary_folder() as folder:
        if counterpart is None:
            write_graft(adaptation, upgrade, folder / "direct", progress)
            new_model = load_model(load_adaptation(folder / "direct"), upgrade.new, data.head)
        else:
            new_model = load_counterpart(counterpart, upgrade.new, data)
        yield DeploymentPair(
            upgrade=upgrade,
            adaptation=adaptation,
            data=data,
            lineage=lineage,
            effect=effect,
            old=Deployment(old_model, upgrade.old, data, precision, progress),
            new=Deployment(new_model, upgrade.new, data, precision, progress),
        )


def load_counterpart(path: str | Path, base: Base, data: TaskData) -> Any:
    """Load weights that were tuned for the same task on the new base.

    Args:
        path: An outcome or an adaptation.
        base: The new base.
        data: The task, with its classes in the order of the old head.

    Returns:
        The model.

    Raises:
        MismatchError: Its labels are others, or in another order.
    """
    adaptation = load_adaptation(path)
    adaptation.check_base(base)
    check_task_type(adaptation, data.task)
    if data.labels and adaptation.labels is not None and tuple(adaptation.labels) != tuple(data.labels):
        raise MismatchError(
            f"{path}: its head has the labels {', '.join(adaptation.labels[:8])}, but the old head has "
            f"{', '.join(data.labels[:8])}: their outputs cannot be compared one by one. Tune it with the task file's "
            "`labels` in that order."
        )
    return load_model(adaptation, base, data.head).to(device())
