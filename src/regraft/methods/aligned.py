"""`aligned`: the old delta, rotated into the coordinates of the new base.

For bases that were re-trained rather than continually pre-trained: their features may agree up to a rotation. Source:
the Procrustes transport of task vectors, as in Theseus and in Re-Basin (Ainsworth et al., 2023, arXiv:2209.04836).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import ADAPTER, PEFT_PREFIX
from regraft.errors import KindError, RecipeError
from regraft.methods.method import Start

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

    from regraft.adaptation.adaptation import Family
    from regraft.base import Base
    from regraft.methods.job import Job
    from regraft.model.blockwise import BlockwiseForward


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The rotations between the bases' features, and the texts they are computed from.

    Args:
        shrink: The shrinkage of the rotations towards the identity, from 0 (none) to 1 (which is `direct`).
        texts: The number of the task's training texts, without labels, on which activations are measured.

    Raises:
        RecipeError: A number is out of range.
    """

    shrink: float = 0.5
    texts: int = 256

    def __post_init__(self) -> None:
        """Check every number."""
        if not 0 <= self.shrink <= 1 or self.texts < 1:
            raise RecipeError(f"shrink must be from 0 to 1 (found {self.shrink}), texts at least 1 ({self.texts}).")


def graft_aligned(job: Job, options: Alignment) -> Any:
    """Compute rotations of the inputs and outputs of each module, and rotate its delta by both.

    With x_n ≈ R·x_o and y_n ≈ S·y_o on the same tokens of the task's texts, the delta D of a linear layer becomes
    S·D·Rᵀ; in a LoRA, B becomes S·B and A becomes A·Rᵀ. The delta d of a bias becomes S·d, that of an embedding row e
    S·e, that of a norm's gain g the diagonal of S·diag(g)·Sᵀ, and a head W becomes W·Rᵀ. Experts and other modules keep
    their delta, and the outcome's notes name them.

    Args:
        job: The job.
        options: The rotations and the texts.

    Returns:
        The model, ready for tuning.

    Raises:
        KindError: The kind of the adaptation is not supported, or none of its modules can be rotated.
    """
    from regraft.adaptation import fresh_model, load_model
    from regraft.adaptation.changes import SUPPORTED_KINDS
    from regraft.adaptation.transform import check_transformable
    from regraft.model.blockwise import BlockwiseForward
    from regraft.model.examples import encode_aligned

    check_transformable(job.adaptation, SUPPORTED_KINDS)
    upgrade, head = job.upgrade, job.data.head
    grafted = job.grafted()
    tuned = load_model(job.adaptation, upgrade.old, head)
    texts = job.data.train.take(range(min(options.texts, len(job.data.train))))
    forwards = [
        BlockwiseForward(fresh_model(base, head, 0), examples, job.recipe.precision)
        for base, examples in zip((upgrade.old, upgrade.new), encode_aligned(upgrade, job.data, texts), strict=True)
    ]
    rotated = _RotatedModel(grafted, tuned, upgrade.old, job.adaptation.family)
    rotations = _Rotations(options.shrink)
    is_head = False
    tables = _table_moments(forwards, () if job.row_match is None else upgrade.old.architecture.token_parameters)
    for part in range(forwards[0].num_parts):
        for name, (inputs, outputs) in _cross_moments(forwards, tables).items():
            if is_head:  # later layers of a head have the coordinates of its first layer's output, which stay
                break
            is_head = rotated.is_head(name)
            input_rotation = None if inputs is None else rotations(inputs)
            rotated.rotate(name, input_rotation, None if is_head else rotations(outputs))
        rotations.clear()
        job.progress("align", part + 1, forwards[0].num_parts, {})
    passed_over = rotated.passed_over()
    if not rotated.names:
        raise KindError(
            f"{job.adaptation.path}: aligned can rotate none of the {len(passed_over)} tuned modules "
            f"({', '.join(passed_over[:4])}). Use direct or init."
        )
    job.notes["turned"] = round(sum(rotations.distances) / len(rotations.distances), 4)
    if passed_over:
        job.notes["passed_over"] = dict.fromkeys(
            passed_over, "no linear layer or norm, nor an embedding of the same tokens"
        )
    return grafted


def _cross_moments(
    forwards: Sequence[BlockwiseForward], tables: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
    """Run a part of both bases; return E[x_n·xᵀ_o] of the inputs and outputs of each module with weights of its own.

    The moment of a linear layer's output is that of its output; but if the output is wider than the input, and so of
    too low a rank, it is the input's moment of the next layer with that width. The moment of a norm's output is that of
    its input, and that of an embedding's output comes from the tables.

    Args:
        forwards: The forward passes of the old and the new base.
        tables: The result of `_table_moments`.

    Returns:
        The moments of inputs (None except for linear layers) and of outputs by name, in the order of execution.
    """
    old, new = forwards
    observed = [[m for m in forward.model.modules() if _is_linear(m) or _is_norm(m)] for forward in forwards]
    modules = {new.names[module]: module for module in observed[1]}
    old_rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    input_moments: dict[str, torch.Tensor] = {}
    output_moments = dict(tables) if new.part == 0 else {}  # of all tables, as some are read without a call

    def store_old_rows(name: str, _: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        old_rows[name] = inputs, outputs

    def add_moments(name: str, _: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        old_inputs, old_outputs = old_rows[name]
        is_linear = _is_linear(modules[name])
        if not is_linear:
            width = next(modules[name].parameters(recurse=False)).numel()
            if not inputs.shape[1] == outputs.shape[1] == width:
                return  # no norm, but an attention with weights of its own
        input_moments[name] = input_moments.get(name, 0) + inputs.T @ old_inputs
        output_moments[name] = (
            output_moments.get(name, 0) + outputs.T @ old_outputs if is_linear else input_moments[name]
        )

    for index in range(len(old.batches)):
        old.run_batch(index, observed[0], store_old_rows, keep_outputs=True)
        new.run_batch(index, observed[1], add_moments, keep_outputs=True)
        old_rows.clear()
    for forward in forwards:
        forward.part += 1
    moments: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {}
    next_inputs: dict[int, torch.Tensor] = {}  # the moment of the next linear layer's input, by width
    for name, outputs in reversed(output_moments.items()):
        inputs = input_moments[name] if name in modules and _is_linear(modules[name]) else None
        is_widening = inputs is not None and len(outputs) > len(inputs)
        moments[name] = inputs, next_inputs.get(len(outputs), outputs) if is_widening else outputs
        if inputs is not None:
            next_inputs[len(inputs)] = inputs
    return dict(reversed(moments.items()))


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _is_norm(module: Any) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    return "weight" in parameters and all(parameter.dim() == 1 for parameter in parameters.values())


def _table_moments(forwards: Sequence[BlockwiseForward], excluded: Collection[str]) -> dict[str, torch.Tensor]:
    """Compute the cross moments of embedding tables, summed by width: the first block reads sums of their rows.

    Args:
        forwards: The forward passes of the old and the new base.
        excluded: The tables to leave out, because their rows stand for different tokens in the two bases; parameter
            names inside the body.

    Returns:
        The moments, [width, width], by the table's name.
    """
    from torch import nn

    old, new = (
        {
            name: module.weight.detach().double()
            for module, name in forward.names.items()
            if isinstance(module, nn.Embedding)
        }
        for forward in forwards
    )
    prefix = f"{forwards[0].model.base_model_prefix}."
    names = [name for name in old if f"{name}.weight".removeprefix(prefix) not in excluded]
    sums: dict[int, torch.Tensor] = {}
    for name in names:
        sums[old[name].shape[1]] = sums.get(old[name].shape[1], 0) + new[name].T @ old[name]
    return {name: sums[old[name].shape[1]] for name in names}


class _Rotations:
    """Rotations by cross moments, each computed once for all modules with the same moments.

    Args:
        shrink: The shrinkage towards the identity, 0–1.

    Attributes:
        distances: ‖R − I‖ / √width of each rotation R.
    """

    def __init__(self, shrink: float):
        self.shrink = shrink
        self.distances = list[float]()
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, cross: torch.Tensor) -> torch.Tensor:
        import torch

        from regraft.weights import rotation

        for cached_cross, cached_rotation in self._cache:
            if cross.shape == cached_cross.shape and torch.equal(cross, cached_cross):
                return cached_rotation
        matrix = rotation(cross, self.shrink)
        self.distances.append(float((matrix - torch.eye(len(matrix)).to(matrix)).norm() / len(matrix) ** 0.5))
        self._cache.append((cross, matrix))
        return matrix

    def clear(self) -> None:
        """Clear the cache, which no later part uses."""
        self._cache.clear()


class _RotatedModel:
    """The grafted model, whose deltas are rotated in place.

    Args:
        grafted: The adaptation on the new base, as a model.
        tuned: The adaptation on the old base, as a model.
        old: The old base.
        family: The family of the adaptation.

    Attributes:
        names: The names of the rotated modules, without heads.
    """

    def __init__(self, grafted: Any, tuned: Any, old: Base, family: Family):
        modules = [(name, module) for name, module in grafted.named_modules() if "original_module" not in name]
        self.modules = {_plain_name(name): module for name, module in modules}
        self.tuned = {
            _plain_name(name): weight for name, weight in tuned.named_parameters() if "original_module" not in name
        }
        self.old = old
        self.fully_tuned = {_plain_name(name) for name, _ in modules if family.tunes_module_weight(name, old)}
        self.names: set[str] = set()

    def is_head(self, name: str) -> bool:
        """Return whether a module is not in the base."""
        from regraft.adaptation.changes import base_tensor

        return base_tensor(f"{name}.weight", self.old) is None

    def rotate(self, name: str, inputs: torch.Tensor | None, outputs: torch.Tensor | None) -> None:
        """Rotate the delta of a module.

        Args:
            name: The module's name in a model without an adapter.
            inputs: R, the rotation of a linear layer's inputs.
            outputs: S, the rotation of the outputs; None for a head.
        """
        from torch import nn

        from regraft.adaptation.changes import base_tensor, is_transposed

        module = self.modules[name]
        if outputs is not None and self._is_changed(name, module):
            self.names.add(name)
        if outputs is None:
            _replace_delta(module.weight, module.weight, inputs, None)
        elif name in self.fully_tuned:
            for parameter_name, weight in module.named_parameters(recurse=False):
                value = self.tuned[f"{name}.{parameter_name}"]
                base = base_tensor(f"{name}.{parameter_name}", self.old)
                delta = value - (0 if base is None else base.to(value))
                if isinstance(module, nn.Embedding):
                    _replace_delta(weight, delta, outputs, None)
                elif weight.dim() == 2 and is_transposed(module):
                    _replace_delta(weight, delta, outputs, inputs)
                elif weight.dim() == 2:
                    _replace_delta(weight, delta, inputs, outputs)
                else:
                    is_gain = parameter_name == "weight"
                    _replace_delta(weight, delta[:, None], None, outputs.square() if is_gain else outputs)
        elif hasattr(module, "lora_A"):
            _replace_delta(module.lora_A[ADAPTER].weight, module.lora_A[ADAPTER].weight, inputs, None)
            _replace_delta(module.lora_B[ADAPTER].weight, module.lora_B[ADAPTER].weight, None, outputs)
        elif hasattr(module, "bottleneck"):
            down, up = module.bottleneck.down, module.bottleneck.up
            _replace_delta(down.weight, down.weight, outputs, None)
            _replace_delta(up.weight, up.weight, None, outputs)
            _replace_delta(up.bias, up.bias[:, None], None, outputs)

    def passed_over(self) -> list[str]:
        """List the modules of the body that tuning changed and that were not rotated."""
        from regraft.adaptation.changes import parameter_of

        names = [n for n, module in self.modules.items() if n not in self.names and self._is_changed(n, module)]
        return [n if n in self.fully_tuned else parameter_of(n, self.modules[n]) for n in names]

    def _is_changed(self, name: str, module: Any) -> bool:
        import torch

        from regraft.adaptation.changes import base_tensor

        if name not in self.fully_tuned:
            return hasattr(module, "bottleneck") or ADAPTER in getattr(module, "lora_A", ())
        for parameter_name, _ in module.named_parameters(recurse=False):
            tuned = self.tuned[f"{name}.{parameter_name}"]
            base = base_tensor(f"{name}.{parameter_name}", self.old)
            if base is not None and not torch.equal(tuned, base.to(tuned)):
                return True
        return False


def _plain_name(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).replace(f".modules_to_save.{ADAPTER}", "")


def _replace_delta(
    weight: torch.Tensor, delta: torch.Tensor, right: torch.Tensor | None, left: torch.Tensor | None
) -> None:
    """Replace the delta that is part of a weight by left·delta·rightᵀ, in place."""
    import torch

    with torch.no_grad():
        rotated = delta.double()
        rotated = rotated if right is None else rotated @ right.T.to(rotated)
        rotated = rotated if left is None else left.to(rotated) @ rotated
        weight.add_((rotated - delta.double()).reshape(weight.shape).to(weight))


ALIGNED = Start(
    "aligned", graft_aligned, Alignment, summary="rotate the old delta into the new base's coordinates", needs=("text",)
)
