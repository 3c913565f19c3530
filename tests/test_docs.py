"""The documentation: generated pages are what the code says, links lead somewhere, and what is shown really runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = sorted((DOCS / "guides").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUICK = "--steps 60 --learning-rate 3e-3 --eval-every 20"  # what teaches a tiny base the task
SHELL = set("|&;<>$*?")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The places in a page that a link can name: headings as MkDocs and GitHub name them, and ids."""
    text = prose(page)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r'id="([^"]+)"', text))


def test_generated_pages_are_what_the_code_says():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, text in generate.pages().items():
        found = (DOCS / name).read_text(encoding="utf-8")
        assert found == text, f"docs/{name} is not what the code says now: run python docs/generate.py"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.name == "README.md" and target.parent.parent == ROOT / "experiments" and not target.exists():
            target = target.parent.with_suffix(".py")  # its results are still to be made
        assert target.exists(), f"{page.name}: {link}"
        assert not place or place in anchors(target), f"{page.name}: {link}"


def test_the_navigation_names_every_page():
    def files(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in files(part)]

    nav = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def explained() -> set[str]:
    return set(re.findall(r"`([\w.]+)`", (DOCS / "file-formats.md").read_text(encoding="utf-8")))


def test_every_key_of_a_file_is_explained():
    from regraft import Comparison, Diagnosis, Task
    from regraft.chain import Chain, ChainRow
    from regraft.methods import Row

    keys = {field.name for record in (Comparison, Row, Diagnosis, ChainRow) for field in dataclasses.fields(record)}
    assert keys | set(Task.model_fields) | set(Chain.model_fields) <= explained()


def commands_of(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def run_block(block: str, monkeypatch) -> list[Path]:
    """Run a block of shell as a user would, with fewer steps; give the places that its commands name with --out."""
    from regraft.cli import main

    commands = [re.sub(r"--steps \d+", QUICK, command) for command in commands_of(block)]
    if not all(command.startswith("regraft ") and not SHELL & set(command) for command in commands):
        subprocess.run(["bash", "-euc", block], check=True)
        return []
    places = []
    for command in commands:
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None), command
        places += [Path(words[at + 1]) for at, word in enumerate(words) if word == "--out"]
    return places


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guides_run_from_beginning_to_end(guide, tmp_path, bases, task_file, monkeypatch):
    for name, base in zip(("old", "new"), bases["bert"], strict=True):
        shutil.copytree(base, tmp_path / "bases" / name)
    for file in task_file.parent.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    text = guide.read_text(encoding="utf-8")
    places = []
    for language, block in FENCE.findall(text):
        if language == "sh":
            places += run_block(block, monkeypatch)
        elif language == "python":
            with warnings.catch_warnings():  # of what the libraries warn of, a user sees the message
                warnings.simplefilter("ignore")
                exec(block, {})
    assert places
    places += [Path(name) for name in re.findall(r"`((?:runs|bases)/[\w./-]+)`", prose(guide))]
    for place in places:
        assert place.exists(), place
    for outcome in Path("runs").rglob("outcome.json"):
        assert set(json.loads(outcome.read_text(encoding="utf-8"))) <= explained()


@pytest.mark.slow
def test_the_example_method_passes_its_own_tests(tmp_path):
    method, tests = (block for language, block in FENCE.findall((DOCS / "how-to-add-a-method.md").read_text("utf-8"))
                     if language == "python")  # fmt: skip
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src/regraft/methods/clipped.py").write_text(method, encoding="utf-8")
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "helpers.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path / "tests")
    (tmp_path / "tests/test_clipped.py").write_text(tests, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout


def test_the_page_of_architectures_names_the_rows_of_the_table():
    from test_contract import ARCHITECTURES

    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", page, flags=re.MULTILINE)
    assert rows == [(name, row.head) for name, row in ARCHITECTURES.items()]
