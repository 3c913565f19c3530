"""An adaptation at work: its labels matched to a task's, and its predictions."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation import fresh_model, load_model
from regraft.errors import MismatchError
from regraft.model.batches import for_each_batch, predict
from regraft.model.device import device
from regraft.model.examples import encode
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from regraft.adaptation import Adaptation
    from regraft.base import Base
    from regraft.model.outputs import Output
    from regraft.task import TaskData

logger = logging.getLogger(__name__)

PROBED = 32


def match_labels(adaptation: Adaptation, data: TaskData) -> TaskData:
    """Put a task's classes into the order of an adaptation's head.

    Args:
        adaptation: The old weights.
        data: The task's examples.

    Returns:
        The same examples, their classes numbered as the head numbers them.

    Raises:
        MismatchError: The label names are not the same.
    """
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
    examples = encode(base, split, data.max_length)

    def read(classifier: Any) -> torch.Tensor:
        rows: list[torch.Tensor] = []

        def keep(output: Output, batch: dict[str, torch.Tensor], indices: list[int]) -> None:
            last = output.hidden[-1]
            fed = last[torch.arange(len(last), device=last.device), output.read].float().cpu()
            rows.append(fed if output.logits.isfinite().all() else torch.full_like(fed, torch.nan))

        for_each_batch(classifier.to(device()), examples, "fp32", keep, hidden=True)
        return torch.cat(rows)

    bare = fresh_model(base, ("a", "b"), 0)
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


def predictions(
    adaptation: Adaptation, base: Base, data: TaskData, precision: str, progress: Progress = silent
) -> list[int]:
    """Predict test (dev where there is none) with an adaptation on a base.

    Args:
        adaptation: The weights.
        base: The base they are put on; a full fine-tune is its own.
        data: The examples, classes in the order of the adaptation's head.
        precision: `bf16` or `fp32`.
        progress: Told of each batch.

    Returns:
        The predicted class of each example.
    """
    split = data.test or data.dev
    model = load_model(adaptation, base, data.labels).to(device())
    found: list[int] = predict(model, encode(base, split, data.max_length), precision, progress).argmax(dim=1).tolist()
    return found
