"""Options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

OldBase = Annotated[str, typer.Option(help="The base the weights were tuned on: a folder or a hub id[@revision].")]
NewBase = Annotated[str, typer.Option(help="The upgraded base.")]
AdaptationFolder = Annotated[Path, typer.Option("--adaptation", help="What was tuned on the old base.")]
TaskFile = Annotated[Path, typer.Option("--task", help="The task file (YAML).")]
Out = Annotated[Path, typer.Option(help="The folder to make. If it is there, made from the same, nothing is done.")]
Shots = Annotated[int | None, typer.Option(help="Take so many training examples a class.", min=1)]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps; by default --epochs, and at least 100.", min=1)]
Epochs = Annotated[float, typer.Option(help="Passes over the data where --steps is not given.")]
BatchSize = Annotated[int, typer.Option(help="Examples a step (blocks, for pretrain).", min=1)]
LearningRate = Annotated[
    float | None, typer.Option(help="Peak rate; by default 5e-5 (full), 5e-4 (LoRA, bottleneck), 1e-4 (pretrain).")
]
Warmup = Annotated[float, typer.Option(help="The fraction of the steps over which the rate rises.")]
EvalEvery = Annotated[int | None, typer.Option(help="Steps between evaluations; by default about ten in all.", min=1)]
SaveEvery = Annotated[int, typer.Option(help="Steps between the checkpoints an interrupted run goes on from.", min=1)]
Seed = Annotated[int, typer.Option(help="Fixes fresh heads, few-shot draws, the order of the data and dropout.")]
Precision = Annotated[str, typer.Option(help="bf16, fp32, or auto: bf16 where the device computes in it.")]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        help="A tracker that training reports to: tensorboard (into OUT-logs), trackio, wandb, …; repeatable."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Take the old base though the weights record another one.")]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="An option of the method, as in -o alpha=0.9; `regraft methods` lists them."),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="An option of one of the methods, as in -o distill:alpha=0.9."),
]


def logs(out: Path) -> Path:
    """Return the folder for trackers' files, beside what a command makes.

    Args:
        out: What it makes.

    Returns:
        The folder.
    """
    return Path(f"{os.path.abspath(out)}-logs")
