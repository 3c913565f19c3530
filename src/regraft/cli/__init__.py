"""The command line: a command reads its arguments, calls one function of the package, and prints the result."""

import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from regraft.cli import (
    adaptation,
    chain,
    check,
    compare,
    demo,
    methods,
    pretrain,
    recycle,
    report,
    samples,
    task,
    tune,
    weights,
)
from regraft.errors import RegraftError
from regraft.printable import printable


class InterruptedCommand(Exception):
    """Ctrl-C during a command: Typer would end a KeyboardInterrupt without a message."""


class Commands(TyperGroup):
    """A group of commands that passes interruptions and unexpected ends of files on to `main`."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Args:
            ctx: Click's context, with the command's name and arguments.

        Returns:
            The command's return value.

        Raises:
            InterruptedCommand: Ctrl-C was pressed.
            ValueError: A library reached the end of a file too early; Typer would only print "Aborted".
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise InterruptedCommand("\n".join(getattr(error, "__notes__", ()))) from error
        except EOFError as error:
            raise ValueError(f"a file ended too early ({error})") from error


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
app.command()(samples.compare_samples)
app.add_typer(adaptation.app, name="adaptation")
app.add_typer(chain.app, name="chain")
app.add_typer(task.app, name="task")
app.add_typer(weights.app, name="weights")
_options = {"debug": False}  # read by `main` after the command has ended


@app.callback()
def set_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Carry fine-tunes and adapters over to an upgraded base model."""
    _options["debug"] = debug


def main() -> None:
    """Run the command line. Its status is 2 after an error, 130 after Ctrl-C, 1 if a pipe's reader has left."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        app()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        _drop_output()
        sys.exit(1)
    except (KeyboardInterrupt, InterruptedCommand) as error:
        print(f"\ninterrupted\n{error}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if _options["debug"]:
            raise
        _drop_output()
        message = "\n".join([f"error: {_message(error)}", *getattr(error, "__notes__", ())])
        print(_indent(message), file=sys.stderr)
        sys.exit(2)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _indent(super().format(record))


def _indent(message: str) -> str:
    """Indent all lines but the first, so that a line break in a file's name cannot imitate a message."""
    return printable(message).replace("\n", "\n  ")


def _message(error: Exception) -> str:
    """Return an error's message, with the file of a system error, or with a remedy for an unexpected error."""
    from regraft.checkpoint import disk_full_error, is_disk_full

    if isinstance(error, RegraftError):
        return str(error)
    if not isinstance(error, OSError):
        return (
            f"{type(error).__name__}: {error!s:.1000}\nThis is unexpected. A file of the model or of the data may be "
            "damaged; if not, please report the traceback that `regraft --debug …` prints."
        )
    file = error.filename or "the output"
    return str(disk_full_error(file)) if is_disk_full(error) else f"{file}: {error.strerror or error}."


def _drop_output() -> None:
    """Discard output that cannot be written; Python would try to write it again on exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
