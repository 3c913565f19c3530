"""The content of a page, regardless of its format: parts that consist of sections, which consist of blocks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regraft.diagnosis.regressions import Flip
    from regraft.task.types import AnswerPair

Fact = tuple[str, str, str]
"""A figure's name, value and meaning."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text and figures.

    Args:
        caption: The subject of the table, in a few words.
        columns: The names of the columns; the first column names the rows.
        rows: The cells of each row, formatted.
        text_columns: The number of leading columns that hold text rather than figures.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart with the figures behind it.

    Args:
        name: The name of the chart's file, unique on the page.
        title: The subject of the chart, in a few words.
        finding: The result that the chart shows, in a sentence: the caption, and the label for screen readers.
        figure: The drawing, not yet saved.
        table: The figures behind the drawing.
        wide: Whether the chart takes the page's full width.
    """

    name: str
    title: str
    finding: str
    figure: Figure
    table: Table
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Charts:
    """Charts that are shown side by side if the page is wide enough.

    Args:
        charts: The charts, in reading order.
    """

    charts: tuple[Chart, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """A few figures of note.

    Args:
        facts: The name, value and meaning of each figure.
    """

    facts: tuple[Fact, ...]


@dataclasses.dataclass(frozen=True)
class Prose:
    """A paragraph.

    Args:
        text: The text, without markup.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class Commands:
    """Shell commands to copy.

    Args:
        caption: The purpose of the commands.
        lines: The commands, one per line.
    """

    caption: str
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MarkedTexts:
    """Texts with marked spans.

    Args:
        caption: The subject of the marks.
        texts: For each text, its spans: the characters and their mark, which is empty for plain text.
    """

    caption: str
    texts: tuple[tuple[tuple[str, str], ...], ...]


@dataclasses.dataclass(frozen=True)
class AnswerBrowser:
    """A searchable list of the answers of two models side by side.

    Args:
        caption: The heading.
        pairs: The answers to each prompt.
    """

    caption: str
    pairs: tuple[AnswerPair, ...]


@dataclasses.dataclass(frozen=True)
class FlipBrowser:
    """A searchable table of flips.

    Args:
        flips: The flips of a diagnosis.
    """

    flips: tuple[Flip, ...]

    @property
    def labels(self) -> list[str]:
        """The targets to filter flips by, in alphabetical order; empty if most flips have a target of their own."""
        labels = sorted({flip.label for flip in self.flips})
        return labels if 2 * len(labels) <= len(self.flips) else []  # such as numbers, or the tags of sentences


Block = Table | Charts | Facts | Prose | Commands | MarkedTexts | AnswerBrowser | FlipBrowser


@dataclasses.dataclass(frozen=True)
class Section:
    """One subject of a part, such as a question and its answer.

    Args:
        anchor: The section's anchor, unique in the part.
        title: The heading.
        lead: The subject, the result or how to read the blocks, in a few sentences.
        blocks: The content, in order.
    """

    anchor: str
    title: str
    lead: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Card:
    """The conclusion of a part, which comes first.

    Args:
        label: The kind of conclusion, such as `Verdict`.
        choice: The conclusion, in a few words.
        tone: The colour of the card: `good`, `fair`, `poor` or `plain`.
        advice: The recommended action, in a sentence.
        sure: The certainty of the conclusion, from 0 to 1; None for a measurement.
        predicted: The expected recovery, 1 being full recovery; None for a measurement.
        reasons: The figures that led to the conclusion.
    """

    label: str
    choice: str
    tone: str
    advice: str
    sure: float | None
    predicted: float | None
    reasons: tuple[Fact, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """The results for one task with its first diagnosis, or a further diagnosis of the task.

    Args:
        anchor: The part's anchor, unique on the page.
        title: The heading.
        subtitle: In a line, the bases, kind of adaptation, data and score of the diagnosis; without a diagnosis, the
            metric, the split and the number of methods.
        card: The conclusion, which is shown first.
        sections: The sections, in order.
    """

    anchor: str
    title: str
    subtitle: str
    card: Card
    sections: tuple[Section, ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """The content of a report.

    Args:
        title: The heading.
        parts: The parts, in order.
        version: The version of regraft that wrote the report.
    """

    title: str
    parts: tuple[Part, ...]
    version: str

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        charts: list[Chart] = []
        for part in self.parts:
            for section in part.sections:
                for block in section.blocks:
                    if isinstance(block, Charts):
                        charts += block.charts
        return charts
