"""The bar that the rungs of `auto`'s ladder are tested against."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import is_sealed, seal, to_json, write_atomic
from regraft.task import chance_score, paired_difference, score, weakness

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from regraft.methods.job import Job
    from regraft.task import Interval, Metric, TaskData
    from regraft.task.split import Targets


@dataclasses.dataclass(frozen=True)
class Target:
    """The target, and how a rung is tested against it.

    Args:
        metric: The task's.
        targets: Those of dev.
        reference: What the old deployment predicts on dev; the comparison is paired with it.
        old: Its score.
        floor: The score of the best guess that looks at no input.
        target: The score to reach.
        gain: How much better a linear probe is on the new base than on the old; None where none was made.
        tolerance: How much may be lost against the target, in the metric.
        confidence: Of the test.
        weakness: Why dev settles nothing, if so.
    """

    metric: Metric
    targets: Targets
    reference: list[Any]
    old: float
    floor: float
    target: float
    gain: Interval | None
    tolerance: float
    confidence: float
    weakness: str | None

    def survival(self, score: float) -> float:
        """Return which share of what the old deployment has above guessing a score has.

        Args:
            score: A rung's.

        Returns:
            1 for the old deployment's, 0 for guessing; 0 where the old deployment is no better than that.
        """
        is_better = self.metric.gain(self.old, self.floor) > 0
        return (score - self.floor) / (self.old - self.floor) if is_better else 0.0

    def improvement(self, score: float, other: float) -> float:
        """Return by how much a rung's score is better than another one.

        Args:
            score: The score.
            other: The other one.
        """
        return self.metric.gain(score, other)

    def measure(self, predictions: list[Any]) -> dict[str, Any]:
        """Test a rung.

        Args:
            predictions: Its predictions on dev.

        Returns:
            Its `score`, the `difference` to the target with `low` and `high`, and the `verdict`: it `passes` if low is
            above −tolerance, `fails` if high is below, else the examples of dev leave it `undecided`: so they do
            where they are too few or all alike.
        """
        to_old = paired_difference(self.metric, self.targets, predictions, self.reference, confidence=self.confidence)
        raised = self.improvement(self.target, self.old)
        low, high = to_old.low - raised, to_old.high - raised
        verdict = "passes" if low >= -self.tolerance else "fails" if high < -self.tolerance else "undecided"
        if self.weakness:
            verdict = "undecided"
        return {
            "score": round(score(self.metric, self.targets, predictions), 4),
            "difference": round(to_old.estimate - raised, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "verdict": verdict,
        }

    def describe(self, rung: Mapping[str, Any]) -> str:
        """Say in words how a rung stands.

        Args:
            rung: From `measure`.

        Returns:
            Its score and its difference to the target.
        """
        metric = self.metric
        sure = (
            f"dev has {self.weakness}"
            if self.weakness
            else f"{100 * self.confidence:.0f} % sure: from {metric.describe(rung['low'])} up"
        )
        return (
            f"{metric.name} {rung['score']:.3f} on dev, {metric.describe(rung['difference'])}{metric.unit} to the "
            f"target of {self.target:.3f} ({sure}; {metric.describe(self.tolerance, '.1f')} may be lost)"
        )


def set_target(job: Job, tolerance: float, confidence: float, target: float | None, *, labelled: bool) -> Target:
    """Find out what is to be reached.

    Args:
        job: The job; its dev is what all is measured on.
        tolerance: How much may be lost; where the metric is not bounded by 1, of what the old deployment has above
            guessing.
        confidence: Of the tests.
        target: A score; None for the old deployment's, raised by what the new base adds to it.
        labelled: Whether dev has labels. If not, its targets are the old deployment's predictions, and what the new
            base adds cannot be known.

    Returns:
        The bar.
    """
    file, whole = job.work / "bar.json", job.work / "bar.sealed.json"
    if not is_sealed(whole):
        from regraft.model.probe import probe

        dev, probes = job.data.dev, []
        reference = job.old_deployment().predictions(dev) if labelled else dev.targets.tolist()
        if target is None and labelled:
            probes = [probe(base, job.data, job.recipe.precision) for base in (job.upgrade.old, job.upgrade.new)]
        write_record(file, {"reference": reference, "probes": probes})
        seal(whole, [file])
    record = json.loads(file.read_text(encoding="utf-8"))
    metric, targets = job.data.task.scoring, job.data.dev.targets
    old, gain = score(metric, targets, record["reference"]), None
    if record["probes"]:
        gain = paired_difference(metric, targets, record["probes"][1], record["probes"][0], confidence=confidence)
    if target is None:
        better = gain.estimate if gain and gain.low > 0 else 0.0
        target = old + better if metric.higher_is_better else old - better
    floor = chance_score(job.data, job.data.dev)
    return Target(
        metric,
        targets,
        record["reference"],
        old,
        floor,
        target,
        gain,
        metric.share_to_difference(tolerance, floor, old),
        confidence,
        weakness(job.data, job.data.dev),
    )


def pseudo_labelled(job: Job) -> TaskData:
    """Return the task with what the old model predicts in place of every target of train and dev.

    Args:
        job: The job.

    Returns:
        The task.
    """
    old, task = job.old_deployment(), job.data.task
    train, dev = (
        dataclasses.replace(split, targets=task.as_targets(old.predictions(split)))
        for split in (job.data.train, job.data.dev)
    )
    agreement = job.data.with_settings(metric=task.metrics[0].name)
    return dataclasses.replace(agreement, train=train, dev=dev, labelled=True)


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write what an interrupted climb resumes from, whole or not at all.

    Args:
        file: Where to.
        record: As JSON.
    """
    write_atomic(file, to_json(record, file.name) + "\n")
