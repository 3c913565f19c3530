"""Comparison of methods with tuning from scratch on the same data, seeds and order."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import Adaptation, Outcome, load_adaptation, load_model
from regraft.checkpoint import check_output_path, write_json
from regraft.errors import RecipeError
from regraft.methods.comparison import COMPARISON_FILE, Comparison, Row
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
    seeds: Sequence[int] = (Recipe.seed,),
    options: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Comparison:
    """Run methods on the same data, seeds and order, and compare them with scratch and the old deployment.

    Args:
        upgrade: The old and the new base.
        adaptation: The adaptation to the old base, or its folder.
        task: The task it was tuned for: a task file, a `Task` or its data.
        methods: The names of the methods; scratch is added as the reference if it is missing.
        out: The folder for the outcome folders and `comparison.json`; existing outcomes of the same inputs are reused.
        recipe: The recipe for training, the same for all methods.
        seeds: The seeds, in place of the recipe's; each method runs once per seed.
        options: The options of each method, by the method's name; a method without an entry uses its defaults.
        force: Whether to accept an old base whose fingerprint differs from the recorded one.
        progress: Called at each step.

    Returns:
        The comparison.

    Raises:
        RecipeError: There is no method of a name, the seeds are missing, repeated or out of range, or an option is out
            of range.
        OutcomeError: `out` is a file, or an outcome folder in it is of different inputs.
        RegraftError: As `recycle`, for inputs that a method cannot use.
    """
    names = list(dict.fromkeys(["scratch", *methods]))
    for name in names:
        find_method(name)  # raises before the first run if there is no such method
    recipe = recipe or Recipe()
    out = Path(out)
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(f"seeds must be one or more different numbers, found {', '.join(map(str, seeds)) or 'none'}.")
    recipes = {seed: dataclasses.replace(recipe, seed=seed) for seed in seeds}
    check_output_path(out)
    adaptation = adaptation if isinstance(adaptation, Adaptation) else load_adaptation(adaptation)
    adaptation.check_base(upgrade.old, force=force)
    rows: dict[str, list[Row]] = {name: [] for name in names}
    outcome_paths: list[str] = []
    old_scores: list[float] = []
    chance_scores: list[float] = []
    for seed in seeds:
        data = load_data(task, seed).with_virtual_tokens(adaptation.num_virtual_tokens, upgrade.new.max_input_length)
        data = match_labels(adaptation, data)
        split = data.test or data.dev
        precision = recipe.resolve_precision()
        deployment = Deployment(load_model(adaptation, upgrade.old, data.head), upgrade.old, data, precision, progress)
        old_scores.append(deployment.score(split))
        old_right = deployment.right(split)
        outcomes: dict[str, Outcome] = {}
        for name in names:
            outcomes[name] = recycle(
                upgrade,
                adaptation,
                data,
                name,
                out / f"{name.replace('+', '-')}-seed{seed}",
                recipe=recipes[seed],
                options=(options or {}).get(name),
                force=force,
                progress=_prefix_stages(progress, name),
            )
            rows[name].append(_row(outcomes[name], outcomes["scratch"], split.name, old_right))
            outcome_paths.append(str(outcomes[name].path))
        chance_scores.append(_chance_score(outcomes["scratch"], split.name))
    comparison = Comparison(
        task=data.name,
        metric=data.metric,
        split=split.name,
        old=statistics.fmean(old_scores),
        majority=statistics.fmean(chance_scores),
        rows=tuple(_mean(method_rows) for method_rows in rows.values()),
        outcomes=tuple(outcome_paths),
    )
    write_json(out / COMPARISON_FILE, dataclasses.asdict(comparison), indent=2)
    return comparison


def _prefix_stages(progress: Progress, method: str) -> Progress:
    """Return a progress callback that puts a method's name before each stage."""

    def report(stage: str, completed: int, total: int, figures: Mapping[str, float]) -> None:
        progress(f"{method}: {stage}", completed, total, figures)

    return report


def _chance_score(scratch: Outcome, split: str) -> float:
    """Return the chance score on a split."""
    chance = scratch.record.scores.majority(split)
    assert chance is not None  # scratch requires labels, so the task has them and a chance score
    return chance


def _row(outcome: Outcome, scratch: Outcome, split: str, old_right: Sequence[bool]) -> Row:
    """Compute the results of one outcome on a split, relative to scratch with the same seed."""
    record = outcome.record
    curve = outcome.curve
    start = record.scores.dev_at_start
    dev = record.scores.dev
    score = record.scores.of(split)
    chance = _chance_score(scratch, split)
    reference = scratch.record.scores.of(split)
    # scratch requires labels, so the task has them and no score is missing
    assert dev is not None and score is not None and reference is not None
    metric = find_metric(record.task.metric)
    first_point = None
    if record.curve_is_agreement:
        start = None
    else:
        dev = max((point["score"] for point in curve), key=metric.merit)
        target = scratch.curve[-1]["score"]
        first_point = next((point for point in curve if metric.gain(point["score"], target) >= 0), None)
    return Row(
        method=record.method,
        seeds=(record.seed,),
        start=start,
        dev=dev,
        test=score,
        test_deviation=None,
        recovery=recovery(score, chance, reference, metric),
        steps_to_scratch=first_point["step"] if first_point else None,
        seconds_to_scratch=first_point["seconds"] if first_point else None,
        negative_flips=count_flips(old_right, outcome.right(split)).negative_rate,
        labels=record.cost.labels,
        steps=record.cost.steps,
        seconds=record.cost.seconds,
    )


def _mean(rows: list[Row]) -> Row:
    """Average a method's rows over seeds; a figure that one seed lacks is None.

    If one seed never reaches scratch's score, for example, its steps until then have no average.
    """

    def mean(name: str) -> Any:
        values = [getattr(row, name) for row in rows]
        return None if None in values else statistics.fmean(values)

    figure_names = [field.name for field in dataclasses.fields(Row) if field.name not in ("method", "seeds")]
    means = {name: mean(name) for name in figure_names}
    means["test_deviation"] = deviation([row.test for row in rows])
    return Row(method=rows[0].method, seeds=tuple(seed for row in rows for seed in row.seeds), **means)
