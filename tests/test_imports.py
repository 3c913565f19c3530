"""Layers of the package, from which a subpackage imports only lower ones, cycles of imports, and file lengths."""

import ast
from pathlib import Path

import regraft

PACKAGE = Path(regraft.__file__).parent
LAYERS = (
    ("errors", "progress", "printable"),
    ("checkpoint", "task"),
    ("weights", "transformers_folder", "recipe"),
    ("architecture", "vocabulary"),
    ("naming", "base_tokens"),
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
"""Subpackages and modules of regraft from the lowest layer to the highest."""
LAYER_INDEX = {subpackage: index for index, subpackages in enumerate(LAYERS) for subpackage in subpackages}
MAX_LINES = 350  # what a reader can take in at once


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def read_imports() -> dict[str, set[str]]:
    """Return the modules of the package that each module imports, at the top, in functions and for type checking."""
    files = {module_name(file): file for file in PACKAGE.rglob("*.py")}
    imports: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "regraft":
                continue
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                imports[name].add(submodule if submodule in files else str(node.module))
    return imports


def subpackage_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "regraft"


def test_a_subpackage_imports_only_from_lower_layers():
    imports = read_imports()
    assert len(imports) > 100
    upward_imports = []
    for name, imported_modules in imports.items():
        for imported in imported_modules:
            importer, source = subpackage_of(name), subpackage_of(imported)
            if source != importer and LAYER_INDEX[source] >= LAYER_INDEX[importer]:
                upward_imports.append(f"{name} imports {imported}")
    assert not upward_imports


def test_no_module_imports_itself_through_others():
    imports = read_imports()
    for start in imports:
        reached: set[str] = set()
        pending = list(imports[start])
        while pending:
            module = pending.pop()
            if module not in reached:
                reached.add(module)
                pending += imports[module]
        assert start not in reached, start


def test_no_file_has_more_than_the_maximum_of_lines():
    lengths = {file.name: file.read_text(encoding="utf-8").count("\n") for file in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
