"""What users write in YAML: read as it is written, and checked key by key."""

from __future__ import annotations

import difflib
import reprlib
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from regraft.errors import DataError
from regraft.task.file import check_regular_file, is_unicode, read_bytes

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 500_000
"""Of a file: more than 10,000 label names take; PyYAML needs up to 6 s for so much."""
MAX_VALUES = 100_000
"""Of a file whose aliases are written out: a few lines of aliases to aliases stand for billions of values."""
MAX_PROBLEMS = 20
"""So many lines a message has; a list may be wrong in every item."""
_PLAIN_TAGS = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}
_KEPT_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 100, 100  # values of a message, however deep and long they are


class _Loader(yaml.SafeLoader):
    """Leaves scalars as text, so that labels such as `no`, `01` and `1.0` stay what was written."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _size(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _wrong(key, f"the key {_short.repr(key.value)} stands here twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT_TAGS])
}


def _size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Count the values below a node with aliases written out, and refuse what cannot be plain text and lists of it."""
    if id(node) in sizes:
        if (size := sizes[id(node)]) is None:
            raise _wrong(node, "an alias stands inside of what it stands for")
        return size
    plain = f"tag:yaml.org,2002:{_PLAIN_TAGS[type(node)]}"
    if node.tag != plain and not (isinstance(node, yaml.ScalarNode) and node.tag in _KEPT_TAGS):
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _wrong(node, f"the tag {_short.repr(tag)}: values are read as they are written, leave it out")
    sizes[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        if not is_unicode(node.value):
            raise _wrong(node, f"{_short.repr(node.value)} is not valid Unicode")
        size = 1
    elif isinstance(node, yaml.MappingNode):
        size = 1 + sum(_size(part, sizes) for pair in node.value for part in pair)
    else:
        size = 1 + sum(_size(part, sizes) for part in node.value)
    if size > MAX_VALUES:
        raise _wrong(node, f"more than {MAX_VALUES:,} values, its aliases written out")
    sizes[id(node)] = size
    return size


def _wrong(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Args:
        path: The file.

    Returns:
        Its mapping. Scalars are text as written or None; the model they are validated by makes numbers of them.

    Raises:
        DataError: The file is missing, is not UTF-8 or YAML, is no mapping, or is larger or deeper than is read.
    """
    if check_regular_file(path) > MAX_BYTES or len(content := read_bytes(path)) > MAX_BYTES:
        raise DataError(f"{path}: a YAML file of at most {MAX_BYTES:,} bytes is read, and this one is larger.")
    try:
        values = yaml.load(content.decode("utf-8-sig"), _Loader)  # a SafeLoader with fewer conversions
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: is not valid YAML ({error.problem or error}). Correct that line.") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is not valid YAML ({error}).") from error
    except RecursionError:
        raise DataError(f"{path}: its lists or mappings are nested too deep to be read.") from None
    if not isinstance(values, dict):
        found = "an empty file" if values is None else f"a {type(values).__name__}"
        raise DataError(f"{path}: expected keys and values (`key: value`), found {found}.")
    return {str(key): value for key, value in values.items()}


def validate(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Build a model from values a user wrote, and explain what is wrong with them if it cannot be built.

    What an error says of a key comes from the description of its field.

    Args:
        model: The model.
        values: Its fields.
        where: How messages name the origin of the values, as the file's path.

    Returns:
        The model.

    Raises:
        DataError: Keys are unknown or missing, or values cannot be used; a line for each.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [f"{where}: {_explain(model, problem)}" for problem in error.errors()[:MAX_PROBLEMS]]
        more = error.error_count() - len(problems)
        raise DataError("\n".join([*problems, *([f"{where}: {more:,} more of this kind"] if more else [])])) from None


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Suggest what a name may have been meant for.

    Args:
        name: The name that is not known.
        known: Those that are.

    Returns:
        A sentence that begins with a space, or nothing where no name is near.
    """
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _explain(model: type[BaseModel], error: ErrorDetails) -> str:
    here, description = model, ""
    for part in error["loc"]:
        if isinstance(part, str) and part in here.model_fields:
            field = here.model_fields[part]
            description, here = field.description or "", _model_in(field.annotation) or here
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith("<"))  # <…> are tags of unions
    if error["type"] == "extra_forbidden":
        known = list(here.model_fields)
        near = did_you_mean(str(error["loc"][-1]), known)
        return f"unknown key {_short.repr(key)}.{near} The keys are: {', '.join(known)}."
    if error["type"] == "missing":
        return f"the key {key!r} is missing. Give {description}."
    if error["type"] == "value_error":
        return f"the key {key!r} {error['ctx']['error']}"
    found = "nothing" if error["input"] is None else _short.repr(error["input"])
    return f"the key {key!r} is {found}. Give {description}."


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Find the model in an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
