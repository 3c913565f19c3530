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
        pairs: A pair per task other than the job's. By regression `OLD=NEW`, the folders of the adaptations to the old
            and to the new base; by distillation `OLD=TASK`, the folder of the adaptation to the old base and the task
            file.
        rank: The rank d of the map; by regression at most one less than the number of pairs.
        fit: `regression` of new weights on old ones, for any kind and size; or `distill`, with the old models as
            teachers on their tasks, for LoRAs and bottleneck adapters.
        residual: Whether the map predicts the change, u ≈ v + P(v): of full rank, and close to `direct` with a strong
            ridge, few pairs or few steps. If not, u ≈ P(v) as in the paper: of rank d.
        intercept: By regression: whether the map has an intercept b, the mean over the pairs. As the ridge grows, a
            residual map without b tends to `direct`, and a residual map with b to `direct` plus the mean change.
        ridge: By regression: λ, in units of the mean square of the (centred) old weights.
        steps: By distillation: the number of optimiser steps.
        learning_rate: By distillation: about how far a step of Adam moves a mapped weight; it decays to 0.

    Raises:
        RecipeError: `fit` is unknown, `rank` or `steps` is below 1, `ridge` is negative, infinite or NaN, or
            `learning_rate` is not above 0, infinite or NaN.
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
