"""Readers of the bytes, lines and JSON rows of files, compressed or not, and checks of their paths."""

from __future__ import annotations

import codecs
import json
import os
import stat
import zlib
from typing import IO, TYPE_CHECKING, Any, cast

from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMPRESSED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
"""The suffixes of compressed files that are read."""
MAX_EXPANSION = 100
"""The factor by which a large compressed file may expand: text expands 3 to 20 times, decompression bombs thousands."""
MIN_CHECKED_BYTES = 256 * 1024**2
"""The decompressed size up to which expansion is not limited: it fits in memory, whatever the factor."""
_CHUNK_BYTES = 1024**2
"""The number of bytes read at once: arbitrary, but far more than most lines and far less than memory."""


def data_suffix(path: Path) -> str:
    """Return the suffix that tells a file's format, in lower case: `.csv` for `a.csv` and for `a.csv.gz`."""
    uncompressed = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    return uncompressed.suffix.lower()


def check_regular_file(path: Path) -> None:
    """Check that a path is a regular file, before it is opened: opening a pipe would block.

    Args:
        path: The path, which may be missing.

    Raises:
        DataError: The path is missing, inaccessible, or not a regular file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. Correct the path; relative paths start from the folder of the file that names them."
        ) from None
    except (OSError, ValueError) as error:  # a null byte in the path raises ValueError
        raise DataError(f"{path!s:.300}: cannot be read ({_reason(error)}). Correct the path.") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is a folder, pipe or device, not a file. Use the path of a file.")


def check_folder(folder: Path) -> None:
    """Check that a folder contains no pipe or device: opening one would block.

    Args:
        folder: The folder, which need not exist.

    Raises:
        DataError: The folder contains a pipe or device; the message names it.
    """
    if os.path.isdir(folder):
        for file in folder.rglob("*"):
            if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
                raise DataError(f"{file}: is a pipe or device, which is not read as data. Remove it.")


def read_bytes(path: Path) -> bytes:
    """Read a file, and decompress it if its suffix says that it is compressed.

    Args:
        path: A file, compressed if its suffix is one of `COMPRESSED_SUFFIXES`.

    Returns:
        The decompressed content.

    Raises:
        DataError: The file cannot be read or decompressed.
    """
    return b"".join(_chunks(path))


def read_lines(path: Path) -> Iterator[bytes]:
    """Read a file line by line, and decompress it if its suffix says that it is compressed.

    Args:
        path: A file, compressed if its suffix is one of `COMPRESSED_SUFFIXES`.

    Yields:
        The lines, each with its line feed, which only the last may lack.

    Raises:
        DataError: The file cannot be read or decompressed.
    """
    unfinished: list[bytes] = []  # the parts of the current line, which may extend over many chunks
    for chunk in _chunks(path):
        head, *tails = chunk.split(b"\n")
        unfinished.append(head)
        for tail in tails:
            yield b"".join(unfinished) + b"\n"
            unfinished = [tail]
    last_line = b"".join(unfinished)
    if last_line:
        yield last_line


def read_json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Read JSON lines, or a file that is a single JSON list.

    Args:
        path: A file, compressed if its suffix is one of `COMPRESSED_SUFFIXES`.

    Yields:
        The number of each line or list item, counted from 1, and its value; lines of whitespace are skipped.

    Raises:
        DataError: The file cannot be read, or is not JSON.
    """
    lines = enumerate(read_lines(path), start=1)
    for row, line in lines:
        text = line.removeprefix(codecs.BOM_UTF8) if row == 1 else line
        if text.strip():
            break
    else:
        return
    if text.lstrip().startswith(b"["):  # a file of one object per line does not begin with a bracket
        list_text = b"".join([text, *(line for _, line in lines)])
        yield from enumerate(_parse_json(list_text, path, row), start=1)
        return
    yield row, _parse_json(text, path, row)
    for row, line in lines:
        if line.strip():
            yield row, _parse_json(line, path, row)


def _parse_json(text: bytes, path: Path, row: int) -> Any:
    """Parse JSON that starts at a row of a file; raise DataError if it is malformed."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        remedy = "Write one list of objects, or one JSON object per line."
        if isinstance(error, UnicodeDecodeError) or b"\0" in text:
            remedy = "Save the file as UTF-8."
        raise DataError(f"{path}, row {row}: not JSON ({error!s:.200}). {remedy}") from error


def _chunks(path: Path) -> Iterator[bytes]:
    """Read a file in chunks of decompressed bytes; raise DataError if it cannot be read or expands too much."""
    import lzma

    check_regular_file(path)
    is_compressed = path.suffix.lower() in COMPRESSED_SUFFIXES
    decompressed_size = 0
    try:
        size = path.stat().st_size
        with _open(path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                decompressed_size += len(chunk)
                if is_compressed and decompressed_size > max(MIN_CHECKED_BYTES, MAX_EXPANSION * size):
                    raise DataError(
                        f"{path}: expands to more than {MAX_EXPANSION} times its {size:,} bytes, which no text does. "
                        "If it is to be read nevertheless, decompress it yourself."
                    )
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        verb = "decompressed" if is_compressed else "read"
        raise DataError(
            f"{path}: cannot be {verb} ({_reason(error)}). Check that it is complete and that you may read it."
        ) from error


def _open(path: Path) -> IO[bytes]:
    """Open a file for reading, through the decompressor that its suffix names."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        import gzip

        return cast("IO[bytes]", gzip.open(path))
    if suffix == ".xz":
        import lzma

        return lzma.open(path)
    if suffix == ".bz2":
        import bz2

        return bz2.open(path)
    if suffix == ".zst":
        import pyarrow  # the standard library has this codec only from Python 3.14 on

        return cast("IO[bytes]", pyarrow.input_stream(path, compression="zstd"))
    return path.open("rb")


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8: lone surrogates, which JSON and YAML can escape, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: Exception) -> str:
    """Return the operating system's description of an error, else the first line of its message."""
    return getattr(error, "strerror", None) or first_line(error)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
