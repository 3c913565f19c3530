"""Deployments: a base with an adaptation at work on a task, and checks that the adaptation matches both."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation import check_task_type, fresh_model
from regraft.errors import MismatchError
from regraft.model.batches import for_each_batch, predict
from regraft.model.device import device
from regraft.model.examples import encode
from regraft.progress import Progress, silent
from regraft.task import score

if TYPE_CHECKING:
    import torch

    from regraft.adaptation import Adaptation
    from regraft.base import Base
    from regraft.model.outputs import Output
    from regraft.task import Split, TaskData
    from regraft.task.types import Examples, Signal

logger = logging.getLogger(__name__)

MAX_CHECKED_EXAMPLES = 32
"""The number of examples that `measure_effect` runs; any effect at all shows on far fewer."""


class Deployment:
    """A base with an adaptation, and its outputs for a task; each split is encoded and run once.

    Args:
        model: The model, which is moved to the device.
        base: Its base, for the tokenizer.
        data: The task, with labels in the order of the model's outputs.
        precision: `bf16` or `fp32`.
        progress: A callback for each batch.
    """

    def __init__(self, model: Any, base: Base, data: TaskData, precision: str, progress: Progress = silent):
        self.model = model.to(device())
        self.base = base
        self.data = data
        self.precision, self.progress = precision, progress
        self._examples: dict[Split, Examples] = {}
        self._outputs: dict[Split, torch.Tensor] = {}

    def clear_outputs(self) -> None:
        """Discard all outputs, after the model's weights have changed."""
        self._outputs.clear()

    def examples(self, split: Split) -> Examples:
        """Tokenise a split with the base's tokenizer.

        Args:
            split: A split of the task.
        """
        if split not in self._examples:
            self._examples[split] = encode(self.base, self.data, split)
        return self._examples[split]

    def outputs(self, split: Split) -> torch.Tensor:
        """Compute the model's logits.

        Args:
            split: A split of the task.

        Returns:
            The logits, rows × outputs, in float32 on the CPU, in the order of the examples.

        Raises:
            MismatchError: The head's number of outputs is not what the task needs.
        """
        if split not in self._outputs:
            outputs = predict(self.model, self.examples(split), self.precision, self.progress)
            if outputs.shape[1] != self.data.head.num_outputs:
                raise MismatchError(
                    f"the head has {outputs.shape[1]} outputs, task {self.data.name!r} {self.data.head}. Use the task "
                    "that the models were tuned for."
                )
            self._outputs[split] = outputs
        return self._outputs[split]

    def is_finite(self, split: Split) -> bool:
        """Return whether all outputs for a split are finite.

        Args:
            split: A split of the task.
        """
        return bool(self.outputs(split).isfinite().all())

    def signal(self, split: Split) -> Signal:
        """Return what a student learns from this model as its teacher.

        Args:
            split: A split of the task.
        """
        return self.data.likelihood.signal(self.outputs(split))

    def predictions(self, split: Split) -> list[Any]:
        """Return the prediction for each example.

        Args:
            split: A split of the task.
        """
        predictions: list[Any] = self.data.likelihood.predict(self.outputs(split)).tolist()
        return predictions

    def confidence(self, split: Split) -> list[float] | None:
        """Return the probability that the model gives to each prediction; None if its outputs do not tell.

        Args:
            split: A split of the task.
        """
        confidence = self.data.likelihood.confidence(self.outputs(split))
        return None if confidence is None else confidence.tolist()

    def losses(self, split: Split) -> torch.Tensor:
        """Compute the loss of each row in nats, in float64.

        Args:
            split: A split of the task.
        """
        return self.data.likelihood.loss(self.outputs(split).double(), self._targets(split))

    def loss(self, split: Split) -> float:
        """Compute the mean loss of the rows in nats.

        Args:
            split: A split of the task.
        """
        return float(self.data.likelihood.loss(self.outputs(split), self._targets(split), "mean"))

    def score(self, split: Split) -> float:
        """Score the predictions by the task's metric.

        Args:
            split: A split of the task.
        """
        return score(self.data.task.scoring, split.targets, self.predictions(split))

    def right(self, split: Split) -> list[bool]:
        """Return whether each prediction is right.

        Args:
            split: A split of the task.
        """
        return self.data.task.right(split.targets, self.predictions(split))

    def similarity_to(self, split: Split, signal: Signal) -> tuple[float, float]:
        """Measure how similar the model's distributions are to those of a teacher.

        Args:
            split: A split of the task.
            signal: The teacher's signal for the same examples.

        Returns:
            The mean over rows of 1 − the total variation distance (of certain models, the share of rows on which they
            agree), and of KL(teacher ‖ this model) in nats.
        """
        likelihood = self.data.likelihood
        outputs = self.outputs(split)
        divergence = likelihood.divergence_terms(outputs, signal).sum() / len(outputs)
        return float(likelihood.overlap(outputs, signal).mean()), float(divergence)

    def _targets(self, split: Split) -> torch.Tensor:
        import torch

        return torch.as_tensor(self.examples(split).targets)


def match_labels(adaptation: Adaptation, data: TaskData) -> TaskData:
    """Reorder a task's labels to match an adaptation's head.

    Args:
        adaptation: The adaptation.
        data: The task's data.

    Returns:
        The same examples, with labels in the order of the head's outputs.

    Raises:
        MismatchError: The head has other labels, or is for another task type.
    """
    check_task_type(adaptation, data.task)
    if not data.labels:
        return data
    if adaptation.labels is None:
        logger.warning(
            "%s does not name its labels: whether its head has them in the order %s cannot be checked.",
            adaptation.path,
            ", ".join(data.labels[:8]),
        )
        return data
    try:
        return data.relabel(adaptation.labels)
    except MismatchError as error:
        raise MismatchError(f"{adaptation.path} was not tuned for the labels of task {data.name}: {error}") from error


def measure_effect(model: Any, adaptation: Adaptation, base: Base, data: TaskData) -> float:
    """Check on real examples that a loaded adaptation changes what its base computes.

    Args:
        model: The adaptation on its base.
        adaptation: The adaptation that was loaded.
        base: The base that it was tuned on.
        data: The task's data, whose first training examples are used.

    Returns:
        The norm of the change of the states that the head reads, relative to the norm of these states in the base.

    Raises:
        MismatchError: The adaptation changes nothing, or its outputs are not finite.
    """
    import torch

    split = data.train.take(range(min(MAX_CHECKED_EXAMPLES, len(data.train))))
    examples = encode(base, data, split)

    def head_inputs(probed_model: Any) -> torch.Tensor:
        parts: list[torch.Tensor] = []

        def collect(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
            states = output.hidden[-1][output.example, output.token].float().cpu()
            parts.append(states if output.logits.isfinite().all() else torch.full_like(states, torch.nan))

        for_each_batch(probed_model.to(device()), examples, "fp32", collect, hidden=True)
        return torch.cat(parts)

    base_model = fresh_model(base, data.head, 0)
    base_model.config.pad_token_id = model.config.pad_token_id  # so that both heads read the same tokens
    base_states, adapted_states = head_inputs(base_model), head_inputs(model)
    effect = float((adapted_states - base_states).norm() / base_states.norm())
    if not math.isfinite(effect):
        raise MismatchError(
            f"{adaptation.path}: all tensors were loaded, but the outputs on {base.path} are not finite, because some "
            "weights are infinite or NaN. List them with `regraft weights inspect --check-finite`."
        )
    if not effect:
        adaptation.family.report_no_effect(adaptation, base, len(split))
    return effect
