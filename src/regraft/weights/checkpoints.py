"""The arithmetic on whole checkpoints: every tensor by its name, computed when it is written."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from regraft.checkpoint import FLOATING, DerivedTensors, TensorSpec, dtype_of, output_dtype, shape_of
from regraft.errors import MismatchError, RecipeError
from regraft.weights.delta import delta, graft, interpolate
from regraft.weights.names import NamedTensors, align, is_optional
from regraft.weights.vocabulary import graft_rows, has_vocabulary_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from regraft.weights.vocabulary import RowMatch

    Tensors = Mapping[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Counterparts:
    """What of two bases stands for the same as each tuned tensor.

    Args:
        new: The new base's tensor, by the tuned one's name.
        old: The old base's.
        left_out: Tuned tensors that one base has, and that pre-training leaves out of the other (a pooler).
    """

    new: dict[str, str]
    old: dict[str, str]
    left_out: tuple[str, ...]


def counterparts(new: Tensors, tuned: Tensors, old: Tensors) -> Counterparts:
    """Pair the tensors of a fine-tune with those of its bases.

    Args:
        new: The upgraded base.
        tuned: What was tuned on the old base.
        old: The old base.

    Returns:
        The pairs; a tensor that is tied to another one has that one's counterparts.

    Raises:
        MismatchError: A tensor is in one base only, or the fine-tune lacks one that both have.
    """
    in_new, in_old = align(new, tuned), align(old, tuned)
    key_of = tuned.key_by_name if isinstance(tuned, NamedTensors) else {name: name for name in tuned}
    one_sided = sorted(in_new.keys() ^ in_old.keys())
    left_out = tuple(name for name in one_sided if is_optional(key_of[name]))
    for which, names in (("new", in_new), ("old", in_old)):
        alone = [name for name in one_sided if name in names and name not in left_out]
        if alone:
            raise MismatchError(
                f"{len(alone)} tuned tensors are in one base only, the {which} one: {', '.join(alone[:4])}. Give "
                "the base that the weights were tuned on and the one pre-trained further from it, both with that."
            )
    _something(in_new)
    if isinstance(new, NamedTensors) and isinstance(tuned, NamedTensors) and isinstance(old, NamedTensors):
        _check_complete(new, tuned, old)
    plain = {name: other for name, other in in_new.items() if name not in left_out}
    return Counterparts(plain, {name: in_old[name] for name in plain}, left_out)


def _check_complete(new: NamedTensors, tuned: NamedTensors, old: NamedTensors) -> None:
    """Refuse a fine-tune that lacks what its class has and both bases store, or ties what a base has apart."""
    shared = {new.key_by_name[name] for name in new} & {old.key_by_name[name] for name in old}
    absent = sorted(key for key in shared & set(tuned.expected) - tuned.names.keys() if not is_optional(key))
    if absent:
        raise MismatchError(f"the fine-tune lacks {len(absent)} tensors of its bases: {', '.join(absent[:4])}.")
    own = {tuned.key_by_name[name] for name in tuned}
    untied = sorted(key for key in tuned.ties if key not in own and key in {new.key_by_name[name] for name in new})
    if untied:
        raise MismatchError(
            f"the fine-tune ties {untied[0]!r} to {tuned.ties[untied[0]]!r}, and in the new base they are two tensors: "
            "the fine-tune has no room for both. Untie them in the fine-tune first (tie_word_embeddings: false)."
        )


def graft_all(
    new: Tensors,
    tuned: Tensors,
    old: Tensors,
    scale: float | Mapping[str, float] = 1.0,
    rows: RowMatch | None = None,
) -> DerivedTensors:
    """Graft the delta of every tuned tensor: new + λ·(tuned − old).

    Tensors of `tuned` that no base has, as heads, are copied; so are those that are not floating-point.

    Args:
        new: The upgraded base.
        tuned: What was tuned on the old base.
        old: The old base.
        scale: λ, or λ by name pattern (as in `*.attention.*`; the first that fits counts, else 1).
        rows: How the rows of the vocabularies match, if they are not the same.

    Returns:
        The grafted tensors, under the names of `tuned` and in its dtypes; what is quantised there, in bfloat16.

    Raises:
        MismatchError: A tensor has different shapes, or is in one base only.
        RecipeError: λ is infinite or not a number.
    """
    _check_factors("λ", *(scale.values() if isinstance(scale, Mapping) else (scale,)))
    pairs = counterparts(new, tuned, old)
    by_token = _by_token(tuned) & pairs.new.keys() if rows is not None else frozenset()
    for side, names in ((new, pairs.new), (old, pairs.old)):
        _same_shapes(tuned, (side, {name: other for name, other in names.items() if name not in by_token}))
    entries = {}
    for name in tuned:
        factor = _scale(scale, name)
        if name not in pairs.new or dtype_of(tuned, name) not in FLOATING:
            entries[name] = _copy(tuned, name)
            continue
        operands = ((new, pairs.new[name]), (tuned, name), (old, pairs.old[name]))
        if rows is not None and name in by_token:
            shape = rows.shape(shape_of(tuned, name))
            rule = functools.partial(graft_rows, match=rows, rule=functools.partial(graft, scale=factor))
            entries[name] = TensorSpec(output_dtype(tuned, name), shape, operands, rule, elementwise=False)
        else:
            entries[name] = _entry(tuned, name, operands, functools.partial(graft, scale=factor))
    return DerivedTensors(entries)


def _by_token(tensors: Tensors) -> frozenset[str]:
    if isinstance(tensors, NamedTensors):
        return tensors.token_tensors
    return frozenset(name for name in tensors if has_vocabulary_rows(name))


def delta_all(tuned: Tensors, old: Tensors) -> DerivedTensors:
    """Return the delta of every tuned tensor: tuned − old, in float32 so that nothing of it is rounded away.

    Args:
        tuned: What was tuned.
        old: The base it was tuned on.

    Returns:
        The deltas, under the names of `tuned`; what the base has not, as a head, is left out.

    Raises:
        MismatchError: A tensor has different shapes, or nothing corresponds.
    """
    in_old = align(old, tuned)
    _same_shapes(tuned, (old, in_old))
    _something(in_old)
    return DerivedTensors(
        {
            name: TensorSpec(
                "F64" if "F64" in (dtype_of(tuned, name), dtype_of(old, other)) else "F32",
                shape_of(tuned, name),
                ((tuned, name), (old, other)),
                delta,
            )
            for name, other in in_old.items()
            if dtype_of(tuned, name) in FLOATING
        }
    )


def interpolate_all(first: Tensors, second: Tensors, t: float) -> DerivedTensors:
    """Walk the straight line between two checkpoints: (1 − t)·first + t·second.

    Args:
        first: Where t is 0.
        second: Where t is 1.
        t: The place on the line; outside of 0 to 1 the line goes on.

    Returns:
        The tensors under the names of `first` and in its dtypes; what is in one only, or not floating-point, must be
        in `first` and is copied. What is quantised there is written in bfloat16.

    Raises:
        MismatchError: A tensor has different shapes, or is in the second only.
        RecipeError: t is infinite or not a number.
    """
    _check_factors("t", t)
    in_second = align(second, first)
    left_over = sorted(set(second) - set(in_second.values()))
    if left_over or len(in_second) < len(first):
        lost = sorted(set(first) - set(in_second)) + left_over
        raise MismatchError(f"{len(lost)} tensors are in one of the two only: {', '.join(lost[:4])}.")
    _same_shapes(first, (second, in_second))
    rule = functools.partial(interpolate, t=t)
    return DerivedTensors(
        {
            name: _entry(first, name, ((first, name), (second, in_second[name])), rule)
            if dtype_of(first, name) in FLOATING
            else _copy(first, name)
            for name in first
        }
    )


def apply_all(
    rule: Callable[..., torch.Tensor], first: Tensors, *others: Tensors, elementwise: bool = True
) -> DerivedTensors:
    """Apply a rule to the tensors of the same name of any number of checkpoints, as `trim` to the deltas of one.

    Args:
        rule: Makes a tensor from one of each, of the shape of the first.
        first: The side whose names, shapes and dtypes count.
        others: What else the rule takes.
        elementwise: Whether the rule gives the same on flat pieces as on whole tensors.

    Returns:
        What the rule makes.

    Raises:
        MismatchError: A tensor is not in all, or has different shapes.
    """
    sides = [(other, align(other, first)) for other in others]
    lost = sorted(name for name in first if any(name not in names for _, names in sides))
    if lost:
        raise MismatchError(f"{len(lost)} tensors are not in all checkpoints: {', '.join(lost[:4])}.")
    _same_shapes(first, *sides)
    entries = {}
    for name in first:
        operands = ((first, name), *((other, names[name]) for other, names in sides))
        entries[name] = TensorSpec(output_dtype(first, name), shape_of(first, name), operands, rule, elementwise)
    return DerivedTensors(entries)


def _entry(
    like: Tensors, name: str, operands: tuple[tuple[Tensors, str], ...], rule: Callable[..., torch.Tensor]
) -> TensorSpec:
    return TensorSpec(output_dtype(like, name), shape_of(like, name), operands, rule)


def _copy(tensors: Tensors, name: str) -> TensorSpec:
    return TensorSpec(output_dtype(tensors, name), shape_of(tensors, name), ((tensors, name),))


def _scale(scale: float | Mapping[str, float], name: str) -> float:
    if isinstance(scale, int | float):
        return scale
    return next((factor for pattern, factor in scale.items() if fnmatch.fnmatchcase(name, pattern)), 1.0)


def _check_factors(what: str, *factors: float) -> None:
    if wrong := [factor for factor in factors if not math.isfinite(factor)]:
        raise RecipeError(f"{what} is a finite number, found {wrong[0]}.")


def _same_shapes(like: Tensors, *sides: tuple[Tensors, Mapping[str, str]]) -> None:
    differing = [
        f"{name}: {shape_of(like, name)} and {shape_of(side, other)}"
        for side, names in sides
        for name, other in names.items()
        if shape_of(like, name) != shape_of(side, other)
    ]
    if differing:
        raise MismatchError(f"{len(differing)} tensors are of another shape: {'; '.join(differing[:4])}.")


def _something(names: Mapping[str, str]) -> None:
    if not names:
        raise MismatchError("no tensor has the same name in both: these checkpoints are not of one architecture.")
