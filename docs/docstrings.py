"""Parse docstrings in Google's style, and write them as Markdown."""

from __future__ import annotations

import inspect
import re
from typing import Any

ENTRY = re.compile(r"(\w+): (.*)")
"""An entry of a docstring's section: a name and its description."""
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
"""A reference to a paper, by its id."""
SECTION_TITLES = {"Args": "Arguments", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}
"""Titles on the pages, by title in a docstring."""
SECTION = re.compile(rf"({'|'.join(SECTION_TITLES)}):")
"""The line above a section."""


def docstring_to_markdown(documented: Any) -> str:
    """Write a docstring, or the docstring of an object, as Markdown."""
    lead, sections = split_docstring(documented if isinstance(documented, str) else inspect.getdoc(documented) or "")
    paragraphs = [to_markdown(lead)]
    for section, title in SECTION_TITLES.items():
        if section not in sections:
            continue
        if section in ("Returns", "Yields"):
            paragraphs.append(f"**{title}:** {to_markdown(sections[section])}")
        else:
            entries = parse_entries(sections[section])
            items = "".join(f"- `{name}`: {to_markdown(description)}" for name, description in entries.items())
            paragraphs.append(f"**{title}:**\n\n{items}")
    return "\n".join(paragraphs)


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into its lead and its sections."""
    lead: list[str] = []
    sections: dict[str, list[str]] = {}
    current = lead
    for line in text.splitlines():
        header = SECTION.fullmatch(line)
        if header:
            current = sections.setdefault(header[1], [])
            continue
        if line and not line.startswith(" "):
            current = lead  # sections are indented, so this is a paragraph before or after them
        current.append(line)
    return "\n".join(lead).strip(), {
        name: inspect.cleandoc("\n" + "\n".join(lines)) for name, lines in sections.items()
    }


def parse_entries(section: str) -> dict[str, str]:
    """Return the descriptions of a section by name, each on one line."""
    entries: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = ENTRY.fullmatch(line)
        if entry and not line.startswith(" "):
            name, description = entry.groups()
            entries[name] = description
        elif name and line.strip():
            entries[name] += f" {line.strip()}"
    return entries


def split_source(text: str) -> tuple[str, str]:
    """Split a text into its description and the source that it cites; either may be empty."""
    before, _, source = text.partition("Source: ")
    return before.strip(), source.strip()


def to_markdown(text: str) -> str:
    """Write a docstring's text as Markdown: escape it, join its lines and link papers."""
    spans = re.split(r"(`[^`]*`)", text)  # code is at the odd positions, and not escaped
    spans[::2] = [re.sub(r"([*<>])", r"\\\1", span) for span in spans[::2]]
    paragraphs = [" ".join(part.split()) for part in "".join(spans).strip().split("\n\n")]
    linked = PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", "\n\n".join(paragraphs))
    return linked + "\n"
