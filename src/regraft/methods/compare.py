"""Comparison of methods with tuning from scratch on the same data, seeds and order."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation import Adaptation, Outcome, load_adaptation
from regraft.checkpoint import check_output_path, write_json
from regraft.errors import RecipeError
from regraft.methods.comparison import COMPARISON_FILE, Comparison, KeepScores, Row
from regraft.methods.recycle import recycle
from regraft.methods.references import measure_references
from regraft.methods.registry import find_method
from regraft.model import match_labels
from regraft.model.keep import keep_metric
from regraft.progress import Progress, silent
from regraft.recipe import Recipe
from regraft.task import count_flips, deviation, find_metric, load_data, recovery

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regraft.methods.references import References
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
    served_base: str | None = None,
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
        served_base: The path or hub id by which a server will name the new base; see `recycle`.
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
    references: list[References] = []
    chance_scores: list[float] = []
    lm_eval: dict[str, dict[str, dict[str, float]]] = {}
    for seed in seeds:
        data = load_data(task, seed).with_virtual_tokens(adaptation.num_virtual_tokens, upgrade.new.max_input_length)
        data.require_labels("method scratch")
        data = match_labels(adaptation, data)
        split = data.test or data.dev
        seed_references = measure_references(upgrade, adaptation, data, recipe.resolve_precision(), out, progress)
        references.append(seed_references)
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
                served_base=served_base,
                force=force,
                progress=_prefix_stages(progress, name),
            )
            if name == "scratch":
                chance_scores.append(_chance_score(outcomes[name], seed_references, split.name))
            rows[name].append(
                _row(outcomes[name], outcomes["scratch"], split.name, chance_scores[-1], seed_references.old.right)
            )
            outcome_paths.append(str(outcomes[name].path))
        if seed == seeds[0]:
            lm_eval = _harness_scores(seed_references, outcomes)
    comparison = Comparison(
        task=data.name,
        metric=data.metric,
        split=split.name,
        old=_mean_score([seed_references.old.score for seed_references in references]),
        majority=statistics.fmean(chance_scores),
        rows=tuple(_mean(method_rows) for method_rows in rows.values()),
        outcomes=tuple(outcome_paths),
        type=data.task.type,
        selection=None if data.selection.name == data.metric else data.selection.name,
        keep=_keep_scores(data.task, references),
        lm_eval=lm_eval,
    )
    write_json(out / COMPARISON_FILE, dataclasses.asdict(comparison), indent=2)
    return comparison


def _prefix_stages(progress: Progress, method: str) -> Progress:
    """Return a progress callback that puts a method's name before each stage."""

    def report(stage: str, completed: int, total: int, figures: Mapping[str, float]) -> None:
        progress(f"{method}: {stage}", completed, total, figures)

    return report


def _chance_score(scratch: Outcome, references: References, split: str) -> float:
    """Return the chance score on a split: the bare new base's where it answers in place of guessing."""
    chance = references.new_base.score if references.new_base else scratch.record.scores.majority(split)
    assert chance is not None  # scratch requires labels, so the task has them and a chance score
    return chance


def _mean_score(scores: Sequence[float | None]) -> float:
    return statistics.fmean(score for score in scores if score is not None)


def _keep_scores(task: Task, references: Sequence[References]) -> KeepScores | None:
    """Average the references' scores on what the task names in `keep` over seeds; None without."""
    metric = keep_metric(task)
    if metric is None:
        return None
    return KeepScores(
        metric=metric.name,
        old_base=_mean_score([seed.old_base.keep for seed in references if seed.old_base]),
        new_base=_mean_score([seed.new_base.keep for seed in references if seed.new_base]),
        old=_mean_score([seed.old.keep for seed in references]),
    )


def _harness_scores(references: References, outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores by lm-evaluation-harness of the old deployment and of outcomes, by the method's name."""
    scores = {method: outcome.record.notes.get("lm_eval", {}) for method, outcome in outcomes.items()}
    return {"old deployment": references.old.lm_eval, **scores} if references.old.lm_eval else {}


def _row(outcome: Outcome, scratch: Outcome, split: str, chance: float, old_right: Sequence[bool | None]) -> Row:
    """Compute the results of one outcome on a split, relative to scratch with the same seed."""
    record = outcome.record
    curve = outcome.curve
    start = record.scores.dev_at_start
    dev = record.scores.dev
    score = record.scores.of(split)
    reference = scratch.record.scores.of(split)
    # scratch requires labels, so the task has them and no score is missing
    assert dev is not None and score is not None and reference is not None
    curve_metric = find_metric(record.task.curve_metric)
    first_point = None
    if record.curve_is_agreement:
        start = None
        dev = dev if record.task.selection is None else None
    else:
        dev = max((point["score"] for point in curve), key=curve_metric.merit)
        target = scratch.curve[-1]["score"]
        first_point = next((point for point in curve if curve_metric.gain(point["score"], target) >= 0), None)
    right = outcome.right(split)
    return Row(
        method=record.method,
        seeds=(record.seed,),
        start=start,
        dev=dev,
        test=score,
        test_deviation=None,
        recovery=recovery(score, chance, reference, find_metric(record.task.metric)),
        steps_to_scratch=first_point["step"] if first_point else None,
        seconds_to_scratch=first_point["seconds"] if first_point else None,
        negative_flips=None if None in (*old_right, *right) else count_flips(old_right, right).negative_rate,
        labels=record.cost.labels,
        steps=record.cost.steps,
        seconds=record.cost.seconds,
        keep=record.notes.get("keep", {}).get("score"),
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
