"""`scaled`: the old delta, multiplied by a number λ.

Source: task arithmetic (Ilharco et al., 2023, arXiv:2212.04089), and on upgraded bases Chat Vector (Huang et al., 2024,
arXiv:2310.04799) and others. Here a λ that is not set differs from 1 only if that is significantly better.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from regraft.adaptation import HEAD_POLICIES
from regraft.errors import RecipeError
from regraft.methods.evidence import sample_evidence
from regraft.methods.method import OLD_HEAD_ONLY, Start

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from regraft.methods.evidence import Evidence
    from regraft.methods.job import Job

SCALES = (0.5, 0.75, 1.25, 1.5)
"""The values of λ to try for all tensors, besides 1. A finer grid gets closer to the best λ, but takes longer."""
GROUP_STEP = 0.25
"""The change of λ to try for a group, which is as large as the steps of `SCALES`."""
MIN_EXAMPLES = 8  # with fewer, the standard error of the mean loss is too inaccurate for a test
MIN_STANDARD_ERRORS = 2.0
"""The number of its standard errors that a gain must exceed; with 1, one of a dozen trials would often do by chance."""
GROUPS = ("embedding", "attention", "feed-forward", "norm", "other")
"""The groups of tensors that share a λ, in the order of trials."""
SUPPORTED_KINDS = ("full", "lora", "bottleneck")
"""The kinds whose delta is linear in a stored tensor."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Options of `scaled`: λ, or the examples to choose λ on.

    Args:
        scale: λ; None to choose it.
        labels: The number of labelled training examples per class to choose λ on (at most 256 in all, but one of each
            class); 0 to choose it by the divergence from the old model's outputs on training texts, for which the task
            needs no labels. Labels that the old weights were tuned on favour large λ.
        grouped: Whether λ may differ between embeddings, attention, feed-forward, norms and other tensors.
        confidence: Without labels: the least probability that the old model must give to its predicted class for a text
            to be used.

    Raises:
        RecipeError: `scale` is not a finite number, `labels` is negative, or `confidence` is not from 0 to 1.
    """

    scale: float | None = None
    labels: int = 0
    grouped: bool = True
    confidence: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a scale that is infinite or NaN, a negative number of labels and a confidence out of range."""
        if self.scale is not None and not (isinstance(self.scale, (int, float)) and math.isfinite(self.scale)):
            raise RecipeError(f"scale must be a number, neither infinite nor NaN, or null; found {self.scale!r}.")
        if self.labels < 0 or not 0 <= self.confidence <= 1:
            raise RecipeError(
                f"labels must be 0 or more examples per class (found {self.labels}), confidence from 0 to 1 "
                f"({self.confidence})."
            )


def graft_scaled(job: Job, options: Scaling) -> nn.Module | None:
    """Choose λ, and graft λ times the delta; in a LoRA B is scaled, in bottleneck adapters the second layer.

    The delta of tensors that the upgrade did not change is not scaled.

    Args:
        job: The job, with the task's training examples.
        options: λ, or the examples to choose it on.

    Returns:
        The model; None if the adaptation has been written.

    Raises:
        KindError: The adaptation's kind is not supported.
        RecipeError: A confidence is required, and the task's outputs have none.
    """
    from regraft.adaptation.transform import check_transformable

    check_transformable(job.adaptation, SUPPORTED_KINDS)
    scalable = _ScalableModel(job)
    scales = dict.fromkeys(scalable.groups, 1.0 if options.scale is None else float(options.scale))
    if options.scale is None and scalable.groups:  # without groups, the upgrade changed no tuned tensor
        evidence = sample_evidence(job, options.labels, options.confidence)
        if len(evidence.split) >= MIN_EXAMPLES:
            scales = _choose_scales(scalable, evidence, options.grouped, job)
    job.notes["scales"] = scales
    if all(scale == 1 for scale in scales.values()):
        job.graft()
        return None
    if not job.adaptation.family.tunes_base:
        scalable.scale(scales)
        return scalable.model

    def rule(name: str, delta: torch.Tensor, _shift: torch.Tensor) -> torch.Tensor:
        return scales[group_of(name)] * delta

    job.graft_transformed(rule)
    return None


def _choose_scales(scalable: _ScalableModel, evidence: Evidence, grouped: bool, job: Job) -> dict[str, float]:
    """Try a grid of λ for all groups, then a step up, or else down, for each group; accept significant gains only."""
    import torch

    from regraft.model import Deployment

    deployment = Deployment(scalable.model, job.upgrade.new, job.data, job.recipe.precision)
    targets = torch.as_tensor(deployment.examples(evidence.split).targets)
    scales = dict.fromkeys(scalable.groups, 1.0)
    num_trials = 0

    def measure_losses(trial_scales: Mapping[str, float]) -> torch.Tensor:
        nonlocal num_trials
        scalable.scale(trial_scales)
        num_trials += 1
        job.progress("scale", num_trials, 1 + len(SCALES) + 2 * len(trial_scales) * grouped, {})
        deployment.clear_outputs()
        with torch.no_grad():
            return evidence.losses(deployment.outputs(evidence.split), targets)

    unscaled_losses = measure_losses(scales)
    best_losses = unscaled_losses
    losses_by_scale = {scale: measure_losses(dict.fromkeys(scales, scale)) for scale in SCALES}
    lowest_losses = min(losses_by_scale.values(), key=lambda trial_losses: float(trial_losses.mean()))
    for scale in sorted(SCALES, key=lambda scale: abs(scale - 1)):
        trial_losses = losses_by_scale[scale]
        is_significant = _gain(unscaled_losses, trial_losses) > MIN_STANDARD_ERRORS
        # of the scales within a standard error of the lowest loss, the one closest to 1 is chosen
        if is_significant and _gain(trial_losses, lowest_losses) <= 1:
            best_losses = trial_losses
            scales = dict.fromkeys(scales, scale)
            break
    # for a single group, the grid has tried these steps
    stepped_groups = scalable.groups if grouped and len(scalable.groups) > 1 else []
    for group in stepped_groups:
        for step in (GROUP_STEP, -GROUP_STEP):
            trial_scales = {**scales, group: scales[group] + step}
            trial_losses = measure_losses(trial_scales)
            if _gain(best_losses, trial_losses) > MIN_STANDARD_ERRORS:
                best_losses = trial_losses
                scales = trial_scales
                break
    job.notes["loss"] = [round(float(final.mean()), 4) for final in (unscaled_losses, best_losses)]
    return scales


def _gain(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the mean decrease of losses on the same examples, in standard errors of that mean."""
    decreases = before - after
    mean = float(decreases.mean())
    standard_error = float(decreases.std()) / math.sqrt(len(decreases))
    if standard_error:
        return mean / standard_error
    return math.copysign(math.inf, mean) if decreases.any() else 0.0


class _ScalableModel:
    """The grafted model, whose deltas are scaled in place.

    Args:
        job: The job, with the adaptation to graft.

    Attributes:
        groups: The groups of the tensors with a delta to scale, in the order of `GROUPS`.
    """

    def __init__(self, job: Job):
        from regraft.model import device

        self.model: nn.Module = job.build_grafted_model().to(device())
        candidates = [_scalable_parameter(job, self.model, *item) for item in self.model.named_parameters()]
        self._parameters = [candidate for candidate in candidates if candidate is not None]
        self.groups = sorted({parameter.group for parameter in self._parameters}, key=GROUPS.index)

    def scale(self, scales: Mapping[str, float]) -> None:
        """Set every delta in the model to λ times the original delta.

        Args:
            scales: λ by group.
        """
        import torch

        with torch.no_grad():
            for parameter in self._parameters:
                scale = scales[parameter.group]
                if scale == 1:
                    parameter.tensor.copy_(parameter.grafted)
                elif parameter.new is None:
                    parameter.tensor.copy_(parameter.grafted * scale)
                else:
                    parameter.tensor.copy_(torch.lerp(parameter.new, parameter.grafted, scale))


@dataclasses.dataclass(frozen=True, eq=False)
class _ScalableParameter:
    """A parameter of the grafted model with a delta to scale.

    Args:
        tensor: The parameter's data, which is scaled in place.
        grafted: A copy of the original values.
        new: The new base's values; None for a parameter of an adapter, which is proportional to the delta.
        group: The group of tensors that share a λ.
    """

    tensor: torch.Tensor
    grafted: torch.Tensor
    new: torch.Tensor | None
    group: str


def _scalable_parameter(job: Job, model: nn.Module, name: str, parameter: nn.Parameter) -> _ScalableParameter | None:
    """Return a grafted parameter with its delta; None without a delta, or if the upgrade did not change the tensor."""
    from regraft.adaptation.lora import PEFT_PREFIX
    from regraft.adaptation.lora_transform import parameter_shift

    family = job.adaptation.family
    upgrade = job.upgrade
    base_name = family.proportional_parameter(name, model)
    if base_name is None:
        return None
    inner = base_name.removeprefix(PEFT_PREFIX).removeprefix(upgrade.new.prefix + ".")
    if parameter_shift(upgrade, inner) is None:
        return None
    grafted = parameter.detach().clone()
    new = upgrade.new.parameters[inner].to(grafted) if family.tunes_base else None
    if new is not None and new.equal(grafted):
        return None
    return _ScalableParameter(parameter.data, grafted, new, group_of(inner))


def group_of(name: str) -> str:
    """Return the group of a tensor; the tensors of a group share a λ.

    Args:
        name: The tensor's name inside the body.

    Returns:
        One of `GROUPS`.
    """
    from regraft.weights import kind_of

    kind = kind_of(name)
    return kind if kind != "head" else "other"


SCALED = Start(
    "scaled",
    graft_scaled,
    Scaling,
    summary="scale the old delta, as a whole and by group, by losses on texts",
    needs=lambda options: ("labels",) if options.labels else ("text",),
    heads=lambda options: OLD_HEAD_ONLY if options.scale is None else HEAD_POLICIES,
)
