"""Adaptations that transformers' Trainer and PEFT made, without regraft, for a task of each type."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from helpers import BAD, GOOD, NEUTRAL
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DataCollatorForTokenClassification, DataCollatorWithPadding

from regraft import Recipe, Upgrade, check, load_adaptation, recycle
from regraft.progress import quiet
from regraft.task import load_data

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

FP32 = Recipe(precision="fp32")
TAGS = ("O", "B-BAD", "I-BAD", "B-GOOD", "I-GOOD")
TASKS: dict[str, dict[str, Any]] = {
    "text-classification": {"text": "text", "label": "sentiment", "labels": ["positive", "negative"]},
    "multi-label-classification": {"text": "text", "label": "topics", "labels": ["long", "good", "bad"]},
    "text-regression": {"text": "text", "label": "stars", "tolerance": 1},
    "token-classification": {"words": "words", "tags": "tags", "labels": TAGS},
}
"""The keys of each task file. The labels are in the order of the models' outputs, which is not the sorted one."""
PROBLEM_TYPES = {"multi-label-classification": "multi_label_classification"}  # Trainer infers the others from labels


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return examples with a target for each task type."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        num_good, num_bad = rng.randint(0, 3), rng.randint(0, 3)
        words = rng.choices(NEUTRAL, k=rng.randint(3, 8))
        words += rng.choices(GOOD, k=num_good) + rng.choices(BAD, k=num_bad)
        rng.shuffle(words)
        tags = []
        for word in words:
            kind = "GOOD" if word in GOOD else "BAD" if word in BAD else None
            is_inside = bool(tags) and kind is not None and tags[-1].endswith(f"-{kind}")
            tags.append("O" if kind is None else f"{'I' if is_inside else 'B'}-{kind}")
        flags = {"bad": num_bad > 1, "good": num_good > 1, "long": len(words) > 9}
        rows.append(
            {
                "text": " ".join(words),
                "sentiment": "positive" if num_good > num_bad else "negative",
                "topics": [name for name, applies in flags.items() if applies],
                "stars": float(num_good - num_bad),
                "words": words,
                "tags": tags,
            }
        )
    return rows


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {"train": make_rows(160, 1), "dev": make_rows(30, 2), "test": make_rows(40, 3)}


@pytest.fixture(scope="module")
def write_task(tmp_path_factory, rows):
    """A function that writes a task of a type."""
    folder = tmp_path_factory.mktemp("tasks")
    for split, examples in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))

    def write(task_type: str, **keys: Any) -> Path:
        sources = {split: str(folder / f"{split}.jsonl") for split in rows}
        file: Path = folder / f"{task_type}-{len(list(folder.iterdir()))}.yaml"
        file.write_text(json.dumps({"type": task_type, "max_length": 32, **sources, **TASKS[task_type], **keys}))
        return file

    return write


def encode(tokenizer: Any, task_type: str, row: dict[str, Any]) -> dict[str, Any]:
    """Tokenise an example as the documentation of transformers does, with its label."""
    labels = TASKS[task_type].get("labels", ())
    if task_type == "token-classification":
        encoding = tokenizer(row["words"], is_split_into_words=True, truncation=True, max_length=32)
        word_ids = encoding.word_ids()
        is_first = [word is not None and (i == 0 or word != word_ids[i - 1]) for i, word in enumerate(word_ids)]
        tags = [
            labels.index(row["tags"][word]) if first else -100 for word, first in zip(word_ids, is_first, strict=True)
        ]
        return {**encoding, "labels": tags}
    target = {
        "text-classification": lambda: labels.index(row["sentiment"]),
        "multi-label-classification": lambda: [float(name in row["topics"]) for name in labels],
        "text-regression": lambda: row["stars"],
    }[task_type]()
    return {**tokenizer(row["text"], truncation=True, max_length=32), "labels": target}


def train_without_regraft(base: Path, folder: Path, task_type: str, kind: str, examples: list[dict[str, Any]]) -> Any:
    """Tune a base with transformers and PEFT; return the model, whose saved form is in the folder."""
    labels = TASKS[task_type].get("labels", ("LABEL_0",))
    settings: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "pad_token_id": 0,
    }
    if task_type in PROBLEM_TYPES:
        settings["problem_type"] = PROBLEM_TYPES[task_type]
    is_tagger = task_type == "token-classification"
    auto_class = (
        transformers.AutoModelForTokenClassification if is_tagger else transformers.AutoModelForSequenceClassification
    )
    torch.manual_seed(0)
    with quiet():
        model = auto_class.from_pretrained(base, **settings)
        tokenizer = AutoTokenizer.from_pretrained(base)
        if kind == "lora":
            peft_type = "TOKEN_CLS" if is_tagger else "SEQ_CLS"
            model = get_peft_model(
                model, LoraConfig(task_type=peft_type, r=4, target_modules=["query", "value", "q_proj", "v_proj"])
            )
    collator = (DataCollatorForTokenClassification if is_tagger else DataCollatorWithPadding)(tokenizer)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "work"),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[encode(tokenizer, task_type, row) for row in examples],
        data_collator=collator,
        processing_class=tokenizer,
    )
    with quiet():
        trainer.train()
    trainer.save_model(str(folder / "adaptation"))
    return model.eval()


@torch.no_grad()
def predict_without_regraft(model: Any, base: Path, task_type: str, examples: list[dict[str, Any]]) -> list[Any]:
    """Return the predictions of a model for each example alone, in the form of regraft's."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    predictions = []
    for row in examples:
        encoding = encode(tokenizer, task_type, row)
        labels = encoding.pop("labels")
        logits = model(**{name: torch.tensor([ids]) for name, ids in encoding.items()}).logits[0]
        predictions.append(
            {
                "text-classification": lambda logits=logits: int(logits.argmax()),
                "multi-label-classification": lambda logits=logits: (logits > 0).long().tolist(),
                "text-regression": lambda logits=logits: float(logits),
                "token-classification": lambda logits=logits, labels=labels: logits.argmax(dim=-1)[
                    torch.tensor(labels) >= 0
                ].tolist(),
            }[task_type]()
        )
    return predictions


@pytest.mark.parametrize("task_type", TASKS)
@pytest.mark.parametrize(("architecture", "kind"), [("bert", "full"), ("roberta", "lora"), ("llama", "lora")])
def test_an_adaptation_of_trainer_is_taken_whole(bases, tmp_path, rows, write_task, architecture, kind, task_type):
    """The old deployment predicts what transformers predicts, and the grafted model on the same base does too."""
    old, new = bases[architecture]
    model = train_without_regraft(old, tmp_path, task_type, kind, rows["train"])
    expected = predict_without_regraft(model, old, task_type, rows["test"])
    adaptation = tmp_path / "adaptation"
    task = write_task(task_type)
    outcome = recycle(Upgrade(old, old), adaptation, task, "direct", tmp_path / "direct", recipe=FP32)
    predictions = outcome.predictions("test")
    if task_type == "text-regression":
        np.testing.assert_allclose(predictions, expected, rtol=1e-4, atol=1e-5)
    else:
        assert predictions == expected
    assert len({json.dumps(prediction) for prediction in predictions}) > 1  # a constant would prove little
    assert load_adaptation(outcome.path).task_type == task_type
    result = check(Upgrade(old, new), adaptation, task, recipe=FP32)
    assert result.agreement > 0.5
    labels = load_data(task, 0).labels
    assert list(labels) == list(TASKS[task_type].get("labels", ()))
