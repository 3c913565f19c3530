"""The experiment over all methods, at a tiny size, and its tables against values computed by hand."""

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
from pathlib import Path

import numpy as np
import pytest
from conftest import move_base

from regraft import Recipe, Task
from regraft.errors import OutcomeError
from regraft.task import score

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import figures
import grid as plan
import runner
import tables
import targets

EXPERIMENTS = Path(figures.__file__).parent
METHODS = ("scratch", "direct", "init+distill, flip-aware")


@pytest.mark.parametrize(("name", "script"), [("methods", "methods"), ("verdict", "verdict"), ("paper", "reproduce")])
def test_published_pages_are_written_from_published_figures_alone(name, script, tmp_path, monkeypatch):
    folder = shutil.copytree(EXPERIMENTS / name, tmp_path / name)
    published = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for file in published:
        if file.suffix in (".md", ".svg"):
            (folder / file).unlink()
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "HERE" if name == "paper" else "RESULTS", folder)
    monkeypatch.setattr(sys, "argv", [script, "--write-only"])
    monkeypatch.chdir(tmp_path)  # where nothing has been run
    module.main()
    assert {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()} == published


def test_results_of_fewer_runs_take_the_place_of_none(tmp_path):
    results = {"made": {}, "runs": [{"seed": 1}, {"seed": 2}]}
    assert tables.write_results(tmp_path, results, lambda some: len(some["runs"])) == results
    with pytest.raises(OutcomeError, match="has the results of 2 runs, and 1 have been made here"):
        tables.write_results(tmp_path, results | {"runs": results["runs"][:1]}, lambda some: len(some["runs"]))
    assert tables.read_results(tmp_path) == results
    with pytest.raises(OutcomeError, match="is not there"):
        tables.read_results(tmp_path / "nothing")


@pytest.fixture(scope="module")
def grid(tmp_path_factory, bases, task_file, quick):
    folder = tmp_path_factory.mktemp("experiment")
    old, mild = bases["bert"]
    recipe = Recipe(steps=60, batch_size=16, learning_rate=3e-3, eval_every=5, precision="fp32")
    few = Recipe(steps=10, batch_size=16, learning_rate=3e-3, eval_every=5, precision="fp32")
    return plan.Grid(
        out=folder / "out",
        old=old,
        upgrades={"mild": mild, "heavy": move_base(old, folder / "heavy", 0.5)},
        tasks={"mood": Task.load(task_file)},
        tuning={"lora": quick},
        regimes=(
            plan.Regime("all", None, {"lora": recipe}, METHODS),
            plan.Regime("few", 8, {"lora": few}, ("scratch", "init", "there is no such method")),
        ),
        seeds=(20, 30),
        extras=(plan.Entry("init+distill, flip-aware", "init+distill", ("flip_weight=2",)),),
    )


def test_what_is_run(grid):
    every = list(plan.cells(grid))
    assert len(every) == 2 * 2 * (3 + 2)
    assert len({plan.cell_folder(grid, cell) for cell in every}) == len(every)
    assert {cell.entry for cell in every if cell.regime == "few"} == {"scratch", "init"}
    flip_aware = next(cell for cell in every if "flip" in cell.entry)
    name, options = plan.method_of(grid, flip_aware)
    assert (name, options.flip_weight) == ("init+distill", 2)
    assert {plan.recipe_of(grid, cell).seed for cell in every} == {20, 30}
    assert {plan.task_of(grid, cell).shots for cell in every} == {None, 8}


def test_what_a_run_is_held_against(grid):
    quarter = plan.Regime("quarter", None, grid.regimes[0].recipes, ("init",))
    three = dataclasses.replace(grid, regimes=(*grid.regimes, quarter))
    against = {cell.regime: figures.baseline(three, cell) for cell in plan.cells(three)}
    assert {name: cell.entry for name, cell in against.items()} == dict.fromkeys(("all", "few", "quarter"), "scratch")
    assert {name: cell.regime for name, cell in against.items()} == {"all": "all", "few": "few", "quarter": "all"}


@pytest.mark.slow
def test_interrupted_and_run_again(grid, monkeypatch):
    real, calls = runner.recycle, []

    def until_interrupted(*given, **named):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(given)
        return real(*given, **named)

    monkeypatch.setattr(runner, "recycle", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run(grid, workers=0, say=lambda text: None)
    assert len(runner.missing(grid)) == 20 - 7
    partial = figures.collect(grid)
    assert 0 < len(partial["runs"]) <= 7
    tables.page(partial, "")
    monkeypatch.setattr(runner, "recycle", real)
    done = []
    assert runner.run(grid, workers=0, say=done.append) == []
    assert len(done) == 20 - 7
    assert runner.missing(grid) == []
    before = {file: file.stat().st_mtime_ns for file in grid.out.rglob("*")}
    for name in ("recycle", "tune"):
        monkeypatch.setattr(runner, name, lambda *given, **named: pytest.fail("built again"))
    assert runner.run(grid, workers=0, say=lambda text: pytest.fail(text)) == []
    assert {file: file.stat().st_mtime_ns for file in grid.out.rglob("*")} == before
    check_figures(grid)
    changed = dataclasses.replace(grid, tuning={"lora": dataclasses.replace(grid.tuning["lora"], learning_rate=0.1)})
    with pytest.raises(OutcomeError, match=r"2 outcomes were made by another recipe.*mood-lora-seed20"):
        runner.run(changed, workers=0)


def rows(folder):
    found = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return [(row["label"], row["prediction"]) for row in found if row["split"] == "test"]


def curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def accuracy(pairs):
    return sum(label == guess for label, guess in pairs) / len(pairs)


def check_figures(grid):
    """Compute the figures of every run anew from the files, by other means."""
    results = json.loads(json.dumps(figures.collect(grid)))
    assert len(results["runs"]) == 20
    assert results["refused"] == []
    assert results["upgrades"]["heavy"]["l2"] > results["upgrades"]["mild"]["l2"] > 0
    for run in results["runs"]:
        cell = plan.Cell(**{name: run[name] for name in ("task", "upgrade", "kind", "regime", "entry", "seed")})
        folder = plan.cell_folder(grid, cell)
        scratch = folder.with_name(f"scratch-seed{cell.seed}")
        whole = grid.out / "cells" / f"mood-{cell.upgrade}-lora-all" / scratch.name
        test, best = accuracy(rows(folder)), accuracy(rows(whole))
        assert run["test"] == pytest.approx(test)
        assert run["majority"] == 0.5
        recovery = 100 * (test - 0.5) / (best - 0.5) if best - 0.5 >= 0.03 else None
        assert run["recovery"] == (recovery if recovery is None else pytest.approx(recovery, abs=1e-4))
        old = rows(grid.out / "old" / f"mood-lora-seed{cell.seed}")
        lost = sum(a == label != b for (label, a), (_, b) in zip(old, rows(folder), strict=True))
        assert run["negative_flips"] == pytest.approx(lost / 100)
        ours, theirs = curve(folder), curve(scratch)
        steps = [point["step"] for point in ours if point["score"] >= theirs[-1]["score"]]
        share = 100 * steps[0] / theirs[-1]["step"] if steps else None
        assert run["share"] == (share if share is None else pytest.approx(share, abs=1e-4))
        is_reference = (cell.entry, cell.regime) == ("scratch", "all")
        assert (folder / "adaptation").exists() == is_reference  # the other weights are cleared away
    one, other = (rows(grid.out / "cells" / "mood-heavy-lora-all" / f"scratch-seed{seed}") for seed in (20, 30))
    both = [(a == label, b == label) for (label, a), (_, b) in zip(one, other, strict=True)]
    noise = next(row for row in results["noise"] if (row["upgrade"], row["regime"]) == ("heavy", "all"))
    assert noise["negative_flips"] == pytest.approx(statistics.fmean(a != b for a, b in both) / 2)
    direct = tables.select(results["runs"], regime="all", upgrade="heavy", entry="direct")
    written = tables.page(results, "# Title")
    first, second = (run["test"] for run in sorted(direct, key=lambda run: run["seed"]))
    assert f"{(first + second) / 2:.3f} ± {abs(first - second) / 2**0.5:.3f}" in written
    assert "## auto" not in written
    assert "## 8 labels a class" in written


def test_failures_do_not_stop_the_rest():
    def broken():
        raise ValueError("no such luck")

    said = []
    failed = runner.run_jobs([("one", broken, ()), ("two", lambda: "good", ())], 0, said.append)
    assert len(failed) == 1
    assert "no such luck" in failed[0]
    assert said[1].startswith("two: good")


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_difference_over_seeds(metric):
    random = np.random.default_rng(0)
    labels = random.integers(3, size=60).tolist()
    ours, theirs = ([np.where(random.random(60) < p, labels, 0).tolist() for _ in range(2)] for p in (0.9, 0.3))
    found = figures.difference(metric, labels, ours, theirs)

    def plain(chosen):
        at = np.asarray(labels)[chosen]
        gaps = [
            score(metric, at, np.asarray(a)[chosen]) - score(metric, at, np.asarray(b)[chosen])
            for a, b in zip(ours, theirs, strict=True)
        ]
        return statistics.fmean(gaps)

    assert found["estimate"] == pytest.approx(plain(np.arange(60)), abs=1e-5)
    resampled = [plain(random.integers(60, size=60)) for _ in range(300)]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.05)
    assert found["low"] > 0
    assert figures.difference(metric, labels, ours, ours) == {"estimate": 0, "low": 0, "high": 0}


def made_up(entry, test, share, upgrade="heavy", regime="all", seed=20, steps=100.0, **more):
    where = {"task": "mood", "upgrade": upgrade, "kind": "full", "regime": regime, "entry": entry, "seed": seed}
    figures = {
        "test": test, "dev": test, "start": 0.5, "old": 0.9, "majority": 0.5, "headroom": 0.4,
        "recovery": 100 * (test - 0.5) / 0.4, "share": share, "negative_flips": 0.1, "steps": steps, "seconds": 2.0,
        "labels": 10, "steps_share": steps, "seconds_share": 50.0, "labels_share": 50.0,
    }  # fmt: skip
    return where | figures | more


def results_by_hand(gain=0.04, end=0.0):
    recipe = {"batch_size": 16, "learning_rate": 1e-3}
    about = {
        "scratch": ["labels", "training"], "direct": [], "scaled": ["labels"], "init": ["labels", "training"],
        "auto": ["labels", "training"],
    }  # fmt: skip
    runs = [
        *(made_up("scratch", 0.9, 100.0, seed=seed) for seed in (20, 30)),
        *(made_up("direct", test, None, seed=seed, steps=0.0) for test, seed in ((0.7, 20), (0.8, 30))),
        *(made_up("scaled", 0.78, 0.0, seed=seed, steps=0.0) for seed in (20, 30)),
        *(made_up("init", 0.92, share, seed=seed) for share, seed in ((20.0, 20), (None, 30))),
        *(made_up("auto", 0.915, 20.0, seed=seed, steps=25.0, chosen="init", why="") for seed in (20, 30)),
        *(made_up("init", 0.86, 40.0, regime="few", seed=seed) for seed in (20, 30)),
        *(made_up("init", 0.93, 25.0, regime="quarter", seed=seed, steps=25.0) for seed in (20, 30)),
    ]
    return {
        "made": {
            "versions": [{"torch": "2"}], "seeds": [20, 30], "old_tuning": {}, "tasks": {},
            "regimes": [
                {"name": "all", "shots": None, "recipes": {"full": {**recipe, "steps": 100}}},
                {"name": "quarter", "shots": None, "recipes": {"full": {**recipe, "steps": 25}}},
                {"name": "few", "shots": 32, "recipes": {}},
            ],
        },
        "upgrades": {"heavy": {"l2": 12.3, "relative": 0.25, "cosine": 0.9}},
        "methods": {name: {"method": name, "options": [], "needs": needs} for name, needs in about.items()},
        "runs": runs,
        "differences": [
            {"task": "mood", "upgrade": "heavy", "kind": "full", "regime": "all", "entry": "scaled",
             "against": "direct", "seeds": 2, "estimate": gain, "low": gain - 0.01, "high": gain + 0.01},
            {"task": "mood", "upgrade": "heavy", "kind": "full", "regime": "all", "entry": "init",
             "against": "scratch", "seeds": 2, "estimate": end, "low": end - 0.01, "high": end + 0.01},
        ],
        "noise": [{"task": "mood", "upgrade": "heavy", "kind": "full", "regime": "all", "negative_flips": 0.05}],
        "refused": [],
    }  # fmt: skip


def test_page_against_values_by_hand():
    written = tables.page(results_by_hand(), "# Title").splitlines()
    assert "| direct | 0.750 ± 0.071 (62 ± 18) |" in written
    assert "| scaled | 0.780 ± 0.000 (70 ± 0); +4.0 [+3.0, +5.0] |" in written
    assert "| scaled | +4.0 | 1 | 0 | 1 | 2.0 |" in written
    assert "| init | never | 1 of 2 | 105 | 0 | 0 | 1 | 10.0 | 2 |" in written  # the median of 20 and never
    assert "| scratch | 100 | 0 of 2 | 100 | 0 | 0 | – | 10.0 | 2 |" in written
    assert any("never % [1]; flips 10.0 (5.0)" in line for line in written)
    assert "| init | 90 | 90 | 0 of 2 | – | 10.0 |" in written
    row = "| auto | mood | heavy | full | init; init | 25 | 50 | 50 | 0.915 ± 0.000 | init (quarter) 0.930 | -1.5 |"
    assert row in written
    assert "All labels; 25 of 100 steps (full), scratch always with the whole." in "\n".join(written)
    assert any(
        line.startswith("| heavy | 12 (25%) | full | 0.500 / 0.900 ± 0.000 / 0.750 ± 0.071 /") for line in written
    )


def test_targets_by_hand():
    free, speed, few, ending, auto = targets.targets(results_by_hand())
    assert free.reached
    assert free.found == "scaled: +4.0 points on heavy, worse in 0 of 1 cells"
    assert speed.reached
    assert speed.found == "init: 25 %"
    assert not few.reached
    assert few.found == "init: 90 %"
    assert ending.reached
    assert not auto.reached
    assert auto.found.startswith("in 0 of 1 cells; median 1.5 points")
    free, _, _, ending, _ = targets.targets(results_by_hand(gain=0.02, end=-0.02))
    assert not free.reached
    assert not ending.reached
    better = results_by_hand()
    better["runs"] = [run for run in better["runs"] if run["regime"] != "quarter"]
    assert targets.targets(better)[-1].reached
    better["runs"] = [run | {"steps_share": 60.0} if run["entry"] == "auto" else run for run in better["runs"]]
    assert not targets.targets(better)[-1].reached


def test_what_other_tasks_a_method_learns_from(grid):
    two = dataclasses.replace(grid, tasks={"mood": grid.tasks["mood"], "other": grid.tasks["mood"]})
    two = dataclasses.replace(two, regimes=(dataclasses.replace(grid.regimes[0], entries=("scratch", "project")),))
    cell = next(cell for cell in plan.cells(two) if cell.entry == "project" and cell.task == "mood")
    assert plan.needs_tasks(cell, two)
    assert not plan.needs_tasks(dataclasses.replace(cell, entry="scratch"), two)
    _, options = plan.method_of(two, cell)
    new = two.out / "cells" / f"other-{cell.upgrade}-lora-all"
    assert options.pairs == tuple(f"{two.out}/old/other-lora-seed{seed}={new}/scratch-seed{seed}" for seed in (20, 30))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_runner(tmp_path, how):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import runner, time, pathlib, os\n"
        "def work(folder): (pathlib.Path(folder) / str(os.getpid())).touch(); time.sleep(100)\n"
        "if __name__ == '__main__': runner.run_jobs([('a', work, (sys.argv[2],))] * 2, 2, print)\n"
    )
    script, started = tmp_path / "script.py", tmp_path / "started"
    script.write_text(code)
    started.mkdir()
    process = subprocess.Popen([sys.executable, script, Path(runner.__file__).parent, started])
    deadline = time.monotonic() + 60
    while len(workers := os.listdir(started)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    process.wait()
    while alive := [worker for worker in workers if Path("/proc", worker).exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
