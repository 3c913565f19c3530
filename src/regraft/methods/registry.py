"""The registry of methods, starts and objectives, from this package and from installed distributions."""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from regraft.errors import RecipeError, did_you_mean
from regraft.methods.method import Method, Objective, Part, Start

Registered = Start | Objective | Method

ENTRY_POINT_GROUP = "regraft.methods"
NAME_PATTERN = re.compile(r"\w[\w-]*")
"""Names are also folders' names; `+` separates a start from an objective, and a dot a part from its option."""
FORMULAS = {
    "scratch": "scratch+labels",
    "direct": "direct",
    "init": "direct+labels",
    "distill": "scratch+distill",
    "init+distill": "direct+distill",
    **{name: name for name in ("project", "ridge", "scaled", "masked", "aligned", "trimmed", "orthogonal")},
    "ridge+init": "ridge+labels",
    "ridge+distill": "ridge+distill",
    "anchored": "direct+anchored",
    "interpolation": "direct+interpolation",
    "label-free": "direct+label-free",
    "auto": "auto",
}
"""The parts of each listed method: first the paper's methods, then methods without training, then methods with it.

Other registered parts are listed after them. Other combinations are methods too, but not listed.
"""
PART_ORDER = list(dict.fromkeys(name for formula in FORMULAS.values() for name in formula.split("+")))
SUMMARIES = {
    "scratch": "tune the new base from a fresh head: the reference",
    "distill": "tune from a fresh head with the old model as teacher",
}
"""Summaries in place of "start from …", for methods that start without old weights."""


@functools.cache
def methods() -> dict[str, Method]:
    """List the methods with a single name; any other START+OBJECTIVE is a method too.

    Returns:
        The methods by name, in the order of `FORMULAS`, followed by the methods of other distributions.

    Raises:
        RecipeError: A distribution registers something that is not a method, or a name that is in use.
    """
    unlisted = [name for name in _registered() if name not in PART_ORDER]
    return {name: find_method(name) for name in (*FORMULAS, *unlisted)}


def parts(part_class: type[Part]) -> list[str]:
    """List the names of the registered starts or objectives.

    Args:
        part_class: `Start` or `Objective`.

    Returns:
        The names, in the order of the list of methods.

    Raises:
        RecipeError: A distribution registers something that is not a method, or a name that is in use.
    """
    return [name for name in _registered() if isinstance(find_registered(name), part_class)]


def find_method(name: str) -> Method:
    """Look up a method.

    Args:
        name: A name in `methods()`, or START+OBJECTIVE.

    Returns:
        The method, whose `name` is the given one.

    Raises:
        RecipeError: No method has that name.
    """
    formula = FORMULAS.get(name, name)
    registered = find_registered(formula)
    if isinstance(registered, Method):
        return registered
    if isinstance(registered, Start):
        return Method(name, registered.summary, (registered,))
    if isinstance(registered, Objective):
        formula = f"direct+{formula}"
    start_name, _, objective_name = formula.partition("+")
    start, objective = find_registered(start_name), find_registered(objective_name)
    if isinstance(start, Start) and isinstance(objective, Objective):
        summary = SUMMARIES.get(name, f"start from {start.name}, {objective.summary}")
        return Method(name, summary, (start, objective))
    starts, objectives = parts(Start), parts(Objective)
    names = [*methods(), *map("+".join, itertools.product(starts, objectives))]
    raise RecipeError(
        f"there is no method {name!r}; there are {', '.join(methods())}, and START+OBJECTIVE of the starts "
        f"{', '.join(starts)} and the objectives {', '.join(objectives)}."
        f"{did_you_mean(name, names)}"
    )


def find_registered(name: str) -> Registered | None:
    """Look up a registered start, objective or method, importing only the distribution that registers it.

    Args:
        name: The registered name.

    Returns:
        The start, objective or method; None if no registered object has that name.

    Raises:
        RecipeError: A distribution registers something that is not a method, or a name that is in use.
    """
    registered = _registered().get(name)
    return _load(registered) if isinstance(registered, EntryPoint) else registered


@functools.cache
def _registered() -> dict[str, Registered | EntryPoint]:
    """List the objects that this package defines, in order, and the entry points of other distributions, by name."""
    defined: dict[str, Registered] = {}
    for module_info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"regraft.methods.{module_info.name}")
        defined |= {value.name: value for value in vars(module).values() if isinstance(value, Registered)}
    listed = [name for name in PART_ORDER if name in defined]
    unlisted = sorted(set(defined) - set(listed))
    registered: dict[str, Registered | EntryPoint] = {name: defined[name] for name in (*listed, *unlisted)}
    owners = dict.fromkeys([*FORMULAS, *registered], "regraft")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        problem = None
        if point.name in owners:
            problem = f"{owners[point.name]} has one"
        elif not NAME_PATTERN.fullmatch(point.name):
            problem = "names are of letters, digits, - and _"
        if problem:
            raise RecipeError(
                f"{_distribution(point)} registers a method called {point.name!r}, but {problem}. Uninstall it, or "
                "update it to a version with another name."
            )
        owners[point.name] = _distribution(point)
        registered[point.name] = point
    return registered


@functools.cache
def _load(point: EntryPoint) -> Registered:
    """Import the object that an entry point names, or refuse one that is not a method of that name."""
    try:
        registered = point.load()
    except (Exception, SystemExit) as error:  # another distribution's code may raise anything
        raise RecipeError(
            f"{_distribution(point)}: its method {point.name!r} ({point.value}) cannot be imported "
            f"({type(error).__name__}: {error}). Update it or uninstall it."
        ) from error
    if not isinstance(registered, Registered) or registered.name != point.name:
        raise RecipeError(
            f"{_distribution(point)}: its entry point {point.name!r} of {ENTRY_POINT_GROUP} must name a Start, an "
            f"Objective or a Method called {point.name!r}, found {registered!r} ({point.value}). Update it or "
            "uninstall it."
        )
    return registered


def _distribution(point: EntryPoint) -> str:
    """Describe the distribution that defines an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a distribution"
