"""`regraft pretrain`: pre-train a base further, which makes an upgrade of it."""

from typing import Annotated

import typer

import regraft
from regraft.cli import options
from regraft.errors import RecipeError


@options.recipe_flags(regraft.Recipe(epochs=1.0, batch_size=32))
def pretrain(
    base: Annotated[
        str, typer.Argument(help="Base to pre-train further: a folder or a hub id@revision.", metavar="BASE")
    ],
    corpus: Annotated[
        list[str],
        typer.Argument(
            help="Text (one document per line), JSONL, CSV or Parquet files, or a `datasets` name(:config).",
            metavar="CORPUS",
        ),
    ],
    out: options.Out,
    recipe: "regraft.Recipe",
    domains: Annotated[
        bool, typer.Option("--domains", help="Make a chain of bases: pre-train on one corpus after the other.")
    ] = False,
    replay: Annotated[
        float, typer.Option(help="With --domains: share of the blocks that replay earlier domains.", min=0, max=0.99)
    ] = 0.0,
    keep_every: Annotated[
        int | None, typer.Option(help="Steps between the bases to keep, in a folder next to each upgraded base.", min=1)
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the text, where the corpus has columns.")] = "text",
    # the default is `tuning.pretrain.DEFAULT_BLOCK_SIZE`, whose import would make every command start later
    block: Annotated[int, typer.Option(help="Tokens in a packed block.", min=8)] = 128,
    report_to: options.ReportTo = None,
) -> None:
    """Pre-train a base further on new text: masked for encoders, causal for decoders."""
    from regraft.cli.terminal import show_progress
    from regraft.tuning import pretrain_chain, tracking

    if replay and not domains:
        raise RecipeError("--replay needs --domains: it replays the earlier domains.")
    opened_base = regraft.Base.open(base)
    with show_progress() as progress, tracking(report_to or (), options.log_folder(out)):
        if domains:
            corpora = [regraft.Corpus((source,), text_column) for source in corpus]
            bases = pretrain_chain(
                opened_base, corpora, out, recipe, block, progress, replay=replay, keep_every=keep_every
            )
        else:
            joint_corpus = regraft.Corpus(tuple(corpus), text_column)
            bases = [regraft.pretrain(opened_base, joint_corpus, out, recipe, block, progress, keep_every=keep_every)]
    for upgraded_base in bases:
        print_base(upgraded_base)


def print_base(base: "regraft.Base") -> None:
    """Print the losses and the speed of a base's pre-training.

    Args:
        base: The upgraded base.
    """
    import json

    from regraft.base import PRETRAINING
    from regraft.cli.terminal import print_line, print_text

    record = json.loads((base.path / PRETRAINING).read_text(encoding="utf-8"))
    first_entry, last_entry = record["curve"][0], record["curve"][-1]
    print_text(
        f"held-out loss {first_entry['loss']:.3f} → {last_entry['loss']:.3f} in {last_entry['step']:.0f} steps, "
        f"{record['tokens']:,} tokens, {record['tokens'] / last_entry['seconds']:,.0f} tokens/s"
    )
    print_line(f"upgraded base: {base.path}")
