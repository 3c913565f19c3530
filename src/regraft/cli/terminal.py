"""The console of the commands: progress bars, tables and lines of text."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from regraft.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import ConsoleOptions, RenderableType
    from rich.progress import TaskID
    from rich.segment import Segment

    from regraft.progress import Progress as Callback

SECONDS_BETWEEN_LINES = 10.0
"""The number of seconds between two lines of progress: a log of an hour's training stays readable."""


class _Terminal(Console):
    """A console that escapes control characters in texts, which may come from files; Rich's own take effect."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


console = _Terminal()


@contextlib.contextmanager
def show_progress() -> Iterator[Callback]:
    """Show a progress bar for each stage on a terminal, and a line every few seconds elsewhere.

    Yields:
        The callback that reports progress.
    """
    if not console.is_terminal:
        yield _ProgressLines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, completed: int, total: int, figures: Mapping[str, float]) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[stage] = bars.add_task(escape(stage), total=total, figures="")
            bars.update(
                tasks[stage],
                completed=completed,
                total=total or completed,
                figures=_format_figures(figures),
                visible=True,
            )

        yield report


class _ProgressLines:
    """A callback that prints the state of a stage every few seconds, for logs and pipes."""

    def __init__(self) -> None:
        self.last_time = time.monotonic()

    def __call__(self, stage: str, completed: int, total: int, figures: Mapping[str, float]) -> None:
        if time.monotonic() - self.last_time >= SECONDS_BETWEEN_LINES:
            self.last_time = time.monotonic()
            console.print(f"{escape(stage)} {completed:,}/{total or '?'} {_format_figures(figures)}", highlight=False)


def _format_figures(figures: Mapping[str, float]) -> str:
    return "  ".join(
        f"{name} {value:,.0f}" if value >= 100 else f"{name} {value:.3g}" for name, value in figures.items()
    )


def print_line(text: str) -> None:
    """Print a line as it is, such as a path to copy: it is not wrapped.

    Args:
        text: The line, which may be wider than the terminal.
    """
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_text(text: str, style: str | None = None) -> None:
    """Print prose, wrapped at the terminal's width.

    Args:
        text: The prose, without Rich's markup.
        style: A style of Rich, such as `bold`.
    """
    console.print(text, style=style, highlight=False, markup=False)


def print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns.

    Args:
        pairs: The names with their values, at least one.
    """
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        print_text(f"{name:<{width}}  {value}")


def new_table(title: str | None, names: Sequence[str], figures: Sequence[str]) -> Table:
    """Return an empty table.

    Args:
        title: The heading above the table; None for none.
        names: The headings of the columns of text.
        figures: The headings of the columns of numbers, which follow and are aligned to the right.
    """
    table = Table(
        title=escape(title) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def format_size(num_bytes: float) -> str:
    """Format a number of bytes with its unit, from B to TB.

    Args:
        num_bytes: The number of bytes.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
