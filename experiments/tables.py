"""From an experiment's figures (JSON) to its Markdown page."""

from __future__ import annotations

import json
import statistics
from typing import TYPE_CHECKING, Any

from targets import targets

from regraft.checkpoint import write_atomic
from regraft.errors import OutcomeError
from regraft.task import MIN_HEADROOM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    Runs = list[dict[str, Any]]

CELL = ("task", "upgrade", "kind")


def page(results: dict[str, Any], intro: str) -> str:
    """Write all tables.

    Args:
        results: From `figures.collect`.
        intro: What stands above them.

    Returns:
        Markdown.
    """
    regimes = results["made"]["regimes"]
    parts = [intro, _targets(results), _upgrades(results), *_training_free(results, regimes[0]["name"])]
    for regime in regimes:
        parts += (_tuned if regime["shots"] is None else _few)(results, regime)
    parts += [*_auto(results), _refused(results), _made(results)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def names(results: dict[str, Any], regime: str, wanted: Callable[[tuple[str, ...]], bool]) -> list[str]:
    """Give the methods that have runs in a regime and whose needs are as wanted."""
    there = {run["entry"] for run in results["runs"] if run["regime"] == regime}
    return [name for name, about in results["methods"].items() if name in there and wanted(tuple(about["needs"]))]


def is_free(needs: tuple[str, ...]) -> bool:
    """Whether a method with these needs does no training."""
    return "training" not in needs


def select(rows: Iterable[dict[str, Any]], **wanted: str) -> Runs:
    """Give the rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def mean_sd(values: list[float | None], digits: int = 3, scale: float = 1.0) -> str:
    """Write a mean and a standard deviation over seeds; a value that is lacking makes both lack."""
    known = [value * scale for value in values if value is not None]
    if not values or len(known) < len(values):
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _points(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{100 * row['estimate']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _one(rows: Runs) -> dict[str, Any] | None:
    return rows[0] if rows else None


def _values(rows: Runs, name: str) -> list[float | None]:
    return [row[name] for row in sorted(rows, key=lambda row: row["seed"])]


def _blocks(runs: Runs) -> list[tuple[str, str]]:
    return list(dict.fromkeys((run["upgrade"], run["kind"]) for run in runs))


def _tasks(runs: Runs) -> list[str]:
    return list(dict.fromkeys(run["task"] for run in runs))


def _grid(
    results: dict[str, Any], regime: str, methods: list[str], cell: Callable[[Runs, dict[str, Any] | None], str]
) -> list[str]:
    """Write a table for each upgrade and kind, with a row a method and a column a task."""
    runs, parts = select(results["runs"], regime=regime), []
    tasks = _tasks(runs)
    for upgrade, kind in _blocks(runs):
        rows = []
        for method in methods:
            where = {"upgrade": upgrade, "kind": kind, "entry": method}
            differences = select(results["differences"], regime=regime, **where)
            cells = [
                cell(select(runs, task=task, **where), _one(select(differences, task=task)))
                if select(runs, task=task, **where)
                else "–"
                for task in tasks
            ]
            rows.append([method, *cells])
        parts.append(f"**{upgrade}, {kind}**\n\n" + table(["method", *tasks], rows))
    return parts


def _targets(results: dict[str, Any]) -> str:
    rows = [[target.what, "reached" if target.reached else "not reached", target.found] for target in targets(results)]
    return "## What was aimed at\n\n" + table(["target", "", "measured"], rows) if rows else ""


def _upgrades(results: dict[str, Any]) -> str:
    runs = select(results["runs"], regime=results["made"]["regimes"][0]["name"])
    tasks, rows = _tasks(runs), []
    for upgrade, moved in results["upgrades"].items():
        for kind in dict.fromkeys(run["kind"] for run in runs):
            row = [upgrade, f"{moved['l2']:.0f} ({moved['relative']:.0%})", kind]
            for task in tasks:
                of = {"task": task, "upgrade": upgrade, "kind": kind}
                scratch, direct = (select(runs, entry=name, **of) for name in ("scratch", "direct"))
                if not scratch:
                    row.append("–")
                    continue
                floor = statistics.fmean(run["majority"] for run in scratch)
                parts = [
                    f"{floor:.3f}", mean_sd(_values(scratch, "old")), mean_sd(_values(direct, "test")),
                    mean_sd(_values(scratch, "test")),
                ]  # fmt: skip
                row.append(" / ".join(parts))
            rows.append(row)
    return (
        "## The upgrades\n\nTest scores: majority guess / old deployment / `direct` / `scratch` with its whole budget. "
        "The distance of the bases is L2, and in % of the old norm.\n\n"
        + table(["upgrade", "distance", "kind", *tasks], rows)
    )


def _training_free(results: dict[str, Any], regime: str) -> list[str]:
    methods = names(results, regime, is_free)
    differences = select(results["differences"], regime=regime)
    upgrades = list(results["upgrades"])
    rows = []
    for method in methods:
        mine = select(differences, entry=method)
        gains = [
            f"{100 * statistics.fmean(of):+.1f}" if (of := [d["estimate"] for d in select(mine, upgrade=name)]) else "–"
            for name in upgrades
        ]
        worse, better = sum(d["high"] < 0 for d in mine), sum(d["low"] > 0 for d in mine)
        seconds = statistics.fmean(_values(select(results["runs"], regime=regime, entry=method), "seconds"))
        rows.append([method, *gains, f"{better}", f"{worse}", str(len(mine)), f"{seconds:.1f}"])
    head = ["method", *(f"{name}: points above direct" for name in upgrades)]
    return [
        "## Without training\n\nMean difference to `direct` in points of test score; cells (task × upgrade × kind) "
        "where the 95 % interval is wholly above or below 0.",
        table([*head, "better in", "worse in", "of", "seconds"], rows),
        "Test score (recovery in % of scratch's gain over a majority guess), difference to `direct` in points with its "
        "95 % interval (paired bootstrap over the examples of test, all seeds on the same draw).",
        *_grid(results, regime, methods, _free_cell),
    ]


def _free_cell(runs: Runs, difference: dict[str, Any] | None) -> str:
    score, recovery = mean_sd(_values(runs, "test")), mean_sd(_values(runs, "recovery"), 0)
    return f"{score} ({recovery})" + (f"; {_points(difference)}" if difference else "")


def share_median(runs: Runs) -> float:
    """Give the median share of scratch's steps until its last score was reached; infinite if most never did."""
    return statistics.median([float("inf") if run["share"] is None else run["share"] for run in runs])


def _percent(value: float) -> str:
    return "never" if value == float("inf") else f"{value:.0f}"


def _tuned(results: dict[str, Any], about: dict[str, Any]) -> list[str]:
    regime, reference = about["name"], results["made"]["regimes"][0]
    methods = names(results, regime, lambda needs: not is_free(needs))
    if not methods:
        return []
    budget = ", ".join(
        f"{recipe['steps']} of {reference['recipes'][kind]['steps']} steps ({kind})"
        for kind, recipe in about["recipes"].items()
    )
    noise = {
        tuple(row[name] for name in CELL): row["negative_flips"] for row in select(results["noise"], regime=regime)
    }
    floor = statistics.fmean(noise.values()) if noise else None
    rows = []
    for method in methods:
        runs = select(results["runs"], regime=regime, entry=method)
        differences = select(results["differences"], regime=regime, entry=method)
        recoveries = [run["recovery"] for run in runs if run["recovery"] is not None]
        rows.append([
            method,
            _percent(share_median(runs)),
            f"{sum(run['share'] is None for run in runs)} of {len(runs)}",
            f"{statistics.fmean(recoveries):.0f}" if recoveries else "–",
            f"{sum(d['low'] > 0 for d in differences)}",
            f"{sum(d['high'] < 0 for d in differences)}",
            str(len(differences)) if differences else "–",
            f"{100 * statistics.fmean(run['negative_flips'] for run in runs):.1f}",
            f"{statistics.fmean(run['seconds'] for run in runs):.0f}",
        ])  # fmt: skip
    low = [run for run in select(results["runs"], regime=regime, entry="scratch") if run["headroom"] < MIN_HEADROOM]
    apart = f" {len(low)} runs of cells where scratch gains less than 3 points have no recovery." if low else ""
    between = f"; between two seeds of scratch {100 * floor:.1f} %" if floor is not None else ""
    head = [
        "method", "steps to scratch's last dev score, % of its steps (median)", "never", "recovery %",
        "better than scratch in", "worse in", "of", "negative flips %", "seconds",
    ]  # fmt: skip
    return [
        f"## With tuning, {regime}\n\nAll labels; {budget}, scratch always with the whole. Negative flips are against "
        f"the old deployment{between}. Better or worse than scratch: the 95 % interval of the difference on test is "
        "wholly above or below 0." + apart,
        table(head, rows),
        "Best dev score; test score (recovery %), difference to scratch in points; steps to scratch's last dev score "
        "in % of its steps (median over seeds; in brackets the seeds that never got there); negative flips in % "
        "(between two seeds of scratch).",
        *_grid(results, regime, methods, lambda runs, difference: _tuned_cell(runs, difference, noise)),
    ]


def _tuned_cell(runs: Runs, difference: dict[str, Any] | None, noise: dict[tuple[str, ...], float]) -> str:
    never = sum(run["share"] is None for run in runs)
    parts = [
        f"dev {mean_sd(_values(runs, 'dev'))}",
        f"test {mean_sd(_values(runs, 'test'))} ({mean_sd(_values(runs, 'recovery'), 0)})",
        f"{_percent(share_median(runs))} %" + (f" [{never}]" if never else ""),
        f"flips {100 * statistics.fmean(run['negative_flips'] for run in runs):.1f}",
    ]
    floor = noise.get(tuple(runs[0][name] for name in CELL))
    if floor is not None:
        parts[-1] += f" ({100 * floor:.1f})"
    if difference:
        parts[1] += f", {_points(difference)}"
    return "; ".join(parts)


def _few(results: dict[str, Any], about: dict[str, Any]) -> list[str]:
    regime = about["name"]
    methods = names(results, regime, lambda needs: True)
    rows = []
    for method in methods:
        runs = select(results["runs"], regime=regime, entry=method)
        recoveries = [run["recovery"] for run in runs if run["recovery"] is not None]
        differences = select(results["differences"], regime=regime, entry=method)
        gain = f"{100 * statistics.fmean(d['estimate'] for d in differences):+.1f}" if differences else "–"
        middle, least = (f(recoveries) if recoveries else float("nan") for f in (statistics.median, min))
        share = sum(value >= 95 for value in recoveries)
        row = [method, f"{middle:.0f}", f"{least:.0f}", f"{share} of {len(recoveries)}", gain]
        rows.append([*row, f"{100 * statistics.fmean(run['negative_flips'] for run in runs):.1f}"])
    head = [
        "method", "recovery % (median)", "lowest", "runs ≥ 95 %", "points above scratch with as few", "negative flips %"
    ]  # fmt: skip
    return [
        f"## {about['shots']} labels a class\n\nRecovery is against scratch with all labels and its whole budget.",
        table(head, rows),
        f"Test score (recovery %), difference to scratch with {about['shots']} labels a class in points.",
        *_grid(results, regime, methods, _free_cell),
    ]


def _auto(results: dict[str, Any]) -> list[str]:
    every = {regime["name"] for regime in results["made"]["regimes"] if regime["shots"] is None}
    runs: Runs = [run for run in results["runs"] if run["regime"] in every]
    rows = []
    autos = [name for name, about in results["methods"].items() if about["method"] == "auto"]
    places = [tuple(run[name] for name in ("entry", *CELL)) for run in runs if run["entry"] in autos]
    for entry, *cell in sorted(dict.fromkeys(places), key=lambda place: autos.index(place[0])):
        of = dict(zip(CELL, cell, strict=True))
        auto = sorted(select(runs, entry=entry, **of), key=lambda run: run["seed"])
        best, score = best_method(select(runs, **of), autos)
        costs = [f"{statistics.fmean(run[f'{name}_share'] for run in auto):.0f}" for name in ("steps", "labels")]
        rows.append([
            entry, *cell,
            "; ".join(str(run.get("chosen", "–")) for run in auto),
            *costs,
            f"{statistics.fmean(run['seconds_share'] for run in auto):.0f}",
            mean_sd(_values(auto, "test")),
            f"{best} {score:.3f}",
            f"{100 * (statistics.fmean(run['test'] for run in auto) - score):+.1f}",
        ])  # fmt: skip
    head = [
        "", *CELL, "chosen, a seed each", "steps %", "labels %", "seconds %", "test", "best other method",
        "points from it",
    ]  # fmt: skip
    return ["## auto\n\nWhat it chose, and its cost in % of scratch's.", table(head, rows)] if rows else []


def best_method(runs: Runs, autos: Iterable[str]) -> tuple[str, float]:
    """Give the method other than auto with the highest mean test score, and that score."""
    scores = {
        f"{entry} ({regime})": statistics.fmean(run["test"] for run in select(runs, entry=entry, regime=regime))
        for entry, regime in dict.fromkeys((run["entry"], run["regime"]) for run in runs)
        if entry not in autos
    }
    return max(scores.items(), key=lambda item: item[1])


def _refused(results: dict[str, Any]) -> str:
    seen = dict.fromkeys((row["entry"], row["kind"], row["why"]) for row in results["refused"])
    lines = [f"- `{entry}` on {kind}: {why}" for entry, kind, why in seen]
    return "## What was refused\n\n" + "\n".join(lines) if lines else ""


def _made(results: dict[str, Any]) -> str:
    made = results["made"]
    lines = [f"- seeds {', '.join(map(str, made['seeds']))}"]
    for what, recipes in [("old tuning", made["old_tuning"]), *((r["name"], r["recipes"]) for r in made["regimes"])]:
        for kind, recipe in recipes.items():
            lines.append(
                f"- {what}, {kind}: {recipe['steps']} steps of {recipe['batch_size']}, rate {recipe['learning_rate']}"
            )
    lines += ["- " + ", ".join(f"{name} {version}" for name, version in sorted(v.items())) for v in made["versions"]]
    return "## How it was made\n\n" + "\n".join(lines)


def read_results(folder: Path) -> dict[str, Any]:
    """Read the results that a page is written from.

    Args:
        folder: An experiment's.

    Returns:
        The content of its `results.json`.

    Raises:
        OutcomeError: It has none.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise OutcomeError(f"{file}: is not there. Run the experiment, without --write-only.")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def write_results(folder: Path, results: dict[str, Any], count: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
    """Write `results.json`, unless it would lose runs.

    Args:
        folder: An experiment's.
        results: What was measured.
        count: Returns how many runs results are of.

    Returns:
        The results as they are read again.

    Raises:
        OutcomeError: The folder has the results of more runs.
    """
    file = folder / "results.json"
    if file.is_file() and (before := count(read_results(folder))) > count(results):
        raise OutcomeError(
            f"{file}: has the results of {before:,} runs, and {count(results):,} have been made here. Run the same "
            "command until it has made as many, or write the page from that file (--write-only)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, dump(results))
    return read_results(folder)


def dump(results: dict[str, object]) -> str:
    """Write JSON with a line a row, so that a new method is a few new lines."""
    parts = []
    for name, value in results.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]" if value else "[]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        parts.append(f' "{name}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
