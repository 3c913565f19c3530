"""Arguments and options that several commands share, and the flags of a recipe."""

import functools
import inspect
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from regraft.recipe import Recipe

OldBase = Annotated[str, typer.Option(help="Old base, of the adaptation: a folder or a hub id@revision.")]
NewBase = Annotated[str, typer.Option(help="New base: a folder or a hub id@revision.")]
Adaptation = Annotated[Path, typer.Option(help="Adaptation: an outcome, or a folder saved by transformers or PEFT.")]
Task = Annotated[Path, typer.Option(help="Task file (YAML), or a data file or folder, whose columns name the task.")]
Out = Annotated[Path, typer.Option(help="Output folder. A result of the same inputs in it is left as it is.")]
Shots = Annotated[
    int | None,
    typer.Option(help="Use only a few examples of train and of dev: this many per class in classification.", min=1),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(help="Tracker to report to: tensorboard (writes to OUT-logs), trackio, wandb, …", show_default=False),
]
ServedBase = Annotated[
    str | None,
    typer.Option(help="Base as the server will name it, a path or a hub id: it is recorded in the adapter's config."),
]
Force = Annotated[bool, typer.Option("--force", help="Proceed even if the adaptation records a different base.")]


def recipe_flags(defaults: Recipe | None = None, omit: Collection[str] = ()) -> Callable[[Callable[..., None]], Any]:
    """Add a flag for each field of `Recipe` to a command, which receives them as one parameter, `recipe`.

    Args:
        defaults: The recipe whose values are the flags' defaults; None for those of `Recipe`.
        omit: The names of fields that get no flag.

    Returns:
        The decorator.
    """
    values = defaults or Recipe()
    types = get_type_hints(Recipe)
    descriptions = _field_descriptions(Recipe)
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(values, name),
            annotation=Annotated[types[name], typer.Option(help=descriptions[name], rich_help_panel="Training")],
        )
        for name in types
        if name not in omit
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            fields = {flag.name: arguments.pop(flag.name) for flag in flags}
            command(recipe=Recipe(**fields), **arguments)

        command_parameters = [
            parameter for parameter in inspect.signature(command).parameters.values() if parameter.name != "recipe"
        ]
        parameters = [
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in command_parameters),
            *flags,
        ]
        # Typer reads a command's parameters from these two
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _field_descriptions(record: type) -> dict[str, str]:
    """Read the descriptions of a dataclass's fields from the `Args` of its docstring."""
    _, _, section = (inspect.getdoc(record) or "").partition("Args:\n")
    entries = re.split(r"^    (\w+): ", section.partition("\n\n")[0], flags=re.MULTILINE)[1:]
    return {
        name: " ".join(description.replace("`", "").split())
        for name, description in zip(entries[::2], entries[1::2], strict=True)
    }


def log_folder(out: Path) -> Path:
    """Return the folder for trackers' files, next to a command's output folder.

    Args:
        out: The output folder.
    """
    return Path(f"{os.path.abspath(out)}-logs")
