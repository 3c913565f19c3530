"""Folders that exist only when they are whole: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from regraft.checkpoint.file import disk_full_error, is_disk_full, new_file_mode, sync, write_atomic
from regraft.errors import OutcomeError, RecipeError, RegraftError

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

LOCK = "lock"
TEMPORARY = "regraft-"
ATTEMPTS = 100  # each is lost only to another process that ends between two system calls


@contextlib.contextmanager
def resumable_folder(out: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Make a hidden working folder beside `out` that survives an interruption, and lock it.

    What a killed run left there is kept if that run had the same inputs, and cleared otherwise. The caller ends by
    `publish`; whatever remains in the working folder is then removed. So it is after an error of regraft's own, unless
    there are `checkpoints` in it to go on from; a recipe that cannot be carried out leaves nothing. Another process may
    have published `out` before the folder was locked: the caller looks for it again.

    Args:
        out: The folder that will exist when the work is whole.
        inputs: What the work is made from, as JSON; another value is another work.

    Yields:
        The working folder.

    Raises:
        DiskFullError: The disk is full; what was done so far is kept.
        OutcomeError: Another process is at work on the same `out`, or nothing can be written there.
    """
    check_output_path(out)
    work = working_folder(out)
    with _locked(work, out):
        try:
            expected, record = json.dumps(inputs, sort_keys=True), work / "inputs.json"
            if not record.is_file() or record.read_bytes() != expected.encode():
                for entry in work.iterdir():
                    if entry.name != LOCK:
                        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
                write_atomic(record, expected)
            yield work
        except BaseException as error:
            refused = isinstance(error, RegraftError)
            if isinstance(error, RecipeError) or (refused and not any(work.rglob("checkpoints"))):
                shutil.rmtree(work)
                raise
            raised = disk_full_error(work) if not refused and is_disk_full(error) else error
            raised.add_note(f"What was done so far is kept in {work}: the same command goes on from it.")
            if raised is error:
                raise
            raise raised from error
        if out.exists():
            shutil.rmtree(work)


def working_folder(out: Path) -> Path:
    """Name the hidden folder in which a folder is made.

    Args:
        out: The folder that is to be.

    Returns:
        The path, beside it.
    """
    return out.parent / f".{out.name}.partial"


def check_output_path(out: Path) -> None:
    """Refuse a place in which no folder can be made, before any work is done.

    Args:
        out: The folder that is to be; it may be there.

    Raises:
        OutcomeError: It is a file, a link to nothing or no name, or lies under a file or a folder that is read-only.
    """
    if out.name in ("", ".."):
        raise OutcomeError(f"--out {str(out)!r}: is no name of a new folder. Choose another --out.")
    try:
        if out.is_dir():
            return
        if os.path.lexists(out):
            what = "a link to nothing" if out.is_symlink() else "a file"
            raise OutcomeError(f"{out}: is {what}, where a folder is to be. Choose another --out or remove it.")
        parent = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
        if not parent.is_dir():
            raise OutcomeError(f"{out}: cannot be created ({parent} is no folder). Choose another --out.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutcomeError(f"{out}: cannot be created ({parent} is not writable). Choose another --out.")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise OutcomeError(f"{out}: cannot be created ({error.strerror or error}). Choose another --out.") from error


def publish(whole: Path, out: Path) -> None:
    """Rename a whole folder into its place, its files synced and as readable as any new file.

    Args:
        whole: The folder that is complete.
        out: Its place; must not exist.

    Raises:
        OutcomeError: `out` exists, or cannot be made.
    """
    check_output_path(out)
    if out.exists():
        raise OutcomeError(f"{out}: exists already. Choose another --out or remove it.")
    mode = new_file_mode()
    for path in (*whole.rglob("*"), whole):
        if path.is_file():
            os.chmod(path, mode)  # safetensors leaves 0600, whatever the umask says
        sync(path)
    os.rename(whole, out)
    sync(out.absolute().parent)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for a while; those that killed processes left are removed on the way.

    Yields:
        The folder, empty but for a lock that tells other processes that it is in use.
    """
    folder = Path(tempfile.gettempdir())
    for left in folder.glob(f"{TEMPORARY}*"):
        _remove_abandoned(left)
    work = folder / f"{TEMPORARY}{uuid.uuid4().hex}"
    with _locked(work, work, mode=0o700):
        try:
            yield work
        finally:
            shutil.rmtree(work)


def _remove_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError, OutcomeError), (folder / LOCK).open("r+") as lock:
        if not folder.is_symlink() and _lock(lock, folder):
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(work: Path, out: Path, mode: int = 0o777) -> Iterator[None]:
    """Make a folder and lock it; one that its owner removes before it is locked is made again."""
    for _ in range(ATTEMPTS):
        try:
            work.mkdir(mode, parents=True, exist_ok=True)
            if work.is_symlink():
                raise OutcomeError(f"{work}: is a link, and regraft works in a folder of its own there. Remove it.")
            lock = (work / LOCK).open("a")
        except FileNotFoundError:
            continue
        except OSError as error:
            if is_disk_full(error):
                raise disk_full_error(work) from error
            raise OutcomeError(f"{work}: cannot be created ({error.strerror or error}).") from error
        with lock:
            _lock(lock, out)
            if _is_at(lock, work / LOCK):
                yield
                return
    raise OutcomeError(f"{work}: cannot be created, or vanishes at once. Choose another --out.")


def _is_at(stream: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _lock(lock: IO[str], out: Path) -> bool:
    """Lock a file, as long as it is open; return whether the file system has locks."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs on one folder at once are then the user's to avoid
        return False
    try:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OutcomeError(f"{out}: another regraft is writing it. Wait for it, or choose another --out.") from None
    except OSError as error:  # NFS without a lock daemon, Lustre without -o flock
        logger.warning(
            "%s: its file system has no locks (%s), so nothing keeps two runs on one --out apart: start one at a time.",
            out,
            error.strerror or error,
        )
        return False
    return True
