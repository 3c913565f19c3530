"""The command line: reads arguments, calls one function of the package, prints what it gives."""

import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from regraft.cli import adaptation, chain, check, compare, demo, methods, pretrain, recycle, report, task, tune, weights
from regraft.errors import RegraftError
from regraft.printable import printable


class Interrupted(Exception):
    """Ctrl-C in a command, carried past Typer, which would end without a word."""


class Commands(TyperGroup):
    """The commands, of which an interruption is told."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Args:
            ctx: Click's context.

        Returns:
            What the command returns.

        Raises:
            Interrupted: Ctrl-C was pressed.
            ValueError: A file that was read by a library ended early, of which Typer would say "Aborted".
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted("\n".join(getattr(error, "__notes__", ()))) from error
        except EOFError as error:
            raise ValueError(f"the end of a file where more is expected ({error})") from error


app = typer.Typer(
    name="regraft",
    cls=Commands,
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
    """Run the command line; an error is printed and ends with status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        app()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has seen enough
        _drop_output()
        sys.exit(1)
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"\ninterrupted: the same command goes on from here\n{error}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if _settings["debug"]:
            raise
        _drop_output()
        message = "\n".join([f"error: {_told(error)}", *getattr(error, "__notes__", ())])
        print(_in_one_piece(message), file=sys.stderr)
        sys.exit(2)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _in_one_piece(super().format(record))


def _in_one_piece(message: str) -> str:
    """Indent what follows the first line: a newline in a name cannot begin a message of its own."""
    return printable(message).replace("\n", "\n  ")


def _told(error: Exception) -> str:
    """Name the file of an error of the system's own, and the kind of one that no command foresaw."""
    from regraft.checkpoint import disk_full, is_disk_full

    if isinstance(error, RegraftError):
        return str(error)
    if not isinstance(error, OSError):
        return (
            f"{type(error).__name__}: {error!s:.1000}\nregraft did not foresee this. Is a file of the model or of the "
            "data damaged? `regraft --debug …` says where it came up: please report it with that."
        )
    where = error.filename or "the output"
    return str(disk_full(where)) if is_disk_full(error) else f"{where}: {error.strerror or error}."


def _drop_output() -> None:
    """Keep Python from writing the rest of the output on exit, where that cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
