"""`regraft compare-samples`: compare two evaluations by lm-evaluation-harness, example by example."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from regraft.diagnosis.samples import SampleComparison

SOURCE = "a samples_*.jsonl of lm-evaluation-harness, a folder with several, or a quoted glob pattern."
"""The sources of logs, as the help of both arguments names them."""


def compare_samples(
    old: Annotated[str, typer.Argument(help=f"Old model's log: {SOURCE}", show_default=False)],
    new: Annotated[str, typer.Argument(help=f"New model's log: {SOURCE}", show_default=False)],
    metric: Annotated[
        str | None, typer.Option(help="Compare this metric alone, such as acc_norm.", show_default=False)
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File to write the comparison to.", show_default=False)] = None,
) -> None:
    """Compare two sample logs of lm-evaluation-harness: paired differences, flips and McNemar's test."""
    import dataclasses

    from regraft.checkpoint import write_json
    from regraft.diagnosis.samples import compare_samples

    comparison = compare_samples(old, new, metric=metric)
    print_sample_comparison(comparison)
    if json is not None:
        write_json(json, dataclasses.asdict(comparison), indent=2)


def print_sample_comparison(comparison: "SampleComparison") -> None:
    """Print a table with a row per metric, and what could not be compared.

    Args:
        comparison: The result of `compare_samples`.
    """
    from rich.markup import escape

    from regraft.cli.terminal import console, new_table, print_text
    from regraft.report.wording import MISSING

    columns = ("n", "old", "new", "difference", "95 % interval", "−", "+", "p")
    table = new_table(None, ("task", "metric"), columns)
    for change in comparison.changes:
        name = change.metric if change.filter == "none" else f"{change.metric}, {change.filter}"
        interval = change.difference
        table.add_row(
            escape(change.task),
            escape(name) + (" ↑" if change.higher_is_better else " ↓"),
            f"{change.examples:,}",
            f"{change.old:.4g}",
            f"{change.new:.4g}",
            f"{interval.estimate:+.3g}",
            f"{interval.low:+.3g} … {interval.high:+.3g}",
            *(MISSING if count is None else f"{count:,}" for count in (change.negative, change.positive)),
            MISSING if change.mcnemar is None else f"{change.mcnemar:.2g}",
        )
    console.print(table)
    print_text(
        "↑ ↓: higher or lower is better. Difference: new − old, with a paired bootstrap over the examples. "
        "−: right in old, wrong in new; +: the reverse; p: McNemar's exact test."
    )
    for pair in comparison.logs:
        if pair.only_old or pair.only_new:
            print_text(
                f"{pair.task}: {pair.paired:,} samples are paired; {pair.only_old:,} are in the old log alone, "
                f"{pair.only_new:,} in the new one."
            )
        if pair.different_prompts:
            print_text(f"{pair.task}: {pair.different_prompts:,} of {pair.paired:,} pairs have different prompts.")
        for metric, reason in pair.skipped.items():
            print_text(f"{pair.task}: {metric} is not compared ({reason}).")
    for side, tasks in (("old", comparison.only_old), ("new", comparison.only_new)):
        if tasks:
            print_text(f"in {side} alone: {', '.join(tasks)}")
