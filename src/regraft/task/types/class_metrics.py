"""Metrics of classifiers that predict one class per example."""

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
    """Return confusion counts, examples × 3·classes: true positives, then targets, then predictions."""
    import numpy as np
    from scipy.sparse import csr_array

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
    return np.asarray(f1.sum(axis=1) / is_present.sum(axis=1))


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
"""The mean F1 over the classes that are the target or the prediction of some example."""
MCC = sum_metric("mcc", _class_counts, _mcc)
"""Matthews' correlation coefficient, from −1 to 1; 0 if all targets or all predictions are one class."""
