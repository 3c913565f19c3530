"""Adaptations carried along a chain of bases: hop by hop and at once, gone on with, and its figures by hand."""

import json

import pytest
from conftest import move_base, weights
from typer.testing import CliRunner

from regraft.chain import Chain, ChainRow, read_chain, run_chain, summarise_routes
from regraft.cli import app
from regraft.errors import DataError, DiskFullError, OutcomeError

FILE = """
bases: [{bases}]
tasks: [{task}]
kinds: [full, lora]
methods: [direct, init]
tuning: {{steps: 40, learning_rate: 3e-3, eval_every: 20}}
recycling: {{steps: 4, eval_every: 2, learning_rate: {{full: 1e-4, lora: 3e-3}}}}
precision: fp32
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, bases, task_file):
    folder = tmp_path_factory.mktemp("chain")
    old, new = bases["bert"]
    last = move_base(new, folder / "third", 0.05, seed=4)
    (folder / "short.yaml").write_text(FILE.format(bases=f"{old}, {new}", task=task_file))
    (folder / "chain.yaml").write_text(FILE.format(bases=f"{old}, {new}, third", task=task_file))
    assert Chain.load(folder / "chain.yaml").bases[2] == str(last)
    return folder


@pytest.fixture(scope="module")
def done(place):
    """A chain of two bases that a third was added to; with what there was before that."""
    run_chain(Chain.load(place / "short.yaml"), place / "out")
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*") if file.is_file()}
    rows = run_chain(Chain.load(place / "chain.yaml"), place / "out")
    return rows, before


def test_what_is_run(done):
    rows, _ = done
    assert len(rows) == 2 * (1 + 2 + 2 * (1 + 2))
    found = {(row.kind, row.base, row.method, row.route) for row in rows}
    for kind in ("full", "lora"):
        assert (kind, 0, "tune", None) in found
        assert {base for k, base, method, _ in found if (k, method) == (kind, "scratch")} == {1, 2}
        assert {(base, route) for k, base, method, route in found if (k, method) == (kind, "init")} == {
            (1, None), (2, "hop by hop"), (2, "at once"),
        }  # fmt: skip
    assert all(row.refused is None and row.negative_flips is not None for row in rows)


def test_direct_is_the_same_hop_by_hop_and_at_once(place, done):
    rows, _ = done
    for kind in ("full", "lora"):
        one, other = (
            next(row for row in rows if (row.kind, row.method, row.route) == (kind, "direct", route))
            for route in ("hop by hop", "at once")
        )
        first, second = (weights(place / "out" / row.outcome / "adaptation") for row in (one, other))
        assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
        assert one.score == other.score
        assert one.steps == 0


def test_each_hop_goes_on_from_the_last(place, done):
    rows, _ = done
    hop = next(row for row in rows if (row.kind, row.method, row.route) == ("full", "init", "hop by hop"))
    once = next(row for row in rows if (row.kind, row.method, row.route) == ("full", "init", "at once"))
    of = {name: json.loads((place / "out" / row.outcome / "outcome.json").read_text()) for name, row in
          (("hop", hop), ("once", once))}  # fmt: skip
    assert of["hop"]["recycled_from"]["adaptation"].endswith("1-init/adaptation")
    assert of["once"]["recycled_from"]["adaptation"].endswith("0-tune/adaptation")
    assert of["hop"]["recycled_from"]["lineage"] == of["once"]["recycled_from"]["lineage"] == "proven"
    assert of["hop"]["recipe"]["learning_rate"] == 1e-4


def test_a_base_added_later_leaves_the_rest_alone(place, done):
    _, before = done
    changed = {file.name for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert changed <= {"chain.json"}
    again = {file: file.stat().st_mtime_ns for file in (place / "out").rglob("*.safetensors")}
    rows = run_chain(Chain.load(place / "chain.yaml"), place / "out")
    assert rows == done[0]
    assert {file: file.stat().st_mtime_ns for file in (place / "out").rglob("*.safetensors")} == again
    names, stored = read_chain(place / "out")
    assert stored == rows
    assert len(names) == 3


def test_command(place, done):
    shown = CliRunner().invoke(app, ["chain", "show", str(place / "out")], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    scratch, first = (
        next(row.score for row in done[0] if (row.kind, row.method, row.base) == ("full", method, base))
        for method, base in (("scratch", 2), ("tune", 0))
    )
    assert f"{scratch:.3f}" in shown.stdout
    assert f"{first:.3f}" in shown.stdout
    assert "hop by hop" in shown.stdout
    ran = CliRunner().invoke(app, ["chain", "run", str(place / "chain.yaml"), "--out", str(place / "out")])
    assert ran.exit_code == 0
    assert "mood, lora" in ran.stdout


def row(base, method, score, route=None, seed=20, **more):
    given = {"start": 0.4, "majority": 0.5, "negative_flips": 0.1, "steps": 1, "labels": 1, "outcome": "x"}
    return ChainRow("mood", "full", seed, base, method, route, score, **(given | more))


def test_standings_by_hand():
    rows = [
        row(0, "tune", 0.9), row(0, "tune", 0.8, seed=30),
        row(1, "scratch", 0.9), row(2, "scratch", 0.7), row(1, "scratch", 0.9, seed=30),
        row(2, "scratch", 0.9, seed=30),
        row(1, "init", 0.8), row(2, "init", 0.6, "hop by hop"), row(2, "init", 0.7, "at once"),
        row(1, "init", 0.7, seed=30), row(2, "init", 0.7, "hop by hop", seed=30),
    ]  # fmt: skip
    scratch, hops, once = summarise_routes(["a", "b", "c"], rows)
    assert (scratch.method, scratch.scores, scratch.decay) == ("scratch", (None, 0.9, pytest.approx(0.8)), None)
    assert hops.scores == pytest.approx((0.85, 0.75, 0.65))
    assert hops.decay == pytest.approx(0.10)
    assert hops.deviations[1] == pytest.approx(0.1 / 2**0.5)
    assert hops.recoveries[0] is None
    assert hops.recoveries[1] == pytest.approx((0.75 + 0.50) / 2)
    assert hops.recoveries[2] == pytest.approx((0.50 + 0.50) / 2)
    assert once.route == "at once"
    assert once.scores == pytest.approx((0.85, 0.75, 0.7))
    assert (hops.seeds, once.seeds) == (2, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("methods: [direkt]", "direkt.*direct"), ("methods: [project]", "other tasks"), ("kinds: [lore]", "lore.*lora"),
        ("seeds: [20, 20]", "twice"), ("routes: [sideways]", "routes"), ("hops: 3", "hops"), ("shots: 0", "shots"),
        ("tuning: {step: 3}", "step"), ("bases: [one]", "bases"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, task_file, change, says):
    key = change.split(":")[0]
    lines = {"bases": "bases: [one, two]", "tasks": f"tasks: [{task_file}]"}
    lines[key] = change
    (tmp_path / "chain.yaml").write_text("\n".join(lines.values()))
    with pytest.raises(DataError, match=rf"chain\.yaml.*{says}"):
        Chain.load(tmp_path / "chain.yaml")


def test_no_chain(tmp_path):
    with pytest.raises(OutcomeError, match=r"chain\.json.*regraft chain run"):
        read_chain(tmp_path)


def test_a_method_that_does_not_carry_a_kind_is_told_and_passed_over(place, bases, task_file, tmp_path):
    old, new = bases["bert"]
    text = (
        FILE.replace("[full, lora]", "[bottleneck]")
        .replace("[direct, init]", "[masked, direct]")
        .replace("3e-3, eval", "2e-2, eval")
    )
    (tmp_path / "chain.yaml").write_text(text.format(bases=f"{old}, {new}, {place / 'third'}", task=task_file))
    rows = run_chain(Chain.load(tmp_path / "chain.yaml"), tmp_path / "out")
    refused = [row for row in rows if row.refused]
    assert {row.method for row in refused} == {"masked"}
    assert all(row.score is not None for row in rows if row.method == "direct")
    assert "bottleneck" in summarise_routes(["a", "b", "c"], rows)[1].refused


def test_an_adaptation_that_learned_nothing_ends_no_chain(place, bases, task_file, tmp_path):
    old, new = bases["bert"]
    text = FILE.replace("[full, lora]", "[ia3, lora]").replace("steps: 40, learning_rate: 3e-3", "steps: 40")
    text = text.replace("tuning: {{", "tuning: {{learning_rate: {{ia3: 1e-30, lora: 3e-3}}, ").replace("direct, ", "")
    (tmp_path / "chain.yaml").write_text(text.format(bases=f"{old}, {new}", task=task_file))
    rows = run_chain(Chain.load(tmp_path / "chain.yaml"), tmp_path / "out")
    assert [(row.kind, row.method, bool(row.refused)) for row in rows] == [
        ("ia3", "tune", False), ("ia3", "scratch", True), ("ia3", "init", True),
        ("lora", "tune", False), ("lora", "scratch", False), ("lora", "init", False),
    ]  # fmt: skip
    assert "changes nothing" in rows[1].refused


def test_a_disk_that_is_full_ends_a_chain(place, tmp_path, monkeypatch):
    def full(*_, **__):
        raise DiskFullError("no room")

    monkeypatch.setattr("regraft.chain.run.tune", full)
    with pytest.raises(DiskFullError):
        run_chain(Chain.load(place / "short.yaml"), tmp_path / "out")


def test_two_tasks_of_one_folder_are_refused(place, task_file, tmp_path):
    for number, name in enumerate(("my task", "my/task")):
        text = task_file.read_text().replace("name: mood", f"name: {name}")
        (tmp_path / f"{number}.yaml").write_text(text.replace(": t", f": {task_file.parent}/t", 1))
    (tmp_path / "chain.yaml").write_text("bases: [one, two]\ntasks: [0.yaml, 1.yaml]\n")
    with pytest.raises(DataError, match=r"two tasks are called 'my task' and 'my/task'"):
        Chain.load(tmp_path / "chain.yaml")
