"""The task type `token-classification`: one tag per word, such as the names of persons in sentences."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from regraft.errors import DataError
from regraft.task.labels import format_names
from regraft.task.metric import Metric  # noqa: TC001 (pydantic reads annotations)
from regraft.task.split import Split, object_array
from regraft.task.types.examples import Examples
from regraft.task.types.head import ANY_PROBLEM_TYPE
from regraft.task.types.likelihood import CATEGORICAL, Likelihood
from regraft.task.types.probes import class_probe
from regraft.task.types.span_metrics import SPAN_F1, TOKEN_ACCURACY, span_f1
from regraft.task.types.span_views import compare_taggers, show_examples, show_flips
from regraft.task.types.tagging import OUTSIDE, SCHEMES, Scheme, detect_scheme, split_tag, types_of
from regraft.task.types.type import Task
from regraft.task.types.words import ColumnReference, checked_tags, checked_words, encode_words, word_columns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from regraft.task.source import SourceTable
    from regraft.task.split import Integers, Targets
    from regraft.task.types.view import ModelPredictions, View

logger = logging.getLogger(__name__)

MetricName = Literal["span_f1", "token_accuracy"]
SchemeName = Literal["IOB1", "IOB2", "BILOU", "IOBES"]
WITHOUT_SPANS = "without spans"
"""The name of the stratum of examples without spans."""


class TokenClassification(Task):
    """A task of tagging the words of sentences, by which spans of words are marked and typed.

    Args:
        words: The column of lists of words; in CoNLL files, the number of a column, counted from 0.
        tags: The column of lists of tags, one per word; in CoNLL files, the number of a column, which may count from -1
            for the last. None for unlabelled data, which requires `labels` and restricts the methods to those that read
            no labels.
        labels: The tags in the order of the outputs, in `output_scheme`; by default, the class names of the data set if
            it has the same scheme, else `O` and all tags of the types in train, sorted by type.
        scheme: The tagging scheme of the data; by default, it is inferred from the tags of train.
        output_scheme: The tagging scheme of the model's outputs, to which tags are converted.
        metric: The name of the metric that is reported.
        shots: The number of training sentences to keep for each type of span, among the sentences of which it is the
            rarest type, and of sentences without spans; dev is limited to as many. By default, all are kept.
    """

    peft_task_type: ClassVar[str] = "TOKEN_CLS"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    pipeline_tag: ClassVar[str] = "token-classification"
    metrics: ClassVar[tuple[Metric, ...]] = (SPAN_F1, TOKEN_ACCURACY)
    problem_types: ClassVar[tuple[str | None, ...]] = ANY_PROBLEM_TYPE
    likelihood: ClassVar[Likelihood] = CATEGORICAL
    guess: ClassVar[str] = "the most frequent tag for every word"
    digest_keys: ClassVar[tuple[str, ...]] = ("output_scheme",)

    type: Literal["token-classification"] = "token-classification"
    words: ColumnReference = Field(
        description="the column that holds the list of words; in CoNLL files, its number from 0"
    )
    tags: ColumnReference | None = Field(
        description="the column that holds the list of tags (in CoNLL files, its number, such as -1 for the last), or "
        "null where there are none"
    )
    scheme: SchemeName | None = Field(default=None, description=f"one of {', '.join(SCHEMES)}, or leave it out")
    output_scheme: SchemeName = Field(default="IOB2", description=f"one of {', '.join(SCHEMES)}")
    labels: tuple[str, ...] | None = Field(
        default=None, validate_default=True, description="a list of tags, each of them text"
    )
    metric: MetricName = Field(default="span_f1", description=f"one of {', '.join(get_args(MetricName))}")
    shots: int | None = Field(default=None, ge=1, description="a whole number of sentences per type of span, 1 or more")

    @property
    def tagging_scheme(self) -> Scheme:
        """The tagging scheme of the model's outputs."""
        return SCHEMES[self.output_scheme]

    @classmethod
    def keys_for_columns(cls, columns: Sequence[str]) -> dict[str, str] | None:
        """Read columns of words and of tags by their usual names; see `Task.keys_for_columns`."""
        return word_columns(columns)

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The column of words."""
        return (self.words,)

    @property
    def target_columns(self) -> tuple[str, ...]:
        """The column of tags; empty for unlabelled data."""
        return () if self.tags is None else (self.tags,)

    def bind_metric(self, metric: Metric, labels: Sequence[str]) -> Metric:
        """Return span F1 for tags as indices of labels; see `Task.bind_metric`."""
        return span_f1(self.tagging_scheme, labels) if metric is SPAN_F1 else metric

    def read(self, tables: Mapping[str, SourceTable]) -> tuple[tuple[str, ...], dict[str, Split]]:
        """Convert the tags of the data to those of the outputs; see `Task.read`."""
        words = {split: checked_words(table, self.words) for split, table in tables.items()}
        if self.tags is None:
            labels = self.labels or ()
            tags = {split: [[OUTSIDE] * len(sentence) for sentence in words[split]] for split in tables}
        else:
            read_tags = {split: checked_tags(table, self.tags, words[split]) for split, table in tables.items()}
            scheme = SCHEMES[self.scheme] if self.scheme else detect_scheme(read_tags["train"])
            tags = {
                split: self._convert(table, words[split], read_tags[split], scheme) for split, table in tables.items()
            }
            labels = self.labels or self._default_labels(tables["train"], tags["train"], scheme)
        splits = {
            split: self._split(split, table, words[split], tags[split], labels) for split, table in tables.items()
        }
        return labels, splits

    def encode(self, split: Split, tokenizer: PreTrainedTokenizerBase, pad: int, max_length: int) -> Examples:
        """Tokenise words, with one row per word, at its first token; see `Task.encode`.

        A warning names the number of words that are cut off, which count as predicted `O`.
        """
        import numpy as np

        columns, tokens, words, num_cut_words = encode_words(split, tokenizer, max_length)
        if num_cut_words:
            num_words = sum(len(sentence) for sentence in split.inputs)
            _warn_of_cut_words(split.source, split.name, num_cut_words, num_words, max_length)
        targets = [target[word] for target, indices in zip(split.targets, words, strict=True) for word in indices]
        padding = {name: pad if name == "input_ids" else 0 for name in columns}  # 0 is the first token type
        return Examples(columns, np.array(targets, dtype=np.int64), padding, tokens, words)

    def count_words(self, inputs: Sequence[str]) -> int:
        """Count the words of a sentence; see `Task.count_words`."""
        return len(inputs)

    def strata(self, targets: Targets, labels: Sequence[str]) -> tuple[Integers, list[str]]:
        """Divide sentences by the type of their spans that the fewest sentences have; see `Task.strata`."""
        import numpy as np

        types = types_of(labels)
        label_types = [split_tag(label)[1] if label != OUTSIDE else None for label in labels]
        types_by_sentence = [{label_types[tag] for tag in set(target)} - {None} for target in targets]
        frequency = Counter(span_type for sentence_types in types_by_sentence for span_type in sentence_types)
        strata = [
            min((frequency[name], index) for index, name in enumerate(types) if name in sentence_types)[1]
            if sentence_types
            else len(types)
            for sentence_types in types_by_sentence
        ]
        return np.array(strata, dtype=np.int64), [*(name or "span" for name in types), WITHOUT_SPANS]

    def sample_counts(self, size: int, stratum_sizes: Sequence[int]) -> list[int]:
        """Return the size, or all sentences of a stratum that has fewer; see `Task.sample_counts`."""
        return [min(size, stratum_size) for stratum_size in stratum_sizes]

    def chance_prediction(self, targets: Targets, labels: Sequence[str]) -> int:
        """Return the most frequent tag, the first of equally frequent ones; see `Task.chance_prediction`."""
        import numpy as np

        return int(np.bincount(np.concatenate(list(targets)), minlength=len(labels)).argmax())

    def constant_predictions(self, prediction: Any, inputs: Sequence[Any]) -> list[Any]:
        """Repeat a tag for each word; see `Task.constant_predictions`."""
        return [[prediction] * len(words) for words in inputs]

    def predictions_of_examples(
        self, row_predictions: Sequence[Any], split: Split, examples: Examples, labels: Sequence[str]
    ) -> list[Any]:
        """Return the tags of all words, `O` for words without a row; see `Task.predictions_of_examples`."""
        outside = labels.index(OUTSIDE)
        remaining = iter(row_predictions)
        predictions = []
        for sentence, indices in zip(split.inputs, examples.words or (), strict=True):
            tags = [outside] * len(sentence)
            for index in indices:
                tags[index] = next(remaining)
            predictions.append(tags)
        return predictions

    def confidence_of_examples(self, row_confidence: Sequence[float], examples: Examples) -> list[float]:
        """Return the products of the probabilities of words; see `Task.confidence_of_examples`."""
        remaining = iter(row_confidence)
        return [math.prod(next(remaining) for _ in indices) for indices in examples.words or ()]

    def relabel(self, targets: Targets, output_by_label: Sequence[int]) -> Targets:
        """Replace tag indices by output indices; see `Task.relabel`."""
        return object_array([[output_by_label[tag] for tag in target] for target in targets])

    def describe(self, target: Any, labels: Sequence[str]) -> str:
        """Return the tags of words in spans, each with the word's number from 1; see `Task.describe`."""
        named = [f"{number}:{labels[tag]}" for number, tag in enumerate(target, start=1) if labels[tag] != OUTSIDE]
        return " ".join(named) or OUTSIDE

    def as_targets(self, predictions: Sequence[Any]) -> Targets:
        """Return the predicted tags; see `Task.as_targets`."""
        return object_array(predictions)

    def right(self, targets: Targets, predictions: Sequence[Any]) -> list[bool]:
        """Return for each sentence whether all tags are right; see `Task.right`."""
        return [list(target) == list(tags) for target, tags in zip(targets, predictions, strict=True)]

    def linear_probe(self) -> Any:
        """Return a logistic regression, which is fitted to words; see `Task.linear_probe`."""
        return class_probe()

    def comparison_views(
        self, targets: Targets, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return F1 by type, and the calibration of whole sentences; see `Task.comparison_views`."""
        return compare_taggers(targets, old, new, labels, self.tagging_scheme)

    def flip_views(
        self, split: Split, old: ModelPredictions, new: ModelPredictions, labels: Sequence[str]
    ) -> tuple[View, ...]:
        """Return sentences whose words have their true and their predicted tags; see `Task.flip_views`."""
        return show_flips(split, old, new, labels)

    def example_views(self, split: Split, labels: Sequence[str]) -> tuple[View, ...]:
        """Return the numbers of spans by type, and sentences with their spans marked; see `Task.example_views`."""
        return show_examples(split, labels, self.tagging_scheme)

    def as_text(self, inputs: Sequence[str]) -> str:
        """Return the words, separated by spaces; see `Task.as_text`."""
        return " ".join(inputs)

    def as_inputs(self, text: str) -> tuple[str, ...]:
        """Divide a text into words at whitespace; see `Task.as_inputs`."""
        return tuple(text.split())

    def target_weakness(self, targets: Targets) -> str | None:
        """Report examples whose words all have the same tag; see `Task.target_weakness`."""
        if len({tag for target in targets for tag in target}) > 1:
            return None
        return "words of a single tag, on which always predicting that tag is perfect (and span_f1 is 0 without spans)"

    def _convert(
        self, table: SourceTable, words: Sequence[Sequence[str]], tags: Sequence[list[str]], scheme: Scheme
    ) -> list[list[str]]:
        """Convert the tags of a table to the scheme of the outputs; refuse tags that are invalid in their scheme."""
        origin = "as `scheme` says" if self.scheme else "as the tags of train suggest"
        converted = []
        for row, sentence, sentence_tags in zip(table.row_numbers, words, tags, strict=True):
            index = scheme.invalid_word(sentence_tags)
            if index is not None:
                before = f"after {sentence_tags[index - 1]!r}" if index else "at the start"
                raise DataError(
                    f"{table.source}, row {row}, word {index + 1} ({sentence[index]!r:.60}): the tag "
                    f"{sentence_tags[index]!r:.60} {before} is not valid in the scheme {scheme.name}, {origin}. "
                    f"Correct the tags, or name their scheme: {', '.join(SCHEMES)}."
                )
            converted.append(self.tagging_scheme.tags(scheme.spans(sentence_tags), len(sentence)))
        return converted

    def _default_labels(self, table: SourceTable, tags: Sequence[Sequence[str]], scheme: Scheme) -> tuple[str, ...]:
        """Return the class names of a data set that has the outputs' scheme, else `O` and all tags of each type."""
        classes = table.classes.get(self.tags or "", ())
        if scheme is self.tagging_scheme and OUTSIDE in classes and all(map(scheme.is_tag, classes)):
            return classes
        types = sorted(types_of(tag for sentence in tags for tag in sentence))
        if not types:
            raise DataError(
                f"{table.source}: every word has the tag {OUTSIDE!r}, so there is nothing to learn. Check that "
                f"{self.tags!r} is the column of tags."
            )
        return (OUTSIDE, *(tag for span_type in types for tag in self.tagging_scheme.tags_of_type(span_type)))

    def _split(
        self,
        split: str,
        table: SourceTable,
        words: list[tuple[str, ...]],
        tags: Sequence[Sequence[str]],
        labels: Sequence[str],
    ) -> Split:
        """Encode the tags of a split as indices; refuse rows with an unknown tag."""
        import numpy as np

        indices = {label: index for index, label in enumerate(labels)}
        for row, sentence_tags in zip(table.row_numbers, tags, strict=True):
            unknown = [tag for tag in sentence_tags if tag not in indices]
            if unknown:
                origin = "the listed labels" if self.labels else "the tags of the types in train"
                raise DataError(
                    f"{table.source}, row {row}: the tag {unknown[0]!r} (in the scheme {self.output_scheme}) is not "
                    f"among {origin}: {format_names(labels)}. List all tags under `labels`, or correct the row."
                )
        targets = object_array([[indices[tag] for tag in sentence_tags] for sentence_tags in tags])
        return Split(split, table.source, words, targets, np.array(table.row_numbers, dtype=np.int64))

    @field_validator("tags")
    @classmethod
    def _refuse_column_of_words(cls, tags: str | None, validation: ValidationInfo) -> str | None:
        if tags is not None and tags == validation.data.get("words"):
            raise ValueError(f"names {tags!r}, which is already the column of words. Use the column of tags.")
        return tags

    @field_validator("labels")
    @classmethod
    def _validate_labels(cls, labels: tuple[str, ...] | None, validation: ValidationInfo) -> tuple[str, ...] | None:
        """Refuse missing labels of unlabelled data, repeated labels, labels of another scheme, and a missing `O`."""
        if labels is None:
            if "tags" in validation.data and validation.data["tags"] is None:
                raise ValueError("is required if there is no column of tags. List the tags of the old head.")
            return None
        repeated = sorted(name for name, count in Counter(labels).items() if count > 1)
        if repeated:
            raise ValueError(f"lists {format_names(repeated)} more than once. List each tag once.")
        scheme = SCHEMES[validation.data.get("output_scheme", "IOB2")]
        invalid = [label for label in labels if not scheme.is_tag(label)]
        if invalid:
            raise ValueError(
                f"lists {format_names(invalid)}, no tags of {scheme.name}. If a head has tags of another scheme, name "
                "it under `output_scheme`."
            )
        if OUTSIDE not in labels or len(labels) < 2:
            raise ValueError(f"must list {OUTSIDE!r}, the tag of words outside of spans, and one tag or more.")
        return labels


@functools.cache
def _warn_of_cut_words(source: str, split: str, num_cut_words: int, num_words: int, max_length: int) -> None:
    """Log the number of words that are cut off, once for each split and length."""
    logger.warning(
        "%s: %s of %s words of %s lie beyond %s tokens; they count as predicted O. Raise max_length, or divide long "
        "sentences.",
        source,
        f"{num_cut_words:,}",
        f"{num_words:,}",
        split,
        f"{max_length:,}",
    )


TASK = TokenClassification
