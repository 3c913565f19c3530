"""Write a report of the results of an upgrade."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from regraft.checkpoint import replace_atomically, write_atomic
from regraft.errors import OutcomeError, RecipeError
from regraft.report.find import find_inputs
from regraft.report.html import to_html
from regraft.report.markdown import to_markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.report.page import Page

Format = Literal["html", "md"]
FORMATS: tuple[str, ...] = get_args(Format)
REPORT_MARKERS = (b'<meta name="generator" content="regraft ', b"# What the upgrade did")
"""The bytes near the start of every report by which it is recognised, as HTML and as Markdown."""
MARKER_BYTES = 4096
"""The number of bytes in which a marker is looked for; the HTML's marker is in the first kilobyte."""


def write_report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    format: Format = "html",
    plots: str | Path | None = None,
) -> Path:
    """Write the results of an upgrade to one page.

    Args:
        runs: Folders that contain outcomes, comparisons or diagnoses at any depth.
        out: The file to write; an existing report is replaced.
        format: `html` for one self-contained file, or `md`.
        plots: A folder for the charts as SVG and PNG; None to save no charts.

    Returns:
        The path of the file. The same runs give the same bytes.

    Raises:
        OutcomeError: There are no results, a file is malformed, `out` is something other than a report, or the report
            cannot be written.
        RecipeError: There is no such format, or no runs are named.
    """
    folders = [runs] if isinstance(runs, (str, Path)) else list(runs)
    out = Path(out)
    if format not in FORMATS:
        raise RecipeError(f"format {format!r}: there is no such format. Use one of {', '.join(FORMATS)}.")
    _check_replaceable(out)
    if not folders:
        raise RecipeError("no runs are named. Name outcome folders, or folders that hold some.")
    inputs = find_inputs(folders)
    from regraft.report.charts import chart_style, save_figure
    from regraft.report.sections import build_page

    try:
        with chart_style():
            page = build_page(inputs)
            # Each figure is saved as SVG once, before any PNG: saving it again may move its layout a little.
            svg_files = {chart.name: save_figure(chart.figure, "svg") for chart in page.charts}
            links = _write_plots(page, svg_files, Path(plots), out) if plots is not None else {}
            text = to_html(page, svg_files) if format == "html" else to_markdown(page, links)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text)
    except OSError as error:
        file = error.filename or out
        raise OutcomeError(f"{file}: cannot be written ({error.strerror or error}). Choose another --out.") from error
    return out


def _check_replaceable(out: Path) -> None:
    """Refuse to replace anything but a report or an empty file: a device, a link, a folder, another program's file."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_file():
        raise OutcomeError(f"{out}: is not a regular file, and a report replaces nothing else. Choose another --out.")
    with out.open("rb") as stream:
        start = stream.read(MARKER_BYTES)
    if start.strip() and not any(marker in start for marker in REPORT_MARKERS):
        raise OutcomeError(f"{out}: is not a report of regraft's, and would be lost. Choose another --out.")


def _write_plots(page: Page, svg_files: dict[str, bytes], folder: Path, out: Path) -> dict[str, str]:
    """Save the charts; return the link from the page at `out` to each chart's SVG file, by the chart's name."""
    from regraft.report.charts import save_figure

    folder.mkdir(parents=True, exist_ok=True)
    links = {}
    for chart in page.charts:
        for suffix, image in (("svg", svg_files[chart.name]), ("png", save_figure(chart.figure, "png"))):
            with replace_atomically(folder / f"{chart.name}.{suffix}") as temporary_file:
                temporary_file.write_bytes(image)
        links[chart.name] = Path(os.path.relpath(folder, out.parent), f"{chart.name}.svg").as_posix()
    return links
