"""`regraft report`: write one page about an upgrade."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Outcomes, output folders of compare and of check --deep, or folders with any of these.",
            metavar="RUNS",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output file; an old report there is replaced.")] = Path("report.html"),
    format: Annotated[
        str | None,
        typer.Option(help="html (a self-contained file) or md; by default, md if --out ends in .md, else html."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder to write the charts to as well, as SVG and PNG.")] = None,
) -> None:
    """Write one page about an upgrade: verdict, methods, curves, similarity, flips and cost."""
    from regraft.cli.terminal import print_line
    from regraft.report import write_report

    default_format = "md" if out.suffix.lower() in (".md", ".markdown") else "html"
    report_file = write_report(list(runs), out, format or default_format, plots)  # type: ignore[arg-type]
    print_line(f"report: {report_file}")
    if plots:
        print_line(f"charts: {plots}")
