"""Draws what a type of task wants shown, whatever the type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_scatter
from regraft.report.page import Chart, MarkedTexts, Table
from regraft.report.wording import NONE, number, percent, whole

if TYPE_CHECKING:
    from regraft.task import types
    from regraft.task.types.view import Cell, Column


def table_of(view: types.Table) -> Table:
    """Write the figures of a table.

    Args:
        view: The table.

    Returns:
        The same as it is read.
    """
    rows = tuple(
        tuple(_cell(column, cell) for column, cell in zip(view.columns, row, strict=True)) for row in view.rows
    )
    forms = [column.form for column in view.columns]
    prose = next((place for place, form in enumerate(forms) if form != "text"), len(forms))
    return Table(view.title, tuple(column.name for column in view.columns), rows, prose)


def chart_of(view: types.Scatter, part: str) -> Chart:
    """Draw points.

    Args:
        view: The points.
        part: The part's name.

    Returns:
        The chart.
    """
    return Chart(f"{part}-{view.name}", view.title, view.finding, draw_scatter(view), table_of(view.table))


def texts_of(view: types.MarkedText) -> MarkedTexts:
    """Write texts with their marks.

    Args:
        view: The texts.

    Returns:
        The same as they are read.
    """
    return MarkedTexts(view.title, tuple(tuple((span.text, span.mark) for span in text) for text in view.texts))


def _cell(column: Column, cell: Cell) -> str:
    if cell is None or isinstance(cell, str):
        return NONE if cell is None else cell
    if column.form == "count":
        return whole(cell)
    if column.form == "share":
        return percent(cell)
    return f"+{number(cell)}" if column.form == "change" and cell > 0 else number(cell)
