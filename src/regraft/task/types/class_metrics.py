"""Metrics of classifiers that predict one class per example, or a set of labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.task.metric import sum_metric

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from regraft.task.metric import Floats
    from regraft.task.split import Integers


def _hits(targets: Integers, predictions: Integers) -> csr_array:
    """Return the statistics of accuracy, examples × 2: 1 if the prediction is right, and 1 for every example."""
    import numpy as np
    from scipy.sparse import csr_array

    is_right = targets == predictions
    return csr_array(np.stack([is_right, np.ones(len(targets), dtype=bool)], axis=1).astype(np.float64))


def _accuracy(sums: Floats) -> Floats:
    """Return the share of right predictions from sums of `_hits`, resamples × 2."""
    import numpy as np

    right, total = sums.T
    return np.asarray(right / total)


def _class_counts(targets: Integers, predictions: Integers) -> csr_array:
    """Return confusion counts, examples × 3·classes: true positives, then targets, then predictions.

    Targets and predictions are classes, or sets of labels as 0 and 1, examples × labels.
    """
    import numpy as np
    from scipy.sparse import csr_array

    if targets.ndim == 2:
        return csr_array(np.concatenate([targets & predictions, targets, predictions], axis=1).astype(np.float64))
    classes, codes = np.unique(np.concatenate([targets, predictions]), return_inverse=True)
    target_codes, predicted_codes = np.split(codes, 2)
    examples = np.arange(len(targets))
    hits = np.flatnonzero(targets == predictions)
    row_indices = np.concatenate([hits, examples, examples])
    column_indices = np.concatenate(
        [target_codes[hits], len(classes) + target_codes, 2 * len(classes) + predicted_codes]
    )
    shape = (len(targets), 3 * len(classes))
    return csr_array((np.ones(len(row_indices)), (row_indices, column_indices)), shape=shape)


def _macro_f1(sums: Floats) -> Floats:
    """Return the mean F1 over classes from sums of `_class_counts`, resamples × 3·classes."""
    import numpy as np

    hits, targets, predictions = np.split(sums, 3, axis=1)
    is_present = (targets + predictions) > 0
    f1 = np.divide(2 * hits, targets + predictions, out=np.zeros_like(hits), where=is_present)
    return np.asarray(f1.sum(axis=1) / np.maximum(is_present.sum(axis=1), 1))  # sets may all be empty


def _label_pair_counts(targets: Integers, predictions: Integers) -> csr_array:
    """Return the numbers of labels, examples × 3: true positives, targets and predictions."""
    import numpy as np
    from scipy.sparse import csr_array

    counts = [(targets & predictions).sum(axis=1), targets.sum(axis=1), predictions.sum(axis=1)]
    return csr_array(np.stack(counts, axis=1).astype(np.float64))


def _equal_sets(targets: Integers, predictions: Integers) -> csr_array:
    """Return the statistics of subset accuracy, examples × 2: 1 if the sets are equal, and 1 for every example."""
    import numpy as np

    are_equal = (targets == predictions).all(axis=1)
    return _hits(are_equal, np.ones_like(are_equal))


def _mcc(sums: Floats) -> Floats:
    """Return the multiclass correlation from sums of `_class_counts`, resamples × 3·classes."""
    import numpy as np

    hits, targets, predictions = np.split(sums, 3, axis=1)
    right = hits.sum(axis=1)
    total = targets.sum(axis=1)
    covariance = right * total - (targets * predictions).sum(axis=1)
    variances = (total**2 - (targets**2).sum(axis=1)) * (total**2 - (predictions**2).sum(axis=1))
    return np.asarray(np.divide(covariance, np.sqrt(variances), out=np.zeros_like(covariance), where=variances > 0))


ACCURACY = sum_metric("accuracy", _hits, _accuracy)
"""The share of predictions that are right."""
MACRO_F1 = sum_metric("macro_f1", _class_counts, _macro_f1)
"""The mean F1 over the classes that are a target or a prediction of some example; 0 if there are none."""
MICRO_F1 = sum_metric("micro_f1", _label_pair_counts, _macro_f1)
"""F1 over all pairs of an example and a label, as if they were one class; 0 if no label is a target or predicted."""
SUBSET_ACCURACY = sum_metric("subset_accuracy", _equal_sets, _accuracy)
"""The share of examples whose predicted labels are exactly the true ones."""
MCC = sum_metric("mcc", _class_counts, _mcc)
"""Matthews' correlation coefficient, from −1 to 1; 0 if all targets or all predictions are one class."""
