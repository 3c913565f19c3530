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
    import json

    from regraft.cli import show
    from regraft.tuning import Corpus, Recipe, tracking
    from regraft.tuning import pretrain as run
    from regraft.upgrade import PRETRAINING, Base

    recipe = Recipe(
        steps=steps, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, warmup=warmup,
        eval_every=eval_every, save_every=save_every, seed=seed, precision=precision,
    )  # fmt: skip
    with show.progress() as progress, tracking(report_to or (), options.logs(out)):
        upgraded = run(Base.open(base), Corpus(tuple(corpus), text_column), out, recipe, block, progress)
    record = json.loads((upgraded.path / PRETRAINING).read_text(encoding="utf-8"))
    first, last = record["curve"][0], record["curve"][-1]
    show.console.print(
        f"held-out loss {first['loss']:.3f} → {last['loss']:.3f} in {last['step']:.0f} steps, "
        f"{record['tokens']:,} tokens, {record['tokens'] / last['seconds']:,.0f} tokens/s",
        highlight=False,
    )
    show.console.print(f"upgraded base: {out}", highlight=False, markup=False, soft_wrap=True)
