"""The same contract for every kind of adaptation on every architecture: wholly loaded, or not at all."""

import json
import shutil

import pytest
import torch
from conftest import move_base, write_base
from safetensors.torch import load_file, save_file

from regraft import Base, BottleneckConfig, Recipe, Upgrade, check, compare, convert, load_adaptation, recycle, tune
from regraft.adaptation import KINDS, attach, fresh_model, load_model, new_config, save_model, write_graft
from regraft.adaptation.bottleneck import attach_bottlenecks
from regraft.errors import CheckpointError, MismatchError, RecipeError, RegraftError
from regraft.progress import quiet, silent
from regraft.task import load_data
from regraft.tuning import encode, predict

ARCHITECTURES = ("bert", "roberta", "distilbert", "llama")
CELLS = [(a, k) for a in ARCHITECTURES for k in KINDS if (a, k) != ("distilbert", "prefix")]
LABELS = ("negative", "positive")
FOLDED = ("pissa", "olora")  # saved as the plain LoRA that they amount to
LORAS = ("rslora", "dora", *FOLDED)
UNMERGEABLE = ("prefix", "prompt", "bottleneck", "pfeiffer")
FEW = Recipe(steps=4, batch_size=8, learning_rate=3e-3, eval_every=2, precision="fp32")


@pytest.fixture(scope="module")
def opened(bases):
    return {name: tuple(Base.open(path) for path in pair) for name, pair in bases.items()}


@pytest.fixture(scope="module")
def texts(opened, task_file):
    data = load_data(task_file, 20)
    return {name: encode(pair[0], data.dev, data.max_length) for name, pair in opened.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory, opened, texts):
    """Every kind on every old base, with every tuned number moved; and the logits it gave before it was saved."""
    folder, found = tmp_path_factory.mktemp("made"), {}
    for architecture, kind in CELLS:
        base = opened[architecture][0]
        model = fresh_model(base, LABELS, 1)
        if kind != "full":
            model = attach(model, base, new_config(kind, base, rank=3, inner_size=5, virtual_tokens=4), 1)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        into = folder / f"{architecture}-{kind}" / "adaptation"
        into.mkdir(parents=True)
        save_model(model, base, LABELS, into)
        found[architecture, kind] = into, predict(model, texts[architecture], "fp32")
    return found


def logits_of(path, base, texts):
    return predict(load_model(load_adaptation(path), base, LABELS), texts, "fp32")


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_what_is_saved_is_what_is_loaded(made, opened, texts, architecture, kind):
    path, expected = made[architecture, kind]
    adaptation = load_adaptation(path)
    assert adaptation.kind == {"pfeiffer": "bottleneck", **dict.fromkeys(LORAS, "lora")}.get(kind, kind)
    assert adaptation.labels == LABELS
    assert adaptation.check_base(opened[architecture][0]) == "proven"
    found = logits_of(path, opened[architecture][0], texts[architecture])
    torch.testing.assert_close(found, expected, atol=1e-4 if kind in FOLDED else 0, rtol=0)
    bare = predict(fresh_model(opened[architecture][0], LABELS, 1), texts[architecture], "fp32")
    assert (found - bare).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("architecture", "kind"), [cell for cell in CELLS if cell[1] not in ("bottleneck", "pfeiffer")]
)
def test_transformers_and_peft_load_it_without_regraft(made, opened, texts, architecture, kind):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    path, _ = made[architecture, kind]
    base = opened[architecture][0]
    with quiet():
        if kind == "full":
            model = AutoModelForSequenceClassification.from_pretrained(path)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=2, pad_token_id=0)
            model = PeftModel.from_pretrained(model, path)
    model.eval()
    expected = logits_of(path, base, texts[architecture])
    for i in range(4):
        batch = texts[architecture].batch([i])
        found = model(**{name: batch[name] for name in batch if name not in ("labels", "index")}).logits
        torch.testing.assert_close(found, expected[i : i + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_direct_onto_the_same_base_gives_the_same_outputs(tmp_path, made, opened, texts, architecture, kind):
    path, _ = made[architecture, kind]
    old = opened[architecture][0]
    write_graft(load_adaptation(path), Upgrade(old, old), tmp_path / "out", silent)
    found = logits_of(tmp_path / "out", old, texts[architecture])
    torch.testing.assert_close(found, logits_of(path, old, texts[architecture]), atol=1e-6, rtol=0)


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
def test_a_tensor_that_does_not_belong_is_named_and_refused(tmp_path, made, opened, architecture, kind, how):
    path, _ = made[architecture, kind]
    name = break_(path, tmp_path / "broken", how)
    with pytest.raises(RegraftError) as refused:
        load_model(load_adaptation(tmp_path / "broken"), opened[architecture][0], LABELS)
    assert str(tmp_path / "broken") in str(refused.value)
    said = str(refused.value)
    assert name in said or name.removeprefix("base_model.model.") in said or "PEFT cannot load it" in said


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_another_base_is_refused_unless_forced(made, opened, architecture, kind):
    old, new = opened[architecture]
    adaptation = load_adaptation(made[architecture, kind][0])
    with pytest.raises(MismatchError, match="was not tuned on"):
        adaptation.check_base(new)
    assert adaptation.check_base(new, force=True) == "forced"
    assert adaptation.check_base(old) == "proven"


def test_records_that_contradict_each_other_are_refused_and_those_of_others_not_taken(tmp_path, made, opened):
    record = {"schema": 1, "labels": list(LABELS[::-1]), "base": {"fingerprint": "another"}}
    for name in ("adaptation", "made-elsewhere"):
        shutil.copytree(made["bert", "lora"][0], tmp_path / name)
    (tmp_path / "outcome.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"contradict each other on its labels.*outcome\.json"):
        load_adaptation(tmp_path / "adaptation")
    (tmp_path / "outcome.json").write_text(json.dumps(record | {"labels": None}))
    with pytest.raises(CheckpointError, match=r"contradict each other on its base.*another"):
        load_adaptation(tmp_path / "adaptation")
    (tmp_path / "made-elsewhere" / "lineage.json").unlink()
    found = load_adaptation(tmp_path / "made-elsewhere")
    assert (found.labels, found.base) == (None, None)


def test_what_the_upgrade_changed_in_the_config_is_the_new_bases(tmp_path, made, opened):
    """A new base trained for longer texts turns its positions otherwise: so must what is put onto it."""
    old, new = opened["llama"]
    shutil.copytree(new.path, tmp_path / "new")
    config(rope_parameters={"rope_type": "default", "rope_theta": 50.0}, eos_token_id=3)(tmp_path / "new")
    new = Base.open(tmp_path / "new")
    write_graft(load_adaptation(made["llama", "full"][0]), Upgrade(old, new), tmp_path / "out", silent)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["rope_parameters"]["rope_theta"], written["eos_token_id"]) == (50.0, 3)
    assert list(written["id2label"].values()) == list(LABELS)
    load_model(load_adaptation(tmp_path / "out"), new, LABELS)
    with pytest.raises(MismatchError, match="rope_parameters"):
        load_model(load_adaptation(tmp_path / "out"), old, LABELS)


def test_the_upgraded_base_is_recognised_as_such(tmp_path, made, opened):
    shutil.copytree(opened["bert"][1].path, tmp_path / "new")
    (tmp_path / "new" / "pretraining.json").write_text(
        json.dumps({"base": {"fingerprint": opened["bert"][0].fingerprint}})
    )
    with pytest.raises(MismatchError, match="as the new base"):
        load_adaptation(made["bert", "lora"][0]).check_base(Base.open(tmp_path / "new"))


def test_without_a_record_lineage_is_unproven_and_another_revision_is_refused(tmp_path, made, opened, bases):
    shutil.copytree(made["bert", "lora"][0], tmp_path / "made")
    (tmp_path / "made" / "lineage.json").unlink()
    file = tmp_path / "made" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": "v1", "base_model_name_or_path": "us/base"}))
    adaptation, base = load_adaptation(tmp_path / "made"), opened["bert"][0]
    assert adaptation.check_base(base) == "unproven"
    assert adaptation.check_base(Base("us/base@v1", base.path, base.checkpoint)) == "unproven"
    with pytest.raises(MismatchError, match="revision v1"):
        adaptation.check_base(Base("us/base@v2", base.path, base.checkpoint))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "full"])
def test_a_base_of_fewer_layers_is_refused(tmp_path, made, kind):
    """PEFT alone drops the tensors of the layers that are not there, and says nothing."""
    small = Base.open(write_base(tmp_path / "small", "bert", num_hidden_layers=1))
    with pytest.raises(RegraftError, match=r"without a place|another shape|missing|PEFT cannot"):
        load_model(load_adaptation(made["bert", kind][0]), small, LABELS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_that_was_not_saved_is_no_silent_fresh_one(tmp_path, opened, architecture):
    """PEFT without a task type neither tunes nor saves the head: what loads then has a random one."""
    from peft import LoraConfig, get_peft_model

    base = opened[architecture][0]
    with quiet():
        model = get_peft_model(
            fresh_model(base, LABELS, 0), LoraConfig(target_modules="all-linear", init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    with pytest.raises(CheckpointError, match="neither the base nor the adaptation fills"):
        load_model(load_adaptation(tmp_path / "made"), base, LABELS)
    fresh_model(base, LABELS[::-1], 3).save_pretrained(tmp_path / "tuned")  # a classifier, given as a base
    base.tokenizer.save_pretrained(tmp_path / "tuned")
    tuned = Base.open(tmp_path / "tuned")
    assert tuned.fingerprint == base.fingerprint or tuned.has_pooler
    with pytest.raises(CheckpointError, match="neither the base nor the adaptation fills"):
        load_model(load_adaptation(tmp_path / "made"), tuned, LABELS)
    one, other = (fresh_model(tuned, LABELS, seed).state_dict() for seed in (1, 2))
    heads = [name for name in one if not name.startswith(base.prefix) and name.endswith("weight")]
    assert heads
    assert not any(torch.equal(one[name], other[name]) for name in heads)


@pytest.mark.parametrize(("architecture", "kind"), CELLS)
def test_conversion_to_full_gives_the_same_outputs(tmp_path, made, opened, texts, architecture, kind):
    path, _ = made[architecture, kind]
    base = opened[architecture][0]
    if kind in UNMERGEABLE or kind == "full":
        with pytest.raises(RecipeError, match="beside the weights" if kind != "full" else "already"):
            convert(path, base, tmp_path / "full", "full")
        assert not list(tmp_path.iterdir())
        return
    convert(path, base, tmp_path / "full", "full")
    adaptation = load_adaptation(tmp_path / "full")
    assert (adaptation.kind, adaptation.labels, adaptation.base) == ("full", LABELS, base.fingerprint)
    expected = logits_of(path, base, texts[architecture])
    torch.testing.assert_close(logits_of(tmp_path / "full", base, texts[architecture]), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_full_fine_tune_becomes_a_lora_within_its_energy(tmp_path, made, opened, texts, architecture):
    """Head and nested head survive; what is kept is what was asked for."""
    path, _ = made[architecture, "full"]
    old, new = opened[architecture]
    done = convert(path, old, tmp_path / "most", "lora", energy=0.9)
    assert 0.9 * (1 - done.left_out) <= done.kept < 1
    convert(made[architecture, "lora"][0], old, tmp_path / "full", "full")
    again = convert(tmp_path / "full", old, tmp_path / "again", "lora", rank=3)
    assert again.kept == pytest.approx(1, abs=1e-6)
    expected = logits_of(made[architecture, "lora"][0], old, texts[architecture])
    torch.testing.assert_close(logits_of(tmp_path / "again", old, texts[architecture]), expected, atol=2e-5, rtol=1e-4)
    convert(tmp_path / "full", old, tmp_path / "there", "lora", rank=3, new=new)
    expected = logits_of(made[architecture, "lora"][0], new, texts[architecture])
    torch.testing.assert_close(logits_of(tmp_path / "there", new, texts[architecture]), expected, atol=2e-5, rtol=1e-4)
    assert load_adaptation(tmp_path / "there").base == new.fingerprint


def test_weighing_by_inputs_keeps_the_outputs_better(tmp_path, made, opened, task_file):
    """At the same rank, a layer's outputs on the texts are nearer to those of the fine-tune."""
    from regraft.tuning import input_moments

    path, _ = made["bert", "full"]
    old = opened["bert"][0]
    convert(path, old, tmp_path / "plain", "lora", rank=2)
    convert(path, old, tmp_path / "weighed", "lora", rank=2, task=task_file)
    data = load_data(task_file, 0)
    model = load_model(load_adaptation(path), old, LABELS)
    moments = input_moments(model, encode(old, data.train, data.max_length))
    tuned, base = load_file(path / "model.safetensors"), load_file(old.path / "model.safetensors")

    def error(folder, layer):
        stored = load_file(folder / "adapter_model.safetensors")
        a, b = (stored[f"base_model.model.{layer}.lora_{part}.weight"].double() for part in "AB")
        left = (tuned[f"{layer}.weight"] - base[f"{layer}.weight"]).double() - b @ a
        return float(torch.trace(left @ moments[layer] @ left.T))

    layers = [
        n.removesuffix(".weight") for n in tuned if n in base and n.endswith("dense.weight") and "pooler" not in n
    ]
    assert len(layers) == 6
    assert all(error(tmp_path / "weighed", layer) < error(tmp_path / "plain", layer) for layer in layers)


def test_a_multiplicative_kind_on_a_new_base_is_the_change_it_made_to_the_old_one(tmp_path, made, opened):
    old, new = opened["bert"]
    path, _ = made["bert", "ia3"]
    convert(path, old, tmp_path / "old", "full")
    convert(path, old, tmp_path / "new", "full", new=new)
    on_old, on_new = (load_file(tmp_path / side / "model.safetensors") for side in ("old", "new"))
    before, after = (load_file(side.path / "model.safetensors") for side in (old, new))
    name = "bert.encoder.layer.0.attention.self.key.weight"
    assert (on_old[name] - before[name]).abs().max() > 1e-3
    torch.testing.assert_close(on_new[name] - after[name], on_old[name] - before[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_foreign_lora_that_took_its_start_from_its_base_is_folded(tmp_path, opened, texts, init):
    """Saved by PEFT as it is, it is right on the old base only; direct makes it the same change on any base."""
    from peft import LoraConfig, get_peft_model

    old, new = opened["bert"]
    model = fresh_model(old, LABELS, 0)
    with quiet():
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "dense"], init_lora_weights=init,
            modules_to_save=["pooler"], rank_pattern={"query": 2},
        )  # fmt: skip
        model = get_peft_model(model, config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.1)
        model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
        change = {
            name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer
            for name, layer in model.merge_and_unload().named_modules()
        }
    write_graft(load_adaptation(tmp_path / "made"), Upgrade(old, new), tmp_path / "out", silent)
    adaptation = load_adaptation(tmp_path / "out")
    assert adaptation.config["init_lora_weights"] is True
    assert (adaptation.config["r"], adaptation.config["rank_pattern"]) == (8, {"query": 4})
    merged = load_model(adaptation, new, LABELS).merge_and_unload()
    before, after = (load_file(side.path / "model.safetensors") for side in (old, new))
    for layer in ("query", "key"):
        name = f"bert.encoder.layer.1.attention.self.{layer}"
        moved = change[name].weight - before[f"{name}.weight"]
        assert (moved.abs().max() > 1e-3) == (layer == "query")
        torch.testing.assert_close(
            merged.get_submodule(name).weight - after[f"{name}.weight"], moved, atol=1e-5, rtol=0
        )


FOREIGN = {
    "AdaLora": {"init_r": 4, "target_r": 2, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FourierFT": {"n_frequency": 20},
    "HRA": {"r": 2},
    "LoHa": {"r": 2},
    "LoKr": {"r": 2},
    "Lora bias": {"lora_bias": True},
    "Lora beside biases": {"bias": "all"},
    "Lora of a layer": {"layers_to_transform": [1]},
    "Lora of layers twice": {"layer_replication": [(0, 2), (1, 2)]},
    "Lora of parameters": {"target_parameters": ["key.weight"]},
    "Lora of the head": {"target_modules": ["query", "word_embeddings", "classifier"]},
    "Lora with tokens": {"trainable_token_indices": {"word_embeddings": [5, 6]}},
    "Miss": {"r": 2},
    "OFT": {"r": 4, "oft_block_size": 0},
    "PrefixTuning": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
    "PromptEncoder": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "RandLora": {"r": 2},
    "Vera": {"r": 2},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_that_peft_saved_are_read_and_put_on_a_base(tmp_path, opened, texts, name):
    import peft

    old = opened["bert"][0]
    targets = {} if name.startswith("Pr") else {"target_modules": ["query", "value"]}
    given = {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"], **targets, **FOREIGN[name]}
    with quiet():
        model = peft.get_peft_model(fresh_model(old, LABELS, 0), getattr(peft, f"{name.split()[0]}Config")(**given))
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "made", save_embedding_layers=False)
    expected = predict(model, texts["bert"], "fp32")
    made = load_adaptation(tmp_path / "made")
    for further in (False, True):
        model = load_model(made, old, LABELS, trainable=further)
        assert further <= any(parameter.requires_grad for parameter in model.parameters())
        found = predict(model, texts["bert"], "fp32")
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    write_graft(made, Upgrade(old, old), tmp_path / "out", silent)
    torch.testing.assert_close(logits_of(tmp_path / "out", old, texts["bert"]), found, atol=1e-6, rtol=0)
    if not targets or "twice" in name:
        with pytest.raises(RecipeError, match="recycled, but not converted"):
            convert(made, old, tmp_path / "full", "full")
        return
    convert(made, old, tmp_path / "full", "full")
    torch.testing.assert_close(logits_of(tmp_path / "full", old, texts["bert"]), found, atol=1e-4, rtol=1e-4)


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
        ("full", config(num_hidden_layers=1), "without a place"),
        ("full", config(num_hidden_layers=3), "missing"),
        ("full", config(id2label={"a": "negative"}), "not names of the outputs"),
        ("full", lineage(labels=["a", "b", "c"]), "contradict each other on its labels"),
        ("full", lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "two checkpoints"),
        ("full", spoil(float("nan")), "no numbers"),
        ("full", stored(lambda t: t | {n.removeprefix("bert."): 2 * t[n] for n in t}), "without a place of their own"),
        ("full", stored(lambda t: t | {n.replace("Norm.weight", "Norm.gamma"): 2 * t[n] for n in t}), "no counterpart"),
        ("full", stored(lambda t: t | {MATRIX: t[MATRIX].to(torch.int8)}), "floating-point"),
        ("full", stored(lambda t: t | {EMBEDDINGS: t[EMBEDDINGS][:-1]}, vocab_size=42), "has shape"),
        ("full", stored(lambda t: {n: t[n] for n in t if "layer.1." not in n}, num_hidden_layers=1), "are not in it"),
        ("full", config(num_attention_heads=4), "num_attention_heads is 4, in the base 2"),
        ("full", config(hidden_act="relu"), "hidden_act"),
        ("full", config(id2label={"0": "positive", "1": "negative"}, label2id={}), "contradict each other"),
        ("full", config(label2id={"positive": 0, "negative": 1}), "which is right"),
        ("full", config(id2label={"0": "positive", "1": "positive"}, label2id={}), "more than once"),
        ("full", config(problem_type="multi_label_classification"), "only one label a text"),
        ("full", config(architectures=["BertForTokenClassification", "BertForSequenceClassification"]), "no sequence"),
        ("full", config(architectures=[5]), "no sequence classifier"),
        ("full", config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised"),
        ("full", written('"num_hidden_layers": 2', '"num_hidden_layers": 1, "num_hidden_layers": 2'), "there twice"),
        ("full", lambda folder: shutil.copytree(folder, folder / "adaptation"), "and a folder adaptation/ too"),
        ("lora", lineage(labels=["positive", "positive"]), "more than once"),
        ("lora", lineage(labels=5), "not a list of names"),
        ("lora", lineage(labels=["a", "b", "c"]), "another shape"),
        ("lora", lineage(base="me"), "not an object"),
        ("lora", adapter_config(r=4), "another shape"),
        ("lora", adapter_config(rank_pattern={"query": 1}), "another shape"),
        ("lora", adapter_config(target_modules=["query"]), "without a place"),
        ("lora", adapter_config(exclude_modules=["key"]), "without a place"),
        ("lora", adapter_config(use_dora=True), "missing"),
        ("lora", adapter_config(bias="all"), "missing"),
        ("lora", adapter_config(task_type="CAUSAL_LM"), "only classifiers of whole texts"),
        ("lora", adapter_config(r="many"), "PEFT cannot"),
        ("lora", adapter_config(task_type="TOKEN_CLS"), "only classifiers of whole texts"),
        ("lora", adapter_config(lora_alfa=9), "lora_alfa: 9 are not known"),
        ("lora", adapter_config(num_virtual_tokens=5), "num_virtual_tokens: 5 are not known"),
        ("lora", adapter_config(megatron_config={"a": 1}), "PEFT cannot"),
        ("lora", adapter_config(layers_to_transform=[1], target_modules=["query"]), "without a place"),
        ("lora", adapter_config(modules_to_save=["nothing"]), "neither the base nor the adaptation"),
        ("lora", adapter_config(trainable_token_indices=[5]), "PEFT cannot"),
        ("lora", adapter_config(lora_bias=True), "missing"),
        ("lora", written('"r": 3', '"r": 4, "r": 3'), "there twice"),
        ("lora", lambda folder: (folder / "adapter_config.json").write_text("[" * 9**5), "not valid JSON"),
        ("lora", stored(lambda t: {n: t[n].to(torch.int8) for n in t}), "no floating-point"),
        ("lora", stored(lambda t: t | {n.removeprefix("base_model.model."): 2 * t[n] for n in t}), "without a place"),
        ("lora", stored(lambda t: t | {n.replace("A.w", "A.other.w"): 2 * t[n] for n in t}), "without a place"),
        ("lora", stored(lambda t: {swap(n, "lora_A", "lora_B"): t[n] for n in t}), "another shape"),
        ("lora", stored(lambda t: t | {"base_model.model.x": torch.zeros(0)}), "without a place"),
        ("lora", stored(lambda t: {n: t[n] if "layer.1" not in n else t[n][:0] for n in t}), "another shape"),
        ("lora", beside("adapter_model-00001-of-00002.safetensors"), "an adapter is one file"),
        ("dora", stored(lambda t: {n: t[n] for n in t if "magnitude" not in n}), "missing"),
        ("lora", beside("model.safetensors"), "a whole model too"),
        ("lora", spoil(float("inf")), "no numbers"),
        ("lora", spoil(float("nan")), "no numbers"),
        ("dora", adapter_config(use_dora=False), "without a place"),
        ("ia3", adapter_config(feedforward_modules=[]), "PEFT cannot load it"),
        ("ia3", adapter_config(peft_type="LORA"), "feedforward_modules.* not known"),
        ("prefix", adapter_config(num_virtual_tokens="some"), "num_virtual_tokens"),
        ("prefix", adapter_config(num_virtual_tokens=7), "another shape|PEFT cannot"),
        ("prefix", adapter_config(num_virtual_tokens=True), "num_virtual_tokens"),
        ("prefix", adapter_config(num_virtual_tokens=None), "num_virtual_tokens is missing"),
        ("prefix", adapter_config(num_transformer_submodules=2), "not for a classifier"),
        ("prefix", adapter_config(num_attention_heads=4), "num_attention_heads is 4"),
        ("prompt", adapter_config(task_type=None), "task_type is None"),
        ("prompt", adapter_config(num_layers=3), "3 layers"),
        ("prompt", adapter_config(peft_type="PREFIX_TUNING"), "prompt_tuning_init.* not known"),
        ("bottleneck", adapter_config(inner_size=4), "another shape"),
        ("bottleneck", adapter_config(inner_size=-4), "at least 1"),
        ("bottleneck", adapter_config(placement="pfeiffer"), "without a place"),
        ("bottleneck", adapter_config(tune_norms=True), "missing"),
        ("bottleneck", adapter_config(modules_to_save=[]), "without a place"),
        ("bottleneck", adapter_config(modules_to_save=7), "adapter_config.json"),
        ("bottleneck", adapter_config(modules_to_save=["classifier", "pooler", "nothing"]), "names nothing"),
        ("bottleneck", adapter_config(inner_size=True), "at least 1"),
        ("bottleneck", adapter_config(tune_norms="no"), "tune_norms is true or false"),
        ("bottleneck", adapter_config(scaling=2.0), "scaling: 2.0 are not known"),
        ("bottleneck", adapter_config(task_type="TOKEN_CLS"), "only classifiers of whole texts"),
        ("bottleneck", stored(lambda t: {n: t[n].to(torch.int8) for n in t}), "no floating-point"),
        ("bottleneck", adapter_config(after_attention="("), "no regular expression"),
        ("pfeiffer", adapter_config(placement="houlsby"), "missing"),
    ],
)
def test_no_half_loaded_adaptation_can_be_made(tmp_path, made, opened, task_file, kind, change, says):
    shutil.copytree(made["bert", kind][0], tmp_path / "made")
    change(tmp_path / "made")
    upgrade = Upgrade(*opened["bert"])
    with pytest.raises(RegraftError, match=says) as refused:
        recycle(upgrade, tmp_path / "made", task_file, "init", tmp_path / "out", recipe=FEW, head="resize")
    assert str(tmp_path / "made") in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("architecture", "kind", "row"),
    [
        ("roberta", "full", "classifier.out_proj.weight"),
        ("llama", "lora", "base_model.model.score.weight"),
        ("bert", "prompt", "base_model.classifier.weight"),
    ],
)
def test_heads_are_resized_by_the_labels_names(tmp_path, made, opened, task_file, architecture, kind, row):
    (tmp_path / "task").mkdir()
    for split in ("train", "dev", "test"):
        text = (task_file.parent / f"{split}.csv").read_text()
        (tmp_path / "task" / f"{split}.csv").write_text(
            text.replace("negative", "worse") + "it was a day,neutral\n" * 4
        )
    task = tmp_path / "task" / "task.yaml"
    task.write_text(task_file.read_text())
    path, upgrade = made[architecture, kind][0], Upgrade(*opened[architecture])
    with pytest.raises(MismatchError, match="worse"):
        recycle(upgrade, path, task, "direct", tmp_path / "copy", recipe=FEW)
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    for how in ("resize", "fresh"):
        with pytest.raises(RecipeError, match="head copy only"):
            recycle(upgrade, path, task, "init+distill", tmp_path / how, recipe=FEW, head=how)
        outcome = recycle(upgrade, path, task, "direct", tmp_path / how, recipe=FEW, head=how)
        assert outcome.record["labels"] == ["neutral", "positive", "worse"]
        before, after = load_file(path / file)[row], load_file(outcome.path / "adaptation" / file)[row]
        assert after.shape == (3, before.shape[1])
        assert torch.equal(after[1], before[1]) == (how == "resize")
        assert not torch.equal(after[2], before[0])
    tuned_on = recycle(upgrade, path, task, "init", tmp_path / "init", recipe=FEW, head="resize")
    assert tuned_on.record["cost"]["steps"] == 4


def test_labels_in_another_order_are_permuted(tmp_path, made, opened, task_file):
    task = task_file.parent / "other-order.yaml"
    task.write_text(task_file.read_text() + "labels: [positive, negative]\n")
    upgrade, path = Upgrade(*opened["bert"]), made["bert", "lora"][0]
    one = recycle(upgrade, path, task_file, "direct", tmp_path / "one", recipe=FEW)
    other = recycle(upgrade, path, task, "direct", tmp_path / "other", recipe=FEW)
    assert one.scores == other.scores
    assert other.record["labels"] == list(LABELS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("full", "prefix", "prompt")])
def test_an_adapter_that_changes_nothing_is_refused(tmp_path, opened, task_file, kind):
    old, new = opened["bert"]
    model = attach(fresh_model(old, LABELS, 0), old, new_config(kind, old), 0)
    save_model(model, old, LABELS, tmp_path / "made")
    if kind in FOLDED:  # B·A − B₀·A₀ is 0 up to rounding
        assert check(Upgrade(old, new), tmp_path / "made", task_file).effect < 1e-4
        return
    with pytest.raises(MismatchError, match="changes nothing"):
        check(Upgrade(old, new), tmp_path / "made", task_file)
    if kind not in UNMERGEABLE:
        with pytest.raises(MismatchError, match="changes nothing"):
            convert(tmp_path / "made", old, tmp_path / "full", "full")


def test_bottlenecks_begin_as_the_identity_and_tune_what_is_wanted(opened, texts):
    base = opened["bert"][0]
    bare = predict(fresh_model(base, LABELS, 0), texts["bert"], "fp32")
    for config, expected in (
        (BottleneckConfig(), 4),
        (BottleneckConfig(placement="pfeiffer", activation="relu"), 2),
        (BottleneckConfig(inner_size=7, tune_norms=True, tune_head=False), 4),
    ):
        model = attach(fresh_model(base, LABELS, 0), base, config, 0)
        assert torch.equal(predict(model, texts["bert"], "fp32"), bare)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert sum(name.endswith("bottleneck.down.weight") for name in trained) == expected
        assert any("LayerNorm" in name for name in trained) == config.tune_norms
        assert ("classifier.weight" in trained) == config.tune_head
        assert not any("query" in name for name in trained)
    for wrong in ({"inner_size": 0}, {"activation": "tanh"}, {"placement": "everywhere"}):
        with pytest.raises(RecipeError, match=str(next(iter(wrong.values())))):
            BottleneckConfig(**wrong)
    with pytest.raises(MismatchError, match="finds 0 layers"):
        attach(fresh_model(base, LABELS, 0), base, BottleneckConfig(after_attention="nothing"), 0)


@pytest.mark.parametrize(
    "kind", ["deberta-v2", "electra", "gpt2", "gpt_neox", "mistral", "modernbert", "mpnet", "opt", "phi", "qwen3"]
)
def test_bottlenecks_find_their_places_in_other_architectures(kind):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}.get(kind, {})
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(kind, vocab_size=50, pad_token_id=0, **size)
        )
    attach_bottlenecks(model, BottleneckConfig(inner_size=3))
    assert sum(name.endswith("bottleneck.up.weight") for name, _ in model.named_parameters()) == 4


@pytest.mark.parametrize("kind", ["gpt2", "mpnet", "modernbert", "mixtral"])
def test_conversions_in_other_architectures(tmp_path, task_file, kind):
    """GPT-2's turned layers, MPNet's biases by distance, ModernBERT's second head; and experts, which have no LoRA."""
    from conftest import WORDS, make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    size |= {"mixtral": {"num_local_experts": 2, "num_key_value_heads": 2}}.get(kind, {})
    given = AutoConfig.for_model(
        kind, vocab_size=5 + len(WORDS), pad_token_id=0, max_position_embeddings=66, eos_token_id=2, **size
    )
    decoder = kind in ("gpt2", "mixtral")
    torch.manual_seed(0)
    (AutoModelForCausalLM if decoder else AutoModelForMaskedLM).from_config(given).save_pretrained(tmp_path / "base")
    make_tokenizer("llama" if decoder else "bert").save_pretrained(tmp_path / "base")
    base, data = Base.open(tmp_path / "base"), load_data(task_file, 20)
    dev = encode(base, data.dev, data.max_length)
    model = fresh_model(base, LABELS, 1)
    if kind == "mixtral":
        save_model(model, base, LABELS, tmp_path / "made")
        assert load_adaptation(tmp_path / "made").check_base(base) == "proven"
        with pytest.raises(RegraftError):
            convert(tmp_path / "made", base, tmp_path / "lora", "lora", rank=2)
        assert not (tmp_path / "lora").exists()
        return
    with quiet():
        model = attach(model, base, new_config("lora", base, rank=3), 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    save_model(model, base, LABELS, tmp_path / "made")
    expected = predict(model, dev, "fp32")
    convert(tmp_path / "made", base, tmp_path / "full", "full")
    torch.testing.assert_close(logits_of(tmp_path / "full", base, dev), expected, atol=2e-5, rtol=1e-4)
    assert convert(tmp_path / "full", base, tmp_path / "lora", "lora", rank=3).kept == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(logits_of(tmp_path / "lora", base, dev), expected, atol=2e-5, rtol=1e-4)


def test_a_prompt_before_a_decoder_reads_the_last_token_whatever_the_padding(made, opened, texts):
    path, together = made["llama", "prompt"]
    model = load_model(load_adaptation(path), opened["llama"][0], LABELS)
    for i in range(5):
        alone = predict(model, encode_one(texts["llama"], i), "fp32")
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)


def encode_one(examples, i):
    import dataclasses

    return dataclasses.replace(
        examples, columns={n: [c[i]] for n, c in examples.columns.items()}, labels=examples.labels[i : i + 1]
    )


def test_kinds_that_cannot_be(opened):
    with pytest.raises(RecipeError, match="Did you mean lora"):
        new_config("loora", opened["bert"][0])
    with pytest.raises(RecipeError, match="takes no prefix"):
        new_config("prefix", opened["distilbert"][0])
    with pytest.raises(RecipeError, match="leave no room"):
        new_config("prompt", opened["bert"][0], virtual_tokens=100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*(("bert", kind) for kind in KINDS), ("llama", "bottleneck"), ("roberta", "prefix")],
)
def test_every_kind_is_tuned_checked_and_recycled(tmp_path, task_file, architecture, kind):
    old = write_base(tmp_path / "old-base", architecture, initializer_range=0.2)  # heads see more than their own token
    new = move_base(old, tmp_path / "new-base", 0.02)
    rate = {"full": 3e-3, "lora": 0.01, "bottleneck": 0.01, "pfeiffer": 0.01}.get(kind, 0.01 if kind in LORAS else 0.03)
    recipe = Recipe(steps=120, batch_size=16, learning_rate=rate, eval_every=20, precision="fp32")
    outcome = tune(old, task_file, tmp_path / "old", kind=kind, recipe=recipe)
    assert outcome.scores["dev"] > outcome.scores["dev_majority"] + 0.1
    found = check(Upgrade(old, new), outcome.path, task_file, recipe=recipe)
    assert found.effect > 1e-4
    assert found.old == outcome.scores["test"]
    assert found.new > found.floor
    compared = compare(
        Upgrade(old, new), outcome.path, task_file, ["direct", "init", "distill", "init+distill"], tmp_path / "all",
        recipe=Recipe(steps=6, batch_size=16, learning_rate=rate / 10, eval_every=3, precision="fp32"),
    )  # fmt: skip
    rows = {row.method: row for row in compared.rows}
    assert rows["init"].start == rows["init+distill"].start == rows["direct"].start
    assert rows["distill"].start == rows["scratch"].start
    for path in compared.outcomes:
        again = load_adaptation(path)
        assert again.kind == outcome.record["kind"]
        assert again.base == Base.open(new).fingerprint


def test_the_command_line_shows_and_converts(tmp_path, made, bases, capsys, monkeypatch):
    from regraft.cli import app

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        assert not ended.value.code
        return " ".join(capsys.readouterr().out.split())

    old = bases["bert"][0]
    said = run("adaptation", "show", made["bert", "bottleneck"][0], "--base", old)
    assert "kind bottleneck" in said
    assert "inner_size 5" in said
    assert "loads wholly, lineage proven" in said
    arguments = ("--old-base", old, "--to", "lora", "--rank", 2, "--out", tmp_path / "lora")
    said = run("adaptation", "convert", made["bert", "full"][0], *arguments)
    assert "of the delta's squared norm kept" in said
    assert load_adaptation(tmp_path / "lora").config["r"] == 2


@pytest.mark.parametrize("kind", ["bottleneck", "prefix", "prompt", "ia3", "dora", "pissa", "layernorm"])
def test_an_interrupted_tuning_goes_on_to_the_same_weights(tmp_path, bases, task_file, kind):
    recipe = Recipe(steps=9, batch_size=8, learning_rate=3e-3, eval_every=3, save_every=3, precision="fp32")

    class Stopped(Exception):
        pass

    def interrupt(stage, done, total, figures):
        if (stage, done) == ("tune", 7):
            raise Stopped

    with pytest.raises(Stopped):
        tune(bases["bert"][0], task_file, tmp_path / "one", kind=kind, recipe=recipe, progress=interrupt)
    assert not (tmp_path / "one").exists()
    steps = []
    for name in ("one", "other"):
        tune(
            bases["bert"][0], task_file, tmp_path / name, kind=kind, recipe=recipe,
            progress=lambda stage, done, *_: steps.append(done) if stage == "tune" else None,
        )  # fmt: skip
    assert steps == [7, 8, 9, *range(1, 10)]
    one, other = (load_file(tmp_path / n / "adaptation" / "adapter_model.safetensors") for n in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
