"""How long work says where it is: one callback, silent unless somebody listens; and how transformers is kept quiet."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with what is being done, how much of it is done, how much there is, and figures to show beside it."""


def silent(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """Show nothing."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing load reports and bars of its own: what they would say is checked here."""
    from transformers.utils import logging as untyped

    logging: Any = untyped

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks for a property that transformers 5.23 renamed
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            # PEFT says so of the very layers that its layer-norm tuning is for
            warnings.filterwarnings("ignore", "Unsupported layer type .*Norm")
            # PEFT says so of the pattern that it adds itself for experts that were stored one by one
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            for refused in (
                "Found missing adapter keys",
                "Some weights of .* were not initialized",
                "Unexpected keyword arguments",
                r"Adapter .* LoRA tensor\(s\) have invalid shape",
            ):
                warnings.filterwarnings("ignore", refused)  # an error of ours names them
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
