"""Metrics of generated answers, and of the probability that a language model gives to reference answers.

A target is the reference answer, as a text or as an assistant turn with tool calls; None if an example has none. A
prediction is a mapping with the keys `answer` (the generated text), `loss` (the sum of −log p over the labelled tokens,
in nats), `correct` (how many labelled tokens are the most probable ones) and `labels` (the number of labelled tokens),
or a text alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError, MismatchError, RecipeError
from regraft.task.metric import Metric, sum_metric
from regraft.task.types import answer_texts
from regraft.task.types.answer_texts import NGRAM_ORDER, RECALL_WEIGHT, as_text
from regraft.task.types.user_function import call_function, load_function

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Iterable, Sequence

    from scipy.sparse import csr_array

    from regraft.task.metric import Floats, Targets

    Compare = Callable[[Any, Any], float]

LOSS_TOLERANCE = 0.02
"""How much of the loss may be lost by default, in nats per token: 2 % of perplexity, whatever the loss of chance."""


@dataclasses.dataclass(frozen=True)
class AnswerMetric(Metric):
    """A metric of generated answers.

    Args:
        compare: A function that returns the score, 0–1, of a generated answer (second argument) by its reference; None
            if the metric reads the probabilities of the reference's tokens, so that no answers need be generated.
        is_graded: Whether `compare` may return values between 0 and 1.
    """

    compare: Compare | None = None
    is_graded: bool = False

    @property
    def needs_answers(self) -> bool:
        """Whether the metric needs generated answers."""
        return self.compare is not None


def values(metric: AnswerMetric, targets: Sequence[Any], predictions: Sequence[Any]) -> list[float | None]:
    """Score each example by itself.

    Args:
        metric: The metric.
        targets: One reference answer per example, None for examples without one.
        predictions: One prediction per example.

    Returns:
        One score per example; None for an example without a reference or without labelled tokens.

    Raises:
        MismatchError: A prediction lacks what the metric reads.
    """
    if metric.compare is None:
        sums = [_token_sums(metric.name, index, prediction) for index, prediction in enumerate(predictions)]
        return [total / labels if labels else None for total, labels in sums]
    pairs = answer_pairs(targets, predictions)
    return [None if pair is None else float(metric.compare(*pair)) for pair in pairs]


def right(
    metric: AnswerMetric, targets: Sequence[Any], predictions: Sequence[Any], right_at: float = 0.5
) -> list[bool | None]:
    """Return whether each answer is right.

    Args:
        metric: The metric; that of `loss` or `token_accuracy` does not tell right answers from wrong ones.
        targets: One reference answer per example, None for examples without one.
        predictions: One prediction per example.
        right_at: The least score of a right answer by a graded metric; others need 1.

    Returns:
        One truth value per example; None without a reference or by a metric that does not tell.

    Raises:
        MismatchError: A prediction has no generated answer.
    """
    if not metric.needs_answers:
        return [None] * len(targets)
    least = right_at if metric.is_graded else 1.0
    return [None if value is None else value >= least for value in values(metric, targets, predictions)]


def answer_pairs(targets: Iterable[Any], predictions: Iterable[Any]) -> list[tuple[Any, Any] | None]:
    """Pair the reference answers with the generated ones.

    Args:
        targets: One reference answer per example, None for examples without one.
        predictions: One prediction per example.

    Returns:
        The reference and the generated answer of each example; None for an example without a reference.

    Raises:
        MismatchError: The prediction of an example with a reference has no generated answer.
    """
    pairs: list[tuple[Any, Any] | None] = []
    for index, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
        answer = prediction.get("answer") if isinstance(prediction, Mapping) else prediction
        if target is not None and answer is None:
            raise MismatchError(
                f"predictions[{index}]: there is no generated answer. Generate the answers before they are scored, or "
                "choose the metric 'loss', which needs none."
            )
        pairs.append(None if target is None else (target, answer))
    return pairs


def _token_sums(name: str, index: int, prediction: Any) -> tuple[float, int]:
    """Return the sum of the losses, or the number of correct tokens, and the number of labelled tokens."""
    key = {"loss": "loss", "token_accuracy": "correct"}[name]
    if not isinstance(prediction, Mapping):
        raise RecipeError(
            f"predictions[{index}]: the metric {name!r} reads the probabilities of tokens, found {prediction!r:.60}. "
            f"Compare texts by one of {', '.join(metric.name for metric in ANSWER_METRICS if metric.needs_answers)}."
        )
    labels, total = prediction.get("labels") or 0, prediction.get(key)
    if labels and total is None:
        raise MismatchError(
            f"predictions[{index}]: the value {key!r} of its {labels} labelled tokens is missing. Run the model on the "
            f"reference answers, or choose a metric of generated answers."
        )
    return (float(total or 0.0), labels) if labels else (0.0, 0)


def _token_metric(name: str, **settings: Any) -> AnswerMetric:
    """Build a metric that is a mean over labelled tokens."""

    def statistics(_targets: Targets, predictions: Targets) -> csr_array:
        import numpy as np
        from scipy.sparse import csr_array

        sums = [_token_sums(name, index, prediction) for index, prediction in enumerate(predictions)]
        if not any(labels for _, labels in sums):
            raise DataError(f"no example has a labelled token to compute the metric {name!r} of. Check the examples.")
        return csr_array(np.array(sums, dtype=np.float64))

    return AnswerMetric(name, sum_metric(name, statistics, _mean).evaluate, **settings)


def _mean_metric(name: str, compare: Compare, *, is_graded: bool = False) -> AnswerMetric:
    """Build a metric that is the mean of a comparison of each answer with its reference."""

    def statistics(targets: Targets, predictions: Targets) -> csr_array:
        import numpy as np
        from scipy.sparse import csr_array

        pairs = _scored_pairs(name, targets, predictions)
        sums = [(0.0, 0) if pair is None else (float(compare(*pair)), 1) for pair in pairs]
        return csr_array(np.array(sums, dtype=np.float64))

    return AnswerMetric(name, sum_metric(name, statistics, _mean).evaluate, compare=compare, is_graded=is_graded)


def _scored_pairs(name: str, targets: Targets, predictions: Targets) -> list[tuple[Any, Any] | None]:
    """Pair references with answers; see `answer_pairs`. At least one example must have a reference."""
    pairs = answer_pairs(targets, predictions)
    if all(pair is None for pair in pairs):
        raise DataError(
            f"no example has a reference answer, which the metric {name!r} compares answers with. Add some."
        )
    return pairs


def _mean(sums: Floats) -> Floats:
    """Return the mean from sums and counts, resamples × 2; 0 for a resample without counts."""
    import numpy as np

    total, count = sums.T
    return np.asarray(np.divide(total, count, out=np.zeros_like(total), where=count > 0))


def _ngram_counts(targets: Targets, predictions: Targets) -> csr_array:
    """Return the counts of chrF, examples × (3·orders + 1); see `count_ngrams`."""
    import numpy as np
    from scipy.sparse import csr_array

    pairs = _scored_pairs("chrf", targets, predictions)
    counts = [
        [0] * (3 * NGRAM_ORDER + 1) if pair is None else answer_texts.count_ngrams(as_text(pair[0]), as_text(pair[1]))
        for pair in pairs
    ]
    return csr_array(np.array(counts, dtype=np.float64))


def _chrf(sums: Floats) -> Floats:
    """Return chrF from sums of `_ngram_counts`: Fβ of the mean precision and recall of the orders that both have.

    Source: Popović, 2015, "chrF: character n-gram F-score for automatic MT evaluation"; as in sacrebleu. Without any
    characters in either, answers equal references, and the score is 1.
    """
    import numpy as np

    answer, reference, common = np.moveaxis(sums[:, :-1].reshape(len(sums), NGRAM_ORDER, 3), 2, 0)
    is_effective = (answer > 0) & (reference > 0)
    orders = np.maximum(is_effective.sum(axis=1), 1)
    precision, recall = (
        np.divide(common, total, out=np.zeros_like(common), where=is_effective).sum(axis=1) / orders
        for total in (answer, reference)
    )
    weight = RECALL_WEIGHT**2
    divisor = weight * precision + recall
    score = np.divide((1 + weight) * precision * recall, divisor, out=np.zeros_like(divisor), where=divisor > 0)
    return np.where(sums.any(axis=1), score, 1.0)


def _sentence_chrf(reference: Any, answer: Any) -> float:
    """Return the chrF of one answer."""
    import numpy as np

    counts = answer_texts.count_ngrams(as_text(reference), as_text(answer))
    return float(_chrf(np.array([counts], dtype=np.float64))[0])


def _exact_match(reference: Any, answer: Any, pattern: re.Pattern[str] | None = None) -> bool:
    """Return whether two answers are equal once normalised, or the parts of them that a pattern extracts."""
    texts: list[str | None] = [as_text(reference), as_text(answer)]
    if pattern is not None:
        texts = [answer_texts.extract(text, pattern) for text in texts if text is not None]
    expected, generated = (None if text is None else answer_texts.normalise(text) for text in texts)
    return expected is not None and expected == generated


def _on_texts(compare: Callable[[str, str], float]) -> Compare:
    """Return a comparison of answers by their texts."""
    return lambda reference, answer: compare(as_text(reference), as_text(answer))


def bind_pattern(metric: Metric, pattern: str | None) -> Metric:
    """Adapt exact match to the pattern of a task; other metrics read whole answers and are returned as they are.

    Args:
        metric: A metric.
        pattern: A regular expression that extracts the answer from a text, see `answer_texts.extract`; a text without a
            match is wrong. None to compare whole texts.

    Raises:
        DataError: The pattern is not a regular expression.
    """
    if metric.name != EXACT_MATCH.name or pattern is None:
        return metric
    compiled = answer_texts.compile_pattern(pattern)
    return _mean_metric(metric.name, functools.partial(_exact_match, pattern=compiled))


def find_answer_metric(name: str) -> AnswerMetric:
    """Look up a metric of answers by its name.

    Args:
        name: The name of one of `ANSWER_METRICS`, or `MODULE:FUNCTION` for a function of a user's own.

    Raises:
        DataError: There is no such metric, or the function cannot be loaded.
    """
    metrics = {metric.name: metric for metric in ANSWER_METRICS}
    if name in metrics:
        return metrics[name]
    if ":" not in name:
        raise DataError(
            f"metric {name!r}: there is no such metric. Use one of {', '.join(metrics)}, or module:function for a "
            "function of your own that returns the score, 0–1, of (reference, answer)."
        )
    load_function(name)
    return function_metric(name)


def function_metric(name: str) -> AnswerMetric:
    """Build the metric of a user's own function, which is loaded once it is called.

    Args:
        name: `MODULE:FUNCTION`; the function returns the score, a number in 0–1 or a truth value, of a reference
            answer and a generated answer, both of them texts. Its values are graded.
    """
    return _mean_metric(name, _on_texts(functools.partial(call_function, name)), is_graded=True)


LOSS = _token_metric("loss", higher_is_better=False, is_bounded=False, tolerance=LOSS_TOLERANCE)
"""The mean of −log p over the labelled tokens of all examples, in nats per token."""
TOKEN_ACCURACY = _token_metric("token_accuracy")
"""The share of labelled tokens that are the most probable ones."""
EXACT_MATCH = _mean_metric("exact_match", _exact_match)
"""The share of answers that equal the reference once normalised; `bind_pattern` compares parts of them."""
TOKEN_F1 = _mean_metric("token_f1", _on_texts(answer_texts.token_f1), is_graded=True)
"""The mean F1 of words, as of SQuAD."""
ROUGE_L = _mean_metric("rouge_l", _on_texts(answer_texts.rouge_l), is_graded=True)
"""The mean ROUGE-L."""
CHRF = AnswerMetric("chrf", sum_metric("chrf", _ngram_counts, _chrf).evaluate, compare=_sentence_chrf, is_graded=True)
"""chrF2 of the whole corpus, 0–1; of a single example, that of its own n-grams."""
JSON_MATCH = _mean_metric("json_match", answer_texts.json_match)
"""The share of answers that parse as JSON to the value of the reference."""
ANSWER_METRICS = (LOSS, TOKEN_ACCURACY, EXACT_MATCH, TOKEN_F1, ROUGE_L, CHRF, JSON_MATCH)
"""The metrics by name; users may add functions of their own, see `find_answer_metric`."""
