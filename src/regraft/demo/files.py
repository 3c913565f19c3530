"""Write and read the data files of the demo's tasks: CSV, or JSON lines for values that are lists."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import yaml

from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows in the format that the file's suffix names.

    Args:
        file: A `.csv` or `.jsonl` file.
        rows: The values of each row by column, of the same columns in every row; at least one row.
    """
    with file.open("w", encoding="utf-8", newline="") as stream:
        if file.suffix == ".jsonl":
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.writer(stream)
            writer.writerow(rows[0])
            writer.writerows(row.values() for row in rows)


def read_texts(file: Path) -> Iterator[str]:
    """Read the texts of a file that `write_rows` wrote.

    A text is the column `text`, the column `words` joined by spaces, or the user's turn in the column `messages`.

    Args:
        file: A `.csv` or `.jsonl` file.

    Raises:
        DataError: The file cannot be read, is not UTF-8 or has none of the columns.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows: Iterator[dict[str, Any]] = (
                map(json.loads, stream) if file.suffix == ".jsonl" else csv.DictReader(stream)
            )
            for row in rows:
                if "messages" in row:
                    text = next(message["content"] for message in row["messages"] if message["role"] == "user")
                else:
                    text = row["text"] if "text" in row else " ".join(row["words"])
                if not isinstance(text, str):  # a short row of a CSV file has None
                    raise TypeError(f"the text of a row is {text!r:.40}")
                yield text
    except (OSError, KeyError, StopIteration, TypeError, ValueError, csv.Error) as error:
        kind = "JSON lines" if file.suffix == ".jsonl" else "CSV"
        raise DataError(
            f"{file}: is not a {kind} file with a column 'text', 'words' or 'messages' ({error})."
        ) from error


def evaluation_files(task_file: Path) -> list[Path]:
    """Return the dev and test files of a task, whose texts a base must not be pre-trained on.

    Args:
        task_file: A `task.yaml` that `write_task` wrote.
    """
    content = yaml.safe_load(task_file.read_text(encoding="utf-8"))
    return [task_file.parent / content[split] for split in ("dev", "test")]
