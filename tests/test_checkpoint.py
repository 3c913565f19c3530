"""Reading and writing safetensors, broken files, fingerprints, and folders that appear only when complete."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import have_equal_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from regraft.checkpoint import Checkpoint, fingerprint, publish, read_header, resumable_folder, write_safetensors
from regraft.errors import CheckpointError, OutcomeError, RecipeError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]
on_disk = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

state_dicts = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**31)),
    max_size=8,
)


def make_tensors(spec):
    tensors = {}
    for name, (dtype, shape, seed) in spec.items():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
        tensors[name] = values.to(dtype)
    return tensors


@on_disk
@given(spec=state_dicts)
def test_round_trip_with_safetensors(tmp_path, spec):
    tensors = make_tensors(spec)
    save_file(tensors, tmp_path / "one.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path / "one.safetensors", as_stored=True)
    assert have_equal_tensors(dict(checkpoint), tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    write_safetensors(tmp_path / "two.safetensors", checkpoint)
    assert have_equal_tensors(load_file(tmp_path / "two.safetensors"), tensors)
    assert sorted(os.listdir(tmp_path)) == ["one.safetensors", "two.safetensors"]


def test_opening_reads_no_data(tmp_path):
    file = tmp_path / "big.safetensors"
    header = json.dumps({"big": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 2**40)  # a sparse file of one terabyte
    checkpoint = Checkpoint.open(file)
    assert checkpoint.tensors["big"].shape == (2**38,)
    assert fingerprint(checkpoint).startswith("sample:")


TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2, 2)}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def rewrite_header(file, change):
    """Change a file's header and keep its data."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    encoded = change(header)
    encoded = encoded if isinstance(encoded, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


@pytest.mark.parametrize("length", [0, 7, 8, 40, -1])
def test_truncated_file_is_refused(file, length):
    content = file.read_bytes()
    file.write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(not a complete safetensors file|is truncated)"):
        read_header(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["b"].update(dtype="F12"), "'b' has dtype 'F12'"),
        (lambda h: h["a"].update(shape=[2, 4]), r"'a' of shape \[2, 4\] and dtype F32 cannot be bytes"),
        (lambda h: h["a"].update(shape=[-2, -3]), "'a' has a malformed header entry"),
        (lambda h: h["a"].update(shape=[2.0, 3]), "'a' has a malformed header entry"),
        (lambda h: h["a"].update(data_offsets=[True, 24]), "'a' has a malformed header entry"),
        (lambda h: h["a"].pop("data_offsets"), "'a' has a malformed header entry"),
        (lambda h: h.update(a=None), "'a' has a malformed header entry"),
        (lambda h: h.pop("a"), "a gap or an overlap|after the last tensor"),
        (lambda h: h.update(d=h["a"]), "a gap or an overlap"),
        (lambda _: b"[]", "not a JSON object"),
        (lambda _: b"{", "not valid JSON"),
        (lambda _: b"\xff\xff", "not valid JSON"),
        (lambda _: b"[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_header_is_refused(file, change, message):
    rewrite_header(file, change)
    with pytest.raises(CheckpointError, match=message) as error_info:
        read_header(file)
    assert str(file) in str(error_info.value)


def test_trailing_bytes_are_refused(file):
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="4 bytes after the last tensor"):
        read_header(file)


@settings(on_disk, max_examples=500)
@given(data=st.data())
def test_mutated_file_is_read_or_refused(tmp_path, data):
    save_file(TENSORS, tmp_path / "m.safetensors", metadata={"format": "pt"})
    content = bytearray((tmp_path / "m.safetensors").read_bytes())
    for position, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)))):
        content[position] = value
    (tmp_path / "m.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    except CheckpointError as error:
        assert "m.safetensors" in str(error)
    else:
        assert all(checkpoint.tensors[name].shape == tuple(tensor.shape) for name, tensor in checkpoint.items())


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": TENSORS["a"]}, folder / "model-1.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, folder / "model-2.safetensors")
    write_index(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"})
    return folder


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_folder_reads_like_a_file(sharded, file):
    assert have_equal_tensors(dict(Checkpoint.open(sharded)), TENSORS)
    assert [f.name for f in Checkpoint.open(sharded).files] == ["model-1.safetensors", "model-2.safetensors"]


def test_broken_index_is_refused(sharded, tmp_path):
    valid = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    save_file({"x": TENSORS["a"]}, tmp_path / "outside.safetensors")
    for weight_map, message in [
        ({**valid, "b": "model-3.safetensors"}, r"shard model-3\.safetensors.* is missing"),
        ({**valid, "d": "model-1.safetensors"}, r"tensor 'd' is in model-1\.safetensors, but it is not"),
        (
            {name: shard for name, shard in valid.items() if name != "c"},
            r"1 tensors are not in .*: c \(model-2\.safetensors\)",
        ),
        ({**valid, "x": "../outside.safetensors"}, r"not a file in the same folder"),
        ({**valid, "x": str(tmp_path / "outside.safetensors")}, r"not a file in the same folder"),
        (["a"], "not a safetensors index"),
    ]:
        write_index(sharded, weight_map)
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(sharded)
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        Checkpoint.open(sharded)


def test_other_formats_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder, and"):
        Checkpoint.open(tmp_path / "none")
    for name, message in [
        ("training_args.bin", "Use the folder that save_pretrained wrote"),
        ("weights.safetensors", "not called model.safetensors"),
        ("model.onnx", "exported to ONNX"),
        ("flax_model.msgpack", "from_flax=True"),
        ("tf_model.h5", "from_tf=True"),
        ("model-q4.gguf", "llama.cpp"),
        ("snapshots/1a2b/model.safetensors", "Its folder snapshots/1a2b has"),
        ("checkpoint-9/model.safetensors", r"Its folder checkpoint-9 \(or snapshots/1a2b\) has"),
        ("model.safetensors", "git lfs pull"),
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1")
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(tmp_path)
    (tmp_path / "pickle").mkdir()
    torch.save(TENSORS, tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code and is not read"):
        Checkpoint.open(tmp_path / "pickle")


def test_failed_write_leaves_no_file(tmp_path, file):
    checkpoint = Checkpoint.open(file)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="it was changed while it was read"):
        write_safetensors(tmp_path / "out.safetensors", checkpoint)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with pytest.raises(OutcomeError, match=r"cannot be written"):
        write_safetensors(tmp_path / "none" / "model.safetensors", {"a": torch.zeros(1)})


def test_fingerprint_does_not_depend_on_sharding(file, sharded):
    assert fingerprint(Checkpoint.open(file)) == fingerprint(Checkpoint.open(sharded))
    original = fingerprint(Checkpoint.open(file))
    renamed = fingerprint(Checkpoint.open(file), hashed_name=lambda name: {"a": "z"}.get(name, name))
    reduced = fingerprint(Checkpoint.open(file), hashed_name=lambda name: None if name == "c" else name)
    assert len({original, renamed, reduced}) == 3


@on_disk
@given(name=st.sampled_from(sorted(TENSORS)), index=st.integers(0, 100))
def test_fingerprint_changes_with_any_element(tmp_path, name, index):
    save_file(TENSORS, tmp_path / "one.safetensors")
    changed = {key: tensor.clone() for key, tensor in TENSORS.items()}
    flat = changed[name].view(-1)
    flat[index % len(flat)] += 0.5
    save_file(changed, tmp_path / "two.safetensors")
    first, second = (fingerprint(Checkpoint.open(tmp_path / file)) for file in ("one.safetensors", "two.safetensors"))
    assert first != second


def test_fingerprint_changes_with_a_training_step_in_large_tensors(tmp_path):
    large = torch.randn(1000, 1000)
    save_file({"w": large}, tmp_path / "one.safetensors")
    save_file({"w": large + 1e-4 * torch.randn(1000, 1000)}, tmp_path / "two.safetensors")
    first, second = (fingerprint(Checkpoint.open(tmp_path / file)) for file in ("one.safetensors", "two.safetensors"))
    assert first != second


def test_folder_appears_only_when_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with resumable_folder(out, {"a": 1}) as work:
        (work / "whole").mkdir()
        (work / "whole" / "file").write_text("x")
        assert not out.exists()
        publish(work / "whole", out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]
    assert (out / "file").read_text() == "x"


def test_working_folder_is_reused_only_for_the_same_inputs(tmp_path):
    out = tmp_path / "out"

    def run(inputs):
        with resumable_folder(out, inputs) as work:
            is_resumed = (work / "half").exists()
            (work / "half").mkdir(exist_ok=True)
            raise KeyboardInterrupt(is_resumed)

    resumed = []
    for inputs in ({"a": 1}, {"a": 1}, {"a": 2}):
        with pytest.raises(KeyboardInterrupt) as interruption:
            run(inputs)
        resumed.append(interruption.value.args[0])
    assert resumed == [False, True, False]
    assert not out.exists()


def test_error_removes_the_working_folder_unless_it_has_checkpoints(tmp_path):
    working = [".out.partial"]
    for name, error, remaining in (
        ("whole", OutcomeError, []),
        ("checkpoints", OutcomeError, working),
        ("checkpoints", RecipeError, []),  # the same recipe fails again
    ):
        with pytest.raises(error) as error_info, resumable_folder(tmp_path / "out", {}) as work:
            (work / "body" / name).mkdir(parents=True, exist_ok=True)
            raise error("no")
        assert os.listdir(tmp_path) == remaining
        assert [str(work) in note for note in getattr(error_info.value, "__notes__", [])] == [True] * len(remaining)


def test_concurrent_runs_on_one_folder_are_refused(tmp_path):
    code = "import sys, pathlib; from regraft.checkpoint import resumable_folder\n"
    code += "with resumable_folder(pathlib.Path(sys.argv[1]), {}): pass"
    with resumable_folder(tmp_path / "out", {}):
        process = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert process.returncode == 1
    assert "another regraft process is writing it" in process.stderr


def test_existing_output_is_never_replaced(tmp_path):
    for name in ("whole", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OutcomeError, match="exists already"):
        publish(tmp_path / "whole", tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutcomeError, match="cannot be created"), resumable_folder(tmp_path / "file" / "out", {}):
        pass
