"""The views that a task type may define."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.task.types.keys import TaskKeys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from regraft.task.split import Split, Targets
    from regraft.task.types.view import ModelPredictions, View


class TaskViews(TaskKeys):
    """A task whose type may show tables, charts and marked texts of its examples; by default, there are none."""

    def comparison_views(
        self, targets: Targets, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return tables and charts that compare an old and a new model beyond their scores and flips.

        Args:
            targets: One target per example.
            old: The old model's predictions.
            new: The new model's predictions.
            labels: The label names, in the order of the outputs.
        """
        return ()

    def flip_views(
        self, split: Split, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return marked texts or answers of examples that flipped, if they say more than the names of predictions.

        Args:
            split: The examples.
            old: The old model's predictions.
            new: The new model's predictions.
            labels: The label names, in the order of the outputs.
        """
        return ()

    def example_views(self, split: Split, labels: Sequence[str]) -> tuple[View, ...]:
        """Return tables and texts that show examples as users of the type look at them, for `task check`.

        Args:
            split: The examples to show.
            labels: The label names, in the order of the outputs.
        """
        return ()

    def encoded_views(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[View, ...]:
        """Return tables and marked texts that show examples as a model sees them, for `task check` with a base.

        Args:
            split: The examples to show.
            tokenizer: The tokenizer of the base or of the adaptation.
            max_length: The number of tokens that examples are truncated to.
        """
        return ()
