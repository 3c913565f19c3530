"""Inputs that are lists of words: their checks, and their tokenisation with the first token of each word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from regraft.errors import DataError
from regraft.task.file import is_unicode
from regraft.task.types.texts import ColumnName

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from regraft.task.source import SourceTable
    from regraft.task.split import Split

Columns = dict[str, list[list[int]]]
"""For each input of a model, one list of ids per example."""
WORD_COLUMNS, TAG_COLUMNS = ("words", "tokens"), ("tags", "ner_tags")
"""The usual names of the columns of words and of tags."""


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


ColumnReference = Annotated[ColumnName, BeforeValidator(_number_as_text)]
"""The name of a column, or its number in a CoNLL file."""


def word_columns(columns: Sequence[str]) -> dict[str, str] | None:
    """Return the columns of words and of tags by the keys that name them.

    Args:
        columns: The names of all columns of a source; none for CoNLL, of which the outer columns are returned.

    Returns:
        The names of the columns; None if the source has none of the usual names.
    """
    if not columns:
        return {"words": "0", "tags": "-1"}
    words, tags = (next((name for name in names if name in columns), None) for names in (WORD_COLUMNS, TAG_COLUMNS))
    return {"words": words, "tags": tags} if words and tags else None


def checked_words(table: SourceTable, column: str) -> list[tuple[str, ...]]:
    """Return the words of each row of a table.

    Args:
        table: Columns of a source.
        column: The name of the column of words.

    Raises:
        DataError: A value is not a list of words, is empty, or has a word that is not valid Unicode.
    """
    sentences = []
    for row, words in zip(table.row_numbers, table.columns[column], strict=True):
        if not isinstance(words, list | tuple):
            raise DataError(
                f"{table.source}, row {row}: column {column!r} holds {words!r:.80}, not a list of words. Write a list "
                "in JSON lines, Parquet or a CoNLL file."
            )
        if not words:
            raise DataError(f"{table.source}, row {row}: has no words in column {column!r}. Remove the row.")
        for index, word in enumerate(words):
            if not isinstance(word, str) or not is_unicode(word):
                raise DataError(
                    f"{table.source}, row {row}: word {index + 1} in column {column!r} is {word!r:.80}, not valid "
                    "text. Correct it."
                )
        sentences.append(tuple(words))
    return sentences


def checked_tags(table: SourceTable, column: str, words: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the names of the tags of each row of a table.

    Args:
        table: Columns of a source.
        column: The name of the column of tags, which are names, or indices of the table's classes.
        words: The words of each row.

    Raises:
        DataError: A value is not a list of tags, or not one tag per word.
    """
    classes = table.classes.get(column)
    sentences = []
    for row, tags, sentence in zip(table.row_numbers, table.columns[column], words, strict=True):
        if not isinstance(tags, list | tuple):
            raise DataError(
                f"{table.source}, row {row}: column {column!r} holds {tags!r:.80}, not a list of tags. Write a list in "
                "JSON lines, Parquet or a CoNLL file."
            )
        if len(tags) != len(sentence):
            raise DataError(
                f"{table.source}, row {row}: has {len(sentence)} words but {len(tags)} tags. Give every word a tag."
            )
        names = []
        for index, tag in enumerate(tags):
            is_class = classes is not None and isinstance(tag, int) and 0 <= tag < len(classes)
            name = classes[tag] if classes is not None and is_class else tag
            if not isinstance(name, str) or not name:
                raise DataError(
                    f"{table.source}, row {row}, word {index + 1} ({sentence[index]!r:.60}): the tag {tag!r:.60} is "
                    "not a name. Write tags as text, such as B-PER, or name the classes in the data set."
                )
            names.append(name)
        sentences.append(names)
    return sentences


def encode_words(
    split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Columns, list[list[int]], list[list[int]], int]:
    """Tokenise sentences, and find the first token of each word.

    Words are joined by spaces, as in text: tokenizers of bytes and of SentencePiece divide a word differently if no
    space precedes it.

    Args:
        split: The sentences.
        tokenizer: The tokenizer of the base.
        max_length: The number of tokens to truncate sentences to.

    Returns:
        The model's inputs; for each sentence, the token indices of words, and the indices of these words; and the
        number of words that were cut off. Words of which the tokenizer makes no token have none.

    Raises:
        DataError: The tokenizer makes no token of any word of a sentence.
    """
    encode: Any = _encode_texts if tokenizer.is_fast else _encode_words_separately
    columns: Columns = {}
    all_tokens, all_words = [], []
    num_cut_words = 0
    encoded: Iterator[tuple[dict[str, list[int]], dict[int, int]]] = encode(split.inputs, tokenizer, max_length)
    for row, words, (inputs, first_tokens) in zip(split.row_numbers.tolist(), split.inputs, encoded, strict=True):
        if not first_tokens:
            raise DataError(
                f"{split.source}, row {row}: the tokenizer makes no token of any of the words, so a model has nothing "
                "to read. Remove the row."
            )
        for name, ids in inputs.items():
            columns.setdefault(name, []).append(ids)
        all_words.append(list(first_tokens))
        all_tokens.append(list(first_tokens.values()))
        if len(inputs["input_ids"]) >= max_length:
            num_cut_words += len(words) - 1 - max(first_tokens)
    return columns, all_tokens, all_words, num_cut_words


def _encode_texts(
    sentences: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[dict[str, list[int]], dict[int, int]]]:
    """Tokenise the texts of sentences.

    Args:
        sentences: The words of each sentence.
        tokenizer: A tokenizer that relates tokens to characters.
        max_length: The number of tokens to truncate sentences to.

    Yields:
        For each sentence, the model's inputs, and the index of the first token of each word by the word's index.
    """
    encoded: Any = tokenizer(
        [" ".join(words) for words in sentences],
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_offsets_mapping=True,
    )
    offsets = encoded.pop("offset_mapping")
    for sentence_index, words in enumerate(sentences):
        word_of_character: list[int | None] = []
        for index, word in enumerate(words):
            word_of_character += [None if character.isspace() else index for character in word]
            word_of_character.append(None)  # the space after the word
        first_tokens: dict[int, int] = {}
        for token, (start, end) in enumerate(offsets[sentence_index]):
            for word_index in word_of_character[start:end]:
                if word_index is not None:
                    first_tokens.setdefault(word_index, token)
        yield {name: list(ids[sentence_index]) for name, ids in encoded.items()}, first_tokens


def _encode_words_separately(
    sentences: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[dict[str, list[int]], dict[int, int]]]:
    """Tokenise sentences by a tokenizer that does not relate tokens to characters; see `_encode_texts`."""
    limit = max_length - tokenizer.num_special_tokens_to_add()
    for words in sentences:
        content: list[int] = []
        starts: dict[int, int] = {}
        for index, word in enumerate(words):
            ids: Any = tokenizer(f" {word}" if index else word, add_special_tokens=False)["input_ids"]
            if ids and len(content) < limit:
                starts[index] = len(content)
            content += ids
        content = content[:limit]
        input_ids: list[int] = tokenizer.build_inputs_with_special_tokens(content)
        num_before = next(i for i in range(len(input_ids) + 1) if input_ids[i : i + len(content)] == content)
        inputs = {"input_ids": input_ids}
        if "token_type_ids" in tokenizer.model_input_names:
            inputs["token_type_ids"] = [0] * len(input_ids)
        yield inputs, {index: num_before + start for index, start in starts.items()}
