"""`auto`: the cheapest method whose result passes, by a ladder from no training to scratch."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import is_sealed, seal
from regraft.errors import KindError, RecipeError
from regraft.methods.method import Method, Part
from regraft.methods.objectives import DISTILL
from regraft.methods.target import pseudo_labelled, set_target, write_record
from regraft.recipe import NUM_SEEDS
from regraft.tuning.distill import Distillation

HOPELESS = 0.5  # of the old score above guessing: with less, a fresh start is likely to be as good

if TYPE_CHECKING:
    from pathlib import Path

    from regraft.methods.job import Job
    from regraft.methods.method import Curve
    from regraft.methods.target import Target


@dataclasses.dataclass(frozen=True)
class Auto:
    """What is good enough, and what may be tried.

    Args:
        tolerance: How much of the metric may be lost against the target: 0.01 is a point, or a hundredth of what the
            old deployment has above guessing where 1 does not bound the metric.
        target: A score on dev to reach; None for the old deployment's, raised where the new base is better at the task.
        confidence: How sure it must be that no more is lost, by the paired bootstrap over dev.
        labels: Whether labels may be used; without, the old model's predictions stand for them.
        training_free: Methods that are tried before any tuning, in order.
        budgets: The shares of the recipe's steps after which tuning is looked at; each goes on from the one before.
        scratch: Whether to tune from scratch where all else keeps less than half of the old score above guessing.

    Raises:
        RecipeError: A number is out of its range.
    """

    tolerance: float = 0.01
    target: float | None = None
    confidence: float = 0.9
    labels: bool = True
    training_free: tuple[str, ...] = ("direct", "ridge")
    budgets: tuple[float, ...] = (0.25, 0.5, 1.0)
    scratch: bool = True

    def __post_init__(self) -> None:
        """Check every number."""
        if not 0 <= self.tolerance < math.inf or not 0.5 <= self.confidence < 1:
            raise RecipeError(
                f"tolerance must not be negative (found {self.tolerance}), confidence from 0.5 to below 1 "
                f"({self.confidence})."
            )
        if self.target is not None and not math.isfinite(self.target):
            raise RecipeError(f"target is a score, found {self.target}.")
        if not self.training_free or self.training_free[0] != "direct":
            raise RecipeError(f"the ladder begins with direct, found {self.training_free}.")
        rising = [0.0, *self.budgets, 1.0]
        if sorted(set(rising[:-1])) != rising[:-1] or not rising[-2] <= 1:
            raise RecipeError(f"budgets are shares of the steps that rise to at most 1, found {self.budgets}.")
        if not self.labels and self.target is not None:
            raise RecipeError("a target needs labels on dev; without labels the old model is what is to be met.")


def climb_ladder(job: Job, options: Auto) -> list[dict[str, float]]:
    """Climb the ladder until a rung passes, or until climbing no longer helps.

    A rung passes if its score on dev, minus the target's, is above −tolerance with the wanted confidence. The target
    is the old deployment; where a linear probe on the bases' features finds the new one better at the task, its gain
    is added. Tuning starts from the best rung so far; where it gains less than the tolerance the ladder ends. If no
    rung passes, the cheapest is taken that no dearer one beats by the tolerance.

    Args:
        job: What and where.
        options: What is good enough.

    Returns:
        The learning curve of all tuning that was done, one after the other; empty if none was.
    """
    if not options.labels:
        job = dataclasses.replace(job, data=pseudo_labelled(job))
    bar = set_target(job, options.tolerance, options.confidence, options.target, labelled=options.labels)
    climb = _Climb(job, bar)
    chosen, why = _choose(climb, bar, options)
    notes = {
        "chosen": chosen["rung"],
        "why": why,
        "target": round(bar.target, 4),
        "old_deployment": round(bar.old, 4),
        "probe_gain": None if bar.gain is None else dataclasses.asdict(bar.gain),
        "tried": [{name: value for name, value in rung.items() if name != "curve"} for rung in climb.rungs],
        "seconds": round(sum(rung["seconds"] for rung in climb.rungs), 2),
    }
    job.notes.update(notes)
    if left := chosen["notes"].get("passed_over"):
        job.notes["passed_over"] = left
    if not options.labels:
        job.notes["labels"] = 0
        job.notes["cannot_know"] = (
            "without labels, scores here are agreement with the old model: whether it is right where the two differ, "
            "and what the new base could do better, cannot be known"
        )
    shutil.copytree(climb.folder(chosen["rung"]) / "adaptation", job.into)
    return climb.curve()


class _Climb:
    """The rungs that were tried, each in a folder of its own that an interrupted climb finds again.

    Args:
        job: The job they are for.
        bar: What they are tested against.
    """

    def __init__(self, job: Job, bar: Target):
        self.job, self.bar = job, bar
        self.rungs: list[dict[str, Any]] = []

    def folder(self, rung: str) -> Path:
        return self.job.work / "rungs" / rung.replace("+", "-").replace(" ", "-")

    def curve(self) -> list[dict[str, float]]:
        """Join the learning curves of all rungs that were trained."""
        joined: list[dict[str, float]] = []
        for rung in self.rungs:
            steps, seconds = (joined[-1]["step"], joined[-1]["seconds"]) if joined else (0, 0.0)
            points = rung["curve"][1:] if joined and rung["rung"] != "scratch" else rung["curve"]
            joined += [{**p, "step": p["step"] + steps, "seconds": p["seconds"] + seconds} for p in points]
        return joined

    def best(self, margin: float) -> dict[str, Any]:
        """Return the best rung; a dearer one must be better by more than a margin."""
        best, metric = self.rungs[0], self.bar.metric
        for rung in self.rungs[1:]:
            if metric.merit(rung["score"]) > metric.merit(best["score"]) + margin:
                best = rung
        return best

    def try_method(self, name: str) -> dict[str, Any] | None:
        """Run a method with its defaults as a rung; None if it cannot carry this kind of adaptation."""
        from regraft.methods.registry import find_method

        method = find_method(name)
        try:
            return self._rung(name, method.run)
        except KindError:
            return None

    def tune_on(self, done: float, budget: float) -> dict[str, Any]:
        """Tune from the best rung so far, from a share of the steps to a larger one, a fading teacher beside labels."""
        best = self.best(0.0)["rung"]
        steps = self.job.recipe.steps or 1
        share = max(1, round(steps * budget) - round(steps * done))
        recipe = dataclasses.replace(
            self.job.recipe, steps=share, eval_every=min(share, self.job.recipe.eval_every or share),
            seed=(self.job.recipe.seed + round(steps * done)) % NUM_SEEDS,
        )  # fmt: skip

        def tune_further(part: Job) -> Curve:
            model = dataclasses.replace(part, into=self.folder(best) / "adaptation").load()
            curve: Curve = DISTILL.run(dataclasses.replace(part, recipe=recipe), model, Distillation(decay="linear"))
            return curve

        return self._rung(f"{best.partition(',')[0]}, tuned {100 * budget:.0f} %", tune_further)

    def _rung(self, name: str, run: Any) -> dict[str, Any]:
        folder = self.folder(name)
        record, whole = folder / "rung.json", folder / "sealed.json"
        if not is_sealed(whole):
            shutil.rmtree(folder / "adaptation", ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            part = dataclasses.replace(self.job, work=folder, into=folder / "adaptation", notes={}, labelled=set())
            started = time.perf_counter()
            curve = run(part)
            seconds = curve[-1]["seconds"] if curve else time.perf_counter() - started
            entry: dict[str, Any] = {
                "rung": name,
                "steps": int(curve[-1]["step"]) if curve else 0,
                "seconds": round(seconds, 2),
            }
            entry |= self.bar.measure(part.deploy(part.load(trainable=False)).predictions(part.data.dev))
            write_record(record, {**entry, "notes": part.notes, "curve": curve})
            seal(whole, [record, *(file for file in part.into.rglob("*") if file.is_file())])
        self.rungs.append(json.loads(record.read_text(encoding="utf-8")))
        return self.rungs[-1]


def _choose(climb: _Climb, bar: Target, options: Auto) -> tuple[dict[str, Any], str]:
    """Try rung after rung; return the one to take, and why."""
    for name in options.training_free:
        rung = climb.try_method(name)
        if rung and rung["verdict"] == "passes":
            return rung, f"{name} passes: {bar.describe(rung)}"
    done, why = 0.0, "the whole budget of tuning was spent"
    for budget in options.budgets:
        before = climb.best(0.0)["score"]
        rung = climb.tune_on(done, budget)
        if rung["verdict"] == "passes":
            return rung, f"{rung['rung']} passes: {bar.describe(rung)}"
        gained, metric = bar.improvement(rung["score"], before), bar.metric
        if gained < bar.tolerance and (done or rung["verdict"] != "fails"):  # what is far below gets a second look
            gain = f"{metric.describe(gained, '.1f')}{metric.unit}"
            why = f"the last {100 * (budget - done):.0f} % of the steps gained {gain}"
            break
        done = budget
    if options.scratch and bar.survival(climb.best(0.0)["score"]) < HOPELESS:
        climb.try_method("scratch")
        why += "; little of the old weights survives, so scratch was tried"
    best = climb.best(bar.tolerance)
    return best, f"nothing passes ({why}): {best['rung']} is taken, {bar.describe(best)}"


def _needs(options: Auto) -> tuple[str, ...]:
    return ("labels" if options.labels else "text", "training")


AUTO = Method(
    "auto", "the cheapest of the methods that passes a test", (Part("auto", climb_ladder, Auto, needs=_needs),)
)
