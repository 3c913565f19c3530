"""Metrics of taggers, whose targets and predictions are one tag per word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.task.metric import Metric, sum_metric
from regraft.task.types.tagging import SCHEMES, Scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scipy.sparse import csr_array

    from regraft.task.metric import Floats, Targets


def span_f1(scheme: Scheme = SCHEMES["IOB2"], labels: Sequence[str] | None = None) -> Metric:
    """Build the metric of span F1: micro F1 over spans, as in seqeval's strict mode.

    Args:
        scheme: The tagging scheme of targets and predictions.
        labels: The names of tags, if targets and predictions have indices of them; None if they have the names.
    """

    def count_spans(targets: Targets, predictions: Targets) -> csr_array:
        """Return examples × 3 counts: of spans in both, in the target, and in the prediction."""
        import numpy as np
        from scipy.sparse import csr_array

        counts = np.zeros((len(targets), 3))
        for i, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
            true_spans, predicted_spans = (set(scheme.spans(tag_names(tags, labels))) for tags in (target, prediction))
            counts[i] = len(true_spans & predicted_spans), len(true_spans), len(predicted_spans)
        return csr_array(counts)

    return sum_metric("span_f1", count_spans, _f1)


def tag_names(tags: Sequence[Any], labels: Sequence[str] | None) -> list[str]:
    """Return the names of the tags of an example.

    Args:
        tags: The tag of each word.
        labels: The names of tags, if `tags` are indices; None if they are names.
    """
    return list(tags) if labels is None else [labels[tag] for tag in tags]


def _f1(sums: Floats) -> Floats:
    """Return 2·hits / (targets + predictions), 0 without any spans, from sums of span counts, resamples × 3."""
    import numpy as np

    hits, targets, predictions = sums.T
    spans = targets + predictions
    return np.asarray(np.divide(2 * hits, spans, out=np.zeros_like(hits), where=spans > 0))


def _count_hits(targets: Targets, predictions: Targets) -> csr_array:
    """Return the statistics of token accuracy, examples × 2: the numbers of words with the right tag, and of words."""
    import numpy as np
    from scipy.sparse import csr_array

    counts = [
        (sum(true == predicted for true, predicted in zip(target, prediction, strict=True)), len(target))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return csr_array(np.array(counts, dtype=np.float64))


def _accuracy(sums: Floats) -> Floats:
    """Return the share of words with the right tag from sums of `_count_hits`, resamples × 2."""
    import numpy as np

    hits, words = sums.T
    return np.asarray(np.divide(hits, words, out=np.zeros_like(hits), where=words > 0))


SPAN_F1 = span_f1()
"""Span F1 of tag names in IOB2; a task's `bind_metric` adapts it to the task's scheme and tag indices."""
TOKEN_ACCURACY = sum_metric("token_accuracy", _count_hits, _accuracy)
"""The share of words with the right tag."""
