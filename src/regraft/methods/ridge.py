"""`ridge`: the old delta, refitted to have the same effect on the new base's activations as on the old base's."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from regraft.adaptation.experts import Expert, is_experts, lora_wrappers, projection_names
from regraft.errors import MAX_LISTED, KindError, RecipeError
from regraft.methods.method import Start

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from regraft.adaptation.changes import Change
    from regraft.methods.job import Job
    from regraft.model.blockwise import BlockwiseForward

MIN_NORM = 1e-12  # so that a factor that is all zero causes no division by 0


@dataclasses.dataclass(frozen=True)
class Ridge:
    """Options of `ridge`: the ridge regression, and the texts it is fitted on.

    Args:
        ridge: λ, the strength of the penalty on the change of the delta, in units of the mean square of each layer's
            inputs in the new model.
        texts: The number of the task's training texts, without labels, on which activations are measured.
        head: Whether to refit the head too, so that its outputs on the new features match those on the old ones.

    Raises:
        RecipeError: `ridge` is not above 0, or `texts` is below 1.
    """

    ridge: float = 0.3  # higher stays closer to the old delta, lower fits the old effect better
    texts: int = 256  # more measure better, and take longer
    head: bool = True

    def __post_init__(self) -> None:
        """Refuse a ridge that is not above 0, and fewer than one text."""
        if not self.ridge > 0 or self.texts < 1:
            raise RecipeError(f"ridge must be above 0 (found {self.ridge}), texts at least 1 ({self.texts}).")


def graft_refitted(job: Job, options: Ridge) -> nn.Module:
    """Refit the delta of layer after layer to the layer's inputs in the new model.

    In every tuned layer that multiplies by a matrix, the delta D adds D·x_o to the layer's output, where x_o is the
    layer's input in the old model. In the new model, grafted and with all earlier layers refitted, the same token has
    the input x_n, and D is replaced by D', the ridge regression of D·x_o on x_n with a penalty on D' − D. In a LoRA
    only A changes, in bottleneck adapters only the first layer, so that the rank and the cost of serving stay the same.
    In a head, D is the whole weight.

    Layers that multiply by a matrix are linear layers, Conv1D, routers and experts. An expert is refitted on the tokens
    that the new model routes to it; if these are fewer than its width, it keeps its delta. A layer that runs more than
    once is refitted once, on all of its inputs. The outcome's notes name the layers that are passed over.

    Args:
        job: The job, with the task's training texts.
        options: The strength of the penalty, the number of texts, and whether to refit the head.

    Returns:
        The model, ready for tuning.

    Raises:
        KindError: The adaptation's kind is not supported, none of its layers can be refitted, or the two tokenizers
            divide too few of the texts into the same tokens.
    """
    from regraft.adaptation import load_model
    from regraft.adaptation.changes import SUPPORTED_KINDS, linear_changes, skip_reasons
    from regraft.adaptation.transform import check_transformable
    from regraft.model.blockwise import BlockwiseForward
    from regraft.model.examples import encode_aligned

    check_transformable(job.adaptation, SUPPORTED_KINDS)
    new_model: nn.Module = job.build_grafted_model()
    old_model = load_model(job.adaptation, job.upgrade.old, job.data.head)
    changes = linear_changes(new_model, old_model, job.adaptation, job.upgrade.old, job.row_match)
    reasons = skip_reasons(new_model, old_model, job.adaptation, job.upgrade.old, changes)
    refitter = _Refitter(options.ridge, reasons)
    texts = job.data.train.take(range(min(options.texts, len(job.data.train))))
    old_examples, new_examples = encode_aligned(job.upgrade, job.data, texts)
    new_forward = BlockwiseForward(new_model, new_examples, job.recipe.precision)
    old_forward = BlockwiseForward(old_model, old_examples, job.recipe.precision)
    selected_changes = [change for change in changes if options.head or not change.is_head]
    layers: dict[str, list[Change]] = {}
    for change in selected_changes:
        layers.setdefault(new_forward.names[change.module], []).append(change)
    old_modules = [old_model.get_submodule(name) for name in layers]
    old_wrappers = lora_wrappers(old_model)
    new_wrappers = lora_wrappers(new_model)
    for part in range(new_forward.num_parts):
        inputs = _layer_inputs(old_forward, old_modules)
        for names in _group_by_input(inputs, layers):
            name = names[0]
            new_module = layers[name][0].module
            if is_experts(new_module):
                old_module = old_model.get_submodule(name)
                wrappers = old_wrappers.get(old_module, {}), new_wrappers.get(new_module, {})
                refitter.refit_experts(layers[name], (old_module, new_module), wrappers, inputs[name], new_forward)
            else:
                group_changes = [change for member in names for change in layers[member]]
                refitter.refit_layers(group_changes, inputs[name], new_forward)
        new_forward.run(advance=True)
        job.progress("ridge", part + 1, new_forward.num_parts, {})
    refitter.note_unreached(selected_changes)
    if all(change.is_head for change in refitter.relative_changes):
        raise KindError(
            f"{job.adaptation.path}: ridge can refit none of the tuned layers: {refitter.describe_passed_over()}. Use "
            "direct or init."
        )
    job.notes["moved"] = round(refitter.mean_relative_change(), 4)
    if refitter.skip_reasons:
        job.notes["passed_over"] = refitter.skip_reasons
    return new_model


def _layer_inputs(forward: BlockwiseForward, modules: list[nn.Module]) -> dict[str, list[torch.Tensor]]:
    """Run a part of the old model, and return the inputs of each layer in it, by batch, in the order of execution."""
    import torch

    inputs: dict[str, list[torch.Tensor]] = {}
    previous: torch.Tensor | None = None

    def append_input(name: str, _batch_index: int, rows: torch.Tensor, _outputs: torch.Tensor) -> None:
        nonlocal previous
        float_rows = rows.float()  # without loss, since models run in float32 at most
        if previous is None or not torch.equal(previous, float_rows):  # layers that share an input share a tensor
            previous = float_rows
        inputs.setdefault(name, []).append(previous)

    forward.run(modules, append_input, advance=True)
    return inputs


def _group_by_input(inputs: dict[str, list[torch.Tensor]], layers: dict[str, list[Change]]) -> list[list[str]]:
    """Group consecutive layers with the same input, such as queries, keys and values; experts are never grouped."""
    import torch

    groups: list[list[str]] = []
    for name, batches in inputs.items():
        first_name = groups[-1][0] if groups else None
        if (
            first_name is not None
            and not is_experts(layers[first_name][0].module)
            and not is_experts(layers[name][0].module)
            and torch.equal(inputs[first_name][0], batches[0])
        ):
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


class _Refitter:
    """The ridge regression of each layer, with a record of relative changes and of layers that are passed over.

    Args:
        ridge: λ, relative to the mean square of a layer's inputs in the new model.
        skip_reasons: The reason for each layer that cannot be refitted, by name.

    Attributes:
        relative_changes: ‖D' − D‖ / ‖D‖ of each refitted change; for experts, a number per expert.
    """

    def __init__(self, ridge: float, skip_reasons: dict[str, str]):
        self.ridge = ridge
        self.skip_reasons = dict(skip_reasons)
        self.relative_changes: dict[Change, list[float]] = {}

    def refit_layers(self, changes: list[Change], old_inputs: list[torch.Tensor], forward: BlockwiseForward) -> None:
        """Refit layers with the same input.

        Args:
            changes: The changes of the layers.
            old_inputs: The layers' input in the old model, by batch, [rows, width].
            forward: The forward pass of the new model, at the part with the layers.
        """
        import torch

        width = changes[0].factor.shape[-1]
        cross_moment, second_moment = (
            torch.zeros(width, width, dtype=torch.float64, device=old_inputs[0].device) for _ in range(2)
        )
        has_same_rows = True

        def add_moments(_name: str, batch_index: int, rows: torch.Tensor, _outputs: torch.Tensor) -> None:
            nonlocal has_same_rows
            old_rows = old_inputs[batch_index]
            if rows.shape != old_rows.shape:
                has_same_rows = False
            if has_same_rows:
                cross_moment.add_(old_rows.to(rows).T @ rows)
                second_moment.add_(rows.T @ rows)

        forward.run([changes[0].module], add_moments)
        for change in changes:
            if has_same_rows:
                change.set_factor(self._refit(change, change.factor, cross_moment, second_moment))
            else:
                self.skip_reasons[change.name] = "fed other tokens in the two models"

    def refit_experts(
        self,
        changes: list[Change],
        modules: tuple[nn.Module, nn.Module],
        wrappers: tuple[dict[str, Any], dict[str, Any]],
        old_inputs: list[torch.Tensor],
        forward: BlockwiseForward,
    ) -> None:
        """Refit each expert of a block on the tokens that the new model routes to it.

        The old model's expert runs on the same tokens, whether or not the old model routes them to it.

        Args:
            changes: The changes of the experts' projections.
            modules: The modules of the experts in the old and in the new model.
            wrappers: PEFT's wrappers of the parameters of the two modules, by parameter name.
            old_inputs: The experts' input in the old model, by batch, [rows, width].
            forward: The forward pass of the new model, at the part with the experts.
        """
        import torch

        new_inputs: list[torch.Tensor] = []
        routed_experts: list[torch.Tensor] = []

        def store_inputs(_name: str, _batch_index: int, rows: torch.Tensor, routed: torch.Tensor) -> None:
            new_inputs.append(rows)
            routed_experts.append(routed)

        _, new_module = modules
        forward.run([new_module], store_inputs)
        new_rows = torch.cat(new_inputs)
        old_rows = torch.cat(old_inputs).to(new_rows)
        routed = torch.cat(routed_experts)
        changes_by_projection = {change.name.rpartition(".")[2]: change for change in changes}
        for projection_index, projection in enumerate(projection_names(new_module)):
            change = changes_by_projection.get(projection)
            if change is None:
                continue
            refitted = change.factor.clone()
            width = change.factor.shape[-1]
            undetermined = []
            for expert_index in range(len(refitted)):
                is_routed = (routed == expert_index).any(dim=1)
                old_x, new_x = old_rows[is_routed], new_rows[is_routed]
                if len(new_x) < width:  # fewer equations than unknowns
                    undetermined.append(expert_index)
                    continue
                if projection_index:  # the second projection multiplies the first projection's activations
                    old_x, new_x = (
                        Expert(module, expert_index, wrapper).down_projection_inputs(x)
                        for module, wrapper, x in zip(modules, wrappers, (old_x, new_x), strict=True)
                    )
                refitted[expert_index] = self._refit(change, refitted[expert_index], old_x.T @ new_x, new_x.T @ new_x)
            change.set_factor(refitted)
            if undetermined:
                are_all = len(undetermined) == len(refitted)
                names = "all experts" if are_all else f"experts {', '.join(map(str, undetermined))}"
                self.skip_reasons[change.name] = f"{names}: reached by fewer tokens than their width of {width}"

    def note_unreached(self, changes: Iterable[Change]) -> None:
        """Record that the layers which were not observed, such as those that no text reached, are passed over.

        Args:
            changes: The changes of all layers to refit.
        """
        for change in changes:
            if change not in self.relative_changes:
                self.skip_reasons.setdefault(change.name, "not run by itself")

    def mean_relative_change(self) -> float:
        """Return the mean of ‖D' − D‖ / ‖D‖."""
        relative_changes = list(itertools.chain.from_iterable(self.relative_changes.values()))
        return sum(relative_changes) / len(relative_changes)

    def describe_passed_over(self) -> str:
        """Describe the first few layers that are passed over, with reasons."""
        if not self.skip_reasons:
            return "the adaptation changes no matrix"
        descriptions = [f"{name} ({reason})" for name, reason in self.skip_reasons.items()]
        ellipsis = " …" if len(descriptions) > MAX_LISTED else ""
        return "; ".join(descriptions[:MAX_LISTED]) + ellipsis

    def _refit(
        self, change: Change, factor: torch.Tensor, cross_moment: torch.Tensor, second_moment: torch.Tensor
    ) -> torch.Tensor:
        """Return the refitted factor, and record its relative change."""
        from regraft.weights import match_effect

        factor = factor.to(second_moment.device)
        refitted = match_effect(factor, cross_moment, second_moment, self.ridge)
        relative_change = float((refitted - factor).norm() / factor.norm().clamp(min=MIN_NORM))
        self.relative_changes.setdefault(change, []).append(relative_change)
        return refitted


RIDGE = Start(
    "ridge",
    graft_refitted,
    Ridge,
    summary="match the old delta's effect on the new base's own activations",
    needs=("text",),
)
