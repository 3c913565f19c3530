"""Metrics of predictions that are one class an example."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.task.metric import sum_metric

if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_array

    Classes = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]


def _hits(true: Classes, predicted: Classes) -> csr_array:
    """Return 1 where a prediction is right, and 1 for each example."""
    import numpy as np
    from scipy.sparse import csr_array

    return csr_array(np.stack([true == predicted, np.ones(len(true), dtype=bool)], axis=1).astype(np.float64))


def _accuracy(sums: Floats) -> Floats:
    import numpy as np

    right, total = sums.T
    return np.asarray(right / total)


def _by_class(true: Classes, predicted: Classes) -> csr_array:
    """Return three ones an example: at its class if it is predicted, at its class, and at the predicted class."""
    import numpy as np
    from scipy.sparse import csr_array

    present, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    of_class, guessed = np.split(codes, 2)
    examples, hits = np.arange(len(true)), np.flatnonzero(true == predicted)
    rows = np.concatenate([hits, examples, examples])
    columns = np.concatenate([of_class[hits], len(present) + of_class, 2 * len(present) + guessed])
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(true), 3 * len(present)))


def _macro_f1(sums: Floats) -> Floats:
    import numpy as np

    hits, of_class, guessed = np.split(sums, 3, axis=1)
    is_present = (of_class + guessed) > 0
    f1 = np.divide(2 * hits, of_class + guessed, out=np.zeros_like(hits), where=is_present)
    return np.asarray(f1.sum(axis=1) / is_present.sum(axis=1))


def _mcc(sums: Floats) -> Floats:
    import numpy as np

    hits, of_class, guessed = np.split(sums, 3, axis=1)
    right, total = hits.sum(axis=1), of_class.sum(axis=1)
    covariance = right * total - (of_class * guessed).sum(axis=1)
    spread = (total**2 - (of_class**2).sum(axis=1)) * (total**2 - (guessed**2).sum(axis=1))
    return np.asarray(np.divide(covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=spread > 0))


ACCURACY = sum_metric("accuracy", _hits, _accuracy)
MACRO_F1 = sum_metric("macro_f1", _by_class, _macro_f1)
"""The mean F1 of the classes that are a target or a prediction of some example."""
MCC = sum_metric("mcc", _by_class, _mcc)
"""Matthews' correlation coefficient, from −1 to 1; 0 where all targets or all predictions are one class."""
