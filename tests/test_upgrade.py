"""Bases with and without heads, sharded, with renamed tensors or invalid, and upgrades between them."""

import json
import shutil

import pytest
import torch
from helpers import ARCHITECTURES, load_tuned_model, make_head, make_tokenizer, write_adaptation, write_base
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NomicBertConfig,
    NomicBertForMaskedLM,
)

from regraft import Base, Upgrade, convert, load_adaptation, recycle, tune
from regraft.adaptation import fresh_model
from regraft.checkpoint import Checkpoint
from regraft.errors import CheckpointError, MismatchError
from regraft.naming import name_consistently
from regraft.weights import NamedTensors, counterparts

MODEL_SIZE = {  # small enough for tests to write and open the models in seconds
    "vocab_size": 33,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_base_body_is_the_same_with_any_head(tmp_path, bases, architecture):
    base = Base.open(bases[architecture][0])
    for name, auto_class in (("bare", AutoModel), ("classifier", AutoModelForSequenceClassification)):
        model = auto_class.from_pretrained(base.path, dtype="float32")
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
        base.tokenizer.save_pretrained(tmp_path / name)
        resaved = Base.open(tmp_path / name)
        distance = Upgrade(base, resaved).distance()
        assert distance.l2 == 0
        assert distance.cosine == pytest.approx(1)
        assert {name for name in resaved.body if "pooler" not in name} == set(base.body)
    assert set(base.body) <= set(AutoModel.from_pretrained(base.path).state_dict())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fingerprint_covers_the_body_alone(tmp_path, bases, architecture):
    old, new = (Base.open(path) for path in bases[architecture])
    assert old.fingerprint != new.fingerprint
    without_pooler = {"add_pooling_layer": False} if architecture in ("bert", "roberta") else {}
    model = AutoModel.from_pretrained(old.path, dtype="float32", **without_pooler)
    model.save_pretrained(tmp_path / "bare")
    old.tokenizer.save_pretrained(tmp_path / "bare")
    assert Base.open(tmp_path / "bare").fingerprint == old.fingerprint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_distance_equals_the_distance_of_the_stored_tensors(bases, architecture):
    upgrade = Upgrade(*bases[architecture])
    old, new = (load_file(path / "model.safetensors") for path in bases[architecture])
    body_names = [name for name in old if name.startswith(upgrade.old.prefix + ".")]
    a, b = (torch.cat([tensors[name].double().flatten() for name in body_names]) for tensors in (old, new))
    distance = upgrade.distance()
    assert distance.parameters == len(a)
    assert distance.l2 == pytest.approx((a - b).norm().item(), rel=1e-9)
    assert distance.cosine == pytest.approx((a @ b / a.norm() / b.norm()).item(), rel=1e-9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_runs_on_the_longest_input(tmp_path, architecture):
    """The smaller of the model's and the tokenizer's limit counts."""
    model_limit = 39 if architecture == "roberta" else 40
    for positions, max_input_length in ((40, model_limit), (100, 64)):
        base = Base.open(write_base(tmp_path / str(positions), architecture, max_position_embeddings=positions))
        assert base.max_input_length == max_input_length
        AutoModel.from_pretrained(base.path)(torch.full((1, max_input_length), 7))


def test_position_offset_of_padding_shortens_the_longest_input(tmp_path):
    """Data2Vec numbers positions from the id of the padding token plus one."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("data2vec-text", vocab_size=50, max_position_embeddings=40, pad_token_id=3, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer("roberta").save_pretrained(tmp_path)
    base = Base.open(tmp_path)
    assert base.max_input_length == 36
    AutoModel.from_pretrained(tmp_path)(torch.full((1, base.max_input_length), 7))


def test_invalid_bases_are_refused(tmp_path, bases):
    with pytest.raises(CheckpointError, match="no such file or folder, and it cannot be downloaded from the hub"):
        Base.open("nobody/nothing-of-the-kind@v1")
    with pytest.raises(CheckpointError, match="no such file or folder, and no hub id either"):
        Base.open("not a name/at/all")
    shutil.copytree(bases["bert"][0], tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"base/config\.json: not valid JSON"):
        Base.open(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(bases["bert"][0], tmp_path / "base")
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="base: has no tokenizer"):
        Upgrade(tmp_path / "base", bases["bert"][1])
    wrapped = rewrite_base(bases["bert"][0], tmp_path / "wrapped", rename_tensors(lambda name: f"module.{name}"))
    message = r"names such as 'module.* none of which transformers would load"
    with pytest.raises(CheckpointError, match=message):
        Base.open(wrapped)
    with pytest.raises(CheckpointError, match=message):
        name_consistently({"old": Checkpoint.open(wrapped)})


def test_differing_tensors_are_listed(tmp_path, bases):
    old = bases["bert"][0]
    shutil.copytree(old, tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    added = "bert.encoder.layer.9.output.dense.weight"
    removed = tensors.pop("bert.encoder.layer.0.output.dense.weight")
    shortened = "bert.embeddings.position_embeddings.weight"
    tensors[shortened] = tensors[shortened][:-1].clone()
    save_file(tensors, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError) as error:
        Upgrade(old, tmp_path / "new")
    num_positions = load_file(old / "model.safetensors")[shortened].shape[0]
    shapes = f"({num_positions}, 32) and ({num_positions - 1}, 32)"
    for problem in (
        f"1 tensors of different shapes: embeddings.position_embeddings.weight: {shapes}",
        "1 tensors only in the old base: encoder.layer.0.output.dense.weight",
    ):
        assert problem in str(error.value)
    save_file(tensors | {added: removed}, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor '{added}' does not belong to a BertModel with the sizes"):
        Base.open(tmp_path / "new")


def rewrite_base(source, folder, edit_tensors, **config):
    """Copy a checkpoint with edited tensors and settings, as a different program may write the same weights."""
    shutil.copytree(source, folder)
    edited = edit_tensors(load_file(source / "model.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in edited.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def rename_tensors(rename):
    """Return a function that renames each of a checkpoint's tensors by `rename`."""

    def edit_tensors(tensors):
        return {rename(name): tensor for name, tensor in tensors.items()}

    return edit_tensors


def add_rotary_buffers(tensors):
    return tensors | {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}


def add_tied_decoder(tensors):
    return tensors | {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"]}


def add_second_head(tensors):
    return tensors | {"cls.seq_relationship.weight": torch.ones(2, 32)}


LAYOUTS = {  # name of the layout: the architecture, and the edit of its tensors
    "legacy norms": (
        "bert",
        rename_tensors(lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")),
    ),
    "compiled": ("roberta", rename_tensors(lambda name: f"_orig_mod.{name}")),
    "compiled body": ("llama", rename_tensors(lambda name: name.replace("model.", "model._orig_mod.", 1))),
    "rotary buffers": ("llama", add_rotary_buffers),
    "tied head stored twice": ("bert", add_tied_decoder),
    "second head": ("bert", add_second_head),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_weights_in_a_different_layout_are_the_same_base(tmp_path, bases, layout):
    architecture, edit_tensors = LAYOUTS[layout]
    old = Base.open(bases[architecture][0])
    rewritten = Base.open(rewrite_base(old.path, tmp_path / "rewritten", edit_tensors))
    assert rewritten.fingerprint == old.fingerprint
    assert rewritten.body.keys() == old.body.keys()
    assert Upgrade(old, rewritten).distance().l2 == 0
    expected, parameters = (fresh_model(base, make_head("a", "b"), 1).state_dict() for base in (old, rewritten))
    assert all(torch.equal(expected[name], parameters[name]) for name in expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fingerprint_of_a_transformers_5_base_equals_the_one_of_regraft_0_1(bases, architecture):
    base = Base.open(bases[architecture][0])
    assert base.fingerprint == base.stored_fingerprint


def test_base_parameters_equal_the_parameters_of_the_loaded_model(tmp_path):
    """Cover fused experts and renamed modules, which transformers converts when it loads a checkpoint."""
    size = MODEL_SIZE | {"num_hidden_layers": 2}
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
        for parameter_name, stored_name in base.body.items():
            assert torch.equal(stored[parameter_name], base.checkpoint[stored_name])


def test_tensor_stored_under_two_names_is_refused(tmp_path, bases):
    old = bases["bert"][0]
    name = "bert.embeddings.LayerNorm.weight"

    def add_legacy_name(tensors):
        return tensors | {name.replace("weight", "gamma"): 2 * tensors[name]}

    folder = rewrite_base(old, tmp_path / "base", add_legacy_name)
    with pytest.raises(CheckpointError, match=r"the same tensor as .*LayerNorm\.gamma' and .*LayerNorm\.weight'"):
        Base.open(folder)


def test_tied_tensors_that_differ_in_one_element_stay_apart(tmp_path):
    """Transformers does not tie tensors that the checkpoint stores with different values."""
    decoder, embeddings = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    large = write_base(tmp_path / "large", vocab_size=512)  # large enough that a fingerprint samples elements

    def add_different_decoder(tensors):
        weight = tensors[embeddings].clone()
        weight[7, 26] += 1
        return tensors | {decoder: weight}

    named_tensors = Base.open(rewrite_base(large, tmp_path / "base", add_different_decoder)).named_tensors
    assert (named_tensors[decoder] != named_tensors[embeddings]).nonzero().tolist() == [[7, 26]]


def test_base_with_relative_positions_is_refused(tmp_path, bases):
    """Transformers would load it, but compute with absolute positions."""
    old = bases["bert"][0]
    relative = Base.open(rewrite_base(old, tmp_path / "relative", dict, position_embedding_type="relative_key"))
    tuned = write_adaptation(Base.open(old), "full", tmp_path / "tuned")
    with pytest.raises(MismatchError, match=r"position_embedding_type is 'relative_key', which transformers no longer"):
        load_tuned_model(tuned, relative)


def test_multimodal_base_is_refused(tmp_path):
    config = Gemma3Config(text_config=MODEL_SIZE, architectures=["Gemma3ForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    save_file({"language_model.model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a gemma3, a multimodal model"):
        Base.open(tmp_path)


def test_tensors_are_paired_by_stored_name_without_a_config(bases):
    old, new = bases["bert"]
    views, reason = name_consistently({"old": Checkpoint.open(old), "new": Checkpoint.open(new / "model.safetensors")})
    assert "there is no config.json, so tensors are paired by their stored names" in reason
    assert not any(isinstance(view, NamedTensors) for view in views.values())
    views, reason = name_consistently({"old": Checkpoint.open(old), "new": Checkpoint.open(new)})
    assert reason is None
    assert all(isinstance(view, NamedTensors) for view in views.values())


def test_counterparts_of_tensors_in_both_bases_in_one_and_in_none(bases, opened_bases, tmp_path):
    """A tensor in one base alone is an error unless pre-training leaves it out, as it does BERT's pooler."""
    old, new = (base.named_tensors for base in opened_bases["bert"])
    head = "cls.predictions.bias"
    pairs = counterparts(new, new, old)
    assert head in pairs.new
    assert pairs.new.keys() == new.keys()
    bare = Base.open(write_body(bases["bert"][0], tmp_path / "bare"))
    with pytest.raises(MismatchError, match=r"in one base only, the new one: cls\.predictions"):
        counterparts(new, new, bare.named_tensors)
    pooled = Base.open(write_body(bases["bert"][1], tmp_path / "pooled", pooler=True))
    pairs = counterparts(pooled.named_tensors, pooled.named_tensors, bare.named_tensors)
    assert pairs.unmatched == ("pooler.dense.bias", "pooler.dense.weight")
    assert pairs.new.keys() == pooled.named_tensors.keys() - set(pairs.unmatched)
    name = "bert.encoder.layer.0.output.dense.weight"

    def remove_weight(tensors):
        return {key: tensor for key, tensor in tensors.items() if key != name}

    incomplete = Base.open(rewrite_base(bases["bert"][0], tmp_path / "incomplete", remove_weight))
    with pytest.raises(MismatchError, match=r"the fine-tune lacks 1 tensors of its bases: encoder\.layer\.0\.output"):
        counterparts(new, incomplete.named_tensors, old)


def write_body(source, folder, pooler=False):
    """Write a base's body without its language-modelling head, and return its folder."""
    AutoModel.from_pretrained(source, add_pooling_layer=pooler).save_pretrained(folder)
    Base.open(source).tokenizer.save_pretrained(folder)
    return folder


def test_base_without_a_classifier_in_transformers_is_refused(tmp_path):
    config = MambaConfig(vocab_size=33, hidden_size=32, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="transformers has no mamba for SequenceClassification"):
        fresh_model(Base.open(tmp_path), make_head("a", "b"), 1)


def test_outputs_of_regraft_0_1_match_a_base_with_renamed_tensors(tmp_path, bases, task_file, quick_recipe):
    """Version 0.1 computed the fingerprint from the names of tensors in the file."""
    architecture, edit_tensors = LAYOUTS["legacy norms"]
    old = Base.open(rewrite_base(bases[architecture][0], tmp_path / "old", edit_tensors))
    assert old.stored_fingerprint != old.fingerprint
    tuned = tune(old, task_file, tmp_path / "tuned", kind="lora", recipe=quick_recipe)
    upgrade = Upgrade(old, bases[architecture][1])
    recycled = recycle(upgrade, tuned.path, task_file, "direct", tmp_path / "direct", recipe=quick_recipe)
    converted = convert(tuned.path, old, tmp_path / "full", kind="full")
    for outcome in (tuned, recycled, converted):
        for file in outcome.path.rglob("*.json"):
            file.write_text(file.read_text().replace(old.fingerprint, old.stored_fingerprint))
    recorded = (recycled.path / "outcome.json").read_bytes()
    assert load_adaptation(tuned.path).check_base(old) == "proven"
    tune(old, task_file, tmp_path / "tuned", kind="lora", recipe=quick_recipe)
    recycle(upgrade, tuned.path, task_file, "direct", tmp_path / "direct", recipe=quick_recipe)
    convert(tuned.path, old, tmp_path / "full", kind="full")
    assert (recycled.path / "outcome.json").read_bytes() == recorded
