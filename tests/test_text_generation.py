"""The data of text generation: formats, tokens and losses against TRL's SFTTrainer, prompts, answers and bad rows."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import assert_mentions
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import regraft
from regraft import Base, Recipe, Task
from regraft.adaptation import fresh_model
from regraft.errors import DataError
from regraft.model import Deployment
from regraft.model.answers import answer_settings, encode_prompts, generate_answers
from regraft.task import TaskData, read_task
from regraft.task.types.chat_encoding import encode_prompt, find_stop_ids

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
WITH_MARKS = ("qwen3_training", "llama3_training", "gemma_training")
WITHOUT_MARKS = ("qwen3", "llama3", "gemma", "qwen2_5", "phi3")
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"]
SPECIAL_TOKENS += ["<|end_header_id|>", "<|end|>", "<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>"]
CORPUS = ["playing and saying", "Hello! Nothing more.", "Question? Answer.", "user assistant system"]

USER, ASSISTANT = ({"role": role, "content": content} for role, content in (("user", "Hi"), ("assistant", "Hello!")))
SECOND_USER, SECOND_ASSISTANT = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Nothing more."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
}
CALLS = [USER, CALL, {"role": "tool", "name": "add", "content": "3"}, {"role": "assistant", "content": "It is 3."}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
LONG = {"role": "assistant", "content": "ab" * 40}
CHATS = [[USER, ASSISTANT], [USER, ASSISTANT, SECOND_USER, SECOND_ASSISTANT], [SYSTEM, USER, LONG]]
CHATS_WITHOUT_SYSTEM = [*CHATS[:2], [USER, LONG]]
PAIRS = [
    {"prompt": prompt, "completion": completion}
    for prompt, completion in (
        ("I am play", "ing"),
        ("2+2=", "4"),
        ("Once", " upon a time</s>"),
        ("A long prompt", " no"),
    )
]


@functools.cache
def make_tokenizer(template: str | None = None, *, has_bos: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that merges across words, and give it one of TRL's chat templates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, min_frequency=1, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    if has_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = template and (TEMPLATES / f"{template}.jinja").read_text()
    fast.model_max_length = 2048
    return fast


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory):
    """Return a function that writes a tiny random Llama with a tokenizer."""

    @functools.cache
    def write(template: str | None = None, *, has_bos: bool = False) -> Base:
        folder = tmp_path_factory.mktemp("base")
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = LlamaConfig(vocab_size=400, max_position_embeddings=2048, eos_token_id=1, pad_token_id=1, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
        make_tokenizer(template, has_bos=has_bos).save_pretrained(folder)
        return Base.open(folder)

    return write


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
    """Write rows as JSON lines."""
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_rows(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> TaskData:
    """Read rows as train and dev of a task."""
    file = str(write_rows(folder, rows))
    values = {"type": "text-generation", "name": "t", "train": file, "dev": file, "metric": "loss", **keys}
    return read_task(Task.from_mapping(values, "test"))


def train_with_trl(folder: Path, rows: list[dict[str, Any]], base: Base, max_length: int, **options: Any) -> Any:
    """Return the token ids and labels that TRL's SFTTrainer makes of rows, and its loss on one batch of all of them."""
    options = {"completion_only_loss": None, "assistant_only_loss": False, **options}
    config = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        max_length=max_length,
        per_device_eval_batch_size=64,
        eos_token=None,
        **options,
    )
    model = LlamaForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    rows = [{**row, "tools": json.dumps(row["tools"])} if "tools" in row else row for row in rows]
    dataset = datasets.Dataset.from_list(rows)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base.path)
    trainer = trl.SFTTrainer(model, config, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer)
    expected = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    return expected, trainer.evaluate()["eval_loss"]


def labelled_rows(data: TaskData, tokenizer: Any, max_length: int) -> list[Any]:
    """Return the token ids and labels of the examples that have labels, in TRL's form."""
    examples = data.task.encode(data.train, tokenizer, 1, max_length)
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


def assert_equals_trl(
    folder: Path, rows: list[Any], base: Base, trl_rows: list[Any] | None = None, max_length: int = 1024, **options: Any
) -> None:
    """Compare tokens, labels and loss with those of TRL."""
    keys = options.pop("keys", {})
    data = read_rows(folder, rows, max_length=max_length, **keys)
    expected, expected_loss = train_with_trl(folder, trl_rows or rows, base, max_length, **options)
    # transformers computes no loss for the first token either
    assert labelled_rows(data, base.tokenizer, max_length) == [(ids, [-100, *labels[1:]]) for ids, labels in expected]
    model = fresh_model(base, data.head, 0, frozen=True)
    assert Deployment(model, base, data, "fp32").loss(data.train) == pytest.approx(expected_loss, abs=1e-5)


@pytest.mark.parametrize(("has_bos", "max_length"), [(True, 1024), (False, 8)])
def test_texts_and_pairs_equal_those_of_trl(tmp_path: Path, make_base, has_bos: bool, max_length: int) -> None:
    base = make_base(has_bos=has_bos)
    texts = [{"text": text} for text in ("A text.", "It ends.</s>", "A longer text than the others")]
    assert_equals_trl(tmp_path, texts, base, max_length=max_length)
    assert_equals_trl(tmp_path, PAIRS, base, max_length=max_length)
    all_tokens = {"keys": {"train_on": "all"}, "completion_only_loss": False}
    assert_equals_trl(tmp_path, PAIRS, base, max_length=max_length, **all_tokens)


@pytest.mark.parametrize("template", WITH_MARKS)
def test_conversations_with_marks_equal_those_of_trl(tmp_path: Path, make_base, template: str) -> None:
    rows = [{"messages": chat} for chat in (CHATS_WITHOUT_SYSTEM if "gemma" in template else CHATS)]
    base = make_base(template)
    max_length = 40 if template == "llama3_training" else 1024
    assert_equals_trl(tmp_path, rows, base, max_length=max_length, assistant_only_loss=True)
    assert_equals_trl(tmp_path, rows, base, max_length=max_length, keys={"train_on": "all"})


@pytest.mark.parametrize("template", ["qwen3", "gemma"])
def test_completions_of_messages_equal_those_of_trl(tmp_path: Path, make_base, template: str) -> None:
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in CHATS_WITHOUT_SYSTEM]
    rows.append({"prompt": [USER], "completion": [ASSISTANT, SECOND_USER, SECOND_ASSISTANT]})
    base = make_base(template)
    assert_equals_trl(tmp_path, rows, base)
    if template == "qwen3":
        assert_equals_trl(tmp_path, rows, base, keys={"train_on": "all"}, completion_only_loss=False)


def test_tools_alpaca_and_sharegpt_equal_trl_on_their_messages(tmp_path: Path, make_base) -> None:
    base = make_base("qwen3_training")
    calls = [{"messages": CALLS, "tools": TOOLS}, {"messages": CALLS[:2], "tools": TOOLS}]
    assert_equals_trl(tmp_path, calls, base, assistant_only_loss=True)
    data = read_rows(tmp_path, calls)
    assert data.train.targets.tolist() == ["It is 3.", CALL]
    assert data.train.inputs[0]["tools"] == TOOLS
    turns = [USER, ASSISTANT, SECOND_USER, SECOND_ASSISTANT]
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns]
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    alpaca_turns = [SYSTEM, {"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}]
    for row, messages in (({"conversations": sharegpt}, turns), (alpaca, alpaca_turns)):
        assert_equals_trl(tmp_path, [row], base, [{"messages": messages}], assistant_only_loss=True)


@pytest.mark.parametrize("template", [*WITHOUT_MARKS, *WITH_MARKS])
def test_prompts_are_prefixes_of_examples(tmp_path: Path, template: str) -> None:
    data = read_rows(tmp_path, [{"messages": chat} for chat in CHATS_WITHOUT_SYSTEM])
    tokenizer = make_tokenizer(template)
    prompts = data.task.encode_prompts(data.train, tokenizer, 1024)
    examples = data.task.encode(data.train, tokenizer, 0, 1024)
    for prompt, ids in zip(prompts, examples.columns["input_ids"], strict=True):
        assert ids[: len(prompt)] == prompt
    assert data.task.encode_prompts(data.train, tokenizer, 12) == [prompt[-12:] for prompt in prompts]


def test_greedy_answers_are_the_most_probable_tokens(tmp_path: Path, make_base) -> None:
    base = make_base("llama3")
    data = read_rows(tmp_path, [{"messages": chat} for chat in CHATS], max_new_tokens=12)
    model = fresh_model(base, data.head, 0, frozen=True)
    prompts = encode_prompts(base, data, data.train)
    answers = generate_answers(model, prompts, answer_settings(base, data), "fp32")
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


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
    stop_ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    assert find_stop_ids(tokenizer) == stop_ids
    task = read_rows(tmp_path, [{"messages": CHATS[0]}]).task
    assert task.stop_ids(tokenizer) == stop_ids
    assert task.decode_answer(tokenizer(f" Hello! \n{end}")["input_ids"], tokenizer) == "Hello!"


def test_a_tokenizer_that_ends_texts_does_not_end_prompts() -> None:
    backend = Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert encode_prompt({"prompt": "2+2="}, tokenizer) == make_tokenizer()("2+2=")["input_ids"]


TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]


def test_examples_without_labels_are_not_drawn(tmp_path: Path, make_base, caplog) -> None:
    pairs = [{"prompt": "a" * 20, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    rows = [*pairs[:1] * 7, pairs[1]]
    data = read_rows(tmp_path, rows, max_length=10)
    examples = data.task.encode(data.train, make_tokenizer(), 0, 10)
    assert [len(tokens) for tokens in examples.tokens] == [0] * 7 + [2]
    recipe = Recipe(steps=3, batch_size=4, precision="fp32", learning_rate=1e-3)
    values = {"type": "text-generation", "name": "t", "train": data.train.source, "dev": data.dev.source}
    task = Task.from_mapping({**values, "metric": "loss", "max_length": 10}, "test")
    outcome = regraft.tune(make_base(), task, tmp_path / "tuned", kind="lora", recipe=recipe)
    assert "7 of 8 training examples" in caplog.text
    assert outcome.curve[-1]["loss"] < outcome.curve[0]["loss"]
    write_rows(tmp_path, pairs[:1] * 4)
    with pytest.raises(DataError) as error:
        regraft.tune(make_base(), task, tmp_path / "nothing", kind="lora", recipe=recipe)
    assert_mentions(error, "train.jsonl", "max_length")


contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
