"""Checks that an adapter was loaded completely."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.adaptation.labels import check_num_outputs
from regraft.adaptation.layout import adapter_name_hint
from regraft.adaptation.lora import PEFT_PREFIX, PROMPT_PREFIX, name_without_prefix
from regraft.checkpoint import FLOATING, dtype_of, shape_of
from regraft.errors import MAX_LISTED, CheckpointError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from regraft.adaptation.adaptation import Adaptation
    from regraft.base import Base
    from regraft.checkpoint.derived import Tensors
    from regraft.errors import RegraftError
    from regraft.task import Head


def check_head_rows(adaptation: Adaptation, model: Any, base: Base, head: Head) -> None:
    """Check that the stored output layers have a row per output of the task's head.

    Args:
        adaptation: The adapter.
        model: A model of the base with the task's head.
        base: The base.
        head: The head.

    Raises:
        MismatchError: An output layer has a different number of rows.
    """
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith(base.prefix + ".") and tensor.shape[:1] == (head.num_outputs,)
    }
    for name, stored_tensor in adaptation.checkpoint.tensors.items():
        shape = shapes.get(name_without_prefix(name))
        if shape and stored_tensor.shape[:1] and tuple(stored_tensor.shape[1:]) == shape[1:]:
            check_num_outputs(adaptation, stored_tensor.shape[0], head)


def check_loaded(
    adaptation: Adaptation,
    base: Base,
    head: Head,
    fresh_names: Sequence[str],
    loaded: dict[str, torch.Tensor],
    stored: Tensors,
) -> None:
    """Check that a model's adapter equals the stored tensors, and that they replace all fresh tensors of the model.

    Args:
        adaptation: The adapter.
        base: The base that it was loaded onto.
        head: The model's head.
        fresh_names: The names of the model's tensors that the base lacks.
        loaded: The model's adapter by stored names.
        stored: The stored tensors.

    Raises:
        CheckpointError: A tensor is missing, unexpected, quantised or was loaded with other values.
        MismatchError: A tensor has a different shape.
    """
    import torch

    prefixes = (PEFT_PREFIX, PROMPT_PREFIX)
    unfilled = [name for name in fresh_names if not any(prefix + name in loaded for prefix in prefixes)]
    common = sorted(loaded.keys() & stored.keys())
    misshapen = [name for name in common if tuple(loaded[name].shape) != shape_of(stored, name)]
    quantised = [name for name in common if loaded[name].is_floating_point() and dtype_of(stored, name) not in FLOATING]
    names_by_problem = {
        "missing": sorted(loaded.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - loaded.keys()),
        "of another shape": [
            f"{name} {shape_of(stored, name)}, expected {tuple(loaded[name].shape)}" for name in misshapen
        ],
        "stored as integers": [f"{name} ({dtype_of(stored, name)})" for name in quantised],
        "of the model in neither the base nor the adaptation": unfilled,
    }
    if any(names_by_problem.values()):
        problems = "; ".join(
            f"{len(names)} {problem}: {', '.join(names[:MAX_LISTED])}"
            for problem, names in names_by_problem.items()
            if names
        )
        error_class: type[RegraftError] = MismatchError if misshapen else CheckpointError
        raise error_class(
            f"{adaptation.path}: does not fit {base.path} with {head}. Tensors {problems}."
            f"{adapter_name_hint(stored.keys() - loaded.keys())}"
        )
    for name in common:
        value = loaded[name].cpu()
        if not torch.equal(value.nan_to_num(), stored[name].to(value.dtype).nan_to_num()):
            raise CheckpointError(
                f"{adaptation.path}: tensor {name!r} has other values than the stored ones after loading: PEFT "
                f"cannot load a {adaptation.kind} with these settings exactly, or cannot tune it further."
            )
