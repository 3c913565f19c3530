"""`regraft chain`: carry adaptations along a chain of bases."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli import options

if TYPE_CHECKING:
    from regraft.chain import ChainRow

app = typer.Typer(help="Carry adaptations along a chain of bases, hop by hop or at once.", no_args_is_help=True)


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="Chain file (YAML).", metavar="FILE")],
    out: Annotated[Path, typer.Option(help="Output folder. Results of the same inputs in it are left as they are.")],
    report_to: options.ReportTo = None,
) -> None:
    """Tune on the first base, and recycle along the chain."""
    from regraft.chain import Chain, run_chain
    from regraft.cli.terminal import show_progress
    from regraft.tuning import tracking

    chain = Chain.load(file)
    with show_progress() as progress, tracking(report_to or (), options.log_folder(out)):
        rows = run_chain(chain, out, progress)
    print_chain(chain.bases, rows)


@app.command()
def show(out: Annotated[Path, typer.Argument(help="Output folder of `regraft chain run`.", metavar="OUT")]) -> None:
    """Show the scores on every base, and how much each hop loses."""
    from regraft.chain import read_chain

    print_chain(*read_chain(out))


def print_chain(bases: Sequence[str], rows: "Sequence[ChainRow]") -> None:
    """Print the scores along a chain: a table per task and kind, with a row per method and route.

    Args:
        bases: The names of the bases, in the chain's order.
        rows: The results of all hops, as `run_chain` returns them.
    """
    from rich.markup import escape

    from regraft.chain import summarise_routes
    from regraft.cli.terminal import console, new_table, print_text
    from regraft.report.wording import MISSING, chance_name, percent
    from regraft.task import find_metric

    print_text(" → ".join(f"{index} {base}" for index, base in enumerate(bases)))
    summaries = summarise_routes(bases, rows)
    columns = [*(f"base {index}" for index in range(len(bases))), "recovery,\nlast", "lost\na hop"]
    for task, kind in dict.fromkeys((summary.task, summary.kind) for summary in summaries):
        task_summaries = [summary for summary in summaries if (summary.task, summary.kind) == (task, kind)]
        table = new_table(f"{task}, {kind}", ("method", "route"), columns)
        for summary in task_summaries:
            metric = find_metric(summary.metric)
            scores = [
                MISSING
                if score is None
                else metric.format_score(score)
                + ("" if deviation is None else f" ±{metric.format_deviation(deviation)}")
                for score, deviation in zip(summary.scores, summary.deviations, strict=True)
            ]
            decay = MISSING if summary.decay is None else f"{metric.describe(summary.decay)}{metric.unit}"
            table.add_row(
                escape(summary.method), summary.route or "", *scores, percent(summary.recoveries[-1], 0), decay
            )
        console.print(table)
        for summary in task_summaries:
            if summary.refused:
                print_text(f"{summary.method}: {summary.refused}")
    guessing = " or ".join(dict.fromkeys(chance_name(row.type) for row in rows)) or "guessing"
    print_text(
        f"Scores on test (dev where there is no test), mean over seeds. Recovery: 0 % is {guessing}, 100 % scratch on "
        "the same base. Lost a hop: the slope over the bases."
    )
