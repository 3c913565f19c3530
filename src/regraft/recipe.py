"""How something is trained: the few numbers that decide it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from regraft.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from regraft.checkpoint import Checkpoint

FEWEST_STEPS = 100
"""Where the steps follow from the data: a few examples a class are seen many times over."""
NUM_SEEDS = 2**32
"""How many seeds there are: NumPy's generator takes no larger ones."""
LARGEST_BATCH = 2**16
"""Far above any batch that a language model is tuned with; a larger one is a slip, and ends in memory."""
MOST_EXAMPLES = 10**8
"""Steps times batch size: the order of the examples is held in memory, 8 bytes each."""
FADES = ("none", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained; the same for every method that is compared.

    Args:
        steps: Optimiser steps; None for `epochs` times the data, and at least 100.
        epochs: Passes over the data where `steps` is not given.
        batch_size: Examples (or packed blocks) a step.
        learning_rate: The peak of the linear schedule; None for 5e-5 (full), 5e-4 (LoRA), 1e-4 (pre-training).
        warmup: The fraction of steps over which the rate rises to its peak.
        weight_decay: AdamW's, on matrices only.
        eval_every: Steps between evaluations; None for about ten in all.
        save_every: Steps between the checkpoints an interrupted run goes on from.
        seed: Fixes fresh heads, the order of the data, dropout and masking.
        precision: `bf16` (autocast), `fp32`, or `auto`: bf16 where the device computes in it.
        average: Where above 0, the mean of the weights at the evaluations after this fraction of the steps is one more
            candidate for the best weights (stochastic weight averaging, Izmailov et al. 2018, arXiv:1803.05407).

    Raises:
        RecipeError: A number is out of its range.
    """

    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 16
    learning_rate: float | None = None
    warmup: float = 0.06
    weight_decay: float = 0.01
    eval_every: int | None = None
    save_every: int = 200
    seed: int = 20
    precision: str = "auto"
    average: float = 0.0

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("steps", "epochs", "batch_size", "learning_rate", "eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"{name} must be a number above 0, found {value}.")
        if self.batch_size > LARGEST_BATCH:
            raise RecipeError(f"batch_size is up to {LARGEST_BATCH:,}, found {self.batch_size:,}.")
        if self.steps:
            self._check_examples(self.steps)
        if not 0 <= self.weight_decay < math.inf:
            raise RecipeError(f"weight_decay must be a number that is not negative, found {self.weight_decay}.")
        if not 0 <= self.seed < NUM_SEEDS:
            raise RecipeError(f"a seed is from 0 to {NUM_SEEDS - 1:,}, found {self.seed:,}.")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"warmup is a fraction of the steps, from 0 to below 1, found {self.warmup}.")
        if not 0 <= self.average < 1:
            raise RecipeError(f"average is a fraction of the steps, from 0 to below 1, found {self.average}.")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise RecipeError(f"precision is auto, bf16 or fp32, found {self.precision!r}.")

    def resolve(self, examples: int, learning_rate: float) -> Recipe:
        """Fill in what depends on the data and the kind of training.

        Args:
            examples: How many examples there are.
            learning_rate: What to take where none is given.

        Returns:
            The recipe with `steps`, `learning_rate`, `eval_every` and `precision` set.

        Raises:
            RecipeError: Its steps see more examples than the order of which can be held in memory.
        """
        steps = self.steps or max(FEWEST_STEPS, round(self.epochs * examples / self.batch_size))
        self._check_examples(steps)
        return dataclasses.replace(
            self,
            steps=steps,
            learning_rate=self.learning_rate or learning_rate,
            eval_every=min(steps, self.eval_every or _round_interval(steps)),
            precision=precision() if self.precision == "auto" else self.precision,
        )

    def _check_examples(self, steps: int) -> None:
        if steps * self.batch_size > MOST_EXAMPLES:
            raise RecipeError(
                f"{steps:,} steps of {self.batch_size:,} examples see more than the {MOST_EXAMPLES:,} whose order is "
                "held in memory. Take fewer steps or epochs."
            )


def check_trained(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse to publish what a training that diverged has left.

    Args:
        checkpoint: The weights, as they were saved.
        recipe: How they were trained.

    Raises:
        RecipeError: Some are infinite or not a number.
    """
    from regraft.checkpoint import check_finite

    try:
        check_finite(checkpoint)
    except CheckpointError as error:
        raise RecipeError(
            "the training ended in weights that are infinite or not a number. Lower the learning rate "
            f"({recipe.learning_rate}), or train in fp32."
        ) from error


def check_fade(name: str, how: str) -> None:
    """Refuse a schedule that there is not.

    Args:
        name: What the option is called.
        how: Its value.

    Raises:
        RecipeError: It is none of `FADES`.
    """
    if how not in FADES:
        raise RecipeError(f"{name} is one of {', '.join(FADES)}, found {how!r}.")


def fade_factor(how: str, step: int, steps: int) -> float:
    """Return what is left, at a step, of a weight that falls from 1 to 0 over a training.

    Args:
        how: `none` (stays 1), `linear` or `cosine`.
        step: Steps done so far.
        steps: Steps in all.

    Returns:
        1 at first; 0 once all steps are done, unless it is `none`.
    """
    if how == "none":
        return 1.0
    done = step / steps
    return 1 - done if how == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def precision() -> str:
    """Return which precision the device computes fast in.

    Returns:
        `bf16` where the accelerator or the processor has bfloat16 arithmetic, else `fp32`.
    """
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if torch.accelerator.is_available():
        return "fp32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    if not capabilities and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        native = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


def _round_interval(steps: int) -> int:
    """Return a round number of steps that comes to between five and twelve evaluations."""
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if steps <= 12 * digit * scale:
                return digit * scale
        scale *= 10


def best_step(curve: Sequence[Mapping[str, float]], merit: Callable[[float], float]) -> int:
    """Return the first step of the best score.

    Args:
        curve: A learning curve.
        merit: Returns a number that is the larger the better a score is.
    """
    return int(max(curve, key=lambda point: (merit(point["score"]), -point["step"]))["step"])
