"""The paper reproduced on tiny bases: it runs to the end, goes on, and its figures agree with other means."""

import dataclasses
import json
import random
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import LABELS, logits_of, sentence, weights, write_rows

from regraft import Base, load_outcome
from regraft.errors import DataError, MismatchError, OutcomeError
from regraft.model import encode
from regraft.task import load_data

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import reproduce
from findings import experiment, store
from findings.experiment import Finding, tell, tell_difference
from findings.runs import area, steps_to
from findings.settings import Size, load

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
CONFIGS = {
    "1-compatibility": {"tasks": {"full": ["mood"]}},
    "2-connectivity": {
        "tasks": {"full": ["mood"]}, "pairs": [[0, 0], [0, 1], [0, 2]], "one_seed": [[0, 1]], "points": 3,
    },
    "3-similarity": {"tasks": {"full": ["mood"]}, "controls": {"mood": "other"}, "texts": 8},
    "4-initialisation": {
        "old": 1, "new": 2,
        "targets": [{"task": "mood", "similar": "other", "unrelated": "third", "kinds": ["full"]}],
    },
    "5-distillation": {
        "upgrades": [{"task": "mood", "old": 0, "new": 1, "kinds": ["full"]}], "shots": [4],
        "longer": {"times": 2.0, "shots": [4], "methods": ["scratch", "distill"]},
    },
    "6-projection": {"tasks": {"lora": ["mood", "other"]}, "upgrades": [[0, 1]], "rank": 2, "steps": 2},
    "7-chain": {"tasks": {"full": ["mood"]}},
}  # fmt: skip
CELLS = 2 * 1 + 2 * 4 + (1 + 2) + 2 * 3 + 2 * (5 + 2) + 2 * 2 * 4 + 2


def write_files(folder, base):
    """Write a size of its own, its configs, its texts and its tasks."""
    whole = {"steps": 40, "batch_size": 16, "learning_rate": 3e-3, "eval_every": 20}
    few = whole | {"steps": 10, "eval_every": 5}
    tasks = {}
    for number, name in enumerate(("mood", "other", "third")):
        place = folder / "data" / name
        place.mkdir(parents=True)
        for split, count in (("train", 64), ("dev", 24), ("test", 40)):
            write_rows(place / f"{split}.csv", count, 10 * number + len(split))
            mistake_labels(place / f"{split}.csv")
        files = {split: str(place / f"{split}.csv") for split in ("train", "dev", "test")}
        tasks[name] = {"domain": "first", "task": {"name": name, "text": "text", "label": "label", **files}}
    domains = []
    for number, name in enumerate(("first", "second")):
        chance = random.Random(number)
        (folder / f"{name}.txt").write_text("\n".join(sentence(chance, number == 0) for _ in range(300)))
        domains.append({"name": name, "sources": [str(folder / f"{name}.txt")], "characters": 10_000})
    size = {
        "base": str(base), "domains": domains, "tasks": tasks, "max_length": 16, "seeds": [20, 30], "precision": "fp32",
        "pretraining": {"steps": 4, "batch_size": 8, "learning_rate": 3e-3, "block": 16, "keep_every": 2},
        "tuning": {"full": whole, "lora": whole | {"learning_rate": 1e-2}},
        "few_shot": {"full": few, "lora": few},
    }  # fmt: skip
    (folder / "size.yaml").write_text(yaml.safe_dump(size))
    for name, config in CONFIGS.items():
        (folder / "configs" / name).mkdir(parents=True)
        (folder / "configs" / name / "config.yaml").write_text(yaml.safe_dump(config))


def mistake_labels(file):
    """Give one row in five the other label: no model has all of them right, and each has others wrong."""
    head, *rows = file.read_text().splitlines()
    chance, names = random.Random(file.name), {"negative": "positive", "positive": "negative"}
    for place in chance.sample(range(len(rows)), len(rows) // 5):
        text, label = rows[place].rsplit(",", 1)
        rows[place] = f"{text},{names[label]}"
    file.write_text("\n".join([head, *rows]) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory, bases):
    folder = tmp_path_factory.mktemp("paper")
    write_files(folder, bases["bert"][0])
    return folder


@pytest.fixture(scope="module")
def plan(place):
    return reproduce.prepare(place / "size.yaml", place / "out", configs=place / "configs")


@pytest.fixture(scope="module")
def done(place, plan):
    """Everything, interrupted once among the cells; with what the first run and the second told."""
    real, first, second = experiment.make_cell, [], []

    def until_interrupted(*given):
        if sum(": made" in line for line in first) == 5:
            raise KeyboardInterrupt
        return real(*given)

    experiment.make_cell = until_interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            reproduce.build(plan, 0, first.append)
    finally:
        experiment.make_cell = real
    reproduce.write(plan, place / "partial")
    assert reproduce.build(plan, 0, second.append) == []
    reproduce.write(plan, place / "pages")
    return first, second


def results(place, name):
    return json.loads((place / "pages" / name / "results.json").read_text(encoding="utf-8"))


def rows_of(folder):
    found = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [(row["label"], row["prediction"]) for row in found if row["split"] == "test"]


def accuracy(pairs):
    return sum(label == guess for label, guess in pairs) / len(pairs)


@pytest.mark.slow
def test_interrupted_it_goes_on_and_then_builds_nothing(place, plan, done):
    first, second = done
    assert sum(": made" in line for line in first) == 5
    assert len(second) == CELLS - 5
    assert "**Not complete: " in (place / "partial" / "2-connectivity" / "README.md").read_text(encoding="utf-8")
    assert "not measured" in (place / "partial" / "README.md").read_text(encoding="utf-8")
    before = {file: file.stat().st_mtime_ns for file in plan.store.out.rglob("*") if file.name != "size.json"}
    assert reproduce.build(plan, 0, pytest.fail) == []
    after = {file: file.stat().st_mtime_ns for file in plan.store.out.rglob("*") if file.name != "size.json"}
    assert after.keys() == before.keys()
    assert {file for file in after if file.is_file() and after[file] != before[file]} == set()
    assert not [folder for name in CONFIGS for folder in (plan.store.out / name).iterdir() if folder.is_dir()]


@pytest.mark.slow
def test_every_experiment_has_results_and_a_page(place, done):
    index = (place / "pages" / "README.md").read_text(encoding="utf-8")
    for name in CONFIGS:
        found, folder = results(place, name), place / "pages" / name
        assert found["made"]["cells"][0] == found["made"]["cells"][1] > 0
        assert found["made"]["seeds"] == [20, 30]
        page = (folder / "README.md").read_text(encoding="utf-8")
        assert "Not complete" not in page
        assert found["findings"]
        for finding in found["findings"]:
            assert finding["verdict"] in ("holds", "mixed", "does not hold")
            assert f"| {finding['claim']} | **{finding['verdict']}** | {finding['figure']} |" in page
            assert f"| {finding['part']} | {finding['claim']} | **{finding['verdict']}** | " in index
        pictures = list(folder.glob("*.svg"))
        assert pictures
        assert all(f"({picture.name})" in page for picture in pictures)
        assert f"[{name}]({name}/README.md)" in index
    for part in ("compatibility", "mode connectivity", "functional similarity", "distance", "`init`", "`distill`",
                 "`init+distill`", "`interpolation`", "`project`", "`direct`", "chains"):  # fmt: skip
        assert part in index


@pytest.mark.slow
def test_figures_of_weights_by_hand(place, plan, done):
    kept = plan.store
    # 1: the outdated weights at the end of each hop score what a chain's `direct` does
    points = results(place, "1-compatibility")["points"]
    assert [point["steps"] for point in points if point["seed"] == 20] == [0, 2, 4, 6, 8]
    chain = [
        row for row in results(place, "7-chain")["runs"] if row["method"] == "direct" and row["route"] != "at once"
    ]
    for row in chain:
        point = next(p for p in points if (p["seed"], p["steps"]) == (row["seed"], 4 * row["base"]))
        assert point["score"] == pytest.approx(row["score"], abs=1e-5)
    old = kept.tuned("mood", "full", 0, 20)
    start = next(point for point in points if (point["seed"], point["steps"]) == (20, 0))
    assert start["score"] == pytest.approx(accuracy(rows_of(old)), abs=1e-5)
    assert (start["distance"], start["agreement"]) == (0, 1)
    run = next(r for r in results(place, "1-compatibility")["runs"] if (r["seed"], r["base"]) == (30, 2))
    assert run["tuned"] == pytest.approx(accuracy(rows_of(kept.tuned("mood", "full", 2, 30))), abs=1e-5)
    labels = [label for label, _ in rows_of(old)]
    assert run["majority"] in (labels.count(0) / 40, labels.count(1) / 40)
    # 2: the loss at the ends is the deployments' own, and the barrier the excess in the middle
    base, data = Base.open(kept.base(2)), load_data(kept.task_file("mood"), 0)
    texts = encode(base, data.with_settings(max_length=16), data.test)
    line = next(r for r in results(place, "2-connectivity")["runs"] if (r["second"], r["seed"]) == (2, 20))
    loss = torch.nn.functional.cross_entropy(
        logits_of(kept.tuned("mood", "full", 2, 20), base, texts), torch.tensor(data.test.labels).long()
    )
    assert data.labels == LABELS
    assert line["loss"]["test"][-1] == pytest.approx(float(loss), abs=1e-4)
    ends, middle = line["loss"]["test"][::2], line["loss"]["test"][1]
    assert line["barrier"]["test"] == pytest.approx(max(0.0, middle - statistics.fmean(ends)), abs=2e-5)
    same = next(r for r in results(place, "2-connectivity")["runs"] if r["second"] == 0 and r["seed"] == 20)
    other = logits_of(kept.tuned("mood", "full", 0, 30), Base.open(kept.base(0)), texts)
    loss = torch.nn.functional.cross_entropy(other, torch.tensor(data.test.labels).long())
    assert same["loss"]["test"][-1] == pytest.approx(float(loss), abs=1e-4)
    shared = next(r for r in results(place, "2-connectivity")["runs"] if r["one_seed"] and r["seed"] == 20)
    assert (shared["first"], shared["second"]) == (0, 1)
    seeds = [
        load_outcome(kept.tuned("mood", "full", *end)).record.inputs["recipe"]["seed"] for end in ((0, 20), (1, 19))
    ]
    assert seeds == [20, 20]
    # 3: the distance of all tensors but the head
    found = results(place, "3-similarity")
    apart = next(row for row in found["distances"] if (row["seed"], row["base"]) == (30, 1))
    one, two = (weights(kept.tuned("mood", "full", number, 30) / "adaptation") for number in (0, 1))
    body = [name for name in sorted(one) if name.startswith("bert.") and "pooler" not in name]
    flat = [torch.cat([tensors[name].flatten().double() for name in body]) for tensors in (one, two)]
    assert apart["l2"] == pytest.approx(float((flat[0] - flat[1]).norm()), rel=1e-4)
    assert apart["cosine"] == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-5)
    assert {run["against"] for run in found["runs"]} == {
        "M_1", "M_2", "another seed on M_0", "another task on M_0", "random weights",
    }  # fmt: skip
    assert len(found["bases"]) == 3


@pytest.mark.slow
def test_figures_of_runs_by_hand(place, plan, done):
    kept = plan.store
    # 4: steps and area against scratch's curve
    found = results(place, "4-initialisation")
    run, scratch = (
        next(r for r in found["runs"] if (r["from"], r["seed"]) == (role, 20)) for role in ("similar", "scratch")
    )
    curve = [json.loads(line) for line in (kept.tuned("mood", "full", 2, 20) / "curve.jsonl").read_text().splitlines()]
    assert scratch["curve"] == [[point["step"], pytest.approx(point["score"], abs=1e-4)] for point in curve]
    reached = [step for step, score in run["curve"] if score >= scratch["curve"][-1][1]]
    assert run["share"] == (100 * reached[0] / 40 if reached else None)
    scores = [score for _, score in run["curve"]]
    assert [step for step, _ in run["curve"]] == [0, 20, 40]
    assert run["area"] == pytest.approx((scores[0] + 2 * scores[1] + scores[2]) / 4, abs=1e-4)
    # 5: a difference is that of mean scores, and the teacher is the old deployment
    found = results(place, "5-distillation")
    teachers = [r["test"] for r in found["runs"] if r["method"] == "teacher"]
    assert teachers == [pytest.approx(accuracy(rows_of(kept.tuned("mood", "full", 0, seed)))) for seed in (20, 30)]
    means = {
        method: statistics.fmean(r["test"] for r in found["runs"] if r["method"] == method)
        for method in ("teacher", "scratch", "distill", "init+distill", "scratch, longer", "distill, longer")
    }
    assert {(r["method"].endswith(", longer"), r["steps"]) for r in found["runs"] if r["shots"]} == {
        (False, 10), (True, 20),
    }  # fmt: skip
    assert len(found["differences"]) == 9 + 2
    for row in found["differences"]:
        if {row["method"], row["against"]} <= means.keys():
            gap = means[row["method"]] - means[row["against"]]
            assert row["estimate"] == pytest.approx(gap, abs=2e-5)
            assert row["low"] <= row["estimate"] <= row["high"]
    # 6: against direct, which is no map at all
    found = results(place, "6-projection")
    assert {run["method"] for run in found["runs"]} == {
        "direct", "project, by regression", "project, by distillation", "project, as in the paper", "scratch",
        "old deployment",
    }  # fmt: skip
    for row in found["differences"]:
        tests = [
            statistics.fmean(r["test"] for r in found["runs"] if (r["task"], r["method"]) == (row["task"], method))
            for method in (row["method"], "direct")
        ]
        assert row["estimate"] == pytest.approx(tests[0] - tests[1], abs=2e-5)
    # 7: means over seeds, and the slope
    found = results(place, "7-chain")
    line = next(s for s in found["standings"] if (s["method"], s["route"]) == ("init+distill", "at once"))
    scores = [
        statistics.fmean(
            row["score"] for row in found["runs"]
            if row["base"] == number and (row["method"] == "tune" if number == 0 else row["method"] == "init+distill")
            and row["route"] in (None, "at once")
        ) for number in range(3)
    ]  # fmt: skip
    assert line["scores"] == pytest.approx(scores, abs=1e-4)
    assert line["decay"] == pytest.approx(-100 * float(np.polyfit(range(3), scores, 1)[0]), abs=1e-2)
    assert {(row["base"], row["seed"]) for row in found["all steps"]} == {(1, 20), (1, 30), (2, 20), (2, 30)}
    for row in found["all steps"]:
        outcome = load_outcome(plan.store.outcome(row["task"], row["kind"], row["base"], row["seed"]).path)
        assert row["score"] == outcome.record.scores.test


@pytest.mark.slow
def test_what_was_made_at_another_size_is_not_mixed_in(place, plan, done):
    size = plan.store.size
    longer = dataclasses.replace(plan.store, size=size.model_copy(update={"max_length": 12}))
    with pytest.raises(OutcomeError, match="other values of max_length"):
        reproduce.build(dataclasses.replace(plan, store=longer), 0)
    tuning = {"full": size.tuning["full"].model_copy(update={"steps": 9})}
    with pytest.raises(OutcomeError, match=r"tuning\.full"):
        store.check_size(dataclasses.replace(plan.store, size=size.model_copy(update={"tuning": tuning})))
    other = size.model_copy(update={"domains": size.domains[::-1]})
    with pytest.raises(OutcomeError, match="other values of domains"):
        store.check_size(dataclasses.replace(plan.store, size=other))
    more = size.model_copy(update={"seeds": (20, 30, 40), "domains": (*size.domains, size.domains[0])})
    store.check_size(dataclasses.replace(plan.store, size=more))
    chosen = reproduce.prepare(place / "size.yaml", place / "out", ["2"], configs=place / "configs").chosen
    (connectivity, config), = chosen  # fmt: skip
    assert connectivity.missing(plan.store, config) == []
    finer = config.model_copy(update={"points": 5})
    assert len(connectivity.missing(plan.store, finer)) == 8  # its cells' arguments are others


def test_configs_and_sizes_are_valid():
    for name in ("machine", "paper"):
        plan = reproduce.prepare(EXPERIMENTS / "paper" / f"{name}.yaml", Path("nowhere"))
        size, bases = plan.store.size, len(plan.store.size.domains) + 1
        assert size.seeds == (20, 30, 40)
        assert bases == 5
        names = [domain.name for domain in size.domains]
        assert all(task.domain in names for task in size.tasks.values())
        assert len(plan.chosen) == 7
        for one, config in plan.chosen:
            wanted = list(one.tunings(config, size.seeds, bases))
            assert {t.task for t in wanted} <= size.tasks.keys()
            assert {t.kind for t in wanted} <= size.tuning.keys() & size.few_shot.keys()
            assert max((t.base for t in wanted), default=0) < bases
            cells = one.cells(plan.store, config)
            assert len({cell.name for cell in cells}) == len(cells) > 0
            json.dumps([cell.arguments for cell in cells])
    assert set(CONFIGS) == {path.parent.name for path in (EXPERIMENTS / "paper").glob("*/config.yaml")}


def test_the_size_of_the_paper_loads_with_local_stand_ins(tmp_path, bases, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    values = yaml.safe_load((EXPERIMENTS / "paper" / "paper.yaml").read_text(encoding="utf-8"))
    values["base"] = str(bases["bert"][0])
    for domain in values["domains"]:
        folder = tmp_path / domain["sources"][0]
        folder.mkdir(parents=True)
        rows = [json.dumps({domain["column"]: f"text {number} of {folder.name}"}) for number in range(200)]
        (folder / "train.jsonl").write_text("\n".join(rows))
        domain["sources"], domain["characters"] = [str(folder)], 500
    for source in values["tasks"].values():
        task = source["task"]
        hub = task["train"]["dataset"]
        splits = {task[name]["split"]: 40 for name in ("train", "dev", "test") if name in task}
        stand_in(tmp_path / hub, task["text"], splits, task["label"], task["train"].get("config"))
        for name in {"train", "dev", "test"} & task.keys():
            task[name]["dataset"] = str(tmp_path / hub)
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(values))
    kept = store.Store(tmp_path / "out", load(Size, tmp_path / "paper.yaml"))
    store.write_data(kept)
    for name in kept.size.tasks:
        data = kept.data(name, 20)
        assert len(data.labels) == 2
        assert len(data.test) == 40
        assert data.max_length == 128
        held_out = "dev" not in values["tasks"][name]["task"]
        assert (len(data.train), len(data.dev)) == ((36, 4) if held_out else (40, 40))
    for domain in kept.size.domains:
        lines = (kept.out / "texts" / f"{domain.name}.jsonl").read_text(encoding="utf-8").splitlines()
        lengths = [len(json.loads(line)["text"]) for line in lines]
        assert sum(lengths[:-1]) < 500 <= sum(lengths)
    assert kept.recipe("full", 20, 2).epochs == 10
    assert kept.recipe("full", 20, 2).seed == 22
    assert kept.recipe("bottleneck", 20, 0, few=True).batch_size == 2


def stand_in(folder, text, splits, label, config):
    """Write a folder of data files as a data set of the Hub is one."""
    folder.mkdir(parents=True)
    for seed, (split, count) in enumerate(splits.items()):
        write_rows(folder / f"{split}.csv", count, seed)
        head, *rows = (folder / f"{split}.csv").read_text().splitlines()
        assert head == "text,label"
        (folder / f"{split}.csv").write_text("\n".join([f"{text},{label}", *rows]) + "\n")
    if config:
        files = [{"split": split, "path": f"{split}.csv"} for split in splits]
        front = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
        (folder / "README.md").write_text(f"---\n{front}---\n")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pretraining": {"stepps": 3}}, "unknown key 'pretraining.stepps'.*Did you mean 'steps'"),
        ({"seeds": [20]}, "the key 'seeds' is"),
        ({"domains": [{"name": "a", "characters": 5}]}, "needs either `demo` or `sources`"),
        ({"tasks": {"mood": {"domain": "first"}}}, "needs either `demo` or `task`"),
        (
            {
                "tasks": {
                    "mood": {"domain": "first", "task": {"name": "mood", "train": "a.csv", "text": "t", "label": "l"}}
                }
            },
            "of task mood needs a `test`",
        ),
        ({"max_length": "long"}, "the key 'max_length' is 'long'. Give a whole number of tokens"),
    ],
)
def test_a_size_that_cannot_be_used_is_refused(tmp_path, place, change, told):
    values = yaml.safe_load((place / "size.yaml").read_text()) | change
    (tmp_path / "size.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(DataError, match=told):
        load(Size, tmp_path / "size.yaml")


def test_an_experiment_that_is_not_there(place):
    with pytest.raises(DataError, match=r"no experiment 'similarty'.*3-similarity"):
        reproduce.prepare(place / "size.yaml", place / "nowhere", ["similarty"], configs=place / "configs")
    chosen = reproduce.prepare(place / "size.yaml", place / "nowhere", ["7", "similarity"], configs=place / "configs")
    assert [one.name for one, _ in chosen.chosen] == ["7-chain", "3-similarity"]


def test_a_cell_that_was_left_half_made_is_made_anew(tmp_path, plan):
    calls = []

    def run(kept, work, number):
        calls.append(number)
        work.mkdir()
        return {"number": number}

    cell, file = experiment.Cell("one", run, (3,)), tmp_path / "1-x" / "one.json"
    assert experiment.read_cell(file, cell) is None
    assert experiment.make_cell(plan.store, cell, file) == "made"
    assert experiment.read_cell(file, cell)["found"] == {"number": 3}
    assert not file.with_suffix("").exists()
    assert experiment.read_cell(file, dataclasses.replace(cell, arguments=(4,))) is None
    shutil.rmtree(file.parent)
    assert calls == [3]


def test_what_is_refused_is_written_down_and_not_tried_again(plan, tmp_path):
    def run(kept, work):
        raise MismatchError("it changes nothing")

    cells = [experiment.Cell("one", run, ()), experiment.Cell("two", lambda *_: {"score": 1}, ())]
    kept = dataclasses.replace(plan.store, out=tmp_path)
    one = dataclasses.replace(reproduce.experiments()[0], cells=lambda *_: cells)
    assert [experiment.make_cell(kept, cell, one.file(kept, cell)) for cell in cells] == [
        "refused: it changes nothing", "made",
    ]  # fmt: skip
    assert one.missing(kept, None) == []
    assert one.refused(kept, None) == {"one": "it changes nothing"}
    assert [cell["found"] for cell in one.found(kept, None)] == [{"score": 1}]


def test_verdicts_by_hand():
    assert tell("a", "p", [True] * 9 + [False], "f") == Finding("a", "holds", "in 9 of 10 cells; f", "p")
    assert tell("a", "p", [True] * 8 + [False] * 2, "f").verdict == "mixed"
    assert tell("a", "p", [True] + [False] * 9, "f").verdict == "does not hold"
    assert tell("a", "p", [], "f").verdict == "not measured"
    better, even, worse = ({"estimate": e, "low": e - 0.02, "high": e + 0.02} for e in (0.03, 0.0, -0.03))
    assert tell_difference("a", "p", [better, even]).verdict == "holds"
    assert tell_difference("a", "p", [better, worse]).verdict == "mixed"
    assert tell_difference("a", "p", [better, even, even]).verdict == "mixed"
    assert tell_difference("a", "p", [even, worse]).verdict == "does not hold"
    found = tell_difference("a", "p", [better, better, worse])
    assert found.figure == "+1.0 points on average; better in 2 and worse in 1 of 3 cells"


def test_speeds_by_hand():
    run = {"curve": [[0, 0.5], [10, 0.7], [30, 0.9]]}
    assert area(run) == pytest.approx((10 * 0.6 + 20 * 0.8) / 30)
    assert steps_to(run, 0.7) == 10
    assert steps_to(run, 0.95) is None
