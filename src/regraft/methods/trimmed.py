"""`trimmed`: the old delta with fewer entries.

Source: the largest entries as in TIES-Merging (Yadav et al., 2023, arXiv:2306.01708), or random ones, rescaled, as in
DARE (Yu et al., 2024, arXiv:2311.03099). Neither paper moves deltas to another base: this is a baseline.
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
    """Options of `trimmed`: which entries of a delta are kept.

    Args:
        density: The share of each tensor's entries to keep, above 0 and up to 1.
        drop: Whether to keep random entries, divided by the density to preserve the expectation, rather than the
            largest.

    Raises:
        RecipeError: `density` is not above 0 and at most 1.
    """

    density: float = 0.7  # higher keeps more of the old tuning, lower is further from `direct`
    drop: bool = False

    def __post_init__(self) -> None:
        """Refuse a density that is not above 0 and at most 1."""
        if not 0 < self.density <= 1:
            raise RecipeError(f"density must be above 0 and at most 1, found {self.density}.")


def graft_trimmed(job: Job, options: Trimming) -> None:
    """Trim the delta of every tensor that the upgrade changed.

    For a LoRA, the dense delta is trimmed, and then compressed to the LoRA's rank.

    Args:
        job: The job, with an adaptation that has deltas.
        options: The share of entries to keep, and whether they are the largest or random ones.

    Raises:
        KindError: The adaptation's kind has no deltas.
    """
    import torch

    from regraft.weights import drop, trim

    def rule(name: str, delta: torch.Tensor, _shift: torch.Tensor) -> torch.Tensor:
        if not options.drop:
            return trim(delta, options.density)
        # each tensor has a generator, so that the order of tensors does not matter
        generator = torch.Generator().manual_seed(zlib.crc32(f"{job.recipe.seed} {name}".encode()))
        return drop(delta, options.density, generator)

    job.graft_transformed(rule)


TRIMMED = Start("trimmed", graft_trimmed, Trimming, summary="keep the old delta's largest (or random) entries only")
