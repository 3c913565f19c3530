"""Padding changes no output: a text's logits in a batch equal those that its transformers class gives for it alone."""

import random

import numpy as np
import pytest
import torch
from helpers import (
    HEAD,
    LABELS,
    NAMED_LABELS,
    WORDS,
    add_noise,
    load_tuned_model,
    make_sentence,
    make_tokenizer,
    read_csv,
    read_test_predictions,
    write_base,
    write_table,
    write_upgrade,
)
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from regraft import Base, Recipe, Upgrade, convert, recycle, tune
from regraft.adaptation import fresh_model, load_strictly, new_config, prepare_for_tuning, save_model
from regraft.model.batches import predict
from regraft.model.blockwise import BlockwiseForward
from regraft.model.outputs import forward, last_token_indices, model_inputs
from regraft.progress import quiet
from regraft.task.types import Examples

VOCABULARY = 5 + len(WORDS)
EOS, UNK = 2, 3
# the names that architectures have for the sizes, of which each config takes those that it knows
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head"), 16),
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner"), 64),
}
DECODERS = ("llama", "gpt2", "gpt_neox", "mistral", "qwen2", "opt", "bloom", "falcon", "gemma", "phi", "xlnet")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert", "mpnet", "xlm-roberta")
PADDING_SENSITIVE = ("convbert", "mobilebert")  # convolutions over neighbouring tokens read the padding


def make_texts():
    """Make token IDs of texts, some of which end in, or consist of, tokens that may serve as padding."""
    random.seed(0)
    endings = ([], [EOS], [UNK], [EOS, EOS], [0], [UNK, EOS])
    texts = [random.choices(range(5, VOCABULARY), k=random.randint(2, 14)) + ending for ending in endings * 2]
    return [*texts, [EOS, EOS, EOS], [UNK]]


def make_examples(texts, padding=EOS):
    return Examples({"input_ids": texts}, np.zeros(len(texts), dtype=np.int64), {"input_ids": padding})


def compute_unpadded_logits(model, texts):
    """Run a model on one text at a time."""
    model.eval()
    inputs = [torch.tensor([ids]) for ids in texts]
    with torch.no_grad():
        return torch.cat([model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in inputs])


def make_classifier(architecture, padding):
    default = AutoConfig.for_model(architecture)
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name)}
    if architecture == "falcon":
        del sizes["head_dim"]  # Falcon computes it
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, num_labels=3, pad_token_id=padding, **sizes)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    return add_noise(model)


@pytest.mark.parametrize("architecture", DECODERS + ENCODERS + PADDING_SENSITIVE)
def test_logits_of_a_batch_equal_those_of_its_texts_alone(architecture):
    texts = make_texts()
    model = make_classifier(architecture, EOS)
    # encoders like RoBERTa build their position embeddings for the padding token of the config
    paddings = (EOS, UNK, None) if architecture in DECODERS else (EOS,)
    for padding in paddings:
        model.config.pad_token_id = padding
        torch.testing.assert_close(
            predict(model, make_examples(texts), "fp32"), compute_unpadded_logits(model, texts), rtol=0, atol=1e-5
        )
        assert model.config.pad_token_id == padding


@pytest.mark.parametrize("padding", [EOS, UNK, None])
def test_gradients_of_a_batch_equal_those_of_its_texts_alone(padding):
    texts = make_texts()
    model = make_classifier("llama", padding).eval()
    batch = make_examples(texts).batch(range(len(texts)))
    labels = torch.arange(len(texts)) % 3
    torch.nn.functional.cross_entropy(forward(model, model_inputs(batch)).logits, labels).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for ids, label in zip(texts, labels, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits
        (torch.nn.functional.cross_entropy(logits, label[None]) / len(texts)).backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_hidden_states_are_read_where_the_head_reads():
    texts = [[7, 8, 9], [7, EOS], [7, 8, EOS, 9, EOS, EOS], [EOS, EOS], [7]]
    model = make_classifier("llama", EOS).eval()
    batch = model_inputs(make_examples(texts, UNK).batch(range(5)))
    indices = [2, 0, 3, 0, 0]
    output = forward(model, batch, hidden=True)
    assert output.token.tolist() == last_token_indices(model, batch).tolist() == indices
    states = output.hidden[-1][range(5), indices]
    torch.testing.assert_close(model.score(states), output.logits, rtol=0, atol=1e-6)
    model.config.pad_token_id = None
    assert last_token_indices(model, batch).tolist() == [2, 1, 5, 1, 0]
    assert last_token_indices(make_classifier("bert", 0), batch) is None


def test_a_blockwise_forward_observes_the_head_at_the_tokens_that_it_reads():
    texts = make_texts()
    model = make_classifier("llama", None)
    blockwise = BlockwiseForward(model, make_examples(texts), "fp32")
    logits = []

    def observe(name, batch, inputs, outputs):
        logits.append(outputs.float())

    for _ in range(blockwise.num_parts):
        blockwise.run([model.score], observe, advance=True)
    longest_first = sorted(texts, key=lambda ids: -len(ids))
    torch.testing.assert_close(torch.cat(logits), compute_unpadded_logits(model, longest_first), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["xlm", "xlnet"])
def test_a_blockwise_forward_observes_no_padding(architecture):
    """XLNet's layers read tokens × texts × width, and XLM has no blocks that feed each other."""
    sizes = {"d_inner": 24} if architecture == "xlnet" else {"pad_index": 0}
    config = AutoConfig.for_model(architecture, vocab_size=50, d_model=16, emb_dim=16, n_layer=2, n_head=2, **sizes)
    config.n_layers = config.n_heads = 2  # XLM's names
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    texts = [ids for ids in make_texts() if 0 not in ids]
    blockwise = BlockwiseForward(model, make_examples(texts), "fp32")
    moments = {}
    expected = {}
    layers = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]

    def add_moments(sums, name, rows):
        sums[name] = sums.get(name, 0) + rows.T @ rows

    def observe(name, batch, inputs, outputs):
        add_moments(moments, name, inputs)

    def observe_call(layer, args, output):
        add_moments(expected, blockwise.names[layer], args[0].flatten(0, -2).double())

    for _ in range(blockwise.num_parts):
        blockwise.run(layers, observe, advance=True)
    for layer in layers:
        layer.register_forward_hook(observe_call)
    compute_unpadded_logits(model, texts)
    assert moments.keys() == expected.keys()
    for name, moment in moments.items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A decoder without a padding token and its upgrade, and an encoder whose texts may contain its padding token."""
    folder = tmp_path_factory.mktemp("bases")
    old = write_base(folder / "llama", "llama", pad_token_id=None)
    tokenizer = make_tokenizer("llama")
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    tokenizer.save_pretrained(old)
    return {
        "llama": (old, write_upgrade(old, folder / "llama-new", 0.02)),
        "roberta": (write_base(folder / "roberta", "roberta"),),
    }


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task with texts that end in the end-of-text token or in an unknown word."""
    folder = tmp_path_factory.mktemp("task")
    rng = random.Random(5)
    endings = ("", " </s>", " huh")
    for name, count in (("train", 48), ("dev", 24), ("test", 36)):
        rows = [{"text": make_sentence(rng, i % 2 == 0) + endings[i % 3], "label": LABELS[i % 2]} for i in range(count)]
        write_table(folder / f"{name}.csv", rows)
    (folder / "task.yaml").write_text("train: train.csv\ndev: dev.csv\ntest: test.csv\ntext: text\nlabel: label\n")
    return folder / "task.yaml"


def read_predicted_classes(outcome):
    return [prediction for _, prediction in read_test_predictions(outcome)]


def read_test_texts(task):
    return [row["text"] for row in read_csv(task.parent / "test.csv")]


@pytest.mark.parametrize("architecture", ["llama", "roberta"])
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_logits_of_an_adapter_equal_those_of_peft_for_each_text_alone(bases, tmp_path, architecture, kind):
    from peft import PeftModel

    base = Base.open(bases[architecture][0])
    model = prepare_for_tuning(
        fresh_model(base, HEAD, 1), base, HEAD, new_config(kind, base, HEAD, virtual_tokens=4), 1
    )
    add_noise(model, 0.3, seed=2)
    save_model(model, base, HEAD, tmp_path)
    texts = [ids for ids in make_texts() if architecture == "llama" or 0 not in ids]
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=2)
        expected = compute_unpadded_logits(PeftModel.from_pretrained(plain, tmp_path), texts)
    for adapted in (model, load_tuned_model(tmp_path, base)):
        torch.testing.assert_close(predict(adapted, make_examples(texts), "fp32"), expected, rtol=0, atol=1e-5)


def test_a_chunked_feed_forward_runs_on_any_length(tmp_path):
    config = AutoConfig.for_model("bert", vocab_size=VOCABULARY, **SIZES, chunk_size_feed_forward=5, **NAMED_LABELS)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model, _ = load_strictly(AutoModelForSequenceClassification, tmp_path, "bert")
    assert predict(model, make_examples(make_texts()), "fp32").shape == (14, 2)
    assert model.config.chunk_size_feed_forward == 5


@pytest.mark.parametrize("padding", [EOS, UNK, None])
def test_an_outcome_has_the_predictions_of_transformers_alone(bases, task, tmp_path, padding):
    old, new = bases["llama"]
    torch.manual_seed(0)
    with quiet():
        tuned = AutoModelForSequenceClassification.from_pretrained(old, **NAMED_LABELS)
        add_noise(tuned, 0.3)
        tuned.config.pad_token_id = padding
        tuned.save_pretrained(tmp_path / "tuned")
    make_tokenizer("llama").save_pretrained(tmp_path / "tuned")
    recipe = Recipe(steps=2, batch_size=8, eval_every=1, precision="fp32")
    for method in ("direct", "init"):
        out = recycle(Upgrade(old, new), tmp_path / "tuned", task, method, tmp_path / method, recipe=recipe).path
        tokenizer = AutoTokenizer.from_pretrained(out / "adaptation")
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(out / "adaptation")
        assert model.config.pad_token_id == padding
        texts = read_test_texts(task)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        assert read_predicted_classes(out) == compute_unpadded_logits(model, ids).argmax(dim=1).tolist()
        if padding is not None:  # also in batches, which the tokenizer is configured to pad on the left
            assert tokenizer.pad_token_id == padding
            batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
            with torch.no_grad():
                logits = model(**batch).logits
            assert read_predicted_classes(out) == logits.argmax(dim=1).tolist()


def test_tuned_and_converted_models_read_the_same_tokens(bases, task, tmp_path):
    old = bases["llama"][0]
    recipe = Recipe(steps=3, batch_size=8, eval_every=1, learning_rate=3e-3, precision="fp32")
    full = tune(old, task, tmp_path / "full", recipe=recipe, kind="full").path
    lora = tune(old, task, tmp_path / "lora", recipe=recipe, kind="lora").path
    merged = convert(lora / "adaptation", old, tmp_path / "merged", "full").path
    tokenizer = AutoTokenizer.from_pretrained(old)
    ids = [tokenizer(text)["input_ids"] for text in read_test_texts(task)]
    for outcome, folder in ((full, full / "adaptation"), (lora, merged)):
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert read_predicted_classes(outcome) == compute_unpadded_logits(model, ids).argmax(dim=1).tolist()
    # without a padding token, transformers predicts no batches
    assert AutoConfig.from_pretrained(full / "adaptation").pad_token_id == EOS


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoders_are_refused_before_anything_is_written(task, tmp_path, run_main, architecture):
    from transformers import AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, d_model=16, num_layers=1, encoder_layers=1)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    with quiet():
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(base)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tuned)
    make_tokenizer("bert").save_pretrained(base)
    (tmp_path / "corpus.txt").write_text("the film was good\n" * 50)
    (tmp_path / "chain.yaml").write_text(
        f"bases: [{base}, {base}/]\ntasks: [{task}]\nkinds: [lora]\nmethods: [direct]\n"
    )
    before = sorted(tmp_path.rglob("*"))
    pair = ["--old-base", base, "--new-base", base, "--adaptation", tuned, "--task", task]
    out = ["--out", tmp_path / "out"]
    for command in (
        ["tune", base, "--task", task, *out],
        ["pretrain", base, tmp_path / "corpus.txt", *out],
        ["check", *pair],
        ["recycle", *pair, *out],
        ["compare", *pair, *out],
        ["chain", "run", tmp_path / "chain.yaml", *out],
        ["adaptation", "show", tuned, "--base", base],
        ["adaptation", "convert", tuned, "--old-base", base, "--to", "lora", "--rank", 2, *out],
    ):
        code, _, error = run_main(*command)
        assert code == 2
        assert f"a {architecture} is an encoder-decoder" in error
    assert sorted(tmp_path.rglob("*")) == before
