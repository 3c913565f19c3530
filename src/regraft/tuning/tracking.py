"""Experiment trackers of training, such as TensorBoard, through transformers' Trainer."""

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
"""The names of the current context's trackers, and the folder for TensorBoard's files."""


@contextlib.contextmanager
def tracking(report_to: Sequence[str], folder: str | Path) -> Iterator[None]:
    """Report every training inside the context to experiment trackers, on which its results do not depend.

    Args:
        report_to: Names of trackers, as in transformers' `TrainingArguments`: `tensorboard`, `trackio`, `wandb`, ….
        folder: The folder for TensorBoard's files, which gets a subfolder per training. The environment variable
            `TENSORBOARD_LOGGING_DIR` takes precedence.
    """
    token = _trackers.set((tuple(report_to), Path(os.environ.get("TENSORBOARD_LOGGING_DIR", folder))))
    try:
        yield
    finally:
        _trackers.reset(token)


def run_name(work_folder: Path) -> str:
    """Return the name of a training in trackers.

    Args:
        work_folder: The training's working folder, in the temporary folder of an outcome or of a base.

    Returns:
        The name of the outcome or base and the names of the folders below, joined by hyphens: `out-head` for
        `.out.partial/head`.
    """
    folders = work_folder.parts
    temporary_indices = [index for index, folder in enumerate(folders) if folder.endswith(".partial")]
    start = temporary_indices[0] if temporary_indices else len(folders) - 1
    return "-".join(folder.removeprefix(".").removesuffix(".partial") for folder in folders[start:])


def trackers(training_name: str) -> tuple[list[str], list[Any]]:
    """Return the trackers of the current context, in the form that a Trainer takes.

    Args:
        training_name: The training's name, from `run_name`.

    Returns:
        The value of `report_to`, and further callbacks.

    Raises:
        RecipeError: A tracker does not exist or is not installed.
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
                f"--report-to {name}: there is no such tracker. Use one of {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name not in get_available_reporting_integrations():  # type: ignore[no-untyped-call]
            raise RecipeError(f"--report-to {name}: the package is not installed. Install it with pip.")
    callbacks: list[Any] = []
    if "tensorboard" in names:  # not through `report_to`, with which the Trainer would choose the folder
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / training_name))
        callbacks.append(TensorBoardCallback(writer))  # type: ignore[no-untyped-call]
    return [name for name in names if name != "tensorboard"], callbacks
