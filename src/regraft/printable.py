"""Text from files, made safe to print on a terminal or a page."""

from __future__ import annotations

import re

# C0 and C1 controls, with which escape sequences begin, except tab and newline; bidirectional overrides and isolates;
# line and paragraph separators; lone surrogates; noncharacters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """Replace characters that move the cursor, change colours or reverse the writing direction with U+FFFD.

    Args:
        text: Any text. Tabs and newlines are kept.
    """
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)
