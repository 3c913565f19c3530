"""Bases and upgrades as users have them: with and without heads, sharded or whole, on disk or on the hub."""

import shutil

import pytest
import torch
from conftest import write_base
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from regraft import Base, Upgrade
from regraft.errors import CheckpointError, MismatchError

ARCHITECTURES = ("bert", "roberta", "distilbert", "llama")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_base_is_its_body_whatever_head_it_was_saved_with(tmp_path, bases, architecture):
    base = Base.open(bases[architecture][0])
    for name, auto in (("bare", AutoModel), ("classifier", AutoModelForSequenceClassification)):
        model = auto.from_pretrained(base.path, dtype="float32")
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        base.tokenizer.save_pretrained(tmp_path / name)
        other = Base.open(tmp_path / name)
        moved = Upgrade(base, other).distance()
        assert moved.l2 == 0
        assert moved.cosine == pytest.approx(1)
        assert {n for n in other.body if "pooler" not in n} == set(base.body)
    assert set(base.body) <= set(AutoModel.from_pretrained(base.path).state_dict())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fingerprint_is_of_the_body(tmp_path, bases, architecture):
    old, new = (Base.open(path) for path in bases[architecture])
    assert old.fingerprint != new.fingerprint
    without_pooler = {"add_pooling_layer": False} if architecture in ("bert", "roberta") else {}
    model = AutoModel.from_pretrained(old.path, dtype="float32", **without_pooler)
    model.save_pretrained(tmp_path / "bare")
    old.tokenizer.save_pretrained(tmp_path / "bare")
    assert Base.open(tmp_path / "bare").fingerprint == old.fingerprint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_distance_is_that_of_the_stored_bodies(bases, architecture):
    upgrade = Upgrade(*bases[architecture])
    old, new = (load_file(path / "model.safetensors") for path in bases[architecture])
    names = [name for name in old if name.startswith(upgrade.old.prefix + ".")]
    a, b = (torch.cat([side[name].double().flatten() for name in names]) for side in (old, new))
    moved = upgrade.distance()
    assert moved.parameters == len(a)
    assert moved.l2 == pytest.approx((a - b).norm().item(), rel=1e-9)
    assert moved.cosine == pytest.approx((a @ b / a.norm() / b.norm()).item(), rel=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_longest_input_runs(tmp_path, architecture):
    """It is what the positions hold, or what the tokenizer says where that is less."""
    for positions, longest in ((40, 39 if architecture == "roberta" else 40), (100, 64)):
        base = Base.open(write_base(tmp_path / str(positions), architecture, max_position_embeddings=positions))
        assert base.longest == longest
        AutoModel.from_pretrained(base.path)(torch.full((1, longest), 7))


def test_what_is_no_base_is_told_apart(tmp_path, bases):
    with pytest.raises(CheckpointError, match="no such file or folder, and the hub does not give it"):
        Base.open("nobody/nothing-of-the-kind@v1")
    with pytest.raises(CheckpointError, match="no such file or folder, and no hub id either"):
        Base.open("not a name/at/all")
    shutil.copytree(bases["bert"][0], tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"base/config\.json: transformers cannot read it"):
        Base.open(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(bases["bert"][0], tmp_path / "base")
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"base: holds no tokenizer"):
        Upgrade(tmp_path / "base", bases["bert"][1])


def test_tensors_that_differ_are_listed(tmp_path, bases):
    old = bases["bert"][0]
    shutil.copytree(old, tmp_path / "new")
    from safetensors.torch import save_file

    tensors = load_file(tmp_path / "new" / "model.safetensors")
    added = "bert.encoder.layer.9.output.dense.weight"
    lost = tensors.pop("bert.encoder.layer.0.output.dense.weight")
    tensors["bert.embeddings.word_embeddings.weight"] = tensors["bert.embeddings.word_embeddings.weight"][:-1].clone()
    save_file(tensors, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError) as caught:
        Upgrade(old, tmp_path / "new")
    rows = load_file(old / "model.safetensors")["bert.embeddings.word_embeddings.weight"].shape[0]
    for says in (
        f"1 tensors of another shape: embeddings.word_embeddings.weight: ({rows}, 32) and ({rows - 1}, 32)",
        "1 tensors only in the old base: encoder.layer.0.output.dense.weight",
    ):
        assert says in str(caught.value)
    save_file(tensors | {added: lost}, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor '{added}' is none of a BertModel of the sizes in config.json"):
        Base.open(tmp_path / "new")
