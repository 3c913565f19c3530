"""Writes a page as Markdown, for a pull request: the same figures in tables."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from regraft.report.page import Browser, Charts, Commands, Facts, MarkedTexts, Prose, Table
from regraft.report.wording import clip, number, percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from regraft.report.page import Block, Card, Chart, Page

MOST_FLIPS, MOST_CHARACTERS = 50, 300
_SPECIAL = re.compile(r"([\\`*_\[\]~|])")


def to_markdown(page: Page, plots: Mapping[str, str]) -> str:
    """Write a page as Markdown.

    Args:
        page: The page.
        plots: By chart the file of its picture, as the Markdown is to name it; empty if there are none.

    Returns:
        The text. What comes from files is escaped: no markup, no mentions.
    """
    lines = [f"# {_escape(page.title)}", ""]
    for part in page.parts:
        level = "##"
        if len(page.parts) > 1:
            lines += [f"## {_escape(part.title)}", ""]
            level = "###"
        lines += [_escape(part.about), "", *_card(part.card)]
        for section in part.sections:
            lines += [f"{level} {_escape(section.title)}", "", _escape(section.lead), ""]
            for block in section.blocks:
                lines += _block(block, plots)
    lines.append(f"Made by regraft {_escape(page.version)}.")
    return "\n".join(lines) + "\n"


def _card(card: Card) -> list[str]:
    answer = f"> **{card.label}: {_escape(card.choice)}**"
    if card.sure is not None:
        answer += f" ({percent(card.sure, 0)} sure)"
    if card.predicted is not None:
        answer += f", predicted recovery {percent(card.predicted, 0)}"
    return [answer, ">", f"> {_escape(card.advice)}", "", *_table(("figure", "value", "meaning"), card.reasons, 1)]


def _block(block: Block, plots: Mapping[str, str]) -> list[str]:
    if isinstance(block, Prose):
        return [_escape(block.text), ""]
    if isinstance(block, Facts):
        return _table(("figure", "value", "meaning"), block.pairs, 1)
    if isinstance(block, Table):
        return [f"**{_escape(block.caption)}**", "", *_table(block.head, block.rows, block.prose)]
    if isinstance(block, Commands):
        longest = max((len(run) for line in block.lines for run in re.findall("`+", line)), default=0)
        fence = "`" * max(3, longest + 1)
        lines = [line.replace("\r", " ").replace("\n", " ") for line in block.lines]
        return [f"{_escape(block.caption)}:", "", f"{fence}sh", *lines, fence, ""]
    if isinstance(block, MarkedTexts):
        texts = ["".join(_span(*span) for span in spans) for spans in block.texts]
        return [f"**{_escape(block.caption)}**", "", *(f"- {text}" for text in texts), ""]
    if isinstance(block, Browser):
        return _flips(block)
    assert isinstance(block, Charts)
    return [line for chart in block.charts for line in _chart(chart, plots)]


def _span(text: str, mark: str) -> str:
    """Write a stretch of a text: marked in bold, with the mark after it; blanks at its ends stay."""
    words = _escape(text)
    if not words:
        return " " if text else ""
    before, after = (" " if blank.isspace() else "" for blank in (text[0], text[-1]))
    return f"{before}{f'**{words}** ({_escape(mark)})' if mark else words}{after}"


def _chart(chart: Chart, plots: Mapping[str, str]) -> list[str]:
    lines = [f"**{_escape(chart.title)}.** {_escape(chart.finding)}", ""]
    if chart.name in plots:
        lines += [f"![{_escape(chart.finding)}](<{plots[chart.name]}>)", ""]
    table = _table(chart.table.head, chart.table.rows, chart.table.prose)
    return [*lines, "<details><summary>Figures</summary>", "", *table, "</details>", ""]


def _flips(browser: Browser) -> list[str]:
    head = ("row", "flip", "label", "before", "after", "confidence", "text")
    shown = [
        (
            str(flip.row), flip.kind, flip.label, flip.before, flip.after, number(flip.confidence, 2),
            clip(flip.text, MOST_CHARACTERS),
        )
        for flip in browser.flips[:MOST_FLIPS]
    ]  # fmt: skip
    rest = len(browser.flips) - len(shown)
    more = [f"{rest:,} more are in the HTML report and in `diagnosis.json`.", ""] if rest > 0 else []
    return ["**Flips**", "", *_table(head, shown, 7), *more]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], prose: int) -> list[str]:
    rules = [":--" if place < prose else "--:" for place in range(len(head))]
    if head == ("figure", "value", "meaning"):
        rules[-1] = ":--"
    lines = [_row(map(_escape, head)), _row(rules), *(_row(map(_escape, row)) for row in rows)]
    return [*lines, ""] if len(lines) > 2 else []


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Make text show as it is: no markup, on one line, and nobody mentioned and no issue referred to by it."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _SPECIAL.sub(r"\\\1", line)
    line = re.sub(r"([@#])(?=\w)", r"\1<!-- -->", line)
    return re.sub(r"(https?):(?=//)", r"\1:<!-- -->", line)
