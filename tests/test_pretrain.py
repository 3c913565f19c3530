"""Continual pre-training: packed blocks, masks, the loss, and the upgraded base as transformers loads it."""

import csv
import dataclasses
import gc
import json
import os
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, make_config, make_sentence, make_tokenizer
from safetensors.torch import load_file
from torch.nn import functional

from regraft import Base, Corpus, Recipe, Upgrade, pretrain
from regraft.errors import DataError, OutcomeError, RecipeError
from regraft.model.corpus import pack
from regraft.progress import silent
from regraft.tuning import Replay, pretrain_chain
from regraft.tuning.language import LanguageModelling, auto_model_class
from regraft.tuning.pretrain import _with_replay

ENCODERS = ("bert", "roberta", "distilbert")
RECIPE = Recipe(steps=40, batch_size=16, learning_rate=3e-3, eval_every=20, precision="fp32")
LONG = "the film was good and " * 40


def make_sentences(count=1200, seed=5):
    rng = random.Random(seed)
    return [make_sentence(rng, i % 2 == 0) for i in range(count)]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("\n".join([*make_sentences(), "", LONG]) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory, bases, text_file):
    folder = tmp_path_factory.mktemp("upgraded")
    return {
        name: pretrain(Base.open(bases[name][0]), Corpus((str(text_file),)), folder / name, RECIPE, block_size=32)
        for name in ARCHITECTURES
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pretraining_lowers_the_loss_and_writes_a_transformers_folder(upgraded, bases, architecture):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    path = upgraded[architecture].path
    record = json.loads((path / "pretraining.json").read_text())
    assert [point["step"] for point in record["curve"]] == [0, 20, 40]
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"] - 0.2
    assert record["tokens"] == 40 * 16 * 32
    auto = AutoModelForCausalLM if architecture == "llama" else AutoModelForMaskedLM
    _, report = auto.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (
        AutoTokenizer.from_pretrained(path)("good film").input_ids
        == make_tokenizer(architecture)("good film").input_ids
    )
    old = load_file(bases[architecture][0] / "model.safetensors")
    new = load_file(path / "model.safetensors")
    assert {n: t.shape for n, t in new.items()} == {n: t.shape for n, t in old.items()}
    assert sum(not torch.equal(old[name], new[name]) for name in old) > len(old) / 2
    assert record["base"]["fingerprint"] == Base.open(bases[architecture][0]).fingerprint
    assert Upgrade(bases[architecture][0], path).new.fingerprint == upgraded[architecture].fingerprint
    assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")] == []


def make_training(base, blocks, recipe=RECIPE):
    numbers = np.arange(len(blocks))
    return LanguageModelling(base, np.asarray(blocks, dtype=np.uint32), numbers, numbers, recipe)


def random_blocks(base, count, block_size=32, seed=3):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(5, len(base.tokenizer), size=(count, block_size))
    blocks[:, 0], blocks[:, 9], blocks[:, 10] = 1, 2, 1
    return blocks


@pytest.mark.parametrize("architecture", ENCODERS)
def test_logits_at_masked_positions_give_the_full_loss_and_gradients(bases, architecture):
    base = Base.open(bases[architecture][0])
    model = auto_model_class(base).from_pretrained(base.path).eval()
    training = make_training(base, random_blocks(base, 8))
    batch = training.batch([(i, i) for i in range(8)], seed=1)
    loss = training.loss(model, dict(batch))
    masked = batch["labels"] != -100
    logits = model(input_ids=batch["input_ids"]).logits
    assert logits.shape == (8, 32, len(base.tokenizer))  # the loss has removed its hook
    torch.testing.assert_close(loss, functional.cross_entropy(logits[masked], batch["labels"][masked]))
    full_loss = functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    gradients, expected = (
        torch.autograd.grad(value, list(model.parameters()), allow_unused=True) for value in (loss, full_loss)
    )
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


def test_causal_loss_is_the_cross_entropy_of_the_next_token(bases):
    base = Base.open(bases["llama"][0])
    model = auto_model_class(base).from_pretrained(base.path).eval()
    training = make_training(base, random_blocks(base, 4))
    batch = training.batch([(i, i) for i in range(4)], seed=1)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(training.loss(model, batch), expected)


def test_masks_follow_bert(bases):
    base = Base.open(bases["bert"][0])
    blocks = random_blocks(base, 2000)
    training = make_training(base, blocks)
    items = [(i, i) for i in range(2000)]
    batch = training.batch(items, seed=1)
    ids = batch["input_ids"]
    labels = batch["labels"]
    original = torch.from_numpy(blocks)
    predicted = labels != -100
    special = original < 5
    assert not (predicted & special).any()
    assert torch.equal(labels[predicted], original[predicted])
    assert torch.equal(ids[~predicted], original[~predicted])
    assert predicted.any(dim=1).all()
    assert predicted.sum() / (~special).sum() == pytest.approx(0.15, abs=0.01)
    masked = ids[predicted] == base.tokenizer.mask_token_id
    unchanged = ids[predicted] == original[predicted]
    coincidence = 1 / len(base.tokenizer)  # a random token may be the mask or the token itself
    assert masked.float().mean() == pytest.approx(0.8 + 0.1 * coincidence, abs=0.015)
    assert unchanged.float().mean() == pytest.approx(0.1 + 0.1 * coincidence, abs=0.015)
    repeated = training.batch(items[:5], seed=1)["input_ids"]
    assert torch.equal(repeated, ids[:5])
    assert not torch.equal(training.batch([(i, i + 5000) for i in range(5)], seed=1)["input_ids"], repeated)
    assert not torch.equal(training.batch(items[:5], seed=2)["input_ids"], repeated)


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """Write a bare body as some repositories of the Hub have it: no prefix, no head, a pooler."""
    from transformers import BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("headless") / "base"
    BertModel(make_config("bert")).save_pretrained(folder)
    make_tokenizer("bert").save_pretrained(folder)
    assert "pooler.dense.weight" in load_file(folder / "model.safetensors")
    return folder


def test_fresh_head_is_trained_before_the_body(tmp_path, headless, text_file, monkeypatch):
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    from regraft.tuning import trainer

    stages = {}
    train = trainer.train

    def train_and_count_changed_tensors(model, *arguments, stage, **options):
        before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
        curve = train(model, *arguments, stage=stage, **options)
        after = model.base_model.state_dict()
        stages[stage] = (sum(not torch.equal(before[name], after[name]) for name in before), curve)
        return curve

    monkeypatch.setattr(trainer, "train", train_and_count_changed_tensors)
    base = Base.open(headless)
    new = pretrain(base, Corpus((str(text_file),)), tmp_path / "new", RECIPE, block_size=32)
    assert list(stages) == ["pretrain head", "pretrain"]
    assert stages["pretrain head"][0] == 0
    assert stages["pretrain"][0] > 10
    assert stages["pretrain head"][1][-1]["step"] == 4
    assert stages["pretrain head"][1][-1]["loss"] < stages["pretrain head"][1][0]["loss"]
    assert new.body.keys() == base.body.keys()
    old_pooler, new_pooler = (
        {n: b.checkpoint[b.body[n]] for n in b.body if n.startswith("pooler")} for b in (base, new)
    )
    assert len(old_pooler) == 2
    assert all(torch.equal(old_pooler[name], new_pooler[name]) for name in old_pooler)
    _, report = AutoModelForMaskedLM.from_pretrained(new.path, output_loading_info=True)
    assert not report["missing_keys"]
    model, report = AutoModelForSequenceClassification.from_pretrained(new.path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(model.bert.pooler.dense.weight, old_pooler["pooler.dense.weight"])
    Upgrade(headless, new.path)


def test_fresh_head_depends_on_the_seed_only(tmp_path, headless, text_file):
    recipe = Recipe(steps=2, batch_size=4, precision="fp32")
    corpus = Corpus((str(text_file),))
    for name, draws_before in (("first", 0), ("second", 3)):
        torch.rand(draws_before)
        pretrain(Base.open(headless), corpus, tmp_path / name, recipe, block_size=32)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blocks_equal_the_tokenizers_output(tmp_path, bases):
    texts = [*make_sentences(600), LONG]
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(texts), encoding="utf-8")
    for name in ARCHITECTURES:
        base = Base.open(bases[name][0])
        blocks = pack(Corpus((str(file),)), base, 16, tmp_path / f"{name}.bin", silent)
        plain = make_tokenizer(name)
        expected = [
            token for text in texts for token in [*plain(text, verbose=False).input_ids, *[2] * (name == "llama")]
        ]
        assert len(blocks) == len(expected) // 16
        assert blocks.reshape(-1).tolist() == expected[: len(blocks) * 16]


UNUSUAL_TEXTS = ["good film", "NA", "null", "1.5", 'a "quoted" word, and more', "größe é 漢字", " padded "]


def write_corpus(folder, texts):
    """Write the same documents in every supported format."""
    import pandas as pd

    (folder / "text.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with (folder / "text.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    frame = pd.DataFrame({"id": range(len(texts)), "text": texts})
    frame.to_parquet(folder / "text.parquet")
    (folder / "data").mkdir()
    frame.to_parquet(folder / "data" / "train.parquet")
    return [folder / name for name in ("text.txt", "text.jsonl", "text.csv", "text.parquet", "data")]


def test_formats_have_the_same_documents_and_blocks(tmp_path, bases):
    texts = [*UNUSUAL_TEXTS, *make_sentences(100)]
    base = Base.open(bases["bert"][0])
    sources = write_corpus(tmp_path, texts)
    packed = []
    for source in sources:
        assert list(Corpus((str(source),)).documents()) == texts, source.name
        packed.append(pack(Corpus((str(source),)), base, 32, tmp_path / f"{source.name}.bin", silent))
    for blocks in packed[1:]:
        assert np.array_equal(blocks, packed[0])
    documents = list(Corpus((str(sources[1]), str(sources[0]))).documents())
    assert documents == [*texts, *texts]


def test_text_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one", "text": "no"}\n', encoding="utf-8")
    assert list(Corpus((str(tmp_path / "a.jsonl"),), column="body").documents()) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": 5}\n', r"a\.jsonl, row 2: no text in column 'text'"),
        ("a.jsonl", b'{"text": "one"}\n{"words": "two"}\n', r"row 2: no text in column 'text' \(found: words\)"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": \n', r"row 3: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', r"row 2: no text .*\(found: list\)"),
        ("a.jsonl", b'{"text": "\xff\xfe"}\n', r"a\.jsonl"),
        ("a.txt", b"one\n\xff\xfe\n", r"a\.txt, line 2: is not UTF-8"),
        ("a.csv", b"words\none\n", r"a\.csv, row 1: no text in column 'text' \(found: words\)"),
        ("a.csv", b"", r"a\.csv"),
        ("a.parquet", b"no parquet", r"a\.parquet"),
    ],
)
def test_invalid_rows_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # pandas does not close a file that it cannot read
        with pytest.raises(DataError, match=message):
            list(Corpus((str(tmp_path / name),)).documents())
        gc.collect()


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.csv", "none.parquet"])
def test_missing_file_is_named(tmp_path, bases, name):
    with pytest.raises(DataError, match=rf"{name}: no such file"):
        pretrain(Base.open(bases["bert"][0]), Corpus((str(tmp_path / name),)), tmp_path / "out", RECIPE, block_size=32)


def test_short_text_and_long_block_are_refused(tmp_path, bases):
    base = Base.open(bases["roberta"][0])
    file = tmp_path / "a.txt"
    file.write_text("good film\n", encoding="utf-8")
    with pytest.raises(DataError, match="4 tokens of text make 0 blocks of 32, and at least 2 are needed"):
        pretrain(base, Corpus((str(file),)), tmp_path / "out", RECIPE, block_size=32)
    with pytest.raises(RecipeError, match="--block 65 is more than the 64 tokens"):
        pretrain(base, Corpus((str(file),)), tmp_path / "out", RECIPE, block_size=65)
    assert not (tmp_path / "out").exists()


def test_second_run_trains_nothing(tmp_path, upgraded, bases, text_file, monkeypatch):
    out = tmp_path / "new"
    shutil.copytree(upgraded["bert"].path, out)
    base = Base.open(bases["bert"][0])
    corpus = Corpus((str(text_file),))
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    monkeypatch.setattr("regraft.tuning.trainer.train", lambda *_, **__: pytest.fail("training ran"))
    moved = tmp_path / "moved.txt"
    shutil.copy(text_file, moved)
    for equal_corpus in (corpus, Corpus((str(moved),))):
        assert pretrain(base, equal_corpus, out, RECIPE, block_size=32).fingerprint == upgraded["bert"].fingerprint
    more = tmp_path / "more.txt"
    more.write_text(text_file.read_text(encoding="utf-8") + "good\n", encoding="utf-8")
    with pytest.raises(OutcomeError, match="not the result of the same inputs"):
        pretrain(base, Corpus((str(more),)), out, RECIPE, block_size=32)
    with pytest.raises(OutcomeError, match="not the result of the same inputs"):
        pretrain(base, corpus, out, RECIPE, block_size=16)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == files


def test_digest_of_a_folder_depends_on_its_content(tmp_path):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.jsonl"
    file.write_text('{"text": "one"}\n', encoding="utf-8")
    corpus = Corpus((str(tmp_path / "data"),))
    before = corpus.digest()
    assert corpus.digest() == before
    file.write_text('{"text": "two"}\n', encoding="utf-8")
    assert corpus.digest() != before


def test_replay_replaces_its_share_of_the_order(opened_bases):
    base = opened_bases["bert"][0]
    blocks, earlier = (np.arange(start, start + 40 * 8, dtype=np.uint32).reshape(40, 8) % 20 + 5 for start in (0, 7))
    training = make_training(base, blocks, dataclasses.replace(RECIPE, steps=30, batch_size=10))
    plain = training.order()
    mixed = _with_replay(training, earlier, 0.2)
    order = mixed.order()
    replayed = order >= 40
    assert replayed.sum() == 0.2 * 300
    assert (order[~replayed] == plain[~replayed]).all()
    assert {tuple(row) for row in mixed.blocks[40:].tolist()} <= {tuple(row) for row in earlier.tolist()}
    assert len(set(order[replayed].tolist())) == 60
    assert (mixed.evaluation_blocks == training.evaluation_blocks).all()
    for share in (0, 1, -0.5):
        with pytest.raises(RecipeError, match="share"):
            Replay(Corpus(("a.txt",)), share)


def test_chain_of_domains_with_intermediate_bases(tmp_path, bases):
    files = []
    for number, name in enumerate(("bio", "news")):
        files.append(tmp_path / f"{name}.txt")
        files[-1].write_text("\n".join(make_sentences(300, seed=number)), encoding="utf-8")
    recipe = dataclasses.replace(RECIPE, steps=6, eval_every=3)
    domains = [Corpus((str(file),)) for file in files]
    first = Base.open(bases["bert"][0])

    def make(out):
        return pretrain_chain(first, domains, out, recipe, 16, replay=0.25, keep_every=3)

    chain = make(tmp_path / "chain")
    assert [base.path.name for base in chain] == ["1-bio", "2-news"]
    assert chain[0].parent_fingerprint == first.fingerprint
    assert chain[1].parent_fingerprint == chain[0].fingerprint
    plain = pretrain(first, domains[0], tmp_path / "plain", recipe, 16)
    assert plain.fingerprint == chain[0].fingerprint  # neither replay nor keep_every changes the first base
    assert chain[1].fingerprint != pretrain(chain[0], domains[1], tmp_path / "without", recipe, 16).fingerprint
    intermediate = [Base.open(tmp_path / "chain" / "2-news-steps" / f"step-{step}") for step in (3, 6)]
    distances = [Upgrade(chain[0], base).distance().l2 for base in intermediate]
    assert 0 < distances[0] < distances[1]
    assert [json.loads((base.path / "pretraining.json").read_text())["steps"] for base in intermediate] == [3, 6]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "chain").rglob("*")}
    assert [base.fingerprint for base in make(tmp_path / "chain")] == [base.fingerprint for base in chain]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "chain").rglob("*")} == before


def test_intermediate_bases_of_another_run_are_refused(opened_bases, text_file, tmp_path):
    def run(rate):
        recipe = Recipe(steps=4, batch_size=4, eval_every=2, precision="fp32", learning_rate=rate)
        return pretrain(opened_bases["bert"][0], Corpus((str(text_file),)), tmp_path / "out", recipe, 32, keep_every=2)

    run(1e-4)
    shutil.rmtree(tmp_path / "out")
    run(1e-4)  # the intermediate bases are its own
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(OutcomeError, match=r"out-steps/step-2: is not an intermediate base of the same inputs"):
        run(1e-2)
    assert os.listdir(tmp_path) == ["out-steps"]
