"""`regraft demo`: the whole job on a real model and real data, without arguments."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from regraft.demo.answers import AnswersOfModels

OUT = Path("runs/demo")
"""The default output folder; the names of options are added, so that all demos can be kept."""
MAX_CHARACTERS = 60
"""The most characters of a text or an answer that are shown: three lines in a column of a narrow terminal."""


def demo(
    task: Annotated[
        str | None,
        typer.Option(
            help="The task to run: section-role, or licence-expression with --generation; with --full all tasks.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"Output folder; by default {OUT}, to whose name --generation, --full and --task TASK are added."
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All examples and tasks, three seeds, longer training (hours).")
    ] = False,
    generation: Annotated[
        bool, typer.Option("--generation", help="A LoRA on a chat model, SmolLM2-135M, that writes its answers.")
    ] = False,
) -> None:
    """Upgrade a real base, tune on the old one, recycle by several methods, and compare."""
    from regraft.cli.check import print_check
    from regraft.cli.compare import print_comparison
    from regraft.cli.terminal import print_line, show_progress
    from regraft.demo import run

    sizes = (run.GENERATION, run.FULL_GENERATION) if generation else (run.SHORT, run.FULL)
    size = sizes[full]
    names = [OUT.name, *(["generation"] if generation else []), *(["full"] if full else [])]
    if task is not None:
        size = size.with_task(task)
        # a folder per task, because the corpus of a new base leaves out the texts that its tasks are evaluated on
        names.append(task)
    out = out or OUT.with_name("-".join(names))
    with show_progress() as progress:
        for result in run.demo(out, size, progress):
            print_check(result.check)
            print_comparison(result.comparison)
            if result.answers:
                print_answers(result.answers)
            print_line("\n  ".join(["outcome folders:", *result.comparison.outcomes]))
            if result.answers:
                _print_next_steps(out, result.comparison.outcomes[-1])


def print_answers(answers: "AnswersOfModels") -> None:
    """Print the answers of several models side by side.

    Args:
        answers: The answers, as the demo collects them.
    """
    from rich.markup import escape

    from regraft.cli.terminal import console, new_table
    from regraft.report.wording import shorten

    title = f"Answers to {len(answers.rows)} of {answers.examples:,} test prompts, those that differ first"
    table = new_table(title, ("text", "reference", *answers.models), ())
    for column in table.columns:
        column.no_wrap = False
    for row in answers.rows:
        table.add_row(*(escape(shorten(text, MAX_CHARACTERS)) for text in row))
    console.print(table)


def _print_next_steps(out: Path, outcome: str) -> None:
    """Write the report, and print where it is and how to check that a server takes the last outcome."""
    from regraft.cli.terminal import print_line
    from regraft.report import write_report

    report = write_report(out, out / "report.html")
    print_line(f"report: {report}")
    print_line(f"next: regraft adaptation servable {outcome}/adaptation --base {out / 'new-base'}")
