"""The options of `project`: what its map is learned from, and how."""

from __future__ import annotations

import dataclasses
import math

from regraft.errors import RecipeError

FITS = ("regression", "distill")


@dataclasses.dataclass(frozen=True)
class Projection:
    """What the map is learned from, and how.

    Args:
        pairs: By regression, `OLD=NEW` for each other task: the folders of what was tuned on the old and on the new
            base. By distillation, `OLD=TASK`: the folder of what was tuned on the old base, and the task file.
        rank: The rank d of the map; by regression at most one less than there are pairs.
        fit: `regression` of new weights on old ones, of any kind and size; or `distill`, with the old tuned models as
            teachers on their tasks, for LoRAs and bottleneck adapters.
        residual: Whether the map is learned to what changes, u ≈ v + P(v): with a strong ridge, few pairs or few steps
            it is `direct`, and it has full rank with P. If not, u ≈ P(v), as in the paper: of rank d.
        intercept: By regression: whether the map has a b, the mean over the pairs. A residual map without one goes to
            `direct` as the ridge grows; with one, to `direct` and the mean change.
        ridge: By regression: λ in units of the mean square of the (centred) old weights.
        steps: By distillation: optimiser steps in all.
        learning_rate: By distillation: how far a step of Adam moves a weight of what is mapped, about; falling to 0.

    Raises:
        RecipeError: A value is out of its range.
    """

    pairs: tuple[str, ...] = ()
    rank: int = 16
    fit: str = "regression"
    residual: bool = True
    intercept: bool = True
    ridge: float = 1.0
    steps: int = 200
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        """Check every value."""
        if self.fit not in FITS:
            raise RecipeError(f"fit is {' or '.join(FITS)}, found {self.fit!r}.")
        for name in ("rank", "steps"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is at least 1, found {getattr(self, name)}.")
        if not 0 <= self.ridge < math.inf or not 0 < self.learning_rate < math.inf:
            raise RecipeError(f"ridge is 0 or more (found {self.ridge}), learning_rate above 0 ({self.learning_rate}).")
