"""Atomic writing of files and folders: after a power loss, on a full disk, without locks, next to other files."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from regraft.checkpoint import (
    Checkpoint,
    check_output_path,
    fingerprint,
    is_sealed,
    publish,
    replace_atomically,
    resumable_folder,
    seal,
    temporary_folder,
    to_json,
    write_checkpoint,
    write_folder,
)
from regraft.errors import DiskFullError, OutcomeError


def test_shard_with_damaged_data_is_written_again(tmp_path):
    """After a power loss, a file may have its size and header but not its data."""
    tensors = {name: torch.randn(8, generator=torch.Generator().manual_seed(ord(name))) for name in "abc"}
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", tensors, shard_bytes=64)
    expected = {shard.name: shard.read_bytes() for shard in (tmp_path / "out").glob("*.safetensors")}
    assert len(expected) > 1
    for shard in (tmp_path / "out").glob("*.safetensors"):
        start = int.from_bytes(shard.read_bytes()[:8], "little") + 8
        shard.write_bytes(shard.read_bytes()[:start] + bytes(shard.stat().st_size - start))
    write_checkpoint(tmp_path / "out", tensors, shard_bytes=64)
    assert {shard.name: shard.read_bytes() for shard in (tmp_path / "out").glob("*.safetensors")} == expected


def test_input_that_changed_between_the_samples_of_its_fingerprint_is_detected(tmp_path):
    numbers = torch.zeros(200_000)
    (tmp_path / "in").mkdir()
    save_file({"a": numbers}, tmp_path / "in" / "model.safetensors")

    def write():
        source = Checkpoint.open(tmp_path / "in")
        write_folder(source, tmp_path / "out", tmp_path / "in", {"from": fingerprint(source)})

    write()
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    write()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    changed = numbers.clone()
    changed[1_000:6_000] = 1
    sampled = fingerprint(Checkpoint.open(tmp_path / "in"))
    save_file({"a": changed}, tmp_path / "in" / "model.safetensors")
    assert fingerprint(Checkpoint.open(tmp_path / "in")) == sampled
    with pytest.raises(OutcomeError, match="its content differs from what would be written"):
        write()


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda path: path.symlink_to("nothing"), "is a broken link"),
        (Path.touch, "is a file, not a folder"),
        (lambda path: (path.parent / f".{path.name}.partial").symlink_to(path.parent), "is a link"),
    ],
)
def test_existing_files_are_reported_and_kept(tmp_path, create, message):
    (tmp_path / "precious").touch()
    create(tmp_path / "out")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutcomeError, match=message), resumable_folder(tmp_path / "out", {}):
        pytest.fail("no work may begin")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("out", ["", "..", "/", "file/out", "a" * 300])
def test_impossible_output_paths_are_refused(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(OutcomeError, match=r"not a name for a folder|cannot be created"):
        check_output_path(Path(out))


def test_missing_locks_are_a_warning(tmp_path, monkeypatch, caplog):
    import fcntl

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with resumable_folder(tmp_path / "out", {}) as work:
        (work / "whole").mkdir()
        publish(work / "whole", tmp_path / "out")
    assert "has no locks" in caplog.text
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_full_disk_is_one_error_and_leaves_no_temporary_file(tmp_path, failure):
    (tmp_path / "file").write_text("before")
    with (
        pytest.raises(DiskFullError, match="Make room, then run the same command again"),
        replace_atomically(tmp_path / "file"),
    ):
        raise failure
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(DiskFullError), resumable_folder(tmp_path / "out", {}) as work:
        (work / "checkpoints").mkdir()
        raise failure
    assert (work / "checkpoints").is_dir()
    assert (tmp_path / "file").read_text() == "before"


def test_pipe_instead_of_a_sealed_file_does_not_block(tmp_path):
    (tmp_path / "a").write_text("a")
    seal(tmp_path / "seal.json", [tmp_path / "a"])
    assert is_sealed(tmp_path / "seal.json")
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    assert not is_sealed(tmp_path / "seal.json")


def test_published_files_have_the_permissions_of_new_files(tmp_path):
    with resumable_folder(tmp_path / "out", {}) as work:
        (work / "whole").mkdir()
        save_file({"a": torch.zeros(1)}, work / "whole" / "model.safetensors")
        (work / "whole" / "model.safetensors").chmod(0o600)
        publish(work / "whole", tmp_path / "out")
    (tmp_path / "new").touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_temporary_folder_of_a_killed_process_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, signal\nfrom regraft.checkpoint import temporary_folder\n"
    code += "with temporary_folder() as folder: print(folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    abandoned = Path(killed.stdout.strip())
    assert abandoned.is_dir()
    (tmp_path / "regraft-of-another-tool").mkdir()
    with temporary_folder() as first, temporary_folder() as second:
        assert not abandoned.exists()
        assert first.is_dir()
        assert second.is_dir()
        assert first != second
    assert os.listdir(tmp_path) == ["regraft-of-another-tool"]


def test_json_refuses_nonfinite_figures():
    assert to_json({"a": [1.5, None]}, "record") == '{"a": [1.5, null]}'
    for number in (float("nan"), float("inf")):
        with pytest.raises(OutcomeError, match=r"record: the figure a\.b\[1\] is infinite or NaN"):
            to_json({"a": {"b": [1.0, number]}}, "record")
