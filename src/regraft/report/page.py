"""The content of a page, regardless of its format: parts made of sections, made of blocks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regraft.diagnosis.regressions import Flip

Fact = tuple[str, str, str]
"""A figure's name, value and meaning."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text and figures.

    Args:
        caption: What the table shows.
        columns: The names of the columns; the first column names its row.
        rows: The cells, formatted.
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
        name: The name of its file, unique on the page.
        title: What is drawn, in a few words.
        finding: What the chart shows, in a sentence: its caption, and its label for screen readers.
        figure: The drawing.
        table: The figures behind it.
        wide: Whether it takes the page's full width.
    """

    name: str
    title: str
    finding: str
    figure: Figure
    table: Table
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Charts:
    """Charts that are shown side by side if there is room.

    Args:
        charts: The charts.
    """

    charts: tuple[Chart, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """A few figures of note.

    Args:
        facts: Name, value and meaning of each.
    """

    facts: tuple[Fact, ...]


@dataclasses.dataclass(frozen=True)
class Prose:
    """A paragraph.

    Args:
        text: Plain text.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class Commands:
    """Shell commands to copy.

    Args:
        caption: What the commands do.
        lines: The commands.
    """

    caption: str
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MarkedTexts:
    """Texts with marked spans.

    Args:
        caption: What is marked.
        texts: The spans of each text, with the mark of each, which is empty for plain text.
    """

    caption: str
    texts: tuple[tuple[tuple[str, str], ...], ...]


@dataclasses.dataclass(frozen=True)
class FlipBrowser:
    """A searchable table of flips.

    Args:
        flips: The flips of a diagnosis.
    """

    flips: tuple[Flip, ...]

    @property
    def labels(self) -> list[str]:
        """The labels that occur, in alphabetical order."""
        return sorted({flip.label for flip in self.flips})


Block = Table | Charts | Facts | Prose | Commands | MarkedTexts | FlipBrowser


@dataclasses.dataclass(frozen=True)
class Section:
    """One question and its answer.

    Args:
        anchor: Its anchor, unique in its part.
        title: Its heading.
        lead: Its subject and result, in a sentence or two.
        blocks: Its content.
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
        choice: The conclusion.
        tone: How good it is: `good`, `fair`, `poor` or `plain`.
        advice: What to do, in a sentence.
        sure: How sure the conclusion is, from 0 to 1; None for a measurement.
        predicted: The expected recovery, from 0 to 1; None for a measurement.
        reasons: The figures that led there.
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
    """Everything about one task, or about one adaptation for it.

    Args:
        anchor: Its anchor, unique on the page.
        title: Its heading.
        subtitle: The bases, the adaptation and the data, in a line.
        card: Its conclusion.
        sections: Its sections.
    """

    anchor: str
    title: str
    subtitle: str
    card: Card
    sections: tuple[Section, ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """The whole report.

    Args:
        title: Its heading.
        parts: Its parts.
        version: The version of regraft that made it.
    """

    title: str
    parts: tuple[Part, ...]
    version: str

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        blocks = (block for part in self.parts for section in part.sections for block in section.blocks)
        return [chart for block in blocks if isinstance(block, Charts) for chart in block.charts]
