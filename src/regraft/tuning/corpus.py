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
    from collections.abc import Iterator, Sequence

    import numpy as np

    from regraft.base import Base
    from regraft.progress import Progress

DOCUMENTS_PER_BATCH = 512
"""Documents per call of the tokenizer, which tokenises a batch on several threads; all of a batch is in memory."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The sources of unlabelled text.

    Args:
        sources: Text files (a document per line), JSON lines or lists, CSV or Parquet files, all but Parquet also
            compressed (.gz, .xz, .bz2, .zst); folders of `save_to_disk`; or `datasets` names (`name` or `name:config`,
            of which the `train` split is read).
        column: The text column of sources that have columns.
    """

    sources: tuple[str, ...]
    column: str = "text"

    def digest(self) -> str:
        """Hash the content of files and folders, and the names of data sets on the Hub.

        Returns:
            A hexadecimal SHA-256 digest.

        Raises:
            DataError: A file is missing or cannot be read.
        """
        digest = hashlib.sha256(self.column.encode())
        for source in self.sources:
            path = Path(source)
            if files := [path] if os.path.isfile(path) else _files_below(path):
                for file in files:
                    try:
                        with file.open("rb") as stream:
                            digest.update(hashlib.file_digest(stream, "sha256").digest())
                    except OSError as error:
                        reason = error.strerror or error
                        raise DataError(f"{file}: cannot be read ({reason}). Correct its permissions.") from error
            elif data_suffix(path) in (".txt", ".jsonl", ".json", ".csv", ".parquet"):
                check_regular_file(path)
            else:
                digest.update(source.encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Iterate over the documents in order.

        Yields:
            The text of each document that is not blank.

        Raises:
            DataError: A row cannot be read or lacks the column; the message names the row.
        """
        for source in self.sources:
            for text in self._read(source):
                if text.strip():
                    yield text

    def _read(self, source: str) -> Iterator[str]:
        path = Path(source)
        suffix = data_suffix(path)
        if suffix == ".txt":
            for row, raw in enumerate(read_lines(path), start=1):
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{source}, line {row}: is not UTF-8 text ({error}). Save the file as UTF-8."
                    ) from error
                for text in io.StringIO(line, newline=None):  # also ends lines at \r, as old Macintosh files do
                    yield text.removesuffix("\n")  # some tokenizers have a token for it
        elif suffix in (".jsonl", ".json"):
            for row, entry in read_json_rows(path):
                yield self._text(entry, f"{source}, row {row}")
        else:
            for row, entry in enumerate(self._load(source), start=1):
                yield self._text(entry, f"{source}, row {row}")

    def _load(self, source: str) -> Iterator[Any]:
        from datasets import load_dataset

        builder = {".csv": "csv", ".parquet": "parquet"}.get(data_suffix(Path(source)))
        if builder:
            check_regular_file(Path(source))
        try:
            if is_saved_dataset(Path(source)):
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
                f"{source}: is neither a file nor a data set that `datasets` can load ({reason}). Correct the source."
            ) from error

    def _text(self, entry: Any, location: str) -> str:
        text = entry.get(self.column) if isinstance(entry, dict) else None
        if not isinstance(text, str):
            columns = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
            raise DataError(
                f"{location}: no text in column {self.column!r} (found: {columns}). Set the column with --text-column."
            )
        if not is_unicode(text):
            raise DataError(f"{location}: the text in column {self.column!r} is not valid Unicode. Correct the row.")
        return text


def _files_below(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.rglob("*") if file.is_file())
    except (OSError, ValueError):  # not a valid file name, so it can only be a name on the Hub
        return []


def pack(
    corpus: Corpus, base: Base, block: int, file: Path, progress: Progress
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Tokenise a corpus into a cache file, and return it as blocks of equal length.

    Documents are concatenated, with the tokenizer's special tokens around each document (encoders) or its end-of-text
    token after each (decoders). An incomplete last block is dropped.

    Args:
        corpus: The text.
        base: The base, for its tokenizer.
        block: Tokens per block.
        file: The cache file; it is read instead if it exists and is undamaged.
        progress: Called after each batch of documents.

    Returns:
        Token ids, blocks × tokens, memory-mapped from the file.

    Raises:
        DataError: The text does not fill two blocks: one to train on and one to evaluate on.
    """
    import numpy as np

    record = file.with_suffix(".json")
    if not is_sealed(record):
        count = 0
        with replace_atomically(file, synced=False) as temporary, temporary.open("wb") as stream:
            documents = corpus.documents()
            while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
                for ids in _tokenise(base, batch):
                    stream.write(np.asarray(ids, dtype=np.uint32).tobytes())
                count += len(batch)
                progress("tokenise", count, 0, {})
        seal(record, [file])
    tokens = file.stat().st_size // np.dtype(np.uint32).itemsize
    blocks = tokens // block
    if blocks < 2:
        raise DataError(
            f"{', '.join(corpus.sources)}: {tokens:,} tokens of text make {blocks} blocks of {block}, and at least 2 "
            "are needed. Use more text or a smaller --block."
        )
    return np.memmap(file, dtype=np.uint32, mode="r")[: blocks * block].reshape(blocks, block)


def _tokenise(base: Base, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = base.tokenizer
    encoded: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=not base.is_decoder, return_attention_mask=False, verbose=False
    )["input_ids"]
    base.check_tokens(tokenizer, {token for ids in encoded for token in ids})
    if base.is_decoder and tokenizer.eos_token_id is not None:
        return [[*ids, tokenizer.eos_token_id] for ids in encoded]
    return encoded
