"""On-policy distillation: the student answers, and the old model scores the student's own tokens.

Source: Agarwal et al., 2023 (arXiv:2306.13649), with the reverse KL on whole distributions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError
from regraft.model.answers import answer_settings, encode_prompts, generate_answers
from regraft.model.device import autocast
from regraft.model.outputs import forward
from regraft.recipe import NUM_SEEDS
from regraft.task.types import Examples

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import nn

    from regraft.model import Deployment
    from regraft.task.split import Integers
    from regraft.tuning.trainer import Objective

STEP_SEEDS = 1_000_003
"""A prime that a training's seed is multiplied by, so that the steps of different seeds draw different answers."""


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """Options of `on-policy`.

    Args:
        temperature: The temperature that softens both models' outputs in the divergence; answers are always sampled at
            temperature 1, from the student's own distribution.
        max_new_tokens: The most tokens of a sampled answer; by default the task's.

    Raises:
        RecipeError: A number is not above 0.
    """

    temperature: float = 1.0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that are not above 0."""
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"temperature must be a finite number above 0, found {self.temperature}.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise RecipeError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}.")


def on_policy_objective(
    student: Deployment, teacher: Deployment, options: OnPolicy, student_ids: torch.Tensor | None, seed: int
) -> Objective:
    """Return the mean of KL(student ‖ teacher) over the tokens of answers that the student samples at each step.

    No gradient flows through the sampling, and the teacher never changes.

    Args:
        student: The student, for its base and its data; the objective gets its model.
        teacher: The old model, which stays on the device.
        options: The temperature, and the most tokens of an answer.
        student_ids: The student's id of each token of the teacher's vocabulary, −1 for none; None if they are equal.
        seed: The seed of the training; each step samples with a seed of its own, also after a resumption.

    Returns:
        A function of the student, a batch of `on_policy_batches` and the number of completed steps.
    """
    import torch

    data = student.data
    if options.max_new_tokens is not None:  # prompts leave room for them
        data = data.with_settings(max_new_tokens=options.max_new_tokens)
    prompts = encode_prompts(student.base, data, data.train)
    pad = student.base.pad_id
    teacher_ids = None
    if student_ids is not None:
        teacher_ids = {int(new): old for old, new in enumerate(student_ids.tolist()) if new >= 0}
    head = teacher.vocabulary_head()
    precision = student.precision

    def objective(model: nn.Module, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        drawn = [prompts[index] for index in batch["prompt"].tolist()]
        # the first prompt tells the parts of an accumulated batch apart
        sampling_seed = ((seed * STEP_SEEDS + step) * STEP_SEEDS + int(batch["prompt"][0])) % NUM_SEEDS
        settings = answer_settings(student.base, data, sampling_seed)
        answers = [_known(answer, teacher_ids) for answer in generate_answers(model, drawn, settings, precision)]
        device = batch["prompt"].device
        student_batch = _batch(drawn, answers, pad, device)
        output = forward(model, student_batch)
        with torch.no_grad(), autocast(precision, device):
            teacher_batch = _batch(_map(drawn, teacher_ids), _map(answers, teacher_ids), teacher.base.pad_id, device)
            teacher_output = forward(teacher.model, teacher_batch)
        signal = data.likelihood.cached_signal(
            {"states": teacher_output.logits.states}, head=head, student_ids=student_ids
        )
        return data.likelihood.mean_divergence(output.logits, signal, options.temperature, kind="reverse")

    return objective


def on_policy_batches(order: Integers) -> Callable[[Sequence[int]], dict[str, torch.Tensor]]:
    """Return the function that makes a batch of the indices of prompts.

    Args:
        order: The indices of the training examples, in the order of the training.
    """
    import torch

    return lambda positions: {"prompt": torch.as_tensor(order[list(positions)])}


def _known(answer: list[int], teacher_ids: dict[int, int] | None) -> list[int]:
    """Return an answer up to the first token that the teacher does not have."""
    if teacher_ids is None:
        return answer
    end = next((position for position, token in enumerate(answer) if token not in teacher_ids), len(answer))
    return answer[:end]


def _map(sequences: list[list[int]], teacher_ids: dict[int, int] | None) -> list[list[int]]:
    """Replace the student's ids by the teacher's."""
    if teacher_ids is None:
        return sequences
    return [[teacher_ids[token] for token in sequence] for sequence in sequences]


def _batch(prompts: list[list[int]], answers: list[list[int]], pad: int, device: Any) -> dict[str, torch.Tensor]:
    """Return a batch whose rows are the tokens of the answers."""
    import numpy as np

    ids = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = [
        list(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    targets = np.array([token for answer in answers for token in answer], dtype=np.int64)
    examples = Examples({"input_ids": ids}, targets, {"input_ids": pad}, tokens)
    return {name: tensor.to(device) for name, tensor in examples.batch(range(len(ids))).items()}
