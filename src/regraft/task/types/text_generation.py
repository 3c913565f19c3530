"""The task type `text-generation`: answers to prompts and in conversations, or texts without a prompt, by decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from regraft.errors import DataError
from regraft.task.metric import Metric  # noqa: TC001 (pydantic reads annotations)
from regraft.task.split import Split, object_array
from regraft.task.types import chat_encoding, conversation
from regraft.task.types.answer_metrics import (
    ANSWER_METRICS,
    LOSS,
    ROUGE_L,
    bind_pattern,
    find_answer_metric,
    right,
)
from regraft.task.types.answer_views import health_table, health_views, recorded_pairs, side_by_side
from regraft.task.types.counts import spread_evenly
from regraft.task.types.examples import Examples
from regraft.task.types.generation_keys import GenerationKeys
from regraft.task.types.generation_rows import (
    MIN_CLASS_REPETITIONS,
    choose_metric,
    convert_rows,
    end_with_answers,
    warn_of_unlearnt,
)
from regraft.task.types.likelihood import Likelihood  # noqa: TC001 (pydantic reads annotations)
from regraft.task.types.token_likelihood import TOKENS
from regraft.task.types.token_views import mark_labels, summarise_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from regraft.task.source import SourceTable
    from regraft.task.split import Integers, Targets
    from regraft.task.types.chat_encoding import EncodedExample
    from regraft.task.types.conversation import Answer, Inputs
    from regraft.task.types.view import Answers, ModelPredictions, Table, View

MAX_ANSWERS_AS_STRATA = 20
"""The largest number of different answers that are strata, as classes are: more do not fit on a screen."""


class TextGeneration(GenerationKeys):
    """A task of writing texts: answers to prompts or in conversations, or texts without a prompt.

    The columns of the training source determine the format, unless the task file names a column: `messages` (or
    `conversations`), `prompt` with `completion`, `instruction` with `input` and `output`, or `text`. Examples without
    answers are unlabelled data, which restricts the methods to those that read no labels.

    Args:
        metric: The name of the metric that is reported, or `MODULE:FUNCTION` for a function of a reference and an
            answer that returns a number from 0 to 1.
        shots: The number of training examples to keep in all; dev is limited to as many. By default, all are kept.
    """

    peft_task_type: ClassVar[str] = "CAUSAL_LM"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    pipeline_tag: ClassVar[str] = "text-generation"
    metrics: ClassVar[tuple[Metric, ...]] = ANSWER_METRICS
    agreement_metric: ClassVar[Metric | None] = ROUGE_L
    likelihood: ClassVar[Likelihood] = TOKENS
    guess: ClassVar[str] = "the new base without the adaptation"
    head_policies: ClassVar[tuple[str, ...]] = ("copy",)
    head_in_base: ClassVar[bool] = True
    selection_metric: ClassVar[Metric | None] = LOSS
    uniform_loras: ClassVar[bool] = True
    # TRL's examples use 1e-4 to 2e-4 for LoRAs; full fine-tunes take a tenth of it
    learning_rates: ClassVar[dict[str, float]] = {"lora": 2e-4, "full": 2e-5}
    distillation_temperature: ClassVar[float] = 1.0
    distillation_beta: ClassVar[float] = 0.0
    digest_keys: ClassVar[tuple[str, ...]] = (
        "train_on",
        "system_prompt",
        "template_choice",
        "template_text",
        "pattern",
        "right_at",
        "max_new_tokens",
    )

    type: Literal["text-generation"] = "text-generation"
    metric: str = Field(
        default="rouge_l",
        description=f"one of {', '.join(metric.name for metric in ANSWER_METRICS)}, or MODULE:FUNCTION",
    )
    shots: int | None = Field(default=None, ge=1, description="a whole number of examples in all, 1 or more")

    @classmethod
    def keys_for_columns(cls, columns: Sequence[str]) -> dict[str, str] | None:
        """Read the columns of the only format that fits them; see `Task.keys_for_columns`."""
        return conversation.identify_columns(columns)

    def with_data_defaults(self, table: SourceTable) -> Self:
        """Choose the metric and the most tokens by the answers; see `Task.with_data_defaults`."""
        answers = [answer for _, answer in self._read_rows(table)]
        return self.model_copy(update={"metric": "loss"} if self.text else choose_metric(answers))

    @field_validator("metric")
    @classmethod
    def _validate_metric(cls, name: str) -> str:
        return find_answer_metric(name).name

    @property
    def scoring(self) -> Metric:
        """The reported metric; see `Task.scoring`."""
        return find_answer_metric(self.metric)

    @property
    def answers_needed(self) -> bool:
        """Whether the metric compares answers with references; see `Task.answers_needed`."""
        return find_answer_metric(self.metric).needs_answers

    def bind_metric(self, metric: Metric, labels: Sequence[str]) -> Metric:
        """Apply `pattern`; see `Task.bind_metric`."""
        return bind_pattern(metric, self.pattern)

    @classmethod
    def head_settings(cls, labels: Sequence[str]) -> dict[str, Any]:
        """Return no settings: the head is that of the base; see `Task.head_settings`."""
        return {}

    def read(self, tables: Mapping[str, SourceTable]) -> tuple[tuple[str, ...], dict[str, Split]]:
        """Convert all rows to one normal form; there are no labels; see `Task.read`.

        In conversations, turns after the assistant's last turn are left out, unless no conversation of train ends with
        the assistant's turn.
        """
        import numpy as np

        examples = {split: self._read_rows(table) for split, table in tables.items()}
        is_labelled = any(answer is not None for _, answer in examples["train"])
        is_conversation = "messages" in examples["train"][0][0]
        splits = {}
        for split, table in tables.items():
            for row, (inputs, _) in zip(table.row_numbers, examples[split], strict=True):
                if ("messages" in inputs) != is_conversation:
                    kind, other = ("a plain text", "messages") if is_conversation else ("messages", "a plain text")
                    raise DataError(
                        f"{table.source}, row {row}: the prompt is {kind}, but that of the first row of train is "
                        f"{other}. Use the same form in all rows."
                    )
            if is_labelled:
                examples[split] = end_with_answers(table, examples[split])
            answers = object_array([answer for _, answer in examples[split]])
            row_numbers = np.array(table.row_numbers, dtype=np.int64)
            splits[split] = Split(split, table.source, [inputs for inputs, _ in examples[split]], answers, row_numbers)
        return (), splits

    def is_labelled(self, splits: Mapping[str, Split]) -> bool:
        """Return whether the training examples have answers; see `Task.is_labelled`."""
        return splits["train"].targets[0] is not None

    def encode(self, split: Split, tokenizer: PreTrainedTokenizerBase, pad: int, max_length: int) -> Examples:
        """Tokenise examples with their answers, with one row per token that is a label; see `Task.encode`.

        A row's target is the id of its token, and its token is the one before, which predicts it. Examples without a
        label have no row; a warning names their number.
        """
        import numpy as np

        encoded = self._encode_rows(split, tokenizer)
        positions = [example.label_positions(max_length) for example in encoded]
        targets = [example.ids[i] for example, labels in zip(encoded, positions, strict=True) for i in labels]
        answered = [
            labels for labels, answer in zip(positions, split.targets.tolist(), strict=True) if answer is not None
        ]
        warn_of_unlearnt(
            split.source,
            split.name,
            len(answered),
            sum(not labels for labels in answered),
            sum(example.masking == "last turn" for example in encoded),
            max_length,
        )
        columns = {"input_ids": [example.ids[:max_length] for example in encoded]}
        tokens = [[position - 1 for position in labels] for labels in positions]
        ids = np.array(targets, dtype=np.int64)
        return Examples(columns, ids, {"input_ids": pad}, tokens, are_targets_tokens=True)

    def encode_prompts(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
        """Tokenise examples up to where a model begins its answer.

        Args:
            split: The examples.
            tokenizer: The tokenizer of the base.
            max_length: The number of tokens to keep of each prompt, which are its last.

        Returns:
            The token ids of each prompt.

        Raises:
            DataError: An example has no prompt, or the chat template is missing or cannot be applied.
        """
        prompts = convert_rows(
            split.source,
            split.row_numbers.tolist(),
            lambda inputs: chat_encoding.encode_prompt(inputs, tokenizer),
            split.inputs,
        )
        return [ids[-max_length:] for ids in prompts]

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> set[int]:
        """Return the ids of the tokens that end an answer: EOS, and the chat template's end of a turn.

        Args:
            tokenizer: The tokenizer of the base.
        """
        return chat_encoding.find_stop_ids(tokenizer)

    def decode_answer(self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """Convert the tokens of an answer to its text; see `Task.decode_answer`."""
        return chat_encoding.decode_answer(ids, tokenizer)

    def answer_prediction(
        self, answer: str | None, ended: bool | None, tokens: int | None, row_statistics: Any
    ) -> dict[str, Any]:
        """Return the answer with its statistics, as `answer_metrics` reads them; see `Task.answer_prediction`."""
        loss, correct, labels = row_statistics or (None, None, 0)
        return {"answer": answer, "ended": ended, "tokens": tokens, "loss": loss, "correct": correct, "labels": labels}

    def comparison_views(
        self, targets: Targets, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return the health of the answers; see `Task.comparison_views`."""
        return health_views(targets.tolist(), old.predictions, new.predictions)

    def flip_views(
        self, split: Split, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return the answers of both models side by side; see `Task.flip_views`."""
        return side_by_side(split, self.as_text, old, new)

    def count_words(self, inputs: dict[str, Any]) -> int:
        """Count the words, separated by white space, of the prompt, all turns or the text; see `Task.count_words`."""
        contents = map(conversation.content_text, inputs["messages"]) if "messages" in inputs else inputs.values()
        return sum(len(content.split()) for content in contents)

    def strata(self, targets: Targets, labels: Sequence[str]) -> tuple[Integers, list[str]]:
        """Divide examples by their answers if these are a few that are repeated often; see `Task.strata`."""
        import numpy as np

        answers = [self.describe(target, labels) for target in targets]
        names = sorted(set(answers))
        if len(names) > min(MAX_ANSWERS_AS_STRATA, len(answers) // MIN_CLASS_REPETITIONS):
            return np.zeros(len(answers), dtype=np.int64), ["examples"]
        indices = {name: index for index, name in enumerate(names)}
        return np.array([indices[answer] for answer in answers], dtype=np.int64), names

    def sample_counts(self, size: int, stratum_sizes: Sequence[int]) -> list[int]:
        """Divide a number of examples in all among the strata as evenly as they allow; see `Task.sample_counts`."""
        return spread_evenly(size, stratum_sizes)

    def chance_prediction(self, targets: Targets, labels: Sequence[str]) -> None:
        """Return None: the answers to compare with are those of the new base; see `Task.chance_prediction`."""

    def relabel(self, targets: Targets, output_by_label: Sequence[int]) -> Targets:
        """Return the targets, which have no labels; see `Task.relabel`."""
        return targets

    def describe(self, target: Any, labels: Sequence[str]) -> str:
        """Return the text of an answer; see `Task.describe`."""
        answer = target.get("answer", target) if isinstance(target, dict) else target
        return "" if answer is None else conversation.content_text(conversation.answer_message(answer))

    def as_targets(self, predictions: Sequence[Any]) -> Targets:
        """Return the predicted answers; see `Task.as_targets`."""
        answers = [item.get("answer", item) if isinstance(item, dict) else item for item in predictions]
        return object_array(answers)

    def right(self, targets: Targets, predictions: Sequence[Any]) -> list[bool | None]:
        """Compare the metric's value for each example with `right_at`; see `Task.right`."""
        metric: Any = bind_pattern(find_answer_metric(self.metric), self.pattern)
        return right(metric, targets.tolist(), predictions, self.right_at)

    def linear_probe(self) -> Any:
        """Refuse: a linear probe predicts no text; see `Task.linear_probe`."""
        raise DataError(f"task {self.name!r}: a linear probe cannot predict texts. Use another task, or no probe.")

    def as_text(self, inputs: dict[str, Any]) -> str:
        """Return the prompt, the text, or the turns of the conversation; see `Task.as_text`."""
        return conversation.as_text(inputs)

    def as_inputs(self, text: str) -> dict[str, Any]:
        """Return a text as a prompt, in a conversation if the task is of conversations; see `Task.as_inputs`."""
        if self.messages is None and self.instruction is None:
            return {"prompt": text}
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return {"messages": [*system, {"role": "user", "content": text}]}

    def target_weakness(self, targets: Targets) -> str | None:
        """Report examples that all have the same answer; see `Task.target_weakness`."""
        answers = {self.describe(target, ()) for target in targets}
        return (
            None
            if len(answers) > 1 or answers == {""}
            else "examples of a single answer, on which always giving it is perfect"
        )

    def encoded_views(self, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[View, ...]:
        """Return the numbers of tokens, and examples with their labels marked; see `Task.encoded_views`."""
        encoded = self._encode_rows(split, tokenizer)
        return summarise_tokens(split.name, encoded, max_length), mark_labels(encoded, tokenizer, max_length)

    def _read_rows(self, table: SourceTable) -> list[tuple[Inputs, Answer]]:
        """Convert the rows of a table to normal form."""
        columns = [table.columns[column] for column in self.columns.values()]
        rows = [dict(zip(self.columns, values, strict=True)) for values in zip(*columns, strict=True)]
        return convert_rows(
            table.source, table.row_numbers, lambda row: conversation.read_example(row, self.system_prompt), rows
        )

    def _encode_rows(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> list[EncodedExample]:
        """Tokenise examples with their answers."""
        return convert_rows(
            split.source,
            split.row_numbers.tolist(),
            lambda pair: chat_encoding.encode_example(pair[0], pair[1], tokenizer, train_on=self.train_on),
            list(zip(split.inputs, split.targets.tolist(), strict=True)),
        )

    @classmethod
    def answer_health(cls, rows_by_model: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table | None:
        """Return how answers end, repeat and compare in length; see `GenerativeTask.answer_health`."""
        return health_table(
            {
                model: ([row["prediction"] for row in rows], [row["label"] for row in rows])
                for model, rows in rows_by_model.items()
            }
        )

    @classmethod
    def answer_pairs(
        cls, old_rows: Sequence[Mapping[str, Any]], new_rows: Sequence[Mapping[str, Any]]
    ) -> Answers | None:
        """Return the answers with their prompts and references; see `GenerativeTask.answer_pairs`."""
        return recorded_pairs(old_rows, new_rows)


TASK = TextGeneration
