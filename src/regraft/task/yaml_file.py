"""What users write in YAML: read as it is written, and checked key by key."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)

_KEPT_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """Leaves scalars as text, so that labels such as `no`, `01` and `1.0` stay what was written."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT_TAGS])
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Args:
        path: The file.

    Returns:
        Its mapping. Scalars are text as written or None; the model they are validated by makes numbers of them.

    Raises:
        DataError: The file is missing, is not UTF-8 or YAML, or is no mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Give the path of a YAML file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error}). Save it as UTF-8.") from error
    try:
        values = yaml.load(text, _Loader)  # a SafeLoader with fewer conversions
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise DataError(f"{path}{line}: is not valid YAML ({error.problem or error}). Correct that line.") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path}: is not valid YAML ({error}).") from error
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
        raise DataError("\n".join(f"{where}: {_explain(model, one)}" for one in error.errors())) from None


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
        return f"unknown key {key!r}.{did_you_mean(str(error['loc'][-1]), known)} The keys are: {', '.join(known)}."
    if error["type"] == "missing":
        return f"the key {key!r} is missing. Give {description}."
    if error["type"] == "value_error":
        return f"the key {key!r} {error['ctx']['error']}"
    found = "nothing" if error["input"] is None else repr(error["input"])
    return f"the key {key!r} is {found}. Give {description}."


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Find the model in an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
