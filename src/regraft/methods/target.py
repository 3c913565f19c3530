"""The target that the stages of `auto` are tested against."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import is_sealed, seal, write_json
from regraft.methods.answers import answered_data
from regraft.model.deployment import chance_score
from regraft.task import paired_difference, score, weakness

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regraft.methods.job import Job
    from regraft.task import Interval, Metric, TaskData
    from regraft.task.split import Targets


@dataclasses.dataclass(frozen=True)
class Target:
    """A dev score to reach, and the test of whether predictions reach it.

    Args:
        metric: The task's metric.
        targets: The dev targets.
        reference: The old deployment's dev predictions, with which the test is paired.
        old: The old deployment's score.
        chance: The dev score of chance.
        score: The score to reach.
        gain: The improvement of a linear probe from the old to the new base; None without probes.
        tolerance: How far below the target a score may be, in the metric's units.
        confidence: The confidence of the test, 0–1.
        weakness: The reason why no test on the dev examples can decide; None if a test can.
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
        """Return the share of the old deployment's gain over chance that a score recovers.

        Args:
            score: The dev score of a stage.

        Returns:
            1 for the old deployment's score, 0 for chance; 0 if the old deployment is no better than chance.
        """
        beats_chance = self.metric.gain(self.old, self.chance) > 0
        return (score - self.chance) / (self.old - self.chance) if beats_chance else 0.0

    def measure(self, predictions: list[Any]) -> dict[str, Any]:
        """Test the predictions of a stage.

        Args:
            predictions: The dev predictions, one per example.

        Returns:
            The `score`, the `difference` to the target, the bounds `low` and `high` of the difference's confidence
            interval, and the `verdict`: `passes`, `fails` or `undecided`. If dev has a weakness, the verdict is always
            `undecided`.
        """
        difference = paired_difference(
            self.metric, self.targets, predictions, self.reference, confidence=self.confidence
        )
        required_gain = self.metric.gain(self.score, self.old)
        low, high = difference.low - required_gain, difference.high - required_gain
        verdict = "undecided"
        if not self.weakness and low >= -self.tolerance:
            verdict = "passes"
        elif not self.weakness and high < -self.tolerance:
            verdict = "fails"
        return {
            "score": self.metric.round_score(score(self.metric, self.targets, predictions)),
            "difference": self.metric.round_score(difference.estimate - required_gain),
            "low": self.metric.round_score(low),
            "high": self.metric.round_score(high),
            "verdict": verdict,
        }

    def describe(self, stage: Mapping[str, Any]) -> str:
        """Describe the result of a stage in words.

        Args:
            stage: A result of `measure`.

        Returns:
            The score, the difference to the target and the certainty of the difference.
        """
        metric = self.metric
        if self.weakness:
            certainty = f"dev has {self.weakness}"
        else:
            certainty = f"{100 * self.confidence:.0f} % sure: from {metric.describe(stage['low'])} up"
        relation = "to" if metric.higher_is_better else "gained on"
        reached, target = (metric.format_score(value) for value in (stage["score"], self.score))
        return (
            f"{metric.name} {reached} on dev, {metric.describe(stage['difference'])}{metric.unit} {relation} the "
            f"target of {target} ({certainty}; {metric.describe(self.tolerance, '.1f')} may be lost)"
        )


def determine_target(
    job: Job, tolerance: float | None, confidence: float, target: float | None, *, labelled: bool
) -> Target:
    """Determine the score to reach.

    The predictions behind the target are stored in the work folder, from which a resumed run reads them.

    Args:
        job: The job, on whose dev examples all scores are measured.
        tolerance: How far below the target a score may be: in the metric, or if 1 does not bound the metric and it has
            no tolerance of its own, as a share of the old deployment's score above chance. None for the default.
        confidence: The confidence of the tests, 0–1.
        target: A score; None for the old deployment's, improved by the gain of a linear probe from the old to the new
            base if the gain is significant.
        labelled: Whether the dev targets are labels. If not, they are the old deployment's predictions, which cannot
            show such a gain.

    Returns:
        The target.
    """
    from regraft.model.probe import probe

    dev = job.data.dev
    file = job.work_folder / "target.json"
    seal_file = job.work_folder / "target.sealed.json"
    if not is_sealed(seal_file):
        task = job.data.task
        # answers that the old model wrote have no losses, without which some metrics of language models score nothing
        are_predictions = not labelled and (task.answers_needed or not task.head_in_base)
        reference = dev.targets.tolist() if are_predictions else job.old_deployment().predictions(dev)
        probes = []
        if target is None and labelled and not task.head_in_base:  # a probe predicts no texts
            probes = [probe(base, job.data, job.recipe.precision) for base in (job.upgrade.old, job.upgrade.new)]
        chance = chance_score(job.data, dev, job.upgrade.new, job.recipe.precision)
        write_json(file, {"reference": reference, "probes": probes, "chance": chance})
        seal(seal_file, [file])
    record = json.loads(file.read_text(encoding="utf-8"))
    metric = job.data.scoring
    old = score(metric, dev.targets, record["reference"])
    gain = None
    if record["probes"]:
        old_predictions, new_predictions = record["probes"]
        gain = paired_difference(metric, dev.targets, new_predictions, old_predictions, confidence=confidence)
    if target is None:
        certain_gain = gain.estimate if gain and gain.low > 0 else 0.0
        target = old + certain_gain if metric.higher_is_better else old - certain_gain
    chance = record["chance"]
    return Target(
        metric=metric,
        targets=dev.targets,
        reference=record["reference"],
        old=old,
        chance=chance,
        score=target,
        gain=gain,
        tolerance=metric.share_to_difference(tolerance, chance, old),
        confidence=confidence,
        weakness=weakness(job.data, dev),
    )


def pseudo_labelled_data(job: Job) -> TaskData:
    """Return the task's data with the old model's predictions as training and dev targets.

    Args:
        job: The job, with the old model and the task's unlabelled data.

    Returns:
        The task's data, marked as labelled, with the task type's agreement metric.
    """
    task = job.data.task
    if task.head_in_base:
        return answered_data(job, "train", "dev")
    old = job.old_deployment()
    train, dev = (
        dataclasses.replace(split, targets=task.as_targets(old.predictions(split)))
        for split in (job.data.train, job.data.dev)
    )
    data = job.data.with_settings(metric=(task.agreement_metric or task.metrics[0]).name)
    return dataclasses.replace(data, train=train, dev=dev, labelled=True)
