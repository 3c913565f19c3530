"""The inputs and the output folder of a method's run, and the steps that methods share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation import (
    change_head,
    initial_factors,
    keeps_base,
    load_adaptation,
    load_model,
    prepare_for_tuning,
    save_model,
    write_graft,
)
from regraft.adaptation.transform import write_transform
from regraft.model import Deployment
from regraft.tuning import Distillation, Teacher, fresh_scaled_model, tune_model
from regraft.upgrade import Upgrade

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import nn

    from regraft.adaptation import Adaptation, HeadPolicy
    from regraft.adaptation.adaptation import Rule
    from regraft.progress import Progress
    from regraft.task import TaskData
    from regraft.tuning import Anchoring, OnPolicy, Recipe
    from regraft.weights import RowMatch


@dataclasses.dataclass(frozen=True)
class Job:
    """An adaptation to carry over, with the task, the recipe and the folders to write to.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation on the old base.
        data: The task's data, with labels in the order of the new head's outputs.
        recipe: The recipe, resolved for this data.
        work_folder: The folder for the state from which an interrupted job resumes.
        output_folder: The folder for the new adaptation.
        progress: Called at each step.
        row_match: The match by token between the embedding rows of the adaptation and of both bases; None if equal
            rows stand for equal tokens in all three.
        head: The policy for the old head.
        replace: Whether to copy the tensors that an adapter stores in place of its base's, rather than to graft their
            change.
        notes: The method's notes, recorded in the outcome as JSON. `labels`, if present, is the number of labelled
            examples that were used; otherwise these are counted from `labelled_rows` and the training's steps.
        labelled_rows: The row numbers of training examples whose labels a start has read.
    """

    upgrade: Upgrade
    adaptation: Adaptation
    data: TaskData
    recipe: Recipe
    work_folder: Path
    output_folder: Path
    progress: Progress
    row_match: RowMatch | None = None
    head: HeadPolicy = "copy"
    replace: bool = False
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    labelled_rows: set[int] = dataclasses.field(default_factory=set)

    def build_fresh_model(self) -> Any:
        """Build the model that scratch tunes: the new base with a fresh head.

        Returns:
            The model; with a fresh adapter of the same config, if the adaptation is an adapter.
        """
        base = self.upgrade.new
        head = self.data.head
        seed = self.recipe.seed
        config = self.adaptation.family.read_config(self.adaptation, for_new_adapter=True)
        model = fresh_scaled_model(base, self.data, seed, frozen=keeps_base(config))
        return prepare_for_tuning(model, base, head, config, seed)

    def graft(self) -> None:
        """Graft the old delta or adapter onto the new base, and write the result to the output folder."""

        def write(folder: Path) -> None:
            self.notes.update(write_graft(self.adaptation, self.upgrade, folder, self.progress, replace=self.replace))

        self.write_with_head(write)

    def graft_transformed(self, rule: Rule) -> None:
        """Transform the old delta or adapter, graft it onto the new base, and write the result to the output folder.

        Args:
            rule: The transform of a delta, a function of the tensor's name, the delta and the upgrade's shift; see
                `write_transform`.

        Raises:
            KindError: The adaptation's kind has no deltas.
            MismatchError: A tensor of the body is missing in a base, or differs in shape from it.
        """

        def write(folder: Path) -> None:
            self.notes.update(
                write_transform(self.adaptation, self.upgrade, rule, folder, self.progress, replace=self.replace)
            )

        self.write_with_head(write)

    def write_with_head(self, write: Callable[[Path], None]) -> None:
        """Write an adaptation to the output folder, with the head that the job's policy asks for.

        Args:
            write: Writes the adaptation with the old head to a folder.
        """
        if self.head == "copy":
            write(self.output_folder)
            return
        old_head_folder = self.work_folder / "graft" / "old-head"
        write(old_head_folder)
        base = self.upgrade.new
        initial = fresh_scaled_model(base, self.data, self.recipe.seed).state_dict()
        change_head(old_head_folder, base, self.data.head, self.head, initial, self.output_folder)

    def load(self, *, trainable: bool = True) -> Any:
        """Load the adaptation in the output folder.

        Args:
            trainable: Whether the model will be tuned.

        Returns:
            The model, on the CPU.
        """
        return load_model(load_adaptation(self.output_folder), self.upgrade.new, self.data.head, trainable=trainable)

    def build_grafted_model(self) -> Any:
        """Graft the old delta or adapter onto the new base.

        Returns:
            The model, ready for tuning.
        """
        graft_job = dataclasses.replace(self, output_folder=self.work_folder / "graft" / "weights")
        graft_job.graft()
        return graft_job.load()

    def deploy(self, model: nn.Module) -> Deployment:
        """Deploy a model on the new base, to run it on the task's examples.

        Args:
            model: A model of the task on the new base.

        Returns:
            The deployment, which runs each split once.
        """
        return Deployment(model, self.upgrade.new, self.data, self.recipe.precision, self.progress)

    def old_deployment(self) -> Deployment:
        """Deploy the old model, to run it on the task's examples.

        Returns:
            The deployment, which runs each split once.
        """
        old = self.upgrade.old
        model = load_model(self.adaptation, old, self.data.head)
        return Deployment(model, old, self.data, self.recipe.precision, self.progress)

    def teacher(self) -> Any:
        """Load the old model, with the parameter names and shapes of the new model.

        Returns:
            The model, frozen if the adaptation is an adapter.
        """
        old = self.upgrade.old
        adaptation = self.adaptation
        if adaptation.changed_base:  # the new model is then a plain LoRA, whose shapes differ from the stored ones
            folder = self.work_folder / "teacher"
            write_graft(adaptation, Upgrade(old, old), folder, self.progress)
            adaptation = load_adaptation(folder)
        return load_model(adaptation, old, self.data.head)

    def student_ids(self) -> torch.Tensor | None:
        """Return the new id of each token of the old model's vocabulary, −1 for none; None if all ids are the same."""
        import torch

        match = self.row_match
        if match is None or not self.data.task.head_in_base:
            return None
        ids = torch.full((match.num_tuned_rows,), -1, dtype=torch.long)
        for new_id, old_id in enumerate(match.tuned_row_indices):
            if old_id >= 0:
                ids[old_id] = new_id
        return ids

    def save(self, model: nn.Module) -> None:
        """Write a model's adaptation to the output folder.

        Args:
            model: A model that `load` or `build_grafted_model` returned, on the CPU.
        """
        save_model(model, self.upgrade.new, self.data.head, self.output_folder)

    def tune(
        self,
        model: nn.Module,
        options: Distillation | OnPolicy | None = None,
        anchor: Anchoring | None = None,
        *,
        teacher_selects_best: bool = False,
    ) -> list[dict[str, float]]:
        """Tune a model on the task, with a teacher if options of distillation are passed, and write the best weights.

        Args:
            model: A model that `build_fresh_model`, `load` or `build_grafted_model` returned.
            options: The options of distillation, with the old model as the teacher; None for no teacher.
            anchor: The penalty on the distance from the start; None for no penalty.
            teacher_selects_best: Whether to select the best weights by agreement with the teacher on dev, rather than
                by the score, which needs labels.

        Returns:
            The learning curve.

        Raises:
            MismatchError: An output of the teacher is infinite or NaN.
            RecipeError: A loss or a score became infinite or NaN.
        """
        initial = initial_factors(model)
        teacher = None
        if options:
            options = options.for_task(self.data.task) if isinstance(options, Distillation) else options
            teacher = Teacher(self.teacher(), self.upgrade.old, options, teacher_selects_best, self.student_ids())
        curve = tune_model(
            model, self.upgrade.new, self.data, self.recipe, self.work_folder, self.progress, teacher, anchor
        )
        save_model(model, self.upgrade.new, self.data.head, self.output_folder, initial)
        return curve
