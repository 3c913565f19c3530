"""Arithmetic on whole checkpoints, whose tensors are computed when they are written."""

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
    """The tensors of two bases that correspond to those of a fine-tune.

    Args:
        new: The names of the new base's tensors, by the fine-tune's names.
        old: The names of the old base's tensors, by the fine-tune's names.
        unmatched: The names of fine-tuned tensors that only one base has (a pooler, which pre-training leaves out).
    """

    new: dict[str, str]
    old: dict[str, str]
    unmatched: tuple[str, ...]


def counterparts(new: Tensors, tuned: Tensors, old: Tensors) -> Counterparts:
    """Pair the tensors of a fine-tune with those of its bases.

    Args:
        new: The upgraded base.
        tuned: The fine-tune of the old base.
        old: The old base.

    Returns:
        The corresponding tensors. A tensor that is tied to another one has that one's counterparts.

    Raises:
        MismatchError: Only one base has a tensor, or the fine-tune lacks a tensor of both bases.
    """
    in_new, in_old = align(new, tuned), align(old, tuned)
    key_of = tuned.key_by_name if isinstance(tuned, NamedTensors) else {name: name for name in tuned}
    in_one_base = sorted(in_new.keys() ^ in_old.keys())
    unmatched = tuple(name for name in in_one_base if is_optional(key_of[name]))
    for role, names in (("new", in_new), ("old", in_old)):
        missing = [name for name in in_one_base if name in names and name not in unmatched]
        if missing:
            raise MismatchError(
                f"{len(missing)} tuned tensors are in one base only, the {role} one: {', '.join(missing[:4])}. Use "
                "the base that the weights were tuned on, and the one pre-trained further from it."
            )
    _check_common(in_new)
    if isinstance(new, NamedTensors) and isinstance(tuned, NamedTensors) and isinstance(old, NamedTensors):
        _check_complete(new, tuned, old)
    matched = [name for name in in_new if name not in unmatched]
    return Counterparts({n: in_new[n] for n in matched}, {n: in_old[n] for n in matched}, unmatched)


def _check_complete(new: NamedTensors, tuned: NamedTensors, old: NamedTensors) -> None:
    """Check that a fine-tune has all tensors of both bases, and ties none that are separate in the new base."""
    common = {new.key_by_name[name] for name in new} & {old.key_by_name[name] for name in old}
    absent = sorted(key for key in common & set(tuned.expected) - tuned.names.keys() if not is_optional(key))
    if absent:
        raise MismatchError(f"the fine-tune lacks {len(absent)} tensors of its bases: {', '.join(absent[:4])}.")
    tuned_keys = {tuned.key_by_name[name] for name in tuned}
    new_keys = {new.key_by_name[name] for name in new}
    untied = sorted(key for key in tuned.ties if key not in tuned_keys and key in new_keys)
    if untied:
        raise MismatchError(
            f"the fine-tune ties {untied[0]!r} to {tuned.ties[untied[0]]!r}, but in the new base they are two tensors. "
            "Untie them in the fine-tune first (tie_word_embeddings: false)."
        )


def graft_all(
    new: Tensors,
    tuned: Tensors,
    old: Tensors,
    scale: float | Mapping[str, float] = 1.0,
    rows: RowMatch | None = None,
) -> DerivedTensors:
    """Graft the delta of every tuned tensor: new + λ·(tuned − old).

    Tensors that no base has, such as heads, are copied, and so are integer tensors.

    Args:
        new: The upgraded base.
        tuned: The fine-tune of the old base.
        old: The old base.
        scale: The factor λ; or factors by name pattern, such as `*.attention.*`, of which the first match counts
            (without a match, 1).
        rows: How the rows of the vocabularies match; None if they are the same.

    Returns:
        The grafted tensors, with the names and dtypes of `tuned` (bfloat16 for quantised ones).

    Raises:
        MismatchError: A tensor has different shapes, or only one base has it.
        RecipeError: λ is infinite or NaN.
    """
    _check_finite_factors("λ", *(scale.values() if isinstance(scale, Mapping) else (scale,)))
    pairs = counterparts(new, tuned, old)
    with_token_rows = _token_tensors(tuned) & pairs.new.keys() if rows is not None else frozenset()
    for base, names in ((new, pairs.new), (old, pairs.old)):
        _check_shapes(tuned, (base, {name: other for name, other in names.items() if name not in with_token_rows}))
    specs = {}
    for name in tuned:
        factor = _scale_of(scale, name)
        if name not in pairs.new or dtype_of(tuned, name) not in FLOATING:
            specs[name] = _copy(tuned, name)
            continue
        operands = ((new, pairs.new[name]), (tuned, name), (old, pairs.old[name]))
        if rows is not None and name in with_token_rows:
            shape = rows.shape(shape_of(tuned, name))
            rule = functools.partial(graft_rows, match=rows, rule=functools.partial(graft, scale=factor))
            specs[name] = TensorSpec(output_dtype(tuned, name), shape, operands, rule, elementwise=False)
        else:
            specs[name] = _spec_like(tuned, name, operands, functools.partial(graft, scale=factor))
    return DerivedTensors(specs)


def _token_tensors(tensors: Tensors) -> frozenset[str]:
    if isinstance(tensors, NamedTensors):
        return tensors.token_tensors
    return frozenset(name for name in tensors if has_vocabulary_rows(name))


def delta_all(tuned: Tensors, old: Tensors) -> DerivedTensors:
    """Return the delta of every tuned tensor: tuned − old, in float32 or wider.

    Args:
        tuned: The fine-tune.
        old: The base that it was tuned on.

    Returns:
        The deltas, with the names of `tuned`. Tensors that the base lacks, such as heads, are left out.

    Raises:
        MismatchError: A tensor has different shapes, or no tensors correspond.
    """
    in_old = align(old, tuned)
    _check_shapes(tuned, (old, in_old))
    _check_common(in_old)
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
    """Interpolate linearly between two checkpoints: (1 − t)·first + t·second.

    Args:
        first: The checkpoint at t = 0.
        second: The checkpoint at t = 1.
        t: The coefficient of the second checkpoint; outside of 0 to 1 it extrapolates.

    Returns:
        The tensors, with the names and dtypes of `first` (bfloat16 for quantised ones). Integer tensors are copied from
        `first`.

    Raises:
        MismatchError: A tensor has different shapes, or only one checkpoint has it.
        RecipeError: t is infinite or NaN.
    """
    _check_finite_factors("t", t)
    in_second = align(second, first)
    unmatched = sorted(set(first) - set(in_second)) + sorted(set(second) - set(in_second.values()))
    if unmatched:
        raise MismatchError(f"{len(unmatched)} tensors are in one of the two only: {', '.join(unmatched[:4])}.")
    _check_shapes(first, (second, in_second))
    rule = functools.partial(interpolate, t=t)
    return DerivedTensors(
        {
            name: _spec_like(first, name, ((first, name), (second, in_second[name])), rule)
            if dtype_of(first, name) in FLOATING
            else _copy(first, name)
            for name in first
        }
    )


def apply_all(
    rule: Callable[..., torch.Tensor], first: Tensors, *further: Tensors, elementwise: bool = True
) -> DerivedTensors:
    """Apply a rule to the corresponding tensors of any number of checkpoints, such as `trim` to deltas.

    Args:
        rule: Computes a tensor from one tensor of each checkpoint, in the shape of the first.
        first: The checkpoint whose names, shapes and dtypes the result has.
        further: The checkpoints of the further operands.
        elementwise: Whether the rule can be applied to slices of flattened tensors.

    Raises:
        MismatchError: A checkpoint lacks a tensor, or a tensor has different shapes.
    """
    aligned = [(tensors, align(tensors, first)) for tensors in further]
    missing = sorted(name for name in first if any(name not in names for _, names in aligned))
    if missing:
        raise MismatchError(f"{len(missing)} tensors are not in all checkpoints: {', '.join(missing[:4])}.")
    _check_shapes(first, *aligned)
    specs = {}
    for name in first:
        operands = ((first, name), *((tensors, names[name]) for tensors, names in aligned))
        specs[name] = TensorSpec(output_dtype(first, name), shape_of(first, name), operands, rule, elementwise)
    return DerivedTensors(specs)


def _spec_like(
    template: Tensors, name: str, operands: tuple[tuple[Tensors, str], ...], rule: Callable[..., torch.Tensor]
) -> TensorSpec:
    return TensorSpec(output_dtype(template, name), shape_of(template, name), operands, rule)


def _copy(tensors: Tensors, name: str) -> TensorSpec:
    return TensorSpec(output_dtype(tensors, name), shape_of(tensors, name), ((tensors, name),))


def _scale_of(scale: float | Mapping[str, float], name: str) -> float:
    if isinstance(scale, int | float):
        return scale
    return next((factor for pattern, factor in scale.items() if fnmatch.fnmatchcase(name, pattern)), 1.0)


def _check_finite_factors(name: str, *factors: float) -> None:
    for factor in factors:
        if not math.isfinite(factor):
            raise RecipeError(f"{name} must be a finite number, found {factor}.")


def _check_shapes(reference: Tensors, *aligned: tuple[Tensors, Mapping[str, str]]) -> None:
    differing = [
        f"{name}: {shape_of(reference, name)} and {shape_of(tensors, other)}"
        for tensors, names in aligned
        for name, other in names.items()
        if shape_of(reference, name) != shape_of(tensors, other)
    ]
    if differing:
        raise MismatchError(f"{len(differing)} tensors have different shapes: {'; '.join(differing[:4])}.")


def _check_common(names: Mapping[str, str]) -> None:
    if not names:
        raise MismatchError("no tensor has the same name in both: these checkpoints are not of one architecture.")
