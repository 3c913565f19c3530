"""A reader of YAML files that users write, without conversion of scalars, and their validation key by key."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from regraft.errors import DataError, did_you_mean
from regraft.task.file import check_regular_file, is_unicode, read_bytes

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from pathlib import Path

    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 500_000
"""The largest size of a file: enough for more than 10,000 label names, which take PyYAML up to 6 s."""
MAX_VALUES = 100_000
"""The largest number of values after aliases are expanded: a few lines of nested aliases may stand for billions."""
MAX_PROBLEMS = 20
"""The number of problems that a message lists, arbitrary: every item of a long list may be invalid."""
_PLAIN_TAGS = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}
_TAG_PREFIX = "tag:yaml.org,2002:"
_RESOLVED_TAGS = (f"{_TAG_PREFIX}null", f"{_TAG_PREFIX}merge")
_short = reprlib.Repr()  # shortens values in messages, which may be deep and long; the limits are arbitrary
_short.maxlevel = 2
_short.maxstring = 100
_short.maxother = 100


class _Loader(yaml.SafeLoader):
    """A YAML loader that leaves scalars but null as text: labels such as `no`, `01` and `1.0` stay as written."""

    def get_single_node(self) -> yaml.Node | None:
        """Refuse a document that is too large or has tags, before its values are built."""
        node = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse repeated keys, of which PyYAML would take the last."""
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in keys:
                raise _yaml_error(key, f"the key {_short.repr(key.value)} is repeated")
            keys.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first_character: [(tag, pattern) for tag, pattern in resolvers if tag in _RESOLVED_TAGS]
    for first_character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _count_values(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Count the values of a node with all aliases expanded, and refuse all tags but text, null, lists and mappings.

    Args:
        node: The root of the values to count.
        counts: The counts of all visited nodes by `id`, which this function extends; None for nodes that contain
            `node`.

    Returns:
        The number of values, including the node itself.

    Raises:
        yaml.constructor.ConstructorError: An alias is recursive, a tag or a text is invalid, or values are too many.
    """
    if id(node) in counts:
        cached_count = counts[id(node)]
        if cached_count is None:
            raise _yaml_error(node, "an alias refers to a value that contains it")
        return cached_count
    plain_tag = _TAG_PREFIX + _PLAIN_TAGS[type(node)]
    if node.tag != plain_tag and not (isinstance(node, yaml.ScalarNode) and node.tag in _RESOLVED_TAGS):
        tag = node.tag.replace(_TAG_PREFIX, "!!")
        raise _yaml_error(node, f"the tag {_short.repr(tag)}: values are read as written, leave it out")
    counts[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        if not is_unicode(node.value):
            raise _yaml_error(node, f"{_short.repr(node.value)} is not valid Unicode")
        count = 1
    elif isinstance(node, yaml.MappingNode):
        count = 1 + sum(_count_values(child, counts) for pair in node.value for child in pair)
    else:
        count = 1 + sum(_count_values(child, counts) for child in node.value)
    if count > MAX_VALUES:
        raise _yaml_error(node, f"more than {MAX_VALUES:,} values after aliases are expanded")
    counts[id(node)] = count
    return count


def _yaml_error(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Args:
        path: A file of UTF-8 text, at most `MAX_BYTES` long.

    Returns:
        The keys and values. Scalars are text as written, or None; `validate` converts them to numbers.

    Raises:
        DataError: The file is missing, not UTF-8, not YAML, not a mapping, too large or too deeply nested, or
            has tags or repeated keys.
    """
    check_regular_file(path)
    too_large = DataError(f"{path}: is larger than the {MAX_BYTES:,} bytes that a YAML file may have. Shorten it.")
    if path.stat().st_size > MAX_BYTES:
        raise too_large
    content = read_bytes(path)
    if len(content) > MAX_BYTES:  # a compressed file expands
        raise too_large
    try:
        values = yaml.load(content.decode("utf-8-sig"), _Loader)  # a SafeLoader with fewer conversions
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: is not valid YAML ({error.problem or error}). Correct that line.") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is not valid YAML ({error}). Correct it.") from error
    except RecursionError:
        raise DataError(f"{path}: its lists or mappings are nested too deeply. Nest them less.") from None
    if not isinstance(values, dict):
        content_type = "an empty file" if values is None else f"a {type(values).__name__}"
        raise DataError(f"{path}: expected keys and values (`key: value`), found {content_type}.")
    return {str(key): value for key, value in values.items()}


def format_yaml(values: Mapping[str, Any]) -> str:
    """Write keys and values as YAML, in their order.

    Args:
        values: Texts, numbers, lists, mappings and None, by key.
    """
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def validate(model: type[Model], values: Mapping[str, Any], origin: str) -> Model:
    """Build a pydantic model from values that a user wrote, and explain every invalid value.

    The expected value in a message is the description of the model's field.

    Args:
        model: A model class whose fields all have descriptions.
        values: The values by field name, as a user wrote them.
        origin: The source of the values as messages name it, such as the path of a file.

    Returns:
        The validated model.

    Raises:
        DataError: Keys are unknown or missing, or values are invalid; the message has one line per problem, for up
            to `MAX_PROBLEMS` problems.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [f"{origin}: {_explain(model, problem)}" for problem in error.errors()[:MAX_PROBLEMS]]
        if error.error_count() > MAX_PROBLEMS:
            problems.append(f"{origin}: {error.error_count() - MAX_PROBLEMS:,} more problems")
        raise DataError("\n".join(problems)) from None


def _explain(model: type[BaseModel], error: ErrorDetails) -> str:
    """Describe a validation error by its key, the invalid value, and the description of the innermost field."""
    innermost_model = model
    description = ""
    for key_part in error["loc"]:
        if isinstance(key_part, str) and key_part in innermost_model.model_fields:
            field = innermost_model.model_fields[key_part]
            description = field.description or ""
            innermost_model = _nested_model(field.annotation) or innermost_model
    # tags of unions are written as <…>, and are not keys of the file
    key = ".".join(str(key_part) for key_part in error["loc"] if not str(key_part).startswith("<"))
    if error["type"] == "extra_forbidden":
        keys = list(innermost_model.model_fields)
        suggestion = did_you_mean(str(error["loc"][-1]), keys)
        return f"unknown key {_short.repr(key)}.{suggestion} The keys are: {', '.join(keys)}."
    if error["type"] == "missing":
        return f"the key {key!r} is missing. Set it to {description}."
    if error["type"] == "value_error":
        return f"the key {key!r} {error['ctx']['error']}"
    value = "nothing" if error["input"] is None else _short.repr(error["input"])
    return f"the key {key!r} is {value}. Set it to {description}."


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `list[Model] | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = (_nested_model(argument) for argument in get_args(annotation))
    return next((model for model in models if model), None)
