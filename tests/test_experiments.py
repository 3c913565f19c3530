"""The experiment over all methods at a tiny size, and its tables compared with values computed by hand."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import compute_accuracy, read_curve, read_modification_times, read_test_predictions, write_upgrade

from regraft import Recipe, Task
from regraft.errors import OutcomeError
from regraft.task import score

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import figures
import grid
import methods_page
import results_file
import runner
import tables
import targets

EXPERIMENTS = Path(figures.__file__).parent
ENTRY_NAMES = ("scratch", "direct", "init+distill, flip-aware")


@pytest.mark.parametrize(
    ("name", "script", "constant"),
    [
        ("methods", "methods", "RESULTS"),
        ("verdict", "verdict", "RESULTS"),
        ("task_types", "task_types", "RESULTS"),
        ("paper", "reproduce", "PUBLISHED"),
    ],
)
def test_published_pages_are_written_from_published_figures_alone(name, script, constant, tmp_path, monkeypatch):
    folder = shutil.copytree(EXPERIMENTS / name, tmp_path / name)
    published = read_files(folder)
    for file in published:
        if file.suffix in (".md", ".svg"):
            (folder / file).unlink()
    module = importlib.import_module(script)
    monkeypatch.setattr(module, constant, folder)
    monkeypatch.setattr(sys, "argv", [script, "--write-only"])
    monkeypatch.chdir(tmp_path)  # a working directory without outcomes of runs
    module.main()
    assert read_files(folder) == published


def read_files(folder):
    """Return the content of each file by its path in the folder."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_results_of_fewer_runs_do_not_replace_results_of_more(tmp_path):
    def count_runs(results):
        return len(results["runs"])

    results = {"made": {}, "runs": [{"seed": 1}, {"seed": 2}]}
    assert results_file.write_results(tmp_path, results, count_runs) == results
    with pytest.raises(OutcomeError, match="has the results of 2 runs, but only 1 have been made here"):
        results_file.write_results(tmp_path, results | {"runs": results["runs"][:1]}, count_runs)
    assert results_file.read_results(tmp_path) == results
    with pytest.raises(OutcomeError, match="does not exist"):
        results_file.read_results(tmp_path / "nothing")


@pytest.fixture(scope="module")
def tiny_grid(tmp_path_factory, bases, task_file, quick_recipe):
    """A grid of 20 cells: one task and kind, two upgrades, two regimes and two seeds."""
    folder = tmp_path_factory.mktemp("experiment")
    old, mild = bases["bert"]
    recipe = Recipe(steps=60, batch_size=16, learning_rate=3e-3, eval_every=5, precision="fp32")
    few_shot_recipe = Recipe(steps=10, batch_size=16, learning_rate=3e-3, eval_every=5, precision="fp32")
    return grid.Grid(
        out=folder / "out",
        old_base=old,
        upgrades={"mild": mild, "heavy": write_upgrade(old, folder / "heavy", 0.5)},
        tasks={"mood": Task.load(task_file)},
        old_recipes={"lora": quick_recipe},
        regimes=(
            grid.Regime("all", None, {"lora": recipe}, ENTRY_NAMES),
            grid.Regime("few", 8, {"lora": few_shot_recipe}, ("scratch", "init", "there is no such method")),
        ),
        seeds=(20, 30),
        extra_entries=(grid.Entry("init+distill, flip-aware", "init+distill", ("flip_weight=2",)),),
    )


def test_the_grid_has_a_cell_per_task_upgrade_entry_and_seed(tiny_grid):
    cells = list(grid.iterate_cells(tiny_grid))
    assert len(cells) == 2 * 2 * (3 + 2)
    assert len({grid.cell_folder(tiny_grid, cell) for cell in cells}) == len(cells)
    assert {cell.entry for cell in cells if cell.regime == "few"} == {"scratch", "init"}
    flip_aware = next(cell for cell in cells if "flip" in cell.entry)
    assert grid.cell_entry(tiny_grid, flip_aware).method == "init+distill"
    assert grid.cell_options(tiny_grid, flip_aware).flip_weight == 2
    assert {grid.cell_recipe(tiny_grid, cell).seed for cell in cells} == {20, 30}
    assert {grid.cell_task(tiny_grid, cell).shots for cell in cells} == {None, 8}


def test_a_cell_is_compared_with_the_scratch_of_its_regime_or_of_all_labels(tiny_grid):
    quarter = grid.Regime("quarter", None, tiny_grid.regimes[0].recipes, ("init",))
    extended = dataclasses.replace(tiny_grid, regimes=(*tiny_grid.regimes, quarter))
    scratch_cells = {cell.regime: figures.scratch_cell(extended, cell) for cell in grid.iterate_cells(extended)}
    assert {cell.entry for cell in scratch_cells.values()} == {"scratch"}
    scratch_regimes = {regime: cell.regime for regime, cell in scratch_cells.items()}
    assert scratch_regimes == {"all": "all", "few": "few", "quarter": "all"}


@pytest.mark.slow
def test_an_interrupted_run_continues(tiny_grid, monkeypatch):
    recycle = runner.recycle
    calls = []
    num_cells = len(list(grid.iterate_cells(tiny_grid)))
    calls_before_interruption = 7

    def recycle_until_interrupted(*arguments, **options):
        if len(calls) == calls_before_interruption:
            raise KeyboardInterrupt
        calls.append(arguments)
        return recycle(*arguments, **options)

    monkeypatch.setattr(runner, "recycle", recycle_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_missing(tiny_grid, workers=0, report=lambda line: None)
    assert len(runner.missing_cells(tiny_grid)) == num_cells - calls_before_interruption
    partial_results = figures.collect_results(tiny_grid)
    assert 0 < len(partial_results["runs"]) <= calls_before_interruption
    methods_page.write_page(partial_results, "")
    monkeypatch.setattr(runner, "recycle", recycle)
    reports = []
    assert runner.run_missing(tiny_grid, workers=0, report=reports.append) == []
    assert len(reports) == num_cells - calls_before_interruption
    assert runner.missing_cells(tiny_grid) == []
    times = read_modification_times(tiny_grid.out)

    def fail_on_rebuild(*arguments, **options):
        pytest.fail("built again")

    for name in ("recycle", "tune"):
        monkeypatch.setattr(runner, name, fail_on_rebuild)
    assert runner.run_missing(tiny_grid, workers=0, report=pytest.fail) == []
    assert read_modification_times(tiny_grid.out) == times
    check_figures(tiny_grid)
    changed_recipe = dataclasses.replace(tiny_grid.old_recipes["lora"], learning_rate=0.1)
    with pytest.raises(OutcomeError, match=r"2 outcomes were made by a different recipe.*mood-lora-seed20"):
        runner.run_missing(dataclasses.replace(tiny_grid, old_recipes={"lora": changed_recipe}), workers=0)


def check_figures(tiny_grid):
    """Compare the figures of all runs with values computed from their files by other means."""
    results = json.loads(json.dumps(figures.collect_results(tiny_grid)))
    assert len(results["runs"]) == 20
    assert results["refused"] == []
    assert results["upgrades"]["heavy"]["l2"] > results["upgrades"]["mild"]["l2"] > 0
    for run in results["runs"]:
        check_run(tiny_grid, run)
    cell_folder = tiny_grid.out / "cells" / "mood-heavy-lora-all"
    scratch_20, scratch_30 = (read_test_predictions(cell_folder / f"scratch-seed{seed}") for seed in (20, 30))
    # each disagreement is a negative flip in one of the two directions
    num_disagreements = sum(
        (a == label) != (b == label) for (label, a), (_, b) in zip(scratch_20, scratch_30, strict=True)
    )
    noise = next(row for row in results["noise"] if (row["upgrade"], row["regime"]) == ("heavy", "all"))
    assert noise["negative_flips"] == pytest.approx(num_disagreements / len(scratch_20) / 2)
    page = methods_page.write_page(results, "# Title")
    direct_runs = tables.select(results["runs"], regime="all", upgrade="heavy", entry="direct")
    scores = [run["test"] for run in direct_runs]
    assert f"{statistics.fmean(scores):.3f} ± {statistics.stdev(scores):.3f}" in page
    assert "## auto" not in page
    assert "## 8 labels a class" in page


def check_run(tiny_grid, run):
    """Compare the figures of a run with the predictions and curves of the run, of scratch and of the old model."""
    cell = grid.Cell(**{name: run[name] for name in ("task", "upgrade", "kind", "regime", "entry", "seed")})
    folder = grid.cell_folder(tiny_grid, cell)
    scratch = folder.with_name(f"scratch-seed{cell.seed}")
    reference = tiny_grid.out / "cells" / f"mood-{cell.upgrade}-lora-all" / scratch.name
    predictions = read_test_predictions(folder)
    score = compute_accuracy(predictions)
    reference_score = compute_accuracy(read_test_predictions(reference))
    assert run["test"] == pytest.approx(score)
    assert run["majority"] == 0.5
    if reference_score - 0.5 >= 0.03:
        assert run["recovery"] == pytest.approx(100 * (score - 0.5) / (reference_score - 0.5), abs=1e-4)
    else:
        assert run["recovery"] is None
    old_predictions = read_test_predictions(tiny_grid.out / "old" / f"mood-lora-seed{cell.seed}")
    num_flips = sum(old == label != new for (label, old), (_, new) in zip(old_predictions, predictions, strict=True))
    assert run["negative_flips"] == pytest.approx(num_flips / 100)
    last_point = read_curve(scratch)[-1]
    steps = [point["step"] for point in read_curve(folder) if point["score"] >= last_point["score"]]
    assert run["share"] == (pytest.approx(100 * steps[0] / last_point["step"], abs=1e-4) if steps else None)
    is_reference = (cell.entry, cell.regime) == ("scratch", "all")
    assert (folder / "adaptation").exists() == is_reference  # the runner removes all other weights


def test_a_failed_job_does_not_stop_the_others():
    def fail():
        raise ValueError("no such luck")

    reports = []
    jobs = [runner.Job("first", fail), runner.Job("second", lambda: "good")]
    failures = runner.run_jobs(jobs, 0, reports.append)
    assert len(failures) == 1
    assert "no such luck" in failures[0]
    assert reports[1].startswith("second: good")


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_bootstrap_difference_agrees_with_resampling(metric):
    random = np.random.default_rng(0)
    labels = random.integers(3, size=60)

    def draw_predictions(share_right):
        """Draw the predictions of two seeds."""
        return [np.where(random.random(60) < share_right, labels, 0) for _ in range(2)]

    good = draw_predictions(0.9)
    poor = draw_predictions(0.3)

    def mean_gap(indices):
        good_scores, poor_scores = (
            [score(metric, labels[indices], predictions[indices]) for predictions in predictions_by_seed]
            for predictions_by_seed in (good, poor)
        )
        return statistics.fmean(a - b for a, b in zip(good_scores, poor_scores, strict=True))

    difference = figures.bootstrap_difference(metric, labels, good, poor)
    assert difference["estimate"] == pytest.approx(mean_gap(np.arange(60)), abs=1e-5)
    resampled = [mean_gap(random.integers(60, size=60)) for _ in range(300)]
    interval = [difference["low"], difference["high"]]
    assert interval == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.05)
    assert difference["low"] > 0
    assert figures.bootstrap_difference(metric, labels, good, good) == {"estimate": 0, "low": 0, "high": 0}


def make_run(entry, test, share, regime="all", seed=20, steps=100.0, **notes):
    """Return the figures of a run, with a test score and a share of scratch's steps."""
    return {
        "task": "mood",
        "upgrade": "heavy",
        "kind": "full",
        "regime": regime,
        "entry": entry,
        "seed": seed,
        "test": test,
        "dev": test,
        "start": 0.5,
        "old": 0.9,
        "majority": 0.5,
        "headroom": 0.4,
        "recovery": 100 * (test - 0.5) / 0.4,
        "share": share,
        "negative_flips": 0.1,
        "steps": steps,
        "seconds": 2.0,
        "labels": 10,
        "steps_share": steps,
        "seconds_share": 50.0,
        "labels_share": 50.0,
        **notes,
    }


def make_difference(entry, against, estimate):
    """Return the difference of two entries' scores over two seeds, with an interval of ±0.01."""
    cell = {"task": "mood", "upgrade": "heavy", "kind": "full", "regime": "all", "entry": entry, "against": against}
    return cell | {"seeds": 2, "estimate": estimate, "low": estimate - 0.01, "high": estimate + 0.01}


def make_results(scaled_gain=0.04, init_gain=0.0):
    """Return results whose tables can be computed by hand."""
    recipe = {"batch_size": 16, "learning_rate": 1e-3}
    needs = {
        "scratch": ["labels", "training"],
        "direct": [],
        "scaled": ["labels"],
        "init": ["labels", "training"],
        "auto": ["labels", "training"],
    }
    runs = [
        *(make_run("scratch", 0.9, 100.0, seed=seed) for seed in (20, 30)),
        *(make_run("direct", test, None, seed=seed, steps=0.0) for test, seed in ((0.7, 20), (0.8, 30))),
        *(make_run("scaled", 0.78, 0.0, seed=seed, steps=0.0) for seed in (20, 30)),
        *(make_run("init", 0.92, share, seed=seed) for share, seed in ((20.0, 20), (None, 30))),
        *(make_run("auto", 0.915, 20.0, seed=seed, steps=25.0, chosen="init", why="") for seed in (20, 30)),
        *(make_run("init", 0.86, 40.0, regime="few", seed=seed) for seed in (20, 30)),
        *(make_run("init", 0.93, 25.0, regime="quarter", seed=seed, steps=25.0) for seed in (20, 30)),
    ]
    return {
        "made": {
            "versions": [{"torch": "2"}],
            "seeds": [20, 30],
            "old_tuning": {},
            "tasks": {},
            "regimes": [
                {"name": "all", "shots": None, "recipes": {"full": {**recipe, "steps": 100}}},
                {"name": "quarter", "shots": None, "recipes": {"full": {**recipe, "steps": 25}}},
                {"name": "few", "shots": 32, "recipes": {}},
            ],
        },
        "upgrades": {"heavy": {"l2": 12.3, "relative": 0.25, "cosine": 0.9}},
        "methods": {
            name: {"method": name, "options": [], "needs": method_needs} for name, method_needs in needs.items()
        },
        "runs": runs,
        "differences": [
            make_difference("scaled", "direct", scaled_gain),
            make_difference("init", "scratch", init_gain),
        ],
        "noise": [{"task": "mood", "upgrade": "heavy", "kind": "full", "regime": "all", "negative_flips": 0.05}],
        "refused": [],
    }


def test_the_page_has_values_computed_by_hand():
    lines = methods_page.write_page(make_results(), "# Title").splitlines()
    assert "| direct | 0.750 ± 0.071 (62 ± 18) |" in lines
    assert "| scaled | 0.780 ± 0.000 (70 ± 0); +4.0 [+3.0, +5.0] |" in lines
    assert "| scaled | +4.0 | 1 | 0 | 1 | 2.0 |" in lines
    assert (
        "| init | never | 1 of 2 | 105 | 0 | 0 | 1 | 10.0 | 2 |" in lines
    )  # one seed reaches scratch's score at 20%, one never
    assert "| scratch | 100 | 0 of 2 | 100 | 0 | 0 | – | 10.0 | 2 |" in lines
    assert any("never % [1]; flips 10.0 (5.0)" in line for line in lines)
    assert "| init | 90 | 90 | 0 of 2 | – | 10.0 |" in lines
    auto = "| auto | mood | heavy | full | init; init | 25 | 50 | 50 | 0.915 ± 0.000 | init (quarter) 0.930 | -1.5 |"
    assert auto in lines
    assert "All labels; 25 of 100 steps (full), scratch always with the whole." in "\n".join(lines)
    baselines = "| heavy | 12 (25%) | full | 0.500 / 0.900 ± 0.000 / 0.750 ± 0.071 /"
    assert any(line.startswith(baselines) for line in lines)


class TaggerOutcome:
    """An outcome of token classification, with the tag index of each word of two test sentences."""

    def __init__(self, path, predictions):
        self.path = path
        self.record = types.SimpleNamespace(labels=("O", "B-A", "I-A"))
        self.predictions = lambda split: predictions
        rows = [{"split": "test", "label": [1, 2, 0]}, {"split": "test", "label": [1]}]
        (path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_differences_of_taggers_are_in_spans(tmp_path):
    values = {"type": "token-classification", "name": "t", "train": "a.jsonl", "words": "w", "tags": "t"}
    regime = grid.Regime("whole", None, {"lora": Recipe(steps=1)}, ("scratch", "init"))
    tasks = {"tagging": Task.from_mapping(values, "t.yaml")}
    tagger_grid = grid.Grid(tmp_path, tmp_path, {"mild": tmp_path}, tasks, {"lora": Recipe(steps=1)}, (regime,), (20,))
    predictions = {"scratch": [[1, 2, 0], [0]], "init": [[1, 2, 0], [1]]}
    outcomes = {cell: TaggerOutcome(tmp_path, predictions[cell.entry]) for cell in grid.iterate_cells(tagger_grid)}
    (row,) = figures._collect_differences(tagger_grid, outcomes)
    assert (row["entry"], row["against"], row["estimate"]) == ("init", "scratch", pytest.approx(1 - 2 / 3, abs=1e-4))


def test_the_page_of_task_types_has_scores_recoveries_flips_and_costs_by_task():
    task_types = importlib.import_module("task_types")
    results = make_results()
    results["made"]["tasks"] = {"mood": {"metric": "pearson", "max_length": 8, "labels": 0}}
    results["runs"] = [run for run in results["runs"] if run["regime"] == "all"]
    page = task_types.write_types_page(results, " A remark.")
    lines = page.splitlines()
    assert "are wrong now. A remark." in page
    assert "Guessing 0.500, the old deployment 0.900 ± 0.000 on test." in lines
    assert "| method | heavy: pearson | recovery % | negative flips % | steps | seconds |" in lines
    assert "| direct | 0.750 ± 0.071 | 62 ± 18 | 10.0 ± 0.0 | 0 | 2 |" in lines
    assert "What was aimed at" not in page


def test_targets_are_judged_as_by_hand():
    training_free, speed, few_labels, final_score, auto = targets.judge_targets(make_results())
    assert training_free.is_reached
    assert training_free.measured == "scaled: +4.0 points on heavy, worse in 0 of 1 cells"
    assert speed.is_reached
    assert speed.measured == "init: 25 %"
    assert not few_labels.is_reached
    assert few_labels.measured == "init: 90 %"
    assert final_score.is_reached
    assert not auto.is_reached
    assert auto.measured.startswith("in 0 of 1 cells; median 1.5 points")
    training_free, _, _, final_score, _ = targets.judge_targets(make_results(scaled_gain=0.02, init_gain=-0.02))
    assert not training_free.is_reached
    assert not final_score.is_reached


def test_the_target_of_auto_depends_on_score_and_cost():
    results = make_results()
    results["runs"] = [run for run in results["runs"] if run["regime"] != "quarter"]
    assert targets.judge_targets(results)[-1].is_reached
    results["runs"] = [run | {"steps_share": 60.0} if run["entry"] == "auto" else run for run in results["runs"]]
    assert not targets.judge_targets(results)[-1].is_reached


def test_project_learns_from_outcomes_of_the_other_tasks(tiny_grid):
    regime = dataclasses.replace(tiny_grid.regimes[0], entry_names=("scratch", "project"))
    tasks = {"mood": tiny_grid.tasks["mood"], "other": tiny_grid.tasks["mood"]}
    extended = dataclasses.replace(tiny_grid, tasks=tasks, regimes=(regime,))
    cell = next(cell for cell in grid.iterate_cells(extended) if (cell.entry, cell.task) == ("project", "mood"))
    assert grid.needs_other_tasks(extended, cell)
    assert not grid.needs_other_tasks(extended, dataclasses.replace(cell, entry="scratch"))
    old, new = extended.out / "old", extended.out / "cells" / f"other-{cell.upgrade}-lora-all"
    assert grid.cell_options(extended, cell).pairs == tuple(
        f"{old}/other-lora-seed{seed}={new}/scratch-seed{seed}" for seed in (20, 30)
    )


WORKER_SCRIPT = """
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import runner


def work(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(100)


if __name__ == "__main__":
    runner.run_jobs([runner.Job("work", work, (sys.argv[2],))] * 2, 2, print)
"""


def wait_until(condition, deadline):
    """Wait until a condition holds, or fail at a deadline of `time.monotonic`."""
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("interrupt", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_runner(tmp_path, interrupt):
    script, started = tmp_path / "script.py", tmp_path / "started"
    script.write_text(WORKER_SCRIPT)
    started.mkdir()
    process = subprocess.Popen([sys.executable, script, Path(runner.__file__).parent, started])
    deadline = time.monotonic() + 60
    wait_until(lambda: len(os.listdir(started)) >= 2, deadline)
    workers = os.listdir(started)
    process.send_signal(interrupt)
    process.wait()
    wait_until(lambda: not any(Path("/proc", worker).exists() for worker in workers), deadline)
