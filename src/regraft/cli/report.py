"""`regraft report`: what came of an upgrade, on one page."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of outcomes, of `compare` and of `check --deep --out`, or that hold such."),
    ],
    out: Annotated[Path, typer.Option(help="The file to write; a report that is there is replaced.")] = Path(
        "report.html"
    ),
    format: Annotated[
        str | None, typer.Option(help="html, one file that needs no other, or md; by default as --out ends.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="A folder for the charts as SVG and PNG.")] = None,
) -> None:
    """Show what came of an upgrade on one page: verdict, methods, curves, similarity, flips, cost."""
    from regraft.cli import show
    from regraft.report import write_report

    chosen = format or ("md" if out.suffix.lower() in (".md", ".markdown") else "html")
    written = write_report(list(runs), out, chosen, plots)  # type: ignore[arg-type]
    show.line(f"report: {written}")
    if plots:
        show.line(f"charts: {plots}")
