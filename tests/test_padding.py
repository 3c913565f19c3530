"""What a deployment gives for a text is what its transformers class gives for that text alone, however it is padded."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from conftest import HEAD, LABELS, WORDS, make_tokenizer, move_base, sentence, write_base
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from regraft import Base, Recipe, Upgrade, cli, convert, load_adaptation, recycle, tune
from regraft.adaptation import attach, fresh_model, load_model, load_strictly, new_config, save_model
from regraft.model.batches import predict
from regraft.model.blockwise import BlockwiseForward
from regraft.model.outputs import forward, last_token_indices
from regraft.progress import quiet
from regraft.task.types import Examples

VOCABULARY = 5 + len(WORDS)
EOS, UNK = 2, 3
NAMED_LABELS = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
# in the words of all architectures' configs, each of which takes those it has
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 64, "ffn_dim": 64, "d_inner": 64, "word_embed_proj_dim": 32, "embedding_size": 32,
    "d_head": 16,
}  # fmt: skip
DECODERS = ("llama", "gpt2", "gpt_neox", "mistral", "qwen2", "opt", "bloom", "falcon", "gemma", "phi", "xlnet")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", "modernbert", "mpnet", "xlm-roberta")
MIXING = ("convbert", "mobilebert")  # whose convolutions and neighbouring tokens would see the padding


def token_ids():
    """Texts of several lengths that end in words, in what may be padding, or are nothing else."""
    random.seed(0)
    endings = ([], [EOS], [UNK], [EOS, EOS], [0], [UNK, EOS])
    texts = [random.choices(range(5, VOCABULARY), k=random.randint(2, 14)) + ending for ending in endings * 2]
    return [*texts, [EOS, EOS, EOS], [UNK]]


def examples_of(texts, padding=EOS):
    return Examples({"input_ids": texts}, np.zeros(len(texts), dtype=np.int64), {"input_ids": padding})


def alone(model, texts):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in rows(texts)])


def rows(texts):
    return [torch.tensor([ids]) for ids in texts]


def classifier(architecture, padding):
    default = AutoConfig.for_model(architecture)
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name)}
    if architecture == "falcon":
        del sizes["head_dim"]  # is computed
    config = AutoConfig.for_model(architecture, vocab_size=VOCABULARY, num_labels=3, pad_token_id=padding, **sizes)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("architecture", DECODERS + ENCODERS + MIXING)
def test_a_batch_gives_each_text_what_it_gives_alone(architecture):
    texts, model = token_ids(), classifier(architecture, EOS)
    # position embeddings of RoBERTa and its kind are built for the padding that the config names
    for padding in (EOS, UNK, None) if architecture in DECODERS else (EOS,):
        model.config.pad_token_id = padding
        torch.testing.assert_close(predict(model, examples_of(texts), "fp32"), alone(model, texts), rtol=0, atol=1e-5)
        assert model.config.pad_token_id == padding


@pytest.mark.parametrize("padding", [EOS, UNK, None])
def test_the_loss_of_a_batch_is_that_of_its_texts_alone(padding):
    texts, model = token_ids(), classifier("llama", padding).eval()
    batch = examples_of(texts).batch(range(len(texts)))
    labels = torch.arange(len(texts)) % 3
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.nn.functional.cross_entropy(forward(model, inputs).logits, labels).backward()
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for ids, label in zip(rows(texts), labels, strict=True):
        (torch.nn.functional.cross_entropy(model(input_ids=ids).logits, label[None]) / len(texts)).backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_hidden_states_are_read_where_the_head_reads():
    texts, model = [[7, 8, 9], [7, EOS], [7, 8, EOS, 9, EOS, EOS], [EOS, EOS], [7]], classifier("llama", EOS).eval()
    batch = {k: v for k, v in examples_of(texts, UNK).batch(range(5)).items() if k in ("input_ids", "attention_mask")}
    places = [2, 0, 3, 0, 0]
    output = forward(model, batch, hidden=True)
    assert output.token.tolist() == last_token_indices(model, batch).tolist() == places
    read = output.hidden[-1][range(5), places]
    torch.testing.assert_close(model.score(read), output.logits, rtol=0, atol=1e-6)
    model.config.pad_token_id = None
    assert last_token_indices(model, batch).tolist() == [2, 1, 5, 1, 0]
    assert last_token_indices(classifier("bert", 0), batch) is None


def test_a_walk_feeds_the_head_the_tokens_that_it_reads():
    texts, model = token_ids(), classifier("llama", None)
    walk, fed = BlockwiseForward(model, examples_of(texts), "fp32"), []
    for _ in range(walk.parts):
        walk.run([model.score], lambda name, number, inputs, outputs: fed.append(outputs.float()), advance=True)
    longest_first = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    torch.testing.assert_close(torch.cat(fed), alone(model, [texts[i] for i in longest_first]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["xlm", "xlnet"])
def test_a_walk_sees_the_tokens_that_each_text_has_alone(architecture):
    """Though layers see tokens × texts × width (XLNet), or blocks are no list of modules that feed each other (XLM)."""
    sizes = {"d_inner": 24} if architecture == "xlnet" else {"pad_index": 0}
    config = AutoConfig.for_model(architecture, vocab_size=50, d_model=16, emb_dim=16, n_layer=2, n_head=2, **sizes)
    config.n_layers = config.n_heads = 2
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    texts = [ids for ids in token_ids() if 0 not in ids]
    walk, seen, expected = BlockwiseForward(model, examples_of(texts), "fp32"), {}, {}
    linear = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]

    def add(sums, name, rows):
        sums[name] = sums.get(name, 0) + rows.T @ rows

    for _ in range(walk.parts):
        walk.run(linear, lambda name, _, fed, __: add(seen, name, fed), advance=True)
    for module in linear:
        module.register_forward_hook(
            lambda module, args, _: add(expected, walk.names[module], args[0].flatten(0, -2).double())
        )
    alone(model, texts)
    assert seen.keys() == expected.keys()
    for name, moments in seen.items():
        torch.testing.assert_close(moments, expected[name], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A decoder and its upgrade without a padding token, and an encoder whose texts may hold its padding."""
    folder = tmp_path_factory.mktemp("bases")
    old = write_base(folder / "llama", "llama", pad_token_id=None)
    tokenizer = make_tokenizer("llama")
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    tokenizer.save_pretrained(old)
    return {
        "llama": (old, move_base(old, folder / "llama-new", 0.02)),
        "roberta": (write_base(folder / "r", "roberta"),),
    }


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Texts of which some end in the end-of-text or in an unknown token."""
    folder, chance = tmp_path_factory.mktemp("task"), random.Random(5)
    for name, count in (("train", 48), ("dev", 24), ("test", 36)):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            lines = [(sentence(chance, i % 2 == 0) + ("", " </s>", " huh")[i % 3], LABELS[i % 2]) for i in range(count)]
            csv.writer(stream).writerows([("text", "label"), *lines])
    (folder / "task.yaml").write_text("train: train.csv\ndev: dev.csv\ntest: test.csv\ntext: text\nlabel: label\n")
    return folder / "task.yaml"


def texts_of(task):
    with (task.parent / "test.csv").open(newline="") as stream:
        return [row["text"] for row in csv.DictReader(stream)]


def published(outcome):
    lines = map(json.loads, (outcome / "predictions.jsonl").read_text().splitlines())
    return [line["prediction"] for line in lines if line["split"] == "test"]


@pytest.mark.parametrize("architecture", ["llama", "roberta"])
@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_an_adapter_gives_each_text_what_peft_gives_alone(bases, tmp_path, architecture, kind):
    from peft import PeftModel

    base = Base.open(bases[architecture][0])
    model = attach(fresh_model(base, HEAD, 1), base, HEAD, new_config(kind, base, HEAD, virtual_tokens=4), 1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    save_model(model, base, HEAD, tmp_path)
    texts = [ids for ids in token_ids() if architecture == "llama" or 0 not in ids]
    with quiet():
        plain = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=2)
        expected = alone(PeftModel.from_pretrained(plain, tmp_path), texts)
    for ours in (model, load_model(load_adaptation(tmp_path), base, HEAD)):
        torch.testing.assert_close(predict(ours, examples_of(texts), "fp32"), expected, rtol=0, atol=1e-5)


def test_pieces_that_divide_no_batch_are_not_asked_for(tmp_path):
    config = AutoConfig.for_model("bert", vocab_size=VOCABULARY, **SIZES, chunk_size_feed_forward=5, **NAMED_LABELS)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model, _ = load_strictly(AutoModelForSequenceClassification, tmp_path, "bert")
    assert predict(model, examples_of(token_ids()), "fp32").shape == (14, 2)
    assert model.config.chunk_size_feed_forward == 5


@pytest.mark.parametrize("padding", [EOS, UNK, None])
def test_an_outcome_predicts_what_plain_transformers_predicts(bases, task, tmp_path, padding):
    old, new = bases["llama"]
    torch.manual_seed(0)
    with quiet():
        tuned = AutoModelForSequenceClassification.from_pretrained(old, **NAMED_LABELS)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        tuned.config.pad_token_id = padding
        tuned.save_pretrained(tmp_path / "tuned")
    make_tokenizer("llama").save_pretrained(tmp_path / "tuned")
    few = Recipe(steps=2, batch_size=8, eval_every=1, precision="fp32")
    for method in ("direct", "init"):
        out = recycle(Upgrade(old, new), tmp_path / "tuned", task, method, tmp_path / method, recipe=few).path
        tokenizer = AutoTokenizer.from_pretrained(out / "adaptation")
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(out / "adaptation")
        assert model.config.pad_token_id == padding
        texts = texts_of(task)
        assert published(out) == alone(model, [tokenizer(text)["input_ids"] for text in texts]).argmax(dim=1).tolist()
        if padding is not None:  # in batches too, padded on the left as the tokenizer has it
            assert tokenizer.pad_token_id == padding
            with torch.no_grad():
                batch = model(**tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)).logits
            assert published(out) == batch.argmax(dim=1).tolist()


def test_what_is_tuned_and_converted_reads_the_same_tokens(bases, task, tmp_path):
    old = bases["llama"][0]
    few = Recipe(steps=3, batch_size=8, eval_every=1, learning_rate=3e-3, precision="fp32")
    full = tune(old, task, tmp_path / "full", recipe=few, kind="full").path
    lora = tune(old, task, tmp_path / "lora", recipe=few, kind="lora").path
    merged = convert(lora / "adaptation", old, tmp_path / "merged", "full").path
    tokenizer = AutoTokenizer.from_pretrained(old)
    ids = [tokenizer(text)["input_ids"] for text in texts_of(task)]
    for outcome, folder in ((full, full / "adaptation"), (lora, merged)):
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert published(outcome) == alone(model, ids).argmax(dim=1).tolist()
    assert AutoConfig.from_pretrained(full / "adaptation").pad_token_id == EOS  # for its users to predict in batches


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoders_are_refused_before_anything_is_written(task, tmp_path, monkeypatch, capsys, architecture):
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
        monkeypatch.setattr("sys.argv", ["regraft", *map(str, command)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert f"a {architecture} is an encoder-decoder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
