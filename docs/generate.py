"""Generate the reference pages from the code: the methods, the command line and the Python names.

    python docs/generate.py

`tests/test_docs.py` fails while the committed pages are out of date, so run this after a change to a method, a command
or a public docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.methods import Method, Objective, Part, Start, methods, parts

sys.path.insert(0, str(Path(__file__).parent))  # The test imports this file from a different folder.

from docstrings import PAPER, docstring_to_markdown, parse_entries, split_docstring, split_source, to_markdown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FOLDER = Path(__file__).parent
NOTE = "<!-- Made by `python docs/generate.py`; edit the docstrings it comes from. -->\n\n"
NEEDS = {
    "labels": "labels",
    "text": "texts of the task, labelled or not",
    "tasks": "other tasks tuned on both bases, or on the old one",
}
"""Descriptions of what methods need, for the table."""
MAX_DEFAULT_LENGTH = 60
"""Characters of a default in a signature; arbitrary, a longer one is replaced by an ellipsis."""
MAX_SIGNATURE_LENGTH = 100
"""Characters of a signature on one line; arbitrary, a longer one has one parameter per line."""
METHODS = """# Methods

A method makes an adaptation for the new base. Every method but `auto` consists of a *start*, which puts the old weights
on the new base, and, if it trains, of an *objective*. `regraft recycle --method NAME` runs one method, `regraft compare
--methods NAME,NAME` runs several on the same data, and `-o NAME=VALUE` (in `compare`, `-o METHOD:NAME=VALUE`) sets an
option. An option may be qualified by its part, as in `-o distill.decay=linear`; it must be if both parts have one of
that name. `regraft methods` lists the methods below. Every other START+OBJECTIVE, such as `aligned+labels` or
`trimmed+label-free`, is a method too.

Which method to choose:

- If you do not know: `auto`, which tries the cheapest methods first and records why it stopped.
- Without labels and without time to train: `direct`, or `ridge` where `direct` loses much.
- Without labels, but with time to train: `label-free`.
- With labels: `init`; with few of them, `init+distill`.
- If the new base was pre-trained from scratch rather than continued from the old base: `aligned`.
- If other tasks were tuned on both bases, or LoRAs or bottleneck adapters for other tasks on the old one: `project`.
- As a reference for the others: `scratch`.

[Results](results.md) links to the measurements.

"""
PYTHON = """# Python

All names in `regraft.__all__`. `import regraft` loads neither torch nor transformers: each name is imported when it is
first used. Bad input raises a `RegraftError`.

"""
CLI = """# Command line

All commands with their arguments and options. After an error, a command prints it and exits with status 2; after an
interruption, it exits with status 130, and the same command resumes where it stopped.

"""


def main() -> None:
    """Write every page."""
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


def pages() -> dict[str, str]:
    """Return the generated pages: Markdown by path inside `docs/`."""
    return {"methods.md": methods_page(), "reference/cli.md": cli_page(), "reference/python.md": python_page()}


def methods_page() -> str:
    """Return the page of the methods: a table of all, then one section per start and objective."""
    rows = [
        (
            f"`{method.name}`",
            method.summary,
            _formula(method),
            _needs(method),
            "yes" if "training" in method.needs() else "no",
        )
        for method in methods().values()
    ]
    page = NOTE + METHODS + _table(("method", "what it does", "start + objective", "needs", "trains"), rows)
    parts_by_name = {part.name: part for method in methods().values() for part in method.parts}
    for title, part_class in (("Starts", Start), ("Objectives", Objective)):
        page += f"\n## {title}\n" + "".join(_part_section(parts_by_name[name]) for name in parts(part_class))
    remaining_parts = [part for part in parts_by_name.values() if not isinstance(part, (Start, Objective))]
    return page + "\n## Others\n" + "".join(map(_part_section, remaining_parts))


def _formula(method: Method) -> str:
    return " + ".join(f"[`{part.name}`](#{_anchor(part)})" for part in method.parts)


def _part_section(part: Part) -> str:
    """Describe a part by the docstrings of its module, function and options, and cite each of its papers once."""
    module = inspect.getmodule(part.run)
    module_doc = inspect.getdoc(module) or ""
    heading = f"`{part.name}`: "
    # A module's docstring describes the part only if the module defines no other part; it then begins with the name.
    part_doc = module_doc.removeprefix(heading) if module_doc.startswith(heading) else ""
    description, module_source = split_source(part_doc)
    details, function_source = split_source(split_docstring(inspect.getdoc(part.run) or "")[0])
    needs = _needs(Method(part.name, part.summary, (part,)))
    lines = [f'\n<a id="{_anchor(part)}"></a>\n\n### {part.name}\n']
    lines += [to_markdown(f"{description[:1].upper()}{description[1:]}\n\n{details}"), f"**Needs:** {needs}.\n"]
    sources = [module_source, function_source]
    if part.options:
        options_module = inspect.getmodule(part.options)
        if options_module is not module:
            sources.append(split_source(inspect.getdoc(options_module) or "")[1])
        lines.append(_table(("option", "default", "meaning"), _options(part.options)))
    cited: set[str] = set()
    for source in filter(None, sources):
        papers = set(PAPER.findall(source))
        if not papers or papers - cited:
            lines.append(f"**Source:** {to_markdown(source)}")
        cited |= papers
    return "\n".join(lines)


def _options(options: Any) -> list[tuple[str, str, str]]:
    meanings: dict[str, str] = {}
    for cls in reversed(options.__mro__[:-1]):  # a subclass's descriptions replace its parent's; the last is object
        meanings |= _documented_arguments(cls)
    return [
        (f"`{field.name}`", f"`{_format_option(field.default)}`", meanings[field.name])
        for field in dataclasses.fields(options)
    ]


def _needs(method: Method) -> str:
    """Describe the needs of a method, which for some methods depend on the options."""
    needs = ", ".join(NEEDS.get(need, need) for need in method.needs() if need != "training") or "nothing else"
    has_conditional_needs = any(callable(part.needs) for part in method.parts)
    return f"{needs} (with the default options)" if has_conditional_needs else needs


def _anchor(part: Part) -> str:
    return f"{type(part).__name__.lower()}-{part.name}"


def cli_page() -> str:
    """Return the page of the command line: every command with its arguments and options."""
    import typer

    from regraft.cli import app

    top: Any = typer.main.get_command(app)
    fragments = [NOTE, CLI, "## regraft\n\n", to_markdown(top.help), "\n", _parameters(top)]
    for words, command in _commands(top, ("regraft",)):
        fragments += ["\n", "#" * min(len(words), 3), f" {' '.join(words)}\n\n", to_markdown(command.help)]
        if not hasattr(command, "commands"):
            fragments += [f"\n```text\n{' '.join((*words, *_usage(command)))}\n```\n\n", _parameters(command)]
    return "".join(fragments)


def _commands(group: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in sorted(group.commands.items()):
        yield (*words, name), command
        if hasattr(command, "commands"):
            yield from _commands(command, (*words, name))


def _usage(command: Any) -> Iterator[str]:
    """Yield a command's arguments, then its required options."""
    options = [parameter for parameter in command.params if parameter.opts[0].startswith("-")]
    for argument in (parameter for parameter in command.params if parameter not in options):
        name = argument.name.upper() + ("…" if argument.nargs == -1 else "")
        yield name if argument.required else f"[{name}]"
    yield from (f"{option.opts[0]} {option.name.upper()}" for option in options if option.required)
    if not all(option.required for option in options):
        yield "[OPTIONS]"


def _parameters(command: Any) -> str:
    """Return a table of a command's arguments and options, or an empty text."""
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_option = parameter.opts[0].startswith("-")
        name = ", ".join(f"`{opt}`" for opt in parameter.opts) if is_option else f"`{parameter.name.upper()}`"
        has_default = parameter.default not in (None, (), []) and not getattr(parameter, "is_flag", False)
        default = f"`{parameter.default}`" if has_default else ""
        if parameter.required:
            default = "required"
        repeatable = " Repeatable." if getattr(parameter, "multiple", False) else ""
        rows.append((name, default, (parameter.help or "") + repeatable))
    return _table(("argument or option", "default", "description"), rows) if rows else ""


def python_page() -> str:
    """Return the page of the Python names: every public function and class."""
    import regraft

    classes = [name for name in regraft.__all__ if inspect.isclass(getattr(regraft, name))]
    functions = [name for name in regraft.__all__ if name not in classes]
    fragments = [NOTE, PYTHON, "## Functions\n"]
    for name in functions:
        function = getattr(regraft, name)
        fragments += [f"\n### {name}\n\n", _code(_call(name, function)), docstring_to_markdown(function)]
    fragments.append("\n## Classes\n")
    for name in classes:
        fragments += [f"\n### {name}\n\n", *_class(name, getattr(regraft, name))]
    return "".join(fragments)


def _class(name: str, cls: type) -> Iterator[str]:
    """Yield a class's signature and docstring, then its documented public members, then its subclasses."""
    documented = _documented_arguments(cls)
    if documented:
        yield _code(_call(name, cls, tuple(documented)))
    yield docstring_to_markdown(cls)
    for member_name, member in vars(cls).items():
        member_doc = None if member_name.startswith("_") else _member_doc(member)
        if not member_doc:
            continue
        function = getattr(member, "__func__", member)
        path = f"{name}.{member_name}"
        signature = _call(path, function) if inspect.isfunction(function) else path
        yield f"\n#### {path}\n\n" + _code(signature) + docstring_to_markdown(member_doc)
    subclasses = [subclass for subclass in cls.__subclasses__() if subclass.__module__ == cls.__module__]
    if subclasses:
        yield "\nSubclasses:\n\n"
        for subclass in sorted(subclasses, key=str):
            yield f"- `{subclass.__name__}`: {to_markdown(inspect.getdoc(subclass) or '')}"


def _documented_arguments(cls: type) -> dict[str, str]:
    return parse_entries(split_docstring(inspect.getdoc(cls) or "")[1].get("Args", ""))


def _member_doc(member: Any) -> str | None:
    """Return the docstring of a method or property; None for other members."""
    if inspect.isfunction(member) or isinstance(member, (classmethod, staticmethod, property)):
        return inspect.getdoc(member)
    is_cached_property = hasattr(member, "attrname")
    return inspect.cleandoc(member.__doc__) if is_cached_property else None


def _call(name: str, called: Any, documented: tuple[str, ...] | None = None) -> str:
    """Write a signature with types and defaults; of a class, with the documented parameters only."""
    fields = getattr(called, "model_fields", {})  # empty unless `called` is a pydantic model
    positional: list[str] = []
    keyword_only: list[str] = []
    for parameter in inspect.signature(called).parameters.values():
        if parameter.name in ("self", "cls") or (documented is not None and parameter.name not in documented):
            continue
        if fields:
            field = fields[parameter.name]
            keyword_only.append(parameter.name if field.is_required() else f"{parameter.name}={field.default!r}")
        else:
            group = keyword_only if parameter.kind is parameter.KEYWORD_ONLY else positional
            group.append(_parameter(parameter))
    parameters = [*positional, "*", *keyword_only] if keyword_only else positional
    returns = inspect.signature(called).return_annotation
    ending = f" -> {_type(returns)}" if inspect.isfunction(called) and returns is not inspect.Signature.empty else ""
    line = f"{name}({', '.join(parameters)}){ending}"
    if len(line) <= MAX_SIGNATURE_LENGTH:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){ending}"


def _parameter(parameter: inspect.Parameter) -> str:
    """Write a parameter with its type and default."""
    text = parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_type(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        text += f" = {getattr(parameter.default, '__name__', None) or _default(parameter.default)}"
    return text


def _type(annotation: Any) -> str:
    text = annotation.strip("'\"") if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\bCount\b", "int", text)  # a count is an int that is checked when a record is read


def _default(value: Any) -> str:
    return "…" if "factory" in repr(value) or len(repr(value)) > MAX_DEFAULT_LENGTH else repr(value)


def _format_option(value: Any) -> str:
    """Format an option's value as `-o` takes it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_format_option, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [[to_markdown(cell).strip().replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ("---",) * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n\n"


if __name__ == "__main__":
    main()
