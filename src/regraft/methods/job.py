"""The job of a method: what is carried over, and where to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation import (
    attach,
    change_head,
    fresh_model,
    initial_factors,
    load_adaptation,
    load_model,
    save_model,
    write_graft,
)
from regraft.adaptation.transform import write_transform
from regraft.model import Deployment
from regraft.tuning import Teacher, restore_output_units, tune_model
from regraft.upgrade import Upgrade

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from regraft.adaptation import Adaptation, HeadPolicy
    from regraft.adaptation.adaptation import Rule
    from regraft.progress import Progress
    from regraft.task import TaskData
    from regraft.tuning import Anchoring, Distillation, Recipe
    from regraft.weights import RowMatch


@dataclasses.dataclass(frozen=True)
class Job:
    """One adaptation to carry over, and where.

    Args:
        upgrade: The old and the new base.
        adaptation: What was tuned on the old one.
        data: The task's examples, classes in the order of the new head.
        recipe: Resolved for this data.
        work: A folder from which an interrupted job resumes.
        into: The folder to fill with the new adaptation.
        progress: Called at each step.
        rows: How the rows of the adaptation's embeddings match those of both bases, by token; None where they are the
            same.
        head: What becomes of the old head where the old weights are put onto the new base.
        replace: Whether what an adapter stores in place of its base's tensors is put onto the new base as it is stored.
        notes: What the method finds out, recorded in the outcome as JSON; `labels`, if present, is how many labelled
            examples were used in all, which are otherwise counted from the learning curve's steps.
        labelled: Rows of the training examples whose labels a start read.
    """

    upgrade: Upgrade
    adaptation: Adaptation
    data: TaskData
    recipe: Recipe
    work: Path
    into: Path
    progress: Progress
    rows: RowMatch | None = None
    head: HeadPolicy = "copy"
    replace: bool = False
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    labelled: set[int] = dataclasses.field(default_factory=set)

    def fresh(self) -> Any:
        """Return the new base as scratch tunes it: with a fresh head, and a fresh adapter if the old weights are one.

        Returns:
            The model.
        """
        base, head, seed = self.upgrade.new, self.data.head, self.recipe.seed
        config = self.adaptation.family.read_config(self.adaptation, afresh=True)
        model = fresh_model(base, head, seed)
        restore_output_units(model, base, self.data)
        return attach(model, base, head, config, seed)

    def graft(self) -> None:
        """Fill the job's folder with the old weights put onto the new base."""

        def write(folder: Path) -> None:
            self.notes.update(write_graft(self.adaptation, self.upgrade, folder, self.progress, replace=self.replace))

        self.fill(write)

    def graft_transformed(self, rule: Rule) -> None:
        """Fill the job's folder with the old weights put onto the new base, every delta changed by a rule.

        Args:
            rule: As in `write_transform`.
        """

        def write(folder: Path) -> None:
            self.notes.update(
                write_transform(self.adaptation, self.upgrade, rule, folder, self.progress, replace=self.replace)
            )

        self.fill(write)

    def fill(self, write: Callable[[Path], None]) -> None:
        """Fill the job's folder with an adaptation that has the old head, which becomes what the job's policy says.

        Args:
            write: Fills a folder with the adaptation.
        """
        if self.head == "copy":
            write(self.into)
            return
        copied = self.work / "graft" / "kept"
        write(copied)
        change_head(copied, self.upgrade.new, self.data.head, self.head, self.recipe.seed, self.into)

    def load(self, *, trainable: bool = True) -> Any:
        """Load the adaptation in the job's folder.

        Args:
            trainable: Whether the model is to be tuned.

        Returns:
            The model.
        """
        return load_model(load_adaptation(self.into), self.upgrade.new, self.data.head, trainable=trainable)

    def grafted(self) -> Any:
        """Return the new base with the old weights put onto it.

        Returns:
            The model, ready to be tuned.
        """
        graft = dataclasses.replace(self, into=self.work / "graft" / "weights")
        graft.graft()
        return graft.load()

    def deploy(self, model: Any) -> Deployment:
        """Deploy a model on the new base, for its outputs on the task's examples.

        Args:
            model: From `fresh`, `load` or `grafted`.

        Returns:
            The deployment, which computes each split once.
        """
        return Deployment(model, self.upgrade.new, self.data, self.recipe.precision, self.progress)

    def old_deployment(self) -> Deployment:
        """Deploy the old adaptation on the old base, for its outputs on the task's examples.

        Returns:
            The deployment, which computes each split once.
        """
        old = self.upgrade.old
        model = load_model(self.adaptation, old, self.data.head)
        return Deployment(model, old, self.data, self.recipe.precision, self.progress)

    def teacher(self) -> Any:
        """Return the old adaptation on the old base, as a model whose parameters are named and shaped as the new one's.

        Returns:
            The model, frozen if the adaptation is an adapter.
        """
        old, adaptation = self.upgrade.old, self.adaptation
        if adaptation.changed_base:  # its plain form has other sizes
            folder = self.work / "teacher"
            write_graft(adaptation, Upgrade(old, old), folder, self.progress)
            adaptation = load_adaptation(folder)
        return load_model(adaptation, old, self.data.head)

    def save(self, model: Any) -> None:
        """Fill the job's folder with a model's adaptation.

        Args:
            model: From `load` or `grafted`.
        """
        save_model(model, self.upgrade.new, self.data.head, self.into)

    def tune(
        self,
        model: Any,
        options: Distillation | None = None,
        anchor: Anchoring | None = None,
        *,
        teacher_judges: bool = False,
    ) -> list[dict[str, float]]:
        """Tune a model on the task, from a teacher if options are passed, and fill the job's folder with it.

        Args:
            model: From `fresh`, `load` or `grafted`.
            options: The distillation's weights; the teacher is the old adaptation on the old base.
            anchor: How the weights are held to where they start, if they are.
            teacher_judges: Whether the best weights are those closest to the teacher, whatever the labels say.

        Returns:
            The learning curve.
        """
        start = initial_factors(model)
        teacher = Teacher(self.teacher(), self.upgrade.old, options, teacher_judges) if options else None
        curve = tune_model(model, self.upgrade.new, self.data, self.recipe, self.work, self.progress, teacher, anchor)
        save_model(model, self.upgrade.new, self.data.head, self.into, start)
        return curve
