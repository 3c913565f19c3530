"""What can go wrong, as one tree: each message names the file, tensor or row, what was expected, and the remedy."""


class RegraftError(Exception):
    """Anything regraft refuses to do; the command line prints the message and exits with status 2."""


class CheckpointError(RegraftError):
    """A file of weights that is missing, truncated, malformed or not to be trusted."""


class DiskFullError(CheckpointError):
    """A disk, or a quota of it, without room for what is to be written."""


class MismatchError(RegraftError):
    """Two things that do not belong together: bases, tensor shapes, vocabularies or label maps."""


class DataError(RegraftError):
    """A row, column or file of task or corpus data that cannot be used."""


class RecipeError(RegraftError):
    """An option or a configuration that cannot be carried out."""


class KindError(RecipeError):
    """A kind of adaptation, a form of it, or an upgrade, that a method declares it does not carry."""


class OutcomeError(RegraftError):
    """An output folder that is taken, in use or not what it claims to be."""
