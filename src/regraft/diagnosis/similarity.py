"""Do two tuned models work alike inside: head by head, layer by layer, prediction by prediction?"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.record import Count, require_shape
from regraft.diagnosis.comparison import Comparison
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
    from regraft.diagnosis.question import Asked, Lines
    from regraft.task import TaskData
    from regraft.task.types import Examples

Table = tuple[tuple[float, ...], ...]

SHOWN = 24
DIGITS = 5
MOMENT_BYTES = 2**28  # for CKA; models that need more for all layers are run once for every few of them


@dataclasses.dataclass(frozen=True)
class Map:
    """What one head attends to on a short text, in both models.

    Args:
        layer: From 0.
        head: From 0.
        divergence: The head's, over all texts, in bits.
        tokens: The text.
        old: Attention in the first model, rows attending × columns attended to; virtual tokens are left out.
        new: The same in the second.
    """

    layer: Count
    head: Count
    divergence: float
    tokens: tuple[str, ...]
    old: Table
    new: Table

    def __post_init__(self) -> None:
        """Check that there is a value for each two tokens."""
        for name, values in (("old", self.old), ("new", self.new)):
            require_shape(values, len(self.tokens), len(self.tokens), name)


@dataclasses.dataclass(frozen=True)
class Control:
    """How alike the first model is to one that has nothing to do with it: what the figures are held against.

    Args:
        name: What that is.
        divergence: Layers × heads, as in `Similarity`.
        cosine: The same.
        cka: Embeddings, then each layer.
    """

    name: str
    divergence: Table
    cosine: Table
    cka: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that there is a value for each head."""
        _check_heads(self.divergence, cosine=self.cosine)


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How alike two models work on the same texts; padding and rows of virtual tokens do not count.

    Args:
        divergence: Layers × heads: the mean Jensen-Shannon divergence of corresponding heads' rows, 0 to 1 bits.
        cosine: Layers × heads: the cosine of corresponding heads' maps, each taken as one long vector.
        best: Layers × heads: which head of the second model's same layer is nearest by divergence.
        others: Layers × heads: the mean divergence to the other heads of that layer; that to the only one, where a
            layer has one head.
        control: The same of the first model and one that has nothing to do with it.
        cka: Linear CKA of the hidden states of tokens: embeddings, then each layer; from 0 to 1.
        kl: The mean KL(first ‖ second) of predictions, in nats.
        agreement: The share of outputs, of which a text has one or more, that both predict the same of.
        maps: Some heads on one short text: the least alike, the most, the median, then the next to least alike.
        texts: How many texts all this was measured on.
    """

    divergence: Table
    cosine: Table
    best: tuple[tuple[Count, ...], ...]
    others: Table
    control: Control | None
    cka: tuple[float, ...]
    kl: float
    agreement: float
    maps: tuple[Map, ...]
    texts: Count

    def __post_init__(self) -> None:
        """Check that there is a value for each head."""
        _check_heads(self.divergence, cosine=self.cosine, best=self.best, others=self.others)


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
        first: A classifier from `load_model`; modes and attention implementations are restored afterwards.
        second: Another.
        base: A base whose tokenizer both have.
        data: Where the texts are taken from, evenly over test (dev where there is none); `max_length` leaves room for
            virtual tokens. Labels are not read.
        control: A classifier that has nothing to do with `first`; if None, one of its architecture with random weights.
        control_name: What to call it.
        maps: How many heads to show.
        texts: How many texts; at least 1.
        precision: `bf16` or `fp32`.
        seed: What the random weights are drawn from.
        progress: Told of each batch.

    Returns:
        The figures.

    Raises:
        MismatchError: The architecture gives no attention, or the models have other layers, heads, widths, labels or
            numbers of virtual tokens.
        RecipeError: A number is out of its range.
    """
    if texts < 1 or maps < 0:
        raise RecipeError(f"texts is at least 1 and maps not negative, found {texts} and {maps}.")
    import numpy as np

    split = data.dev if data.test is None else data.test
    split = split.take(np.unique(np.linspace(0, len(split) - 1, min(texts, len(split))).round().astype(np.int64)))
    examples = Deployment(first, base, data, precision).examples(split)
    if control is None:
        control, control_name = random_model(first, seed), control_name or f"random weights (seed {seed})"
    likelihood = data.likelihood
    pair, unrelated = Comparison(likelihood, every_head=True), Comparison(likelihood, every_head=False)
    short = int(np.abs(examples.lengths - SHOWN).argmin())
    clipped = data.with_settings(max_length=min(data.max_length, SHOWN))
    text = Deployment(first, base, clipped, precision).examples(split.take([short]))
    with eager_attention(first, second, control):
        config = unwrap_model(first).config
        at_once = max(1, MOMENT_BYTES // (2 * 3 * 4 * config.hidden_size**2))
        states, done = config.num_hidden_layers + 1, 0
        for start in range(0, states, at_once):
            for indices in attention_batches(examples, config):
                inputs = _inputs(examples, indices, first)
                real, seen = inputs["attention_mask"].bool(), record_activations(first, inputs, precision)
                for comparison, model in ((pair, second), (unrelated, control)):
                    other = record_activations(model, inputs, precision)
                    if not start:
                        comparison.add(seen, other, real)
                    comparison.add_hidden(seen, other, real, range(start, start + at_once))
                done += len(indices)
                progress("similarity", done, len(examples) * -(-states // at_once), {})
            pair.finish_layers()
            unrelated.finish_layers()
        both = [record_activations(model, _inputs(text, [0], model), precision) for model in (first, second)]
    matched = pair.divergences.diagonal(dim1=1, dim2=2)
    tokens = tuple(base.tokenizer.convert_ids_to_tokens(text.columns["input_ids"][0]))
    return Similarity(
        divergence=_table(matched),
        cosine=_table(pair.cosines),
        best=tuple(tuple(_nearest(row, head) for head, row in enumerate(layer)) for layer in pair.divergences.tolist()),
        others=_table(_mean_of_others(pair.divergences)),
        control=Control(
            control_name or "control",
            _table(unrelated.divergences),
            _table(unrelated.cosines),
            unrelated.cka,
        ),
        cka=pair.cka,
        kl=pair.kl / pair.outputs,
        agreement=pair.agreed / pair.outputs,
        maps=tuple(_map(place, matched, tokens, both) for place in _choose(matched.flatten().tolist(), maps)),
        texts=len(examples),
    )


def _inputs(examples: Examples, indices: Sequence[int], model: Any) -> dict[str, torch.Tensor]:
    on = next(model.parameters()).device
    return {name: tensor.to(on) for name, tensor in examples.batch(indices).items()}


def _nearest(row: Sequence[float], head: int) -> int:
    """Which of a layer's heads is nearest; the corresponding one where several are."""
    return head if row[head] <= min(row) else row.index(min(row))


def _mean_of_others(divergences: torch.Tensor) -> torch.Tensor:
    matched, heads = divergences.diagonal(dim1=1, dim2=2), divergences.shape[1]
    return (divergences.sum(dim=2) - matched) / (heads - 1) if heads > 1 else matched


def _choose(divergences: Sequence[float], count: int) -> list[int]:
    """Choose heads to show: the least alike, the most, the median, then the next to least alike."""
    order = sorted(range(len(divergences)), key=lambda place: -divergences[place])
    ranks = dict.fromkeys([0, len(order) - 1, len(order) // 2, *range(len(order))])
    return [order[rank] for rank in list(ranks)[:count]]


def _map(place: int, divergences: torch.Tensor, tokens: tuple[str, ...], both: Sequence[Activations]) -> Map:
    layer, head = divmod(place, divergences.shape[1])
    old, new = (_rounded(seen.attention[layer][0, head, :, -len(tokens) :].tolist()) for seen in both)
    return Map(layer, head, float(divergences[layer, head]), tokens, old, new)


def _rounded(rows: list[list[float]]) -> Table:
    return tuple(tuple(round(value, DIGITS) for value in row) for row in rows)


def _table(figures: torch.Tensor) -> Table:
    return tuple(map(tuple, figures.tolist()))


def _check_heads(divergence: Table, **tables: Sequence[Sequence[float]]) -> None:
    heads = len(divergence[0]) if divergence else 0
    for name, table in (("divergence", divergence), *tables.items()):
        require_shape(table, len(divergence), heads, name)


def _ask(asked: Asked) -> Similarity:
    asked.require_same_tokens()
    pair = asked.pair
    return similarity(
        pair.old.model, pair.new.model, asked.upgrade.old, pair.data, precision=pair.precision, progress=pair.progress
    )


def _describe(answer: Similarity, _: str) -> Lines:
    values = [value for row in answer.divergence for value in row]
    own = sum(best == head for row in answer.best for head, best in enumerate(row))
    heads = f"divergence {sum(values) / len(values):.3f} bits; {own} of {len(values)} heads are nearest to themselves"
    return [("attention heads", heads), ("hidden states", f"CKA {min(answer.cka):.3f} at the least alike layer")]


QUESTION = Question("similarity", 50, Similarity, _ask, describe=_describe)
