"""Folders that exist only when they are whole: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from regraft.errors import OutcomeError, RegraftError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def resumable_folder(out: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Give a hidden working folder beside `out` that survives an interruption, and lock it.

    What a killed run left there is kept if that run had the same inputs, and cleared otherwise. The caller ends by
    `publish`; whatever remains in the working folder is then removed. So it is after an error of regraft's own, unless
    there are `checkpoints` in it to go on from.

    Args:
        out: The folder that will exist when the work is whole.
        inputs: What the work is made from, as JSON; another value is another work.

    Yields:
        The working folder.

    Raises:
        OutcomeError: Another process is at work on the same `out`, or its parent cannot be written.
    """
    work = out.parent / f".{out.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutcomeError(f"{work}: cannot be created ({error.strerror or error}).") from error
    lock = (work / "lock").open("a")
    try:
        _lock(lock.fileno(), out)
        wanted = json.dumps(inputs, sort_keys=True)
        record = work / "inputs.json"
        if not record.is_file() or record.read_text(encoding="utf-8") != wanted:
            for entry in work.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_atomic(record, wanted)
        try:
            yield work
        except RegraftError:
            if not any(work.rglob("checkpoints")):
                shutil.rmtree(work)
            raise
        if out.exists():
            shutil.rmtree(work)
    finally:
        lock.close()


def publish(whole: Path, out: Path) -> None:
    """Rename a whole folder into its place.

    Args:
        whole: The folder that is complete.
        out: Where it shall stand; must not exist.

    Raises:
        OutcomeError: `out` exists.
    """
    if out.exists():
        raise OutcomeError(f"{out}: exists already. Choose another --out or remove it.")
    for file in whole.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    os.rename(whole, out)


def write_atomic(file: Path, text: str) -> None:
    """Write a text file so that it is seen whole or not at all.

    Args:
        file: Where to.
        text: Its content, written as UTF-8.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def _lock(descriptor: int, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two runs on one folder at once are then the user's to avoid
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutcomeError(f"{out}: another regraft is writing it. Wait for it, or choose another --out.") from None
