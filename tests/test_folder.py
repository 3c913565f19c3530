"""What is written: whole or not at all, on full disks, without locks, with something in the way."""

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


def test_a_shard_with_the_right_header_and_other_data_is_written_again(tmp_path):
    """What a machine that lost its power leaves: sizes and headers say nothing of the data."""
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


def test_a_change_between_the_samples_of_the_fingerprint_is_no_longer_the_same_result(tmp_path):
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
    ("make", "says"),
    [
        (lambda place: place.symlink_to("nothing"), "is a broken link"),
        (Path.touch, "is a file, not a folder"),
        (lambda place: (place.parent / f".{place.name}.partial").symlink_to(place.parent), "is a link"),
    ],
)
def test_what_is_in_the_way_is_named_and_left_alone(tmp_path, make, says):
    (tmp_path / "precious").touch()
    make(tmp_path / "out")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OutcomeError, match=says), resumable_folder(tmp_path / "out", {}):
        pytest.fail("no work may begin")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("out", ["", "..", "/", "file/out", "a" * 300])
def test_no_folder_can_be_made_there(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(OutcomeError, match=r"no name for a folder|cannot be created"):
        check_output_path(Path(out))


def test_without_locks_it_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
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
def test_a_full_disk_is_one_error_and_leaves_no_temporary_file(tmp_path, failure):
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


def test_a_pipe_in_place_of_a_sealed_file_keeps_nobody_waiting(tmp_path):
    (tmp_path / "a").write_text("a")
    seal(tmp_path / "seal.json", [tmp_path / "a"])
    assert is_sealed(tmp_path / "seal.json")
    (tmp_path / "a").unlink()
    os.mkfifo(tmp_path / "a")
    assert not is_sealed(tmp_path / "seal.json")


def test_published_files_are_as_readable_as_any_new_file(tmp_path):
    with resumable_folder(tmp_path / "out", {}) as work:
        (work / "whole").mkdir()
        save_file({"a": torch.zeros(1)}, work / "whole" / "model.safetensors")
        (work / "whole" / "model.safetensors").chmod(0o600)
        publish(work / "whole", tmp_path / "out")
    (tmp_path / "new").touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_temporary_folder_of_a_killed_process_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, signal\nfrom regraft.checkpoint import temporary_folder\n"
    code += "with temporary_folder() as folder: print(folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    left = Path(killed.stdout.strip())
    assert left.is_dir()
    (tmp_path / "regraft-of-another-tool").mkdir()
    with temporary_folder() as first, temporary_folder() as second:
        assert not left.exists()
        assert first.is_dir()
        assert second.is_dir()
        assert first != second
    assert os.listdir(tmp_path) == ["regraft-of-another-tool"]


def test_json_names_the_figure_that_is_no_number():
    assert to_json({"a": [1.5, None]}, "record") == '{"a": [1.5, null]}'
    for number in (float("nan"), float("inf")):
        with pytest.raises(OutcomeError, match=r"record: the figure a\.b\[1\] is infinite or not a number"):
            to_json({"a": {"b": [1.0, number]}}, "record")
