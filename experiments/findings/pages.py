"""Write the published files of an experiment, and the index of the paper's claims."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from results_file import read_results, write_results
from tables import MISSING, markdown_table

from regraft.checkpoint import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from findings.experiment import Experiment, Page
    from findings.store import Store

INDEX_INTRODUCTION = """# The paper's claims, tested

*Recyclable Tuning for Continual Pre-training* (Qin et al., Findings of ACL 2023, arXiv:2305.08702): each of its
findings and methods, the experiment that tests it, and whether it holds at this size. `scratch`, the paper's baseline,
is what the experiments on methods are held against. Made by `python experiments/reproduce.py`, which builds only what
is missing; `python experiments/reproduce.py NAME` builds one experiment.

A claim is looked for in cells: a task, a kind of adaptation, and a hop or a line between two bases. It **holds** if it
is found in at least 9 of 10 of them, **does not hold** in at most 1 of 10, and is **mixed** in between. A claim that
one method is better than another holds if the 95 % interval of the difference (paired bootstrap over the examples of
test, all seeds on the same draw) is wholly above 0 in at least half of the cells and wholly below 0 in none; it does
not hold if it is wholly above 0 in none. The thresholds were fixed before anything was run. What is marked (ours) the
paper does not state; it goes with what it states."""


def write_measured(store: Store, experiment: Experiment, config: Any, folder: Path) -> None:
    """Write an experiment's results, pictures and page from the cells that have been measured so far.

    Args:
        store: The store, with the records of the cells.
        experiment: One of `reproduce.list_experiments`.
        config: The content of the experiment's `config.yaml`.
        folder: The published folder of the experiment; nothing is written if no cell has been measured.

    Raises:
        OutcomeError: The folder has the results of more cells.
    """
    records = experiment.read_records(store, config)
    if not records:
        return
    collected = experiment.collect_results(store, config, records)
    results = _round_figures({"made": collect_provenance(store, experiment, config), **collected})
    results["findings"] = [dataclasses.asdict(finding) for finding in experiment.build_page(results).findings]
    write_results(folder, results, count_cells)
    write_page(experiment, folder)


def count_cells(results: dict[str, Any]) -> int:
    """Return the number of cells that have been made for results."""
    num_cells, _ = results["made"]["cells"]
    return int(num_cells)


def collect_provenance(store: Store, experiment: Experiment, config: Any) -> dict[str, Any]:
    """Return the inputs of results, and the state of their cells.

    Args:
        store: The store, with the records of the cells.
        experiment: One of `reproduce.list_experiments`.
        config: The content of the experiment's `config.yaml`.

    Returns:
        Seeds, bases, recipes, tasks, config and versions; `cells`: the numbers of cells made and of all cells;
        `refused`: the reasons of refusals by cell; `seconds`: the total duration of the measurements.
    """
    records = experiment.read_records(store, config)
    size = store.size
    refusals = experiment.read_refusals(store, config)
    versions = sorted({json.dumps(record.versions, sort_keys=True) for record in records})
    return {
        "seeds": list(size.seeds),
        "base": size.base,
        "domains": [domain.name for domain in size.domains],
        "max_length": size.max_length,
        "config": config.model_dump(mode="json"),
        "pretraining": size.pretraining.model_dump(mode="json"),
        "tuning": {kind: training.model_dump(mode="json") for kind, training in size.tuning.items()},
        "few_shot": {kind: training.model_dump(mode="json") for kind, training in size.few_shot.items()},
        "tasks": {name: _task_figures(store, name) for name in size.tasks},
        "cells": [len(records) + len(refusals), len(experiment.list_cells(store, config))],
        "refused": refusals,
        "seconds": round(sum(record.seconds for record in records)),
        "versions": [json.loads(text) for text in versions],
    }


def _task_figures(store: Store, name: str) -> dict[str, Any]:
    data = store.load_data(name)
    num_examples = {split.name: len(split) for split in (data.train, data.dev, data.test) if split is not None}
    return {"name": data.name, "domain": store.size.tasks[name].domain, "labels": len(data.labels), **num_examples}


def _round_figures(value: Any) -> Any:
    """Round every float to six significant digits; further digits differ from machine to machine."""
    if isinstance(value, dict):
        return {name: _round_figures(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_round_figures(member) for member in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_page(experiment: Experiment, folder: Path) -> None:
    """Write an experiment's pictures and page from its `results.json`, and remove obsolete pictures.

    Args:
        experiment: One of `reproduce.list_experiments`.
        folder: The published folder of the experiment; nothing is written if it has no `results.json`.
    """
    if not (folder / "results.json").is_file():
        return
    results = read_results(folder)
    page = experiment.build_page({name: value for name, value in results.items() if name != "findings"})
    for picture_file in folder.glob("*.svg"):
        if picture_file.name not in page.pictures:
            picture_file.unlink()
    for name, picture in page.pictures.items():
        write_atomic(folder / name, picture.decode("utf-8"))
    write_atomic(folder / "README.md", _format_page(experiment, results["made"], page))


def _format_page(experiment: Experiment, provenance: dict[str, Any], page: Page) -> str:
    """Write the page between its title and the provenance of its results."""
    num_complete, num_cells = provenance["cells"]
    domains = ", ".join(f"M_{base} ({name})" for base, name in enumerate(provenance["domains"], start=1))
    seeds = provenance["seeds"]
    sections = [
        f"# {experiment.title}",
        experiment.question,
        f"Made by `python experiments/reproduce.py {experiment.name}`; the figures are in `results.json`. "
        f"M_0 is {provenance['base']}; then, pre-trained on one after the other, {domains}. ± is the "
        f"standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))}).",
    ]
    if num_complete < num_cells:
        sections.append(
            f"**Not complete: {num_complete} of {num_cells} cells so far; the same command makes the others.**"
        )
    rows = [[finding.claim, f"**{finding.verdict}**", finding.figure] for finding in page.findings]
    findings_table = markdown_table(["finding", "", "what decides"], rows)
    sections += [page.text, "## Which findings hold here", findings_table]
    if provenance["refused"]:
        lines = [f"- {name}: {reason}" for name, reason in provenance["refused"].items()]
        sections.append("## What was refused\n\n" + "\n".join(lines))
    sections.append(_format_provenance(provenance))
    return "\n\n".join(sections) + "\n"


def _format_provenance(provenance: dict[str, Any]) -> str:
    """List recipes, tasks, cells and versions."""
    pretraining = provenance["pretraining"]
    max_length = provenance["max_length"]
    lines = [f"pre-training a base: {_format_training(pretraining)}, blocks of {pretraining['block']} tokens"]
    for kind, training in provenance["tuning"].items():
        lines.append(f"tuning, {kind}: {_format_training(training)}")
    for kind, training in provenance["few_shot"].items():
        lines.append(f"few labels and hops of a chain, {kind}: {_format_training(training)}")
    for name, task in provenance["tasks"].items():
        lines.append(f"{name}: {_format_task(name, task)}, {max_length} tokens")
    hours = provenance["seconds"] / 3600
    lines.append(f"{provenance['cells'][0]} cells, {hours:.2f} core-hours without the tunings they share")
    for versions in provenance["versions"]:
        lines.append(", ".join(f"{package} {version}" for package, version in versions.items()))
    return "## What was run\n\n" + "\n".join(f"- {line}" for line in lines)


def _format_training(training: dict[str, Any]) -> str:
    length = f"{training['steps']} steps" if training["steps"] else f"{training['epochs']:g} epochs"
    rate = training["learning_rate"]
    return f"{length} of {training['batch_size']}" + (f", peak rate {rate:g}" if isinstance(rate, float) else "")


def _format_task(name: str, task: dict[str, Any]) -> str:
    num_examples = " / ".join(f"{task[split]:,} {split}" for split in ("train", "dev", "test") if split in task)
    name_prefix = "" if task["name"] == name else f"{task['name']}, "
    return f"{name_prefix}{task['domain']}, {task['labels']} classes, {num_examples}"


def write_index(experiments: tuple[Experiment, ...], folder: Path) -> None:
    """Write the table of all claims from the published results.

    Args:
        experiments: All experiments, measured or not.
        folder: The folder of the experiments' published folders.
    """
    rows = []
    for experiment in experiments:
        file = folder / experiment.name / "results.json"
        link = f"[{experiment.name}]({experiment.name}/README.md)"
        if not file.is_file():
            rows.append([MISSING, experiment.title, "not measured", "", experiment.name])
            continue
        for finding in json.loads(file.read_text(encoding="utf-8"))["findings"]:
            rows.append([finding["part"], finding["claim"], f"**{finding['verdict']}**", finding["figure"], link])
    table = markdown_table(["of the paper", "claim", "", "what decides", "experiment"], rows)
    write_atomic(folder / "README.md", f"{INDEX_INTRODUCTION}\n\n{table}\n")
