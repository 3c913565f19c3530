"""Bases and upgrades as users have them: with and without heads, sharded or whole, on disk or on the hub."""

import json
import shutil

import pytest
import torch
from conftest import HEAD, adapt, head_of, make_tokenizer, write_base
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from regraft import Base, Upgrade, load_adaptation
from regraft.adaptation import fresh_model, load_model
from regraft.checkpoint import Checkpoint
from regraft.errors import CheckpointError, MismatchError
from regraft.naming import name_consistently
from regraft.weights import NamedTensors, counterparts

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
        assert base.max_input_length == longest
        AutoModel.from_pretrained(base.path)(torch.full((1, longest), 7))


def test_positions_from_past_the_padding_shorten_texts(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("data2vec-text", vocab_size=50, max_position_embeddings=40, pad_token_id=3, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer("roberta").save_pretrained(tmp_path)
    base = Base.open(tmp_path)
    assert base.max_input_length == 36
    AutoModel.from_pretrained(tmp_path)(torch.full((1, base.max_input_length), 7))


def test_what_is_no_base_is_told_apart(tmp_path, bases):
    with pytest.raises(CheckpointError, match="no such file or folder, and the hub does not give it"):
        Base.open("nobody/nothing-of-the-kind@v1")
    with pytest.raises(CheckpointError, match="no such file or folder, and no hub id either"):
        Base.open("not a name/at/all")
    shutil.copytree(bases["bert"][0], tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"base/config\.json: not valid JSON"):
        Base.open(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(bases["bert"][0], tmp_path / "base")
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"base: holds no tokenizer"):
        Upgrade(tmp_path / "base", bases["bert"][1])
    wrapped = rewritten(bases["bert"][0], tmp_path / "wrapped", lambda t: {f"module.{n}": x for n, x in t.items()})
    for read in (Base.open, lambda folder: name_consistently({"old": Checkpoint.open(folder)})):
        with pytest.raises(CheckpointError, match=r"names tensors as 'module.* transformers would load none of these"):
            read(wrapped)


def test_tensors_that_differ_are_listed(tmp_path, bases):
    old = bases["bert"][0]
    shutil.copytree(old, tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    added = "bert.encoder.layer.9.output.dense.weight"
    lost = tensors.pop("bert.encoder.layer.0.output.dense.weight")
    short = "bert.embeddings.position_embeddings.weight"
    tensors[short] = tensors[short][:-1].clone()
    save_file(tensors, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError) as caught:
        Upgrade(old, tmp_path / "new")
    rows = load_file(old / "model.safetensors")[short].shape[0]
    for says in (
        f"1 tensors of another shape: embeddings.position_embeddings.weight: ({rows}, 32) and ({rows - 1}, 32)",
        "1 tensors only in the old base: encoder.layer.0.output.dense.weight",
    ):
        assert says in str(caught.value)
    save_file(tensors | {added: lost}, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor '{added}' is none of a BertModel of the sizes in config.json"):
        Base.open(tmp_path / "new")


def rewritten(source, folder, change, **config):
    """Copy a checkpoint with its tensors renamed and its config changed: other writers' files of the same weights."""
    shutil.copytree(source, folder)
    tensors = {n: t.clone() for n, t in change(load_file(source / "model.safetensors")).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


WRITINGS = {
    "legacy norms": (
        "bert",
        lambda t: {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for n, x in t.items()},
    ),
    "compiled": ("roberta", lambda t: {f"_orig_mod.{n}": x for n, x in t.items()}),
    "compiled inside": ("llama", lambda t: {n.replace("model.", "model._orig_mod.", 1): x for n, x in t.items()}),
    "rotary buffers": (
        "llama",
        lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)},
    ),
    "a tied head twice": (
        "bert",
        lambda t: t | {"cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"]},
    ),
    "another head": ("bert", lambda t: t | {"cls.seq_relationship.weight": torch.ones(2, 32)}),
}


@pytest.mark.parametrize("writing", WRITINGS)
def test_the_same_weights_in_another_writing_are_the_same_base(tmp_path, bases, writing):
    architecture, change = WRITINGS[writing]
    old = Base.open(bases[architecture][0])
    other = Base.open(rewritten(old.path, tmp_path / "other", change))
    assert other.fingerprint == old.fingerprint
    assert other.body.keys() == old.body.keys()
    assert Upgrade(old, other).distance().l2 == 0
    model, again = (fresh_model(base, head_of("a", "b"), 1).state_dict() for base in (old, other))
    assert all(torch.equal(model[name], again[name]) for name in model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fingerprint_of_a_base_that_transformers_5_wrote_is_that_of_regraft_0_1(bases, architecture):
    base = Base.open(bases[architecture][0])
    assert base.fingerprint == base.stored_fingerprint


def test_the_parameters_of_a_base_are_those_of_the_model(tmp_path):
    """Fused experts and renamed modules too: what is on disk is converted as transformers does on loading."""
    from transformers import MixtralConfig, MixtralForCausalLM, NomicBertConfig, NomicBertForMaskedLM

    size = {
        "vocab_size": 33,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    for model in (
        MixtralForCausalLM(MixtralConfig(**size, num_local_experts=4)),
        NomicBertForMaskedLM(NomicBertConfig(**size)),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        base = Base.open(folder)
        parameters = model.base_model.state_dict()
        assert base.parameters.keys() == parameters.keys()
        assert all(torch.equal(base.parameters[name], parameters[name]) for name in parameters)
        stored = base.architecture.on_disk(dict(base.parameters))
        assert stored.keys() == base.body.keys()
        assert all(torch.equal(stored[inner], base.checkpoint[name]) for inner, name in base.body.items())


def test_a_tensor_stored_under_two_names_is_refused(tmp_path, bases):
    old = bases["bert"][0]
    name = "bert.embeddings.LayerNorm.weight"
    folder = rewritten(old, tmp_path / "base", lambda t: t | {name.replace("weight", "gamma"): 2 * t[name]})
    with pytest.raises(CheckpointError, match=r"LayerNorm\.gamma' and .*LayerNorm\.weight', which are the same tensor"):
        Base.open(folder)


def test_tied_tensors_that_differ_are_two(tmp_path):
    """As transformers has it: it ties no tensors that the checkpoint stores with different values, be it one number."""
    name, source = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    large = write_base(tmp_path / "large", vocab_size=512)  # of which a fingerprint hashes a sample

    def with_head(tensors):
        head = tensors[source].clone()
        head[7, 26] += 1
        return tensors | {name: head}

    named = Base.open(rewritten(large, tmp_path / "base", with_head)).named
    assert (named[name] != named[source]).nonzero().tolist() == [[7, 26]]


def test_what_transformers_would_compute_otherwise_is_refused(tmp_path, bases):
    old = bases["bert"][0]
    relative = Base.open(rewritten(old, tmp_path / "relative", dict, position_embedding_type="relative_key"))
    tuned = adapt(Base.open(old), "full", tmp_path / "tuned")
    with pytest.raises(MismatchError, match=r"position_embedding_type is 'relative_key', which transformers no longer"):
        load_model(load_adaptation(tuned), relative, HEAD)


def test_a_text_model_inside_a_multimodal_one_is_refused_by_name(tmp_path):
    from transformers import Gemma3Config

    text = {
        "vocab_size": 33,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    Gemma3Config(text_config=text, architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path)
    save_file({"language_model.model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a gemma3, a text model inside one for other input too"):
        Base.open(tmp_path)


def test_stored_names_count_where_transformers_has_no_such_model(bases):
    old, new = bases["bert"]
    views, reason = name_consistently({"old": Checkpoint.open(old), "new": Checkpoint.open(new / "model.safetensors")})
    assert "has no config.json beside it, so tensors are paired by their stored names" in reason
    assert not any(isinstance(view, NamedTensors) for view in views.values())
    views, reason = name_consistently({"old": Checkpoint.open(old), "new": Checkpoint.open(new)})
    assert reason is None
    assert all(isinstance(view, NamedTensors) for view in views.values())


def test_the_one_graft_rule(bases, opened, tmp_path):
    """Both bases have it: grafted. Neither: copied. One alone: an error, unless pre-training leaves it out."""
    old, new = (base.named for base in opened["bert"])
    head = "cls.predictions.bias"
    pairs = counterparts(new, new, old)
    assert head in pairs.new
    assert pairs.new.keys() == new.keys()
    bare = Base.open(bare_copy(bases["bert"][0], tmp_path / "bare"))
    with pytest.raises(MismatchError, match=r"in one base only, the new one: cls\.predictions"):
        counterparts(new, new, bare.named)
    pooled = Base.open(bare_copy(bases["bert"][1], tmp_path / "pooled", pooler=True))
    pairs = counterparts(pooled.named, pooled.named, bare.named)
    assert pairs.left_out == ("pooler.dense.bias", "pooler.dense.weight")
    assert pairs.new.keys() == pooled.named.keys() - set(pairs.left_out)
    name = "bert.encoder.layer.0.output.dense.weight"
    lacking = Base.open(
        rewritten(bases["bert"][0], tmp_path / "lacking", lambda t: {n: x for n, x in t.items() if n != name})
    )
    with pytest.raises(MismatchError, match=r"the fine-tune lacks 1 tensors of its bases: encoder\.layer\.0\.output"):
        counterparts(new, lacking.named, old)


def bare_copy(source, folder, pooler=False):
    AutoModel.from_pretrained(source, add_pooling_layer=pooler).save_pretrained(folder)
    Base.open(source).tokenizer.save_pretrained(folder)
    return folder


def test_a_base_that_transformers_has_no_classifier_for_is_refused_in_a_sentence(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=33, hidden_size=32, num_hidden_layers=1, state_size=4)).save_pretrained(
        tmp_path
    )
    with pytest.raises(CheckpointError, match="transformers has no mamba for SequenceClassification"):
        fresh_model(Base.open(tmp_path), head_of("a", "b"), 1)


def test_what_regraft_0_1_made_of_a_base_in_another_writing_is_found(tmp_path, bases, task_file, quick):
    """0.1 took the fingerprint of tensors as they were named in the file."""
    from regraft import convert, recycle, tune

    architecture, change = WRITINGS["legacy norms"]
    old = Base.open(rewritten(bases[architecture][0], tmp_path / "old", change))
    assert old.stored_fingerprint != old.fingerprint
    recipe = quick
    tuned = tune(old, task_file, tmp_path / "tuned", kind="lora", recipe=recipe)
    upgrade = Upgrade(old, bases[architecture][1])
    recycled = recycle(upgrade, tuned.path, task_file, "direct", tmp_path / "direct", recipe=recipe)
    converted = convert(tuned.path, old, tmp_path / "full", to="full")
    for outcome in (tuned, recycled, converted):
        for file in outcome.path.rglob("*.json"):
            file.write_text(file.read_text().replace(old.fingerprint, old.stored_fingerprint))
    before = (recycled.path / "outcome.json").read_bytes()
    assert load_adaptation(tuned.path).check_base(old) == "proven"
    tune(old, task_file, tmp_path / "tuned", kind="lora", recipe=recipe)
    recycle(upgrade, tuned.path, task_file, "direct", tmp_path / "direct", recipe=recipe)
    convert(tuned.path, old, tmp_path / "full", to="full")
    assert (recycled.path / "outcome.json").read_bytes() == before
