"""Cross moments of two bases' features on the same tokens, from which `aligned` computes rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch
    from torch import nn

    from regraft.model.blockwise import BlockwiseForward


def measure_cross_moments(
    forwards: Sequence[BlockwiseForward], table_moments: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Run the next part of both bases, and return moments of linear layers, norms and embeddings.

    A moment is the sum of x_n·x_oᵀ over tokens, where x_o and x_n are the inputs, or the outputs, of the same module in
    the old and in the new base. Three moments of outputs are replaced: a norm's by the moment of its inputs, an
    embedding's by the moment of its table, and a widening linear layer's by the moment of the inputs of the next linear
    layer whose input is as wide, if there is one.

    Args:
        forwards: The forward passes of the old and the new base.
        table_moments: The result of `compute_table_moments`.

    Returns:
        By the module's name, in the order of execution after all embeddings: the moment of the inputs, None except for
        linear layers; and the moment of the outputs, None for a language model's head, whose outputs are tokens.
    """
    old, new = forwards
    old_modules, new_modules = (
        [module for module in forward.model.modules() if _is_linear(module) or _is_norm(module)] for forward in forwards
    )
    modules = {new.names[module]: module for module in new_modules}
    old_rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    input_moments: dict[str, torch.Tensor] = {}
    # the first part gets the moments of all tables, since some models read a table without calling its module
    output_moments: dict[str, torch.Tensor | None] = dict(table_moments) if new.part == 0 else {}

    def store_old_rows(name: str, _batch_index: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        old_rows[name] = inputs, outputs

    def add_moments(name: str, _batch_index: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        old_inputs, old_outputs = old_rows[name]
        if _is_linear(modules[name]):
            input_moments[name] = _add(input_moments.get(name), inputs.T @ old_inputs)
            has_outputs = outputs.shape[1] > 0
            output_moments[name] = _add(output_moments.get(name), outputs.T @ old_outputs) if has_outputs else None
            return
        width = next(modules[name].parameters(recurse=False)).numel()
        if inputs.shape[1] == outputs.shape[1] == width:  # otherwise an attention module that owns vectors
            output_moments[name] = _add(output_moments.get(name), inputs.T @ old_inputs)

    for batch_index in range(len(old.batches)):
        old.run_batch(batch_index, old_modules, store_old_rows, keep_outputs=True)
        new.run_batch(batch_index, new_modules, add_moments, keep_outputs=True)
        old_rows.clear()
    for forward in forwards:
        forward.part += 1
    return _pair_moments(input_moments, output_moments)


def compute_table_moments(forwards: Sequence[BlockwiseForward], excluded: Collection[str]) -> dict[str, torch.Tensor]:
    """Compute the cross moments of embedding tables, summed over tables of equal width.

    They are summed because the first block reads sums of rows of several tables, such as words and positions.

    Args:
        forwards: The forward passes of the old and the new base.
        excluded: The tables to leave out, by parameter name inside the body, because their rows stand for different
            tokens in the two bases.

    Returns:
        The moments, [width, width], by the table's name.
    """
    from torch import nn

    old_tables, new_tables = (
        {
            name: module.weight.detach().double()
            for module, name in forward.names.items()
            if isinstance(module, nn.Embedding)
        }
        for forward in forwards
    )
    prefix = f"{forwards[0].model.base_model_prefix}."
    widths = {
        name: table.shape[1]
        for name, table in old_tables.items()
        if f"{name}.weight".removeprefix(prefix) not in excluded
    }
    moments: dict[int, torch.Tensor] = {}
    for name, width in widths.items():
        moments[width] = moments.get(width, 0) + new_tables[name].T @ old_tables[name]
    return {name: moments[width] for name, width in widths.items()}


def _pair_moments(
    input_moments: Mapping[str, torch.Tensor], output_moments: dict[str, torch.Tensor | None]
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Pair the moments of each module's inputs and outputs, and replace output moments of too low a rank.

    The output of a linear layer that is wider than its input does not determine a rotation. Such an output gets the
    moment of the next linear layer's input that is as wide, if there is one.
    """
    pairs: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
    next_inputs: dict[int, torch.Tensor] = {}  # the moment of the next linear layer's input, by width
    for name, output_moment in reversed(output_moments.items()):
        input_moment = input_moments.get(name)
        if input_moment is None:
            pairs[name] = None, output_moment
            continue
        if output_moment is not None and len(output_moment) > len(input_moment):
            output_moment = next_inputs.get(len(output_moment), output_moment)
        pairs[name] = input_moment, output_moment
        next_inputs[len(input_moment)] = input_moment
    return dict(reversed(pairs.items()))


def _add(total: torch.Tensor | None, moment: torch.Tensor) -> torch.Tensor:
    return moment if total is None else total + moment


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by a matrix."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module has a weight and only vectors as parameters, as norms do."""
    parameters = dict(module.named_parameters(recurse=False))
    return "weight" in parameters and all(parameter.dim() == 1 for parameter in parameters.values())
