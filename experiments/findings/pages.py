"""From results to JSON, pages and the index of the paper's claims."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from tables import read_results, table, write_results

from regraft.checkpoint import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from findings.experiment import Experiment, Page
    from findings.store import Store

INDEX = """# The paper's claims, tested

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


def made(store: Store, experiment: Experiment, config: Any) -> dict[str, Any]:
    """Say what results were made from: seeds, sizes, the config, and how much of it is there."""
    found, refused, size = experiment.found(store, config), experiment.refused(store, config), store.size
    versions = sorted({json.dumps(cell["versions"], sort_keys=True) for cell in found})
    return {
        "seeds": list(size.seeds),
        "base": size.base,
        "domains": [domain.name for domain in size.domains],
        "max_length": size.max_length,
        "config": config.model_dump(mode="json"),
        "pretraining": size.pretraining.model_dump(mode="json"),
        "tuning": {kind: one.model_dump(mode="json") for kind, one in size.tuning.items()},
        "few_shot": {kind: one.model_dump(mode="json") for kind, one in size.few_shot.items()},
        "tasks": {name: _rows(store, name) for name in size.tasks},
        "cells": [len(found) + len(refused), len(experiment.cells(store, config))],
        "refused": refused,
        "seconds": round(sum(cell["seconds"] for cell in found)),
        "versions": [json.loads(text) for text in versions],
    }


def _rows(store: Store, name: str) -> dict[str, Any]:
    data = store.data(name)
    sizes = {split.name: len(split) for split in (data.train, data.dev, data.test) if split is not None}
    return {"name": data.name, "domain": store.size.tasks[name].domain, "labels": len(data.labels), **sizes}


def write_experiment(store: Store, experiment: Experiment, config: Any, folder: Path) -> None:
    """Write an experiment's results, pictures and page, as far as it has been run.

    Args:
        store: Where its cells are.
        experiment: The experiment.
        config: Its config.
        folder: Where to; nothing is written if no cell is there.

    Raises:
        OutcomeError: It has the results of more cells.
    """
    found = experiment.found(store, config)
    if not found:
        return
    results = _rounded({"made": made(store, experiment, config), **experiment.collect(store, config, found)})
    results["findings"] = [dataclasses.asdict(finding) for finding in experiment.page(results).findings]
    write_results(folder, results, lambda some: int(some["made"]["cells"][0]))
    write_page(experiment, folder)


def write_page(experiment: Experiment, folder: Path) -> None:
    """Write an experiment's pictures and page from its `results.json`.

    Args:
        experiment: The experiment.
        folder: Where that is; nothing is written if it is not there.
    """
    if not (folder / "results.json").is_file():
        return
    results = read_results(folder)
    page = experiment.page({name: value for name, value in results.items() if name != "findings"})
    for old in folder.glob("*.svg"):
        if old.name not in page.pictures:
            old.unlink()
    for name, picture in page.pictures.items():
        write_atomic(folder / name, picture.decode("utf-8"))
    write_atomic(folder / "README.md", _page(experiment, results["made"], page))


def _page(experiment: Experiment, made: dict[str, Any], page: Page) -> str:
    there, every = made["cells"]
    parts = [
        f"# {experiment.title}",
        f"{experiment.question}",
        f"Made by `python experiments/reproduce.py {experiment.name}`; the figures are in `results.json`. "
        f"M_0 is {made['base']}; then, pre-trained on one after the other, {_names(made['domains'])}. ± is the "
        f"standard deviation over {len(made['seeds'])} seeds ({', '.join(map(str, made['seeds']))}).",
    ]
    if there < every:
        parts.append(f"**Not complete: {there} of {every} cells so far; the same command makes the others.**")
    rows = [[finding.claim, f"**{finding.verdict}**", finding.figure] for finding in page.findings]
    parts += [page.text, "## Which findings hold here", table(["finding", "", "what decides"], rows)]
    if made["refused"]:
        parts.append("## What was refused\n\n" + "\n".join(f"- {name}: {why}" for name, why in made["refused"].items()))
    parts.append(_made(made))
    return "\n\n".join(parts) + "\n"


def _names(domains: list[str]) -> str:
    return ", ".join(f"M_{number} ({name})" for number, name in enumerate(domains, start=1))


def _made(made: dict[str, Any]) -> str:
    lines = [
        f"- pre-training a base: {_training(made['pretraining'])}, blocks of {made['pretraining']['block']} tokens",
        *(f"- tuning, {kind}: {_training(one)}" for kind, one in made["tuning"].items()),
        *(f"- few labels and hops of a chain, {kind}: {_training(one)}" for kind, one in made["few_shot"].items()),
        *(f"- {name}: {_task(name, one)}, {made['max_length']} tokens" for name, one in made["tasks"].items()),
        f"- {made['cells'][0]} cells, {made['seconds'] / 3600:.2f} core-hours without the tunings they share",
        *(f"- {', '.join(f'{name} {number}' for name, number in one.items())}" for one in made["versions"]),
    ]
    return "## What was run\n\n" + "\n".join(lines)


def _training(one: dict[str, Any]) -> str:
    length = f"{one['steps']} steps" if one["steps"] else f"{one['epochs']:g} epochs"
    rate = one["learning_rate"]
    return f"{length} of {one['batch_size']}" + (f", peak rate {rate:g}" if isinstance(rate, float) else "")


def _task(name: str, one: dict[str, Any]) -> str:
    sizes = " / ".join(f"{one[split]:,} {split}" for split in ("train", "dev", "test") if split in one)
    called = "" if one["name"] == name else f"{one['name']}, "
    return f"{called}{one['domain']}, {one['labels']} classes, {sizes}"


def write_index(experiments: tuple[Experiment, ...], folder: Path) -> None:
    """Write the table of all claims, from the results that are there.

    Args:
        experiments: All of them.
        folder: Where their folders are.
    """
    rows = []
    for experiment in experiments:
        file, link = folder / experiment.name / "results.json", f"[{experiment.name}]({experiment.name}/README.md)"
        if not file.is_file():
            rows.append(["–", experiment.title, "not measured", "", experiment.name])
            continue
        for finding in json.loads(file.read_text(encoding="utf-8"))["findings"]:
            rows.append([finding["part"], finding["claim"], f"**{finding['verdict']}**", finding["figure"], link])
    head = ["of the paper", "claim", "", "what decides", "experiment"]
    write_atomic(folder / "README.md", f"{INDEX}\n\n{table(head, rows)}\n")


def _rounded(value: Any) -> Any:
    """Round every number to six digits: more say nothing, and differ from machine to machine."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
