"""How far the bases moved, against what tuning had changed."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from regraft.diagnosis.question import Question
from regraft.progress import Progress, silent
from regraft.weights import subspace_overlap
from regraft.weights.names import kind_of, layer_of

if TYPE_CHECKING:
    import torch

    from regraft.adaptation import Adaptation
    from regraft.diagnosis.question import Asked, Lines
    from regraft.upgrade import Upgrade


@dataclasses.dataclass(frozen=True)
class Moved:
    """A group of tensors: what the upgrade did to it, and what tuning had done.

    Args:
        name: Of the group.
        base: The norm of the old base's tensors.
        shift: The norm of the upgrade's shift, new − old.
        delta: The norm of the adaptation's delta, tuned − old; 0 where it changes none of these tensors.
        cosine: Of shift and delta, over the tensors that have both; None where none has.
        signs: The share of entries in which both point the same way, among those where both are not 0; likewise.
        overlap: How much the leading directions of both have in common, 0 to 1, averaged over matrices; likewise.
    """

    name: str
    base: float
    shift: float
    delta: float
    cosine: float | None
    signs: float | None
    overlap: float | None


@dataclasses.dataclass(frozen=True)
class Shift:
    """The upgrade's shift against an adaptation's delta.

    Args:
        whole: Over the whole body.
        layers: By layer, the embeddings first.
        kinds: By what tensors do, as attention or norms.
    """

    whole: Moved
    layers: tuple[Moved, ...]
    kinds: tuple[Moved, ...]


def shift(upgrade: Upgrade, adaptation: Adaptation, progress: Progress = silent) -> Shift:
    """Hold what the upgrade changed against what tuning had changed.

    Of a full fine-tune and of a LoRA the delta is dense; other kinds have none, and only the shift is measured.

    Args:
        upgrade: The two bases.
        adaptation: What was tuned on the old one.
        progress: Told of each tensor.

    Returns:
        Norms, cosine, agreement of signs and overlap of leading directions: of all, by layer and by kind.
    """
    old, new, tuned = upgrade.old, upgrade.new, adaptation.family.tuned_body(adaptation, upgrade.old)
    groups: dict[str, dict[str, list[_Sums]]] = {"whole": {}, "layer": {}, "kind": {}}
    names = sorted(old.body.keys() & new.body.keys(), key=_in_order)
    for number, inner in enumerate(names, start=1):
        before, after = old.checkpoint[old.body[inner]].double(), new.checkpoint[new.body[inner]].double()
        base, upgraded = upgrade.shared_rows(inner, before, after)
        moved, delta = upgraded - base, None
        if tuned and inner in tuned[1] and tuned[0][tuned[1][inner]].shape == before.shape:
            delta = upgrade.shared_rows(inner, tuned[0][tuned[1][inner]].double() - before, after)[0]
        sums = _sums(base, moved, delta, matrix=kind_of(inner) in ("attention", "feed-forward") and base.dim() == 2)
        for by, group in (("whole", "whole body"), ("layer", layer_of(inner)), ("kind", kind_of(inner))):
            groups[by].setdefault(group, []).append(sums)
        progress("distance", number, len(names), {})
    whole, layers, kinds = (
        tuple(_moved(name, parts) for name, parts in groups[by].items()) for by in ("whole", "layer", "kind")
    )
    return Shift(whole[0], layers, kinds)


def _in_order(name: str) -> tuple[int, int, str]:
    layer = layer_of(name)
    number = layer.removeprefix("layer ")
    return (1, int(number), name) if number.isdigit() else (0 if layer == "embeddings" else 2, 0, name)


@dataclasses.dataclass(frozen=True)
class _Sums:
    base: float
    shift: float
    delta: float
    dot: float
    shared: float  # the shift's part in tensors that have a delta
    same_sign: int
    compared: int
    overlap: float | None


def _sums(base: torch.Tensor, moved: torch.Tensor, delta: torch.Tensor | None, *, matrix: bool) -> _Sums:
    squares = float(moved.square().sum())
    if delta is None or not delta.any():
        return _Sums(float(base.square().sum()), squares, 0.0, 0.0, 0.0, 0, 0, None)
    products = moved * delta
    compared = int((products != 0).sum())
    return _Sums(
        base=float(base.square().sum()),
        shift=squares,
        delta=float(delta.square().sum()),
        dot=float(products.sum()),
        shared=squares,
        same_sign=int((products > 0).sum()),
        compared=compared,
        overlap=subspace_overlap(moved, delta) if matrix and compared else None,
    )


def _moved(name: str, parts: list[_Sums]) -> Moved:
    def total(field: str) -> float:
        return math.fsum(getattr(part, field) for part in parts)

    norms = math.sqrt(total("shared") * total("delta"))
    compared = sum(part.compared for part in parts)
    overlaps = [part.overlap for part in parts if part.overlap is not None]
    return Moved(
        name=name,
        base=math.sqrt(total("base")),
        shift=math.sqrt(total("shift")),
        delta=math.sqrt(total("delta")),
        cosine=total("dot") / norms if norms else None,
        signs=sum(part.same_sign for part in parts) / compared if compared else None,
        overlap=math.fsum(overlaps) / len(overlaps) if overlaps else None,
    )


def _ask(asked: Asked) -> Shift:
    return shift(asked.upgrade, asked.direct.adaptation, asked.direct.progress)


def _describe(answer: Shift, _: str) -> Lines:
    moved = answer.whole
    if moved.cosine is None:
        return []
    norms = f"{moved.shift:.2f} and {moved.delta:.2f} (L2)"
    return [("shift against delta", f"{norms}, cosine {moved.cosine:+.3f}, signs agree {moved.signs:.0%}")]


QUESTION = Question("shift", 60, Shift, _ask, is_required=True, describe=_describe)
