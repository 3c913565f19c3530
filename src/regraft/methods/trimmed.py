"""`trimmed`: the old delta with fewer entries.

Source: the largest ones are kept as in TIES-Merging (Yadav et al., 2023, arXiv:2306.01708), or random ones, scaled up,
as in DARE (Yu et al., 2024, arXiv:2311.03099). Neither paper carries deltas to another base: this is a baseline.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import TYPE_CHECKING

from regraft.errors import RecipeError
from regraft.methods.method import Start

if TYPE_CHECKING:
    import torch

    from regraft.methods.job import Job


@dataclasses.dataclass(frozen=True)
class Trimming:
    """What is kept of a delta.

    Args:
        density: The share of each tensor's entries that is kept, above 0 and up to 1.
        drop: Keep random entries rather than the largest, divided by the density so that the expectation stays.

    Raises:
        RecipeError: The density is out of its range.
    """

    density: float = 0.7
    drop: bool = False

    def __post_init__(self) -> None:
        """Check the density."""
        if not 0 < self.density <= 1:
            raise RecipeError(f"density is above 0 and up to 1, found {self.density}.")


def graft_trimmed(job: Job, options: Trimming) -> None:
    """Trim every tensor's delta, and of a LoRA the dense delta, which is then brought back to its rank.

    Args:
        job: What and where.
        options: How much is kept.
    """
    import torch

    from regraft.weights import drop, trim

    def rule(name: str, delta: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        if not options.drop:
            return trim(delta, options.density)
        drawn = torch.Generator().manual_seed(zlib.crc32(f"{job.recipe.seed} {name}".encode()))  # whatever the order
        return drop(delta, options.density, drawn)

    job.graft_transformed(rule)


TRIMMED = Start("trimmed", graft_trimmed, Trimming, summary="keep the old delta's largest (or random) entries only")
