"""What an adapter stores in place of its base's tensors: embeddings, norms, biases, rows of tokens, DoRA's magnitudes.

Loaded onto another base, such a tensor would undo what the upgrade changed in it. It is a delta against the old base
like everything else that was tuned, and grafted as one.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from regraft.adaptation.head import model_name
from regraft.checkpoint import Derived, Entry, dtype_of, shape_of
from regraft.errors import MismatchError
from regraft.weights import graft

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.upgrade import Base, Upgrade

MAGNITUDE = ".lora_magnitude_vector"
TOKENS = ".trainable_tokens_delta"  # rows as they are, whatever its name says
# what PEFT puts between a module's name and its parameter's where it wraps the module
WRAPPER = re.compile(r"\.(?:base_layer|ln_tuning_layers|modules_to_save(?:\.default)?|original_module|token_adapter)\b")


def replaced_parameter(stored: str, base: Base) -> str | None:
    """Return which parameter of the body an adapter's tensor takes the place of, in part or whole.

    Args:
        stored: The tensor's name in the adapter.
        base: A base of the adapter's architecture.

    Returns:
        The parameter's name in memory inside the body; None for a tensor that adds to the base's, as A and B of a LoRA,
        and for a head.
    """
    name = WRAPPER.sub("", model_name(stored).removesuffix(".weight" if MAGNITUDE in stored else ""))
    for part in (MAGNITUDE, TOKENS):
        if name.endswith(part):
            name = name.removesuffix(part) + ".weight"
    inner = name.removeprefix(f"{base.prefix}.")
    return inner if inner in base.parameters else None


def graft_replaced(
    adaptation: Adaptation, tensors: Mapping[str, torch.Tensor], upgrade: Upgrade
) -> tuple[Mapping[str, torch.Tensor], tuple[str, ...]]:
    """Graft what an adapter stores in place of its base's tensors: new + (stored − old).

    A magnitude m of a DoRA, the length of each of the weight's rows, becomes ‖W_new‖ + (m − ‖W_old‖).

    Args:
        adaptation: Any but a full fine-tune.
        tensors: Its tensors by stored name, or what they became so far.
        upgrade: The two bases.

    Returns:
        The tensors for the new base, and the names of those that were grafted.

    Raises:
        MismatchError: A tensor has another shape than the base's, or rows of tokens that the base does not have.
    """
    replaced = {name: inner for name in tensors if (inner := replaced_parameter(name, upgrade.old)) is not None}
    if not replaced:
        return tensors, ()
    old, new = upgrade.old.parameters, upgrade.new.parameters
    entries = {}
    for name in tensors:
        shape, rule = shape_of(tensors, name), _same
        operands: tuple[tuple[Mapping[str, torch.Tensor], str], ...] = ((tensors, name),)
        if name in replaced:
            inner = replaced[name]
            operands = ((new, inner), (tensors, name), (old, inner))
            rule, expected = _rule_of(name, inner, adaptation, upgrade)
            if shape != expected:
                raise MismatchError(
                    f"{adaptation.path}: tensor {name!r} has shape {shape}, and takes the place of {inner!r} in "
                    f"{upgrade.old.path}, where {expected} is expected. Was it tuned on that base?"
                )
        entries[name] = Entry(dtype_of(tensors, name), shape, operands, rule, elementwise=False)
    return Derived(entries), tuple(replaced)


def _rule_of(
    name: str, inner: str, adaptation: Adaptation, upgrade: Upgrade
) -> tuple[Callable[..., torch.Tensor], tuple[int, ...]]:
    """Return what makes a tensor from the new base's, the stored and the old one, and the shape that it has."""
    shape = shape_of(upgrade.old.parameters, inner)
    if TOKENS in name:
        rows = token_rows(adaptation, model_name(name).split(".token_adapter")[0].removesuffix(TOKENS))
        if rows and not 0 <= min(rows) <= max(rows) < shape[0]:
            raise MismatchError(
                f"{adaptation.path}: was tuned on the rows of tokens up to {max(rows)}, and {upgrade.old.path} has "
                f"{shape[0]:,} rows. Was it tuned on that base?"
            )
        return functools.partial(_graft_rows, rows=rows), (len(rows), *shape[1:])
    if MAGNITUDE in name:
        module = upgrade.old.architecture.model.get_submodule(inner.removesuffix(".weight"))
        along = 1 if type(module).__name__ == "Linear" else 0  # PEFT turns the weights of Conv1D and of embeddings
        return functools.partial(_graft_lengths, along=along), (shape[1 - along],)
    return graft, shape


def token_rows(adaptation: Adaptation, module: str) -> list[int]:
    """Return the ids of the tokens that an adapter tuned, in the order of its rows.

    Args:
        adaptation: A LoRA with `trainable_token_indices`, or one of PEFT's trainable tokens.
        module: The name of the embeddings in the model.

    Returns:
        The ids.
    """
    rows = adaptation.config.get("trainable_token_indices") or adaptation.config.get("token_indices") or []
    if isinstance(rows, dict):  # by the end of the module's name
        rows = next((ids for end, ids in rows.items() if module == end or module.endswith(f".{end}")), [])
    return list(rows)


def _graft_rows(new: torch.Tensor, stored: torch.Tensor, old: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return graft(new[rows], stored, old[rows])


def _graft_lengths(new: torch.Tensor, stored: torch.Tensor, old: torch.Tensor, along: int) -> torch.Tensor:
    return graft(new.double().norm(dim=along), stored, old.double().norm(dim=along))


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
