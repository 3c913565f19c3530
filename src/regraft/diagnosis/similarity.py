"""Do two tuned models work alike inside: head by head, layer by layer, prediction by prediction?"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint.record import Count, require_shape
from regraft.diagnosis.comparison import ModelComparison
from regraft.diagnosis.question import Question
from regraft.errors import RecipeError
from regraft.model import Deployment
from regraft.model.attention import Activations, attention_batches, eager_attention, random_model, record_activations
from regraft.model.outputs import unwrap_model
from regraft.progress import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from regraft.base import Base
    from regraft.diagnosis.question import QuestionContext, SummaryLines
    from regraft.task import TaskData
    from regraft.task.types import Examples

Table = tuple[tuple[float, ...], ...]

MAP_TOKENS = 24  # a longer text's attention map cannot be read on a page
MAP_DIGITS = 5  # a map's colours show fewer, and all digits of float32 would triple the record
MOMENT_BYTES = 2**28  # for CKA; if all layers need more, the models are run once for every few layers


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """The attention of one head on a short text, in both models.

    Args:
        layer: The layer, from 0.
        head: The head, from 0.
        divergence: The head's divergence over all texts, in bits.
        tokens: The text.
        old: Attention in the first model, rows attending × columns attended to, without virtual tokens.
        new: Attention in the second model.
    """

    layer: Count
    head: Count
    divergence: float
    tokens: tuple[str, ...]
    old: Table
    new: Table

    def __post_init__(self) -> None:
        """Check that there is a value for each pair of tokens."""
        for name, values in (("old", self.old), ("new", self.new)):
            require_shape(values, len(self.tokens), len(self.tokens), name)


@dataclasses.dataclass(frozen=True)
class Control:
    """How alike the first model is to an unrelated one: the reference for the figures of `Similarity`.

    Args:
        name: The unrelated model.
        divergence: The mean divergence of corresponding heads, layers × heads, in bits.
        cosine: The cosine of corresponding heads' maps, layers × heads.
        cka: Linear CKA of the embeddings, then of each layer.
    """

    name: str
    divergence: Table
    cosine: Table
    cka: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How alike two models work on the same texts; padding and the rows of virtual tokens do not count.

    Args:
        divergence: The mean Jensen-Shannon divergence of corresponding heads' rows, layers × heads, 0 to 1 bits.
        cosine: The cosine of corresponding heads' maps, each flattened to one vector, layers × heads.
        best: The head of the second model's same layer with the smallest divergence, layers × heads.
        others: The mean divergence from the other heads of that layer, layers × heads; in a layer of one head, the
            divergence from that one.
        control: The same figures for the first model and an unrelated one.
        cka: Linear CKA of the tokens' hidden states, of the embeddings, then of each layer; from 0 to 1.
        kl: The mean KL(first ‖ second) of predictions, in nats.
        agreement: The share of outputs for which both models predict the same; a text has one or more outputs.
        maps: Some heads on one short text: the most divergent, the least divergent, the median, then the next most
            divergent.
        texts: The number of texts measured.
    """

    divergence: Table
    cosine: Table
    best: tuple[tuple[Count, ...], ...]
    others: Table
    control: Control | None
    cka: tuple[float, ...]
    kl: float
    agreement: float
    maps: tuple[AttentionMap, ...]
    texts: Count

    def __post_init__(self) -> None:
        """Check that there is a value for each head."""
        layers = len(self.divergence)
        heads = len(self.divergence[0]) if self.divergence else 0
        tables: dict[str, Any] = {
            "divergence": self.divergence,
            "cosine": self.cosine,
            "best": self.best,
            "others": self.others,
        }
        for name, table in tables.items():
            require_shape(table, layers, heads, name)


def similarity(
    first: Any,
    second: Any,
    base: Base,
    data: TaskData,
    *,
    control: Any = None,
    control_name: str = "",
    maps: int = 4,
    texts: int = 64,
    precision: str = "fp32",
    seed: int = 0,
    progress: Progress = silent,
) -> Similarity:
    """Compare two tuned models of one architecture on the same texts.

    Source: finding 3 of Qin et al., 2023 (arXiv:2305.08702), in figures; CKA of Kornblith et al., 2019
    (arXiv:1905.00414).

    Args:
        first: A classifier from `load_model`; its mode and attention implementation are restored afterwards.
        second: Another classifier, likewise.
        base: A base with the tokenizer of both.
        data: The task. Texts are taken evenly from test (dev if there is none), labels are not read; `max_length`
            leaves room for virtual tokens.
        control: A classifier unrelated to `first`; if None, one of its architecture with random weights.
        control_name: The name of the control.
        maps: The number of heads whose attention maps are kept.
        texts: The number of texts; at least 1.
        precision: `bf16` or `fp32`.
        seed: The seed of the random weights.
        progress: The callback for each batch.

    Returns:
        The figures of heads, hidden states and predictions.

    Raises:
        MismatchError: The architecture gives no attention, or the models have other layers, heads, widths, labels or
            numbers of virtual tokens.
        RecipeError: A number is out of its range.
    """
    if texts < 1 or maps < 0:
        raise RecipeError(f"texts must be at least 1 and maps not negative, found {texts} and {maps}.")
    split = data.dev if data.test is None else data.test
    split = split.take(np.unique(np.linspace(0, len(split) - 1, min(texts, len(split))).round().astype(np.int64)))
    examples = Deployment(first, base, data, precision).examples(split)
    if control is None:
        control = random_model(first, seed)
        control_name = control_name or f"random weights (seed {seed})"
    pair = ModelComparison(data.likelihood, all_head_pairs=True)
    unrelated = ModelComparison(data.likelihood, all_head_pairs=False)
    # the text nearest in length to a map's is shown, cut to it if it is longer
    map_split = split.take([int(np.abs(examples.lengths - MAP_TOKENS).argmin())])
    map_data = data.with_settings(max_length=min(data.max_length, MAP_TOKENS))
    map_text = Deployment(first, base, map_data, precision).examples(map_split)
    with eager_attention(first, second, control):
        _compare_in_batches(
            first, [(second, pair), (control, unrelated)], examples, precision=precision, progress=progress
        )
        activations = [record_activations(model, _inputs(map_text, [0], model), precision) for model in (first, second)]
    matched = pair.divergences.diagonal(dim1=1, dim2=2)
    tokens = tuple(base.tokenizer.convert_ids_to_tokens(map_text.columns["input_ids"][0]))
    return Similarity(
        divergence=_table(matched),
        cosine=_table(pair.cosines),
        best=tuple(_nearest_heads(layer) for layer in pair.divergences.tolist()),
        others=_table(_mean_of_other_heads(pair.divergences)),
        control=Control(
            name=control_name or "control",
            divergence=_table(unrelated.divergences),
            cosine=_table(unrelated.cosines),
            cka=unrelated.cka,
        ),
        cka=pair.cka,
        kl=pair.kl / pair.outputs,
        agreement=pair.agreed / pair.outputs,
        maps=tuple(
            _attention_map(index, matched, tokens, activations)
            for index in _representative_heads(matched.flatten().tolist(), maps)
        ),
        texts=len(examples),
    )


def _compare_in_batches(
    first: Any,
    comparisons: Sequence[tuple[Any, ModelComparison]],
    examples: Examples,
    *,
    precision: str,
    progress: Progress,
) -> None:
    """Add all examples to the comparison of the first model with each other one.

    Hidden states are compared a few layers at a time, running the models again for each group of layers, so that the
    moments of CKA (two comparisons × three float32 matrices of width² for a layer) stay within `MOMENT_BYTES`.
    """
    config = unwrap_model(first).config
    states = config.num_hidden_layers + 1  # the embeddings, then each layer
    states_per_run = max(1, MOMENT_BYTES // (len(comparisons) * 3 * 4 * config.hidden_size**2))
    runs = -(-states // states_per_run)
    compared = 0
    for start in range(0, states, states_per_run):
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
            compared += len(indices)
            progress("similarity", compared, len(examples) * runs, {})
        for _, comparison in comparisons:
            comparison.finish_layers()


def _inputs(examples: Examples, indices: Sequence[int], model: Any) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in examples.batch(indices).items()}


def _nearest_heads(divergences: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Return the nearest head for each head of a layer: the corresponding one if several are equally near."""
    return tuple(head if row[head] <= min(row) else row.index(min(row)) for head, row in enumerate(divergences))


def _mean_of_other_heads(divergences: torch.Tensor) -> torch.Tensor:
    matched = divergences.diagonal(dim1=1, dim2=2)
    heads = divergences.shape[1]
    return (divergences.sum(dim=2) - matched) / (heads - 1) if heads > 1 else matched


def _representative_heads(divergences: Sequence[float], count: int) -> list[int]:
    """Return indices of heads: the most divergent, the least, the median, then the next most divergent."""
    descending = sorted(range(len(divergences)), key=lambda index: -divergences[index])
    ranks = dict.fromkeys([0, len(descending) - 1, len(descending) // 2, *range(len(descending))])
    return [descending[rank] for rank in list(ranks)[:count]]


def _attention_map(
    index: int, divergences: torch.Tensor, tokens: tuple[str, ...], activations: Sequence[Activations]
) -> AttentionMap:
    layer, head = divmod(index, divergences.shape[1])
    old, new = (
        _rounded(model_activations.attention[layer][0, head, :, -len(tokens) :].tolist())
        for model_activations in activations
    )
    return AttentionMap(layer, head, float(divergences[layer, head]), tokens, old, new)


def _rounded(rows: list[list[float]]) -> Table:
    return tuple(tuple(round(value, MAP_DIGITS) for value in row) for row in rows)


def _table(matrix: torch.Tensor) -> Table:
    return tuple(map(tuple, matrix.tolist()))


def _answer(context: QuestionContext) -> Similarity:
    context.require_same_tokens()
    pair = context.pair
    return similarity(
        pair.old.model, pair.new.model, context.upgrade.old, pair.data, precision=pair.precision, progress=pair.progress
    )


def _describe(similarity: Similarity, _metric: str) -> SummaryLines:
    divergences = [value for layer in similarity.divergence for value in layer]
    self_matched = sum(nearest == head for layer in similarity.best for head, nearest in enumerate(layer))
    heads = (
        f"divergence {sum(divergences) / len(divergences):.3f} bits; {self_matched} of {len(divergences)} heads are "
        "nearest to themselves"
    )
    hidden = f"CKA {min(similarity.cka):.3f} at the least alike layer"
    return [("attention heads", heads), ("hidden states", hidden)]


QUESTION = Question("similarity", 50, Similarity, _answer, describe=_describe)
