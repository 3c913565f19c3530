"""What a method is: a start, and where it trains an objective; each declares what it takes and needs."""

from __future__ import annotations

import dataclasses
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
OLD_HEAD_ONLY: Heads = ("copy",)  # for what goes by the outputs of the old head


@dataclasses.dataclass(frozen=True)
class Part:
    """What a method consists of: a function with options, and what it takes and needs.

    Args:
        name: Its name, which also qualifies its options.
        run: What it does.
        options: The dataclass of its options, if it has any.
        summary: One line on what it does; an objective's continues "start from …".
        needs: Of `labels`, `text` (of the task, unlabelled), `tasks` (others, tuned on both bases) and `training`, what
            it needs, or a function of its options that returns that.
        heads: The policies for the old head that it takes, or a function of its options that returns them.
        contents: Identifies the content of files that the options name, from the options and the seed, as JSON by
            name: part of what an outcome is made from.
    """

    name: str
    run: Callable[..., Any]
    options: Any = None
    summary: str = ""
    needs: Needs | Callable[[Any], Needs] = ()
    heads: Heads | Callable[[Any], Heads] = HEAD_POLICIES
    contents: Callable[[Any, int], dict[str, Any]] | None = None


class Start(Part):
    """A way to put old weights onto the new base; by itself it is a method without training.

    `run(job, options)` returns the model, or fills `job.into` and returns None.
    """


class Objective(Part):
    """A way to tune a model: `run(job, model, options)` fills `job.into` and returns the learning curve."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to get an adaptation for the new base.

    Its functions take the options of its parts: those of one part, several in a tuple, or None; what is left out has
    its defaults.

    Args:
        name: Its name on the command line and in outcomes.
        summary: One line on what it does.
        parts: A start; or a start and an objective; or a part that is neither, whose `run(job, options)` fills
            `job.into` and returns the learning curve.
    """

    name: str
    summary: str
    parts: tuple[Part, ...]

    def complete(self, options: Any = None) -> tuple[Any, ...]:
        """Return the options of each part.

        Args:
            options: Of one part, of several in a tuple, or None.

        Returns:
            A dataclass a part, with defaults where none was passed; None for a part without options.

        Raises:
            RecipeError: The method has no such options, or some are passed twice.
        """
        passed = list(options) if isinstance(options, tuple) else [options]
        passed = [each for each in passed if each is not None]
        complete = []
        for part in self.parts:
            own = next((each for each in passed if part.options and type(each) is part.options), None)
            if own is not None:
                passed.remove(own)
            complete.append(part.options() if own is None and part.options else own)
        if passed:
            kinds = [part.options.__name__ for part in self.parts if part.options]
            raise RecipeError(f"method {self.name} takes {' and '.join(kinds) or 'no options'}, found {passed[0]!r}.")
        return tuple(complete)

    def needs(self, options: Any = None) -> Needs:
        """Return what the method needs.

        Args:
            options: As in `complete`.

        Returns:
            Some of `NEEDS`, in that order; a labelled task has texts, so that `text` is never beside `labels`.
        """
        needed: set[str] = set()
        for part, own in self._with(options):
            needed.update(part.needs(own) if callable(part.needs) else part.needs)
        return tuple(need for need in NEEDS if need in needed and not (need == "text" and "labels" in needed))

    def heads(self, options: Any = None) -> Heads:
        """Return the policies for the old head that the method takes.

        Args:
            options: As in `complete`.

        Returns:
            Some of `HEAD_POLICIES`.
        """
        heads = [part.heads(own) if callable(part.heads) else part.heads for part, own in self._with(options)]
        return tuple(head for head in HEAD_POLICIES if all(head in each for each in heads))

    def contents(self, options: Any, seed: int) -> dict[str, Any]:
        """Identify the content of the files that the options name.

        Args:
            options: As in `complete`.
            seed: What few-shot draws follow from.

        Returns:
            JSON by name: part of what an outcome is made from.
        """
        named: dict[str, Any] = {}
        for part, own in self._with(options):
            named |= part.contents(own, seed) if part.contents else {}
        return named

    def record(self, options: Any = None) -> dict[str, Any] | None:
        """Return the options as outcomes record them.

        Args:
            options: As in `complete`.

        Returns:
            None without options. Where start and objective both have some, those of the objective, and as `START.NAME`
            those of the start that are not at their defaults: outcomes of `ridge+distill` never recorded the others.
        """
        chosen = [(part, own) for part, own in self._with(options) if own is not None]
        if not chosen:
            return None
        recorded = dataclasses.asdict(chosen[-1][1])
        for part, own in chosen[:-1]:
            defaults = dataclasses.asdict(part.options())
            changed = {name: value for name, value in dataclasses.asdict(own).items() if value != defaults[name]}
            recorded |= {f"{part.name}.{name}": value for name, value in changed.items()}
        return recorded

    def run(self, job: Job, options: Any = None) -> Curve:
        """Fill a job's folder with an adaptation.

        Args:
            job: What and where.
            options: As in `complete`.

        Returns:
            The learning curve; empty without training.
        """
        (start, own), *rest = self._with(options)
        if not isinstance(start, Start):
            whole: Curve = start.run(job, own)
            return whole
        if not rest:
            model = start.run(job, own)
            if model is not None:
                job.save(model.cpu())
            return []
        into = job.work / "start"
        shutil.rmtree(into, ignore_errors=True)  # what an interrupted run left
        begun = dataclasses.replace(job, into=into)
        model = start.run(begun, own)
        if model is None:
            model = begun.load()
        job.notes.pop("labels", None)  # they are counted together with those of the steps
        ((objective, own),) = rest
        curve: Curve = objective.run(job, model, own)
        return curve

    def _with(self, options: Any) -> list[tuple[Part, Any]]:
        return list(zip(self.parts, self.complete(options), strict=True))
