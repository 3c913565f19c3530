"""The progress callback, and a context that silences transformers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""A function of the stage, the amount done, the total amount, and figures to show."""


def silent(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """Ignore the progress."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the reports and progress bars of transformers, whose content regraft checks itself."""
    from transformers.utils import logging as untyped

    logging: Any = untyped

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks for a property that transformers 5.23 renamed
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            # PEFT warns of the layers that its layer-norm tuning is for
            warnings.filterwarnings("ignore", "Unsupported layer type .*Norm")
            # PEFT warns of the pattern that it adds itself for experts that were stored separately
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            for checked in (  # regraft raises an error for these
                "Found missing adapter keys",
                "Some weights of .* were not initialized",
                "Unexpected keyword arguments",
                r"Adapter .* LoRA tensor\(s\) have invalid shape",
            ):
                warnings.filterwarnings("ignore", checked)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
