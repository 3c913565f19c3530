"""The house: a room imports only from floors below its own, for type checking too; no file outgrows a reader."""

import ast
from pathlib import Path

import regraft

PACKAGE = Path(regraft.__file__).parent
FLOORS = (
    ("errors", "progress", "printable"),
    ("checkpoint", "task"),
    ("weights", "transformers_folder", "recipe"),
    ("architecture", "vocabulary"),
    ("naming",),
    ("base",),
    ("upgrade",),
    ("adaptation",),
    ("model",),
    ("tuning",),
    ("methods", "diagnosis"),
    ("chain", "demo"),
    ("report",),
    ("cli", "regraft"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def read_imports() -> dict[str, set[str]]:
    """The modules of the package, by those that import them, whether at the top or inside a function."""
    files = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    modules: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "regraft":
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                modules[name] |= {module if module in files else str(node.module) for module in inner}
    return modules


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "regraft"


def test_a_room_imports_from_floors_below():
    modules = read_imports()
    assert len(modules) > 100
    upward = [
        f"{name} imports {imported}"
        for name, imports in modules.items()
        for imported in imports
        if room_of(imported) != room_of(name) and FLOOR[room_of(imported)] >= FLOOR[room_of(name)]
    ]
    assert not upward


def test_no_module_imports_itself_through_others():
    modules = read_imports()
    for start in modules:
        reached = set()
        ahead = list(modules[start])
        while ahead:
            if (module := ahead.pop()) not in reached:
                reached.add(module)
                ahead += modules[module]
        assert start not in reached, start


def test_no_file_has_more_lines_than_are_read_at_once():
    lengths = {file.name: file.read_text(encoding="utf-8").count("\n") for file in PACKAGE.rglob("*.py")}
    assert {name: count for name, count in lengths.items() if count > 350} == {}
