"""Reports: the page in a browser, the Markdown, and the files that reports read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import read_test_predictions

from regraft.adaptation.outcome import versions, write_outcome
from regraft.adaptation.outcome_record import BaseRecord, Cost, OutcomeRecord, Scores, Source, TaskRecord
from regraft.diagnosis import read_diagnosis
from regraft.errors import OutcomeError, RecipeError
from regraft.report import write_report
from regraft.report.find import sanitise
from regraft.task.types import AnswerPair, Answers, MarkedText, Scatter, Span, Table, TextClassification
from regraft.task.types.class_metrics import ACCURACY
from regraft.task.types.view import Column, Series

ATTACK = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
REPORT_LABELS = ("joy", "anger", f"</script>{ATTACK}")
REPORT_METHODS = {  # test score, steps to scratch's last score, steps, labels
    "scratch": (0.902, None, 300, 2400),
    "direct": (0.843, None, 0, 0),
    "ridge": (0.881, None, 0, 0),
    "init": (0.909, 60, 300, 2400),
    "init+distill": (0.917, 30, 300, 2400),
}
CHARTS = {
    "1-methods",
    "1-learning",
    "connectivity-loss",
    "connectivity-score",
    "plane",
    "compatibility",
    "heads",
    "control",
    "attention-1",
    "attention-2",
    "attention-3",
    "cka",
    "distance-layers",
    "angles-layers",
    "distance-kinds",
    "angles-kinds",
    "kept",
    "calibration",
}
# Returns the contrast, the element and the text of each visible text, with WCAG's definition of contrast.
CONTRAST_SCRIPT = """
() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const luminance = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const background = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] > 0) return c; } return [255, 255, 255, 1]; };
  const contrasts = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || !e.checkVisibility() || e.closest('option')) continue;
    let ink = parse(getComputedStyle(e).color);
    if (e.closest('svg')) {
      ink = parse(getComputedStyle(e).fill);
      if (e.closest('[id*=plane]') || (ink[0] < 2 && ink[2] < 2) || ink[0] > 254) continue;  // on a colour map
    }
    const [a, b] = [luminance(ink), luminance(background(e))].sort((x, y) => y - x);
    contrasts.push([(a + 0.05) / (b + 0.05), e.tagName, texts.currentNode.textContent.trim().slice(0, 40)]);
  }
  return contrasts;
}
"""


def make_diagnosis(attack: str = ATTACK) -> dict:
    """Return a diagnosis as regraft 0.1 wrote it, with an answer to every question.

    Args:
        attack: Markup that a report has to escape, in names and texts.
    """
    text = Path(__file__).with_name("diagnosis.json").read_text(encoding="utf-8")
    for placeholder, markup in (("{attack[:40]}", attack[:40]), ("{attack}", attack), ("{ATTACK}", ATTACK)):
        text = text.replace(placeholder, json.dumps(markup)[1:-1])
    return json.loads(text)


def write_diagnosis(folder: Path, content: dict) -> Path:
    """Write the folder of a diagnosis."""
    folder.mkdir(parents=True)
    (folder / "diagnosis.json").write_text(json.dumps(content))
    return folder


def write_outcomes(folder: Path, seeds=(20, 21), task="feelings", attack: str = "") -> Path:
    """Write the outcome folders of a comparison, and of the old deployment."""
    old_base, new_base = (
        BaseRecord("models/small-v1", "sample:1a2b"),
        BaseRecord(f"models/small-v2{attack}", "sample:3c4d"),
    )
    old = _write_outcome(folder / "old", "tune", 20, task, old_base, None, (0.894, None, 300, 2400))
    source = Source(f"{old.path}/adaptation", "sample:5e6f", old_base.name, old_base.fingerprint, "proven")
    for seed in seeds:
        for method, figures in REPORT_METHODS.items():
            name = f"{method.replace('+', '-')}-seed{seed}{'<b>' if attack else ''}"
            _write_outcome(folder / name, method, seed, task, new_base, source, figures)
    return folder


def _write_outcome(out, method, seed, task, base, source, figures):
    rng = random.Random(f"{method} {seed}")
    score, steps_to_scratch, steps, labels = figures
    score = round(score + 0.002 * (seed - 20.5), 4)
    staging = out.parent / f".{out.name}.staging"
    (staging / "adaptation").mkdir(parents=True)
    time_constant = 75 if steps_to_scratch is None else steps_to_scratch / 2.5
    start = 0.42 if method in ("scratch", "tune") else 0.8 if steps else score
    curve = [
        {
            "step": step,
            "seconds": 0.21 * step,
            "score": round(score - (score - start) * math.exp(-step / time_constant), 4),
        }
        for step in range(0, steps + 1, 30)
    ]
    predictions = []
    for split, count in (("dev", 40), ("test", 200)):
        for row in range(count):
            label = row % 3
            prediction = label if rng.random() < score else (label + 1) % 3
            predictions.append({"split": split, "row": row, "label": label, "prediction": prediction})
    record = OutcomeRecord(
        method=method,
        kind="lora",
        inputs={"method": method, "options": {"alpha": 0.5} if "+" in method else None},
        task=TaskRecord(task, "accuracy", "d", 2400),
        labels=REPORT_LABELS,
        seed=seed,
        recipe={"steps": 300, "batch_size": 16, "learning_rate": 5e-4, "precision": "bf16", "seed": seed},
        scores=Scores(score, 0.41, score, 0.412, curve[0]["score"]),
        best_step=steps,
        cost=Cost(steps, 0.21 * steps + 1.4, labels),
        notes={},
        base=base,
        recycled_from=source,
        versions=versions(),
    )
    return write_outcome(staging, out, record, curve, predictions)


@pytest.fixture(scope="module")
def chromium():
    """A browser; the tests that need it are skipped if there is none and REGRAFT_BROWSER does not require one."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        message = "no chromium on this machine: the page cannot be opened (Debian: apt-get install chromium)"
        if os.environ.get("REGRAFT_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A diagnosis and a comparison with two seeds, with hostile examples, labels, names and paths."""
    folder = tmp_path_factory.mktemp("report") / "runs <i>&"
    folder.mkdir()
    write_diagnosis(folder / "check", make_diagnosis())
    write_outcomes(folder / "compare", attack=ATTACK)
    return folder


@pytest.fixture(scope="module")
def page_file(runs):
    return write_report(runs, runs.parent / "report.html")


@pytest.fixture
def visit(chromium):
    """A function that opens a page; the test fails if a page writes to the console, raises, or makes a request."""
    contexts = []
    events = []

    def record_external(request, file):
        if not request.url.startswith("data:") and request.url != file.as_uri():
            events.append(request.url)

    def open_page(file, width=1280, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("dialog", lambda dialog: events.append(dialog.message))
        page.on("request", lambda request: record_external(request, file))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert events == []


def read_chart_names(file):
    return re.findall(r'id="part-1-([\w-]+?)-[pm][0-9a-f]{10}"', file.read_text(encoding="utf-8"))


def test_page_has_all_charts_and_sound_structure(page_file, visit):
    page = visit(page_file)
    assert set(read_chart_names(page_file)) >= CHARTS
    assert page.locator("svg[role=img]").count() == len(CHARTS)
    for chart in page.locator("svg[role=img]").all():
        assert len(chart.get_attribute("aria-label")) > 30
        figure = chart.locator("xpath=ancestor::figure")
        assert figure.locator("details table tbody tr").count() >= 2
        box = chart.bounding_box()
        assert box["width"] > 250 and box["height"] > 80
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((e) => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"
    targets = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((a) => a.hash.slice(1))")
    assert set(targets) <= set(ids)


def test_markup_in_names_and_texts_is_shown_as_text(page_file, visit):
    page = visit(page_file)
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert page.locator("tr", has_text="needle").locator(".text").inner_text().startswith(f"needle {ATTACK}")
    assert ATTACK in page.locator("[data-label] option", has_text="script").first.text_content()
    assert ATTACK in page.locator("#part-1-provenance").inner_text()  # in names of bases
    assert "runs <i>&/compare/init-seed20<b>" in page.locator("#part-1-provenance").inner_text()  # in paths
    assert "$x_2$" in page.locator("figure svg").all_text_contents()[10]  # matplotlib reads no formula


def test_flips_are_searched_and_filtered(page_file, visit):
    page = visit(page_file)
    rows = page.locator("table.flips tbody tr:visible")
    assert rows.count() == 37
    page.get_by_label("Search").fill("WAITING again")
    assert rows.count() == 12 and page.locator("[data-count]").inner_text() == "12"
    page.get_by_label("Search").fill("needle <script>")
    assert rows.count() == 1
    page.get_by_label("Search").fill("nothing like it")
    assert rows.count() == 0 and page.get_by_text("No flip matches").is_visible()
    page.get_by_label("Search").fill("")
    page.locator("select[data-kind]").select_option("positive")
    assert rows.count() == 12
    page.locator("select[data-label]").select_option("anger")
    assert 0 < rows.count() < 12
    assert set(rows.locator("td:nth-child(4)").all_inner_texts()) == {"anger"}


def test_flips_with_a_target_each_have_no_filter_of_targets(tmp_path):
    content = make_diagnosis()
    for index, flip in enumerate(content["regressions"]["flips"]):
        flip["label"] = f"{index}.5"
    write_diagnosis(tmp_path / "check", content)
    page = write_report(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<select data-kind" in page
    assert "<select data-label" not in page


def test_chosen_theme_is_remembered(page_file, visit):
    page = visit(page_file, scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.get_by_role("button", name="Light theme").click()
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == light
    button = page.get_by_role("button", name="Dark theme")
    button.focus()
    page.keyboard.press("Enter")
    assert page.evaluate(background) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_sufficient_contrast(page_file, visit, scheme):
    page = visit(page_file, scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    contrasts = page.evaluate(CONTRAST_SCRIPT)
    assert len(contrasts) > 1000
    assert [entry for entry in contrasts if entry[0] < 4.5] == []  # WCAG's level AA


@pytest.mark.parametrize("width", [360, 768])
def test_page_never_scrolls_sideways(page_file, visit, width):
    page = visit(page_file, width=width)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("h1").bounding_box()["width"] <= width


def test_figures_equal_those_of_the_runs(page_file, runs, visit):
    text = visit(page_file).locator("main").inner_text()
    for figure in ("86 %", "0.062", "0.071", "p = 0.047", "92 %", "25 (2.5 %)", "0.083", "93.1 %", "0.061", "0.034"):
        assert figure in text, figure
    assert "a short tuning from the old weights should close the gap" in text.lower()
    assert make_diagnosis()["left_out"]["noise of seeds"] in text
    row = next(line for line in text.splitlines() if line.startswith("init+distill"))
    # the two seeds score 0.916 and 0.918; 100 % is scratch's 0.902, and 0 % the chance score of 0.412
    assert re.split(r"\s*\t\s*", row)[3:6] == ["0.917 ± 0.001", "103 %", "30"]
    outcome = json.loads((runs / "compare" / "init-seed20<b>" / "outcome.json").read_text())
    assert outcome["recycled_from"]["old_base"] in text


def test_negative_flips_are_counted_against_the_old_deployment(runs, visit, page_file):
    old_predictions = read_test_predictions(runs / "compare" / "old")
    shares = []
    for seed in (20, 21):
        pairs = zip(old_predictions, read_test_predictions(runs / "compare" / f"direct-seed{seed}<b>"), strict=True)
        flips = sum(old == label != new for (label, old), (_, new) in pairs)
        shares.append(flips / len(old_predictions))
    row = visit(page_file).locator("#part-1-methods tr", has_text="direct").first.inner_text()
    assert row.split("\t")[6].strip() == f"{50 * sum(shares):.1f} %"


@pytest.mark.slow
def test_views_of_any_task_type_are_drawn(tmp_path, visit):
    content = dataclasses.asdict(read_diagnosis(sanitise(make_diagnosis()), ""))
    table = Table("Errors", (Column("tag", "text"), Column("mean", "change")), ((f"B-PER{ATTACK}", 0.5), ("O", None)))
    points = Series("new", (-5.0, 90.0), (20.0, 70.0), (1, 3))
    views = (
        table,
        Scatter(
            name="spread",
            title="Spread",
            lead="Lead.",
            finding="A finding.",
            brief=("spread", "0.1"),
            x="true",
            y="predicted",
            diagonal="",
            joined=False,
            series=(points,),
            table=table,
        ),
        MarkedText(
            "Tags in context", ((Span("Ada "), Span("Lovelace", f"PER{ATTACK}"), Span(" wrote.")), (Span(ATTACK),))
        ),
        Answers(
            "Side by side",
            (
                AnswerPair(7, "negative", f"Name a fruit.\n{ATTACK}", None, "pear", f"{ATTACK} " * 300),
                AnswerPair(3, "changed", "Name a colour.", "red", "blue", " "),
            ),
        ),
    )
    content["answers"]["regressions"]["views"] = [dataclasses.asdict(view) for view in views]
    write_diagnosis(tmp_path / "check", json.loads(json.dumps(content)))
    page = visit(write_report(tmp_path, tmp_path / "page.html"))
    assert page.locator("caption", has_text="Errors").count() == 2  # the view, and the table of the scatter plot
    assert page.locator("section[id$=spread] svg").count() == 1
    assert page.locator("ul.marked li").first.inner_text() == f"Ada LovelacePER{ATTACK} wrote."
    assert page.locator("ul.marked mark").count() == 1
    assert page.locator("table.flips").count() == 0  # the answers are in place of it
    assert page.locator(".pair dt").all_inner_texts() == ["before", "after", "reference", "before", "after"]
    page.locator("[data-search]").fill("Colour RED")
    assert page.locator(".pair:visible .mark").all_inner_texts() == ["≠ changed answer row 3"]
    page.locator("[data-kind]").first.select_option("negative")
    assert page.locator(".pair:visible").count() == 0
    page.locator("[data-search]").fill("7")
    assert page.locator("[data-count]").inner_text() == "1"
    text = write_report(tmp_path, tmp_path / "page.md", "md").read_text(encoding="utf-8")
    assert "- row 3, changed answer\n  - prompt: Name a colour.\n  - reference: red\n" in text
    assert "Ada **Lovelace** (PER" in text
    assert "| B-PER" in text
    content["answers"]["regressions"]["views"][2]["view"] = "hologram"
    (tmp_path / "check" / "diagnosis.json").write_text(json.dumps(content))
    with pytest.raises(OutcomeError, match="regressions"):
        write_report(tmp_path, tmp_path / "other.html")


def test_markdown_has_the_same_figures(runs, tmp_path):
    file = write_report([runs], tmp_path / "report.md", "md", tmp_path / "plots")
    text = file.read_text(encoding="utf-8")
    for method in REPORT_METHODS:
        assert re.search(rf"^\| {re.escape(method)} \| ", text, re.M)
    for figure in ("0.917 ± 0.001", "103 %", "0.062", "p = 0.047", "25 (2.5 %)", "92 %", "86 % sure"):
        assert figure in text, figure
    for chart in CHARTS:
        assert f"plots/part-1-{chart}.svg" in text
        assert (tmp_path / "plots" / f"part-1-{chart}.svg").read_bytes().startswith(b"<?xml")
        assert (tmp_path / "plots" / f"part-1-{chart}.png").read_bytes().startswith(b"\x89PNG")
    outside_code = re.sub(r"^(```+)sh$.*?^\1$", "", text, flags=re.M | re.S)
    for markup in ("<script", "<img", "@someone", "~~y"):
        assert markup not in outside_code
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table:  # whatever the cells contain, all rows have as many cells as the head
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


@pytest.mark.slow
def test_equal_runs_give_equal_bytes(runs, page_file, tmp_path):
    second = write_report(runs, tmp_path / "second.html", plots=tmp_path / "html-plots")
    assert second.read_bytes() == page_file.read_bytes()
    write_report(runs, tmp_path / "second.md", "md", plots=tmp_path / "md-plots")
    for plot in sorted((tmp_path / "html-plots").iterdir()):
        assert plot.read_bytes() == (tmp_path / "md-plots" / plot.name).read_bytes(), plot.name


def test_sections_without_data_are_left_out(tmp_path, visit):
    content = make_diagnosis(attack="")
    for question in ("connectivity", "plane", "similarity", "kept"):
        content[question] = None
    content["compatibility"] = []
    content["regressions"] |= {"flips": [], "calibration": {}}
    content["left_out"] = {"similarity": "the bases have different numbers of heads"}
    write_diagnosis(tmp_path / "check", content)
    page = visit(write_report(tmp_path, tmp_path / "report.html"))
    titles = page.locator("h2").all_inner_texts()
    assert titles == ["Old weights on the new base", "Distance", "Regressions", "Provenance"]
    assert page.locator("table.flips").count() == 0
    assert page.get_by_text("the bases have different numbers of heads").count() == 1


def test_outcomes_without_a_diagnosis_make_a_page(tmp_path, visit):
    write_outcomes(tmp_path / "one", seeds=(20,))
    write_outcomes(tmp_path / "two", seeds=(20,), task="toxicity")
    page = visit(write_report([tmp_path / "one", tmp_path / "two", tmp_path], tmp_path / "report.html"))
    assert page.locator("h2").all_inner_texts() == ["feelings", "toxicity"]
    assert page.locator(".choice").all_inner_texts() == ["init+distill", "init+distill"]
    assert page.locator("#part-1-methods table").first.locator("tbody tr").count() == len(REPORT_METHODS)


def test_a_comparison_without_outcomes_is_shown(tmp_path, visit):
    row = {
        "method": "init",
        "seeds": [1],
        "start": 0.5,
        "dev": 0.9,
        "test": 0.876,
        "test_deviation": None,
        "recovery": 97.0,
        "steps_to_scratch": None,
        "seconds_to_scratch": None,
        "negative_flips": 0.031,
        "labels": 100,
        "steps": 50,
        "seconds": 9.0,
    }
    content = {
        "task": "mood",
        "metric": "accuracy",
        "split": "test",
        "old": 0.88,
        "majority": 0.5,
        "outcomes": [],
        "rows": [row],
    }
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    text = visit(write_report(tmp_path, tmp_path / "report.html")).locator("main").inner_text()
    assert "0.876" in text and "97 %" in text and "3.1 %" in text


def test_the_best_score_of_a_metric_to_minimise_is_the_lowest(tmp_path, monkeypatch, visit):
    error = dataclasses.replace(ACCURACY, name="error", higher_is_better=False, is_bounded=False)
    monkeypatch.setattr(TextClassification, "metrics", (*TextClassification.metrics, error))
    row = {
        "seeds": [1],
        "start": None,
        "test_deviation": None,
        "recovery": None,
        "steps_to_scratch": None,
        "seconds_to_scratch": None,
        "negative_flips": 0.0,
        "labels": 1,
        "steps": 1,
        "seconds": 1.0,
    }
    rows = [
        {**row, "method": method, "dev": score, "test": score}
        for method, score in (("scratch", 12345.6), ("init", 9876))
    ]
    content = {"task": "n", "metric": "error", "split": "test", "old": 11000, "majority": 30000, "outcomes": []}
    (tmp_path / "comparison.json").write_text(json.dumps({**content, "rows": rows}))
    main = visit(write_report(tmp_path, tmp_path / "report.html")).locator("main")
    text = main.inner_text()
    assert "init has the lowest error on test, 9,876; scratch has 12,346; the old deployment had 11,000." in text
    assert "error on test, lower is better" in main.inner_html()


REMOVED = object()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["schema"], 3, "schema 3"),
        (["verdict"], REMOVED, "verdict"),
        (["verdict", "sure"], "very", "verdict: sure"),
        (["connectivity", "loss", "dev", -1], REMOVED, "loss: dev"),
        (["similarity", "best", -1], REMOVED, "best"),
        (["similarity", "maps", 1, "new", -1], REMOVED, "maps"),
        (["regressions", "flips", 3, "kind"], "odd", "flips[3]: kind"),
        (["plane", "places"], [[0, 0]], "plane"),
        (["verdict", "choice"], None, "verdict: choice: expected 'use as is', "),
        (["check", "examples"], -1, "check: examples: expected 0 or more, found -1"),
        (["kept", "share"], 1e300, "kept: share: expected at most 1e+100"),
        (["check", "examples"], 10**400, "check: examples: expected at most 1e+100"),
        (["connectivity", "ends"], ["old"], "connectivity: ends"),
        (["seconds", "check"], [], "seconds: check: expected a number, found []"),
    ],
)
def test_malformed_diagnosis_is_named(tmp_path, keys, value, message):
    content = make_diagnosis()
    *parents, key = keys
    parent = functools.reduce(operator.getitem, parents, content)
    if value is REMOVED:
        del parent[key]
    else:
        parent[key] = value
    folder = write_diagnosis(tmp_path / "check", content)
    with pytest.raises(OutcomeError) as error:
        write_report(tmp_path, tmp_path / "report.html")
    assert str(folder / "diagnosis.json") in str(error.value) and message in str(error.value)
    assert "regraft check --deep" in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_diagnosis_of_regraft_0_1_shows_the_same_figures(tmp_path):
    content = json.loads(json.dumps(make_diagnosis("")))
    write_diagnosis(tmp_path / "check", content)
    report_of_schema_1 = write_report(tmp_path, tmp_path / "schema-1.md", "md").read_text(encoding="utf-8")
    converted = dataclasses.asdict(read_diagnosis(sanitise(content), ""))
    (tmp_path / "check" / "diagnosis.json").write_text(json.dumps(converted))
    assert write_report(tmp_path, tmp_path / "schema-2.md", "md").read_text(encoding="utf-8") == report_of_schema_1
    assert "predicted recovery 89 %" in report_of_schema_1 and "92 %" in report_of_schema_1


def test_invalid_files_and_missing_runs_are_named(tmp_path):
    (tmp_path / "check").mkdir()
    with pytest.raises(OutcomeError, match="no such folder"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")
    with pytest.raises(OutcomeError, match=r"found no outcome\.json"):
        write_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(RecipeError, match="html, md"):
        write_report(tmp_path, tmp_path / "report.html", "pdf")
    for text in ("{", "[]", '{"schema": 1}', '{"a":' + "[" * 600 + "]" * 600 + "}"):
        (tmp_path / "check" / "diagnosis.json").write_text(text)
        with pytest.raises(OutcomeError, match=r"check/diagnosis\.json"):
            write_report(tmp_path, tmp_path / "report.html")
    shutil.rmtree(tmp_path / "check")
    write_outcomes(tmp_path / "runs", seeds=(20,))
    for line in ("{}", '{"split": "test", "row": 0, "right": "no"}'):
        (tmp_path / "runs" / "direct-seed20" / "predictions.jsonl").write_text(line + "\n")
        with pytest.raises(OutcomeError, match=r"direct-seed20: is incomplete"):
            write_report(tmp_path, tmp_path / "report.html")


def test_command_writes_the_report_and_help_stays_light(tmp_path):
    write_diagnosis(tmp_path / "check", make_diagnosis())
    code = f"""
import sys
from typer.testing import CliRunner
from regraft.cli import app
help = CliRunner().invoke(app, ["--help"])
assert "report" in help.output
import regraft.report
heavy = {{"torch", "transformers", "matplotlib", "jinja2"}} & set(sys.modules)
assert not heavy, heavy
result = CliRunner().invoke(app, ["report", {str(tmp_path / "check")!r}, "--out", {str(tmp_path / "a.md")!r}])
assert result.exit_code == 0, result.output
assert "torch" not in sys.modules
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "a.md").read_text(encoding="utf-8").startswith("# What the upgrade did to feelings")


def test_diverged_figures_are_shown_as_not_finite(tmp_path):
    def replace_floats(value):
        if isinstance(value, dict):
            return {name: replace_floats(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [replace_floats(entry) for entry in value]
        if isinstance(value, float):
            return math.inf if value > 0.3 else math.nan
        return value

    write_diagnosis(tmp_path / "check", replace_floats(make_diagnosis()))
    text = write_report(tmp_path, tmp_path / "report.md", "md").read_text(encoding="utf-8")
    assert "the barrier is not finite on dev and not finite on test" in text


def test_files_with_invalid_content_are_named(tmp_path):
    run = write_outcomes(tmp_path / "runs", seeds=(20,)) / "direct-seed20"
    for name in ("outcome.json", "curve.jsonl", "predictions.jsonl", "comparison.json"):
        file = run / name
        original = file.read_bytes() if file.exists() else None
        for content in ("[]", "7", "[" * 100_000, " " * 33_000_000, None):
            file.unlink(missing_ok=True)
            if content is None:
                os.mkfifo(file)  # no process writes into it: reading would never end
            else:
                file.write_text(content)
            with pytest.raises(OutcomeError, match=re.escape(str(run))):
                write_report(tmp_path, tmp_path / "report.html")
        file.unlink()
        if original is not None:
            file.write_bytes(original)


def test_only_a_report_is_replaced(runs, page_file, tmp_path):
    page, empty, record, link = (tmp_path / name for name in ("page.md", "empty.html", "outcome.json", "link.html"))
    write_report(runs, page, "md")
    empty.touch()
    record.write_text('{"precious": true}')
    link.symlink_to(page)
    for out in (page_file, page, empty):
        with pytest.raises(RecipeError, match="no runs are named"):
            write_report([], out)
    for out in (record, link, Path("/dev/null"), tmp_path):
        with pytest.raises(OutcomeError, match=r"Choose another --out"):
            write_report([], out)
    assert record.read_text() == '{"precious": true}'
    assert link.is_symlink()
