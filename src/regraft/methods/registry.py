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

Registrable = Start | Objective | Method

ENTRY_POINT_GROUP = "regraft.methods"
"""The group of entry points by which other distributions register starts, objectives and methods."""
NAME_PATTERN = re.compile(r"\w[\w-]*")
"""The names that other distributions may register: + and dots separate names in START+OBJECTIVE and PART.OPTION, and
outcome folders are named after methods."""
PARTS_BY_METHOD = {
    "scratch": "scratch+labels",
    "direct": "direct",
    "init": "direct+labels",
    "distill": "scratch+distill",
    "init+distill": "direct+distill",
    **{name: name for name in ("project", "ridge", "scaled", "masked", "aligned", "trimmed", "orthogonal", "ariadne")},
    "ridge+init": "ridge+labels",
    "ridge+distill": "ridge+distill",
    "anchored": "direct+anchored",
    "interpolation": "direct+interpolation",
    "label-free": "direct+label-free",
    "on-policy": "direct+on-policy",
    "auto": "auto",
}
"""The parts of each listed method: first the methods of Qin et al., 2023 (arXiv:2305.08702), and `scratch`, which they
are compared with; then methods without training, of which `ariadne` is for comparison; then methods with it.

What other distributions register is listed after them.
"""
PART_ORDER = list(dict.fromkeys(name for formula in PARTS_BY_METHOD.values() for name in formula.split("+")))
"""The starts, the objectives and `auto`, in the order in which they are listed."""
SUMMARY_BY_METHOD = {
    "scratch": "tune the new base from a fresh head: the reference",
    "distill": "tune from a fresh head with the old model as teacher",
}
"""The summaries of methods that start without old weights, in place of "start from …"."""


@functools.cache
def methods() -> dict[str, Method]:
    """Return the listed methods. Any other START+OBJECTIVE of registered parts is a method too, but is not listed.

    Returns:
        The methods by name, in the order of `PARTS_BY_METHOD`, followed by those of other distributions.

    Raises:
        RecipeError: A distribution's entry point is malformed, cannot be imported, or has a name that is taken.
    """
    unlisted = [name for name in _registry() if name not in PART_ORDER]
    return {name: find_method(name) for name in (*PARTS_BY_METHOD, *unlisted)}


def parts(part_class: type[Part]) -> list[str]:
    """List the names of the registered starts or objectives.

    Args:
        part_class: `Start` or `Objective`.

    Returns:
        The names, in the order of `PART_ORDER`, followed by those of other distributions.

    Raises:
        RecipeError: A distribution's entry point is malformed, cannot be imported, or has a name that is taken.
    """
    return [name for name in _registry() if isinstance(find_part_or_method(name), part_class)]


def find_method(name: str) -> Method:
    """Look up a method.

    Args:
        name: A name in `methods()`; START+OBJECTIVE; or the name of an objective, which then follows `direct`.

    Returns:
        The method, whose `name` is the given one.

    Raises:
        RecipeError: No method has that name, or a distribution's entry point is malformed, cannot be imported, or has a
            name that is taken.
    """
    formula = PARTS_BY_METHOD.get(name, name)
    part_or_method = find_part_or_method(formula)
    if isinstance(part_or_method, Method):
        return part_or_method
    if isinstance(part_or_method, Start):
        return Method(name, part_or_method.summary, (part_or_method,))
    if isinstance(part_or_method, Objective):
        formula = f"direct+{formula}"
    start_name, _, objective_name = formula.partition("+")
    start, objective = find_part_or_method(start_name), find_part_or_method(objective_name)
    if isinstance(start, Start) and isinstance(objective, Objective):
        summary = SUMMARY_BY_METHOD.get(name, f"start from {start.name}, {objective.summary}")
        return Method(name, summary, (start, objective))
    starts, objectives = parts(Start), parts(Objective)
    names = [*methods(), *map("+".join, itertools.product(starts, objectives))]
    raise RecipeError(
        f"there is no method {name!r}; there are {', '.join(methods())}, and START+OBJECTIVE of the starts "
        f"{', '.join(starts)} and the objectives {', '.join(objectives)}."
        f"{did_you_mean(name, names)}"
    )


def find_part_or_method(name: str) -> Registrable | None:
    """Look up a registered start, objective or method, importing only the distribution that registers it.

    Args:
        name: The registered name.

    Returns:
        The start, objective or method; None if nothing is registered under that name.

    Raises:
        RecipeError: A distribution's entry point is malformed, cannot be imported, or has a name that is taken.
    """
    entry = _registry().get(name)
    return _load(entry) if isinstance(entry, EntryPoint) else entry


@functools.cache
def _registry() -> dict[str, Registrable | EntryPoint]:
    """Return what this package defines, in order, then the entry points of other distributions, all by name."""
    defined: dict[str, Registrable] = {}
    for module_info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"regraft.methods.{module_info.name}")
        defined |= {value.name: value for value in vars(module).values() if isinstance(value, Registrable)}
    listed = [name for name in PART_ORDER if name in defined]
    unlisted = sorted(set(defined) - set(listed))
    registry: dict[str, Registrable | EntryPoint] = {name: defined[name] for name in (*listed, *unlisted)}
    owners = dict.fromkeys([*PARTS_BY_METHOD, *registry], "regraft")
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
        registry[point.name] = point
    return registry


@functools.cache
def _load(point: EntryPoint) -> Registrable:
    """Import the start, objective or method of an entry point, or refuse an object of another type or name."""
    try:
        loaded = point.load()
    except (Exception, SystemExit) as error:  # another distribution's code may raise anything
        raise RecipeError(
            f"{_distribution(point)}: its method {point.name!r} ({point.value}) cannot be imported "
            f"({type(error).__name__}: {error}). Update it or uninstall it."
        ) from error
    if not isinstance(loaded, Registrable) or loaded.name != point.name:
        raise RecipeError(
            f"{_distribution(point)}: its entry point {point.name!r} of {ENTRY_POINT_GROUP} must name a Start, an "
            f"Objective or a Method called {point.name!r}, found {loaded!r} ({point.value}). Update it or "
            "uninstall it."
        )
    return loaded


def _distribution(point: EntryPoint) -> str:
    """Return the name and version of the distribution that defines an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a distribution"
