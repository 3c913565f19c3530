"""Compares methods with tuning from scratch on the same data, seeds and order."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import Adaptation, Outcome, load_adaptation, load_model
from regraft.checkpoint import check_output_path, write_json
from regraft.errors import RecipeError
from regraft.methods.comparison import Comparison, Row
from regraft.methods.recycle import recycle
from regraft.methods.registry import find_method
from regraft.model import Deployment, match_labels
from regraft.progress import Progress, silent
from regraft.recipe import Recipe
from regraft.task import count_flips, deviation, find_metric, load_data, recovery

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regraft.task import Task, TaskData
    from regraft.upgrade import Upgrade


def compare(
    upgrade: Upgrade,
    adaptation: Adaptation | str | Path,
    task: Task | TaskData | str | Path,
    methods: Sequence[str],
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    seeds: Sequence[int] = (20,),
    options: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Comparison:
    """Run methods on the same data, seeds and order, and compare them with scratch and the old deployment.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation to the old base, or its folder.
        task: The task: a task file, a `Task` or its data.
        methods: The names of the methods; scratch is added as the reference if it is missing.
        out: The folder for the outcome folders and `comparison.json`; existing outcomes of the same inputs are reused.
        recipe: The recipe for training, the same for all methods.
        seeds: The seeds, in place of the recipe's; each method runs once per seed.
        options: The methods' options by name.
        force: Whether to accept an old base with another fingerprint than the recorded one.
        progress: Called at each step.

    Returns:
        The comparison.

    Raises:
        RegraftError: As `recycle`.
    """
    names = list(dict.fromkeys(["scratch", *methods]))
    for name in names:
        find_method(name)
    recipe = recipe or Recipe()
    out = Path(out)
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(f"seeds must be one or more different numbers, found {', '.join(map(str, seeds)) or 'none'}.")
    for seed in seeds:
        dataclasses.replace(recipe, seed=seed)
    check_output_path(out)
    adaptation = adaptation if isinstance(adaptation, Adaptation) else load_adaptation(adaptation)
    adaptation.check_base(upgrade.old, force=force)
    rows: dict[str, list[Row]] = {name: [] for name in names}
    outcomes, old, majority = [], [], []
    for seed in seeds:
        data = load_data(task, seed).with_virtual_tokens(adaptation.virtual_tokens, upgrade.new.max_input_length)
        data = match_labels(adaptation, data)
        split = data.test or data.dev
        precision = recipe.resolve(len(data.train), 1.0).precision
        deployment = Deployment(load_model(adaptation, upgrade.old, data.head), upgrade.old, data, precision, progress)
        old.append(deployment.score(split))
        old_right = deployment.right(split)
        runs: dict[str, Outcome] = {}
        for name in names:
            runs[name] = recycle(
                upgrade,
                adaptation,
                data,
                name,
                out / f"{name.replace('+', '-')}-seed{seed}",
                recipe=dataclasses.replace(recipe, seed=seed),
                options=(options or {}).get(name),
                force=force,
                progress=lambda stage, *details, name=name: progress(f"{name}: {stage}", *details),
            )
            rows[name].append(_row(runs[name], runs["scratch"], split.name, old_right))
            outcomes.append(str(runs[name].path))
        majority.append(runs["scratch"].scores[f"{split.name}_majority"] or 0.0)
    comparison = Comparison(
        task=data.name,
        metric=data.metric,
        split=split.name,
        old=statistics.fmean(old),
        majority=statistics.fmean(majority),
        rows=tuple(_mean(rows_by_seed) for rows_by_seed in rows.values()),
        outcomes=tuple(outcomes),
    )
    write_json(out / "comparison.json", dataclasses.asdict(comparison), indent=2)
    return comparison


def _row(outcome: Outcome, scratch: Outcome, split: str, old_right: Sequence[bool]) -> Row:
    record, curve, scores = outcome.record, outcome.curve, outcome.record.scores
    start = scores.dev_at_start
    test = scores.of(split)
    chance = scratch.record.scores.majority(split)
    reference = scratch.record.scores.of(split)
    assert start is not None and test is not None and chance is not None and reference is not None  # as it has labels
    metric = find_metric(record.task.metric)
    target = scratch.curve[-1]["score"]
    reached = next((point for point in curve if metric.gain(point["score"], target) >= 0), None)
    return Row(
        method=record.method,
        seeds=(record.seed,),
        start=start,
        dev=max((point["score"] for point in curve), key=metric.merit),
        test=test,
        test_deviation=None,
        recovery=recovery(test, chance, reference, metric),
        steps_to_scratch=reached["step"] if reached else None,
        seconds_to_scratch=reached["seconds"] if reached else None,
        negative_flips=count_flips(old_right, outcome.right(split)).negative_rate,
        labels=record.cost.labels,
        steps=record.cost.steps,
        seconds=record.cost.seconds,
    )


def _mean(rows: list[Row]) -> Row:
    """Average over seeds; a figure that one seed lacks is None, since a target that is not reached has no average."""

    def mean(name: str) -> Any:
        values = [getattr(row, name) for row in rows]
        return None if None in values else statistics.fmean(values)

    figures = [field.name for field in dataclasses.fields(Row) if field.name not in ("method", "seeds")]
    averaged = {name: mean(name) for name in figures}
    averaged["test_deviation"] = deviation([row.test for row in rows])
    return Row(method=rows[0].method, seeds=tuple(seed for row in rows for seed in row.seeds), **averaged)
