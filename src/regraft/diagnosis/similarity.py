"""Similarity of two tuned models' attention heads, hidden states and predictions."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint.record import Count, require_shape
from regraft.diagnosis.comparison import ModelComparison
from regraft.diagnosis.question import Question
from regraft.errors import MismatchError, RecipeError
from regraft.model import Deployment
from regraft.model.attention import Activations, attention_batches, eager_attention, random_model, record_activations
from regraft.model.outputs import unwrap_model
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from regraft.base import Base
    from regraft.diagnosis.question import QuestionContext, SummaryLines
    from regraft.task import Split, TaskData
    from regraft.task.types import Examples

Matrix = tuple[tuple[float, ...], ...]

MAP_TOKENS = 24  # a longer text's attention map cannot be read on a page
MAP_DIGITS = 5  # a map's colours show fewer, and all digits of float32 would triple the record
MAX_GENERATED_TOKENS = 512
"""The longest texts of text generation that are compared, in tokens: the attention maps of 30 layers with 9 heads then
take 0.3 GB."""
MAX_MOMENT_BYTES = 2**28  # memory of CKA's moments; if all layers need more, the models run once per group of layers


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """The attention of one head on a short text, in both models.

    Args:
        layer: The layer's index, from 0.
        head: The head's index, from 0.
        divergence: The head's mean divergence over all texts, in bits per row.
        tokens: The tokens of the text.
        old: Attention in the first model, rows attending × columns attended to, without virtual tokens.
        new: Attention in the second model, rows attending × columns attended to, without virtual tokens.
    """

    layer: Count
    head: Count
    divergence: float
    tokens: tuple[str, ...]
    old: Matrix
    new: Matrix

    def __post_init__(self) -> None:
        """Refuse maps that do not have the shape tokens × tokens."""
        for name, attention in (("old", self.old), ("new", self.new)):
            require_shape(attention, len(self.tokens), len(self.tokens), name)


@dataclasses.dataclass(frozen=True)
class Control:
    """The similarity of the first model to an unrelated one: the reference for the figures of `Similarity`.

    Args:
        name: The name of the unrelated model.
        divergence: The mean divergence of corresponding heads, layers × heads, in bits per row.
        cosine: The cosine of corresponding heads' maps, layers × heads.
        cka: Linear CKA of the embeddings, then of each layer.
    """

    name: str
    divergence: Matrix
    cosine: Matrix
    cka: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Similarity:
    """The similarity of two models on the same texts; padding and the rows of virtual tokens do not count.

    Args:
        divergence: The mean Jensen-Shannon divergence of corresponding heads' rows, layers × heads, 0 to 1 bit.
        cosine: The cosine of corresponding heads' maps, each flattened to one vector, layers × heads.
        best: For each head, the head of the second model's same layer with the smallest divergence, layers × heads.
        others: For each head, the mean divergence from the second model's other heads of the same layer,
            layers × heads; if the layer has only one head, the divergence from this head.
        control: Divergence, cosine and CKA for the first model and an unrelated one; None without a control.
        cka: Linear CKA of the tokens' hidden states, from 0 to 1: of the embeddings, then of each layer.
        kl: The mean KL(first ‖ second) per prediction, in nats; a text has one or more predictions.
        agreement: The share of predictions that are the same in both models.
        maps: Some heads on one short text: the most divergent, the least divergent, the median, then the next most
            divergent.
        texts: The number of texts measured.
    """

    divergence: Matrix
    cosine: Matrix
    best: tuple[tuple[Count, ...], ...]
    others: Matrix
    control: Control | None
    cka: tuple[float, ...]
    kl: float
    agreement: float
    maps: tuple[AttentionMap, ...]
    texts: Count

    def __post_init__(self) -> None:
        """Refuse matrices that do not have the shape layers × heads."""
        layers = len(self.divergence)
        heads = len(self.divergence[0]) if self.divergence else 0
        matrices: dict[str, Any] = {
            "divergence": self.divergence,
            "cosine": self.cosine,
            "best": self.best,
            "others": self.others,
        }
        for name, matrix in matrices.items():
            require_shape(matrix, layers, heads, name)


def similarity(
    first: nn.Module,
    second: nn.Module,
    base: Base,
    data: TaskData,
    *,
    control: nn.Module | None = None,
    control_name: str = "",
    maps: int = 4,
    texts: int = 64,
    precision: str = "fp32",
    seed: int = 0,
    progress: Progress = silent,
) -> Similarity:
    """Compare two tuned models of one architecture on the same texts.

    Source: finding 3 of Qin et al., 2023 (arXiv:2305.08702), here measured in numbers; CKA of Kornblith et al., 2019
    (arXiv:1905.00414).

    Args:
        first: A model with a head from `load_model`; its mode and attention implementation are restored afterwards.
        second: A model of the same architecture; its mode and attention implementation are restored afterwards.
        base: A base with the tokenizer of both models.
        data: The task's data, with a `max_length` that leaves room for virtual tokens. Texts are taken evenly from test
            (dev if there is none); labels are not read.
        control: A model unrelated to `first`; if None, a model of the same architecture with random weights.
        control_name: The name of the control.
        maps: The number of heads whose attention maps are recorded; by default the most and the least divergent, the
            median and the second most divergent.
        texts: The number of texts, at least 1; fewer are measured if the split has fewer. More texts take longer, and
            the default is arbitrary.
        precision: `bf16` or `fp32`.
        seed: The seed of the random weights.
        progress: Called after each batch.

    Returns:
        The figures of heads, hidden states and predictions.

    Raises:
        MismatchError: The architecture has no attention maps, the models differ in layers, heads, width, outputs or
            virtual tokens, or all texts of text generation are too long.
        RecipeError: The number of texts or maps is out of its range.
    """
    if texts < 1 or maps < 0:
        raise RecipeError(f"texts must be at least 1 and maps not negative, found {texts} and {maps}.")
    full_split = _short_enough(Deployment(first, base, data, precision), data.dev if data.test is None else data.test)
    num_texts = min(texts, len(full_split))
    split = full_split.take(np.unique(np.linspace(0, len(full_split) - 1, num_texts).round().astype(np.int64)))
    examples = Deployment(first, base, data, precision).examples(split)
    if control is None:
        control = random_model(first, seed)
        control_name = control_name or f"random weights (seed {seed})"
    comparison = ModelComparison(data.likelihood, all_head_pairs=True)
    control_comparison = ModelComparison(data.likelihood, all_head_pairs=False)
    # The maps show the text whose length is nearest to MAP_TOKENS, cut to this length if it is longer.
    map_split = split.take([int(np.abs(examples.lengths - MAP_TOKENS).argmin())])
    map_data = data.with_settings(max_length=min(data.max_length, MAP_TOKENS))
    map_examples = Deployment(first, base, map_data, precision).examples(map_split)
    with eager_attention(first, second, control):
        comparisons = [(second, comparison), (control, control_comparison)]
        _compare_in_batches(first, comparisons, examples, precision=precision, progress=progress)
        activations = [
            record_activations(model, _inputs(map_examples, [0], model), precision) for model in (first, second)
        ]
    divergences = comparison.divergences
    matched = divergences.diagonal(dim1=1, dim2=2)
    tokens = tuple(base.tokenizer.convert_ids_to_tokens(map_examples.columns["input_ids"][0]))
    return Similarity(
        divergence=_matrix(matched),
        cosine=_matrix(comparison.cosines),
        best=tuple(_nearest_heads(layer) for layer in divergences.tolist()),
        others=_matrix(_mean_of_other_heads(divergences)),
        control=Control(
            name=control_name or "control",
            divergence=_matrix(control_comparison.divergences),
            cosine=_matrix(control_comparison.cosines),
            cka=control_comparison.cka,
        ),
        cka=comparison.cka,
        kl=comparison.kl / comparison.num_predictions,
        agreement=comparison.num_equal / comparison.num_predictions,
        maps=tuple(
            _attention_map(index, matched, tokens, activations)
            for index in _representative_heads(matched.flatten().tolist(), maps)
        ),
        texts=len(examples),
    )


def _short_enough(deployment: Deployment, split: Split) -> Split:
    """Return the examples of text generation whose attention maps fit in memory; of other types, all examples."""
    if not deployment.data.task.head_in_base:
        return split
    short = (deployment.examples(split).lengths <= MAX_GENERATED_TOKENS).nonzero()[0]
    if not len(short):
        raise MismatchError(
            f"{split.source}: every example has more than {MAX_GENERATED_TOKENS} tokens, whose attention maps would "
            "take too much memory"
        )
    return split if len(short) == len(split) else split.take(short)


def _compare_in_batches(
    first: nn.Module,
    comparisons: Sequence[tuple[nn.Module, ModelComparison]],
    examples: Examples,
    *,
    precision: str,
    progress: Progress,
) -> None:
    """Add all examples to the comparisons of the first model with other models.

    Hidden states are compared a few layers at a time, running the models again for each group of layers, so that the
    moments of CKA stay within `MAX_MOMENT_BYTES`.
    """
    config = unwrap_model(first).config
    num_states = config.num_hidden_layers + 1  # the embeddings, then each layer
    moment_bytes = 3 * 4 * config.hidden_size**2  # three float32 matrices per layer and comparison
    states_per_run = max(1, MAX_MOMENT_BYTES // (len(comparisons) * moment_bytes))
    num_runs = math.ceil(num_states / states_per_run)
    num_compared = 0
    for start in range(0, num_states, states_per_run):
        for indices in attention_batches(examples, config):
            inputs = _inputs(examples, indices, first)
            token_mask = inputs["attention_mask"].bool()
            activations = record_activations(first, inputs, precision)
            for model, comparison in comparisons:
                model_activations = record_activations(model, inputs, precision)
                if start == 0:
                    comparison.add(activations, model_activations, token_mask)
                layers = range(start, start + states_per_run)
                comparison.add_hidden(activations, model_activations, token_mask, layers)
            num_compared += len(indices)
            progress("similarity", num_compared, len(examples) * num_runs, {})
        for _, comparison in comparisons:
            comparison.finish_layers()


def _inputs(examples: Examples, indices: Sequence[int], model: nn.Module) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in examples.batch(indices).items()}


def _nearest_heads(divergences: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Return the nearest head for each head of a layer; among equally near ones, the corresponding or the first."""
    nearest = []
    for head, head_divergences in enumerate(divergences):
        least = min(head_divergences)
        nearest.append(head if head_divergences[head] <= least else head_divergences.index(least))
    return tuple(nearest)


def _mean_of_other_heads(divergences: torch.Tensor) -> torch.Tensor:
    matched = divergences.diagonal(dim1=1, dim2=2)
    num_heads = divergences.shape[1]
    return (divergences.sum(dim=2) - matched) / (num_heads - 1) if num_heads > 1 else matched


def _representative_heads(divergences: Sequence[float], num_heads: int) -> list[int]:
    """Return indices of heads: the most divergent, the least, the median, then the next most divergent."""
    descending = sorted(range(len(divergences)), key=lambda index: -divergences[index])
    ranks = dict.fromkeys([0, len(descending) - 1, len(descending) // 2, *range(len(descending))])
    return [descending[rank] for rank in list(ranks)[:num_heads]]


def _attention_map(
    index: int, divergences: torch.Tensor, tokens: tuple[str, ...], activations: Sequence[Activations]
) -> AttentionMap:
    """Return the maps of both models for a head, given by its index in the flattened layers × heads."""
    layer, head = divmod(index, divergences.shape[1])
    old, new = (
        _round_weights(model_activations.attention[layer][0, head, :, -len(tokens) :].tolist())
        for model_activations in activations
    )
    return AttentionMap(layer, head, float(divergences[layer, head]), tokens, old, new)


def _round_weights(attention: list[list[float]]) -> Matrix:
    return tuple(tuple(round(weight, MAP_DIGITS) for weight in row) for row in attention)


def _matrix(tensor: torch.Tensor) -> Matrix:
    return tuple(map(tuple, tensor.tolist()))


def _answer(context: QuestionContext) -> Similarity:
    context.require_same_tokens()
    pair = context.pair
    return similarity(
        pair.old.model, pair.new.model, context.upgrade.old, pair.data, precision=pair.precision, progress=pair.progress
    )


def _describe(similarity: Similarity, _metric: str) -> SummaryLines:
    divergences = [divergence for layer in similarity.divergence for divergence in layer]
    self_matched = sum(nearest == head for layer in similarity.best for head, nearest in enumerate(layer))
    heads = (
        f"divergence {sum(divergences) / len(divergences):.3f} bits; {self_matched} of {len(divergences)} heads are "
        "nearest to themselves"
    )
    hidden = f"CKA {min(similarity.cka):.3f} at the least alike layer"
    return [("attention heads", heads), ("hidden states", hidden)]


QUESTION = Question("similarity", order=50, record=Similarity, answer=_answer, describe=_describe)
