"""`regraft tune`: tune a base on a task."""

from typing import Annotated

import typer

import regraft
from regraft.cli import options
from regraft.cli.recycle import print_outcome


@options.recipe_flags()
def tune(
    base: Annotated[str, typer.Argument(help="Base to tune: a folder or a hub id@revision.", metavar="BASE")],
    task: options.Task,
    out: options.Out,
    recipe: "regraft.Recipe",
    kind: Annotated[
        str,
        typer.Option(
            help="Kind: full, lora, rslora, dora, pissa, olora, ia3, prefix, prompt, layernorm, bottleneck or pfeiffer."
        ),
    ] = "full",
    rank: Annotated[int, typer.Option(help="Rank of a LoRA; its alpha is twice the rank.", min=1)] = 8,
    inner_size: Annotated[int, typer.Option(help="Width of bottleneck adapters.", min=1)] = 24,
    virtual_tokens: Annotated[int, typer.Option(help="Virtual tokens of a prefix or a prompt.", min=1)] = 20,
    served_base: options.ServedBase = None,
    shots: options.Shots = None,
    report_to: options.ReportTo = None,
) -> None:
    """Tune a base on a task, starting from a fresh head."""
    from regraft.cli.terminal import show_progress
    from regraft.tuning import tracking

    with show_progress() as progress, tracking(report_to or (), options.log_folder(out)):
        outcome = regraft.tune(
            base,
            regraft.Task.load(task).with_shots(shots),
            out,
            kind=kind,
            rank=rank,
            inner_size=inner_size,
            virtual_tokens=virtual_tokens,
            recipe=recipe,
            served_base=served_base,
            progress=progress,
        )
    print_outcome(outcome)
