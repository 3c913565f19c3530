"""Transforming the factors of a LoRA by a rule for the dense deltas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.adaptation.update import Factors
from regraft.weights import delta, lora_delta, low_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from regraft.adaptation.adaptation import Rule
    from regraft.adaptation.update import Update
    from regraft.checkpoint.derived import Tensors
    from regraft.progress import Progress
    from regraft.upgrade import Upgrade


def parameter_shift(upgrade: Upgrade, inner: str) -> torch.Tensor | None:
    """Return the upgrade's shift of a parameter of the body.

    Args:
        upgrade: The two bases.
        inner: The parameter's name inside the body.

    Returns:
        New − old, in float64 if one of them is in float64, and in float32 otherwise; of a tensor with a row per token,
        for the rows of common tokens only. None if a base lacks the parameter, or if the two are equal.
    """
    import torch

    old, new = upgrade.old, upgrade.new
    if inner not in old.parameters or inner not in new.parameters:
        return None
    old_value, new_value = upgrade.shared_rows(inner, old.parameters[inner], new.parameters[inner])
    return None if torch.equal(old_value, new_value) else delta(new_value, old_value)


def transform_factors(
    adapter: Tensors, updates: Mapping[str, Update], upgrade: Upgrade, rule: Rule, progress: Progress
) -> dict[str, torch.Tensor]:
    """Apply a rule to the deltas of a LoRA.

    Args:
        adapter: The tensors by stored name, on the new base.
        updates: The updates by parameter, from `resolve_updates`.
        upgrade: The two bases.
        rule: The rule, as in `write_transform`.
        progress: Called for each layer.

    Returns:
        The tensors. The factors of a delta that the rule changes are the best approximation of the same rank.
    """
    import torch

    result = {name: adapter[name] for name in adapter}
    factors = {name: update for name, update in updates.items() if isinstance(update, Factors)}
    for number, (name, update) in enumerate(factors.items(), 1):
        inner = name.removeprefix(upgrade.old.prefix + ".")
        shift = parameter_shift(upgrade, inner)
        if shift is not None:
            b_name, a_name = update.operands
            shapes = result[b_name].shape, result[a_name].shape
            experts = update.num_products(shift)
            b = result[b_name].reshape(len(result[b_name]), -1, experts).permute(2, 0, 1)  # PEFT's layout
            a = result[a_name].reshape(experts, -1, shapes[1][1])
            dense = lora_delta(b, a, update.scale)
            dense = dense.mT if update.transposed else dense
            transformed = rule(inner, dense.reshape(shift.shape), shift).reshape(dense.shape)
            if not torch.equal(transformed, dense):
                changes = (transformed.mT if update.transposed else transformed).double() / update.scale
                pairs = [_closest_factors(*expert) for expert in zip(changes, a, b, strict=True)]
                result[a_name] = torch.stack([a for a, _ in pairs]).reshape(shapes[1])
                result[b_name] = torch.stack([b for _, b in pairs]).permute(1, 2, 0).reshape(shapes[0])
        progress("graft", number, len(factors), {})
    return result


def _closest_factors(change: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the A and B that are closest to a delta, in the shapes and dtypes of `a` and `b`."""
    best_b, best_a = low_rank(change, rank=len(a))
    new_a, new_b = a.new_zeros(a.shape), b.new_zeros(b.shape)  # zeros pad a rank beyond that of the delta
    new_a[: len(best_a)], new_b[:, : best_b.shape[1]] = best_a.to(a), best_b.to(b)
    return new_a, new_b
