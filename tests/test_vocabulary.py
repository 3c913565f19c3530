"""Token embeddings matched by token, for vocabularies of any order, size and padding."""

import copy
import json
import math
import shutil
from functools import partial

import pytest
import torch
from helpers import FLOAT32, LABELS, ONE_STEP, add_noise, make_tokenizer, read_weights, run_command, update_json
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
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

from regraft import Recipe, Upgrade, check, convert, diagnose, recycle
from regraft.errors import CheckpointError, KindError, MismatchError
from regraft.methods.auto import Auto
from regraft.methods.project import Projection
from regraft.progress import quiet
from regraft.vocabulary import merged_tokenizer
from regraft.weights import graft, graft_rows, match_rows

TWO_STEPS = Recipe(steps=2, precision="fp32")
ROLES = ("old", "new", "tuned")
tokens = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=20, unique=True)
paddings = st.integers(0, 6)


def enumerate_tokens(tokens):
    return {token: i for i, token in enumerate(tokens)}


def graft_folders(old, new, tuned, out):
    run_command("weights", "graft", "--old", old, "--new", new, "--tuned", tuned, "--out", out)


def read_vocabulary(folder):
    return AutoTokenizer.from_pretrained(folder).get_vocab()


@settings(deadline=None)
@given(tokens, tokens, tokens, paddings, paddings, paddings, st.integers(0, 2**31), st.floats(-1, 2))
def test_rows_are_grafted_by_token(
    old_tokens, new_tokens, tuned_tokens, old_padding, new_padding, tuned_padding, seed, scale
):
    """Any three vocabularies in any order, compared with arithmetic on single rows."""
    generator = torch.Generator().manual_seed(seed)
    names = {"old": old_tokens, "new": new_tokens, "tuned": tuned_tokens}
    padding = {"old": old_padding, "new": new_padding, "tuned": tuned_padding}
    sizes = {role: len(names[role]) + padding[role] for role in names}
    tensors = {role: torch.randn(size, 3, generator=generator) for role, size in sizes.items()}
    ids = {role: enumerate_tokens(names[role]) for role in names}
    match = match_rows(ids["old"], ids["new"], sizes["old"], sizes["new"], ids["tuned"], sizes["tuned"])
    grafted = graft_rows(tensors["new"], tensors["tuned"], tensors["old"], match, partial(graft, scale=scale))
    tuned_only = [token for token in tuned_tokens if token not in old_tokens and token not in new_tokens]
    assert list(match.tuned_only) == tuned_only
    assert len(grafted) == max(sizes["new"], len(new_tokens) + len(tuned_only))

    def row(role, token):
        return tensors[role][ids[role][token]].double()

    for i, token in enumerate([*new_tokens, *tuned_only]):
        if token in tuned_only:
            expected = row("tuned", token)
        elif token in old_tokens and token in tuned_tokens:
            expected = row("new", token) + scale * (row("tuned", token) - row("old", token))
        else:
            expected = row("new", token)
        torch.testing.assert_close(grafted[i].double(), expected, rtol=1e-6, atol=1e-6)

    # Rows of padding that tokens of the fine-tune have not taken are matched by their index, or else in order.
    first_row = len(new_tokens) + len(tuned_only)
    free = {role: list(range(len(names[role]), sizes[role])) for role in names}
    padding_rows = [row for row in free["new"] if row >= first_row]
    matched = {row: [row if row in free[role] else None for role in ("old", "tuned")] for row in padding_rows}
    for i, role in enumerate(("old", "tuned")):
        others = [row for row in free[role] if row not in padding_rows]
        for row in padding_rows:
            if matched[row][i] is None and others:
                matched[row][i] = others.pop(0)
    for row, (old_row, tuned_row) in matched.items():
        expected = tensors["new"][row].double()
        if old_row is not None and tuned_row is not None:
            expected = expected + scale * (tensors["tuned"][tuned_row].double() - tensors["old"][old_row].double())
        torch.testing.assert_close(grafted[row].double(), expected, rtol=1e-6, atol=1e-6)
    assert set(match.removed_tokens) == set(old_tokens) - set(new_tokens)
    assert set(match.added_tokens) == set(new_tokens) - set(old_tokens)
    assert match.num_padding_rows == max(0, new_padding - len(tuned_only))


@settings(deadline=None)
@given(tokens, paddings, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_rows_of_equal_vocabularies_are_grafted_like_other_tensors(tokens, padding, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = len(tokens) + padding
    new, tuned, old = (torch.randn(rows, 3, generator=generator).to(dtype) for _ in range(3))
    match = match_rows(enumerate_tokens(tokens), enumerate_tokens(tokens), rows, rows)
    assert match.is_identity
    assert torch.equal(graft_rows(new, tuned, old, match), graft(new, tuned, old))
    assert torch.equal(graft_rows(old, tuned, old, match), tuned)


def test_the_summary_of_a_match_counts_removed_tokens():
    match = match_rows(enumerate_tokens(["a", "b", "c"]), enumerate_tokens(["c", "d"]), 4, 4)
    assert match.old_row_indices == (2, -1, -1, 3)
    assert match.summary() == (
        "4 rows: 1 tokens in both, 1 only in the new vocabulary, 2 only in the old ('a', 'b'), 2 rows of padding"
    )


def test_a_tokenizer_with_more_tokens_than_rows_is_refused():
    with pytest.raises(
        MismatchError, match="the new vocabulary has token 'b' with id 1, but its embeddings have 1 rows"
    ):
        match_rows(enumerate_tokens(["a"]), enumerate_tokens(["a", "b"]), 1, 1)
    match = match_rows(enumerate_tokens(["a"]), enumerate_tokens(["a", "b"]), 1, 2)
    with pytest.raises(MismatchError, match="the old tensor has 2 rows, but its vocabulary has 1"):
        graft_rows(torch.ones(2, 1), torch.ones(1, 1), torch.ones(2, 1), match)


def write_model_with_tokens(source, folder, tokens, seed, **special_tokens):
    """Copy a model with added tokens and noise on all parameters; its rows are padded to a multiple of 8."""
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    for name, token in special_tokens.items():
        setattr(tokenizer, name, token)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False, pad_to_multiple_of=8)
    model.config.eos_token_id = tokenizer.eos_token_id
    add_noise(model, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def assert_rows_are_grafted(ids, tensors):
    """Check each token's row: new + tuned − old, or if the old base lacks it, the new base's, else the fine-tune's."""
    for token, row in ids["out"].items():
        if token in ids["old"]:
            old, new, tuned = (tensors[role][ids[role][token]] for role in ROLES)
            expected = new + tuned - old
        else:
            role = "new" if token in ids["new"] else "tuned"
            expected = tensors[role][ids[role][token]]
        torch.testing.assert_close(tensors["out"][row], expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def folders_with_added_tokens(tmp_path_factory, bases):
    """An old base, a new base and a fine-tune with a chat template, which add overlapping tokens."""
    folder = tmp_path_factory.mktemp("added-tokens")
    old = bases["llama"][0]
    new = write_model_with_tokens(old, folder / "new", ["<new1>", "<new2>"], 1)
    chat_tokens = ["<|im_start|>", "<|im_end|>", "<new2>"]
    tuned = write_model_with_tokens(old, folder / "tuned", chat_tokens, 2, eos_token="<|im_end|>")
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tuned)
    return {"old": old, "new": new, "tuned": tuned}


def test_added_tokens_of_a_base_and_of_its_fine_tune_are_merged(tmp_path, folders_with_added_tokens):
    """Weights, tokenizer, configuration and chat template of the result agree."""
    folders = folders_with_added_tokens | {"out": tmp_path / "out"}
    graft_folders(**folders)
    ids = {role: read_vocabulary(folder) for role, folder in folders.items()}
    states = {role: AutoModelForCausalLM.from_pretrained(folder).state_dict() for role, folder in folders.items()}
    assert ids["out"].keys() == ids["new"].keys() | ids["tuned"].keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert_rows_are_grafted(ids, {role: state[name] for role, state in states.items()})
    grafted = AutoTokenizer.from_pretrained(folders["out"])
    config = json.loads((folders["out"] / "config.json").read_text())
    # The tokens of the fine-tune fit into the rows of padding.
    assert config["vocab_size"] == len(states["out"]["lm_head.weight"]) == 48
    assert config["eos_token_id"] == grafted.eos_token_id == ids["out"]["<|im_end|>"]
    assert grafted.chat_template == AutoTokenizer.from_pretrained(folders["tuned"]).chat_template
    assert grafted.added_tokens_decoder[ids["out"]["<|im_start|>"]].special
    text = "<|im_start|> good film <new1> <|im_end|>"
    assert [grafted.convert_ids_to_tokens(i) for i in grafted(text).input_ids] == text.split()


@pytest.mark.parametrize("command", [("delta",), ("extract-lora", "--rank", 4)], ids=lambda command: command[0])
def test_deltas_of_fine_tunes_with_added_tokens_are_refused(tmp_path, folders_with_added_tokens, command):
    tuned, old = folders_with_added_tokens["tuned"], folders_with_added_tokens["old"]
    with pytest.raises(MismatchError, match=r"tuned: it has 3 tokens \('<new2>', '<\|im_end\|>'"):
        run_command("weights", *command, "--tuned", tuned, "--old", old, "--out", tmp_path / "out")


@pytest.fixture(scope="module")
def extended(tmp_path_factory, bases):
    """A base and an upgrade of it with two tokens more, and the rows of two old tokens exchanged."""
    folder = tmp_path_factory.mktemp("extended")
    new = write_model_with_tokens(bases["llama"][0], folder / "new", ["<new1>", "<new2>"], 1)
    file = new / "tokenizer.json"
    good, bad = (json.loads(file.read_text())["model"]["vocab"][token] for token in ("good", "bad"))
    content = file.read_text().replace(f'"good": {good}', '"good": -1').replace(f'"bad": {bad}', f'"bad": {good}')
    file.write_text(content.replace('"good": -1', f'"good": {bad}'))
    tensors = read_weights(new)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][[good, bad]] = tensors[name][[bad, good]]
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return bases["llama"][0], new


def read_embeddings(folder):
    """The token embeddings of a base, a fine-tune or an adapter by token."""
    ids = read_vocabulary(folder)
    tensors = read_weights(folder)
    rows = next(tensor for name, tensor in tensors.items() if "embed_tokens" in name and name.endswith("weight"))
    return {token: rows[i] for token, i in ids.items()}


@pytest.mark.parametrize("method", ["direct", "ridge", "aligned", "init+distill"])
def test_a_fine_tune_is_recycled_for_another_vocabulary(tmp_path, extended, tuned_outcomes, task_file, method):
    source = tuned_outcomes["llama", "full"] / "adaptation"
    outcome = recycle(Upgrade(*extended), source, task_file, method, tmp_path / "out", recipe=TWO_STEPS)
    assert outcome.scores["dev"] >= 0.5
    old, new, before = (read_embeddings(folder) for folder in (*extended, source))
    if method != "init+distill":
        after = read_embeddings(outcome.path / "adaptation")
        assert after.keys() == new.keys()
        for token in new:
            expected = new[token] + before[token] - old[token] if token in old else new[token]
            torch.testing.assert_close(after[token], expected, rtol=1e-5, atol=1e-6)
    classifier = pipeline("text-classification", str(outcome.path / "adaptation"), device="cpu")
    assert classifier("the film was good")[0]["label"] in LABELS


def test_check_and_diagnose_compare_bases_with_different_vocabularies(extended, tuned_outcomes, task_file):
    upgrade = Upgrade(*extended)
    source = tuned_outcomes["llama", "lora"]
    result = check(upgrade, source, task_file, recipe=FLOAT32)
    old_ids, new_ids = (read_vocabulary(folder) for folder in extended)
    old, new = (read_weights(folder) for folder in extended)
    name = "model.embed_tokens.weight"
    # The new base has all tokens of the old one.
    old[name] = old[name][[old_ids[token] for token in old_ids]]
    new[name] = new[name][[new_ids[token] for token in old_ids]]
    squared_norm = sum(float((new[n] - old[n]).double().square().sum()) for n in old if n != "lm_head.weight")
    assert result.l2 == pytest.approx(math.sqrt(squared_norm), rel=1e-6)
    diagnosis = diagnose(upgrade, source, task_file, recipe=FLOAT32)
    for question in ("connectivity", "similarity", "kept"):
        assert "the two models have different vocabularies" in diagnosis.left_out[question]


def make_adapter_with_tokens(base, tokens):
    """Add tokens to a base, and a LoRA with copies of the embeddings and the head."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(tokens)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"])
    with quiet():
        return tokenizer, get_peft_model(model, config)


def save_adapter(model, tokenizer, folder):
    with quiet():
        model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_with_added_tokens_is_recycled(tmp_path, extended, task_file):
    """In the format of TRL and Axolotl: all embeddings are stored, with rows for the added tokens."""
    old, _ = extended
    text = "<added> good film <new2>"
    tokenizer, model = make_adapter_with_tokens(old, ["<added>", "<new2>"])
    source = save_adapter(add_noise(model, seed=1), tokenizer, tmp_path / "adapter")
    expected_logits = model.eval()(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits

    unchanged = recycle(Upgrade(old, old), source, task_file, "direct", tmp_path / "unchanged", recipe=ONE_STEP)
    tokenizer = AutoTokenizer.from_pretrained(unchanged.path / "adaptation")
    base = AutoModelForSequenceClassification.from_pretrained(old, num_labels=2)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base.config.pad_token_id = 0
    with quiet():
        model = PeftModel.from_pretrained(base, unchanged.path / "adaptation").eval()
    logits = model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-6)

    outcome = recycle(Upgrade(*extended), source, task_file, "direct", tmp_path / "out", recipe=ONE_STEP)
    before, after = read_embeddings(source), read_embeddings(outcome.path / "adaptation")
    old_rows, new_rows = (read_embeddings(folder) for folder in extended)
    for token, row in after.items():
        if token in old_rows:
            expected = new_rows[token] + before[token] - old_rows[token]
        else:
            expected = before[token] if token == "<added>" else new_rows[token]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


SPECIAL_IDS = {"vocab_size": 43, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE_SIZES = {"image_size": 28, "patch_size": 14}
IMAGE_TOKENS = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
ENCODER_SIZES = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
DECODER_SIZES = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
BART_SIZES = {"d_model": 32, "max_position_embeddings": 66, **ENCODER_SIZES, **DECODER_SIZES}
BART = BartConfig(**SPECIAL_IDS, **BART_SIZES, forced_eos_token_id=2)
LLAMA = LlamaConfig(**SPECIAL_IDS, **SIZES)
GEMMA = Gemma3Config(
    text_config={**SPECIAL_IDS, **SIZES, "num_key_value_heads": 1, "head_dim": 16},
    vision_config={**SIZES, **IMAGE_SIZES},
    **IMAGE_TOKENS,
)


@pytest.mark.parametrize(
    ("model_type", "config", "names"),
    [
        (BartForConditionalGeneration, BART, ["model.shared.weight", "final_logits_bias"]),
        (Gemma3ForConditionalGeneration, GEMMA, ["model.language_model.embed_tokens.weight"]),
        (LlamaForCausalLM, LLAMA, ["model.embed_tokens.weight", "lm_head.weight"]),
    ],
    ids=["bart", "gemma", "llama"],
)
def test_token_rows_are_found_without_a_class_in_the_config(tmp_path, model_type, config, names):
    """Also in BART's bias of logits, [1, tokens], and in Gemma's text model beside one of images."""
    torch.manual_seed(0)
    for role, added_tokens in (("old", []), ("new", ["<new>"]), ("tuned", ["<added>"])):
        tokenizer = make_tokenizer("bert")
        model = model_type(copy.deepcopy(config))
        tokenizer.add_tokens(added_tokens)
        if role == "new":  # exchange the rows of two tokens
            vocabulary = tokenizer.get_vocab()
            exchanged = vocabulary | {"good": vocabulary["bad"], "bad": vocabulary["good"]}
            tokenizer.backend_tokenizer.model = models.WordLevel(exchanged, unk_token="<unk>")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if "final_logits_bias" in names:
            model.final_logits_bias.normal_()
        model.save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
        update_json(tmp_path / role / "config.json", architectures=None)

    folders = {role: tmp_path / role for role in (*ROLES, "out")}
    graft_folders(**folders)
    ids = {role: read_vocabulary(folder) for role, folder in folders.items()}
    assert ids["out"] == ids["new"] | {"<added>": 44}
    states = {role: model_type.from_pretrained(folder).state_dict() for role, folder in folders.items()}
    for name in names:
        tensors = {role: state[name] for role, state in states.items()}
        assert_rows_are_grafted(ids, {role: t.T if len(t) == 1 else t for role, t in tensors.items()})


def test_models_without_a_vocabulary_are_grafted(tmp_path):
    config = ViTConfig(**SIZES, **IMAGE_SIZES)
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(tmp_path / role)
    folders = {role: tmp_path / role for role in (*ROLES, "out")}
    graft_folders(**folders)
    name = "vit.embeddings.patch_embeddings.projection.weight"
    old, new, tuned, out = (read_weights(folder)[name] for folder in folders.values())
    torch.testing.assert_close(out, new + tuned - old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eos_token", ["</s>", "<end>"])
def test_token_ids_in_the_config_are_those_of_the_new_vocabulary(tmp_path, bases, eos_token):
    """This holds even if the fine-tune has no tokenizer, and if the new base lacks the token."""
    old, tuned = bases["llama"]
    new = shutil.copytree(old, tmp_path / "new")
    without_tokenizer = shutil.copytree(tuned, tmp_path / "without-tokenizer")
    for file in without_tokenizer.glob("tokenizer*"):
        file.unlink()
    content = json.loads((new / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"</s>": 5, "good": 2}
    next(token for token in content["added_tokens"] if token["content"] == "</s>")["id"] = 5
    (new / "tokenizer.json").write_text(json.dumps(content))
    for file in new.glob("tokenizer*"):
        file.write_text(file.read_text().replace("</s>", eos_token))
    update_json(new / "config.json", eos_token_id=5)
    graft_folders(old, new, without_tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 5
    message = r"tokens in different rows, such as '(</s>|good)'"
    with pytest.raises(MismatchError, match=message):
        run_command("weights", "distance", old, new)
    with pytest.raises(MismatchError, match=message):
        run_command(
            "weights", "interpolate", "--first", old, "--second", new, "--t", 0.5, "--out", tmp_path / "between"
        )


def test_models_with_different_settings_are_not_interpolated(bases, tmp_path):
    first = bases["llama"][0]
    second = shutil.copytree(first, tmp_path / "second")
    command = ("weights", "interpolate", "--first", first, "--second", second, "--t", 0.5, "--out", tmp_path / "out")
    config = (second / "config.json").read_text()
    update_json(second / "config.json", rms_norm_eps=0.1)
    with pytest.raises(MismatchError, match=r"rms_norm_eps is 0\.1, not"):
        run_command(*command)
    (second / "config.json").write_text(config)
    update_json(second / "config.json", use_cache=False)  # has no effect on outputs
    run_command(*command)


def test_learned_tokens_are_not_added_to_another_tokenizer(tmp_path):
    """As an added token, `Ġab` would match these characters in texts, not a space and `ab`."""
    vocabularies = {}
    for role, merges in (("old", []), ("new", []), ("tuned", [("a", "b"), ("Ġ", "ab")])):
        vocabularies[role] = vocabulary = enumerate_tokens(["<unk>", "Ġ", "a", "b", *map("".join, merges)])
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / role)
    match = match_rows(vocabularies["old"], vocabularies["new"], 4, 4, vocabularies["tuned"], 6)
    with pytest.raises(MismatchError, match=r"'Ġab'.* learned by its tokenizer"):
        merged_tokenizer(tmp_path / "new", tmp_path / "tuned", match)


def test_a_fine_tune_may_lack_the_padding_rows_of_its_base(tmp_path, bases):
    """`resize_token_embeddings(len(tokenizer))` removes them."""
    old = write_model_with_tokens(bases["llama"][0], tmp_path / "old", [], 1)
    tuned = tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(old)
    model.resize_token_embeddings(43, mean_resizing=False)
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(old).save_pretrained(tuned)
    graft_folders(old, old, tuned, tmp_path / "out")
    before, after = read_weights(old), read_weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(MismatchError, match=r"have 43 rows, but the embeddings of .* have 48 for the same tokens"):
        run_command("weights", "delta", "--tuned", tuned, "--old", old, "--out", tmp_path / "delta")


@pytest.mark.parametrize("method", ["interpolation", "project"])
def test_methods_that_need_equal_rows_refuse_different_vocabularies(
    tmp_path, extended, tuned_outcomes, task_file, method
):
    upgrade = Upgrade(*extended)
    source = tuned_outcomes["llama", "full"]
    out = tmp_path / "out"
    options = Projection(pairs=(f"{source}={source}",)) if method == "project" else None
    with pytest.raises(KindError, match="have different vocabularies"):
        recycle(upgrade, source, task_file, method, out, recipe=ONE_STEP, options=options)


def test_auto_skips_methods_that_need_equal_tokenisation(tmp_path, extended, tuned_outcomes, task_file):
    new = shutil.copytree(extended[1], tmp_path / "new")
    content = json.loads((new / "tokenizer.json").read_text())
    renamed = {token: f"{token}~" for token in ("the", "a", "of", "and")}
    content["model"]["vocab"] = {renamed.get(t, t): i for t, i in content["model"]["vocab"].items()}
    (new / "tokenizer.json").write_text(json.dumps(content))
    upgrade = Upgrade(extended[0], new)
    source = tuned_outcomes["llama", "lora"]
    options = Auto(target=1.0, training_free=("direct", "ridge"), budgets=(0.5,))
    with pytest.raises(KindError, match="divide only"):
        recycle(upgrade, source, task_file, "ridge", tmp_path / "ridge", recipe=TWO_STEPS)
    outcome = recycle(upgrade, source, task_file, "auto", tmp_path / "out", recipe=TWO_STEPS, options=options)
    assert "ridge" not in [stage["rung"] for stage in outcome.record.notes["tried"]]


def test_an_added_padding_token_needs_no_row(tmp_path, bases, tuned_outcomes, task_file):
    """Such a token is left by tuning with a batch size of 1, which never pads."""
    upgrade = Upgrade(*bases["llama"])
    source = tuned_outcomes["llama", "full"]
    padded = shutil.copytree(source / "adaptation", tmp_path / "padded")
    tokenizer = AutoTokenizer.from_pretrained(padded)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(padded)
    outcome = recycle(upgrade, padded, task_file, "direct", tmp_path / "out", recipe=ONE_STEP)
    expected = recycle(upgrade, source, task_file, "direct", tmp_path / "expected", recipe=ONE_STEP)
    assert outcome.scores == expected.scores


def test_an_adapter_with_added_tokens_is_converted_to_a_full_fine_tune(tmp_path, extended):
    old, _ = extended
    tokenizer, model = make_adapter_with_tokens(old, ["<added>"])
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    source = save_adapter(model, tokenizer, tmp_path / "adapter")
    full = convert(source, old, tmp_path / "full", kind="full")
    before, after = read_embeddings(source), read_embeddings(full.path)
    assert after.keys() == before.keys() == tokenizer.get_vocab().keys()
    assert all(torch.equal(before[token], after[token]) for token in before)
    with pytest.raises(MismatchError, match="has other tokens than"):
        convert(full.path, old, tmp_path / "lora", kind="lora", rank=2)


def test_token_rows_of_an_unknown_model_type_are_found_by_name(tmp_path, extended):
    """If no name is known, rows must not be guessed: position embeddings may have as many."""
    old, new = extended
    for role, source in (("old", old), ("new", new), ("tuned", old)):
        shutil.copytree(source, tmp_path / role)
        (tmp_path / role / "config.json").write_text(json.dumps({"model_type": "unknown-model"}))
    folders = {role: tmp_path / role for role in ROLES}
    graft_folders(**folders, out=tmp_path / "out")
    expected, grafted = read_weights(new), read_weights(tmp_path / "out")
    assert all(torch.allclose(expected[name], grafted[name], atol=1e-6) for name in expected)

    for folder in folders.values():
        tensors = read_weights(folder)
        renamed = {name.replace("embed_tokens", "table").replace("lm_head", "out"): t for name, t in tensors.items()}
        save_file(renamed, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of its tensors is known to have a row for each token"):
        graft_folders(**folders, out=tmp_path / "unknown")
