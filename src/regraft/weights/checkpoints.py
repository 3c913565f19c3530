"""Arithmetic on checkpoints, whose result is computed tensor by tensor as it is written."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from regraft.checkpoint import FLOATING, DerivedTensors, TensorSpec, dtype_of, output_dtype, shape_of
from regraft.errors import MAX_LISTED, MismatchError, RecipeError
from regraft.weights.delta import delta, graft, interpolate
from regraft.weights.names import NamedTensors, align, is_optional
from regraft.weights.vocabulary import graft_rows, has_vocabulary_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from regraft.checkpoint.derived import Tensors
    from regraft.weights.vocabulary import RowMatch


@dataclasses.dataclass(frozen=True)
class Counterparts:
    """The tensors of two bases that correspond to the tensors of a fine-tune.

    Args:
        new: The names of the new base's tensors, by the fine-tune's names.
        old: The names of the old base's tensors, by the fine-tune's names.
        unmatched: The names of fine-tuned tensors that only one base has: poolers, which pre-training may leave out.
    """

    new: dict[str, str]
    old: dict[str, str]
    unmatched: tuple[str, ...]


def counterparts(new: Tensors, tuned: Tensors, old: Tensors) -> Counterparts:
    """Pair the tensors of a fine-tune with the tensors of two bases.

    Args:
        new: The tensors of the new base.
        tuned: The tensors of a fine-tune of the old base.
        old: The tensors of the old base.

    Returns:
        The corresponding tensors. A tied tensor has the counterparts of the tensor that it is tied to.

    Raises:
        MismatchError: Only one base has a tensor of the fine-tune; the fine-tune lacks a tensor of both bases, or ties
            tensors that are separate in the new base; or no tensors correspond.
    """
    in_new, in_old = align(new, tuned), align(old, tuned)
    keys = tuned.key_by_name if isinstance(tuned, NamedTensors) else {name: name for name in tuned}
    unpaired = sorted(in_new.keys() ^ in_old.keys())
    unmatched = tuple(name for name in unpaired if is_optional(keys[name]))
    for role, names in (("new", in_new), ("old", in_old)):
        missing = [name for name in unpaired if name in names and name not in unmatched]
        if missing:
            listed = ", ".join(missing[:MAX_LISTED])
            raise MismatchError(
                f"{len(missing)} tuned tensors are in one base only, the {role} one: {listed}. Use the base that the "
                "weights were tuned on, and the one pre-trained further from it."
            )
    _check_common(in_new)
    if isinstance(new, NamedTensors) and isinstance(tuned, NamedTensors) and isinstance(old, NamedTensors):
        _check_complete(new, tuned, old)
    matched = [name for name in in_new if name not in unmatched]
    return Counterparts(
        new={name: in_new[name] for name in matched}, old={name: in_old[name] for name in matched}, unmatched=unmatched
    )


def _check_complete(new: NamedTensors, tuned: NamedTensors, old: NamedTensors) -> None:
    """Refuse a fine-tune that lacks a tensor of both bases, or ties tensors that are separate in the new base."""
    common = {new.key_by_name[name] for name in new} & {old.key_by_name[name] for name in old}
    absent = common & set(tuned.expected) - tuned.names.keys()
    required = sorted(key for key in absent if not is_optional(key))
    if required:
        raise MismatchError(
            f"the fine-tune lacks {len(required)} tensors of its bases: {', '.join(required[:MAX_LISTED])}. "
            "Use the complete model that was tuned."
        )
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
    match: RowMatch | None = None,
) -> DerivedTensors:
    """Graft the delta of every tuned tensor: new + λ·(tuned − old).

    Tensors that a base lacks, such as heads and poolers, and integer tensors are copied from the fine-tune.

    Args:
        new: The tensors of the new base.
        tuned: The tensors of a fine-tune of the old base.
        old: The tensors of the old base.
        scale: The factor λ; or factors by name pattern, such as `*.attention.*`. The first pattern that matches a
            tensor's name counts; without a match, λ is 1.
        match: The match of the vocabularies' rows by token; None if they are the same.

    Returns:
        The grafted tensors, with the names and dtypes of `tuned` (bfloat16 for quantised ones).

    Raises:
        MismatchError: A tensor has different shapes, or the tensors do not correspond (see `counterparts`).
        RecipeError: λ is infinite or NaN.
    """
    _check_finite_factors("λ", *(scale.values() if isinstance(scale, Mapping) else (scale,)))
    pairs = counterparts(new, tuned, old)
    token_tensors = _token_tensors(tuned) if match is not None else frozenset()
    for base, base_names in ((new, pairs.new), (old, pairs.old)):
        _check_shapes(tuned, base, {name: base_names[name] for name in base_names if name not in token_tensors})
    specs = {}
    for name in tuned:
        is_grafted = name in pairs.new and dtype_of(tuned, name) in FLOATING
        if not is_grafted:
            specs[name] = _copy(tuned, name)
            continue
        operands = ((new, pairs.new[name]), (tuned, name), (old, pairs.old[name]))
        rule = functools.partial(graft, scale=_scale_of(scale, name))
        if match is not None and name in token_tensors:
            row_rule = functools.partial(graft_rows, match=match, rule=rule)
            shape = match.shape(shape_of(tuned, name))
            specs[name] = TensorSpec(output_dtype(tuned, name), shape, operands, row_rule, elementwise=False)
        else:
            specs[name] = _spec_like(tuned, name, operands, rule)
    return DerivedTensors(specs)


def _token_tensors(tensors: Tensors) -> frozenset[str]:
    if isinstance(tensors, NamedTensors):
        return tensors.token_tensors
    return frozenset(name for name in tensors if has_vocabulary_rows(name))


def delta_all(tuned: Tensors, old: Tensors) -> DerivedTensors:
    """Return the delta of every tuned tensor: tuned − old, in float32 or wider.

    Args:
        tuned: The tensors of a fine-tune of the old base.
        old: The tensors of the old base.

    Returns:
        The deltas, with the names of `tuned`. Integer tensors and tensors that the base lacks, such as heads, are left
        out.

    Raises:
        MismatchError: A tensor has different shapes, or no tensors correspond.
    """
    in_old = align(old, tuned)
    _check_shapes(tuned, old, in_old)
    _check_common(in_old)
    specs = {}
    for name, old_name in in_old.items():
        tuned_dtype = dtype_of(tuned, name)
        if tuned_dtype in FLOATING:
            dtype = "F64" if "F64" in (tuned_dtype, dtype_of(old, old_name)) else "F32"
            specs[name] = TensorSpec(dtype, shape_of(tuned, name), ((tuned, name), (old, old_name)), delta)
    return DerivedTensors(specs)


def interpolate_all(first: Tensors, second: Tensors, t: float) -> DerivedTensors:
    """Interpolate linearly between two checkpoints: (1 − t)·first + t·second.

    Args:
        first: The checkpoint at t = 0.
        second: The checkpoint at t = 1.
        t: The coefficient of the second checkpoint; values outside 0 to 1 extrapolate.

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
        raise MismatchError(
            f"{len(unmatched)} tensors are in one of the two only: {', '.join(unmatched[:MAX_LISTED])}. "
            "Use checkpoints of one architecture."
        )
    _check_shapes(first, second, in_second)
    rule = functools.partial(interpolate, t=t)
    specs = {}
    for name in first:
        if dtype_of(first, name) in FLOATING:
            specs[name] = _spec_like(first, name, ((first, name), (second, in_second[name])), rule)
        else:
            specs[name] = _copy(first, name)
    return DerivedTensors(specs)


def apply_all(
    rule: Callable[..., torch.Tensor], first: Tensors, *further: Tensors, elementwise: bool = True
) -> DerivedTensors:
    """Apply a rule to the corresponding tensors of one or more checkpoints, such as `trim` to deltas.

    Args:
        rule: Computes a tensor from the corresponding tensors, in their shape.
        first: The checkpoint of the first operands.
        further: The checkpoints of the other operands.
        elementwise: Whether the rule can be applied to flat slices of the tensors.

    Returns:
        The tensors, with the names, shapes and dtypes of `first` (bfloat16 for quantised ones).

    Raises:
        MismatchError: A checkpoint lacks a tensor, or a tensor has different shapes.
    """
    aligned = [(tensors, align(tensors, first)) for tensors in further]
    missing = sorted(name for name in first if any(name not in names for _, names in aligned))
    if missing:
        raise MismatchError(
            f"{len(missing)} tensors are not in all checkpoints: {', '.join(missing[:MAX_LISTED])}. Use "
            "checkpoints of one architecture."
        )
    for tensors, names in aligned:
        _check_shapes(first, tensors, names)
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


def _check_shapes(reference: Tensors, tensors: Tensors, names: Mapping[str, str]) -> None:
    """Refuse tensors that differ in shape from the reference; `names` are their names by the reference's names."""
    differing = []
    for reference_name, name in names.items():
        expected, actual = shape_of(reference, reference_name), shape_of(tensors, name)
        if expected != actual:
            differing.append(f"{reference_name}: {expected} and {actual}")
    if differing:
        raise MismatchError(
            f"{len(differing)} tensors have different shapes: {'; '.join(differing[:MAX_LISTED])}. Use "
            "checkpoints of one architecture and size."
        )


def _check_common(names: Mapping[str, str]) -> None:
    if not names:
        raise MismatchError("no tensor has the same name in both checkpoints. Use checkpoints of one architecture.")
