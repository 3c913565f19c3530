"""Metrics of generated answers against sacrebleu, rouge-score and naive implementations, and views of the answers."""

from __future__ import annotations

import collections
import json
import re
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF as SacrebleuCHRF

from regraft.cli.task import _print_view
from regraft.errors import DataError, MismatchError, RecipeError
from regraft.report.markdown import to_markdown
from regraft.report.page import AnswerBrowser, Card, Page, Part, Section
from regraft.task import find_metric, score
from regraft.task.bootstrap import resampled_scores
from regraft.task.metric import DEFAULT_TOLERANCE
from regraft.task.split import Split, object_array
from regraft.task.types import Answers, ModelPredictions, Table
from regraft.task.types.answer_metrics import (
    ANSWER_METRICS,
    CHRF,
    EXACT_MATCH,
    JSON_MATCH,
    LOSS,
    ROUGE_L,
    TOKEN_ACCURACY,
    TOKEN_F1,
    AnswerMetric,
    bind_pattern,
    find_answer_metric,
    right,
    values,
)
from regraft.task.types.answer_texts import has_loop, normalise, rouge_l, token_f1, words
from regraft.task.types.answer_views import MAX_CHARACTERS, AnswerHealth, health, health_views, side_by_side

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A quick brown dog jumps over a lazy fox!",
    "",
    "   ",
    "Übergrößen — naïve café, ½ of it…",
    "日本語のテキスト と 中文",
    "हिन्दी में उत्तर",
    '{"a": 1}',
    "the the the a an",
    "don't stop-me now_please 12.5%",
]
TEXTS = st.one_of(
    st.sampled_from(SENTENCES),
    st.text(max_size=40),
    st.text(alphabet="ab c.", max_size=25),
    st.text("aÀé日ん ा", max_size=9),
)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)
COMPARING = [metric for metric in ANSWER_METRICS if metric.needs_answers]


def predict(*answers: str | None, **values: Any) -> list[dict[str, Any]]:
    """Return predictions in which all have the same values except for the answer."""
    keys = {"ended": True, "tokens": 3, "loss": 1.0, "correct": 1, "labels": 2} | values
    return [{"answer": answer, **keys} for answer in answers]


def squad_f1(reference: str, answer: str) -> float:
    """The functions of SQuAD 2.0's official script, shortened."""

    def tokens(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    gold, predicted = tokens(reference), tokens(answer)
    common = sum((collections.Counter(gold) & collections.Counter(predicted)).values())
    if not gold or not predicted:
        return float(gold == predicted)
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)


@settings(max_examples=150, deadline=None)
@given(PAIRS)
def test_chrf_equals_that_of_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    references, answers = zip(*pairs, strict=True)
    second = SacrebleuCHRF()
    if any(text.split() for pair in pairs for text in pair):
        expected = second.corpus_score(list(answers), [list(references)]).score / 100
        assert score(CHRF, object_array(references), predict(*answers)) == pytest.approx(expected, abs=1e-12)
    for (reference, answer), value in zip(pairs, values(CHRF, references, answers), strict=True):
        expected = second.sentence_score(answer, [reference]).score / 100
        assert value == pytest.approx(expected if (reference + answer).split() else 1.0, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=string.printable, max_size=60), st.text(alphabet=string.printable, max_size=60))
def test_rouge_l_equals_that_of_rouge_score(reference: str, answer: str) -> None:
    if words(reference) or words(answer):
        expected = RougeScorer(["rougeL"], use_stemmer=False).score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(reference, answer) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcd"), max_size=90))
def test_rouge_l_of_long_texts_equals_that_of_rouge_score(reference: list[str], answer: list[str]) -> None:
    """Longer than a machine word, in which the algorithm holds its state."""
    first, second = " ".join(["w", *reference]), " ".join(["w", *answer])
    expected = RougeScorer(["rougeL"]).score(first, second)["rougeL"].fmeasure
    assert rouge_l(first, second) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_token_f1_equals_that_of_squad(reference: str, answer: str) -> None:
    assert token_f1(reference, answer) == pytest.approx(squad_f1(reference, answer), abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_identical_answers_score_1(texts: list[str]) -> None:
    for metric in COMPARING:
        answers = [json.dumps(text) for text in texts] if metric is JSON_MATCH else texts
        for predictions in (predict(*answers), answers):  # with plain texts, the agreement of two models
            assert score(metric, object_array(answers), object_array(predictions)) == pytest.approx(1, abs=1e-12)
            assert right(metric, answers, predictions, right_at=1 - 1e-12) == [True] * len(texts)


@settings(max_examples=150, deadline=None)
@given(TEXTS, TEXTS)
def test_scores_are_symmetric_or_at_least_bounded(reference: str, answer: str) -> None:
    for metric in COMPARING:
        forwards, backwards = values(metric, [reference, answer], [answer, reference])
        assert 0 <= forwards <= 1
        assert metric is CHRF or forwards == backwards


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_normalisation_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("metric", ANSWER_METRICS, ids=lambda metric: metric.name)
def test_bootstrap_equals_naive_resampling(metric: AnswerMetric) -> None:
    rng = np.random.default_rng(1)
    references = [*SENTENCES, '{"b": [1, 2]}', "x"]
    answers = [*SENTENCES[1:], SENTENCES[0], '{"b": [1.0, 2]}', None]
    targets = object_array([*references[:-1], None])  # the last has neither reference nor answer, nor labels
    predictions = [
        {"answer": answer, "loss": 3.0 * rng.random() * labels, "correct": int(labels) // 2, "labels": int(labels)}
        for answer, labels in zip(answers, [*rng.integers(0, 9, len(answers) - 1), 0], strict=True)
    ]
    (scores,) = resampled_scores(metric, targets, [predictions], seed=5, resamples=40)
    assert scores[0] == score(metric, targets, predictions)
    counts = np.random.default_rng(5).multinomial(len(targets), [1 / len(targets)] * len(targets), 40)
    for resample, actual in zip(counts, scores[1:], strict=True):
        indices = np.repeat(np.arange(len(targets)), resample)
        expected = score(metric, targets[indices], [predictions[index] for index in indices])
        assert actual == pytest.approx(expected, abs=1e-12)


def test_loss_and_token_accuracy_are_means_over_labelled_tokens() -> None:
    predictions = [
        {"answer": None, "loss": 6.0, "correct": 3, "labels": 3},
        {"answer": None, "loss": 1.0, "correct": 0, "labels": 1},
        {"answer": None, "loss": None, "correct": None, "labels": 0},
    ]
    targets = object_array(["x y z", None, "cut off"])
    assert score(LOSS, targets, predictions) == 7 / 4
    assert score(TOKEN_ACCURACY, targets, predictions) == 3 / 4
    assert values(LOSS, targets, predictions) == [2.0, 1.0, None]
    assert values(TOKEN_ACCURACY, targets, predictions) == [1.0, 0.0, None]
    assert right(LOSS, targets, predictions) == right(TOKEN_ACCURACY, targets, predictions) == [None] * 3
    assert [metric.needs_answers for metric in ANSWER_METRICS] == [False, False, True, True, True, True, True]


def test_a_tolerance_of_the_loss_is_in_nats() -> None:
    assert LOSS.share_to_difference(None, 11.0, 1.0) == 0.02
    assert LOSS.share_to_difference(0.05, 11.0, 1.0) == 0.05
    assert find_metric("rmse").share_to_difference(None, 11.0, 1.0) == pytest.approx(10 * DEFAULT_TOLERANCE)
    assert EXACT_MATCH.share_to_difference(None, 0.0, 0.9) == DEFAULT_TOLERANCE
    assert (LOSS.gain(1.0, 3.0), LOSS.format_score(1.23456)) == (2.0, "1.235")


def test_exact_match_ignores_form_case_and_white_space() -> None:
    references = ["Straße", "ﬁve  kg\n", "Café", "4", "Ja.", None]
    answers = ["STRASSE", "five kg", "cafe\u0301", "5", "Ja", None]
    assert values(EXACT_MATCH, references, answers) == [1, 1, 1, 0, 0, None]
    assert right(EXACT_MATCH, references, answers) == [True, True, True, False, False, None]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"#### (\d+)", [1, 0, 0, 0]),
        (r"\d+", [1, 1, 0, 0]),
        (r"answer: (\d+)|#### (\d+)", [1, 0, 0, 0]),
    ],
)
def test_a_pattern_extracts_the_answer(pattern: str, expected: list[int]) -> None:
    metric = bind_pattern(EXACT_MATCH, pattern)
    references = ["#### 42", "#### 42", "#### 42", "no number"]
    answers = ["#### 42, of course", "it is 42", "none", "no number"]
    assert values(metric, references, answers) == expected
    assert score(metric, object_array(references), predict(*answers)) == sum(expected) / 4
    assert (metric.name, bind_pattern(CHRF, pattern), bind_pattern(EXACT_MATCH, None)) == (
        "exact_match",
        CHRF,
        EXACT_MATCH,
    )


def test_an_invalid_pattern_is_named() -> None:
    with pytest.raises(DataError, match=r"'pattern' is '\(\\\\d\+'.*not a regular expression"):
        bind_pattern(EXACT_MATCH, r"(\d+")


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ('{"a": 1, "b": [true, null]}', '```json\n{"b": [true, null], "a": 1.0}\n```', True),
        ("[1]", " ```\n[1]\n``` \n", True),
        ("[1, 2]", "[2, 1]", False),
        ("[1]", "The answer is [1]", False),
        ("NaN", "NaN", False),
        ("[" * 100_000, "[" * 100_000, False),
        ("9" * 5000, "9" * 5000, False),
        ("not JSON", "not JSON", False),
        ({"role": "assistant", "tool_calls": [1]}, '{"tool_calls": [1], "role": "assistant"}', True),
    ],
)
def test_json_matches_by_value(reference: Any, answer: str, expected: bool) -> None:
    assert right(JSON_MATCH, [reference], predict(answer)) == [expected]


def test_a_turn_with_tool_calls_is_compared_as_json() -> None:
    turn = {"tool_calls": [{"name": "weather", "arguments": {"city": "Köln"}}], "role": "assistant"}
    text = json.dumps(turn, sort_keys=True, ensure_ascii=False)
    for metric in COMPARING:
        assert values(metric, [turn, turn], predict(text, turn)) == pytest.approx([1, 1])  # type: ignore[arg-type]


def test_graded_metrics_are_right_at_a_threshold() -> None:
    references, answers = ["one two three four"] * 2, ["one two three", "one"]
    assert values(ROUGE_L, references, answers) == pytest.approx([6 / 7, 2 / 5])
    for metric in (ROUGE_L, TOKEN_F1):
        assert right(metric, references, answers) == [True, False]
        assert right(metric, references, answers, right_at=0.4) == [True, True]
        assert right(metric, references, answers, right_at=0.9) == [False, False]


def test_words_of_other_scripts_are_compared() -> None:
    assert words("日本語 and हिन्दी_naïve ❤️") == ["日", "本", "語", "and", "हिन्दी", "naïve"]
    assert rouge_l("मा", "मी") == 0
    assert rouge_l("日本語", "日本") == pytest.approx(0.8)


def test_a_function_of_a_user(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_scores.py").write_text(
        "def overlap(reference, answer):\n    return len(set(reference) & set(answer)) / len(set(reference))\n"
        "def same(reference, answer):\n    return reference == answer\n"
        "def percent(reference, answer):\n    return 100\n"
        "def fails(reference, answer):\n    return answer['x']\n"
        "constant = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    metric = find_answer_metric("my_scores:overlap")
    assert values(metric, ["abcd", "ab"], predict("ab", "abc")) == [0.5, 1.0]
    assert right(metric, ["abcd", "ab"], predict("ab", "abc"), right_at=0.6) == [False, True]
    assert score("my_scores:same", ["a", "b"], ["a", "c"]) == 0.5
    assert find_metric("my_scores:overlap").is_bounded
    for name, message in (
        ("my_scores:percent", "returned 100 .*from 0 to 1"),
        ("my_scores:fails", "fails for the answer 'a' .*TypeError"),
        ("my_scores:missing", "my_scores.py has no function 'missing'"),
        ("my_scores:constant", "no function 'constant'"),
        ("no_such_module:f", "'no_such_module' cannot be imported .*in the folder of no_such_module.py"),
    ):
        with pytest.raises(DataError, match=message):
            values(find_answer_metric(name), ["a"], ["a"])
    with pytest.raises(DataError, match=r"no such metric. Use one of loss, .*module:function"):
        find_answer_metric("bleu")


def test_predictions_without_what_a_metric_reads_are_named() -> None:
    with pytest.raises(MismatchError, match=r"predictions\[1\]: there is no generated answer. Generate"):
        score(ROUGE_L, object_array(["a", "b"]), predict("a", None))
    for metric in (LOSS, TOKEN_ACCURACY):
        with pytest.raises(RecipeError, match=r"reads the probabilities of tokens, found 'a'.*one of exact_match"):
            score(metric, object_array(["a"]), object_array(["a"]))
        with pytest.raises(MismatchError, match=r"predictions\[0\]: .* 2 labelled tokens is missing. Run"):
            values(metric, ["a"], predict("a", loss=None, correct=None))
        with pytest.raises(DataError, match="no example has a labelled token"):
            score(metric, object_array(["a"]), predict("a", labels=0))
    with pytest.raises(DataError, match="no example has a reference answer"):
        score(CHRF, object_array([None]), predict("a"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=20))
def test_loops_are_those_of_a_naive_search(letters: list[str]) -> None:
    expected = any(
        letters[start : start + length] == letters[start + length : start + 2 * length]
        for length in range(4, len(letters) // 2 + 1)
        for start in range(len(letters) - 2 * length + 1)
    )
    assert has_loop(" ".join(letters)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no " * 8, True),
        ("no " * 7, False),  # fewer than two runs of four words
        ("one two three " * 4, True),
        ("The cat sat down. The cat sat down!", True),
        ("Buy milk at the shop. Then buy milk at the shop.", False),  # recurs, but not at once
        ("答" * 8, True),
        ("", False),
    ],
)
def test_loops_in_words(text: str, expected: bool) -> None:
    assert has_loop(text) == expected


def test_health_of_answers() -> None:
    predictions = [*predict("two words", "  ", ended=True), *predict("a b c d " * 2, ended=False), *predict(None)]
    assert health(predictions, ["one two three", "four", None, "five"]) == AnswerHealth(2 / 3, 2 / 4, 1 / 3, 1 / 3)
    assert health(["text"], [None]) == AnswerHealth(None, None, 0.0, 0.0)
    assert health(predict(None), ["x"]) == AnswerHealth(None, None, None, None)
    (table,) = health_views(["a b"], predict("a b"), predict(""))
    assert isinstance(table, Table)
    assert table.rows == (("old", 1.0, 1.0, 0.0, 0.0), ("new", 1.0, 0.0, 0.0, 1.0))
    assert health_views(["a"], predict(None), predict(None)) == ()


def test_answers_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    references = object_array(["r0", "r1", None, "r3", "r4"])
    old_texts, new_texts = ["r0", "x", "a", "r3", "y"], ["r0", "r1", "b", "|z\n" * 900, "z"]
    old, new = (
        ModelPredictions(predict(*texts), None, right(EXACT_MATCH, references, texts))  # type: ignore[arg-type]
        for texts in (old_texts, new_texts)
    )
    split = Split("test", "x.jsonl", [f"p{index} " * 400 for index in range(5)], references, np.arange(11, 16))
    (view,) = side_by_side(split, str.strip, old, new)
    assert isinstance(view, Answers)
    changes = [(pair.row, pair.change) for pair in view.pairs]
    assert changes == [(14, "negative"), (12, "positive"), (13, "changed"), (15, "changed"), (11, "same")]
    assert [name for name, _ in view.pairs[2].texts] == ["before", "after"]
    longest = view.pairs[0]
    assert {len(longest.prompt), len(longest.after or "")} == {MAX_CHARACTERS}
    assert (longest.prompt[0], longest.prompt[-2:], (longest.after or "")[-1]) == ("…", "p3", "…")
    (first,) = side_by_side(split, str, old, new, limit=2)
    assert (first.title, len(first.pairs)) == ("Answers side by side: 2 of 5 examples", 2)  # type: ignore[union-attr]
    nothing = ModelPredictions(predict(*[None] * 5), None, [None] * 5)  # type: ignore[list-item]
    assert side_by_side(split, str, nothing, nothing) == ()

    _print_view(view)
    output = capsys.readouterr().out
    assert "row 14, negative flip" in output
    section = Section("a", "Title", "Lead.", (AnswerBrowser(view.title, view.pairs * 3),))
    card = Card("Verdict", "retune", "plain", "Advice.", None, None, ())
    text = to_markdown(Page("Page", (Part("p", "Part", "Subtitle", card, (section,)),), "1"), {})
    assert "- row 15, changed answer\n  - prompt: …" in text
    assert "  - after: " + r"\|z " * 99 in text
    assert "3 more are in the HTML report." in text
