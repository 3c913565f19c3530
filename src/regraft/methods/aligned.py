"""`aligned`: the old delta, turned into the new base's own coordinates.

For bases that were re-trained rather than continued: their features may be the same up to a rotation. Source: the
Procrustes transport of task vectors, as in Theseus and in Re-Basin (Ainsworth et al., 2023, arXiv:2209.04836).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.lora import ADAPTER, START
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
    """How the bases' features are aligned.

    Args:
        shrink: How far the maps are drawn to the identity, from 0 (not at all) to 1 (then it is `direct`).
        texts: How many of the task's training texts, without labels, the activations are measured on.

    Raises:
        RecipeError: A number is out of its range.
    """

    shrink: float = 0.5
    texts: int = 256

    def __post_init__(self) -> None:
        """Check every number."""
        if not 0 <= self.shrink <= 1 or self.texts < 1:
            raise RecipeError(f"shrink is from 0 to 1 (found {self.shrink}), texts at least 1 ({self.texts}).")


def graft_aligned(job: Job, options: Alignment) -> Any:
    """Find an orthogonal map for the inputs and the outputs of each module, and turn its delta by both.

    With x_n ≈ R·x_o and y_n ≈ S·y_o on the same tokens of the task's texts, a linear layer's D becomes S·D·Rᵀ, of a
    LoRA B becomes S·B and A becomes A·Rᵀ; a bias d becomes S·d, an embedding's row e becomes S·e, a norm's gain g the
    diagonal of S·diag(g)·Sᵀ; a head W becomes W·Rᵀ. Experts and other modules keep their delta, and are named in the
    outcome's notes.

    Args:
        job: What and where.
        options: How.

    Returns:
        The model, ready to be tuned.

    Raises:
        KindError: The adaptation is of another kind, or nothing of it can be turned.
    """
    from regraft.adaptation import fresh_model, load_model
    from regraft.adaptation.changes import SUPPORTED_KINDS
    from regraft.adaptation.transform import check_transformable
    from regraft.model.blockwise import BlockwiseForward
    from regraft.model.examples import encode_aligned

    check_transformable(job.adaptation, SUPPORTED_KINDS)
    upgrade, head = job.upgrade, job.data.head
    grafted, tuned = job.grafted(), load_model(job.adaptation, upgrade.old, head)
    texts = job.data.train.take(range(min(options.texts, len(job.data.train))))
    sides = encode_aligned(upgrade, job.data, texts)
    precision = job.recipe.precision
    walks = [
        BlockwiseForward(fresh_model(base, head, 0), examples, precision)
        for base, examples in zip((upgrade.old, upgrade.new), sides, strict=True)
    ]
    turned, rotations = _Turned(grafted, tuned, upgrade.old, job.adaptation.family), _Rotations(options.shrink)
    is_head = False
    tables = _tables(walks, () if job.rows is None else upgrade.old.architecture.token_parameters)
    for part in range(walks[0].parts):
        for name, (fed, output) in _spaces(walks, tables).items():
            if is_head:  # what comes after a head's first layer has that one's coordinates, which stay
                break
            is_head = turned.is_head(name)
            turned.turn(name, None if fed is None else rotations(fed), None if is_head else rotations(output))
        rotations.forget()
        job.progress("align", part + 1, walks[0].parts, {})
    passed_over = turned.passed_over()
    if not turned.names:
        raise KindError(
            f"{job.adaptation.path}: aligned can turn none of the {len(passed_over)} modules that were tuned "
            f"({', '.join(passed_over[:4])}). Take direct or init."
        )
    moved = rotations.moved
    job.notes["turned"] = round(sum(moved) / len(moved), 4)  # mean of ‖R − I‖ / √width
    if passed_over:
        job.notes["passed_over"] = dict.fromkeys(
            passed_over, "no linear layer or norm, nor an embedding of the same tokens"
        )
    return grafted


def _spaces(
    walks: Sequence[BlockwiseForward], tables: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor]]:
    """Run a part of both bases; return, for each module with weights of its own, E[x_n·xᵀ_o] of what tells its maps.

    A linear layer's input is what it is fed. Its output is what it gives; but where it is wider than its input, so that
    what it gives has not the rank to tell, what the next layer of that width is fed. A norm's output has the
    coordinates of its input, and all embeddings those of the tables.

    Args:
        walks: Through the old and the new base.
        tables: From `_tables`.

    Returns:
        The moments of inputs (None but for linear layers) and of outputs by name, in the order in which modules run.
    """
    old, new = walks
    own = [[module for module in walk.model.modules() if _is_linear(module) or _is_norm(module)] for walk in walks]
    modules = {new.names[module]: module for module in own[1]}
    of_old: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    fed_sums: dict[str, torch.Tensor] = {}
    output_sums = dict(tables) if new.part == 0 else {}  # some are read without being called

    def keep_outputs(name: str, _: int, fed: torch.Tensor, output: torch.Tensor) -> None:
        of_old[name] = fed, output

    def add(name: str, _: int, fed: torch.Tensor, output: torch.Tensor) -> None:
        old_fed, old_output = of_old[name]
        is_linear = _is_linear(modules[name])
        if (
            not is_linear
            and not fed.shape[1] == output.shape[1] == next(modules[name].parameters(recurse=False)).numel()
        ):
            return  # an attention with weights of its own, and no norm
        fed_sums[name] = fed_sums.get(name, 0) + fed.T @ old_fed
        output_sums[name] = output_sums.get(name, 0) + output.T @ old_output if is_linear else fed_sums[name]

    for number in range(len(old.batches)):
        old.run_batch(number, own[0], keep_outputs, keep_outputs=True)
        new.run_batch(number, own[1], add, keep_outputs=True)
        of_old.clear()
    for walk in walks:
        walk.part += 1
    spaces: dict[str, tuple[torch.Tensor | None, torch.Tensor]] = {}
    read: dict[int, torch.Tensor] = {}
    for name, output in reversed(output_sums.items()):
        fed = fed_sums[name] if name in modules and _is_linear(modules[name]) else None
        spaces[name] = fed, read.get(len(output), output) if fed is not None and len(output) > len(fed) else output
        if fed is not None:
            read[len(fed)] = fed
    return dict(reversed(spaces.items()))


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _is_norm(module: Any) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and all(weight.dim() == 1 for weight in own.values())


def _tables(walks: Sequence[BlockwiseForward], apart: Collection[str]) -> dict[str, torch.Tensor]:
    """Compute the cross moments of all embedding tables of each one's width: the first block reads sums of their rows.

    Args:
        walks: Through the old and the new base.
        apart: The tables whose rows stand for other tokens in the two, by parameter inside the body; they are left out.

    Returns:
        The moments, [width, width], by the table's name.
    """
    from torch import nn

    old, new = (
        {name: m.weight.detach().double() for m, name in w.names.items() if isinstance(m, nn.Embedding)} for w in walks
    )
    start = f"{walks[0].model.base_model_prefix}."
    names = [name for name in old if f"{name}.weight".removeprefix(start) not in apart]
    sums: dict[int, torch.Tensor] = {}
    for name in names:
        sums[old[name].shape[1]] = sums.get(old[name].shape[1], 0) + new[name].T @ old[name]
    return {name: sums[old[name].shape[1]] for name in names}


class _Rotations:
    """The rotation of each space, computed once however many modules read it."""

    def __init__(self, shrink: float):
        self.shrink, self.moved = shrink, list[float]()
        self.spaces: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, cross: torch.Tensor) -> torch.Tensor:
        import torch

        from regraft.weights import rotation

        for other, turn in self.spaces:
            if cross.shape == other.shape and torch.equal(cross, other):
                return turn
        turn = rotation(cross, self.shrink)
        self.moved.append(float((turn - torch.eye(len(turn)).to(turn)).norm() / len(turn) ** 0.5))
        self.spaces.append((cross, turn))
        return turn

    def forget(self) -> None:
        """Forget the spaces of a part that is done."""
        self.spaces.clear()


class _Turned:
    """The grafted model, whose deltas are turned in place.

    Args:
        grafted: The adaptation put on the new base.
        tuned: The adaptation on the old base.
        old: The old base.
        family: The adaptation's.
    """

    def __init__(self, grafted: Any, tuned: Any, old: Base, family: Family):
        modules = [(name, module) for name, module in grafted.named_modules() if "original_module" not in name]
        self.modules = {_plain(name): module for name, module in modules}
        self.tuned = {
            _plain(name): weight for name, weight in tuned.named_parameters() if "original_module" not in name
        }
        self.old = old
        self.whole = {_plain(name) for name, _ in modules if family.tunes_module_weight(name, old)}
        self.names: set[str] = set()  # of the modules that were turned, heads left out

    def is_head(self, name: str) -> bool:
        """Return whether a module is not in the base."""
        from regraft.adaptation.changes import base_tensor

        return base_tensor(f"{name}.weight", self.old) is None

    def turn(self, name: str, inputs: torch.Tensor | None, outputs: torch.Tensor | None) -> None:
        """Turn what the adaptation changes in a module.

        Args:
            name: The module's, in a model without an adapter.
            inputs: R, of a linear layer.
            outputs: S; None for a head.
        """
        from torch import nn

        from regraft.adaptation.changes import base_tensor, is_transposed

        module = self.modules[name]
        if outputs is not None and self._is_changed(name, module):
            self.names.add(name)
        if outputs is None:
            _set(module.weight, module.weight, inputs, None)
        elif name in self.whole:
            for part, weight in module.named_parameters(recurse=False):
                value, base = self.tuned[f"{name}.{part}"], base_tensor(f"{name}.{part}", self.old)
                delta = value - (0 if base is None else base.to(value))
                if isinstance(module, nn.Embedding):
                    _set(weight, delta, outputs, None)
                elif weight.dim() == 2 and is_transposed(module):
                    _set(weight, delta, outputs, inputs)
                elif weight.dim() == 2:
                    _set(weight, delta, inputs, outputs)
                else:
                    is_gain = part == "weight"
                    _set(weight, delta[:, None], None, outputs.square() if is_gain else outputs)
        elif hasattr(module, "lora_A"):
            _set(module.lora_A[ADAPTER].weight, module.lora_A[ADAPTER].weight, inputs, None)
            _set(module.lora_B[ADAPTER].weight, module.lora_B[ADAPTER].weight, None, outputs)
        elif hasattr(module, "bottleneck"):
            down, up = module.bottleneck.down, module.bottleneck.up
            _set(down.weight, down.weight, outputs, None)
            _set(up.weight, up.weight, None, outputs)
            _set(up.bias, up.bias[:, None], None, outputs)

    def passed_over(self) -> list[str]:
        """Name the modules of the body that tuning changed and that were not turned."""
        from regraft.adaptation.changes import parameter_of

        left = [n for n, module in self.modules.items() if n not in self.names and self._is_changed(n, module)]
        return [n if n in self.whole else parameter_of(n, self.modules[n]) for n in left]

    def _is_changed(self, name: str, module: Any) -> bool:
        import torch

        from regraft.adaptation.changes import base_tensor

        if name not in self.whole:
            return hasattr(module, "bottleneck") or ADAPTER in getattr(module, "lora_A", ())
        parts = [f"{name}.{part}" for part, _ in module.named_parameters(recurse=False)]
        bases = {part: base_tensor(part, self.old) for part in parts}
        return any(
            base is not None and not torch.equal(self.tuned[part], base.to(self.tuned[part]))
            for part, base in bases.items()
        )


def _plain(name: str) -> str:
    return name.removeprefix(START).replace(f".modules_to_save.{ADAPTER}", "")


def _set(weight: torch.Tensor, delta: torch.Tensor, right: torch.Tensor | None, left: torch.Tensor | None) -> None:
    """Put left·delta·rightᵀ into a weight in the place of the delta that is in it."""
    import torch

    with torch.no_grad():
        turned = delta.double()
        turned = turned if right is None else turned @ right.T.to(turned)
        turned = turned if left is None else left.to(turned) @ turned
        weight.add_((turned - delta.double()).reshape(weight.shape).to(weight))


ALIGNED = Start(
    "aligned", graft_aligned, Alignment, summary="turn the old delta into the new base's coordinates", needs=("text",)
)
