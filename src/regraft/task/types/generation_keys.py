"""The keys of task files for text generation, apart from the metric."""

from __future__ import annotations

import os
import re
from abc import ABC
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator

from regraft.errors import DataError
from regraft.task.types.conversation import column_keys, detect_columns
from regraft.task.types.keys import MAX_TOKENS, MIN_TOKENS
from regraft.task.types.texts import ColumnName  # noqa: TC001 (pydantic reads annotations)
from regraft.task.types.type import Task

if TYPE_CHECKING:
    from collections.abc import Sequence

TEMPLATES = ("adaptation", "new-base")
"""The values of `template` that are not files."""


class GenerationKeys(Task, ABC):
    """A task of writing texts, whose columns are detected in its training source.

    Args:
        messages: The column of conversations: lists of messages, of the form {role, content} or {from, value}.
        prompt: The column of prompts: texts, or lists of messages.
        completion: The column of completions, of the same form as the prompts; None for unlabelled data.
        instruction: The column of instructions, which become turns of a user.
        input: The column of inputs, which follow the instructions in a line of their own.
        output: The column of answers to instructions; None for unlabelled data.
        text: The column of texts without a prompt, of which every token is learnt.
        tools: The column of the tools of conversations: lists of JSON schemas.
        system: The column of system turns, for conversations and instructions.
        system_prompt: The system turn of conversations that have none.
        train_on: Whether to learn completions and the turns of the `assistant`, or `all` tokens.
        template: The chat template: that of the `adaptation`, which is part of its behaviour, of the `new-base`, or a
            file.
        pattern: A regular expression for the part of an answer that is compared; its first group if it has groups.
        right_at: The least value of a graded metric at which an answer is right; 0.5 is arbitrary.
        max_new_tokens: The largest number of tokens of a generated answer.
        keep: A text file or a task file on which to measure what the new base knows and must not lose.
        lm_eval: Tasks of lm-evaluation-harness to run: names, or YAML files.
        max_length: The number of tokens that examples are truncated to, prompt and answer together; the default is
            TRL's.
    """

    messages: ColumnName | None = Field(default=None, description="the column that holds lists of messages")
    prompt: ColumnName | None = Field(default=None, description="the column that holds prompts")
    completion: ColumnName | None = Field(
        default=None, description="the column that holds completions, or null where there are none"
    )
    instruction: ColumnName | None = Field(default=None, description="the column that holds instructions")
    input: ColumnName | None = Field(default=None, description="the column that holds inputs of instructions")
    output: ColumnName | None = Field(
        default=None, description="the column that holds answers to instructions, or null where there are none"
    )
    text: ColumnName | None = Field(default=None, description="the column that holds texts without a prompt")
    tools: ColumnName | None = Field(default=None, description="the column that holds lists of tools, or null")
    system: ColumnName | None = Field(default=None, description="the column that holds system turns, or null")
    system_prompt: str | None = Field(default=None, min_length=1, description="a text, or leave it out")
    train_on: Literal["assistant", "all"] = Field(default="assistant", description="assistant or all")
    template: str = Field(default="adaptation", min_length=1, description="adaptation, new-base, or a file")
    pattern: str | None = Field(default=None, min_length=1, description="a regular expression, or leave it out")
    right_at: float = Field(default=0.5, ge=0, le=1, description="a number from 0 to 1")
    max_new_tokens: int = Field(default=256, ge=1, le=MAX_TOKENS, description="a whole number of tokens, 1 or more")
    keep: str | None = Field(default=None, min_length=1, description="a text file or a task file, or leave it out")
    lm_eval: tuple[str, ...] = Field(default=(), description="a list of names of tasks, or of YAML files")
    max_length: int = Field(
        default=1024, ge=MIN_TOKENS, le=MAX_TOKENS, description=f"a whole number of tokens, {MIN_TOKENS} or more"
    )

    @property
    def max_answer_tokens(self) -> int:
        """The value of `max_new_tokens`; see `Task.max_answer_tokens`."""
        return self.max_new_tokens

    @property
    def columns(self) -> dict[str, str]:
        """The columns to read, by key; after `with_columns`, those of a single format."""
        named = {key: getattr(self, key) for key in column_keys()}
        return {key: column for key, column in named.items() if column is not None}

    @property
    def input_columns(self) -> tuple[str, ...]:
        """All columns, because prompt and answer may be parts of the same value."""
        return tuple(self.columns.values())

    @property
    def target_columns(self) -> tuple[str, ...]:
        """No columns; see `input_columns`."""
        return ()

    @property
    def template_text(self) -> str | None:
        """The chat template in the file that `template` names; None if it does not name a file.

        Raises:
            DataError: The file cannot be read.
        """
        if self.template in TEMPLATES:
            return None
        try:
            return Path(self.template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.template}: the chat template cannot be read ({error}). Set `template` to adaptation, new-base "
                "or the path of a text file."
            ) from error

    @property
    def template_choice(self) -> str:
        """The value of `template`, or `file` if it names a file, whose path does not matter."""
        return self.template if self.template in TEMPLATES else "file"

    @property
    def chat_template(self) -> tuple[str, str | None]:
        """The value of `template_choice`, and the text of the file; see `Task.chat_template`."""
        return self.template_choice, self.template_text

    def with_absolute_paths(self, folder: Path) -> Self:
        """Make the paths of `template`, `keep` and `lm_eval` absolute; see `Task.with_absolute_paths`."""

        def resolve(path: str) -> str:
            return os.path.abspath(folder / os.path.expanduser(path))

        paths: dict[str, Any] = {
            "template": self.template if self.template in TEMPLATES else resolve(self.template),
            "keep": None if self.keep is None else resolve(self.keep),
            "lm_eval": tuple(resolve(name) if name.endswith((".yaml", ".yml")) else name for name in self.lm_eval),
        }
        return self.model_copy(update={key: path for key, path in paths.items() if key in self.model_fields_set})

    @property
    def has_columns(self) -> bool:
        """False, because a named column may have companions to detect; see `Task.has_columns`."""
        return False

    def with_columns(self, columns: Sequence[str], source: str) -> Self:
        """Detect the format of the training source; see `Task.with_columns`."""
        named = {key: getattr(self, key) for key in column_keys() if key in self.model_fields_set}
        detected: dict[str, Any] = dict(detect_columns(named, columns, source))
        return self.model_copy(update={**dict.fromkeys(named), **detected})

    @field_validator("pattern")
    @classmethod
    def _validate_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is {pattern!r:.80}, not a regular expression ({error}). Correct it.") from None
        return pattern
