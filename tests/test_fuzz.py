"""Thousands of mutated headers and indexes: each is read as safetensors reads it, or refused with an error."""

import copy
import json
import os
import random
import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from regraft.checkpoint import Checkpoint, read_header
from regraft.errors import CheckpointError

TENSORS = {
    "encoder.weight": torch.arange(12.0).reshape(3, 4),
    "encoder.bias": torch.ones(5, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "nothing": torch.zeros(0, 3),
}
SCALARS = [None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf")]
STRINGS = ["", "F32", "BF16", "I64", "x" * 5000, "\0", "\ud800", "../x", "/etc/passwd"]
COLLECTIONS = [[], {}, [0], [0, 0], [0, 48], [48, 0], [2**62, 2**62], [3, 4], [2**63 - 1, 2**63 - 1], [4, 3]]
COLLECTIONS += [[1] * 3000, [2] * 80, [0] * 9, [-3, -4], [3.0, 4.0], ["3", "4"], {"dtype": "F32"}, [[[[]]]]]
INVALID_VALUES = [*SCALARS, *STRINGS, *COLLECTIONS]
KEYS = ["dtype", "shape", "data_offsets", "encoder.weight", "encoder.bias", "__metadata__", "", "\0", "n" * 100_000]
MAX_GROWTH_KIB = 250_000  # far below the sizes that mutated headers claim


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Check that no mutation makes the process grow by more than `MAX_GROWTH_KIB`."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < MAX_GROWTH_KIB


def draw_invalid_value(generator):
    return copy.deepcopy(generator.choice(INVALID_VALUES))


def mutate_json(generator, value):
    """Change one value inside a JSON value, at any depth, and return the result."""
    if isinstance(value, dict) and value and generator.random() < 0.85:
        key = generator.choice(list(value))
        action = generator.random()
        if action < 0.6:
            value[key] = mutate_json(generator, value[key])
        elif action < 0.75:
            value[generator.choice(KEYS)] = value.pop(key)
        elif action < 0.85:
            del value[key]
        else:
            added_values = [draw_invalid_value(generator), copy.deepcopy(value[key])]
            value[generator.choice(KEYS)] = generator.choice(added_values)
        return value
    if isinstance(value, list) and value and generator.random() < 0.6:
        index = generator.randrange(len(value))
        if type(value[index]) is int:
            value[index] += generator.choice([-1, 1])
        else:
            value[index] = draw_invalid_value(generator)
        return value
    return draw_invalid_value(generator)


def mutate_bytes(generator, content):
    """Flip, cut, insert or repeat bytes, and return the result."""
    content = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 8])):
        offset = generator.randrange(len(content) + 1)
        action = generator.random()
        if action < 0.4 and offset < len(content):
            content[offset] ^= 1 << generator.randrange(8)
        elif action < 0.6:
            del content[offset : offset + generator.choice([1, 2, 50, 10**6])]
        elif action < 0.8:
            content[offset:offset] = generator.randbytes(generator.choice([1, 8, 100]))
        else:
            content[offset:offset] = content[offset : offset + 60]
        if not content:
            break
    return bytes(content)


def encode_json(value, generator):
    """Encode a value as JSON, sometimes with a repeated name or as a part of deep nesting."""
    text = json.dumps(value)
    if generator.random() < 0.05:
        text = text.replace("}", ', "encoder.bias": {}, "encoder.bias": {}}', 1)
    if generator.random() < 0.03:
        text = generator.choice(["[", '{"a":']) * generator.choice([10, 100_000]) + text
    return text.encode("utf-8", "surrogatepass")


def mutate_file(generator, valid):
    """Change the bytes of a safetensors file, or the values of its header, and return the result."""
    if generator.random() < 0.4:
        return mutate_bytes(generator, valid)
    end = 8 + int.from_bytes(valid[:8], "little")
    header = json.loads(valid[8:end])
    for _ in range(generator.choice([1, 1, 2, 5])):
        header = mutate_json(generator, header)
    encoded = encode_json(header, generator)
    length = generator.choice([len(encoded)] * 12 + [0, 2**63, 2**64 - 1, len(encoded) + 1, 10**8 + 1])
    return length.to_bytes(8, "little") + encoded + valid[end:]


def view_bytes(tensor):
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_headers_are_read_as_by_safetensors_or_refused(tmp_path, seed):
    generator = random.Random(seed)
    file = tmp_path / "m.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    valid = file.read_bytes()
    num_read = num_refused = 0
    for _ in range(1000):
        file.write_bytes(mutate_file(generator, valid))
        try:
            tensors = dict(Checkpoint.open(file))
        except CheckpointError as error:
            num_refused += 1
            assert str(file) in str(error)
            assert len(str(error)) < 2000 + len(str(file))
            continue
        num_read += 1
        try:
            expected = load_file(file)
        except (SafetensorError, UnicodeDecodeError, KeyError):
            continue  # safetensors is stricter, for example on metadata that is not text
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensors[name].dtype == tensor.dtype
            assert tensors[name].shape == tensor.shape
            assert torch.equal(view_bytes(tensors[name]), view_bytes(tensor))
    assert num_read > 5
    assert num_refused > 500


@pytest.mark.parametrize("seed", range(4))
def test_mutated_indexes_name_the_same_tensors_or_are_refused(tmp_path, seed):
    generator = random.Random(seed)
    folder = tmp_path / "sharded"
    folder.mkdir()
    shards = {"model-00001-of-00002.safetensors": TENSORS, "model-00002-of-00002.safetensors": {"last": torch.ones(2)}}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    save_file({"secret": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    invalid_shards = [
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "folder.safetensors",
        "pipe.safetensors",
        "sharded/../model-00001-of-00002.safetensors",
        "./model-00001-of-00002.safetensors",
        "..\\outside",
        ".",
        "..",
        "",
        "\0",
        "n" * 5000,
    ]
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    valid = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    file = folder / "model.safetensors.index.json"
    num_refused = 0
    for _ in range(600):
        index = copy.deepcopy(valid)
        if generator.random() < 0.3:
            index["weight_map"][generator.choice([*weight_map, "secret", "new"])] = generator.choice(invalid_shards)
        elif generator.random() < 0.7:
            index = mutate_json(generator, index)
        content = encode_json(index, generator)
        file.write_bytes(mutate_bytes(generator, content) if generator.random() < 0.3 else content)
        try:
            checkpoint = Checkpoint.open(folder)
        except CheckpointError as error:
            num_refused += 1
            assert str(folder) in str(error)
            assert len(str(error)) < 3000 + len(str(folder))
        else:
            assert set(checkpoint) == set(weight_map)
            assert {file.parent for file in checkpoint.files} == {folder}
    assert num_refused > 200


def test_a_header_that_claims_more_bytes_than_the_file_has_is_refused(tmp_path):
    for length in (2**40, 2**63, 2**64 - 1, 100_000_001):
        (tmp_path / "m.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            read_header(tmp_path / "m.safetensors")


def test_repeated_names_are_refused(tmp_path):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"weight":{entry},"weight":{entry}}}'.encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="the name 'weight' is repeated"):
        read_header(tmp_path / "m.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    index = '{"weight_map": {"a": "model-1.safetensors", "a": "model-1.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="the name 'a' is repeated"):
        Checkpoint.open(tmp_path)


def test_a_shard_that_the_index_does_not_name_is_refused(tmp_path):
    for i in (1, 2):
        save_file({f"t{i}": torch.ones(1)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    save_file({"t3": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    weight_map = {f"t{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"does not name model-00003-of-00003\.safetensors"):
        Checkpoint.open(tmp_path)
