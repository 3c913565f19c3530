"""Grafts whose delta is changed on the way, tensor by tensor: what methods of pure arithmetic have in common."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from regraft.adaptation.graft import graft_body, grafted_adapter, notes_of, write_carried
from regraft.adaptation.head import stored_labels
from regraft.adaptation.layout import lay_out
from regraft.adaptation.lora import PARTS
from regraft.architecture import architecture_of
from regraft.errors import KindError
from regraft.weights import delta, lora_delta, low_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.adaptation.layout import Update
    from regraft.architecture import Architecture
    from regraft.base import Base
    from regraft.progress import Progress
    from regraft.upgrade import Upgrade

    Rule = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]

REWORKABLE = ("full", "lora")


def write_rework(
    adaptation: Adaptation, upgrade: Upgrade, rule: Rule, into: Path, progress: Progress, *, replace: bool = False
) -> dict[str, list[str]]:
    """Write old tuned weights for the new base, every delta changed by a rule: new + rule(delta); the head is copied.

    Of a LoRA the rule gets the dense delta scaling·B·A of each layer, and the closest LoRA of the same rank is written;
    one that took its start out of the old base is written as a plain one. Where the upgrade left a tensor exactly as it
    was, its delta stays as it is, to the bit.

    Args:
        adaptation: What was tuned on `upgrade.old`.
        upgrade: The two bases.
        rule: Gives the delta to add, of the name inside the body, the delta (tuned − old) and the upgrade's shift
            (new − old), both in float32 or float64 and laid out as the tensor is; it may be called from several threads
            at once.
        into: The folder to fill, plain transformers or PEFT.
        progress: Told of each tensor.
        replace: Whether what an adapter stores in place of its base's tensors stays as it is stored.

    Returns:
        Tensors that the outcome's notes name, as `write_graft` does.

    Raises:
        MismatchError: A tensor of the body is not in the bases, or has another shape there.
        KindError: The adaptation's kind has no deltas of its base's tensors.
    """
    check_reworkable(adaptation)
    if adaptation.kind == "full":

        def rule_of(name: str) -> Callable[..., torch.Tensor]:
            return functools.partial(_add_reworked, name=name, rule=rule)

        body = graft_body(adaptation, upgrade, rule_of, elementwise=False)
        write_carried(adaptation, upgrade, body, {}, into, progress)
        return notes_of(adaptation, upgrade, ())
    stored, config, replaced = grafted_adapter(adaptation, upgrade, replace=replace)
    as_loaded, updates = lay_out(stored, config, _classifier(adaptation, upgrade.new))
    if as_loaded.keys() != stored.keys():
        raise KindError(
            f"{adaptation.path}: stores a LoRA for every expert by itself, which the installed transformers has no "
            "place for. Load it with PEFT and save it again."
        )
    reworked = _rework_lora(stored, updates, upgrade, rule, progress)
    write_carried(adaptation, upgrade, reworked, config, into, progress)
    return notes_of(adaptation, upgrade, replaced)


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


def _add_reworked(new: torch.Tensor, tuned: torch.Tensor, old: torch.Tensor, name: str, rule: Rule) -> torch.Tensor:
    import torch

    if torch.equal(new, old):
        return tuned
    return new.double() + rule(name, delta(tuned, old), delta(new, old)).double()


def _rework_lora(
    adapter: Mapping[str, torch.Tensor],
    updates: Mapping[str, Update],
    upgrade: Upgrade,
    rule: Rule,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    import torch

    result = {name: adapter[name] for name in adapter}
    factors = {name: update for name, update in updates.items() if update.kind in ("factors", "experts")}
    for done, (name, update) in enumerate(factors.items(), 1):
        inner = name.removeprefix(upgrade.old.prefix + ".")
        shift = shift_of(upgrade, inner)
        if shift is not None:
            b_name, a_name = update.operands
            shapes = result[b_name].shape, result[a_name].shape
            experts = len(shift) if update.kind == "experts" else 1
            b = result[b_name].reshape(len(result[b_name]), -1, experts).permute(2, 0, 1)  # as PEFT keeps them
            a = result[a_name].reshape(experts, -1, shapes[1][1])
            dense = lora_delta(b, a, update.scale)
            dense = dense.mT if update.turned else dense
            reworked = rule(inner, dense.reshape(shift.shape), shift).reshape(dense.shape)
            if not torch.equal(reworked, dense):
                changes = (reworked.mT if update.turned else reworked).double() / update.scale
                pairs = [_closest(*of_one) for of_one in zip(changes, a, b, strict=True)]
                result[a_name] = torch.stack([a for a, _ in pairs]).reshape(shapes[1])
                result[b_name] = torch.stack([b for _, b in pairs]).permute(1, 2, 0).reshape(shapes[0])
        progress("graft", done, len(factors), {})
    return result


def _classifier(adaptation: Adaptation, base: Base) -> Architecture:
    """Build the class of classifiers that an adapter was tuned in, of as many labels."""
    from transformers import AutoModelForSequenceClassification

    config, labels = copy.deepcopy(base.config), stored_labels(adaptation, base)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    if base.own_rows:
        config.get_text_config().vocab_size = base.own_rows
    auto: Any = AutoModelForSequenceClassification
    return architecture_of(config, auto._model_mapping[type(config)].__name__)


def _closest(change: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the A and B closest to a change, in the shapes and dtypes of those there were."""
    found_b, found_a = low_rank(change, rank=len(a))
    new_a, new_b = a.new_zeros(a.shape), b.new_zeros(b.shape)  # a rank above what the change can have is filled up
    new_a[: len(found_a)], new_b[:, : found_b.shape[1]] = found_a.to(a), found_b.to(b)
    return new_a, new_b
