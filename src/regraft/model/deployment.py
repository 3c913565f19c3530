"""A model at work: what it says of a task's examples, and whether it belongs to the task at all."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation import check_type, fresh_model
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

PROBED = 32


class Deployment:
    """A model on its base, and what it says of a task's examples; each split is encoded and run once.

    Args:
        model: The model; it is moved to the device.
        base: The base it lives on, for its tokenizer.
        data: The task, its labels in the order of the model's outputs.
        precision: What to compute in, `bf16` or `fp32`.
        progress: Told of each batch.
    """

    def __init__(self, model: Any, base: Base, data: TaskData, precision: str, progress: Progress = silent):
        self.model, self.base, self.data = model.to(device()), base, data
        self.precision, self.progress = precision, progress
        self._examples: dict[Split, Examples] = {}
        self._outputs: dict[Split, torch.Tensor] = {}

    def clear_outputs(self) -> None:
        """Forget all outputs, as the model's weights have changed."""
        self._outputs.clear()

    def examples(self, split: Split) -> Examples:
        """Return a split in the base's tokens.

        Args:
            split: Some of the task's examples.
        """
        if split not in self._examples:
            self._examples[split] = encode(self.base, self.data, split)
        return self._examples[split]

    def outputs(self, split: Split) -> torch.Tensor:
        """Compute the model's logits.

        Args:
            split: Some of the task's examples.

        Returns:
            rows × outputs, in float32 on the CPU, in the order of the examples.

        Raises:
            MismatchError: The head has other outputs than the task has labels.
        """
        if split not in self._outputs:
            outputs = predict(self.model, self.examples(split), self.precision, self.progress)
            if outputs.shape[1] != self.data.head.num_outputs:
                raise MismatchError(
                    f"the head has {outputs.shape[1]} outputs, task {self.data.name!r} {self.data.head}. Give the task "
                    "that the models were tuned for."
                )
            self._outputs[split] = outputs
        return self._outputs[split]

    def is_finite(self, split: Split) -> bool:
        """Whether all outputs on a split are numbers."""
        return bool(self.outputs(split).isfinite().all())

    def signal(self, split: Split) -> Signal:
        """Return what a student learns from this model.

        Args:
            split: Some of the task's examples.
        """
        return self.data.likelihood.signal(self.outputs(split))

    def predictions(self, split: Split) -> list[Any]:
        """Return the prediction for each example.

        Args:
            split: Some of the task's examples.
        """
        predictions: list[Any] = self.data.likelihood.predict(self.outputs(split)).tolist()
        return predictions

    def confidence(self, split: Split) -> list[float] | None:
        """Return how probable each prediction is by the model itself; None where the task's outputs do not say so.

        Args:
            split: Some of the task's examples.
        """
        confidence = self.data.likelihood.confidence(self.outputs(split))
        return None if confidence is None else confidence.tolist()

    def losses(self, split: Split) -> torch.Tensor:
        """Compute the loss of each row in nats, in float64.

        Args:
            split: Some of the task's examples.
        """
        return self.data.likelihood.loss(self.outputs(split).double(), self._targets(split))

    def loss(self, split: Split) -> float:
        """Compute the mean loss of the rows in nats.

        Args:
            split: Some of the task's examples.
        """
        return float(self.data.likelihood.loss(self.outputs(split), self._targets(split), "mean"))

    def score(self, split: Split) -> float:
        """Score the predictions by the task's metric.

        Args:
            split: Some of the task's examples.
        """
        return score(self.data.task.scoring, split.targets, self.predictions(split))

    def right(self, split: Split) -> list[bool]:
        """Say which predictions are right.

        Args:
            split: Some of the task's examples.
        """
        return self.data.task.right(split.targets, self.predictions(split))

    def similarity_to(self, split: Split, signal: Signal) -> tuple[float, float]:
        """Measure how near the model comes to what another one says.

        Args:
            split: Some of the task's examples.
            signal: The other one's, of the same examples.

        Returns:
            The mean overlap of their distributions, 1 − their total variation distance (if both are certain, on how
            many rows they agree); and the mean of KL(other ‖ this one) in nats.
        """
        likelihood, outputs = self.data.likelihood, self.outputs(split)
        divergence = likelihood.divergence_terms(outputs, signal).sum() / len(outputs)
        return float(likelihood.overlap(outputs, signal).mean()), float(divergence)

    def _targets(self, split: Split) -> torch.Tensor:
        import torch

        return torch.as_tensor(self.examples(split).targets)


def match_labels(adaptation: Adaptation, data: TaskData) -> TaskData:
    """Put a task's labels into the order of an adaptation's head.

    Args:
        adaptation: The old weights.
        data: The task's examples.

    Returns:
        The same examples, their labels in the order of the head's outputs.

    Raises:
        MismatchError: The label names are not the same, or it is for another type of task.
    """
    check_type(adaptation, data.task)
    if not data.labels:
        return data
    if adaptation.labels is None:
        logger.warning(
            "%s does not name its labels: that its head has them in the order %s is unproven.",
            adaptation.path,
            ", ".join(data.labels[:8]),
        )
        return data
    try:
        return data.relabel(adaptation.labels)
    except MismatchError as error:
        raise MismatchError(f"{adaptation.path} was not tuned for the labels of task {data.name}: {error}") from error


def check_effect(model: Any, adaptation: Adaptation, base: Base, data: TaskData) -> float:
    """Prove on real text that an adaptation that was loaded does something.

    Args:
        model: The adaptation on its base.
        adaptation: What was loaded.
        base: The base it was tuned on.
        data: The texts.

    Returns:
        The change of what the head reads, relative to its norm on the base alone.

    Raises:
        MismatchError: An adapter changes nothing, or what comes out are no numbers.
    """
    import torch

    split = data.train.take(range(min(PROBED, len(data.train))))
    examples = encode(base, data, split)

    def read(classifier: Any) -> torch.Tensor:
        rows: list[torch.Tensor] = []

        def keep(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
            fed = output.hidden[-1][output.example, output.token].float().cpu()
            rows.append(fed if output.logits.isfinite().all() else torch.full_like(fed, torch.nan))

        for_each_batch(classifier.to(device()), examples, "fp32", keep, hidden=True)
        return torch.cat(rows)

    bare = fresh_model(base, data.head, 0)
    bare.config.pad_token_id = model.config.pad_token_id  # so that both are read at the same tokens
    plain, adapted = read(bare), read(model)
    effect = float((adapted - plain).norm() / plain.norm())
    if not math.isfinite(effect):
        raise MismatchError(
            f"{adaptation.path}: loaded wholly, and what it gives on {base.path} are no numbers: some of its values "
            "are infinite or not a number (regraft weights inspect --check-finite names them)."
        )
    if not effect:
        adaptation.family.report_no_effect(adaptation, base, len(split))
    return effect
