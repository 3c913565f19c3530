"""Unlabelled text as packed blocks of tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from regraft.progress import Progress
    from regraft.upgrade import Base

DOCUMENTS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where unlabelled text comes from.

    Args:
        sources: Text files (a document a line), JSONL, CSV or Parquet files, or `datasets` names (`name` or
            `name:config`, their `train` split).
        column: The text's name in sources that have columns.
    """

    sources: tuple[str, ...]
    column: str = "text"

    def digest(self) -> str:
        """Hash the content of files and folders, and the names of the rest.

        Returns:
            A hexadecimal digest.

        Raises:
            DataError: A file is missing.
        """
        digest = hashlib.sha256(self.column.encode())
        for source in self.sources:
            path = Path(source)
            if files := [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
                for file in files:
                    with file.open("rb") as stream:
                        digest.update(hashlib.file_digest(stream, "sha256").digest())
            elif path.suffix in (".txt", ".jsonl", ".json", ".csv", ".parquet"):
                raise DataError(f"{source}: no such file.")
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
        if path.suffix == ".txt":
            with path.open(encoding="utf-8") as stream:
                try:
                    for line in stream:
                        yield line.removesuffix("\n")  # a tokenizer may make a token of it
                except UnicodeDecodeError as error:
                    raise DataError(f"{source}: is not UTF-8 text ({error}).") from error
        elif path.suffix in (".jsonl", ".json"):
            with path.open("rb") as stream:
                for row, raw in enumerate(stream, start=1):
                    if raw.strip():
                        yield self._text(_parse(raw, f"{source}, row {row}"), f"{source}, row {row}")
        else:
            for row, entry in enumerate(self._load(source), start=1):
                yield self._text(entry, f"{source}, row {row}")

    def _load(self, source: str) -> Iterator[Any]:
        from datasets import load_dataset

        kind = {".csv": "csv", ".parquet": "parquet"}.get(Path(source).suffix)
        try:
            if kind:
                as_text = {"keep_default_na": False} if kind == "csv" else {}
                yield from load_dataset(kind, data_files=source, split="train", streaming=True, **as_text)
            else:
                name, _, config = source.partition(":")
                yield from load_dataset(name, config or None, split="train", streaming=True)
        except Exception as error:  # datasets and its readers raise many kinds, some only once rows are read
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{source}: neither a file nor a data set that `datasets` can load ({reason}).") from error

    def _text(self, entry: Any, where: str) -> str:
        if not isinstance(entry, dict) or not isinstance(entry.get(self.column), str):
            found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
            raise DataError(f"{where}: no text in column {self.column!r} (found: {found}). Name it by --text-column.")
        return str(entry[self.column])


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not a JSON object on one line ({error}).") from error


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
        file: The cache; used as it is if it is there.
        progress: Told of the documents.

    Returns:
        Blocks × tokens, mapped from the file.

    Raises:
        DataError: There is less than two blocks of text.
    """
    import numpy as np

    if not file.is_file():
        beside = file.with_suffix(".writing")
        count = 0
        with beside.open("wb") as stream:
            documents = corpus.documents()
            while texts := list(islice(documents, DOCUMENTS_AT_ONCE)):
                for ids in _tokenise(base, texts):
                    stream.write(np.asarray(ids, dtype=np.uint32).tobytes())
                count += len(texts)
                progress("tokenise", count, 0, {})
        beside.replace(file)
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
