"""The progress callback, and a context that silences transformers and PEFT."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""A function of the stage, the processed amount, the total amount, and numbers to show by name."""

PATTERNS_OF_ERRORS = (
    "Found missing adapter keys",
    "Some weights of .* were not initialized",
    "Unexpected keyword arguments",
    r"Adapter .* LoRA tensor\(s\) have invalid shape",
)
"""Patterns of warnings about problems for which regraft raises an error."""


def silent(stage: str, processed: int, total: int, figures: Mapping[str, float]) -> None:
    """Report nothing: the default progress callback."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars, and reports of transformers and PEFT on what regraft checks itself."""
    from transformers.utils import logging as untyped

    logging: Any = untyped

    level = logging.get_verbosity()
    has_progress_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT reads a property that transformers 5.23 renamed.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            # PEFT warns of the layers that its layer-norm tuning is for.
            warnings.filterwarnings("ignore", "Unsupported layer type .*Norm")
            # PEFT warns of the pattern that it adds itself for experts that were stored separately.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            # PEFT warns in generation that virtual tokens have no positions, which only matters to padding.
            warnings.filterwarnings("ignore", "Position ids are not supported")
            for pattern in PATTERNS_OF_ERRORS:
                warnings.filterwarnings("ignore", pattern)
            yield
    finally:
        logging.set_verbosity(level)
        if has_progress_bars:
            logging.enable_progress_bar()
