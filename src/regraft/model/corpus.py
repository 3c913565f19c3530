"""Unlabelled text as packed blocks of tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.checkpoint import is_sealed, replace_atomically, seal
from regraft.errors import DataError
from regraft.task import HubSplit
from regraft.task.file import check_folder, check_regular_file, data_suffix, is_unicode, read_json_rows, read_lines
from regraft.task.source import is_saved_dataset, load_saved_dataset

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from regraft.base import Base
    from regraft.progress import Progress

DOCUMENTS_PER_BATCH = 512
"""Documents per call of the tokenizer. A larger batch occupies more threads, and takes more memory."""
MIN_BLOCKS = 2
"""The fewest blocks of a corpus: one to train on and one to evaluate on."""
JSON_SUFFIXES = (".jsonl", ".json")
"""The suffixes of files of JSON lines, or of one JSON list."""
DATASETS_BUILDERS = {".csv": "csv", ".parquet": "parquet"}
"""The builders of `datasets` that read files, by the files' suffix."""
FILE_SUFFIXES = (".txt", *JSON_SUFFIXES, *DATASETS_BUILDERS)
"""The suffixes by which a source is recognised as a file."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The sources of unlabelled text.

    Args:
        sources: Text files (a document per line), JSON lines or lists, CSV or Parquet files, all but Parquet also
            compressed (.gz, .xz, .bz2, .zst); folders of `save_to_disk`; or `datasets` names (`name` or
            `name:config`). Of folders and named data sets, the `train` split is read.
        column: The text column of sources that have columns.
    """

    sources: tuple[str, ...]
    column: str = "text"

    def digest(self) -> str:
        """Hash the column's name, the content of files and folders, and the names of data sets on the Hub.

        Returns:
            A hexadecimal SHA-256 digest.

        Raises:
            DataError: A file is missing or cannot be read.
        """
        digest = hashlib.sha256(self.column.encode())
        for source in self.sources:
            path = Path(source)
            files = [path] if os.path.isfile(path) else _files_below(path)
            for file in files:
                digest.update(_file_digest(file))
            if not files and data_suffix(path) in FILE_SUFFIXES:
                check_regular_file(path)
            elif not files:
                digest.update(source.encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Iterate over the documents in order.

        Yields:
            The text of each document that is more than whitespace.

        Raises:
            DataError: A source cannot be read, or a row has no text in the column, or text that is not valid Unicode;
                the message names the row.
        """
        for source in self.sources:
            for text in self._read(source):
                if text.strip():
                    yield text

    def _read(self, source: str) -> Iterator[str]:
        """Iterate over the documents of one source, with those that are only whitespace."""
        path = Path(source)
        suffix = data_suffix(path)
        if suffix == ".txt":
            yield from _read_text_file(path, source)
            return
        rows = read_json_rows(path) if suffix in JSON_SUFFIXES else enumerate(_load_rows(source), start=1)
        for row_number, row in rows:
            yield self._text(row, f"{source}, row {row_number}")

    def _text(self, row: Any, location: str) -> str:
        """Return the text of a row; refuse rows without text, or with text that is not valid Unicode."""
        text = row.get(self.column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise DataError(
                f"{location}: no text in column {self.column!r} (found: {columns}). Set the column with --text-column."
            )
        if not is_unicode(text):
            raise DataError(f"{location}: the text in column {self.column!r} is not valid Unicode. Correct the row.")
        return text


def _read_text_file(path: Path, source: str) -> Iterator[str]:
    """Iterate over the lines of a text file, without their line ends; errors name the source as the user wrote it."""
    for line_number, raw_line in enumerate(read_lines(path), start=1):
        try:
            line = raw_line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source}, line {line_number}: is not UTF-8 text ({error}). Save the file as UTF-8."
            ) from error
        for text in io.StringIO(line, newline=None):  # StringIO also splits at \r, as in old Macintosh files
            yield text.removesuffix("\n")  # some tokenizers have a token for line ends


def _load_rows(source: str) -> Iterator[Any]:
    """Iterate over the rows of a source that `datasets` reads: a file, a folder or a named data set."""
    from datasets import load_dataset

    path = Path(source)
    builder = DATASETS_BUILDERS.get(data_suffix(path))
    if builder:
        check_regular_file(path)
    try:
        if is_saved_dataset(path):
            yield from load_saved_dataset(HubSplit(dataset=source, split="train"))
        elif builder:
            options = {"keep_default_na": False} if builder == "csv" else {}  # "NA" and "null" are text
            yield from load_dataset(builder, data_files=source, split="train", streaming=True, **options)
        else:
            name, _, config = source.partition(":")
            check_folder(Path(name))
            yield from load_dataset(name, config or None, split="train", streaming=True)
    except DataError:
        raise
    except Exception as error:  # `datasets` and its readers raise many types, some only when rows are read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source}: `datasets` cannot load it as a file or a data set ({reason}). Correct the source."
        ) from error


def _file_digest(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}). Correct its permissions.") from error


def _files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted; empty if there is no such folder."""
    try:
        return sorted(file for file in folder.rglob("*") if file.is_file())
    except (OSError, ValueError):  # the source is not a valid file name, so it can only be a name on the Hub
        return []


def pack(
    corpus: Corpus, base: Base, block_size: int, cache_file: Path, progress: Progress
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Tokenise a corpus into a cache file, and return it as blocks of equal length.

    Documents are concatenated. Encoders get the tokenizer's special tokens around each document, decoders the
    tokenizer's end-of-text token, if it has one, after each document. An incomplete last block is dropped.

    Args:
        corpus: The text, enough for `MIN_BLOCKS` blocks.
        base: The base, for its tokenizer.
        block_size: Tokens per block.
        cache_file: The file of all tokens. If it exists and is undamaged, it is read, and nothing is tokenised.
        progress: Called after each batch of documents.

    Returns:
        Token ids, blocks × tokens, memory-mapped from the file.

    Raises:
        CheckpointError: The tokenizer produces a token that the base has no embedding for.
        DataError: The text cannot be read, or it fills fewer than `MIN_BLOCKS` blocks.
    """
    import numpy as np

    seal_file = cache_file.with_suffix(".json")
    if not is_sealed(seal_file):
        num_documents = 0
        with replace_atomically(cache_file, synced=False) as temporary, temporary.open("wb") as stream:
            for texts in _batches(corpus.documents()):
                for ids in _tokenise(base, texts):
                    stream.write(np.asarray(ids, dtype=np.uint32).tobytes())
                num_documents += len(texts)
                progress("tokenise", num_documents, 0, {})
        seal(seal_file, [cache_file])
    num_tokens = cache_file.stat().st_size // np.dtype(np.uint32).itemsize
    num_blocks = num_tokens // block_size
    if num_blocks < MIN_BLOCKS:
        raise DataError(
            f"{', '.join(corpus.sources)}: {num_tokens:,} tokens of text make {num_blocks} blocks of {block_size}, and "
            f"at least {MIN_BLOCKS} are needed. Use more text or a smaller --block."
        )
    tokens = np.memmap(cache_file, dtype=np.uint32, mode="r")
    return tokens[: num_blocks * block_size].reshape(num_blocks, block_size)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    while True:
        texts = list(islice(documents, DOCUMENTS_PER_BATCH))
        if not texts:
            return
        yield texts


def _tokenise(base: Base, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each document, with the tokens that mark where documents end."""
    tokenizer = base.tokenizer
    encoded: list[list[int]] = tokenizer(
        texts, add_special_tokens=not base.is_decoder, return_attention_mask=False, verbose=False
    )["input_ids"]
    base.check_tokens(tokenizer, {token for ids in encoded for token in ids})
    if base.is_decoder and tokenizer.eos_token_id is not None:
        return [[*ids, tokenizer.eos_token_id] for ids in encoded]
    return encoded
