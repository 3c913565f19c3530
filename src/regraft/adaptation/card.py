"""The model card of an outcome."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adaptation.adapter_folder import ADAPTER_CONFIG
from regraft.adaptation.servable import VLLM_RANKS
from regraft.checkpoint import read_json
from regraft.printable import printable
from regraft.task.score import find_metric
from regraft.task.types import task_types

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from regraft.adaptation.outcome_record import OutcomeRecord

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?=@|$)")
_UNSERVED_SETTINGS = ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters")


def model_card(record: OutcomeRecord, adaptation: Path, predictions: Sequence[dict[str, Any]]) -> str:
    """Return the model card of an outcome, in the format of the Hugging Face Hub.

    Args:
        record: The outcome's record.
        adaptation: The folder of its weights.
        predictions: The lines of `predictions.jsonl`.
    """
    task, scores, cost, source = record.task, record.scores, record.cost, record.recycled_from
    library = {"full": "transformers", "bottleneck": "regraft"}.get(record.kind, "peft")
    labels = f" ({', '.join(map(_safe_text, record.labels))})" if record.labels else ""
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {task_types()[task.type].pipeline_tag}",
        *_base_lines(record),
        "---",
        f"# {_safe_text(task.name)} on {_safe_text(Path(record.base.name).name)}",
        "",
        f"A {record.kind} adaptation for {_code(task.name)}{labels}, made by regraft with method `{record.method}`.",
        "",
        f"- base model: {_code(record.base.name)} ({record.base.fingerprint})",
    ]
    if source:
        names = f"{_code(source.adaptation)} on {_code(source.old_base)}"
        lines.append(f"- recycled from: {names} ({source.fingerprint})")
    dev, test = (_score_text(task.metric, value) for value in (scores.dev, scores.test))
    start = "not measured" if record.curve_is_agreement else _score_text(task.curve_metric, scores.dev_at_start)
    selection = f"{task.selection} " if task.selection else ""
    lines += [
        f"- {task.metric}: dev {dev}, test {test} (before the first step: dev {selection}{start})",
        *_answer_lines(record, predictions),
        f"- cost: {cost.steps} steps, {cost.seconds:.0f} s, {cost.labels} labelled examples",
        f"- made with: {_options_text(record)}",
        "",
        *_usage_lines(record, adaptation),
        "The weights are in `adaptation/`; `outcome.json` has the whole record, `curve.jsonl` the learning curve.",
        "",
    ]
    return "\n".join(lines)


def _base_lines(record: OutcomeRecord) -> list[str]:
    """Return the metadata that relate an adapter to its base, if its name on the hub or on a server is known."""
    base = record.inputs.get("served_base")
    hub_id = _HUB_ID.match(record.base.name)
    is_on_hub = hub_id is not None and not Path(record.base.name).exists()
    if base is None and is_on_hub and task_types()[record.task.type].head_in_base and record.kind != "full":
        base = hub_id.group() if hub_id else None
    if base is None:
        return ["tags: [regraft]"]
    base_model = json.dumps(printable(base), ensure_ascii=False)
    return [f"base_model: {base_model}", "base_model_relation: adapter", f"tags: [regraft, {record.kind}]"]


def _answer_lines(record: OutcomeRecord, predictions: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Yield the health of the answers, and the scores on `keep` and by lm-evaluation-harness, as far as there are."""
    split = "test" if any(row["split"] == "test" for row in predictions) else "dev"
    rows = [row for row in predictions if row["split"] == split]
    health = task_types()[record.task.type].answer_health({record.method: rows})
    if health:
        figures = [
            f"{column.name} {f'{100 * cell:.1f} %' if column.form == 'share' else f'{cell:.2f}'}"
            for column, cell in zip(health.columns[1:], health.rows[0][1:], strict=True)
            if isinstance(cell, (int, float))
        ]
        yield f"- answers on {split}: {', '.join(figures)}"
    keep = record.notes.get("keep")
    if keep:
        yield f"- on the texts or the task of `keep`: {keep['metric']} {_score_text(keep['metric'], keep['score'])}"
    for task, scores in record.notes.get("lm_eval", {}).items():
        yield f"- lm-evaluation-harness, {_safe_text(task)}: {', '.join(f'{k} {v:.4f}' for k, v in scores.items())}"


def _usage_lines(record: OutcomeRecord, adaptation: Path) -> list[str]:
    """Return how to load and serve a language model; nothing for other models, and kinds that only regraft loads."""
    task_type = task_types()[record.task.type]
    if not task_type.head_in_base or record.kind == "bottleneck":
        return []
    base = " ".join(printable(record.inputs.get("served_base") or record.base.name).replace("`", "'").split())
    model = task_type.auto_class
    loading = [f'model = {model}.from_pretrained("adaptation", dtype="auto")']
    imports = [f"from transformers import {model}, AutoTokenizer"]
    command = "vllm serve adaptation"
    if record.kind != "full":
        imports.insert(0, "from peft import PeftModel")
        loading = [
            f'base = {model}.from_pretrained({json.dumps(base, ensure_ascii=False)}, dtype="auto")',
            'model = PeftModel.from_pretrained(base, "adaptation")',
        ]
        command = _vllm_lora_command(base, adaptation)
    lines = ["```python", *imports, "", *loading, 'tokenizer = AutoTokenizer.from_pretrained("adaptation")', "```", ""]
    return [*lines, *(["```sh", command, "```", ""] if command else [])]


def _vllm_lora_command(base: str, adaptation: Path) -> str:
    """Return the command with which vLLM serves a LoRA; an empty text if vLLM does not serve the adapter."""
    config = read_json(adaptation / ADAPTER_CONFIG)
    rank = config.get("r", 0)
    is_served = config.get("peft_type") == "LORA" and not any(config.get(setting) for setting in _UNSERVED_SETTINGS)
    if not is_served or rank > VLLM_RANKS[-1]:
        return ""
    max_rank = next(value for value in VLLM_RANKS if value >= rank)
    return f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {max_rank} --lora-modules adapter=adaptation"


def _options_text(record: OutcomeRecord) -> str:
    recipe = record.recipe
    options = record.inputs.get("options") or {}
    parts = [_safe_text(f"{name} {value}") for name, value in options.items() if value not in (None, "", [], ())]
    if record.cost.steps:
        parts.append(f"batches of {recipe['batch_size']}, peak learning rate {recipe['learning_rate']:g}")
    return ", ".join([*parts, f"seed {record.seed}"])


def _code(text: str) -> str:
    """Format text from files as a code span, in which Markdown interprets no markup, links or HTML."""
    return f"`{' '.join(printable(text).replace('`', chr(39)).split())}`"


def _safe_text(text: str) -> str:
    """Format text from files as plain text, or as a code span if Markdown might interpret it."""
    return text if re.fullmatch(r"(?!.*www\.)\w[\w .,+-]*", text) else _code(text)


def _score_text(metric: str, value: float | None) -> str:
    return "not measured" if value is None else find_metric(metric).format_score(value, 4)
