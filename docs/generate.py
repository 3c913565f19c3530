"""Generate the reference pages from the code: the methods, the command line and the Python names.

    python docs/generate.py

`tests/test_docs.py` fails while the committed pages are out of date, so run this after a change to a method, a command
or a public docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.methods import Method, Objective, Part, Start, methods, parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FOLDER = Path(__file__).parent
NOTE = "<!-- Made by `python docs/generate.py`; edit the docstrings it comes from. -->\n\n"
NEEDS = {
    "labels": "labels",
    "text": "texts of the task, labelled or not",
    "tasks": "other tasks tuned on both bases, or on the old one",
}
MAX_DEFAULT = 60  # characters; a longer default would make its line unreadable
ENTRY = re.compile(r"(\w+): (.*)")
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
SECTION = re.compile(r"(Args|Returns|Yields|Raises):")

METHODS = """# Methods

A method makes an adaptation for the new base. It consists of a *start*, which puts the old weights on the new base,
and, if it trains, of an *objective*. `regraft recycle --method NAME` runs one method, `regraft compare --methods
NAME,NAME` runs several on the same data, and `-o NAME=VALUE` (in `compare`, `-o METHOD:NAME=VALUE`) sets an option.
`regraft methods` lists the methods below. Every other START+OBJECTIVE, such as `aligned+labels` or
`trimmed+label-free`, is a method too. If both parts have an option of the same name, qualify it, as in
`-o distill.decay=linear`.

Which method to choose:

- If you do not know: `auto`, which tries the cheapest methods first and records why it stopped.
- Without labels and without time to train: `direct`, or `ridge` where `direct` loses much.
- Without labels, but with time to train: `label-free`.
- With labels: `init`; with few of them, `init+distill`.
- If the new base was trained anew rather than from the old one: `aligned`.
- If other tasks were tuned on both bases, or adapters for other tasks on the old one: `project`.
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
    """Return the page of the methods: a table of all, then a section for each start and objective."""
    rows = [
        (f"`{m.name}`", m.summary, _formula(m), _needs(m), "yes" if "training" in m.needs() else "no")
        for m in methods().values()
    ]
    page = NOTE + METHODS + _table(("method", "what it does", "start + objective", "needs", "trains"), rows)
    registered = {part.name: part for method in methods().values() for part in method.parts}
    for title, kind in (("Starts", Start), ("Objectives", Objective)):
        page += f"\n## {title}\n" + "".join(_part(registered[name]) for name in parts(kind))
    others = [part for part in registered.values() if not isinstance(part, (Start, Objective))]
    return page + "\n## Others\n" + "".join(map(_part, others))


def _formula(method: Method) -> str:
    return " + ".join(f"[`{part.name}`](#{_anchor(part)})" for part in method.parts)


def _part(part: Part) -> str:
    module = inspect.getmodule(part.run)
    module_doc = inspect.getdoc(module) or ""
    heading = f"`{part.name}`: "  # begins the docstring of a module that defines this part alone
    about, module_source = _split_source(module_doc.removeprefix(heading) if module_doc.startswith(heading) else "")
    details, function_source = _split_source(_split(inspect.getdoc(part.run) or "")[0])
    needs = _needs(Method(part.name, part.summary, (part,)))
    lines = [f'\n<a id="{_anchor(part)}"></a>\n\n### {part.name}\n']
    lines += [_prose(f"{about[:1].upper()}{about[1:]}\n\n{details}"), f"**Needs:** {needs}.\n"]
    sources = [module_source, function_source]
    if part.options:
        options_module = inspect.getmodule(part.options)
        if options_module is not module:
            sources.append(_split_source(inspect.getdoc(options_module) or "")[1])
        lines.append(_table(("option", "default", "meaning"), _options(part.options)))
    cited: set[str] = set()
    for text in filter(None, sources):
        papers = set(PAPER.findall(text))
        if not papers or papers - cited:
            lines.append(f"**Source:** {_prose(text)}")
        cited |= papers
    return "\n".join(lines)


def _options(options: Any) -> list[tuple[str, str, str]]:
    meanings: dict[str, str] = {}
    for part in reversed(options.__mro__):  # a subclass's descriptions replace its parent's
        meanings |= _entries(_split(inspect.getdoc(part) or "")[1].get("Args", "")) if part is not object else {}
    return [(f"`{f.name}`", f"`{_value(f.default)}`", meanings[f.name]) for f in dataclasses.fields(options)]


def _needs(method: Method) -> str:
    return ", ".join(NEEDS.get(need, need) for need in method.needs() if need != "training") or "only the old weights"


def _anchor(part: Part) -> str:
    return f"{type(part).__name__.lower()}-{part.name}"


def cli_page() -> str:
    """Return the page of the command line: every command with its arguments and options."""
    import typer

    from regraft.cli import app

    top: Any = typer.main.get_command(app)
    parts = [NOTE, CLI, "## regraft\n\n", _prose(top.help), "\n", _parameters(top)]
    for words, command in _commands(top, ("regraft",)):
        parts += ["\n", "#" * min(len(words), 3), f" {' '.join(words)}\n\n", _prose(command.help)]
        if not hasattr(command, "commands"):
            parts += [f"\n```text\n{' '.join((*words, *_usage(command)))}\n```\n\n", _parameters(command)]
    return "".join(parts)


def _commands(group: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in sorted(group.commands.items()):
        yield (*words, name), command
        if hasattr(command, "commands"):
            yield from _commands(command, (*words, name))


def _usage(command: Any) -> Iterator[str]:
    options = [parameter for parameter in command.params if parameter.opts[0].startswith("-")]
    for argument in (parameter for parameter in command.params if parameter not in options):
        name = argument.name.upper() + ("…" if argument.nargs == -1 else "")
        yield name if argument.required else f"[{name}]"
    yield from (f"{option.opts[0]} {option.name.upper()}" for option in options if option.required)
    if not all(option.required for option in options):
        yield "[OPTIONS]"


def _parameters(command: Any) -> str:
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_option = parameter.opts[0].startswith("-")
        name = ", ".join(f"`{opt}`" for opt in parameter.opts) if is_option else f"`{parameter.name.upper()}`"
        has_default = parameter.default not in (None, (), []) and not getattr(parameter, "is_flag", False)
        default = "required" if parameter.required else f"`{parameter.default}`" if has_default else ""
        repeatable = " Repeatable." if getattr(parameter, "multiple", False) else ""
        rows.append((name, default, (parameter.help or "") + repeatable))
    return _table(("argument or option", "default", "description"), rows) if rows else ""


def python_page() -> str:
    """Return the page of the Python names: every public function and class."""
    import regraft

    classes = [name for name in regraft.__all__ if inspect.isclass(getattr(regraft, name))]
    functions = [name for name in regraft.__all__ if name not in classes]
    parts = [NOTE, PYTHON, "## Functions\n"]
    for name in functions:
        function = getattr(regraft, name)
        parts += [f"\n### {name}\n\n", _code(_call(name, function)), _docstring(function)]
    parts.append("\n## Classes\n")
    for name in classes:
        parts += [f"\n### {name}\n\n", *_class(name, getattr(regraft, name))]
    return "".join(parts)


def _class(name: str, cls: type) -> Iterator[str]:
    documented = _entries(_split(inspect.getdoc(cls) or "")[1].get("Args", ""))
    if documented:
        yield _code(_call(name, cls, tuple(documented)))
    yield _docstring(cls)
    for member, value in vars(cls).items():
        if member.startswith("_") or not (text := _member_doc(value)):
            continue
        inner = getattr(value, "__func__", value)
        signature = _call(f"{name}.{member}", inner) if inspect.isfunction(inner) else f"{name}.{member}"
        yield f"\n#### {name}.{member}\n\n" + _code(signature) + _docstring(text)
    if subclasses := sorted((c for c in cls.__subclasses__() if c.__module__ == cls.__module__), key=str):
        yield "\nSubclasses:\n\n"
        yield from (f"- `{subclass.__name__}`: {_prose(inspect.getdoc(subclass) or '')}" for subclass in subclasses)


def _member_doc(value: Any) -> str | None:
    if inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod, property)):
        return inspect.getdoc(value)
    return inspect.cleandoc(value.__doc__) if hasattr(value, "attrname") else None  # a cached property


def _call(name: str, called: Any, documented: tuple[str, ...] | None = None) -> str:
    """Write a signature with types and defaults; of a class, with the documented parameters only."""
    fields = getattr(called, "model_fields", {})  # a pydantic model takes them by name
    parameters, is_keyword_only = (["*"], True) if fields else ([], False)
    for parameter in inspect.signature(called).parameters.values():
        if parameter.name in ("self", "cls") or (documented is not None and parameter.name not in documented):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
            is_keyword_only = True
            parameters.append("*")
        text = parameter.name
        if parameter.annotation is not parameter.empty and not fields:
            text += f": {_type(parameter.annotation)}"
        if fields and not fields[parameter.name].is_required():
            text += f"={fields[parameter.name].default!r}"
        elif not fields and parameter.default is not parameter.empty:
            text += f" = {getattr(parameter.default, '__name__', None) or _python(parameter.default)}"
        parameters.append(text)
    returns = inspect.signature(called).return_annotation
    ending = f" -> {_type(returns)}" if inspect.isfunction(called) and returns is not inspect.Signature.empty else ""
    line = f"{name}({', '.join(parameters)}){ending}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {text},\n" for text in parameters) + f"){ending}"


def _type(annotation: Any) -> str:
    text = annotation.strip("'\"") if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\bCount\b", "int", text)  # a count is an int that is checked when a record is read


def _python(default: Any) -> str:
    return "…" if "factory" in repr(default) or len(repr(default)) > MAX_DEFAULT else repr(default)


def _docstring(documented: Any) -> str:
    """Turn a google docstring, or that of an object, into Markdown."""
    lead, sections = _split(documented if isinstance(documented, str) else inspect.getdoc(documented) or "")
    parts = [_prose(lead)]
    for title, name in (("Args", "Arguments"), ("Returns", "Returns"), ("Yields", "Yields"), ("Raises", "Raises")):
        if title not in sections:
            continue
        if title in ("Returns", "Yields"):
            parts.append(f"**{name}:** {_prose(sections[title])}")
        else:
            entries = "".join(f"- `{key}`: {_prose(text)}" for key, text in _entries(sections[title]).items())
            parts.append(f"**{name}:**\n\n{entries}")
    return "\n".join(parts)


def _split(text: str) -> tuple[str, dict[str, str]]:
    """Split a google docstring into its lead and its sections."""
    lead: list[str] = []
    sections: dict[str, list[str]] = {}
    into = lead
    for line in text.splitlines():
        if header := SECTION.fullmatch(line):
            into = sections.setdefault(header[1], [])
        else:
            if into is not lead and line and not line.startswith(" "):
                into = lead  # a paragraph after the sections
            into.append(line)
    return "\n".join(lead).strip(), {
        name: inspect.cleandoc("\n" + "\n".join(lines)) for name, lines in sections.items()
    }


def _entries(section: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if (entry := ENTRY.fullmatch(line)) and not line.startswith(" "):
            name, entries[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            entries[name] += f" {line.strip()}"
    return entries


def _split_source(text: str) -> tuple[str, str]:
    """Split a text into what precedes the source that it cites, and the source."""
    before, _, source = text.partition("Source: ")
    return before.strip(), source.strip()


def _prose(text: str) -> str:
    """Write a docstring's text as Markdown: escape it, join its lines and link papers."""
    spans = re.split(r"(`[^`]*`)", text)
    spans[::2] = [re.sub(r"([*<>])", r"\\\1", span) for span in spans[::2]]
    paragraphs = [" ".join(part.split()) for part in "".join(spans).strip().split("\n\n")]
    linked = PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", "\n\n".join(paragraphs))
    return linked + "\n"


def _value(default: Any) -> str:
    """Format a default as `-o` takes it."""
    if isinstance(default, tuple):
        return f"[{','.join(map(_value, default))}]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default) or '""'


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [[_prose(cell).strip().replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ("---",) * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n\n"


if __name__ == "__main__":
    main()
