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
    from regraft.task import TaskData
    from regraft.task.types import Examples

MAX_TRAIN_EXAMPLES = 512
"""The most training examples of a probe: more of them cost time and hardly change its predictions."""
HEAD_SEED = 0
"""The seed of the model's head, which a probe does not read."""


def probe(base: Base, data: TaskData, precision: str) -> list[Any]:
    """Fit the task type's linear probe to a base's features of training examples, and predict the dev targets.

    Args:
        base: The base; the features of an example with a single row are the mean of its last hidden states over tokens,
            those of any other row, such as a word, are the last hidden state at the row's token.
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
    examples = encode(base, data, train)
    pipeline.fit(_features(model, base, examples, precision), examples.targets)
    dev_examples = encode(base, data, data.dev)
    row_predictions = pipeline.predict(_features(model, base, dev_examples, precision)).tolist()
    return data.task.predictions_of_examples(row_predictions, data.dev, dev_examples, data.labels)


def _features(model: nn.Module, base: Base, examples: Examples, precision: str) -> torch.Tensor:
    """Compute the features of each row from the last hidden states: rows × width."""
    import torch

    features = torch.zeros(len(examples.targets), base.config.hidden_size)

    def collect(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
        states = output.hidden[-1].float()
        if examples.tokens is None:
            mask = batch["attention_mask"][..., None]
            features[indices] = ((states * mask).sum(dim=1) / mask.sum(dim=1)).cpu()
        else:
            features[batch["row"].cpu()] = states[output.example, output.token].cpu()

    for_each_batch(model, examples, precision, collect, stage="probe", hidden=True)
    return features
