"""Views of tokenised examples of text generation: how long they are, and which of their tokens are labels."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from regraft.task.types.chat_encoding import MASKINGS
from regraft.task.types.view import Column, MarkedText, Span, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from regraft.task.types.chat_encoding import EncodedExample

NUM_SHOWN = 2
"""The number of examples that are shown: two suffice to see how the chat template repeats."""
MAX_SPAN = 300
"""The largest number of characters that are shown of a span, arbitrary: its middle says the least."""
LABEL_MARK = "learnt"
"""The mark of spans of labels."""


def summarise_tokens(name: str, encoded: Sequence[EncodedExample], max_length: int) -> Table:
    """Return the numbers of tokens of examples, and of examples that are truncated or without labels.

    Args:
        name: The name of the split.
        encoded: The tokenised examples, at least one.
        max_length: The number of tokens to which they are truncated.
    """
    import numpy as np

    lengths = np.array([len(example.ids) for example in encoded])
    num_labels = [len(example.label_positions(max_length)) for example in encoded]
    numbers: list[tuple[str, float]] = [
        ("tokens: median", float(np.median(lengths))),
        ("tokens: 95th percentile", float(np.quantile(lengths, 0.95))),
        ("tokens: largest number", int(lengths.max())),
        ("tokens that are labels", sum(num_labels)),
        (f"examples truncated to {max_length:,} tokens", int((lengths > max_length).sum())),
        ("examples without labels", sum(not count for count in num_labels)),
    ]
    maskings = Counter(example.masking for example in encoded)
    numbers += [(f"labels: {MASKINGS[masking]}", count) for masking, count in maskings.most_common()]
    rows = tuple((statistic, f"{number:,.0f}") for statistic, number in numbers)
    return Table(f"Tokens in {name}", (Column("statistic", "text"), Column("number", "text")), rows)


def mark_labels(encoded: Sequence[EncodedExample], tokenizer: PreTrainedTokenizerBase, max_length: int) -> MarkedText:
    """Return the first examples as a model sees them, with the spans of their labels marked.

    Args:
        encoded: The tokenised examples.
        tokenizer: The tokenizer.
        max_length: The number of tokens to which they are truncated.
    """
    texts = []
    for example in encoded[:NUM_SHOWN]:
        labels = set(example.label_positions(max_length))
        positions = range(min(len(example.ids), max_length))
        spans = []
        for is_label, span in itertools.groupby(positions, labels.__contains__):
            text = str(tokenizer.decode([example.ids[position] for position in span]))
            spans.append(Span(_shorten(text), LABEL_MARK if is_label else ""))
        texts.append(tuple(spans))
    return MarkedText(
        f"The first examples as the model sees them; their labels are marked ({LABEL_MARK})", tuple(texts)
    )


def _shorten(text: str) -> str:
    """Replace the middle of a long text by an ellipsis."""
    half = MAX_SPAN // 2
    return text if len(text) <= MAX_SPAN else f"{text[:half]} … {text[-half:]}"
