"""The exceptions. Each message names the file, tensor or row, what was expected, and the remedy."""

import difflib
from collections.abc import Iterable


class RegraftError(Exception):
    """The base class of all errors; the command line prints the message, and exits with status 2."""


class CheckpointError(RegraftError):
    """A file of weights is missing, truncated, malformed or untrusted."""


class DiskFullError(CheckpointError):
    """The disk, or a quota, has not enough space for the output."""


class MismatchError(RegraftError):
    """Inputs do not belong together: bases, tensor shapes, vocabularies or labels."""


class DataError(RegraftError):
    """A row, column or file of a task or corpus cannot be used."""


class RecipeError(RegraftError):
    """An option or a configuration is invalid."""


class KindError(RecipeError):
    """A method does not support a kind of adaptation, or an upgrade."""


class OutcomeError(RegraftError):
    """An output folder exists already, is in use, or is not what it claims to be."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ` Did you mean '…'?` with the most similar candidate, or an empty string if none is similar.

    Args:
        name: The unknown name.
        candidates: The known names.
    """
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
