"""Files of a training's best weights and of the average of its late weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from regraft.checkpoint import replace_atomically
from regraft.model.outputs import trainable_parameters
from regraft.recipe import best_step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    Curve = list[dict[str, float]]
    """A learning curve: an entry per evaluation, with `step`, `seconds` of training, and the evaluation's figures."""


class BestWeights:
    """Files of the trainable parameters at the best evaluation so far, and of their average over late evaluations.

    The files that the last checkpoint refers to are pinned: an interrupted run resumes from them.

    Args:
        folder: The folder of the files.
        average_after: The step after which evaluations count as late; infinity for no average.
        merit: Maps a score to a number that is higher for a better score.
    """

    def __init__(self, folder: Path, average_after: float, merit: Callable[[float], float]):
        self.folder = folder
        self.average_after = average_after
        self.merit = merit
        self.pinned: tuple[Path, ...] = ()

    def num_averaged(self, curve: Curve) -> int:
        """Return the number of late evaluations, which the average is over."""
        return sum(point["step"] > self.average_after for point in curve)

    def update(self, model: nn.Module, curve: Curve) -> None:
        """Write the weights if the last evaluation is the best so far, and add them to the average if it is late.

        Args:
            model: The model at the evaluation.
            curve: The learning curve so far; its last entry is the evaluation of these weights.
        """
        weights = {name: p.detach().contiguous() for name, p in trainable_parameters(model).items()}
        if best_step(curve, self.merit) == int(curve[-1]["step"]):
            self._write(self._best_file(curve), weights)
        if curve[-1]["step"] > self.average_after:
            num_averaged = self.num_averaged(curve)
            average = weights
            if num_averaged > 1:
                earlier = load_file(self._average_file(num_averaged - 1))
                average = {n: earlier[n].to(p.device).lerp(p, 1 / num_averaged) for n, p in weights.items()}
            self._write(self._average_file(num_averaged), average)
        self._remove_unused(curve)

    def files(self, curve: Curve) -> list[Path]:
        """Return the files that a run with a curve resumes from: the best weights, and the average if there is one."""
        num_averaged = self.num_averaged(curve)
        averages = [self._average_file(num_averaged)] if num_averaged else []
        return [self._best_file(curve), *averages]

    def pin(self, curve: Curve) -> None:
        """Protect the files of a curve from removal until the next call."""
        self.pinned = tuple(self.files(curve))
        self._remove_unused(curve)

    def restore(self, model: nn.Module, curve: Curve) -> None:
        """Load the best weights into the model.

        Args:
            model: The model, whose trainable parameters are set in place.
            curve: The complete learning curve.
        """
        self._load(model, self._best_file(curve))

    def restore_average(self, model: nn.Module, curve: Curve) -> None:
        """Load the average of the late weights into the model.

        Args:
            model: The model, whose trainable parameters are set in place.
            curve: The complete learning curve, with at least one late evaluation.
        """
        self._load(model, self._average_file(self.num_averaged(curve)))

    def _load(self, model: nn.Module, file: Path) -> None:
        stored = load_file(file)
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                parameter.copy_(stored[name])

    def _write(self, file: Path, weights: dict[str, torch.Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replace_atomically(file, synced=False) as temporary:
            save_file(weights, temporary)

    def _remove_unused(self, curve: Curve) -> None:
        used = (*self.files(curve), *self.pinned)
        for file in [*self.folder.glob("step-*"), *self.folder.glob("mean-*")]:
            if file not in used:
                file.unlink()

    def _best_file(self, curve: Curve) -> Path:
        return self.folder / f"step-{best_step(curve, self.merit)}.safetensors"

    def _average_file(self, num_averaged: int) -> Path:
        return self.folder / f"mean-{num_averaged}.safetensors"
