"""Linear probing: predictions of a task's targets from a base's features, before any tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation import fresh_model
from regraft.model.batches import for_each_batch
from regraft.model.device import device
from regraft.model.examples import encode

if TYPE_CHECKING:
    import torch
    from torch import nn

    from regraft.base import Base
    from regraft.model.outputs import Output
    from regraft.task import Split, TaskData

MAX_TRAIN_EXAMPLES = 512
"""The most training examples of a probe: more of them cost time and hardly change its predictions."""
HEAD_SEED = 0
"""The seed of the model's head, which a probe does not read."""


def probe(base: Base, data: TaskData, precision: str) -> list[Any]:
    """Fit the task type's linear probe to a base's features of training examples, and predict the dev targets.

    Args:
        base: The base; an example's features are the mean of its last hidden states over tokens.
        data: The task's data; the probe is fitted to its first `MAX_TRAIN_EXAMPLES` training examples.
        precision: `bf16` or `fp32`.

    Returns:
        The predicted dev targets, one per example.

    Raises:
        CheckpointError: A tensor of the base is missing, or a token has no embedding.
        DataError: The tokenizer returns no token for an input.

    Source: Alain and Bengio, 2016 (arXiv:1610.01644).
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = fresh_model(base, data.head, HEAD_SEED).to(device())
    train = data.train.take(range(min(MAX_TRAIN_EXAMPLES, len(data.train))))
    pipeline = make_pipeline(StandardScaler(), data.task.linear_probe())
    pipeline.fit(_features(model, base, data, train, precision), train.targets)
    predictions: list[Any] = pipeline.predict(_features(model, base, data, data.dev, precision)).tolist()
    return predictions


def _features(model: nn.Module, base: Base, data: TaskData, split: Split, precision: str) -> torch.Tensor:
    """Average the last hidden states over the tokens of each example: examples × width."""
    import torch

    features = torch.zeros(len(split), base.config.hidden_size)

    def collect(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        mask = batch["attention_mask"][..., None]
        features[indices] = ((output.hidden[-1].float() * mask).sum(dim=1) / mask.sum(dim=1)).cpu()

    for_each_batch(model, encode(base, data, split), precision, collect, stage="probe", hidden=True)
    return features
