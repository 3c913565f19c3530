"""`regraft pretrain`: a base becomes its own upgrade."""

from typing import Annotated

import typer

from regraft.cli import options


def pretrain(
    base: Annotated[str, typer.Argument(help="The base to pre-train further: a folder or a hub id[@revision].")],
    corpus: Annotated[
        list[str],
        typer.Argument(help="Text (a document a line), JSONL, CSV or Parquet files, or `datasets` names[:config]."),
    ],
    out: options.Out,
    domains: Annotated[
        bool, typer.Option("--domains", help="Make a chain: each corpus is a domain, pre-trained on after the other.")
    ] = False,
    replay: Annotated[
        float, typer.Option(help="With --domains: the share of blocks of the domains before.", min=0, max=0.99)
    ] = 0.0,
    keep_every: Annotated[
        int | None, typer.Option(help="Keep the base every so many steps, in a folder beside OUT.", min=1)
    ] = None,
    text_column: Annotated[str, typer.Option(help="The text's name where the corpus has columns.")] = "text",
    block: Annotated[int, typer.Option(help="Tokens a packed block.", min=8)] = 128,
    steps: options.Steps = None,
    epochs: options.Epochs = 1.0,
    batch_size: options.BatchSize = 32,
    learning_rate: options.LearningRate = None,
    warmup: options.Warmup = 0.06,
    eval_every: options.EvalEvery = None,
    save_every: options.SaveEvery = 200,
    seed: options.Seed = 20,
    precision: options.Precision = "auto",
    report_to: options.ReportTo = None,
) -> None:
    """Pre-train a base further on new text: masked for encoders, causal for decoders."""
    from regraft.base import Base
    from regraft.cli import show
    from regraft.errors import RecipeError
    from regraft.tuning import Corpus, Recipe, pretrain_chain, tracking
    from regraft.tuning import pretrain as run

    if replay and not domains:
        raise RecipeError("--replay is of the domains before, and goes with --domains.")
    recipe = Recipe(
        steps=steps, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup,
        eval_every=eval_every, save_every=save_every, seed=seed, precision=precision,
    )  # fmt: skip
    first = Base.open(base)
    with show.progress() as progress, tracking(report_to or (), options.logs(out)):
        if domains:
            each = [Corpus((source,), text_column) for source in corpus]
            made = pretrain_chain(first, each, out, recipe, block, progress, replay=replay, keep_every=keep_every)
        else:
            whole = Corpus(tuple(corpus), text_column)
            made = [run(first, whole, out, recipe, block, progress, keep_every=keep_every)]
    for upgraded in made:
        show.pretrained(upgraded)
