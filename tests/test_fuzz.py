"""Thousands of broken headers and indexes: each is read as safetensors reads it, or refused by an error of ours."""

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
WRONG = [
    None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf"), "", "F32", "BF16", "I64",
    "x" * 5000, "\0", "\ud800", "../x", "/etc/passwd", [], {}, [0], [0, 0], [0, 48], [48, 0], [2**62, 2**62], [3, 4],
    [2**63 - 1, 2**63 - 1], [4, 3], [1] * 3000, [2] * 80, [0] * 9, [-3, -4], [3.0, 4.0], ["3", "4"], {"dtype": "F32"},
    [[[[]]]],
]  # fmt: skip
KEYS = ["dtype", "shape", "data_offsets", "encoder.weight", "encoder.bias", "__metadata__", "", "\0", "n" * 100_000]


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """No mutation may make the process grow by more than a quarter of a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000


def wrong(chance):
    return copy.deepcopy(chance.choice(WRONG))


def mutate_json(chance, value):
    """Change one place of a JSON value, anywhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        action = chance.random()
        if action < 0.6:
            value[key] = mutate_json(chance, value[key])
        elif action < 0.75:
            value[chance.choice(KEYS)] = value.pop(key)
        elif action < 0.85:
            del value[key]
        else:
            value[chance.choice(KEYS)] = chance.choice([wrong(chance), copy.deepcopy(value[key])])
        return value
    if isinstance(value, list) and value and chance.random() < 0.6:
        place = chance.randrange(len(value))
        value[place] = value[place] + chance.choice([-1, 1]) if type(value[place]) is int else wrong(chance)
        return value
    return wrong(chance)


def mutate_bytes(chance, content):
    """Flip, cut, insert or repeat bytes."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(content) + 1)
        action = chance.random()
        if action < 0.4 and place < len(content):
            content[place] ^= 1 << chance.randrange(8)
        elif action < 0.6:
            del content[place : place + chance.choice([1, 2, 50, 10**6])]
        elif action < 0.8:
            content[place:place] = chance.randbytes(chance.choice([1, 8, 100]))
        else:
            content[place:place] = content[place : place + 60]
        if not content:
            break
    return bytes(content)


def encode(value, chance):
    text = json.dumps(value)
    if chance.random() < 0.05:
        text = text.replace("}", ', "encoder.bias": {}, "encoder.bias": {}}', 1)  # a name twice
    if chance.random() < 0.03:
        text = chance.choice(["[", '{"a":']) * chance.choice([10, 100_000]) + text
    return text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("seed", range(8))
def test_headers(tmp_path, seed):
    chance, file = random.Random(seed), tmp_path / "m.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    read = refused = 0
    for _ in range(1000):
        if chance.random() < 0.4:
            content = mutate_bytes(chance, whole)
        else:
            header = json.loads(whole[8 : 8 + length])
            for _ in range(chance.choice([1, 1, 2, 5])):
                header = mutate_json(chance, header)
            encoded = encode(header, chance)
            claimed = chance.choice([len(encoded)] * 12 + [0, 2**63, 2**64 - 1, len(encoded) + 1, 10**8 + 1])
            content = claimed.to_bytes(8, "little") + encoded + whole[8 + length :]
        file.write_bytes(content)
        try:
            ours = dict(Checkpoint.open(file))
        except CheckpointError as error:
            refused += 1
            assert str(file) in str(error)
            assert len(str(error)) < 2000 + len(str(file))
            continue
        read += 1
        try:
            theirs = load_file(file)
        except (SafetensorError, UnicodeDecodeError, KeyError):
            continue  # they refuse what we read: metadata that is no text, and the like
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert ours[name].shape == tensor.shape
            same = ours[name].view(torch.uint8) if tensor.dim() else ours[name][None].view(torch.uint8)
            assert torch.equal(same, (tensor if tensor.dim() else tensor[None]).view(torch.uint8))
    assert read > 5
    assert refused > 500


@pytest.mark.parametrize("seed", range(4))
def test_indexes(tmp_path, seed):
    chance, folder = random.Random(seed), tmp_path / "sharded"
    folder.mkdir()
    shards = {"model-00001-of-00002.safetensors": TENSORS, "model-00002-of-00002.safetensors": {"last": torch.ones(2)}}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    save_file({"secret": torch.ones(1)}, tmp_path / "outside.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    strange = [
        "../outside.safetensors", str(tmp_path / "outside.safetensors"), "folder.safetensors", "pipe.safetensors",
        "sharded/../model-00001-of-00002.safetensors", "./model-00001-of-00002.safetensors", "..\\outside",
        ".", "..", "", "\0", "n" * 5000,
    ]  # fmt: skip
    whole = {"metadata": {"total_size": 1}, "weight_map": {n: shard for shard, part in shards.items() for n in part}}
    file = folder / "model.safetensors.index.json"
    refused = 0
    for _ in range(600):
        index = json.loads(json.dumps(whole))
        if chance.random() < 0.3:
            index["weight_map"][chance.choice([*whole["weight_map"], "secret", "new"])] = chance.choice(strange)
        elif chance.random() < 0.7:
            index = mutate_json(chance, index)
        content = encode(index, chance)
        file.write_bytes(mutate_bytes(chance, content) if chance.random() < 0.3 else content)
        try:
            found = Checkpoint.open(folder)
        except CheckpointError as error:
            refused += 1
            assert str(folder) in str(error)
            assert len(str(error)) < 3000 + len(str(folder))
        else:
            assert set(found) == set(whole["weight_map"])
            assert {file.parent for file in found.files} == {folder}
    assert refused > 200


def test_a_header_that_claims_a_terabyte_allocates_nothing(tmp_path):
    for claimed in (2**40, 2**63, 2**64 - 1, 100_000_001):
        (tmp_path / "m.safetensors").write_bytes(claimed.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            read_header(tmp_path / "m.safetensors")


def test_names_given_twice_are_named(tmp_path):
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"weight":{entry},"weight":{entry}}}'.encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="'weight' is there twice"):
        read_header(tmp_path / "m.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    index = '{"weight_map": {"a": "model-1.safetensors", "a": "model-1.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="'a' is there twice"):
        Checkpoint.open(tmp_path)


def test_shards_of_two_checkpoints_are_told_apart(tmp_path):
    for i in (1, 2):
        save_file({f"t{i}": torch.ones(1)}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    save_file({"t3": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    weight_map = {f"t{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"does not name model-00003-of-00003\.safetensors"):
        Checkpoint.open(tmp_path)
