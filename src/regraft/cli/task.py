"""`regraft task`: check a task before anything is tuned on it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import regraft

if TYPE_CHECKING:
    from regraft.task.types import View

app = typer.Typer(help="Check a task file and the data it names.", no_args_is_help=True)

MAX_STRATA = 20
"""The largest number of strata that are shown of a split: with more, its rows would not fit on a screen."""


@app.callback()
def group() -> None:
    """Check a task file and the data it names."""  # without a callback, Typer makes a single command the group itself


@app.command()
def check(file: Annotated[Path, typer.Argument(help="Task file (YAML).", metavar="FILE")]) -> None:
    """Read a task and show its splits, or name the first invalid row of its files."""
    from rich.markup import escape

    from regraft.cli.terminal import console, new_table, print_text
    from regraft.task import chance_score, data_warnings, read_task, summarise

    data = read_task(regraft.Task.load(file))
    splits = (data.dev, data.test) if data.labelled else ()
    scores = {split.name: data.scoring.format_score(chance_score(data, split)) for split in splits if split is not None}
    columns = ("examples", "share", "words:\nmedian", "\np95", "\nmax", f"guessing\n{data.metric}")
    table = new_table(_on_one_line(data.name), (), columns)
    for split in summarise(data):
        words = (f"{split.median_words:,.0f}", f"{split.p95_words:,.0f}", f"{split.max_words:,}")
        table.add_row(f"[bold]{split.name}[/]", f"{split.examples:,}", "", *words, scores.get(split.name, ""))
        strata = list(split.counts.items()) if data.labelled else []
        for name, count in strata[:MAX_STRATA]:
            table.add_row(f"  {escape(_on_one_line(name))}", f"{count:,}", f"{count / split.examples:.1%}")
        if len(strata) > MAX_STRATA:
            table.add_row(f"  … and {len(strata) - MAX_STRATA} more")
        table.add_section()
    console.print(table)
    outputs = f"{len(data.labels)} labels" if data.labels else str(data.head)
    unlabelled = "" if data.labelled else ", which no example has"
    print_text(f"metric {data.metric}, max_length {data.max_length} tokens, {outputs}{unlabelled}")
    if data.dev.source == data.train.source:
        print_text("dev is held out of train; to choose it yourself, name a file under `dev`")
    if data.labelled:
        for view in data.task.example_views(data.train, data.labels):
            _print_view(view)
    for warning in data_warnings(data):
        print_text(warning, style="yellow")


def _print_view(view: "View") -> None:
    """Print a view of a task type: a table, the finding of a chart, or texts whose marked spans stand in brackets."""
    from rich.markup import escape

    from regraft.cli.terminal import console, new_table, print_text
    from regraft.report.wording import format_cell
    from regraft.task.types import MarkedText, Scatter

    if isinstance(view, Scatter):
        print_text(view.finding)
    elif isinstance(view, MarkedText):
        print_text(view.title)
        for spans in view.texts:
            marked = (f"[{span.text}]({span.mark})" if span.mark else span.text for span in spans)
            print_text("  " + _on_one_line("".join(marked)))
    else:
        name, *figures = (column.name for column in view.columns)
        table = new_table(view.title, (name,), tuple(figures))
        for row in view.rows:
            cells = (format_cell(column, cell) for column, cell in zip(view.columns, row, strict=True))
            table.add_row(*(escape(_on_one_line(cell)) for cell in cells))
        console.print(table)


def _on_one_line(name: str) -> str:
    """Escape what does not print, such as a line break or an escape sequence in a label."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )
