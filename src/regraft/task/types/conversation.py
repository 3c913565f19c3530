"""The formats of data for text generation, and their conversion to one normal form.

The inputs of an example are a mapping that can be written as JSON:

- `{"messages": […]}`: the turns before the answer; with `tools` if there are any, and with `prompt_turns`, the number
  of turns of the prompt, if the data separate prompts from completions;
- `{"prompt": …}`: a plain text that the answer continues;
- `{"text": …}`: a text without a prompt, whose answer is empty.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

from regraft.errors import DataError
from regraft.task.file import is_unicode
from regraft.task.labels import format_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Inputs: TypeAlias = "dict[str, Any]"
"""The inputs of an example, in normal form."""
Answer: TypeAlias = "str | dict[str, Any] | None"
"""The answer of an example: a text, or the message of an assistant that calls tools or reasons; None if it has none."""

METADATA_COLUMNS = {"id", "idx", "index", "url", "source", "date", "timestamp", "lang", "language", "license", "meta"}
"""Usual names of columns that describe an example's origin, and are no part of it."""
COLUMN_KEYS = {
    "messages": ("tools", "system"),
    "prompt": ("completion", "tools"),
    "instruction": ("input", "output", "system"),
    "text": (),
}
"""The key of a task file that names the first column of a format, with those that may name further columns of it."""
DEFAULT_NAMES = {"messages": ("messages", "conversations")}
"""The names by which a column is detected, by its key; other columns have the name of their key."""
ANSWER_KEYS = {"prompt": "completion", "instruction": "output"}
"""The key of the column of answers, for formats that have such a column."""
ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles of messages."""
ROLE_BY_SPEAKER = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""ShareGPT's names of speakers that differ from the names of roles."""
MESSAGE_FIELDS = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
)
"""The fields of messages that chat templates read; others, such as ids, are left out of the normal form."""


def identify_columns(columns: Sequence[str]) -> dict[str, str] | None:
    """Return the columns of the only format that a source without a task file can have.

    Args:
        columns: The names of all columns of the source.

    Returns:
        The names by the keys of a task file; None if the source has the columns of no format, or columns of which one
        may have the answer, a label or another conversation.
    """
    try:
        detected = {key: column for key, column in detect_columns({}, columns, "").items() if column is not None}
    except DataError:
        return None
    others = {*columns} - {*detected.values()} - METADATA_COLUMNS
    format_key = next(iter(detected))
    is_unanswered = format_key in ANSWER_KEYS and ANSWER_KEYS[format_key] not in detected
    if format_key == "messages":
        is_ambiguous = {"prompt", "completion"} <= others or {"instruction", "output"} <= others
    else:
        is_ambiguous = bool(others) and (format_key == "text" or is_unanswered)
    return None if is_ambiguous else detected


def detect_columns(named: Mapping[str, str | None], columns: Sequence[str], source: str) -> dict[str, str | None]:
    """Determine the format of a source, and the columns of that format.

    Args:
        named: The columns that the task file names, by key; None for a column that is not to be read.
        columns: The names of all columns of the source.
        source: The source as messages name it.

    Returns:
        The column of each key of the format; None for optional columns that the source lacks.

    Raises:
        DataError: The source has the columns of no format, or of several formats.
    """
    available = {key: _column(key, named, columns) for key in column_keys()}
    formats = [key for key in COLUMN_KEYS if named.get(key) or ANSWER_KEYS.get(key) in named]
    if not formats:
        # Alpaca's own data repeat each example as a `text`, and many data sets have a `prompt` beside `messages`
        formats = [
            key for key in COLUMN_KEYS if key != "text" and available[key] and available[ANSWER_KEYS.get(key, key)]
        ]
        formats = formats or [key for key in COLUMN_KEYS if available[key]]
    if len(formats) == 1:
        first = formats[0]
        return {first: available[first] or first, **{key: available[key] for key in COLUMN_KEYS[first]}}
    names = " or ".join(_describe_format(key) for key in COLUMN_KEYS)
    if not formats:
        raise DataError(
            f"{source}: has no columns {names}. Its columns are: {format_names(columns)}. Name the column of "
            "conversations, prompts, instructions or texts under that key in the task file."
        )
    several = " and of ".join(_describe_format(key) for key in formats)
    raise DataError(
        f"{source}: has columns of several formats: of {several}. Name those to read in the task file, such as "
        f"`{formats[0]}: {available[formats[0]]}`."
    )


def read_example(row: Mapping[str, Any], system_prompt: str | None) -> tuple[Inputs, Answer]:
    """Convert a row of any format to normal form.

    Args:
        row: The values of the row, by the key of its column; only keys of a single format.
        system_prompt: The content of the system turn of conversations without one.

    Returns:
        The inputs and the answer; a conversation that does not end with the assistant's turn is a prompt.

    Raises:
        DataError: A value is missing or malformed; the message lacks the source and the row.
    """
    if "text" in row:
        if system_prompt is not None:
            raise DataError("is a plain text, which has no system turn. Leave `system_prompt` out.")
        return {"text": _text(row["text"], "text")}, ""
    tools = _read_tools(row.get("tools"))
    if "prompt" in row:
        return _read_prompt(row, tools, system_prompt)
    system = _text(row["system"], "system") if row.get("system") else system_prompt
    if "instruction" in row:
        parts = [_text(row["instruction"], "instruction")]
        if row.get("input"):
            parts.append(_text(row["input"], "input"))
        turns = _with_system([{"role": "user", "content": "\n".join(parts)}], system)
        output = row.get("output")
        return {"messages": turns, "prompt_turns": len(turns)}, None if output is None else _text(output, "output")
    messages = _with_system(_read_messages(row["messages"], "messages"), system)
    if messages[-1]["role"] != "assistant":
        return {"messages": messages, **tools}, None
    return _split_at(len(messages) - 1, messages, tools)


def end_with_answer(inputs: Inputs) -> tuple[Inputs, Answer]:
    """Leave out the turns after the assistant's last turn, which becomes the answer.

    Args:
        inputs: The inputs of a prompt.

    Raises:
        DataError: The inputs are no conversation, or the assistant has no turn; the message lacks the source and row.
    """
    messages = inputs.get("messages", []) if "prompt_turns" not in inputs else []
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not indices:
        missing = "no turn of the assistant" if messages else "no answer"
        raise DataError(f"has {missing}, but other rows have. Complete the row, or remove it.")
    return _split_at(indices[-1], messages, {key: inputs[key] for key in inputs if key == "tools"})


def answer_message(answer: str | dict[str, Any]) -> dict[str, Any]:
    """Return an answer as the message of the assistant.

    Args:
        answer: A text, or a message.
    """
    return answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}


def as_text(inputs: Inputs) -> str:
    """Format the inputs of an example for people to read: a text, or one paragraph per turn.

    Args:
        inputs: The inputs, in normal form.
    """
    if "messages" not in inputs:
        return str(inputs.get("prompt", inputs.get("text")))
    return "\n".join(f"{message['role']}: {content_text(message)}" for message in inputs["messages"])


def content_text(message: Mapping[str, Any]) -> str:
    """Return the content of a message, or its tool calls as JSON.

    Args:
        message: A message, in normal form.
    """
    calls = message.get("tool_calls")
    return "\n".join(
        [*filter(None, [message.get("content")]), *([json.dumps(calls, ensure_ascii=False)] if calls else [])]
    )


def column_keys() -> list[str]:
    """Return the keys that name columns, without repetition."""
    return list(dict.fromkeys(key for first, others in COLUMN_KEYS.items() for key in (first, *others)))


def _column(key: str, named: Mapping[str, str | None], columns: Sequence[str]) -> str | None:
    """Return the column of a key: that which the task file names, else that of the key's name, if the source has it."""
    names = DEFAULT_NAMES.get(key, (key,))
    return named[key] if key in named else next((name for name in names if name in columns), None)


def _describe_format(key: str) -> str:
    """Name the columns of a format, such as `prompt` and `completion`."""
    return "`" + "` and `".join(dict.fromkeys([key, ANSWER_KEYS.get(key, key)])) + "`"


def _read_prompt(row: Mapping[str, Any], tools: Inputs, system_prompt: str | None) -> tuple[Inputs, Answer]:
    """Convert a prompt and its completion, which are two texts or two lists of messages."""
    prompt, completion = _parse_prompt(row["prompt"]), row.get("completion")
    if prompt is None or isinstance(prompt, str):
        if system_prompt is not None:
            raise DataError("has a plain text as its prompt, without turns. Leave `system_prompt` out.")
        if isinstance(completion, list):
            raise DataError("has a text as its prompt, but messages as its completion. Use two texts, or two lists.")
        return {"prompt": _text(prompt, "prompt")}, None if completion is None else _text(completion, "completion")
    messages = _with_system(_read_messages(prompt, "prompt"), system_prompt)
    if completion is None:
        return {"messages": messages, "prompt_turns": len(messages), **tools}, None
    if isinstance(_parse(completion), str):
        raise DataError("has messages as its prompt, but a text as its completion. Use two texts, or two lists.")
    turns = _read_messages(completion, "completion")
    if turns[-1]["role"] != "assistant":
        raise DataError("has a completion that does not end with a turn of the assistant. Complete it.")
    inputs, answer = _split_at(len(messages) + len(turns) - 1, [*messages, *turns], tools)
    return {**inputs, "prompt_turns": len(messages)}, answer


def _read_messages(value: Any, column: str) -> list[dict[str, Any]]:
    """Check a conversation, which may be stored as JSON, and return its messages."""
    turns = _parse(value)
    if not isinstance(turns, list):
        raise DataError(f"expected a list of messages in {column!r}, found {turns!r:.80}. Correct the row.")
    if not turns:
        raise DataError(f"the list of messages in {column!r} is empty. Correct the row, or remove it.")
    return [_read_message(turn, number) for number, turn in enumerate(turns, start=1)]


def _read_message(turn: Any, number: int) -> dict[str, Any]:
    """Check a message of the form {role, content} or {from, value}, and leave out empty and unknown fields."""
    if isinstance(turn, dict) and "role" not in turn and "from" in turn:
        turn = {**turn, "role": turn["from"], "content": turn.get("value")}
    if not isinstance(turn, dict) or "role" not in turn:
        raise DataError(f"message {number} is {turn!r:.80}, without `role` and `content`. Correct the row.")
    message = {field: turn[field] for field in MESSAGE_FIELDS if turn.get(field) is not None}
    role = ROLE_BY_SPEAKER.get(str(turn["role"]), turn["role"])
    if role not in ROLES:
        raise DataError(f"message {number} has the role {role!r:.40}. Use one of {', '.join(ROLES)}.")
    message["role"] = role
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = message["content"] = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise DataError(f"message {number} has the content {content!r:.80}, not a text. Regraft reads texts alone.")
    is_empty = content is None or (role in ("user", "assistant") and not content.strip())
    if is_empty and not message.get("tool_calls"):
        raise DataError(f"message {number}, of the role {role}, is empty. Fill it in, or remove the row.")
    _check_json(message, f"message {number}")
    return message


def _read_tools(value: Any) -> Inputs:
    """Return the tools of a row, which may be stored as JSON, as a part of its inputs; nothing if there are none."""
    tools = _parse(value)
    if not tools:
        return {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"expected a list of JSON schemas in 'tools', found {tools!r:.80}. Correct the row.")
    _check_json(tools, "the value of 'tools'")
    return {"tools": tools}


def _split_at(index: int, messages: list[dict[str, Any]], tools: Inputs) -> tuple[Inputs, Answer]:
    """Divide a conversation before the turn of the assistant with some index, which is the answer."""
    before, message = messages[:index], messages[index]
    if all(turn["role"] in ("system", "developer", "assistant") for turn in before):
        raise DataError("the assistant answers before the user has a turn. Put the user's turn in front.")
    answer: Answer = message["content"] if message.keys() == {"role", "content"} else message
    return {"messages": before, **tools}, answer


def _with_system(messages: list[dict[str, Any]], content: str | None) -> list[dict[str, Any]]:
    """Put a system turn in front of a conversation without one."""
    if content is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": content}, *messages]


def _parse(value: Any) -> Any:
    """Parse a text that is a JSON list of objects, as in CSV files; return any other value unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, list) and all(isinstance(item, dict) for item in parsed) else value


def _parse_prompt(value: Any) -> Any:
    """Parse a text that is a JSON list of messages; other JSON is a plain text."""
    parsed = _parse(value)
    are_messages = isinstance(parsed, list) and all(
        {"role", "from"} & {*item} for item in parsed if parsed is not value
    )
    return parsed if are_messages else value


def _text(value: Any, column: str) -> str:
    """Check a text."""
    if not isinstance(value, str) or not value.strip():
        description = "nothing" if value is None or value == "" else f"{value!r:.80}"
        raise DataError(f"expected a text in {column!r}, found {description}. Correct the row, or remove it.")
    if not is_unicode(value):
        raise DataError(f"the text in {column!r} is not valid Unicode. Correct the row, or remove it.")
    return value


def _check_json(value: Any, subject: str) -> None:
    """Check that a value can be written as JSON in UTF-8."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{subject} cannot be written as JSON ({error!s:.80}). Correct the row.") from error
    if not is_unicode(text):
        raise DataError(f"{subject} is not valid Unicode. Correct the row, or remove it.")
