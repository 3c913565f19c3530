"""Write a page as Markdown for a pull request, with figures in tables."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from regraft.report.page import AnswerBrowser, Charts, Commands, Facts, FlipBrowser, MarkedTexts, Prose, Table
from regraft.report.wording import CHANGE_WORDS, number, percent, shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from regraft.report.page import Block, Card, Chart, Fact, Page

# A comment on a pull request takes 65,536 characters; 50 × 300 are a quarter of them.
MAX_FLIPS = 50
MAX_FLIP_CHARACTERS = 300
MAX_ANSWER_PAIRS = 12  # of up to four texts each, which makes them as many as the flips
_SPECIAL = re.compile(r"([\\`*_\[\]~|])")


def to_markdown(page: Page, links: Mapping[str, str]) -> str:
    """Write a page as Markdown.

    Args:
        page: The page's content.
        links: The link to each chart's file, by the chart's name; empty if there are no files.

    Returns:
        The Markdown. Everything from files is escaped: it makes no markup and mentions no users.
    """
    lines = [f"# {_escape(page.title)}", ""]
    for part in page.parts:
        level = "##"
        if len(page.parts) > 1:
            lines += [f"## {_escape(part.title)}", ""]
            level = "###"
        lines += [_escape(part.subtitle), "", *_card(part.card)]
        for section in part.sections:
            lines += [f"{level} {_escape(section.title)}", "", _escape(section.lead), ""]
            for block in section.blocks:
                lines += _block(block, links)
    lines.append(f"Made by regraft {_escape(page.version)}.")
    return "\n".join(lines) + "\n"


def _card(card: Card) -> list[str]:
    conclusion = f"> **{card.label}: {_escape(card.choice)}**"
    if card.sure is not None:
        conclusion += f" ({percent(card.sure, 0)} sure)"
    if card.predicted is not None:
        conclusion += f", predicted recovery {percent(card.predicted, 0)}"
    return [conclusion, ">", f"> {_escape(card.advice)}", "", *_facts(card.reasons)]


def _block(block: Block, links: Mapping[str, str]) -> list[str]:
    """Write a block of any kind as lines."""
    if isinstance(block, Prose):
        return [_escape(block.text), ""]
    if isinstance(block, Facts):
        return _facts(block.facts)
    if isinstance(block, Table):
        return [f"**{_escape(block.caption)}**", "", *_table(block.columns, block.rows, block.text_columns)]
    if isinstance(block, Commands):
        return _commands(block)
    if isinstance(block, MarkedTexts):
        texts = ["".join(_span(text, mark) for text, mark in spans) for spans in block.texts]
        return [f"**{_escape(block.caption)}**", "", *(f"- {text}" for text in texts), ""]
    if isinstance(block, AnswerBrowser):
        return _answers(block)
    if isinstance(block, FlipBrowser):
        return _flips(block)
    assert isinstance(block, Charts)
    return [line for chart in block.charts for line in _chart(chart, links)]


def _commands(block: Commands) -> list[str]:
    """Write a code block whose fence is longer than any backticks in it."""
    backticks = [run for line in block.lines for run in re.findall("`+", line)]
    fence = "`" * max(3, 1 + max(map(len, backticks), default=0))
    lines = [line.replace("\r", " ").replace("\n", " ") for line in block.lines]
    return [f"{_escape(block.caption)}:", "", f"{fence}sh", *lines, fence, ""]


def _span(text: str, mark: str) -> str:
    """Write a span of a text: bold if marked, with the mark after it; spaces at its ends stay outside."""
    escaped = _escape(text)
    if not escaped:
        return " " if text else ""
    leading, trailing = (" " if character.isspace() else "" for character in (text[0], text[-1]))
    return f"{leading}{f'**{escaped}** ({_escape(mark)})' if mark else escaped}{trailing}"


def _chart(chart: Chart, links: Mapping[str, str]) -> list[str]:
    lines = [f"**{_escape(chart.title)}.** {_escape(chart.finding)}", ""]
    if chart.name in links:
        lines += [f"![{_escape(chart.finding)}](<{links[chart.name]}>)", ""]
    table = _table(chart.table.columns, chart.table.rows, chart.table.text_columns)
    return [*lines, "<details><summary>Figures</summary>", "", *table, "</details>", ""]


def _flips(browser: FlipBrowser) -> list[str]:
    """Write the first flips as a table, with the number of flips that are left out."""
    columns = ("row", "flip", "label", "before", "after", "confidence", "text")
    rows = [
        (
            str(flip.row),
            flip.kind,
            flip.label,
            flip.before,
            flip.after,
            number(flip.confidence, 2),
            shorten(flip.text, MAX_FLIP_CHARACTERS),
        )
        for flip in browser.flips[:MAX_FLIPS]
    ]
    lines = ["**Flips**", "", *_table(columns, rows, len(columns))]
    omitted = len(browser.flips) - len(rows)
    if omitted > 0:
        lines += [f"{omitted:,} more are in the HTML report and in `diagnosis.json`.", ""]
    return lines


def _answers(browser: AnswerBrowser) -> list[str]:
    """Write the first answers as nested lists, with the number of examples that are left out."""
    lines = [f"**{_escape(browser.caption)}**", ""]
    for pair in browser.pairs[:MAX_ANSWER_PAIRS]:
        lines.append(f"- row {pair.row}, {CHANGE_WORDS[pair.change]}")
        for name, text in (("prompt", pair.prompt), *pair.texts):
            lines.append(f"  - {name}: {_escape(shorten(text, MAX_FLIP_CHARACTERS)) or '(empty)'}")
    omitted = len(browser.pairs) - MAX_ANSWER_PAIRS
    return [*lines, "", *([f"{omitted:,} more are in the HTML report.", ""] if omitted > 0 else [])]


def _facts(facts: Iterable[Fact]) -> list[str]:
    return _aligned_table(("figure", "value", "meaning"), (":--", "--:", ":--"), facts)


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], text_columns: int) -> list[str]:
    return _aligned_table(columns, [":--" if i < text_columns else "--:" for i in range(len(columns))], rows)


def _aligned_table(columns: tuple[str, ...], alignments: Iterable[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Write a table; nothing if it has no rows."""
    body = [_row(map(_escape, row)) for row in rows]
    return [_row(map(_escape, columns)), _row(alignments), *body, ""] if body else []


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Escape text so that it is shown literally, on one line, and mentions no user and links no issue."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = _SPECIAL.sub(r"\\\1", line)
    line = re.sub(r"([@#])(?=\w)", r"\1<!-- -->", line)
    return re.sub(r"(https?):(?=//)", r"\1:<!-- -->", line)
