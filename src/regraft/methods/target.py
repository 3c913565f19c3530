"""The target that the stages of `auto` are tested against."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import is_sealed, seal, write_json
from regraft.task import chance_score, paired_difference, score, weakness

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regraft.methods.job import Job
    from regraft.task import Interval, Metric, TaskData
    from regraft.task.split import Targets


@dataclasses.dataclass(frozen=True)
class Target:
    """A score on dev to reach, and the test of whether predictions reach it.

    Args:
        metric: The task's metric.
        targets: The targets of dev.
        reference: The old deployment's predictions on dev, with which the test is paired.
        old: The old deployment's score.
        chance: The score of the best prediction that ignores the input.
        score: The score to reach.
        gain: How much higher a linear probe scores on the new base than on the old one; None without probes.
        tolerance: How far below the target a score may be, in the metric.
        confidence: The confidence of the test.
        weakness: Why no test on dev can decide; None if it can.
    """

    metric: Metric
    targets: Targets
    reference: list[Any]
    old: float
    chance: float
    score: float
    gain: Interval | None
    tolerance: float
    confidence: float
    weakness: str | None

    def recovered_share(self, score: float) -> float:
        """Return the share of the old deployment's score above chance that a score has.

        Args:
            score: The score of a stage.

        Returns:
            1 for the old deployment's score, 0 for chance; 0 if the old deployment is no better than chance.
        """
        beats_chance = self.metric.gain(self.old, self.chance) > 0
        return (score - self.chance) / (self.old - self.chance) if beats_chance else 0.0

    def measure(self, predictions: list[Any]) -> dict[str, Any]:
        """Test the predictions of a stage.

        Args:
            predictions: The predictions on dev.

        Returns:
            The `score`; its `difference` to the target with the bounds `low` and `high` of its confidence interval;
            and the `verdict`: `passes`, `fails` or `undecided`. Examples of dev that are too few or all alike never
            decide.
        """
        difference = paired_difference(
            self.metric, self.targets, predictions, self.reference, confidence=self.confidence
        )
        required_gain = self.metric.gain(self.score, self.old)
        low, high = difference.low - required_gain, difference.high - required_gain
        verdict = "passes" if low >= -self.tolerance else "fails" if high < -self.tolerance else "undecided"
        if self.weakness:
            verdict = "undecided"
        return {
            "score": round(score(self.metric, self.targets, predictions), 4),
            "difference": round(difference.estimate - required_gain, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "verdict": verdict,
        }

    def describe(self, stage: Mapping[str, Any]) -> str:
        """Describe the result of a stage in words.

        Args:
            stage: A result of `measure`.

        Returns:
            Its score and its difference to the target.
        """
        metric = self.metric
        certainty = (
            f"dev has {self.weakness}"
            if self.weakness
            else f"{100 * self.confidence:.0f} % sure: from {metric.describe(stage['low'])} up"
        )
        return (
            f"{metric.name} {stage['score']:.3f} on dev, {metric.describe(stage['difference'])}{metric.unit} to the "
            f"target of {self.score:.3f} ({certainty}; {metric.describe(self.tolerance, '.1f')} may be lost)"
        )


def set_target(job: Job, tolerance: float, confidence: float, target: float | None, *, labelled: bool) -> Target:
    """Determine the score to reach.

    Args:
        job: The job; everything is measured on its dev.
        tolerance: How far below the target a score may be: in the metric, or if 1 does not bound the metric, as a share
            of the old deployment's score above chance.
        confidence: The confidence of the tests.
        target: A score; None for the old deployment's, plus what the new base adds to it.
        labelled: Whether dev has labels. If not, its targets are the old deployment's predictions, and what the new
            base adds cannot be known.

    Returns:
        The target.
    """
    file, seal_file = job.work_folder / "target.json", job.work_folder / "target.sealed.json"
    if not is_sealed(seal_file):
        from regraft.model.probe import probe

        dev = job.data.dev
        probes = []
        reference = job.old_deployment().predictions(dev) if labelled else dev.targets.tolist()
        if target is None and labelled:
            probes = [probe(base, job.data, job.recipe.precision) for base in (job.upgrade.old, job.upgrade.new)]
        write_json(file, {"reference": reference, "probes": probes})
        seal(seal_file, [file])
    record = json.loads(file.read_text(encoding="utf-8"))
    metric, targets = job.data.task.scoring, job.data.dev.targets
    old = score(metric, targets, record["reference"])
    gain = None
    if record["probes"]:
        gain = paired_difference(metric, targets, record["probes"][1], record["probes"][0], confidence=confidence)
    if target is None:
        certain_gain = gain.estimate if gain and gain.low > 0 else 0.0
        target = old + certain_gain if metric.higher_is_better else old - certain_gain
    chance = chance_score(job.data, job.data.dev)
    return Target(
        metric=metric,
        targets=targets,
        reference=record["reference"],
        old=old,
        chance=chance,
        score=target,
        gain=gain,
        tolerance=metric.share_to_difference(tolerance, chance, old),
        confidence=confidence,
        weakness=weakness(job.data, job.data.dev),
    )


def pseudo_labelled(job: Job) -> TaskData:
    """Return the task with the old model's predictions as the targets of train and dev.

    Args:
        job: The job.

    Returns:
        The task's data.
    """
    old = job.old_deployment()
    task = job.data.task
    train, dev = (
        dataclasses.replace(split, targets=task.as_targets(old.predictions(split)))
        for split in (job.data.train, job.data.dev)
    )
    agreement = job.data.with_settings(metric=task.metrics[0].name)
    return dataclasses.replace(agreement, train=train, dev=dev, labelled=True)
