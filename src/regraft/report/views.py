"""Convert the views of a task type to blocks of a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.report.charts import draw_scatter
from regraft.report.page import Chart, MarkedTexts, Table
from regraft.report.wording import format_cell

if TYPE_CHECKING:
    from regraft.task import types


def table_block(view: types.Table) -> Table:
    """Format the cells of a table view.

    Args:
        view: A table of a task type, with unformatted cells.

    Returns:
        The page's table, in which the columns before the first figure are text columns.
    """
    rows = tuple(
        tuple(format_cell(column, cell) for column, cell in zip(view.columns, row, strict=True)) for row in view.rows
    )
    forms = [column.form for column in view.columns]
    text_columns = next((i for i, form in enumerate(forms) if form != "text"), len(forms))
    return Table(view.title, tuple(column.name for column in view.columns), rows, text_columns)


def scatter_chart(view: types.Scatter, prefix: str) -> Chart:
    """Draw a scatter view.

    Args:
        view: The series of points, and the table behind them.
        prefix: The prefix of the chart's name.

    Returns:
        The chart, named by the prefix and the view's name.
    """
    return Chart(f"{prefix}-{view.name}", view.title, view.finding, draw_scatter(view), table_block(view.table))


def marked_texts_block(view: types.MarkedText) -> MarkedTexts:
    """Convert a view of texts with marked spans.

    Args:
        view: The texts, divided into spans.

    Returns:
        The page's block with the same texts and marks.
    """
    return MarkedTexts(view.title, tuple(tuple((span.text, span.mark) for span in text) for text in view.texts))
