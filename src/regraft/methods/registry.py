"""The registry of methods: starts and objectives of this package and of installed distributions, and their names."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from regraft.errors import RecipeError, did_you_mean
from regraft.methods.method import Method, Objective, Part, Start

Registered = Start | Objective | Method

GROUP = "regraft.methods"
NAME = re.compile(r"\w[\w-]*")  # folders are named after methods; + parts a start from an objective, a dot its options
# The parts of each listed method, in the order of the list: methods of the paper, those without training, those with.
# Whatever else is registered follows them; other combinations are methods too, but not listed.
NAMES = {
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
ORDER = list(dict.fromkeys(name for formula in NAMES.values() for name in formula.split("+")))
SUMMARIES = {
    "scratch": "tune the new base from a fresh head: the reference",
    "distill": "tune from a fresh head with the old model as teacher",
}


@functools.cache
def methods() -> dict[str, Method]:
    """List the methods with names of their own; any other START+OBJECTIVE is a method too.

    Returns:
        The methods by name: those of the paper, those without training, those with, and those of other distributions.

    Raises:
        RecipeError: A distribution registers something that is no method, or a name that is in use.
    """
    return {name: find_method(name) for name in (*NAMES, *(name for name in _registered() if name not in ORDER))}


def parts(kind: type[Part]) -> list[str]:
    """List the registered starts or objectives.

    Args:
        kind: `Start` or `Objective`.

    Returns:
        Their names.
    """
    return [name for name in _registered() if isinstance(find_registered(name), kind)]


def find_method(name: str) -> Method:
    """Look up a method.

    Args:
        name: One of `methods()`, or START+OBJECTIVE.

    Returns:
        The method.

    Raises:
        RecipeError: No method has that name.
    """
    formula = NAMES.get(name, name)
    registered = find_registered(formula)
    if isinstance(registered, Method):
        return registered
    if isinstance(registered, Start):
        return Method(name, registered.summary, (registered,))
    first, _, second = formula.partition("+") if registered is None else ("direct", "+", formula)
    start, objective = find_registered(first), find_registered(second)
    if isinstance(start, Start) and isinstance(objective, Objective):
        summary = SUMMARIES.get(name, f"start from {start.name}, {objective.summary}")
        return Method(name, summary, (start, objective))
    starts, objectives = parts(Start), parts(Objective)
    names = [*methods(), *(f"{start}+{objective}" for start in starts for objective in objectives)]
    raise RecipeError(
        f"there is no method {name!r}; there are {', '.join(methods())}, and START+OBJECTIVE of the starts "
        f"{', '.join(starts)} and the objectives {', '.join(objectives)}."
        f"{did_you_mean(name, names)}"
    )


def find_registered(name: str) -> Registered | None:
    """Look up a start, an objective or a method that is neither; only the distribution that registers it is imported.

    Args:
        name: The registered name.

    Returns:
        The start, objective or method; None if nothing has that name.

    Raises:
        RecipeError: A distribution registers something that is no method, or a name that is in use.
    """
    registered = _registered().get(name)
    return _load(registered) if isinstance(registered, EntryPoint) else registered


@functools.cache
def _registered() -> dict[str, Registered | EntryPoint]:
    registered: dict[str, Registered | EntryPoint] = {}
    for module_info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"regraft.methods.{module_info.name}")
        registered |= {r.name: r for r in vars(module).values() if isinstance(r, Registered)}
    order = sorted(registered, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    registered = {name: registered[name] for name in order}
    owners = dict.fromkeys([*NAMES, *registered], "regraft")
    for point in entry_points(group=GROUP):
        if point.name in owners or not NAME.fullmatch(point.name):
            problem = (
                f"{owners[point.name]} has one" if point.name in owners else "names are of letters, digits, - and _"
            )
            raise RecipeError(
                f"{_distribution(point)} registers a method called {point.name!r}, but {problem}. Uninstall it, or "
                "update it to a version with another name."
            )
        owners[point.name], registered[point.name] = _distribution(point), point
    return registered


@functools.cache
def _load(point: EntryPoint) -> Registered:
    try:
        registered = point.load()
    except (Exception, SystemExit) as error:  # code of others may raise anything
        raise RecipeError(
            f"{_distribution(point)}: its method {point.name!r} ({point.value}) cannot be imported "
            f"({type(error).__name__}: {error}). Update it or uninstall it."
        ) from error
    if not isinstance(registered, Registered) or registered.name != point.name:
        raise RecipeError(
            f"{_distribution(point)}: its entry point {point.name!r} of {GROUP} must name a Start, an Objective or a "
            f"Method called {point.name!r}, found {registered!r} ({point.value}). Update it or uninstall it."
        )
    return registered


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a distribution"
