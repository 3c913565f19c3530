"""The tokens of an example of text generation, and those among them that are labels.

Both are what TRL's SFTTrainer makes of the same row: plain texts end with the EOS token, and all that follows the
prompt in a chat template, such as a line break after the answer, belongs to the answer.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal

from regraft.errors import DataError
from regraft.task.types.conversation import answer_message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from regraft.task.types.conversation import Answer, Inputs

Masking = Literal["all", "completion", "marks", "prefixes", "last turn", "none"]
MASKINGS: dict[Masking, str] = {
    "all": "every token",
    "completion": "what follows the prompt",
    "marks": "the assistant's turns, as the chat template marks them",
    "prefixes": "the assistant's turns, by what each adds to the conversation",
    "last turn": "the last turn alone, because the chat template changes earlier turns",
    "none": "no token: there is no answer",
}
"""The ways in which the tokens that are labels are determined, with their descriptions."""
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = ("Question?", "Answer.")
"""A user's turn and its answer: words that no chat template contains itself."""


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """The tokens of an example.

    Args:
        ids: The token ids, not truncated.
        is_label: Whether each token is a label, which a model is to predict from the tokens before it.
        masking: The way in which the labels were determined, one of `MASKINGS`.
    """

    ids: list[int]
    is_label: list[bool]
    masking: Masking

    def label_positions(self, max_length: int) -> list[int]:
        """Return the positions of the labels among the first tokens; the first token, which nothing precedes, is none.

        Args:
            max_length: The number of tokens to which the example is truncated.
        """
        return [position for position in range(1, min(len(self.ids), max_length)) if self.is_label[position]]


def encode_example(
    inputs: Inputs,
    answer: Answer,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    train_on: Literal["assistant", "all"] = "assistant",
) -> EncodedExample:
    """Tokenise an example with its answer.

    Args:
        inputs: The inputs, in the normal form of `conversation`.
        answer: The answer; None to tokenise the prompt alone, without labels.
        tokenizer: The tokenizer.
        template: The text of the chat template; None for the tokenizer's own.
        train_on: Whether the labels are the tokens of completions and of the assistant's turns, or `all`.

    Raises:
        DataError: The tokenizer has no chat template for a conversation, or it cannot be applied; the message lacks the
            source and the row.
    """
    if answer is None:
        ids = encode_prompt(inputs, tokenizer, template)
        return EncodedExample(ids, [False] * len(ids), "none")
    if "messages" in inputs:
        return _encode_conversation(_Chat(tokenizer, template, inputs), inputs, answer, train_on)
    prompt = inputs.get("prompt", "")
    completion = str(inputs.get("text", answer))
    end = tokenizer.eos_token or ""
    ids = _tokenize(tokenizer, prompt + completion + ("" if completion.endswith(end) else end))
    if train_on == "all" or "text" in inputs:
        return EncodedExample(ids, [True] * len(ids), "all")
    return _label_completion(_tokenize(tokenizer, prompt), ids)


def encode_prompt(inputs: Inputs, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> list[int]:
    """Tokenise an example up to the point where a model begins its answer.

    Args:
        inputs: The inputs, in the normal form of `conversation`.
        tokenizer: The tokenizer.
        template: The text of the chat template; None for the tokenizer's own.

    Raises:
        DataError: The example is a text without a prompt, or its chat template is missing or cannot be applied; the
            message lacks the source and the row.
    """
    if "text" in inputs:
        raise DataError("a text without a prompt cannot be answered. Use the metric loss, or data with prompts.")
    if "messages" in inputs:
        return _Chat(tokenizer, template, inputs).prompt_ids(inputs["messages"])
    ids = _tokenize(tokenizer, inputs["prompt"])
    # some tokenizers end every text with EOS, after which nothing would be generated
    is_ended = ids[-1:] == [tokenizer.eos_token_id] and not inputs["prompt"].endswith(tokenizer.eos_token or "")
    return ids[:-1] if is_ended and len(ids) > 1 else ids


def find_stop_ids(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> set[int]:
    """Return the id of the EOS token, and of the special token by which the chat template ends the assistant's turn.

    Args:
        tokenizer: The tokenizer, with or without a chat template.
        template: The text of the chat template; None for the tokenizer's own.
    """
    stop_ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    question, answer = _PROBE
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
    except Exception:  # without a template, or if it requires more than these two turns
        return stop_ids
    end_of_turn = rendered.rpartition(answer)[2]
    special = {
        *tokenizer.all_special_ids,
        *(id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    ids = tokenizer(end_of_turn, add_special_tokens=False)["input_ids"] if end_of_turn else []
    return stop_ids | set([token for token in ids if token in special][:1])


def decode_answer(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a generated answer, without special tokens and surrounding white space.

    Args:
        ids: The generated token ids, without the token that ends the answer.
        tokenizer: The tokenizer.
    """
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text, without the warning that a base cannot take all of its tokens: they are truncated later."""
    return list(tokenizer(text, verbose=False)["input_ids"])


@dataclasses.dataclass(frozen=True)
class _Chat:
    """A chat template, applied to the turns of one example.

    Args:
        tokenizer: The tokenizer.
        template: The text of the chat template; None for the tokenizer's own.
        inputs: The inputs of the example, which may have tools.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    inputs: Inputs

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokenise turns, followed by the beginning of a turn of the assistant."""
        return list(self.render(messages, add_generation_prompt=True)["input_ids"])

    def ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokenise turns."""
        return list(self.render(messages)["input_ids"])

    def render(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """Apply the chat template to turns; raise DataError if it cannot be."""
        if self.template is None and not self.tokenizer.chat_template:
            raise DataError(
                "is a conversation, but the tokenizer has no chat template. Name a file with the template under "
                "`template` in the task file, or save it as chat_template.jinja beside the tokenizer."
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=self.inputs.get("tools"),
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                tokenizer_kwargs={"verbose": False},  # as in `_tokenize`
                **options,
            )
        except Exception as error:  # templates and their filters raise errors of many types
            raise DataError(
                f"the chat template does not take this conversation ({type(error).__name__}: {error!s:.200}). Correct "
                "the row, or use another template."
            ) from error

    def has_marks(self) -> bool:
        """Return whether the chat template marks the turns of the assistant."""
        text = self.tokenizer.get_chat_template(self.template, self.inputs.get("tools"))
        return _MARK.search(text) is not None


def _encode_conversation(
    chat: _Chat, inputs: Inputs, answer: str | dict[str, Any], train_on: Literal["assistant", "all"]
) -> EncodedExample:
    """Tokenise a conversation; its labels are those of a completion if the data separate it from the prompt."""
    messages = [*inputs["messages"], answer_message(answer)]
    ids = chat.ids(messages)
    if train_on == "all":
        return EncodedExample(ids, [True] * len(ids), "all")
    if "prompt_turns" in inputs:
        return _label_completion(chat.prompt_ids(messages[: inputs["prompt_turns"]]), ids)
    if chat.has_marks():
        rendered = chat.render(messages, return_assistant_tokens_mask=True)
        is_label = [bool(mark) for mark in rendered["assistant_masks"]]
        if any(is_label):  # a template may mark the turns of some conversations alone
            return EncodedExample(ids, is_label, "marks")
    turns = _label_turns(chat, messages, ids)
    if turns is not None:
        return EncodedExample(ids, turns, "prefixes")
    return dataclasses.replace(_label_completion(chat.prompt_ids(messages[:-1]), ids), masking="last turn")


def _label_turns(chat: _Chat, messages: list[dict[str, Any]], ids: list[int]) -> list[bool] | None:
    """Label what each of the assistant's turns adds to the tokens of the conversation before it.

    Args:
        chat: The chat template.
        messages: All turns of the conversation.
        ids: The tokens of the conversation.

    Returns:
        Whether each token is a label; None if the conversation does not begin with the tokens of its own beginnings,
        as with templates that leave out the reasoning of earlier turns.
    """
    is_label = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before, through = chat.prompt_ids(messages[:index]), chat.ids(messages[: index + 1])
        except DataError:  # some templates refuse conversations that are not complete
            return None
        if ids[: len(through)] != through or through[: len(before)] != before:
            return None
        is_label[len(before) : len(through)] = [True] * (len(through) - len(before))
    return is_label


def _label_completion(prompt: list[int], ids: list[int]) -> EncodedExample:
    """Label all tokens from the first that differs from the prompt's; prompt and completion may merge in a token."""
    start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return EncodedExample(ids, [False] * start + [True] * (len(ids) - start), "completion")
