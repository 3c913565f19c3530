"""Match rows of embeddings by token when vocabularies differ in order, size and padding."""

import copy
import json
import math
import shutil
from functools import partial

import pytest
import torch
from conftest import LABELS, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)
from typer.testing import CliRunner

from regraft import Recipe, Upgrade, check, convert, diagnose, recycle
from regraft.cli import app
from regraft.errors import CheckpointError, KindError, MismatchError
from regraft.methods.auto import Auto
from regraft.methods.project import Projection
from regraft.progress import quiet
from regraft.vocabulary import merged_tokenizer
from regraft.weights import graft, graft_rows, match_rows

TOKENS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=20, unique=True)
PADDINGS = st.integers(0, 6)
ONE_STEP = Recipe(steps=1, precision="fp32")


def number_tokens(tokens):
    return {token: i for i, token in enumerate(tokens)}


def edit_json(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def randomise_parameters(model):
    """Add noise to the trained parameters of an adapter, seeded by the length of each name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@settings(deadline=None)
@given(TOKENS, TOKENS, TOKENS, PADDINGS, PADDINGS, PADDINGS, st.integers(0, 2**31), st.floats(-1, 2))
def test_delta_is_added_to_the_row_of_the_same_token(
    old_names, new_names, tuned_names, old_padding, new_padding, tuned_padding, seed, scale
):
    """The reference computes each row by itself, for any three vocabularies in any order."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(len(old_names) + old_padding, 3, generator=generator)
    new = torch.randn(len(new_names) + new_padding, 3, generator=generator)
    tuned = torch.randn(len(tuned_names) + tuned_padding, 3, generator=generator)
    old_ids, new_ids, tuned_ids = (number_tokens(names) for names in (old_names, new_names, tuned_names))
    match = match_rows(old_ids, new_ids, len(old), len(new), tuned_ids, len(tuned))
    grafted = graft_rows(new, tuned, old, match, partial(graft, scale=scale))
    tuned_only = [name for name in tuned_names if name not in old_names and name not in new_names]
    assert list(match.tuned_only) == tuned_only
    assert len(grafted) == max(len(new), len(new_names) + len(tuned_only))
    for row_index, name in enumerate([*new_names, *tuned_only]):
        if name in tuned_only:
            expected = tuned[tuned_ids[name]].double()
        else:
            expected = new[new_ids[name]].double()
            if name in old_names and name in tuned_names:
                delta = tuned[tuned_ids[name]].double() - old[old_ids[name]].double()
                expected = expected + scale * delta
        torch.testing.assert_close(grafted[row_index].double(), expected, rtol=1e-6, atol=1e-6)
    for i in range(new_padding - len(tuned_only)):  # rows of padding are matched in their order
        row_index = len(new_names) + len(tuned_only) + i
        expected = new[row_index].double()
        if i < old_padding and i < tuned_padding:
            delta = tuned[len(tuned_names) + i].double() - old[len(old_names) + i].double()
            expected = expected + scale * delta
        torch.testing.assert_close(grafted[row_index].double(), expected, rtol=1e-6, atol=1e-6)
    assert set(match.removed_tokens) == set(old_names) - set(new_names)
    assert set(match.added_tokens) == set(new_names) - set(old_names)
    assert match.num_padding_rows == max(0, new_padding - len(tuned_only))


@settings(deadline=None)
@given(TOKENS, PADDINGS, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_equal_vocabularies_are_grafted_row_by_row(names, padding, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(names) + padding
    new, tuned, old = (torch.randn(num_rows, 3, generator=generator).to(dtype) for _ in range(3))
    match = match_rows(number_tokens(names), number_tokens(names), num_rows, num_rows)
    assert match.is_identity
    assert torch.equal(graft_rows(new, tuned, old, match), graft(new, tuned, old))
    assert torch.equal(graft_rows(old, tuned, old, match), tuned)


def test_summary_counts_added_and_removed_tokens():
    match = match_rows(number_tokens(["a", "b", "c"]), number_tokens(["c", "d"]), 4, 4)
    assert match.old_row_indices == (2, -1, 3, -1)
    assert match.summary() == (
        "4 rows: 1 tokens in both, 1 only in the new vocabulary, 2 only in the old ('a', 'b'), 2 rows of padding"
    )


def test_tokenizer_larger_than_the_embeddings_is_refused():
    with pytest.raises(
        MismatchError, match="the new vocabulary has token 'b' with id 1, but its embeddings have 1 rows"
    ):
        match_rows(number_tokens(["a"]), number_tokens(["a", "b"]), 1, 1)
    match = match_rows(number_tokens(["a"]), number_tokens(["a", "b"]), 1, 2)
    with pytest.raises(MismatchError, match="the old tensor has 2 rows, but its vocabulary has 1"):
        graft_rows(torch.ones(2, 1), torch.ones(1, 1), torch.ones(2, 1), match)


def save_with_added_tokens(source, folder, tokens, seed, **special_tokens):
    """Write a model with added tokens, rows padded to a multiple of 8, and noise added to all its parameters."""
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    for name, token in special_tokens.items():
        setattr(tokenizer, name, token)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False, pad_to_multiple_of=8)
    model.config.eos_token_id = tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_graft_when_fine_tune_and_new_base_added_tokens(tmp_path, bases):
    """Rows, tokenizer, config and chat template agree on the tokens of both."""
    old = bases["llama"][0]
    new = save_with_added_tokens(old, tmp_path / "new", ["<new1>", "<new2>"], 1)
    tuned = save_with_added_tokens(
        old, tmp_path / "tuned", ["<|im_start|>", "<|im_end|>", "<new2>"], 2, eos_token="<|im_end|>"
    )
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tuned)
    out = tmp_path / "out"
    run_command("weights", "graft", "--new", new, "--tuned", tuned, "--old", old, "--out", out)
    folders = {"old": old, "new": new, "tuned": tuned, "out": out}
    ids = {name: AutoTokenizer.from_pretrained(folder).get_vocab() for name, folder in folders.items()}
    states = {name: AutoModelForCausalLM.from_pretrained(folder).state_dict() for name, folder in folders.items()}
    assert ids["out"].keys() == ids["new"].keys() | ids["tuned"].keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = {model: {token: state[name][i] for token, i in ids[model].items()} for model, state in states.items()}
        for token, row in rows["out"].items():
            if token in rows["old"]:
                expected = rows["new"][token] + rows["tuned"][token] - rows["old"][token]
            else:
                expected = rows["new"].get(token, rows["tuned"].get(token))
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)
    grafted = AutoTokenizer.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(states["out"]["lm_head.weight"]) == 48  # the added tokens took rows of padding
    assert config["eos_token_id"] == grafted.eos_token_id == ids["out"]["<|im_end|>"]
    assert grafted.chat_template == tokenizer.chat_template
    assert grafted.added_tokens_decoder[ids["out"]["<|im_start|>"]].special
    text = "<|im_start|> good film <new1> <|im_end|>"
    assert [grafted.convert_ids_to_tokens(i) for i in grafted(text).input_ids] == text.split()
    for command, options in (("delta", ()), ("extract-lora", ("--rank", 4))):
        with pytest.raises(MismatchError, match=r"tuned: it has 3 tokens \('<new2>', '<\|im_end\|>'"):
            run_command("weights", command, *options, "--tuned", tuned, "--old", old, "--out", tmp_path / command)


def run_command(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def changed_vocabulary(tmp_path_factory, bases):
    """Return an old base and an upgrade that has two more tokens and two old tokens with their ids exchanged."""
    folder = tmp_path_factory.mktemp("changed-vocabulary")
    new = save_with_added_tokens(bases["llama"][0], folder / "new", ["<new1>", "<new2>"], 1)
    file = new / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = vocabulary["good"], vocabulary["bad"]
    vocabulary |= {"good": second, "bad": first}
    file.write_text(json.dumps(content))
    tensors = load_file(new / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][[first, second]] = tensors[name][[second, first]]
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return bases["llama"][0], new


def read_embeddings(folder):
    """Return the row of each token in the embeddings of a base, fine-tune or adapter."""
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    file = folder / ("adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors")
    tensors = load_file(file)
    rows = next(tensors[name] for name in tensors if "embed_tokens" in name and name.endswith("weight"))
    return {token: rows[i] for token, i in ids.items()}


@pytest.mark.parametrize("method", ["direct", "ridge", "aligned", "init+distill"])
def test_recycle_a_full_fine_tune_to_another_vocabulary(tmp_path, changed_vocabulary, tuned, task_file, method):
    source = tuned["llama", "full"] / "adaptation"
    recipe = Recipe(steps=2, precision="fp32")
    outcome = recycle(Upgrade(*changed_vocabulary), source, task_file, method, tmp_path / "out", recipe=recipe)
    assert outcome.scores["dev"] >= 0.5
    old, new, before = (read_embeddings(folder) for folder in (*changed_vocabulary, source))
    if method != "init+distill":
        after = read_embeddings(outcome.path / "adaptation")
        assert after.keys() == new.keys()
        for token in new:
            expected = new[token] + before[token] - old[token] if token in old else new[token]
            torch.testing.assert_close(after[token], expected, rtol=1e-5, atol=1e-6)
    classify = pipeline("text-classification", str(outcome.path / "adaptation"), device="cpu")
    assert classify("the film was good")[0]["label"] in LABELS


def test_check_and_diagnose_bases_with_different_vocabularies(changed_vocabulary, tuned, task_file):
    report = check(Upgrade(*changed_vocabulary), tuned["llama", "lora"], task_file, recipe=Recipe(precision="fp32"))
    old_ids, new_ids = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in changed_vocabulary)
    old, new = (load_file(folder / "model.safetensors") for folder in changed_vocabulary)
    for tensors, ids in ((old, old_ids), (new, new_ids)):
        row_indices = [ids[token] for token in old_ids]  # the new base has all tokens of the old one
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][row_indices]
    squares = sum(float((new[name] - old[name]).double().square().sum()) for name in old if name != "lm_head.weight")
    assert report.l2 == pytest.approx(math.sqrt(squares), rel=1e-6)
    diagnosis = diagnose(
        Upgrade(*changed_vocabulary), tuned["llama", "lora"], task_file, recipe=Recipe(precision="fp32")
    )
    for question in ("connectivity", "similarity", "kept"):
        assert "the two models have different vocabularies" in diagnosis.left_out[question]


def test_recycle_an_adapter_that_added_tokens(tmp_path, changed_vocabulary, task_file):
    """TRL and Axolotl write such adapters: they store the embeddings with rows for the added tokens."""
    old, _ = changed_vocabulary
    tokenizer = AutoTokenizer.from_pretrained(old)
    tokenizer.add_tokens(["<own>", "<new2>"])
    model = AutoModelForSequenceClassification.from_pretrained(old, num_labels=2)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"])
    with quiet():
        adapted = get_peft_model(model, config)
        randomise_parameters(adapted)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    inputs = tokenizer("<own> good film <new2>", return_tensors="pt")
    logits = adapted.eval()(input_ids=inputs["input_ids"]).logits
    unchanged = recycle(
        Upgrade(old, old), tmp_path / "adapter", task_file, "direct", tmp_path / "unchanged", recipe=ONE_STEP
    )
    written = AutoTokenizer.from_pretrained(unchanged.path / "adaptation")
    base = AutoModelForSequenceClassification.from_pretrained(old, num_labels=2)
    base.resize_token_embeddings(len(written), mean_resizing=False)
    base.config.pad_token_id = 0
    with quiet():
        loaded = PeftModel.from_pretrained(base, unchanged.path / "adaptation").eval()
    input_ids = written("<own> good film <new2>", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, logits, rtol=1e-5, atol=1e-6)
    outcome = recycle(
        Upgrade(*changed_vocabulary), tmp_path / "adapter", task_file, "direct", tmp_path / "out", recipe=ONE_STEP
    )
    before, after = read_embeddings(tmp_path / "adapter"), read_embeddings(outcome.path / "adaptation")
    old_rows, new_rows = (read_embeddings(folder) for folder in changed_vocabulary)
    for token, row in after.items():
        expected = before[token] if token == "<own>" else new_rows[token]
        if token in old_rows:
            expected = new_rows[token] + before[token] - old_rows[token]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


# The vocabulary of conftest's tokenizer, and sizes that let tests write and open the models in seconds.
VOCABULARY = {"vocab_size": 43, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODEL_SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE_SIZE = {"image_size": 28, "patch_size": 14}
BART = BartConfig(
    **VOCABULARY,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=66,
    forced_eos_token_id=2,
)
LLAMA = LlamaConfig(**VOCABULARY, **MODEL_SIZE)
GEMMA = Gemma3Config(
    text_config=VOCABULARY | MODEL_SIZE | {"num_key_value_heads": 1, "head_dim": 16},
    vision_config=MODEL_SIZE | IMAGE_SIZE,
    mm_tokens_per_image=4,
    image_token_index=5,
    boi_token_index=6,
    eoi_token_index=7,
)


@pytest.mark.parametrize(
    ("model_class", "config", "names"),
    [
        (BartForConditionalGeneration, BART, ["model.shared.weight", "final_logits_bias"]),
        (Gemma3ForConditionalGeneration, GEMMA, ["model.language_model.embed_tokens.weight"]),
        (LlamaForCausalLM, LLAMA, ["model.embed_tokens.weight", "lm_head.weight"]),
    ],
)
def test_graft_models_that_store_rows_of_tokens_under_other_names(tmp_path, model_class, config, names):
    """BART has a bias for each token, Gemma 3 nests its text config; here no config names the model's class."""
    torch.manual_seed(0)
    for folder, added_tokens in (("old", []), ("new", ["<new>"]), ("tuned", ["<own>"])):
        tokenizer, model = make_tokenizer("bert"), model_class(copy.deepcopy(config))
        tokenizer.add_tokens(added_tokens)
        if folder == "new":
            vocabulary = tokenizer.get_vocab()
            exchanged = vocabulary | {"good": vocabulary["bad"], "bad": vocabulary["good"]}
            tokenizer.backend_tokenizer.model = models.WordLevel(exchanged, unk_token="<unk>")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if "final_logits_bias" in names:
            model.final_logits_bias.normal_()
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
        edit_json(tmp_path / folder / "config.json", architectures=None)
    run_graft(tmp_path)
    folders = ("old", "new", "tuned", "out")
    ids = {folder: AutoTokenizer.from_pretrained(tmp_path / folder).get_vocab() for folder in folders}
    assert ids["out"] == ids["new"] | {"<own>": 44}
    states = {folder: model_class.from_pretrained(tmp_path / folder).state_dict() for folder in folders}
    for name in names:
        rows = {}
        for folder, state in states.items():
            tensor = state[name].T if len(state[name]) == 1 else state[name]  # the biases are stored as one row
            rows[folder] = {token: tensor[i] for token, i in ids[folder].items()}
        for token, row in rows["out"].items():
            if token in rows["old"]:
                expected = rows["new"][token] + rows["tuned"][token] - rows["old"][token]
            else:
                expected = rows["new" if token == "<new>" else "tuned"][token]
            torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


def run_graft(folder):
    """Run `weights graft` on the folders old, new and tuned in `folder`, and write to out."""
    inputs = "--old", folder / "old", "--new", folder / "new", "--tuned", folder / "tuned"
    run_command("weights", "graft", *inputs, "--out", folder / "out")


def test_graft_models_without_tokens(tmp_path):
    config = ViTConfig(**MODEL_SIZE, **IMAGE_SIZE)
    for seed, folder in enumerate(("old", "new", "tuned")):
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(tmp_path / folder)
    run_graft(tmp_path)
    old, new, tuned, out = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("old", "new", "tuned", "out")
    )
    name = "vit.embeddings.patch_embeddings.projection.weight"
    torch.testing.assert_close(out[name], new[name] + tuned[name] - old[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eos", ["</s>", "<end>"])
def test_grafted_config_has_the_new_token_ids(tmp_path, bases, eos):
    """The fine-tune has no tokenizer; if the new base lacks the token, the id of the new base's config stays."""
    old, tuned = bases["llama"]
    new = shutil.copytree(old, tmp_path / "new")
    bare = shutil.copytree(tuned, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    content = json.loads((new / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"</s>": 5, "good": 2}
    next(token for token in content["added_tokens"] if token["content"] == "</s>")["id"] = 5
    (new / "tokenizer.json").write_text(json.dumps(content))
    for file in new.glob("tokenizer*"):
        file.write_text(file.read_text().replace("</s>", eos))
    edit_json(new / "config.json", eos_token_id=5)
    run_command("weights", "graft", "--new", new, "--tuned", bare, "--old", old, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 5
    for command in (("interpolate", "--t", 0.5, "--out", tmp_path / "between"), ("distance",)):
        models_compared = (old, new) if command == ("distance",) else ("--first", old, "--second", new)
        with pytest.raises(MismatchError, match=r"tokens in different rows, such as '(</s>|good)'"):
            run_command("weights", *command, *models_compared)


def test_interpolation_between_different_configs_is_refused(bases, tmp_path):
    first = bases["llama"][0]
    second = shutil.copytree(first, tmp_path / "second")
    command = ("weights", "interpolate", "--first", first, "--second", second, "--t", 0.5, "--out", tmp_path / "out")
    original = (second / "config.json").read_text()
    edit_json(second / "config.json", rms_norm_eps=0.1)
    with pytest.raises(MismatchError, match=r"rms_norm_eps is 0\.1, not"):
        run_command(*command)
    (second / "config.json").write_text(original)
    edit_json(second / "config.json", use_cache=False)  # does not change what the model computes
    run_command(*command)


def test_learned_tokens_are_not_added_to_another_tokenizer(tmp_path):
    """As an added token, `Ġab` would match these characters literally in texts."""
    vocabularies = {}
    for folder, merges in (("old", []), ("new", []), ("tuned", [("a", "b"), ("Ġ", "ab")])):
        ids = number_tokens(["<unk>", "Ġ", "a", "b", *("".join(pair) for pair in merges)])
        tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / folder)
        vocabularies[folder] = ids
    match = match_rows(vocabularies["old"], vocabularies["new"], 4, 4, vocabularies["tuned"], 6)
    with pytest.raises(MismatchError, match=r"additional tokens .*'Ġab'.* were learned by its tokenizer"):
        merged_tokenizer(tmp_path / "new", tmp_path / "tuned", match)


def test_graft_a_fine_tune_without_the_padding_of_its_base(tmp_path, bases):
    """`resize_token_embeddings(len(tokenizer))` drops the rows of padding."""
    old = save_with_added_tokens(bases["llama"][0], tmp_path / "old", [], 1)
    tuned = tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(old)
    model.resize_token_embeddings(43, mean_resizing=False)
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(old).save_pretrained(tuned)
    run_command("weights", "graft", "--new", old, "--tuned", tuned, "--old", old, "--out", tmp_path / "out")
    before, after = load_file(old / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(MismatchError, match=r"have 43 rows and those of .* 48 for the same tokens"):
        run_command("weights", "delta", "--tuned", tuned, "--old", old, "--out", tmp_path / "delta")


@pytest.mark.parametrize("method", ["interpolation", "project"])
def test_methods_that_pair_weights_refuse_different_vocabularies(
    tmp_path, changed_vocabulary, tuned, task_file, method
):
    source = tuned["llama", "full"]
    options = Projection(pairs=(f"{source}={source}",)) if method == "project" else None
    with pytest.raises(KindError, match="have different vocabularies"):
        recycle(
            Upgrade(*changed_vocabulary), source, task_file, method, tmp_path / "out", recipe=ONE_STEP, options=options
        )


def test_auto_skips_methods_that_need_equal_tokenization(tmp_path, changed_vocabulary, tuned, task_file):
    new = shutil.copytree(changed_vocabulary[1], tmp_path / "new")
    content = json.loads((new / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    for word in ("the", "a", "of", "and"):
        vocabulary[f"{word}~"] = vocabulary.pop(word)
    (new / "tokenizer.json").write_text(json.dumps(content))
    upgrade, recipe = Upgrade(changed_vocabulary[0], new), Recipe(steps=2, precision="fp32")
    source, options = tuned["llama", "lora"], Auto(target=1.0, training_free=("direct", "ridge"), budgets=(0.5,))
    with pytest.raises(KindError, match="divide only"):
        recycle(upgrade, source, task_file, "ridge", tmp_path / "ridge", recipe=recipe)
    outcome = recycle(upgrade, source, task_file, "auto", tmp_path / "out", recipe=recipe, options=options)
    assert "ridge" not in [stage["rung"] for stage in outcome.record.notes["tried"]]


def test_padding_token_without_a_row(tmp_path, bases, tuned, task_file):
    """Tuning in batches of one never needs the row of the padding token."""
    source = shutil.copytree(tuned["llama", "full"] / "adaptation", tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(source)
    upgrade = Upgrade(*bases["llama"])
    outcome = recycle(upgrade, source, task_file, "direct", tmp_path / "out", recipe=ONE_STEP)
    expected = recycle(upgrade, tuned["llama", "full"], task_file, "direct", tmp_path / "expected", recipe=ONE_STEP)
    assert outcome.scores == expected.scores


def test_convert_an_adapter_that_added_tokens_to_a_full_fine_tune(tmp_path, changed_vocabulary, task_file):
    old, _ = changed_vocabulary
    tokenizer = AutoTokenizer.from_pretrained(old)
    tokenizer.add_tokens(["<own>"])
    model = AutoModelForSequenceClassification.from_pretrained(old, num_labels=2)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"])
    with quiet():
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            adapted.get_input_embeddings().weight.add_(0.1)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    full = convert(tmp_path / "adapter", old, tmp_path / "full", to="full")
    before, after = read_embeddings(tmp_path / "adapter"), read_embeddings(full.path)
    assert after.keys() == before.keys() == tokenizer.get_vocab().keys()
    assert all(torch.equal(before[token], after[token]) for token in before)
    with pytest.raises(MismatchError, match="has other tokens than"):
        convert(full.path, old, tmp_path / "lora", to="lora", rank=2)


def test_graft_models_of_an_unknown_class(tmp_path, changed_vocabulary):
    """Rows of tokens are recognised by the usual names of tensors, and without these the graft is refused."""
    old, new = changed_vocabulary
    for folder, source in (("old", old), ("new", new), ("tuned", old)):
        shutil.copytree(source, tmp_path / folder)
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    run_graft(tmp_path)
    expected, grafted = (load_file(folder / "model.safetensors") for folder in (new, tmp_path / "out"))
    assert all(torch.allclose(expected[name], grafted[name], atol=1e-6) for name in expected)
    shutil.rmtree(tmp_path / "out")
    for folder in ("old", "new", "tuned"):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        renamed = {
            name.replace("embed_tokens", "table").replace("lm_head", "out"): tensor for name, tensor in tensors.items()
        }
        save_file(renamed, tmp_path / folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of its tensors is known to have a row for each token"):
        run_graft(tmp_path)
