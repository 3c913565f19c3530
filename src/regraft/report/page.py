"""What a page is made of, whatever it is written as: parts of sections of blocks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from regraft.diagnosis.regressions import Flip


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures in rows and columns.

    Args:
        caption: What the table shows.
        head: The columns' names; the first column names its row.
        rows: The cells, as they are to be read.
        prose: How many of the first columns are words rather than figures.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    prose: int = 1


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture of figures.

    Args:
        name: Unique on the page, and the name of its file.
        title: What is drawn, in a few words.
        finding: What it shows, in a sentence: for those who cannot see it, and below it for all.
        figure: The drawing.
        table: The figures behind it.
        wide: Whether it takes the page's whole width.
    """

    name: str
    title: str
    finding: str
    figure: Figure
    table: Table
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Charts:
    """Charts to be seen side by side where there is room.

    Args:
        charts: The charts.
    """

    charts: tuple[Chart, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """A few figures that matter, each with its name.

    Args:
        pairs: Name, value, and what the value means.
    """

    pairs: tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Prose:
    """A paragraph.

    Args:
        text: Plain text.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class Commands:
    """Commands to copy.

    Args:
        caption: What they do.
        lines: The commands.
    """

    caption: str
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MarkedTexts:
    """Texts of which stretches are marked.

    Args:
        caption: What is marked.
        texts: The stretches of each text and what they are marked as, empty for plain text.
    """

    caption: str
    texts: tuple[tuple[tuple[str, str], ...], ...]


@dataclasses.dataclass(frozen=True)
class Browser:
    """Examples to search through.

    Args:
        flips: The flips of a diagnosis.
    """

    flips: tuple[Flip, ...]

    @property
    def labels(self) -> list[str]:
        """The labels that occur, in alphabetical order."""
        return sorted({flip.label for flip in self.flips})


Block = Table | Charts | Facts | Prose | Commands | MarkedTexts | Browser


@dataclasses.dataclass(frozen=True)
class Section:
    """One question and its answer.

    Args:
        name: Its anchor, unique in its part.
        title: Its heading.
        lead: What it is about and how it came out.
        blocks: What it shows.
    """

    name: str
    title: str
    lead: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Card:
    """What a part comes to: the first thing that is read.

    Args:
        label: What kind of answer it is.
        choice: The answer.
        tone: How good it is: `good`, `fair`, `poor` or `plain`.
        advice: What to do, in a sentence.
        sure: How sure the answer is, from 0 to 1, None where it is a measurement.
        predicted: The recovery that is expected, from 0 to 1, None where it is measured.
        reasons: Name, value and meaning of the figures that led there.
    """

    label: str
    choice: str
    tone: str
    advice: str
    sure: float | None
    predicted: float | None
    reasons: tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """All of one task, or of one adaptation for it.

    Args:
        name: Its anchor, unique on the page.
        title: Its heading.
        about: What it is about, in a line.
        card: What it comes to.
        sections: Its sections.
    """

    name: str
    title: str
    about: str
    card: Card
    sections: tuple[Section, ...]


@dataclasses.dataclass(frozen=True)
class Page:
    """The whole report.

    Args:
        title: Its heading.
        parts: Its parts.
        version: Of the regraft that made it.
    """

    title: str
    parts: tuple[Part, ...]
    version: str

    @property
    def charts(self) -> list[Chart]:
        """All charts, in the order of the page."""
        blocks = (block for part in self.parts for section in part.sections for block in section.blocks)
        return [chart for block in blocks if isinstance(block, Charts) for chart in block.charts]
