"""The exceptions, whose messages name the file, tensor or row, the expected value, and the remedy."""

import difflib
from collections.abc import Iterable

MAX_LISTED = 4  # arbitrary: about a line of text
"""The number of names that a message lists before it only counts them."""


class RegraftError(Exception):
    """The base class of all errors; the command line prints the message and exits with status 2."""


class CheckpointError(RegraftError):
    """A checkpoint, or a file of it, is missing, truncated, malformed, untrusted or unsupported."""


class DiskFullError(CheckpointError):
    """The disk, or a quota, has not enough space for the output."""


class MismatchError(RegraftError):
    """Bases, tensor shapes, vocabularies or labels do not belong together."""


class DataError(RegraftError):
    """A row, column or file of a task or corpus is invalid."""


class RecipeError(RegraftError):
    """An option or a configuration is invalid."""


class KindError(RecipeError):
    """A method does not support an adaptation or an upgrade, or a base does not support a kind of adaptation."""


class OutcomeError(RegraftError):
    """An output folder exists already, is in use, cannot be written, or has a malformed record."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ` Did you mean '…'?` with the most similar candidate, or an empty string if none is similar.

    Args:
        name: The name that is unknown.
        candidates: The names to choose from.
    """
    matches = difflib.get_close_matches(name, list(candidates), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""
