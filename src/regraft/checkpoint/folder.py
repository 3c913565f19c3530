"""Output folders, which are written under a temporary name and renamed when complete; and temporary folders."""

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
"""The file in a working or temporary folder that is locked while the folder is in use."""
TEMPORARY_PREFIX = "regraft-"
"""The beginning of the names of temporary folders."""
CHECKPOINTS = "checkpoints"
"""The name of folders, at any depth of a working folder, from which an interrupted run resumes."""
MAX_ATTEMPTS = 100  # arbitrary: an attempt fails only if another process ends between two system calls
"""The number of attempts to create and lock a folder."""


@contextlib.contextmanager
def resumable_folder(out: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Create and lock a hidden working folder next to `out`, which survives an interruption.

    The content that an interrupted run left in it is kept if that run had the same inputs, and removed otherwise. The
    caller calls `publish` at the end; if `out` then exists, the working folder is removed. The working folder is also
    removed after a `RecipeError`, and after any other error of regraft if it has no `CHECKPOINTS` to resume from.
    Another process may have published `out` before the folder was locked, so the caller has to look for `out` again.

    Args:
        out: The output folder, which may exist.
        inputs: The inputs that identify the run; anything JSON can represent.

    Yields:
        The working folder.

    Raises:
        DiskFullError: The disk is full.
        OutcomeError: Another process is writing `out`, or `out` or the working folder cannot be created.
    """
    check_output_path(out)
    work_folder = working_folder(out)
    with _locked(work_folder, out):
        try:
            expected = json.dumps(inputs, sort_keys=True)
            record = work_folder / "inputs.json"
            if not record.is_file() or record.read_bytes() != expected.encode():
                _clear(work_folder)
                write_atomic(record, expected)
            yield work_folder
        except BaseException as error:
            is_expected = isinstance(error, RegraftError)
            if isinstance(error, RecipeError) or (is_expected and not any(work_folder.rglob(CHECKPOINTS))):
                shutil.rmtree(work_folder)
                raise
            note = f"The work so far is in {work_folder}. The same command resumes it."
            if is_expected or not is_disk_full(error):
                error.add_note(note)
                raise
            disk_full = disk_full_error(work_folder)
            disk_full.add_note(note)
            raise disk_full from error
        if out.exists():
            shutil.rmtree(work_folder)


def _clear(work_folder: Path) -> None:
    for entry in work_folder.iterdir():
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def working_folder(out: Path) -> Path:
    """Return the path of the hidden working folder of an output folder.

    Args:
        out: The output folder, which need not exist.
    """
    return out.parent / f".{out.name}.partial"


def check_output_path(out: Path) -> None:
    """Check that an output folder can be created, before any work is done.

    Args:
        out: The output folder, which may exist.

    Raises:
        OutcomeError: The path is a file, a broken link or not a folder's name; the nearest parent that exists is a file
            or not writable; or the system refuses the path, such as for its length.
    """
    if out.name in ("", ".."):
        raise OutcomeError(f"--out {str(out)!r}: is not a name for a folder. Choose another --out.")
    try:
        if out.is_dir():
            return
        if os.path.lexists(out):
            kind = "a broken link" if out.is_symlink() else "a file"
            raise OutcomeError(f"{out}: is {kind}, not a folder. Choose another --out or remove it.")
        parent = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
        if not parent.is_dir():
            raise OutcomeError(f"{out}: cannot be created ({parent} is not a folder). Choose another --out.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutcomeError(f"{out}: cannot be created ({parent} is not writable). Choose another --out.")
    except OSError as error:  # the name is too long, or a folder may not be entered
        raise OutcomeError(f"{out}: cannot be created ({error.strerror or error}). Choose another --out.") from error


def publish(staging: Path, out: Path) -> None:
    """Rename a complete folder to its final name, after syncing its files and setting their permissions.

    Args:
        staging: The complete folder, on the same file system as `out`.
        out: The final path, which must not exist.

    Raises:
        OSError: A file cannot be synced, or the folder cannot be renamed.
        OutcomeError: `out` exists or cannot be created.
    """
    check_output_path(out)
    if out.exists():
        raise OutcomeError(f"{out}: exists already. Choose another --out or remove it.")
    mode = new_file_mode()
    for path in (*staging.rglob("*"), staging):
        if path.is_file():
            os.chmod(path, mode)  # safetensors sets 0600 regardless of the umask
        sync(path)
    os.rename(staging, out)
    sync(out.absolute().parent)


def empty_folder(folder: Path) -> Path:
    """Create an empty folder, after removing the folder that an interrupted run left at its path.

    Args:
        folder: The folder to create.

    Returns:
        The same path.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Create a temporary folder, and remove the temporary folders of killed processes.

    Yields:
        The folder. It is empty except for a lock file, which shows other processes that the folder is in use.
    """
    parent = Path(tempfile.gettempdir())
    for abandoned in parent.glob(f"{TEMPORARY_PREFIX}*"):
        _remove_unlocked(abandoned)
    folder = parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    with _locked(folder, folder, mode=0o700):
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _remove_unlocked(folder: Path) -> None:
    with contextlib.suppress(OSError, OutcomeError), (folder / LOCK).open("r+") as lock:
        if not folder.is_symlink() and _lock(lock, folder):
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path, out: Path, mode: int = 0o777) -> Iterator[None]:
    """Create a folder and lock it; try again if another process removes it before it is locked."""
    for _ in range(MAX_ATTEMPTS):
        try:
            folder.mkdir(mode, parents=True, exist_ok=True)
            if folder.is_symlink():
                raise OutcomeError(f"{folder}: is a link, but regraft needs a working folder of that name. Remove it.")
            lock = (folder / LOCK).open("a")
        except FileNotFoundError:
            continue
        except OSError as error:
            if is_disk_full(error):
                raise disk_full_error(folder) from error
            raise OutcomeError(
                f"{folder}: cannot be created ({error.strerror or error}). Choose another --out."
            ) from error
        with lock:
            _lock(lock, out)
            if _is_at(lock, folder / LOCK):
                yield
                return
    raise OutcomeError(f"{folder}: cannot be created, or is removed immediately. Choose another --out.")


def _is_at(stream: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _lock(lock: IO[str], out: Path) -> bool:
    """Lock a file while it is open, and return whether that is supported; raise an error if it is locked already."""
    try:
        import fcntl
    except ImportError:  # Windows: the user has to avoid two runs on one folder at the same time
        return False
    try:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise OutcomeError(
            f"{out}: another regraft process is writing it. Wait for it, or choose another --out."
        ) from None
    except OSError as error:  # NFS without a lock daemon, Lustre without -o flock
        logger.warning(
            "%s: the file system has no locks (%s), so do not start two runs on one --out at the same time.",
            out,
            error.strerror or error,
        )
        return False
    return True
