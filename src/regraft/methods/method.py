"""What a recycling method is, and the job it is given."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from regraft.adaptation import Adaptation, HeadPolicy
    from regraft.progress import Progress
    from regraft.task import TaskData
    from regraft.tuning import Anchored, Distillation, Recipe
    from regraft.upgrade import Upgrade


@dataclasses.dataclass(frozen=True)
class Job:
    """One adaptation to carry over, and where.

    Args:
        upgrade: The old and the new base.
        adaptation: What was tuned on the old one.
        data: The task's examples, classes in the order of the new head.
        recipe: Resolved for this data.
        work: A folder in which an interrupted job is gone on from.
        into: The folder to fill with the new adaptation.
        progress: Told of each step.
        head: What becomes of the old head where the old weights are put onto the new base.
        replace: Whether what an adapter stores in place of its base's tensors is put onto the new base as it is stored.
        notes: What the method found out, recorded in the outcome as JSON; `labels`, if it is there, is how many
            labelled examples it used in all, counted from the learning curve's steps if it is not.
    """

    upgrade: Upgrade
    adaptation: Adaptation
    data: TaskData
    recipe: Recipe
    work: Path
    into: Path
    progress: Progress
    head: HeadPolicy = "copy"
    replace: bool = False
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def fresh(self) -> Any:
        """Return the new base as scratch tunes it: with a fresh head, and a fresh adapter if the old weights are one.

        Returns:
            The model.
        """
        from regraft.adaptation import attach, fresh_model

        base, head, seed = self.upgrade.new, self.data.head, self.recipe.seed
        config = self.adaptation.family.read_config(self.adaptation, afresh=True)
        return attach(fresh_model(base, head, seed), base, head, config, seed)

    def graft(self, into: Path) -> None:
        """Write the old weights put onto the new base, with the head that is wanted.

        Args:
            into: The folder to fill.
        """
        from regraft.adaptation import change_head, write_graft

        graft = self.work / "graft" / "kept" if self.head != "copy" else into
        self.notes.update(write_graft(self.adaptation, self.upgrade, graft, self.progress, replace=self.replace))
        if self.head == "copy":
            return
        change_head(graft, self.upgrade.new, self.data.head, self.head, self.recipe.seed, into)

    def grafted(self) -> Any:
        """Return the new base with the old weights put onto it, ready to be tuned further.

        Returns:
            The model.
        """
        from regraft.adaptation import load_adaptation, load_model

        folder = self.work / "graft" / "weights"
        self.graft(folder)
        return load_model(load_adaptation(folder), self.upgrade.new, self.data.head, trainable=True)

    def teacher(self) -> Any:
        """Return the old adaptation on the old base, as a model whose parameters are named and shaped as the new one's.

        Returns:
            The model, frozen if the adaptation is an adapter.
        """
        from regraft.adaptation import load_adaptation, load_model, write_graft
        from regraft.upgrade import Upgrade

        old, adaptation = self.upgrade.old, self.adaptation
        if adaptation.changed_base:  # its plain form has other sizes
            folder = self.work / "teacher"
            write_graft(adaptation, Upgrade(old, old), folder, self.progress)
            adaptation = load_adaptation(folder)
        return load_model(adaptation, old, self.data.head)

    def tune(
        self,
        model: Any,
        options: Distillation | None = None,
        anchor: Anchored | None = None,
        *,
        teacher_judges: bool = False,
    ) -> list[dict[str, float]]:
        """Tune a model on the task, from a teacher if options are given, and write it into its folder.

        Args:
            model: From `fresh` or `grafted`.
            options: The distillation's weights; the teacher is the old adaptation on the old base.
            anchor: How the weights are held to where they start, if they are.
            teacher_judges: Whether the best weights are those closest to the teacher, whatever the labels say.

        Returns:
            The learning curve.
        """
        from regraft.adaptation import save_model, start_of
        from regraft.tuning import Teacher, tune_model

        start = start_of(model)
        teacher = Teacher(self.teacher(), self.upgrade.old, options, teacher_judges) if options else None
        curve = tune_model(model, self.upgrade.new, self.data, self.recipe, self.work, self.progress, teacher, anchor)
        save_model(model, self.upgrade.new, self.data.head, self.into, start)
        return curve


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to get an adaptation for the new base.

    Args:
        name: What it is called on the command line and in outcomes.
        summary: One line on what it does.
        needs: Of `labels`, `text` (of the task, unlabelled), `tasks` (others, tuned on both bases) and `training`, what
            it needs.
        run: Fills the job's folder with an adaptation and returns the learning curve, empty without training.
        options: The dataclass of its options, if it has any.
        contents: Identifies the content of files that the options name, from the options and the seed, as JSON by
            name: part of what an outcome is made from.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    run: Callable[[Job, Any], list[dict[str, float]]]
    options: Any = None
    contents: Callable[[Any, int], dict[str, Any]] | None = None
