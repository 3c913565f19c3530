"""Paired comparisons of two sample logs of lm-evaluation-harness, example by example."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from regraft.diagnosis.regressions import mcnemar
from regraft.diagnosis.sample_logs import LOWER_IS_BETTER, WEIGHTED_METRICS, find_logs, harness_metric, read_log
from regraft.errors import MAX_LISTED, DataError, RecipeError, did_you_mean
from regraft.task import count_flips
from regraft.task.bootstrap import Interval, paired_difference
from regraft.task.score import score

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from regraft.diagnosis.sample_logs import Sample
    from regraft.task.metric import Floats

CONFIDENCE = 0.975
"""The one-sided confidence of each end of an interval: both ends together make the customary 95 %."""


@dataclasses.dataclass(frozen=True)
class MetricChange:
    """A metric of a task, before and after.

    Args:
        task: The name of the harness's task.
        filter: The name of the filter that extracted the answers; `none` if there is none.
        metric: The name of the metric.
        higher_is_better: Whether a higher score is better.
        examples: The number of examples that both logs have.
        old: The score of the old log on these examples, aggregated as the harness does.
        new: The score of the new log on these examples.
        difference: `new` − `old`, with its 95 % interval by the paired bootstrap.
        negative: The number of examples that were right before and are wrong after; None unless each value is 0 or 1.
        positive: The number of examples that were wrong before and are right after; None unless each value is 0 or 1.
        mcnemar: The two-sided p-value of McNemar's exact test; None unless each value is 0 or 1.
    """

    task: str
    filter: str
    metric: str
    higher_is_better: bool
    examples: int
    old: float
    new: float
    difference: Interval
    negative: int | None
    positive: int | None
    mcnemar: float | None


@dataclasses.dataclass(frozen=True)
class LogPair:
    """Two logs of a task, and the samples that they do not share.

    Args:
        task: The name of the harness's task.
        old: The path of the old log.
        new: The path of the new log.
        paired: The number of samples with the same document and filter in both logs.
        only_old: The number of samples that the old log alone has.
        only_new: The number of samples that the new log alone has.
        different_prompts: The number of paired samples whose prompts differ, as with another chat template.
        skipped: The reason why a metric is not compared, by the name of the metric.
    """

    task: str
    old: str
    new: str
    paired: int
    only_old: int
    only_new: int
    different_prompts: int
    skipped: dict[str, str]


@dataclasses.dataclass(frozen=True)
class SampleComparison:
    """A paired comparison of sample logs.

    Args:
        changes: Each compared metric of each task and filter.
        logs: The pair of logs of each task.
        only_old: The tasks of which there is an old log alone.
        only_new: The tasks of which there is a new log alone.
    """

    changes: tuple[MetricChange, ...]
    logs: tuple[LogPair, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]


def compare_samples(old: str | Path, new: str | Path, *, metric: str | None = None, seed: int = 0) -> SampleComparison:
    """Compare two evaluations by lm-evaluation-harness, example by example.

    Samples are paired by their filter, `doc_id` and `doc_hash`; prompts may differ and are counted if they do.

    Args:
        old: A log `samples_….jsonl`, a folder that is searched for logs, or a glob pattern.
        new: The same of the new model. Of two single logs, the names of the tasks may differ.
        metric: The one metric to compare; all by default.
        seed: The seed of the bootstrap.

    Returns:
        The scores of both with their paired difference, flips and McNemar's test; and what could not be paired.

    Raises:
        CheckpointError: A log cannot be read, or a line is not a JSON object; the message names the line.
        DataError: There is no log, a line is no sample, or nothing can be paired.
        RecipeError: No pair of logs has the metric.
    """
    old_logs, new_logs = find_logs(old), find_logs(new)
    if len(old_logs) == len(new_logs) == 1:
        old_logs = dict(zip(new_logs, old_logs.values(), strict=True))
    tasks = [task for task in old_logs if task in new_logs]
    if not tasks:
        raise DataError(
            f"{old} has logs of {_listed(old_logs)}, {new} of {_listed(new_logs)}: no task in common. Use logs of the "
            "same tasks."
        )
    changes: list[MetricChange] = []
    pairs: list[LogPair] = []
    for task in tasks:
        task_changes, pair = _compare_logs(task, old_logs[task], new_logs[task], metric, seed)
        changes += task_changes
        pairs.append(pair)
    if metric is not None and not changes:
        skipped = {name: reason for pair in pairs for name, reason in pair.skipped.items()}
        if metric in skipped:
            raise RecipeError(f"metric {metric!r} cannot be compared: {skipped[metric]}.")
        names = sorted(
            {name for task in tasks for sample in read_log(new_logs[task]).values() for name in sample.values}
        )
        raise RecipeError(
            f"metric {metric!r}: no log has it.{did_you_mean(metric, names)} They have {', '.join(names) or 'none'}."
        )
    return SampleComparison(
        tuple(changes),
        tuple(pairs),
        only_old=tuple(task for task in old_logs if task not in new_logs),
        only_new=tuple(task for task in new_logs if task not in old_logs),
    )


def _compare_logs(
    task: str, old_file: Path, new_file: Path, metric: str | None, seed: int
) -> tuple[list[MetricChange], LogPair]:
    old, new = read_log(old_file), read_log(new_file)
    keys = [key for key in old if key in new]
    if not keys:
        raise DataError(
            f"{old_file} and {new_file}: none of their {len(old):,} and {len(new):,} samples has the same document and "
            "filter. Use logs of the same task and data."
        )
    changes: list[MetricChange] = []
    skipped: dict[str, str] = {}
    for filter_name in dict.fromkeys(key.filter for key in keys):
        filter_keys = [key for key in keys if key.filter == filter_name]
        pairs = [(old[key], new[key]) for key in filter_keys]
        names = dict.fromkeys(name for pair in pairs for sample in pair for name in sample.values)
        for name in names:
            if metric in (None, name):
                try:
                    before, after = (
                        _example_values(name, samples, file)
                        for samples, file in zip(zip(*pairs, strict=True), (old_file, new_file), strict=True)
                    )
                except _NotComparableError as error:
                    skipped[name] = str(error)
                    continue
                changes.append(_compare_values(task, filter_name, name, before, after, seed))
    pair = LogPair(
        task=task,
        old=str(old_file),
        new=str(new_file),
        paired=len(keys),
        only_old=len(old) - len(keys),
        only_new=len(new) - len(keys),
        different_prompts=sum(old[key].prompt_hash != new[key].prompt_hash for key in keys),
        skipped=skipped,
    )
    return changes, pair


class _NotComparableError(Exception):
    """A value is of a form that does not add up over examples; the message names it."""


def _example_values(name: str, samples: Iterable[Sample], file: Path) -> Floats:
    """Return the value and the weight of each example, examples × 2."""
    import numpy as np

    rows = []
    for sample in samples:
        value = sample.values.get(name)
        value_and_weight = value if name in WEIGHTED_METRICS and isinstance(value, list) else [value, 1]
        if not _is_usable(value_and_weight):
            raise _NotComparableError(f"{file}, line {sample.line}: its value {value!r:.60} is not a finite number")
        rows.append(value_and_weight)
    return np.array(rows, dtype=np.float64)


def _is_usable(value_and_weight: list[Any]) -> bool:
    are_finite = (isinstance(part, int | float) and abs(part) <= sys.float_info.max for part in value_and_weight)
    return len(value_and_weight) == 2 and all(are_finite) and value_and_weight[1] > 0


def _compare_values(task: str, filter_name: str, name: str, old: Floats, new: Floats, seed: int) -> MetricChange:
    import numpy as np

    metric = harness_metric(name)
    targets = np.zeros(len(old))  # the values in the logs are scores already
    improvement = paired_difference(metric, targets, new, old, confidence=CONFIDENCE, seed=seed)
    difference = improvement
    if not metric.higher_is_better:
        difference = Interval(
            *(0.0 - end for end in (improvement.estimate, improvement.high, improvement.low))
        )  # no −0
    flips = None
    if name not in LOWER_IS_BETTER and bool(np.isin([old[:, 0], new[:, 0]], (0, 1)).all()):
        flips = count_flips((old[:, 0] == 1).tolist(), (new[:, 0] == 1).tolist())
    return MetricChange(
        task=task,
        filter=filter_name,
        metric=name,
        higher_is_better=metric.higher_is_better,
        examples=len(old),
        old=score(metric, targets, old),
        new=score(metric, targets, new),
        difference=difference,
        negative=None if flips is None else flips.negative,
        positive=None if flips is None else flips.positive,
        mcnemar=None if flips is None else mcnemar(flips.negative, flips.positive),
    )


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(list(names)[:MAX_LISTED]) + more
