"""The upgrade's shift of the base's tensors, compared with the adaptation's delta."""

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
    from regraft.diagnosis.question import QuestionContext, SummaryLines
    from regraft.upgrade import Upgrade


@dataclasses.dataclass(frozen=True)
class GroupShift:
    """The upgrade's shift and the adaptation's delta of a group of tensors; norms are Euclidean.

    Args:
        name: The group's name, such as `layer 3` or `attention`.
        base: The norm of the old base's tensors.
        shift: The norm of the upgrade's shift, new − old.
        delta: The norm of the adaptation's delta, tuned − old; 0 if none of these tensors has a delta.
        cosine: The cosine of shift and delta, over the tensors that have a delta; None if there are none, or if none of
            them is shifted.
        signs: The share of entries with equal signs in shift and delta, among the entries that are 0 in neither; None
            if there are no such entries.
        overlap: The overlap of the leading directions of shift and delta, from 0 to 1, averaged over the matrices of
            attention and feed-forward layers; None if no such matrix has an entry that is 0 in neither.
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
    """The upgrade's shift compared with an adaptation's delta.

    Args:
        whole: The figures of the body.
        layers: The figures of each layer: the embeddings first, tensors outside the layers last.
        kinds: The figures of each kind of tensor, such as `attention` or `norm`.
    """

    whole: GroupShift
    layers: tuple[GroupShift, ...]
    kinds: tuple[GroupShift, ...]


def shift(upgrade: Upgrade, adaptation: Adaptation, progress: Progress = silent) -> Shift:
    """Compare the upgrade's shift with the adaptation's delta, tensor by tensor.

    Full fine-tunes, and LoRAs that can be merged, have deltas of the base's tensors. For other adaptations only the
    shift is measured. Of tensors with a row per token, only the tokens of both bases count.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation tuned on the old base.
        progress: Called after each tensor.

    Returns:
        Norms, cosine, agreement of signs and overlap of leading directions: of the body, by layer and by kind.
    """
    old = upgrade.old
    new = upgrade.new
    tuned_tensors, tuned_names = adaptation.family.tuned_body_tensors(adaptation, old) or ({}, {})
    body_sums: list[_TensorSums] = []
    layer_sums: dict[str, list[_TensorSums]] = {}
    kind_sums: dict[str, list[_TensorSums]] = {}
    names = sorted(old.body.keys() & new.body.keys(), key=_model_order)
    for index, name in enumerate(names):
        old_tensor, new_tensor = old.checkpoint[old.body[name]].double(), new.checkpoint[new.body[name]].double()
        old_rows, new_rows = upgrade.shared_rows(name, old_tensor, new_tensor)
        delta = None
        if name in tuned_names:
            tuned_tensor = tuned_tensors[tuned_names[name]]
            if tuned_tensor.shape == old_tensor.shape:  # a tuned tensor with added tokens has more rows
                delta = upgrade.shared_rows(name, tuned_tensor.double() - old_tensor, new_tensor)[0]
        is_matrix = kind_of(name) in ("attention", "feed-forward") and old_rows.dim() == 2
        sums = _tensor_sums(old_rows, new_rows - old_rows, delta, is_matrix=is_matrix)
        body_sums.append(sums)
        layer_sums.setdefault(layer_of(name), []).append(sums)
        kind_sums.setdefault(kind_of(name), []).append(sums)
        progress("distance", index + 1, len(names), {})
    return Shift(
        whole=_group_shift("whole body", body_sums),
        layers=tuple(_group_shift(layer, tensors) for layer, tensors in layer_sums.items()),
        kinds=tuple(_group_shift(kind, tensors) for kind, tensors in kind_sums.items()),
    )


def _model_order(name: str) -> tuple[int, int, str]:
    """Return a sort key: the embeddings first, then the layers by index, then all other tensors."""
    layer = layer_of(name)
    layer_index = layer.removeprefix("layer ")
    if layer_index.isdigit():
        return 1, int(layer_index), name
    return (0 if layer == "embeddings" else 2), 0, name


@dataclasses.dataclass(frozen=True)
class _TensorSums:
    """Sums over one tensor's entries: squares, the product of shift and delta, and counts of signs."""

    base: float
    shift: float
    delta: float
    dot: float
    shift_with_delta: float  # equal to `shift` if the tensor has a delta, else 0
    equal_signs: int
    compared_signs: int
    overlap: float | None


def _tensor_sums(
    base: torch.Tensor, shift: torch.Tensor, delta: torch.Tensor | None, *, is_matrix: bool
) -> _TensorSums:
    """Sum over the entries of a tensor; a delta that is 0 everywhere counts as none."""
    shift_squares = float(shift.square().sum())
    if delta is None or not delta.any():
        return _TensorSums(float(base.square().sum()), shift_squares, 0.0, 0.0, 0.0, 0, 0, None)
    products = shift * delta
    compared_signs = int((products != 0).sum())
    return _TensorSums(
        base=float(base.square().sum()),
        shift=shift_squares,
        delta=float(delta.square().sum()),
        dot=float(products.sum()),
        shift_with_delta=shift_squares,
        equal_signs=int((products > 0).sum()),
        compared_signs=compared_signs,
        overlap=subspace_overlap(shift, delta) if is_matrix and compared_signs else None,
    )


def _group_shift(name: str, tensors: list[_TensorSums]) -> GroupShift:
    """Add up the sums of a group of tensors, and derive norms, cosine and means."""

    def total(field: str) -> float:
        return math.fsum(getattr(tensor, field) for tensor in tensors)

    norms = math.sqrt(total("shift_with_delta") * total("delta"))
    compared_signs = sum(tensor.compared_signs for tensor in tensors)
    overlaps = [tensor.overlap for tensor in tensors if tensor.overlap is not None]
    return GroupShift(
        name=name,
        base=math.sqrt(total("base")),
        shift=math.sqrt(total("shift")),
        delta=math.sqrt(total("delta")),
        cosine=total("dot") / norms if norms else None,
        signs=sum(tensor.equal_signs for tensor in tensors) / compared_signs if compared_signs else None,
        overlap=math.fsum(overlaps) / len(overlaps) if overlaps else None,
    )


def _answer(context: QuestionContext) -> Shift:
    return shift(context.upgrade, context.direct.adaptation, context.direct.progress)


def _describe(shift: Shift, _metric: str) -> SummaryLines:
    body = shift.whole
    if body.cosine is None:
        return []
    norms = f"{body.shift:.2f} and {body.delta:.2f} (L2)"
    return [("shift against delta", f"{norms}, cosine {body.cosine:+.3f}, signs agree {body.signs:.0%}")]


QUESTION = Question("shift", order=60, record=Shift, answer=_answer, is_required=True, describe=_describe)
