"""`regraft compare`: several methods on the same data, in one table."""

from typing import Annotated

import typer

from regraft.cli import options


def compare(
    old_base: options.OldBase,
    new_base: options.NewBase,
    adaptation: options.AdaptationFolder,
    task: options.TaskFile,
    out: options.Out,
    methods: Annotated[
        str, typer.Option(help="Names, with commas between; scratch is the reference and always among them.")
    ] = "direct,init,distill,init+distill",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between.")] = "20",
    option: options.MethodOption = None,
    shots: options.Shots = None,
    steps: options.Steps = None,
    epochs: options.Epochs = 3.0,
    batch_size: options.BatchSize = 16,
    learning_rate: options.LearningRate = None,
    warmup: options.Warmup = 0.06,
    eval_every: options.EvalEvery = None,
    save_every: options.SaveEvery = 200,
    precision: options.Precision = "auto",
    report_to: options.ReportTo = None,
    force: options.Force = False,
) -> None:
    """Run several methods on the same data, seeds and order, and hold them against scratch."""
    from regraft.cli import show
    from regraft.errors import RecipeError
    from regraft.methods import compare as run
    from regraft.methods import parse_options
    from regraft.task import Task
    from regraft.tuning import Recipe, tracking
    from regraft.upgrade import Upgrade

    names = [name.strip() for name in methods.split(",") if name.strip()]
    try:
        each = [int(seed) for seed in seeds.split(",") if seed.strip()]
    except ValueError:
        raise RecipeError(f"--seeds takes whole numbers with commas between, found {seeds!r}.") from None
    chosen: dict[str, list[str]] = {}
    for text in option or ():
        name, colon, setting = text.partition(":")
        if not colon or name not in names:
            raise RecipeError(f"--option here is METHOD:NAME=VALUE of a method that is compared, found {text!r}.")
        chosen.setdefault(name, []).append(setting)
    recipe = Recipe(
        steps=steps, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup,
        eval_every=eval_every, save_every=save_every, precision=precision,
    )  # fmt: skip
    with show.progress() as progress, tracking(report_to or (), options.logs(out)):
        result = run(
            Upgrade(old_base, new_base),
            adaptation,
            Task.load(task).with_shots(shots),
            names,
            out,
            recipe=recipe,
            seeds=each,
            force=force,
            options={name: parse_options(name, settings) for name, settings in chosen.items()},
            progress=progress,
        )
    show.comparison(result)
    show.console.print(f"outcome folders and comparison.json: {out}", highlight=False, markup=False, soft_wrap=True)
