"""Grafts whose delta is changed on the way, tensor by tensor: what methods of pure arithmetic have in common."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from regraft.adaptation.graft import graft_body, grafted_adapter, write_carried
from regraft.adaptation.lora import PARTS, START
from regraft.adaptation.merge import lora_scaling
from regraft.errors import KindError
from regraft.weights import delta, lora_delta, low_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.progress import Progress
    from regraft.upgrade import Base, Upgrade

    Rule = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]

REWORKABLE = ("full", "lora")


def write_rework(adaptation: Adaptation, upgrade: Upgrade, rule: Rule, into: Path, progress: Progress) -> None:
    """Write old tuned weights for the new base, every delta changed by a rule: new + rule(delta); the head is copied.

    Of a LoRA the rule gets the dense delta scaling·B·A of each layer, and the closest LoRA of the same rank is written;
    one that took its start out of the old base is written as a plain one. Where the upgrade left a tensor exactly as it
    was, its delta stays as it is, to the bit.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        rule: Gives the delta to add, of the name inside the body, the delta (tuned − old) and the upgrade's shift
            (new − old), both in float32 or float64; it may be called from several threads at once.
        into: The folder to fill, plain transformers or PEFT.
        progress: Told of each tensor.

    Raises:
        MismatchError: A tensor of the body is not in the bases, or has another shape there.
        RecipeError: The adaptation's kind has no deltas of its base's tensors.
    """
    check_reworkable(adaptation)
    if adaptation.kind == "full":

        def rule_of(name: str) -> Callable[..., torch.Tensor]:
            return functools.partial(_add_reworked, name=name, rule=rule)

        body = graft_body(adaptation, upgrade, rule_of, elementwise=False)
        write_carried(adaptation, upgrade, body, {}, into, progress)
    else:
        stored, config, _ = grafted_adapter(adaptation, upgrade)
        reworked = _rework_lora(stored, config, upgrade, rule, progress)
        write_carried(adaptation, upgrade, reworked, config, into, progress)


def check_reworkable(adaptation: Adaptation, kinds: tuple[str, ...] = REWORKABLE) -> None:
    """Refuse kinds that are no change of their base's tensors.

    Args:
        adaptation: The tuned weights.
        kinds: Those that can be worked on.

    Raises:
        KindError: It is of another kind, or a LoRA that is more than B·A.
    """
    kind = "dora" if adaptation.config.get("use_dora") else adaptation.kind
    if kind not in kinds:
        raise KindError(
            f"{adaptation.path}: this method works on the deltas of kinds {', '.join(kinds)}; a {kind} it cannot "
            "carry. Take direct or init, or convert it to full or lora first."
        )
    infos = adaptation.checkpoint.tensors
    strange = [n for n in infos if ".lora_" in n and (not n.endswith(PARTS[:2]) or len(infos[n].shape) != 2)]
    if kind == "lora" and strange:
        raise KindError(
            f"{adaptation.path}: tensor {strange[0]!r} is no B or A of a linear layer. Take direct or init, or convert "
            "it to full first."
        )


def shift_of(upgrade: Upgrade, inner: str) -> torch.Tensor | None:
    """Give what the upgrade changed in a tensor of the body.

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


def inner_name(stored: str, base: Base) -> str:
    """Give the name inside the body of the weight that a LoRA's A or B belongs to.

    Args:
        stored: The name of A or B in `adapter_model.safetensors`.
        base: The base.

    Returns:
        As in `encoder.layer.0.attention.self.query.weight`.
    """
    module = stored.removeprefix(START).removesuffix(PARTS[0]).removesuffix(PARTS[1])
    return f"{module}.weight".removeprefix(base.prefix + ".")


def _add_reworked(new: torch.Tensor, tuned: torch.Tensor, old: torch.Tensor, name: str, rule: Rule) -> torch.Tensor:
    import torch

    if torch.equal(new, old):
        return tuned
    return new.double() + rule(name, delta(tuned, old), delta(new, old)).double()


def _rework_lora(
    stored: Mapping[str, torch.Tensor], config: Mapping[str, Any], upgrade: Upgrade, rule: Rule, progress: Progress
) -> dict[str, torch.Tensor]:
    import torch

    result = {name: stored[name] for name in stored}
    factors = [name for name in stored if name.endswith(PARTS[0])]
    for done, a_name in enumerate(factors, 1):
        module = a_name.removesuffix(PARTS[0])
        b_name, inner = module + PARTS[1], inner_name(a_name, upgrade.old)
        shift = shift_of(upgrade, inner)
        if shift is not None:
            a, b = result[a_name], result[b_name]
            factor = lora_scaling(config, module.removeprefix(START), len(a))
            dense = lora_delta(b, a, factor)
            reworked = rule(inner, dense, shift.T if _is_turned(upgrade.old, inner) else shift)
            if not torch.equal(reworked, dense):
                result[a_name], result[b_name] = _closest(reworked.double() / factor, a, b)
        progress("graft", done, len(factors), {})
    return result


def _is_turned(base: Base, inner: str) -> bool:
    """Tell whether a layer keeps its weight as [in, out]; a LoRA's config has one flag for layers of both kinds."""
    return type(base.architecture.model.get_submodule(inner.rpartition(".")[0])).__name__ == "Conv1D"


def _closest(change: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the A and B closest to a change, in the shapes and dtypes of those there were."""
    found_b, found_a = low_rank(change, rank=len(a))
    new_a, new_b = a.new_zeros(a.shape), b.new_zeros(b.shape)  # a rank above what the change can have is filled up
    new_a[: len(found_a)], new_b[:, : found_b.shape[1]] = found_a.to(a), found_b.to(b)
    return new_a, new_b
