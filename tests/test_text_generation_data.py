"""The data of text generation: formats, tokens and labels, by TRL's SFTTrainer and by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from helpers import assert_mentions
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from regraft import Task
from regraft.errors import DataError
from regraft.task import TaskData, read_task
from regraft.task.columns import list_columns
from regraft.task.types.chat_encoding import encode_example, encode_prompt, find_stop_ids
from regraft.task.types.conversation import read_example

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TEMPLATES_WITH_MARKS = ("qwen3_training", "llama3_training", "gemma_training", "qwen2_5_training")
TEMPLATES_WITHOUT_MARKS = ("qwen3", "llama3", "gemma", "qwen2_5", "phi3")
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>"]
SPECIAL_TOKENS += ["<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>"]

USER, ASSISTANT = ({"role": role, "content": content} for role, content in (("user", "Hi"), ("assistant", "Hello!")))
SECOND_USER, SECOND_ASSISTANT = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Nothing more."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
CHATS = [
    [USER, ASSISTANT],
    [USER, ASSISTANT, SECOND_USER, SECOND_ASSISTANT],
    [USER, {"role": "assistant", "content": "x" * 80}],
]
CALLS = [USER, CALL, {"role": "tool", "name": "add", "content": "3"}, {"role": "assistant", "content": "It is 3."}]


def make_tokenizer(template: str | None = None, *, has_bos: bool = False) -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes, with the special tokens of common chat templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", *SPECIAL_TOKENS)])
    if has_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = template and (TEMPLATES / f"{template}.jinja").read_text()
    return fast


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
    """Write rows as JSON lines."""
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_rows(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> TaskData:
    """Read rows as train and dev of a task."""
    file = str(write_rows(folder, rows))
    values = {"type": "text-generation", "name": "t", "train": file, "dev": file, **keys}
    return read_task(Task.from_mapping(values, "test"))


def encode_by_trl(rows: list[dict[str, Any]], tokenizer: Any, max_length: int = 1024, **settings: Any) -> list[Any]:
    """Return the token ids and labels of rows that TRL's SFTTrainer trains on; it drops rows without labels."""
    trainer = trl.SFTTrainer.__new__(trl.SFTTrainer)
    trainer._tokenizer, trainer.chat_template = tokenizer, None
    trainer.completion_only_loss = settings.get("completion_only_loss", "prompt" in rows[0])
    arguments = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=settings.get("assistant_only_loss", False),
        max_length=max_length,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    dataset = trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, arguments, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in dataset]


def encode(data: TaskData, tokenizer: Any, max_length: int = 1024) -> list[Any]:
    """Return the token ids and labels of the training examples that have labels, in TRL's form."""
    examples = data.task.encode(data.train, tokenizer, 0, max_length)
    rows = []
    targets = iter(examples.targets.tolist())
    for ids, tokens in zip(examples.columns["input_ids"], examples.tokens, strict=True):
        labels = [-100] * len(ids)
        for token in tokens:
            labels[token + 1] = next(targets)
        if tokens:
            rows.append((ids, labels))
    assert next(targets, None) is None
    return rows


def without_first_label(rows: list[Any]) -> list[Any]:
    """Remove the label of the first token, for which transformers computes no loss either."""
    return [(ids, [-100, *labels[1:]]) for ids, labels in rows]


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("max_length", [1024, 20])
def test_plain_texts_are_encoded_as_by_trl(tmp_path: Path, has_bos: bool, max_length: int) -> None:
    tokenizer = make_tokenizer(has_bos=has_bos)
    texts = [{"text": text} for text in ("A text.", "It ends.</s>", "A longer text than the others")]
    data = read_rows(tmp_path, texts)
    assert data.labelled
    assert encode(data, tokenizer, max_length) == without_first_label(encode_by_trl(texts, tokenizer, max_length))
    pairs = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in (("2+2=", "4"), ("Once", " upon a time</s>"), ("A prompt of many letters", " no"))
    ]
    data = read_rows(tmp_path, pairs)
    assert encode(data, tokenizer, max_length) == encode_by_trl(pairs, tokenizer, max_length)
    data = read_rows(tmp_path, pairs, train_on="all")
    expected = encode_by_trl(pairs, tokenizer, max_length, completion_only_loss=False)
    assert encode(data, tokenizer, max_length) == without_first_label(expected)


@pytest.mark.parametrize("template", TEMPLATES_WITH_MARKS)
@pytest.mark.parametrize("max_length", [1024, 60])
def test_marked_conversations_are_encoded_as_by_trl(tmp_path: Path, template: str, max_length: int) -> None:
    tokenizer = make_tokenizer(template)
    rows = [{"messages": chat} for chat in CHATS]
    data = read_rows(tmp_path, rows)
    assert encode(data, tokenizer, max_length) == encode_by_trl(rows, tokenizer, max_length, assistant_only_loss=True)
    assert {example.masking for example in data.task._encode_rows(data.train, tokenizer)} == {"marks"}
    data = read_rows(tmp_path, rows, train_on="all")
    assert encode(data, tokenizer, max_length) == without_first_label(encode_by_trl(rows, tokenizer, max_length))


@pytest.mark.parametrize("template", TEMPLATES_WITHOUT_MARKS)
def test_conversational_completions_are_encoded_as_by_trl(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(template)
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS]
    rows.append({"prompt": [USER], "completion": [ASSISTANT, SECOND_USER, SECOND_ASSISTANT]})
    assert encode(read_rows(tmp_path, rows), tokenizer) == encode_by_trl(rows, tokenizer)
    data = read_rows(tmp_path, rows, train_on="all")
    assert encode(data, tokenizer) == without_first_label(encode_by_trl(rows, tokenizer, completion_only_loss=False))


@pytest.mark.parametrize("template", ["qwen3_training", "qwen2_5_training"])
def test_tool_calls_are_encoded_as_by_trl(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(template)
    rows = [{"messages": CALLS, "tools": TOOLS}, {"messages": CALLS[:2], "tools": TOOLS}]
    data = read_rows(tmp_path, rows)
    # TRL takes the tools as JSON as well, which Arrow does not fill with missing keys
    expected = encode_by_trl([{**row, "tools": json.dumps(TOOLS)} for row in rows], tokenizer, assistant_only_loss=True)
    assert encode(data, tokenizer) == expected
    assert data.train.targets.tolist() == ["It is 3.", CALL]
    assert data.train.inputs[0]["tools"] == TOOLS


@pytest.mark.parametrize(("template", "marked"), [("llama3", "llama3_training"), ("gemma", "gemma_training")])
def test_turns_without_marks_are_found_by_prefixes(tmp_path: Path, template: str, marked: str) -> None:
    data = read_rows(tmp_path, [{"messages": chat} for chat in CHATS])
    tokenizer = make_tokenizer(template)
    examples = data.task._encode_rows(data.train, tokenizer)
    assert {example.masking for example in examples} == {"prefixes"}
    for example, marks in zip(examples, data.task._encode_rows(data.train, make_tokenizer(marked)), strict=True):
        assert example.ids == marks.ids
        missing = [is_label for is_label, mark in zip(example.is_label, marks.is_label, strict=True) if mark]
        assert all(missing)  # what follows the end of a turn, such as a line break, is a label as well
        others = [
            token for token, a, b in zip(example.ids, example.is_label, marks.is_label, strict=True) if a and not b
        ]
        assert tokenizer.decode(others).strip() == ""


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_turn(tmp_path: Path, caplog) -> None:
    thinking = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"}
    data = read_rows(tmp_path, [{"messages": [USER, thinking, SECOND_USER, SECOND_ASSISTANT]}, {"messages": CHATS[0]}])
    tokenizer = make_tokenizer("qwen3")
    examples = data.task._encode_rows(data.train, tokenizer)
    assert [example.masking for example in examples] == ["last turn", "prefixes"]
    labels = [token for token, is_label in zip(examples[0].ids, examples[0].is_label, strict=True) if is_label]
    assert tokenizer.decode(labels).endswith("Nothing more.<|im_end|>\n")
    assert "Hello" not in tokenizer.decode(labels)
    data.task.encode(data.train, tokenizer, 0, 1024)
    assert "of 1 of 2 conversations of train, the last turn alone is learnt" in caplog.text


@pytest.mark.parametrize("template", [*TEMPLATES_WITHOUT_MARKS, *TEMPLATES_WITH_MARKS])
def test_prompts_are_prefixes_of_examples(tmp_path: Path, template: str) -> None:
    data = read_rows(tmp_path, [{"messages": chat} for chat in CHATS])
    tokenizer = make_tokenizer(template)
    prompts = data.task.encode_prompts(data.train, tokenizer, 1024)
    examples = data.task.encode(data.train, tokenizer, 0, 1024)
    for prompt, ids in zip(prompts, examples.columns["input_ids"], strict=True):
        assert ids[: len(prompt)] == prompt
    shortened = data.task.encode_prompts(data.train, tokenizer, 12)
    assert shortened == [prompt[-12:] for prompt in prompts]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("qwen3", "<|im_end|>"),
        ("qwen3_training", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("phi3", "<|end|>"),
        (None, "</s>"),
    ],
)
def test_answers_end_with_the_turn_or_the_text(tmp_path: Path, template: str | None, end: str) -> None:
    tokenizer = make_tokenizer(template)
    stop_ids = find_stop_ids(tokenizer)
    assert stop_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    task = read_rows(tmp_path, [{"messages": CHATS[0]}]).task
    assert task.stop_ids(tokenizer) == stop_ids
    assert task.decode_answer(tokenizer(f" Hello! \n{end}")["input_ids"], tokenizer) == "Hello!"


def test_a_tokenizer_that_ends_texts_does_not_end_prompts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    pairs = [{"prompt": "2+2=", "completion": "4"}]
    data = read_rows(tmp_path, pairs)
    assert data.task.encode_prompts(data.train, tokenizer, 9) == [tokenizer("2+2=")["input_ids"][:-1]]
    assert encode(data, tokenizer) == encode_by_trl(pairs, tokenizer)


MESSAGES = [SYSTEM, USER]


@pytest.mark.parametrize(
    ("row", "inputs", "answer"),
    [
        ({"messages": [*MESSAGES, ASSISTANT]}, {"messages": MESSAGES}, "Hello!"),
        ({"messages": json.dumps([*MESSAGES, ASSISTANT])}, {"messages": MESSAGES}, "Hello!"),
        ({"messages": MESSAGES}, {"messages": MESSAGES}, None),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
            {"messages": [USER]},
            "Hello!",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
                "system": "Be brief.",
            },
            {"messages": MESSAGES},
            "Hello!",
        ),
        (
            {"messages": [{**USER, "id": 3, "content": [{"type": "text", "text": "Hi"}]}, {**ASSISTANT, "name": None}]},
            {"messages": [USER]},
            "Hello!",
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "text": "…"},
            {"messages": [{"role": "user", "content": "Add.\n1 2"}], "prompt_turns": 1},
            "3",
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Hello!", "system": "Be brief."},
            {"messages": MESSAGES, "prompt_turns": 2},
            "Hello!",
        ),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "b"),
        ({"prompt": "a", "completion": '[{"a": 1}]'}, {"prompt": "a"}, '[{"a": 1}]'),
        ({"prompt": '[{"a": 1}]', "completion": "b"}, {"prompt": '[{"a": 1}]'}, "b"),
        ({"prompt": "a"}, {"prompt": "a"}, None),
        ({"prompt": MESSAGES, "completion": [ASSISTANT]}, {"messages": MESSAGES, "prompt_turns": 2}, "Hello!"),
        ({"prompt": MESSAGES}, {"messages": MESSAGES, "prompt_turns": 2}, None),
        ({"text": "a"}, {"text": "a"}, ""),
    ],
)
def test_formats_have_one_normal_form(tmp_path: Path, row: dict[str, Any], inputs: Any, answer: Any) -> None:
    data = read_rows(tmp_path, [row, row])
    assert data.train.inputs == [inputs, inputs]
    assert data.train.targets.tolist() == [answer, answer]
    assert data.labelled == (answer is not None)
    json.dumps(data.train.inputs)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", "dataset"])
def test_every_source_is_read(tmp_path: Path, suffix: str) -> None:
    rows = [{"messages": chat} for chat in CHATS]
    file = tmp_path / f"train{suffix}"
    source: Any = str(file)
    if suffix in (".csv", ".tsv"):
        with file.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([["messages"], *([json.dumps(chat)] for chat in CHATS)])
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif suffix == "dataset":
        Dataset.from_list(rows).save_to_disk(str(file))
        source = {"dataset": str(file), "split": "train"}
    else:
        file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    task = Task.from_mapping({"type": "text-generation", "name": "t", "train": source, "dev": source}, "test")
    assert list_columns(task.train) == ["messages"]
    data = read_task(task)
    assert data.train.inputs == [{"messages": chat[:-1]} for chat in CHATS]


def test_columns_are_named_by_keys(tmp_path: Path) -> None:
    row = {"question": "a", "reply": "b", "text": "c", "messages": CHATS[0]}
    data = read_rows(tmp_path, [row, row], prompt="question", completion="reply")
    assert (data.train.inputs[0], data.train.targets[0], data.labelled) == ({"prompt": "a"}, "b", True)
    data = read_rows(tmp_path, [row, row], prompt="question")
    assert (data.train.targets[0], data.labelled) == (None, False)
    data = read_rows(tmp_path, [row, row], text="reply")
    assert data.train.inputs[0] == {"text": "b"}
    data = read_rows(tmp_path, [{"prompt": "a", "completion": "b"}], completion=None)
    assert not data.labelled
    # a `prompt` without completion beside conversations, as in UltraChat
    data = read_rows(tmp_path, [{"prompt": "a", "messages": CHATS[0]}])
    assert data.train.inputs[0] == {"messages": [USER]}


@pytest.mark.parametrize(
    ("rows", "keys", "phrases"),
    [
        ([{"messages": "Hi"}], {}, ["train.jsonl, row 1", "expected a list of messages", "'Hi'"]),
        ([{"messages": CHATS[0]}, {"messages": []}], {}, ["row 2", "empty"]),
        ([{"messages": CHATS[0]}, {"messages": None}], {}, ["row 2", "expected a list of messages", "None"]),
        ([{"messages": [{"content": "Hi"}]}], {}, ["row 1", "message 1", "without `role`"]),
        ([{"messages": [{"role": "user"}]}], {}, ["row 1", "message 1", "is empty"]),
        ([{"messages": [{"role": "user", "content": " "}]}], {}, ["row 1", "message 1", "is empty"]),
        ([{"messages": [USER, {"role": "robot", "content": "a"}]}], {}, ["message 2", "'robot'", "assistant"]),
        ([{"messages": [USER, {"role": "assistant", "content": 3}]}], {}, ["message 2", "3", "not a text"]),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], {}, ["message 1", "not a text"]),
        ([{"messages": [ASSISTANT]}], {}, ["row 1", "before the user"]),
        ([{"messages": CHATS[0]}, {"messages": [USER]}], {}, ["row 2", "no turn of the assistant"]),
        ([{"messages": [{"role": "user", "content": "\ud800"}]}], {}, ["row 1", "message 1", "Unicode"]),
        ([{"prompt": "\ud800", "completion": "a"}], {}, ["row 1", "'prompt'", "Unicode"]),
        ([{"prompt": "a", "completion": ""}], {}, ["row 1", "'completion'", "nothing"]),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], {}, ["row 2", "no answer"]),
        ([{"prompt": "a", "completion": [ASSISTANT]}], {}, ["row 1", "two texts, or two lists"]),
        ([{"prompt": [USER], "completion": "b"}], {}, ["row 1", "two texts, or two lists"]),
        ([{"prompt": [USER], "completion": [USER]}], {}, ["row 1", "does not end with a turn of the assistant"]),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ASSISTANT]}],
            {},
            ["row 2", "is messages", "Use the same form"],
        ),
        ([{"messages": CHATS[0]}, {"prompt": "a", "completion": "b"}], {}, ["several formats", "`messages: messages`"]),
        ([{"question": "a"}], {}, ["no columns", "`prompt` and `completion`", "question"]),
        ([{"messages": CHATS[0], "tools": "no"}], {}, ["row 1", "list of JSON schemas", "'no'"]),
        ([{"text": "a"}], {"system_prompt": "b"}, ["row 1", "Leave `system_prompt` out"]),
        ([{"text": "a"}] * 2, {"prompt": "c"}, ["no column 'c'"]),
        ([{"text": "a"}], {"pattern": "("}, ["'pattern'", "not a regular expression"]),
        ([{"text": "a"}], {"train_on": "user"}, ["'train_on'", "assistant or all"]),
    ],
)
def test_invalid_data_are_named(tmp_path: Path, rows: list[dict[str, Any]], keys: dict[str, Any], phrases: list[str]):
    with pytest.raises(DataError) as error:
        read_rows(tmp_path, rows, **keys)
    assert_mentions(error, *phrases)


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    data = read_rows(tmp_path, [{"messages": CHATS[0]}])
    with pytest.raises(DataError) as error:
        data.task.encode(data.train, make_tokenizer(), 0, 64)
    assert_mentions(error, "train.jsonl, row 1", "no chat template", "`template`")
    data = read_rows(tmp_path, [{"messages": [USER, SECOND_USER, ASSISTANT]}])
    with pytest.raises(DataError) as error:
        data.task.encode(data.train, make_tokenizer("gemma"), 0, 64)
    assert_mentions(error, "row 1", "chat template does not take", "alternate")
    (tmp_path / "template.jinja").write_text((TEMPLATES / "qwen3.jinja").read_text())
    (tmp_path / "t.yaml").write_text(
        "type: text-generation\ntrain: train.jsonl\ntemplate: template.jinja\nkeep: keep.txt\nlm_eval: [a, b.yaml]\n"
    )
    task = Task.load(tmp_path / "t.yaml")
    assert (task.keep, task.lm_eval) == (str(tmp_path / "keep.txt"), ("a", str(tmp_path / "b.yaml")))
    assert task.chat_template == ("file", (TEMPLATES / "qwen3.jinja").read_text())
    tokenizer = make_tokenizer("qwen3")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in task.stop_ids(tokenizer)


def test_turns_after_the_answer_are_left_out(tmp_path: Path, caplog) -> None:
    data = read_rows(tmp_path, [{"messages": CHATS[0]}, {"messages": [USER, ASSISTANT, SECOND_USER]}])
    assert data.train.inputs == [{"messages": [USER]}] * 2
    assert data.train.targets.tolist() == ["Hello!"] * 2
    assert "1 of 2 conversations do not end with a turn of the assistant" in caplog.text


def test_examples_without_labels_have_no_rows(tmp_path: Path, caplog) -> None:
    pairs = [{"prompt": "a" * 20, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    data = read_rows(tmp_path, pairs)
    examples = data.task.encode(data.train, make_tokenizer(), 0, 10)
    assert examples.tokens == [[], [0, 1]]
    assert [len(ids) for ids in examples.columns["input_ids"]] == [10, 3]
    assert "1 of 2 examples of train have no answer within 10 tokens" in caplog.text
    data = read_rows(tmp_path, [{"messages": [SYSTEM, USER]}])
    tokenizer = make_tokenizer("qwen3")
    examples = data.task.encode(data.train, tokenizer, 0, 1024)
    assert examples.tokens == [[]]
    assert examples.columns["input_ids"] == data.task.encode_prompts(data.train, tokenizer, 1024)


def test_a_system_prompt_is_put_in_front(tmp_path: Path) -> None:
    data = read_rows(tmp_path, [{"messages": CHATS[0]}, {"messages": [SYSTEM, *CHATS[0]]}], system_prompt="Rhyme.")
    first = [{"role": "system", "content": "Rhyme."}, USER]
    assert data.train.inputs == [{"messages": first}, {"messages": [SYSTEM, USER]}]


def test_hooks(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{number} is", "completion": "even" if number % 2 == 0 else "odd"} for number in range(20)]
    data = read_rows(tmp_path, pairs)
    task = data.task
    strata, names = task.strata(data.train.targets, ())
    assert names == ["even", "odd"]
    assert strata.tolist() == [0, 1] * 10
    assert sorted(data.few_shot(4, 0).train.targets.tolist()) == ["even", "even", "odd", "odd"]
    unlike = read_rows(tmp_path, [{"prompt": "a", "completion": str(number)} for number in range(20)])
    assert unlike.task.strata(unlike.train.targets, ())[1] == ["examples"]
    predictions = [{"answer": "even", "ended": True}, {"answer": ""}]
    assert task.as_targets(predictions).tolist() == ["even", ""]
    assert task.right(data.train.targets[:2], predictions) == [True, False]
    assert task.describe(CALL, ()) == json.dumps(CALL["tool_calls"])
    assert task.describe(predictions[1], ()) == ""
    assert task.as_text({"messages": [SYSTEM, USER]}) == "system: Be brief.\nuser: Hi"
    assert task.count_words({"messages": [SYSTEM, USER]}) == 3
    assert task.as_inputs("a") == {"prompt": "a"}
    assert data.digest() == read_rows(tmp_path, pairs).digest() != read_rows(tmp_path, pairs, train_on="all").digest()
    with pytest.raises(DataError, match="linear probe"):
        task.linear_probe()


contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(contents, contents), min_size=1, max_size=3), st.sampled_from(TEMPLATES_WITHOUT_MARKS))
def test_labels_of_any_conversation_are_its_answers(turns: list[tuple[str, str]], template: str) -> None:
    tokenizer = TOKENIZERS[template]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    inputs, answer = read_example({"messages": messages}, None)
    example = encode_example(inputs, answer, tokenizer)
    assert example.ids == tokenizer.apply_chat_template(messages)["input_ids"]
    learnt = tokenizer.decode(
        [token for token, is_label in zip(example.ids, example.is_label, strict=True) if is_label]
    )
    answers = [answer for _, answer in turns][-1 if example.masking == "last turn" else 0 :]
    for text in answers:
        assert text.strip() in learnt
    prompt = encode_prompt(inputs, tokenizer)
    assert example.ids[: len(prompt)] == prompt
    assert not any(example.is_label[: len(prompt)]) or example.masking == "prefixes"
    assert all(example.is_label[len(prompt) :])


TOKENIZERS = {template: make_tokenizer(template) for template in TEMPLATES_WITHOUT_MARKS}
