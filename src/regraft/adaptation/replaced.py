"""Grafting tensors that an adapter stores in place of its base's: embeddings, norms, biases, token rows, magnitudes.

Copied to another base, such a tensor would undo the upgrade's change of it. So its delta is grafted, as for a full
fine-tune.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import B_SUFFIX, MAGNITUDE_SUFFIX, TOKEN_ROWS_SUFFIX, name_without_prefix
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

    TensorRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

WRAPPER = re.compile(r"\.(?:base_layer|ln_tuning_layers|modules_to_save(?:\.default)?|original_module|token_adapter)\b")
"""Matches the parts that PEFT's wrappers insert between the names of a module and its parameter."""


def replaced_parameter(stored_name: str, base: Base) -> str | None:
    """Return the parameter of the body that an adapter's tensor replaces, completely or in part.

    Args:
        stored_name: The tensor's name in the adapter.
        base: A base of the adapter's architecture.

    Returns:
        The parameter's name in memory inside the body, or in a language model for its head; None for a tensor that
        replaces none, such as A and B of a LoRA and the head of a classifier.
    """
    name = WRAPPER.sub(
        "", name_without_prefix(stored_name).removesuffix(".weight" if MAGNITUDE_SUFFIX in stored_name else "")
    )
    for suffix in (MAGNITUDE_SUFFIX, TOKEN_ROWS_SUFFIX):
        if name.endswith(suffix):
            name = name.removesuffix(suffix) + ".weight"
    inner = name.removeprefix(f"{base.prefix}.")
    return inner if inner in base.model_parameters else None


def graft_replacements(
    adaptation: Adaptation,
    tensors: Mapping[str, torch.Tensor],
    upgrade: Upgrade,
    match: RowMatch | None = None,
    *,
    replace: bool = False,
) -> tuple[Mapping[str, torch.Tensor], tuple[str, ...]]:
    """Graft the tensors that an adapter stores in place of its base's: new + (stored − old).

    The magnitude m of a DoRA, the norms of the weight's rows, becomes ‖W_new‖ + (m − ‖W_old‖).

    Args:
        adaptation: An adaptation that is not a full fine-tune.
        tensors: Its tensors by stored name.
        upgrade: The two bases.
        match: How the rows of the vocabularies match; None if they are the same.
        replace: Whether the tensors are copied, not grafted; rows are still matched by token.

    Returns:
        The tensors for the new base, and the names of the grafted ones.

    Raises:
        MismatchError: A tensor differs in shape from the base's, or the adapter tunes rows that the base lacks.
    """
    inners = {name: inner for name in tensors if (inner := replaced_parameter(name, upgrade.old)) is not None}
    replaced = {name: inner for name, inner in inners.items() if inner in upgrade.new.model_parameters}
    if match is None and (replace or not replaced):
        return tensors, ()
    old, new = upgrade.old.model_parameters, upgrade.new.model_parameters
    entries = {}
    for name in tensors:
        dtype = dtype_of(tensors, name)
        shape = shape_of(tensors, name)
        if name in replaced:
            inner = replaced[name]
            rule, stored_shape, grafted_shape = _graft_rule(
                name, inner, adaptation, upgrade, match, _keep_stored if replace else graft
            )
            if shape != stored_shape:
                raise MismatchError(
                    f"{adaptation.path}: tensor {name!r} has shape {shape}, but replaces {inner!r} of "
                    f"{upgrade.old.path}, for which {stored_shape} is expected. Was it tuned on that base?"
                )
            if 0 not in grafted_shape:  # otherwise the new base has none of the tokens
                operands = ((new, inner), (tensors, name), (old, inner))
                entries[name] = TensorSpec(dtype, grafted_shape, operands, rule, elementwise=False)
        elif match is not None and name.endswith(".lora_embedding_A"):  # a column for each token
            columns = functools.partial(_columns, rows=match.tuned_row_indices)
            entries[name] = TensorSpec(
                dtype, (shape[0], len(match.tuned_row_indices)), ((tensors, name),), columns, elementwise=False
            )
        elif match is not None and _is_head_factor(name, upgrade.old):  # a row for each token
            rows = functools.partial(_rows, rows=match.tuned_row_indices)
            entries[name] = TensorSpec(
                dtype, (len(match.tuned_row_indices), *shape[1:]), ((tensors, name),), rows, elementwise=False
            )
        else:
            entries[name] = TensorSpec(dtype, shape, ((tensors, name),))
    return DerivedTensors(entries), () if replace else tuple(name for name in replaced if name in entries)


def renumber_token_ids(adaptation: Adaptation, config: Mapping[str, Any], match: RowMatch | None) -> Mapping[str, Any]:
    """Return an adapter's config with the ids of its tuned tokens in the grafted vocabulary.

    Args:
        adaptation: An adaptation that is not a full fine-tune.
        config: The content of its `adapter_config.json`.
        match: How the rows of the vocabularies match; None if they are the same.

    Returns:
        The config, without the ids of tokens that the new base lacks.
    """
    if match is None:
        return config
    new_rows = {tuned_row: row for row, tuned_row in enumerate(match.tuned_row_indices) if tuned_row >= 0}

    def renumber(rows: Any) -> Any:
        if isinstance(rows, dict):
            rows_by_module = {module: renumber(module_rows) for module, module_rows in rows.items()}
            return {module: module_rows for module, module_rows in rows_by_module.items() if module_rows} or None
        return [new_rows[row] for row in rows if row in new_rows] or None

    indices = {key: config[key] for key in ("trainable_token_indices", "token_indices") if config.get(key)}
    return {**config, **{key: renumber(rows) for key, rows in indices.items()}}


def _graft_rule(
    name: str, inner: str, adaptation: Adaptation, upgrade: Upgrade, match: RowMatch | None, rule: TensorRule
) -> tuple[Callable[..., torch.Tensor], tuple[int, ...], tuple[int, ...]]:
    """Return the rule that grafts a stored tensor, with the tensor's shape before and after.

    `rule` computes a tensor, or its rows, from those of the new base, the adapter and the old base.

    Raises:
        MismatchError: The adapter tunes rows that the old base lacks.
    """
    shape = shape_of(upgrade.old.model_parameters, inner)
    if TOKEN_ROWS_SUFFIX in name:
        plain_name = name_without_prefix(name)
        rows = token_rows(adaptation, plain_name.split(".token_adapter")[0].removesuffix(TOKEN_ROWS_SUFFIX))
        count = shape[0] if match is None else match.num_tuned_rows
        if rows and not 0 <= min(rows) <= max(rows) < count:
            raise MismatchError(
                f"{adaptation.path}: tunes rows up to {max(rows)}, but {upgrade.old.path} has {count:,} "
                "rows. Was it tuned on that base?"
            )
        row_triples = [(row, row, position) for position, row in enumerate(rows)]
        if match is not None:
            grafted_rows = {tuned_row: row for row, tuned_row in enumerate(match.tuned_row_indices) if tuned_row >= 0}
            row_triples = [
                (match.new_row_indices[grafted_rows[row]], match.old_row_indices[grafted_rows[row]], position)
                for position, row in enumerate(rows)
                if row in grafted_rows
            ]
        token_rule = functools.partial(_graft_tokens, row_triples=row_triples, rule=rule)
        return token_rule, (len(rows), *shape[1:]), (len(row_triples), *shape[1:])
    if MAGNITUDE_SUFFIX in name:
        is_head = inner in upgrade.old.language_head
        module = None if is_head else upgrade.old.architecture.model.get_submodule(inner.removesuffix(".weight"))
        # PEFT transposes the weights of Conv1D and embeddings
        dim = 1 if is_head or type(module).__name__ == "Linear" else 0
        magnitude_shape = (shape[1 - dim],)
        if match is not None and is_head:  # a norm for each token
            row_rule = functools.partial(graft_rows, match=match, rule=rule)
            magnitude_rule = functools.partial(_graft_magnitude, dim=dim, rule=row_rule)
            return magnitude_rule, (match.num_tuned_rows,), (len(match.new_row_indices),)
        return functools.partial(_graft_magnitude, dim=dim, rule=rule), magnitude_shape, magnitude_shape
    has_token_rows = inner in upgrade.old.architecture.token_tensors or inner in upgrade.old.language_head
    if match is not None and has_token_rows:
        row_rule = functools.partial(graft_rows, match=match, rule=rule)
        return row_rule, (match.num_tuned_rows, *shape[1:]), (len(match.new_row_indices), *shape[1:])
    return rule, shape, shape


def token_rows(adaptation: Adaptation, module: str) -> list[int]:
    """Return the ids of the tokens that an adapter tunes, in the order of its rows.

    Args:
        adaptation: A LoRA with `trainable_token_indices`, or an adapter of PEFT's trainable tokens.
        module: The name of the embeddings in the model.
    """
    rows = adaptation.config.get("trainable_token_indices") or adaptation.config.get("token_indices") or []
    if isinstance(rows, dict):  # by a suffix of the module's name
        rows = next((ids for suffix, ids in rows.items() if module == suffix or module.endswith(f".{suffix}")), [])
    return list(rows)


def tuned_token_rows(adaptation: Adaptation) -> set[int]:
    """Return the ids of all tokens that an adapter tunes, in the embeddings or in the head.

    Args:
        adaptation: Any adaptation.
    """
    rows = adaptation.config.get("trainable_token_indices") or adaptation.config.get("token_indices") or []
    return set().union(*rows.values()) if isinstance(rows, dict) else set(rows)


def num_adapter_rows(adaptation: Adaptation, base: Base) -> int | None:
    """Return the number of rows of embeddings that an adapter stores or adapts; None if there are none.

    Args:
        adaptation: An adaptation that is not a full fine-tune.
        base: A base of its architecture.
    """
    names = (f"{base.prefix}.{base.architecture.embeddings}", str(base.architecture.embeddings))
    for name, tensor in adaptation.checkpoint.tensors.items():
        plain = WRAPPER.sub("", name_without_prefix(name))
        if plain in names and tensor.shape:
            return tensor.shape[0]
        if name.endswith(".lora_embedding_A") and f"{plain.removesuffix('.lora_embedding_A')}.weight" in names:
            return tensor.shape[-1]
    return None


def _graft_tokens(
    new: torch.Tensor,
    stored: torch.Tensor,
    old: torch.Tensor,
    row_triples: list[tuple[int, int, int]],
    rule: TensorRule,
) -> torch.Tensor:
    """Graft rows of tokens.

    Each triple has a token's row in the new base and in the old base (−1 if a base lacks it), and in the adapter.
    """
    import torch

    rows = [
        stored[position] if i < 0 else new[i] if j < 0 else rule(new[i], stored[position], old[j])
        for i, j, position in row_triples
    ]
    return torch.stack([row.to(stored.dtype) for row in rows]) if rows else stored[:0]


def _is_head_factor(stored_name: str, base: Base) -> bool:
    """Return whether an adapter's tensor is B, or its bias, of a LoRA on the base's language-modelling head."""
    plain = name_without_prefix(stored_name)
    suffix = next((suffix for suffix in (B_SUFFIX, ".lora_B.bias") if plain.endswith(suffix)), None)
    return suffix is not None and f"{plain.removesuffix(suffix)}.weight" in base.language_head


def _rows(stored: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    """Return the rows of the tokens of the grafted vocabulary; zeros for tokens that the adapter lacks."""
    return _columns(stored[None] if stored.dim() == 1 else stored.T, rows).T.reshape(len(rows), *stored.shape[1:])


def _columns(stored: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    """Return the columns of the tokens of the grafted vocabulary; zeros for tokens that the adapter lacks."""
    import torch

    indices = torch.tensor(rows)
    columns: torch.Tensor = stored[:, indices.clamp(min=0)] * (indices >= 0)
    return columns


def _graft_magnitude(
    new: torch.Tensor, stored: torch.Tensor, old: torch.Tensor, dim: int, rule: TensorRule
) -> torch.Tensor:
    return rule(new.double().norm(dim=dim), stored, old.double().norm(dim=dim))


def _keep_stored(_new: torch.Tensor, stored: torch.Tensor, _old: torch.Tensor) -> torch.Tensor:
    return stored
