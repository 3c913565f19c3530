"""Adaptations that would load in part, on a different base, or as a different kind, which are refused."""

import json
import re
import shutil

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    CELLS,
    FEW_STEPS,
    FOLDED,
    HEAD,
    LABELS,
    UNMERGEABLE,
    find_weights,
    load_tuned_model,
    make_head,
    run_command,
    update_json,
    write_base,
)
from safetensors.torch import load_file, save_file

from regraft import Base, Upgrade, check, convert, load_adaptation, recycle
from regraft.adaptation import (
    KINDS,
    fresh_model,
    initial_factors,
    new_config,
    prepare_for_tuning,
    save_model,
    write_graft,
)
from regraft.errors import CheckpointError, MismatchError, RegraftError
from regraft.model import match_labels
from regraft.progress import quiet, silent
from regraft.task import load_data


def save_weights(tensors, file):
    save_file(tensors, file, metadata={"format": "pt"})


def write_broken_copy(adaptation, folder, fault):
    """Copy an adaptation with one of its matrices renamed, missing or cut, or with an extra tensor.

    Returns:
        The name of the matrix.
    """
    shutil.copytree(adaptation, folder)
    file = find_weights(folder)
    tensors = load_file(file)
    name = max(tensors, key=lambda name: (tensors[name].dim(), name))
    if fault == "renamed":
        tensors[name[:-1]] = tensors.pop(name)
    elif fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors[f"more.{name}"] = torch.ones(3)
    else:
        tensors[name] = tensors[name][..., :-1].contiguous()
    save_weights(tensors, file)
    return name


@pytest.mark.parametrize("fault", ["renamed", "missing", "extra", "cut"])
@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_an_adaptation_with_a_faulty_tensor_is_refused_by_the_name_of_the_tensor(
    tmp_path, saved_adaptations, opened_bases, architecture, kind, fault
):
    path, _ = saved_adaptations[architecture, kind]
    name = write_broken_copy(path, tmp_path / "broken", fault)
    with pytest.raises(RegraftError) as error:
        load_tuned_model(tmp_path / "broken", opened_bases[architecture][0])
    message = str(error.value)
    assert str(tmp_path / "broken") in message
    assert name.removeprefix("base_model.model.") in message or "PEFT cannot load it" in message


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_a_different_base_is_refused_unless_forced(saved_adaptations, opened_bases, architecture, kind):
    old, new = opened_bases[architecture]
    adaptation = load_adaptation(saved_adaptations[architecture, kind][0])
    with pytest.raises(MismatchError, match="was not tuned on"):
        adaptation.check_base(new)
    assert adaptation.check_base(new, force=True) == "forced"
    assert adaptation.check_base(old) == "proven"


def test_contradictory_records_are_refused_and_records_of_different_adaptations_ignored(
    tmp_path, saved_adaptations, opened_bases
):
    record = {"schema": 1, "labels": list(LABELS[::-1]), "base": {"fingerprint": "different"}}
    for name in ("adaptation", "made-elsewhere"):
        shutil.copytree(saved_adaptations["bert", "lora"][0], tmp_path / name)
    (tmp_path / "outcome.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"contradict each other on its labels.*outcome\.json"):
        load_adaptation(tmp_path / "adaptation")
    (tmp_path / "outcome.json").write_text(json.dumps(record | {"labels": None}))
    with pytest.raises(CheckpointError, match=r"contradict each other on its base.*different"):
        load_adaptation(tmp_path / "adaptation")
    (tmp_path / "made-elsewhere" / "lineage.json").unlink()
    adaptation = load_adaptation(tmp_path / "made-elsewhere")
    assert (adaptation.labels, adaptation.base) == (None, None)


def test_the_new_base_is_recognised_when_it_is_passed_as_the_old_base(tmp_path, saved_adaptations, opened_bases):
    shutil.copytree(opened_bases["bert"][1].path, tmp_path / "new")
    (tmp_path / "new" / "pretraining.json").write_text(
        json.dumps({"base": {"fingerprint": opened_bases["bert"][0].fingerprint}})
    )
    with pytest.raises(MismatchError, match="is the new base"):
        load_adaptation(saved_adaptations["bert", "lora"][0]).check_base(Base.open(tmp_path / "new"))


def test_without_a_record_lineage_is_unproven_and_a_different_revision_is_refused(
    tmp_path, saved_adaptations, opened_bases, bases
):
    shutil.copytree(saved_adaptations["bert", "lora"][0], tmp_path / "made")
    (tmp_path / "made" / "lineage.json").unlink()
    update_json(tmp_path / "made" / "adapter_config.json", revision="v1", base_model_name_or_path="us/base")
    adaptation = load_adaptation(tmp_path / "made")
    base = opened_bases["bert"][0]
    assert adaptation.check_base(base) == "unproven"
    assert adaptation.check_base(Base("us/base@v1", base.path, base.checkpoint)) == "unproven"
    with pytest.raises(MismatchError, match="revision v1"):
        adaptation.check_base(Base("us/base@v2", base.path, base.checkpoint))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_a_base_with_fewer_layers_is_refused(tmp_path, saved_adaptations, kind):
    """PEFT alone silently drops the tensors of missing layers."""
    small = Base.open(write_base(tmp_path / "small", "bert", num_hidden_layers=1))
    with pytest.raises(RegraftError, match=r"unexpected|another shape|missing|PEFT cannot|not be loaded"):
        load_tuned_model(saved_adaptations["bert", kind][0], small)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adaptation_without_its_head_is_refused(tmp_path, opened_bases, architecture):
    """PEFT without a task type neither tunes nor saves the head, and loads a random one without an error."""
    from peft import LoraConfig, get_peft_model

    base = opened_bases[architecture][0]
    with quiet():
        model = get_peft_model(
            fresh_model(base, HEAD, 0), LoraConfig(target_modules="all-linear", init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    with pytest.raises(CheckpointError, match="neither the base nor the adaptation"):
        load_tuned_model(tmp_path / "made", base)
    # a classifier, used as a base, has a head, but not the adaptation's
    fresh_model(base, make_head(*LABELS[::-1]), 3).save_pretrained(tmp_path / "tuned")
    base.tokenizer.save_pretrained(tmp_path / "tuned")
    tuned = Base.open(tmp_path / "tuned")
    assert tuned.fingerprint == base.fingerprint or tuned.has_pooler
    with pytest.raises(CheckpointError, match="neither the base nor the adaptation"):
        load_tuned_model(tmp_path / "made", tuned)
    state_1, state_2 = (fresh_model(tuned, HEAD, seed).state_dict() for seed in (1, 2))
    head_weights = [name for name in state_1 if not name.startswith(base.prefix) and name.endswith("weight")]
    assert head_weights
    assert not any(torch.equal(state_1[name], state_2[name]) for name in head_weights)


MATRIX = "bert.encoder.layer.1.output.dense.weight"
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


# Changes of an adaptation's folder: functions of the folder, and functions that return such a function.


def change_lineage(**entries):
    return lambda folder: update_json(folder / "lineage.json", **entries)


def change_adapter_config(**entries):
    return lambda folder: update_json(folder / "adapter_config.json", **entries)


def change_config(**entries):
    return lambda folder: update_json(folder / "config.json", **entries)


def replace_config_text(old, new):
    def change(folder):
        file = next(file for file in folder.glob("*config.json") if old in file.read_text())
        file.write_text(file.read_text().replace(old, new))

    return change


def write_text(name, text):
    return lambda folder: (folder / name).write_text(text)


def nest_copy(folder):
    shutil.copytree(folder, folder / "adaptation")


def copy_weights(name):
    return lambda folder: (folder / name).write_bytes(find_weights(folder).read_bytes())


def change_tensors(transform, **config_entries):
    """Replace the stored tensors by a function of them, and change entries of config.json."""

    def change(folder):
        file = find_weights(folder)
        save_weights({name: tensor.clone() for name, tensor in transform(load_file(file)).items()}, file)
        if config_entries:
            update_json(folder / "config.json", **config_entries)

    return change


def add_doubles(old, new):
    """Store twice each tensor again, under its name with `old` replaced by `new`."""
    return change_tensors(
        lambda tensors: tensors | {name.replace(old, new): 2 * tensor for name, tensor in tensors.items()}
    )


def add_tensor(name, tensor):
    return change_tensors(lambda tensors: tensors | {name: tensor})


def drop_tensors(part, **config_entries):
    """Drop the tensors whose names contain a part."""
    return change_tensors(
        lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}, **config_entries
    )


def store_as_int8(part=""):
    """Store the tensors whose names contain a part as integers."""
    return change_tensors(
        lambda tensors: {name: tensor.to(torch.int8) if part in name else tensor for name, tensor in tensors.items()}
    )


def cut_rows(part, end, **config_entries):
    """Store only the rows before `end` of the tensors whose names contain a part."""
    return change_tensors(
        lambda tensors: {name: tensor[:end] if part in name else tensor for name, tensor in tensors.items()},
        **config_entries,
    )


def swap_factors():
    """Store each A of a LoRA under the name of its B, and the reverse."""
    swapped = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return change_tensors(
        lambda tensors: {
            re.sub("lora_[AB]", lambda match: swapped[match[0]], name): tensor for name, tensor in tensors.items()
        }
    )


def set_first_value(value):
    """Set the first entry of one tensor, of a bias where there is one."""

    def change(folder):
        file = find_weights(folder)
        tensors = load_file(file)
        name = max(tensors, key=lambda name: ("bias" in name, name))
        tensors[name][0] = value
        save_weights(tensors, file)

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("full", change_config(num_hidden_layers=1), "does not belong to a BertModel with the sizes"),
        ("full", change_config(num_hidden_layers=3), "missing"),
        ("full", change_config(id2label={"a": "negative"}), "not names of the outputs"),
        ("full", change_lineage(labels=["a", "b", "c"]), "contradict each other on its labels"),
        ("full", write_text("model.safetensors.index.json", "{}"), "two checkpoints"),
        ("full", set_first_value(float("nan")), "infinite or NaN"),
        ("full", add_doubles("bert.", ""), "stores the same tensor as"),
        ("full", add_doubles("Norm.weight", "Norm.gamma"), "stores the same tensor as"),
        ("full", store_as_int8(MATRIX), "is not a weight"),
        ("full", cut_rows(EMBEDDINGS, -1, vocab_size=42), "42 rows"),
        ("full", drop_tensors("layer.1.", num_hidden_layers=1), "lacks"),
        ("full", change_config(num_attention_heads=4), "num_attention_heads is 4, not 2"),
        ("full", change_config(hidden_act="relu"), "hidden_act"),
        ("full", change_config(id2label={"0": "positive", "1": "negative"}, label2id={}), "contradict each other"),
        ("full", change_config(label2id={"positive": 0, "negative": 1}), "Correct one of them"),
        ("full", change_config(id2label={"0": "positive", "1": "positive"}, label2id={}), "more than once"),
        ("full", change_config(problem_type="ranking"), "was tuned for 'ranking'"),
        ("full", change_config(id2label={"0": "score"}, label2id={"score": 0}), "contradict each other on its labels"),
        (
            "full",
            change_config(
                id2label={"0": "score"},
                label2id={"score": 0},
                sentence_transformers={"activation_fn": "torch.nn.modules.activation.Sigmoid"},
            ),
            "the Sigmoid of its output",
        ),
        (
            "full",
            change_config(architectures=["BertForTokenClassification", "BertForSequenceClassification"]),
            "neither a classifier",
        ),
        ("full", change_config(architectures=[5]), "neither a classifier nor a decoder"),
        ("full", change_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
        (
            "full",
            replace_config_text('"num_hidden_layers": 2', '"num_hidden_layers": 1, "num_hidden_layers": 2'),
            "is repeated",
        ),
        ("full", nest_copy, "and a folder adaptation/"),
        ("lora", change_lineage(labels=["positive", "positive"]), "more than once"),
        ("lora", change_lineage(labels=5), "not a list of names"),
        ("lora", change_lineage(labels=["a", "b", "c"]), "its head has 2 outputs"),
        ("lora", change_lineage(base="me"), "not an object"),
        ("lora", change_adapter_config(r=4), "another shape"),
        ("lora", change_adapter_config(rank_pattern={"query": 1}), "another shape"),
        ("lora", change_adapter_config(target_modules=["query"]), "unexpected"),
        ("lora", change_adapter_config(exclude_modules=["key"]), "unexpected"),
        ("lora", change_adapter_config(use_dora=True), "missing"),
        ("lora", change_adapter_config(bias="all"), "missing"),
        ("lora", change_adapter_config(task_type="CAUSAL_LM"), "needs an adapter of type SEQ_CLS"),
        ("lora", change_adapter_config(r="many"), "PEFT cannot"),
        ("lora", change_adapter_config(task_type="TOKEN_CLS"), "needs an adapter of type SEQ_CLS"),
        ("lora", change_adapter_config(lora_alfa=9), "lora_alfa: 9 are unknown"),
        ("lora", change_adapter_config(num_virtual_tokens=5), "num_virtual_tokens: 5 are unknown"),
        ("lora", change_adapter_config(megatron_config={"a": 1}, megatron_core="evil"), "makes PEFT import 'evil'"),
        ("lora", change_adapter_config(layers_to_transform=[1], target_modules=["query"]), "unexpected"),
        ("lora", change_adapter_config(modules_to_save=["nothing"]), "neither the base nor the adaptation"),
        ("lora", change_adapter_config(trainable_token_indices=[5]), "PEFT cannot"),
        ("lora", change_adapter_config(lora_bias=True), "missing"),
        ("lora", replace_config_text('"r": 3', '"r": 4, "r": 3'), "is repeated"),
        ("lora", write_text("adapter_config.json", "[" * 9**5), "not valid JSON"),
        ("lora", store_as_int8(), "is not a weight"),
        ("lora", add_doubles("base_model.model.", ""), "unexpected"),
        ("lora", add_doubles("A.w", "A.other.w"), "unexpected"),
        ("lora", swap_factors(), "another shape"),
        ("lora", add_tensor("base_model.model.x", torch.zeros(0)), "unexpected"),
        ("lora", cut_rows("layer.1", 0), "another shape"),
        ("lora", cut_rows("classifier", 1), "its head has 1 output, the task has 2 labels"),
        ("lora", copy_weights("adapter_model-00001-of-00002.safetensors"), "PEFT reads an adapter from"),
        ("dora", drop_tensors("magnitude"), "missing"),
        ("lora", copy_weights("model.safetensors"), "a whole model"),
        ("lora", set_first_value(float("inf")), "infinite or NaN"),
        ("lora", set_first_value(float("nan")), "infinite or NaN"),
        ("dora", change_adapter_config(use_dora=False), "unexpected"),
        ("ia3", change_adapter_config(feedforward_modules=[]), "PEFT cannot load it"),
        ("ia3", change_adapter_config(peft_type="LORA"), "feedforward_modules.* unknown"),
        ("prefix", change_adapter_config(num_virtual_tokens="some"), "num_virtual_tokens"),
        ("prefix", change_adapter_config(num_virtual_tokens=7), "another shape|PEFT cannot"),
        ("prefix", change_adapter_config(num_virtual_tokens=True), "num_virtual_tokens"),
        ("prefix", change_adapter_config(num_virtual_tokens=None), "num_virtual_tokens is missing"),
        ("prefix", change_adapter_config(num_transformer_submodules=2), "not for a classifier"),
        ("prefix", change_adapter_config(num_attention_heads=4), "num_attention_heads is 4"),
        ("prompt", change_adapter_config(task_type=None), "task_type is None"),
        ("prompt", change_adapter_config(num_layers=3), "3 layers"),
        ("prompt", change_adapter_config(peft_type="PREFIX_TUNING"), "prompt_tuning_init.* unknown"),
        ("bottleneck", change_adapter_config(inner_size=4), "another shape"),
        ("bottleneck", change_adapter_config(inner_size=-4), "at least 1"),
        ("bottleneck", change_adapter_config(placement="pfeiffer"), "unexpected"),
        ("bottleneck", change_adapter_config(tune_norms=True), "missing"),
        ("bottleneck", change_adapter_config(modules_to_save=[]), "unexpected"),
        ("bottleneck", change_adapter_config(modules_to_save=7), "adapter_config.json"),
        ("bottleneck", change_adapter_config(modules_to_save=["classifier", "pooler", "nothing"]), "names nothing"),
        ("bottleneck", change_adapter_config(inner_size=True), "at least 1"),
        ("bottleneck", change_adapter_config(tune_norms="no"), "tune_norms is true or false"),
        ("bottleneck", change_adapter_config(scaling=2.0), "scaling: 2.0 are unknown"),
        ("bottleneck", change_adapter_config(task_type="TOKEN_CLS"), "needs an adapter of type SEQ_CLS"),
        ("bottleneck", store_as_int8(), "is not a weight"),
        ("bottleneck", change_adapter_config(after_attention="("), "not a regular expression"),
        ("pfeiffer", change_adapter_config(placement="houlsby"), "missing"),
    ],
)
def test_a_folder_that_would_load_in_part_is_refused(
    tmp_path, saved_adaptations, opened_bases, task_file, kind, change, message
):
    shutil.copytree(saved_adaptations["bert", kind][0], tmp_path / "made")
    change(tmp_path / "made")
    upgrade = Upgrade(*opened_bases["bert"])
    with pytest.raises(RegraftError, match=message) as error:
        recycle(upgrade, tmp_path / "made", task_file, "init", tmp_path / "out", recipe=FEW_STEPS, head="resize")
    assert str(tmp_path / "made") in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("full", "prefix", "prompt")])
def test_an_adapter_that_changes_nothing_is_refused(tmp_path, opened_bases, task_file, kind):
    old, new = opened_bases["bert"]
    model = prepare_for_tuning(fresh_model(old, HEAD, 0), old, HEAD, new_config(kind, old, HEAD), 0)
    save_model(model, old, HEAD, tmp_path / "made", initial_factors(model))
    if kind in FOLDED:  # B·A − B₀·A₀ is 0 up to rounding
        assert check(Upgrade(old, new), tmp_path / "made", task_file).effect < 1e-4
        return
    with pytest.raises(MismatchError, match="changes nothing"):
        check(Upgrade(old, new), tmp_path / "made", task_file)
    if kind not in UNMERGEABLE:
        with pytest.raises(MismatchError, match="changes nothing"):
            convert(tmp_path / "made", old, tmp_path / "full", "full")


def test_settings_that_the_upgrade_changed_are_taken_from_the_new_base(tmp_path, saved_adaptations, opened_bases):
    """A new base trained for longer texts has different rotary positions, which its adaptations must use."""
    old, new = opened_bases["llama"]
    shutil.copytree(new.path, tmp_path / "new")
    rotary = {"rope_type": "default", "rope_theta": 50.0}
    change_config(rope_parameters=rotary, eos_token_id=3, tie_word_embeddings=True)(tmp_path / "new")
    new = Base.open(tmp_path / "new")
    tuned = saved_adaptations["llama", "full"][0]
    write_graft(load_adaptation(tuned), Upgrade(old, new), tmp_path / "out", silent)
    run_command(
        "weights", "graft", "--new", new.path, "--tuned", tuned, "--old", old.path, "--out", tmp_path / "on-disk"
    )
    for folder in ("out", "on-disk"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["rope_parameters"]["rope_theta"], config["eos_token_id"]) == (50.0, 3)
        assert list(config["id2label"].values()) == list(LABELS)
    # `type` is the old name of `rope_type`, and older configs have both
    change_config(rope_parameters={**rotary, "type": "default"})(new.path)
    load_tuned_model(tmp_path / "out", Base.open(new.path))
    with pytest.raises(MismatchError, match="rope_parameters"):
        load_tuned_model(tmp_path / "out", old)


def test_an_adaptation_of_a_different_task_type_is_refused(saved_adaptations, task_file, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(saved_adaptations["bert", "lora"][0], folder)
    data = load_data(task_file, 20)
    file = folder / "lineage.json"
    record = json.loads(file.read_text())
    assert record["task_type"] == "text-classification"
    assert match_labels(load_adaptation(folder), data).labels == data.labels
    file.write_text(json.dumps({**record, "task_type": None}))  # as regraft 0.1 wrote it
    assert match_labels(load_adaptation(folder), data).labels == data.labels
    file.write_text(json.dumps({**record, "task_type": "token-classification"}))
    with pytest.raises(MismatchError, match="was tuned for token-classification"):
        match_labels(load_adaptation(folder), data)
