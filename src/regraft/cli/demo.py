"""`regraft demo`: the whole job on a real model and real data, without arguments."""

from pathlib import Path
from typing import Annotated

import typer

OUT = Path("runs/demo")
"""The default output folder."""
FULL_OUT = Path("runs/demo-full")
"""The default output folder with `--full`, so that both demos can be kept."""


def demo(
    task: Annotated[
        str | None,
        typer.Option(help="The task to run; by default section-role, with --full all tasks.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help=f"Output folder; by default {OUT}, with --full {FULL_OUT}, with --task TASK {OUT}-TASK."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All examples and tasks, three seeds, longer training (hours).")
    ] = False,
) -> None:
    """Upgrade a real base, tune on the old one, recycle by several methods, and compare."""
    from regraft.cli.check import print_check
    from regraft.cli.compare import print_comparison
    from regraft.cli.terminal import print_line, show_progress
    from regraft.demo import run

    size, default_out = (run.FULL, FULL_OUT) if full else (run.SHORT, OUT)
    if task is not None:
        size = size.with_task(task)
        # a folder per task, because the corpus of a new base leaves out the texts that its tasks are evaluated on
        default_out = default_out.with_name(f"{default_out.name}-{task}")
    with show_progress() as progress:
        for check, comparison in run.demo(out or default_out, size, progress):
            print_check(check)
            print_comparison(comparison)
            print_line("\n  ".join(["outcome folders:", *comparison.outcomes]))
