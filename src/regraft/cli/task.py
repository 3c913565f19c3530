"""`regraft task`: look at a task before anything is tuned on it."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

STRATA_SHOWN = 20  # a screen of them a split


def _on_one_line(name: str) -> str:
    """Escape what does not print, such as a line break or an escape sequence in a label."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)


@app.callback()
def main() -> None:
    """Look at tasks: examples, label names and a metric."""


@app.command()
def check(file: Annotated[Path, typer.Argument(help="The task file (YAML).", metavar="FILE")]) -> None:
    """Read a task and show its splits, or say which row of which file is wrong."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from regraft.cli.show import console
    from regraft.task import Task, chance_score, data_warnings, read_task, summarise

    data = read_task(Task.load(file))
    splits = (data.dev, data.test) if data.labelled else ()
    scores = {split.name: f"{chance_score(data, split):.3f}" for split in splits if split is not None}
    table = Table(title=escape(_on_one_line(data.name)), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("split and label", overflow="fold")
    for name in ("examples", "share", "words:\nmedian", "\np95", "\nmax", f"guessing\n{data.metric}"):
        table.add_column(name, justify="right", no_wrap=True)
    for split in summarise(data):
        words = (f"{split.median_words:,.0f}", f"{split.p95_words:,.0f}", f"{split.max_words:,}")
        table.add_row(f"[bold]{split.name}[/]", f"{split.examples:,}", "", *words, scores.get(split.name, ""))
        for name, count in list(split.counts.items())[: STRATA_SHOWN * data.labelled]:
            table.add_row(f"  {escape(_on_one_line(name))}", f"{count:,}", f"{count / split.examples:.1%}")
        if len(split.counts) > STRATA_SHOWN and data.labelled:
            table.add_row(f"  … and {len(split.counts) - STRATA_SHOWN} more")
        table.add_section()
    console.print(table)
    outputs = f"{len(data.labels)} labels" if data.labels else str(data.head)
    unlabelled = "" if data.labelled else ", which no example has"
    console.print(f"metric {data.metric}, max_length {data.max_length} tokens, {outputs}{unlabelled}")
    if data.dev.source == data.train.source:
        console.print("dev is held out of train; name a file of it under `dev` to choose it yourself")
    for doubt in data_warnings(data):
        console.print(f"[yellow]{escape(doubt)}[/]")
