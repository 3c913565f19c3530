"""The documentation: generated pages equal the code, links resolve, and shown commands and code run."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from helpers import make_sentence, write_base, write_upgrade
from transformers import AutoTokenizer

from regraft.task import Task
from regraft.task.types import Likelihood
from regraft.task.types.task_views import TaskViews

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = sorted((DOCS / "guides").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
QUICK_OPTIONS = "--steps 60 --learning-rate 3e-3 --eval-every 20"  # enough for a tiny base to learn the task
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {{ eos_token }} {% endfor %}"
SHELL_CHARACTERS = set("|&;<>$*?")  # commands with these need a shell


def format_path(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read_prose(page: Path) -> str:
    """Read a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def read_anchors(page: Path) -> set[str]:
    """Return the anchors that links to a page can have: headings as MkDocs and GitHub name them, and ids."""
    text = read_prose(page)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
    return slugs | set(re.findall(r'id="([^"]+)"', text))


def test_generated_pages_equal_the_code():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, text in generate.pages().items():
        committed = (DOCS / name).read_text(encoding="utf-8")
        assert committed == text, f"docs/{name} differs from the code: run python docs/generate.py"


def test_the_page_on_task_types_names_all_that_a_type_defines():
    page = read_prose(DOCS / "how-to-add-a-task-type.md")
    owners = (Task, TaskViews, Likelihood)
    names = {name for owner in owners for name in {**vars(owner), **owner.__annotations__} if name[0] != "_"}
    inherited = {"load", "from_mapping", "type_name", "scoring"}  # no type overrides these
    missing = {name for name in names - inherited if f"`{name}`" not in page and not name.startswith("model_")}
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=format_path)
def test_links_have_existing_targets(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read_prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.name == "README.md" and target.parent.parent == ROOT / "experiments" and not target.exists():
            target = target.parent.with_suffix(".py")  # the experiment has no results yet
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in read_anchors(target), f"{page.name}: {link}"


def test_the_navigation_names_every_page():
    def list_files(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [name for child in children for name in list_files(child)]

    nav = list_files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def read_explained_keys() -> set[str]:
    return set(re.findall(r"`([\w.]+)`", (DOCS / "file-formats.md").read_text(encoding="utf-8")))


def test_every_key_of_a_file_is_explained():
    from regraft import Comparison, Diagnosis, Task
    from regraft.chain import Chain, ChainRow
    from regraft.methods import Row

    keys = {field.name for record in (Comparison, Row, Diagnosis, ChainRow) for field in dataclasses.fields(record)}
    assert keys | set(Task.model_fields) | set(Chain.model_fields) <= read_explained_keys()


def split_commands(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def run_block(block: str, monkeypatch) -> list[Path]:
    """Run a block of shell as a user would, with fewer steps, and return the paths after its `--out`."""
    from regraft.cli import main

    commands = [re.sub(r"--steps \d+", QUICK_OPTIONS, command) for command in split_commands(block)]
    if not all(command.startswith("regraft ") and not SHELL_CHARACTERS & set(command) for command in commands):
        subprocess.run(["bash", "-euc", block], check=True)
        return []
    paths = []
    for command in commands:
        words = shlex.split(command)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as error:
            main()
        assert error.value.code in (0, None), command
        paths += [Path(path) for option, path in itertools.pairwise(words) if option == "--out"]
    return paths


def write_chats(folder: Path) -> None:
    """Write two chat models, and conversations in which an assistant names the mood of a sentence."""
    old = write_base(folder / "bases/old", "llama")
    tokenizer = AutoTokenizer.from_pretrained(old)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(old)
    write_upgrade(old, folder / "bases/new", 0.02)
    rng = random.Random(0)
    rows = []
    for index in range(300):
        turns = (make_sentence(rng, index % 2 == 0), "good" if index % 2 == 0 else "bad")
        roles = ("user", "assistant")
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
        rows.append(json.dumps({"messages": messages}) + "\n")
    (folder / "chats.jsonl").write_text("".join(rows))


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guides_run_from_beginning_to_end(guide, tmp_path, bases, task_file, monkeypatch):
    if guide.stem == "generation":
        write_chats(tmp_path)
    else:
        for name, base in zip(("old", "new"), bases["bert"], strict=True):
            shutil.copytree(base, tmp_path / "bases" / name)
        for file in task_file.parent.iterdir():
            shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    text = guide.read_text(encoding="utf-8")
    paths = []
    for language, block in FENCE.findall(text):
        if language == "sh":
            paths += run_block(block, monkeypatch)
        elif language == "python":
            with warnings.catch_warnings():  # a user sees these warnings, which pytest makes errors
                warnings.simplefilter("ignore")
                exec(block, {})
    assert paths
    paths += [Path(name) for name in re.findall(r"`((?:runs|bases)/[\w./-]+)`", read_prose(guide))]
    for path in paths:
        assert path.exists(), path
    for outcome in Path("runs").rglob("outcome.json"):
        assert set(json.loads(outcome.read_text(encoding="utf-8"))) <= read_explained_keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "file"),
    [
        ("how-to-add-a-method.md", "src/regraft/methods/clipped.py"),
        ("how-to-add-a-task-type.md", "src/regraft/task/types/text_count.py"),
    ],
)
def test_the_example_of_a_page_passes_its_own_tests(tmp_path, page, file):
    text = (DOCS / page).read_text(encoding="utf-8")
    example, tests = (block for language, block in FENCE.findall(text) if language == "python")
    assert f"`{file}`" in text
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / file).write_text(example, encoding="utf-8")
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "helpers.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path / "tests")
    (tmp_path / "tests/test_example.py").write_text(tests, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout


def test_the_page_of_architectures_lists_those_of_test_contract():
    from test_contract import ARCHITECTURES

    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", page, flags=re.MULTILINE)
    assert rows == [(name, row.head) for name, row in ARCHITECTURES.items()]
