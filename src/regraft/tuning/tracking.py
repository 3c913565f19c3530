"""Experiment trackers that training reports to, as transformers' Trainer knows them."""

from __future__ import annotations

import contextlib
import contextvars
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_trackers: contextvars.ContextVar[tuple[tuple[str, ...], Path]] = contextvars.ContextVar("trackers")


@contextlib.contextmanager
def tracking(report_to: Sequence[str], folder: str | Path) -> Iterator[None]:
    """Report every training inside the context to trackers; what comes of it is the same with and without.

    Args:
        report_to: Trackers by the names transformers has for them, as `tensorboard`, `trackio` or `wandb`.
        folder: Where TensorBoard's files go, a folder a run; `TENSORBOARD_LOGGING_DIR` takes its place if it is set.

    Yields:
        Nothing.
    """
    token = _trackers.set((tuple(report_to), Path(os.environ.get("TENSORBOARD_LOGGING_DIR", folder))))
    try:
        yield
    finally:
        _trackers.reset(token)


def run_name(work: Path) -> str:
    """Return the name of a training among others.

    Args:
        work: The folder it works in.

    Returns:
        The name of the outcome it is for, and what follows it in the path.
    """
    parts = list(work.parts)
    start = next((i for i, part in enumerate(parts) if part.endswith(".partial")), len(parts) - 1)
    return "-".join(part.removeprefix(".").removesuffix(".partial") for part in parts[start:])


def trackers(run: str) -> tuple[list[str], list[Any]]:
    """Return what a Trainer reports to.

    Args:
        run: The training's name.

    Returns:
        What to give it as `report_to`, and as further callbacks.

    Raises:
        RecipeError: There is no such tracker, or it is not installed.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        TensorBoardCallback,
        get_available_reporting_integrations,
    )

    names, folder = _trackers.get(((), Path()))
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(
                f"--report-to {name}: there is no such tracker. Use {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name not in get_available_reporting_integrations():  # type: ignore[no-untyped-call]
            raise RecipeError(f"--report-to {name}: the package is not installed. Install it with pip.")
    callbacks: list[Any] = []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(folder / run))))  # type: ignore[no-untyped-call]
    return [name for name in names if name != "tensorboard"], callbacks
