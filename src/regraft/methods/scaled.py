"""`scaled`: λ times the old delta.

Source: task arithmetic (Ilharco et al., 2023, arXiv:2212.04089); on an upgraded base Chat Vector (Huang et al., 2024,
arXiv:2310.04799) and others use λ. Here it leaves 1 only where that is better by more than chance would have it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from regraft.adaptation import HEAD_POLICIES
from regraft.errors import RecipeError
from regraft.methods.evidence import gather
from regraft.methods.method import OLD_HEAD_ONLY, Start

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from regraft.methods.evidence import Evidence
    from regraft.methods.job import Job

GRID = (0.5, 0.75, 1.25, 1.5)
STEP = 0.25
FEWEST = 8
CHANCE = 2.0  # standard errors: there are a dozen trials
KINDS = ("full", "lora", "bottleneck")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How λ is chosen.

    Args:
        scale: λ; None to choose it.
        labels: Training examples a class to choose on; 0 to read no label and choose by the divergence from the old
            tuned model's outputs on training texts. Labels that the old weights were tuned on flatter large λ.
        grouped: Whether embeddings, attention, feed-forward and norms may each have a λ of their own.
        confidence: Without labels: how probable the old model's class must be for a text to be used.

    Raises:
        RecipeError: A number is out of its range.
    """

    scale: float | None = None
    labels: int = 0
    grouped: bool = True
    confidence: float = 0.0

    def __post_init__(self) -> None:
        """Check every number."""
        scale = self.scale
        if scale is not None and (not isinstance(scale, (int, float)) or not math.isfinite(scale)):
            raise RecipeError(f"scale is a number or null, found {scale!r}.")
        if self.labels < 0 or not 0 <= self.confidence <= 1:
            raise RecipeError(
                f"labels is 0 or more examples a class (found {self.labels}), confidence from 0 to 1 "
                f"({self.confidence})."
            )


def graft_scaled(job: Job, options: Scaling) -> Any:
    """Choose λ, and write new + λ·delta; of a LoRA B becomes λ·B, of bottleneck adapters the second layer.

    Tensors that the upgrade left exactly as they were keep their delta as it is.

    Args:
        job: What and where.
        options: How λ is chosen.

    Returns:
        The model; None where the adaptation is written.
    """
    from regraft.adaptation.transform import check_transformable

    check_transformable(job.adaptation, KINDS)
    deltas = _Deltas(job)
    scales = dict.fromkeys(deltas.groups, 1.0 if options.scale is None else float(options.scale))
    if options.scale is None and deltas.groups:  # if none, the upgrade changed nothing that was tuned
        evidence = gather(job, options.labels, options.confidence)
        if len(evidence.split) >= FEWEST:
            scales = _choose(deltas, evidence, options.grouped, job)
    job.notes["scales"] = scales
    if set(scales.values()) <= {1.0}:
        job.graft()
    elif job.adaptation.family.tunes_base:
        job.graft_transformed(lambda name, delta, _: scales[deltas.group(name)] * delta)
    else:
        deltas.scale(scales)
        return deltas.model
    return None


def _choose(deltas: _Deltas, evidence: Evidence, grouped: bool, job: Job) -> dict[str, float]:
    """Try a grid of λ for all, then a step up or down for each group; move only by more than chance would have it."""
    import torch

    from regraft.model import Deployment

    deployment = Deployment(deltas.model, job.upgrade.new, job.data, job.recipe.precision)
    targets = torch.as_tensor(deployment.examples(evidence.split).targets)
    scales = dict.fromkeys(deltas.groups, 1.0)
    tried = 0

    def losses(scales: Mapping[str, float]) -> torch.Tensor:
        nonlocal tried
        deltas.scale(scales)
        tried += 1
        job.progress("scale", tried, 1 + len(GRID) + 2 * len(scales) * grouped, {})
        deployment.clear_outputs()
        return evidence.losses(deployment.outputs(evidence.split), targets)

    first = best = losses(scales)
    grid = {value: losses(dict.fromkeys(scales, value)) for value in GRID}
    lowest = min(grid.values(), key=lambda trial: float(trial.mean()))
    for value, trial in sorted(grid.items(), key=lambda item: abs(item[0] - 1)):  # no farther than is needed
        if _gain(first, trial) > CHANCE and _gain(trial, lowest) <= 1:
            best, scales = trial, dict.fromkeys(scales, value)
            break
    for group in deltas.groups if grouped and len(deltas.groups) > 1 else ():
        for step in (STEP, -STEP):
            moved = {**scales, group: scales[group] + step}
            if _gain(best, trial := losses(moved)) > CHANCE:
                best, scales = trial, moved
                break
    job.notes["loss"] = [round(float(loss.mean()), 4) for loss in (first, best)]  # of direct, and of what is chosen
    return scales


def _gain(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return by how many standard errors of their mean difference losses on the same examples fell."""
    gain = before - after
    error = float(gain.std()) / math.sqrt(len(gain))
    return float(gain.mean()) / error if error else math.copysign(math.inf, float(gain.mean())) if gain.any() else 0.0


class _Deltas:
    """The grafted model, whose deltas are scaled in place.

    Args:
        job: Whose adaptation is grafted.
    """

    def __init__(self, job: Job):
        from regraft.model import device

        self.model = job.grafted().to(device())
        self.prefix = job.upgrade.new.prefix + "."
        self.parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str]] = []
        for name, parameter in self.model.named_parameters():
            if part := self._part(job, name, parameter):
                self.parts.append(part)
        order = ("embedding", "attention", "feed-forward", "norm", "other")
        self.groups = sorted({group for *_, group in self.parts}, key=order.index)

    def group(self, name: str) -> str:
        """Return which λ a tensor has.

        Args:
            name: Its name inside the body.

        Returns:
            The group.
        """
        from regraft.weights import kind_of

        group = kind_of(name)
        return group if group != "head" else "other"

    def scale(self, scales: Mapping[str, float]) -> None:
        """Put λ times every delta into the model.

        Args:
            scales: λ by group.
        """
        import torch

        with torch.no_grad():
            for parameter, grafted, new, group in self.parts:
                if scales[group] == 1:
                    parameter.copy_(grafted)
                elif new is None:
                    parameter.copy_(grafted * scales[group])
                else:
                    parameter.copy_(torch.lerp(new, grafted, scales[group]))

    def _part(self, job: Job, name: str, parameter: torch.Tensor) -> Any:
        """Return a parameter that carries a delta, its value grafted and without it, and its group."""
        from regraft.adaptation.lora import START
        from regraft.adaptation.lora_transform import parameter_shift

        family, upgrade, value = job.adaptation.family, job.upgrade, parameter.detach().clone()
        changed = family.proportional_parameter(name, self.model)
        if changed is None:
            return None
        inner = changed.removeprefix(START).removeprefix(self.prefix)
        if parameter_shift(upgrade, inner) is None:
            return None
        new = upgrade.new.parameters[inner].to(value) if family.tunes_base else None
        return None if new is not None and new.equal(value) else (parameter.data, value, new, self.group(inner))


SCALED = Start(
    "scaled",
    graft_scaled,
    Scaling,
    summary="scale the old delta, all of it and by group, as texts tell",
    needs=lambda options: ("labels",) if options.labels else ("text",),
    heads=lambda options: OLD_HEAD_ONLY if options.scale is None else HEAD_POLICIES,
)
