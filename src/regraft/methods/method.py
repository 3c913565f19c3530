"""Methods: a start, and for methods that train an objective; each part declares what it needs and accepts."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
from typing import TYPE_CHECKING, Any

from regraft.adaptation import HEAD_POLICIES
from regraft.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from regraft.methods.job import Job

    Curve = list[dict[str, float]]
    Needs = tuple[str, ...]
    Heads = tuple[str, ...]

NEEDS = ("labels", "text", "tasks", "training")
OPTION_TYPE = re.compile(r"((bool|int|float|str)|tuple\[(int|float|str)(, \.\.\.)?\])( \| None)?")
OLD_HEAD_ONLY: Heads = ("copy",)  # of parts that use the outputs of the old head


@dataclasses.dataclass(frozen=True)
class Part:
    """A function with options that a method consists of, and what it needs and accepts.

    Args:
        name: The part's name, which also qualifies its options.
        run: The function.
        options: The dataclass of its options, if it has any.
        summary: One line on what it does; an objective's continues "start from …".
        needs: What it needs of `labels`, `text` (of the task, unlabelled), `tasks` (other tasks, tuned on both bases)
            and `training`, or a function of its options that returns that.
        heads: The policies for the old head that it accepts, or a function of its options that returns them.
        contents: A function of the options and the seed that identifies the content of files named in the options, as
            JSON by name, for the provenance of an outcome.
        scores_agreement: Whether the scores of its learning curve are agreement with the old model rather than the
            task's metric, or a function of its options that returns that.

    Raises:
        RecipeError: The options are not a dataclass with defaults, or one is of a type without notation in text.
    """

    name: str
    run: Callable[..., Any]
    options: Any = None
    summary: str = ""
    needs: Needs | Callable[[Any], Needs] = ()
    heads: Heads | Callable[[Any], Heads] = HEAD_POLICIES
    contents: Callable[[Any, int], dict[str, Any]] | None = None
    scores_agreement: bool | Callable[[Any], bool] = False

    def __post_init__(self) -> None:
        """Check that the options can be read from a command line."""
        if self.options is None:
            return
        if not (isinstance(self.options, type) and dataclasses.is_dataclass(self.options)):
            raise RecipeError(f"{self.name}: its options must be a dataclass, found {self.options!r}.")
        for field in dataclasses.fields(self.options):
            if not OPTION_TYPE.fullmatch(declared_type(field)):
                raise RecipeError(
                    f"{self.name}: its option {field.name} is of type {declared_type(field)}. Declare it as bool, int, "
                    "float or str, as tuple[…, ...] of these, or with | None."
                )
            if dataclasses.MISSING is field.default and dataclasses.MISSING is field.default_factory:
                raise RecipeError(f"{self.name}: its option {field.name} needs a default.")


class Start(Part):
    """A way to carry old weights to the new base; by itself a method without training.

    `run(job, options)` returns the model, or writes the adaptation to `job.into` and returns None.
    """


class Objective(Part):
    """A way to tune a model: `run(job, model, options)` writes to `job.into` and returns the learning curve."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to get an adaptation for the new base.

    The methods of this class accept the options of one part, those of several parts in a tuple, or None; parts without
    options use their defaults.

    Args:
        name: The name on the command line and in outcomes.
        summary: One line on what the method does.
        parts: A start; a start and an objective; or a part that is neither, whose `run(job, options)` writes to
            `job.into` and returns the learning curve.
    """

    name: str
    summary: str
    parts: tuple[Part, ...]

    def complete(self, options: Any = None) -> tuple[Any, ...]:
        """Complete the options with defaults.

        Args:
            options: Those of one part, of several in a tuple, or None.

        Returns:
            One dataclass per part; None for a part without options.

        Raises:
            RecipeError: The method has no such options, or some are passed twice.
        """
        passed = list(options) if isinstance(options, tuple) else [options]
        passed = [option_set for option_set in passed if option_set is not None]
        complete = []
        for part in self.parts:
            part_options = next((o for o in passed if part.options and type(o) is part.options), None)
            if part_options is not None:
                passed.remove(part_options)
            elif part.options:
                part_options = part.options()
            complete.append(part_options)
        if passed:
            kinds = [part.options.__name__ for part in self.parts if part.options]
            raise RecipeError(f"method {self.name} takes {' and '.join(kinds) or 'no options'}, found {passed[0]!r}.")
        return tuple(complete)

    def needs(self, options: Any = None) -> Needs:
        """Return what the method needs.

        Args:
            options: As in `complete`.

        Returns:
            Some of `NEEDS`, in that order; `text` is left out beside `labels`, as a labelled task has texts.
        """
        needs: set[str] = set()
        for part, part_options in self._with_options(options):
            needs.update(_resolve(part.needs, part_options))
        return tuple(need for need in NEEDS if need in needs and not (need == "text" and "labels" in needs))

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
            True for agreement, which rises as the model improves; False for the task's metric.
        """
        return any(_resolve(part.scores_agreement, part_options) for part, part_options in self._with_options(options))

    def contents(self, options: Any, seed: int) -> dict[str, Any]:
        """Identify the content of the files that are named in the options.

        Args:
            options: As in `complete`.
            seed: The seed of few-shot draws.

        Returns:
            JSON by name, for the provenance of an outcome.
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
            None without options. If both start and objective have options: those of the objective, and as `START.NAME`
            those of the start that differ from their defaults, since outcomes of `ridge+distill` never recorded the
            others.
        """
        chosen = [(part, part_options) for part, part_options in self._with_options(options) if part_options]
        if not chosen:
            return None
        recorded = dataclasses.asdict(chosen[-1][1])
        for part, part_options in chosen[:-1]:
            defaults = dataclasses.asdict(part.options())
            changed = {n: value for n, value in dataclasses.asdict(part_options).items() if value != defaults[n]}
            recorded |= {f"{part.name}.{name}": value for name, value in changed.items()}
        return recorded

    def run(self, job: Job, options: Any = None) -> Curve:
        """Write an adaptation for the new base to a job's folder.

        Args:
            job: The job.
            options: As in `complete`.

        Returns:
            The learning curve; empty without training.
        """
        (start, start_options), *objectives = self._with_options(options)
        if not isinstance(start, Start):
            curve: Curve = start.run(job, start_options)
            return curve
        if not objectives:
            model = start.run(job, start_options)
            if model is not None:
                job.save(model.cpu())
            return []
        into = job.work / "start"
        shutil.rmtree(into, ignore_errors=True)  # the rest of an interrupted run
        start_job = dataclasses.replace(job, into=into)
        model = start.run(start_job, start_options)
        if model is None:
            model = start_job.load()
        job.notes.pop("labels", None)  # they are counted together with those of the training steps
        ((objective, objective_options),) = objectives
        curve = objective.run(job, model, objective_options)
        return curve

    def _with_options(self, options: Any) -> list[tuple[Part, Any]]:
        return list(zip(self.parts, self.complete(options), strict=True))


def declared_type(field: dataclasses.Field[Any]) -> str:
    """Return the declared type of an option, as source text.

    Args:
        field: The option's field of its dataclass.
    """
    return field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)


def _resolve(declaration: Any, options: Any) -> Any:
    return declaration(options) if callable(declaration) else declaration
