"""`auto`: the cheapest method whose result passes a test, tried in stages from no training to scratch."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from typing import TYPE_CHECKING, Any

from regraft.adaptation.outcome_record import ANSWER_LOSS
from regraft.checkpoint import is_sealed, seal, write_json
from regraft.errors import KindError, RecipeError
from regraft.methods.method import Method, Part
from regraft.methods.objectives import DISTILL
from regraft.methods.target import determine_target, pseudo_labelled_data
from regraft.recipe import NUM_SEEDS
from regraft.tuning.distill import Distillation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from regraft.methods.job import Job
    from regraft.methods.method import Curve
    from regraft.methods.target import Target

SCRATCH_BELOW_SHARE = 0.5  # if less of the old score above chance is recovered, scratch may well be as good


@dataclasses.dataclass(frozen=True)
class Auto:
    """Options of `auto`: the stages to run, and the target that ends them.

    Args:
        tolerance: How much worse than the target the score may be: 0.01 is one point, or for a metric whose best score
            is not 1, a hundredth of the distance from chance to the old deployment's score; for the loss of a language
            model it is in nats. None for 0.01, or 0.02 nats.
        target: A dev score to reach; None for the old deployment's, made stricter if the new base is better at the
            task.
        confidence: The confidence that no more than the tolerance is lost, by the paired bootstrap over dev.
        labels: Whether to use labels, which the task must then have. If not, texts suffice, and the old model's
            predictions replace the labels.
        training_free: The methods to try before any tuning, in order; the first must be `direct`.
        budgets: The shares of the recipe's steps after which tuning is tested, one round of tuning per share.
        scratch: Whether to tune from scratch if nothing passes and every other stage recovers less than half of the
            old score above chance.

    Raises:
        RecipeError: `tolerance` is negative, infinite or NaN, `confidence` is not from 0.5 to below 1, `target` is
            infinite, NaN or set without labels, `training_free` does not start with `direct`, or `budgets` are not
            increasing shares above 0 and up to 1.
    """

    tolerance: float | None = None  # higher accepts a cheaper stage that may be worse
    target: float | None = None
    confidence: float = 0.9  # higher accepts a stage by mistake less often, and tunes for longer
    labels: bool = True
    training_free: tuple[str, ...] = ("direct", "ridge")
    budgets: tuple[float, ...] = (0.25, 0.5, 1.0)  # more stop closer to the step that suffices, but test more often
    scratch: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers out of range, stages that do not start with `direct`, and a target without labels."""
        if not (0 <= (self.tolerance or 0) < math.inf and 0.5 <= self.confidence < 1):
            raise RecipeError(
                f"tolerance must be a number from 0 up (found {self.tolerance}), confidence from 0.5 to below 1 "
                f"({self.confidence})."
            )
        if self.target is not None and not math.isfinite(self.target):
            raise RecipeError(f"target must be a score, neither infinite nor NaN, found {self.target}.")
        if not self.training_free or self.training_free[0] != "direct":
            raise RecipeError(f"training_free must start with direct, found {list(self.training_free)}.")
        shares = [0.0, *self.budgets]
        is_increasing = sorted(set(shares)) == shares
        if not (is_increasing and shares[-1] <= 1):
            raise RecipeError(
                f"budgets must be increasing shares of the steps, above 0 and at most 1, found {list(self.budgets)}."
            )
        if not self.labels and self.target is not None:
            raise RecipeError("a target needs labels on dev; without labels, the target is the old model.")


def find_cheapest(job: Job, options: Auto) -> Curve:
    """Run stage after stage until one passes, or until more tuning no longer helps.

    The stages are the methods without training, and then rounds of tuning. A stage passes if its dev score is worse
    than the target by at most the tolerance, with the chosen confidence. By default the target is the old deployment's
    score; if a linear probe on the bases' features scores significantly better on the new base, the target is better by
    the probe's gain. Each round of tuning starts from the best stage so far. Tuning ends after a round that gains less
    than the tolerance, except after a first round that clearly fails. If then little of the old score is recovered,
    scratch is tried too. If no stage passes, the stages are compared in the order in which they ran, and a later one is
    preferred to the best before it only if it is better by more than the tolerance.

    Args:
        job: The job; the chosen stage's adaptation is copied to its output folder.
        options: The stages and the target.

    Returns:
        The learning curves of all tuned stages, joined; empty if nothing was tuned.
    """
    if not options.labels:
        job = dataclasses.replace(job, data=pseudo_labelled_data(job))
    target = determine_target(job, options.tolerance, options.confidence, options.target, labelled=options.labels)
    stages = _Stages(job, target)
    chosen, reason = _choose(stages, target, options)
    notes = {
        "chosen": chosen["rung"],
        "why": reason,
        "target": target.metric.round_score(target.score),
        "old_deployment": target.metric.round_score(target.old),
        "probe_gain": None if target.gain is None else dataclasses.asdict(target.gain),
        "tried": [{name: value for name, value in stage.items() if name != "curve"} for stage in stages.results],
        "seconds": round(sum(stage["seconds"] for stage in stages.results), 2),
    }
    job.notes.update(notes)
    passed_over = chosen["notes"].get("passed_over")
    if passed_over:
        job.notes["passed_over"] = passed_over
    if not options.labels:
        job.notes["labels"] = 0
        if job.data.task.head_in_base:
            job.notes["score"] = ANSWER_LOSS
        job.notes["cannot_know"] = (
            "without labels, scores here are agreement with the old model: whether it is right where the two differ, "
            "and what the new base could do better, cannot be known"
        )
    shutil.copytree(stages.folder(chosen["rung"]) / "adaptation", job.output_folder)
    return stages.curve()


class _Stages:
    """The stages of a run, each in a separate folder, so that a resumed run reads the results of completed stages.

    Args:
        job: The job, whose work folder has a folder per stage.
        target: The target that the stages are tested against.

    Attributes:
        results: The results so far, in the order of stages; `rung`, the key of regraft 0.1, is the stage's name.
    """

    def __init__(self, job: Job, target: Target):
        self.job = job
        self.target = target
        self.results: list[dict[str, Any]] = []

    def folder(self, name: str) -> Path:
        """Return the folder of a stage."""
        return self.job.work_folder / "stages" / name.replace("+", "-").replace(" ", "-")

    def curve(self) -> Curve:
        """Join the learning curves of all stages that were tuned."""
        joined: Curve = []
        for result in self.results:
            steps = joined[-1]["step"] if joined else 0
            seconds = joined[-1]["seconds"] if joined else 0.0
            # further tuning starts with an evaluation of weights that an earlier stage has evaluated
            repeats_evaluation = bool(joined) and result["rung"] != "scratch"
            points = result["curve"][1:] if repeats_evaluation else result["curve"]
            joined += [
                {**point, "step": point["step"] + steps, "seconds": point["seconds"] + seconds} for point in points
            ]
        return joined

    def best(self, margin: float) -> dict[str, Any]:
        """Return the best result; a more expensive stage must be better by more than a margin in the metric's units."""
        best = self.results[0]
        metric = self.target.metric
        for result in self.results[1:]:
            if metric.merit(result["score"]) > metric.merit(best["score"]) + margin:
                best = result
        return best

    def run_method(self, name: str) -> dict[str, Any] | None:
        """Run a method with its default options; return None if it does not support the adaptation or the upgrade."""
        from regraft.methods.registry import find_method  # the registry imports this module

        try:
            return self._run(name, find_method(name).run)
        except KindError:
            return None

    def tune(self, start_share: float, end_share: float) -> dict[str, Any]:
        """Tune the best stage so far on labels and a teacher whose weight decays.

        Args:
            start_share: The share of the recipe's steps that earlier stages took.
            end_share: The share of the recipe's steps that will have been taken after this stage.
        """
        best_name = self.best(0.0)["rung"]
        total_steps, eval_every = self.job.recipe.steps, self.job.recipe.eval_every
        assert total_steps is not None and eval_every is not None  # the job's recipe is resolved
        start_step = round(total_steps * start_share)
        steps = max(1, round(total_steps * end_share) - start_step)
        recipe = dataclasses.replace(
            self.job.recipe,
            steps=steps,
            eval_every=min(steps, eval_every),
            seed=(self.job.recipe.seed + start_step) % NUM_SEEDS,  # so that stages differ in the order of examples
        )

        def tune_further(stage: Job) -> Curve:
            model = dataclasses.replace(stage, output_folder=self.folder(best_name) / "adaptation").load()
            curve: Curve = DISTILL.run(dataclasses.replace(stage, recipe=recipe), model, Distillation(decay="linear"))
            return curve

        start_name = best_name.partition(",")[0]  # without the share of an earlier tuning
        return self._run(f"{start_name}, tuned {100 * end_share:.0f} %", tune_further)

    def _run(self, name: str, run: Callable[[Job], Curve]) -> dict[str, Any]:
        """Run a stage and test its dev predictions, or read the result of a completed stage."""
        folder = self.folder(name)
        file = folder / "stage.json"
        seal_file = folder / "sealed.json"
        if not is_sealed(seal_file):
            adaptation_folder = folder / "adaptation"
            shutil.rmtree(adaptation_folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            stage = dataclasses.replace(
                self.job, work_folder=folder, output_folder=adaptation_folder, notes={}, labelled_rows=set()
            )
            start_time = time.perf_counter()
            curve = run(stage)
            seconds = curve[-1]["seconds"] if curve else time.perf_counter() - start_time
            result: dict[str, Any] = {
                "rung": name,
                "steps": int(curve[-1]["step"]) if curve else 0,
                "seconds": round(seconds, 2),
            }
            deployment = stage.deploy(stage.load(trainable=False))
            result |= self.target.measure(deployment.predictions(stage.data.dev))
            write_json(file, {**result, "notes": stage.notes, "curve": curve})
            seal(seal_file, [file, *(path for path in adaptation_folder.rglob("*") if path.is_file())])
        self.results.append(json.loads(file.read_text(encoding="utf-8")))
        return self.results[-1]


def _choose(stages: _Stages, target: Target, options: Auto) -> tuple[dict[str, Any], str]:
    """Run stage after stage; return the result of the chosen stage, and the reason for it."""
    for name in options.training_free:
        stage = stages.run_method(name)
        if stage and stage["verdict"] == "passes":
            return stage, f"{name} passes: {target.describe(stage)}"
    spent_share = 0.0
    reason = "the whole budget of tuning was spent"
    metric = target.metric
    for share in options.budgets:
        score_before = stages.best(0.0)["score"]
        stage = stages.tune(spent_share, share)
        if stage["verdict"] == "passes":
            return stage, f"{stage['rung']} passes: {target.describe(stage)}"
        gain = metric.gain(stage["score"], score_before)
        # a stage that clearly fails at first is tuned once more: far from the target, progress may start late
        is_first_failure = not spent_share and stage["verdict"] == "fails"
        if gain < target.tolerance and not is_first_failure:
            description = f"{metric.describe(gain, '.1f')}{metric.unit}"
            reason = f"the last {100 * (share - spent_share):.0f} % of the steps gained {description}"
            break
        spent_share = share
    if options.scratch and target.recovered_share(stages.best(0.0)["score"]) < SCRATCH_BELOW_SHARE:
        scratch = stages.run_method("scratch")
        if scratch and scratch["verdict"] == "passes":
            return scratch, f"scratch passes: {target.describe(scratch)}"
        reason += "; little of the old weights survives, so scratch was tried"
    best = stages.best(target.tolerance)
    return best, f"nothing passes ({reason}): {best['rung']} is taken, {target.describe(best)}"


def _needs(options: Auto) -> tuple[str, ...]:
    """Return the needs of `auto`."""
    return ("labels" if options.labels else "text", "training")


AUTO = Method(
    "auto",
    "the cheapest stage that reaches the old model's score",
    (Part("auto", find_cheapest, Auto, needs=_needs, scores_agreement=lambda options: not options.labels),),
)
