"""`scaled`: λ times the old delta.

Source: task arithmetic (Ilharco et al., 2023, arXiv:2212.04089), and on upgraded bases Chat Vector (Huang et al., 2024,
arXiv:2310.04799) and others. Here λ differs from 1 only if that is significantly better.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation import HEAD_POLICIES
from regraft.errors import RecipeError
from regraft.methods.evidence import sample_evidence
from regraft.methods.method import OLD_HEAD_ONLY, Start

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from regraft.methods.evidence import Evidence
    from regraft.methods.job import Job

GRID = (0.5, 0.75, 1.25, 1.5)  # of λ for all tensors, besides 1
GROUP_STEP = 0.25  # as fine as the grid
MIN_EXAMPLES = 8  # with fewer, the standard error of the mean loss says little
MIN_STANDARD_ERRORS = 2.0  # of a gain, not 1: a dozen values are tried
SUPPORTED_KINDS = ("full", "lora", "bottleneck")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """λ, or the examples to choose it on.

    Args:
        scale: λ; None to choose it.
        labels: The number of training examples per class to choose λ on; 0 to choose it by the divergence from the old
            tuned model's outputs on training texts. Labels that the old weights were tuned on favour large λ.
        grouped: Whether embeddings, attention, feed-forward and norms may each have their own λ.
        confidence: Without labels: the least probability of the old model's class for a text to be used.

    Raises:
        RecipeError: A number is out of range.
    """

    scale: float | None = None
    labels: int = 0
    grouped: bool = True
    confidence: float = 0.0

    def __post_init__(self) -> None:
        """Check every number."""
        scale = self.scale
        if scale is not None and (not isinstance(scale, (int, float)) or not math.isfinite(scale)):
            raise RecipeError(f"scale must be a number or null, found {scale!r}.")
        if self.labels < 0 or not 0 <= self.confidence <= 1:
            raise RecipeError(
                f"labels must be 0 or more examples per class (found {self.labels}), confidence from 0 to 1 "
                f"({self.confidence})."
            )


def graft_scaled(job: Job, options: Scaling) -> Any:
    """Choose λ, and graft λ times the delta; in a LoRA B is scaled, in bottleneck adapters the second layer.

    The delta of tensors that the upgrade did not change is not scaled.

    Args:
        job: The job.
        options: λ, or the examples to choose it on.

    Returns:
        The model; None if the adaptation has been written.
    """
    from regraft.adaptation.transform import check_transformable

    check_transformable(job.adaptation, SUPPORTED_KINDS)
    model = _ScalableModel(job)
    scales = dict.fromkeys(model.groups, 1.0 if options.scale is None else float(options.scale))
    if options.scale is None and model.groups:  # without groups, the upgrade changed no tuned tensor
        evidence = sample_evidence(job, options.labels, options.confidence)
        if len(evidence.split) >= MIN_EXAMPLES:
            scales = _choose_scales(model, evidence, options.grouped, job)
    job.notes["scales"] = scales
    if set(scales.values()) <= {1.0}:
        job.graft()
    elif job.adaptation.family.tunes_base:
        job.graft_transformed(lambda name, delta, _: scales[group_of(name)] * delta)
    else:
        model.scale(scales)
        return model.model
    return None


def _choose_scales(scalable: _ScalableModel, evidence: Evidence, grouped: bool, job: Job) -> dict[str, float]:
    """Try a grid of λ for all groups, then a step up and down for each group; accept significant gains only."""
    import torch

    from regraft.model import Deployment

    deployment = Deployment(scalable.model, job.upgrade.new, job.data, job.recipe.precision)
    targets = torch.as_tensor(deployment.examples(evidence.split).targets)
    scales = dict.fromkeys(scalable.groups, 1.0)
    num_trials = 0

    def losses(scales: Mapping[str, float]) -> torch.Tensor:
        nonlocal num_trials
        scalable.scale(scales)
        num_trials += 1
        job.progress("scale", num_trials, 1 + len(GRID) + 2 * len(scales) * grouped, {})
        deployment.clear_outputs()
        return evidence.losses(deployment.outputs(evidence.split), targets)

    first = best = losses(scales)
    grid = {value: losses(dict.fromkeys(scales, value)) for value in GRID}
    lowest = min(grid.values(), key=lambda trial: float(trial.mean()))
    for value, trial in sorted(grid.items(), key=lambda item: abs(item[0] - 1)):  # the closest to 1 that is as good
        if _gain(first, trial) > MIN_STANDARD_ERRORS and _gain(trial, lowest) <= 1:
            best = trial
            scales = dict.fromkeys(scales, value)
            break
    for group in scalable.groups if grouped and len(scalable.groups) > 1 else ():
        for step in (GROUP_STEP, -GROUP_STEP):
            stepped = {**scales, group: scales[group] + step}
            if _gain(best, trial := losses(stepped)) > MIN_STANDARD_ERRORS:
                best, scales = trial, stepped
                break
    job.notes["loss"] = [round(float(loss.mean()), 4) for loss in (first, best)]  # of λ = 1, and of the choice
    return scales


def _gain(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the mean decrease of losses on the same examples, in standard errors of that mean."""
    gain = before - after
    error = float(gain.std()) / math.sqrt(len(gain))
    return float(gain.mean()) / error if error else math.copysign(math.inf, float(gain.mean())) if gain.any() else 0.0


class _ScalableModel:
    """The grafted model, whose deltas are scaled in place.

    Args:
        job: The job, with the adaptation to graft.
    """

    def __init__(self, job: Job):
        from regraft.model import device

        self.model = job.grafted().to(device())
        self.prefix = job.upgrade.new.prefix + "."
        self.parameters: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str]] = []
        for name, parameter in self.model.named_parameters():
            if scalable := self._scalable(job, name, parameter):
                self.parameters.append(scalable)
        order = ("embedding", "attention", "feed-forward", "norm", "other")
        self.groups = sorted({group for *_, group in self.parameters}, key=order.index)

    def scale(self, scales: Mapping[str, float]) -> None:
        """Set every delta in the model to λ times the original one.

        Args:
            scales: λ by group.
        """
        import torch

        with torch.no_grad():
            for parameter, grafted, new, group in self.parameters:
                if scales[group] == 1:
                    parameter.copy_(grafted)
                elif new is None:
                    parameter.copy_(grafted * scales[group])
                else:
                    parameter.copy_(torch.lerp(new, grafted, scales[group]))

    def _scalable(self, job: Job, name: str, parameter: torch.Tensor) -> Any:
        """Return a parameter with a delta, its values with and without the delta, and its group; None for others."""
        from regraft.adaptation.lora import PEFT_PREFIX
        from regraft.adaptation.lora_transform import parameter_shift

        family = job.adaptation.family
        upgrade = job.upgrade
        value = parameter.detach().clone()
        base_name = family.proportional_parameter(name, self.model)
        if base_name is None:
            return None
        inner = base_name.removeprefix(PEFT_PREFIX).removeprefix(self.prefix)
        if parameter_shift(upgrade, inner) is None:
            return None
        new = upgrade.new.parameters[inner].to(value) if family.tunes_base else None
        return None if new is not None and new.equal(value) else (parameter.data, value, new, group_of(inner))


def group_of(name: str) -> str:
    """Return the group of tensors that share a λ.

    Args:
        name: The name of a tensor inside the body.
    """
    from regraft.weights import kind_of

    group = kind_of(name)
    return group if group != "head" else "other"


SCALED = Start(
    "scaled",
    graft_scaled,
    Scaling,
    summary="scale the old delta, as a whole and by group, by losses on texts",
    needs=lambda options: ("labels",) if options.labels else ("text",),
    heads=lambda options: OLD_HEAD_ONLY if options.scale is None else HEAD_POLICIES,
)
