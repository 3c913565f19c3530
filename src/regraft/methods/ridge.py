"""`ridge`: the old delta, refitted to have the same effect on the new base's activations as on the old base's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from regraft.adaptation.experts import Expert, is_experts, lora_wrappers, projection_names
from regraft.errors import KindError, RecipeError
from regraft.methods.method import Start

if TYPE_CHECKING:
    import torch

    from regraft.adaptation.changes import Change
    from regraft.methods.job import Job
    from regraft.model.blockwise import BlockwiseForward


@dataclasses.dataclass(frozen=True)
class Ridge:
    """The ridge regression, and the texts it is fitted on.

    Args:
        ridge: λ, the strength of the penalty on the change of the delta, in units of the mean square of each layer's
            inputs.
        texts: The number of the task's training texts, without labels, on which activations are measured.
        head: Whether to refit the head too, so that its outputs on the new features match those on the old ones.

    Raises:
        RecipeError: A number is out of range.
    """

    ridge: float = 0.3
    texts: int = 256
    head: bool = True

    def __post_init__(self) -> None:
        """Check every number."""
        if not self.ridge > 0 or self.texts < 1:
            raise RecipeError(f"ridge must be above 0 (found {self.ridge}), texts at least 1 ({self.texts}).")


def refit(job: Job, options: Ridge) -> Any:
    """Refit the delta of layer after layer to the layer's inputs in the new model.

    In every tuned layer that multiplies by a matrix, the old model adds D·x_o to the output of its base. In the new
    model, grafted and with all earlier layers refitted, the same token has the input x_n, and D' is the ridge
    regression of D·x_o on x_n with a penalty on D' − D. In a LoRA only A changes, in bottleneck adapters the first
    layer, so that the rank and the cost of serving stay the same.

    Layers that multiply by a matrix are linear layers, Conv1D, routers and experts. An expert is refitted on the tokens
    that the new model routes to it; if these are fewer than its width, it keeps its delta. A layer that runs more than
    once is refitted once, on all of its inputs. The outcome's notes name the layers that are passed over.

    Args:
        job: The job.
        options: The regression and the texts.

    Returns:
        The model, ready for tuning.

    Raises:
        KindError: The kind of the adaptation is not supported, or none of its layers can be refitted.
    """
    from regraft.adaptation import load_model
    from regraft.adaptation.changes import SUPPORTED_KINDS, linear_changes, skip_reasons
    from regraft.adaptation.transform import check_transformable
    from regraft.model.blockwise import BlockwiseForward
    from regraft.model.examples import encode_aligned

    check_transformable(job.adaptation, SUPPORTED_KINDS)
    new = job.grafted()
    tuned = load_model(job.adaptation, job.upgrade.old, job.data.head)
    changes = linear_changes(new, tuned, job.adaptation, job.upgrade.old)
    refitter = _Refitter(options.ridge, skip_reasons(new, tuned, job.adaptation, job.upgrade.old, changes))
    texts = job.data.train.take(range(min(options.texts, len(job.data.train))))
    old_examples, new_examples = encode_aligned(job.upgrade, job.data, texts)
    new_forward = BlockwiseForward(new, new_examples, job.recipe.precision)
    old_forward = BlockwiseForward(tuned, old_examples, job.recipe.precision)
    layers: dict[str, list[Change]] = {}
    for change in changes:
        if options.head or not change.is_head:
            layers.setdefault(new_forward.names[change.module], []).append(change)
    modules = [tuned.get_submodule(name) for name in layers]
    model_wrappers = lora_wrappers(tuned), lora_wrappers(new)
    for part in range(new_forward.num_parts):
        inputs = _layer_inputs(old_forward, modules)
        for group in _groups_of_equal_input(inputs, layers):
            first = layers[group[0]][0]
            if is_experts(first.module):
                experts = tuned.get_submodule(group[0]), first.module
                wrappers = [w.get(e, {}) for w, e in zip(model_wrappers, experts, strict=True)]
                refitter.refit_experts(layers[group[0]], experts, wrappers, inputs[group[0]], new_forward)
            else:
                group_changes = [change for name in group for change in layers[name]]
                refitter.refit_layers(group_changes, inputs[group[0]], new_forward)
        new_forward.run(advance=True)
        job.progress("ridge", part + 1, new_forward.num_parts, {})
    refitter.note_unreached(changes if options.head else [change for change in changes if not change.is_head])
    if all(change.is_head for change in refitter.relative_changes):
        raise KindError(
            f"{job.adaptation.path}: ridge can refit none of the tuned layers: {refitter.describe_passed_over()}. Use "
            "direct or init."
        )
    job.notes["moved"] = round(refitter.mean_relative_change(), 4)
    if refitter.skip_reasons:
        job.notes["passed_over"] = refitter.skip_reasons
    return new


def _layer_inputs(forward: BlockwiseForward, modules: list[Any]) -> dict[str, list[torch.Tensor]]:
    """Run a part of the old model, and return the inputs of each layer in it, by batch, in the order of execution."""
    import torch

    inputs: dict[str, list[torch.Tensor]] = {}
    last: torch.Tensor | None = None

    def append_input(name: str, _: int, rows: torch.Tensor, __: torch.Tensor) -> None:
        nonlocal last
        narrow = rows.float()  # nothing is lost: models run in float32 at most
        last = last if last is not None and torch.equal(last, narrow) else narrow  # stored once if layers share it
        inputs.setdefault(name, []).append(last)

    forward.run(modules, append_input, advance=True)
    return inputs


def _groups_of_equal_input(inputs: dict[str, list[torch.Tensor]], layers: dict[str, list[Change]]) -> list[list[str]]:
    """Group consecutive layers with the same input, such as queries, keys and values; experts are never grouped."""
    import torch

    groups: list[list[str]] = []
    last_is_experts = True
    for name, rows in inputs.items():
        is_experts_layer = is_experts(layers[name][0].module)
        ungrouped = last_is_experts or is_experts_layer
        if groups and not ungrouped and torch.equal(inputs[groups[-1][0]][0], rows[0]):
            groups[-1].append(name)
        else:
            groups.append([name])
        last_is_experts = is_experts_layer
    return groups


class _Refitter:
    """Refits changes to the layers' inputs in the new model, and records how far they move.

    Args:
        ridge: λ.
        skip_reasons: The reason for each layer that cannot be refitted, by name.

    Attributes:
        relative_changes: ‖D' − D‖ / ‖D‖ of each refitted change, of experts one number each.
    """

    def __init__(self, ridge: float, skip_reasons: dict[str, str]):
        self.ridge = ridge
        self.skip_reasons = dict(skip_reasons)
        self.relative_changes: dict[Change, list[float]] = {}

    def refit_layers(self, changes: list[Change], old_inputs: list[torch.Tensor], forward: BlockwiseForward) -> None:
        """Refit layers with the same input.

        Args:
            changes: The changes of the layers.
            old_inputs: Their input in the old model, by batch, [rows, width].
            forward: The forward pass of the new model, at the part with the layers.
        """
        import torch

        width = changes[0].factor.shape[-1]
        cross, second = (torch.zeros(width, width, dtype=torch.float64, device=old_inputs[0].device) for _ in range(2))
        aligned = True

        def add_moments(_: str, number: int, rows: torch.Tensor, __: torch.Tensor) -> None:
            nonlocal aligned
            aligned = aligned and rows.shape == old_inputs[number].shape
            if aligned:
                cross.add_(old_inputs[number].to(rows).T @ rows)
                second.add_(rows.T @ rows)

        forward.run([changes[0].module], add_moments)
        for change in changes:
            if not aligned:
                self.skip_reasons[change.name] = "fed other tokens in the two models"
                continue
            change.set_factor(self._refit(change, change.factor, cross, second))

    def refit_experts(
        self,
        changes: list[Change],
        experts: tuple[Any, Any],
        wrappers: list[dict[str, Any]],
        old_hidden: list[torch.Tensor],
        forward: BlockwiseForward,
    ) -> None:
        """Refit each expert of a block on the tokens that the new model routes to it.

        The old model's expert runs on the same tokens, whether or not the old model routes them to it.

        Args:
            changes: The changes of the experts' projections.
            experts: The experts modules of the old and the new model.
            wrappers: PEFT's wrappers of the parameters of each.
            old_hidden: The experts' input in the old model, by batch, [rows, width].
            forward: The forward pass of the new model, at the part with the experts.
        """
        import torch

        batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        forward.run([experts[1]], lambda _, __, rows, routed: batches.append((rows, routed)))
        hidden, routed = (torch.cat(parts) for parts in zip(*batches, strict=True))
        old = torch.cat(old_hidden).to(hidden)
        for position, projection in enumerate(projection_names(experts[1])):
            change = next((change for change in changes if change.name.endswith(f".{projection}")), None)
            if change is None:
                continue
            refitted = change.factor.clone()
            width = change.factor.shape[-1]
            undetermined = []
            for number in range(len(refitted)):
                is_routed = (routed == number).any(dim=1)
                rows = [old[is_routed], hidden[is_routed]]
                if len(rows[0]) < width:  # fewer equations than unknowns
                    undetermined.append(number)
                    continue
                if position:
                    models = zip(experts, wrappers, rows, strict=True)
                    rows = [Expert(module, number, wrapper).down_projection_inputs(x) for module, wrapper, x in models]
                cross, second = rows[0].T @ rows[1], rows[1].T @ rows[1]
                refitted[number] = self._refit(change, refitted[number], cross, second)
            change.set_factor(refitted)
            if undetermined:
                all_experts = len(undetermined) == len(refitted)
                names = "all experts" if all_experts else f"experts {', '.join(map(str, undetermined))}"
                self.skip_reasons[change.name] = f"{names}: reached by fewer tokens than their width of {width}"

    def note_unreached(self, changes: list[Change]) -> None:
        """Add the layers that no text reached to those that are passed over.

        Args:
            changes: The changes of all layers to refit.
        """
        for change in changes:
            if change not in self.relative_changes:
                self.skip_reasons.setdefault(change.name, "not run by itself")

    def mean_relative_change(self) -> float:
        """Return the mean of ‖D' − D‖ / ‖D‖."""
        relative_changes = [number for numbers in self.relative_changes.values() for number in numbers]
        return sum(relative_changes) / len(relative_changes)

    def describe_passed_over(self) -> str:
        """Describe the first three of the layers that are passed over, with reasons."""
        layers = [f"{name} ({reason})" for name, reason in self.skip_reasons.items()]
        return "; ".join(layers[:3]) + (" …" if len(layers) > 3 else "") or "the adaptation changes no matrix"

    def _refit(self, change: Change, factor: torch.Tensor, cross: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        from regraft.weights import match_effect

        factor = factor.to(second.device)
        refitted = match_effect(factor, cross, second, self.ridge)
        relative_change = float((refitted - factor).norm() / factor.norm().clamp(min=1e-12))
        self.relative_changes.setdefault(change, []).append(relative_change)
        return refitted


RIDGE = Start(
    "ridge", refit, Ridge, summary="match the old delta's effect on the new base's own activations", needs=("text",)
)
