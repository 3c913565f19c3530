"""Thousands of broken headers and indexes: each is read as safetensors reads it, or refused with an error."""

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
INVALID_VALUES = [
    None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf"), "", "F32", "BF16", "I64",
    "x" * 5000, "\0", "\ud800", "../x", "/etc/passwd", [], {}, [0], [0, 0], [0, 48], [48, 0], [2**62, 2**62], [3, 4],
    [2**63 - 1, 2**63 - 1], [4, 3], [1] * 3000, [2] * 80, [0] * 9, [-3, -4], [3.0, 4.0], ["3", "4"], {"dtype": "F32"},
    [[[[]]]],
]  # fmt: skip
KEYS = ["dtype", "shape", "data_offsets", "encoder.weight", "encoder.bias", "__metadata__", "", "\0", "n" * 100_000]


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Check that no mutation makes the process grow by more than a quarter of a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000


def invalid_value(generator):
    return copy.deepcopy(generator.choice(INVALID_VALUES))


def mutate_json(generator, value):
    """Change a JSON value in one place, at any depth."""
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
            value[generator.choice(KEYS)] = generator.choice([invalid_value(generator), copy.deepcopy(value[key])])
        return value
    if isinstance(value, list) and value and generator.random() < 0.6:
        index = generator.randrange(len(value))
        is_number = type(value[index]) is int
        value[index] = value[index] + generator.choice([-1, 1]) if is_number else invalid_value(generator)
        return value
    return invalid_value(generator)


def mutate_bytes(generator, content):
    """Flip, cut, insert or repeat bytes."""
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


def encode(value, generator):
    text = json.dumps(value)
    if generator.random() < 0.05:
        text = text.replace("}", ', "encoder.bias": {}, "encoder.bias": {}}', 1)  # a repeated name
    if generator.random() < 0.03:
        text = generator.choice(["[", '{"a":']) * generator.choice([10, 100_000]) + text
    return text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("seed", range(8))
def test_headers(tmp_path, seed):
    generator = random.Random(seed)
    file = tmp_path / "m.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    valid = file.read_bytes()
    length = int.from_bytes(valid[:8], "little")
    read_count = refused_count = 0
    for _ in range(1000):
        if generator.random() < 0.4:
            content = mutate_bytes(generator, valid)
        else:
            header = json.loads(valid[8 : 8 + length])
            for _ in range(generator.choice([1, 1, 2, 5])):
                header = mutate_json(generator, header)
            encoded = encode(header, generator)
            claimed = generator.choice([len(encoded)] * 12 + [0, 2**63, 2**64 - 1, len(encoded) + 1, 10**8 + 1])
            content = claimed.to_bytes(8, "little") + encoded + valid[8 + length :]
        file.write_bytes(content)
        try:
            tensors = dict(Checkpoint.open(file))
        except CheckpointError as error:
            refused_count += 1
            assert str(file) in str(error)
            assert len(str(error)) < 2000 + len(str(file))
            continue
        read_count += 1
        try:
            expected = load_file(file)
        except (SafetensorError, UnicodeDecodeError, KeyError):
            continue  # safetensors is stricter, for example on metadata that is not text
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensors[name].dtype == tensor.dtype
            assert tensors[name].shape == tensor.shape
            assert torch.equal(bytes_of(tensors[name]), bytes_of(tensor))
    assert read_count > 5
    assert refused_count > 500


def bytes_of(tensor):
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_indexes(tmp_path, seed):
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
    refused_count = 0
    for _ in range(600):
        index = copy.deepcopy(valid)
        if generator.random() < 0.3:
            index["weight_map"][generator.choice([*weight_map, "secret", "new"])] = generator.choice(invalid_shards)
        elif generator.random() < 0.7:
            index = mutate_json(generator, index)
        content = encode(index, generator)
        file.write_bytes(mutate_bytes(generator, content) if generator.random() < 0.3 else content)
        try:
            checkpoint = Checkpoint.open(folder)
        except CheckpointError as error:
            refused_count += 1
            assert str(folder) in str(error)
            assert len(str(error)) < 3000 + len(str(folder))
        else:
            assert set(checkpoint) == set(weight_map)
            assert {file.parent for file in checkpoint.files} == {folder}
    assert refused_count > 200


def test_a_header_that_claims_a_terabyte_allocates_nothing(tmp_path):
    for claimed in (2**40, 2**63, 2**64 - 1, 100_000_001):
        (tmp_path / "m.safetensors").write_bytes(claimed.to_bytes(8, "little") + b"{}")
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


def test_shards_of_two_checkpoints_are_told_apart(tmp_path):
    for i in (1, 2):
        save_file({f"t{i}": torch.ones(1)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    save_file({"t3": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    weight_map = {f"t{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"does not name model-00003-of-00003\.safetensors"):
        Checkpoint.open(tmp_path)
