"""`regraft tune`: an adaptation comes to be."""

from typing import Annotated

import typer

from regraft.cli import options


def tune(
    base: Annotated[str, typer.Argument(help="The base to tune: a folder or a hub id[@revision].")],
    task: options.TaskFile,
    out: options.Out,
    kind: Annotated[
        str,
        typer.Option(
            help="full, lora, rslora, dora, pissa, olora, ia3, prefix, prompt, layernorm, bottleneck or pfeiffer."
        ),
    ] = "full",
    rank: Annotated[int, typer.Option(help="A LoRA's rank; its alpha is twice that.", min=1)] = 8,
    inner_size: Annotated[int, typer.Option(help="The width of bottleneck adapters.", min=1)] = 24,
    virtual_tokens: Annotated[int, typer.Option(help="How many a prefix or a prompt has.", min=1)] = 20,
    shots: options.Shots = None,
    steps: options.Steps = None,
    epochs: options.Epochs = 3.0,
    batch_size: options.BatchSize = 16,
    learning_rate: options.LearningRate = None,
    warmup: options.Warmup = 0.06,
    eval_every: options.EvalEvery = None,
    save_every: options.SaveEvery = 200,
    seed: options.Seed = 20,
    precision: options.Precision = "auto",
    report_to: options.ReportTo = None,
) -> None:
    """Tune a base on a task from a fresh head."""
    from regraft.cli import show
    from regraft.methods import tune as run
    from regraft.task import Task
    from regraft.tuning import Recipe, tracking

    recipe = Recipe(
        steps=steps, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup,
        eval_every=eval_every, save_every=save_every, seed=seed, precision=precision,
    )  # fmt: skip
    with show.progress() as progress, tracking(report_to or (), options.logs(out)):
        result = run(
            base,
            Task.load(task).with_shots(shots),
            out,
            kind=kind,
            rank=rank,
            inner_size=inner_size,
            virtual_tokens=virtual_tokens,
            recipe=recipe,
            progress=progress,
        )
    show.outcome(result)
