"""Functions of users' own that score answers, named as `module:function` in a task file."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable


@functools.cache
def load_function(name: str) -> Callable[[str, str], Any]:
    """Import a user's function, with the working folder searched first.

    Args:
        name: `MODULE:FUNCTION`.

    Returns:
        The function of a reference answer and a generated answer.

    Raises:
        DataError: The module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise DataError(
            f"metric {name!r}: {module_name!r} cannot be imported ({type(error).__name__}: {error}). Run regraft in "
            f"the folder of {module_name}.py (searched: {folder}), or install the module."
        ) from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(
            f"metric {name!r}: {getattr(module, '__file__', module_name)} has no function {function_name!r}. Define it "
            "with the arguments reference and answer, or correct the name."
        )
    return function  # type: ignore[no-any-return]


def call_function(name: str, reference: str, answer: str) -> float:
    """Score an answer by a user's function.

    Args:
        name: `MODULE:FUNCTION`.
        reference: The reference answer.
        answer: The generated answer.

    Returns:
        The function's score, 0–1.

    Raises:
        DataError: The function cannot be loaded, fails, or returns neither a truth value nor a number in 0–1.
    """
    function = load_function(name)
    try:
        score = function(reference, answer)
        value = float(score)
    except Exception as error:  # whatever the user's code raises
        raise DataError(
            f"metric {name!r} fails for the answer {answer!r:.80} ({type(error).__name__}: {error}). Correct the "
            "function: it must return a number from 0 to 1, or True or False, for any text."
        ) from error
    if not 0 <= value <= 1:
        raise DataError(
            f"metric {name!r} returned {score!r:.80} for the answer {answer!r:.80}. It must return a number from 0 to "
            "1, or True or False."
        )
    return value
