"""The factors of a LoRA, changed layer by layer as a rule changes the dense delta that they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.adaptation.update import Factors
from regraft.weights import delta, lora_delta, low_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from regraft.adaptation.adaptation import Rule, Tensors
    from regraft.adaptation.update import Update
    from regraft.progress import Progress
    from regraft.upgrade import Upgrade


def parameter_shift(upgrade: Upgrade, inner: str) -> torch.Tensor | None:
    """Return what the upgrade changed in a tensor of the body.

    Args:
        upgrade: The two bases.
        inner: The tensor's name inside the body.

    Returns:
        New minus old in float32 (float64 where one of them is); None if a base lacks it or the two are equal.
    """
    import torch

    old, new = upgrade.old, upgrade.new
    if inner not in old.parameters or inner not in new.parameters:
        return None
    before, after = upgrade.shared_rows(inner, old.parameters[inner], new.parameters[inner])
    return None if torch.equal(before, after) else delta(after, before)


def transform_factors(
    adapter: Tensors, updates: Mapping[str, Update], upgrade: Upgrade, rule: Rule, progress: Progress
) -> dict[str, torch.Tensor]:
    """Change the factors of a LoRA so that their products are what a rule makes of them.

    Args:
        adapter: Its tensors by stored name, on the new base.
        updates: What each does, by parameter, from `resolve_updates`.
        upgrade: The two bases.
        rule: As in `write_transform`.
        progress: Told of each layer.

    Returns:
        The tensors: the closest factors of the same rank where the rule changes a product, as they are elsewhere.
    """
    import torch

    result = {name: adapter[name] for name in adapter}
    factors = {name: update for name, update in updates.items() if isinstance(update, Factors)}
    for done, (name, update) in enumerate(factors.items(), 1):
        inner = name.removeprefix(upgrade.old.prefix + ".")
        shift = parameter_shift(upgrade, inner)
        if shift is not None:
            b_name, a_name = update.operands
            shapes = result[b_name].shape, result[a_name].shape
            experts = update.count(shift)
            b = result[b_name].reshape(len(result[b_name]), -1, experts).permute(2, 0, 1)  # as PEFT keeps them
            a = result[a_name].reshape(experts, -1, shapes[1][1])
            dense = lora_delta(b, a, update.scale)
            dense = dense.mT if update.transposed else dense
            transformed = rule(inner, dense.reshape(shift.shape), shift).reshape(dense.shape)
            if not torch.equal(transformed, dense):
                changes = (transformed.mT if update.transposed else transformed).double() / update.scale
                pairs = [_closest(*of_one) for of_one in zip(changes, a, b, strict=True)]
                result[a_name] = torch.stack([a for a, _ in pairs]).reshape(shapes[1])
                result[b_name] = torch.stack([b for _, b in pairs]).permute(1, 2, 0).reshape(shapes[0])
        progress("graft", done, len(factors), {})
    return result


def _closest(change: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the A and B closest to a change, in the shapes and dtypes of those there were."""
    best_b, best_a = low_rank(change, rank=len(a))
    new_a, new_b = a.new_zeros(a.shape), b.new_zeros(b.shape)  # a rank above what the change can have is filled up
    new_a[: len(best_a)], new_b[:, : best_b.shape[1]] = best_a.to(a), best_b.to(b)
    return new_a, new_b
