"""The command line: reads arguments, calls one function of the package, prints what it gives."""

import logging
import os
import sys
from typing import Annotated

import typer

from regraft.cli import adaptation, chain, check, compare, demo, methods, pretrain, recycle, report, task, tune, weights
from regraft.errors import RegraftError
from regraft.printable import printable

app = typer.Typer(
    name="regraft",
    help="Carry fine-tunes and adapters over to an upgraded base model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (check, compare, demo, methods, pretrain, recycle, report, tune):
    app.command()(getattr(command, command.__name__.rpartition(".")[2]))
app.add_typer(adaptation.app, name="adaptation")
app.add_typer(chain.app, name="chain")
app.add_typer(task.app, name="task")
app.add_typer(weights.app, name="weights")
_settings = {"debug": False}


@app.callback()
def settings(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Carry fine-tunes and adapters over to an upgraded base model."""
    _settings["debug"] = debug


def main() -> None:
    """Run the command line; an error of regraft's own is printed and ends with status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        app()
    except RegraftError as error:
        if _settings["debug"]:
            raise
        print(f"error: {_in_one_piece(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _in_one_piece(super().format(record))


def _in_one_piece(message: str) -> str:
    """Indent what follows the first line: a newline in a name cannot begin a message of its own."""
    return printable(message).replace("\n", "\n  ")
