"""The paper reproduced on tiny bases, interrupted and continued, and its figures computed by other means."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    LABELS,
    PAPER_CONFIGS,
    compute_accuracy,
    compute_logits,
    read_curve,
    read_modification_times,
    read_test_predictions,
    read_weights,
)

from regraft import Base, load_outcome
from regraft.model.examples import encode
from regraft.task import load_data

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import reproduce
from findings import experiment
from tables import select

NUM_CELLS = {
    "1-compatibility": 2 * 1,
    "2-connectivity": 2 * 4,
    "3-similarity": 1 + 2,
    "4-initialisation": 2 * 3,
    "5-distillation": 2 * (5 + 2),
    "6-projection": 2 * 2 * 4,
    "7-chain": 2,
}
"""The cells of each experiment with two seeds."""
CELLS_BEFORE_INTERRUPTION = 5


@pytest.fixture(scope="module")
def plan(paper_folder):
    return reproduce.make_plan(paper_folder / "size.yaml", paper_folder / "out", configs=paper_folder / "configs")


@pytest.fixture(scope="module")
def reports(paper_folder, plan):
    """Run all experiments, interrupted once; return the reports of the first run and of its continuation."""
    measure_cell = experiment.measure_cell
    first_reports = []
    second_reports = []

    def measure_until_interrupted(*arguments):
        if count_measured(first_reports) == CELLS_BEFORE_INTERRUPTION:
            raise KeyboardInterrupt
        return measure_cell(*arguments)

    experiment.measure_cell = measure_until_interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            reproduce.build_missing(plan, 0, first_reports.append)
    finally:
        experiment.measure_cell = measure_cell
    reproduce.write_measured(plan, paper_folder / "partial")
    assert reproduce.build_missing(plan, 0, second_reports.append) == []
    reproduce.write_measured(plan, paper_folder / "pages")
    return first_reports, second_reports


def count_measured(reports):
    return sum(": made" in line for line in reports)


@pytest.fixture
def results(paper_folder, reports):
    """A function that reads an experiment's results."""

    def read_results(name):
        return json.loads((paper_folder / "pages" / name / "results.json").read_text(encoding="utf-8"))

    return read_results


@pytest.mark.slow
def test_an_interrupted_run_continues_and_then_builds_nothing(paper_folder, plan, reports):
    first_reports, second_reports = reports
    assert count_measured(first_reports) == CELLS_BEFORE_INTERRUPTION
    assert len(second_reports) == sum(NUM_CELLS.values()) - CELLS_BEFORE_INTERRUPTION
    assert "**Not complete: " in (paper_folder / "partial" / "2-connectivity" / "README.md").read_text(encoding="utf-8")
    assert "not measured" in (paper_folder / "partial" / "README.md").read_text(encoding="utf-8")
    old_times = read_modification_times(plan.store.out)
    assert reproduce.build_missing(plan, 0, pytest.fail) == []
    new_times = read_modification_times(plan.store.out)
    assert new_times.keys() == old_times.keys()
    assert {file.name for file in new_times if file.is_file() and new_times[file] != old_times[file]} == {"size.json"}
    assert not [path for name in PAPER_CONFIGS for path in (plan.store.out / name).iterdir() if path.is_dir()]


@pytest.mark.slow
def test_every_experiment_has_results_and_a_page(paper_folder, results):
    index = (paper_folder / "pages" / "README.md").read_text(encoding="utf-8")
    for name in PAPER_CONFIGS:
        experiment_results = results(name)
        published = paper_folder / "pages" / name
        num_made, num_cells = experiment_results["made"]["cells"]
        assert num_made == num_cells > 0
        assert experiment_results["made"]["seeds"] == [20, 30]
        page = (published / "README.md").read_text(encoding="utf-8")
        assert "Not complete" not in page
        assert experiment_results["findings"]
        for finding in experiment_results["findings"]:
            assert finding["verdict"] in ("holds", "mixed", "does not hold")
            assert f"| {finding['claim']} | **{finding['verdict']}** | {finding['figure']} |" in page
            assert f"| {finding['part']} | {finding['claim']} | **{finding['verdict']}** | " in index
        pictures = list(published.glob("*.svg"))
        assert pictures
        assert all(f"({picture.name})" in page for picture in pictures)
        assert f"[{name}]({name}/README.md)" in index
    topics = ["compatibility", "mode connectivity", "functional similarity", "distance", "chains"]
    methods = ["`init`", "`distill`", "`init+distill`", "`interpolation`", "`project`", "`direct`"]
    assert [title for title in (*topics, *methods) if title not in index] == []


@pytest.mark.slow
def test_compatibility_agrees_with_outcomes_and_with_the_chain(plan, results):
    compatibility = results("1-compatibility")
    points = compatibility["points"]
    assert [point["steps"] for point in select(points, seed=20)] == [0, 2, 4, 6, 8]
    for row in select(results("7-chain")["runs"], method="direct"):
        if row["route"] != "at once":
            (point,) = select(points, seed=row["seed"], steps=4 * row["base"])
            assert point["score"] == pytest.approx(row["score"], abs=1e-5)
    old_predictions = read_test_predictions(plan.store.tuning_folder("mood", "full", 0, 20))
    (start,) = select(points, seed=20, steps=0)
    assert start["score"] == pytest.approx(compute_accuracy(old_predictions), abs=1e-5)
    assert (start["distance"], start["agreement"]) == (0, 1)
    (run,) = select(compatibility["runs"], seed=30, base=2)
    tuned_predictions = read_test_predictions(plan.store.tuning_folder("mood", "full", 2, 30))
    assert run["tuned"] == pytest.approx(compute_accuracy(tuned_predictions), abs=1e-5)
    labels = [label for label, _ in old_predictions]
    assert run["majority"] in (labels.count(0) / 40, labels.count(1) / 40)


@pytest.mark.slow
def test_connectivity_agrees_with_losses_of_single_models(plan, results):
    store = plan.store
    runs = results("2-connectivity")["runs"]
    data = load_data(store.task_file("mood"), 0).with_settings(max_length=16)
    assert data.labels == LABELS

    def compute_test_loss(base_index, seed, tokenizer_base):
        base = Base.open(store.base_name(base_index))
        examples = encode(tokenizer_base, data, data.test)
        logits = compute_logits(store.tuning_folder("mood", "full", base_index, seed), base, examples)
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(data.test.labels).long()))

    newest_base = Base.open(store.base_name(2))
    (line,) = select(runs, second=2, seed=20)
    start, middle, end = line["loss"]["test"]
    assert end == pytest.approx(compute_test_loss(2, 20, newest_base), abs=1e-4)
    assert line["barrier"]["test"] == pytest.approx(max(0.0, middle - (start + end) / 2), abs=2e-5)
    (same_base,) = select(runs, second=0, seed=20)
    assert same_base["loss"]["test"][-1] == pytest.approx(compute_test_loss(0, 30, newest_base), abs=1e-4)
    (one_seed_run,) = select(runs, one_seed=True, seed=20)
    assert (one_seed_run["first"], one_seed_run["second"]) == (0, 1)
    outcomes = [load_outcome(store.tuning_folder("mood", "full", base, seed)) for base, seed in ((0, 20), (1, 19))]
    assert [outcome.record.inputs["recipe"]["seed"] for outcome in outcomes] == [20, 20]


@pytest.mark.slow
def test_distances_agree_with_the_weights_without_the_head(plan, results):
    similarity = results("3-similarity")
    (distance,) = select(similarity["distances"], seed=30, base=1)
    old, new = (read_weights(plan.store.tuning_folder("mood", "full", base, 30) / "adaptation") for base in (0, 1))
    body_names = [name for name in sorted(old) if name.startswith("bert.") and "pooler" not in name]
    old_vector, new_vector = (
        torch.cat([tensors[name].flatten().double() for name in body_names]) for tensors in (old, new)
    )
    assert distance["l2"] == pytest.approx(float((old_vector - new_vector).norm()), rel=1e-4)
    cosine = torch.cosine_similarity(old_vector, new_vector, dim=0)
    assert distance["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    controls = {"another seed on M_0", "another task on M_0", "random weights"}
    assert {run["against"] for run in similarity["runs"]} == {"M_1", "M_2"} | controls
    assert len(similarity["bases"]) == 3


@pytest.mark.slow
def test_initialisation_is_compared_with_the_curve_of_scratch(plan, results):
    runs = select(results("4-initialisation")["runs"], seed=20)
    (run,), (scratch,) = (select(runs, **{"from": role}) for role in ("similar", "scratch"))
    curve = read_curve(plan.store.tuning_folder("mood", "full", 2, 20))
    assert scratch["curve"] == [[point["step"], pytest.approx(point["score"], abs=1e-4)] for point in curve]
    steps = [step for step, score in run["curve"] if score >= scratch["curve"][-1][1]]
    assert run["share"] == (100 * steps[0] / 40 if steps else None)
    assert [step for step, _ in run["curve"]] == [0, 20, 40]
    scores = [score for _, score in run["curve"]]
    assert run["area"] == pytest.approx((scores[0] + 2 * scores[1] + scores[2]) / 4, abs=1e-4)


@pytest.mark.slow
def test_distillation_differences_are_differences_of_mean_scores(plan, results):
    distillation = results("5-distillation")
    runs = distillation["runs"]
    teacher_folders = [plan.store.tuning_folder("mood", "full", 0, seed) for seed in (20, 30)]
    assert [run["test"] for run in select(runs, method="teacher")] == [
        pytest.approx(compute_accuracy(read_test_predictions(folder))) for folder in teacher_folders
    ]
    few_shot_runs = [run for run in runs if run["shots"]]
    assert {run["steps"] for run in few_shot_runs if run["method"].endswith(", longer")} == {20}
    assert {run["steps"] for run in few_shot_runs if not run["method"].endswith(", longer")} == {10}
    assert len(distillation["differences"]) == 9 + 2
    for difference in distillation["differences"]:
        gap = mean_test_score(runs, difference["method"]) - mean_test_score(runs, difference["against"])
        assert difference["estimate"] == pytest.approx(gap, abs=2e-5)
        assert difference["low"] <= difference["estimate"] <= difference["high"]


def mean_test_score(runs, method):
    return statistics.fmean(run["test"] for run in select(runs, method=method))


@pytest.mark.slow
def test_projection_is_compared_with_direct(results):
    projection = results("6-projection")
    projection_names = {"project, by regression", "project, by distillation", "project, as in the paper"}
    assert {run["method"] for run in projection["runs"]} == {"direct", "scratch", "old deployment"} | projection_names
    for difference in projection["differences"]:
        runs = select(projection["runs"], task=difference["task"])
        gap = mean_test_score(runs, difference["method"]) - mean_test_score(runs, "direct")
        assert difference["estimate"] == pytest.approx(gap, abs=2e-5)


@pytest.mark.slow
def test_chain_summaries_are_means_and_slopes(plan, results):
    chain = results("7-chain")
    (summary,) = select(chain["standings"], method="init+distill", route="at once")
    scores = []
    for base in range(3):
        runs = select(chain["runs"], base=base, method="init+distill" if base else "tune")
        scores.append(statistics.fmean(run["score"] for run in runs if run["route"] in (None, "at once")))
    assert summary["scores"] == pytest.approx(scores, abs=1e-4)
    assert summary["decay"] == pytest.approx(-100 * float(np.polyfit(range(3), scores, 1)[0]), abs=1e-2)
    assert {(row["base"], row["seed"]) for row in chain["all steps"]} == {(1, 20), (1, 30), (2, 20), (2, 30)}
    for row in chain["all steps"]:
        folder = plan.store.tuning_folder(row["task"], row["kind"], row["base"], row["seed"])
        assert row["score"] == load_outcome(folder).record.scores.test
