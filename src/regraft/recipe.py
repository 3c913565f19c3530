"""The hyperparameters of a training run, and the schedules and intervals that depend on them."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from regraft.checkpoint import Checkpoint

MIN_STEPS = 100
"""The fewest steps that epochs are converted to: three epochs of 32 few-shot examples would be 6 steps."""
MAX_EVALUATIONS = 12
"""The most evaluations by default: more find the best step more exactly, and take longer."""
NUM_SEEDS = 2**32
"""Seeds are below this number: transformers' `set_seed` seeds NumPy's legacy generator, which takes 32-bit seeds."""
MAX_BATCH_SIZE = 2**16
"""Above every batch size in use for tuning: a larger one is a mistake, and would run out of memory at once."""
MAX_EXAMPLES = 10**8
"""The largest product of steps and batch size: the order of the examples is an int64 array in memory, then 800 MB."""
ADDED = "added"
"""The key of the metadata of options that are recorded only if they are set; see `added_option`."""
PRECISIONS = ("auto", "bf16", "fp32")
"""The values of `Recipe.precision`."""
DECAY_SCHEDULES = ("none", "linear", "cosine")
"""The values of the option `decay` of methods: a weight of the loss stays as it is, or falls to 0 over the training."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of training, the same for all methods that are compared.

    The command line derives its flags from these fields, and their help from the descriptions below.

    Args:
        steps: Optimiser steps; by default as many as `epochs` takes, but at least 100.
        epochs: Passes over the training data, unless `steps` is set.
        batch_size: Examples per step; in pre-training, packed blocks.
        learning_rate: Peak learning rate; by default 5e-5 (full), 5e-4 (LoRA), 1e-4 (pre-training), … by kind.
        warmup: Fraction of the steps over which the learning rate rises to its peak.
        weight_decay: Weight decay of AdamW, applied to all tuned parameters except biases and norms.
        eval_every: Steps between evaluations; by default 1, 2 or 5 × 10ⁿ, for at most 12 evaluations after the start.
        save_every: Steps between the checkpoints from which an interrupted run resumes.
        seed: Seed of fresh heads and adapters, few-shot samples, the order of the data, dropout and masking.
        precision: `bf16` (autocast), `fp32`, or `auto`: bf16 on a CUDA GPU or a processor with bf16 arithmetic, else
            fp32.
        micro_batch_size: Examples per pass through the model, a divisor of the batch size whose gradients are summed to
            that of the whole batch; by default the batch size. Fewer take less memory.
        activation_checkpointing: Recompute activations in the backward pass, which takes less memory and a third more
            time.
        average: Fraction of the steps after which the evaluated weights are averaged, as one more candidate for the
            best weights (stochastic weight averaging, Izmailov et al. 2018, arXiv:1803.05407); 0 for no average.

    Raises:
        RecipeError: `warmup` or `average` is not from 0 to below 1, `weight_decay` is negative, `seed` is not from 0 to
            2³² − 1, `precision` is unknown, another number is not above 0, a number is infinite or NaN, the batch size
            is above `MAX_BATCH_SIZE`, or `steps` × `batch_size` is above `MAX_EXAMPLES`.
    """

    steps: int | None = None
    epochs: float = 3.0  # epochs and batch size: BERT's fine-tuning ranges (Devlin et al. 2019, appendix A.3)
    batch_size: int = 16
    learning_rate: float | None = None
    warmup: float = 0.06  # as RoBERTa is fine-tuned on GLUE (Liu et al. 2019, table 10)
    weight_decay: float = 0.01  # BERT's (Devlin et al. 2019, appendix A.2)
    eval_every: int | None = None
    save_every: int = 200  # fewer lose less to an interruption; a checkpoint is up to three times the model's size
    seed: int = 20  # arbitrary
    precision: str = "auto"
    average: float = 0.0
    micro_batch_size: int | None = None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and an unknown precision."""
        for name in ("steps", "epochs", "batch_size", "micro_batch_size", "learning_rate", "eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"{name} must be a number above 0, found {value}.")
        if self.batch_size > MAX_BATCH_SIZE:
            raise RecipeError(f"batch_size must be at most {MAX_BATCH_SIZE:,}, found {self.batch_size:,}.")
        if self.batch_size % self.num_micro_batch_examples:
            raise RecipeError(
                f"micro_batch_size must divide the batch size, {self.batch_size:,}; found {self.micro_batch_size:,}."
            )
        if self.steps:
            self._check_examples(self.steps)
        if not 0 <= self.weight_decay < math.inf:
            raise RecipeError(f"weight_decay must be a finite number, 0 or more, found {self.weight_decay}.")
        if not 0 <= self.seed < NUM_SEEDS:
            raise RecipeError(f"seed must be from 0 to {NUM_SEEDS - 1:,}, found {self.seed:,}.")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"warmup must be a fraction of the steps, from 0 to below 1, found {self.warmup}.")
        if not 0 <= self.average < 1:
            raise RecipeError(f"average must be a fraction of the steps, from 0 to below 1, found {self.average}.")
        if self.precision not in PRECISIONS:
            raise RecipeError(f"precision must be one of {', '.join(PRECISIONS)}, found {self.precision!r}.")

    def resolve(self, num_examples: int, learning_rate: float) -> Recipe:
        """Set the fields that depend on the data, the kind of training and the device.

        Args:
            num_examples: The number of training examples.
            learning_rate: The learning rate to set if the recipe has none.

        Returns:
            The recipe with `steps`, `learning_rate`, `eval_every` and `precision` set.

        Raises:
            RecipeError: Steps × batch size is above `MAX_EXAMPLES`.
        """
        steps = self.steps or max(MIN_STEPS, round(self.epochs * num_examples / self.batch_size))
        self._check_examples(steps)
        return dataclasses.replace(
            self,
            steps=steps,
            learning_rate=self.learning_rate or learning_rate,
            eval_every=min(steps, self.eval_every or _round_interval(steps)),
            precision=self.resolve_precision(),
        )

    @property
    def num_steps(self) -> int:
        """The number of optimiser steps of a resolved recipe."""
        assert self.steps is not None  # `resolve` sets it
        return self.steps

    @property
    def num_micro_batch_examples(self) -> int:
        """The number of examples per pass through the model."""
        return self.micro_batch_size or self.batch_size

    def record(self) -> dict[str, Any]:
        """Return the fields as outcomes record them: those that earlier versions lacked only if they are set."""
        fields = dataclasses.asdict(self)
        added = {"micro_batch_size": None, "activation_checkpointing": False}
        return {name: value for name, value in fields.items() if name not in added or value != added[name]}

    def resolve_precision(self) -> str:
        """Return `bf16` or `fp32`: the recipe's precision, or for `auto` the one that suits the device."""
        return preferred_precision() if self.precision == "auto" else self.precision

    def _check_examples(self, steps: int) -> None:
        """Refuse more steps than the order of examples has room for."""
        if steps * self.batch_size > MAX_EXAMPLES:
            raise RecipeError(
                f"{steps:,} steps of {self.batch_size:,} examples are more than the {MAX_EXAMPLES:,} examples whose "
                "order is held in memory. Lower --steps or --epochs."
            )


def check_trained(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse to publish weights if training has diverged.

    Args:
        checkpoint: The saved weights.
        recipe: The recipe of the training, whose learning rate the error message names.

    Raises:
        RecipeError: A weight is infinite or NaN.
    """
    from regraft.checkpoint import check_finite

    try:
        check_finite(checkpoint)
    except CheckpointError as error:
        raise RecipeError(
            "the training ended in weights that are infinite or NaN. Lower the learning rate "
            f"({recipe.learning_rate}), or train in fp32."
        ) from error


def added_option(default: Any) -> Any:
    """Declare a field of a method's options that versions before lacked, so that it is recorded only if it is set.

    Args:
        default: The default, with which the method does what it did without the option.
    """
    return dataclasses.field(default=default, metadata={ADDED: True})


def check_decay_schedule(option: str, schedule: str) -> None:
    """Refuse an unknown decay schedule.

    Args:
        option: The option's name, for the error message.
        schedule: The option's value.

    Raises:
        RecipeError: The value is not in `DECAY_SCHEDULES`.
    """
    if schedule not in DECAY_SCHEDULES:
        raise RecipeError(f"{option} must be one of {', '.join(DECAY_SCHEDULES)}, found {schedule!r}.")


def decay_factor(schedule: str, step: int, steps: int) -> float:
    """Compute the factor by which a decay schedule scales a weight of the loss at a step.

    Args:
        schedule: `none` (constant), `linear` or `cosine`.
        step: The number of completed steps.
        steps: The number of steps of the training.

    Returns:
        A factor that falls from 1 at step 0 to 0 after the last step; always 1 for `none`.
    """
    if schedule == "none":
        return 1.0
    progress = step / steps
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def preferred_precision() -> str:
    """Return the precision in which the device computes fastest without a loss of range.

    Returns:
        `bf16` on a CUDA GPU, or without any accelerator on a processor, if it has bfloat16 arithmetic; else `fp32`.
    """
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if torch.accelerator.is_available():
        return "fp32"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    # versions of torch without `get_capabilities` have this private function
    if not capabilities and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has_bf16 else "fp32"


def _round_interval(steps: int) -> int:
    """Return the smallest interval of 1, 2 or 5 × 10ⁿ steps with at most `MAX_EVALUATIONS` evaluations."""
    scale = 1
    while steps > MAX_EVALUATIONS * 5 * scale:
        scale *= 10
    return next(digit * scale for digit in (1, 2, 5) if steps <= MAX_EVALUATIONS * digit * scale)


def best_step(curve: Sequence[Mapping[str, float]], merit: Callable[[float], float]) -> int:
    """Return the first step with the best score.

    Args:
        curve: A learning curve, whose entries have `step` and `score`.
        merit: A function of a score that is higher for a better score.

    Returns:
        The number of completed steps.
    """
    return int(max(curve, key=lambda point: (merit(point["score"]), -point["step"]))["step"])
