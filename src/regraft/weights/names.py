"""What tensor names tell: which stand for the same tensor, which layer they are of, and what they do in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from regraft.checkpoint import shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_KINDS = (
    ("norm", re.compile(r"norm|(?:^|\.)ln_", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|relative_attention_bias|(?:^|\.)(?:wte|wpe|shared)\.")),
    ("attention", re.compile(r"att(?:entio)?n|(?:^|\.)(?:[qkvo]_proj|query|key|value)\.")),
    ("feed-forward", re.compile(r"mlp|ffn|intermediate|feed_forward|output\.dense|(?:^|\.)(?:fc[12]|lin[12]|dense)\.")),
    ("head", re.compile(r"^(?:classifier|score|lm_head|cls|vocab_|qa_outputs|predictions|pre_classifier)")),
)


def layer_of(name: str) -> str:
    """Tell which layer a tensor is of.

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
    """Tell what a tensor does.

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
    """Give the empty prefix and those that more than half of the names begin with."""
    firsts = [name.split(".")[0] + "." for name in tensors]
    return ["", *sorted({first for first in firsts if firsts.count(first) * 2 > len(firsts)})]
