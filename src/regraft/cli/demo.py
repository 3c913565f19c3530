"""`regraft demo`: the embedded default."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="The folder for everything.")] = Path("runs/demo"),
    full: Annotated[bool, typer.Option("--full", help="All tasks, three seeds, longer (hours).")] = False,
) -> None:
    """Upgrade a real base, tune on the old one, recycle by every method, and compare: no arguments needed."""
    from regraft.cli import findings, show
    from regraft.demo.run import FULL, SHORT
    from regraft.demo.run import demo as run

    if full and out == Path("runs/demo"):
        out = Path("runs/demo-full")
    with show.progress() as progress:
        for found, comparison in run(out, FULL if full else SHORT, progress):
            findings.check(found)
            show.comparison(comparison)
            show.console.print("outcome folders:", *comparison.outcomes, sep="\n  ", highlight=False, markup=False)
