"""Rows matched by token, whatever their order, number and padding."""

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

from regraft import Recipe, Upgrade, check, convert, diagnose, recycle
from regraft.errors import CheckpointError, KindError, MismatchError
from regraft.methods.auto import Auto
from regraft.methods.project import Projection
from regraft.progress import quiet
from regraft.vocabulary import merged_tokenizer
from regraft.weights import graft, graft_rows, match_rows

tokens = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=20, unique=True)
paddings = st.integers(0, 6)


def numbered(names):
    return {name: i for i, name in enumerate(names)}


@settings(deadline=None)
@given(tokens, tokens, tokens, paddings, paddings, paddings, st.integers(0, 2**31), st.floats(-1, 2))
def test_each_token_gets_its_own_delta(
    old_names, new_names, tuned_names, old_padding, new_padding, tuned_padding, seed, scale
):
    """Any three vocabularies, in any order: by token, against arithmetic row by row."""
    generator = torch.Generator().manual_seed(seed)
    names = {"old": old_names, "new": new_names, "tuned": tuned_names}
    padding = {"old": old_padding, "new": new_padding, "tuned": tuned_padding}
    sides = {side: torch.randn(len(names[side]) + padding[side], 3, generator=generator) for side in names}
    ids = {side: numbered(names[side]) for side in names}
    match = match_rows(ids["old"], ids["new"], len(sides["old"]), len(sides["new"]), ids["tuned"], len(sides["tuned"]))
    found = graft_rows(sides["new"], sides["tuned"], sides["old"], match, partial(graft, scale=scale))
    own = [name for name in tuned_names if name not in old_names and name not in new_names]
    assert list(match.tuned_only) == own
    assert len(found) == max(len(sides["new"]), len(new_names) + len(own))

    def row(side, name):
        return sides[side][ids[side][name]].double()

    for i, name in enumerate([*new_names, *own]):
        if name in own:
            expected = row("tuned", name)
        elif name in old_names and name in tuned_names:
            expected = row("new", name) + scale * (row("tuned", name) - row("old", name))
        else:
            expected = row("new", name)
        torch.testing.assert_close(found[i].double(), expected, rtol=1e-6, atol=1e-6)
    for i in range(new_padding - len(own)):  # of what stands for no token, the first matches the first
        at = len(new_names) + len(own) + i
        expected = sides["new"][at].double()
        if i < old_padding and i < tuned_padding:
            change = sides["tuned"][len(tuned_names) + i].double() - sides["old"][len(old_names) + i].double()
            expected = expected + scale * change
        torch.testing.assert_close(found[at].double(), expected, rtol=1e-6, atol=1e-6)
    assert set(match.removed_tokens) == set(old_names) - set(new_names)
    assert set(match.added_tokens) == set(new_names) - set(old_names)
    assert match.num_padding_rows == max(0, new_padding - len(own))


@settings(deadline=None)
@given(tokens, paddings, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_the_same_vocabulary_is_a_plain_graft(names, padding, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = len(names) + padding
    new, tuned, old = (torch.randn(rows, 3, generator=generator).to(dtype) for _ in range(3))
    match = match_rows(numbered(names), numbered(names), rows, rows)
    assert match.is_identity
    assert torch.equal(graft_rows(new, tuned, old, match), graft(new, tuned, old))
    assert torch.equal(graft_rows(old, tuned, old, match), tuned)


def test_what_is_lost_is_said():
    match = match_rows(numbered(["a", "b", "c"]), numbered(["c", "d"]), 4, 4)
    assert match.old_row_indices == (2, -1, 3, -1)
    assert match.summary() == (
        "4 rows: 1 tokens in both, 1 only in the new vocabulary, 2 only in the old ('a', 'b'), 2 rows of padding"
    )


def test_a_tokenizer_that_is_larger_than_the_weights_is_refused():
    with pytest.raises(
        MismatchError, match="the new vocabulary has token 'b' with id 1, and its embeddings have 1 rows"
    ):
        match_rows(numbered(["a"]), numbered(["a", "b"]), 1, 1)
    match = match_rows(numbered(["a"]), numbered(["a", "b"]), 1, 2)
    with pytest.raises(MismatchError, match="the old tensor has 2 rows, its vocabulary 1"):
        graft_rows(torch.ones(2, 1), torch.ones(1, 1), torch.ones(2, 1), match)


def with_tokens(source, folder, tokens, seed, **special):
    """A model with tokens added, its every number moved, as transformers saves it; rows padded to a multiple of 8."""
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    for name, token in special.items():
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


def test_a_fine_tune_with_tokens_of_its_own_on_a_base_with_new_ones(tmp_path, bases):
    """By token: grafted, new, and the fine-tune's own; tokenizer, config and chat template say the same."""
    old = bases["llama"][0]
    new = with_tokens(old, tmp_path / "new", ["<new1>", "<new2>"], 1)
    tuned = with_tokens(old, tmp_path / "tuned", ["<|im_start|>", "<|im_end|>", "<new2>"], 2, eos_token="<|im_end|>")
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tuned)
    out = tmp_path / "out"
    run("weights", "graft", "--new", new, "--tuned", tuned, "--old", old, "--out", out)
    sides = {"old": old, "new": new, "tuned": tuned, "out": out}
    ids = {side: AutoTokenizer.from_pretrained(folder).get_vocab() for side, folder in sides.items()}
    states = {side: AutoModelForCausalLM.from_pretrained(folder).state_dict() for side, folder in sides.items()}
    assert ids["out"].keys() == ids["new"].keys() | ids["tuned"].keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = {side: lambda token, side=side, name=name: states[side][name][ids[side][token]] for side in sides}
        for token in ids["out"]:
            if token in ids["old"]:
                expected = rows["new"](token) + rows["tuned"](token) - rows["old"](token)
            else:
                expected = rows["new"](token) if token in ids["new"] else rows["tuned"](token)
            torch.testing.assert_close(rows["out"](token), expected, rtol=1e-5, atol=1e-6)
    grafted = AutoTokenizer.from_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(states["out"]["lm_head.weight"]) == 48  # in the rows that were free
    assert config["eos_token_id"] == grafted.eos_token_id == ids["out"]["<|im_end|>"]
    assert grafted.chat_template == tokenizer.chat_template
    assert grafted.added_tokens_decoder[ids["out"]["<|im_start|>"]].special
    text = "<|im_start|> good film <new1> <|im_end|>"
    assert [grafted.convert_ids_to_tokens(i) for i in grafted(text).input_ids] == text.split()
    for command, more in (("delta", ()), ("extract-lora", ("--rank", 4))):
        with pytest.raises(MismatchError, match=r"tuned: has 3 tokens more \('<new2>', '<\|im_end\|>'"):
            run("weights", command, *more, "--tuned", tuned, "--old", old, "--out", tmp_path / command)


def run(*arguments):
    from typer.testing import CliRunner

    from regraft.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def grown(tmp_path_factory, bases):
    """A base whose upgrade has two tokens more, and two of the old ones in each other's rows."""
    folder = tmp_path_factory.mktemp("grown")
    new = with_tokens(bases["llama"][0], folder / "new", ["<new1>", "<new2>"], 1)
    file = new / "tokenizer.json"
    first, second = (json.loads(file.read_text())["model"]["vocab"][word] for word in ("good", "bad"))
    text = file.read_text().replace(f'"good": {first}', '"good": -1').replace(f'"bad": {second}', f'"bad": {first}')
    file.write_text(text.replace('"good": -1', f'"good": {second}'))
    tensors = load_file(new / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][[first, second]] = tensors[name][[second, first]]
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return bases["llama"][0], new


def embeddings(folder):
    """The token embeddings of a folder by token, whatever it is."""
    ids = AutoTokenizer.from_pretrained(folder).get_vocab()
    file = folder / ("adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors")
    rows = next(t for n, t in load_file(file).items() if "embed_tokens" in n and n.endswith("weight"))
    return {token: rows[i] for token, i in ids.items()}


@pytest.mark.parametrize("method", ["direct", "ridge", "aligned", "init+distill"])
def test_a_fine_tune_is_carried_to_a_base_with_another_vocabulary(tmp_path, grown, tuned, task_file, method):
    source = tuned["llama", "full"] / "adaptation"
    recipe = Recipe(steps=2, precision="fp32")
    outcome = recycle(Upgrade(*grown), source, task_file, method, tmp_path / "out", recipe=recipe)
    assert outcome.scores["dev"] >= 0.5
    old, new, before = (embeddings(folder) for folder in (*grown, source))
    if method != "init+distill":
        after = embeddings(outcome.path / "adaptation")
        assert after.keys() == new.keys()
        for token in new:
            expected = new[token] + before[token] - old[token] if token in old else new[token]
            torch.testing.assert_close(after[token], expected, rtol=1e-5, atol=1e-6)
    texts = pipeline("text-classification", str(outcome.path / "adaptation"), device="cpu")
    assert texts("the film was good")[0]["label"] in LABELS


def test_check_holds_bases_with_other_vocabularies_against_each_other(grown, tuned, task_file):
    checked = check(Upgrade(*grown), tuned["llama", "lora"], task_file, recipe=Recipe(precision="fp32"))
    ids = [AutoTokenizer.from_pretrained(folder).get_vocab() for folder in grown]
    old, new = (load_file(folder / "model.safetensors") for folder in grown)
    rows = [[of_one[token] for token in ids[0]] for of_one in ids]  # the new base has all tokens of the old one
    old["model.embed_tokens.weight"] = old["model.embed_tokens.weight"][rows[0]]
    new["model.embed_tokens.weight"] = new["model.embed_tokens.weight"][rows[1]]
    squares = sum(float((new[name] - old[name]).double().square().sum()) for name in old if name != "lm_head.weight")
    assert checked.l2 == pytest.approx(math.sqrt(squares), rel=1e-6)
    deep = diagnose(Upgrade(*grown), tuned["llama", "lora"], task_file, recipe=Recipe(precision="fp32"))
    for question in ("connectivity", "similarity", "kept"):
        assert "the two models have different vocabularies" in deep.left_out[question]


def test_an_adapter_with_tokens_of_its_own(tmp_path, grown, task_file):
    """As TRL and Axolotl leave one: embeddings whole with rows for added tokens, and rows tuned one by one."""
    old, _ = grown
    tokenizer = AutoTokenizer.from_pretrained(old)
    tokenizer.add_tokens(["<own>", "<new2>"])
    model = AutoModelForSequenceClassification.from_pretrained(old, num_labels=2)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"])
    with quiet():
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(
                        0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    )
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    inputs = tokenizer("<own> good film <new2>", return_tensors="pt")
    logits = adapted.eval()(input_ids=inputs["input_ids"]).logits
    recipe = Recipe(steps=1, precision="fp32")
    same = recycle(Upgrade(old, old), tmp_path / "adapter", task_file, "direct", tmp_path / "same", recipe=recipe)
    again = AutoTokenizer.from_pretrained(same.path / "adaptation")
    base = AutoModelForSequenceClassification.from_pretrained(old, num_labels=2)
    base.resize_token_embeddings(len(again), mean_resizing=False)
    base.config.pad_token_id = 0
    with quiet():
        loaded = PeftModel.from_pretrained(base, same.path / "adaptation").eval()
    found = loaded(input_ids=again("<own> good film <new2>", return_tensors="pt")["input_ids"]).logits
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-6)
    outcome = recycle(Upgrade(*grown), tmp_path / "adapter", task_file, "direct", tmp_path / "out", recipe=recipe)
    before, after = embeddings(tmp_path / "adapter"), embeddings(outcome.path / "adaptation")
    first, second = (embeddings(folder) for folder in grown)
    for token, row in after.items():
        expected = before[token] if token == "<own>" else second[token]
        if token in first:
            expected = second[token] + before[token] - first[token]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


SMALL = {"vocab_size": 43, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = BartConfig(
    **SMALL, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=66, forced_eos_token_id=2,
)  # fmt: skip
LLAMA = LlamaConfig(**SMALL, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
GEMMA = Gemma3Config(
    text_config={
        **SMALL, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "intermediate_size": 64,
    },
    vision_config={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    },
    mm_tokens_per_image=4, image_token_index=5, boi_token_index=6, eoi_token_index=7,
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "config", "names"),
    [
        (BartForConditionalGeneration, BART, ["model.shared.weight", "final_logits_bias"]),
        (Gemma3ForConditionalGeneration, GEMMA, ["model.language_model.embed_tokens.weight"]),
        (LlamaForCausalLM, LLAMA, ["model.embed_tokens.weight", "lm_head.weight"]),
    ],
)
def test_models_that_keep_their_tokens_elsewhere(tmp_path, model, config, names):
    """A row of biases, the config of a text model inside one for images, and configs that name no class."""
    torch.manual_seed(0)
    sides = {"old": [], "new": ["<new>"], "tuned": ["<own>"]}
    for side, added in sides.items():
        tokenizer, one = make_tokenizer("bert"), model(copy.deepcopy(config))
        tokenizer.add_tokens(added)
        if side == "new":  # two tokens in each other's rows
            vocabulary = tokenizer.get_vocab()
            spelled = json.dumps(vocabulary | {"good": vocabulary["bad"], "bad": vocabulary["good"]})
            tokenizer.backend_tokenizer.model = models.WordLevel(json.loads(spelled), unk_token="<unk>")
        one.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        if "final_logits_bias" in names:
            one.final_logits_bias.normal_()
        one.save_pretrained(tmp_path / side)
        tokenizer.save_pretrained(tmp_path / side)
        settings = json.loads((tmp_path / side / "config.json").read_text())
        (tmp_path / side / "config.json").write_text(json.dumps(settings | {"architectures": None}))
    options = [part for side in sides for part in (f"--{side}", tmp_path / side)]
    run("weights", "graft", *options, "--out", tmp_path / "out")
    ids = {side: AutoTokenizer.from_pretrained(tmp_path / side).get_vocab() for side in (*sides, "out")}
    assert ids["out"] == ids["new"] | {"<own>": 44}
    states = {side: model.from_pretrained(tmp_path / side).state_dict() for side in (*sides, "out")}
    for name in names:
        rows = {side: (state[name].T if len(state[name]) == 1 else state[name]) for side, state in states.items()}
        for token, row in ids["out"].items():
            if token in ids["old"]:
                expected = sum(
                    sign * rows[side][ids[side][token]] for side, sign in zip(sides, (-1, 1, 1), strict=True)
                )
            else:
                expected = rows["new" if token == "<new>" else "tuned"][
                    ids["new" if token == "<new>" else "tuned"][token]
                ]
            torch.testing.assert_close(rows["out"][row], expected, rtol=1e-5, atol=1e-6)


def test_models_that_read_no_tokens(tmp_path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14
    )
    for seed, side in enumerate(("old", "new", "tuned")):
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(tmp_path / side)
    options = [part for side in ("old", "new", "tuned") for part in (f"--{side}", tmp_path / side)]
    run("weights", "graft", *options, "--out", tmp_path / "out")
    old, new, tuned, out = (load_file(tmp_path / s / "model.safetensors") for s in ("old", "new", "tuned", "out"))
    name = "vit.embeddings.patch_embeddings.projection.weight"
    torch.testing.assert_close(out[name], new[name] + tuned[name] - old[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eos", ["</s>", "<end>"])
def test_settings_name_tokens_by_their_new_ids(tmp_path, bases, eos):
    """Though the fine-tune has no tokenizer; where the new base has no such token, what it says itself."""
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
    (new / "config.json").write_text(json.dumps(json.loads((new / "config.json").read_text()) | {"eos_token_id": 5}))
    run("weights", "graft", "--new", new, "--tuned", bare, "--old", old, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 5
    for command in (("interpolate", "--t", 0.5, "--out", tmp_path / "between"), ("distance",)):
        sides = (old, new) if command == ("distance",) else ("--first", old, "--second", new)
        with pytest.raises(
            MismatchError, match=r"tokens in different rows, as '</s>'|tokens in different rows, as 'good'"
        ):
            run("weights", *command, *sides)


def test_no_line_leads_from_a_model_to_one_that_computes_otherwise(bases, tmp_path):
    first = bases["llama"][0]
    second = shutil.copytree(first, tmp_path / "second")
    line = ("weights", "interpolate", "--first", first, "--second", second, "--t", 0.5, "--out", tmp_path / "out")
    settings = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    with pytest.raises(MismatchError, match=r"rms_norm_eps is 0\.1, not"):
        run(*line)
    (second / "config.json").write_text(json.dumps(settings | {"use_cache": False}))
    run(*line)


def test_tokens_that_a_tokenizer_learned_are_not_added_to_another(tmp_path):
    """`Ġab` as an added token would stand for these very characters in texts."""
    sides = {}
    for side, learned in (("old", []), ("new", []), ("tuned", [("a", "b"), ("Ġ", "ab")])):
        ids = numbered(["<unk>", "Ġ", "a", "b", *("".join(pair) for pair in learned)])
        tokenizer = Tokenizer(models.BPE(ids, learned, unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / side)
        sides[side] = ids
    rows = match_rows(sides["old"], sides["new"], 4, 4, sides["tuned"], 6)
    with pytest.raises(MismatchError, match=r"'Ġab'.* are part of what its tokenizer learned"):
        merged_tokenizer(tmp_path / "new", tmp_path / "tuned", rows)


def test_a_fine_tune_that_lost_the_padding_of_its_base(tmp_path, bases):
    """As `resize_token_embeddings(len(tokenizer))` leaves it."""
    old = with_tokens(bases["llama"][0], tmp_path / "old", [], 1)
    tuned = tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(old)
    model.resize_token_embeddings(43, mean_resizing=False)
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(old).save_pretrained(tuned)
    run("weights", "graft", "--new", old, "--tuned", tuned, "--old", old, "--out", tmp_path / "out")
    before, after = load_file(old / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(MismatchError, match=r"have 43 rows and those of .* 48 for the same tokens"):
        run("weights", "delta", "--tuned", tuned, "--old", old, "--out", tmp_path / "delta")


@pytest.mark.parametrize("method", ["interpolation", "project"])
def test_methods_that_hold_weights_number_by_number_refuse_other_vocabularies(
    tmp_path, grown, tuned, task_file, method
):
    source = tuned["llama", "full"]
    options = Projection(pairs=(f"{source}={source}",)) if method == "project" else None
    with pytest.raises(KindError, match="have other vocabularies"):
        recycle(
            Upgrade(*grown), source, task_file, method, tmp_path / "out",
            recipe=Recipe(steps=1, precision="fp32"), options=options,
        )  # fmt: skip


def test_auto_leaves_out_what_needs_texts_divided_alike(tmp_path, grown, tuned, task_file):
    new = shutil.copytree(grown[1], tmp_path / "new")
    settings = json.loads((new / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    settings["model"]["vocab"] = {f"{t}~" if t in ("the", "a", "of", "and") else t: i for t, i in vocabulary.items()}
    (new / "tokenizer.json").write_text(json.dumps(settings))
    upgrade, recipe = Upgrade(grown[0], new), Recipe(steps=2, precision="fp32")
    source, options = tuned["llama", "lora"], Auto(target=1.0, training_free=("direct", "ridge"), budgets=(0.5,))
    with pytest.raises(KindError, match="divide only"):
        recycle(upgrade, source, task_file, "ridge", tmp_path / "ridge", recipe=recipe)
    outcome = recycle(upgrade, source, task_file, "auto", tmp_path / "out", recipe=recipe, options=options)
    assert "ridge" not in [rung["rung"] for rung in outcome.record.notes["tried"]]


def test_a_padding_token_that_was_added_without_a_row(tmp_path, bases, tuned, task_file):
    """As tuning in batches of one never notices."""
    source = shutil.copytree(tuned["llama", "full"] / "adaptation", tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(source)
    recipe = Recipe(steps=1, precision="fp32")
    outcome = recycle(Upgrade(*bases["llama"]), source, task_file, "direct", tmp_path / "out", recipe=recipe)
    plain = recycle(
        Upgrade(*bases["llama"]), tuned["llama", "full"], task_file, "direct", tmp_path / "plain", recipe=recipe
    )
    assert outcome.scores == plain.scores


def test_an_adapter_with_tokens_of_its_own_becomes_a_full_fine_tune(tmp_path, grown, task_file):
    old, _ = grown
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
    before, after = embeddings(tmp_path / "adapter"), embeddings(full.path)
    assert after.keys() == before.keys() == tokenizer.get_vocab().keys()
    assert all(torch.equal(before[token], after[token]) for token in before)
    with pytest.raises(MismatchError, match="has other tokens than"):
        convert(full.path, old, tmp_path / "lora", to="lora", rank=2)


def test_rows_of_a_class_that_nobody_knows(tmp_path, grown):
    """By the usual names; where these tell nothing, positions are not taken for tokens."""
    sides = dict(zip(("old", "new", "tuned"), (*grown, grown[0]), strict=True))
    for side, source in sides.items():
        shutil.copytree(source, tmp_path / side)
        (tmp_path / side / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    options = [part for side in sides for part in (f"--{side}", tmp_path / side)]
    run("weights", "graft", *options, "--out", tmp_path / "out")
    expected, grafted = (load_file(folder / "model.safetensors") for folder in (grown[1], tmp_path / "out"))
    assert all(torch.allclose(expected[name], grafted[name], atol=1e-6) for name in expected)
    for side in sides:
        tensors = load_file(tmp_path / side / "model.safetensors")
        renamed = {name.replace("embed_tokens", "table").replace("lm_head", "out"): t for name, t in tensors.items()}
        save_file(renamed, tmp_path / side / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor of it is known to have a row for each token"):
        run("weights", "graft", *options, "--out", tmp_path / "other")
