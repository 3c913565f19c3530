"""`regraft compare`: compare methods on the same data, in one table."""

from typing import TYPE_CHECKING, Annotated

import typer

import regraft
from regraft.cli import options
from regraft.errors import RecipeError
from regraft.recipe import Recipe

if TYPE_CHECKING:
    from regraft.report.page import Table


@options.recipe_flags(omit=("seed",))
def compare(
    old_base: options.OldBase,
    new_base: options.NewBase,
    adaptation: options.Adaptation,
    task: options.Task,
    out: options.Out,
    recipe: "regraft.Recipe",
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; scratch, the reference, is always run.")
    ] = "direct,init,distill,init+distill",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Option of one method, as in -o distill:alpha=0.9.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = str(Recipe.seed),
    shots: options.Shots = None,
    served_base: options.ServedBase = None,
    report_to: options.ReportTo = None,
    force: options.Force = False,
) -> None:
    """Run several methods on the same data and seeds, and compare them with scratch."""
    from regraft.cli.terminal import print_line, show_progress
    from regraft.methods import parse_options
    from regraft.tuning import tracking

    names = [name.strip() for name in methods.split(",") if name.strip()]
    settings_by_method = _options_by_method(option or [], names)
    with show_progress() as progress, tracking(report_to or (), options.log_folder(out)):
        comparison = regraft.compare(
            regraft.Upgrade(old_base, new_base),
            adaptation,
            regraft.Task.load(task).with_shots(shots),
            names,
            out,
            recipe=recipe,
            seeds=_parse_seeds(seeds),
            served_base=served_base,
            force=force,
            options={name: parse_options(name, settings) for name, settings in settings_by_method.items()},
            progress=progress,
        )
    print_comparison(comparison)
    print_line(f"outcome folders and comparison.json: {out}")


def _parse_seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",") if seed.strip()]
    except ValueError:
        raise RecipeError(f"--seeds takes whole numbers separated by commas, found {text!r}.") from None


def _options_by_method(texts: list[str], methods: list[str]) -> dict[str, list[str]]:
    """Group texts METHOD:NAME=VALUE by their method, which the groups leave out."""
    settings_by_method: dict[str, list[str]] = {}
    for text in texts:
        method, colon, setting = text.partition(":")
        if not colon or method not in methods:
            raise RecipeError(f"--option takes METHOD:NAME=VALUE with a METHOD that --methods lists, found {text!r}.")
        settings_by_method.setdefault(method, []).append(setting)
    return settings_by_method


def print_comparison(comparison: "regraft.Comparison") -> None:
    """Print a comparison as a table with a row per method.

    Args:
        comparison: The result of `regraft.compare`.
    """
    from rich.markup import escape

    from regraft.cli.terminal import console, new_table, print_line, print_text
    from regraft.report.comparison_tables import KEEP_MEANING, harness_table, keep_table
    from regraft.report.wording import MISSING, chance_name, percent
    from regraft.task import find_metric

    rows, split = comparison.rows, comparison.split
    metric, curve_metric = find_metric(comparison.metric), find_metric(comparison.curve_metric)
    seeds = ", ".join(map(str, rows[0].seeds))
    dev = f"dev {comparison.selection}" if comparison.selection else "dev"
    columns = (
        f"{dev} at\nstep 0",
        f"{dev}\nbest",
        split,
        "reco-\nvery",
        "to reach\nscratch",
        "negative\nflips",
        "labels",
    )
    table = new_table(f"{comparison.task}: {comparison.metric} on {split}, seeds {seeds}", ("method",), columns)
    for row in rows:
        deviation = "" if row.test_deviation is None else f" ±{metric.format_deviation(row.test_deviation)}"
        steps_to_scratch = MISSING
        if row.steps_to_scratch is not None and row.seconds_to_scratch is not None:
            steps_to_scratch = f"{row.steps_to_scratch:.0f} ({row.seconds_to_scratch:.0f} s)"
        table.add_row(
            escape(row.method),
            MISSING if row.start is None else curve_metric.format_score(row.start),
            MISSING if row.dev is None else curve_metric.format_score(row.dev),
            metric.format_score(row.test) + deviation,
            percent(row.recovery, 0),
            steps_to_scratch,
            MISSING if row.negative_flips is None else f"{100 * row.negative_flips:.1f} %",
            f"{row.labels:.0f}",
        )
    console.print(table)
    old, chance = (metric.format_score(score) for score in (comparison.old, comparison.majority))
    guessing = chance_name(comparison.type)
    print_text(
        f"old deployment (old weights, old base) {old}, {guessing} {chance}; scratch: {rows[0].steps:.0f} steps, "
        f"{rows[0].seconds:.0f} s of training. Recovery: 0 % is {guessing}, 100 % scratch. To reach scratch: steps "
        f"(seconds) until {dev} is where scratch ends. Negative flips: right in the old deployment, wrong here."
    )
    keep, harness = keep_table(comparison), harness_table(comparison)
    if keep:
        _print_table(keep)
        print_text(KEEP_MEANING)
    if harness:
        _print_table(harness)
        print_line("example by example: regraft compare-samples, with the folders lm_eval of two of these models")


def _print_table(table: "Table") -> None:
    """Print a table of the report."""
    from rich.markup import escape

    from regraft.cli.terminal import console, new_table

    names, figures = table.columns[: table.text_columns], table.columns[table.text_columns :]
    terminal_table = new_table(table.caption, names, [figure.replace(": ", ":\n") for figure in figures])
    for row in table.rows:
        terminal_table.add_row(*map(escape, row))
    console.print()
    console.print(terminal_table)
