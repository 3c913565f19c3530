"""`regraft adaptation`: what an adaptation is, and other kinds made of it."""

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import options

app = typer.Typer(help="What an adaptation is, and other kinds made of it.", no_args_is_help=True)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="An outcome, or a folder of save_pretrained of transformers or PEFT.")],
    base: Annotated[str | None, typer.Option(help="Its base: show whether it belongs to it and loads wholly.")] = None,
) -> None:
    """Say what an adaptation holds, and with its base whether it loads wholly."""
    from regraft.adaptation import load_adaptation, load_model, stored_head
    from regraft.adaptation.tokens import with_own_tokens
    from regraft.base import Base
    from regraft.cli import show as print_
    from regraft.upgrade import Upgrade

    adaptation = load_adaptation(path)
    lineage = None
    if base:
        opened = Base.open(base)
        lineage = adaptation.check_base(opened)
        reading = with_own_tokens(adaptation, Upgrade(opened, opened)).old
        load_model(adaptation, reading, stored_head(adaptation, opened))
    print_.adaptation(adaptation, base, lineage)


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="What was tuned.")],
    old_base: options.OldBase,
    out: Annotated[Path, typer.Option(help="The folder to make. If it is there, made from the same, nothing is done.")],
    to: Annotated[str, typer.Option(help="full, or lora.")],
    new_base: Annotated[str | None, typer.Option(help="The upgraded base, if the result is for that.")] = None,
    rank: Annotated[int | None, typer.Option(help="To a LoRA: the rank of every layer.", min=1)] = None,
    energy: Annotated[float | None, typer.Option(help="To a LoRA: the share of each delta to keep, 0 to 1.")] = None,
    task: Annotated[
        Path | None, typer.Option(help="To a LoRA: a task file; outputs on its texts are kept rather than weights.")
    ] = None,
    force: options.Force = False,
) -> None:
    """Write an adaptation as another kind: a full fine-tune as a LoRA, an adapter as a full fine-tune."""
    from regraft.cli import show as print_
    from regraft.methods import convert as run

    with print_.progress() as progress:
        result = run(
            path, old_base, out, to, new=new_base, rank=rank, energy=energy, task=task, force=force, progress=progress
        )
    print_.line(f"{result.kind}: {100 * result.kept:.1f} % of the delta's squared norm kept: {result.path}")
    if result.left_out:
        print_.line(f"{100 * result.left_out:.1f} % is in embeddings, norms and biases, for which a LoRA has no place.")
