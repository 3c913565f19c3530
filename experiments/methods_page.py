"""Write the page of the experiment over all methods from its figures."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from provenance import provenance_section, refusals_section
from tables import (
    CELL_KEYS,
    MISSING,
    distinct_keys,
    distinct_values,
    format_difference,
    format_mean,
    format_steps_share,
    markdown_table,
    median_steps_share,
    select,
)
from targets import MIN_RECOVERY, judge_targets

from regraft.task import MIN_HEADROOM

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from tables import Row

    FormatCell = Callable[[list[Row], Row | None], str]
    """Writes a cell of a table from a method's runs, one per seed, and their difference to the method's reference."""


def write_page(results: dict[str, Any], introduction: str, *, with_targets: bool = True) -> str:
    """Write the page.

    Args:
        results: The content of `results.json`, as `figures.collect_results` returns it.
        introduction: The title and the Markdown above the tables.
        with_targets: Whether the runs are judged by the targets of the experiment over all methods.

    Returns:
        Markdown.
    """
    regimes = results["made"]["regimes"]
    sections = [introduction, _targets_section(results) if with_targets else "", _upgrades_section(results)]
    sections += _training_free_sections(results, regimes[0]["name"])
    for regime in regimes:
        if regime["shots"] is None:
            sections += _tuning_sections(results, regime)
        else:
            sections += _few_label_sections(results, regime)
    sections += [*_auto_sections(results), refusals_section(results), provenance_section(results)]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _list_methods(results: dict[str, Any], regime: str, *, training: bool | None = None) -> list[str]:
    """Return the methods that were run in a regime: with training, without training, or (None) all."""
    entries = {run["entry"] for run in results["runs"] if run["regime"] == regime}
    return [
        name
        for name, method in results["methods"].items()
        if name in entries and training in (None, "training" in method["needs"])
    ]


def _values_by_seed(runs: list[Row], name: str) -> list[float | None]:
    return [run[name] for run in sorted(runs, key=lambda run: run["seed"])]


def _mean_flips(runs: list[Row]) -> float:
    return 100 * statistics.fmean(run["negative_flips"] for run in runs)


def _upgrade_tables(results: dict[str, Any], regime: str, methods: list[str], format_cell: FormatCell) -> list[str]:
    """Write one table per upgrade and kind, with one row per method and one column per task."""
    regime_runs = select(results["runs"], regime=regime)
    tasks = distinct_values(regime_runs, "task")
    tables = []
    for upgrade, kind in distinct_keys(regime_runs, "upgrade", "kind"):
        rows = []
        for method in methods:
            row = [method]
            for task in tasks:
                cell = {"task": task, "upgrade": upgrade, "kind": kind, "entry": method}
                runs = select(regime_runs, **cell)
                differences = select(results["differences"], regime=regime, **cell)
                row.append(format_cell(runs, differences[0] if differences else None) if runs else MISSING)
            rows.append(row)
        tables.append(f"**{upgrade}, {kind}**\n\n" + markdown_table(["method", *tasks], rows))
    return tables


def _targets_section(results: dict[str, Any]) -> str:
    rows = [
        [target.description, "reached" if target.is_reached else "not reached", target.measured]
        for target in judge_targets(results)
    ]
    return "## What was aimed at\n\n" + markdown_table(["target", "", "measured"], rows) if rows else ""


def _upgrades_section(results: dict[str, Any]) -> str:
    """Write the distance of each upgrade, and the scores between which its methods lie."""
    runs = select(results["runs"], regime=results["made"]["regimes"][0]["name"])
    tasks = distinct_values(runs, "task")
    rows = []
    for upgrade, distance in results["upgrades"].items():
        for kind in distinct_values(runs, "kind"):
            cell_runs = [select(runs, task=task, upgrade=upgrade, kind=kind) for task in tasks]
            distance_text = f"{distance['l2']:.0f} ({distance['relative']:.0%})"
            rows.append([upgrade, distance_text, kind, *map(_format_baselines, cell_runs)])
    return (
        "## The upgrades\n\nTest scores: majority guess / old deployment / `direct` / `scratch` with its whole budget. "
        "The distance of the bases is L2, and in % of the old norm.\n\n"
        + markdown_table(["upgrade", "distance", "kind", *tasks], rows)
    )


def _format_baselines(runs: list[Row]) -> str:
    """Write the four reference scores of a cell: chance, old deployment, direct and scratch."""
    scratch, direct = select(runs, entry="scratch"), select(runs, entry="direct")
    if not scratch:
        return MISSING
    scores = [
        f"{statistics.fmean(run['majority'] for run in scratch):.3f}",
        format_mean(_values_by_seed(scratch, "old")),
        format_mean(_values_by_seed(direct, "test")),
        format_mean(_values_by_seed(scratch, "test")),
    ]
    return " / ".join(scores)


def _training_free_sections(results: dict[str, Any], regime: str) -> list[str]:
    """Write the section of the methods without training."""
    methods = _list_methods(results, regime, training=False)
    upgrades = list(results["upgrades"])
    rows = []
    for method in methods:
        differences = select(results["differences"], regime=regime, entry=method)
        runs = select(results["runs"], regime=regime, entry=method)
        rows.append(
            [
                method,
                *(_format_mean_gain(select(differences, upgrade=upgrade)) for upgrade in upgrades),
                str(sum(difference["low"] > 0 for difference in differences)),
                str(sum(difference["high"] < 0 for difference in differences)),
                str(len(differences)),
                f"{statistics.fmean(_values_by_seed(runs, 'seconds')):.1f}",
            ]
        )
    head = ["method", *(f"{upgrade}: points above direct" for upgrade in upgrades)]
    return [
        "## Without training\n\nMean difference to `direct` in points of test score; cells (task × upgrade × kind) "
        "where the 95 % interval is wholly above or below 0.",
        markdown_table([*head, "better in", "worse in", "of", "seconds"], rows),
        "Test score (recovery in % of scratch's gain over a majority guess), difference to `direct` in points with its "
        "95 % interval (paired bootstrap over the examples of test, all seeds on the same draw).",
        *_upgrade_tables(results, regime, methods, _format_score_cell),
    ]


def _format_mean_gain(differences: list[Row]) -> str:
    if not differences:
        return MISSING
    return f"{100 * statistics.fmean(difference['estimate'] for difference in differences):+.1f}"


def _format_score_cell(runs: list[Row], difference: Row | None) -> str:
    score, recovery = format_mean(_values_by_seed(runs, "test")), format_mean(_values_by_seed(runs, "recovery"), 0)
    return f"{score} ({recovery})" + (f"; {format_difference(difference)}" if difference else "")


def _tuning_sections(results: dict[str, Any], regime: dict[str, Any]) -> list[str]:
    """Write the sections of a regime with all labels; none if no method trained in it."""
    name = regime["name"]
    reference = results["made"]["regimes"][0]
    methods = _list_methods(results, name, training=True)
    if not methods:
        return []
    budget = ", ".join(
        f"{recipe['steps']} of {reference['recipes'][kind]['steps']} steps ({kind})"
        for kind, recipe in regime["recipes"].items()
    )
    noise = {
        tuple(row[key] for key in CELL_KEYS): row["negative_flips"] for row in select(results["noise"], regime=name)
    }
    mean_noise = f"; between two seeds of scratch {100 * statistics.fmean(noise.values()):.1f} %" if noise else ""
    scratch = select(results["runs"], regime=name, entry="scratch")
    num_without_recovery = sum(run["headroom"] < MIN_HEADROOM for run in scratch)
    remark = ""
    if num_without_recovery:
        min_points = f"{100 * MIN_HEADROOM:.0f}"
        remark = (
            f" {num_without_recovery} runs of cells where scratch gains less than {min_points} points have no recovery."
        )
    head = [
        "method",
        "steps to scratch's last dev score, % of its steps (median)",
        "never",
        "recovery %",
        "better than scratch in",
        "worse in",
        "of",
        "negative flips %",
        "seconds",
    ]
    return [
        f"## With tuning, {name}\n\nAll labels; {budget}, scratch always with the whole. Negative flips are against "
        f"the old deployment{mean_noise}. Better or worse than scratch: the 95 % interval of the difference on test is "
        "wholly above or below 0." + remark,
        markdown_table(head, [_tuning_row(results, name, method) for method in methods]),
        "Best dev score; test score (recovery %), difference to scratch in points; steps to scratch's last dev score "
        "in % of its steps (median over seeds; in brackets the seeds that never got there); negative flips in % "
        "(between two seeds of scratch).",
        *_upgrade_tables(results, name, methods, lambda runs, difference: _format_tuning_cell(runs, difference, noise)),
    ]


def _tuning_row(results: dict[str, Any], regime: str, method: str) -> list[str]:
    """Write the figures of a method over all cells of a regime."""
    runs = select(results["runs"], regime=regime, entry=method)
    differences = select(results["differences"], regime=regime, entry=method)
    recoveries = [run["recovery"] for run in runs if run["recovery"] is not None]
    return [
        method,
        format_steps_share(median_steps_share(runs)),
        f"{sum(run['share'] is None for run in runs)} of {len(runs)}",
        f"{statistics.fmean(recoveries):.0f}" if recoveries else MISSING,
        str(sum(difference["low"] > 0 for difference in differences)),
        str(sum(difference["high"] < 0 for difference in differences)),
        str(len(differences)) if differences else MISSING,
        f"{_mean_flips(runs):.1f}",
        f"{statistics.fmean(run['seconds'] for run in runs):.0f}",
    ]


def _format_tuning_cell(runs: list[Row], difference: Row | None, noise: dict[tuple[str, ...], float]) -> str:
    """Write the best dev score, the test score, the steps to scratch's last dev score, and the flips of a cell."""
    test = f"test {format_mean(_values_by_seed(runs, 'test'))} ({format_mean(_values_by_seed(runs, 'recovery'), 0)})"
    if difference:
        test += f", {format_difference(difference)}"
    steps = f"{format_steps_share(median_steps_share(runs))} %"
    num_never = sum(run["share"] is None for run in runs)
    if num_never:
        steps += f" [{num_never}]"
    flips = f"flips {_mean_flips(runs):.1f}"
    scratch_flips = noise.get(tuple(runs[0][key] for key in CELL_KEYS))
    if scratch_flips is not None:
        flips += f" ({100 * scratch_flips:.1f})"
    return "; ".join([f"dev {format_mean(_values_by_seed(runs, 'dev'))}", test, steps, flips])


def _few_label_sections(results: dict[str, Any], regime: dict[str, Any]) -> list[str]:
    """Write the section of a regime with few labels, for methods with and without training."""
    name, shots = regime["name"], regime["shots"]
    methods = _list_methods(results, name)
    rows = []
    for method in methods:
        runs = select(results["runs"], regime=name, entry=method)
        recoveries = [run["recovery"] for run in runs if run["recovery"] is not None]
        rows.append(
            [
                method,
                f"{statistics.median(recoveries) if recoveries else float('nan'):.0f}",
                f"{min(recoveries, default=float('nan')):.0f}",
                f"{sum(recovery >= MIN_RECOVERY for recovery in recoveries)} of {len(recoveries)}",
                _format_mean_gain(select(results["differences"], regime=name, entry=method)),
                f"{_mean_flips(runs):.1f}",
            ]
        )
    head = ["method", "recovery % (median)", "lowest", f"runs ≥ {MIN_RECOVERY} %"]
    head += ["points above scratch with as few", "negative flips %"]
    return [
        f"## {shots} labels a class\n\nRecovery is against scratch with all labels and its whole budget.",
        markdown_table(head, rows),
        f"Test score (recovery %), difference to scratch with {shots} labels a class in points.",
        *_upgrade_tables(results, name, methods, _format_score_cell),
    ]


def _auto_sections(results: dict[str, Any]) -> list[str]:
    """Write the choices of `auto` and their costs; no section if it was not run."""
    regimes = {regime["name"] for regime in results["made"]["regimes"] if regime["shots"] is None}
    runs = [run for run in results["runs"] if run["regime"] in regimes]
    autos = [name for name, method in results["methods"].items() if method["method"] == "auto"]
    rows = []
    for entry in autos:
        for cell in distinct_keys(select(runs, entry=entry), *CELL_KEYS):
            rows.append(_auto_row(entry, cell, runs, autos))
    head = [
        "",
        *CELL_KEYS,
        "chosen, a seed each",
        "steps %",
        "labels %",
        "seconds %",
        "test",
        "best other method",
        "points from it",
    ]
    return ["## auto\n\nWhat it chose, and its cost in % of scratch's.", markdown_table(head, rows)] if rows else []


def _auto_row(entry: str, cell: tuple[str, ...], runs: list[Row], autos: Collection[str]) -> list[str]:
    """Write the choices of an entry of `auto` in one cell, beside the best other method of the cell."""
    cell_runs = select(runs, **dict(zip(CELL_KEYS, cell, strict=True)))
    auto_runs = sorted(select(cell_runs, entry=entry), key=lambda run: run["seed"])
    best, best_score = _best_method(cell_runs, autos)
    return [
        entry,
        *cell,
        "; ".join(str(run.get("chosen", MISSING)) for run in auto_runs),
        *(
            f"{statistics.fmean(run[f'{cost}_share'] for run in auto_runs):.0f}"
            for cost in ("steps", "labels", "seconds")
        ),
        format_mean(_values_by_seed(auto_runs, "test")),
        f"{best} {best_score:.3f}",
        f"{100 * (statistics.fmean(run['test'] for run in auto_runs) - best_score):+.1f}",
    ]


def _best_method(runs: list[Row], autos: Collection[str]) -> tuple[str, float]:
    """Return the method of a cell with the highest mean test score, without `auto`, and that score."""
    scores = {
        f"{entry} ({regime})": statistics.fmean(run["test"] for run in select(runs, entry=entry, regime=regime))
        for entry, regime in distinct_keys(runs, "entry", "regime")
        if entry not in autos
    }
    return max(scores.items(), key=lambda item: item[1])
