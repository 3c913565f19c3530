"""Writes the pages that the code itself can tell: the methods, the command line and the Python names.

    python docs/generate.py

`tests/test_docs.py` holds the committed pages to what this gives, so run it after a change to a method, a command or a
public docstring.
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
NEEDED = {
    "labels": "labels",
    "text": "texts of the task, labelled or not",
    "tasks": "other tasks tuned on both bases, or on the old one",
}
LONG = 60
ENTRY = re.compile(r"(\w+): (.*)")
PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
SECTION = re.compile(r"(Args|Returns|Yields|Raises):")

METHODS = """# Methods

A method is a way to get an adaptation for the new base: a *start*, which puts the old weights onto it, and where it
trains an *objective*. `regraft recycle --method NAME` runs one, `regraft compare --methods NAME,NAME` several on the
same data, and `-o NAME=VALUE` (`compare`: `-o METHOD:NAME=VALUE`) sets an option. The table is what `regraft methods`
lists. Any other START+OBJECTIVE is a method too, as `aligned+labels` or `trimmed+label-free`; an option that both parts
have is qualified by one of them, as in `-o distill.decay=linear`.

Which one?

- You do not know: `auto` tries the cheapest first and says why it stopped.
- No labels, no time: `direct`, and `ridge` where `direct` loses much.
- No labels, but time to train: `label-free`.
- Labels: `init`; with few of them, `init+distill`.
- The new base was trained again rather than on from the old one: `aligned`.
- Other tasks were tuned on both bases already, or adapters of them on the old one: `project`.
- A figure to hold the others against: `scratch`.

[Results](results.md) leads to what was measured of them.

"""
PYTHON = """# Python

Everything in `regraft.__all__`. `import regraft` loads neither torch nor transformers; the names are imported when they
are first used. What is refused is raised as a `RegraftError`.

"""
CLI = """# Command line

Every command with its arguments and options. An error of regraft's own is printed and ends with status 2; an
interruption ends with 130, and the same command goes on from there.

"""


def main() -> None:
    """Write every page."""
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


def pages() -> dict[str, str]:
    """Give the generated pages.

    Returns:
        Their Markdown, by the name inside `docs/`.
    """
    return {"methods.md": methods_page(), "reference/cli.md": cli_page(), "reference/python.md": python_page()}


def methods_page() -> str:
    """Describe every method of the registry in a table, and what methods consist of one after the other."""
    listed = list(methods().values())
    rows = [(f"`{m.name}`", m.summary, _formula(m), _when(m.needs()), "yes" if _trains(m) else "no") for m in listed]
    table = _table(("method", "what it does", "start + objective", "when there are", "trains"), rows)
    page = NOTE + METHODS + table
    registered = {part.name: part for method in listed for part in method.parts}
    for title, kind in (("Starts", Start), ("Objectives", Objective)):
        page += f"\n## {title}\n" + "".join(_part(registered[name]) for name in parts(kind))
    neither = [part for part in registered.values() if not isinstance(part, (Start, Objective))]
    return page + "\n## Others\n" + "".join(map(_part, neither))


def _formula(method: Method) -> str:
    return " + ".join(f"[`{part.name}`](#{_anchor(part)})" for part in method.parts)


def _part(part: Part) -> str:
    module = inspect.getmodule(part.run)
    about = inspect.getdoc(module) or ""
    heading = f"`{part.name}`: "  # of a file with this one alone
    said, source = _parted(about.removeprefix(heading)) if about.startswith(heading) else ("", "")
    said = said[:1].upper() + said[1:]
    told, further = _parted(_split(inspect.getdoc(part.run) or "")[0])
    method = Method(part.name, part.summary, (part,))
    lines = [f'\n<a id="{_anchor(part)}"></a>\n\n### {part.name}\n']
    lines += [_prose(f"{said}\n\n{told}"), f"**When:** there are {_when(method.needs())}.\n"]
    sources = [source, further]
    if part.options:
        where = inspect.getmodule(part.options)
        sources += [_parted(inspect.getdoc(where) or "")[1]] if where is not module else []
        lines.append(_table(("option", "default", "meaning"), _options(part.options)))
    known: set[str] = set()
    for text in filter(None, sources):
        papers = set(PAPER.findall(text))
        if not papers or papers - known:
            lines.append(f"**Source:** {_prose(text)}")
        known |= papers
    return "\n".join(lines)


def _options(options: Any) -> list[tuple[str, str, str]]:
    meanings: dict[str, str] = {}
    for part in reversed(options.__mro__):  # those of a dataclass it is built on first
        meanings |= _entries(_split(inspect.getdoc(part) or "")[1].get("Args", "")) if part is not object else {}
    return [(f"`{f.name}`", f"`{_value(f.default)}`", meanings[f.name]) for f in dataclasses.fields(options)]


def _when(needs: tuple[str, ...]) -> str:
    return ", ".join(NEEDED.get(need, need) for need in needs if need != "training") or "only the old weights"


def _trains(method: Method) -> bool:
    return "training" in method.needs()


def _anchor(part: Part) -> str:
    return f"{type(part).__name__.lower()}-{part.name}"


def cli_page() -> str:
    """Describe every command of the app, its arguments and its options."""
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
    for one in command.params:
        if not one.opts[0].startswith("-"):
            shown = one.name.upper() + ("…" if one.nargs == -1 else "")
            yield shown if one.required else f"[{shown}]"
    for one in command.params:
        if one.opts[0].startswith("-") and one.required:
            yield f"{one.opts[0]} {one.name.upper()}"
    if any(one.opts[0].startswith("-") and not one.required for one in command.params):
        yield "[OPTIONS]"


def _parameters(command: Any) -> str:
    rows = []
    for one in command.params:
        if one.name in ("help", "install_completion", "show_completion"):
            continue
        option = one.opts[0].startswith("-")
        name = ", ".join(f"`{opt}`" for opt in one.opts) if option else f"`{one.name.upper()}`"
        given = one.default not in (None, (), []) and not getattr(one, "is_flag", False)
        default = "required" if one.required else f"`{one.default}`" if given else ""
        rows.append((name, default, (one.help or "") + (" Repeatable." if getattr(one, "multiple", False) else "")))
    return _table(("argument or option", "default", "what it is"), rows) if rows else ""


def python_page() -> str:
    """Describe every public name of the package."""
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


def _class(name: str, found: type) -> Iterator[str]:
    documented = _entries(_split(inspect.getdoc(found) or "")[1].get("Args", ""))
    if documented:
        yield _code(_call(name, found, tuple(documented)))
    yield _docstring(found)
    for member, value in vars(found).items():
        if member.startswith("_") or not (text := _member_doc(value)):
            continue
        inner = getattr(value, "__func__", value)
        shown = _call(f"{name}.{member}", inner) if inspect.isfunction(inner) else f"{name}.{member}"
        yield f"\n#### {name}.{member}\n\n" + _code(shown) + _docstring(text)
    if below := sorted((one for one in found.__subclasses__() if one.__module__ == found.__module__), key=str):
        yield "\nUnder it are:\n\n"
        yield from (f"- `{one.__name__}`: {_prose(inspect.getdoc(one) or '')}" for one in below)


def _member_doc(value: Any) -> str | None:
    if inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod, property)):
        return inspect.getdoc(value)
    return inspect.cleandoc(value.__doc__) if hasattr(value, "attrname") else None  # a cached property


def _call(name: str, found: Any, only: tuple[str, ...] | None = None) -> str:
    """Write a call with types and defaults; of a class the documented parameters alone."""
    fields = getattr(found, "model_fields", {})  # of pydantic, which takes them by name
    shown, keyword = (["*"], True) if fields else ([], False)
    for parameter in inspect.signature(found).parameters.values():
        if parameter.name in ("self", "cls") or (only is not None and parameter.name not in only):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            keyword = True
            shown.append("*")
        text = parameter.name
        if parameter.annotation is not parameter.empty and not fields:
            text += f": {_type(parameter.annotation)}"
        if fields and not fields[parameter.name].is_required():
            text += f"={fields[parameter.name].default!r}"
        elif not fields and parameter.default is not parameter.empty:
            text += f" = {getattr(parameter.default, '__name__', None) or _python(parameter.default)}"
        shown.append(text)
    returns = inspect.signature(found).return_annotation
    ending = f" -> {_type(returns)}" if inspect.isfunction(found) and returns is not inspect.Signature.empty else ""
    flat = f"{name}({', '.join(shown)}){ending}"
    return flat if len(flat) <= 100 else f"{name}(\n" + "".join(f"    {one},\n" for one in shown) + f"){ending}"


def _type(annotation: Any) -> str:
    text = annotation.strip("'\"") if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\bCount\b", "int", text)  # what a record is checked for when it is read is no matter of its readers


def _python(default: Any) -> str:
    return "…" if "factory" in repr(default) or len(repr(default)) > LONG else repr(default)


def _docstring(found: Any) -> str:
    """Turn a google docstring into Markdown."""
    lead, sections = _split(found if isinstance(found, str) else inspect.getdoc(found) or "")
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
    """Part a google docstring into what it says first and its sections."""
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
    return "\n".join(lead).strip(), {name: inspect.cleandoc("\n" + "\n".join(told)) for name, told in sections.items()}


def _entries(section: str) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if (entry := ENTRY.fullmatch(line)) and not line.startswith(" "):
            name, found[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def _parted(text: str) -> tuple[str, str]:
    """Part a text from the source it cites."""
    before, found, source = text.partition("Source: ")
    return before.strip(), source.strip() if found else ""


def _prose(text: str) -> str:
    """Escape what Markdown would take for more than text, join lines, and link papers."""
    spans = re.split(r"(`[^`]*`)", text)
    spans[::2] = [re.sub(r"([*<>])", r"\\\1", span) for span in spans[::2]]
    paragraphs = [" ".join(part.split()) for part in "".join(spans).strip().split("\n\n")]
    linked = PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", "\n\n".join(paragraphs))
    return linked + "\n"


def _value(default: Any) -> str:
    """Write a default as `-o` takes it."""
    if isinstance(default, tuple):
        return f"[{','.join(map(_value, default))}]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default) or '""'


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *([_prose(cell).strip().replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n\n"


if __name__ == "__main__":
    main()
