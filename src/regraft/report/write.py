"""Writes the report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from regraft.checkpoint import replace_atomically, write_atomic
from regraft.errors import OutcomeError, RecipeError
from regraft.report.find import find_runs
from regraft.report.html import to_html
from regraft.report.markdown import to_markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.report.page import Page

Format = Literal["html", "md"]
FORMATS: tuple[str, ...] = get_args(Format)
MARKS = (b'<meta name="generator" content="regraft ', b"# What the upgrade did")
"""What every report has near its start, as HTML and as Markdown."""
LONGEST_START = 4096


def write_report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    format: Format = "html",
    plots: str | Path | None = None,
) -> Path:
    """Write what came of an upgrade onto one page.

    Args:
        runs: Folders that hold outcomes, comparisons or diagnoses, themselves or anywhere below.
        out: The file to write; a report that is there is replaced.
        format: `html`, one file that needs no other, or `md`.
        plots: A folder for the charts as SVG and PNG, if they are wanted.

    Returns:
        The file. The same runs give the same bytes.

    Raises:
        OutcomeError: There is nothing to report, a file is malformed, or the report cannot be written.
        RecipeError: There is no such format, or no runs are named.
    """
    folders = [runs] if isinstance(runs, (str, Path)) else list(runs)
    out = Path(out)
    if format not in FORMATS:
        raise RecipeError(f"format {format!r}: there is no such format. Use one of {', '.join(FORMATS)}.")
    _check_place(out)
    if not folders:
        raise RecipeError("no runs are named. Name outcome folders, or folders that hold some.")
    reported = find_runs(folders)
    from regraft.report.charts import chart_style, save_figure
    from regraft.report.sections import build_page

    try:
        with chart_style():
            page = build_page(reported)
            # drawn once, before all else: drawing a figure a second time may lay it out a little differently
            pictures = {chart.name: save_figure(chart.figure, "svg") for chart in page.charts}
            names = _write_plots(page, pictures, Path(plots), out) if plots is not None else {}
            text = to_html(page, pictures) if format == "html" else to_markdown(page, names)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text)
    except OSError as error:
        file = error.filename or out
        raise OutcomeError(f"{file}: cannot be written ({error.strerror or error}). Choose another --out.") from error
    return out


def _check_place(out: Path) -> None:
    """Refuse to replace what is no report: a device, a link, a folder, or a file that something else has written."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_file():
        raise OutcomeError(f"{out}: is no regular file, and a report replaces no other. Choose another --out.")
    with out.open("rb") as stream:
        start = stream.read(LONGEST_START)
    if start.strip() and not any(mark in start for mark in MARKS):
        raise OutcomeError(f"{out}: is not a report of regraft's, and would be lost. Choose another --out.")


def _write_plots(page: Page, pictures: dict[str, bytes], folder: Path, out: Path) -> dict[str, str]:
    """Save the charts, and give each one's file as a page at `out` names it."""
    from regraft.report.charts import save_figure

    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for chart in page.charts:
        for form, content in (("svg", pictures[chart.name]), ("png", save_figure(chart.figure, "png"))):
            file = folder / f"{chart.name}.{form}"
            with replace_atomically(file) as beside:
                beside.write_bytes(content)
        files[chart.name] = Path(os.path.relpath(folder, out.parent), f"{chart.name}.svg").as_posix()
    return files
