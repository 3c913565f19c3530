"""Metrics of models that predict a number per example."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.task.metric import Evaluation, Metric, sum_metric

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from regraft.task.metric import Floats
    from regraft.task.split import Integers

ROUNDING = 1e-12
"""The share of a sum of squares below which a variance is rounding error: thousands of times float64's precision."""
RANK_ARRAYS = 8
"""The number of arrays, resamples × examples, that are in memory at once for ranks: two models' and their parts."""


def _moments(targets: Floats, predictions: Floats) -> csr_array:
    """Return the moments of a correlation, examples × 6: 1, x, y, x², y² and xy.

    x and y are differences to the medians, so that few digits cancel later, and equal numbers are exactly 0.
    """
    import numpy as np
    from scipy.sparse import csr_array

    x, y = targets - np.median(targets), predictions - np.median(predictions)
    return csr_array(np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1))


def _pearson(sums: Floats) -> Floats:
    """Return the correlation from sums of `_moments`, resamples × 6."""
    import numpy as np

    count, x, y, xx, yy, xy = sums.T
    x_variance, y_variance = xx - x * x / count, yy - y * y / count
    is_constant = (x_variance <= ROUNDING * xx) | (y_variance <= ROUNDING * yy)  # False for NaN, which stays NaN
    scale = np.sqrt(np.where(is_constant, 1, x_variance)) * np.sqrt(np.where(is_constant, 1, y_variance))
    return np.where(is_constant, 0.0, (xy - x * y / count) / scale)


def _paired_moments(targets: Floats, predictions: Floats) -> csr_array:
    """Return the moments of a concordance, examples × 6: as `_moments`, with both numbers less the targets' median."""
    import numpy as np
    from scipy.sparse import csr_array

    x, y = targets - np.median(targets), predictions - np.median(targets)
    return csr_array(np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1))


def _concordance(sums: Floats) -> Floats:
    """Return 1 − mean squared difference ÷ its expectation for independent x and y, from sums of `_paired_moments`."""
    import numpy as np

    count, x, y, xx, yy, xy = sums.T
    expected = (xx + yy) / count - 2 * x * y / count**2
    difference = (xx + yy - 2 * xy) / count
    # equal constants agree by definition, different ones do not
    return np.where(expected > 0, 1 - difference / np.where(expected > 0, expected, 1), 1.0)


def _evaluate_ranks(targets: Floats, predictions: Floats) -> Evaluation:
    """Return an evaluation that ranks each resample anew, equal numbers by the mean of their ranks; NaN has no rank."""
    import numpy as np

    factor = np.nan if np.isnan(targets).any() or np.isnan(predictions).any() else 1.0
    codes = [np.unique(numbers, return_inverse=True)[1] for numbers in (targets, predictions)]

    def scores(counts: Floats | None) -> Floats:
        weights = np.ones((1, len(targets))) if counts is None else counts
        x, y = (_centred_ranks(weights, code) for code in codes)
        covariance, x_variance, y_variance = ((weights * product).sum(axis=1) for product in (x * y, x * x, y * y))
        is_defined = (x_variance > 0) & (y_variance > 0)
        scale = np.sqrt(np.where(is_defined, x_variance, 1)) * np.sqrt(np.where(is_defined, y_variance, 1))
        return factor * np.where(is_defined, covariance / scale, 0.0)

    return Evaluation(RANK_ARRAYS * len(targets), scores)


def _centred_ranks(counts: Floats, codes: Integers) -> Floats:
    """Return the rank of each example in each resample, less the mean rank.

    Args:
        counts: The count of each example in each resample, resamples × examples.
        codes: For each example, the index of its number among the distinct numbers in ascending order.

    Returns:
        Ranks, resamples × examples.
    """
    import numpy as np
    from scipy.sparse import csr_array

    examples = np.arange(len(codes))
    indicator = csr_array((np.ones(len(codes)), (examples, codes)), shape=(len(codes), int(codes.max()) + 1))
    frequencies = (indicator.T @ counts.T).T
    ranks = np.cumsum(frequencies, axis=1) - frequencies / 2  # less ½, which centring would subtract
    return np.asarray(ranks[:, codes] - counts.sum(axis=1, keepdims=True) / 2)


def _squared_errors(targets: Floats, predictions: Floats) -> csr_array:
    """Return the statistics of the error, examples × 2: its square, and 1 for every example."""
    import numpy as np
    from scipy.sparse import csr_array

    return csr_array(np.stack([(targets - predictions) ** 2, np.ones(len(targets))], axis=1))


def _root_mean(sums: Floats) -> Floats:
    """Return the root of the mean from sums of `_squared_errors`, resamples × 2."""
    import numpy as np

    return np.asarray(np.sqrt(sums[:, 0] / sums[:, 1]))


PEARSON = sum_metric("pearson", _moments, _pearson)
"""Pearson's correlation, from −1 to 1; 0 if all targets or all predictions are equal."""
SPEARMAN = Metric("spearman", _evaluate_ranks)
"""Spearman's correlation, which is Pearson's of the ranks; 0 if all targets or all predictions are equal."""
CONCORDANCE = sum_metric("concordance", _paired_moments, _concordance)
"""Lin's concordance correlation coefficient (1989, Biometrics 45), from −1 to 1: 1 if the numbers are equal, while a
correlation is also 1 if they are linearly related."""
RMSE = sum_metric("rmse", _squared_errors, _root_mean, higher_is_better=False, is_bounded=False)
"""The root of the mean squared error, in the unit of the targets."""
