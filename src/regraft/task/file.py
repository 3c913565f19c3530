"""Files of data as bytes, compressed or not."""

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

COMPRESSED = (".gz", ".xz", ".bz2", ".zst")
MAX_EXPANSION = 100
"""The most a compressed file may expand where that is much; text expands to 3 to 20 times, bombs to thousands."""
ALWAYS_READ = 256 * 1024**2
"""So many bytes are read of a compressed file, however far it expands."""
_CHUNK = 1024**2


def data_suffix(path: Path) -> str:
    """The ending that says what a file holds, in lower case: `.csv` of `a.csv` and of `a.csv.gz`."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def check_regular_file(path: Path) -> int:
    """Refuse what is no regular file before it is opened: a pipe would keep its reader waiting.

    Args:
        path: The file.

    Returns:
        Its size in bytes.

    Raises:
        DataError: It is missing, out of reach or no regular file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. Correct the path; relative ones start from the folder of the file that names them."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise DataError(f"{str(path)[:300]}: cannot be read ({_reason(error)}). Correct the path.") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is a folder, pipe or device, not a file. Give the path of a file.")
    return status.st_size


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds a pipe or device, for which its reader would wait.

    Args:
        folder: The folder; nothing is checked where there is none.

    Raises:
        DataError: There is one; the message names it.
    """
    if os.path.isdir(folder):
        for file in folder.rglob("*"):
            if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
                raise DataError(f"{file}: is a pipe or device, which is not read as data. Remove it.")


def read_bytes(path: Path) -> bytes:
    """Read a file whole, decompressed where its name says that it is compressed.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        DataError: It cannot be read or decompressed.
    """
    return b"".join(_chunks(path))


def read_lines(path: Path) -> Iterator[bytes]:
    """Read a file line by line, decompressed where its name says that it is compressed.

    Args:
        path: The file.

    Yields:
        Its lines, each with its line feed.

    Raises:
        DataError: It cannot be read or decompressed.
    """
    parts: list[bytes] = []  # of the line that a chunk ends in; a line may be long
    for chunk in _chunks(path):
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts) + b"\n"
            parts = [other]
    if last := b"".join(parts):
        yield last


def read_json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Read JSON lines, or a file that is one JSON list.

    Args:
        path: The file.

    Yields:
        The number of the line, or of the item of the list, from 1, and what stands there; blank lines are left out.

    Raises:
        DataError: It cannot be read or is no JSON.
    """
    lines, is_first = enumerate(read_lines(path), start=1), True
    for row, line in lines:
        text = line.removeprefix(codecs.BOM_UTF8) if row == 1 else line
        if not text.strip():
            continue
        is_list, is_first = is_first and text.lstrip().startswith(b"["), False
        if is_list:  # as no file of objects, one a line, begins
            text = b"".join([text, *(rest for _, rest in lines)])
        try:
            content = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            remedy = "Write one list of objects, or one JSON object a line."
            if isinstance(error, UnicodeDecodeError) or b"\0" in text:
                remedy = "Save the file as UTF-8."
            raise DataError(f"{path}, row {row}: not JSON ({error!s:.200}). {remedy}") from error
        if is_list:
            yield from enumerate(content, start=1)
        else:
            yield row, content


def _chunks(path: Path) -> Iterator[bytes]:
    import lzma

    size, count = check_regular_file(path), 0
    compressed = path.suffix.lower() in COMPRESSED
    try:
        with _opened(path) as stream:
            while chunk := stream.read(_CHUNK):
                count += len(chunk)
                if compressed and count > max(ALWAYS_READ, MAX_EXPANSION * size):
                    raise DataError(
                        f"{path}: expands to more than {MAX_EXPANSION} times its {size:,} bytes, as no text does. "
                        "Decompress it yourself if it is to be read."
                    )
                yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        what = "be decompressed" if compressed else "be read"
        raise DataError(f"{path}: cannot {what} ({_reason(error)}). Check that it is whole and may be read.") from error


def _opened(path: Path) -> IO[bytes]:
    ending = path.suffix.lower()
    if ending == ".gz":
        import gzip

        return cast("IO[bytes]", gzip.open(path))
    if ending == ".xz":
        import lzma

        return lzma.open(path)
    if ending == ".bz2":
        import bz2

        return bz2.open(path)
    if ending == ".zst":
        import pyarrow  # it brings the codec, which Python has from 3.14 on

        return cast("IO[bytes]", pyarrow.input_stream(path, compression="zstd"))
    return path.open("rb")


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8: escapes of JSON and YAML can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
