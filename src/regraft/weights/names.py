"""The correspondence of two checkpoints' tensors by name, and the layer and kind of a tensor by its name."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import TYPE_CHECKING

from regraft.checkpoint import DerivedTensors, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import torch

    from regraft.checkpoint import TensorSpec

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_KINDS = (
    ("norm", re.compile(r"norm|(?:^|\.)ln_", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|relative_attention_bias|(?:^|\.)(?:wte|wpe|shared)\.")),
    ("attention", re.compile(r"att(?:entio)?n|(?:^|\.)(?:[qkvo]_proj|query|key|value)\.")),
    (
        "feed-forward",
        re.compile(
            r"mlp|ffn|_moe\.|\.experts\.|intermediate|feed_forward|output\.dense|(?:^|\.)(?:fc[12]|lin[12]|dense)\."
        ),
    ),
    ("head", re.compile(r"^(?:classifier|score|lm_head|cls|vocab_|qa_outputs|predictions|pre_classifier)")),
)

OPTIONAL_MODULES = ("pooler",)
"""The modules of a body that pre-training with a language-modelling head leaves out."""


class NamedTensors(DerivedTensors):
    """A checkpoint under the names with which its transformers class is saved, without tied duplicates.

    Args:
        specs: How to compute each tensor, by name.
        keys: The keys of the tensors by name. A key is a name that does not depend on the class's head: for the body,
            the name without its prefix.
        ties: The key of the tensor that a tied tensor is tied to, by the tied tensor's key.
        expected: The keys of all untied tensors of the class.
        find_token_tensors: Returns the names of the tensors whose size depends on the vocabulary.
        embeddings: The name of the token embeddings; None if the class has none.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        keys: Mapping[str, str],
        ties: Mapping[str, str],
        expected: Collection[str],
        find_token_tensors: Callable[[], Collection[str]],
        embeddings: str | None = None,
    ):
        super().__init__(specs)
        self.key_by_name = keys
        self.ties = ties
        self.expected = expected
        self.embeddings = embeddings
        self._find_token_tensors = find_token_tensors

    @functools.cached_property
    def token_tensors(self) -> frozenset[str]:
        """The names of the tensors whose size depends on the vocabulary: [tokens, …] or [1, tokens]."""
        return frozenset(self._find_token_tensors()) & self.specs.keys()

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """The names of the tensors by key; a tied tensor's key has the name of the tensor that it is tied to."""
        name_by_key = {self.key_by_name[name]: name for name in self.specs}
        tied = {key: name_by_key[source] for key, source in self.ties.items() if source in name_by_key}
        return tied | name_by_key


def is_optional(key: str) -> bool:
    """Return whether a base may lack a tensor of the body, because pre-training does not use it (a pooler).

    Args:
        key: The tensor's name inside the body, such as `pooler.dense.weight`.
    """
    return key.split(".")[0] in OPTIONAL_MODULES


def layer_of(name: str) -> str:
    """Return the layer of a tensor: `layer 3`, `embeddings` or `outside the layers`.

    Args:
        name: The tensor's stored name, such as `bert.encoder.layer.3.output.dense.weight`.
    """
    match = _LAYER.search(name)
    if match:
        return f"layer {int(match[1])}"
    return "embeddings" if kind_of(name) == "embedding" or "embeddings." in name else "outside the layers"


def kind_of(name: str) -> str:
    """Return the kind of a tensor: `norm`, `embedding`, `attention`, `feed-forward`, `head` or `other`.

    Args:
        name: The tensor's stored name, such as `bert.encoder.layer.3.output.dense.weight`.
    """
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def align(tensors: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Match the tensors of two checkpoints by name, with or without the prefix of a model with a head.

    Args:
        tensors: The checkpoint to search.
        reference: The checkpoint whose tensors are matched.

    Returns:
        The names in `tensors` by the corresponding names in `reference`, in the order of `reference`.
    """
    if isinstance(tensors, NamedTensors) and isinstance(reference, NamedTensors):
        return {name: tensors.names[key] for name, key in reference.key_by_name.items() if key in tensors.names}
    best: dict[str, str] = {}
    most_equal_shapes = 0
    for prefix in _prefixes(tensors):
        for reference_prefix in _prefixes(reference):
            renamed = {
                name: prefix + name.removeprefix(reference_prefix)
                for name in reference
                if name.startswith(reference_prefix)
            }
            aligned = {name: match for name, match in renamed.items() if match in tensors}
            equal_shapes = sum(shape_of(tensors, match) == shape_of(reference, name) for name, match in aligned.items())
            if equal_shapes > most_equal_shapes:
                best = aligned
                most_equal_shapes = equal_shapes
    return best


def _prefixes(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the empty prefix, and the first part of the names if more than half of them share it."""
    counts = Counter(name.split(".")[0] + "." for name in tensors)
    return ["", *sorted(prefix for prefix, count in counts.items() if count * 2 > len(tensors))]
