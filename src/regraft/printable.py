"""Text from files, made safe to print on a terminal or a page."""

from __future__ import annotations

import re

# C0 and C1 controls, with which escape sequences begin, except tab and newline; bidirectional marks, embeddings,
# overrides and isolates; line and paragraph separators; the byte-order mark; lone surrogates; two noncharacters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """Replace characters that begin escape sequences, reverse the writing direction or are otherwise unsafe by U+FFFD.

    Args:
        text: Any text. Tabs and newlines are kept.
    """
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)
