"""The methods there are: the starts and objectives of this package and of installed distributions, and their names."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import re
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from regraft.errors import RecipeError
from regraft.methods.method import Method, Objective, Part, Start

Registered = Start | Objective | Method

GROUP = "regraft.methods"
NAME = re.compile(r"\w[\w-]*")  # folders are named after methods; + parts a start from an objective, a dot its options
# What each listed name stands for, in the order of the list: the paper's, those without training, those with. Whatever
# else is registered comes after them; other combinations are looked up and not listed.
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
    """List the methods that have a name of their own; any START+OBJECTIVE is a method besides.

    Returns:
        The methods by name: the paper's, those without training, those with; then those of other distributions.

    Raises:
        RecipeError: A distribution registers what is no method, or under a name that is taken.
    """
    return {name: find_method(name) for name in (*NAMES, *(name for name in _registered() if name not in ORDER))}


def parts(kind: type[Part]) -> list[str]:
    """List what methods are composed of.

    Args:
        kind: `Start` or `Objective`.

    Returns:
        The names of those that are registered.
    """
    return [name for name in _registered() if isinstance(find_registered(name), kind)]


def find_method(name: str) -> Method:
    """Look a method up.

    Args:
        name: One of `methods()`, or START+OBJECTIVE.

    Returns:
        The method.

    Raises:
        RecipeError: There is none of that name.
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
    close = difflib.get_close_matches(name, names, n=1)
    raise RecipeError(
        f"there is no method {name!r}; there are {', '.join(methods())}, and START+OBJECTIVE of the starts "
        f"{', '.join(starts)} and the objectives {', '.join(objectives)}."
        f"{f' Did you mean {close[0]}?' if close else ''}"
    )


def find_registered(name: str) -> Registered | None:
    """Look up what a module of this package or a distribution registers; only that distribution is imported.

    Args:
        name: Of a start, an objective or a method that is neither.

    Returns:
        It, or None.

    Raises:
        RecipeError: A distribution registers what is no method, or under a name that is taken.
    """
    registered = _registered().get(name)
    return _load(registered) if isinstance(registered, EntryPoint) else registered


@functools.cache
def _registered() -> dict[str, Registered | EntryPoint]:
    registered: dict[str, Registered | EntryPoint] = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"regraft.methods.{info.name}")
        registered |= {r.name: r for r in vars(module).values() if isinstance(r, Registered)}
    order = sorted(registered, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    registered = {name: registered[name] for name in order}
    taken = dict.fromkeys([*NAMES, *registered], "regraft")
    for point in entry_points(group=GROUP):
        if point.name in taken or not NAME.fullmatch(point.name):
            why = f"{taken[point.name]} has one" if point.name in taken else "names are of letters, digits, - and _"
            raise RecipeError(
                f"{_distribution(point)} registers a method called {point.name!r}, but {why}. Uninstall it, or update "
                "it to a version with another name."
            )
        taken[point.name], registered[point.name] = _distribution(point), point
    return registered


@functools.cache
def _load(point: EntryPoint) -> Registered:
    try:
        registered = point.load()
    except (Exception, SystemExit) as error:  # whatever code of others raises
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
