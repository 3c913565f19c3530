"""`regraft chain`: adaptations carried along a chain of bases."""

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import options

app = typer.Typer(no_args_is_help=True)


@app.callback()
def main() -> None:
    """Carry adaptations along a chain of bases, hop by hop or at once."""


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="The chain file (YAML).", metavar="FILE")],
    out: Annotated[Path, typer.Option(help="The folder for everything; what is there is kept.")],
    report_to: options.ReportTo = None,
) -> None:
    """Tune on the first base and recycle along the chain; builds only what is missing."""
    from regraft.chain import Chain, run_chain
    from regraft.cli import show
    from regraft.tuning import tracking

    chain = Chain.load(file)
    with show.progress() as progress, tracking(report_to or (), options.logs(out)):
        rows = run_chain(chain, out, progress)
    show.chain(list(chain.bases), rows)


@app.command(name="show")
def show_chain(out: Annotated[Path, typer.Argument(help="A folder of `regraft chain run`.")]) -> None:
    """Show the scores on every base, and what each hop loses."""
    from regraft.chain import read_chain
    from regraft.cli import show

    show.chain(*read_chain(out))
