"""Chains of bases: adaptations recycled hop by hop and at once, reused outcomes, refusals, and summaries."""

import json
import math

import pytest
from helpers import read_modification_times, read_weights, write_upgrade
from typer.testing import CliRunner

from regraft.chain import Chain, ChainRow, read_chain, run_chain, summarise_routes
from regraft.cli import app
from regraft.errors import DataError, DiskFullError, OutcomeError

CHAIN = """
bases: [{bases}]
tasks: [{task}]
kinds: [full, lora]
methods: [direct, init]
tuning: {{steps: 40, learning_rate: 3e-3, eval_every: 20}}
recycling: {{steps: 4, eval_every: 2, learning_rate: {{full: 1e-4, lora: 3e-3}}}}
precision: fp32
"""


def find_row(rows, kind, method, **fields):
    """Return the first row of a kind and a method with further fields, such as its route."""
    return next(
        row
        for row in rows
        if (row.kind, row.method) == (kind, method) and all(getattr(row, name) == fields[name] for name in fields)
    )


@pytest.fixture(scope="module")
def chain_folder(tmp_path_factory, bases, task_file):
    """A folder with chain files of two and of three bases."""
    folder = tmp_path_factory.mktemp("chain")
    old, new = bases["bert"]
    last = write_upgrade(new, folder / "third", 0.05, seed=4)
    (folder / "short.yaml").write_text(CHAIN.format(bases=f"{old}, {new}", task=task_file))
    (folder / "chain.yaml").write_text(CHAIN.format(bases=f"{old}, {new}, third", task=task_file))
    assert Chain.load(folder / "chain.yaml").bases[2] == str(last)
    return folder


@pytest.fixture(scope="module")
def extended_run(chain_folder):
    """The rows of a chain to which a third base was added, and the files' modification times from before that."""
    run_chain(Chain.load(chain_folder / "short.yaml"), chain_folder / "out")
    times = read_modification_times(chain_folder)
    rows = run_chain(Chain.load(chain_folder / "chain.yaml"), chain_folder / "out")
    return rows, times


def test_every_method_runs_on_every_base_by_every_route(extended_run):
    rows, _ = extended_run
    assert len(rows) == 2 * (1 + 2 + 2 * (1 + 2))
    for kind in ("full", "lora"):
        hops = {method: set() for method in ("tune", "scratch", "direct", "init")}
        for row in rows:
            if row.kind == kind:
                hops[row.method].add((row.base, row.route))
        assert hops["tune"] == {(0, None)}
        assert hops["scratch"] == {(1, None), (2, None)}
        assert hops["direct"] == hops["init"] == {(1, None), (2, "hop by hop"), (2, "at once")}
    assert all(row.refused is None and row.negative_flips is not None for row in rows)


def test_direct_gives_equal_weights_hop_by_hop_and_at_once(chain_folder, extended_run):
    rows, _ = extended_run
    for kind in ("full", "lora"):
        hops, once = (find_row(rows, kind, "direct", route=route) for route in ("hop by hop", "at once"))
        hops_weights, once_weights = (
            read_weights(chain_folder / "out" / row.outcome / "adaptation") for row in (hops, once)
        )
        assert max(float((hops_weights[name] - once_weights[name]).abs().max()) for name in hops_weights) < 1e-5
        assert hops.score == once.score
        assert hops.steps == 0


def test_each_hop_starts_from_the_last_outcome(chain_folder, extended_run):
    rows, _ = extended_run
    hops, once = (find_row(rows, "full", "init", route=route) for route in ("hop by hop", "at once"))
    hops_record, once_record = (
        json.loads((chain_folder / "out" / row.outcome / "outcome.json").read_text()) for row in (hops, once)
    )
    assert hops_record["recycled_from"]["adaptation"].endswith("1-init/adaptation")
    assert once_record["recycled_from"]["adaptation"].endswith("0-tune/adaptation")
    assert hops_record["recycled_from"]["lineage"] == once_record["recycled_from"]["lineage"] == "proven"
    assert hops_record["recipe"]["learning_rate"] == 1e-4


def test_existing_outcomes_are_reused(chain_folder, extended_run):
    rows, times = extended_run
    changed = {file.name for file, time in times.items() if file.is_file() and file.stat().st_mtime_ns != time}
    assert changed <= {"chain.json"}
    weight_times = read_modification_times(chain_folder / "out", "*.safetensors")
    assert run_chain(Chain.load(chain_folder / "chain.yaml"), chain_folder / "out") == rows
    assert read_modification_times(chain_folder / "out", "*.safetensors") == weight_times
    base_names, stored_rows = read_chain(chain_folder / "out")
    assert stored_rows == rows
    assert len(base_names) == 3


def test_commands_run_and_show_a_chain(chain_folder, extended_run):
    rows, _ = extended_run
    shown = CliRunner().invoke(app, ["chain", "show", str(chain_folder / "out")], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert f"{find_row(rows, 'full', 'scratch', base=2).score:.3f}" in shown.stdout
    assert f"{find_row(rows, 'full', 'tune', base=0).score:.3f}" in shown.stdout
    assert "hop by hop" in shown.stdout
    arguments = ["chain", "run", str(chain_folder / "chain.yaml"), "--out", str(chain_folder / "out")]
    repeated = CliRunner().invoke(app, arguments)
    assert repeated.exit_code == 0
    assert "mood, lora" in repeated.stdout


def make_row(base, method, score, route=None, seed=20):
    return ChainRow(
        task="mood",
        kind="full",
        seed=seed,
        base=base,
        method=method,
        route=route,
        score=score,
        start=0.4,
        majority=0.5,
        negative_flips=0.1,
        steps=1,
        labels=1,
        outcome="x",
    )


def test_summaries_equal_those_computed_by_hand():
    rows = [
        make_row(0, "tune", 0.9),
        make_row(0, "tune", 0.8, seed=30),
        make_row(1, "scratch", 0.9),
        make_row(2, "scratch", 0.7),
        make_row(1, "scratch", 0.9, seed=30),
        make_row(2, "scratch", 0.9, seed=30),
        make_row(1, "init", 0.8),
        make_row(2, "init", 0.6, "hop by hop"),
        make_row(2, "init", 0.7, "at once"),
        make_row(1, "init", 0.7, seed=30),
        make_row(2, "init", 0.7, "hop by hop", seed=30),
    ]
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
    equal = [make_row(0, "tune", 0.9), make_row(1, "init", 0.9)]
    assert str(summarise_routes(["a", "b"], equal)[0].decay) == "0.0"  # not -0.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("methods: [direkt]", "direkt.*direct"),
        ("methods: [project]", "other tasks"),
        ("kinds: [lore]", "lore.*lora"),
        ("seeds: [20, 20]", "twice"),
        ("routes: [sideways]", "routes"),
        ("hops: 3", "hops"),
        ("shots: 0", "shots"),
        ("tuning: {step: 3}", "step"),
        ("bases: [one]", "bases"),
    ],
)
def test_invalid_chain_files_are_refused(tmp_path, task_file, line, message):
    key = line.split(":")[0]
    lines = {"bases": "bases: [one, two]", "tasks": f"tasks: [{task_file}]"}
    lines[key] = line
    (tmp_path / "chain.yaml").write_text("\n".join(lines.values()))
    with pytest.raises(DataError, match=rf"chain\.yaml.*{message}"):
        Chain.load(tmp_path / "chain.yaml")


def test_a_folder_without_a_chain_is_refused(tmp_path):
    with pytest.raises(OutcomeError, match=r"chain\.json.*regraft chain run"):
        read_chain(tmp_path)


def test_a_chain_record_with_nan_is_refused(chain_folder, extended_run, tmp_path):
    record = json.loads((chain_folder / "out" / "chain.json").read_text())
    record["rows"][1]["majority"] = math.nan
    (tmp_path / "chain.json").write_text(json.dumps(record))
    with pytest.raises(OutcomeError, match=r"chain\.json: rows\[1\]: majority: .*finite number.*regraft chain run"):
        read_chain(tmp_path)


def test_a_method_that_cannot_recycle_a_kind_is_recorded_as_refused(chain_folder, bases, task_file, tmp_path):
    old, new = bases["bert"]
    text = (
        CHAIN.replace("[full, lora]", "[bottleneck]")
        .replace("[direct, init]", "[masked, direct]")
        .replace("3e-3, eval", "2e-2, eval")
    )
    (tmp_path / "chain.yaml").write_text(text.format(bases=f"{old}, {new}, {chain_folder / 'third'}", task=task_file))
    rows = run_chain(Chain.load(tmp_path / "chain.yaml"), tmp_path / "out")
    refused = [row for row in rows if row.refused]
    assert {row.method for row in refused} == {"masked"}
    assert all(row.score is not None for row in rows if row.method == "direct")
    assert "bottleneck" in summarise_routes(["a", "b", "c"], rows)[1].refused


def test_an_adaptation_that_learned_nothing_does_not_end_the_chain(bases, task_file, tmp_path):
    old, new = bases["bert"]
    text = CHAIN.replace("[full, lora]", "[ia3, lora]").replace("steps: 40, learning_rate: 3e-3", "steps: 40")
    text = text.replace("tuning: {{", "tuning: {{learning_rate: {{ia3: 1e-30, lora: 3e-3}}, ").replace("direct, ", "")
    (tmp_path / "chain.yaml").write_text(text.format(bases=f"{old}, {new}", task=task_file))
    rows = run_chain(Chain.load(tmp_path / "chain.yaml"), tmp_path / "out")
    assert [(row.kind, row.method, bool(row.refused)) for row in rows] == [
        ("ia3", "tune", False),
        ("ia3", "scratch", True),
        ("ia3", "init", True),
        ("lora", "tune", False),
        ("lora", "scratch", False),
        ("lora", "init", False),
    ]
    assert "changes nothing" in rows[1].refused


def test_a_full_disk_ends_the_chain(chain_folder, tmp_path, monkeypatch):
    def raise_disk_full(*_, **__):
        raise DiskFullError("no room")

    monkeypatch.setattr("regraft.chain.run.tune", raise_disk_full)
    with pytest.raises(DiskFullError):
        run_chain(Chain.load(chain_folder / "short.yaml"), tmp_path / "out")


def test_two_tasks_that_would_share_a_folder_are_refused(task_file, tmp_path):
    for index, name in enumerate(("my task", "my/task")):
        text = task_file.read_text().replace("name: mood", f"name: {name}")
        (tmp_path / f"{index}.yaml").write_text(text.replace(": t", f": {task_file.parent}/t", 1))
    (tmp_path / "chain.yaml").write_text("bases: [one, two]\ntasks: [0.yaml, 1.yaml]\n")
    with pytest.raises(DataError, match=r"tasks called 'my task' and 'my/task' would share a folder"):
        Chain.load(tmp_path / "chain.yaml")
