"""Methods and their parts: starts, objectives, and the declarations of what each part needs and accepts."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
from typing import TYPE_CHECKING, Any

from regraft.adaptation import HEAD_POLICIES
from regraft.errors import RecipeError
from regraft.recipe import ADDED

if TYPE_CHECKING:
    from collections.abc import Callable

    from regraft.methods.job import Job
    from regraft.task import Task

    Curve = list[dict[str, float]]
    Needs = tuple[str, ...]
    Heads = tuple[str, ...]

NEEDS = ("labels", "text", "tasks", "training")
"""The needs that a part may declare, in the order in which they are listed."""
OPTION_TYPE = re.compile(r"((bool|int|float|str)|tuple\[(int|float|str)(, \.\.\.)?\])( \| None)?")
"""The types of options that can be parsed from a command line, as they are written in source."""
OLD_HEAD_ONLY: Heads = ("copy",)
"""The policies for the head that a part accepts if it compares with outputs of the old head."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A step of a method: a function with options, and the declarations of what it needs and accepts.

    Args:
        name: The part's name, which also qualifies its options.
        run: The function; its arguments and results are described in `Start`, `Objective` and `Method`.
        options: The dataclass of the part's options; None if it has none.
        summary: One line on what the part does; the summary of an objective continues "start from …, ".
        needs: Some of `labels`, `text` (texts of the task, labelled or not), `tasks` (other tasks, tuned on both bases
            or on the old one) and `training`; or a function of the options that returns them.
        heads: The policies for the old head that the part accepts, or a function of the options that returns them.
        contents: A function of the options and the seed that returns, by key, JSON values that identify the files named
            in the options, such as digests; for the provenance of an outcome.
        generation_only: Whether the part is for tasks of text generation only, as one that lets a model write answers.
        kind: The kind of the adaptation that the part makes, as in `Adaptation.kind`; None for that of the old one.
        scores_agreement: Whether the scores of the learning curve are agreement with the old model rather than the
            task's metric, or a function of the options that returns whether they are.

    Raises:
        RecipeError: The options are not a dataclass with defaults, or an option is not of a type in `OPTION_TYPE`.
    """

    name: str
    run: Callable[..., Any]
    options: Any = None
    summary: str = ""
    needs: Needs | Callable[[Any], Needs] = ()
    heads: Heads | Callable[[Any], Heads] = HEAD_POLICIES
    contents: Callable[[Any, int], dict[str, Any]] | None = None
    scores_agreement: bool | Callable[[Any], bool] = False
    generation_only: bool = False
    kind: str | None = None

    def __post_init__(self) -> None:
        """Refuse options that cannot be parsed from a command line."""
        if self.options is None:
            return
        if not (isinstance(self.options, type) and dataclasses.is_dataclass(self.options)):
            raise RecipeError(f"{self.name}: its options must be a dataclass, found {self.options!r}.")
        for field in dataclasses.fields(self.options):
            if not OPTION_TYPE.fullmatch(declared_type(field)):
                raise RecipeError(
                    f"{self.name}: its option {field.name} is of type {declared_type(field)}. Declare it as bool, int, "
                    "float or str, as tuple[…, ...] of int, float or str, or as one of these with | None."
                )
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise RecipeError(f"{self.name}: its option {field.name} needs a default.")


class Start(Part):
    """A way to get a model on the new base, usually from the old weights; by itself a method without training.

    `run(job, options)` returns the model, or writes the adaptation to `job.output_folder` and returns None.
    """


class Objective(Part):
    """A way to tune the model that a start returns.

    `run(job, model, options)` writes the adaptation to `job.output_folder` and returns the learning curve.
    """


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to get an adaptation for the new base.

    Wherever options are an argument, they are the options of one part, a tuple with the options of several parts, or
    None; parts whose options are not passed use their defaults.

    Args:
        name: The name on the command line and in outcomes.
        summary: One line on what the method does.
        parts: A start; a start and an objective; or a part that is neither, whose `run(job, options)` writes the
            adaptation to `job.output_folder` and returns the learning curve.
    """

    name: str
    summary: str
    parts: tuple[Part, ...]

    @property
    def generation_only(self) -> bool:
        """Whether the method is for tasks of text generation only."""
        return any(part.generation_only for part in self.parts)

    def kind(self, old_kind: str) -> str:
        """Return the kind of the adaptations that the method makes.

        Args:
            old_kind: The kind of the old adaptation.

        Returns:
            The kind, as in `Adaptation.kind`.
        """
        return next((part.kind for part in self.parts if part.kind is not None), old_kind)

    def complete(self, options: Any = None) -> tuple[Any, ...]:
        """Complete the options with defaults.

        Args:
            options: The options of one part, a tuple of several parts' options, or None.

        Returns:
            One dataclass per part; None for a part without options.

        Raises:
            RecipeError: The method has no such options, or the options of one part are passed twice.
        """
        option_sets = options if isinstance(options, tuple) else (options,)
        unused = [option_set for option_set in option_sets if option_set is not None]
        completed: list[Any] = []
        for part in self.parts:
            if part.options is None:
                completed.append(None)
                continue
            matches = [option_set for option_set in unused if type(option_set) is part.options]
            if matches:
                unused.remove(matches[0])
            completed.append(matches[0] if matches else part.options())
        if unused:
            class_names = [part.options.__name__ for part in self.parts if part.options]
            expected = " and ".join(class_names) or "no options"
            raise RecipeError(f"method {self.name} takes {expected}; leave out {unused[0]!r}.")
        return tuple(completed)

    def for_task(self, options: Any, task: Task) -> tuple[Any, ...]:
        """Complete the options with defaults, some of which depend on the type of a task.

        Args:
            options: As in `complete`.
            task: The task.

        Returns:
            As `complete`.

        Raises:
            RecipeError: The method is not for tasks of that type, or as `complete`.
        """
        completed = self.complete(options)
        if self.generation_only and not task.head_in_base:
            raise RecipeError(f"method {self.name} is for text generation, not for a {task.type}. Use another method.")
        return tuple(part.for_task(task) if hasattr(part, "for_task") else part for part in completed)

    def needs(self, options: Any = None) -> Needs:
        """Return the needs of all parts.

        Args:
            options: As in `complete`.

        Returns:
            Some of `NEEDS`, in that order; without `text` if `labels` are needed, since a labelled task has texts.
        """
        needs: set[str] = set()
        for part, part_options in self._with_options(options):
            needs.update(_resolve(part.needs, part_options))
        if "labels" in needs:
            needs.discard("text")
        return tuple(need for need in NEEDS if need in needs)

    def heads(self, options: Any = None) -> Heads:
        """Return the policies for the old head that the method accepts.

        Args:
            options: As in `complete`.

        Returns:
            Some of `HEAD_POLICIES`.
        """
        accepted = [_resolve(part.heads, part_options) for part, part_options in self._with_options(options)]
        return tuple(head for head in HEAD_POLICIES if all(head in policies for policies in accepted))

    def scores_agreement(self, options: Any = None) -> bool:
        """Return whether the scores of the learning curve are agreement with the old model.

        Args:
            options: As in `complete`.

        Returns:
            True for agreement, of which higher is always better; False for the task's metric.
        """
        return any(_resolve(part.scores_agreement, part_options) for part, part_options in self._with_options(options))

    def contents(self, options: Any, seed: int) -> dict[str, Any]:
        """Return values that identify the content of the files named in the options.

        Args:
            options: As in `complete`.
            seed: The seed of few-shot draws.

        Returns:
            JSON values by key, for the provenance of an outcome.
        """
        contents: dict[str, Any] = {}
        for part, part_options in self._with_options(options):
            contents |= part.contents(part_options, seed) if part.contents else {}
        return contents

    def record(self, options: Any = None) -> dict[str, Any] | None:
        """Return the options as outcomes record them.

        Args:
            options: As in `complete`.

        Returns:
            The options of the last part that has any, by name; if it is an objective and the start has options too,
            those of the start that differ from their defaults, as `START.NAME`. None if no part has options.
        """
        chosen = [(part, part_options) for part, part_options in self._with_options(options) if part_options]
        if not chosen:
            return None
        # Earlier versions did not record the start's options in outcomes of `ridge+distill`, and with the start's
        # defaults, these must still count as outcomes of the same inputs.
        *starts, (_, last_options) = chosen
        recorded = {
            field.name: getattr(last_options, field.name)
            for field in dataclasses.fields(last_options)
            if ADDED not in field.metadata or getattr(last_options, field.name) != field.default
        }
        for start, start_options in starts:
            defaults = dataclasses.asdict(start.options())
            for name, value in dataclasses.asdict(start_options).items():
                if value != defaults[name]:
                    recorded[f"{start.name}.{name}"] = value
        return recorded

    def run(self, job: Job, options: Any = None) -> Curve:
        """Write an adaptation for the new base to a job's output folder.

        Args:
            job: The adaptation to carry over, and the folders.
            options: As in `complete`.

        Returns:
            The learning curve; empty without training.
        """
        (first_part, first_options), *objectives = self._with_options(options)
        if not isinstance(first_part, Start):
            curve: Curve = first_part.run(job, first_options)
            return curve
        if not objectives:
            model = first_part.run(job, first_options)
            if model is not None:
                job.save(model.cpu())
            return []
        start_folder = job.work_folder / "start"
        shutil.rmtree(start_folder, ignore_errors=True)  # an interrupted run may have left files
        start_job = dataclasses.replace(job, output_folder=start_folder)
        model = first_part.run(start_job, first_options)
        if model is None:
            model = start_job.load()
        job.notes.pop("labels", None)  # the start's labels are counted together with the labels of training steps
        ((objective, objective_options),) = objectives
        curve = objective.run(job, model, objective_options)
        return curve

    def _with_options(self, options: Any) -> list[tuple[Part, Any]]:
        """Pair each part with its options."""
        return list(zip(self.parts, self.complete(options), strict=True))


def declared_type(field: dataclasses.Field[Any]) -> str:
    """Return the declared type of an option, as it is written in source.

    Args:
        field: The option's field in the part's dataclass.
    """
    return field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)


def _resolve(declaration: Any, options: Any) -> Any:
    """Return a declaration, or its value for these options if it is a function of them."""
    return declaration(options) if callable(declaration) else declaration
