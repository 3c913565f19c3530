"""The job of a method: the adaptation to carry over, and the folder to write."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation import (
    change_head,
    fresh_model,
    initial_factors,
    load_adaptation,
    load_model,
    prepare_for_tuning,
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
    """One adaptation to carry over, and the folder to write.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation to the old base.
        data: The task's examples, with classes in the order of the new head.
        recipe: The recipe, resolved for this data.
        work: The folder for the state from which an interrupted job resumes.
        into: The folder for the new adaptation.
        progress: Called at each step.
        row_match: The match by token between the rows of the adaptation's embeddings and those of both bases; None if
            the rows are the same.
        head: The policy for the old head.
        replace: Whether tensors that an adapter stores in place of its base's are used on the new base as they are.
        notes: The method's notes, recorded in the outcome as JSON; `labels`, if present, is the number of labelled
            examples in all, which is otherwise counted from the steps of the learning curve.
        labelled: The row numbers of training examples whose labels a start has read.
    """

    upgrade: Upgrade
    adaptation: Adaptation
    data: TaskData
    recipe: Recipe
    work: Path
    into: Path
    progress: Progress
    row_match: RowMatch | None = None
    head: HeadPolicy = "copy"
    replace: bool = False
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    labelled: set[int] = dataclasses.field(default_factory=set)

    def fresh(self) -> Any:
        """Build the model that scratch tunes: the new base with a fresh head, and a fresh adapter for an adapter.

        Returns:
            The model.
        """
        base, head, seed = self.upgrade.new, self.data.head, self.recipe.seed
        config = self.adaptation.family.read_config(self.adaptation, for_new_adapter=True)
        model = fresh_model(base, head, seed)
        restore_output_units(model, base, self.data)
        return prepare_for_tuning(model, base, head, config, seed)

    def graft(self) -> None:
        """Write the old delta or adapter, grafted onto the new base, to the job's folder."""

        def write(folder: Path) -> None:
            self.notes.update(write_graft(self.adaptation, self.upgrade, folder, self.progress, replace=self.replace))

        self.write_with_head(write)

    def graft_transformed(self, rule: Rule) -> None:
        """Write the old delta or adapter, transformed and grafted onto the new base, to the job's folder.

        Args:
            rule: The transform of each delta, as in `write_transform`.
        """

        def write(folder: Path) -> None:
            self.notes.update(
                write_transform(self.adaptation, self.upgrade, rule, folder, self.progress, replace=self.replace)
            )

        self.write_with_head(write)

    def write_with_head(self, write: Callable[[Path], None]) -> None:
        """Write an adaptation to the job's folder, with the head that the job's policy asks for.

        Args:
            write: Writes the adaptation with the old head to a folder.
        """
        if self.head == "copy":
            write(self.into)
            return
        with_old_head = self.work / "graft" / "old-head"
        write(with_old_head)
        change_head(with_old_head, self.upgrade.new, self.data.head, self.head, self.recipe.seed, self.into)

    def load(self, *, trainable: bool = True) -> Any:
        """Load the adaptation in the job's folder.

        Args:
            trainable: Whether the model will be tuned.

        Returns:
            The model.
        """
        return load_model(load_adaptation(self.into), self.upgrade.new, self.data.head, trainable=trainable)

    def grafted(self) -> Any:
        """Graft the old delta or adapter onto the new base.

        Returns:
            The model, ready for tuning.
        """
        graft = dataclasses.replace(self, into=self.work / "graft" / "weights")
        graft.graft()
        return graft.load()

    def deploy(self, model: Any) -> Deployment:
        """Deploy a model of the new base on the task's examples.

        Args:
            model: A model of `fresh`, `load` or `grafted`.

        Returns:
            The deployment, which runs each split once.
        """
        return Deployment(model, self.upgrade.new, self.data, self.recipe.precision, self.progress)

    def old_deployment(self) -> Deployment:
        """Deploy the old adaptation on the task's examples.

        Returns:
            The deployment, which runs each split once.
        """
        old = self.upgrade.old
        model = load_model(self.adaptation, old, self.data.head)
        return Deployment(model, old, self.data, self.recipe.precision, self.progress)

    def teacher(self) -> Any:
        """Load the old adaptation, as a model whose parameters have the names and shapes of the new model's.

        Returns:
            The model, frozen if the adaptation is an adapter.
        """
        old, adaptation = self.upgrade.old, self.adaptation
        if adaptation.changed_base:  # PEFT's plain form of it has other sizes
            folder = self.work / "teacher"
            write_graft(adaptation, Upgrade(old, old), folder, self.progress)
            adaptation = load_adaptation(folder)
        return load_model(adaptation, old, self.data.head)

    def save(self, model: Any) -> None:
        """Write a model's adaptation to the job's folder.

        Args:
            model: A model of `load` or `grafted`.
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
        """Tune a model on the task, with a teacher if options are passed, and write it to the job's folder.

        Args:
            model: A model of `fresh`, `load` or `grafted`.
            options: The options of distillation, with the old adaptation as the teacher; None for no teacher.
            anchor: The penalty on the distance from the start; None for no penalty.
            teacher_judges: Whether to select the best weights by agreement with the teacher rather than by labels.

        Returns:
            The learning curve.
        """
        start = initial_factors(model)
        teacher = Teacher(self.teacher(), self.upgrade.old, options, teacher_judges) if options else None
        curve = tune_model(model, self.upgrade.new, self.data, self.recipe, self.work, self.progress, teacher, anchor)
        save_model(model, self.upgrade.new, self.data.head, self.into, start)
        return curve
