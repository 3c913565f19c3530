"""The options of `project`."""

from __future__ import annotations

import dataclasses
import math

from regraft.errors import RecipeError

FITS = ("regression", "distill")
"""The values of `Projection.fit`."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """Options of `project`: the pairs that the map is learned from, and the options of the map.

    Args:
        pairs: A pair per other task. By regression `OLD=NEW`, the folders of the adaptations to the old and to the new
            base; by distillation `OLD=TASK`, the folder of the adaptation to the old base and the task file.
        rank: The rank d of the map; by regression, it is limited to the number of pairs, or to one less with an
            intercept.
        fit: `regression` of new weights on old ones, for any kind and size; or `distill`, with the old models as
            teachers on their tasks, for LoRAs and bottleneck adapters.
        residual: Whether the map predicts the change of the weights: new ≈ v + P(v), which has full rank and stays
            close to `direct` if the ridge is strong or pairs or steps are few. If not, new ≈ P(v), of rank d, as in the
            paper.
        intercept: By regression: whether the map has the constant b. As the ridge grows, a residual map without b tends
            to `direct`, and a residual map with b to `direct` plus the mean change of the pairs.
        ridge: By regression: the strength of the penalty that shrinks the map, in units of the mean squared norm of the
            pairs' old weights, which are centred if the map has an intercept.
        steps: By distillation: the number of optimiser steps.
        learning_rate: By distillation: about how far a first step of Adam moves a mapped weight; the rate decays to 0.

    Raises:
        RecipeError: `fit` is unknown, `rank` or `steps` is below 1, `ridge` is negative, infinite or NaN, or
            `learning_rate` is not above 0, or is infinite or NaN.
    """

    pairs: tuple[str, ...] = ()
    rank: int = 16  # higher fits the pairs better; by distillation, memory grows with it
    fit: str = "regression"
    residual: bool = True
    intercept: bool = True
    ridge: float = 1.0  # higher shrinks the map, lower fits the pairs better
    steps: int = 200  # more fit the teachers better, and take longer
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        """Refuse an unknown fit, a rank or steps below 1, and a ridge or learning rate out of range."""
        if self.fit not in FITS:
            raise RecipeError(f"fit must be {' or '.join(FITS)}, found {self.fit!r}.")
        for name in ("rank", "steps"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, found {getattr(self, name)}.")
        if not (0 <= self.ridge < math.inf and 0 < self.learning_rate < math.inf):
            raise RecipeError(
                f"ridge must be a number from 0 up (found {self.ridge}), learning_rate above 0 ({self.learning_rate})."
            )
