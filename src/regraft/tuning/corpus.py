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

DOCUMENTS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where unlabelled text comes from.

    Args:
        sources: Text files (a document a line), JSON lines or lists, CSV or Parquet files, the text files also
            compressed (.gz, .xz, .bz2, .zst); folders of `save_to_disk`; or `datasets` names (`name` or `name:config`,
            their `train` split).
        column: The text's name in sources that have columns.
    """

    sources: tuple[str, ...]
    column: str = "text"

    def digest(self) -> str:
        """Hash the content of files and folders, and the names of the rest.

        Returns:
            A hexadecimal digest.

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
                        raise DataError(f"{file}: cannot be read ({error.strerror or error}).") from error
            elif data_suffix(path) in (".txt", ".jsonl", ".json", ".csv", ".parquet"):
                check_regular_file(path)
            else:
                digest.update(source.encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Read the documents one after the other.

        Yields:
            Texts that are not blank.

        Raises:
            DataError: A row cannot be read, or has no such column; the message names it.
        """
        for source in self.sources:
            for text in self._read(source):
                if text.strip():
                    yield text

    def _read(self, source: str) -> Iterator[str]:
        path = Path(source)
        ending = data_suffix(path)
        if ending == ".txt":
            for row, raw in enumerate(read_lines(path), start=1):
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{source}, line {row}: is not UTF-8 text ({error}).") from error
                for text in io.StringIO(line, newline=None):  # ends of lines as on any system
                    yield text.removesuffix("\n")  # a tokenizer may make a token of it
        elif ending in (".jsonl", ".json"):
            for row, entry in read_json_rows(path):
                yield self._text(entry, f"{source}, row {row}")
        else:
            for row, entry in enumerate(self._load(source), start=1):
                yield self._text(entry, f"{source}, row {row}")

    def _load(self, source: str) -> Iterator[Any]:
        from datasets import load_dataset

        kind = {".csv": "csv", ".parquet": "parquet"}.get(data_suffix(Path(source)))
        if kind:
            check_regular_file(Path(source))
        try:
            if is_saved_dataset(Path(source)):
                yield from load_saved_dataset(HubSplit(dataset=source, split="train"))
            elif kind:
                as_text = {"keep_default_na": False} if kind == "csv" else {}
                yield from load_dataset(kind, data_files=source, split="train", streaming=True, **as_text)
            else:
                name, _, config = source.partition(":")
                check_folder(Path(name))
                yield from load_dataset(name, config or None, split="train", streaming=True)
        except DataError:
            raise
        except Exception as error:  # datasets and its readers raise many kinds, some only once rows are read
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{source}: neither a file nor a data set that `datasets` can load ({reason}).") from error

    def _text(self, entry: Any, where: str) -> str:
        text = entry.get(self.column) if isinstance(entry, dict) else None
        if not isinstance(text, str):
            columns = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
            raise DataError(f"{where}: no text in column {self.column!r} (found: {columns}). Name it by --text-column.")
        if not is_unicode(text):
            raise DataError(f"{where}: the text in column {self.column!r} is not valid Unicode. Correct the row.")
        return text


def _files_below(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.rglob("*") if file.is_file())
    except (OSError, ValueError):  # a name that no file can have: one for `datasets` to look for
        return []


def pack(
    corpus: Corpus, base: Base, block: int, file: Path, progress: Progress
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Tokenise a corpus once into a file, and give it as blocks of equal length.

    Documents follow one another with the tokenizer's special tokens around each (encoders) or its end-of-text
    token after each (decoders); what does not fill the last block is dropped.

    Args:
        corpus: The text.
        base: Whose tokenizer.
        block: Tokens a block.
        file: The cache; used if it is there and undamaged.
        progress: Told of the documents.

    Returns:
        Blocks × tokens, mapped from the file.

    Raises:
        DataError: There is less than two blocks of text.
    """
    import numpy as np

    record = file.with_suffix(".json")
    if not is_sealed(record):
        count = 0
        with replace_atomically(file, synced=False) as beside, beside.open("wb") as stream:
            documents = corpus.documents()
            while texts := list(islice(documents, DOCUMENTS_AT_ONCE)):
                for ids in _tokenise(base, texts):
                    stream.write(np.asarray(ids, dtype=np.uint32).tobytes())
                count += len(texts)
                progress("tokenise", count, 0, {})
        seal(record, [file])
    blocks = file.stat().st_size // 4 // block
    if blocks < 2:
        tokens = file.stat().st_size // 4
        raise DataError(
            f"{', '.join(corpus.sources)}: {tokens:,} tokens of text make {blocks} blocks of {block}, and at least 2 "
            "are needed. Give more text or a smaller --block."
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
