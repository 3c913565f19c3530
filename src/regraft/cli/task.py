"""`regraft task`: check a task before anything is tuned on it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import regraft
from regraft.errors import CheckpointError

if TYPE_CHECKING:
    from regraft.task.types import View

app = typer.Typer(help="Check a task file and the data it names.", no_args_is_help=True)

MAX_STRATA = 20
"""The largest number of strata that are shown of a split: with more, its rows would not fit on a screen."""
MAX_CHARACTERS = 300
"""The largest number of characters that are shown of an answer: four lines of a terminal."""


@app.callback()
def group() -> None:
    """Check a task file and the data it names."""  # without a callback, Typer makes a single command the group itself


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Task file (YAML), or a data file or folder.", metavar="FILE")],
    base: Annotated[
        str | None, typer.Option(help="Base, to show how it reads the examples: a folder or a hub id@revision.")
    ] = None,
    adaptation: Annotated[
        Path | None, typer.Option(help="Adaptation, for its tokenizer and chat template in place of the base's.")
    ] = None,
) -> None:
    """Read a task and show its splits, or name the first invalid row of its files."""
    from rich.markup import escape

    from regraft.cli.terminal import console, new_table, print_text
    from regraft.task import chance_score, data_warnings, read_task, summarise

    task = regraft.Task.load(file)
    data = read_task(task)
    splits = [split for split in (data.dev, data.test) if split is not None]
    scores = {}
    if data.labelled and not data.task.head_in_base:
        scores = {split.name: data.scoring.format_score(chance_score(data, split)) for split in splits}
    columns = ["examples", "share", "words:\nmedian", "\np95", "\nmax"]
    columns += [f"guessing\n{data.metric}"] if scores else []
    table = new_table(_on_one_line(data.name), ("",), columns)
    views = data.task.example_views(data.train, data.labels) if data.labelled else ()
    for split in summarise(data):
        words = (f"{split.median_words:,.0f}", f"{split.p95_words:,.0f}", f"{split.max_words:,}")
        table.add_row(f"[bold]{split.name}[/]", f"{split.examples:,}", "", *words, scores.get(split.name, ""))
        strata = list(split.counts.items()) if data.labelled and not views and len(split.counts) > 1 else []
        for name, count in strata[:MAX_STRATA]:
            table.add_row(f"  {escape(_on_one_line(name))}", f"{count:,}", f"{count / split.examples:.1%}")
        if len(strata) > MAX_STRATA:
            table.add_row(f"  … and {len(strata) - MAX_STRATA} more")
        table.add_section()
    console.print(table)
    outputs = f"{len(data.labels)} labels" if data.labels else str(data.head)
    target = "reference" if data.task.head_in_base else "label"
    unlabelled = "" if data.labelled else f"; no example has a {target}"
    print_text(f"metric {data.metric}, max_length {data.max_length} tokens, {outputs}{unlabelled}")
    if data.labelled and data.task.head_in_base:
        print_text(f"guessing {data.metric}: {data.task.guess}; commands that run models measure it")
    for held_out in splits:
        if held_out.source == data.train.source:
            name = held_out.name
            print_text(f"{name} is held out of train; to choose it yourself, name a file under `{name}`")
    if base or adaptation:
        tokenizer, max_length = _read_tokenizer(base, adaptation)
        tokenizer.chat_template = data.task.chat_template[1] or tokenizer.chat_template
        views += data.task.encoded_views(data.train, tokenizer, min(data.max_length, max_length))
    for view in views:
        _print_view(view)
    for warning in data_warnings(data):
        print_text(warning, style="yellow")


def _read_tokenizer(base: str | None, adaptation: Path | None) -> tuple[Any, int]:
    """Return the tokenizer of an adaptation, or else of a base, and the base's maximum input length in tokens."""
    tokenizer = regraft.load_adaptation(adaptation).tokenizer if adaptation else None
    if base:
        opened = regraft.Base.open(base)
        return tokenizer or opened.tokenizer, opened.max_input_length
    if tokenizer is None:
        raise CheckpointError(f"{adaptation}: has no tokenizer. Name the base that has it by --base.")
    return tokenizer, sys.maxsize


def _print_view(view: "View") -> None:
    """Print a view of a task type: a table, the finding of a chart, answers, or texts with marked spans in brackets."""
    from rich.markup import escape

    from regraft.cli.terminal import console, new_table, print_text
    from regraft.report.wording import CHANGE_WORDS, format_cell, shorten
    from regraft.task.types import Answers, MarkedText, Scatter

    if isinstance(view, Scatter):
        print_text(view.finding)
    elif isinstance(view, MarkedText):
        print_text(view.title)
        for spans in view.texts:
            marked = (f"[{span.text}]({span.mark})" if span.mark else span.text for span in spans)
            print_text("  " + _on_one_line("".join(marked)))
    elif isinstance(view, Answers):
        print_text(view.title)
        for pair in view.pairs:
            print_text(f"  row {pair.row}" + ("" if pair.after is None else f", {CHANGE_WORDS[pair.change]}"))
            for label, text in (("prompt", pair.prompt), *pair.texts):
                print_text(f"    {label:<9}  {_on_one_line(shorten(text, MAX_CHARACTERS)) or '(empty)'}")
    else:
        name, *figures = (column.name for column in view.columns)
        print_text(view.title, style="italic")  # above the table, which may be narrower
        table = new_table(None, (name,), tuple(figures))
        for row in view.rows:
            cells = (format_cell(column, cell) for column, cell in zip(view.columns, row, strict=True))
            table.add_row(*(escape(_on_one_line(cell)) for cell in cells))
        console.print(table)


def _on_one_line(name: str) -> str:
    """Escape what does not print, such as a line break or an escape sequence in a label."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )
