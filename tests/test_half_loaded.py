"""No adaptation is loaded in part, on another base, or as what it is not: attempts to."""

import json
import shutil

import pytest
import torch
from helpers import ARCHITECTURES, HEAD, LABELS, make_head, run_command, write_base
from safetensors.torch import load_file, save_file

from regraft import Base, Recipe, Upgrade, check, convert, load_adaptation, recycle
from regraft.adaptation import (
    KINDS,
    fresh_model,
    initial_factors,
    load_model,
    new_config,
    prepare_for_tuning,
    save_model,
    write_graft,
)
from regraft.errors import CheckpointError, MismatchError, RegraftError
from regraft.model import match_labels
from regraft.progress import quiet, silent
from regraft.task import load_data

CELLS = [(a, k) for a in ARCHITECTURES for k in KINDS if (a, k) != ("distilbert", "prefix")]
FOLDED = ("pissa", "olora")  # saved as the plain LoRA that they amount to
UNMERGEABLE = ("prefix", "prompt", "bottleneck", "pfeiffer")
FEW = Recipe(steps=4, batch_size=8, learning_rate=3e-3, eval_every=2, precision="fp32")


def break_(path, into, how):
    """Copy an adaptation with one tensor renamed, lost, added or cut."""
    shutil.copytree(path, into)
    file = into / ("adapter_model.safetensors" if (into / "adapter_config.json").exists() else "model.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda n: (tensors[n].dim(), n))  # a matrix
    if how == "renamed":
        tensors[name[:-1]] = tensors.pop(name)
    elif how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors[f"more.{name}"] = torch.ones(3)
    else:
        tensors[name] = tensors[name][..., :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("how", ["renamed", "missing", "extra", "cut"])
@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_a_tensor_that_does_not_belong_is_named_and_refused(
    tmp_path, saved_adaptations, opened_bases, architecture, kind, how
):
    path, _ = saved_adaptations[architecture, kind]
    name = break_(path, tmp_path / "broken", how)
    with pytest.raises(RegraftError) as refused:
        load_model(load_adaptation(tmp_path / "broken"), opened_bases[architecture][0], HEAD)
    assert str(tmp_path / "broken") in str(refused.value)
    said = str(refused.value)
    assert name in said or name.removeprefix("base_model.model.") in said or "PEFT cannot load it" in said


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_another_base_is_refused_unless_forced(saved_adaptations, opened_bases, architecture, kind):
    old, new = opened_bases[architecture]
    adaptation = load_adaptation(saved_adaptations[architecture, kind][0])
    with pytest.raises(MismatchError, match="was not tuned on"):
        adaptation.check_base(new)
    assert adaptation.check_base(new, force=True) == "forced"
    assert adaptation.check_base(old) == "proven"


def test_records_that_contradict_each_other_are_refused_and_those_of_others_not_taken(
    tmp_path, saved_adaptations, opened_bases
):
    record = {"schema": 1, "labels": list(LABELS[::-1]), "base": {"fingerprint": "another"}}
    for name in ("adaptation", "made-elsewhere"):
        shutil.copytree(saved_adaptations["bert", "lora"][0], tmp_path / name)
    (tmp_path / "outcome.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"contradict each other on its labels.*outcome\.json"):
        load_adaptation(tmp_path / "adaptation")
    (tmp_path / "outcome.json").write_text(json.dumps(record | {"labels": None}))
    with pytest.raises(CheckpointError, match=r"contradict each other on its base.*another"):
        load_adaptation(tmp_path / "adaptation")
    (tmp_path / "made-elsewhere" / "lineage.json").unlink()
    found = load_adaptation(tmp_path / "made-elsewhere")
    assert (found.labels, found.base) == (None, None)


def test_the_upgraded_base_is_recognised_as_such(tmp_path, saved_adaptations, opened_bases):
    shutil.copytree(opened_bases["bert"][1].path, tmp_path / "new")
    (tmp_path / "new" / "pretraining.json").write_text(
        json.dumps({"base": {"fingerprint": opened_bases["bert"][0].fingerprint}})
    )
    with pytest.raises(MismatchError, match="is the new base"):
        load_adaptation(saved_adaptations["bert", "lora"][0]).check_base(Base.open(tmp_path / "new"))


def test_without_a_record_lineage_is_unproven_and_another_revision_is_refused(
    tmp_path, saved_adaptations, opened_bases, bases
):
    shutil.copytree(saved_adaptations["bert", "lora"][0], tmp_path / "made")
    (tmp_path / "made" / "lineage.json").unlink()
    file = tmp_path / "made" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": "v1", "base_model_name_or_path": "us/base"}))
    adaptation = load_adaptation(tmp_path / "made")
    base = opened_bases["bert"][0]
    assert adaptation.check_base(base) == "unproven"
    assert adaptation.check_base(Base("us/base@v1", base.path, base.checkpoint)) == "unproven"
    with pytest.raises(MismatchError, match="revision v1"):
        adaptation.check_base(Base("us/base@v2", base.path, base.checkpoint))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_a_base_of_fewer_layers_is_refused(tmp_path, saved_adaptations, kind):
    """PEFT alone drops the tensors of the layers that are not there, and says nothing."""
    small = Base.open(write_base(tmp_path / "small", "bert", num_hidden_layers=1))
    with pytest.raises(RegraftError, match=r"unexpected|another shape|missing|PEFT cannot|not be loaded"):
        load_model(load_adaptation(saved_adaptations["bert", kind][0]), small, HEAD)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_that_was_not_saved_is_no_silent_fresh_one(tmp_path, opened_bases, architecture):
    """PEFT without a task type neither tunes nor saves the head: what loads then has a random one."""
    from peft import LoraConfig, get_peft_model

    base = opened_bases[architecture][0]
    with quiet():
        model = get_peft_model(
            fresh_model(base, HEAD, 0), LoraConfig(target_modules="all-linear", init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    with pytest.raises(CheckpointError, match="neither the base nor the adaptation"):
        load_model(load_adaptation(tmp_path / "made"), base, HEAD)
    fresh_model(base, make_head(*LABELS[::-1]), 3).save_pretrained(tmp_path / "tuned")  # a classifier, given as a base
    base.tokenizer.save_pretrained(tmp_path / "tuned")
    tuned = Base.open(tmp_path / "tuned")
    assert tuned.fingerprint == base.fingerprint or tuned.has_pooler
    with pytest.raises(CheckpointError, match="neither the base nor the adaptation"):
        load_model(load_adaptation(tmp_path / "made"), tuned, HEAD)
    one, other = (fresh_model(tuned, HEAD, seed).state_dict() for seed in (1, 2))
    heads = [name for name in one if not name.startswith(base.prefix) and name.endswith("weight")]
    assert heads
    assert not any(torch.equal(one[name], other[name]) for name in heads)


MATRIX = "bert.encoder.layer.1.output.dense.weight"
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


def lineage(**changes):
    def change(folder):
        file = folder / "lineage.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def adapter_config(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def config(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def written(old, new):
    def change(folder):
        file = next(file for file in folder.glob("*config.json") if old in file.read_text())
        file.write_text(file.read_text().replace(old, new))

    return change


def stored(make, **settings):
    """Store other tensors, made of those that are stored."""

    def change(folder):
        file = next(folder.glob("*model.safetensors"))
        save_file({n: t.clone() for n, t in make(load_file(file)).items()}, file, metadata={"format": "pt"})
        if settings:
            config(**settings)(folder)

    return change


def swap(name, one, other):
    return name.replace(one, "\0").replace(other, one).replace("\0", other)


def beside(name):
    return lambda folder: (folder / name).write_bytes((next(folder.glob("*model.safetensors"))).read_bytes())


def spoil(value):
    def change(folder):
        file = next(folder.glob("*model.safetensors"))
        tensors = load_file(file)
        name = max(tensors, key=lambda n: ("bias" in n, n))
        tensors[name][0] = value
        save_file(tensors, file, metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("full", config(num_hidden_layers=1), "does not belong to a BertModel with the sizes"),
        ("full", config(num_hidden_layers=3), "missing"),
        ("full", config(id2label={"a": "negative"}), "not names of the outputs"),
        ("full", lineage(labels=["a", "b", "c"]), "contradict each other on its labels"),
        ("full", lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "two checkpoints"),
        ("full", spoil(float("nan")), "not finite"),
        ("full", stored(lambda t: t | {n.removeprefix("bert."): 2 * t[n] for n in t}), "stores the same tensor as"),
        (
            "full",
            stored(lambda t: t | {n.replace("Norm.weight", "Norm.gamma"): 2 * t[n] for n in t}),
            "stores the same tensor as",
        ),
        ("full", stored(lambda t: t | {MATRIX: t[MATRIX].to(torch.int8)}), "is no weight"),
        ("full", stored(lambda t: t | {EMBEDDINGS: t[EMBEDDINGS][:-1]}, vocab_size=42), "42 rows"),
        ("full", stored(lambda t: {n: t[n] for n in t if "layer.1." not in n}, num_hidden_layers=1), "lacks"),
        ("full", config(num_attention_heads=4), "num_attention_heads is 4, not 2"),
        ("full", config(hidden_act="relu"), "hidden_act"),
        ("full", config(id2label={"0": "positive", "1": "negative"}, label2id={}), "contradict each other"),
        ("full", config(label2id={"positive": 0, "negative": 1}), "Correct one of them"),
        ("full", config(id2label={"0": "positive", "1": "positive"}, label2id={}), "more than once"),
        ("full", config(problem_type="ranking"), "was tuned for 'ranking'"),
        ("full", config(architectures=["BertForTokenClassification", "BertForSequenceClassification"]), "no sequence"),
        ("full", config(architectures=[5]), "no sequence classifier"),
        ("full", config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
        ("full", written('"num_hidden_layers": 2', '"num_hidden_layers": 1, "num_hidden_layers": 2'), "is repeated"),
        ("full", lambda folder: shutil.copytree(folder, folder / "adaptation"), "and a folder adaptation/"),
        ("lora", lineage(labels=["positive", "positive"]), "more than once"),
        ("lora", lineage(labels=5), "not a list of names"),
        ("lora", lineage(labels=["a", "b", "c"]), "another shape"),
        ("lora", lineage(base="me"), "not an object"),
        ("lora", adapter_config(r=4), "another shape"),
        ("lora", adapter_config(rank_pattern={"query": 1}), "another shape"),
        ("lora", adapter_config(target_modules=["query"]), "unexpected"),
        ("lora", adapter_config(exclude_modules=["key"]), "unexpected"),
        ("lora", adapter_config(use_dora=True), "missing"),
        ("lora", adapter_config(bias="all"), "missing"),
        ("lora", adapter_config(task_type="CAUSAL_LM"), "needs an adapter of type SEQ_CLS"),
        ("lora", adapter_config(r="many"), "PEFT cannot"),
        ("lora", adapter_config(task_type="TOKEN_CLS"), "needs an adapter of type SEQ_CLS"),
        ("lora", adapter_config(lora_alfa=9), "lora_alfa: 9 are unknown"),
        ("lora", adapter_config(num_virtual_tokens=5), "num_virtual_tokens: 5 are unknown"),
        ("lora", adapter_config(megatron_config={"a": 1}, megatron_core="evil"), "makes PEFT import 'evil'"),
        ("lora", adapter_config(layers_to_transform=[1], target_modules=["query"]), "unexpected"),
        ("lora", adapter_config(modules_to_save=["nothing"]), "neither the base nor the adaptation"),
        ("lora", adapter_config(trainable_token_indices=[5]), "PEFT cannot"),
        ("lora", adapter_config(lora_bias=True), "missing"),
        ("lora", written('"r": 3', '"r": 4, "r": 3'), "is repeated"),
        ("lora", lambda folder: (folder / "adapter_config.json").write_text("[" * 9**5), "not valid JSON"),
        ("lora", stored(lambda t: {n: t[n].to(torch.int8) for n in t}), "is no weight"),
        ("lora", stored(lambda t: t | {n.removeprefix("base_model.model."): 2 * t[n] for n in t}), "unexpected"),
        ("lora", stored(lambda t: t | {n.replace("A.w", "A.other.w"): 2 * t[n] for n in t}), "unexpected"),
        ("lora", stored(lambda t: {swap(n, "lora_A", "lora_B"): t[n] for n in t}), "another shape"),
        ("lora", stored(lambda t: t | {"base_model.model.x": torch.zeros(0)}), "unexpected"),
        ("lora", stored(lambda t: {n: t[n] if "layer.1" not in n else t[n][:0] for n in t}), "another shape"),
        ("lora", beside("adapter_model-00001-of-00002.safetensors"), "PEFT reads an adapter from"),
        ("dora", stored(lambda t: {n: t[n] for n in t if "magnitude" not in n}), "missing"),
        ("lora", beside("model.safetensors"), "a whole model"),
        ("lora", spoil(float("inf")), "not finite"),
        ("lora", spoil(float("nan")), "not finite"),
        ("dora", adapter_config(use_dora=False), "unexpected"),
        ("ia3", adapter_config(feedforward_modules=[]), "PEFT cannot load it"),
        ("ia3", adapter_config(peft_type="LORA"), "feedforward_modules.* unknown"),
        ("prefix", adapter_config(num_virtual_tokens="some"), "num_virtual_tokens"),
        ("prefix", adapter_config(num_virtual_tokens=7), "another shape|PEFT cannot"),
        ("prefix", adapter_config(num_virtual_tokens=True), "num_virtual_tokens"),
        ("prefix", adapter_config(num_virtual_tokens=None), "num_virtual_tokens is missing"),
        ("prefix", adapter_config(num_transformer_submodules=2), "not for a classifier"),
        ("prefix", adapter_config(num_attention_heads=4), "num_attention_heads is 4"),
        ("prompt", adapter_config(task_type=None), "task_type is None"),
        ("prompt", adapter_config(num_layers=3), "3 layers"),
        ("prompt", adapter_config(peft_type="PREFIX_TUNING"), "prompt_tuning_init.* unknown"),
        ("bottleneck", adapter_config(inner_size=4), "another shape"),
        ("bottleneck", adapter_config(inner_size=-4), "at least 1"),
        ("bottleneck", adapter_config(placement="pfeiffer"), "unexpected"),
        ("bottleneck", adapter_config(tune_norms=True), "missing"),
        ("bottleneck", adapter_config(modules_to_save=[]), "unexpected"),
        ("bottleneck", adapter_config(modules_to_save=7), "adapter_config.json"),
        ("bottleneck", adapter_config(modules_to_save=["classifier", "pooler", "nothing"]), "names nothing"),
        ("bottleneck", adapter_config(inner_size=True), "at least 1"),
        ("bottleneck", adapter_config(tune_norms="no"), "tune_norms is true or false"),
        ("bottleneck", adapter_config(scaling=2.0), "scaling: 2.0 are unknown"),
        ("bottleneck", adapter_config(task_type="TOKEN_CLS"), "needs an adapter of type SEQ_CLS"),
        ("bottleneck", stored(lambda t: {n: t[n].to(torch.int8) for n in t}), "is no weight"),
        ("bottleneck", adapter_config(after_attention="("), "no regular expression"),
        ("pfeiffer", adapter_config(placement="houlsby"), "missing"),
    ],
)
def test_no_half_loaded_adaptation_can_be_made(
    tmp_path, saved_adaptations, opened_bases, task_file, kind, change, says
):
    shutil.copytree(saved_adaptations["bert", kind][0], tmp_path / "made")
    change(tmp_path / "made")
    upgrade = Upgrade(*opened_bases["bert"])
    with pytest.raises(RegraftError, match=says) as refused:
        recycle(upgrade, tmp_path / "made", task_file, "init", tmp_path / "out", recipe=FEW, head="resize")
    assert str(tmp_path / "made") in str(refused.value)
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


def test_what_the_upgrade_changed_in_the_config_is_the_new_bases(tmp_path, saved_adaptations, opened_bases):
    """A new base trained for longer texts turns its positions otherwise: so must what is put onto it."""
    old, new = opened_bases["llama"]
    shutil.copytree(new.path, tmp_path / "new")
    rotary = {"rope_type": "default", "rope_theta": 50.0}
    config(rope_parameters=rotary, eos_token_id=3, tie_word_embeddings=True)(tmp_path / "new")
    new = Base.open(tmp_path / "new")
    tuned = saved_adaptations["llama", "full"][0]
    write_graft(load_adaptation(tuned), Upgrade(old, new), tmp_path / "out", silent)
    run_command(
        "weights", "graft", "--new", new.path, "--tuned", tuned, "--old", old.path, "--out", tmp_path / "on-disk"
    )
    for folder in ("out", "on-disk"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert (written["rope_parameters"]["rope_theta"], written["eos_token_id"]) == (50.0, 3)
        assert list(written["id2label"].values()) == list(LABELS)
    config(rope_parameters={"type": "default", "rope_type": "default", "rope_theta": 50.0})(
        new.path
    )  # its old name too
    load_model(load_adaptation(tmp_path / "out"), Base.open(new.path), HEAD)
    with pytest.raises(MismatchError, match="rope_parameters"):
        load_model(load_adaptation(tmp_path / "out"), old, HEAD)


def test_weights_for_another_type_of_task_are_refused(saved_adaptations, task_file, tmp_path):
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
