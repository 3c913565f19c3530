"""Deployments: models with their outputs for a task, and checks that an adaptation fits its base and its task."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation import check_task_type, fresh_model
from regraft.errors import MAX_LISTED, MismatchError
from regraft.model.batches import for_each_batch, predict
from regraft.model.device import device
from regraft.model.examples import encode
from regraft.progress import Progress, silent
from regraft.task import score

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.adaptation import Adaptation
    from regraft.base import Base
    from regraft.model.outputs import Output
    from regraft.task import Split, TaskData
    from regraft.task.types import Examples, Signal

logger = logging.getLogger(__name__)

MAX_CHECKED_EXAMPLES = 32
"""The most examples that `measure_effect` runs; any effect at all shows on far fewer."""
HEAD_SEED = 0
"""The seed of the base's head in `measure_effect`, which compares the states before the heads."""


class Deployment:
    """A base with an adaptation, and its outputs for a task; the tokens and outputs of each split are stored.

    Args:
        model: The adaptation on its base, with a head for the task; it is moved to the device.
        base: The model's base, for its tokenizer.
        data: The task's data, with labels in the order of the model's outputs.
        precision: `bf16` or `fp32`.
        progress: Called after each batch.
    """

    def __init__(self, model: nn.Module, base: Base, data: TaskData, precision: str, progress: Progress = silent):
        self.model = model.to(device())
        self.base = base
        self.data = data
        self.precision = precision
        self.progress = progress
        self._examples: dict[Split, Examples] = {}
        self._outputs: dict[Split, torch.Tensor] = {}

    def clear_outputs(self) -> None:
        """Discard the outputs for all splits, after a change of the model's weights."""
        self._outputs.clear()

    def examples(self, split: Split) -> Examples:
        """Tokenise a split with the base's tokenizer; see `encode`."""
        if split not in self._examples:
            self._examples[split] = encode(self.base, self.data, split)
        return self._examples[split]

    def outputs(self, split: Split) -> torch.Tensor:
        """Compute the model's logits for a split.

        Returns:
            The logits, rows × outputs, in float32 on the CPU, in the order of the examples.

        Raises:
            MismatchError: The head's number of outputs differs from the task's.
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
        """Return whether no output for a split is infinite or NaN."""
        return bool(self.outputs(split).isfinite().all())

    def signal(self, split: Split) -> Signal:
        """Return the part of the outputs for a split that a student learns from, if this model is its teacher."""
        return self.data.likelihood.signal(self.outputs(split))

    def predictions(self, split: Split) -> list[Any]:
        """Return the prediction for each example of a split, in the form of the split's targets."""
        row_predictions = self.data.likelihood.predict(self.outputs(split)).tolist()
        return self.data.task.predictions_of_examples(row_predictions, split, self.examples(split), self.data.labels)

    def confidence(self, split: Split) -> list[float] | None:
        """Return the probability that the model gives to each prediction for a split.

        Returns:
            Probabilities, one per example; None if the likelihood gives all predictions the same probability.
        """
        confidence = self.data.likelihood.confidence(self.outputs(split))
        if confidence is None:
            return None
        return self.data.task.confidence_of_examples(confidence.tolist(), self.examples(split))

    def losses(self, split: Split) -> torch.Tensor:
        """Compute the loss of each row of a split in nats, in float64."""
        return self.data.likelihood.loss(self.outputs(split).double(), self._targets(split))

    def loss(self, split: Split) -> float:
        """Compute the mean loss of the rows of a split in nats."""
        return float(self.data.likelihood.loss(self.outputs(split), self._targets(split), "mean"))

    def score(self, split: Split) -> float:
        """Score the predictions for a split by the task's metric."""
        return score(self.data.scoring, split.targets, self.predictions(split))

    def right(self, split: Split) -> list[bool]:
        """Return for each target of a split whether the prediction is right."""
        return self.data.task.right(split.targets, self.predictions(split))

    def similarity_to(self, split: Split, signal: Signal) -> tuple[float, float]:
        """Measure the similarity of the model's distributions to a teacher's.

        Args:
            split: A split of the data.
            signal: The teacher's signal for the same split.

        Returns:
            Two means over rows. The first is the overlap, 1 − the total variation distance; for models that give all
            probability to one class, it is the share of rows on which they agree. The second is KL(teacher ‖ this
            model) in nats.
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
        adaptation: The adaptation; without recorded labels, the task's labels stay as they are, with a warning.
        data: The task's data.

    Returns:
        The same examples, with labels in the order of the head's outputs.

    Raises:
        MismatchError: The head has different labels, or is for a different task type.
    """
    check_task_type(adaptation, data.task)
    if not data.labels:
        return data
    if adaptation.labels is None:
        logger.warning(
            "%s does not name its labels: whether its head has them in the order %s%s cannot be checked.",
            adaptation.path,
            ", ".join(data.labels[:MAX_LISTED]),
            ", …" if len(data.labels) > MAX_LISTED else "",
        )
        return data
    try:
        return data.relabel(adaptation.labels)
    except MismatchError as error:
        raise MismatchError(f"{adaptation.path} was not tuned for the labels of task {data.name}: {error}") from error


def measure_effect(model: Any, adaptation: Adaptation, base: Base, data: TaskData) -> float:
    """Measure how much an adaptation changes the states that its head reads, and refuse an adapter without effect.

    Args:
        model: The adaptation on its base.
        adaptation: The adaptation that the model was loaded from.
        base: The base that the adaptation was tuned on.
        data: The task's data; the states are compared on its first `MAX_CHECKED_EXAMPLES` training examples.

    Returns:
        The norm of the states' change, relative to the norm of the base's states. It is 0 only for a full fine-tune,
        with a warning: tuning only the head is legitimate.

    Raises:
        MismatchError: An adapter changes nothing, or an output is infinite or NaN.
    """
    split = data.train.take(range(min(MAX_CHECKED_EXAMPLES, len(data.train))))
    examples = encode(base, data, split)
    base_model = fresh_model(base, data.head, HEAD_SEED)
    base_model.config.pad_token_id = model.config.pad_token_id  # so that both heads read the same tokens
    base_states = _head_inputs(base_model, examples)
    adapted_states = _head_inputs(model, examples)
    effect = float((adapted_states - base_states).norm() / base_states.norm())
    if not math.isfinite(effect):
        raise MismatchError(
            f"{adaptation.path}: all tensors were loaded, but outputs on {base.path} are infinite or NaN, probably "
            "because weights are. List these with `regraft weights inspect --check-finite`."
        )
    if not effect:
        adaptation.family.report_no_effect(adaptation, base, len(split))
    return effect


def _head_inputs(model: nn.Module, examples: Examples) -> torch.Tensor:
    """Return the states that a head reads, rows × width; NaN for batches with infinite or NaN logits."""
    import torch

    head_inputs: list[torch.Tensor] = []

    def collect(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        states = output.hidden[-1][output.example, output.token].float().cpu()
        head_inputs.append(states if output.logits.isfinite().all() else torch.full_like(states, torch.nan))

    for_each_batch(model.to(device()), examples, "fp32", collect, hidden=True)
    return torch.cat(head_inputs)
