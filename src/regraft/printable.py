"""Text from files as a terminal or a page may have it: without characters that act rather than stand for something."""

from __future__ import annotations

import re

# C0 and C1 controls (escape sequences begin with one) but tab and newline, bidirectional overrides and isolates, line
# and paragraph separators, halves of surrogate pairs, noncharacters
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """Replace what would move the cursor, change colours or turn the direction of writing.

    Args:
        text: Any text.

    Returns:
        The same with U+FFFD for each such character; tabs and newlines stay.
    """
    return _ACTING.sub("\N{REPLACEMENT CHARACTER}", text)
