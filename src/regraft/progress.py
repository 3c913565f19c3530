"""How long work says where it is: one callback, silent unless somebody listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with what is being done, how much of it is done, how much there is, and figures to show beside it."""


def silent(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """Show nothing."""
