"""Linear probes: estimators of scikit-learn that predict targets from a base's features."""

from __future__ import annotations

from typing import Any

INVERSE_REGULARISATION = 0.01
"""scikit-learn's `C`: strong regularisation, because a base has about as many features as a probe has rows, or more."""
MAX_ITERATIONS = 1000
"""The solver's largest number of iterations: ten times scikit-learn's default, so that it nearly always converges."""


def class_probe() -> Any:
    """Return an unfitted logistic regression, for one class per row."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=INVERSE_REGULARISATION, max_iter=MAX_ITERATIONS)


def label_set_probe() -> Any:
    """Return an unfitted logistic regression per label, constant for a label that all or no examples have."""
    import warnings

    from sklearn.multiclass import OneVsRestClassifier

    class Probe(OneVsRestClassifier):  # type: ignore[misc]
        def fit(self, features: Any, targets: Any) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Label .* is present in all training examples")
                return super().fit(features, targets)

    return Probe(class_probe())


def number_probe() -> Any:
    """Return an unfitted ridge regression, for a number per example; its penalty is as strong as for classes."""
    from sklearn.linear_model import Ridge

    return Ridge(alpha=1 / INVERSE_REGULARISATION)
