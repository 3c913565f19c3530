"""`regraft recycle`: weights for the new base out of weights tuned on the old one."""

from typing import Annotated

import typer

from regraft.cli import options


def recycle(
    old_base: options.OldBase,
    new_base: options.NewBase,
    adaptation: options.AdaptationFolder,
    task: options.TaskFile,
    out: options.Out,
    method: Annotated[str, typer.Option(help="One that `regraft methods` lists, or START+OBJECTIVE.")] = "init+distill",
    head: Annotated[
        str, typer.Option(help="copy the old head; resize it to the task's labels, by name; or a fresh one.")
    ] = "copy",
    replace: Annotated[
        bool,
        typer.Option(
            "--replace", help="Put embeddings, norms and biases that an adapter stores back as they are stored."
        ),
    ] = False,
    option: options.Option = None,
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
    force: options.Force = False,
) -> None:
    """Carry one adaptation over to the new base by one method."""
    from regraft.cli import show
    from regraft.methods import parse_options
    from regraft.methods import recycle as run
    from regraft.task import Task
    from regraft.tuning import Recipe, tracking
    from regraft.upgrade import Upgrade

    chosen = parse_options(method, option or ())
    recipe = Recipe(
        steps=steps, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup,
        eval_every=eval_every, save_every=save_every, seed=seed, precision=precision,
    )  # fmt: skip
    with show.progress() as progress, tracking(report_to or (), options.logs(out)):
        result = run(
            Upgrade(old_base, new_base),
            adaptation,
            Task.load(task).with_shots(shots),
            method,
            out,
            recipe=recipe,
            options=chosen,
            head=head,  # type: ignore[arg-type]
            replace=replace,
            force=force,
            progress=progress,
        )
    show.outcome(result)
