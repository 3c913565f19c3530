"""The hooks of task types whose models write answers, token by token; other types keep the defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from regraft.task.metric import Metric  # noqa: TC001 (pydantic reads annotations)
from regraft.task.types.task_views import TaskViews

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from regraft.task.source import SourceTable
    from regraft.task.split import Split
    from regraft.task.types.view import Answers, Table


class GenerativeTask(TaskViews):
    """A task whose models may predict tokens with the base's own head, and write answers; by default, they do not."""

    head_in_base: ClassVar[bool] = False
    """Whether the head is the base's own language-modelling head, so that rows are tokens and outputs the vocabulary.

    Such a head is grafted like the body. It is never fresh, and never stored by an adapter."""
    selection_metric: ClassVar[Metric | None] = None
    """The metric by which a training selects its best weights; None for the reported one."""
    learning_rates: ClassVar[dict[str, float]] = {}
    """The default peak learning rates that differ from those of classification, by kind of adaptation."""
    distillation_temperature: ClassVar[float] = 5.0
    """The default temperature of a distillation (Hinton et al., 2015, arXiv:1503.02531): a higher one gives small
    probabilities more weight."""
    distillation_beta: ClassVar[float] = 1.0
    """The default weight of a distillation's hidden-state term."""

    uniform_loras: ClassVar[bool] = False
    """Whether LoRAs are written with one rank and one scale, because servers of such models ignore all others."""

    @property
    def max_answer_tokens(self) -> int:
        """The most tokens of an answer, including the token that ends it."""
        raise NotImplementedError(type(self).__name__)

    @classmethod
    def answer_health(cls, rows_by_model: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table | None:
        """Return a table of the health of models' answers; None if there are none.

        Args:
            rows_by_model: The lines of `predictions.jsonl` for one split, by the model's name.
        """
        return None

    @classmethod
    def answer_pairs(
        cls, old_rows: Sequence[Mapping[str, Any]], new_rows: Sequence[Mapping[str, Any]]
    ) -> Answers | None:
        """Return the answers of two models side by side; None if there are none.

        Args:
            old_rows: The lines of the old model's `predictions.jsonl` for one split.
            new_rows: Those of the new model; examples that only one of the two has are left out.
        """
        return None

    @classmethod
    def keys_for_columns(cls, columns: Sequence[str]) -> dict[str, str] | None:
        """Return the keys of a task file by which this type reads data of some columns, without a task file.

        Args:
            columns: The names of all columns of the data; none for formats without names, such as CoNLL.

        Returns:
            The keys that name columns; None if columns of these names are not usually of this type.
        """
        return None

    def with_data_defaults(self, table: SourceTable) -> Self:
        """Choose keys by the values of the data, for a task without a task file.

        Args:
            table: The input and target columns of the training source.

        Raises:
            DataError: The values are usually of another type.
        """
        return self

    @property
    def chat_template(self) -> tuple[str, str | None]:
        """Which chat template the new model has, `adaptation`, `new-base` or `file`, and the text of the file."""
        return "adaptation", None

    @property
    def answers_needed(self) -> bool:
        """Whether predictions have answers that a model writes, rather than only the probabilities of references."""
        return False

    def encode_prompts(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
        """Tokenise the prompts of examples, without their answers.

        Args:
            split: The examples.
            tokenizer: The tokenizer of the base.
            max_length: The number of tokens to truncate prompts to, from their start.

        Returns:
            The token ids of each prompt.
        """
        raise NotImplementedError(type(self).__name__)

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Return the ids of the tokens that end an answer.

        Args:
            tokenizer: The tokenizer of the base.
        """
        raise NotImplementedError(type(self).__name__)

    def decode_answer(self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """Convert the tokens of an answer to its text.

        Args:
            ids: The generated token ids, without the token that ends the answer.
            tokenizer: The tokenizer of the base.
        """
        raise NotImplementedError(type(self).__name__)

    def answer_prediction(self, answer: str | None, ended: bool | None, tokens: int | None, row_statistics: Any) -> Any:
        """Build the prediction for an example.

        Args:
            answer: The text of the answer; None if no answer was generated.
            ended: Whether a token that ends answers was generated, rather than the most tokens.
            tokens: The number of generated tokens.
            row_statistics: The summed loss in nats, the number of correct tokens and the number of labelled tokens of
                the reference; None for an example without a reference.
        """
        raise NotImplementedError(type(self).__name__)
