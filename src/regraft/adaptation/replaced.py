"""What an adapter stores in place of its base's tensors: embeddings, norms, biases, rows of tokens, DoRA's magnitudes.

Loaded onto another base, such a tensor would undo what the upgrade changed in it. It is a delta against the old base
like everything else that was tuned, and grafted as one.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import model_name
from regraft.checkpoint import DerivedTensors, TensorSpec, dtype_of, shape_of
from regraft.errors import MismatchError
from regraft.weights import graft, graft_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.upgrade import Upgrade
    from regraft.weights import RowMatch

    Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

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
    adaptation: Adaptation,
    tensors: Mapping[str, torch.Tensor],
    upgrade: Upgrade,
    match: RowMatch | None = None,
    *,
    replace: bool = False,
) -> tuple[Mapping[str, torch.Tensor], tuple[str, ...]]:
    """Graft what an adapter stores in place of its base's tensors: new + (stored − old).

    A magnitude m of a DoRA, the length of each of the weight's rows, becomes ‖W_new‖ + (m − ‖W_old‖).

    Args:
        adaptation: Any but a full fine-tune.
        tensors: Its tensors by stored name, or what they became so far.
        upgrade: The two bases.
        match: How the rows of the vocabularies match, if they are not the same.
        replace: Whether they stay as they are stored, token by token.

    Returns:
        The tensors for the new base, and the names of those that were grafted.

    Raises:
        MismatchError: A tensor has another shape than the base's, or rows of tokens that the base does not have.
    """
    inners = {name: inner for name in tensors if (inner := replaced_parameter(name, upgrade.old)) is not None}
    replaced = {name: inner for name, inner in inners.items() if inner in upgrade.new.parameters}
    if match is None and (replace or not replaced):
        return tensors, ()
    old, new = upgrade.old.parameters, upgrade.new.parameters
    entries = {}
    for name in tensors:
        dtype, shape = dtype_of(tensors, name), shape_of(tensors, name)
        if name in replaced:
            inner = replaced[name]
            rule, expected, grafted = _rule_of(name, inner, adaptation, upgrade, match, _stored if replace else graft)
            if shape != expected:
                raise MismatchError(
                    f"{adaptation.path}: tensor {name!r} has shape {shape}, and takes the place of {inner!r} in "
                    f"{upgrade.old.path}, where {expected} is expected. Was it tuned on that base?"
                )
            if 0 not in grafted:  # else the new base has none of the tokens
                operands = ((new, inner), (tensors, name), (old, inner))
                entries[name] = TensorSpec(dtype, grafted, operands, rule, elementwise=False)
        elif match is not None and name.endswith(".lora_embedding_A"):  # a column for each token
            columns = functools.partial(_columns, rows=match.tuned_row_indices)
            entries[name] = TensorSpec(
                dtype, (shape[0], len(match.tuned_row_indices)), ((tensors, name),), columns, elementwise=False
            )
        else:
            entries[name] = TensorSpec(dtype, shape, ((tensors, name),))
    return DerivedTensors(entries), () if replace else tuple(name for name in replaced if name in entries)


def renumbered_settings(
    adaptation: Adaptation, settings: Mapping[str, Any], match: RowMatch | None
) -> Mapping[str, Any]:
    """Name the tokens that an adapter tuned by their ids in the grafted vocabulary.

    Args:
        adaptation: Any but a full fine-tune.
        settings: The content of its `adapter_config.json`, or what it became so far.
        match: How the rows of the vocabularies match, if they are not the same.

    Returns:
        The settings; tokens that the new base no longer has are left out.
    """
    if match is None:
        return settings
    ids = {tuned: row for row, tuned in enumerate(match.tuned_row_indices) if tuned >= 0}

    def renumbered(rows: Any) -> Any:
        if isinstance(rows, dict):
            return {module: ids_of for module, each in rows.items() if (ids_of := renumbered(each))} or None
        return [ids[row] for row in rows if row in ids] or None

    named = {key: settings[key] for key in ("trainable_token_indices", "token_indices") if settings.get(key)}
    return {**settings, **{key: renumbered(rows) for key, rows in named.items()}}


def _rule_of(
    name: str, inner: str, adaptation: Adaptation, upgrade: Upgrade, match: RowMatch | None, rule: Rule
) -> tuple[Callable[..., torch.Tensor], tuple[int, ...], tuple[int, ...]]:
    """Return what makes a tensor from the new base's, the stored and the old one, and its shape before and after.

    The rule makes rows, or all of a tensor, of those three.
    """
    shape = shape_of(upgrade.old.parameters, inner)
    if TOKENS in name:
        rows = token_rows(adaptation, model_name(name).split(".token_adapter")[0].removesuffix(TOKENS))
        count = shape[0] if match is None else match.num_tuned_rows
        if rows and not 0 <= min(rows) <= max(rows) < count:
            raise MismatchError(
                f"{adaptation.path}: was tuned on the rows of tokens up to {max(rows)}, and {upgrade.old.path} has "
                f"{count:,} rows. Was it tuned on that base?"
            )
        sides = [(row, row, position) for position, row in enumerate(rows)]
        if match is not None:
            at = {tuned: i for i, tuned in enumerate(match.tuned_row_indices) if tuned >= 0}
            sides = [
                (match.new_row_indices[at[row]], match.old_row_indices[at[row]], position)
                for position, row in enumerate(rows)
                if row in at
            ]
        return (
            functools.partial(_graft_tokens, sides=sides, rule=rule),
            (len(rows), *shape[1:]),
            (len(sides), *shape[1:]),
        )
    if MAGNITUDE in name:
        module = upgrade.old.architecture.model.get_submodule(inner.removesuffix(".weight"))
        along = 1 if type(module).__name__ == "Linear" else 0  # PEFT turns the weights of Conv1D and of embeddings
        lengths = (shape[1 - along],)
        return functools.partial(_graft_lengths, along=along, rule=rule), lengths, lengths
    if match is not None and inner in upgrade.old.architecture.token_tensors:
        by_row = functools.partial(graft_rows, match=match, rule=rule)
        return by_row, (match.num_tuned_rows, *shape[1:]), (len(match.new_row_indices), *shape[1:])
    return rule, shape, shape


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


def num_adapter_rows(adaptation: Adaptation, base: Base) -> int | None:
    """Count the rows of the embeddings that an adapter stores, or that a LoRA in it is on.

    Args:
        adaptation: Any but a full fine-tune.
        base: A base of its architecture.

    Returns:
        Their number; None for an adapter that stores none.
    """
    ends = (f"{base.prefix}.{base.architecture.embeddings}", str(base.architecture.embeddings))
    for name, info in adaptation.checkpoint.tensors.items():
        plain = WRAPPER.sub("", model_name(name))
        if plain in ends and info.shape:
            return info.shape[0]
        if name.endswith(".lora_embedding_A") and f"{plain.removesuffix('.lora_embedding_A')}.weight" in ends:
            return info.shape[-1]
    return None


def _graft_tokens(
    new: torch.Tensor, stored: torch.Tensor, old: torch.Tensor, sides: list[tuple[int, int, int]], rule: Rule
) -> torch.Tensor:
    """Graft rows of tokens: each from a row of the new and one of the old base; −1 where it has none."""
    import torch

    rows = [
        stored[position] if i < 0 else new[i] if j < 0 else rule(new[i], stored[position], old[j])
        for i, j, position in sides
    ]
    return torch.stack([row.to(stored.dtype) for row in rows]) if rows else stored[:0]


def _columns(stored: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    """Take a column for each token to the grafted vocabulary; a token that the adapter does not know has none."""
    import torch

    indices = torch.tensor(rows)
    columns: torch.Tensor = stored[:, indices.clamp(min=0)] * (indices >= 0)
    return columns


def _graft_lengths(new: torch.Tensor, stored: torch.Tensor, old: torch.Tensor, along: int, rule: Rule) -> torch.Tensor:
    return rule(new.double().norm(dim=along), stored, old.double().norm(dim=along))


def _stored(_: torch.Tensor, stored: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
    return stored
