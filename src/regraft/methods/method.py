"""What a recycling method is, and the job it is given."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from regraft.adaptation import Adaptation
    from regraft.progress import Progress
    from regraft.task import TaskData
    from regraft.tuning import Distillation, Recipe
    from regraft.upgrade import Upgrade


@dataclasses.dataclass(frozen=True)
class Job:
    """One adaptation to carry over, and where.

    Args:
        upgrade: The old and the new base.
        adaptation: What was tuned on the old one.
        data: The task's examples, classes in the order of the adaptation's head.
        recipe: Resolved for this data.
        work: A folder in which an interrupted job is gone on from.
        into: The folder to fill with the new adaptation.
        progress: Told of each step.
    """

    upgrade: Upgrade
    adaptation: Adaptation
    data: TaskData
    recipe: Recipe
    work: Path
    into: Path
    progress: Progress

    def fresh(self) -> Any:
        """Give the new base as scratch tunes it: with a fresh head, and a fresh LoRA if the old weights are one.

        Returns:
            The model.
        """
        from regraft.adaptation import attach_lora, fresh_model, lora_config

        model = fresh_model(self.upgrade.new, self.data.labels, self.recipe.seed)
        if self.adaptation.kind == "lora":
            model = attach_lora(model, self.upgrade.new, lora_config(self.adaptation), self.recipe.seed)
        return model

    def grafted(self) -> Any:
        """Give the new base with the old weights put onto it, ready to be tuned further.

        Returns:
            The model.
        """
        from regraft.adaptation import load_adaptation, load_model, write_graft

        folder = self.work / "graft" / "weights"
        write_graft(self.adaptation, self.upgrade, folder, self.progress)
        return load_model(load_adaptation(folder), self.upgrade.new, self.data.labels, trainable=True)

    def tune(self, model: Any, options: Distillation | None = None) -> list[dict[str, float]]:
        """Tune a model on the task, from a teacher if options are given, and write it into its folder.

        Args:
            model: From `fresh` or `grafted`.
            options: The distillation's weights; the teacher is the old adaptation on the old base.

        Returns:
            The learning curve.
        """
        from regraft.adaptation import load_model, save_model
        from regraft.tuning import Teacher, tune_model

        old = self.upgrade.old
        teacher = Teacher(load_model(self.adaptation, old, self.data.labels), old, options) if options else None
        curve = tune_model(model, self.upgrade.new, self.data, self.recipe, self.work, self.progress, teacher)
        save_model(model, self.upgrade.new, self.into)
        return curve


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to get an adaptation for the new base.

    Args:
        name: What it is called on the command line and in outcomes.
        summary: One line on what it does.
        needs: Of `labels` and `training`, what it needs.
        run: Fills the job's folder with an adaptation and returns the learning curve, empty without training.
        options: The dataclass of its options, if it has any.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    run: Callable[[Job, Any], list[dict[str, float]]]
    options: Any = None
