"""Token classification: schemes, data, encoding, metrics, losses, and the whole way of taggers."""

from __future__ import annotations

import json
import random
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers import (
    BAD,
    FEW_STEPS,
    GOOD,
    NEUTRAL,
    WORDS,
    assert_mentions,
    make_config,
    run_command,
    write_base,
    write_table,
    write_upgrade,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval import scheme as seqeval_schemes
from seqeval.metrics import accuracy_score, classification_report, f1_score
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerFast

from regraft import Base, Task, load_adaptation, load_outcome
from regraft.adaptation import load_model
from regraft.errors import CheckpointError, DataError, KindError, MismatchError
from regraft.methods import tune
from regraft.model import Deployment, match_labels
from regraft.model.examples import check_rows
from regraft.model.outputs import forward
from regraft.task import (
    Head,
    HubSplit,
    TokenClassification,
    chance_score,
    load_data,
    paired_difference,
    read_task,
    score,
)
from regraft.task.bootstrap import resampled_scores
from regraft.task.split import Split, object_array
from regraft.task.types import ModelPredictions, Span
from regraft.task.types.span_metrics import SPAN_F1, span_f1
from regraft.task.types.span_views import MAX_WORDS
from regraft.task.types.tagging import SCHEMES, TaggedSpan, detect_scheme

if TYPE_CHECKING:
    from pathlib import Path

# PEFT uses a property that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
HEAD = Head(TokenClassification, TAGS)
ROWS = [
    {"words": ["Ada", "Lovelace", "met", "Paris"], "tags": ["B-PER", "I-PER", "O", "B-LOC"]},
    {"words": ["rain"], "tags": ["O"]},
]


def make_task(train, **keys) -> Task:
    values = {"type": "token-classification", "name": "t", "train": train, "words": "words", "tags": "tags", **keys}
    return Task.from_mapping(values, "task.yaml")


def read_rows(tmp_path, rows, **keys):
    """Read rows as train and dev of a task."""
    file = write_table(tmp_path / "a.jsonl", rows)
    return read_task(make_task(file, dev=file, **keys))


def read_tags(data) -> list[list[str]]:
    return [[data.labels[tag] for tag in target] for target in data.train.targets]


# Schemes


def seqeval_spans(tags, name):
    entities = seqeval_schemes.Tokens(tags, getattr(seqeval_schemes, name)).entities
    return [TaggedSpan(entity.tag.replace("_", ""), entity.start, entity.end) for entity in entities]


@st.composite
def tag_sequences(draw):
    """Draw a scheme, and sequences of its tags, most of which are invalid."""
    name = draw(st.sampled_from(sorted(SCHEMES)))
    tags = ["O", *(tag for kind in ("A", "B", "") for tag in SCHEMES[name].tags_of_type(kind))]
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    pairs = [tuple(draw(st.lists(st.sampled_from(tags), min_size=n, max_size=n)) for _ in "ab") for n in lengths]
    return name, [list(first) for first, _ in pairs], [list(second) for _, second in pairs]


@st.composite
def span_lists(draw):
    spans, end = [], 0
    for _ in range(draw(st.integers(0, 5))):
        start = end + draw(st.integers(0, 2))
        end = start + draw(st.integers(1, 3))
        spans.append(TaggedSpan(draw(st.sampled_from(["A", "B", ""])), start, end))
    return spans, end + draw(st.integers(0, 2))


@given(tag_sequences())
def test_spans_are_those_of_seqeval(drawn):
    name, sequences, _ = drawn
    for tags in sequences:
        assert SCHEMES[name].spans(tags) == seqeval_spans(tags, name)


@given(span_lists(), st.sampled_from(sorted(SCHEMES)))
def test_spans_survive_a_conversion_to_tags(drawn, name):
    spans, num_words = drawn
    scheme = SCHEMES[name]
    tags = scheme.tags(spans, num_words)
    assert scheme.spans(tags) == spans
    assert scheme.invalid_word(tags) is None


@given(span_lists(), st.sampled_from(sorted(SCHEMES)))
def test_data_of_each_scheme_are_valid_in_the_detected_scheme(drawn, name):
    spans, num_words = drawn
    tags = SCHEMES[name].tags(spans, num_words)
    scheme = detect_scheme([tags])
    assert scheme.invalid_word(tags) is None
    assert scheme.spans(tags) == spans


# Metrics


@settings(max_examples=60)
@given(tag_sequences())
def test_metrics_are_those_of_seqeval(drawn):
    name, targets, predictions = drawn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns where F1 is undefined
        expected = f1_score(targets, predictions, mode="strict", scheme=getattr(seqeval_schemes, name), zero_division=0)
    metric = span_f1(SCHEMES[name])
    assert score(metric, targets, predictions) == pytest.approx(expected)
    assert score("token_accuracy", targets, predictions) == pytest.approx(accuracy_score(targets, predictions))


@settings(max_examples=30)
@given(tag_sequences())
def test_resamples_are_scored_as_seqeval_scores_them(drawn):
    name, targets, predictions = drawn
    scores = resampled_scores(span_f1(SCHEMES[name]), targets, [predictions], seed=3, resamples=5)[0]
    counts = np.random.default_rng(3).multinomial(len(targets), np.full(len(targets), 1 / len(targets)), 5)
    for resample, actual in zip(counts, scores[1:], strict=True):
        first, second = (
            [tags for tags, n in zip(side, resample, strict=True) for _ in range(n)] for side in (targets, predictions)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = f1_score(first, second, mode="strict", scheme=getattr(seqeval_schemes, name), zero_division=0)
        assert actual == pytest.approx(expected)


def test_metrics_take_indices_of_labels():
    targets, predictions = object_array([[3, 4, 0], [1]]), [[3, 4, 0], [0]]
    metric = span_f1(SCHEMES["IOB2"], TAGS)
    assert score(metric, targets, predictions) == pytest.approx(2 / 3)
    assert score(SPAN_F1, [["B-A", "O"], ["B-A"]], [["B-A", "O"], ["O"]]) == pytest.approx(2 / 3)
    difference = paired_difference(metric, targets, targets.tolist(), predictions)
    assert difference.estimate == pytest.approx(1 / 3)


def test_chance_is_the_most_frequent_tag(tmp_path):
    data = read_rows(tmp_path, ROWS, labels=TAGS)
    assert chance_score(data, data.dev) == 0
    accuracy = read_rows(tmp_path, ROWS, labels=TAGS, metric="token_accuracy")
    assert chance_score(accuracy, accuracy.dev) == pytest.approx(2 / 5)


# Data


IOB1 = [["I-PER", "I-PER", "O", "I-LOC"], ["I-LOC", "B-LOC", "I-LOC", "O"]]
IOB2 = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "B-LOC", "I-LOC", "O"]]
BILOU = [["B-PER", "L-PER", "O", "U-LOC"], ["U-LOC", "B-LOC", "L-LOC", "O"]]
IOBES = [["B-PER", "E-PER", "O", "S-LOC"], ["S-LOC", "B-LOC", "E-LOC", "O"]]


@pytest.mark.parametrize("tags", [IOB1, IOB2, BILOU, IOBES])
def test_tags_are_converted_through_spans(tmp_path, tags):
    rows = [{"words": list("abcd"), "tags": sentence} for sentence in tags]
    for name, expected in (("IOB1", IOB1), ("IOB2", IOB2), ("BILOU", BILOU), ("IOBES", IOBES)):
        data = read_rows(tmp_path, rows, output_scheme=name)
        assert read_tags(data) == expected
    assert read_rows(tmp_path, rows).labels == TAGS


def test_conll_files_are_read(tmp_path):
    file = tmp_path / "eng.train.conll"
    file.write_text(
        "-DOCSTART- -X- -X- O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\nGerman JJ I-NP I-MISC\n\n"
        "# id 7\n# sent_id = 8\n#\u2028 NN I-NP O\n  \nPeter NNP I-NP I-PER\n"
    )
    data = read_task(make_task(str(file), dev=str(file), words=0, tags=-1))
    assert data.train.inputs == [("EU", "rejects", "German"), ("#\u2028",), ("Peter",)]
    assert data.train.row_numbers.tolist() == [3, 9, 11]
    assert read_tags(data) == [["B-ORG", "O", "B-MISC"], ["O"], ["B-PER"]]


def test_conll_files_with_tabs_compressed_or_of_any_name_are_read(tmp_path):
    import gzip

    content = "New York\tB-LOC\nis\tO\n\n"
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "a.bio.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.txt", "a.bio.gz"):
        file = str(tmp_path / name)
        data = read_task(make_task(file, dev=file, words="0", tags=1))
        assert data.train.inputs == [("New York", "is")]


def test_class_names_of_a_data_set_are_used_in_their_order(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    names = ["I-PER", "B-LOC", "O", "I-LOC", "B-PER"]
    features = Features({"words": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=names))})
    rows = [{**row, "tags": [names.index(tag) for tag in row["tags"]]} for row in ROWS]
    dataset = Dataset.from_list(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "a.parquet")
    for source in (HubSplit(dataset=str(tmp_path / "saved"), split="train"), str(tmp_path / "a.parquet")):
        data = read_task(make_task(source, dev=source))
        assert data.labels == tuple(names)
        assert read_tags(data) == [row["tags"] for row in ROWS]
        assert read_task(make_task(source, dev=source, output_scheme="BILOU")).labels[0] == "O"


@pytest.mark.parametrize(
    ("row", "keys", "parts"),
    [
        ({"words": ["a", "b"], "tags": ["O", "I-A"]}, {"scheme": "IOB2"}, ["row 3, word 2 ('b')", "I-A", "IOB2"]),
        ({"words": ["a"], "tags": ["B-A"]}, {"scheme": "IOB1"}, ["row 1, word 1 ('Ada')", "B-PER", "IOB1"]),
        ({"words": ["a"], "tags": ["NOUN"]}, {}, ["row 3, word 1 ('a')", "NOUN"]),
        ({"words": ["a"], "tags": ["L-A"]}, {}, ["row 1, word 1", "BILOU", "as the tags of train suggest"]),
        ({"words": ["a"], "tags": ["O", "O"]}, {}, ["row 3", "1 words but 2 tags"]),
        ({"words": [], "tags": []}, {}, ["row 3", "no words"]),
        ({"words": "a b", "tags": ["O"]}, {}, ["row 3", "not a list of words"]),
        ({"words": ["a", None], "tags": ["O", "O"]}, {}, ["row 3", "word 2", "None"]),
        ({"words": ["a"], "tags": [3]}, {}, ["row 3, word 1", "3", "not a name"]),
        ({"words": ["a"], "tags": "O"}, {}, ["row 3", "not a list of tags"]),
        ({"words": ["a"], "tags": ["B-ORG"]}, {"labels": TAGS}, ["row 3", "B-ORG", "labels"]),
    ],
)
def test_invalid_rows_are_named(tmp_path, row, keys, parts):
    with pytest.raises(DataError) as error:
        read_rows(tmp_path, [*ROWS, row], **keys)
    assert_mentions(error, "a.jsonl", *parts)


def test_invalid_conll_files_are_refused(tmp_path):
    file = tmp_path / "a.conll"
    file.write_text("a O\n\nb\n")
    with pytest.raises(DataError) as error:
        read_task(make_task(str(file), words=0, tags=1))
    assert_mentions(error, file, "row 3", "1 columns")
    with pytest.raises(DataError, match=r"have numbers, not names.*words: 0, tags: -1"):
        read_task(make_task(str(file)))
    file.write_text("a X O\n\nb X B-A\n")
    with pytest.raises(DataError, match="of which 2, -1 are the same one"):
        read_task(make_task(str(file), words=2, tags=-1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tags": "words"}, "already the column of words"),
        ({"tags": None}, "is required if there is no column of tags"),
        ({"labels": ["O", "B-A", "B-A"]}, "more than once"),
        ({"labels": ["O", "U-A"]}, "no tags of IOB2"),
        ({"labels": ["B-A", "I-A"]}, "must list 'O'"),
        ({"scheme": "BIO"}, "IOB2"),
        ({"metric": "accuracy"}, "span_f1"),
        ({"shots": 0}, "sentences per type"),
    ],
)
def test_invalid_keys_are_refused(keys, message):
    with pytest.raises(DataError, match=message):
        make_task("a.jsonl", **keys)


def test_another_scheme_of_the_outputs_is_another_task(tmp_path):
    """The same tags are other spans in it, so an outcome of one scheme does not answer for the other."""
    data = read_rows(tmp_path, ROWS[1:] * 2, labels=TAGS)
    assert data.with_settings(output_scheme="IOB1").digest() != data.digest()


def test_data_without_spans_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing to learn"):
        read_rows(tmp_path, [ROWS[1]] * 2)


def test_held_out_and_few_shot_samples_have_sentences_of_each_type(tmp_path):
    rows = [
        {"words": [f"w{i}", "x"], "tags": [("B-A", "B-B", "O")[i % 3], "B-A" if i % 3 == 1 else "O"]} for i in range(60)
    ]
    data = read_task(make_task(write_table(tmp_path / "a.jsonl", rows)))
    strata, names = data.task.strata(data.train.targets, data.labels)
    assert names == ["A", "B", "without spans"]
    assert np.bincount(strata).tolist() == [18, 18, 18]
    assert len(data.dev) == 6
    assert len(data.few_shot(4, 0).train) == 12
    assert len(data.few_shot(30, 0).train) == 54


def test_labels_in_another_order_are_matched(tmp_path):
    data = read_rows(tmp_path, ROWS)
    matched = data.relabel(TAGS[::-1])
    assert matched.labels == TAGS[::-1]
    assert read_tags(matched) == [row["tags"] for row in ROWS]
    assert data.digest() != matched.digest()
    assert matched.task.describe(matched.train.targets[0], matched.labels) == "1:B-PER 2:I-PER 4:B-LOC"
    assert matched.task.describe(matched.train.targets[1], matched.labels) == "O"


# Views


@settings(max_examples=30)
@given(tag_sequences(), st.randoms(use_true_random=False))
def test_views_compare_two_taggers(drawn, rng):
    name, targets, predictions = drawn
    scheme = SCHEMES[name]
    labels = ["O", *(tag for kind in ("A", "B", "") for tag in scheme.tags_of_type(kind))]
    task = make_task("a.jsonl", output_scheme=name)
    target_array, old = ([[labels.index(tag) for tag in tags] for tags in side] for side in (targets, predictions))
    new = [list(tags) if rng.random() < 0.5 else list(target) for tags, target in zip(old, target_array, strict=True)]
    split = Split("dev", "a", [["w"] * len(tags) for tags in targets], object_array(target_array), np.arange(len(old)))
    models = [ModelPredictions(tags, [0.5] * len(old), task.right(split.targets, tags)) for tags in (old, new)]
    table, calibration = task.comparison_views(split.targets, *models, labels)
    assert calibration.name == "calibration"
    after = [[labels[tag] for tag in tags] for tags in new]
    for column, tags in ((2, predictions), (3, after)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = classification_report(
                targets, tags, mode="strict", scheme=getattr(seqeval_schemes, name), output_dict=True, zero_division=0
            )
        for row in table.rows:
            expected = report.get("_" if row[0] == "span" else row[0], {"f1-score": 0.0})
            assert row[column] == pytest.approx(expected["f1-score"])
    num_flips = sum(first != second for first, second in zip(models[0].right, models[1].right, strict=True))
    views = task.flip_views(split, *models, labels)
    assert sum(len(view.texts) for view in views) == 3 * min(num_flips, 5)


def test_flipped_sentences_are_shown_with_their_tags(tmp_path):
    data = read_rows(tmp_path, ROWS)
    old = ModelPredictions(data.dev.targets.tolist(), None, [True, True])
    new = ModelPredictions([[3, 4, 0, 0], [0]], None, [False, True])
    (view,) = data.task.flip_views(data.dev, old, new, data.labels)
    assert "".join(f"{s.text}/{s.mark}" if s.mark else s.text for s in view.texts[0]) == (
        "row 1, true: Ada/B-PER Lovelace/I-PER met Paris/B-LOC"
    )
    assert view.texts[2][0].text == "row 1, after: "
    assert view.texts[2][-1] == Span("Paris")


# Tokens


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
CHARACTERS = sorted(set("".join(WORDS)))


def make_wordpiece() -> Tokenizer:
    vocabulary = [*SPECIAL, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *WORDS[::2]]
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def make_byte_bpe() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", c) for c in CHARACTERS]
    vocabulary = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def make_sentencepiece() -> Tokenizer:
    merges = [("▁", c) for c in CHARACTERS]
    vocabulary = [*SPECIAL, "▁", *CHARACTERS, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


TOKENIZERS = {"bert": make_wordpiece, "roberta": make_byte_bpe, "llama": make_sentencepiece}


@pytest.mark.parametrize("architecture", TOKENIZERS)
def test_rows_are_at_the_tokens_that_a_pipeline_reads(tmp_path, architecture):
    """The outputs of words equal those of transformers' pipeline at the first token of each word."""
    backend = TOKENIZERS[architecture]()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(
        make_config(architecture, vocab_size=backend.get_vocab_size(), **HEAD.settings)
    ).eval()
    rows = [{"words": ["the", "good", "bitter", "end"], "tags": ["O", "B-PER", "I-PER", "O"]}, *ROWS[1:]]
    data = read_rows(tmp_path, rows, labels=TAGS)
    examples = data.task.encode(data.train, tokenizer, 0, 64)
    batch = examples.batch(range(len(rows)))
    with torch.no_grad():
        probabilities = forward(model, batch).logits.softmax(dim=-1)
    tagger = transformers.pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="none", ignore_labels=[]
    )
    expected = []
    for row in rows:
        entities = tagger(" ".join(row["words"]))
        starts = {entity["start"] for entity in entities}
        position = 0
        for word in row["words"]:
            first = next(start for start in (position - 1, position) if start in starts)
            expected.append(next(entity for entity in entities if entity["start"] == first))
            position += len(word) + 1
    assert [entity["entity"] for entity in expected] == [TAGS[index] for index in probabilities.argmax(dim=-1)]
    scores = torch.tensor([float(entity["score"]) for entity in expected])
    torch.testing.assert_close(probabilities.amax(dim=-1), scores, atol=1e-5, rtol=1e-5)


def test_words_without_tokens_and_words_that_are_cut_off_count_as_outside(tmp_path, caplog):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_wordpiece(), pad_token="<pad>", model_max_length=64)
    rows = [
        {"words": ["good", "\u200b", " ", "bad"], "tags": ["B-PER", "O", "B-LOC", "I-LOC"]},
        {"words": [*(["the"] * 10), "good"], "tags": [*(["O"] * 10), "B-PER"]},
    ]
    data = read_rows(tmp_path, rows, labels=TAGS)
    examples = data.task.encode(data.train, tokenizer, 0, 9)
    assert examples.words == [[0, 3], list(range(9))]
    assert "2 of 15 words of train lie beyond 9 tokens" in caplog.text
    ones = [1] * 11
    predictions = data.task.predictions_of_examples(ones, data.train, examples, TAGS)
    assert predictions == [[1, 0, 0, 1], [*([1] * 9), 0, 0]]
    assert data.task.confidence_of_examples([0.5] * 11, examples) == [0.25, 0.5**9]
    with pytest.raises(DataError, match="row 1: the tokenizer makes no token of any of the words"):
        empty = read_rows(tmp_path, [{"words": ["\u200b"], "tags": ["B-PER"]}] * 2, labels=TAGS)
        empty.task.encode(empty.train, tokenizer, 0, 9)


def test_tokenizers_that_do_not_relate_tokens_to_characters_encode_word_by_word(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "##ish", "bad"]))
    tokenizer = transformers.BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert not tokenizer.is_fast
    rows = [{"words": ["goodish", "\u200b", "bad", "good"], "tags": ["B-PER", "O", "O", "O"]}, *ROWS]
    data = read_rows(tmp_path, rows, labels=TAGS)
    examples = data.task.encode(data.train, tokenizer, 0, 5)
    assert examples.columns["input_ids"][0] == [2, 4, 5, 6, 3]
    assert (examples.words[0], examples.tokens[0]) == ([0, 2], [1, 3])


def test_bases_with_rows_for_different_words_are_not_compared(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_wordpiece(), pad_token="<pad>", model_max_length=64)
    data = read_rows(tmp_path, make_rows(4), labels=TAGS_OF_ROWS)
    whole, cut = (data.task.encode(data.train, tokenizer, 0, length) for length in (64, 3))
    check_rows(whole, whole, data.train)
    with pytest.raises(KindError, match="row 1: the tokenizers of the two bases cut off different words"):
        check_rows(whole, cut, data.train)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "llama"])
def test_losses_are_those_of_transformers(tmp_path, architecture):
    base = Base.open(write_base(tmp_path / "base", architecture))
    data = read_rows(tmp_path, make_rows(8), labels=TAGS_OF_ROWS)
    model = AutoModelForTokenClassification.from_pretrained(base.path, **data.head.settings).eval()
    deployment = Deployment(model, base, data, "fp32")
    examples = deployment.examples(data.train)
    batch = examples.batch(range(8))
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["example"], batch["token"]] = batch["targets"]
    inputs = {name: batch[name] for name in (*examples.columns, "attention_mask")}
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    torch.testing.assert_close(torch.tensor(deployment.loss(data.train)), output.loss, atol=1e-6, rtol=1e-6)
    expected = output.logits[batch["example"], batch["token"]]
    torch.testing.assert_close(deployment.outputs(data.train), expected, atol=1e-5, rtol=1e-5)


# The whole way


TAGS_OF_ROWS = ("O", "B-bad", "I-bad", "B-good", "I-good")


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Build sentences in which a good word, and a bad word with the next word, are spans."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words, tags = [rng.choice(NEUTRAL)], ["O"]
        for _ in range(rng.randint(1, 4)):
            words += rng.choice([[rng.choice(NEUTRAL)], [rng.choice(GOOD)], [rng.choice(BAD), rng.choice(NEUTRAL)]])
            if len(words) > len(tags) + 1:
                tags += ["B-bad", "I-bad"]
            else:
                tags.append("B-good" if words[-1] in GOOD else "O")
        rows.append({"words": words, "tags": tags})
    return rows


@pytest.fixture(scope="module")
def task_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    keys = {"type": "token-classification", "words": "words", "tags": "tags", "max_length": 32}
    for seed, (split, count) in enumerate((("train", 48), ("dev", 16), ("test", 16))):
        write_table(folder / f"{split}.jsonl", make_rows(count, seed))
        keys[split] = f"{split}.jsonl"
    (folder / "task.yaml").write_text(yaml.safe_dump(keys))
    return folder / "task.yaml"


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("bases")
    pairs = {}
    for architecture in ("bert", "llama"):
        old = write_base(folder / architecture, architecture)
        pairs[architecture] = old, write_upgrade(old, folder / f"{architecture}-new", 0.1)
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kind"), [("bert", "lora"), ("llama", "full"), ("bert", "bottleneck")])
def test_the_whole_way(tmp_path, bases, task_file, architecture, kind):
    old, new = bases[architecture]
    tuned = tmp_path / "tuned"
    tune(old, task_file, tuned, kind=kind, recipe=FEW_STEPS)
    assert load_outcome(tuned).record.task.metric == "span_f1"
    common = ("--old-base", old, "--new-base", new, "--adaptation", tuned, "--task", task_file)
    checked = run_command("check", *common, "--deep", "--out", tmp_path / "deep")
    assert "span_f1 on test" in checked
    methods = ("direct", "ridge", "init+distill", "label-free")
    training = ("--steps", 2, "--precision", "fp32")
    run_command("compare", *common, "--methods", ",".join(methods), *training, "--out", tmp_path / "all")
    for name in ("html", "md"):
        run_command("report", tmp_path / "deep", tmp_path / "all", "--out", tmp_path / f"report.{name}")
    report = (tmp_path / "report.md").read_text()
    assert "F1 of spans by type" in report
    data = load_data(task_file, 20)
    base = Base.open(new)
    for folder in (tmp_path / "all").glob("*-seed*"):
        outcome = load_outcome(folder)
        deployment = Deployment(load_model(load_adaptation(folder), base, data.head), base, data, "fp32")
        assert outcome.predictions("test") == deployment.predictions(data.test)
        assert outcome.right("test") == deployment.right(data.test)
        assert outcome.scores["test"] == deployment.score(data.test)
        assert outcome.scores["test_majority"] == 0
    if kind != "bottleneck":
        target = ("lora", "--rank", 4) if kind == "full" else ("full",)
        run_command("adaptation", "convert", tuned, "--to", *target, "--old-base", old, "--out", tmp_path / "converted")
        model = load_model(load_adaptation(tmp_path / "converted"), Base.open(old), data.head)
        assert Deployment(model, Base.open(old), data, "fp32").outputs(data.test).isfinite().all()


def test_labels_of_a_model_of_transformers_are_matched_by_name(tmp_path, bases, task_file):
    old, _ = bases["bert"]
    labels = ("I-bad", "B-good", "O", "B-bad", "I-good")
    settings = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    settings["problem_type"] = "regression"  # transformers does not read it for a tagger
    torch.manual_seed(5)
    model = AutoModelForTokenClassification.from_pretrained(old, num_labels=5, **settings)
    rows = make_rows(16, 3)
    tokenizer = Base.open(old).tokenizer
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    for row in rows:
        inputs = tokenizer(row["words"], is_split_into_words=True, return_tensors="pt")
        targets = [-100 if word is None else labels.index(row["tags"][word]) for word in inputs.word_ids()]
        model(**inputs, labels=torch.tensor([targets])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    folder = tmp_path / "adaptation"
    model.save_pretrained(folder)
    reference = AutoModelForTokenClassification.from_pretrained(folder).eval()
    base = Base.open(old)
    adaptation = load_adaptation(folder)
    data = match_labels(adaptation, load_data(task_file, 20))
    assert data.labels == labels
    deployment = Deployment(load_model(adaptation, base, data.head), base, data, "fp32")
    expected = []
    for words in data.test.inputs:
        inputs = tokenizer(list(words), is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            expected.append([labels[i] for i in reference(**inputs).logits[0].argmax(dim=-1)][1:-1])
    assert [[labels[tag] for tag in tags] for tags in deployment.predictions(data.test)] == expected


def test_adaptations_of_other_types_are_refused(tmp_path, bases, task_file):
    old, _ = bases["bert"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(old, num_labels=5)
    model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(MismatchError, match="token-classification"):
        match_labels(load_adaptation(tmp_path / "classifier"), load_data(task_file, 20))


def test_an_architecture_without_a_tagger_is_refused(tmp_path, task_file):
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        ffn_dim=48,
        word_embed_proj_dim=32,
        num_attention_heads=2,
        max_position_embeddings=66,
        pad_token_id=0,
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    write_base(tmp_path / "llama", "llama")
    Base.open(tmp_path / "llama").tokenizer.save_pretrained(tmp_path / "opt")
    with pytest.raises(CheckpointError, match="transformers has no opt for TokenClassification"):
        tune(tmp_path / "opt", task_file, tmp_path / "out", kind="lora", recipe=FEW_STEPS)


def test_task_check_shows_sentences_with_their_spans(task_file):
    printed = run_command("task", "check", task_file)
    for part in ("Spans in train", "bad", "good", "](bad)", "](good)"):
        assert part in printed


def test_a_long_sentence_is_shown_in_part(tmp_path):
    rows = [{"words": ["a", "b"] * 200, "tags": ["O", "B-A"] * 200}] * 2
    data = read_task(make_task(write_table(tmp_path / "train.jsonl", rows)))
    shown = data.task.example_views(data.train, data.labels)[1].texts[0]
    assert sum(span.mark == "A" for span in shown) == MAX_WORDS // 2
    assert shown[-1].text == " …"


def test_label_free_reads_raw_text(tmp_path, bases, task_file):
    old, new = bases["bert"]
    tune(old, task_file, tmp_path / "tuned", kind="lora", recipe=FEW_STEPS)
    (tmp_path / "corpus.txt").write_text("the good film was\nbad meal and the end\n" * 4)
    common = ("--old-base", old, "--new-base", new, "--adaptation", tmp_path / "tuned", "--task", task_file)
    options = ("-o", f"label-free.text={tmp_path / 'corpus.txt'}", "--steps", 2)
    run_command("recycle", *common, "--method", "label-free", *options, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "outcome.json").read_text())["cost"]["labels"] == 0
