"""Deployments: models with their outputs for a task, and checks that an adaptation fits its base and its task."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation import check_task_type, fresh_model
from regraft.errors import MAX_LISTED, MismatchError
from regraft.model.answers import answer_settings, encode_prompts, generate_answers
from regraft.model.batches import for_each_batch, predict
from regraft.model.device import deploy, device
from regraft.model.examples import check_has_rows, encode, with_answer_rows
from regraft.model.outputs import unwrap_model
from regraft.model.vocabulary_head import check_vocabulary_head, vocabulary_head
from regraft.progress import Progress, silent
from regraft.task import chance_score as score_of_chance
from regraft.task import score

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from regraft.adaptation import Adaptation
    from regraft.base import Base
    from regraft.model.outputs import Output
    from regraft.task import Split, TaskData
    from regraft.task.types import Examples
    from regraft.task.types.token_logits import VocabularyHead

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
        precision: `bf16` or `fp32`. A task type that scales its targets always computes in `fp32`, because bf16 rounds
            outputs to 3 digits, in which a large mean leaves no room for differences.
        progress: Called after each batch.
    """

    def __init__(self, model: nn.Module, base: Base, data: TaskData, precision: str, progress: Progress = silent):
        self.base = base
        self.data = data
        self.precision = precision if data.task.target_scaling(data.train.targets) is None else "fp32"
        self.model = deploy(model, self.precision)
        if data.task.head_in_base:
            check_vocabulary_head(unwrap_model(model))
        self.progress = progress
        self._examples: dict[Split, Examples] = {}
        self._outputs: dict[Split, Any] = {}
        self._predictions: dict[Split, list[Any]] = {}

    def clear_outputs(self) -> None:
        """Discard the outputs for all splits, after a change of the model's weights."""
        self._outputs.clear()
        self._predictions.clear()

    def examples(self, split: Split) -> Examples:
        """Tokenise a split, see `encode`; without labels, each prompt has a row where its answer begins.

        Raises:
            DataError: The split has targets, but all of them are cut off.
        """
        if split not in self._examples:
            examples = encode(self.base, self.data, split)
            check_has_rows(examples, split, min(self.data.max_length, self.base.max_input_length))
            self._examples[split] = examples if self.data.labelled else with_answer_rows(examples)
        return self._examples[split]

    def outputs(self, split: Split) -> Any:
        """Compute the model's logits for a split.

        Returns:
            The logits, rows × outputs, in float32 on the CPU, in the order of the examples; of a language model,
            `TokenLogits`.

        Raises:
            MismatchError: The head's number of outputs differs from the task's.
        """
        if split not in self._outputs:
            outputs = predict(self.model, self.examples(split), self.precision, self.progress)
            if not self.data.task.head_in_base and outputs.shape[1] != self.data.head.num_outputs:
                raise MismatchError(
                    f"the head has {outputs.shape[1]} outputs, task {self.data.name!r} {self.data.head}. Use the task "
                    "that the models were tuned for."
                )
            self._outputs[split] = outputs
        return self._outputs[split]

    def is_finite(self, split: Split) -> bool:
        """Return whether no output for a split is infinite or NaN."""
        return bool(self.outputs(split).isfinite().all())

    def signal(self, split: Split, student_ids: torch.Tensor | None = None) -> Any:
        """Return the part of the outputs for a split that a student learns from, if this model is its teacher.

        Args:
            split: A split of the data.
            student_ids: The student's id of each token of this model's vocabulary, −1 for none; None if they are equal.
        """
        signal: Any = self.data.likelihood.signal(self.outputs(split))
        return signal if student_ids is None else dataclasses.replace(signal, student_ids=student_ids)

    def predictions(self, split: Split) -> list[Any]:
        """Return the prediction for each example of a split, in the form of the split's targets."""
        if split not in self._predictions:
            task = self.data.task
            if task.head_in_base:
                self._predictions[split] = self._answer(split)
            else:
                row_predictions = self.data.likelihood.predict(self.outputs(split)).tolist()
                self._predictions[split] = task.predictions_of_examples(
                    row_predictions, split, self.examples(split), self.data.labels
                )
        return self._predictions[split]

    def confidence(self, split: Split) -> list[float] | None:
        """Return the probability that the model gives to each prediction for a split.

        Returns:
            Probabilities, one per example; None if the likelihood gives all predictions the same probability, and for
            answers, whose probabilities fall with their lengths.
        """
        if self.data.task.head_in_base:
            return None
        confidence = self.data.likelihood.confidence(self.outputs(split))
        if confidence is None:
            return None
        return self.data.task.confidence_of_examples(confidence.tolist(), self.examples(split))

    def losses(self, split: Split) -> torch.Tensor:
        """Compute the loss of each row of a split in nats, in float64."""
        import torch

        with torch.no_grad():
            return self.data.likelihood.loss(self.outputs(split).double(), self._targets(split))

    def loss(self, split: Split) -> float:
        """Compute the mean loss of the rows of a split in nats."""
        import torch

        with torch.no_grad():
            return float(self.data.likelihood.loss(self.outputs(split), self._targets(split), "mean"))

    def score(self, split: Split) -> float:
        """Score the predictions for a split by the task's metric."""
        return score(self.data.scoring, split.targets, self.predictions(split))

    def right(self, split: Split) -> Sequence[bool | None]:
        """Return for each target of a split whether the prediction is right; None where that cannot be told."""
        return self.data.task.right(split.targets, self.predictions(split))

    def similarity_to(self, split: Split, signal: Any) -> tuple[float, float]:
        """Measure the similarity of the model's distributions to a teacher's.

        Args:
            split: A split of the data.
            signal: The teacher's signal for the same split.

        Returns:
            Two means over rows. The first is the overlap, 1 − the total variation distance; for models that give all
            probability to one class, it is the share of rows on which they agree. The second is KL(teacher ‖ this
            model) in nats.
        """
        import torch

        likelihood = self.data.likelihood
        outputs = self.outputs(split)
        with torch.no_grad():
            divergence = likelihood.mean_divergence(outputs, signal)
            return float(likelihood.overlap(outputs, signal).mean()), float(divergence)

    def vocabulary_head(self) -> VocabularyHead | None:
        """Return a language model's head, detached and on its device, so that it remains when the model is moved."""
        if not self.data.task.head_in_base:
            return None
        return vocabulary_head(unwrap_model(self.model)).detach()

    def answer_ids(self, split: Split) -> list[list[int]]:
        """Return the token ids of the model's greedy answer to each prompt of a split, with the token that ends it."""
        settings = answer_settings(self.base, self.data)
        prompts = encode_prompts(self.base, self.data, split)
        return generate_answers(self.model, prompts, settings, self.precision, self.progress)

    def _answer(self, split: Split) -> list[Any]:
        """Return the predictions of a language model, with answers if the task's metric needs them."""
        task = self.data.task
        texts: list[tuple[str | None, bool | None, int | None]] = [(None, None, None)] * len(split)
        if task.answers_needed:
            stop_ids = answer_settings(self.base, self.data).stop_ids
            answers = self.answer_ids(split)
            for index, ids in enumerate(answers):
                ended = bool(ids) and ids[-1] in stop_ids
                text = task.decode_answer(ids[:-1] if ended else ids, self.base.tokenizer)
                texts[index] = (text, ended, len(ids))
        statistics: list[Any] = [None] * len(split)
        if self.data.labelled:
            examples = self.examples(split)
            losses = self.losses(split)
            correct = self.data.likelihood.predict(self.outputs(split)).cpu() == self._targets(split)
            for index in range(len(split)):
                rows = examples.rows([index])
                statistics[index] = (float(losses[rows].sum()), int(correct[rows].sum()), len(rows))
        return [
            task.answer_prediction(*answer, example_statistics)
            for answer, example_statistics in zip(texts, statistics, strict=True)
        ]

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


def chance_score(data: TaskData, split: Split, base: Base, precision: str) -> float:
    """Score the best prediction that is the same for every input; if there is none, the bare base's predictions.

    Args:
        data: The task's data, whose train split determines the prediction.
        split: The split of `data` to score the prediction on.
        base: The base that answers in place of a constant prediction: the new one.
        precision: `bf16` or `fp32`.
    """
    if not data.task.head_in_base:
        return score_of_chance(data, split)
    return bare_deployment(base, data, precision).score(split)


def bare_deployment(base: Base, data: TaskData, precision: str, progress: Progress = silent) -> Deployment:
    """Deploy a language model without an adaptation, to be measured like a deployment.

    Args:
        base: The base.
        data: The data of a task whose head is the base's own.
        precision: `bf16` or `fp32`.
        progress: Called after each batch.
    """
    return Deployment(fresh_model(base, data.head, HEAD_SEED, frozen=True), base, data, precision, progress)


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
    import torch

    split = data.train.take(range(min(MAX_CHECKED_EXAMPLES, len(data.train))))
    examples = with_answer_rows(encode(base, data, split))
    # both in the dtype of the adapted model, which keeps it for what it is used for next
    is_stored_in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    base_model = fresh_model(base, data.head, HEAD_SEED, frozen=is_stored_in_bf16)
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
