"""What tensor names tell: which stand for the same tensor, which layer they are of, and what they do in it."""

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
    ("feed-forward", re.compile(r"mlp|ffn|intermediate|feed_forward|output\.dense|(?:^|\.)(?:fc[12]|lin[12]|dense)\.")),
    ("head", re.compile(r"^(?:classifier|score|lm_head|cls|vocab_|qa_outputs|predictions|pre_classifier)")),
)

OPTIONAL = ("pooler",)  # what pre-training with a language-modelling head does not use and so leaves out


class NamedTensors(DerivedTensors):
    """A checkpoint under the names that its transformers class writes, every tensor once.

    Args:
        entries: How each tensor is read.
        keys: By name, what the tensor is called in any class of the architecture: inside the body without a prefix.
        ties: Which keys a tensor is tied to, by its own; tied tensors are one, under the key of their source.
        expected: The keys of all tensors that the class has.
        by_token: Returns the names of the tensors that grow with the vocabulary.
        embeddings: The name of the token embeddings.
    """

    def __init__(
        self,
        entries: Mapping[str, TensorSpec],
        keys: Mapping[str, str],
        ties: Mapping[str, str],
        expected: Collection[str],
        by_token: Callable[[], Collection[str]],
        embeddings: str | None = None,
    ):
        super().__init__(entries)
        self.key_by_name, self.ties, self.expected, self._by_token = keys, ties, expected, by_token
        self.embeddings = embeddings

    @functools.cached_property
    def token_tensors(self) -> frozenset[str]:
        """The names of the tensors that grow with the vocabulary: [tokens, …], or [1, tokens]."""
        return frozenset(self._by_token()) & self.specs.keys()

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """The name of the tensor that stands under each key; a tied key has that of its source."""
        own = {self.key_by_name[name]: name for name in self.specs}
        return {tied: own[source] for tied, source in self.ties.items() if source in own} | own


def is_optional(key: str) -> bool:
    """Return whether a body tensor may be absent from a base, because pre-training does not use it.

    Args:
        key: A name inside the body.

    Returns:
        True for the pooler, which models with a language-modelling head leave out.
    """
    return key.split(".")[0] in OPTIONAL


def layer_of(name: str) -> str:
    """Return which layer a tensor is of.

    Args:
        name: Its name.

    Returns:
        As in `layer 3`; outside of the layers, `embeddings` or the name's first part that is no wrapper.
    """
    found = _LAYER.search(name)
    if found:
        return f"layer {int(found[1])}"
    return "embeddings" if kind_of(name) == "embedding" or "embeddings." in name else "outside the layers"


def kind_of(name: str) -> str:
    """Return what a tensor does.

    Args:
        name: Its name.

    Returns:
        `norm`, `embedding`, `attention`, `feed-forward`, `head` or `other`.
    """
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def align(tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Find the tensors that stand for the same, whether or not names carry the prefix of a model with a head.

    Args:
        tensors: The side whose names are given back.
        like: The side whose names they are given for.

    Returns:
        The name in `tensors` for each name of `like` that has one there; in the order of `like`.
    """
    if isinstance(tensors, NamedTensors) and isinstance(like, NamedTensors):
        return {name: tensors.names[key] for name, key in like.key_by_name.items() if key in tensors.names}
    best: dict[str, str] = {}
    for prefix in _prefixes(tensors):
        for other in _prefixes(like):
            found = {
                name: prefix + name.removeprefix(other)
                for name in like
                if name.startswith(other) and prefix + name.removeprefix(other) in tensors
            }
            fitting = sum(shape_of(tensors, mine) == shape_of(like, name) for name, mine in found.items())
            if fitting > sum(shape_of(tensors, mine) == shape_of(like, name) for name, mine in best.items()):
                best = found
    return best


def _prefixes(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the empty prefix and those that more than half of the names begin with."""
    firsts = Counter(name.split(".")[0] + "." for name in tensors)
    return ["", *sorted(first for first, count in firsts.items() if count * 2 > len(tensors))]
